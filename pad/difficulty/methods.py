"""Every difficulty method by name, and the rankings of several at once from one training.

A method is a *score*, a number per image of which low is easy, averaged over several networks; or an *order*, that in
which a greedy selection takes the images of a class, by the first of these networks. What a network is trained for is
shared by all that are asked for, so that they cost little more than the dearest of them.
"""

import contextlib
import json
import logging
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from pad.data.images import ImageData
from pad.data.placement import Images
from pad.difficulty import orderings
from pad.difficulty import scores as formulas
from pad.difficulty.evidence import Evidence, collect_evidence
from pad.difficulty.ranking import Ranking, by_class
from pad.difficulty.training import Progress, ScoringSettings, ScoringTraining
from pad.distributed import ALONE, Ranks
from pad.errors import InputError
from pad.nn.networks import AnyNetwork, refuse_without_features
from pad.rng import generator
from pad.store.identity import digest, nearest
from pad.store.tensors import TensorFile, open_tensors, save_tensors

log = logging.getLogger("pad")

Needs = Literal["nothing", "evidence", "network", "training"]

_EVIDENCE = {"features", "logits"}  # what is kept of a network beside scores


@dataclass(frozen=True)
class Method:
    """A way to rank the images of each class. To have one of your own, put it into ``METHODS``, from any module::

        METHODS["Mine"] = Method(kind="score", summary="small logits", needs="evidence", compute=mine)

    Raises ValueError for an order that needs the network or the training, and for a score that needs nothing.

    Attributes:
        summary: what comes first, in a line.
        needs: what ``compute`` takes, and so what has to be done for it:

            * "evidence", a score: ``compute(evidence)`` of one class -> ``[n]``, finite, low is easy;
            * "evidence", an order: ``compute(evidence, rng)`` of one class, with a ``torch.Generator`` of its own ->
              positions 0..n-1 in order of selection, ``[n]`` int64; or InputError for a class that it cannot order;
            * "nothing", an order: the same, but only the number and the labels of the images are known;
            * "network", a score: ``compute(network, images, labels)`` of a batch, the network in eval mode -> ``[B]``;
            * "training", a score: ``compute(labels)`` of all images -> an observer of :meth:`ScoringTraining.train`,
              whose ``scores(epochs)`` are ``[N]`` afterwards.
    """

    kind: Literal["score", "order"]
    summary: str
    compute: Callable[..., Any]
    needs: Needs = "evidence"

    def __post_init__(self):
        of_kind = {"score": ("evidence", "network", "training"), "order": ("nothing", "evidence")}
        if self.needs not in of_kind[self.kind]:
            raise ValueError(f"a difficulty method of kind {self.kind} cannot need {self.needs}")


METHODS: dict[str, Method] = {
    "GraNd": Method(
        "score", "small gradient of the loss", lambda of: formulas.grand(of.logits, of.features, of.labels)
    ),
    "EL2N": Method("score", "small error", lambda of: formulas.el2n(of.logits, of.labels)),
    "Uncertainty-LeastConfidence": Method("score", "high confidence", lambda of: formulas.least_confidence(of.logits)),
    "Uncertainty-Entropy": Method("score", "low entropy of the prediction", lambda of: formulas.entropy(of.logits)),
    "Uncertainty-Margin": Method("score", "wide margin between two classes", lambda of: formulas.margin(of.logits)),
    "Forgetting": Method("score", "seldom forgotten in training", formulas.ForgettingEvents, "training"),
    "Loss": Method("score", "small loss all through training", formulas.TrainingLosses, "training"),
    "CAL": Method("score", "predicted as its neighbours are", lambda of: formulas.cal(of.features, of.logits)),
    "DeepFool": Method("score", "far from the decision boundary", formulas.deepfool, "network"),
    "Herding": Method("order", "those that keep the mean of the features", orderings.herding),
    "kCenterGreedy": Method("order", "those farthest from what is selected, in features", orderings.k_center_greedy),
    "ContextualDiversity": Method("order", "those predicted unlike what is selected", orderings.contextual_diversity),
    "Craig": Method("order", "those whose gradients stand for most others'", orderings.craig),
    "GradMatch": Method("order", "those whose gradients make up the class's", orderings.grad_match),
    "Glister": Method("order", "those that lower the loss on the class most", orderings.glister),
    "Submodular-FacilityLocation": Method("order", "those that most others resemble", orderings.facility_location),
    "Submodular-GraphCut": Method(
        "order", "those that resemble the class, but not what is selected", orderings.graph_cut
    ),
    "Submodular-LogDeterminant": Method("order", "those that span the most volume", orderings.log_determinant),
    "Uniform": Method("order", "any: a random order", orderings.uniform, "nothing"),
}


