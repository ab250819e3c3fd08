"""Files that are whole or absent and know their own damage, and files from elsewhere that are only ever data."""

import contextlib
import fcntl
import io
import json
import math
import os
import pickle
import re
import shutil
import uuid
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pad.errors import InputError

TEMPORARY_SUFFIX = ".partial"
_TEMPORARY = re.compile(r".+\.\d+-[0-9a-f]{8}" + re.escape(TEMPORARY_SUFFIX))  # <name>.<process>-<random>.partial

# ---- whole or absent


@contextlib.contextmanager
def atomic_file(path: Path | str) -> Iterator[io.BufferedWriter]:
    """Yield a binary file to write; on success it is flushed to disk and gets the name ``path``.

    Until then it has a temporary name in the same folder, where what killed processes left is removed first. A file
    that has its final name is therefore complete, whatever happens in between. An OSError of writing names ``path``.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _named(path):
        descriptor, temporary = _claim(path)
    handle = _Writer(descriptor, path)
    try:
        try:
            yield handle
        except RuntimeError:  # torch.save turns a full disk into an error of its own
            if handle.failure:
                raise handle.failure from None
            raise
        with _named(path):
            handle.flush()
            os.fsync(descriptor)
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # what a full disk did not take is tried once more
            handle.close()
    _sync_folder(path.parent)


@contextlib.contextmanager
def temporary_folder(parent: Path) -> Iterator[Path]:
    """A folder in ``parent`` for the time of the block; one that a killed process left goes with the next."""
    descriptor, folder = _claim(parent / "download", folder=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


def put_in_place(source: Path, path: Path) -> None:
    """Give a file that others have written its final name, on the same disk, once it is flushed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(source, "rb") as handle:
        os.fsync(handle.fileno())
    os.replace(source, path)
    _sync_folder(path.parent)


