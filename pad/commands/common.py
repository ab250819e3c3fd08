"""What several commands ask."""

import logging
from dataclasses import dataclass

import torch

from pad.config import Device, FilePath, Settings, cuda_device, setting
from pad.data.augment import DSA, DSA_STRATEGY
from pad.errors import InputError
from pad.experts.curriculum import ADD_SCHEDULES, REMOVALS

log = logging.getLogger("pad")

POOLS = ("S", "M", "W", "D", "A", "P", "N", "C", "BN")  # of pad.networks.evaluation_pool


@dataclass(kw_only=True)
class Common(Settings):
    """What every command asks: which data, which network, where to run."""

    dataset: str = setting("CIFAR10", "data set")
    subset: str | None = setting("imagenette", "ImageNet subset; read only when dataset is ImageNet")
    res: int | None = setting(None, "side of the images in pixels; default: the data set's own", low=4)
    data_path: FilePath = setting("data", "folder of the data set")
    train_per_class: int | None = setting(None, "use the first so many training images of each class only", low=1)
    zca: bool = setting(False, "ZCA whitening instead of mean/std")
    model: str = setting("ConvNet", "network")
    seed: int = setting(0, "seed of every random decision", low=0)
    device: Device = setting("auto", "auto, cpu, cuda, cuda:1, or a list of CUDA devices as [0,1]")
    # Off although torch allows it in convolutions: float32 is the reference, which cards that have TF32 would otherwise
    # miss by a thousandth (factors are rounded to 10 bits), and the gradients go through tens of steps.
    tf32: bool = setting(False, "on CUDA, compute in TF32: faster, and less exact")
    images_on: str = setting(
        "auto",
        "where real images are kept; auto: on the device if they take at most half of its free memory",
        choices=("auto", "device", "host"),
    )

    @property
    def data_arguments(self) -> dict:
        """Keyword arguments of :func:`pad.data.load_data`."""
        return {"subset": self.subset if self.dataset == "ImageNet" else None, "res": self.res}

    def torch_device(self) -> torch.device:
        """The device to run on: CUDA when it is there and not declined, else the CPU."""
        if self.device == "cpu" or (not torch.cuda.is_available() and not self.device.startswith("cuda")):
            return torch.device("cpu")
        if not torch.cuda.is_available():
            raise InputError(
                f"device: {self.device} was asked for, but no CUDA device is available; use device: cpu or auto"
            )
        wanted = torch.device("cuda", 0) if self.device in ("auto", "cuda") else cuda_device(self.device)
        if wanted.index >= torch.cuda.device_count():
            raise InputError(
                f"device: {self.device} was asked for, but there are {torch.cuda.device_count()} CUDA devices"
            )
        return wanted


@dataclass(kw_only=True)
class _Stage(Common):
    """What the three stages ask about training."""

    dsa: bool = setting(True, "differentiable Siamese augmentation")
    dsa_strategy: str = setting(DSA_STRATEGY, "DSA's transformations, one of which is drawn per batch")
    siamese: bool = setting(False, "all images of a batch share DSA's random numbers")
    batch_train: int = setting(256, "batch size for training networks", low=1)
    compile: str = setting(
        "auto",
        "on: by torch.compile; fused: by the CPU kernels for ConvNets; auto: on for CUDA; on a CPU fused, or on in long runs",
        choices=("auto", "on", "off", "fused"),
    )

    def check(self) -> None:
        super().check()
        DSA(self.dsa_strategy)


_SCORING = ("model", "repeats", "epochs", "lr", "momentum", "weight_decay", "batch", "augmentation")


@dataclass(kw_only=True)
class _Ranked(Common):
    """What the commands ask that use a difficulty ranking: where it is, and how to compute one that is not there."""

    ranking_path: FilePath | None = setting(
        None,
        "folder of ranking files; default: data_indices in the checkout; of an ImageFolder or a part, which have none "
        "there: in buffer_path, where the command has one",
    )
    convert_flat: bool = setting(False, "read a flat ranking file, hardest first, turned round and grouped by class")
    score_model: str | None = setting(None, "network that scores difficulty; default: the model")
    score_repeats: int = setting(10, "networks to average difficulty over", low=1)
    score_epochs: int = setting(40, "epochs to train a scoring network", low=1)
    score_lr: float = setting(0.1, "learning rate of the scoring networks", above=0)
    score_momentum: float = setting(0.9, "Nesterov momentum of the scoring networks", low=0, below=1)
    score_weight_decay: float = setting(5e-4, "weight decay of the scoring networks", low=0)
    score_batch: int = setting(256, "batch size of the scoring networks", low=1)
    score_augmentation: str = setting("none", "of the scoring networks: none, or a DSA strategy as crop_flip")

    @property
    def scoring(self) -> dict:
        """Keyword arguments of :class:`pad.difficulty.training.ScoringSettings`."""
        scoring = {name: getattr(self, f"score_{name}") for name in _SCORING}
        return scoring | {"model": self.score_model or self.model}

    @property
    def asked_scoring(self) -> set[str]:
        """Those of them that were given: a ranking that is there must have been made with these."""
        return {name for name in _SCORING if f"score_{name}" in self.given}


@dataclass(kw_only=True)
class _Curriculum(Common):
    """Which images experts see in which epoch."""

    train_epochs: int = setting(50, "epochs per expert", low=1)
    init_ratio: float = setting(1.0, "share of each class, easiest first, that training starts with", above=0, high=1)
    add_end_epoch: int = setting(100, "epoch at which all images are in", low=0)
    add_schedule: str = setting(
        "linear", "how that share grows; root adds most at the beginning, geometric at the end", choices=ADD_SCHEDULES
    )
    rm_epoch_first: int = setting(40, "after this epoch the easiest images are left out", low=0)
    rm_epoch_second: int = setting(60, "after this epoch the second share is left out", low=0)
    rm_easy_ratio_first: float = setting(0.1, "share left out in the first removal", low=0, below=1)
    rm_easy_ratio_second: float = setting(0.1, "share left out in the second removal", low=0, below=1)
    removal: str = setting(
        "step", "how it goes from the first share to the second: at once, or epoch by epoch", choices=REMOVALS
    )

    def check(self) -> None:
        super().check()
        if self.rm_epoch_second < self.rm_epoch_first:
            raise InputError(
                f"rm_epoch_second: {self.rm_epoch_second} comes before rm_epoch_first: {self.rm_epoch_first}"
            )

    @property
    def curriculum(self) -> dict:
        """Keyword arguments of :class:`pad.experts.curriculum.Curriculum`."""
        names = ("init_ratio", "add_end_epoch", "add_schedule", "rm_epoch_first", "rm_epoch_second")
        names += ("rm_easy_ratio_first", "rm_easy_ratio_second", "removal")
        return {name: getattr(self, name) for name in names}


@dataclass(kw_only=True)
class _Evaluating(_Stage):
    """What the second and third stage ask about evaluation."""

    eval_mode: str = setting("S", "evaluation pool: S, M, W, D, A, P, N, C, BN; anything else: the model itself")
    num_eval: int = setting(5, "networks to train per evaluation", low=1)
    epoch_eval_train: int = setting(1000, "epochs to train an evaluation network", low=1)

    def check(self) -> None:
        super().check()
        if self.eval_mode not in POOLS:
            log.warning(
                "eval_mode: %s is none of %s, so the model itself is evaluated", self.eval_mode, ", ".join(POOLS)
            )


def _words(text: str) -> list[str]:
    """The words of a comma-separated list, each once, in order."""
    return list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
