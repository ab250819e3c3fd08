"""How much memory a piece of work takes."""

import ctypes
import platform
from collections.abc import Callable
from pathlib import Path

import torch


def measure_peak(device: torch.device) -> Callable[[], int | None]:
    """Begin to measure. The function that is returned gives the peak since then in bytes; None where it is not known.

    CUDA: of what torch has allocated on the device. On a CPU: of all that the process has in memory, which Linux alone
    tells.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return lambda: torch.cuda.max_memory_allocated(device)
    try:
        forget_peak()
    except OSError:
        return lambda: None
    return lambda: memory_status("VmHWM")


def forget_peak() -> None:
    """Return what is freed to the kernel and let VmHWM begin anew. Raises OSError where that cannot be done."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def memory_status(entry: str) -> int:
    """Bytes of this process's VmRSS (resident now) or VmHWM (most since :func:`forget_peak`); Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(entry))
