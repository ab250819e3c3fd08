"""A study's file: methods x images per class x seeds, each cell with the settings of all commands it takes, checked."""

import dataclasses
import itertools
import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import yaml

from pad.commands.common import Common, words
from pad.commands.coreset import CoresetSettings
from pad.commands.distil import Distilling
from pad.commands.evaluate import EvaluationSettings
from pad.commands.quantise import QuantiseSettings
from pad.commands.record import BufferSettings
from pad.commands.table import COMMANDS
from pad.config import (
    DATA,
    MODEL,
    PLACE,
    RECIPE,
    REPORT,
    SEED,
    UNNAMED,
    Device,
    FilePath,
    Role,
    Settings,
    Some,
    checkout,
    path_base,
    read_yaml,
    setting,
)
from pad.errors import InputError
from pad.store.files import slug
from pad.store.identity import digest, nearest
from pad.study.scales import at_scale, from_base

FIGURES = ("layers", "sets")

_PARTS = ("common", "bases", "buffers", "methods", "evaluation", "stands_for")
_KEYS = ("scales", "out", "store", "seeds", "ipc", "reference", "note", "x", "figures", "costs", "templates", *_PARTS)
_OWN = ("by", "buffer", "published", "curve", "x")  # keys of a method that are not settings of its command
_SCORED = {"synthetic": ".", "baselines": "none"}  # the set is named when it is there

MakesSet = CoresetSettings | Distilling | QuantiseSettings
# What the images are, and what they are on, is the same for all cells
_SHARED = Common.names(*(role for role in Role if role not in (MODEL, SEED)))


