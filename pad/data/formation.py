"""Multi-formation: a stored image that stands for several smaller ones (IDC, arXiv 2205.14959, sec. 3.2).

A stored image is cut into f x f tiles, f the factor, and each is enlarged to the image's sides. Images lie class by
class; within a class the order is IDC's: the first tile of all its images, then the second, row by row of tiles.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pad.errors import InputError


def refuse_unfit_factor(factor: int, size: tuple[int, int], remedy: str = "") -> None:
    """Raise InputError when ``factor`` does not divide the sides (H, W) of an image. ``remedy`` ends the sentence."""
    if any(side % factor for side in size):
        raise InputError(f"factor: {factor} does not divide the sides of images of {size[0]}x{size[1]} pixels{remedy}")


def decoded(images: Tensor, factor: int, num_classes: int | Sequence[int] = 1, grey: Tensor | None = None) -> Tensor:
    """The images ``[f * f * N, C, H, W]`` that stored ones ``[N, C, H, W]`` stand for, f = ``factor``.

    Tiles are enlarged bilinearly, corners not aligned. ``num_classes``: so many parts of equal length, each in IDC's
    order; or the lengths of the parts. ``grey`` ``[C, 1, 1]`` stands at the right and below where f does not divide H
    or W, as in IDC's code; without it that raises InputError.
    """
    if factor == 1:
        return images
    if not isinstance(num_classes, int):
        return torch.cat([decoded(part, factor, grey=grey) for part in images.split(list(num_classes))])
    size = (images.shape[2], images.shape[3])
    if grey is not None:
        images = _padded(images, factor, grey)
    return _enlarged(_tiles(images, factor, num_classes), size)


def pulled_back(gradients: Tensor, factor: int, num_classes: int = 1) -> Tensor:
    """The transpose of :func:`decoded`: gradients in decoded images ``[f * f * N, C, H, W]`` as those in stored ones.

    Returns ``[N, C, H, W]``. By matrices, since CUDA's own way adds up in any order.
    """
    rows, columns = (_of_pixels(side, factor, gradients) for side in gradients.shape[2:])
    return _joined(rows @ gradients @ columns.T, factor, num_classes)


def mixed(images: Tensor, factor: int, num_classes: int = 1) -> Tensor:
    """Stored images ``[N, C, H, W]`` of which :func:`decoded` shows something like ``images [f * f * N, C, H, W]``.

    Their tiles are these images, in that order, reduced to the means of f x f pixels.
    """
    return images if factor == 1 else _joined(F.avg_pool2d(images, factor), factor, num_classes)


def coarsened(images: Tensor, factor: int) -> Tensor:
    """What is left of images ``[N, C, H, W]`` as tiles: each reduced as in :func:`mixed`, and enlarged again.

    Where the factor does not divide a side, to tiles of the next whole number of pixels, means of about f x f each.
    """
    if factor == 1:
        return images
    height, width = images.shape[2:]
    if height % factor or width % factor:
        small = F.adaptive_avg_pool2d(images, (-(-height // factor), -(-width // factor)))
    else:
        small = F.avg_pool2d(images, factor)
    return _enlarged(small, (height, width))


def _tiles(images: Tensor, factor: int, num_classes: int) -> Tensor:
    """``[f * f * N, C, H / f, W / f]`` of images ``[N, C, H, W]``."""
    _, channels, height, width = images.shape
    refuse_unfit_factor(factor, (height, width))
    rows, columns = height // factor, width // factor
    cut = images.reshape((num_classes, -1, channels, factor, rows, factor, columns))
    return cut.permute((0, 3, 5, 1, 2, 4, 6)).reshape(-1, channels, rows, columns)


def _joined(tiles: Tensor, factor: int, num_classes: int) -> Tensor:
    """The inverse of :func:`_tiles`."""
    _, channels, rows, columns = tiles.shape
    cut = tiles.reshape((num_classes, factor, factor, -1, channels, rows, columns))
    return cut.permute((0, 3, 4, 1, 5, 2, 6)).reshape(-1, channels, rows * factor, columns * factor)


def _enlarged(tiles: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(tiles, size=size, mode="bilinear")


def _padded(images: Tensor, factor: int, grey: Tensor) -> Tensor:
    """``images [N, C, H, W]`` with ``grey [C, 1, 1]`` at the right and below: the factor divides their sides."""
    height, width = images.shape[2:]
    sides = (-(-height // factor) * factor, -(-width // factor) * factor)
    if sides == (height, width):
        return images
    padded = grey.to(images).expand(len(images), -1, *sides).clone()
    padded[:, :, :height, :width] = images
    return padded


def _of_pixels(side: int, factor: int, like: Tensor) -> Tensor:
    """``[side / f, side]``: what enlarging makes of each pixel of a tile's side, where the others are 0."""
    pixels = torch.eye(side // factor, dtype=like.dtype, device=like.device)
    return F.interpolate(pixels[None], size=side, mode="linear")[0]
