"""The files of methods that match features along experts: published values, typed from the sources, and ours."""

from pathlib import Path

import pytest
from helpers import CHECKOUT, command_line
from test_method_configs import ALONG_FEATURES, command_of, commands_in, header_of, lines_of, marked, settings_of

from pad import cli
from pad.commands.evaluate import EvaluationSettings
from pad.commands.record import BufferSettings
from pad.config import parse

CONFIGS = CHECKOUT / "configs"
FILES = [(system, folder, ipc) for (system, folder), ipcs in ALONG_FEATURES.items() for ipc in ipcs]
COMMON = {"zca": False, "model": "ConvNet", "data_path": str(CHECKOUT / "dataset"), "dsa": True}
MATCHING = COMMON | {"pix_init": "real", "depth_ratio": None, "drop_easy": 0, "drop_hard": 0}
FOLLOWED = {"num_eval": 1, "eval_it": 1000}
EXPECTED = {
    "TGDD": MATCHING
    | {
        "Iteration": 10000,
        "batch_real": 128,
        "dsa_strategy": "color_crop_cutout",
        "stage_epochs": 7,
        "epoch_eval_train": 1500,
        "batch_train": 64,
        "Sequential_Generation": False,
        "min_start_epoch": 0,
        "max_start_epoch": None,
    },
    "NCFM": MATCHING
    | {
        "Iteration": 20000,
        "batch_real": 1024,
        "dsa_strategy": "color_crop_cutout",
        "frequencies": 4096,
        "amplitude": 0.5,
        "ce_weight": 1,
        "epoch_eval_train": 2000,
        "batch_train": 128,
    },
}
BY_FILE = {key: {"optimiser": "adamw", "decay_img": 5e-4, "lr_img": 0.001} for key in FILES if key[0] == "NCFM"}
BY_FILE["NCFM", "CIFAR-100", 10] = {"optimiser": "sgd", "lr_img": 0.01}
for file in FILES:
    if file[0] == "TGDD":
        BY_FILE[file] = {"ce_weight": 0.5 if file[2] == 50 else 2.5, "lr_img": 0.01 * file[2]}
RECIPE = {"lr_teacher": 0.01, "mom": 0.9, "l2": 5e-4, "train_epochs": 60, "dsa_strategy": "color_crop"}
RECIPE |= {"rho_max": 0, "rho_min": 0, "alpha": 0, "init_ratio": 1}
BUFFERS = {"TGDD": {"num_experts": 5, "batch_train": 64}, "NCFM": {"num_experts": 20, "batch_train": 128}}


def of_data(folder: str) -> dict:
    return {"dataset": folder.replace("-", "")}


@pytest.mark.parametrize(("system", "folder", "ipc"), FILES)
def test_values_are_those_that_were_found_and_the_others_are_marked(system, folder, ipc, caplog):
    path = CONFIGS / folder / f"{system}-IPC{ipc}.yaml"
    found = settings_of(path, command_of(system)[1])
    expected = EXPECTED[system] | BY_FILE[system, folder, ipc] | FOLLOWED | of_data(folder)
    expected |= {"ipc": ipc, "name": f"{system}-IPC{ipc}-seed0"}
    expected |= {"buffer_path": str(CHECKOUT / f"buffer_storage_{system.lower()}")}
    assert {key: getattr(found, key) for key in expected} == pytest.approx(expected)
    assert marked(path) == set(FOLLOWED) and set(lines_of(path)) <= set(expected) | {"lr_net"}
    assert not caplog.records


@pytest.mark.parametrize(("system", "folder"), ALONG_FEATURES)
def test_buffers(system, folder, caplog):
    path = CONFIGS / folder / f"buffer-{system}.yaml"
    found = settings_of(path, BufferSettings)
    expected = COMMON | RECIPE | BUFFERS[system] | of_data(folder)
    assert {key: getattr(found, key) for key in expected} == expected
    assert marked(path) == {"rm_epoch_first", "rm_epoch_second"} and not found.curriculum.uses_ranking(60)
    assert commands_in(path) == [f"python buffer/buffer_CL.py --cfg configs/{folder}/buffer-{system}.yaml"]
    assert "two things that stage 1 does not do" in header_of(path) and not caplog.records


@pytest.mark.parametrize(("system", "folder", "ipc"), FILES)
def test_the_commands_above_the_files_fit_together(system, folder, ipc, caplog):
    path = CONFIGS / folder / f"{system}-IPC{ipc}.yaml"
    script, cls = command_of(system)
    first, second, third = commands_in(path)
    assert first == f"python buffer/buffer_CL.py --cfg configs/{folder}/buffer-{system}.yaml"
    assert second == f"python distill/{script}.py --cfg configs/{folder}/{path.name}"
    made, score = settings_of(path, cls), parse(EvaluationSettings, third.split()[2:], "test")
    record = settings_of(CONFIGS / folder / f"buffer-{system}.yaml", BufferSettings)
    assert all(getattr(record, key) == getattr(made, key) for key in ("dataset", "model", "zca", "buffer_path"))
    run = ("logged_files", made.dataset, str(ipc), made.model, made.name)
    assert Path(score.synthetic).parts == (*run, "Normal", "synthetic_last.safetensors")
    assert str(CHECKOUT / score.data_path) == made.data_path and score.num_eval == 5
    assert (score.epoch_eval_train, score.batch_train) == (made.epoch_eval_train, made.batch_train)
    assert not caplog.records


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["CIFAR-10", "CIFAR-100"])
def test_every_file_runs_two_iterations_on_small_data(folder, tmp_path):
    """With experts by the file of their own."""
    small = {"dataset": "FashionMNISTMini", "train_per_class": 20, "model": "ConvNetD2W8", "data_path": tmp_path}
    run = small | {"ipc": 1, "Iteration": 1, "skip_first_eva": True, "num_eval": 1, "epoch_eval_train": 1}
    for system, ipcs in [(system, ipcs) for (system, where), ipcs in ALONG_FEATURES.items() if where == folder]:
        experts = small | {"buffer_path": tmp_path / system, "num_experts": 1, "train_epochs": 2, "eval_every": 0}
        assert cli.buffer(command_line("--cfg", CONFIGS / folder / f"buffer-{system}.yaml", **experts)) == 0
        for ipc in ipcs:
            path = CONFIGS / folder / f"{system}-IPC{ipc}.yaml"
            own = run | {"buffer_path": tmp_path / system, "log_dir": tmp_path / "runs", "name": path.stem}
            assert cli.door(system, command_line("--cfg", path, **own)) == 0
