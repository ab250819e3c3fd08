"""The difficulty ranking: for every class, its images from easiest to hardest, and the files it lives in.

``<NAME>_<METHOD>.safetensors`` is our form: classes of any size, the scores, and what they were computed from.
``<NAME>_<METHOD>.pt`` is the published one, a bare int64 tensor ``[num_classes, n_per_class]`` (arXiv 2408.03360).
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pad.errors import InputError
from pad.labels import per_class
from pad.store.foreign import load_pt, save_pt
from pad.store.tensors import load_tensors, save_tensors

KIND = "ranking"

FORMAT = 1


@dataclass(eq=False)
class Ranking:
    """Every class's images in order of difficulty.

    rows: row c holds the data-set indices of class c, ``[n_c]`` int64 on the CPU, easiest first; n_c may differ.
    scores: ``[N]`` float64 by data-set index, low = easy; None where only the order is known.
    metadata: JSON-able; ``method``, ``ranked_by`` ("score", or "order": of selection), ``settings``, the identities of
        ``data`` and ``preprocessing``, as far as known.
    """

    rows: list[Tensor]
    scores: Tensor | None
    metadata: dict

    @classmethod
    def from_scores(cls, scores: Tensor, labels: Tensor, num_classes: int, metadata: dict) -> "Ranking":
        """Rank by ``scores [N]``, low = easy, for ``labels [N]``; images of equal score stay in data-set order.

        Raises InputError when a score is not finite, the counts differ, or a class has no image.
        """
        scores = scores.detach().double().cpu()
        labels = labels.cpu()
        if len(scores) != len(labels):
            raise InputError(f"{len(scores)} difficulty scores were given for {len(labels)} images")
        if not scores.isfinite().all():
            bad = int((~scores.isfinite()).nonzero()[0])
            raise InputError(f"the difficulty score of image {bad} is {scores[bad].item()}, not a finite number")
        return cls(by_class(scores.argsort(stable=True), labels, num_classes), scores, metadata)

    @property
    def digest(self) -> str:
        """Which image comes where in which class, as 16 hexadecimal digits."""
        text = ";".join(",".join(map(str, row.tolist())) for row in self.rows)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def validate(self, labels: Tensor, num_classes: int, source: str) -> None:
        """Raise InputError, naming ``source``, unless row c holds the images of class c of this data set, each once."""
        indices = torch.cat(self.rows)
        labels = labels.cpu()
        count = len(labels)
        if (len(indices), len(self.rows)) != (count, num_classes):
            raise InputError(
                f"{source} is a ranking of {len(indices)} images in {len(self.rows)} classes, "
                f"but this data set has {count} images in {num_classes} classes"
            )
        outside = indices[(indices < 0) | (indices >= count)]
        if len(outside):
            image = int(outside[0])
            raise InputError(f"{source} ranks an image {image}, but this data set has images 0 to {count - 1}")
        times = indices.bincount(minlength=count)
        if times.max() > 1:
            image = int(times.argmax())
            raise InputError(f"{source} ranks image {image} {int(times[image])} times, and others not at all")
        rows = torch.arange(num_classes).repeat_interleave(torch.tensor([len(row) for row in self.rows]))
        wrong = (labels[indices] != rows).nonzero()
        if len(wrong):
            row = int(rows[wrong[0]])
            image = int(indices[wrong[0]])
            raise InputError(
                f"row {row} of {source} holds images of class {int(labels[image])} (such as image {image}): "
                "it is a ranking of other data, or of the same in another order"
            )

    @property
    def has_equal_classes(self) -> bool:
        """Whether all classes are of one size, as the published form needs."""
        return len({len(row) for row in self.rows}) == 1

    def save(self, path: Path | str) -> None:
        """Write our form, one safetensors file, atomically; equal rankings give equal bytes."""
        tensors = {"indices": torch.cat(self.rows), "lengths": torch.tensor([len(row) for row in self.rows])}
        if self.scores is not None:
            tensors["scores"] = self.scores
        save_tensors(path, tensors, {**self.metadata, "kind": KIND, "format": FORMAT})

    @classmethod
    def load(cls, path: Path | str) -> "Ranking":
        """Read a file that :meth:`save` wrote. Raises InputError when it is missing, damaged or something else."""
        tensors, metadata = load_tensors(path, kind=KIND, format=FORMAT)
        if not _are_a_ranking(tensors):
            raise InputError(f"{path} is damaged: its tensors are not those of a difficulty ranking")
        rows = tensors["indices"].split(tensors["lengths"].tolist())
        return cls(list(rows), tensors.get("scores"), metadata)

    def write_published(self, path: Path | str) -> None:
        """Write the published form, atomically. Raises InputError when the classes are not of one size."""
        if not self.has_equal_classes:
            sizes = [len(row) for row in self.rows]
            raise InputError(
                f"{path} cannot be written: the published form needs classes of one size, these have {min(sizes)} to "
                f"{max(sizes)} images"
            )
        save_pt(path, torch.stack(self.rows))


def _are_a_ranking(tensors: dict[str, Tensor]) -> bool:
    """Whether a file's tensors fit together: row lengths that add up to the indices, and finite scores, if any."""
    if not {"indices", "lengths"} <= tensors.keys():
        return False
    indices = tensors["indices"]
    lengths = tensors["lengths"]
    scores = tensors.get("scores", torch.zeros(indices.shape))
    if not all(part.dtype == torch.int64 and part.ndim == 1 for part in (indices, lengths)):
        return False
    if ((lengths < 0) | (lengths > len(indices))).any():  # before a sum that could overflow
        return False
    return 0 < int(lengths.sum()) == len(indices) and scores.shape == indices.shape and bool(scores.isfinite().all())


