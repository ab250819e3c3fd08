"""Distribution matching (DM, arXiv 2110.04181), with a depth filter of ours in the place of PAD's (2408.03360)."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

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


def matched_blocks(depth_ratio: float | None, count: int) -> int:
    """How many of a network's ``count`` blocks, the deepest, give the features that are matched.

    None: the last, whose features are the embedding before the classifier, as published. A share in [0, 1):
    ceil((1 - depth_ratio) count), so 0 gives all. This is ours: what PAD's filter means for DM is not published.
    """
    return 1 if depth_ratio is None else math.ceil((1 - exact_share(depth_ratio)) * count)


@dataclass(frozen=True, kw_only=True)
class DistributionObjective(Objective):
    """The sum over the classes, and over the ``blocks`` deepest blocks of a random network, of |m - m*|^2.

    m and m* are the means of the block's features, flattened, of the class's synthetic and real images.

    Args:
        network: iteration ``it``'s, on the device of the images. Its parameters ask for no gradient.
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
    ranks: Ranks = ALONE

    def gradients(self, it: int, images: Tensor, labels: Tensor, lr: Tensor) -> Gradients:
        """Loss and gradient in images ``[N, C, H, W]``; those in labels and lr are zero."""
        classes = range(labels.shape[1])
        if self.separable:
            loss, d_images = self._gradients(it, images, [[c] for c in self.ranks.deal(classes)], len(classes))
            self.ranks.all_reduce_(loss, d_images)
        else:
            loss, d_images = self.ranks.on_main(lambda: self._gradients(it, images, [list(classes)], len(classes)))
        return Gradients(loss, d_images, torch.zeros_like(labels), torch.zeros_like(lr))

    def _gradients(
        self, it: int, images: Tensor, groups: Sequence[list[int]], num_classes: int
    ) -> tuple[Tensor, Tensor]:
        """The share of ``groups`` of classes, each of which the network sees at once."""
        features = blocks_of(self.network(it))
        ipc = len(images) // num_classes
        loss = images.new_zeros(())
        d_images = torch.zeros_like(images)

        def means(batches: list[Tensor]) -> list[list[Tensor]]:
            """Of each matched block, each batch's mean features."""
            sizes = [len(batch) for batch in batches]
            deepest = features(torch.cat(batches))[-self.blocks :]
            return [[part.mean(dim=0) for part in block.flatten(1).split(sizes)] for block in deepest]

        for group in groups:
            rngs = [generator(self.seed, "distribution matching", it, c) for c in group]
            real = [self.real.draw(c, rng).to(images.dtype) for c, rng in zip(group, rngs)]
            draws = [self.augmentation.draw(1, rng) for rng in rngs]
            with torch.no_grad():
                targets = means([augment(x, draw) for x, draw in zip(real, draws)])
            rows = [slice(c * ipc, (c + 1) * ipc) for c in group]
            with torch.enable_grad():
                xs = [images[mine].detach().requires_grad_() for mine in rows]
                found = means([augment(x, draw) for x, draw in zip(xs, draws)])
                pairs = [pair for block in zip(found, targets) for pair in zip(*block)]
                distance = images.new_zeros(())
                for mean, target in pairs:
                    distance = distance + (mean - target).square().sum()
                for mine, gradient in zip(rows, torch.autograd.grad(distance, xs)):
                    d_images[mine] = gradient
            loss += distance.detach()
        return loss, d_images
