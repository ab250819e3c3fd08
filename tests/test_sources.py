import gzip
import io
import os
import pickle
import re
import shutil
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
    monkeypatch.setattr("pad.data.decoding._CHUNK", 7)  # many chunks, several threads
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


@pytest.mark.parametrize("where", ["train/a/1.png", "train/b/0.png", "test/b/1.png"])
def test_one_image_in_colour_makes_three_channels(tmp_path, where):
    tree(tmp_path, "ab", channels=1)
    Image.new("LA", (8, 8)).save(tmp_path / "train" / "a" / "2.png")
    grey = load_data("ImageFolder", tmp_path)
    assert grey.channels == 1 and np.array_equal(grey.train_images[5, 0], picture(6, channels=1))
    pixels = picture(99)
    write(tmp_path / where, pixels)
    data = load_data("ImageFolder", tmp_path)
    part, name, file = where.split("/")
    place = "ab".index(name) * 3 + int(file[0])
    changed, other = (data.train_images, grey.train_images) if part == "train" else (data.test_images, grey.test_images)
    assert data.channels == 3 and np.array_equal(changed[place], pixels.transpose(2, 0, 1))
    kept = [i for i in range(6) if i != place]
    assert torch.equal(changed[kept], other[kept].expand(-1, 3, -1, -1))


def add_litter(root: Path) -> None:
    """What macOS, Windows, a Synology, Jupyter and archives leave in ``root``, a part of a data set."""
    for folder in (root, root / "ant"):
        for name in (
            ".ipynb_checkpoints",
            ".AppleDouble",
            "__MACOSX",
            "@eaDir",
            "#recycle",
            "$RECYCLE.BIN",
            "lost+found",
        ):
            write(folder / name / "deeper" / "0.png", picture(0))
        for name in ("._1.png", ".DS_Store", "Thumbs.db", "desktop.ini", "Icon\r", ".hidden.png"):
            (folder / name).write_bytes(b"litter")


def test_litter_is_no_image_and_no_class(tmp_path, caplog):
    clean = load_data("ImageFolder", tree(tmp_path))
    add_litter(tmp_path / "train")
    add_litter(tmp_path / "test")
    data = load_data("ImageFolder", tmp_path)
    assert data.fingerprint == clean.fingerprint and torch.equal(data.test_images, clean.test_images)
    assert not caplog.records


def test_what_several_ways_lead_to_is_one_image(tmp_path):
    root = tree(tmp_path / "set")
    clean = load_data("ImageFolder", root).fingerprint
    for name, target in (("all", "."), ("up", ".."), ("itself", "itself")):
        (root / "train" / name).symlink_to(target)
        (root / "train" / "ant" / name).symlink_to(target)
    (root / "train" / "ant" / "0again.png").symlink_to("1.png")
    (root / "train" / "ant" / "0far.png").symlink_to(root / "train" / "ant" / "2.png")
    assert load_data("ImageFolder", root).fingerprint == clean

    # elsewhere: two ways to the same folder, which leads back; its images come where the first way's name sorts
    pixels = write(tmp_path / "more" / "deeper" / "x.png", picture(50)) and picture(50)
    (tmp_path / "more" / "back").symlink_to(root)
    (root / "train" / "bee" / "also").symlink_to(tmp_path / "more")
    (root / "train" / "bee" / "more").symlink_to(tmp_path / "more")
    (root / "train" / "bee" / "one.png").symlink_to(tmp_path / "more" / "deeper" / "x.png")
    data = load_data("ImageFolder", root)
    assert data.train_labels.tolist() == [0] * 3 + [1] * 4
    assert np.array_equal(data.train_images[-1], pixels.transpose(2, 0, 1))
    assert np.array_equal(data.train_images[3], picture(4).transpose(2, 0, 1))

    # a class that is a link, as subsets of a large data set are made
    (root / "train" / "bee").rename(tmp_path / "bee")
    (root / "train" / "bee").symlink_to(tmp_path / "bee")
    assert load_data("ImageFolder", root).fingerprint == data.fingerprint