@dataclass(frozen=True, eq=False, kw_only=True)
class RankingSource:
    """What is ranked, and how: all that a ranking depends on beside its method.

    Attributes:
        data: the images as they come, on the CPU.
        images, labels: its preprocessed training images ``[N, C, H, W]`` float32 and labels ``[N]``, on the device.
        preprocessing: identity of what made ``images``, for the record.
        scoring, seed: how the scoring networks are trained.
    """

    data: ImageData
    images: Images
    labels: Tensor
    preprocessing: dict
    scoring: ScoringSettings
    seed: int

    @property
    def task(self) -> ScoringTraining:
        """The networks that score the images."""
        return ScoringTraining(self.images, self.labels, self.data.num_classes, self.scoring, self.seed)

    @property
    def about_network(self) -> dict:
        """What one of these networks depends on, beside its number: JSON-able."""
        settings = asdict(self.scoring)
        del settings["repeats"]
        made_of = {"data": self.data.identity, "preprocessing": self.preprocessing}
        return {"settings": settings, "seed": self.seed, **made_of}

    def recorded_settings(self, method: str) -> dict:
        """The settings that a ranking by ``method`` depends on, as its metadata has them; all, for an unknown one."""
        settings = {**asdict(self.scoring), "seed": self.seed, "preprocessing": self.preprocessing["kind"]}
        if method in METHODS and METHODS[method].kind == "order":
            del settings["repeats"]
            if METHODS[method].needs == "nothing":
                return {"seed": self.seed}
        return settings


# ----------------------------------------------------------------------------------------------- of one network


@dataclass(frozen=True, eq=False)
class Findings:
    """What was found out about N images: scores by method, ``[N]`` float64 on the CPU, and a network's evidence."""

    scores: dict[str, Tensor]
    evidence: Evidence | None = None


def score_network(
    methods: Sequence[str],
    network: AnyNetwork,
    images: Images,
    labels: Tensor,
    *,
    evidence: bool = False,
    batch: int = 512,
) -> Findings:
    """The scores by ``methods`` that a trained network gives, and its ``evidence`` if wanted.

    The network must be in eval mode; then ``batch`` changes speed and memory only. Methods that watch the training are
    not among ``methods``.
    """
    of_evidence = [name for name in methods if METHODS[name].needs == "evidence"]
    scores = {name: torch.empty(len(images), dtype=torch.float64) for name in of_evidence}
    seen = None
    if of_evidence or evidence:
        seen = collect_evidence(network, images, labels, batch)
        for c in labels.unique().tolist() if of_evidence else ():
            row = (labels == c).nonzero().flatten()
            of_class = seen.of(row).to(images.device)
            for name in of_evidence:
                scores[name][row.cpu()] = METHODS[name].compute(of_class).cpu()
    for name in methods:
        if METHODS[name].needs == "network":
            asked = zip(images.split(batch), labels.split(batch))
            scores[name] = torch.cat([METHODS[name].compute(network, x, y).detach() for x, y in asked]).cpu()
    return Findings(scores, seen if evidence else None)


def _consult(
    methods: Sequence[str], task: ScoringTraining, repeat: int, progress: Progress | None, evidence: bool
) -> Findings:
    """Train network number ``repeat``, and ask it. Raises InputError when what it says is not finite."""
    observers = {name: METHODS[name].compute(task.labels) for name in methods if METHODS[name].needs == "training"}
    network = task.train(repeat, progress, list(observers.values()))
    asked = [name for name in methods if name not in observers]
    found = score_network(asked, network, task.images, task.labels, evidence=evidence)
    watched = {name: observer.scores(task.settings.epochs).cpu() for name, observer in observers.items()}
    found = replace(found, scores=found.scores | watched)
    numbers: dict[str, Iterable[Tensor]] = {"weights": network.parameters()} | {
        f"{name} scores": [values] for name, values in found.scores.items()
    }
    if found.evidence is not None:
        numbers["features and logits"] = [found.evidence.features, found.evidence.logits]
    for what, tensors in numbers.items():
        if not all(tensor.isfinite().all() for tensor in tensors):
            raise InputError(
                f"training of scoring network {repeat} ({task.settings.model}) diverged, its {what} are not finite; "
                f"a learning rate below {task.settings.lr:g} may help"
            )
    return found


