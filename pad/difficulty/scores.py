"""Per-image difficulty from short training runs: GraNd and EL2N (arXiv 2107.07075). Low is easy.

A few networks are trained once and serve every method asked for: a method turns what a trained network says about a
batch into one number per image, and the numbers are averaged over the networks.
"""

import difflib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pad.data.augment import DSA, DSA_STRATEGY, NoAugmentation, augment
from pad.data.placement import Images, batches, to_device
from pad.distributed import ALONE, Ranks
from pad.errors import InputError
from pad.networks import Network, build
from pad.rng import generator


@dataclass(frozen=True)
class ScoringSettings:
    """How the networks are trained that score images. Raises InputError for a value out of range.

    The defaults are DeepCore's for selection (arXiv 2204.08499): ten networks of 40 epochs, SGD with Nesterov momentum,
    a constant learning rate, no augmentation. Ours alone: networks and preprocessing are this toolkit's, and scores are
    exact gradient norms, where DeepCore feeds softmax outputs to a cross-entropy that applies softmax again.
    The paper that proposed the scores augments and takes them early (epochs of 10 to 20).

    Args:
        model: name of a network (:func:`pad.networks.build`).
        repeats: how many independently initialised networks are averaged.
        epochs: epochs each is trained for; 0 scores networks as initialised.
        lr, momentum, weight_decay, batch: of SGD; momentum is Nesterov's.
        augmentation: "none", or a DSA strategy such as "crop_flip": per batch one of its transformations.
    """

    model: str
    repeats: int = 10
    epochs: int = 40
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    batch: int = 256
    augmentation: str = "none"

    def __post_init__(self):
        def need(name: str, valid: bool, what: str) -> None:
            if not valid:
                raise InputError(f"scoring: {name} is {getattr(self, name)!r}; it must be {what}")

        need("repeats", self.repeats >= 1, "1 or more")
        need("epochs", self.epochs >= 0, "0 or more")
        need("lr", 0 < self.lr < math.inf, "a positive number")
        need("momentum", 0 <= self.momentum < 1, "at least 0 and below 1")
        need("weight_decay", 0 <= self.weight_decay < math.inf, "0 or a positive number")
        need("batch", self.batch >= 1, "1 or more")
        kinds = DSA_STRATEGY.split("_")
        known = self.augmentation == "none" or set(self.augmentation.split("_")) <= set(kinds)
        need("augmentation", known, f"none, or names joined by _ out of {', '.join(kinds)}")


# ------------------------------------------------------------------------------------------------- the formulas


def el2n(logits: Tensor, labels: Tensor) -> Tensor:
    """EL2N, the length of the error vector p - y (arXiv 2107.07075, section 2.2).

    logits ``[B, K]``, labels ``[B]`` int64 -> ``[B]`` float64 in [0, sqrt(2)]; p is the softmax, y the one-hot label.
    """
    # 1 - p_y is the sum of the other probabilities; a difference would round the easiest images to the same zero
    wrong = logits.double().softmax(dim=1).scatter(1, labels[:, None], 0.0)
    return (wrong.square().sum(dim=1) + wrong.sum(dim=1).square()).sqrt()


def grand(logits: Tensor, features: Tensor, labels: Tensor) -> Tensor:
    """GraNd of the last linear layer: the norm of each image's cross-entropy gradient in its weight and bias.

    That gradient is (p - y) h^T and p - y for an input h, so its norm is ||p - y|| sqrt(1 + ||h||^2) (arXiv 2107.07075,
    section 2.1). logits ``[B, K]``, features h ``[B, D]``, labels ``[B]`` int64 -> ``[B]`` float64, at least 0.
    """
    return el2n(logits, labels) * (1 + features.double().square().sum(dim=1)).sqrt()


# (logits, features, labels) of a batch -> [B] float64, low = easy
METHODS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "GraNd": grand,
    "EL2N": lambda logits, features, labels: el2n(logits, labels),
}


