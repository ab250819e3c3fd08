"""``distill/DC.py``: gradient matching (DC, DSA), assembled from its settings.

python distill/DC.py --cfg configs/CIFAR-10/DC-IPC10.yaml
"""

import logging
from dataclasses import dataclass

from torch import Tensor

from pad.commands.bench import Workbench
from pad.commands.distil import OfDepth, Task
from pad.commands.real import RealMatching
from pad.config import DETAIL, PACE, RECIPE, FilePath, setting
from pad.data.placement import to_device
from pad.matching.gradient import GradientObjective
from pad.nn.flat import FlatModel

log = logging.getLogger("pad")

_LOOPS = {1: (1, 1), 10: (10, 50), 20: (20, 25), 30: (30, 20), 40: (40, 15), 50: (50, 10)}  # by ipc, as published


@dataclass(frozen=True, kw_only=True)
class DCSettings(RealMatching, OfDepth):
    """``distill/DC.py``: match gradients of real and synthetic images (DC, 2006.05929; with dsa DSA, 2102.08259)."""

    # A part of the recipe: matching trains networks, too.
    batch_train: int = setting(256, "batch size for training networks", RECIPE, low=1, memory=True)
    Iteration: int = setting(1000, "outer iterations 0..Iteration, a fresh network each", PACE, low=0)
    lr_img: float = setting(0.1, "learning rate of the images", RECIPE, low=0)
    pix_init: FilePath = setting("noise", "initial images; or the path of a set", RECIPE, choices=("real", "noise"))
    outer_loop: int | None = setting(
        None, "image steps per iteration; default: by ipc, as published for 1, 10, 20, 30, 40 and 50", RECIPE, low=1
    )
    inner_loop: int | None = setting(None, "epochs of training between; default: by ipc, as outer_loop", RECIPE, low=0)
    micro_batch: int | None = setting(
        None, "compute on so many images at a time: less memory, same result", DETAIL, low=1, memory=True
    )

    program = "dc"

    def check(self) -> None:
        super().check()
        if None in (self.outer_loop, self.inner_loop) and self.ipc not in _LOOPS:
            # DC's author says of 100 to 1000 images: take the better of (50, 10) and (20, 25), with pix_init real.
            log.warning(
                "ipc: %d has no published outer_loop and inner_loop; %d and %d are taken, by the next ipc that has",
                *(self.ipc, *self.loops),
            )

    @property
    def loops(self) -> tuple[int, int]:
        """Image steps per iteration, and epochs of training between them.

        Where they are not given: the published of the next larger ipc that has some, of the largest beyond it.
        """
        outer, inner = _LOOPS[next((ipc for ipc in _LOOPS if ipc >= self.ipc), max(_LOOPS))]
        return (
            outer if self.outer_loop is None else self.outer_loop,
            inner if self.inner_loop is None else self.inner_loop,
        )

    @property
    def derivatives(self) -> int:
        outer, inner = self.loops
        return self.Iteration * outer * (3 * 10 + inner)  # at ten classes

    def task(self, bench: Workbench, model: FlatModel, before: dict) -> Task:
        """Match the gradients of real images."""
        depth = self.matched_span(model)
        real, made_from = self.real_batches(bench, model)
        outer, inner = self.loops

        def start(it: int) -> Tensor:
            return to_device(model.flatten(bench.network(self.model, self.seed, "gradient matching", it)), bench.device)

        objective = self.fill(
            GradientObjective,
            model=model,
            start=start,
            real=real,
            augmentation=self.matching_augmentation,
            training=self.augmentation(),
            outer=outer,
            inner=inner,
            depth=depth,
            ranks=bench.ranks,
            real_model=bench.flat_model(self.model, self.compile, self.micro_batch),
        )
        return self.hard_labelled(bench, objective, made_from)
