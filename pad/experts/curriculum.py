"""Which real images an expert sees in each epoch: PAD's filter on information extraction (arXiv 2408.03360, 3.2)."""

import math
from dataclasses import KW_ONLY, dataclass
from fractions import Fraction

import torch
from torch import Tensor

from pad.shares import exact_share

ADD_SCHEDULES = ("linear", "root", "geometric")

REMOVALS = ("step", "linear")


@dataclass(frozen=True)
class Curriculum:
    """Hard images are added, later easy ones removed. Epochs count from 0; ratios are shares of a class in 0..1.

    The first matching row applies to epoch e:

    =============================================  ==================================================================
    e <= add_end_epoch                             the easiest floor(p n)
    e <= rm_epoch_first                            all
    e <= rm_epoch_second                           all but the easiest floor(r n)
    later                                          all but the easiest floor(rm_easy_ratio_second n)
    =============================================  ==================================================================

    p grows from p0 = init_ratio to 1 with t = e / add_end_epoch, as ``add_schedule`` says. "linear" is PAD's:
    p0 + (1 - p0) t. "root" adds most at the beginning, at a rate in inverse proportion to what is in already:
    sqrt(p0^2 + (1 - p0^2) t) (arXiv 1903.09848, section 2). "geometric" adds most at the end: p0^(1 - t), by the same
    factor every epoch (arXiv 1912.08555, section 2).

    r is rm_easy_ratio_first where ``removal`` is "step", PAD's. Where it is "linear", r goes from one ratio to the
    other by the same amount every epoch: rm_easy_ratio_first + (rm_easy_ratio_second - rm_easy_ratio_first) s, with
    s = (e - rm_epoch_first - 1) / (rm_epoch_second - rm_epoch_first). So both remove the same at rm_epoch_first + 1,
    the first epoch that removes any, and from rm_epoch_second + 1 on; rm_easy_ratio_first = 0 begins with none.
    """

    init_ratio: float = 1.0
    add_end_epoch: int = 100
    rm_epoch_first: int = 40
    rm_epoch_second: int = 60
    rm_easy_ratio_first: float = 0.1
    rm_easy_ratio_second: float = 0.1
    _: KW_ONLY
    add_schedule: str = "linear"
    removal: str = "step"

    def window(self, epoch: int, n: int) -> tuple[int, int]:
        """The slice [first, last) of a class of ``n`` images, ranked easiest first, that epoch ``epoch`` uses."""
        if epoch <= self.add_end_epoch:
            return 0, self._added(Fraction(epoch, self.add_end_epoch) if self.add_end_epoch else Fraction(1), n)
        if epoch <= self.rm_epoch_first:
            return 0, n
        first, second = exact_share(self.rm_easy_ratio_first), exact_share(self.rm_easy_ratio_second)
        if epoch > self.rm_epoch_second:
            ratio = second
        elif self.removal == "step":
            ratio = first
        else:
            way = Fraction(epoch - self.rm_epoch_first - 1, self.rm_epoch_second - self.rm_epoch_first)
            ratio = first + (second - first) * way
        return int(ratio * n), n

    def _added(self, t: Fraction, n: int) -> int:
        """floor(p n) at the share ``t`` of the way to all images."""
        init = exact_share(self.init_ratio)
        if self.add_schedule == "linear":
            return int(min(Fraction(1), init + (1 - init) * t) * n)
        if self.add_schedule == "root":  # floor(sqrt(q)) is the whole-number root of floor(q)
            return math.isqrt(int(min(Fraction(1), init**2 + (1 - init**2) * t) * n * n))
        # A power is no fraction: what misses a whole number by rounding alone, as 1000 * 0.729^(2/3) does 810, is that
        # number.
        return int(n * float(init) ** float(1 - t) + 1e-9)

    def indices(self, epoch: int, rows: list[Tensor]) -> Tensor:
        """Data-set indices (int64) of what ``epoch`` uses, for a ranking's ``rows`` (a class each, easiest first)."""
        return torch.cat([row[slice(*self.window(epoch, len(row)))] for row in rows])

    def uses_ranking(self, epochs: int) -> bool:
        """Whether any of the first ``epochs`` epochs leaves an image out (if not, no ranking is needed)."""
        probe = 10**6
        return any(self.window(epoch, probe) != (0, probe) for epoch in range(epochs))
