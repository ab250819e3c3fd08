"""Networks of an iteration from the trajectories of experts, for the matching of features (TGDD, NCFM)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils import vector_to_parameters

from pad.data.placement import to_device
from pad.matching.trajectory import SegmentSampler, expert_of
from pad.nn.networks import AnyNetwork
from pad.rng import generator
from pad.store.trajectories import TrajectoryStore


def networks_at(parameters: Callable[[int], Tensor], module: AnyNetwork) -> Callable[[int], AnyNetwork]:
    """The network of an iteration, of the ``parameters [P]`` that it has: ``module``, with these for its own."""
    module = module.requires_grad_(False)
    own = next(module.parameters())

    def network(it: int) -> AnyNetwork:
        vector_to_parameters(to_device(parameters(it).to(own.dtype), own.device), module.parameters())
        return module

    return network


@dataclass(frozen=True, kw_only=True)
class Stages:
    """TGDD: of an expert a snapshot, and one that is as old or at most ``stage_epochs`` - 1 epochs older.

    ``sampler``: draws the expert and the first.
    """

    store: TrajectoryStore
    sampler: SegmentSampler
    stage_epochs: int
    seed: int

    def epochs(self, it: int) -> tuple[int, int, int]:
        """The expert of iteration ``it``, and the epochs of the two."""
        segment = self.sampler.segment(it)
        first, end = int(segment.start), self.store.epochs(segment.expert) + 1
        rng = generator(self.seed, "stage", it)
        later = torch.randint(first, min(first + self.stage_epochs, end), (), generator=rng)
        return segment.expert, first, int(later)

    def first(self, it: int) -> Tensor:
        """Parameters ``[P]`` of the first snapshot."""
        expert, first, _ = self.epochs(it)
        return self.store.rows(expert, [first])[0]

    def later(self, it: int) -> Tensor:
        """Parameters ``[P]`` of the later one."""
        expert, _, later = self.epochs(it)
        return self.store.rows(expert, [later])[0]


@dataclass(frozen=True, kw_only=True)
class Mixtures:
    """NCFM: a point on the straight line between the ends of an expert, and the trained end."""

    store: TrajectoryStore
    experts: list[int]
    seed: int

    def mixed(self, it: int) -> Tensor:
        """l theta(0) + (1 - l) theta(T), with l uniform in [0, 1): ``[P]``."""
        expert = expert_of(it, self.experts, self.seed)
        first, last = self.store.rows(expert, [0, self.store.epochs(expert)])
        share = torch.rand((), generator=generator(self.seed, "mixture", it), dtype=torch.float64).item()
        return last.lerp(first, share)

    def trained(self, it: int) -> Tensor:
        """theta(T) of the same expert: ``[P]``."""
        expert = expert_of(it, self.experts, self.seed)
        return self.store.rows(expert, [self.store.epochs(expert)])[0]
