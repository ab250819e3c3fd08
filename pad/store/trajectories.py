"""Expert trajectories on disk: written epoch by epoch, read row by row, one safetensors file per expert.

``expert_0007.safetensors`` holds ``params [T+1, P]`` float32 (row 0: before training, row t: after epoch t; parameters
flattened in module order, shallow to deep), one ``[T+1]`` tensor per figure that was measured, and a description of
what the expert was trained on. A line has of them the ends alone, ``params [2, P]``, and ``way [T+1, L]`` float64, beta
of :mod:`pad.store.lines`. :mod:`pad.store.published` imports and exports the published form.
"""

import contextlib
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch

from pad.errors import InputError
from pad.store.files import names_in
from pad.store.identity import refuse_difference
from pad.store.lines import points, shares_of_way
from pad.store.naming import folder_of
from pad.store.tensors import Layout, TensorFile, open_tensors, tensor_writer

KIND = "trajectory"
LINE = "line"
FORMAT = 1

COMMON = ("data", "model", "preprocessing", "parameters")  # what all experts of a store share and its user must match

_REMEDY = "remove it and record that expert again (with buffer/buffer_CL.py), or import all experts again"

WITHOUT_ZCA_SUFFIX = ("Tiny", "ImageNet", "ImageNet1K")  # published folders of these bear no _NO_ZCA


def buffer_folder(
    buffer_path: Path | str, dataset: str, model: str, zca: bool, subset: str | None = None, res: int | None = None
) -> Path:
    """The folder of one setting's experts, ``<buffer_path>/<dataset>[_NO_ZCA][/<subset>/<res>]/<model>``, as published.

    ``<model>`` is what :func:`pad.store.naming.folder_of` says. ``subset`` and ``res`` (pixels) count for ImageNet
    only. Raises InputError when ImageNet comes without them.
    """
    folder = Path(buffer_path) / (dataset if zca or dataset in WITHOUT_ZCA_SUFFIX else f"{dataset}_NO_ZCA")
    if dataset == "ImageNet":
        if subset is None or res is None:
            raise InputError(f"the data set ImageNet needs a subset and a res, got subset {subset} and res {res}")
        folder = folder / subset / str(res)
    return folder / folder_of(model)


def describe(data: dict, model: str, parameters: Iterable[tuple[str, Iterable[int]]], preprocessing: dict) -> dict:
    """What a trajectory belongs to: identity of the data, model and its parameters, identity of the preprocessing.

    ``parameters`` are (name, shape) in module order, such as ``zip(flat_model.names, flat_model.shapes)``.
    """
    named = [[name, list(shape)] for name, shape in parameters]
    return json.loads(json.dumps({"data": data, "model": model, "preprocessing": preprocessing, "parameters": named}))


def expert_path(folder: Path | str, expert: int) -> Path:
    """The file of one expert."""
    return Path(folder) / f"expert_{expert:04d}.safetensors"


def expert_lock(folder: Path | str, expert: int) -> Path:
    """The lock that is held while an expert is made."""
    return Path(folder) / f".{expert_path('', expert).stem}.lock"


def recorded(folder: Path | str) -> list[int]:
    """Sorted indices of the experts that lie complete in ``folder``; none, and errors, as of :func:`names_in`."""
    matches = (re.fullmatch(r"expert_(\d{4,})\.safetensors", name) for name in names_in(folder))
    return sorted({int(match[1]) for match in matches if match and expert_path("", int(match[1])).name == match[0]})


@contextlib.contextmanager
def write_expert(
    folder: Path | str,
    expert: int,
    description: dict,
    *,
    epochs: int,
    seed: int | None,
    settings: dict,
    figures: Iterable[str] = (),
) -> Iterator[Callable]:
    """Write one expert's file; yields ``record(theta, **figures)``, to be called before training and after each epoch.

    ``theta [P]`` goes to disk at once, so a snapshot holds no graph and is no alias of living parameters. ``figures``
    names what may be measured with it (a figure that is not passed reads as nan). ``description`` is what
    :func:`describe` gives. The file appears, whole, when the block ends after exactly ``epochs + 1`` records; an
    existing one is replaced. ``record`` raises InputError when parameters are not finite.
    """
    path = expert_path(folder, expert)
    width = num_parameters(description["parameters"])
    measured = {name: torch.full((epochs + 1,), math.nan, dtype=torch.float32) for name in sorted(figures)}
    metadata = {key: description[key] for key in COMMON} | {"kind": KIND, "format": FORMAT}
    metadata |= {"expert": expert, "seed": seed, "settings": settings}
    layout: Layout = {"params": (torch.float32, (epochs + 1, width))}
    layout |= {name: (torch.float32, (epochs + 1,)) for name in measured}
    # The size is known before training and rows come in order, so rows are appended. A full disk is then an OSError
    # here and now; through a memory map it would kill the process.
    with tensor_writer(path, layout, metadata) as write:
        count = 0

        def record(theta: torch.Tensor, **values: float) -> None:
            nonlocal count
            if tuple(theta.shape) != (width,) or count > epochs:
                raise ValueError(
                    f"snapshot {count} of expert {expert} has shape {list(theta.shape)}; "
                    f"expected snapshots 0 to {epochs} of shape [{width}]"
                )
            row = theta.detach().to("cpu", torch.float32)
            if not row.isfinite().all():
                raise InputError(
                    f"the parameters of expert {expert} are not finite numbers after epoch {count}: training diverged, "
                    "a lower learning rate may help"
                )
            write(row)
            for name, value in values.items():
                measured[name][count] = value
            count += 1

        yield record
        if count != epochs + 1:
            raise RuntimeError(f"expert {expert} recorded {count} of {epochs + 1} snapshots; its file was not written")
        for values in measured.values():
            write(values)


