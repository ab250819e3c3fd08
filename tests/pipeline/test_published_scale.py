"""The published setting in a given time: how the time is dealt out, what comes out, and that it goes on."""

import csv
import functools
import json
import signal
from pathlib import Path

import pytest
from helpers import CHECKOUT, Clock, assert_refused, command_line, files_in, forked, slow, wait_for

from pad import cli
from pad.commands import distil, published_scale, record
from pad.commands.published_scale import PublishedScaleSettings, next_step
from pad.commands.record import BufferSettings
from pad.commands.trajectory import DistillSettings
from pad.config import parse
from pad.evaluation import Evaluation
from pad.experts.trainer import ExpertTraining
from pad.limit import TimeLimit
from pad.matching.trajectory import TrajectoryObjective
from pad.show import scale
from pad.synthetic import SyntheticSet


def argv_of(folder, **settings) -> list[str]:
    return command_line("--tiny", **{"minutes": 1, "out": folder / "report", "work": folder / "work"} | settings)


# ---- the time


@pytest.mark.parametrize(
    "left, spent, each, budget, points, expected",
    [
        # 30 s may go on 9 points, the first of which is there; the last evaluation has 4 rows' time.
        (1000, 2, 2, 120, 1, ((1000 - 4 * 2 - 8 * 2) / 9, True)),
        (100, 0, 5, 40, 0, ((100 - 4 * 5 - 4 * 5) / 5, True)),  # 40 / 5 - 4 = 4 points
        (100, 11, 5, 40, 2, ((100 - 4 * 5 - 5) / 2, True)),  # 29 / 5 is 5 whole rows
        (100, 16, 5, 40, 3, (100 - 4 * 5, False)),
        (100, 0, 30, 60, 0, (100 - 4 * 30, False)),  # no time to distil, let alone for a point
        (100, 0, 1, 90, 9, (100 - 4, False)),  # ten points with the last one
    ],
)
def test_the_next_step_by_hand(left, spent, each, budget, points, expected):
    seconds, more = next_step(left, spent, each, budget, points)
    assert (seconds, more) == (pytest.approx(expected[0]), expected[1])


def shorten(monkeypatch, folder, **values) -> None:
    """Other values in the tiny settings, of either stage, and a network of no time."""
    values = {"model": "ConvNetD1W8", "train_per_class": 50, "syn_steps": 2} | values
    files = []
    for name in published_scale.FILES["tiny"]:
        lines = [line.split(": ") for line in (CHECKOUT / "configs" / name).read_text().splitlines() if ": " in line]
        files.append(folder / Path(name).name)
        shown = {key: values.get(key, value) for key, value in lines if key[0] != "#"} | {"compile": "off"}
        files[-1].write_text("".join(f"{key}: {value}\n" for key, value in shown.items()))
    monkeypatch.setitem(published_scale.FILES, "tiny", tuple(files))


@pytest.fixture
def clock(monkeypatch, tmp_path):
    """An expert takes 10 seconds, an iteration 1, five networks 2."""
    clock = Clock()

    def passing(cls, name, seconds):
        function = getattr(cls, name)

        def later(*arguments, **options):
            clock.now += seconds(*arguments)
            return function(*arguments, **options)

        monkeypatch.setattr(cls, name, later)

    passing(ExpertTraining, "train", lambda *_: 10)
    passing(TrajectoryObjective, "gradients", lambda *_: 1)
    passing(Evaluation, "run", lambda _, cases, *more: 2 * len(cases))
    shorten(monkeypatch, tmp_path, epoch_eval_train=2)
    for module in (published_scale, record, distil):
        monkeypatch.setattr(module, "TimeLimit", functools.partial(TimeLimit, clock=clock))
    return clock


def results_in(folder) -> dict:
    return json.loads((folder / "report" / "results.json").read_text())


