"""What a set costs in bits, and numbers of few bits in bytes."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_CHUNK = 1 << 20  # numbers packed at a time, a multiple of 8, so that each chunk but the last fills whole bytes


@dataclass(frozen=True)
class Cost:
    """The bits of a set of ``classes`` classes of images of ``values`` numbers each: of all its images and labels.

    A hard label costs nothing, since images lie class by class. The one learning rate is not counted.
    """

    images: int
    labels: int
    classes: int
    values: int

    @property
    def all(self) -> int:
        return self.images + self.labels

    @property
    def per_class(self) -> float:
        return self.all / self.classes

    @property
    def real_ipc(self) -> float:
        """How many real images per class, of 8 bits a number and hard labels, cost as much."""
        return self.per_class / (8 * self.values)

    def as_dict(self) -> dict:
        return {name: getattr(self, name) for name in ("images", "labels", "all", "per_class", "real_ipc")}

    def __str__(self) -> str:
        return (
            f"{self.all:,} bits (images {self.images:,}, labels {self.labels:,}), {self.per_class:,.10g} per class, "
            f"as many as {self.real_ipc:.4g} real images per class of 8 bits a value"
        )


def packed(numbers: Tensor, width: int) -> Tensor:
    """Whole numbers 0 .. 2^width - 1, of any shape, one after the other in ``width`` bits each, lowest bit first.

    uint8 ``[ceil(n width / 8)]``; the last byte is filled with zeros.
    """
    places = np.arange(width)
    chunks = numbers.flatten().split(_CHUNK)
    parts = [np.packbits((chunk.numpy()[:, None] >> places) & 1, bitorder="little") for chunk in chunks]
    return torch.from_numpy(np.concatenate(parts))


def unpacked(data: Tensor, width: int, count: int) -> Tensor:
    """The first ``count`` numbers of what :func:`packed` gave, int64 ``[count]``."""
    places = 1 << np.arange(width)
    parts = [np.unpackbits(part.numpy(), bitorder="little") for part in data.split(_CHUNK * width // 8)]
    parts = [bits[: len(bits) // width * width].reshape(-1, width) @ places for bits in parts]
    return torch.from_numpy(np.concatenate(parts)[:count])
