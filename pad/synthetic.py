"""The synthetic set: what distillation produces, as one self-describing file and as the published ``.pt`` trio."""

from __future__ import annotations

import hashlib
import logging
import math
import os
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from pad.bits import Cost
from pad.data.formation import decoded
from pad.data.preprocessing import grey_of, known_preprocessing
from pad.errors import InputError
from pad.labels import hard_logits, logits_of, looks_like_probabilities
from pad.quantise import Packed, Packing
from pad.store.foreign import load_numbers, save_pt
from pad.store.tensors import load_tensors, save_tensors

if TYPE_CHECKING:
    from pad.data.preprocessing import Preprocessing

log = logging.getLogger("pad")

KIND = "synthetic set"
FORMAT = 1

_SURE = 1 - 1e-6  # the least probability of a hard label


@dataclass(eq=False)
class SyntheticSet:
    """A distilled training set of K classes, ipc images each, N = ipc * K (arXiv 2408.03360).

    One that was not distilled here may have other numbers of images of its classes: ``counts``.

    images [N, C, H, W] float32, in the space networks see (whitened or normalised), class by class.
    labels [N, K] float32, logits: the soft label of an image is softmax(labels).
    lr [] float32, > 0: the learned learning rate.
    classes [N] int64: the class each image stands for, 0 .. K-1 in order, each at least once.
    metadata: JSON-able; ``data`` and ``preprocessing`` (their identities), ``class_names``, ``model``, ``settings``,
        ``seed``, ``iteration``, ``provenance`` as far as known; :meth:`save` adds ``kind``, ``format`` and ``ipc``.
    preprocessing: inverts the images for viewing; may be left out, or set later.
    stored_pixels [N, C, H, W]: the inverted images found in a file. A file carries these few images and the
        identity of the preprocessing instead of its tensors, which for ZCA are D x D: 604 MB at 64 x 64 pixels.
    stored [n, C, H, W]: in multi-formation the n = N / factor^2 images that ``images`` are decoded from
        (:func:`pad.data.formation.decoded`); a file holds them in their place.
    packed: of a quantised set the few bits that images and labels were unpacked from, which a file holds instead.
    """

    images: Tensor
    labels: Tensor
    lr: Tensor
    classes: Tensor
    metadata: dict
    _: KW_ONLY
    preprocessing: Preprocessing | None = None
    stored_pixels: Tensor | None = None
    stored: Tensor | None = None
    packed: Packed | None = None

    @property
    def num_classes(self) -> int:
        return self.labels.shape[1]

    @property
    def ipc(self) -> int:
        """Images per class; where classes have different numbers of them the mean, rounded down."""
        return len(self.images) // self.num_classes

    @property
    def counts(self) -> list[int]:
        """The number of images of each class."""
        return self.classes.bincount(minlength=self.num_classes).tolist()

    @property
    def kept_counts(self) -> list[int]:
        """The same of :attr:`kept`."""
        return [count // self.factor**2 for count in self.counts]

    @property
    def is_even(self) -> bool:
        """Whether there are as many images of each class."""
        return len(set(self.counts)) == 1

    @property
    def kept(self) -> Tensor:
        """The images that a file holds: the stored ones in multi-formation, else ``images``."""
        return self.images if self.stored is None else self.stored

    @property
    def factor(self) -> int:
        """Images a side that one of :attr:`kept` stands for; 1 without multi-formation."""
        return math.isqrt(len(self.images) // len(self.kept))

    @property
    def size(self) -> str:
        """How large the set is, in words."""
        said = f", decoded from {in_words(self.kept_counts)} stored" if self.stored is not None else ""
        return f"{in_words(self.counts)} images per class{said}"

    @property
    def class_names(self) -> list[str]:
        """K names; the class numbers where the names are not known."""
        return list(self.metadata.get("class_names") or map(str, range(self.num_classes)))

    @property
    def preprocessing_identity(self) -> dict | None:
        """What the images were preprocessed with, or None when that is not known."""
        return self.preprocessing.identity if self.preprocessing is not None else self.metadata.get("preprocessing")

    @property
    def digest(self) -> str:
        """16 hexadecimal digits of the SHA-256 of kept images, labels and learning rate, their shapes and numbers."""
        numbers = hashlib.sha256()
        for tensor in (self.kept, self.labels, self.lr, *[self.classes] * (not self.is_even)):
            numbers.update(f"{tuple(tensor.shape)}".encode())
            numbers.update(tensor.detach().cpu().contiguous().numpy().data)
        return numbers.hexdigest()[:16]

    @property
    def cost(self) -> Cost:
        """The bits of images and labels: as packed, else 32 a number."""
        if self.packed is not None:
            return self.packed.packing.cost
        labels = 0 if self.is_hard else 32 * self.labels.numel()
        return Cost(32 * self.kept.numel(), labels, self.num_classes, self.kept[0].numel())

    def probabilities(self) -> Tensor:
        """The soft labels [N, K]: rows in [0, 1] that sum to 1."""
        return self.labels.softmax(dim=1)

    @property
    def is_hard(self) -> bool:
        """Whether each image is of one class for sure, that which it stands for."""
        p = self.probabilities().cpu()
        return bool(p.gather(1, self.classes[:, None].cpu()).min() >= _SURE)

    def pixels(self) -> Tensor:
        """The images as a person sees them [N, C, H, W], inverse-preprocessed and clamped to [0, 1].

        Raises InputError when nothing says how to invert the preprocessing (a published trio without its data set).
        """
        return self.unclamped_pixels().clamp(0, 1)

    def unclamped_pixels(self) -> Tensor:
        """The inverse-preprocessed images [N, C, H, W]: pixels of about 0 to 1. Raises as :meth:`pixels`."""
        if self.preprocessing is not None:
            return self.preprocessing.invert(self.images)
        if self.stored_pixels is not None:
            return self.stored_pixels
        if (self.preprocessing_identity or {}).get("kind") == "zca":
            raise InputError(
                "the set's pixels are not in its file, and the whitening that they come back by is not kept here; "
                "evaluating the set, for one, keeps that of its data set"
            )
        raise InputError(
            "the synthetic set does not say how its images were preprocessed, so they cannot be shown as "
            "pixels; set its `preprocessing` to the one fitted on its data set"
        )

    def to_dataset(self) -> TensorDataset:
        """Pairs (preprocessed image [C, H, W], logits [K]) for a training loop; the target is softmax(logits)."""
        return TensorDataset(self.images, self.labels)

    def for_dd_ranking(self) -> dict:
        """The keywords of DD-Ranking's ``compute_metrics`` (v0.2): ``score.compute_metrics(**made.for_dd_ranking())``.

        Images in the networks' space, soft labels as logits, or hard ones as class numbers, the learning rate. Its
        object has to preprocess real images as this set's were.
        """
        labels = {"hard_labels": self.classes} if self.is_hard else {"soft_labels": self.labels}
        return {"image_tensor": self.images, **labels, "syn_lr": self.lr.item()}

    def quantised(
        self, bits: int, group: str = "image", label_bits: int = 32, top_k: int | None = None
    ) -> SyntheticSet:
        """This set with images of ``bits`` bits a number, packed; see :class:`pad.quantise.Packing` for the rest.

        Hard labels stay what they are, and cost nothing. Raises InputError on an unusable set, ValueError for what no
        packing is.
        """
        self._refuse_unusable("the synthetic set to quantise")
        packing = self.packing(bits, group, label_bits, top_k)
        packed = Packed(packing, packing.pack(self.kept, self.labels))
        images, labels = packed.unpacked()
        stored = images if self.stored is not None else None
        how = {name: value for name, value in packing.as_dict().items() if name not in ("shape", "labels")}
        provenance = {**(self.metadata.get("provenance") or {}), "quantised": {**how, "from": self.digest}}
        return SyntheticSet(
            decoded(images, self.factor, self.kept_counts, grey_of(self.preprocessing_identity)),
            labels,
            self.lr.detach().cpu(),
            self.classes.cpu(),
            {**self.metadata, "provenance": provenance},
            preprocessing=self.preprocessing or known_preprocessing(self.preprocessing_identity),
            stored=stored,
            packed=packed,
        )

    def packing(self, bits: int, group: str, label_bits: int, top_k: int | None) -> Packing:
        """How :meth:`quantised` packs this set, and so what that costs. Raises ValueError for what no packing is."""
        if self.is_hard:
            label_bits, top_k = 0, None
        described = {"bits": bits, "group": group, "label_bits": label_bits, "top_k": top_k}
        counts = None if self.is_even else self.kept_counts
        return Packing.of({**described, "shape": self.kept.shape, "labels": self.labels.shape, "counts": counts})

    def save(self, path: Path | str) -> None:
        """Write one safetensors file, atomically; equal sets give equal bytes. Raises InputError on an unusable set."""
        self._refuse_unusable(f"the synthetic set for {path}")
        metadata = {**self.metadata, "kind": KIND, "format": FORMAT, "ipc": self.ipc}
        if self.packed is not None:
            if not all(map(torch.equal, self.packed.unpacked(), (self.kept.cpu(), self.labels.cpu()))):
                raise InputError(f"the synthetic set for {path}: images or labels are not those that it has packed")
            tensors = {**self.packed.tensors, "lr": self.lr}
            metadata["packing"] = self.packed.packing.as_dict()
        else:
            tensors = {"images": self.kept, "labels": self.labels, "lr": self.lr, "classes": self.classes}
            if self.preprocessing is not None or self.stored_pixels is not None:
                tensors["pixels"] = self.unclamped_pixels().to(self.images.dtype)
        if self.stored is not None:
            metadata["factor"] = self.factor
        if self.preprocessing_identity is not None:
            metadata["preprocessing"] = self.preprocessing_identity
        save_tensors(path, tensors, metadata)

    @classmethod
    def load(cls, path: Path | str) -> SyntheticSet:
        """Read a file that :meth:`save` wrote. Raises InputError when it is missing, damaged, or something else."""
        tensors, metadata = load_tensors(path, kind=KIND, format=FORMAT)
        packed = None
        if "packing" in metadata:
            packed, tensors = _unpacked(tensors, metadata.pop("packing"), str(path))
        missing = sorted({"images", "labels", "lr", "classes"} - set(tensors))
        if missing:
            raise InputError(f"{path} holds no {' and no '.join(missing)}")
        images, labels, lr, classes = (tensors[name] for name in ("images", "labels", "lr", "classes"))
        factor, stored = metadata.pop("factor", 1), None
        if factor != 1:
            grey = grey_of(metadata.get("preprocessing"))
            _refuse_unfit_stored(images, labels, classes, factor, str(path))
            counts = [count // factor**2 for count in classes.bincount().tolist()]
            try:
                images, stored = decoded(images, factor, counts, grey), images
            except InputError as error:
                raise InputError(f"{path}: {error}") from None
        loaded = cls(
            images, labels, lr, classes, metadata, stored_pixels=tensors.get("pixels"), stored=stored, packed=packed
        )
        if packed is not None:
            loaded.preprocessing = known_preprocessing(metadata.get("preprocessing"))
        loaded._refuse_unusable(str(path))
        return loaded

    def export_published(self, folder: Path | str, tag: str | int) -> None:
        """Write images_<tag>.pt, labels_<tag>.pt and lr_<tag>.pt, the form other tools read.

        With ZCA also images_zca_<tag>.pt, the inverse-whitened images (not clamped). ``tag``: "best" or an iteration.
        """
        self._refuse_unusable(f"the synthetic set for {folder}")
        tensors = {"images": self.images, "labels": self.labels, "lr": self.lr}
        if (self.preprocessing_identity or {}).get("kind") == "zca":
            tensors["images_zca"] = self.unclamped_pixels()
        for name, tensor in tensors.items():
            # clone: a view would take the whole tensor it looks into along
            save_pt(Path(folder) / f"{name}_{tag}.pt", tensor.detach().float().cpu().clone())

    @classmethod
    def from_published(
        cls, images_path: Path | str, labels_path: Path | str, lr_path: Path | str | float
    ) -> SyntheticSet:
        """Read a published trio: images [N, C, H, W] class by class, labels, lr of one element or as a number.

        The labels may be logits [N, K], probabilities [N, K] (rows in [0, 1] that sum to 1; one-hot is the same), or
        class numbers [N] or [N, 1], of which K is the largest and 1; they come out as logits of the same targets.
        No code in the files is run. Such files say nothing about their data set or preprocessing, so the metadata only
        name where the set came from. Raises InputError naming the file that is missing, damaged or unusable.
        """
        images, labels = load_numbers(images_path), _logits(load_numbers(labels_path), labels_path)
        lr = torch.tensor(lr_path) if isinstance(lr_path, float) else load_numbers(lr_path).float()
        if not images.is_floating_point():
            raise InputError(
                f"{images_path} holds images of {images.dtype}; they are needed as networks see them, normalised or "
                "whitened, in floating-point numbers"
            )
        if lr.numel() != 1:
            raise InputError(f"{lr_path}: lr is {_shape(lr)}, not a single number")
        metadata = {"provenance": {"published": [Path(str(path)).name for path in (images_path, labels_path, lr_path)]}}
        loaded = cls(images.float(), labels, lr.reshape(()), torch.empty(0, dtype=torch.int64), metadata)
        loaded._refuse_unusable_tensors(str(images_path), str(labels_path), str(lr_path))
        if images.min() >= 0 and images.max() <= 1:
            log.warning("%s: all values are in 0..1; they count as normalised images, not as pixels", images_path)
        sure, classes = loaded.probabilities().max(1)
        if sure.min() >= _SURE and _in_order(classes, loaded.labels):
            loaded.classes = classes
        elif len(images) % loaded.num_classes:
            raise InputError(
                f"{images_path}: {len(images)} images are not a multiple of the labels' {loaded.num_classes} classes"
            )
        else:
            loaded.classes = _class_order(len(images), loaded.num_classes)
        return loaded

    def _refuse_unusable(self, where: str) -> None:
        """Raise InputError, naming the file and the thing, unless this is a whole and usable set."""
        self._refuse_unusable_tensors(where, where, where)
        if not _in_order(self.classes, self.labels):
            raise InputError(f"{where}: classes are not 0 to {self.num_classes - 1} in order, each of them there")
        for key in ("data", "preprocessing", "settings", "provenance"):
            if not isinstance(self.metadata.get(key) or {}, dict):
                raise InputError(f"{where}: {key} in the description is {self.metadata[key]!r}, not named values")
        names = self.metadata.get("class_names") or []
        if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
            raise InputError(f"{where}: class_names in the description is not a list of names")
        if names and len(names) != self.num_classes:
            raise InputError(f"{where}: {len(names)} class names for {self.num_classes} classes")
        pixels = self.stored_pixels
        if pixels is not None and (
            pixels.shape != self.images.shape or pixels.dtype != torch.float32 or not pixels.isfinite().all()
        ):
            raise InputError(f"{where}: pixels are not finite float32 in the images' shape {list(self.images.shape)}")

    def _refuse_unusable_tensors(self, images_at: str, labels_at: str, lr_at: str) -> None:
        """Raise InputError unless one can train on images, labels and lr; each is named by where it came from."""
        images, labels, lr = self.images, self.labels, self.lr
        if images.ndim != 4 or not images.numel():
            raise InputError(f"{images_at}: images are {_shape(images)}, not [N, C, H, W]")
        if labels.ndim != 2 or not labels.numel():
            raise InputError(f"{labels_at}: labels are {_shape(labels)}, not logits [N, classes]")
        if lr.ndim:
            raise InputError(f"{lr_at}: lr is {_shape(lr)}, not a single number")
        for name, tensor, where in (("images", images, images_at), ("labels", labels, labels_at), ("lr", lr, lr_at)):
            if tensor.dtype != torch.float32:
                raise InputError(f"{where}: {name} of type {tensor.dtype}, not torch.float32")
            if not tensor.isfinite().all():
                raise InputError(f"{where}: {name} with a value that is not finite")
        if not lr > 0:
            raise InputError(f"{lr_at}: lr is {lr.item():g}, not a positive number")
        count = len(labels)
        if len(images) != count:
            raise InputError(f"{labels_at}: {count} labels for {len(images)} images ({images_at})")


def in_words(counts: list[int]) -> str:
    """How many there are of each, in words."""
    few, many = min(counts), max(counts)
    return f"{few}" if few == many else f"{few} to {many}"


def set_file(path: Path | str) -> Path:
    """The file of the set at ``path``: that one, or a run's last, since its best was picked by test accuracy."""
    path = Path(path)
    if not os.path.isdir(path):  # which, unlike Path's, gives an answer about folders that may not be entered
        return path
    last = path / "synthetic_last.safetensors"
    return last if os.path.exists(last) else path / "Normal" / last.name


def _unpacked(tensors: dict[str, Tensor], described: object, where: str) -> tuple[Packed, dict[str, Tensor]]:
    """What the tensors of a packed set's file are, and those that other sets' files hold. Raises InputError."""
    others = {name: tensors[name] for name in ("lr",) if name in tensors}
    try:
        packed = Packed(Packing.of(described), {name: tensors[name] for name in tensors if name not in others})
        images, labels = packed.unpacked()
    except ValueError as error:
        raise InputError(f"{where} is no packed set: {error}") from None
    return packed, {"images": images, "labels": labels, "classes": packed.packing.classes, **others}


def _refuse_unfit_stored(images: Tensor, labels: Tensor, classes: Tensor, factor, where: str) -> None:
    """Raise InputError unless images ``[n, C, H, W]`` can be decoded to one for each of the labels ``[N, K]``."""
    usable = images.ndim == 4 and images.numel() and images.is_floating_point() and labels.ndim == 2 and labels.numel()
    if (
        not (usable and type(factor) is int and factor > 1)
        or len(labels) != factor**2 * len(images)
        or not _in_order(classes, labels)
        or any(count % factor**2 for count in classes.bincount().tolist())
    ):
        raise InputError(
            f"{where}: stored images {list(images.shape)} of factor {factor!r} and labels {list(labels.shape)} do not "
            "belong together"
        )


def _class_order(count: int, num_classes: int) -> Tensor:
    """The class of each of ``count`` images, class by class, as many of each. [count] int64"""
    return torch.arange(num_classes).repeat_interleave(count // num_classes)


def _in_order(classes: Tensor, labels: Tensor) -> bool:
    """Whether these are the classes of ``labels [N, K]``: int64 ``[N]``, from 0 to K - 1, all of them, in order."""
    if classes.dtype != torch.int64 or classes.ndim != 1 or len(classes) != len(labels) or not len(classes):
        return False
    steps = classes.diff()
    ends = classes[0].item() == 0 and classes[-1].item() == labels.shape[1] - 1
    return bool(ends and ((steps == 0) | (steps == 1)).all())


def _logits(labels: Tensor, where: Path | str) -> Tensor:
    """Logits [N, K] float32 of labels in any of the forms of :meth:`SyntheticSet.from_published`."""
    integers, labels = not labels.is_floating_point(), labels.float()
    if labels.ndim and labels.numel() == len(labels) > 0 and labels.equal(labels.round()):
        classes = labels.flatten().long()
        if classes.min() < 0 or classes.max() >= len(classes.unique()):
            raise InputError(
                f"{where}: {len(classes)} labels are not numbers of classes, 0, 1, ..., all of which occur"
            )
        log.info("%s: the labels are class numbers, hard labels", where)
        return hard_logits(classes, int(classes.max()) + 1)
    if labels.ndim == 2 and labels.numel() and looks_like_probabilities(labels):
        log.warning("%s: the labels are probabilities, and are taken as these, not as logits", where)
        return logits_of(labels)
    if integers:
        raise InputError(f"{where}: labels are {_shape(labels)} of whole numbers, neither class numbers nor one-hot")
    return labels


def _shape(tensor: Tensor) -> str:
    return f"a tensor of shape {list(tensor.shape)}"
