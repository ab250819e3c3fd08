"""The report of a study: means, standard errors, paired differences, and what is said of cells that failed."""

import csv
import io
import math

import numpy as np
import pytest

from pad.show.layers import plot_layers_of
from pad.show.tables import standard_error
from pad.study.frame import Frame
from pad.study.plots import by_bits, plot, plot_bits, plot_curves
from pad.study.published import Published
from pad.study.report import Outcome, comma_separated, crossed, markdown, summarise, write_report

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


def test_costs_are_means_over_the_seeds_that_have_them():
    spent = [{"seconds": 2.0, "peak_memory": 3e6}, None, {"seconds": 5.0, "peak_memory": None}]
    every = [Outcome("A", 1, seed, [0.5], distilling=each) for seed, each in enumerate(spent)]
    rows = summarise([*every, Outcome("B", 1, 0, [0.4])])
    plain, *lines = csv.DictReader(io.StringIO(comma_separated(rows, Frame(costs=True))))
    assert (plain["distilling_seconds"], plain["peak_memory_mb"]) == ("3.5", "3")
    assert (lines[0]["distilling_seconds"], lines[0]["peak_memory_mb"]) == ("", "")
    text = markdown(rows, frame=Frame(costs=True))
    assert "| A | 50.00 | 0.00 | 3 | 1 | 3.5 | 3 |" in text and "| B | 40.00 | - | 1 | 1 | - | - |" in text
    assert "3.5" not in markdown(rows) + comma_separated(rows)


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


# ---- bits


def quantised(ipc: int = 10) -> list[Outcome]:
    """The methods, and A's sets in fewer bits, as a row that stands before it."""
    of = {"A4": "A", "A": None, "B": None}
    costs = {"A4": 400.0, "A": 3200.0, "B": 3200.0}
    return [
        Outcome(name, ipc, seed, [accuracy], bits=costs[name], of=of[name])
        for name in of
        for seed, accuracy in enumerate((0.25, 0.5) if name == "A4" else (0.5, 0.75))
    ]


def test_bits_stand_in_the_tables():
    rows = summarise(quantised())
    assert "| A4 | 37.50 | 12.50 | 2 | 1 | 400 |" in markdown(rows) and "| 3,200 |" in markdown(rows)
    lines = {line["method"]: line["bits"] for line in csv.DictReader(io.StringIO(comma_separated(rows)))}
    assert lines == {"A4": "400", "A": "3200", "B": "3200"}
    unknown = summarise(outcomes())
    assert "bits" not in markdown(unknown) + comma_separated(unknown)


def test_the_plot_over_bits_has_a_line_for_each_set():
    rows = summarise([*quantised(), *quantised(1)])
    assert {key: [row.method for row in line] for key, line in by_bits(rows).items()} == {
        (method, ipc): names for ipc in (1, 10) for method, names in (("A", ["A4", "A"]), ("B", ["B"]))
    }
    figure = plot_bits(rows)
    [axes] = figure.axes
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    drawn = {name: bar.lines[0].get_xydata().tolist() for name, bar in zip(names, axes.containers)}
    assert drawn["10 images per class: A"] == [[400, 37.5], [3200, 62.5]]
    assert drawn["1 image per class: B"] == [[3200, 62.5]] and len(drawn) == 4
    assert axes.get_xscale() == "log"


def test_bits_are_drawn_where_there_are_several(tmp_path):
    write_report(tmp_path, quantised())
    assert (tmp_path / "bits.png").is_file()
    write_report(tmp_path, [outcome for outcome in quantised() if not outcome.of])
    assert not (tmp_path / "bits.png").exists(), "of an earlier form of the study"


# ---- several networks and training sets


