"""What settings each command has: those of the stages, and of what goes with them."""

import logging
from dataclasses import dataclass

import torch

from pad.config import Device, FilePath, Settings, cuda_device, setting
from pad.data.augment import DSA, DSA_STRATEGY
from pad.errors import InputError
from pad.experts.curriculum import ADD_SCHEDULES, REMOVALS, exact_share

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
        "auto", "where real images are kept; auto: on the device if they take at most half of its free memory",
        choices=("auto", "device", "host"),
    )  # fmt: skip

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
        wanted = torch.device("cuda", 0) if self.device in ("auto", "cuda") else cuda_device(self.device)
        if wanted.index >= torch.cuda.device_count():
            raise InputError(f"device: {self.device} was asked for, but there are {torch.cuda.device_count()} CUDA devices")
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
        None, "folder of ranking files; default: data_indices in the checkout; of an ImageFolder or a part, which have none "
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

    num_experts: int = setting(100, "experts to train", low=1)
    lr_teacher: float = setting(0.01, "learning rate of the experts", above=0)
    mom: float = setting(0.0, "momentum", low=0, below=1)
    l2: float = setting(0.0, "weight decay", low=0)
    rho_max: float = setting(2.0, "GSAM's radius", low=0)
    rho_min: float = setting(2.0, "must equal rho_max: the learning rate is constant, and rho follows it", low=0)
    alpha: float = setting(0.4, "weight of GSAM's surrogate-gap term", low=0)
    adaptive: bool = setting(True, "scale GSAM's perturbation by the parameters (ASAM)")
    buffer_path: FilePath = setting("./buffers", "folder of the trajectories")
    eval_every: int = setting(1, "epochs between measurements of test accuracy; 0: never", low=0)
    micro_batch: int | None = setting(None, "compute on so many images at a time: less memory, the same result", low=1)

    sort_method: str = setting("", "difficulty method, or a ranking file's stem as CIFAR10_GraNd; default: GraNd")

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

    eval_mode: str = setting("S", "evaluation pool: S, M, W, D, A, P, N, C, BN; anything else: the model itself")
    num_eval: int = setting(5, "networks to train per evaluation", low=1)
    epoch_eval_train: int = setting(1000, "epochs to train an evaluation network", low=1)

    def check(self) -> None:
        super().check()
        if self.eval_mode not in POOLS:
            log.warning("eval_mode: %s is none of %s, so the model itself is evaluated", self.eval_mode, ", ".join(POOLS))


@dataclass(kw_only=True)
class Distilling(_Evaluating):
    """What distillation asks, whatever is matched."""

    ipc: int = setting(1, "synthetic images per class", low=1)
    data_path: FilePath = setting("../dataset/", "folder of the data set")
    Iteration: int = setting(5000, "outer iterations 0..Iteration", low=0)
    lr_img: float = setting(1000.0, "learning rate of the images", low=0)
    max_bad_iterations: int = setting(10, "stop after so many iterations in a row without a finite gradient", low=1)

    eval_it: int = setting(100, "iterations between evaluations", low=1)
    skip_first_eva: bool = setting(False, "no evaluation at iteration 0")
    save_it: int = setting(1000, "iterations between saved sets", low=1)
    checkpoint_every: int = setting(100, "iterations between checkpoints", low=1)
    log_dir: FilePath = setting("logged_files", "folder of the runs")
    name: str = setting("", "name of the run; default: the config's name (without one: the method's) and the seed")
    resume: bool = setting(False, "go on with the run of this name")
    overwrite: bool = setting(False, "replace the run of this name")
    tracker: str = setting("none", "also send metrics to", choices=("none", "tensorboard", "wandb"))
    project: str = setting("PAD", "Weights & Biases project")

    program = "pad"  # begins the name of a run that has none
    needs_ranking = False  # whether it takes a difficulty ranking
    matches_by = frozenset()  # settings for evaluation that matching reads too

    def check(self) -> None:
        super().check()
        if self.resume and self.overwrite:
            raise InputError("resume and overwrite exclude each other: go on with the run, or replace it")


