"""Convexified trajectories (MCT, arXiv 2406.19827): of an expert, its ends, and how far each tensor is when.

Each parameter tensor l goes straight from where it began to where it ended:

    theta_l(t) = (1 - beta_l(t)) theta_l(0) + beta_l(t) theta_l(T)
    beta_l(t) = sum_{i <= t} |theta_l(i) - theta_l(i-1)| / sum_{i <= T} |theta_l(i) - theta_l(i-1)|

beta is linear between epochs, so that t may be any real number in [0, T].
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def shares_of_way(rows: Iterable[Tensor], sizes: Sequence[int]) -> Tensor:
    """beta ``[T+1, L]`` float64 of a trajectory's rows ``[P]``, one at a time, for L tensors of ``sizes`` numbers.

    A tensor that never moves gets t / T.
    """
    before, moved = None, []
    for row in rows:
        now = row.double()
        steps = now - (now if before is None else before)
        moved.append(torch.stack([part.norm() for part in steps.split(list(sizes))]))
        before = now
    way = torch.stack(moved).cumsum(dim=0)
    even = torch.linspace(0, 1, len(way), dtype=way.dtype)[:, None]
    return torch.where(way[-1] > 0, way / way[-1], even)


def points(ends: Tensor, shares: Tensor, sizes: Sequence[int], epochs: Iterable[float]) -> Tensor:
    """theta at each of the ``epochs``: ``[n, P]`` float64, of ends ``[2, P]`` and beta ``[T+1, L]``."""
    first, last = ends.double()
    found = []
    for t in epochs:
        before = min(int(t), len(shares) - 2)
        beta = shares[before].lerp(shares[before + 1], t - before).repeat_interleave(torch.tensor(sizes))
        found.append((1 - beta) * first + beta * last)
    return torch.stack(found)
