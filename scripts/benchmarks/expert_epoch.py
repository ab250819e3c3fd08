#!/usr/bin/env python
"""One epoch of expert training: a plain loop over a DataLoader against ours.

    .venv/bin/python scripts/benchmarks/expert_epoch.py     # a few minutes on two cores

4,000 images 3 x 32 x 32, ConvNetW32, batches of 128, GSAM, DSA. The plain loop is trajectory matching's usual one: a
data set that hands out one image at a time, a module differentiated by eager autograd, GSAM as an optimiser that loops
over the list of parameters, loss and accuracy read after every batch. Both see the same batches and augmentations, so
they end at the same parameters, up to float32 rounding (last column). Expect ours by the CPU kernels to take about a
third of the time.
"""

import argparse
from collections.abc import Callable, Iterable

from common import CLASSES, Competitor, arguments, describe_machine, difference, plain_convnet, race, standings

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from pad.data.augment import DSA, augment
from pad.experts.gsam import GSAM
from pad.experts.trainer import ExpertTraining
from pad.nn.flat import FlatModel
from pad.nn.networks import build
from pad.nn.replay import AT_ONCE, Replay
from pad.rng import generator

LR, RHO, ALPHA = 0.01, 0.01, 0.3  # the published CIFAR-10 setting; adaptive, without momentum and weight decay
EPSILON = 1e-12


class OneByOne(Dataset):
    """Images and labels, handed out one at a time."""

    def __init__(self, images: Tensor, labels: Tensor):
        self.images, self.labels = images, labels

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.labels[index]

    def __len__(self) -> int:
        return len(self.images)


class ListGSAM(torch.optim.Optimizer):
    """GSAM (arXiv 2203.08065) around a base optimiser, parameter by parameter."""

    def __init__(self, parameters: Iterable[Tensor], base: torch.optim.Optimizer):
        super().__init__(parameters, {})
        self.base = base

    def norm(self, tensors: Iterable[Tensor]) -> Tensor:
        return torch.stack([tensor.norm() for tensor in tensors]).norm()

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor]) -> Tensor:
        """``closure`` sets the gradients and returns the loss; it is called at w and at w + e."""
        parameters = self.param_groups[0]["params"]
        with torch.enable_grad():
            loss = closure()
        scale = RHO / (self.norm(p.abs() * p.grad for p in parameters) + EPSILON)
        for p in parameters:
            state = self.state[p]
            state["old gradient"] = p.grad.clone()
            state["e"] = p.square() * p.grad * scale
            p.add_(state["e"])
        with torch.enable_grad():
            closure()
        old = [self.state[p]["old gradient"] for p in parameters]
        inner = sum((g * p.grad).sum() for g, p in zip(old, parameters))
        new_norm, old_norm = self.norm(p.grad for p in parameters), self.norm(old)
        cosine = inner / (new_norm * old_norm + EPSILON)
        for g, p in zip(old, parameters):
            vertical = g - cosine * old_norm * p.grad / (new_norm + EPSILON)
            p.grad.sub_(vertical, alpha=ALPHA)
            p.sub_(self.state[p]["e"])
        self.base.step()
        return loss


def plain_epoch(net: nn.Module, images: Tensor, labels: Tensor, batch_size: int, rng: torch.Generator) -> Tensor:
    """Train ``net`` for one epoch, where it is; its parameters as one vector."""
    device = next(net.parameters()).device
    order = torch.randperm(len(images), generator=rng).tolist()
    loader = DataLoader(OneByOne(images, labels), batch_size, sampler=order, num_workers=0)
    criterion, augmentation = nn.CrossEntropyLoss(), DSA()
    optimiser = ListGSAM(net.parameters(), torch.optim.SGD(net.parameters(), lr=LR))
    net.train()
    loss_sum = right = seen = 0
    for x, y in loader:
        x, y = x.to(device), y.to(device)
        x = augment(x, augmentation.draw(len(x), rng))
        outputs = []

        def closure() -> Tensor:
            outputs.append(net(x))
            loss = criterion(outputs[-1], y)
            optimiser.zero_grad()
            loss.backward()
            return loss

        loss = optimiser.step(closure)
        loss_sum += loss.item() * len(y)
        right += (outputs[0].argmax(dim=1) == y).sum().item()
        seen += len(y)
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def our_epoch(
    model: FlatModel,
    start: Tensor,
    images: Tensor,
    labels: Tensor,
    batch_size: int,
    *,
    replay: Replay = AT_ONCE,
    count: int | None = None,
) -> Tensor:
    """Parameters after one epoch from ``start``, on the first ``count`` images or all."""
    task = ExpertTraining(
        model=model,
        images=images,
        labels=labels,
        num_classes=CLASSES,
        epoch_indices=lambda epoch: torch.arange(count or len(images)),
        optimiser=GSAM(LR, rho=RHO, alpha=ALPHA),
        augmentation=DSA(),
        batch_size=batch_size,
        epochs=1,
        seed=0,
        replay=replay,
    )
    return list(task.train(0, start))[-1]


def competitors(args: argparse.Namespace, dtype: torch.dtype = torch.float32) -> list[Competitor]:
    """The plain loop, and ours in each way of computing derivatives."""
    rng = generator(0, "benchmark")
    images = torch.randn(args.images, 3, args.side, args.side, generator=rng).to(dtype)
    labels = torch.randint(CLASSES, (args.images,), generator=rng)
    network = build(f"ConvNetD{args.depth}W{args.width}", 3, CLASSES, (args.side, args.side), 0).to(dtype)
    model, fused = FlatModel(network), FlatModel(network, "fused")
    start = model.flatten(network)

    def plain() -> Tensor:
        net = plain_convnet(args.depth, args.width, 3, args.side, network).to(dtype)
        return plain_epoch(net, images, labels, args.batch, generator(0, "expert", 0, 0))

    entries = [
        Competitor("plain loop", plain, ours=False),
        Competitor("ours", lambda: our_epoch(model, start, images, labels, args.batch)),
        Competitor("ours, fused", lambda: our_epoch(fused, start, images, labels, args.batch)),
    ]
    if not args.eager:
        compiled = FlatModel(network, "on")
        entries.append(Competitor("ours, compiled", lambda: our_epoch(compiled, start, images, labels, args.batch)))
    return entries


def main(command_line: list[str] | None = None) -> None:
    parser = arguments(__doc__)
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--depth", type=int, default=3)
    parser.add_argument("--side", type=int, default=32, help="pixels")
    parser.add_argument("--eager", action="store_true", help="leave out that by torch.compile")
    args = parser.parse_args(command_line)
    if args.tiny:
        args.images, args.batch, args.width, args.depth, args.side, args.rounds, args.eager = 40, 16, 8, 1, 8, 1, True
    print(describe_machine(), flush=True)
    entries = race(competitors(args), args.rounds)
    last = entries[0].result
    print(standings(entries, **{"parameters off by": lambda c: difference(c.result, last)}))


if __name__ == "__main__":
    main()
