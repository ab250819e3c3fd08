"""Names in pictures and tables: every one can be read, none is taken for more than a name, and none costs a result."""

import csv
import io
import logging
import re
import unicodedata

import matplotlib
import numpy as np
import pytest
import torch
from helpers import slow
from matplotlib import font_manager
from matplotlib.text import Text
from PIL import ImageFont

from pad.difficulty.ranking import Ranking
from pad.experts.curriculum import Curriculum
from pad.show import difficulty as plots
from pad.show import figures
from pad.show.names import drawable, font_file, short
from pad.show.pictures import CAPTION_WIDTH, NAME_WIDTH, image_grid, unless_it_fails
from pad.study import report
from pad.study.report import Outcome

NUMBERED = {
    "日本語": "<U+65E5 672C 8A9E>",
    "two\nlines\there": "two<U+000A>lines<U+0009>here",
    "שלום": "<U+05E9 05DC 05D5 05DD>",
    "مرحبا ok": "<U+0645 0631 062D 0628 0627> ok",
    "zero\u200bwidth": "zero<U+200B>width",
    "caf\udce9": "caf<U+DCE9>",  # of a file's name that is not UTF-8
    "\U0001f9ff": "<U+1F9FF>",
    "": '""',
    "   ": '"   "',
}
AS_WRITTEN = "plain;naïve;Ελληνικά;кошка;😀;$5_^ vs $6;_hidden;back\\slash \\$;<b>&amp;|*x*`;{a};%d".split(";")
NAMES = [*NUMBERED, *AS_WRITTEN, "long " * 60, "e\u0301te\u0301"]


@pytest.mark.parametrize("name", AS_WRITTEN)
def test_what_the_font_has_is_shown_as_written(name):
    assert drawable(name) == name


@pytest.mark.parametrize("name", NUMBERED, ids=ascii)
def test_what_cannot_be_drawn_is_shown_by_its_number(name):
    assert drawable(name) == NUMBERED[name]


def test_accents_join_their_letters():
    assert drawable("e\u0301te\u0301") == "été" == unicodedata.normalize("NFC", "e\u0301te\u0301")


def test_what_is_shown_has_a_glyph():
    """By Pillow, which draws what its font has not as it draws what no font has."""
    font = ImageFont.truetype(font_file(), 16, layout_engine=ImageFont.Layout.BASIC)
    unknown = bytes(font.getmask("\U0010fffe"))
    for character in map(chr, [*range(0x20, 0x500), 0x0939, 0x2603, 0x4E00, 0xAC00, 0x1F600, 0x1F9FF]):
        shown = drawable(f"x{character}")
        drawn = character.isprintable() and bytes(font.getmask(character)) != unknown
        right_to_left = unicodedata.bidirectional(character) in ("R", "AL")
        assert ("<U+" in shown) == (not drawn or right_to_left), ascii(character)


def test_a_long_name_is_cut_visibly():
    assert short("long " * 60, 22) == "long long long long l…"
    assert short("a, b", 3) == "a…" and short("abc", 3) == "abc"


# ---- pictures


def rankings(names, methods) -> dict[str, Ranking]:
    labels = torch.arange(len(names)).repeat_interleave(3)
    scores = [torch.rand(len(labels), generator=torch.Generator().manual_seed(s)).double() for s in range(len(methods))]
    return {method: Ranking.from_scores(score, labels, len(names), {}) for method, score in zip(methods, scores)}


def texts(figure) -> set[str]:
    """What is written in a drawn figure, after a check that none of it is mathematics but what matplotlib made."""
    written = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text()]
    ours = [text for text in written if "mathdefault" not in text.get_text()]
    assert not [text.get_text() for text in ours if text.get_parse_math() and "$" in text.get_text()]
    return {text.get_text() for text in written}


def drawn(figure) -> set[str]:
    figure.savefig(io.BytesIO(), format="png")  # warns, and so fails, of glyphs and of a layout that leaves no room
    return texts(figure)


@pytest.mark.parametrize(
    "method, count, length",
    [("$5_^ vs $6", len(NAMES), 16), ("m" * 300, 5, 22), slow("日本", 20, 22)],  # quantiles, histograms
    ids=["quantiles", "histograms", "all panels"],
)
def test_figures_of_scores_name_their_classes(method, count, length):
    names = NAMES[:count]
    [ranking] = rankings(names, [method]).values()
    written = drawn(plots.plot_scores(ranking, names, method))
    assert {short(name, length) for name in names} <= written
    assert f"{short(method, 40)}: scores of each class" in written


def test_figures_of_several_methods_name_them():
    methods = [name for name in NAMES if name.strip()]
    written = drawn(plots.plot_correlation(plots.rank_correlation(rankings(["a", "b"], methods)), methods))
    assert {short(name, 40) for name in methods} <= written
    outcomes = [Outcome(name, ipc, seed, [0.1, 0.2]) for name in methods for ipc in (1, 10) for seed in (0, 1)]
    written = drawn(report.plot(report.summarise(outcomes)))
    assert {short(name, 40) for name in methods} <= written
    costly = [Outcome(name, 1, 0, [0.1], bits=1 + i) for i, name in enumerate(methods)]
    written = drawn(report.plot_bits(report.summarise(costly)))
    assert {short(name, 40) for name in methods} <= written
    rows = report.summarise([Outcome(name, 1, 0, [0.1]) for name in methods])
    written = drawn(report.plot_curves(rows, {(name, 1): (name, 0.5) for name in methods}, "x", report.NOTHING))
    assert {short(name, 24) for name in methods} <= written