# The systems that trajectory matching here can be, and what makes them: PAD, the default, leaves everything open
METHODS = {
    "MTT": {"labels": "hard", "gradient": "exact"},
    "FTD": {"labels": "hard", "gradient": "exact"},
    "DATM": {"labels": "soft", "gradient": "exact"},
    "TESLA": {"gradient": "truncated"},
    "PAD": {},
}


@dataclass(kw_only=True)
class DistillSettings(Distilling):
    """Stage 2, ``distill/PAD.py``: optimise synthetic images, soft labels and a learning rate along experts.

    MTT, FTD, DATM, TESLA and PAD are settings of it (configs/CIFAR-10).
    """

    method: str = setting(
        "PAD", "whose settings these are: refuses what would make them another's; ema_decay is FTD's alone",
        choices=tuple(METHODS),
    )  # fmt: skip
    buffer_path: FilePath = setting("../buffer_storage/", "folder of the trajectories")
    zca: bool = setting(True, "ZCA whitening instead of mean/std")

    syn_steps: int = setting(80, "inner steps on the synthetic set per outer iteration", low=1)
    expert_epochs: int = setting(2, "epochs of the expert to match", low=1)
    batch_syn: int | None = setting(256, "synthetic images per inner step; the whole set when larger or none", low=1)
    min_start_epoch: int = setting(0, "first start epoch", low=0)
    max_start_epoch: int = setting(25, "start epochs lie below this one", low=1)
    Sequential_Generation: bool = setting(True, "widen the range of start epochs gradually")
    current_max_start_epoch: int = setting(20, "upper bound of the start epochs at iteration 0", low=1)
    expansion_end_epoch: int = setting(3000, "iteration at which the bound reaches max_start_epoch", low=1)
    depth_ratio: float = setting(0.0, "share of parameters, shallow to deep, that matching leaves out", low=0, below=1)
    loss_ratio: float = setting(0.0, "share of parameters with the smallest error that matching leaves out", low=0, below=1)
    threshold: float | None = setting(1.0, "iterations with a larger loss change nothing; none: there are none such", above=0)
    gradient: str = setting(
        "exact", "through all inner steps, or TESLA's, truncated: each step's own share alone", choices=("exact", "truncated")
    )
    no_aug: bool = setting(False, "no augmentation while matching")
    micro_batch: int | None = setting(None, "compute on so many images at a time: less memory, the same result", low=1)

    labels: str = setting("soft", "soft: learned, from lr_y on; hard: one-hot, and so they stay", choices=("soft", "hard"))
    lr_y: float = setting(2.0, "learning rate of the labels", low=0)
    Momentum_y: float = setting(0.9, "momentum of the labels", low=0, below=1)
    lr_teacher: float = setting(0.01, "initial value of the learned learning rate", above=0)
    lr_lr: float = setting(1e-5, "learning rate of the learning rate", low=0)
    ema_decay: float = setting(
        0.0, "FTD: the set is the exponential moving average of the images, with this decay per update", low=0, below=1
    )

    pix_init: str = setting(
        "samples_predicted_correctly", "initial images", choices=("samples_predicted_correctly", "real", "noise")
    )
    noise_logit: float = setting(10.0, "pix_init noise: logit of the class in the initial labels (others 0)", above=0)
    Initialize_Label_With_Another_Model: bool = setting(False, "initial labels from another network's trajectories")
    Initialize_Label_Model: str = setting("", "that other network")
    Label_Model_Timestamp: int = setting(-1, "epoch of the experts that choose and label the initial images; -1: the last")
    max_files: int | None = setting(None, "use experts of the first files only, save_interval experts a file", low=1)
    max_experts: int | None = setting(None, "use the first experts of each file only", low=1)
    save_interval: int = setting(10, "experts a file, for max_files and max_experts", low=1)

    dead = {
        "batch_real": "nothing reads it",
        "lr_init": "lr_teacher is the initial learning rate",
        "load_all": "trajectories are read two rows at a time, whatever their number",
        "texture": "texture distillation is not part of PAD",
        "canvas_size": "texture distillation is not part of PAD",
        "canvas_samples": "texture distillation is not part of PAD",
        "force_save": "pictures are saved at every ipc",
        "record_loss": "the loss is always recorded",
        "init_frozen": "nothing reads it",
        "parall_eva": "torchrun deals evaluation networks to several devices",
        "Initialize_Label_Model_Dir": "that network's trajectories are looked for under buffer_path",
    }
    refused = dict.fromkeys(
        ("drop_easy", "drop_hard"),
        "real images are filtered in the first stage, by the curriculum of the experts (rm_easy_ratio_first)",
    ) | dict.fromkeys(("outer_loop", "inner_loop", "lr_net"), "it belongs to gradient matching, distill/DC.py")

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
        for key, value in METHODS[self.method].items():
            if getattr(self, key) != value:
                other = f"{key}: {getattr(self, key)}"
                raise InputError(f"{other} is not {self.method}, which has {key}: {value} (method: PAD has any)")
        if self.method == "FTD" and not self.ema_decay:
            log.warning("ema_decay is 0: FTD's moving average of the images is not kept")
        if self.ema_decay and self.method != "FTD":  # published files of the others carry the key, which nothing reads there
            log.warning("ema_decay does nothing: %s keeps no moving average of the images; method: FTD does", self.method)
            self.ema_decay, self.given = 0.0, self.given - {"ema_decay"}
        if self.depth_ratio and self.loss_ratio:
            log.warning(
                "depth_ratio and loss_ratio are both set: parameters count that pass both filters "
                "(set loss_ratio: 0 for the paper's filter by depth alone)"
            )

    @property
    def derivatives(self) -> int:
        """About how many derivatives of the network a run takes: what compiling has to pay for itself in."""
        return self.Iteration * self.syn_steps


