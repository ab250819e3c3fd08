"""The benchmarks run, and their competitors compute the same thing. Nothing here looks at a time."""

import argparse
import dataclasses
import importlib
import platform
import signal
import sys
from pathlib import Path

import pytest
import torch
from helpers import slow

from pad.allocator import HOW_THREADS_WAIT
from pad.data.augment import DSA
from pad.data.preprocessing import fit_preprocessing
from pad.data.sources import load_data
from pad.difficulty.methods import score_network
from pad.difficulty.training import ScoringSettings, ScoringTraining
from pad.evaluation import Protocol
from pad.matching.loss import matching_loss
from pad.matching.unroll import adjoint, unroll
from pad.nn.flat import FlatModel
from pad.nn.networks import build
from pad.rng import generator

sys.path.append(str(Path(__file__).resolve().parents[1] / "scripts" / "benchmarks"))
NAMES = ("common", "distributed", "evaluation", "expert_epoch", "matching", "memory", "scaling", "store")
common, distributed, evaluation, expert_epoch, matching, memory, scaling, store = map(importlib.import_module, NAMES)
NAMES = ("contention", "difficulty", "gpu", "ranking_quality")
contention, difficulty, gpu, ranking_quality = map(importlib.import_module, NAMES)
linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from /proc")


def relative(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm()).item()


# ---- every script runs


@pytest.mark.parametrize(
    "name, options, rows",
    [
        ("adjoint", [], ["MLP"]),
        ("blocks", [], ["NCHW    dual and gradients", "NHWC    value "]),
        ("precision", [], ["constant and large         Hessian pass "]),
        ("matching", [], ["unrolled, C library's", "unrolled, our memory", "adjoint", "TESLA's", "floor: "]),
        ("matching", ["--cosine"], ["cosine, images", "    1 ", "    3 "]),
        ("expert_epoch", [], ["plain loop", "ours"]),
        ("evaluation", ["--together"], ["plain loop", "ours, all together"]),
        pytest.param("store", [], ["open the store", "published: load the file", "forms gave: 0\n"], marks=linux),
        pytest.param("memory", [], ["unrolled / adjoint", "    2 ", "    4 "], marks=linux),
        pytest.param("scaling", [], ["syn_steps", "ipc", "width"], marks=linux),
        ("distributed", [], ["float32: gradients off by", "    1 ", "    2 "]),
        ("contention", ["--spins", "7"], ["1 busy process  ours ", "1 busy process  7 looks"]),
        ("gpu", [], ["plain loop", "fused", "flip there and back", "one of 2 networks at once"]),
        ("gpu", ["--cells"], ["CIFAR-10, IPC1000, tiny ", "TinyImageNet, IPC50, tiny "]),
        ("difficulty", [], ["autograd per batch, scores alone", "closed form, scores alone", "Herding", "Craig"]),
        slow("curriculum_effect", ["--out", "runs"], ["experts  ", "synthetic  ", "random real, hard labels  "]),
        ("ranking_quality", [], ["agreement of GraNd", "2 networks", "10 wrongly labelled", "Forgetting"]),
    ],
)
def test_the_script_prints_its_table(name, options, rows, monkeypatch, tmp_path, capsys):
    # Processes of their own take seconds to start. That they are found is seen below; two ranks have tests elsewhere.
    def in_child(kind, **problem):
        return memory.measure({"kind": kind, "problem": problem})

    def run(ranks, case, rounds):
        distributed.work(case, rounds, str(tmp_path / "found.pt"))
        return torch.load(tmp_path / "found.pt")

    for module, function in ((memory, in_child), (scaling, in_child), (distributed, run)):
        monkeypatch.setattr(module, function.__name__, function)
    monkeypatch.setattr(gpu, "in_child", lambda word, tiny, folder: 1.0)
    monkeypatch.setattr(contention, "in_child", lambda case, waiting: contention.work(case))
    monkeypatch.chdir(tmp_path)
    importlib.import_module(name).main(["--tiny", *options])
    out = capsys.readouterr().out
    assert f"torch {torch.__version__}" in out or name == "adjoint"
    for row in rows:
        assert row in out


