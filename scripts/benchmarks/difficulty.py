#!/usr/bin/env python
"""Difficulty: GraNd of 50,000 images by one network, and every greedy ordering of one class of 5,000 images.

    .venv/bin/python scripts/benchmarks/difficulty.py     # a quarter of an hour on two cores

GraNd, ConvNetW32, random images 3 x 32 x 32. The competitor has every image's last-layer gradient by autograd, batch by
batch, as DeepCore does: a forward pass that is recorded, the loss differentiated with respect to the logits, the
products with the layer's input written out, [B, K, D], beside the bias's, and their norm. Ours is the closed form, from
a forward pass that is not recorded. Both passes are the same network's in eval mode; they take most of the time, so a
second table has the scores alone, from features and logits that are there. Last column: how far the norms are apart.

Orderings: random features that vary in 40 directions and a little in all, [5000, 2048], after a ReLU, and logits of ten
classes; the whole class is ordered. Expect seconds each.
"""

import argparse

from common import CLASSES, Competitor, arguments, describe_machine, difference, race, standings

import torch
import torch.nn.functional as F
from torch import Tensor

from pad.difficulty.evidence import Evidence, collect_evidence
from pad.difficulty.methods import METHODS
from pad.difficulty.scores import grand
from pad.nn.networks import Network, build
from pad.rng import generator
from pad.show.tables import result_table

BATCH = 256  # images between two gradients, DeepCore's default


def written_out(logits: Tensor, features: Tensor, labels: Tensor) -> Tensor:
    """Norms ``[B]`` of a batch's last-layer gradients, each gradient written out; ``logits`` need a gradient."""
    loss = F.cross_entropy(logits, labels, reduction="sum")
    (errors,) = torch.autograd.grad(loss, logits)
    with torch.no_grad():
        (_, k), (_, d) = errors.shape, features.shape
        weights = features[:, None, :].repeat(1, k, 1) * errors[:, :, None].repeat(1, 1, d)
        return torch.cat([errors, weights.flatten(1)], dim=1).norm(dim=1)


def autograd_grand(network: Network, images: Tensor, labels: Tensor) -> Tensor:
    """GraNd ``[N]`` from images, with a recorded forward pass."""
    parts = []
    for x, y in zip(images.split(BATCH), labels.split(BATCH)):
        features = network.features(x)
        parts.append(written_out(network.classifier(features), features, y))
    return torch.cat(parts)


def autograd_scores(evidence: Evidence) -> Tensor:
    """The same from features and logits."""
    batches = zip(*(tensor.split(BATCH) for tensor in (evidence.logits, evidence.features, evidence.labels)))
    return torch.cat([written_out(logits.clone().requires_grad_(), h, y) for logits, h, y in batches])


def our_scores(evidence: Evidence) -> Tensor:
    """GraNd ``[N]`` by the closed form."""
    return grand(evidence.logits, evidence.features, evidence.labels)


def scorers(args: argparse.Namespace) -> tuple[list[Competitor], list[Competitor]]:
    """GraNd from images, and from what a forward pass has given."""
    rng = generator(0, "benchmark")
    images = torch.randn(args.images, 3, args.side, args.side, generator=rng)
    labels = torch.randint(CLASSES, (args.images,), generator=rng)
    network = build(args.network, 3, CLASSES, (args.side, args.side), 0).eval()
    evidence = collect_evidence(network, images, labels)
    return [
        Competitor("autograd per batch, from images", lambda: autograd_grand(network, images, labels), ours=False),
        Competitor("closed form, from images", lambda: our_scores(collect_evidence(network, images, labels))),
    ], [
        Competitor("autograd per batch, scores alone", lambda: autograd_scores(evidence), ours=False),
        Competitor("closed form, scores alone", lambda: our_scores(evidence)),
    ]


def random_class(n: int, features: int) -> Evidence:
    """A class of images as a network that is right about most of them might see it."""
    rng = generator(0, "benchmark", "class")
    hidden = torch.randn(n, 40, generator=rng)
    inputs = hidden @ torch.randn(40, features, generator=rng) + 0.3 * torch.randn(n, features, generator=rng)
    logits = 0.4 * hidden @ torch.randn(40, CLASSES, generator=rng)
    logits[:, 0] += 4
    return Evidence(0.1 * inputs.relu(), logits, torch.zeros(n, dtype=torch.int64))


def orderings(args: argparse.Namespace) -> list[Competitor]:
    """Every ordering."""
    whole = random_class(args.class_size, args.features)
    few = whole.of(torch.arange(min(50, len(whole))))
    functions = {name: method.compute for name, method in METHODS.items() if method.kind == "order"}
    return [
        Competitor(
            name,
            lambda function=function: function(whole, generator(0, "order")),
            warm_up=lambda function=function: function(few, generator(0, "order")),
        )
        for name, function in functions.items()
    ]


def main(command_line: list[str] | None = None) -> None:
    parser = arguments(__doc__)
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--side", type=int, default=32, help="pixels")
    parser.add_argument("--network", default="ConvNetW32")
    parser.add_argument("--class_size", type=int, default=5000, help="images to put in order")
    parser.add_argument("--features", type=int, default=2048, help="of each of these")
    args = parser.parse_args(command_line)
    if args.tiny:
        args.images, args.side, args.network, args.rounds = 300, 8, "ConvNetD1W8", 1
        args.class_size, args.features = 40, 16
    print(describe_machine(), flush=True)
    for entries in scorers(args):
        race(entries, args.rounds)
        print(standings(entries, **{"norms off by": lambda c, first=entries[0]: difference(c.result, first.result)}))
    entries = race(orderings(args), args.rounds)
    rows = [
        {"": c.name, "median s": c.median, "from - to": f"{min(c.times):.3g} - {max(c.times):.3g}"} for c in entries
    ]
    print(result_table(rows, list(rows[0])))


if __name__ == "__main__":
    main()
