"""What a way of matching is: gradients of a synthetic set, and nothing about settings, files or the loop."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Gradients:
    """The loss (scalar) and its gradients: ``images [N, C, H, W]``, ``labels [N, K]`` (logits), ``lr`` (scalar).

    All of them are on the device of the set, and zero where the loss does not depend on a variable.

    layers: for each layer of the network by name, where that was asked for, ``[2]``: what it adds to the loss, and what
    it would add to that of the parameters at the start.
    """

    loss: Tensor
    images: Tensor
    labels: Tensor
    lr: Tensor
    layers: Mapping[str, Tensor] = field(default_factory=dict)


class Objective:
    """The loss that a synthetic set is to make small. A subclass defines :meth:`gradients`, or :meth:`steps`.

    Both get the outer iteration ``it`` >= 0, and the set of K classes, ipc images each, N = ipc * K: ``images
    [N, C, H, W]`` class by class, ``labels [N, K]`` (logits) and ``lr`` (scalar, > 0), which ask for no gradients.
    A method may assume that nothing else changes them, and must not change them itself.

    What it returns is a function of these arguments and of :attr:`memory`. So it draws every random number from
    ``generator(seed, name, it, ...)`` of :mod:`pad.rng` and keeps nothing else from one iteration to the next: a
    resumed run asks for iteration ``it`` without those before it. With several :class:`pad.distributed.Ranks` each
    asks, and all must get the same: work that is shared among them is added up before it is returned.

    A loss or gradient that is not finite, or a loss above the threshold, is returned as it is:
    :class:`pad.distiller.Distiller` skips that step.
    """

    @property
    def memory(self) -> dict[str, Tensor]:
        """Tensors that iterations change, in place, alike on all ranks. They are part of a checkpoint."""
        return {}

    def gradients(self, it: int, images: Tensor, labels: Tensor, lr: Tensor) -> Gradients:
        """Loss and gradients of an iteration of one step. Raises TypeError where a subclass does not define it."""
        raise TypeError(f"{type(self).__name__} defines neither gradients nor steps")

    def steps(self, it: int, images: Tensor, labels: Tensor, lr: Tensor) -> Iterator[Gradients]:
        """Loss and gradients of each step of an iteration; the set moves, in place, before the next are asked for."""
        yield self.gradients(it, images, labels, lr)
