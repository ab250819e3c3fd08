import dataclasses
import logging
import multiprocessing
import os
import time
from pathlib import Path

import pytest
import torch
from helpers import files_in

from pad import cli
from pad.data.images import ImageData
from pad.difficulty.methods import METHODS, Method, RankingSource, score_images
from pad.difficulty.obtain import obtain_rankings, ranking_file
from pad.difficulty.ranking import Ranking, read_published
from pad.difficulty.training import ScoringSettings, ScoringTraining
from pad.errors import InputError
from pad.store.locks import in_turn
from pad.store.tensors import save_tensors

LABELS = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2])
ROWS = [torch.tensor([9, 0, 6, 3]), torch.tensor([1, 4, 7, 10]), torch.tensor([11, 8, 5, 2])]
SCORING = ScoringSettings("ConvNetD1W8", repeats=1, epochs=1, lr=0.05)
MEANSTD = {"kind": "meanstd", "digest": "d"}


def make_data(name="CIFAR10", labels=LABELS, seed=0):
    rng = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (len(labels), 3, 8, 8), dtype=torch.uint8, generator=rng)
    classes = tuple(f"c{c}" for c in range(int(labels.max()) + 1))
    return ImageData(
        name=name,
        train_images=images,
        train_labels=labels,
        test_images=images[:1],
        test_labels=labels[:1],
        class_names=classes,
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
    )


def obtain_all(data, sort_methods, folder, scoring=SCORING, seed=0, preprocessing=MEANSTD, **options):
    source = RankingSource(
        data=data,
        images=data.train_images.float() / 255,
        labels=data.train_labels,
        preprocessing=preprocessing,
        scoring=scoring,
        seed=seed,
    )
    return obtain_rankings(source, sort_methods, folder, **options)


def obtain(data, sort_method, folder, *args, **options):
    found = obtain_all(data, [sort_method], folder, *args, **options)
    assert list(found) == [sort_method]
    return found[sort_method]


def assert_rows(ranking, rows):
    assert len(ranking.rows) == len(rows)
    for ours, expected in zip(ranking.rows, rows):
        assert ours.dtype == torch.int64
        assert ours.tolist() == expected.tolist()


# ----------------------------------------------------------------------------------------------- from scores


def test_low_scores_come_first_and_ties_stay_in_order():
    labels = torch.tensor([1, 0, 1, 1, 0, 2, 1])
    scores = torch.tensor([0.5, 2.0, 0.5, 0.1, -1.0, 9.0, 0.5])
    ranking = Ranking.from_scores(scores, labels, 3, {"method": "GraNd"})
    assert [row.tolist() for row in ranking.rows] == [[4, 1], [3, 0, 2, 6], [5]]
    assert torch.equal(ranking.scores, scores.double())
    ranking.validate(labels, 3, "it")


def test_many_ties_are_stable():
    labels = torch.arange(4000) % 2
    ranking = Ranking.from_scores(torch.zeros(4000), labels, 2, {})
    assert_rows(ranking, [torch.arange(0, 4000, 2), torch.arange(1, 4000, 2)])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_scores_must_be_finite(bad):
    with pytest.raises(InputError, match="score of image 2 is"):
        Ranking.from_scores(torch.tensor([0.0, 1.0, bad]), torch.tensor([0, 1, 0]), 2, {})


def test_every_class_needs_an_image_and_every_image_a_score():
    with pytest.raises(InputError, match="class 1 has no images"):
        Ranking.from_scores(torch.zeros(3), torch.tensor([0, 2, 0]), 3, {})
    with pytest.raises(InputError, match="3 difficulty scores were given for 2 images"):
        Ranking.from_scores(torch.zeros(3), torch.tensor([0, 1]), 2, {})


# ------------------------------------------------------------------------------------------------ validation


def test_a_ranking_of_this_data_set_is_accepted():
    Ranking(ROWS, None, {}).validate(LABELS, 3, "it")


