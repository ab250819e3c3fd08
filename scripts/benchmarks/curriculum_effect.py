#!/usr/bin/env python
"""What the curriculum does to experts and to what is distilled from them: the same pipeline with it and without.

    .venv/bin/python scripts/benchmarks/curriculum_effect.py --data_path FOLDER     # half an hour or more on two cores

FOLDER holds train/<class>/* and test/<class>/*, such as CIFAR-10 as pictures. For each seed and each curriculum: a
ranking, experts, one distilled set, and evaluation networks trained on it. The last column is what the curriculum adds
for the same seed, so that what seeds have in common drops out. Means over seeds with their standard errors; a
difference of less than two of them is none. All that is computed stays in --out, and a second call goes on from there.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

from common import describe_machine

from pad import cli
from pad.show.tables import result_table
from pad.store.trajectories import TrajectoryStore

# PAD's published curriculum for CIFAR-10 at 10 images per class, in a fifth of its epochs
CURRICULA = {
    "none": "--init_ratio 1 --add_end_epoch 0 --rm_epoch_first 1000 --rm_epoch_second 1000",
    "PAD's": "--init_ratio 0.75 --add_end_epoch 4 --rm_epoch_first 8 --rm_epoch_second 12 "
    "--rm_easy_ratio_first 0.1 --rm_easy_ratio_second 0.2",
}


def call(stage, line: str, **options) -> None:
    """Run a stage; a failure ends the script with the stage's exit code."""
    argv = line.split() + [word for name, value in options.items() for word in (f"--{name}", str(value))]
    if code := stage(argv):
        sys.exit(code)


def accuracies(args: argparse.Namespace, curriculum: str, seed: int) -> dict[str, float]:
    """Test accuracy, in %, of the last experts, and of networks trained on what is distilled from them."""
    own = Path(args.out).absolute() / f"seed{seed}" / ("none" if curriculum == "none" else "pad")
    rankings = own.parent / "rankings"
    common = {
        "dataset": args.dataset,
        "model": args.model,
        "zca": args.zca,
        "seed": seed,
        "buffer_path": own / "buffer",
    }
    common |= {"data_path": args.data_path} if args.data_path else {}
    part = {"train_per_class": args.images_per_class, "ranking_path": rankings}
    call(
        cli.buffer,
        f"{CURRICULA[curriculum]} --score_repeats 3 --score_epochs 10 --rho_max 0.01 --rho_min 0.01 --alpha 0.3",
        **common,
        **part,
        num_experts=args.experts,
        train_epochs=args.train_epochs,
        batch_train=args.batch,
        lr_teacher=0.05,
        eval_every=args.train_epochs,
    )
    (folder,) = {path.parent for path in (own / "buffer").rglob("expert_*.safetensors")}
    store = TrajectoryStore.open(folder)
    experts = [100 * store.figures(k)["test_accuracy"][-1].item() for k in store.experts]
    call(
        cli.distill,
        "--resume --Sequential_Generation False --skip_first_eva True --eval_it 1000000 --depth_ratio 0.25",
        **common,
        train_per_class=args.images_per_class,
        ipc=args.ipc,
        Iteration=args.iterations - 1,
        syn_steps=args.steps,
        expert_epochs=2,
        min_start_epoch=0,
        max_start_epoch=max(1, args.train_epochs - 6),
        lr_teacher=0.05,
        lr_img=args.lr_img,
        lr_y=5,
        lr_lr=0.0001,
        num_eval=1,
        epoch_eval_train=1,
        log_dir=own,
        name="set",
    )
    (run,) = own.glob("*/*/*/set")
    results = own / "evaluation.json"
    if not results.exists():
        line = "--baselines none" if curriculum != "none" else "--baselines hard,soft"
        call(
            cli.evaluate,
            line,
            synthetic=run,
            out=results,
            data_path=args.data_path,
            num_eval=args.networks,
            epoch_eval_train=args.epochs,
            seed=seed,
            buffer_path=own / "buffer",
        )
    rows = {row["set"]: 100 * row["mean"] for row in json.loads(results.read_text())["results"]}
    return {"experts": statistics.mean(experts), **rows}


def with_error(values: list[float]) -> str:
    """Mean and standard error."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):.2f} +- {error:.2f}"


def main(command_line: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="ImageFolder")
    parser.add_argument("--data_path")
    parser.add_argument("--out", default="runs/curriculum_effect")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--images_per_class", type=int, default=300)
    parser.add_argument("--model", default="ConvNetW32")
    parser.add_argument("--zca", default="True", choices=("True", "False"))
    parser.add_argument("--experts", type=int, default=3)
    parser.add_argument("--train_epochs", type=int, default=20)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--ipc", type=int, default=10)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--iterations", type=int, default=80)
    parser.add_argument("--lr_img", type=float, default=1000)
    parser.add_argument("--networks", type=int, default=3, help="evaluation networks for each set")
    parser.add_argument("--epochs", type=int, default=100, help="epochs of these")
    parser.add_argument("--tiny", action="store_true", help="the smallest sizes, to see that it runs")
    args = parser.parse_args(command_line)
    if args.tiny:
        args.dataset, args.images_per_class, args.model, args.zca, args.batch = (
            "FashionMNISTMini",
            40,
            "ConvNetD1W8",
            "False",
            20,
        )
        args.experts, args.train_epochs, args.iterations, args.steps, args.seeds = 1, 5, 2, 2, [0]
        args.networks, args.epochs, args.ipc = 1, 2, 1
    print(describe_machine(), flush=True)
    found = {name: [accuracies(args, name, seed) for seed in args.seeds] for name in CURRICULA}
    without, with_it = found["none"], found["PAD's"]
    rows = []
    for what in without[0]:
        row = {"accuracy %": what, "no curriculum": with_error([run[what] for run in without])}
        if what in with_it[0]:
            pairs = [after[what] - before[what] for before, after in zip(without, with_it)]
            row |= {"PAD's": with_error([run[what] for run in with_it]), "difference": with_error(pairs)}
        rows.append(row)
    print(
        f"\n{len(args.seeds)} seeds, {args.experts} experts of {args.train_epochs} epochs, "
        f"{args.networks} networks each"
    )
    print(result_table(rows, ["accuracy %", "no curriculum", "PAD's", "difference"]))


if __name__ == "__main__":
    main()
