"""Data sets that are trees of image files."""

import logging
import os
import re
import unicodedata
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from pad.data.decoding import endings, read_images
from pad.data.images import ImageData, Statistics, mean_std, one_line
from pad.errors import InputError

log = logging.getLogger("pad")

# Position in a row = label; the numbers are ImageNet class indices (its wnids in sorted order). From arXiv 2203.11932.
IMAGENET_SUBSETS = {
    "imagenette": (0, 217, 482, 491, 497, 566, 569, 571, 574, 701),
    "imagewoof": (193, 182, 258, 162, 155, 167, 159, 273, 207, 229),
    "imagefruit": (953, 954, 949, 950, 951, 957, 952, 945, 943, 948),
    "imageyellow": (309, 986, 954, 951, 987, 779, 599, 291, 72, 11),
    "imagemeow": (281, 282, 283, 284, 285, 291, 292, 290, 289, 287),
    "imagesquawk": (84, 130, 88, 144, 145, 22, 96, 9, 100, 89),
}

# What systems, notebooks and archives put between the images; the last is beside Tiny ImageNet's.
_LITTER = re.compile(
    r"\..*|__MACOSX|Icon\r|Thumbs\.db|ehthumbs.*\.db|desktop\.ini|\$RECYCLE\.BIN|System Volume Information|lost\+found"
    r"|@eaDir|#recycle|n\d+_boxes\.txt",
    re.IGNORECASE | re.DOTALL,
)

_ANNOTATIONS = "val_annotations.txt"  # of Tiny ImageNet's archive


@dataclass(frozen=True, kw_only=True)
class Tree:
    """The files of a data set: (file, label) pairs in the order of the images; labels are places in ``classes``.

    Published sets are read as torchvision reads them: in colour, and as the files lie. Of others the images are turned
    as their EXIF data says, and stay grey if all of them are.
    """

    train: list[tuple[Path, int]]
    test: list[tuple[Path, int]]
    classes: list[str]
    published: bool = True


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
    tree = find(root, subset)
    files = [[file for file, _ in part] for part in (tree.train, tree.test)]
    train, test = read_images(files, res, as_seen=not tree.published)
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
    """``train/<class>/``, and ``<class>/`` in the first of test, val, valid and validation that holds images so."""
    classes = class_folders(root / "train")
    if len(classes) < 2:
        raise InputError(f"{root / 'train'} holds {len(classes)} class folders; a data set has at least two classes")
    labels = {name: label for label, name in enumerate(classes)}
    if all(name.isdecimal() for name in classes):
        for label, (name, number) in enumerate(zip(classes, sorted(classes, key=int))):
            if name != number:
                here = f"{root / 'train'}: classes are numbered in the order of their folders' names as text"
                log.warning("%s: class %d is %r, and not %r", here, label, name, number)
                break
    test = _test_files(root, labels)
    return Tree(train=labelled_files(root / "train", labels), test=test, classes=classes, published=False)


def _test_files(root: Path, labels: dict[str, int]) -> list[tuple[Path, int]]:
    """Those of the first folder that is sorted into the classes; of none, Tiny ImageNet's list."""
    parts = [root / part for part in ("test", "val", "valid", "validation") if (root / part).is_dir()]
    if not parts:
        raise InputError(f"{root} has neither a test nor a val folder beside train")
    first, listed = parts[0], root / "val"
    part = next((part for part in parts if _is_sorted(part, labels)), None)
    if part is None and not (listed / _ANNOTATIONS).is_file():
        if odd := sorted(labels.keys() ^ set(class_folders(first))):
            same = len({unicodedata.normalize("NFC", name) for name in odd}) < len(odd)
            only = f"{odd[0]!r} is only in one" + ", the other writes it in other Unicode characters" * same
            raise InputError(f"{first} and {root / 'train'} differ in their class folders: {only}")
        raise InputError(f"{first} holds no image in its class folders")
    if (chosen := part or listed) != first:
        log.info("%s: the test images are those in %s, since here none lies in a folder of its class", first, chosen)
    return labelled_files(part, labels) if part else _listed_files(listed, labels)