def change(c, i, value):
    rows = [row.clone() for row in ROWS]
    rows[c][i] = value
    return rows


@pytest.mark.parametrize(
    "rows, message",
    [
        (ROWS[:2], "it is a ranking of 8 images in 2 classes, but this data set has 12 images in 3 classes"),
        ([*ROWS[:2], ROWS[2][:3]], "it is a ranking of 11 images in 3 classes"),
        ([ROWS[0], torch.cat(ROWS[1:])], "it is a ranking of 12 images in 2 classes"),
        (change(1, 2, 12), "it ranks an image 12, but this data set has images 0 to 11"),
        (change(1, 2, -1), "it ranks an image -1"),
        (change(2, 0, 8), "it ranks image 8 2 times"),
        ([ROWS[1], ROWS[0], ROWS[2]], r"row 0 of it holds images of class 1 \(such as image 1\)"),
        ([ROWS[0], torch.cat([ROWS[1], ROWS[2][:1]]), ROWS[2][1:]], r"row 1 of it .* class 2 \(such as image 11\)"),
    ],
)
def test_a_ranking_of_other_data_is_refused(rows, message):
    with pytest.raises(InputError, match=message):
        Ranking(rows, None, {}).validate(LABELS, 3, "it")


# ------------------------------------------------------------------------------------------------- own form


@pytest.mark.parametrize("scores", [None, torch.arange(7, dtype=torch.float64) / 3])
def test_own_form_keeps_ragged_rows_scores_and_metadata(tmp_path, scores):
    rows = [torch.tensor([6]), torch.tensor([2, 0, 5, 1]), torch.tensor([4, 3])]
    Ranking(rows, scores, {"method": "GraNd", "settings": {"lr": 0.1}}).save(tmp_path / "r.safetensors")
    loaded = Ranking.load(tmp_path / "r.safetensors")
    assert_rows(loaded, rows)
    assert loaded.scores is None if scores is None else torch.equal(loaded.scores, scores)
    assert loaded.metadata["method"] == "GraNd" and loaded.metadata["settings"] == {"lr": 0.1}
    assert loaded.metadata["kind"] == "ranking"
    loaded.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "r.safetensors").read_bytes()
    assert len(list(tmp_path.iterdir())) == 2


