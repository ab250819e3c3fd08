"""Nothing is lost: what is killed or interrupted at any moment goes on to the same bytes, and two processes do no harm.

Commands that are killed are forked from the test process, which saves them the seconds of their imports.
"""

import dataclasses
import itertools
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import helpers
import pytest
import yaml
from helpers import EXPERTS, FORK, RUN, command_line, forked, slow, wait_for
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from pad import cli, evaluation
from pad.commands import record as recording
from pad.commands import trajectory as tasks
from pad.commands.evaluate import EvaluationSettings
from pad.commands.record import BufferSettings
from pad.commands.table import COMMANDS
from pad.commands.trajectory import DistillSettings
from pad.data import preprocessing
from pad.data.sources import load_data
from pad.store.tensors import load_tensors
from pad.store.trajectories import recorded

MODEL = "ConvNetD1W8"
IMAGES = {"dataset": "ImageFolder", "model": MODEL, "compile": "off"}
KILLS = pytest.mark.parametrize("kills", [2, slow(30)])  # of each of the first two stages


def record_args(images: Path, folder: Path) -> list[str]:
    here = {"data_path": images, "buffer_path": folder / "buffer", "ranking_path": folder / "rankings"}
    asked = {"num_experts": 4, "batch_train": 12, "alpha": 0.3, "score_repeats": 2}
    return command_line(**IMAGES | here | EXPERTS | asked)


def distil_args(images: Path, buffer: Path, folder: Path, *more: str) -> list[str]:
    here = {"data_path": images, "buffer_path": buffer / "buffer", "log_dir": folder, "zca": False, "ipc": 1}
    asked = {"Iteration": 6, "syn_steps": 2, "batch_syn": 2, "checkpoint_every": 2, "num_eval": 1}
    return command_line(*more, **IMAGES | here | RUN | asked, epoch_eval_train=1)


def evaluation_args(images: Path, buffer: Path, runs: Path, out: Path, *more: str) -> list[str]:
    asked = {"synthetic": run_folder(runs), "data_path": images, "out": out, "buffer_path": buffer / "buffer"}
    return command_line(*more, **asked, num_eval=3, epoch_eval_train=2, compile="off")


def experts_in(folder: Path) -> Path:
    return folder / "buffer" / "ImageFolder_NO_ZCA" / MODEL


def run_folder(folder: Path) -> Path:
    return folder / "ImageFolder" / "1" / MODEL / "run"


def files_in(folder: Path) -> dict[str, bytes]:
    """Name -> bytes of all files but those of times and of settings, which name folders; these are there, too."""
    blank = ("timing.jsonl", "config.yaml")
    return {name: b"" if Path(name).name in blank else data for name, data in helpers.files_in(folder).items()}


def start(front_door, argv: list[str], said: Path, prepare=lambda: None):
    """A process that runs a front door after ``prepare()``; what it says goes to the file ``said``."""
    return forked(lambda: (prepare(), front_door(argv))[1], said, said)


def noting(log: Path, cls, name: str, what) -> None:
    """In this process, from now on: a line in ``log`` for each call of a method, before it."""
    method = getattr(cls, name)

    def noted(self, *args):
        with open(log, "a") as handle:
            handle.write(f"{what(*args)}\n")
        return method(self, *args)

    setattr(cls, name, noted)


def lines(log: Path) -> list[int]:
    return [int(line) for line in log.read_text().split()] if log.exists() else []


# ---- kill -9

OPERATIONS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "fcntl.flock")


def count_operations(counter, root: Path, last: float) -> None:
    """In this process, from now on: count what it does to files under ``root``, and kill it before number ``last``."""

    def see(event: str, args: tuple) -> None:
        if event in OPERATIONS and (event == "fcntl.flock" or str(root) in str(args[0])):
            counter.value += 1
            if counter.value == last:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(see)


