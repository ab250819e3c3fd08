#!/usr/bin/env python
"""One iteration of trajectory matching: the unrolled loop against the adjoint, TESLA's truncation, and the floor.

    .venv/bin/python scripts/benchmarks/matching.py            # some ten minutes on two cores, 6 GB of memory
    .venv/bin/python scripts/benchmarks/matching.py --cosine   # how far TESLA's direction is from the gradient

An iteration goes 10 SGD steps from an expert's parameters on 100 synthetic images a step, 3 x 32 x 32, with DSA,
ConvNet of width 128, and gives the matching loss's gradient in images, labels and learning rate. "Unrolled" is how it
is published (arXiv 2203.11932): eager, ``create_graph=True``, the graph of all steps kept, differentiated at the end.
The column of differences says that all but TESLA (2211.10586) give the same image gradient, up to float32 rounding.
Expect the adjoint by the CPU kernels to be two to three times faster than the unrolled loop.
"""

import argparse

from common import (
    CLASSES,
    Competitor,
    Matching,
    describe_machine,
    difference,
    forward_operations,
    matching_arguments,
    product_rate,
    race,
    standings,
)

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pad.data.augment import DSA, augment
from pad.data.preprocessing import fit_preprocessing
from pad.data.sources import load_data
from pad.experts.gsam import GSAM
from pad.experts.trainer import ExpertTraining
from pad.matching.loss import matching_loss
from pad.matching.unroll import Step, inner_steps, unroll, unrolled_gradients
from pad.nn.flat import FlatModel
from pad.nn.networks import build
from pad.nn.replay import AT_ONCE, Replay
from pad.rng import generator
from pad.show.tables import result_table

PASSES = 3 + 8  # of each convolution: forward and two backwards in grad; eight in hvp, forward over reverse


def functional(net: nn.Module, theta: Tensor, x: Tensor) -> Tensor:
    """Logits of a module with its parameters taken from a flat vector."""
    named = list(net.named_parameters())
    parts = theta.split([p.numel() for _, p in named])
    return torch.func.functional_call(net, {name: part.view_as(p) for (name, p), part in zip(named, parts)}, (x,))


Synthetic = tuple[Tensor, Tensor, Tensor]  # images, labels, lr


def unrolled(net: nn.Module, start: Tensor, target: Tensor, data: Synthetic, steps: list[Step]):
    """Loss and gradients (images, labels, lr) by differentiating the whole loop, every step's graph kept."""
    x, y, rate = (tensor.clone().requires_grad_() for tensor in data)
    path = [start.clone().requires_grad_()]
    for step in steps:
        logits = functional(net, path[-1], augment(x[step.indices], step.draw))
        loss = F.cross_entropy(logits, y[step.indices].softmax(dim=1))
        g = torch.autograd.grad(loss, path[-1], create_graph=True)[0]
        path.append(path[-1] - rate * g)
    loss = (path[-1] - target).square().sum() / (start - target).square().sum()
    return loss.detach(), *torch.autograd.grad(loss, (x, y, rate))


def truncated(net: nn.Module, model: FlatModel, start: Tensor, target: Tensor, data: Synthetic, steps: list[Step]):
    """Loss and TESLA's gradients: those of sum_i -lr <g_i, lam> with lam = dL/dtheta_N, every theta_i held constant."""
    path = unroll(model, start, *data, steps)
    loss, lam = matching_loss(path[-1], start, target)
    x, y, rate = (tensor.clone().requires_grad_() for tensor in data)
    total = [torch.zeros_like(tensor) for tensor in (x, y, rate)]
    for at, step in zip(path, steps):
        at = at.clone().requires_grad_()
        logits = functional(net, at, augment(x[step.indices], step.draw))
        g = torch.autograd.grad(F.cross_entropy(logits, y[step.indices].softmax(dim=1)), at, create_graph=True)[0]
        for sum_, part in zip(total, torch.autograd.grad(-rate * (g @ lam), (x, y, rate))):
            sum_ += part
    return loss, *total


def adjoint(
    model: FlatModel,
    start: Tensor,
    target: Tensor,
    data: Synthetic,
    steps: list[Step],
    *,
    truncated: bool = False,
    replay: Replay = AT_ONCE,
):
    """Loss and gradients (images, labels, lr), ours: exact, or TESLA's."""
    result = unrolled_gradients(
        model,
        start,
        *data,
        steps,
        objective=lambda end: matching_loss(end, start, target),
        truncated=truncated,
        replay=replay,
    )
    return result.loss, result.images, result.labels, result.lr


