"""The three commands from real images to a scored set: what they write, that it is the same again, what they refuse."""

import json
import os
import shlex
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from helpers import (
    CHECKOUT,
    EXPERTS,
    RUN,
    assert_refused,
    at_iteration,
    command_line,
    contents,
    events_in,
    make_images,
    run_command,
    run_contents,
    run_script,
    signal_self,
    slow,
)
from PIL import Image

from pad import cli
from pad.commands import bench as workbench
from pad.commands import distil as distilling
from pad.commands import record as recording
from pad.commands import trajectory as tasks
from pad.difficulty import obtain as ranking
from pad.evaluation import Evaluation
from pad.store.foreign import save_pt
from pad.store.trajectories import TrajectoryStore
from pad.synthetic import SyntheticSet

MODEL = "ConvNetD1W8"
IMAGES = {"dataset": "ImageFolder", "model": MODEL}
ARTIFACTS = ["Normal/synthetic_last.safetensors", "Normal/synthetic_best.safetensors"]
ARTIFACTS += ["Normal/images_last.pt", "Normal/labels_last.pt", "Normal/lr_last.pt"]


def record_args(images: Path, folder: Path, *more: str, **settings) -> list[str]:
    here = {"data_path": images, "buffer_path": folder / "buffer", "ranking_path": folder / "rankings"}
    asked = {"num_experts": 2, "batch_train": 6, "alpha": 0.3, "score_repeats": 1}
    asked |= {"rm_epoch_first": 1, "rm_epoch_second": 2}
    return command_line(*more, **IMAGES | here | EXPERTS | asked | settings)


def distil_args(images: Path, buffer: Path, runs: Path, *more: str, **settings) -> list[str]:
    here = {"data_path": images, "buffer_path": buffer / "buffer", "log_dir": runs, "zca": False, "ipc": 2}
    asked = {"Iteration": 7, "syn_steps": 3, "batch_syn": 4, "max_start_epoch": 3, "num_eval": 2, "epoch_eval_train": 2}
    return command_line(*more, **IMAGES | here | RUN | asked | settings)


def run_folder(runs: Path) -> Path:
    return runs / "ImageFolder" / "2" / MODEL / "run"


def experts_in(folder: Path, zca: bool = False) -> Path:
    return folder / "buffer" / ("ImageFolder" if zca else "ImageFolder_NO_ZCA") / MODEL


@pytest.fixture(scope="session")
def buffer(images, tmp_path_factory) -> Path:
    """Two recorded experts."""
    folder = tmp_path_factory.mktemp("recorded")
    assert cli.buffer(record_args(images, folder)) == 0
    return folder


@pytest.fixture(scope="session")
def finished(images, buffer, tmp_path_factory) -> Path:
    """The ``log_dir`` of a finished run."""
    runs = tmp_path_factory.mktemp("runs")
    assert cli.distill(distil_args(images, buffer, runs)) == 0
    return runs


# ---- the commands, from a checkout and another working directory


EMBEDDED = {"dataset": "FashionMNISTMini", "train_per_class": 100, "model": "ConvNetW8", "buffer_path": "buffer"}


