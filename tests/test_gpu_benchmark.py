"""How scripts/benchmarks/gpu.py measures, and what it says; and that all of its work can be captured."""

import contextlib
import importlib
import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_replay import EmulatedReplay
from torch.autograd import DeviceType

from pad.nn.flat import FlatModel
from pad.nn.networks import build
from pad.nn.replay import AT_ONCE, replay_on

CHECKOUT = Path(__file__).resolve().parents[1]
sys.path.append(str(CHECKOUT / "scripts" / "benchmarks"))
gpu = importlib.import_module("gpu")
CPU = torch.device("cpu")


# ---- how it is measured


def event(name, us, device=DeviceType.CUDA, annotation=False):
    span = SimpleNamespace(elapsed_us=lambda: us)
    return SimpleNamespace(name=name, time_range=span, device_type=device, is_user_annotation=annotation)


def test_kernels_are_counted_and_their_time_added_up():
    events = [
        event("void cudnn::conv", 120.5),
        event("cudaLaunchKernel", 7.0, DeviceType.CPU),
        event("Memcpy HtoD (Pinned -> Device)", 50.0),
        event("Memset (Device)", 3.0),
        event("Torch-Compiled Region: 0/0", 900.0, annotation=True),
        event("triton_poi_fused_mul_0", 29.5),
    ]
    assert gpu.of_kernels(events) == (2, pytest.approx(150e-6))
    assert gpu.of_kernels([]) == (0, 0)


def test_the_profile_is_of_its_own_window(monkeypatch):
    """Of 10 steps that took 4 ms, of which kernels took 1 ms."""
    done = []
    work = gpu.Work(run=done.append, steps=80, timed=(80,), profiled=10)
    found = SimpleNamespace(events=lambda: [event("kernel", 25.0)] * 40)
    monkeypatch.setattr(gpu, "seconds", lambda run, device: run() or 4e-3)
    monkeypatch.setattr(gpu.torch.profiler, "profile", lambda **_: contextlib.nullcontext(found))
    measured = gpu.profile(work, CPU)
    assert measured == {"kernels a step": 4, "busy ms a step": pytest.approx(0.1), "busy %": pytest.approx(25)}
    assert done == [10]


@pytest.mark.parametrize("per", [1, 5])
def test_what_was_not_timed_lies_on_the_line_through_what_was(monkeypatch, per):
    done, noise = [], iter([0, 9.0, 0] * 2)  # one of three calls is disturbed
    work = gpu.Work(run=done.append, steps=1001, timed=(50, 150), profiled=0, per=per)
    monkeypatch.setattr(gpu, "seconds", lambda run, device: run() or 0.3 + 0.01 * done[-1] + next(noise))
    found = gpu.measure(lambda: work, CPU, 3)
    assert found["s"] == pytest.approx((0.3 + 10.01) / per)
    assert found["notes"] == ["in a straight line from 50 and 150 epochs"]
    assert done == [50, 150, 50, 50, 50, 150, 150, 150], "first of all it warms up"


def test_one_of_many_calls_is_a_share_and_a_whole_iteration_itself(monkeypatch):
    monkeypatch.setattr(gpu, "seconds", lambda run, device: 0.8)
    for steps, timed, expected in ((1, 50, 0.016), (80, 80, 0.8)):
        work = gpu.Work(run=lambda n: None, steps=steps, timed=(timed,), profiled=0)
        found = gpu.measure(lambda: work, CPU, 1)
        assert found["s"] == pytest.approx(expected) and "notes" not in found


def test_a_call_is_timed_alone():
    assert 0.05 <= gpu.seconds(lambda: gpu.time.sleep(0.05), CPU) < 0.5


# ---- the budget, and what goes wrong