class Killed:
    """Runs a command again and again, each time killed at another random moment, until it is done.

    Half of the moments are counted in operations on files, half in time.
    """

    def __init__(self, front_door, argv, root: Path, prepare=lambda: None):
        self.front_door, self.argv, self.root, self.prepare = front_door, argv, root, prepare
        self.counter = FORK.RawValue("i", 0)  # without a lock, which a killed process would keep
        self.said = root.parent / f"{root.name} said"

    def run(self, last: float = float("inf"), seconds: float = 60) -> int:
        """One attempt: its exit code, -9 when it was killed, before operation ``last`` or after ``seconds``."""
        self.counter.value = 0
        process = start(
            self.front_door,
            self.argv,
            self.said,
            lambda: (self.prepare(), count_operations(self.counter, self.root, last)),
        )
        process.join(seconds)
        process.kill()
        process.join()
        return process.exitcode


def kill_until_done(rng: random.Random, attempts: Killed, operations: int, seconds: float, check) -> int:
    """How many times it was killed. ``check()`` begins to watch an attempt; what it returns is called after it."""
    kills = 0
    while True:
        after = check()
        if rng.random() < 0.5:
            code = attempts.run(last=rng.randint(1, operations))
        else:
            code = attempts.run(seconds=rng.uniform(0, seconds))
        after()
        assert code in (0, -signal.SIGKILL), attempts.said.read_text()
        if code == 0:
            return kills
        kills += 1


def measured(attempts: Killed) -> tuple[int, float]:
    """An uninterrupted run: its operations and its seconds."""
    began = time.monotonic()
    assert attempts.run() == 0, attempts.said.read_text()
    return attempts.counter.value, time.monotonic() - began


def kill_again_and_again(seed: int, wanted: int, attempts, check, expected: dict[str, bytes], tmp_path: Path) -> None:
    """Runs in folder after folder, ``attempts(folder)``, until there were ``wanted`` kills: each must end as expected.

    ``check(folder)`` begins to watch an attempt and returns what is to be called after it.
    """
    measure = tmp_path / "measured"
    measure.mkdir()
    size = measured(attempts(measure))
    assert files_in(measure) == expected
    rng, kills = random.Random(seed), 0
    for chain in itertools.count():
        folder = tmp_path / str(chain)
        folder.mkdir()
        kills += kill_until_done(rng, attempts(folder), *size, lambda: check(folder))
        assert files_in(folder) == expected
        if kills >= wanted:
            break


@pytest.fixture(scope="session")
def buffer(images, tmp_path_factory) -> Path:
    """Four recorded experts."""
    folder = tmp_path_factory.mktemp("recorded")
    assert cli.buffer(record_args(images, folder)) == 0
    return folder


@pytest.fixture(scope="session")
def finished(images, buffer, tmp_path_factory) -> Path:
    """The ``log_dir`` of a finished run."""
    runs = tmp_path_factory.mktemp("runs")
    assert cli.distill(distil_args(images, buffer, runs)) == 0
    return runs


@KILLS
def test_the_first_stage_killed_at_any_moment(images, buffer, tmp_path, kills):
    def attempts(folder: Path) -> Killed:
        log = tmp_path / "experts"
        return Killed(
            cli.buffer,
            record_args(images, folder),
            folder,
            lambda: noting(log, recording.ExpertTraining, "train", lambda expert, *_: expert),
        )

    def check(folder: Path):
        there = {k: (experts_in(folder) / f"expert_{k:04d}.safetensors").stat() for k in recorded(experts_in(folder))}
        (tmp_path / "experts").unlink(missing_ok=True)

        def after() -> None:
            assert not set(lines(tmp_path / "experts")) & there.keys(), "what was finished was trained again"
            for k, before in there.items():
                now = (experts_in(folder) / f"expert_{k:04d}.safetensors").stat()
                assert (now.st_ino, now.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)

        return after

    kill_again_and_again(0, kills, attempts, check, files_in(buffer), tmp_path)


@KILLS
def test_the_second_stage_killed_at_any_moment(images, buffer, finished, tmp_path, kills):
    def attempts(folder: Path) -> Killed:
        log = tmp_path / "iterations"
        return Killed(
            cli.distill,
            distil_args(images, buffer, folder, "--resume"),
            folder,
            lambda: noting(log, tasks.TrajectoryObjective, "gradients", lambda it, *_: it),
        )

    def check(folder: Path):
        checkpoint = run_folder(folder) / "checkpoint.safetensors"
        first = load_tensors(checkpoint)[1]["iteration"] if checkpoint.exists() else 0
        (tmp_path / "iterations").unlink(missing_ok=True)

        def after() -> None:
            done = lines(tmp_path / "iterations")
            assert done == list(range(first, first + len(done))), "what was saved was computed again"

        return after

    kill_again_and_again(1, kills, attempts, check, files_in(finished), tmp_path)