def test_own_form_that_is_not_whole_is_refused(tmp_path):
    path = tmp_path / "r.safetensors"
    with pytest.raises(InputError, match="r.safetensors does not exist"):
        Ranking.load(path)
    good = {"indices": torch.arange(4), "lengths": torch.tensor([1, 3])}
    about = {"kind": "ranking", "format": 1}
    damaged = [
        {"indices": torch.arange(4)},
        {"lengths": torch.tensor([1, 3])},
        good | {"lengths": torch.tensor([1, 2])},
        good | {"lengths": torch.tensor([5, -1])},
        good | {"lengths": torch.tensor([1.0, 3.0])},
        good | {"indices": torch.arange(4).view(2, 2)},
        good | {"indices": torch.arange(4.0)},
        good | {"scores": torch.zeros(3)},
        good | {"scores": torch.tensor([0, 1, float("nan"), 2])},
        {"indices": torch.arange(0), "lengths": torch.arange(0)},
    ]
    for tensors in damaged:
        save_tensors(path, tensors, about)
        with pytest.raises(InputError, match="r.safetensors is damaged"):
            Ranking.load(path)
    save_tensors(path, good, about)
    assert_rows(Ranking.load(path), [torch.arange(1), torch.arange(1, 4)])
    save_tensors(path, good, about | {"kind": "trajectory"})
    with pytest.raises(InputError, match="r.safetensors is not a ranking"):
        Ranking.load(path)
    save_tensors(path, good, about | {"format": 2})
    with pytest.raises(InputError, match="format 2"):
        Ranking.load(path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(InputError, match="r.safetensors is not a whole"):
        Ranking.load(path)


# -------------------------------------------------------------------------------------------- published form


def test_published_form_is_a_bare_tensor(tmp_path):
    path = tmp_path / "CIFAR10_GraNd.pt"
    Ranking(ROWS, None, {}).write_published(path)
    bare = torch.load(path, weights_only=True)
    assert bare.dtype == torch.int64 and torch.equal(bare, torch.stack(ROWS))
    assert_rows(read_published(path, LABELS, 3), ROWS)
    assert [p.name for p in tmp_path.iterdir()] == ["CIFAR10_GraNd.pt"]


def test_published_form_needs_equal_classes(tmp_path):
    path = tmp_path / "x.pt"
    with pytest.raises(InputError, match="x.pt cannot be written.*1 to 3 images"):
        Ranking([torch.arange(1), torch.arange(1, 4)], None, {}).write_published(path)
    assert not path.exists()


def test_a_flat_list_is_refused_or_turned_round(tmp_path):
    path = tmp_path / "CIFAR10_ConvNet.pt"
    labels = torch.tensor([0, 1, 0, 1, 1])
    torch.save(torch.tensor([4, 2, 1, 0, 3]), path)
    with pytest.raises(InputError, match="CIFAR10_ConvNet.pt is one flat list of 5 images, hardest first"):
        read_published(path, labels, 2)
    assert_rows(read_published(path, labels, 2, convert_flat=True), [torch.tensor([0, 2]), torch.tensor([3, 1, 4])])
    for wrong in ([4, 2, 1, 0], [4, 2, 1, 0, 0], [4, 2, 1, 0, 5]):
        torch.save(torch.tensor(wrong), path)
        with pytest.raises(InputError, match="CIFAR10_ConvNet.pt does not list each of this data set's 5 images once"):
            read_published(path, labels, 2, convert_flat=True)


def test_a_flat_file_serves_stage_one_when_asked_for(tmp_path):
    torch.save(torch.cat(ROWS).flip(0), tmp_path / "CIFAR10_ConvNet.pt")
    with pytest.raises(InputError, match="--convert_flat"):
        obtain(make_data(), "CIFAR10_ConvNet", tmp_path)
    assert_rows(obtain(make_data(), "CIFAR10_ConvNet", tmp_path, convert_flat=True), ROWS)


@pytest.mark.filterwarnings("ignore:Validating sparse")
@pytest.mark.parametrize(
    "value, message",
    [
        ([1, 2], "holds a list, not a tensor"),
        (torch.stack(ROWS).float(), "holds a torch.float32 tensor"),
        (torch.stack(ROWS).to(torch.int32), "holds a torch.int32 tensor"),
        (torch.stack(ROWS)[None], r"of shape \[1, 3, 4\]"),
        (torch.tensor(3), r"of shape \[\]"),
        (torch.empty(0, 4, dtype=torch.int64), r"of shape \[0, 4\]"),
        (torch.stack(ROWS).to_sparse(), "int64 image indices"),
        (torch.stack(ROWS).flip(0), "row 0 of .*x.pt holds images of class 2"),
        (torch.arange(500).view(10, 50), "x.pt is a ranking of 500 images in 10 classes, but this data set has 12"),
    ],
)
def test_other_published_files_are_refused(tmp_path, value, message):
    torch.save(value, tmp_path / "x.pt")
    with pytest.raises(InputError, match=message) as error:
        read_published(tmp_path / "x.pt", LABELS, 3)
    assert "x.pt" in str(error.value)


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_published_file_never_runs_code(tmp_path):
    torch.save(Malicious(tmp_path / "it_ran"), tmp_path / "x.pt")
    with pytest.raises(InputError, match="x.pt holds more than tensors"):
        read_published(tmp_path / "x.pt", LABELS, 3)
    assert not (tmp_path / "it_ran").exists()
    (tmp_path / "x.pt").write_bytes(b"not a torch file")
    with pytest.raises(InputError, match="x.pt"):
        read_published(tmp_path / "x.pt", LABELS, 3)


# --------------------------------------------------------------------------------------------------- the name


@pytest.mark.parametrize(
    "dataset, sort_method, stem",
    [
        ("CIFAR10", "GraNd", "CIFAR10_GraNd"),
        ("CIFAR10", "CIFAR10_EL2N", "CIFAR10_EL2N"),
        ("CIFAR100", "CIFAR100_GraNd", "CIFAR100_GraNd"),
        ("Tiny", "GraNd", "TinyImageNet_GraNd"),
        ("Tiny", "Tiny_GraNd", "TinyImageNet_GraNd"),
        ("Tiny", "TinyImageNet_GraNd", "TinyImageNet_GraNd"),
        ("ImageNet/imagenette", "GraNd", "ImageNet-imagenette_GraNd"),
        ("ImageNet/imagenette", "ImageNet-imagenette_GraNd", "ImageNet-imagenette_GraNd"),
        ("CIFAR10", "Submodular-GraphCut", "CIFAR10_Submodular-GraphCut"),
        ("CIFAR10", "CIFAR10_Submodular-GraphCut", "CIFAR10_Submodular-GraphCut"),
        ("ImageNet/imagenette", "ImageNet-imagenette_Uncertainty-Margin", "ImageNet-imagenette_Uncertainty-Margin"),
    ],
)
def test_the_file_of_a_sort_method(dataset, sort_method, stem):
    assert ranking_file("folder", dataset, sort_method) == Path("folder") / stem


@pytest.mark.parametrize(
    "dataset, sort_method, message",
    [
        ("CIFAR10", "CIFAR100_GraNd", "of CIFAR100, but the data set is CIFAR10: write GraNd or CIFAR10_GraNd"),
        ("CIFAR100", "CIFAR10_GraNd", "a ranking of CIFAR10, but the data set is CIFAR100"),
        ("ImageNet/imagenette", "ImageNet-imagewoof_GraNd", "ImageNet-imagewoof.*or ImageNet-imagenette_GraNd"),
        ("CIFAR10", "grand", "'grand' is not a method that can be computed .the nearest is GraNd"),
        ("CIFAR10", "CIFAR10_EL2", "nearest is EL2N.*no ranking .*CIFAR10_EL2.pt"),
        ("CIFAR10", "GraphCut", "nearest is Submodular-GraphCut"),
        ("CIFAR10", "", "sort_method"),
    ],
)
def test_a_sort_method_that_cannot_be_is_refused(tmp_path, dataset, sort_method, message):
    with pytest.raises(InputError, match=message):
        ranking_file(tmp_path, dataset, sort_method)


def test_a_method_that_cannot_be_computed_is_read_from_its_file(tmp_path):
    data = make_data()
    with pytest.raises(InputError, match="Uncertainty"):
        obtain(data, "CIFAR10_Uncertainty", tmp_path)
    Ranking(ROWS, None, {}).write_published(tmp_path / "CIFAR10_Uncertainty.pt")
    assert ranking_file(tmp_path, "CIFAR10", "Uncertainty") == tmp_path / "CIFAR10_Uncertainty"
    assert_rows(obtain(data, "CIFAR10_Uncertainty", tmp_path), ROWS)


# -------------------------------------------------------------------------------------------------- obtaining


def test_a_ranking_is_computed_written_and_reused(tmp_path, caplog):
    caplog.set_level(logging.INFO, "pad")
    data, folder = make_data(), tmp_path / "new" / "folder"
    ranking = obtain(data, "GraNd", folder)
    expected = score_images(["GraNd"], ScoringTraining(data.train_images.float() / 255, LABELS, 3, SCORING, 0)).scores[
        "GraNd"
    ]
    assert torch.equal(ranking.scores, expected)
    for c, row in enumerate(ranking.rows):
        assert sorted(row.tolist()) == (LABELS == c).nonzero().flatten().tolist()
        assert (expected[row].diff() >= 0).all()
    ours, published = folder / "CIFAR10_GraNd.safetensors", folder / "CIFAR10_GraNd.pt"
    assert sorted(folder.iterdir()) == [published, ours]
    assert len(caplog.records) == 1
    assert str(ours) in caplog.text and str(published) in caplog.text and "wrote" in caplog.text
    assert_rows(read_published(published, LABELS, 3), ranking.rows)
    assert ranking.metadata["data"] == data.identity and ranking.metadata["settings"]["model"] == "ConvNetD1W8"
    assert ranking.metadata["method"] == "GraNd" and ranking.metadata["ranked_by"] == "score"

    written = ours.read_bytes()
    Ranking(ROWS, None, {}).write_published(published)  # ours goes first, and nothing is written again
    caplog.clear()
    assert_rows(obtain(data, "CIFAR10_GraNd", folder), ranking.rows)
    assert ours.read_bytes() == written
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [("INFO", f"difficulty ranking: using {ours}")]

    ours.unlink()
    caplog.clear()
    assert_rows(obtain(data, "GraNd", folder), ROWS)
    assert [r.getMessage() for r in caplog.records] == [f"difficulty ranking: using {published}"]
    assert not ours.exists()


def test_other_settings_are_reused_with_one_warning(tmp_path, caplog):
    data = make_data()
    first = obtain(data, "EL2N", tmp_path)
    caplog.clear()
    other = ScoringSettings("ConvNetD1W8", repeats=3, epochs=1, lr=0.05)
    again = obtain(data, "EL2N", tmp_path, other, seed=7, preprocessing={"kind": "zca", "digest": "e"})
    assert_rows(again, first.rows)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    message = caplog.records[0].getMessage()
    assert "CIFAR10_EL2N.safetensors" in message and "\n" not in message
    for difference in ("repeats 1 (now 3)", "seed 0 (now 7)", "preprocessing meanstd (now zca)"):
        assert difference in message
    assert "epochs" not in message and "lr" not in message


def test_another_methods_ranking_under_this_name_is_refused(tmp_path):
    data = make_data()
    obtain(data, "EL2N", tmp_path)
    (tmp_path / "CIFAR10_EL2N.safetensors").rename(tmp_path / "CIFAR10_Forgetting.safetensors")
    with pytest.raises(InputError, match="method: EL2N in the ranking, Forgetting in the settings"):
        obtain(data, "Forgetting", tmp_path)


def test_a_ranking_made_with_other_settings_than_asked_for_is_refused(tmp_path):
    data, more = make_data(), dataclasses.replace(SCORING, repeats=SCORING.repeats + 1)
    first = obtain(data, "EL2N", tmp_path)
    assert_rows(obtain(data, "EL2N", tmp_path, more, asked={"epochs", "model"}), first.rows)
    with pytest.raises(InputError, match=f"repeats: {SCORING.repeats} in the ranking, {more.repeats} in the settings"):
        obtain(data, "EL2N", tmp_path, more, asked={"repeats"})


def test_settings_that_a_method_does_not_use_are_no_difference(tmp_path, caplog):
    data = make_data()
    obtain_all(data, ["Herding", "Uniform"], tmp_path)
    caplog.clear()
    other = ScoringSettings("ConvNetD1W8", repeats=3, epochs=1, lr=0.05)
    obtain(data, "Herding", tmp_path, other)
    obtain(data, "Uniform", tmp_path, ScoringSettings("MLP"), preprocessing={"kind": "zca", "digest": "e"})
    assert caplog.records == []
    obtain(data, "Herding", tmp_path, ScoringSettings("MLP", epochs=1, lr=0.05))
    obtain(data, "Uniform", tmp_path, seed=1)
    assert ["model ConvNetD1W8 (now MLP);" in caplog.text, "seed 0 (now 1);" in caplog.text] == [True, True]


def test_methods_that_are_missing_share_a_training_and_the_others_are_read(tmp_path):
    data = make_data()
    alone = {name: obtain(data, name, tmp_path / "alone" / name) for name in METHODS}
    obtain(data, "Craig", tmp_path)
    before = (tmp_path / "CIFAR10_Craig.safetensors").stat().st_mtime_ns
    trained = []
    wanted = ["CIFAR10_CAL", "Herding", "Craig", "CAL", "CIFAR10_Submodular-GraphCut"]
    found = obtain_all(data, wanted, tmp_path, progress=lambda *at: trained.append(at))
    assert list(found) == wanted and trained == [(0, 0)]
    for name in wanted:
        assert_rows(found[name], alone[name.removeprefix("CIFAR10_")].rows)
    assert (tmp_path / "CIFAR10_Craig.safetensors").stat().st_mtime_ns == before
    names = {"Craig", "CAL", "Herding", "Submodular-GraphCut"}
    assert {path.name for path in tmp_path.iterdir()} == {"alone"} | {
        f"CIFAR10_{name}.{suffix}" for name in names for suffix in ("pt", "safetensors")
    }
    for name in names:
        file = f"CIFAR10_{name}.safetensors"
        assert (tmp_path / file).read_bytes() == (tmp_path / "alone" / name / file).read_bytes()


def test_what_is_there_is_computed_anew_when_asked(tmp_path):
    data = make_data()
    Ranking(ROWS, None, {}).write_published(tmp_path / "CIFAR10_GraNd.pt")
    Ranking(ROWS, None, {}).save(tmp_path / "CIFAR10_EL2N.safetensors")
    expected = obtain_all(data, ["GraNd", "EL2N"], tmp_path / "new")
    for name, ranking in obtain_all(data, ["GraNd", "EL2N"], tmp_path, overwrite=True).items():
        assert_rows(ranking, expected[name].rows)
        assert_rows(read_published(tmp_path / f"CIFAR10_{name}.pt", LABELS, 3), expected[name].rows)
        assert_rows(Ranking.load(tmp_path / f"CIFAR10_{name}.safetensors"), expected[name].rows)
    Ranking(ROWS, None, {}).write_published(tmp_path / "CIFAR10_Mine.pt")
    with pytest.raises(InputError, match="there is no difficulty method 'Mine'"):
        obtain(data, "Mine", tmp_path, overwrite=True)


def small(evidence):
    return evidence.logits.double().square().sum(dim=1)


class Watched:
    """How large the logits of an image were in training, in sum."""

    def __init__(self, labels):
        self.total = torch.zeros(len(labels), dtype=torch.float64)

    def __call__(self, indices, logits):
        self.total[indices] += logits.abs().sum(dim=1)

    def scores(self, epochs):
        return self.total / epochs


OF_ONES_OWN = {
    "Mine_small": Method(kind="score", summary="small logits", needs="evidence", compute=small),
    "Mine.bright": Method(
        kind="score", summary="bright", needs="network", compute=lambda network, images, _: network(images).sum(dim=1)
    ),
    "Mine-watched": Method(kind="score", summary="small in training", needs="training", compute=Watched),
    "Mine": Method(
        kind="order", summary="small logits", needs="evidence", compute=lambda evidence, rng: small(evidence).argsort()
    ),
    "Mine_drawn": Method(
        kind="order",
        summary="any",
        needs="nothing",
        compute=lambda evidence, rng: torch.randperm(len(evidence), generator=rng),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OF_ONES_OWN)
def test_a_method_of_ones_own_is_one_line(tmp_path, monkeypatch, capsys, name):
    """Put into METHODS from outside, it is scored, drawn, sorted by in stage 1 and chosen coresets by."""
    monkeypatch.setitem(METHODS, name, OF_ONES_OWN[name])
    data = ["--dataset", "FashionMNISTMini", "--train_per_class", "6", "--model", "ConvNetD1W8"]
    scoring = ["repeats", "1", "epochs", "1", "lr", "0.05", "batch", "30"]
    flags = [f"--{word}" if i % 2 == 0 else word for i, word in enumerate(scoring)]
    assert cli.score([*data, *flags, "--methods", f"GraNd,{name}", "--out", str(tmp_path), "--plot"]) == 0
    assert f"\n{name} " in capsys.readouterr().out
    stem = tmp_path / f"FashionMNISTMini_{name}"
    ranking = Ranking.load(f"{stem}.safetensors")
    assert Path(f"{stem}.pt").is_file() and (tmp_path / "plots_FashionMNISTMini" / f"images_{name}.png").is_file()
    assert (ranking.scores is not None) == (tmp_path / "plots_FashionMNISTMini" / f"scores_{name}.png").is_file()
    assert ranking.metadata["ranked_by"] == METHODS[name].kind
    everything = {*vars(SCORING), "seed", "preprocessing"}
    recorded = {"Mine": everything - {"repeats"}, "Mine_drawn": {"seed"}}.get(name, everything)
    assert ranking.metadata["settings"].keys() == recorded
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}

    rankings = ["--ranking_path", str(tmp_path)]
    core = ["--ipc", "2", "--out", str(tmp_path / "coreset")]
    assert cli.coreset([*data, *rankings, *core, "--method", f"FashionMNISTMini_{name}"]) == 0
    experts = ["--num_experts", "1", "--train_epochs", "1", "--add_end_epoch", "1", "--init_ratio", "0.5"]
    experts += ["--batch_train", "30", "--rho_max", "0.01", "--rho_min", "0.01", "--compile", "off"]
    experts += ["--buffer_path", str(tmp_path / "buffer"), "--sort_method", name]
    assert cli.buffer([*data, *rankings, *experts]) == 0
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}


