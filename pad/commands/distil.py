"""Stage 2: optimise a synthetic set, whatever is matched."""

import contextlib
import logging
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from pad import evaluation
from pad.checkpoint import State
from pad.commands.bench import Workbench, check_writable, evaluation_protocol, set_up
from pad.commands.common import _Evaluating
from pad.config import FilePath, setting
from pad.distiller import Distiller, Schedule
from pad.distributed import ALONE, Ranks
from pad.errors import InputError
from pad.initialisation import class_order
from pad.matching.objective import Objective
from pad.nn import networks
from pad.nn.derivatives import how_to_compile
from pad.nn.flat import FlatModel
from pad.store.locks import only_writer
from pad.store.run import Follower, Run, finished_iterations, recorded_settings, run_folder, run_state
from pad.synthetic import SyntheticSet


@dataclass(kw_only=True)
class Distilling(_Evaluating):
    """What distillation asks, whatever is matched."""

    ipc: int = setting(1, "synthetic images per class", low=1)
    data_path: FilePath = setting("../dataset/", "folder of the data set")
    Iteration: int = setting(5000, "outer iterations 0..Iteration", low=0)
    lr_img: float = setting(1000.0, "learning rate of the images", low=0)
    max_bad_iterations: int = setting(10, "stop after so many iterations in a row without a finite gradient", low=1)

    eval_it: int = setting(100, "iterations between evaluations", low=1)
    skip_first_eva: bool = setting(False, "no evaluation at iteration 0")
    save_it: int = setting(1000, "iterations between saved sets", low=1)
    checkpoint_every: int = setting(100, "iterations between checkpoints", low=1)
    log_dir: FilePath = setting("logged_files", "folder of the runs")
    name: str = setting("", "name of the run; default: the config's name (without one: the method's) and the seed")
    resume: bool = setting(False, "go on with the run of this name")
    overwrite: bool = setting(False, "replace the run of this name")
    tracker: str = setting("none", "also send metrics to", choices=("none", "tensorboard", "wandb"))
    project: str = setting("PAD", "Weights & Biases project")

    program = "pad"  # begins the name of a run that has none
    needs_ranking = False  # whether it takes a difficulty ranking
    matches_by = frozenset()  # settings for evaluation that matching reads too

    def check(self) -> None:
        super().check()
        if self.resume and self.overwrite:
            raise InputError("resume and overwrite exclude each other: go on with the run, or replace it")


log = logging.getLogger("pad")

# What a resumed run may change: how long it runs, how often it reports, where it runs.
MAY_DIFFER_ON_RESUME = (
    "Iteration",
    "eval_it",
    "save_it",
    "checkpoint_every",
    "num_eval",
    "device",
    "resume",
    "overwrite",
    "tracker",
    "project",
    "data_path",
    "buffer_path",
    "ranking_path",
    "log_dir",
    "experts",
    "max_bad_iterations",
    "batch_train",
    "epoch_eval_train",
    "eval_mode",
    "images_on",
    "compile",
)


def distill(settings: Distilling, ranks: Ranks = ALONE, bench: Workbench | None = None) -> Path:
    """Stage 2: optimise a synthetic set. What is matched goes by the kind of ``settings``. Returns the run folder.

    The ranks share the mini-batches and the evaluation networks; rank 0 reads and writes the run folder, and sees to it
    that no other process does.
    """
    bench = bench or set_up(settings, ranks)
    name = settings.name or f"{settings.program}-seed{settings.seed}"
    folder = run_folder(settings.log_dir, bench.data.name, settings.ipc, settings.model, name)
    ranks.on_main(lambda: check_writable(folder))
    lock = only_writer(folder.with_name(f".{folder.name}.lock"), f"the run folder {folder}")
    with lock if ranks.is_main else contextlib.nullcontext():
        return _distill(settings, ranks, bench, folder)


