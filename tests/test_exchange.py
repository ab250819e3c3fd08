"""Forms of others: the decoding of multi-formation, what labels mean, which files are read, what is lost in 8 bits."""

import hashlib
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from pad.data.formation import coarsened, decoded
from pad.data.images import ImageData
from pad.data.preprocessing import MeanStd
from pad.errors import InputError
from pad.exchange.converting import as_set, fitted
from pad.exchange.reading import Foreign, read_foreign
from pad.exchange.writing import eight_bits, export_set
from pad.initialisation import from_set
from pad.labels import hard_logits
from pad.synthetic import SyntheticSet

K, SHAPE = 3, (2, 4, 6)
MEANSTD = MeanStd.of((0.4, 0.6), (0.2, 0.3), "cpu")
DATA = ImageData(
    name="Odd",
    train_images=torch.zeros(6, *SHAPE, dtype=torch.uint8),
    train_labels=torch.arange(6) % K,
    test_images=torch.zeros(3, *SHAPE, dtype=torch.uint8),
    test_labels=torch.arange(3),
    class_names=("cat", "dog", "ox"),
    mean=(0.4, 0.6),
    std=(0.2, 0.3),
)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def made(channels: int = 2, ipc: int = 2, **changes) -> SyntheticSet:
    shape = (channels, *SHAPE[1:])
    fields = {
        "images": draw(K * ipc, *shape) * 2 - 1,
        "labels": draw(K * ipc, K, seed=1) * 5,
        "lr": torch.tensor(0.013),
        "classes": torch.arange(K).repeat_interleave(ipc),
        "metadata": {"class_names": ["cat", "T-shirt/top", "ox"]},
    }
    preprocessing = MeanStd.of((0.5,) * channels, (0.25,) * channels, "cpu")
    return SyntheticSet(**(fields | changes), preprocessing=preprocessing)


# ---- multi-formation


