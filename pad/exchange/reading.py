"""Synthetic sets in the files of others: which form a file has, and what it says and does not say."""

import csv
import json
import logging
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pad.data.decoding import read_images
from pad.data.folders import class_folders, labelled_files
from pad.data.images import one_line
from pad.errors import InputError
from pad.exchange.writing import ABOUT, LOGIT, NPZ, PNG_TABLE, ROWS_TABLE, table_digest
from pad.store.foreign import load_npz, load_numbers, load_pt, numbers

log = logging.getLogger("pad")

PIXELS, NETWORK = "pixels", "network"  # what the numbers of images are
CLASSES, PROBABILITIES, LOGITS = "classes", "probabilities", "logits"  # what labels are
_RES, _TRIO = "DC, DSA, DM", "MTT to PAD"  # forms
_UNWHITENED = "images_zca"  # begins the names of published files of pixels


@dataclass(kw_only=True)
class Foreign:
    """A synthetic set as a file of others holds it. What the file does not say is None.

    form: what it is. where: of the images. images ``[N, C, H, W]``: uint8, which are pixels, or floating-point numbers.
    labels ``[N, ...]``. lr: learning rate. values: "pixels" (0 to 1) or "network" (normalised or whitened).
    label_form: "classes", "probabilities" or "logits". factor: of multi-formation. padded: whether grey is put around
    images whose sides it does not divide. folders: names that class numbers are places among, where the numbers are not
    the data set's. about: what an export of this toolkit's says of itself. classes ``[N]``: the numbers of those that
    images with soft labels stand for.
    """

    form: str
    where: Path
    images: Tensor
    labels: Tensor
    lr: float | None = None
    values: str | None = None
    label_form: str | None = None
    factor: int | None = 1
    padded: bool = False
    folders: list[str] | None = None
    about: dict = field(default_factory=dict)
    classes: Tensor | None = None

    def __post_init__(self) -> None:
        """Raise InputError for what no set can be; what classes and sides there are is for the data set to say."""
        images, labels = self.images, self.labels
        if images.ndim != 4 or not images.numel():
            raise InputError(f"{self.where}: images are a tensor of shape {list(images.shape)}, not [N, C, H, W]")
        if images.dtype == torch.uint8:
            if self.values == NETWORK:
                raise InputError(f"{self.where}: images of whole numbers are pixels, not what networks see")
            self.values = PIXELS
        elif not images.is_floating_point() or not images.isfinite().all():
            raise InputError(f"{self.where}: images are not finite floating-point numbers, nor bytes")
        if not labels.ndim or len(labels) != len(images):
            raise InputError(f"{self.where}: {len(labels) if labels.ndim else 1} labels for {len(images)} images")
        if not labels.float().isfinite().all():
            raise InputError(f"{self.where}: labels with a value that is not finite")
        if labels.numel() == len(labels):
            self.labels, self.label_form = labels.flatten(), CLASSES
        if self.classes is not None and self.classes.shape != (len(images),):
            raise InputError(f"{self.where}: classes are a tensor of shape {list(self.classes.shape)}, not [N]")


def read_foreign(
    source: Path | str,
    *,
    labels: Path | str | None = None,
    lr: Path | str | float | None = None,
    experiment: int | None = None,
) -> Foreign:
    """Read the set at ``source``, a file or a folder; no code in it is run.

    - ``res_*.pt`` of DC, DSA and DM: ``experiment`` is the place of one of its sets.
    - ``data.pt`` of IDC and NCFM: images and class numbers.
    - ``images_*.pt`` of MTT, FTD, TESLA, DATM and PAD, with ``labels`` and ``lr`` (a file, or the number); by default
      the files of those names beside it.
    - ``.npz`` with ``images`` and ``labels``, and ``lr`` if it is known.
    - a folder of images in folders of their classes, or what :func:`pad.exchange.writing.export_set` wrote.

    Raises InputError for anything else.
    """
    source = Path(source)
    if source.is_dir():
        found = _folder(source, labels)
    elif source.suffix == ".npz":
        found = _npz(source)
    elif source.suffix == ".safetensors":
        raise InputError(f"{source} is in the form of this toolkit, or of none that is read")
    else:
        found = _pt(source, labels, experiment)
    if experiment is not None and found.form != _RES or labels is not None and found.form != _TRIO:
        what = f"experiment {experiment}" if experiment is not None else f"labels {labels}"
        raise InputError(f"{what} was asked for, but {source} ({found.form}) holds one set with its labels")
    if isinstance(lr, float):
        found.lr = lr
    elif lr is not None:
        found.lr = _single(load_numbers(lr), lr)
    return found


