"""The first images of each class in a difficulty ranking, as a training set of a synthetic set's size."""

import logging
from dataclasses import dataclass
from pathlib import Path

import torch

from pad.commands.bench import Workbench, check_writable, experts_folder, rankings_folder, set_up
from pad.commands.common import _Ranked
from pad.config import FilePath, setting
from pad.difficulty.obtain import ranking_file
from pad.difficulty.ranking import first_of_each_class
from pad.difficulty.training import ScoringSettings
from pad.distributed import ALONE, Ranks
from pad.errors import InputError
from pad.initialisation import averaged_logits
from pad.labels import hard_logits
from pad.show.pictures import save_grid
from pad.synthetic import SyntheticSet

log = logging.getLogger("pad")


@dataclass(kw_only=True)
class CoresetSettings(_Ranked):
    """``scripts/select_coreset.py``: the first images of each class in a difficulty ranking, as a training set."""

    method: str = setting("Herding", "difficulty method, or a ranking file's stem as CIFAR10_GraNd")
    ipc: int = setting(1, "images per class", low=1)
    end: str = setting("easiest", "which end of the ranking", choices=("easiest", "hardest"))
    labels: str = setting("hard", "one-hot, or of the experts in buffer_path", choices=("hard", "soft"))
    buffer_path: FilePath | None = setting(None, "folder of the trajectories, for soft labels")
    lr: float = setting(0.01, "learning rate that evaluation trains with", above=0)
    out: FilePath = setting("coresets", "folder of the set's files")

    def check(self) -> None:
        super().check()
        if self.labels == "soft" and self.buffer_path is None:
            raise InputError("labels: soft ones come from experts, so give --buffer_path")


def select_coreset(settings: CoresetSettings, ranks: Ranks = ALONE, bench: Workbench | None = None) -> Path:
    """Take the first images of each class in a ranking as a training set. Returns its file.

    The ranking is read, or computed as in stage 1, by all ranks; rank 0 writes the set, which stage 3 evaluates as it
    does a synthetic one: one safetensors file, the published trio, and a picture.
    """
    folder, out = rankings_folder(settings, settings.ranking_path), Path(settings.out)
    scoring = ScoringSettings(**settings.scoring)
    bench = bench or set_up(settings, ranks)
    num_classes = bench.data.num_classes
    stem = ranks.on_main(lambda: ranking_file(folder, bench.data.name, settings.method))
    members = [(bench.data.train_labels == c).nonzero().flatten() for c in range(num_classes)]
    first_of_each_class(members, settings.ipc)  # refuses an ipc that a class cannot fill, before there is a ranking
    ranks.on_main(lambda: check_writable(out))
    bench.network(scoring.model, 0)
    soft = settings.labels == "soft"
    if soft:
        experts = bench.final_experts(experts_folder(settings, bench.data), settings.model)

    found = bench.rankings([settings.method], folder, settings, convert_flat=settings.convert_flat)
    ranking = found[settings.method]
    chosen = first_of_each_class(ranking.rows, settings.ipc, settings.end).to(bench.device)
    images, classes = bench.images[chosen], bench.labels[chosen]
    logits = averaged_logits(experts, images, classes) if soft else hard_logits(classes, num_classes)
    metadata = {
        "data": bench.data.identity,
        "class_names": list(bench.data.class_names),
        "model": settings.model,
        "seed": settings.seed,
        "settings": {name: getattr(settings, name) for name in _RECIPE},
        "provenance": {"ranking": ranking.metadata, "images": chosen.tolist()},
    }
    coreset = SyntheticSet(images, logits, torch.tensor(settings.lr), classes.cpu(), metadata, bench.preprocessing)
    name = f"{stem.name}_{settings.ipc}{'_hardest' * (settings.end == 'hardest')}{'_soft' * soft}"
    path = out / f"{name}.safetensors"
    if ranks.is_main:
        coreset.export_published(out, name)
        save_grid(
            out / f"{name}.png",
            coreset.pixels().cpu(),
            coreset.classes,
            coreset.class_names,
            caption=f"{stem.name}, {settings.end} images",
        )
        coreset.save(path)
        log.info("the coreset is in %s", path)
    return path


# The settings that make a coreset what it is.
_RECIPE = "dataset subset res train_per_class zca model method ipc end labels lr seed".split()
