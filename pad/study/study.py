"""A study: every cell of a grid is a whole pipeline; a table, a plot and pictures of what came out.

Cells are calls of the commands' own recipes, which go on where they were stopped and make nothing twice; what a cell
makes lies under a name that says its settings, so what other settings made is never taken for it. Studies that have a
store in common share their cells.
"""

import contextlib
import dataclasses
import functools
import json
import logging
import statistics
import time
import traceback
from pathlib import Path

import numpy as np

from pad.commands.bench import Workbench, set_up
from pad.commands.coreset import CoresetSettings, select_coreset
from pad.commands.distil import Distilling, distill
from pad.commands.evaluate import EvaluationSettings, evaluate, what_is_asked
from pad.commands.following import FromEpochs
from pad.commands.quantise import QuantiseSettings, quantise
from pad.commands.record import record_experts
from pad.config import FilePath
from pad.distributed import ALONE, Ranks
from pad.errors import InputError, Stopped, is_of_memory
from pad.show.figures import draw_figure
from pad.show.layers import plot_layers_of
from pad.show.pictures import image_grid, unless_it_fails
from pad.store.files import refuse_unwritable, save_picture, slug, write_text
from pad.store.locks import each_once, in_turn, remove_leftovers
from pad.store.run import costs, run_folder
from pad.streams import silence
from pad.study.frame import frame_of
from pad.study.grid import Cell, Grid, StudySettings
from pad.study.report import Outcome, write_report
from pad.study.rows import in_words
from pad.synthetic import SyntheticSet

log = logging.getLogger("pad")


def study(settings: StudySettings, ranks: Ranks = ALONE) -> list[Outcome]:
    """Run the cells of a study that are not done yet, then report on all. Returns what came out, in the file's order.

    Several processes may be started on one study: each takes the cells that no other has begun. A cell that fails is
    reported, and the others go on; given again, the command tries it again. Raises InputError, before any work, for a
    file that is no study, and for settings that a command does not take, naming the method; Stopped in the end, when
    cells failed.
    """
    if ranks.size > 1:
        raise InputError(
            "a study is not for torchrun: start the command several times, and the processes share its cells"
        )
    grid = Grid.read(settings)
    cells = grid.cells()
    # What is made of another cell's set comes last, so that no process waits for one while others are to be made
    wanted = sorted(grid.wanted(settings, cells), key=lambda cell: cell.of is not None)
    frame = frame_of(grid)
    for folder in (grid.out, grid.store):
        refuse_unwritable(folder)
    for folder in (grid.store / "cells", grid.sets):
        remove_leftovers(folder)
    work = _Work(grid)
    work.begin(wanted)
    try:
        each_once(wanted, work.lock, work.obtain, lambda cell: cell.about)
    finally:  # an interrupted study shows what is there
        outcomes = [work.outcome(cell) for cell in cells]
        if any(outcome.accuracies or outcome.failed for outcome in outcomes):
            write_report(grid.out, _costed(grid.store, outcomes), grid.reference, frame)
            if grid.shares:
                with contextlib.suppress(OSError):  # no cell has needed the images yet
                    write_text(grid.out / "data.json", (grid.store / "data.json").read_text(encoding="utf-8"))
            if not (asked := grid.out / "asked.yaml").exists() or not asked.samefile(grid.where):
                write_text(asked, f"# {settings.command(grid)}\n{grid.text}")
            _pictures(grid, outcomes)
    log.info("tables, plot and pictures are in %s", grid.out)
    if failed := sum(outcome.failed is not None for outcome in outcomes):
        raise Stopped(
            f"{failed} of {len(cells)} cells failed, see {grid.out / 'results.md'}; the command tries them again", 1
        )
    return outcomes


