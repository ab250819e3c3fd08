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
from dataclasses import dataclass

import torch
from torch import Tensor

from pad.data.augment import Augmentation, Draw, augment, augment_and_back
from pad.data.placement import to_device
from pad.distributed import ALONE, Ranks
from pad.matching.objective import Gradients
from pad.nn.flat import FlatModel


@dataclass(frozen=True)
class Step:
    """One inner step: which synthetic images ``indices [B]`` it trains on and how they are augmented."""

    indices: Tensor
    draw: Draw | None

    def share(self, ranks: Ranks) -> tuple["Step", float]:
        """What this rank takes of the mini-batch, and how much of it that is, in 0..1 (0 where images are too few)."""
        n = len(self.indices)
        part = slice(n * ranks.rank // ranks.size, n * (ranks.rank + 1) // ranks.size)
        indices, draw = self.indices[part], self.draw
        if draw is not None and len(draw.u) == n:  # otherwise all images share one row
            draw = Draw(draw.kind, draw.u[part])
        return Step(indices, draw), len(indices) / n


def inner_steps(
    n: int, batch: int, steps: int, augmentation: Augmentation, rng: torch.Generator, device: torch.device | str = "cpu"
) -> list[Step]:
    """The mini-batches of ``steps`` inner steps: chunks of a permutation of ``n``, made afresh whenever it is used up.

    Chunks are taken from the end, as the published code does, so a short remainder comes first.
    """
    plan: list[Step] = []
    chunks: list[Tensor] = []
    for _ in range(steps):
        if not chunks:
            chunks = list(to_device(torch.randperm(n, generator=rng), device).split(batch))
        indices = chunks.pop()
        draw = augmentation.draw(len(indices), rng)
        plan.append(Step(indices, draw and draw.to(device)))
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
) -> Tensor:
    """Parameters ``[N+1, P]`` along N SGD steps from ``theta [P]`` on the synthetic set, shared by ``ranks``."""
    path = theta.new_empty(len(steps) + 1, theta.numel())
    path[0] = theta
    p = labels.softmax(dim=1)
    for i, step in enumerate(steps):
        step, share = step.share(ranks)
        if share:
            x = augment(images[step.indices], step.draw)
            g = model.grad(path[i], x, p[step.indices] * share)
        else:
            g = torch.zeros_like(theta)
        ranks.all_reduce_(g)
        torch.sub(path[i], lr * g, out=path[i + 1])
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Pull ``lam = dL/dtheta_N [P]`` back through the steps of :func:`unroll`: (dL/dimages, dL/dlabels, dL/dlr).

    ``truncated``: TESLA's gradient (arXiv 2211.10586), which holds every theta_i constant, so that lam does not
    change on the way back: each step counts by itself, and not by what it makes of the steps after it. Exact for one
    step; an approximation for more, of the same cost here.
    """
    p = labels.softmax(dim=1)
    d_images, d_p, d_lr = torch.zeros_like(images), torch.zeros_like(p), torch.zeros_like(lr)
    for i in reversed(range(len(steps))):
        step, share = steps[i].share(ranks)
        if share:
            x, back = augment_and_back(images[step.indices], step.draw)
            slope, h_theta, h_x, h_p = model.hvp(path[i], x, p[step.indices] * share, lam)
            d_images.index_add_(0, step.indices, back(h_x), alpha=-1)
            d_p.index_add_(0, step.indices, h_p, alpha=-share)
        else:
            slope, h_theta = torch.zeros_like(lr), torch.zeros_like(lam)
        ranks.all_reduce_(slope, h_theta)
        d_lr -= slope
        if not truncated:
            lam = lam - lr * h_theta
    ranks.all_reduce_(d_images, d_p)
    # d_images and d_p were collected without their common factor lr; through the softmax: dY = p * (dp - <dp, p>).
    d_labels = p * (d_p - (d_p * p).sum(dim=1, keepdim=True))
    return d_images * lr, d_labels * lr, d_lr


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
) -> Gradients:
    """Loss and gradients of ``objective(theta_N) -> (loss, dloss/dtheta_N)`` after steps from ``theta [P]``.

    Exact unless ``truncated``, see :func:`adjoint`. All ``ranks`` have the same arguments and get the same result.
    """
    path = unroll(model, theta, images, labels, lr, steps, ranks=ranks)
    loss, lam = objective(path[-1])
    found = adjoint(model, path, images, labels, lr, steps, lam=lam, ranks=ranks, truncated=truncated)
    return Gradients(loss, *found)
