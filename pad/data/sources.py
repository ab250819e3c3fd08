"""Named data sets and folders of images, as uint8 tensors with labels.

Every set is read whole into memory: images ``[N, C, H, W]`` uint8, labels int64. The order of the images is part of
the data, since difficulty rankings hold indices: torchvision's order for its data sets, ``ImageFolder``'s order
(classes sorted by name, files sorted by path) for every set that is a tree of files.
"""

import contextlib
import dataclasses
import difflib
import functools
import hashlib
import io
import logging
import os
import shutil
import socket
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pad.errors import InputError
from pad.files import put_in_place, temporary_folder

logger = logging.getLogger("pad")

_CIFAR = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_FASHION = (0.2861,), (0.3530,)

# Mean and standard deviation of pixels in [0, 1] that the published settings use; ImageFolder's are computed.
MEAN_STD = {
    "FashionMNISTMini": _FASHION,
    "MNIST": ((0.1307,), (0.3081,)),
    "FashionMNIST": _FASHION,
    "SVHN": ((0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)),
    "CIFAR10": _CIFAR,
    "CIFAR100": _CIFAR,
    "Tiny": _IMAGENET,
    "ImageNet": _IMAGENET,
    "ImageNet1K": _IMAGENET,
}
DATASETS = (*MEAN_STD, "ImageFolder")
_TORCHVISION = ("MNIST", "FashionMNIST", "SVHN", "CIFAR10", "CIFAR100")
_FIXED_SIZE = {"FashionMNISTMini": 28, "MNIST": 28, "FashionMNIST": 28, "SVHN": 32, "CIFAR10": 32, "CIFAR100": 32}
_DEFAULT_SIZE = {"Tiny": 64, "ImageNet": 128, "ImageNet1K": 64}

# Position in a row = label; the numbers are ImageNet class indices (its wnids in sorted order). From arXiv 2203.11932.
IMAGENET_SUBSETS = {
    "imagenette": (0, 217, 482, 491, 497, 566, 569, 571, 574, 701),
    "imagewoof": (193, 182, 258, 162, 155, 167, 159, 273, 207, 229),
    "imagefruit": (953, 954, 949, 950, 951, 957, 952, 945, 943, 948),
    "imageyellow": (309, 986, 954, 951, 987, 779, 599, 291, 72, 11),
    "imagemeow": (281, 282, 283, 284, 285, 291, 292, 290, 289, 287),
    "imagesquawk": (84, 130, 88, 144, 145, 22, 96, 9, 100, 89),
}

_FASHION_CLASSES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
_MINI_SHEET = Path(__file__).parent / "files" / "fashion_mnist_mini.png"

# Of the formats that files of an image's ending can have; of others, some hand the file to other programs.
_FORMATS = ("JPEG", "PNG", "BMP", "PPM", "TIFF", "WEBP")
_CHUNK = 256  # images handled at a time, by one decoding thread or in one sum
_DOWNLOAD_TIMEOUT = 30  # seconds without an answer after which a download counts as failed


