"""A study's file: methods x images per class x seeds, each cell with the settings of all commands it takes, checked."""

import difflib
import hashlib
import itertools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from pad.commands.common import Common, _words
from pad.commands.coreset import CoresetSettings
from pad.commands.distribution import DMSettings
from pad.commands.evaluate import EvaluationSettings
from pad.commands.gradient import DCSettings
from pad.commands.record import BufferSettings
from pad.commands.trajectory import DistillSettings
from pad.config import Device, FilePath, Settings, checkout, path_base, read_yaml, setting
from pad.errors import InputError
from pad.nn.networks import evaluation_pool


@dataclass(kw_only=True)
class StudySettings(Settings):
    """``scripts/study.py FILE``: run a grid of methods, sizes and seeds on one data set, and report it (docs/STUDIES.md)."""

    study: FilePath | None = setting(None, "YAML file of the study; may stand alone, as the first argument")
    out: FilePath | None = setting(
        None, "folder of all that is made; default: the file's out, or runs/studies/<its name> in the checkout"
    )
    data_path: FilePath | None = setting(None, "folder of the data set; default: the file's")
    device: Device | None = setting(None, "auto, cpu, cuda, cuda:1; default: the file's")
    methods: str = setting("", "only these of the file's methods, as DC,DM")
    seeds: str = setting("", "only these seeds, as 0,1,2")
    ipc: str = setting("", "only these sizes, as 1,10")

    def check(self) -> None:
        super().check()
        if self.study is None:
            raise InputError("no study is named: give its YAML file, as configs/studies/cifar10.yaml")
        for name in ("seeds", "ipc"):
            if not all(word.isascii() and word.isdigit() for word in _words(getattr(self, name))):
                raise InputError(f"{name}: {getattr(self, name)!r} is not a list of whole numbers, as 0,1,2")

    def numbers(self, name: str) -> list[int]:
        """``seeds`` or ``ipc`` as numbers; none where all are meant."""
        return [int(word) for word in _words(getattr(self, name))]

    @property
    def method_names(self) -> list[str]:
        """Names of methods; none where all are meant."""
        return _words(self.methods)


_KEYS = ("out", "seeds", "ipc", "reference", "common", "buffers", "methods", "evaluation", "templates")

_COMMANDS = {"coreset": CoresetSettings, "PAD": DistillSettings, "DC": DCSettings, "DM": DMSettings}

_OWN = ("by", "buffer", "by_ipc")  # keys of a method that are not settings of its command

# What the study decides, for all cells alike: data, seeds, sizes, and where things lie
_DATA = frozenset(field.name for field in fields(Common)) - {"model", "seed"}

_DECIDED = frozenset(
    "seed ipc out name log_dir buffer_path ranking_path resume overwrite synthetic data_dir label_dir lr_dir baselines".split()
)

# Where things lie and run does not change what they are
_PLACES = frozenset(
    "data_path device images_on buffer_path ranking_path log_dir out name resume overwrite tracker project".split()
)


@dataclass(frozen=True)
class Cell:
    """One method at one size with one seed: the settings of all commands it takes."""

    method: str
    ipc: int
    seed: int
    buffer: BufferSettings | None
    distilling: Settings
    evaluation: dict  # all settings but the set to evaluate, which is yet to be made
    name: str  # of its files: says all settings
    recipe: dict  # what the name stands for

    @property
    def about(self) -> str:
        """The cell in words."""
        return f"{self.method}, ipc {self.ipc}, seed {self.seed}"