@dataclass(kw_only=True)
class _RealMatching(Distilling, _Ranked):
    """What matching of gradients and of distributions asks: labels are one-hot, real images come in batches of a class."""

    dsa: bool = setting(True, "the same random augmentation of real and synthetic images (DSA), and in training")
    siamese: bool = setting(False, "all images of a batch share DSA's random numbers in training, as always in matching")
    batch_real: int = setting(256, "real images of a class per step", low=1)
    sort_method: str = setting("", "difficulty method, or a ranking file's stem as CIFAR10_GraNd; default: GraNd")
    drop_easy: float = setting(0.0, "share of each class, easiest first, that real batches leave out", low=0, below=1)
    drop_hard: float = setting(0.0, "share of each class, hardest first, that real batches leave out", low=0, below=1)
    pix_init: str = setting("real", "initial images", choices=("real", "noise"))
    lr_net: float = setting(0.01, "learning rate of networks trained on the synthetic set", above=0)
    epoch_eval_train: int = setting(1000, "epochs to train an evaluation network", low=1)

    refused = dict.fromkeys(
        ("buffer_path", "syn_steps", "expert_epochs", "batch_syn", "min_start_epoch", "max_start_epoch", "loss_ratio",
         "Sequential_Generation", "current_max_start_epoch", "expansion_end_epoch", "threshold", "gradient", "lr_teacher"),
        "it belongs to trajectory matching, distill/PAD.py",
    ) | dict.fromkeys(("labels", "lr_y", "Momentum_y"), "labels are one-hot here, and not learned") | {
        "lr_lr": "the learning rate is not learned here; lr_net is what evaluation trains with",
        "ema_decay": "no moving average of the images is kept here; FTD does that, distill/PAD.py --method FTD",
    }  # fmt: skip

    def check(self) -> None:
        super().check()
        if exact_share(self.drop_easy) + exact_share(self.drop_hard) >= 1:
            raise InputError(f"drop_easy: {self.drop_easy:g} and drop_hard: {self.drop_hard:g} leave no real images")
        if self.sort_method and not self.needs_ranking:
            log.warning("sort_method does nothing: drop_easy and drop_hard are 0")

    @property
    def needs_ranking(self) -> bool:
        """Whether real batches leave images out."""
        return self.drop_easy + self.drop_hard > 0


