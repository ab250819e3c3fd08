"""Stage 1: rank the real images, train experts on the curriculum, record their trajectories.

python buffer/buffer_CL.py --cfg configs/quickstart/buffer.yaml
"""

import contextlib
import dataclasses
import logging
import math
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from pad.commands.bench import Workbench, progress_bar, set_up
from pad.commands.common import OnCurriculum, Ranked, Training
from pad.config import DETAIL, PACE, PLACE, RECIPE, REPORT, FilePath, setting
from pad.data.augment import DC
from pad.distributed import ALONE, Ranks
from pad.errors import InputError, Stopped
from pad.experts.gsam import GSAM
from pad.experts.trainer import ExpertTraining
from pad.limit import TimeLimit
from pad.matching.real import without_ends
from pad.nn.derivatives import how_to_compile
from pad.nn.flat import FlatModel
from pad.nn.replay import replay_on
from pad.store.files import refuse_unwritable
from pad.store.identity import refuse_difference
from pad.store.locks import each_once, in_turn, remove_leftovers
from pad.store.trajectories import TrajectoryStore, expert_lock, expert_path, recorded, write_expert

log = logging.getLogger("pad")

_REPETITIONS = 3  # of an expert that diverges


@dataclass(frozen=True, kw_only=True)
class BufferSettings(Training, Ranked, OnCurriculum):
    """Stage 1, buffer/buffer_CL.py: rank the real images, train experts on a curriculum, record their trajectories."""

    num_experts: int = setting(100, "experts to train", PACE, low=1)
    time_limit: float | None = setting(
        None,
        "seconds after which no expert ends; the first is always trained",
        PACE,
        above=0,
        by_study=True,
        later=True,
    )
    lr_teacher: float = setting(0.01, "learning rate of the experts", RECIPE, above=0)
    mom: float = setting(0.0, "momentum", RECIPE, low=0, below=1)
    l2: float = setting(0.0, "weight decay", RECIPE, low=0)
    rho_max: float = setting(2.0, "GSAM's radius", RECIPE, low=0)
    rho_min: float = setting(2.0, "must equal rho_max, as the learning rate is constant", DETAIL, low=0)
    alpha: float = setting(0.4, "weight of GSAM's surrogate-gap term", RECIPE, low=0)
    adaptive: bool = setting(True, "scale GSAM's perturbation by the parameters (ASAM)", RECIPE)
    buffer_path: FilePath = setting("./buffers", "folder of the trajectories", PLACE, by_study=True)
    eval_every: int = setting(1, "epochs between measurements of test accuracy; 0: never", REPORT, low=0)
    micro_batch: int | None = setting(
        None, "compute on so many images at a time: less memory, same result", DETAIL, low=1, memory=True
    )

    drop_easy: float = setting(
        0.0, "share of each class, easiest first, to leave out of all epochs", RECIPE, low=0, below=1, later=True
    )
    drop_hard: float = setting(
        0.0, "share of each class, hardest first, to leave out of all epochs", RECIPE, low=0, below=1, later=True
    )
    sort_method: str = setting("", "difficulty method, or file's stem as CIFAR10_GraNd; default: GraNd", RECIPE)

    dead = {
        "batch_real": "nothing reads it",
        "add_hard": "the ratios and epochs alone define the curriculum",
        "rm_easy": "the ratios and epochs alone define the curriculum",
        "max_ratio": "the ratios and epochs alone define the curriculum",
        "decay": "the learning rate is constant",
        "save_interval": "a file holds one expert; scripts/export_buffer.py writes the published files of several",
    }

    def check(self) -> None:
        super().check()
        if self.rho_max != self.rho_min:
            raise InputError(
                f"rho_max: {self.rho_max:g} differs from rho_min: {self.rho_min:g}, but the learning rate is constant, "
                "so rho has nothing to follow; give both the same value"
            )

    @property
    def uses_ranking(self) -> bool:
        """Whether any epoch leaves an image out."""
        return self.drop_easy + self.drop_hard > 0 or self.curriculum.uses_ranking(self.train_epochs)

    def window(self, rows: list[Tensor]) -> list[Tensor]:
        """What drop_easy and drop_hard leave of a ranking's ``rows``. Raises InputError where that is nothing."""
        return without_ends(rows, self.drop_easy, self.drop_hard)


