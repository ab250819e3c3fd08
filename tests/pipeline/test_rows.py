"""Stage 3's table: rows, their learning rates, the whole training set, and the scores that are made of them."""

import dataclasses
import json
import math
import shutil
import signal
from pathlib import Path

import pytest
import torch
from helpers import EXPERTS, assert_refused, command_line, make_images, slow

from pad import cli
from pad.commands.rows import ALSO, TITLES, Rows, held_out, missing_for, row_names
from pad.data.preprocessing import fit_preprocessing
from pad.data.sources import load_data
from pad.errors import InputError
from pad.evaluation import Evaluation
from pad.initialisation import WeakExperts
from pad.metrics import Estimate, scores
from pad.nn.networks import FAMILIES
from pad.store.trajectories import TrajectoryStore
from pad.synthetic import SyntheticSet

MODEL = "ConvNetD1W8"
K, IPC, EACH = 3, 2, 12  # classes; of each in a set and among the training images
DATA = {"dataset": "ImageFolder", "model": MODEL}
NETWORKS = {"num_eval": 2, "epoch_eval_train": 2, "batch_train": 4, "compile": "off", "full_epochs": 2}
ALL = ["syn", "syn_hard", "random", "random_soft", "full", "syn_plain", "random_plain"]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with images, experts of them, a coreset with hard labels and the same with soft ones."""
    folder = tmp_path_factory.mktemp("rows")
    make_images(folder / "images", per_class=EACH)
    here = {"data_path": folder / "images", "ranking_path": folder / "rankings"}
    curriculum = {"rm_epoch_first": 1, "rm_epoch_second": 2, "num_experts": 1, "batch_train": 6, "score_repeats": 1}
    longer = {"train_epochs": 12, "lr_teacher": 0.1}
    buffer = {"buffer_path": folder / "buffer", "rho_max": 0, "rho_min": 0}
    assert cli.buffer(command_line(**DATA | here | EXPERTS | curriculum | longer | buffer)) == 0
    coreset = {"method": "Uniform", "ipc": IPC, "lr": 0.05, "out": folder / "sets"}
    assert cli.coreset(command_line(**DATA | here | coreset)) == 0
    hard = SyntheticSet.load(folder / "sets" / f"ImageFolder_Uniform_{IPC}.safetensors")
    hard.save(folder / "hard.safetensors")
    hard.labels = 3 * torch.eye(K)[hard.classes] + torch.randn(len(hard.classes), K, generator=torch.manual_seed(0))
    hard.metadata.pop("provenance")
    hard.save(folder / "soft.safetensors")
    return folder


@pytest.fixture
def argv(place, tmp_path):
    """Arguments of an evaluation of the hard or soft set that writes to a folder of the test's own."""

    def arguments(kind: str, *more: str, **settings) -> list[str]:
        here = {"synthetic": place / f"{kind}.safetensors", "data_path": place / "images", "out": tmp_path / "out.json"}
        here |= {"buffer_path": place / "buffer", "ranking_path": place / "rankings", "full_path": tmp_path / "whole"}
        return command_line(*more, **here | NETWORKS | settings)

    return arguments


@pytest.fixture
def results(argv, tmp_path):
    def run(kind: str, *more: str, **settings) -> dict:
        assert cli.evaluate(argv(kind, *more, **settings)) == 0
        return json.loads((tmp_path / "out.json").read_text())

    return run


@pytest.fixture
def trained(monkeypatch):
    """What is handed to training, in order: (case, whether it is tested on other than the test images)."""
    seen = []
    run = Evaluation.run

    def watched(self, cases, *args, **more):
        known = more.get("known", {})
        count = args[0] if args else more["num_eval"]
        seen.extend((self, case) for i, case in enumerate(cases) for j in range(count) if (i, j) not in known)
        return run(self, cases, *args, **more)

    monkeypatch.setattr(Evaluation, "run", watched)
    return seen


# ---- which rows


