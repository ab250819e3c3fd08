"""Kernels for the CPU in C++, built by the machine's compiler at first use and kept beside the other compiled code."""

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from pad.allocator import compiled_folder
from pad.store.files import put_in_place
from pad.store.locks import in_turn

log = logging.getLogger("pad")

_SOURCE = Path(__file__).with_name("block.cpp")
_FLAGS = "-std=c++17 -O3 -march=native -fno-math-errno -fno-trapping-math -fPIC -fopenmp -Wno-psabi".split()
if platform.machine() == "x86_64":
    _FLAGS.append("-mprefer-vector-width=512")  # else compilers halve the vectors of block.cpp
_SUFFIX = {torch.float32: "float", torch.float64: "double"}


@functools.cache
def library() -> ctypes.CDLL | None:
    """The kernels, built if they are not there yet (seconds); None where they cannot be had, with a line that says so.

    OpenMP is not linked to: its functions are those of the runtime torch has loaded, so both share one set of threads.
    """
    if platform.system() != "Linux":
        return None
    compiler = shutil.which(os.environ.get("CXX") or "g++")
    if compiler is None:
        return None
    try:
        version = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
        key = hashlib.sha256(b"\0".join([_SOURCE.read_bytes(), " ".join(_FLAGS).encode(), version])).hexdigest()[:16]
        folder = compiled_folder()
        if folder is None:
            log.warning("the CPU kernels are built anew each time: there is no folder for them; name one in PAD_CACHE")
            with tempfile.TemporaryDirectory() as scratch:
                return ctypes.CDLL(str(_build(compiler, Path(scratch))))
        built = folder / f"block-{key}.so"
        with contextlib.suppress(OSError):  # not there, or damaged
            return ctypes.CDLL(str(built))
        with in_turn(folder / f".{built.name}.lock", "building the CPU kernels"):
            with contextlib.suppress(OSError):
                return ctypes.CDLL(str(built))  # of the process that was waited for
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                put_in_place(_build(compiler, Path(scratch)), built)
        return ctypes.CDLL(str(built))
    except (OSError, subprocess.CalledProcessError) as error:
        why = (getattr(error, "stderr", None) or str(error).encode()).decode(errors="replace").strip().split("\n")[0]
        log.warning("the CPU kernels could not be built (%s): running without, slower", why)
        return None


def _build(compiler: str, folder: Path) -> Path:
    parts = folder / "block.o", folder / "block.so"
    subprocess.run([compiler, *_FLAGS, "-c", _SOURCE, "-o", parts[0]], capture_output=True, check=True)
    subprocess.run([compiler, "-shared", parts[0], "-o", parts[1]], capture_output=True, check=True)
    return parts[1]


def convolves(channels: int) -> bool:
    """Whether there are kernels for a first block, with its convolution, of images of so many channels."""
    return channels in (1, 3)


def convolve(x: Tensor, kernel: Tensor, bias: Tensor, padding: int) -> Tensor:
    """The convolution."""
    return F.conv2d(x, kernel, bias, padding=padding)


def layout(x: Tensor) -> torch.memory_format:
    """How maps that belong to ``x [N, C, H, W]`` lie in memory: channels-last, all of them."""
    return torch.channels_last


def call(name: str, shape: tuple[int, ...], eps: float, inputs: list[Tensor], outputs: list[Tensor]) -> None:
    """Run a kernel of block.cpp for ``shape = (N, C, H, W)`` on dense CPU tensors of one type, float32 or float64."""
    dtype = inputs[0].dtype
    if dtype not in _SUFFIX or not all(tensor.is_cpu and tensor.dtype == dtype for tensor in inputs):
        raise ValueError("the kernels are for tensors on the CPU, all of them float32 or all float64")
    sizes = [ctypes.c_int64(size) for size in shape]
    pointers = [(ctypes.c_void_p * len(part))(*[t.data_ptr() for t in part]) for part in (inputs, outputs)]
    getattr(library(), f"{name}_{_SUFFIX[dtype]}")(*sizes, ctypes.c_double(eps), *pointers)
