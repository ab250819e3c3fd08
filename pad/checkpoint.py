"""Everything that an outer iteration changes, and the file that keeps it."""

import logging
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pad.errors import InputError
from pad.nn import kernels
from pad.nn.adamw import adamw_
from pad.store.identity import refuse_difference
from pad.store.tensors import load_tensors, save_tensors

log = logging.getLogger("pad")

KIND = "checkpoint"
FORMAT = 1

SMALLEST_LR = 1e-6  # the learned learning rate is kept above it: training with a negative one is of no use


@dataclass
class State:
    """Everything that an outer iteration changes.

    momentum: that of images, labels and learning rate; zeros where it is not given. average: the exponential moving
    average of the images (FTD, arXiv 2211.11004), where one is kept. squares: AdamW's mean squared gradient of the
    images (arXiv 1711.05101), where they learn by it, in one step an iteration. memory: the objective's. iteration: the
    next one.
    """

    images: Tensor
    labels: Tensor
    lr: Tensor
    _: KW_ONLY
    momentum: list[Tensor] = field(default_factory=list)
    average: Tensor | None = None
    squares: Tensor | None = None
    memory: dict[str, Tensor] = field(default_factory=dict)
    iteration: int = 0
    best: float = -1.0
    skipped: int = 0
    bad_in_a_row: int = 0

    def __post_init__(self):
        self.momentum = self.momentum or [torch.zeros_like(variable) for variable in self.variables]

    @property
    def variables(self) -> list[Tensor]:
        return [self.images, self.labels, self.lr]

    @property
    def counters(self) -> dict[str, int | float]:
        """All that is no tensor."""
        return {name: getattr(self, name) for name in ("iteration", "best", "skipped", "bad_in_a_row")}

    def step(
        self,
        gradients: list[Tensor],
        rates: list[float],
        momenta: list[float],
        ema_decay: float = 0.0,
        adamw: float | None = None,
    ) -> None:
        """One SGD step with momentum on images, labels and learning rate.

        The average follows with ``ema_decay``, where one is kept. ``adamw``: of the images by AdamW instead, with this
        weight decay.
        """
        for variable, buffer, gradient, rate, momentum in zip(
            self.variables, self.momentum, gradients, rates, momenta, strict=True
        ):
            if variable is self.images and adamw is not None:
                assert self.squares is not None
                updates = self.iteration - self.skipped + 1
                adamw_(variable, buffer, self.squares, gradient, updates=updates, rate=rate, decay=adamw)
                continue
            buffer.mul_(momentum).add_(gradient)
            variable.sub_(buffer, alpha=rate)
        self.lr.clamp_(min=SMALLEST_LR)
        if self.average is not None:
            self.average.mul_(ema_decay).add_(self.images, alpha=1 - ema_decay)

    def save(self, path: Path, *, processes: int = 1, identity: dict | None = None) -> None:
        """Write a checkpoint, atomically.

        processes: how many share the matching. identity: nested plain values that say what the run is of.
        """
        metadata = {"kind": KIND, "format": FORMAT, "arithmetic": _arithmetic(self.images, processes)}
        save_tensors(path, self._named(), metadata | self.counters | {"identity": identity or {}})

    @classmethod
    def load(cls, path: Path, like: "State", *, processes: int = 1, identity: dict | None = None) -> "State":
        """Read a checkpoint of the same shapes as ``like``, onto its device. Raises InputError on anything else.

        Where the identity in the checkpoint is another than ``identity``, the first difference is named. Logs one line
        when it was written where sums may round otherwise: the end may then differ in the last bits.
        """
        remedy = "remove it, and --resume starts the run anew"
        tensors, metadata = load_tensors(path, kind=KIND, format=FORMAT, remedy=remedy)
        counters: dict[str, Any] = {name: metadata.get(name) for name in like.counters}
        before, made_with = metadata.get("arithmetic"), metadata.get("identity", {})
        usual = all(type(value) is int and value >= 0 for name, value in counters.items() if name != "best")
        if not (usual and type(counters["best"]) is float and isinstance(before, dict) and isinstance(made_with, dict)):
            raise InputError(f"{path} is damaged: what it says is not what a checkpoint says")
        refuse_difference(
            path, made_with, identity or {}, there_is="the checkpoint", remedy="--overwrite starts the run anew"
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
        state = cls(moved["images"], moved["labels"], moved["lr"], **counters)
        state.average, state.squares = moved.get("average"), moved.get("squares")
        state.memory = {name: moved[f"memory_{name}"] for name in like.memory}
        state.momentum = [moved[f"momentum_{name}"] for name in ("images", "labels", "lr")]
        return state

    def _named(self) -> dict[str, Tensor]:
        """All tensors, as a checkpoint names them."""
        variables = {"images": self.images, "labels": self.labels, "lr": self.lr}
        momentum = {f"momentum_{name}": buffer for name, buffer in zip(variables, self.momentum)}
        kept = {"average": self.average, "squares": self.squares}
        kept |= {f"memory_{name}": tensor for name, tensor in self.memory.items()}
        return variables | momentum | {name: tensor for name, tensor in kept.items() if tensor is not None}


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
