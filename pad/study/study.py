"""A study: every cell of a grid is a whole pipeline; a table, a plot and pictures of what came out.

Cells are calls of the commands' own recipes, which go on where they were stopped and make nothing twice; what a cell makes
lies under a name that says its settings, so what other settings made is never taken for it.
"""

import contextlib
import functools
import json
import logging
import os
import statistics
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from pad.commands.bench import Workbench, check_writable, set_up
from pad.commands.common import Common
from pad.commands.coreset import CoresetSettings, select_coreset
from pad.commands.distil import distill
from pad.commands.evaluate import EvaluationSettings, evaluate
from pad.commands.record import record_experts
from pad.distributed import ALONE, Ranks
from pad.errors import InputError, Stopped
from pad.show.pictures import save_grid
from pad.store.files import write_text
from pad.store.locks import claim, in_turn, remove_leftovers
from pad.study.grid import Cell, Grid, StudySettings, slug
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
    out, cells = grid.out, grid.cells()
    wanted = grid.wanted(settings, cells)
    check_writable(out)
    remove_leftovers(out / "cells")
    bench, began = functools.cache(lambda: _images(grid.common, out)), time.time()
    try:
        others = [cell for cell in wanted if not _obtain(cell, out, bench, began)]
        for cell in others:  # begun by other processes, which may have ended before they were done
            while not _obtain(cell, out, bench, began):
                with in_turn(_lock(out, cell), cell.about):
                    pass
    finally:  # an interrupted study shows what is there
        outcomes = [_outcome(cell, out) for cell in cells]
        if any(outcome.accuracies or outcome.failed for outcome in outcomes):
            write_report(out, outcomes, grid.reference)
            _pictures(out, outcomes)
    print(f"\n{(out / 'results.md').read_text(encoding='utf-8')}")
    log.info("tables, plot and pictures are in %s", out)
    if failed := sum(outcome.failed is not None for outcome in outcomes):
        raise Stopped(
            f"{failed} of {len(cells)} cells failed, see {out / 'results.md'}; the command tries them again", 1
        )
    return outcomes


def _obtain(cell: Cell, out: Path, bench: Callable[[], Workbench], began: float) -> bool:
    """Run a cell that is not done, unless another process is at work on it: then False.

    One that has failed since ``began``, the time this command was given, was tried by another process.
    """
    with claim(_lock(out, cell)) as mine:
        if not mine:
            return False
        before = _outcome(cell, out)
        if before.accuracies or (before.failed and _record(out, cell).stat().st_mtime >= began):
            return True
        log.info("== %s", cell.about)
        started = time.perf_counter()
        record = {"method": cell.method, "ipc": cell.ipc, "seed": cell.seed, "recipe": cell.recipe}
        images = bench()  # those of another study are no cell's failure
        try:
            with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):  # a line is said of it below
                made, accuracies = _run(cell, images)
            record |= {"set": str(made.relative_to(out)), "accuracies": accuracies}
        except Stopped as stop:
            if stop.code > 128:  # a signal
                raise
            record["failed"] = str(stop)
        except (InputError, OSError) as error:
            record["failed"] = str(error)
        except Exception as error:  # of one cell: the others may do
            traceback.print_exc()
            record["failed"] = f"{type(error).__name__}: {error}"
        record["seconds"] = round((before.seconds or 0) + time.perf_counter() - started, 1)
        write_text(_record(out, cell), json.dumps(record, indent=2, sort_keys=True) + "\n")
        if "failed" in record:
            log.warning("%s failed: %s", cell.about, record["failed"])
        else:
            print(f"{cell.about}: {100 * statistics.mean(accuracies):.2f} % ({record['seconds']:.0f} s)", flush=True)
        return True


def _run(cell: Cell, bench: Workbench) -> tuple[Path, list[float]]:
    """Experts, set and evaluation. Returns the set's file, and the accuracies of the networks trained on it."""
    if cell.buffer is not None:
        record_experts(cell.buffer, bench=bench)
    if isinstance(cell.distilling, CoresetSettings):
        made = select_coreset(cell.distilling, bench=bench)
    else:
        made = distill(cell.distilling, bench=bench) / "Normal" / "synthetic_last.safetensors"
    settings = EvaluationSettings.resolve(cell.evaluation | {"synthetic": str(made)})
    results = evaluate(settings, set(settings.given), bench=bench)
    return made, results["results"][0]["accuracies"]


def _images(common: Common, out: Path) -> Workbench:
    """The images, which all cells share. Raises InputError when the study was begun with others."""
    bench, path = set_up(common, ALONE), out / "data.json"
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # not there, or damaged
        write_text(path, json.dumps(bench.data.identity, indent=2, sort_keys=True) + "\n")
    else:
        if before != json.loads(json.dumps(bench.data.identity)):
            raise InputError(
                f"the study in {out} was begun with other images than {common.data_path} has; give another --out"
            )
    return bench


def _lock(out: Path, cell: Cell) -> Path:
    return out / "cells" / f".{cell.name}.lock"


def _record(out: Path, cell: Cell) -> Path:
    return out / "cells" / f"{cell.name}.json"


def _outcome(cell: Cell, out: Path) -> Outcome:
    record = {}
    with contextlib.suppress(OSError, ValueError):  # not there, or damaged: to be done
        record = json.loads(_record(out, cell).read_text(encoding="utf-8"))
    found = (record.get(key) for key in ("accuracies", "failed", "seconds", "set"))
    return Outcome(cell.method, cell.ipc, cell.seed, *found)


def _pictures(out: Path, outcomes: list[Outcome]) -> None:
    """One small picture for each method and size, to stand side by side: of the first seed's set."""
    for outcome in {(outcome.method, outcome.ipc): outcome for outcome in reversed(outcomes) if outcome.made}.values():
        try:
            synthetic = SyntheticSet.load(out / outcome.made)
        except InputError as error:  # the table stands without it
            log.warning("no picture of %s: %s", outcome.method, error)
            continue
        save_grid(
            out / "pictures" / f"{slug(outcome.method)}_ipc{outcome.ipc}.png",
            synthetic.pixels(),
            synthetic.classes,
            synthetic.class_names,
            caption=f"{outcome.method}, seed {outcome.seed}",
            scale=1,
        )
