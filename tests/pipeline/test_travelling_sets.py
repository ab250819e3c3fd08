"""Sets that travel: out to other tools, in from the files of others, and as a start; by the commands alone."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import CHECKOUT, assert_refused, command_line, events_in, make_images, run_script
from PIL import Image

from pad import cli
from pad.data.preprocessing import fit_preprocessing
from pad.data.sources import load_data
from pad.exchange.writing import FORMS, eight_bits
from pad.labels import hard_logits
from pad.synthetic import SyntheticSet

K, IPC = 10, 5
MINI = {"dataset": "FashionMNISTMini", "model": "ConvNetD1W8"}
FOLDER = {"dataset": "ImageFolder", "zca": False, "model": "ConvNetD1W8"}


def blended(zca: bool, out: Path, noise: float = 0.03) -> Path:
    """A set of real images that are blends of two of a class, a little noisy, with soft labels; its file."""
    data = load_data("FashionMNISTMini", None)
    preprocessing = fit_preprocessing(data, zca)
    g = torch.Generator().manual_seed(3)
    rows = [(data.train_labels == c).nonzero().flatten()[: 2 * IPC] for c in range(K)]
    first, second = (torch.cat([row[half] for row in rows]) for half in (slice(0, IPC), slice(IPC, None)))
    pixels = 0.7 * data.train_images[first].float() / 255 + 0.3 * data.train_images[second].float() / 255
    pixels = (0.03 + 0.94 * pixels) + noise * torch.randn(pixels.shape, generator=g)
    classes = torch.arange(K).repeat_interleave(IPC)
    labels = 6 * F.one_hot(classes, K) + torch.randn(len(classes), K, generator=g)
    metadata = {
        "data": data.identity,
        "class_names": list(data.class_names),
        "model": "ConvNetD1W8",
        "seed": 0,
        "settings": {**MINI, "zca": zca, "subset": "imagenette", "res": None, "train_per_class": None, "lr_img": 3.0},
    }
    images = preprocessing.apply(pixels)
    SyntheticSet(images, labels, torch.tensor(0.02), classes, metadata, preprocessing=preprocessing).save(out)
    return out


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> dict[bool, Path]:
    """The files of a normalised and of a whitened set."""
    folder = tmp_path_factory.mktemp("sets")
    return {zca: blended(zca, folder / f"zca {zca}.safetensors") for zca in (False, True)}


def export(path: Path, to: str, out: Path) -> Path:
    assert cli.export_set(command_line(source=path, to=to, out=out)) == 0
    return out


def import_(source: Path, out: Path, *more: str, **settings) -> SyntheticSet:
    argv = command_line(*more, **({"source": source, "out": out} | settings))
    assert cli.import_set(argv) == 0
    return SyntheticSet.load(out)


# ---- the loops of others


def loader(form: str) -> str:
    """The lines of docs/FILES.md that read an export."""
    text = (CHECKOUT / "docs" / "FILES.md").read_text(encoding="utf-8").split("## A set for other tools")[1]
    return re.search(rf"^From `{form}`.*?```python\n(.*?)```", text, re.DOTALL | re.MULTILINE)[1]


def read_by_the_docs(form: str, folder: Path) -> tuple[torch.Tensor, torch.Tensor, float]:
    found: dict = {"folder": str(folder)}
    exec(loader(form), found)
    return found["images"], found["targets"], found["lr"]


def accuracies(images, targets, lr, networks: int = 4) -> np.ndarray:
    """Of plain torch networks trained by a plain torch loop, on the test images, in 0..1."""
    found, data = [], load_data("FashionMNISTMini", None)
    test, labels = (data.test_images.float() / 255 - data.mean[0]) / data.std[0], data.test_labels
    for seed in range(networks):
        torch.manual_seed(seed)
        net = torch.nn.Sequential(
            torch.nn.AvgPool2d(2),
            torch.nn.Conv2d(1, 8, 3, padding=1),
            torch.nn.InstanceNorm2d(8, affine=True),
            torch.nn.ReLU(),
            torch.nn.AvgPool2d(2),
            torch.nn.Flatten(),
            torch.nn.Linear(8 * 49, K),
        )
        optimiser = torch.optim.SGD(net.parameters(), lr, momentum=0.9)
        for _ in range(40):
            optimiser.zero_grad()
            F.cross_entropy(net(images), targets).backward()
            optimiser.step()
        with torch.no_grad():
            found.append((net.eval()(test).argmax(1) == labels).double().mean().item())
    return np.array(found)


@pytest.fixture(scope="module")
def ours(sets) -> np.ndarray:
    """What a plain loop learns from the set."""
    exact = SyntheticSet.load(sets[False])
    return accuracies(exact.images, exact.probabilities(), exact.lr.item())


@pytest.mark.parametrize("form", FORMS)
def test_a_plain_loop_learns_from_the_exported_files_alone_what_it_learns_from_the_set(form, sets, ours, tmp_path):
    """To the last bit where the form is exact; otherwise within the noise of the networks."""
    if form == "huggingface":
        pytest.importorskip("datasets")
    exact = SyntheticSet.load(sets[False])
    images, targets, lr = read_by_the_docs(form, export(sets[False], form, tmp_path / "out"))
    theirs = accuracies(images, targets, lr)
    assert ours.mean() > 0.5  # chance is 0.1: there is something to lose
    if form in ("npz", "published"):
        assert torch.equal(images, exact.images) and theirs.tolist() == ours.tolist()
    else:
        noise = np.sqrt((ours.var(ddof=1) + theirs.var(ddof=1)) / len(ours)) + 1e-3  # an image of the test
        assert abs(theirs.mean() - ours.mean()) < 2 * noise
    shuffled = targets[torch.randperm(len(targets), generator=torch.Generator().manual_seed(0))]
    assert accuracies(images, shuffled, lr, 1).mean() < ours.mean() - 0.2  # it could fail


def test_pictures_of_a_whitened_set_are_whitened_again_as_the_docs_say(sets, tmp_path):
    folder = export(sets[True], "png", tmp_path / "out")
    found: dict = {"folder": str(folder)}
    lines = loader("png").splitlines()
    exec("\n".join(line for line in lines if not line.startswith(("mean", "images"))), found)
    found["real"] = load_data("FashionMNISTMini", None).train_images.double() / 255
    text = (CHECKOUT / "docs" / "FILES.md").read_text(encoding="utf-8")
    exec(re.search(r"whitened again\..*?```python\n(.*?)```", text, re.DOTALL)[1], found)
    exact = SyntheticSet.load(sets[True])
    inside = fit_preprocessing(load_data("FashionMNISTMini", None), True).apply(eight_bits(exact)[0])
    torch.testing.assert_close(found["images"], inside, rtol=0, atol=2e-4)
    # what 8 bits change in an image, whitening multiplies by 1 / sqrt(0.1) at most
    change = (found["pixels"] - exact.unclamped_pixels()).flatten(1).norm(dim=1)
    assert ((found["images"] - exact.images).flatten(1).norm(dim=1) <= change / 0.1**0.5 + 1e-3).all()


# ---- there and back


@pytest.mark.parametrize("zca", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_a_set_goes_out_and_comes_back(form, zca, sets, tmp_path, capsys):
    """An export says what it is of: nothing is asked for."""
    ours = SyntheticSet.load(sets[zca])
    folder = export(sets[zca], form, tmp_path / "out")
    said = capsys.readouterr().err
    back = import_(folder, tmp_path / "back.safetensors")
    assert torch.equal(back.labels, ours.labels) and torch.equal(back.lr, ours.lr)
    assert torch.equal(back.classes, ours.classes) and back.class_names == ours.class_names
    assert back.preprocessing_identity == ours.preprocessing_identity
    assert {key: back.metadata[key] for key in ("data", "settings", "model", "seed")} == {
        key: ours.metadata[key] for key in ("data", "settings", "model", "seed")
    }
    if form in ("npz", "published"):
        assert torch.equal(back.images, ours.images)
        return
    inside = ours.unclamped_pixels().clamp(0, 1)
    assert (back.pixels() - inside).abs().max() <= 0.5 / 255 + 1e-5
    about = json.loads((folder / "set.json").read_text())
    assert f"at most by {about['precision']['max_error']:.2f}" in said and about["precision"]["mean_error"] > 0.1


def test_a_run_is_exported_by_its_folder_and_its_last_set_counts(images, tmp_path):
    run = distil(images, tmp_path, "DM", ipc=2)
    export(run, "published", tmp_path / "out")
    last = SyntheticSet.load(run / "Normal" / "synthetic_last.safetensors")
    assert torch.equal(torch.load(tmp_path / "out" / "images_last.pt"), last.images)


def test_the_dataset_card_says_what_the_set_is_and_what_it_reaches(sets, tmp_path):
    path = tmp_path / "set.safetensors"
    shutil.copy(sets[False], path)
    row = {"set": "synthetic", "network": "ConvNetD1W8", "mean": 0.7125, "std": 0.011, "n": 5, "accuracies": []}
    results = {"synthetic": {"digest": SyntheticSet.load(path).digest}, "results": [row]}
    path.with_suffix(".evaluation.json").write_text(json.dumps(results))
    export(path, "huggingface", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith('---\nlicense: "mit"\n') and ", 9 Ankle boot." in card
    assert "| synthetic | ConvNetD1W8 | 71.25 % | 1.10 | 5 |" in card and "| `lr_img` | 3.0 |" in card
    results["synthetic"]["digest"] = "of another"
    path.with_suffix(".evaluation.json").write_text(json.dumps(results))
    argv = command_line(source=path, to="huggingface", out=tmp_path / "asked", licence="cc-by-4.0")
    assert cli.export_set(argv) == 0
    card = (tmp_path / "asked" / "README.md").read_text()
    assert card.startswith('---\nlicense: "cc-by-4.0"\n') and "71.25" not in card and "Not measured." in card


@pytest.mark.parametrize("there", [{}, {"results": 5}, {"results": [{"set": "synthetic"}]}, {"results": [[]]}], ids=str)
def test_damaged_results_are_left_out_of_the_dataset_card(sets, tmp_path, capfd, there):
    path = tmp_path / "set.safetensors"
    shutil.copy(sets[False], path)
    there = {"synthetic": {"digest": SyntheticSet.load(path).digest}} | there
    path.with_suffix(".evaluation.json").write_text(json.dumps(there))
    export(path, "huggingface", tmp_path / "out")
    assert "set.evaluation.json is damaged, or not of this set" in capfd.readouterr().err
    assert "Not measured." in (tmp_path / "out" / "README.md").read_text()


def test_the_library_of_hugging_face_reads_the_export(sets, tmp_path):
    datasets = pytest.importorskip("datasets")
    folder = export(sets[False], "huggingface", tmp_path / "out")
    rows = datasets.load_dataset("imagefolder", data_dir=str(folder), split="train")
    exact = SyntheticSet.load(sets[False])
    assert rows["label"] == exact.classes.tolist()
    assert torch.equal(torch.tensor(rows["logits"]), exact.labels)
    levels = torch.stack([torch.from_numpy(np.array(image)) for image in rows["image"]])
    assert torch.equal(levels[:, None], eight_bits(exact)[0])
    assert datasets.load_dataset(str(folder), split="train")["label"] == rows["label"]  # as from the Hub


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_a_set_that_came_back_scores_as_before(form, sets, tmp_path):
    """Five networks each: the same where the form is exact, otherwise within the standard error."""
    import_(export(sets[False], form, tmp_path / "out"), tmp_path / "back.safetensors")
    found = []
    for path in (sets[False], tmp_path / "back.safetensors"):
        out = tmp_path / f"{path.stem}.json"
        asked = {"num_eval": 5, "epoch_eval_train": 60, "batch_train": 50, "baselines": "none", "out": out}
        assert cli.evaluate(command_line(synthetic=path, **asked)) == 0
        [row] = json.loads(out.read_text())["results"]
        found.append(np.array(row["accuracies"]))
    ours, theirs = found
    assert ours.mean() > 0.5
    error = np.sqrt((ours.var(ddof=1) + theirs.var(ddof=1)) / 5)
    assert abs(ours.mean() - theirs.mean()) <= (0 if form in ("npz", "published") else error)


# ---- files of others


def real(images: Path, ipc: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The first images of each class of the folder, uint8, the same normalised, and their classes."""
    data = load_data("ImageFolder", images)
    chosen = torch.cat([(data.train_labels == c).nonzero().flatten()[:ipc] for c in range(3)])
    pixels = data.train_images[chosen]
    return pixels, fit_preprocessing(data, False).apply(pixels), data.train_labels[chosen]