class Kept:
    """What finished networks said, a file for each in ``folder``, where that of other networks lies, too.

    methods: what the networks are asked for, whatever of it is in a file.
    """

    def __init__(self, folder: Path, source: RankingSource, methods: Iterable[str] = ()):
        self._folder = folder
        self._about = json.loads(json.dumps(source.about_network))  # as a file gives it back
        self._labels = source.labels.cpu()
        self._methods = {*methods}

    def _path(self, repeat: int) -> Path:
        return self._folder / f"network_{repeat:04d}-{digest(self._about, 8)}.safetensors"

    def _methods_of(self, file: TensorFile, path: Path) -> set[str]:
        """The methods that a file is kept for. Raises InputError where it is not of these networks."""
        if not self._about.items() <= file.metadata.items():
            raise InputError(f"{path} was kept with other settings, or of other images")
        return {*file.metadata.get("methods", file.layout.keys() - _EVIDENCE)}  # earlier versions did not say them

    def _read(self, repeat: int) -> tuple[Path, dict[str, Tensor], set[str]] | None:
        """The file of network ``repeat``, if there is one, what is in it, and for which methods it is kept."""
        path = self._path(repeat)
        if not path.is_file():
            path = self._folder / f"network_{repeat:04d}.safetensors"  # of earlier versions
        if not path.is_file():
            return None
        with open_tensors(path) as (file, _):
            methods = self._methods_of(file, path)
            return path, {name: file.tensor(name) for name in file.layout}, methods

    def load(self, repeat: int, methods: Sequence[str], evidence: bool) -> Findings | None:
        """What network ``repeat`` said, if all that is asked is there; warns where something else is."""
        try:
            if (found := self._read(repeat)) is None:
                return None
            path, tensors, _ = found
            if not tensors.keys() >= {*methods, *(_EVIDENCE if evidence else ())}:
                raise InputError(f"{path} was kept for other methods")
        except InputError as error:
            log.warning("difficulty: %s; the network is trained again", error)
            return None
        seen = Evidence(tensors["features"], tensors["logits"], self._labels) if evidence else None
        return Findings({name: tensors[name] for name in methods}, seen)

    def save(self, repeat: int, found: Findings) -> None:
        """Keep what network ``repeat`` said, beside what it said to other methods."""
        tensors: dict[str, Tensor] = {}
        methods: set[str] = set()
        with contextlib.suppress(InputError):  # said when it was to be loaded
            _, tensors, methods = self._read(repeat) or (None, tensors, methods)
        if found.evidence is not None:
            tensors |= {"features": found.evidence.features, "logits": found.evidence.logits}
        about = {**self._about, "repeat": repeat, "methods": sorted(methods | self._methods)}
        save_tensors(self._path(repeat), tensors | found.scores, about)

    def remove(self, done: Collection[str]) -> None:
        """Remove the files that are kept for no other methods than those that are ``done``, and an empty folder."""
        for path in self._folder.glob("network_*.safetensors"):
            with contextlib.suppress(InputError), open_tensors(path) as (file, _):
                if self._methods_of(file, path) <= {*done}:
                    path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self._folder.rmdir()


# --------------------------------------------------------------------------------------------------- of several


def score_images(
    methods: Sequence[str],
    task: ScoringTraining,
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
    *,
    evidence: bool = False,
    keep: Kept | None = None,
) -> Findings:
    """Scores by ``methods``, the mean of ``task.settings.repeats`` networks that they share; network 0's ``evidence``.

    Without methods, evidence is of a single network. ``progress(repeat, epoch)`` is called after each epoch of each
    network. Networks are dealt to ``ranks``, which all get the scores that one would; the evidence is rank 0's. Those
    that ``keep`` has are not trained. Raises InputError when a network diverges, and for a model or method that does
    not fit.
    """
    repeats = task.settings.repeats
    networks = range(repeats if methods else int(evidence))

    kept = {repeat: keep.load(repeat, methods, evidence and repeat == 0) for repeat in networks} if keep else {}
    there = ranks.gather([repeat for repeat, found in kept.items() if found is not None])
    if evidence and 0 not in there[0]:  # the first that is missing, so rank 0 trains it
        there = [[repeat for repeat in of_rank if repeat] for of_rank in there]
    missing = [repeat for repeat in networks if not any(repeat in of_rank for of_rank in there)]
    if len(missing) < len(networks):
        log.info("difficulty: going on after %d of %d networks", len(networks) - len(missing), len(networks))
    others = {repeat for of_rank in there[: ranks.rank] for repeat in of_rank}  # what these have, they give
    mine = [repeat for repeat in there[ranks.rank] if repeat not in others]

    per_network = {name: torch.zeros(repeats, len(task.images), dtype=torch.float64) for name in methods}
    seen = None
    for repeat in (*mine, *ranks.deal(missing)):
        found = kept[repeat] if repeat in mine else None
        if found is None:
            found = _consult(methods, task, repeat, progress, evidence and repeat == 0)
            if keep:
                keep.save(repeat, found)
        if found.evidence is not None:
            seen = found.evidence
        for name, values in found.scores.items():
            per_network[name][repeat] = values
    if methods:
        ranks.all_reduce_(*per_network.values())  # each row is of one rank, and zero for the others
    return Findings({name: values.mean(dim=0) for name, values in per_network.items()}, seen)