@pytest.mark.slow
def test_three_commands_on_the_embedded_images(tmp_path):
    asked = {"num_experts": 2, "batch_train": 100, "ranking_path": "rankings", "score_repeats": 1, "eval_every": 3}
    asked |= {"init_ratio": 0.75, "lr_teacher": 0.1}
    done = run_script("buffer/buffer_CL.py", command_line(**EMBEDDED | EXPERTS | asked), tmp_path)
    assert done.returncode == 0, done.stderr
    store = TrajectoryStore.open(tmp_path / "buffer" / "FashionMNISTMini_NO_ZCA" / "ConvNetW8")
    assert store.experts == [0, 1] and store.epochs(0) == store.epochs(1) == 3
    assert store.metadata["data"]["dataset"] == "FashionMNISTMini"
    accuracies = store.figures(0)["test_accuracy"]
    assert accuracies[-1] > accuracies[0]
    assert torch.load(tmp_path / "rankings" / "FashionMNISTMini_GraNd.pt", weights_only=True).shape == (10, 100)

    asked = {"zca": False, "ipc": 1, "Iteration": 2, "syn_steps": 3, "expert_epochs": 1, "max_start_epoch": 3}
    asked |= {"current_max_start_epoch": 1, "threshold": 9, "epoch_eval_train": 3, "eval_it": 2}
    (tmp_path / "mini.yaml").write_text(yaml.safe_dump(EMBEDDED | asked))
    done = run_script("distill/PAD.py", command_line("--cfg mini.yaml --num_eval 1"), tmp_path)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "logged_files" / "FashionMNISTMini" / "1" / "ConvNetW8" / "mini-seed0"
    last = SyntheticSet.load(run / "Normal" / "synthetic_last.safetensors")
    assert last.images.shape == (10, 1, 28, 28) and last.labels.shape == (10, 10) and last.lr > 0
    for name, tensor in (("images", last.images), ("labels", last.labels), ("lr", last.lr)):
        assert torch.equal(torch.load(run / "Normal" / f"{name}_last.pt", weights_only=True), tensor)
    assert [event["iteration"] for event in events_in(run, "match")] == [0, 1, 2]
    assert [event["iteration"] for event in events_in(run, "evaluation")] == [0, 2, 3]
    for picture in (run / "pictures").glob("*.png"):
        with Image.open(picture) as opened:
            opened.verify()
    assert {path.name for path in (run / "pictures").iterdir()} >= {"synthetic_000000.png", "before_after_000003.png"}

    asked = {"synthetic": run / "Normal" / "synthetic_last.safetensors", "buffer_path": "buffer"}
    asked |= {"num_eval": 2, "epoch_eval_train": 3, "out": "results/table.json"}
    done = run_script("distill/evaluation.py", command_line(**asked), tmp_path)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results" / "table.json").read_text())["results"]
    real = ["random real, hard labels", "random real, expert labels"]
    assert [row["set"] for row in results] == ["synthetic", "synthetic, hard labels", *real]
    for row in results:
        assert row["n"] == len(row["accuracies"]) == 2 and row["network"] == "ConvNetW8"
        mean = sum(row["accuracies"]) / 2
        assert row["mean"] == pytest.approx(mean)
        assert row["std"] == pytest.approx(abs(row["accuracies"][0] - mean))  # of the population, for two
        assert row["set"] in done.stdout and f"{100 * mean:.2f}" in done.stdout


@pytest.mark.slow
def test_wrong_input_from_a_shell(tmp_path):
    done = run_script("distill/PAD.py", ["--modle", "ConvNet"], tmp_path)
    assert done.returncode == 2
    assert done.stderr == "error: unknown option '--modle'; the nearest is --model\n" and done.stdout == ""
    assert not list(tmp_path.iterdir())


PUBLISHED_STAGE_1 = (
    "--dataset=CIFAR10 --model=ConvNet --train_epochs=100 --num_experts=100 --zca --buffer_path=../buffer_storage/ "
    '--data_path=../dataset/ --sort_method="CIFAR10_GraNd" --rho_max=0.01 --rho_min=0.01 --alpha=0.3 --lr_teacher=0.01 '
    "--mom=0. --batch_train=256 --init_ratio=0.75 --add_end_epoch=20 --rm_epoch_first=40 --rm_epoch_second=60 "
    "--rm_easy_ratio_first=0.1 --rm_easy_ratio_second=0.2"
)


def test_the_published_command_of_the_first_stage(images, tmp_path):
    smaller = {"dataset": "ImageFolder", "data_path": images, "model": MODEL, "train_epochs": 2, "num_experts": 1}
    smaller |= {"buffer_path": tmp_path / "buffer", "ranking_path": tmp_path / "rankings", "batch_train": 36}
    smaller |= {"sort_method": "ImageFolder_GraNd", "score_repeats": 1, "score_epochs": 1}
    assert cli.buffer([*shlex.split(PUBLISHED_STAGE_1), *command_line(**smaller)]) == 0
    store = TrajectoryStore.open(experts_in(tmp_path, zca=True))
    settings = store.header(0)["settings"]
    assert store.experts == [0] and store.metadata["preprocessing"]["kind"] == "zca"
    assert (settings["init_ratio"], settings["rm_easy_ratio_second"], settings["adaptive"]) == (0.75, 0.2, True)


def test_the_published_form_scores_like_our_own_file(images, finished, tmp_path):
    """Stage 3 on the trio, with the flags it needs for what the trio does not say, equals stage 3 on the one file."""
    normal = run_folder(finished) / "Normal"
    common = {"data_path": images, "epoch_eval_train": 2, "num_eval": 2, "batch_train": 4}
    trio = {
        "data_dir": normal / "images_last.pt",
        "label_dir": normal / "labels_last.pt",
        "lr_dir": normal / "lr_last.pt",
    }
    ours = {"synthetic": normal / "synthetic_last.safetensors"}
    for name, given in (("trio", trio | IMAGES), ("ours", ours)):
        assert cli.evaluate(command_line(**given | common, out=tmp_path / name)) == 0
    trio, ours = (json.loads((tmp_path / name).read_text()) for name in ("trio", "ours"))
    assert ours["synthetic"].pop("iteration") == 8  # which the trio does not say
    assert trio == ours
    titles = ["synthetic", "synthetic, hard labels", "random real, hard labels"]
    assert [row["set"] for row in ours["results"]] == titles, "no buffer: no expert labels"


