"""The first images and labels of a synthetic set, from real images and experts (DATM, arXiv 2310.05773, sec. 3.3)."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import torch
import torch.nn.functional as F
from torch import Tensor

from pad.data.formation import coarsened, decoded, mixed
from pad.data.placement import Images
from pad.errors import InputError
from pad.labels import hard_logits, per_class
from pad.nn.flat import FlatModel
from pad.rng import generator
from pad.synthetic import SyntheticSet, in_words

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


def refuse_small_classes(labels: Tensor, num_classes: int, ipc: int | Sequence[int], factor: int = 1) -> None:
    """Raise InputError for a class of fewer than ``ipc`` images (or its number), ``factor`` x ``factor`` for each."""
    there = labels.cpu().bincount(minlength=num_classes).tolist()
    for c, (count, wanted) in enumerate(zip(there, per_class(ipc, num_classes))):
        needed = wanted * factor**2
        if count < needed:
            asked = f"{wanted} with factor: {factor}, {needed} real images, is"
            asked = f"{wanted} images are" if factor == 1 else asked
            raise InputError(f"ipc: {asked} asked for, but class {c} has {count}")


def class_order(
    labels: Tensor, num_classes: int, ipc: int | Sequence[int], seed: int, *stream: int | str
) -> list[Tensor]:
    """For each class the indices of its images in random order; InputError for a class with fewer than ``ipc``."""
    refuse_small_classes(labels, num_classes, ipc)
    rows = []
    for c in range(num_classes):
        members = (labels.cpu() == c).nonzero().flatten()
        rng = generator(seed, "initial images", *stream, c)
        rows.append(members[torch.randperm(len(members), generator=rng)])
    return rows


def predicted_correctly(
    experts: Experts, images: Images, rows: list[Tensor], ipc: int | Sequence[int], factor: int = 1
) -> Tensor:
    """Indices, ``ipc`` of each class, of real images that an expert classifies correctly, as tiles of ``factor``.

    Of each class, in the order of its row, those the first expert gets right; while a class runs short the next expert
    goes over the images that remain. Raises WeakExperts when all experts together get too few right.
    """
    needed = per_class(ipc, len(rows))
    chosen: list[list[int]] = [[] for _ in rows]
    left = dict(enumerate(rows))
    for k in range(experts.count):
        short = [c for c in left if len(chosen[c]) < needed[c] and len(left[c])]
        if not short:
            break
        theta = experts.parameters(k)
        wrong: dict[int, list[Tensor]] = {c: [] for c in short}
        # A batch mixes the classes: BatchNorm, which has the batch's statistics, errs on batches of a single class.
        share = max(1, _BATCH // len(short))
        for parts in zip_longest(*(left[c].split(share) for c in short), fillvalue=rows[0][:0]):
            logits = experts.model.logits(theta, coarsened(images[torch.cat(parts)], factor))
            predictions = logits.argmax(dim=1).cpu().split([len(part) for part in parts])
            for c, part, prediction in zip(short, parts, predictions):
                chosen[c] += part[prediction == c].tolist()
                wrong[c].append(part[prediction != c])
            if all(len(chosen[c]) >= needed[c] for c in short):
                break
        left = {c: torch.cat(wrong[c]) for c in short}
    for c, found in enumerate(chosen):
        if len(found) < needed[c]:
            right = f"only {len(found)} images of class {c} correctly"
            wanted = f"ipc is {needed[c]}" if factor == 1 else f"{needed[c]} are needed"
            raise WeakExperts(f"the {experts.count} experts classify {right}, but {wanted}")
    return torch.tensor([index for found, count in zip(chosen, needed) for index in found[:count]])


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
    factor: int = 1,
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
        factor: of multi-formation. The images are stored ones, whose tiles are real images, reduced; the experts see
            what is decoded of them. There is a label for each decoded image.

    Raises InputError when a class has too few images, or too few that the experts get right.
    """
    count = ipc * factor**2
    classes = torch.arange(num_classes).repeat_interleave(count).to(images.device)
    if kind == "noise":
        rng = generator(seed, "initial images", *stream)
        noise = torch.randn(num_classes * ipc, *images.shape[1:], generator=rng)
        stored = noise.to(images.device, images.dtype)
    else:
        rows = class_order(labels, num_classes, count, seed, *stream)
        if kind == "real":
            chosen = torch.cat([row[:count] for row in rows])
        else:
            chosen = predicted_correctly(_needed(experts), images, rows, count, factor)
        stored = mixed(images[chosen], factor, num_classes)
    if hard:
        return stored, hard_logits(classes, num_classes).to(images.dtype)
    if kind == "noise":
        return stored, noise_logit * F.one_hot(classes, num_classes).to(images.dtype)
    labellers, shown = _needed(experts), decoded(stored, factor, num_classes)
    if kind == "real":
        return stored, labellers.model.logits(labellers.parameters(0), shown)
    return stored, averaged_logits(labellers, shown, classes)


def from_set(
    start: SyntheticSet,
    ipc: int,
    experts: Experts | None = None,
    *,
    seed: int,
    device: torch.device,
    hard: bool = False,
    factor: int = 1,
) -> tuple[Tensor, Tensor]:
    """Initial images and label logits as of :func:`initial_set`, those of another synthetic set.

    Of each class all images in their order where ``ipc`` is their number; random ones, by the seed, where it is
    smaller; otherwise each is repeated, as evenly as can be. Stored images of the same ``factor`` are taken as they
    are; else the decoded ones are, as real images would be. Soft labels are the set's; where those are one-hot, from
    which nothing can be learned, the experts' as of :func:`averaged_logits`. Lines in the log say so.
    """
    num_classes = start.num_classes
    source, count = (start.kept, ipc) if start.factor == factor else (start.images, ipc * factor**2)
    have = start.kept_counts if start.factor == factor else start.counts
    each = len(start.images) // len(source)  # labels of an image
    places = torch.arange(len(start.labels)).split([n * each for n in have])  # of labels, as of decoded images
    members = torch.arange(num_classes).repeat_interleave(torch.tensor(have))
    images_of, labels_of = [], []
    for row, place, n in zip(class_order(members, num_classes, 1, seed), places, have):
        picked = row[:count] if count < n else row.min() + torch.arange(count) % n
        images_of.append(picked)
        labels_of.append(place.view(each, n)[:, picked - row.min()].flatten())
    chosen = torch.cat(labels_of)
    if any(n != count for n in have):
        ways = ["random ones of each class are taken"] * (count < max(have))
        ways += ["they are repeated"] * (count > min(have))
        asked = f"ipc is {ipc}" if count == ipc else f"{count} are needed"
        log.info("pix_init: the set has %s images per class, %s: %s", in_words(have), asked, ", or ".join(ways))
    images = source[torch.cat(images_of)].to(device)
    if start.factor != factor:
        images = mixed(images, factor, num_classes)
    classes = start.classes[chosen].to(device)
    soft = not torch.equal(start.probabilities(), F.one_hot(start.classes, num_classes).float())
    if hard:
        if soft:
            log.info("pix_init: labels are one-hot here, the set's soft labels are not taken over")
        return images, hard_logits(classes, num_classes)
    if soft:
        return images, start.labels[chosen].to(device)
    log.info("pix_init: the set's labels are one-hot, the experts label its images")
    return images, averaged_logits(_needed(experts), decoded(images, factor, num_classes), classes)


def _needed(experts: Experts | None) -> Experts:
    if experts is None:
        raise TypeError("labels other than hard ones, and images that are classified correctly, need experts")
    return experts
