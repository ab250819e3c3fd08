#!/usr/bin/env python
"""How far a difficulty ranking can be trusted: do other networks agree, and does it find wrong labels?

    .venv/bin/python scripts/benchmarks/ranking_quality.py --data_path FOLDER              # an hour on two cores
    .venv/bin/python scripts/benchmarks/ranking_quality.py --dataset CIFAR10 --data_path FOLDER --epochs 5 20

Agreement: GraNd by r networks, and by r others that share nothing with them but the images; Spearman's correlation
within each class, mean over classes. 1 is the same ranking, 0 is chance. Rankings after several numbers of epochs are
taken from one training, since its learning rate is constant.

Wrong labels: a share of the images, drawn at random, gets another label, also drawn at random, before networks are
trained. Given are the shares of these images that come in the hardest tenth of the class they are said to be of.
Chance is 10 %; with 5 % of wrong labels, 100 % is possible.
"""

import argparse
import dataclasses
import sys
import time

from common import describe_machine

import torch
from scipy.stats import spearmanr
from torch import Tensor

from pad.data.images import ImageData
from pad.data.preprocessing import fit_preprocessing
from pad.data.sources import load_data
from pad.difficulty.evidence import collect_evidence
from pad.difficulty.methods import RankingSource, compute_rankings
from pad.difficulty.scores import grand
from pad.difficulty.training import ScoringSettings, ScoringTraining
from pad.rng import generator
from pad.show.tables import result_table

METHODS = ("GraNd", "EL2N", "Forgetting")


def grand_after(
    images: Tensor, data: ImageData, settings: ScoringSettings, seed: int, repeat: int, epochs: list[int]
) -> dict[int, Tensor]:
    """GraNd ``[N]`` by one network after each number of ``epochs``, from one training."""
    found = {}
    task = ScoringTraining(images, data.train_labels, data.num_classes, settings, seed)
    for done, network in enumerate(task.epochs(repeat)):
        if done in epochs:
            evidence = collect_evidence(network, images, data.train_labels)
            found[done] = grand(evidence.logits, evidence.features, data.train_labels)
    return found


def agreement(a: Tensor, b: Tensor, labels: Tensor) -> float:
    """Spearman's correlation of scores ``[N]`` within each class, mean over classes."""
    classes = [labels == c for c in labels.unique()]
    return sum(spearmanr(a[c], b[c]).statistic for c in classes) / len(classes)


def agreements(scores: list[dict], labels: Tensor, repeats: list[int]) -> list[dict]:
    """A row for each number of epochs: how far r of the networks agree with r others, for each r of ``repeats``."""
    half = len(scores) // 2
    rows = []
    for epochs in scores[0]:
        row = {"epochs": epochs}
        for r in repeats:
            a, b = (sum(found[epochs] for found in part[:r]) for part in (scores[:half], scores[half:]))
            row[f"{r} network{'s' * (r > 1)}"] = f"{agreement(a, b, labels):.3f}"
        rows.append(row)
    return rows


def with_wrong_labels(data: ImageData, share: float, seed: int) -> tuple[ImageData, Tensor]:
    """The data with another label for a ``share`` of its training images, and their indices."""
    rng = generator(seed, "wrong labels")
    count = round(share * len(data.train_labels))
    chosen = torch.randperm(len(data.train_labels), generator=rng)[:count]
    labels = data.train_labels.clone()
    labels[chosen] += torch.randint(1, data.num_classes, (count,), generator=rng)
    return dataclasses.replace(data, train_labels=labels % data.num_classes), chosen


def share_in_hardest_tenth(rows: list[Tensor], chosen: Tensor) -> float:
    """Share of the images ``chosen`` that are in the last tenth of their class."""
    hardest = torch.cat([row[len(row) - len(row) // 10 :] for row in rows])
    return torch.isin(chosen, hardest).double().mean().item()


def main(command_line: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="ImageFolder")
    parser.add_argument("--data_path", help="folder of the data set")
    parser.add_argument("--images_per_class", type=int, default=500)
    parser.add_argument("--model", default="ConvNetW32")
    parser.add_argument("--epochs", type=int, nargs="+", default=[2, 5, 10, 20, 40])
    parser.add_argument("--repeats", type=int, nargs="+", default=[1, 2, 5], help="networks in each of the two sets")
    parser.add_argument("--wrong", type=float, default=0.05, help="share of wrong labels (default 0.05)")
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--zca", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tiny", action="store_true", help="the smallest sizes, to see that it runs")
    args = parser.parse_args(command_line)
    if args.tiny:
        args.dataset, args.images_per_class, args.model, args.batch = "FashionMNISTMini", 20, "ConvNetD1W8", 50
        args.epochs, args.repeats = [1, 3], [1, 2]
    args.epochs.sort()
    print(describe_machine(), flush=True)
    data = load_data(args.dataset, args.data_path).first_per_class(args.images_per_class)
    preprocessing = fit_preprocessing(data, args.zca)
    images = preprocessing.apply(data.train_images)
    settings = ScoringSettings(
        args.model, repeats=max(args.repeats), epochs=max(args.epochs), lr=args.lr, batch=args.batch
    )
    print(f"{len(images)} images of {data.name}, {args.model}\n")

    began = time.perf_counter()
    scores = []
    for repeat in range(2 * max(args.repeats)):
        scores.append(grand_after(images, data, settings, args.seed, repeat, args.epochs))
        print(f"network {repeat + 1} of {2 * max(args.repeats)}", file=sys.stderr, flush=True)
    rows = agreements(scores, data.train_labels, args.repeats)
    print(f"agreement of GraNd by so many networks with as many others ({time.perf_counter() - began:.0f} s)")
    print(result_table(rows, list(rows[0])), flush=True)

    began = time.perf_counter()
    rows = []
    wrong, chosen = with_wrong_labels(data, args.wrong, args.seed)
    for epochs in args.epochs:
        source = RankingSource(
            data=wrong,
            images=images,
            labels=wrong.train_labels,
            preprocessing=preprocessing.identity,
            scoring=dataclasses.replace(settings, epochs=epochs),
            seed=args.seed,
        )
        found = compute_rankings(METHODS, source)
        shares = {name: f"{100 * share_in_hardest_tenth(ranking.rows, chosen):.1f}" for name, ranking in found.items()}
        rows.append({"epochs": epochs, **shares})
    title = (
        f"% of {len(chosen)} wrongly labelled images in the hardest tenth of their class, {settings.repeats} networks"
    )
    print(f"\n{title}, chance 10 ({time.perf_counter() - began:.0f} s)")
    print(result_table(rows, list(rows[0])))


if __name__ == "__main__":
    main()
