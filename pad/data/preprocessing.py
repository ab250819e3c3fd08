"""The space networks see: mean/std or ZCA-whitened images, and the way back to pixels."""

import logging
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from pad.allocator import cache_folder
from pad.data.images import ImageData
from pad.errors import InputError
from pad.store.identity import digest
from pad.store.locks import in_turn
from pad.store.tensors import load_tensors, save_tensors

log = logging.getLogger("pad")

ZCA_EPS = 0.1
ZCA_VERSION = 1  # part of the digest: raise it when a fit to the same data would give another transform
ZCA_MAX_DIMENSIONS = 32_766  # the eigensolver (LAPACK's syevd) counts 1 + 6 D + 2 D^2 numbers of workspace in 32 bits
_CHUNK = 1024  # images at a time; the covariance is exact only up to this many, see _moments


class Preprocessing(ABC):
    """Maps pixels to the space networks see, and back.

    ``identity`` is a JSON-able dictionary with ``kind`` ("zca" or "meanstd") and ``digest``; it is equal exactly when
    the transform is the same. Results are on the device of the preprocessing, wherever the images are.
    """

    def __init__(self, identity: dict, tensors: dict[str, Tensor]):
        self.identity = identity
        self._tensors = tensors

    @property
    def kind(self) -> str:
        return self.identity["kind"]

    @property
    def device(self) -> torch.device:
        return self._tensors["mean"].device

    def to(self, device: torch.device | str) -> "Preprocessing":
        """The same transform on ``device``."""
        return type(self)(self.identity, {name: tensor.to(device) for name, tensor in self._tensors.items()})

    def apply(self, images: Tensor) -> Tensor:
        """Pixels ``[N, C, H, W]``, uint8 (0 to 255) or float (0 to 1), to float32 ``[N, C, H, W]``.

        Raises InputError on images of another shape than the transform was made for.
        """
        return self._chunked(images, self._forward)

    def invert(self, x: Tensor) -> Tensor:
        """Back from ``[N, C, H, W]`` to pixels of about 0 to 1 (not clamped), float32. Raises as :meth:`apply`."""
        return self._chunked(x, self._backward)

    @abstractmethod
    def _refuse_unfit(self, shape: torch.Size) -> None:
        """Raise InputError on a shape of images that the transform was not made for."""

    @abstractmethod
    def _forward(self, x: Tensor) -> Tensor:
        """Pixels of 0 to 1, one chunk of images, to the networks' space."""

    @abstractmethod
    def _backward(self, x: Tensor) -> Tensor:
        """The way back."""

    @torch.no_grad()
    def _chunked(self, images: Tensor, transform: Callable[[Tensor], Tensor]) -> Tensor:
        """The result is the only float copy of all images; everything else is a chunk at a time."""
        self._refuse_unfit(images.shape)
        out = torch.empty(images.shape, device=self.device)
        for source, target in zip(images.split(_CHUNK), out.split(_CHUNK)):
            source = source.to(self.device)
            target.copy_(transform(source.float() / 255 if source.dtype == torch.uint8 else source.float()))
        return out


class MeanStd(Preprocessing):
    """(x - mean) / std per channel."""

    @classmethod
    def of(cls, mean: tuple[float, ...], std: tuple[float, ...], device: torch.device | str) -> "MeanStd":
        identity = {
            "kind": "meanstd",
            "mean": list(mean),
            "std": list(std),
            "digest": digest(["meanstd", *mean, *std], 32),
        }
        return cls(identity, {"mean": torch.tensor(mean, device=device), "std": torch.tensor(std, device=device)})

    def _refuse_unfit(self, shape: torch.Size) -> None:
        channels = len(self.identity["mean"])
        if len(shape) != 4 or shape[1] != channels:
            raise InputError(f"images of shape {list(shape)} do not fit a mean and std of {channels} channel(s)")

    def _forward(self, x: Tensor) -> Tensor:
        return (x - self._tensors["mean"].view(-1, 1, 1)) / self._tensors["std"].view(-1, 1, 1)

    def _backward(self, x: Tensor) -> Tensor:
        return x * self._tensors["std"].view(-1, 1, 1) + self._tensors["mean"].view(-1, 1, 1)


class ZCA(Preprocessing):
    """(x - mean) U (S + eps)^(-1/2) U^T of the flattened image, where the covariance of the training pixels is U S U^T.

    Equals ``kornia.enhance.ZCAWhitening(eps=0.1, compute_inv=True)``, up to float rounding. The tensors are ``mean``
    [D], ``whiten`` [D, D] and ``unwhiten`` [D, D], D = C H W.
    """

    def _refuse_unfit(self, shape: torch.Size) -> None:
        if list(shape[1:]) != self.identity["shape"]:
            raise InputError(f"images of shape {list(shape)} do not fit a ZCA of images of {self.identity['shape']}")

    def _forward(self, x: Tensor) -> Tensor:
        return ((x.flatten(1) - self._tensors["mean"]) @ self._tensors["whiten"]).view_as(x)

    def _backward(self, x: Tensor) -> Tensor:
        return (x.flatten(1) @ self._tensors["unwhiten"] + self._tensors["mean"]).view_as(x)


