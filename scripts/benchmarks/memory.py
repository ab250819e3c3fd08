#!/usr/bin/env python
"""Peak memory of one iteration of trajectory matching: the unrolled loop's graph against the adjoint (Linux).

    .venv/bin/python scripts/benchmarks/memory.py               # ConvNet width 128; some minutes on two cores
    .venv/bin/python scripts/benchmarks/memory.py --width 32

The iteration of matching.py, the adjoint by the CPU kernels. Every figure is from a process of its own: the most that
was resident during an iteration, less what is resident when the process waits for one (after a first, short iteration).
Freed memory returns to the kernel at once, so a peak is what the iteration needs; "kept" is the adjoint as our programs
run it, which keep what is freed for the next tensor; "micro" is it in micro-batches of a quarter of the images. A
figure with ~ did not fit and goes on from the two before it in a straight line. Expect the unrolled loop to grow by the
same amount with every step, and the adjoint by one parameter vector (what these take is in the last column).
"""

import argparse
import json
import os
import subprocess
import sys

from common import Matching, available_memory, describe_machine, matching_arguments

from matching import adjoint, unrolled

from pad.allocator import keep_freed_memory
from pad.nn.flat import FlatModel
from pad.peak import forget_peak, memory_status
from pad.show.tables import result_table

KINDS = ("unrolled", "adjoint", "kept", "micro")


def measure(case: dict) -> int:
    """Peak bytes of an iteration above the waiting process, in this process."""
    problem, kind = Matching(**case["problem"]), case["kind"]
    if kind == "kept":
        keep_freed_memory()
    quarter = -(-len(problem.images) // 4)
    model = FlatModel(problem.network, "fused", quarter if kind == "micro" else None)

    def iterate(count: int) -> None:
        rest = (problem.start, problem.target, problem.data, problem.steps[:count])
        unrolled(problem.plain, *rest) if kind == "unrolled" else adjoint(model, *rest)

    iterate(1)
    forget_peak()
    idle = memory_status("VmRSS")
    iterate(len(problem.steps))
    return memory_status("VmHWM") - idle


def in_child(kind: str, **problem) -> int:
    """:func:`measure` in a process of its own."""
    environment = os.environ | {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "1000000"}
    command = [sys.executable, __file__, "--case", json.dumps({"kind": kind, "problem": problem})]
    return int(subprocess.check_output(command, env=environment))


def straight_on(known: list[tuple[int, int]], count: int) -> float:
    """The value at ``count`` steps on the line through the last two known ones (from zero, when one is known)."""
    (x0, y0), (x1, y1) = ([(0, 0)] + known)[-2:]
    return y1 + (y1 - y0) * (count - x1) / (x1 - x0)


def main(command_line: list[str] | None = None) -> None:
    parser = matching_arguments(__doc__)
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 20, 40, 80])
    parser.add_argument(
        "--kinds", nargs="+", default=KINDS, choices=KINDS, help="which to measure; the first two always are"
    )
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args(command_line)
    if args.case:
        print(measure(json.loads(args.case)))
        return
    if args.tiny:
        args.width, args.depth, args.side, args.images, args.steps = 8, 1, 8, 10, [2, 4]
    print(describe_machine(), flush=True)
    problem = {"depth": args.depth, "width": args.width, "n": args.images, "batch": args.images, "side": args.side}
    vector = 4 * Matching(**problem, count=1).model.num_parameters
    rows, known = [], []
    for count in sorted(args.steps):
        fits = not known or straight_on(known, count) < 0.8 * available_memory()
        kinds = [kind for kind in KINDS if kind in (*KINDS[:2], *args.kinds) and (kind != "unrolled" or fits)]
        peaks = {kind: in_child(kind, **problem, count=count) for kind in kinds}
        if fits:
            known.append((count, peaks["unrolled"]))
        graph = peaks.get("unrolled") or straight_on(known, count)
        rows.append(
            {
                "steps": count,
                "unrolled MB": f"{'' if fits else '~'}{graph / 1e6:.1f}",
                "adjoint MB": peaks["adjoint"] / 1e6,
                **{f"{kind} MB": peaks[kind] / 1e6 for kind in kinds if kind in KINDS[2:]},
                "unrolled / adjoint": f"{'' if fits else '~'}{graph / max(peaks['adjoint'], 1):.1f}",
                "stored parameter vectors MB": (count + 1) * vector / 1e6,
            }
        )
        print(f"{count} steps done", flush=True)
    print(result_table(rows, list(rows[0])))


if __name__ == "__main__":
    main()
