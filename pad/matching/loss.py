"""The trajectory-matching loss (MTT, arXiv 2203.11932, eq. 2) with PAD's filters: what counts (2408.03360, 3.3)."""

from collections.abc import Sequence

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
    weight = _weight(difference, match_from, match_to, loss_ratio)
    kept = difference * weight
    scale = ((start - target).square() * weight).sum()
    return kept @ difference / scale, 2 * kept / scale


@torch.no_grad()
def loss_by_layer(
    theta: Tensor,
    start: Tensor,
    target: Tensor,
    sizes: Sequence[int],
    match_from: float = 0.0,
    loss_ratio: float = 0.0,
    *,
    match_to: float = 1.0,
) -> Tensor:
    """What each layer, of ``sizes`` coordinates in flat order, adds to :func:`matching_loss`: ``[layers, 2]``.

    The first column is sum_l (theta - target)^2 / D, with D = sum_K (start - target)^2 and l the coordinates of K in
    the layer, so that it adds up to the loss. The second is sum_l (start - target)^2 / D, which adds up to 1. The first
    by the second is the loss of the layer taken by itself.
    """
    difference = theta - target
    weight = _weight(difference, match_from, match_to, loss_ratio)
    moved = torch.stack([difference, start - target]).square() * weight
    parts = [part.sum(dim=1) for part in moved.split(list(sizes), dim=1)]
    return torch.stack(parts) / moved[1].sum()


def _weight(difference: Tensor, match_from: float, match_to: float, loss_ratio: float) -> Tensor:
    """1 for the coordinates that count, 0 for the others: ``[P]``, with ``difference`` theta - target."""
    weight = torch.ones_like(difference)
    first, last = span(match_from, match_to, len(weight))
    weight[:first] = 0
    weight[last:] = 0
    dropped = int(exact_share(loss_ratio) * len(weight))
    if dropped:
        # index_fill_: an assignment to indexed elements on CUDA copies its number to the device, and waits for that
        weight.index_fill_(0, difference.square().argsort(stable=True)[:dropped], 0)
    return weight
