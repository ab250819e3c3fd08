"""Rankings by themselves: compute them by any methods, look at them, take their first images as a training set."""

import logging
import time
from pathlib import Path

import torch

from pad.coresets import first_of_each_class, hard_logits
from pad.difficulty import plots
from pad.difficulty.methods import METHODS
from pad.difficulty.ranking import Ranking, ranking_file, ranking_method
from pad.difficulty.training import ScoringSettings
from pad.distributed import ALONE, Ranks
from pad.experts.curriculum import Curriculum
from pad.initialisation import averaged_logits
from pad.settings import CoresetSettings, ScoreSettings
from pad.stages.workbench import Workbench, check_writable, experts_folder, rankings_folder, set_up
from pad.synthetic import SyntheticSet
from pad.tracking import result_table, save_grid

log = logging.getLogger("pad")


def score_difficulty(settings: ScoreSettings, ranks: Ranks = ALONE) -> dict[str, Ranking]:
    """Rank the training images by every method asked for. Returns the rankings by method.

    The methods share the training of the scoring networks, which are dealt to the ranks; rank 0 writes. Finished
    networks are kept, so an interrupted command goes on, until the rankings are written; these are kept too.
    """
    if settings.list:
        table = [{"method": name, "first come": method.summary} for name, method in METHODS.items()]
        print(result_table(table, list(table[0])))
        return {}
    methods = list(METHODS) if settings.method_names is None else settings.method_names
    ScoringSettings(**settings.scoring)  # refuses what is out of range
    folder = rankings_folder(settings, settings.out)
    bench = set_up(settings, ranks)
    stems = ranks.on_main(lambda: [ranking_file(folder, bench.data.name, method) for method in methods])
    methods = list(dict.fromkeys(ranking_method(bench.data.name, stem) for stem in stems))
    ranks.on_main(lambda: check_writable(folder))

    began = time.perf_counter()
    found = bench.rankings(methods, folder, settings, overwrite=settings.overwrite)
    log.info("%d rankings are in %s (%.0f s)", len(found), folder, time.perf_counter() - began)
    if not ranks.is_main:
        return found
    first, *_ = found
    table = [
        {"method": name, "first come": _what_comes_first(name), f"rank correlation with {first}": f"{value:.2f}"}
        for name, value in zip(found, plots.rank_correlation(found)[0].tolist())
    ]
    print(f"\n{bench.data.name}, {len(bench.labels)} images in {bench.data.num_classes} classes")
    print(result_table(table, list(table[0])))
    if settings.plot:
        pictures = folder / f"plots_{stems[0].name.rpartition('_')[0]}"
        plots.plot_all(
            pictures, found, bench.data.train_images, bench.data.class_names, Curriculum(**settings.curriculum),
            settings.train_epochs,
        )  # fmt: skip
        log.info("the pictures are in %s", pictures)
    return found


def _what_comes_first(name: str) -> str:
    """A method's summary, or that only its file is known."""
    return METHODS[name].summary if name in METHODS else "as its file has it"


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
        "data": bench.data.identity, "class_names": list(bench.data.class_names), "model": settings.model,
        "seed": settings.seed, "settings": {name: getattr(settings, name) for name in _RECIPE},
        "provenance": {"ranking": ranking.metadata, "images": chosen.tolist()},
    }  # fmt: skip
    coreset = SyntheticSet(
        images, logits, torch.tensor(settings.lr), classes.cpu(), metadata, bench.preprocessing
    )
    name = f"{stem.name}_{settings.ipc}{'_hardest' * (settings.end == 'hardest')}{'_soft' * soft}"
    path = out / f"{name}.safetensors"
    if ranks.is_main:
        coreset.export_published(out, name)
        save_grid(
            out / f"{name}.png", coreset.pixels().cpu(), coreset.classes, coreset.class_names,
            caption=f"{stem.name}, {settings.end} images",
        )  # fmt: skip
        coreset.save(path)
        log.info("the coreset is in %s", path)
    return path


# The settings that make a coreset what it is.
_RECIPE = "dataset subset res train_per_class zca model method ipc end labels lr seed".split()
