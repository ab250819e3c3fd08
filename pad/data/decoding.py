"""Image files decoded, in threads, into tensors."""

import contextlib
import functools
import os
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from pad.data.images import one_line
from pad.errors import InputError

# Tried in this order. Pillow knows more formats: some it hands to other programs or to any decoder, some are icons.
_FORMATS = (
    *("JPEG", "PNG", "BMP", "PPM", "TIFF", "WEBP", "GIF", "AVIF"),
    *("JPEG2000", "DIB", "DDS", "PCX", "QOI", "SGI", "TGA"),
)
_GREY = ("1", "L", "LA")  # colour modes
_CHUNK = 256  # files that a decoding thread takes at a time


class _InColour(Exception):
    """A file is in colour, where grey ones were expected."""


@functools.cache
def _formats() -> tuple[str, ...]:
    """Those of ``_FORMATS`` that this Pillow was built with."""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


@functools.cache
def endings() -> dict[str, str]:
    """The endings of files that are read as images, in lower case and with their dot, and the format of each."""
    formats = _formats()
    return {ending: name for ending, name in Image.EXTENSION.items() if name in formats}


def read_images(parts: list[list[Path]], res: int | None, *, as_seen: bool) -> list[Tensor]:
    """Decode the files of each part into uint8 ``[N, C, H, W]``, resized to ``res`` pixels a side.

    Without ``res`` all images have the size of the first. ``as_seen`` turns them as their EXIF data says, and keeps one
    channel if all are grey; otherwise there are three, and each lies as in its file. Raises InputError for a file that
    cannot be used.
    """
    with warnings.catch_warnings():  # holds for the whole process, so it is set here and not by each decoding thread
        warnings.filterwarnings("ignore", module="PIL")  # of odd metadata: the pixels are right or raise an error
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with _opened(parts[0][0]) as image:
            grey = as_seen and image.mode in _GREY
            if as_seen:
                _turn(image)
            size = (res, res) if res else (image.height, image.width)
        if grey:  # until a file says otherwise: no header is read ahead, and most sets need none twice
            with contextlib.suppress(_InColour):
                return [_read(files, size, 1, resize=bool(res), as_seen=as_seen) for files in parts]
        return [_read(files, size, 3, resize=bool(res), as_seen=as_seen) for files in parts]


def _read(files: list[Path], size: tuple[int, int], channels: int, *, resize: bool, as_seen: bool) -> Tensor:
    """uint8 ``[N, channels, H, W]``, ``size`` = (H, W). In threads: the decoder releases the GIL."""
    try:
        images = torch.empty(len(files), channels, *size, dtype=torch.uint8)
    except RuntimeError:
        gigabytes = len(files) * channels * size[0] * size[1] / 1e9
        sizes = f"{len(files)} images of {size[1]}x{size[0]} pixels take {gigabytes:.0f} GB"
        raise InputError(f"{sizes}, more memory than there is; give a smaller res") from None
    pixels = images.numpy()

    def read(start: int) -> None:
        for index in range(start, min(start + _CHUNK, len(files))):
            pixels[index] = _read_image(files[index], size, channels, resize=resize, as_seen=as_seen)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        # raises what the first bad chunk raised, and ends the others
        list(pool.map(read, range(0, len(files), _CHUNK)))
    return images


def _read_image(file: Path, size: tuple[int, int], channels: int, *, resize: bool, as_seen: bool) -> np.ndarray:
    """One file as uint8 ``[channels, H, W]``."""
    height, width = size
    with _opened(file) as image:
        if image.mode == "F" or image.mode.startswith("I"):
            raise InputError(f"{file} has more than 8 bits per channel; convert it to 8 bits")
        if channels == 1 and image.mode not in _GREY:
            raise _InColour
        if as_seen and (resize or sorted(image.size) == sorted(size)):
            _turn(image)
        if image.size != (width, height) and not resize:
            found = f"{image.width}x{image.height}"
            raise InputError(f"{file} is {found} pixels, but the first image is {width}x{height}; give a res")
        pixels = image.convert("L" if channels == 1 else "RGB")  # an image of another size was not decoded up to here
        if pixels.size != (width, height):
            pixels = pixels.resize((width, height), Image.Resampling.BILINEAR)
        return np.asarray(pixels).reshape(height, width, channels).transpose(2, 0, 1)


def _turn(image: Image.Image) -> None:
    """Decode an image and turn it as its EXIF data says; where these are damaged, leave it as it is."""
    image.load()
    with contextlib.suppress(Exception):
        ImageOps.exif_transpose(image, in_place=True)


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Image.Image]:
    """An image file, not decoded yet. What the decoder raises (many types, one per format) becomes an InputError."""
    try:
        # given a path, Pillow 13 maps a turned TIFF of grey into memory with its sides interchanged
        with file.open("rb") as stream, Image.open(stream, formats=_formats()) as image:
            yield image
    except (InputError, _InColour):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise InputError(f"{file} has more pixels than the {Image.MAX_IMAGE_PIXELS} that are safe to decode") from None
    except Exception as error:
        raise InputError(f"{file} cannot be read as an image ({_why(file, error)})") from None


def _why(file: Path, error: Exception) -> str:
    """What was wrong with a file that is no image, as part of one sentence."""
    if file.is_symlink() and not file.exists():
        return "it is a link to a file that is not there"
    if isinstance(error, UnidentifiedImageError):  # it could be opened
        with file.open("rb") as opened:
            begin = opened.read(100)
        if not begin:
            return "it is empty, as a copy or a download that was cut short leaves it"
        if b"git-lfs" in begin:
            return "it is a pointer of Git LFS: git lfs pull brings the image"
        return "it is of no format that is read"
    return one_line(error)
