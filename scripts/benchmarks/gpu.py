#!/usr/bin/env python
"""Times, memory and kernels on one CUDA card: ours in each way, beside the plain loops.

    python scripts/benchmarks/gpu.py --out runs/gpu/table.json           # at most four minutes
    python scripts/benchmarks/gpu.py --cells --out runs/gpu/cells.json   # the published settings, an iteration each
    python scripts/benchmarks/gpu.py --tiny                              # that it runs, on a CPU too

Images and trajectories are random numbers; nothing is downloaded. "Plain loop" is how it is published: for matching
the unrolled loop of matching.py, its autograd graph of all steps kept, for experts and evaluation networks the loops of
expert_epoch.py and evaluation.py. "Captured" is by CUDA graphs. Nothing is begun that is not expected to end within
the budget, and what was left out is said.

s: median of the timed rounds after a warm-up, the device idle before and after. Peak: the most memory that tensors
took, from the work's data on, warm-up and capturing included. Kernels, and the share of the time in which one ran:
from a profile of some more steps, whose own wall time is what it is a share of. First: from the start of a process to
the end of its first iteration, without compiled code from before and with it.
"""

import argparse
import functools
import gc
import itertools
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from common import CLASSES, Matching, describe_machine, plain_convnet

import torch
from evaluation import LR, plain_training
from expert_epoch import our_epoch, plain_epoch
from matching import adjoint, unrolled
from memory import straight_on
from scaling import flat_model
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from pad.commands.bench import use_tf32
from pad.commands.trajectory import DistillSettings
from pad.config import parse
from pad.data.augment import DSA, Draw, augment_and_back
from pad.data.images import one_line
from pad.data.placement import to_device
from pad.errors import is_of_memory
from pad.evaluation import Protocol
from pad.matching.trajectory import SegmentSampler, TrajectoryObjective
from pad.nn.derivatives import how_to_compile
from pad.nn.flat import FlatModel
from pad.nn.networks import build
from pad.nn.replay import AT_ONCE, Replay, replay_on
from pad.rng import generator
from pad.show.tables import result_table
from pad.store.files import write_text

ROOT = Path(__file__).resolve().parents[2]
PLAIN = "plain loop"
WAYS = {"on": "compiled", "fused": "fused", "off": "eager"}

