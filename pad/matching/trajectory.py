"""Trajectory matching: which expert segment an outer iteration follows, and the gradients for following it.

MTT (arXiv 2203.11932), with TESLA's truncated gradient (2211.10586), DATM's sequential generation (2310.05773), PAD's
depth filter (2408.03360) and MCT's convexified trajectories (2406.19827).
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pad.data.augment import Augmentation
from pad.data.placement import to_device
from pad.distributed import ALONE, Ranks
from pad.errors import InputError
from pad.matching.loss import loss_by_layer, matching_loss
from pad.matching.objective import Gradients, Objective
from pad.matching.unroll import inner_steps, unrolled_gradients
from pad.nn.flat import FlatModel
from pad.nn.replay import AT_ONCE, Replay
from pad.rng import generator
from pad.store.trajectories import TrajectoryStore


@dataclass(frozen=True)
class Segment:
    """The part of a trajectory to match: of ``expert``, from epoch ``start`` to epoch ``end``.

    Both are whole numbers, but of a convexified trajectory.
    """

    expert: int
    start: float
    end: float


def expert_of(it: int, experts: list[int], seed: int) -> int:
    """The expert of outer iteration ``it``: they come in shuffled passes over all of them."""
    turn, position = divmod(it, len(experts))
    order = torch.randperm(len(experts), generator=generator(seed, "expert order", turn))
    return experts[int(order[position])]


@dataclass(frozen=True, kw_only=True)
class SegmentSampler:
    """Draws the segment of each outer iteration, as a function of (seed, iteration).

    Experts come as :func:`expert_of` says; start epochs are uniform in [min_start_epoch, upper bound), where
    sequential generation widens the bound linearly from ``current_max_start_epoch`` to ``max_start_epoch`` at
    ``expansion_end_epoch``. ``convexified``: on convexified trajectories, where they are real numbers.
    """

    experts: list[int]
    expert_epochs: int = 0
    min_start_epoch: int
    max_start_epoch: int
    sequential: bool
    current_max_start_epoch: int
    expansion_end_epoch: int
    seed: int
    convexified: bool = False

    def upper_bound(self, it: int) -> int:
        """The first start epoch that is out of reach in iteration ``it``."""
        if not self.sequential:
            return self.max_start_epoch
        first = min(self.current_max_start_epoch, self.max_start_epoch)
        return min(self.max_start_epoch, first + int((self.max_start_epoch - first) * it / self.expansion_end_epoch))

    def segment(self, it: int) -> Segment:
        """The segment of outer iteration ``it``."""
        expert = expert_of(it, self.experts, self.seed)
        rng = generator(self.seed, "start epoch", it)
        first, bound = self.min_start_epoch, self.upper_bound(it)
        start: float
        if self.convexified:
            start = first + (bound - first) * torch.rand((), generator=rng, dtype=torch.float64).item()
        else:
            start = int(torch.randint(first, bound, (), generator=rng))
        return Segment(expert, start, start + self.expert_epochs)

    def refuse_short(self, store: TrajectoryStore) -> None:
        """Raise InputError when a trajectory is too short for a segment that may be drawn."""
        for expert in self.experts:
            self.refuse_shorter(store.epochs(expert), f"expert {expert} in {store.folder}")

    def refuse_shorter(self, epochs: int, what: str) -> None:
        """The same of a trajectory of so many epochs, ``what`` in words."""
        last = self.max_start_epoch - (not self.convexified) + self.expert_epochs
        if epochs < last:
            asked = f"max_start_epoch {self.max_start_epoch}"
            asked += f" and expert_epochs {self.expert_epochs}" if self.expert_epochs else ""
            raise InputError(f"{asked} need trajectories of {last} epochs, but {what} has {epochs}")


@dataclass(frozen=True, kw_only=True)
class TrajectoryObjective(Objective):
    """The matching loss after training from a segment's start, with its exact gradients or TESLA's.

    Args:
        augmentation: of the ``syn_steps`` inner steps, on ``batch_syn`` synthetic images each.
        depth: shares of the depth between which parameters count (:func:`pad.matching.loss.span`).
        ranks: share the mini-batches. Those of a network with BatchNorm do not split: rank 0 then does the work.
        truncated: TESLA's gradients, see :func:`pad.matching.unroll.adjoint`.
        layer_losses: also say what each layer adds to the loss (:func:`pad.matching.loss.loss_by_layer`).
        replay: how inner steps are done; shared ones at once.
    """

    model: FlatModel
    store: TrajectoryStore
    sampler: SegmentSampler
    augmentation: Augmentation
    syn_steps: int
    batch_syn: int
    depth: tuple[float, float]
    loss_ratio: float
    seed: int
    ranks: Ranks = ALONE
    truncated: bool = False
    layer_losses: bool = False
    replay: Replay = AT_ONCE

    def gradients(self, it: int, images: Tensor, labels: Tensor, lr: Tensor) -> Gradients:
        """Matching loss and its gradients in images ``[N, C, H, W]``, label logits ``[N, K]`` and learning rate."""
        if self.model.separable:
            return self._gradients(it, images, labels, lr, self.ranks)
        return self.ranks.on_main(lambda: self._gradients(it, images, labels, lr, ALONE))

    def _gradients(self, it: int, images: Tensor, labels: Tensor, lr: Tensor, ranks: Ranks) -> Gradients:
        segment = self.sampler.segment(it)
        ends = segment.start, segment.end
        if self.sampler.convexified:
            rows = self.store.between(segment.expert, ends)
        else:
            rows = self.store.rows(segment.expert, [int(end) for end in ends])
        start, target = to_device(rows.to(images.dtype), images.device)
        rng = generator(self.seed, "inner steps", it)
        steps = inner_steps(len(images), self.batch_syn, self.syn_steps, self.augmentation, rng)
        filters = dict(zip(("match_from", "match_to"), self.depth), loss_ratio=self.loss_ratio)
        layers: dict[str, Tensor] = {}

        def loss(theta: Tensor) -> tuple[Tensor, Tensor]:
            if self.layer_losses:
                sizes = layers_of(self.model)
                layers.update(zip(sizes, loss_by_layer(theta, start, target, list(sizes.values()), **filters)))
            return matching_loss(theta, start, target, **filters)

        found = unrolled_gradients(
            self.model,
            start,
            images,
            labels,
            lr,
            steps,
            objective=loss,
            ranks=ranks,
            truncated=self.truncated,
            replay=self.replay if ranks.size == 1 else AT_ONCE,
        )
        return replace(found, layers=layers)


def layers_of(model: FlatModel) -> dict[str, int]:
    """How many parameters each layer has, shallow to deep: a layer is a module with parameters of its own, by name."""
    sizes: dict[str, int] = {}
    for name, shape in zip(model.names, model.shapes):
        layer = name.rpartition(".")[0]
        sizes[layer] = sizes.get(layer, 0) + math.prod(shape)
    return sizes
