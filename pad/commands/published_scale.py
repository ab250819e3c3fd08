"""The paper's setting on one device, as far as a time allows: experts, iterations, a curve, and rows beside it.

python scripts/published_scale.py --minutes 60 --data_path dataset
"""

import contextlib
import dataclasses
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from pad.commands.bench import Workbench, set_up
from pad.commands.common import words
from pad.commands.distil import distill
from pad.commands.evaluate import EvaluationSettings, evaluate
from pad.commands.record import BufferSettings, record_experts
from pad.commands.trajectory import DistillSettings
from pad.config import (
    PACE,
    PLACE,
    RECIPE,
    REPORT,
    SEED,
    Device,
    FilePath,
    Settings,
    Some,
    checkout,
    path_base,
    read_yaml,
    setting,
)
from pad.distributed import ALONE, Ranks
from pad.errors import InputError
from pad.limit import TimeLimit
from pad.show.pictures import save_grid, unless_it_fails
from pad.show.scale import write_scale_report
from pad.store.files import refuse_unwritable, write_text
from pad.store.identity import refuse_difference
from pad.store.locks import only_writer
from pad.store.run import run_folder, run_state
from pad.store.trajectories import TrajectoryStore, recorded
from pad.streams import silence
from pad.synthetic import SyntheticSet

log = logging.getLogger("pad")

FILES = {  # of stage 1 and stage 2, in configs
    "paper": ("paper/CIFAR-10/buffer.yaml", "paper/CIFAR-10/IPC10.yaml"),
    "published": ("CIFAR-10/buffer-PAD.yaml", "CIFAR-10/ConvIN/IPC10.yaml"),
    "tiny": ("tiny/buffer.yaml", "tiny/IPC2.yaml"),
}
STATED = {"accuracy": 67.4, "std": 0.3, "experts": 100, "iterations": 10000}  # table 1 of the paper

FOR_EXPERTS, FOR_EVALUATION = 1 / 3, 1 / 5  # shares of the time
POINTS = 10  # of the curve, in a call
ROWS = ("syn", "random", "random_soft")  # of the last one
NETWORKS = 5  # to train for each
_AT_ONCE = 1e-6  # seconds, of a limit that is over when it begins
FEWEST_MINUTES = 5.0  # below, not even an expert is trained on a card


@dataclass(frozen=True, kw_only=True)
class PublishedScaleSettings(Settings):
    """``scripts/published_scale.py``: PAD on CIFAR-10, 10 images per class, by the paper's values, in a given time."""

    minutes: float | None = setting(None, "wall-clock minutes that this call may take", PACE, above=0)
    cfg_set: str = setting(
        "paper", "settings of the paper, or of its published code", RECIPE, choices=("paper", "published")
    )
    tiny: bool = setting(False, "a small network on embedded images instead: a minute on a CPU", RECIPE)
    seed: int = setting(0, "seed of every random decision", SEED, low=0)
    data_path: FilePath | None = setting(
        None,
        "folder of torchvision's cifar-10-batches-py, downloaded where it is missing; default: dataset in the checkout",
        PLACE,
    )
    device: Device = setting("auto", "auto, cpu, cuda, cuda:1", PLACE)
    out: FilePath | None = setting(None, "folder of the report; default: runs/published_scale in the checkout", PLACE)
    work: FilePath | None = setting(
        None, "folder of experts, 130 MB each, and run; default: beside out, <out>_work", PLACE
    )

    def check(self) -> None:
        super().check()
        if self.minutes is None:
            raise InputError("minutes: say how long it may take, as --minutes 60")
        if self.tiny and "cfg_set" in self.given:
            raise InputError("tiny and cfg_set exclude each other: tiny has settings of its own")
        if not self.tiny and self.minutes < FEWEST_MINUTES:
            raise InputError(
                f"minutes: {self.minutes:g} are too few, an expert of 100 epochs alone takes minutes; "
                f"give {FEWEST_MINUTES:g} or more, or --tiny"
            )

    @property
    def values(self) -> str:
        """Whose settings the stages have."""
        return "tiny" if self.tiny else self.cfg_set

    @property
    def folders(self) -> tuple[Path, Path]:
        """Of the report, and of all else."""
        out = Path(self.out or checkout() / "runs" / f"published_scale{'_tiny' * self.tiny}").absolute()
        return out, Path(self.work or f"{out}_work").absolute()

    def stages(self) -> tuple[BufferSettings, DistillSettings]:
        """Of stages 1 and 2: those of the files, in the folder of this work."""
        first, second = (checkout() / "configs" / name for name in FILES[self.values])
        _, work = self.folders
        own: dict = {"seed": self.seed, "device": self.device, "buffer_path": str(work / "buffer")}
        if self.data_path is not None:
            own["data_path"] = self.data_path
        buffer = _read(BufferSettings, first, own | {"ranking_path": str(work / "rankings")})
        run = {"log_dir": str(work / "runs"), "name": "run", "resume": True}
        distilling = _read(DistillSettings, second, own | run)
        # Networks are trained for the curve alone, five at a time.
        return buffer, dataclasses.replace(distilling, eval_it=distilling.Iteration + 2)


