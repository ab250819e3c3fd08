"""Settings: the published files, keys and flags, what overrides what, and everything that must be refused."""

import dataclasses
import json
import math
import os
from pathlib import Path

import pytest
import yaml
from helpers import CHECKOUT, slow
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from pad import cli
from pad.commands.coreset import CoresetSettings
from pad.commands.distribution import DMSettings, NCFMSettings, TGDDSettings
from pad.commands.evaluate import EvaluationSettings
from pad.commands.gradient import DCSettings
from pad.commands.influence import InfluenceSettings
from pad.commands.rank import ScoreSettings
from pad.commands.record import BufferSettings
from pad.commands.trajectory import DistillSettings
from pad.config import parse, read_yaml
from pad.difficulty.methods import METHODS
from pad.difficulty.training import ScoringSettings
from pad.errors import InputError

STAGES = (
    BufferSettings,
    DistillSettings,
    DCSettings,
    DMSettings,
    TGDDSettings,
    NCFMSettings,
    InfluenceSettings,
    EvaluationSettings,
    ScoreSettings,
    CoresetSettings,
)
TRIO = ["--data_dir", "i.pt", "--label_dir", "l.pt", "--lr_dir", "r.pt"]  # what the third stage cannot do without


def read(cls, *argv):
    return parse(cls, list(argv), "test")


def refusal(cls, *argv) -> str:
    """The sentence that ``argv`` is refused with."""
    with pytest.raises(InputError) as caught:
        parse(cls, list(argv), "test")
    message = str(caught.value)
    assert message and "\n" not in message
    return message


def first_words(caplog) -> list[str]:
    """What the notices are about, in alphabetical order."""
    return sorted(record.getMessage().split()[0] for record in caplog.records)


def config(folder: Path, text: str | bytes, name: str = "some.yaml") -> str:
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return str(path)


# ---- the twelve published settings

# file, data set, ipc, syn_steps, expert_epochs, batch_syn, lr_img, lr_y, lr_lr, start epochs, depth_ratio;
# start epochs are (min, max), or with sequential generation (min, now, max, expansion_end_epoch)
PUBLISHED = [
    ("CIFAR-10/ConvIN/IPC1", "CIFAR10", 1, 80, 2, 1000, 100, 5, 1e-7, (0, 4), 0),
    ("CIFAR-10/ConvIN/IPC10", "CIFAR10", 10, 80, 2, 500, 100, 2, 1e-5, (0, 10, 20, 1000), 0.5),
    ("CIFAR-10/ConvIN/IPC50", "CIFAR10", 50, 80, 3, 1000, 1000, 2, 1e-5, (0, 20, 40, 2000), 0.25),
    ("CIFAR-10/ConvIN/IPC500", "CIFAR10", 500, 40, 2, 1000, 50, 10, 1e-5, (40, 60, 70, 2000), 0.5),
    ("CIFAR-10/ConvIN/IPC1000", "CIFAR10", 1000, 100, 2, 1000, 50, 10, 1e-5, (40, 60), 0.5),
    ("CIFAR-100/ConvIN/IPC1", "CIFAR100", 1, 40, 3, 1000, 1000, 10, 1e-5, (0, 20, 30, 1000), 0.5),
    ("CIFAR-100/ConvIN/IPC10", "CIFAR100", 10, 80, 2, 1000, 1000, 10, 1e-5, (0, 30, 50, 2000), 0.5),
    ("CIFAR-100/ConvIN/IPC50", "CIFAR100", 50, 80, 2, 1000, 1000, 10, 1e-5, (20, 70), 0),
    ("CIFAR-100/ConvIN/IPC100", "CIFAR100", 100, 80, 2, 1000, 50, 10, 1e-5, (30, 70), 0.5),
    ("TinyImageNet/ConvIN/IPC1", "Tiny", 1, 40, 2, 1000, 10000, 10, 1e-4, (0, 15, 20, 2000), 0.5),
    ("TinyImageNet/ConvIN/IPC10", "Tiny", 10, 40, 2, 500, 100, 10, 1e-4, (10, 50), 0.5),
    ("TinyImageNet/ConvIN/IPC50", "Tiny", 50, 20, 2, 1000, 100, 10, 1e-4, (40, 70), 0.5),
]


@pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: row[0])
def test_our_files_hold_the_published_settings(row, caplog):
    file, dataset, ipc, syn_steps, expert_epochs, batch_syn, lr_img, lr_y, lr_lr, epochs, depth_ratio = row
    path = CHECKOUT / "configs" / f"{file}.yaml"
    tiny, sequential = dataset == "Tiny", len(epochs) == 4
    expected = {
        "dataset": dataset,
        "model": "ConvNetD4" if tiny else "ConvNet",
        "res": 64 if tiny else None,
        "zca": True,
        "ipc": ipc,
        "pix_init": "real" if (dataset, ipc) == ("CIFAR100", 50) else "samples_predicted_correctly",
        "syn_steps": syn_steps,
        "expert_epochs": expert_epochs,
        "batch_syn": batch_syn,
        "depth_ratio": depth_ratio,
        "loss_ratio": 0,
        "lr_img": lr_img,
        "lr_y": lr_y,
        "lr_lr": lr_lr,
        "lr_teacher": 0.01,
        "Momentum_y": 0.9,
        "threshold": 1.1 if (dataset, ipc) == ("CIFAR10", 1) else 1.0,
        "Iteration": 10000,
        "dsa": True,
        "batch_train": 128,
        "num_eval": 1,
        "eval_it": 1000 if dataset == "CIFAR10" and ipc >= 500 else 500,
        "epoch_eval_train": 1000,
        "Sequential_Generation": sequential,
        "min_start_epoch": epochs[0],
        "max_start_epoch": epochs[2 if sequential else 1],
        "eval_mode": "S",
        "no_aug": False,
        "Label_Model_Timestamp": -1,
        "device": "auto",
        "name": f"IPC{ipc}-seed0",
        "data_path": str(CHECKOUT / "dataset" / ("tiny-imagenet-200" if tiny else "")),
        "buffer_path": str(CHECKOUT / "buffer_storage"),
    }
    if sequential:
        expected |= {"current_max_start_epoch": epochs[1], "expansion_end_epoch": epochs[3]}
    found = read(DistillSettings, "--cfg", str(path))
    assert {key: getattr(found, key) for key in expected} == expected
    assert not caplog.records  # no key that does nothing, and one filter only

    keys = [line.partition(":")[0] for line in path.read_text().splitlines() if line and line[0] != "#"]
    assert len(keys) == len(set(keys)), "a key stands twice"


@pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: row[0])
def test_the_commands_above_our_files_fit_together(row, caplog):
    path = CHECKOUT / "configs" / f"{row[0]}.yaml"
    indented = [line[7:] for line in path.read_text().splitlines() if line.startswith("#      ")]
    first, second, third = "\n".join(indented).replace("\\\n", "").splitlines()
    assert second == f"python distill/PAD.py --cfg configs/{row[0]}.yaml"
    assert first.startswith("python buffer/buffer_CL.py ") and third.startswith("python distill/evaluation.py ")
    record = read(BufferSettings, *first.split()[2:])
    distil = read(DistillSettings, "--cfg", str(path))
    score = read(EvaluationSettings, *third.split()[2:])
    for stage in (record, score):
        assert str(CHECKOUT / stage.buffer_path) == distil.buffer_path
        assert str(CHECKOUT / stage.data_path) == distil.data_path
    assert (record.dataset, record.model, record.zca) == (distil.dataset, distil.model, distil.zca)
    assert record.train_epochs >= distil.max_start_epoch - 1 + distil.expert_epochs
    assert Path(score.synthetic).parts[1:5] == (distil.dataset, str(distil.ipc), distil.model, distil.name)
    assert score.num_eval == 5
    assert not caplog.records


# ---- published files, flags and keys

PUBLISHED_TEXT = """\
dataset: CIFAR100
device: [3]

ipc: 10
syn_steps: 80
expert_epochs: 2
zca: False
lr_img: 1000
buffer_path: ../buffer_storage/
data_path: ../dataset
ema_decay: 0.9995
Iteration: 10000

# wandb
project: CIFAR100_ipc10

num_eval: 1
skip_first_eva: True

lr_y: 5.
threshold: 1.
max_files: None
texture: False
lr_lr: 1e-7
zca: True

depth_ratio: 0.5
loss_ratio: 0.5"""


@pytest.fixture
def published(tmp_path):
    """A published file where published files are: in the configs/ of a checkout."""
    (tmp_path / "checkout" / "distill").mkdir(parents=True)
    (tmp_path / "checkout" / "distill" / "PAD.py").touch()
    folder = tmp_path / "checkout" / "configs" / "CIFAR-100"
    folder.mkdir(parents=True)
    return Path(config(folder, PUBLISHED_TEXT, "IPC10.yaml"))


def test_a_published_file_is_read_as_it_stands(published, caplog):
    found = parse(DistillSettings, ["--cfg", str(published)], "test")
    assert found.zca is True  # of the two, the last
    assert (found.lr_lr, found.lr_y, found.threshold) == (1e-7, 5.0, 1.0)  # YAML 1.1 takes 1e-7 for a text
    assert (found.depth_ratio, found.loss_ratio) == (0.5, 0.5)
    assert found.device == "[3]" and found.max_files is None
    assert found.name == "IPC10-seed0"
    assert (found.syn_steps, found.model, found.Momentum_y, found.batch_train) == (80, "ConvNet", 0.9, 256)
    assert "Iteration" in found.given and "eval_it" not in found.given
    assert found.ema_decay == 0  # published, and of no account there
    assert first_words(caplog) == ["depth_ratio", "ema_decay", "texture", "zca"]
    assert not any("\n" in record.getMessage() for record in caplog.records)


def test_one_filter_alone_says_nothing(published, caplog):
    read(DistillSettings, "--cfg", str(published), "--loss_ratio", "0")
    assert first_words(caplog) == ["ema_decay", "texture", "zca"]


@pytest.mark.parametrize(
    "text, key, meant",
    [
        ("name: 007", "name", "007"),
        ("name: 1.10", "name", "1.10"),
        ("name: no", "name", "no"),
        ("name: 2024-01-01", "name", "2024-01-01"),
        ("name: 1:30", "name", "1:30"),
        ("name: 0x1F", "name", "0x1F"),
        ("name: 1e3", "name", "1e3"),
        ("name: 'null'", "name", "null"),
        ("seed: 010", "seed", 10),
        ("ipc: 1e1", "ipc", 10),
        ("ipc: 10.", "ipc", 10),
        ("lr_img: 1e3", "lr_img", 1000.0),
        ("lr_img: +.5", "lr_img", 0.5),
        ("zca: off", "zca", False),
        ("zca: On", "zca", True),
        ("zca: n0", "zca", None),
        ("ipc: 1:30", "ipc", None),
        ("ipc: 0x10", "ipc", None),
        ("threshold: ~", "threshold", None),
        ("batch_syn: None", "batch_syn", None),
        ("batch_syn:", "batch_syn", None),
        ("device: [0, 1]", "device", "[0,1]"),
        ("device: 1", "device", "1"),
        ("x: &common {ipc: 50}\n<<: *common", "x", None),
    ],
)
def test_text_of_a_file_means_what_is_written(text, key, meant, tmp_path):
    """Not what YAML 1.1 guesses: octal, sexagesimal, dates, no for False."""
    if meant is None and key not in ("threshold", "batch_syn"):
        assert key in refusal(DistillSettings, "--cfg", config(tmp_path, text))
    else:
        found = getattr(read(DistillSettings, "--cfg", config(tmp_path, text)), key)
        assert found == meant and type(found) is type(meant)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_files_as_windows_writes_them(encoding, tmp_path):
    found = read(DistillSettings, "--cfg", config(tmp_path, "name: caf\xe9\r\nipc: 10\r\n".encode(encoding)))
    assert (found.name, found.ipc) == ("caf\xe9", 10)


@pytest.mark.parametrize(
    "cls, argv, key, value",
    [
        (DistillSettings, ["--pix_init", "REAL"], "pix_init", "real"),
        (DistillSettings, ["--method", "datm", "--labels", "Soft"], "method", "DATM"),
        (BufferSettings, ["--add_schedule", "Linear"], "add_schedule", "linear"),
        (DistillSettings, ["--compile", "ON"], "compile", "on"),
        (ScoreSettings, ["--methods", "All"], "method_names", list(METHODS)),
    ],
)
def test_words_are_understood_in_any_case(cls, argv, key, value):
    assert getattr(read(cls, *argv), key) == value


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--methods", "GraNd,", "EL2N"], "no option takes 'EL2N': quote"),
        (["--Epochs", "3"], "the nearest is --epochs"),
        (["-epochs", "3"], "the nearest is --epochs"),
        (["\u2013epochs", "3"], "the nearest is --epochs"),
        (["epochs=3"], "the nearest is --epochs"),
        (["--train-per-class", "3"], "the nearest is --train_per_class"),
        (["--qqqqq"], "--help lists them"),
    ],
)
def test_habits_of_other_programs_are_answered_with_what_is_right_here(argv, words):
    assert words in refusal(ScoreSettings, *argv)


def test_settings_in_common_are_merged(tmp_path):
    text = "common: &common {ipc: 50}\nmine:\n  <<: *common\n  seed: 3"
    assert read_yaml(config(tmp_path, text)) == {"common": {"ipc": 50}, "mine": {"ipc": 50, "seed": 3}}


