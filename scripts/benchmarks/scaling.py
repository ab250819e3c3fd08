#!/usr/bin/env python
"""How time and peak memory of one iteration of trajectory matching grow with steps, images and width (ours; Linux).

    .venv/bin/python scripts/benchmarks/scaling.py               # some minutes on two cores
    .venv/bin/python scripts/benchmarks/scaling.py --compile on  # and a minute more for each new width and batch size

From ConvNetW32, 100 synthetic images, all of them in each of 10 steps: one thing changes at a time. The images per
class (of 10 classes) change at batches of 10. Memory is measured uncompiled, each case in a process of its own: see
memory.py. Expect time in proportion to the steps, with memory growing by one parameter vector a step; neither to depend
on the images per class; and both to grow with the width, time faster than memory.
"""

import functools

from common import CLASSES, Competitor, Matching, arguments, describe_machine, race

from matching import adjoint
from memory import in_child

from pad.nn.flat import FlatModel
from pad.nn.networks import build
from pad.show.tables import result_table


@functools.cache
def flat_model(depth: int, width: int, side: int, batch: int, compile: str) -> FlatModel:
    """One for all cases that run the same compiled code; the batch is an argument because each size is a graph."""
    return FlatModel(build(f"ConvNetD{depth}W{width}", 3, CLASSES, (side, side), 0), compile)


def iteration(case: dict, compile: str) -> Competitor:
    """One case of :class:`common.Matching`, to be timed."""
    problem = Matching(**case)
    model = flat_model(*(case[key] for key in ("depth", "width", "side", "batch")), compile)
    rest = (problem.start, problem.target, problem.data, problem.steps)
    return Competitor("", lambda: adjoint(model, *rest))


def main(command_line: list[str] | None = None) -> None:
    parser = arguments(__doc__)
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 20, 40, 80])
    parser.add_argument("--ipc", type=int, nargs="+", default=[1, 10, 50])
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 64, 128])
    parser.add_argument(
        "--compile", default="fused", choices=("off", "on", "fused"), help="how derivatives are computed"
    )
    parser.set_defaults(rounds=3)
    args = parser.parse_args(command_line)
    base = {"depth": 3, "width": 32, "n": 100, "batch": 100, "count": 10, "side": 32}
    if args.tiny:
        base = {"depth": 1, "width": 8, "n": 10, "batch": 10, "count": 2, "side": 8}
        args.steps, args.ipc, args.widths, args.rounds = [1, 2], [1], [8], 1
    cases = [("syn_steps", count, base | {"count": count}) for count in args.steps]
    cases += [("ipc", ipc, base | {"n": 10 * ipc, "batch": 10}) for ipc in args.ipc]
    cases += [("width", width, base | {"width": width}) for width in args.widths]
    print(describe_machine(), flush=True)
    entries = race([iteration(case, args.compile) for _, _, case in cases], args.rounds)
    rows = []
    for (what, value, case), entry in zip(cases, entries):
        row = {"changed": what, "to": value, "median s": entry.median, "set-up s": entry.set_up}
        rows.append(row | {"peak MB": in_child("adjoint", **case) / 1e6})
    print(result_table(rows, list(rows[0])))


if __name__ == "__main__":
    main()
