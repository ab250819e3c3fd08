"""Evaluating a training set: train fresh networks on it by a published protocol, test them on real images."""

import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from pad.data.augment import NoAugmentation
from pad.data.placement import Images
from pad.distributed import ALONE, Ranks
from pad.errors import InputError
from pad.nn import networks
from pad.nn.flat import FlatModel
from pad.nn.fused import forward_of
from pad.nn.replay import Replay, replay_on
from pad.protocols import Protocol, StateFile, TrainingSet
from pad.rng import generator

TrainingSets = Callable[[int], TrainingSet]  # that of network j: the same for all, or another random one for each


@torch.no_grad()
def accuracy(network: nn.Module, images: Images, labels: Tensor, batch: int = 512) -> float:
    """Share of ``images [N, C, H, W]`` that the network, in eval mode, classifies as ``labels [N]``; 0..1."""
    forward = forward_of(network.eval())
    right = sum((forward(x).argmax(dim=1) == y).sum() for x, y in zip(images.split(batch), labels.split(batch)))
    return right.item() / len(images)


@dataclass(frozen=True)
class Score:
    """Of one network; accuracies are in 0..1.

    accuracy: the one that counts, on the test images: after the last epoch, or the best check's where the protocol says
    so. last: that after the last epoch. train: after it, on its own training set without augmentation, in eval mode;
    right is the most probable class. None where it is not known.
    """

    accuracy: float
    last: float
    train: float | None


@dataclass(frozen=True, kw_only=True)
class Case:
    """Networks to train: of which architecture, on what, how.

    lr: learning rate. augmented: whether the protocol's augmentation is done. epochs: other than the protocol's.
    checkpoint: the file that the state of network j, while it is trained, is kept in, so that a long training goes on
    after a stop; of networks that are trained together, that of the first. Whoever keeps the result removes it.
    """

    network: str
    training_set: TrainingSets
    lr: float
    augmented: bool = True
    epochs: int | None = None
    checkpoint: Callable[[int], Path] | None = None


@dataclass
class Accuracies:
    """Of networks of one architecture trained on one kind of training set.

    best: whether the best check counts.
    """

    network: str
    scores: list[Score] = field(default_factory=list)
    best: bool = False

    @property
    def accuracies(self) -> list[float]:
        """What counts of each network, in 0..1."""
        return [score.accuracy for score in self.scores]

    @property
    def n(self) -> int:
        return len(self.scores)

    @property
    def mean(self) -> float:
        return float(np.mean(self.accuracies))

    @property
    def std(self) -> float:
        """Population standard deviation, as the published tables give it."""
        return float(np.std(self.accuracies))

    @property
    def se(self) -> float:
        """Standard error of the mean, from the sample standard deviation; NaN for one network."""
        return float(np.std(self.accuracies, ddof=1) / math.sqrt(self.n)) if self.n > 1 else math.nan

    @property
    def last(self) -> "Accuracies":
        """Those after the last epoch."""
        return Accuracies(self.network, [replace(score, accuracy=score.last) for score in self.scores])

    @property
    def train(self) -> float | None:
        """Mean accuracy on the networks' own training sets; None where it is not known of all of them."""
        known = [score.train for score in self.scores if score.train is not None]
        return float(np.mean(known)) if len(known) == self.n else None

    def as_dict(self) -> dict:
        """For JSON."""
        return {
            "network": self.network,
            **self._moments(),
            "n": self.n,
            "accuracies": self.accuracies,
            "train": self.train,
        } | ({"last": self.last._moments()} if self.best else {})

    def _moments(self) -> dict:
        return {"mean": self.mean, "std": self.std, "se": self.se if self.n > 1 else None}


@cache
def _workplace(
    network: str, channels: int, num_classes: int, *, size: tuple[int, int], compile: str, device: torch.device
) -> tuple[FlatModel | None, Replay]:
    """One for each architecture: all its networks, now and later in this process, run the same compiled code.

    A network that is no function of flat parameters, with dropout for example, has no FlatModel.
    """
    net = networks.build(network, channels, num_classes, size, 0).to(device)
    try:
        return FlatModel(net, compile), replay_on(device)
    except InputError:
        return None, replay_on(device)


def _sizes(training_set: TrainingSet) -> tuple[tuple[int, int], tuple[int, int], torch.device]:
    """Channels and classes, height and width; and where the images are."""
    images, p = training_set
    height, width = images.shape[2:]
    return (images.shape[1], p.shape[1]), (height, width), images.device