def test_what_is_given_twice_is_said(tmp_path, caplog):
    assert read(DistillSettings, "--ipc", "1", "--seed=3", "--ipc=10", "--lr_img", "1").ipc == 10
    assert first_words(caplog) == ["--ipc"] and "10" in caplog.text
    caplog.clear()
    assert read(DistillSettings, "--cfg", config(tmp_path, "ipc: 1\nseed: 3\nipc: 10"), "--seed", "4").ipc == 10
    assert first_words(caplog) == ["ipc"]


@pytest.mark.parametrize("key", ["data_path", "log_dir", "name", "dataset"])
def test_a_name_that_is_not_utf8_is_refused(key):
    """A run could be written there, and its files not be read again."""
    message = refusal(DistillSettings, f"--{key}", os.fsdecode(b"caf\xe9"))
    assert key in message and "UTF-8" in message and message.isascii()
    assert getattr(read(DistillSettings, f"--{key}", "caf\xe9 \u4e2d"), key) == "caf\xe9 \u4e2d"


@pytest.mark.parametrize("where", [".", "distill", "configs", ".."])
def test_paths_of_a_published_file_mean_the_same_from_anywhere(published, where, monkeypatch):
    checkout = published.parents[2]
    monkeypatch.chdir((checkout / where).resolve())
    found = read(DistillSettings, "--cfg", os.path.relpath(published))
    assert found.buffer_path == str(checkout / "buffer_storage")
    assert found.data_path == str(checkout / "dataset")


def test_other_paths_are_relative_to_the_current_folder(published, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert read(DistillSettings, "--cfg", str(published), "--buffer_path", "../b").buffer_path == "../b"  # a flag's
    outside = config(tmp_path, "buffer_path: ../b\ndata_path: /absolute/../d\nlog_dir: runs")
    found = read(DistillSettings, "--cfg", outside)
    assert (found.buffer_path, found.log_dir) == (str(tmp_path.parent / "b"), str(tmp_path / "runs"))
    assert os.path.normpath(found.data_path) == "/d"


def test_home_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    path = config(tmp_path, "buffer_path: ~/b")
    assert read(DistillSettings, "--cfg", path, "--data_path=~/d").data_path == "/home/someone/d"
    assert read(DistillSettings, "--cfg", path).buffer_path == "/home/someone/b"
    for argv in (["--data_path", "~no-such-user/d"], ["--cfg", config(tmp_path, "data_path: ~no-such-user/d")]):
        assert refusal(DistillSettings, *argv).startswith("data_path: '~no-such-user/d' is not a path")


# Every flag of the published scripts with its default there (None: it takes no value; files: they must be named), and
# every key of the published utils/cfg.py with its default.
BUFFER_FLAGS = {
    "dataset": "CIFAR10",
    "subset": "imagenette",
    "model": "ConvNet",
    "num_experts": "100",
    "lr_teacher": "0.01",
    "batch_train": "256",
    "batch_real": "256",
    "dsa": "True",
    "dsa_strategy": "color_crop_cutout_flip_scale_rotate",
    "data_path": "data",
    "buffer_path": "./buffers",
    "add_hard": "True",
    "rm_easy": "False",
    "init_ratio": "1.0",
    "rm_epoch_first": "40",
    "rm_epoch_second": "60",
    "rm_easy_ratio_first": "0.1",
    "rm_easy_ratio_second": "0.1",
    "max_ratio": "0.2",
    "add_end_epoch": "100",
    "sort_method": "CIFAR10_GraNd",
    "train_epochs": "50",
    "zca": None,
    "decay": None,
    "mom": "0",
    "l2": "0",
    "save_interval": "10",
    "rho_max": "2.0",
    "rho_min": "2.0",
    "alpha": "0.4",
    "adaptive": "True",
}
EVALUATION_FLAGS = {
    "dataset": "CIFAR10",
    "subset": "imagenette",
    "model": "ConvNet",
    "eval_mode": "S",
    "epoch_eval_train": "1000",
    "batch_real": "256",
    "dsa": "True",
    "dsa_strategy": "color_crop_cutout_flip_scale_rotate",
    "data_path": "data",
    "zca": None,
    "lr_teacher": "0.01",
    "no_aug": "False",
    "parall_eva": "False",
    "data_dir": "i.pt",
    "label_dir": "l.pt",
    "lr_dir": "r.pt",
}
DISTILL_KEYS = {
    "dataset": "CIFAR10",
    "subset": "imagenette",
    "model": "ConvNet",
    "ipc": 1,
    "eval_mode": "S",
    "num_eval": 5,
    "eval_it": 100,
    "epoch_eval_train": 1000,
    "Iteration": 5000,
    "lr_img": 1000,
    "lr_teacher": 0.01,
    "lr_init": 0.01,
    "batch_real": 256,
    "batch_syn": 256,
    "batch_train": 256,
    "pix_init": "samples_predicted_correctly",
    "dsa": True,
    "dsa_strategy": "color_crop_cutout_flip_scale_rotate",
    "data_path": "../dataset/",
    "buffer_path": "../buffer_storage/",
    "expert_epochs": 2,
    "syn_steps": 80,
    "max_start_epoch": 25,
    "min_start_epoch": 0,
    "zca": True,
    "load_all": False,
    "no_aug": False,
    "texture": False,
    "canvas_size": 2,
    "canvas_samples": 1,
    "max_files": None,
    "max_experts": None,
    "force_save": False,
    "ema_decay": 0.999,
    "lr_y": 2.0,
    "Momentum_y": 0.9,
    "project": "TEST",
    "name": "RANDOM",
    "threshold": 1.0,
    "loss_ratio": 0.0,
    "depth_ratio": 0.0,
    "record_loss": False,
    "Sequential_Generation": True,
    "expansion_end_epoch": 3000,
    "current_max_start_epoch": 20,
    "init_frozen": "start",
    "skip_first_eva": False,
    "parall_eva": False,
    "lr_lr": 0.00001,
    "res": 32,
    "device": [0],
    "Initialize_Label_With_Another_Model": False,
    "Initialize_Label_Model": "",
    "Initialize_Label_Model_Dir": "",
    "Label_Model_Timestamp": -1,
}
DEAD = {  # what does nothing, in the published code or here, and must be said to
    BufferSettings: {"batch_real", "add_hard", "rm_easy", "max_ratio", "decay", "save_interval"},
    EvaluationSettings: {"batch_real", "lr_teacher", "no_aug", "parall_eva"},
    DistillSettings: {
        "batch_real",
        "lr_init",
        "load_all",
        "texture",
        "canvas_size",
        "canvas_samples",
        "force_save",
        "ema_decay",
        "record_loss",
        "init_frozen",
        "parall_eva",
        "Initialize_Label_Model_Dir",
    },
}


@pytest.mark.parametrize(("cls", "flags"), [(BufferSettings, BUFFER_FLAGS), (EvaluationSettings, EVALUATION_FLAGS)])
@pytest.mark.parametrize("joined", [True, False], ids=["--flag=value", "--flag value"])
def test_every_published_flag_is_accepted(cls, flags, joined, caplog):
    argv = []
    for flag, value in flags.items():
        argv += [f"--{flag}"] if value is None else [f"--{flag}={value}"] if joined else [f"--{flag}", value]
    found = parse(cls, argv, "test")
    assert found.given == set(flags) - DEAD[cls]
    assert found.zca is True and found.dataset == "CIFAR10" and found.dsa is True
    assert first_words(caplog) == sorted(DEAD[cls])


def test_every_published_key_is_accepted(tmp_path, caplog):
    found = parse(DistillSettings, ["--cfg", config(tmp_path, yaml.safe_dump(DISTILL_KEYS))], "test")
    dead = DEAD[DistillSettings]
    given = found.given - {"ema_decay"}  # which another system reads
    assert given == set(DISTILL_KEYS) - dead
    assert first_words(caplog) == sorted(dead)
    unlike = {"device", "data_path", "buffer_path"}  # another form of the same
    for key in given - unlike:
        assert getattr(found, key) == DISTILL_KEYS[key], key
    # The files lean on defaults: they are the published ones, but for what depends on the data set, machine or run.
    defaults = DistillSettings()
    for key in given - unlike - {"res", "name", "project"}:
        assert getattr(defaults, key) == DISTILL_KEYS[key], key


def test_published_defaults_of_the_first_stage():
    defaults = BufferSettings()
    for flag, value in BUFFER_FLAGS.items():
        if flag not in DEAD[BufferSettings] | {"zca", "sort_method"}:
            assert str(getattr(defaults, flag)) in (value, f"{value}.0"), flag
    assert defaults.zca is False and defaults.sort_method == ""


def test_every_published_key_is_also_a_flag():
    argv = [f"--{key}={value}" for key, value in DISTILL_KEYS.items() if value is not None]
    found = read(DistillSettings, *argv)
    for key, value in DISTILL_KEYS.items():
        if key not in DEAD[DistillSettings] | {"device"} and value is not None:
            assert getattr(found, key) == value, key
    assert found.device == "[0]"


# ---- precedence and forms of values


def test_flags_override_the_file_and_the_file_the_defaults(tmp_path):
    path = config(tmp_path, "ipc: 3\nlr_img: 50\ndsa: False\nname: mine")
    found = parse(DistillSettings, ["--ipc", "4", "--cfg", path, "--seed=7"], "test")
    assert (found.ipc, found.lr_img, found.dsa, found.lr_y) == (4, 50.0, False, 2.0)
    assert (found.seed, found.name) == (7, "mine")
    assert found.given == {"ipc", "lr_img", "dsa", "seed", "name"}
    assert read(DistillSettings, "--ipc", "1", "--ipc", "2").ipc == 2


def test_a_run_is_named_after_its_file_and_seed(tmp_path):
    path = config(tmp_path, "seed: 3", "IPC10.yaml")
    assert read(DistillSettings, "--cfg", path).name == "IPC10-seed3"
    assert read(DistillSettings, "--cfg", path, "--seed", "4").name == "IPC10-seed4"
    assert read(DistillSettings, "--cfg", path, "--name", "own").name == "own"


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--adaptive", "False"], False),
        (["--adaptive=false"], False),
        (["--adaptive", "0"], False),
        ([], True),
        (["--adaptive", "no"], False),
        (["--adaptive"], True),
        (["--adaptive", "True"], True),
        (["--adaptive", "1"], True),
    ],
)
def test_booleans_on_the_command_line(argv, expected):
    assert read(BufferSettings, *argv, "--mom", "0.5").adaptive is expected


