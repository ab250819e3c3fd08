"""Synthetic sets to the forms that other tools read, and from the files of others.

python scripts/export_set.py logged_files/CIFAR10/10/ConvNet/IPC10-seed0 --to huggingface --out exported
python scripts/import_set.py res_DM_CIFAR10_ConvNet_10ipc.pt --dataset CIFAR10 --zca False --lr_dir 0.01 \\
    --out dm.safetensors
"""

import json
import logging
from dataclasses import dataclass
from pathlib import Path

from pad.commands.bench import Workbench, set_up
from pad.commands.common import Common
from pad.config import DATA, DETAIL, MODEL, PLACE, RECIPE, FilePath, Settings, setting
from pad.data.preprocessing import MeanStd
from pad.data.sources import data_set
from pad.distributed import ALONE, Ranks
from pad.errors import InputError
from pad.exchange.card import LICENCES
from pad.exchange.converting import as_set, fitted
from pad.exchange.reading import NETWORK, PIXELS, Foreign, read_foreign
from pad.exchange.writing import FORMS, export_set
from pad.store.files import refuse_taken, refuse_unwritable
from pad.store.identity import refuse_difference
from pad.synthetic import SyntheticSet, set_file

log = logging.getLogger("pad")


@dataclass(frozen=True, kw_only=True)
class ExportSetSettings(Settings):
    """``scripts/export_set.py SET --to FORM --out FOLDER``: write a synthetic set as other tools read it."""

    source: FilePath | None = setting(None, "file of a synthetic set, or its run's folder", PLACE)
    to: str | None = setting(None, "form", RECIPE, choices=FORMS)
    out: FilePath | None = setting(None, "new folder for it", PLACE)
    licence: str | None = setting(
        None, "licence of the data set, for the dataset card: an identifier of the Hugging Face Hub", DETAIL
    )

    arguments = ("source",)

    def check(self) -> None:
        super().check()
        missing = [name for name in ("source", "to", "out") if not getattr(self, name)]
        if missing:
            raise InputError(f"give --{' and --'.join(missing)}: the set, the form ({', '.join(FORMS)}), a new folder")


@dataclass(frozen=True, kw_only=True)
class ImportSetSettings(Common):
    """``scripts/import_set.py SOURCE --out FILE``: turn a synthetic set of others into a file that stage 3 reads.

    What the source does not say of itself is asked for: its data set and preprocessing among others.
    """

    data_path: FilePath = setting("dataset", "folder of the data set", PLACE)
    source: FilePath | None = setting(
        None, "res_*.pt of DC, DSA, DM; data.pt of IDC, NCFM; images_*.pt; .npz; folder of images", PLACE
    )
    out: FilePath | None = setting(None, "the .safetensors file to write", PLACE)
    overwrite: bool = setting(False, "replace the file", PLACE)
    label_dir: FilePath | None = setting(None, "labels_*.pt; default: that beside images_*.pt", PLACE)
    lr_dir: FilePath | float | None = setting(
        None, "learning rate, as a number or lr_*.pt; default: the source's own", PLACE
    )
    values: str | None = setting(
        None, "what the images are: pixels of 0 to 1, or what the network sees", RECIPE, choices=(PIXELS, NETWORK)
    )
    label_form: str | None = setting(None, "what soft labels are", RECIPE, choices=("logits", "probabilities"))
    factor: int | None = setting(None, "multi-formation: images a side that a stored image stands for", RECIPE, low=1)
    experiment: int | None = setting(None, "res_*.pt: which of its sets, from 0", RECIPE, low=0)
    mean: str | None = setting(None, "normalised by other numbers than here: mean by channel, as 0.5,0.4,0.4", RECIPE)
    std: str | None = setting(None, "standard deviation by channel", RECIPE)

    arguments = ("source",)

    def check(self) -> None:
        super().check()
        if not self.source or not self.out:
            raise InputError("give the set of others, and --out, the file to write")
        if (self.mean is None) != (self.std is None):
            raise InputError("mean and std belong together: give both, or none")
        if self.mean is not None and self.zca:
            raise InputError("mean and std are of images that are not whitened: give --zca False, or leave them out")


