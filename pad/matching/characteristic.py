"""The distance of characteristic functions, of amplitude and phase (NCFM, arXiv 2502.20653).

Phi(t), the mean over images of exp(i <t, f / |f|>), says all of the distribution of the features' directions f / |f|.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pad.matching.distribution import Distance
from pad.nn.adamw import adamw_
from pad.nn.flat import FlatModel
from pad.rng import normal, seeded

SCALE = 300.0  # of the loss, in the published code alone
PER_SCALE = 16  # frequencies of one scale, as published
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
    # At a = 1 the first bracket can be zero, where the root has no slope: there the gradient is zero
    return SCALE * squares.clamp(min=torch.finfo(squares.dtype).tiny).sqrt().mean()


class SamplingNetwork:
    """psi, which makes frequencies, and learns to make those at which two sets differ most.

    t = psi(z) eps, elementwise, with z and eps normal ``[D]``: psi(z) is the scale, in (-1, 1), of 16 frequencies. psi
    has three linear layers ``[D, D]``, each with a BatchNorm, and LeakyReLU, LeakyReLU and tanh behind them.
    """

    def __init__(self, features: int, rate: float, seed: int, like: Tensor):
        """``features``: D. ``rate``: of AdamW. ``like``: type and device of its numbers."""
        self.rate, self.features = rate, features
        activations: list[nn.Module] = [nn.LeakyReLU(0.2), nn.LeakyReLU(0.2), nn.Tanh()]
        with seeded(seed, "sampling network"):
            layers = [(nn.Linear(features, features), nn.BatchNorm1d(features), last) for last in activations]
        module = nn.Sequential(*(part for layer in layers for part in layer))
        self.model = FlatModel(module)
        self.parameters = self.model.flatten(module).to(like).requires_grad_()
        self.mean, self.squares = (torch.zeros_like(self.parameters, requires_grad=False) for _ in range(2))
        self.updates = torch.zeros((), dtype=torch.float64)

    @property
    def memory(self) -> dict[str, Tensor]:
        learned = {"psi": self.parameters.detach(), "psi_mean": self.mean, "psi_squares": self.squares}
        return learned | {"psi_updates": self.updates}

    def frequencies(self, count: int, rng: torch.Generator) -> Tensor:
        """``[count, D]``, differentiable in the parameters."""
        like = self.parameters
        scales = math.ceil(count / PER_SCALE)
        z, epsilon = (normal(n, self.features, rng=rng, like=like) for n in (scales, count))
        return self.model(like, z).repeat_interleave(PER_SCALE, dim=0)[:count] * epsilon

    @torch.no_grad()
    def learn(self, gradient: Tensor) -> None:
        """One step of AdamW up ``gradient [Q]``; none where that is not finite."""
        if gradient.isfinite().all():
            self.updates += 1
            learned = self.parameters, self.mean, self.squares
            adamw_(*learned, -gradient, updates=self.updates.item(), rate=self.rate)


@dataclass(frozen=True)
class ToCharacteristic:
    """:func:`difference` at so many ``frequencies``, drawn for each class, block and iteration.

    They are normal, or those of ``sampling``, which then is the opponent.
    """

    frequencies: int
    amplitude: float
    sampling: SamplingNetwork | None = None

    def __call__(self, real: Tensor, rng: torch.Generator) -> Distance:
        if sampling := self.sampling:

            def distance(found: Tensor) -> Tensor:
                t = sampling.frequencies(self.frequencies, rng)
                return difference(characteristic(found, t), characteristic(real, t), self.amplitude)

            return distance
        t = normal(self.frequencies, real.shape[1], rng=rng, like=real)
        target = characteristic(real, t)
        return lambda found: difference(characteristic(found, t), target, self.amplitude)
