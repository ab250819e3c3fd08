"""The two commands about rankings: what they write, that it is the same again, that they go on, what they refuse."""

import json
import os
import shlex
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import CHECKOUT, EXPERTS, assert_refused, command_line, files_in, make_images, run_script, slow, two_ranks
from PIL import Image

from pad import cli
from pad.commands import bench as workbench
from pad.data.preprocessing import fit_preprocessing
from pad.data.sources import load_data
from pad.difficulty.methods import METHODS
from pad.difficulty.ranking import Ranking
from pad.synthetic import SyntheticSet

MODEL = "ConvNetD1W8"
DATA = {"dataset": "FashionMNISTMini", "train_per_class": 12, "model": MODEL}
TRAINING = {"repeats": 3, "epochs": 2, "lr": 0.05, "batch": 50}
SCORING = {f"score_{name}": value for name, value in TRAINING.items()}  # what the other commands call these
METHODS_3 = ("GraNd", "Forgetting", "Herding")


def score_args(out: Path, *more: str, data: dict = DATA, methods: str = ",".join(METHODS_3), **settings) -> list[str]:
    return command_line(*more, **data | {"out": out, "methods": methods} | TRAINING | settings)


def coreset_args(rankings: Path, out: Path, *more: str, **settings) -> list[str]:
    return command_line(*more, **DATA | {"ranking_path": rankings, "out": out} | SCORING | settings)


@pytest.fixture(scope="module")
def scored(tmp_path_factory) -> Path:
    """Rankings by three methods."""
    folder = tmp_path_factory.mktemp("rankings")
    assert cli.score(score_args(folder)) == 0
    return folder


@pytest.fixture(scope="module")
def ragged(tmp_path_factory) -> dict:
    """An ImageFolder of two classes, of 5 images and of 1."""
    root, rng = tmp_path_factory.mktemp("ragged"), np.random.default_rng(0)
    for part, counts in (("train", (5, 1)), ("test", (2, 2))):
        for name, count in zip(("ant", "bee"), counts):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                Image.fromarray(rng.integers(0, 255, (8, 8), dtype=np.uint8)).save(root / part / name / f"{i}.png")
    return {"dataset": "ImageFolder", "data_path": root, "model": MODEL}


# ---- scoring


def test_a_flat_file_of_others_is_turned_round_when_asked(scored, tmp_path, capsys):
    """What is advised where such a file is refused works here, too."""
    rows = torch.load(scored / "FashionMNISTMini_GraNd.pt", weights_only=True)
    torch.save(rows.T.flatten().flip(0), tmp_path / "FashionMNISTMini_Theirs.pt")  # hardest first, classes mixed
    assert cli.score(score_args(tmp_path, methods="Theirs")) == 2
    assert "--convert_flat" in capsys.readouterr().err
    assert cli.score(score_args(tmp_path, "--convert_flat", "--plot", methods="Theirs")) == 0
    assert "as its file has it" in capsys.readouterr().out


def test_one_command_writes_every_ranking_in_both_forms(scored):
    assert set(files_in(scored)) == {
        f"FashionMNISTMini_{method}{suffix}" for method in METHODS_3 for suffix in (".pt", ".safetensors")
    }, "and nothing is left of the training"
    data = load_data("FashionMNISTMini", None).first_per_class(12)
    for method in METHODS_3:
        ranking = Ranking.load(scored / f"FashionMNISTMini_{method}.safetensors")
        ranking.validate(data.train_labels, 10, method)
        published = torch.load(scored / f"FashionMNISTMini_{method}.pt", weights_only=True)
        assert torch.equal(published, torch.stack(ranking.rows))
        assert (ranking.scores is not None) == (METHODS[method].kind == "score")


def test_methods_do_not_depend_on_what_else_is_asked_for(scored, tmp_path):
    assert cli.score(score_args(tmp_path, methods="Herding")) == 0
    assert cli.score(score_args(tmp_path, methods="GraNd")) == 0
    assert files_in(tmp_path).items() < files_in(scored).items() and len(files_in(tmp_path)) == 4