def _some_of(training_set: TrainingSet) -> list[int]:
    """Tells training sets apart: checksums of the targets and of up to 64 images, of however many there are."""
    images, p = training_set
    some = images[:: math.ceil(len(images) / 64)] if isinstance(images, Tensor) else images[:64]
    return [zlib.crc32(tensor.cpu().contiguous().numpy().data) for tensor in (p, some)]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Trains networks by a protocol, and tests them.

    Args:
        test_images, test_labels: real ones, ``[N, C, H, W]`` preprocessed and ``[N]``.
        ranks: share the networks.
    """

    protocol: Protocol
    test_images: Images
    test_labels: Tensor
    ranks: Ranks = ALONE

    def train(self, case: Case, indices: Sequence[int]) -> Iterator[Accuracies]:
        """Train networks ``indices`` of a case in this process; yields what is known after each.

        Their training sets are of one size.
        """
        protocol = self.protocol.of(case.network)
        if case.epochs is not None:
            protocol = replace(protocol, epochs=case.epochs)
        if not case.augmented:
            protocol = replace(protocol, augmentation=NoAugmentation(), cutmix=0.0)
        network, result = case.network, Accuracies(case.network, best=protocol.check_every is not None)
        todo = list(indices)
        while todo:
            first = case.training_set(todo[0])
            shape, size, device = _sizes(first)
            model, replay = _workplace(network, *shape, size=size, compile=protocol.compile, device=device)
            group = todo[: protocol.together]
            if not protocol.on_flat(model, len(group)):
                del group[1:]
            del todo[: len(group)]
            sets = [first, *(case.training_set(j) for j in group[1:])]
            streams = [(protocol.seed, "evaluation", j) for j in group]
            nets = [networks.build(network, *shape, size, *stream).to(device) for stream in streams]
            rngs = [generator(protocol.seed, "evaluation", network, j) for j in group]
            state = None
            if case.checkpoint is not None:
                plain = {name: each for name, each in protocol.plain.items() if name not in ("compile", "together")}
                drawn = [type(protocol.augmentation).__name__, vars(protocol.augmentation)]
                about = [plain, drawn, network, group, case.lr, [_some_of(each) for each in sets]]
                state = StateFile(case.checkpoint(group[0]), about)
            checks = protocol.train(model, nets, sets, case.lr, rngs, replay=replay, test=self._tested, state=state)
            # All before the first is yielded: then what is kept of them need not be looked after any more.
            own = [accuracy(net, images, p.argmax(dim=1)) for net, (images, p) in zip(nets, sets)]
            for found, train in zip(checks, own):
                result.scores.append(Score(max(found), found[-1], train))
                yield result

    def _tested(self, net: nn.Module) -> float:
        return accuracy(net, self.test_images, self.test_labels)

    def _together(self, case: Case, j: int) -> bool:
        """Whether a case's networks, j one of them, are trained together."""
        shape, size, device = _sizes(case.training_set(j))
        model, _ = _workplace(case.network, *shape, size=size, compile=self.protocol.compile, device=device)
        return self.protocol.on_flat(model, self.protocol.together)

    def run(
        self,
        cases: Sequence[Case],
        num_eval: int,
        *,
        progress: Callable[[int, int, Accuracies], None] = lambda case, j, so_far: None,
        known: Mapping[tuple[int, int], Score] = {},
    ) -> list[Accuracies]:
        """The accuracies of ``num_eval`` networks for each case, in order.

        The networks are dealt to the ranks; those that are trained together stay so, whatever the number of ranks, so
        that all of them get what one would. ``progress(case, j, what is known)`` is called after each network of this
        rank. ``known``: scores of networks (case, j), the same on all ranks, that need not be trained; they are only
        with others that they are trained together with.
        """
        size = self.protocol.together
        together = [range(num_eval)[first : first + size] for first in range(0, num_eval, size)]
        groups = [(case, group) for case in range(len(cases)) for group in together]
        mine = self.ranks.deal([(case, group) for case, group in groups if any((case, j) not in known for j in group)])
        found: dict[tuple[int, int], Score] = {}
        for at, case in enumerate(cases):
            indices = [j for c, group in mine if c == at for j in group]
            wanted = [j for j in indices if (at, j) not in known]
            if len(wanted) < len(indices) and not self._together(case, wanted[0]):
                indices = wanted
            for so_far in self.train(case, indices):
                j = indices[so_far.n - 1]
                found[at, j] = so_far.scores[-1]
                progress(at, j, so_far)
        every = dict(known) | {key: score for part in self.ranks.gather(found) for key, score in part.items()}
        best = self.protocol.check_every is not None
        return [
            Accuracies(case.network, [every[at, j] for j in range(num_eval)], best) for at, case in enumerate(cases)
        ]
