"""The run folder: settings, metrics, pictures and artifacts of one run."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import yaml
from torch import Tensor

from pad.errors import InputError
from pad.store.files import save_picture, write_text
from pad.store.identity import refuse_difference
from pad.store.naming import folder_of
from pad.store.trackers import Tracker, open_tracker, refuse_tracker


def run_folder(log_dir: Path | str, dataset: str, ipc: int, model: str, name: str) -> Path:
    """The place of a run, ``<log_dir>/<dataset>/<ipc>/<model>/<name>``.

    A data set "ImageNet/imagenette" becomes the folder "ImageNet-imagenette", a network the one that
    :func:`pad.store.naming.folder_of` says. Raises InputError for a name that is
    not the name of one folder.
    """
    if name in ("", ".", "..") or any(character in name for character in "/\\\0"):
        raise InputError(f"the run name {name!r} is not the name of a folder; it may hold no / and no \\")
    if name != name.encode(errors="ignore").decode():
        raise InputError(f"the run name {name!r} is not UTF-8; give another --name")
    return Path(log_dir) / dataset.replace("/", "-") / str(ipc) / folder_of(model) / name


def run_state(folder: Path | str) -> str:
    """``"absent"`` (no run was started in this folder), ``"unfinished"`` or ``"finished"``."""
    folder = Path(folder)
    if not (folder / "config.yaml").exists():
        return "absent"
    return "finished" if (folder / "finished.json").exists() else "unfinished"


def recorded_settings(folder: Path | str) -> dict:
    """The settings a run was started with. Raises InputError when its config.yaml is damaged."""
    path = Path(folder) / "config.yaml"
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError):
        settings = None
    if not isinstance(settings, dict):
        raise InputError(f"{path} is damaged; --overwrite starts the run anew")
    return settings


def finished_iterations(folder: Path | str) -> int:
    """How many iterations the finished run in ``folder`` has; 0 when it is not finished."""
    try:
        return int(json.loads((Path(folder) / "finished.json").read_text(encoding="utf-8"))["iterations"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return 0


def costs(folder: Path | str, iterations: int) -> dict:
    """What a run's first ``iterations`` took, which its set is made by.

    seconds: of them alone, without evaluations; one that a kill undid counts as it was done again. peak_memory: bytes,
    over all sessions (:func:`pad.peak.measure_peak`); None where it is not known.
    """
    seconds: dict[int, float] = {}
    peaks: list[int] = []
    for line in (Path(folder) / "timing.jsonl").read_bytes().splitlines():
        with contextlib.suppress(ValueError):  # torn by a kill
            entry = json.loads(line)
            if entry["event"] == "match":
                seconds[entry["iteration"]] = entry["seconds"]
            elif entry["event"] == "peak":
                peaks.append(entry["bytes"])
    spent = sum(seconds[it] for it in seconds if it < iterations)
    return {"seconds": round(spent, 3), "iterations": iterations, "peak_memory": max(peaks, default=None)}


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a run is to be, and what becomes of one that is there.

    resume: go on with the run, if there is one; a finished run is thereby unfinished again. overwrite: remove whatever
    run is there, finished or not, with all files of its folder. tracker: one of :data:`pad.store.trackers.TRACKERS`.
    may_differ: names of settings that a resumed run may change (a device, for example). defaults: what holds of
    settings that a run does not name because it is older than they are.
    """

    folder: Path
    resume: bool = False
    overwrite: bool = False
    tracker: str = "none"
    may_differ: Collection[str] = ()
    defaults: Mapping = field(default_factory=dict)

    def refuse(self, settings: Mapping) -> None:
        """Raise InputError when no run of ``settings`` can begin here, having changed nothing.

        A run is in the way and neither resumed nor overwritten, the settings of a resumed run differ (each that does is
        named), or the tracker is unknown or not installed.
        """
        folder = self.folder
        if self.resume and self.overwrite:
            raise InputError("resume and overwrite contradict each other; choose one")
        if any(path.is_file() for path in (folder, *folder.parents)):
            raise InputError(f"the run folder {folder} cannot be made: there is a file in its place")
        refuse_tracker(self.tracker)
        state = run_state(folder)
        if state == "absent" or self.overwrite:
            return
        if not self.resume:
            choice = "--resume to go on with it, or " if state == "unfinished" else "choose another --name, or "
            article = "an" if state == "unfinished" else "a"
            raise InputError(f"{folder} holds {article} {state} run; {choice}--overwrite to replace it")
        here = _plain(settings)
        there = {name: value for name, value in _plain(self.defaults).items() if name in here}
        there |= recorded_settings(folder)
        compared = sorted((there.keys() | here.keys()) - set(self.may_differ))
        refuse_difference(
            folder,
            {name: there.get(name) for name in compared},
            {name: here.get(name) for name in compared},
            there_is="the run",
            remedy="resume with the same settings, or choose another run name",
            every=True,
        )


