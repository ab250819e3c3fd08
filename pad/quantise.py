"""Images and labels in few bits: levels that are evenly spaced within each group, and their scales.

A number x of a group is stored as q = round((x - low) / step), clipped to 0 .. 2^bits - 1, and read as low + q step.
Where clipping the largest numbers makes the squared error of a group smaller, they are clipped.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pad.bits import Cost, packed, unpacked
from pad.labels import HARD_LOGIT, hard_logits, logits_of

BITS = (8, 4, 2)
LABEL_BITS = (32, 16, *BITS)
GROUPS = ("set", "class", "image", "channel")  # what shares a scale; a channel is one of an image

_SCALE = 64  # bits of a group's low and step
_LOWEST = -16.0  # logit below the largest, of labels in few bits: e^-16 is a probability of 1e-7
_AT_ONCE = 1 << 20  # numbers that are searched at a time, as far as groups allow

# The search: shrinks of either side of a group, all pairs; then ever finer steps around the best; then least squares.
_SHRINK, _SHRINKS, _FINER, _WIDE, _FITS = 0.75, 12, 4, 2, 10


@dataclass(frozen=True, kw_only=True)
class Packing:
    """How a set is packed: images of ``shape`` [N, C, H, W], class by class, and ``labels`` [rows, K] logits.

    bits: of a number of an image. group: of ``GROUPS``. label_bits: 32 and 16 are floating-point numbers; of fewer a
    row is a group; 0 are hard labels, which are not stored. top_k: instead, each row's so many largest probabilities
    in 16 bits, of which the rest is spread evenly. counts: images of each class, where these are not as many of each.
    Raises ValueError for what none is.
    """

    bits: int
    group: str
    shape: tuple[int, int, int, int]
    labels: tuple[int, int]
    label_bits: int = 32
    top_k: int | None = None
    counts: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        whole = [self.bits, self.label_bits, *self.shape, *self.labels, *([] if self.top_k is None else [self.top_k])]
        whole += self.counts or []
        if (
            any(type(number) is not int for number in whole)
            or (len(self.shape), len(self.labels)) != (4, 2)
            or min(*self.shape, *self.labels) < 1
            or (self.counts is None and (self.shape[0] % self.num_classes or self.labels[0] % self.num_classes))
            or (self.counts is not None and not self._of_counts)
            or self.bits not in BITS
            or self.group not in GROUPS
            or self.label_bits not in (0, *LABEL_BITS)
            or (self.top_k is not None and not 1 <= self.top_k < self.num_classes)
        ):
            raise ValueError("no packing of a set")

    @classmethod
    def of(cls, described: object) -> "Packing":
        """That which :meth:`as_dict` describes. Raises ValueError for anything else."""
        try:
            values = dict(described)  # type: ignore
            lists = {name: tuple(values[name]) for name in ("shape", "labels", "counts") if values.get(name)}
            return cls(**(values | lists))
        except (KeyError, TypeError):
            raise ValueError("no description of a packing") from None

    def as_dict(self) -> dict:
        described = dataclasses.asdict(self) | {"shape": list(self.shape), "labels": list(self.labels)}
        del described["counts"]
        return described | ({} if self.counts is None else {"counts": list(self.counts)})

    @property
    def _of_counts(self) -> bool:
        """Whether images and labels are as many as the counts say."""
        counts, rows = self.counts or (), self.labels[0]
        whole = len(counts) == self.num_classes and min(counts) > 0 and sum(counts) == self.shape[0]
        return whole and not rows % self.shape[0]

    @property
    def num_classes(self) -> int:
        return self.labels[1]

    @property
    def classes(self) -> Tensor:
        """The class of each label, int64 ``[rows]``."""
        (rows, num_classes), counts = self.labels, self.counts
        each = [rows // num_classes] * num_classes if counts is None else [n * (rows // sum(counts)) for n in counts]
        return torch.arange(num_classes).repeat_interleave(torch.tensor(each))

    @property
    def groups(self) -> int:
        """The number of groups of the images."""
        count, channels = self.shape[:2]
        return {"set": 1, "class": self.num_classes, "image": count, "channel": count * channels}[self.group]

    @property
    def _label_width(self) -> int:
        """Bits of a class's number."""
        return (self.num_classes - 1).bit_length()

    @property
    def cost(self) -> Cost:
        rows, num_classes = self.labels
        if self.top_k is not None:
            labels = rows * self.top_k * (16 + self._label_width)
        else:
            labels = rows * (num_classes * self.label_bits + _SCALE * (self.label_bits in BITS))
        images = math.prod(self.shape) * self.bits + self.groups * _SCALE
        return Cost(images, labels, num_classes, math.prod(self.shape[1:]))

    @property
    def layout(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Type and shape of the tensors by name. Few have rows, since a file has a checksum for each."""
        rows, num_classes = self.labels
        layout: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            "levels": (torch.uint8, (_bytes(math.prod(self.shape), self.bits),)),
            "scales": (torch.float32, (2, self.groups)),
        }
        if self.top_k is not None:
            kept = rows * self.top_k
            layout["label_values"] = torch.float16, (kept,)
            layout["label_classes"] = torch.uint8, (_bytes(kept, self._label_width),)
        elif self.label_bits in BITS:
            layout["label_levels"] = torch.uint8, (_bytes(rows * num_classes, self.label_bits),)
            layout["label_scales"] = torch.float32, (2, rows)
        elif self.label_bits:
            layout["label_values"] = {32: torch.float32, 16: torch.float16}[self.label_bits], (rows * num_classes,)
        return layout

    def pack(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The tensors of ``images`` and ``labels`` (logits), as in :attr:`layout`, on the CPU."""
        images = images.detach().cpu()
        if self.group == "class" and self.counts is not None:
            each = [quantised(part.reshape(1, -1), self.bits) for part in images.split(list(self.counts))]
            levels, scales = torch.cat([part.flatten() for part, _ in each]), torch.cat([scale for _, scale in each], 1)
        else:
            levels, scales = quantised(images.reshape(self.groups, -1), self.bits)
        return {"levels": packed(levels, self.bits), "scales": scales, **self._pack_labels(labels.detach().cpu())}

    def rows(self, numbers: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
        """Numbers of the images as rows that share a scale ``[R, M]``, and the rows' scales ``[2, R]``."""
        if self.group == "class" and self.counts is not None:
            counts = torch.tensor(self.counts, device=scales.device)
            return numbers.reshape(self.shape[0], -1), scales.repeat_interleave(counts, 1)
        return numbers.reshape(self.groups, -1), scales

    def _pack_labels(self, labels: Tensor) -> dict[str, Tensor]:
        if self.top_k is not None:
            values, classes = labels.double().softmax(1).topk(self.top_k)
            return {"label_values": values.half().flatten(), "label_classes": packed(classes, self._label_width)}
        if self.label_bits == 32:
            return {"label_values": labels.flatten()}
        below = labels - labels.amax(1, keepdim=True)  # the same targets
        if self.label_bits == 16:
            return {"label_values": below.clamp(min=-HARD_LOGIT).half().flatten()}
        if self.label_bits:
            levels, scales = quantised(below.clamp(min=_LOWEST), self.label_bits)
            return {"label_levels": packed(levels, self.label_bits), "label_scales": scales}
        return {}

    def unpack(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Images and label logits, float32. Raises ValueError for tensors that are not of this packing."""
        if {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()} != self.layout:
            raise ValueError("other tensors than its description says")
        levels = unpacked(tensors["levels"], self.bits, math.prod(self.shape))
        images = restored(*self.rows(levels, tensors["scales"])).view(self.shape)
        return images, self._unpack_labels(tensors)

    def _unpack_labels(self, tensors: Mapping[str, Tensor]) -> Tensor:
        rows, num_classes = self.labels
        if self.top_k is not None:
            kept = tensors["label_values"].double().view(rows, self.top_k)
            classes = unpacked(tensors["label_classes"], self._label_width, kept.numel()).view_as(kept)
            if classes.max() >= num_classes:
                raise ValueError(f"labels of other than {num_classes} classes")
            rest = (1 - kept.sum(1, keepdim=True)).clamp(min=0) / (num_classes - self.top_k)
            return logits_of(rest.expand(self.labels).scatter(1, classes, kept)).float()
        if self.label_bits in BITS:
            levels = unpacked(tensors["label_levels"], self.label_bits, rows * num_classes)
            return restored(levels.view(self.labels), tensors["label_scales"])
        if self.label_bits:
            return tensors["label_values"].float().view(self.labels)
        return hard_logits(self.classes, num_classes)


@dataclass(frozen=True, eq=False)
class Packed:
    """A packed set: how, and the tensors of it."""

    packing: Packing
    tensors: dict[str, Tensor]

    def to(self, device: torch.device) -> "Packed":
        """The same on a device."""
        return Packed(self.packing, {name: tensor.to(device) for name, tensor in self.tensors.items()})

    def unpacked(self) -> tuple[Tensor, Tensor]:
        """As :meth:`Packing.unpack`."""
        return self.packing.unpack(self.tensors)

    def nearest(self, images: Tensor) -> Tensor:
        """The numbers nearest to ``images [N, C, H, W]``, on the same device, that these scales have."""
        rows, scales = self.packing.rows(images, self.tensors["scales"])
        return restored(self._levels(rows, scales), scales).view_as(images)

    def moved(self, images: Tensor) -> "Packed":
        """These scales and labels, with the levels nearest to ``images [N, C, H, W]``."""
        levels = self._levels(*self.packing.rows(images.cpu(), self.tensors["scales"])).to(torch.uint8)
        return Packed(self.packing, {**self.tensors, "levels": packed(levels, self.packing.bits)})

    def _levels(self, rows: Tensor, scales: Tensor) -> Tensor:
        low, step = scales[:, :, None]
        return _nearest(rows, low, step, 2**self.packing.bits - 1)


def quantised(values: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Levels uint8 of ``values [G, M]`` float32, and for each of the G groups low and step, float32 ``[2, G]``.

    low and step are those with the smallest squared error that a search finds: over how far either side is clipped, and
    from there by turns of levels for the scale and, by least squares, a scale for the levels.
    """
    parts = [_quantised(part, 2**bits - 1) for part in values.split(max(1, _AT_ONCE // values.shape[1]))]
    return torch.cat([levels for levels, _ in parts]), torch.cat([scales for _, scales in parts], 1)


def restored(levels: Tensor, scales: Tensor) -> Tensor:
    """What ``levels [G, M]`` of ``scales [2, G]`` stand for, float32, rounded after each of the two operations."""
    low, step = scales[:, :, None]
    return levels.float().mul_(step).add_(low)


def _nearest(values: Tensor, low: Tensor, step: Tensor, top: int) -> Tensor:
    """The levels 0 .. ``top`` nearest to ``values [G, M]``, as floating-point numbers. low and step: ``[G, 1]``."""
    # masked_fill: on CUDA torch.where copies a number to the device, and waits for that
    return values.sub(low).div_(step.masked_fill(step <= 0, 1)).round_().clamp_(0, top)


class _Best:
    """The best scales so far of the groups ``values [G, M]``: low and step, ``[G, 1]``."""

    def __init__(self, values: Tensor, top: int):
        self._values, self._top = values, top
        self.low, self.step = (torch.zeros(len(values), 1) for _ in range(2))
        self._error = torch.full((len(values), 1), torch.inf, dtype=torch.float64)

    def offer(self, low: Tensor, step: Tensor) -> Tensor:
        """Take these scales for the groups that they are better for; returns which these are, bool ``[G, 1]``."""
        off = _nearest(self._values, low, step, self._top).mul_(step).add_(low).sub_(self._values)
        error = torch.linalg.vector_norm(off, dim=1, keepdim=True, dtype=torch.float64)
        better = error < self._error
        self._error = torch.where(better, error, self._error)
        self.low, self.step = torch.where(better, low, self.low), torch.where(better, step, self.step)
        return better


def _quantised(values: Tensor, top: int) -> tuple[Tensor, Tensor]:
    middle = values.median(1, keepdim=True).values
    below, above = middle - values.amin(1, keepdim=True), values.amax(1, keepdim=True) - middle
    best = _Best(values, top)
    left, right = torch.ones_like(middle), torch.ones_like(middle)  # shares of below and above that are not clipped

    def offer(a: Tensor, b: Tensor) -> None:
        nonlocal left, right
        better = best.offer(middle - a * below, (a * below + b * above) / top)
        left, right = torch.where(better, a, left), torch.where(better, b, right)

    for i, j in itertools.product(range(_SHRINKS), repeat=2):
        offer(torch.full_like(middle, _SHRINK**i), torch.full_like(middle, _SHRINK**j))
    shrink = _SHRINK
    for _ in range(_FINER):
        shrink **= 0.5
        a, b = left, right
        for i, j in itertools.product(range(-_WIDE, _WIDE + 1), repeat=2):
            offer(a * shrink**i, b * shrink**j)
    for _ in range(_FITS):
        best.offer(*_fitted(_nearest(values, best.low, best.step, top), values, best.step))
    scales = torch.cat([best.low, best.step], 1).T.contiguous()
    return _nearest(values, best.low, best.step, top).to(torch.uint8), scales


def _fitted(levels: Tensor, values: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """low and step with the smallest squared error of ``values`` at these levels; ``step`` where all are the same."""

    def mean(x: Tensor) -> Tensor:
        return x.mean(1, keepdim=True, dtype=torch.float64)

    of_levels, of_values = mean(levels), mean(values)
    spread = mean(levels.square()) - of_levels.square()
    step = torch.where(spread > 0, (mean(levels * values) - of_levels * of_values) / spread, step.double())
    return (of_values - step * of_levels).float(), step.float()


def _bytes(count: int, width: int) -> int:
    return -(-count * width // 8)
