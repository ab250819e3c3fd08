"""The trajectory-matching loss (MTT, arXiv 2203.11932, eq. 2) with PAD's filters: what counts (2408.03360, 3.3)."""

import torch
from torch import Tensor

from pad.shares import exact_share


def span(match_from: float, match_to: float, count: int) -> tuple[int, int]:
    """The slice [first, last) of ``count`` flat coordinates, shallow to deep, between two shares of the depth.

    first = floor(match_from count), last = floor(match_to count), of shares in [0, 1].
    """
    return int(exact_share(match_from) * count), int(exact_share(match_to) * count)


@torch.no_grad()
def matching_loss(
    theta: Tensor,
    start: Tensor,
    target: Tensor,
    match_from: float = 0.0,
    loss_ratio: float = 0.0,
    *,
    match_to: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """L = sum_K (theta - target)^2 / sum_K (start - target)^2 and dL/dtheta, for flat parameters ``[P]``.

    K, the coordinates that count, is all of them but

    - those outside :func:`span`. With match_to = 1 that is PAD's filter, the first floor(match_from P), shallow to
      deep. A cut may fall inside a tensor;
    - the floor(loss_ratio P) with the smallest (theta - target)^2, of ties the shallower. The gradient takes K as
      given, since it is constant around almost every theta.

    All shares count over all P. The ratio lies in [0, 1).
    """
    difference = theta - target
    weight = torch.ones_like(theta)
    first, last = span(match_from, match_to, theta.numel())
    weight[:first] = 0
    weight[last:] = 0
    dropped = int(exact_share(loss_ratio) * theta.numel())
    if dropped:
        # index_fill_: an assignment to indexed elements on CUDA copies its number to the device, and waits for that
        weight.index_fill_(0, difference.square().argsort(stable=True)[:dropped], 0)
    kept = difference * weight
    scale = ((start - target).square() * weight).sum()
    return kept @ difference / scale, 2 * kept / scale
