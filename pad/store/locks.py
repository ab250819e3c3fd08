"""One writer at a time: locks between processes, on files that exist only while they are held.

They are flock(2) locks: the kernel lets go of one when its process ends, however it ends, so a kill leaves none behind
(at most its file, which means nothing); on NFS Linux takes them on the server, for all machines. Where a file system
knows no locks a line says so, and nothing is guarded.

The library filelock does not serve: its version 3, the last for Python 3.10, empties the file at every attempt, and so
loses who holds the lock; older ones of it let two processes hold a lock whose file comes and goes.
"""

import contextlib
import errno
import fcntl
import logging
import os
import re
import socket
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from pad.errors import InputError

log = logging.getLogger("pad")

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)

_OURS = re.compile(r"(\d+ \S+\n?)?")  # what a lock's file holds: its process and host, once it is taken

_without: set[Path] = set()  # folders that were found to know no locks, and of which this was said

Item = TypeVar("Item")


@contextlib.contextmanager
def claim(path: Path | str, *, wait: bool = False) -> Iterator[bool]:
    """Whether this process got the lock at ``path``, which it then holds in the ``with`` block.

    ``wait``: until it does. A lock is not for this process to take twice: it counts as another's. The lock's folder is
    made, and removed in the end if nothing else came to be in it.
    """
    path = Path(path)
    made = [folder for folder in path.parents if not folder.exists()]
    _make(path.parent)
    descriptor = None
    try:
        descriptor = _take(path, wait)
        yield descriptor is not None
    finally:
        if descriptor is not None:
            # Removed before it is released: who waits for it sees that its file has no name any more, and begins again.
            with contextlib.suppress(OSError):
                path.unlink()
            os.close(descriptor)
        with contextlib.suppress(OSError):
            for folder in made:
                folder.rmdir()


@contextlib.contextmanager
def in_turn(path: Path | str, what: str) -> Iterator[None]:
    """Hold the lock at ``path``; where another process has it, wait for it, saying in one line for ``what``.

    Where no lock can be made, as in a folder that may not be written to, nothing is guarded.
    """
    with contextlib.ExitStack() as stack:
        try:
            if not stack.enter_context(claim(path)):
                log.info("waiting for %s, at work on %s", holder(path), what)
                stack.enter_context(claim(path, wait=True))
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


def each_once(
    items: Iterable[Item],
    lock_of: Callable[[Item], Path],
    work: Callable[[Item], None],
    what: Callable[[Item], str],
    go_on: Callable[[], bool] = lambda: True,
) -> None:
    """Do ``work`` on each of the items that several processes share: first on those that no other has begun.

    Then it waits for each of the others, saying for ``what``, and does ``work`` on them, too, for their processes may
    have ended before they were done. So ``work`` leaves an item that is done as it is. It holds the lock of its item.
    It ends before the first item at which ``go_on`` says no.
    """
    others = []
    for item in items:
        if not go_on():
            return
        with claim(lock_of(item)) as mine:
            if mine:
                work(item)
            else:
                others.append(item)
    for item in others:
        if not go_on():
            return
        with in_turn(lock_of(item), what(item)):
            work(item)


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


def lock_descriptor(descriptor: int, *, wait: bool = False) -> bool:
    """Whether this process got the lock of an open file, which it holds until that is closed.

    Raises OSError where there are no locks.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


def _make(folder: Path) -> None:
    """Make a folder that other processes make and remove at the same time: it may come and go in the midst of this."""
    for _ in range(100):
        with contextlib.suppress(FileExistsError, FileNotFoundError):
            return folder.mkdir(parents=True, exist_ok=True)
        if os.path.lexists(folder):
            break
    folder.mkdir(parents=True, exist_ok=True)  # says what is wrong


def _take(path: Path, wait: bool) -> int | None:
    """The open lock file, locked; None where another process holds it and one is not to wait."""
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except FileNotFoundError:  # the folder, made by this process and another, was removed by that one
            _make(path.parent)
            continue
        with contextlib.ExitStack() as closing:
            closing.callback(os.close, descriptor)
            if not _lock(descriptor, path, wait):
                return None
            if _is_at(descriptor, path):
                with contextlib.suppress(OSError):  # on a full disk the lock holds all the same
                    os.ftruncate(descriptor, 0)
                    os.pwrite(descriptor, f"{os.getpid()} {socket.gethostname()}\n".encode(), 0)
                closing.pop_all()
                return descriptor


def _lock(descriptor: int, path: Path, wait: bool) -> bool:
    try:
        return lock_descriptor(descriptor, wait=wait)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        if path.parent not in _without:
            _without.add(path.parent)
            log.warning("%s is on a file system without locks: start no second process that writes there", path.parent)
        return True


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether the open file is the one that has the name ``path`` now."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False
