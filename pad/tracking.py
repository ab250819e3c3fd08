"""The run folder: settings, metrics, pictures and artifacts of one run, and what follows it from outside."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from pad.errors import InputError
from pad.files import atomic_file, write_text

TRACKERS = ("none", "tensorboard", "wandb")

# The run folder


def run_folder(log_dir: Path | str, dataset: str, ipc: int, model: str, name: str) -> Path:
    """The place of a run, ``<log_dir>/<dataset>/<ipc>/<model>/<name>``.

    A data set "ImageNet/imagenette" becomes the folder "ImageNet-imagenette". Raises InputError for a name that is
    not the name of one folder.
    """
    if name in ("", ".", "..") or any(character in name for character in "/\\\0"):
        raise InputError(f"the run name {name!r} is not the name of a folder; it may hold no / and no \\")
    return Path(log_dir) / dataset.replace("/", "-") / str(ipc) / model / name


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


class Run:
    """One run's folder; make one with :meth:`start`, use it in a ``with`` block or call :meth:`close`.

    config.yaml: the resolved settings. metrics.jsonl: one JSON object per event, keys sorted, the same for two runs
    of the same command. timing.jsonl: what depends on the clock. Normal/: artifacts, at the published place.
    pictures/: PNG. finished.json: the summary, there once the run is done.
    """

    def __init__(self, folder: Path, settings: Mapping, tracker: str):
        self.folder = folder
        self.artifacts = folder / "Normal"
        self.pictures = folder / "pictures"
        self._sink = _open_sink(tracker, folder, settings)

    @classmethod
    def start(cls, folder: Path | str, settings: Mapping, *, resume: bool = False, overwrite: bool = False,
              tracker: str = "none", may_differ: Collection[str] = (), defaults: Mapping = {}) -> Run:
        """Begin a run in ``folder``, or go on with the one there.

        resume: go on with the run, if there is one; what was recorded after the last checkpoint is then to be dropped
        with :meth:`truncate_metrics`. A finished run is thereby unfinished again. may_differ: settings, by dotted name,
        which a resumed run may change (a device, for example). defaults: what holds of settings that a run does not
        name because it is older than they are. overwrite: remove whatever run is there, finished or not, with all files
        of its folder. Raises InputError as :meth:`check`, having changed nothing.
        """
        folder, settings = Path(folder), _plain(settings)
        cls.check(folder, settings, resume=resume, overwrite=overwrite, tracker=tracker, may_differ=may_differ,
                  defaults=defaults)
        state = run_state(folder)
        config = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
        if state != "absent" and overwrite:
            # Out of the way in one step first: a half-removed run must not pass for a run.
            trash = folder.with_name(f".{folder.name}.removed")
            shutil.rmtree(trash, ignore_errors=True)
            os.replace(folder, trash)
            shutil.rmtree(trash)
        write_text(folder / "config.yaml", config)
        (folder / "finished.json").unlink(missing_ok=True)
        run = cls(folder, settings, tracker)
        if state != "absent" and resume:
            run._write_lines(run._lines())  # without a last line torn by a kill, which the next event would run into
        return run

    @staticmethod
    def check(folder: Path | str, settings: Mapping, *, resume: bool = False, overwrite: bool = False,
              tracker: str = "none", may_differ: Collection[str] = (), defaults: Mapping = {}) -> None:
        """Raise InputError when :meth:`start` could not begin: a run is in the way and neither resumed nor overwritten,
        the settings of a resumed run differ, or the tracker is unknown or not installed."""
        folder = Path(folder)
        if resume and overwrite:
            raise InputError("resume and overwrite contradict each other; choose one")
        if any(path.is_file() for path in (folder, *folder.parents)):
            raise InputError(f"the run folder {folder} cannot be made: there is a file in its place")
        _check_tracker(tracker)
        state = run_state(folder)
        if state == "absent" or overwrite:
            return
        if not resume:
            choice = "--resume to go on with it, or " if state == "unfinished" else "choose another --name, or "
            article = "an" if state == "unfinished" else "a"
            raise InputError(f"{folder} holds {article} {state} run; {choice}--overwrite to replace it")
        _check_same_settings(folder, _plain(settings), may_differ, _plain(defaults))

    def record(self, event: str, iteration: int, **values) -> None:
        """Append one event to metrics.jsonl, and its numbers to the tracker as ``<event>/<name>``.

        Values: numbers, strings, tensors, and lists or dictionaries of them; what is not finite is written as null.
        Never a time: two runs of one command write the same lines (see :meth:`record_time`).
        """
        values = _plain(values, finite=True)
        self._append("metrics.jsonl", {**values, "event": event, "iteration": iteration})
        numbers = {f"{event}/{name}": value for name, value in values.items()
                   if isinstance(value, (int, float)) and not isinstance(value, bool)}
        if numbers:
            self._sink.numbers(numbers, iteration)

    def record_time(self, event: str, iteration: int, seconds: float) -> None:
        """Append how long something took to timing.jsonl."""
        self._append("timing.jsonl", {"event": event, "iteration": iteration, "seconds": round(seconds, 6)})

    def _append(self, name: str, entry: dict) -> None:
        append_line(self.folder / name, json.dumps(entry, sort_keys=True, allow_nan=False) + "\n")

    def events(self) -> list[dict]:
        """Everything in metrics.jsonl, in order. Raises InputError naming a damaged line."""
        return [entry for _, entry in self._lines()]

    def truncate_metrics(self, iteration: int) -> None:
        """Drop the events after ``iteration``; -1 drops all.

        Called when resuming, with the checkpoint's iteration, it makes the metrics those of an uninterrupted run.
        """
        self._write_lines([(line, entry) for line, entry in self._lines() if entry["iteration"] <= iteration])
        self._sink.rewind(iteration)

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

    def save_picture(self, name: str, picture: np.ndarray, iteration: int) -> Path:
        """Write uint8 [H, W, 3] as ``pictures/<name>_<iteration>.png`` and to the tracker. Returns the path."""
        path = self.pictures / f"{name}_{iteration:06d}.png"
        save_picture(path, picture)
        self._sink.picture(name, picture, iteration)
        return path

    def finish(self, **summary) -> None:
        """Mark the run as done, with a summary in finished.json."""
        write_text(self.folder / "finished.json",
                   json.dumps(_plain(summary, finite=True), sort_keys=True, indent=2, allow_nan=False) + "\n")
        self.close()

    def close(self) -> None:
        """Let go of the tracker; the files are complete at any time."""
        self._sink.close()
        self._sink = _NoSink()

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
        self.folder, self._sink = folder, _NoSink()

    def _nothing(self, *_, **__) -> None: ...

    record = record_time = truncate_metrics = save_picture = finish = _nothing


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


def _flat(settings: Mapping, prefix: str = "") -> dict:
    """Nested settings as one dictionary of dotted names."""
    flat = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _check_same_settings(folder: Path, settings: Mapping, may_differ: Collection[str], defaults: Mapping) -> None:
    """Raise InputError naming every setting that differs from those the run in ``folder`` was started with."""
    after = _flat(settings)
    before = {name: value for name, value in _flat(defaults).items() if name in after}
    before |= _flat(recorded_settings(folder))
    differing = [f"{name}: {before.get(name)} in the run, {after.get(name)} in the config"
                 for name in sorted(before.keys() | after.keys())
                 if name not in may_differ and before.get(name) != after.get(name)]
    if differing:
        raise InputError(f"{folder} was started with other settings: {'; '.join(differing)}. "
                         "Resume with the same ones, or choose another run name")


# Optional trackers


class _NoSink:
    def numbers(self, values: dict[str, float], iteration: int) -> None: ...

    def picture(self, name: str, picture: np.ndarray, iteration: int) -> None: ...

    def rewind(self, iteration: int) -> None: ...

    def close(self) -> None: ...


class _TensorBoard(_NoSink):
    def __init__(self, folder: Path):
        self._folder = str(folder / "tensorboard")
        self._open(None)

    def _open(self, purge_step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(self._folder, purge_step=purge_step)

    def numbers(self, values: dict[str, float], iteration: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, iteration)

    def picture(self, name: str, picture: np.ndarray, iteration: int) -> None:
        self._writer.add_image(name, picture, iteration, dataformats="HWC")

    def rewind(self, iteration: int) -> None:
        self._writer.close()
        self._open(iteration + 1)

    def close(self) -> None:
        self._writer.close()


class _WandB(_NoSink):
    """Each start or resumption is a W&B run of its own, in the group of its folder: W&B's steps cannot go back."""

    def __init__(self, folder: Path, settings: Mapping):
        import wandb

        self._image = wandb.Image
        self._run = wandb.init(project=settings.get("project", "PAD"), name=folder.name, group=folder.as_posix()[-128:],
                               dir=str(folder), config=dict(settings))

    def numbers(self, values: dict[str, float], iteration: int) -> None:
        self._run.log(values, step=iteration)

    def picture(self, name: str, picture: np.ndarray, iteration: int) -> None:
        self._run.log({name: self._image(picture)}, step=iteration)

    def close(self) -> None:
        self._run.finish()


