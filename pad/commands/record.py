"""Stage 1: rank the real images, train experts on the curriculum, record their trajectories."""

import contextlib
import logging
import math
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from pad.commands.bench import Workbench, check_writable, digest_of_rows, experts_folder, set_up
from pad.commands.common import _Curriculum, _Ranked, _Stage
from pad.config import FilePath, setting
from pad.data.augment import DSA, CropScaleRotate
from pad.distributed import ALONE, Ranks
from pad.errors import InputError, Stopped
from pad.experts.curriculum import Curriculum
from pad.experts.gsam import GSAM
from pad.experts.trainer import ExpertTask
from pad.nn.derivatives import how_to_compile
from pad.nn.flat import FlatModel
from pad.store.locks import claim, in_turn, remove_leftovers
from pad.store.trajectories import expert_path, recorded, write_expert


@dataclass(kw_only=True)
class BufferSettings(_Stage, _Ranked, _Curriculum):
    """Stage 1, ``buffer/buffer_CL.py``: rank the real images, train experts on the curriculum, record their trajectories."""

    num_experts: int = setting(100, "experts to train", low=1)
    lr_teacher: float = setting(0.01, "learning rate of the experts", above=0)
    mom: float = setting(0.0, "momentum", low=0, below=1)
    l2: float = setting(0.0, "weight decay", low=0)
    rho_max: float = setting(2.0, "GSAM's radius", low=0)
    rho_min: float = setting(2.0, "must equal rho_max: the learning rate is constant, and rho follows it", low=0)
    alpha: float = setting(0.4, "weight of GSAM's surrogate-gap term", low=0)
    adaptive: bool = setting(True, "scale GSAM's perturbation by the parameters (ASAM)")
    buffer_path: FilePath = setting("./buffers", "folder of the trajectories")
    eval_every: int = setting(1, "epochs between measurements of test accuracy; 0: never", low=0)
    micro_batch: int | None = setting(None, "compute on so many images at a time: less memory, the same result", low=1)

    sort_method: str = setting("", "difficulty method, or a ranking file's stem as CIFAR10_GraNd; default: GraNd")

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


log = logging.getLogger("pad")


def record_experts(settings: BufferSettings, ranks: Ranks = ALONE, bench: Workbench | None = None) -> Path:
    """Stage 1: rank the real images, train experts on the curriculum, record them. Returns the folder of trajectories.

    Experts that are there already are kept, so a stopped run goes on and a buffer can grow. Those that are missing are
    dealt to the ranks, each of which writes its own files. Several runs on one folder share the work: each takes the
    experts that no other has begun, and in the end waits for those that others have.
    """
    bench = bench or set_up(settings, ranks)
    n = len(bench.labels)
    if settings.batch_train > n:
        raise InputError(
            f"batch_train: {settings.batch_train} is more than the {n} training images of {bench.data.name}"
        )
    curriculum = Curriculum(**settings.curriculum)
    rows = [(bench.data.train_labels == c).nonzero().flatten() for c in range(bench.data.num_classes)]
    if not all(len(curriculum.indices(epoch, rows)) for epoch in range(settings.train_epochs)):
        raise InputError("the curriculum leaves an epoch without images: the classes are too small for its ratios")
    folder = experts_folder(settings, bench.data)
    check_writable(folder)
    remove_leftovers(folder)
    uses_ranking = curriculum.uses_ranking(settings.train_epochs)
    if uses_ranking:
        rankings = bench.settle_ranking(settings)
    else:
        settings.sort_method = ""
    # One expert's steps, not those of all: compiled code rounds differently, and an expert must not depend on their number.
    steps = settings.train_epochs * math.ceil(n / settings.batch_train)
    compile = how_to_compile(settings.compile, bench.device, 2 * steps)
    model = bench.flat_model(settings.model, compile, settings.micro_batch)
    recipe = {key: value for key, value in settings.as_dict().items() if key in (*_EXPERT_RECIPE, "seed")}
    _check_buffer(folder, recipe, bench, settings.model, model)
    there = set().union(*ranks.gather(recorded(folder)))
    missing = [k for k in range(settings.num_experts) if k not in there]
    if there:
        _check_buffer(folder, recipe, bench, settings.model, model, bench.describe(settings.model, model))
    if not missing:
        log.info("all %d experts are in %s", settings.num_experts, folder)
        return folder

    if uses_ranking:
        method = settings.sort_method
        rows = bench.rankings([method], rankings, settings, convert_flat=settings.convert_flat)[method].rows
        recipe["ranking"] = digest_of_rows(rows)
    task = ExpertTask(
        model,
        bench.images,
        bench.labels,
        bench.data.num_classes,
        lambda epoch: curriculum.indices(epoch, rows),
        GSAM(settings.lr_teacher, settings.mom, settings.l2, settings.rho_max, settings.alpha, settings.adaptive),
        DSA(settings.dsa_strategy, settings.siamese) if settings.dsa else CropScaleRotate(),
        settings.batch_train,
        settings.train_epochs,
        settings.seed,
    )
    mine = ranks.deal(missing)
    with tqdm(
        total=len(mine) * settings.train_epochs,
        desc="experts",
        unit="epoch",
        dynamic_ncols=True,
        disable=not ranks.is_main,
    ) as bar:
        recorder = _Recorder(folder, settings, bench, model, task, recipe, bench.describe(settings.model, model), bar)
        others = []
        for expert in mine:
            with claim(recorder.lock(expert)) as claimed:
                if claimed:
                    recorder.obtain(expert)
                else:
                    others.append(expert)
        for expert in others:  # begun by other processes, which may have ended before they were done
            with in_turn(recorder.lock(expert), f"expert {expert}"):
                recorder.obtain(expert)
    ranks.barrier()
    log.info("%d experts are in %s", len(recorded(folder)), folder)
    return folder


