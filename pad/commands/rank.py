"""Difficulty rankings by themselves: compute them by any methods, and look at them.

python scripts/score_difficulty.py --dataset CIFAR10 --methods GraNd,EL2N,Forgetting --plot
"""

import logging
import time
from dataclasses import dataclass
from pathlib import Path

from pad.commands.bench import set_up
from pad.commands.common import OnCurriculum, Scoring, words
from pad.config import DETAIL, PLACE, RECIPE, REPORT, FilePath, setting
from pad.difficulty.methods import METHODS
from pad.difficulty.obtain import file_name, ranking_method
from pad.difficulty.ranking import Ranking
from pad.distributed import ALONE, Ranks
from pad.errors import InputError
from pad.show import difficulty as plots
from pad.show.tables import result_table
from pad.store.files import refuse_unwritable

log = logging.getLogger("pad")


@dataclass(frozen=True, kw_only=True)
class ScoreSettings(OnCurriculum, Scoring):
    """``scripts/score_difficulty.py``: rank the training images by difficulty; all methods share one training.

    The curriculum is for --plot, which draws it.
    """

    methods: str = setting("GraNd", "difficulty methods, as GraNd,EL2N,Forgetting; or all", RECIPE)
    list: bool = setting(False, "print the methods and end", REPORT)
    out: FilePath | None = setting(
        None, "folder of ranking files; default, but for an ImageFolder or a part: data_indices", PLACE
    )
    overwrite: bool = setting(False, "compute also what is there already", PLACE)
    convert_flat: bool = setting(
        False, "read a flat ranking file, hardest first: turn it round, group it by class", DETAIL
    )
    plot: bool = setting(False, "draw rankings and curriculum, into plots_<NAME> in the folder", REPORT)
    repeats: int = setting(10, "networks to average over", DETAIL, low=1)
    epochs: int = setting(40, "epochs to train each", DETAIL, low=1)
    lr: float = setting(0.1, "learning rate", DETAIL, above=0)
    momentum: float = setting(0.9, "Nesterov momentum", DETAIL, low=0, below=1)
    weight_decay: float = setting(5e-4, "weight decay", DETAIL, low=0)
    batch: int = setting(256, "batch size", DETAIL, low=1, memory=True)
    augmentation: str = setting("none", "none, or a DSA strategy as crop_flip", DETAIL)

    def check(self) -> None:
        super().check()
        if not self.method_names:
            raise InputError("methods: none are named; give names as GraNd,EL2N, or all")

    @property
    def method_names(self):
        """Names of methods, each once."""
        return [*METHODS] if self.methods.strip().lower() == "all" else words(self.methods)

    @property
    def rankings_folder(self) -> Path:
        return self.folder_of_rankings(self.out, option="out")


def score_difficulty(settings: ScoreSettings, ranks: Ranks = ALONE) -> dict[str, Ranking]:
    """Rank the training images by every method asked for. Returns the rankings by method.

    The methods share the training of the scoring networks, which are dealt to the ranks; rank 0 writes. Finished
    networks are kept, so an interrupted command goes on, until the rankings are written; these are kept too.
    """
    if settings.list:
        lines = [{"method": name, "first come": method.summary} for name, method in METHODS.items()]
        print(result_table(lines, list(lines[0])))
        return {}
    folder = settings.rankings_folder
    bench = set_up(settings, ranks)
    stems = bench.ranking_stems(settings, settings.method_names)
    methods = list(dict.fromkeys(ranking_method(bench.data.name, Path(stem)) for stem in stems))
    ranks.on_main(lambda: refuse_unwritable(folder))

    began = time.perf_counter()
    found = bench.rankings(settings, methods, overwrite=settings.overwrite, convert_flat=settings.convert_flat)
    log.info("%d rankings are in %s (%.0f s)", len(found), folder, time.perf_counter() - began)
    if not ranks.is_main:
        return found
    print(f"\n{bench.data.name}, {len(bench.labels)} images in {bench.data.num_classes} classes")
    print(_table(found))
    if settings.plot:
        pictures = folder / f"plots_{file_name(bench.data.name)}"
        names = bench.data.class_names
        plots.plot_all(pictures, found, bench.data.train_images, names, settings.curriculum, settings.train_epochs)
        log.info("the pictures are in %s", pictures)
    return found


def _table(found: dict[str, Ranking]) -> str:
    """What comes first by each method, as far as more than its file is known, and how far it agrees with the first."""
    lines = [
        {
            "method": name,
            "first come": METHODS[name].summary if name in METHODS else "as its file has it",
            f"rank correlation with {next(iter(found))}": f"{value:.2f}",
        }
        for name, value in zip(found, plots.rank_correlation(found)[0].tolist())
    ]
    return result_table(lines, list(lines[0]))
