"""The files of other systems in configs/CIFAR-10: published values, which are ours, how they differ from PAD's."""

import re
from pathlib import Path

import pytest
import yaml
from helpers import CHECKOUT

from pad.commands.distribution import DMSettings, NCFMSettings, TGDDSettings
from pad.commands.evaluate import EvaluationSettings
from pad.commands.gradient import DCSettings
from pad.commands.influence import InfluenceSettings
from pad.commands.record import BufferSettings
from pad.commands.trajectory import DistillSettings
from pad.config import parse

FOLDER = CHECKOUT / "configs" / "CIFAR-10"
IPCS = (1, 10, 50)

# ---- what is known of each system, and what is not; all of it typed from the sources, not from the files

EVERYWHERE = {"dataset": "CIFAR10", "model": "ConvNet", "data_path": str(CHECKOUT / "dataset")}
SGD, GSAM, OF_FTD = (str(CHECKOUT / f"buffer_storage_{name}") for name in ("sgd", "gsam", "ftd"))
MATCHING = EVERYWHERE | {"dsa": True, "loss_ratio": 0, "depth_ratio": 0}
HARD = {
    "labels": "hard",
    "pix_init": "real",
    "threshold": None,
    "batch_train": 256,
    "Sequential_Generation": False,
    "min_start_epoch": 0,
}
SOFT = {
    "pix_init": "samples_predicted_correctly",
    "batch_train": 128,
    "Iteration": 10000,
    "zca": True,
    "syn_steps": 80,
    "lr_teacher": 0.01,
    "expert_epochs": 2,
    "min_start_epoch": 0,
    "Momentum_y": 0.9,
    "num_eval": 1,
    "eval_it": 500,
    "epoch_eval_train": 1000,
}


def inner(zca, syn_steps, max_start_epoch, lr_img, lr_lr, lr_teacher) -> dict:
    names = ("zca", "syn_steps", "max_start_epoch", "lr_img", "lr_lr", "lr_teacher")
    values = (zca, syn_steps, max_start_epoch, lr_img, lr_lr, lr_teacher)
    return {**dict(zip(names, values)), "expert_epochs": 2}


MTT = {
    1: inner(True, 50, 2, 100, 1e-7, 0.01),
    10: inner(True, 30, 20, 100, 1e-5, 0.001),
    50: inner(False, 30, 40, 1000, 1e-5, 0.001),
}
DATM = {
    1: {
        "batch_syn": 1000,
        "lr_img": 100,
        "lr_y": 5,
        "lr_lr": 1e-7,
        "threshold": 1.1,
        "skip_first_eva": True,
        "Sequential_Generation": False,
        "max_start_epoch": 4,
    },
    10: {
        "batch_syn": 500,
        "lr_img": 100,
        "lr_y": 2,
        "lr_lr": 1e-5,
        "threshold": 1.0,
        "skip_first_eva": True,
        "Sequential_Generation": True,
        "current_max_start_epoch": 10,
        "max_start_epoch": 20,
        "expansion_end_epoch": 1000,
    },
    50: {
        "batch_syn": 500,
        "lr_img": 1000,
        "lr_y": 2,
        "lr_lr": 1e-5,
        "threshold": 1.0,
        "skip_first_eva": False,
        "Sequential_Generation": True,
        "current_max_start_epoch": 20,
        "max_start_epoch": 40,
        "expansion_end_epoch": 2000,
    },
}
MTT_WHOLE = MATCHING | HARD | {"batch_syn": None, "Iteration": 5000, "buffer_path": SGD}
FTD_WHOLE = MATCHING | HARD | {"batch_syn": None}
DECAY = {1: 0.9999, 10: 0.9995, 50: 0.999}  # FTD's
TESLA_WHOLE = MATCHING | HARD | {"gradient": "truncated", "Iteration": 10000, "buffer_path": SGD}
MCT_WHOLE = MATCHING | HARD | {"gradient": "truncated", "convexified": True, "Iteration": 5000, "buffer_path": SGD}
MCT = {
    1: inner(False, 60, 4, 1000, 1e-7, 0.01) | {"expert_epochs": 6},
    10: inner(False, 30, 8, 1000, 1e-5, 0.01) | {"expert_epochs": 15},
    50: inner(False, 30, 40, 1000, 1e-5, 0.01),
}
REAL = EVERYWHERE | {"zca": False, "batch_real": 256, "batch_train": 256, "lr_net": 0.01}
GRADIENTS = REAL | {"Iteration": 1000, "lr_img": 0.1, "depth_ratio": 0}
DC = GRADIENTS | {"dsa": False, "pix_init": "noise", "epoch_eval_train": 300}
DSA = GRADIENTS | {"dsa": True, "pix_init": "real", "epoch_eval_train": 1000}
DM = REAL | {
    "Iteration": 20000,
    "lr_img": 1,
    "depth_ratio": None,
    "dsa": True,
    "pix_init": "real",
    "epoch_eval_train": 1000,
}
LOOPS = {1: (1, 1), 10: (10, 50), 50: (50, 10)}
FOLLOWED = {"num_eval": 1, "eval_it": 500}
FILTERED = {ipc: {"sort_method": "GraNd", "drop_easy" if ipc == 50 else "drop_hard": 0.1} for ipc in IPCS}


