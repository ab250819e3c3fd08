"""``distill/DC.py``: gradient matching (DC, DSA), assembled from its settings.

python distill/DC.py --cfg configs/CIFAR-10/DC-IPC10.yaml
"""

from dataclasses import dataclass

from torch import Tensor

from pad.commands.bench import Workbench
from pad.commands.distil import OfDepth, Task
from pad.commands.real import RealMatching
from pad.config import DETAIL, PACE, RECIPE, setting
from pad.errors import InputError
from pad.matching.gradient import GradientObjective
from pad.nn.flat import FlatModel

_LOOPS = {1: (1, 1), 10: (10, 50), 20: (20, 25), 30: (30, 20), 40: (40, 15), 50: (50, 10)}  # by ipc, as published


@dataclass(frozen=True, kw_only=True)
class DCSettings(RealMatching, OfDepth):
    """``distill/DC.py``: match gradients of real and synthetic images (DC, 2006.05929; with dsa DSA, 2102.08259)."""

    # A part of the recipe: matching trains networks, too.
    batch_train: int = setting(256, "batch size for training networks", RECIPE, low=1, memory=True)
    Iteration: int = setting(1000, "outer iterations 0..Iteration, a fresh network each", PACE, low=0)
    lr_img: float = setting(0.1, "learning rate of the images", RECIPE, low=0)
    pix_init: str = setting("noise", "initial images", RECIPE, choices=("real", "noise"))
    outer_loop: int | None = setting(None, "image steps per iteration; default: the published, by ipc", RECIPE, low=1)
    inner_loop: int | None = setting(None, "epochs of training between; default: published, by ipc", RECIPE, low=0)
    micro_batch: int | None = setting(
        None, "compute on so many images at a time: less memory, same result", DETAIL, low=1, memory=True
    )

    program = "dc"

    def check(self) -> None:
        super().check()
        if None in (self.outer_loop, self.inner_loop) and self.ipc not in _LOOPS:
            raise InputError(
                f"ipc: {self.ipc} has no published outer_loop and inner_loop "
                f"(only {', '.join(map(str, _LOOPS))} have); give both"
            )

    @property
    def loops(self) -> tuple[int, int]:
        """Image steps per iteration, and epochs of training between them."""
        outer, inner = _LOOPS.get(self.ipc, (0, 0))
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
        match_from, match_to = self.matched_span(model)
        real, made_from = self.real_batches(bench, model)
        outer, inner = self.loops

        def start(it: int) -> Tensor:
            return model.flatten(bench.network(self.model, self.seed, "gradient matching", it)).to(bench.device)

        objective = self.fill(
            GradientObjective,
            model=model,
            start=start,
            real=real,
            augmentation=self.matching_augmentation,
            training=self.augmentation(),
            outer=outer,
            inner=inner,
            match_from=match_from,
            match_to=match_to,
            ranks=bench.ranks,
            real_model=bench.flat_model(self.model, self.compile, self.micro_batch),
        )
        return self.hard_labelled(bench, objective, made_from)
