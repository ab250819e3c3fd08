"""The page of a run or a study: one file that needs nothing else, whatever is missing or hostile in the folder."""

import base64
import io
import json
import re
import shlex
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from helpers import CHECKOUT, assert_refused, files_in
from PIL import Image
from torch import Tensor

from pad import cli
from pad.commands.again import command_line, made_by, stage_2, stage_3
from pad.commands.distribution import DMSettings
from pad.commands.evaluate import EvaluationSettings
from pad.commands.page import CLASSES, PER_CLASS
from pad.commands.trajectory import DistillSettings
from pad.config import parse
from pad.show.html import Markup, fill, table
from pad.show.markdown import as_html
from pad.study.report import Outcome, markdown, summarise, write_report
from pad.synthetic import SyntheticSet

EARLIER = CHECKOUT / "tests" / "data" / "earlier" / "finished"
HOSTILE = "</title></style><script>alert('1')</script><img src=\"http://there.org/a\" onerror=x>&amp;${x}$"
VOID = {"meta", "img", "br", "link", "input", "hr"}


class Parsed(HTMLParser):
    """A page's elements, and its text by section; elements that are not closed in order are an error."""

    def __init__(self, source: str):
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(source)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open and self._open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def pictures(self, kind: str) -> list[dict]:
        return [attributes for tag, attributes in self.elements if tag == "img" and attributes.get("class") == kind]


def page_of(folder: Path, *more: str) -> Parsed:
    """Write a folder's page, and read it: it must stand alone."""
    assert cli.report([str(folder), *more]) == 0
    path = Path(more[more.index("--out") + 1]) if "--out" in more else folder / "report.html"
    source = path.read_text(encoding="utf-8")
    page = Parsed(source)
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids)), "ids are unique"
    for name, value in ((name, value) for _, attributes in page.elements for name, value in attributes.items()):
        if name in ("href", "xlink:href", "src", "srcset", "data", "action", "poster"):
            assert value.startswith(("#", "data:image/png;base64,")), (name, value[:80])
            assert not value.startswith("#") or value[1:] in ids, f"{value} leads nowhere"
        assert not name.startswith("on")
        for target in re.findall(r"url\(([^)]*)\)", value or ""):
            assert target.startswith("#") and target[1:] in ids
    assert not {tag for tag, _ in page.elements} & {"script", "link", "iframe", "object", "embed", "base", "form"}
    assert "@import" not in source and "@font-face" not in source
    return page


def make_set(path: Path, iteration: int, names: list[str], ipc: int = 2, size: int = 8, channels: int = 3) -> Tensor:
    """A synthetic set's file of random pixels, which it returns."""
    pixels = torch.rand(len(names) * ipc, channels, size, size, generator=torch.Generator().manual_seed(iteration))
    classes = torch.arange(len(names)).repeat_interleave(ipc)
    metadata = {
        "class_names": names,
        "iteration": iteration,
        "provenance": {"buffer": {"train_epochs": 3, "rho_max": 0.5}},
    }
    data = {"dataset": "Mine", "num_classes": len(names), "size": [size, size], "channels": channels}
    logits = torch.zeros(len(classes), len(names))
    kept = SyntheticSet(
        pixels - 0.5, logits, torch.tensor(0.02), classes, metadata | {"data": data}, stored_pixels=pixels
    )
    kept.save(path)
    return pixels


