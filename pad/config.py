"""How settings are declared and read: typed fields, from a YAML file and the command line, checked.

Keys and flags are the published ones, so published files and commands run unchanged; ours stand beside them. The
command line overrides the file, the file overrides the defaults. Anything unknown or out of range is an InputError.
What settings a command has stands in its file, in :mod:`pad.commands`.
"""

import argparse
import contextlib
import dataclasses
import enum
import logging
import math
import operator
import os
import re
import reprlib
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml
from typing_extensions import Self

from pad.errors import InputError
from pad.store.identity import nearest
from pad.store.naming import network_name

log = logging.getLogger("pad")

Device = typing.NewType("Device", str)  # "auto", "cpu", "cuda", "cuda:1", or the published list, as [0, 1]
FilePath = typing.NewType("FilePath", str)  # relative ones in a YAML file: see path_base
NetworkName = typing.NewType("NetworkName", str)  # or several, as a,b; files in them are named as paths are
Some = typing.TypeVar("Some", bound="Settings")
Made = typing.TypeVar("Made")  # a dataclass


class Role(enum.Enum):
    """The part a setting plays, and so what follows from its value.

    ========  ===========  ============  =================  =============================================
    role      may change   in the name   an expert or a     meaning
              on resume    of a study's  coreset records
                           cell          it
    ========  ===========  ============  =================  =============================================
    DATA      no           yes           yes                which images, and how the networks see them
    MODEL     no           yes           yes                which network
    RECIPE    no           yes           yes                what comes out depends on it
    SEED      no           yes           yes                which random numbers
    DETAIL    no           yes           no                 the last bits; how a ranking is had
    NAME      no           no            no                 what a run is called
    PACE      yes          yes           no                 how long, how often, how fast
    REPORT    yes          yes           no                 how what came out is evaluated
    PLACE     yes          no            no                 where things lie, where they run
    ========  ===========  ============  =================  =============================================

    A distilled set records what may not change on resume. Stage 3 takes DATA, MODEL and RECIPE over from its set.
    """

    DATA = enum.auto()
    MODEL = enum.auto()
    RECIPE = enum.auto()
    SEED = enum.auto()
    DETAIL = enum.auto()
    NAME = enum.auto()
    PACE = enum.auto()
    REPORT = enum.auto()
    PLACE = enum.auto()


DATA, MODEL, RECIPE, SEED, DETAIL, NAME, PACE, REPORT, PLACE = Role
CHANGEABLE = (PACE, REPORT, PLACE)  # on resume
UNNAMED = (PLACE, NAME)  # what the name of a study's cell does not say


