"""Synthetic sets in fewer bits.

python scripts/quantise.py logged_files/CIFAR10/10/ConvNet/IPC10-seed0 --bits 4 --label_bits 8 --out small.safetensors
"""

import logging
from dataclasses import dataclass
from pathlib import Path

from pad.commands.foreign import refuse_name_of_others
from pad.config import PLACE, RECIPE, FilePath, Settings, setting
from pad.distributed import ALONE, Ranks
from pad.errors import InputError
from pad.quantise import BITS, GROUPS, LABEL_BITS
from pad.store.files import refuse_taken
from pad.synthetic import SyntheticSet, set_file

log = logging.getLogger("pad")


@dataclass(frozen=True, kw_only=True)
class QuantiseSettings(Settings):
    """``scripts/quantise.py SET --bits 8|4|2 --out FILE``: store a synthetic set in fewer bits."""

    source: FilePath | None = setting(None, "file of a synthetic set, or its run's folder", PLACE, by_study=True)
    bits: int | None = setting(None, f"bits of a value of an image, one of {BITS}", RECIPE)
    group: str = setting("image", "what shares a scale; channel: one of an image", RECIPE, choices=GROUPS)
    label_bits: int = setting(32, f"bits of a value of a label, one of {LABEL_BITS}", RECIPE)
    top_k: int | None = setting(None, "instead, keep so many of the largest probabilities of a label", RECIPE, low=1)
    budget: int | None = setting(None, "bits per class, images and labels, not to exceed", RECIPE, low=1)
    out: FilePath | None = setting(None, "the .safetensors file to write", PLACE, by_study=True)
    overwrite: bool = setting(False, "replace the file", PLACE, by_study=True)

    arguments = ("source",)

    def check(self) -> None:
        super().check()
        missing = [name for name in ("source", "bits", "out") if getattr(self, name) is None]
        if missing:
            raise InputError(f"give --{' and --'.join(missing)}: the set, bits of a value ({BITS}), the file to write")
        for name, known in (("bits", BITS), ("label_bits", LABEL_BITS)):
            if getattr(self, name) not in known:
                raise InputError(f"{name}: {getattr(self, name)} is not one of {', '.join(map(str, known))}")
        if self.top_k is not None and "label_bits" in self.given:
            raise InputError("label_bits and top_k exclude each other: labels are stored in one way or the other")


def quantise(settings: QuantiseSettings, ranks: Ranks = ALONE) -> Path:
    """Write a synthetic set in fewer bits, with the smallest error that a search finds; returns its file."""
    out = Path(str(settings.out))
    refuse_taken(out, settings.overwrite)
    refuse_name_of_others(str(out))
    whole = SyntheticSet.load(set_file(str(settings.source)))
    if settings.top_k is not None and settings.top_k >= whole.num_classes:
        raise InputError(f"top_k: {settings.top_k} of {whole.num_classes} classes leaves nothing out")
    if whole.is_hard and settings.given & {"label_bits", "top_k"}:
        log.warning("label_bits and top_k do nothing: the labels are hard, and cost nothing")
    how = int(settings.bits or 0), settings.group, settings.label_bits, settings.top_k
    cost = whole.packing(*how).cost
    if settings.budget is not None and cost.per_class > settings.budget:
        raise InputError(f"budget: {settings.budget:,} bits per class are exceeded: {cost}")
    small = whole.quantised(*how)
    ranks.on_main(lambda: small.save(out))
    off = (small.kept - whole.kept).double().square().mean().sqrt().item()
    moved = (small.probabilities() - whole.probabilities()).abs().sum(1) / 2
    print(f"before: {whole.cost}\nnow: {cost}")
    print(
        f"images differ by {off:.4g} (root mean square), of a standard deviation of {whole.kept.std().item():.4g}; "
        f"of a label's probabilities {100 * moved.mean().item():.3g} % move in the mean, at most "
        f"{100 * moved.max().item():.3g} %\nthe set is in {out}"
    )
    return out
