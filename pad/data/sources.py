"""Named data sets and folders of images, as uint8 tensors with labels.

Every set is read whole into memory: images ``[N, C, H, W]`` uint8, labels int64. The order of the images is part of
the data, since difficulty rankings hold indices: torchvision's order for its data sets, ``ImageFolder``'s order
(classes sorted by name, files sorted by path) for every set that is a tree of files.
"""

import difflib
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from pad.data.folders import IMAGENET_SUBSETS, image_folder, imagenet, load_tree, tiny
from pad.data.images import ImageData, Statistics
from pad.data.torchvision_sets import load_torchvision
from pad.errors import InputError

_FASHION_CLASSES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
_MINI_SHEET = Path(__file__).parent / "files" / "fashion_mnist_mini.png"

# Mean and standard deviation of pixels in [0, 1] that the published settings use.
_FASHION = (0.2861,), (0.3530,)
_CIFAR = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def _fashion_mnist_mini(root: Path | None, subset: str | None, res: int) -> ImageData:
    """The sheet in the package: 28x28 tiles, 100 a row; 400 training images a class, then 100 test images a class."""
    with Image.open(_MINI_SHEET) as image:
        sheet = np.asarray(image)
    tiles = torch.from_numpy(sheet.reshape(50, 28, 100, 28).swapaxes(1, 2).reshape(5000, 1, 28, 28))
    classes = torch.arange(10)
    return ImageData(
        name="FashionMNISTMini",
        train_images=tiles[:4000],
        train_labels=classes.repeat_interleave(400),
        test_images=tiles[4000:],
        test_labels=classes.repeat_interleave(100),
        class_names=_FASHION_CLASSES,
        mean=_FASHION[0],
        std=_FASHION[1],
    )


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """One row of ``DATA_SETS``: how a data set is read, and what may be asked of it.

    ``load(root, subset, res)`` returns :class:`pad.data.images.ImageData`, whose name is the row's, with ``/<subset>``
    behind it where there is one, so that files named after the data differ: images ``[N, C, H, W]`` uint8, labels
    ``[N]`` int64 from 0 on, all on the CPU and in the same order every time. It raises InputError for files that cannot
    be used.

    - root: the ``data_path``, which need not exist; None where none was given, unless the set ``needs_path``.
    - subset: one of ``subsets``; None for a set without them.
    - res: pixels a side. ``fixed_size`` is the only one a set has, ``default_size`` is taken where none was asked for;
      None without either.
    """

    load: Callable[..., ImageData]
    needs_path: bool = False
    subsets: tuple[str, ...] = ()
    fixed_size: int | None = None
    default_size: int | None = None


def _torchvision(name: str, side: int, statistics: Statistics) -> DataSet:
    return DataSet(load=partial(load_torchvision, name=name, statistics=statistics), needs_path=True, fixed_size=side)


def _tree(name: str, find: Callable, statistics: Statistics | None = None, **more) -> DataSet:
    return DataSet(load=partial(load_tree, name=name, find=find, statistics=statistics), needs_path=True, **more)


# The data sets by their published names. One of your own is a further row: DATA_SETS["Stripes"] = DataSet(load=...)
DATA_SETS: dict[str, DataSet] = {
    "FashionMNISTMini": DataSet(load=_fashion_mnist_mini, fixed_size=28),
    "MNIST": _torchvision("MNIST", 28, ((0.1307,), (0.3081,))),
    "FashionMNIST": _torchvision("FashionMNIST", 28, _FASHION),
    "SVHN": _torchvision("SVHN", 32, ((0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970))),
    "CIFAR10": _torchvision("CIFAR10", 32, _CIFAR),
    "CIFAR100": _torchvision("CIFAR100", 32, _CIFAR),
    "Tiny": _tree("Tiny", tiny, _IMAGENET, default_size=64),
    "ImageNet": _tree("ImageNet", imagenet, _IMAGENET, default_size=128, subsets=tuple(IMAGENET_SUBSETS)),
    "ImageNet1K": _tree("ImageNet1K", imagenet, _IMAGENET, default_size=64),
    "ImageFolder": _tree("ImageFolder", image_folder),
}


# How papers, folders and archives call some of them; other spellings are near enough to the name.
_ALSO_CALLED = {
    **{"TinyImageNet": "Tiny", "TinyImageNet200": "Tiny", "FMNIST": "FashionMNIST", "ILSVRC2012": "ImageNet1K"},
    **{"Folder": "ImageFolder", **{subset: f"ImageNet with the subset {subset}" for subset in IMAGENET_SUBSETS}},
}


def data_set(name: str) -> DataSet:
    """The row of ``DATA_SETS``. Raises InputError where there is none, which names the one that comes nearest."""
    if name not in DATA_SETS:
        raise InputError(f"there is no data set {name!r}; {_nearest(name, DATA_SETS, _ALSO_CALLED)}")
    return DATA_SETS[name]


def load_data(
    name: str, data_path: str | Path | None, *, subset: str | None = None, res: int | None = None
) -> ImageData:
    """The data set of a row of ``DATA_SETS``, from the folder ``data_path``.

    ``res`` resizes the sets that are trees of files to res x res pixels, bilinear with antialiasing and ignoring the
    aspect ratio (as published); an ImageFolder without it keeps its size, which then must be the same for all images.

    Raises InputError when a name, an option, a folder or a file cannot be used.
    """
    row = data_set(name)
    if row.subsets and subset not in row.subsets:
        raise InputError(f"{name} needs one of its subsets, not {subset!r}; {_nearest(subset, row.subsets)}")
    if not row.subsets and subset is not None:
        having = ", ".join(other for other in DATA_SETS if DATA_SETS[other].subsets)
        raise InputError(f"subset {subset!r} was given, but only {having} has subsets, {name} has none")
    if res is not None and (not isinstance(res, int) or isinstance(res, bool) or res < 1):
        raise InputError(f"res must be a positive whole number of pixels, not {res!r}")
    if res is not None and res != (row.fixed_size or res):
        raise InputError(f"res {res} was given, but {name} has {row.fixed_size} pixels a side; leave res out")
    if data_path is None and row.needs_path:
        raise InputError(f"{name} needs a data_path, the folder where its files are")
    root = None if data_path is None else Path(data_path).expanduser()
    return row.load(root, subset, res or row.fixed_size or row.default_size)


def _nearest(word, choices: Collection[str], also: Mapping[str, str] | None = None) -> str:
    """The valid names, and before them the one a mistyped name comes nearest to, if any does.

    Case and signs do not count. ``also``: what else may be meant, and how to say it.
    """

    def plain(text) -> str:
        return re.sub(r"[\W_]", "", str(text)).lower()

    known = {plain(name): meant for name, meant in [*(also or {}).items(), *zip(choices, choices)]}
    near = difflib.get_close_matches(plain(word), known, n=1, cutoff=0.5)
    every = ", ".join(choices)
    return f"did you mean {known[near[0]]}? (there are {every})" if near else f"there are {every}"
