"""Studies: the grid, what is kept, what happens to cells that fail or are stopped, and what is refused."""

import csv
import dataclasses
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from helpers import CHECKOUT, contents, slow

from pad import cli
from pad.config import parse, read_yaml
from pad.data.images import ImageData
from pad.errors import InputError, Stopped
from pad.study import study as studying
from pad.study.grid import Grid, StudySettings
from pad.synthetic import SyntheticSet

STUDY = """
seeds: [0, 1]
ipc: [1]
reference: DATM
common:
  {dataset: FashionMNISTMini, train_per_class: 20, model: ConvNetD1W8, zca: False, score_repeats: 1, score_epochs: 1}
buffers:
  SGD: &experts
    {num_experts: 1, train_epochs: 3, batch_train: 50, lr_teacher: 0.05, rho_max: 0, rho_min: 0, add_end_epoch: 0,
     eval_every: 3}
  curriculum: {<<: *experts, init_ratio: 0.5, add_end_epoch: 2}
templates:
  matching: &matching {skip_first_eva: True, eval_it: 1000, num_eval: 1, epoch_eval_train: 1, Iteration: 1}
  following: &following
    {<<: *matching, by: PAD, syn_steps: 2, expert_epochs: 1, max_start_epoch: 2, Sequential_Generation: False,
     pix_init: real}
methods:
  random real: {by: coreset, method: Uniform, lr: 0.05}
  DM: {<<: *matching, by: DM, batch_real: 8, by_ipc: {1: {lr_img: 2}}}
  DATM: {<<: *following, method: DATM, buffer: SGD}
  PAD: {<<: *following, buffer: curriculum, depth_ratio: 0.25}
evaluation: {num_eval: 2, epoch_eval_train: 1}
"""
METHODS = ("random real", "DM", "DATM", "PAD")


def write(folder: Path, **changes) -> Path:
    """The study's file with other values of its top-level keys."""
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(STUDY) | changes, sort_keys=False))
    return path


def run(folder: Path, out: str = "out", *more: str, **changes) -> int:
    return cli.study([str(write(folder, **changes)), "--out", str(folder / out), *more])


def table(folder: Path) -> dict[str, dict]:
    with open(folder / "results.csv", newline="") as file:
        return {row["method"]: row for row in csv.DictReader(file)}


def outcome_of(folder: Path) -> dict[str, bytes]:
    """Everything but what depends on the clock."""

    def plain(name: str, data: bytes) -> bytes:
        if not (name.startswith("cells/") or (name.startswith("sets/") and name.count("/") == 1)):
            return data
        dropped = ("seconds", "distilling")
        return json.dumps({key: value for key, value in json.loads(data).items() if key not in dropped}).encode()

    return {
        name: plain(name, data)
        for name, data in contents(folder).items()
        if data != b"folder"
        and not name.startswith(("results", "asked"))
        and "timing" not in name
        and "config.yaml" not in name
    }


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Path:
    """A study's folder."""
    folder = tmp_path_factory.mktemp("study")
    assert run(folder) == 0
    return folder / "out"


def test_every_cell_is_in_the_table(done):
    rows = table(done)
    assert tuple(rows) == METHODS
    assert all((row["n"], row["networks"], row["failed"]) == ("2", "2", "") for row in rows.values())
    cells = [json.loads(path.read_text()) for path in (done / "cells").glob("*.json")]
    assert {(cell["method"], cell["seed"]) for cell in cells} == {
        (method, seed) for method in METHODS for seed in (0, 1)
    }
    for cell in cells:
        assert (done / cell["set"]).is_file() and len(cell["accuracies"]) == 2
    means = [100 * sum(cell["accuracies"]) / 2 for cell in cells if cell["method"] == "DM"]
    assert float(rows["DM"]["accuracy"]) == pytest.approx(sum(means) / 2, abs=1e-4)
    names = {path.name for path in (done / "pictures").iterdir()}
    assert names == {f"{name}_ipc1.png" for name in ("random_real", "DM", "DATM", "PAD")}


