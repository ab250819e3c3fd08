"""Synthetic sets of others: what is asked for that their files do not say, and how they become ours."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, TypeVar

from pad.commands.bench import Workbench
from pad.commands.common import Common
from pad.config import DATA, MODEL, RECIPE, FilePath, setting
from pad.data.preprocessing import MeanStd
from pad.data.sources import data_set
from pad.errors import InputError
from pad.exchange.converting import as_set, fitted
from pad.exchange.reading import NETWORK, PIXELS, Foreign, read_foreign
from pad.store.identity import refuse_difference
from pad.synthetic import SyntheticSet


@dataclass(frozen=True, kw_only=True)
class OfOthers(Common):
    """What is asked of a set of others, as far as its file does not say it."""

    label_dir: FilePath | None = setting(
        None, "labels_*.pt of a published set; default: that beside images_*.pt", RECIPE, by_study=True
    )
    lr_dir: FilePath | float | None = setting(
        None, "lr_*.pt of a published set; of one that has none, the learning rate as a number", RECIPE, by_study=True
    )
    values: str | None = setting(
        None,
        "what the images of a set of others are: pixels of 0 to 1, or what the network sees",
        RECIPE,
        choices=(PIXELS, NETWORK),
        by_study=True,
        later=True,
    )
    label_form: str | None = setting(
        None, "what its soft labels are", RECIPE, choices=("logits", "probabilities"), by_study=True, later=True
    )
    factor: int | None = setting(
        None,
        "its multi-formation: images a side that a stored image stands for",
        RECIPE,
        low=1,
        by_study=True,
        later=True,
    )
    padded: bool = setting(
        False,
        "the factor does not divide its sides: grey is put at the right and below, as by IDC's code",
        RECIPE,
        by_study=True,
        later=True,
    )
    experiment: int | None = setting(
        None, "res_*.pt: which of its sets, from 0", RECIPE, low=0, by_study=True, later=True
    )
    mean: str | None = setting(
        None,
        "what it was normalised by, if by other numbers than here: mean by channel, as 0.5,0.4,0.4",
        RECIPE,
        by_study=True,
        later=True,
    )
    std: str | None = setting(None, "standard deviation by channel", RECIPE, by_study=True, later=True)

    files: ClassVar[tuple[str, ...]] = ("label_dir", "lr_dir")  # beside a published set's images

    @property
    def said(self) -> dict:
        """What is said of the set, but for its files."""
        values = {name: getattr(self, name) for name in OfOthers.names(RECIPE) if name not in self.files}
        return {name: value for name, value in values.items() if value is not None and value is not False}

    def check(self) -> None:
        super().check()
        if (self.mean is None) != (self.std is None):
            raise InputError("mean and std belong together: give both, or none")
        if self.mean is not None and self.zca:
            raise InputError("mean and std are of images that are not whitened: give --zca False, or leave them out")

    def taken_over(self, made_with: object) -> dict:
        """What a set's own settings say of data, network and recipe where nobody gave another value."""
        if not isinstance(made_with, Mapping):
            return {}
        fields, names = self.fields(), self.names(DATA, MODEL, RECIPE)
        own = {name for name in names if fields[name].metadata["by_study"]} | self.given
        return {name: made_with[name] for name in names if name in made_with and name not in own}


Asking = TypeVar("Asking", bound=OfOthers)


