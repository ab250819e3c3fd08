"""Batched augmentation as pure functions of (images, draw): DSA (arXiv 2102.08259) and DC's (2006.05929).

A *draw* holds a batch's random numbers. Drawing and applying are separate, so that the same augmentation can be applied
again: GSAM's second pass and the adjoint's backward sweep replay it exactly. Draws are made on the CPU from an explicit
generator and are a few numbers per image, so every device sees the same ones.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from pad.data.placement import to_device
from pad.errors import InputError

DSA_STRATEGY = "color_crop_cutout_flip_scale_rotate"
_CROP, _CUTOUT, _SCALE, _ROTATE = 0.125, 0.5, 1.2, 15.0  # DSA's published strengths
_DC_CROP, _DC_SCALE, _DC_ROTATE = 4, 0.2, 45.0  # pixels, +- share, degrees
_DRAWS_PER_IMAGE = 3  # the colour transformations need three numbers, the others fewer


@dataclass(frozen=True)
class Draw:
    """One batch's augmentation: its ``kind`` and float32 ``u [n, 3]``, uniform in [0, 1) ([1, 3] in siamese mode)."""

    kind: str
    u: Tensor

    def to(self, device: torch.device | str) -> "Draw":
        """The same draw with its numbers on ``device``, for one that is applied more than once."""
        return Draw(self.kind, to_device(self.u, device))


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
    n, channels, height, width = x.shape

    def source(u: Tensor, side: int) -> Tensor:
        reach = int(_CROP * side + 0.5)
        return torch.arange(side, device=x.device) + (_pick(u, 2 * reach + 1) - reach)[:, None]

    rows, columns = source(u[:, 0], height), source(u[:, 1], width)
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None, :]
    flat = rows.clamp(0, height - 1)[:, :, None] * width + columns.clamp(0, width - 1)[:, None, :]
    flat = flat.reshape(-1, 1, height * width).expand(n, channels, -1)
    moved = x.flatten(2).gather(2, flat).view_as(x)
    return moved * inside[:, None].to(x.dtype)


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


def _crop_scale_rotate(x: Tensor, u: Tensor) -> Tensor:
    """Per image a shift by 4 pixels, a rescaling of each axis by 0.8-1.2, or a turn by 45 degrees, at most.

    The batch's channel mean moves in.
    """
    kind = _pick(u[:, 0], 3)
    shift = _pick(u[:, 1:], 2 * _DC_CROP + 1).to(x.dtype) - _DC_CROP
    u = u.to(x.dtype)
    # masked_fill: on CUDA torch.where copies a number to the device, and waits for that
    dx, dy = ((2 * shift[:, i] / (x.shape[3 - i] - 1)).masked_fill(kind != 0, 0.0) for i in range(2))
    factor = (1 / (1 + _DC_SCALE * (2 * u[:, 1:] - 1))).masked_fill((kind != 1)[:, None], 1.0)
    angle = ((2 * u[:, 1] - 1) * math.radians(_DC_ROTATE)).masked_fill(kind != 2, 0.0)
    cos, sin = angle.cos(), angle.sin()
    mean = x.mean(dim=(0, 2, 3), keepdim=True)
    return _sample(x - mean, (cos * factor[:, 0], -sin, dx), (sin, cos * factor[:, 1], dy)) + mean


_KINDS = {
    "color": _color,
    "crop": _crop,
    "cutout": _cutout,
    "flip": _flip,
    "scale": _scale,
    "rotate": _rotate,
    "crop_scale_rotate": _crop_scale_rotate,
}


def augment(x: Tensor, draw: Draw | None) -> Tensor:
    """Apply a draw to images ``[n, C, H, W]``; differentiable in the images. ``None`` returns them as they are."""
    if draw is None:
        return x
    u = to_device(draw.u, x.device)
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


class CropScaleRotate:
    """DC's augmentation of real training images, batched; each image has its own kind."""

    def draw(self, n: int, generator: torch.Generator) -> Draw:
        return Draw("crop_scale_rotate", torch.rand(n, _DRAWS_PER_IMAGE, generator=generator))


class NoAugmentation:
    """Leaves images as they are."""

    def draw(self, n: int, generator: torch.Generator) -> None:
        return None