def _read(kind: type[Some], path: Path, own: dict) -> Some:
    return kind.resolve(kind.with_paths(read_yaml(str(path)), path_base(path)) | own, str(path))


def next_step(left: float, spent: float, each: float, budget: float, points: int) -> tuple[float, bool]:
    """Seconds to distil now, and whether a point of the curve follows; else the last evaluation does.

    Args:
        left: seconds of this call.
        spent: those that evaluation has taken in it.
        each: those that a row takes, of five networks.
        budget: those that evaluation may take. The rows of the last one are kept free whatever it is.
        points: of the curve, that this call has.

    What is left after all evaluation is dealt out evenly between the points, so that they are as far apart in time.
    The last evaluation has the time of one row to spare, since no step ends to the second.
    """
    last = len(ROWS) + 1
    more = max(0, min(int((budget - spent) / each) - last, POINTS - 1 - points))
    return (left - (last + more) * each) / (more + 1), more > 0


@dataclass
class _State:
    """What is known of the work from call to call.

    about: what it is of. seconds: used, by stage. experts: how many, once that is decided. each: seconds for a row of
    five networks, at last.
    """

    path: Path
    about: dict
    seconds: dict[str, float] = field(default_factory=dict)
    experts: int | None = None
    each: float | None = None

    @classmethod
    def at(cls, path: Path, about: dict) -> "_State":
        """What is recorded there, or the beginning. Raises InputError where it is of something else, or damaged."""
        if not path.exists():
            return cls(path, about)
        try:
            state = cls(path, **json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError, RecursionError):
            raise InputError(f"{path} is damaged; give another --work") from None
        refuse_difference(path, state.about, about, there_is="the work", remedy="give another --out")
        return state

    def save(self) -> None:
        known = {each.name: getattr(self, each.name) for each in dataclasses.fields(self) if each.name != "path"}
        write_text(self.path, json.dumps(known, indent=2, sort_keys=True) + "\n")


