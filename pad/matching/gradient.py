"""Gradient matching (DC, arXiv 2006.05929; with augmentation DSA, 2102.08259), with PAD's depth filter (2408.03360).

A step makes the gradient that the synthetic images of a class give a network resemble the one that real images give.
With g = grad(theta, A(x), y) of the synthetic images, g* of the real ones and v = dD(g, g*)/dg, the images' gradient is
that of the slope <g, v>, which hvp gives, taken back through the augmentation A.
"""

import math
from collections.abc import Callable, Iterator, Sequence
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
from pad.nn.flat import FlatModel
from pad.rng import generator

STATISTICS = 16  # real images of a class that BatchNorm's running statistics see before each step, as published


def gradient_distance(
    g: Tensor, target: Tensor, shapes: Sequence[tuple[int, ...]], match_from: float = 0.0, match_to: float = 1.0
) -> Tensor:
    """D(g, target) of flat gradients ``[P]`` of parameters of these shapes: a scalar (arXiv 2006.05929).

    The sum, over the output units of every parameter of two or more dimensions, of 1 - <a, b> / (|a| |b| + 1e-6), with
    a and b the unit's rows of g and target. Vectors, such as biases and norms, are left out. So are the coordinates
    outside :func:`pad.matching.loss.span`: where a cut falls into a row, the rest of the row counts.
    """
    first, last = span(match_from, match_to, len(g))
    if (first, last) != (0, len(g)):
        place = torch.arange(len(g), device=g.device)
        kept = (place >= first) & (place < last)
        g, target = g * kept, target * kept
    total = g.new_zeros(())
    at = 0
    for shape in shapes:
        size = math.prod(shape)
        if len(shape) > 1:
            width = size // shape[0]
            # without the rows of which nothing is left
            rows = slice(max(0, first - at) // width, max(0, math.ceil((last - at) / width)))
            a, b = (flat[at : at + size].view(-1, width)[rows] for flat in (g, target))
            total = total + (1 - (a * b).sum(dim=1) / (a.norm(dim=1) * b.norm(dim=1) + 1e-6)).sum()
        at += size
    return total


@dataclass(frozen=True, kw_only=True)
class GradientObjective(Objective):
    """The sum over the classes of D, in ``outer`` steps under a network that learns.

    An iteration has a fresh network. Between the steps it is trained for ``inner`` epochs on the synthetic set as it
    then is. A network with BatchNorm is trained with the statistics of the batch, and matched under running ones, which
    begin with its network. A batch of 16 real images a class moves them before each step, and each batch of the
    training does.

    Args:
        start: the parameters ``[P]`` of iteration ``it``'s network.
        augmentation: one draw for the real and the synthetic images of a class (DSA: siamese).
        training: augmentation of the inner training.
        lr_net, batch_train: of that training, plain SGD.
        depth: shares of the depth between which parameters count (:func:`pad.matching.loss.span`).
        ranks: share the classes; each does the training.
        real_model: the same network for the real batches. Compiled code is for batches of a size, and ``model``'s
            would be filled up to theirs.
    """

    model: FlatModel
    start: Callable[[int], Tensor]
    real: RealBatches
    augmentation: Augmentation
    training: Augmentation
    outer: int
    inner: int
    lr_net: float
    batch_train: int
    depth: tuple[float, float]
    seed: int
    ranks: Ranks = ALONE
    real_model: FlatModel | None = None

    def steps(self, it: int, images: Tensor, labels: Tensor, lr: Tensor) -> Iterator[Gradients]:
        """Losses and gradients in images ``[N, C, H, W]``; those in labels and lr are zero."""
        theta, p = self.start(it), labels.softmax(dim=1)
        models = self.model, self.real_model or self.model
        running = None if self.model.separable else self.model.running(theta)
        for step in range(self.outer):
            if running:
                self._feed(running, theta, it, step)
                models = (running.fixed(),) * 2
            loss, d_images = self._match(models, theta, images, p, it, step)
            yield Gradients(loss, d_images, torch.zeros_like(labels), torch.zeros_like(lr))
            if step + 1 < self.outer:
                theta = self._train(running or self.model, theta, images, p, it, step)

    @torch.no_grad()
    def _match(
        self, models: tuple[FlatModel, FlatModel], theta: Tensor, images: Tensor, p: Tensor, it: int, step: int
    ) -> tuple[Tensor, Tensor]:
        """The loss and its gradient in the images, under a network for the synthetic and one for the real batches."""
        model, of_real = models
        num_classes = p.shape[1]
        ipc = len(images) // num_classes
        loss = p.new_zeros(())
        d_images = torch.zeros_like(images)
        for c in self.ranks.deal(range(num_classes)):
            rng = generator(self.seed, "gradient matching", it, step, c)
            real = self.real.draw(c, rng).to(images.dtype)
            draw = self.augmentation.draw(1, rng)
            one_hot = F.one_hot(torch.full((len(real),), c, device=p.device), num_classes).to(p.dtype)
            target = of_real.grad(theta, augment(real, draw), one_hot)
            mine = slice(c * ipc, (c + 1) * ipc)
            x, back = augment_and_back(images[mine], draw)
            with torch.enable_grad():
                g = model.grad(theta, x, p[mine]).requires_grad_()
                distance = gradient_distance(g, target, model.shapes, *self.depth)
                v = torch.autograd.grad(distance, g)[0]
            d_images[mine] = back(model.hvp(theta, x, p[mine], v)[2])
            loss += distance.detach()
        self.ranks.all_reduce_(loss, d_images)
        return loss, d_images

    def _train(self, model: FlatModel, theta: Tensor, images: Tensor, p: Tensor, it: int, step: int) -> Tensor:
        """The network after ``inner`` epochs of SGD on the synthetic set."""
        rng = generator(self.seed, "inner training", it, step)
        for _ in range(self.inner):
            for batch in to_device(torch.randperm(len(images), generator=rng), images.device).split(self.batch_train):
                x = augment(images[batch], self.training.draw(len(batch), rng))
                theta = theta - self.lr_net * model.grad(theta, x, p[batch])
        return theta

    @torch.no_grad()
    def _feed(self, running: FlatModel, theta: Tensor, it: int, step: int) -> None:
        """Move BatchNorm's running statistics towards those of one batch of real images of all classes."""
        rng = generator(self.seed, "statistics", it, step)
        some = [self.real.draw(c, rng, STATISTICS) for c in range(len(self.real.rows))]
        running(theta, torch.cat(some).to(theta.dtype))
