"""``.pt`` files, which others write and read: only ever data."""

import pickle
import warnings
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from pad.errors import InputError
from pad.store.files import atomic_file

# What torch.load says of files that others wrote: a tensor's indices are checked; an old file was pickled otherwise.
_OF_NO_ACCOUNT = ("Validating sparse tensor invariants", "Detected pickle protocol")


def load_pt(path: Path | str):
    """Load a ``.pt`` file of tensors and plain containers, never unpickling code (``weights_only=True``).

    Tensors stay on disk until they are touched (in a file of before torch 1.6 they do not). Raises InputError when the
    file is missing, damaged (its numbers are checked), holds anything else, or claims more than its size.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path} does not exist")
    try:
        with open(path, "rb") as handle:
            zipped = handle.read(4) == b"PK\x03\x04"
        if zipped:
            _check_archive(path)
        with warnings.catch_warnings():
            for message in _OF_NO_ACCOUNT:
                warnings.filterwarnings("ignore", message, category=UserWarning)
            # mapped, so that no claim about a tensor's size can reach beyond the file
            value = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError:
        reason = "holds more than tensors (it would run code when loaded) or is damaged"
        raise InputError(f"{path} {reason}; it was not loaded") from None
    except InputError:
        raise
    except Exception as error:  # damage surfaces as almost any exception: IndexError, struct.error, AssertionError, ...
        raise InputError(f"{path} is damaged or not a .pt file ({type(error).__name__})") from None
    _check_extent(path, value)
    return value


def _check_archive(path: Path) -> None:
    """Raise InputError unless every part of a zip archive is stored as it is, within the file, and undamaged."""
    with zipfile.ZipFile(path) as archive:
        parts = archive.infolist()
        if any(part.compress_type != zipfile.ZIP_STORED for part in parts):
            raise InputError(f"{path} is compressed, which torch.save never does; it was not loaded")
        claimed, size = sum(part.file_size for part in parts), path.stat().st_size
        if claimed > size:
            raise InputError(f"{path} has {size} bytes but claims to hold {claimed}; it was not loaded")
        if (damaged := archive.testzip()) is not None:
            raise InputError(f"{path} is damaged ({damaged} does not match its checksum)")


def _check_extent(path: Path, value) -> None:
    """Raise InputError when a tensor repeats the numbers it has in memory: a few bytes can stand for terabytes."""
    todo, seen = [value], set()
    while todo:
        value = todo.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, dict):
            todo += value.values()
        elif isinstance(value, (list, tuple)):
            todo += value
        elif isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta:
            if value.numel() * value.itemsize > value.untyped_storage().nbytes():
                raise InputError(f"{path} claims a tensor of shape {list(value.shape)}, which it does not hold")


def save_pt(path: Path | str, value) -> None:
    """Write tensors or plain containers of them as a ``.pt`` file, atomically."""
    with atomic_file(path) as handle:  # a handle, not a path: the archive must not record the temporary name
        torch.save(value, handle)