def published_scale(settings: PublishedScaleSettings, ranks: Ranks = ALONE) -> Path:
    """Train experts in a third of the time, evaluate in a fifth, distil in the rest. Returns the folder of the report.

    The first call decides how many experts there are: as many as fit, at least one. Each call adds iterations, and up
    to ten points to the curve. What does not fit is not begun, as far as is known of the time that it takes, which is
    measured; the first expert, iteration and evaluation are done whatever they take. Killed at any moment, the command
    goes on. Raises InputError before any work for what cannot be used.
    """
    limit = TimeLimit(60 * (settings.minutes or 0))
    if ranks.size > 1:
        raise InputError("published_scale is about one device; start it without torchrun")
    out, work = settings.folders
    for folder in (out, work):
        refuse_unwritable(folder)
    if (out / "results.json").exists() and not (work / "state.json").exists():
        raise InputError(f"{out} holds the report of work that is not in {work}; give another --out, or its --work")
    stages = settings.stages()
    with only_writer(work.with_name(f".{work.name}.lock"), f"the folder {work}"):
        state = _State.at(work / "state.json", {"settings": settings.values, "seed": settings.seed})
        experiment = _Experiment(set_up(stages[0], ranks), *stages, state=state, limit=limit)
        try:
            experiment.go_on()
        finally:  # an interrupted one shows what is there
            if state.experts is not None:
                _report(experiment, out)
    log.info("the report is in %s; experts and run are in %s", out, work)
    return out


