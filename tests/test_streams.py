"""Standard streams that are closed, full, of another encoding, or that nobody reads: the work goes on."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import CHECKOUT, command_line, files_in, slow

from pad import cli
from pad.commands.table import Command
from pad.config import Settings
from pad.streams import Stream, silence, standard_streams

STUBBORN = Path("/dev/full")
needs_full = pytest.mark.skipif(not STUBBORN.exists(), reason="no /dev/full")


def broken_pipe() -> io.TextIOWrapper:
    """What writes to a pipe whose reader has gone."""
    reader, writer = os.pipe()
    os.close(reader)
    return open(writer, "w", encoding="utf-8")


def test_what_nobody_reads_is_dropped():
    file = broken_pipe()
    stream = Stream(file)
    for _ in range(2):
        stream.write("a line\n" * 10_000)  # more than a buffer
        stream.flush()
    file.close()  # flushes, as the interpreter does when it ends
    assert stream.failure is None


@needs_full
def test_a_full_disk_is_remembered():
    with open(STUBBORN, "w") as file:
        stream = Stream(file)
        print("a line", file=stream, flush=True)
        print("another", file=stream, flush=True)
    assert stream.failure.strerror == "No space left on device"


def test_what_can_be_written_is():
    file = io.StringIO()
    print("ünd", 1, file=Stream(file), flush=True)
    assert file.getvalue() == "ünd 1\n"
    assert Stream(file).getvalue() == "ünd 1\n", "the rest is the stream's own"


def test_letters_that_the_encoding_lacks_are_named():
    raw = io.BytesIO()
    with io.TextIOWrapper(raw, encoding="ascii", errors="strict") as file:
        Stream(file).write("naïve \udce9")
        file.flush()
        assert raw.getvalue() == rb"na\xefve \udce9"
    with io.TextIOWrapper(raw := io.BytesIO(), encoding="ascii", errors="replace") as file:
        Stream(file).write("naïve")
        file.flush()
        assert raw.getvalue() == b"na?ve", "what the user has chosen stays"


def test_without_streams_there_are_some(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    with standard_streams():
        print("nowhere", flush=True)
        print("nowhere", file=sys.stderr, flush=True)
        sys.stdout.isatty()
    assert sys.stdout is sys.stderr is None


def test_silence(capsys):
    with silence():
        print("日本 \udce9")
    print("said")
    assert capsys.readouterr().out == "said\n"


# ---- commands


def door_of(monkeypatch, recipe) -> int:
    monkeypatch.setitem(cli.COMMANDS, "mine", Command("mine.py", Settings, recipe))
    return cli.door("mine", [])


def test_a_command_ends_well_when_its_reader_has_gone(monkeypatch):
    done = []

    def recipe(settings, ranks):
        print("a line", flush=True)
        cli.logging.getLogger("pad").info("a notice")
        done.append(1)

    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, broken_pipe())
    assert door_of(monkeypatch, recipe) == 0 and done
    sys.stdout.close()
    sys.stderr.close()


def test_what_matplotlib_says_of_its_own_folders_is_not_said(monkeypatch, caplog):
    monkeypatch.setattr(cli.logging.getLogger("matplotlib"), "level", cli.logging.NOTSET)
    said = cli.logging.getLogger("matplotlib.here")
    assert door_of(monkeypatch, lambda *_: (said.warning("a temporary folder"), said.error("a failure"))) == 0
    assert [record.getMessage() for record in caplog.records] == ["a failure"]


@needs_full
def test_a_command_whose_output_is_lost_says_so(monkeypatch, capsys):
    done = []
    monkeypatch.setattr(sys, "stdout", open(STUBBORN, "w"))
    assert door_of(monkeypatch, lambda *_: (print("a line", flush=True), done.append(1))) == 1
    assert done and capsys.readouterr().err == "error: standard output: No space left on device; the files are whole\n"


def shell(words: str, *argv, **environment) -> subprocess.CompletedProcess:
    """Run a command of python's as ``words`` have it, where "$@" stands for it."""
    line = ["bash", "-c", words, "bash", sys.executable, *map(str, argv)]
    return subprocess.run(line, capture_output=True, text=True, timeout=300, env=os.environ | environment)


LIST = CHECKOUT / "scripts" / "score_difficulty.py", "--list"


@pytest.mark.parametrize(
    "words", ['"$@" >&-', slow('"$@" 2>&-'), slow('"$@" <&- >&- 2>&-'), slow('"$@" | true; exit ${PIPESTATUS[0]}')]
)
def test_closed_streams_of_a_process(words):
    done = shell(words, *LIST)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
@pytest.mark.parametrize("words", ['"$@" <&- >&- 2>&-', '"$@" 2>&1 | true; exit ${PIPESTATUS[0]}'])
def test_a_run_without_streams_leaves_the_same_files(images, tmp_path, words):
    argv = command_line(
        dataset="ImageFolder", data_path=images, model="ConvNetD2W8", Iteration=1, num_eval=1, epoch_eval_train=1
    )
    script = CHECKOUT / "distill" / "DM.py"
    done = [shell(words, script, *argv, "--log_dir", tmp_path / name) for name, words in zip("ab", ['"$@"', words])]
    assert [each.returncode for each in done] == [0, 0], done
    kept = [
        {name: data for name, data in files_in(tmp_path / run).items() if not name.endswith(("timing.jsonl", ".yaml"))}
        for run in "ab"
    ]
    assert kept[0] == kept[1] and any(name.endswith("synthetic_last.safetensors") for name in kept[0])


def test_a_folder_that_was_removed_is_no_place_to_start_in(tmp_path):
    done = shell(f'mkdir {tmp_path}/gone; cd {tmp_path}/gone; rmdir {tmp_path}/gone; "$@"', *LIST)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: the current folder was removed; change to one that is there\n"


@pytest.mark.slow
def test_help_without_docstrings():
    done = shell('"$@"', CHECKOUT / "distill" / "PAD.py", "--help", PYTHONOPTIMIZE="2", COLUMNS="200")
    assert done.returncode == 0 and "--Iteration" in done.stdout and "frozenset" not in done.stdout