@pytest.mark.slow
@linux
def test_memory_is_measured_in_a_process_that_finds_its_modules_from_anywhere(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    problem = {"depth": 1, "width": 16, "n": 64, "batch": 64, "side": 32, "count": 2}
    activations = 4 * 64 * 16 * 32 * 32  # bytes of the first layer's output; a step needs several such
    assert 2 * activations < memory.in_child("adjoint", **problem) < 40 * activations


def test_contention_is_measured_in_processes_that_wait_as_told(monkeypatch):
    told = []
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    monkeypatch.setattr(contention.subprocess, "check_output", lambda command, env: told.append(env) or "{}")
    for waiting in ({}, {"GOMP_SPINCOUNT": "7"}):
        contention.in_child({}, waiting)
        environment = told.pop()
        assert {name: environment[name] for name in HOW_THREADS_WAIT if name in environment} == waiting


def test_busy_processes_last_as_long_as_they_are_wanted():
    with contention.beside(2) as processes:
        assert [process.poll() for process in processes] == [None, None]
    assert [process.poll() for process in processes] == [-signal.SIGKILL] * 2


# ---- the competitors compute the same


def test_the_plain_network_is_ours():
    network = build("ConvNetD2W8", 3, 10, (8, 8), 0).double()
    plain = common.plain_convnet(2, 8, 3, 8, network).double()
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64, generator=generator(0, "x"))
    assert relative(network(x), plain(x)) < 1e-12


def test_adjoint_and_unrolled_loop_give_the_same_gradients():
    problem = common.Matching(depth=2, width=8, n=10, batch=4, count=5, side=8, dtype=torch.float64)
    rest = (problem.start, problem.target, problem.data, problem.steps)
    for ours, theirs in zip(
        matching.adjoint(problem.model, *rest), matching.unrolled(problem.plain, *rest), strict=True
    ):
        assert relative(ours, theirs) < 1e-10


def test_tesla_holds_lam_constant():
    problem = common.Matching(depth=2, width=8, n=10, batch=4, count=5, side=8, dtype=torch.float64)
    data = problem.data
    ends = (problem.start, problem.target)
    path = unroll(problem.model, problem.start, *data, problem.steps)
    _, lam = matching_loss(path[-1], *ends)
    parts = [adjoint(problem.model, path[i:], *data, [step], lam=lam) for i, step in enumerate(problem.steps)]
    tesla = matching.truncated(problem.plain, problem.model, *ends, data, problem.steps)
    exact = matching.adjoint(problem.model, *ends, data, problem.steps)
    for i, expected in enumerate(map(sum, zip(*parts))):
        assert relative(tesla[1 + i], expected) < 1e-10
        assert relative(tesla[1 + i], exact[1 + i]) > 1e-4

    one = matching.truncated(problem.plain, problem.model, *ends, data, problem.steps[:1])
    for ours, theirs in zip(one, matching.adjoint(problem.model, *ends, data, problem.steps[:1])):
        assert relative(ours, theirs) < 1e-10


def test_an_expert_ends_where_the_plain_loop_ends():
    args = argparse.Namespace(images=40, batch=16, width=8, depth=2, side=8, eager=True)
    plain, *ours = expert_epoch.competitors(args, torch.float64)
    assert not plain.ours and len(ours) == 2 and all(entry.ours for entry in ours)
    start = build("ConvNetD2W8", 3, 10, (8, 8), 0).double()
    start = FlatModel(start).flatten(start)
    end = plain.run()
    for entry in ours:
        assert relative(entry.run() - start, end - start) < 1e-10


def test_an_evaluation_network_ends_where_the_plain_loop_ends():
    images, classes, _, _ = evaluation.fashion(per_class=2, side=8)
    images, p = images.double(), torch.nn.functional.one_hot(classes, 10).double()
    protocol = Protocol(DSA(), epochs=4, batch_size=8)  # the learning rate falls and momentum begins anew after epoch 3
    net = build("ConvNetD2W8", 3, 10, (8, 8), 0).double()
    plain = common.plain_convnet(2, 8, 3, 8, net).double()
    start = FlatModel(net).flatten(net)
    evaluation.plain_training(plain, images, p, protocol, generator(0, "rng"))
    end = FlatModel(net).flatten(plain)
    for compile in ("off", "fused"):
        ours = build("ConvNetD2W8", 3, 10, (8, 8), 0).double()
        protocol.train(FlatModel(net, compile), [ours], [(images, p)], evaluation.LR, [generator(0, "rng")])
        assert relative(FlatModel(net).flatten(ours) - start, end - start) < 1e-10


def test_a_ranking_taken_on_the_way_is_that_of_a_shorter_training():
    data = load_data("FashionMNISTMini", None).first_per_class(4)
    images = fit_preprocessing(data, zca=False).apply(data.train_images)
    settings = ScoringSettings("ConvNetD1W8", lr=0.05, batch=16)
    found = ranking_quality.grand_after(images, data, settings, 0, 1, [1, 3])
    for epochs, ours in found.items():
        shorter = dataclasses.replace(settings, epochs=epochs)
        network = ScoringTraining(images, data.train_labels, 10, shorter, 0).train(1)
        theirs = score_network(["GraNd"], network, images, data.train_labels).scores["GraNd"]
        torch.testing.assert_close(ours, theirs)
    assert relative(found[3], found[1]) > 0.01