class _Work:
    """The cells of a study: what is recorded of them, and how others are run."""

    def __init__(self, grid: Grid):
        self._grid = grid
        self._began = time.time()

    @functools.cached_property
    def bench(self) -> Workbench:
        """The images, which all cells share."""
        return set_up(self._grid.common, ALONE)

    def begin(self, cells: list[Cell]) -> None:
        """Note the images, unless all is done. Raises InputError for others than the study was begun with.

        And for networks, rows, sizes and start epochs of cells that are not done which cannot be had.
        """
        undone = [cell.of or cell for cell in cells if not self.outcome(cell).accuracies]
        if not undone:
            return
        path, here, before = self._grid.store / "data.json", self.bench.data.tested, None
        with contextlib.suppress(OSError, ValueError, AttributeError):  # not there, or damaged
            before = json.loads(path.read_text(encoding="utf-8")).items()
        if before is not None and not before <= here.items():  # earlier versions did not note the test images
            other = f"with other images than {self._grid.common.data_path} has"
            folder = "--store" if self._grid.shares else "--out"
            raise InputError(f"the study in {self._grid.store} was begun {other}; give another {folder}")
        with silence():
            self._refuse_unfit(undone)
        if before is None:
            write_text(path, json.dumps(here, indent=2, sort_keys=True) + "\n")

    def _refuse_unfit(self, cells: list[Cell]) -> None:
        """Raise InputError for what these images or experts do not go with; cells are evaluated alike once."""
        distilling = [cell.distilling for cell in cells if isinstance(cell.distilling, Distilling)]
        self.bench.refuse_unfit(sorted({name for each in distilling for name in (each.model, *each.pool)}))
        known: set[tuple[bool, int, bool]] = set()
        for cell in cells:
            hard = getattr(cell.distilling, "labels", "hard") == "hard"
            ipc = cell.ipc * getattr(cell.distilling, "factor", 1) ** 2
            alike = hard, ipc, "buffer_path" in cell.evaluation
            try:
                if cell.buffer is not None and isinstance(cell.distilling, FromEpochs):
                    cell.distilling.refuse_short(cell.buffer.train_epochs)
                if alike not in known:
                    scored = EvaluationSettings.resolve(cell.evaluation | {"synthetic": "."})
                    what_is_asked(scored, self.bench, hard=hard, counts=[ipc] * self.bench.data.num_classes)
            except InputError as error:
                raise InputError(f"{cell.about}: {error}") from None
            known.add(alike)

    def lock(self, cell: Cell) -> Path:
        """Held while a cell is run."""
        return self._grid.store / "cells" / f".{cell.name}.lock"

    def _record(self, cell: Cell) -> Path:
        return self._shared(self._grid.store / "cells" / f"{cell.name}.json")

    def _shared(self, path: Path) -> Path:
        """The record at ``path``, or in a store that is of several studies that of the same under another's name."""
        return self._grid.by_digest(path) if self._grid.shares else path

    def outcome(self, cell: Cell) -> Outcome:
        """What is recorded of a cell."""
        record = {}
        with contextlib.suppress(OSError, ValueError):  # not there, or damaged: to be done
            record = json.loads(self._record(cell).read_text(encoding="utf-8"))
        return Outcome(
            method=cell.method,
            ipc=cell.ipc,
            seed=cell.seed,
            of=cell.of.method if cell.of else None,
            accuracies=record.get("accuracies"),
            failed=record.get("failed"),
            seconds=record.get("seconds"),
            made=record.get("set"),
            results=record.get("results"),
            metrics=record.get("metrics"),
            distilling=record.get("distilling"),
        )

    def obtain(self, cell: Cell) -> None:
        """Run a cell that is not done. One that has failed since this command began was tried by another process."""
        before = self.outcome(cell)
        if before.accuracies or (before.failed and self._record(cell).stat().st_mtime >= self._began):
            return
        if cell.of is not None:
            with in_turn(self.lock(cell.of), cell.of.about):
                self.obtain(cell.of)
        log.info("== %s", cell.about)
        started = time.perf_counter()
        record = {"method": cell.method, "ipc": cell.ipc, "seed": cell.seed, "recipe": cell.recipe}
        bench = self.bench  # what is wrong with the images is no cell's failure
        try:
            # A line is said of it below. Another study may have a cell of the same set
            with silence(), in_turn(self._grid.sets / f".{cell.made}.lock", f"the set of {cell.about}"):
                made = self._made(cell, bench)
                synthetic = str(self._grid.store / made["set"])
                scored = EvaluationSettings.resolve(cell.evaluation | {"synthetic": synthetic, "overwrite": True})
                found = evaluate(scored, bench=bench)
            accuracies = found["results"][0]["accuracies"]
            record |= {**made, "accuracies": accuracies, **_more(found)}
            said = f"{100 * statistics.mean(accuracies):.2f} %"
        except Stopped as stop:
            if stop.code > 128:  # a signal
                raise
            record["failed"] = str(stop)
        except (InputError, OSError) as error:
            record["failed"] = str(error)
        except Exception as error:  # of one cell: the others may do
            if is_of_memory(error):
                record["failed"] = "not enough memory"
            else:
                traceback.print_exc()
                record["failed"] = f"{type(error).__name__}: {error}"
        record["seconds"] = round((before.seconds or 0) + time.perf_counter() - started, 1)
        write_text(self._record(cell), json.dumps(record, indent=2, sort_keys=True) + "\n")
        if "failed" in record:
            log.warning("%s failed: %s", cell.about, record["failed"])
        else:
            print(f"{cell.about}: {said} ({record['seconds']:.0f} s)", flush=True)

    def _made(self, cell: Cell, bench: Workbench) -> dict:
        """What is recorded of a cell's set, which is made where that is not done: its file, and what distilling took.

        Cells that differ in the evaluation alone have one set.
        """
        record = self._shared(self._grid.sets / f"{cell.made}.json")
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):  # not there, or damaged
            made = json.loads(record.read_text(encoding="utf-8"))
            if (self._grid.store / made["set"]).exists():
                return made
        path = _make(cell, bench, self._whole(cell))
        made = {"set": str(path.relative_to(self._grid.store))}
        if isinstance(cell.distilling, Distilling):
            made["distilling"] = costs(path.parents[1], SyntheticSet.load(path).metadata["iteration"])
        write_text(record, json.dumps(made, indent=2, sort_keys=True) + "\n")
        return made

    def _whole(self, cell: Cell) -> str | None:
        """The file of the set that a cell's is made of, if it is. Raises InputError where that failed."""
        if cell.of is None:
            return None
        whole = self.outcome(cell.of)
        if whole.made is None:
            raise InputError(f"there is no set of {cell.of.about}")
        return str(self._grid.store / whole.made)