def record_experts(settings: BufferSettings, ranks: Ranks = ALONE, bench: Workbench | None = None) -> Path:
    """Train and record the experts that are missing. Returns the folder of trajectories.

    Experts that are there already are kept, so a stopped run goes on and a buffer can grow. Those that are missing are
    dealt to the ranks, each of which writes its own files. Several runs on one folder share the work: each takes the
    experts that no other has begun, and in the end waits for those that others have. Under a ``time_limit`` an
    expert is not begun that would end too late if it took as long as the one before.
    """
    limit = TimeLimit(settings.time_limit)
    bench = bench or set_up(settings, ranks)
    _refuse_too_few_images(settings, bench)
    folder = bench.experts_folder(settings.buffer_path, settings.model)
    refuse_unwritable(folder)
    remove_leftovers(folder)
    uses_ranking = settings.uses_ranking
    if settings.sort_method and not uses_ranking:
        log.warning("sort_method does nothing: in %d epochs the curriculum takes all images", settings.train_epochs)
    stems = bench.ranking_stems(settings, [settings.sort_method or "GraNd"]) if uses_ranking else [""]
    settings = dataclasses.replace(settings, sort_method=stems[0])
    buffer = _Buffer(folder, settings, bench, limit)
    buffer.refuse_other_experts(seen=False)
    there = set().union(*ranks.gather(recorded(folder)))
    missing = [expert for expert in range(settings.num_experts) if expert not in there]
    if there:
        buffer.refuse_other_experts()
    if not missing:
        log.info("all %d experts are in %s", settings.num_experts, folder)
        return folder

    rows = bench.classes
    if uses_ranking:
        ranking = bench.rankings(settings, stems, convert_flat=settings.convert_flat)[stems[0]]
        rows = settings.window(ranking.rows)
        buffer.recipe["ranking"] = ranking.digest
    mine = ranks.deal(missing)
    with progress_bar(ranks, len(mine) * settings.train_epochs, "experts", "epoch") as bar:
        training = expert_training(settings, bench, buffer.model, rows)

        def obtain(expert: int) -> None:
            buffer.obtain(expert, training, bar)

        each_once(mine, buffer.lock, obtain, "expert {}".format, buffer.has_time)
    ranks.barrier()
    count = len(recorded(folder))
    log.info("%d experts are in %s", count, folder)
    if count < settings.num_experts and "time_limit" in settings.given:
        log.info("time_limit: the same command goes on with the other %d", settings.num_experts - count)
    return folder


def expert_training(settings: BufferSettings, bench: Workbench, model: FlatModel, rows: list[Tensor]) -> ExpertTraining:
    """How the configured experts are trained, on ``rows``: for each class the images' indices, easiest first."""
    return settings.fill(
        ExpertTraining,
        model=model,
        images=bench.images,
        labels=bench.labels,
        num_classes=bench.data.num_classes,
        epoch_indices=lambda epoch: settings.curriculum.indices(epoch, rows),
        optimiser=settings.fill(GSAM, lr=settings.lr_teacher, momentum=settings.mom, rho=settings.rho_max),
        augmentation=settings.augmentation(otherwise=DC()),
        batch_size=settings.batch_train,
        epochs=settings.train_epochs,
        replay=replay_on(bench.device),
    )


def _refuse_too_few_images(settings: BufferSettings, bench: Workbench) -> None:
    """Raise InputError when a batch, or an epoch of the curriculum, cannot be filled."""
    count = len(bench.data.train_labels)
    if settings.batch_train > count:
        raise InputError(
            f"batch_train: {settings.batch_train} is more than the {count} training images of {bench.data.name}"
        )
    rows = settings.window(bench.classes)
    if not all(len(settings.curriculum.indices(epoch, rows)) for epoch in range(settings.train_epochs)):
        raise InputError("the curriculum leaves an epoch without images: the classes are too small for its ratios")


def recipe_of(settings: BufferSettings) -> dict:
    """What makes an expert what it is, but for its number and its ranking."""
    return settings.telling(RECIPE) | {"seed": settings.seed} | ({} if settings.dsa else {"augmentation": "DC's"})


def refuse_other_recipe(store: TrajectoryStore, recipe: dict) -> None:
    """Raise InputError, naming the first difference, where an expert in ``store`` was made with another recipe."""
    # What a recipe does not name is at its default: later settings are left out there, and a buffer may be older than a
    # setting. Without DSA, one that does not name the augmentation was not made with DC's.
    usual = BufferSettings().of(RECIPE)
    recipe = usual | recipe
    defaults = usual | {"augmentation": "an approximation of DC's"}
    for expert in store.experts:
        header = store.header(expert)
        if "imported" in header["settings"]:
            raise InputError(
                f"the experts in {store.folder} were imported, so none can be added; give another --buffer_path"
            )
        made_with = defaults | header["settings"] | {"seed": header["seed"]}
        refuse_difference(
            expert_path(store.folder, expert),
            {key: made_with[key] for key in recipe if key in made_with},
            recipe,
            there_is="the buffer",
            remedy="give another --buffer_path, or the same settings to add experts",
        )


