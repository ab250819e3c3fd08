"""What gradient and distribution matching ask and assemble alike: real batches of a class, one-hot labels."""

import logging
from dataclasses import dataclass

from pad.commands.bench import Workbench, _initial_set, digest_of_rows, rankings_folder
from pad.commands.common import _Ranked
from pad.commands.distil import Distilling, Task
from pad.config import setting
from pad.errors import InputError
from pad.matching.objective import Objective
from pad.matching.real import RealBatches, without_ends
from pad.nn.flat import FlatModel
from pad.shares import exact_share

log = logging.getLogger("pad")


@dataclass(kw_only=True)
class _RealMatching(Distilling, _Ranked):
    """What matching of gradients and of distributions asks: labels are one-hot, real images come in batches of a class."""

    dsa: bool = setting(True, "the same random augmentation of real and synthetic images (DSA), and in training")
    siamese: bool = setting(
        False, "all images of a batch share DSA's random numbers in training, as always in matching"
    )
    batch_real: int = setting(256, "real images of a class per step", low=1)
    sort_method: str = setting("", "difficulty method, or a ranking file's stem as CIFAR10_GraNd; default: GraNd")
    drop_easy: float = setting(0.0, "share of each class, easiest first, that real batches leave out", low=0, below=1)
    drop_hard: float = setting(0.0, "share of each class, hardest first, that real batches leave out", low=0, below=1)
    pix_init: str = setting("real", "initial images", choices=("real", "noise"))
    lr_net: float = setting(0.01, "learning rate of networks trained on the synthetic set", above=0)
    epoch_eval_train: int = setting(1000, "epochs to train an evaluation network", low=1)

    refused = (
        dict.fromkeys(
            (
                "buffer_path",
                "syn_steps",
                "expert_epochs",
                "batch_syn",
                "min_start_epoch",
                "max_start_epoch",
                "loss_ratio",
                "Sequential_Generation",
                "current_max_start_epoch",
                "expansion_end_epoch",
                "threshold",
                "gradient",
                "lr_teacher",
            ),
            "it belongs to trajectory matching, distill/PAD.py",
        )
        | dict.fromkeys(("labels", "lr_y", "Momentum_y"), "labels are one-hot here, and not learned")
        | {
            "lr_lr": "the learning rate is not learned here; lr_net is what evaluation trains with",
            "ema_decay": "no moving average of the images is kept here; FTD does that, distill/PAD.py --method FTD",
        }
    )

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


def _hard_labelled(settings: _RealMatching, bench: Workbench, objective: Objective, made_from: dict) -> Task:
    images, labels = _initial_set(settings, bench, hard=True)
    provenance = {key: value for key, value in made_from.items() if key == "ranking"}
    return Task(objective, images, labels, settings.lr_net, [settings.lr_img, 0.0, 0.0], made_from, provenance)


def _real_batches(settings: _RealMatching, bench: Workbench, model: FlatModel) -> tuple[RealBatches, dict]:
    """The real batches, filtered by difficulty where that is asked for, and what they come from."""
    rows = [(bench.data.train_labels == c).nonzero().flatten() for c in range(bench.data.num_classes)]
    without_ends(
        rows, settings.drop_easy, settings.drop_hard
    )  # refuses shares that leave nothing, before there is a ranking
    made_from = {key: value for key, value in bench.describe(settings.model, model).items() if key != "parameters"}
    if settings.needs_ranking:
        method, folder = settings.sort_method, rankings_folder(settings, settings.ranking_path)
        rows = bench.rankings([method], folder, settings, convert_flat=settings.convert_flat)[method].rows
        made_from["ranking"] = digest_of_rows(rows)
    rows = without_ends(rows, settings.drop_easy, settings.drop_hard)
    return RealBatches(bench.images, rows, settings.batch_real), made_from
