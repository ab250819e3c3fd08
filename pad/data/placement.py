"""Where images live: on the device as a tensor, or in host memory when they would take too much of it.

Both give the same images, bit for bit, so that a result does not hang on how much memory a device has: a set on the
device is a set in host memory, asked for all its images once.
"""

import contextlib
import logging
from collections.abc import Iterator

import torch
from torch import Tensor

from pad.data.preprocessing import Preprocessing

log = logging.getLogger("pad")

SHARE = 0.5  # of the device's free memory that a set of images may take; the rest is for training
_PIECE = 1024  # images copied at a time
_ROWS = 256  # images preprocessed at a time; always so many, see HostImages


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """``tensor`` on ``device``; a copy to CUDA goes through pinned memory, and nothing waits for it.

    From ordinary memory even a copy that is called non-blocking holds up the host, and so what it has yet to launch.
    """
    if torch.device(device).type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class HostImages:
    """Images that stay in host memory as uint8 pixels; ``images[i]`` copies and preprocesses those asked for.

    Stands in for the tensor ``[N, C, H, W]`` of all of them, preprocessed, wherever that is indexed: ``i`` is int64
    ``[B]`` or a slice, ``images[i]`` is float32 ``[B, C, H, W]`` on ``device``, that of the preprocessing. Indices on
    another device than the CPU cost a synchronisation.

    The pixels are gathered into one of two pinned buffers and copied without waiting: while the device computes on one
    batch the host gathers the next. A buffer is written again once its last copy is done.
    """

    dtype = torch.float32

    def __init__(self, pixels: Tensor, preprocessing: Preprocessing):
        self.shape, self.device = pixels.shape, preprocessing.device
        self._pixels, self._preprocessing = pixels, preprocessing
        self._cuda = self.device.type == "cuda"
        piece = _PIECE, *self.shape[1:]
        self._buffers = [torch.empty(piece, dtype=torch.uint8, pin_memory=self._cuda) for _ in range(2)]
        self._copied = [torch.cuda.Event() for _ in range(2)] if self._cuda else []

    def __len__(self) -> int:
        return self.shape[0]

    def split(self, size: int) -> Iterator[Tensor]:
        """All images in order, ``size`` at a time."""
        return (self[start : start + size] for start in range(0, len(self), size))

    @torch.no_grad()
    def __getitem__(self, chosen: Tensor | slice) -> Tensor:
        indices = torch.arange(*chosen.indices(len(self))) if isinstance(chosen, slice) else chosen.cpu()
        out = torch.empty(len(indices), *self.shape[1:], device=self.device)
        with full_precision() if self._cuda else contextlib.nullcontext():
            for some, target in zip(indices.split(_PIECE), out.split(_PIECE)):
                # How a matrix product rounds depends on its shape. So that an image does not depend on those beside it,
                # there are always _ROWS of them; what happens to lie in the buffer fills up the last.
                for part, seen in zip(self._copy(some).split(_ROWS), target.split(_ROWS)):
                    seen.copy_(self._preprocessing.apply(part)[: len(seen)])
        return out

    def _copy(self, indices: Tensor) -> Tensor:
        """Pixels ``[n, C, H, W]`` uint8 on the device, n a multiple of _ROWS: those of the indices, then any."""
        self._buffers.reverse()
        self._copied.reverse()
        if self._cuda:
            self._copied[0].synchronize()
        torch.index_select(self._pixels, 0, indices, out=self._buffers[0][: len(indices)])
        pixels = self._buffers[0][: -(-len(indices) // _ROWS) * _ROWS].to(self.device, non_blocking=True)
        if self._cuda:
            self._copied[0].record(torch.cuda.current_stream(self.device))
        return pixels


Images = Tensor | HostImages


def place(pixels: Tensor, preprocessing: Preprocessing, images_on: str = "auto") -> Images:
    """Preprocessed images of uint8 ``pixels [N, C, H, W]``, which lie on the CPU, for the device of the preprocessing.

    ``images_on``: "device" for a float32 tensor there, "host" for :class:`HostImages`, "auto" for the latter when the
    former would take more than ``SHARE`` of the device's free memory.
    """
    images, size = HostImages(pixels, preprocessing), 4 * pixels.numel()
    if images_on == "device" or (images_on == "auto" and fits(size, images.device)):
        return images[:]
    log.info("%d images, %.1f GB as float32, stay in host memory and are copied in batches", len(images), size / 1e9)
    return images


def fits(size: int, device: torch.device) -> bool:
    """Whether ``size`` bytes are at most ``SHARE`` of the memory that is free on ``device``; always, but on CUDA."""
    if device.type != "cuda":
        return True
    kept_for_reuse = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return size <= SHARE * (torch.cuda.mem_get_info(device)[0] + kept_for_reuse)


def batches(images: Images, order: Tensor, size: int) -> Iterator[Tensor]:
    """``images[i]`` for each ``size`` of the indices ``order`` (int64 ``[n]``, on the CPU); no copy is waited for."""
    if isinstance(images, Tensor):
        order = to_device(order, images.device)
    return (images[some] for some in order.split(size))


@contextlib.contextmanager
def full_precision():
    """Float32 also where networks may use TF32: images and rankings must not depend on that setting."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before
