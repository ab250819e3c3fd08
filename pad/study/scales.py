"""What a study's file leaves to other places: to the file of a scale, and to bases that several entries start from."""

from collections.abc import Mapping
from pathlib import Path

from pad.config import read_yaml
from pad.errors import InputError
from pad.store.identity import nearest


def at_scale(content: Mapping, where: str, wanted: str) -> tuple[str, Mapping]:
    """The scale of a study, "" where its file has none, and what the study says at it.

    ``content``: of the file ``where``. ``wanted``: one of its ``scales``; "": the first. A scale is a file beside the
    study's, which holds what studies have in common at that scale. What the study says comes over it, and what stands
    under the scale's name, in any part of the study, over the rest of that part. Raises InputError for a scale that is
    not there.
    """
    scales = content.get("scales")
    if scales is None:
        if wanted:
            raise InputError(f"{where} has no scales, so there is no scale {wanted!r}")
        return "", content
    words = [*scales.keys(), *scales.values()] if isinstance(scales, Mapping) else []
    if not words or not all(isinstance(word, str) for word in words):
        raise InputError(f"{where}: scales: {scales!r} is not a list of `name: file` lines")
    if wanted and wanted not in scales:
        raise InputError(f"{where} has no scale {wanted!r}; the nearest is {nearest(wanted, scales)}")
    scale = wanted or next(iter(scales))
    of_study = {key: value for key, value in content.items() if key != "scales"}
    of_scale = read_yaml(str(Path(where).parent / scales[scale]))
    return scale, merged(of_scale, _chosen(of_study, scale, scales, where))


def from_base(entry: Mapping, bases: Mapping[str, Mapping], about: str, inside: tuple[str, ...] = ()) -> dict:
    """``entry`` over the bases that it names, one or a list, each over those before it; a base may name others.

    Raises InputError, which ``about`` begins, for a base that is not there, or that starts from itself. ``inside``: the
    bases that name this entry.
    """
    names = entry.get("base", [])
    found: dict = {}
    for name in names if isinstance(names, list) else [names]:
        if not isinstance(name, str) or name not in bases:
            raise InputError(f"{about}: base: {name!r} is not in bases; the nearest is {nearest(name, bases)}")
        if name in inside:
            raise InputError(f"{about}: base: {name} starts from itself")
        found = merged(found, from_base(bases[name], bases, about, (*inside, name)))
    return merged(found, {key: value for key, value in entry.items() if key != "base"})


def merged(below: Mapping, above: Mapping) -> dict:
    """Both mappings in one: where both have a key, its value is ``above``'s; two mappings are merged in turn."""
    both = {key: merged(below[key], above[key]) for key in below if _are_mappings(below[key], above.get(key))}
    return {**below, **above, **both}


def _are_mappings(*values: object) -> bool:
    return all(isinstance(value, Mapping) for value in values)


def _chosen(part: Mapping, scale: str, scales: Mapping, where: str) -> Mapping:
    """``part`` with what stands under ``scale`` in it over the rest, and without what stands under the others."""
    plain = {
        key: _chosen(value, scale, scales, where) if isinstance(value, Mapping) else value
        for key, value in part.items()
        if key not in scales
    }
    own = part.get(scale, {})
    if not isinstance(own, Mapping):
        raise InputError(f"{where}: {scale}: {own!r} is not a list of `key: value` lines")
    return merged(plain, _chosen(own, scale, scales, where)) if own else plain