def enlarged(tile: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bilinear, corners not aligned, by the definition: pixel i of n stands at (i + 1/2) m / n - 1/2 of m."""
    out = np.empty((height, width))
    for y in range(height):
        for x in range(width):
            v = min(max((y + 0.5) * tile.shape[0] / height - 0.5, 0), tile.shape[0] - 1)
            u = min(max((x + 0.5) * tile.shape[1] / width - 0.5, 0), tile.shape[1] - 1)
            top, left = int(v), int(u)
            below, right = min(top + 1, tile.shape[0] - 1), min(left + 1, tile.shape[1] - 1)
            a, b = v - top, u - left
            out[y, x] = (1 - a) * ((1 - b) * tile[top, left] + b * tile[top, right])
            out[y, x] += a * ((1 - b) * tile[below, left] + b * tile[below, right])
    return out


@pytest.mark.parametrize("factor, size", [(1, (4, 6)), (2, (4, 6)), (2, (8, 8)), (3, (9, 6))])
def test_stored_images_are_cut_into_tiles_and_enlarged(factor, size):
    images = draw(2, 3, *size).double()
    found = decoded(images, factor)
    rows, columns = size[0] // factor, size[1] // factor
    expected = [
        [enlarged(channel[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns], *size) for channel in image]
        for i in range(factor)
        for j in range(factor)
        for image in images.numpy()
    ]
    assert found.shape == (2 * factor**2, 3, *size)
    np.testing.assert_allclose(found.numpy(), np.array(expected), rtol=0, atol=1e-12)


@pytest.mark.parametrize("factor, size", [(3, (4, 8)), (2, (5, 4)), (4, (6, 7)), (5, (3, 4)), (3, (6, 9))])
def test_grey_stands_around_images_whose_sides_the_factor_does_not_divide(factor, size):
    """At the right and below, as in IDC's code; in any units."""
    images, grey = draw(2, 3, *size).double(), torch.tensor([0.5, -1.0, 2.0]).double().view(3, 1, 1)
    rows, columns = (math.ceil(side / factor) for side in size)
    padded = np.empty((2, 3, rows * factor, columns * factor))
    padded[:] = grey.numpy()
    padded[:, :, : size[0], : size[1]] = images.numpy()
    expected = [
        [enlarged(channel[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns], *size) for channel in image]
        for i in range(factor)
        for j in range(factor)
        for image in padded
    ]
    found = decoded(images, factor, grey=grey)
    np.testing.assert_allclose(found.numpy(), np.array(expected), rtol=0, atol=1e-12)
    assert torch.equal(decoded(images, factor, [1, 1], grey)[: factor**2], decoded(images[:1], factor, grey=grey))


def test_real_images_are_as_coarse_where_the_factor_does_not_divide():
    """Means of the pixels that each of the tile's covers, whole or in part; enlarged again."""

    def means(side: int) -> np.ndarray:
        tile = math.ceil(side / 2)
        covered = np.zeros((tile, side))
        for i in range(tile):
            first, end = i * side // tile, -(-(i + 1) * side // tile)
            covered[i, first:end] = 1 / (end - first)
        return covered

    images = draw(2, 1, 7, 5).double()
    expected = [[enlarged(means(7) @ channel @ means(5).T, 7, 5) for channel in image] for image in images.numpy()]
    np.testing.assert_allclose(coarsened(images, 2).numpy(), np.array(expected), rtol=0, atol=1e-12)


def test_a_factor_that_does_not_divide_a_side_is_refused():
    with pytest.raises(InputError, match="factor: 4 does not divide the sides of images of 4x6 pixels"):
        decoded(draw(1, 1, 4, 6), 4)


def test_a_decoded_set_is_class_by_class_and_repeats_the_labels():
    pixels, labels = draw(2 * K, *SHAPE), torch.tensor([2, 0, 1, 1, 0, 2])
    found = fitted(foreign(images=pixels, labels=labels, factor=2, values="pixels"), DATA)
    synthetic = as_set(found, MEANSTD, None, {})
    assert synthetic.ipc == 8 and torch.equal(synthetic.labels, hard_logits(synthetic.classes, K))
    assert synthetic.factor == 2 and torch.equal(decoded(synthetic.stored, 2, K), synthetic.images)
    for c in range(K):
        expected = MEANSTD.apply(decoded(pixels[labels == c], 2))
        torch.testing.assert_close(synthetic.images[synthetic.classes == c], expected, rtol=0, atol=1e-6)


# ---- what numbers and labels mean


def foreign(**changes) -> Foreign:
    fields = {"form": "npz", "where": "theirs", "images": draw(6, *SHAPE), "labels": torch.arange(6) % K}
    return Foreign(**(fields | {"lr": 0.1, "values": "network"} | changes))


SOFT = draw(6, K, seed=2).double() + 0.01
SOFT = SOFT / SOFT.sum(1, keepdim=True)


@pytest.mark.parametrize(
    "labels, form, targets",
    [
        (torch.arange(6) % K, None, torch.eye(K).double().repeat_interleave(2, 0)),
        ((torch.arange(6) % K).float()[:, None], None, torch.eye(K).double().repeat_interleave(2, 0)),
        (SOFT, "probabilities", SOFT),
        (SOFT, "logits", SOFT.exp() / SOFT.exp().sum(1, keepdim=True)),
        (SOFT.log() * 3, "logits", SOFT**3 / (SOFT**3).sum(1, keepdim=True)),
    ],
)
def test_labels_are_what_they_are_said_to_be(labels, form, targets):
    synthetic = as_set(fitted(foreign(labels=labels, label_form=form), DATA), MEANSTD, None, {})
    torch.testing.assert_close(synthetic.labels.double().softmax(1), targets, rtol=0, atol=1e-6)
    synthetic._refuse_unusable("it")


def test_images_in_other_units_come_to_the_same():
    """Bytes, pixels, what networks see, and what is normalised by other numbers."""
    bytes_ = (draw(6, *SHAPE) * 255).byte()
    pixels = bytes_.double() / 255
    mean, std = torch.tensor([0.4, 0.6]).view(-1, 1, 1).double(), torch.tensor([0.2, 0.3]).view(-1, 1, 1).double()
    expected = ((pixels - mean) / std)[torch.tensor([0, 3, 1, 4, 2, 5])]
    other = MeanStd.of((0.1, 0.2), (0.5, 0.6), "cpu")
    for images, values, of in (
        (bytes_, None, None),
        (pixels.float(), "pixels", None),
        (((pixels - mean) / std).float(), "network", None),
        (other.apply(bytes_), "network", other),
    ):
        synthetic = as_set(fitted(foreign(images=images, values=values), DATA), MEANSTD, of, {})
        torch.testing.assert_close(synthetic.images.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"images": draw(6, 4, 6, 2)}, r"holds images \[4, 6, 2\], but Odd has images \[2, 4, 6\]"),
        ({"images": draw(6, 4, 6)}, r"shape \[6, 4, 6\], not \[N, C, H, W\]"),
        ({"images": draw(6, *SHAPE).fill_(math.nan)}, "not finite"),
        ({"images": torch.zeros(6, *SHAPE, dtype=torch.int64)}, "not finite floating-point numbers, nor bytes"),
        ({"images": torch.zeros(6, *SHAPE, dtype=torch.uint8)}, "are pixels, not what networks see"),
        ({"images": draw(6, *SHAPE) * 255, "values": "pixels"}, "no pixels of 0 to 1, .* standard deviation of 7"),
        ({"labels": torch.arange(5)}, "5 labels for 6 images"),
        ({"labels": torch.tensor(1)}, "1 labels for 6 images"),
        ({"labels": torch.full((6,), math.inf)}, "labels with a value that is not finite"),
        ({"labels": torch.arange(6)}, "not numbers of the 3 classes of Odd"),
        ({"labels": torch.arange(6) % K - 1}, "not numbers of the 3 classes"),
        ({"labels": torch.arange(6) / 2}, "not numbers of the 3 classes"),
        ({"labels": torch.arange(6) % 2}, "has no image of class 2 of Odd's 3"),
        ({"labels": draw(6, K), "label_form": "logits", "classes": torch.arange(6)}, "not numbers of the 3 classes"),
        ({"labels": draw(6, 4), "label_form": "logits"}, r"labels of shape \[6, 4\], but Odd has 3 classes"),
        ({"labels": draw(6, K) * 2, "label_form": "probabilities"}, "the labels are no probabilities"),
        ({"images": draw(7, *SHAPE), "labels": draw(7, K), "label_form": "logits"}, "7 images are not a multiple of 3"),
        ({"factor": 3}, "factor: 3 does not divide"),
        ({"folders": ["cat", "dog", "axolotl"]}, "not the 3 classes of Odd, by name or by number; one is 'cat'"),
        ({"folders": ["0_cat", "1_dog", "3_ox"]}, "one is '3_ox'"),
    ],
)
def test_what_no_set_can_be_is_refused(changes, words):
    with pytest.raises(InputError, match=words):
        fitted(foreign(**changes), DATA)


