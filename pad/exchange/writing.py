"""Synthetic sets in the forms that other tools read."""

import csv
import hashlib
import io
import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from pad.errors import InputError
from pad.exchange.card import dataset_card
from pad.store.files import whole_folder
from pad.synthetic import SyntheticSet

log = logging.getLogger("pad")

ABOUT = "set.json"  # what an export says of itself
NPZ = "set.npz"
PNG_TABLE = "labels.csv"
ROWS_TABLE = "train/metadata.jsonl"  # as the Hugging Face library `datasets` looks for it
LOGIT = "logit_"  # and the number of a class: a column of the table of PNG files
TAG = "last"  # of the published trio

FORMS = ("png", "huggingface", "npz", "published")


def export_set(
    synthetic: SyntheticSet, to: str, folder: Path | str, *, licence: str = "unknown", results: Mapping | None = None
) -> dict:
    """Write a set into a new folder, in one of ``FORMS``; returns what the export says of itself.

    ``png`` and ``huggingface`` have 8 bits a value: how far that is from the set is said and returned. ``licence`` (of
    the source) and ``results`` (of stage 3) are for the dataset card. Raises InputError for a folder that holds
    something, and for pictures of a set that has no pixels, or not 1 or 3 channels.
    """
    about: dict = {
        "form": to,
        "lr": float(synthetic.lr),
        "class_names": synthetic.class_names,
        "preprocessing": synthetic.preprocessing_identity,
        "set": synthetic.metadata,
    }
    if not synthetic.is_even:
        about["images_of_each_class"] = synthetic.counts
    levels = None
    if to in ("png", "huggingface"):
        levels, about["precision"] = eight_bits(synthetic)
    with whole_folder(folder) as made:
        if levels is not None:
            about["table"] = table_digest(_pictures(synthetic, levels, made, to))
        if to == "huggingface":
            (made / "README.md").write_text(dataset_card(synthetic, about, licence, results), encoding="utf-8")
        if to == "published":
            synthetic.export_published(made, TAG)
        if to == "npz":
            _npz(synthetic, about, made / NPZ)
        else:
            (made / ABOUT).write_text(json.dumps(about, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    if "precision" in about:
        lost = about["precision"]
        log.info(
            "8 bits a value: pixels differ from the set's by %.2f levels of 255 in the mean, at most by %.2f; "
            "%.2f %% of them lay outside of 0..1 and were clipped",
            lost["mean_error"],
            lost["max_error"],
            100 * lost["clipped"],
        )
    return about


def eight_bits(synthetic: SyntheticSet) -> tuple[Tensor, dict]:
    """The pixels as bytes, uint8 ``[N, C, H, W]``, and what that loses, in levels of 255.

    ``max_error`` and ``mean_error`` are of all values, ``clipped`` is the share that lay outside of 0..1; an error of
    more than half a level is of such.
    """
    channels = synthetic.images.shape[1]
    if channels not in (1, 3):
        raise InputError(f"pictures have 1 or 3 channels, the set's images have {channels}; export it to npz")
    exact = synthetic.unclamped_pixels().detach().cpu().double() * 255
    levels = exact.round().clamp(0, 255)
    error = (levels - exact).abs()
    outside = ((exact < 0) | (exact > 255)).double()
    lost = {"max_error": error.max().item(), "mean_error": error.mean().item(), "clipped": outside.mean().item()}
    return levels.byte(), {"bits": 8, **lost}


def table_digest(text: str) -> str:
    """What tells a table of labels that is whole from one that was cut short."""
    return hashlib.sha256(text.encode()).hexdigest()


def _pictures(synthetic: SyntheticSet, levels: Tensor, folder: Path, to: str) -> str:
    """A PNG file for each image, in folders whose order as text is that of the classes, and a table of the labels.

    Returns the table's text.
    """
    table = folder / (PNG_TABLE if to == "png" else ROWS_TABLE)
    width = len(str(synthetic.num_classes - 1))
    names = [f"{c:0{width}d}_{_plain(name)}" for c, name in enumerate(synthetic.class_names)]
    for name in names:
        (table.parent / name).mkdir(parents=True)
    rows = []
    within = [i for count in synthetic.counts for i in range(count)]
    for i, (image, c) in enumerate(zip(levels.numpy(), synthetic.classes.tolist())):
        file = f"{names[c]}/{within[i]:05d}.png"
        Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0)).save(table.parent / file)
        rows.append((file, c, [float(f"{logit:.9g}") for logit in synthetic.labels[i].tolist()]))  # exact in float32
    if to == "png":
        lines = io.StringIO()
        writer = csv.writer(lines, lineterminator="\n")
        writer.writerow(["file", "class", *(f"{LOGIT}{c}" for c in range(synthetic.num_classes))])
        writer.writerows([file, c, *logits] for file, c, logits in rows)
        text = lines.getvalue()
    else:
        named = (json.dumps({"file_name": file, "label": c, "logits": logits}) for file, c, logits in rows)
        text = "".join(f"{line}\n" for line in named)
    table.write_text(text, encoding="utf-8")
    return text


def _npz(synthetic: SyntheticSet, about: dict, path: Path) -> None:
    """Arrays as the networks see them, pixels where they are known, and what the export says of itself as text."""
    tensors = {name: getattr(synthetic, name) for name in ("images", "labels", "lr", "classes")}
    if synthetic.preprocessing is not None or synthetic.stored_pixels is not None:
        tensors["pixels"] = synthetic.unclamped_pixels()
    arrays = {name: tensor.detach().cpu().numpy() for name, tensor in tensors.items()}
    np.savez(path, about=np.array(json.dumps(about, sort_keys=True)), **arrays)


def _plain(name: str) -> str:
    """A class's name as a part of a folder's, on any system."""
    return re.sub(r"[^\w.-]+", "-", name)[:60]