def test_the_report_says_what_distilling_took_where_that_is_asked_for(done, tmp_path):
    """Of the iterations alone, as the runs' own files have it."""
    shutil.copytree(done, tmp_path / "out")
    assert run(tmp_path, costs=True) == 0
    plain, found = table(done), table(tmp_path / "out")
    new = {"distilling_seconds", "peak_memory_mb"}
    assert all({key: value for key, value in row.items() if key not in new} == plain[key] for key, row in found.items())
    assert {row[key] for key in new for row in [found["random real"]]} == {""}
    for method in ("DM", "DATM", "PAD"):
        runs = [path.parent for path in done.glob(f"sets/*/1/*/{method}-*/timing.jsonl")]
        events = [[json.loads(line) for line in (each / "timing.jsonl").read_text().splitlines()] for each in runs]
        spent = [sum(each["seconds"] for each in lines if each["event"] == "match") for lines in events]
        assert float(found[method]["distilling_seconds"]) == pytest.approx(sum(spent) / 2, abs=0.06) and sum(spent) > 0
        peaks = [max((each["bytes"] for each in lines if each["event"] == "peak"), default=0) for lines in events]
        assert float(found[method]["peak_memory_mb"] or 0) == pytest.approx(sum(peaks) / 2e6, abs=0.06)
        cells = [json.loads(path.read_text())["distilling"] for path in done.glob(f"cells/{method}-*.json")]
        assert [cell["iterations"] for cell in cells] == [2, 2]
    text = (tmp_path / "out" / "results.md").read_text()
    assert "networks each | seconds | peak memory, MB |" in text and "seconds" not in (done / "results.md").read_text()


def test_costs_are_asked_for_by_true_or_false(tmp_path, capsys):
    assert run(tmp_path, costs="maybe") == 2
    assert "study.yaml: costs: 'maybe' is not" in capsys.readouterr().err


def test_settings_reach_the_commands(done):
    configs = {
        path.parent.name.split("-")[0]: yaml.safe_load(path.read_text())
        for path in done.glob("sets/*/*/*/*/config.yaml")
    }
    assert configs["DM"]["lr_img"] == 2 and configs["DM"]["train_per_class"] == 20
    assert configs["PAD"]["depth_ratio"] == 0.25 and configs["DATM"]["depth_ratio"] == 0
    assert len(list((done / "buffers").iterdir())) == 4, "two recipes, two seeds"


def test_a_finished_study_does_nothing_again(done, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in done.glob("cells/*.json")}
    for name in ("record_experts", "distill", "select_coreset", "evaluate"):
        monkeypatch.setattr(studying, name, lambda *_, **__: pytest.fail("worked again"))
    assert cli.study([str(write(done.parent)), "--out", str(done)]) == 0
    assert before == {path: path.stat().st_mtime_ns for path in done.glob("cells/*.json")}


def test_a_change_concerns_its_cells_alone(done, tmp_path, monkeypatch):
    made, distill = [], studying.distill
    shutil.copytree(done, tmp_path / "out")
    monkeypatch.setattr(
        studying, "distill", lambda settings, **more: made.append(settings.name) or distill(settings, **more)
    )
    methods = yaml.safe_load(STUDY)["methods"]
    methods["PAD"]["lr_img"] = 10
    assert run(tmp_path, methods=methods) == 0
    assert [name.split("-")[0] for name in made] == ["PAD", "PAD"]


def test_sets_are_made_once_for_all_evaluations(done, tmp_path, monkeypatch):
    shutil.copytree(done, tmp_path / "out")
    sets = {path: path.read_bytes() for path in tmp_path.glob("out/sets/**/*.safetensors")}
    monkeypatch.setattr(studying, "distill", lambda *_, **__: pytest.fail("distilled again"))
    monkeypatch.setattr(studying, "select_coreset", lambda *_, **__: pytest.fail("selected again"))
    evaluation = yaml.safe_load(STUDY)["evaluation"]
    before, cells = table(done), list(tmp_path.glob("out/cells/*.json"))
    assert run(tmp_path, evaluation=evaluation | {"epoch_eval_train": 3}) == 0
    found = table(tmp_path / "out")
    assert all(found[method]["accuracy"] != before[method]["accuracy"] for method in METHODS)
    assert {path: path.read_bytes() for path in sets} == sets
    assert len([*tmp_path.glob("out/cells/*.json")]) == 2 * len(cells), "the others are kept"
    monkeypatch.setattr(studying, "evaluate", lambda *_, **__: pytest.fail("evaluated again"))
    assert run(tmp_path) == 0 and table(tmp_path / "out") == before