def test_names_of_rows():
    assert row_names(["all"], hard=False, experts=True) == ALL
    assert row_names(["all"], hard=False, experts=False) == ALL, "what is missing is said by who knows why"
    assert "syn_hard" not in row_names(["all"], hard=True, experts=False), "it would be the first row again"
    assert "random_soft" not in row_names(["all"], hard=True, experts=False)
    assert row_names(["hard", "random", "Herding"], hard=True, experts=False) == ["syn", "random", "Herding"]
    assert {ALSO.get(name, name) for name in (*ALL, *ALSO)} == TITLES.keys()


def test_what_scores_miss():
    assert missing_for(["hlr"], ["syn", "full"], hard=False) == "hlr needs syn_hard"
    assert missing_for(["hlr"], ["syn", "full"], hard=True) == ""
    assert missing_for(["ior", "lrs"], ["syn", "random"], hard=False).count("random_soft") == 2


def test_by_default_the_rows_are_the_set_and_its_baselines(results):
    found = results("soft", baselines="hard,Uniform")
    assert [entry["row"] for entry in found["results"]] == ["syn", "syn_hard", "random", "Uniform"]
    assert found["metrics"] == {}, "the labels are soft, those of random images hard"
    assert [entry["row"] for entry in results("soft", "--overwrite", baselines="none")["results"]] == ["syn"]


@pytest.mark.parametrize("kind", ["soft", slow("hard")])
def test_all_rows_and_the_scores_they_make(results, kind):
    found = results(kind, rows="all")
    entries = {entry["row"]: entry for entry in found["results"]}
    names = [name for name in ALL if name != "syn_hard" or kind == "soft"]
    assert list(entries) == names and found["results"][0]["row"] == "syn"
    for name, entry in entries.items():
        mean, other = entry["accuracies"]
        assert entry["mean"] == pytest.approx((mean + other) / 2)
        assert entry["se"] == pytest.approx(abs(mean - other) / 2) and entry["n"] == 2
        assert entry["augmented"] == (not name.endswith("_plain")) and not entry["tuned"] and 0 <= entry["train"] <= 1
        assert entry["lr"] == pytest.approx(0.01 if name == "full" else 0.05)
    one = {name: Estimate(entry["mean"], entry["se"]) for name, entry in entries.items()}
    same = {"random": "random_soft"} if kind == "soft" else {"syn_hard": "syn"}
    assert found["metrics"] == {name: each.as_dict() for name, each in scores(one, same=same).items()}
    assert set(found["metrics"]) == {"hlr", "ior", "ior_plain", "lrs", "ars"}
    assert found["metrics_of"] == {MODEL: found["metrics"]}


def test_what_each_row_trains_on(place, results, trained):
    results("soft", rows="all", num_eval=1)
    synthetic = SyntheticSet.load(place / "soft.safetensors")
    sets = dict(zip(["full", *(name for name in ALL if name != "full")], (case for _, case in trained)))
    one_hot = torch.eye(K)[synthetic.classes]
    for name in ("syn", "syn_hard", "syn_plain"):
        images, p = sets[name].training_set(0)
        assert images.equal(synthetic.images) and p.equal(one_hot if "hard" in name else synthetic.probabilities())
    images, p = sets["full"].training_set(0)
    assert len(images) == K * EACH and p.sum(0).tolist() == [EACH] * K and sets["full"].epochs == 2
    (first, hard), (labelled, soft) = (sets[name].training_set(0) for name in ("random", "random_soft"))
    assert hard.equal(one_hot) and not soft.equal(one_hot) and soft.sum(1).allclose(torch.ones(K * IPC))
    assert soft.argmax(1).equal(synthetic.classes), "of those that the expert gets right"
    assert sets["random_plain"].training_set(0)[1].equal(soft) and not sets["random_plain"].augmented
    assert {tuple(image.flatten().tolist()) for image in (*first, *labelled)} <= {
        tuple(image.flatten().tolist()) for image in images
    }


# ---- learning rates