@dataclasses.dataclass(frozen=True, eq=False)
class ImageData:
    """A labelled data set in memory.

    ``train_images``, ``test_images``: uint8 ``[N, C, H, W]``; ``train_labels``, ``test_labels``: int64 ``[N]``;
    ``mean``, ``std``: of pixels in [0, 1], one per channel.
    """

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def channels(self) -> int:
        return self.train_images.shape[1]

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) in pixels."""
        return tuple(self.train_images.shape[2:])

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hex digest of the training images and labels, whatever their device. Computed once, a second per GB."""
        digest = hashlib.blake2b(str(tuple(self.train_images.shape)).encode(), digest_size=16)
        for tensor in (self.train_images, self.train_labels):
            digest.update(tensor.cpu().contiguous().numpy())
        return digest.hexdigest()

    @property
    def identity(self) -> dict:
        """What a trajectory store or a synthetic set notes down, to recognise the data it was made from. JSON-able."""
        return {
            "dataset": self.name,
            "fingerprint": self.fingerprint,
            "channels": self.channels,
            "size": list(self.size),
            "num_classes": self.num_classes,
        }

    def to(self, device: torch.device | str) -> "ImageData":
        """The same data with its four tensors on ``device``."""
        tensors = ("train_images", "train_labels", "test_images", "test_labels")
        moved = dataclasses.replace(self, **{name: getattr(self, name).to(device) for name in tensors})
        if "fingerprint" in self.__dict__:
            moved.__dict__["fingerprint"] = self.fingerprint
        return moved

    def first_per_class(self, count: int) -> "ImageData":
        """The same data with only the first ``count`` training images of each class, or all it has, in their order."""
        order = self.train_labels.argsort(stable=True)
        sizes = self.train_labels.bincount(minlength=self.num_classes)
        place = torch.arange(len(order), device=order.device) - (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
        kept = order[place < count].sort().values
        return dataclasses.replace(self, train_images=self.train_images[kept], train_labels=self.train_labels[kept])


def load_data(
    name: str, data_path: str | Path | None, *, subset: str | None = None, res: int | None = None, download: bool = True
) -> ImageData:
    """Load a data set by its published name (one of ``DATASETS``) from the folder ``data_path``.

    - ``FashionMNISTMini`` comes with the package (4,000 + 1,000 images, class by class) and needs no ``data_path``.
    - ``MNIST``, ``FashionMNIST``, ``SVHN``, ``CIFAR10``, ``CIFAR100``: torchvision's files, downloaded when they are
      missing and ``download`` is true.
    - ``Tiny`` (Tiny ImageNet, 64 px): ``train/<wnid>/`` and ``val/images/<wnid>/``, or as it is in its zip archive.
    - ``ImageNet1K`` (64 px) and ``ImageNet`` (128 px, ten classes named by ``subset``): ``train/<wnid>/`` and
      ``val/<wnid>/``, each with all 1,000 folders, whose sorted order is the ImageNet index.
    - ``ImageFolder``: ``train/<class>/`` and ``test/<class>/`` or ``val/<class>/``. One channel when the first training
      image of every class is grey, else three. Its mean and std are those of the training pixels.

    ``res`` resizes the sets that are trees of files to res x res pixels, bilinear with antialiasing and ignoring the
    aspect ratio (as published); an ImageFolder without it keeps its size, which then must be the same for all images.

    Raises InputError when a name, an option, a folder or a file cannot be used.
    """
    if name not in DATASETS:
        raise InputError(f"there is no data set {name!r}; {_nearest(name, DATASETS)}")
    if name == "ImageNet" and subset not in IMAGENET_SUBSETS:
        raise InputError(f"ImageNet needs one of its subsets, not {subset!r}; {_nearest(subset, IMAGENET_SUBSETS)}")
    if name != "ImageNet" and subset is not None:
        raise InputError(f"subset {subset!r} was given, but only ImageNet has subsets, {name} has none")
    if res is not None and (not isinstance(res, int) or isinstance(res, bool) or res < 1):
        raise InputError(f"res must be a positive whole number of pixels, not {res!r}")
    if res is not None and res != _FIXED_SIZE.get(name, res):
        raise InputError(f"res {res} was given, but {name} has {_FIXED_SIZE[name]} pixels a side; leave res out")

    if name == "FashionMNISTMini":
        return _fashion_mnist_mini()
    if data_path is None:
        raise InputError(f"{name} needs a data_path, the folder where its files are")
    root = Path(data_path).expanduser()
    if name in _TORCHVISION:
        return _from_torchvision(name, root, download)
    if not root.is_dir():
        raise InputError(f"the data_path {root} is not a folder")
    res = res or _DEFAULT_SIZE.get(name)
    with warnings.catch_warnings():  # holds for the whole process, so it is set here and not by each decoding thread
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        if name == "ImageFolder":
            return _image_folder(root, res)
        if name == "Tiny":
            return _tiny(root, res)
        return _imagenet(root, subset, res)


def _nearest(word, choices) -> str:
    """The valid names, and before them the one a mistyped name comes nearest to, if any does."""
    lower = {choice.lower(): choice for choice in choices}
    near = difflib.get_close_matches(str(word).lower(), lower, n=1, cutoff=0.5)
    every = ", ".join(choices)
    return f"did you mean {lower[near[0]]}? (there are {every})" if near else f"there are {every}"


def _fashion_mnist_mini() -> ImageData:
    """The embedded sheet: 28x28 tiles, 100 a row; 400 training images of each class, then 100 test images of each."""
    with Image.open(_MINI_SHEET) as image:
        sheet = np.asarray(image)
    tiles = torch.from_numpy(sheet.reshape(50, 28, 100, 28).swapaxes(1, 2).reshape(5000, 1, 28, 28))
    classes = torch.arange(10)
    return ImageData(
        "FashionMNISTMini",
        tiles[:4000],
        classes.repeat_interleave(400),
        tiles[4000:],
        classes.repeat_interleave(100),
        _FASHION_CLASSES,
        *MEAN_STD["FashionMNISTMini"],
    )


# ---- torchvision's data sets


def _from_torchvision(name: str, root: Path, download: bool) -> ImageData:
    from torchvision import datasets  # late: half a second that the other sets need not wait for

    dataset = getattr(datasets, name)
    # CIFAR's files are pickles: torchvision checks them by checksum before it opens them
    splits = [{"split": "train"}, {"split": "test"}] if name == "SVHN" else [{"train": True}, {"train": False}]

    def read(folder: Path, download: bool) -> list:
        return [dataset(folder, download=download, **split) for split in splits]

    try:
        train, test = read(root, download=False)
    except Exception as error:  # torchvision raises whatever its file readers raise
        files, archives = _torchvision_files(name, dataset)
        problem = f"{name} cannot be read from {root} ({_line(error)})"
        expected = f"expected there: {', '.join(files)}" + (f" (or, packed, {', '.join(archives)})" if archives else "")
        if not download:
            raise InputError(f"{problem}; {expected}") from None
        logger.info("%s is not whole in %s: downloading it", name, root)
        try:
            train, test = _download(root, files, archives, read)
        except Exception as error:
            raise InputError(f"{problem} nor downloaded ({_line(error)}); {expected}") from None

    images, labels = [], []
    for part in (train, test):
        pixels = torch.as_tensor(part.data)
        if name.startswith("CIFAR"):
            pixels = pixels.permute(0, 3, 1, 2)
        elif name != "SVHN":
            pixels = pixels[:, None]
        images.append(pixels.contiguous())
        labels.append(torch.as_tensor(part.labels if name == "SVHN" else part.targets, dtype=torch.int64))
        if len(images[-1]) != len(labels[-1]):
            raise InputError(f"{name} in {root} is damaged: {len(images[-1])} images but {len(labels[-1])} labels")
    class_names = tuple(getattr(train, "classes", None) or map(str, range(10)))
    shape, side = images[0].shape[1:], _FIXED_SIZE[name]
    if any(part.shape[1:] != shape or part.shape[2:] != (side, side) or part.dtype != torch.uint8 for part in images):
        raise InputError(f"{name} in {root} is damaged: its images are not all uint8 of {side}x{side} pixels")
    if any(not len(part) or part.min() < 0 or part.max() >= len(class_names) for part in labels):
        raise InputError(f"{name} in {root} is damaged: its labels are not numbers of {len(class_names)} classes")
    return ImageData(name, images[0], labels[0], images[1], labels[1], class_names, *MEAN_STD[name])


def _torchvision_files(name: str, dataset) -> tuple[list[str], list[str]]:
    """The files torchvision reads, relative to its root, and the archives it would download and unpack."""
    if name == "SVHN":
        return [dataset.split_list[split][1] for split in ("train", "test")], []
    if name.startswith("CIFAR"):
        names = [file for file, _ in dataset.train_list + dataset.test_list] + [dataset.meta["filename"]]
        return [f"{dataset.base_folder}/{file}" for file in names], [dataset.filename]
    archives = [f"{name}/raw/{file}" for file, _ in dataset.resources]
    return [archive.removesuffix(".gz") for archive in archives], archives


def _download(root: Path, files: list[str], archives: list[str], read) -> list:
    """Let torchvision fetch and unpack into a temporary folder, then move the whole files into place.

    Nothing half-downloaded is left behind, and processes that do this at once do not write into each other's files.
    Archives that are already in ``root``, where torchvision puts them or at its top, are used instead of the network
    when their checksums are right.
    """
    new_root = not root.exists()
    timeout = socket.getdefaulttimeout()
    quiet = io.StringIO()  # takes the progress bars
    try:
        root.mkdir(parents=True, exist_ok=True)
        socket.setdefaulttimeout(_DOWNLOAD_TIMEOUT)
        with temporary_folder(root) as folder:
            for wanted in archives or files:
                found = next((path for path in (root / wanted, root / Path(wanted).name) if path.is_file()), None)
                if found:
                    (folder / wanted).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(found, folder / wanted)
            with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
                parts = read(folder, download=True)
            for file in files:
                put_in_place(folder / file, root / file)
        return parts
    except BaseException:
        if new_root:
            with contextlib.suppress(OSError):
                root.rmdir()
        raise
    finally:
        socket.setdefaulttimeout(timeout)


def _line(error: Exception) -> str:
    """An exception as part of one sentence."""
    return " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__


# ---- trees of image files


def _image_folder(root: Path, res: int | None) -> ImageData:
    classes = _class_folders(root / "train")
    if len(classes) < 2:
        raise InputError(f"{root / 'train'} holds {len(classes)} class folders; a data set has at least two classes")
    candidates = [root / part for part in ("test", "val") if (root / part).is_dir()]
    if not candidates:
        raise InputError(f"{root} has neither a test nor a val folder beside train")
    matching = [folder for folder in candidates if _class_folders(folder) == classes]
    if not matching:
        odd = sorted(set(classes) ^ set(_class_folders(candidates[0])))[0]
        raise InputError(f"{candidates[0]} and {root / 'train'} differ in their class folders: {odd!r} is only in one")
    labels = {name: label for label, name in enumerate(classes)}
    train, test = (_labelled_files(folder, labels) for folder in (root / "train", matching[0]))

    by_label = {label: file for file, label in reversed(train)}
    grey = all(_header(file)[0] in ("1", "L", "LA") for file in by_label.values())
    size = (res, res) if res else _header(train[0][0])[1]
    return _read_trees("ImageFolder", train, test, classes, size, channels=1 if grey else 3, resize=bool(res))


def _tiny(root: Path, res: int) -> ImageData:
    if not (root / "train").is_dir() and (root / "tiny-imagenet-200" / "train").is_dir():
        root = root / "tiny-imagenet-200"
    classes = _class_folders(root / "train")
    if len(classes) < 2:
        raise InputError(f"{root / 'train'} holds {len(classes)} class folders; Tiny ImageNet has 200")
    labels = {wnid: label for label, wnid in enumerate(classes)}
    validation, annotations = root / "val" / "images", root / "val" / "val_annotations.txt"
    if not validation.is_dir():
        raise InputError(f"{validation} is not a folder; Tiny ImageNet's validation images are there")
    if _class_folders(validation):
        test = _labelled_files(validation, labels)
    elif annotations.is_file():  # as in the zip archive: all images in one folder, "<file>\t<wnid>\t<box>" in a list
        text = annotations.read_text(encoding="utf-8", errors="replace")
        pairs = [line.split("\t")[:2] for line in text.splitlines() if line.strip()]
        if any(len(pair) < 2 or pair[1] not in labels for pair in pairs):
            raise InputError(f"{annotations} names a class that {root / 'train'} has no folder for, or is damaged")
        if outside := [file for file, _ in pairs if Path(file).name != file or file == ".."]:
            raise InputError(f"{annotations} names {outside[0]!r}, which is not the name of a file in {validation}")
        test = [(validation / file, labels[wnid]) for file, wnid in sorted(pairs, key=lambda pair: pair[::-1])]
    else:
        raise InputError(f"{validation} holds neither class folders nor is there a {annotations}")
    return _read_trees("Tiny", _labelled_files(root / "train", labels), test, classes, (res, res))


def _imagenet(root: Path, subset: str | None, res: int) -> ImageData:
    """All of ImageNet, or the ten classes of a subset: only their files are read."""
    wnids = _class_folders(root / "train")
    if len(wnids) != 1000:
        raise InputError(
            f"{root / 'train'} holds {len(wnids)} class folders, but the ImageNet index is a place among all 1000; "
            "a tree of fewer classes can be used as an ImageFolder"
        )
    classes = [wnids[index] for index in IMAGENET_SUBSETS[subset]] if subset else wnids
    labels = {wnid: label for label, wnid in enumerate(classes)}
    train, test = (_labelled_files(root / part, labels) for part in ("train", "val"))
    return _read_trees(f"ImageNet/{subset}" if subset else "ImageNet1K", train, test, classes, (res, res))


def _class_folders(folder: Path) -> list[str]:
    """Names of the sub-folders in sorted order, without hidden ones."""
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; it should hold one folder of images for each class")
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))


