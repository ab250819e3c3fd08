"""Every difficulty method by name, and the rankings of several at once from one training.

A method is a *score*, a number per image of which low is easy, averaged over several networks; or an *order*, that in
which a greedy selection takes the images of a class, by the first of these networks. What a network is trained for is
shared by all that are asked for, so that they cost little more than the dearest of them.
"""

from __future__ import annotations

import difflib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from pad.data.placement import Images
from pad.difficulty import scores as formulas
from pad.difficulty.evidence import Evidence, collect_evidence
from pad.difficulty.orderings import ORDERINGS
from pad.difficulty.ranking import Ranking, by_class
from pad.difficulty.training import ScoringSettings, ScoringTask
from pad.distributed import ALONE, Ranks
from pad.errors import InputError
from pad.nn.networks import Network
from pad.rng import generator
from pad.store.tensors import load_tensors, save_tensors

if TYPE_CHECKING:
    from pad.data.images import ImageData

log = logging.getLogger("pad")


@dataclass(frozen=True)
class Method:
    """A way to rank the images of each class.

    Attributes:
        kind: "score" or "order".
        summary: what comes first, in a line.
        needs: what ``compute`` takes, and so what has to be done for it.
            "evidence": an :class:`Evidence` of one class -> scores ``[n]``; for an order, and a generator -> positions
            ``[n]`` in order of selection. "nothing": the same, of which only the number of images is looked at.
            "network": a network, images and labels -> scores. "training": labels -> an observer of the training, whose
            ``scores(epochs)`` are ``[N]``.
    """

    name: str
    kind: Literal["score", "order"]
    summary: str
    needs: Literal["nothing", "evidence", "network", "training"]
    compute: Callable


def _score(name: str, summary: str, compute: Callable, needs: str = "evidence") -> Method:
    return Method(name, "score", summary, needs, compute)


def _order(name: str, summary: str, needs: str = "evidence") -> Method:
    return Method(name, "order", summary, needs, ORDERINGS[name])


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        _score("GraNd", "small gradient of the loss", lambda of: formulas.grand(of.logits, of.features, of.labels)),
        _score("EL2N", "small error", lambda of: formulas.el2n(of.logits, of.labels)),
        _score("Uncertainty-LeastConfidence", "high confidence", lambda of: formulas.least_confidence(of.logits)),
        _score("Uncertainty-Entropy", "low entropy of the prediction", lambda of: formulas.entropy(of.logits)),
        _score("Uncertainty-Margin", "wide margin between two classes", lambda of: formulas.margin(of.logits)),
        _score("Forgetting", "seldom forgotten in training", formulas.ForgettingEvents, "training"),
        _score("CAL", "predicted as its neighbours are", lambda of: formulas.cal(of.features, of.logits)),
        _score("DeepFool", "far from the decision boundary", formulas.deepfool, "network"),
        _order("Herding", "those that keep the mean of the features"),
        _order("kCenterGreedy", "those farthest from what is selected, in features"),
        _order("ContextualDiversity", "those predicted unlike what is selected"),
        _order("Craig", "those whose gradients stand for most others'"),
        _order("GradMatch", "those whose gradients make up the class's"),
        _order("Glister", "those that lower the loss on the class most"),
        _order("Submodular-FacilityLocation", "those that most others resemble"),
        _order("Submodular-GraphCut", "those that resemble the class, but not what is selected"),
        _order("Submodular-LogDeterminant", "those that span the most volume"),
        _order("Uniform", "any: a random order", "nothing"),
    )
}


def nearest_method(name: str) -> str:
    """The method whose name is most like ``name``."""
    lowered = {method.lower(): method for method in METHODS}
    return lowered[difflib.get_close_matches(name.lower(), lowered, n=1, cutoff=0)[0]]


def recorded_settings(name: str, settings: ScoringSettings, seed: int, preprocessing: dict) -> dict:
    """The settings that a ranking by method ``name`` depends on, as its metadata has them."""
    everything = {**asdict(settings), "seed": seed, "preprocessing": preprocessing["kind"]}
    method = METHODS.get(name)
    if method is None or method.kind == "score":
        return everything
    if method.needs == "nothing":
        return {"seed": seed}
    return {key: value for key, value in everything.items() if key != "repeats"}


# ----------------------------------------------------------------------------------------------- of one network


@dataclass(frozen=True, eq=False)
class Findings:
    """What was found out about N images: scores by method, ``[N]`` float64 on the CPU, and a network's evidence."""

    scores: dict[str, Tensor]
    evidence: Evidence | None = None


