"""Stage 3: the accuracy of fresh networks that a synthetic set, and real images of the same number, have trained.

python distill/evaluation.py --synthetic logged_files/CIFAR10/10/ConvNet/IPC10-seed0
"""

import contextlib
import dataclasses
import functools
import json
import logging
import math
import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from pad.commands.bench import Workbench, set_up
from pad.commands.common import ByProtocol, Ranked, words
from pad.commands.foreign import OfOthers, is_of_others, ours, read_set
from pad.commands.kept import Kept
from pad.commands.results import as_text, scores_of
from pad.commands.rows import TITLES, Row, Rows, held_out, missing_for, row_names
from pad.commands.training import RowTraining
from pad.config import DATA, DETAIL, MODEL, PLACE, RECIPE, REPORT, SEED, FilePath, checkout, setting
from pad.difficulty.ranking import Ranking
from pad.distributed import ALONE, Ranks
from pad.errors import InputError
from pad.initialisation import Experts, WeakExperts, refuse_small_classes
from pad.metrics import NEEDS
from pad.store.files import refuse_unwritable, unreadable, write_text
from pad.store.identity import digest, refuse_difference
from pad.store.locks import only_writer
from pad.synthetic import SyntheticSet, set_file

log = logging.getLogger("pad")


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings(OfOthers, ByProtocol, Ranked):
    """Stage 3, ``distill/evaluation.py``: train fresh networks on a synthetic set and test them on real images."""

    batch_train: int = setting(128, "batch size for training networks", REPORT, low=1, memory=True)
    data_dir: FilePath | None = setting(None, "images_*.pt of a published set", RECIPE, by_study=True)
    synthetic: FilePath | None = setting(
        None, "file or folder of a set, of this toolkit's or of others, or its run's folder", RECIPE, by_study=True
    )
    buffer_path: FilePath | None = setting(
        None, "folder of the trajectories, for soft labels of real images", PLACE, by_study=True
    )
    baselines: str = setting(
        "hard,soft",
        "rows beside the synthetic set: random real images with hard and soft labels, and the first of a "
        "difficulty method, as in hard,soft,Herding; or none",
        REPORT,
        by_study=True,
    )
    rows: str = setting(
        "",
        f"rows of the table: all, or a list of {', '.join(TITLES)} and difficulty methods; default: syn, and beside "
        "baselines syn_hard and these",
        REPORT,
        later=True,
    )
    metrics: str = setting(
        "",
        f"of {', '.join(NEEDS)}, scores that there must be rows for; default: those that there are",
        REPORT,
        later=True,
    )
    tune_lr: bool = setting(
        False, "also train at a learning rate for each row, chosen on held-out training images", REPORT, later=True
    )
    lr_grid: str = setting("0.001,0.005,0.01,0.05,0.1", "learning rates to choose from", REPORT, later=True)
    held_out: float = setting(
        0.1, "share of each class of the training images to choose on", REPORT, above=0, below=1, later=True
    )
    full_epochs: int = setting(100, "epochs to train a network on the whole training set", REPORT, low=1, later=True)
    full_lr: float = setting(0.01, "learning rate on the whole training set", REPORT, above=0, later=True)
    full_path: FilePath | None = setting(
        None,
        "folder that keeps the scores of networks that the whole set has trained; default: runs/whole in the checkout",
        PLACE,
        by_study=True,
    )
    out: FilePath | None = setting(None, "JSON file of the results; default: beside the set", PLACE, by_study=True)
    overwrite: bool = setting(False, "replace results of another set or by other settings", PLACE, by_study=True)

    dead = {
        "batch_real": "nothing reads it",
        "lr_teacher": "a synthetic set brings its learning rate",
        "no_aug": "it is about matching, in the second stage",
        "parall_eva": "torchrun deals networks to several devices",
    }
    trio: ClassVar[tuple[str, ...]] = ("data_dir", *OfOthers.files)
    refused = {"lr_net": "a set brings its learning rate; for one that has none, give the number as --lr_dir"}

    def check(self) -> None:
        super().check()
        trio = {name: getattr(self, name) for name in self.trio}
        others = ["synthetic"] * bool(self.synthetic) + list(self.said)
        if self.data_dir and others:
            raise InputError(f"data_dir and {others[0]} exclude each other: name the set's file with --synthetic")
        missing = [key for key, value in trio.items() if value is None]
        if not self.synthetic and missing:
            if missing == ["lr_dir"]:
                raise InputError("lr_dir: the set's learning rate is missing; give its file, or the number itself")
            raise InputError(f"no synthetic set to evaluate: give --synthetic, or --{' and --'.join(missing)}")

        self.grid  # noqa: B018
        for metric in words(self.metrics):
            if metric not in NEEDS:
                raise InputError(f"metrics: {metric!r} is not one of {', '.join(NEEDS)}")

    @property
    def baseline_kinds(self) -> list[str]:
        """``hard``, ``soft``, and names of difficulty methods, each once."""
        return [] if self.baselines in ("", "none") else words(self.baselines)

    @property
    def grid(self) -> list[float]:
        """Learning rates to choose from, each once, in order. Raises InputError for what is none."""
        rates = []
        for word in words(self.lr_grid):
            try:
                rates.append(float(word))
            except ValueError:
                rates.append(math.nan)
            if not 0 < rates[-1] < math.inf:
                raise InputError(f"lr_grid: {word!r} is not a learning rate")
        if not rates:
            raise InputError("lr_grid: there is no learning rate in it")
        return sorted(set(rates))

    @property
    def whole_folder(self) -> Path:
        """Where it is kept what networks score that the whole training set has trained."""
        return Path(self.full_path or checkout() / "runs" / "whole")

    def resolved(self) -> Self:
        settings = super().resolved()
        if "full_lr" in self.given or self.published.lr is None:
            return settings
        return dataclasses.replace(settings, full_lr=self.published.lr)

    def asked_rows(self, hard: bool) -> list[str]:
        """The rows of a set whose labels are ``hard``, or not. Raises InputError where these cannot be had."""
        experts = self.buffer_path is not None
        if not self.rows:
            beside = ["syn_hard"] * (not hard) + self.baseline_kinds if self.baseline_kinds else []
            names = row_names(beside, hard=hard, experts=experts)
            if "random_soft" in names and not experts:
                log.info("no --buffer_path: real images with the experts' soft labels are left out")
                names.remove("random_soft")
            return names
        names = row_names(words(self.rows), hard=hard, experts=experts)
        soft = [name for name in names if name == "random_soft" or (name == "random_plain" and not hard)]
        if soft and not experts:
            raise InputError(f"rows: {soft[0]} has labels of the experts: give --buffer_path")
        plain = [name for name in names if name.endswith("_plain")]
        if not self.dsa and {*plain} & {*words(self.rows)}:
            raise InputError(f"rows: {plain[0]} is to compare with augmentation, and dsa is False")
        return [name for name in names if self.dsa or name not in plain]


