"""Labels in the form that synthetic sets hold, logits."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

HARD_LOGIT = 1000.0  # softmax of this against zeros is one-hot to the last bit, in float32 and in float64


def hard_logits(classes: Tensor, num_classes: int) -> Tensor:
    """Logits ``[N, K]`` float32 whose softmax is exactly the one-hot label of ``classes [N]`` int64."""
    return HARD_LOGIT * F.one_hot(classes, num_classes).float()


def logits_of(probabilities: Tensor) -> Tensor:
    """Logits ``[N, K]`` of soft labels: their softmax is ``probabilities [N, K]``, up to rounding."""
    return probabilities.clamp(min=0).log().clamp(min=-HARD_LOGIT)


def looks_like_probabilities(labels: Tensor) -> bool:
    """Whether all rows of ``[N, K]`` lie in 0..1 and sum to 1, about."""
    return bool(labels.min() >= -1e-3 and (labels.sum(1) - 1).abs().max() < 1e-2)


def per_class(ipc: int | Sequence[int], num_classes: int) -> list[int]:
    """How many images each class has: ``ipc``, or the numbers themselves."""
    return [ipc] * num_classes if isinstance(ipc, int) else list(ipc)