@pytest.mark.parametrize("folders", [["ox", "cat", "dog"], ["2", "0", "1"], ["02_x", "00_y", "01"]])
def test_folders_are_classes_by_name_or_by_number(folders):
    found = fitted(foreign(folders=folders), DATA)
    assert torch.equal(found.labels, hard_logits(torch.arange(K).repeat_interleave(2), K))
    assert torch.equal(found.images, foreign().images[torch.tensor([1, 4, 2, 5, 0, 3])])


# ---- files


def test_files_of_dc_hold_several_sets(tmp_path):
    path = tmp_path / "res_DC_CIFAR10_ConvNet_2ipc.pt"
    sets = [[draw(6, *SHAPE, seed=seed), torch.arange(K).repeat_interleave(2)] for seed in range(2)]
    torch.save({"data": sets, "accs_all_exps": {"ConvNet": [np.float64(0.3), 0.5]}}, path)
    with pytest.raises(InputError, match="holds 2 sets; say which: --experiment 0 to 1"):
        read_foreign(path)
    with pytest.raises(InputError, match="there is no 2"):
        read_foreign(path, experiment=2)
    found = read_foreign(path, experiment=1)
    assert torch.equal(found.images, sets[1][0]) and found.label_form == "classes" and found.values == "network"
    torch.save({"data": sets[:1], "accs_all_exps": {}}, path)
    assert torch.equal(read_foreign(path).images, sets[0][0])


def test_files_of_idc_and_ncfm_are_pixels_of_an_unknown_factor(tmp_path):
    torch.save([draw(6, *SHAPE), torch.arange(K).repeat_interleave(2)], tmp_path / "data.pt")
    found = read_foreign(tmp_path / "data.pt")
    assert (found.values, found.label_form, found.factor, found.lr) == ("pixels", "classes", None, None)
    for more in ({"experiment": 0}, {"labels": "labels.pt"}):
        with pytest.raises(InputError, match="holds one set with its labels"):
            read_foreign(tmp_path / "data.pt", **more)


