"""Data sets that torchvision reads and downloads."""

import contextlib
import io
import logging
import shutil
import socket
from pathlib import Path

import torch
from torch import Tensor

from pad.data.images import ImageData, Statistics, one_line
from pad.errors import InputError
from pad.store.files import put_in_place, temporary_folder

log = logging.getLogger("pad")

_DOWNLOAD_TIMEOUT = 30  # seconds without an answer after which a download counts as failed


def load_torchvision(root: Path, subset: str | None, res: int, *, name: str, statistics: Statistics) -> ImageData:
    """One of torchvision's sets, ``res`` pixels a side, from the files in ``root``; what is missing is downloaded."""
    from torchvision import datasets  # late: half a second that the other sets need not wait for

    dataset = getattr(datasets, name)
    # CIFAR's files are pickles: torchvision checks them by checksum before it opens them
    by_split = hasattr(dataset, "split_list")
    splits = [{"split": "train"}, {"split": "test"}] if by_split else [{"train": True}, {"train": False}]

    def read(folder: Path, download: bool) -> list:
        return [dataset(folder, download=download, **split) for split in splits]

    try:
        parts = read(root, download=False)
    except Exception as unread:  # torchvision raises whatever its file readers raise
        files, archives = _files(name, dataset)
        log.info("%s is not whole in %s: downloading it", name, root)
        try:
            parts = _download(root, files, archives, read)
        except Exception as error:
            packed = f" (or, packed, {', '.join(archives)})" if archives else ""
            raise InputError(
                f"{name} cannot be read from {root} ({one_line(unread)}) nor downloaded ({one_line(error)}); "
                f"expected there: {', '.join(files)}{packed}"
            ) from None

    (train_images, train_labels), (test_images, test_labels) = (_tensors(part) for part in parts)
    class_names = tuple(getattr(parts[0], "classes", None) or map(str, range(10)))
    shape = train_images.shape[1:2] + (res, res)
    for images, labels in ((train_images, train_labels), (test_images, test_labels)):
        if len(images) != len(labels):
            raise InputError(f"{name} in {root} is damaged: {len(images)} images but {len(labels)} labels")
        if images.shape[1:] != shape or images.dtype != torch.uint8:
            raise InputError(f"{name} in {root} is damaged: its images are not all uint8 of {res}x{res} pixels")
        if not len(labels) or labels.min() < 0 or labels.max() >= len(class_names):
            raise InputError(f"{name} in {root} is damaged: its labels are not numbers of {len(class_names)} classes")
    return ImageData(
        name=name,
        train_images=train_images,
        train_labels=train_labels,
        test_images=test_images,
        test_labels=test_labels,
        class_names=class_names,
        mean=statistics[0],
        std=statistics[1],
    )


def _tensors(part) -> tuple[Tensor, Tensor]:
    """Images ``[N, C, H, W]`` and int64 labels of a torchvision data set."""
    pixels = torch.as_tensor(part.data)
    if pixels.ndim == 3:
        pixels = pixels[:, None]
    elif pixels.shape[-1] == 3:
        pixels = pixels.permute(0, 3, 1, 2)
    labels = part.labels if hasattr(part, "labels") else part.targets
    return pixels.contiguous(), torch.as_tensor(labels, dtype=torch.int64)


def _files(name: str, dataset) -> tuple[list[str], list[str]]:
    """The files torchvision reads, relative to its root, and the archives it would download and unpack."""
    if hasattr(dataset, "split_list"):  # SVHN
        return [dataset.split_list[split][1] for split in ("train", "test")], []
    if hasattr(dataset, "base_folder"):  # CIFAR
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