_REPETITIONS = 3  # of an expert that diverges


class _Diverged(Exception):
    """An expert's parameters are not finite after epoch ``epoch``."""

    def __init__(self, epoch: int):
        self.epoch = epoch


@dataclass(frozen=True)
class _Recorder:
    """Records experts, one at a time."""

    folder: Path
    settings: BufferSettings
    bench: Workbench
    model: FlatModel
    task: ExpertTask
    recipe: dict  # what makes an expert what it is
    description: dict  # what it belongs to
    bar: tqdm

    def lock(self, expert: int) -> Path:
        """Held while an expert is trained."""
        return self.folder / f".{expert_path('', expert).stem}.lock"

    def obtain(self, expert: int) -> None:
        """Record an expert, unless it has come to be there; raises Stopped when it diverges whatever is drawn."""
        self._check()
        if expert_path(self.folder, expert).exists():
            self.bar.total -= self.settings.train_epochs
            return
        for attempt in range(_REPETITIONS + 1):
            try:
                return self._record(expert, attempt)
            except _Diverged as diverged:
                self.bar.update(-max(0, diverged.epoch - 1))
                then = "trained again with other random numbers" if attempt < _REPETITIONS else "given up"
                log.warning("expert %d is not finite after epoch %d: %s", expert, diverged.epoch, then)
        raise Stopped(
            f"expert {expert} diverged {_REPETITIONS + 1} times; what was finished is kept. Lower lr_teacher "
            f"({self.settings.lr_teacher:g}), mom ({self.settings.mom:g}), or rho_max and rho_min "
            f"({self.settings.rho_max:g}); experts of other settings need another --buffer_path",
            1,
        )

    def _record(self, expert: int, attempt: int) -> None:
        settings, again = self.settings, ("attempt", attempt) if attempt else ()
        start = self.model.flatten(self.bench.network(settings.model, settings.seed, "expert", expert, *again))
        made_with = {key: value for key, value in self.recipe.items() if key != "seed"} | {"attempt": attempt}
        with (
            contextlib.ExitStack() as turn,
            write_expert(
                self.folder,
                expert,
                self.description,
                epochs=settings.train_epochs,
                seed=settings.seed,
                settings=made_with,
                figures=("test_accuracy",),
            ) as record,
        ):
            for epoch, theta in enumerate(self.task.train(expert, start, attempt)):
                snapshot = theta.cpu()
                # Once an epoch: what is not finite stays so, and a loss that is not has made the parameters such.
                if not snapshot.isfinite().all():
                    raise _Diverged(epoch)
                last = epoch == settings.train_epochs
                if settings.eval_every and (epoch % settings.eval_every == 0 or last):
                    accuracy = self.model.accuracy(theta, self.bench.test_images, self.bench.test_labels)
                    self.bar.set_postfix(expert=expert, test=f"{100 * accuracy:.1f}%", refresh=False)
                    record(snapshot, test_accuracy=accuracy)
                else:
                    record(snapshot)
                self.bar.update(epoch > 0)
            # Until the file has its name: a run with other settings may be about to store its first expert, too.
            turn.enter_context(in_turn(self.folder / ".lock", "storing an expert"))
            self._check()

    def _check(self) -> None:
        _check_buffer(self.folder, self.recipe, self.bench, self.settings.model, self.model, self.description)


# The settings that make an expert what it is; a buffer holds experts of one recipe.
_EXPERT_RECIPE = frozenset(
    "train_epochs lr_teacher mom l2 rho_max alpha adaptive batch_train dsa dsa_strategy siamese sort_method "
    "init_ratio add_end_epoch add_schedule rm_epoch_first rm_epoch_second rm_easy_ratio_first rm_easy_ratio_second "
    "removal".split()
)


def _check_buffer(
    folder: Path, recipe: dict, bench: Workbench, name: str, model: FlatModel, description: dict | None = None
) -> None:
    """Raise InputError, naming the first difference, where an expert in ``folder`` was made with another recipe.

    ``description``: what the experts belong to, once the preprocessing is known.
    """
    if not recorded(folder):
        return
    store = bench.open_experts(folder, name, model)
    defaults = BufferSettings().as_dict()  # a buffer that is older than a setting was made as its default has it
    for expert in store.experts:
        header = store.header(expert)
        if "imported" in header["settings"]:
            raise InputError(f"the experts in {folder} were imported, so none can be added; give another --buffer_path")
        made_with = {**defaults, **header["settings"], "seed": header["seed"]}
        for key, value in recipe.items():
            if made_with.get(key, value) != value:
                raise InputError(
                    f"{expert_path(folder, expert)}: {key}: {made_with[key]} in the buffer, {value} in the config; "
                    "give another --buffer_path, or the same settings to add experts"
                )
    if description is not None:
        store.check(description)