def _make(cell: Cell, bench: Workbench, whole: str | None) -> Path:
    """Experts and set. Returns the set's file.

    ``whole``: the file of the set that is to be quantised.
    """
    if isinstance(cell.distilling, QuantiseSettings):
        return quantise(dataclasses.replace(cell.distilling, source=FilePath(str(whole))))
    if cell.buffer is not None:
        record_experts(cell.buffer, bench=bench)
    if isinstance(cell.distilling, CoresetSettings):
        return select_coreset(cell.distilling, bench=bench)
    return _distilled(cell.distilling, bench)


def _distilled(settings: Distilling, bench: Workbench) -> Path:
    """The file of a distilled set. A run that was stopped has what it left of its ``time_limit``."""
    place = settings.log_dir, bench.data.name, settings.ipc, settings.model
    made = run_folder(*place, name=str(settings.name)) / "Normal" / "synthetic_last.safetensors"
    if settings.time_limit is not None and made.exists():
        spent = costs(made.parents[1], SyntheticSet.load(made).metadata["iteration"])["seconds"]
        if spent >= settings.time_limit:
            return made
        settings = dataclasses.replace(settings, time_limit=settings.time_limit - spent)
    distill(settings, bench=bench)
    return made


def _more(found: dict) -> dict:
    """What a record keeps of results that are more than the accuracies of one network on one training set."""
    if len(found["results"]) == 1 and "last" not in found["results"][0]:
        return {}
    return {"results": found["results"], "metrics": found.get("metrics") or {}}


def _costed(store: Path, outcomes: list[Outcome]) -> list[Outcome]:
    """With what their sets cost, where sets are there in fewer bits."""
    if not any(outcome.of for outcome in outcomes):
        return outcomes
    found = []
    for outcome in outcomes:
        bits = None
        with contextlib.suppress(InputError):  # it is gone, or damaged
            bits = SyntheticSet.load(store / outcome.made).cost.per_class if outcome.made else None
        found.append(dataclasses.replace(outcome, bits=bits))
    return found


def _pictures(grid: Grid, outcomes: list[Outcome]) -> None:
    """Of the first seed's sets: a small picture of each, to stand side by side, and the figures that are asked for."""
    firsts = {(outcome.ipc, outcome.method): outcome for outcome in reversed(outcomes) if outcome.made}
    shown: dict[int, list[np.ndarray]] = {}
    for outcome in sorted(firsts.values(), key=lambda each: list(grid.methods).index(each.method)):
        with unless_it_fails(f"of {outcome.method}"):
            synthetic = SyntheticSet.load(grid.store / str(outcome.made))
            picture = image_grid(
                synthetic.pixels(),
                synthetic.classes,
                synthetic.class_names,
                caption=f"{outcome.method}, seed {outcome.seed}",
                scale=1,
            )
            save_picture(grid.out / "pictures" / f"{slug(outcome.method)}_ipc{outcome.ipc}.png", picture)
            shown.setdefault(outcome.ipc, []).append(picture)
    if "sets" in grid.figures:
        for ipc, pictures in shown.items():
            with unless_it_fails(f"of the sets of {ipc} images per class"):
                save_picture(grid.out / f"sets_ipc{ipc}.png", np.concatenate(pictures, axis=1))
    if "layers" in grid.figures:
        runs = {}
        for (ipc, method), outcome in sorted(firsts.items()):
            events = (grid.store / str(outcome.made)).parents[1] / "metrics.jsonl"
            with unless_it_fails(f"of the layers of {method}"):
                lines = map(json.loads, events.read_text(encoding="utf-8").splitlines())
                runs[f"{method}, {in_words(ipc)}"] = [each for each in lines if "layers" in each]
        if any(runs.values()):
            draw_figure(grid.out / "layers.png", plot_layers_of, {name: run for name, run in runs.items() if run})
