"""Distribution matching: features of real and synthetic images under a network of each iteration.

DM (arXiv 2110.04181) compares their means under random networks, TGDD (AAAI 2026) under snapshots of experts. NCFM
(2502.20653) compares their characteristic functions (:mod:`pad.matching.characteristic`). The depth filter is ours, in
the place of PAD's (2408.03360).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pad.data.augment import Augmentation, augment
from pad.distributed import ALONE, Ranks
from pad.matching.objective import Gradients, Objective
from pad.matching.real import RealBatches
from pad.nn.fused import blocks_of
from pad.nn.networks import AnyNetwork
from pad.rng import generator
from pad.shares import exact_share

# How far features [n, D] are from those of real images, a scalar, as a function of the former.
Distance = Callable[[Tensor], Tensor]


class Opponent(Protocol):
    """What learns against the set.

    parameters: ``[Q]``, asks for a gradient. memory: what it is at this moment, see :class:`Objective`.
    """

    parameters: Tensor
    memory: dict[str, Tensor]

    def learn(self, gradient: Tensor) -> None:
        """One step up the ``gradient [Q]`` of an iteration's loss."""


def matched_blocks(depth_ratio: float | None, count: int) -> int:
    """How many of a network's ``count`` blocks, the deepest, give the features that are matched.

    None: the last, whose features are the embedding before the classifier, as published. A share in [0, 1):
    ceil((1 - depth_ratio) count), so 0 gives all. This is ours: what PAD's filter means for DM is not published.
    """
    return 1 if depth_ratio is None else math.ceil((1 - exact_share(depth_ratio)) * count)


def to_mean(real: Tensor, rng: torch.Generator) -> Distance:
    """|m - m*|^2, with m* the mean of ``real [n, D]``."""
    target = real.mean(dim=0)
    return lambda found: (found.mean(dim=0) - target).square().sum()


@dataclass(frozen=True, kw_only=True)
class DistributionObjective(Objective):
    """The sum over the classes, and over the ``blocks`` deepest blocks of a network, of the distance of the features.

    Those of a block are flattened. Each class adds the cross-entropy of its synthetic images under a second network, by
    ``ce_weight``, where there is one.

    Args:
        network: iteration ``it``'s, on the device of the images. Its parameters ask for no gradient.
        classifier: the second one, alike.
        distance_to: of a class's real features ``[n, D]`` in a block, how far others are from them. Its random numbers
            are those of class and iteration.
        opponent: has parameters in it, and learns from their gradient to make the distance large.
        augmentation: one draw for the real and the synthetic images of a class (DSA: siamese).
        separable: whether an image's features depend on it alone. If not (BatchNorm), the network sees all classes at
            once, as published, and rank 0 does the work.
        ranks: share the classes.
    """

    network: Callable[[int], AnyNetwork]
    real: RealBatches
    augmentation: Augmentation
    blocks: int
    separable: bool
    seed: int
    distance_to: Callable[[Tensor, torch.Generator], Distance] = to_mean
    opponent: Opponent | None = None
    classifier: Callable[[int], AnyNetwork] | None = None
    ce_weight: float = 1.0
    ranks: Ranks = ALONE

    def gradients(self, it: int, images: Tensor, labels: Tensor, lr: Tensor) -> Gradients:
        """Loss and gradient in images ``[N, C, H, W]``; those in labels and lr are zero."""
        classes = range(labels.shape[1])
        if self.separable:
            found = self._gradients(it, images, [[c] for c in self.ranks.deal(classes)], len(classes))
            self.ranks.all_reduce_(*found)
        else:
            found = self.ranks.on_main(lambda: self._gradients(it, images, [list(classes)], len(classes)))
        loss, d_images, *d_opponent = found
        if self.opponent:
            self.opponent.learn(*d_opponent)
        return Gradients(loss, d_images, torch.zeros_like(labels), torch.zeros_like(lr))

    @property
    def memory(self) -> dict[str, Tensor]:
        return self.opponent.memory if self.opponent else {}

    def _gradients(self, it: int, images: Tensor, groups: Sequence[list[int]], num_classes: int) -> list[Tensor]:
        """The share of ``groups`` of classes, each of which the network sees at once: loss, its gradients."""
        blocks = blocks_of(self.network(it))
        classifier = self.classifier(it) if self.classifier else None
        ipc = len(images) // num_classes
        loss = images.new_zeros(())
        d_images = torch.zeros_like(images)
        learned = [self.opponent.parameters] if self.opponent else []
        d_learned = [torch.zeros_like(tensor) for tensor in learned]

        def features(batches: list[Tensor]) -> list[Sequence[Tensor]]:
            """Of each matched block, each batch's features."""
            sizes = [len(batch) for batch in batches]
            return [block.flatten(1).split(sizes) for block in blocks(torch.cat(batches))[-self.blocks :]]

        for group in groups:
            rngs = [generator(self.seed, "distribution matching", it, c) for c in group]
            real = [self.real.draw(c, rng).to(images.dtype) for c, rng in zip(group, rngs)]
            draws = [self.augmentation.draw(1, rng) for rng in rngs]
            with torch.no_grad():
                targets = features([augment(x, draw) for x, draw in zip(real, draws)])
                distances = [[self.distance_to(*pair) for pair in zip(block, rngs)] for block in targets]
            rows = [slice(c * ipc, (c + 1) * ipc) for c in group]
            with torch.enable_grad():
                xs = [images[mine].detach().requires_grad_() for mine in rows]
                seen = [augment(x, draw) for x, draw in zip(xs, draws)]
                total = images.new_zeros(())
                for found, block in zip(features(seen), distances):
                    for of_class, distance in zip(found, block):
                        total = total + distance(of_class)
                if classifier is not None:
                    total = total + self.ce_weight * _cross_entropies(classifier, seen, group)
                gradients = torch.autograd.grad(total, [*xs, *learned])
            for mine, gradient in zip(rows, gradients):
                d_images[mine] = gradient
            for whole, gradient in zip(d_learned, gradients[len(xs) :]):
                whole += gradient
            loss += total.detach()
        return [loss, d_images, *d_learned]


def _cross_entropies(network: AnyNetwork, batches: list[Tensor], classes: list[int]) -> Tensor:
    """The sum over the batches, each of a class, of the mean -log p of that class."""
    logits = network.classifier(blocks_of(network)(torch.cat(batches))[-1].flatten(1))
    parts = logits.log_softmax(dim=1).split([len(batch) for batch in batches])
    return -torch.stack([part[:, c].mean() for part, c in zip(parts, classes)]).sum()