def setting(
    default,
    help: str,
    role: Role,
    *,
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
    below: float | None = None,
    choices: typing.Collection[str] = (),
    by_study: bool = False,
    memory: bool = False,
    later: bool = False,
) -> typing.Any:
    """A field of :class:`Settings`.

    ``low`` to ``below``: the range of a number. ``choices``: the words it may be; where its type is a path, it may also
    be one (a word with a / or a dot). ``by_study``: in a study the study decides it, and its file may not. ``memory``:
    less of it needs less memory. ``later``: it came after studies and results that do not name it, so at its default
    neither do new ones (:meth:`Settings.telling`).
    """
    limits = {"low": low, "above": above, "high": high, "below": below, "choices": choices}
    notes = {"help": help, "role": role, "by_study": by_study, "memory": memory, "later": later}
    return field(default=default, metadata=notes | limits)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Base of a command's settings: a frozen dataclass whose fields are made by :func:`setting`.

    given: names of the settings that somebody gave.
    """

    given: frozenset[str] = field(default=frozenset(), repr=False, compare=False)

    dead: typing.ClassVar[dict[str, str]] = {}  # keys that are accepted and do nothing, and why
    refused: typing.ClassVar[dict[str, str]] = {}  # keys of other commands that this one cannot do, and why
    recorded_beside: typing.ClassVar[frozenset[str]] = frozenset()  # what a run's config.yaml says that nobody chooses
    arguments: typing.ClassVar[tuple[str, ...]] = ()  # settings that may stand without their flags, in this order

    def check(self) -> None:
        """Raise InputError when settings do not go together."""

    def resolved(self) -> Self:
        """These settings, with defaults that depend on others filled in."""
        return self

    @classmethod
    def fields(cls) -> dict[str, dataclasses.Field]:
        """The settings by name, in the order of declaration."""
        return {field.name: field for field in dataclasses.fields(cls) if "role" in field.metadata}

    @classmethod
    def names(cls, *roles: Role) -> list[str]:
        """The names of the settings of these roles."""
        return [name for name, field in cls.fields().items() if field.metadata["role"] in roles]

    def of(self, *roles: Role) -> dict:
        """The settings of these roles as plain values."""
        return {name: getattr(self, name) for name in self.names(*roles)}

    def telling(self, *roles: Role) -> dict:
        """Those of these roles that tell something: all but later ones at their defaults."""
        fields = self.fields()
        return {
            name: value
            for name, value in self.of(*roles).items()
            if not (fields[name].metadata["later"] and value == fields[name].default)
        }

    def as_dict(self) -> dict:
        """All settings as plain values, in the order of declaration."""
        return self.of(*Role)

    @classmethod
    def untold(cls) -> dict:
        """What :meth:`telling` leaves out is at these values."""
        return {name: field.default for name, field in cls.fields().items() if field.metadata["later"]}

    def fill(self, kind: type[Made], prefix: str = "", **others) -> Made:
        """A dataclass: fields that are not among ``others`` from the settings of their names, after ``prefix``."""
        names = [field.name for field in dataclasses.fields(typing.cast(typing.Any, kind)) if field.name not in others]
        own = {name: getattr(self, prefix + name) for name in names if prefix + name in self.fields()}
        return kind(**own, **others)

    @classmethod
    def resolve(cls, values: Mapping, where: str = "") -> Self:
        """Settings from plain values by name, the others at their defaults.

        ``where``, a file for example, begins the sentence about a key that is not known. Raises InputError for an
        unknown key (naming the nearest), a value of the wrong type or out of range, and settings that do not go
        together. Logs a warning for a key that does nothing.
        """
        fields = cls.fields()
        known = {}
        for key, value in values.items():
            if key in cls.dead:
                log.warning("%s does nothing: %s", key, cls.dead[key])
            elif key in cls.refused:
                raise InputError(f"{key}: {cls.refused[key]}")
            elif key in cls.recorded_beside:
                continue
            elif key not in fields:
                raise InputError(f"{where}{': ' * bool(where)}{_unknown('key', key, [*fields, *cls.dead])}")
            else:
                known[key] = value
        settings = cls(**cls._coerced(known), given=frozenset(known)).resolved()
        settings.check()
        return settings

    @classmethod
    def _coerced(cls, values: Mapping) -> dict:
        fields, hints = cls.fields(), typing.get_type_hints(cls)
        return {name: _coerce(fields[name], hints[name], value) for name, value in values.items()}

    @classmethod
    def with_paths(cls, values: Mapping, base: Path) -> dict:
        """``values`` with relative paths, in the settings that are paths, taken as relative to ``base``."""
        fields, hints = cls.fields(), typing.get_type_hints(cls)

        def kind(key, value):
            of_words = key in fields and fields[key].metadata["choices"]
            return None if of_words and not _like_a_path(value) else _kind(hints.get(key), value)

        return {key: _relative_to(base, kind(key, value), value) for key, value in values.items()}

    def adopting(self, values: Mapping) -> Self:
        """These settings with others from elsewhere, checked like those of a file; raises as :meth:`resolve`."""
        settings = dataclasses.replace(self, **self._coerced(values)).resolved()
        settings.check()
        return settings


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(message)


def parse(cls: type[Some], argv: list[str], program: str) -> Some:
    """Settings from ``--cfg file.yaml`` and flags.

    Raises InputError for an unknown key or flag (naming the nearest), a value of the wrong type or out of range,
    settings that do not go together, and a file that cannot be read. Logs one warning for a key that does nothing.
    """
    fields = cls.fields()
    hints = typing.get_type_hints(cls)
    said = (cls.__doc__ or "").replace("``", "")
    if said.startswith(f"{cls.__name__}("):  # by python -OO, which drops docstrings, from the fields' names and types
        said = ""
    parser = _Parser(program, description=said, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.add_argument("--cfg", metavar="FILE", help="YAML file of settings; flags override it")
    for name, asked in fields.items():
        optional: dict = {"nargs": "?", "const": "True"} if _kind(hints[name], None) is bool else {}
        notes = [] if asked.default in (None, "") else [f"default: {asked.default}"]
        notes += [f"of {', '.join(asked.metadata['choices'])}"] if asked.metadata["choices"] else []
        text = (asked.metadata["help"] + f" ({'; '.join(notes)})" * bool(notes)).replace("%", "%%")
        parser.add_argument(f"--{name}", metavar="", help=text, **optional)
    for name in (*cls.dead, *cls.refused):
        parser.add_argument(f"--{name}", nargs="?", help=argparse.SUPPRESS)

    known, unknown = parser.parse_known_args(argv)
    for name in cls.arguments:
        if unknown and not unknown[0].startswith("-") and not hasattr(known, name):
            setattr(known, name, unknown.pop(0))
    if unknown and not unknown[0].startswith(("-", "–", "—")) and "=" not in unknown[0]:
        raise InputError(f"no option takes {_shorten(unknown[0])}: quote values with spaces, write lists as a,b,c")
    if unknown:
        raise InputError(_unknown("option", unknown[0].split("=")[0], [f"--{n}" for n in (*fields, *cls.dead, "cfg")]))
    flags = vars(known)
    words = [word[2:].split("=")[0] for word in argv if word.startswith("--")]
    for name in sorted({name for name in flags if words.count(name) > 1}):
        log.warning("--%s is given %d times: the last, %s, counts", name, words.count(name), flags[name])
    path = flags.pop("cfg", None)
    values = flags if path is None else cls.with_paths(read_yaml(path), path_base(Path(path))) | flags
    settings = cls.resolve(values, path or "")
    if path is not None and "name" in fields and "name" not in values:
        return dataclasses.replace(settings, **{"name": f"{Path(path).stem}-seed{settings.as_dict()['seed']}"})  # type: ignore
    return settings


class _Yaml(yaml.SafeLoader):
    """What is written is what is meant: of plain words only whole numbers, ``null`` and ``<<`` are more than text.

    YAML 1.1 also takes no for False, 010 for 8, 1:30 for 90, 2024-01-01 for a date and 1.10 for 1.1, whatever the
    setting is; here the setting says what its text means.
    """

    yaml_implicit_resolvers: typing.ClassVar[dict] = {}

    def construct_mapping(self, node, deep=False):
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for name in sorted({name for name in names if names.count(name) > 1}):
            log.warning("%s stands %d times in a list of settings: the last counts", name, names.count(name))
        return super().construct_mapping(node, deep)


_Yaml.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"-?(0|[1-9][0-9]*)$"), list("-0123456789"))
_Yaml.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"(~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_Yaml.add_implicit_resolver("tag:yaml.org,2002:merge", re.compile("<<$"), ["<"])


def read_yaml(path: str) -> dict:
    """The named values of a YAML file. Raises InputError when it cannot be read or holds something else."""
    try:
        text = Path(path).read_bytes()
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read the config {path}: {getattr(error, 'strerror', None) or error}") from None
    try:
        content = yaml.load(text, _Yaml)  # UTF-8, or UTF-16 with its mark, as Windows writes it
    except Exception as error:  # besides YAMLError almost any: ValueError, KeyError, IndexError, RecursionError, ...
        raise InputError(f"{path} is not YAML: {' '.join(str(error).split()) or type(error).__name__}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise InputError(f"{path} is not a list of `key: value` lines")
    return content


def path_base(config: Path) -> Path:
    """What relative paths in a YAML file are relative to.

    Published files are written to be used from inside ``distill/``: in a checkout they mean that folder, from wherever
    the command is started. A file outside any checkout means the current folder.
    """
    for folder in config.resolve().parents:
        if (folder / "distill" / "PAD.py").is_file():
            return folder / "distill"
    return Path.cwd()


def checkout() -> Path:
    """The checkout this package runs from, or the current folder when it was installed elsewhere."""
    root = Path(__file__).resolve().parent.parent
    return root if (root / "distill" / "PAD.py").is_file() else Path()


def _kind(hint, value):
    """What a setting's value is to be by its type: of a path or a number a number, where it is one."""
    kind, *others = typing.get_args(hint) or (hint,)
    if float in others:
        with contextlib.suppress(TypeError, ValueError):
            float(value)
            return float
    return kind


