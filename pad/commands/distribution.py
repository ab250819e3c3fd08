"""``distill/DM.py``, ``distill/TGDD.py``, ``distill/NCFM.py``: distribution matching, assembled from its settings.

python distill/DM.py --cfg configs/CIFAR-10/DM-IPC10.yaml
python distill/TGDD.py --cfg configs/CIFAR-10/TGDD-IPC10.yaml
python distill/NCFM.py --cfg configs/CIFAR-10/NCFM-IPC10.yaml
"""

import dataclasses
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from typing_extensions import Self

from pad.commands.bench import Workbench
from pad.commands.distil import Task
from pad.commands.following import Followed, Following, FromEpochs
from pad.commands.real import RealMatching
from pad.config import PACE, RECIPE, setting
from pad.errors import InputError
from pad.matching.characteristic import PER_SCALE, SamplingNetwork, ToCharacteristic
from pad.matching.distribution import DistributionObjective, matched_blocks
from pad.matching.snapshots import Mixtures, Stages, networks_at
from pad.nn.flat import FlatModel
from pad.nn.networks import AnyNetwork, refuse_without_features

log = logging.getLogger("pad")


@dataclass(frozen=True, kw_only=True)
class FeatureMatching(RealMatching):
    """What all ask that match features."""

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
    derivatives = 0  # of a network in its parameters

    def matching(
        self,
        bench: Workbench,
        model: FlatModel,
        network: Callable[[int], AnyNetwork],
        followed: Followed | None = None,
        **others,
    ) -> Task:
        """The task of matching features under ``network(it)``, which comes from the experts ``followed``, if any.

        ``others``: fields of the objective that are no settings.
        """
        plain = bench.network(self.model, self.seed)
        refuse_without_features(plain)
        blocks = matched_blocks(self.depth_ratio, 1 if self.depth_ratio is None else plain.depth)
        real, made_from = self.real_batches(bench, model)
        if followed:
            followed.store.refuse_other(bench.describe(self.model, model))
            made_from = {**followed.made_from, **made_from}
        objective = self.fill(
            DistributionObjective,
            network=network,
            real=real,
            augmentation=self.matching_augmentation,
            blocks=blocks,
            separable=model.separable,
            ranks=bench.ranks,
            **others,
        )
        task = self.hard_labelled(bench, objective, made_from)
        if not followed:
            return task
        provenance = {"buffer": followed.recipe, **task.provenance}
        return dataclasses.replace(task, provenance=provenance, recorded={"experts": followed.experts})


@dataclass(frozen=True, kw_only=True)
class DMSettings(FeatureMatching):
    """``distill/DM.py``: match mean embeddings of real and synthetic images under random networks (DM, 2110.04181)."""

    Iteration: int = setting(20000, "outer iterations 0..Iteration, a random network each", PACE, low=0)
    lr_img: float | None = setting(  # type: ignore[assignment]  # it is a number once resolved
        None,
        "learning rate of the images; default: 1, and 10 for CIFAR10 at an ipc of 100 or more, as published",
        RECIPE,
        low=0,
    )

    program = "dm"

    def resolved(self) -> Self:
        if self.lr_img is not None:
            return super().resolved()
        return dataclasses.replace(
            super().resolved(), lr_img=10.0 if self.dataset == "CIFAR10" and self.ipc >= 100 else 1.0
        )

    def task(self, bench: Workbench, model: FlatModel, before: dict) -> Task:
        """Match the mean features of real images."""

        def network(it: int) -> AnyNetwork:
            fresh = bench.network(self.model, self.seed, "distribution matching", it)
            return fresh.to(bench.device).requires_grad_(False)

        return self.matching(bench, model, network)