def test_published_spellings_of_booleans():
    assert read(BufferSettings, "--zca", "--dsa", "True").zca is True
    found = read(BufferSettings, "--dsa=False", "--zca", "--model", "ConvNet")
    assert (found.dsa, found.zca, found.model) == (False, True, "ConvNet")


@pytest.mark.parametrize(("text", "value"), [("yes", True), ("no", False), ("on", True), ("1", True), ("'False'", 0)])
def test_booleans_in_a_file(tmp_path, text, value):
    assert read(DistillSettings, "--cfg", config(tmp_path, f"dsa: {text}")).dsa is bool(value)


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-5", 1e-5), ("1.e-5", 1e-5), ("0.00001", 1e-5), ("'2'", 2.0), ("5.", 5.0), ("3", 3.0), ("0", 0.0)],
)
def test_numbers_in_a_file(tmp_path, text, value):
    found = read(DistillSettings, "--cfg", config(tmp_path, f"lr_lr: {text}"))
    assert found.lr_lr == value and type(found.lr_lr) is float


def test_whole_numbers_keep_their_type(tmp_path):
    text = "Iteration: 1e3\nipc: 10.0\nbatch_syn: None\nmax_experts: 2"
    found = read(DistillSettings, "--cfg", config(tmp_path, text))
    assert (found.Iteration, found.ipc, found.batch_syn, found.max_experts) == (1000, 10, None, 2)
    assert type(found.Iteration) is type(found.ipc) is int


@pytest.mark.parametrize(
    ("text", "index"), [("[0,1]", 0), ("[3]", 3), ("cuda:2", 2), ("1", 1), ("cuda", 0), ("[2, 0]", 2), ("auto", 0)]
)
def test_devices(tmp_path, text, index, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    found = read(DistillSettings, "--cfg", config(tmp_path, f"device: {text}"))
    assert str(found.torch_device()) == f"cuda:{index}"
    assert read(DistillSettings, "--device", text).torch_device() == found.torch_device()
    monkeypatch.setattr("torch.cuda.device_count", lambda: index)
    with pytest.raises(InputError, match="device"):
        found.torch_device()
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    if text.startswith("cuda"):
        with pytest.raises(InputError, match="no CUDA device is available"):
            found.torch_device()
    else:
        assert found.torch_device().type == "cpu"


def test_an_empty_file_gives_the_defaults(tmp_path):
    found = read(DistillSettings, "--cfg", config(tmp_path, ""))
    assert dataclasses.replace(found, name="") == DistillSettings.resolve({})
    assert read(BufferSettings, "--cfg", config(tmp_path, "# nothing\n")) == BufferSettings.resolve({})


def test_help_names_every_live_flag_and_no_dead_one(capsys):
    for cls in STAGES:
        with pytest.raises(SystemExit) as caught:
            parse(cls, ["--help"], "test")
        assert caught.value.code == 0
        words = {word.strip("[],") for word in capsys.readouterr().out.split()}
        assert {f"--{name}" for name in cls.fields()} <= words
        assert not {f"--{name}" for name in (*cls.dead, *cls.refused)} & words


# ---- refusals


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [("--ipx", "--ipc"), ("--lr_image=3", "--lr_img"), ("--Momentum", "--Momentum_y"), ("-ipc", "--ipc")],
)
def test_an_unknown_flag_names_the_nearest(wrong, nearest):
    message = refusal(DistillSettings, wrong, "3")
    assert repr(wrong.split("=")[0]) in message and message.endswith(f"the nearest is {nearest}")


