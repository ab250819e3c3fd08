"""Label-robust and augmentation-robust scores as DD-Ranking documents them (v0.2; arXiv 2505.13300).

An accuracy says little by itself: soft labels and augmentation lift that of random images, too. These scores are made
of gaps between accuracies under one evaluation, all of them fractions in [0, 1]:

HLR  acc(whole set, hard labels) - acc(distilled images, hard labels), "hard label recovery": smaller is better
IOR  acc(distilled, its labels) - acc(random real images, labels of the same kind), "improvement over random"
LRS  s(w IOR - (1 - w) HLR), the label-robust score
ARS  s(g (gap to random with augmentation) + (1 - g) (gap without)), the augmentation-robust score

with s(a) = (e^a - e^-1) / (e - e^-1), which maps [-1, 1] onto [0, 1], and w = g = 1/2. Its released code puts percent
into s; its documentation, which is followed here, fractions.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

WEIGHT = 0.5

# The accuracies that each is made of
NEEDS: dict[str, tuple[str, ...]] = {
    "hlr": ("full", "syn_hard"),
    "ior": ("syn", "random"),
    "lrs": ("full", "syn_hard", "syn", "random"),
    "ars": ("syn", "random", "syn_plain", "random_plain"),
}


@dataclass(frozen=True)
class Estimate:
    """A mean and its standard error, NaN where there is one value only."""

    mean: float
    se: float

    def as_dict(self) -> dict:
        """For JSON, which has no NaN."""
        return {"mean": self.mean, "se": None if math.isnan(self.se) else self.se}


def scores(
    found: Mapping[str, Estimate], weight: float = WEIGHT, *, same: Mapping[str, str] = {}
) -> dict[str, Estimate]:
    """Those of HLR, IOR, LRS and ARS (keys hlr, ior, lrs, ars) whose accuracies, of :data:`NEEDS`, are there.

    Beside ARS stands the second gap it is made of, that without augmentation, as ior_plain.

    Args:
        found: accuracies as fractions, with standard errors, which are taken as independent. ``random`` and
            ``random_plain`` have labels of the same kind as ``syn``; ``_plain`` is without augmentation.
        weight: w and g.
        same: accuracies that are another one, by name: of a set with hard labels ``syn_hard`` is ``syn``.

    The standard error of a score is that of its argument times the slope of s there.
    """
    parts = {
        "hlr": {"full": 1.0, "syn_hard": -1.0},
        "ior": {"syn": 1.0, "random": -1.0},
        "lrs": {"syn": weight, "random": -weight, "full": weight - 1, "syn_hard": 1 - weight},
        "ior_plain": {"syn_plain": 1.0, "random_plain": -1.0},
        "ars": {"syn": weight, "random": -weight, "syn_plain": 1 - weight, "random_plain": weight - 1},
    }
    gaps = {}
    for name, part in parts.items():
        factors: dict[str, float] = {}
        for need, factor in part.items():
            factors[same.get(need, need)] = factors.get(same.get(need, need), 0.0) + factor
        if found.keys() >= factors.keys():
            gaps[name] = _combined(found, factors)
    return {name: _scaled(gap) if name in ("lrs", "ars") else gap for name, gap in gaps.items()}


def _combined(found: Mapping[str, Estimate], factors: Mapping[str, float]) -> Estimate:
    """The sum of estimates times factors."""
    mean = sum(factor * found[name].mean for name, factor in factors.items())
    return Estimate(mean, math.hypot(*(factor * found[name].se for name, factor in factors.items())))


def _scaled(gap: Estimate) -> Estimate:
    span = math.e - math.exp(-1)
    return Estimate((math.exp(gap.mean) - math.exp(-1)) / span, math.exp(gap.mean) / span * gap.se)