def test_a_set_named_as_its_cell_is_gone_on_with(done, tmp_path, monkeypatch):
    """Earlier versions named them so."""
    shutil.copytree(done, tmp_path / "out")
    study = StudySettings.resolve({"study": str(write(tmp_path)), "out": str(tmp_path / "out")})
    cell = next(cell for cell in Grid.read(study).cells() if cell.method == "DM")
    assert cell.made != cell.name
    (run_of_set,) = tmp_path.glob(f"out/sets/*/*/*/{cell.made}")
    run_of_set.rename(run_of_set.with_name(cell.name))
    (tmp_path / f"out/sets/{cell.made}.json").unlink()
    (tmp_path / f"out/cells/{cell.name}.json").unlink()
    monkeypatch.setattr(studying, "select_coreset", lambda *_, **__: pytest.fail("another cell was made again"))
    assert run(tmp_path) == 0
    assert table(tmp_path / "out")["DM"]["accuracy"] == table(done)["DM"]["accuracy"]
    assert not run_of_set.exists() and (tmp_path / f"out/sets/{cell.name}.json").exists()


def test_time_is_given_once(tmp_path, monkeypatch):
    """A cell that is stopped while it distils has what is left of it, one that is stopped later no more."""
    limits, distill, evaluate = [], studying.distill, studying.evaluate

    def stopped(settings, **more):
        distill(dataclasses.replace(settings, time_limit=settings.time_limit / 4), **more)
        raise Stopped("by a signal", 130)

    def watched(settings, **more):
        limits.append(settings.time_limit)
        return distill(settings, **more)

    methods = {"DM": yaml.safe_load(STUDY)["methods"]["DM"] | {"Iteration": 100_000, "time_limit": 2}}
    more = {"methods": methods, "seeds": [0], "reference": None}
    monkeypatch.setattr(studying, "distill", stopped)
    assert run(tmp_path, **more) == 130
    (timing,) = tmp_path.glob("out/sets/*/*/*/*/timing.jsonl")
    events = [json.loads(line) for line in timing.read_text().splitlines()]
    spent = sum(each["seconds"] for each in events if each["event"] == "match")
    assert spent > 0
    monkeypatch.setattr(studying, "distill", watched)
    monkeypatch.setattr(studying, "evaluate", lambda *_, **__: raised(Stopped("by a signal", 130)))
    assert run(tmp_path, **more) == 130
    assert limits == [pytest.approx(2 - spent, abs=0.002)]
    monkeypatch.setattr(studying, "evaluate", evaluate)
    assert run(tmp_path, **more) == 0 and len(limits) == 1


def test_a_part_can_be_asked_for_and_the_report_is_of_all(tmp_path):
    assert run(tmp_path, "out", "--methods", "random real", "--seeds", "1") == 0
    assert [path.name.rsplit("-", 1)[0] for path in (tmp_path / "out" / "cells").iterdir()] == [
        "random_real-ipc1-seed1"
    ]
    assert run(tmp_path, "out", "--methods", "DM", "--seeds", "0") == 0
    assert {method: row["n"] for method, row in table(tmp_path / "out").items()} == dict(zip(METHODS, "1100"))


def test_a_cell_of_another_command_is_another(tmp_path):
    settings = StudySettings.resolve({"study": str(write(tmp_path))})
    before = {cell.method: cell.name for cell in Grid.read(settings).cells()}
    methods = yaml.safe_load(STUDY)["methods"]
    methods["DM"] = {**methods["DM"], "by": "DC"}
    write(tmp_path, methods=methods)
    after = {cell.method: cell.name for cell in Grid.read(settings).cells()}
    assert [method for method in METHODS if before[method] != after[method]] == ["DM"]


def test_every_set_is_evaluated_in_the_same_way(tmp_path):
    methods = yaml.safe_load(STUDY)["methods"]
    methods["DM"]["dsa"] = False
    cells = Grid.read(StudySettings.resolve({"study": str(write(tmp_path, methods=methods))})).cells()
    assert not next(cell for cell in cells if cell.method == "DM").distilling.dsa
    ways = [{key: value for key, value in cell.evaluation.items() if key != "seed"} for cell in cells]
    assert all(way == ways[0] for way in ways) and ways[0]["dsa"] is True and ways[0]["model"] == "ConvNetD1W8"


