"""Stage 2: optimise a synthetic set, whatever is matched.

A way of matching is its settings, a subclass of :class:`Distilling`, and what they make of themselves: a :class:`Task`.
Nothing here knows one of them by name.
"""

import contextlib
import dataclasses
import functools
import logging
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from pad.checkpoint import State
from pad.commands.bench import Workbench, identity_of_set, set_up, use_tf32
from pad.commands.common import Evaluating
from pad.config import CHANGEABLE, NAME, PACE, PLACE, RECIPE, FilePath, Role, setting
from pad.data.formation import decoded, refuse_unfit_factor
from pad.distiller import Distiller, Schedule
from pad.distributed import ALONE, Ranks
from pad.errors import InputError
from pad.evaluation import Case
from pad.initialisation import INITIAL_IMAGES, Experts, from_set, initial_set
from pad.limit import TimeLimit
from pad.matching.formation import MultiFormation
from pad.matching.levels import OnLevels
from pad.matching.loss import span
from pad.matching.objective import Objective
from pad.nn.derivatives import how_to_compile
from pad.nn.flat import FlatModel
from pad.quantise import Packed
from pad.store.files import refuse_unwritable
from pad.store.identity import refuse_difference
from pad.store.locks import only_writer
from pad.store.run import Follower, Place, Run, finished_iterations, recorded_settings, run_folder, run_state
from pad.store.trackers import TRACKERS
from pad.synthetic import SyntheticSet, in_words, set_file

log = logging.getLogger("pad")


@dataclass(frozen=True, kw_only=True)
class Task:
    """All that one way of matching brings to the loop that they share.

    images ``[N, C, H, W]``, labels ``[N, K]`` (logits), lr: to begin with; in multi-formation the images are the
    stored ones, the labels those of the decoded ones, and so is the objective. rates: of images, labels, lr.
    made_from: beside settings, as plain values: a checkpoint of a run made from something else is refused.
    provenance: what a synthetic set says of that. recorded: what stands beside the settings in the run's config.
    adamw: the images learn by AdamW with this weight decay; None: by SGD.
    """

    objective: Objective
    images: Tensor
    labels: Tensor
    lr: float
    rates: list[float]
    made_from: dict
    provenance: dict
    momentum_y: float = 0.0
    threshold: float = math.inf
    ema_decay: float = 0.0
    adamw: float | None = None
    recorded: dict = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Distilling(Evaluating, ABC):
    """What distillation asks, whatever is matched."""

    ipc: int = setting(1, "synthetic images per class", RECIPE, low=1, by_study=True, memory=True)
    factor: int = setting(
        1, "multi-formation: each image is kept as so many smaller ones a side", RECIPE, low=1, later=True
    )
    data_path: FilePath = setting("../dataset/", "folder of the data set", PLACE)
    Iteration: int = setting(5000, "outer iterations 0..Iteration", PACE, low=0)
    lr_img: float = setting(1000.0, "learning rate of the images", RECIPE, low=0)
    tune_levels: bool = setting(
        False, "pix_init is a quantised set: its images move on their levels, its labels stay", RECIPE, later=True
    )
    time_limit: float | None = setting(
        None,
        "seconds after which the command ends, the state and the set saved; --resume goes on",
        PACE,
        above=0,
        by_study=True,
        later=True,
    )
    max_bad_iterations: int = setting(10, "stop after so many in a row without a finite gradient", PACE, low=1)

    eval_it: int = setting(100, "iterations between evaluations", PACE, low=1)
    skip_first_eva: bool = setting(False, "no evaluation at iteration 0", RECIPE)
    save_it: int = setting(1000, "iterations between saved sets", PACE, low=1)
    checkpoint_every: int = setting(100, "iterations between checkpoints", PACE, low=1)
    log_dir: FilePath = setting("logged_files", "folder of the runs", PLACE, by_study=True)
    name: str = setting(
        "", "name of the run; default: the config's (else the system's) and the seed", NAME, by_study=True
    )
    resume: bool = setting(False, "go on with the run of this name", PLACE, by_study=True)
    overwrite: bool = setting(False, "replace the run of this name", PLACE, by_study=True)
    tracker: str = setting("none", "also send metrics to", PLACE, choices=TRACKERS)
    project: str = setting("PAD", "Weights & Biases project", PLACE)

    program: ClassVar[str] = "pad"  # begins the name of a run that has none

    def check(self) -> None:
        super().check()
        if self.resume and self.overwrite:
            raise InputError("resume and overwrite exclude each other: go on with the run, or replace it")

    def settled(self, bench: Workbench) -> Self:
        """These settings with what only the images can tell filled in. Raises InputError for what they do not allow."""
        return self

    @abstractmethod
    def task(self, bench: Workbench, model: FlatModel, before: dict) -> Task:
        """What is matched, and the set to begin with.

        ``model``: the student. ``before``: the config of the run that is gone on with; empty for a new one. Raises
        InputError for everything that can be refused, first what can be without preprocessing.
        """

    @property
    @abstractmethod
    def derivatives(self) -> int:
        """About how many derivatives of the network a run takes: what compiling has to pay for itself in."""