def test_zca_from_end_to_end(images, tmp_path):
    assert cli.buffer(record_args(images, tmp_path, "--zca", train_epochs=8)) == 0
    assert cli.distill(distil_args(images, tmp_path, tmp_path / "runs", "--zca", Iteration=2)) == 0
    normal = run_folder(tmp_path / "runs") / "Normal"
    last = SyntheticSet.load(normal / "synthetic_last.safetensors")
    assert last.metadata["preprocessing"]["kind"] == "zca"
    whitened = torch.load(normal / "images_last.pt", weights_only=True)
    pixels = torch.load(normal / "images_zca_last.pt", weights_only=True)
    training = torch.stack(
        [
            torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1).double() / 255
            for path in sorted((images / "train").glob("*/*.png"))
        ]
    ).flatten(1)
    centred = training - training.mean(0)
    values, vectors = torch.linalg.eigh(centred.T @ centred / (len(centred) - 1))
    unwhiten = (vectors * (values.clamp(min=0) + 0.1).sqrt()) @ vectors.T
    expected = whitened.flatten(1).double() @ unwhiten + training.mean(0)
    torch.testing.assert_close(pixels.flatten(1).double(), expected, atol=1e-4, rtol=0)
    out = tmp_path / "results.json"
    asked = {"synthetic": normal / "synthetic_last.safetensors", "data_path": images, "out": out}
    asked |= {"buffer_path": tmp_path / "buffer", "epoch_eval_train": 2, "num_eval": 1}
    assert cli.evaluate(command_line(**asked)) == 0
    assert json.loads(out.read_text())["preprocessing"] == "zca"


def test_pictures_and_artifacts_of_a_run(finished):
    folder = run_folder(finished)
    names = {path.name for path in (folder / "Normal").iterdir()}
    for tag in ("0", "4", "best", "last"):
        assert {f"synthetic_{tag}.safetensors", f"images_{tag}.pt", f"labels_{tag}.pt", f"lr_{tag}.pt"} <= names
    assert not any(name.startswith("images_zca") for name in names)
    assert json.loads((folder / "finished.json").read_text())["iterations"] == 8
    assert not list(finished.rglob("*.partial"))


def test_the_loss_by_layer_changes_nothing_else(images, buffer, finished, tmp_path):
    assert cli.distill(distil_args(images, buffer, tmp_path, "--layer_losses")) == 0
    plain, asked = (events_in(run_folder(runs), "match") for runs in (finished, tmp_path))
    for event in asked:
        assert sum(added for added, _ in event["layers"].values()) == pytest.approx(event["loss"], rel=1e-5)
        del event["layers"]
    assert asked == plain and list((run_folder(tmp_path) / "pictures").glob("layers_*.png"))
    last = Path("Normal", "synthetic_last.safetensors")
    assert (run_folder(tmp_path) / last).read_bytes() == (run_folder(finished) / last).read_bytes()


def test_a_runs_own_config_makes_it_again(finished, tmp_path):
    """With what it says of the experts beside the settings."""
    config = run_folder(finished) / "config.yaml"
    assert "experts" in yaml.safe_load(config.read_text())
    assert cli.distill(["--cfg", str(config), "--log_dir", str(tmp_path)]) == 0
    assert run_contents(run_folder(tmp_path)) == run_contents(run_folder(finished))


def test_a_ranking_that_the_curriculum_has_no_use_for_is_said_to_do_nothing(images, tmp_path, capfd):
    whole = {"train_epochs": 1, "init_ratio": 1, "num_experts": 1}
    assert cli.buffer(record_args(images, tmp_path, "--sort_method Forgetting", **whole)) == 0
    said = capfd.readouterr().err
    assert "sort_method does nothing" in said and not (tmp_path / "rankings").exists()


def test_an_expert_that_learns_nothing_is_said_to(images, tmp_path, capfd):
    argv = record_args(images, tmp_path, num_experts=1, lr_teacher=1e-30, train_epochs=1)
    assert cli.buffer(argv) == 0
    assert "warning: expert 0 tests no better than untrained: " in capfd.readouterr().err


