"""Stage 3 and coresets: sets in the forms of others, results that say what they are of and are not replaced unasked."""

import json
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import EXPERTS, assert_refused, command_line, contents, slow
from PIL import Image

from pad import cli
from pad.commands import rows
from pad.commands.coreset import CoresetSettings, select_coreset
from pad.config import RECIPE, parse, setting
from pad.errors import InputError
from pad.evaluation import Evaluation
from pad.synthetic import SyntheticSet

MODEL = "ConvNetD1W8"
K, IPC = 3, 2  # classes of the images; of each in a set
DATA = {"dataset": "ImageFolder", "model": MODEL}
NETWORKS = {"num_eval": 2, "epoch_eval_train": 2, "batch_train": 4, "compile": "off"}


def coreset_args(images: Path, folder: Path, *more: str, **settings) -> list[str]:
    here = {"data_path": images, "ranking_path": folder / "rankings", "out": folder / "sets"}
    return command_line(*more, **DATA | here | {"method": "Uniform", "ipc": IPC, "lr": 0.1} | settings)


def evaluation_args(images: Path, made: Path, *more: str, **settings) -> list[str]:
    asked = {"synthetic": made, "data_path": images, "baselines": "none"}
    return command_line(*more, **asked | NETWORKS | settings)


def set_in(folder: Path) -> Path:
    return folder / "sets" / f"ImageFolder_Uniform_{IPC}.safetensors"


def results_in(path: Path) -> dict:
    return json.loads(path.read_text())


@pytest.fixture
def made(images, tmp_path) -> Path:
    """A coreset's own file."""
    assert cli.coreset(coreset_args(images, tmp_path)) == 0
    return set_in(tmp_path)


@pytest.fixture
def refused(tmp_path, capfd):
    """Call a command that must refuse, and change nothing."""
    return lambda door, argv, *words: assert_refused(capfd, door, argv, words, tmp_path)


def trio_args(images: Path, folder: Path, labels, lr="0.1") -> list[str]:
    """Arguments about the coreset's images with other labels, in the published form."""
    torch.save(labels, folder / "labels_best.pt")
    trio = {"data_dir": folder / f"sets/images_ImageFolder_Uniform_{IPC}.pt", "label_dir": folder / "labels_best.pt"}
    out = {"lr_dir": lr, "out": folder / "others.json", "baselines": "none", "data_path": images}
    return command_line(**DATA | NETWORKS | trio | out)


# ---- sets of others


CLASSES = torch.arange(K).repeat_interleave(IPC)


@pytest.mark.parametrize("labels", [CLASSES, slow(CLASSES[:, None].int()), slow(F.one_hot(CLASSES, K))])
def test_hard_labels_score_as_those_of_our_own_file(images, made, tmp_path, labels):
    assert cli.evaluate(evaluation_args(images, made)) == 0
    assert cli.evaluate(trio_args(images, tmp_path, labels)) == 0
    ours, theirs = results_in(made.with_suffix(".evaluation.json")), results_in(tmp_path / "others.json")
    assert theirs["results"] == ours["results"] and theirs["lr"] == ours["lr"]


