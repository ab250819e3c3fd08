"""Evaluating a training set: train fresh networks on it by the published protocol, test them on real images."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from functools import cache

import numpy as np
import torch
from torch import Tensor, nn

from pad.data.augment import Augmentation, augment
from pad.data.placement import Images
from pad.distributed import ALONE, Ranks
from pad.nn import networks
from pad.nn.flat import FlatModel, cross_entropy
from pad.nn.foreign import flat_problem
from pad.nn.fused import forward_of
from pad.nn.replay import AT_ONCE, Replay, replay_on
from pad.nn.steps import Plan, Step, epoch_steps
from pad.rng import generator, seeded

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
        model: FlatModel | None,
        nets: Sequence[nn.Module],
        sets: Sequence[TrainingSet],
        lr: float,
        rngs: Sequence[torch.Generator],
        *,
        replay: Replay = AT_ONCE,
    ) -> None:
        """Train networks of one architecture in place: each on a training set, all of one size, by its own stream.

        Args:
            model: their structure, which decides how. Compiled code and the CPU kernels work on flat parameters.
                BatchNorm's running statistics are no part of these, so networks that have them are trained as
                modules, one after the other; so are others where nothing is compiled, which is faster then. None:
                of a network that is none of flat parameters, as one with dropout.
            replay: how steps on flat parameters are done.
        """
        if model is not None and model.separable and (model.compile != "off" or len(nets) > 1):
            self._train_flat(model, nets, sets, lr, rngs, replay=replay)
        else:
            for net, training_set, rng in zip(nets, sets, rngs):
                with seeded(rng.initial_seed(), "dropout", device=training_set[0].device):
                    self._train_module(net, training_set, lr, rng)

    def _train_flat(self, model: FlatModel, nets, sets, lr: float, rngs, *, replay: Replay) -> None:
        """SGD as torch computes it, on the networks' flat parameters ``[J, P]``."""
        theta = replay.hold("theta", torch.stack([model.flatten(net) for net in nets]))
        velocity = replay.buffer("velocity", theta).zero_()
        held = [[replay.hold(f"{what} {j}", each) for what, each in zip("xp", sets[j])] for j in range(len(nets))]
        rows = [replay.row(f"of network {j}") for j in range(len(nets))]

        for epoch in range(self.epochs + 1):
            passes = [self._steps(len(images), rng) for (images, _), rng in zip(sets, rngs)]
            plans = [Plan(steps, replay, theta.device, f"of network {j}") for j, steps in enumerate(passes)]
            for row in rows:
                row.start(0)
            for i, n in enumerate(len(step.indices) for step in passes[0]):
                xs = replay.buffer("xs", held[0][0], len(nets), n, *held[0][0].shape[1:])
                ps = replay.buffer("ps", held[0][1], len(nets), n, held[0][1].shape[1])
                for j, steps in enumerate(passes):  # by network: each draws its own kind of augmentation

                    def gather(i: int = i, j: int = j, xs: Tensor = xs, ps: Tensor = ps) -> None:
                        (images, p), step = held[j], plans[j].step(i, rows[j])
                        xs[j], ps[j] = augment(images[step.indices], step.draw), p[step.indices]
                        rows[j].move(1)

                    draw = steps[i].draw
                    way = AT_ONCE if draw and draw.on_host else replay
                    way.run(("batch", j, len(nets), len(sets[j][0]), plans[j].key(i)), gather)

                def descend(lr: float = lr, xs: Tensor = xs, ps: Tensor = ps) -> None:
                    g = model.grads(theta, xs, ps) if len(nets) > 1 else model.grad(theta[0], xs[0], ps[0])[None]
                    velocity.mul_(self.momentum).add_(g.add(theta, alpha=self.weight_decay))
                    theta.sub_(velocity, alpha=lr)

                replay.run(("descend", len(nets), n), descend, given=lr)
            if epoch == self.epochs // 2 + 1:
                lr = 0.1 * lr
                velocity.zero_()
        for net, row in zip(nets, theta):
            nn.utils.vector_to_parameters(row.clone(), net.parameters())

    def _train_module(self, net: nn.Module, training_set: TrainingSet, lr: float, rng: torch.Generator) -> None:
        def optimiser(lr: float) -> torch.optim.SGD:
            return torch.optim.SGD(net.parameters(), lr, momentum=self.momentum, weight_decay=self.weight_decay)

        net.train()
        images, p = training_set
        sgd = optimiser(lr)
        for epoch in range(self.epochs + 1):
            steps, row = self._steps(len(images), rng), AT_ONCE.row("")
            plan = Plan(steps, AT_ONCE, images.device)
            row.start(0)
            for i in range(len(steps)):
                step = plan.step(i, row)
                sgd.zero_grad()
                cross_entropy(net(augment(images[step.indices], step.draw)), p[step.indices]).backward()
                sgd.step()
                row.move(1)
            if epoch == self.epochs // 2 + 1:
                sgd = optimiser(0.1 * lr)

    def _steps(self, count: int, rng: torch.Generator) -> list[Step]:
        """One epoch's batches of ``count`` images, in a new order."""
        return epoch_steps(torch.randperm(count, generator=rng), self.batch_size, self.augmentation, rng)


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
def _workplace(
    network: str, channels: int, num_classes: int, *, size: tuple[int, int], compile: str, device: torch.device
) -> tuple[FlatModel | None, Replay]:
    """One for each architecture: all its networks, now and later in this process, run the same compiled code."""
    net = networks.build(network, channels, num_classes, size, 0).to(device)
    return None if flat_problem(net) else FlatModel(net, compile), replay_on(device)


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
            shape, size = (images.shape[1], p.shape[1]), (height, width)
            streams = [(protocol.seed, "evaluation", j) for j in group]
            nets = [networks.build(network, *shape, size, *stream).to(images.device) for stream in streams]
            rngs = [generator(protocol.seed, "evaluation", network, j) for j in group]
            model, replay = _workplace(network, *shape, size=size, compile=protocol.compile, device=images.device)
            protocol.train(model, nets, sets, self.lr, rngs, replay=replay)
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
