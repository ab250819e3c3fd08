"""One HTML page of a run of stage 2, or of a study: what came out, and what it was made from.

python scripts/report.py logged_files/CIFAR10/10/ConvNet/IPC10-seed0
"""

import contextlib
import csv
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pad.checkpoint import KIND as CHECKPOINT
from pad.commands.again import differing, in_words, made_by, stage_1, stage_2, stage_3
from pad.commands.evaluate import EvaluationSettings
from pad.config import PLACE, FilePath, Settings, path_base, read_yaml, setting
from pad.distributed import ALONE, Ranks
from pad.errors import InputError
from pad.show.curves import curves
from pad.show.html import GENERATOR, Markup, document, fill, joined, pairs, picture, png, table
from pad.show.markdown import as_html
from pad.show.results import error_of, plus_minus, results_tables, title
from pad.store.files import refuse_unwritable, slug, write_text
from pad.store.naming import folder_of
from pad.store.run import finished_iterations, recorded_settings, run_state
from pad.store.tensors import open_tensors
from pad.synthetic import SyntheticSet

log = logging.getLogger("pad")

CLASSES = 20  # of which images are shown, at most
PER_CLASS = 10  # images of a class that are shown, at most
PIXELS = 400_000  # of all images that are shown, before and after: some 1.5 MB in the page
PICTURES = 1_200_000  # bytes of a study's pictures, at most: 1.6 MB in the page


@dataclass(frozen=True, kw_only=True)
class PageSettings(Settings):
    """scripts/report.py FOLDER: write one HTML page of a run or of a study, which needs nothing beside it."""

    folder: FilePath | None = setting(
        None,
        "folder of a run or of a study, or a YAML file of stage 3, which names a run; may stand alone, as the first "
        "argument",
        PLACE,
    )
    out: FilePath | None = setting(None, "HTML file to write; default: report.html in the folder", PLACE)
    overwrite: bool = setting(False, "replace a file that is no such page", PLACE)

    arguments = ("folder",)

    def check(self) -> None:
        super().check()
        if self.folder is None:
            raise InputError("no run and no study is named: give its folder, as logged_files/CIFAR10/10/ConvNet/mine")


def write_page(settings: PageSettings, ranks: Ranks = ALONE) -> Path:
    """Write the page; the same folder gives the same bytes. Returns its path.

    What is missing or damaged in the folder is named in the page. Raises InputError where there is neither a run nor a
    study, and for a file in the page's place that is something else.
    """
    folder = _folder(str(settings.folder))
    kinds = [page for page, is_there in ((_of_run, _is_run), (_of_study, _is_study)) if is_there(folder)]
    if not kinds:
        raise InputError(f"{folder} holds no run of stage 2 (a config.yaml) and no study (cells)")
    out = Path(settings.out or folder / "report.html")
    if out.is_dir():
        raise InputError(f"out: {out} is a folder; name a file")
    refuse_unwritable(out.parent)
    if out.exists() and not settings.overwrite and GENERATOR.encode() not in out.read_bytes()[:1000]:
        remedy = "name another with --out, or replace it with --overwrite"
        raise InputError(f"{out} is not a page of this command; {remedy}")

    def write() -> None:
        write_text(out, kinds[0](folder))
        log.info("the page is in %s", out)

    ranks.on_main(write)
    return out


def _folder(path: str) -> Path:
    """The folder that is named, or the run's that a YAML file of stage 3 names."""
    if path.endswith(".yaml") and Path(path).is_file():
        named = EvaluationSettings.with_paths(read_yaml(path), path_base(Path(path))).get("synthetic")
        if not isinstance(named, str):
            raise InputError(f"{path} names no run: it has no `synthetic`")
        return Path(named)
    if not Path(path).is_dir():
        raise InputError(f"there is no folder {path}")
    return Path(path)


def _is_run(folder: Path) -> bool:
    return run_state(folder) != "absent"


def _is_study(folder: Path) -> bool:
    return (folder / "cells").is_dir() or (folder / "asked.yaml").is_file()  # the cells may lie in a store