def make_run(folder: Path, names=("ant", "bee", "cat"), iterations: int = 6, **settings) -> Path:
    """What stage 2 leaves, without running it."""
    folder.mkdir(parents=True)
    asked = {"dataset": "Mine", "model": "ConvNetW8", "name": "mine", "log_dir": "here", "ipc": 2, "Iteration": 5}
    config = DistillSettings.resolve(asked | settings).as_dict() | {"experts": [0, 1]}
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    step = {"event": "match", "updated": True}
    lines = [step | {"iteration": i, "loss": 1 / (i + 1), "lr": 0.01, "skipped": i // 3} for i in range(iterations)]
    lines.append(
        {"event": "evaluation", "iteration": iterations, "network": "ConvNetW8", "accuracy": 0.5, "std": 0, "n": 1}
    )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for tag, at in (("0", 0), ("last", iterations)):
        make_set(folder / "Normal" / f"synthetic_{tag}.safetensors", at, list(names))
    (folder / "finished.json").write_text(json.dumps({"iterations": iterations, "best_accuracy": 0.5, "skipped": 1}))
    return folder


def entry(row: str, title: str, network: str = "ConvNetW8", accuracies=(0.5, 0.7), **more) -> dict:
    mean, std = float(np.mean(accuracies)), float(np.std(accuracies))
    error = float(np.std(accuracies, ddof=1) / np.sqrt(len(accuracies)))
    known = {"set": title, "row": row, "network": network, "augmented": True, "lr": 0.02, "tuned": False, "train": 0.9}
    return known | {"mean": mean, "std": std, "se": error, "n": 2, "accuracies": list(accuracies)} | more


def evaluated(folder: Path, results: list[dict], **more) -> None:
    """Put results of stage 3 into a run."""
    about = {
        "synthetic": {"iteration": 6},
        "settings": {"num_eval": 2, "seed": 3},
        "experts": None,
        "lr": 0.02,
        "epochs": 9,
    }
    (folder / "Normal" / "synthetic_last.evaluation.json").write_text(json.dumps({"results": results} | about | more))


@pytest.fixture
def run(tmp_path) -> Path:
    return make_run(tmp_path / "run")


# ---- of a run


def test_images_stand_side_by_side_by_class(run):
    shown = page_of(run).pictures("pixels")
    assert [each["alt"] for each in shown[:3]] == ["ant, iteration 0", "ant, iteration 6", "bee, iteration 0"]
    pixels = SyntheticSet.load(run / "Normal" / "synthetic_last.safetensors").pixels()[2:4]  # of bee
    picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(shown[3]["src"].split(",")[1]))))
    assert picture.shape == (8, 17, 4)
    expected = (pixels.double() * 255).round().permute(0, 2, 3, 1).numpy()
    np.testing.assert_array_equal(picture[:, :8, :3], expected[0])
    np.testing.assert_array_equal(picture[:, 9:, :3], expected[1])
    assert (picture[:, 8, 3] == 0).all() and (picture[:, :8, 3] == 255).all()


def test_grey_images(tmp_path):
    run = make_run(tmp_path / "run")
    for tag in ("0", "last"):
        make_set(run / "Normal" / f"synthetic_{tag}.safetensors", 0, ["ant"], channels=1)
    assert len(page_of(run).pictures("pixels")) == 2


@pytest.mark.parametrize(("classes", "ipc", "size"), [(100, 10, 32), (25, 50, 64), (2, 3, 224)])
def test_a_page_stays_small_and_says_what_it_leaves_out(tmp_path, classes, ipc, size):
    run = make_run(tmp_path / "run")
    (run / "Normal" / "synthetic_0.safetensors").unlink()
    make_set(run / "Normal" / "synthetic_last.safetensors", 6, [f"class {c}" for c in range(classes)], ipc, size)
    page = page_of(run)
    assert (run / "report.html").stat().st_size < 2_100_000
    shown = len(page.pictures("pixels"))
    assert 0 < shown <= CLASSES
    assert (f"first {shown} of {classes} classes" in page.text) == (shown < classes)
    if ipc > PER_CLASS:
        assert f"of {ipc} images per class" in page.text


def test_results_of_several_networks_and_training_sets(run):
    rows = [entry("syn", "synthetic", last={"mean": 0.55, "std": 0.1, "se": 0.07})]
    rows += [
        entry("syn", "synthetic", accuracies=(0.625, 0.685), tuned=True, lr=0.5, train=None),
        entry("random", "random real"),
    ]
    rows += [entry("syn", "synthetic", "VGG11", (0.8125, 0.8375))]
    metrics = {"hlr": {"mean": 0.123, "se": 0.004}, "lrs": {"mean": 0.25, "se": None}}
    evaluated(run, rows, protocol="dm", metrics=metrics, metrics_of={"ConvNetW8": metrics, "VGG11": {}})
    text = page_of(run).text
    assert "accuracy % ConvNetW8 VGG11 synthetic 60.00 ± 10.00 82.50 ± 1.25" in text
    assert "synthetic 60.00 ± 10.00 10.00 2 55.00 ± 7.00 90.00 0.02, learned" in text
    assert "synthetic 65.50 ± 3.00 3.00 2 - - 0.5, tuned" in text, "0.06 / 2"
    assert "ConvNetW8 0.123 ± 0.004 0.250" in text and "VGG11 - -" in text
    assert "hard label recovery" in text and "augmentation-robust" not in text
    assert "Protocol dm, epochs 9" in text and "of iteration 6" in text
    assert "% accuracy of 2 networks trained on the synthetic set 60.0 ± 10.0" in text


