"""Stage 1: rank the real images, train experts on the curriculum, record their trajectories."""

import logging
import math
from pathlib import Path

from tqdm import tqdm

from pad.config import BufferSettings, checkout
from pad.data.augment import DSA, CropScaleRotate
from pad.difficulty.ranking import Ranking, obtain_ranking, ranking_file
from pad.difficulty.scores import ScoringSettings
from pad.distributed import ALONE, Ranks
from pad.errors import InputError
from pad.experts.curriculum import Curriculum
from pad.experts.gsam import GSAM
from pad.experts.trainer import ExpertTask
from pad.functional import FlatModel, should_compile
from pad.stages.workbench import Workbench, check_writable, experts_folder, set_up
from pad.trajectories import recorded, write_expert

log = logging.getLogger("pad")


def record_experts(settings: BufferSettings, ranks: Ranks = ALONE) -> Path:
    """Stage 1: rank the real images, train experts on the curriculum, record them. Returns the folder of trajectories.

    Experts that are there already are kept, so a stopped run goes on and a buffer can grow. Those that are missing are
    dealt to the ranks, each of which writes its own files.
    """
    bench = set_up(settings, ranks)
    n = len(bench.labels)
    if settings.batch_train > n:
        raise InputError(f"batch_train: {settings.batch_train} is more than the {n} training images of {bench.data.name}")
    curriculum = Curriculum(
        settings.init_ratio, settings.add_end_epoch, settings.rm_epoch_first, settings.rm_epoch_second,
        settings.rm_easy_ratio_first, settings.rm_easy_ratio_second,
    )  # fmt: skip
    rows = [(bench.data.train_labels == c).nonzero().flatten() for c in range(bench.data.num_classes)]
    if not all(len(curriculum.indices(epoch, rows)) for epoch in range(settings.train_epochs)):
        raise InputError("the curriculum leaves an epoch without images: the classes are too small for its ratios")
    folder = experts_folder(settings, bench.data)
    check_writable(folder)
    uses_ranking = curriculum.uses_ranking(settings.train_epochs)
    if uses_ranking:  # refuse one that cannot be had; spell its name in one way, since it is part of the recipe
        folders = _ranking_folder(settings), bench.data.name, settings.sort_method or "GraNd"
        settings.sort_method = ranks.on_main(lambda: ranking_file(*folders)).name
        bench.network(settings.score_model or settings.model, 0)
    else:
        settings.sort_method = ""
    # One expert's steps, not those of all: compiled code rounds differently, and an expert must not depend on their number.
    steps = settings.train_epochs * math.ceil(n / settings.batch_train)
    compile = should_compile(settings.compile, bench.device, 2 * steps)
    model = bench.flat_model(settings.model, compile, settings.micro_batch)
    missing = _missing_experts(folder, settings, bench, model)
    if not missing:
        log.info("all %d experts are in %s", settings.num_experts, folder)
        return folder

    if uses_ranking:
        rows = _ranking(settings, bench).rows
    task = ExpertTask(
        model, bench.images, bench.labels, bench.data.num_classes,
        lambda epoch: curriculum.indices(epoch, rows),
        GSAM(settings.lr_teacher, settings.mom, settings.l2, settings.rho_max, settings.alpha, settings.adaptive),
        DSA(settings.dsa_strategy, settings.siamese) if settings.dsa else CropScaleRotate(),
        settings.batch_train, settings.train_epochs, settings.seed,
    )  # fmt: skip
    description = bench.describe(settings.model, model)
    mine = ranks.deal(missing)
    recipe = {key: value for key, value in settings.as_dict().items() if key in _EXPERT_RECIPE}
    with tqdm(
        total=len(mine) * settings.train_epochs, desc="experts", unit="epoch", dynamic_ncols=True, disable=not ranks.is_main
    ) as bar:
        for expert in mine:
            start = model.flatten(bench.network(settings.model, settings.seed, "expert", expert))
            with write_expert(
                folder, expert, description, epochs=settings.train_epochs, seed=settings.seed, settings=recipe,
                figures=("test_accuracy",),
            ) as record:  # fmt: skip
                for epoch, theta in enumerate(task.train(expert, start)):
                    last = epoch == settings.train_epochs
                    if settings.eval_every and (epoch % settings.eval_every == 0 or last):
                        accuracy = model.accuracy(theta, bench.test_images, bench.test_labels)
                        bar.set_postfix(expert=expert, test=f"{100 * accuracy:.1f}%", refresh=False)
                        record(theta, test_accuracy=accuracy)
                    else:
                        record(theta)
                    bar.update(epoch > 0)
    ranks.barrier()
    log.info("%d experts are in %s", len(recorded(folder)), folder)
    return folder


# The settings that make an expert what it is; a buffer holds experts of one recipe.
_EXPERT_RECIPE = frozenset(
    "train_epochs lr_teacher mom l2 rho_max alpha adaptive batch_train dsa dsa_strategy siamese sort_method "
    "init_ratio add_end_epoch rm_epoch_first rm_epoch_second rm_easy_ratio_first rm_easy_ratio_second".split()
)


def _missing_experts(folder: Path, settings: BufferSettings, bench: Workbench, model: FlatModel) -> list[int]:
    """Experts that no rank has in its folder. Raises InputError when those there were made with another recipe."""
    present = recorded(folder)
    if present:
        store = bench.open_experts(folder, settings.model, model)
        header = store.header(present[0])
        if "imported" in header["settings"]:
            raise InputError(f"the experts in {folder} were imported, so none can be added; give another --buffer_path")
        wanted = settings.as_dict()
        for key, value in {**header["settings"], "seed": header["seed"]}.items():
            if key in (*_EXPERT_RECIPE, "seed") and value != wanted[key]:
                raise InputError(
                    f"{folder}: {key}: {value} in the buffer, {wanted[key]} in the settings; "
                    "give another --buffer_path, or the same settings to add experts"
                )
    everywhere = set().union(*bench.ranks.gather(present))
    if everywhere:
        description = bench.describe(settings.model, model)
        if present:
            store.check(description)
    return [k for k in range(settings.num_experts) if k not in everywhere]


def _ranking(settings: BufferSettings, bench: Workbench) -> Ranking:
    scoring = ScoringSettings(
        model=settings.score_model or settings.model, repeats=settings.score_repeats, epochs=settings.score_epochs,
        lr=settings.score_lr, batch=settings.score_batch,
    )  # fmt: skip
    ranks = bench.ranks
    with tqdm(
        total=len(ranks.deal(range(scoring.repeats))) * scoring.epochs, desc="ranking", unit="epoch", leave=False, delay=1,
        dynamic_ncols=True, disable=not ranks.is_main,
    ) as bar:  # fmt: skip
        return obtain_ranking(
            bench.data, bench.images, bench.labels, settings.sort_method,
            _ranking_folder(settings), scoring, seed=settings.seed,
            preprocessing=bench.preprocessing.identity, progress=lambda repeat, epoch: bar.update(),
            convert_flat=settings.convert_flat, ranks=ranks,
        )  # fmt: skip


def _ranking_folder(settings: BufferSettings) -> Path:
    """Published names say the data set only: rankings of other people's folders, and of parts, stay with their buffer."""
    own = settings.dataset == "ImageFolder" or settings.train_per_class
    return Path(settings.ranking_path or (Path(settings.buffer_path) if own else checkout()) / "data_indices")
