"""Our own Markdown as HTML: headings, tables, lists and paragraphs, as :mod:`pad.study.report` writes them."""

import re

from pad.show.html import Markup, fill, joined, table


def as_html(text: str) -> Markup:
    """Headings of the second level become those of the third, which a page has beneath a section's own."""
    return joined(map(_block, filter(None, text.strip().split("\n\n"))))


def _block(text: str) -> Markup:
    lines = text.splitlines()
    if text.startswith("## "):
        return fill("<h3>$text</h3>", text=_plain(text[3:]))
    if text.startswith("|"):
        head, _, *rows = [[_plain(cell.strip()) for cell in re.findall(r"(?:\\.|[^|\\])+", line)] for line in lines]
        return table(head, rows)
    if text.startswith("- "):
        return fill("<ul>$items</ul>", items=joined(fill("<li>$item</li>", item=_plain(line[2:])) for line in lines))
    return fill("<p>$text</p>", text=_plain(text))


def _plain(text: str) -> str:
    """Without the backslashes before what Markdown would read as more than text."""
    return re.sub(r"\\(.)", r"\1", text)