def test_probabilities_are_the_targets_that_networks_are_trained_on(images, made, tmp_path, monkeypatch):
    p = torch.rand(K * IPC, K, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    p /= p.sum(1, keepdim=True)
    seen = []
    run = Evaluation.run

    def watched(self, cases, *args, **more):
        seen.extend(case.training_set(0)[1] for case in cases)
        return run(self, cases, *args, **more)

    monkeypatch.setattr(Evaluation, "run", watched)
    assert cli.evaluate(trio_args(images, tmp_path, p)) == 0
    assert cli.evaluate([*trio_args(images, tmp_path, p.log() + 5), "--overwrite"]) == 0
    for targets in seen:
        torch.testing.assert_close(targets.double(), p, rtol=0, atol=1e-6)
    assert len(seen) == 2


def test_a_set_without_a_learning_rate(images, made, tmp_path, refused):
    argv = trio_args(images, tmp_path, CLASSES)
    at = argv.index("--lr_dir")
    without = argv[:at] + argv[at + 2 :]
    refused(cli.evaluate, without, "learning rate is missing; give its file, or the number itself")
    refused(cli.evaluate, [*without, "--lr_net", "0.1"], "--lr_dir")
    for number, said in (("0", "not a positive number"), ("nan", "not a finite number"), ("O.1", "O.1 does not exist")):
        refused(cli.evaluate, [*without, "--lr_dir", number], said)
    config = tmp_path / "settings.yaml"  # where other paths begin at a folder
    config.write_text("lr_dir: 0.1\n")
    assert cli.evaluate([*without, "--cfg", str(config)]) == 0
    torch.save(0.1, tmp_path / "0.3")  # a file that is there is a file
    assert cli.evaluate([*without, "--lr_dir", str(tmp_path / "0.3")]) == 0
    assert results_in(tmp_path / "others.json")["lr"] == pytest.approx(0.1)


def test_where_a_set_may_lie(images, made, tmp_path, refused):
    """A run's folder, its folder of sets, or where files of others lie."""
    normal = tmp_path / "run" / "Normal"
    normal.mkdir(parents=True)
    shutil.copy(made, normal / "synthetic_last.safetensors")
    for folder in (normal, normal.parent):
        assert cli.evaluate(evaluation_args(images, folder)) == 0
    assert [path.name for path in normal.glob("*.json")] == ["synthetic_last.evaluation.json"]
    pt = made.with_name(f"images_{made.stem}.pt")
    refused(cli.evaluate, evaluation_args(images, pt), pt, "give --dataset, --zca, --values, --label_form")
    refused(cli.evaluate, evaluation_args(images, made, values="pixels"), made, "values: ", "which says that itself")
    (tmp_path / "config.yaml").touch()  # of a run that has no set yet
    refused(cli.evaluate, evaluation_args(images, tmp_path), "Normal/synthetic_last.safetensors does not exist")
    refused(cli.evaluate, evaluation_args(images, tmp_path / "gone.pt"), "gone.pt does not exist")


# ---- results are kept


def test_results_say_what_they_are_of_and_the_same_command_gives_them_again(images, made, tmp_path):
    argv = evaluation_args(images, made, seed=3)
    assert cli.evaluate(argv) == 0
    out = made.with_suffix(".evaluation.json")
    first, results = out.read_bytes(), results_in(out)
    asked = {"eval_mode": "S", "seed": 3, "model": MODEL, "baselines": "none"} | NETWORKS
    del asked["compile"]  # which is a question of rounding
    assert asked.items() <= results["settings"].items()
    assert results["data"]["dataset"] == "ImageFolder" and results["experts"] is None
    assert str(tmp_path) not in first.decode(), "sets may be moved"
    assert cli.evaluate(argv) == 0
    assert out.read_bytes() == first


OTHERS = ("epoch_eval_train=1", "seed=1", "batch_train=2", "dsa=False", "baselines=hard")


@pytest.mark.parametrize("other", ["eval_mode=W", "num_eval=1", "protocol=dm", *map(slow, OTHERS)])
def test_results_by_other_settings_are_replaced_only_when_told(images, made, tmp_path, refused, other):
    assert cli.evaluate(evaluation_args(images, made)) == 0
    out = made.with_suffix(".evaluation.json")
    first = out.read_bytes()
    key, value = other.split("=")
    argv = evaluation_args(images, made, **{key: value})
    refused(cli.evaluate, argv, out, f"settings {key}: ", value, "--out", "--overwrite")
    assert cli.evaluate([*argv, "--out", str(tmp_path / "other.json")]) == 0
    assert out.read_bytes() == first
    assert cli.evaluate([*argv, "--overwrite"]) == 0
    assert out.read_bytes() == (tmp_path / "other.json").read_bytes() != first


def test_results_by_a_published_protocol_say_so(images, made, refused):
    argv = evaluation_args(images, made, protocol="ncfm")
    assert cli.evaluate(argv) == 0
    results = results_in(made.with_suffix(".evaluation.json"))
    said = results["settings"]
    assert (said["protocol"], said["epoch_eval_train"], said["dsa_strategy"]) == (
        "ncfm",
        2,
        "color_crop_flip_scale_rotate",
    )
    assert results["results"][0]["last"].keys() == {"mean", "std", "se"}
    refused(cli.evaluate, evaluation_args(images, made), "settings dsa_strategy", "--overwrite")
    dm = made.with_name("dm.json")
    assert cli.evaluate(evaluation_args(images, made, protocol="dm", out=dm)) == 0
    refused(cli.evaluate, evaluation_args(images, made, out=dm), "settings protocol: dm in these results, mtt in")


@pytest.mark.parametrize("changed", ["images", "labels", "lr", "iteration"])
def test_results_of_another_set_of_that_name_are_replaced_only_when_told(images, made, refused, changed):
    synthetic = SyntheticSet.load(made)
    synthetic.metadata["iteration"] = 4
    synthetic.save(made)
    argv = evaluation_args(images, made)
    assert cli.evaluate(argv) == 0
    if changed == "iteration":
        synthetic.metadata["iteration"] = 7
    else:
        tensor = getattr(synthetic, changed)
        tensor[(0,) * tensor.ndim] *= 1.5
    synthetic.save(made)
    refused(cli.evaluate, argv, f"synthetic {'iteration: 4' if changed == 'iteration' else 'digest'}", "--overwrite")
    assert cli.evaluate([*argv, "--overwrite"]) == 0
    assert results_in(made.with_suffix(".evaluation.json"))["synthetic"]["iteration"] == synthetic.metadata["iteration"]


def test_results_on_other_test_images_are_replaced_only_when_told(images, made, tmp_path, refused):
    argv, out = evaluation_args(images, made), made.with_suffix(".evaluation.json")
    assert cli.evaluate(argv) == 0
    other = tmp_path / "other"
    shutil.copytree(images, other)
    picture = next((other / "test").rglob("*.png"))
    Image.eval(Image.open(picture), lambda level: 255 - level).save(picture)
    argv = evaluation_args(other, made)
    refused(cli.evaluate, argv, "data test_fingerprint", "--overwrite")
    results = results_in(out)
    del results["data"]["test_fingerprint"]  # as of an earlier version
    out.write_text(json.dumps(results))
    assert cli.evaluate(argv) == 0
    assert "test_fingerprint" in results_in(out)["data"]


@pytest.mark.parametrize("there", ["notes", "[]", '{"results": [], "seed": 0}', '{"synthetic": {}, "settings": 1}'])
def test_a_file_that_does_not_say_what_it_is_of_is_not_replaced(images, made, tmp_path, refused, there):
    """An earlier version's results are such a file."""
    out = tmp_path / "out.json"
    out.write_text(there)
    argv = evaluation_args(images, made, out=out)
    refused(cli.evaluate, argv, out, "does not say what set and settings it is of", "--overwrite")
    assert cli.evaluate([*argv, "--overwrite"]) == 0 and results_in(out)["results"]


def test_networks_of_a_stopped_evaluation_outlive_one_by_other_settings(images, made, monkeypatch):
    """And are forgotten when their own is finished."""
    trained = []
    train = Evaluation.train

    def counted(self, *args):
        for so_far in train(self, *args):
            yield so_far
            trained.append(so_far.n)
            if stop and len(trained) == stop:
                signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Evaluation, "train", counted)
    argv, others = (evaluation_args(images, made, num_eval=4, seed=seed) for seed in (0, 1))
    out = made.with_suffix(".evaluation.json")
    stop = 2
    assert cli.evaluate(argv) == 130
    stop = 0
    assert cli.evaluate(others) == 0
    out.rename(out.with_name("others"))
    trained.clear()
    assert cli.evaluate(argv) == 0
    assert len(trained) == 2, "two of four were there"
    assert not list(out.parent.glob("*.networks-*"))