class Clock:
    """In place of the time module's; measuring takes as long as it is told to."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(gpu.time, "perf_counter", lambda: self.now)

    def unit(self, name, takes, **more):
        def measure():
            self.now += takes
            return {"s": takes}

        return gpu.Unit(row=(name, "eager", "TF32"), measure=measure, **more)


def test_nothing_is_begun_that_would_end_after_the_budget(monkeypatch):
    clock, saved = Clock(monkeypatch), []
    one, two = frozenset({"one"}), frozenset({"one", "two"})
    units = [
        clock.unit("late", 1.0, rank=2),
        clock.unit("compiles", 25.0, graphs=one, seconds=5),
        clock.unit("compiles another", 20.0, graphs=two, seconds=5),
        clock.unit("compiles two", 1.0, graphs=frozenset({"three", "four"}), seconds=5),
        clock.unit("first", 1.0, rank=-1),
    ]
    rows = gpu.work_off(units, 75, lambda rows: saved.append(json.dumps(rows)))
    assert [row["row"][0] for row in rows] == [unit.row[0] for unit in units], "in the order of the table"
    assert [row.get("s") for row in rows] == [1.0, 25.0, 20.0, None, 1.0]
    assert [row["notes"] for row in rows] == [[], [], [], ["not measured: the budget was spent"], []]
    assert len(saved) == 4 and '"s": 25.0' in saved[1] and '"s": 20.0' not in saved[1]


def failing(error):
    def measure():
        raise error

    return measure


def test_what_goes_wrong_is_said_and_the_others_go_on(capsys):
    def measure():
        logging.getLogger("pad").warning("steps are launched %s", "one by one")
        logging.getLogger("pad").info("nothing to note")
        return {"s": 2.0, "notes": ["extrapolated"]}

    no_memory = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 111.60 GiB")
    measures = {"a": failing(no_memory), "b": failing(RuntimeError("no\n  kernel")), "c": measure}
    units = [gpu.Unit(row=(name, "eager", "TF32"), measure=each) for name, each in measures.items()]
    units.append(gpu.Unit(row=("c", "eager", "TF32"), measure=lambda: {gpu.FIRST[0]: 40.0}))
    rows = gpu.work_off(units, 100, lambda rows: None)
    assert [row["notes"] for row in rows] == [
        ["out of memory"],
        ["failed: no kernel"],
        ["extrapolated", "steps are launched one by one"],
    ]
    assert [bool(row.get("failed")) for row in rows] == [False, True, False]
    assert rows[2]["s"] == 2 and rows[2][gpu.FIRST[0]] == 40
    logging.getLogger("pad").warning("later")
    assert "later" not in str(rows)
    assert "c, eager, TF32, 2 s, extrapolated, steps are launched one by one" in capsys.readouterr().out


@pytest.mark.parametrize("failed, code", [(False, 0), (True, 1)])
def test_the_exit_code_says_whether_something_failed(monkeypatch, tmp_path, capsys, failed, code):
    measure = failing(ValueError()) if failed else failing(MemoryError())
    monkeypatch.setattr(gpu, "plan", lambda *_: [gpu.Unit(row=("a", "eager", "TF32"), measure=measure)])
    environment = dict(os.environ)
    assert gpu.main(["--tiny", "--out", str(tmp_path / "new" / "out.json")]) == code
    found = json.loads((tmp_path / "new" / "out.json").read_text())
    assert found["torch"] == torch.__version__ and len(found["rows"]) == 1
    assert dict(os.environ) == environment


def test_a_result_that_is_there_is_kept(tmp_path, capsys):
    (tmp_path / "out.json").write_text("{}")
    for out, why in ((tmp_path / "out.json", "is there already"), (tmp_path / "out.json" / "x", "can be written")):
        with pytest.raises(SystemExit) as end:
            gpu.main(["--tiny", "--out", str(out)])
        assert end.value.code == 2 and why in capsys.readouterr().err
    assert (tmp_path / "out.json").read_text() == "{}"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_without_a_card_it_says_so(capsys):
    with pytest.raises(SystemExit) as end:
        gpu.main([])
    assert end.value.code == 2 and "there is no CUDA device" in capsys.readouterr().err


# ---- what it says


def test_the_table_has_a_dash_where_nothing_is_known():
    measured = {"s": 0.125, "peak": 3 * 2**29, "kernels a step": 7, "busy ms a step": 1.5, "busy %": 96.0}
    text = gpu.table(
        [
            {"row": ("matching, 100 images", "compiled", "TF32"), "notes": [], **measured, gpu.FIRST[1]: 20.0},
            {"row": ("matching, 6 images", "eager", "float32"), "notes": ["one", "two"]},
        ]
    )
    header, _, *rows = text.splitlines()
    first, second = (re.split(" {2,}", row) for row in rows)
    assert first == [
        *("matching, 100 images", "compiled", "TF32", "0.125", "1.5", "7", "1.5", "96", "-", "20"),
        *("0.56 s, 0.84-1.0 GB", "0.13 s", "-"),
    ]
    assert second == ["matching, 6 images", "eager", "float32", *"-" * 9, "one; two"]
    assert "before (H200, 8f86ba8)" in header and "to reach" in header


@pytest.fixture(scope="module")
def on_a_card():
    """The units there are where CUDA is; nothing is compiled."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "flat_model", lambda *sizes: SimpleNamespace(compile=sizes[-1].replace("auto", "fused")))
        return gpu.plan(gpu.Sizes(), torch.device("cuda"), 3, Path("nowhere"))