def _pt(path: Path, labels_path: Path | str | None, experiment: int | None) -> Foreign:
    value = load_pt(path)
    if isinstance(value, dict) and "data" in value:
        return _res(path, value["data"], experiment)
    if isinstance(value, (list, tuple)) and len(value) == 2:
        images, labels = (numbers(each, f"{path}, part {i}") for i, each in enumerate(value))
        return Foreign(form="IDC, NCFM", where=path, images=images, labels=labels, values=PIXELS, factor=None)
    labels_path = labels_path or _beside(path, "labels")
    if labels_path is None:
        raise InputError(f"{path}: no file of labels stands beside it; name it")
    images = numbers(value, path)
    lr_path, about = _beside(path, "lr"), _about(path.parent)
    return Foreign(
        form=_TRIO,
        where=path,
        images=images,
        labels=load_numbers(labels_path),
        lr=None if lr_path is None else _single(load_numbers(lr_path), lr_path),
        values=(PIXELS if path.name.startswith(_UNWHITENED) else NETWORK) if about else None,
        label_form=LOGITS if about else None,
        about=about,
        classes=_counted(about, path),
    )


def _counted(about: dict, where: Path) -> Tensor | None:
    """The classes of an export's images, where it says that these are not as many of each."""
    counts = about.get("images_of_each_class")
    if counts is None:
        return None
    if not isinstance(counts, list) or not all(type(count) is int and 0 < count < 1 << 31 for count in counts):
        raise InputError(f"{where.parent / ABOUT} is damaged: images_of_each_class is no list of numbers")
    return torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))


def _beside(path: Path, name: str) -> Path | None:
    """``labels_best.pt`` of ``images_best.pt``, if it is there."""
    images = _UNWHITENED if path.name.startswith(_UNWHITENED) else "images"
    other = path.with_name(path.name.replace(images, name, 1))
    return other if other != path and other.is_file() else None


def _res(path: Path, experiments, experiment: int | None) -> Foreign:
    if not isinstance(experiments, (list, tuple)) or not experiments:
        raise InputError(f"{path}: data is not a list of experiments")
    if experiment is None and len(experiments) > 1:
        raise InputError(f"{path} holds {len(experiments)} sets; say which: --experiment 0 to {len(experiments) - 1}")
    if (experiment or 0) >= len(experiments):
        raise InputError(f"experiment: {path} holds {len(experiments)} sets, counted from 0; there is no {experiment}")
    pair = experiments[experiment or 0]
    if not isinstance(pair, (list, tuple)) or len(pair) != 2:
        raise InputError(f"{path}: experiment {experiment or 0} is not a pair of images and labels")
    images, labels = (numbers(each, f"{path}, part {i}") for i, each in enumerate(pair))
    return Foreign(form=_RES, where=path, images=images, labels=labels, values=NETWORK)


def _npz(path: Path) -> Foreign:
    arrays = load_npz(path)
    missing = sorted({"images", "labels"} - arrays.keys())
    if missing:
        there = ", ".join(sorted(arrays))[:80]
        raise InputError(f"{path} holds no {' and no '.join(missing)}; there are {there}")
    tensors = {name: numbers(arrays[name], f"{path}, {name}") for name in ("images", "labels", "lr") if name in arrays}
    about = _parsed(str(arrays["about"]), path) if "about" in arrays else {}
    return Foreign(
        form="npz",
        where=path,
        images=tensors["images"],
        labels=tensors["labels"],
        lr=_single(tensors["lr"], path) if "lr" in tensors else None,
        values=NETWORK if about else None,
        label_form=LOGITS if about else None,
        about=about,
        classes=_class_numbers(arrays.get("classes"), path),
    )