def test_the_first_stage_makes_the_same_ranking_and_uses_it(scored, tmp_path, capfd):
    asked = {"num_experts": 1, "train_epochs": 1, "batch_train": 50, "compile": "off"}
    asked |= {"buffer_path": tmp_path / "buffer", "sort_method": "FashionMNISTMini_Forgetting"}
    stage = command_line(**DATA | EXPERTS | asked | SCORING)
    assert cli.buffer(stage) == 0
    assert files_in(tmp_path / "buffer" / "data_indices").items() <= files_in(scored).items()
    again = stage + command_line(buffer_path=tmp_path / "another", ranking_path=scored)
    capfd.readouterr()
    assert cli.buffer(again) == 0
    said = capfd.readouterr().err
    assert f"using {scored / 'FashionMNISTMini_Forgetting.safetensors'}" in said and "computed" not in said


def test_a_table_of_how_methods_agree(tmp_path, scored, capfd):
    assert cli.score(score_args(scored)) == 0
    out, err = capfd.readouterr()
    rows = {line.split()[0]: line.split() for line in out.splitlines() if line.startswith(METHODS_3)}
    assert list(rows) == list(METHODS_3) and float(rows["GraNd"][-1]) == 1
    ours, theirs = (torch.load(scored / f"FashionMNISTMini_{name}.pt") for name in ("GraNd", "Herding"))
    places = ours.argsort(dim=1).double(), theirs.argsort(dim=1).double()
    expected = sum(np.corrcoef(a, b)[0, 1] for a, b in zip(*places)) / 10
    assert float(rows["Herding"][-1]) == pytest.approx(expected, abs=0.006)


def forbid(monkeypatch, *names: str) -> None:
    """The next command must do without these."""

    def heavy(*args, **kwargs):
        raise AssertionError("this was done already")

    for name in names:
        monkeypatch.setattr(name, heavy)


def test_what_is_there_is_not_computed_again(scored, monkeypatch, capfd):
    before = files_in(scored)
    with monkeypatch.context() as patch:
        forbid(patch, "pad.difficulty.obtain.compute_rankings")
        assert cli.score(score_args(scored)) == 0
        assert "warning" not in capfd.readouterr().err
        assert cli.score(score_args(scored, epochs=1)) == 2
    assert "epochs: 2 in the ranking, 1 in the settings" in capfd.readouterr().err
    assert files_in(scored) == before


def test_overwriting(scored, tmp_path, capfd):
    assert cli.score(score_args(tmp_path, epochs=1)) == 0
    assert cli.score(score_args(tmp_path, "--overwrite")) == 0
    assert files_in(tmp_path) == files_in(scored)


@pytest.mark.parametrize("more", [[], slow(["--overwrite"])], ids=["", "overwriting"])
def test_an_interrupted_command_goes_on(scored, tmp_path, monkeypatch, capfd, more):
    """Stopped in the second network: only the second and third are trained then, and the files are the same."""
    argv, trained = score_args(tmp_path / "out", *more), []
    obtain = workbench.obtain_rankings

    def watched(*args, progress, **options):
        def watch(repeat, epoch):
            trained.append((repeat, epoch))
            if stop == (repeat, epoch):
                os.kill(os.getpid(), signal.SIGINT)
            progress(repeat, epoch)

        return obtain(*args, progress=watch, **options)

    monkeypatch.setattr(workbench, "obtain_rankings", watched)
    monkeypatch.setattr(sys, "argv", [str(CHECKOUT / "scripts" / "score_difficulty.py"), *argv])
    if more:
        stop = None
        assert cli.score(score_args(tmp_path / "out", epochs=1)) == 0
        trained.clear()
    before, stop = set(files_in(tmp_path)), (1, 0)
    assert cli.score() == 130
    assert not {name for name in set(files_in(tmp_path)) - before if name.endswith(".pt") or "_GraNd" in name}
    advice = capfd.readouterr().err.splitlines()[-1]
    words = shlex.split(advice.removeprefix("go on with: "))
    assert words[-len(argv) :] == argv
    assert trained == [(0, 0), (0, 1), (1, 0)]
    trained.clear()
    stop = None
    assert cli.score(words[words.index("--dataset") :]) == 0
    assert [repeat for repeat, epoch in trained if epoch == 1] == [1, 2]
    assert files_in(tmp_path / "out") == files_in(scored)


