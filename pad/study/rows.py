"""A row of a study's report: one method at one size."""

import statistics
from dataclasses import dataclass

from pad.show.tables import standard_error


@dataclass(frozen=True, kw_only=True)
class Row:
    """One method at one size: mean over the seeds, in %, and its standard error, that of independent seeds.

    ``difference``: to the method ``reference``, the mean over the seeds that both have, and its standard error.
    Published: the accuracy, and its difference to the reference's, where they were.
    """

    method: str
    ipc: int
    values: dict[int, float]  # by seed
    seeds: int  # asked for
    networks: int  # per seed
    seconds: float
    failed: list[str]
    difference: tuple[float, float] | None
    reference: str | None = None
    published: float | None = None
    published_difference: float | None = None
    distilling_seconds: float | None = None  # this and the next two: means over the seeds, where they are known
    peak_memory: float | None = None  # of distilling, in bytes
    bits: float | None = None  # per class
    of: str = ""  # the method whose sets these are, in fewer bits or not

    @property
    def mean(self) -> float:
        return statistics.mean(self.values.values())

    @property
    def error(self) -> float:
        return standard_error(list(self.values.values()))


def in_words(ipc: int, published: int | None = None) -> str:
    """A size in words, with the published one that it stands for where that is another."""
    other = f" (published: {published})" if published not in (None, ipc) else ""
    return f"{ipc} image{'s' * (ipc > 1)} per class{other}"