# ---- SIGINT and SIGTERM


def signal_at(monkeypatch, owner, name: str, number: int, call: int) -> list:
    """Send this process a signal in call number ``call`` of a function; returns the list of calls, which grows."""
    function, calls = getattr(owner, name), []

    def signalled(*args, **kwargs):
        calls.append(args)
        if len(calls) == call + 1:
            os.kill(os.getpid(), number)
        return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, signalled)
    return calls


def stopped(capfd, monkeypatch, front_door, script: str, argv: list[str], number: int) -> str:
    """Run a command that is to stop at a signal: what it said, the command that goes on included."""
    monkeypatch.setattr(sys, "argv", [script, *argv])
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    capfd.readouterr()
    assert front_door() == 128 + number
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before
    said = capfd.readouterr().err
    assert "Traceback" not in said
    advice = said.splitlines()[-1]
    assert advice.startswith("go on with: ") and script in advice
    assert ("--resume" in advice) == (front_door is cli.distill)
    return said


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_the_first_stage(images, buffer, tmp_path, monkeypatch, capfd, number):
    argv = record_args(images, tmp_path)
    with monkeypatch.context() as patch:
        signal_at(patch, recording.FlatModel, "accuracy", number, call=6)  # in the second expert
        said = stopped(capfd, patch, cli.buffer, "buffer_CL.py", argv, number)
    assert "interrupted; what was finished is kept" in said
    assert sorted(path.name for path in experts_in(tmp_path).iterdir()) == ["expert_0000.safetensors"]
    assert cli.buffer(argv) == 0
    assert files_in(tmp_path) == files_in(buffer)


@pytest.mark.parametrize("number", [signal.SIGINT, slow(signal.SIGTERM)])
@pytest.mark.parametrize("call, iteration", [(1, 3), (3, 7)], ids=["in between", "last"])
def test_a_signal_in_an_evaluation_of_the_second_stage(
    images, buffer, finished, tmp_path, *, monkeypatch, capfd, number, call, iteration
):
    argv = distil_args(images, buffer, tmp_path)
    with monkeypatch.context() as patch:
        signal_at(patch, evaluation.Evaluation, "_tested", number, call=call)
        said = stopped(capfd, patch, cli.distill, "PAD.py", argv, number)
    assert f"stopped in the evaluation before iteration {iteration}; the state is saved" in said
    assert cli.distill([*argv, "--resume"]) == 0
    assert files_in(tmp_path) == files_in(finished)


@pytest.mark.parametrize("number", [slow(signal.SIGINT), signal.SIGTERM])
def test_a_signal_in_the_third_stage(images, buffer, finished, tmp_path, *, monkeypatch, capfd, number):
    whole, out = tmp_path / "whole.json", tmp_path / "out.json"
    assert cli.evaluate(evaluation_args(images, buffer, finished, whole)) == 0
    argv = evaluation_args(images, buffer, finished, out)
    with monkeypatch.context() as patch:
        calls = signal_at(patch, evaluation.Evaluation, "_tested", number, call=4)
        said = stopped(capfd, patch, cli.evaluate, "evaluation.py", argv, number)
    assert "interrupted; what was finished is kept" in said and len(calls) == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json.networks-0", "whole.json"]
    with open(tmp_path / "out.json.networks-0", "a") as handle:
        handle.write('{"key": "ab')  # a line a kill cut short
    with monkeypatch.context() as patch:
        calls = signal_at(patch, evaluation.Evaluation, "_tested", number, call=2)
        stopped(capfd, patch, cli.evaluate, "evaluation.py", argv, number)
    with monkeypatch.context() as patch:
        calls = signal_at(patch, evaluation.Evaluation, "_tested", number, call=99)
        assert cli.evaluate(argv) == 0
    assert len(calls) == 12 - 4 - 2, "no network is trained again"
    assert out.read_bytes() == whole.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json", "whole.json"]