def score_network(
    methods: Sequence[str], network: Network, images: Images, labels: Tensor, evidence: bool = False, batch: int = 512
) -> Findings:
    """The scores by ``methods`` that a trained network gives, and its ``evidence`` if wanted.

    The network must be in eval mode; then ``batch`` changes speed and memory only. Methods that watch the training are
    not among ``methods``.
    """
    of_evidence = [name for name in methods if METHODS[name].needs == "evidence"]
    scores = {name: torch.empty(len(images), dtype=torch.float64) for name in of_evidence}
    seen = collect_evidence(network, images, labels, batch) if of_evidence or evidence else None
    for c in labels.unique().tolist() if of_evidence else ():
        row = (labels == c).nonzero().flatten()
        of_class = seen.of(row).to(images.device)
        for name in of_evidence:
            scores[name][row.cpu()] = METHODS[name].compute(of_class).cpu()
    for name in methods:
        if METHODS[name].needs == "network":
            asked = zip(images.split(batch), labels.split(batch))
            scores[name] = torch.cat([METHODS[name].compute(network, x, y) for x, y in asked]).cpu()
    return Findings(scores, seen if evidence else None)


def _consult(
    methods: Sequence[str], task: ScoringTask, repeat: int, progress: Callable[[int, int], None] | None, evidence: bool
) -> Findings:
    """Train network number ``repeat``, and ask it. Raises InputError when what it says is not finite."""
    observers = {name: METHODS[name].compute(task.labels) for name in methods if METHODS[name].needs == "training"}
    network = task.train(repeat, progress, list(observers.values()))
    asked = [name for name in methods if name not in observers]
    found = score_network(asked, network, task.images, task.labels, evidence)
    watched = {name: observer.scores(task.settings.epochs).cpu() for name, observer in observers.items()}
    found = replace(found, scores=found.scores | watched)
    numbers = {"weights": network.parameters()} | {f"{name} scores": [values] for name, values in found.scores.items()}
    if found.evidence is not None:
        numbers["features and logits"] = [found.evidence.features, found.evidence.logits]
    for what, tensors in numbers.items():
        if not all(tensor.isfinite().all() for tensor in tensors):
            raise InputError(
                f"training of scoring network {repeat} ({task.settings.model}) diverged, its {what} are not finite; "
                f"a learning rate below {task.settings.lr:g} may help"
            )
    return found


class _Kept:
    """What finished networks said, a file for each in ``folder``; nothing is kept if that is None.

    about: what a network depends on, beside its number. Files that are about something else are not used.
    """

    def __init__(self, folder: Path | None, about: dict, labels: Tensor):
        self._folder, self._labels = folder, labels
        self._about = json.loads(json.dumps(about))

    def _path(self, repeat: int) -> Path:
        return self._folder / f"network_{repeat:04d}.safetensors"

    def load(self, repeat: int, methods: Sequence[str], evidence: bool) -> Findings | None:
        """What network ``repeat`` said, if all that is asked is there; says so in a line where something else is."""
        if self._folder is None or not self._path(repeat).is_file():
            return None
        try:
            tensors, about = load_tensors(self._path(repeat))
        except InputError as error:
            log.warning("difficulty: %s; the network is trained again", error)
            return None
        if about != {**self._about, "repeat": repeat}:
            reason = "was kept with other settings, or of other images"
        elif not tensors.keys() >= {*methods, *(("features", "logits") if evidence else ())}:
            reason = "was kept for other methods"
        else:
            seen = Evidence(tensors["features"], tensors["logits"], self._labels.cpu()) if evidence else None
            return Findings({name: tensors[name] for name in methods}, seen)
        log.warning("difficulty: %s %s; the network is trained again", self._path(repeat), reason)
        return None

    def save(self, repeat: int, found: Findings) -> None:
        if self._folder is not None:
            seen = found.evidence
            tensors = {} if seen is None else {"features": seen.features, "logits": seen.logits}
            save_tensors(self._path(repeat), {**found.scores, **tensors}, {**self._about, "repeat": repeat})


# --------------------------------------------------------------------------------------------------- of several