def test_what_is_left_out_is_said_in_one_line(tmp_path, caplog):
    tree(tmp_path)
    clean = load_data("ImageFolder", tmp_path).fingerprint
    for name in ("ant/7.HEIC", "ant/8.heic", "ant/deep/8.png.part", "bee/9.jpg.crdownload", "bee/README"):
        (tmp_path / "train" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "train" / name).write_bytes(b"")
    write(tmp_path / "test" / "0.png", picture(0))
    assert load_data("ImageFolder", tmp_path).fingerprint == clean
    said = {record.getMessage().replace(str(tmp_path), "") for record in caplog.records}
    assert said == {
        "/train: files that are not read as images are left out: .heic 2, .part 1, .crdownload 1, no ending 1; "
        "by class: ant 3, bee 2",
        "/test: images that lie in no class folder are left out: 1",
    }
    for file in (tmp_path / "train" / "ant").glob("*.png"):
        file.unlink()
    with pytest.raises(InputError, match="train/ant holds no image of a format that is read, but .heic 2, .part 1$"):
        load_data("ImageFolder", tmp_path)


@pytest.mark.parametrize("ending", ["gif", "JFIF", "webp", "jp2", "tga", "bmp", "tif", "avif", "qoi"])
def test_formats_that_pillow_reads(tmp_path, caplog, ending):
    """Right in a folder of PNG, and under another format's ending; of an animation, the first picture."""
    caplog.set_level("INFO", "pad")
    Image.init()
    if Image.EXTENSION.get(f".{ending.lower()}") not in Image.SAVE:
        pytest.skip("this Pillow cannot write the format")
    tree(tmp_path)
    # one colour an image, which no format changes by more than a little
    first, second = (Image.new("RGB", (8, 8), colour) for colour in ("#c04080", "#20e010"))
    several = {"save_all": True, "append_images": [second]} if ending in ("gif", "webp", "avif", "tif") else {}
    first.save(tmp_path / "train" / "ant" / f"9.{ending}", **several)
    first.save(tmp_path / "train" / "bee" / "9.png", format=Image.EXTENSION[f".{ending.lower()}"])
    data = load_data("ImageFolder", tmp_path)
    for image in data.train_images[[3, 7]]:
        assert (image.permute(1, 2, 0) - torch.tensor([0xC0, 0x40, 0x80]).float()).abs().max() < 8
    format = Image.EXTENSION[f".{ending.lower()}"]
    assert [f"several formats are read: PNG 7, {format} 1" in record.getMessage() for record in caplog.records] == [
        True
    ]


def test_no_format_is_read_by_another_program_or_by_any_decoder():
    from pad.data.decoding import endings

    assert not {"EPS", "WMF", "IPTC", "PDF", "HDF5", "GRIB", "BUFR", "MPEG"} & set(endings().values())
    assert {".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff"} <= set(endings())


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["png", "jpg", "tif"])
def test_images_are_turned_as_their_exif_says(tmp_path, orientation, ending):
    """The EXIF specification says where the first row and the first column of the file are on the screen."""
    row, column = {
        **{1: ("top", "left"), 2: ("top", "right"), 3: ("bottom", "right"), 4: ("bottom", "left")},
        **{5: ("left", "top"), 6: ("right", "top"), 7: ("right", "bottom"), 8: ("left", "bottom")},
    }[orientation]
    pixels = np.zeros((16, 24), np.uint8)
    pixels[:8], pixels[:, :8] = 128, pixels[:, :8] + 64  # the first rows, and columns, are brighter
    pixels[:8, :8] += 64
    side = {"top": 0, "bottom": 1, "left": 2, "right": 3}
    exif = Image.Exif()
    exif[0x0112] = orientation
    for part in ("train", "test"):
        for name in "ab":
            write(tmp_path / part / name / f"0.{ending}", pixels, exif=exif)
    data = load_data("ImageFolder", tmp_path)
    image = data.train_images[0, 0].float()
    assert data.size == ((16, 24) if orientation < 5 else (24, 16))
    edges = [image[:4].mean(), image[-4:].mean(), image[:, :4].mean(), image[:, -4:].mean()]

    def brighter(where):
        return edges[side[where]] > edges[side[where] ^ 1] + 20

    assert brighter(row) and brighter(column)


def test_turned_images_fit_by_the_size_that_is_seen(tmp_path):
    tree(tmp_path, size=(12, 8))
    exif = Image.Exif()
    exif[0x0112] = 6
    write(tmp_path / "train" / "bee" / "1.png", picture(60, (8, 12)), exif=exif)
    data = load_data("ImageFolder", tmp_path)
    assert np.array_equal(data.train_images[4], np.rot90(picture(60, (8, 12)), -1).transpose(2, 0, 1))
    write(tmp_path / "train" / "bee" / "1.png", picture(60, (12, 8)), exif=exif)
    with pytest.raises(InputError, match="bee/1.png is 12x8 pixels, but the first image is 8x12"):
        load_data("ImageFolder", tmp_path)


