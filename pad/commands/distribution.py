"""``distill/DM.py``: distribution matching, assembled from its settings."""

from dataclasses import dataclass

from pad.commands.bench import Workbench
from pad.commands.distil import Task
from pad.commands.real import _hard_labelled, _real_batches, _RealMatching
from pad.config import setting
from pad.data.augment import DSA, NoAugmentation
from pad.matching.distribution import DistributionObjective, matched_blocks
from pad.nn.flat import FlatModel
from pad.nn.networks import Network


@dataclass(kw_only=True)
class DMSettings(_RealMatching):
    """``distill/DM.py``: match mean embeddings of real and synthetic images under random networks (DM, arXiv 2110.04181)."""

    Iteration: int = setting(20000, "outer iterations 0..Iteration, a random network each", low=0)
    lr_img: float | None = setting(
        None,
        "learning rate of the images; default: 1, and 10 for CIFAR10 at an ipc of 100 or more, as published",
        low=0,
    )
    depth_ratio: float | None = setting(
        None,
        "match the features of the deepest ceil((1 - depth_ratio) D) of D blocks; default: of the last, as published",
        low=0,
        below=1,
    )

    refused = (
        _RealMatching.refused
        | dict.fromkeys(("outer_loop", "inner_loop"), "it belongs to gradient matching, distill/DC.py")
        | {"micro_batch": "a class at a time is all that is computed on here"}
    )

    program = "dm"
    derivatives = 0  # of a network in its parameters

    def check(self) -> None:
        super().check()
        if self.lr_img is None:
            self.lr_img = 10.0 if self.dataset == "CIFAR10" and self.ipc >= 100 else 1.0

    def task(self, bench: Workbench, model: FlatModel, before: dict) -> Task:
        return distribution_task(self, bench, model, before)


def distribution_task(settings: DMSettings, bench: Workbench, model: FlatModel, before: dict) -> Task:
    """DM: match the mean features of real images."""
    real, made_from = _real_batches(settings, bench, model)

    def network(it: int) -> Network:
        return (
            bench.network(settings.model, settings.seed, "distribution matching", it)
            .to(bench.device)
            .requires_grad_(False)
        )

    objective = DistributionObjective(
        network,
        real,
        DSA(settings.dsa_strategy, siamese=True) if settings.dsa else NoAugmentation(),
        matched_blocks(settings.depth_ratio, len(network(0).body)),
        model.separable,
        settings.seed,
        bench.ranks,
    )
    return _hard_labelled(settings, bench, objective, made_from)
