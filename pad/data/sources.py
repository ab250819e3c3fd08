"""Named data sets and folders of images, as uint8 tensors with labels.

Every set is read whole into memory: images ``[N, C, H, W]`` uint8, labels int64. The order of the images is part of
the data, since difficulty rankings hold indices: torchvision's order for its data sets, ``ImageFolder``'s order
(classes sorted by name, files sorted by path) for every set that is a tree of files.
"""

import difflib
import logging
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from pad.data.folders import IMAGENET_SUBSETS, _image_folder, _imagenet, _tiny
from pad.data.images import _FIXED_SIZE, MEAN_STD, ImageData
from pad.data.torchvision_sets import _from_torchvision
from pad.errors import InputError

log = logging.getLogger("pad")

DATASETS = (*MEAN_STD, "ImageFolder")

_TORCHVISION = ("MNIST", "FashionMNIST", "SVHN", "CIFAR10", "CIFAR100")

_DEFAULT_SIZE = {"Tiny": 64, "ImageNet": 128, "ImageNet1K": 64}

_FASHION_CLASSES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)

_MINI_SHEET = Path(__file__).parent / "files" / "fashion_mnist_mini.png"


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
