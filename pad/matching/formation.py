"""Any objective, of a set that is stored in multi-formation."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from torch import Tensor

from pad.data.formation import decoded, pulled_back
from pad.matching.objective import Gradients, Objective


@dataclass(kw_only=True)
class MultiFormation(Objective):
    """Shows ``objective`` the decoded images, and pulls its gradients back to the stored ones.

    Decoding is linear, so this is the gradient through it. Labels are one for each decoded image: of N stored images
    ``[N, C, H, W]`` there are labels ``[factor * factor * N, K]``.
    """

    objective: Objective
    factor: int
    _shown: Tensor | None = field(default=None, init=False, repr=False)  # the same memory each time, for pad.nn.replay

    @property
    def memory(self) -> dict[str, Tensor]:
        return self.objective.memory

    def steps(self, it: int, images: Tensor, labels: Tensor, lr: Tensor) -> Iterator[Gradients]:
        """Loss and gradients of each step, those of images ``[N, C, H, W]`` in the stored ones."""
        form = self.factor, labels.shape[1]
        if self._shown is None:
            self._shown = images.new_empty(len(labels), *images.shape[1:])
        self._shown.copy_(decoded(images, *form))
        for found in self.objective.steps(it, self._shown, labels, lr):
            yield replace(found, images=pulled_back(found.images, *form))
            self._shown.copy_(decoded(images, *form))  # the set has moved