def results(seed: int, methods=("A", "B"), networks=("N1", "N2"), rows=("syn", "random")) -> list[Outcome]:
    """Of each method, network and row, learned and tuned, other figures."""
    found = []
    for m, method in enumerate(methods):
        listed = [
            {"set": row, "row": row, "network": network, "tuned": tuned, **figures(seed, m, i, j, tuned)}
            for i, network in enumerate(networks)
            for j, row in enumerate(rows)
            for tuned in (False, True)
        ]
        metrics = {"hlr": {"mean": 0.1 + 0.02 * seed + m, "se": 0.5}, "ior": {"mean": -0.25 * m, "se": None}}
        accuracies = listed[0]["accuracies"]
        found.append(Outcome(method, 10, seed, accuracies, seconds=1, results=listed, metrics=metrics))
    return found


def figures(seed: int, m: int, i: int, j: int, tuned: bool) -> dict:
    mean = 0.1 * m + 0.05 * i + 0.03 * j + 0.01 * tuned + 0.2 + 0.01 * seed**2
    return {"accuracies": [mean - 0.01, mean + 0.01], "mean": mean, "train": None if m else 0.5 + 0.1 * seed}


def in_percent(m: int, i: int, j: int, tuned: bool) -> tuple[float, float]:
    """Mean and standard error over seeds 0, 1, 2."""
    every = 100 * np.array([figures(seed, m, i, j, tuned)["mean"] for seed in range(3)], dtype=np.float64)
    return every.mean(), every.std(ddof=1) / np.sqrt(3)


@pytest.fixture
def several() -> list[Outcome]:
    return [outcome for seed in range(3) for outcome in results(seed)]


def listed(folder, name: str) -> list[dict]:
    return list(csv.DictReader(io.StringIO((folder / name).read_text())))