@pytest.mark.slow
def test_the_command_from_a_shell(tmp_path):
    done = run_script("scripts/score_difficulty.py", ["--list"], tmp_path)
    assert done.returncode == 0 and done.stderr == "" and not list(tmp_path.iterdir())
    for name, method in METHODS.items():
        assert any(line.startswith(name) and method.summary in line for line in done.stdout.splitlines())


def test_every_method_on_classes_of_five_images_and_of_one(ragged, tmp_path):
    assert cli.score(score_args(tmp_path, data=ragged, methods="all")) == 0
    assert set(files_in(tmp_path)) == {f"ImageFolder_{method}.safetensors" for method in METHODS}
    for method in METHODS:
        rows = Ranking.load(tmp_path / f"ImageFolder_{method}.safetensors").rows
        assert sorted(rows[0].tolist()) == [0, 1, 2, 3, 4] and rows[1].tolist() == [5]


@pytest.mark.slow
def test_pictures(ragged, tmp_path):
    pytest.importorskip("matplotlib")
    assert cli.score(score_args(tmp_path, "--plot", data=ragged, methods="EL2N,Herding")) == 0
    pictures = list((tmp_path / "plots_ImageFolder").glob("*.png"))
    assert len(pictures) >= 3
    for picture in pictures:
        with Image.open(picture) as opened:
            opened.verify()


def test_two_processes_write_what_one_does(scored, tmp_path):
    codes, out, err = two_ranks(tmp_path, cli.score, score_args(tmp_path / "out"))
    assert codes == [0, 0], err
    assert files_in(tmp_path / "out") == files_in(scored)
    assert out[1] == "" and err[1] == "" and "Herding" in out[0], "rank 0 alone talks"


# ---- coresets


def evaluation_args(synthetic: Path, out: Path, **settings) -> list[str]:
    return command_line(synthetic=synthetic, out=out, num_eval=2, epoch_eval_train=3, compile="off", **settings)


@pytest.mark.parametrize("zca", [[], slow(["--zca"])], ids=["normalised", "whitened"])
def test_a_coreset_scores_as_the_baseline_does(tmp_path, zca):
    assert cli.coreset(coreset_args(tmp_path / "rankings", tmp_path / "sets", *zca, method="EL2N", ipc=2)) == 0
    made = tmp_path / "sets" / "FashionMNISTMini_EL2N_2.safetensors"
    asked = {"ranking_path": tmp_path / "rankings", "baselines": "EL2N,Uniform"}
    argv = evaluation_args(made, tmp_path / "out.json", **SCORING | asked)
    assert cli.evaluate(argv) == 0
    rows = {row["set"]: row for row in json.loads((tmp_path / "out.json").read_text())["results"]}
    assert list(rows) == ["synthetic", "EL2N, hard labels", "Uniform, hard labels"]
    accuracies = {name: row["accuracies"] for name, row in rows.items()}
    assert accuracies["synthetic"] == accuracies["EL2N, hard labels"] != accuracies["Uniform, hard labels"]
    assert (tmp_path / "rankings" / "FashionMNISTMini_Uniform.safetensors").exists()


