"""What several test files use: command lines, small folders of images, what a folder holds, and other processes."""

import json
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist
from PIL import Image
from tqdm import tqdm

CHECKOUT = Path(__file__).resolve().parents[1]
FORK = multiprocessing.get_context("fork")

# A short stage 1 and a short stage 2, as settings of a command line: see command_line.
EXPERTS = {"train_epochs": 3, "lr_teacher": 0.05, "rho_max": 0.01, "rho_min": 0.01, "init_ratio": 0.5}
EXPERTS |= {"add_end_epoch": 1, "score_epochs": 1}
RUN = {"name": "run", "expert_epochs": 1, "max_start_epoch": 2, "current_max_start_epoch": 1, "threshold": 10}
RUN |= {"expansion_end_epoch": 4, "lr_img": 10, "eval_it": 3, "save_it": 4, "batch_train": 4}


def slow(*values: object):
    """A slow case of a parametrised test, whose others are quick."""
    return pytest.param(*values, marks=pytest.mark.slow)


def command_line(*words: object, **settings: object) -> list[str]:
    """``command_line("--resume", ipc=2)`` is ``["--ipc", "2", "--resume"]``: of a flag that stands twice, words count.

    A text of several words is split at its spaces; where a value holds some, name it.
    """
    named = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    return named + [word for text in words for word in str(text).split()]


# ---- folders


def make_images(root: Path, seed: int = 0, per_class: int = 12) -> Path:
    """An ImageFolder of three easy classes, 16 x 16 in colour: horizontal stripes, vertical stripes, squares."""
    rng = np.random.default_rng(seed)
    y, x = np.indices((16, 16)) // 2 % 2
    for part, count in (("train", per_class), ("test", 4)):
        for name, pattern in (("ant", y), ("bee", x), ("cat", y ^ x)):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = 100 * pattern[:, :, None].astype(np.uint8) + rng.integers(0, 120, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{i:02d}.png")
    return root


def files_in(folder: Path) -> dict[str, bytes]:
    """Every file under ``folder``, by its name there."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def contents(folder: Path) -> dict[str, bytes]:
    """Every file under ``folder``, and every folder as such."""
    folders = {str(path.relative_to(folder)): b"folder" for path in folder.rglob("*") if not path.is_file()}
    return folders | files_in(folder)


def run_contents(folder: Path) -> dict[str, bytes]:
    """What two runs of one command must have in common: all but times, and the folders named in the settings."""
    return {name: data for name, data in contents(folder).items() if name not in ("timing.jsonl", "config.yaml")}


def events_in(run: Path, kind: str = "") -> list[dict]:
    """The events, or those of a kind, in the metrics of a run's folder."""
    events = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [event for event in events if kind in ("", event["event"])]


def losses_in(run: Path) -> list[float]:
    """The matching loss of each iteration of a run."""
    return [event["loss"] for event in events_in(run, "match")]


# ---- commands


def run_command(argv: list, folder: Path) -> subprocess.CompletedProcess:
    """Run a command in ``folder``, as a person does: what it returned and said, without a traceback."""
    done = subprocess.run(list(map(str, argv)), cwd=folder, capture_output=True, text=True, timeout=300)
    assert "Traceback" not in done.stderr, done.stderr
    return done


def run_script(script: str, argv: list[str], folder: Path) -> subprocess.CompletedProcess:
    """:func:`run_command` for a script of the checkout."""
    return run_command([sys.executable, CHECKOUT / script, *argv], folder)


def assert_refused(capfd, door: Callable[[list[str]], int], argv: list, words: tuple, root: Path) -> str:
    """A front door ends with exit code 2 and one sentence, which holds ``words``, and writes nothing under ``root``.

    Returns what it printed.
    """
    before = contents(root)
    capfd.readouterr()
    code = door([str(word) for word in argv])
    out, err = capfd.readouterr()
    assert code == 2 and "Traceback" not in err, err
    errors = [line for line in err.replace("\r", "\n").splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and err.endswith(f"{errors[0]}\n")
    assert [word for word in words if str(word) not in errors[0]] == [], errors[0]
    assert contents(root) == before, "something was written"
    return out


def at_iteration(monkeypatch, cls: type, name: str, iteration: int, do: Callable[[], None]) -> None:
    """Call ``do`` in the middle of an outer iteration: when ``cls.name`` is called for it."""
    function = getattr(cls, name)

    def interrupted(self, it, *tensors):
        if it == iteration:
            do()
        return function(self, it, *tensors)

    monkeypatch.setattr(cls, name, interrupted)


def signal_self(number: int) -> Callable[[], None]:
    """What sends this process a signal."""
    return lambda: os.kill(os.getpid(), number)


class Clock:
    """One that is moved by hand."""

    def __init__(self):
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


# ---- other processes


def forked(work: Callable[[], int], out: Path, err: Path):
    """A started process, forked from this one, which exits with what ``work`` returns; what it says goes to files."""

    def run() -> None:
        with open(out, "w") as sys.stdout, open(err, "a") as sys.stderr:
            os.dup2(sys.stdout.fileno(), 1)
            os.dup2(sys.stderr.fileno(), 2)
            tqdm.set_lock(threading.RLock())  # its own is shared by forked processes, and a killed one may hold it
            sys.exit(work())

    process = FORK.Process(target=run, daemon=True)
    process.start()
    return process


def two_ranks(
    folder: Path,
    front_door,
    argv: list[str],
    meanwhile=lambda processes: None,
    *,
    timeout: float = 120,
    attempts: int = 3,
) -> tuple[list[int], list[str], list[str]]:
    """Run a front door as two processes: their exit codes, and what each wrote on stdout and on stderr.

    They are forked from this one, which stands in for torchrun by keeping their store.
    """
    files = [[folder / f"{name} of rank {number}" for name in ("stdout", "stderr", "start")] for number in range(2)]
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    port = folder / "port of the store"

    def rank(number: int) -> int:
        files[number][2].touch()
        holds_within(timeout, lambda: port.exists() and port.read_text().endswith("\n"))
        os.environ.update(common, MASTER_PORT=port.read_text().strip(), RANK=str(number), LOCAL_RANK=str(number))
        os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
        return front_door(argv)

    for path in [port, *sum(files, [])]:
        path.unlink(missing_ok=True)
    processes = [forked(lambda number=number: rank(number), *files[number][:2]) for number in range(2)]
    began = holds_within(10, lambda: all(started.exists() for _, _, started in files))
    if not began and attempts > 1:  # forked while a thread of this process held a lock: such a child hangs for good
        for process in processes:
            process.kill()
        return two_ranks(folder, front_door, argv, meanwhile, timeout=timeout, attempts=attempts - 1)
    # After the forks: it has threads of its own.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout))
    port.write_text(f"{store.port}\n")
    meanwhile(processes)
    deadline = time.monotonic() + timeout
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    for path in (port, *(started for *_, started in files)):
        path.unlink(missing_ok=True)
    out, err = ([pair[i].read_text() for pair in files] for i in range(2))
    assert "Traceback" not in "".join(err), err
    return codes, out, err


def holds_within(seconds: float, condition: Callable[[], object]) -> bool:
    """Wait until ``condition()`` holds, for ``seconds`` at most: whether it does."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    """Until ``condition()`` holds."""
    assert holds_within(seconds, condition)