def _is_sorted(part: Path, labels: dict[str, int]) -> bool:
    """Whether a folder has one folder for each class, at least one of them with images, and images in no other."""

    def any_image(names: Iterable[str]) -> bool:
        return any(_scan(part / name).images for name in names)

    names = set(class_folders(part))
    return labels.keys() <= names and any_image(labels) and not any_image(names - labels.keys())


def tiny(root: Path, subset: str | None) -> Tree:
    """Tiny ImageNet: ``train/<wnid>/``, and ``val/images/<wnid>/``, ``val/<wnid>/`` or as it is in its zip archive."""
    if not (root / "train").is_dir() and (root / "tiny-imagenet-200" / "train").is_dir():
        root = root / "tiny-imagenet-200"
    classes = class_folders(root / "train")
    if len(classes) < 2:
        raise InputError(f"{root / 'train'} holds {len(classes)} class folders; Tiny ImageNet has 200")
    labels = {wnid: label for label, wnid in enumerate(classes)}
    parts = [part for part in (root / "val" / "images", root / "val") if part.is_dir()]
    if sorted_part := next((part for part in parts if not labels.keys().isdisjoint(class_folders(part))), None):
        test = labelled_files(sorted_part, labels)
    elif (root / "val" / _ANNOTATIONS).is_file():
        test = _listed_files(root / "val", labels)
    else:
        raise InputError(f"{root / 'val'} holds neither folders of the classes nor a {_ANNOTATIONS}")
    return Tree(train=labelled_files(root / "train", labels), test=test, classes=classes)


def imagenet(root: Path, subset: str | None) -> Tree:
    """``train/<wnid>/`` and ``val/<wnid>/`` of all 1,000 classes; of a subset's ten alone are the files read."""
    wnids = class_folders(root / "train")
    if len(wnids) != 1000:
        raise InputError(
            f"{root / 'train'} holds {len(wnids)} class folders, but the ImageNet index is a place among all 1000; "
            "a tree of fewer classes can be used as an ImageFolder"
        )
    classes = [wnids[index] for index in IMAGENET_SUBSETS[subset]] if subset else wnids
    labels = {wnid: label for label, wnid in enumerate(classes)}
    train, test = (labelled_files(root / part, labels) for part in ("train", "val"))
    return Tree(train=train, test=test, classes=classes)


def class_folders(folder: Path) -> list[str]:
    """Names of the sub-folders in sorted order, without what is no class: litter, and links that lead back."""
    if not folder.is_dir():
        there = [*folder.parent.glob(folder.name.capitalize()), *sorted(folder.parent.glob(f"*/{folder.name}"))]
        near = next((f"; did you mean {other}?" for other in there if not _LITTER.fullmatch(other.parent.name)), "")
        raise InputError(f"{folder} is not a folder; it should hold one folder of images for each class{near}")
    here = Path(os.path.realpath(folder))
    return sorted(
        entry.name
        for entry in _entries(folder)
        if os.path.isdir(entry) and not (entry.is_symlink() and here.is_relative_to(os.path.realpath(entry)))
    )


def labelled_files(folder: Path, labels: dict[str, int]) -> list[tuple[Path, int]]:
    """(file, label) of the classes in ``labels``, in ImageFolder's order: classes by name, then files by path."""
    missing = sorted(set(labels) - set(class_folders(folder)))
    if missing:
        raise InputError(f"{folder} has no folder {missing[0]!r}, which is one of the classes")
    files = []
    formats, left_out, classes = Counter[str](), Counter[str](), Counter[str]()
    for name in sorted(labels):
        found = _scan(folder / name)
        if not found.images:
            instead = f" of a format that is read, but {_counts(found.left_out)}" if found.left_out else ""
            raise InputError(f"{folder / name} holds no image{instead}")
        files += [(file, labels[name]) for file in found.images]
        formats += found.formats
        left_out += found.left_out
        classes[name] = found.left_out.total()
    if left_out:
        counts = f"{_counts(left_out)}; by class: {_counts(+classes)}"
        log.warning("%s: files that are not read as images are left out: %s", folder, counts)
    if len(formats) > 1:
        log.info("%s: images of several formats are read: %s", folder, _counts(formats))
    if loose := sum(_ending(entry.name) in endings() and os.path.isfile(entry) for entry in _entries(folder)):
        log.warning("%s: images that lie in no class folder are left out: %d", folder, loose)
    return files