def _class_numbers(array: np.ndarray | None, path: Path) -> Tensor | None:
    """Those that stand beside the labels. Others call their classes' names so."""
    return None if array is None or array.dtype.kind not in "iu" else numbers(array, f"{path}, classes")


def _folder(folder: Path, labels_path: Path | str | None) -> Foreign:
    if (folder / NPZ).exists():
        return _npz(folder / NPZ)
    trios = sorted(path for path in folder.glob("images_*.pt") if not path.name.startswith(_UNWHITENED))
    if len(trios) > 1:
        raise InputError(f"{folder} holds {len(trios)} sets, {trios[0].name} for one; name the file")
    if trios:
        return _pt(trios[0], labels_path, None)
    if about := _about(folder):
        return _pictures(folder, about)
    root = folder / "train" if (folder / "train").is_dir() else folder
    names = class_folders(root)
    if not names:
        raise InputError(f"{folder} holds no set: no folders of classes, no images_*.pt")
    files = labelled_files(root, {name: label for label, name in enumerate(names)})
    [images] = read_images([[file for file, _ in files]], None, as_seen=True)
    labels = torch.tensor([label for _, label in files])
    return Foreign(form="ImageFolder", where=folder, images=images, labels=labels, folders=names)


def _pictures(folder: Path, about: dict) -> Foreign:
    """What was exported as pictures, with the logits of its table."""
    table = folder / PNG_TABLE
    table = table if table.exists() else folder / ROWS_TABLE
    try:
        text = table.read_text(encoding="utf-8")
        if table_digest(text) != about.get("table"):
            raise InputError(f"{table} is not the whole table that {ABOUT} is of; export the set again")
        if table.suffix == ".csv":
            lines = list(csv.DictReader(text.splitlines()))
            columns = [f"{LOGIT}{c}" for c in range(sum(name.startswith(LOGIT) for name in lines[0]))]
            rows = [(line["file"], int(line["class"]), [float(line[column]) for column in columns]) for line in lines]
        else:
            found = map(json.loads, text.splitlines())
            rows = [(str(row["file_name"]), int(row["label"]), list(map(float, row["logits"]))) for row in found]
        labels, classes = torch.tensor([logits for *_, logits in rows]), torch.tensor([c for _, c, _ in rows])
    except FileNotFoundError:
        raise InputError(f"{folder} holds no {PNG_TABLE} and no {ROWS_TABLE}") from None
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, csv.Error, RecursionError) as error:
        raise InputError(f"{table} is damaged ({type(error).__name__})") from None
    if not labels.numel():
        raise InputError(f"{table} is damaged (it holds no labels)")
    outside = [file for file, *_ in rows if Path(file).is_absolute() or ".." in Path(file).parts]
    if outside:
        raise InputError(f"{table} names {outside[0]!r}, which is not in its folder")
    [images] = read_images([[table.parent / file for file, *_ in rows]], None, as_seen=True)
    lr = about.get("lr")
    if not isinstance(lr, (int, float)):
        raise InputError(f"{folder / ABOUT} is damaged: it says no learning rate")
    form = "PNG" if table.suffix == ".csv" else "Hugging Face"
    return Foreign(
        form=form,
        where=folder,
        images=images,
        labels=labels,
        lr=float(lr),
        label_form=LOGITS,
        about=about,
        classes=classes,
    )


def _about(folder: Path) -> dict:
    """What the export in a folder says of itself; nothing where it is none."""
    try:
        return _parsed((folder / ABOUT).read_text(encoding="utf-8"), folder / ABOUT)
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{folder / ABOUT} cannot be read ({one_line(error)})") from None


def _parsed(text: str, where: Path) -> dict:
    try:
        about = json.loads(text)
    except (ValueError, RecursionError):
        about = None
    if not isinstance(about, dict) or not isinstance(about.get("set"), dict):
        raise InputError(f"{where} does not say what set it is of; it is damaged, or of something else")
    return about


def _single(lr: Tensor, where: Path | str) -> float:
    if lr.numel() != 1:
        raise InputError(f"{where}: lr is a tensor of shape {list(lr.shape)}, not a single number")
    return float(lr.flatten()[0])
