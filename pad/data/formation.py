"""Multi-formation: a stored image that stands for several smaller ones (IDC, arXiv 2205.14959, sec. 3.2)."""

import torch.nn.functional as F
from torch import Tensor

from pad.errors import InputError


def refuse_unfit_factor(factor: int, size: tuple[int, int]) -> None:
    """Raise InputError when ``factor`` does not divide the sides (H, W) of an image."""
    if any(side % factor for side in size):
        raise InputError(f"factor: {factor} does not divide the sides of images of {size[0]}x{size[1]} pixels")


def decoded(images: Tensor, factor: int) -> Tensor:
    """The images ``[f * f * N, C, H, W]`` that stored ones ``[N, C, H, W]`` stand for, f = ``factor``.

    Each is cut into f x f tiles, which are enlarged to H x W, bilinear, corners not aligned. The order is that of IDC:
    the first tile of all images, then the second, row by row of tiles. Raises InputError when f does not divide H or W.
    """
    if factor == 1:
        return images
    count, channels, height, width = images.shape
    refuse_unfit_factor(factor, (height, width))
    rows, columns = height // factor, width // factor
    tiles = images.reshape(count, channels, factor, rows, factor, columns).permute(2, 4, 0, 1, 3, 5)
    return F.interpolate(tiles.reshape(-1, channels, rows, columns), size=(height, width), mode="bilinear")
