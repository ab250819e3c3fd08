"""Stage 3: score a synthetic set, and real images of the same number, on fresh networks."""

import json
import logging
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from pad import evaluation, networks
from pad.config import EvaluationSettings
from pad.distributed import ALONE, Ranks
from pad.errors import InputError
from pad.files import write_text
from pad.initialisation import Experts, class_order, initial_set
from pad.stages.workbench import Workbench, check_writable, evaluation_protocol, experts_folder, set_up
from pad.synthetic import SyntheticSet
from pad.tracking import result_table

log = logging.getLogger("pad")


def evaluate(settings: EvaluationSettings, given: set[str], ranks: Ranks = ALONE) -> dict:
    """Stage 3: score a synthetic set, and real images of the same number, on fresh networks. Returns the results.

    The networks are dealt to the ranks; rank 0 writes.
    """
    synthetic = _read_set(settings, given)
    out = Path(settings.out or Path(settings.synthetic or settings.data_dir).with_suffix(".evaluation.json"))
    if out.is_dir():
        raise InputError(f"out: {out} is a folder; name a file")
    ranks.on_main(lambda: check_writable(out.parent))
    bench = set_up(settings, ranks)
    _check_fits(synthetic, bench)
    pool = networks.evaluation_pool(settings.eval_mode, settings.model)
    for network in pool:
        bench.network(network, settings.seed)  # refuses one that does not fit before any is trained
    sets = {"synthetic": lambda j: (synthetic.images.to(bench.device), synthetic.probabilities().to(bench.device))}
    sets |= _baselines(settings, bench, synthetic.ipc)
    _check_same("preprocessing", synthetic, bench.preprocessing.identity)
    for training_set in sets.values():
        training_set(0)  # refuses experts that get too few images right
    protocol = evaluation_protocol(settings, bench.device, len(synthetic.images), len(sets))

    cases, lr = [(network, name) for network in pool for name in sets], synthetic.lr.item()
    total = math.ceil(len(cases) * settings.num_eval / ranks.size)
    with tqdm(total=total, desc="evaluating", unit="network", dynamic_ncols=True, disable=not ranks.is_main) as bar:

        def progress(case: int, so_far: evaluation.Score) -> None:
            network, name = cases[case]
            bar.set_postfix(set=name, network=network, accuracy=f"{100 * so_far.mean:.2f}%", refresh=False)
            bar.update()

        scores = evaluation.score_all(
            protocol, [(network, sets[name]) for network, name in cases], settings.num_eval, lr, bench.test_images,
            bench.test_labels, ranks, progress,
        )  # fmt: skip
    rows = [{"set": name, **score.as_dict()} for (_, name), score in zip(cases, scores)]
    results = {
        "dataset": bench.data.name, "ipc": synthetic.ipc, "lr": lr, "epochs": settings.epoch_eval_train,
        "preprocessing": bench.preprocessing.kind, "seed": settings.seed, "results": rows,
    }  # fmt: skip
    if not ranks.is_main:
        return results
    write_text(out, json.dumps(results, indent=2, sort_keys=True) + "\n")
    table = [
        {"training set": row["set"], "network": row["network"], "accuracy %": f"{100 * row['mean']:.2f}",
         "std": f"{100 * row['std']:.2f}", "n": row["n"]}
        for row in rows
    ]  # fmt: skip
    print(f"\n{bench.data.name}, {synthetic.ipc} images per class, accuracy on {len(bench.test_images)} test images")
    print(result_table(table, list(table[0])))
    log.info("results are in %s", out)
    return results


def _read_set(settings: EvaluationSettings, given: set[str]) -> SyntheticSet:
    """The set to score. What our own file says of its data set and network holds where nothing else was given."""
    if not settings.synthetic:
        return SyntheticSet.from_published(settings.data_dir, settings.label_dir, settings.lr_dir)
    if Path(settings.synthetic).is_dir():  # of a run: the last set, since the best one was picked by test accuracy
        settings.synthetic = str(Path(settings.synthetic) / "Normal" / "synthetic_last.safetensors")
    synthetic = SyntheticSet.load(settings.synthetic)
    made_with = synthetic.metadata.get("settings") or {}
    keys = ("dataset", "subset", "res", "train_per_class", "zca", "model", "dsa", "dsa_strategy", "siamese")
    settings.adopt({key: made_with[key] for key in keys if key not in given and key in made_with})
    return synthetic


def _check_fits(synthetic: SyntheticSet, bench: Workbench) -> None:
    """Raise InputError when the set was not made for the configured data, as far as one can tell."""
    shape = (bench.data.channels, *bench.data.size)
    if tuple(synthetic.images.shape[1:]) != shape or synthetic.num_classes != bench.data.num_classes:
        raise InputError(
            f"the synthetic set holds images {list(synthetic.images.shape[1:])} of {synthetic.num_classes} classes, "
            f"but {bench.data.name} has images {list(shape)} of {bench.data.num_classes} classes"
        )
    _check_same("data", synthetic, bench.data.identity)


def _check_same(what: str, synthetic: SyntheticSet, here: dict) -> None:
    """Raise InputError when the set's identity of ``what`` is another than ``here``; published sets have none."""
    there = synthetic.metadata.get(what) or here
    for key in here:
        if there.get(key) != here[key]:
            raise InputError(f"{what} {key}: {there.get(key)} in the synthetic set, {here[key]} in the settings")


def _baselines(settings: EvaluationSettings, bench: Workbench, ipc: int) -> dict:
    """Random real images, for each network another draw: hard labels, and soft ones as distillation starts from."""
    sets = {}
    num_classes = bench.data.num_classes

    def hard(j: int) -> tuple[Tensor, Tensor]:
        rows = class_order(bench.labels, num_classes, ipc, settings.seed, "baseline", j)
        chosen = torch.cat([row[:ipc] for row in rows]).to(bench.device)
        return bench.images[chosen], F.one_hot(bench.labels[chosen], num_classes).to(bench.images.dtype)

    def soft(j: int) -> tuple[Tensor, Tensor]:
        images, logits = initial_set(
            "samples_predicted_correctly", bench.images, bench.labels, num_classes, ipc, experts, settings.seed, "baseline", j
        )
        return images, logits.softmax(dim=1)

    if settings.baseline_kinds:
        class_order(bench.labels, num_classes, ipc, settings.seed)  # refuses an ipc that a class cannot fill
    if "hard" in settings.baseline_kinds:
        sets["random real, hard labels"] = hard
    if "soft" in settings.baseline_kinds:
        if settings.buffer_path is None:
            log.info("no --buffer_path: real images with the experts' soft labels are left out")
        else:
            model = bench.flat_model(settings.model)
            store = bench.open_experts(experts_folder(settings, bench.data), settings.model, model)
            store.check(bench.describe(settings.model, model))
            experts = Experts(model, lambda i: store.final(store.experts[i]).to(bench.device), len(store))
            sets["random real, expert labels"] = soft
    return sets