@dataclass(frozen=True, kw_only=True)
class TGDDSettings(FeatureMatching, FromEpochs):
    """``distill/TGDD.py``: match mean embeddings under snapshots of experts, classified by later ones (TGDD)."""

    Iteration: int = setting(10000, "outer iterations 0..Iteration, a snapshot each", PACE, low=0)
    lr_img: float | None = setting(  # type: ignore[assignment]  # it is a number once resolved
        None, "learning rate of the images; default: 0.01 ipc, as published", RECIPE, low=0
    )
    batch_real: int = setting(128, "real images of a class per step", RECIPE, low=1, memory=True)
    max_start_epoch: int | None = setting(  # type: ignore[assignment]  # the experts say what none is
        None, "snapshots are of epochs below this one; default: of all that experts have", RECIPE, low=1
    )
    Sequential_Generation: bool = setting(False, "widen the range of snapshots gradually", RECIPE)
    stage_epochs: int = setting(
        7, "the later snapshot is at most so many epochs, less one, older than the first", RECIPE, low=1
    )
    ce_weight: float = setting(1.0, "weight of the cross-entropy under the later snapshot; 0: none", RECIPE, low=0)

    refused = {key: why for key, why in FeatureMatching.refused.items() if key not in FromEpochs.fields()}
    program = "tgdd"

    def resolved(self) -> Self:
        if self.lr_img is not None:
            return super().resolved()
        return dataclasses.replace(super().resolved(), lr_img=0.01 * self.ipc)

    def task(self, bench: Workbench, model: FlatModel, before: dict) -> Task:
        """Match the mean features of real images. A resumed run follows the experts it began with."""
        followed = self.followed(bench, model, before)
        end = self.max_start_epoch or 1 + min(followed.store.epochs(k) for k in followed.experts)
        sampler = self.sampler(followed, max_start_epoch=end, expert_epochs=0)
        stages = self.fill(Stages, store=followed.store, sampler=sampler)
        first, later = (bench.network(self.model, self.seed).to(bench.device) for _ in range(2))
        return self.matching(
            bench,
            model,
            networks_at(stages.first, first),
            followed,
            classifier=networks_at(stages.later, later) if self.ce_weight else None,
        )


@dataclass(frozen=True, kw_only=True)
class NCFMSettings(FeatureMatching, Following):
    """``distill/NCFM.py``: match characteristic functions of features under mixed experts (NCFM, 2502.20653)."""

    Iteration: int = setting(20000, "outer iterations 0..Iteration, a mixed network each", PACE, low=0)
    lr_img: float = setting(0.001, "learning rate of the images", RECIPE, low=0)
    batch_real: int = setting(1024, "real images of a class per step", RECIPE, low=1, memory=True)
    frequencies: int = setting(4096, "frequencies at which the functions are compared", RECIPE, low=1, memory=True)
    amplitude: float = setting(0.5, "weight of the amplitudes; the phases have the rest", RECIPE, low=0, high=1)
    sampling_net: bool = setting(False, "frequencies by a network that learns against the set", RECIPE)
    lr_sampling: float = setting(0.001, "learning rate of that network", RECIPE, above=0)
    ce_weight: float = setting(1.0, "weight of the cross-entropy under the trained expert; 0: none", RECIPE, low=0)
    optimiser: str = setting("adamw", "how the images learn", RECIPE, choices=("adamw", "sgd"))
    decay_img: float = setting(0.0005, "weight decay of the images, with adamw", RECIPE, low=0)

    refused = {key: why for key, why in FeatureMatching.refused.items() if key not in Following.fields()}
    program = "ncfm"

    def check(self) -> None:
        super().check()
        if self.optimiser == "sgd" and "decay_img" in self.given:
            log.warning("decay_img does nothing: it is of optimiser: adamw")
        if self.sampling_net and (scales := math.ceil(self.frequencies / PER_SCALE)) < 3:
            raise InputError(
                f"frequencies: {self.frequencies} give sampling_net {scales} scales, of which it can learn nothing; "
                f"it needs 3, which {2 * PER_SCALE + 1} give"
            )
        if self.sampling_net and self.depth_ratio is not None:
            raise InputError("sampling_net makes frequencies for the last block alone; leave depth_ratio out")

    def task(self, bench: Workbench, model: FlatModel, before: dict) -> Task:
        """Match the features of real images. A resumed run follows the experts it began with."""
        followed = self.followed(bench, model, before, lines=True)
        mixtures = self.fill(Mixtures, store=followed.store, experts=followed.experts)
        mixed, trained = (bench.network(self.model, self.seed).to(bench.device) for _ in range(2))
        sampling = None
        if self.sampling_net:
            like = torch.empty(0, device=bench.device)
            sampling = SamplingNetwork(mixed.classifier.in_features, self.lr_sampling, self.seed, like)
        task = self.matching(
            bench,
            model,
            networks_at(mixtures.mixed, mixed),
            followed,
            classifier=networks_at(mixtures.trained, trained) if self.ce_weight else None,
            distance_to=self.fill(ToCharacteristic, sampling=sampling),
            opponent=sampling,
        )
        return dataclasses.replace(task, adamw=self.decay_img if self.optimiser == "adamw" else None)