class _Reading:
    """Reads a folder's files; notes those that are not there or damaged."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.missing: list[str] = []

    @contextlib.contextmanager
    def noting(self, name: str) -> Iterator[None]:
        """What the block reads from the file of that name may be missing or damaged."""
        try:
            yield
        except FileNotFoundError:
            self.missing.append(f"{name} is not there")
        except InputError as error:
            self.missing.append(str(error).replace(f"{self.folder}/", ""))
        except (OSError, ValueError, TypeError, AttributeError, LookupError, RecursionError, csv.Error):
            self.missing.append(f"{name} is damaged")

    def text(self, name: str) -> str:
        """Of a file; empty where it cannot be read."""
        with self.noting(name):
            return (self.folder / name).read_text(encoding="utf-8")
        return ""

    def notes(self) -> Markup:
        """A list of them."""
        items = joined(fill("<li>$note</li>", note=note) for note in dict.fromkeys(self.missing))
        return fill('<aside class="missing"><ul>$items</ul></aside>', items=items) if items else Markup()


# ---- a run


class _Run(_Reading):
    """What the files of a run say."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.config: dict = {}
        with self.noting("config.yaml"):
            self.config = recorded_settings(folder)
        self.events = list(self._events())
        sets = {path.stem.removeprefix("synthetic_"): path for path in folder.glob("Normal/synthetic_*.safetensors")}
        numbers = sorted((tag for tag in sets if tag.isdecimal() and tag != "0"), key=int)
        last = next((tag for tag in ("last", *reversed(numbers)) if tag in sets), "")
        self.before = self._set(sets.get("0"), "the set at iteration 0 (Normal/synthetic_0.safetensors) is not there")
        self.after = self._set(sets.get(last), "no later set is saved yet, or it is not there any more")
        self.about: dict = next((each.metadata for each in (self.after, self.before) if each), {})
        self.evaluations: dict[Path, dict] = {}
        for path in sorted(folder.rglob("*.evaluation.json")):
            name = path.relative_to(folder)
            with self.noting(str(name)):
                found = json.loads(path.read_text(encoding="utf-8"))
                results_tables(found)  # whether they can be shown
                self.evaluations[name] = found
        self.arithmetic: dict = {}
        if (checkpoint := folder / "checkpoint.safetensors").exists():
            with self.noting(checkpoint.name), open_tensors(checkpoint, kind=CHECKPOINT) as (_, metadata):
                self.arithmetic = metadata["arithmetic"]
        self.name = folder.resolve().name
        self.command = made_by(self.config)

    def _events(self) -> Iterator[dict]:
        """Of metrics.jsonl; a kill may have cut the last line short."""
        lines = self.text("metrics.jsonl").splitlines(keepends=True)
        for number, line in enumerate(lines, start=1):
            event = None
            with contextlib.suppress(ValueError, RecursionError):
                event = json.loads(line)
            at = event.get("iteration") if isinstance(event, dict) else None
            if isinstance(event, dict) and "event" in event and isinstance(at, int) and 0 <= at < 2**53:
                yield event
            elif line.endswith("\n"):
                self.missing.append(f"metrics.jsonl: line {number} is not an event")

    def _set(self, path: Path | None, otherwise: str) -> SyntheticSet | None:
        if path is None:
            self.missing.append(otherwise)
            return None
        with self.noting(str(path.relative_to(self.folder))):
            return SyntheticSet.load(path)
        return None

    @property
    def data(self) -> str:
        """The name of the data set."""
        return str((self.about.get("data") or self.config).get("dataset", "unknown data set"))

    @property
    def iterations(self) -> int:
        """How many are done."""
        steps = [event["iteration"] + 1 for event in self.events if event["event"] == "match"]
        return finished_iterations(self.folder) or max(steps, default=0)

    @property
    def main(self) -> Mapping:
        """The evaluation that counts: of the last set, where there is one; empty where there is none."""
        last = [found for name, found in self.evaluations.items() if name.name.startswith("synthetic_last")]
        return next(iter((*last, *self.evaluations.values())), {})


def _of_run(folder: Path) -> str:
    run = _Run(folder)
    sections = {
        "Images": _images(run),
        "Accuracy": _accuracy(run),
        "Training": _training(run),
        "Made from": _made_from(run),
        "Settings": _settings(run),
        "Make it again": _again(run),
    }
    system = run.config.get("method") or (run.command.program.removesuffix(".py") if run.command else "")
    kicker = "Distilled training set" + f" · {system}" * bool(system)
    return document(run.name, kicker, joined([_lead(run), _figures(run), run.notes()]), sections)


