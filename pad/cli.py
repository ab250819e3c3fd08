"""The front doors: parse, do what the command does, turn what went wrong into a sentence and an exit code.

Exit codes: 0 done; 1 stopped because the numbers or a disk went wrong, what was finished is kept; 2 wrong input,
nothing written; 130 and 143 stopped by SIGINT and SIGTERM, what was finished is kept. Of several processes all end with
the code of the one that was first, and it alone says why.
"""

import contextlib
import logging
import os
import shlex
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from functools import partial

from pad import config, distributed
from pad.allocator import keep_compiled_code, keep_freed_memory
from pad.commands.page import PageSettings, write_page
from pad.commands.table import COMMANDS, Command
from pad.distributed import PeerLost, Ranks
from pad.errors import InputError, Stopped, is_of_memory
from pad.streams import silence, standard_streams
from pad.study.study import StudySettings
from pad.study.study import study as run_study

COMMANDS["study"] = Command("study.py", StudySettings, run_study)
COMMANDS["report"] = Command("report.py", PageSettings, write_page)


class _Handler(logging.StreamHandler):
    """Notices on stderr, above a progress bar rather than through it."""

    def emit(self, record):
        from tqdm import tqdm

        prefix = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        tqdm.write(prefix + record.getMessage(), file=sys.stderr)


class _Terminated(KeyboardInterrupt):
    """SIGTERM, as schedulers send it, and torchrun to the processes that are left when one has ended."""


def door(name: str, argv: list[str] | None = None) -> int:
    """Run the command ``name`` of the table with ``argv``, or the process's own; returns the exit code.

    Of several processes, one that fails ends here. The same command (of the distilling ones, with --resume) goes on
    where an interrupted one stopped. That nobody reads what it prints stops none.
    """
    with standard_streams() as output:
        code = _run(COMMANDS[name], sys.argv[1:] if argv is None else argv)
        output.flush()
        if code == 0 and output.failure:
            print(f"error: standard output: {output.failure.strerror}; the files are whole", file=sys.stderr)
            return 1
        return code


def _run(command: Command, argv: list[str]) -> int:
    keep_freed_memory()
    keep_compiled_code()
    # torch says this of itself when it first differentiates forwards; there is nothing for a user to do about it.
    warnings.filterwarnings("ignore", message=".*torch.jit.script", category=FutureWarning)
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # of a user without a home it warns at every import
    os.environ["MPLBACKEND"] = "agg"  # a notebook leaves its own to its commands, which cannot import matplotlib then
    log, handler = logging.getLogger("pad"), _Handler()
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    ranks = distributed.ALONE
    try:
        ranks = distributed.join()
        with _one_voice(ranks, handler):
            code = _exit_code(command, argv, ranks)
    except InputError as error:  # the other processes did not come
        code = ranks.say(f"error: {error}", 2)
    except KeyboardInterrupt as stop:
        if ranks.lost():  # torchrun ends the others when one has ended, maybe before they notice
            code = _say_lost(PeerLost(), ranks)
        else:
            message = f"interrupted; what was finished is kept\ngo on with: {_going_on(command, argv, ranks)}"
            code = ranks.say(message, 143 if isinstance(stop, _Terminated) else 130)
    except Exception:
        if ranks.size == 1:
            raise
        traceback.print_exc()
        code = 1
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
    ranks.leave(code)
    return code