def test_flags_are_not_abbreviated():
    assert "--num_exp" in refusal(BufferSettings, "--num_exp", "3")


def test_an_unknown_key_names_the_file_and_the_nearest(tmp_path):
    path = config(tmp_path, "ipc: 1\nsyn_step: 20")
    message = refusal(DistillSettings, "--cfg", path)
    assert path in message and "'syn_step'" in message and message.endswith("the nearest is syn_steps")
    for key in ("1", "null", "true", "2024-01-01", "''", "[a, b]", "0x" + "f" * 5000):
        assert "some.yaml" in refusal(DistillSettings, "--cfg", config(tmp_path, f"? {key}\n: 2"))


def test_a_key_of_another_stage_is_unknown(tmp_path):
    assert "num_experts" in refusal(DistillSettings, "--cfg", config(tmp_path, "num_experts: 2"))


RANGES = [  # a value that is just in, and one that is just out
    (BufferSettings, "num_experts", "1", "0"),
    (BufferSettings, "train_epochs", "1", "0"),
    (BufferSettings, "mom", "0", "-0.1"),
    (BufferSettings, "mom", "0.99", "1"),
    (BufferSettings, "lr_teacher", "1e-9", "0"),
    (BufferSettings, "l2", "0", "-1"),
    (BufferSettings, "alpha", "0", "-0.1"),
    (BufferSettings, "init_ratio", "1", "1.001"),
    (BufferSettings, "init_ratio", "0.001", "0"),
    (BufferSettings, "rm_easy_ratio_first", "0.99", "1"),
    (BufferSettings, "rm_easy_ratio_second", "0", "-0.01"),
    (BufferSettings, "add_end_epoch", "0", "-1"),
    (BufferSettings, "add_schedule", "geometric", "cosine"),
    (BufferSettings, "removal", "linear", "gradual"),
    (BufferSettings, "drop_easy", "0.99", "1"),
    (BufferSettings, "eval_every", "0", "-1"),
    (BufferSettings, "score_repeats", "1", "0"),
    (BufferSettings, "batch_train", "1", "0"),
    (BufferSettings, "seed", "0", "-1"),
    (BufferSettings, "res", "4", "3"),
    (DistillSettings, "ipc", "1", "0"),
    (DistillSettings, "Iteration", "0", "-1"),
    (DistillSettings, "syn_steps", "1", "0"),
    (DistillSettings, "expert_epochs", "1", "0"),
    (DistillSettings, "batch_syn", "1", "0"),
    (DistillSettings, "min_start_epoch", "0", "-1"),
    (DistillSettings, "depth_ratio", "0.999", "1"),
    (DistillSettings, "depth_ratio", "0", "-0.1"),
    (DistillSettings, "match_from", "0.999", "1"),
    (DistillSettings, "match_to", "1", "1.01"),
    (DCSettings, "match_to", "0.001", "0"),
    (DistillSettings, "loss_ratio", "0.999", "1"),
    (DistillSettings, "threshold", "0.1", "0"),
    (DistillSettings, "lr_img", "0", "-1"),
    (DistillSettings, "lr_y", "0", "-1"),
    (DistillSettings, "Momentum_y", "0", "1"),
    (DistillSettings, "lr_lr", "0", "-1"),
    (DistillSettings, "max_files", "1", "0"),
    (DistillSettings, "eval_it", "1", "0"),
    (DistillSettings, "pix_init", "noise", "nois"),
    (DistillSettings, "tracker", "wandb", "tensorbored"),
    (DistillSettings, "compile", "off", "yes"),
    (EvaluationSettings, "num_eval", "1", "0"),
    (EvaluationSettings, "epoch_eval_train", "1", "0"),
    (EvaluationSettings, "score_epochs", "1", "0"),
    (BufferSettings, "score_lr", "1e-9", "0"),
    (BufferSettings, "score_momentum", "0", "1"),
    (BufferSettings, "score_momentum", "0.99", "-0.1"),
    (BufferSettings, "score_weight_decay", "0", "-1"),
    (BufferSettings, "score_batch", "1", "0"),
    (BufferSettings, "score_augmentation", "crop_flip", "flop"),
    (ScoreSettings, "repeats", "1", "0"),
    (ScoreSettings, "epochs", "1", "0"),
    (ScoreSettings, "lr", "1e-9", "0"),
    (ScoreSettings, "momentum", "0.99", "1"),
    (ScoreSettings, "weight_decay", "0", "-1"),
    (ScoreSettings, "batch", "1", "0"),
    (ScoreSettings, "augmentation", "none", "flop"),
    (CoresetSettings, "ipc", "1", "0"),
    (CoresetSettings, "lr", "1e-9", "0"),
    (CoresetSettings, "end", "hardest", "middle"),
    (CoresetSettings, "labels", "hard", "firm"),
    (DistillSettings, "method", "DATM", "DC"),
    (DistillSettings, "gradient", "truncated", "short"),
    (DistillSettings, "labels", "hard", "firm"),
    (DistillSettings, "ema_decay", "0", "1"),
    (DCSettings, "outer_loop", "1", "0"),
    (DCSettings, "inner_loop", "0", "-1"),
    (DCSettings, "batch_real", "1", "0"),
    (DCSettings, "drop_easy", "0.99", "1"),
    (DCSettings, "drop_hard", "0", "-0.1"),
    (DCSettings, "lr_net", "1e-9", "0"),
    (DCSettings, "pix_init", "real", "samples_predicted_correctly"),
    (DCSettings, "depth_ratio", "0.999", "1"),
    (DMSettings, "depth_ratio", "0", "-0.1"),
    (DMSettings, "depth_ratio", "0.999", "1"),
    (DMSettings, "drop_hard", "0.99", "1"),
    (DMSettings, "ipc", "1", "0"),
    (TGDDSettings, "stage_epochs", "1", "0"),
    (TGDDSettings, "ce_weight", "0", "-0.1"),
    (TGDDSettings, "max_start_epoch", "1", "0"),
    (InfluenceSettings, "checkpoints", "1", "0"),
    (InfluenceSettings, "labels", "hard", "smooth"),
    (NCFMSettings, "frequencies", "1", "0"),
    (NCFMSettings, "amplitude", "1", "1.1"),
    (NCFMSettings, "amplitude", "0", "-0.1"),
    (NCFMSettings, "optimiser", "sgd", "adam"),
    (NCFMSettings, "decay_img", "0", "-1"),
]


