"""Stage 3: the accuracy of fresh networks that a synthetic set, and real images of the same number, have trained.

python distill/evaluation.py --synthetic logged_files/CIFAR10/10/ConvNet/IPC10-seed0
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from pad.commands.bench import Workbench, progress_bar, set_up
from pad.commands.common import Evaluating, Ranked, words
from pad.config import DATA, DETAIL, MODEL, PLACE, RECIPE, REPORT, SEED, FilePath, setting
from pad.data.augment import DC
from pad.difficulty.ranking import first_of_each_class
from pad.distributed import ALONE, Ranks
from pad.errors import InputError
from pad.evaluation import Accuracies, Protocol, TrainingSet, TrainingSets
from pad.initialisation import Experts, WeakExperts, class_order, initial_set, refuse_small_classes
from pad.nn import networks
from pad.show.tables import result_table
from pad.store.files import refuse_unwritable, write_text
from pad.store.identity import digest, refuse_difference
from pad.store.locks import only_writer
from pad.store.run import append_line
from pad.synthetic import SyntheticSet

log = logging.getLogger("pad")


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings(Evaluating, Ranked):
    """Stage 3, ``distill/evaluation.py``: train fresh networks on a synthetic set and test them on real images."""

    batch_train: int = setting(128, "batch size for training networks", REPORT, low=1, memory=True)
    data_dir: FilePath | None = setting(None, "images_*.pt of a published set", RECIPE, by_study=True)
    label_dir: FilePath | None = setting(None, "labels_*.pt of a published set", RECIPE, by_study=True)
    lr_dir: FilePath | float | None = setting(
        None, "lr_*.pt of a published set; of one that has none, the learning rate as a number", RECIPE, by_study=True
    )
    synthetic: FilePath | None = setting(
        None, "its own file, or its run's folder, instead of the three", RECIPE, by_study=True
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
    out: FilePath | None = setting(None, "JSON file of the results; default: beside the set", PLACE, by_study=True)
    overwrite: bool = setting(False, "replace results of another set or by other settings", PLACE, by_study=True)

    dead = {
        "batch_real": "nothing reads it",
        "lr_teacher": "a synthetic set brings its learning rate",
        "no_aug": "it is about matching, in the second stage",
        "parall_eva": "torchrun deals networks to several devices",
    }
    trio: ClassVar[tuple[str, ...]] = ("data_dir", "label_dir", "lr_dir")
    refused = {"lr_net": "a set brings its learning rate; for one that has none, give the number as --lr_dir"}

    def check(self) -> None:
        super().check()
        trio = {name: getattr(self, name) for name in self.trio}
        if self.synthetic and {*trio.values()} != {None}:
            raise InputError(
                "synthetic and data_dir, label_dir, lr_dir exclude each other: give the one file or the three"
            )
        missing = [key for key, value in trio.items() if value is None]
        if not self.synthetic and missing:
            if missing == ["lr_dir"]:
                raise InputError("lr_dir: the set's learning rate is missing; give its file, or the number itself")
            raise InputError(f"no synthetic set to evaluate: give --synthetic, or --{' and --'.join(missing)}")

    @property
    def baseline_kinds(self) -> list[str]:
        """``hard``, ``soft``, and names of difficulty methods, each once."""
        return [] if self.baselines in ("", "none") else words(self.baselines)


def evaluate(settings: EvaluationSettings, ranks: Ranks = ALONE, bench: Workbench | None = None) -> dict:
    """Stage 3: train fresh networks on a synthetic set, and on real images of the same number. Returns the results.

    The networks are dealt to the ranks; rank 0 writes. The accuracy of each network is kept until the results are
    written, so that a stopped command, given again, trains those only that are missing. Results that say that they are
    of another set, or by other settings, are replaced only when ``settings.overwrite`` says so.
    """
    settings, synthetic = _read_set(settings)
    out = Path(settings.out or Path(str(settings.synthetic or settings.data_dir)).with_suffix(".evaluation.json"))
    if out.is_dir():
        raise InputError(f"out: {out} is a folder; name a file")
    ranks.on_main(lambda: refuse_unwritable(out.parent))
    lock = only_writer(out.with_name(f".{out.name}.lock"), f"{out}")
    with lock if ranks.is_main else contextlib.nullcontext():
        return _evaluate(settings, synthetic, out, bench or set_up(settings, ranks))


def _evaluate(settings: EvaluationSettings, synthetic: SyntheticSet, out: Path, bench: Workbench) -> dict:
    ranks = bench.ranks
    _refuse_other_data(synthetic, bench)
    pool = networks.evaluation_pool(settings.eval_mode, settings.model)
    bench.refuse_unfit(pool)
    sets: dict[str, TrainingSets] = {
        "synthetic": lambda j: (synthetic.images.to(bench.device), synthetic.probabilities().to(bench.device))
    }
    experts = None
    if "soft" in settings.baseline_kinds and settings.buffer_path is not None:
        experts = bench.labellers(str(settings.buffer_path), settings.model)
    sets |= dict(_baselines(settings, bench, synthetic.ipc, experts))
    _refuse_other("preprocessing", synthetic, bench.preprocessing.identity)
    about = _about(settings, synthetic, bench, experts)
    if not settings.overwrite:
        ranks.on_main(lambda: _refuse_other_results(out, about))
    sets = _drawable(sets, ranks)
    protocol = bench.protocol(settings, len(synthetic.images), len(sets))

    @functools.lru_cache(maxsize=protocol.together)  # these are wanted twice: for their digests, and to train on
    def draw(name: str, j: int) -> TrainingSet:
        return sets[name](j)

    cases = [(network, name, functools.partial(draw, name)) for network in pool for name in sets]
    lr = synthetic.lr.item()
    fixed = {
        "protocol": _plain(protocol, settings, pool),
        "lr": lr,
        "data": bench.data.identity,
        "preprocessing": bench.preprocessing.identity,
        "torch": torch.__version__,
        "device": bench.device.type,
        "tf32": settings.tf32,
    }
    finished = _Finished(out, fixed, cases, ranks=ranks, about=digest(about))
    known = finished.read(settings.num_eval)
    total = math.ceil((len(cases) * settings.num_eval - len(known)) / ranks.size)
    with progress_bar(ranks, total, "evaluating", "network") as bar:

        def progress(case: int, j: int, so_far: Accuracies) -> None:
            network, name, _ = cases[case]
            finished.keep(case, j, so_far.accuracies[-1])
            bar.set_postfix(set=name, network=network, accuracy=f"{100 * so_far.mean:.2f}%", refresh=False)
            bar.update()

        draws = [(network, training_set) for network, _, training_set in cases]
        found = bench.evaluation(protocol, lr).run(draws, settings.num_eval, progress=progress, known=known)
    results: dict = {
        "dataset": bench.data.name,
        "ipc": synthetic.ipc,
        "lr": lr,
        "epochs": settings.epoch_eval_train,
        "preprocessing": bench.preprocessing.kind,
        "seed": settings.seed,
        "results": [{"set": name, **each.as_dict()} for (_, name, _), each in zip(cases, found)],
        **about,
    }
    if ranks.is_main:
        write_text(out, json.dumps(results, indent=2, sort_keys=True) + "\n")
    ranks.barrier()
    finished.remove()
    ranks.barrier()  # before another process may write there
    if ranks.is_main:
        print(
            f"\n{bench.data.name}, {synthetic.ipc} images per class, accuracy on {len(bench.test_images)} test images"
        )
        print(_table(results["results"]))
        log.info("results are in %s", out)
    return results


def _table(rows: list[dict]) -> str:
    lines = [
        {
            "training set": row["set"],
            "network": row["network"],
            "accuracy %": f"{100 * row['mean']:.2f}",
            "std": f"{100 * row['std']:.2f}",
            "n": row["n"],
        }
        for row in rows
    ]
    return result_table(lines, list(lines[0]))


def _plain(protocol: Protocol, settings: EvaluationSettings, pool: Sequence[str]) -> dict:
    """How the networks of a pool are trained, as plain values."""
    drawn = [protocol.of(network).augmentation for network in pool]
    of_dc = sorted({augmentation.strategy for augmentation in drawn if isinstance(augmentation, DC)})
    plain = {name: value for name, value in vars(protocol).items() if name != "own"}
    return plain | {"augmentation": [settings.dsa, settings.dsa_strategy, settings.siamese, *of_dc]}


def _read_set(settings: EvaluationSettings) -> tuple[EvaluationSettings, SyntheticSet]:
    """The set to evaluate, and the settings, with what its file says of its data and network where none was given."""
    if not settings.synthetic:
        return settings, SyntheticSet.from_published(*(getattr(settings, name) for name in settings.trio))
    path = Path(settings.synthetic)
    if path.is_dir():  # of a run: the last set, since the best one was picked by test accuracy
        last = path / "synthetic_last.safetensors"
        path = last if last.exists() else path / "Normal" / last.name
        settings = dataclasses.replace(settings, synthetic=FilePath(str(path)))
    if path.suffix in (".pt", ".npz") or not path.exists():
        reason = "is a published file" if path.exists() else "does not exist"
        raise InputError(
            f"synthetic: {path} {reason}; published sets are given by --{', --'.join(settings.trio)}, "
            "or become such a file by scripts/import_set.py"
        )
    synthetic = SyntheticSet.load(str(settings.synthetic))
    made_with = synthetic.metadata.get("settings") or {}
    own = {name for name, field in settings.fields().items() if field.metadata["by_study"]} | settings.given
    wanted = [name for name in settings.names(DATA, MODEL, RECIPE) if name not in own]
    return settings.adopting({name: made_with[name] for name in wanted if name in made_with}), synthetic


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
    elsewhere = ("synthetic", *EvaluationSettings.trio)
    names = [name for name in settings.names(DATA, MODEL, RECIPE, SEED, DETAIL, REPORT) if name not in elsewhere]
    iteration = synthetic.metadata.get("iteration")
    tensors = synthetic.images, synthetic.labels, synthetic.lr
    return {
        "synthetic": {"digest": _digest_of(tensors)[:16]} | ({} if iteration is None else {"iteration": iteration}),
        "settings": {name: getattr(settings, name) for name in names},
        "data": dict(bench.data.identity),
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
    refuse_difference(out, there, here, there_is="these results", here_is="this command", remedy=remedy, every=True)


def _drawable(sets: dict[str, TrainingSets], ranks: Ranks) -> dict[str, TrainingSets]:
    """The sets that can be had, found before a network is trained; a line says of others why: weak experts."""

    def why_not(training_set: TrainingSets) -> str:
        try:
            training_set(0)
        except WeakExperts as error:
            return str(error)
        return ""

    reasons = {name: max(ranks.gather(why_not(training_set))) for name, training_set in sets.items()}
    for name, reason in reasons.items():
        if reason:
            log.warning("%s are left out: %s", name, reason)
    return {name: training_set for name, training_set in sets.items() if not reasons[name]}


def _baselines(
    settings: EvaluationSettings, bench: Workbench, ipc: int, experts: Experts | None
) -> Iterator[tuple[str, TrainingSets]]:
    """Real images of the same number, by name.

    Random ones, for each network another draw, with hard labels, and with soft ones as distillation starts from; with
    hard labels those that come first in difficulty rankings, the same for each network.
    """
    num_classes = bench.data.num_classes
    methods = [kind for kind in settings.baseline_kinds if kind not in ("hard", "soft")]
    if settings.baseline_kinds:
        refuse_small_classes(bench.labels, num_classes, ipc)

    def hard_labelled(chosen: Tensor) -> TrainingSet:
        chosen = chosen.to(bench.device)
        return bench.images[chosen], F.one_hot(bench.labels[chosen], num_classes).to(bench.images.dtype)

    if "hard" in settings.baseline_kinds:

        def hard(j: int) -> TrainingSet:
            rows = class_order(bench.labels, num_classes, ipc, settings.seed, "baseline", j)
            return hard_labelled(first_of_each_class(rows, ipc))

        yield "random real, hard labels", hard
    if "soft" in settings.baseline_kinds and experts is None:
        log.info("no --buffer_path: real images with the experts' soft labels are left out")
    if experts is not None:

        def soft(j: int) -> TrainingSet:
            images, logits = initial_set(
                "samples_predicted_correctly",
                bench.images,
                bench.labels,
                num_classes,
                ipc,
                experts,
                seed=settings.seed,
                stream=("baseline", j),
            )
            return images, logits.softmax(dim=1)

        yield "random real, expert labels", soft
    stems = bench.ranking_stems(settings, methods) if methods else []

    @functools.cache  # one training for all of them, when the first is asked for
    def rankings() -> dict:
        return bench.rankings(settings, stems, convert_flat=settings.convert_flat)

    def first(stem: str, j: int) -> TrainingSet:
        return hard_labelled(first_of_each_class(rankings()[stem].rows, ipc))

    for method, stem in zip(methods, stems):
        yield f"{method}, hard labels", functools.partial(first, stem)


class _Finished:
    """The accuracies of single networks, kept beside the results until these are written.

    Each process appends to a file of its own, a line for each network: its accuracy, under a key of all that it hangs
    on: the numbers it is trained on, how, its architecture and number, the test images.

    Args:
        fixed: of all that, what is the same for all networks, as plain values.
        cases: architecture, name of the training set, and the set for network j.
        about: digest of what the results are of. What was kept of others stays.
    """

    def __init__(self, out: Path, fixed: dict, cases: Sequence[tuple[str, str, Callable]], *, ranks: Ranks, about: str):
        self._start = out.with_name(f"{out.name}.networks-")
        self._own = out.with_name(f"{self._start.name}{ranks.rank}")
        self._fixed, self._cases, self._ranks, self._about = fixed, cases, ranks, about
        self._digests: dict[tuple[str, int], str] = {}
        self._begun = False

    def read(self, count: int) -> dict[tuple[int, int], float]:
        """Accuracies of networks (case, j), j below ``count``, that any of the processes finds."""
        kept: dict[str, float] = {}
        lines = (line for path in self._files() for line in _lines(path))
        for part in self._ranks.gather({line["key"]: line["accuracy"] for line in lines}):
            kept |= part
        known: dict[tuple[int, int], float] = {}
        for case in range(len(self._cases)) if kept else ():
            keys = {j: self._key(case, j) for j in range(count)}
            known |= {(case, j): kept[key] for j, key in keys.items() if key in kept}
        # Soft labels, which each process computes, may differ in their last bits between machines, and so the keys.
        known = {case: accuracy for part in self._ranks.gather(known) for case, accuracy in part.items()}
        if known:
            log.info("going on with %d networks that were trained before", len(known))
        return known

    def keep(self, case: int, j: int, accuracy: float) -> None:
        """Note a network's accuracy."""
        line = json.dumps({"key": self._key(case, j), "accuracy": accuracy, "about": self._about}) + "\n"
        append_line(self._own, line if self._begun else f"\n{line}")  # a kill may have cut the last line short
        self._begun = True

    def remove(self) -> None:
        """The results are written: there is nothing to go on with, but for those of other settings."""
        for path in self._files():
            others = [line for line in _lines(path) if line.get("about", self._about) != self._about]
            if others:
                write_text(path, "".join(json.dumps(line) + "\n" for line in others))
            else:
                path.unlink(missing_ok=True)

    def _files(self) -> list[Path]:
        folder, start = self._start.parent, self._start.name
        there = folder.iterdir() if folder.is_dir() else ()
        return [path for path in there if path.name.startswith(start) and path.name.removeprefix(start).isdigit()]

    def _key(self, case: int, j: int) -> str:
        network, name, training_set = self._cases[case]
        one = name, 0 if name == "synthetic" else j  # which is the same for every network
        if one not in self._digests:
            self._digests[one] = _digest_of(training_set(j))
        return digest({**self._fixed, "network": network, "index": j, "set": self._digests[one]}, 64)


def _lines(path: Path) -> Iterator[dict]:
    """Each whole line of a file of :class:`_Finished`, which another process may have removed."""
    data = b""
    with contextlib.suppress(FileNotFoundError):
        data = path.read_bytes()
    for line in data.splitlines():
        with contextlib.suppress(ValueError, KeyError, TypeError):
            entry = json.loads(line)
            if isinstance(entry["key"], str) and 0 <= entry["accuracy"] <= 1:
                yield entry


def _digest_of(tensors: Sequence[Tensor]) -> str:
    """Hexadecimal SHA-256 of the shapes and numbers of tensors."""
    numbers = hashlib.sha256()
    for tensor in tensors:
        numbers.update(f"{tuple(tensor.shape)}".encode())
        numbers.update(tensor.cpu().contiguous().numpy().data)
    return numbers.hexdigest()
