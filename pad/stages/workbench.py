"""What all three stages begin with: the data as the networks see it, and where files go."""

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from pad import evaluation, networks
from pad.config import Common
from pad.data.augment import DSA, NoAugmentation
from pad.data.preprocessing import Preprocessing, fit_preprocessing
from pad.data.sources import ImageData, load_data
from pad.errors import InputError
from pad.functional import FlatModel
from pad.trajectories import TrajectoryStore, buffer_folder, describe


@dataclass(frozen=True)
class Workbench:
    """The data as the networks see it, on the device.

    Preprocessing happens when it is first asked for: whitening can take minutes, and what can be refused without it is
    refused before.
    """

    data: ImageData  # on the CPU
    device: torch.device
    zca: bool

    @cached_property
    def preprocessing(self) -> Preprocessing:
        return fit_preprocessing(self.data.to(self.device), self.zca)

    @cached_property
    def images(self) -> Tensor:
        return self.preprocessing.apply(self.data.train_images)

    @cached_property
    def test_images(self) -> Tensor:
        return self.preprocessing.apply(self.data.test_images)

    @cached_property
    def labels(self) -> Tensor:
        return self.data.train_labels.to(self.device)

    @cached_property
    def test_labels(self) -> Tensor:
        return self.data.test_labels.to(self.device)

    def network(self, name: str, seed: int, *stream: int | str) -> networks.Network:
        """A fresh network for these images, on the CPU."""
        return networks.build(name, self.data.channels, self.data.num_classes, self.data.size, seed, *stream)

    def flat_model(self, name: str, compile: bool = False) -> FlatModel:
        """A network for these images as a function of its flat parameters."""
        return FlatModel(self.network(name, 0), compile)

    def describe(self, name: str, model: FlatModel) -> dict:
        """What trajectories of ``model``, called ``name``, on these images belong to."""
        return describe(self.data.identity, name, zip(model.names, model.shapes), self.preprocessing.identity)

    def open_experts(self, folder: Path, name: str, model: FlatModel) -> TrajectoryStore:
        """The trajectories in ``folder``. Raises InputError when they are of other images or another network.

        The preprocessing, which may not be known yet, is left to ``store.check(bench.describe(...))``.
        """
        store = TrajectoryStore.open(folder)
        parameters = zip(model.names, model.shapes)
        store.check(describe(self.data.identity, name, parameters, store.metadata["preprocessing"]))
        return store


def set_up(settings: Common) -> Workbench:
    """Load the configured data set. Raises InputError when its files are not there or the network does not fit its images."""
    device = settings.torch_device()
    data = load_data(settings.dataset, settings.data_path, **settings.data_arguments)
    if settings.train_per_class:
        data = data.first_per_class(settings.train_per_class)
    networks.build(settings.model, data.channels, data.num_classes, data.size, 0)
    return Workbench(data, device, settings.zca)


def check_writable(folder: Path) -> None:
    """Raise InputError, before hours of work, when no files can be written to ``folder``; makes nothing."""
    parent = next(path for path in (folder, *folder.parents) if os.path.exists(path))
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        reason = "may not be written to" if parent.is_dir() else "is not a folder"
        raise InputError(f"nothing can be written to {folder}: {parent} {reason}")


def experts_folder(settings: Common, data: ImageData, model: str | None = None) -> Path:
    """Where the trajectories of the configured data set and network lie."""
    return buffer_folder(
        settings.buffer_path, settings.dataset, model or settings.model, settings.zca, settings.subset, data.size[0]
    )


def evaluation_protocol(settings) -> evaluation.Protocol:
    """How the configured evaluation networks are trained."""
    augmentation = DSA(settings.dsa_strategy, settings.siamese) if settings.dsa else NoAugmentation()
    return evaluation.Protocol(augmentation, settings.epoch_eval_train, settings.batch_train, seed=settings.seed)
