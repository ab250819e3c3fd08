"""What the benchmarks share: competitors that run in turn, tables, the machine, its matrix-product rate, peak memory.

Every time is a median over rounds. In a round all competitors run once, one after the other, so that a machine that
slows down slows all of them. The first call of each is a warm-up, reported on its own: it compiles where there is
something to compile.
"""

import argparse
import ctypes
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs from a checkout, from any working directory

import pad  # noqa: F401  before torch, which then reads how threads are to wait

# isort: split
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pad.allocator import keep_freed_memory
from pad.data.augment import DSA
from pad.matching.unroll import Step, inner_steps
from pad.nn.flat import FlatModel
from pad.nn.networks import build
from pad.rng import generator
from pad.show.tables import result_table

CLASSES = 10


# ---- the C library's memory


class DefaultMalloc:
    """glibc's malloc as it is without :func:`pad.allocator.keep_freed_memory`, within a process that uses that.

    By default malloc maps large blocks afresh and unmaps them when freed. From which size on, it adapts to what is
    freed, up to 32 MiB (and keeps twice that at the top of the heap): with tensors of these sizes it comes near that,
    which is also the setting kindest to the program. These limits alone would not do: memory that others freed and kept
    would be handed out without a page fault, so the holes that are large enough are taken away until the block ends.
    """

    _PARAMETERS = {-4: 65536, -3: 2**25, -1: 2**26}  # M_MMAP_MAX, M_MMAP_THRESHOLD, M_TRIM_THRESHOLD of <malloc.h>

    def __enter__(self) -> None:
        self.holes: list[int] = []
        if platform.libc_ver()[0] != "glibc":
            return
        self.libc = ctypes.CDLL(None)
        self.libc.malloc.restype, self.libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
        self.libc.free.argtypes = [ctypes.c_void_p]
        for parameter, value in self._PARAMETERS.items():
            self.libc.mallopt(parameter, value)
        while True:
            block = self.libc.malloc(2**25)
            if ctypes.c_size_t.from_address(block - ctypes.sizeof(ctypes.c_size_t)).value & 2:  # a mapping of its own
                self.libc.free(block)
                return
            self.holes.append(block)

    def __exit__(self, *_) -> None:
        keep_freed_memory()  # first, or freeing the holes would return them to the kernel
        for block in self.holes:
            self.libc.free(block)


# ---- competitors


@dataclass
class Competitor:
    """Something to be timed.

    ``run()`` returns what is compared; ``ours`` says whether it has our allocator settings; ``warm_up``, a shorter run,
    takes the place of the first call where a call takes minutes.
    """

    name: str
    run: Callable[[], object]
    ours: bool = True
    warm_up: Callable[[], object] | None = None
    first: float = 0.0  # seconds of the first call
    times: list[float] = field(default_factory=list)
    faults: list[int] = field(default_factory=list)  # pages that the kernel had to provide, per call
    result: object = None  # of the last call

    @property
    def median(self) -> float:
        return statistics.median(self.times)

    @property
    def set_up(self) -> float:
        """Seconds of the first call beyond a usual one."""
        return self.first if self.warm_up else max(0.0, self.first - self.median)

    def turn(self) -> None:
        """Run once and note the time."""
        keep_freed_memory()
        if self.ours:
            self._turn()
        else:
            with DefaultMalloc():
                self._turn()

    def _turn(self) -> None:
        before, began = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.perf_counter()
        self.result = self.run() if self.first else (self.warm_up or self.run)()
        seconds = time.perf_counter() - began
        if not self.first:
            self.first = seconds
        else:
            self.times.append(seconds)
            self.faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)


def race(competitors: list[Competitor], rounds: int) -> list[Competitor]:
    """Let each warm up, then let all run in turn ``rounds`` times."""
    for number in range(rounds + 1):
        for competitor in competitors:
            competitor.turn()
        if sys.stderr.isatty():
            print(f"\rround {number} of {rounds}", end="\n" if number == rounds else "", file=sys.stderr, flush=True)
    return competitors