def test_published_trees_lie_as_in_their_files(tmp_path):
    """Pixels of Tiny ImageNet are torchvision's: what was computed of them must fit."""
    exif = Image.Exif()
    exif[0x0112] = 3
    for part in ("train", "val/images"):
        for name in ("n01", "n02"):
            write(tmp_path / part / name / "0.png", picture(1, (64, 64)), exif=exif)
    assert np.array_equal(load_data("Tiny", tmp_path).train_images[0], picture(1, (64, 64)).transpose(2, 0, 1))


def test_damaged_exif_turns_nothing(tmp_path):
    tree(tmp_path)
    write(tmp_path / "train" / "ant" / "0.png", picture(1), exif=b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0")
    write(tmp_path / "train" / "ant" / "1.png", picture(2), exif=b"Exif\0\0no TIFF at all")
    data = load_data("ImageFolder", tmp_path)
    assert np.array_equal(data.train_images[:2], np.stack([picture(1), picture(2)]).transpose(0, 3, 1, 2))


def test_colour_modes(tmp_path):
    """Palettes are looked up, transparency is left out, and no warning is given."""
    tree(tmp_path)
    pixels = picture(70)
    palette = Image.fromarray(pixels).quantize(8)
    palette.save(tmp_path / "train" / "ant" / "0.png", transparency=bytes(range(8)))
    write(tmp_path / "train" / "ant" / "1.png", np.dstack([pixels, picture(71)[..., 0]]))
    cmyk = np.zeros((8, 8, 4), np.uint8)
    cmyk[..., 0] = 255  # cyan alone
    Image.fromarray(cmyk, "CMYK").save(tmp_path / "train" / "ant" / "2.jpg", quality=95)
    data = load_data("ImageFolder", tmp_path)
    colours = np.array(palette.getpalette()).reshape(-1, 3)
    assert np.array_equal(data.train_images[0].permute(1, 2, 0), colours[np.asarray(palette)])
    assert np.array_equal(data.train_images[1].permute(1, 2, 0), pixels)
    cyan = data.train_images[2].float().mean((1, 2))
    assert cyan[0] < 10 and cyan[1:].min() > 240


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", r"it is empty, as a copy or a download that was cut short leaves it\)"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "it is a pointer of Git LFS"),
        (None, r"it is a link to a file that is not there\)"),
        (b"<!DOCTYPE html>", "it is of no format that is read"),
    ],
)
@pytest.mark.parametrize("file", ["train/ant/0.png", "test/bee/2.png"])
def test_files_that_are_no_images_are_named_and_why(tmp_path, content, message, file):
    path = tree(tmp_path) / file
    path.unlink()
    path.write_bytes(content) if content is not None else path.symlink_to("../nowhere")
    with pytest.raises(InputError, match=f"{file} cannot be read as an image .{message}"):
        load_data("ImageFolder", tmp_path)


@pytest.mark.parametrize(
    "names, said",
    [
        ([str(i) for i in range(12)], "class 2 is '10', and not '2'"),
        (["9", "10"], "class 0 is '10', and not '9'"),
        ([f"{i:02}" for i in range(12)], None),
        (["1", "10", "9a"], None),
    ],
)
def test_classes_that_are_numbers(tmp_path, caplog, names, said):
    data = load_data("ImageFolder", tree(tmp_path, names, count=1))
    assert data.class_names == tuple(sorted(names))
    assert [record.getMessage().split("as text: ")[1] for record in caplog.records] == ([said] if said else [])


def test_image_folder_test_or_val(tmp_path, caplog):
    """val serves when test has no labels (ImageNet's and Tiny's test folders), or no images."""
    caplog.set_level("INFO", "pad")
    tree(tmp_path, parts=("train", "val"))
    (tmp_path / "test").mkdir()
    write(tmp_path / "test" / "0.png", picture(0))
    assert len(load_data("ImageFolder", tmp_path).test_labels) == 6
    for name in ("ant", "bee", "unknown"):
        (tmp_path / "test" / name).mkdir()
    assert len(load_data("ImageFolder", tmp_path).test_labels) == 6
    line = f"{tmp_path / 'test'}: the test images are those in {tmp_path / 'val'}, since"
    assert [line in record.getMessage() for record in caplog.records] == [True, True]
    tree(tmp_path, parts=("test",), count=1)
    assert len(load_data("ImageFolder", tmp_path).test_labels) == 2
    write(tmp_path / "test" / "unknown" / "0.png", picture(0))
    assert len(load_data("ImageFolder", tmp_path).test_labels) == 6, "test is not sorted into the classes"