def test_the_first_images_of_either_end_in_both_forms(scored, tmp_path):
    data = load_data("FashionMNISTMini", None).first_per_class(12)
    rows = Ranking.load(scored / "FashionMNISTMini_GraNd.safetensors").rows
    for end, name, expected in (
        ("easiest", "FashionMNISTMini_GraNd_3", [row[:3] for row in rows]),
        ("hardest", "FashionMNISTMini_GraNd_3_hardest", [row.flip(0)[:3] for row in rows]),
    ):
        assert cli.coreset(coreset_args(scored, tmp_path, method="GraNd", ipc=3, end=end, lr=0.02)) == 0
        coreset = SyntheticSet.load(tmp_path / f"{name}.safetensors")
        chosen = torch.cat(expected)
        assert coreset.metadata["provenance"]["images"] == chosen.tolist()
        assert torch.equal(coreset.images, fit_preprocessing(data, zca=False).apply(data.train_images[chosen]))
        assert (coreset.pixels() * 255 - data.train_images[chosen]).abs().max() < 1e-3
        assert torch.equal(coreset.probabilities().argmax(1), data.train_labels[chosen])
        assert (coreset.ipc, coreset.lr) == (3, torch.tensor(0.02))
        trio = [torch.load(tmp_path / f"{part}_{name}.pt") for part in ("images", "labels", "lr")]
        for ours, theirs in zip((coreset.images, coreset.labels, coreset.lr), trio):
            assert torch.equal(ours, theirs)
        with Image.open(tmp_path / f"{name}.png") as picture:
            picture.verify()
    assert len(files_in(tmp_path)) == 10


