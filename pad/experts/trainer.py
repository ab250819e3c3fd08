"""Training one expert network on the curriculum and handing out its parameters after every epoch."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pad.data.augment import Augmentation, augment
from pad.data.placement import Images, batches, to_device
from pad.experts.gsam import GSAM
from pad.nn.flat import FlatModel
from pad.rng import generator


@dataclass(frozen=True, kw_only=True)
class ExpertTraining:
    """What all experts of a buffer share: the model, the training images and how they are trained on.

    Args:
        images, labels: ``[N, C, H, W]`` preprocessed, ``[N]`` int64, on the device that trains.
        epoch_indices: which images epoch e trains on, as data-set indices on the CPU.
        augmentation: draws a batch's augmentation (DSA or DC's).
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

    def train(self, expert: int, start: Tensor, attempt: int = 0) -> Iterator[Tensor]:
        """Yield expert ``expert``'s parameters ``[P]``: ``start`` itself, then those after each epoch.

        Depends on (seed, expert, attempt) only, so an expert is the same however many are trained, and where.
        """
        w = to_device(start, self.images.device)
        momentum: Tensor | None = None
        yield w
        for epoch in range(self.epochs):
            again = ("attempt", attempt) if attempt else ()
            rng = generator(self.seed, "expert", expert, epoch, *again)
            indices = self.epoch_indices(epoch)
            order = indices[torch.randperm(len(indices), generator=rng)]
            labels = self.labels[to_device(order, self.labels.device)].split(self.batch_size)
            for x, y in zip(batches(self.images, order, self.batch_size), labels):
                x = augment(x, self.augmentation.draw(len(x), rng))
                p = F.one_hot(y, self.num_classes).to(x.dtype)
                w, momentum = self.optimiser.step(w, momentum, lambda at: self.model.grad(at, x, p))
            yield w