def test_learning_rates_are_chosen_on_training_images_that_no_row_has(place, results, trained):
    found = results(
        "soft", "--tune_lr", rows="syn,random,random_soft,Uniform,full", lr_grid="0.2,0.0001", held_out=0.25
    )
    tests = 12
    tuning = [(evaluation, case) for evaluation, case in trained if len(evaluation.test_images) != tests]
    assert len(tuning) == 5 * 2
    synthetic = tuning[2][1].training_set(0)[0]
    for evaluation, case in tuning:
        assert evaluation.test_labels.bincount().tolist() == [EACH // 4] * K
        held = {tuple(image.flatten().tolist()) for image in evaluation.test_images}
        images = case.training_set(0)[0][torch.arange(len(case.training_set(0)[0]))]
        if case.epochs:
            assert len(images) == K * EACH * 3 // 4
        if case.training_set(0)[0] is not synthetic:  # what it was made from it does not say
            assert not held & {tuple(image.flatten().tolist()) for image in images}
    entries = found["results"]
    assert [(entry["row"], entry["tuned"]) for entry in entries[:2]] == [("syn", False), ("syn", True)]
    assert {entry["lr"] for entry in entries if entry["tuned"]} <= {0.2, 0.0001}
    assert len(entries) == 10 and found["metrics"]["ior"]["mean"] == pytest.approx(
        entries[1]["mean"] - next(e["mean"] for e in entries if e["row"] == "random_soft" and e["tuned"])
    )


def test_the_rate_that_is_chosen_gets_most_held_out_images_right(results, trained, monkeypatch):
    found = results("soft", "--tune_lr", rows="syn", lr_grid="0.0001,0.05,0.1,10")
    tuning = {case.lr: (evaluation, case) for evaluation, case in trained if len(evaluation.test_images) == K}
    got = {lr: evaluation.run([case], 1)[0].mean for lr, (evaluation, case) in tuning.items()}
    assert len(got) == 4 and len(set(got.values())) > 1
    assert found["results"][1]["lr"] == max(got, key=lambda lr: (got[lr], -lr))


def test_a_tuned_rate_that_is_the_sets_own_is_trained_once(results, trained):
    found = results("soft", "--tune_lr", rows="syn", lr_grid="0.05000000074505806")
    first, second = found["results"]
    assert first["accuracies"] == second["accuracies"] and len(trained) == 1 + 2


def test_held_out_images():
    classes = [torch.arange(0, 10), torch.arange(10, 30)]
    held, left = held_out(classes, 0.1, 0, ipc=1)
    assert len(held) == 3 and sorted([*held.tolist(), *left.tolist()]) == list(range(30))
    assert (held < 10).sum() == 1 and not held_out(classes, 0.1, 1, ipc=1)[0].equal(held)
    for share, ipc, said in ((0.05, 1, "of the 10 images of class 0 are none"), (0.5, 6, "leaves 5 images of class 0")):
        with pytest.raises(InputError, match=said):
            held_out(classes, share, 0, ipc)


# ---- the whole training set


def test_networks_on_the_whole_set_are_trained_once_for_all_sets(results, trained, tmp_path):
    first = results("soft", rows="full")
    assert sum(case.epochs is not None for _, case in trained) == 2
    trained.clear()
    second = results("hard", "--overwrite", rows="full,random", epoch_eval_train=1)
    assert not [case for _, case in trained if case.epochs is not None]
    of = [next(e for e in found["results"] if e["row"] == "full") for found in (first, second)]
    assert of[0] == of[1]
    results("hard", "--overwrite", rows="full", full_epochs=3)
    results("hard", "--overwrite", rows="full", full_lr=0.02)
    assert len([case for _, case in trained if case.epochs is not None]) == 4
    assert [path.name for path in (tmp_path / "whole").iterdir()] == ["accuracies-0"]


def test_what_the_whole_set_scores_is_of_the_test_images_too(place, results, trained, tmp_path):
    first = results("hard", rows="full")["results"][1]
    shutil.copytree(place / "images", tmp_path / "images")
    (tmp_path / "images" / "test" / "ant" / "00.png").unlink()
    trained.clear()
    assert results("hard", "--overwrite", rows="full", data_path=tmp_path / "images")["results"][1] != first
    assert len([case for _, case in trained if case.epochs is not None]) == 2


def test_a_stopped_evaluation_goes_on_with_what_the_whole_set_has_trained(argv, results, trained, monkeypatch):
    whole = results("soft", rows="full,random", num_eval=3)
    for path in (Path(argv("soft")[-1]), *Path(argv("soft")[argv("soft").index("--full_path") + 1]).iterdir()):
        path.unlink(missing_ok=True)
    count = []
    train = Evaluation.train

    def stopping(self, *args, **more):
        for so_far in train(self, *args, **more):
            yield so_far
            count.append(so_far.n)
            if len(count) == 2:
                signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Evaluation, "train", stopping)
        assert cli.evaluate(argv("soft", "--overwrite", rows="full,random", num_eval=3)) == 130
    trained.clear()
    assert results("soft", "--overwrite", rows="full,random", num_eval=3) == whole
    assert sum(case.epochs is not None for _, case in trained) == 1


