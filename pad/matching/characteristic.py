"""The distance of characteristic functions, of amplitude and phase (NCFM, arXiv 2502.20653).

Phi(t), the mean over images of exp(i <t, f / |f|>), says all of the distribution of the features' directions f / |f|.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pad.data.placement import to_device
from pad.matching.distribution import Distance

SCALE = 300.0  # of the loss, in the published code alone
SMALLEST = 1e-12  # of the phase's part, whose root would have no slope at 0


def characteristic(features: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Real and imaginary part ``[T]`` of Phi at frequencies ``t [T, D]``, of features ``[n, D]``."""
    angles = F.normalize(features, dim=1) @ t.T
    return angles.cos().mean(dim=0), angles.sin().mean(dim=0)


def difference(found: tuple[Tensor, Tensor], target: tuple[Tensor, Tensor], amplitude: float) -> Tensor:
    """300 mean_t sqrt(a (|Phi| - |Phi*|)^2 + (1 - a) 2 (|Phi| |Phi*| - Re Phi Re Phi* - Im Phi Im Phi*)).

    a = ``amplitude``. The second bracket is 2 |Phi| |Phi*| (1 - cos of the angle between the two). With a = 1/2 the
    root is |Phi - Phi*| / sqrt 2.
    """
    (re, im), (re_target, im_target) = found, target
    size, size_target = torch.hypot(re, im), torch.hypot(re_target, im_target)
    phases = 2 * (size * size_target - re * re_target - im * im_target)
    squares = amplitude * (size - size_target).square() + (1 - amplitude) * phases.clamp(min=SMALLEST)
    return SCALE * squares.sqrt().mean()


@dataclass(frozen=True)
class ToCharacteristic:
    """:func:`difference` at as many normal random ``frequencies``, drawn for each class, block and iteration."""

    frequencies: int
    amplitude: float

    def __call__(self, real: Tensor, rng: torch.Generator) -> Distance:
        t = torch.randn(self.frequencies, real.shape[1], generator=rng, dtype=real.dtype)
        t = to_device(t, real.device)
        target = characteristic(real, t)
        return lambda found: difference(characteristic(found, t), target, self.amplitude)
