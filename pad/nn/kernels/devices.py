"""Which kernels there are for a device."""

from typing import Protocol

import torch
from torch import Tensor

from pad.nn import kernels


class Kernels(Protocol):
    """The kernels of one kind of device: a module."""

    def convolves(self, channels: int) -> bool:
        """Whether there are kernels for a first block, with its convolution, of images of so many channels."""

    def convolve(self, x: Tensor, kernel: Tensor, bias: Tensor, padding: int) -> Tensor:
        """The convolution before a block, of ``x`` laid out for the kernels; up to a constant of each plane."""

    def layout(self, x: Tensor) -> torch.memory_format:
        """How a block of ``x [N, C, H, W]`` takes x and lays out what it makes."""

    def call(self, name: str, shape: tuple[int, ...], eps: float, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        """Run a kernel for ``shape = (N, C, H, W)``, the block's input."""


def kernels_of(device: torch.device) -> Kernels | None:
    """Those of a CPU are built at first use, those of CUDA need Triton; None where they cannot be had."""
    if device.type == "cpu":
        return kernels if kernels.library() is not None else None
    if device.type == "cuda":
        try:
            from pad.nn.kernels import triton_block
        except ImportError:
            return None
        return triton_block
    return None
