"""Difficulty rankings by themselves: compute them by any methods, and look at them."""

import logging
import time
from dataclasses import dataclass

from pad.commands.bench import check_writable, rankings_folder, set_up
from pad.commands.common import _SCORING, _Curriculum, _words
from pad.config import FilePath, setting
from pad.difficulty.methods import METHODS
from pad.difficulty.obtain import file_name, ranking_file, ranking_method
from pad.difficulty.ranking import Ranking
from pad.difficulty.training import ScoringSettings
from pad.distributed import ALONE, Ranks
from pad.errors import InputError
from pad.experts.curriculum import Curriculum
from pad.show import difficulty as plots
from pad.show.tables import result_table


@dataclass(kw_only=True)
class ScoreSettings(_Curriculum):
    """``scripts/score_difficulty.py``: rank the training images by difficulty; all methods share one training.

    The curriculum is for --plot, which draws it.
    """

    methods: str = setting("GraNd", "difficulty methods, as GraNd,EL2N,Forgetting; or all")
    list: bool = setting(False, "print the methods and end")
    out: FilePath | None = setting(
        None, "folder of ranking files; default, but for an ImageFolder or a part: data_indices in the checkout"
    )
    overwrite: bool = setting(False, "compute also what is there already")
    plot: bool = setting(False, "draw rankings and curriculum, into plots_<NAME> in the folder")
    repeats: int = setting(10, "networks to average over", low=1)
    epochs: int = setting(40, "epochs to train each", low=1)
    lr: float = setting(0.1, "learning rate", above=0)
    momentum: float = setting(0.9, "Nesterov momentum", low=0, below=1)
    weight_decay: float = setting(5e-4, "weight decay", low=0)
    batch: int = setting(256, "batch size", low=1)
    augmentation: str = setting("none", "none, or a DSA strategy as crop_flip")

    def check(self) -> None:
        super().check()
        if self.method_names == []:
            raise InputError("methods: none are named; give names as GraNd,EL2N, or all")

    @property
    def method_names(self):
        """A list of names, each once; None for all there are."""
        return None if self.methods.strip() == "all" else _words(self.methods)

    @property
    def scoring(self) -> dict:
        """Keyword arguments of :class:`pad.difficulty.training.ScoringSettings`."""
        return {name: getattr(self, name) for name in _SCORING}

    @property
    def asked_scoring(self) -> set[str]:
        """Those of them that were given: a ranking that is there must have been made with these."""
        return set(_SCORING) & self.given


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
        pictures = folder / f"plots_{file_name(bench.data.name)}"
        plots.plot_all(
            pictures,
            found,
            bench.data.train_images,
            bench.data.class_names,
            Curriculum(**settings.curriculum),
            settings.train_epochs,
        )
        log.info("the pictures are in %s", pictures)
    return found


def _what_comes_first(name: str) -> str:
    """A method's summary, or that only its file is known."""
    return METHODS[name].summary if name in METHODS else "as its file has it"
