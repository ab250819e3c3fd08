"""The report of an experiment at the published scale: results as text, as a table of numbers, and a curve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pad.show.figures import BLUE, GREY, ORANGE, draw_figure, new_figure
from pad.show.results import plus_minus
from pad.store.files import write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STAGES = {"experts": "ranking and experts", "distilling": "distilling", "evaluation": "evaluation"}
_COLUMNS = ("accuracy", "std", "n")


def write_scale_report(folder: Path, found: Mapping) -> None:
    """Write results.md, curve.csv and curve.png; ``found`` is what results.json has."""
    write_text(folder / "results.md", as_markdown(found))
    write_text(folder / "curve.csv", as_csv(found["curve"]))
    if found["curve"]:
        draw_figure(folder / "curve.png", plot_curve, found["curve"], found["rows"])


def as_csv(curve: Sequence[Mapping]) -> str:
    """Accuracies in %."""
    lines = [
        f"{point['iteration']},{100 * point['mean']:.4f},{100 * point['std']:.4f},{_error(point)},{point['n']}\n"
        for point in curve
    ]
    return "iteration,accuracy,std,standard_error,n\n" + "".join(lines)


def as_markdown(found: Mapping) -> str:
    """What was done in which time, and what came out."""
    experts, curve, stated = found["experts"], found["curve"], found["stated"]
    parts = [
        f"# {found['dataset']}, {_many(found['ipc'], 'image')} per class",
        _lead(found),
        "## Accuracy",
        "Accuracy on the test images in %, of networks that each set has trained. std is over the n networks.",
        _table(
            ["training set", *_COLUMNS], [[_name(row, curve), *_figures(row)] for row in found["rows"]] + _aim(stated)
        ),
    ]
    if len(found["rows"]) < 2:
        parts.append("There was no time for random real images. The same command goes on.")
    if stated:
        parts.append("The paper's figure is of another budget. It is the aim, not a comparison.")
    parts += [
        "## Curve",
        _table(["iteration", *_COLUMNS], [[str(each["iteration"]), *_figures(each)] for each in curve]),
    ]
    minutes = [[STAGES[key], f"{found['seconds'].get(key, 0) / 60:.1f}"] for key in STAGES]
    parts += ["## Time, of all calls", _table(["stage", "minutes"], minutes)]
    tested = [[k, f"{100 * accuracy:.2f}"] for k, accuracy in experts["test_accuracy"].items()]
    parts += ["## Experts", _table(["expert", f"accuracy % after {experts['epochs']} epochs"], tested)]
    where = found["folders"]
    parts.append(f"The experts are in `{where['experts']}`, the run is in `{where['run']}`. Neither is in this folder.")
    return "\n\n".join(parts) + "\n"


def _lead(found: Mapping) -> str:
    experts, iterations = found["experts"], found["iterations"]
    return (
        f"Settings: {found['settings']}, seed {found['seed']}. Machine: {found['machine']}, torch {found['torch']}. "
        f"Trained: {len(experts['test_accuracy'])} of {experts['wanted']} experts, for all {experts['epochs']} epochs. "
        f"Done: {iterations['done']} of {iterations['wanted']} iterations. That is what fitted into the time, but for "
        "the first expert, which is always trained. The same command goes on with more iterations along these experts."
    )


def _name(row: Mapping, curve: Sequence[Mapping]) -> str:
    if row["row"] != "syn":
        return str(row["set"])
    return f"synthetic, after {_many(curve[-1]['iteration'], 'iteration')}"


def _aim(stated: Mapping | None) -> list[list[str]]:
    if stated is None:
        return []
    name = f"in the paper, with {stated['experts']} experts and {stated['iterations']} iterations"
    return [[name, f"{stated['accuracy']:.2f}", f"{stated['std']:.2f}", "-"]]


def _figures(entry: Mapping) -> list[str]:
    return [plus_minus(entry["mean"], None, 100), f"{100 * entry['std']:.2f}", str(entry["n"])]


def _error(point: Mapping) -> str:
    return "" if point["se"] is None else f"{100 * point['se']:.4f}"


def _many(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines))


def plot_curve(curve: Sequence[Mapping], rows: Sequence[Mapping]) -> Figure:
    """Accuracy in % over iterations, with standard errors; other rows as lines across."""
    figure = new_figure(6, 3.6)
    axes = figure.subplots()
    iterations, means = ([scale * point[key] for point in curve] for key, scale in (("iteration", 1), ("mean", 100)))
    errors = [100 * (point["se"] or 0) for point in curve]
    axes.errorbar(iterations, means, errors, color=BLUE, marker="o", markersize=4, capsize=3, label="synthetic")
    others = [row for row in rows if row["row"] != "syn"]
    for row, colour in zip(others, (GREY, ORANGE)):
        axes.axhline(100 * row["mean"], color=colour, linestyle="--", label=row["set"])
    axes.set_xlabel("iteration")
    axes.set_ylabel("test accuracy, %: mean, standard error")
    axes.grid(axis="y", alpha=0.3)
    axes.legend(frameon=False, fontsize=9)
    return figure
