"""Results of stage 3 as HTML: tables of training sets and networks, and the scores made of them."""

from collections.abc import Mapping, Sequence

from pad.show.html import Markup, fill, joined, pairs, table
from pad.show.tables import standard_error

SCORES = {
    "hlr": ("HLR", "hard label recovery: accuracy on the whole training set minus that on the set with hard labels"),
    "ior": ("IOR", "improvement over random: accuracy on the set minus that on random real images, labelled alike"),
    "ior_plain": ("IOR, no augmentation", "the same of networks that are trained without augmentation"),
    "lrs": ("LRS", "label-robust score, 0 to 1: rises with IOR and falls with HLR, half each"),
    "ars": ("ARS", "augmentation-robust score, 0 to 1: rises with IOR with and without augmentation, half each"),
}


def results_tables(results: Mapping) -> Markup:
    """The tables of one file of results, of this or an earlier version.

    Raises KeyError, TypeError, ValueError or AttributeError where it is no such file.
    """
    entries = results["results"]
    networks = list(dict.fromkeys(entry["network"] for entry in entries))
    parts = [_of_networks(entries, networks)] if len(networks) > 1 else []
    for network in networks:
        parts += [fill("<h4>$network</h4>", network=network)] * (len(networks) > 1)
        parts.append(_of_entries([each for each in entries if each["network"] == network], results.get("lr")))
    of = results.get("metrics_of") or {networks[0]: results.get("metrics") or {}}
    if any(of.values()):
        parts.append(_scores(of))
    return joined(parts)


def title(entry: Mapping) -> str:
    """What networks were trained on, in words."""
    return f"{entry['set']}, tuned" if entry.get("tuned") else str(entry["set"])


def plus_minus(mean: float, error: float | None, scale: float = 1, form: str = ".2f") -> str:
    """A mean and its standard error, where it has one."""
    return " ± ".join(format(scale * value, form) for value in (mean, error) if value is not None and value == value)


def error_of(entry: Mapping) -> float | None:
    """The standard error of an entry's mean; None of one network."""
    return entry["se"] if "se" in entry else standard_error(entry["accuracies"])


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2f}"


def _of_networks(entries: Sequence[Mapping], networks: Sequence[str]) -> Markup:
    cells = {(title(each), each["network"]): plus_minus(each["mean"], error_of(each), 100) for each in entries}
    rows = dict.fromkeys(title(each) for each in entries)
    return table(
        ["accuracy %", *networks], [[row, *(cells.get((row, network), "-") for network in networks)] for row in rows]
    )


def _of_entries(entries: Sequence[Mapping], lr: float | None) -> Markup:
    lines = []
    for entry in entries:
        rate, last, train = entry.get("lr", lr), entry.get("last"), entry.get("train")
        kind = "tuned" if entry.get("tuned") else "given" if entry.get("row") == "full" else "learned"
        lines.append(
            {
                "training set": str(entry["set"]),
                "accuracy %": plus_minus(entry["mean"], error_of(entry), 100),
                "std": _percent(entry["std"]),
                "n": entry["n"],
                "last epoch %": plus_minus(last["mean"], last.get("se"), 100) if last else None,
                "on its own images %": None if train is None else _percent(train),
                "learning rate": None if rate is None else f"{rate:.4g},\u00a0{kind}",
            }
        )
    columns = [column for column in lines[0] if any(line[column] is not None for line in lines)]
    return table(columns, [["-" if line[each] is None else line[each] for each in columns] for line in lines], "first")


def _scores(of: Mapping[str, Mapping]) -> Markup:
    """Fractions by network, and what they mean."""
    there = [name for name in SCORES if any(name in found for found in of.values())]

    def shown(score: Mapping | None) -> str:
        return plus_minus(score["mean"], score.get("se"), form=".3f") if score else "-"

    rows = [[network, *(shown(found.get(name)) for name in there)] for network, found in of.items()]
    meanings = {SCORES[name][0]: SCORES[name][1] for name in there}
    return joined(
        [
            Markup("<h3>Scores</h3>"),
            table(["network", *meanings], rows),
            fill('<div class="note">$meanings</div>', meanings=pairs(meanings, "meanings")),
        ]
    )