def test_what_is_common_reaches_no_part_that_the_study_decides(tmp_path):
    """Of a set a factor is a recipe; stage 3's is that of a file of others."""
    methods = {"DM": yaml.safe_load(STUDY)["methods"]["DM"]}
    common = yaml.safe_load(STUDY)["common"] | {"factor": 2}
    study = StudySettings.resolve({"study": str(write(tmp_path, methods=methods, common=common, reference=None))})
    for cell in Grid.read(study).cells():
        assert cell.distilling.factor == 2 and cell.evaluation["factor"] is None


def test_paths_in_the_file_and_on_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    study = write(tmp_path, common={"dataset": "ImageFolder", "data_path": "here"}, out="there")
    assert Grid.read(StudySettings.resolve({"study": str(study)})).common.data_path == str(tmp_path / "here")
    grid = Grid.read(StudySettings.resolve({"study": str(study), "data_path": "mine"}))
    assert (grid.common.data_path, grid.out) == (str(tmp_path / "mine"), tmp_path / "there")
    elsewhere = StudySettings.resolve({"study": str(write(tmp_path))})
    assert Grid.read(elsewhere).out == CHECKOUT / "runs" / "studies" / "study"


def test_other_images_are_refused(done, tmp_path, capsys):
    shutil.copytree(done, tmp_path / "out")
    common = yaml.safe_load(STUDY)["common"] | {"train_per_class": 19}
    assert run(tmp_path, common=common) == 2
    assert "begun with other images" in capsys.readouterr().err


def test_other_test_images_are_refused_where_it_is_noted_which_there_were(done, tmp_path, monkeypatch, capsys):
    shutil.copytree(done, tmp_path / "out")
    next((tmp_path / "out/cells").glob("DM-*.json")).unlink()
    monkeypatch.setattr(ImageData, "test_fingerprint", "another")
    assert run(tmp_path) == 2
    assert "begun with other images" in capsys.readouterr().err
    noted = tmp_path / "out/data.json"  # an earlier version's has no such line
    noted.write_text(json.dumps({k: v for k, v in json.loads(noted.read_text()).items() if k != "test_fingerprint"}))
    assert run(tmp_path) == 0


def test_a_set_that_is_gone_has_no_picture(done, tmp_path, capsys):
    shutil.copytree(done, tmp_path / "out")
    for path in (tmp_path / "out" / "sets").glob("random_real*/*.safetensors"):
        path.unlink()
    assert run(tmp_path) == 0
    assert "no picture of random real" in capsys.readouterr().err