@dataclass(frozen=True, kw_only=True)
class StudySettings(Settings):
    """scripts/study.py FILE: run a grid of methods, sizes and seeds on one data set, and report it."""

    study: FilePath | None = setting(None, "YAML file of the study; may stand alone, as the first argument", RECIPE)
    scale: str = setting("", "scale to run at, of those that the file names; default: the first", RECIPE)
    out: FilePath | None = setting(
        None, "folder of all that is made; default: the file's out, or runs/studies/<its name> in the checkout", PLACE
    )
    store: FilePath | None = setting(
        None, "folder of all but the report, which several studies share; default: the file's store, or out", PLACE
    )
    data_path: FilePath | None = setting(None, "folder of the data set; default: the file's", PLACE)
    device: Device | None = setting(None, "auto, cpu, cuda, cuda:1; default: the file's", PLACE)
    methods: str = setting("", "only these of the file's methods, as DC,DM", RECIPE)
    seeds: str = setting("", "only these seeds, as 0,1,2", SEED)
    ipc: str = setting("", "only these sizes, as 1,10", RECIPE)
    costs: bool = setting(False, "report the seconds and the peak memory of distilling; default: the file's", REPORT)

    arguments = ("study",)

    def check(self) -> None:
        super().check()
        if self.study is None:
            raise InputError("no study is named: give its YAML file, as configs/studies/cifar10.yaml")
        for name, text in (("seeds", self.seeds), ("ipc", self.ipc)):
            if not all(re.fullmatch(r"[0-9]{1,18}", word) for word in words(text)):
                raise InputError(f"{name}: {text!r} is not a list of whole numbers, as 0,1,2")

    def command(self, grid: "Grid") -> str:
        """The command line that makes the whole study in the folder that it is in."""
        words = ["python", "scripts/study.py", str(self.study), "--out", str(grid.out)]
        words += ["--scale", grid.scale] * bool(grid.scale)
        for name in ("store", "data_path", "device"):
            if (value := getattr(self, name)) is not None:
                words += [f"--{name}", value]
        words += ["--costs", str(self.costs)] * ("costs" in self.given)
        return shlex.join(words)

    @property
    def wanted(self) -> dict[str, list]:
        """The methods, seeds and sizes that are asked for; none where all are meant."""
        return {
            "method": words(self.methods),
            "seed": [int(word) for word in words(self.seeds)],
            "ipc": [int(word) for word in words(self.ipc)],
        }


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One method at one size with one seed: the settings of all commands it takes."""

    method: str
    ipc: int
    seed: int
    buffer: BufferSettings | None
    distilling: MakesSet
    evaluation: dict  # what is given, and what stage 3 takes over from a set otherwise; the set is yet to be made
    name: str  # of its record: says all settings
    recipe: dict  # what the name stands for
    made: str  # the name of its set: says all settings but those of the evaluation
    of: "Cell | None" = None  # whose set this one's is, quantised

    @property
    def about(self) -> str:
        """The cell in words."""
        return f"{self.method}, ipc {self.ipc}, seed {self.seed}"


@dataclass(frozen=True, kw_only=True)
class Grid:
    """What a study's file says, at one of its scales if it has any, and where."""

    where: str
    text: str  # what asks for all of it: of the file, or of it and its scale's
    scale: str  # "": there are none
    out: Path  # of the report
    store: Path  # of all that the report is made from; out, unless studies share it
    seeds: list[int]
    sizes: list[int]
    reference: str | None
    common: Common  # data and device
    shared: Mapping  # settings for every command that has them
    buffers: Mapping
    methods: Mapping
    evaluation: Mapping
    stands_for: Mapping  # published sizes and networks, by the study's
    note: str  # below the first line of the report
    x: str  # what the rows' x are
    figures: list[str]
    costs: bool  # whether the report says what distilling took

    @classmethod
    def read(cls, settings: StudySettings) -> "Grid":
        """The file, and what flags say instead."""
        where = str(settings.study)
        scale, content = at_scale(read_yaml(where), where, settings.scale)
        base = path_base(Path(where))
        _refuse_unknown(content, _KEYS, where)
        parts = [_mapping(content.get(key) or {}, f"{where}: {key}") for key in _PARTS]
        shared, bases, buffers, methods, evaluation, stands_for = parts
        bases = {name: _mapping(base, f"{where}: bases: {name}") for name, base in bases.items()}
        buffers = _with_bases(buffers, bases, f"{where}: buffers")
        methods = _with_bases(methods, bases, where)
        figures = content.get("figures") or []
        if not isinstance(figures, list) or not {*map(str, figures)} <= {*FIGURES}:
            raise InputError(f"{where}: figures: {figures!r} is not a list of {' and '.join(FIGURES)}")
        _refuse_unknown(shared, _names(), f"{where}: common")
        if not methods:
            raise InputError(f"{where}: methods: there are none")
        _refuse_bad_names(methods, f"{where}: methods")
        _refuse_bad_names(buffers, f"{where}: buffers")
        reference = content.get("reference")
        if reference is not None and not (isinstance(reference, str) and reference in methods):
            most_like = nearest(reference, methods)
            raise InputError(f"{where}: reference: {reference!r} is not in methods; the nearest is {most_like}")
        data = Common.with_paths({key: value for key, value in shared.items() if key in Common.fields()}, base)
        if settings.data_path:
            data["data_path"] = str(Path(settings.data_path).absolute())
        if settings.device:
            data["device"] = settings.device
        try:
            common = Common.resolve(data)
            said = {key: content.get(key) for key in ("out", "store")} | {"costs": content.get("costs", False)}
            own = StudySettings.resolve(StudySettings.with_paths(said, base) | {"study": where})
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
        if scale:
            text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
        else:
            text = Path(where).read_text(encoding="utf-8", errors="replace")
        out = settings.out or Path(own.out or checkout() / "runs" / "studies" / Path(where).stem) / scale
        return cls(
            where=where,
            text=text,
            scale=scale,
            out=Path(out).absolute(),
            store=Path(settings.store or own.store or out).absolute(),
            seeds=_numbers(content.get("seeds", [0]), f"{where}: seeds", low=0),
            sizes=_numbers(content.get("ipc"), f"{where}: ipc", low=1),
            reference=reference,
            common=common,
            shared={key: value for key, value in shared.items() if key not in _SHARED},
            buffers=buffers,
            methods=methods,
            evaluation=evaluation,
            stands_for=stands_for,
            note=str(content.get("note") or ""),
            x=str(content.get("x") or "x"),
            figures=figures,
            costs=(settings if "costs" in settings.given else own).costs,
        )

    @property
    def sets(self) -> Path:
        """The folder of run folders, coresets, and records of them."""
        return self.store / "sets"

    @property
    def shares(self) -> bool:
        """Whether the store is for other studies, too: what is in it is found by its digest, whatever its row."""
        return self.store != self.out

    def cells(self) -> list[Cell]:
        """All of them, seed by seed. Raises InputError for settings that a command does not take, naming the method."""
        for ipc in _sizes(self.evaluation, f"{self.where}: evaluation"):  # those that are not in the grid, too
            self.scored(ipc, self.seeds[0])
        for method, entry in self.methods.items():
            for ipc in _sizes(entry, f"{self.where}: {method}"):
                self._cell(method, ipc, self.seeds[0])
        every = itertools.product(self.seeds, self.sizes, self.methods)
        return [self._cell(method, ipc, seed) for seed, ipc, method in every]

    def wanted(self, settings: StudySettings, cells: list[Cell]) -> list[Cell]:
        """Those of the cells that flags ask for."""
        there = {"method": list(self.methods), "seed": self.seeds, "ipc": self.sizes}
        for key, values in settings.wanted.items():
            for value in values:
                if value not in there[key]:
                    raise InputError(f"{self.where} has no {key} {value}; the nearest is {nearest(value, there[key])}")
            cells = [cell for cell in cells if getattr(cell, key) in (values or there[key])]
        return cells

    def given(self, entry: Mapping, about: str, ipc: int | None = None) -> dict:
        """What an entry says at a size: what its ``cfg`` says, over that the entry itself, over that its ``by_ipc``."""
        given = dict(entry)
        if ipc is not None:
            by_ipc = _mapping(given.pop("by_ipc", None) or {}, f"{about}: by_ipc")
            given |= _mapping(by_ipc.get(ipc) or {}, f"{about}: by_ipc: {ipc}")
        if (file := given.pop("cfg", None)) is None:
            return given
        decided = {*_SHARED, *_names(by_study=True)}
        content = read_yaml(str(path_base(Path(self.where)) / str(file).replace("{ipc}", str(ipc))))
        return {key: value for key, value in content.items() if key not in decided} | given

    def scored(self, ipc: int, seed: int) -> EvaluationSettings:
        """How sets of a size are evaluated."""
        about = f"{self.where}: evaluation"
        given = self.given(self.evaluation, about, ipc)
        return self._resolve(EvaluationSettings, given, about, {"seed": seed, **_SCORED})

    def _cell(self, method: str, ipc: int, seed: int) -> Cell:
        about = f"{self.where}: {method}"
        entry = self.given(self.methods[method], about, ipc)
        if entry.get("published") != self.methods[method].get("published"):
            raise InputError(f"{about}: published is of the row, by size, and has no place under by_ipc or in a cfg")
        by = entry.get("by")
        makers = _makers()
        if not isinstance(by, str) or by not in makers:
            raise InputError(f"{about}: by: {by!r} is not one of {', '.join(makers)}")
        kind = makers[by]
        if issubclass(kind, QuantiseSettings):
            return self._quantised(method, entry, ipc, seed)
        own = {key: value for key, value in entry.items() if key not in _OWN}
        buffer = self._buffer(entry.get("buffer"), about, seed)
        decided: dict = {"ipc": ipc, "seed": seed}
        if buffer is not None:
            decided["buffer_path"] = buffer.buffer_path
        if kind is not CoresetSettings and ("buffer_path" in kind.fields()) != (buffer is not None):
            raise InputError(f"{about}: by: {by} {'has no use for a buffer' if buffer else 'needs a buffer'}")
        made = self._resolve(kind, own, about, decided)
        if buffer is not None and buffer.model != made.model:
            raise InputError(f"{about}: model: {made.model}, but its buffer's is {buffer.model}")
        scored = self.scored(ipc, seed)
        evaluation = {key: getattr(scored, key) for key in {*scored.names(DATA, MODEL, RECIPE), *scored.given}}
        del evaluation["synthetic"]
        if scored.rows:  # of real images, which may be ranked, or labelled by the cell's own experts
            evaluation["ranking_path"] = self._rankings(scored)
            if buffer is not None and buffer.model == scored.model:
                evaluation["buffer_path"] = buffer.buffer_path
        recipe = {"by": by, "buffer": buffer and _recipe(buffer), "set": _recipe(made)}
        set_name = self._name(method, by, ipc, seed, recipe)
        recipe |= {"evaluation": _recipe(scored)}
        name = self._name(method, by, ipc, seed, recipe)
        if any(self.sets.glob(name)) or any(self.sets.glob(f"*/*/*/{name}")):  # of a version that named sets as cells
            set_name = name
        if kind is CoresetSettings:
            decided |= {"out": str(self.sets / set_name), "overwrite": True}
        else:
            decided |= {"log_dir": str(self.sets), "name": set_name, "resume": True}
        if "ranking_path" in kind.fields():
            decided["ranking_path"] = self._rankings(made)
        return Cell(
            method=method,
            ipc=ipc,
            seed=seed,
            buffer=buffer,
            distilling=self._resolve(kind, own, about, decided),
            evaluation=evaluation,
            name=name,
            recipe=recipe,
            made=set_name,
        )

    def _quantised(self, method: str, entry: Mapping, ipc: int, seed: int) -> Cell:
        """A cell whose set is that of another row, at this size and with this seed, in fewer bits."""
        about, of = f"{self.where}: {method}", entry.get("of")
        by = {each: self.given(given, f"{self.where}: {each}", ipc).get("by") for each, given in self.methods.items()}
        whole = [each for each in by if by[each] != entry["by"]]
        if not isinstance(of, str) or of not in whole:
            raise InputError(f"{about}: of: {of!r} is no row of whole sets; the nearest is {nearest(of, whole)}")
        if entry.get("buffer") is not None:
            raise InputError(f"{about}: buffer: the experts are those of {of}")
        own = {key: value for key, value in entry.items() if key not in (*_OWN, "of")}
        cell = self._cell(of, ipc, seed)
        decided: dict = {"source": ".", "out": "."}  # which are yet to be made
        recipe = {**cell.recipe, "quantised": _recipe(self._resolve(QuantiseSettings, own, about, decided))}
        name = self._name(method, entry["by"], ipc, seed, recipe)
        decided |= {"out": str(self.sets / name / "quantised.safetensors"), "overwrite": True}
        made = self._resolve(QuantiseSettings, own, about, decided)
        cell = dataclasses.replace(cell, method=method, distilling=made, of=cell)
        return dataclasses.replace(cell, name=name, recipe=recipe, made=name)

    def _name(self, method: str, by: str, ipc: int, seed: int, recipe: Mapping) -> str:
        """Of a cell's files."""
        return f"{slug(by if self.shares else method)}-ipc{ipc}-seed{seed}-{digest(recipe, 8)}"

    def _buffer(self, name: str | None, about: str, seed: int) -> BufferSettings | None:
        if name is None:
            return None
        if not isinstance(name, str) or name not in self.buffers:
            most_like = nearest(name, self.buffers)
            raise InputError(f"{about}: buffer: {name!r} is not in buffers; the nearest is {most_like}")
        where = f"{self.where}: buffers: {name}"
        given = self.given(self.buffers[name], where)
        buffer = self._resolve(BufferSettings, given, where, {"seed": seed})
        folder = self.store / "buffers" / f"{slug(name)}-seed{seed}-{digest(_recipe(buffer), 8)}"
        if self.shares:
            folder = self.by_digest(folder.with_name(f"experts-seed{seed}-{digest(_recipe(buffer), 8)}"))
        decided = {"seed": seed, "buffer_path": str(folder), "ranking_path": self._rankings(buffer)}
        return self._resolve(BufferSettings, given, where, decided)

    def _rankings(self, settings) -> str:
        """The folder of rankings: one for all that score difficulty in the same way."""
        data = {key: value for key, value in _recipe(self.common).items() if key in _SHARED}
        recipe = {"data": data, "scoring": asdict(settings.scoring)}
        return str(self.store / "rankings" / f"seed{settings.seed}-{digest(recipe, 8)}")

    def by_digest(self, path: Path) -> Path:
        """What the store has of the digest, seed and size of ``path``, whatever row it was made for; else ``path``."""
        _, rest = path.name.split("-", 1)
        return path if path.exists() else next(iter(sorted(path.parent.glob(f"*-{rest}"))), path)

    def _resolve(self, kind: type[Some], given: Mapping, about: str, decided: Mapping) -> Some:
        """``kind`` from what is common, as far as it has these settings, from ``given`` and ``decided``."""
        fields = kind.fields()
        for key in given:
            if key in _SHARED:
                raise InputError(f"{about}: {key} is the same for the whole study: it belongs in common")
            if key in fields and fields[key].metadata["by_study"]:
                raise InputError(f"{about}: {key} is not for a part of a study: the study decides it")
        common = {key: getattr(self.common, key) for key in _SHARED if key in fields}
        own = {key for key, field in fields.items() if not field.metadata["by_study"]}
        given = {**{key: value for key, value in self.shared.items() if key in own}, **given}
        try:
            return kind.resolve({**common, **kind.with_paths(given, path_base(Path(self.where))), **decided})
        except InputError as error:
            raise InputError(f"{about}: {error}") from None


