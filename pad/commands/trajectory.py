"""``distill/PAD.py``: trajectory matching (MTT, FTD, DATM, TESLA, MCT, PAD), assembled from its settings.

python distill/PAD.py --cfg configs/CIFAR-10/ConvIN/IPC10.yaml
"""

import dataclasses
import logging
import math
from dataclasses import dataclass

from typing_extensions import Self

from pad.commands.bench import Workbench, experts_at, refuse_no_epoch
from pad.commands.distil import OfDepth, Task, first_set
from pad.commands.following import FromEpochs
from pad.config import DATA, DETAIL, RECIPE, REPORT, FilePath, NetworkName, setting
from pad.data.augment import NoAugmentation
from pad.errors import InputError
from pad.initialisation import INITIAL_IMAGES, refuse_small_classes
from pad.matching.trajectory import TrajectoryObjective
from pad.nn.flat import FlatModel
from pad.nn.replay import replay_on

log = logging.getLogger("pad")

# The systems that trajectory matching here can be, and what makes them: PAD, the default, leaves everything open
SYSTEMS: dict[str, dict] = {
    "MTT": {"labels": "hard", "gradient": "exact", "convexified": False},
    "FTD": {"labels": "hard", "gradient": "exact", "convexified": False},
    "DATM": {"labels": "soft", "gradient": "exact", "convexified": False},
    "TESLA": {"gradient": "truncated", "convexified": False},
    "MCT": {"convexified": True},
    "PAD": {},
}