class _Diverged(Exception):
    """An expert's parameters are not finite after epoch ``epoch``."""

    def __init__(self, epoch: int):
        super().__init__()
        self.epoch = epoch


class _Buffer:
    """A folder of experts, all of one recipe, to which others are added one at a time.

    model: what they are parameters of. recipe: what makes an expert what it is. limit: of the time for all.
    """

    def __init__(self, folder: Path, settings: BufferSettings, bench: Workbench, limit: TimeLimit):
        self.folder = folder
        self.settings = settings
        self.bench = bench
        self.limit = limit
        self._took: float | None = None  # seconds, the last expert that was trained here
        # Steps of one expert, not of all: compiled code rounds differently, and an expert is the same however many
        steps = settings.train_epochs * math.ceil(len(bench.data.train_labels) / settings.batch_train)
        compile = how_to_compile(settings.compile, bench.device, 2 * steps)
        self.model = bench.flat_model(settings.model, compile, settings.micro_batch)
        self.recipe = recipe_of(settings)

    def refuse_other_experts(self, *, seen: bool = True) -> None:
        """Raise InputError, naming the first difference, where an expert in the folder was made with another recipe.

        ``seen``: or saw other images, which may first have to be preprocessed.
        """
        if recorded(self.folder):
            store = self.bench.open_experts(self.folder, self.settings.model, self.model)
            refuse_other_recipe(store, self.recipe)
            if seen:
                store.refuse_other(self.bench.describe(self.settings.model, self.model))

    def lock(self, expert: int) -> Path:
        """Held while an expert is trained."""
        return expert_lock(self.folder, expert)

    def has_time(self) -> bool:
        """Whether another expert would end in time; of the first nobody knows."""
        return self._took is None or self._took <= self.limit.left

    def obtain(self, expert: int, training: ExpertTraining, bar: tqdm) -> None:
        """Record an expert, unless it has come to be there; raises Stopped when it diverges whatever is drawn."""
        settings = self.settings
        self.refuse_other_experts()
        if expert_path(self.folder, expert).exists():
            bar.total -= settings.train_epochs
            return
        before = self.limit.used
        for attempt in range(_REPETITIONS + 1):
            try:
                self._record(expert, attempt, training, bar)
                self._took = self.limit.used - before
                return
            except _Diverged as diverged:
                bar.update(-max(0, diverged.epoch - 1))
                then = "trained again with other random numbers" if attempt < _REPETITIONS else "given up"
                log.warning("expert %d is not finite after epoch %d: %s", expert, diverged.epoch, then)
        raise Stopped(
            f"expert {expert} diverged {_REPETITIONS + 1} times; what was finished is kept. Lower lr_teacher "
            f"({settings.lr_teacher:g}), mom ({settings.mom:g}), or rho_max and rho_min ({settings.rho_max:g}); "
            "experts of other settings need another --buffer_path",
            1,
        )

    def _record(self, expert: int, attempt: int, training: ExpertTraining, bar: tqdm) -> None:
        settings, bench = self.settings, self.bench
        again = ("attempt", attempt) if attempt else ()
        start = self.model.flatten(bench.network(settings.model, settings.seed, "expert", expert, *again))
        made_with = {key: value for key, value in self.recipe.items() if key != "seed"} | {"attempt": attempt}
        with (
            contextlib.ExitStack() as turn,
            write_expert(
                self.folder,
                expert,
                bench.describe(settings.model, self.model),
                epochs=settings.train_epochs,
                seed=settings.seed,
                settings=made_with,
                figures=("test_accuracy",),
            ) as record,
        ):
            accuracies = []
            for epoch, theta in enumerate(training.train(expert, start, attempt)):
                snapshot = theta.cpu()
                # Once an epoch: what is not finite stays so, and a loss that is not has made the parameters such.
                if not snapshot.isfinite().all():
                    raise _Diverged(epoch)
                measured = {}
                if settings.eval_every and (epoch % settings.eval_every == 0 or epoch == settings.train_epochs):
                    accuracy = self.model.accuracy(theta, bench.test_images, bench.test_labels)
                    bar.set_postfix(expert=expert, test=f"{100 * accuracy:.1f}%", refresh=False)
                    measured["test_accuracy"] = accuracy
                    accuracies.append(accuracy)
                record(snapshot, **measured)
                bar.update(epoch > 0)
            if accuracies and accuracies[-1] <= accuracies[0]:
                was, now = 100 * accuracies[0], 100 * accuracies[-1]
                log.warning("expert %d tests no better than untrained: %.1f %% before, %.1f %% after", expert, was, now)
            # Until the file has its name: a run with other settings may be about to store its first expert, too.
            turn.enter_context(in_turn(self.folder / ".lock", "storing an expert"))
            self.refuse_other_experts()