@pytest.mark.parametrize("kind, needs", [("order", "network"), ("order", "training"), ("score", "nothing")])
def test_a_method_that_could_not_be_computed_cannot_be_made(kind, needs):
    with pytest.raises(ValueError, match=f"of kind {kind} cannot need {needs}"):
        Method(kind=kind, summary="", needs=needs, compute=small)


class Stop(Exception):
    pass


def test_an_interrupted_run_leaves_no_ranking_and_goes_on(tmp_path):
    data, names = make_data(), ["GraNd", "Forgetting", "Herding"]
    scoring = ScoringSettings("ConvNetD1W8", repeats=2, epochs=2, lr=0.05)
    whole = tmp_path / "whole"
    obtain_all(data, names, whole, scoring)
    folder = tmp_path / "interrupted"

    def progress(*at):
        trained.append(at)
        if at == stop:
            raise Stop

    trained, stop = [], (1, 0)
    with pytest.raises(Stop):
        obtain_all(data, names, folder, scoring, progress=progress)
    assert [path.name for path in folder.iterdir()] == ["CIFAR10.partial"]
    trained, stop = [], None
    obtain_all(data, names, folder, scoring, progress=progress)
    assert trained == [(1, 0), (1, 1)]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        path.name: path.read_bytes() for path in whole.iterdir()
    }


