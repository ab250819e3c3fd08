"""Gradient and distribution matching, and other methods' settings of trajectory matching, on the embedded images."""

import dataclasses
import json
import os
import runpy
import shlex
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
import yaml
from helpers import (
    CHECKOUT,
    at_iteration,
    command_line,
    contents,
    events_in,
    losses_in,
    run_contents,
    run_script,
    signal_self,
    slow,
    two_ranks,
)

from pad import cli
from pad.commands.bench import Workbench, set_up
from pad.commands.distil import distill
from pad.commands.distribution import DMSettings
from pad.config import parse
from pad.data.formation import decoded
from pad.difficulty import obtain as ranking
from pad.distributed import ALONE
from pad.evaluation import Evaluation
from pad.labels import hard_logits
from pad.matching.distribution import DistributionObjective
from pad.matching.gradient import GradientObjective
from pad.matching.influence import InfluenceObjective
from pad.matching.trajectory import TrajectoryObjective
from pad.store.foreign import load_pt
from pad.store.tensors import load_tensors
from pad.synthetic import SyntheticSet

MODEL = "ConvNetD2W8"
DATA = {"dataset": "FashionMNISTMini", "train_per_class": 40, "model": MODEL}
RUN = DATA | {"name": "run", "ipc": 1, "Iteration": 3, "num_eval": 1, "epoch_eval_train": 1}
RUN |= {"eval_it": 2, "checkpoint_every": 1}
OWN = {"DC": {"outer_loop": 2, "inner_loop": 1, "batch_train": 4}, "DM": {"depth_ratio": 0.5}, "TGDD": {"lr_img": 1}}
OWN |= {"NCFM": {"frequencies": 160, "sampling_net": True}}
OWN |= {"InfMatch": {"max_start_epoch": 3, "current_max_start_epoch": 2, "expansion_end_epoch": 2}}
DOORS = {"DC": cli.match_gradients, "DM": cli.match_distributions, "TGDD": cli.match_along_trajectories}
DOORS |= {"NCFM": cli.match_characteristics, "InfMatch": cli.match_influence}
SOFT = {"InfMatch"}  # labels, which are learned
FOLLOWING = {"TGDD", "NCFM", "InfMatch"}  # experts, for whose buffer see recorded
QUICK_BUT_DC = pytest.mark.parametrize("system", [slow("DC"), *(system for system in DOORS if system != "DC")])
OBJECTIVES = {system: (DistributionObjective, "gradients") for system in DOORS} | {"DC": (GradientObjective, "steps")}
OBJECTIVES |= {"InfMatch": (InfluenceObjective, "gradients")}


def argv_of(system: str, runs: Path | str, *more: str, **settings) -> list[str]:
    return command_line(*more, **RUN | {"batch_real": 8, "log_dir": runs} | OWN[system] | settings)


def run_folder(runs: Path) -> Path:
    return runs / "FashionMNISTMini" / "1" / MODEL / "run"


def last_of(runs: Path) -> SyntheticSet:
    return SyntheticSet.load(run_folder(runs) / "Normal" / "synthetic_last.safetensors")


def rows_of(system: str) -> list[str]:
    """What stage 3 compares."""
    return ["synthetic", *["synthetic, hard labels"] * (system in SOFT), "random real, hard labels"]


def losses(runs: Path) -> list[float]:
    return losses_in(run_folder(runs))


def interrupt(monkeypatch, system: str, iteration: int, do) -> None:
    at_iteration(monkeypatch, *OBJECTIVES[system], iteration, do)


def record(folder: Path, model: str = MODEL) -> Path:
    """Two experts of three epochs."""
    asked = {"buffer_path": folder, "num_experts": 2, "train_epochs": 3, "batch_train": 40, "lr_teacher": 0.1}
    plain = {"init_ratio": 1, "add_end_epoch": 0, "rm_easy_ratio_first": 0, "rm_easy_ratio_second": 0}
    plain |= {"rho_max": 0, "rho_min": 0, "alpha": 0, "eval_every": 0}
    assert cli.buffer(command_line(**DATA | asked | plain | {"model": model})) == 0
    return folder


@pytest.fixture(scope="module")
def buffer(tmp_path_factory) -> Path:
    return record(tmp_path_factory.mktemp("buffer"))


@pytest.fixture(scope="module", autouse=True)
def recorded(buffer) -> None:
    """The experts that some follow."""
    for system in FOLLOWING:
        OWN[system]["buffer_path"] = buffer


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> dict[str, Path]:
    """The ``log_dir`` of a finished run of each."""
    runs = {system: tmp_path_factory.mktemp(system) for system in DOORS}
    for system, folder in runs.items():
        assert DOORS[system](argv_of(system, folder)) == 0
    return runs


# ---- what they write


def own_config(folder: Path) -> list[str]:
    """The flags that give a run's own settings back to its command."""
    return ["--cfg", str(folder / "config.yaml")]


