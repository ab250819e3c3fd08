"""What is asked of a machine before the quickstart installs anything."""

import importlib.util
import math
import os
import shutil
import subprocess
import sys

import pytest
from helpers import CHECKOUT, slow

SPEC = importlib.util.spec_from_file_location("machine", CHECKOUT / "scripts" / "machine.py")
machine = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(machine)


def test_what_lies_on_one_disk_adds_up(tmp_path):
    (tmp_path / "a").mkdir()
    needs = [(tmp_path, 6.0), (tmp_path / "a", 3.0), (tmp_path / "not there", 99.0)]
    assert machine.lacking_disk(needs, lambda folder: 9.0) is None
    said = machine.lacking_disk(needs, lambda folder: 8.96)
    assert "9 GB on the disk of " + str(tmp_path) in said and "9.0 GB are free" in said
    assert machine.lacking_disk([(tmp_path, 1e-6)]) is None, "what the system says of a disk is in GB"
    assert machine.lacking_disk([(tmp_path, shutil.disk_usage(tmp_path).free / 1e9 + 50)])


def test_disks_are_asked_one_by_one(tmp_path, monkeypatch):
    class Status:
        def __init__(self, device):
            self.st_dev = device

    monkeypatch.setattr(machine.os, "stat", lambda folder: Status(hash(folder)))
    free = {"here": 7.0, "temporary": 2.0}
    assert "3 GB on the disk of temporary" in machine.lacking_disk([("here", 6.0), ("temporary", 3.0)], free.get)
    assert machine.lacking_disk([("here", 6.0), ("temporary", 2.0)], free.get) is None


def system(root, **files):
    """A root folder with /proc and /sys: files by path, of which / is written __."""
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


MEMINFO = "MemTotal:       16000000 kB\nMemFree:          100000 kB\nMemAvailable:    4000000 kB\n"


def test_memory_is_what_the_system_has_left(tmp_path):
    assert machine.free_memory(system(tmp_path, proc__meminfo=MEMINFO)) == pytest.approx(4.096)


@pytest.mark.parametrize("limit, wanted", [("2000000000\n", 2.0), ("max\n", 4.096)])
@pytest.mark.parametrize("folder", ["sys/fs/cgroup/docker/one/", "sys/fs/cgroup/docker/", "sys/fs/cgroup/"])
def test_control_groups_limit_memory(tmp_path, folder, limit, wanted):
    root = system(tmp_path, proc__meminfo=MEMINFO, proc__self__cgroup="0::/docker/one\n")
    system(root, **{f"{folder}memory.max": limit})
    assert machine.free_memory(root) == pytest.approx(wanted)


@pytest.mark.parametrize("folder", ["docker/one/", ""])
def test_control_groups_of_the_first_version_limit_memory(tmp_path, folder):
    groups = "5:cpu,cpuacct:/docker/one\n4:memory:/docker/one\n0::/\n"
    root = system(tmp_path, proc__meminfo=MEMINFO, proc__self__cgroup=groups)
    system(root, **{f"sys/fs/cgroup/memory/{folder}memory.limit_in_bytes": "1000000000\n"})
    assert machine.free_memory(root) == pytest.approx(1.0)
    system(root, **{f"sys/fs/cgroup/memory/{folder}memory.limit_in_bytes": "9223372036854771712\n"})  # none
    assert machine.free_memory(root) == pytest.approx(4.096)


def test_memory_of_a_system_that_tells_nothing(tmp_path):
    assert machine.free_memory(tmp_path) == math.inf


def test_notes_are_of_what_is_missing():
    assert list(machine.notes(math.inf, True)) == []
    [memory] = machine.notes(0.7, True)
    assert memory.startswith("0.7 GB of memory") and "goes on" in memory
    [compiler] = machine.notes(math.inf, False)
    assert "no C++ compiler" in compiler and "slower" in compiler


@pytest.mark.parametrize("script", ["quickstart.sh", slow("test.sh")])
def test_too_small_a_disk_ends_a_script_before_anything_is_made(tmp_path, script):
    shutil.copytree(CHECKOUT / "scripts", tmp_path / "scripts")
    shutil.copytree(CHECKOUT / "configs" / "quickstart", tmp_path / "configs" / "quickstart")
    before = sorted(tmp_path.rglob("*"))
    environment = os.environ | {"PYTHON": sys.executable, "PAD_DISK_GB": "1e9", "PYTHONDONTWRITEBYTECODE": "1"}
    said = subprocess.run(
        ["bash", tmp_path / "scripts" / script], env=environment, capture_output=True, text=True, timeout=60
    )
    assert said.returncode == 2 and said.stdout == ""
    assert said.stderr.startswith("error: the installation takes some 1e+09 GB") and said.stderr.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_what_is_installed_asks_for_no_disk(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PAD_DISK_GB", "1e9")
    assert machine.main(tmp_path) == 2
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / ".installed-1234").touch()
    monkeypatch.setenv("CXX", "no such compiler")
    monkeypatch.setattr(machine.platform, "system", lambda: "Linux")
    capsys.readouterr()
    assert machine.main(tmp_path) == 0
    assert "no C++ compiler" in capsys.readouterr().err
    monkeypatch.setattr(machine.platform, "system", lambda: "Windows")
    assert machine.main(tmp_path) == 0
    assert "compiler" not in capsys.readouterr().err, "kernels are built on Linux only"


def test_a_size_that_is_no_number(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PAD_DISK_GB", "seven")
    assert machine.main(tmp_path) == 2
    assert capsys.readouterr().err == "error: PAD_DISK_GB: 'seven' is not a number of GB\n"