def test_networks_are_kept_until_all_that_they_were_to_serve_is_there(tmp_path):
    """Commands that others gave in the meantime leave them, whether they find their rankings or compute them."""
    data, scoring = make_data(), ScoringSettings("ConvNetD1W8", repeats=2, epochs=1, lr=0.05)
    names, orders = ["Forgetting", "EL2N"], ["Herding", "Craig"]
    expected = obtain_all(data, [*names, *orders], tmp_path / "whole", scoring)
    folder = tmp_path / "interrupted"
    obtain(data, "GraNd", folder, scoring)
    trained, kept = [], folder / "CIFAR10.partial"

    def progress(*at):
        trained.append(at)
        if at == (1, 0) and stop:
            raise Stop

    stop = True
    with pytest.raises(Stop):
        obtain_all(data, [*names, *orders], folder, scoring, progress=progress)
    before = files_in(kept)
    assert len(before) == 1
    for of_others in ("GraNd", "Uniform", "Uniform", "Herding"):  # there, computed, there, computed from what is kept
        obtain(data, of_others, folder, scoring, progress=progress)
        assert files_in(kept) == before
    obtain(data, "CAL", folder, ScoringSettings("ConvNetD1W8", repeats=1, epochs=2, lr=0.05))
    assert files_in(kept) == before
    obtain(data, "Loss", folder, scoring)
    assert files_in(kept).keys() == before.keys(), "that of the second network served Loss alone"
    trained.clear()
    stop = False
    for name, ranking in obtain_all(data, [*names, *orders], folder, scoring, progress=progress).items():
        assert_rows(ranking, expected[name].rows)
    assert trained == [(1, 0)] and not kept.exists()