# What was measured before steps were captured, beside the plain loops of the published code itself, and what is to be
# reached: docs/BENCHMARKS.md, "On a GPU"
BEFORE = {
    ("matching, 100 images", PLAIN, "TF32"): "published: 1.338 s, 22.6 GiB",
    ("matching, 100 images", "eager", "TF32"): "1.43-1.47 s",
    ("matching, 100 images", "compiled", "TF32"): "0.56 s, 0.84-1.0 GB",
    ("matching, 100 images", "compiled", "float32"): "0.56 s, 0.84-1.0 GB",
    ("matching, 500 images", PLAIN, "TF32"): "published: 2.441 s, 111.6 GiB",
    ("matching, 500 images", "eager", "TF32"): "2.31 s, 2.5 GB",
    ("expert epoch, 50000 images", PLAIN, "TF32"): "published: 3.23 s",
    ("expert epoch, 50000 images", "eager", "TF32"): "1.30 s",
    ("expert epoch, 50000 images", "compiled", "TF32"): "1.07 s",
    ("expert epoch, 50000 images", "compiled", "float32"): "1.38 s",
    ("network, 1000 epochs", PLAIN, "TF32"): "published: 7.9 s",
    ("network, 1000 epochs", "eager", "TF32"): "4.64 s",
    ("network, 1000 epochs", "compiled", "TF32"): "3.44 s",
    ("one of 5 networks at once", "compiled", "TF32"): "1.35 s",
    ("grad, 100 images", "compiled", "TF32"): "1.31 ms",
    ("grad, 100 images", "compiled, captured", "TF32"): "0.66 ms",
    ("grad, 100 images", "compiled", "float32"): "1.53 ms",
    ("grad, 100 images", "compiled, captured", "float32"): "1.45 ms",
    ("hvp, 100 images", "compiled", "TF32"): "3.53 ms",
    ("hvp, 100 images", "compiled, captured", "TF32"): "1.67 ms",
    ("hvp, 100 images", "compiled", "float32"): "4.14 ms",
    ("hvp, 100 images", "compiled, captured", "float32"): "3.95 ms",
    ("flip there and back", "eager", "TF32"): "0.28 ms",
    ("scale there and back", "eager", "TF32"): "0.69 ms",
}
TO_REACH = {
    "matching, 100 images": "0.13 s",
    "matching, 500 images": "0.5 s",
    "expert epoch, 50000 images": "0.3 s",
    "network, 1000 epochs": "0.8 s",
    "one of 5 networks at once": "0.8 s",
}
# Seconds an iteration and GB, of others, by our settings of the same cell (NCFM, CVPR 2025, Table 3; A100 of 80 GB)
NO_MEMORY = "out of memory"
SYSTEMS = ("MTT", "FTD", "TESLA", "DATM", "NCFM")
OTHERS = {
    name: dict(zip(SYSTEMS, figures))
    for name, figures in {
        "CIFAR-100, IPC10": ("1.92, 61.6", "1.68, 61.4", "5.71, 10.3", NO_MEMORY, "1.33, 1.6"),
        "CIFAR-100, IPC50": (NO_MEMORY, NO_MEMORY, "28.2, 44.2", NO_MEMORY, "1.36, 2.0"),
        "TinyImageNet, IPC10": (NO_MEMORY, NO_MEMORY, "42.0, 69.6", NO_MEMORY, "3.27, 6.5"),
        "TinyImageNet, IPC50": (NO_MEMORY, NO_MEMORY, NO_MEMORY, NO_MEMORY, "7.22, 8.7"),
    }.items()
}
NUM_CLASSES = {"CIFAR10": 10, "CIFAR100": 100, "Tiny": 200}

FIRST = ("first s, nothing kept", "first s, code kept")  # iteration of a process

# Seconds that are expected, by which the budget is kept: torch.compile's of one graph, and of anything else
A_GRAPH, ANYTHING = 20.0, 10.0


@dataclass(frozen=True)
class Sizes:
    """Of all that is measured; the default is what docs/BENCHMARKS.md has figures of."""

    depth: int = 3
    width: int = 128
    side: int = 32
    images: int = 100
    more: int = 500
    steps: int = 80
    real: int = 50_000
    batch: int = 256
    epochs: int = 1001  # of an evaluation network: 0..1000
    timed_epochs: tuple[int, int] = (50, 150)
    networks: int = 5
    calls: int = 50  # of a single function

    def model(self, word: str, batch: int) -> FlatModel:
        return flat_model(self.depth, self.width, self.side, batch, word)

    def matching(self, n: int, device: torch.device) -> Matching:
        return Matching(
            depth=self.depth, width=self.width, n=n, batch=n, count=self.steps, side=self.side, device=device
        )


TINY = Sizes(
    depth=1,
    width=8,
    side=8,
    images=6,
    more=8,
    steps=2,
    real=40,
    batch=16,
    epochs=9,
    timed_epochs=(2, 4),
    networks=2,
    calls=3,
)


# ---- how it is measured


@dataclass(frozen=True, kw_only=True)
class Work:
    """What is timed: ``run(n)`` does n steps of it.

    steps: of what the figure is about; per: how many of these there are in it, as networks. timed: numbers of steps
    that are timed, from which a straight line leads to ``steps``. profiled: steps of the profile.
    """

    run: Callable[[int], object]
    steps: int
    timed: tuple[int, ...]
    profiled: int
    per: int = 1


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Wall time of ``run`` and of all that it has queued on the device."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    began = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - began


def of_kernels(events: Iterable) -> tuple[int, float]:
    """How many kernels ran on the card by a profile's events, and their seconds; copies and fills are none."""
    took = [
        event.time_range.elapsed_us()
        for event in events
        if event.device_type == DeviceType.CUDA
        and not event.is_user_annotation
        and not event.name.startswith(("Memcpy", "Memset"))
    ]
    return len(took), sum(took) / 1e6


