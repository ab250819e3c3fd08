"""What a process sets up for speed before its first tensor: memory, where compiled code is kept, how threads wait."""

import contextlib
import ctypes
import hashlib
import os
import platform
from pathlib import Path

HOW_THREADS_WAIT = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")  # in the environment
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of <malloc.h>


def keep_freed_memory() -> None:
    """Let glibc's malloc keep what is freed, for the next tensor, instead of returning it to the kernel.

    By default every large temporary is mapped anew and its pages are zeroed on first touch, at each training step:
    several times the cost of the arithmetic of an elementwise operation. The process keeps its peak of CPU memory. Does
    nothing with other C libraries.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def keep_compiled_code() -> None:
    """Let torch.compile and Triton keep what they compile in :func:`compiled_folder`, for the next run.

    The former's own place for it is the folder of temporary files, which machines empty. ``TORCHINDUCTOR_CACHE_DIR``
    and ``TRITON_CACHE_DIR``, where they are set already, stay; makes no folder itself.
    """
    if folder := compiled_folder():
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))
        os.environ.setdefault("TRITON_CACHE_DIR", str(folder / "triton"))


def let_waiting_threads_sleep() -> None:
    """Let a thread that waits for the others of an operation sleep after some 50 microseconds.

    By default it spins, for milliseconds in GNU's OpenMP, for 200 in LLVM's and Intel's. Where other processes have the
    cores, it so keeps one from the very thread it waits for. OpenMP reads this when torch is loaded: importing
    :mod:`pad` calls it, which comes too late after torch. Processes started from here inherit it. Does nothing when the
    environment says already how to wait.
    """
    if os.environ.keys().isdisjoint(HOW_THREADS_WAIT):
        # Passive threads sleep at once. GNU's look 3,000 times first, as waking one takes about as long.
        os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "3000"}


def cache_folder() -> Path | None:
    """Where what takes long to make is kept: ``$PAD_CACHE``, else ``~/.cache/pad``; it may be missing.

    None where there can be none: the user has no home, may not enter the folder, or its name is not UTF-8, which
    libraries and safetensors files cannot be loaded from.
    """
    try:
        folder = Path(os.environ.get("PAD_CACHE") or Path.home() / ".cache" / "pad").expanduser().absolute()
        str(folder).encode()
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            folder.stat()
    except (RuntimeError, UnicodeEncodeError, OSError):
        return None
    return folder


def compiled_folder() -> Path | None:
    """Where compiled code is kept: in :func:`cache_folder`; None when that cannot be written.

    Code is for one kind of CPU, and a home folder may be shared by several, so each kind has a folder of its own.
    """
    cache_dir = cache_folder()
    if cache_dir is None:
        return None
    parent = next(path for path in (cache_dir, *cache_dir.parents) if os.path.exists(path))
    if parent.is_dir() and os.access(parent, os.W_OK | os.X_OK):
        return cache_dir / f"compiled-{_cpu()}"
    return None


def _cpu() -> str:
    """A name for the instructions this CPU has."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    return f"{platform.machine()}-{hashlib.sha256(flags.encode()).hexdigest()[:8]}"