def score_images(
    methods: Sequence[str],
    task: ScoringTask,
    progress: Callable[[int, int], None] | None = None,
    ranks: Ranks = ALONE,
    *,
    evidence: bool = False,
    keep: _Kept | None = None,
) -> Findings:
    """Scores by ``methods``, the mean over ``task.settings.repeats`` networks that they share; network 0's ``evidence``.

    Without methods, evidence is of a single network. ``progress(repeat, epoch)`` is called after each epoch of each network. Networks are dealt to
    ``ranks``, which all get the scores that one would; the evidence is rank 0's. Those that ``keep`` has are not trained.
    Raises InputError when a network diverges, and for a model or method that does not fit.
    """
    repeats, count = task.settings.repeats, len(task.images)
    if "Forgetting" in methods and task.settings.epochs == 0:
        raise InputError("Forgetting watches networks being trained, so it needs 1 epoch or more")
    keep = keep or _Kept(None, {}, task.labels)
    networks = range(repeats if methods else int(evidence))

    kept = {repeat: keep.load(repeat, methods, evidence and repeat == 0) for repeat in networks}
    there = ranks.gather([repeat for repeat in networks if kept[repeat] is not None])
    if evidence and 0 not in there[0]:  # the first that is missing, so rank 0 trains it
        there = [[repeat for repeat in of_rank if repeat] for of_rank in there]
    missing = [repeat for repeat in networks if not any(repeat in of_rank for of_rank in there)]
    if len(missing) < len(networks):
        log.info("difficulty: going on after %d of %d networks", len(networks) - len(missing), len(networks))
    others = {repeat for of_rank in there[: ranks.rank] for repeat in of_rank}  # what these have, they give
    mine = [repeat for repeat in there[ranks.rank] if repeat not in others]

    per_network = {name: torch.zeros(repeats, count, dtype=torch.float64) for name in methods}
    seen = None
    for repeat in (*mine, *ranks.deal(missing)):
        found = kept[repeat] if repeat in mine else None
        if found is None:
            wanted = evidence and repeat == 0
            found = _consult(methods, task, repeat, progress, wanted)
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
    data: ImageData,
    images: Images,
    labels: Tensor,
    settings: ScoringSettings,
    *,
    seed: int,
    preprocessing: dict,
    progress: Callable[[int, int], None] | None = None,
    ranks: Ranks = ALONE,
    keep: Path | None = None,
) -> dict[str, Ranking]:
    """The rankings of ``data`` by ``methods``, from one training: each is what it would be alone.

    Args:
        images, labels: preprocessed training images ``[N, C, H, W]`` float32 and labels ``[N]``, on the device to use.
        preprocessing: identity of what made ``images``, for the record.
        progress: called as ``progress(repeat, epoch)`` after each epoch of each network.
        ranks: share the networks, and then the classes of orderings.
        keep: folder for what each finished network said. A run that was interrupted goes on after those it has; the
            caller removes it once the rankings are written.

    A class of one image has one order. Raises InputError for an unknown method or model, a class without images, a
    network that diverges, and by an ordering that cannot do a class.
    """
    for name in methods:
        if name not in METHODS:
            raise InputError(f"there is no difficulty method {name!r}; the nearest name is {nearest_method(name)}")
    classes = by_class(torch.arange(len(data.train_labels)), data.train_labels, data.num_classes)
    scorers = [name for name in methods if METHODS[name].kind == "score"]
    orders = [name for name in methods if METHODS[name].kind == "order"]
    about = {
        "settings": {key: value for key, value in asdict(settings).items() if key != "repeats"},
        "seed": seed,
        "data": data.identity,
        "preprocessing": preprocessing,
    }
    evidence = any(METHODS[name].needs == "evidence" for name in orders)
    task = ScoringTask(images, labels, data.num_classes, settings, seed)
    found = score_images(scorers, task, progress, ranks, evidence=evidence, keep=_Kept(keep, about, labels))
    rows = _ordered(orders, classes, found.evidence, images.device, seed, ranks)

    rankings = {}
    for name in methods:
        metadata = {
            "method": name,
            "ranked_by": METHODS[name].kind,
            "data": data.identity,
            "preprocessing": preprocessing,
            "settings": recorded_settings(name, settings, seed, preprocessing),
        }
        if name in rows:
            rankings[name] = Ranking(rows[name], None, metadata)
        else:
            rankings[name] = Ranking.from_scores(found.scores[name], data.train_labels, data.num_classes, metadata)
    return rankings


def _ordered(
    methods: Sequence[str],
    classes: list[Tensor],
    evidence: Evidence | None,
    device: torch.device,
    seed: int,
    ranks: Ranks,
) -> dict[str, list[Tensor]]:
    """For each of ``methods`` the rows of its ranking, of ``classes`` as data-set indices; ``evidence`` is rank 0's."""
    if any(METHODS[name].needs == "evidence" for name in methods):
        evidence = ranks.on_main(lambda: evidence)
    mine: dict[tuple[str, int], Tensor] = {}
    for c in ranks.deal(range(len(classes))):
        n = len(classes[c])
        nothing = Evidence(torch.empty(n, 0), torch.empty(n, 0), torch.full((n,), c))
        of_class = nothing if evidence is None else evidence.of(classes[c]).to(device)
        for name in methods:
            given = nothing if METHODS[name].needs == "nothing" else of_class
            try:
                positions = METHODS[name].compute(given, generator(seed, "order", name, c)).cpu()
            except InputError as error:
                raise InputError(f"{name} cannot order class {c}: {error}") from None
            if not torch.equal(positions.sort().values, torch.arange(n)):
                raise RuntimeError(f"{name} did not select each of the {n} images of class {c} once")
            mine[name, c] = classes[c][positions]
    rows = {key: row for part in ranks.gather(mine) for key, row in part.items()}
    return {name: [rows[name, c] for c in range(len(classes))] for name in methods}