def standings(competitors: list[Competitor], **columns: Callable[[Competitor], object]) -> str:
    """The table of a race: medians, how many times faster than the first competitor, and further columns.

    Set-up is what the first call took beyond a median one; page faults are memory that the kernel had to clear.
    """
    rows = [
        {
            "": c.name,
            "median s": c.median,
            "from - to": f"{min(c.times):.3g} - {max(c.times):.3g}",
            "times faster": competitors[0].median / c.median,
            "set-up s": c.set_up,
            "page faults": int(statistics.median(c.faults)),
            **{name: column(c) for name, column in columns.items()},
        }
        for c in competitors
    ]
    return result_table(rows, list(rows[0]))


def difference(a: Tensor, b: Tensor) -> float:
    """||a - b|| / ||b||, in float64."""
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


# ---- the machine


def describe_machine() -> str:
    """Processor, cores, memory, versions, threads: what a figure depends on."""
    models = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    memory = [
        f"{int(line.split()[1]) / 2**20:.0f} GiB" for line in _lines("/proc/meminfo") if line.startswith("MemTotal")
    ]
    machine = ", ".join([*(models or [platform.machine()])[:1], f"{os.cpu_count()} cores", *memory])
    software = f"{platform.platform()}; Python {platform.python_version()}, torch {torch.__version__}"
    return f"{machine}; {software}, {torch.get_num_threads()} threads"


def product_rate(side: int = 2048, repeats: int = 7) -> float:
    """Operations per second of float32 products of two matrices of ``side`` x ``side``, median."""
    a, b = torch.randn(side, side), torch.randn(side, side)
    product = Competitor("", lambda: torch.mm(a, b))
    for _ in range(repeats + 1):
        product.turn()
    return 2 * side**3 / product.median


def forward_operations(model: FlatModel, x: Tensor) -> int:
    """Multiplications and additions of the convolutions and matrix products of one forward pass, from the shapes."""
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(model.num_parameters, device="meta"), x.to("meta"))
    return counter.get_total_flops()


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if os.path.exists(path) else []


def available_memory() -> int:
    """Bytes that can be had without swapping."""
    return 1024 * next(int(line.split()[1]) for line in _lines("/proc/meminfo") if line.startswith("MemAvailable"))


# ---- problems


def plain_convnet(depth: int, width: int, channels: int, side: int, like: nn.Module) -> nn.Module:
    """The published ConvNet of torch's own layers, as other codes have it, with the numbers of our network ``like``."""
    layers, before = [], channels
    for _ in range(depth):
        layers += [nn.Conv2d(before, width, 3, padding=1), nn.GroupNorm(width, width), nn.ReLU(), nn.AvgPool2d(2)]
        before, side = width, side // 2
    plain = nn.Sequential(*layers, nn.Flatten(), nn.Linear(width * side * side, CLASSES))
    with torch.no_grad():
        for target, source in zip(plain.parameters(), like.parameters(), strict=True):
            target.copy_(source)
    return plain


class Matching:
    """One outer iteration of trajectory matching on random numbers: networks, a segment, a synthetic set, its steps."""

    def __init__(
        self,
        *,
        depth: int,
        width: int,
        n: int,
        batch: int,
        count: int,
        side: int = 32,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        rng = generator(0, "benchmark")
        network = build(f"ConvNetD{depth}W{width}", 3, CLASSES, (side, side), 0)
        self.model, self.network = FlatModel(network), network
        self.plain = plain_convnet(depth, width, 3, side, network).to(device, dtype)
        self.start = self.model.flatten(network).to(device, dtype)
        self.target = self.start + 0.005 * torch.randn(len(self.start), generator=rng).to(device, dtype)
        self.images = torch.randn(n, 3, side, side, generator=rng).to(device, dtype)
        self.labels = torch.randn(n, CLASSES, generator=rng).to(device, dtype)
        self.lr = torch.tensor(0.01, dtype=dtype, device=device)
        self.data = self.images, self.labels, self.lr
        self.steps: list[Step] = inner_steps(n, batch, count, DSA(), rng)


def arguments(doc: str) -> argparse.ArgumentParser:
    """A parser with the options of every benchmark of times."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="timed calls of each competitor (default 5)")
    parser.add_argument("--tiny", action="store_true", help="the smallest sizes, to see that it runs")
    return parser


def matching_arguments(doc: str) -> argparse.ArgumentParser:
    """The same, and the sizes of an iteration of matching."""
    parser = arguments(doc)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--depth", type=int, default=3)
    parser.add_argument("--side", type=int, default=32, help="pixels")
    parser.add_argument("--images", type=int, default=100, help="synthetic images, all of them in every step")
    return parser
