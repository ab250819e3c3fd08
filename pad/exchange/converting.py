"""A set of others as one of ours: its labels, its order and its numbers, checked against the data set it is of."""

import dataclasses
import logging
import re
from collections.abc import Sequence

import torch
from torch import Tensor

from pad.data.formation import decoded, refuse_unfit_factor
from pad.data.images import ImageData
from pad.data.preprocessing import Preprocessing, grey_of
from pad.errors import InputError
from pad.exchange.reading import CLASSES, LOGITS, NETWORK, PIXELS, Foreign
from pad.labels import hard_logits, logits_of, looks_like_probabilities
from pad.synthetic import SyntheticSet

log = logging.getLogger("pad")

_WIDEST_PIXELS = 0.6  # standard deviation: of pixels in 0..1 it is at most 0.5, of normalised images about 1


def fitted(found: Foreign, data: ImageData) -> Foreign:
    """A set of which nothing is unknown any more, as one of ``data``: class by class, with logits for labels.

    Raises InputError where it cannot be one: other classes, one that has no image, other sides or channels, a factor
    that does not divide the sides or is above them, numbers that are not what they are called.
    """
    images = found.images
    if images.dtype == torch.uint8 and images.shape[1] == 1 and data.channels == 3:
        images = images.expand(-1, 3, -1, -1)  # pictures of which all happen to be grey
    shape = [data.channels, *data.size]
    if list(images.shape[1:]) != shape:
        raise InputError(f"{found.where} holds images {list(images.shape[1:])}, but {data.name} has images {shape}")
    if not found.padded:
        remedy = "; give --padded if the code that made them puts grey around them, as IDC's does"
        refuse_unfit_factor(found.factor or 1, data.size, remedy)
    if (found.factor or 1) > min(data.size):  # however they are padded
        raise InputError(f"factor: {found.factor} is more than the {min(data.size)} pixels of a side of the images")
    if images.is_floating_point():
        _refuse_mislabelled(found)
    labels, classes = _labels(found, data)
    counts = classes.bincount(minlength=data.num_classes).tolist()
    if 0 in counts:
        raise InputError(f"{found.where} has no image of class {counts.index(0)} of {data.name}'s {data.num_classes}")
    order = classes.argsort(stable=True)
    if not torch.equal(order, torch.arange(len(order))):
        log.info("%s: the images are put in the order of their classes", found.where)
    images, labels, classes = images[order], labels[order], classes[order]
    return dataclasses.replace(found, images=images, labels=labels, label_form=LOGITS, classes=classes)


def as_set(found: Foreign, preprocessing: Preprocessing, of: Preprocessing | None, metadata: dict) -> SyntheticSet:
    """What :func:`fitted` gives, as networks see it under ``preprocessing``.

    ``of``: what the images are normalised by, where that is not ``preprocessing``. Multi-formation is kept where the
    stored images can be preprocessed; whitening is of whole images, so pixels are decoded before it.
    """
    images, labels, factor, classes = found.images, found.labels, found.factor or 1, found.classes
    assert classes is not None, "fitted() tells the classes"
    counts = classes.bincount().tolist()
    images = images.float() / 255 if images.dtype == torch.uint8 else images.float()
    stored = None
    whitens = found.values == PIXELS and preprocessing.kind == "zca"
    if whitens:
        images = decoded(images, factor, counts, torch.full((images.shape[1], 1, 1), 0.5))
    if of is not None:
        images = of.invert(images)
    if of is not None or found.values == PIXELS:
        images = preprocessing.apply(images)
    if factor > 1:
        if not whitens:
            images, stored = decoded(images, factor, counts, grey_of(preprocessing.identity)), images.cpu()
        labels = torch.cat([part.repeat(factor**2, 1) for part in labels.split(counts)])
        classes = torch.arange(len(counts)).repeat_interleave(factor**2 * torch.tensor(counts))
        log.info("%s: %d images, each cut into %d, become %d", found.where, len(found.images), factor**2, len(images))
    made = images.cpu(), labels, torch.tensor(found.lr), classes, metadata
    return SyntheticSet(*made, preprocessing=preprocessing.to("cpu"), stored=stored)


def _refuse_mislabelled(found: Foreign) -> None:
    spread = found.images.float().std().item()
    if found.values == PIXELS and spread > _WIDEST_PIXELS:
        raise InputError(
            f"{found.where}: the images are no pixels of 0 to 1, their values have a standard deviation of {spread:.2g}"
        )
    if found.values == NETWORK and found.images.min() >= 0 and found.images.max() <= 1:
        log.warning("%s: all values are in 0..1; they count as what networks see, not as pixels", found.where)


def _labels(found: Foreign, data: ImageData) -> tuple[Tensor, Tensor]:
    """Logits ``[N, K]`` float32, and the class of each image ``[N]``: of soft labels by the order, if not said."""
    labels, num_classes = found.labels, data.num_classes
    stated = labels if found.label_form == CLASSES else found.classes
    if stated is not None:
        classes = stated.long()
        if not torch.equal(classes.double(), stated.double()) or classes.min() < 0 or classes.max() >= num_classes:
            raise InputError(f"{found.where}: the labels are not numbers of the {num_classes} classes of {data.name}")
    if found.label_form == CLASSES:
        if found.folders is not None:
            classes = torch.tensor(_numbers_of(found, data))[classes]
        return hard_logits(classes, num_classes), classes
    count = len(labels)
    if list(labels.shape) != [count, num_classes]:
        raise InputError(
            f"{found.where}: labels of shape {list(labels.shape)}, but {data.name} has {num_classes} classes"
        )
    if stated is None:
        if count % num_classes:
            raise InputError(
                f"{found.where}: {count} images are not a multiple of {num_classes} classes, and nothing says which "
                "stands for which"
            )
        classes = torch.arange(num_classes).repeat_interleave(count // num_classes)
    soft = labels.float()
    if found.label_form != LOGITS:
        if not looks_like_probabilities(soft):
            raise InputError(f"{found.where}: the labels are no probabilities, rows in 0..1 that sum to 1")
        soft = logits_of(soft)
    return soft, classes


def _numbers_of(found: Foreign, data: ImageData) -> list[int]:
    """The classes that folders stand for: by the classes' names, or by their numbers, as 3 and 03_cat."""
    folders: Sequence[str] = found.folders or []
    by_name = {name: c for c, name in enumerate(data.class_names)}
    if set(folders) == by_name.keys():
        return [by_name[name] for name in folders]
    matches = [re.fullmatch(r"(\d{1,6})(_.*)?", name) for name in folders]
    numbers = [int(match[1]) if match else -1 for match in matches]
    if sorted(numbers) != list(range(data.num_classes)):
        other = next((name for name, c in zip(folders, numbers) if not 0 <= c < data.num_classes), folders[0])
        raise InputError(
            f"{found.where}: the folders are not the {data.num_classes} classes of {data.name}, by name or by number; "
            f"one is {other!r}"
        )
    return numbers
