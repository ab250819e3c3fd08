"""Names as pictures show them: whatever a class or a method is called, in one line that can be read."""

import functools
import itertools
import unicodedata
from collections.abc import Collection
from pathlib import Path

from PIL import ImageFont


def drawable(name: object) -> str:
    """``name`` in characters that pictures can show; others by their numbers, as ``<U+65E5 672C>``.

    Accents join the letters before them. Shown by number is what has no glyph in :func:`font_file`, line breaks and
    whatever else cannot be seen, and writing from right to left, which the libraries would set in the wrong order. A
    name of nothing but spaces stands in quotes.
    """
    text = unicodedata.normalize("NFC", str(name))
    if not text.strip(" "):
        return f'"{text}"'
    runs = ((seen, "".join(run)) for seen, run in itertools.groupby(text, _can_be_drawn))
    return "".join(run if seen else f"<U+{' '.join(f'{ord(each):04X}' for each in run)}>" for seen, run in runs)


def short(name: object, length: int) -> str:
    """:func:`drawable`, cut off with "…" where it has more than ``length`` characters."""
    text = drawable(name)
    return text if len(text) <= length else text[: length - 1].rstrip(" ,") + "…"


def widest(texts: Collection[str]) -> float:
    """Inches that the widest of ``texts`` takes in a figure, whose letters are 10 points high."""
    font = ImageFont.truetype(font_file(), 100, layout_engine=ImageFont.Layout.BASIC)
    return max(max(0.085 * len(text), font.getlength(text) / 100 * 10 / 72) for text in texts)


def font_file() -> str:
    """DejaVu Sans, which comes with matplotlib, so that a picture is the same whatever fonts a machine has."""
    import matplotlib

    return str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"))


def _can_be_drawn(character: str) -> bool:
    if character.isascii() or not character.isprintable():
        return character.isprintable()
    return unicodedata.bidirectional(character) not in ("R", "AL") and ord(character) in _glyphs()


@functools.cache
def _glyphs() -> frozenset[int]:
    """The numbers of the characters that the font has."""
    from matplotlib.ft2font import FT2Font

    return frozenset(FT2Font(font_file()).get_charmap())
