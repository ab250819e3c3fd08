"""``.pt`` and ``.npz`` files, which others write and read: only ever data."""

import contextlib
import pickle
import re
import warnings
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pad.errors import InputError
from pad.store.files import atomic_file, unreadable

# What torch.load says of files that others wrote: a tensor's indices are checked; an old file was pickled otherwise.
_OF_NO_ACCOUNT = ("Validating sparse tensor invariants", "Detected pickle protocol")

_MOST_COMPRESSED = 100  # times; images come to less than 10

_SIGNATURES = {
    b"\x93NUMPY": "a NumPy file",
    b"\x1f\x8b": "a gzip archive",
    b"7z\xbc\xaf": "a 7z archive",
    b"\x89HDF": "an HDF5 file",
    b"\x89PNG": "a picture",
    b"\xff\xd8\xff": "a picture",
}


class _DType:
    """A NumPy type in a pickle, of which its name and byte order count: NumPy's own would take over any state."""

    def __init__(self, name: str, *_):
        if not re.fullmatch(r"[biuf]\d+", name):
            raise ValueError(f"NumPy's {name} is no number")
        self.dtype = np.dtype(name)

    def __setstate__(self, state: tuple) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array(np.ndarray):
    """A NumPy array in a pickle; NumPy checks that its bytes are as many as its shape and type want."""

    def __setstate__(self, state: tuple) -> None:
        version, shape, dtype, by_column, data = state
        super().__setstate__((version, shape, dtype.dtype, by_column, bytes(data)))


def _array(*_) -> np.ndarray:
    """One whose shape, type and numbers its state is to bring."""
    return np.ndarray.__new__(_Array, (0,))


def _number(dtype: _DType, data: bytes):
    return np.frombuffer(data, dtype.dtype)[0].item()


# Stand-ins for what NumPy's arrays and numbers are rebuilt by, under the names of its versions 1 and 2
_NUMPY: list = [(_DType, "numpy.dtype"), (_Array, "numpy.ndarray")] + [
    (make, f"numpy.{module}.multiarray.{name}")
    for module in ("core", "_core")
    for name, make in (("_reconstruct", _array), ("scalar", _number))
]


def load_pt(path: Path | str):
    """Load a ``.pt`` file of tensors and plain containers, never unpickling code (``weights_only=True``).

    Tensors stay on disk until they are touched (in a file of before torch 1.6 they do not). Arrays and numbers of NumPy
    are read, too. Raises InputError when the file is missing, damaged (its numbers are checked), holds anything else,
    or claims more than its size.
    """
    path = Path(path)
    if reason := unreadable(path):
        raise InputError(f"{path} {reason}")
    try:
        with open(path, "rb") as handle:
            zipped = handle.read(4) == b"PK\x03\x04"
        if zipped:
            _check_archive(path)
        with warnings.catch_warnings(), torch.serialization.safe_globals(_NUMPY):
            for message in _OF_NO_ACCOUNT:
                warnings.filterwarnings("ignore", message, category=UserWarning)
            # mapped, so that no claim about a tensor's size can reach beyond the file
            value = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except InputError:
        raise
    except Exception as error:  # damage surfaces as almost any exception: IndexError, struct.error, AssertionError, ...
        reason = f"is damaged or not a .pt file ({type(error).__name__})"
        if isinstance(error, pickle.UnpicklingError):
            reason = "holds more than tensors (it would run code when loaded) or is damaged"
        raise InputError(f"{path} {_other_kind(path) or reason}; it was not loaded") from None
    _check_extent(path, value)
    return value


def load_numbers(path: Path | str) -> Tensor:
    """The tensor of real numbers that a ``.pt`` file holds. Raises as :func:`load_pt` and :func:`numbers`."""
    return numbers(load_pt(path), path)


