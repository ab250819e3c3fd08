"""Batched augmentation as pure functions of (images, draw): DSA (arXiv 2102.08259) and DC's (2006.05929).

A *draw* holds a batch's random numbers. Drawing and applying are separate, so that the same augmentation can be applied
again: GSAM's second pass and the adjoint's backward sweep replay it exactly. Draws are made on the CPU from an explicit
generator and are a few numbers per image, so every device sees the same ones.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from pad.data.placement import to_device
from pad.errors import InputError

DSA_STRATEGY = "color_crop_cutout_flip_scale_rotate"
DC_STRATEGIES = ("crop_scale_rotate", "crop_noise")
_CROP, _CUTOUT, _SCALE, _ROTATE = 0.125, 0.5, 1.2, 15.0  # DSA's published strengths
_DC_CROP, _DC_SCALE, _DC_ROTATE, _DC_NOISE = 4, 0.2, 45, 0.001  # pixels, +- share, degrees, standard deviation
_DRAWS_PER_IMAGE = 3  # the colour transformations need three numbers, the others fewer


@dataclass(frozen=True)
class Draw:
    """One batch's augmentation: its ``kind`` and float32 ``u [n, 3]``, uniform in [0, 1) ([1, 3] in siamese mode)."""

    kind: str
    u: Tensor

    @property
    def on_host(self) -> bool:
        """Whether its numbers are read on the CPU, so that what applies it cannot be captured."""
        return self.kind in DC_STRATEGIES


class Augmentation(Protocol):
    """How a batch's augmentation is drawn; :func:`augment` applies it."""

    def draw(self, n: int, generator: torch.Generator) -> Draw | None:
        """The augmentation of ``n`` images, from ``generator`` on the CPU; None leaves them as they are."""


def _pick(u: Tensor, count: int) -> Tensor:
    """Uniform integers 0..count-1 from uniform float32: that is at most 1 - 2^-24, so nothing rounds to ``count``."""
    return (u * count).long()


def _color(x: Tensor, u: Tensor) -> Tensor:
    """Brightness, then saturation about the channel mean, then contrast about the image mean."""
    brightness, saturation, contrast = u.to(x.dtype)[:, :, None, None, None].unbind(1)
    x = x + (brightness - 0.5)
    mean = x.mean(dim=1, keepdim=True)
    x = (x - mean) * (2 * saturation) + mean
    mean = x.mean(dim=(1, 2, 3), keepdim=True)
    return (x - mean) * (contrast + 0.5) + mean


def _crop(x: Tensor, u: Tensor) -> Tensor:
    """Shift by whole pixels, uniform in [-s, s] on each axis with s = int(0.125 side + 0.5); zeros move in."""
    height, width = x.shape[2:]

    def source(u: Tensor, side: int) -> Tensor:
        reach = int(_CROP * side + 0.5)
        return torch.arange(side, device=x.device) + (_pick(u, 2 * reach + 1) - reach)[:, None]

    moved, inside = _gather(x, source(u[:, 0], height), source(u[:, 1], width))
    return moved * inside.to(x.dtype)


def _gather(x: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """The pixels at ``rows [n, H]`` and ``columns [n, W]`` of each image; which of them lie in it, ``[n, 1, H, W]``."""
    n, channels, height, width = x.shape
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None, :]
    flat = rows.clamp(0, height - 1)[:, :, None] * width + columns.clamp(0, width - 1)[:, None, :]
    flat = flat.reshape(-1, 1, height * width).expand(n, channels, -1)
    return x.flatten(2).gather(2, flat).view_as(x), inside[:, None]


def _cutout(x: Tensor, u: Tensor) -> Tensor:
    """Zero a square of side int(0.5 side + 0.5) whose centre is uniform over the image, clipped at the border."""

    def hidden(u: Tensor, side: int) -> Tensor:
        size = int(_CUTOUT * side + 0.5)
        first = _pick(u, side + 1 - size % 2) - size // 2
        position = torch.arange(side, device=x.device)
        return (position >= first[:, None]) & (position < first[:, None] + size)

    square = hidden(u[:, 0], x.shape[2])[:, :, None] & hidden(u[:, 1], x.shape[3])[:, None, :]
    return x * (~square)[:, None].to(x.dtype)