def test_scores_of_other_networks_are_not_taken_for_these(images, buffer, finished, tmp_path, monkeypatch):
    """What is kept counts for the same set, protocol, seed and number only."""
    argv = evaluation_args(images, buffer, finished, tmp_path / "out.json", "--baselines none")
    networks = []
    others = ("--seed=1", "--epoch_eval_train=3", "--batch_train=2", "--dsa=False")
    for more in ([], *([other] for other in others), ["--num_eval=4"]):
        with monkeypatch.context() as patch:
            calls = signal_at(patch, evaluation.Evaluation, "_tested", signal.SIGINT, call=2)
            cli.evaluate([*argv, *more])
            networks.append(len(calls))
    assert networks == [3, 3, 3, 3, 3, 2], "but for the last, which knows two of its four"


# ---- one writer


def test_two_processes_share_the_experts_of_one_folder(images, buffer, tmp_path):
    """Each expert is trained by one of them, whoever comes first; both end when all are there."""

    def prepare(number: int):
        def slow(self, *args):
            for theta in train(self, *args):
                time.sleep(0.1)
                yield theta

        train, recording.ExpertTraining.train = recording.ExpertTraining.train, slow
        noting(tmp_path / f"experts {number}", recording.ExpertTraining, "train", lambda expert, *_: expert)

    folder = tmp_path / "folder"
    argv = record_args(images, folder)
    shutil.copytree(buffer / "rankings", folder / "rankings")
    processes = [start(cli.buffer, argv, tmp_path / f"said {i}", lambda i=i: prepare(i)) for i in range(2)]
    for process in processes:
        process.join(60)
    said = [(tmp_path / f"said {i}").read_text() for i in range(2)]
    assert [process.exitcode for process in processes] == [0, 0], said
    assert all("4 experts are in" in text for text in said)
    shares = [lines(tmp_path / f"experts {i}") for i in range(2)]
    assert sorted(sum(shares, [])) == [0, 1, 2, 3] and all(shares), shares
    assert files_in(folder) == files_in(buffer)


def test_an_expert_of_a_killed_process_is_taken_over(images, buffer, tmp_path):
    def hang():
        def train(self, *args):
            (tmp_path / "began").touch()
            time.sleep(60)
            yield

        recording.ExpertTraining.train = train

    folder = tmp_path / "folder"
    argv = record_args(images, folder)
    shutil.copytree(buffer / "rankings", folder / "rankings")
    hanging = start(cli.buffer, argv, tmp_path / "first", hang)
    wait_for((tmp_path / "began").exists)
    other = start(cli.buffer, argv, tmp_path / "second")
    wait_for(lambda: recorded(experts_in(folder)) == [1, 2, 3])
    wait_for(lambda: f"waiting for process {hanging.pid} on" in (tmp_path / "second").read_text())
    hanging.kill()
    other.join(60)
    assert other.exitcode == 0 and files_in(folder) == files_in(buffer)


def test_zca_is_fitted_by_one_process_and_read_by_the_other(images, tmp_path, monkeypatch):
    monkeypatch.setenv("PAD_CACHE", str(tmp_path / "cache"))

    def prepare(number: int):
        def fit(pixels):
            (tmp_path / f"fitted by {number}").touch()
            time.sleep(0.5)
            return fitted(pixels)

        fitted, preprocessing._fit_zca = preprocessing._fit_zca, fit

    data = load_data("ImageFolder", images)
    processes = [
        start(
            lambda _: preprocessing.fit_preprocessing(data, zca=True) and 0,
            [],
            tmp_path / f"said {i}",
            lambda i=i: prepare(i),
        )
        for i in range(2)
    ]
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert len(list(tmp_path.glob("fitted by *"))) == 1 == len(list((tmp_path / "cache").iterdir()))


