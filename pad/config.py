"""The settings of every command: typed, checked, from a YAML file and the command line.

Keys and flags are the published ones, so published files and commands run unchanged; ours stand beside them. The
command line overrides the file, the file overrides the defaults. Anything unknown or out of range is an InputError.
"""

import argparse
import dataclasses
import difflib
import logging
import math
import os
import re
import reprlib
import typing
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml

from pad.data.augment import DSA, DSA_STRATEGY
from pad.errors import InputError
from pad.experts.curriculum import ADD_SCHEDULES, REMOVALS

log = logging.getLogger("pad")

POOLS = ("S", "M", "W", "D", "A", "P", "N", "C", "BN")  # of pad.networks.evaluation_pool

Device = typing.NewType("Device", str)  # "auto", "cpu", "cuda", "cuda:1", or the published list, as [0, 1]
FilePath = typing.NewType("FilePath", str)  # relative ones in a YAML file: see _path_base


def _setting(default, help: str, low=None, above=None, high=None, below=None, choices=None):
    """A settings field: its default, what it is, and the range of numbers or the words it may take."""
    limits = dict(low=low, above=above, high=high, below=below, choices=choices)
    return dataclasses.field(default=default, metadata={"help": help, **limits})


@dataclass(kw_only=True)
class Common:
    """What every command asks: which data, which network, where to run."""

    dead = {}  # keys that are accepted and do nothing, and why
    given = frozenset()  # names of the settings that somebody gave, see :func:`parse`

    dataset: str = _setting("CIFAR10", "data set")
    subset: str | None = _setting("imagenette", "ImageNet subset; read only when dataset is ImageNet")
    res: int | None = _setting(None, "side of the images in pixels; default: the data set's own", low=4)
    data_path: FilePath = _setting("data", "folder of the data set")
    train_per_class: int | None = _setting(None, "use the first so many training images of each class only", low=1)
    zca: bool = _setting(False, "ZCA whitening instead of mean/std")
    model: str = _setting("ConvNet", "network")
    seed: int = _setting(0, "seed of every random decision", low=0)
    device: Device = _setting("auto", "auto, cpu, cuda, cuda:1, or a list of CUDA devices as [0,1]")
    # Off although torch allows it in convolutions: float32 is the reference, which cards that have TF32 would otherwise
    # miss by a thousandth (factors are rounded to 10 bits), and the gradients go through tens of steps.
    tf32: bool = _setting(False, "on CUDA, compute in TF32: faster, and less exact")
    images_on: str = _setting(
        "auto", "where real images are kept; auto: on the device if they take at most half of its free memory",
        choices=("auto", "device", "host"),
    )  # fmt: skip

    def check(self) -> None:
        """Raise InputError when settings do not go together."""

    @property
    def data_arguments(self) -> dict:
        """Keyword arguments of :func:`pad.data.load_data`."""
        return {"subset": self.subset if self.dataset == "ImageNet" else None, "res": self.res}

    def torch_device(self) -> torch.device:
        """The device to run on: CUDA when it is there and not declined, else the CPU."""
        if self.device == "cpu" or (not torch.cuda.is_available() and not self.device.startswith("cuda")):
            return torch.device("cpu")
        if not torch.cuda.is_available():
            raise InputError(f"device: {self.device} was asked for, but no CUDA device is available; use device: cpu or auto")
        wanted = torch.device("cuda", 0) if self.device in ("auto", "cuda") else _cuda_device(self.device)
        if wanted.index >= torch.cuda.device_count():
            raise InputError(f"device: {self.device} was asked for, but there are {torch.cuda.device_count()} CUDA devices")
        return wanted

    def adopt(self, values: dict) -> None:
        """Take over settings from elsewhere, checked like those of a file. Raises InputError as :func:`parse`."""
        fields = {field.name: field for field in dataclasses.fields(self)}
        hints = typing.get_type_hints(type(self))
        for name, value in values.items():
            setattr(self, name, _coerce(fields[name], hints[name], value))
        self.check()

    def as_dict(self) -> dict:
        """All settings as plain values, in the order of declaration."""
        return dataclasses.asdict(self)


