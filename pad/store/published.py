"""``replay_buffer_<k>.pt`` files, as published with MTT, DATM and PAD: imported and exported."""

import logging
import math
import re
from collections.abc import Iterator
from pathlib import Path

import torch

from pad.errors import InputError
from pad.store.files import names_in
from pad.store.foreign import load_pt, save_pt
from pad.store.locks import holder, only_writer, remove_leftovers
from pad.store.trajectories import TrajectoryStore, expert_lock, expert_path, recorded, write_expert

log = logging.getLogger("pad")


def importable_files(source: Path | str, folder: Path | str) -> list[Path]:
    """The ``replay_buffer_<k>.pt`` of ``source``, by number.

    Raises InputError when there are none, or ``folder``, which they are to be imported to, has experts already, or an
    expert that another process writes.
    """
    files = _published_files(source)
    if not files:
        raise InputError(f"no replay_buffer_<number>.pt in {source}")
    if existing := recorded(folder):
        first = expert_path("", existing[0])
        raise InputError(f"{folder} already holds {first}; move its experts away before importing others")
    remove_leftovers(folder)
    if held := sorted(Path(folder).glob(expert_lock("", 0).name.replace("0000", "*"))):
        raise InputError(f"an expert of {folder} is being written by {holder(held[0])}; wait for it to end, or stop it")
    return files


def import_published(source: Path | str, folder: Path | str, description: dict) -> int:
    """Turn published ``replay_buffer_<k>.pt`` into expert files of ``folder``, numbered from 0; returns how many.

    ``description`` (from :func:`describe`) says what the experts were trained on, since the published form does not.
    Files are mapped one at a time, never unpickled as code; one epoch is in memory. Raises InputError, leaving no
    expert behind, when a file holds anything but trajectories of that network, numbers that are not finite, or an
    expert whose epochs are all equal (the published code records one aliased state when it trains on the CPU). And
    where another process writes experts there, too.
    """
    written: list[Path] = []
    try:
        for path in importable_files(source, folder):
            experts = load_pt(path)  # it stays on disk: the published ones hold ten experts, 1.3 GB and more
            if not isinstance(experts, (list, tuple)) or not experts:
                raise InputError(f"{path} is not a list of experts")
            for position, snapshots in enumerate(experts):
                where = f"{path}, expert {position}"
                if not isinstance(snapshots, (list, tuple)) or len(snapshots) < 2:
                    raise InputError(f"{where} is not a list of two or more epochs")
                settings = {"imported": path.name, "position": position}
                number, epochs = len(written), len(snapshots) - 1
                with only_writer(expert_lock(folder, number), f"expert {number} in {folder}"):
                    if recorded(folder) != list(range(number)):
                        raise InputError(f"another process has written experts into {folder} in the meantime")
                    with write_expert(
                        folder, number, description, epochs=epochs, seed=None, settings=settings
                    ) as record:
                        for theta in _flat_snapshots(snapshots, where, description):
                            record(theta)
                    written.append(expert_path(folder, number))
            log.info("imported %d experts from %s", len(experts), path)
    except BaseException:
        for expert_file in written:
            expert_file.unlink()
        raise
    return len(written)


def _published_files(folder: Path | str) -> list[Path]:
    matches = (re.fullmatch(r"replay_buffer_(\d+)\.pt", name) for name in names_in(folder))
    return [Path(folder) / match[0] for match in sorted((m for m in matches if m), key=lambda match: int(match[1]))]


def _flat_snapshots(snapshots: list | tuple, where: str, description: dict) -> Iterator[torch.Tensor]:
    """Each epoch of a published expert as ``[P]``, checked against the network's parameters."""
    model, parameters = description["model"], description["parameters"]
    first, moved = None, False
    for epoch, tensors in enumerate(snapshots):
        at = f"{where}, epoch {epoch}"
        if not isinstance(tensors, (list, tuple)):
            raise InputError(f"{at} is not a list of parameter tensors")
        if len(tensors) != len(parameters):
            raise InputError(f"{at} has {len(tensors)} parameter tensors, {model} has {len(parameters)}")
        for tensor, (name, shape) in zip(tensors, parameters):
            if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided or tensor.dtype != torch.float32:
                raise InputError(f"{at}: parameter {name} is not a dense float32 tensor")
            if list(tensor.shape) != shape:
                raise InputError(f"{at}: parameter {name} has shape {list(tensor.shape)}, in {model} it is {shape}")
        theta = torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
        if not theta.isfinite().all():
            raise InputError(f"{at}: the parameters are not finite numbers")
        first = theta if first is None else first
        moved = moved or not torch.equal(first, theta)
        yield theta
    if not moved:
        raise InputError(
            f"{where}: all {len(snapshots)} epochs are identical, as when one aliased state was recorded in place of "
            "copies; it holds no trajectory and must be recorded anew"
        )


def export_published(store: TrajectoryStore, folder: Path | str, save_interval: int = 10) -> list[Path]:
    """Write a store as published ``replay_buffer_<k>.pt`` files of ``save_interval`` experts each; returns their paths.

    The form is a list of experts, each a list of T+1 epochs, each a list of float32 parameter tensors. Parameters are
    mapped from disk while they are written. Raises InputError when ``folder`` already holds such files.
    """
    folder = Path(folder)
    if save_interval < 1:
        raise InputError(f"save_interval must be 1 or more, got {save_interval}")
    if existing := _published_files(folder):
        raise InputError(f"{folder} already holds {existing[0].name}; choose another folder or move it away")
    shapes = [shape for _, shape in store.metadata["parameters"]]
    sizes = [math.prod(shape) for shape in shapes]
    paths: list[Path] = []
    for start in range(0, len(store), save_interval):
        experts = []
        for expert in store.experts[start : start + save_interval]:
            params = store.params(expert)  # a map of the file, no copy
            # By way of numpy each parameter gets a storage of its own; a slice of params would be saved with all of it.
            experts.append(
                [
                    [torch.from_numpy(part.numpy()).reshape(shape) for part, shape in zip(row.split(sizes), shapes)]
                    for row in params
                ]
            )
        paths.append(folder / f"replay_buffer_{len(paths)}.pt")
        save_pt(paths[-1], experts)
        log.info("exported %d experts to %s", len(experts), paths[-1])
    return paths
