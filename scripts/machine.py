"""Are the disk, the memory and the compiler there that the quickstart takes? Asked before anything is installed.

    python3 scripts/machine.py FOLDER    the folder that .venv is made in

It says what is missing and what happens without. It ends with 2 where a disk is too small: half an installation is of
no use. Too little memory stops nothing: what is free is an estimate, and a command that the system ends goes on when it
is given again. Needs nothing but Python; what a system does not tell counts as enough. PAD_DISK_GB is the disk to ask
for, of a PyTorch without CUDA, say.
"""

import os
import platform
import shutil
import sys
import tempfile
from pathlib import Path

UNKNOWN = float("inf")
INSTALLED_GB, WHEELS_GB = (6.0, 3.0) if platform.system() == "Linux" else (2.0, 0.5)  # PyTorch for Linux brings CUDA
MEMORY_GB = 1.5  # of the largest stage, with some to spare


def lacking_disk(needs, free=lambda folder: shutil.disk_usage(folder).free / 1e9):
    """A sentence about a disk with less than all it is to hold, or None.

    needs: pairs of a folder and GB. free: GB that are free in a folder.
    """
    disks = {}
    for folder, size in needs:
        try:
            disk = disks.setdefault(os.stat(folder).st_dev, [folder, free(folder), 0.0])
        except OSError:
            continue
        disk[2] += size
    for folder, room, size in disks.values():
        if room < size:
            return (
                f"the installation takes some {size:g} GB on the disk of {folder}, and {room:.1f} GB are free there; "
                "make room, set TMPDIR to another disk, or PAD_DISK_GB to what your PyTorch takes"
            )
    return None


def free_memory(root=Path("/")):
    """GB that this process may take: what the system has left, within the limits of its control groups (a container's).

    ``root``: where /proc and /sys are. Infinite where nothing is known, as on macOS and Windows.
    """
    left = [UNKNOWN]
    for line in _lines(root / "proc/meminfo"):
        if line.startswith("MemAvailable:"):
            left.append(int(line.split()[1]) * 1024 / 1e9)
    for line in _lines(root / "proc/self/cgroup"):
        controllers, path = line.split(":", 2)[1:]
        if controllers not in ("", "memory"):
            continue
        top = root / "sys/fs/cgroup" / controllers  # of version 2 where there is no name
        group = top / path.strip("/")
        for folder in [group, *group.parents]:  # a container may see its own group as the top
            limits = _lines(folder / ("memory.limit_in_bytes" if controllers else "memory.max"))
            left += [int(limit) / 1e9 for limit in limits if limit.isdigit()]  # else it is "max"
            if folder == top:
                break
    return min(left)


def _lines(path):
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def notes(memory, compiler):
    """What is said of a machine with ``memory`` GB free, with or without a compiler, that goes on all the same."""
    if memory < MEMORY_GB:
        yield (
            f"{memory:.1f} GB of memory are free, and the quickstart takes up to {MEMORY_GB:g} GB. It goes on; where "
            "the system ends it, close other programs and give the same command again"
        )
    if not compiler:
        yield "there is no C++ compiler (g++, or what CXX names), so it goes on with slower kernels: 5 minutes for 2"


def main(folder):
    """Say what there is to say; returns the exit code."""
    sizes = INSTALLED_GB, WHEELS_GB
    if asked := os.environ.get("PAD_DISK_GB"):
        try:
            sizes = float(asked), 0.0
        except ValueError:
            print(f"error: PAD_DISK_GB: {asked!r} is not a number of GB", file=sys.stderr)
            return 2
    installed = any(Path(folder, ".venv").glob(".installed-*"))
    needs = zip([folder, tempfile.gettempdir()], sizes)
    if not installed and (error := lacking_disk(needs)):
        print(f"error: {error}", file=sys.stderr)
        return 2
    compiler = platform.system() != "Linux" or shutil.which(os.environ.get("CXX") or "g++") is not None
    for note in notes(free_memory(), compiler):
        print(f"note: {note}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
