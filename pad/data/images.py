"""A labelled data set in memory."""

import dataclasses
import functools
import hashlib

import torch
from torch import Tensor

_CIFAR = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_FASHION = (0.2861,), (0.3530,)
# Mean and standard deviation of pixels in [0, 1] that the published settings use; ImageFolder's are computed.
MEAN_STD = {
    "FashionMNISTMini": _FASHION,
    "MNIST": ((0.1307,), (0.3081,)),
    "FashionMNIST": _FASHION,
    "SVHN": ((0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)),
    "CIFAR10": _CIFAR,
    "CIFAR100": _CIFAR,
    "Tiny": _IMAGENET,
    "ImageNet": _IMAGENET,
    "ImageNet1K": _IMAGENET,
}
_FIXED_SIZE = {"FashionMNISTMini": 28, "MNIST": 28, "FashionMNIST": 28, "SVHN": 32, "CIFAR10": 32, "CIFAR100": 32}
_CHUNK = 256  # images handled at a time, by one decoding thread or in one sum


@dataclasses.dataclass(frozen=True, eq=False)
class ImageData:
    """A labelled data set in memory.

    ``train_images``, ``test_images``: uint8 ``[N, C, H, W]``; ``train_labels``, ``test_labels``: int64 ``[N]``;
    ``mean``, ``std``: of pixels in [0, 1], one per channel.
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
        return tuple(self.train_images.shape[2:])

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hex digest of the training images and labels, whatever their device. Computed once, a second per GB."""
        digest = hashlib.blake2b(str(tuple(self.train_images.shape)).encode(), digest_size=16)
        for tensor in (self.train_images, self.train_labels):
            digest.update(tensor.cpu().contiguous().numpy())
        return digest.hexdigest()

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


def _line(error: Exception) -> str:
    """An exception as part of one sentence."""
    return " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__