def numbers(value, where: Path | str) -> Tensor:
    """The tensor of real numbers that a value is, on the CPU; what is alone in a list or dict counts as it.

    Raises InputError, which begins with ``where`` it came from, when it is anything else.
    """
    for _ in range(3):
        if isinstance(value, (list, tuple, dict)) and len(value) == 1:
            [value] = value.values() if isinstance(value, dict) else value
    flat = isinstance(value, (list, tuple)) and all(isinstance(item, (int, float)) for item in value)
    with contextlib.suppress(TypeError, ValueError, RuntimeError, OverflowError):
        if isinstance(value, np.ndarray):
            value = torch.from_numpy(value.astype(value.dtype.newbyteorder("=")))
        elif flat or isinstance(value, (int, float)):
            value = torch.as_tensor(value)
    if not isinstance(value, Tensor):
        inside = f" of {len(value)}" if isinstance(value, (list, tuple, dict)) else ""
        names = f" ({', '.join(map(str, value))[:80]})" if isinstance(value, dict) else ""
        raise InputError(f"{where} holds a {type(value).__name__}{inside}{names}, not one tensor of numbers")
    if value.layout != torch.strided or value.is_meta or value.is_complex() or value.is_quantized:
        raise InputError(f"{where} holds a tensor of {value.dtype}, {value.layout}; plain numbers are needed")
    return value.detach().contiguous()


def load_npz(path: Path | str) -> dict[str, np.ndarray]:
    """The arrays of a ``.npz`` file, by name. Raises InputError when it is missing, damaged or holds Python objects."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path} {'is a folder' if path.is_dir() else 'does not exist'}")
    try:
        with zipfile.ZipFile(path) as archive:
            claimed = sum(part.file_size for part in archive.infolist())
        if claimed > _MOST_COMPRESSED * path.stat().st_size:
            raise InputError(f"{path} claims to hold {claimed} bytes in {path.stat().st_size}; it was not loaded")
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except InputError:
        raise
    except Exception as error:  # as for .pt: damage surfaces as almost any
        reason = f"is damaged, no .npz file, or holds more than numbers ({type(error).__name__})"
        raise InputError(f"{path} {reason}; it was not loaded") from None


def _other_kind(path: Path) -> str:
    """What a file is that is no .pt file, as far as its first bytes tell; else nothing."""
    with open(path, "rb") as handle:
        start = handle.read(512)
    if not start:
        return "is empty"
    if start.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer and not the file it stands for, which `git lfs pull` brings"
    for signature, kind in _SIGNATURES.items():
        if start.startswith(signature):
            return f"is {kind}, not a .pt file"
    if start[8:10] == b'{"':
        return "is a safetensors file, not a .pt file"
    text = "".join(start.decode(errors="ignore").split())  # its last letter may be cut in two
    if not text.isprintable() or not text:
        return ""
    return f"is a {'web page' if text.startswith('<') else 'text file'}, not a .pt file"


def _check_archive(path: Path) -> None:
    """Raise InputError unless every part of a zip archive is stored as it is, within the file, and undamaged."""
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile:
        raise InputError(f"{path} is damaged: its end is missing, as of a download that broke off") from None
    with archive:
        parts = archive.infolist()
        if not any(part.filename.endswith("data.pkl") for part in parts):
            raise InputError(f"{path} is a zip archive of other files, not a .pt file; it was not loaded")
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
        elif isinstance(value, np.ndarray):
            if value.nbytes > path.stat().st_size:
                raise InputError(f"{path} claims an array of shape {list(value.shape)}, which it does not hold")
        elif isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta:
            if value.numel() * value.itemsize > value.untyped_storage().nbytes():
                raise InputError(f"{path} claims a tensor of shape {list(value.shape)}, which it does not hold")


def save_pt(path: Path | str, value) -> None:
    """Write tensors or plain containers of them as a ``.pt`` file, atomically."""
    with atomic_file(path) as handle:  # a handle, not a path: the archive must not record the temporary name
        torch.save(value, handle)
