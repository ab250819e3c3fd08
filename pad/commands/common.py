"""What several commands ask."""

import dataclasses
import logging
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from typing_extensions import Self

from pad.config import (
    DATA,
    DETAIL,
    MODEL,
    PACE,
    PLACE,
    RECIPE,
    REPORT,
    SEED,
    Device,
    FilePath,
    NetworkName,
    Settings,
    checkout,
    cuda_device,
    setting,
)
from pad.data.augment import DSA, DSA_STRATEGY, Augmentation, NoAugmentation, refuse_unknown_kinds
from pad.difficulty.training import ScoringSettings
from pad.errors import InputError
from pad.experts.curriculum import ADD_SCHEDULES, REMOVALS, Curriculum
from pad.nn.networks import evaluation_pool
from pad.protocols import PROTOCOLS, Published

log = logging.getLogger("pad")

POOLS = ("S", "M", "W", "D", "A", "P", "N", "C", "BN", "X")  # of pad.nn.networks.evaluation_pool


@dataclass(frozen=True, kw_only=True)
class Common(Settings):
    """What every command asks: which data, which network, where to run."""

    dataset: str = setting("CIFAR10", "data set", DATA)
    subset: str | None = setting("imagenette", "ImageNet subset; read only when dataset is ImageNet", DATA)
    res: int | None = setting(
        None, "side of the images in pixels; default: the data set's own", DATA, low=4, memory=True
    )
    data_path: FilePath = setting("data", "folder of the data set", PLACE)
    train_per_class: int | None = setting(None, "use the first so many training images of each class only", DATA, low=1)
    zca: bool = setting(False, "ZCA whitening instead of mean/std", DATA)
    model: NetworkName = setting("ConvNet", "network: a name, torchvision:resnet18, or file.py:function", MODEL)
    seed: int = setting(0, "seed of every random decision", SEED, low=0, by_study=True)
    device: Device = setting("auto", "auto, cpu, cuda, cuda:1, or a list of CUDA devices as [0,1]", PLACE)
    # On, as torch has it for convolutions and so the published codes: factors are rounded to 10 bits. Of a matching
    # iteration of 80 steps the gradients keep a cosine of 0.99998 with those in float32.
    tf32: bool | None = setting(None, "networks compute in TF32: less exact, faster; default: on CUDA", DETAIL)
    images_on: str = setting(
        "auto",
        "where real images are kept; auto: on the device if they take at most half of its free memory",
        PLACE,
        choices=("auto", "device", "host"),
    )

    def resolved(self) -> Self:
        if self.tf32 is not None:
            return super().resolved()
        return dataclasses.replace(super().resolved(), tf32=self.device != "cpu" and torch.cuda.is_available())

    def torch_device(self) -> torch.device:
        """The device to run on: CUDA when it is there and not declined, else the CPU."""
        if self.device == "cpu" or (not torch.cuda.is_available() and not self.device.startswith("cuda")):
            return torch.device("cpu")
        asked = f"device: {self.device} was asked for, but"
        if not torch.cuda.is_available():
            raise InputError(f"{asked} no CUDA device is available; use device: cpu or auto")
        wanted = torch.device("cuda", 0) if self.device in ("auto", "cuda") else cuda_device(self.device)
        if wanted.index >= torch.cuda.device_count():
            raise InputError(f"{asked} there are {torch.cuda.device_count()} CUDA devices")
        return wanted