@dataclass(frozen=True)
class Grid:
    """What a study's file says, and where."""

    where: str
    out: Path
    seeds: list[int]
    sizes: list[int]
    reference: str | None
    common: Common  # data and device
    shared: Mapping  # settings for every command that has them
    buffers: Mapping
    methods: Mapping
    evaluation: Mapping

    @classmethod
    def read(cls, settings: StudySettings) -> "Grid":
        """The file, and what flags say instead."""
        where, base = settings.study, path_base(Path(settings.study))
        content = read_yaml(where)
        _known(content, _KEYS, where)
        shared, buffers, methods, evaluation = (
            _mapping(content.get(key) or {}, f"{where}: {key}")
            for key in ("common", "buffers", "methods", "evaluation")
        )
        kinds = (BufferSettings, *_COMMANDS.values(), EvaluationSettings)
        _known(shared, {name for kind in kinds for name in _names(kind)} - _DECIDED, f"{where}: common")
        _check_names(methods, f"{where}: methods")
        _check_names(buffers, f"{where}: buffers")
        reference = content.get("reference")
        if reference is not None and not (isinstance(reference, str) and reference in methods):
            nearest = _nearest(reference, methods)
            raise InputError(f"{where}: reference: {reference!r} is not in methods; the nearest is {nearest}")
        data = Common.with_paths({key: value for key, value in shared.items() if key in _names(Common)}, base)
        flags = {
            "data_path": settings.data_path and str(Path(settings.data_path).absolute()),
            "device": settings.device,
        }
        data |= {key: value for key, value in flags.items() if value is not None}
        try:
            common = Common.resolve(data)
            default = checkout() / "runs" / "studies" / Path(where).stem
            out = StudySettings.resolve(
                {"study": where} | StudySettings.with_paths({"out": content.get("out")}, base)
            ).out
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
        return cls(
            where,
            Path(settings.out or out or default).absolute(),
            _numbers(content.get("seeds", [0]), f"{where}: seeds", low=0),
            _numbers(content.get("ipc"), f"{where}: ipc", low=1),
            reference,
            common,
            {key: value for key, value in shared.items() if key not in _DATA},
            buffers,
            methods,
            evaluation,
        )

    def cells(self) -> list[Cell]:
        """All of them, seed by seed. Raises InputError for settings that a command does not take, naming the method."""
        for method in self.methods:  # those of sizes that are not in the grid, too
            for ipc in _mapping(self._entry(method).get("by_ipc") or {}, f"{self.where}: {method}: by_ipc"):
                if type(ipc) is not int or ipc < 1:
                    raise InputError(f"{self.where}: {method}: by_ipc: {ipc!r} is not a number of images per class")
                self._cell(method, ipc, self.seeds[0])
        return [
            self._cell(method, ipc, seed)
            for seed, ipc, method in itertools.product(self.seeds, self.sizes, self.methods)
        ]

    def wanted(self, settings: StudySettings, cells: list[Cell]) -> list[Cell]:
        """Those of the cells that flags ask for."""
        asked = {"method": settings.method_names, "seed": settings.numbers("seeds"), "ipc": settings.numbers("ipc")}
        there = {"method": list(self.methods), "seed": self.seeds, "ipc": self.sizes}
        for key, values in asked.items():
            for value in values:
                if value not in there[key]:
                    raise InputError(f"{self.where} has no {key} {value}; the nearest is {_nearest(value, there[key])}")
        return [
            cell for cell in cells if all(getattr(cell, key) in (values or there[key]) for key, values in asked.items())
        ]

    def _entry(self, method: str) -> Mapping:
        return _mapping(self.methods[method], f"{self.where}: {method}")

    def _cell(self, method: str, ipc: int, seed: int) -> Cell:
        about, entry = f"{self.where}: {method}", self._entry(method)
        by = entry.get("by")
        if not isinstance(by, str) or by not in _COMMANDS:
            raise InputError(f"{about}: by: {by!r} is not one of {', '.join(_COMMANDS)}")
        command = _COMMANDS[by]
        own = {key: value for key, value in entry.items() if key not in _OWN}
        own |= _mapping((entry.get("by_ipc") or {}).get(ipc) or {}, f"{about}: by_ipc: {ipc}")

        buffer, places = self._buffer(entry.get("buffer"), about, seed), {"ipc": ipc}
        if buffer is not None:
            places["buffer_path"] = buffer.buffer_path
        if command is not CoresetSettings and ("buffer_path" in _names(command)) != (buffer is not None):
            raise InputError(f"{about}: by: {by} {'has no use for a buffer' if buffer else 'needs a buffer'}")
        made = self._resolve(command, own, about, seed, places)
        if buffer is not None and buffer.model != made.model:
            raise InputError(f"{about}: model: {made.model}, but its buffer's is {buffer.model}")
        scored = self._resolve(EvaluationSettings, self.evaluation, f"{self.where}: evaluation", seed, _SCORED)
        if len(evaluation_pool(scored.eval_mode, scored.model)) > 1:
            raise InputError(
                f"{self.where}: evaluation: eval_mode: {scored.eval_mode} is of several networks; a cell has one"
            )
        recipe = {"by": by, "buffer": buffer and _recipe(buffer), "set": _recipe(made), "evaluation": _recipe(scored)}
        name = f"{slug(method)}-ipc{ipc}-seed{seed}-{_digest(recipe)}"
        if command is CoresetSettings:
            places["out"] = str(self.out / "sets" / name)
        else:
            places |= {"log_dir": str(self.out / "sets"), "name": name, "resume": True}
        if "ranking_path" in _names(command):
            places["ranking_path"] = self._rankings(made)
        made = self._resolve(command, own, about, seed, places)
        evaluation = {key: value for key, value in scored.as_dict().items() if key != "synthetic"}
        return Cell(method, ipc, seed, buffer, made, evaluation, name, recipe)

    def _buffer(self, name: str | None, about: str, seed: int) -> BufferSettings | None:
        if name is None:
            return None
        if not isinstance(name, str) or name not in self.buffers:
            raise InputError(
                f"{about}: buffer: {name!r} is not in buffers; the nearest is {_nearest(name, self.buffers)}"
            )
        where = f"{self.where}: buffers: {name}"
        given = _mapping(self.buffers[name], where)
        buffer = self._resolve(BufferSettings, given, where, seed, {})
        folder = self.out / "buffers" / f"{slug(name)}-seed{seed}-{_digest(_recipe(buffer))}"
        return self._resolve(
            BufferSettings, given, where, seed, {"buffer_path": str(folder), "ranking_path": self._rankings(buffer)}
        )

    def _rankings(self, settings) -> str:
        """The folder of rankings: one for all that score difficulty in the same way."""
        recipe = {"data": {key: _recipe(self.common).get(key) for key in _DATA - _PLACES}, "scoring": settings.scoring}
        return str(self.out / "rankings" / f"seed{settings.seed}-{_digest(recipe)}")

    def _resolve(self, kind: type[Settings], given: Mapping, about: str, seed: int, places: Mapping) -> Settings:
        """``kind`` from what is common, as far as it has such settings, and from ``given``."""
        data = {key: value for key, value in self.common.as_dict().items() if key in _DATA}
        shared = {key: value for key, value in self.shared.items() if key in _names(kind)}
        for key in given:
            if key in _DATA:
                raise InputError(f"{about}: {key} is the same for the whole study: it belongs in common")
            if key in _DECIDED:
                raise InputError(f"{about}: {key} is not for a part of a study: the study decides it")
        try:
            return kind.resolve({**data, **shared, "seed": seed, **given, **places})
        except InputError as error:
            raise InputError(f"{about}: {error}") from None