def _counts(counter: Counter[str]) -> str:
    """The most common, each with its number, and how many more there are."""
    shown = [f"{name} {number}" for name, number in counter.most_common(4)]
    more = len(counter) - len(shown)
    return ", ".join([*shown, f"and {more} more"] if more else shown)


def _listed_files(validation: Path, labels: dict[str, int]) -> list[tuple[Path, int]]:
    """Tiny ImageNet's test images as in its archive: all in one folder, "<file>\t<wnid>\t<box>" in a list."""
    images, annotations = validation / "images", validation / _ANNOTATIONS
    text = annotations.read_text(encoding="utf-8", errors="replace")
    pairs = [line.split("\t")[:2] for line in text.splitlines() if line.strip()]
    if any(len(pair) < 2 or pair[1] not in labels for pair in pairs):
        raise InputError(f"{annotations} names a class that the train folder has none for, or is damaged")
    if outside := [file for file, _ in pairs if Path(file).name != file or file == ".."]:
        raise InputError(f"{annotations} names {outside[0]!r}, which is not the name of a file in {images}")
    return [(images / file, labels[wnid]) for file, wnid in sorted(pairs, key=lambda pair: pair[::-1])]


@dataclass(frozen=True)
class _Found:
    """What lies below a class folder: image files by folder, then by name; how many of which format; how many other
    files of which ending."""

    images: list[Path]
    formats: Counter[str]
    left_out: Counter[str]


def _scan(folder: Path) -> _Found:
    """Search a class folder, sub-folders and links too; what several ways lead to is one image, and litter is none."""
    here = os.path.realpath(folder)
    beside = Path(os.path.realpath(folder.parent), "_")  # the class folder may itself be a link
    entered = set(map(str, [*beside.parents, *Path(here).parents]))  # real paths; a link to one of these leads back
    files: dict[str, tuple[str, str]] = {}  # real path -> folder and name
    linked: dict[str, tuple[str, str]] = {}
    folders = deque([(str(folder), here)])  # those behind links last: the place where a file really lies comes first
    while folders:
        path, real = folders.popleft()
        if real in entered:
            continue
        entered.add(real)
        for entry in _entries(path):
            link = entry.is_symlink()
            target = os.path.realpath(entry.path) if link else f"{real}/{entry.name}"
            if os.path.isdir(target) if link else entry.is_dir():
                (folders.append if link else folders.appendleft)((entry.path, target))
            elif link or entry.is_file():  # a link to nothing is an error of its own when it is read
                (linked if link else files).setdefault(target, (path, entry.name))
    images, formats, left_out = [], Counter[str](), Counter[str]()
    for path, name in sorted((linked | files).values()):
        ending = _ending(name)
        if ending in endings():
            images.append(Path(path, name))
            formats[endings()[ending]] += 1
        else:
            left_out[ending or "no ending"] += 1
    return _Found(images, formats, left_out)


def _entries(folder: Path | str) -> list[os.DirEntry]:
    """What a folder holds, by name, without litter."""
    try:
        return sorted(
            (entry for entry in os.scandir(folder) if not _LITTER.fullmatch(entry.name)), key=lambda entry: entry.name
        )
    except OSError as error:
        raise InputError(f"{folder} cannot be listed ({one_line(error)})") from None


def _ending(name: str) -> str:
    return os.path.splitext(name)[1].lower()