@dataclass(frozen=True, kw_only=True)
class Training(Common):
    """What the three stages ask about training."""

    dsa: bool = setting(True, "differentiable Siamese augmentation", RECIPE)
    dsa_strategy: str = setting(DSA_STRATEGY, "DSA's transformations, one of which is drawn per batch", RECIPE)
    siamese: bool = setting(False, "all images of a batch share DSA's random numbers", RECIPE)
    batch_train: int = setting(256, "batch size for training networks", RECIPE, low=1, memory=True)
    compile: str = setting(
        "auto",
        "on: torch.compile; fused: own kernels for ConvNets; auto: on for CUDA; on a CPU fused, or on in long runs",
        PACE,
        choices=("auto", "on", "off", "fused"),
    )

    def check(self) -> None:
        super().check()
        refuse_unknown_kinds("dsa_strategy", self.dsa_strategy)

    def augmentation(self, otherwise: Augmentation | None = None) -> Augmentation:
        """DSA as configured; without it, ``otherwise``, or none."""
        return DSA(self.dsa_strategy, self.siamese) if self.dsa else otherwise or NoAugmentation()


@dataclass(frozen=True, kw_only=True)
class Scoring(Common, ABC):
    """How difficulty is scored: the fields of :class:`ScoringSettings`, under names that a subclass chooses."""

    scoring_prefix = ""  # of those names

    @property
    def scoring(self) -> ScoringSettings:
        """How the scoring networks are trained."""
        return self.fill(ScoringSettings, self.scoring_prefix, model=getattr(self, "score_model", None) or self.model)

    @property
    def asked_scoring(self) -> set[str]:
        """Fields of it that were given: a ranking that is there must have been made with these."""
        return {field.name for field in fields(ScoringSettings) if self.scoring_prefix + field.name in self.given}

    @property
    @abstractmethod
    def rankings_folder(self) -> Path:
        """Where the data set's ranking files lie. Raises InputError when there is no place for them."""

    def folder_of_rankings(self, path: str | None, buffer_path: str | None = None, *, option: str) -> Path:
        """``path``, where one was given.

        Published names say the data set only, so rankings of other people's folders, and of parts, stay with their
        buffer; without one the sentence asks for ``option``.
        """
        if path is not None:
            return Path(path)
        if self.dataset != "ImageFolder" and not self.train_per_class:
            return checkout() / "data_indices"
        if buffer_path is None:
            raise InputError(f"rankings of an ImageFolder, or of a part, need a folder of their own: give --{option}")
        return Path(buffer_path) / "data_indices"

    def check(self) -> None:
        super().check()
        augmentation = self.scoring_prefix + "augmentation"
        if getattr(self, augmentation) != "none":
            refuse_unknown_kinds(augmentation, getattr(self, augmentation))


@dataclass(frozen=True, kw_only=True)
class Ranked(Scoring):
    """What the commands ask that use a difficulty ranking: where it is, and how to compute one that is not there."""

    ranking_path: FilePath | None = setting(
        None,
        "folder of ranking files; default: data_indices in the checkout; of an ImageFolder or a part: in buffer_path",
        PLACE,
        by_study=True,
    )
    convert_flat: bool = setting(
        False, "read a flat ranking file, hardest first: turn it round, group it by class", DETAIL
    )
    score_model: NetworkName | None = setting(None, "network that scores difficulty; default: the model", DETAIL)
    score_repeats: int = setting(10, "networks to average difficulty over", DETAIL, low=1)
    score_epochs: int = setting(40, "epochs to train a scoring network", DETAIL, low=1)
    score_lr: float = setting(0.1, "learning rate of the scoring networks", DETAIL, above=0)
    score_momentum: float = setting(0.9, "Nesterov momentum of the scoring networks", DETAIL, low=0, below=1)
    score_weight_decay: float = setting(5e-4, "weight decay of the scoring networks", DETAIL, low=0)
    score_batch: int = setting(256, "batch size of the scoring networks", DETAIL, low=1, memory=True)
    score_augmentation: str = setting("none", "of the scoring networks: none, or a DSA strategy as crop_flip", DETAIL)

    scoring_prefix = "score_"

    @property
    def rankings_folder(self) -> Path:
        return self.folder_of_rankings(self.ranking_path, getattr(self, "buffer_path", None), option="ranking_path")