class Run:
    """One run's folder; make one with :meth:`start`, use it in a ``with`` block or call :meth:`close`.

    config.yaml: the resolved settings. metrics.jsonl: one JSON object per event, keys sorted, the same for two runs
    of the same command. timing.jsonl: what depends on the clock and the machine. Normal/: artifacts, at the published
    place. pictures/: PNG. finished.json: the summary, there once the run is done.
    """

    def __init__(self, folder: Path, tracker: Tracker):
        self.folder = folder
        self.artifacts = folder / "Normal"
        self._tracker = tracker

    @classmethod
    def start(cls, place: Place, settings: Mapping) -> Run:
        """Begin a run at ``place``, or go on with the one there. Raises InputError as :meth:`Place.refuse`.

        What a resumed run recorded after its last checkpoint is then to be dropped with :meth:`truncate_metrics`.
        """
        place.refuse(settings)
        folder = place.folder
        settings = _plain(settings)
        state = run_state(folder)
        config = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
        if state != "absent" and place.overwrite:
            # Out of the way in one step first: a half-removed run must not pass for a run.
            trash = folder.with_name(f".{folder.name}.removed")
            shutil.rmtree(trash, ignore_errors=True)
            os.replace(folder, trash)
            shutil.rmtree(trash)
        write_text(folder / "config.yaml", config)
        (folder / "finished.json").unlink(missing_ok=True)
        run = cls(folder, open_tracker(place.tracker, folder, settings))
        if state != "absent" and place.resume:
            run._write_lines(run._lines())  # without a last line torn by a kill, which the next event would run into
        return run

    def record(self, event: str, iteration: int, **values) -> None:
        """Append one event to metrics.jsonl, and its numbers to the tracker as ``<event>/<name>``.

        Values: numbers, strings, tensors, and lists or dictionaries of them; what is not finite is written as null.
        Never a time: two runs of one command write the same lines (see :meth:`record_time`).
        """
        values = _plain(values, finite=True)
        self._append("metrics.jsonl", {**values, "event": event, "iteration": iteration})
        numbers = {
            f"{event}/{name}": value
            for name, value in values.items()
            if isinstance(value, (int, float)) and not isinstance(value, bool)
        }
        if numbers:
            self._tracker.numbers(numbers, iteration)

    def record_time(self, event: str, iteration: int, seconds: float) -> None:
        """Append how long something took to timing.jsonl."""
        self._append("timing.jsonl", {"event": event, "iteration": iteration, "seconds": round(seconds, 6)})

    def record_peak(self, iteration: int, peak: int | None) -> None:
        """Append to timing.jsonl the most memory that the session took up to ``iteration``, in bytes, if known."""
        if peak is not None:
            self._append("timing.jsonl", {"event": "peak", "iteration": iteration, "bytes": peak})

    def _append(self, name: str, entry: dict) -> None:
        append_line(self.folder / name, json.dumps(entry, sort_keys=True, allow_nan=False) + "\n")

    def truncate_metrics(self, iteration: int) -> None:
        """Drop the events after ``iteration``; -1 drops all.

        Called when resuming, with the checkpoint's iteration, it makes the metrics those of an uninterrupted run.
        """
        self._write_lines([(line, entry) for line, entry in self._lines() if entry["iteration"] <= iteration])
        self._tracker.rewind(iteration)

    def recorded(self, event: str) -> list[dict]:
        """The events of this kind in metrics.jsonl, in their order."""
        return [entry for _, entry in self._lines() if entry["event"] == event]

    def _write_lines(self, lines: list[tuple[str, dict]]) -> None:
        write_text(self.folder / "metrics.jsonl", "".join(line for line, _ in lines))

    def _lines(self) -> list[tuple[str, dict]]:
        path = self.folder / "metrics.jsonl"
        if not path.exists():
            return []
        pairs = []
        for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
            if not line.endswith(b"\n"):
                break  # only the last line can be torn: lines are appended whole, with their end
            try:
                entry = json.loads(line)
            except ValueError:
                entry = None
            if not isinstance(entry, dict) or not isinstance(entry.get("iteration"), int):
                raise InputError(f"{path}: line {number} is not an event")
            pairs.append((line.decode(), entry))
        return pairs

    def save_picture(self, name: str, picture: np.ndarray, iteration: int) -> None:
        """Write uint8 [H, W, 3] as ``pictures/<name>_<iteration>.png`` and to the tracker."""
        save_picture(self.folder / "pictures" / f"{name}_{iteration:06d}.png", picture)
        self._tracker.picture(name, picture, iteration)

    def finish(self, **summary) -> None:
        """Mark the run as done, with a summary in finished.json."""
        write_text(
            self.folder / "finished.json",
            json.dumps(_plain(summary, finite=True), sort_keys=True, indent=2, allow_nan=False) + "\n",
        )
        self.close()

    def close(self) -> None:
        """Let go of the tracker; the files are complete at any time."""
        self._tracker.close()
        self._tracker = Tracker()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def append_line(path: Path, line: str) -> None:
    """Append to a text file. An OSError names it; what a full disk took of the line is cut off again."""
    with open(path, "ab", buffering=0) as handle:
        before, data = handle.tell(), line.encode()
        try:
            if handle.write(data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            with contextlib.suppress(OSError):
                handle.truncate(before)
            error.filename = str(path)
            raise


class Follower(Run):
    """A run as seen by a process that leaves its files to another: takes everything, writes nothing."""

    def __init__(self, folder: Path):
        super().__init__(folder, Tracker())

    def _nothing(self, *_, **__) -> None: ...

    record = record_time = record_peak = truncate_metrics = save_picture = finish = _nothing


def _plain(value, finite: bool = False):
    """``value`` as what JSON and YAML know; ``finite``: with None for NaN and infinity, which JSON has not."""
    if isinstance(value, (Tensor, np.ndarray, np.generic)):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): _plain(item, finite) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, finite) for item in value]
    if isinstance(value, Path):
        return str(value)
    if finite and isinstance(value, float) and not math.isfinite(value):
        return None
    return value