def test_networks_are_compared_on_the_set_as_it_is(several, tmp_path):
    write_report(tmp_path, several)
    lines = listed(tmp_path, "networks.csv")
    names = ["N1", "N1, tuned", "N2", "N2, tuned"]
    assert [(line["method"], line["network"]) for line in lines] == [(m, name) for m in "AB" for name in names]
    for k, line in enumerate(lines):
        expected = in_percent(k // 4, k % 4 // 2, 0, bool(k % 2))
        assert (float(line["mean"]), float(line["standard_error"])) == pytest.approx(expected, abs=1e-4)
        assert line["n"] == "3" and line["on_its_own_images"] == ("" if k // 4 else "60")
    mean, error = in_percent(0, 1, 0, True)
    text = (tmp_path / "results.md").read_text()
    assert "## 10 images per class: networks" in text and "| method | N1 | N1, tuned | N2 | N2, tuned | n |" in text
    assert f"{mean:.2f} ± {error:.2f} (60.00) | 3 |" in text


def test_training_sets_are_compared_by_the_first_network(several, tmp_path):
    write_report(tmp_path, several)
    lines = listed(tmp_path, "rows.csv")
    names = ["syn", "syn, tuned", "random", "random, tuned"]
    assert [(line["method"], line["training_set"]) for line in lines] == [(m, name) for m in "AB" for name in names]
    for k, line in enumerate(lines):
        expected = in_percent(k // 4, 0, k % 4 // 2, bool(k % 2))
        assert (float(line["mean"]), float(line["standard_error"])) == pytest.approx(expected, abs=1e-4)
    assert "| method | syn | syn, tuned | random | random, tuned | n |" in (tmp_path / "results.md").read_text()


def test_scores_are_means_over_seeds(several, tmp_path):
    write_report(tmp_path, several)
    lines = {(line["method"], line["score"]): line for line in listed(tmp_path, "metrics.csv")}
    assert float(lines["A", "HLR"]["mean"]) == pytest.approx(0.12)
    assert float(lines["A", "HLR"]["standard_error"]) == pytest.approx(0.02 / math.sqrt(3), abs=1e-4)
    assert float(lines["B", "IOR"]["mean"]) == -0.25
    assert "| B | 1.120 ± 0.012 | -0.250 ± 0.000 | 3 |" in (tmp_path / "results.md").read_text()


def test_a_method_without_a_row_has_a_dash_and_n_says_how_many_seeds(several):
    several[-1].results[:] = [each for each in several[-1].results if each["row"] == "syn"]
    alone = crossed(several[-1:] + results(0, ["A"]))
    assert "| B | 34.00 | 35.00 | - | - | 1 |" in "\n".join(alone["rows.csv"].markdown())


def test_one_network_and_one_training_set_make_the_report_of_before(tmp_path):
    one = [{"set": "syn", "row": "syn", "network": "N1", "accuracies": [0.5], "mean": 0.5, "train": 0.9}]
    write_report(tmp_path / "new", [Outcome("A", 1, 0, [0.5], results=one)])
    write_report(tmp_path / "old", [Outcome("A", 1, 0, [0.5])])
    assert {path.name: path.read_bytes() for path in (tmp_path / "new").iterdir()} == {
        path.name: path.read_bytes() for path in (tmp_path / "old").iterdir()
    }


def test_tables_of_an_earlier_form_of_the_study_go(several, tmp_path):
    write_report(tmp_path, several)
    write_report(tmp_path, outcomes())
    assert {path.name for path in tmp_path.iterdir()} == {"results.md", "results.csv", "results.png"}


def test_what_the_last_epoch_gives_stands_beside_the_best(several, tmp_path):
    for outcome in several:
        for each in outcome.results:
            each |= {"lr": 0.25, "last": {"mean": each["mean"] - 0.05, "se": None}}
    del several[0].results[4:]  # the first seed's network N2 on the sets of method A
    write_report(tmp_path, several)
    first = listed(tmp_path, "networks.csv")[0]
    assert float(first["last_epoch"]) == pytest.approx(float(first["mean"]) - 5, abs=1e-2) and first["lr"] == "0.25"
    text = (tmp_path / "results.md").read_text()
    assert "; last epoch 1" in text and "; n = 2)" in text, "of fewer seeds than the others"


# ---- published values

TABLE = {  # method: published at 10 and 500 images per class; measured at 10 and 50, by seed
    "A": ({10: 67.2, 500: 83.71}, {10: (0.40, 0.44), 50: (0.50, 0.52)}),
    "B": ({10: 65.15}, {10: (0.30, 0.35), 50: (0.53, 0.51)}),
}
BESIDE = Frame(
    heading="Scale small: what was run.",
    note="A note.",
    published=Published(rows={method: known for method, (known, _) in TABLE.items()}, stands_for={50: 500}, first="N1"),
    points={(method, ipc): ("TM", x) for method, x in (("A", 0.0), ("B", 0.25)) for ipc in (10, 50)},
    x="share masked",
)


def beside() -> list[Outcome]:
    return [
        Outcome(method, ipc, seed, [accuracy])
        for method, (_, measured) in TABLE.items()
        for ipc, seeds in measured.items()
        for seed, accuracy in enumerate(seeds)
    ]


def test_published_values_stand_beside_those_measured(tmp_path):
    write_report(tmp_path, beside(), "A", BESIDE)
    text = (tmp_path / "results.md").read_text()
    assert text.startswith("Scale small: what was run.\n\nA note.\n\n## 10 images per class\n")
    assert (
        "| method | published % | accuracy % | standard error | n | minus A, by seed | published difference | networks"
        in text
    )
    assert "| A | 67.20 | 42.00 | 2.00 | 2 |  | - | 1 |" in text
    assert "| B | 65.15 | 32.50 | 2.50 | 2 | -9.50 ± 0.50 | -2.05 | 1 |" in text
    assert "## 50 images per class (published: 500)" in text
    assert "| A | 83.71 | 51.00 | 1.00 | 2 |  | - | 1 |" in text
    assert "| B | - | 52.00 | 1.00 | 2 | +1.00 ± 2.00 | - | 1 |" in text
    lines = {(line["method"], line["ipc"]): line for line in listed(tmp_path, "results.csv")}
    assert [lines[key]["published"] for key in lines] == ["67.2", "65.15", "83.71", ""]
    assert [lines[key]["published_difference"] for key in lines] == ["", "-2.05", "", ""]
    assert (tmp_path / "curves.png").stat().st_size > 1000
    write_report(tmp_path, beside(), "A")
    assert not (tmp_path / "curves.png").exists(), "of an earlier form of the study"


def test_curves_show_means_with_errors_and_below_what_was_published():
    rows = summarise(beside(), "A", BESIDE)
    above, right, added, _, below, _ = plot_curves(rows, BESIDE.points, BESIDE.x, BESIDE.published).axes
    assert [axes.get_title() for axes in (above, right, below)] == [
        "10 images per class",
        "50 images per class",
        "published: 10 images per class",
    ]
    [bar] = above.containers
    assert bar.lines[0].get_xydata() == pytest.approx(np.array([[0, 42.0], [0.25, 32.5]]))
    ends = [segment[:, 1] for segment in bar.lines[2][0].get_segments()]
    assert np.array(ends) == pytest.approx(np.array([[40.0, 44.0], [30.0, 35.0]]))
    [bar] = added.containers
    assert bar.lines[0].get_xydata() == pytest.approx(np.array([[0.25, -9.5]]))
    assert bar.lines[2][0].get_segments()[0][:, 1] == pytest.approx(np.array([-10.0, -9.0]))
    [line] = below.lines
    assert line.get_xydata() == pytest.approx(np.array([[0, 67.2], [0.25, 65.15]]))
    assert below.get_xlabel() == "share masked"


def test_a_row_of_a_curve_is_compared_with_the_one_that_the_curve_begins_with():
    some = outcomes(10, {"half": [[0.3], [0.5]], "none": [[0.4], [0.7]], "other": [[0.9], [0.8]]})
    frame = Frame(points={("half", 10): ("TM", 0.5), ("none", 10): ("TM", 0.0), ("other", 10): ("DM", 0.0)})
    rows = {row.method: row for row in summarise(some, "other", frame)}
    assert rows["half"].difference == pytest.approx((-15, 5)) and rows["half"].reference == "none"
    assert rows["none"].difference is None and rows["other"].difference is None
    assert rows["half"].difference != summarise(some, "other")[0].difference
    assert "minus none, by seed" in markdown(list(rows.values()))


def test_a_mean_over_the_networks_stands_beside_the_published_one(several, tmp_path):
    known = {"A": {10: {"mean": 75.6, "ConvNet": 33.46}}, "B": {10: 44.0}}
    published = Published(rows=known, stands_for={"N2": "ConvNet"}, first="N1")
    del several[0].results[4:]  # the first seed's network N2 on the sets of method A
    write_report(tmp_path, several, frame=Frame(published=published))
    lines = {(line["method"], line["network"]): line for line in listed(tmp_path, "networks.csv")}
    both = [100 * np.mean([figures(seed, 0, i, 0, False)["mean"] for i in (0, 1)]) for seed in (1, 2)]
    mean = lines["A", "mean"]
    assert float(mean["mean"]) == pytest.approx(np.mean(both), abs=1e-4) and mean["n"] == "2"
    assert float(mean["standard_error"]) == pytest.approx(np.std(both, ddof=1) / math.sqrt(2), abs=1e-4)
    columns = ("N1", "N1, tuned", "N2", "N2, tuned", "mean")
    assert [lines["A", column]["published"] for column in columns] == ["", "", "33.46", "", "75.6"]
    assert [lines["B", column]["published"] for column in columns] == ["44", "", "", "", ""]
    text = (tmp_path / "results.md").read_text()
    assert "| method | N1 | N1, tuned | N2 | N2, tuned | mean | n |" in text and "; published 33.46; n = 2)" in text
    assert "| B | 44.00 | " in text, "on the first network"


def test_layers_of_several_runs_stand_side_by_side():
    events = [
        {"iteration": it, "layers": {"conv": [2.0 + it, 4.0], "last": [1.0, 2.0], "none": [0, 0]}} for it in (0, 1)
    ]
    first, second = plot_layers_of({"one": events, "two": events[:1]}).axes
    assert (first.get_title(), second.get_title()) == ("one", "two")
    drawn = {line.get_label(): line.get_xydata().tolist() for line in first.lines}
    assert drawn == {"conv": [[0, 0.5], [1, 0.75]], "last": [[0, 0.5], [1, 0.5]]}
