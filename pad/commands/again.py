"""The commands that make a run again, from what its files say."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from pad.commands.distil import Distilling
from pad.commands.evaluate import EvaluationSettings
from pad.commands.record import BufferSettings
from pad.commands.rows import TITLES
from pad.commands.table import COMMANDS, Command
from pad.config import DATA, MODEL, Settings

FOLDERS = {"buffer_CL.py": "buffer", "select_coreset.py": "scripts"}  # of a program in the checkout; others: distill
WIDTH = 96  # of a line, about


def made_by(config: Mapping) -> Command | None:
    """The command of stage 2 whose settings a run's config.yaml has; None where none has them all."""
    fitting = {}
    for name, command in COMMANDS.items():
        if issubclass(command.settings, Distilling):
            known = command.settings.fields().keys() | command.settings.recorded_beside
            if config and config.keys() <= known:
                fitting[name] = len(known - config.keys())
    return COMMANDS[min(fitting, key=lambda name: fitting[name])] if fitting else None


def in_words(value: object) -> str:
    """A setting's value as the command line takes it."""
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(in_words, value)) + "]"
    return "none" if value is None else str(value)


def differing(kind: type[Settings], values: Mapping, base: Mapping = {}) -> dict[str, object]:
    """Those of ``values`` that are settings of ``kind`` and not as in ``base``, else not at their defaults."""
    expected = {name: field.default for name, field in kind.fields().items()} | dict(base)
    return {name: values[name] for name in kind.fields() if name in values and values[name] != expected[name]}


def command_line(program: str, settings: Mapping) -> str:
    """A command over several lines, as a shell takes it."""
    words = ["python " + shlex.quote(f"{FOLDERS.get(program, 'distill')}/{program}")]
    for name, value in settings.items():
        word = shlex.quote(in_words(value))
        words.append(f"--{name}={word}" if word.startswith("-") else f"--{name} {word}")
    lines = [words[0]]
    for word in words[1:]:
        if len(lines[-1]) + len(word) < WIDTH:
            lines[-1] += f" {word}"
        else:
            lines.append(f"    {word}")
    return " \\\n".join(lines)


def stage_1(config: Mapping, recipe: Mapping) -> str | None:
    """The command that records the experts of a run; None where their ``recipe`` says too little."""
    if "train_epochs" not in recipe or "buffer_path" not in config:
        return None
    experts = config.get("experts")
    values = {name: config[name] for name in (*BufferSettings.names(DATA, MODEL), "seed") if name in config}
    values |= {name: recipe[name] for name in BufferSettings.fields() if name in recipe}
    if "rho_max" in recipe:
        values["rho_min"] = recipe["rho_max"]
    if isinstance(experts, Sequence) and experts:
        values["num_experts"] = max(experts) + 1
    values |= {name: config[name] for name in ("data_path", "buffer_path") if name in config}
    return command_line("buffer_CL.py", differing(BufferSettings, values))


def stage_2(command: Command, config: Mapping) -> str:
    """The command that a run was started with."""
    others = {name: value for name, value in config.items() if name not in ("resume", "overwrite", "device")}
    return command_line(command.program, differing(command.settings, others))


def stage_3(config: Mapping, run: str, file: Path | None = None, results: Mapping = {}) -> str:
    """The command that evaluates a run's set, as ``results`` in the file of that place in the run say of themselves.

    ``run``: the run's folder, as the command is to name it. Without a file: with default settings.
    """
    own = EvaluationSettings().taken_over(config)
    places, adopted = {"synthetic": run}, own  # stage 3 takes them over from a set of ours
    if file is not None:
        stem, folder = file.name.removesuffix(".evaluation.json"), f"{run}/{file.parent}"
        places = {"synthetic": f"{folder}/{stem}.safetensors"}
        if stem.startswith("images_"):
            kinds = zip(EvaluationSettings.trio, ("images", "labels", "lr"))
            places = {name: f"{folder}/{stem.replace('images', kind, 1)}.pt" for name, kind in kinds}
            adopted = {}
    settings = results.get("settings")
    if not settings:  # results of version 0.1.0
        rows = results.get("results") or [{}]
        said = {"epoch_eval_train": results.get("epochs"), "num_eval": rows[0].get("n"), "seed": results.get("seed")}
        settings = own | {name: value for name, value in said.items() if value is not None}
    labelled = results.get("experts") or any("expert" in str(row.get("set")) for row in results.get("results", []))
    paths = ("data_path", *["buffer_path"] * bool(labelled or not results))
    if any(row.get("row") not in (None, *TITLES) for row in results.get("results", [])):
        paths += ("ranking_path",)
    values = places | differing(EvaluationSettings, settings, adopted)
    values |= differing(EvaluationSettings, {name: config[name] for name in paths if name in config})
    return command_line("evaluation.py", values)
