"""One writer at a time: locks between processes, on files that exist only while they are held.

They are flock(2) locks: the kernel lets go of one when its process ends, however it ends, so a kill leaves none behind
(at most its file, which means nothing); on NFS Linux takes them on the server, for all machines. (filelock, the
library, keeps its files for good and does not say who holds one.) Where a file system knows no locks a line says so,
and nothing is guarded.
"""

import contextlib
import errno
import fcntl
import logging
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path

from pad.errors import InputError

log = logging.getLogger("pad")

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)

_OURS = re.compile(r"(\d+ \S+\n?)?")  # what a lock's file holds: its process and host, once it is taken

_without: set[Path] = set()  # folders that were found to know no locks, and of which this was said


@contextlib.contextmanager
def claim(path: Path | str) -> Iterator[bool]:
    """Whether this process got the lock at ``path``, which it then holds in the ``with`` block; never waits.

    A lock is not for this process to take twice: it counts as another's.
    """
    with _folder_of(Path(path)), _holding(Path(path), wait=False) as held:
        yield held


@contextlib.contextmanager
def in_turn(path: Path | str, what: str) -> Iterator[None]:
    """Hold the lock at ``path``; where another process has it, wait for it, saying in one line for ``what``.

    Where no lock can be made, as in a folder that may not be written to, nothing is guarded.
    """
    path = Path(path)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(_folder_of(path))
            if not stack.enter_context(_holding(path, wait=False)):
                log.info("waiting for %s, at work on %s", holder(path), what)
                stack.enter_context(_holding(path, wait=True))
        except OSError as error:
            log.debug("no lock %s (%s)", path, error)  # who cannot write here will say so
        yield


@contextlib.contextmanager
def only_writer(path: Path | str, what: str) -> Iterator[None]:
    """Hold the lock at ``path``; raise InputError, naming ``what`` and the process, where another one has it."""
    with claim(path) as held:
        if not held:
            raise InputError(f"{what} is being written by {holder(path)}; wait for it to end, or stop it")
        yield


def remove_leftovers(folder: Path | str) -> None:
    """Remove the files of locks in ``folder``, ``.<name>.lock``, that nobody holds: of processes that were killed."""
    for path in Path(folder).glob(".*lock"):
        with contextlib.suppress(OSError, ValueError):
            if path.is_symlink() or not path.is_file() or not _OURS.fullmatch(path.read_text(encoding="utf-8")):
                continue  # another program's
            with claim(path):
                pass


def holder(path: Path | str) -> str:
    """Who holds, or last held, the lock at ``path``, in words."""
    with contextlib.suppress(OSError, ValueError):
        number, host = Path(path).read_text(encoding="utf-8").split()
        return f"process {int(number)} on {host}"
    return "another process"


@contextlib.contextmanager
def _holding(path: Path, wait: bool) -> Iterator[bool]:
    if (handle := _take(path, wait)) is None:
        yield False
        return
    try:
        yield True
    finally:
        # Removed before it is released: who waits for it sees that its file has no name any more, and begins again.
        with contextlib.suppress(OSError):
            path.unlink()
        os.close(handle)


def _take(path: Path, wait: bool) -> int | None:
    """The open lock file, locked; None where another process holds it and one is not to wait."""
    while True:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except FileNotFoundError:  # the folder, made by this process and another, was removed by that one
            path.parent.mkdir(parents=True, exist_ok=True)
            continue
        try:
            if not _lock(handle, path, wait):
                os.close(handle)
                return None
            if _is_at(handle, path):
                with contextlib.suppress(OSError):  # on a full disk the lock holds all the same
                    os.ftruncate(handle, 0)
                    os.pwrite(handle, f"{os.getpid()} {socket.gethostname()}\n".encode(), 0)
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _lock(handle: int, path: Path, wait: bool) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        if path.parent not in _without:
            _without.add(path.parent)
            log.warning("%s is on a file system without locks: start no second process that writes there", path.parent)
    return True


def _is_at(handle: int, path: Path) -> bool:
    """Whether the open file is the one that has the name ``path`` now."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def _folder_of(path: Path) -> Iterator[None]:
    """Make the folder of ``path``; in the end remove what was made and is empty still: a refusal leaves nothing."""
    made = [folder for folder in path.parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            for folder in made:
                folder.rmdir()


def each_once(items, lock_of, work, what) -> None:
    others = []
    for item in items:
        with claim(lock_of(item)) as mine:
            if mine:
                work(item)
            else:
                others.append(item)
    for item in others:
        with in_turn(lock_of(item), what(item)):
            work(item)