@dataclass(kw_only=True)
class _Stage(Common):
    """What the three stages ask about training."""

    dsa: bool = _setting(True, "differentiable Siamese augmentation")
    dsa_strategy: str = _setting(DSA_STRATEGY, "DSA's transformations, one of which is drawn per batch")
    siamese: bool = _setting(False, "all images of a batch share DSA's random numbers")
    batch_train: int = _setting(256, "batch size for training networks", low=1)
    compile: str = _setting(
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

    ranking_path: FilePath | None = _setting(
        None, "folder of ranking files; default: data_indices in the checkout; of an ImageFolder or a part: in buffer_path"
    )
    convert_flat: bool = _setting(False, "read a flat ranking file, hardest first, turned round and grouped by class")
    score_model: str | None = _setting(None, "network that scores difficulty; default: the model")
    score_repeats: int = _setting(10, "networks to average difficulty over", low=1)
    score_epochs: int = _setting(40, "epochs to train a scoring network", low=1)
    score_lr: float = _setting(0.1, "learning rate of the scoring networks", above=0)
    score_momentum: float = _setting(0.9, "Nesterov momentum of the scoring networks", low=0, below=1)
    score_weight_decay: float = _setting(5e-4, "weight decay of the scoring networks", low=0)
    score_batch: int = _setting(256, "batch size of the scoring networks", low=1)
    score_augmentation: str = _setting("none", "of the scoring networks: none, or a DSA strategy as crop_flip")

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

    train_epochs: int = _setting(50, "epochs per expert", low=1)
    init_ratio: float = _setting(1.0, "share of each class, easiest first, that training starts with", above=0, high=1)
    add_end_epoch: int = _setting(100, "epoch at which all images are in", low=0)
    add_schedule: str = _setting(
        "linear", "how that share grows; root adds most at the beginning, geometric at the end", choices=ADD_SCHEDULES
    )
    rm_epoch_first: int = _setting(40, "after this epoch the easiest images are left out", low=0)
    rm_epoch_second: int = _setting(60, "after this epoch the second share is left out", low=0)
    rm_easy_ratio_first: float = _setting(0.1, "share left out in the first removal", low=0, below=1)
    rm_easy_ratio_second: float = _setting(0.1, "share left out in the second removal", low=0, below=1)
    removal: str = _setting(
        "step", "how it goes from the first share to the second: at once, or epoch by epoch", choices=REMOVALS
    )

    def check(self) -> None:
        super().check()
        if self.rm_epoch_second < self.rm_epoch_first:
            raise InputError(f"rm_epoch_second: {self.rm_epoch_second} comes before rm_epoch_first: {self.rm_epoch_first}")

    @property
    def curriculum(self) -> dict:
        """Keyword arguments of :class:`pad.experts.curriculum.Curriculum`."""
        names = ("init_ratio", "add_end_epoch", "add_schedule", "rm_epoch_first", "rm_epoch_second")
        names += ("rm_easy_ratio_first", "rm_easy_ratio_second", "removal")
        return {name: getattr(self, name) for name in names}


@dataclass(kw_only=True)
class BufferSettings(_Stage, _Ranked, _Curriculum):
    """Stage 1, ``buffer/buffer_CL.py``: rank the real images, train experts on the curriculum, record their trajectories."""

    num_experts: int = _setting(100, "experts to train", low=1)
    lr_teacher: float = _setting(0.01, "learning rate of the experts", above=0)
    mom: float = _setting(0.0, "momentum", low=0, below=1)
    l2: float = _setting(0.0, "weight decay", low=0)
    rho_max: float = _setting(2.0, "GSAM's radius", low=0)
    rho_min: float = _setting(2.0, "must equal rho_max: the learning rate is constant, and rho follows it", low=0)
    alpha: float = _setting(0.4, "weight of GSAM's surrogate-gap term", low=0)
    adaptive: bool = _setting(True, "scale GSAM's perturbation by the parameters (ASAM)")
    buffer_path: FilePath = _setting("./buffers", "folder of the trajectories")
    eval_every: int = _setting(1, "epochs between measurements of test accuracy; 0: never", low=0)
    micro_batch: int | None = _setting(None, "compute on so many images at a time: less memory, the same result", low=1)

    sort_method: str = _setting("", "difficulty method, or a ranking file's stem as CIFAR10_GraNd; default: GraNd")

    dead = {
        "batch_real": "nothing reads it",
        "add_hard": "the ratios and epochs alone define the curriculum",
        "rm_easy": "the ratios and epochs alone define the curriculum",
        "max_ratio": "the ratios and epochs alone define the curriculum",
        "decay": "the learning rate is constant",
        "save_interval": "a file holds one expert; scripts/export_buffer.py writes the published files of several",
    }

    def check(self) -> None:
        super().check()
        if self.rho_max != self.rho_min:
            raise InputError(
                f"rho_max: {self.rho_max:g} differs from rho_min: {self.rho_min:g}, but the learning rate is constant, "
                "so rho has nothing to follow; give both the same value"
            )


@dataclass(kw_only=True)
class _Evaluating(_Stage):
    """What the second and third stage ask about evaluation."""

    eval_mode: str = _setting("S", "evaluation pool: S, M, W, D, A, P, N, C, BN; anything else: the model itself")
    num_eval: int = _setting(5, "networks to train per evaluation", low=1)
    epoch_eval_train: int = _setting(1000, "epochs to train an evaluation network", low=1)

    def check(self) -> None:
        super().check()
        if self.eval_mode not in POOLS:
            log.warning("eval_mode: %s is none of %s, so the model itself is evaluated", self.eval_mode, ", ".join(POOLS))


@dataclass(kw_only=True)
class DistillSettings(_Evaluating):
    """Stage 2, ``distill/PAD.py``: optimise synthetic images, soft labels and a learning rate."""

    ipc: int = _setting(1, "synthetic images per class", low=1)
    data_path: FilePath = _setting("../dataset/", "folder of the data set")
    buffer_path: FilePath = _setting("../buffer_storage/", "folder of the trajectories")
    zca: bool = _setting(True, "ZCA whitening instead of mean/std")

    Iteration: int = _setting(5000, "outer iterations 0..Iteration", low=0)
    syn_steps: int = _setting(80, "inner steps on the synthetic set per outer iteration", low=1)
    expert_epochs: int = _setting(2, "epochs of the expert to match", low=1)
    batch_syn: int | None = _setting(256, "synthetic images per inner step; the whole set when larger or none", low=1)
    min_start_epoch: int = _setting(0, "first start epoch", low=0)
    max_start_epoch: int = _setting(25, "start epochs lie below this one", low=1)
    Sequential_Generation: bool = _setting(True, "widen the range of start epochs gradually")
    current_max_start_epoch: int = _setting(20, "upper bound of the start epochs at iteration 0", low=1)
    expansion_end_epoch: int = _setting(3000, "iteration at which the bound reaches max_start_epoch", low=1)
    depth_ratio: float = _setting(0.0, "share of parameters, shallow to deep, that matching leaves out", low=0, below=1)
    loss_ratio: float = _setting(0.0, "share of parameters with the smallest error that matching leaves out", low=0, below=1)
    threshold: float = _setting(1.0, "iterations with a larger loss change nothing", above=0)
    no_aug: bool = _setting(False, "no augmentation while matching")
    max_bad_iterations: int = _setting(10, "stop after so many iterations in a row without a finite gradient", low=1)

    lr_img: float = _setting(1000.0, "learning rate of the images", low=0)
    lr_y: float = _setting(2.0, "learning rate of the labels", low=0)
    Momentum_y: float = _setting(0.9, "momentum of the labels", low=0, below=1)
    lr_teacher: float = _setting(0.01, "initial value of the learned learning rate", above=0)
    lr_lr: float = _setting(1e-5, "learning rate of the learning rate", low=0)
    micro_batch: int | None = _setting(None, "compute on so many images at a time: less memory, the same result", low=1)

    pix_init: str = _setting(
        "samples_predicted_correctly", "initial images", choices=("samples_predicted_correctly", "real", "noise")
    )
    noise_logit: float = _setting(10.0, "pix_init noise: logit of the class in the initial labels (others 0)", above=0)
    Initialize_Label_With_Another_Model: bool = _setting(False, "initial labels from another network's trajectories")
    Initialize_Label_Model: str = _setting("", "that other network")
    Label_Model_Timestamp: int = _setting(-1, "epoch of the experts that choose and label the initial images; -1: the last")
    max_files: int | None = _setting(None, "use experts of the first files only, save_interval experts a file", low=1)
    max_experts: int | None = _setting(None, "use the first experts of each file only", low=1)
    save_interval: int = _setting(10, "experts a file, for max_files and max_experts", low=1)

    eval_it: int = _setting(100, "iterations between evaluations", low=1)
    skip_first_eva: bool = _setting(False, "no evaluation at iteration 0")
    save_it: int = _setting(1000, "iterations between saved sets", low=1)
    checkpoint_every: int = _setting(100, "iterations between checkpoints", low=1)
    log_dir: FilePath = _setting("logged_files", "folder of the runs")
    name: str = _setting("", "name of the run; default: the config's name (without one: pad) and the seed")
    resume: bool = _setting(False, "go on with the run of this name")
    overwrite: bool = _setting(False, "replace the run of this name")
    tracker: str = _setting("none", "also send metrics to", choices=("none", "tensorboard", "wandb"))
    project: str = _setting("PAD", "Weights & Biases project")

    dead = {
        "batch_real": "nothing reads it",
        "lr_init": "lr_teacher is the initial learning rate",
        "load_all": "trajectories are read two rows at a time, whatever their number",
        "texture": "texture distillation is not part of PAD",
        "canvas_size": "texture distillation is not part of PAD",
        "canvas_samples": "texture distillation is not part of PAD",
        "force_save": "pictures are saved at every ipc",
        "ema_decay": "PAD keeps no moving average of the images",
        "record_loss": "the loss is always recorded",
        "init_frozen": "nothing reads it",
        "parall_eva": "torchrun deals evaluation networks to several devices",
        "Initialize_Label_Model_Dir": "that network's trajectories are looked for under buffer_path",
    }

    def check(self) -> None:
        super().check()
        if self.max_start_epoch <= self.min_start_epoch:
            raise InputError(
                f"max_start_epoch: {self.max_start_epoch} leaves no start epoch from min_start_epoch: {self.min_start_epoch}"
            )
        if self.Sequential_Generation and not self.min_start_epoch < self.current_max_start_epoch:
            raise InputError(
                f"current_max_start_epoch: {self.current_max_start_epoch} leaves no start epoch from min_start_epoch: "
                f"{self.min_start_epoch} at iteration 0; raise it or set Sequential_Generation: False"
            )
        if self.Initialize_Label_With_Another_Model and not self.Initialize_Label_Model:
            raise InputError("Initialize_Label_With_Another_Model is set, but Initialize_Label_Model names no network")
        if self.resume and self.overwrite:
            raise InputError("resume and overwrite exclude each other: go on with the run, or replace it")
        if self.depth_ratio and self.loss_ratio:
            log.warning(
                "depth_ratio and loss_ratio are both set: parameters count that pass both filters "
                "(set loss_ratio: 0 for the paper's filter by depth alone)"
            )


@dataclass(kw_only=True)
class EvaluationSettings(_Evaluating, _Ranked):
    """Stage 3, ``distill/evaluation.py``: train fresh networks on a synthetic set and score them on the test images."""

    batch_train: int = _setting(128, "batch size for training networks", low=1)
    data_dir: FilePath | None = _setting(None, "images_*.pt of a published set")
    label_dir: FilePath | None = _setting(None, "labels_*.pt of a published set")
    lr_dir: FilePath | None = _setting(None, "lr_*.pt of a published set")
    synthetic: FilePath | None = _setting(None, "a synthetic set's own file, or its run's folder, instead of the three")
    buffer_path: FilePath | None = _setting(None, "folder of the trajectories, for the soft labels of real images")
    baselines: str = _setting(
        "hard,soft", "rows beside the synthetic set: random real images with hard and soft labels, and the first of a "
        "difficulty method, as in hard,soft,Herding; or none",
    )  # fmt: skip
    out: FilePath | None = _setting(None, "JSON file of the results; default: beside the synthetic set")

    dead = {
        "batch_real": "nothing reads it",
        "lr_teacher": "a synthetic set brings its learning rate",
        "no_aug": "it is about matching, in the second stage",
    }

    def check(self) -> None:
        super().check()
        trio = {key: getattr(self, key) for key in ("data_dir", "label_dir", "lr_dir")}
        if self.synthetic and any(trio.values()):
            raise InputError("synthetic and data_dir, label_dir, lr_dir exclude each other: give the one file or the three")
        missing = [key for key, value in trio.items() if not value]
        if not self.synthetic and missing:
            raise InputError(f"no synthetic set to evaluate: give --synthetic, or --{' and --'.join(missing)}")

    @property
    def baseline_kinds(self) -> list[str]:
        """``hard``, ``soft``, and names of difficulty methods, each once."""
        return [] if self.baselines in ("", "none") else _words(self.baselines)


@dataclass(kw_only=True)
class ScoreSettings(_Curriculum):
    """``scripts/score_difficulty.py``: rank the training images by difficulty; all methods share one training.

    The curriculum is for --plot, which draws it.
    """

    methods: str = _setting("GraNd", "difficulty methods, as GraNd,EL2N,Forgetting; or all")
    list: bool = _setting(False, "print the methods and end")
    out: FilePath | None = _setting(
        None, "folder of ranking files; default, but for an ImageFolder or a part: data_indices in the checkout"
    )
    overwrite: bool = _setting(False, "compute also what is there already")
    plot: bool = _setting(False, "draw rankings and curriculum, into plots_<NAME> in the folder")
    repeats: int = _setting(10, "networks to average over", low=1)
    epochs: int = _setting(40, "epochs to train each", low=1)
    lr: float = _setting(0.1, "learning rate", above=0)
    momentum: float = _setting(0.9, "Nesterov momentum", low=0, below=1)
    weight_decay: float = _setting(5e-4, "weight decay", low=0)
    batch: int = _setting(256, "batch size", low=1)
    augmentation: str = _setting("none", "none, or a DSA strategy as crop_flip")

    def check(self) -> None:
        super().check()
        if self.method_names == []:
            raise InputError("methods: none are named; give names as GraNd,EL2N, or all")

    @property
    def method_names(self):
        """A list of names, each once; None for all there are."""
        return None if self.methods.strip() == "all" else _words(self.methods)

    @property
    def scoring(self) -> dict:
        """Keyword arguments of :class:`pad.difficulty.training.ScoringSettings`."""
        return {name: getattr(self, name) for name in _SCORING}

    @property
    def asked_scoring(self) -> set[str]:
        """Those of them that were given: a ranking that is there must have been made with these."""
        return set(_SCORING) & self.given


@dataclass(kw_only=True)
class CoresetSettings(_Ranked):
    """``scripts/select_coreset.py``: the first images of each class in a difficulty ranking, as a training set."""

    method: str = _setting("Herding", "difficulty method, or a ranking file's stem as CIFAR10_GraNd")
    ipc: int = _setting(1, "images per class", low=1)
    end: str = _setting("easiest", "which end of the ranking", choices=("easiest", "hardest"))
    labels: str = _setting("hard", "one-hot, or of the experts in buffer_path", choices=("hard", "soft"))
    buffer_path: FilePath | None = _setting(None, "folder of the trajectories, for soft labels")
    lr: float = _setting(0.01, "learning rate that evaluation trains with", above=0)
    out: FilePath = _setting("coresets", "folder of the set's files")

    def check(self) -> None:
        super().check()
        if self.labels == "soft" and self.buffer_path is None:
            raise InputError("labels: soft ones come from experts, so give --buffer_path")


def _words(text: str) -> list[str]:
    """The words of a comma-separated list, each once, in order."""
    return list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))


