"""A labelled data set in memory."""

import dataclasses
import functools
import hashlib

import torch
from torch import Tensor

Statistics = tuple[tuple[float, ...], tuple[float, ...]]  # mean and standard deviation, one number per channel

_CHUNK = 256  # images in one sum


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class ImageData:
    """A labelled data set in memory.

    ``train_images``, ``test_images``: uint8 ``[N, C, H, W]``; ``train_labels``, ``test_labels``: int64 ``[N]``, places
    in ``class_names``; ``mean``, ``std``: of pixels in [0, 1], one per channel (see :func:`mean_std`).
    """

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def channels(self) -> int:
        return self.train_images.shape[1]

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) in pixels."""
        height, width = self.train_images.shape[2:]
        return height, width

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hex digest of the training images and labels, whatever their device. Computed once, a second per GB."""
        return _digest(self.train_images, self.train_labels)

    @functools.cached_property
    def test_fingerprint(self) -> str:
        """That of the test images and labels."""
        return _digest(self.test_images, self.test_labels)

    @property
    def identity(self) -> dict:
        """What a trajectory store or a synthetic set notes down, to recognise the data it was made from. JSON-able."""
        return {
            "dataset": self.name,
            "fingerprint": self.fingerprint,
            "channels": self.channels,
            "size": list(self.size),
            "num_classes": self.num_classes,
        }

    @property
    def tested(self) -> dict:
        """What accuracies are of: the identity, and the digest of the test images. JSON-able."""
        return {**self.identity, "test_fingerprint": self.test_fingerprint}

    def to(self, device: torch.device | str) -> "ImageData":
        """The same data with its four tensors on ``device``."""
        tensors = ("train_images", "train_labels", "test_images", "test_labels")
        moved = dataclasses.replace(self, **{name: getattr(self, name).to(device) for name in tensors})
        if "fingerprint" in self.__dict__:
            moved.__dict__["fingerprint"] = self.fingerprint
        return moved

    def first_per_class(self, count: int) -> "ImageData":
        """The same data with only the first ``count`` training images of each class, or all it has, in their order."""
        order = self.train_labels.argsort(stable=True)
        sizes = self.train_labels.bincount(minlength=self.num_classes)
        place = torch.arange(len(order), device=order.device) - (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
        kept = order[place < count].sort().values
        return dataclasses.replace(self, train_images=self.train_images[kept], train_labels=self.train_labels[kept])


def _digest(images: Tensor, labels: Tensor) -> str:
    digest = hashlib.blake2b(str(tuple(images.shape)).encode(), digest_size=16)
    for tensor in (images, labels):
        digest.update(tensor.cpu().contiguous().numpy().data)
    return digest.hexdigest()


def mean_std(images: Tensor) -> Statistics:
    """Mean and population standard deviation per channel of uint8 images ``[N, C, H, W]``, in [0, 1].

    The sums are integers, which float64 holds exactly (to 10^11 pixels), so that any thread count gives the same.
    """
    total = torch.zeros(images.shape[1], dtype=torch.float64, device=images.device)
    squares = torch.zeros_like(total)
    for chunk in images.split(_CHUNK):
        values = chunk.transpose(0, 1).flatten(1).double()
        total += values.sum(1)
        squares += values.square().sum(1)
    count = images.numel() // images.shape[1]
    mean = [t / count for t in total.tolist()]
    variance = [s / count - m * m for s, m in zip(squares.tolist(), mean)]
    # a channel of one value stays finite: it becomes zero whatever it is divided by
    return tuple(m / 255 for m in mean), tuple(max(v, 1.0) ** 0.5 / 255 for v in variance)


def one_line(error: Exception) -> str:
    """An exception as part of one sentence."""
    return " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__
