"""The exceptions that end a command with a sentence: what was given cannot be used, or the work stopped early."""

import re


class InputError(Exception):
    """Something the user gave is wrong: an option, a file, a data set.

    The message is one clear sentence for the person at the terminal; the command line prints it without a
    traceback and exits with code 2. Raise it before any work is done.
    """


class Stopped(Exception):
    """The work stopped early, with what was finished saved. ``code`` is the exit code."""

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code


def is_of_memory(error: Exception) -> bool:
    """Whether memory ran out, of the CPU or a GPU, by the type and words that Python and torch have for it."""
    words = "out of memory|can't allocate memory|not enough memory"
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and bool(re.search(words, str(error))))
