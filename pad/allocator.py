"""What a process sets up for speed before its first tensor: how memory is handed out, where compiled code is kept."""

import contextlib
import ctypes
import hashlib
import os
import platform
from pathlib import Path

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
    parent = next(path for path in (cache_dir, *cache_dir.parents) if path.exists())
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