def compute_rankings(
    methods: Sequence[str],
    source: RankingSource,
    *,
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
    keep: Path | None = None,
) -> dict[str, Ranking]:
    """The rankings of ``source`` by ``methods``, from one training: each is what it would be alone.

    Args:
        progress: called as ``progress(repeat, epoch)`` after each epoch of each network.
        ranks: share the networks, and then the classes of orderings.
        keep: folder for what each finished network said. A run that was interrupted goes on after those it has; the
            caller removes them once the rankings are written (:meth:`Kept.remove`).

    A class of one image has one order. Raises InputError for an unknown method or model, a class without images, a
    network that diverges, and by an ordering that cannot do a class.
    """
    for name in methods:
        if name not in METHODS:
            raise InputError(f"there is no difficulty method {name!r}; the nearest name is {nearest(name, METHODS)}")
    if any(METHODS[name].needs == "evidence" for name in methods):
        refuse_without_features(source.task.network(0))
    data = source.data
    classes = by_class(torch.arange(len(data.train_labels)), data.train_labels, data.num_classes)
    scorers = [name for name in methods if METHODS[name].kind == "score"]
    orders = [name for name in methods if METHODS[name].kind == "order"]
    evidence = any(METHODS[name].needs == "evidence" for name in orders)
    kept = None if keep is None else Kept(keep, source, methods)
    found = score_images(scorers, source.task, progress, ranks, evidence=evidence, keep=kept)
    rows = _ordered(orders, classes, found.evidence, source, ranks)

    rankings = {}
    for name in methods:
        metadata = {
            "method": name,
            "ranked_by": METHODS[name].kind,
            "data": data.identity,
            "preprocessing": source.preprocessing,
            "settings": source.recorded_settings(name),
        }
        if name in rows:
            rankings[name] = Ranking(rows[name], None, metadata)
        else:
            rankings[name] = Ranking.from_scores(found.scores[name], data.train_labels, data.num_classes, metadata)
    return rankings


def _ordered(
    methods: Sequence[str], classes: list[Tensor], evidence: Evidence | None, source: RankingSource, ranks: Ranks
) -> dict[str, list[Tensor]]:
    """For each of ``methods`` the rows of its ranking, of ``classes`` as data-set indices; ``evidence`` is rank 0's."""
    if any(METHODS[name].needs == "evidence" for name in methods):
        evidence = ranks.on_main(lambda: evidence)
    mine: dict[tuple[str, int], Tensor] = {}
    for c in ranks.deal(range(len(classes))):
        n = len(classes[c])
        nothing = Evidence(torch.empty(n, 0), torch.empty(n, 0), torch.full((n,), c))
        of_class = nothing if evidence is None else evidence.of(classes[c]).to(source.images.device)
        for name in methods:
            given = nothing if METHODS[name].needs == "nothing" else of_class
            try:
                positions = METHODS[name].compute(given, generator(source.seed, "order", name, c)).cpu()
            except InputError as error:
                raise InputError(f"{name} cannot order class {c}: {error}") from None
            if not torch.equal(positions.sort().values, torch.arange(n)):
                raise RuntimeError(f"{name} did not select each of the {n} images of class {c} once")
            mine[name, c] = classes[c][positions]
    rows = {key: row for part in ranks.gather(mine) for key, row in part.items()}
    return {name: [rows[name, c] for c in range(len(classes))] for name in methods}
