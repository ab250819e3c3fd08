"""A study: every cell of a grid is a whole pipeline; a table, a plot and pictures of what came out.

Cells are calls of the commands' own recipes, which go on where they were stopped and make nothing twice; what a cell
makes lies under a name that says its settings, so what other settings made is never taken for it.
"""

import contextlib
import functools
import json
import logging
import statistics
import time
import traceback
from pathlib import Path

from pad.commands.bench import Workbench, set_up
from pad.commands.coreset import CoresetSettings, select_coreset
from pad.commands.distil import distill
from pad.commands.evaluate import EvaluationSettings, evaluate, what_is_asked
from pad.commands.record import record_experts
from pad.distributed import ALONE, Ranks
from pad.errors import InputError, Stopped, is_of_memory
from pad.show.pictures import save_grid, unless_it_fails
from pad.store.files import refuse_unwritable, slug, write_text
from pad.store.locks import each_once, remove_leftovers
from pad.store.run import costs
from pad.streams import silence
from pad.study.grid import Cell, Grid, StudySettings
from pad.study.report import Outcome, write_report
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
    wanted = grid.wanted(settings, cells)
    refuse_unwritable(grid.out)
    remove_leftovers(grid.out / "cells")
    work = _Work(grid)
    try:
        each_once(wanted, work.lock, work.obtain, lambda cell: cell.about)
    finally:  # an interrupted study shows what is there
        outcomes = [work.outcome(cell) for cell in cells]
        if any(outcome.accuracies or outcome.failed for outcome in outcomes):
            write_report(grid.out, outcomes, grid.reference, costs=grid.costs)
            if not (asked := grid.out / "asked.yaml").exists() or not asked.samefile(grid.where):
                write_text(asked, f"# {settings.command(grid)}\n{grid.text}")
            _pictures(grid.out, outcomes)
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
        """The images, which all cells share. Raises InputError when the study was begun with others."""
        bench = set_up(self._grid.common, ALONE)
        path = self._grid.out / "data.json"
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # not there, or damaged
            write_text(path, json.dumps(bench.data.identity, indent=2, sort_keys=True) + "\n")
        else:
            if before != json.loads(json.dumps(bench.data.identity)):
                other = f"with other images than {self._grid.common.data_path} has"
                raise InputError(f"the study in {self._grid.out} was begun {other}; give another --out")
        return bench

    def lock(self, cell: Cell) -> Path:
        """Held while a cell is run."""
        return self._grid.out / "cells" / f".{cell.name}.lock"

    def _record(self, cell: Cell) -> Path:
        return self._grid.out / "cells" / f"{cell.name}.json"

    def outcome(self, cell: Cell) -> Outcome:
        """What is recorded of a cell."""
        record = {}
        with contextlib.suppress(OSError, ValueError):  # not there, or damaged: to be done
            record = json.loads(self._record(cell).read_text(encoding="utf-8"))
        return Outcome(
            method=cell.method,
            ipc=cell.ipc,
            seed=cell.seed,
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
        log.info("== %s", cell.about)
        started = time.perf_counter()
        record = {"method": cell.method, "ipc": cell.ipc, "seed": cell.seed, "recipe": cell.recipe}
        bench = self.bench  # those of another study are no cell's failure
        try:
            with silence():  # a line is said of it below
                made, found = _run(cell, bench)
            accuracies = found["results"][0]["accuracies"]
            if not isinstance(cell.distilling, CoresetSettings):
                record["distilling"] = costs(made.parents[1], SyntheticSet.load(made).metadata["iteration"])
            record |= {"set": str(made.relative_to(self._grid.out)), "accuracies": accuracies, **_more(found)}
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


def _run(cell: Cell, bench: Workbench) -> tuple[Path, dict]:
    """Experts, set and evaluation. Returns the set's file, and the results of the networks trained on it."""
    scored = EvaluationSettings.resolve(cell.evaluation | {"synthetic": ".", "overwrite": True})
    hard = getattr(cell.distilling, "labels", "hard") == "hard"
    ipc = cell.ipc * getattr(cell.distilling, "factor", 1) ** 2
    what_is_asked(scored, bench, hard=hard, ipc=ipc)  # what it refuses is refused before the set is made
    if cell.buffer is not None:
        record_experts(cell.buffer, bench=bench)
    if isinstance(cell.distilling, CoresetSettings):
        made = select_coreset(cell.distilling, bench=bench)
    else:
        made = distill(cell.distilling, bench=bench) / "Normal" / "synthetic_last.safetensors"
    settings = EvaluationSettings.resolve(cell.evaluation | {"synthetic": str(made), "overwrite": True})
    return made, evaluate(settings, bench=bench)


def _more(found: dict) -> dict:
    """What a record keeps of results that are more than the accuracies of one network on one training set."""
    if len(found["results"]) == 1 and "last" not in found["results"][0]:
        return {}
    return {"results": found["results"], "metrics": found.get("metrics") or {}}


def _pictures(out: Path, outcomes: list[Outcome]) -> None:
    """One small picture for each method and size, to stand side by side: of the first seed's set."""
    for outcome in {(outcome.method, outcome.ipc): outcome for outcome in reversed(outcomes) if outcome.made}.values():
        with unless_it_fails(f"of {outcome.method}"):
            synthetic = SyntheticSet.load(out / str(outcome.made))
            save_grid(
                out / "pictures" / f"{slug(outcome.method)}_ipc{outcome.ipc}.png",
                synthetic.pixels(),
                synthetic.classes,
                synthetic.class_names,
                caption=f"{outcome.method}, seed {outcome.seed}",
                scale=1,
            )