def _like_a_path(value) -> bool:
    return isinstance(value, str) and ("/" in value or "." in value)


def _resolve_path(value, base: Path):
    if not isinstance(value, str) or not value or value.startswith("~") or Path(value).is_absolute():
        return value
    return os.path.normpath(base / value)


def _relative_to(base: Path, kind, value):
    """``value`` with the relative paths in it, if it is of a kind that has some, taken as relative to ``base``."""
    if kind is NetworkName and isinstance(value, str):
        words = (word.strip() for word in value.split(","))
        return ",".join(_resolve_path(word, base) if ".py:" in word else word for word in words)
    return _resolve_path(value, base) if kind is FilePath else value


def _unknown(what: str, name, known: list[str]) -> str:
    shown = _shorten(name)
    most_like = nearest(shown.strip("'"), known, alike=0.5)
    return f"unknown {what} {shown}; {'--help lists them' if most_like == 'none' else f'the nearest is {most_like}'}"


_BOUNDS: dict[str, tuple[str, Callable]] = {
    "low": ("at least", operator.ge),
    "above": ("above", operator.gt),
    "high": ("at most", operator.le),
    "below": ("below", operator.lt),
}


def _coerce(field: dataclasses.Field, hint, value):
    """``value`` as the field's type, within its range; InputError otherwise."""
    name, meta = field.name, field.metadata
    if type(None) in typing.get_args(hint):
        if value is None or (isinstance(value, str) and value.strip().lower() in ("none", "null", "auto", "")):
            return None
    if isinstance(value, int) and value.bit_length() > 64:
        raise InputError(f"{name}: {_shorten(value)} is out of range")
    kinds: dict = {bool: _bool, int: _int, float: _float, str: _str}
    kinds |= {FilePath: _path, Device: _device, NetworkName: _networks}
    try:
        value = kinds[_kind(hint, value)](value)
    except ValueError as error:
        raise InputError(f"{name}: {_shorten(value)} is not {error}") from None
    except InputError as error:
        raise InputError(f"{name}: {error}") from None
    for kind, (words, holds) in _BOUNDS.items():
        if meta[kind] is not None and not holds(value, meta[kind]):
            raise InputError(f"{name}: {value} is out of range, it must be {words} {meta[kind]}")
    if meta["choices"]:
        value = next((choice for choice in meta["choices"] if choice.lower() == value.lower()), value)
    or_path = meta["choices"] and _kind(hint, value) is FilePath
    if meta["choices"] and value not in meta["choices"] and not (or_path and _like_a_path(value)):
        also = ", and no path (of the current folder: ./name)" if or_path else ""
        raise InputError(f"{name}: {_shorten(value)} is not one of {', '.join(meta['choices'])}{also}")
    return value


