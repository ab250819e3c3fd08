import gzip
import io
import os
import pickle
import socket
import struct
import tarfile
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image
from torchvision import datasets

from pad.data import folders
from pad.data.folders import IMAGENET_SUBSETS
from pad.data.images import ImageData
from pad.data.sources import DATA_SETS, DataSet, load_data
from pad.errors import InputError


def picture(seed: int, size=(8, 8), channels=3) -> np.ndarray:
    shape = (*size, channels) if channels > 1 else size
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write(path: Path, pixels: np.ndarray, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


def tree(root: Path, classes=("ant", "bee"), parts=("train", "test"), count=3, **options) -> Path:
    """``<part>/<class>/<i>.png`` of random images."""
    seed = 0
    for part in parts:
        for name in classes:
            for i in range(count):
                write(root / part / name / f"{i}.png", picture(seed := seed + 1, **options))
    return root


@pytest.fixture
def no_network(monkeypatch):
    """Every connection fails; returns the list of addresses that were asked for."""
    asked = []

    def refuse(request, *args, **kwargs):
        asked.append(getattr(request, "full_url", request))
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    return asked


# ---- the embedded set


def test_mini_counts_shapes_and_order():
    data = load_data("FashionMNISTMini", None)
    assert data.train_images.shape == (4000, 1, 28, 28) and data.test_images.shape == (1000, 1, 28, 28)
    assert data.train_images.dtype == data.test_images.dtype == torch.uint8
    assert data.train_labels.dtype == data.test_labels.dtype == torch.int64
    assert data.train_labels.bincount().tolist() == [400] * 10 and data.test_labels.bincount().tolist() == [100] * 10
    assert (data.num_classes, data.channels, data.size) == (10, 1, (28, 28))
    assert data.class_names == tuple(datasets.FashionMNIST.classes)
    assert (data.mean, data.std) == ((0.2861,), (0.3530,))
    # a real picture each, not a sheet cut at the wrong places: trousers have a gap between the legs, the border is dark
    trousers = data.train_images[data.train_labels == 1, 0].float()
    assert trousers[:, 24, 13:15].mean() < trousers[:, 24, 9:12].mean() / 2
    assert data.train_images[..., 0].float().mean() < 10 < 60 < data.train_images[..., 14].float().mean()


def test_mini_equals_the_original_files():
    folder = os.environ.get("PAD_FASHION_MNIST")
    if not folder:
        pytest.skip("PAD_FASHION_MNIST does not name a folder with the four original IDX files")
    data = load_data("FashionMNISTMini", None)
    for part, count, images in (("train", 400, data.train_images), ("t10k", 100, data.test_images)):
        pixels = gzip.open(Path(folder) / f"{part}-images-idx3-ubyte.gz").read()[16:]
        labels = gzip.open(Path(folder) / f"{part}-labels-idx1-ubyte.gz").read()[8:]
        for label in range(10):
            places = [i for i, byte in enumerate(labels) if byte == label][:count]
            wanted = b"".join(pixels[784 * i : 784 * (i + 1)] for i in places)
            assert images[count * label : count * (label + 1)].numpy().tobytes() == wanted


def test_fashion_mnist_from_the_original_files(tmp_path, no_network):
    folder = os.environ.get("PAD_FASHION_MNIST")
    if not folder:
        pytest.skip("PAD_FASHION_MNIST does not name a folder with the four original IDX files")
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for file in Path(folder).glob("*.gz"):
        (raw / file.stem).write_bytes(gzip.decompress(file.read_bytes()))
    data = load_data("FashionMNIST", tmp_path)
    assert data.train_images.shape == (60000, 1, 28, 28) and data.test_labels.shape == (10000,) and not no_network
    mini = load_data("FashionMNISTMini", None)
    assert torch.equal(data.train_images[data.train_labels == 3][:400], mini.train_images[mini.train_labels == 3])
    assert data.class_names == mini.class_names


def test_fingerprint_and_identity():
    data = load_data("FashionMNISTMini", None)
    again = load_data("FashionMNISTMini", "/nowhere", res=28)
    assert data.fingerprint == again.fingerprint and data.to("cpu").fingerprint == data.fingerprint
    assert data.identity == {
        "dataset": "FashionMNISTMini",
        "fingerprint": data.fingerprint,
        "channels": 1,
        "size": [28, 28],
        "num_classes": 10,
    }
    for change in ("train_images", "train_labels"):
        other = load_data("FashionMNISTMini", None)
        getattr(other, change).view(-1)[-1] += 1
        assert other.fingerprint != data.fingerprint


def test_first_per_class():
    images = torch.arange(8, dtype=torch.uint8).view(8, 1, 1, 1)
    labels = torch.tensor([2, 0, 2, 2, 3, 0, 2, 3])  # class 1 has none
    data = ImageData(
        name="x",
        train_images=images,
        train_labels=labels,
        test_images=images,
        test_labels=labels,
        class_names=tuple("abcd"),
        mean=(0.5,),
        std=(0.5,),
    )
    few = data.first_per_class(2)
    assert few.train_images.flatten().tolist() == [0, 1, 2, 4, 5, 7] and few.train_labels.tolist() == [2, 0, 2, 3, 0, 3]
    assert few.fingerprint != data.fingerprint and torch.equal(few.test_images, images)
    assert torch.equal(data.first_per_class(4).train_images, images)


# ---- torchvision's sets, from tiny files in their formats


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_mnist(raw: Path) -> dict[str, np.ndarray]:
    raw.mkdir(parents=True)
    arrays = {}
    for part, count in (("train", 12), ("t10k", 5)):
        arrays[part] = picture(count, (count * 28, 28), 1).reshape(count, 28, 28)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(idx(arrays[part]))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(idx(np.arange(count, dtype=np.uint8) % 10))
    return arrays


def skip_checksums(monkeypatch):
    for module in (datasets.cifar, datasets.svhn):
        monkeypatch.setattr(module, "check_integrity", lambda path, md5=None: os.path.isfile(path))


@pytest.mark.parametrize("name, mean, std", [("MNIST", 0.1307, 0.3081), ("FashionMNIST", 0.2861, 0.3530)])
def test_mnist_files(tmp_path, no_network, name, mean, std):
    arrays = write_mnist(tmp_path / name / "raw")
    data = load_data(name, tmp_path)
    assert np.array_equal(data.train_images[:, 0], arrays["train"])
    assert np.array_equal(data.test_images[:, 0], arrays["t10k"])
    assert data.train_labels.tolist() == [*range(10), 0, 1] and data.test_labels.tolist() == [0, 1, 2, 3, 4]
    assert (data.name, data.num_classes, data.mean, data.std) == (name, 10, (mean,), (std,)) and not no_network


@pytest.mark.parametrize("name, key, classes", [("CIFAR10", "labels", 10), ("CIFAR100", "fine_labels", 100)])
def test_cifar_files(tmp_path, monkeypatch, name, key, classes):
    skip_checksums(monkeypatch)
    dataset = getattr(datasets, name)
    folder = tmp_path / dataset.base_folder
    folder.mkdir()
    rows = {}
    for seed, (file, _) in enumerate(dataset.train_list + dataset.test_list):
        rows[file] = picture(seed, (2, 3072), 1)
        (folder / file).write_bytes(pickle.dumps({"data": rows[file], key: [seed, classes - 1]}))
    meta = {dataset.meta["key"]: [f"c{i}" for i in range(classes)]}
    (folder / dataset.meta["filename"]).write_bytes(pickle.dumps(meta))

    data = load_data(name, tmp_path)
    wanted = np.concatenate([rows[file] for file, _ in dataset.train_list]).reshape(-1, 3, 32, 32)
    assert np.array_equal(data.train_images, wanted) and data.train_images.is_contiguous()
    assert data.train_labels[:2].tolist() == [0, classes - 1] and len(data.test_labels) == 2
    assert data.class_names == tuple(meta[dataset.meta["key"]])
    assert data.mean == (0.4914, 0.4822, 0.4465) and data.std == (0.2023, 0.1994, 0.2010)


def test_svhn_files(tmp_path, monkeypatch):
    skip_checksums(monkeypatch)
    pixels = picture(0, (32 * 32, 3), 4).reshape(32, 32, 3, 4)
    for part in ("train", "test"):
        scipy.io.savemat(tmp_path / f"{part}_32x32.mat", {"X": pixels, "y": np.array([[10], [1], [9], [10]], np.uint8)})
    data = load_data("SVHN", tmp_path)
    assert data.train_labels.tolist() == [0, 1, 9, 0]  # the files call the digit 0 "10"
    assert np.array_equal(data.train_images, pixels.transpose(3, 2, 0, 1)) and data.class_names == tuple("0123456789")
    assert data.mean == (0.4377, 0.4438, 0.4728) and data.std == (0.1980, 0.2010, 0.1970)


@pytest.mark.parametrize(
    "name, file",
    [
        ("MNIST", "MNIST/raw/train-images-idx3-ubyte"),
        ("FashionMNIST", "FashionMNIST/raw/t10k-labels-idx1-ubyte"),
        ("SVHN", "test_32x32.mat"),
        ("CIFAR10", "cifar-10-batches-py/data_batch_5"),
        ("CIFAR100", "cifar-100-python/meta"),
    ],
)
def test_missing_files_and_no_network(tmp_path, no_network, capfd, name, file):
    root = tmp_path / "data"
    with pytest.raises(InputError, match=f"{name} cannot be read from .* nor downloaded .*{file}") as caught:
        load_data(name, root)
    assert "\n" not in str(caught.value) and str(root) in str(caught.value)
    assert not root.exists() and no_network
    assert capfd.readouterr() == ("", "") and socket.getdefaulttimeout() is None


def test_download_of_wrong_bytes(tmp_path, monkeypatch, capfd):
    """What arrives is checked, is not kept, and shows no progress bar."""

    class Answer(io.BytesIO):
        length, url = 9, None

    monkeypatch.setattr(urllib.request, "urlopen", lambda *args, **kwargs: Answer(b"not found"))
    with pytest.raises(InputError, match=r"nor downloaded \(File not found or corrupted\); expected there: train_32"):
        load_data("SVHN", tmp_path)
    assert not list(tmp_path.iterdir()) and capfd.readouterr() == ("", "")


def test_interrupted_download_leaves_nothing(tmp_path, monkeypatch):
    def half(self, *args):
        raw = Path(self.raw_folder)
        raw.mkdir(parents=True)
        (raw / "train-images-idx3-ubyte").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(datasets.MNIST, "download", half)
    (tmp_path / "mine.txt").write_text("stays")
    with pytest.raises(KeyboardInterrupt):
        load_data("MNIST", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_archive_beside_is_unpacked(tmp_path, monkeypatch, no_network):
    """Archives with the right checksum replace the network, and torn unpacked files."""
    write_mnist(tmp_path / "made" / "MNIST" / "raw")
    resources = []
    (tmp_path / "data" / "MNIST" / "raw").mkdir(parents=True)
    (tmp_path / "data" / "MNIST" / "raw" / "train-images-idx3-ubyte").write_bytes(b"torn")
    for name, _ in datasets.MNIST.resources:
        archive = tmp_path / "data" / name
        unpacked = tmp_path / "made" / "MNIST" / "raw" / name.removesuffix(".gz")
        archive.write_bytes(gzip.compress(unpacked.read_bytes()))
        resources.append((name, datasets.utils.calculate_md5(archive)))
    monkeypatch.setattr(datasets.MNIST, "resources", resources)
    data = load_data("MNIST", tmp_path / "data")
    assert len(data.train_labels) == 12 and not no_network
    for archive, _ in resources:
        (tmp_path / "data" / archive).unlink()
    assert load_data("MNIST", tmp_path / "data").fingerprint == data.fingerprint and not no_network
    assert not list((tmp_path / "data").glob("*.partial"))


@pytest.mark.parametrize(
    "file, content, message",
    [
        ("t10k-labels-idx1-ubyte", lambda count: np.full(count, 10, np.uint8), "labels are not numbers of 10 classes"),
        ("train-images-idx3-ubyte", lambda count: np.zeros((count, 28, 27), np.uint8), "images are not all .* 28x28"),
        ("train-images-idx3-ubyte", lambda count: np.zeros((count + 1, 28, 28), np.uint8), "13 images but 12 labels"),
    ],
)
def test_damaged_mnist_is_refused(tmp_path, no_network, file, content, message):
    write_mnist(tmp_path / "MNIST" / "raw")
    count = len(
        load_data("MNIST", tmp_path).train_labels if "train" in file else load_data("MNIST", tmp_path).test_labels
    )
    (tmp_path / "MNIST" / "raw" / file).write_bytes(idx(content(count)))
    with pytest.raises(InputError, match=f"MNIST in .* is damaged: .*{message}"):
        load_data("MNIST", tmp_path)


def test_wrong_archive_stays_as_it_is(tmp_path, no_network):
    archive = tmp_path / "cifar-10-python.tar.gz"
    with tarfile.open(archive, "w:gz"):
        pass
    before = archive.read_bytes()
    with pytest.raises(InputError, match="CIFAR10 cannot be read.*nor downloaded"):
        load_data("CIFAR10", tmp_path)
    assert archive.read_bytes() == before and no_network and len(list(tmp_path.iterdir())) == 1


# ---- trees of files


def test_image_folder_order_and_pixels(tmp_path):
    """torchvision's own ImageFolder says what order and pixels are right."""
    tree(tmp_path, classes=("bee", "Ant", "10", "9"), count=2, size=(6, 9))
    for odd in ("10.png", "9.PNG", "0.5.bmp"):
        write(tmp_path / "train" / "bee" / odd, picture(99, (6, 9)))
    write(tmp_path / "train" / "bee" / "deeper" / "a.png", picture(7, (6, 9)))
    (tmp_path / "train" / "bee" / "notes.txt").write_text("not an image")
    (tmp_path / "train" / ".hidden").mkdir()
    data = load_data("ImageFolder", tmp_path)
    (tmp_path / "train" / ".hidden").rmdir()
    parts = {"train": (data.train_images, data.train_labels), "test": (data.test_images, data.test_labels)}
    for part, (images, labels) in parts.items():
        reference = datasets.ImageFolder(tmp_path / part)
        assert labels.tolist() == reference.targets and data.class_names == tuple(reference.classes)
        assert np.array_equal(images, np.stack([np.asarray(image).transpose(2, 0, 1) for image, _ in reference]))
    assert (data.name, data.size, data.channels, data.num_classes) == ("ImageFolder", (6, 9), 3, 4)
    pixels = data.train_images.double() / 255
    assert torch.tensor(data.mean).allclose(pixels.mean((0, 2, 3)).float())
    assert torch.tensor(data.std).allclose(pixels.std((0, 2, 3), correction=0).float())


def test_image_folder_many_files_keep_their_places(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "_CHUNK", 7)  # many chunks, several threads
    monkeypatch.setattr("pad.data.images._CHUNK", 7)
    for i in range(100):
        write(tmp_path / "train" / "ab"[i % 2] / f"{i:03}.png", np.full((2, 2, 3), i, np.uint8))
    tree(tmp_path, "ab", ("val",), 1, size=(2, 2))
    data = load_data("ImageFolder", tmp_path)
    assert data.train_images[:, 0, 0, 0].tolist() == [*range(0, 100, 2), *range(1, 100, 2)]
    assert data.mean == pytest.approx([49.5 / 255] * 3, rel=1e-12)


def test_image_folder_grey_and_constant(tmp_path):
    for part in ("train", "val"):
        for name in "ab":
            write(tmp_path / part / name / "0.png", np.full((4, 4), 51, np.uint8))
    data = load_data("ImageFolder", tmp_path)
    assert data.channels == 1 and data.mean == (0.2,) and data.std == (1 / 255,)  # not zero, one divides by it
    write(tmp_path / "train" / "b" / "1.png", picture(0, (4, 4)))
    with pytest.raises(InputError, match="1.png is in colour"):
        load_data("ImageFolder", tmp_path)
    write(tmp_path / "train" / "b" / "0.png", picture(0, (4, 4)))
    data = load_data("ImageFolder", tmp_path)
    assert data.channels == 3 and data.train_images[0].unique().tolist() == [51]


def test_image_folder_test_or_val(tmp_path):
    """val serves when test has no labels (ImageNet's and Tiny's test folders)."""
    tree(tmp_path, parts=("train", "val"))
    (tmp_path / "test").mkdir()
    write(tmp_path / "test" / "0.png", picture(0))
    assert len(load_data("ImageFolder", tmp_path).test_labels) == 6
    tree(tmp_path, parts=("test",), count=1)
    assert len(load_data("ImageFolder", tmp_path).test_labels) == 2


def test_res_resizes_without_keeping_the_aspect_ratio(tmp_path):
    tree(tmp_path, size=(10, 20))
    write(tmp_path / "train" / "bee" / "0.png", picture(50, (31, 17)))
    with pytest.raises(InputError, match=r"bee/0.png is 17x31 pixels, but the first image is 20x10; give a res"):
        load_data("ImageFolder", tmp_path)
    data = load_data("ImageFolder", tmp_path, res=5)
    assert data.size == (5, 5) and data.test_images.shape == (6, 3, 5, 5)
    source = torch.from_numpy(picture(1, (10, 20))).permute(2, 0, 1)[None].double()
    wanted = torch.nn.functional.interpolate(source, (5, 5), mode="bilinear", antialias=True)
    assert (data.train_images[0] - wanted).abs().max() <= 1


def wide_tree(root: Path, filled: dict[str, int]) -> Path:
    """1,000 ImageNet-like class folders, of which only ``filled`` (wnid -> grey value) hold an image."""
    for part in ("train", "val"):
        for i in range(1000):
            (root / part / f"n{i * 7:08}").mkdir(parents=True)
        for wnid, value in filled.items():
            pixels = np.full((30, 20, 3), value + (part == "val"), np.uint8)
            write(root / part / wnid / "x.JPEG", pixels, format="JPEG", quality=95)
    return root


def test_imagenet_subset(tmp_path):
    order = IMAGENET_SUBSETS["imagemeow"]  # not sorted: labels follow the published order, files the wnids'
    root = wide_tree(tmp_path, {f"n{index * 7:08}": 20 * label + 10 for label, index in enumerate(order)})
    data = load_data("ImageNet", root, subset="imagemeow")
    assert (data.name, data.size, data.num_classes) == ("ImageNet/imagemeow", (128, 128), 10)
    assert data.train_labels.tolist() == sorted(range(10), key=lambda label: order[label]) != list(range(10))
    assert data.class_names == tuple(f"n{index * 7:08}" for index in order)
    for image, label in zip(data.train_images, data.train_labels):
        assert (image.float() - (20 * label + 10)).abs().max() <= 2
    assert data.mean == (0.485, 0.456, 0.406) and data.std == (0.229, 0.224, 0.225)
    assert load_data("ImageNet", root, subset="imagemeow", res=32).size == (32, 32)
    with pytest.raises(InputError, match="n00000000 holds no image"):
        load_data("ImageNet1K", root)
    with pytest.raises(InputError, match="holds no image"):
        load_data("ImageNet", root, subset="imagewoof")
    (root / "train" / "n00000007").rmdir()
    with pytest.raises(InputError, match="holds 999 class folders"):
        load_data("ImageNet", root, subset="imagemeow")


def test_imagenet1k(tmp_path):
    root = wide_tree(tmp_path, {f"n{i * 7:08}": i % 200 for i in range(1000)})
    data = load_data("ImageNet1K", root)
    assert data.train_images.shape == (1000, 3, 64, 64) and data.train_labels.tolist() == list(range(1000))
    assert (data.name, data.num_classes) == ("ImageNet1K", 1000)


def test_subsets_are_ten_different_classes():
    names = "imagenette imagewoof imagefruit imageyellow imagemeow imagesquawk"
    assert list(IMAGENET_SUBSETS) == names.split()
    assert all(len(set(row)) == 10 and 0 <= min(row) and max(row) < 1000 for row in IMAGENET_SUBSETS.values())


def test_tiny_layouts(tmp_path):
    """The reorganised tree and the one of the zip archive are the same data in the same order."""
    sorted_root, zip_root = tmp_path / "sorted", tmp_path / "zip" / "tiny-imagenet-200"
    lines, seed = [], 0
    for wnid in ("n02", "n01", "n03"):
        for i in range(12):
            name, pixels = f"{wnid}_{i}.JPEG", picture(seed := seed + 1, (64, 64), 3 if i else 1)
            write(sorted_root / "train" / wnid / name, pixels)
            write(zip_root / "train" / wnid / "images" / name, pixels)
        (zip_root / "train" / wnid / f"{wnid}_boxes.txt").write_text("a box")
    for i in range(12):
        wnid, name, pixels = ("n02", "n01", "n03")[i % 3], f"val_{i}.JPEG", picture(100 + i, (64, 64))
        write(sorted_root / "val" / "images" / wnid / name, pixels)
        write(zip_root / "val" / "images" / name, pixels)
        lines.append(f"{name}\t{wnid}\t0\t32\t44\t62\n")
    (zip_root / "val" / "val_annotations.txt").write_text("".join(lines))

    one, two = load_data("Tiny", sorted_root), load_data("Tiny", zip_root.parent)
    assert one.fingerprint == two.fingerprint
    assert torch.equal(one.test_images, two.test_images) and torch.equal(one.test_labels, two.test_labels)
    reference = datasets.ImageFolder(sorted_root / "val" / "images")
    assert one.test_labels.tolist() == reference.targets and one.class_names == ("n01", "n02", "n03")
    assert np.array_equal(one.test_images[5], np.asarray(reference[5][0]).transpose(2, 0, 1))
    assert one.train_images.shape == (36, 3, 64, 64) and one.mean == (0.485, 0.456, 0.406)

    (zip_root / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn99\n")
    with pytest.raises(InputError, match="val_annotations.txt names a class"):
        load_data("Tiny", zip_root)
    (zip_root / "val" / "val_annotations.txt").unlink()
    with pytest.raises(InputError, match="val_annotations.txt"):
        load_data("Tiny", zip_root)
    with pytest.raises(InputError, match="val/images is not a folder"):
        load_data("Tiny", tree(tmp_path / "other"))


# ---- what cannot be used


@pytest.mark.parametrize(
    "arguments, options, message",
    [
        (("CIFAR", None), {}, r"'CIFAR'; did you mean CIFAR10\?"),
        (("cifar100", None), {}, r"'cifar100'; did you mean CIFAR100\?"),
        ((None, None), {}, "no data set None.*ImageFolder"),
        (("ImageNet", "."), {}, "ImageNet needs one of its subsets, not None.*imagesquawk"),
        (("ImageNet", "."), {"subset": "imagewoofs"}, r"'imagewoofs'; did you mean imagewoof\?"),
        (("CIFAR10", "."), {"subset": "imagenette"}, "subset 'imagenette' .*CIFAR10 has none"),
        (("CIFAR10", "."), {"res": 64}, "res 64 was given, but CIFAR10 has 32 pixels"),
        (("ImageFolder", "."), {"res": 0}, "res must be a positive whole number of pixels, not 0"),
        (("ImageFolder", "."), {"res": "64"}, "not '64'"),
        (("ImageFolder", None), {}, "ImageFolder needs a data_path"),
        (("MNIST", None), {}, "MNIST needs a data_path"),
        (("Tiny", "/no/such/folder"), {}, "/no/such/folder is not a folder"),
    ],
)
def test_bad_arguments(arguments, options, message):
    with pytest.raises(InputError, match=message) as caught:
        load_data(*arguments, **options)
    assert "\n" not in str(caught.value)


def test_every_name_is_known():
    for name in DATA_SETS:
        if name != "FashionMNISTMini":
            with pytest.raises(InputError, match=name):
                load_data(name, None, subset="imagenette" if name == "ImageNet" else None)


def test_a_row_of_ones_own(tmp_path, monkeypatch):
    """Its load function gets what the row allows, and the sizes that it names."""
    rows = {
        "Plain": DataSet(load=lambda *asked: asked),
        "Sized": DataSet(load=lambda *asked: asked, needs_path=True, fixed_size=8),
        "Parts": DataSet(load=lambda *asked: asked, subsets=("left", "right"), default_size=16),
    }
    monkeypatch.setattr("pad.data.sources.DATA_SETS", DATA_SETS | rows)
    assert load_data("Plain", None) == (None, None, None) and load_data("Plain", "x", res=3) == (Path("x"), None, 3)
    assert load_data("Sized", tmp_path) == (tmp_path, None, 8)
    assert load_data("Parts", None, subset="left") == (None, "left", 16)
    assert load_data("Parts", None, subset="right", res=4) == (None, "right", 4)
    for name, options, message in [
        ("plain", {}, "did you mean Plain"),
        ("Plain", {"subset": "left"}, "only ImageNet, Parts has subsets, Plain has none"),
        ("Sized", {}, "Sized needs a data_path"),
        ("Sized", {"res": 9}, "Sized has 8 pixels a side"),
        ("Parts", {"subset": "lef"}, "Parts needs one of its subsets, not 'lef'; did you mean left"),
    ]:
        with pytest.raises(InputError, match=message):
            load_data(name, None, **options)


def damage_truncate(root: Path) -> None:
    file = write(root / "train" / "bee" / "2.jpg", picture(0, (64, 64)))
    file.write_bytes(file.read_bytes()[:900])


def damage_mismatch(root: Path) -> None:
    write(root / "test" / "cat" / "0.png", picture(0))


def damage_deep(root: Path) -> None:
    write(root / "test" / "ant" / "0.png", picture(0, channels=1).astype(np.uint16))


def damage_empty(root: Path) -> None:
    for file in (root / "test" / "bee").iterdir():
        file.unlink()


def damage_no_test(root: Path) -> None:
    (root / "test").rename(root / "validation")


def damage_one_class(root: Path) -> None:
    (root / "train" / "bee").rename(root / "bee")


@pytest.mark.parametrize(
    "damage, message",
    [
        (damage_truncate, "bee/2.jpg cannot be read as an image .*truncated"),
        (lambda root: (root / "test" / "ant" / "0.png").write_bytes(b"no image"), "test/ant/0.png cannot be read"),
        (lambda root: (root / "train" / "ant" / "0.png").write_bytes(b""), "train/ant/0.png cannot be read"),
        (damage_deep, "test/ant/0.png has more than 8 bits"),
        (damage_mismatch, "differ in their class folders: 'cat'"),
        (damage_empty, "test/bee holds no image"),
        (damage_no_test, "neither a test nor a val folder"),
        (damage_one_class, "train holds 1 class folders"),
        (lambda root: (root / "train").rename(root / "training"), "train is not a folder"),
    ],
)
def test_bad_trees(tmp_path, damage, message):
    damage(tree(tmp_path))
    with pytest.raises(InputError, match=message) as caught:
        load_data("ImageFolder", tmp_path, res=8)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("limit", [60, 20])  # PIL warns above its limit, and refuses above twice the limit
def test_decompression_bomb(tmp_path, monkeypatch, recwarn, limit):
    tree(tmp_path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(InputError, match=f"0.png has more pixels than the {limit}"):
        load_data("ImageFolder", tmp_path)
    assert not [warning for warning in recwarn if "decompression" in str(warning.message)]


def test_more_pixels_than_memory(tmp_path):
    with pytest.raises(InputError, match="6 images .* GB, more memory than there is; give a smaller res"):
        load_data("ImageFolder", tree(tmp_path), res=10_000_000)