_LOOPS = {1: (1, 1), 10: (10, 50), 20: (20, 25), 30: (30, 20), 40: (40, 15), 50: (50, 10)}  # by ipc, as published


@dataclass(kw_only=True)
class DCSettings(_RealMatching):
    """``distill/DC.py``: match gradients of real and synthetic images (DC, arXiv 2006.05929); with dsa, DSA (2102.08259)."""

    Iteration: int = setting(1000, "outer iterations 0..Iteration, a fresh network each", low=0)
    lr_img: float = setting(0.1, "learning rate of the images", low=0)
    pix_init: str = setting("noise", "initial images", choices=("real", "noise"))
    depth_ratio: float = setting(0.0, "share of parameters, shallow to deep, that matching leaves out", low=0, below=1)
    outer_loop: int | None = setting(None, "image steps per iteration; default: the published, by ipc", low=1)
    inner_loop: int | None = setting(None, "epochs of training between them; default: the published, by ipc", low=0)
    micro_batch: int | None = setting(None, "compute on so many images at a time: less memory, the same result", low=1)

    program = "dc"
    matches_by = frozenset({"batch_train"})

    def check(self) -> None:
        super().check()
        if None in (self.outer_loop, self.inner_loop) and self.ipc not in _LOOPS:
            raise InputError(
                f"ipc: {self.ipc} has no published outer_loop and inner_loop (only {', '.join(map(str, _LOOPS))} have); "
                "give both"
            )

    @property
    def loops(self) -> tuple[int, int]:
        """Image steps per iteration, and epochs of training between them."""
        outer, inner = _LOOPS.get(self.ipc, (None, None))
        return outer if self.outer_loop is None else self.outer_loop, inner if self.inner_loop is None else self.inner_loop

    @property
    def derivatives(self) -> int:
        """About how many derivatives of the network a run takes, at ten classes."""
        outer, inner = self.loops
        return self.Iteration * outer * (3 * 10 + inner)


@dataclass(kw_only=True)
class DMSettings(_RealMatching):
    """``distill/DM.py``: match mean embeddings of real and synthetic images under random networks (DM, arXiv 2110.04181)."""

    Iteration: int = setting(20000, "outer iterations 0..Iteration, a random network each", low=0)
    lr_img: float | None = setting(
        None, "learning rate of the images; default: 1, and 10 for CIFAR10 at an ipc of 100 or more, as published", low=0
    )
    depth_ratio: float | None = setting(
        None, "match the features of the deepest ceil((1 - depth_ratio) D) of D blocks; default: of the last, as published",
        low=0, below=1,
    )  # fmt: skip

    refused = _RealMatching.refused | dict.fromkeys(
        ("outer_loop", "inner_loop"), "it belongs to gradient matching, distill/DC.py"
    ) | {"micro_batch": "a class at a time is all that is computed on here"}

    program = "dm"
    derivatives = 0  # of a network in its parameters

    def check(self) -> None:
        super().check()
        if self.lr_img is None:
            self.lr_img = 10.0 if self.dataset == "CIFAR10" and self.ipc >= 100 else 1.0