def loops(ipc: int) -> dict:
    return dict(zip(("outer_loop", "inner_loop"), LOOPS[ipc]))


def without(values: dict, *keys: str) -> dict:
    return {key: value for key, value in values.items() if key not in keys}


FACTS, OURS = {}, {}  # by system and ipc: values that were found, and those that were not
for n in IPCS:
    FACTS["MTT", n], OURS["MTT", n] = MTT_WHOLE | MTT[n], {}
    FACTS["DATM", n], OURS["DATM", n] = MATCHING | SOFT | DATM[n] | {"buffer_path": GSAM}, {}
    ftd = MTT[n] | {"Iteration": 5000, "ema_decay": DECAY[n], "buffer_path": OF_FTD if n == 50 else GSAM}
    OURS["FTD", n] = {} if n == 10 else {key: ftd.pop(key) for key in ("zca", "Iteration")}
    FACTS["FTD", n] = FTD_WHOLE | ftd
    FACTS["TESLA", n], OURS["TESLA", n] = TESLA_WHOLE, MTT[n] | {"batch_syn": None}
    FACTS["MCT", n], OURS["MCT", n] = MCT_WHOLE | MCT[n], {"batch_syn": None}
    FACTS["DC", n], OURS["DC", n] = DC | loops(n), FOLLOWED
    FACTS["DSA", n], OURS["DSA", n] = DSA | loops(n), FOLLOWED
    FACTS["DM", n], OURS["DM", n] = DM, FOLLOWED | {"eval_it": 2000}
    for method, share in (("DC", 0.25), ("DM", 0.5)):
        FACTS[f"{method}-filtered", n] = without(FACTS[method, n], "depth_ratio")
        OURS[f"{method}-filtered", n] = OURS[method, n] | FILTERED[n] | {"depth_ratio": share}
# TESLA's code has lr_img 1000, and loses a factor of 2 in the gradient of the images.
FACTS["TESLA", 1] = without(TESLA_WHOLE | inner(False, 50, 5, 1000, 1e-7, 0.01), "lr_img")
OURS["TESLA", 1] = {"batch_syn": None, "lr_img": 1000 / 2}

# The files of test_feature_configs.py: system, folder, images per class.
ALONG_FEATURES = {("TGDD", "CIFAR-10"): IPCS, ("TGDD", "CIFAR-100"): (10, 50)}
ALONG_FEATURES |= {("NCFM", folder): IPCS for folder in ("CIFAR-10", "CIFAR-100")}


def along_features(folder: str) -> set[str]:
    """The names of these files in a folder, and of those of their experts."""
    here = {system: ipcs for (system, where), ipcs in ALONG_FEATURES.items() if where == folder}
    return {f"{system}-IPC{ipc}" for system, ipcs in here.items() for ipc in ipcs} | {f"buffer-{each}" for each in here}


TRAJECTORY = ("MTT", "FTD", "DATM", "TESLA", "MCT")
DEFINING = {  # keys that PAD's files do not have
    "MTT": {"method", "labels"},
    "FTD": {"method", "labels", "ema_decay"},
    "DATM": {"method"},
    "TESLA": {"method", "labels", "gradient"},
    "MCT": {"method", "labels", "gradient", "convexified"},
}
CASES = [pytest.param(method, ipc, id=f"{method}-IPC{ipc}") for method, ipc in FACTS]
FAMILY = [pytest.param(method, ipc, id=f"{method}-IPC{ipc}") for method in TRAJECTORY for ipc in IPCS]