@pytest.mark.parametrize(("cls", "key", "inside", "outside"), RANGES)
def test_ranges(cls, key, inside, outside, tmp_path):
    needed = TRIO if cls is EvaluationSettings else []
    value = getattr(read(cls, *needed, f"--{key}={inside}"), key)
    assert value == type(value)(inside)
    message = refusal(cls, *needed, f"--{key}={outside}")
    assert message.startswith(f"{key}: ") and outside in message
    assert refusal(cls, *needed, "--cfg", config(tmp_path, f"{key}: {outside}")).startswith(f"{key}: ")


@pytest.mark.parametrize(
    "value",
    [
        "nan",
        ".nan",
        ".inf",
        "-.inf",
        "inf",
        "1e999",
        "-1e999",
        "abc",
        "''",
        "[1]",
        "{a: 1}",
        "true",
        "null",
        "2024-01-01",
        "!!binary aGk=",
        "0x" + "f" * 5000,
        "1" * 400,
    ],
)
@pytest.mark.parametrize("key", ["lr_img", "ipc", "seed", "depth_ratio"])
def test_what_is_not_a_usable_number(key, value, tmp_path):
    message = refusal(DistillSettings, "--cfg", config(tmp_path, f"{key}: {value}"))
    assert message.startswith(f"{key}: ") and len(message) < 200


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("ipc", "2.5"),
        ("ipc", "1e30"),
        ("seed", str(2**60)),
        ("zca", "maybe"),
        ("zca", "2"),
        ("zca", "''"),
        ("zca", "[True]"),
        ("model", "[ConvNet]"),
        ("model", "!!bool true"),
        ("model", '"a\\0b"'),
        ("data_path", "{a: b}"),
        ("data_path", "null"),
        ("device", "gpu"),
        ("device", "[a]"),
        ("device", "[]"),
        ("device", "-1"),
        ("device", "cuda:"),
        ("device", "[0,x]"),
        ("device", "[true]"),
        ("device", "1.5"),
        ("device", "9999999999999999999999"),
        ("dsa_strategy", "colour_crop"),
        ("dsa_strategy", "3"),
    ],
)
def test_wrong_types(key, value, tmp_path):
    message = refusal(DistillSettings, "--cfg", config(tmp_path, f"{key}: {value}"))
    assert key in message or value in message


def test_flags_that_lack_their_value():
    assert "--ipc" in refusal(DistillSettings, "--ipc")
    assert "--cfg" in refusal(DistillSettings, "--ipc", "1", "--cfg")
    assert "'stray'" in refusal(DistillSettings, "stray")


TEN_FOLD = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 30)
)


@pytest.mark.parametrize(
    "text",
    [
        "- ipc: 1",
        "just words",
        "3",
        "ipc: 1: 2",
        "ipc: [1",
        "\t- x",
        b"ipc: \xff\xfe",
        b"\x00\x01\x02",
        "ipc: !!bool x",
        "x: !!int ''",
        "ipc: !!python/object/apply:os.system [echo]",
        "ipc: 2024-99-99",
        "ipc: *nowhere",
        "[" * 5000,
        "? [a]\n: 1",
        "ipc: &a [*a]",
        TEN_FOLD + "ipc: *a29",
        TEN_FOLD.replace("a0:", "device:", 1),
        "? " + "k" * 100_000 + "\n: 1",
    ],
    ids=lambda text: repr(text[:24]),
)
def test_what_is_not_a_usable_file(text, tmp_path):
    message = refusal(DistillSettings, "--cfg", config(tmp_path, text))
    assert "some.yaml" in message or message.startswith("ipc: ")
    assert len(message) < 700


def test_files_that_cannot_be_read(tmp_path):
    missing = str(tmp_path / "missing.yaml")
    assert missing in refusal(DistillSettings, "--cfg", missing)
    assert str(tmp_path) in refusal(DistillSettings, "--cfg", str(tmp_path))
    assert "config" in refusal(DistillSettings, "--cfg", "")
    assert "config" in refusal(DistillSettings, "--cfg", "a\0b")
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    assert "loop.yaml" in refusal(DistillSettings, "--cfg", str(tmp_path / "loop.yaml"))


@pytest.mark.parametrize(
    ("cls", "argv", "named"),
    [
        (BufferSettings, ["--rho_max", "0.1"], ["rho_max", "rho_min"]),
        (BufferSettings, ["--rm_epoch_first", "70"], ["rm_epoch_first", "rm_epoch_second"]),
        (DistillSettings, ["--max_start_epoch", "5", "--min_start_epoch", "5"], ["max_start_epoch", "min_start_epoch"]),
        (DistillSettings, ["--min_start_epoch", "20"], ["current_max_start_epoch", "Sequential_Generation"]),
        (DistillSettings, ["--Initialize_Label_With_Another_Model"], ["Initialize_Label_Model"]),
        (DistillSettings, ["--resume", "--overwrite"], ["resume", "overwrite"]),
        (DistillSettings, ["--match_from", "0.5", "--match_to", "0.5"], ["match_from: 0.5", "match_to: 0.5"]),
        (DistillSettings, ["--depth_ratio", "0.5", "--match_from", "0.5"], ["depth_ratio: 0.5", "match_from: 0.5"]),
        (DCSettings, ["--depth_ratio", "0.25", "--match_to", "0.5"], ["depth_ratio: 0.25", "match_to: 0.5"]),
        (EvaluationSettings, [], ["--synthetic", "--data_dir", "--label_dir", "--lr_dir"]),
        (EvaluationSettings, ["--data_dir", "a"], ["--label_dir and --lr_dir"]),
        (EvaluationSettings, [*TRIO, "--synthetic", "s"], ["synthetic", "data_dir"]),
        (ScoreSettings, ["--methods", " , "], ["methods", "all"]),
        (DCSettings, ["--drop_easy", "0.5", "--drop_hard", "0.5"], ["drop_easy: 0.5", "drop_hard: 0.5"]),
        (DMSettings, ["--drop_easy", "0.7", "--drop_hard", "0.4"], ["drop_easy: 0.7", "drop_hard: 0.4"]),
        (DMSettings, ["--resume", "--overwrite"], ["resume", "overwrite"]),
        (TGDDSettings, ["--max_start_epoch", "5", "--min_start_epoch", "5"], ["max_start_epoch", "min_start_epoch"]),
        (CoresetSettings, ["--labels", "soft"], ["labels", "--buffer_path"]),
    ],
)
def test_settings_that_do_not_go_together(cls, argv, named):
    message = refusal(cls, *argv)
    assert all(name in message for name in named)


# ---- the ways of matching

FRONT_DOORS = {DistillSettings: cli.distill, DCSettings: cli.match_gradients, DMSettings: cli.match_distributions}
FRONT_DOORS |= {TGDDSettings: cli.match_along_trajectories, NCFMSettings: cli.match_characteristics}
FRONT_DOORS |= {InfluenceSettings: cli.match_influence}
REFUSED = [(cls, key) for cls in FRONT_DOORS for key in cls.refused]