@dataclass(kw_only=True)
class EvaluationSettings(_Evaluating, _Ranked):
    """Stage 3, ``distill/evaluation.py``: train fresh networks on a synthetic set and score them on the test images."""

    batch_train: int = setting(128, "batch size for training networks", low=1)
    data_dir: FilePath | None = setting(None, "images_*.pt of a published set")
    label_dir: FilePath | None = setting(None, "labels_*.pt of a published set")
    lr_dir: FilePath | None = setting(None, "lr_*.pt of a published set")
    synthetic: FilePath | None = setting(None, "a synthetic set's own file, or its run's folder, instead of the three")
    buffer_path: FilePath | None = setting(None, "folder of the trajectories, for the soft labels of real images")
    baselines: str = setting(
        "hard,soft", "rows beside the synthetic set: random real images with hard and soft labels, and the first of a "
        "difficulty method, as in hard,soft,Herding; or none",
    )  # fmt: skip
    out: FilePath | None = setting(None, "JSON file of the results; default: beside the synthetic set")

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

    methods: str = setting("GraNd", "difficulty methods, as GraNd,EL2N,Forgetting; or all")
    list: bool = setting(False, "print the methods and end")
    out: FilePath | None = setting(
        None, "folder of ranking files; default, but for an ImageFolder or a part: data_indices in the checkout"
    )
    overwrite: bool = setting(False, "compute also what is there already")
    plot: bool = setting(False, "draw rankings and curriculum, into plots_<NAME> in the folder")
    repeats: int = setting(10, "networks to average over", low=1)
    epochs: int = setting(40, "epochs to train each", low=1)
    lr: float = setting(0.1, "learning rate", above=0)
    momentum: float = setting(0.9, "Nesterov momentum", low=0, below=1)
    weight_decay: float = setting(5e-4, "weight decay", low=0)
    batch: int = setting(256, "batch size", low=1)
    augmentation: str = setting("none", "none, or a DSA strategy as crop_flip")

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

    method: str = setting("Herding", "difficulty method, or a ranking file's stem as CIFAR10_GraNd")
    ipc: int = setting(1, "images per class", low=1)
    end: str = setting("easiest", "which end of the ranking", choices=("easiest", "hardest"))
    labels: str = setting("hard", "one-hot, or of the experts in buffer_path", choices=("hard", "soft"))
    buffer_path: FilePath | None = setting(None, "folder of the trajectories, for soft labels")
    lr: float = setting(0.01, "learning rate that evaluation trains with", above=0)
    out: FilePath = setting("coresets", "folder of the set's files")

    def check(self) -> None:
        super().check()
        if self.labels == "soft" and self.buffer_path is None:
            raise InputError("labels: soft ones come from experts, so give --buffer_path")


@dataclass(kw_only=True)
class StudySettings(Settings):
    """``scripts/study.py FILE``: run a grid of methods, sizes and seeds on one data set, and report it (docs/STUDIES.md)."""

    study: FilePath | None = setting(None, "YAML file of the study; may stand alone, as the first argument")
    out: FilePath | None = setting(
        None, "folder of all that is made; default: the file's out, or runs/studies/<its name> in the checkout"
    )
    data_path: FilePath | None = setting(None, "folder of the data set; default: the file's")
    device: Device | None = setting(None, "auto, cpu, cuda, cuda:1; default: the file's")
    methods: str = setting("", "only these of the file's methods, as DC,DM")
    seeds: str = setting("", "only these seeds, as 0,1,2")
    ipc: str = setting("", "only these sizes, as 1,10")

    def check(self) -> None:
        super().check()
        if self.study is None:
            raise InputError("no study is named: give its YAML file, as configs/studies/cifar10.yaml")
        for name in ("seeds", "ipc"):
            if not all(word.isascii() and word.isdigit() for word in _words(getattr(self, name))):
                raise InputError(f"{name}: {getattr(self, name)!r} is not a list of whole numbers, as 0,1,2")

    def numbers(self, name: str) -> list[int]:
        """``seeds`` or ``ipc`` as numbers; none where all are meant."""
        return [int(word) for word in _words(getattr(self, name))]

    @property
    def method_names(self) -> list[str]:
        """Names of methods; none where all are meant."""
        return _words(self.methods)


def _words(text: str) -> list[str]:
    """The words of a comma-separated list, each once, in order."""
    return list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