def test_classes_of_unequal_size_have_our_form_only(tmp_path):
    data = make_data("ImageFolder", torch.tensor([0, 0, 0, 1, 1, 1, 1, 2]))
    ranking = obtain(data, "GraNd", tmp_path)
    assert [len(row) for row in ranking.rows] == [3, 4, 1]
    assert [path.name for path in tmp_path.iterdir()] == ["ImageFolder_GraNd.safetensors"]
    assert_rows(obtain(data, "GraNd", tmp_path), ranking.rows)


def test_our_form_of_other_images_is_refused(tmp_path):
    obtain(make_data("ImageFolder"), "GraNd", tmp_path)
    with pytest.raises(
        InputError, match="GraNd.safetensors ranks other images: fingerprint: .* in the ranking, .* in the data set"
    ):
        obtain(make_data("ImageFolder", seed=1), "GraNd", tmp_path)  # same labels, other pixels


def test_a_file_that_does_not_fit_is_refused_before_any_work(tmp_path):
    data = make_data()
    torch.save(torch.arange(12).view(3, 4), tmp_path / "CIFAR10_GraNd.pt")
    with pytest.raises(InputError, match="row 0 of .*CIFAR10_GraNd.pt holds images of class 1"):
        obtain(data, "GraNd", tmp_path)
    Ranking(ROWS[:2], None, {}).save(tmp_path / "CIFAR10_EL2N.safetensors")
    with pytest.raises(InputError, match="CIFAR10_EL2N.safetensors is a ranking of 8 images"):
        obtain(data, "EL2N", tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["CIFAR10_EL2N.safetensors", "CIFAR10_GraNd.pt"]
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="nothing can be written to .*file: .*file is not a folder"):
        obtain(data, "GraNd", tmp_path / "file")