def times(args: argparse.Namespace) -> None:
    """The table of times."""
    problem = Matching(
        depth=args.depth, width=args.width, n=args.images, batch=args.images, count=args.steps, side=args.side
    )
    rest = (problem.start, problem.target, problem.data, problem.steps)
    fused = FlatModel(problem.network, "fused")
    competitors = [
        Competitor("unrolled, C library's default memory", lambda: unrolled(problem.plain, *rest), ours=False),
        Competitor("unrolled, our memory settings", lambda: unrolled(problem.plain, *rest)),
        Competitor("adjoint", lambda: adjoint(problem.model, *rest)),
        Competitor("adjoint, fused", lambda: adjoint(fused, *rest)),
        Competitor("TESLA's truncation", lambda: truncated(problem.plain, problem.model, *rest)),
    ]
    if not args.eager:
        compiled = FlatModel(problem.network, "on")
        competitors.insert(3, Competitor("adjoint, compiled", lambda: adjoint(compiled, *rest)))
    rate = product_rate(args.product)
    race(competitors, args.rounds)
    rate = max(rate, product_rate(args.product))
    operations = forward_operations(problem.model, problem.images) * PASSES * args.steps
    exact = competitors[0].result[1]
    print(
        standings(
            competitors,
            **{
                "image gradient off by": lambda c: difference(c.result[1], exact),
                "share of the floor": lambda c: operations / rate / c.median,
            },
        )
    )
    print(
        f"floor: {operations / 1e9:.4g} G operations ({PASSES} passes x {args.steps} steps), matrix products at "
        f"{rate / 1e9:.1f} G operations/s: {operations / rate:.3g} s"
    )


def expert(args: argparse.Namespace) -> tuple[FlatModel, list[Tensor], Tensor, Tensor]:
    """Four epochs of an expert on the Fashion-MNIST; some of its images and, as labels, the expert's logits."""
    data = load_data("FashionMNISTMini", None).first_per_class(1 if args.tiny else 400)
    images = fit_preprocessing(data, zca=False).apply(data.train_images)
    net = build(f"ConvNetD{args.depth}W{args.cosine_width}", 1, CLASSES, data.size, 0)
    model = FlatModel(net, "fused")
    task = ExpertTraining(
        model=model,
        images=images,
        labels=data.train_labels,
        num_classes=CLASSES,
        epoch_indices=lambda epoch: torch.arange(len(images)),
        optimiser=GSAM(lr=0.01, rho=0.01, alpha=0.3),
        augmentation=DSA(),
        batch_size=256,
        epochs=4,
        seed=0,
    )
    path = [theta.clone() for theta in task.train(0, model.flatten(net))]
    chosen = images[torch.randperm(len(images), generator=generator(0, "benchmark", "chosen"))[: args.images]]
    return model, path, chosen, model.logits(path[-1], chosen)


def cosines(args: argparse.Namespace) -> None:
    """The table of cosines between TESLA's gradient and the exact one, from epoch 1 of an expert to epoch 3."""
    model, path, images, labels = expert(args)
    lr, rows = torch.tensor(0.01), []
    for count in args.cosine_steps:
        steps = inner_steps(len(images), len(images), count, DSA(), generator(0, "benchmark", "cosine"))
        rest = (path[1], path[3], (images, labels, lr), steps)
        exact, tesla = adjoint(model, *rest), adjoint(model, *rest, truncated=True)
        cosine = [F.cosine_similarity(a.flatten(), b.flatten(), dim=0).item() for a, b in zip(tesla[1:3], exact[1:3])]
        ratio = (tesla[1].norm() / exact[1].norm()).item()
        rows.append(
            {
                "steps": count,
                "matching loss": exact[0].item(),
                "cosine, images": cosine[0],
                "cosine, labels": cosine[1],
                "norm ratio, images": ratio,
            }
        )
        print(f"{count} steps done", flush=True)
    print(result_table(rows, list(rows[0])))


def main(command_line: list[str] | None = None) -> None:
    parser = matching_arguments(__doc__)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--eager", action="store_true", help="leave out the adjoint by torch.compile")
    parser.add_argument("--cosine", action="store_true", help="print the cosines of TESLA's gradient instead of times")
    parser.add_argument("--cosine_steps", type=int, nargs="+", default=[10, 20, 40, 80])
    parser.add_argument("--cosine_width", type=int, default=32)
    parser.add_argument("--product", type=int, default=2048, help="side of the matrices whose product is timed")
    args = parser.parse_args(command_line)
    if args.tiny:
        args.width, args.cosine_width, args.depth, args.side, args.images, args.steps = 8, 8, 1, 8, 10, 3
        args.rounds, args.eager, args.cosine_steps, args.product = 1, True, [1, 3], 256
    print(describe_machine())
    cosines(args) if args.cosine else times(args)


if __name__ == "__main__":
    main()
