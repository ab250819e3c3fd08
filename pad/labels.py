"""Labels of images that are one class for sure, as the logits that synthetic sets hold."""

import torch.nn.functional as F
from torch import Tensor

HARD_LOGIT = 1000.0  # softmax of this against zeros is one-hot to the last bit, in float32 and in float64


def hard_logits(classes: Tensor, num_classes: int) -> Tensor:
    """Logits ``[N, K]`` float32 whose softmax is exactly the one-hot label of ``classes [N]`` int64."""
    return HARD_LOGIT * F.one_hot(classes, num_classes).float()
