"""Data sets that are trees of image files."""

import contextlib
import os
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pad.data.images import ImageData, Statistics, mean_std, one_line
from pad.errors import InputError

# Position in a row = label; the numbers are ImageNet class indices (its wnids in sorted order). From arXiv 2203.11932.
IMAGENET_SUBSETS = {
    "imagenette": (0, 217, 482, 491, 497, 566, 569, 571, 574, 701),
    "imagewoof": (193, 182, 258, 162, 155, 167, 159, 273, 207, 229),
    "imagefruit": (953, 954, 949, 950, 951, 957, 952, 945, 943, 948),
    "imageyellow": (309, 986, 954, 951, 987, 779, 599, 291, 72, 11),
    "imagemeow": (281, 282, 283, 284, 285, 291, 292, 290, 289, 287),
    "imagesquawk": (84, 130, 88, 144, 145, 22, 96, 9, 100, 89),
}

# Of the formats that files of an image's ending can have; of others, some hand the file to other programs.
_FORMATS = ("JPEG", "PNG", "BMP", "PPM", "TIFF", "WEBP")

_GREY = ("1", "L", "LA")  # colour modes
_CHUNK = 256  # files that a decoding thread takes at a time


@dataclass(frozen=True, kw_only=True)
class Tree:
    """The files of a data set: (file, label) pairs in the order of the images; labels are places in ``classes``."""

    train: list[tuple[Path, int]]
    test: list[tuple[Path, int]]
    classes: list[str]
    channels: int = 3


def load_tree(
    root: Path,
    subset: str | None,
    res: int | None,
    *,
    name: str,
    find: Callable[[Path, str | None], Tree],
    statistics: Statistics | None = None,
) -> ImageData:
    """Decode the files that ``find`` finds, resized to ``res`` pixels a side; None keeps the first image's size.

    Without ``statistics``, mean and std are those of the training images.
    """
    if not root.is_dir():
        raise InputError(f"the data_path {root} is not a folder")
    with warnings.catch_warnings():  # holds for the whole process, so it is set here and not by each decoding thread
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        tree = find(root, subset)
        size = (res, res) if res else _header(tree.train[0][0])[1]
        train, test = (
            _read_images([file for file, _ in part], size, tree.channels, resize=bool(res))
            for part in (tree.train, tree.test)
        )
    mean, std = statistics or mean_std(train)
    return ImageData(
        name=f"{name}/{subset}" if subset else name,
        train_images=train,
        train_labels=torch.tensor([label for _, label in tree.train]),
        test_images=test,
        test_labels=torch.tensor([label for _, label in tree.test]),
        class_names=tuple(tree.classes),
        mean=mean,
        std=std,
    )


def image_folder(root: Path, subset: str | None) -> Tree:
    """``train/<class>/``, and ``test/<class>/`` or ``val/<class>/``; grey if each class's first training image is."""
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

    first = {label: file for file, label in reversed(train)}
    grey = all(_header(file)[0] in _GREY for file in first.values())
    return Tree(train=train, test=test, classes=classes, channels=1 if grey else 3)


def tiny(root: Path, subset: str | None) -> Tree:
    """Tiny ImageNet: ``train/<wnid>/`` and ``val/images/<wnid>/``, or as it is in its zip archive."""
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
    return Tree(train=_labelled_files(root / "train", labels), test=test, classes=classes)


def imagenet(root: Path, subset: str | None) -> Tree:
    """``train/<wnid>/`` and ``val/<wnid>/`` of all 1,000 classes; of a subset's ten alone are the files read."""
    wnids = _class_folders(root / "train")
    if len(wnids) != 1000:
        raise InputError(
            f"{root / 'train'} holds {len(wnids)} class folders, but the ImageNet index is a place among all 1000; "
            "a tree of fewer classes can be used as an ImageFolder"
        )
    classes = [wnids[index] for index in IMAGENET_SUBSETS[subset]] if subset else wnids
    labels = {wnid: label for label, wnid in enumerate(classes)}
    train, test = (_labelled_files(root / part, labels) for part in ("train", "val"))
    return Tree(train=train, test=test, classes=classes)


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

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(
            pool.map(read, range(0, len(files), _CHUNK))
        )  # raises what the first bad chunk raised, and ends the others
    return images


def _read_image(file: Path, size: tuple[int, int], channels: int, resize: bool) -> np.ndarray:
    """One file as uint8 ``[channels, H, W]``."""
    with _image_errors(file), Image.open(file, formats=_FORMATS) as opened:
        image: Image.Image = opened
        if image.mode == "F" or image.mode.startswith("I"):
            raise InputError(f"{file} has more than 8 bits per channel; convert it to 8 bits")
        if channels == 1 and image.mode not in _GREY:
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
    """What the image decoder raises for a bad file (many types, one per format) becomes an InputError."""
    try:
        yield
    except InputError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise InputError(f"{file} has more pixels than the {Image.MAX_IMAGE_PIXELS} that are safe to decode") from None
    except Exception as error:
        raise InputError(f"{file} cannot be read as an image ({one_line(error)})") from None