@pytest.mark.parametrize("pix_init", ["real", "noise"])
def test_other_initialisations(images, buffer, tmp_path, pix_init):
    assert cli.distill(distil_args(images, buffer, tmp_path, pix_init=pix_init, Iteration=0)) == 0


# ---- reproducibility


def test_experts_do_not_depend_on_how_many_are_trained(images, buffer, tmp_path):
    assert cli.buffer(record_args(images, tmp_path, num_experts=1)) == 0
    first = contents(experts_in(tmp_path))
    assert cli.buffer(record_args(images, tmp_path, num_experts=3)) == 0  # goes on where the other stopped
    two, three = contents(experts_in(buffer)), contents(experts_in(tmp_path))
    assert list(first) == ["expert_0000.safetensors"] and len(two) == 2 and len(three) == 3
    assert two == {name: three[name] for name in two} and first == {name: three[name] for name in first}
    assert two["expert_0000.safetensors"] != two["expert_0001.safetensors"]
    assert contents(buffer / "rankings") == contents(tmp_path / "rankings")


@pytest.mark.slow
def test_a_run_does_not_depend_on_folders_or_on_what_was_trained_before(images, buffer, finished, tmp_path):
    shutil.copytree(images, tmp_path / "moved")
    shutil.copytree(buffer, tmp_path / "larger")
    assert cli.buffer(record_args(images, tmp_path / "larger", num_experts=3)) == 0
    runs = {}
    for name, folder, more in (
        ("plain", buffer, []),
        ("two of two", buffer, ["--max_experts 2"]),
        ("two of three", tmp_path / "larger", ["--max_experts 2"]),
        ("three", tmp_path / "larger", []),
    ):
        assert cli.distill(distil_args(tmp_path / "moved", folder, tmp_path / name, *more)) == 0
        runs[name] = run_contents(run_folder(tmp_path / name))
    assert {*ARTIFACTS, "metrics.jsonl"} <= set(runs["plain"])
    assert runs["plain"] == run_contents(run_folder(finished))
    assert runs["two of two"] == runs["two of three"]
    # our own file notes the setting; the numbers are the same
    assert runs["two of two"]["Normal/images_last.pt"] == runs["plain"]["Normal/images_last.pt"]
    assert runs["three"]["Normal/images_last.pt"] != runs["plain"]["Normal/images_last.pt"]


def test_another_seed_is_another_run(images, buffer, finished, tmp_path):
    assert cli.distill(distil_args(images, buffer, tmp_path, seed=1)) == 0
    for name in ("Normal/images_last.pt", "metrics.jsonl"):
        assert run_contents(run_folder(tmp_path))[name] != run_contents(run_folder(finished))[name]


def interrupt_at(monkeypatch, iteration: int, do) -> None:
    at_iteration(monkeypatch, tasks.TrajectoryObjective, "gradients", iteration, do)


@pytest.mark.parametrize("number", [slow(signal.SIGINT), signal.SIGTERM])
def test_a_stopped_run_goes_on_as_if_nothing_had_happened(
    images, buffer, finished, tmp_path, *, monkeypatch, capfd, number
):
    argv, before = distil_args(images, buffer, tmp_path, "--overwrite True"), signal.getsignal(number)
    monkeypatch.setattr(sys, "argv", [str(CHECKOUT / "distill" / "PAD.py"), *argv])
    with monkeypatch.context() as patch:
        interrupt_at(patch, 4, signal_self(number))
        assert cli.distill() == 128 + number
    assert signal.getsignal(number) is before
    folder = run_folder(tmp_path)
    assert not (folder / "finished.json").exists()
    advice = capfd.readouterr().err.splitlines()[-1]
    assert advice.startswith("go on with: ")
    words = shlex.split(advice.removeprefix("go on with: "))
    if number == signal.SIGINT:  # the advice is a command
        words = [sys.executable, *words[1:]] if words[0] == "python" else words
        done = run_command(words, tmp_path)
        assert done.returncode == 0, done.stderr
    else:
        assert cli.distill(words[words.index("--dataset") :]) == 0
    assert run_contents(folder) == run_contents(run_folder(finished))


