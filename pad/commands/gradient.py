"""``distill/DC.py``: gradient matching, assembled from its settings."""

from dataclasses import dataclass

from torch import Tensor

from pad.commands.bench import Workbench
from pad.commands.distil import Task
from pad.commands.real import _hard_labelled, _real_batches, _RealMatching
from pad.config import setting
from pad.data.augment import DSA, NoAugmentation
from pad.errors import InputError
from pad.matching.gradient import GradientObjective
from pad.nn.flat import FlatModel

_LOOPS = {1: (1, 1), 10: (10, 50), 20: (20, 25), 30: (30, 20), 40: (40, 15), 50: (50, 10)}  # by ipc, as published


@dataclass(kw_only=True)
class DCSettings(_RealMatching):
    """``distill/DC.py``: match gradients of real and synthetic images (DC, arXiv 2006.05929); with dsa, DSA (2102.08259)."""

    Iteration: int = setting(1000, "outer iterations 0..Iteration, a fresh network each", low=0)
    lr_img: float = setting(0.1, "learning rate of the images", low=0)
    pix_init: str = setting("noise", "initial images", choices=("real", "noise"))
    depth_ratio: float = setting(0.0, "share of parameters, shallow to deep, that matching leaves out", low=0, below=1)
    outer_loop: int | None = setting(None, "image steps per iteration; default: the published, by ipc", low=1)
    inner_loop: int | None = setting(None, "epochs of training between them; default: the published, by ipc", low=0)
    micro_batch: int | None = setting(None, "compute on so many images at a time: less memory, the same result", low=1)

    program = "dc"
    matches_by = frozenset({"batch_train"})

    def check(self) -> None:
        super().check()
        if None in (self.outer_loop, self.inner_loop) and self.ipc not in _LOOPS:
            raise InputError(
                f"ipc: {self.ipc} has no published outer_loop and inner_loop (only {', '.join(map(str, _LOOPS))} have); "
                "give both"
            )

    @property
    def loops(self) -> tuple[int, int]:
        """Image steps per iteration, and epochs of training between them."""
        outer, inner = _LOOPS.get(self.ipc, (None, None))
        return (
            outer if self.outer_loop is None else self.outer_loop,
            inner if self.inner_loop is None else self.inner_loop,
        )

    @property
    def derivatives(self) -> int:
        """About how many derivatives of the network a run takes, at ten classes."""
        outer, inner = self.loops
        return self.Iteration * outer * (3 * 10 + inner)

    def task(self, bench: Workbench, model: FlatModel, before: dict) -> Task:
        return gradient_task(self, bench, model, before)


def gradient_task(settings: DCSettings, bench: Workbench, model: FlatModel, before: dict) -> Task:
    """DC, DSA: match the gradients of real images."""
    real, made_from = _real_batches(settings, bench, model)
    outer, inner = settings.loops

    def start(it: int) -> Tensor:
        return model.flatten(bench.network(settings.model, settings.seed, "gradient matching", it)).to(bench.device)

    objective = GradientObjective(
        model,
        start,
        real,
        DSA(settings.dsa_strategy, siamese=True) if settings.dsa else NoAugmentation(),
        DSA(settings.dsa_strategy, settings.siamese) if settings.dsa else NoAugmentation(),
        outer,
        inner,
        settings.lr_net,
        settings.batch_train,
        settings.depth_ratio,
        settings.seed,
        bench.ranks,
        bench.flat_model(settings.model, settings.compile, settings.micro_batch),
    )
    return _hard_labelled(settings, bench, objective, made_from)
