"""The exact gradient of a loss of N unrolled SGD steps, by the discrete adjoint.

Student training on the synthetic set: theta_{i+1} = theta_i - lr * grad l(theta_i; A_i(X[b_i]), softmax(Y[b_i])), with
A_i the step's augmentation and b_i its indices. The published codes keep the autograd graph of all N steps: memory
grows with N times the activations. Here the forward sweep keeps only theta_0..theta_N, (N+1) P floats, and the backward
sweep does one Hessian-vector pass a step; activations of one step live at a time. The result equals differentiating the
unrolled loop, up to float rounding.

With lam = dL/dtheta_N, for i = N-1..0 and (h_theta, h_x, h_p) the derivative of grad_{theta,x,p} l at theta_i along lam
(p = softmax(Y)):

    dL/dlr -= <g_i, lam>;   dL/dX[b_i] -= lr (dA_i)^T h_x;   dL/dp[b_i] -= lr h_p;   lam -= lr h_theta

Everything is a sum over the images of a mini-batch. With several ranks each takes its share of them. g_i, <g_i, lam>
and h_theta are added up as they arise, dL/dX and dL/dp once at the end: the same result, up to float rounding. This
needs a network whose images do not depend on each other (``FlatModel.separable``) and such an augmentation.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from pad.data.augment import Augmentation, augment, augment_and_back
from pad.distributed import ALONE, Ranks
from pad.matching.objective import Gradients
from pad.nn.flat import FlatModel
from pad.nn.replay import AT_ONCE, Replay
from pad.nn.steps import Plan, Step


def inner_steps(n: int, batch: int, steps: int, augmentation: Augmentation, rng: torch.Generator) -> list[Step]:
    """The mini-batches of ``steps`` inner steps: chunks of a permutation of ``n``, made afresh whenever it is used up.

    Chunks are taken from the end, as the published code does, so a short remainder comes first.
    """
    plan: list[Step] = []
    chunks: list[Tensor] = []
    for _ in range(steps):
        if not chunks:
            chunks = list(torch.randperm(n, generator=rng).split(batch))
        indices = chunks.pop()
        plan.append(Step(indices, augmentation.draw(len(indices), rng)))
    return plan


@torch.no_grad()
def unroll(
    model: FlatModel,
    theta: Tensor,
    images: Tensor,
    labels: Tensor,
    lr: Tensor,
    steps: list[Step],
    *,
    ranks: Ranks = ALONE,
    replay: Replay = AT_ONCE,
) -> Tensor:
    """Parameters ``[N+1, P]`` along N SGD steps from ``theta [P]`` on the synthetic set, shared by ``ranks``.

    ``replay``: how steps are done. One that captures them has the same memory for each path, and ``ranks`` of one.
    """
    path = replay.buffer("path", theta, len(steps) + 1, theta.numel())
    path[0] = theta
    p = replay.buffer("p", labels).copy_(labels.softmax(dim=1))
    plan, at = Plan(steps, replay, images.device), replay.row("forwards")
    at.start(0)
    for i in range(len(steps)):

        def work(i: int = i) -> None:
            step, share = plan.step(i, at).share(ranks)
            theta = at.of(path)
            if share:
                x = augment(images[step.indices], step.draw)
                g = model.grad(theta, x, p[step.indices] * share)
            else:
                g = torch.zeros_like(theta)
            ranks.all_reduce_(g)
            at.put(path, theta - lr * g, ahead=1)
            at.move(1)

        replay.run(("forwards", plan.key(i)), work, reads=(images, lr))
    return path


@torch.no_grad()
def adjoint(
    model: FlatModel,
    path: Tensor,
    images: Tensor,
    labels: Tensor,
    lr: Tensor,
    steps: list[Step],
    *,
    lam: Tensor,
    ranks: Ranks = ALONE,
    truncated: bool = False,
    replay: Replay = AT_ONCE,
) -> tuple[Tensor, Tensor, Tensor]:
    """Pull ``lam = dL/dtheta_N [P]`` back through the steps of :func:`unroll`: (dL/dimages, dL/dlabels, dL/dlr).

    ``truncated``: TESLA's gradient (arXiv 2211.10586), which holds every theta_i constant, so that lam does not
    change on the way back: each step counts by itself, and not by what it makes of the steps after it. Exact for one
    step; an approximation for more, of the same cost here. ``replay``: as in :func:`unroll`.
    """
    p = replay.buffer("p", labels).copy_(labels.softmax(dim=1))
    along = replay.buffer("lam", lam).copy_(lam)
    d_images, d_p, d_lr = (
        replay.buffer(f"d_{name}", like).zero_() for name, like in (("x", images), ("p", p), ("lr", lr))
    )
    plan, at = Plan(steps, replay, images.device), replay.row("backwards")
    at.start(len(steps) - 1)
    for i in reversed(range(len(steps))):

        def work(i: int = i) -> None:
            step, share = plan.step(i, at).share(ranks)
            if share:
                x, back = augment_and_back(images[step.indices], step.draw)
                slope, h_theta, h_x, h_p = model.hvp(at.of(path), x, p[step.indices] * share, along)
                d_images.index_add_(0, step.indices, back(h_x), alpha=-1)
                d_p.index_add_(0, step.indices, h_p, alpha=-share)
            else:
                slope, h_theta = torch.zeros_like(lr), torch.zeros_like(along)
            ranks.all_reduce_(slope, h_theta)
            d_lr.sub_(slope)
            if not truncated:
                along.sub_(lr * h_theta)
            at.move(-1)

        replay.run(("backwards", truncated, plan.key(i)), work, reads=(path, images, lr))
    ranks.all_reduce_(d_images, d_p)
    # d_images and d_p were collected without their common factor lr; through the softmax: dY = p * (dp - <dp, p>).
    d_labels = p * (d_p - (d_p * p).sum(dim=1, keepdim=True))
    return d_images * lr, d_labels * lr, d_lr.clone()


def unrolled_gradients(
    model: FlatModel,
    theta: Tensor,
    images: Tensor,
    labels: Tensor,
    lr: Tensor,
    steps: list[Step],
    *,
    objective: Callable[[Tensor], tuple[Tensor, Tensor]],
    ranks: Ranks = ALONE,
    truncated: bool = False,
    replay: Replay = AT_ONCE,
) -> Gradients:
    """Loss and gradients of ``objective(theta_N) -> (loss, dloss/dtheta_N)`` after steps from ``theta [P]``.

    Exact unless ``truncated``, see :func:`adjoint`. All ``ranks`` have the same arguments and get the same result.
    """
    path = unroll(model, theta, images, labels, lr, steps, ranks=ranks, replay=replay)
    loss, lam = objective(path[-1])
    found = adjoint(model, path, images, labels, lr, steps, lam=lam, ranks=ranks, truncated=truncated, replay=replay)
    return Gradients(loss, *found)
