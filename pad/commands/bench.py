"""What the commands have in common: the data as the networks see it, rankings and experts of it, where files go."""

import hashlib
import json
import logging
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from pad import evaluation
from pad.commands.common import Common
from pad.config import checkout
from pad.data.augment import DSA, NoAugmentation
from pad.data.images import ImageData
from pad.data.placement import Images, fits, place
from pad.data.preprocessing import Preprocessing, fit_preprocessing
from pad.data.sources import load_data
from pad.difficulty.methods import METHODS, RankingSource
from pad.difficulty.obtain import obtain_rankings, ranking_file, ranking_method
from pad.difficulty.ranking import Ranking
from pad.difficulty.training import ScoringSettings
from pad.distributed import ALONE, Ranks
from pad.errors import InputError
from pad.initialisation import Experts, initial_set
from pad.nn import networks
from pad.nn.derivatives import how_to_compile
from pad.nn.flat import FlatModel
from pad.store.trajectories import TrajectoryStore, buffer_folder, describe

log = logging.getLogger("pad")


@dataclass(frozen=True)
class Workbench:
    """The data as the networks see it, on the device, or handed to it in batches where they would fill it.

    Preprocessing happens when it is first asked for: whitening can take minutes, and what can be refused without it is
    refused before.
    """

    data: ImageData  # on the CPU
    device: torch.device
    zca: bool
    images_on: str = "auto"  # see pad.data.placement.place
    ranks: Ranks = ALONE  # all of them ask for the preprocessing at the same place

    @cached_property
    def preprocessing(self) -> Preprocessing:
        return self.ranks.on_main(self._fit)

    def _fit(self) -> Preprocessing:
        on_device = self.zca and fits(self.data.train_images.nbytes + self.data.test_images.nbytes, self.device)
        return fit_preprocessing(self.data.to(self.device) if on_device else self.data, self.zca).to(self.device)

    @cached_property
    def images(self) -> Images:
        return place(self.data.train_images, self.preprocessing, self.images_on)

    @cached_property
    def test_images(self) -> Images:
        return place(self.data.test_images, self.preprocessing, self.images_on)

    @cached_property
    def labels(self) -> Tensor:
        return self.data.train_labels.to(self.device)

    @cached_property
    def test_labels(self) -> Tensor:
        return self.data.test_labels.to(self.device)

    def network(self, name: str, seed: int, *stream: int | str) -> networks.Network:
        """A fresh network for these images, on the CPU."""
        return networks.build(name, self.data.channels, self.data.num_classes, self.data.size, seed, *stream)

    def flat_model(self, name: str, compile: str = "off", micro_batch: int | None = None) -> FlatModel:
        """A network for these images as a function of its flat parameters."""
        return FlatModel(self.network(name, 0), compile, micro_batch)

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

    def final_experts(self, folder: Path, name: str) -> Experts:
        """The trajectories' last networks, to label with. Raises InputError as :meth:`open_experts` does."""
        model = self.flat_model(name)
        store = self.open_experts(folder, name, model)
        store.check(self.describe(name, model))
        return Experts(model, lambda i: store.final(store.experts[i]).to(self.device), len(store))

    def settle_ranking(self, settings) -> Path:
        """The folder of rankings for ``settings.sort_method``, which is then spelled in one way: it is part of a recipe.

        Raises InputError for one that is not there and cannot be computed.
        """
        folder, wanted = rankings_folder(settings, settings.ranking_path), settings.sort_method or "GraNd"
        settings.sort_method = self.ranks.on_main(lambda: ranking_file(folder, self.data.name, wanted)).name
        self.network(ScoringSettings(**settings.scoring).model, 0)
        return folder

    def rankings(
        self, methods: Sequence[str], folder: Path, settings, *, convert_flat: bool = False, overwrite: bool = False
    ) -> dict[str, Ranking]:
        """The images' rankings, see :func:`pad.difficulty.obtain.obtain_rankings`, with a progress bar."""
        scoring = ScoringSettings(**settings.scoring)
        source = RankingSource(
            data=self.data,
            images=self.images,  # before there is a bar: preprocessing may take long
            labels=self.labels,
            preprocessing=self.preprocessing.identity,
            scoring=scoring,
            seed=settings.seed,
        )
        names = [ranking_method(self.data.name, ranking_file(folder, self.data.name, method)) for method in methods]
        kinds = [METHODS[name].kind for name in names if name in METHODS]
        mine = len(self.ranks.deal(range(scoring.repeats if "score" in kinds else 1)))  # an order is of one network
        with tqdm(
            total=mine * scoring.epochs,
            desc="ranking",
            unit="epoch",
            leave=False,
            delay=1,
            dynamic_ncols=True,
            disable=not self.ranks.is_main,
        ) as bar:

            def progress(repeat: int, epoch: int) -> None:
                """Networks that were trained before the command was interrupted are passed over."""
                bar.update(repeat // self.ranks.size * scoring.epochs + epoch + 1 - bar.n)

            return obtain_rankings(
                source,
                methods,
                folder,
                asked=settings.asked_scoring,
                convert_flat=convert_flat,
                overwrite=overwrite,
                progress=progress,
                ranks=self.ranks,
            )


def digest_of_rows(rows: Sequence[Tensor]) -> str:
    """Of a ranking: which image comes where in which class."""
    text = ";".join(",".join(map(str, row.tolist())) for row in rows)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def set_up(settings: Common, ranks: Ranks) -> Workbench:
    """Load the configured data set. Raises InputError when its files are not there or the network does not fit its images."""
    device = ranks.place(settings.torch_device())
    data = ranks.node_first(lambda: load_data(settings.dataset, settings.data_path, **settings.data_arguments))
    ranks.same(lambda: data.identity, f"the images of {data.name}")
    if settings.train_per_class:
        data = data.first_per_class(settings.train_per_class)
    networks.build(settings.model, data.channels, data.num_classes, data.size, 0)
    use_tf32(settings.tf32, device)
    return Workbench(data, device, settings.zca, settings.images_on, ranks)


def use_tf32(wanted: bool, device: torch.device) -> None:
    """Allow or forbid TF32, CUDA's float32 of 10 mantissa bits, in matrix products and convolutions of this process."""
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = wanted
    elif wanted:
        log.info("tf32 does nothing on a CPU")


def check_writable(folder: Path) -> None:
    """Raise InputError, before hours of work, when no files can be written to ``folder``; makes nothing."""
    parent = next(path for path in (folder, *folder.parents) if os.path.exists(path))
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        reason = "may not be written to" if parent.is_dir() else "is not a folder"
        raise InputError(f"nothing can be written to {folder}: {parent} {reason}")


def rankings_folder(settings: Common, path: str | None) -> Path:
    """Where the data set's ranking files lie: in ``path``, where one was given.

    Published names say the data set only, so rankings of other people's folders, and of parts, stay with their buffer.
    Raises InputError when there is none.
    """
    if path is not None:
        return Path(path)
    if settings.dataset != "ImageFolder" and not settings.train_per_class:
        return checkout() / "data_indices"
    if getattr(settings, "buffer_path", None) is None:
        option = "ranking_path" if hasattr(settings, "ranking_path") else "out"
        raise InputError(f"rankings of an ImageFolder, or of a part, need a folder of their own: give --{option}")
    return Path(settings.buffer_path) / "data_indices"


def experts_folder(settings: Common, data: ImageData, model: str | None = None) -> Path:
    """Where the trajectories of the configured data set and network lie."""
    return buffer_folder(
        settings.buffer_path, settings.dataset, model or settings.model, settings.zca, settings.subset, data.size[0]
    )


def evaluation_protocol(settings, device: torch.device, num_images: int, num_sets: int = 1) -> evaluation.Protocol:
    """How the configured evaluation networks are trained, on ``num_sets`` training sets of ``num_images`` each."""
    augmentation = DSA(settings.dsa_strategy, settings.siamese) if settings.dsa else NoAugmentation()
    steps = (settings.epoch_eval_train + 1) * math.ceil(num_images / settings.batch_train)
    compile = how_to_compile(settings.compile, device, num_sets * settings.num_eval * steps)
    return evaluation.Protocol(
        augmentation, settings.epoch_eval_train, settings.batch_train, seed=settings.seed, compile=compile
    )


def _initial_set(settings, bench: Workbench, experts: Experts | None = None, **labels) -> tuple[Tensor, Tensor]:
    num_classes = bench.data.num_classes
    return bench.ranks.on_main(
        lambda: initial_set(
            settings.pix_init, bench.images, bench.labels, num_classes, settings.ipc, experts, settings.seed, **labels
        )
    )


def _digest(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