@pytest.mark.parametrize("part", ["valid", "validation"])
def test_other_names_of_the_test_folder(tmp_path, part):
    assert len(load_data("ImageFolder", tree(tmp_path, parts=("train", part))).test_labels) == 6


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

    # ImageFolder reads the archive, and its test folder without labels; and the scripts in use sort val like train
    (zip_root / "test" / "images").mkdir(parents=True)
    write(zip_root / "test" / "images" / "test_0.JPEG", picture(200, (64, 64)))
    folder = load_data("ImageFolder", zip_root)
    assert folder.fingerprint == one.fingerprint and torch.equal(folder.test_images, one.test_images)
    val = tmp_path / "scripted" / "val"
    shutil.copytree(zip_root, val.parent)
    for i in range(12):
        (val / ("n02", "n01", "n03")[i % 3] / "images").mkdir(parents=True, exist_ok=True)
        shutil.move(val / "images" / f"val_{i}.JPEG", val / ("n02", "n01", "n03")[i % 3] / "images")
    for name in ("Tiny", "ImageFolder"):
        scripted = load_data(name, val.parent)
        assert scripted.fingerprint == one.fingerprint and torch.equal(scripted.test_images, one.test_images)

    (zip_root / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn99\n")
    with pytest.raises(InputError, match="val_annotations.txt names a class"):
        load_data("Tiny", zip_root)
    (zip_root / "val" / "val_annotations.txt").unlink()
    with pytest.raises(InputError, match="val_annotations.txt"):
        load_data("Tiny", zip_root)
    with pytest.raises(InputError, match="val holds neither folders of the classes nor"):
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


@pytest.mark.parametrize(
    "meant, words",
    [
        ("Tiny", "TinyImageNet tiny-imagenet-200 tiny_imagenet tiny-imagenet-200.zip TINY"),
        ("CIFAR10", "cifar10 CIFAR-10 cifar_10 cifar-10-batches-py cifar-10-python.tar.gz CIFAR"),
        ("CIFAR100", "cifar100 CIFAR-100 cifar-100-python"),
        ("FashionMNIST", "Fashion-MNIST fashion_mnist FMNIST fashion"),
        ("MNIST", "mnist M-NIST"),
        ("SVHN", "svhn svhn_cropped"),
        ("ImageNet", "imagenet Image-Net"),
        ("ImageNet1K", "imagenet-1k ILSVRC2012 ILSVRC2012_img_train"),
        ("ImageNet with the subset imagewoof", "ImageWoof image_woof"),
        ("ImageFolder", "image-folder folder imagefolder"),
    ],
)
def test_the_set_meant_by_other_spellings(meant, words):
    for word in words.split():
        with pytest.raises(InputError, match=rf"no data set '{re.escape(word)}'; did you mean {meant}\?"):
            load_data(word, ".")
    with pytest.raises(InputError, match="no data set 'STL10'; there are FashionMNISTMini"):
        load_data("STL10", ".")


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


def damage_wrapped(root: Path) -> None:
    for folder in ("__MACOSX", "pets"):
        (root / folder).mkdir()
        (root / "train").rename(root / folder / "train")
        tree(root, parts=("train",))
    shutil.rmtree(root / "train")


def damage_unicode(root: Path) -> None:
    (root / "train" / "ant").rename(root / "train" / "cafe\u0301")
    (root / "test" / "ant").rename(root / "test" / "caf\u00e9")


def damage_no_test(root: Path) -> None:
    (root / "test").rename(root / "holdout")


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
        (lambda root: (root / "train").rename(root / "Train"), "train is not a folder.* did you mean .*/Train"),
        (damage_wrapped, "train is not a folder.* did you mean .*/pets/train"),
        (damage_unicode, "'cafe.' is only in one, the other writes it in other Unicode characters"),
        (lambda root: [shutil.rmtree(root / "test" / name) for name in ("ant", "bee")], "'ant' is only in one"),
        (lambda root: [file.unlink() for file in root.glob("test/*/*")], "test holds no image in its class folders"),
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
