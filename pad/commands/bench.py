"""The data as the networks see it, with the rankings and experts of it: what all commands work on."""

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from pad.commands.common import Common, Evaluating, Scoring
from pad.data.augment import DC
from pad.data.images import ImageData
from pad.data.placement import Images, fits, full_precision, place
from pad.data.preprocessing import Preprocessing, fit_preprocessing
from pad.data.sources import data_set, load_data
from pad.difficulty.methods import METHODS, RankingSource
from pad.difficulty.obtain import obtain_rankings, ranking_file, ranking_method
from pad.difficulty.ranking import Ranking
from pad.distributed import ALONE, Ranks
from pad.errors import InputError
from pad.evaluation import Evaluation
from pad.initialisation import Experts
from pad.nn import networks
from pad.nn.derivatives import how_to_compile
from pad.nn.flat import FlatModel
from pad.protocols import Protocol, Schedule
from pad.store.identity import digest
from pad.store.trajectories import TrajectoryStore, buffer_folder, describe

log = logging.getLogger("pad")


@dataclass(frozen=True, kw_only=True)
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

    @cached_property
    def student(self) -> dict[tuple, FlatModel]:
        """That of the run that was last worked on here, by what it is of."""
        return {}

    @property
    def classes(self) -> list[Tensor]:
        """For each class the data-set indices of its training images, on the CPU, in their order."""
        return [(self.data.train_labels == c).nonzero().flatten() for c in range(self.data.num_classes)]

    # networks

    def network(self, name: str, seed: int, *stream: int | str) -> networks.AnyNetwork:
        """A fresh network for these images, on the CPU. Raises InputError for one that does not fit them."""
        return networks.build(name, self.data.channels, self.data.num_classes, self.data.size, seed, *stream)

    def refuse_unfit(self, names: Iterable[str]) -> None:
        """Raise InputError for a name that is not a network's, and for a network that does not fit these images."""
        names = list(names)
        self.ranks.same(lambda: names, "the files of networks")
        for name in names:
            self.network(name, 0)

    def flat_model(self, name: str, compile: str = "off", micro_batch: int | None = None) -> FlatModel:
        """A network for these images as a function of its flat parameters."""
        return FlatModel(self.network(name, 0).to(self.device), compile, micro_batch)

    def protocol(self, settings: Evaluating, num_images: int, num_sets: int = 1) -> Protocol:
        """How the configured evaluation networks are trained, on ``num_sets`` sets of ``num_images`` each.

        Without DSA they are augmented as in DC's code: those for MNIST and ConvNetBN only.
        """
        published = settings.published
        said = {each.name: getattr(published, each.name) for each in fields(Schedule)}
        said |= {"epochs": settings.epoch_eval_train, "batch_size": settings.batch_train}
        steps = (settings.epoch_eval_train + published.extra) * math.ceil(num_images / settings.batch_train)
        return Protocol(
            augmentation=settings.augmentation(otherwise=DC() if settings.dataset == "MNIST" else None),
            own={} if settings.dsa else {"ConvNetBN": DC("crop_noise")},
            seed=settings.seed,
            compile=how_to_compile(settings.compile, self.device, num_sets * settings.num_eval * steps),
            together=settings.together or (settings.num_eval if self.device.type == "cuda" else 1),
            **said,
        )

    def evaluation(self, protocol: Protocol) -> Evaluation:
        """Trains networks by ``protocol``, and tests them on the test images."""
        return Evaluation(
            protocol=protocol, test_images=self.test_images, test_labels=self.test_labels, ranks=self.ranks
        )

    # experts

    def experts_folder(self, buffer_path: Path | str, model: str) -> Path:
        """Where the trajectories of network ``model`` on these images lie."""
        dataset, _, subset = self.data.name.partition("/")
        return buffer_folder(buffer_path, dataset, model, self.zca, subset or None, self.data.size[0])

    def describe(self, name: str, model: FlatModel, preprocessing: dict | None = None) -> dict:
        """What trajectories of ``model``, called ``name``, on these images belong to.

        ``preprocessing``: the identity of another than that of these images, which may not be known yet.
        """
        seen = self.preprocessing.identity if preprocessing is None else preprocessing
        return describe(self.data.identity, name, zip(model.names, model.shapes), seen)

    def open_experts(self, folder: Path, name: str, model: FlatModel) -> TrajectoryStore:
        """The trajectories in ``folder``. Raises InputError when they are of other images or another network.

        The preprocessing, which may not be known yet, is left to ``store.refuse_other(bench.describe(...))``.
        """
        store = TrajectoryStore.open(folder)
        store.refuse_other(self.describe(name, model, store.metadata["preprocessing"]))
        return store

    def labellers(self, buffer_path: Path | str, name: str, epoch: int = -1) -> Experts:
        """The networks ``name`` of the trajectories at ``epoch`` (-1: the last), to label with.

        Raises InputError as :meth:`open_experts` does, and for an epoch that an expert does not have.
        """
        model = self.flat_model(name)
        store = self.open_experts(self.experts_folder(buffer_path, name), name, model)
        store.refuse_other(self.describe(name, model))
        return experts_at(store, model, store.experts, epoch, self.device)

    # rankings

    def ranking_stems(self, settings: Scoring, methods: Sequence[str]) -> list[str]:
        """The names in files of the rankings by ``methods``, however they were spelled, as "CIFAR10_GraNd".

        Raises InputError for one that is not there and cannot be computed.
        """
        folder = settings.rankings_folder
        stems = self.ranks.on_main(lambda: [ranking_file(folder, self.data.name, method).name for method in methods])
        self.refuse_unfit([settings.scoring.model])
        return stems

    def rankings(self, settings: Scoring, methods: Sequence[str], **options: bool) -> dict[str, Ranking]:
        """These images' rankings, read or computed, with a progress bar.

        ``options``: see :func:`pad.difficulty.obtain.obtain_rankings`.
        """
        scoring = settings.scoring
        folder = settings.rankings_folder
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
        with (
            full_precision(),
            progress_bar(self.ranks, mine * scoring.epochs, "ranking", "epoch", leave=False, delay=1) as bar,
        ):

            def progress(repeat: int, epoch: int) -> None:
                """Networks that were trained before the command was interrupted are passed over."""
                bar.update(repeat // self.ranks.size * scoring.epochs + epoch + 1 - bar.n)

            return obtain_rankings(
                source, methods, folder, asked=settings.asked_scoring, progress=progress, ranks=self.ranks, **options
            )


def refuse_no_epoch(epoch: int, epochs: int, what: str) -> None:
    """Raise InputError where ``epoch``, which counts from the end where it is negative, is none of ``epochs``."""
    if not -epochs - 1 <= epoch <= epochs:
        raise InputError(f"Label_Model_Timestamp: {epoch} is not an epoch of {what}, which has {epochs}")


def experts_at(
    store: TrajectoryStore, model: FlatModel, experts: list[int], epoch: int, device: torch.device
) -> Experts:
    """The networks of ``experts`` at ``epoch`` (-1: the last). Raises InputError where one does not have it."""
    for k in experts:
        refuse_no_epoch(epoch, store.epochs(k), f"expert {k}")

    def parameters(i: int) -> Tensor:
        k = experts[i]
        return store.rows(k, [epoch % (store.epochs(k) + 1)])[0].to(device)

    about = digest([[store.header(k), epoch] for k in experts])
    return Experts(model=model, parameters=parameters, count=len(experts), digest=about)


def set_up(settings: Common, ranks: Ranks) -> Workbench:
    """Load the configured data set. Raises InputError when its files are not there or the network does not fit them."""
    device = ranks.place(settings.torch_device())
    subset = settings.subset if data_set(settings.dataset).subsets else None
    data = ranks.node_first(lambda: load_data(settings.dataset, settings.data_path, subset=subset, res=settings.res))
    ranks.same(lambda: data.identity, f"the images of {data.name}")
    if settings.train_per_class:
        data = data.first_per_class(settings.train_per_class)
    bench = Workbench(data=data, device=device, zca=settings.zca, images_on=settings.images_on, ranks=ranks)
    bench.refuse_unfit([settings.model])
    use_tf32(bool(settings.tf32), device)
    return bench


def use_tf32(wanted: bool, device: torch.device) -> None:
    """Allow or forbid TF32, CUDA's float32 of 10 mantissa bits, in matrix products and convolutions of this process."""
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = wanted
    elif wanted:
        log.info("tf32 does nothing on a CPU")


def progress_bar(ranks: Ranks, total: int, doing: str, unit: str, **options) -> tqdm:
    """A bar on stderr, of the main rank alone."""
    return tqdm(total=total, desc=doing, unit=unit, dynamic_ncols=True, disable=not ranks.is_main, **options)


def identity_of_set(bench: Workbench, settings: Common) -> Mapping:
    """What a set made on this bench says of itself, whatever made it."""
    return {
        "data": bench.data.identity,
        "class_names": list(bench.data.class_names),
        "model": settings.model,
        "seed": settings.seed,
    }
