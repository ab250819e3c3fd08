"""Influence matching (Inf-Match, arXiv 2607.16859), with PAD's depth filter (2408.03360).

At a checkpoint theta of an expert, with G and H the gradient and the Hessian of the mean loss on the real images D or
the synthetic ones S, the influence of exchanging D for S is, to first order,

    r = H_D G_S + H_S G_D - 2 H_D G_D      the gradient in theta of <G_D, G_S> - |G_D|^2

For a rho that is held constant <rho, r> = <H_D rho, G_S> + <rho, H_S G_D> + constant. So its gradient in the images is
h_x along H_D rho, and what h_x along rho changes by as theta moves along G_D: a third derivative. No step is unrolled.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pad.data.augment import Augmentation, augment, augment_and_back
from pad.data.placement import to_device
from pad.distributed import ALONE, Ranks
from pad.matching.loss import span
from pad.matching.objective import Gradients, Objective
from pad.matching.real import RealBatches
from pad.matching.trajectory import SegmentSampler
from pad.nn.flat import FlatModel
from pad.rng import generator
from pad.store.trajectories import TrajectoryStore


@dataclass(frozen=True, kw_only=True)
class Checkpoints:
    """Of an iteration's expert, ``count`` epochs of those that may be drawn; all where they are fewer.

    ``sampler``: draws the expert, and says which epochs these are.
    """

    store: TrajectoryStore
    sampler: SegmentSampler
    count: int
    seed: int

    def epochs(self, it: int) -> tuple[int, list[int]]:
        """The expert, and different epochs in rising order."""
        first, bound = self.sampler.min_start_epoch, self.sampler.upper_bound(it)
        order = torch.randperm(bound - first, generator=generator(self.seed, "checkpoints", it))
        return self.sampler.segment(it).expert, sorted((first + order[: self.count]).tolist())

    def weighted(self, it: int) -> tuple[list[float], Tensor]:
        """Weights, and parameters ``[count, P]``.

        The learning rate of experts is constant. So the weight eta_t / sum_{k >= t} eta_k, over checkpoints k up to the
        last epoch T, is 1 / (T - t + 1).
        """
        expert, epochs = self.epochs(it)
        last = self.store.epochs(expert)
        return [1 / (last - t + 1) for t in epochs], self.store.rows(expert, epochs)


class _Share:
    """What a rank has of a batch ``x [n, C, H, W]``, ``p [n, K]``. Its G and H are added up: they are the batch's."""

    def __init__(self, model: FlatModel, x: Tensor, p: Tensor, ranks: Ranks):
        n = len(x)
        self.rows = slice(n * ranks.rank // ranks.size, n * (ranks.rank + 1) // ranks.size)
        self.model, self.ranks, self.x = model, ranks, x[self.rows]
        self.share = len(self.x) / n  # of the batch; 0 where images are too few
        self.p = p[self.rows] * self.share

    def grad(self, theta: Tensor) -> Tensor:
        """G at ``theta``, ``[P]``."""
        return self._sum(self.model.grad(theta, self.x, self.p) if self.share else torch.zeros_like(theta))

    def times(self, theta: Tensor, along: Tensor) -> Tensor:
        """H ``along`` at ``theta``, ``[P]``."""
        return self._sum(self.model.hvp(theta, self.x, self.p, along)[1] if self.share else torch.zeros_like(theta))

    def _sum(self, flat: Tensor) -> Tensor:
        self.ranks.all_reduce_(flat)
        return flat


@dataclass(frozen=True, kw_only=True)
class InfluenceObjective(Objective):
    """|sum_t w_t r_t|^2 / |sum_t w_t 2 H_D G_D|^2, over the ``checkpoints`` t of an iteration.

    The numbers that count are those of :func:`pad.matching.loss.span`. Without synthetic images it would be 1.

    Args:
        real: a batch of each class; one for all checkpoints.
        augmentation: one draw for real and synthetic images.
        depth: shares of the depth between which parameters count.
        ranks: share both batches. Those of a network with BatchNorm do not split: rank 0 then does the work.
        real_model: the same network for the real batch. Compiled code is for batches of a size.
    """

    model: FlatModel
    checkpoints: Checkpoints
    real: RealBatches
    augmentation: Augmentation
    depth: tuple[float, float]
    seed: int
    ranks: Ranks = ALONE
    real_model: FlatModel | None = None

    def gradients(self, it: int, images: Tensor, labels: Tensor, lr: Tensor) -> Gradients:
        """Loss and its gradients in images ``[N, C, H, W]`` and label logits ``[N, K]``; that in lr is zero."""
        if self.model.separable:
            return self._gradients(it, images, labels, lr, self.ranks)
        return self.ranks.on_main(lambda: self._gradients(it, images, labels, lr, ALONE))

    @torch.no_grad()
    def _gradients(self, it: int, images: Tensor, labels: Tensor, lr: Tensor, ranks: Ranks) -> Gradients:
        weights, rows = self.checkpoints.weighted(it)
        thetas = to_device(rows.to(images.dtype), images.device)
        rng = generator(self.seed, "influence matching", it)
        draw = self.augmentation.draw(1, rng)
        batches = [self.real.draw(c, rng).to(images.dtype) for c in range(labels.shape[1])]
        sizes = torch.tensor([len(batch) for batch in batches])
        classes = to_device(torch.arange(len(batches)).repeat_interleave(sizes), images.device)
        one_hot = F.one_hot(classes, len(batches)).to(images.dtype)
        real = _Share(self.real_model or self.model, augment(torch.cat(batches), draw), one_hot, ranks)
        p = labels.softmax(dim=1)
        x, back = augment_and_back(images, draw)
        mine = _Share(self.model, x, p, ranks)

        first, last = span(*self.depth, self.model.num_parameters)
        of_real = [real.grad(theta) for theta in thetas]
        influence, scale = (torch.zeros_like(thetas[0]) for _ in range(2))
        for weight, theta, g in zip(weights, thetas, of_real):
            twice = 2 * real.times(theta, g)
            change = real.times(theta, mine.grad(theta)) + mine.times(theta, g) - twice
            influence[first:last] += weight * change[first:last]
            scale[first:last] += weight * twice[first:last]
        size = scale.square().sum()
        rho = 2 * influence / size

        d_x, d_p = torch.zeros_like(images), torch.zeros_like(p)
        for weight, theta, g in zip(weights, thetas, of_real):
            of_gradient = real.times(theta, weight * rho)
            if mine.share:
                _, _, h_x, h_p = self.model.hvp(theta, mine.x, mine.p, of_gradient)
                t_x, t_p = self.model.third(theta, mine.x, mine.p, g, weight * rho)
                d_x[mine.rows] += h_x + t_x
                d_p[mine.rows] += mine.share * (h_p + t_p)
        ranks.all_reduce_(d_x, d_p)
        d_labels = p * (d_p - (d_p * p).sum(dim=1, keepdim=True))
        return Gradients(influence.square().sum() / size, back(d_x), d_labels, torch.zeros_like(lr))
