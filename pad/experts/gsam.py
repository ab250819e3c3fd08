"""GSAM, surrogate-gap guided sharpness-aware minimisation (arXiv 2203.08065), on the flat parameter vector."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_EPSILON = 1e-12


@dataclass(frozen=True)
class GSAM:
    """GSAM over SGD. ``rho = 0`` is plain SGD whatever ``alpha`` is: the perturbed gradient is then the gradient.

    Args:
        lr, momentum, l2: of the SGD step.
        rho: radius of the perturbation, > 0, or 0 for none; constant over training.
        alpha: weight of the surrogate-gap term.
        adaptive: scale the perturbation by the squared parameters (ASAM, arXiv 2102.11600).
    """

    lr: float
    momentum: float = 0.0
    l2: float = 0.0
    rho: float = 0.0
    alpha: float = 0.0
    adaptive: bool = True

    def perturbation(self, w: Tensor, g: Tensor) -> Tensor:
        """e ``[P]``: the ascent direction at ``w`` for the gradient ``g``."""
        scale = w.abs() if self.adaptive else 1
        scaled = scale * g
        return scale * scaled * (self.rho / (scaled.norm() + _EPSILON))

    def combine(self, g: Tensor, perturbed: Tensor) -> Tensor:
        """The descent direction ``[P]``: the perturbed gradient less ``alpha`` times ``g``'s orthogonal part."""
        norm, perturbed_norm = g.norm(), perturbed.norm()
        cosine = (g @ perturbed) / (norm * perturbed_norm + _EPSILON)
        orthogonal = g - perturbed * (cosine * norm / (perturbed_norm + _EPSILON))
        return perturbed - self.alpha * orthogonal

    @torch.no_grad()
    def step(self, w: Tensor, buffer: Tensor | None, grad: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor | None]:
        """One update of ``w [P]``: returns the new parameters and the new momentum buffer (None without momentum).

        ``grad(w)`` must be the same function (batch and augmentation) at both points where it is called.
        """
        g = grad(w)
        if self.rho:
            g = self.combine(g, grad(w + self.perturbation(w, g)))
        if self.l2:
            g = g + self.l2 * w
        if self.momentum:
            g = buffer = g if buffer is None else self.momentum * buffer + g
        return w - self.lr * g, buffer