@pytest.mark.parametrize("stop", (Stopped("stopped", 130), slow(KeyboardInterrupt())), ids=("signal", "at once"))
def test_a_stopped_study_goes_on_and_ends_the_same(done, tmp_path, monkeypatch, capsys, stop):
    evaluate, calls = studying.evaluate, []

    def interrupted(*arguments, **more):
        calls.append(arguments)
        if len(calls) == 4:
            raise stop
        return evaluate(*arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(studying, "evaluate", interrupted)
        assert run(tmp_path) == 130
    assert "go on with" in (message := capsys.readouterr().err) and "--resume" not in message
    assert "0 of 2" in (tmp_path / "out" / "results.md").read_text(), "an interrupted study shows what is there"
    assert run(tmp_path) == 0
    ours, expected = outcome_of(tmp_path / "out"), outcome_of(done)
    assert ours == expected


@pytest.mark.parametrize(
    "error",
    (InputError("no such thing"), MemoryError(), slow(OSError(28, "No space left")), slow(ValueError("odd"))),
    ids=str,
)
def test_a_failed_cell_is_reported_and_the_rest_goes_on(tmp_path, monkeypatch, capsys, error):
    distill = studying.distill

    def failing(settings, **more):
        if settings.name.startswith("DM"):
            raise error
        return distill(settings, **more)

    with monkeypatch.context() as patch:
        patch.setattr(studying, "distill", failing)
        assert run(tmp_path, seeds=[0]) == 1
    assert "1 of 4 cells failed" in capsys.readouterr().err
    rows = table(tmp_path / "out")
    assert (str(error) or "not enough memory") in rows["DM"]["failed"] and rows["DM"]["n"] == "0"
    assert all(rows[method]["n"] == "1" for method in METHODS if method != "DM")
    assert run(tmp_path, seeds=[0]) == 0
    assert table(tmp_path / "out")["DM"]["failed"] == ""


# ---- sets of other cells in fewer bits

FEWER = {
    "random real": {"by": "coreset", "method": "Uniform", "factor": 2},
    "real 4": {"by": "quantise", "of": "random real", "bits": 4},
    "real 2": {"by": "quantise", "of": "random real", "bits": 2, "by_ipc": {1: {"group": "channel"}}},
}
ASKED = {"methods": FEWER, "reference": None, "seeds": [0], "evaluation": {"num_eval": 1, "epoch_eval_train": 1}}


def recorded(out: Path) -> dict[str, dict]:
    """The cells of a study of one size and seed."""
    cells = [json.loads(path.read_text()) for path in (out / "cells").glob("*.json")]
    return {cell["method"]: cell for cell in cells}


def test_a_row_may_be_another_s_sets_in_fewer_bits(tmp_path, capsys):
    assert run(tmp_path, "out", "--methods", "real 4", **ASKED) == 0
    assert recorded(tmp_path / "out").keys() == {"random real", "real 4"}, "the whole set is made first"
    before = (tmp_path / "out" / recorded(tmp_path / "out")["random real"]["set"]).stat().st_mtime_ns
    assert run(tmp_path, **ASKED) == 0
    cells = recorded(tmp_path / "out")
    sets = {name: SyntheticSet.load(tmp_path / "out" / cell["set"]) for name, cell in cells.items()}
    assert (tmp_path / "out" / cells["random real"]["set"]).stat().st_mtime_ns == before, "made once"
    whole = sets["random real"]
    assert (whole.factor, len(whole.kept), whole.ipc) == (2, 10, 4)
    assert torch.equal(sets["real 4"].images, whole.quantised(4).images)
    assert torch.equal(sets["real 2"].images, whole.quantised(2, "channel").images)
    values = 10 * 28 * 28
    bits = {"random real": 32 * values, "real 4": 4 * values + 10 * 64, "real 2": 2 * values + 10 * 64}
    assert {name: float(row["bits"]) for name, row in table(tmp_path / "out").items()} == {
        name: each / 10 for name, each in bits.items()
    }
    assert (tmp_path / "out" / "bits.png").is_file() and "bits" not in cells["real 4"]
    assert cli.report([str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "report.html").read_text().count('class="sheet"') == 2
    (tmp_path / "out" / cells["real 2"]["set"]).unlink()
    assert run(tmp_path, **ASKED) == 0, "what is gone has no bits"
    assert {name: bool(row["bits"]) for name, row in table(tmp_path / "out").items()} == {
        name: name != "real 2" for name in FEWER
    }


def test_a_set_in_fewer_bits_fails_with_the_whole_one(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(studying, "select_coreset", lambda *_, **__: raised(InputError("no such thing")))
        assert run(tmp_path, **ASKED) == 1
    cells = recorded(tmp_path / "out")
    assert cells["random real"]["failed"] == "no such thing"
    assert cells["real 4"]["failed"] == "there is no set of random real, ipc 1, seed 0"
    assert run(tmp_path, **ASKED) == 0 and not any("failed" in cell for cell in recorded(tmp_path / "out").values())


def raised(error: Exception):
    raise error


def test_whole_sets_are_made_before_those_in_fewer_bits(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(studying, "_make", lambda cell, *_: made.append(cell.method) or raised(InputError("later")))
    first = {"real 4": FEWER["real 4"], **FEWER, "DM": yaml.safe_load(STUDY)["methods"]["DM"]}
    assert run(tmp_path, **ASKED | {"methods": first}) == 1
    assert made[:2] == ["random real", "DM"]


def test_a_change_of_the_whole_set_is_one_of_those_in_fewer_bits(tmp_path):
    def names(methods: dict) -> dict[str, str]:
        study = StudySettings.resolve({"study": str(write(tmp_path, **ASKED | {"methods": methods}))})
        return {cell.method: cell.name for cell in Grid.read(study).cells()}

    before, other = names(FEWER), names({**FEWER, "random real": {**FEWER["random real"], "lr": 0.1}})
    assert all(before[method] != other[method] for method in FEWER)
    assert len({name.rsplit("-", 1)[1] for name in before.values()}) == 3


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"bits": 4}, ("of: None is no row", "the nearest is ")),
        ({"bits": 4, "of": "random reel"}, ("of: 'random reel'", "the nearest is random real")),
        ({"bits": 4, "of": "real 2"}, ("of: 'real 2' is no row of whole sets",)),
        ({"bits": 4, "of": ["random real"]}, ("of: ['random real']",)),
        ({"of": "random real"}, ("give --bits",)),
        ({"bits": 3, "of": "random real"}, ("bits: 3",)),
        ({"bits": 4, "of": "random real", "buffer": "SGD"}, ("buffer: the experts are those of random real",)),
        ({"bits": 4, "of": "random real", "by_ipc": {1: {"buffer": "SGD"}}}, ("buffer: the experts are",)),
        ({"by": None, "by_ipc": {1: {"by": "quantise", "of": "real 2", "bits": 4}}}, ("'real 2' is no row of whole",)),
        ({"bits": 4, "of": "random real", "source": "x"}, ("source is not for a part of a study",)),
        ({"bits": 4, "of": "random real", "ipc": 3}, ("unknown key 'ipc'",)),
        ({"bits": 4, "of": "random real", "lr": 3}, ("unknown key 'lr'",)),
        ({"by": "coreset", "of": "random real"}, ("unknown key 'of'",)),
    ],
)
def test_a_wrong_row_of_fewer_bits_is_refused(tmp_path, capsys, entry, words):
    methods = {**FEWER, "mine": {"by": "quantise", **entry}}
    assert run(tmp_path, **ASKED | {"methods": methods}) == 2
    message = capsys.readouterr().err
    assert all(word in message for word in ("mine", *words)) and message.count("\n") == 1
    assert not (tmp_path / "out").exists()


