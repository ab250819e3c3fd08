"""Machines as they are: no home, odd cache paths, launcher variables, too little memory."""

import dataclasses
import os
import pwd
import re
import signal
import subprocess
import sys
import threading
import time
import typing
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import command_line

from pad import cli, distributed
from pad.allocator import cache_folder, compiled_folder, keep_compiled_code
from pad.commands.table import COMMANDS
from pad.config import FilePath
from pad.data.images import ImageData
from pad.data.preprocessing import fit_preprocessing
from pad.errors import InputError
from pad.nn import kernels
from pad.store.files import refuse_unwritable
from pad.store.foreign import load_pt
from pad.store.published import importable_files
from pad.store.tensors import load_tensors
from pad.store.trajectories import TrajectoryStore, recorded

# ---- a place for what takes long to make


@pytest.fixture()
def cache(monkeypatch, tmp_path):
    """$PAD_CACHE is a folder that does not exist yet, and nothing says where compiled code goes."""
    monkeypatch.setenv("PAD_CACHE", str(tmp_path / "some" / "cache"))
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return tmp_path / "some" / "cache"


def test_a_front_door_keeps_compiled_code_beside_other_fitted_things(cache):
    assert cli.buffer(["--nonsense"]) == 2
    folder = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
    assert folder.parent == cache and folder.name.startswith("compiled-")
    assert Path(os.environ["TRITON_CACHE_DIR"]).parent == folder
    assert not cache.exists()  # until something is compiled
    keep_compiled_code()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(folder)


def test_where_the_user_says_compiled_code_goes_it_goes(cache, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "elsewhere")
    keep_compiled_code()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "elsewhere"


def test_without_a_folder_to_keep_it_in_torch_puts_compiled_code_where_it_likes(cache):
    cache.parent.write_text("a file")
    keep_compiled_code()
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ


def test_another_kind_of_cpu_has_its_own_compiled_code(cache, monkeypatch):
    folders = set()
    for flags in ("flags : avx2", "flags : avx2 avx512f", "flags : avx2"):
        monkeypatch.setattr(Path, "read_text", lambda self, flags=flags: f"processor : 0\n{flags}\n")
        monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
        keep_compiled_code()
        folders.add(os.environ["TORCHINDUCTOR_CACHE_DIR"])
    assert len(folders) == 2


def no_home(monkeypatch, tmp_path):
    monkeypatch.delenv("PAD_CACHE")
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: {}[uid])  # as in a container that runs as any number


def not_to_be_entered(monkeypatch, tmp_path):
    stat = os.stat

    def refuse(path, **options):
        if str(path).startswith(str(tmp_path / "some")):
            raise PermissionError(13, "Permission denied")
        return stat(path, **options)

    monkeypatch.setattr(os, "stat", refuse)


def not_utf8(monkeypatch, tmp_path):
    monkeypatch.setenv("PAD_CACHE", os.fsdecode(bytes(tmp_path) + b"/caf\xe9"))


