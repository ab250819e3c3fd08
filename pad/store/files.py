"""Files that are whole or absent."""

import contextlib
import io
import os
import re
import shutil
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from pad.errors import InputError
from pad.store.locks import lock_descriptor

TEMPORARY_SUFFIX = ".partial"

_TEMPORARY = re.compile(r".+\.\d+-[0-9a-f]{8}" + re.escape(TEMPORARY_SUFFIX))  # <name>.<process>-<random>.partial


def slug(name: str) -> str:
    """A name as part of a file's."""
    return re.sub(r"[^A-Za-z0-9.]+", "_", name).strip("_.")


def refuse_taken(out: Path, overwrite: bool) -> None:
    """Raise InputError when the file ``out`` is there and not to be replaced, or cannot be written."""
    if out.is_dir() or (out.exists() and not overwrite):
        raise InputError(f"out: {out} is there; name another file, or replace it with --overwrite")
    refuse_unwritable(out.parent)


def refuse_unwritable(folder: Path | str) -> None:
    """Raise InputError, before hours of work, when no files can be written to ``folder``; makes nothing."""
    folder = Path(folder)
    parent = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        reason = "may not be written to" if parent.is_dir() else "is not a folder"
        raise InputError(f"nothing can be written to {folder}: {parent} {reason}")


def unreadable(path: Path | str) -> str:
    """Why ``path`` is no file that can be read, in words that follow its name; nothing where it is one."""
    try:
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode):
            return "is a folder" if stat.S_ISDIR(mode) else "is a device or a pipe"
        with open(path, "rb"):
            return ""
    except FileNotFoundError:
        return "does not exist"
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def names_in(folder: Path | str) -> list[str]:
    """The names in a folder, sorted; none where it does not exist. Raises InputError when they cannot be listed."""
    try:
        return sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise InputError(f"{folder} cannot be listed ({error.strerror})") from None


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


@contextlib.contextmanager
def whole_folder(path: Path | str) -> Iterator[Path]:
    """A folder to fill, which gets its name ``path``, flushed to disk, when the block ends, or is removed.

    Raises InputError when something else than an empty folder has that name.
    """
    path = Path(path)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise InputError(f"{path} is there already; name another folder, or move it away")
    path.parent.mkdir(parents=True, exist_ok=True)
    with _named(path), temporary_folder(path.parent) as inside:
        made = inside / "made"
        made.mkdir()
        yield made
        for file in sorted(made.rglob("*")):
            if file.is_file():
                with open(file, "rb") as handle:
                    os.fsync(handle.fileno())
            else:
                _sync_folder(file)
        os.replace(made, path)
    _sync_folder(path.parent)


def put_in_place(source: Path, path: Path) -> None:
    """Give a file that others have written its final name, on the same disk, once it is flushed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(source, "rb") as handle:
        os.fsync(handle.fileno())
    os.replace(source, path)
    _sync_folder(path.parent)


def _claim(path: Path, *, folder: bool = False) -> tuple[int, Path]:
    """Make a temporary file or folder next to ``path`` and lock it; return it open, and its name.

    A lock, unlike a process's number, ends with its process and is known to all machines. Without locks, which some
    network disks lack, nothing is taken for a leftover.
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
            lock_descriptor(descriptor, wait=True)
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
                if lock_descriptor(descriptor):
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
    """Write a text file atomically, in UTF-8; bytes of a file's name that are not UTF-8 become \\udcff, say."""
    with atomic_file(path) as handle:
        handle.write(text.encode(errors="backslashreplace"))


def save_picture(path: Path | str, picture: np.ndarray) -> None:
    """Write uint8 [H, W, 3] as a PNG file, atomically; equal pictures give equal bytes."""
    with atomic_file(path) as handle:
        Image.fromarray(picture).save(handle, format="PNG")