def test_a_killed_run_goes_on_from_its_checkpoint(images, buffer, finished, tmp_path, monkeypatch):
    def die():
        raise KeyboardInterrupt  # as the second Ctrl-C does: nothing is saved any more

    argv = distil_args(images, buffer, tmp_path, checkpoint_every=2)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 5, die)
        assert cli.distill(argv) == 130
    with open(run_folder(tmp_path) / "metrics.jsonl", "a") as handle:
        handle.write('{"event": "mat')  # a line the kill cut short
    assert cli.distill([*argv, "--resume"]) == 0
    ours, theirs = run_contents(run_folder(tmp_path)), run_contents(run_folder(finished))
    assert ours["metrics.jsonl"] == theirs["metrics.jsonl"]
    for name in ARTIFACTS:
        assert ours[name] == theirs[name], name


def test_a_published_file_runs_with_both_filters_the_last_of_two_keys_and_dead_ones(
    images, buffer, finished, tmp_path, capfd
):
    flags = distil_args(images, buffer, tmp_path)
    keys = dict(zip((flag.removeprefix("--") for flag in flags[::2]), flags[1::2]))
    lines = ["zca: True", "device: [3]", *(f"{key}: {value}" for key, value in keys.items())]
    lines += ["ema_decay: 0.9995", "texture: False", "depth_ratio: 0.5", "loss_ratio: 0.5"]
    (tmp_path / "published.yaml").write_text("\n".join(lines))
    assert cli.distill(["--cfg", str(tmp_path / "published.yaml")]) == 0
    warnings = [line for line in capfd.readouterr().err.splitlines() if line.startswith("warning: ")]
    for words in ("depth_ratio and loss_ratio are both set", "ema_decay does nothing", "texture does nothing"):
        assert sum(words in line for line in warnings) == 1, (words, warnings)
    settings = yaml.safe_load((run_folder(tmp_path) / "config.yaml").read_text())
    assert (settings["zca"], settings["depth_ratio"], settings["loss_ratio"]) == (False, 0.5, 0.5)
    ours, theirs = run_contents(run_folder(tmp_path)), run_contents(run_folder(finished))
    assert ours["Normal/images_0.pt"] == theirs["Normal/images_0.pt"]
    assert ours["Normal/images_last.pt"] != theirs["Normal/images_last.pt"]


def test_a_run_goes_on_with_the_experts_it_began_with(images, buffer, finished, tmp_path, monkeypatch):
    shutil.copytree(buffer, tmp_path, dirs_exist_ok=True)
    argv = distil_args(images, tmp_path, tmp_path)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 4, signal_self(signal.SIGTERM))
        assert cli.distill(argv) == 143
    # The buffer grows meanwhile; the ranking's name may be spelled in full.
    more = record_args(images, tmp_path, num_experts=3, sort_method="ImageFolder_GraNd")
    assert cli.buffer(more) == 0
    assert (experts_in(tmp_path) / "expert_0002.safetensors").exists()
    assert cli.distill([*argv, "--resume"]) == 0
    ours, theirs = run_contents(run_folder(tmp_path)), run_contents(run_folder(finished))
    assert ours["metrics.jsonl"] == theirs["metrics.jsonl"]


def test_a_longer_run_equals_one_that_was_extended(images, buffer, finished, tmp_path):
    argv = distil_args(images, buffer, tmp_path, checkpoint_every=3)
    assert cli.distill([*argv, "--Iteration=4"]) == 0
    assert cli.distill([*argv, "--resume"]) == 0
    ours, theirs = run_contents(run_folder(tmp_path)), run_contents(run_folder(finished))
    assert ours["metrics.jsonl"] == theirs["metrics.jsonl"]
    for name in ("Normal/images_last.pt", "Normal/labels_last.pt", "Normal/lr_last.pt"):
        assert ours[name] == theirs[name], name


def test_stopping_the_first_stage_keeps_whole_experts_only(images, tmp_path, monkeypatch):
    train = recording.ExpertTraining.train

    def interrupted(self, expert, start, attempt):
        for epoch, theta in enumerate(train(self, expert, start, attempt)):
            if (expert, epoch) == (1, 2):
                raise KeyboardInterrupt
            yield theta

    with monkeypatch.context() as patch:
        patch.setattr(recording.ExpertTraining, "train", interrupted)
        assert cli.buffer(record_args(images, tmp_path)) == 130
    assert list(contents(experts_in(tmp_path))) == ["expert_0000.safetensors"]
    assert cli.buffer(record_args(images, tmp_path)) == 0
    assert TrajectoryStore.open(experts_in(tmp_path)).experts == [0, 1]


# ---- wrong input: exit code 2, one sentence, nothing computed, nothing written


