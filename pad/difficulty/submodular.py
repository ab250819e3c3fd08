"""Greedy maximisation of set functions to the last image, so that the picks are an order.

A set function keeps what it knows of the picks so far, and says what further images would add. Similarities are held as
multiples of 2^-24, so that sums of them in float64 are exact for some 100 million images: gains do not depend on the
order of summation, and images that are tied are tied exactly.
"""

import math
from typing import Protocol

import torch
from torch import Tensor

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


def maximise(function: SetFunction) -> Tensor:
    """All images in the order in which greedy maximisation picks them, ``[n]`` int64 on the CPU; ties: lowest first.

    Greedy maximisation evaluates every image for each pick, n^2 gains. Where gains are costly it is lazy, with the same
    picks: an image's gain never grows for a submodular function, so old gains are upper bounds, and only images whose
    bound is highest need be evaluated (Minoux 1978); here a block of them at a time.
    """
    everything = torch.arange(function.n, device=function.device)
    bounds = torch.full((function.n,), math.inf, dtype=torch.float64, device=function.device)
    picked = torch.zeros(function.n, dtype=torch.bool, device=function.device)
    picks = []
    for _ in range(function.n):
        if function.costly:
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


class FacilityLocation:
    """f(S) = sum over all images i of the largest s_ij, j in S: how well the set stands for every image.

    similarity: symmetric ``[n, n]``, s in [0, 1]; held in float32, rounded to 2^-24. A gain costs n.
    """

    costly = True

    def __init__(self, similarity: Tensor):
        self.similarity = _on_grid(similarity).float()
        self.n = len(similarity)
        self.device = similarity.device
        self.covered = self.similarity.new_zeros(self.n)  # each image's largest similarity to the set

    def gains(self, candidates: Tensor) -> Tensor:
        rows = (self.similarity[chunk] for chunk in candidates.split(_CHUNK))
        return torch.cat([(row - self.covered).clamp_(min=0).sum(dim=1, dtype=torch.float64) for row in rows])

    def add(self, pick: Tensor) -> None:
        torch.maximum(self.covered, self.similarity[pick][0], out=self.covered)


class GraphCut:
    """f(S) = (sum of s_ij, i in all images, j in S) - (sum of s_ij, i and j in S): typical, yet not alike.

    similarity: symmetric ``[n, n]``, s in [0, 1]; held in float32, rounded to 2^-24. Submodular since no s is negative,
    but not monotone. Adding an image costs n and updates all gains.
    """

    costly = False

    def __init__(self, similarity: Tensor):
        self.similarity = _on_grid(similarity).float()
        self.n = len(similarity)
        self.device = similarity.device
        self.current = self.similarity.sum(dim=0, dtype=torch.float64) - self.similarity.diagonal()

    def gains(self, candidates: Tensor) -> Tensor:
        return self.current[candidates]

    def add(self, pick: Tensor) -> None:
        self.current.sub_(self.similarity[pick][0], alpha=2)


class LogDeterminant:
    """f(S) = log det of the similarities within S: how large a volume the set spans.

    similarity: symmetric positive semi-definite ``[n, n]`` float64; it is overwritten. By the chain rule of
    determinants (arXiv 1709.05135) a gain is the log of what is left of s_jj once the set has explained what it can.
    An image of which nothing is left would make the determinant zero. Such images come in the order of the data.
    """

    costly = False

    def __init__(self, similarity: Tensor):
        self.n = len(similarity)
        self.device = similarity.device
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
        self.kernel = kernel
        self.ridge = ridge
        self.panel = kernel.new_zeros(_PANEL, len(kernel))
        self.width = 0  # columns in the panel

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