def test_wrong_labels_are_wrong_and_counted_where_they_land():
    data = load_data("FashionMNISTMini", None).first_per_class(40)
    wrong, chosen = ranking_quality.with_wrong_labels(data, 0.05, 0)
    changed = (wrong.train_labels != data.train_labels).nonzero().flatten()
    assert sorted(chosen.tolist()) == changed.tolist() and len(changed) == 20
    rows = [torch.arange(10), torch.arange(10, 39)]  # the last 1 and the last 2 are the hardest tenths
    assert ranking_quality.share_in_hardest_tenth(rows, torch.tensor([9, 8, 37, 36])) == 0.5


def test_agreement_is_within_classes():
    labels = torch.tensor([0, 0, 0, 1, 1, 1])
    a, b = torch.tensor([1.0, 2, 3, 11, 12, 13]), torch.tensor([1.0, 2, 3, 13, 12, 11])
    assert ranking_quality.agreement(a, a, labels) == pytest.approx(1)
    assert ranking_quality.agreement(a, b, labels) == pytest.approx(0)


def test_gradients_by_autograd_have_the_norms_of_the_closed_form():
    args = argparse.Namespace(images=600, side=8, network="ConvNetD1W8")
    for entries in difficulty.scorers(args):
        theirs, ours = (c.run() for c in entries)
        assert theirs.shape == (600,) and relative(ours, theirs.double()) < 1e-6


# ---- how they are measured


def test_competitors_run_in_turn_and_first_calls_are_not_timed():
    calls = []
    a = common.Competitor("a", lambda: calls.append("a"))
    b = common.Competitor("b", lambda: calls.append("b"), ours=False, warm_up=lambda: calls.append("warm"))
    common.race([a, b], rounds=3)
    assert calls == ["a", "warm", "a", "b", "a", "b", "a", "b"]
    assert len(a.times) == len(b.times) == 3
    assert b.set_up == b.first > 0


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no such settings")
def test_default_malloc_maps_large_blocks_anew_also_after_others_have_kept_theirs():
    common.keep_freed_memory()
    large = torch.ones(80 * 2**18)  # 80 MiB
    above = torch.ones(1000)  # stays, so that the heap cannot shrink and a hole is left
    del large

    def work():
        for _ in range(3):
            torch.ones(40 * 2**18)

    kept, default = common.Competitor("kept", work), common.Competitor("default", work, ours=False)
    common.race([kept, default], rounds=5)
    medians = [sorted(c.faults)[2] for c in (kept, default)]
    assert medians[1] > 5 * (medians[0] + 1)
    del above


def test_operations_are_counted_by_shapes():
    model = FlatModel(build("ConvNetD1W8", 3, 10, (8, 8), 0))
    convolution, linear = 2 * 27 * 8 * 64, 2 * 10 * 8 * 16
    assert common.forward_operations(model, torch.empty(5, 3, 8, 8)) == 5 * (convolution + linear)


def test_what_does_not_fit_goes_on_in_a_straight_line(monkeypatch, capsys):
    measured = {"unrolled": {2: 30e6, 4: 50e6}, "adjoint": dict.fromkeys((2, 4, 8), 10e6)}
    measured["kept"] = measured["micro"] = measured["adjoint"]
    monkeypatch.setattr(memory, "in_child", lambda kind, count, **problem: measured[kind][count])
    monkeypatch.setattr(memory, "available_memory", lambda: 100e6)  # too little for the 90 MB at 8 steps
    monkeypatch.setattr(
        argparse.ArgumentParser,
        "parse_args",
        lambda *_: argparse.Namespace(
            width=8, depth=1, side=8, images=10, steps=[8, 2, 4], kinds=memory.KINDS, case=None, tiny=False
        ),
    )
    memory.main([])
    out = capsys.readouterr().out
    assert "~90.0" in out and "~9.0" in out and "~50.0" not in out


def test_store_refuses_a_full_disk(monkeypatch, tmp_path):
    monkeypatch.setattr(store.shutil, "disk_usage", lambda _: argparse.Namespace(free=10**6))
    with pytest.raises(SystemExit, match="has room for"):
        store.main(["--tiny", "--folder", str(tmp_path)])
    assert not list(tmp_path.iterdir())