@pytest.mark.slow
def test_a_third_of_the_time_is_for_experts_and_a_fifth_for_evaluation(tmp_path, clock):
    began = clock.now
    assert cli.at_published_scale(argv_of(tmp_path, minutes=1.5)) == 0
    assert 85 < clock.now - began <= 90
    found = results_in(tmp_path)
    assert found["seconds"] == {"experts": 30, "distilling": found["iterations"]["done"], "evaluation": 2 * 9}
    assert len(found["experts"]["test_accuracy"]) == 3, "of 10 s each"
    # After a rehearsal a fifth of the time is for 9 rows: one at first, 4 are kept for the last three, 4 are left.
    steps = [point["iteration"] for point in found["curve"]]
    assert len(steps) == 6 and steps[0] == 0 and steps[-1] == found["iterations"]["done"]
    gaps = [later - earlier for earlier, later in zip(steps[1:], steps[2:])]
    assert max(gaps) - min(gaps) <= 3
    assert [row["row"] for row in found["rows"]] == ["syn", "random", "random_soft"]
    assert all(len(entry["accuracies"]) == 5 for entry in found["curve"] + found["rows"])

    report = files_in(tmp_path / "report")
    assert sum(map(len, report.values())) < 40e6
    assert {"results.md", "curve.csv", "curve.png", "synthetic.safetensors", "metrics.jsonl"} <= report.keys()
    assert SyntheticSet.load(tmp_path / "report" / "synthetic.safetensors").metadata["iteration"] == steps[-1]
    lines = list(csv.DictReader(report["curve.csv"].decode().splitlines()))
    assert [float(line["accuracy"]) for line in lines] == [
        pytest.approx(100 * sum(point["accuracies"]) / 5, abs=1e-3) for point in found["curve"]
    ]

    experts = files_in(tmp_path / "work" / "buffer")
    began = clock.now
    assert cli.at_published_scale(argv_of(tmp_path, minutes=0.5)) == 0
    assert clock.now - began <= 30 and files_in(tmp_path / "work" / "buffer") == experts
    again = results_in(tmp_path)
    assert again["curve"][:6] == found["curve"] and len(again["curve"]) > 6
    assert again["iterations"]["done"] == again["curve"][-1]["iteration"] > steps[-1]
    assert again["seconds"]["experts"] == 30 and len(again["rows"]) == 3


@pytest.mark.slow
def test_too_slow_a_machine_ends_after_one_of_each(tmp_path, clock):
    """One expert takes all the time; then an iteration and an evaluation."""
    assert cli.at_published_scale(argv_of(tmp_path, minutes=0.1)) == 0
    found = results_in(tmp_path)
    assert len(found["experts"]["test_accuracy"]) == 1 and found["iterations"]["done"] == 0 and not found["curve"]
    assert "no time" in (tmp_path / "report" / "results.md").read_text()
    began = clock.now
    assert cli.at_published_scale(argv_of(tmp_path, minutes=0.1)) == 0
    assert clock.now - began <= 6 and len(results_in(tmp_path)["curve"]) >= 1
    assert len(results_in(tmp_path)["experts"]["test_accuracy"]) == 1


@pytest.mark.slow
def test_a_run_that_is_finished_is_evaluated_once_more_and_then_left_alone(tmp_path, clock, monkeypatch):
    shorten(monkeypatch, tmp_path, epoch_eval_train=2, Iteration=9)
    assert cli.at_published_scale(argv_of(tmp_path)) == 0
    found, before = results_in(tmp_path), clock.now
    assert found["iterations"] == {"done": 10, "wanted": 10} and found["curve"][-1]["iteration"] == 10
    assert len(found["rows"]) == 3
    assert cli.at_published_scale(argv_of(tmp_path)) == 0
    assert clock.now == before and results_in(tmp_path) == found

    (tmp_path / "work" / "evaluated" / "iteration_000010.json").unlink()
    assert cli.at_published_scale(argv_of(tmp_path)) == 0
    again = results_in(tmp_path)
    assert (again["curve"], again["rows"]) == (found["curve"], found["rows"])


