"""How evaluation networks are trained: the published protocols, and training by one of them, an epoch at a time.

Networks train together on flat parameters, or one by one as modules. Either way the schedule is the same, and what the
next epoch hangs on can be kept in a file.
"""

import logging
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, fields, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from pad.data.augment import Augmentation, CutMix, Mix, augment, cutmix
from pad.data.placement import HostImages, Images
from pad.errors import InputError
from pad.nn.flat import FlatModel, cross_entropy
from pad.nn.replay import AT_ONCE, Replay
from pad.nn.steps import Plan, Step, epoch_steps
from pad.rng import seeded
from pad.store.identity import digest
from pad.store.tensors import load_tensors, save_tensors

log = logging.getLogger("pad")

TrainingSet = tuple[Images, Tensor]  # images [N, C, H, W], target probabilities [N, K] (one-hot for hard labels)

_HELD = 2**28  # bytes of images, at most, that captured work has a copy of
_SECONDS = 60.0  # between two writings of a state
_KIND, _STREAM = "networks in training", "random stream"


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How a network is trained, as plain values; by default as MTT does (arXiv 2203.11932), and DATM and PAD after it.

    lr: for cases, the learning rate of networks, whatever they are trained on; None: that of the set.
    optimiser: sgd, which has ``momentum``, or adamw, which has torch's other defaults.
    epochs, extra: ``epochs + extra`` of them are trained. MTT's go from 0 to 1000.
    parts, late, factor: of the ``epochs`` each 1/``parts`` has a learning rate of its own, ``factor`` times that of the
        one before; it falls ``late`` epochs later. MTT's is divided by ten after epoch ``epochs // 2 + 1``.
    restart: whether the optimiser begins anew when it falls: momentum from zero.
    cutmix: the share of batches that CutMix is done to, after the augmentation.
    check_every: after so many epochs each, and after the last, the test accuracy is taken, and the best one counts;
        None: the last one counts.
    """

    epochs: int = 1000
    batch_size: int = 256
    momentum: float = 0.9
    weight_decay: float = 5e-4
    lr: float | None = None
    optimiser: str = "sgd"
    extra: int = 1
    parts: int = 2
    late: int = 2
    factor: float = 0.1
    restart: bool = True
    cutmix: float = 0.0
    check_every: int | None = None

    @property
    def length(self) -> int:
        """How many epochs are trained."""
        return self.epochs + self.extra

    def falls(self, epoch: int) -> int:
        """How often the learning rate has fallen by ``epoch``, counted from 0."""
        return sum(epoch >= k * self.epochs // self.parts + self.late for k in range(1, self.parts))


@dataclass(frozen=True, kw_only=True)
class Published(Schedule):
    """That of a paper, with what it also says where the settings say nothing. ``dsa_strategy``: None as they are."""

    dsa_strategy: str | None = None


# mtt: MTT's code; what it says is where the settings begin. dm: that of DC, DSA and DM (arXiv 2006.05929, 2102.08259,
# 2110.04181), which is MTT's, at one learning rate. ncfm: NCFM's (CVPR 2025) for CIFAR and the ImageNet subsets; it
# tests more often from 50 images per class on, which is not done here. ddranking: DD-Ranking 0.2.0's; it tests each 10
# epochs with hard labels and each 20 with soft ones, here each 20.
PROTOCOLS = {
    "mtt": Published(),
    "dm": Published(lr=0.01),
    "ncfm": Published(
        optimiser="adamw",
        lr=1e-3,
        weight_decay=0.01,
        epochs=2000,
        extra=0,
        batch_size=128,
        parts=5,
        late=0,
        factor=0.5,
        restart=False,
        cutmix=0.5,
        dsa_strategy="color_crop_flip_scale_rotate",
        check_every=100,
    ),
    "ddranking": Published(extra=0, late=0, restart=False, check_every=20),
}

_FIRST = ("epochs", "batch_size", "momentum", "weight_decay", "seed", "compile", "together")


@dataclass(frozen=True)
class Protocol(Schedule):
    """A schedule, with all else that the training of evaluation networks hangs on.

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
    seed: int = 0
    compile: str = "off"
    together: int = 1

    def of(self, network: str) -> "Protocol":
        """That of one architecture, by its augmentation."""
        return replace(self, augmentation=self.own.get(network, self.augmentation))

    @property
    def plain(self) -> dict:
        """Its plain values. Results are kept under them, so what came later is left out where it is at its default."""
        plain = [each for each in fields(self) if each.name not in ("augmentation", "own")]
        said = {each.name: getattr(self, each.name) for each in plain}
        return {each.name: said[each.name] for each in plain if each.name in _FIRST or said[each.name] != each.default}

    def on_flat(self, model: FlatModel | None, count: int) -> bool:
        """Whether ``count`` networks of a structure are trained on flat parameters, together.

        Compiled code and the CPU kernels work on these. BatchNorm's running statistics are no part of them, nor is
        AdamW's second moment, and some networks have no such structure; where nothing is compiled, modules are faster.
        """
        if model is None or not model.separable or self.optimiser != "sgd":
            return False
        return model.compile != "off" or count > 1

    def train(
        self,
        model: FlatModel | None,
        nets: Sequence[nn.Module],
        sets: Sequence[TrainingSet],
        lr: float,
        rngs: Sequence[torch.Generator],
        *,
        replay: Replay = AT_ONCE,
        test: Callable[[nn.Module], float] = lambda net: math.nan,
        state: "StateFile | None" = None,
    ) -> list[list[float]]:
        """Train networks of one architecture in place: each on a training set, all of one size, by its own stream.

        Args:
            model: their structure, which decides how (:meth:`on_flat`).
            replay: how steps on flat parameters are done.
            test: what the checks ask of a network.
            state: goes on with what a stopped training left there; for networks that are trained together, or for one.

        Returns what each network's checks found, the last one after the last epoch.
        """
        if self.on_flat(model, len(nets)):
            assert model is not None
            return self._run(_Flat(self, model, nets, sets, rngs, replay), lr, test, state)
        return [
            self._run(_Module(self, net, training_set, rng), lr, test, state)[0]
            for net, training_set, rng in zip(nets, sets, rngs)
        ]

    def _run(self, training: "_Training", lr: float, test: Callable, state: "StateFile | None") -> list[list[float]]:
        done, checks = state.read(training) if state else (0, [[] for _ in training.nets])
        for epoch in range(done, self.length):
            if self.restart and epoch and self.falls(epoch) > self.falls(epoch - 1):
                training.forget()
            training.epoch(epoch, lr * self.factor ** self.falls(epoch))
            done = epoch + 1
            if done == self.length or (self.check_every and done % self.check_every == 0):
                training.settle()
                for net, found in zip(training.nets, checks):
                    found.append(test(net))
            if state:
                state.write(training, done, checks)
        return checks

    def batches(self, count: int, rng: torch.Generator) -> tuple[list[Step], list[Mix | None]]:
        """One epoch's batches of ``count`` images, in a new order, and how each is mixed."""
        steps = epoch_steps(torch.randperm(count, generator=rng), self.batch_size, self.augmentation, rng)
        mixing = CutMix(self.cutmix)
        return steps, [mixing.draw(len(step.indices), rng) if self.cutmix else None for step in steps]