def _check_tracker(tracker: str) -> None:
    if tracker not in TRACKERS:
        raise InputError(f"the tracker {tracker!r} is not one of {', '.join(TRACKERS)}")
    try:
        if tracker == "tensorboard":
            import torch.utils.tensorboard  # noqa: F401
        if tracker == "wandb":
            import wandb  # noqa: F401
    except ImportError:
        raise InputError(f"tracker {tracker} is not installed; pip install -e '.[tracking]'") from None


def _open_sink(tracker: str, folder: Path, settings: Mapping) -> _NoSink:
    if tracker == "tensorboard":
        return _TensorBoard(folder)
    return _WandB(folder, settings) if tracker == "wandb" else _NoSink()


# Pictures

MARGIN, GAP, BLOCK_GAP = 16, 2, 28  # in pixels: around the picture, between tiles, between columns of classes
ROWS, MAX_TILES = 25, 500  # class rows per column; tiles per picture: some 2000 x 1700 pixels at 64 per tile
INK = (32, 32, 32)


def image_grid(pixels: Tensor, classes: Tensor, class_names: Sequence[str], *, caption: str = "",
               max_per_class: int = 10, scale: int | None = None) -> np.ndarray:
    """A picture of images, one row per class with its name at the left, on white. Returns uint8 [height, width, 3].

    pixels [N, 1 or 3, H, W] in [0, 1]; classes [N] int64, in any order. Rows come by class number, the images of a row
    in the order given. At most ``max_per_class`` images of a class and 500 images in all are shown; the caption says
    when that leaves some out. More than 25 classes stand in several columns. ``scale``: whole-number enlargement,
    without smoothing; None: to tiles of 64 pixels or more. Raises InputError when there are neither 1 nor 3 channels.
    """
    count, channels, height, width = pixels.shape
    if channels not in (1, 3):
        raise InputError(f"a picture needs images of 1 or 3 channels; these have {channels}")
    scale = scale or math.ceil(64 / max(height, width))
    present, sizes = classes.cpu().unique(return_counts=True)
    columns = min(int(sizes.max()), max_per_class)
    shown = present[: max(1, MAX_TILES // columns)].tolist()
    notes = [caption] if caption else []
    if columns < sizes.max():
        of_all = f" of {int(sizes.max())}" if sizes.min() == sizes.max() else ""
        notes.append(f"first {columns}{of_all} images per class")
    if len(shown) < len(present):
        notes.append(f"first {len(shown)} of {len(present)} classes")

    tile_height, tile_width = height * scale, width * scale
    font = ImageFont.load_default(size=min(16, max(11, tile_height // 4)))
    names = [_shorten(str(class_names[c]), font, 150) for c in shown]
    label_width = math.ceil(max(font.getlength(name) for name in names))
    blocks = math.ceil(len(shown) / ROWS)
    rows = math.ceil(len(shown) / blocks)
    caption_font = ImageFont.load_default(size=16)
    text = ", ".join(notes)
    top = MARGIN + (28 if text else 0)
    block_width = label_width + 8 + columns * (tile_width + GAP) - GAP
    total_width = max(2 * MARGIN + blocks * block_width + (blocks - 1) * BLOCK_GAP,
                      2 * MARGIN + math.ceil(caption_font.getlength(text)))
    canvas = np.full((top + rows * (tile_height + GAP) - GAP + MARGIN, total_width, 3), 255, dtype=np.uint8)

    def corner(index: int) -> tuple[int, int]:
        """Upper left corner of a class's row: y, x."""
        block, row = divmod(index, rows)
        return top + row * (tile_height + GAP), MARGIN + block * (block_width + BLOCK_GAP)

    classes = classes.to(pixels.device)
    for index, c in enumerate(shown):
        y, x = corner(index)
        x += label_width + 8
        images = pixels[classes == c][:columns].detach().float().nan_to_num().clamp(0, 1).mul(255).round()
        tiles = images.to(torch.uint8).cpu().expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()
        for tile in tiles.repeat(scale, axis=1).repeat(scale, axis=2):
            canvas[y : y + tile_height, x : x + tile_width] = tile
            x += tile_width + GAP

    picture = Image.fromarray(canvas)
    draw = ImageDraw.Draw(picture)
    if text:
        draw.text((MARGIN, MARGIN), text, fill=INK, font=caption_font)
    for index, name in enumerate(names):
        y, x = corner(index)
        draw.text((x + label_width, y + tile_height // 2), name, fill=INK, font=font, anchor="rm")
    return np.asarray(picture)


def _shorten(name: str, font, width: int) -> str:
    """``name``, cut off with "..." where it would be wider than ``width`` pixels."""
    if font.getlength(name) <= width:
        return name
    while name and font.getlength(name + "...") > width:
        name = name[:-1]
    return name.rstrip(" ,") + "..."


def before_after(before: Tensor, after: Tensor, classes: Tensor, class_names: Sequence[str], iteration: int,
                 **options) -> np.ndarray:
    """The images at iteration 0 and at ``iteration`` side by side: two of :func:`image_grid`, with its options."""
    pair = [image_grid(pixels, classes, class_names, caption=f"iteration {it}", **options)
            for pixels, it in ((before, 0), (after, iteration))]
    return np.concatenate(pair, axis=1)


def save_picture(path: Path | str, picture: np.ndarray) -> None:
    """Write uint8 [H, W, 3] as a PNG file, atomically; equal pictures give equal bytes."""
    with atomic_file(path) as handle:
        Image.fromarray(picture).save(handle, format="PNG")


def save_grid(path: Path | str, pixels: Tensor, classes: Tensor, class_names: Sequence[str], **options) -> None:
    """Write :func:`image_grid` as a PNG file."""
    save_picture(path, image_grid(pixels, classes, class_names, **options))


def save_before_after(path: Path | str, before: Tensor, after: Tensor, classes: Tensor, class_names: Sequence[str],
                      iteration: int, **options) -> None:
    """Write :func:`before_after` as a PNG file."""
    save_picture(path, before_after(before, after, classes, class_names, iteration, **options))


# Tables


def result_table(rows: Sequence[Mapping], columns: Sequence[str]) -> str:
    """Rows (column -> value) as an aligned plain-text table without a final newline.

    Numbers stand to the right, floats with 4 significant digits; None and what a row lacks become "-".
    """
    def cell(value) -> str:
        if value is None:
            return "-"
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    values = [[row.get(column) for column in columns] for row in rows]
    numeric = [all(value is None or isinstance(value, (int, float)) for value in column) for column in zip(*values)] \
        or [False] * len(columns)
    cells = [list(map(str, columns)), *([cell(value) for value in line] for line in values)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    cells.insert(1, ["-" * width for width in widths])
    lines = ([text.rjust(width) if right else text.ljust(width) for text, width, right in zip(line, widths, numeric)]
             for line in cells)
    return "\n".join("  ".join(line).rstrip() for line in lines)