def test_results_of_version_0_1_0(run):
    old = {"accuracies": [0.5, 0.7], "mean": 0.6, "n": 2, "network": "ConvNetW8", "set": "synthetic", "std": 0.1}
    path = run / "Normal" / "synthetic_last.evaluation.json"
    path.write_text(json.dumps({"dataset": "Mine", "epochs": 7, "ipc": 2, "lr": 0.02, "results": [old], "seed": 4}))
    text = page_of(run).text
    assert "synthetic 60.00 ± 10.00 10.00 2 0.02, learned" in text
    assert "--epoch_eval_train 7" in text and "--num_eval 2" in text and "--seed 4" in text


def test_an_unfinished_run(run):
    (run / "finished.json").unlink()
    (run / "Normal" / "synthetic_last.safetensors").unlink()
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"event": "match", "iterat')  # a kill
    page = page_of(run)
    assert "Unfinished: 6 of 6 iterations" in page.text and "no later set is saved" in page.text
    assert {each["alt"] for each in page.pictures("pixels")} == {
        f"{name}, iteration 0" for name in ("ant", "bee", "cat")
    }
    make_set(run / "Normal" / "synthetic_4.safetensors", 4, ["ant", "bee", "cat"])
    make_set(run / "Normal" / "synthetic_10.safetensors", 10, ["ant", "bee", "cat"])
    assert "ant, iteration 10" in {each["alt"] for each in page_of(run).pictures("pixels")}, "10 is after 4"


def test_a_run_that_has_just_begun(tmp_path):
    run = make_run(tmp_path / "run")
    for name in ("metrics.jsonl", "finished.json"):
        (run / name).unlink()
    shutil.rmtree(run / "Normal")
    text = page_of(run).text
    for words in ("0 of 6 iterations", "metrics.jsonl is not there", "no images to show", "not been evaluated"):
        assert words in text


def test_what_is_damaged_is_named_and_the_rest_is_shown(run):
    evaluated(run, [entry("syn", "synthetic")])
    (run / "Normal" / "other.evaluation.json").write_text('{"results": [{}]}')
    (run / "config.yaml").write_text("- no settings")
    with open(run / "metrics.jsonl", "a") as file:
        file.write('nonsense\n{"event": "match", "iteration": 7, "loss": NaN, "lr": Infinity}\n')
        file.write(f'{{"event": "match", "iteration": {10**400}, "loss": 1}}\n')
    data = bytearray((run / "Normal" / "synthetic_0.safetensors").read_bytes())
    data[-1] ^= 1
    (run / "Normal" / "synthetic_0.safetensors").write_bytes(data)
    (run / "checkpoint.safetensors").write_bytes(b"")
    text = page_of(run).text
    for words in (
        "other.evaluation.json is damaged",
        "line 8 is not an event",
        "line 10 is not",
        "synthetic_0.safetensors is damaged",
    ):
        assert words in text
    assert (
        "config.yaml is damaged" in text and "checkpoint.safetensors is not a whole" in text and "60.00 ± 10.00" in text
    )


def test_without_sets_the_run_s_own_picture_is_shown(run):
    shutil.rmtree(run / "Normal")
    (run / "pictures").mkdir()
    for name in ("before_after_000006", "synthetic_000006"):
        Image.new("RGB", (4, 4)).save(run / "pictures" / f"{name}.png")
    assert [each["alt"] for each in page_of(run).pictures("sheet")] == ["before_after_000006"]


