"""Training one expert network on the curriculum and handing out its parameters after every epoch."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pad.data.augment import Augmentation, augment
from pad.data.placement import HostImages, Images, to_device
from pad.experts.gsam import GSAM
from pad.nn.flat import FlatModel
from pad.nn.replay import AT_ONCE, Replay
from pad.nn.steps import Plan, epoch_steps
from pad.rng import generator


@dataclass(frozen=True, kw_only=True)
class ExpertTraining:
    """What all experts of a buffer share: the model, the training images and how they are trained on.

    Args:
        images, labels: ``[N, C, H, W]`` preprocessed, ``[N]`` int64, on the device that trains.
        epoch_indices: which images epoch e trains on, as data-set indices on the CPU.
        augmentation: draws a batch's augmentation (DSA or DC's).
        replay: how steps are done.
    """

    model: FlatModel
    images: Images
    labels: Tensor
    num_classes: int
    epoch_indices: Callable[[int], Tensor]
    optimiser: GSAM
    augmentation: Augmentation
    batch_size: int
    epochs: int
    seed: int
    replay: Replay = AT_ONCE

    def train(self, expert: int, start: Tensor, attempt: int = 0) -> Iterator[Tensor]:
        """Yield expert ``expert``'s parameters ``[P]``: ``start`` itself, then those after each epoch.

        Depends on (seed, expert, attempt) only, so an expert is the same however many are trained, and where.
        """
        images, replay = self.images, self.replay
        w = replay.buffer("w", self.labels.new_empty(0, dtype=start.dtype), *start.shape).copy_(start)
        velocity = replay.buffer("velocity", w).zero_()
        at = replay.row("expert")
        most = math.ceil(len(images) / self.batch_size)
        yield w.clone()
        for epoch in range(self.epochs):
            again = ("attempt", attempt) if attempt else ()
            rng = generator(self.seed, "expert", expert, epoch, *again)
            indices = self.epoch_indices(epoch)
            order = indices[torch.randperm(len(indices), generator=rng)]
            steps = epoch_steps(order, self.batch_size, self.augmentation, rng)
            plan = Plan(steps, replay, images.device, "of the expert", most)
            at.start(0)
            for i, each in enumerate(steps):
                seen, draws = None, each.draw and not each.draw.on_host
                if isinstance(images, HostImages):  # they come while the device is at the step before
                    seen = replay.hold("x", images[each.indices])
                if each.draw and each.draw.on_host:
                    x = images[to_device(each.indices, images.device)] if seen is None else seen
                    seen = replay.hold("x", augment(x, each.draw))

                def work(i: int = i, seen: Tensor | None = seen, draws: bool = bool(draws)) -> None:
                    step = plan.step(i, at)
                    x = images[step.indices] if seen is None else seen
                    x = augment(x, step.draw) if draws else x
                    y = self.labels[step.indices][:, None]
                    p = x.new_zeros(len(x), self.num_classes).scatter_(1, y, 1)  # F.one_hot looks at the labels
                    moved, momentum = self.optimiser.step(w, velocity, lambda at: self.model.grad(at, x, p))
                    w.copy_(moved)
                    if momentum is not None:
                        velocity.copy_(momentum)
                    at.move(1)

                replay.run(("expert", plan.key(i)), work, reads=[images] if isinstance(images, Tensor) else [])
            yield w.clone()
