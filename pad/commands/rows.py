"""The rows of an evaluation's table: the set, and what it has to beat; each a training set for every network."""

import functools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pad.commands.bench import Workbench
from pad.data.formation import coarsened
from pad.data.placement import Images, place
from pad.difficulty.ranking import Ranking, first_of_each_class
from pad.errors import InputError
from pad.evaluation import TrainingSet, TrainingSets
from pad.initialisation import Experts, averaged_logits, class_order, predicted_correctly
from pad.labels import per_class
from pad.metrics import NEEDS
from pad.rng import generator
from pad.shares import exact_share
from pad.store.identity import digest
from pad.synthetic import SyntheticSet

TITLES = {
    "syn": "synthetic",
    "syn_hard": "synthetic, hard labels",
    "random": "random real, hard labels",
    "random_soft": "random real, expert labels",
    "full": "whole training set",
    "syn_plain": "synthetic, no augmentation",
    "random_plain": "random real, no augmentation",
}
ALSO = {"hard": "random", "soft": "random_soft", "synthetic": "syn"}  # how baselines and files call them


@dataclass(frozen=True, kw_only=True)
class Row:
    """One of the table: ``sets(j)`` is what network j is trained on.

    one: the same for all networks. whole: all training images, whatever ``sets`` has to do for them; ``about`` tells
    two such sets apart without looking at the numbers.
    """

    name: str
    sets: TrainingSets
    one: bool = False
    augmented: bool = True
    whole: bool = False
    about: str = ""

    @property
    def title(self) -> str:
        return TITLES.get(self.name, f"{self.name}, hard labels")


def row_names(asked: Sequence[str], *, hard: bool, experts: bool) -> list[str]:
    """The rows that words ask for, "syn" first, each once; others than in :data:`TITLES` are difficulty methods.

    ``all``: whatever the four scores need. ``hard``: whether the set's labels are. ``experts``: whether there are any.
    """
    every = ["syn", *["syn_hard"] * (not hard), "random", *["random_soft"] * (experts or not hard)]
    every += ["full", "syn_plain", "random_plain"]
    expanded = (every if word == "all" else [ALSO.get(word, word)] for word in asked)
    names = dict.fromkeys(["syn", *(name for names in expanded for name in names)])
    return [name for name in names if not (hard and name == "syn_hard")]  # it would be syn again


def roles(hard: bool) -> dict[str, str]:
    """The row that gives each accuracy in :data:`pad.metrics.NEEDS`, by whether the set's labels are hard."""
    same = {name: name for needs in NEEDS.values() for name in needs}
    return same | ({"syn_hard": "syn"} if hard else {"random": "random_soft"})


