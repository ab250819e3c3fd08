"""Pictures of images, one row per class."""

import bisect
import contextlib
import functools
import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from pad.errors import InputError
from pad.show.names import drawable, font_file
from pad.store.files import save_picture

log = logging.getLogger("pad")

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

MARGIN = 16  # pixels around the picture
GAP = 2  # between tiles
BLOCK_GAP = 28  # between columns of classes
LABEL_GAP = 8  # between a class's name and its tiles
ROWS = 25  # of classes in a column
PER_CLASS = 10  # images that are shown
NAME_WIDTH = 160  # pixels of a class's name, at most
CAPTION_WIDTH = 1000  # of what the caller says of a picture, at most
CAPTION_SIZE = 16
MAX_TILES = 500  # in a picture: some 2000 x 1700 pixels at 64 per tile
INK = (32, 32, 32)


@contextlib.contextmanager
def unless_it_fails(picture: object) -> Iterator[None]:
    """``picture`` is made in the block. One that fails is a warning: what was computed is whole without it."""
    try:
        yield
    except Exception as error:
        log.warning("no picture %s: %s: %s", picture, type(error).__name__, " ".join(str(error).split()))


def image_grid(
    pixels: Tensor, classes: Tensor, class_names: Sequence[str], *, caption: str = "", scale: int | None = None
) -> np.ndarray:
    """A picture of images, one row per class with its name at the left, on white. Returns uint8 [height, width, 3].

    pixels [N, 1 or 3, H, W] in [0, 1]; classes [N] int64, in any order. Rows come by class number, the images of a row
    in the order given. At most 10 images of a class and 500 images in all are shown; the caption says when that leaves
    some out. More than 25 classes stand in several columns. Names and caption are shown as :func:`drawable` has them,
    long ones cut off. ``scale``: whole-number enlargement, without smoothing; None: to tiles of 64 pixels or more.
    Raises InputError when there are neither 1 nor 3 channels.
    """
    channels, height, width = pixels.shape[1:]
    if channels not in (1, 3):
        raise InputError(f"a picture needs images of 1 or 3 channels; these have {channels}")
    scale = scale or math.ceil(64 / max(height, width))
    present, sizes = classes.cpu().unique(return_counts=True)
    columns = min(int(sizes.max()), PER_CLASS)
    shown = present[: max(1, MAX_TILES // columns)].tolist()
    notes = [_shortened(caption, CAPTION_SIZE, CAPTION_WIDTH)] if caption else []
    if columns < sizes.max():
        of_all = f" of {int(sizes.max())}" if sizes.min() == sizes.max() else ""
        notes.append(f"first {columns}{of_all} images per class")
    if len(shown) < len(present):
        notes.append(f"first {len(shown)} of {len(present)} classes")

    tile_height = height * scale
    tile_width = width * scale
    size = min(16, max(11, tile_height // 4))
    names = [_shortened(class_names[c], size, NAME_WIDTH) for c in shown]
    label_width = math.ceil(max(_font(name, size).getlength(name) for name in names))
    blocks = math.ceil(len(shown) / ROWS)
    rows = math.ceil(len(shown) / blocks)
    text = ", ".join(notes)
    top = MARGIN + (28 if text else 0)
    block_width = label_width + LABEL_GAP + columns * (tile_width + GAP) - GAP
    all_blocks = blocks * block_width + (blocks - 1) * BLOCK_GAP
    total_width = 2 * MARGIN + max(all_blocks, math.ceil(_font(text, CAPTION_SIZE).getlength(text)))
    total_height = top + rows * (tile_height + GAP) - GAP + MARGIN
    canvas = np.full((total_height, total_width, 3), 255, dtype=np.uint8)

    def corner(index: int) -> tuple[int, int]:
        """Upper left corner of a class's row: y, x."""
        block, row = divmod(index, rows)
        return top + row * (tile_height + GAP), MARGIN + block * (block_width + BLOCK_GAP)

    classes = classes.to(pixels.device)
    for index, c in enumerate(shown):
        y, x = corner(index)
        x += label_width + LABEL_GAP
        images = pixels[classes == c][:columns].detach().float().nan_to_num().clamp(0, 1).mul(255).round()
        tiles = images.to(torch.uint8).cpu().expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()
        for tile in tiles.repeat(scale, axis=1).repeat(scale, axis=2):
            canvas[y : y + tile_height, x : x + tile_width] = tile
            x += tile_width + GAP

    picture = Image.fromarray(canvas)
    draw = ImageDraw.Draw(picture)
    if text:
        draw.text((MARGIN, MARGIN), text, fill=INK, font=_font(text, CAPTION_SIZE))
    for index, name in enumerate(names):
        y, x = corner(index)
        draw.text((x + label_width, y + tile_height // 2), name, fill=INK, font=_font(name, size), anchor="rm")
    return np.asarray(picture)


def _shortened(name: object, size: int, width: int) -> str:
    """``name`` as it can be drawn, cut off with "..." where it would be wider than ``width`` pixels."""
    name = drawable(name)
    if _font(name, size).getlength(name) <= width:
        return name
    # Each letter is a pixel wide, if not more.
    fitting = bisect.bisect(range(width), width, key=lambda n: math.ceil(_font(name, size).getlength(name[:n] + "...")))
    return name[: max(0, fitting - 1)].rstrip(" ,") + "..."


def _font(text: str, size: int) -> Font:
    """Pillow's own font for ASCII, which is all that it has; for other text one that has :func:`drawable`'s glyphs."""
    return _loaded(text.isascii(), size)


@functools.cache
def _loaded(ascii: bool, size: int) -> Font:
    if ascii:
        return ImageFont.load_default(size=size)
    return ImageFont.truetype(font_file(), size, layout_engine=ImageFont.Layout.BASIC)


def before_after(
    before: Tensor, after: Tensor, classes: Tensor, class_names: Sequence[str], iteration: int, **options: Any
) -> np.ndarray:
    """The images at iteration 0 and at ``iteration`` side by side: two of :func:`image_grid`, with its options."""
    left = image_grid(before, classes, class_names, caption="iteration 0", **options)
    right = image_grid(after, classes, class_names, caption=f"iteration {iteration}", **options)
    return np.concatenate([left, right], axis=1)


def save_grid(path: Path | str, pixels: Tensor, classes: Tensor, class_names: Sequence[str], **options: Any) -> None:
    """Write :func:`image_grid` as a PNG file."""
    save_picture(path, image_grid(pixels, classes, class_names, **options))