class _Experiment:
    """The stages, in one call."""

    def __init__(
        self, bench: Workbench, buffer: BufferSettings, distilling: DistillSettings, *, state: _State, limit: TimeLimit
    ):
        self.bench, self.buffer, self.distilling = bench, buffer, distilling
        self.state, self.limit = state, limit
        self.experts = bench.experts_folder(buffer.buffer_path, buffer.model)
        self.run = run_folder(
            distilling.log_dir, bench.data.name, distilling.ipc, distilling.model, name=distilling.name
        )
        self.first, self.last = (self.run / "Normal" / f"synthetic_{tag}.safetensors" for tag in (0, "last"))
        self.evaluated = state.path.parent / "evaluated"

    @property
    def is_finished(self) -> bool:
        """Whether all iterations are done."""
        return run_state(self.run) == "finished"

    @property
    def iterations(self) -> int:
        """Those that are done."""
        return SyntheticSet.load(self.last).metadata["iteration"] if self.last.exists() else 0

    def _file(self, iteration: int) -> Path:
        """Of what stage 3 found of the set as it was after so many iterations."""
        return self.evaluated / f"iteration_{iteration:06d}.json"

    def _asked(self, iteration: int) -> list[str]:
        """The rows that stage 3 was asked for then; it leaves out what weak experts cannot label."""
        file = self._file(iteration)
        return words(json.loads(file.read_text(encoding="utf-8"))["settings"]["rows"]) if file.exists() else []

    def go_on(self) -> None:
        """Do what fits into the time."""
        state, limit = self.state, self.limit
        if state.experts is None:
            self._train()
        if limit.is_over or (self.is_finished and len(self._asked(self.iterations)) == len(ROWS)):
            return
        self._distil(0)  # one iteration: from then on its code is compiled
        if limit.is_over:
            return
        self._evaluate(self.last, epochs=1)  # for the same reason
        before, points = state.seconds["evaluation"], 0
        if state.each is None:
            self._evaluate(self.first)
            points = 1
        more = True
        while more and not self.is_finished:
            spent = state.seconds["evaluation"] - before
            seconds, more = next_step(limit.left, spent, self._each, FOR_EVALUATION * limit.seconds, points)
            if seconds <= 0:
                break
            self._distil(seconds)
            if more and not self.is_finished:
                self._evaluate(self.last)
                points += 1
        rows = ROWS[: max(0, int(limit.left / self._each))]
        if len(rows) > len(self._asked(self.iterations)):  # else what an earlier call found would be lost for no more
            self._evaluate(self.last, rows)

    @property
    def _each(self) -> float:
        assert self.state.each is not None, "something was evaluated"
        return self.state.each

    def _train(self) -> None:
        """As many experts as the time for them allows. From now on that is their number."""
        seconds = max(FOR_EXPERTS * self.limit.seconds - self.limit.used, _AT_ONCE)
        with self._timed("experts"):
            record_experts(dataclasses.replace(self.buffer, time_limit=seconds), bench=self.bench)
            self.state.experts = len(recorded(self.experts))

    def _distil(self, seconds: float) -> None:
        with self._timed("distilling"):
            distill(dataclasses.replace(self.distilling, time_limit=seconds or _AT_ONCE), bench=self.bench)

    def _evaluate(self, path: Path, rows: Sequence[str] = ROWS[:1], epochs: int | None = None) -> None:
        """Five networks for each of the rows, as a point of the curve.

        ``epochs``: of a rehearsal, which is none.
        """
        synthetic, before = SyntheticSet.load(path), self.limit.used
        file = self.evaluated / "rehearsal.json" if epochs else self._file(synthetic.metadata["iteration"])
        kept = file.with_suffix(".safetensors")
        synthetic.save(kept)
        shared = self.distilling.of(PLACE, SEED, REPORT).items()
        asked = {name: value for name, value in shared if name in EvaluationSettings.fields()}
        asked |= {"synthetic": str(kept), "out": str(file), "overwrite": True}
        asked |= {"rows": ",".join(rows), "num_eval": NETWORKS} | ({"epoch_eval_train": epochs} if epochs else {})
        with self._timed("evaluation"):
            with silence():
                found = evaluate(EvaluationSettings.resolve(asked), bench=self.bench)["results"][0]
            if epochs is None:
                self.state.each = (self.limit.used - before) / len(rows)
                log.info("after %d iterations: %.2f %%", synthetic.metadata["iteration"], 100 * found["mean"])

    @contextlib.contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        """What the block takes is noted down, also of one that is interrupted."""
        before = self.limit.used
        try:
            yield
        finally:
            self.state.seconds[stage] = self.state.seconds.get(stage, 0) + self.limit.used - before
            self.state.save()

    def points(self) -> list[tuple[int, list[dict]]]:
        """Iterations, in order, and the results of stage 3 on the set as it then was."""
        files = sorted(self.evaluated.glob("iteration_*.json"))
        return [
            (int(file.stem.split("_")[1]), json.loads(file.read_text(encoding="utf-8"))["results"]) for file in files
        ]

    def results(self) -> dict:
        """What there is to report, as plain values."""
        bench, buffer, distilling, points = self.bench, self.buffer, self.distilling, self.points()
        store = TrajectoryStore.open(self.experts)
        tested = {str(k): store.figures(k)["test_accuracy"][-1].item() for k in store.experts[: self.state.experts]}
        cpu = f"a CPU, threads: {torch.get_num_threads()}"
        return {
            **self.state.about,
            "dataset": bench.data.name,
            "ipc": distilling.ipc,
            "machine": torch.cuda.get_device_name(bench.device) if bench.device.type == "cuda" else cpu,
            "torch": torch.__version__,
            "seconds": self.state.seconds,
            "experts": {"wanted": buffer.num_experts, "epochs": buffer.train_epochs, "test_accuracy": tested},
            "iterations": {"done": self.iterations, "wanted": distilling.Iteration + 1},
            "curve": [{"iteration": iteration, **rows[0]} for iteration, rows in points],
            "rows": points[-1][1] if points else [],
            "stated": None if self.state.about["settings"] == "tiny" else STATED,
            "folders": {"experts": str(self.experts), "run": str(self.run)},
        }


def _report(experiment: _Experiment, out: Path) -> None:
    """Everything that is small: results, curve, the set, and the lines of the run."""
    found = experiment.results()
    write_text(out / "results.json", json.dumps(found, indent=2, sort_keys=True) + "\n")
    write_scale_report(out, found)
    if experiment.last.exists():
        synthetic = SyntheticSet.load(experiment.last)
        synthetic.save(out / "synthetic.safetensors")
        with unless_it_fails("synthetic"):
            save_grid(out / "synthetic.png", synthetic.pixels(), synthetic.classes, synthetic.class_names)
    for name in ("config.yaml", "metrics.jsonl", "timing.jsonl"):
        if (experiment.run / name).exists():
            write_text(out / name, (experiment.run / name).read_text(encoding="utf-8"))