def evaluate(settings: EvaluationSettings, ranks: Ranks = ALONE, bench: Workbench | None = None) -> dict:
    """Stage 3: train fresh networks on a synthetic set, and on real images of the same number. Returns the results.

    The networks are dealt to the ranks; rank 0 writes. The accuracy of each network is kept until the results are
    written, so that a stopped command, given again, trains those only that are missing. Results that say that they are
    of another set, or by other settings, are replaced only when ``settings.overwrite`` says so.
    """
    settings, on = _read_set(settings)
    out = Path(settings.out or _beside(str(settings.synthetic or settings.data_dir)))
    if out.is_dir():
        raise InputError(f"out: {out} is a folder; name a file")
    ranks.on_main(lambda: refuse_unwritable(out.parent))
    lock = only_writer(out.with_name(f".{out.name}.lock"), f"{out}")
    with lock if ranks.is_main else contextlib.nullcontext():
        bench = bench or set_up(settings, ranks)
        return _evaluate(settings, on(bench), out, bench)


def _evaluate(settings: EvaluationSettings, synthetic: SyntheticSet, out: Path, bench: Workbench) -> dict:
    ranks = bench.ranks
    hard = synthetic.is_hard
    _refuse_other_data(synthetic, bench)
    asked = what_is_asked(settings, bench, hard=hard, counts=synthetic.counts)
    experts = None
    if any(name == "random_soft" or (name == "random_plain" and not hard) for name in asked.rows):
        experts = bench.labellers(str(settings.buffer_path), settings.model)
    _refuse_other("preprocessing", synthetic, bench.preprocessing.identity)
    about = _about(settings, synthetic, bench, experts)
    if not settings.overwrite:
        ranks.on_main(lambda: _refuse_other_results(out, about))

    @functools.cache  # one training for all of them, when the first is asked for
    def rankings() -> dict[str, Ranking]:
        found = bench.rankings(settings, list(asked.stems.values()), convert_flat=settings.convert_flat)
        return {name: found[stem] for name, stem in asked.stems.items()}

    rows = Rows(bench=bench, synthetic=synthetic, seed=settings.seed, experts=experts, rankings=rankings)
    drawable = _drawable([rows.make(name) for name in asked.rows], ranks, "left out")
    kept = Kept(out.with_name(f"{out.name}.networks-"), ranks, bench.data.test_fingerprint, digest(about))
    training = RowTraining(settings, bench, synthetic, len(drawable), kept)
    tuned: dict[tuple[str, str], float] = {}
    if asked.held is not None:
        tried, left = asked.held
        without = dataclasses.replace(rows, left=left)
        tuned = training.tune(_drawable([without.make(row.name) for row in drawable], ranks, "not tuned"), tried)
    results = {
        "dataset": bench.data.name,
        "ipc": synthetic.ipc,
        **({} if synthetic.is_even else {"images_of_each_class": synthetic.counts}),
        "lr": synthetic.lr.item(),
        "protocol": settings.protocol,
        "epochs": settings.epoch_eval_train,
        "preprocessing": bench.preprocessing.kind,
        "seed": settings.seed,
        "bits": synthetic.cost.as_dict(),
        "results": training.score(drawable, tuned),
        **about,
    }
    results |= scores_of(results["results"], hard)
    if ranks.is_main:
        write_text(out, json.dumps(results, indent=2, sort_keys=True) + "\n")
    ranks.barrier()
    kept.remove()
    ranks.barrier()  # before another process may write there
    if ranks.is_main:
        count = len(bench.test_images)
        print(f"\n{bench.data.name}, {synthetic.size}, accuracy on {count} test images")
        print(as_text(results))
        print(f"the set costs {synthetic.cost}")
        log.info("results are in %s", out)
    return results


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What an evaluation is asked for.

    rows: their names. held: the images to choose learning rates on, and the others, where rates are chosen. stems: the
    names in files of the rankings, by row.
    """

    rows: list[str]
    held: tuple[Tensor, Tensor] | None
    stems: dict[str, str]


def what_is_asked(settings: EvaluationSettings, bench: Workbench, *, hard: bool, counts: Sequence[int]) -> Asked:
    """What is asked for, of a set of ``counts`` images of the classes whose labels are ``hard``, or not.

    Raises InputError for all that can be refused before there is a set.
    """
    names = settings.asked_rows(hard)
    if missing := missing_for(words(settings.metrics), names, hard):
        raise InputError(f"metrics: {missing}; ask for them with --rows, or for all of them with --rows all")
    bench.refuse_unfit(settings.pool)
    sizes = {sum(counts)} | ({len(bench.labels)} if "full" in names else set())
    drawn = [name for name in names if not name.startswith("syn") and name != "full"]
    if drawn:
        refuse_small_classes(bench.labels, bench.data.num_classes, counts)
    held = None
    if settings.tune_lr:
        held = held_out(bench.classes, settings.held_out, settings.seed, counts if drawn else 1)
        sizes |= {len(held[1])} if "full" in names else set()
    _refuse_lone_images(settings, bench, sizes)
    methods = [name for name in drawn if name not in TITLES]
    stems = dict(zip(methods, bench.ranking_stems(settings, methods))) if methods else {}
    if "full" in names:
        bench.ranks.on_main(lambda: refuse_unwritable(settings.whole_folder))
    return Asked(rows=names, held=held, stems=stems)


def _refuse_lone_images(settings: EvaluationSettings, bench: Workbench, counts: Collection[int]) -> None:
    """Raise InputError where a last batch has one image only, of which a network has no statistics."""
    for count in sorted(counts):
        if count % settings.batch_train != 1:
            continue
        for name in settings.pool:
            with torch.no_grad():
                try:
                    bench.network(name, 0).train()(torch.zeros(1, bench.data.channels, *bench.data.size))
                except ValueError as error:  # BatchNorm's
                    raise InputError(
                        f"batch_train: of {count} images the last batch of {settings.batch_train} has one, with which "
                        f"{name} cannot be trained: {error}"
                    ) from None


def _read_set(settings: EvaluationSettings) -> tuple[EvaluationSettings, Callable[[Workbench], SyntheticSet]]:
    """The settings, with what a set's file says of its data and network where none was given, and the set on these."""
    if not settings.synthetic:
        trio = SyntheticSet.from_published(*(getattr(settings, name) for name in settings.trio))
        return settings, lambda bench: trio
    path = set_file(settings.synthetic)
    if not os.path.exists(path) and is_of_others(settings.synthetic):
        path = Path(settings.synthetic)
    settings = dataclasses.replace(settings, synthetic=FilePath(str(path)))
    if is_of_others(str(path)):
        settings, found = read_set(settings, str(path))
        return settings, lambda bench: ours(settings, found, bench)
    if reason := unreadable(path):
        raise InputError(f"synthetic: {path} {reason}")
    for name in (*settings.files, *settings.said):
        if getattr(settings, name) is not None:
            raise InputError(f"{name}: {path} is a file of this toolkit's, which says that itself")
    synthetic = SyntheticSet.load(str(path))
    return settings.adopting(settings.taken_over(synthetic.metadata.get("settings"))), lambda bench: synthetic