def needed(metric: str, hard: bool) -> list[str]:
    """The rows that a score is made of."""
    return [roles(hard)[need] for need in NEEDS[metric]]


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Makes rows of a set, and of as many real images of each class, which are as coarse as its multi-formation.

    Args:
        experts: to label with, where rows ask for them.
        rankings: by row's name, obtained when the first is asked for.
        left: indices of the training images that real ones are taken from; None: all.
    """

    bench: Workbench
    synthetic: SyntheticSet
    seed: int
    experts: Experts | None
    rankings: Callable[[], dict[str, Ranking]]
    left: Tensor | None = None

    @functools.cached_property
    def _may(self) -> Tensor | None:
        if self.left is None:
            return None
        may = torch.zeros(len(self.bench.data.train_labels), dtype=torch.bool)
        may[self.left] = True
        return may

    def make(self, name: str) -> Row:
        """The row of that name."""
        synthetic = functools.partial(self._synthetic, hard=name == "syn_hard")
        soft = name == "random_soft" or (name == "random_plain" and not self.synthetic.is_hard)
        if name in ("syn", "syn_hard", "syn_plain"):
            return Row(name=name, sets=synthetic, one=True, augmented=name != "syn_plain")
        if name in ("random", "random_soft", "random_plain"):
            return Row(name=name, sets=self._labelled if soft else self._random, augmented=name != "random_plain")
        if name == "full":
            identity = [self.bench.data.identity, None if self.left is None else digest(self.left.tolist())]
            return Row(name=name, sets=lambda j: self._everything, one=True, whole=True, about=digest(identity))
        return Row(name=name, sets=functools.partial(self._first, name), one=True)

    def _synthetic(self, j: int, *, hard: bool) -> TrainingSet:
        synthetic, device = self.synthetic, self.bench.device
        p = F.one_hot(synthetic.classes, synthetic.num_classes).float() if hard else synthetic.probabilities()
        return synthetic.images.to(device), p.to(device)

    @functools.cached_property
    def _everything(self) -> tuple[Images, Tensor]:
        bench = self.bench
        if self.left is None:
            return bench.images, self._one_hot(bench.labels)
        images = place(bench.data.train_images[self.left], bench.preprocessing, bench.images_on)
        return images, self._one_hot(bench.data.train_labels[self.left].to(bench.device))

    def _random(self, j: int) -> TrainingSet:
        """Another draw for each network."""
        return self._hard_labelled(self._taken(self._drawn(j)))

    def _labelled(self, j: int) -> TrainingSet:
        """As distillation starts from. Raises WeakExperts."""
        bench, experts = self.bench, self.experts
        assert experts is not None, "rows of soft labels ask for experts"
        how_many = self.synthetic.counts, self.synthetic.factor
        chosen = predicted_correctly(experts, bench.images, self._drawn(j), *how_many).to(bench.device)
        images, classes = self._images(chosen), bench.labels[chosen]
        return images, averaged_logits(experts, images, classes).softmax(dim=1)

    def _first(self, name: str, j: int) -> TrainingSet:
        """Of a ranking."""
        return self._hard_labelled(self._taken(self._allowed(self.rankings()[name].rows)))

    def _drawn(self, j: int) -> list[Tensor]:
        bench, counts = self.bench, self.synthetic.counts
        return self._allowed(class_order(bench.labels, bench.data.num_classes, counts, self.seed, "baseline", j))

    def _allowed(self, rows: Sequence[Tensor]) -> list[Tensor]:
        return list(rows) if self._may is None else [row[self._may[row]] for row in rows]

    def _taken(self, rows: Sequence[Tensor]) -> Tensor:
        return first_of_each_class(rows, self.synthetic.counts)

    def _hard_labelled(self, chosen: Tensor) -> TrainingSet:
        chosen = chosen.to(self.bench.device)
        return self._images(chosen), self._one_hot(self.bench.labels[chosen])

    def _images(self, chosen: Tensor) -> Tensor:
        return coarsened(self.bench.images[chosen], self.synthetic.factor)

    def _one_hot(self, classes: Tensor) -> Tensor:
        return F.one_hot(classes, self.bench.data.num_classes).to(self.bench.images.dtype)


def held_out(classes: Sequence[Tensor], share: float, seed: int, ipc: int | Sequence[int]) -> tuple[Tensor, Tensor]:
    """Training images that no row is taken from while learning rates are tried on them, and the others.

    Args:
        classes: for each class the indices of its images.
        share: of each class, drawn at random.
        ipc: how many must be left of each.

    Raises InputError where a class would have none to try on, or too few that are left.
    """
    parts = []
    for c, (members, wanted) in enumerate(zip(classes, per_class(ipc, len(classes)))):
        count = int(exact_share(share) * len(members))
        if not count:
            raise InputError(f"held_out: {share:g} of the {len(members)} images of class {c} are none")
        if len(members) - count < wanted:
            rest = f"{len(members) - count} images of class {c}"
            raise InputError(f"held_out: {share:g} leaves {rest}, and ipc is {wanted}")
        order = members[torch.randperm(len(members), generator=generator(seed, "held out", c))]
        parts.append((order[:count], order[count:]))
    held, left = zip(*parts)
    return torch.cat(held).sort().values, torch.cat(left).sort().values


def missing_for(metrics: Collection[str], names: Collection[str], hard: bool) -> str:
    """Which row is not there of those that the scores need; empty where all are."""
    absent = {metric: [row for row in needed(metric, hard) if row not in names] for metric in metrics}
    return "; ".join(f"{metric} needs {', '.join(rows)}" for metric, rows in absent.items() if rows)
