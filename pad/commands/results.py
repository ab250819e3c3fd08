"""What an evaluation found, as scores and as text. Entries are those of its JSON file."""

import math
from collections.abc import Mapping, Sequence

from pad.commands.rows import roles
from pad.metrics import Estimate, scores
from pad.show.results import SCORES, plus_minus, title
from pad.show.tables import result_table


def scores_of(entries: Sequence[Mapping], hard: bool) -> dict:
    """HLR, IOR, LRS and ARS, as far as there are rows for them, as ``metrics`` (the first network's), ``metrics_of``.

    Where all rows of a score have a tuned learning rate, the accuracies with these count. ``hard``: whether the set's
    labels are.
    """
    networks = list(dict.fromkeys(entry["network"] for entry in entries))
    of = {}
    for network in networks:
        found: dict[str, Estimate] = {}
        for tuned in (False, True):
            rows = {each["row"]: each for each in entries if each["network"] == network and each["tuned"] == tuned}
            by_row = {
                name: Estimate(each["mean"], math.nan if each["se"] is None else each["se"])
                for name, each in rows.items()
            }
            found |= scores(by_row, same=roles(hard))
        of[network] = {name: estimate.as_dict() for name, estimate in found.items()}
    return {"metrics": of[networks[0]], "metrics_of": of}


def as_text(results: Mapping) -> str:
    """A table of all entries, or of several networks one of networks x rows, and the scores."""
    entries = results["results"]
    networks = list(dict.fromkeys(entry["network"] for entry in entries))
    parts = [_one_network(entries) if len(networks) == 1 else _networks(entries, networks)]
    if any(results.get("metrics_of", {}).values()):
        parts.append(_scores(results["metrics_of"]))
    return "\n\n".join(parts)


def _one_network(entries: Sequence[Mapping]) -> str:
    lines = []
    for entry in entries:
        line = {
            "training set": title(entry),
            "network": entry["network"],
            "accuracy %": f"{100 * entry['mean']:.2f}",
            "std": f"{100 * entry['std']:.2f}",
            "se": _percent(entry["se"]),
            "n": entry["n"],
            "lr": f"{entry['lr']:.4g}",
            "on its own images %": _percent(entry["train"]),
        }
        if "last" in entry:
            line["last epoch %"] = f"{100 * entry['last']['mean']:.2f}"
        lines.append(line)
    return result_table(lines, list(lines[0]))


def _networks(entries: Sequence[Mapping], networks: Sequence[str]) -> str:
    rows = list(dict.fromkeys(title(entry) for entry in entries))
    cells = {(title(entry), entry["network"]): entry for entry in entries}
    lines, trained, last = [], [], []
    for row in rows:
        line, own = {"accuracy %": row}, {"on its own images %": row}
        for network in networks:
            entry = cells[row, network]
            line[network] = plus_minus(entry["mean"], entry["se"], 100)
            own[network] = _percent(entry["train"])
        lines.append(line)
        trained.append(own)
        ends = [cells[row, network].get("last") for network in networks]
        shown = ["-" if end is None else plus_minus(end["mean"], end["se"], 100) for end in ends]
        last += [{"last epoch %": row} | dict(zip(networks, shown))] if any(ends) else []
    n = entries[0]["n"]
    said = f"mean ± standard error, n = {n} networks each" if n > 1 else "of one network each"
    return "\n\n".join(result_table(each, list(each[0])) for each in (lines, trained, last) if each) + f"\n{said}"


def _scores(of: Mapping[str, Mapping]) -> str:
    """Fractions, with what they are made of."""
    lines = []
    for network, found in of.items():
        there = {SCORES[name][0]: found[name] for name in SCORES if name in found}
        shown = {label: plus_minus(score["mean"], score["se"], form=".3f") for label, score in there.items()}
        lines.append({"scores (fractions)": network} | shown)
    return result_table(lines, list(dict.fromkeys(column for line in lines for column in line)))


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2f}"
