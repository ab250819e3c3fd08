#!/usr/bin/env python
"""One iteration of trajectory matching on one process and shared by two (gloo, by torchrun): result and time.

    .venv/bin/python scripts/benchmarks/distributed.py

The iteration of matching.py, uncompiled. The ranks share every mini-batch and add up g and h_theta. Cores are divided
among the processes, so that on one machine two have no more to work with than one: this shows that the result is the
same, in float32 and in float64, and what sharing costs; time is saved by ranks that have a device each.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from common import Competitor, Matching, describe_machine, difference, matching_arguments, race

import torch

from pad import distributed
from pad.matching.loss import matching_loss
from pad.matching.unroll import unrolled_gradients
from pad.show.tables import result_table


def work(case: dict, rounds: int, out: str) -> None:
    """One rank's part: the iteration in float64, then timed in float32; rank 0 writes what came out."""
    ranks, found = distributed.join(), {}
    for dtype in (torch.float64, torch.float32):
        problem = Matching(**case, dtype=dtype)

        def iterate() -> list[torch.Tensor]:
            ranks.barrier()
            result = unrolled_gradients(
                problem.model,
                problem.start,
                problem.images,
                problem.labels,
                problem.lr,
                problem.steps,
                objective=lambda end: matching_loss(end, problem.start, problem.target),
                ranks=ranks,
            )
            return [result.loss, result.images, result.labels, result.lr]

        if dtype == torch.float64:
            found["float64"] = iterate()
        else:
            (competitor,) = race([Competitor("", iterate)], rounds)
            found |= {"float32": competitor.result, "seconds": competitor.median, "set-up": competitor.set_up}
    if ranks.is_main:
        torch.save(found, out)
    ranks.leave(0)


def run(ranks: int, case: dict, rounds: int) -> dict:
    """:func:`work` by so many processes."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.pt"
        program = [__file__, "--case", json.dumps(case), "--rounds", str(rounds), "--out", str(out)]
        subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", *program],
            env=os.environ | {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // ranks))},
            check=True,
        )
        return torch.load(out)


def main(command_line: list[str] | None = None) -> None:
    parser = matching_arguments(__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    args = parser.parse_args(command_line)
    if args.case:
        work(json.loads(args.case), args.rounds, args.out)
        return
    if args.tiny:
        args.width, args.depth, args.side, args.images, args.steps, args.rounds = 8, 1, 8, 10, 3, 1
    print(describe_machine(), flush=True)
    case = {"depth": args.depth, "width": args.width, "n": args.images, "batch": args.images, "count": args.steps}
    case["side"] = args.side
    results = [run(ranks, case, args.rounds) for ranks in args.ranks]
    rows = []
    for ranks, found in zip(args.ranks, results):
        row = {"ranks": ranks, "median s": found["seconds"], "set-up s": found["set-up"]}
        for precision in ("float32", "float64"):
            off = [difference(a, b) for a, b in zip(found[precision], results[0][precision])]
            row |= {f"{precision}: loss off by": off[0], f"{precision}: gradients off by": max(off[1:])}
        rows.append(row)
    print(result_table(rows, list(rows[0])))


if __name__ == "__main__":
    main()