@dataclass(frozen=True, kw_only=True)
class OnCurriculum(Common):
    """Which images experts see in which epoch."""

    train_epochs: int = setting(50, "epochs per expert", RECIPE, low=1)
    init_ratio: float = setting(1.0, "share of each class, easiest first, to start with", RECIPE, above=0, high=1)
    add_end_epoch: int = setting(100, "epoch at which all images are in", RECIPE, low=0)
    add_schedule: str = setting(
        "linear", "how it grows; root: most at the beginning, geometric: at the end", RECIPE, choices=ADD_SCHEDULES
    )
    rm_epoch_first: int = setting(40, "after this epoch the easiest images are left out", RECIPE, low=0)
    rm_epoch_second: int = setting(60, "after this epoch the second share is left out", RECIPE, low=0)
    rm_easy_ratio_first: float = setting(0.1, "share left out in the first removal", RECIPE, low=0, below=1)
    rm_easy_ratio_second: float = setting(0.1, "share left out in the second removal", RECIPE, low=0, below=1)
    removal: str = setting(
        "step", "from the first share to the second at once, or epoch by epoch", RECIPE, choices=REMOVALS
    )

    def check(self) -> None:
        super().check()
        if self.rm_epoch_second < self.rm_epoch_first:
            raise InputError(
                f"rm_epoch_second: {self.rm_epoch_second} comes before rm_epoch_first: {self.rm_epoch_first}"
            )

    @property
    def curriculum(self) -> Curriculum:
        return self.fill(Curriculum)


@dataclass(frozen=True, kw_only=True)
class Evaluating(Training):
    """What the second and third stage ask about evaluation."""

    batch_train: int = setting(256, "batch size for training networks", REPORT, low=1, memory=True)
    eval_mode: str = setting("S", f"evaluation pool: {', '.join(POOLS)}; anything else: the model itself", REPORT)
    networks: NetworkName = setting(
        "",
        "networks to evaluate, as ConvNet,torchvision:resnet18,my.py:net; default: those of eval_mode",
        REPORT,
        later=True,
    )
    num_eval: int = setting(5, "networks to train per evaluation", REPORT, low=1)
    epoch_eval_train: int = setting(1000, "epochs to train an evaluation network", REPORT, low=1)
    together: int | None = setting(  # changes rounding alone
        None, "evaluation networks to train at once; default: on CUDA all, on a CPU one", PLACE, low=1, memory=True
    )

    @property
    def published(self) -> Published:
        """The evaluation that networks are trained by, but for what is set otherwise."""
        return PROTOCOLS["mtt"]

    @property
    def pool(self) -> list[str]:
        """The networks to evaluate."""
        return words(self.networks) or evaluation_pool(self.eval_mode, self.model)

    def check(self) -> None:
        super().check()
        if self.networks and "eval_mode" in self.given:
            log.warning("eval_mode does nothing: networks names those to evaluate")
        elif self.eval_mode not in POOLS:
            log.warning(
                "eval_mode: %s is none of %s, so the model itself is evaluated", self.eval_mode, ", ".join(POOLS)
            )


@dataclass(frozen=True, kw_only=True)
class ByProtocol(Evaluating):
    """Whose evaluation it is. What that says holds where nobody gives another value."""

    protocol: str = setting(
        "mtt", "evaluation of MTT, DATM and PAD, or another published one", REPORT, choices=tuple(PROTOCOLS), later=True
    )

    @property
    def published(self) -> Published:
        return PROTOCOLS[self.protocol]

    def resolved(self) -> Self:
        if self.protocol == "mtt":  # whose values are the defaults
            return super().resolved()
        said = self.published
        values: dict = {"epoch_eval_train": said.epochs, "batch_train": said.batch_size}
        if said.dsa_strategy is not None:
            values |= {"dsa": True, "dsa_strategy": said.dsa_strategy}
        others = {name: value for name, value in values.items() if name not in self.given}
        return dataclasses.replace(super().resolved(), **others)


def words(text: str) -> list[str]:
    """The words of a comma-separated list, each once, in order."""
    return list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