@dataclass(frozen=True, kw_only=True)
class OfDepth(Distilling):
    """What ways of matching ask that count parameters by their depth."""

    depth_ratio: float = setting(0.0, "share of parameters, shallow to deep, to leave out", RECIPE, low=0, below=1)
    match_from: float = setting(
        0.0, "share of the depth at which matching begins, as depth_ratio", RECIPE, low=0, below=1, later=True
    )
    match_to: float = setting(1.0, "share of the depth at which it ends", RECIPE, above=0, high=1, later=True)

    def check(self) -> None:
        super().check()
        first, last = self.match_from, self.match_to
        if self.depth_ratio and (first, last) != (0, 1):
            raise InputError(
                f"depth_ratio: {self.depth_ratio:g} is short for match_from: {self.depth_ratio:g} and match_to: 1; "
                f"give either it or the span, not also match_from: {first:g} and match_to: {last:g}"
            )
        if last <= first:
            raise InputError(f"match_to: {last:g} leaves nothing to match from match_from: {first:g} on")

    def matched_span(self, model: FlatModel) -> tuple[float, float]:
        """The shares of the depth between which parameters are matched. Raises InputError where none lies there."""
        shares = self.depth_ratio or self.match_from, self.match_to
        first, last = span(*shares, model.num_parameters)
        if first == last:
            raise InputError(
                f"match_from: {shares[0]:g} and match_to: {shares[1]:g} have none of the {model.num_parameters} "
                f"parameters of {self.model} between them"
            )
        return shares


def distill(settings: Distilling, ranks: Ranks = ALONE, bench: Workbench | None = None) -> Path:
    """Stage 2: optimise a synthetic set. What is matched goes by the kind of ``settings``. Returns the run folder.

    The ranks share the mini-batches and the evaluation networks; rank 0 reads and writes the run folder, and sees to it
    that no other process does.
    """
    limit = TimeLimit(settings.time_limit)
    bench = bench or set_up(settings, ranks)
    refuse_unfit_factor(settings.factor, bench.data.size)
    name = settings.name or f"{settings.program}-seed{settings.seed}"
    folder = run_folder(settings.log_dir, bench.data.name, settings.ipc, settings.model, name)
    ranks.on_main(lambda: refuse_unwritable(folder))
    lock = only_writer(folder.with_name(f".{folder.name}.lock"), f"the run folder {folder}")
    with lock if ranks.is_main else contextlib.nullcontext():
        return _distill(settings, ranks, bench, folder, limit)