def _labelled_files(folder: Path, labels: dict[str, int]) -> list[tuple[Path, int]]:
    """(file, label) of the classes in ``labels``, in ImageFolder's order: classes by name, then files by path."""
    from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

    missing = sorted(set(labels) - set(_class_folders(folder)))
    if missing:
        raise InputError(f"{folder} has no folder {missing[0]!r}, which is one of the classes")
    samples = make_dataset(folder, labels, extensions=IMG_EXTENSIONS, allow_empty=True)
    filled = {label for _, label in samples}
    empty = [name for name, label in labels.items() if label not in filled]
    if empty:
        raise InputError(f"{folder / empty[0]} holds no image (a file that ends in {', '.join(IMG_EXTENSIONS)})")
    return [(Path(file), label) for file, label in samples]


def _read_trees(
    name: str,
    train: list[tuple[Path, int]],
    test: list[tuple[Path, int]],
    classes: list[str],
    size: tuple[int, int],
    channels: int = 3,
    resize: bool = True,
) -> ImageData:
    """Decode the (file, label) pairs of both parts."""
    parts = []
    for samples in (train, test):
        parts.append(_read_images([file for file, _ in samples], size, channels, resize))
        parts.append(torch.tensor([label for _, label in samples]))
    mean, std = MEAN_STD.get(name.partition("/")[0]) or _mean_std(parts[0])
    return ImageData(name, *parts, tuple(classes), mean, std)