def by_class(order: Tensor, labels: Tensor, num_classes: int) -> list[Tensor]:
    """Data-set indices ``order [N]``, dealt to their classes; the order within a class is kept.

    ``labels [N]`` int64 on the CPU. Raises InputError when a class has no image.
    """
    sizes = labels.bincount(minlength=num_classes).tolist()
    if 0 in sizes:
        raise InputError(f"class {sizes.index(0)} has no images to rank")
    return list(order[labels[order].argsort(stable=True)].split(sizes))


def read_published(path: Path | str, labels: Tensor, num_classes: int, convert_flat: bool = False) -> Ranking:
    """Read a published ranking, an int64 tensor ``[num_classes, n_per_class]``, and check it against ``labels [N]``.

    A flat tensor ``[N]`` (as ``CIFAR10_ConvNet.pt``: all images, hardest first) is refused, or with ``convert_flat``
    turned round and grouped by class. No code in the file is run. Raises InputError naming the file.
    """
    path = Path(path)
    indices = load_pt(path)
    if not isinstance(indices, Tensor):
        raise InputError(f"{path} holds a {type(indices).__name__}, not a tensor of image indices")
    usable = indices.layout == torch.strided and not indices.is_meta and indices.numel() > 0
    if not usable or indices.dtype != torch.int64 or indices.ndim not in (1, 2):
        raise InputError(
            f"{path} holds a {indices.dtype} tensor of shape {list(indices.shape)}; "
            "a ranking is int64 image indices [num_classes, n_per_class]"
        )
    metadata = {"published": path.name}
    if indices.ndim == 2:
        ranking = Ranking(list(indices.contiguous()), None, metadata)
    elif not convert_flat:
        raise InputError(
            f"{path} is one flat list of {len(indices)} images, hardest first, not grouped by class as a ranking is; "
            "--convert_flat turns it round and groups it"
        )
    else:
        labels = labels.cpu()
        if not torch.equal(indices.sort().values, torch.arange(len(labels))):
            raise InputError(f"{path} does not list each of this data set's {len(labels)} images once")
        ranking = Ranking(by_class(indices.flip(0), labels, num_classes), None, metadata)
    ranking.validate(labels, num_classes, str(path))
    return ranking


def first_of_each_class(rows: Sequence[Tensor], ipc: int | Sequence[int], end: str = "easiest") -> Tensor:
    """The coreset of ``ipc`` images per class, or so many of each: data-set indices int64, class by class.

    Coresets are real images that a ranking chooses, as training sets of a synthetic set's size (arXiv 2204.08499).
    rows: of the K classes, as :attr:`Ranking.rows` has them. end: "easiest", the first of each row, or "hardest", the
    last of each, hardest first. Raises InputError when a class has fewer images.
    """
    counts = per_class(ipc, len(rows))
    for c, (row, count) in enumerate(zip(rows, counts)):
        if len(row) < count:
            raise InputError(f"ipc: {count} images are asked for, but class {c} has {len(row)}")
    return torch.cat([(row if end == "easiest" else row.flip(0))[:count] for row, count in zip(rows, counts)])