def entry(network: str, row: str, accuracies: list[float], **more) -> dict:
    mean = sum(accuracies) / len(accuracies)
    return {"set": row, "row": row, "network": network, "accuracies": accuracies, "mean": mean, "train": 0.75, **more}


def test_several_networks_and_training_sets_are_recorded_and_reported(tmp_path, monkeypatch, capsys):
    found = [entry("N1", "syn", [0.5, 0.75]), entry("N1", "random", [0.25]), entry("N2", "syn", [1.0])]
    metrics = {"ior": {"mean": 0.375, "se": 0.125}}
    monkeypatch.setattr(studying, "evaluate", lambda *_, **__: {"results": found, "metrics": metrics})
    real = yaml.safe_load(STUDY)["methods"]["random real"]
    asked = {"methods": {"random real": real}, "reference": None}
    assert run(tmp_path, **asked) == 0
    [record, _] = [json.loads(path.read_text()) for path in sorted((tmp_path / "out" / "cells").glob("*.json"))]
    assert (record["accuracies"], record["results"], record["metrics"]) == ([0.5, 0.75], found, metrics)
    out = tmp_path / "out"
    assert {"networks.csv", "rows.csv", "metrics.csv"} <= {path.name for path in out.iterdir()}
    assert "| random real | 62.50 ± 0.00 (75.00) | 100.00 ± 0.00 (75.00) | 2 |" in (out / "results.md").read_text()
    assert run(tmp_path, **asked) == 0, "what is recorded is read again"
    assert "| random real | 0.375 ± 0.000 | 2 |" in capsys.readouterr().out.split("scores")[-1]


def test_results_of_one_network_on_one_training_set_are_recorded_as_before(done):
    for path in (done / "cells").glob("*.json"):
        known = {"method", "ipc", "seed", "recipe", "set", "accuracies", "seconds"}
        known |= {"distilling"} if "random_real" not in path.name else set()
        assert json.loads(path.read_text()).keys() == known


def test_rows_of_real_images_are_labelled_by_the_cells_own_experts(tmp_path):
    plain = {"num_eval": 2, "epoch_eval_train": 1}

    def cells(evaluation: dict) -> dict:
        study = StudySettings.resolve({"study": str(write(tmp_path, evaluation=evaluation))})
        return {(cell.method, cell.seed): cell for cell in Grid.read(study).cells()}

    for (method, _), cell in cells(plain | {"rows": "syn,random_soft,Herding"}).items():
        own = method in ("DATM", "PAD")
        assert cell.evaluation.get("buffer_path") == (cell.buffer.buffer_path if own else None)
        assert cell.evaluation["rows"] == "syn,random_soft,Herding"
    ranked = {cell.evaluation["ranking_path"] for cell in cells(plain | {"rows": "Herding"}).values()}
    assert len(ranked) == 2, "by seed"
    for cell in cells(plain).values():
        assert not {"buffer_path", "ranking_path"} & cell.evaluation.keys()