def test_sets_of_real_images_are_drawn_once_however_many_networks_train_at_once(images, made, monkeypatch):
    drawn = []
    draw = rows.class_order
    monkeypatch.setattr(rows, "class_order", lambda *of: drawn.append(of[-1]) or draw(*of))
    assert cli.evaluate(evaluation_args(images, made, baselines="hard", num_eval=3, together=3)) == 0
    assert drawn == [0, 0, 1, 2]  # the first one also to see whether there are images enough


# ---- experts


BUFFER = {"num_experts": 1, "batch_train": 6, "alpha": 0.3, "score_repeats": 1} | EXPERTS


def record(images: Path, folder: Path, **settings) -> Path:
    here = {"data_path": images, "buffer_path": folder / "buffer", "ranking_path": folder / "rankings"}
    curriculum = {"rm_epoch_first": 1, "rm_epoch_second": 2}
    assert cli.buffer(command_line(**DATA | here | BUFFER | curriculum | settings)) == 0
    return folder / "buffer"


def test_a_row_that_weak_experts_cannot_label_is_left_out_with_a_line(images, made, tmp_path, capfd):
    experts = record(images, tmp_path, lr_teacher=1e-9, train_epochs=4)
    argv = evaluation_args(images, made, buffer_path=experts, baselines="hard,soft")
    capfd.readouterr()
    assert cli.evaluate(argv) == 0
    said = capfd.readouterr().err
    assert "random real, expert labels are left out: the 1 experts classify only" in said and "pix_init" not in said
    rows = results_in(made.with_suffix(".evaluation.json"))["results"]
    assert [row["set"] for row in rows] == ["synthetic", "random real, hard labels"]