def test_each_way_of_matching_refuses_what_the_others_alone_have():
    trajectories, gradients, distributions = (set(cls.fields()) for cls in (DistillSettings, DCSettings, DMSettings))
    assert {"drop_easy", "drop_hard", "outer_loop", "inner_loop", "lr_net"} == set(DistillSettings.refused)
    for key in (
        "buffer_path",
        "syn_steps",
        "batch_syn",
        "loss_ratio",
        "threshold",
        "gradient",
        "labels",
        "lr_y",
        "lr_lr",
    ):
        assert key in trajectories and {key} <= DCSettings.refused.keys() & DMSettings.refused.keys()
    own = {"outer_loop", "inner_loop", "micro_batch", "match_from", "match_to"}
    assert own == gradients - distributions == DMSettings.refused.keys() - DCSettings.refused
    for cls in FRONT_DOORS:
        names = set(cls.fields())
        assert (
            not names & cls.refused.keys() and not names & cls.dead.keys() and not cls.dead.keys() & cls.refused.keys()
        )


@pytest.mark.parametrize(("cls", "key"), REFUSED)
def test_what_a_way_of_matching_does_not_have_is_refused_by_name(cls, key, tmp_path, monkeypatch, capsys):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    argvs = [["--cfg", config(tmp_path, f"{key}: 0.5")], [f"--{key}", "0.5"], [f"--{key}=0.5"], [f"--{key}"]]
    for argv in argvs:
        assert FRONT_DOORS[cls](argv) == 2
        out, err = capsys.readouterr()
        assert out == "" and err == f"error: {key}: {cls.refused[key]}\n"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["here", "some.yaml"]


DEFINED = {
    "MTT": "labels: hard",
    "FTD": "labels: hard",
    "TESLA": "gradient: truncated",
    "DATM": "labels: soft",
    "PAD": "labels: soft",
}


@pytest.mark.parametrize("method", ["PAD", "DATM", "MTT", "TESLA"])
def test_a_moving_average_is_ftds_alone(method, tmp_path, caplog):
    lines = f"method: {method}\n{DEFINED[method]}\n"
    found = read(DistillSettings, "--cfg", config(tmp_path, f"{lines}ema_decay: 0.999"))
    assert found.ema_decay == 0 and found.method == method
    assert first_words(caplog) == ["ema_decay"] and f"{method} keeps no moving average" in caplog.text
    caplog.clear()
    assert read(DistillSettings, "--cfg", config(tmp_path, lines)).ema_decay == 0 and not caplog.records


def test_ftd_keeps_its_moving_average(caplog):
    ftd = ["--method", "FTD", "--labels", "hard"]
    assert read(DistillSettings, *ftd, "--ema_decay", "0.999").ema_decay == 0.999 and not caplog.records
    assert read(DistillSettings, *ftd).ema_decay == 0 and "not kept" in caplog.text


@pytest.mark.parametrize(
    ("method", "key", "value"),
    [
        ("MTT", "labels", "soft"),
        ("FTD", "labels", "soft"),
        ("DATM", "labels", "hard"),
        ("TESLA", "gradient", "exact"),
        ("MTT", "gradient", "truncated"),
        ("DATM", "gradient", "truncated"),
    ],
)
def test_what_would_make_a_method_another_is_refused(method, key, value, tmp_path):
    lines = f"method: {method}\n{DEFINED[method]}\n{key}: {value}"
    with pytest.raises(InputError, match=f"{key}: {value} is not {method}"):
        read(DistillSettings, "--cfg", config(tmp_path, lines))
    assert getattr(read(DistillSettings, f"--{key}", value), key) == value, "PAD, the default, leaves it open"


@pytest.mark.parametrize("text", ["none", "None", "null", "~", "''"])
def test_no_threshold(text, tmp_path):
    assert read(DistillSettings, "--cfg", config(tmp_path, f"threshold: {text}")).threshold is None
    assert read(DistillSettings, "--threshold", "none").threshold is None
    assert read(DistillSettings).threshold == 1.0


@pytest.mark.parametrize(
    ("ipc", "loops"), [(1, (1, 1)), (10, (10, 50)), (20, (20, 25)), (30, (30, 20)), (40, (40, 15)), (50, (50, 10))]
)
def test_the_published_loops_of_gradient_matching(ipc, loops):
    assert read(DCSettings, "--ipc", str(ipc)).loops == loops
    assert read(DCSettings, "--ipc", str(ipc), "--inner_loop", "0").loops == (loops[0], 0)
    assert read(DCSettings, "--ipc", str(ipc), "--outer_loop", "7").loops == (7, loops[1])


@pytest.mark.parametrize(
    ("ipc", "loops"), [(2, (10, 50)), (11, (20, 25)), (49, (50, 10)), (51, (50, 10)), (1000, (50, 10))]
)
def test_loops_of_another_ipc_are_those_of_the_next_that_is_published_and_it_is_said(ipc, loops, caplog):
    assert read(DCSettings, "--ipc", str(ipc), "--outer_loop", "3", "--inner_loop", "0").loops == (3, 0)
    assert not caplog.records
    assert read(DCSettings, "--ipc", str(ipc)).loops == loops
    assert read(DCSettings, "--ipc", str(ipc), "--outer_loop", "7").loops == (7, loops[1])
    assert f"ipc: {ipc} has no published outer_loop and inner_loop; 7 and {loops[1]} are taken" in caplog.text


def test_published_defaults_of_gradient_and_distribution_matching():
    gradients, distributions = DCSettings(), DMSettings()
    assert (gradients.lr_img, gradients.lr_net, gradients.Iteration, gradients.pix_init) == (0.1, 0.01, 1000, "noise")
    assert (distributions.Iteration, distributions.pix_init) == (20000, "real")
    rates = {
        (name, ipc): read(DMSettings, "--dataset", name, "--ipc", ipc).lr_img
        for name in ("CIFAR10", "CIFAR100")
        for ipc in ("50", "100")
    }
    assert rates == {("CIFAR10", "50"): 1, ("CIFAR10", "100"): 10, ("CIFAR100", "50"): 1, ("CIFAR100", "100"): 1}
    assert read(DMSettings, "--ipc", "100", "--lr_img", "3").lr_img == 3
    assert gradients.batch_real == distributions.batch_real == 256
    assert gradients.depth_ratio == 0 and distributions.depth_ratio is None and distributions.epoch_eval_train == 1000
    assert not gradients.needs_ranking and read(DMSettings, "--drop_hard", "0.05").needs_ranking


def test_start_epochs_without_sequential_generation():
    epochs = ["--min_start_epoch", "40", "--max_start_epoch", "60"]
    found = read(DistillSettings, *epochs, "--Sequential_Generation", "False")
    assert (found.min_start_epoch, found.current_max_start_epoch) == (40, 20)  # of no account