def test_the_study_s_file_is_kept_below_its_command(done):
    command, asked = (done / "asked.yaml").read_text().split("\n", 1)
    assert yaml.safe_load(asked) == yaml.safe_load(STUDY)
    words = shlex.split(command)
    assert words[:3] == ["#", "python", "scripts/study.py"] and words[-2:] == ["--out", str(done)]


@pytest.mark.parametrize("more", [[], ["--costs"], ["--costs", "False"]], ids=str)
def test_the_kept_command_asks_for_the_costs_as_it_was_asked(tmp_path, more):
    argv = [str(write(tmp_path, costs=True)), *more]
    settings = parse(StudySettings, argv, "study.py")
    words = shlex.split(settings.command(Grid.read(settings)))
    again = parse(StudySettings, words[2:], "study.py")
    assert Grid.read(again).costs == Grid.read(settings).costs == (more[1:] != ["False"])


def test_a_study_has_a_page(done, tmp_path):
    assert cli.report([str(done), "--out", str(tmp_path / "page.html")]) == 0
    text = (tmp_path / "page.html").read_text()
    assert text.count('class="pixels"') == len(METHODS) and "is not there" not in text


@pytest.mark.slow
def test_two_processes_share_the_cells(done, tmp_path):
    command = [sys.executable, CHECKOUT / "scripts" / "study.py", write(tmp_path), "--out", tmp_path / "out"]
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=os.environ)
        for _ in "12"
    ]
    printed = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    lines = [line for text in printed for line in text.splitlines() if " %" in line and ", seed " in line]
    assert len(lines) == len(METHODS) * 2, "each cell was computed by one of them"
    theirs, ours = (
        {method: row | {"seconds": ""} for method, row in table(folder).items()} for folder in (done, tmp_path / "out")
    )
    assert ours == theirs


