#!/usr/bin/env python
"""Training the evaluation networks of one synthetic set: one after the other in a plain loop, and ours.

    .venv/bin/python scripts/benchmarks/evaluation.py                  # some ten minutes on two cores
    .venv/bin/python scripts/benchmarks/evaluation.py --epochs 30

Five ConvNetW32, 100 images 3 x 32 x 32 (ten a class of the embedded Fashion-MNIST, in three equal channels) with soft
labels, 300 epochs, DSA, tested on 1,000 images. The plain loop is the usual one: a DataLoader over a TensorDataset,
torch.optim.SGD on a module, loss and accuracy read after every batch. All see the same batches and augmentations;
accuracies differ by rounding, which training magnifies. Every competitor runs once, after a warm-up of one epoch;
--rounds for more. Expect the fastest of ours to be some two times faster.
"""

import argparse
import dataclasses

from common import CLASSES, Competitor, arguments, describe_machine, plain_convnet, race, standings

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from pad.data.augment import DSA, augment
from pad.data.preprocessing import fit_preprocessing
from pad.data.sources import load_data
from pad.evaluation import Case, Evaluation, Protocol, accuracy
from pad.nn.networks import build
from pad.rng import generator

LR = 0.01


def fashion(per_class: int, side: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images ``[N, 3, side, side]`` and their classes, then the same for testing."""
    data = load_data("FashionMNISTMini", None).first_per_class(per_class)
    normalise = fit_preprocessing(data, zca=False).apply
    train, test = (
        F.interpolate(normalise(pixels), (side, side)).repeat(1, 3, 1, 1)
        for pixels in (data.train_images, data.test_images)
    )
    return train, data.train_labels, test, data.test_labels


def plain_training(net: nn.Module, images: Tensor, p: Tensor, protocol: Protocol, rng: torch.Generator) -> None:
    """Train ``net`` by the protocol in a plain loop."""

    def optimiser(lr: float) -> torch.optim.SGD:
        return torch.optim.SGD(net.parameters(), lr, momentum=protocol.momentum, weight_decay=protocol.weight_decay)

    sgd, data = optimiser(LR), TensorDataset(images, p)
    net.train()
    for epoch in range(protocol.epochs + 1):
        order = torch.randperm(len(data), generator=rng).tolist()
        loss_sum = right = 0.0
        for x, y in DataLoader(data, protocol.batch_size, sampler=order, num_workers=0):
            x = augment(x, protocol.augmentation.draw(len(x), rng))
            output = net(x)
            loss = F.cross_entropy(output, y)
            loss_sum += loss.item() * len(y)
            right += (output.argmax(dim=1) == y.argmax(dim=1)).sum().item()
            sgd.zero_grad()
            loss.backward()
            sgd.step()
        if epoch == protocol.epochs // 2 + 1:
            sgd = optimiser(0.1 * LR)


def competitors(args: argparse.Namespace) -> list[Competitor]:
    """The plain loop and ours in several settings."""
    name, dsa = f"ConvNetD{args.depth}W{args.width}", DSA()
    images, classes, test_images, test_labels = fashion(args.ipc, args.side)
    noise = torch.randn(len(images), CLASSES, generator=generator(0, "benchmark", "labels"))
    p = (5.0 * F.one_hot(classes, CLASSES) + noise).softmax(dim=1)
    protocol = Protocol(dsa, epochs=args.epochs - 1, batch_size=args.batch, together=1, compile="off")

    def plain(protocol: Protocol) -> list[float]:
        accuracies = []
        for j in range(args.networks):
            shape = 3, CLASSES, (args.side, args.side)
            like = build(name, *shape, 0, "evaluation", j)
            net = plain_convnet(args.depth, args.width, 3, args.side, like)
            plain_training(net, images, p, protocol, generator(0, "evaluation", name, j))
            accuracies.append(accuracy(net, test_images, test_labels))
        return accuracies

    def ours(protocol: Protocol) -> list[float]:
        by = Evaluation(protocol=protocol, test_images=test_images, test_labels=test_labels)
        case = Case(network=name, training_set=lambda j: (images, p), lr=LR)
        *_, last = by.train(case, range(args.networks))
        return last.accuracies

    settings = {
        "ours": {},
        "ours, all together": {"together": args.networks},
        "ours, fused": {"compile": "fused"},
        "ours, compiled": {"compile": "on"},
        "ours, compiled, all together": {"compile": "on", "together": args.networks},
    }
    runs = {"plain loop": (plain, protocol)}
    for title, changes in settings.items():
        if not (args.eager and changes.get("compile") == "on") and (args.together or "together" not in changes):
            runs[title] = (ours, dataclasses.replace(protocol, **changes))
    return [
        Competitor(
            title,
            lambda run=run, given=given: run(given),
            ours=run is ours,
            warm_up=lambda run=run, given=given: run(dataclasses.replace(given, epochs=0)),
        )
        for title, (run, given) in runs.items()
    ]


def main(command_line: list[str] | None = None) -> None:
    parser = arguments(__doc__)
    parser.add_argument("--networks", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=300)
    parser.add_argument("--ipc", type=int, default=10, help="images of each class")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--depth", type=int, default=3)
    parser.add_argument("--side", type=int, default=32, help="pixels")
    parser.add_argument("--eager", action="store_true", help="leave out those by torch.compile")
    parser.add_argument("--together", action="store_true", help="also train all networks at once, which takes longer")
    parser.set_defaults(rounds=1)
    args = parser.parse_args(command_line)
    if args.tiny:
        args.networks, args.epochs, args.ipc, args.batch = 2, 3, 2, 8
        args.width, args.depth, args.side, args.eager = 8, 1, 8, True
    print(describe_machine(), flush=True)
    mean = {"mean accuracy %": lambda c: 100 * sum(c.result) / len(c.result)}
    print(standings(race(competitors(args), args.rounds), **mean))


if __name__ == "__main__":
    main()