def test_baselines_of_the_third_stage():
    texts = ("none", "soft", "soft, hard", "hard,Herding,hard,")
    kinds = {text: read(EvaluationSettings, *TRIO, f"--baselines={text}").baseline_kinds for text in texts}
    assert kinds == {
        "none": [],
        "soft": ["soft"],
        "soft, hard": ["soft", "hard"],
        "hard,Herding,hard,": ["hard", "Herding"],
    }


def test_methods_to_score_by():
    assert read(ScoreSettings, "--methods", "EL2N, GraNd,EL2N").method_names == ["EL2N", "GraNd"]
    assert read(ScoreSettings, "--methods=all").method_names == [*METHODS]


@pytest.mark.parametrize(
    ("cls", "prefix"), [(ScoreSettings, ""), (BufferSettings, "score_"), (CoresetSettings, "score_")]
)
def test_scoring_networks_are_trained_alike_from_every_command(cls, prefix):
    assert read(cls, "--model", "MLP").scoring == ScoringSettings("MLP")
    values = {"repeats": 2, "epochs": 3, "lr": 0.5, "momentum": 0.5, "weight_decay": 0.25, "batch": 4}
    values["augmentation"] = "flip"
    argv = [f"--{prefix}{name}={value}" for name, value in values.items()]
    model = "score_model" if prefix else "model"
    assert read(cls, *argv, f"--{model}=LeNet").scoring == ScoringSettings(model="LeNet", **values)


def test_the_command_line_prints_one_sentence_and_returns_2(capsys, tmp_path):
    for argv in (["--ipx", "3"], ["--cfg", "no\nsuch\rfile"], ["--cfg", config(tmp_path, "ipc: [1,")]):
        assert cli.distill(argv) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("error: ") and len(err.splitlines()) == 1


# ---- whatever is given: settings, or one sentence

MANY = hypothesis_settings(
    max_examples=100, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
LINE = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Zl", "Zp")), max_size=12)
SCALARS = st.one_of(
    st.integers(),
    st.floats(),
    st.booleans(),
    st.none(),
    LINE,
    st.dates(),
    st.binary(max_size=4),
    st.sampled_from(["1e-5", "nan", "-inf", "True", "false", "None", "[0,1]", "cuda:1", "auto", "0", "1", "-1"]),
    st.sampled_from(["~", "~x/y", "./~x", "../a", "/", "x" * 300, "\0"]),
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(LINE, inner, max_size=2), max_leaves=4
)


def check_outcome(cls, argv: list[str], folder: Path) -> None:
    """``argv`` is refused with a sentence, or gives settings that are typed, in range, and survive a file."""
    try:
        found = read(cls, *argv)
    except InputError as error:
        assert str(error) and "\n" not in str(error)
        return
    values = found.as_dict()
    json.dumps(values, allow_nan=False)
    for name, field in cls.fields().items():
        value, meta = values[name], field.metadata
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            assert math.isfinite(value)
            assert meta["low"] is None or value >= meta["low"]
            assert meta["above"] is None or value > meta["above"]
            assert meta["high"] is None or value <= meta["high"]
            assert meta["below"] is None or value < meta["below"]
        if meta["choices"] and value is not None and value not in meta["choices"]:
            assert name == "pix_init" and ("/" in value or "." in value), "it may also be the path of a set"
    again = read(cls, "--cfg", config(folder, yaml.safe_dump(values, allow_unicode=True), "again.yaml")).as_dict()
    for name, value in values.items():
        assert again[name] == value or os.path.abspath(again[name]) == os.path.abspath(value), name


@pytest.mark.parametrize("cls", [cls if cls is DistillSettings else slow(cls) for cls in STAGES])
def test_any_command_line_gives_settings_or_a_sentence(cls, tmp_path):
    names = [*cls.fields(), *cls.dead, *cls.refused, "cfg"]
    words = st.one_of(
        st.tuples(st.sampled_from(names), SCALARS).map(lambda pair: [f"--{pair[0]}", str(pair[1])]),
        st.tuples(st.sampled_from(names), SCALARS).map(lambda pair: [f"--{pair[0]}={pair[1]}"]),
        st.sampled_from(names).map(lambda name: [f"--{name}"]),
        LINE.filter(lambda word: not word.startswith("-h") and word != "--help").map(lambda word: [word]),
    )

    @MANY
    @given(st.lists(words, max_size=4))
    def run(argv):
        needed = TRIO if cls is EvaluationSettings else []
        check_outcome(cls, [*needed, *(word for part in argv for word in part)], tmp_path)

    run()


@pytest.mark.parametrize("cls", [cls if cls is DistillSettings else slow(cls) for cls in STAGES])
def test_any_file_gives_settings_or_a_sentence(cls, tmp_path):
    names = [*cls.fields(), *cls.dead, *cls.refused]
    mappings = st.dictionaries(st.sampled_from(names) | SCALARS, VALUES, max_size=4)
    known = st.dictionaries(st.sampled_from(names), VALUES, max_size=4)

    @MANY
    @given(st.one_of(known, known, mappings, VALUES, st.binary(max_size=40), st.text(max_size=40)))
    def run(content):
        if not isinstance(content, (bytes, str)):
            content = yaml.safe_dump(content, allow_unicode=True)
        path = config(tmp_path, content)
        check_outcome(cls, [*(TRIO if cls is EvaluationSettings else []), "--cfg", path], tmp_path)

    run()


def test_networks_stand_in_the_place_of_the_pool_of_eval_mode(caplog):
    with caplog.at_level("WARNING", "pad"):
        for cls in (DistillSettings, EvaluationSettings):
            of_set = {"synthetic": "set.safetensors"} if cls is EvaluationSettings else {}
            assert cls.resolve(of_set).pool == ["ConvNet"]
            assert cls.resolve(of_set | {"networks": "MLP, torchvision:resnet18,MLP"}).pool == [
                "MLP",
                "torchvision:resnet18",
            ]
        assert caplog.records == []
        assert DistillSettings.resolve({"networks": "MLP", "eval_mode": "M"}).pool == ["MLP"]
    assert [record.getMessage() for record in caplog.records] == [
        "eval_mode does nothing: networks names those to evaluate"
    ]


def test_an_eval_mode_that_names_no_pool_is_said_to_mean_the_model_itself(caplog):
    with caplog.at_level("WARNING", logger="pad"):
        for mode in ("S", "BN", "m"):
            parse(DistillSettings, ["--eval_mode", mode], "PAD.py")
    assert [record.getMessage() for record in caplog.records] == [
        "eval_mode: m is none of S, M, W, D, A, P, N, C, BN, X, so the model itself is evaluated"
    ]


def test_a_weight_decay_of_images_that_learn_by_sgd_does_nothing_and_a_line_says_so(caplog):
    assert read(NCFMSettings, "--optimiser", "sgd").optimiser == "sgd" and not caplog.records
    read(NCFMSettings, "--optimiser", "sgd", "--decay_img", "0.1")
    assert first_words(caplog) == ["decay_img"]