# How the file of a system differs from PAD's of the same size: every key, with PAD's value (the default of a key that
# PAD's files do not have) and the system's, as they are written. Typed here, read from no file and no document.
WITH_HARD_LABELS = {  # MTT, FTD, TESLA, MCT
    "pix_init": ("samples_predicted_correctly", "real"),
    "labels": ("soft", "hard"),
    "batch_train": ("128", "256"),
}
WHOLE_SET = {  # the same four, by size
    1: {"syn_steps": ("80", "50"), "batch_syn": ("1000", "none"), "threshold": ("1.1", "none")},
    10: {
        "syn_steps": ("80", "30"),
        "batch_syn": ("500", "none"),
        "threshold": ("1.0", "none"),
        "Sequential_Generation": ("True", "False"),
        "depth_ratio": ("0.5", "0"),
        "lr_teacher": ("0.01", "0.001"),
    },
    50: {
        "syn_steps": ("80", "30"),
        "batch_syn": ("1000", "none"),
        "threshold": ("1.0", "none"),
        "Sequential_Generation": ("True", "False"),
        "depth_ratio": ("0.25", "0"),
        "lr_teacher": ("0.01", "0.001"),
        "zca": ("True", "False"),
        "expert_epochs": ("3", "2"),
    },
}
OF_SGD = {"buffer_path": ("../buffer_storage/", "../buffer_storage_sgd/")}
OF_GSAM = {"buffer_path": ("../buffer_storage/", "../buffer_storage_gsam/")}
OF_FTDS = {1: OF_GSAM, 10: OF_GSAM, 50: {"buffer_path": ("../buffer_storage/", "../buffer_storage_ftd/")}}
SHORTER = {"Iteration": ("10000", "5000")}  # MTT, FTD, MCT
EARLIER = {1: {"max_start_epoch": ("4", "2")}, 10: {}, 50: {}}  # MTT, FTD
TESLAS = {1: {"zca": ("True", "False"), "max_start_epoch": ("4", "5"), "lr_img": ("100", "500")}, 10: {}, 50: {}}
MCTS = {
    1: {"zca": ("True", "False"), "syn_steps": ("80", "60"), "expert_epochs": ("2", "6"), "lr_img": ("100", "1000")},
    10: {
        "zca": ("True", "False"),
        "expert_epochs": ("2", "15"),
        "max_start_epoch": ("20", "8"),
        "lr_img": ("100", "1000"),
    },
    50: {},
}
DATMS = {
    1: {},
    10: {"depth_ratio": ("0.5", "0")},
    50: {"depth_ratio": ("0.25", "0"), "batch_syn": ("1000", "500"), "expert_epochs": ("3", "2")},
}
DIFFERENCES = {}
for n in IPCS:
    hard = WITH_HARD_LABELS | WHOLE_SET[n]
    DIFFERENCES["MTT", n] = {"method": ("PAD", "MTT")} | OF_SGD | hard | SHORTER | EARLIER[n]
    DIFFERENCES["FTD", n] = (
        {"method": ("PAD", "FTD"), "ema_decay": ("0", str(DECAY[n]))} | OF_FTDS[n] | hard | SHORTER | EARLIER[n]
    )
    DIFFERENCES["DATM", n] = {"method": ("PAD", "DATM")} | OF_GSAM | DATMS[n]
    DIFFERENCES["TESLA", n] = (
        {"method": ("PAD", "TESLA"), "gradient": ("exact", "truncated")} | OF_SGD | hard | TESLAS[n]
    )
    mct = {"method": ("PAD", "MCT"), "gradient": ("exact", "truncated"), "convexified": ("False", "True")}
    DIFFERENCES["MCT", n] = without(mct | OF_SGD | hard | SHORTER | MCTS[n], "lr_teacher")