class _Training(ABC):
    """Networks in training, an epoch at a time."""

    nets: Sequence[nn.Module]
    rngs: Sequence[torch.Generator]

    @abstractmethod
    def epoch(self, epoch: int, lr: float) -> None:
        """Train for one epoch, counted from 0, at learning rate ``lr``."""

    @abstractmethod
    def forget(self) -> None:
        """The optimiser begins anew."""

    @abstractmethod
    def settle(self) -> None:
        """The networks' modules get what has been trained."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """All that the next epochs hang on, but for the random streams."""

    @abstractmethod
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from these :meth:`tensors`."""


class _Flat(_Training):
    """Together, by SGD as torch computes it, on flat parameters ``[J, P]``."""

    def __init__(self, how: Protocol, model: FlatModel, nets, sets: Sequence[TrainingSet], rngs, replay: Replay):
        self.nets, self.rngs = nets, rngs
        self._how, self._model, self._replay = how, model, replay
        self._theta = replay.hold("theta", torch.stack([model.flatten(net) for net in nets]))
        self._velocity = replay.buffer("velocity", self._theta).zero_()
        # Copied to where captured work finds them, but for large ones: the batches of these are gathered as they come.
        held = [
            (replay.hold(f"x {j}", x), replay.hold(f"p {j}", p))
            for j, (x, p) in enumerate(sets)
            if isinstance(x, Tensor) and x.nbytes <= _HELD
        ]
        self._held = len(held) == len(sets)
        self._sets: Sequence[TrainingSet] = held if self._held else sets
        self._rows = [replay.row(f"of network {j}") for j in range(len(nets))]

    def epoch(self, epoch: int, lr: float) -> None:
        model, replay, theta, velocity, count = self._model, self._replay, self._theta, self._velocity, len(self.nets)
        momentum, weight_decay = self._how.momentum, self._how.weight_decay
        passes, mixes = zip(*(self._how.batches(len(x), rng) for (x, _), rng in zip(self._sets, self.rngs)))
        plans = [Plan(steps, replay, theta.device, f"of network {j}") for j, steps in enumerate(passes)]
        for row in self._rows:
            row.start(0)
        images, p = self._sets[0]
        for i, n in enumerate(len(step.indices) for step in passes[0]):
            xs = replay.buffer("xs", p.new_empty(0, dtype=images.dtype), count, n, *images.shape[1:])
            ps = replay.buffer("ps", p, count, n, p.shape[1])
            for j, steps in enumerate(passes):  # by network: each draws its own kind of augmentation

                def gather(i: int = i, j: int = j, xs: Tensor = xs, ps: Tensor = ps) -> None:
                    there = plans[j].step(i, self._rows[j])
                    xs[j], ps[j] = _batch(self._sets[j], passes[j][i], there, mixes[j][i])
                    self._rows[j].move(1)

                draw = steps[i].draw
                as_it_comes = not self._held or mixes[j][i] or (draw and draw.on_host)
                way = AT_ONCE if as_it_comes else replay
                way.run(("batch", j, count, len(self._sets[j][0]), plans[j].key(i)), gather)

            def descend(lr: float = lr, xs: Tensor = xs, ps: Tensor = ps) -> None:
                g = model.grads(theta, xs, ps) if count > 1 else model.grad(theta[0], xs[0], ps[0])[None]
                velocity.mul_(momentum).add_(g.add(theta, alpha=weight_decay))
                theta.sub_(velocity, alpha=lr)

            replay.run(("descend", count, n), descend, given=lr)

    def forget(self) -> None:
        self._velocity.zero_()

    def settle(self) -> None:
        for net, row in zip(self.nets, self._theta):
            nn.utils.vector_to_parameters(row.clone(), net.parameters())

    def tensors(self) -> dict[str, Tensor]:
        return {"theta": self._theta, "velocity": self._velocity}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in self.tensors().items():
            tensor.copy_(tensors[name])
        self.settle()