@pytest.mark.slow
def test_rows_that_did_not_fit_are_made_when_there_is_time_and_none_is_lost(tmp_path, clock, monkeypatch):
    shorten(monkeypatch, tmp_path, epoch_eval_train=2, Iteration=3)
    assert cli.at_published_scale(argv_of(tmp_path)) == 0
    found, file = results_in(tmp_path), tmp_path / "work" / "evaluated" / "iteration_000004.json"
    assert len(found["rows"]) == 3
    whole = json.loads(file.read_text())

    def leave(*rows: str, asked: str) -> None:
        kept = [row for row in whole["results"] if row["row"] in rows]
        file.write_text(json.dumps(whole | {"results": kept, "settings": whole["settings"] | {"rows": asked}}))

    leave("syn", "random", asked="syn,random")
    assert cli.at_published_scale(argv_of(tmp_path, minutes=5 / 60)) == 0  # a rehearsal, and one row would fit
    assert results_in(tmp_path)["rows"] == found["rows"][:2]
    assert cli.at_published_scale(argv_of(tmp_path)) == 0
    assert results_in(tmp_path)["rows"] == found["rows"]

    before = clock.now
    leave("syn", "random", asked="syn,random,random_soft")  # the experts were too weak
    assert cli.at_published_scale(argv_of(tmp_path)) == 0
    assert clock.now == before and results_in(tmp_path)["rows"] == found["rows"][:2]


@pytest.mark.slow
def test_a_killed_one_goes_on(tmp_path, monkeypatch):
    """In the first expert, in the first evaluation, and while it distils after that."""
    shorten(monkeypatch, tmp_path, num_experts=2, epoch_eval_train=5)
    work, argv = tmp_path / "work", argv_of(tmp_path, minutes=60)

    def experts() -> dict:
        return files_in(work / "buffer") if (work / "buffer").exists() else {}

    def whole() -> dict:
        return {name: data for name, data in experts().items() if name.endswith(".safetensors")}

    moments = [
        lambda: experts() and not whole(),
        lambda: (work / "evaluated" / "iteration_000000.safetensors").exists(),
        lambda: any(path.read_text().count("\n") > 4 for path in (work / "runs").rglob("metrics.jsonl")),
    ]
    for moment in moments:
        process = forked(lambda: cli.at_published_scale(argv), tmp_path / "out", tmp_path / "err")
        wait_for(lambda: moment() or not process.is_alive(), seconds=200)
        before = whole()
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, "it was killed, and had not ended"
    assert cli.at_published_scale(argv_of(tmp_path, minutes=0.1)) == 0
    assert before.items() <= whole().items(), "no expert is made again"
    found = results_in(tmp_path)
    steps = [point["iteration"] for point in found["curve"]]
    assert steps == sorted(set(steps)) and steps[0] == 0 and len(found["experts"]["test_accuracy"]) == len(whole())


# ---- what it is


@pytest.mark.parametrize("values", ["paper", "published"])
def test_the_settings_are_those_of_the_files(values, tmp_path):
    """But for folders, and for evaluation, which is not part of the run."""
    files = {
        "paper": ("paper/CIFAR-10/buffer.yaml", "paper/CIFAR-10/IPC10.yaml"),
        "published": ("CIFAR-10/buffer-PAD.yaml", "CIFAR-10/ConvIN/IPC10.yaml"),
    }[values]
    asked = {"minutes": 60, "cfg_set": values, "out": tmp_path / "report"}
    stages = parse(PublishedScaleSettings, command_line(**asked), "").stages()
    for stage, cls, file in zip(stages, (BufferSettings, DistillSettings), files, strict=True):
        published = parse(cls, ["--cfg", str(CHECKOUT / "configs" / file)], "").as_dict()
        own = {"buffer_path", "ranking_path", "log_dir", "name", "resume", "eval_it"}
        assert {name for name, value in stage.as_dict().items() if value != published[name]} <= own
        assert (stage.dataset, stage.zca, stage.model) == ("CIFAR10", True, "ConvNet")
    assert stages[0].train_epochs == 100 and (stages[1].Iteration, stages[1].ipc) == (10000, 10)
    assert stages[1].skip_first_eva and stages[1].eval_it > stages[1].Iteration + 1


