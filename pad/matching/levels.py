"""Any objective, of a set whose images lie on the levels of a quantised one."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from pad.matching.objective import Gradients, Objective
from pad.quantise import Packed


@dataclass(kw_only=True)
class OnLevels(Objective):
    """Shows ``objective`` the nearest levels of ``packed``, and takes its gradients for those of the images themselves.

    So steps add up in the images until they reach another level (the straight-through estimator, arXiv 1308.3432).
    Labels stay: their gradients are zero.
    """

    objective: Objective
    packed: Packed
    _shown: Tensor | None = field(default=None, init=False, repr=False)  # the same memory each time, for pad.nn.replay

    @property
    def memory(self) -> dict[str, Tensor]:
        return self.objective.memory

    def steps(self, it: int, images: Tensor, labels: Tensor, lr: Tensor) -> Iterator[Gradients]:
        """Loss and gradients of each step."""
        if self._shown is None:
            self._shown = torch.empty_like(images)
            self.packed = self.packed.to(images.device)
        self._shown.copy_(self.packed.nearest(images))
        for found in self.objective.steps(it, self._shown, labels, lr):
            yield replace(found, labels=torch.zeros_like(found.labels))
            self._shown.copy_(self.packed.nearest(images))  # the set has moved
