"""Batches of real images, one class at a time, of a suitable difficulty.

PAD's filter on information extraction (arXiv 2408.03360, section 3.2) as it applies where there are no experts: to the
matching of gradients and distributions.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pad.data.placement import Images, batches
from pad.errors import InputError
from pad.shares import exact_share


def without_ends(rows: Sequence[Tensor], drop_easy: float, drop_hard: float) -> list[Tensor]:
    """Each class's indices, easiest first, without the first floor(drop_easy n) and the last floor(drop_hard n) of n.

    Both shares lie in [0, 1). Raises InputError when a class has none left.
    """
    kept = []
    for c, row in enumerate(rows):
        first, last = (int(exact_share(share) * len(row)) for share in (drop_easy, drop_hard))
        kept.append(row[first : len(row) - last])
        if not len(kept[-1]):
            raise InputError(f"drop_easy: {drop_easy:g} and drop_hard: {drop_hard:g} leave no image of class {c}")
    return kept


@dataclass(frozen=True)
class RealBatches:
    """Random batches of a class.

    Args:
        images: the real training images ``[N, C, H, W]``, preprocessed.
        rows: for each class the indices to draw from.
        size: of a batch; of a class that is smaller, all.
    """

    images: Images
    rows: Sequence[Tensor]
    size: int

    def draw(self, c: int, generator: torch.Generator, size: int | None = None) -> Tensor:
        """Images ``[size, C, H, W]`` of class ``c``, each at most once."""
        row = self.rows[c]
        chosen = row[torch.randperm(len(row), generator=generator)[: size or self.size]]
        return next(batches(self.images, chosen, len(chosen)))
