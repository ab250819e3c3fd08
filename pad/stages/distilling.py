"""Stage 2: optimise a synthetic set along the experts."""

import contextlib
import hashlib
import json
import logging
import math
from pathlib import Path

import torch
from torch import Tensor

from pad import evaluation, networks
from pad.config import DistillSettings
from pad.data.augment import DSA, NoAugmentation
from pad.distiller import Distiller, Schedule, State
from pad.distributed import ALONE, Ranks
from pad.errors import InputError
from pad.functional import FlatModel, how_to_compile
from pad.initialisation import Experts, class_order, initial_set
from pad.locks import only_writer
from pad.matching.trajectory import SegmentSampler, TrajectoryObjective
from pad.stages.workbench import Workbench, check_writable, evaluation_protocol, experts_folder, set_up
from pad.synthetic import SyntheticSet
from pad.tracking import Follower, Run, finished_iterations, recorded_settings, run_folder, run_state
from pad.trajectories import TrajectoryStore

log = logging.getLogger("pad")

# What a resumed run may change: how long it runs, how often it reports, where it runs.
MAY_DIFFER_ON_RESUME = (
    "Iteration", "eval_it", "save_it", "checkpoint_every", "num_eval", "device", "resume", "overwrite", "tracker", "project",
    "data_path", "buffer_path", "log_dir", "experts", "max_bad_iterations", "batch_train", "epoch_eval_train", "eval_mode",
    "images_on", "compile",
)  # fmt: skip


def distill(settings: DistillSettings, ranks: Ranks = ALONE) -> Path:
    """Stage 2: optimise a synthetic set along the experts. Returns the run folder.

    The ranks share the mini-batches and the evaluation networks; rank 0 reads and writes the run folder, and sees to it
    that no other process does.
    """
    bench = set_up(settings, ranks)
    folder = run_folder(
        settings.log_dir, bench.data.name, settings.ipc, settings.model, settings.name or f"pad-seed{settings.seed}"
    )
    ranks.on_main(lambda: check_writable(folder))
    lock = only_writer(folder.with_name(f".{folder.name}.lock"), f"the run folder {folder}")
    with lock if ranks.is_main else contextlib.nullcontext():
        return _distill(settings, ranks, bench, folder)


def _distill(settings: DistillSettings, ranks: Ranks, bench: Workbench, folder: Path) -> Path:
    before = ranks.on_main(
        lambda: recorded_settings(folder) if settings.resume and run_state(folder) != "absent" else {}
    )
    model = _flat_model(settings, before, bench)
    place = dict(
        resume=settings.resume, overwrite=settings.overwrite, tracker=settings.tracker, may_differ=MAY_DIFFER_ON_RESUME,
        defaults=DistillSettings().as_dict(),
    )  # fmt: skip

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
        class_order(bench.labels, bench.data.num_classes, settings.ipc, settings.seed)  # refuses an ipc that is too large
    count = settings.ipc * bench.data.num_classes
    batch_syn = min(settings.batch_syn or count, count)
    if (settings.batch_syn or 0) > count:
        log.info("batch_syn: %d is more than the %d synthetic images; each step takes them all", settings.batch_syn, count)
    store = bench.open_experts(experts_folder(settings, bench.data), settings.model, model)
    experts = _selected_experts(store, settings)
    if "experts" in before:  # a buffer may have grown since; the run goes on with the experts it began with
        if not (isinstance(before["experts"], list) and all(isinstance(k, int) for k in before["experts"])):
            raise InputError(f"{folder}: its config.yaml is damaged; --overwrite starts the run anew")
        if gone := sorted(set(before["experts"]) - set(store.experts)):
            raise InputError(f"{folder} was started with expert {gone[0]}, which is not in {store.folder} any more")
        experts = before["experts"]
    sampler = SegmentSampler(
        experts, settings.expert_epochs, settings.min_start_epoch, settings.max_start_epoch, settings.Sequential_Generation,
        settings.current_max_start_epoch, settings.expansion_end_epoch, settings.seed,
    )  # fmt: skip
    sampler.check(store)
    ranks.same(lambda: [store.header(k) for k in experts], f"the experts in {store.folder}")
    labellers = _labellers(settings, bench, model, store, experts)
    store.check(bench.describe(settings.model, model))
    images, labels = ranks.on_main(
        lambda: initial_set(
            settings.pix_init, bench.images, bench.labels, bench.data.num_classes, settings.ipc, labellers, settings.seed,
            noise_logit=settings.noise_logit,
        )  # fmt: skip
    )

    augmentation = DSA(settings.dsa_strategy, settings.siamese) if settings.dsa else NoAugmentation()
    objective = TrajectoryObjective(
        model, store, sampler, NoAugmentation() if settings.no_aug else augmentation, settings.syn_steps, batch_syn,
        settings.depth_ratio, settings.loss_ratio, settings.seed, ranks,
    )  # fmt: skip
    if ranks.size > 1 and not model.separable:
        log.info("%s needs whole batches, so that one process does the matching; evaluation is shared", settings.model)
    schedule = Schedule(
        settings.Iteration, settings.eval_it, settings.skip_first_eva, settings.save_it, settings.checkpoint_every,
        settings.threshold, settings.max_bad_iterations, [settings.lr_img, settings.lr_y, settings.lr_lr],
        settings.Momentum_y,
    )  # fmt: skip
    protocol = evaluation_protocol(settings, bench.device, count)

    identity = _identity(settings, store, experts)

    def wrap(images: Tensor, labels: Tensor, lr: Tensor, iteration: int) -> SyntheticSet:
        classes = torch.arange(bench.data.num_classes).repeat_interleave(settings.ipc)
        metadata = {
            "data": bench.data.identity, "class_names": list(bench.data.class_names), "model": settings.model,
            "iteration": iteration, "seed": settings.seed,
            "provenance": {"buffer": identity["buffer"]}, "settings": identity["settings"],
        }  # fmt: skip
        return SyntheticSet(images, labels, lr, classes, metadata, bench.preprocessing)

    def evaluate(current: SyntheticSet) -> dict[str, tuple[float, float, int]]:
        training_set = current.images, current.probabilities()
        scores = evaluation.score_all(
            protocol, [(network, lambda j: training_set) for network in pool], settings.num_eval, current.lr.item(),
            bench.test_images, bench.test_labels, ranks,
        )  # fmt: skip
        return {s.network: (s.mean, s.std, s.n) for s in scores}

    recorded = settings.as_dict() | {"experts": experts}
    with Run.start(folder, recorded, **place) if ranks.is_main else Follower(folder) as run:
        state = State(images.clone(), labels.clone(), torch.tensor(settings.lr_teacher, device=bench.device))
        distiller = Distiller(run, state, objective, schedule, wrap, evaluate, ranks, identity)
        if settings.resume:
            distiller.resume()
        distiller.distill()
        run.finish(iterations=distiller.state.iteration, best_accuracy=distiller.state.best, skipped=distiller.state.skipped)
    log.info("the synthetic set is in %s", folder)
    return folder