def test_hostile_names_are_text(tmp_path):
    run = make_run(tmp_path / "run", names=(HOSTILE, "bee\0\x1b"), buffer_path=HOSTILE, dsa_strategy="crop")
    evaluated(run, [entry("syn", HOSTILE, HOSTILE), entry("syn", "synthetic", "a--><b")])
    with open(run / "metrics.jsonl", "a") as file:
        file.write(
            json.dumps({"event": "evaluation", "iteration": 7, "network": HOSTILE, "accuracy": 0.5, "n": 1}) + "\n"
        )
    page = page_of(run)
    assert page.text.count(HOSTILE) >= 3 and "bee\ufffd\ufffd" in page.text


@pytest.mark.parametrize("system", ("PAD", "DC", "DM"))
def test_runs_of_earlier_versions(tmp_path, system):
    shutil.copytree(EARLIER / "tiny" / "runs" / "ImageFolder" / "1" / "ConvNetD2W8" / system, tmp_path / system)
    page = page_of(tmp_path / system)
    assert f"python distill/{system}.py --" in page.text and "1 image per class, ConvNetD2W8" in page.text


@pytest.mark.parametrize(
    ("model", "place"),
    [("ConvNetW8", "ConvNetW8"), ("torchvision:resnet18", "torchvision-resnet18"), ("my.py:net", "my.net")],
)
def test_the_last_command_names_the_run_s_folder(tmp_path, monkeypatch, model, place):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.py").write_text("")
    make_run(tmp_path / "run", model=model)
    assert f"--synthetic here/Mine/2/{place}/mine" in page_of(tmp_path / "run").text


def test_the_same_folder_gives_the_same_bytes(run, tmp_path):
    evaluated(run, [entry("syn", "synthetic")])
    shutil.copytree(run, tmp_path / "elsewhere" / "run")
    page_of(run)
    page_of(tmp_path / "elsewhere" / "run")
    first = (run / "report.html").read_bytes()
    assert first == (tmp_path / "elsewhere" / "run" / "report.html").read_bytes()
    page_of(run)
    assert first == (run / "report.html").read_bytes(), "a page that is there does not count"


def test_long_runs_have_short_curves(tmp_path):
    run = make_run(tmp_path / "run", iterations=20_000)
    assert "mean of 50 iterations" in page_of(run).text
    assert (run / "report.html").stat().st_size < 400_000


# ---- the commands that make it again


def test_commands_give_the_settings_back(tmp_path):
    asked = {
        "dataset": "Mine",
        "name": "a b",
        "Label_Model_Timestamp": -1,
        "threshold": None,
        "lr_img": 3.5,
        "zca": False,
    }
    config = DistillSettings.resolve(asked).as_dict() | {"experts": [0]}
    command = made_by(config)
    assert command.settings is DistillSettings
    words = shlex.split(stage_2(command, config).replace("\\\n", " "))
    assert words[:2] == ["python", "distill/PAD.py"]
    again = parse(DistillSettings, words[2:], "PAD.py").as_dict()
    assert again == {name: config[name] for name in again}


def test_a_trio_is_evaluated_without_what_is_asked_of_sets_of_others():
    config = DistillSettings.resolve({"factor": 2, "dataset": "ImageFolder"}).as_dict()
    file = Path("Normal/images_last.evaluation.json")
    for results in ({}, {"settings": {"num_eval": 2}}):
        words = shlex.split(stage_3(config, "run", file, results).replace("\\\n", " "))
        assert "--data_dir" in words and "--factor" not in words
        parse(EvaluationSettings, words[2:], "evaluation.py")


def test_a_run_s_settings_say_which_command_made_it():
    assert made_by(DMSettings.resolve({}).as_dict()).program == "DM.py"
    assert made_by({"dataset": "Mine", "of_my_own": 1}) is None and made_by({}) is None


def test_values_that_look_like_flags_stay_values():
    assert command_line("PAD.py", {"a": -1, "b": "x y", "c": None, "d": [0, 1]}) == (
        "python distill/PAD.py --a=-1 --b 'x y' --c none --d '[0,1]'"
    )


# ---- of a study


