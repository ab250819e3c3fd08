"""The trajectory-matching loss (MTT, arXiv 2203.11932, eq. 2) with PAD's filters: what counts (2408.03360, 3.3)."""

import torch
from torch import Tensor

from pad.shares import exact_share


def shallow(depth_ratio: float, count: int) -> int:
    """How many of ``count`` flat coordinates, from the shallow end on, are left out: floor(depth_ratio count)."""
    return int(exact_share(depth_ratio) * count)


@torch.no_grad()
def matching_loss(
    theta: Tensor, start: Tensor, target: Tensor, depth_ratio: float = 0.0, loss_ratio: float = 0.0
) -> tuple[Tensor, Tensor]:
    """L = sum_K (theta - target)^2 / sum_K (start - target)^2 and dL/dtheta, for flat parameters ``[P]``.

    K, the coordinates that count, is all of them but

    - the first floor(depth_ratio P), shallow to deep: PAD's filter. A cut may fall inside a tensor;
    - the floor(loss_ratio P) with the smallest (theta - target)^2, of ties the shallower. The gradient takes K as
      given, since it is constant around almost every theta.

    Both ratios lie in [0, 1) and count over all P.
    """
    difference = theta - target
    weight = torch.ones_like(theta)
    weight[: shallow(depth_ratio, theta.numel())] = 0
    dropped = int(exact_share(loss_ratio) * theta.numel())
    if dropped:
        # index_fill_: an assignment to indexed elements on CUDA copies its number to the device, and waits for that
        weight.index_fill_(0, difference.square().argsort(stable=True)[:dropped], 0)
    kept = difference * weight
    scale = ((start - target).square() * weight).sum()
    return kept @ difference / scale, 2 * kept / scale
