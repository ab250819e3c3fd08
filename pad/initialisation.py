"""The first images and labels of a synthetic set, from real images and experts (DATM, arXiv 2310.05773, sec. 3.3)."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from itertools import zip_longest

import torch
import torch.nn.functional as F
from torch import Tensor

from pad.data.placement import Images
from pad.errors import InputError
from pad.labels import hard_logits
from pad.nn.flat import FlatModel
from pad.rng import generator
from pad.synthetic import SyntheticSet

log = logging.getLogger("pad")

INITIAL_IMAGES = ("samples_predicted_correctly", "real", "noise")  # kinds of initial_set

_BATCH = 256  # images that an expert is asked about at a time, so that a search stops early


@dataclass(frozen=True)
class Experts:
    """Trained networks to label with: ``parameters(k) -> [P]`` for k in 0..count-1, loaded one at a time.

    digest: of what their files say of them.
    """

    model: FlatModel
    parameters: Callable[[int], Tensor]
    count: int
    digest: str = ""


class WeakExperts(InputError):
    """The experts get too few images right."""


def refuse_small_classes(labels: Tensor, num_classes: int, ipc: int) -> None:
    """Raise InputError for a class of fewer than ``ipc`` images."""
    for c, count in enumerate(labels.cpu().bincount(minlength=num_classes).tolist()):
        if count < ipc:
            raise InputError(f"ipc: {ipc} images are asked for, but class {c} has {count}")


def class_order(labels: Tensor, num_classes: int, ipc: int, seed: int, *stream: int | str) -> list[Tensor]:
    """For each class the indices of its images in random order; InputError for a class with fewer than ``ipc``."""
    refuse_small_classes(labels, num_classes, ipc)
    rows = []
    for c in range(num_classes):
        members = (labels.cpu() == c).nonzero().flatten()
        rng = generator(seed, "initial images", *stream, c)
        rows.append(members[torch.randperm(len(members), generator=rng)])
    return rows


def predicted_correctly(experts: Experts, images: Images, rows: list[Tensor], ipc: int) -> Tensor:
    """Indices ``[num_classes * ipc]`` of real images that an expert classifies correctly.

    Of each class, in the order of its row, those the first expert gets right; while a class runs short the next expert
    goes over the images that remain. Raises WeakExperts when all experts together get too few right.
    """
    chosen: list[list[int]] = [[] for _ in rows]
    left = dict(enumerate(rows))
    for k in range(experts.count):
        short = [c for c in left if len(chosen[c]) < ipc and len(left[c])]
        if not short:
            break
        theta = experts.parameters(k)
        wrong: dict[int, list[Tensor]] = {c: [] for c in short}
        # A batch mixes the classes: BatchNorm, which has the batch's statistics, errs on batches of a single class.
        share = max(1, _BATCH // len(short))
        for parts in zip_longest(*(left[c].split(share) for c in short), fillvalue=rows[0][:0]):
            logits = experts.model.logits(theta, images[torch.cat(parts)])
            predictions = logits.argmax(dim=1).cpu().split([len(part) for part in parts])
            for c, part, prediction in zip(short, parts, predictions):
                chosen[c] += part[prediction == c].tolist()
                wrong[c].append(part[prediction != c])
            if all(len(chosen[c]) >= ipc for c in short):
                break
        left = {c: torch.cat(wrong[c]) for c in short}
    for c, found in enumerate(chosen):
        if len(found) < ipc:
            right = f"only {len(found)} images of class {c} correctly"
            raise WeakExperts(f"the {experts.count} experts classify {right}, but ipc is {ipc}")
    return torch.tensor([index for found in chosen for index in found[:ipc]])


def averaged_logits(experts: Experts, images: Tensor, classes: Tensor) -> Tensor:
    """Logits ``[N, K]`` of ``images [N, C, H, W]`` of ``classes [N]``, averaged over the experts right about it.

    An image that no expert gets right is labelled by all of them. Of those :func:`predicted_correctly` chose, only a
    network whose outputs depend on the rest of the batch (BatchNorm) can leave such.
    """
    total = right_total = images.new_zeros(())
    count = torch.zeros(len(images), 1, dtype=torch.int64, device=images.device)
    for k in range(experts.count):
        logits = experts.model.logits(experts.parameters(k), images)
        right = (logits.argmax(dim=1) == classes)[:, None]
        total = total + logits
        right_total = right_total + logits * right
        count = count + right
    return torch.where(count > 0, right_total / count.clamp(min=1), total / experts.count)


def initial_set(
    kind: str,
    images: Images,
    labels: Tensor,
    num_classes: int,
    ipc: int,
    experts: Experts | None = None,
    *,
    seed: int,
    stream: tuple[int | str, ...] = (),
    noise_logit: float = 10.0,
    hard: bool = False,
) -> tuple[Tensor, Tensor]:
    """Initial images ``[num_classes * ipc, C, H, W]``, class by class, and label logits ``[.., num_classes]``.

    Args:
        kind: ``samples_predicted_correctly``: real images and labels as in the two functions above. ``real``: random
            real images, labelled by the first expert. ``noise``: standard normal images, ``noise_logit`` times one-hot
            labels (ours: the published code has no labels for noise).
        images, labels: the real training images ``[N, C, H, W]`` (preprocessed) and labels ``[N]``.
        experts: not needed for hard labels of ``real`` images and ``noise``.
        hard: labels whose softmax is one-hot, to the last bit. The gradient of any loss in such logits is zero, to the
            last bit too, so that they stay what they are whatever learns.

    Raises InputError when a class has too few images, or too few that the experts get right.
    """
    classes = torch.arange(num_classes).repeat_interleave(ipc).to(images.device)
    if kind == "noise":
        rng = generator(seed, "initial images", *stream)
        noise = torch.randn(len(classes), *images.shape[1:], generator=rng)
        chosen = noise.to(images.device, images.dtype)
    elif kind == "real":
        chosen = images[torch.cat([row[:ipc] for row in class_order(labels, num_classes, ipc, seed, *stream)])]
    else:
        rows = class_order(labels, num_classes, ipc, seed, *stream)
        chosen = images[predicted_correctly(_needed(experts), images, rows, ipc)]
    if hard:
        return chosen, hard_logits(classes, num_classes).to(images.dtype)
    if kind == "noise":
        return chosen, noise_logit * F.one_hot(classes, num_classes).to(images.dtype)
    labellers = _needed(experts)
    if kind == "real":
        return chosen, labellers.model.logits(labellers.parameters(0), chosen)
    return chosen, averaged_logits(labellers, chosen, classes)


def from_set(
    start: SyntheticSet,
    ipc: int,
    experts: Experts | None = None,
    *,
    seed: int,
    device: torch.device,
    hard: bool = False,
) -> tuple[Tensor, Tensor]:
    """Initial images and label logits as of :func:`initial_set`, those of another synthetic set.

    All images in their order where ``ipc`` is the set's; random ones of each class, by the seed, where it is smaller;
    otherwise each is repeated, as evenly as can be. Soft labels are the set's; where those are one-hot, from which
    nothing can be learned, the experts' as of :func:`averaged_logits`. Lines in the log say so.
    """
    have, num_classes = start.ipc, start.num_classes
    if ipc < have:
        chosen = torch.cat([row[:ipc] for row in class_order(start.classes, num_classes, ipc, seed)])
    else:
        chosen = torch.cat([c * have + torch.arange(ipc) % have for c in range(num_classes)])
    if ipc != have:
        way = "random ones of each class are taken" if ipc < have else "they are repeated"
        log.info("pix_init: the set has %d images per class, ipc is %d: %s", have, ipc, way)
    images, classes = start.images[chosen].to(device), start.classes[chosen].to(device)
    soft = not torch.equal(start.probabilities(), F.one_hot(start.classes, num_classes).float())
    if hard:
        if soft:
            log.info("pix_init: labels are one-hot here, the set's soft labels are not taken over")
        return images, hard_logits(classes, num_classes)
    if soft:
        return images, start.labels[chosen].to(device)
    log.info("pix_init: the set's labels are one-hot, the experts label its images")
    return images, averaged_logits(_needed(experts), images, classes)


def _needed(experts: Experts | None) -> Experts:
    if experts is None:
        raise TypeError("labels other than hard ones, and images that are classified correctly, need experts")
    return experts
