"""The difficulty ranking: for every class, its images from easiest to hardest, and the files it lives in.

``<NAME>_<METHOD>.safetensors`` is our form: classes of any size, the scores, and what they were computed from.
``<NAME>_<METHOD>.pt`` is the published one, a bare int64 tensor ``[num_classes, n_per_class]`` (arXiv 2408.03360).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pad.difficulty.scores import METHODS, ScoringSettings, nearest_method, score
from pad.distributed import ALONE, Ranks
from pad.errors import InputError
from pad.files import load_pt, load_tensors, save_pt, save_tensors

if TYPE_CHECKING:
    from pad.data.sources import ImageData

log = logging.getLogger("pad")

KIND = "ranking"
FORMAT = 1
_PUBLISHED_NAMES = {"Tiny": "TinyImageNet"}  # where the published file's name is not the data set's


@dataclass(eq=False)
class Ranking:
    """Every class's images in order of difficulty.

    rows: row c holds the data-set indices of class c, ``[n_c]`` int64 on the CPU, easiest first; n_c may differ.
    scores: ``[N]`` float64 by data-set index, low = easy; None where only the order is known.
    metadata: JSON-able; ``method``, ``settings``, the identities of ``data`` and ``preprocessing``, as far as known.
    """

    rows: list[Tensor]
    scores: Tensor | None
    metadata: dict

    @classmethod
    def from_scores(cls, scores: Tensor, labels: Tensor, num_classes: int, metadata: dict) -> Ranking:
        """Rank by ``scores [N]``, low = easy, for ``labels [N]``; images of equal score stay in data-set order.

        Raises InputError when a score is not finite, the counts differ, or a class has no image.
        """
        scores, labels = scores.detach().double().cpu(), labels.cpu()
        if len(scores) != len(labels):
            raise InputError(f"{len(scores)} difficulty scores were given for {len(labels)} images")
        if not scores.isfinite().all():
            bad = int((~scores.isfinite()).nonzero()[0])
            raise InputError(f"the difficulty score of image {bad} is {scores[bad].item()}, not a finite number")
        order = scores.argsort(stable=True)
        rows = _by_class(order, labels, num_classes)
        for c, row in enumerate(rows):
            if not len(row):
                raise InputError(f"class {c} has no images to rank")
        return cls(rows, scores, metadata)

    def validate(self, labels: Tensor, num_classes: int, source: str) -> None:
        """Raise InputError, naming ``source``, unless row c holds the images of class c of this data set, each once."""
        indices, labels = torch.cat(self.rows), labels.cpu()
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
            row, image = int(rows[wrong[0]]), int(indices[wrong[0]])
            raise InputError(
                f"row {row} of {source} holds images of class {int(labels[image])} (such as image {image}): "
                "it is a ranking of other data, or of the same in another order"
            )

    def save(self, path: Path | str) -> None:
        """Write our form, one safetensors file, atomically; equal rankings give equal bytes."""
        tensors = {"indices": torch.cat(self.rows), "lengths": torch.tensor([len(row) for row in self.rows])}
        if self.scores is not None:
            tensors["scores"] = self.scores
        save_tensors(path, tensors, {**self.metadata, "kind": KIND, "format": FORMAT})

    @classmethod
    def load(cls, path: Path | str) -> Ranking:
        """Read a file that :meth:`save` wrote. Raises InputError when it is missing, damaged or something else."""
        tensors, metadata = load_tensors(path)
        if not isinstance(metadata, dict) or metadata.get("kind") != KIND:
            raise InputError(f"{path} is not a difficulty ranking")
        if metadata.get("format") != FORMAT:
            raise InputError(f"{path} has format {metadata.get('format')!r}; this version reads format {FORMAT}")
        indices, lengths, scores = (tensors.get(name) for name in ("indices", "lengths", "scores"))
        whole = all(part is not None and part.dtype == torch.int64 and part.ndim == 1 for part in (indices, lengths))
        whole = whole and bool((lengths >= 0).all()) and 0 < int(lengths.sum()) == len(indices)
        whole = whole and (scores is None or (scores.shape == indices.shape and bool(scores.isfinite().all())))
        if not whole:
            raise InputError(f"{path} is damaged: its tensors are not those of a difficulty ranking")
        return cls(list(indices.split(lengths.tolist())), scores, metadata)

    def write_published(self, path: Path | str) -> None:
        """Write the published form, atomically. Raises InputError when the classes are not of one size."""
        sizes = sorted({len(row) for row in self.rows})
        if len(sizes) != 1:
            raise InputError(
                f"{path} cannot be written: the published form needs classes of one size, these have {sizes[0]} to "
                f"{sizes[-1]} images"
            )
        save_pt(path, torch.stack(self.rows))


def _by_class(order: Tensor, labels: Tensor, num_classes: int) -> list[Tensor]:
    """Data-set indices ``order [N]``, dealt to their classes; the order within a class is kept."""
    grouped = order[labels[order].argsort(stable=True)]
    return list(grouped.split(labels.bincount(minlength=num_classes).tolist()))


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
        ranking = Ranking(_by_class(indices.flip(0), labels, num_classes), None, metadata)
    ranking.validate(labels, num_classes, str(path))
    return ranking


# ------------------------------------------------------------------------------------- finding or computing one


def _files(stem: Path) -> tuple[Path, Path]:
    """Our form's and the published form's file. Not with_suffix: a name may hold a dot."""
    return stem.with_name(f"{stem.name}.safetensors"), stem.with_name(f"{stem.name}.pt")


def ranking_file(folder: Path | str, dataset: str, sort_method: str) -> Path:
    """Where the ranking of a data set lies, ``<folder>/<NAME>_<METHOD>`` without a suffix.

    ``sort_method`` is ``GraNd`` or, with the data set's name before it, ``CIFAR10_GraNd``. NAME is the data set's, as
    published: ``Tiny`` becomes ``TinyImageNet``, ``ImageNet/imagenette`` ``ImageNet-imagenette``. Raises InputError for
    another data set's name, and for a method that cannot be computed unless its file is there.
    """
    name = _PUBLISHED_NAMES.get(dataset, dataset.replace("/", "-"))
    for prefix in (name, dataset):
        if sort_method.startswith(f"{prefix}_"):
            method = sort_method.removeprefix(f"{prefix}_")
            break
    else:
        other, _, method = sort_method.rpartition("_")
        if other:
            raise InputError(
                f"sort_method {sort_method} names a ranking of {other}, but the data set is {dataset}: "
                f"write {method} or {name}_{method}"
            )
    stem = Path(folder) / f"{name}_{method}"
    if method not in METHODS and not any(path.is_file() for path in _files(stem)):
        raise InputError(
            f"sort_method {sort_method}: {method!r} is not a method that can be computed (the nearest is "
            f"{nearest_method(method)}), and there is no ranking {stem}.pt"
        )
    return stem


def obtain_ranking(
    data: ImageData,
    images: Tensor,
    labels: Tensor,
    sort_method: str,
    folder: Path | str,
    scoring: ScoringSettings,
    *,
    seed: int,
    preprocessing: dict,
    progress: Callable[[int, int], None] | None = None,
    convert_flat: bool = False,
    ranks: Ranks = ALONE,
) -> Ranking:
    """The ranking of ``data`` by ``sort_method``: read from ``folder`` if it is there, else computed and written there.

    Our form is looked for first, then the published one; a ranking that is found is checked against this data set. What
    is computed is written in our form, and in the published one too when the classes have one size.

    Args:
        images, labels: preprocessed training images ``[N, C, H, W]`` float32 and labels ``[N]``, on the device to use.
        sort_method: see :func:`ranking_file`.
        scoring, seed: how to compute one. A ranking that is there but was made otherwise is used, with a warning.
        preprocessing: identity of what made ``images``, for the record.
        progress: called as ``progress(repeat, epoch)`` after each epoch of each scoring network.
        convert_flat: see :func:`read_published`.
        ranks: share the scoring; rank 0 reads and writes the files.

    Raises InputError for an unknown method, and for a file that is damaged or ranks other data.
    """
    stem = ranking_file(folder, data.name, sort_method)
    method = stem.name.rpartition("_")[2]
    ours, published = _files(stem)
    settings = {**asdict(scoring), "seed": seed, "preprocessing": preprocessing["kind"]}

    def there() -> Ranking | None:
        if ours.is_file():
            return _reuse(ours, data, settings)
        if published.is_file():
            ranking = read_published(published, data.train_labels, data.num_classes, convert_flat)
            log.info("difficulty ranking: using %s", published)
            return ranking
        _check_writable(stem.parent)
        return None

    if (ranking := ranks.on_main(there)) is not None:
        return ranking
    scores = score([method], images, labels, data.num_classes, scoring, seed, progress, ranks)[method]
    metadata = {"method": method, "data": data.identity, "preprocessing": preprocessing, "settings": settings}
    ranking = Ranking.from_scores(scores, data.train_labels, data.num_classes, metadata)
    if ranks.is_main:
        written = [ours]
        ranking.save(ours)
        if len({len(row) for row in ranking.rows}) == 1:
            ranking.write_published(published)
            written.append(published)
        log.info("difficulty ranking: computed %s and wrote %s", method, " and ".join(map(str, written)))
    return ranking


def _reuse(path: Path, data: ImageData, settings: dict) -> Ranking:
    """Read a ranking in our form; warn in one line where it was made with other settings than ``settings``."""
    ranking = Ranking.load(path)
    made_for = ranking.metadata.get("data")
    if made_for is not None and made_for["fingerprint"] != data.fingerprint:
        theirs, these = (
            f"{about['dataset']} at {' x '.join(map(str, about['size']))} pixels, fingerprint {about['fingerprint']}"
            for about in (made_for, data.identity)
        )
        raise InputError(
            f"{path} ranks other images: {theirs}, where these are {these}; "
            "move it away to have a ranking computed, or name another folder"
        )
    ranking.validate(data.train_labels, data.num_classes, str(path))
    made_with = ranking.metadata.get("settings", settings)
    differences = [
        f"{name} {made_with.get(name)} (now {value})"
        for name, value in settings.items()
        if made_with.get(name) != value
    ]
    if differences:
        what = ", ".join(differences)
        log.warning("difficulty ranking: using %s, computed with %s; remove the file to compute it anew", path, what)
    else:
        log.info("difficulty ranking: using %s", path)
    return ranking


def _check_writable(folder: Path) -> None:
    """Find out before hours of training that the result can be kept."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"the folder for rankings, {folder}, cannot be made ({error.strerror})") from None
    if not os.access(folder, os.W_OK):
        raise InputError(f"the folder for rankings, {folder}, cannot be written to")
