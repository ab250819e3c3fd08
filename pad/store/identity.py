"""Was this made from what I am given? Descriptions compared, digests of them, and the nearest of known words.

A description is a mapping of plain values, nested or not, as JSON knows them.
"""

import difflib
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from pad.errors import InputError


def differences(there: Mapping, here: Mapping, *, whole: bool = False) -> Iterator[tuple[str, object, object]]:
    """Where two descriptions differ: the name, with a space between its levels, theirs and ours.

    What ``there`` does not name is not compared, unless ``whole`` is set: then the order is that of ``here``, and what
    only ``there`` names comes last. What one side lacks is called "nothing".
    """
    for name in [*here, *(name for name in there if name not in here)] if whole else there:
        theirs = there.get(name, "nothing")
        ours = here.get(name, "nothing")
        if isinstance(theirs, Mapping) and isinstance(ours, Mapping):
            for inner, a, b in differences(theirs, ours, whole=whole):
                yield f"{name} {inner}", a, b
        elif theirs != ours:
            yield name, theirs, ours


def refuse_difference(
    file: Path | str,
    there: Mapping,
    here: Mapping,
    *,
    there_is: str,
    here_is: str = "the config",
    remedy: str,
    whole: bool = False,
    every: bool = False,
) -> None:
    """Raise InputError where ``file``, which describes itself as ``there``, was not made from ``here``.

    The sentence names the first difference, or with ``every`` all of them. ``there_is`` and ``here_is`` say in words
    what the two descriptions are of, ``remedy`` what to do. ``whole``: see :func:`differences`.
    """
    found = [f"{where}: {a} in {there_is}, {b} in {here_is}" for where, a, b in differences(there, here, whole=whole)]
    if found:
        raise InputError(f"{file}: {'; '.join(found if every else found[:1])}; {remedy}")


def digest(value, length: int = 16) -> str:
    """The first ``length`` (at most 64) hexadecimal digits of the SHA-256 of a plain value, written as JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:length]


def nearest(name, known: Iterable[str], alike: float = 0.0) -> str:
    """The known word that is most like ``name``, whatever its case; "none" where none is known, or as much ``alike``.

    ``alike``: the least share of letters that they have in common, 0 to 1.
    """
    lowered = {word.lower(): word for word in sorted(map(str, known))}
    found = difflib.get_close_matches(str(name).lower(), lowered, n=1, cutoff=alike)
    return lowered[found[0]] if found else "none"