def test_four_real_images_are_kept_in_each(scored, tmp_path):
    data = load_data("FashionMNISTMini", None).first_per_class(12)
    seen = fit_preprocessing(data, zca=False).apply(data.train_images).double()
    assert cli.coreset(coreset_args(scored, tmp_path, method="GraNd", ipc=2, factor=2)) == 0
    coreset = SyntheticSet.load(tmp_path / "FashionMNISTMini_GraNd_2_factor2.safetensors")
    assert (coreset.factor, coreset.ipc, coreset.kept.shape) == (2, 8, (20, 1, 28, 28))
    assert coreset.is_hard and coreset.classes.tolist() == [c for c in range(10) for _ in range(8)]
    for c, row in enumerate(Ranking.load(scored / "FashionMNISTMini_GraNd.safetensors").rows):
        for i, which in enumerate(row[:8].tolist()):  # one tile of both images, then the next
            tile, stored = divmod(i, 2)
            y, x = 14 * (tile // 2), 14 * (tile % 2)
            expected = seen[which].view(1, 14, 2, 14, 2).mean((2, 4))
            found = coreset.kept[2 * c + stored, :, y : y + 14, x : x + 14].double()
            assert (found - expected).abs().max() < 1e-6
    assert len(torch.load(tmp_path / "images_FashionMNISTMini_GraNd_2_factor2.pt")) == 80


@pytest.mark.parametrize(
    "asked, words",
    [({"ipc": 4}, "ipc: 4 with factor: 2, 16 real images, is asked for"), ({"factor": 3}, "factor: 3 does not divide")],
    ids=["ipc", "factor"],
)
def test_too_many_in_each_are_refused(scored, tmp_path, capsys, asked, words):
    assert cli.coreset(coreset_args(scored, tmp_path / "out", method="GraNd", **{"ipc": 1, "factor": 2} | asked)) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_the_same_coreset_wherever_it_is_written(scored, tmp_path):
    for folder in ("a", "b"):
        assert cli.coreset(coreset_args(scored, tmp_path / folder, ipc=2)) == 0
    assert files_in(tmp_path / "a") == files_in(tmp_path / "b")


def test_soft_labels_are_the_experts(tmp_path):
    images = {"dataset": "ImageFolder", "data_path": make_images(tmp_path / "images"), "model": MODEL}
    here = {"buffer_path": tmp_path / "buffer", "ranking_path": tmp_path / "rankings"}
    asked = {"num_experts": 2, "train_epochs": 6, "batch_train": 6, "alpha": 0.3, "score_repeats": 1, "compile": "off"}
    asked |= {"rm_epoch_first": 1, "rm_epoch_second": 2}
    assert cli.buffer(command_line(**images | here | EXPERTS | asked)) == 0
    more = {"out": tmp_path / "sets", "method": "GraNd", "ipc": 2, "labels": "soft"}
    assert cli.coreset(command_line(**images | here | more)) == 0  # by stage 1's ranking, whatever its settings
    coreset = SyntheticSet.load(tmp_path / "sets" / "ImageFolder_GraNd_2_soft.safetensors")
    probabilities = coreset.probabilities()
    assert probabilities.max() < 0.9999 and (probabilities.argmax(1) == coreset.classes).float().mean() > 0.5
    made = tmp_path / "sets" / "ImageFolder_GraNd_2_soft.safetensors"
    more = {"data_path": tmp_path / "images", "baselines": "none"}
    assert cli.evaluate(evaluation_args(made, tmp_path / "out.json", **more)) == 0


# ---- wrong input: exit code 2, one sentence, nothing written


@pytest.fixture
def refused(tmp_path, monkeypatch, capfd):
    def check(door, argv, *words: str) -> None:
        with monkeypatch.context() as patch:
            forbid(patch, "pad.difficulty.obtain.compute_rankings", "pad.commands.bench.fit_preprocessing")
            assert assert_refused(capfd, door, argv, words, tmp_path) == ""

    return check


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--methods", "GraNd,EL2M"], ["EL2M", "EL2N"]),
        (["--methods", "CIFAR10_GraNd"], ["CIFAR10", "FashionMNISTMini"]),
        (["--repeats", "0"], ["repeats", "0"]),
        (["--augmentation", "blur"], ["augmentation", "blur"]),
        (["--model", "ConvNetD9"], ["ConvNetD9"]),
        (["--dataset", "FashionMNISTMaxi"], ["FashionMNISTMini"]),
        (["--method", "GraNd"], ["--method", "--methods"]),
        (["--out="], ["--out"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_scoring_refuses(refused, tmp_path, more, words):
    refused(cli.score, score_args(tmp_path / "out", *more), *words)


def test_scoring_refuses_a_file_in_place_of_the_folder(refused, tmp_path):
    (tmp_path / "file").touch()
    refused(cli.score, score_args(tmp_path / "file" / "out"), "file is not a folder")


def test_a_ranking_of_other_images_is_in_the_way(scored, tmp_path, capfd):
    """Found before anything is trained, whatever its place in the list."""
    assert cli.score(score_args(tmp_path, train_per_class=11, methods="EL2N")) == 0
    before = files_in(tmp_path)
    assert cli.score(score_args(tmp_path, methods="GraNd,EL2N")) == 2
    assert "FashionMNISTMini_EL2N.safetensors ranks other images" in capfd.readouterr().err
    assert files_in(tmp_path) == before


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--method", "Hreding"], ["Hreding", "Herding"]),
        (["--ipc", "13"], ["ipc: 13", "class 0 has 12"]),
        (["--end", "top"], ["end", "easiest", "hardest"]),
        (["--labels", "soft", "--buffer_path", "nowhere"], ["no expert trajectories", "nowhere"]),
        (["--score_model", "ConvNetD9"], ["ConvNetD9"]),
        (["--ranking_path="], ["--ranking_path"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_selecting_refuses(refused, tmp_path, more, words):
    refused(cli.coreset, coreset_args(tmp_path / "rankings", tmp_path / "out", *more), *words)


def test_baselines_that_cannot_be_had(refused, scored, tmp_path):
    assert cli.coreset(coreset_args(scored, tmp_path, method="GraNd", ipc=2)) == 0
    argv = evaluation_args(tmp_path / "FashionMNISTMini_GraNd_2.safetensors", tmp_path / "out.json")
    refused(cli.evaluate, [*argv, "--baselines", "hard,Herding"], "--ranking_path")
    refused(cli.evaluate, [*argv, "--baselines", "hard,hrading", "--ranking_path", scored], "hrading", "Herding")
