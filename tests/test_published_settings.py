"""configs/paper, and other systems' files beyond CIFAR-10: the values that were published, typed from the sources."""

import re
from pathlib import Path

import pytest
import torch
from helpers import CHECKOUT, command_line, make_images
from test_method_configs import along_features, command_of, commands_in, lines_of, marked, settings_of

from pad import cli
from pad.commands.evaluate import EvaluationSettings
from pad.commands.record import BufferSettings
from pad.commands.trajectory import DistillSettings
from pad.config import parse
from pad.matching.trajectory import SegmentSampler

CONFIGS = CHECKOUT / "configs"
DATA = {  # data set, network, folder of the data, pixels, subset
    "CIFAR-10": ("CIFAR10", "ConvNet", "dataset", None, "imagenette"),
    "CIFAR-100": ("CIFAR100", "ConvNet", "dataset", None, "imagenette"),
    "TinyImageNet": ("Tiny", "ConvNetD4", "dataset/tiny-imagenet-200", 64, "imagenette"),
    "ImageNet": ("ImageNet", "ConvNetD5", "dataset/imagenet", 128, "imagenette"),
}

# ---- the paper's table 7: steps, expert epochs, start epochs (first, bound at first, at last), interval, batch, rates

TABLE_7 = {
    ("CIFAR-10", 1): (80, 2, 0, 4, 4, None, 10, 5, 100, 0),
    ("CIFAR-10", 10): (80, 2, 0, 10, 20, 100, 100, 2, 100, 0.25),
    ("CIFAR-10", 50): (80, 2, 0, 20, 40, 100, 500, 2, 1000, 0.25),
    ("CIFAR-10", 500): (80, 2, 40, 60, 60, None, 1000, 10, 50, 0.5),
    ("CIFAR-10", 1000): (80, 2, 40, 60, 60, None, 1000, 10, 50, 0.75),
    ("CIFAR-100", 1): (40, 3, 0, 10, 20, 100, 100, 10, 1000, 0),
    ("CIFAR-100", 10): (80, 2, 0, 20, 40, 100, 1000, 10, 1000, 0.25),
    ("CIFAR-100", 50): (80, 2, 40, 60, 80, 100, 1000, 10, 1000, 0.5),
    ("CIFAR-100", 100): (80, 2, 40, 80, 80, None, 1000, 10, 50, 0.5),
    ("TinyImageNet", 1): (60, 2, 0, 15, 30, 400, 200, 10, 10000, 0),
    ("TinyImageNet", 10): (60, 2, 0, 20, 40, 100, 250, 10, 100, 0.25),
    ("TinyImageNet", 50): (60, 2, 20, 40, 60, 100, 250, 10, 100, 0.5),
}
TABLE_1 = {
    "CIFAR-10": ("47.2 +- 0.6", "67.4 +- 0.3", "77.0 +- 0.5", "84.6 +- 0.3", "86.7 +- 0.2"),
    "CIFAR-100": ("28.4 +- 0.5", "47.8 +- 0.2", "55.9 +- 0.3", "58.5 +- 0.3"),
    "TinyImageNet": ("17.7 +- 0.2", "32.3 +- 0.4", "41.6 +- 0.4"),
}
OWN = {"buffer_path", "log_dir"}  # of all paper files
PAPER = [pytest.param(*cell, id=f"{cell[0]}-IPC{cell[1]}") for cell in TABLE_7]


def paper_file(folder: str, ipc: int) -> Path:
    return CONFIGS / "paper" / folder / f"IPC{ipc}.yaml"


def head_of(path: Path) -> str:
    return " ".join(line[1:].strip() for line in path.read_text().splitlines() if line.startswith("#"))


def test_the_folder_holds_the_twelve_cells_and_their_buffers():
    cells = {paper_file(*cell) for cell in TABLE_7} | {CONFIGS / "paper" / folder / "buffer.yaml" for folder in TABLE_1}
    assert set((CONFIGS / "paper").rglob("*.yaml")) == cells