@pytest.fixture
def refused(tmp_path, monkeypatch, capfd):
    """Call a front door that must refuse. ``late``: the reason shows only after preprocessing."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def heavy(*args, **kwargs):
        raise AssertionError("work began before the input was checked")

    def check(door, argv, *words: str, late: bool = False, root: Path = tmp_path) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(ranking, "compute_rankings", heavy)
            patch.setattr(recording.ExpertTraining, "train", heavy)
            patch.setattr(distilling.Distiller, "distill", heavy)
            patch.setattr(Evaluation, "run", heavy)
            if not late:
                patch.setattr(workbench, "fit_preprocessing", heavy)
                patch.setattr(distilling, "initial_set", heavy)
            assert_refused(capfd, door, argv, words, root)

    return check


class Hidden:
    """Creates a file when a .pt that holds it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def truncate(path: Path, share: float = 0.5) -> None:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--dataset", "ImageFolders"], ["ImageFolders", "ImageFolder"]),
        (["--data_path", "nowhere"], ["nowhere"]),
        (["--model", "ConvNett"], ["ConvNett", "ConvNet"]),
        (["--model", "ConvNetD7"], ["ConvNetD7", "16 x 16"]),
        (["--score_model", "ConvNetD7"], ["ConvNetD7", "16 x 16"]),
        (["--batch_train", "37"], ["batch_train", "37", "36"]),
        (["--sort_method", "CIFAR10_GraNd"], ["CIFAR10_GraNd", "ImageFolder"]),
        (["--sort_method", "GraNdd"], ["GraNdd", "GraNd"]),
        (["--init_ratio", "0.01"], ["curriculum"]),
        (["--num_experts", "0"], ["num_experts"]),
        (["--dsa_strategy", "crop_blur"], ["blur"]),
        (["--device", "cuda:99"], ["device"]),
        (["--res", "2"], ["res"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_the_first_stage_refuses(refused, images, tmp_path, more, words):
    refused(cli.buffer, record_args(images, tmp_path, *more), *words)


def test_rankings_that_are_not_this_data_sets(refused, images, tmp_path):
    folder = tmp_path / "rankings"
    path = folder / "ImageFolder_GraNd.pt"
    argv = record_args(images, tmp_path)
    save_pt(path, torch.arange(50).view(10, 5))
    refused(cli.buffer, argv, path, "50 images", "36 images", late=True)
    save_pt(path, torch.arange(36).view(12, 3).T.contiguous())
    refused(cli.buffer, argv, path, "row", late=True)
    save_pt(path, torch.arange(36))
    refused(cli.buffer, argv, path, "flat", late=True)
    truncate(path)
    refused(cli.buffer, argv, path, late=True)
    torch.save([Hidden(tmp_path / "code ran")], path)
    refused(cli.buffer, argv, path, "run code", late=True)
    path.unlink()
    others = make_images(tmp_path / "others", seed=1)
    assert cli.buffer(record_args(others, tmp_path)) == 0  # leaves a ranking of theirs
    shutil.rmtree(tmp_path / "buffer")
    refused(cli.buffer, argv, folder / "ImageFolder_GraNd.safetensors", "other images", late=True)


def test_a_buffer_of_another_recipe_is_not_added_to(refused, images, buffer, tmp_path):
    shutil.copytree(buffer, tmp_path, dirs_exist_ok=True)
    refused(cli.buffer, record_args(images, tmp_path, "--lr_teacher", "0.5"), "lr_teacher: 0.05", "0.5 in the config")
    refused(cli.buffer, record_args(images, tmp_path, seed=1), "seed")
    truncate(experts_in(tmp_path) / "expert_0001.safetensors")
    refused(cli.buffer, record_args(images, tmp_path), "expert_0001.safetensors")


def test_folders_without_permission(refused, images, buffer, tmp_path, monkeypatch):
    (tmp_path / "locked").mkdir()
    access = os.access  # root may write anywhere, so the answer is made up
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "locked" and access(path, mode))
    refused(cli.buffer, record_args(images, tmp_path / "locked"), "locked may not be written to")
    refused(cli.distill, distil_args(images, buffer, tmp_path / "locked"), "locked may not be written to")


def test_files_in_place_of_folders(refused, images, buffer, finished, tmp_path):
    (tmp_path / "file").touch()
    refused(cli.buffer, record_args(images, tmp_path, "--buffer_path", tmp_path / "file"), "file is not a folder")
    refused(cli.distill, distil_args(images, buffer, tmp_path / "file" / "runs"), "file is not a folder")
    ours = run_folder(finished) / "Normal" / "synthetic_last.safetensors"
    argv = ["--synthetic", ours, "--data_path", images, "--out"]
    refused(cli.evaluate, [*argv, tmp_path / "file" / "out.json"], "file is not a folder")
    refused(cli.evaluate, [*argv, tmp_path / "here"], "is a folder")


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--model", "ConvNetD1W16"], ["no expert trajectories", "ConvNetD1W16"]),
        (["--zca"], ["no expert trajectories"]),  # those without ZCA lie elsewhere
        (["--max_start_epoch", "4"], ["max_start_epoch 4", "4 epochs", "has 3"]),
        (["--expert_epochs", "2"], ["expert_epochs 2", "has 3"]),
        (["--ipc", "13"], ["ipc: 13", "class 0", "12"]),
        (["--ipc", "13", "--pix_init", "real"], ["ipc: 13"]),
        (["--Label_Model_Timestamp", "4"], ["Label_Model_Timestamp: 4", "3"]),
        (["--Label_Model_Timestamp", "-5"], ["Label_Model_Timestamp: -5"]),
        (["--Initialize_Label_With_Another_Model", "--Initialize_Label_Model", "MLP"], ["no expert", "MLP"]),
        (["--eval_mode", "M"], ["VGG11", "16 x 16"]),
        (["--model", "ConvNetD7"], ["ConvNetD7", "16 x 16"]),
        (["--name", "a/b"], ["a/b"]),
        (["--name", ".."], ["'..'"]),
        (["--depth_ratio", "1"], ["depth_ratio"]),
        (["--tracker", "tensorboards"], ["tensorboard"]),
        (["--resume", "--overwrite"], ["resume", "overwrite"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_the_second_stage_refuses(refused, images, buffer, tmp_path, more, words):
    refused(cli.distill, distil_args(images, buffer, tmp_path / "runs", *more), *words)


def test_buffers_that_do_not_fit(refused, images, buffer, tmp_path):
    shutil.copytree(buffer / "buffer", tmp_path / "buffer")
    argv = distil_args(images, tmp_path, tmp_path / "runs")
    others = make_images(tmp_path / "others", seed=1)
    refused(cli.distill, distil_args(others, tmp_path, tmp_path / "runs"), "fingerprint", experts_in(tmp_path))
    shutil.copytree(experts_in(tmp_path), experts_in(tmp_path, zca=True))  # claims to be of whitened images
    refused(cli.distill, [*argv, "--zca"], "preprocessing", "meanstd", "zca", late=True)
    shutil.copytree(experts_in(tmp_path), experts_in(tmp_path).with_name("ConvNetD1W16"))  # to be of another network
    refused(cli.distill, [*argv, "--model", "ConvNetD1W16"], "model", MODEL)
    expert = experts_in(tmp_path) / "expert_0001.safetensors"
    truncate(expert)
    refused(cli.distill, argv, expert)
    expert.write_bytes(b"")
    refused(cli.distill, argv, expert)
    shutil.rmtree(experts_in(tmp_path))
    refused(cli.distill, argv, experts_in(tmp_path), "buffer_CL.py")
    experts_in(tmp_path).mkdir()
    save_pt(experts_in(tmp_path) / "replay_buffer_0.pt", [])
    refused(cli.distill, argv, "import_buffer.py")


def test_experts_that_know_too_little(refused, images, buffer, tmp_path):
    argv = distil_args(images, buffer, tmp_path / "runs", "--Label_Model_Timestamp", "0", "--ipc", "12")  # untrained
    refused(cli.distill, argv, "classify only", "ipc is 12", "or use pix_init: real", late=True)


def test_runs_in_the_way(refused, images, buffer, finished, tmp_path, capfd):
    shutil.copytree(finished, tmp_path / "runs")
    folder = run_folder(tmp_path / "runs")
    argv = distil_args(images, buffer, tmp_path / "runs")
    refused(cli.distill, argv, folder, "finished", "--overwrite")
    before = run_contents(folder)
    assert cli.distill([*argv, "--resume"]) == 0  # nothing is left to do
    assert run_contents(folder) == before
    refused(cli.distill, [*argv, "--resume", "--syn_steps", "4"], "syn_steps: 3 in the run, 4 in the config")
    (folder / "finished.json").unlink()
    refused(cli.distill, argv, folder, "unfinished", "--resume")
    refused(cli.distill, [*argv, "--resume", "--syn_steps", "4"], "syn_steps: 3 in the run, 4 in the config")
    truncate(folder / "checkpoint.safetensors")
    before = run_contents(folder)
    assert cli.distill([*argv, "--resume"]) == 2
    assert "checkpoint.safetensors is not a whole" in capfd.readouterr().err
    assert run_contents(folder) == before
    assert cli.distill([*argv, "--overwrite", "--Iteration", "0"]) == 0
    assert json.loads((folder / "finished.json").read_text())["iterations"] == 1


@pytest.mark.parametrize("stage", [cli.buffer, cli.distill, cli.evaluate])
def test_configs_that_cannot_be_used(refused, stage, tmp_path):
    path = tmp_path / "some.yaml"
    for text, word in (("seeed: 1", "seed"), ("seed: -1", "seed"), ("seed: [", "YAML"), ("- 1", "some.yaml")):
        path.write_text(text)
        refused(stage, ["--cfg", path], word)
    refused(stage, ["--cfg", tmp_path / "none.yaml"], "none.yaml")


def test_the_third_stage_refuses(refused, images, buffer, finished, tmp_path):
    normal = tmp_path / "normal"
    shutil.copytree(run_folder(finished) / "Normal", normal)
    ours = normal / "synthetic_last.safetensors"
    data = ["--data_path", images]
    trio = {name: normal / f"{name}_last.pt" for name in ("images", "labels", "lr")}

    def published(**other) -> list:
        files = trio | other
        argv = ["--data_dir", files["images"], "--label_dir", files["labels"], "--lr_dir", files["lr"]]
        return [*argv, "--dataset", "ImageFolder", "--model", MODEL, *data]

    def written(value) -> Path:
        torch.save(value, tmp_path / "other.pt")
        return tmp_path / "other.pt"

    refused(cli.evaluate, [], "--synthetic")
    refused(cli.evaluate, ["--synthetic", "none.safetensors", *data], "none.safetensors")
    refused(cli.evaluate, ["--synthetic", normal / "images_last.pt", *data], "images_last.pt")
    refused(cli.evaluate, published(images=tmp_path / "none.pt"), "none.pt")
    for name in trio:
        hidden = written({"x": Hidden(tmp_path / "code ran")})
        refused(cli.evaluate, published(**{name: hidden}), hidden, "run code")
        shutil.copy(trio[name], tmp_path / "half.pt")
        truncate(tmp_path / "half.pt")
        refused(cli.evaluate, published(**{name: tmp_path / "half.pt"}), "half.pt")
    assert not (tmp_path / "code ran").exists()

    refused(cli.evaluate, published(images=written(torch.zeros(6, 3, 8, 8))), "[3, 8, 8]", "[3, 16, 16]")
    refused(cli.evaluate, published(images=written(torch.zeros(5, 3, 16, 16))), "6 labels for 5 images")
    refused(cli.evaluate, published(lr=written(torch.tensor(-0.1))), "lr", "positive")
    (tmp_path / "large").mkdir()
    save_pt(tmp_path / "large" / "images.pt", torch.zeros(39, 3, 16, 16))
    save_pt(tmp_path / "large" / "labels.pt", torch.zeros(39, 3))
    large = {"images": tmp_path / "large" / "images.pt", "labels": tmp_path / "large" / "labels.pt"}
    refused(cli.evaluate, published(**large), "ipc: 13", "12")  # real images to compare with run out

    others = make_images(tmp_path / "others", seed=1)
    refused(cli.evaluate, ["--synthetic", ours, "--data_path", others], "fingerprint")
    refused(cli.evaluate, ["--synthetic", ours, *data, "--zca"], "preprocessing", late=True)
    refused(cli.evaluate, ["--synthetic", ours, *data, "--model", "ConvNetD7"], "ConvNetD7")
    refused(cli.evaluate, ["--synthetic", ours, *data, "--eval_mode", "M"], "VGG11")
    refused(cli.evaluate, ["--synthetic", ours, *data, "--buffer_path", tmp_path / "none"], "no expert trajectories")
    refused(cli.evaluate, ["--synthetic", ours, *data, "--epoch_eval_train", "0"], "epoch_eval_train")
    truncate(ours)
    refused(cli.evaluate, ["--synthetic", ours, *data], ours)


def test_a_full_disk_is_a_sentence_too(images, tmp_path, monkeypatch, capfd):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device", str(tmp_path / "expert"))

    monkeypatch.setattr(recording, "write_expert", full)
    assert cli.buffer(record_args(images, tmp_path)) == 1
    assert capfd.readouterr().err.splitlines()[-1] == f"error: No space left on device: {tmp_path / 'expert'}"
