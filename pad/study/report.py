"""The report of a study: tables, as Markdown and as CSV, and its plots."""

import csv
import io
import math
import re
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path

from pad.show.figures import draw_figure
from pad.show.results import SCORES, plus_minus, title
from pad.show.tables import standard_error
from pad.store.files import write_text
from pad.study.frame import PLAIN, Frame
from pad.study.plots import by_bits, plot, plot_bits, plot_curves
from pad.study.published import MEAN, NOTHING, Published
from pad.study.rows import Row, in_words


@dataclass(frozen=True)
class Outcome:
    """What came out of one cell: the accuracies (0..1) of the networks trained on its set, or why there are none."""

    method: str
    ipc: int
    seed: int
    accuracies: list[float] | None
    failed: str | None = None
    _: KW_ONLY
    seconds: float | None = None
    made: str | None = None  # the set's file, relative to the study's folder, or to its store
    results: list[dict] | None = None  # of stage 3, where there are several: each of a network and a training set
    metrics: Mapping[str, Mapping] | None = None  # of the first network, where there are rows for them
    distilling: Mapping[str, float | None] | None = None  # what making the set took (:func:`pad.store.run.costs`)
    bits: float | None = None  # what the set costs, per class; known where sets are there in fewer bits
    of: str | None = None  # the method whose set this one's is, in fewer bits

    @property
    def percent(self) -> float:
        """Mean accuracy of its networks in %."""
        return 100 * statistics.mean(self.accuracies or [])


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A figure of one method at one size, of each seed that has it: mean accuracies in %, or scores.

    column: what it is of, beside the method. own: accuracies on the training images, in %, where they are known. last:
    those after the last epoch, where the best one counts. rates: learning rates. published: where it was, in %.
    """

    method: str
    ipc: int
    column: str
    values: list[float]
    own: list[float]
    last: list[float]
    rates: list[float]
    published: float | None = None

    @property
    def mean(self) -> float:
        return statistics.mean(self.values)

    @property
    def error(self) -> float:
        return standard_error(self.values)

    @property
    def mean_own(self) -> float:
        return statistics.mean(self.own)


@dataclass(frozen=True, kw_only=True)
class Crossed:
    """A table of methods x networks, training sets or scores, for each size."""

    title: str  # in Markdown
    column: str  # and in CSV
    entries: list[Entry]
    note: str = "Accuracy in %: mean ± standard error over n seeds; in brackets that on the images trained on."
    form: str = ".2f"

    def markdown(self) -> Iterator[str]:
        """Its parts, size by size."""
        columns = list(dict.fromkeys(each.column for each in self.entries))
        for ipc in dict.fromkeys(each.ipc for each in self.entries):
            cells = {(each.method, each.column): each for each in self.entries if each.ipc == ipc}
            lines = []
            for method in dict.fromkeys(method for method, _ in cells):
                own = [cells.get((method, column)) for column in columns]
                n = max(len(each.values) for each in own if each)
                lines.append([_in_markdown(method), *(self._shown(each, n) for each in own), str(n)])
            yield f"## {in_words(ipc)}: {self.title}"
            yield self.note
            yield _table(["method", *map(_in_markdown, columns), "n"], lines)

    def _shown(self, entry: Entry | None, n: int) -> str:
        if entry is None:
            return "-"
        said = [f"{entry.mean_own:{self.form}}"] if entry.own else []
        said += [f"last epoch {statistics.mean(entry.last):{self.form}}"] if entry.last else []
        said += [f"published {entry.published:{self.form}}"] if entry.published is not None else []
        said += [f"n = {len(entry.values)}"] if len(entry.values) < n else []
        return plus_minus(entry.mean, entry.error, form=self.form) + (f" ({'; '.join(said)})" if said else "")

    def comma_separated(self) -> str:
        """One line per method, size and column."""
        lines = [["method", "ipc", self.column, "mean", "standard_error", "n", "on_its_own_images", "last_epoch", "lr"]]
        published = any(each.published is not None for each in self.entries)
        lines[0] += ["published"] * published
        for each in self.entries:
            figures = [_text(value, ".4f") for value in (each.mean, each.error)]
            more = [f"{statistics.mean(values):.4g}" if values else "" for values in (each.own, each.last, each.rates)]
            more += [_number(each.published)] * published
            lines.append([each.method, str(each.ipc), each.column, *figures, str(len(each.values)), *more])
        return _csv(lines)


def summarise(outcomes: Sequence[Outcome], reference: str | None = None, frame: Frame = PLAIN) -> list[Row]:
    """One row per method and size, by size and in the order of the outcomes.

    A row of a curve is compared with the one that the curve begins with, others with ``reference``.
    """

    def values(method: str | None, ipc: int) -> dict[int, float]:
        return {o.seed: o.percent for o in outcomes if (o.method, o.ipc) == (method, ipc) and o.accuracies}

    rows = []
    for ipc, method in sorted({(o.ipc, o.method): None for o in outcomes}, key=lambda key: key[0]):
        own = [o for o in outcomes if (o.ipc, o.method) == (ipc, method)]
        with_it = frame.begins(method, ipc) or reference
        found, other = values(method, ipc), values(with_it, ipc)
        pairs = [found[seed] - other[seed] for seed in found if seed in other]
        difference = (statistics.mean(pairs), standard_error(pairs)) if pairs and method != with_it else None
        networks = max((len(o.accuracies) for o in own if o.accuracies), default=0)
        failed = [f"seed {o.seed}: {o.failed}" for o in own if o.failed]
        paper, minus = frame.published.of(method, ipc), None
        if paper is not None and with_it not in (None, method):
            minus = frame.published.of(str(with_it), ipc)
        rows.append(
            Row(
                method=method,
                ipc=ipc,
                values=found,
                seeds=len(own),
                networks=networks,
                seconds=sum(o.seconds or 0 for o in own),
                failed=failed,
                difference=difference,
                reference=with_it,
                published=paper,
                published_difference=None if paper is None or minus is None else paper - minus,
                distilling_seconds=_mean((o.distilling or {}).get("seconds") for o in own),
                peak_memory=_mean((o.distilling or {}).get("peak_memory") for o in own),
                bits=_mean(o.bits for o in own),
                of=own[0].of or method,
            )
        )
    return rows


def crossed(outcomes: Sequence[Outcome], published: Published = NOTHING) -> dict[str, Crossed]:
    """What stage 3 found beside the first network on the set as it is, by the name of its CSV file.

    Networks are compared on that set, training sets by the first network; scores are the first network's. Where there
    are published values, the mean over the networks stands beside them.
    """
    results = [(outcome, result) for outcome in outcomes for result in outcome.results or ()]
    metrics = [(outcome, *item) for outcome in outcomes for item in (outcome.metrics or {}).items()]
    network, row = (results[0][1]["network"], results[0][1]["set"]) if results else ("", "")
    names = {found["network"] for _, found in results}
    on_set = [(each, found) for each, found in results if found["set"] == row and len(names) > 1]
    networks = [(each, f"{found['network']}{', tuned' * bool(found.get('tuned'))}", found) for each, found in on_set]
    if published.rows:
        for outcome in outcomes:
            own = [found["mean"] for each, found in on_set if each is outcome and not found.get("tuned")]
            if own and len(own) == len(names):
                networks.append((outcome, MEAN, {"mean": statistics.mean(own)}))
    sets = [(each, title(found), found) for each, found in results if found["network"] == network]
    scores = [(each, SCORES[name][0] if name in SCORES else name, found) for each, name, found in metrics]
    tables = {
        "networks.csv": Crossed(title="networks", column="network", entries=_entries(networks, published=published)),
        "rows.csv": Crossed(title="training sets", column="training_set", entries=_entries(sets)),
    }
    tables = {name: each for name, each in tables.items() if len({entry.column for entry in each.entries}) > 1}
    note = "Fractions: mean ± standard error over n seeds."
    of_scores = Crossed(title="scores", column="score", entries=_entries(scores, 1), note=note, form=".3f")
    return tables | ({"metrics.csv": of_scores} if scores else {})


def _entries(
    found: Iterable[tuple[Outcome, str, Mapping]], scale: float = 100, published: Published = NOTHING
) -> list[Entry]:
    """By size, and in order otherwise."""
    by_key: dict[tuple[int, str, str], list[Mapping]] = {}
    for outcome, column, figures in found:
        by_key.setdefault((outcome.ipc, outcome.method, column), []).append(figures)
    entries = []
    for ipc, method, column in sorted(by_key, key=lambda key: key[0]):
        every = by_key[ipc, method, column]
        values = [scale * each["mean"] for each in every]
        own = [scale * each["train"] for each in every if each.get("train") is not None]
        last = [scale * each["last"]["mean"] for each in every if "last" in each]
        rates = [each["lr"] for each in every if "lr" in each]
        entries.append(
            Entry(
                method=method,
                ipc=ipc,
                column=column,
                values=values,
                own=own,
                last=last,
                rates=rates,
                published=published.of(method, ipc, column),
            )
        )
    return entries


@dataclass(frozen=True)
class _Column:
    """One more column of the table: its head, its name in CSV, what it shows of a row, and how."""

    head: str
    name: str
    value: Callable[[Row], float | None]
    form: str


def _more_columns(rows: Sequence[Row], costs: bool) -> list[_Column]:
    """Bits where some are known; what distilling took where that is asked for."""
    bits = _Column("bits per class", "bits", lambda row: row.bits, ",.10g")
    seconds = _Column("seconds", "distilling_seconds", lambda row: row.distilling_seconds, ".1f")
    peak = _Column("peak memory, MB", "peak_memory_mb", lambda row: row.peak_memory and row.peak_memory / 1e6, ".0f")
    return [bits] * any(row.bits is not None for row in rows) + [seconds, peak] * costs


def write_report(folder: Path, outcomes: Sequence[Outcome], reference: str | None = None, frame: Frame = PLAIN) -> None:
    """Write ``results.md`` and ``results.csv``, print the tables, then draw ``results.png``, if that can be drawn.

    Where cells have several results, also what :func:`crossed` makes of them; ``curves.png`` where ``frame`` has
    points, and ``bits.png`` where sets are there in several numbers of bits. ``reference``: a method that others are
    compared with.
    """
    rows, tables = summarise(outcomes, reference, frame), crossed(outcomes, frame.published)
    text = markdown(rows, [part for table in tables.values() for part in table.markdown()], frame)
    write_text(folder / "results.md", text)
    write_text(folder / "results.csv", comma_separated(rows, frame))
    for name in ("networks.csv", "rows.csv", "metrics.csv"):
        if name in tables:
            write_text(folder / name, tables[name].comma_separated())
        else:  # of an earlier form of the study
            (folder / name).unlink(missing_ok=True)
    print(f"\n{text}", flush=True)
    if any(row.values for row in rows):
        draw_figure(folder / "results.png", plot, rows)
    if any(row.values for row in rows if (row.method, row.ipc) in frame.points):
        draw_figure(folder / "curves.png", plot_curves, rows, frame.points, frame.x, frame.published)
    else:
        (folder / "curves.png").unlink(missing_ok=True)
    if any(len(line) > 1 for line in by_bits(rows).values()):
        draw_figure(folder / "bits.png", plot_bits, rows)
    else:
        (folder / "bits.png").unlink(missing_ok=True)


def markdown(rows: Sequence[Row], more: Iterable[str] = (), frame: Frame = PLAIN) -> str:
    """What the report is of, a table for each size, best first, ``more`` parts, and what failed."""
    references = list(dict.fromkeys(row.reference for row in rows if row.difference))
    compared = bool(references)
    published = any(row.published is not None for row in rows)
    also = any(row.published_difference is not None for row in rows)
    other = _in_markdown(references[0]) if len(references) == 1 else "the first of its curve"
    minus = [f"minus {other}, by seed"] * compared + ["published difference"] * also
    more_columns = _more_columns(rows, frame.costs)
    head = ["method", *["published %"] * published, "accuracy %", "standard error", "n", *minus, "networks each"]
    head += [column.head for column in more_columns]
    parts = [_in_markdown(text) for text in (frame.heading, frame.note) if text]
    for ipc in dict.fromkeys(row.ipc for row in rows):
        mine = sorted((row for row in rows if row.ipc == ipc), key=lambda row: -row.mean if row.values else 1)
        lines = []
        for row in mine:
            figures = [_text(row.mean, ".2f", "-"), _text(row.error, ".2f", "-")] if row.values else ["-", "-"]
            forms = zip(row.difference or (), ("+.2f", ".2f"))
            pair = [" ± ".join(_text(value, form, "-") for value, form in forms)] * compared
            pair += [_number(row.published_difference, "+.2f", "-")] * also
            paper = [_number(row.published, ".2f", "-")] * published
            n = str(len(row.values)) if len(row.values) == row.seeds else f"{len(row.values)} of {row.seeds}"
            shown = [_number(column.value(row), column.form, "-") for column in more_columns]
            lines.append([_in_markdown(row.method), *paper, *figures, n, *pair, str(row.networks), *shown])
        parts += [f"## {in_words(ipc, frame.published.size(ipc))}", _table(head, lines)]
    parts += more
    failed = [f"- {_in_markdown(f'{row.method}, ipc {row.ipc}, {why}')}" for row in rows for why in row.failed]
    if failed:
        parts += ["## Failed", "\n".join(failed)]
    return "\n\n".join(parts) + "\n"


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    cells = [[cell.replace("|", r"\|") for cell in line] for line in (head, ["---"] * len(head), *lines)]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def _in_markdown(text: object) -> str:
    """``text`` on one line, with nothing that Markdown or HTML reads as more than text; a | is for tables to mind."""
    at_an_edge = r"(?<![^\W_])_|_(?![^\W_])"
    return re.sub(rf"[\\`*<>&~$\[\]]|{at_an_edge}", r"\\\g<0>", " ".join(str(text).split()))


def comma_separated(rows: Sequence[Row], frame: Frame = PLAIN) -> str:
    """One line per method and size."""
    lines = ["method ipc accuracy standard_error n networks difference difference_error seconds failed".split()]
    published = any(row.published is not None for row in rows)
    more_columns = _more_columns(rows, frame.costs)
    lines[0] += ["published", "published_difference"] * published + [column.name for column in more_columns]
    for row in rows:
        figures = [_text(row.mean, ".4f"), _text(row.error, ".4f")] if row.values else ["", ""]
        pair = [_text(value, ".4f") for value in row.difference] if row.difference else ["", ""]
        rest = [f"{row.seconds:.1f}", "; ".join(row.failed)]
        rest += [_number(row.published), _number(row.published_difference)] * published
        rest += [_number(column.value(row), ".10g") for column in more_columns]
        lines.append([row.method, str(row.ipc), *figures, str(len(row.values)), str(row.networks), *pair, *rest])
    return _csv(lines)


def _csv(lines: Sequence[Sequence[str]]) -> str:
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows(lines)
    return file.getvalue()


def _mean(values: Iterable[float | None]) -> float | None:
    """Of those that are known; None where none is."""
    known = [value for value in values if value is not None]
    return statistics.mean(known) if known else None


def _text(value: float, form: str, unknown: str = "") -> str:
    return unknown if math.isnan(value) else format(value, form)


def _number(value: float | None, form: str = ".4g", unknown: str = "") -> str:
    return unknown if value is None else format(value, form)
