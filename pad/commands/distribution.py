"""``distill/DM.py``: distribution matching (DM), assembled from its settings.

python distill/DM.py --cfg configs/CIFAR-10/DM-IPC10.yaml
"""

import dataclasses
from dataclasses import dataclass

from typing_extensions import Self

from pad.commands.bench import Workbench
from pad.commands.distil import Task
from pad.commands.real import RealMatching
from pad.config import PACE, RECIPE, setting
from pad.matching.distribution import DistributionObjective, matched_blocks
from pad.nn.flat import FlatModel
from pad.nn.networks import AnyNetwork, refuse_without_features


@dataclass(frozen=True, kw_only=True)
class DMSettings(RealMatching):
    """``distill/DM.py``: match mean embeddings of real and synthetic images under random networks (DM, 2110.04181)."""

    Iteration: int = setting(20000, "outer iterations 0..Iteration, a random network each", PACE, low=0)
    lr_img: float | None = setting(  # type: ignore[assignment]  # it is a number once resolved
        None,
        "learning rate of the images; default: 1, and 10 for CIFAR10 at an ipc of 100 or more, as published",
        RECIPE,
        low=0,
    )
    depth_ratio: float | None = setting(
        None,
        "match the deepest ceil((1 - depth_ratio) D) of D blocks; default: the last, as published",
        RECIPE,
        low=0,
        below=1,
    )

    refused = {
        **RealMatching.refused,
        **dict.fromkeys(("outer_loop", "inner_loop"), "it belongs to gradient matching, distill/DC.py"),
        **dict.fromkeys(("match_from", "match_to"), "whole blocks are matched here: depth_ratio says how many"),
        "micro_batch": "a class at a time is all that is computed on here",
    }
    program = "dm"
    derivatives = 0  # of a network in its parameters

    def resolved(self) -> Self:
        if self.lr_img is not None:
            return super().resolved()
        return dataclasses.replace(
            super().resolved(), lr_img=10.0 if self.dataset == "CIFAR10" and self.ipc >= 100 else 1.0
        )

    def task(self, bench: Workbench, model: FlatModel, before: dict) -> Task:
        """Match the mean features of real images."""
        plain = bench.network(self.model, self.seed)
        refuse_without_features(plain)
        blocks = matched_blocks(self.depth_ratio, 1 if self.depth_ratio is None else plain.depth)
        real, made_from = self.real_batches(bench, model)

        def network(it: int) -> AnyNetwork:
            fresh = bench.network(self.model, self.seed, "distribution matching", it)
            return fresh.to(bench.device).requires_grad_(False)

        objective = self.fill(
            DistributionObjective,
            network=network,
            real=real,
            augmentation=self.matching_augmentation,
            blocks=blocks,
            separable=model.separable,
            ranks=bench.ranks,
        )
        return self.hard_labelled(bench, objective, made_from)