def test_a_second_process_waits_for_the_first_and_reads_its_rankings(tmp_path, monkeypatch):
    """The second is a forked process that must not compute; the first is this one, in the middle of its work."""
    data, waiting = make_data(), tmp_path / "waiting"
    expected = obtain(data, "EL2N", tmp_path / "elsewhere")

    def second():
        begin.wait(30)
        monkeypatch.setattr("pad.difficulty.obtain.compute_rankings", lambda *_, **__: os._exit(3))
        monkeypatch.setattr(
            logging.getLogger("pad"), "info", lambda text, *_: text.startswith("waiting") and waiting.touch()
        )
        os._exit(0 if obtain(data, "EL2N", tmp_path).rows[0].tolist() == expected.rows[0].tolist() else 4)

    begin = multiprocessing.get_context("fork").Event()
    process = multiprocessing.get_context("fork").Process(target=second, daemon=True)
    process.start()  # before there is a lock, which it would have too
    with in_turn(tmp_path / ".CIFAR10.lock", "the rankings"):
        begin.set()
        deadline = time.monotonic() + 30
        while not waiting.exists() and process.is_alive() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert process.is_alive(), "it did not wait"
        for path in (tmp_path / "elsewhere").glob("CIFAR10_EL2N.*"):
            path.rename(tmp_path / path.name)
    process.join(30)
    assert process.exitcode == 0
