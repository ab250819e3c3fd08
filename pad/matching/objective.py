"""What everything that is matched has in common: it gives gradients of a synthetic set."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Gradients:
    """The loss and its gradients: ``images [N, C, H, W]``, ``labels [N, K]`` (logits), ``lr`` (scalar)."""

    loss: Tensor
    images: Tensor
    labels: Tensor
    lr: Tensor


class Objective:
    """A function of (iteration, synthetic set): what an outer iteration asks, see :class:`pad.distiller.Distiller`."""

    def gradients(self, it: int, images: Tensor, labels: Tensor, lr: Tensor) -> Gradients:
        """Loss and gradients of outer iteration ``it``, where that is a single step; TypeError where it is not."""
        raise TypeError(f"{type(self).__name__} defines neither gradients nor steps")

    def steps(self, it: int, images: Tensor, labels: Tensor, lr: Tensor) -> Iterator[Gradients]:
        """The gradients of each step of iteration ``it``: the set moves, in place, before the next are asked for."""
        yield self.gradients(it, images, labels, lr)
