"""Safetensors files that know their own damage: every block of numbers has a checksum.

A file of ours begins with a tensor "checksums", int64: the CRC-32 of the description (the metadata, and name, type and
shape of every other tensor), then that of each block of the other tensors, by name. A block is an entry along the first
dimension of a tensor of two or more, such as one epoch's parameters, so that reading one row checks one row; any other
tensor is one block. A CRC of a gigabyte takes about a second or less, an SHA-256 several.
"""

import contextlib
import json
import math
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pad.errors import InputError
from pad.store.files import atomic_file, unreadable

_CHECKSUMS = "checksums"

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}

Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]


@contextlib.contextmanager
def tensor_writer(path: Path | str, layout: Layout, metadata: dict) -> Iterator[Callable[[Tensor], None]]:
    """Write a safetensors file piece by piece, atomically; yields ``write(block)``.

    ``layout`` gives type and shape of each tensor, types of larger elements first. Blocks come in its order: every
    ``tensor[i]`` of a tensor of two or more dimensions, any other tensor whole.
    """
    described = json.dumps(metadata, sort_keys=True)
    starts, total = _block_starts(layout)
    order = iter([starts[name] + i for name, (_, shape) in layout.items() for i in range(_blocks(shape))])
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
    entries: dict[str, dict] = {"__metadata__": {"pad": described}}
    start = 0
    for name, (dtype, shape) in layout.items():
        end = start + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _blocks(shape: tuple[int, ...]) -> int:
    return shape[0] if len(shape) > 1 else 1


def _block_starts(layout: Layout) -> tuple[dict[str, int], int]:
    """Where among the checksums those of each tensor begin, after that of the description; and how many there are."""
    starts = {}
    total = 1
    for name in sorted(layout):
        starts[name] = total
        total += _blocks(layout[name][1])
    return starts, total


def _bytes(block: Tensor) -> memoryview:
    return block.contiguous().reshape(-1).view(torch.uint8).numpy().data


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

    metadata: what it was saved with. layout: type and shape of each tensor, by name; none has been read.
    """

    def __init__(self, path: Path | str, handle: safe_open, remedy: str):
        self._path, self._handle, self._remedy = path, handle, remedy
        try:
            described = handle.metadata()["pad"]
            metadata = json.loads(described)
        except (KeyError, TypeError, ValueError, RecursionError):
            metadata = None
        if not isinstance(metadata, dict):
            raise InputError(f"{path} carries no description of this toolkit's; it was written by something else")
        dtypes = {name: dtype for dtype, name in _NAMES.items()}
        parts = {name: handle.get_slice(name) for name in sorted(handle.keys())}
        if _CHECKSUMS not in parts:
            raise InputError(f"{path} carries no checksums; it was written by something else, or by an earlier version")
        if not all(part.get_dtype() in dtypes for part in parts.values()):
            raise self._damaged("its header")
        self.metadata: dict = metadata
        self.layout: Layout = {
            name: (dtypes[part.get_dtype()], tuple(part.get_shape())) for name, part in parts.items()
        }
        found = self.layout.pop(_CHECKSUMS)
        self._starts, total = _block_starts(self.layout)
        if found != (torch.int64, (total,)):
            raise self._damaged("its header")
        self._checksums = handle.get_tensor(_CHECKSUMS).tolist()
        if self._checksums[0] != _description_checksum(described, self.layout):
            raise self._damaged("its header")

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


REMEDY = "it has to be made again"


@contextlib.contextmanager
def open_tensors(
    path: Path | str, *, kind: str | None = None, format: int | None = None, remedy: str = REMEDY
) -> Iterator[tuple[TensorFile, dict]]:
    """Open a safetensors file of ours lazily: yields it and its metadata.

    ``kind`` and ``format`` are what the metadata must say under these names, where they are given; ``remedy`` says what
    to do about a damaged file. Raises InputError when the file is missing, damaged, of another kind or format, or was
    not written by this toolkit. That the file is as long as its header says is checked before anything is read.
    """
    if reason := unreadable(path):
        raise InputError(f"{path} {reason}")
    try:
        handle = safe_open(str(path), framework="pt")
    except (SafetensorError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path} is not a whole safetensors file ({reason}); {remedy}") from None
    with handle:
        file = TensorFile(path, handle, remedy)
        if kind is not None and file.metadata.get("kind") != kind:
            raise InputError(f"{path} is not a {kind}")
        if format is not None and file.metadata.get("format") != format:
            raise InputError(f"{path} has format {file.metadata.get('format')!r}; this version reads format {format}")
        yield file, file.metadata


def load_tensors(
    path: Path | str, *, kind: str | None = None, format: int | None = None, remedy: str = REMEDY
) -> tuple[dict[str, Tensor], dict]:
    """All tensors of a safetensors file of ours, and its metadata. Arguments and errors as of :func:`open_tensors`."""
    with open_tensors(path, kind=kind, format=format, remedy=remedy) as (file, metadata):
        return {name: file.tensor(name) for name in file.layout}, metadata
