"""The short training runs that difficulty is taken from, each shared by all methods that are asked for."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pad.data.augment import DSA, NoAugmentation, augment
from pad.data.placement import Images, batches, to_device
from pad.nn.fused import forward_of
from pad.nn.networks import AnyNetwork, build
from pad.rng import generator, seeded

Progress = Callable[[int, int], None]  # called with (number of the network, epoch) after each epoch

Observer = Callable[[Tensor, Tensor], None]  # called with (indices [B], logits [B, K]) at each training step


@dataclass(frozen=True)
class ScoringSettings:
    """How the networks are trained that score images. The commands' settings have the ranges.

    The defaults are DeepCore's for selection (arXiv 2204.08499): ten networks of 40 epochs, SGD with Nesterov momentum,
    a constant learning rate, no augmentation. Ours alone: networks and preprocessing are this toolkit's, and scores are
    norms of each image's own gradient, where DeepCore's GraNd is divided by the batch size.
    The paper that proposed GraNd and EL2N augments and takes them early (epochs of 10 to 20).

    Args:
        model: name of a network (:func:`pad.nn.networks.build`).
        repeats: how many independently initialised networks are averaged.
        epochs: epochs each is trained for; 0 scores networks as initialised.
        lr, momentum, weight_decay, batch: of SGD; momentum is Nesterov's.
        augmentation: "none", or a DSA strategy such as "crop_flip": per batch one of its transformations.
    """

    model: str
    _: KW_ONLY
    repeats: int = 10
    epochs: int = 40
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    batch: int = 256
    augmentation: str = "none"


@dataclass(frozen=True, eq=False)
class ScoringTraining:
    """The networks that score images: what they are trained on, and how.

    Args:
        images, labels: ``[N, C, H, W]`` float32, preprocessed, and ``[N]`` int64, on the device that trains.
        seed: network ``repeat`` depends on (settings, seed, repeat) only.
    """

    images: Images
    labels: Tensor
    num_classes: int
    settings: ScoringSettings
    seed: int

    def network(self, repeat: int) -> AnyNetwork:
        """Network ``repeat`` as initialised, on the CPU. Raises InputError as :func:`pad.nn.networks.build`."""
        channels, height, width = self.images.shape[1:]
        return build(self.settings.model, channels, self.num_classes, (height, width), self.seed, *("score", repeat))

    def epochs(self, repeat: int, observers: Sequence[Observer] = ()) -> Iterator[AnyNetwork]:
        """Network ``repeat`` as initialised, and after each epoch on everything; always the same module, in eval mode.

        Up to an epoch it does not depend on how many follow. ``observer(indices, logits)`` is called with each step's
        indices ``[B]`` and logits ``[B, K]``, which are those before the step, of the images as augmented; both on the
        device. Raises InputError as :func:`pad.nn.networks.build` and :class:`pad.data.augment.DSA` do.
        """
        settings = self.settings
        # The module itself, not its flat form: what scores is eval mode, which needs BatchNorm's running statistics
        network = self.network(repeat).to(self.images.device)
        forward = forward_of(network)
        optimiser = torch.optim.SGD(
            network.parameters(),
            lr=settings.lr,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
            nesterov=settings.momentum > 0,
        )
        augmentation = NoAugmentation() if settings.augmentation == "none" else DSA(settings.augmentation)
        yield network.eval()
        for epoch in range(settings.epochs):
            network.train()
            rng = generator(self.seed, "score", repeat, epoch)
            order = torch.randperm(len(self.images), generator=rng)
            indices = to_device(order, self.labels.device).split(settings.batch)
            with seeded(self.seed, "score", repeat, epoch, "dropout", device=self.images.device):
                for x, seen in zip(batches(self.images, order, settings.batch), indices):
                    x = augment(x, augmentation.draw(len(x), rng))
                    optimiser.zero_grad()
                    logits = forward(x)
                    F.cross_entropy(logits, self.labels[seen]).backward()
                    optimiser.step()
                    for observer in observers:
                        observer(seen, logits.detach())
            yield network.eval()

    def train(self, repeat: int, progress: Progress | None = None, observers: Sequence[Observer] = ()) -> AnyNetwork:
        """The last of :meth:`epochs`. ``progress(repeat, epoch)`` is called after each epoch."""
        epochs = self.epochs(repeat, observers)
        network = next(epochs)
        for epoch, _ in enumerate(epochs):
            if progress is not None:
                progress(repeat, epoch)
        return network
