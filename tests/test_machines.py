"""Machines as they are: no home, odd cache paths, launcher variables, too little memory."""

import dataclasses
import os
import pwd
import re
from pathlib import Path

import pytest
import torch

from pad import cli, distributed
from pad.allocator import cache_folder, compiled_folder, keep_compiled_code
from pad.commands.table import COMMANDS
from pad.data.images import ImageData
from pad.data.preprocessing import fit_preprocessing
from pad.errors import InputError
from pad.nn import kernels

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


# ---- launchers


@pytest.mark.parametrize("value", [None, "", "1"])
def test_a_launcher_variable_that_is_empty_is_as_none(value, monkeypatch):
    for name in ("WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    assert distributed.join() is distributed.ALONE


def test_a_launcher_variable_that_is_no_number_is_named(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "many")
    with pytest.raises(InputError, match="WORLD_SIZE=many"):
        distributed.join()
    assert cli.buffer([]) == 2
    assert capsys.readouterr().err.count("\n") == 1


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
    argv = {
        "study": ["study.yaml"],
        "evaluate": ["--synthetic", "set"],
        "export": ["folder", "out"],
        "import_set": ["set", "--out", "out"],
        "export_set": ["set", "--to", "npz", "--out", "out"],
    }.get(name, [])
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