Settings = typing.TypeVar("Settings", bound=Common)


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(message)


def parse(cls: type[Settings], argv: list[str], program: str) -> tuple[Settings, set[str]]:
    """Settings from ``--cfg file.yaml`` and flags, and the names of those that were given.

    Raises InputError for an unknown key or flag (naming the nearest), a value of the wrong type or out of range,
    settings that do not go together, and a file that cannot be read. Keys that do nothing are warned about once.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    parser = _Parser(program, description=cls.__doc__, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.add_argument("--cfg", metavar="FILE", help="YAML file of settings; flags override it")
    for name, field in fields.items():
        optional = {"nargs": "?", "const": "True"} if hints[name] is bool else {}
        default = "" if field.default in (None, "") else f" (default: {field.default})"
        text = (field.metadata["help"] + default).replace("%", "%%")
        parser.add_argument(f"--{name}", metavar="", help=text, **optional)
    for name in cls.dead:
        parser.add_argument(f"--{name}", nargs="?", help=argparse.SUPPRESS)

    flags, unknown = parser.parse_known_args(argv)
    if unknown:
        raise InputError(_unknown("option", unknown[0].split("=")[0], [f"--{name}" for name in (*fields, *cls.dead, "cfg")]))
    flags = vars(flags)
    given = {}
    if (path := flags.pop("cfg", None)) is not None:
        given = _read_yaml(path)
        for key in given:
            if key not in fields and key not in cls.dead:
                raise InputError(f"{path}: {_unknown('key', key, [*fields, *cls.dead])}")
        base = _path_base(Path(path))
        given = {key: _resolve_path(value, base) if _is_path(hints.get(key)) else value for key, value in given.items()}
    given |= flags
    for key in [key for key in given if key in cls.dead]:
        log.warning("%s does nothing: %s", key, cls.dead[key])
        del given[key]
    settings = cls(**{key: _coerce(fields[key], hints[key], value) for key, value in given.items()})
    if path is not None and "name" in fields and "name" not in given:
        settings.name = f"{Path(path).stem}-seed{settings.seed}"
    settings.check()
    settings.given = frozenset(given)
    return settings, set(given)


def _read_yaml(path: str) -> dict:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read the config {path}: {getattr(error, 'strerror', None) or error}") from None
    try:
        content = yaml.safe_load(text)  # of a duplicate key, the last counts
    except Exception as error:  # besides YAMLError almost any: ValueError, KeyError, IndexError, RecursionError, ...
        raise InputError(f"{path} is not YAML: {' '.join(str(error).split()) or type(error).__name__}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise InputError(f"{path} is not a list of `key: value` lines")
    return content


def _path_base(config: Path) -> Path:
    """What relative paths in a YAML file are relative to.

    Published files are written to be used from inside ``distill/``: in a checkout they mean that folder, from wherever
    the command is started. A file outside any checkout means the current folder.
    """
    for folder in config.resolve().parents:
        if (folder / "distill" / "PAD.py").is_file():
            return folder / "distill"
    return Path.cwd()


def checkout() -> Path:
    """The checkout this package runs from, or the current folder when it was installed elsewhere."""
    root = Path(__file__).resolve().parent.parent
    return root if (root / "distill" / "PAD.py").is_file() else Path()


def _is_path(hint) -> bool:
    return hint is FilePath or FilePath in typing.get_args(hint)


def _resolve_path(value, base: Path):
    if not isinstance(value, str) or not value or value.startswith("~") or Path(value).is_absolute():
        return value
    return os.path.normpath(base / value)


def _unknown(what: str, name, known: list[str]) -> str:
    shown = _shorten(name)
    nearest = difflib.get_close_matches(shown.strip("'"), known, n=1, cutoff=0)[0]
    return f"unknown {what} {shown}; the nearest is {nearest}"


def _coerce(field: dataclasses.Field, hint, value):
    """``value`` as the field's type, within its range; InputError otherwise."""
    name, meta = field.name, field.metadata
    if type(None) in typing.get_args(hint):
        if value is None or (isinstance(value, str) and value.strip().lower() in ("none", "null", "")):
            return None
        hint = typing.get_args(hint)[0]
    if isinstance(value, int) and value.bit_length() > 64:
        raise InputError(f"{name}: {_shorten(value)} is out of range")
    convert = {bool: _bool, int: _int, float: _float, str: _str, FilePath: _path, Device: _device}[hint]
    try:
        value = convert(value)
    except ValueError as error:
        raise InputError(f"{name}: {_shorten(value)} is not {error}") from None
    bounds = [
        (meta["low"], lambda a, b: a >= b, "at least"), (meta["above"], lambda a, b: a > b, "above"),
        (meta["high"], lambda a, b: a <= b, "at most"), (meta["below"], lambda a, b: a < b, "below"),
    ]  # fmt: skip
    for bound, holds, words in bounds:
        if bound is not None and not holds(value, bound):
            raise InputError(f"{name}: {value} is out of range, it must be {words} {bound}")
    if meta["choices"] and value not in meta["choices"]:
        raise InputError(f"{name}: {_shorten(value)} is not one of {', '.join(meta['choices'])}")
    return value