BUFFER = EVERYWHERE | {
    "zca": True,
    "num_experts": 100,
    "batch_train": 256,
    "dsa": True,
    "lr_teacher": 0.01,
    "mom": 0,
    "adaptive": True,
}
BUFFERS = {
    "SGD": BUFFER | {"train_epochs": 50, "rho_max": 0, "rho_min": 0, "alpha": 0, "buffer_path": SGD},
    "GSAM": BUFFER | {"train_epochs": 100, "rho_max": 0.01, "rho_min": 0.01, "alpha": 0.3, "buffer_path": GSAM},
    "FTD": BUFFER | {"train_epochs": 50, "rho_max": 0.01, "rho_min": 0.01, "alpha": 1, "buffer_path": OF_FTD},
    "PAD": BUFFER
    | {
        "train_epochs": 100,
        "rho_max": 0.01,
        "rho_min": 0.01,
        "alpha": 0.3,
        "sort_method": "GraNd",
        "init_ratio": 0.75,
        "add_end_epoch": 20,
        "rm_epoch_first": 40,
        "rm_epoch_second": 60,
        "rm_easy_ratio_first": 0.1,
        "rm_easy_ratio_second": 0.2,
        "buffer_path": str(CHECKOUT / "buffer_storage"),
    },
}
BUFFER_OF = {"MTT": "SGD", "TESLA": "SGD", "MCT": "SGD", "FTD": "GSAM", "DATM": "GSAM"}
BUFFER_OF_SIZE = {("FTD", 50): "FTD"}  # where it is another


# ---- reading


def file_of(method: str, ipc: int) -> Path:
    return FOLDER / f"{method}-IPC{ipc}.yaml"


def pads(ipc: int) -> Path:
    return FOLDER / "ConvIN" / f"IPC{ipc}.yaml"


def command_of(method: str) -> tuple[str, type]:
    """The script that takes the system's files, and its settings."""
    kind = method.split("-")[0]
    others = {"DC": ("DC", DCSettings), "DSA": ("DC", DCSettings), "DM": ("DM", DMSettings)}
    others |= {"TGDD": ("TGDD", TGDDSettings), "NCFM": ("NCFM", NCFMSettings)}
    others |= {"InfMatch": ("InfMatch", InfluenceSettings)}
    return others.get(kind, ("PAD", DistillSettings))


def settings_of(path: Path, cls: type):
    return parse(cls, ["--cfg", str(path)], "test")