def fit_preprocessing(data: ImageData, zca: bool, cache_dir: str | Path | None = None) -> Preprocessing:
    """The preprocessing of a data set, on the device of its images: ZCA fitted to the training images, or mean/std.

    A fitted ZCA is kept in ``cache_dir`` (default: :func:`pad.allocator.cache_folder`), named after the data and
    eps, and read from there the next time, byte for byte the same. A damaged file is fitted again, a folder that cannot
    be written is done without; both are logged. Raises InputError when the images are too large for ZCA.
    """
    device = data.train_images.device
    if not zca:
        return MeanStd.of(data.mean, data.std, device)
    shape = list(data.train_images.shape[1:])
    dimensions = data.train_images[0].numel()
    if dimensions > ZCA_MAX_DIMENSIONS:
        raise InputError(
            f"ZCA of {data.name} at {shape[1]}x{shape[2]} pixels needs the eigenvectors of a {dimensions}-dimensional "
            f"covariance, {ZCA_MAX_DIMENSIONS} is the most the solver takes; use mean/std or a smaller res"
        )
    # of what it is made from, not of its floats: those may differ in the last bit from machine to machine
    name = digest(["zca", ZCA_VERSION, ZCA_EPS, data.fingerprint], 32)
    identity = {"kind": "zca", "eps": ZCA_EPS, "shape": shape, "digest": name}
    folder = cache_dir or cache_folder()
    if folder is None:
        log.warning("the fitted ZCA is not kept: there is no folder for it; name one in PAD_CACHE")
        return ZCA(identity, _fit_zca(data.train_images))
    path = _zca_file(folder, name)
    there = path.is_file()
    if there and (kept := _kept_zca(path, identity, dimensions)) is not None:
        return kept.to(device)
    with in_turn(path.with_name(f".{path.name}.lock"), "the same ZCA"):
        if not there and os.path.isfile(path) and (kept := _kept_zca(path, identity, dimensions)) is not None:
            return kept.to(device)  # fitted meanwhile by the process that was waited for
        tensors = _fit_zca(data.train_images)
        try:
            save_tensors(path, tensors, identity)
        except OSError as error:
            log.warning("the fitted ZCA is not kept, %s cannot be written (%s); PAD_CACHE names a folder", path, error)
    return ZCA(identity, tensors)


def _zca_file(folder: Path | str, name: str) -> Path:
    return Path(folder).expanduser() / f"zca-{name}.safetensors"


def known_preprocessing(identity: object) -> Preprocessing | None:
    """The preprocessing of this identity on the CPU, as far as it is known without its data set; otherwise None.

    Mean and std stand in the identity. A ZCA is known where :func:`fit_preprocessing` has kept it.
    """
    try:
        said = dict(identity)  # type: ignore
        if said["kind"] == "zca":
            folder = cache_folder()
            path = _zca_file(folder, said["digest"]) if folder else None
            return _kept_zca(path, said, math.prod(said["shape"])) if path and path.is_file() else None
        found = MeanStd.of(tuple(said["mean"]), tuple(said["std"]), "cpu")
        return found if found.identity == said else None
    except (KeyError, TypeError, ValueError, RuntimeError):
        return None


def grey_of(identity: object) -> Tensor | None:
    """Grey, 0.5 as a pixel, as networks see it, ``[C, 1, 1]``; None where it is another at each place, or not known."""
    known = known_preprocessing(identity) if isinstance(identity, Mapping) and identity.get("kind") != "zca" else None
    return None if known is None else known.apply(torch.full((1, len(known.identity["mean"]), 1, 1), 0.5))[0]


def _kept_zca(path: Path, identity: dict, dimensions: int) -> Preprocessing | None:
    """The ZCA that was written to ``path``; None, with a line that says why, when it is not usable."""
    square = (dimensions, dimensions)
    try:
        tensors, found = load_tensors(path)
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if found != identity or shapes != {"mean": (dimensions,), "whiten": square, "unwhiten": square}:
            raise InputError("it holds something else than its name says")
        return ZCA(identity, tensors)
    except InputError as error:
        log.warning("the ZCA kept in %s is not usable and is fitted again for its data set (%s)", path, error)
        return None


@torch.no_grad()
def _fit_zca(images: Tensor) -> dict[str, Tensor]:
    """Mean and both matrices, float32, from uint8 images ``[N, C, H, W]``, computed in float64.

    The covariance is symmetric, so its eigenvectors (eigh) serve for the singular vectors of the formula; eigenvalues
    that rounding made negative are zero.
    """
    mean, covariance = _moments(images.flatten(1))
    values, vectors = torch.linalg.eigh(covariance)
    values = values.clamp_(min=0) + ZCA_EPS
    whiten, unwhiten = ((vectors * scale) @ vectors.T for scale in (values.rsqrt(), values.sqrt()))
    return {"mean": mean.float(), "whiten": whiten.float(), "unwhiten": unwhiten.float()}


def _moments(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [D] and unbiased covariance [D, D] of uint8 ``[N, D]`` scaled to [0, 1], in float64.

    The sums are integers and exact at float32 speed, hence the same on every device: of values shifted to -128..127 a
    product is at most 2^14, a sum of 1,024 of them at most 2^24, up to where float32 holds every integer.
    """
    count, dimensions = pixels.shape
    sums = torch.zeros(dimensions, dtype=torch.float64, device=pixels.device)
    products = torch.zeros(dimensions, dimensions, dtype=torch.float64, device=pixels.device)
    for chunk in pixels.split(_CHUNK):
        shifted = chunk.float() - 128
        sums += shifted.sum(0)
        products += shifted.T @ shifted
    products.mul_(count).addr_(sums, sums, alpha=-1).div_(count * (count - 1) * 255.0**2)
    return (sums / count + 128) / 255, products