def _distill(settings: Distilling, ranks: Ranks, bench: Workbench, folder: Path) -> Path:
    before = ranks.on_main(
        lambda: recorded_settings(folder) if settings.resume and run_state(folder) != "absent" else {}
    )
    model = _flat_model(settings, before, bench)
    if settings.needs_ranking:
        bench.settle_ranking(settings)
    may_differ = set(MAY_DIFFER_ON_RESUME) - settings.matches_by
    place = dict(
        resume=settings.resume,
        overwrite=settings.overwrite,
        tracker=settings.tracker,
        may_differ=may_differ,
        defaults=type(settings)().as_dict(),
    )

    def is_finished() -> bool:
        Run.check(folder, settings.as_dict(), **place)
        return settings.resume and finished_iterations(folder) > settings.Iteration

    if ranks.on_main(is_finished):
        log.info("the run in %s is finished", folder)
        return folder
    pool = networks.evaluation_pool(settings.eval_mode, settings.model)
    for network in pool:
        bench.network(network, settings.seed)  # refuses one that does not fit
    if settings.pix_init != "noise":
        class_order(
            bench.labels, bench.data.num_classes, settings.ipc, settings.seed
        )  # refuses an ipc that is too large
    task = settings.task(bench, model, before)
    schedule = Schedule(
        settings.Iteration,
        settings.eval_it,
        settings.skip_first_eva,
        settings.save_it,
        settings.checkpoint_every,
        task.threshold,
        settings.max_bad_iterations,
        task.rates,
        task.momentum_y,
        task.ema_decay,
    )
    protocol = evaluation_protocol(settings, bench.device, settings.ipc * bench.data.num_classes)
    fixed = {key: value for key, value in settings.as_dict().items() if key not in may_differ}

    def wrap(images: Tensor, labels: Tensor, lr: Tensor, iteration: int) -> SyntheticSet:
        classes = torch.arange(bench.data.num_classes).repeat_interleave(settings.ipc)
        metadata = {
            "data": bench.data.identity,
            "class_names": list(bench.data.class_names),
            "model": settings.model,
            "iteration": iteration,
            "seed": settings.seed,
            "provenance": task.provenance,
            "settings": fixed,
        }
        return SyntheticSet(images, labels, lr, classes, metadata, bench.preprocessing)

    def evaluate(current: SyntheticSet) -> dict[str, tuple[float, float, int]]:
        training_set = current.images, current.probabilities()
        scores = evaluation.score_all(
            protocol,
            [(network, lambda j: training_set) for network in pool],
            settings.num_eval,
            current.lr.item(),
            bench.test_images,
            bench.test_labels,
            ranks,
        )
        return {s.network: (s.mean, s.std, s.n) for s in scores}

    recorded = settings.as_dict() | task.recorded
    with Run.start(folder, recorded, **place) if ranks.is_main else Follower(folder) as run:
        average = task.images.clone() if task.ema_decay else None
        state = State(
            task.images.clone(), task.labels.clone(), torch.tensor(task.lr, device=bench.device), average=average
        )
        identity = {**task.made_from, "settings": fixed}
        distiller = Distiller(run, state, task.objective, schedule, wrap, evaluate, ranks, identity)
        if settings.resume:
            distiller.resume()
        distiller.distill()
        run.finish(
            iterations=distiller.state.iteration, best_accuracy=distiller.state.best, skipped=distiller.state.skipped
        )
    log.info("the synthetic set is in %s", folder)
    return folder


def _flat_model(settings: Distilling, before: dict, bench: Workbench) -> FlatModel:
    """The student, with ``compile: auto`` turned into what it comes to.

    A resumed run keeps what it began with, since each way rounds otherwise.
    """
    if settings.compile == "auto":
        settings.compile = before.get("compile", "auto")
    compile = how_to_compile(settings.compile, bench.device, settings.derivatives)
    model = bench.flat_model(settings.model, compile, getattr(settings, "micro_batch", None))
    settings.compile = model.compile
    if before.get("compile", model.compile) != model.compile:
        log.warning("begun with compile: %s, now %s: results may differ by rounding", before["compile"], model.compile)
    return model


@dataclass(frozen=True)
class Task:
    """All that one way of matching brings to the loop that they share."""

    objective: Objective
    images: Tensor  # to begin with
    labels: Tensor
    lr: float
    rates: list[float]  # of images, labels, lr
    made_from: dict  # besides settings, as plain values: a checkpoint of a run made from something else is refused
    provenance: dict  # of that, what a synthetic set says of itself
    momentum_y: float = 0.0
    threshold: float = math.inf
    ema_decay: float = 0.0
    recorded: dict = field(default_factory=dict)  # beside the settings in the run's config