# ---- bad input


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"rows": "syn,hrading"}, ("hrading", "Herding")),
        ({"rows": "random_soft", "buffer_path": "none"}, ("random_soft", "--buffer_path")),
        ({"rows": "all", "buffer_path": "none"}, ("random_soft", "--buffer_path")),
        ({"rows": "syn_plain", "dsa": False}, ("syn_plain", "dsa")),
        ({"rows": "random", "metrics": "lrs"}, ("lrs needs full, syn_hard, random_soft", "--rows all")),
        ({"metrics": "lrz"}, ("lrz", "hlr, ior, lrs, ars")),
        ({"rows": "all", "metrics": "ars", "dsa": False}, ("ars needs syn_plain, random_plain",)),
        ({"rows": "all,syn_plain", "dsa": False}, ("syn_plain", "dsa")),
        ({"tune_lr": True, "lr_grid": "0.1,fast"}, ("lr_grid", "fast")),
        ({"tune_lr": True, "lr_grid": ","}, ("lr_grid",)),
        ({"tune_lr": True, "lr_grid": "0.1,-1"}, ("lr_grid", "-1")),
        ({"tune_lr": True, "held_out": 0.05}, ("held_out", "class 0")),
        ({"tune_lr": True, "held_out": 0.95}, ("held_out", "ipc is 2")),
    ],
)
def test_what_cannot_be_had_is_refused_before_any_training(argv, trained, capfd, tmp_path, settings, words):
    assert_refused(capfd, cli.evaluate, argv("soft", **settings), words, tmp_path)
    assert trained == []


def test_weak_experts_leave_rows_out_and_the_scores_that_need_them(place, results, tmp_path):
    """A row whose labels cannot be had is left out with a line, and so are the scores made of it."""
    weak = tmp_path / "weak"
    here = {"data_path": place / "images", "ranking_path": place / "rankings", "buffer_path": weak}
    curriculum = {"rm_epoch_first": 1, "rm_epoch_second": 2, "num_experts": 1, "batch_train": 6}
    assert cli.buffer(command_line(**DATA | here | EXPERTS | curriculum | {"lr_teacher": 1e-9})) == 0
    [folder] = {path.parent for path in weak.rglob("expert_*.safetensors")}
    assert TrajectoryStore.open(folder).experts
    found = results("soft", rows="all", buffer_path=weak)
    assert [entry["row"] for entry in found["results"]] == [
        name for name in ALL if name not in ("random_soft", "random_plain")
    ]
    assert set(found["metrics"]) == {"hlr"} and math.isfinite(found["metrics"]["hlr"]["mean"])


def test_a_row_that_cannot_be_tuned_has_its_own_rate_and_scores_are_of_one_kind(results, monkeypatch):
    """Experts may be right about enough images in all, not of those left: nothing is compared across rates."""
    make = Rows.make
    weak = WeakExperts("the experts are too weak")

    def making(self, name):
        row = make(self, name)
        return dataclasses.replace(row, sets=raising) if self.left is not None and "random" in name else row

    def raising(j):
        raise weak

    monkeypatch.setattr(Rows, "make", making)
    found = results("soft", "--tune_lr", rows="syn,syn_hard,random_soft,full", lr_grid="0.001", num_eval=1)
    entries = {(entry["row"], entry["tuned"]): entry["mean"] for entry in found["results"]}
    assert ("random_soft", True) not in entries and ("syn", True) in entries
    assert found["metrics"]["ior"]["mean"] == pytest.approx(entries["syn", False] - entries["random_soft", False])
    assert found["metrics"]["hlr"]["mean"] == pytest.approx(entries["full", True] - entries["syn_hard", True])


