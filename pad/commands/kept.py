"""What trained networks scored, kept beside results that are yet to be written, or for good."""

import contextlib
import json
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from pad.distributed import Ranks
from pad.evaluation import Score
from pad.store.files import write_text
from pad.store.run import append_line

Key = tuple[int, int]  # (case, number of the network)


class Kept:
    """The scores of single networks, by a key of all that they hang on.

    Each process appends to a file of its own, ``<start><rank>``, a line for each network.

    Args:
        start: path of the files, without the rank.
        tested: digest of the images they are tested on: scores on others count for nothing.
        about: digest of what the results are of, for :meth:`remove`: what was kept of others stays.
    """

    def __init__(self, start: Path, ranks: Ranks, tested: str, about: str = ""):
        self._start, self._ranks, self._tested, self._about = start, ranks, tested, about
        self._own = start.with_name(f"{start.name}{ranks.rank}")
        self._begun = False

    def read(self, wanted: Collection[Key], key_of: Callable[[Key], str]) -> dict[Key, Score]:
        """The scores of networks that any of the processes finds. All of them ask together.

        Soft labels, which each process computes, may differ in their last bits between machines, and so keys: what one
        of them finds counts for all.
        """
        lines = (line for path in self._files() for line in _lines(path))
        here = {line["key"]: line for line in lines if line.get("tested", self._tested) == self._tested}
        kept: dict[str, dict] = {}
        for part in self._ranks.gather(here):
            kept |= part
        keys = {case: key_of(case) for case in wanted} if kept else {}  # which may take as long as drawing the sets
        found = {case: _score(kept[key]) for case, key in keys.items() if key in kept}
        known = {case: score for part in self._ranks.gather(found) for case, score in part.items()}
        return known

    def keep(self, key: str, score: Score) -> None:
        """Note a network's."""
        said = {"tested": self._tested} | ({"about": self._about} if self._about else {})
        line = json.dumps({"key": key, **vars(score), **said}) + "\n"
        self._own.parent.mkdir(parents=True, exist_ok=True)  # of a machine that rank 0 does not write on
        append_line(self._own, line if self._begun else f"\n{line}")  # a kill may have cut the last line short
        self._begun = True

    def remove(self) -> None:
        """The results are written: there is nothing to go on with, but for those of other settings."""
        for path in self._files():
            others = [line for line in _lines(path) if line.get("about", self._about) != self._about]
            if others:
                write_text(path, "".join(json.dumps(line) + "\n" for line in others))
            else:
                path.unlink(missing_ok=True)

    def _files(self) -> list[Path]:
        folder, start = self._start.parent, self._start.name
        there = folder.iterdir() if folder.is_dir() else ()
        return [path for path in there if path.name.startswith(start) and path.name.removeprefix(start).isdigit()]


def _score(line: dict) -> Score:
    """Earlier versions noted the accuracy alone, that of the last epoch."""
    return Score(line["accuracy"], line.get("last", line["accuracy"]), line.get("train"))


def _lines(path: Path) -> Iterator[dict]:
    """Each whole line of such a file, which another process may have removed."""
    data = b""
    with contextlib.suppress(FileNotFoundError):
        data = path.read_bytes()
    for line in data.splitlines():
        with contextlib.suppress(ValueError, KeyError, TypeError):
            entry = json.loads(line)
            shares = [entry["accuracy"], entry.get("last", 0.0), entry.get("train") or 0.0]
            if isinstance(entry["key"], str) and all(0 <= share <= 1 for share in shares):
                yield entry