def change(path: str, value):
    """The study with another value at a path as methods/DM/by; None takes the key away."""
    content = yaml.safe_load(STUDY)
    *parents, last = path.split("/")
    inner = content
    for key in parents:
        inner = inner[key]
    inner.pop(last) if value is None else inner.update({last: value})
    return content


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("methods/DM/ema_decay", 0.9, ("DM: ema_decay", "FTD")),
        ("methods/DM/lr_imgg", 1, ("DM: ", "lr_img")),
        ("methods/DM/batch_real", -1, ("DM: batch_real", "out of range")),
        ("methods/DM/by_ipc", {1: {"batch_real": 0}}, ("DM: batch_real", "out of range")),
        ("methods/DM/by", "DN", ("DM: by: 'DN'", "coreset")),
        ("methods/DM/buffer", "SGD", ("DM: by: DM has no use for a buffer",)),
        ("methods/PAD/buffer", None, ("PAD: by: PAD needs a buffer",)),
        ("methods/PAD/buffer", "curiculum", ("the nearest is curriculum",)),
        ("methods/PAD", 3, ("PAD is not a list",)),
        ("buffers/SGD/rho_min", 1, ("buffers: SGD: rho_max",)),
        (
            "methods/PAD/max_start_epoch",
            4,
            ("PAD, ipc 1, seed 0: max_start_epoch 4", "need trajectories of 4 epochs", "has 3"),
        ),
        ("methods/DATM/expert_epochs", 3, ("DATM, ipc 1, seed 0: ", "need trajectories of 4 epochs", "has 3")),
        (
            "methods/DATM/Label_Model_Timestamp",
            4,
            ("DATM, ipc 1, seed 0: Label_Model_Timestamp: 4 is not an epoch", "has 3"),
        ),
        ("evaluation/num_evall", 1, ("evaluation: ", "num_eval")),
        ("evaluation/networks", "NoNet", ("there is no network 'NoNet'",)),
        ("evaluation/networks", "ConvNetD6W8", ("ConvNetD6W8 does not fit",)),
        ("methods/DM/networks", "NoNet", ("there is no network 'NoNet'",)),
        ("methods/DM/model", "NoNet", ("there is no network 'NoNet'",)),
        ("evaluation/rows", "syn,random_soft", ("DM, ipc 1, seed 0: rows: random_soft",)),
        ("common/datset", "x", ("common: unknown key 'datset'; the nearest is dataset",)),
        ("seed", [0], ("unknown key 'seed'; the nearest is seeds",)),
        ("seeds", [-1], ("seeds: [-1]",)),
        ("ipc", None, ("ipc: None",)),
        ("ipc", [True], ("ipc: ['true']",)),
        ("reference", "DTM", ("reference: 'DTM'", "DATM")),
        ("reference", ["PAD"], ("reference: ['PAD']",)),
        ("out", [5], ("out: [5]",)),
        ("methods", {}, ("methods: there are none",)),
        ("methods/DM/by", ["DM"], ("by: ['DM']",)),
        ("methods/PAD/buffer", ["SGD"], ("buffer: ['SGD']",)),
        ("methods/DM/by_ipc", {"1": {"batch_real": 9}}, ("by_ipc: '1'",)),
        ("methods/DM/by_ipc", {50: {"bogus": 9}}, ("DM: ", "bogus")),
        ("methods/DM/seed", 5, ("DM: seed", "the study decides it")),
        ("methods/DM/ranking_path", "x", ("DM: ranking_path", "the study decides it")),
        ("methods/DM/zca", True, ("DM: zca", "belongs in common")),
        ("methods/PAD/model", "ConvNetD1W16", ("model: ConvNetD1W16, but its buffer's is ConvNetD1W8",)),
        ("evaluation/baselines", "hard", ("baselines",)),
        ("common/out", "x", ("common: unknown key 'out'",)),
        ("methods/A, B", {"by": "DM"}, ("'A, B' is no name",)),
        ("methods", {1: {"by": "DM"}}, ("1 is no name",)),
        ("methods/D.M|", {"by": "DM"}, ("no name",)),
        ("methods/random_real", {"by": "DM"}, ("'random_real' and 'random real' are too much alike",)),
    ],
)
def test_a_wrong_file_is_refused_before_any_work(tmp_path, capsys, path, value, words):
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(change(path, value)))
    assert cli.study([str(file), "--out", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert all(word in message for word in words) and "Traceback" not in message and message.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "more, words",
    [
        (["--methods", "DN"], "nearest is DM"),
        (["--seeds", "x"], "seeds"),
        (["--ipc", "0"], "no ipc 0"),
        (["--seeds", "9" * 5000], "is not a list of whole numbers"),
        (["--seeds", "7"], "no seed 7"),
    ],
)
def test_wrong_flags_are_refused(tmp_path, capsys, more, words):
    assert run(tmp_path, "out", *more) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_study_over_bits_runs_at_a_toy_s_size(tmp_path):
    study = read_yaml(str(CHECKOUT / "configs" / "studies" / "bits.yaml"))
    del study["out"], study["templates"]
    study |= {"seeds": [0], "ipc": [2], "evaluation": {"num_eval": 1, "epoch_eval_train": 3}}
    study["common"] |= {"dataset": "FashionMNISTMini", "train_per_class": 40, "model": "ConvNetD2W8"}
    study["common"] |= {"score_repeats": 1, "score_epochs": 1}
    study["buffers"]["curriculum"] |= {"num_experts": 1, "train_epochs": 4, "batch_train": 50}
    small = {"PAD": {"Iteration": 1, "syn_steps": 2, "max_start_epoch": 2, "current_max_start_epoch": 1}}
    small["PAD"] |= {"pix_init": "real"}
    small["DM"] = {"Iteration": 1, "batch_real": 16}
    study["methods"] = {name: row | small.get(row["by"], {}) for name, row in study["methods"].items()}
    (tmp_path / "bits.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    assert cli.study([str(tmp_path / "bits.yaml"), "--out", str(tmp_path / "out")]) == 0
    rows = table(tmp_path / "out")
    assert len(rows) == 24 and {row["n"] for row in rows.values()} == {"1"}
    for name, labels in (("PAD", 2), ("PAD factor 2", 8), ("DM", 0), ("random real factor 2", 0)):  # soft ones a class
        assert float(rows[name]["bits"]) == 2 * 784 * 32 + labels * 10 * 32
        assert float(rows[f"{name} at 2 bits"]["bits"]) == 2 * (784 * 2 + 64) + labels * (10 * 8 + 64)
    assert (tmp_path / "out" / "bits.png").is_file()


def test_the_shipped_studies_are_studies():
    for path in (CHECKOUT / "configs" / "studies").glob("*.yaml"):
        assert Grid.read(StudySettings.resolve({"study": str(path)})).cells()