@pytest.mark.parametrize("machine", [no_home, not_to_be_entered, not_utf8])
def test_what_has_no_place_to_be_kept_is_made_anew(cache, monkeypatch, tmp_path, caplog, *, machine):
    """A whitening is as it would be, nothing is written, and a line says what would help."""
    images = torch.randint(0, 256, (9, 1, 3, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(9) % 2
    data = ImageData(
        name="noise",
        train_images=images,
        train_labels=labels,
        test_images=images,
        test_labels=labels,
        class_names=("a", "b"),
        mean=(0.5,),
        std=(0.3,),
    )
    kept = fit_preprocessing(data, True, tmp_path / "kept")
    machine(monkeypatch, tmp_path)
    assert cache_folder() is None and compiled_folder() is None
    keep_compiled_code()
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ
    found = fit_preprocessing(data, True)
    assert torch.equal(found.apply(data.test_images), kept.apply(data.test_images)) and found.identity == kept.identity
    assert "PAD_CACHE" in caplog.text and [path.name for path in tmp_path.iterdir()] == ["kept"]


@pytest.mark.slow
def test_kernels_without_a_place_to_be_kept_are_built_and_used(monkeypatch, tmp_path, caplog):
    not_utf8(monkeypatch, tmp_path)
    assert kernels.library.__wrapped__() is not None
    assert "built anew" in caplog.text and list(tmp_path.iterdir()) == []


# ---- files and folders of others


def link_to_itself(monkeypatch, folder):
    path = folder / "loop"
    path.symlink_to(path)
    return path, "Too many levels of symbolic links"


def longer_than_names_may_be(monkeypatch, folder):
    return folder / ("x" * 300), "File name too long"


def of_another_user(monkeypatch, folder):
    not_to_be_entered(monkeypatch, folder)
    return folder / "some" / "where", "Permission denied"


PATHS = [
    (name, option)
    for name, command in COMMANDS.items()
    for option in command.settings.fields()
    if FilePath in (hint := typing.get_type_hints(command.settings)[option], *typing.get_args(hint))
]


@pytest.mark.parametrize("kind", [link_to_itself, longer_than_names_may_be, of_another_user])
@pytest.mark.parametrize("name, option", PATHS)
def test_a_path_that_cannot_be_used_is_refused_by_its_option(name, option, kind, *, monkeypatch, tmp_path, capsys):
    path, reason = kind(monkeypatch, tmp_path)
    assert cli.door(name, [f"--{option}={path}"]) == 2
    sentence = capsys.readouterr().err
    assert sentence.startswith(f"error: {option}: ") and sentence.endswith(f"{reason}\n") and sentence.count("\n") == 1


@pytest.mark.parametrize("read", [load_tensors, load_pt])
def test_a_file_that_may_not_be_read_is_not_said_to_be_missing_or_damaged(read, monkeypatch, tmp_path):
    path = tmp_path / "file"
    for make, reason in ((path.mkdir, "is a folder"), (partial(os.mkfifo, path), "is a device or a pipe")):
        make()
        with pytest.raises(InputError, match=f"file {reason}$"):
            read(path)
        path.rmdir() if path.is_dir() else path.unlink()
    path.touch()

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pad.store.files.open", refuse, raising=False)
    with pytest.raises(InputError, match=r"file cannot be read \(Permission denied\)$"):
        read(path)


@pytest.mark.parametrize("look", [recorded, TrajectoryStore.open, lambda folder: importable_files(folder, "")])
def test_a_folder_that_cannot_be_listed_is_not_said_to_be_empty(look, monkeypatch, tmp_path):
    path, reason = link_to_itself(monkeypatch, tmp_path)
    with pytest.raises(InputError, match=rf"loop cannot be listed \({reason}\)$"):
        look(path)


def test_a_link_to_nothing_is_no_place_to_write_to(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    with pytest.raises(InputError, match="link is not a folder$"):
        refuse_unwritable(tmp_path / "link" / "runs")


def test_trajectories_that_cannot_be_written_are_refused_before_any_are_made(monkeypatch, tmp_path, capsys):
    (tmp_path / "replay_buffer_0.pt").touch()
    (tmp_path / "file").touch()
    monkeypatch.setattr("pad.commands.published.set_up", lambda *_: pytest.fail("the data set is read"))
    data = {"dataset": "FashionMNISTMini", "model": "ConvNetD1W8", "source": tmp_path}
    assert cli.import_buffer(command_line(**data, buffer_path=tmp_path / "file" / "x")) == 2
    monkeypatch.setattr(TrajectoryStore, "open", lambda folder: [])
    assert cli.export_buffer([str(tmp_path), str(tmp_path / "file" / "x")]) == 2
    assert capsys.readouterr().err.count("file is not a folder\n") == 2


# ---- what else stands in the environment


DRAWING = """
from pad import cli
from pad.config import Settings
from pad.show.names import font_file
cli.COMMANDS["mine"] = cli.Command("mine.py", Settings, lambda *_: print(font_file()))
raise SystemExit(cli.door("mine", []))
"""


@pytest.mark.slow
def test_a_notebooks_way_to_show_figures_is_not_a_commands():
    environment = os.environ | {"MPLBACKEND": "a notebook's, which is not installed"}
    done = subprocess.run([sys.executable, "-c", DRAWING], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.endswith(".ttf\n")


# ---- launchers


@pytest.mark.parametrize("value", [None, "", "1"])
def test_a_launcher_variable_that_is_empty_is_as_none(value, monkeypatch):
    for name in ("WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    assert distributed.join() is distributed.ALONE


LEFT_OVER = [  # of a launcher that is not there
    ({"WORLD_SIZE": "many"}, "WORLD_SIZE=many"),
    ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0"),
    ({"WORLD_SIZE": "-2"}, "WORLD_SIZE=-2"),
    ({"WORLD_SIZE": "9" * 5000}, "WORLD_SIZE=999"),
    ({"WORLD_SIZE": "\udce9"}, r"WORLD_SIZE=\udce9"),
    ({"RANK": None}, "no RANK"),
    ({"RANK": ""}, "no RANK"),
    ({"RANK": "first"}, "RANK=first"),
    ({"RANK": "2"}, "RANK=2, which launchers set to a number from 0 to 1"),
    ({"LOCAL_RANK": "2"}, "LOCAL_RANK=2"),
    ({"LOCAL_WORLD_SIZE": "3"}, "LOCAL_WORLD_SIZE=3"),
    ({"MASTER_PORT": "99999"}, "MASTER_PORT=99999"),
    ({"MASTER_PORT": None}, "no MASTER_PORT"),
    ({"MASTER_ADDR": None}, "MASTER_ADDR"),
]


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("changes, said", LEFT_OVER)
def test_an_environment_that_is_no_launchers_is_a_sentence_at_once(changes, said, name, monkeypatch, capsys):
    whole = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    for variable, value in (whole | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"} | changes).items():
        monkeypatch.delenv(variable, raising=False) if value is None else monkeypatch.setenv(variable, value)
    assert cli.door(name, []) == 2
    sentence = capsys.readouterr().err
    assert sentence.startswith("error: ") and sentence.count("\n") == 1 and len(sentence) < 300
    assert said in sentence and "unset WORLD_SIZE to run alone" in sentence


def test_who_waits_for_processes_that_nobody_started_is_told_and_may_stop(monkeypatch, capsys):
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    whole = {"WORLD_SIZE": "2", "RANK": "0", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for variable, value in (whole | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}).items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setattr(distributed, "_SHORT_WAIT", 0.1)
    monkeypatch.setattr(distributed, "_MEETING", timedelta(seconds=20))
    began, before = time.monotonic(), set(threading.enumerate())
    threading.Timer(0.5, os.kill, [os.getpid(), signal.SIGINT]).start()
    assert cli.buffer([]) == 130 and time.monotonic() - began < 10
    told, stopped, _ = capsys.readouterr().err.splitlines()
    assert told == "waiting for all 2 processes of this run; unset WORLD_SIZE to run alone, or start with torchrun"
    assert stopped.startswith("interrupted")
    store.set("here 1", "")
    for thread in set(threading.enumerate()) - before:  # which still wait
        thread.join(10)


# ---- too little memory


NO_MEMORY = [
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB. GPU 0 has a total capacity of 2.00 GiB"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 92 bytes. Error 12"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 92 bytes."),
]


@pytest.mark.parametrize("error", NO_MEMORY, ids=lambda error: type(error).__name__ + str(error)[:9])
@pytest.mark.parametrize("name", COMMANDS)
def test_too_little_memory_is_a_sentence_with_options_of_the_command(name, error, monkeypatch, capsys):
    def recipe(settings, ranks):
        raise error

    monkeypatch.setitem(COMMANDS, name, dataclasses.replace(COMMANDS[name], recipe=recipe))
    given = {
        "study": ["study.yaml"],
        "published_scale": ["--minutes", "60"],
        "evaluate": ["--synthetic", "set"],
        "export": ["folder", "out"],
        "convexify": ["folder", "out"],
        "report": ["run"],
        "import_set": ["set", "--out", "out"],
        "quantise": ["set", "--bits", "2", "--out", "out"],
        "export_set": ["set", "--to", "npz", "--out", "out"],
    }
    argv = given.get(name, [])
    assert cli.door(name, argv) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert line.startswith("error: not enough memory; ") and line.endswith("what was finished is kept")
    named = set(re.findall(r"--(\w+)", line))
    fields = COMMANDS[name].settings.fields()
    assert named <= fields.keys()
    assert {"batch_train", "ipc", "res"} & fields.keys() <= named or name == "study"  # its ipc picks cells


def test_another_runtime_error_stays_what_it_is(monkeypatch):
    def recipe(settings, ranks):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setitem(COMMANDS, "buffer", dataclasses.replace(COMMANDS["buffer"], recipe=recipe))
    with pytest.raises(RuntimeError, match="mat1"):
        cli.buffer([])
