"""What gradient and distribution matching ask and assemble alike: real batches of a class, one-hot labels."""

import dataclasses
import logging
from dataclasses import dataclass

from typing_extensions import Self

from pad.commands.bench import Workbench
from pad.commands.common import Ranked
from pad.commands.distil import Distilling, Task, first_set
from pad.config import RECIPE, FilePath, setting
from pad.data.augment import DSA, Augmentation, NoAugmentation
from pad.errors import InputError
from pad.initialisation import refuse_small_classes
from pad.matching.objective import Objective
from pad.matching.real import RealBatches, without_ends
from pad.nn.flat import FlatModel
from pad.shares import exact_share

log = logging.getLogger("pad")


@dataclass(frozen=True, kw_only=True)
class RealMatching(Distilling, Ranked):
    """What both ask: labels are one-hot, real images come in batches of a class."""

    dsa: bool = setting(True, "DSA: one augmentation for real and synthetic images; also in training", RECIPE)
    siamese: bool = setting(False, "images of a batch share DSA's numbers in training, as always in matching", RECIPE)
    batch_real: int = setting(256, "real images of a class per step", RECIPE, low=1, memory=True)
    sort_method: str = setting("", "difficulty method, or file's stem as CIFAR10_GraNd; default: GraNd", RECIPE)
    drop_easy: float = setting(0.0, "share of each class, easiest first, to leave out", RECIPE, low=0, below=1)
    drop_hard: float = setting(0.0, "share of each class, hardest first, to leave out", RECIPE, low=0, below=1)
    pix_init: FilePath = setting("real", "initial images; or the path of a set", RECIPE, choices=("real", "noise"))
    lr_net: float = setting(0.01, "learning rate of networks trained on the synthetic set", RECIPE, above=0)

    refused = {
        **dict.fromkeys(
            "buffer_path syn_steps expert_epochs batch_syn min_start_epoch max_start_epoch loss_ratio threshold "
            "gradient Sequential_Generation current_max_start_epoch expansion_end_epoch lr_teacher".split(),
            "it belongs to trajectory matching, distill/PAD.py",
        ),
        **dict.fromkeys(("labels", "lr_y", "Momentum_y"), "labels are one-hot here, and not learned"),
        "lr_lr": "the learning rate is not learned here; lr_net is what evaluation trains with",
        "ema_decay": "no moving average of the images is kept here; FTD does that, distill/PAD.py --method FTD",
    }

    def check(self) -> None:
        super().check()
        if exact_share(self.drop_easy) + exact_share(self.drop_hard) >= 1:
            raise InputError(f"drop_easy: {self.drop_easy:g} and drop_hard: {self.drop_hard:g} leave no real images")
        if self.sort_method and not self.needs_ranking:
            log.warning("sort_method does nothing: drop_easy and drop_hard are 0")

    @property
    def needs_ranking(self) -> bool:
        """Whether real batches leave images out."""
        return self.drop_easy + self.drop_hard > 0

    def settled(self, bench: Workbench) -> Self:
        if not self.needs_ranking:
            return self
        return dataclasses.replace(self, sort_method=bench.ranking_stems(self, [self.sort_method or "GraNd"])[0])

    @property
    def matching_augmentation(self) -> Augmentation:
        """One draw for the real and the synthetic images of a class."""
        return DSA(self.dsa_strategy, siamese=True) if self.dsa else NoAugmentation()

    def real_batches(self, bench: Workbench, model: FlatModel) -> tuple[RealBatches, dict]:
        """The real batches, filtered by difficulty where that is asked for, and what they come from."""
        if self.pix_init == "real":
            refuse_small_classes(bench.labels, bench.data.num_classes, self.ipc, self.factor)
        rows = bench.classes
        kept = without_ends(rows, self.drop_easy, self.drop_hard)  # what it refuses needs no ranking
        made_from = {key: value for key, value in bench.describe(self.model, model).items() if key != "parameters"}
        if self.needs_ranking:
            ranking = bench.rankings(self, [self.sort_method], convert_flat=self.convert_flat)[self.sort_method]
            kept = without_ends(ranking.rows, self.drop_easy, self.drop_hard)
            made_from["ranking"] = ranking.digest
        return RealBatches(images=bench.images, rows=kept, size=self.batch_real), made_from

    def hard_labelled(self, bench: Workbench, objective: Objective, made_from: dict) -> Task:
        """The task of matching by ``objective``, from real images or noise with one-hot labels on."""
        images, labels, begun_with = first_set(self, bench, self.pix_init, hard=True)
        made_from = {**made_from, **begun_with}
        return Task(
            objective=objective,
            images=images,
            labels=labels,
            lr=self.lr_net,
            rates=[self.lr_img, 0.0, 0.0],
            made_from=made_from,
            provenance={key: value for key, value in made_from.items() if key in ("ranking", "start")},
        )