def _flip(x: Tensor, u: Tensor) -> Tensor:
    return torch.where((u[:, 0] < 0.5)[:, None, None, None], x.flip(3), x)


def _sample(x: Tensor, *rows: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Bilinear sampling at the affinely transformed grid, two rows of three ``[n]``; zeros outside, corners aligned."""
    matrix = torch.stack([number for row in rows for number in row], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(matrix, list(x.shape), align_corners=True)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=True)


def _scale(x: Tensor, u: Tensor) -> Tensor:
    u = u.to(x.dtype)
    factor = u * (_SCALE - 1 / _SCALE) + 1 / _SCALE
    zero = torch.zeros_like(factor[:, 0])
    return _sample(x, (factor[:, 0], zero, zero), (zero, factor[:, 1], zero))


def _rotate(x: Tensor, u: Tensor) -> Tensor:
    angle = (u[:, 0].to(x.dtype) - 0.5) * (2 * math.radians(_ROTATE))
    cos, sin = angle.cos(), angle.sin()
    zero = torch.zeros_like(cos)
    return _sample(x, (cos, -sin, zero), (sin, cos, zero))


# DC's, as its code computes them, of those images of a batch that have the kind: ``x [n, C, H, W]``, by numbers
# ``u [n, 2]`` on the CPU. ``mean [1, C, 1, 1]`` is the batch's.


def _dc_crop(x: Tensor, u: Tensor, mean: Tensor) -> Tensor:
    """Shift by whole pixels, uniform in [-4, 3] on each axis; the channel means move in."""
    shift = to_device(_pick(u, 2 * _DC_CROP) - _DC_CROP, x.device)
    rows, columns = (torch.arange(side, device=x.device) + shift[:, i, None] for i, side in enumerate(x.shape[2:]))
    moved, inside = _gather(x, rows, columns)
    return torch.where(inside, moved, mean)


def _dc_scale(x: Tensor, u: Tensor, mean: Tensor) -> Tensor:
    """Resize each side to int(side U(0.8, 1.2)) by nearest neighbours, about the centre; zeros move in.

    DC's code knows square images only.
    """
    sides = torch.tensor(x.shape[2:])
    resized = ((1 - _DC_SCALE + 2 * _DC_SCALE * u.double()) * sides).long()
    frame = torch.maximum(resized, sides).amax(dim=1, keepdim=True)  # a square that has room for both
    first = (frame - resized) // 2 - (frame - sides) // 2  # where the resized image begins

    def source(axis: int) -> Tensor:
        new, begin = (to_device(numbers[:, axis, None], x.device) for numbers in (resized, first))
        side = x.shape[2 + axis]
        at = torch.arange(side, device=x.device) - begin
        nearest = (at * (side / new.float())).floor().long()  # torch's rounding, in float32
        # masked_fill: on CUDA torch.where copies a number to the device, and waits for that
        return nearest.clamp(max=side - 1).masked_fill(at >= new, -1)

    moved, inside = _gather(x, source(0), source(1))
    return moved * inside.to(x.dtype)


def _dc_rotate(x: Tensor, u: Tensor, mean: Tensor) -> Tensor:
    """Turn by whole degrees, uniform in [-45, 44], as scipy.ndimage.rotate; the mean of the channel means moves in.

    Values between pixels are those of cubic splines, mirrored at the borders. scipy turns into a larger image of whole
    pixels, from which DC cuts the middle: the centre may thus be off by half a pixel.
    """
    height, width = x.shape[2:]
    degrees = _pick(u[:, :1], 2 * _DC_ROTATE) - _DC_ROTATE
    radians = to_device(degrees, x.device).double() * (math.pi / 180)
    cos, sin = radians.cos(), radians.sin()

    def from_centre(side: int, turned: Tensor) -> Tensor:
        turned = (turned + 0.5).floor()
        return torch.arange(side, device=x.device) + ((turned - side) / 2).trunc() - (turned - 1) / 2

    down = from_centre(height, cos * height + sin.abs() * width)[:, :, None]
    right = from_centre(width, sin.abs() * height + cos * width)[:, None, :]
    cos, sin = cos[:, :, None], sin[:, :, None]
    rows = (cos * down + sin * right).flatten(1) + (height - 1) / 2  # in float64: at the borders the least bit decides
    columns = (cos * right - sin * down).flatten(1) + (width - 1) / 2
    inside = (rows >= 0) & (rows <= height - 1) & (columns >= 0) & (columns <= width - 1)

    knots = (_spline(height, x) @ x @ _spline(width, x).T).flatten(2)
    across = _around(columns, width, x.dtype)
    turned = torch.zeros_like(knots)
    for row, of_row in _around(rows, height, x.dtype):
        for column, of_column in across:
            index = (row * width + column)[:, None].expand_as(knots)
            turned = torch.addcmul(turned, (of_row * of_column)[:, None], knots.gather(2, index))
    return torch.where(inside[:, None], turned, mean.mean()).view_as(x)


def _spline(side: int, like: Tensor) -> Tensor:
    """The matrix ``[side, side]`` from values at pixels to coefficients of cubic B-splines, mirrored at both ends.

    The inverse of the filter (1, 4, 1) / 6 of a signal of period 2 side - 2 (Unser, Splines, 1999).
    """
    pole, period = math.sqrt(3) - 2, 2 * side - 2
    i = torch.arange(side, device=like.device)

    def response(distance: Tensor) -> Tensor:
        far = pole ** (period - distance).double()
        return math.sqrt(3) / (1 - pole**period) * (pole ** distance.double() + far)

    mirrored = ((i > 0) & (i < side - 1)).double()
    return (response((i[:, None] - i).abs()) + response(i[:, None] + i) * mirrored).to(like.dtype)


def _around(at: Tensor, side: int, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """The four splines around float64 positions ``at``: their knots' indices, mirrored into 0..side-1, and weights."""
    at = at.clamp(0, side - 1)
    first = at.floor()
    right = (at - first).to(dtype)
    left = 1 - right
    weights = (left**3, 4 - 3 * right**2 * (1 + left), 4 - 3 * left**2 * (1 + right), right**3)
    last = side - 1
    return [(last - (last - (first.long() + k - 1).abs()).abs(), weight / 6) for k, weight in enumerate(weights)]


def _dc_noise(x: Tensor, u: Tensor, mean: Tensor) -> Tensor:
    """Add Gaussian noise of standard deviation 0.001."""
    rng = torch.Generator().manual_seed(int(u[0, 0] * 2**24))  # all of the number's bits
    return x + _DC_NOISE * to_device(torch.randn(x.shape, generator=rng), x.device).to(x.dtype)


_DC_KINDS = {"crop": _dc_crop, "scale": _dc_scale, "rotate": _dc_rotate, "noise": _dc_noise}


def _each_by_its_kind(x: Tensor, u: Tensor, kinds: Sequence[str]) -> Tensor:
    """Transform each image by one of DC's ``kinds``."""
    mean = x.mean(dim=(0, 2, 3), keepdim=True)
    which = _pick(u[:, 0], len(kinds))
    for i, kind in enumerate(kinds):
        some = (which == i).nonzero().flatten()  # known on the CPU, where draws are made: nothing waits for a device
        if len(some):
            there = to_device(some, x.device)
            x = x.index_copy(0, there, _DC_KINDS[kind](x[there], u[some, 1:], mean))
    return x


_KINDS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "color": _color,
    "crop": _crop,
    "cutout": _cutout,
    "flip": _flip,
    "scale": _scale,
    "rotate": _rotate,
    **{name: partial(_each_by_its_kind, kinds=name.split("_")) for name in DC_STRATEGIES},
}


