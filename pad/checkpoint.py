"""Everything that an outer iteration changes, and the file that keeps it."""

import logging
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from pad.errors import InputError
from pad.nn import kernels
from pad.store.tensors import load_tensors, save_tensors

log = logging.getLogger("pad")

SMALLEST_LR = 1e-6  # the learned learning rate is kept above it: training with a negative one is of no use

_FORMAT = 1


@dataclass
class State:
    """Everything that an outer iteration changes.

    ``average``: the exponential moving average of the images (FTD, arXiv 2211.11004), where one is kept.
    """

    images: Tensor
    labels: Tensor
    lr: Tensor
    momentum: list[Tensor] = field(default_factory=list)
    average: Tensor | None = None
    iteration: int = 0  # the next one
    best: float = -1.0
    skipped: int = 0
    bad_in_a_row: int = 0

    def __post_init__(self):
        self.momentum = self.momentum or [torch.zeros_like(t) for t in self.variables]

    @property
    def variables(self) -> list[Tensor]:
        return [self.images, self.labels, self.lr]

    def step(self, gradients: list[Tensor], rates: list[float], momenta: list[float], ema_decay: float = 0.0) -> None:
        """One SGD step with momentum on images, labels and learning rate; then one of the average, with ``ema_decay``."""
        for variable, buffer, gradient, rate, momentum in zip(
            self.variables, self.momentum, gradients, rates, momenta, strict=True
        ):
            buffer.mul_(momentum).add_(gradient)
            variable.sub_(buffer, alpha=rate)
        self.lr.clamp_(min=SMALLEST_LR)
        if self.average is not None:
            self.average.mul_(ema_decay).add_(self.images, alpha=1 - ema_decay)

    _COUNTERS = ("iteration", "best", "skipped", "bad_in_a_row")
    _TENSORS = ("images", "labels", "lr")

    def save(self, path: Path, processes: int = 1, identity: dict | None = None) -> None:
        """Write a checkpoint, atomically. ``processes``: how many share the matching; ``identity``: see :meth:`load`."""
        counters = {name: getattr(self, name) for name in self._COUNTERS}
        metadata = {"kind": "checkpoint", "format": _FORMAT, "arithmetic": _arithmetic(self.images, processes)}
        save_tensors(path, self._named(), metadata | counters | {"identity": identity or {}})

    @classmethod
    def load(cls, path: Path, like: "State", processes: int = 1, identity: dict | None = None) -> "State":
        """Read a checkpoint of the same shapes as ``like``, onto its device. Raises InputError on anything else.

        ``identity``: nested plain values that say what the run is of; where those of the checkpoint are others, the
        first difference is named. Logs one line when it was written where sums may round otherwise: the end may then
        differ in the last bits.
        """
        remedy = "remove it, and --resume starts the run anew"
        tensors, metadata = load_tensors(path, kind="checkpoint", format=_FORMAT, remedy=remedy)
        counters = {name: metadata.get(name) for name in cls._COUNTERS}
        before, made_with = metadata.get("arithmetic"), metadata.get("identity", {})
        usual = all(type(value) is int and value >= 0 for name, value in counters.items() if name != "best")
        if not (usual and type(counters["best"]) is float and isinstance(before, dict) and isinstance(made_with, dict)):
            raise InputError(f"{path} is damaged: what it says is not what a checkpoint says")
        if made_with and (difference := first_difference(made_with, identity or {})):
            where, there, here = difference
            raise InputError(
                f"{path}: {where}: {there} in the checkpoint, {here} in the config; --overwrite starts the run anew"
            )
        wanted = like._named()
        for name, tensor in wanted.items():
            found = tensors.get(name)
            if found is None or found.shape != tensor.shape or found.dtype != tensor.dtype:
                raise InputError(f"{path}: {name} in the checkpoint is not of this run's shape {list(tensor.shape)}")
        now = _arithmetic(like.images, processes)
        before = {"tf32": False, "kernels": now["kernels"], **before}  # an older checkpoint does not say
        if before != now:
            log.warning("%s was written with %s, this is %s: results may differ by rounding", path, before, now)
        moved = {name: tensors[name].to(like.images.device) for name in wanted}
        variables, momentum = ([moved[f"{kind}{name}"] for name in cls._TENSORS] for kind in ("", "momentum_"))
        return cls(*variables, momentum, moved.get("average"), **counters)

    def _named(self) -> dict[str, Tensor]:
        """All tensors, as a checkpoint names them."""
        momentum = {f"momentum_{name}": buffer for name, buffer in zip(self._TENSORS, self.momentum)}
        average = {} if self.average is None else {"average": self.average}
        return dict(zip(self._TENSORS, self.variables)) | momentum | average


def first_difference(there: dict, here: dict) -> tuple[str, object, object] | None:
    """Where nested plain values first differ, and what each has there. What ``there`` does not name is not compared."""
    for key, theirs in there.items():
        ours = here.get(key, "nothing")
        if isinstance(theirs, dict) and isinstance(ours, dict):
            if inner := first_difference(theirs, ours):
                return f"{key} {inner[0]}", *inner[1:]
        elif theirs != ours:
            return key, theirs, ours
    return None


def _arithmetic(images: Tensor, processes: int) -> dict:
    """What the last bits of a result hang on."""
    device = images.device.type
    return {
        "torch": torch.__version__,
        "device": device,
        "threads": torch.get_num_threads(),
        "processes": processes,
        "tf32": device == "cuda" and torch.backends.cuda.matmul.allow_tf32,
        "kernels": device == "cpu" and kernels.library() is not None,
    }
