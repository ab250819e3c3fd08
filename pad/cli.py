"""The front doors: parse, run a stage, turn what went wrong into a sentence and an exit code.

Exit codes: 0 done; 1 stopped because the numbers or a disk went wrong, what was finished is kept; 2 wrong input, nothing
written; 130 and 143 stopped by SIGINT and SIGTERM, what was finished is kept. Of several processes all end with the
code of the one that was first, and it alone says why.
"""

import contextlib
import logging
import os
import shlex
import signal
import sys
import traceback
import warnings
from typing import Callable

from pad import config, distributed
from pad.allocator import keep_compiled_code, keep_freed_memory
from pad.commands.coreset import CoresetSettings, select_coreset
from pad.commands.distil import distill as run_distillation
from pad.commands.distribution import DMSettings
from pad.commands.evaluate import EvaluationSettings
from pad.commands.evaluate import evaluate as run_evaluation
from pad.commands.gradient import DCSettings
from pad.commands.rank import ScoreSettings, score_difficulty
from pad.commands.record import BufferSettings, record_experts
from pad.commands.trajectory import DistillSettings
from pad.distributed import PeerLost, Ranks
from pad.errors import InputError, Stopped
from pad.study.grid import StudySettings
from pad.study.study import study as run_study


class _Handler(logging.StreamHandler):
    """Notices on stderr, above a progress bar rather than through it."""

    def emit(self, record):
        from tqdm import tqdm

        prefix = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        tqdm.write(prefix + record.getMessage(), file=sys.stderr)


class _Terminated(KeyboardInterrupt):
    """SIGTERM, as schedulers send it, and torchrun to the processes that are left when one has ended."""


def run(stage: Callable[[list[str], Ranks], object], argv: list[str] | None = None) -> int:
    """Run ``stage(argv, ranks)``; returns the exit code. Of several processes, one that fails ends here.

    The same command (of the distilling ones, with --resume) goes on where an interrupted one stopped.
    """
    argv = sys.argv[1:] if argv is None else argv
    keep_freed_memory()
    keep_compiled_code()
    # torch says this of itself when it first differentiates forwards; there is nothing for a user to do about it.
    warnings.filterwarnings("ignore", message=".*torch.jit.script", category=FutureWarning)
    log, handler = logging.getLogger("pad"), _Handler()
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    ranks, resume = distributed.ALONE, stage in (_distill, _match_gradients, _match_distributions)
    try:
        ranks = distributed.join()
        with _one_voice(ranks, handler):
            code = _exit_code(stage, argv, ranks, resume)
    except InputError as error:  # the other processes did not come
        code = ranks.say(f"error: {error}", 2)
    except KeyboardInterrupt as stop:
        command = _command(argv, ranks, resume)
        message = f"interrupted; what was finished is kept\ngo on with: {command}"
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
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def _terminate(number, frame) -> None:
    raise _Terminated


def _exit_code(stage: Callable[[list[str], Ranks], object], argv: list[str], ranks: Ranks, resume: bool) -> int:
    try:
        stage(argv, ranks)
        ranks.barrier()
        return 0
    except InputError as error:
        return ranks.say(f"error: {' '.join(str(error).splitlines())}", 2)
    except OSError as error:  # a full disk, a folder that went away
        return ranks.say(f"error: {error.strerror or error}{f': {error.filename}' if error.filename else ''}", 1)
    except PeerLost as error:
        return ranks.say(f"\n{error}; what was finished is kept", 1)  # the bar of rank 0 may be unfinished above it
    except Stopped as stop:  # those of a signal can be gone on with; others need other settings
        return ranks.say(
            f"{stop}\ngo on with: {_command(argv, ranks, resume)}" if stop.code > 128 else str(stop), stop.code
        )


def _command(argv: list[str], ranks: Ranks, resume: bool) -> str:
    if ranks.size > ranks.local_size:
        return f"the same commands{', and --resume' if resume else ''}"
    if not resume:
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


def _buffer(argv: list[str], ranks: Ranks) -> None:
    settings, _ = config.parse(BufferSettings, argv, "buffer_CL.py")
    record_experts(settings, ranks)


def _distill(argv: list[str], ranks: Ranks) -> None:
    settings, _ = config.parse(DistillSettings, argv, "PAD.py")
    run_distillation(settings, ranks)


def _match_gradients(argv: list[str], ranks: Ranks) -> None:
    settings, _ = config.parse(DCSettings, argv, "DC.py")
    run_distillation(settings, ranks)


def _match_distributions(argv: list[str], ranks: Ranks) -> None:
    settings, _ = config.parse(DMSettings, argv, "DM.py")
    run_distillation(settings, ranks)


def _evaluate(argv: list[str], ranks: Ranks) -> None:
    settings, given = config.parse(EvaluationSettings, argv, "evaluation.py")
    run_evaluation(settings, given, ranks)


def _score(argv: list[str], ranks: Ranks) -> None:
    settings, _ = config.parse(ScoreSettings, argv, "score_difficulty.py")
    score_difficulty(settings, ranks)


def _coreset(argv: list[str], ranks: Ranks) -> None:
    settings, _ = config.parse(CoresetSettings, argv, "select_coreset.py")
    select_coreset(settings, ranks)


def _study(argv: list[str], ranks: Ranks) -> None:
    argv = ["--study", *argv] if argv and not argv[0].startswith("-") else argv
    settings, _ = config.parse(StudySettings, argv, "study.py")
    run_study(settings, ranks)


def buffer(argv: list[str] | None = None) -> int:
    """``pad-buffer``, ``buffer/buffer_CL.py``."""
    return run(_buffer, argv)


def distill(argv: list[str] | None = None) -> int:
    """``pad-distill``, ``distill/PAD.py``."""
    return run(_distill, argv)


def match_gradients(argv: list[str] | None = None) -> int:
    """``pad-dc``, ``distill/DC.py``."""
    return run(_match_gradients, argv)


def match_distributions(argv: list[str] | None = None) -> int:
    """``pad-dm``, ``distill/DM.py``."""
    return run(_match_distributions, argv)


def evaluate(argv: list[str] | None = None) -> int:
    """``pad-evaluate``, ``distill/evaluation.py``."""
    return run(_evaluate, argv)


def score(argv: list[str] | None = None) -> int:
    """``pad-score``, ``scripts/score_difficulty.py``."""
    return run(_score, argv)


def coreset(argv: list[str] | None = None) -> int:
    """``pad-coreset``, ``scripts/select_coreset.py``."""
    return run(_coreset, argv)


def study(argv: list[str] | None = None) -> int:
    """``pad-study``, ``scripts/study.py``."""
    return run(_study, argv)