@dataclass(frozen=True, kw_only=True)
class DistillSettings(OfDepth, FromEpochs):
    """Stage 2, ``distill/PAD.py``: optimise synthetic images, soft labels and a learning rate along experts.

    MTT, FTD, DATM, TESLA, MCT and PAD are settings of it (configs/CIFAR-10).
    """

    method: str = setting(
        "PAD", "whose settings these are: refuses another's; ema_decay is FTD's alone", RECIPE, choices=tuple(SYSTEMS)
    )
    zca: bool = setting(True, "ZCA whitening instead of mean/std", DATA)

    syn_steps: int = setting(80, "inner steps on the synthetic set per outer iteration", RECIPE, low=1)
    expert_epochs: int = setting(2, "epochs of the expert to match", RECIPE, low=1)
    batch_syn: int | None = setting(
        256, "synthetic images per inner step; none: the whole set", RECIPE, low=1, memory=True
    )
    convexified: bool = setting(
        False, "MCT: experts on straight lines, and start epochs that are real numbers", RECIPE, later=True
    )
    loss_ratio: float = setting(0.0, "share of parameters of the smallest error to leave out", RECIPE, low=0, below=1)
    threshold: float | None = setting(
        1.0, "iterations with a larger loss change nothing; none: all do", RECIPE, above=0
    )
    gradient: str = setting(
        "exact",
        "through all inner steps, or TESLA's: each step's own share alone",
        RECIPE,
        choices=("exact", "truncated"),
    )
    layer_losses: bool = setting(
        False, "record and draw what each layer of the network adds to the loss", REPORT, later=True
    )
    no_aug: bool = setting(False, "no augmentation while matching", RECIPE)
    micro_batch: int | None = setting(
        None, "compute on so many images at a time: less memory, same result", DETAIL, low=1, memory=True
    )

    labels: str = setting("soft", "soft: learned; hard: one-hot, and so they stay", RECIPE, choices=("soft", "hard"))
    lr_y: float = setting(2.0, "learning rate of the labels", RECIPE, low=0)
    Momentum_y: float = setting(0.9, "momentum of the labels", RECIPE, low=0, below=1)
    lr_teacher: float = setting(0.01, "initial value of the learned learning rate", RECIPE, above=0)
    lr_lr: float = setting(1e-5, "learning rate of the learning rate", RECIPE, low=0)
    ema_decay: float = setting(
        0.0, "FTD: decay per update of the images' moving average, which is the set", RECIPE, low=0, below=1
    )

    pix_init: FilePath = setting(
        "samples_predicted_correctly", "initial images; or the path of a set", RECIPE, choices=INITIAL_IMAGES
    )
    noise_logit: float = setting(10.0, "pix_init noise: logit of the class in the labels (others 0)", RECIPE, above=0)
    Initialize_Label_With_Another_Model: bool = setting(False, "labels by other experts", RECIPE)
    Initialize_Label_Model: NetworkName = setting("", "that other network", RECIPE)
    Label_Model_Timestamp: int = setting(-1, "epoch of the experts that choose and label images; -1: the last", RECIPE)

    dead = {
        "batch_real": "nothing reads it",
        "lr_init": "lr_teacher is the initial learning rate",
        "load_all": "trajectories are read two rows at a time, whatever their number",
        "texture": "texture distillation is not part of PAD",
        "canvas_size": "texture distillation is not part of PAD",
        "canvas_samples": "texture distillation is not part of PAD",
        "force_save": "pictures are saved at every ipc",
        "record_loss": "the loss is always recorded",
        "init_frozen": "nothing reads it",
        "parall_eva": "torchrun deals evaluation networks to several devices",
        "Initialize_Label_Model_Dir": "that network's trajectories are looked for under buffer_path",
    }
    refused = {
        **dict.fromkeys(
            ("drop_easy", "drop_hard"), "real images are left out where experts are trained, buffer/buffer_CL.py"
        ),
        **dict.fromkeys(("outer_loop", "inner_loop", "lr_net"), "it belongs to gradient matching, distill/DC.py"),
    }

    def resolved(self) -> Self:
        if not self.ema_decay or self.method == "FTD":
            return super().resolved()
        # published files of the others carry the key, which nothing reads there
        log.warning("ema_decay does nothing: %s keeps no moving average of the images; method: FTD does", self.method)
        return dataclasses.replace(super().resolved(), ema_decay=0.0, given=self.given - {"ema_decay"})

    def check(self) -> None:
        super().check()
        if self.Initialize_Label_With_Another_Model and not self.Initialize_Label_Model:
            raise InputError("Initialize_Label_With_Another_Model is set, but Initialize_Label_Model names no network")
        for key, value in SYSTEMS[self.method].items():
            if getattr(self, key) != value:
                other = f"{key}: {getattr(self, key)}"
                raise InputError(f"{other} is not {self.method}, which has {key}: {value} (method: PAD has any)")
        if self.method == "FTD" and not self.ema_decay:
            log.warning("ema_decay is 0: FTD's moving average of the images is not kept")
        if self.depth_ratio and self.loss_ratio:
            log.warning(
                "depth_ratio and loss_ratio are both set: parameters count that pass both filters "
                "(set loss_ratio: 0 for the paper's filter by depth alone)"
            )

    @property
    def derivatives(self) -> int:
        return self.Iteration * self.syn_steps

    def refuse_short(self, epochs: int) -> None:
        super().refuse_short(epochs)
        if not self.Initialize_Label_With_Another_Model:
            refuse_no_epoch(self.Label_Model_Timestamp, epochs, "an expert of its buffer")

    def task(self, bench: Workbench, model: FlatModel, before: dict) -> Task:
        """Follow experts. A resumed run follows those it began with."""
        depth = self.matched_span(model)
        if self.pix_init in ("samples_predicted_correctly", "real"):
            refuse_small_classes(bench.labels, bench.data.num_classes, self.ipc, self.factor)
        followed = self.followed(bench, model, before, lines=self.convexified)
        store, experts = followed.store, followed.experts
        sampler = self.sampler(followed)
        if self.Initialize_Label_With_Another_Model:
            labellers = bench.labellers(self.buffer_path, self.Initialize_Label_Model, self.Label_Model_Timestamp)
        else:
            labellers = experts_at(store, model, experts, self.Label_Model_Timestamp, bench.device)
        store.refuse_other(bench.describe(self.model, model))
        images, labels, begun_with = first_set(
            self, bench, self.pix_init, labellers, noise_logit=self.noise_logit, hard=self.labels == "hard"
        )
        batch_syn = min(self.batch_syn or len(labels), len(labels))  # of decoded images, as labels are
        if (self.batch_syn or 0) > len(labels):
            log.info(
                "batch_syn: %d is more than the %d synthetic images; each step takes all", self.batch_syn, batch_syn
            )
        if bench.ranks.size > 1 and not model.separable:
            log.info("%s needs whole batches, so that one process does the matching; evaluation is shared", self.model)

        objective = self.fill(
            TrajectoryObjective,
            model=model,
            store=store,
            sampler=sampler,
            augmentation=NoAugmentation() if self.no_aug else self.augmentation(),
            batch_syn=batch_syn,
            ranks=bench.ranks,
            truncated=self.gradient == "truncated",
            depth=depth,
            replay=replay_on(bench.device),
        )
        made_from = {**followed.made_from, **begun_with}
        return Task(
            objective=objective,
            images=images,
            labels=labels,
            lr=self.lr_teacher,
            rates=[self.lr_img, self.lr_y, self.lr_lr],
            made_from=made_from,
            provenance={"buffer": followed.recipe, **begun_with},
            momentum_y=self.Momentum_y,
            threshold=math.inf if self.threshold is None else self.threshold,
            ema_decay=self.ema_decay,
            recorded={"experts": experts},
        )