def test_each_figure_of_before_is_beside_what_is_measured(on_a_card):
    rows = {unit.row for unit in on_a_card}
    assert rows >= gpu.BEFORE.keys() and {work for work, *_ in rows} >= gpu.TO_REACH.keys()


def test_the_card_first_does_what_may_be_fastest(on_a_card):
    order = sorted(on_a_card, key=lambda unit: unit.rank)
    assert order[0].row == ("matching, 100 images", "compiled, captured", "TF32") and "first" in order[0].what
    iterations = [unit.row for unit in order if "first" not in unit.what]
    assert iterations[:2] == [("matching, 100 images", "plain loop", "TF32"), order[0].row]
    for unit in order:
        _, way, precision = unit.row
        assert (unit.rank == 2) == (precision == "float32")
        assert unit.rank >= 1 or not way.startswith("eager")


# ---- the published settings


def test_the_cells_are_the_twelve_published_settings():
    units = gpu.cells("on", torch.device("cuda"), False)
    sizes = {unit.row[0]: unit.row[1:] for unit in units}
    assert len(units) == len(sizes) == 12
    assert {name for name in sizes if name in gpu.OTHERS} == gpu.OTHERS.keys()
    assert sizes["CIFAR-10, IPC10"] == (100, 100, 80, "on")
    assert sizes["CIFAR-100, IPC50"] == (5000, 1000, 80, "on")
    assert sizes["TinyImageNet, IPC10"] == (2000, 500, 40, "on")
    assert sizes["CIFAR-10, IPC1000"] == (10000, 1000, 100, "on")
    assert [unit.rank for unit in units] == [int(unit.row[0] not in gpu.OTHERS) for unit in units]
    graphs = {unit.row[0]: unit.graphs for unit in units}
    assert graphs["CIFAR-100, IPC10"] == graphs["CIFAR-100, IPC50"] != graphs["CIFAR-10, IPC1000"]


def test_a_cell_has_the_others_figures_beside_it():
    rows = [{"row": ("CIFAR-100, IPC50", 5000, 1000, 80, "on"), "notes": [], "s": 3.0, "peak": 2_500_000_000}]
    rows.append({"row": ("CIFAR-10, IPC1", 10, 10, 80, "on"), "notes": ["out of memory"]})
    first, second = gpu.cell_table(rows).splitlines()[2:]
    assert first.split("  ")[-1] == "-" and "28.2, 44.2" in first and "1.36, 2.0" in first
    assert " compiled  " in first and "  3 " in first and " 2.5 " in first
    assert second.split() == ["CIFAR-10,", "IPC1", "10", "10", "80", "compiled", *"-" * 7, "out", "of", "memory"]