class _Module(_Training):
    """One network, by torch's optimisers."""

    def __init__(self, how: Protocol, net: nn.Module, training_set: TrainingSet, rng: torch.Generator):
        self.nets, self.rngs = [net], [rng]
        self._how, self._net, self._set = how, net, training_set
        self.forget()

    def epoch(self, epoch: int, lr: float) -> None:
        net, images, rng, optimiser = self._net, self._set[0], self.rngs[0], self._optimiser
        for group in optimiser.param_groups:
            group["lr"] = lr
        steps, mixes = self._how.batches(len(images), rng)
        plan, row = Plan(steps, AT_ONCE, images.device), AT_ONCE.row("")
        row.start(0)
        net.train()
        with seeded(rng.initial_seed(), "layers", epoch, device=images.device):
            for i, (step, mix) in enumerate(zip(steps, mixes)):
                x, targets = _batch(self._set, step, plan.step(i, row), mix)
                optimiser.zero_grad()
                cross_entropy(net(x), targets).backward()
                optimiser.step()
                row.move(1)

    def forget(self) -> None:
        parameters, decay = self._net.parameters(), self._how.weight_decay
        self._optimiser: torch.optim.Optimizer = (
            torch.optim.AdamW(parameters, weight_decay=decay)
            if self._how.optimiser == "adamw"
            else torch.optim.SGD(parameters, momentum=self._how.momentum, weight_decay=decay)
        )

    def settle(self) -> None:
        pass

    def tensors(self) -> dict[str, Tensor]:
        numbers = self._optimiser.state_dict()["state"]
        own = {f"{i} {name}": each for i, state in numbers.items() for name, each in state.items()}
        return self._net.state_dict() | {f"optimiser {name}": each for name, each in own.items()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        self._net.load_state_dict({name: tensors[name] for name in self._net.state_dict()})
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("optimiser "):
                _, i, key = name.split(" ")
                state.setdefault(int(i), {})[key] = tensor.clone()
        self._optimiser.load_state_dict(self._optimiser.state_dict() | {"state": state})


def _batch(training_set: TrainingSet, here: Step, there: Step, mix: Mix | None) -> tuple[Tensor, Tensor]:
    """Images and targets of a step, which lies on the CPU, and on the device, too."""
    images, p = training_set
    x = images[(here if isinstance(images, HostImages) else there).indices]
    return cutmix(augment(x, there.draw), p[there.indices], mix)


class StateFile:
    """The file that keeps the state of networks in training, at most every minute.

    Args:
        about: which training it is, as plain values. What is there of another is passed over, with a line.
    """

    def __init__(self, path: Path, about: object):
        self._path, self._about, self._written = path, digest(about), time.monotonic()

    def read(self, training: _Training) -> tuple[int, list[list[float]]]:
        """Put networks into the state that is kept: how many epochs they have had, and what each one's checks found."""
        nothing: tuple[int, list[list[float]]] = 0, [[] for _ in training.nets]
        if not self._path.exists():
            return nothing
        try:
            tensors, metadata = load_tensors(self._path, kind=_KIND, format=1, remedy="training begins anew")
        except InputError as error:
            log.warning("%s", error)
            return nothing
        now = self._tensors(training)
        alike = all(name in tensors and tensors[name].shape == tensor.shape for name, tensor in now.items())
        if metadata["about"] != self._about or not alike:
            log.info("%s is of another training: this one begins anew", self._path)
            return nothing
        training.load(tensors)
        for j, rng in enumerate(training.rngs):
            rng.set_state(tensors[f"{_STREAM} {j}"])
        log.info("going on after epoch %d, kept in %s", metadata["done"] - 1, self._path)
        return metadata["done"], metadata["checks"]

    def write(self, training: _Training, done: int, checks: list[list[float]]) -> None:
        """Keep networks that have had ``done`` epochs, where the last time was a minute ago."""
        if time.monotonic() - self._written < _SECONDS:
            return
        said = {"kind": _KIND, "format": 1, "about": self._about, "done": done, "checks": checks}
        save_tensors(self._path, self._tensors(training), said)
        self._written = time.monotonic()

    @staticmethod
    def _tensors(training: _Training) -> dict[str, Tensor]:
        streams = {f"{_STREAM} {j}": rng.get_state() for j, rng in enumerate(training.rngs)}
        return training.tensors() | streams
