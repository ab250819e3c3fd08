#!/usr/bin/env python
"""What a training step reads: two random rows of the trajectory store against loading a published file.

    .venv/bin/python scripts/benchmarks/store.py --folder /somewhere    # 3.9 GB on disk for a minute or two

Experts of 101 epochs of ConvNet's 320,010 parameters (129 MB each). The published form holds ten of them in one
replay_buffer_<k>.pt of 1.3 GB, which published codes load whole to use two rows of it. How many experts lie in a
store makes no difference to reading two rows, each being a file of its own, and little to opening it, which
reads their headers; --experts 100 shows it where there is room. All files are in the page cache. Expect milliseconds.
"""

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

from common import CLASSES, arguments, describe_machine

import torch

from pad.nn.flat import FlatModel
from pad.nn.networks import build
from pad.peak import forget_peak, memory_status
from pad.rng import generator
from pad.show.tables import result_table
from pad.store.trajectories import TrajectoryStore, describe, write_expert

PUBLISHED = 10  # experts a file


def write_store(folder: Path, experts: int, epochs: int, model: FlatModel) -> None:
    """Expert files of random numbers."""
    description = describe({"dataset": "random"}, "benchmark", zip(model.names, model.shapes), {"kind": "none"})
    for expert in range(experts):
        rng = generator(0, "benchmark", expert)
        with write_expert(folder, expert, description, epochs=epochs, seed=0, settings={}) as record:
            for _ in range(epochs + 1):
                record(torch.randn(model.num_parameters, generator=rng))


def write_published(path: Path, store: TrajectoryStore, experts: int, model: FlatModel) -> None:
    """The first ``experts`` as one replay_buffer file: a list of experts of epochs of parameter tensors."""
    torch.save(
        [
            [
                [part.clone() for part in model.unflatten(row).values()]
                for row in store.rows(expert, range(store.epochs(expert) + 1))
            ]
            for expert in store.experts[:experts]
        ],
        path,
    )


def two_of(buffer: list, expert: int, epoch: int) -> torch.Tensor:
    """An epoch and the next but one of a loaded replay_buffer, flat ``[2, P]``."""
    return torch.stack([torch.cat([part.flatten() for part in buffer[expert][at]]) for at in (epoch, epoch + 2)])


def timed(action, repeats: int) -> tuple[float, float, float, list]:
    """Median, least and most seconds, results; ``action(i)`` runs once more before, as a warm-up."""
    action(0)
    times, results = [], []
    for i in range(repeats):
        began = time.perf_counter()
        results.append(action(i))
        times.append(time.perf_counter() - began)
    return statistics.median(times), min(times), max(times), results


def compare(folder: Path, args: argparse.Namespace, model: FlatModel) -> tuple[list[dict], float]:
    """The rows of the table, and the largest difference between what the two forms gave."""
    write_store(folder, args.experts, args.epochs, model)
    published, inside = folder / "published.pt", min(PUBLISHED, args.experts)
    write_published(published, TrajectoryStore.open(folder), inside, model)
    store = TrajectoryStore.open(folder)
    rng = generator(0, "benchmark", "draws")
    draws = [
        (int(torch.randint(inside, (), generator=rng)), int(torch.randint(args.epochs - 1, (), generator=rng)))
        for _ in range(args.draws)
    ]

    def load(i: int, mmap: bool) -> torch.Tensor:
        # With weights_only=True, which runs no code from the file, loading takes longer still.
        return two_of(torch.load(published, mmap=mmap, weights_only=False), *draws[i])

    actions = {
        "open the store": (lambda i: len(TrajectoryStore.open(folder)), args.rounds),
        "ours: two rows": (lambda i: store.rows(draws[i][0], [draws[i][1], draws[i][1] + 2]), args.draws),
        "published: load the file": (lambda i: load(i, mmap=False), args.rounds),
        "published: map the file": (lambda i: load(i, mmap=True), args.rounds),
    }
    rows, results = [], {}
    for name, (action, repeats) in actions.items():
        forget_peak()
        idle = memory_status("VmRSS")
        median, least, most, results[name] = timed(action, repeats)
        peak = memory_status("VmHWM") - idle
        spread = f"{1e3 * least:.3g} - {1e3 * most:.3g}"
        rows.append({"": name, "median ms": 1e3 * median, "from - to": spread, "peak MB": peak / 1e6})
    ours = results["ours: two rows"]
    for row in rows:
        row["times slower than two rows"] = row["median ms"] / rows[1]["median ms"]
    others = (results[name] for name in list(actions)[2:])
    return rows, max((a - b).abs().max().item() for other in others for a, b in zip(ours, other))


def main(command_line: list[str] | None = None) -> None:
    parser = arguments(__doc__)
    parser.add_argument(
        "--folder", help="where there is room, for a folder that is removed again (default: temporary files')"
    )
    parser.add_argument("--experts", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--draws", type=int, default=50, help="random draws of two rows")
    parser.add_argument("--network", default="ConvNet")
    args = parser.parse_args(command_line)
    if args.tiny:
        args.experts, args.epochs, args.draws, args.rounds, args.network = 3, 4, 5, 2, "ConvNetD1W8"
    args.draws = max(args.draws, args.rounds)
    model = FlatModel(build(args.network, 3, CLASSES, (32, 32), 0))
    expert = 4 * (args.epochs + 1) * model.num_parameters
    print(describe_machine())
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="store-benchmark-") as folder:
        room, inside = int(0.8 * shutil.disk_usage(folder).free / expert), min(PUBLISHED, args.experts)
        if room < 2 * inside:
            sys.exit(f"error: {folder} has room for {room} experts of {expert / 1e6:.0f} MB; give a --folder with more")
        args.experts = min(args.experts, room - inside)
        size = args.experts * expert / 1e9
        print(f"{args.experts} experts, {size:.3g} GB; the published file holds {inside}", flush=True)
        rows, off = compare(Path(folder), args, model)
    print(result_table(rows, list(rows[0])))
    print(f"largest difference of what the forms gave: {off:g}")


if __name__ == "__main__":
    main()