@pytest.mark.parametrize(("folder", "ipc"), PAPER)
def test_paper_files_have_the_values_of_table_7(folder, ipc, caplog):
    steps, epochs, first, now, last, interval, batch, lr_y, lr_img, masked = TABLE_7[folder, ipc]
    found = settings_of(paper_file(folder, ipc), DistillSettings)
    expected = {
        "syn_steps": steps,
        "expert_epochs": epochs,
        "min_start_epoch": first,
        "max_start_epoch": last,
        "Sequential_Generation": interval is not None,
        "batch_syn": batch,
        "lr_y": lr_y,
        "lr_img": lr_img,
        "depth_ratio": masked,
        "loss_ratio": 0,
        "Iteration": 10000,
        "ipc": ipc,
        "buffer_path": str(CHECKOUT / "buffer_storage_paper"),
        "log_dir": str(CHECKOUT / "logged_files_paper"),
    }
    assert {key: getattr(found, key) for key in expected} == expected
    if interval:
        sampler = found.fill(SegmentSampler, experts=[0], sequential=found.Sequential_Generation)
        bounds = [sampler.upper_bound(it) for it in range(0, 10001, interval // 4)]
        assert bounds == [min(last, now + it // interval) for it in range(0, 10001, interval // 4)]
    assert f"The paper states {dict(zip(sizes(folder), TABLE_1[folder]))[ipc]} % for it" in head_of(
        paper_file(folder, ipc)
    )
    assert not caplog.records


def sizes(folder: str) -> list[int]:
    return [ipc for where, ipc in TABLE_7 if where == folder]


@pytest.mark.parametrize("folder", TABLE_1)
def test_paper_buffers(folder, caplog):
    path = CONFIGS / "paper" / folder / "buffer.yaml"
    found = settings_of(path, BufferSettings)
    expected = {"sort_method": "EL2N", "init_ratio": 0.75, "add_end_epoch": 20 if folder == "CIFAR-10" else 40}
    assert {key: getattr(found, key) for key in expected} == expected
    for ipc in sizes(folder):
        distil = settings_of(paper_file(folder, ipc), DistillSettings)
        for key in ("dataset", "model", "zca", "res", "buffer_path", "data_path"):
            assert getattr(found, key) == getattr(distil, key), key
        assert found.train_epochs >= distil.max_start_epoch - 1 + distil.expert_epochs
        assert commands_in(paper_file(folder, ipc))[0] == commands_in(path)[0]
    for figure in TABLE_1[folder]:
        assert figure in head_of(path)
    assert not caplog.records


def written_differences() -> dict[str, dict[str, tuple[str, str]]]:
    """What docs/PAPER.md says: by file and key, the published value and the paper's."""
    text = (CHECKOUT / "docs" / "PAPER.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w-]+/\w+\.yaml)` \| (.*) \|$", text, re.MULTILINE)
    return {
        file: {key: (before, after) for key, before, after in re.findall(r"`(\w+)` (\S+) → ([^\s,]+)", differences)}
        for file, differences in rows
    }


def test_paper_files_differ_from_the_published_in_exactly_the_lines_that_the_page_lists():
    found = {}
    for path in sorted((CONFIGS / "paper").rglob("*.yaml")):
        folder, of_buffer = path.parent.name, path.stem == "buffer"
        published = CONFIGS / ("CIFAR-10/buffer-PAD.yaml" if of_buffer else f"{folder}/ConvIN/{path.name}")
        before, after = ({key: value for key, (value, _) in lines_of(file).items()} for file in (published, path))
        pairs = {key: (before.get(key, "nothing"), after.get(key, "nothing")) for key in before | after}
        differing = {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}
        assert set(differing) & OWN == OWN - ({"log_dir"} if of_buffer else set())
        found[f"{folder}/{path.name}"] = {key: pair for key, pair in differing.items() if key not in OWN}
        assert [key for key in after if key in before] == [key for key in before if key in after]
    assert written_differences() == found


# ---- other systems: no ZCA or ZCA, steps, expert epochs, bound of the start, batch, lr_img, lr_lr, first lr

MTT = {
    ("CIFAR-100", 1): (True, 20, 3, 20, None, 1000, 1e-5, 0.01),
    ("CIFAR-100", 10): (False, 20, 2, 20, None, 1000, 1e-5, 0.01),
    ("CIFAR-100", 50): (True, 80, 2, 40, 125, 1000, 1e-5, 0.01),
    ("TinyImageNet", 1): (False, 10, 2, 10, None, 10000, 1e-4, 0.01),
    ("TinyImageNet", 10): (False, 20, 2, 40, 200, 10000, 1e-4, 0.01),
    ("TinyImageNet", 50): (False, 20, 2, 40, 300, 10000, 1e-4, 0.01),
    ("ImageNet", 1): (False, 20, 2, 10, None, 100000, 1e-6, 0.01),
    ("ImageNet", 10): (False, 20, 2, 10, 20, 100000, 1e-6, 0.01),
}
FTD = {  # and the decay of the moving average
    ("CIFAR-100", 1): (True, 40, 3, 20, None, 1000, 1e-5, 0.01, 0.9995),
    ("CIFAR-100", 10): (False, 20, 2, 40, None, 1000, 1e-5, 0.01, 0.9995),
    ("CIFAR-100", 50): (True, 80, 2, 40, 1000, 1000, 1e-5, 0.01, 0.999),
    ("TinyImageNet", 1): (False, 30, 2, 10, None, 10000, 1e-4, 0.01, 0.999),
    ("TinyImageNet", 10): (False, 20, 2, 40, 500, 10000, 1e-4, 0.01, 0.999),
    ("ImageNet", 1): (False, 20, 2, 10, 64, 10000, 1e-4, 0.01, 0.999),
    ("ImageNet", 10): (False, 20, 2, 10, 64, 10000, 1e-4, 0.001, 0.999),
}
TESLA = {("CIFAR-100", 50): (True, 80, 2, 40, 125, 500, 1e-5, 0.01)}  # half of the code's lr_img, as for CIFAR-10
DATM = {  # steps, expert epochs, start epochs (first, bound at first, at last, until), batch, lr_img, lr_lr
    ("CIFAR-100", 1): (40, 3, 0, 10, 20, 1000, 1000, 1000, 1e-5),
    ("CIFAR-100", 10): (80, 2, 0, 30, 50, 2000, 1000, 1000, 1e-5),
    ("CIFAR-100", 50): (80, 2, 20, None, 70, None, 1000, 1000, 1e-5),
    ("CIFAR-100", 100): (80, 2, 30, None, 70, None, 1000, 50, 1e-5),
    ("TinyImageNet", 1): (40, 2, 0, 15, 20, 2000, 1000, 10000, 1e-4),
    ("TinyImageNet", 10): (40, 2, 10, None, 50, None, 500, 100, 1e-4),
    ("TinyImageNet", 50): (20, 2, 40, None, 70, None, 1000, 100, 1e-4),
}
NAMES = ("zca", "syn_steps", "expert_epochs", "max_start_epoch", "batch_syn", "lr_img", "lr_lr", "lr_teacher")
WHOLE = {"labels": "hard", "pix_init": "real", "threshold": None, "batch_train": 256, "Sequential_Generation": False}
WHOLE |= {"min_start_epoch": 0, "depth_ratio": 0, "loss_ratio": 0, "gradient": "exact", "Iteration": 5000}
SOFT = {"labels": "soft", "zca": True, "lr_teacher": 0.01, "Iteration": 10000, "Momentum_y": 0.9, "lr_y": 10}
SOFT |= {"threshold": 1.0, "depth_ratio": 0, "loss_ratio": 0, "pix_init": "samples_predicted_correctly"}
REAL = {"zca": False, "batch_real": 256, "batch_train": 256, "lr_net": 0.01}
REAL_OF = {  # DC, DSA: of CIFAR-10 by their authors' word; DM: published
    "DC": REAL | {"Iteration": 1000, "lr_img": 0.1, "dsa": False, "pix_init": "noise", "epoch_eval_train": 300},
    "DSA": REAL | {"Iteration": 1000, "lr_img": 0.1, "dsa": True, "pix_init": "real", "epoch_eval_train": 1000},
    "DM": REAL | {"Iteration": 20000, "lr_img": 1, "dsa": True, "pix_init": "real", "epoch_eval_train": 1000},
}
FOLLOWED = {"num_eval", "eval_it"}

EXPECTED: dict[tuple[str, str, int], tuple[dict, set]] = {}  # values, and the keys whose values are ours
for cell, row in MTT.items():
    EXPECTED[("MTT", *cell)] = WHOLE | dict(zip(NAMES, row)), set()
for cell, row in FTD.items():
    of_zca = {"zca"} if cell[0] != "ImageNet" else set()
    EXPECTED[("FTD", *cell)] = WHOLE | dict(zip((*NAMES, "ema_decay"), row)), {"Iteration"} | of_zca
for cell, row in TESLA.items():
    EXPECTED[("TESLA", *cell)] = (
        WHOLE | dict(zip(NAMES, row)) | {"gradient": "truncated", "Iteration": 10000},
        {"lr_img"},
    )
for cell, row in DATM.items():
    steps, epochs, first, now, last, until, *rates = row
    starts = {"min_start_epoch": first, "max_start_epoch": last, "Sequential_Generation": now is not None}
    starts |= {"current_max_start_epoch": now, "expansion_end_epoch": until} if now else {}
    of_steps = {"syn_steps": steps, "expert_epochs": epochs} | dict(zip(("batch_syn", "lr_img", "lr_lr"), rates))
    ours = {"pix_init"} if cell == ("CIFAR-100", 50) else set()
    EXPECTED[("DATM", *cell)] = SOFT | starts | of_steps, ours
for ipc, loops in {1: (1, 1), 10: (10, 50), 50: (50, 10)}.items():
    for system in ("DC", "DSA"):
        of_loops = dict(zip(("outer_loop", "inner_loop"), loops))
        EXPECTED[system, "CIFAR-100", ipc] = REAL_OF[system] | of_loops, FOLLOWED
    for folder in ("CIFAR-100", "TinyImageNet"):
        EXPECTED["DM", folder, ipc] = REAL_OF["DM"], FOLLOWED
GLAD = FOLLOWED | {"dsa", "pix_init", "batch_real", "epoch_eval_train", "batch_train", "lr_net"}
EXPECTED["DC", "ImageNet", 1] = REAL_OF["DSA"] | {"lr_img": 1, "outer_loop": 1, "inner_loop": 1}, GLAD
EXPECTED["DM", "ImageNet", 1] = REAL_OF["DM"] | {"Iteration": 1000, "lr_img": 10}, GLAD
for key, (values, ours) in EXPECTED.items():
    if key[1] == "ImageNet" and key[0] in ("MTT", "FTD"):
        EXPECTED[key] = values, ours | FOLLOWED | {"skip_first_eva"}
BUFFERS = {  # rho, alpha, epochs, ZCA; keys that are ours beside those that turn the curriculum off
    ("CIFAR-100", "SGD"): (0, 0, 50, True, set()),
    ("TinyImageNet", "SGD"): (0, 0, 50, False, set()),
    ("ImageNet", "SGD"): (0, 0, 50, False, set()),
    ("CIFAR-100", "FTD"): (0.01, 1, 50, True, {"train_epochs"}),
    ("TinyImageNet", "FTD"): (0.01, 1, 50, False, {"train_epochs"}),
    ("ImageNet", "FTD"): (0.01, 1, 50, False, {"train_epochs"}),
    ("CIFAR-100", "DATM"): (0.01, 0.3, 100, True, {"train_epochs", "rho_max", "rho_min", "alpha"}),
    ("TinyImageNet", "DATM"): (0.01, 0.3, 100, True, {"train_epochs", "rho_max", "rho_min", "alpha"}),
}
BUFFER_OF = {"MTT": "SGD", "TESLA": "SGD", "FTD": "FTD", "DATM": "DATM"}
SYSTEMS = [pytest.param(*key, id="-".join(map(str, key))) for key in EXPECTED]


def file_of(system: str, folder: str, ipc: int) -> Path:
    return CONFIGS / folder / f"{system}-IPC{ipc}.yaml"


@pytest.mark.parametrize("folder", ["CIFAR-100", "TinyImageNet", "ImageNet"])
def test_the_folders_hold_these_files_and_no_others(folder):
    expected = {f"{system}-IPC{ipc}" for system, where, ipc in EXPECTED if where == folder}
    expected |= {f"buffer-{name}" for where, name in BUFFERS if where == folder} | along_features(folder)
    assert {path.stem for path in (CONFIGS / folder).glob("*.yaml")} == expected


@pytest.mark.parametrize(("system", "folder", "ipc"), SYSTEMS)
def test_systems_have_the_published_values_and_mark_the_others(system, folder, ipc, caplog):
    path, (expected, ours) = file_of(system, folder, ipc), EXPECTED[system, folder, ipc]
    found = settings_of(path, command_of(system)[1])
    of_data = dict(zip(("dataset", "model", "data_path", "res", "subset"), DATA[folder]))
    of_data["data_path"] = str(CHECKOUT / of_data["data_path"])
    expected = expected | of_data | {"ipc": ipc, "name": f"{system}-IPC{ipc}-seed0"}
    if system in BUFFER_OF:
        expected |= {"method": system, "buffer_path": str(CHECKOUT / f"buffer_storage_{BUFFER_OF[system].lower()}")}
    assert {key: getattr(found, key) for key in expected} == expected
    assert marked(path) == ours
    assert not caplog.records


@pytest.mark.parametrize(
    ("system", "folder", "ipc"), [key for key in EXPECTED if key[0] in BUFFER_OF and key[1] != "ImageNet"]
)
def test_what_is_left_as_pad_has_it_is_named(system, folder, ipc):
    path = file_of(system, folder, ipc)
    pads, lines = lines_of(CONFIGS / folder / "ConvIN" / f"IPC{ipc}.yaml"), lines_of(path)
    known = {"ipc", "method", "buffer_path", "dsa", "dataset", "model", "data_path", "res"}
    for key in set(lines) - set(EXPECTED[system, folder, ipc][0]) - known:
        assert lines[key][0] == pads[key][0] and key in head_of(path), key
    assert [key for key in lines if key in pads] == list(pads)


@pytest.mark.parametrize(("folder", "name"), BUFFERS)
def test_buffers_of_systems(folder, name, caplog):
    path, (rho, alpha, epochs, zca, ours) = CONFIGS / folder / f"buffer-{name}.yaml", BUFFERS[folder, name]
    found = settings_of(path, BufferSettings)
    expected = {"rho_max": rho, "rho_min": rho, "alpha": alpha, "train_epochs": epochs, "zca": zca, "num_experts": 100}
    expected |= {"lr_teacher": 0.01, "batch_train": 256, "mom": 0, "dsa": True, "dataset": DATA[folder][0]}
    assert {key: getattr(found, key) for key in expected} == expected
    assert marked(path) == ours | {"rm_epoch_first", "rm_epoch_second"} and not found.uses_ranking
    assert commands_in(path) == [f"python buffer/buffer_CL.py --cfg configs/{folder}/buffer-{name}.yaml"]
    assert not caplog.records


# ---- the commands above the files

ALL_BUFFERS = sorted([*(CONFIGS / "paper").rglob("buffer.yaml"), *CONFIGS.rglob("buffer-*.yaml")])
ALL = [paper_file(*cell) for cell in TABLE_7] + [file_of(*key) for key in EXPECTED]


def system_of(path: Path) -> str:
    return path.stem.split("-")[0] if "-" in path.stem else "PAD"


@pytest.mark.parametrize("path", ALL, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_the_commands_above_the_files_fit_together(path, caplog):
    script, cls = command_of(system_of(path))
    *first, second, third = commands_in(path)
    assert second == f"python distill/{script}.py --cfg configs/{path.relative_to(CONFIGS)}"
    distil, score = settings_of(path, cls), parse(EvaluationSettings, third.split()[2:], "test")
    runs = "logged_files_paper" if system_of(path) == "PAD" else "logged_files"
    data = distil.dataset if distil.dataset != "ImageNet" else "ImageNet-imagenette"
    run = (runs, data, str(distil.ipc), distil.model, distil.name)
    assert Path(score.synthetic).parts == (*run, "Normal", "synthetic_last.safetensors")
    assert str(CHECKOUT / score.data_path) == distil.data_path and score.num_eval == 5
    assert (score.epoch_eval_train, score.batch_train) == (distil.epoch_eval_train, distil.batch_train)
    assert bool(first) == (cls is DistillSettings)
    if first:
        words = first[0].split()
        record = parse(BufferSettings, ["--cfg", str(CHECKOUT / words[3]), *words[4:]], "test")
        for key in ("dataset", "model", "zca", "res", "subset", "buffer_path", "data_path"):
            assert getattr(record, key) == getattr(distil, key), key
        assert str(CHECKOUT / score.buffer_path) == distil.buffer_path
        assert record.train_epochs >= distil.max_start_epoch - 1 + distil.expert_epochs
    assert not caplog.records


# ---- they run


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> dict:
    """Settings that put a small folder of images and a small network in the place of a file's own."""
    root = tmp_path_factory.mktemp("small")
    own = {"dataset": "ImageFolder", "data_path": make_images(root / "images"), "model": "ConvNetD1W8", "res": 16}
    own |= {"device": "cpu", "compile": "off"}
    for zca in (True, False):
        experts = own | {"num_experts": 1, "train_epochs": 100, "zca": zca, "rho_max": 0, "rho_min": 0, "dsa": False}
        experts |= {"buffer_path": root / "buffer", "lr_teacher": 0.1, "batch_train": 12, "eval_every": 0}
        assert cli.buffer(command_line(**experts)) == 0
    return own | {"buffer_path": root / "buffer"}


@pytest.mark.slow
@pytest.mark.parametrize("path", ALL, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_every_file_runs_two_iterations_on_small_data(small, path, tmp_path):
    system, own = system_of(path), dict(small)
    door = {"DC": cli.match_gradients, "DSA": cli.match_gradients, "DM": cli.match_distributions}.get(system)
    if door:
        own |= {"batch_real": 4}
        del own["buffer_path"]
    else:
        own |= {"syn_steps": 2}
    if system in ("DC", "DSA"):
        own |= {"outer_loop": 2, "inner_loop": 1}
    own |= {"ipc": 2, "Iteration": 1, "num_eval": 1, "epoch_eval_train": 1, "log_dir": tmp_path}
    assert (door or cli.distill)(command_line(cfg=path, **own)) == 0
    (run,) = tmp_path.glob("ImageFolder/2/ConvNetD1W8/[!.]*")
    assert len((run / "metrics.jsonl").read_text().splitlines()) >= 2
    assert torch.load(run / "Normal" / "images_last.pt", weights_only=True).isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("path", ALL_BUFFERS, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_every_buffer_file_records_on_small_data(small, path, tmp_path):
    own = small | {"num_experts": 1, "train_epochs": 2, "batch_train": 12, "buffer_path": tmp_path}
    own |= {"score_repeats": 1, "score_epochs": 1}
    assert cli.buffer(command_line(cfg=path, **own)) == 0
    assert list(tmp_path.rglob("expert_0000.safetensors"))