@QUICK_BUT_DC
def test_a_runs_own_config_makes_it_again(finished, tmp_path, system):
    assert DOORS[system]([*own_config(run_folder(finished[system])), "--log_dir", str(tmp_path)]) == 0
    assert_same_run(tmp_path, finished[system])


@pytest.mark.parametrize("first, then", [("", "dm-seed0"), ("dm-seed0", "")])
def test_a_run_goes_on_by_its_name_whether_it_was_given_or_not(tmp_path, first, then):
    short = {"Iteration": 0, "skip_first_eva": True}
    assert cli.match_distributions(argv_of("DM", tmp_path, **short | {"name": first})) == 0
    assert cli.match_distributions(argv_of("DM", tmp_path, "--resume", **short | {"name": then, "Iteration": 1})) == 0
    folder = run_folder(tmp_path).with_name("dm-seed0")
    assert [event["iteration"] for event in events_in(folder, "match")] == [0, 1]


def test_a_name_that_is_not_utf8_is_no_runs(tmp_path, capfd):
    """Whatever it comes from: here the config's file."""
    path = tmp_path / os.fsdecode(b"caf\xe9.yaml")
    path.write_text("")
    argv = [word for word in argv_of("DM", tmp_path / "runs") if word not in ("--name", "run")]
    assert cli.match_distributions(["--cfg", str(path), *argv]) == 2
    assert "is not UTF-8" in capfd.readouterr().err and not (tmp_path / "runs").exists()


@pytest.mark.parametrize("system", DOORS)
def test_a_run_moves_the_images_and_labels_that_are_learned(finished, system):
    folder, last = run_folder(finished[system]), last_of(finished[system])
    first = SyntheticSet.load(folder / "Normal" / "synthetic_0.safetensors")
    assert last.images.shape == (10, 1, 28, 28) and last.images.isfinite().all()
    assert not torch.equal(last.images, first.images)
    assert last.lr.item() == pytest.approx(0.01)
    assert torch.equal(last.labels, hard_logits(torch.arange(10), 10)) == (system not in SOFT)
    assert torch.equal(last.labels, first.labels) == (system not in SOFT)
    assert len(losses(finished[system])) == 4 and all(loss > 0 for loss in losses(finished[system]))
    assert "ranking" not in last.metadata["provenance"]
    settings = yaml.safe_load((folder / "config.yaml").read_text())
    assert settings["batch_real"] == 8 and ("experts" in settings) == (system in FOLLOWING)
    assert json.loads((folder / "finished.json").read_text())["iterations"] == 4


def assert_same_run(folder: Path, other: Path) -> None:
    ours, theirs = run_contents(run_folder(folder)), run_contents(run_folder(other))
    assert ours == theirs
    assert {"Normal/synthetic_last.safetensors", "Normal/images_last.pt", "metrics.jsonl"} <= ours.keys()


@QUICK_BUT_DC
def test_a_run_that_had_no_time_goes_on_and_ends_the_same(finished, tmp_path, system, capfd):
    argv = argv_of(system, tmp_path, time_limit=1e-9)
    assert DOORS[system](argv) == 0
    assert "time_limit: stopped after 1 of 4 iterations; --resume goes on" in capfd.readouterr().err
    assert len(losses(tmp_path)) == 1 and last_of(tmp_path).metadata["iteration"] == 1
    assert not (run_folder(tmp_path) / "finished.json").exists()
    assert DOORS[system]([*argv, "--resume"]) == 0 and len(losses(tmp_path)) == 2
    assert DOORS[system](argv_of(system, tmp_path, "--resume")) == 0
    assert_same_run(tmp_path, finished[system])


def test_a_run_that_goes_on_in_one_process_keeps_its_student(finished, tmp_path, monkeypatch):
    """Which is compiled. Another run has another."""
    built, flat_model = [], Workbench.flat_model
    monkeypatch.setattr(Workbench, "flat_model", lambda *of: built.append(of) or flat_model(*of))
    settings = parse(DMSettings, argv_of("DM", tmp_path, "--resume", time_limit=1e-9), "")
    bench = set_up(settings, ALONE)
    for _ in range(5):  # four iterations, and the evaluation at the end
        distill(settings, bench=bench)
    assert len(built) == 1
    assert_same_run(tmp_path, finished["DM"])
    distill(dataclasses.replace(settings, name="other"), bench=bench)
    assert len(built) == 2


@pytest.mark.slow
def test_the_same_command_in_another_process_and_folder_writes_the_same_bytes(finished, tmp_path):
    done = run_script("distill/DC.py", argv_of("DC", "runs"), tmp_path)
    assert done.returncode == 0, done.stderr
    assert_same_run(tmp_path / "runs", finished["DC"])


def test_the_other_script_does_too(finished, tmp_path, monkeypatch):
    script = CHECKOUT / "distill" / "DM.py"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(script), *argv_of("DM", "runs")])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(script), run_name="__main__")
    assert end.value.code == 0
    assert_same_run(tmp_path / "runs", finished["DM"])


