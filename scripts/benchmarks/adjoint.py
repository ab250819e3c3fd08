#!/usr/bin/env python
"""Print how exact the adjoint is (a minute or two).

    .venv/bin/python scripts/benchmarks/adjoint.py
    .venv/bin/python scripts/benchmarks/adjoint.py --compile on       # some minutes more, for the compiler
    .venv/bin/python scripts/benchmarks/adjoint.py --compile fused

Relative error of the gradients of images, labels and lr against differentiating the unrolled loop, in float64, with
DSA, a ragged batch and both masks. Expect 1e-16 to 1e-14.
"""

import argparse
import functools

import common  # noqa: F401  finds pad, from any working directory

import torch

from pad.data.augment import DSA, augment
from pad.matching.loss import matching_loss
from pad.matching.unroll import inner_steps, unrolled_gradients
from pad.nn.flat import FlatModel, cross_entropy
from pad.nn.networks import build
from pad.rng import generator
from pad.show.tables import result_table

DEPTH_RATIO, LOSS_RATIO = 0.3, 0.2


@functools.cache
def flat_model(name: str, side: int, compile: str) -> FlatModel:
    """One for each network: it is compiled once."""
    return FlatModel(build(name, 3, 4, (side, side), 0), compile)


def errors(name: str, side: int, count: int, compile: str) -> list[float]:
    """Relative errors of the three gradients after ``count`` steps on ten images of four classes."""
    rng = generator(0, "benchmark", name)
    network = build(name, 3, 4, (side, side), 0).double()
    model = flat_model(name, side, compile)
    theta = model.flatten(network)
    target = theta + 0.05 * torch.randn(len(theta), generator=rng).double()
    images, labels = torch.randn(10, 3, side, side, generator=rng).double(), torch.randn(10, 4, generator=rng).double()
    lr = torch.tensor(0.02, dtype=torch.float64)
    steps = inner_steps(10, 4, count, DSA(), rng)
    ours = unrolled_gradients(
        model,
        theta,
        images,
        labels,
        lr,
        steps,
        objective=lambda end: matching_loss(end, theta, target, DEPTH_RATIO, LOSS_RATIO),
    )
    variables = [tensor.clone().requires_grad_() for tensor in (images, labels, lr)]
    x, y, rate = variables
    at = theta.clone().requires_grad_()
    for step in steps:
        loss = cross_entropy(model(at, augment(x[step.indices], step.draw)), y[step.indices].softmax(dim=1))
        at = at - rate * torch.autograd.grad(loss, at, create_graph=True)[0]
    error, size = (at - target).square(), len(theta)
    kept = torch.ones(size, dtype=torch.bool)
    kept[: int(DEPTH_RATIO * size)] = False
    kept[error.argsort()[: int(LOSS_RATIO * size)]] = False
    exact = torch.autograd.grad(error[kept].sum() / (theta - target).square()[kept].sum(), variables)
    return [((a - b).norm() / b.norm()).item() for a, b in zip((ours.images, ours.labels, ours.lr), exact)]


def main(command_line: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile", default="off", choices=("off", "on", "fused"), help="how derivatives are computed")
    parser.add_argument("--tiny", action="store_true", help="one network, few steps, to see that it runs")
    args = parser.parse_args(command_line)
    cases, counts = (("ConvNetW8", 16), ("MLP", 16), ("LeNet", 32), ("ConvNetD2W8BN", 16)), (1, 7, 20, 80)
    if args.tiny:
        cases, counts = (("MLP", 8),), (1, 3)
    rows = []
    for name, side in cases:
        for count in counts:
            images, labels, lr = errors(name, side, count, args.compile)
            rows.append({"network": name, "steps": count, "images": images, "labels": labels, "lr": lr})
    print(result_table(rows, list(rows[0])))


if __name__ == "__main__":
    main()
