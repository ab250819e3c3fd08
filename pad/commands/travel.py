"""Synthetic sets to the forms that other tools read, and from the files of others.

python scripts/export_set.py logged_files/CIFAR10/10/ConvNet/IPC10-seed0 --to huggingface --out exported
python scripts/import_set.py res_DM_CIFAR10_ConvNet_10ipc.pt --dataset CIFAR10 --zca False --lr_dir 0.01 \\
    --out dm.safetensors
"""

import json
import logging
from dataclasses import dataclass
from pathlib import Path

from pad.commands.bench import set_up
from pad.commands.foreign import OfOthers, ours, read_set, refuse_name_of_others
from pad.config import DETAIL, PLACE, RECIPE, FilePath, Settings, setting
from pad.distributed import ALONE, Ranks
from pad.errors import InputError
from pad.exchange.card import LICENCES, accuracies
from pad.exchange.writing import FORMS, export_set
from pad.store.files import refuse_taken, refuse_unwritable
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
class ImportSetSettings(OfOthers):
    """``scripts/import_set.py SOURCE --out FILE``: turn a synthetic set of others into a file of this toolkit's.

    What the source does not say of itself is asked for: its data set and preprocessing among others.
    """

    data_path: FilePath = setting("dataset", "folder of the data set", PLACE)
    source: FilePath | None = setting(
        None, "res_*.pt of DC, DSA, DM; data.pt of IDC, NCFM; images_*.pt; .npz; folder of images", PLACE
    )
    out: FilePath | None = setting(None, "the .safetensors file to write", PLACE)
    overwrite: bool = setting(False, "replace the file", PLACE)

    arguments = ("source",)

    def check(self) -> None:
        super().check()
        if not self.source or not self.out:
            raise InputError("give the set of others, and --out, the file to write")


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
            accuracies(results)  # whether they can be shown
            return results
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    log.warning("%s is damaged, or not of this set; it is left out", path)
    return None


def import_synthetic(settings: ImportSetSettings, ranks: Ranks = ALONE) -> Path:
    """Turn a set of others into one of ours; returns its file."""
    out = Path(str(settings.out))
    refuse_taken(out, settings.overwrite)
    refuse_name_of_others(str(out))
    settings, found = read_set(settings, str(settings.source))
    synthetic = ours(settings, found, set_up(settings, ranks))
    ranks.on_main(lambda: synthetic.save(out))
    print(f"imported {len(synthetic.images)} images of {synthetic.num_classes} classes into {out}")
    print(f"the set costs {synthetic.cost}")
    return out