def test_files_of_mtt_and_datm_find_those_beside_them(tmp_path):
    images, labels = draw(6, *SHAPE), draw(6, K)
    for name, value in (("images", images), ("labels", labels), ("lr", torch.tensor(0.02))):
        torch.save(value, tmp_path / f"{name}_best.pt")
    for source in (tmp_path, tmp_path / "images_best.pt"):
        found = read_foreign(source)
        assert torch.equal(found.images, images) and torch.equal(found.labels, labels)
        assert found.lr == pytest.approx(0.02) and found.values is found.label_form is None
    assert read_foreign(tmp_path, lr=0.5).lr == 0.5
    torch.save(images, tmp_path / "images_5000.pt")
    with pytest.raises(InputError, match=r"holds 2 sets, images_5000.pt for one; name the file"):
        read_foreign(tmp_path)
    with pytest.raises(InputError, match="no file of labels stands beside it"):
        read_foreign(tmp_path / "images_5000.pt")
    found = read_foreign(tmp_path / "images_5000.pt", labels=tmp_path / "labels_best.pt")
    assert found.lr is None and torch.equal(found.labels, labels)


def test_hostile_and_foreign_files_are_refused(tmp_path):
    class Code:
        def __reduce__(self):
            return (tmp_path.joinpath("ran").touch, ())

    good = {"images": draw(6, *SHAPE).numpy(), "labels": np.arange(6) % K}
    np.savez(tmp_path / "objects.npz", images=np.array([Code()], dtype=object), labels=np.arange(1))
    np.savez(tmp_path / "whole.npz", **good)
    (tmp_path / "cut.npz").write_bytes((tmp_path / "whole.npz").read_bytes()[:-40])
    damaged = bytearray((tmp_path / "whole.npz").read_bytes())
    damaged[200] ^= 1
    (tmp_path / "damaged.npz").write_bytes(damaged)
    np.savez_compressed(tmp_path / "bomb.npz", images=np.zeros((4000, *SHAPE, 30)), labels=np.arange(4000))
    np.savez(tmp_path / "named.npz", x_train=good["images"])
    torch.save({"data": Code()}, tmp_path / "code.pt")
    torch.save({"net": {"weight": draw(3)}, "epoch": torch.tensor(3)}, tmp_path / "labels_other.pt")
    torch.save({"net": {"weight": draw(3)}, "epoch": torch.tensor(3)}, tmp_path / "images_other.pt")
    torch.save({"data": []}, tmp_path / "empty.pt")
    torch.save({"data": [draw(3)]}, tmp_path / "single.pt")
    (tmp_path / "none").mkdir()
    for name, words in (
        ("objects.npz", "holds more than numbers"),
        ("cut.npz", "is damaged"),
        ("damaged.npz", "is damaged"),
        ("bomb.npz", "claims to hold"),
        ("named.npz", "holds no images and no labels; there are x_train"),
        ("code.pt", "would run code"),
        ("images_other.pt", "holds a dict of 2"),
        ("empty.pt", "data is not a list of experiments"),
        ("single.pt", "is not a pair of images and labels"),
        ("none", "holds no set"),
        ("gone.pt", "does not exist"),
        ("gone.npz", "does not exist"),
        ("gone", "does not exist"),
        ("set.safetensors", "in the form of this toolkit"),
    ):
        with pytest.raises(InputError, match=words) as error:
            read_foreign(tmp_path / name)
        assert str(tmp_path / name) in str(error.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("to", ["png", "huggingface"])
def test_a_damaged_or_hostile_table_is_refused(tmp_path, to):
    export_set(made(3), to, tmp_path / "out")
    table = tmp_path / "out" / ("labels.csv" if to == "png" else "train/metadata.jsonl")
    whole = table.read_text()
    assert len(read_foreign(tmp_path / "out").images) == 6
    table.write_text(whole[:-9])
    with pytest.raises(InputError, match="is not the whole table that set.json is of"):
        read_foreign(tmp_path / "out")
    for bad, words in (
        (whole.replace("0_cat", "../../0_cat"), "is not in its folder"),
        (whole.replace("0_cat/", "/etc/"), "is not in its folder"),
        (whole.replace("2_ox", "2_ow"), "cannot be read"),
        ("", "is damaged"),
        ("[" * 9999, "is damaged"),
        (whole.replace("logit", "x"), "is damaged"),
    ):
        table.write_text(bad)
        about = json.loads((tmp_path / "out" / "set.json").read_text())
        about["table"] = hashlib.sha256(bad.encode()).hexdigest()
        (tmp_path / "out" / "set.json").write_text(json.dumps(about))
        with pytest.raises(InputError, match=words):
            read_foreign(tmp_path / "out")
    (tmp_path / "out" / "set.json").write_text("[" * 99999)
    with pytest.raises(InputError, match="does not say what set it is of"):
        read_foreign(tmp_path / "out")


# ---- 8 bits


def test_what_eight_bits_lose_is_measured():
    """Against the definition, in float64; what is inside of 0..1 loses half a level at most."""
    synthetic = made(3)
    levels, lost = eight_bits(synthetic)
    exact = 255 * (0.25 * synthetic.images.double() + 0.5)
    expected = np.clip(np.rint(exact.numpy()), 0, 255)
    assert np.array_equal(levels.numpy(), expected)
    error = np.abs(expected - exact.numpy())
    assert lost["max_error"] == pytest.approx(error.max(), abs=1e-4) and 0.4 < error.max() < 0.5
    assert lost["mean_error"] == pytest.approx(error.mean(), abs=1e-4) and lost["clipped"] == 0
    far = synthetic.images.clone()
    far[0, 0, 0, :2] = torch.tensor([-4.0, 6.0])  # -0.5 and 2.0 as pixels
    _, lost = eight_bits(made(3, images=far))
    assert lost["max_error"] == pytest.approx(255, abs=1e-3) and lost["clipped"] == pytest.approx(2 / far.numel())


@pytest.mark.parametrize("channels, mode", [(1, "L"), (3, "RGB")])
def test_pictures_of_images_that_are_not_square(tmp_path, channels, mode):
    synthetic = made(channels)
    export_set(synthetic, "png", tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *("0_cat", "1_T-shirt-top", "2_ox"),
        *("labels.csv", "set.json"),
    ]
    with Image.open(tmp_path / "out" / "2_ox" / "00001.png") as picture:
        assert (picture.mode, picture.size) == (mode, (6, 4))
    back = read_foreign(tmp_path / "out")
    assert torch.equal(back.images, eight_bits(synthetic)[0]) and torch.equal(back.labels, synthetic.labels)


@pytest.mark.parametrize("to", ["png", "huggingface"])
def test_other_numbers_of_channels_are_no_pictures(tmp_path, to):
    with pytest.raises(InputError, match="pictures have 1 or 3 channels, the set's images have 2; export it to npz"):
        export_set(made(2), to, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    export_set(made(2), "npz", tmp_path / "out")
    assert torch.equal(read_foreign(tmp_path / "out").images, made(2).images)


def test_an_export_that_fails_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(Image.Image, "save", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OSError) as error:
        export_set(made(3), "png", tmp_path / "out")
    assert error.value.filename == str(tmp_path / "out") and not list(tmp_path.iterdir())


def test_a_folder_that_holds_something_is_not_written_to(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(InputError, match="out is there already"):
        export_set(made(3), "npz", tmp_path / "out")
    (tmp_path / "out" / "mine").unlink()
    export_set(made(3), "npz", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["set.npz"]


# ---- a set to begin with


@pytest.mark.parametrize("ipc", [1, 2, 3, 5])
def test_a_set_to_begin_with_is_chosen_from_or_repeated_class_by_class(ipc, caplog):
    start = made(ipc=3)
    caplog.set_level("INFO", "pad")
    images, labels = from_set(start, ipc, seed=4, device=torch.device("cpu"))
    again, _ = from_set(start, ipc, seed=4, device=torch.device("cpu"))
    assert torch.equal(images, again) and len(images) == K * ipc
    places = [next(i for i in range(9) if torch.equal(start.images[i], image)) for image in images]
    assert torch.equal(labels, start.labels[places])
    for c in range(K):
        counts = [places[c * ipc : (c + 1) * ipc].count(3 * c + i) for i in range(3)]
        assert sum(counts) == ipc and max(counts) - min(counts) <= 1
    assert places == list(range(9)) or ipc != 3
    assert ("taken" in caplog.text, "repeated" in caplog.text) == (ipc < 3, ipc > 3)


def test_which_images_are_chosen_goes_by_the_seed():
    start = made(ipc=6)
    drawn = [from_set(start, 2, seed=seed, device=torch.device("cpu"))[0] for seed in range(4)]
    assert len({images.numpy().tobytes() for images in drawn}) > 1


def test_hard_labels_are_those_of_the_classes():
    _, labels = from_set(made(), 2, seed=0, device=torch.device("cpu"), hard=True)
    assert torch.equal(labels, hard_logits(torch.arange(K).repeat_interleave(2), K))