_SHORT = reprlib.Repr()  # bounded in depth and width, whatever a YAML file holds
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 60


def _shorten(value) -> str:
    try:
        return _SHORT.repr(value)
    except ValueError:  # Python refuses to print whole numbers of thousands of digits
        return "a number of thousands of digits"


def _bool(value) -> bool:
    words = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
    if isinstance(value, str) and value.strip().lower() in words:
        return words[value.strip().lower()]
    if isinstance(value, int) and value in (0, 1):
        return bool(value)
    raise ValueError("True or False")


def _int(value) -> int:
    number = _float(value, "a whole number")
    if number != int(number) or abs(number) >= 2**53:
        raise ValueError("a whole number")
    return int(number)


def _float(value, wanted: str = "a finite number") -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError(wanted)
    try:
        number = float(value)
    except ValueError:
        raise ValueError(wanted) from None
    if not math.isfinite(number):
        raise ValueError(wanted)
    return number


def _str(value) -> str:
    if isinstance(value, bool) or not isinstance(value, (str, int, float)) or "\0" in str(value):
        raise ValueError("text")
    try:
        str(value).encode()
    except UnicodeEncodeError:  # a name of bytes that are not UTF-8: config.yaml and safetensors could not hold it
        raise ValueError("UTF-8: rename the file or folder") from None
    return str(value)


def _path(value) -> FilePath:
    text = os.path.expanduser(_str(value))
    if text.startswith("~"):
        raise ValueError("a path: there is no such user (for a file of that name, write ./ before it)")
    try:
        os.stat(os.path.join(text, "."))  # of a folder this asks, too, whether it may be entered
    except (FileNotFoundError, NotADirectoryError):
        pass  # it is to be made, or it is a file
    except OSError as error:
        raise ValueError(f"a path that can be used: {error.strerror}") from None
    return FilePath(text)


def _networks(value) -> NetworkName:
    return NetworkName(",".join(network_name(word.strip()) for word in _str(value).split(",")))


_CUDA = re.compile(r"cuda:\d{1,3}|\d{1,3}|\[\d{1,3}(,\d{1,3})*\]", re.ASCII)


def _device(value) -> Device:
    if isinstance(value, list):
        value = f"[{','.join(map(_shorten, value))}]"
    text = str(value).replace(" ", "") if type(value) in (str, int) else ""
    if text not in ("auto", "cpu", "cuda") and not _CUDA.fullmatch(text):
        raise ValueError("auto, cpu, cuda, cuda:1 or a list of CUDA devices as [0,1]")
    return Device(text)


def cuda_device(text: str) -> torch.device:
    """``cuda:1``, ``1`` or the first of ``[1,2]`` (several devices are for torchrun, which starts one process each)."""
    numbers = re.findall(r"\d+", text)
    return torch.device("cuda", int(numbers[0]))