def write_line(store: "TrajectoryStore", expert: int, folder: Path | str) -> None:
    """Write one expert's line into ``folder``; an existing file is replaced."""
    way, figures = store.way(expert), store.figures(expert)
    layout: Layout = {"way": (torch.float64, tuple(way.shape)), "params": (torch.float32, (2, store.num_parameters))}
    layout |= {name: (torch.float32, tuple(values.shape)) for name, values in figures.items()}
    with tensor_writer(expert_path(folder, expert), layout, store.header(expert) | {"kind": LINE}) as write:
        for block in (*way, *store.rows(expert, [0, store.epochs(expert)]), *figures.values()):
            write(block)


def num_parameters(parameters: list) -> int:
    """P of ``[name, shape]`` of each parameter."""
    return sum(_sizes(parameters))


def _sizes(parameters: list) -> list[int]:
    """How many numbers each parameter has."""
    return [math.prod(shape) for _, shape in parameters]


class TrajectoryStore:
    """The experts of one folder, read lazily: opening reads headers, ``rows`` reads the rows asked for."""

    def __init__(self, folder: Path, headers: dict[int, tuple[dict, int]]):
        self.folder = folder
        self._headers = headers
        self._ways: dict[int, torch.Tensor] = {}

    @classmethod
    def open(cls, folder: Path | str) -> "TrajectoryStore":
        """Open a folder of expert files. Raises InputError when there is none, or one is damaged or differs."""
        folder = Path(folder)
        experts = recorded(folder)
        if not experts:
            published = any(folder.glob("replay_buffer_[0-9]*.pt"))
            hint = "; the replay_buffer_*.pt there can be imported with scripts/import_buffer.py" if published else ""
            raise InputError(f"no expert trajectories in {folder}: record them with buffer/buffer_CL.py{hint}")
        headers: dict[int, tuple[dict, int]] = {}
        for expert in experts:
            path = expert_path(folder, expert)
            with _opened(path) as (_, headers[expert]):
                first = headers[experts[0]][0]
            refuse_difference(
                path,
                _comparable(headers[expert][0], first),
                _comparable(first, first),
                there_is="this expert",
                here_is=expert_path("", experts[0]).name,
                remedy="they do not belong together, move one of them away",
                whole=True,
            )
        return cls(folder, headers)

    def __len__(self) -> int:
        return len(self._headers)

    @property
    def experts(self) -> list[int]:
        """Sorted indices of the experts; gaps are allowed."""
        return list(self._headers)

    @property
    def metadata(self) -> dict:
        """What all experts share: ``data``, ``model``, ``preprocessing``, ``parameters`` (``[name, shape]``)."""
        return {key: self.header(self.experts[0])[key] for key in COMMON}

    @property
    def num_parameters(self) -> int:
        """P, the length of a row."""
        return num_parameters(self.metadata["parameters"])

    def header(self, expert: int) -> dict:
        """One expert's whole description: also its ``settings``, ``seed`` and ``expert`` index when it was trained."""
        return self._headers[expert][0]

    def epochs(self, expert: int) -> int:
        """T, the number of epochs the expert was trained for; its rows are 0..T."""
        return self._headers[expert][1]

    def rows(self, expert: int, epochs: Iterable[int]) -> torch.Tensor:
        """Parameters after the given epochs, float32 ``[n, P]`` on the CPU, read from disk now.

        Raises IndexError for an epoch outside 0..T, InputError when one of these rows is damaged, or the file has gone
        or is another one since opening, and of a line for an epoch between its ends.
        """
        epochs, last = list(epochs), self.epochs(expert)
        for epoch in epochs:
            if not 0 <= epoch <= last:
                raise IndexError(f"expert {expert} has epochs 0 to {last}, not {epoch}")
        if self.is_line(expert):
            if between := [epoch for epoch in epochs if 0 < epoch < last]:
                raise InputError(
                    f"{expert_path(self.folder, expert)} is a line: of epochs 0 to {last} it has the first and the "
                    f"last, not {between[0]}; take the buffer that it was made of"
                )
            epochs = [epoch // last for epoch in epochs]
        out = torch.empty(len(epochs), self.num_parameters)
        with self._open(expert) as file:
            for row, epoch in zip(out, epochs):
                row.copy_(file.row("params", epoch))
        return out

    def is_line(self, expert: int) -> bool:
        """Whether the expert's file has the ends of its trajectory alone."""
        return self.header(expert)["kind"] == LINE

    def way(self, expert: int) -> torch.Tensor:
        """beta of :mod:`pad.store.lines`, ``[T+1, L]`` float64; of a whole trajectory, whose rows are read, once."""
        if expert not in self._ways:
            with self._open(expert) as file:
                rows = (file.row("params", epoch) for epoch in range(self.epochs(expert) + 1))
                sizes = _sizes(self.metadata["parameters"])
                self._ways[expert] = file.tensor("way") if self.is_line(expert) else shares_of_way(rows, sizes)
        return self._ways[expert]

    def between(self, expert: int, epochs: Iterable[float]) -> torch.Tensor:
        """Points of the convexified trajectory at real numbers of epochs: ``[n, P]`` float64 on the CPU.

        Raises as :meth:`rows`.
        """
        epochs, last = list(epochs), self.epochs(expert)
        if outside := [epoch for epoch in epochs if not 0 <= epoch <= last]:
            raise IndexError(f"expert {expert} has epochs 0 to {last}, not {outside[0]}")
        return points(self.rows(expert, [0, last]), self.way(expert), _sizes(self.metadata["parameters"]), epochs)

    def params(self, expert: int) -> torch.Tensor:
        """All rows, float32 ``[T+1, P]``, as a map of the file. Raises InputError as :meth:`rows`, and of a line."""
        if self.is_line(expert):
            raise InputError(f"{expert_path(self.folder, expert)} is a line: it has two epochs of its trajectory alone")
        with self._open(expert) as file:
            return file.tensor("params")

    def figures(self, expert: int) -> dict[str, torch.Tensor]:
        """What was measured along the trajectory, each float32 ``[T+1]``, nan where it was not."""
        with self._open(expert) as file:
            return {name: file.tensor(name).clone() for name in file.layout if name not in ("params", "way")}

    @contextlib.contextmanager
    def _open(self, expert: int) -> Iterator[TensorFile]:
        path = expert_path(self.folder, expert)
        with _opened(path) as (file, header):
            if header != self._headers[expert]:
                raise InputError(f"{path} is not the file any more that it was when this run began; start again")
            yield file

    def refuse_other(self, expected: dict) -> None:
        """Raise InputError naming the first entry in which ``expected`` (from :func:`describe`) is another."""
        refuse_difference(
            self.folder,
            _comparable(self.metadata, expected),
            _comparable(expected, expected),
            there_is="the buffer",
            remedy="give another --buffer_path, or the settings it was made with",
            whole=True,
        )


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[TensorFile, tuple[dict, int]]]:
    """An expert's file, and its (metadata, T). Raises InputError when it is none."""
    with open_tensors(path, format=FORMAT, remedy=_REMEDY) as (file, metadata):
        if metadata.get("kind") not in (KIND, LINE):
            raise InputError(f"{path} is not a {KIND}")
        is_line = metadata["kind"] == LINE
        try:
            rows = file.layout["way" if is_line else "params"][1][0]
            layout: Layout = {name: (torch.float32, (rows,)) for name in file.layout}
            width = num_parameters(metadata["parameters"])
            layout["params"] = (torch.float32, (2 if is_line else rows, width))
            if is_line:
                layout["way"] = (torch.float64, (rows, len(metadata["parameters"])))
            named = {*COMMON, "expert", "seed", "settings"} <= metadata.keys()
            complete = named and isinstance(metadata["settings"], dict)
        except (KeyError, IndexError, TypeError, ValueError):
            complete = False
        if not complete or file.layout != layout or rows < 2 or width < 1:
            raise InputError(f"{path} is damaged: its header does not describe a trajectory of float32 parameters")
        yield file, (metadata, rows - 1)


def _comparable(description: dict, like: dict) -> dict:
    """What of a description must agree with that of ``like``.

    The shapes of parameters must, in order; what a layer is called is not part of a trajectory, so ``like`` names them.
    """
    parameters = description["parameters"]
    shapes = {name: shape for (name, _), (_, shape) in zip(like["parameters"], parameters)}
    common = {key: description[key] for key in COMMON}
    return common | {"parameters": f"{len(parameters)} tensors", "shape of parameter": shapes}
