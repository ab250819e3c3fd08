"""HTML of one page that needs nothing beside it: text escaped, pictures and plots within."""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

from PIL import Image

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure

GENERATOR = '<meta name="generator" content="pad-report">'  # by which a page is known as ours
INK = "#010203"  # in a plot: the colour of the page's text

_NUMBER = re.compile(r"[-+−]?\d[^a-zA-Z]*(of \d+)?|-?")
_UNSEEN = {code: "\ufffd" for code in (*range(9), 11, 12, *range(14, 32), 127)}  # which HTML may not hold


class Markup(str):
    """HTML; all other text is escaped where :func:`fill` puts it into some."""


def fill(template: str, **parts: object) -> Markup:
    """``template`` with each ``$name`` replaced by the part of that name, escaped unless it is :class:`Markup`."""
    return Markup(Template(template).substitute({name: _escaped(part) for name, part in parts.items()}))


def _escaped(part: object) -> str:
    return part if isinstance(part, Markup) else html.escape(str(part).translate(_UNSEEN))


def joined(parts: Iterable[object], between: str = "\n") -> Markup:
    """Parts one after the other, each escaped unless it is :class:`Markup`."""
    return Markup(between.join(map(_escaped, parts)))


def document(title: str, kicker: str, lead: Markup, sections: Mapping[str, Markup]) -> str:
    """The whole page. ``sections``: by heading; all headings differ in their letters."""
    template = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")
    ids = {heading: re.sub(r"\W+", "-", heading.lower()) for heading in sections}
    part = '<section id="$id">\n<h2>$heading</h2>\n$body\n</section>'
    return fill(
        template,
        title=title,
        kicker=kicker,
        lead=lead,
        contents=joined(fill('<a href="#$id">$heading</a>', id=ids[heading], heading=heading) for heading in sections),
        sections=joined(fill(part, id=ids[heading], heading=heading, body=sections[heading]) for heading in sections),
    )


def table(head: Sequence[object], rows: Sequence[Sequence[object]], kind: str = "") -> Markup:
    """A table that scrolls within itself where it is too wide; columns of numbers stand to the right."""
    right = [all(_NUMBER.fullmatch(str(cell)) for cell in column) for column in zip(*rows)] or [False] * len(head)

    def line(cells: Sequence[object], tag: str) -> Markup:
        marks = [Markup(' class="n"' * number) for number in right]
        return joined(fill(f"<{tag}$mark>$cell</{tag}>", mark=mark, cell=cell) for mark, cell in zip(marks, cells))

    return fill(
        '<div class="scroll" tabindex="0"><table class="$kind"><thead><tr>$head</tr></thead>\n'
        "<tbody>\n$rows\n</tbody></table></div>",
        kind=kind,
        head=line(head, "th"),
        rows=joined(fill("<tr>$cells</tr>", cells=line(row, "td")) for row in rows),
    )


def pairs(items: Mapping[str, object], kind: str) -> Markup:
    """Names and what they are, as a list of the class ``kind``."""
    every = joined(fill("<div><dt>$name</dt><dd>$value</dd></div>", name=name, value=items[name]) for name in items)
    return fill('<dl class="$kind">$every</dl>', kind=kind, every=every)


def picture(data: bytes, alt: str, kind: str) -> Markup:
    """A PNG file within the page, of the class ``kind``."""
    source = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    return fill('<img class="$kind" alt="$alt" src="$source">', kind=kind, alt=alt, source=source)


def png(pixels: np.ndarray) -> bytes:
    """A PNG file of uint8 [H, W, 2 or 4], grey or colours and opacity."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG", optimize=True)
    return file.getvalue()


def plot(name: str, draw: Callable[..., Figure], *arguments: Any, **options: Any) -> Markup:
    """The figure ``draw(*arguments, **options)`` as SVG within the page; equal figures give equal bytes.

    What is drawn in :data:`INK` has the colour of the page's text. ``name`` begins all ids, and so is no other plot's.
    """
    from matplotlib import style

    file = io.StringIO()
    settings = {"svg.hashsalt": "pad", "svg.fonttype": "path"}
    settings |= dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK)
    with style.context(["default", settings]):
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        draw(*arguments, **options).savefig(file, format="svg", transparent=True, metadata=nothing)
    drawn = file.getvalue()
    drawn = drawn[drawn.index("<svg") :].replace(INK, "currentColor")
    drawn = re.sub(r'\bid="|href="#|url\(#', lambda begin: f"{begin[0]}{name}-", drawn)
    return Markup(drawn.replace("<svg", f'<svg role="img" aria-label="{html.escape(name)}"', 1))
