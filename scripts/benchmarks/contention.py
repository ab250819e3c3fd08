#!/usr/bin/env python
"""What other processes on the same cores cost: derivatives by the CPU kernels, alone and beside busy processes.

    .venv/bin/python scripts/benchmarks/contention.py                               # five minutes on two cores
    .venv/bin/python scripts/benchmarks/contention.py --spins 0 100 10000 100000    # other ways to wait, too

Gradients and Hessian passes of ConvNetW32 on 100 images 3 x 32 x 32. Each figure is a median over processes of their
own, which take turns. "OpenMP's way" is GNU's default: a thread that waits for others looks 300,000 times before it
sleeps. "ours" is what importing ``pad`` sets. The busy processes only count, one for each thread of ours: a fair share
of the cores is then half of them, and twice the time. The last column has the time in fair ones: those of the fastest
way alone, made longer by the share. Expect ours near 1 alone, and below 1.3 beside busy processes.
"""

import argparse
import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator

from common import Matching, arguments, describe_machine  # before torch: it has pad set how threads wait

import torch

from pad.allocator import HOW_THREADS_WAIT
from pad.nn.flat import FlatModel
from pad.show.tables import result_table

# Ends by itself when the process that started it has gone.
BUSY = "import os\nparent = os.getppid()\nwhile os.getppid() == parent:\n    for _ in range(10**6): pass"


def work(case: dict) -> dict[str, tuple[float, float]]:
    """Milliseconds of a call of each operation, by the clock and of the CPU, in this process."""
    problem = Matching(**case["problem"])
    model, theta, images = FlatModel(problem.network, "fused"), problem.start, problem.images
    p, lam = problem.labels.softmax(dim=1), problem.target - problem.start
    operations = {
        "gradient": lambda: model.grad(theta, images, p),
        "Hessian pass": lambda: model.hvp(theta, images, p, lam),
    }
    found = {}
    for name, run in operations.items():
        run()
        before = time.perf_counter(), time.process_time()
        for _ in range(case["calls"]):
            run()
        clock, cpu = time.perf_counter() - before[0], time.process_time() - before[1]
        found[name] = 1e3 * clock / case["calls"], 1e3 * cpu / case["calls"]
    return found


def in_child(case: dict, waiting: dict[str, str]) -> dict[str, tuple[float, float]]:
    """:func:`work` in a process of its own whose environment says how threads wait; with nothing said it is our way."""
    environment = {name: value for name, value in os.environ.items() if name not in HOW_THREADS_WAIT} | waiting
    return json.loads(subprocess.check_output([sys.executable, __file__, "--case", json.dumps(case)], env=environment))


@contextlib.contextmanager
def beside(count: int) -> Iterator[list[subprocess.Popen]]:
    """With so many processes that never sleep."""
    processes = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(count)]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def main(command_line: list[str] | None = None) -> None:
    parser = arguments(__doc__)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--calls", type=int, default=20, help="gradients, and Hessian passes, of each process")
    parser.add_argument("--spins", type=int, nargs="+", default=[], help="how often to look before a thread sleeps")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.set_defaults(rounds=3)
    args = parser.parse_args(command_line)
    if args.case:
        print(json.dumps(work(json.loads(args.case))))
        return
    case = {"problem": {"depth": 3, "width": args.width, "n": 100, "batch": 100, "count": 1}, "calls": args.calls}
    if args.tiny:
        case = {"problem": {"depth": 1, "width": 8, "n": 10, "batch": 10, "count": 1, "side": 8}, "calls": 2}
        args.rounds = 1
    ways = {"OpenMP's way": {"GOMP_SPINCOUNT": "300000"}, "ours": {}}
    ways |= {f"{spins} looks": {"GOMP_SPINCOUNT": str(spins)} for spins in args.spins}
    threads, cores = torch.get_num_threads(), len(os.sched_getaffinity(0))
    loads = {"nothing": 0, f"{threads} busy process{'es' if threads > 1 else ''}": threads}
    print(describe_machine(), flush=True)
    runs: dict[tuple[str, str], list] = {key: [] for key in itertools.product(loads, ways)}
    for _ in range(args.rounds):
        for load, count in loads.items():
            with beside(count):
                for way, waiting in ways.items():
                    runs[load, way].append(in_child(case, waiting))
    rows = []
    for operation in ("gradient", "Hessian pass"):
        medians = {
            key: [statistics.median(times) for times in zip(*(run[operation] for run in found))]
            for key, found in runs.items()
        }
        alone = min(medians["nothing", way][0] for way in ways)
        for (load, way), (clock, cpu) in medians.items():
            fair = alone * max(1, (threads + loads[load]) / cores)
            rows.append({"": operation, "beside": load, "waiting": way, "median ms": clock, "of the CPU ms": cpu})
            rows[-1]["times the fair share"] = clock / fair
    print(result_table(rows, list(rows[0])))


if __name__ == "__main__":
    main()
