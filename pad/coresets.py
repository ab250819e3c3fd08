"""Coresets: real images that a ranking chooses, as training sets of a synthetic set's size (arXiv 2204.08499)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pad.errors import InputError

HARD_LOGIT = 1000.0  # softmax of this against zeros is one-hot to the last bit, in float32 and in float64


def first_of_each_class(rows: Sequence[Tensor], ipc: int, end: str = "easiest") -> Tensor:
    """Data-set indices ``[K * ipc]`` int64, class by class: the first ``ipc`` of each row of a ranking.

    ``rows``: of a :class:`pad.difficulty.ranking.Ranking`. ``end``: "easiest", the first of a row, or "hardest", the
    last of it, hardest first. Raises InputError when a class has fewer images.
    """
    for c, row in enumerate(rows):
        if len(row) < ipc:
            raise InputError(f"ipc: {ipc} images are asked for, but class {c} has {len(row)}")
    return torch.cat([(row if end == "easiest" else row.flip(0))[:ipc] for row in rows])


def hard_logits(classes: Tensor, num_classes: int) -> Tensor:
    """Logits ``[N, K]`` float32 whose softmax is exactly the one-hot label of ``classes [N]`` int64."""
    return HARD_LOGIT * F.one_hot(classes, num_classes).float()