def _identity(settings: DistillSettings, store: TrajectoryStore, experts: list[int]) -> dict:
    """What a run is of, as nested plain values: a checkpoint of another is refused by the first that differs."""
    headers = [store.header(k) for k in experts]
    identity = {
        **store.metadata,
        "buffer": {key: value for key, value in headers[0]["settings"].items() if key != "attempt"},
        "settings": {key: value for key, value in settings.as_dict().items() if key not in MAY_DIFFER_ON_RESUME},
        "experts": hashlib.sha256(json.dumps(headers, sort_keys=True).encode()).hexdigest()[:16],
    }
    del identity["parameters"]  # the model's, of which there can be hundreds
    return identity


def _flat_model(settings: DistillSettings, before: dict, bench: Workbench) -> FlatModel:
    """The student, with ``compile: auto`` turned into what it comes to.

    A resumed run keeps what it began with, since each way rounds otherwise.
    """
    if settings.compile == "auto":
        settings.compile = before.get("compile", "auto")
    compile = how_to_compile(settings.compile, bench.device, settings.Iteration * settings.syn_steps)
    model = bench.flat_model(settings.model, compile, settings.micro_batch)
    settings.compile = model.compile
    if before.get("compile", model.compile) != model.compile:
        log.warning("begun with compile: %s, now %s: results may differ by rounding", before["compile"], model.compile)
    return model


def _selected_experts(store: TrajectoryStore, settings: DistillSettings) -> list[int]:
    """The experts that max_files and max_experts leave, in files of ``save_interval`` as published."""
    files, within = settings.max_files or math.inf, settings.max_experts or math.inf
    return [k for i, k in enumerate(store.experts) if i // settings.save_interval < files and i % settings.save_interval < within]


def _labellers(
    settings: DistillSettings, bench: Workbench, model: FlatModel, store: TrajectoryStore, experts: list[int]
) -> Experts:
    """The networks that choose and label the initial images, at the configured epoch."""
    if settings.Initialize_Label_With_Another_Model:
        name = settings.Initialize_Label_Model
        model = bench.flat_model(name)
        store = bench.open_experts(experts_folder(settings, bench.data, name), name, model)
        store.check(bench.describe(name, model))
        experts = store.experts
    epoch = settings.Label_Model_Timestamp
    for k in experts:
        if not -store.epochs(k) - 1 <= epoch <= store.epochs(k):
            raise InputError(f"Label_Model_Timestamp: {epoch} is not an epoch of expert {k}, which has {store.epochs(k)}")

    def parameters(i: int) -> Tensor:
        k = experts[i]
        return store.rows(k, [epoch % (store.epochs(k) + 1)])[0].to(bench.device)

    return Experts(model, parameters, len(experts))