def _lead(run: _Run) -> Markup:
    config = run.config
    ipc, model, factor = config.get("ipc", "?"), config.get("model", "unknown network"), config.get("factor", 1)
    if run_state(run.folder) == "finished":
        state = f"Finished after {run.iterations} iterations"
    else:
        goal = config.get("Iteration")
        of = f" of {goal + 1}" if isinstance(goal, int) else ""
        state = f"Unfinished: {run.iterations}{of} iterations"
    each = f", each stored as {factor} x {factor} smaller ones" if factor != 1 else ""
    text = f"{run.data}, {ipc} image{'s' * (ipc != 1)} per class{each}, {model}. {state}."
    return fill('<p class="lead">$text</p>', text=text)


def _figures(run: _Run) -> Markup:
    """The few numbers that a reader looks for first."""
    found = {}
    if run.main:
        first, *others = run.main["results"]
        networks = f"{first['n']} networks" if first["n"] > 1 else "one network"
        found[f"% accuracy of {networks} trained on the synthetic set"] = _accuracy_of(first)
        alike = [(each["network"], bool(each.get("tuned"))) == (first["network"], False) for each in others]
        others = [each for each, same in zip(others, alike) if same and "random real" in each["set"]]
        if others:
            best = max(others, key=lambda each: each["mean"])
            found[f"% on {title(best)}"] = _accuracy_of(best)
    if run.after:
        found["synthetic images"] = str(len(run.after.images))
    skipped = [event.get("skipped") for event in run.events if event["event"] == "match"]
    if skipped:
        found[f"of {run.iterations} iterations changed nothing"] = str(skipped[-1])
    return pairs(found, "figures")


def _accuracy_of(entry: Mapping) -> str:
    return plus_minus(entry["mean"], error_of(entry), 100, ".1f")