def _read_images(files: list[Path], size: tuple[int, int], channels: int, resize: bool) -> Tensor:
    """Decode files into uint8 ``[N, channels, H, W]``, ``size`` = (H, W), in threads: the decoder releases the GIL."""
    try:
        images = torch.empty(len(files), channels, *size, dtype=torch.uint8)
    except RuntimeError:
        gigabytes = len(files) * channels * size[0] * size[1] / 1e9
        sizes = f"{len(files)} images of {size[1]}x{size[0]} pixels take {gigabytes:.0f} GB"
        raise InputError(f"{sizes}, more memory than there is; give a smaller res") from None
    pixels = images.numpy()

    def read(start: int) -> None:
        for index in range(start, min(start + _CHUNK, len(files))):
            pixels[index] = _read_image(files[index], size, channels, resize)

    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        for _ in pool.map(read, range(0, len(files), _CHUNK)):  # raises what the first bad chunk raised
            pass
    finally:
        pool.shutdown(cancel_futures=True)
    return images


def _read_image(file: Path, size: tuple[int, int], channels: int, resize: bool) -> np.ndarray:
    """One file as uint8 ``[channels, H, W]``."""
    with _image_errors(file), Image.open(file, formats=_FORMATS) as image:
        if image.mode == "F" or image.mode.startswith("I"):
            raise InputError(f"{file} has more than 8 bits per channel; convert it to 8 bits")
        if channels == 1 and image.mode not in ("1", "L", "LA"):
            raise InputError(f"{file} is in colour, but the first image of every class is grey; convert it or those")
        height, width = size
        if image.size != (width, height) and not resize:
            found = f"{image.width}x{image.height}"
            raise InputError(f"{file} is {found} pixels, but the first image is {width}x{height}; give a res")
        image = image.convert("L" if channels == 1 else "RGB")  # up to here nothing was decoded
        if image.size != (width, height):
            image = image.resize((width, height), Image.Resampling.BILINEAR)
        return np.asarray(image).reshape(height, width, channels).transpose(2, 0, 1)