@QUICK_BUT_DC
def test_images_in_host_memory_give_the_same_bytes(finished, tmp_path, system):
    assert DOORS[system](argv_of(system, tmp_path, "--images_on host")) == 0
    assert_same_run(tmp_path, finished[system])


@pytest.mark.parametrize("system", DOORS)
def test_a_run_without_a_name_is_called_after_its_method(tmp_path, system):
    asked = RUN | {"batch_real": 8, "Iteration": 0, "log_dir": tmp_path, "seed": 3} | OWN[system]
    del asked["name"]
    assert DOORS[system](command_line(**asked)) == 0
    assert [path.name for path in run_folder(tmp_path).parent.glob("[!.]*")] == [f"{system.lower()}-seed3"]


@pytest.mark.parametrize(
    "system, more",
    [
        ("DC", ["--depth_ratio", "0.5"]),
        slow("DC", ["--match_to", "0.5"]),
        slow("DC", ["--dsa", "False"]),
        slow("DC", ["--pix_init", "real"]),
        slow("DC", ["--inner_loop", "2"]),
        slow("DC", ["--lr_net", "0.5"]),
        slow("DC", ["--batch_real", "5"]),
        slow("DC", ["--batch_train", "3"]),
        slow("DC", ["--seed", "1"]),
        ("DM", ["--depth_ratio", "0"]),
        ("DM", ["--dsa", "False"]),
        slow("DM", ["--pix_init", "noise"]),
        slow("DM", ["--seed", "1"]),
        ("TGDD", ["--depth_ratio", "0"]),
        slow("TGDD", ["--ce_weight", "0"]),
        slow("TGDD", ["--stage_epochs", "1"]),
        slow("TGDD", ["--min_start_epoch", "2"]),
        slow("TGDD", ["--max_start_epoch", "1"]),
        slow("TGDD", ["--max_experts", "1"]),
        ("NCFM", ["--optimiser", "sgd"]),
        slow("NCFM", ["--sampling_net", "False"]),
        slow("NCFM", ["--sampling_net", "False", "--depth_ratio", "0"]),
        slow("NCFM", ["--lr_sampling", "0.1"]),
        slow("NCFM", ["--frequencies", "161"]),
        slow("NCFM", ["--amplitude", "0.9"]),
        slow("NCFM", ["--ce_weight", "0"]),
        slow("NCFM", ["--decay_img", "100"]),
        ("InfMatch", ["--match_to", "0.5"]),
        ("InfMatch", ["--labels", "hard"]),
        slow("InfMatch", ["--checkpoints", "1"]),
        slow("InfMatch", ["--lr_y", "100"]),
        slow("InfMatch", ["--pix_init", "noise"]),
        slow("InfMatch", ["--factor", "2"]),
        slow("InfMatch", ["--min_start_epoch", "1"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_settings_arrive(finished, tmp_path, system, more):
    assert DOORS[system](argv_of(system, tmp_path, "--skip_first_eva", *more, Iteration=1)) == 0
    assert losses(tmp_path) != losses(finished[system])[:2]


@pytest.mark.slow
def test_a_network_with_batchnorm(tmp_path):
    for system, door in DOORS.items():
        followed = {"buffer_path": record(tmp_path / "buffer", f"{MODEL}BN")} if system in FOLLOWING else {}
        argv = argv_of(system, tmp_path / system, "--skip_first_eva", model=f"{MODEL}BN", Iteration=1, **followed)
        assert door(argv) == 0
        folder = tmp_path / system / "FashionMNISTMini" / "1" / f"{MODEL}BN" / "run"
        assert SyntheticSet.load(folder / "Normal" / "synthetic_last.safetensors").images.isfinite().all()


# ---- going on


@pytest.mark.slow
def test_tuned_levels_go_on_with_what_the_objective_has_learned(finished, tmp_path):
    small = tmp_path / "small.safetensors"
    whole = run_folder(finished["NCFM"]) / "Normal" / "synthetic_last.safetensors"
    assert cli.quantise(command_line(source=whole, bits=4, out=small)) == 0
    asked = {"pix_init": small, "eval_it": 1000}
    for folder, iterations, more in (("whole", 3, []), ("twice", 1, []), ("twice", 3, ["--resume"])):
        argv = argv_of("NCFM", tmp_path / folder, "--tune_levels", *more, **asked | {"Iteration": iterations})
        assert DOORS["NCFM"](argv) == 0
    assert len(losses(tmp_path / "whole")) == 4 and losses(tmp_path / "twice") == losses(tmp_path / "whole")


@QUICK_BUT_DC
def test_a_stopped_run_goes_on_as_if_nothing_had_happened(finished, tmp_path, monkeypatch, capfd, system):
    argv = argv_of(system, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", [str(CHECKOUT / "distill" / f"{system}.py"), *argv])
        interrupt(patch, system, 2, signal_self(signal.SIGTERM))
        assert DOORS[system]() == 143
    assert not (run_folder(tmp_path) / "finished.json").exists()
    words = shlex.split(capfd.readouterr().err.splitlines()[-1])
    assert words[:3] == ["go", "on", "with:"] and words[-1] == "--resume"
    assert DOORS[system](words[words.index("--dataset") :]) == 0
    assert run_contents(run_folder(tmp_path)) == run_contents(run_folder(finished[system]))


@QUICK_BUT_DC
def test_a_killed_run_goes_on_from_its_checkpoint(finished, tmp_path, monkeypatch, capfd, system):
    def die():
        raise KeyboardInterrupt

    argv = argv_of(system, tmp_path)
    with monkeypatch.context() as patch:
        interrupt(patch, system, 3, die)
        assert DOORS[system](argv) == 130
    assert capfd.readouterr().err.splitlines()[-1].endswith("--resume")
    assert DOORS[system]([*argv, "--resume"]) == 0
    assert run_contents(run_folder(tmp_path)) == run_contents(run_folder(finished[system]))


@pytest.mark.parametrize(
    "system, more, words",
    [
        slow("DC", ["--inner_loop", "2"], "inner_loop: 1 in the run, 2 in the config"),
        slow("DC", ["--lr_net", "0.5"], "lr_net: 0.01 in the run, 0.5 in the config"),
        slow("DC", ["--batch_real", "5"], "batch_real: 8 in the run, 5 in the config"),
        ("DC", ["--batch_train", "3"], "batch_train: 4 in the run, 3 in the config"),  # the inner training's too
        ("DM", ["--drop_hard", "0.2"], "drop_hard: 0.0 in the run, 0.2 in the config"),
        ("DM", ["--depth_ratio", "0"], "depth_ratio: 0.5 in the run, 0.0 in the config"),
        ("DM", ["--factor", "2"], "factor: 1 in the run, 2 in the config"),
        slow("DC", ["--match_to", "0.5"], "match_to: 1.0 in the run, 0.5 in the config"),
        ("TGDD", ["--ce_weight", "2"], "ce_weight: 1.0 in the run, 2.0 in the config"),
        slow("TGDD", ["--stage_epochs", "2"], "stage_epochs: 7 in the run, 2 in the config"),
        ("NCFM", ["--optimiser", "sgd"], "optimiser: adamw in the run, sgd in the config"),
        slow("NCFM", ["--frequencies", "161"], "frequencies: 160 in the run, 161 in the config"),
        ("InfMatch", ["--checkpoints", "1"], "checkpoints: 2 in the run, 1 in the config"),
    ],
)
def test_a_run_does_not_go_on_with_other_settings(tmp_path, monkeypatch, capfd, system, more, words):
    argv = argv_of(system, tmp_path, "--skip_first_eva", ranking_path=tmp_path / "rankings")
    with monkeypatch.context() as patch:
        interrupt(patch, system, 1, signal_self(signal.SIGTERM))
        assert DOORS[system](argv) == 143
    before = contents(tmp_path)
    capfd.readouterr()
    assert DOORS[system]([*argv, "--resume", *more]) == 2
    assert words in capfd.readouterr().err and contents(tmp_path) == before


@QUICK_BUT_DC
def test_two_processes_give_what_one_gives(finished, tmp_path, system):
    codes, out, err = two_ranks(tmp_path, DOORS[system], argv_of(system, tmp_path))
    assert codes == [0, 0], err
    # of a gradient that is nothing but rounding AdamW makes a step of lr_img, 0.001
    apart = 2e-3 if system == "NCFM" else 1e-4
    torch.testing.assert_close(last_of(tmp_path).images, last_of(finished[system]).images, rtol=1e-4, atol=apart)
    torch.testing.assert_close(losses(tmp_path), losses(finished[system]), rtol=1e-3, atol=0)


# ---- difficulty


def with_ranking(system: str, folder: Path, *more: str, **settings) -> list[str]:
    scoring = {"score_repeats": 1, "score_epochs": 1, "ranking_path": folder / "rankings"}
    return argv_of(system, folder / "runs", *more, **scoring, drop_easy=0.1, drop_hard=0.2, **settings)


@QUICK_BUT_DC
def test_a_ranking_is_computed_once_and_kept(finished, tmp_path, monkeypatch, system):
    assert DOORS[system](with_ranking(system, tmp_path)) == 0
    path = tmp_path / "rankings" / "FashionMNISTMini_GraNd.pt"
    assert torch.load(path, weights_only=True).shape == (10, 40)
    assert losses(tmp_path / "runs") != losses(finished[system])
    first, rankings = run_contents(run_folder(tmp_path / "runs")), contents(tmp_path / "rankings")
    assert last_of(tmp_path / "runs").metadata["provenance"]["ranking"]
    monkeypatch.setattr(ranking, "compute_rankings", lambda *args, **kwargs: pytest.fail("it is there"))
    assert DOORS[system](with_ranking(system, tmp_path, "--overwrite")) == 0
    again = run_contents(run_folder(tmp_path / "runs"))
    assert contents(tmp_path / "rankings") == rankings
    assert {name for name in again if again[name] != first[name]} == set()


def test_no_batch_holds_an_image_that_is_left_out(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(GradientObjective, "_match", noting(GradientObjective._match, seen))
    argv = with_ranking("DC", tmp_path, "--skip_first_eva", sort_method="EL2N", Iteration=0, outer_loop=1)
    assert cli.match_gradients(argv) == 0
    rows = torch.load(tmp_path / "rankings" / "FashionMNISTMini_EL2N.pt", weights_only=True)
    assert len(seen) == 1
    for row, allowed in zip(rows, seen[0].real.rows, strict=True):
        assert allowed.tolist() == row.tolist()[4:32]


def noting(function, seen: list):
    def noted(self, *arguments):
        seen.append(self)
        return function(self, *arguments)

    return noted


def test_a_run_that_goes_on_with_another_ranking_is_refused(tmp_path, monkeypatch, capfd):
    argv = with_ranking("DM", tmp_path, "--skip_first_eva")
    with monkeypatch.context() as patch:
        interrupt(patch, "DM", 1, signal_self(signal.SIGTERM))
        assert cli.match_distributions(argv) == 143
    assert load_tensors(run_folder(tmp_path / "runs") / "checkpoint.safetensors")[1]["identity"]["ranking"]
    path = tmp_path / "rankings" / "FashionMNISTMini_GraNd.pt"
    rows = torch.load(path, weights_only=True)
    for file in (tmp_path / "rankings").iterdir():
        file.unlink()
    torch.save(rows.flip(1).contiguous(), path)
    capfd.readouterr()
    assert cli.match_distributions([*argv, "--resume"]) == 2
    assert "ranking: " in capfd.readouterr().err


# ---- multi-formation


@QUICK_BUT_DC
def test_a_run_in_multi_formation_goes_on_and_its_set_is_scored_decoded(tmp_path, monkeypatch, capfd, system):
    """Stopped and gone on with, it is the same; what it writes says its factor and has a label for each image."""
    argv = argv_of(system, tmp_path / "whole", factor=2)
    assert DOORS[system](argv) == 0
    folder = run_folder(tmp_path / "whole")
    last, first = (SyntheticSet.load(folder / "Normal" / f"synthetic_{tag}.safetensors") for tag in ("last", 0))
    assert last.factor == 2 and len(last.stored) == 10 and len(last.images) == len(last.labels) == 40
    assert torch.equal(last.images, decoded(last.stored, 2, 10)) and not torch.equal(last.stored, first.stored)
    assert torch.equal(last.labels, hard_logits(torch.arange(10).repeat_interleave(4), 10)) == (system not in SOFT)
    assert torch.equal(load_pt(folder / "Normal" / "images_last.pt"), last.images)
    assert load_tensors(folder / "checkpoint.safetensors")[0]["images"].shape == (10, 1, 28, 28)
    assert (folder / "pictures" / "before_after_000004.png").exists()

    argv = argv_of(system, tmp_path / "stopped", factor=2)
    with monkeypatch.context() as patch:
        interrupt(patch, system, 2, signal_self(signal.SIGTERM))
        assert DOORS[system](argv) == 143
    assert DOORS[system]([*argv, "--resume"]) == 0
    assert run_contents(run_folder(tmp_path / "stopped")) == run_contents(folder)

    sizes, run = set(), Evaluation.run
    monkeypatch.setattr(
        Evaluation,
        "run",
        lambda self, cases, *more, **named: (
            sizes.update((len(x), len(p)) for case in cases for x, p in [case.training_set(0)])
            or run(self, cases, *more, **named)
        ),
    )
    capfd.readouterr()
    out = tmp_path / "results.json"
    asked = {"synthetic": folder, "num_eval": 1, "epoch_eval_train": 1, "baselines": "hard", "out": out}
    assert cli.evaluate(command_line(**asked)) == 0
    results = json.loads(out.read_text())
    assert sizes == {(40, 40)} and results["ipc"] == 4 and results["synthetic"]["factor"] == 2
    assert [row["set"] for row in results["results"]] == rows_of(system)
    assert "4 images per class, decoded from 1 stored, accuracy on" in capfd.readouterr().out


@pytest.mark.slow
def test_two_processes_in_multi_formation_give_what_one_gives(tmp_path):
    assert cli.match_distributions(argv_of("DM", tmp_path / "one", factor=2)) == 0
    codes, out, err = two_ranks(tmp_path, cli.match_distributions, argv_of("DM", tmp_path / "two", factor=2))
    assert codes == [0, 0], err
    one, two = (last_of(tmp_path / runs).stored for runs in ("one", "two"))
    torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-4)


# ---- refused before anything is written


@pytest.mark.parametrize(
    "system, more, words",
    [
        ("DC", ["--drop_easy", "0.1"], "give --ranking_path"),
        ("DM", ["--drop_easy", "0.1", "--ranking_path", "here", "--sort_method", "GraNdd"], "GraNdd"),
        ("DM", ["--drop_easy", "0.1", "--ranking_path", "here", "--score_model", "ConvNetD8"], "ConvNetD8"),
        ("DC", ["--model", "ConvNetD8"], "ConvNetD8"),
        ("DC", ["--ipc", "41", "--pix_init", "real"], "ipc: 41"),
        ("DM", ["--ipc", "41"], "ipc: 41"),
        (
            "DM",
            ["--factor", "2", "--ipc", "11"],
            "ipc: 11 with factor: 2, 44 real images, is asked for, but class 0 has 40",
        ),
        ("DC", ["--factor", "3"], "factor: 3 does not divide the sides of images of 28x28 pixels"),
        ("DM", ["--eval_mode", "M", "--res", "8"], "res"),
        slow(
            "DC",
            ["--drop_easy", "0.5", "--drop_hard", "0.49", "--train_per_class", "1", "--ranking_path", "here"],
            None,
        ),
        ("DM", ["--threshold", "1"], "threshold: it belongs to trajectory matching"),
        ("DM", ["--match_to", "0.5"], "match_to: whole blocks are matched here"),
        ("DC", ["--match_from", "0.5", "--match_to", "0.5001"], "parameters of"),
        ("TGDD", ["--ipc", "41"], "ipc: 41"),
        ("TGDD", ["--syn_steps", "3"], "syn_steps: it belongs to trajectory matching"),
        ("TGDD", ["--buffer_path", "nowhere"], "no expert trajectories in nowhere"),
        ("TGDD", ["--model", "ConvNetD1W8"], "no expert trajectories in"),
        ("TGDD", ["--train_per_class", "39"], "the buffer"),
        ("TGDD", ["--max_start_epoch", "5"], "max_start_epoch 5 need trajectories of 4 epochs"),
        ("TGDD", ["--max_start_epoch", "2", "--min_start_epoch", "2"], "leaves no start epoch"),
        ("TGDD", ["--min_start_epoch", "4"], "min_start_epoch: 4 leaves no start epoch: trajectories in"),
        ("NCFM", ["--ipc", "41"], "ipc: 41"),
        ("NCFM", ["--buffer_path", "nowhere"], "no expert trajectories in nowhere"),
        ("NCFM", ["--max_start_epoch", "2"], "max_start_epoch: it belongs to trajectory matching"),
        ("NCFM", ["--optimiser", "adam"], "optimiser"),
        ("NCFM", ["--frequencies", "32"], "frequencies: 32 give sampling_net 2 scales"),
        ("NCFM", ["--depth_ratio", "0.5"], "for the last block alone; leave depth_ratio out"),
        ("InfMatch", ["--ipc", "41"], "ipc: 41"),
        ("InfMatch", ["--buffer_path", "nowhere"], "no expert trajectories in nowhere"),
        ("InfMatch", ["--train_per_class", "39"], "the buffer"),
        ("InfMatch", ["--max_start_epoch", "5"], "max_start_epoch 5 need trajectories of 4 epochs"),
        ("InfMatch", ["--checkpoints", "0"], "checkpoints"),
        ("InfMatch", ["--syn_steps", "3"], "syn_steps: it belongs to trajectory matching"),
        ("InfMatch", ["--outer_loop", "3"], "outer_loop: it belongs to gradient matching"),
    ],
)
def test_refusals(tmp_path, monkeypatch, capfd, system, more, words):
    monkeypatch.chdir(tmp_path)
    code = DOORS[system](argv_of(system, tmp_path / "runs", *more, *(["--Iteration", "0"] if words is None else [])))
    err = capfd.readouterr().err
    if words is None:  # one image a class: floor(0.5) and floor(0.49) leave it
        assert code == 0
        return
    assert code == 2 and words in err.splitlines()[-1] and "Traceback" not in err
    assert not list(tmp_path.iterdir())


def test_a_network_without_third_derivatives_is_refused(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    layers = "nn.Conv2d(channels, 2, 3, stride=3), nn.InstanceNorm2d(2), nn.Flatten(), nn.LazyLinear(classes)"
    text = f"from torch import nn\n\n\ndef net(channels, classes, size):\n    return nn.Sequential({layers})\n"
    Path("own.py").write_text(text)
    experts = record(Path("experts"), "own.py:net")
    capfd.readouterr()
    assert cli.match_influence(argv_of("InfMatch", "runs", model="own.py:net", buffer_path=experts)) == 2
    assert "has no third derivatives (batch_norm does not" in capfd.readouterr().err.splitlines()[-1]
    assert not Path("runs").exists()


# ---- scoring what they made


@pytest.mark.parametrize("system", DOORS)
def test_the_third_stage_scores_the_set(finished, tmp_path, system):
    out = tmp_path / "results.json"
    asked = {"synthetic": run_folder(finished[system]), "num_eval": 2, "epoch_eval_train": 1, "out": out}
    assert cli.evaluate(command_line(**asked)) == 0
    rows = json.loads(out.read_text())["results"]
    assert [row["set"] for row in rows] == rows_of(system)
    assert all(row["network"] == MODEL and row["n"] == 2 and 0 <= row["mean"] <= 1 for row in rows)


# ---- other methods that follow trajectories


SYSTEMS = {
    "MTT": {"labels": "hard", "threshold": "none"},
    "FTD": {"labels": "hard", "threshold": "none", "ema_decay": 0.5},
    "TESLA": {"threshold": "none", "gradient": "truncated"},
    "DATM": {"threshold": 9, "Sequential_Generation": True},
    "MCT": {"threshold": "none", "labels": "hard", "gradient": "truncated", "convexified": True},
}


def trajectory_args(system: str, buffer: Path, runs: Path, *more: str, **settings) -> list[str]:
    asked = {"method": system, "zca": False, "buffer_path": buffer, "log_dir": runs, "pix_init": "real", "syn_steps": 3}
    asked |= {"expert_epochs": 1, "max_start_epoch": 2, "Sequential_Generation": False, "current_max_start_epoch": 1}
    asked |= {"lr_img": 10, "lr_lr": 1e-4, "lr_teacher": 0.1}
    return command_line(*more, **RUN | asked | SYSTEMS[system] | settings)


@pytest.fixture(scope="module")
def followed(buffer, tmp_path_factory) -> dict[str, Path]:
    runs = {system: tmp_path_factory.mktemp(system) for system in SYSTEMS}
    for system, folder in runs.items():
        assert cli.distill(trajectory_args(system, buffer, folder)) == 0
    return runs


def test_hard_labels_stay_one_hot_and_the_rest_is_learned(followed):
    for system in ("MTT", "FTD", "MCT"):
        last = last_of(followed[system])
        assert torch.equal(last.labels, hard_logits(torch.arange(10), 10)) and last.lr.item() != pytest.approx(0.1)
    for system in ("TESLA", "DATM"):
        assert not torch.equal(last_of(followed[system]).labels.softmax(dim=1), torch.eye(10))


def test_ftd_is_mtt_with_a_moving_average(followed):
    """The same losses, since the average is beside the optimisation, and another set."""
    assert losses(followed["FTD"]) == losses(followed["MTT"])
    tensors, metadata = load_tensors(run_folder(followed["FTD"]) / "checkpoint.safetensors")
    assert torch.equal(last_of(followed["FTD"]).images, tensors["average"])
    assert torch.equal(last_of(followed["MTT"]).images, tensors["images"])
    assert not torch.equal(tensors["average"], tensors["images"])
    assert "average" not in load_tensors(run_folder(followed["MTT"]) / "checkpoint.safetensors")[0]


@pytest.mark.slow
def test_teslas_gradient_is_another(followed, buffer, tmp_path):
    assert cli.distill(trajectory_args("TESLA", buffer, tmp_path, method="PAD", gradient="exact")) == 0
    truncated, exact = losses(followed["TESLA"]), losses(tmp_path)
    assert truncated[0] == exact[0] and truncated[1:] != exact[1:]


@pytest.mark.slow
def test_without_a_threshold_nothing_is_skipped(followed, buffer, tmp_path):
    high = {"lr_teacher": 5, "max_bad_iterations": 9, "lr_img": 0, "lr_lr": 0}  # so it stays high, and the losses too
    for threshold, skipped in (("none", 0), ("1e-9", 4)):
        runs = tmp_path / threshold
        argv = trajectory_args("TESLA", buffer, runs, "--skip_first_eva", threshold=threshold, **high)
        assert cli.distill(argv) == 0
        assert json.loads((run_folder(runs) / "finished.json").read_text())["skipped"] == skipped
        assert all(loss > 1 for loss in losses(runs))


def test_lines_give_what_the_buffer_gives_that_they_were_made_of(followed, buffer, tmp_path, capfd):
    (whole,) = {path.parent for path in buffer.rglob("expert_*.safetensors")}
    lines = tmp_path / "lines" / whole.relative_to(buffer)
    assert cli.convexify_buffer([str(whole), str(lines)]) == 0
    assert cli.distill(trajectory_args("MCT", tmp_path / "lines", tmp_path / "runs")) == 0
    assert losses(tmp_path / "runs") == losses(followed["MCT"]) != losses(followed["TESLA"])
    assert torch.equal(last_of(tmp_path / "runs").images, last_of(followed["MCT"]).images)
    for more, words in (
        (["--method", "MTT", "--gradient", "exact"], "convexified: True is not MTT"),
        (["--method", "PAD", "--convexified", "False"], "give --convexified True, or the buffer"),
        (["--Label_Model_Timestamp", "1", "--labels", "soft"], "is a line: of epochs 0 to 3"),
        (["--expert_epochs", "2"], "need trajectories of 4 epochs"),
    ):
        capfd.readouterr()
        assert cli.distill(trajectory_args("MCT", tmp_path / "lines", tmp_path / "none", *more)) == 2
        assert words in capfd.readouterr().err.splitlines()[-1] and not (tmp_path / "none").exists()


def test_lines_are_refused_where_snapshots_are_asked_for(buffer, tmp_path, capfd):
    (whole,) = {path.parent for path in buffer.rglob("expert_*.safetensors")}
    assert cli.convexify_buffer([str(whole), str(tmp_path / "lines" / whole.relative_to(buffer))]) == 0
    argv = argv_of("TGDD", tmp_path / "runs", buffer_path=tmp_path / "lines")
    assert cli.match_along_trajectories(argv) == 2
    assert "two epochs of each: give the buffer that" in capfd.readouterr().err and not (tmp_path / "runs").exists()


def test_mixtures_need_no_more_than_lines(finished, buffer, tmp_path):
    (whole,) = {path.parent for path in buffer.rglob("expert_*.safetensors")}
    assert cli.convexify_buffer([str(whole), str(tmp_path / "lines" / whole.relative_to(buffer))]) == 0
    assert cli.match_characteristics(argv_of("NCFM", tmp_path / "runs", buffer_path=tmp_path / "lines")) == 0
    assert torch.equal(last_of(tmp_path / "runs").images, last_of(finished["NCFM"]).images)


@pytest.mark.parametrize("system", sorted(FOLLOWING))
def test_a_run_follows_the_experts_it_began_with(finished, buffer, tmp_path, monkeypatch, capfd, system):
    grown = tmp_path / "buffer"
    shutil.copytree(buffer, grown)
    argv = argv_of(system, tmp_path / "runs", buffer_path=grown)
    with monkeypatch.context() as patch:
        interrupt(patch, system, 1, signal_self(signal.SIGTERM))
        assert DOORS[system](argv) == 143
    (path,) = grown.rglob("expert_0001.safetensors")
    shutil.copy(path, path.with_name("expert_0002.safetensors"))
    assert DOORS[system]([*argv, "--resume"]) == 0
    assert run_contents(run_folder(tmp_path / "runs")) == run_contents(run_folder(finished[system]))


@pytest.mark.slow
@pytest.mark.parametrize("system", ["FTD", "TESLA", "MCT"])
def test_a_stopped_run_along_experts_goes_on(followed, buffer, tmp_path, monkeypatch, system):
    argv = trajectory_args(system, buffer, tmp_path)
    with monkeypatch.context() as patch:
        at_iteration(patch, TrajectoryObjective, "gradients", 1, signal_self(signal.SIGTERM))
        assert cli.distill(argv) == 143
    assert cli.distill([*argv, "--resume"]) == 0
    assert run_contents(run_folder(tmp_path)) == run_contents(run_folder(followed[system]))


@pytest.mark.slow
@pytest.mark.parametrize("system", ["FTD", "DATM"])
def test_trajectories_in_multi_formation(buffer, tmp_path, monkeypatch, system):
    """The average is of the stored images, soft labels are those of the decoded ones, and batches are of these."""
    argv = trajectory_args(system, buffer, tmp_path / "whole", factor=2, batch_syn=15)
    assert cli.distill(argv) == 0
    folder, last = run_folder(tmp_path / "whole"), last_of(tmp_path / "whole")
    tensors, _ = load_tensors(folder / "checkpoint.safetensors")
    assert torch.equal(last.stored, tensors["average" if system == "FTD" else "images"])
    assert len(last.labels) == 40 and last.is_hard == (system == "FTD")
    rows = last.labels.view(10, 4, 10)
    assert system == "FTD" or all(len(of_class.unique(dim=0)) == 4 for of_class in rows)
    argv = trajectory_args(system, buffer, tmp_path / "stopped", factor=2, batch_syn=15)
    with monkeypatch.context() as patch:
        at_iteration(patch, TrajectoryObjective, "gradients", 1, signal_self(signal.SIGTERM))
        assert cli.distill(argv) == 143
    assert cli.distill([*argv, "--resume"]) == 0
    assert run_contents(run_folder(tmp_path / "stopped")) == run_contents(folder)
    start = {"pix_init": folder, "factor": 2, "lr_img": 0, "lr_y": 0, "batch_syn": 15}
    assert cli.distill(trajectory_args(system, buffer, tmp_path / "next", **start)) == 0
    assert torch.equal(last_of(tmp_path / "next").stored, last.stored) and torch.equal(
        last_of(tmp_path / "next").labels, last.labels
    )
