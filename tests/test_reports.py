"""The report of a study: means, standard errors, paired differences, and what is said of cells that failed."""

import csv
import io
import math

import numpy as np
import pytest

from pad.study.report import Outcome, comma_separated, markdown, plot, standard_error, summarise, write_report

VALUES = {"A": [[0.40, 0.42], [0.44, 0.46], [0.41, 0.43]], "B": [[0.30, 0.31], [0.39, 0.40], [0.33, 0.34]]}


def outcomes(ipc: int = 10, methods=VALUES) -> list[Outcome]:
    return [
        Outcome(method, ipc, seed, accuracies, seconds=1.5)
        for method, seeds in methods.items()
        for seed, accuracies in enumerate(seeds)
    ]


def test_means_and_errors_are_over_seeds():
    for row in summarise(outcomes()):
        per_seed = 100 * np.array(VALUES[row.method]).mean(axis=1)
        assert row.mean == pytest.approx(per_seed.mean())
        assert row.error == pytest.approx(per_seed.std(ddof=1) / math.sqrt(3))
        assert (len(row.values), row.seeds, row.networks, row.seconds) == (3, 3, 2, 4.5)


def test_differences_pair_the_seeds():
    first, second = summarise(outcomes(), "A")
    assert first.difference is None
    pairs = 100 * (np.array(VALUES["B"]) - np.array(VALUES["A"])).mean(axis=1)
    assert second.difference == pytest.approx((pairs.mean(), pairs.std(ddof=1) / math.sqrt(3)))


def test_a_difference_is_over_the_seeds_that_both_have():
    some = [outcome for outcome in outcomes() if (outcome.method, outcome.seed) != ("A", 1)]
    _, row = summarise(some, "A")
    pairs = [100 * (np.mean(VALUES["B"][seed]) - np.mean(VALUES["A"][seed])) for seed in (0, 2)]
    assert row.difference[0] == pytest.approx(np.mean(pairs))


def test_one_seed_has_no_error():
    assert math.isnan(standard_error([3.0]))
    rows = summarise([Outcome("A", 1, 0, [0.5])])
    assert "| A | 50.00 | - | 1 |" in markdown(rows)
    assert next(csv.DictReader(io.StringIO(comma_separated(rows))))["standard_error"] == ""


def test_the_table_of_a_size_begins_with_the_best():
    rows = summarise([*outcomes(10), *outcomes(1, {"B": [[0.9]], "A": [[0.1]], "C": [[0.5]]})])
    text = markdown(rows)
    assert [line.split(" | ")[0] for line in text.splitlines() if line[:3] in ("| A", "| B", "| C")] == [
        "| B",
        "| C",
        "| A",
        "| A",
        "| B",
    ]
    assert text.index("## 1 image per class") < text.index("## 10 images per class")


def test_failed_cells_stand_in_the_table_with_their_reason():
    rows = summarise(
        [
            *outcomes()[:3],
            Outcome("B", 10, 0, [0.3]),
            Outcome("B", 10, 1, None, "the disk | is full"),
            Outcome("nanny", 10, 0, None, "nothing"),
        ]
    )
    text = markdown(rows)
    assert "| B | 30.00 | - | 1 of 2 |" in text
    assert "- B, ipc 10, seed 1: the disk | is full" in text
    assert "| nanny | - | - | 0 of 1 |" in text, "a name is not a number"
    assert {row["method"]: row["failed"] for row in csv.DictReader(io.StringIO(comma_separated(rows)))} == {
        "A": "",
        "B": "seed 1: the disk | is full",
        "nanny": "seed 0: nothing",
    }


def test_the_csv_holds_the_table():
    rows = summarise(outcomes(), "A")
    for row, line in zip(rows, csv.DictReader(io.StringIO(comma_separated(rows))), strict=True):
        assert (line["method"], line["ipc"], line["n"]) == (row.method, "10", "3")
        assert float(line["accuracy"]) == pytest.approx(row.mean, abs=1e-4)
        assert float(line["standard_error"]) == pytest.approx(row.error, abs=1e-4)


def test_the_plot_shows_every_mean_with_its_error():
    rows = summarise([*outcomes(1), *outcomes(10)])
    panels = plot(rows).axes
    assert [panel.get_title() for panel in panels] == ["1 image per class", "10 images per class"]
    for panel in panels:
        bars = [container for container in panel.containers]
        drawn = {round(float(bar.lines[0].get_xdata()[0]), 6) for bar in bars}
        assert drawn == {round(row.mean, 6) for row in rows}
        assert [text.get_text() for text in panels[0].get_yticklabels()] == ["A", "B"]


def test_equal_outcomes_give_equal_files(tmp_path):
    for name in ("one", "two"):
        write_report(tmp_path / name, outcomes(), "A")
    assert {path.name for path in (tmp_path / "one").iterdir()} == {"results.md", "results.csv", "results.png"}
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