def _distill(settings: Distilling, ranks: Ranks, bench: Workbench, folder: Path, limit: TimeLimit) -> Path:
    goes_on = settings.resume and run_state(folder) != "absent"
    before = ranks.on_main(lambda: recorded_settings(folder) if goes_on else {})
    settings = dataclasses.replace(settings, name=before.get("name", settings.name))  # the folder's, given or not
    if "tf32" not in settings.given and "tf32" in before:
        settings = dataclasses.replace(settings, tf32=before["tf32"])
        use_tf32(bool(settings.tf32), bench.device)
    model = _student(settings, before, bench, folder)
    settings = dataclasses.replace(settings, compile=model.compile).settled(bench)
    place = Place(
        folder=folder,
        resume=settings.resume,
        overwrite=settings.overwrite,
        tracker=settings.tracker,
        may_differ={*settings.names(*CHANGEABLE), *settings.recorded_beside},
        defaults=type(settings)().as_dict(),
    )

    def is_finished() -> bool:
        place.refuse(settings.as_dict())
        return settings.resume and finished_iterations(folder) > settings.Iteration

    if ranks.on_main(is_finished):
        log.info("the run in %s is finished", folder)
        return folder
    pool = settings.pool
    bench.refuse_unfit(pool)
    task = settings.task(bench, model, before)
    factor, num_classes = settings.factor, bench.data.num_classes
    objective = task.objective if factor == 1 else MultiFormation(objective=task.objective, factor=factor)
    begun = _packed_start(settings, task, bench) if settings.tune_levels else None
    if begun is not None:
        objective = OnLevels(objective=objective, packed=begun)
    schedule = settings.fill(
        Schedule,
        iterations=settings.Iteration,
        threshold=task.threshold,
        rates=task.rates,
        momentum_y=task.momentum_y,
        ema_decay=task.ema_decay,
        adamw=task.adamw,
    )
    protocol = bench.protocol(settings, len(task.labels))
    fixed = {name: value for name, value in settings.telling(*Role).items() if name not in place.may_differ}

    def wrap(images: Tensor, labels: Tensor, lr: Tensor, iteration: int) -> SyntheticSet:
        packed = begun and begun.moved(images)
        if packed:
            images, labels = (tensor.to(bench.device) for tensor in packed.unpacked())
        shown, stored = decoded(images, factor, num_classes), images if factor > 1 else None
        classes = torch.arange(num_classes).repeat_interleave(len(shown) // num_classes)
        metadata = {
            **identity_of_set(bench, settings),
            "iteration": iteration,
            "provenance": task.provenance,
            "settings": fixed,
        }
        made = SyntheticSet(shown, labels, lr, classes, metadata, preprocessing=bench.preprocessing, stored=stored)
        return dataclasses.replace(made, packed=packed)

    def evaluate(current: SyntheticSet) -> dict[str, tuple[float, float, int]]:
        training_set, lr = (current.images, current.probabilities()), current.lr.item()
        cases = [Case(network=network, training_set=lambda j: training_set, lr=lr) for network in pool]
        found = bench.evaluation(protocol).run(cases, settings.num_eval)
        return {each.network: (each.mean, each.std, each.n) for each in found}

    recorded = settings.as_dict() | task.recorded
    with Run.start(place, recorded) if ranks.is_main else Follower(folder) as run:
        average = task.images.clone() if task.ema_decay else None
        squares = None if task.adamw is None else torch.zeros_like(task.images)
        kept: dict = {"average": average, "squares": squares, "memory": dict(task.objective.memory)}
        lr = torch.tensor(task.lr, device=bench.device)
        distiller = Distiller(
            run=run,
            state=State(task.images.clone(), task.labels.clone(), lr, **kept),
            objective=objective,
            schedule=schedule,
            synthetic=wrap,
            evaluate=evaluate,
            ranks=ranks,
            identity={**task.made_from, "settings": fixed},
            limit=limit,
        )
        if settings.resume:
            distiller.resume()
        distiller.distill()
        state = distiller.state
        if distiller.is_finished:
            run.finish(iterations=state.iteration, best_accuracy=state.best, skipped=state.skipped)
        elif "time_limit" in settings.given:
            done, wanted = state.iteration, settings.Iteration + 1
            log.info("time_limit: stopped after %d of %d iterations; --resume goes on", done, wanted)
    made = wrap(state.images, state.labels, state.lr, state.iteration)
    log.info("the synthetic set is in %s: %s", folder, made.cost)
    return folder


def _student(settings: Distilling, before: dict, bench: Workbench, folder: Path) -> FlatModel:
    """The student, with ``compile: auto`` turned into what it comes to.

    A resumed run keeps what it began with, since each way rounds otherwise. In one process it keeps the student itself,
    which is compiled.
    """
    mode = before.get("compile", "auto") if settings.compile == "auto" else settings.compile
    compile = how_to_compile(mode, bench.device, settings.derivatives)
    how = folder, settings.model, compile, getattr(settings, "micro_batch", None)
    if how not in bench.student:
        bench.student.clear()
        bench.student[how] = bench.flat_model(*how[1:])
    model = bench.student[how]
    if before.get("compile", model.compile) != model.compile:
        log.warning("begun with compile: %s, now %s: results may differ by rounding", before["compile"], model.compile)
    return model


def first_set(
    settings: Distilling, bench: Workbench, pix_init: str, experts: Experts | None = None, **labels
) -> tuple[Tensor, Tensor, dict]:
    """Images ``[N, C, H, W]`` and labels ``[N, K]`` (logits) to begin with, and what they are of beside the settings.

    In multi-formation the images are the stored ones, and there are labels for all decoded ones.

    ``pix_init``: a kind of :func:`pad.initialisation.initial_set`, or the path of a synthetic set. ``labels``: see
    there. Raises InputError as it does, and for a set of other classes, sides or preprocessing.
    """
    if pix_init in INITIAL_IMAGES:
        real = bench.images, bench.labels, bench.data.num_classes
        found = bench.ranks.on_main(
            lambda: initial_set(
                pix_init, *real, settings.ipc, experts, seed=settings.seed, factor=settings.factor, **labels
            )
        )
        return *found, {}
    start = _start(pix_init, bench)
    how = {"seed": settings.seed, "device": bench.device, "hard": labels.get("hard", False), "factor": settings.factor}
    return *bench.ranks.on_main(lambda: from_set(start, settings.ipc, experts, **how)), {"start": start.digest}


def _packed_start(settings: Distilling, task: Task, bench: Workbench) -> Packed:
    """The quantised set that a run is to begin with. Raises InputError where it begins with anything else."""
    path = str(getattr(settings, "pix_init", ""))
    start = None if path in INITIAL_IMAGES else _start(path, bench)
    if start is None or start.packed is None:
        raise InputError(f"tune_levels: pix_init: {path} is no quantised set; scripts/quantise.py makes one")
    if not (torch.equal(start.kept, task.images.cpu()) and torch.equal(start.labels, task.labels.cpu())):
        raise InputError(
            f"tune_levels: the run would begin with other images or labels than those of {path}: ipc and factor are "
            f"to be its own ({in_words(start.kept_counts)}, {start.factor}), and so are labels (soft or hard)"
        )
    return start.packed


def _start(path: str, bench: Workbench) -> SyntheticSet:
    """The set at ``path``. Raises InputError for one that does not fit."""
    file = set_file(path)
    if file.exists() and file.suffix != ".safetensors":
        raise InputError(f"pix_init: {file} is no set of this toolkit's; scripts/import_set.py makes one of it")
    start, data = SyntheticSet.load(file), bench.data
    there: dict = {"classes": start.num_classes, "shape of images": list(start.images.shape[1:])}
    here: dict = {"classes": data.num_classes, "shape of images": [data.channels, *data.size]}
    if start.metadata.get("class_names"):
        there["class"], here["class"] = dict(enumerate(start.class_names)), dict(enumerate(data.class_names))
    refuse = functools.partial(
        refuse_difference, there_is="the set", here_is="the data", remedy="begin with a set that was made for these"
    )
    refuse(f"pix_init: {file}", there, here)
    if start.preprocessing_identity is None:
        raise InputError(f"pix_init: {file} does not say how its images were preprocessed")
    seen = bench.preprocessing.identity
    there, here = {key: start.preprocessing_identity.get(key) for key in seen}, seen
    refuse(f"pix_init: {file}", {"preprocessing": there}, {"preprocessing": here})
    return start