def test_a_run_folder_has_one_writer(images, buffer, finished, tmp_path, capfd):
    argv = distil_args(images, buffer, tmp_path / "runs", "--Iteration 1000000 --eval_it 1000000")
    writer = start(cli.distill, argv, tmp_path / "said")
    try:
        wait_for((run_folder(tmp_path / "runs") / "metrics.jsonl").exists)
        for more in ([], ["--resume"], ["--overwrite"]):
            capfd.readouterr()
            assert cli.distill([*argv, *more]) == 2
            said, folder = capfd.readouterr().err.splitlines()[-1], run_folder(tmp_path / "runs")
            assert said.startswith(f"error: the run folder {folder} is being written by process {writer.pid}")
    finally:
        os.kill(writer.pid, signal.SIGTERM)
        writer.join(60)
    assert writer.exitcode == 143 and "go on with: " in (tmp_path / "said").read_text()
    assert cli.distill([*argv, "--resume", "--Iteration", "0"]) == 0, "it holds nothing any more"


def test_results_have_one_writer(images, buffer, finished, tmp_path, capfd):
    argv = evaluation_args(images, buffer, finished, tmp_path / "out.json", "--epoch_eval_train 1000000")
    writer = start(cli.evaluate, argv, tmp_path / "said")
    try:
        wait_for((tmp_path / ".out.json.lock").exists)
        wait_for(lambda: "evaluating" in (tmp_path / "said").read_text())
        assert cli.evaluate(argv) == 2
        assert f"out.json is being written by process {writer.pid} on" in capfd.readouterr().err
    finally:
        os.kill(writer.pid, signal.SIGINT)
        writer.join(60)
    assert writer.exitcode == 130


# ---- whatever is given: exit code 2 and one sentence, or settings

TEXT = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), max_size=12)
SCALARS = st.one_of(
    st.integers(),
    st.floats(),
    st.booleans(),
    st.none(),
    TEXT,
    st.binary(max_size=4),
    st.dates(),
    st.sampled_from([10**30, -(10**30), 1e308, "1e999", "nan", "-1", "0", "[0,1]", "cuda:99", "~nobody/x", "x" * 5000]),
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=2), max_leaves=4
)


@pytest.mark.parametrize(
    ("front_door", "cls", "command"),
    [
        slow(cli.buffer, BufferSettings, "buffer"),
        slow(cli.distill, DistillSettings, "PAD"),
        slow(cli.evaluate, EvaluationSettings, "evaluate"),
    ],
    ids=["buffer", "distill", "evaluate"],
)
def test_any_command_is_refused_with_a_sentence_or_gives_settings(
    front_door, cls, command, tmp_path, monkeypatch, capfd
):
    names = [*cls.fields(), *cls.dead]
    word = TEXT.filter(lambda text: not text.startswith("-h") and not text.startswith("--h"))
    flags = st.one_of(
        st.tuples(st.sampled_from(names), SCALARS).map(lambda pair: [f"--{pair[0]}", str(pair[1])]),
        st.tuples(st.sampled_from(names), SCALARS).map(lambda pair: [f"--{pair[0]}={pair[1]}"]),
        st.sampled_from(names).map(lambda name: [f"--{name}"]),
        word.map(lambda text: [text]),
    )
    content = st.one_of(
        st.dictionaries(st.sampled_from(names), VALUES, max_size=4),
        st.dictionaries(st.sampled_from(names) | SCALARS, VALUES, max_size=4),
        VALUES,
        st.binary(max_size=60),
        TEXT,
    )
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    config, accepted = tmp_path / "some.yaml", []
    taking = dataclasses.replace(COMMANDS[command], recipe=lambda settings, *_: accepted.append(settings))
    monkeypatch.setitem(COMMANDS, command, taking)

    @hypothesis_settings(
        max_examples=170, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )
    @given(st.none() | content, st.lists(flags, max_size=3))
    def run(content, flags):
        argv = [word for part in flags for word in part]
        if content is not None:
            text = content if isinstance(content, bytes) else yaml.safe_dump(content, allow_unicode=True).encode()
            config.write_bytes(text)
            argv = ["--cfg", str(config), *argv]
        accepted.clear()
        code = front_door(argv)
        said = capfd.readouterr().err.splitlines()
        assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")} <= {"here", "some.yaml"}
        if accepted:
            assert code == 0 and isinstance(accepted[0], cls)
            json.dumps(accepted[0].as_dict(), allow_nan=False)
        else:
            assert code == 2 and said[-1].startswith("error: "), (argv, said)
        assert sum(line.startswith("error: ") for line in said) == (not accepted)
        assert not any("Traceback" in line for line in said)

    run()