def ink_of(names, caption="") -> np.ndarray:
    return image_grid(torch.zeros(1, 3, 8, 8), torch.tensor([0]), names, caption=caption)


def test_grids_show_letters_beyond_ascii():
    seen = {ink_of([name]).tobytes() for name in ("é", "ï", "ж", "\u65e5", "\u672c")}
    assert len(seen) == 5, "each in its own shape"
    assert np.array_equal(ink_of(["\u65e5"]), ink_of([drawable("\u65e5")]))
    assert not np.array_equal(ink_of(["x"], "é"), ink_of(["x"], "ï"))


@pytest.mark.parametrize("name", NAMES, ids=lambda name: ascii(name)[:20])
def test_grids_of_any_name(name):
    picture = ink_of([name])
    assert (picture[:, :-90] < 100).all(axis=2).any(), "no name"
    assert picture.shape[1] <= NAME_WIDTH + 8 + 64 + 2 * 16
    wide = ink_of([name], caption=name * 100)
    assert wide.shape[1] <= CAPTION_WIDTH + 2 * 16


def test_pictures_do_not_hang_on_the_users_matplotlibrc(tmp_path, monkeypatch):
    made = rankings(NAMES[:5], ["GraNd"])["GraNd"]
    figures.draw_figure(tmp_path / "1.png", plots.plot_scores, made, NAMES[:5], "GraNd")
    with matplotlib.rc_context({"font.family": "DejaVu Sans Mono", "text.usetex": True, "savefig.dpi": 10}):
        figures.draw_figure(tmp_path / "2.png", plots.plot_scores, made, NAMES[:5], "GraNd")
    assert (tmp_path / "1.png").read_bytes() == (tmp_path / "2.png").read_bytes()


def test_the_font_is_the_one_that_figures_are_drawn_in():
    with matplotlib.style.context("default"):
        assert font_manager.findfont(font_manager.FontProperties()) == font_file()


# ---- what fails


def test_all_pictures_but_the_one_that_fails(tmp_path, monkeypatch, caplog):
    def fails(*arguments):
        raise ValueError("of\nits own")

    monkeypatch.setattr(plots, "plot_correlation", fails)
    made = rankings(["a", "b"], ["GraNd", "EL2N"])
    (tmp_path / "images_GraNd.png").mkdir()  # in the way
    plots.plot_all(tmp_path, made, torch.zeros(6, 3, 8, 8, dtype=torch.uint8), ["a", "b"], Curriculum(), 3)
    warned = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warned) == 2 and warned[1] == f"no picture {tmp_path / 'correlation.png'}: ValueError: of its own"
    written = {path.name for path in tmp_path.iterdir() if path.is_file()}
    assert written == {"scores_GraNd.png", "scores_EL2N.png", "images_EL2N.png", "curriculum.png"}


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_a_stop_is_no_failure_of_a_picture(stop):
    with pytest.raises(stop), unless_it_fails("p.png"):
        raise stop


def test_a_report_is_printed_and_whole_when_its_plot_fails(tmp_path, monkeypatch, capsys, caplog):
    printed = []

    def fails(rows):
        printed.append(capsys.readouterr().out)
        raise RuntimeError("no plot today")

    monkeypatch.setattr(report, "plot", fails)
    report.write_report(tmp_path, [Outcome("A", 1, 0, [0.5])])
    table = (tmp_path / "results.md").read_text()
    assert printed == [f"\n{table}\n"] and "| A | 50.00 |" in table and (tmp_path / "results.csv").exists()
    assert "no picture" in caplog.text and not (tmp_path / "results.png").exists()


# ---- tables


def unescaped(text: str) -> str:
    """CommonMark: a backslash before ASCII punctuation is left out."""
    return re.sub(r"\\([!-/:-@\[-`{-~])", r"\1", text)


@pytest.mark.parametrize("name", ["a|b", "<b>x</b>", "R&amp;D", "*a*", "_a_", "__a__", "`x`", "[a](b)", "a\\|b", "$a$"])
def test_markdown_shows_names_as_they_are(name):
    table = report.markdown(report.summarise([Outcome(name, 1, 0, [0.5], None)], name)).splitlines()
    [line] = [line for line in table if "50.00" in line]
    _, cell, *_ = re.split(r"(?<!\\)\|", line)
    assert unescaped(cell).strip() == name
    bare = re.sub(r"\\.", "", cell)  # what is left to be read as Markdown
    assert not re.search(r"[<>&*`\[\]|$]|(?<![a-z])_|_(?![a-z])", bare)


def test_names_of_plain_words_stay_as_they_are():
    text = report.markdown(report.summarise([Outcome("PAD_depth_0.25 (IPC-10)", 1, 0, [0.5])]))
    assert "| PAD_depth_0.25 (IPC-10) | 50.00 |" in text


def test_a_failure_of_several_lines_is_one_item(tmp_path):
    outcomes = [Outcome("A", 1, 0, None, "first\nsecond <tag> caf\udce9"), Outcome("B", 1, 0, [0.5])]
    report.write_report(tmp_path, outcomes)
    assert "- A, ipc 1, seed 0: first second \\<tag\\> caf\\udce9\n" in (tmp_path / "results.md").read_text("utf-8")
    [row, _] = csv.DictReader(io.StringIO((tmp_path / "results.csv").read_text("utf-8")))
    assert row["failed"] == "seed 0: first\nsecond <tag> caf\\udce9"