def _images(run: _Run) -> Markup:
    """The images of each class before and after, side by side."""
    known = run.after or run.before
    sides: list[tuple[str, Tensor]] = []
    for synthetic in filter(None, (run.before, run.after)):
        with run.noting("Normal"):
            sides.append((f"iteration {synthetic.metadata.get('iteration', '?')}", synthetic.pixels()))
    if known is None or not sides or known.images.shape[1] not in (1, 3):
        return _picture_files(run)
    ipc, names = known.ipc, known.class_names
    tiles = max(1, PIXELS // (2 * known.images[0, 0].numel()))
    columns = max(1, min(PER_CLASS, ipc, tiles // min(10, len(names))))
    rows = max(1, min(CLASSES, len(names), tiles // columns))
    said = ["before and after" if len(sides) > 1 else "as they are"]
    said += [f"first {columns} of {ipc} images per class"] * (columns < ipc)
    said += [f"first {rows} of {len(names)} classes"] * (rows < len(names))
    few = columns <= 3
    cells = [] if few else [Markup("<span></span>"), *(fill("<span>$at</span>", at=at) for at, _ in sides)]
    for c, name in enumerate(names[:rows]):
        shown = joined(
            picture(png(_strip(pixels[c * ipc :][:columns])), f"{name}, {at}", "pixels") for at, pixels in sides
        )
        form = "<figure><figcaption>$name</figcaption>$shown</figure>" if few else "<b>$name</b>\n$shown"
        cells.append(fill(form, name=name, shown=shown))
    return fill(
        '<p class="note">The synthetic images $said: $when.</p>\n<div class="$kind" style="$sizes">$cells</div>',
        said=", ".join(said),
        when=" and ".join(at for at, _ in sides),
        kind="cards" if few else "pairs",
        sizes=f"--tiles:{columns};--sides:{len(sides)}",
        cells=joined(cells),
    )


def _strip(pixels: Tensor) -> np.ndarray:
    """Images ``[n, 1 or 3, H, W]`` in a row, a transparent pixel between them: uint8 ``[H, W', 2 or 4]``."""
    tiles = pixels.float().nan_to_num().clamp(0, 1).mul(255).round().to(torch.uint8)
    opaque = torch.cat([tiles, torch.full_like(tiles[:, :1], 255)], dim=1)
    row = torch.nn.functional.pad(opaque, (0, 1)).permute(2, 0, 3, 1)
    return row.reshape(len(row), -1, row.shape[3])[:, :-1].contiguous().numpy()


def _picture_files(run: _Run) -> Markup:
    """The last picture that the run drew, where there is no set to draw."""
    files = sorted((run.folder / "pictures").glob("*.png"))  # before_after comes first, then synthetic
    chosen = [path for path in files if path.name.startswith("before_after")] or files
    if not chosen or chosen[-1].stat().st_size > PICTURES:
        return Markup("<p>There are no images to show yet.</p>")
    return picture(chosen[-1].read_bytes(), chosen[-1].stem, "sheet")


def _accuracy(run: _Run) -> Markup:
    if not run.evaluations:
        return Markup("<p>The set has not been evaluated. The last command below does that.</p>")
    said = "Accuracy of n fresh networks on the test images: mean ± standard error, and their spread (std)."
    parts = [fill("<p>$said</p>", said=said)]
    for name, found in run.evaluations.items():
        iteration = (found.get("synthetic") or {}).get("iteration")
        said = f", of iteration {iteration}" if iteration is not None else ""
        parts += [fill("<h3>$name$said</h3>", name=name.name.removesuffix(".evaluation.json"), said=said)]
        parts += [results_tables(found)]
        how = {"protocol": found.get("protocol"), "epochs": found.get("epochs"), "seed": found.get("seed")}
        text = ", ".join(f"{key} {value}" for key, value in how.items() if value is not None)
        parts += [fill('<p class="note">$text. From $name.</p>', text=text.capitalize(), name=name)]
    return joined(parts)


def _training(run: _Run) -> Markup:
    plots = curves(run.events)
    if not plots:
        return Markup("<p>No iteration is recorded.</p>")
    figures = joined(
        fill("<figure><figcaption>$caption</figcaption>$plot</figure>", caption=caption, plot=plot)
        for caption, plot in plots.items()
    )
    return fill('<div class="plots">$figures</div>', figures=figures)


def _made_from(run: _Run) -> Markup:
    about, made = run.about, run.about.get("provenance") or {}
    data, seen, recipe = about.get("data") or {}, about.get("preprocessing") or {}, made.get("buffer") or {}
    experts = run.config.get("experts")
    rows = {
        "data": _sentence({"": data.get("dataset"), "classes": data.get("num_classes"), "images": _size(data)}),
        "fingerprint of the data": data.get("fingerprint"),
        "preprocessing": _sentence({"": seen.get("kind"), "digest": seen.get("digest")}),
        "experts": f"{len(experts)}, in {run.config.get('buffer_path')}" if isinstance(experts, list) else None,
        "ranking": _sentence({"": recipe.get("sort_method"), "digest": recipe.get("ranking")}),
        "versions": _sentence(run.arithmetic),
    }
    parts = [pairs({name: value for name, value in rows.items() if value}, "facts")]
    if not about:
        parts.append(Markup("<p>There is no set that says what it was made from.</p>"))
    if recipe:
        shown = {name: in_words(value) for name, value in sorted(recipe.items())}
        parts += [Markup("<h3>How the experts were trained</h3>"), pairs(shown, "many")]
    return joined(parts)


def _sentence(parts: Mapping[str, object]) -> str:
    return ", ".join(f"{name} {in_words(value)}".strip() for name, value in parts.items() if value is not None)


def _size(data: Mapping) -> str | None:
    if "size" not in data or "channels" not in data:
        return None
    return " x ".join(map(str, [*data["size"], *[data["channels"]] * (data["channels"] > 1)]))


def _settings(run: _Run) -> Markup:
    if not run.config:
        return Markup("<p>config.yaml does not say them.</p>")
    if run.command is None:
        return pairs({name: in_words(value) for name, value in run.config.items()}, "many")
    fields = run.command.settings.fields()
    chosen = differing(run.command.settings, run.config)
    others = {name: in_words(run.config[name]) for name in fields if name in run.config and name not in chosen}
    rows = [[name, in_words(value), fields[name].metadata["help"]] for name, value in chosen.items()]
    return joined(
        [
            Markup("<p>Those of stage 2 that are not at their defaults:</p>"),
            table(["setting", "value", "what it is"], rows, "plain"),
            Markup("<h3>At their defaults</h3>"),
            pairs(others, "many"),
        ]
    )


def _again(run: _Run) -> Markup:
    if run.command is None:
        return Markup("<p>It is not known which command has the settings in config.yaml.</p>")
    parts = []
    recipe = (run.about.get("provenance") or {}).get("buffer") or {}
    if experts := stage_1(run.config, recipe):
        parts += [Markup("<h3>1. Ranking and experts</h3>"), _shell(experts)]
        said = (
            "Experts record neither their seed nor how difficulty was scored. The run's seed and defaults stand here."
        )
        parts += [fill('<p class="note">$said</p>', said=said)]
    parts += [Markup("<h3>2. The synthetic set</h3>"), _shell(stage_2(run.command, run.config))]
    parts += [Markup("<h3>3. Its accuracy</h3>")]
    config, data = run.config, run.data.replace("/", "-")
    name = config.get("name") or run.name
    model = folder_of(str(config.get("model")))
    place = f"{config.get('log_dir')}/{data}/{config.get('ipc')}/{model}/{name}"  # not where it is now
    commands = [stage_3(run.config, place, path, found) for path, found in run.evaluations.items()]
    parts += map(_shell, commands or [stage_3(run.config, place)])
    return joined(parts)


def _shell(text: str) -> Markup:
    return fill('<pre tabindex="0">$text</pre>', text=text) if text else Markup()


# ---- a study


def _of_study(folder: Path) -> str:
    study = _Reading(folder)
    rows: list[dict] = []
    with study.noting("results.csv"), open(folder / "results.csv", encoding="utf-8", newline="") as file:
        known = ({key: row[key] for key in ("method", "ipc", "n")} | row for row in csv.DictReader(file))
        rows = [row | {"n": int(row["n"])} for row in known]
    lead = ""
    with study.noting("data.json"):
        data = json.loads((folder / "data.json").read_text(encoding="utf-8"))
        lead = _sentence({"": data.get("dataset"), "classes": data.get("num_classes"), "images": _size(data)})
    figures = {name: len({row[key] for row in rows}) for key, name in (("method", "methods"), ("ipc", "sizes"))}
    if (folder / "cells").is_dir():
        figures["cells recorded"] = len(list((folder / "cells").glob("*.json")))
    figures["seeds, at most"] = max((row["n"] for row in rows), default=0)
    figures["rows with cells that failed"] = sum(bool(row.get("failed")) for row in rows)
    command, _, content = study.text("asked.yaml").partition("\n")
    sections = {
        "Results": as_html(study.text("results.md")),
        "Plot": _plots(study),
        "Images": _study_pictures(study, rows),
        "The study": _shell(content),
        "Make it again": _shell(command.removeprefix("# ")),
    }
    sections = {name: part or Markup("<p>There is nothing yet.</p>") for name, part in sections.items()}
    top = [fill('<p class="lead">$lead</p>', lead=lead), pairs(figures, "figures"), study.notes()]
    return document(folder.resolve().name, "Study", joined(top), sections)


def _plots(study: _Reading) -> Markup:
    """``results.png``, and the figures that a study may have beside it."""
    parts = []
    for name, about in (
        ("results.png", "accuracy of each method"),
        ("curves.png", "accuracy along curves"),
        ("bits.png", "accuracy over bits per class"),
        ("layers.png", "matching loss of each layer"),
    ):
        if name == "results.png" or (study.folder / name).exists():
            with study.noting(name):
                parts.append(picture((study.folder / name).read_bytes(), about, "sheet"))
    return joined(parts)


def _study_pictures(study: _Reading, rows: Sequence[Mapping]) -> Markup:
    """Those of the report's rows, as many as fit."""
    parts, room = [], PICTURES
    for row in rows:
        name = f"pictures/{slug(row['method'])}_ipc{row['ipc']}.png"
        if not row["n"]:
            continue
        with study.noting(name):
            data = (study.folder / name).read_bytes()
            room -= len(data)
            if room < 0:
                study.missing.append("the pictures folder has more pictures than the page has room for")
                break
            title = f"{row['method']}, ipc {row['ipc']}"
            form = "<figure><figcaption>$title</figcaption>$shown</figure>"
            parts.append(fill(form, title=title, shown=picture(data, title, "pixels")))
    return fill('<div class="pictures">$parts</div>', parts=joined(parts)) if parts else Markup()
