"""``distill/PAD.py``: trajectory matching (MTT, FTD, DATM, TESLA, MCT, PAD), assembled from its settings.

python distill/PAD.py --cfg configs/CIFAR-10/ConvIN/IPC10.yaml
"""

import dataclasses
import logging
import math
from dataclasses import dataclass

from typing_extensions import Self

from pad.commands.bench import Workbench, experts_at
from pad.commands.distil import OfDepth, Task, first_set
from pad.config import DATA, DETAIL, PLACE, RECIPE, REPORT, FilePath, NetworkName, setting
from pad.data.augment import NoAugmentation
from pad.errors import InputError
from pad.initialisation import INITIAL_IMAGES, WeakExperts, refuse_small_classes
from pad.matching.trajectory import SegmentSampler, TrajectoryObjective
from pad.nn.flat import FlatModel
from pad.nn.replay import replay_on
from pad.store.identity import digest
from pad.store.trajectories import TrajectoryStore

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
class DistillSettings(OfDepth):
    """Stage 2, ``distill/PAD.py``: optimise synthetic images, soft labels and a learning rate along experts.

    MTT, FTD, DATM, TESLA, MCT and PAD are settings of it (configs/CIFAR-10).
    """

    method: str = setting(
        "PAD", "whose settings these are: refuses another's; ema_decay is FTD's alone", RECIPE, choices=tuple(SYSTEMS)
    )
    buffer_path: FilePath = setting("../buffer_storage/", "folder of the trajectories", PLACE, by_study=True)
    zca: bool = setting(True, "ZCA whitening instead of mean/std", DATA)

    syn_steps: int = setting(80, "inner steps on the synthetic set per outer iteration", RECIPE, low=1)
    expert_epochs: int = setting(2, "epochs of the expert to match", RECIPE, low=1)
    batch_syn: int | None = setting(
        256, "synthetic images per inner step; none: the whole set", RECIPE, low=1, memory=True
    )
    min_start_epoch: int = setting(0, "first start epoch", RECIPE, low=0)
    max_start_epoch: int = setting(25, "start epochs lie below this one", RECIPE, low=1)
    Sequential_Generation: bool = setting(True, "widen the range of start epochs gradually", RECIPE)
    current_max_start_epoch: int = setting(20, "upper bound of the start epochs at iteration 0", RECIPE, low=1)
    expansion_end_epoch: int = setting(3000, "iteration at which the bound reaches max_start_epoch", RECIPE, low=1)
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
    max_files: int | None = setting(None, "use the first files only, of save_interval experts each", RECIPE, low=1)
    max_experts: int | None = setting(None, "use the first experts of each file only", RECIPE, low=1)
    save_interval: int = setting(10, "experts a file, for max_files and max_experts", RECIPE, low=1)

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
    recorded_beside = frozenset({"experts"})

    def resolved(self) -> Self:
        if not self.ema_decay or self.method == "FTD":
            return super().resolved()
        # published files of the others carry the key, which nothing reads there
        log.warning("ema_decay does nothing: %s keeps no moving average of the images; method: FTD does", self.method)
        return dataclasses.replace(super().resolved(), ema_decay=0.0, given=self.given - {"ema_decay"})

    def check(self) -> None:
        super().check()
        first, last, now = self.min_start_epoch, self.max_start_epoch, self.current_max_start_epoch
        if last <= first:
            raise InputError(f"max_start_epoch: {last} leaves no start epoch from min_start_epoch: {first}")
        if self.Sequential_Generation and now <= first:
            raise InputError(
                f"current_max_start_epoch: {now} leaves no start epoch from min_start_epoch: {first} at iteration 0; "
                "raise it or set Sequential_Generation: False"
            )
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

    def task(self, bench: Workbench, model: FlatModel, before: dict) -> Task:
        """Follow experts. A resumed run follows those it began with."""
        depth = self.matched_span(model)
        if self.pix_init in ("samples_predicted_correctly", "real"):
            refuse_small_classes(bench.labels, bench.data.num_classes, self.ipc)
        store = bench.open_experts(bench.experts_folder(self.buffer_path, self.model), self.model, model)
        experts = _selected_experts(self, store, before)
        sampler = self.fill(SegmentSampler, experts=experts, sequential=self.Sequential_Generation)
        if not self.convexified and any(store.is_line(k) for k in experts):
            raise InputError(f"{store.folder} has experts as lines; give --convexified True, or the buffer they are of")
        sampler.refuse_short(store)
        headers = [store.header(k) for k in experts]
        bench.ranks.same(lambda: headers, f"the experts in {store.folder}")
        if self.Initialize_Label_With_Another_Model:
            labellers = bench.labellers(self.buffer_path, self.Initialize_Label_Model, self.Label_Model_Timestamp)
        else:
            labellers = experts_at(store, model, experts, self.Label_Model_Timestamp, bench.device)
        store.refuse_other(bench.describe(self.model, model))
        try:
            images, labels, begun_with = first_set(
                self, bench, self.pix_init, labellers, noise_logit=self.noise_logit, hard=self.labels == "hard"
            )
        except WeakExperts as error:
            raise InputError(f"{error}; train them longer, or use pix_init: real") from None
        batch_syn = min(self.batch_syn or len(images), len(images))
        if (self.batch_syn or 0) > len(images):
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
        recipe = {key: value for key, value in headers[0]["settings"].items() if key != "attempt"}
        made_from = {**store.metadata, "buffer": recipe, "experts": digest(headers), **begun_with}
        del made_from["parameters"]  # the model's, of which there can be hundreds
        return Task(
            objective=objective,
            images=images,
            labels=labels,
            lr=self.lr_teacher,
            rates=[self.lr_img, self.lr_y, self.lr_lr],
            made_from=made_from,
            provenance={"buffer": recipe, **begun_with},
            momentum_y=self.Momentum_y,
            threshold=math.inf if self.threshold is None else self.threshold,
            ema_decay=self.ema_decay,
            recorded={"experts": experts},
        )


def _selected_experts(settings: DistillSettings, store: TrajectoryStore, before: dict) -> list[int]:
    """The experts that max_files and max_experts leave, in files of ``save_interval`` as published.

    A buffer may have grown since a run began: the run goes on with the experts of then.
    """
    if "experts" not in before:
        files, within, size = settings.max_files or math.inf, settings.max_experts or math.inf, settings.save_interval
        return [k for i, k in enumerate(store.experts) if i // size < files and i % size < within]
    experts = before["experts"]
    if not (isinstance(experts, list) and all(isinstance(k, int) for k in experts)):
        raise InputError("the run's config.yaml is damaged; --overwrite starts the run anew")
    if gone := sorted(set(experts) - set(store.experts)):
        raise InputError(f"the run was started with expert {gone[0]}, which is not in {store.folder} any more")
    return experts