def _beside(source: str) -> Path:
    """The results of the set at ``source``, in the same folder."""
    if not os.path.isdir(source):
        return Path(source).with_suffix(".evaluation.json")
    folder = Path(os.path.abspath(source))
    return folder.with_name(f"{folder.name}.evaluation.json")


def _refuse_other_data(synthetic: SyntheticSet, bench: Workbench) -> None:
    """Raise InputError when the set was not made for the configured data, as far as one can tell."""
    shape = (bench.data.channels, *bench.data.size)
    if tuple(synthetic.images.shape[1:]) != shape or synthetic.num_classes != bench.data.num_classes:
        raise InputError(
            f"the synthetic set holds images {list(synthetic.images.shape[1:])} of {synthetic.num_classes} classes, "
            f"but {bench.data.name} has images {list(shape)} of {bench.data.num_classes} classes"
        )
    _refuse_other("data", synthetic, bench.data.identity)


def _refuse_other(what: str, synthetic: SyntheticSet, here: dict) -> None:
    """Raise InputError when the set's identity of ``what`` is another than ``here``; published sets have none."""
    if there := synthetic.metadata.get(what):
        refuse_difference(
            "the synthetic set",
            {what: {key: there.get(key) for key in here}},
            {what: here},
            there_is="the set",
            here_is="the settings",
            remedy="evaluate it with what it was made from",
        )