_SHORT = reprlib.Repr()  # bounded in depth and width, whatever a YAML file holds
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 60


def _shorten(value) -> str:
    try:
        return _SHORT.repr(value)
    except ValueError:  # Python refuses to print whole numbers of thousands of digits
        return "a number of thousands of digits"


def _bool(value) -> bool:
    words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if isinstance(value, str) and value.strip().lower() in words:
        return words[value.strip().lower()]
    if isinstance(value, int) and value in (0, 1):
        return bool(value)
    raise ValueError("True or False")


def _int(value) -> int:
    number = _float(value, "a whole number")
    if number != int(number) or abs(number) >= 2**53:
        raise ValueError("a whole number")
    return int(number)


def _float(value, wanted: str = "a finite number") -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError(wanted)
    try:
        number = float(value)
    except ValueError:
        raise ValueError(wanted) from None
    if not math.isfinite(number):
        raise ValueError(wanted)
    return number


def _str(value) -> str:
    if isinstance(value, bool) or not isinstance(value, (str, int, float)) or "\0" in str(value):
        raise ValueError("text")
    return str(value)


def _path(value) -> FilePath:
    text = os.path.expanduser(_str(value))
    if text.startswith("~"):
        raise ValueError("a path: there is no such user (for a file of that name, write ./ before it)")
    return FilePath(text)


_CUDA = re.compile(r"cuda:(\d{1,3})|(\d{1,3})|\[(\d{1,3})(,\d{1,3})*\]", re.ASCII)


def _device(value) -> Device:
    if isinstance(value, list):
        value = f"[{','.join(map(_shorten, value))}]"
    text = str(value).replace(" ", "") if type(value) in (str, int) else ""
    if text not in ("auto", "cpu", "cuda") and not _CUDA.fullmatch(text):
        raise ValueError("auto, cpu, cuda, cuda:1 or a list of CUDA devices as [0,1]")
    return Device(text)


def _cuda_device(text: str) -> torch.device:
    """``cuda:1``, ``1`` or the first of ``[1,2]`` (several devices are for torchrun, which starts one process each)."""
    return torch.device("cuda", int(next(filter(None, _CUDA.fullmatch(text).groups()))))