def _header(file: Path) -> tuple[str, tuple[int, int]]:
    """Colour mode and (H, W) of an image file, without decoding it."""
    with _image_errors(file), Image.open(file, formats=_FORMATS) as image:
        return image.mode, (image.height, image.width)


@contextlib.contextmanager
def _image_errors(file: Path):
    """Whatever the image decoder raises for a bad file (many types, one per format), as an InputError."""
    try:
        yield
    except InputError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise InputError(f"{file} has more pixels than the {Image.MAX_IMAGE_PIXELS} that are safe to decode") from None
    except Exception as error:
        raise InputError(f"{file} cannot be read as an image ({_line(error)})") from None


def _mean_std(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and population standard deviation per channel of uint8 images, in [0, 1].

    The sums are integers, which float64 holds exactly (to 10^11 pixels), so that any thread count gives the same.
    """
    total = squares = 0
    for chunk in images.split(_CHUNK):
        values = chunk.transpose(0, 1).flatten(1).double()
        total, squares = total + values.sum(1), squares + values.square().sum(1)
    count = images.numel() // images.shape[1]
    mean = [t / count for t in total.tolist()]
    variance = [s / count - m * m for s, m in zip(squares.tolist(), mean)]
    # a channel of one value stays finite: it becomes zero whatever it is divided by
    return tuple(m / 255 for m in mean), tuple(max(v, 1.0) ** 0.5 / 255 for v in variance)
