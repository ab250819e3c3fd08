"""Data sets that torchvision reads and downloads."""

import contextlib
import io
import logging
import shutil
import socket
from pathlib import Path

import torch

from pad.data.images import _FIXED_SIZE, MEAN_STD, ImageData, _line
from pad.errors import InputError
from pad.store.files import put_in_place, temporary_folder

log = logging.getLogger("pad")

_DOWNLOAD_TIMEOUT = 30  # seconds without an answer after which a download counts as failed


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
        log.info("%s is not whole in %s: downloading it", name, root)
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