def test_a_protocols_rate_holds_for_the_whole_set_too(results):
    assert results("hard", rows="full", protocol="dm", epoch_eval_train=1, num_eval=1)["results"][1]["lr"] == 0.01
    said = results("hard", "--overwrite", rows="full", protocol="ncfm", epoch_eval_train=1, num_eval=1)
    assert said["results"][1]["lr"] == 0.001 and said["settings"]["full_lr"] == 0.001
    said = results("hard", "--overwrite", rows="full", protocol="ncfm", epoch_eval_train=1, num_eval=1, full_lr=0.01)
    assert said["results"][1]["lr"] == 0.01


def test_a_last_batch_of_one_image_is_refused_where_a_network_has_no_statistics_of_it(argv, trained, capfd, tmp_path):
    net = tmp_path / "net.py"
    net.write_text(
        "from torch import nn\n\n\ndef norm(channels, classes, size):\n"
        "    body = nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(channels), nn.Flatten()\n"
        "    return nn.Sequential(*body, nn.Linear(channels, classes))\n"
    )
    words = ("batch_train: of 6 images the last batch of 5 has one", "net.py:norm@")
    assert_refused(capfd, cli.evaluate, argv("hard", networks=f"{net}:norm", batch_train=5), words, tmp_path)
    assert trained == []


def test_a_network_of_the_same_name_that_is_made_of_something_else_is_trained_anew(results, trained, monkeypatch):
    results("hard", rows="full", num_eval=1)
    convnet = FAMILIES["ConvNet"]
    monkeypatch.setitem(FAMILIES, MODEL, lambda name, channels, size: convnet("ConvNetD1W16", channels, size))
    trained.clear()
    results("hard", "--overwrite", rows="full", num_eval=1)
    assert len([case for _, case in trained if case.epochs is not None]) == 1


# ---- sets whose classes have different numbers of images


def test_real_images_are_as_many_of_each_class_as_the_set_has(argv, place, tmp_path, monkeypatch):
    whole = SyntheticSet.load(place / "soft.safetensors")
    chosen = torch.tensor([0, 2, 3, 5])  # one of class 0, two of class 1, one of class 2
    made = whole.images[chosen], whole.labels[chosen], whole.lr, whole.classes[chosen], whole.metadata
    SyntheticSet(*made, stored_pixels=whole.pixels()[chosen]).save(tmp_path / "uneven.safetensors")
    seen, run = [], Evaluation.run

    def watched(self, cases, *args, **more):
        seen.extend(case.training_set(0) for case in cases)
        return run(self, cases, *args, **more)

    monkeypatch.setattr(Evaluation, "run", watched)
    asked = {"synthetic": tmp_path / "uneven.safetensors", "rows": "syn,syn_hard,random,random_soft,EL2N"}
    asked |= {"score_repeats": 1, "score_epochs": 1}
    assert cli.evaluate(argv("soft", **asked)) == 0
    results = json.loads((tmp_path / "out.json").read_text())
    assert results["images_of_each_class"] == [1, 2, 1] and len(results["results"]) == len(seen) == 5
    data = load_data("ImageFolder", place / "images")
    real = fit_preprocessing(data, False).apply(data.train_images)
    known = {image.numpy().tobytes(): c for image, c in zip(real, data.train_labels.tolist())}
    for i, (images, targets) in enumerate(seen):
        assert len(images) == 4
        if i != 0 and i != 3:  # soft labels are of any class
            assert targets.argmax(1).tolist() == [0, 1, 1, 2]
        if i > 1:
            assert [known[image.numpy().tobytes()] for image in images] == [0, 1, 1, 2]