buffer: Callable[..., int] = partial(door, "buffer")  # pad-buffer, buffer/buffer_CL.py
distill: Callable[..., int] = partial(door, "PAD")  # pad-distill, distill/PAD.py
match_gradients: Callable[..., int] = partial(door, "DC")  # pad-dc, distill/DC.py
match_distributions: Callable[..., int] = partial(door, "DM")  # pad-dm, distill/DM.py
match_along_trajectories: Callable[..., int] = partial(door, "TGDD")  # pad-tgdd, distill/TGDD.py
match_characteristics: Callable[..., int] = partial(door, "NCFM")  # pad-ncfm, distill/NCFM.py
match_influence: Callable[..., int] = partial(door, "InfMatch")  # pad-infmatch, distill/InfMatch.py
evaluate: Callable[..., int] = partial(door, "evaluate")  # pad-evaluate, distill/evaluation.py
score: Callable[..., int] = partial(door, "score")  # pad-score, scripts/score_difficulty.py
coreset: Callable[..., int] = partial(door, "coreset")  # pad-coreset, scripts/select_coreset.py
import_buffer: Callable[..., int] = partial(door, "import")  # pad-import-buffer, scripts/import_buffer.py
export_buffer: Callable[..., int] = partial(door, "export")  # pad-export-buffer, scripts/export_buffer.py
convexify_buffer: Callable[..., int] = partial(door, "convexify")  # pad-convexify-buffer, scripts/convexify_buffer.py
import_set: Callable[..., int] = partial(door, "import_set")  # pad-import-set, scripts/import_set.py
export_set: Callable[..., int] = partial(door, "export_set")  # pad-export-set, scripts/export_set.py
quantise: Callable[..., int] = partial(door, "quantise")  # pad-quantise, scripts/quantise.py
at_published_scale: Callable[..., int] = partial(door, "published_scale")  # pad-published-scale
study: Callable[..., int] = partial(door, "study")  # pad-study, scripts/study.py
report: Callable[..., int] = partial(door, "report")  # pad-report, scripts/report.py


@contextlib.contextmanager
def _one_voice(ranks: Ranks, handler: logging.Handler):
    """Notices and results come from rank 0; how a run ends, from whoever knows first."""
    before = signal.signal(signal.SIGTERM, _terminate)
    if ranks.is_main:
        try:
            yield
        finally:
            if ranks.size == 1:  # of several, one that ends early waits for no signal any more: see Ranks.say
                signal.signal(signal.SIGTERM, before)
        return
    handler.setLevel(logging.CRITICAL)
    with silence():
        yield


def _terminate(number, frame) -> None:
    raise _Terminated


def _exit_code(command: Command, argv: list[str], ranks: Ranks) -> int:
    try:
        command.recipe(config.parse(command.settings, argv, command.program), ranks)
        ranks.barrier()
        return 0
    except InputError as error:
        return ranks.say(f"error: {' '.join(str(error).splitlines())}", 2)
    except OSError as error:  # a full disk, a folder that went away
        return ranks.say(f"error: {error.strerror or error}{f': {error.filename}' if error.filename else ''}", 1)
    except (MemoryError, RuntimeError) as error:
        if not is_of_memory(error):
            raise
        fields = command.settings.fields()
        less = ", ".join(f"--{name}" for name, field in fields.items() if field.metadata["memory"])
        less += " or give --zca False" if "zca" in fields else ""
        return ranks.say(f"error: not enough memory; {f'lower {less}; ' if less else ''}what was finished is kept", 1)
    except PeerLost as error:
        return _say_lost(error, ranks)
    except Stopped as stop:  # those of a signal can be gone on with; others need other settings
        return ranks.say(
            f"{stop}\ngo on with: {_going_on(command, argv, ranks)}" if stop.code > 128 else str(stop), stop.code
        )


def _say_lost(error: PeerLost, ranks: Ranks) -> int:
    return ranks.say(f"\n{error}; what was finished is kept", 1)  # the bar of rank 0 may be unfinished above it


def _going_on(command: Command, argv: list[str], ranks: Ranks) -> str:
    """The command line that goes on where this one stopped."""
    if ranks.size > ranks.local_size:
        return f"the same commands{', and --resume' if command.resumes else ''}"
    if not command.resumes:
        return shlex.join([*_program(ranks), *argv])
    replaced = ("--overwrite", "--resume")
    kept = [
        word
        for word, before in zip(argv, ["", *argv])
        if word.split("=")[0] not in replaced and (word.startswith("--") or before not in replaced)
    ]
    return shlex.join([*_program(ranks), *kept, "--resume"])


def _program(ranks: Ranks) -> list[str]:
    script = sys.argv[0]
    if ranks.size > 1:
        no_python = [] if script.endswith(".py") else ["--no-python"]
        return ["torchrun", f"--nproc_per_node={ranks.size}", *no_python, script]
    return [script] if os.access(script, os.X_OK) else [sys.executable, script]
