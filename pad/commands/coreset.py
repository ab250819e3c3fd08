"""The first images of each class in a difficulty ranking, as a training set of a synthetic set's size.

python scripts/select_coreset.py --dataset CIFAR10 --method Herding --ipc 10
"""

import json
import logging
from dataclasses import dataclass
from pathlib import Path

import torch

from pad.commands.bench import Workbench, identity_of_set, set_up
from pad.commands.common import Ranked
from pad.config import DATA, MODEL, PLACE, RECIPE, SEED, FilePath, setting
from pad.data.formation import decoded, mixed, refuse_unfit_factor
from pad.difficulty.ranking import first_of_each_class
from pad.distributed import ALONE, Ranks
from pad.errors import InputError
from pad.initialisation import averaged_logits, refuse_small_classes
from pad.labels import hard_logits
from pad.show.pictures import save_grid, unless_it_fails
from pad.store.files import refuse_unwritable
from pad.store.identity import digest, refuse_difference
from pad.synthetic import SyntheticSet

log = logging.getLogger("pad")


@dataclass(frozen=True, kw_only=True)
class CoresetSettings(Ranked):
    """``scripts/select_coreset.py``: the first images of each class in a difficulty ranking, as a training set."""

    method: str = setting("Herding", "difficulty method, or a ranking file's stem as CIFAR10_GraNd", RECIPE)
    ipc: int = setting(1, "images per class", RECIPE, by_study=True, low=1, memory=True)
    factor: int = setting(
        1, "multi-formation: each image is so many smaller real ones a side", RECIPE, low=1, later=True
    )
    end: str = setting("easiest", "which end of the ranking", RECIPE, choices=("easiest", "hardest"))
    labels: str = setting("hard", "one-hot, or of the experts in buffer_path", RECIPE, choices=("hard", "soft"))
    buffer_path: FilePath | None = setting(None, "folder of the trajectories, for soft labels", PLACE, by_study=True)
    lr: float = setting(0.01, "learning rate that evaluation trains with", RECIPE, above=0)
    out: FilePath = setting("coresets", "folder of the set's files", PLACE, by_study=True)
    overwrite: bool = setting(False, "replace a set of the same name by other settings", PLACE, by_study=True)

    def check(self) -> None:
        super().check()
        if self.labels == "soft" and self.buffer_path is None:
            raise InputError("labels: soft ones come from experts, so give --buffer_path")


def select_coreset(settings: CoresetSettings, ranks: Ranks = ALONE, bench: Workbench | None = None) -> Path:
    """Take the first images of each class in a ranking as a training set. Returns its file.

    The ranking is read, or computed as in stage 1, by all ranks; rank 0 writes the set, which stage 3 evaluates as it
    does a synthetic one: one safetensors file, the published trio, and a picture. A set of that name is replaced when
    it says the same of itself, or ``settings.overwrite`` says so; InputError otherwise.
    """
    bench, out = bench or set_up(settings, ranks), Path(settings.out)
    num_classes, factor = bench.data.num_classes, settings.factor
    refuse_unfit_factor(factor, bench.data.size)
    [stem] = bench.ranking_stems(settings, [settings.method])
    refuse_small_classes(bench.labels, num_classes, settings.ipc, factor)
    ranks.on_main(lambda: refuse_unwritable(out))
    soft = settings.labels == "soft"
    experts = bench.labellers(str(settings.buffer_path), settings.model) if soft else None
    formed = f"_factor{factor}" if factor > 1 else ""
    name = f"{stem}_{settings.ipc}{formed}{'_hardest' * (settings.end == 'hardest')}{'_soft' * soft}"
    path = out / f"{name}.safetensors"
    metadata = {**identity_of_set(bench, settings), "settings": settings.telling(DATA, MODEL, RECIPE, SEED)}
    ranks.on_main(lambda: _refuse_other_set(settings, path, metadata))

    ranking = bench.rankings(settings, [stem], convert_flat=settings.convert_flat)[stem]
    chosen = first_of_each_class(ranking.rows, settings.ipc * factor**2, settings.end).to(bench.device)
    stored = mixed(bench.images[chosen], factor, num_classes)
    images = decoded(stored, factor, num_classes)
    classes = bench.labels[chosen]
    if experts is not None:
        labels = averaged_logits(experts, images, classes)
    else:
        labels = hard_logits(classes, num_classes)
    metadata["provenance"] = {"ranking": ranking.metadata, "images": chosen.tolist()}
    if experts is not None:
        metadata["provenance"]["experts"] = experts.digest
    ranks.on_main(lambda: _refuse_other_set(settings, path, metadata))  # the ranking is kept
    made = images, labels, torch.tensor(settings.lr), classes.cpu(), metadata
    kept = stored if factor > 1 else None
    coreset = SyntheticSet(*made, preprocessing=bench.preprocessing, stored=kept)
    if ranks.is_main:
        coreset.export_published(out, name)
        coreset.save(path)
        picture = path.with_suffix(".png")
        with unless_it_fails(picture):
            shown = coreset.pixels().cpu(), coreset.classes, coreset.class_names
            save_grid(picture, *shown, caption=f"{stem}, {settings.end} images")
        log.info("the coreset is in %s: %s", path, coreset.cost)
    return path


def _refuse_other_set(settings: CoresetSettings, path: Path, metadata: dict) -> None:
    """Raise InputError when the set at ``path`` says otherwise than ``metadata``, and is not to be replaced."""
    if settings.overwrite or not path.exists():
        return
    there, here = (_comparable(each, settings) for each in (SyntheticSet.load(path).metadata, metadata))
    refuse_difference(
        path,
        {key: there[key] for key in here if key in there},
        here,
        there_is="this set",
        here_is="this command",
        remedy="name another folder with --out, or replace it with --overwrite",
        every=True,
    )


def _comparable(metadata: dict, settings: CoresetSettings) -> dict:
    """What a set says of itself, but for where its images come from: which they are."""
    about = json.loads(json.dumps(metadata))
    origin = about.pop("provenance", {})
    if "settings" in about:  # an older set may be older than a setting
        about["settings"] = settings.untold() | about["settings"]
    return about | {key: digest(origin[key]) for key in ("images", "experts") if key in origin}
