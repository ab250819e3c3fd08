"""Standard output and standard error, as commands write to them: what they say never ends the work."""

import contextlib
import errno
import io
import os
import sys
from collections.abc import Iterator
from typing import Any

_GONE = (errno.EPIPE, errno.EIO)  # who read it: the next command of a pipe, a terminal


class Stream:
    """A text stream that takes everything: once it cannot be written to, what is said goes nowhere.

    failure: why, where it is more than that nobody reads it any more, as on a full disk.
    """

    failure: OSError | None = None

    def __init__(self, stream: Any):
        self._stream = stream or open(os.devnull, "w", encoding="utf-8")
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")  # names have letters that its encoding may lack

    def __getattr__(self, name: str):
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._going_on():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._going_on():
            self._stream.flush()

    @contextlib.contextmanager
    def _going_on(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in _GONE:
                self.failure = error
            with contextlib.suppress(OSError):  # none of the system's, in a test
                descriptor = os.open(os.devnull, os.O_WRONLY)
                os.dup2(descriptor, self._stream.fileno())  # what is buffered goes there, too
                os.close(descriptor)


@contextlib.contextmanager
def standard_streams() -> Iterator[Stream]:
    """In the block, ``sys.stdout`` and ``sys.stderr`` are such streams, also where a process was started without.

    Yields standard output.
    """
    with contextlib.suppress(OSError):
        while (descriptor := os.open(os.devnull, os.O_RDWR)) < 3:
            pass  # else a file would get the number of a stream that was closed, and what libraries write there
        os.close(descriptor)
    output = Stream(sys.stdout)
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(Stream(sys.stderr)):  # type: ignore[type-var]
        try:
            yield output
        finally:
            sys.stdout.flush()
            sys.stderr.flush()


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """What is printed in the block goes nowhere."""
    with open(os.devnull, "w", encoding="utf-8", errors="backslashreplace") as nowhere:
        with contextlib.redirect_stdout(nowhere):
            yield
