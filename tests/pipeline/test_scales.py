"""Studies that leave parts to scales, bases, files of commands and a common store; the paper's studies."""

import dataclasses
import shlex
import shutil
from pathlib import Path

import pytest
import yaml
from helpers import CHECKOUT

from pad import cli
from pad.commands.coreset import CoresetSettings
from pad.commands.record import BufferSettings
from pad.commands.trajectory import DistillSettings
from pad.config import read_yaml
from pad.errors import InputError
from pad.study import study as studying
from pad.study.frame import frame_of
from pad.study.grid import Cell, Grid, StudySettings
from pad.study.scales import at_scale, from_base, merged

STUDY = """
scales: {tiny: tiny.yaml, large: large.yaml}
out: reports
reference: DM
tiny: {ipc: [1], stands_for: {1: 10}}
large: {ipc: [1, 10], methods: {DM only large: {base: DM}}}
methods:
  DM: {base: DM, curve: real, x: 0, published: {1: 26.0, 10: 48.9}}
  DM half: {base: [DM, half], tiny: {batch_real: 4}, curve: real, x: 0.5, published: {10: 49.5}}
"""
TINY = """
store: store
seeds: [0]
common: {dataset: FashionMNISTMini, train_per_class: 20, model: ConvNetD1W8, zca: False, device: cpu}
bases:
  DM: {by: DM, batch_real: 8, Iteration: 1, eval_it: 1000, skip_first_eva: True, num_eval: 1, epoch_eval_train: 1,
       by_ipc: {1: {lr_img: 2}}}
  half: {depth_ratio: 0, by_ipc: {1: {lr_net: 0.05}}}
evaluation: {num_eval: 2, epoch_eval_train: 1, by_ipc: {10: {epoch_eval_train: 3}}}
"""
LARGE = "common: {dataset: CIFAR10}\nbases: {DM: {by: DM}, half: {depth_ratio: 0}}\n"


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A study of two scales, in the current folder."""
    monkeypatch.chdir(tmp_path)
    for name, text in (("study", STUDY), ("tiny", TINY), ("large", LARGE)):
        (tmp_path / f"{name}.yaml").write_text(text)
    return tmp_path


def grid(path: Path, **more) -> Grid:
    return Grid.read(StudySettings.resolve({"study": str(path), **more}))


def cells(path: Path, **more) -> dict[tuple[str, int], Cell]:
    """Those of the first seed."""
    read = grid(path, **more)
    return {(cell.method, cell.ipc): cell for cell in dataclasses.replace(read, seeds=read.seeds[:1]).cells()}


def change(file: Path, **changes) -> None:
    file.write_text(yaml.safe_dump(merged(read_yaml(str(file)), changes), sort_keys=False))


# ---- scales and bases


def test_a_scale_lies_below_the_study_and_its_own_part_above(folder):
    content = {
        "scales": {"tiny": "tiny.yaml", "large": "large.yaml"},
        "seeds": [1],
        "evaluation": {"num_eval": 3, "tiny": {"num_eval": 4}, "large": {"num_eval": 5}},
        "methods": {"DM": {"by": "DM", "by_ipc": {1: {"lr_img": 1, "tiny": {"lr_img": 3}}}}},
        "large": {"ipc": [10]},
        "tiny": {"ipc": [1], "methods": {"DC": {"by": "DC"}}},
    }
    scale, found = at_scale(content, str(folder / "study.yaml"), "tiny")
    assert (scale, found["seeds"], found["ipc"], found["store"]) == ("tiny", [1], [1], "store")
    assert found["evaluation"] == {"num_eval": 4, "epoch_eval_train": 1, "by_ipc": {10: {"epoch_eval_train": 3}}}
    assert found["methods"] == {"DM": {"by": "DM", "by_ipc": {1: {"lr_img": 3}}}, "DC": {"by": "DC"}}
    assert not {"scales", "tiny", "large"} & found.keys()


def test_the_first_scale_is_meant_where_none_is_named(folder):
    assert grid(folder / "study.yaml").scale == "tiny"
    assert grid(folder / "study.yaml", scale="large").sizes == [1, 10]


def test_a_base_may_be_one_of_several_and_start_from_others():
    bases = {"a": {"x": 1, "by_ipc": {1: {"p": 1, "q": 1}}}, "b": {"base": "a", "y": 2}, "c": {"x": 3, "z": 3}}
    entry = {"base": ["b", "c"], "z": 4, "by_ipc": {1: {"q": 4}, 10: {"p": 4}}}
    expected = {"x": 3, "y": 2, "z": 4, "by_ipc": {1: {"p": 1, "q": 4}, 10: {"p": 4}}}
    assert from_base(entry, bases, "here") == expected
    assert from_base({"x": 5}, {}, "here") == {"x": 5}
    bases["a"]["base"] = "b"
    with pytest.raises(InputError, match="here: base: a starts from itself"):
        from_base({"base": "a"}, bases, "here")


def test_settings_come_from_base_row_scale_and_size(folder):
    half = cells(folder / "study.yaml")["DM half", 1].distilling
    assert (half.batch_real, half.depth_ratio, half.lr_img, half.lr_net) == (4, 0, 2, 0.05)
    assert {*cells(folder / "study.yaml", scale="large")} == {
        (row, ipc) for row in ("DM", "DM half", "DM only large") for ipc in (1, 10)
    }


def test_an_evaluation_may_differ_by_size(folder):
    change(folder / "study.yaml", tiny={"ipc": [1, 10], "stands_for": {1: 1}})
    found = cells(folder / "study.yaml")
    assert [found["DM", ipc].evaluation["epoch_eval_train"] for ipc in (1, 10)] == [1, 3]


def test_settings_of_a_command_s_own_file_lie_below_a_row_s(folder):
    (folder / "DM-1.yaml").write_text(
        "dataset: CIFAR10\nzca: True\ndata_path: x\nlog_dir: y\nipc: 7\nseed: 7\nlr_net: 0.5\nbatch_real: 16\n"
    )
    change(folder / "study.yaml", methods={"DM": {"cfg": "DM-{ipc}.yaml"}})
    cell = cells(folder / "study.yaml")["DM", 1]
    made = cell.distilling
    assert (made.lr_net, made.batch_real, made.lr_img) == (0.5, 8, 2), "of the file, of the base, of its size"
    assert (made.dataset, made.zca, made.ipc, made.seed) == ("FashionMNISTMini", False, 1, 0), "the study's"
    assert made.log_dir == str(folder / "store" / "sets")


@pytest.mark.parametrize(
    ("file", "changes", "more", "words"),
    [
        ("study", {}, ["--scale", "larg"], "has no scale 'larg'; the nearest is large"),
        ("study", {"scales": {"tiny": "gone.yaml"}}, [], "gone.yaml"),
        ("study", {"scales": {"tiny": 5}}, [], "scales: "),
        ("study", {"tiny": 5}, [], "tiny: 5 is not a list"),
        ("study", {"methods": {"DM": {"base": "DMM"}}}, [], "DM: base: 'DMM' is not in bases; the nearest is DM"),
        ("study", {"methods": {"DM": {"base": ["DM", 5]}}}, [], "DM: base: 5 is not in bases"),
        ("tiny", {"bases": {"half": 5}}, [], "bases: half is not a list"),
        (
            "tiny",
            {"buffers": {"b": {"time_limit": 5}}, "bases": {"DM": {"by": "PAD", "buffer": "b"}}},
            [],
            "buffers: b: time_limit is not for a part of a study",
        ),
        (
            "study",
            {"methods": {"a": {"by": "quantise", "of": "b", "by_ipc": {1: {}}}, "b": {"by": "DM", "by_ipc": [1]}}},
            [],
            "b: by_ipc is not a list",
        ),
        ("study", {"methods": {"DM": {"cfg": "gone.yaml"}}}, [], "gone.yaml"),
        ("study", {"methods": {"DM": {"published": 5}}}, [], "DM: published: 5 is not a list"),
        (
            "study",
            {"methods": {"DM": {"by_ipc": {10: {"published": 48.9}}}}},
            [],
            "DM: published is of the row, by size",
        ),
        ("study", {"methods": {"DM": {"published": {1: "x"}}}}, [], "DM: published: 1: 'x' is not an accuracy"),
        ("study", {"methods": {"DM": {"published": {1: 101}}}}, [], "DM: published: 1: 101 is not an accuracy"),
        ("study", {"methods": {"DM": {"published": {1: {"ConvNet": "nan"}}}}}, [], "is not an accuracy"),
        ("study", {"tiny": {"stands_for": {1: 50}}}, [], "nothing is published at 50 images per class"),
        ("study", {"tiny": {"stands_for": {3: 10}}}, [], "stands_for: 3 is not in ipc"),
        ("study", {"tiny": {"stands_for": {1: "x"}}}, [], "stands_for: 1: 'x' are not two sizes"),
        ("study", {"methods": {"DM": {"x": "left"}}}, [], "DM: curve: 'real' and x: 'left'"),
        ("study", {"figures": ["layer"]}, [], "figures: ['layer'] is not a list of layers and sets"),
        ("tiny", {"bases": {"DM": {"by_ipc": {"x": {}}}}}, [], "DM: by_ipc: 'x'"),
        ("tiny", {"evaluation": {"by_ipc": {10: {"num_evall": 1}}}}, [], "evaluation: "),
        ("tiny", {"evaluation": {"by_ipc": {"x": {}}}}, [], "evaluation: by_ipc: 'x'"),
        ("tiny", {"commons": {}}, [], "unknown key 'commons'; the nearest is common"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence_before_any_work(folder, capsys, file, changes, more, words):
    change(folder / f"{file}.yaml", **changes)
    assert cli.study([str(folder / "study.yaml"), *more]) == 2
    message = capsys.readouterr().err
    assert words in message and "Traceback" not in message and message.count("\n") == 1
    assert not (folder / "reports").exists() and not (folder / "store").exists()


def test_a_study_without_scales_has_none_to_choose(folder, capsys):
    study = read_yaml(str(folder / "tiny.yaml")) | {"ipc": [1], "methods": {"DM": {"base": "DM"}}}
    (folder / "plain.yaml").write_text(yaml.safe_dump(study))
    assert frame_of(grid(folder / "plain.yaml")).heading == ""
    assert cli.study([str(folder / "plain.yaml"), "--scale", "tiny"]) == 2
    assert "plain.yaml has no scales, so there is no scale 'tiny'" in capsys.readouterr().err


# ---- a common store


def test_studies_share_cells_by_what_they_are(folder, monkeypatch, capsys):
    """Whatever their rows are called, and whether a store or an earlier study's folder holds them."""
    found = {"set": "synthetic", "network": "ConvNetD1W8", "accuracies": [0.5, 0.75], "mean": 0.625}
    monkeypatch.setattr(studying, "evaluate", lambda *_, **__: {"results": [found]})
    first, second = ({"by": "coreset", "method": "Uniform", "lr": lr} for lr in (0.05, 0.1))
    plain = {key: value for key, value in read_yaml("tiny.yaml").items() if key != "store"}
    plain |= {"ipc": [1], "out": "before", "methods": {"of before": first}}
    Path("plain.yaml").write_text(yaml.safe_dump(plain))
    assert cli.study(["plain.yaml"]) == 0
    [made] = Path("before", "cells").glob("of_before-ipc1-seed0-*.json")

    rows = {"old": first | {"published": {10: 49.5}, "curve": "real", "x": 0}, "new": second}
    study = read_yaml("study.yaml") | {"reference": None, "methods": rows}
    Path("study.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    select, names = studying.select_coreset, []
    monkeypatch.setattr(
        studying, "select_coreset", lambda one, **more: names.append(Path(one.out).name) or select(one, **more)
    )
    assert cli.study(["study.yaml", "--store", "before"]) == 0
    [name] = names
    assert name.startswith("coreset-ipc1-seed0-"), "of the command, as every study calls it"
    [new] = (cell for key, cell in cells(Path("study.yaml"), store="before").items() if key[0] == "new")
    assert {path.name for path in Path("before", "cells").iterdir()} == {made.name, f"{new.name}.json"}
    assert new.made == name

    report = Path("reports", "tiny")
    assert {path.name for path in (report / "pictures").iterdir()} == {"old_ipc1.png", "new_ipc1.png"}
    text = (report / "results.md").read_text()
    assert text.startswith("Scale tiny: FashionMNISTMini, 20 training images per class, ConvNetD1W8. Seeds 0.")
    assert "| old | 49.50 | 62.50 | - | 1 |" in text and "## 1 image per class (published: 10)" in text
    assert {path.name for path in report.iterdir()} == {
        *("results.md", "results.csv", "results.png", "curves.png", "pictures", "asked.yaml", "data.json")
    }
    command = shlex.split((report / "asked.yaml").read_text().splitlines()[0])
    assert command[-4:] == ["--scale", "tiny", "--store", "before"]
    capsys.readouterr()

    change(Path("study.yaml"), methods={"another": second}, figures=["sets"])
    assert cli.study(["study.yaml", "--store", "before", "--out", "other"]) == 0
    assert len(names) == 1, "all are there"
    monkeypatch.setattr(studying, "select_coreset", lambda *_, **__: pytest.fail("a set was made again"))
    change(Path("tiny.yaml"), evaluation={"epoch_eval_train": 2})
    assert cli.study(["study.yaml", "--store", "before", "--out", "other"]) == 0
    change(Path("tiny.yaml"), evaluation={"epoch_eval_train": 1})
    assert Path("other", "sets_ipc1.png").is_file()
    assert cli.report(["reports/tiny", "--out", "page.html"]) == 0
    page = Path("page.html").read_text()
    assert "accuracy along curves" in page and "is not there" not in page

    asked = cells(report / "asked.yaml", store="before")  # without scales, for it holds what the scale's file says
    assert {key: cell.name for key, cell in asked.items()} == {
        key: cell.name for key, cell in cells(Path("study.yaml"), store="before").items() if key[0] != "another"
    }


def test_buffers_are_shared_by_what_they_are(folder):
    base = {"num_experts": 1, "train_epochs": 2, "batch_train": 50}
    follow = {"by": "PAD", "max_start_epoch": 1, "expert_epochs": 1, "Sequential_Generation": False}
    change(folder / "tiny.yaml", buffers={"one": base, "two": base, "other": base | {"train_epochs": 3}})
    rows = {f"along {name}": follow | {"buffer": name} for name in ("one", "two", "other")}
    change(folder / "study.yaml", methods=rows)

    def folders() -> list[str]:
        found = cells(folder / "study.yaml")
        return [Path(found[row, 1].buffer.buffer_path).name for row in rows]

    first, second, other = folders()
    assert first == second != other and first.startswith("experts-seed0-")
    before = first.replace("experts", "one")
    (folder / "store" / "buffers" / before).mkdir(parents=True)
    assert folders() == [before, before, other], "one of an earlier study"
    by_name = cells(folder / "study.yaml")
    assert by_name["along one", 1].name == by_name["along two", 1].name


# ---- the paper's studies

PAPER = CHECKOUT / "configs" / "studies" / "paper"
STUDIES = sorted(path for path in PAPER.glob("*.yaml") if "scales" in read_yaml(str(path)))
TABLES = "table2 table3a table3b table3c table4a table4b table4c table5 table6 figure2 figure3 figure5 figure6"
OURS = {
    "num_eval",
    "eval_it",
    "skip_first_eva",
    "epoch_eval_train",
    "batch_train",
}  # of the run, which studies evaluate
DEPTH = {"depth_ratio", "loss_ratio", "match_from", "match_to"}


def test_the_shipped_studies_are_studies():
    for path in (CHECKOUT / "configs" / "studies").rglob("*.yaml"):
        if path not in STUDIES and path.parent != PAPER:
            assert grid(path).cells()


def test_every_table_and_figure_has_its_study():
    assert {path.stem for path in STUDIES} == {*TABLES.split(), "depth", "ends"}
    without = {path.stem for path in STUDIES if not frame_of(grid(path)).published.rows}
    assert without == {"figure5", "figure6", "depth", "ends"}, "pictures, and two that the paper has not"


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_a_paper_study_is_one_at_both_scales(path):
    for scale, data in (("small", "ImageFolder"), ("full", "CIFAR10")):
        read = grid(path, scale=scale)
        frame = frame_of(read)
        assert cells(path, scale=scale) and read.seeds == [0, 1, 2] and read.shares
        assert frame.heading.startswith(
            f"Scale {scale}: {'CIFAR100' if path.stem == 'table3a' and scale == 'full' else data}"
        )
        published = frame.published
        for row in published.rows:
            assert any(
                published.of(row, ipc, network) is not None
                for ipc in read.sizes
                for network in ("", "mean", *read.scored(ipc, 0).pool)
            )
        assert not frame.points or frame.x != "x"


def published_settings(kind: type, name: str) -> dict:
    """Those of a published file that say what comes out, as ``kind`` understands them."""
    content = read_yaml(str(CHECKOUT / "configs" / name))
    given = kind.resolve(content)
    decided = {"dataset", "zca", "data_path", "buffer_path", "log_dir", "ipc", "model"}
    return {key: getattr(given, key) for key in content.keys() - decided}


@pytest.mark.parametrize(
    "path", [path for path in STUDIES if path.stem not in ("table3a", "depth", "ends")], ids=lambda path: path.stem
)
def test_trajectories_at_full_scale_have_the_paper_s_values(path):
    """All but what a row is about: the parameters that are matched, and the experts."""
    for (_, ipc), cell in cells(path, scale="full").items():
        if isinstance(cell.distilling, DistillSettings):
            expected = published_settings(DistillSettings, f"paper/CIFAR-10/IPC{ipc}.yaml")
            about = {key for key in expected if getattr(cell.distilling, key) != expected[key]}
            assert about <= DEPTH and cell.distilling.layer_losses
            experts = published_settings(BufferSettings, "paper/CIFAR-10/buffer.yaml")
            about = {key for key in experts if getattr(cell.buffer, key) != experts[key]}
            all_images = {"init_ratio", "add_end_epoch", "rm_epoch_first", "rm_epoch_second"}
            assert about in (set(), all_images, {"sort_method"}) or (
                path.stem == "table3c" and about <= {"init_ratio", "add_end_epoch"}
            )


def test_pad_at_full_scale_is_table_7_s():
    rows = {
        ("table4a", "EL2N"),
        ("table2", "PAD"),
        ("table3b", "both"),
        ("table3c", "IR 75 AEE 20"),
        ("table3a", "PAD"),
    }
    for stem, row in rows:
        folder = "CIFAR-100" if stem == "table3a" else "CIFAR-10"
        found = {ipc: cell for (name, ipc), cell in cells(PAPER / f"{stem}.yaml", scale="full").items() if name == row}
        assert found
        for ipc, cell in found.items():
            for settings, name in ((cell.distilling, f"IPC{ipc}"), (cell.buffer, "buffer")):
                expected = published_settings(type(settings), f"paper/{folder}/{name}.yaml")
                assert {key: getattr(settings, key) for key in expected} == expected
            assert cell.evaluation["epoch_eval_train"] == 1000 and cell.evaluation["num_eval"] == 5


def test_dc_and_dm_at_full_scale_have_published_values():
    for stem in ("table5", "table6"):
        for (row, ipc), cell in cells(PAPER / f"{stem}.yaml", scale="full").items():
            expected = published_settings(type(cell.distilling), f"CIFAR-10/{row[:2]}-IPC{min(ipc, 50)}.yaml")
            about = {key for key in expected if getattr(cell.distilling, key) != expected[key]}
            ours = {"pix_init"} if row.startswith("DC") else {"lr_img"}
            assert about - {"depth_ratio"} == (ours if ipc == 500 else set())


def test_cells_that_tables_have_in_common_are_one():
    def names(stem: str, **more) -> dict:
        return {key: cell.name for key, cell in cells(PAPER / f"{stem}.yaml", **more).items()}

    for scale in ("small", "full"):
        kept, curves, layers = (names(stem, scale=scale) for stem in ("table4b", "figure3", "figure5"))
        assert all(kept["kept 100", ipc] == layers["all", ipc] for _, ipc in layers)
        ipc = 50 if scale == "small" else 500
        assert all(kept[f"kept {100 - x}", ipc] == curves[f"TM masked {x}", ipc] for x in (0, 25, 50, 75))
        assert names("table4c", scale=scale)["all", 10] == kept["kept 100", 10]
        assert names("figure6", scale=scale)["all", 10] == kept["kept 100", 10]
        assert names("table3b", scale=scale)["FIEX", 10] == kept["kept 100", 10]
    several, networks = names("table2"), names("table3a")
    assert all(several[row, 50] == networks[row, 50] for row in ("random", "DATM", "PAD"))
    assert isinstance(cells(PAPER / "table2.yaml")["Glister", 50].distilling, CoresetSettings)


def test_cells_of_the_small_scale_keep_their_names():
    """A setting that changed them would have all that was computed computed again."""
    found = cells(PAPER / "figure3.yaml", device="cpu")
    names = {row: found[row, 10].name.split("-")[-1] for row in ("TM masked 25", "GM masked 25", "DM masked 25")}
    assert names == {"TM masked 25": "46e6d992", "GM masked 25": "d0d076cf", "DM masked 25": "ca7a488f"}
    assert found["TM masked 25", 10].buffer.buffer_path.endswith("-seed0-4deeb186")


@pytest.mark.slow
def test_a_paper_study_runs(tmp_path, monkeypatch):
    """Figure 5 and 6 in a moment: the small scale made smaller."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(PAPER, "paper")
    small = Path("paper", "small.yaml")
    data = {"dataset": "FashionMNISTMini", "train_per_class": 60, "model": "ConvNetD2W8", "zca": False}
    experts = {"train_epochs": 4, "num_experts": 1, "batch_train": 50}
    short = {"pix_init": "real", "Iteration": 3, "max_start_epoch": 2, "current_max_start_epoch": 1}
    change(small, common=data | {"score_repeats": 1, "score_epochs": 1}, seeds=[0], store="store")
    change(small, bases={"experts": experts, "curriculum": {"add_end_epoch": 1, "rm_epoch_first": 2}})
    change(small, bases={"TM": short | {"by_ipc": {1: short}}}, evaluation={"num_eval": 1, "epoch_eval_train": 1})
    assert cli.study(["paper/figure5.yaml", "--ipc", "1,10", "--out", "5"]) == 0
    lines = [line.split(",") for line in Path("5", "results.csv").read_text().splitlines()]
    assert [(line[1], line[4]) for line in lines[1:]] == [("1", "1"), ("10", "1"), ("50", "0")]
    assert Path("5", "layers.png").is_file()
    distill, names = studying.distill, []
    monkeypatch.setattr(studying, "distill", lambda one, **more: names.append(one.name) or distill(one, **more))
    assert cli.study(["paper/figure6.yaml", "--out", "6"]) == 0
    assert len(names) == 2, "that of all parameters is figure 5's"
    assert Path("6", "sets_ipc10.png").is_file()