def _about(settings: EvaluationSettings, synthetic: SyntheticSet, bench: Workbench, experts: Experts | None) -> dict:
    """What results are of, as plain values: the set, wherever it lies, the images, the experts, the settings."""
    elsewhere = ("synthetic", "data_dir", *OfOthers.names(RECIPE))
    named = {"digest": synthetic.digest, "iteration": synthetic.metadata.get("iteration")}
    if synthetic.factor > 1:
        named["factor"] = synthetic.factor
    told = settings.telling(DATA, MODEL, RECIPE, SEED, DETAIL, REPORT)
    return {
        "synthetic": {name: value for name, value in named.items() if value is not None},
        "settings": {name: value for name, value in told.items() if name not in elsewhere},
        "data": bench.data.tested,
        "experts": experts.digest if experts else None,
    }


def _refuse_other_results(out: Path, about: dict) -> None:
    """Raise InputError when the file ``out`` holds anything but results that are ``about`` the same."""
    if not out.exists():
        return
    remedy = "name another file with --out, or replace this one with --overwrite"
    try:
        there = json.loads(out.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        there = None
    if not isinstance(there, dict) or not about.keys() <= there.keys():
        raise InputError(f"{out} is there and does not say what set and settings it is of; {remedy}")
    here = json.loads(json.dumps(about))
    there = {key: there[key] for key in here}
    for told in (there, here):
        if isinstance(told["settings"], dict):
            told["settings"] = EvaluationSettings.untold() | told["settings"]
    refuse_difference(out, there, here, there_is="these results", here_is="this command", remedy=remedy, every=True)


def _drawable(rows: Sequence[Row], ranks: Ranks, otherwise: str) -> list[Row]:
    """The rows that can be had, found before a network is trained; a line says of others why: weak experts."""

    def why_not(row: Row) -> str:
        try:
            row.sets(0)
        except WeakExperts as error:
            return str(error)
        return ""

    reasons = [max(ranks.gather(why_not(row))) for row in rows]
    for row, reason in zip(rows, reasons):
        if reason:
            log.warning("%s are %s: %s", row.title, otherwise, reason)
    return [row for row, reason in zip(rows, reasons) if not reason]
