"""The dataset card of an export: a README.md as the Hugging Face Hub shows it."""

import json
from collections.abc import Mapping

from pad.synthetic import SyntheticSet

LICENCES = {"FashionMNIST": "mit", "FashionMNISTMini": "mit"}  # of data sets, where it is known for sure

_LOADER = """from datasets import load_dataset

rows = load_dataset("imagefolder", data_dir=FOLDER, split="train")
rows[0]["image"], rows[0]["label"], rows[0]["logits"]  # a picture, its class, its soft label: softmax(logits)"""


def dataset_card(synthetic: SyntheticSet, about: Mapping, licence: str, results: Mapping | None) -> str:
    """The card's text.

    about: what :func:`pad.exchange.writing.export_set` writes beside it, with ``precision``. licence: of the source.
    results: of stage 3, as its JSON file holds them.
    """
    metadata = synthetic.metadata
    data, lost = metadata.get("data") or {}, about["precision"]
    source = data.get("dataset", "an unknown data set")
    names = ", ".join(f"{c} {name}" for c, name in enumerate(synthetic.class_names))
    count, channels, height, width = synthetic.images.shape
    front = f"""---
license: {json.dumps(licence)}
pretty_name: {json.dumps(f"{source}, distilled to {synthetic.size}")}
task_categories:
- image-classification
tags:
- dataset-distillation
---
"""
    body = [
        f"# {source}, distilled to {synthetic.size}",
        f"{count} synthetic images of {synthetic.num_classes} classes, {width} x {height} pixels, {channels} "
        "channel(s). A network is to learn from them about what it learns from the whole data set.",
        f"- **Classes.** `label` is {names}.\n"
        "- **Soft labels.** The target of an image is softmax(logits).\n"
        f"- **Learning rate.** {about['lr']:.6g}, which belongs to the set.\n"
        f"- **Preprocessing.** {_preprocessing(about['preprocessing'])}\n"
        f"- **Precision.** 8 bits a value. Pixels differ from the set's by {lost['mean_error']:.2f} levels of 255 in "
        f"the mean, at most by {lost['max_error']:.2f}; {100 * lost['clipped']:.2f} % of them were clipped to 0..1.\n"
        f"- **Source.** {source}. Its licence: {licence}.",
        f"## Loading\n\n```python\n{_LOADER}\n```",
        f"## Accuracy\n\n{accuracies(results)}",
        f"## Recipe\n\n{_recipe(metadata)}",
    ]
    return front + "\n\n".join(body) + "\n"


def _preprocessing(identity: Mapping | None) -> str:
    if identity is None:
        return "Unknown."
    if identity["kind"] == "zca":
        return (
            f"Networks saw the images ZCA-whitened, fitted on the source's training images with eps {identity['eps']}. "
            "The pictures are unwhitened."
        )
    return f"Networks saw (x - mean) / std of pixels in 0..1, mean {identity['mean']}, std {identity['std']}."


def accuracies(results: Mapping | None) -> str:
    """The table of stage 3's results, as its JSON file holds them. Raises KeyError or TypeError for what is none."""
    if results is None:
        return "Not measured."
    rows = [
        f"| {row['set']} | {row['network']} | {100 * row['mean']:.2f} % | {100 * row['std']:.2f} | {row['n']} |"
        for row in results["results"]
    ]
    return "\n".join(["| training set | network | accuracy | std | n |", "| --- | --- | --- | --- | --- |", *rows])


def _recipe(metadata: Mapping) -> str:
    told = {key: metadata[key] for key in ("model", "seed", "iteration") if key in metadata}
    told |= metadata.get("settings") or {}
    if not told:
        return "Unknown."
    return "\n".join(["| setting | value |", "| --- | --- |", *(f"| `{key}` | {told[key]} |" for key in sorted(told))])