@pytest.mark.parametrize(
    "words, expected",
    [
        ("", ["minutes", "--minutes 60"]),
        ("--minutes 4", ["minutes: 4", "5 or more", "--tiny"]),
        ("--minutes 0", ["minutes"]),
        ("--minutes 9 --tiny --cfg_set published", ["tiny", "cfg_set"]),
        ("--minutes 9 --data_path nothing", ["nothing"]),
        ("--minutes 9 --tiny --out a_file", ["a_file"]),
    ],
)
def test_what_it_refuses_before_any_work(words, expected, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torchvision.datasets.utils._urlretrieve", lambda *_, **__: (_ for _ in ()).throw(OSError))
    (tmp_path / "a_file").touch()
    out = [] if "--out" in words else ["--out", "report"]
    assert_refused(capfd, cli.at_published_scale, [*words.split(), *out], tuple(expected), tmp_path)


def test_other_work_is_not_gone_on_with(tmp_path, capfd):
    argv = argv_of(tmp_path, minutes=9)
    (tmp_path / "work").mkdir()
    state = tmp_path / "work" / "state.json"
    state.write_text(json.dumps({"about": {"settings": "paper", "seed": 0}}))
    assert_refused(capfd, cli.at_published_scale, argv, ("settings: paper in the work, tiny", "--out"), tmp_path)
    state.write_text("{")
    assert_refused(capfd, cli.at_published_scale, argv, (state, "damaged", "--work"), tmp_path)
    state.unlink()
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "results.json").write_text("{}")
    assert_refused(capfd, cli.at_published_scale, argv, (tmp_path / "report", "--out", "--work"), tmp_path)


# ---- what it says


def entry(row, mean, **more):
    return {"row": row, "set": f"the {row}", "mean": mean, "std": 0.01, "se": 0.005, "n": 5} | more


FOUND = {
    "settings": "paper",
    "seed": 0,
    "dataset": "CIFAR10",
    "ipc": 10,
    "machine": "a card",
    "torch": "2.9",
    "seconds": {"experts": 600.0, "distilling": 90.0},
    "experts": {"wanted": 100, "epochs": 100, "test_accuracy": {"0": 0.8125}},
    "iterations": {"done": 321, "wanted": 10001},
    "curve": [entry("syn", 0.3, iteration=0), entry("syn", 0.5, iteration=300)],
    "rows": [entry("syn", 0.5), entry("random", 0.25)],
    "stated": published_scale.STATED,
    "folders": {"experts": "/there", "run": "/here"},
}


def test_the_report_says_what_was_done_and_that_the_paper_had_another_budget():
    text = scale.as_markdown(FOUND)
    for line in (
        "1 of 100 experts",
        "321 of 10001 iterations",
        "| synthetic, after 300 iterations | 50.00 | 1.00 | 5 |",
        "| the random | 25.00 | 1.00 | 5 |",
        "| in the paper, with 100 experts and 10000 iterations | 67.40 | 0.30 | - |",
        "The paper's figure is of another budget.",
        "| ranking and experts | 10.0 |",
        "| distilling | 1.5 |",
        "| evaluation | 0.0 |",
        "| 0 | 81.25 |",
        "`/there`",
    ):
        assert line in text
    assert "in the paper" not in scale.as_markdown(FOUND | {"stated": None})
    assert scale.as_csv(FOUND["curve"]).splitlines()[2] == "300,50.0000,1.0000,0.5000,5"


@pytest.mark.parametrize("curve", [FOUND["curve"], slow(FOUND["curve"][:1])])
def test_the_curve_is_drawn_beside_the_other_rows(curve):
    axes = scale.plot_curve(curve, FOUND["rows"]).axes[0]
    points, across = axes.lines[0], [line for line in axes.lines if line.get_linestyle() == "--"]
    assert list(points.get_xdata()) == [point["iteration"] for point in curve]
    assert list(points.get_ydata()) == [100 * point["mean"] for point in curve]
    assert [line.get_ydata()[0] for line in across] == [25]