def theirs(kind: str, images: Path, folder: Path) -> tuple[Path, dict]:
    """A file as a published code writes it, and the settings that are asked for it."""
    pixels, normalised, classes = real(images)
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "DC":
        sets = [[normalised + 1, classes], [normalised, classes]]
        torch.save({"data": sets, "accs_all_exps": {"ConvNet": [np.float64(0.5)]}}, folder / "res_DC_X_ConvNet_2ipc.pt")
        return folder / "res_DC_X_ConvNet_2ipc.pt", {"lr_dir": 0.01, "experiment": 1}
    if kind == "IDC":
        torch.save([pixels.float() / 255, classes], folder / "data.pt")
        return folder / "data.pt", {"lr_dir": 0.01, "factor": 1}
    if kind == "ImageFolder":
        for i, (image, c) in enumerate(zip(pixels, classes.tolist())):
            place = folder / ("ant", "bee", "cat")[c]
            place.mkdir(exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(place / f"{i}.png")
        return folder, {"lr_dir": 0.01}
    if kind == "npz":
        np.savez(folder / "theirs.npz", images=pixels.numpy(), labels=classes.numpy())
        return folder / "theirs.npz", {"lr_dir": 0.01}
    labels = classes if kind == "MTT" else 3 * hard_logits(classes, 3) / 1000
    for name, value in (("images", normalised), ("labels", labels), ("lr", torch.tensor(0.01))):
        torch.save(value, folder / f"{name}_best.pt")
    return folder / "images_best.pt", {"values": "network"} | ({} if kind == "MTT" else {"label_form": "logits"})


KINDS = ("DC", "IDC", "ImageFolder", "npz", "MTT", "DATM")


@pytest.mark.parametrize("kind", KINDS)
def test_files_as_published_codes_write_them_are_imported(kind, images, tmp_path):
    source, asked = theirs(kind, images, tmp_path / "theirs")
    found = import_(source, tmp_path / "set.safetensors", data_path=images, **FOLDER, **asked)
    _, normalised, classes = real(images)
    torch.testing.assert_close(found.images, normalised, rtol=0, atol=2e-6)
    assert found.ipc == 2 and found.lr.item() == pytest.approx(0.01) and found.class_names == ["ant", "bee", "cat"]
    one_hot = torch.eye(3).repeat_interleave(2, 0)
    expected = (3 * one_hot).softmax(1) if kind == "DATM" else one_hot
    torch.testing.assert_close(found.probabilities(), expected, rtol=0, atol=1e-6)
    assert found.metadata["data"] == load_data("ImageFolder", images).identity
    assert found.metadata["settings"]["zca"] is False and found.metadata["model"] == "ConvNetD1W8"


def test_an_imported_set_of_multi_formation_is_scored_like_any(images, tmp_path, capsys):
    source, asked = theirs("IDC", images, tmp_path / "theirs")
    out = tmp_path / "set.safetensors"
    found = import_(source, out, data_path=images, **FOLDER, **(asked | {"factor": 2}))
    assert found.factor == 2 and len(found.stored) == 6
    assert found.ipc == 8 and "6 images, each cut into 4, become 24" in capsys.readouterr().err
    pixels, _, _ = real(images)
    tile = pixels[2:3, :, :8, 8:].float() / 255  # of class 1 the first image's second tile
    expected = F.interpolate(tile, scale_factor=2, mode="bilinear")
    torch.testing.assert_close(found.pixels()[8 + 2 : 8 + 3], expected, rtol=0, atol=1e-5)
    assert found.metadata["provenance"]["imported"]["factor"] == 2
    asked = {"num_eval": 1, "epoch_eval_train": 2, "batch_train": 8, "baselines": "none"}
    assert cli.evaluate(command_line(synthetic=out, data_path=images, **asked)) == 0
    results = json.loads(out.with_suffix(".evaluation.json").read_text())
    assert results["ipc"] == 8 and results["settings"]["model"] == "ConvNetD1W8"


def test_pixels_in_multi_formation_are_whitened_after_they_are_decoded(images, tmp_path):
    source, asked = theirs("IDC", images, tmp_path / "theirs")
    asked |= {"data_path": images, **FOLDER, "zca": True, "factor": 2}
    found = import_(source, tmp_path / "set.safetensors", **asked)
    tile = real(images)[0][2:3, :, :8, 8:].float() / 255
    assert found.factor == 1 and found.ipc == 8
    expected = F.interpolate(tile, scale_factor=2, mode="bilinear")
    torch.testing.assert_close(found.pixels()[8 + 2 : 8 + 3], expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("zca", [False, True])
def test_images_that_their_code_pads_are_decoded_as_it_does(zca, images, tmp_path):
    """The third of 16 is 6: grey is put around, so that 18 are cut. The file holds what was cut, but for whitened."""
    source, asked = theirs("IDC", images, tmp_path / "theirs")
    asked |= {"data_path": images, **FOLDER, "zca": zca, "factor": 3, "padded": True}
    found = import_(source, tmp_path / "set.safetensors", **asked)
    padded = torch.full((6, 3, 18, 18), 0.5)
    padded[:, :, :16, :16] = real(images)[0].float() / 255
    for i, (y, x) in {0: (0, 0), 5: (6, 12), 8: (12, 12)}.items():  # tiles of the second image of class 2
        expected = F.interpolate(padded[5:, :, y : y + 6, x : x + 6], size=(16, 16), mode="bilinear")
        at = 2 * 18 + 2 * i + 1
        torch.testing.assert_close(found.pixels()[at : at + 1], expected, rtol=0, atol=1e-3 if zca else 1e-5)
    assert found.counts == [18, 18, 18] and found.factor == (1 if zca else 3)
    if not zca:
        assert found.stored.shape == (6, 3, 16, 16) and found.cost.images == 32 * 6 * 3 * 16 * 16
        small = found.quantised(8)
        small.save(tmp_path / "small")
        again = SyntheticSet.load(tmp_path / "small")
        assert torch.equal(again.images, small.images) and (again.images - found.images).abs().max() < 0.05
    more = {"batch_train": 64, "baselines": "none"}
    results = scored(tmp_path / "set.safetensors", tmp_path / "ours.json", data_path=images, **more)
    assert results == scored(source, tmp_path / "theirs.json", **more, **asked) and results["ipc"] == 18


def test_images_that_were_normalised_by_other_numbers(images, tmp_path):
    pixels, normalised, classes = real(images)
    mean, std = torch.tensor([0.1, 0.2, 0.3]).view(-1, 1, 1), torch.tensor([0.5, 0.6, 0.7]).view(-1, 1, 1)
    torch.save({"data": [[(pixels / 255 - mean) / std, classes]], "accs_all_exps": {}}, tmp_path / "res_DM.pt")
    asked = {"lr_dir": 0.01, "mean": "0.1,0.2,0.3", "std": "0.5,0.6,0.7", "data_path": images}
    found = import_(tmp_path / "res_DM.pt", tmp_path / "set.safetensors", **FOLDER, **asked)
    torch.testing.assert_close(found.images, normalised, rtol=0, atol=1e-5)


@pytest.fixture
def asked_of(images, tmp_path):
    """Makes a file of others and returns a refused import of it: asserts that one sentence holds the words."""

    def refused(capfd, kind, words, *without, **changes):
        source, asked = theirs(kind, images, tmp_path / "theirs")
        settings = {"source": source, "out": tmp_path / "set.safetensors", "data_path": images, **FOLDER, **asked}
        settings = {name: value for name, value in (settings | changes).items() if name not in without}
        assert_refused(capfd, cli.import_set, command_line(**settings), words, tmp_path)

    return refused


@pytest.mark.parametrize(
    "kind, without, words",
    [
        ("DC", ("zca", "lr_dir"), ("(DC, DSA, DM) does not say all that is needed; give --zca, --lr_dir",)),
        ("DC", ("experiment",), ("holds 2 sets", "--experiment 0 to 1")),
        ("IDC", ("factor", "dataset"), ("give --dataset, --factor",)),
        ("MTT", ("values",), ("give --values",)),
        ("DATM", ("label_form", "values"), ("give --values, --label_form",)),
        ("npz", ("lr_dir",), ("give --lr_dir",)),
        ("ImageFolder", ("dataset", "zca", "lr_dir"), ("give --dataset, --zca, --lr_dir",)),
        ("DC", ("out",), ("--out",)),
    ],
)
def test_what_a_file_does_not_say_is_asked_for(asked_of, capfd, kind, without, words):
    asked_of(capfd, kind, words, *without)


@pytest.mark.parametrize(
    "kind, changes, words",
    [
        ("IDC", {"factor": 3}, ("factor: 3 does not divide the sides of images of 16x16 pixels", "give --padded")),
        ("IDC", {"factor": 17, "padded": True}, ("factor: 17 is more than the 16 pixels of a side",)),
        ("DC", {"factor": 3, "padded": True, "zca": True}, ("padded: ", "whitened images")),
        ("IDC", {"values": "network"}, ("values: network was given, but", "has pixels")),
        ("MTT", {"label_form": "logits"}, ("label_form: logits was given, but", "has classes")),
        ("DC", {"values": "pixels"}, ("values: pixels was given",)),
        ("MTT", {"values": "pixels"}, ("no pixels of 0 to 1",)),
        ("DATM", {"label_form": "probabilities"}, ("no probabilities",)),
        ("DC", {"lr_dir": 0}, ("lr_dir: 0 is no learning rate",)),
        ("DC", {"lr_dir": "gone.pt"}, ("gone.pt does not exist",)),
        ("DC", {"mean": "0.1,0.2"}, ("mean and std belong together",)),
        ("DC", {"mean": "0.1,0.2", "std": "1,1,1"}, ("mean: '0.1,0.2' is not a number for each of 3 channels",)),
        ("DC", {"mean": "0,0,0", "std": "1,1,0"}, ("std: '1,1,0' is not",)),
        ("DC", {"mean": "0,nan,0", "std": "1,1,1"}, ("mean: '0,nan,0' is not",)),
        ("DC", {"mean": "0,0,0", "std": "1,1,inf"}, ("std: '1,1,inf' is not",)),
        ("DC", {"mean": "0,0,0", "std": "1,1,1", "zca": True}, ("give --zca False",)),
        ("IDC", {"mean": "0,0,0", "std": "1,1,1"}, ("are pixels",)),
        ("DC", {"dataset": "FashionMNISTMini"}, ("images [3, 16, 16], but FashionMNISTMini has images [1, 28, 28]",)),
        ("DC", {"experiment": 2}, ("there is no 2",)),
        ("DC", {"dataset": "ImageNet"}, ("give --subset",)),
        ("DC", {"dataset": "CIFAR-10"}, ("did you mean CIFAR10?",)),
        ("DC", {"values": "pixel"}, ("values: 'pixel' is not one of pixels, network",)),
    ],
)
def test_what_does_not_go_together_is_refused_and_nothing_is_written(asked_of, capfd, kind, changes, words):
    asked_of(capfd, kind, words, **changes)


def test_a_learning_rate_that_is_not_finite_is_refused(images, tmp_path, capfd):
    source, asked = theirs("DC", images, tmp_path / "theirs")
    torch.save(torch.tensor(torch.inf), tmp_path / "lr.pt")
    settings = {"source": source, "out": tmp_path / "set", "data_path": images, **FOLDER, **asked}
    argv = command_line(**settings | {"lr_dir": tmp_path / "lr.pt"})
    assert_refused(capfd, cli.import_set, argv, ("lr_dir: inf is no learning rate",), tmp_path)


def test_a_set_of_other_classes_is_refused(images, tmp_path, capfd):
    """An export that is of other images, and a folder of other classes."""
    source, asked = theirs("ImageFolder", images, tmp_path / "theirs")
    settings = {"source": source, "out": tmp_path / "set", "data_path": images, **FOLDER, **asked}
    (source / "bee").rename(source / "wasp")
    assert_refused(capfd, cli.import_set, command_line(**settings), ("not the 3 classes",), tmp_path)
    (source / "wasp").rename(source / "bee")
    import_(source, tmp_path / "ours.safetensors", data_path=images, **FOLDER, **asked)
    export(tmp_path / "ours.safetensors", "npz", tmp_path / "out")
    other = make_images(tmp_path / "other images", seed=1)
    argv = command_line(source=tmp_path / "out", out=tmp_path / "set", data_path=other)
    assert_refused(capfd, cli.import_set, argv, ("data fingerprint", "in the export"), tmp_path)


def test_nothing_is_replaced_unasked(images, tmp_path, capfd, sets):
    source, asked = theirs("DC", images, tmp_path / "theirs")
    out = tmp_path / "set.safetensors"
    settings = {"data_path": images, **FOLDER, **asked}
    first = import_(source, out, **settings)
    settings["lr_dir"] = 0.5
    argv = command_line(source=source, out=out, **settings)
    assert_refused(capfd, cli.import_set, argv, ("is there", "--overwrite"), tmp_path)
    assert import_(source, out, "--overwrite", **settings).lr.item() == 0.5 != first.lr.item()
    argv = command_line(source=sets[False], to="png", out=tmp_path / "theirs")
    assert_refused(capfd, cli.export_set, argv, ("theirs is there already",), tmp_path)


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--to", "npz"], ("give --source and --out",)),
        (["set.safetensors", "--to", "jpeg", "--out", "out"], ("to: 'jpeg' is not one of png, huggingface",)),
        (["gone.safetensors", "--to", "png", "--out", "out"], ("gone.safetensors does not exist",)),
    ],
)
def test_exports_that_cannot_be(argv, words, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert_refused(capfd, cli.export_set, argv, words, tmp_path)


# ---- scored as they are

NETWORKS = {"num_eval": 2, "epoch_eval_train": 2, "batch_train": 8, "baselines": "hard", "compile": "off"}


def scored(source: Path, out: Path, **settings) -> dict:
    """The results of stage 3 on a set's file."""
    assert cli.evaluate(command_line(synthetic=source, out=out, **(NETWORKS | settings))) == 0
    return json.loads(out.read_text())


@pytest.mark.parametrize("kind", KINDS)
def test_stage_3_scores_files_of_others_as_what_they_become(kind, images, tmp_path):
    source, asked = theirs(kind, images, tmp_path / "theirs")
    import_(source, tmp_path / "set.safetensors", data_path=images, **FOLDER, **asked)
    ours = scored(tmp_path / "set.safetensors", tmp_path / "ours.json", data_path=images)
    found = scored(source, tmp_path / "theirs.json", data_path=images, **FOLDER, **asked)
    assert [row["set"] for row in found["results"]] == ["synthetic"] + ["synthetic, hard labels"] * (kind == "DATM") + [
        "random real, hard labels"
    ]
    assert found == ours


def test_stage_3_scores_multi_formation_of_others(images, tmp_path):
    source, asked = theirs("IDC", images, tmp_path / "theirs")
    asked |= {"data_path": images, **FOLDER, "factor": 2}
    found = scored(source, tmp_path / "theirs.json", **asked)
    import_(source, tmp_path / "set.safetensors", **asked)
    assert found == scored(tmp_path / "set.safetensors", tmp_path / "ours.json", data_path=images)
    assert found["synthetic"]["factor"] == 2 and found["ipc"] == 8


def test_a_folder_of_unequal_classes_goes_all_ways(images, tmp_path):
    """Scored as it lies there, taken in, sent out, in fewer bits, and begun with."""
    source, asked = theirs("ImageFolder", images, tmp_path / "theirs")
    next((source / "bee").iterdir()).unlink()
    asked |= {"data_path": images, **FOLDER}
    found = scored(source, tmp_path / "theirs.json", **asked)
    assert found["images_of_each_class"] == [2, 1, 2]
    ours = import_(source, tmp_path / "set.safetensors", **asked)
    assert ours.counts == [2, 1, 2]
    assert scored(tmp_path / "set.safetensors", tmp_path / "ours.json", data_path=images) == found
    for form in FORMS:
        sent = export(tmp_path / "set.safetensors", form, tmp_path / form)
        back = import_(sent, tmp_path / f"{form}.set", data_path=images)
        assert back.counts == [2, 1, 2] and torch.equal(back.labels, ours.labels)
        torch.testing.assert_close(back.images, ours.images, rtol=0, atol=2e-6)
    small = tmp_path / "small.safetensors"
    assert cli.quantise(command_line(source=tmp_path / "set.safetensors", bits=8, group="class", out=small)) == 0
    again = scored(small, tmp_path / "small.json", data_path=images)
    assert again["images_of_each_class"] == [2, 1, 2] and again["bits"]["labels"] == 0
    run = distil(images, tmp_path, "DM", ipc=2, pix_init=small, lr_img=0)
    begun = SyntheticSet.load(run / "Normal" / "synthetic_last.safetensors")
    assert begun.counts == [2, 2, 2] and torch.equal(begun.images[2], begun.images[3])


@pytest.mark.parametrize("form", FORMS)
def test_stage_3_scores_an_export_without_being_told_of_it(form, sets, tmp_path):
    folder = export(sets[False], form, tmp_path / "v1.0")
    asked = {"batch_train": 50, "epoch_eval_train": 3, "baselines": "none"}
    ours = scored(sets[False], tmp_path / "ours.json", **asked)
    assert cli.evaluate(command_line(synthetic=folder, **(NETWORKS | asked))) == 0
    found = json.loads((tmp_path / "v1.0.evaluation.json").read_text())
    assert {key: found[key] for key in ("data", "settings", "ipc", "lr")} == {
        key: ours[key] for key in ("data", "settings", "ipc", "lr")
    }
    assert (found["results"] == ours["results"]) == (form in ("npz", "published"))


@pytest.mark.parametrize(
    "kind, changes, words",
    [
        ("DC", {"zca": None, "lr_dir": None}, ("(DC, DSA, DM) does not say", "give --zca, --lr_dir")),
        ("MTT", {"dataset": None, "values": None}, ("give --dataset, --values",)),
        ("DATM", {"label_form": None}, ("give --label_form",)),
        ("IDC", {"factor": 3}, ("factor: 3 does not divide",)),
        ("MTT", {"values": "pixels"}, ("no pixels of 0 to 1",)),
        ("DC", {"dataset": "FashionMNISTMini"}, ("but FashionMNISTMini has images [1, 28, 28]",)),
        ("DC", {"data_dir": "images_best.pt"}, ("data_dir and synthetic exclude each other",)),
        ("npz", {"synthetic": "gone.npz"}, ("gone.npz does not exist",)),
        ("DC", {"mean": "0,0,0"}, ("mean and std belong together",)),
    ],
)
def test_stage_3_asks_for_what_a_file_of_others_does_not_say(kind, changes, words, images, tmp_path, capfd):
    source, asked = theirs(kind, images, tmp_path / "theirs")
    settings = {"synthetic": source, "data_path": images, **FOLDER, **asked, **changes}
    argv = command_line(**{name: value for name, value in settings.items() if value is not None})
    assert_refused(capfd, cli.evaluate, argv, words, tmp_path)


def test_a_trio_by_its_published_flags_is_read_as_published(images, tmp_path, capfd):
    source, _ = theirs("DATM", images, tmp_path / "theirs")
    trio = {"data_dir": "images", "label_dir": "labels", "lr_dir": "lr"}
    trio = {name: source.with_name(f"{kind}_best.pt") for name, kind in trio.items()}
    argv = command_line(**trio, data_path=images, **FOLDER, values="network")
    assert_refused(capfd, cli.evaluate, argv, ("data_dir and values exclude each other", "--synthetic"), tmp_path)


# ---- a set to begin with


def distil(images: Path, folder: Path, system: str, *more: str, **settings) -> Path:
    """A short run of DC or DM; its folder."""
    asked = {"data_path": images, "log_dir": folder / "runs", "name": "run", "ipc": 2, "Iteration": 0, "num_eval": 1}
    asked |= {"epoch_eval_train": 1, "batch_real": 4, "compile": "off", "skip_first_eva": True}
    asked |= {"outer_loop": 1, "inner_loop": 1} if system == "DC" else {}
    asked |= FOLDER | settings
    assert cli.door(system, command_line(*more, **asked)) == 0
    return folder / "runs" / asked["dataset"] / str(asked["ipc"]) / asked["model"] / asked["name"]


@pytest.fixture
def start(images, tmp_path) -> SyntheticSet:
    """A set of two images a class with soft labels, in start.safetensors."""
    source, asked = theirs("DATM", images, tmp_path / "theirs")
    return import_(source, tmp_path / "start.safetensors", data_path=images, **FOLDER, **asked)


@pytest.mark.parametrize("system", ["DC", "DM"])
@pytest.mark.parametrize("ipc", [1, 2, 5])
def test_gradient_and_distribution_matching_begin_with_a_set(system, ipc, start, images, tmp_path, capsys):
    run = distil(images, tmp_path, system, ipc=ipc, pix_init=tmp_path / "start.safetensors", lr_img=0)
    found = SyntheticSet.load(run / "Normal" / "synthetic_last.safetensors")
    assert torch.equal(found.labels, hard_logits(found.classes, 3))
    for c in range(3):
        known = {image.numpy().tobytes() for image in start.images[start.classes == c]}
        mine = [image.numpy().tobytes() for image in found.images[found.classes == c]]
        assert set(mine) <= known and len(set(mine)) == min(ipc, 2)
    assert found.metadata["provenance"]["start"] == start.digest
    said = capsys.readouterr().err
    assert "soft labels are not taken over" in said and ("ipc is" in said) == (ipc != 2)


@pytest.mark.slow
def test_trajectory_matching_begins_with_the_images_and_soft_labels_of_a_set(start, images, tmp_path, capfd):
    def pad(*more, **settings):
        here = {"data_path": images, "buffer_path": tmp_path / "buffer", "log_dir": tmp_path / "runs", **FOLDER}
        asked = {"ipc": 2, "Iteration": 0, "syn_steps": 2, "max_start_epoch": 1, "expert_epochs": 1, "name": "run"}
        asked |= {"Sequential_Generation": False, "num_eval": 1, "epoch_eval_train": 1, "skip_first_eva": True}
        asked |= {"lr_img": 0, "lr_y": 0, "compile": "off", "pix_init": tmp_path / "start.safetensors"}
        return cli.distill(command_line(*more, **(here | asked | settings)))

    recorded = {"data_path": images, "buffer_path": tmp_path / "buffer", "num_experts": 1, "train_epochs": 2, **FOLDER}
    recorded |= {
        "init_ratio": 1,
        "add_end_epoch": 0,
        "score_repeats": 1,
        "score_epochs": 1,
        "rm_epoch_first": 2,
        "batch_train": 8,
    }
    assert cli.buffer(command_line(**recorded)) == 0
    run = tmp_path / "runs" / "ImageFolder" / "2" / FOLDER["model"] / "run"
    assert pad() == 0
    found = SyntheticSet.load(run / "Normal" / "synthetic_last.safetensors")
    assert torch.equal(found.images, start.images) and torch.equal(found.labels, start.labels)

    # hard labels where they are asked for; experts' where there are no soft ones to take over
    assert pad("--overwrite", labels="hard") == 0
    found = SyntheticSet.load(run / "Normal" / "synthetic_last.safetensors")
    assert torch.equal(found.images, start.images) and torch.equal(found.labels, hard_logits(start.classes, 3))
    source, asked = theirs("DC", images, tmp_path / "hard")
    hard = import_(source, tmp_path / "hard.safetensors", data_path=images, **FOLDER, **asked)
    assert pad("--overwrite", pix_init=tmp_path / "hard.safetensors") == 0
    found = SyntheticSet.load(run / "Normal" / "synthetic_last.safetensors")
    assert torch.equal(found.images, hard.images) and 0 < found.probabilities().max() < 0.9999
    assert "the experts label its images" in capfd.readouterr().err

    # a run goes on with the set that it began with, and no other
    assert pad("--overwrite", Iteration=1) == 0
    argv = command_line("--resume", Iteration=2)
    hard.save(tmp_path / "start.safetensors")
    assert pad(*argv) == 2 and "start" in capfd.readouterr().err
    start.save(tmp_path / "start.safetensors")
    assert pad(*argv) == 0 and len(events_in(run, "match")) == 3

    # a quantised one's levels are tuned, its soft labels stay
    small = tmp_path / "small.safetensors"
    assert cli.quantise(command_line(source=tmp_path / "start.safetensors", bits=2, label_bits=8, out=small)) == 0
    tuning = {"pix_init": small, "Iteration": 3, "lr_img": 1e4, "lr_y": 10, "threshold": "none"}
    assert pad("--overwrite --tune_levels", **tuning) == 0
    begun, found = SyntheticSet.load(small), SyntheticSet.load(run / "Normal" / "synthetic_last.safetensors")
    assert torch.equal(found.labels, begun.labels) and not torch.equal(found.images, begun.images)
    assert found.cost == begun.cost and torch.equal(*(each.packed.tensors["scales"] for each in (begun, found)))


@pytest.mark.parametrize(
    "change, words",
    [
        ({"labels": torch.zeros(6, 2), "classes": torch.tensor([0, 0, 0, 1, 1, 1])}, ("classes: 2 in the set, 3 in",)),
        ({"images": torch.zeros(6, 3, 16, 8)}, ("shape of images: [3, 16, 8] in the set",)),
        ({"class_names": ["ant", "wasp", "cat"]}, ("class 1: wasp in the set, bee in the data",)),
        ({"preprocessing": {"kind": "meanstd", "digest": "other"}}, ("preprocessing", "in the set")),
        ({"preprocessing": None}, ("does not say how its images were preprocessed",)),
    ],
)
def test_a_set_of_something_else_is_no_start(change, words, start, images, tmp_path, capfd):
    start.stored_pixels = None
    for name, value in change.items():
        if isinstance(value, torch.Tensor):
            setattr(start, name, value)
        else:
            start.metadata[name] = value
    if "labels" in change:
        del start.metadata["class_names"]
    start.save(tmp_path / "start.safetensors")
    argv = command_line(data_path=images, log_dir=tmp_path / "runs", pix_init=tmp_path / "start.safetensors", **FOLDER)
    assert_refused(capfd, cli.match_distributions, [*argv, "--ipc", "2"], ("pix_init: ", *words), tmp_path)


@pytest.mark.parametrize(
    "pix_init, words",
    [
        ("nowhere/set.safetensors", ("nowhere/set.safetensors does not exist",)),
        ("theirs/images_best.pt", ("no set of this toolkit's", "scripts/import_set.py")),
        ("realistic", ("pix_init: 'realistic' is not one of real, noise, and no path",)),
    ],
)
def test_a_start_that_is_no_set(pix_init, words, images, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    theirs("MTT", images, tmp_path / "theirs")
    argv = command_line(data_path=images, log_dir="runs", pix_init=pix_init, **FOLDER)
    assert_refused(capfd, cli.match_distributions, argv, words, tmp_path)


def test_a_start_in_a_file_of_settings_is_relative_to_what_its_paths_are(start, images, tmp_path, monkeypatch):
    """A word stays a word."""
    monkeypatch.chdir(tmp_path)
    for value, expected in (("start.safetensors", str(tmp_path / "start.safetensors")), ("Real", "real")):
        Path("run.yaml").write_text(f"pix_init: {value}\nskip_first_eva: True")
        run = distil(images, tmp_path, "DM", "--cfg run.yaml --overwrite")
        assert f"pix_init: {expected}\n" in (run / "config.yaml").read_text()


# ---- in fewer bits


@pytest.mark.parametrize("zca", [False, True])
def test_a_quantised_set_is_scored_sent_out_taken_in_and_begun_with(zca, sets, tmp_path, capsys):
    path = tmp_path / "small.safetensors"
    asked = {"source": sets[zca], "bits": 4, "label_bits": 8, "group": "channel"}
    assert cli.quantise(command_line(**asked, out=path)) == 0
    small = SyntheticSet.load(path)
    # an image of 784 values and one channel, a label of ten; each has a scale of 64 bits
    assert (small.cost.images, small.cost.labels) == (50 * (784 * 4 + 64), 50 * (10 * 8 + 64))

    argv = command_line(synthetic=path, num_eval=1, epoch_eval_train=1, baselines="none", compile="off")
    assert cli.evaluate(argv) == 0
    assert f"the set costs {small.cost}" in capsys.readouterr().out
    results = json.loads(path.with_suffix(".evaluation.json").read_text())
    assert results["bits"] == small.cost.as_dict() and results["synthetic"]["digest"] == small.digest

    for form in FORMS:
        folder = export(path, form, tmp_path / form)
        assert f"costs {small.cost}" in capsys.readouterr().out
        again = import_(folder, tmp_path / f"{form}.safetensors")
        said = capsys.readouterr().out
        if form in ("npz", "published"):
            assert torch.equal(again.images, small.images) and torch.equal(again.labels, small.labels)
        assert again.cost.images == 32 * 50 * 784 and f"costs {again.cost}" in said

    start = {**MINI, "zca": zca, "pix_init": path, "lr_img": 0, "ipc": IPC}
    run = distil(tmp_path / "none", tmp_path, "DM", **start)
    begun = SyntheticSet.load(run / "Normal" / "synthetic_last.safetensors")
    assert torch.equal(begun.images, small.images) and f"{begun.cost}\n" in capsys.readouterr().err


def matched(folder: Path, begin: Path, **settings) -> float:
    """The mean loss of distribution matching of a set that does not move, over 20 random networks."""
    settings |= {"lr_img": 0, "Iteration": 19, "pix_init": begin, "name": f"of {begin.stem}"}
    run = distil(folder, folder, "DM", **settings)
    return float(np.mean([event["loss"] for event in events_in(run) if event["event"] == "match"]))


@pytest.mark.slow
@pytest.mark.parametrize("factor", [1, 2])
def test_levels_are_tuned_on_what_is_matched(factor, images, tmp_path, capfd):
    """The cost, the scales and the labels stay; the loss falls; a run that is gone on with makes the same."""
    asked = {"data_path": images, **FOLDER, "factor": factor, "eval_it": 1000}
    whole = distil(images, tmp_path, "DM", name="whole", **asked)
    small = tmp_path / "small.safetensors"
    assert cli.quantise(command_line(source=whole, bits=2, out=small)) == 0
    tuning = {**asked, "pix_init": small, "lr_img": 3, "Iteration": 59, "checkpoint_every": 10}
    run = distil(images, tmp_path, "DM", "--tune_levels", name="tuned", **tuning)
    begun, end = SyntheticSet.load(small), SyntheticSet.load(run / "Normal" / "synthetic_last.safetensors")
    assert end.cost == begun.cost and end.factor == factor and torch.equal(end.labels, begun.labels)
    scales = [each.packed.tensors["scales"] for each in (begun, end)]
    assert torch.equal(*scales) and not torch.equal(end.images, begun.images)
    tuned = tmp_path / "tuned.safetensors"
    shutil.copy(run / "Normal" / "synthetic_last.safetensors", tuned)
    assert matched(tmp_path, tuned, **asked) < 0.9 * matched(tmp_path, small, **asked)

    distil(images, tmp_path, "DM", "--tune_levels", name="twice", **(tuning | {"Iteration": 29}))
    again = distil(images, tmp_path, "DM", "--tune_levels --resume", name="twice", **tuning)
    assert SyntheticSet.load(again / "Normal" / "synthetic_last.safetensors").digest == end.digest


def test_levels_are_tuned_of_a_quantised_set_alone(start, images, tmp_path, capfd):
    whole, soft, hard = (tmp_path / f"{name}.safetensors" for name in ("start", "soft", "hard"))
    assert cli.quantise(command_line(source=whole, bits=4, out=soft)) == 0
    dataclasses.replace(start, labels=hard_logits(start.classes, 3)).save(tmp_path / "one-hot")
    assert cli.quantise(command_line(source=tmp_path / "one-hot", bits=4, out=hard)) == 0
    for more, words in (
        ({}, ("tune_levels: pix_init: real is no quantised set",)),
        ({"pix_init": whole}, ("start.safetensors is no quantised set",)),
        ({"pix_init": soft}, ("other images or labels than those of", "labels (soft or hard)")),
        ({"pix_init": hard, "ipc": 3}, ("ipc and factor are to be its own (2, 1)",)),
    ):
        asked = {"data_path": images, "log_dir": tmp_path / "runs", "ipc": 2, **FOLDER, **more}
        assert_refused(
            capfd, lambda argv: cli.door("DM", argv), command_line("--tune_levels", **asked), words, tmp_path
        )


@pytest.mark.slow
@pytest.mark.parametrize("script", ["export_set", "import_set", "quantise"])
def test_the_scripts_run_from_any_folder(script, tmp_path):
    done = run_script(f"scripts/{script}.py", ["nowhere.npz", "--out", "out"], tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and not list(tmp_path.iterdir())