def profile(work: Work, device: torch.device) -> dict:
    """Kernels a step, their ms a step, and the share in percent of the profile's time that they took."""
    # acc_events, or torch may warn that it keeps those of one cycle only
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA], acc_events=True) as found:
        wall = seconds(lambda: work.run(work.profiled), device)
    count, busy = of_kernels(found.events())
    return {
        "kernels a step": round(count / work.profiled),
        "busy ms a step": 1e3 * busy / work.profiled,
        "busy %": 100 * busy / wall,
    }


def measure(make: Callable[[], Work], device: torch.device, rounds: int) -> dict:
    """Seconds and, on a card, peak bytes and what :func:`profile` finds, of the work that ``make`` prepares."""
    gc.collect()  # graphs of the work before
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    work = make()
    for n in work.timed:
        work.run(n)
    times = [[seconds(lambda: work.run(n), device) for _ in range(rounds)] for n in work.timed]
    known = [(n, statistics.median(taken)) for n, taken in zip(work.timed, times)]
    found = {"s": straight_on(known, work.steps) / work.per, "times": dict(zip(work.timed, times))}
    if work.steps > work.timed[-1]:
        found["notes"] = [f"in a straight line from {' and '.join(map(str, work.timed))} epochs"]
    if cuda:
        found["peak"] = torch.cuda.max_memory_allocated() - before
        found |= profile(work, device) if work.profiled else {}
    return found


class Heard(logging.Handler):
    """The warnings of a block, such as that steps could not be captured."""

    def __enter__(self) -> list[str]:
        self.said: list[str] = []
        logging.getLogger("pad").addHandler(self)
        return self.said

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING:
            self.said.append(record.getMessage())

    def __exit__(self, *_) -> None:
        logging.getLogger("pad").removeHandler(self)


@dataclass(frozen=True, kw_only=True)
class Unit:
    """Something to measure.

    row: which row of the table it is of, by the row's first columns. graphs: what torch.compile makes for it, by name;
    some may be there already. seconds: that it takes else. rank: those of the lowest come first. what: is said where
    the budget leaves no time.
    """

    row: tuple
    measure: Callable[[], dict]
    graphs: frozenset = frozenset()
    seconds: float = ANYTHING
    rank: int = 0
    what: str = "not measured"

    def attempt(self) -> dict:
        """What was found, with notes on it; whatever goes wrong is one of them, and the others go on."""
        with Heard() as said:
            try:
                found = self.measure()
            except Exception as error:
                if is_of_memory(error):
                    found = {"notes": [NO_MEMORY]}
                else:
                    found = {"notes": [f"failed: {one_line(error)}"], "failed": True}
        return found | {"notes": found.get("notes", []) + said}


def work_off(units: list[Unit], budget: float, save: Callable[[list[dict]], None]) -> list[dict]:
    """Measure what is expected to end within ``budget`` seconds; the rows, which ``save`` gets after each."""
    began = time.perf_counter()
    rows = {unit.row: {"row": unit.row, "notes": []} for unit in units}
    compiled: set = set()
    for unit in sorted(units, key=lambda unit: unit.rank):
        row, expected = rows[unit.row], unit.seconds + A_GRAPH * len(unit.graphs - compiled)
        if time.perf_counter() - began + expected > budget:
            row["notes"].append(f"{unit.what}: the budget was spent")
            continue
        found = unit.attempt()
        compiled |= unit.graphs
        row |= found | {"notes": row["notes"] + found["notes"]}
        shown = [f"{found[name]:.4g} {name}" for name in ("s", *FIRST) if name in found] + found["notes"]
        print(f"{time.perf_counter() - began:5.0f} s: {', '.join([*map(str, unit.row), *shown])}", flush=True)
        save(list(rows.values()))
    return list(rows.values())


# ---- a fresh process


def first_iteration(word: str, sizes: Sizes, device: torch.device) -> float:
    """Do one iteration; the time (of the clock) when it was done."""
    problem = sizes.matching(sizes.images, device)
    adjoint(
        sizes.model(word, sizes.images),
        *(problem.start, problem.target, problem.data, problem.steps),
        replay=replay_on(device),
    )
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.time()


