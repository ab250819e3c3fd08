"""Evaluating a training set: train fresh networks on it by the published protocol, test them on real images."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from functools import cache

import numpy as np
import torch
from torch import Tensor, nn

from pad.data.augment import Augmentation, augment
from pad.data.placement import Images, to_device
from pad.distributed import ALONE, Ranks
from pad.nn import networks
from pad.nn.flat import FlatModel, cross_entropy
from pad.nn.fused import forward_of
from pad.rng import generator

TrainingSet = tuple[Tensor, Tensor]  # images [N, C, H, W], target probabilities [N, K] (one-hot for hard labels)
TrainingSets = Callable[[int], TrainingSet]  # that of network j: the same for all, or another random one for each


@dataclass(frozen=True)
class Protocol:
    """How evaluation networks are trained (MTT, arXiv 2203.11932; the same in DATM and PAD).

    SGD with momentum 0.9 and weight decay 5e-4 over epochs 0..``epochs`` (so ``epochs`` + 1 of them); after epoch
    ``epochs // 2 + 1`` the learning rate is divided by ten and the momentum starts from zero.

    Args:
        augmentation: draws the augmentation of a batch.
        own: augmentations of networks, by name, that have another.
        seed: network j is drawn and trained from streams of (seed, network name, j), whatever it is trained on, so two
            training sets are compared on the same networks.
        compile: how derivatives are computed, as FlatModel takes it.
        together: how many networks are trained at once. They see what they would see alone, so their number changes
            rounding only.
    """

    augmentation: Augmentation
    _: KW_ONLY
    own: Mapping[str, Augmentation] = field(default_factory=dict)
    epochs: int = 1000
    batch_size: int = 256
    momentum: float = 0.9
    weight_decay: float = 5e-4
    seed: int = 0
    compile: str = "off"
    together: int = 1

    def of(self, network: str) -> "Protocol":
        """That of one architecture, by its augmentation."""
        return replace(self, augmentation=self.own.get(network, self.augmentation))

    def train(
        self,
        model: FlatModel,
        nets: Sequence[nn.Module],
        sets: Sequence[TrainingSet],
        lr: float,
        rngs: Sequence[torch.Generator],
    ) -> None:
        """Train networks of one architecture in place: each on a training set, all of one size, by its own stream.

        Args:
            model: their structure, which decides how. Compiled code and the CPU kernels work on flat parameters.
                BatchNorm's running statistics are no part of these, so networks that have them are trained as
                modules, one after the other; so are others where nothing is compiled, which is faster then.
        """
        if model.separable and (model.compile != "off" or len(nets) > 1):
            self._train_flat(model, nets, sets, lr, rngs)
        else:
            for net, training_set, rng in zip(nets, sets, rngs):
                self._train_module(net, training_set, lr, rng)

    def _train_flat(self, model: FlatModel, nets, sets, lr: float, rngs) -> None:
        """SGD as torch computes it, on the networks' flat parameters ``[J, P]``."""
        theta = torch.stack([model.flatten(net) for net in nets])
        velocity: Tensor | None = None
        for epoch in range(self.epochs + 1):
            passes = [self._batches(training_set, rng) for training_set, rng in zip(sets, rngs)]
            for batches in zip(*passes, strict=True):
                if len(nets) > 1:
                    g = model.grads(theta, *(torch.stack(parts) for parts in zip(*batches)))
                else:
                    g = model.grad(theta[0], *batches[0])[None]
                g = g.add(theta, alpha=self.weight_decay)
                velocity = g if velocity is None else velocity.mul_(self.momentum).add_(g)
                theta.sub_(velocity, alpha=lr)
            if epoch == self.epochs // 2 + 1:
                lr = 0.1 * lr
                velocity = None
        for net, row in zip(nets, theta):
            nn.utils.vector_to_parameters(row, net.parameters())

    def _train_module(self, net: nn.Module, training_set: TrainingSet, lr: float, rng: torch.Generator) -> None:
        def optimiser(lr: float) -> torch.optim.SGD:
            return torch.optim.SGD(net.parameters(), lr, momentum=self.momentum, weight_decay=self.weight_decay)

        net.train()
        sgd = optimiser(lr)
        for epoch in range(self.epochs + 1):
            for x, p in self._batches(training_set, rng):
                sgd.zero_grad()
                cross_entropy(net(x), p).backward()
                sgd.step()
            if epoch == self.epochs // 2 + 1:
                sgd = optimiser(0.1 * lr)

    def _batches(self, training_set: TrainingSet, rng: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """One epoch's batches, in a new order, augmented."""
        images, p = training_set
        order = to_device(torch.randperm(len(images), generator=rng), images.device)
        for batch in order.split(self.batch_size):
            yield augment(images[batch], self.augmentation.draw(len(batch), rng)), p[batch]


@torch.no_grad()
def accuracy(network: nn.Module, images: Images, labels: Tensor, batch: int = 512) -> float:
    """Share of ``images [N, C, H, W]`` that the network, in eval mode, classifies as ``labels [N]``; 0..1."""
    forward = forward_of(network.eval())
    right = sum((forward(x).argmax(dim=1) == y).sum() for x, y in zip(images.split(batch), labels.split(batch)))
    return right.item() / len(images)


@dataclass
class Accuracies:
    """Of networks of one architecture trained on one kind of training set, each in 0..1."""

    network: str
    accuracies: list[float] = field(default_factory=list)

    @property
    def n(self) -> int:
        return len(self.accuracies)

    @property
    def mean(self) -> float:
        return float(np.mean(self.accuracies))

    @property
    def std(self) -> float:
        """Population standard deviation, as the published tables give it."""
        return float(np.std(self.accuracies))

    def as_dict(self) -> dict:
        """For JSON."""
        return {"network": self.network, "mean": self.mean, "std": self.std, "n": self.n, "accuracies": self.accuracies}


@cache
def _flat_model(network: str, channels: int, num_classes: int, size: tuple[int, int], compile: str) -> FlatModel:
    """One for each architecture: all its networks, now and later in this process, run the same compiled code."""
    return FlatModel(networks.build(network, channels, num_classes, size, 0), compile)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Trains networks by a protocol, and tests them.

    Args:
        lr: learning rate.
        test_images, test_labels: real ones, ``[N, C, H, W]`` preprocessed and ``[N]``.
        ranks: share the networks.
    """

    protocol: Protocol
    lr: float
    test_images: Images
    test_labels: Tensor
    ranks: Ranks = ALONE

    def train(self, network: str, indices: Sequence[int], training_set: TrainingSets) -> Iterator[Accuracies]:
        """Train networks ``indices`` of one architecture in this process; yields what is known after each.

        Their training sets are of one size.
        """
        protocol = self.protocol.of(network)
        result = Accuracies(network)
        for first in range(0, len(indices), protocol.together):
            group = indices[first : first + protocol.together]
            sets = [training_set(j) for j in group]
            images, p = sets[0]
            height, width = images.shape[2:]
            shape = images.shape[1], p.shape[1], (height, width)
            nets = [networks.build(network, *shape, protocol.seed, "evaluation", j).to(images.device) for j in group]
            rngs = [generator(protocol.seed, "evaluation", network, j) for j in group]
            protocol.train(_flat_model(network, *shape, protocol.compile), nets, sets, self.lr, rngs)
            for net in nets:
                result.accuracies.append(accuracy(net, self.test_images, self.test_labels))
                yield result

    def run(
        self,
        cases: Sequence[tuple[str, TrainingSets]],
        num_eval: int,
        *,
        progress: Callable[[int, int, Accuracies], None] = lambda case, j, so_far: None,
        known: Mapping[tuple[int, int], float] = {},
    ) -> list[Accuracies]:
        """The accuracies of ``num_eval`` networks for each case, an architecture and its training sets, in order.

        The networks are dealt to the ranks; those that are trained together stay so, whatever the number of ranks, so
        that all of them get what one would. ``progress(case, j, what is known)`` is called after each network of this
        rank. ``known``: accuracies of networks (case, j), the same on all ranks, that need not be trained.
        """
        size = self.protocol.together
        together = [range(num_eval)[first : first + size] for first in range(0, num_eval, size)]
        groups = [(case, group) for case in range(len(cases)) for group in together]
        mine = self.ranks.deal([(case, group) for case, group in groups if any((case, j) not in known for j in group)])
        found: dict[tuple[int, int], float] = {}
        for case, (network, training_set) in enumerate(cases):
            indices = [j for c, group in mine if c == case for j in group]
            for so_far in self.train(network, indices, training_set):
                j = indices[so_far.n - 1]
                found[case, j] = so_far.accuracies[-1]
                progress(case, j, so_far)
        every = dict(known) | {key: value for part in self.ranks.gather(found) for key, value in part.items()}
        return [
            Accuracies(network, [every[case, j] for j in range(num_eval)]) for case, (network, _) in enumerate(cases)
        ]