def read_set(settings: Asking, source: str) -> tuple[Asking, Foreign]:
    """The set of others at ``source``, with what settings say of it, and these with what an export says of its data.

    Raises InputError for what neither says, all of it in one sentence, and where both do and differ.
    """
    found = read_foreign(source, labels=settings.label_dir, lr=settings.lr_dir, experiment=settings.experiment)
    adopted = settings.taken_over(found.about.get("set", {}).get("settings"))
    settings = settings.adopting(adopted)
    known = {*settings.given, *adopted}
    asked = ["dataset", "subset", "zca"] if data_set(settings.dataset).subsets else ["dataset", "zca"]
    missing = [name for name in asked if name not in known]
    for name in ("values", "label_form", "factor"):
        given, there = getattr(settings, name), getattr(found, name)
        if given is not None and there not in (None, 1, given):
            raise InputError(f"{name}: {given} was given, but {found.where} ({found.form}) has {there}")
        if (given or there) is None:
            missing.append(name)
        setattr(found, name, given or there)
    found.padded = settings.padded
    if found.lr is None:
        missing.append("lr_dir")
    if missing:
        raise InputError(f"{found.where} ({found.form}) does not say all that is needed; give --{', --'.join(missing)}")
    if not 0 < float(found.lr or 0) < math.inf:
        raise InputError(f"lr_dir: {found.lr:g} is no learning rate, which is a positive number")
    if settings.padded and settings.zca and found.values == NETWORK:
        raise InputError(f"padded: {found.where} holds whitened images, of which grey is another at each place")
    if settings.mean is not None and found.values != NETWORK:
        raise InputError(f"mean and std are of normalised images, but those of {found.where} are pixels")
    return settings, found


def ours(settings: OfOthers, found: Foreign, bench: Workbench) -> SyntheticSet:
    """What :func:`read_set` gave, as one of ours on the data of ``bench``. Raises InputError where it is of others."""
    there = found.about.get("set", {})
    found = fitted(found, bench.data)
    _refuse_other(found, "data", bench.data.identity)
    of = None
    if settings.mean is not None:
        of = MeanStd.of(_by_channel(settings, "mean", bench), _by_channel(settings, "std", bench), bench.device)
    own = there.get("settings") if isinstance(there.get("settings"), dict) else {}
    named = settings.of(DATA) | ({"model": settings.model} if "model" in {*settings.given, *own} else {})
    imported = {"form": found.form, "file": found.where.name, "images": len(found.images)}
    imported |= settings.said
    origin = there.get("provenance") if isinstance(there.get("provenance"), dict) else {}
    metadata = {
        **there,
        "data": bench.data.identity,
        "class_names": list(bench.data.class_names),
        **{name: value for name, value in named.items() if name == "model"},
        "settings": {**own, **named},
        "provenance": {**origin, "imported": imported},
    }
    _refuse_other(found, "preprocessing", bench.preprocessing.identity)
    return as_set(found, bench.preprocessing, of, metadata)


def is_of_others(path: str) -> bool:
    """Whether ``path`` is to be read as a set of others: a folder that is no run's, a .pt or .npz file."""
    if os.path.isdir(path):
        return not os.path.exists(os.path.join(path, "config.yaml"))
    return path.endswith((".pt", ".pth", ".npz"))


def refuse_name_of_others(out: str) -> None:
    """Raise InputError for a name by which a set of this toolkit's would be taken for one of others."""
    if is_of_others(out):
        raise InputError(f"out: {out} is named as files of others are, and would be read as one; name it .safetensors")


def _refuse_other(found: Foreign, what: str, here: dict) -> None:
    """Raise InputError when an export says that it is of another ``what``."""
    there = found.about.get(what) or found.about.get("set", {}).get(what)
    if isinstance(there, dict):
        refuse_difference(
            found.where,
            {what: {key: there.get(key) for key in here}},
            {what: here},
            there_is="the export",
            here_is="the settings",
            remedy="read it with what it was made from",
        )


def _by_channel(settings: OfOthers, name: str, bench: Workbench) -> tuple[float, ...]:
    text = getattr(settings, name)
    try:
        values = tuple(float(word) for word in text.split(","))
    except ValueError:
        values = ()
    fit = all(math.isfinite(value) and (name == "mean" or value > 0) for value in values)
    if len(values) != bench.data.channels or not fit:
        raise InputError(f"{name}: {text!r} is not a number for each of {bench.data.channels} channels, as 0.5,0.4,0.4")
    return values