def lines_of(path: Path) -> dict[str, tuple[str, str]]:
    """By key, in order: the value and the comment of the line. A key stands once."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line and line[0] != "#"]
    found = {}
    for line in lines:
        key, value, comment = re.fullmatch(r"(\w+): (\S+)(?:  # (.+))?", line).groups()
        assert key not in found, f"{path.name}: {key} stands twice"
        found[key] = value, comment or ""
    return found


def header_of(path: Path) -> str:
    return " ".join(line[1:].strip() for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#"))


def commands_in(path: Path) -> list[str]:
    indented = [line[7:] for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#      ")]
    return "\n".join(indented).replace("\\\n", "").splitlines()


def marked(path: Path) -> set[str]:
    """Keys whose line says that its value is ours, and why."""
    comments = {key: comment for key, (_, comment) in lines_of(path).items()}
    for comment in comments.values():
        assert comment.startswith("ours: ") or "ours" not in comment
    return {key for key, comment in comments.items() if comment.startswith("ours: ") and len(comment) > 10}


def differences(ipc: int, method: str) -> dict:
    """The settings of the system's file that are other than in PAD's."""
    pad = settings_of(pads(ipc), DistillSettings).as_dict()
    other = settings_of(file_of(method, ipc), DistillSettings).as_dict()
    return {key: other[key] for key in pad if key != "name" and other[key] != pad[key]}


# ---- the files


WINDOW = "Sequential_Generation min_start_epoch current_max_start_epoch max_start_epoch expansion_end_epoch".split()


def test_the_folder_holds_these_files_and_no_others():
    expected = {f"{method}-IPC{ipc}" for method, ipc in FACTS} | {f"buffer-{name}" for name in BUFFERS}
    expected |= {f"InfMatch-IPC{ipc}" for ipc in IPCS}
    assert {path.stem for path in FOLDER.glob("*.yaml")} == expected | along_features("CIFAR-10")


@pytest.mark.parametrize("ipc", IPCS)
def test_files_of_influence_matching_have_what_was_found_and_the_window_of_datm(ipc, caplog):
    script, cls = command_of("InfMatch")
    found, datm = settings_of(file_of("InfMatch", ipc), cls), settings_of(file_of("DATM", ipc), DistillSettings)
    facts = {"lr_img": 50, "lr_y": 7, "Momentum_y": 0.9, "labels": "soft", "pix_init": "real", "ipc": ipc}
    assert {key: getattr(found, key) for key in facts} == facts
    assert all(getattr(found, key) == getattr(datm, key) for key in WINDOW)
    ours = {"zca", "dsa", "Iteration", "batch_real", "checkpoints", "num_eval", "eval_it", *WINDOW}
    unused = {"current_max_start_epoch", "expansion_end_epoch"} if ipc == 1 else set()
    assert marked(file_of("InfMatch", ipc)) == ours - unused
    first, second, third = commands_in(file_of("InfMatch", ipc))
    assert first == "python buffer/buffer_CL.py --cfg configs/CIFAR-10/buffer-GSAM.yaml"
    assert second == f"python distill/{script}.py --cfg configs/CIFAR-10/InfMatch-IPC{ipc}.yaml"
    score = parse(EvaluationSettings, third.split()[2:], "test")
    assert Path(score.synthetic).parts[1:5] == ("CIFAR10", str(ipc), "ConvNet", found.name)
    assert found.buffer_path == datm.buffer_path and not caplog.records


@pytest.mark.parametrize(("method", "ipc"), CASES)
def test_values_are_those_that_were_found_and_the_others_are_marked(method, ipc, caplog):
    path, (_, cls) = file_of(method, ipc), command_of(method)
    found, facts, ours = settings_of(path, cls), FACTS[method, ipc], OURS[method, ipc]
    expected = facts | ours | {"ipc": ipc, "name": f"{method}-IPC{ipc}-seed0"}
    if cls is DistillSettings:
        expected |= {"method": method}
    assert {key: getattr(found, key) for key in expected} == expected
    assert not caplog.records
    assert not set(facts) & set(ours)
    assert marked(path) == set(ours)

    rest = {key: getattr(found, key) for key in lines_of(path) if key not in expected}
    if (
        method in TRAJECTORY
    ):  # lines that nothing reads or that only follow the run: PAD's, as the head of the file says
        pad = settings_of(pads(ipc), DistillSettings).as_dict()
        assert rest == {key: pad[key] for key in rest}
        assert all(key in header_of(path) for key in rest)
        unread = {"lr_y", "Momentum_y"} | ({"current_max_start_epoch", "expansion_end_epoch"} if ipc > 1 else set())
        followed = {"num_eval", "eval_it", "skip_first_eva", "epoch_eval_train"}
        assert set(rest) == (set() if method == "DATM" else unread | followed)
    else:
        assert not rest


@pytest.mark.parametrize(("method", "ipc"), FAMILY)
def test_a_diff_with_pads_file_shows_what_defines_the_system(method, ipc):
    pad, other = lines_of(pads(ipc)), lines_of(file_of(method, ipc))
    assert set(other) - set(pad) == DEFINING[method]
    assert [key for key in other if key in pad] == list(pad)
    changed = {key for key in other if other[key][0] != pad.get(key, (None,))[0]}
    assert changed == set(differences(ipc, method))  # no value is only spelled otherwise


@pytest.mark.parametrize(("method", "ipc"), FAMILY)
def test_a_file_differs_from_pads_in_exactly_these_keys_and_values(method, ipc):
    expected, defaults = DIFFERENCES[method, ipc], DistillSettings().as_dict()
    assert set(differences(ipc, method)) == set(expected)
    pad, pad_lines, lines = settings_of(pads(ipc), DistillSettings), lines_of(pads(ipc)), lines_of(file_of(method, ipc))
    for key, (before, after) in expected.items():
        assert lines[key][0] == after
        assert (
            before == pad_lines[key][0]
            if key in pad_lines
            else yaml.safe_load(before) == defaults[key] == getattr(pad, key)
        )


@pytest.mark.parametrize("method", ["DC", "DM"])
@pytest.mark.parametrize("ipc", IPCS)
def test_filtered_files_differ_by_the_filters_alone(method, ipc):
    plain, filtered = lines_of(file_of(method, ipc)), lines_of(file_of(f"{method}-filtered", ipc))
    drop = "drop_easy" if ipc == 50 else "drop_hard"
    assert set(filtered) - set(plain) == {"sort_method", drop}
    assert [key for key in filtered if key in plain] == list(plain)
    assert {key for key in plain if plain[key][0] != filtered[key][0]} == {"depth_ratio"}
    assert settings_of(file_of(f"{method}-filtered", ipc), command_of(method)[1]).needs_ranking


def test_the_written_loops_are_the_published():
    for ipc in IPCS:
        assert DCSettings(ipc=ipc).loops == settings_of(file_of("DC", ipc), DCSettings).loops == LOOPS[ipc]


@pytest.mark.parametrize("name", BUFFERS)
def test_buffers(name, caplog):
    path, expected = FOLDER / f"buffer-{name}.yaml", BUFFERS[name]
    found = settings_of(path, BufferSettings)
    assert {key: getattr(found, key) for key in expected} == expected
    assert not caplog.records
    assert commands_in(path) == [f"python buffer/buffer_CL.py --cfg configs/CIFAR-10/buffer-{name}.yaml"]
    never = {"rm_epoch_first", "rm_epoch_second"}
    assert marked(path) == (set() if name == "PAD" else never)
    curriculum = {
        "init_ratio",
        "add_end_epoch",
        "rm_epoch_first",
        "rm_epoch_second",
        "rm_easy_ratio_first",
        "rm_easy_ratio_second",
    }
    assert set(lines_of(path)) == set(expected) - {"adaptive"} | curriculum
    assert found.curriculum.uses_ranking(found.train_epochs) == (name == "PAD")
    if name != "PAD":
        assert found.rm_epoch_first >= found.train_epochs and found.init_ratio == 1 and found.add_end_epoch == 0
        assert "--zca False" in header_of(path)


@pytest.mark.parametrize("ipc", IPCS)
def test_pads_buffer_is_that_of_the_command_in_pads_files(ipc):
    flags = parse(BufferSettings, commands_in(pads(ipc))[0].split()[2:], "test").as_dict()
    found = settings_of(FOLDER / "buffer-PAD.yaml", BufferSettings).as_dict()
    for key in ("data_path", "buffer_path"):
        flags[key] = str(CHECKOUT / flags[key])
    assert found == flags


@pytest.mark.parametrize(("method", "ipc"), CASES)
def test_the_commands_above_the_files_fit_together(method, ipc, caplog):
    path, (script, cls) = file_of(method, ipc), command_of(method)
    *first, second, third = commands_in(path)
    assert second == f"python distill/{script}.py --cfg configs/CIFAR-10/{path.name}"
    assert third.startswith("python distill/evaluation.py ")
    distil = settings_of(path, cls)
    score = parse(EvaluationSettings, third.split()[2:], "test")
    assert Path(score.synthetic).parts == (
        "logged_files",
        distil.dataset,
        str(distil.ipc),
        distil.model,
        distil.name,
        "Normal",
        "synthetic_last.safetensors",
    )
    assert str(CHECKOUT / score.data_path) == distil.data_path
    assert score.num_eval == 5
    assert (score.epoch_eval_train, score.batch_train) == (distil.epoch_eval_train, distil.batch_train)
    assert bool(first) == (cls is DistillSettings)
    if first:
        words = first[0].split()
        assert words[:4] == [
            "python",
            "buffer/buffer_CL.py",
            "--cfg",
            f"configs/CIFAR-10/buffer-{BUFFER_OF_SIZE.get((method, ipc)) or BUFFER_OF[method]}.yaml",
        ]
        record = parse(BufferSettings, ["--cfg", str(CHECKOUT / words[3]), *words[4:]], "test")
        for key in ("dataset", "model", "zca", "buffer_path", "data_path"):
            assert getattr(record, key) == getattr(distil, key), key
        assert str(CHECKOUT / score.buffer_path) == distil.buffer_path
        assert record.train_epochs >= distil.max_start_epoch - 1 + distil.expert_epochs
        assert distil.zca or "--zca False" in lines_of(path)["zca"][1]
    assert not caplog.records