def test_results_beside_other_experts_are_replaced_only_when_told(images, made, tmp_path, refused):
    argv = evaluation_args(images, made, buffer_path=record(images, tmp_path), baselines="soft")
    assert cli.evaluate(argv) == 0
    assert cli.evaluate(argv) == 0
    without = evaluation_args(images, made, baselines="soft")
    refused(cli.evaluate, without, "experts: ", "None in this command", "--overwrite")
    record(images, tmp_path, num_experts=2)
    refused(cli.evaluate, argv, "experts: ", "--overwrite")


# ---- coresets


@pytest.mark.parametrize("other", [{"lr": 0.2}, *map(slow, ({"seed": 1}, {"train_per_class": 5}))])
def test_a_coreset_by_other_settings_is_replaced_only_when_told(images, made, tmp_path, refused, other):
    assert cli.coreset(coreset_args(images, tmp_path)) == 0
    before = contents(tmp_path)
    shutil.rmtree(tmp_path / "rankings")
    assert cli.coreset(coreset_args(images, tmp_path)) == 0
    assert contents(tmp_path).keys() == before.keys()
    argv = coreset_args(images, tmp_path, **other, ranking_path=tmp_path / "more rankings")
    [(key, value)] = other.items()
    refused(cli.coreset, argv, made, f"settings {key}: ", f"{value} in this command", "--out", "--overwrite")
    assert cli.coreset([*argv, "--overwrite"]) == 0
    assert SyntheticSet.load(made).metadata["settings"][key] == value


@dataclass(frozen=True, kw_only=True)
class Grown(CoresetSettings):
    """These settings of a version with one more."""

    sharpness: int = setting(3, "one that came later", RECIPE, later=True)


@dataclass(frozen=True, kw_only=True)
class Telling(CoresetSettings):
    """And of one that always says it."""

    sharpness: int = setting(3, "one that came later", RECIPE)


@pytest.mark.parametrize("before", [CoresetSettings, Telling])
def test_a_coreset_is_of_the_settings_that_tell_something(images, tmp_path, before):
    """An old one goes for that of a version with one more setting, at its default, whether or not it says it."""
    argv, path = coreset_args(images, tmp_path), set_in(tmp_path)
    select_coreset(parse(before, argv, ""))
    assert select_coreset(parse(Grown, argv, "")) == path
    assert "sharpness" not in SyntheticSet.load(path).metadata["settings"]
    with pytest.raises(InputError, match="sharpness: 3 in this set, 4 in this command"):
        select_coreset(parse(Grown, [*argv, "--sharpness", "4"], ""))
    select_coreset(parse(Grown, [*argv, "--sharpness", "4", "--overwrite"], ""))
    assert SyntheticSet.load(path).metadata["settings"]["sharpness"] == 4
    with pytest.raises(InputError, match="sharpness: 4 in this set, 3 in this command"):
        select_coreset(parse(Grown, argv, ""))


def test_a_coreset_by_another_ranking_or_other_experts_is_replaced_only_when_told(images, tmp_path, refused, capfd):
    asked = {"labels": "soft", "buffer_path": record(images, tmp_path), "method": "GraNd"}
    argv = coreset_args(images, tmp_path, **asked)
    assert cli.coreset(argv) == 0
    path = tmp_path / "sets" / f"ImageFolder_GraNd_{IPC}_soft.safetensors"
    before = path.read_bytes()
    more = coreset_args(images, tmp_path, **asked | {"ranking_path": tmp_path / "more"}, score_epochs=1, score_lr=9)
    assert cli.coreset(more) == 2 and f"{path}: images: " in capfd.readouterr().err
    assert (tmp_path / "more" / "ImageFolder_GraNd.safetensors").exists(), "the ranking is kept"
    record(images, tmp_path, num_experts=2)
    assert cli.coreset(argv) == 2 and f"{path}: experts: " in capfd.readouterr().err
    assert path.read_bytes() == before
    assert cli.coreset([*argv, "--overwrite"]) == 0