def in_child(word: str, tiny: bool, folder: Path) -> float:
    """Seconds from the start of a process to the end of its first iteration; compiled code is kept in ``folder``."""
    command = [sys.executable, __file__, "--first", word, *["--tiny"] * tiny]
    began = time.time()
    return float(subprocess.check_output(command, env=os.environ | cache_in(folder), text=True).split()[-1]) - began


def cache_in(folder: Path) -> dict[str, str]:
    """Environment of a process that keeps what it compiles in ``folder``."""
    names = ("PAD_CACHE", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
    return {name: str(folder / name.lower()) for name in names}


# ---- the table


def matching_work(sizes: Sizes, n: int, word: str | None, replay: Replay, device: torch.device) -> Work:
    """An iteration on ``n`` images a step."""
    problem = sizes.matching(n, device)
    ends, data, steps = (problem.start, problem.target), problem.data, problem.steps

    def run(count: int) -> object:
        if word is None:
            return unrolled(problem.plain, *ends, data, steps[:count])
        return adjoint(sizes.model(word, n), *ends, data, steps[:count], replay=replay)

    return Work(run=run, steps=sizes.steps, timed=(sizes.steps,), profiled=sizes.steps)


def expert_work(sizes: Sizes, word: str | None, replay: Replay, device: torch.device) -> Work:
    """An epoch of an expert; the plain loop finds the images on the CPU, as published."""
    network = build(f"ConvNetD{sizes.depth}W{sizes.width}", 3, CLASSES, (sizes.side, sizes.side), 0)
    place = "cpu" if word is None else device
    images = torch.randn(sizes.real, 3, sizes.side, sizes.side, device=place)
    labels = torch.randint(CLASSES, (sizes.real,), device=place)
    start = FlatModel(network).flatten(network).to(device)

    def run(batches: int) -> object:
        count = min(batches * sizes.batch, sizes.real)
        if word is None:
            net = plain_convnet(sizes.depth, sizes.width, 3, sizes.side, network).to(device)
            return plain_epoch(net, images[:count], labels[:count], sizes.batch, generator(0, "expert", 0, 0))
        model = sizes.model(word, sizes.batch)
        return our_epoch(model, start, images, labels, sizes.batch, replay=replay, count=count)

    steps = -(-sizes.real // sizes.batch)
    return Work(run=run, steps=steps, timed=(steps,), profiled=min(steps, 20))


def evaluation_work(sizes: Sizes, count: int, word: str | None, replay: Replay, device: torch.device) -> Work:
    """The training of ``count`` evaluation networks at once, whose batches are all the images."""
    shape = sizes.images, 3, sizes.side, sizes.side
    images, p = torch.randn(shape, device=device), torch.randn(sizes.images, CLASSES, device=device).softmax(dim=1)
    name = f"ConvNetD{sizes.depth}W{sizes.width}"
    streams = [(0, "evaluation", j) for j in range(count)]
    nets = [build(name, 3, CLASSES, shape[2:], *stream).to(device) for stream in streams]
    plain = plain_convnet(sizes.depth, sizes.width, 3, sizes.side, nets[0]).to(device)

    def run(epochs: int) -> None:
        protocol = Protocol(DSA(), epochs=epochs - 1, compile=word or "off", together=count)
        rngs = [generator(0, "evaluation", name, j) for j in range(count)]
        if word is None:
            return plain_training(plain, images, p, protocol, rngs[0])
        protocol.train(sizes.model(word, sizes.images), nets, [(images, p)] * count, LR, rngs, replay=replay)

    timed = sizes.timed_epochs
    return Work(run=run, steps=sizes.epochs, timed=timed, profiled=min(timed), per=count)


def derivative_work(sizes: Sizes, name: str, word: str, replay: Replay, device: torch.device) -> Work:
    """One call of ``grad`` or ``hvp``."""
    problem = sizes.matching(sizes.images, device)
    model, (images, labels, _) = sizes.model(word, sizes.images), problem.data
    lam = [problem.target - problem.start] * (name == "hvp")
    inputs = [problem.start, images, labels.softmax(dim=1), *lam]
    return calls(sizes, torch.no_grad()(lambda: getattr(model, name)(*inputs)), replay)


def augmentation_work(sizes: Sizes, kind: str, word: str, replay: Replay, device: torch.device) -> Work:
    """One augmentation of all images, and a gradient taken back through it; nothing in it is compiled."""
    drawn = DSA(kind).draw(sizes.images, generator(0, "draw"))
    draw = Draw(kind, to_device(drawn.u, device))
    x, gradient = torch.randn(2, sizes.images, 3, sizes.side, sizes.side, device=device)

    def there_and_back() -> object:
        augmented, back = augment_and_back(x, draw)
        return back(gradient)

    return calls(sizes, there_and_back, replay)


def calls(sizes: Sizes, call: Callable[[], object], replay: Replay) -> Work:
    def run(count: int) -> None:
        for _ in range(count):
            replay.run(("call",), call)

    return Work(run=run, steps=1, timed=(sizes.calls,), profiled=sizes.calls)


def plan(sizes: Sizes, device: torch.device, rounds: int, folder: Path) -> list[Unit]:
    """All there is to measure; compiled code is kept in ``folder``. The rows are (work, way, precision).

    First come the ways that may be the fastest, and the published iteration; then the others, and last float32.
    """
    cuda, tiny = device.type == "cuda", sizes is TINY
    asked = ("fused", "off") if tiny else ("on", "fused", "off")  # compiling takes minutes on a CPU
    words = list(dict.fromkeys(sizes.model(how_to_compile(mode, device, 0), sizes.images).compile for mode in asked))
    ways = [(word, captured) for word in words for captured in ((True, False) if cuda else (False,))]
    usual = "TF32" if cuda else "float32"
    n, more = sizes.images, sizes.more
    units: list[Unit] = []

    def name(word: str | None, captured: bool) -> str:
        return WAYS[word] + ", captured" * captured if word else PLAIN

    def add(
        work: str, kind: Callable[..., Work], *given, ways: list = ways, graphs: tuple = (), precision: str = usual
    ) -> None:
        for word, captured in ways:

            def measured(word: str | None = word, captured: bool = captured) -> dict:
                use_tf32(precision == "TF32", device)
                replay = replay_on(device) if captured else AT_ONCE
                return measure(lambda: kind(sizes, *given, word, replay, device), device, rounds)

            first = word != "off" and captured == cuda or word is None and kind is matching_work
            rank = 2 if precision != usual else 0 if first else 1
            compiled = frozenset((*graph, precision) for graph in graphs) if word == "on" else frozenset()
            units.append(
                Unit(row=(work, name(word, captured), precision), measure=measured, graphs=compiled, rank=rank)
            )

    def add_first(word: str) -> None:
        units.append(
            Unit(
                row=(f"matching, {n} images", name(word, cuda), usual),
                measure=lambda: {name: in_child(word, tiny, folder) for name in FIRST},
                seconds=2 * ANYTHING + 3 * A_GRAPH * (word == "on"),
                rank=1 if word == "off" else -1,  # before the others, who then find compiled code
                what="first iterations not measured",
            )
        )

    plain = [(None, False)]
    each = ("grad", n), ("hvp", n)
    add(f"matching, {n} images", matching_work, n, ways=plain + ways, graphs=each)
    for word in words:
        add_first(word)
    for function in ("grad", "hvp"):
        add(f"{function}, {n} images", derivative_work, function, graphs=each)
    for kind in ("flip", "scale"):
        add(f"{kind} there and back", augmentation_work, kind, ways=[way for way in ways if way[0] == "off"])
    expert = f"expert epoch, {sizes.real} images"
    add(expert, expert_work, ways=plain + ways, graphs=(("grad", sizes.batch),))
    alone = [way for way in ways if way != ("off", True)]  # uncompiled it is trained as a module
    add(f"network, {sizes.epochs - 1} epochs", evaluation_work, 1, ways=plain + alone, graphs=(("grad, training", n),))
    add(f"one of {sizes.networks} networks at once", evaluation_work, sizes.networks, graphs=(("grads", n),))
    add(f"matching, {more} images", matching_work, more, ways=plain + ways, graphs=(("grad", more), ("hvp", more)))
    if cuda:
        add(f"matching, {n} images", matching_work, n, graphs=each, precision="float32")
        for function in ("grad", "hvp"):
            add(f"{function}, {n} images", derivative_work, function, graphs=each, precision="float32")
        add(expert, expert_work, graphs=(("grad", sizes.batch),), precision="float32")
    return units


def table(rows: list[dict]) -> str:
    """The rows beside what was measured before and what is to be reached, where there is such a figure."""
    measured = ("kernels a step", "busy ms a step", "busy %", *FIRST)
    lines = []
    for row in rows:
        work, way, precision = row["row"]
        lines.append(
            {
                "work": work,
                "way": way,
                "precision": precision,
                "s": row.get("s"),
                "peak GiB": row["peak"] / 2**30 if "peak" in row else None,
                **{name: row.get(name) for name in measured},
                "before (H200, 8f86ba8)": BEFORE.get((work, way, precision)),
                "to reach": TO_REACH.get(work),
                "note": "; ".join(row["notes"]) or None,
            }
        )
    return result_table(lines, list(lines[0]))


# ---- the published settings


class RandomTrajectory:
    """In the place of a store: a network's parameters, which move a little at random from epoch to epoch."""

    def __init__(self, start: torch.Tensor):
        self.start = start

    def rows(self, expert: int, epochs: list[int]) -> torch.Tensor:
        rng = generator(0, "benchmark", expert, *epochs)
        return self.start + 0.005 * torch.randn(len(epochs), len(self.start), generator=rng)


@functools.cache
def student(name: str, num_classes: int, side: int, word: str, batch: int) -> tuple[FlatModel, torch.Tensor]:
    """The network and its parameters; the batch is an argument because each size is a graph."""
    network = build(name, 3, num_classes, (side, side), 0)
    model = FlatModel(network, word)
    return model, model.flatten(network)


@dataclass(frozen=True)
class Cell:
    """Matching by one of the published files of settings, on random images."""

    name: str
    settings: DistillSettings
    device: torch.device

    @classmethod
    def read(cls, path: Path, compile: str, device: torch.device, tiny: bool) -> "Cell":
        options = {"compile": compile}
        if tiny:
            options |= {"model": "ConvNetD1W8", "ipc": 1, "syn_steps": 2, "batch_syn": 5, "res": 8}
        flags = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        name = f"{path.parent.parent.name}, {path.stem}" + ", tiny" * tiny
        return cls(name, parse(DistillSettings, ["--cfg", str(path), *flags], "gpu.py"), device)

    @property
    def num_classes(self) -> int:
        return NUM_CLASSES[self.settings.dataset]

    @property
    def images(self) -> int:
        return self.num_classes * self.settings.ipc

    @property
    def batch(self) -> int:
        return min(self.settings.batch_syn or self.images, self.images)

    @property
    def word(self) -> str:
        return how_to_compile(self.settings.compile, self.device, self.settings.derivatives)

    def work(self) -> Work:
        settings, device = self.settings, self.device
        use_tf32(bool(settings.tf32), device)
        side = settings.res or 32
        model, theta = student(settings.model, self.num_classes, side, self.word, self.batch)
        objective = settings.fill(
            TrajectoryObjective,
            model=model,
            store=RandomTrajectory(theta),
            sampler=settings.fill(SegmentSampler, experts=[0], sequential=settings.Sequential_Generation),
            augmentation=settings.augmentation(),
            batch_syn=self.batch,
            depth=settings.matched_span(model),
            truncated=settings.gradient == "truncated",
            replay=replay_on(device),
        )
        images = torch.randn(self.images, 3, side, side, device=device)
        labels = torch.randn(self.images, self.num_classes, device=device)
        lr, iterations = torch.tensor(settings.lr_teacher, device=device), itertools.count()

        def run(steps: int) -> object:
            return objective.gradients(next(iterations), images, labels, lr)

        return Work(run=run, steps=settings.syn_steps, timed=(settings.syn_steps,), profiled=0)

    def unit(self) -> Unit:
        settings = self.settings
        graphs = ("grad", "hvp") if self.word == "on" else ()
        return Unit(
            row=(self.name, self.images, self.batch, settings.syn_steps, self.word),
            measure=lambda: measure(self.work, self.device, 1),
            graphs=frozenset((graph, settings.dataset, settings.model, self.batch) for graph in graphs),
            rank=int(self.name not in OTHERS),
        )


def cells(compile: str, device: torch.device, tiny: bool) -> list[Unit]:
    """The twelve published settings, those first of which others have published figures: their second iteration."""
    paths = sorted((ROOT / "configs").glob("*/ConvIN/IPC*.yaml"))
    return [Cell.read(path, compile, device, tiny).unit() for path in paths]


def cell_table(rows: list[dict]) -> str:
    """Beside the figures of others: seconds an iteration, GB."""
    lines = []
    for row in rows:
        name, images, batch, steps, word = row["row"]
        lines.append(
            {
                "settings": name,
                "images": images,
                "a step": batch,
                "steps": steps,
                "way": WAYS[word],
                "s": row.get("s"),
                "peak GB": row["peak"] / 1e9 if "peak" in row else None,
                **{system: OTHERS.get(name, {}).get(system) for system in SYSTEMS},
                "note": "; ".join(row["notes"]) or None,
            }
        )
    return result_table(lines, list(lines[0]))


# ---- the command


def commit() -> str | None:
    """Of the checkout, with a mark where files differ from it; None where there is no git."""
    try:
        command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
        return subprocess.check_output(command, stderr=subprocess.DEVNULL, text=True).strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def main(command_line: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=240, help="seconds to keep within (default 240)")
    parser.add_argument("--rounds", type=int, default=3, help="timed calls (default 3)")
    parser.add_argument("--out", type=Path, help="JSON file of what was found, written after each row")
    parser.add_argument("--cells", action="store_true", help="the published settings, two iterations each")
    parser.add_argument("--compile", default="auto", choices=("auto", *WAYS), help="how cells compute derivatives")
    parser.add_argument("--tiny", action="store_true", help="the smallest sizes, to see that it runs")
    parser.add_argument("--first", help=argparse.SUPPRESS)
    args = parser.parse_args(command_line)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes = TINY if args.tiny else Sizes()
    if args.first:
        use_tf32(True, device)
        print(first_iteration(args.first, sizes, device))
        return 0
    if device.type == "cpu" and not args.tiny:
        parser.error("there is no CUDA device; --tiny shows on a CPU that it runs")
    if args.rounds < 1:
        parser.error(f"--rounds: {args.rounds} is not at least 1")
    card = torch.cuda.get_device_name() if device.type == "cuda" else None
    about = {"card": card, "machine": describe_machine(), "torch": torch.__version__, "commit": commit()}

    def save(rows: list[dict]) -> None:
        if args.out:
            write_text(args.out, json.dumps({**about, "budget": args.budget, "rows": rows}, indent=1))

    if args.out and args.out.exists():
        parser.error(f"--out: {args.out} is there already; name another file")
    try:
        save([])
    except OSError as error:
        parser.error(f"--out: nothing can be written to {args.out}: {error.strerror}")
    print(f"{card or 'no card'}; commit {about['commit'] or 'not known'}; {about['machine']}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        before = os.environ.copy()
        os.environ.update(cache_in(Path(folder)))  # what fresh processes have compiled need not be compiled again
        try:
            if args.cells:
                units = cells("off" if args.tiny else args.compile, device, args.tiny)
            else:
                units = plan(sizes, device, args.rounds, Path(folder))
            rows = work_off(units, args.budget, save)
        finally:
            os.environ.clear()
            os.environ.update(before)
    save(rows)
    print((cell_table if args.cells else table)(rows))
    return int(any(row.get("failed") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