def _claim(path: Path, folder: bool = False) -> tuple[int, Path]:
    """Make a temporary file or folder next to ``path`` and lock it: a lock, unlike a process's number, ends with its
    process and is known to all machines. Without locks, which some network disks lack, nothing is taken for a leftover.
    """
    _remove_leftovers(path.parent)
    while True:
        temporary = path.with_name(f"{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}{TEMPORARY_SUFFIX}")
        if folder:
            temporary.mkdir()
        try:
            descriptor = os.open(temporary, os.O_RDONLY if folder else os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileNotFoundError:
            if folder:
                continue  # another process took it for a leftover before it was locked
            raise
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if temporary.exists():
            return descriptor, temporary
        os.close(descriptor)  # the same


def _remove_leftovers(folder: Path) -> None:
    """Remove temporary files and folders of killed processes; those of living ones are locked."""
    leftovers = []
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        leftovers = [entry.path for entry in entries if _TEMPORARY.fullmatch(entry.name)]
    for leftover in leftovers:
        with contextlib.suppress(OSError):
            access = os.O_RDONLY if os.path.isdir(leftover) else os.O_RDWR  # which locks over NFS need
            descriptor = os.open(leftover, access | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(leftover) if os.path.isdir(leftover) else os.unlink(leftover)
            finally:
                os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    """Flush a folder, so that a new name in it outlasts a power failure. Some file systems cannot, and need not."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """An OSError says which file could not be written, by its final name."""
    try:
        yield
    except OSError as error:
        if error.errno is not None:
            error.filename = str(path)
        raise


class _Writer(io.BufferedWriter):
    """Notes what writing failed with, and of which file."""

    failure: OSError | None = None

    def __init__(self, descriptor: int, path: Path):
        super().__init__(io.FileIO(descriptor, "wb"))
        self._path = path

    def write(self, data) -> int:
        with self._noting():
            return super().write(data)

    def flush(self) -> None:
        with self._noting():
            super().flush()

    @contextlib.contextmanager
    def _noting(self) -> Iterator[None]:
        try:
            with _named(self._path):
                yield
        except OSError as error:
            self.failure = error
            raise


def write_text(path: Path | str, text: str) -> None:
    """Write a text file atomically, in UTF-8."""
    with atomic_file(path) as handle:
        handle.write(text.encode())


# ---- tensors with checksums
#
# A safetensors file of ours begins with a tensor "checksums", int64: the CRC-32 of the description (the metadata, and
# name, type and shape of every other tensor), then that of each block of the other tensors, by name. A block is an
# entry along the first dimension of a tensor of two or more, such as one epoch's parameters, so that reading one row
# checks one row; any other tensor is one block. A CRC of a gigabyte takes about a second or less, an SHA-256 several.

_CHECKSUMS = "checksums"
_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]


@contextlib.contextmanager
def tensor_writer(path: Path | str, layout: Layout, metadata: dict) -> Iterator[Callable[[Tensor], None]]:
    """Write a safetensors file piece by piece, atomically; yields ``write(block)``.

    ``layout`` gives type and shape of each tensor, types of larger elements first. Blocks come in its order: every
    ``tensor[i]`` of a tensor of two or more dimensions, any other tensor whole.
    """
    described = json.dumps(metadata, sort_keys=True)
    blocks = {name: _blocks(shape) for name, (_, shape) in layout.items()}
    starts, total = {}, 1
    for name in sorted(blocks):
        starts[name], total = total, total + blocks[name]
    order = iter([starts[name] + i for name in layout for i in range(blocks[name])])
    checksums = torch.zeros(total, dtype=torch.int64)
    checksums[0] = _description_checksum(described, layout)
    header = _header({_CHECKSUMS: (torch.int64, (total,)), **layout}, described)
    end = len(header) + 8 * total + sum(math.prod(shape) * dtype.itemsize for dtype, shape in layout.values())

    with atomic_file(path) as handle:
        handle.write(header)
        handle.write(_bytes(checksums))  # for now; they are known at the end

        def write(block: Tensor) -> None:
            data = _bytes(block.detach().cpu())
            checksums[next(order)] = zlib.crc32(data)
            handle.write(data)

        yield write
        handle.flush()
        if handle.tell() != end or next(order, None) is not None:
            raise RuntimeError(f"{path} was to have {end} bytes and got {handle.tell()}; it was not written")
        handle.seek(len(header))
        handle.write(_bytes(checksums))


def _header(layout: Layout, described: str) -> bytes:
    """Everything of a safetensors file before its data: an 8-byte length, then JSON padded to a multiple of 8 bytes."""
    entries, start = {"__metadata__": {"pad": described}}, 0
    for name, (dtype, shape) in layout.items():
        end = start + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _blocks(shape: tuple[int, ...]) -> int:
    return shape[0] if len(shape) > 1 else 1


def _bytes(block: Tensor) -> memoryview:
    return memoryview(block.contiguous().reshape(-1).view(torch.uint8).numpy())


def _description_checksum(described: str, layout: Layout) -> int:
    listed = [[name, _NAMES[dtype], *shape] for name, (dtype, shape) in sorted(layout.items())]
    return zlib.crc32(json.dumps([described, listed]).encode())


def save_tensors(path: Path | str, tensors: dict[str, Tensor], metadata: dict) -> None:
    """Write tensors and a JSON-able ``metadata`` dictionary as one safetensors file with checksums, atomically.

    The bytes are a function of the arguments: keys are sorted, nothing of the clock or the machine enters.
    """
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    layout = {name: (tensors[name].dtype, tuple(tensors[name].shape)) for name in names}
    with tensor_writer(path, layout, metadata) as write:
        for name in names:
            tensor = tensors[name].detach().cpu()
            for block in tensor if tensor.ndim > 1 else [tensor]:
                write(block)


class TensorFile:
    """An open safetensors file of ours. What is read of it is checked against its checksum.

    metadata: what it was saved with. layout: type and shape of each tensor; none of them has been read.
    """

    def __init__(self, path: Path | str, handle: safe_open, remedy: str):
        self._path, self._handle, self._remedy = path, handle, remedy
        try:
            described = handle.metadata()["pad"]
            self.metadata: dict = json.loads(described)
        except (KeyError, TypeError, ValueError, RecursionError):
            self.metadata = None
        if not isinstance(self.metadata, dict):
            raise InputError(f"{path} carries no description of this toolkit's; it was written by something else")
        dtypes = {name: dtype for dtype, name in _NAMES.items()}
        parts = {name: handle.get_slice(name) for name in handle.keys()}
        self.layout: Layout = {
            name: (dtypes.get(part.get_dtype()), tuple(part.get_shape())) for name, part in parts.items()
        }
        found = self.layout.pop(_CHECKSUMS, None)
        if found is None:
            raise InputError(f"{path} carries no checksums; it was written by something else, or by an earlier version")
        self._starts, total = {}, 1
        for name in sorted(self.layout):
            self._starts[name], total = total, total + _blocks(self.layout[name][1])
        usable = found == (torch.int64, (total,)) and all(dtype for dtype, _ in self.layout.values())
        if not usable:
            raise self._damaged("its header")
        self._checksums = handle.get_tensor(_CHECKSUMS).tolist()
        if self._checksums[0] != _description_checksum(described, self.layout):
            raise self._damaged("its header")

    def keys(self) -> list[str]:
        """The names of its tensors, sorted."""
        return sorted(self.layout)

    def tensor(self, name: str) -> Tensor:
        """A whole tensor, as a map of the file that is private to its reader. Raises InputError when it is damaged."""
        tensor = self._handle.get_tensor(name)
        for index, block in enumerate(tensor if tensor.ndim > 1 else [tensor]):
            self._check(name, index, block)
        return tensor

    def row(self, name: str, index: int) -> Tensor:
        """``tensor[index]`` of a tensor of two or more dimensions; nothing else is read. Raises as :meth:`tensor`."""
        row = self._handle.get_slice(name)[index : index + 1][0]
        self._check(name, index, row)
        return row

    def _check(self, name: str, index: int, block: Tensor) -> None:
        if zlib.crc32(_bytes(block)) != self._checksums[self._starts[name] + index]:
            raise self._damaged(f"{name}[{index}]" if len(self.layout[name][1]) > 1 else name)

    def _damaged(self, what: str) -> InputError:
        return InputError(f"{self._path} is damaged ({what} does not match its checksum); {self._remedy}")


@contextlib.contextmanager
def open_tensors(path: Path | str, remedy: str = "it has to be made again") -> Iterator[tuple[TensorFile, dict]]:
    """Open a safetensors file of ours lazily: yields it and its metadata.

    ``remedy`` says what to do about a damaged one. Raises InputError when the file is missing, damaged, or was not
    written by this toolkit. That the file is as long as its header says is checked before anything is read.
    """
    try:
        handle = safe_open(str(path), framework="pt")
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except (SafetensorError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path} is not a whole safetensors file ({reason}); {remedy}") from None
    with handle:
        file = TensorFile(path, handle, remedy)
        yield file, file.metadata


def load_tensors(path: Path | str, remedy: str = "it has to be made again") -> tuple[dict[str, Tensor], dict]:
    """All tensors of a safetensors file of ours, and its metadata. Raises InputError as :func:`open_tensors`."""
    with open_tensors(path, remedy) as (file, metadata):
        return {name: file.tensor(name) for name in file.keys()}, metadata


# ---- files from elsewhere


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
