"""What was published of the rows of a study."""

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pad.errors import InputError
from pad.study.rows import in_words

MEAN = "mean"  # over the networks


@dataclass(frozen=True, kw_only=True)
class Published:
    """Published accuracies, in %.

    rows: by row and published size, a number or numbers by network, "mean" among them. stands_for: the published sizes
    and networks that those of the study stand for; others stand for themselves. first: the study's first network, which
    a number alone is of.
    """

    rows: Mapping[str, Mapping[int, float | Mapping[str, float]]] = field(default_factory=dict)
    stands_for: Mapping = field(default_factory=dict)
    first: str = ""

    def of(self, row: str, ipc: int, network: str = "") -> float | None:
        """That of a row at one of the study's sizes, on one of its networks, else the first; None where none was."""
        network = network or self.first
        found = self.rows.get(row, {}).get(self.size(ipc))
        if isinstance(found, Mapping):
            return found.get(self.stands_for.get(network, network))
        return found if network == self.first else None

    def size(self, ipc: int) -> int:
        """The published size that a size of the study stands for."""
        return self.stands_for.get(ipc, ipc)

    def refuse_unmatched(self, where: str, sizes: Sequence[int]) -> None:
        """Raise InputError, naming the file ``where``, where one of the study's ``sizes`` stands for none."""
        for ours, theirs in self.stands_for.items():
            if type(ours) is not type(theirs) or type(ours) not in (int, str):
                raise InputError(f"{where}: stands_for: {ours!r}: {theirs!r} are not two sizes or two networks")
            if type(ours) is int and ours not in sizes:
                raise InputError(f"{where}: stands_for: {ours} is not in ipc")
        known = {size for by_size in self.rows.values() for size in by_size}
        for ipc in sizes:
            if known and self.size(ipc) not in known:
                remedy = f"stands_for says which size {ipc} stands for"
                raise InputError(f"{where}: nothing is published at {in_words(self.size(ipc))}; {remedy}")


def read_published(by_size: object, about: str) -> dict[int, float | dict[str, float]]:
    """What a file says was published of a row. Raises InputError, which ``about`` begins, for what is no accuracy."""
    if not isinstance(by_size, Mapping):
        raise InputError(f"{about}: {by_size!r} is not a list of `images per class: accuracy in %` lines")
    found: dict[int, float | dict[str, float]] = {}
    for size, value in by_size.items():
        named = dict(value) if isinstance(value, Mapping) else {"": value}
        numbers = {name: number(each) for name, each in named.items()}
        values = {name: each for name, each in numbers.items() if each is not None and 0 <= each <= 100}
        if type(size) is not int or len(values) < len(named):
            raise InputError(f"{about}: {size!r}: {value!r} is not an accuracy in %, or one for each of some networks")
        found[size] = values if isinstance(value, Mapping) else values[""]
    return found


def number(value: object) -> float | None:
    """A finite number of a YAML file, which it may hold as text; None for anything else."""
    with contextlib.suppress(ValueError):
        if isinstance(value, (int, float, str)) and not isinstance(value, bool) and math.isfinite(float(value)):
            return float(value)
    return None


NOTHING = Published()
