"""What is matched: from settings to an objective and a set to begin with, for each of the distillation commands."""

import hashlib
import json
import logging
import math
from dataclasses import dataclass, field

from torch import Tensor

from pad.data.augment import DSA, NoAugmentation
from pad.errors import InputError
from pad.functional import FlatModel
from pad.initialisation import Experts, initial_set
from pad.matching.base import Objective
from pad.matching.distribution import DistributionObjective, matched_blocks
from pad.matching.gradient import GradientObjective
from pad.matching.real import RealBatches, without_ends
from pad.matching.trajectory import SegmentSampler, TrajectoryObjective
from pad.networks import Network
from pad.settings import DCSettings, DistillSettings, DMSettings
from pad.stages.workbench import Workbench, digest_of_rows, experts_folder, rankings_folder
from pad.trajectories import TrajectoryStore

log = logging.getLogger("pad")


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


def trajectory_task(settings: DistillSettings, bench: Workbench, model: FlatModel, before: dict) -> Task:
    """MTT, FTD, DATM, TESLA, PAD: follow experts. A resumed run, of settings ``before``, follows those it began with."""
    ranks, count = bench.ranks, settings.ipc * bench.data.num_classes
    batch_syn = min(settings.batch_syn or count, count)
    if (settings.batch_syn or 0) > count:
        log.info("batch_syn: %d is more than the %d synthetic images; each step takes them all", settings.batch_syn, count)
    store = bench.open_experts(experts_folder(settings, bench.data), settings.model, model)
    experts = _selected_experts(store, settings, before)
    sampler = SegmentSampler(
        experts, settings.expert_epochs, settings.min_start_epoch, settings.max_start_epoch, settings.Sequential_Generation,
        settings.current_max_start_epoch, settings.expansion_end_epoch, settings.seed,
    )  # fmt: skip
    sampler.check(store)
    ranks.same(lambda: [store.header(k) for k in experts], f"the experts in {store.folder}")
    labellers = _labellers(settings, bench, model, store, experts)
    store.check(bench.describe(settings.model, model))
    images, labels = _initial_set(settings, bench, labellers, noise_logit=settings.noise_logit, hard=settings.labels == "hard")

    augmentation = DSA(settings.dsa_strategy, settings.siamese) if settings.dsa else NoAugmentation()
    objective = TrajectoryObjective(
        model, store, sampler, NoAugmentation() if settings.no_aug else augmentation, settings.syn_steps, batch_syn,
        settings.depth_ratio, settings.loss_ratio, settings.seed, ranks, settings.gradient == "truncated",
    )  # fmt: skip
    if ranks.size > 1 and not model.separable:
        log.info("%s needs whole batches, so that one process does the matching; evaluation is shared", settings.model)
    headers = [store.header(k) for k in experts]
    recipe = {key: value for key, value in headers[0]["settings"].items() if key != "attempt"}
    made_from = {**store.metadata, "buffer": recipe, "experts": _digest(headers)}
    del made_from["parameters"]  # the model's, of which there can be hundreds
    return Task(
        objective, images, labels, settings.lr_teacher, [settings.lr_img, settings.lr_y, settings.lr_lr], made_from,
        {"buffer": recipe}, settings.Momentum_y, math.inf if settings.threshold is None else settings.threshold,
        settings.ema_decay, {"experts": experts},
    )  # fmt: skip


def gradient_task(settings: DCSettings, bench: Workbench, model: FlatModel, before: dict) -> Task:
    """DC, DSA: match the gradients of real images."""
    real, made_from = _real_batches(settings, bench, model)
    outer, inner = settings.loops

    def start(it: int) -> Tensor:
        return model.flatten(bench.network(settings.model, settings.seed, "gradient matching", it)).to(bench.device)

    objective = GradientObjective(
        model, start, real, DSA(settings.dsa_strategy, siamese=True) if settings.dsa else NoAugmentation(),
        DSA(settings.dsa_strategy, settings.siamese) if settings.dsa else NoAugmentation(), outer, inner, settings.lr_net,
        settings.batch_train, settings.depth_ratio, settings.seed, bench.ranks,
        bench.flat_model(settings.model, settings.compile, settings.micro_batch),
    )  # fmt: skip
    return _hard_labelled(settings, bench, objective, made_from)


def distribution_task(settings: DMSettings, bench: Workbench, model: FlatModel, before: dict) -> Task:
    """DM: match the mean features of real images."""
    real, made_from = _real_batches(settings, bench, model)

    def network(it: int) -> Network:
        return bench.network(settings.model, settings.seed, "distribution matching", it).to(bench.device).requires_grad_(False)

    objective = DistributionObjective(
        network, real, DSA(settings.dsa_strategy, siamese=True) if settings.dsa else NoAugmentation(),
        matched_blocks(settings.depth_ratio, len(network(0).body)), model.separable, settings.seed, bench.ranks,
    )  # fmt: skip
    return _hard_labelled(settings, bench, objective, made_from)


def _hard_labelled(settings: DCSettings | DMSettings, bench: Workbench, objective: Objective, made_from: dict) -> Task:
    images, labels = _initial_set(settings, bench, hard=True)
    provenance = {key: value for key, value in made_from.items() if key == "ranking"}
    return Task(objective, images, labels, settings.lr_net, [settings.lr_img, 0.0, 0.0], made_from, provenance)


def _real_batches(settings: DCSettings | DMSettings, bench: Workbench, model: FlatModel) -> tuple[RealBatches, dict]:
    """The real batches, filtered by difficulty where that is asked for, and what they come from."""
    rows = [(bench.data.train_labels == c).nonzero().flatten() for c in range(bench.data.num_classes)]
    without_ends(rows, settings.drop_easy, settings.drop_hard)  # refuses shares that leave nothing, before there is a ranking
    made_from = {key: value for key, value in bench.describe(settings.model, model).items() if key != "parameters"}
    if settings.needs_ranking:
        method, folder = settings.sort_method, rankings_folder(settings, settings.ranking_path)
        rows = bench.rankings([method], folder, settings, convert_flat=settings.convert_flat)[method].rows
        made_from["ranking"] = digest_of_rows(rows)
    rows = without_ends(rows, settings.drop_easy, settings.drop_hard)
    return RealBatches(bench.images, rows, settings.batch_real), made_from


def _initial_set(settings, bench: Workbench, experts: Experts | None = None, **labels) -> tuple[Tensor, Tensor]:
    num_classes = bench.data.num_classes
    return bench.ranks.on_main(lambda: initial_set(
        settings.pix_init, bench.images, bench.labels, num_classes, settings.ipc, experts, settings.seed, **labels
    ))  # fmt: skip


def _selected_experts(store: TrajectoryStore, settings: DistillSettings, before: dict) -> list[int]:
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


def _digest(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