def _makers() -> dict[str, type[MakesSet]]:
    """The commands that make a synthetic set, by name."""
    return {name: command.settings for name, command in COMMANDS.items() if issubclass(command.settings, MakesSet)}


def _names(by_study: bool = False) -> set[str]:
    """The settings of all commands that a cell takes: those that the study decides, or the others."""
    kinds: list[type[Settings]] = [BufferSettings, *_makers().values(), EvaluationSettings]
    every = (item for kind in kinds for item in kind.fields().items())
    return {name for name, field in every if field.metadata["by_study"] == by_study}


def _recipe(settings: Settings) -> dict:
    """All settings that say what comes out."""
    return settings.telling(*(role for role in Role if role not in UNNAMED))


def _refuse_bad_names(entries: Mapping, where: str) -> None:
    """Raise InputError for a name that is not text, or that stands for the same files as another."""
    slugs: dict[str, str] = {}
    for name in entries:
        if not isinstance(name, str) or any(character in name for character in ",|\n") or not slug(name):
            raise InputError(
                f"{where}: {name!r} is no name: a name is text without commas and |, with a letter or digit"
            )
        if slugs.setdefault(slug(name), name) != name:
            raise InputError(f"{where}: {name!r} and {slugs[slug(name)]!r} are too much alike to name files")