def nearest_method(name: str) -> str:
    """The method whose name is most like ``name``."""
    lowered = {method.lower(): method for method in METHODS}
    return lowered[difflib.get_close_matches(name.lower(), lowered, n=1, cutoff=0)[0]]


# --------------------------------------------------------------------------------------------- training, scoring


def train_scoring_network(
    images: Images,
    labels: Tensor,
    num_classes: int,
    settings: ScoringSettings,
    seed: int,
    repeat: int,
    progress: Callable[[int, int], None] | None = None,
) -> Network:
    """Network number ``repeat``, trained on everything and in eval mode; it depends on (seed, repeat) only.

    images ``[N, C, H, W]`` float32, preprocessed, and labels ``[N]`` int64 lie on the device that trains.
    ``progress(repeat, epoch)`` is called after each epoch. Raises InputError as :func:`pad.networks.build` does.
    """
    channels, height, width = images.shape[1:]
    # The module itself, not its flat form: what scores is eval mode, which needs BatchNorm's running statistics
    network = build(settings.model, channels, num_classes, (height, width), seed, "score", repeat).to(images.device)
    optimiser = torch.optim.SGD(
        network.parameters(),
        lr=settings.lr,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        nesterov=settings.momentum > 0,
    )
    augmentation = NoAugmentation() if settings.augmentation == "none" else DSA(settings.augmentation)
    for epoch in range(settings.epochs):
        rng = generator(seed, "score", repeat, epoch)
        order = torch.randperm(len(images), generator=rng)
        targets = labels[to_device(order, labels.device)].split(settings.batch)
        for x, y in zip(batches(images, order, settings.batch), targets):
            x = augment(x, augmentation.draw(len(x), rng))
            optimiser.zero_grad()
            F.cross_entropy(network(x), y).backward()
            optimiser.step()
        if progress is not None:
            progress(repeat, epoch)
    return network.eval()


@torch.no_grad()
def score_network(
    methods: Sequence[str], network: Network, images: Images, labels: Tensor, batch: int = 512
) -> dict[str, Tensor]:
    """The scores that one trained network gives, ``[N]`` float64 on the CPU per method, all from one forward pass.

    The network must be in eval mode; then ``batch`` changes speed and memory only.
    """
    scores: dict[str, list[Tensor]] = {method: [] for method in methods}
    for x, y in zip(images.split(batch), labels.split(batch)):
        features = network.features(x)
        logits = network.classifier(features)
        for method in methods:
            scores[method].append(METHODS[method](logits, features, y))
    return {method: torch.cat(parts).cpu() for method, parts in scores.items()}


def score(
    methods: Sequence[str],
    images: Images,
    labels: Tensor,
    num_classes: int,
    settings: ScoringSettings,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
    ranks: Ranks = ALONE,
) -> dict[str, Tensor]:
    """Difficulty of every image, ``[N]`` float64 on the CPU for each of ``methods``; low is easy.

    images ``[N, C, H, W]`` float32, preprocessed, and labels ``[N]`` int64 on one device. The methods share the
    training of ``settings.repeats`` networks; ``progress(repeat, epoch)`` is called after each epoch of each.
    Networks are dealt to ``ranks``, which all get the same result as one would.
    Raises InputError for an unknown method or model, and when a network diverges.
    """
    for method in methods:
        if method not in METHODS:
            raise InputError(f"there is no difficulty score {method!r}; the nearest name is {nearest_method(method)}")
    per_network = {method: torch.zeros(settings.repeats, len(images), dtype=torch.float64) for method in methods}
    for repeat in ranks.deal(range(settings.repeats)):
        network = train_scoring_network(images, labels, num_classes, settings, seed, repeat, progress)
        for method, values in score_network(methods, network, images, labels).items():
            if not values.isfinite().all():
                raise InputError(
                    f"the {method} of scoring network {repeat} ({settings.model}) is not finite: training diverged, "
                    f"a learning rate below {settings.lr:g} may help"
                )
            per_network[method][repeat] = values
    ranks.all_reduce_(*per_network.values())  # each row is of one rank, and zero for the others
    return {method: values.mean(dim=0) for method, values in per_network.items()}