_SCORED = {"synthetic": ".", "baselines": "none"}  # the set is named when it is there


def _recipe(settings: Settings) -> dict:
    """All settings that say what comes out."""
    return {key: value for key, value in settings.as_dict().items() if key not in _PLACES}


def _names(kind: type[Settings]) -> set[str]:
    return {field.name for field in fields(kind)}


def _digest(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]


def slug(name: str) -> str:
    """A name as part of a file's."""
    return re.sub(r"[^A-Za-z0-9.]+", "_", name).strip("_.")


def _check_names(entries: Mapping, where: str) -> None:
    """Raise InputError for a name that is not text, or that stands for the same files as another."""
    if where.endswith("methods") and not entries:
        raise InputError(f"{where}: there are none")
    slugs: dict[str, str] = {}
    for name in entries:
        if not isinstance(name, str) or any(character in name for character in ",|\n") or not slug(name):
            raise InputError(
                f"{where}: {name!r} is no name: a name is text without commas and |, with a letter or digit"
            )
        if slugs.setdefault(slug(name), name) != name:
            raise InputError(f"{where}: {name!r} and {slugs[slug(name)]!r} are too much alike to name files")


def _mapping(value, where: str) -> Mapping:
    if not isinstance(value, Mapping):
        raise InputError(f"{where} is not a list of `key: value` lines")
    return value


def _known(content: Mapping, known, where: str) -> None:
    for key in content:
        if key not in known:
            raise InputError(f"{where}: unknown key {key!r}; the nearest is {_nearest(key, known)}")


def _nearest(name, known) -> str:
    return difflib.get_close_matches(str(name), sorted(map(str, known)), n=1, cutoff=0)[0] if known else "none"


def _numbers(values, where: str, low: int) -> list[int]:
    values = [values] if type(values) is int else values
    if not isinstance(values, list) or not values or not all(type(value) is int and value >= low for value in values):
        raise InputError(f"{where}: {values!r} is not a list of whole numbers from {low} on")
    return list(dict.fromkeys(values))