def test_a_random_trajectory_is_a_network_that_moves_a_little():
    start = FlatModel(network := build("ConvNetD1W8", 3, 2, (8, 8), 0)).flatten(network)
    rows = gpu.RandomTrajectory(start).rows(0, [3, 5])
    assert rows.shape == (2, len(start)) and not torch.equal(*rows)
    assert 0.004 < (rows - start).std() < 0.006


# ---- the work itself

WORKS = {
    "matching": lambda *way: gpu.matching_work(gpu.TINY, gpu.TINY.images, *way),
    "expert": lambda *way: gpu.expert_work(gpu.TINY, *way),
    "network": lambda *way: gpu.evaluation_work(gpu.TINY, 1, *way),
    "networks": lambda *way: gpu.evaluation_work(gpu.TINY, 2, *way),
    "grad": lambda *way: gpu.derivative_work(gpu.TINY, "grad", *way),
    "hvp": lambda *way: gpu.derivative_work(gpu.TINY, "hvp", *way),
    "flip": lambda *way: gpu.augmentation_work(gpu.TINY, "flip", *way),
}


@pytest.mark.parametrize("name", WORKS)
def test_all_work_can_be_captured(name, caplog):
    replay = EmulatedReplay()
    word = "fused" if name == "network" else "off"
    work = WORKS[name](word, replay, CPU)
    for _ in range(4):
        work.run(work.timed[-1])
    assert replay._graphs.replays > 0 and not caplog.records


def test_the_plain_loop_and_ours_match_the_same():
    plain, ours = (WORKS["matching"](word, AT_ONCE, CPU).run(gpu.TINY.steps) for word in (None, "off"))
    for theirs, mine in zip(plain, ours, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", ["expert", "network"])
@pytest.mark.parametrize("word", [None, "off"])
def test_a_run_is_of_as_many_steps_as_it_is_told(name, word, monkeypatch):
    """Each step draws an augmentation."""
    drawn, draw = [], gpu.DSA.draw
    monkeypatch.setattr(gpu.DSA, "draw", lambda self, *given: drawn.append(1) or draw(self, *given))
    WORKS[name](word, AT_ONCE, CPU).run(2)
    assert len(drawn) == 2


@pytest.mark.cuda
def test_kernels_of_captured_work_are_seen():
    device, x = torch.device("cuda"), torch.randn(1000, device="cuda")
    for replay in (AT_ONCE, replay_on(device)):
        work = gpu.calls(gpu.TINY, lambda: (x * 2, x + 1), replay)
        for _ in range(2):
            work.run(3)
        assert gpu.profile(work, device)["kernels a step"] == 2


@pytest.mark.cuda
def test_the_peak_is_what_the_work_took():
    device, held = torch.device("cuda"), torch.empty(2**26, device="cuda")
    work = gpu.Work(run=lambda n: torch.empty(2**24, device="cuda"), steps=1, timed=(1,), profiled=0)
    assert gpu.measure(lambda: work, device, 1)["peak"] == 4 * 2**24
    del held


# ---- as it is called


@pytest.mark.slow
def test_a_fresh_process_does_one_iteration_and_keeps_what_it_built(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    began = gpu.time.time()
    took = gpu.in_child("fused", True, tmp_path / "kept")
    assert 0.5 < took < gpu.time.time() - began
    assert list((tmp_path / "kept" / "pad_cache").iterdir())


@pytest.mark.slow
def test_the_check_names_what_it_leaves_out_and_measures(tmp_path):
    (tmp_path / "pytest.py").write_text("raise ModuleNotFoundError(name='pytest')")
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "PYTHON": sys.executable}
    command = ["bash", str(CHECKOUT / "scripts" / "gpu_check.sh"), "out", "--tiny", "--budget", "0"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "tests/test_devices.py is left out: pytest is not installed\n" in done.stderr
    (found,) = (tmp_path / "out").glob("*.json")
    assert "not measured: the budget was spent" in found.read_text()