def augment(x: Tensor, draw: Draw | None) -> Tensor:
    """Apply a draw to images ``[n, C, H, W]``; differentiable in the images. ``None`` returns them as they are."""
    if draw is None:
        return x
    u = draw.u if draw.on_host else to_device(draw.u, x.device)
    return _KINDS[draw.kind](x, u.expand(x.shape[0], -1))


@torch.enable_grad()
def augment_and_back(x: Tensor, draw: Draw | None) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The augmented images, as constants, and what takes (once) a gradient in them back to ``x [n, C, H, W]``."""
    if draw is None:
        return x, lambda gradient: gradient
    x = x.detach().requires_grad_()
    augmented = augment(x, draw)
    return augmented.detach(), lambda gradient: torch.autograd.grad(augmented, x, gradient)[0]


def refuse_unknown_kinds(setting: str, strategy: str) -> None:
    """Raise InputError, naming ``setting``, where a strategy has a transformation that DSA has not."""
    known = DSA_STRATEGY.split("_")
    for kind in strategy.split("_"):
        if kind not in known:
            raise InputError(f"{setting}: {kind!r} is not one of {', '.join(known)}")


class DSA:
    """Differentiable Siamese augmentation: per batch one transformation, drawn uniformly from a strategy.

    Args:
        strategy: names joined by ``_``, out of color, crop, cutout, flip, scale, rotate.
        siamese: all images of a batch share their random numbers.

    Raises InputError for a name that is not one of the six.
    """

    def __init__(self, strategy: str = DSA_STRATEGY, siamese: bool = False):
        refuse_unknown_kinds("dsa_strategy", strategy)
        self.kinds = strategy.split("_")
        self.siamese = siamese

    def draw(self, n: int, generator: torch.Generator) -> Draw:
        kind = self.kinds[int(torch.randint(len(self.kinds), (), generator=generator))]
        return Draw(kind, torch.rand(1 if self.siamese else n, _DRAWS_PER_IMAGE, generator=generator))


class DC:
    """DC's augmentation, batched: each image has one of the strategy's kinds.

    Args:
        strategy: crop_scale_rotate, that of real images and of MNIST in its code, or crop_noise, that of ConvNetBN.
    """

    def __init__(self, strategy: str = DC_STRATEGIES[0]):
        self.strategy = strategy

    def draw(self, n: int, generator: torch.Generator) -> Draw:
        return Draw(self.strategy, torch.rand(n, _DRAWS_PER_IMAGE, generator=generator))


class NoAugmentation:
    """Leaves images as they are."""

    def draw(self, n: int, generator: torch.Generator) -> None:
        return None


@dataclass(frozen=True)
class Mix:
    """One batch's CutMix: image i gets a rectangle of image ``partner[i]``, int64 ``[n]`` on the CPU.

    ``u``: three numbers in [0, 1): the rectangle's share of the image, and where its centre is, down and across.
    """

    partner: Tensor
    u: tuple[float, float, float]


class CutMix:
    """CutMix (Yun et al., arXiv 1905.04899), as distillation papers use it: of ``p`` of the batches, beta 1.

    A batch has one rectangle. Its share of the image is uniform in [0, 1), its centre uniform over the pixels; what
    lies outside is clipped. Each image's partner is another of the batch, or itself, by a random permutation.
    """

    def __init__(self, p: float):
        self.p = p

    def draw(self, n: int, generator: torch.Generator) -> Mix | None:
        """That of ``n`` images, from ``generator`` on the CPU; None leaves them as they are."""
        chance, *u = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
        return Mix(torch.randperm(n, generator=generator), (u[0], u[1], u[2])) if chance < self.p else None


def cutmix(x: Tensor, p: Tensor, mix: Mix | None) -> tuple[Tensor, Tensor]:
    """Images ``[n, C, H, W]`` with their partners' rectangle, and targets ``[n, K]`` mixed by what each image gave.

    ``None`` returns them as they are.
    """
    if mix is None:
        return x, p
    area, *centre = mix.u
    spans = []
    for u, side in zip(centre, x.shape[2:]):
        middle, half = int(u * side), int(side * math.sqrt(area)) // 2
        spans.append((max(middle - half, 0), min(middle + half, side)))
    (top, bottom), (left, right) = spans
    given = (bottom - top) * (right - left) / (x.shape[2] * x.shape[3])
    partner = to_device(mix.partner, x.device)
    mixed = x.clone()
    mixed[:, :, top:bottom, left:right] = x[partner, :, top:bottom, left:right]
    return mixed, (1 - given) * p + given * p[partner]