def _with_bases(entries: Mapping, bases: Mapping, where: str) -> dict[str, Mapping]:
    """The entries over the bases that they name."""
    return {
        name: from_base(_mapping(entry, f"{where}: {name}"), bases, f"{where}: {name}")
        for name, entry in entries.items()
    }


def _sizes(entry: Mapping, about: str) -> Iterable[int]:
    """Those of which an entry says something else. Raises InputError for what is no size."""
    sizes = _mapping(entry.get("by_ipc") or {}, f"{about}: by_ipc")
    for ipc in sizes:
        if type(ipc) is not int or ipc < 1:
            raise InputError(f"{about}: by_ipc: {ipc!r} is not a number of images per class")
    return sizes


def _mapping(value, where: str) -> Mapping:
    if not isinstance(value, Mapping):
        raise InputError(f"{where} is not a list of `key: value` lines")
    return value


def _refuse_unknown(content: Mapping, known: Iterable[str], where: str) -> None:
    for key in content:
        if key not in known:
            raise InputError(f"{where}: unknown key {key!r}; the nearest is {nearest(key, known)}")


def _numbers(values, where: str, low: int) -> list[int]:
    values = [values] if type(values) is int else values
    if not isinstance(values, list) or not values or not all(type(value) is int and value >= low for value in values):
        raise InputError(f"{where}: {values!r} is not a list of whole numbers from {low} on")
    return list(dict.fromkeys(values))
