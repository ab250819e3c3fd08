"""Greedy maximisation of set functions: naive, lazy and stochastic, to the last image, so that the picks are an order.

A set function keeps what it knows of the picks so far, and says what further images would add. Similarities are held as
multiples of 2^-24, so that sums of them in float64 are exact for some 100 million images: gains do not depend on the
order of summation, and images that are tied are tied exactly.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from pad.errors import InputError

OPTIMISERS = ("lazy", "naive", "stochastic")
_GRID = 2.0**24
_BLOCK = 8  # candidates that lazy greedy evaluates together at first
_CHUNK = 256  # rows of an [n, n] matrix that are copied at once
_PANEL = 128  # columns of a factor between updates of its kernel
_IMPOSSIBLE = -torch.finfo(torch.float64).max  # the gain of an image that would make a determinant zero


class SetFunction(Protocol):
    """A function of sets of images 0..n-1, and a growing set, empty at first.

    costly: whether a gain is computed when asked for; otherwise all are at hand, and laziness has nothing to save.
    """

    n: int
    device: torch.device
    costly: bool

    def gains(self, candidates: Tensor) -> Tensor:
        """What each of ``candidates [m]`` int64 would add to the function of the set, ``[m]`` float64."""

    def add(self, pick: Tensor) -> None:
        """Put the image ``pick [1]`` int64 into the set."""


def maximise(
    function: SetFunction, optimiser: str = "lazy", rng: torch.Generator | None = None, epsilon: float = 0.1
) -> Tensor:
    """All images in the order in which greedy maximisation picks them, ``[n]`` int64 on the CPU; ties: lowest first.

    * naive evaluates every image for each pick: n^2 gains.
    * lazy returns the same. For a submodular function an image's gain never grows, so old gains are upper bounds, and
      only images whose bound is highest need be evaluated (Minoux 1978); here a block of them at a time.
    * stochastic evaluates a random sample for each pick (arXiv 1409.7938), drawn by ``rng``. For k picks the paper
      samples (n / k) ln(1 / epsilon) images each time. The order is cut at any k, so pick number k samples that many:
      the paper's guarantee, 1 - 1/e - epsilon of the best value in expectation for monotone functions, then holds for
      the first k images for all k. Some n ln(n) ln(1 / epsilon) gains.

    Raises InputError for another optimiser.
    """
    if optimiser not in OPTIMISERS:
        raise InputError(f"there is no greedy optimiser {optimiser!r}; there are {', '.join(OPTIMISERS)}")
    if optimiser == "stochastic":
        return _stochastic(function, rng, epsilon)
    everything = torch.arange(function.n, device=function.device)
    bounds = torch.full((function.n,), math.inf, dtype=torch.float64, device=function.device)
    picked = torch.zeros(function.n, dtype=torch.bool, device=function.device)
    picks = []
    for _ in range(function.n):
        if optimiser == "lazy" and function.costly:
            pick = _refresh(function, bounds, picked)
        else:
            pick = function.gains(everything).masked_fill_(picked, -math.inf).argmax(keepdim=True)
        bounds.index_fill_(0, pick, -math.inf)
        picked.index_fill_(0, pick, True)
        function.add(pick)
        picks.append(pick)
    return torch.cat(picks).cpu()


def _refresh(function: SetFunction, bounds: Tensor, picked: Tensor) -> Tensor:
    """The image of the highest gain, ``[1]``; evaluates, in place, as many ``bounds`` as that needs."""
    known = picked.clone()
    block = min(_BLOCK, function.n)
    while True:
        best = bounds.argmax(keepdim=True)
        if known[best]:
            return best
        candidates = bounds.masked_fill(known, -math.inf).topk(block).indices
        gains = function.gains(candidates).masked_fill_(picked[candidates], -math.inf)
        bounds[candidates] = gains
        known[candidates] = True
        block = min(2 * block, function.n)


def _stochastic(function: SetFunction, rng: torch.Generator | None, epsilon: float) -> Tensor:
    left = torch.arange(function.n)  # on the CPU: the draws are
    picks = torch.empty(function.n, dtype=torch.int64)
    for k in range(1, function.n + 1):
        size = min(len(left), math.ceil(function.n / k * math.log(1 / epsilon)))
        places = torch.randperm(len(left), generator=rng)[:size].sort().values
        best = function.gains(left[places].to(function.device)).argmax().cpu()
        place = places[best]
        picks[k - 1] = left[place]
        left = torch.cat([left[:place], left[place + 1 :]])
        function.add(picks[k - 1 : k].to(function.device))
    return picks


class FacilityLocation:
    """f(S) = sum over all images i of the largest s_ij, j in S: how well the set stands for every image.

    similarity: symmetric ``[n, n]``, s in [0, 1]; held in float32, rounded to 2^-24. A gain costs n.
    """

    costly = True

    def __init__(self, similarity: Tensor):
        self.similarity = _on_grid(similarity).float()
        self.n, self.device = len(similarity), similarity.device
        self.covered = self.similarity.new_zeros(self.n)  # each image's largest similarity to the set

    def gains(self, candidates: Tensor) -> Tensor:
        return torch.cat(
            [
                (self.similarity[chunk] - self.covered).clamp_(min=0).sum(dim=1, dtype=torch.float64)
                for chunk in candidates.split(_CHUNK)
            ]
        )

    def add(self, pick: Tensor) -> None:
        torch.maximum(self.covered, self.similarity[pick][0], out=self.covered)


class GraphCut:
    """f(S) = weight * (sum of s_ij, i in all images, j in S) - (sum of s_ij, i and j in S): typical, yet not alike.

    similarity: symmetric ``[n, n]``, s in [0, 1]; held in float32, rounded to 2^-24. Submodular since no s is negative;
    monotone only for ``weight`` of 2 or more. Adding an image costs n and updates all gains.
    """

    costly = False

    def __init__(self, similarity: Tensor, weight: float = 1.0):
        self.similarity = _on_grid(similarity).float()
        self.n, self.device = len(similarity), similarity.device
        self.current = weight * self.similarity.sum(dim=0, dtype=torch.float64) - self.similarity.diagonal()

    def gains(self, candidates: Tensor) -> Tensor:
        return self.current[candidates]

    def add(self, pick: Tensor) -> None:
        self.current.sub_(self.similarity[pick][0], alpha=2)


class LogDeterminant:
    """f(S) = log det of the similarities within S: how large a volume the set spans.

    similarity: symmetric positive semi-definite ``[n, n]`` float64; it is overwritten. By the chain rule of
    determinants (arXiv 1709.05135) a gain is the log of what is left of s_jj once the set has explained what it can.
    An image of which nothing is left would make the determinant zero; among such the order is that of the data.
    """

    costly = False

    def __init__(self, similarity: Tensor):
        self.n, self.device = len(similarity), similarity.device
        self.left = similarity.diagonal().clone()
        self.floor = self.n * torch.finfo(torch.float64).eps * self.left.max()
        self.factor = GrowingFactor(similarity)

    def gains(self, candidates: Tensor) -> Tensor:
        left = self.left[candidates]
        return left.log().masked_fill_(left <= self.floor, _IMPOSSIBLE)

    def add(self, pick: Tensor) -> None:
        column, _ = self.factor.add(pick, self.floor)
        self.left.addcmul_(column, column, value=-1)


class GrowingFactor:
    """The Cholesky factor of a kernel (plus ``ridge`` times the identity), one image at a time, in any order.

    kernel: symmetric positive semi-definite ``[n, n]`` float64; it is overwritten. Columns come in panels, after each
    of which one matrix product takes what they explain from the kernel. For all images that is 2 n^3 operations, nearly
    all in large products; a column computed from all columns before it would read n^3 / 2 numbers from memory.
    """

    def __init__(self, kernel: Tensor, ridge: float = 0.0):
        self.kernel, self.ridge = kernel, ridge
        self.panel, self.width = kernel.new_zeros(_PANEL, len(kernel)), 0

    def add(self, pick: Tensor, floor: Tensor | float = 0.0) -> tuple[Tensor, Tensor]:
        """The next column ``[n]``, of image ``pick [1]``, its ridge left out; and 1 / the diagonal entry ``[1]``.

        Both are zero when no more than ``floor`` is left of the diagonal.
        """
        done = self.panel[: self.width]
        column = torch.addmv(self.kernel[pick][0], done.T, done[:, pick][:, 0], alpha=-1)
        pivot = column[pick] + self.ridge
        scale = torch.where(pivot > floor, pivot.clamp(min=0).rsqrt(), 0.0)
        column *= scale
        self.panel[self.width] = column
        self.width += 1
        if self.width == _PANEL:
            self.kernel.addmm_(self.panel.T, self.panel, alpha=-1)
            self.width = 0
        return column, scale


def _on_grid(similarity: Tensor) -> Tensor:
    return similarity.mul(_GRID).round_().div_(_GRID)