@pytest.fixture
def study(tmp_path) -> Path:
    folder = tmp_path / "study"
    results = [entry("syn", "synthetic"), entry("syn", "synthetic", "VGG11")]
    outcomes = [
        Outcome("A|<b>", 1, 0, [0.5], made="x", results=results),
        Outcome("B*", 1, 0, None, "the <disk> is full"),
    ]
    (folder / "cells").mkdir(parents=True)
    write_report(folder, outcomes)
    (folder / "data.json").write_text(json.dumps({"dataset": "Mine", "num_classes": 3, "size": [8, 8], "channels": 3}))
    (folder / "asked.yaml").write_text("# python scripts/study.py mine.yaml\nipc: [1]  # <b>\n")
    (folder / "pictures").mkdir()
    Image.new("RGB", (4, 4)).save(folder / "pictures" / "A_b_ipc1.png")
    return folder


def test_the_page_of_a_study(study):
    page = page_of(study)
    for words in ("A|<b> 50.00 - 1", "B*, ipc 1, seed 0: the <disk> is full", "mine.yaml", "ipc: [1] # <b>", "VGG11"):
        assert words in page.text
    assert len(page.pictures("sheet")) == 1 and [each["alt"] for each in page.pictures("pixels")] == ["A|<b>, ipc 1"]
    before = (study / "report.html").read_bytes()
    page_of(study)
    assert before == (study / "report.html").read_bytes()


def test_a_study_of_an_earlier_version(tmp_path):
    shutil.copytree(EARLIER / "study", tmp_path / "study")
    text = page_of(tmp_path / "study").text
    assert "asked.yaml is not there" in text and "PAD" in text and "easiest" in text


def test_a_study_that_has_just_begun(tmp_path):
    (tmp_path / "study" / "cells").mkdir(parents=True)
    assert "There is nothing yet" in page_of(tmp_path / "study").text


@pytest.mark.parametrize("text", ["ipc,n\n1,2\n", "method,ipc,n\n" + 'a,"' + "b" * 140000, "method,ipc,n\na\n"])
def test_a_damaged_table_of_a_study_is_named_and_the_rest_is_shown(study, text):
    (study / "results.csv").write_text(text)
    page = page_of(study)
    assert "results.csv is damaged" in page.text and "the <disk> is full" in page.text


# ---- what is refused


def test_wrong_folders_and_places_are_refused(run, tmp_path, capfd):
    (tmp_path / "empty").mkdir()
    (tmp_path / "mine.html").write_text("<p>mine</p>")
    (tmp_path / "evaluation.yaml").write_text("num_eval: 1\n")
    for argv, words in (
        ([], ("no run and no study is named",)),
        ([tmp_path / "nowhere"], ("there is no folder", "nowhere")),
        ([tmp_path / "empty"], ("empty holds no run of stage 2",)),
        ([run / "config.yaml"], ("names no run",)),
        ([tmp_path / "evaluation.yaml"], ("names no run",)),
        ([run, "--out", tmp_path / "mine.html"], ("mine.html is not a page", "--overwrite")),
        ([run, "--out", tmp_path / "empty"], ("is a folder",)),
        ([run, "--out", tmp_path / "mine.html" / "page.html"], ("nothing can be written",)),
    ):
        assert_refused(capfd, cli.report, argv, words, tmp_path)
    page_of(run, "--out", str(tmp_path / "mine.html"), "--overwrite")
    page_of(run, "--out", str(tmp_path / "mine.html"))


def test_settings_of_stage_3_name_the_run(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evaluation.yaml").write_text("synthetic: run\n")
    before = files_in(run)
    assert cli.report(["evaluation.yaml"]) == 0
    assert files_in(run).keys() - before.keys() == {"report.html"}


# ---- its parts


def test_text_is_escaped_and_markup_is_not():
    assert fill("<p>$a$b</p>", a="<&\"'$b\x00", b=Markup("<b>")) == "<p>&lt;&amp;&quot;&#x27;$b\ufffd<b></p>"


def test_numbers_stand_to_the_right():
    text = table(["a", "b", "c"], [["x", "1.5 ± 0.2", "-"], ["2", "-3", "0.1 of x"]])
    assert text.count('class="n"') == 3, "b"


def test_our_markdown_is_read_back():
    names = ["a|b", "*c*", "\\", "<d>", "e_f", "_g_"]
    page = Parsed(as_html(markdown(summarise([Outcome(name, 1, 0, [0.5]) for name in names]))))
    assert [word for word in page.words if word in names] == names