def export_synthetic(settings: ExportSetSettings, ranks: Ranks = ALONE) -> Path:
    """Write a synthetic set in a form that other tools read; returns the folder."""
    path, out = set_file(str(settings.source)), Path(str(settings.out))
    synthetic = SyntheticSet.load(path)
    dataset = (synthetic.metadata.get("data") or {}).get("dataset", "")
    licence = settings.licence or LICENCES.get(dataset, "unknown")
    refuse_unwritable(out)
    carded = settings.to == "huggingface"
    results = _results_of(synthetic, path.with_suffix(".evaluation.json")) if carded else None
    ranks.on_main(lambda: export_set(synthetic, str(settings.to), out, licence=licence, results=results))
    print(f"exported {len(synthetic.images)} images of {synthetic.num_classes} classes to {out}")
    print(f"the set itself costs {synthetic.cost}")
    return out


def _results_of(synthetic: SyntheticSet, path: Path) -> dict | None:
    """What stage 3 found of the set, if its results are there."""
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        if results["synthetic"]["digest"] == synthetic.digest:
            return results
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    log.warning("%s does not say that it is of this set; it is left out", path)
    return None


def import_synthetic(settings: ImportSetSettings, ranks: Ranks = ALONE) -> Path:
    """Turn a set of others into one of ours; returns its file."""
    out = Path(str(settings.out))
    refuse_taken(out, settings.overwrite)
    lr = settings.lr_dir
    found = read_foreign(str(settings.source), labels=settings.label_dir, lr=lr, experiment=settings.experiment)
    settings, found, lr = _complete(settings, found)
    bench = set_up(settings, ranks)
    synthetic = _imported(settings, found, lr, bench)
    ranks.on_main(lambda: synthetic.save(out))
    print(f"imported {len(synthetic.images)} images of {synthetic.num_classes} classes into {out}")
    print(f"the set costs {synthetic.cost}")
    return out


def _complete(settings: ImportSetSettings, found: Foreign) -> tuple[ImportSetSettings, Foreign, float]:
    """The settings with what an export says of its data set, the set with what they say of it, and its rate.

    Raises InputError for what neither says, all of it in one sentence, and where both do and differ.
    """
    made_with = found.about.get("set", {}).get("settings") or {}
    adopted = {}
    if isinstance(made_with, dict):
        adopted = {name: made_with[name] for name in settings.names(DATA, MODEL) if name in made_with}
        adopted = {name: value for name, value in adopted.items() if name not in settings.given}
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
    if found.lr is None:
        missing.append("lr_dir")
    if missing:
        raise InputError(f"{found.where} ({found.form}) does not say all that is needed; give --{', --'.join(missing)}")
    lr = float(found.lr or 0)
    if not lr > 0:
        raise InputError(f"lr_dir: {lr:g} is no learning rate, which is a positive number")
    if settings.mean is not None and found.values != NETWORK:
        raise InputError(f"mean and std are of normalised images, but those of {found.where} are pixels")
    return settings, found, lr


def _imported(settings: ImportSetSettings, found: Foreign, lr: float, bench: Workbench) -> SyntheticSet:
    there = found.about.get("set", {})
    found = fitted(found, bench.data)
    _refuse_other(found, "data", bench.data.identity)
    of = None
    if settings.mean is not None:
        of = MeanStd.of(_by_channel(settings, "mean", bench), _by_channel(settings, "std", bench), bench.device)
    own = there.get("settings") if isinstance(there.get("settings"), dict) else {}
    named = settings.of(DATA) | ({"model": settings.model} if "model" in {*settings.given, *own} else {})
    imported = {"form": found.form, "file": found.where.name, "images": len(found.images)}
    imported |= {name: value for name, value in settings.of(RECIPE).items() if value is not None}
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
    return as_set(found, lr, bench.preprocessing, of, metadata)


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
            remedy="import it with what it was made from",
        )


def _by_channel(settings: ImportSetSettings, name: str, bench: Workbench) -> tuple[float, ...]:
    text = getattr(settings, name)
    try:
        values = tuple(float(word) for word in text.split(","))
    except ValueError:
        values = ()
    if len(values) != bench.data.channels or (name == "std" and not min(values) > 0):
        raise InputError(f"{name}: {text!r} is not a number for each of {bench.data.channels} channels, as 0.5,0.4,0.4")
    return values
