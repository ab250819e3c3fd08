"""What version 0.1.0 left, whole or half-finished, is read, gone on with and finished as that version did it.

The files are in tests/data/earlier, where make.py says how they were made. On a machine like that which made them (see
its function ``machine``) what comes out has the same bytes, but for OF_KERNELS; on every machine it says the same, up
to rounding.
"""

import importlib.util
import json
import re
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open

from pad import cli

CHECKOUT = Path(__file__).resolve().parents[2]
EARLIER = CHECKOUT / "tests" / "data" / "earlier"
_spec = importlib.util.spec_from_file_location("make_earlier_files", EARLIER / "make.py")
make = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(make)
MADE = json.loads((EARLIER / "finished.json").read_text())
KEPT = {}  # by their digests, the files of begun and finished
for _file in filter(Path.is_file, (*EARLIER.glob("begun/**/*"), *EARLIER.glob("finished/**/*"))):
    KEPT[make.digest("/".join(_file.relative_to(EARLIER).parts[1:]), _file.read_bytes())] = _file
TINY_EXPERTS = EARLIER / "begun" / "tiny" / "buffer" / "ImageFolder" / "ConvNetD2W8"
OF_NETWORKS = ("accuracy", "accuracies", "mean", "std", "best", "best_accuracy", "standard_error")  # of few test images
# Of a number, and of a tensor by its name: parameters go through many steps, an accuracy is of 1,000 images.
CLOSE = 1e-3
CLOSE_TENSORS = {"params": 5e-3, "test_accuracy": 0.05}
# The CPU kernels add up in another order than those of version 0.1.0: what they compute has other last digits.
OF_KERNELS = re.compile(
    r".*_(EL2N|GraNd)\.safetensors|.*/(DC|DM)/(checkpoint\.safetensors|metrics\.jsonl|Normal/(images|synthetic)_.*)"
)


@pytest.fixture(scope="module")
def same_machine() -> bool:
    """Whether bytes must be the same."""
    return make.machine() == json.loads((EARLIER / "made_on.json").read_text())


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("earlier") / "images"
    make.make_images(root)
    return root


@pytest.fixture
def begun(images, tmp_path, monkeypatch) -> Path:
    """A copy of what was left, which is the current folder."""
    shutil.copytree(EARLIER / "begun", tmp_path, dirs_exist_ok=True)
    (tmp_path / "images").symlink_to(images)
    (tmp_path / "study.yaml").write_text(make.STUDY)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(program: str, argv: list[str]) -> None:
    """A command: a function of pad.cli, or a script that has none."""
    if hasattr(cli, program):
        assert getattr(cli, program)(argv) == 0
        return
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(sys, "argv", [make.SCRIPTS[program], *argv])
        runpy.run_path(str(CHECKOUT / make.SCRIPTS[program]), run_name="__main__")
    assert end.value.code == 0


def state(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Bytes and time of change of every file."""
    return {name: (data, (folder / name).stat().st_mtime_ns) for name, data in make.files(folder).items()}


def go_on(about: str, folder: Path, same_machine: bool) -> None:
    """Run the commands of a part, and compare all that they make."""
    before = state(folder)
    for program, argv in make.GO_ON[about]:
        run(program, argv)
    after = state(folder)
    made = MADE[about]
    assert {name for name, digest in made.items() if digest == "gone"} == before.keys() - after.keys()
    for name, kept in before.items():
        assert name in made or after[name] == kept, f"{name} was written again"
    for name, digest in made.items():
        if digest == "gone" or ("_best." in name and not same_machine):  # which is best, a test image can decide
            continue
        assert name in after, f"there is no {name}"
        if digest == "any":
            continue
        compare(folder / name, name, KEPT.get(digest))
        if not name.endswith(".yaml"):
            same = make.digest(name, after[name][0]) == digest
            assert same or not same_machine or OF_KERNELS.fullmatch(name), f"{name} has other bytes"


# ---- comparing a file with the earlier version's, up to rounding


def compare(path: Path, name: str, expected: Path | None) -> None:
    """Raise AssertionError where they differ in more. ``expected`` is None where other files have its numbers."""
    if path.suffix == ".pt":
        compare_pt(path, expected)
    elif "imported" in path.parts:
        compare_imported(path)
    elif path.suffix == ".safetensors":
        compare_safetensors(path, expected)
    elif path.suffix == ".yaml":  # there may be more settings now; compile says whether there is a C++ compiler
        ours, theirs = (yaml.safe_load(file.read_text()) for file in (path, expected))
        assert {key: ours.get(key, "nothing") for key in theirs} | {"compile": theirs["compile"]} == theirs
    elif path.suffix == ".jsonl":
        assert_close(*([json.loads(line) for line in file.read_text().splitlines()] for file in (path, expected)), name)
    elif path.suffix == ".json":
        assert_close(*(json.loads(make.plain(name, file.read_bytes())) for file in (path, expected)), name)
    elif path.suffix in (".csv", ".md"):
        compare_words(*(make.plain(name, file.read_bytes()).decode() for file in (path, expected)))
    else:
        raise AssertionError(f"{name} is of an unknown kind")


def assert_close(ours, theirs, where: str, tolerance: float = CLOSE) -> None:
    """Nested plain values, equal but for fractions."""
    if isinstance(theirs, dict):
        assert isinstance(ours, dict) and ours.keys() == theirs.keys(), where
        for key in theirs:
            assert_close(ours[key], theirs[key], f"{where}: {key}", 0.05 if key in OF_NETWORKS else tolerance)
    elif isinstance(theirs, list):
        assert isinstance(ours, list) and len(ours) == len(theirs), where
        for i, pair in enumerate(zip(ours, theirs)):
            assert_close(*pair, f"{where}: {i}", tolerance)
    elif isinstance(theirs, float):
        assert ours == pytest.approx(theirs, rel=tolerance, abs=tolerance), where
    else:
        assert ours == theirs, where


def compare_words(ours: str, theirs: str) -> None:
    """Reports of accuracies in %: equal words, and figures within five points."""
    number = re.compile(r"[-+]?\d+\.\d+")
    assert number.sub("#", ours) == number.sub("#", theirs)
    for figures in zip(number.findall(ours), number.findall(theirs)):
        assert float(figures[0]) == pytest.approx(float(figures[1]), abs=5)


def opened(path: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """Tensors and description of a safetensors file, without their checksums."""
    with safe_open(str(path), framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys() if name != "checksums"}
        return tensors, json.loads(file.metadata()["pad"])


def compare_safetensors(path: Path, expected: Path) -> None:
    """Tensors and their description."""
    (tensors, about), (theirs, description) = opened(path), opened(expected)
    for one in (about, description):
        one.pop("arithmetic", None)  # a checkpoint's: where it was written
    assert_close(about, description, path.name)
    assert tensors.keys() == theirs.keys()
    for name, tensor in theirs.items():
        atol = CLOSE_TENSORS.get(name, CLOSE)
        said = _said_of(path, name)
        torch.testing.assert_close(tensors[name], tensor, rtol=CLOSE, atol=atol, equal_nan=True, msg=said)


def _said_of(path: Path, name: str):
    return lambda text: f"{path.name}, {name}: {text}"


def compare_imported(path: Path) -> None:
    """An expert from the published form is the one that it was exported from."""
    (tensors, about), (theirs, description) = opened(path), opened(TINY_EXPERTS / path.name)
    assert torch.equal(tensors["params"], theirs["params"])
    for key in ("data", "model", "preprocessing", "parameters", "kind", "format"):
        assert about[key] == description[key]


def compare_pt(path: Path, expected: Path | None) -> None:
    """A published file: tensors of a set, which its own file has, too; those of an expert; or a ranking."""
    ours = torch.load(path, weights_only=True)
    if match := re.fullmatch(r"(images_zca|images|labels|lr)_(.+)", path.stem):
        key, tag = match[1].replace("images_zca", "pixels"), match[2]
        of_set, of_run = (path.with_name(f"{start}{tag}.safetensors") for start in ("", "synthetic_"))
        assert torch.equal(ours, opened(of_set if of_set.exists() else of_run)[0][key]), path.name
    elif match := re.fullmatch(r"replay_buffer_(\d)", path.stem):
        (expert,) = ours
        rows = torch.stack([torch.cat([parameter.flatten() for parameter in epoch]) for epoch in expert])
        assert torch.equal(rows, opened(TINY_EXPERTS / f"expert_000{match[1]}.safetensors")[0]["params"])
    else:
        assert torch.equal(ours, torch.load(expected, weights_only=True)), path.name


# ---- what was done is used


def test_a_buffer_grows_by_the_expert_that_the_earlier_version_would_have_trained(begun, same_machine):
    go_on("buffer", begun, same_machine)


def test_a_buffer_goes_to_the_published_form_and_back(begun, same_machine, monkeypatch):
    """With the ZCA that the earlier version has kept: none is fitted and kept beside it."""
    monkeypatch.setenv("PAD_CACHE", str(begun / "cache"))
    go_on("published buffer", begun, same_machine)
    assert len(list((begun / "cache").glob("*.safetensors"))) == 1


@pytest.mark.parametrize("command", [make.RANK_MINI, make.RANK_TINY], ids=["of a data set", "of a folder"])
def test_rankings_are_not_computed_again(begun, capsys, command):
    before = state(begun)
    run(*command)
    assert state(begun) == before
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[-2:]] == ["GraNd", "Herding"]


def test_a_ranking_in_the_published_form_is_used(begun):
    """One that is turned round gives a coreset of the images that were last."""
    ranking = begun / "tiny" / "rankings" / "ImageFolder_Herding.pt"
    rows = torch.load(ranking, weights_only=True)
    ranking.with_suffix(".safetensors").unlink()
    torch.save(rows.flip(1).contiguous(), ranking)
    run(*make.GO_ON["coreset"][0])
    _, about = opened(begun / "tiny" / "coresets_again" / "ImageFolder_Herding_2.safetensors")
    assert about["provenance"]["images"] == rows.flip(1)[:, :2].flatten().tolist()


def test_a_synthetic_set_is_scored_beside_real_images_that_experts_and_a_ranking_name(begun, same_machine):
    go_on("set", begun, same_machine)


def test_a_published_trio_is_scored(begun, same_machine):
    go_on("published set", begun, same_machine)


def test_a_coreset_is_the_same_when_it_is_selected_again(begun, same_machine):
    go_on("coreset", begun, same_machine)
    before, again = (next((begun / "tiny" / name).glob("*.safetensors")) for name in ("coresets", "coresets_again"))
    assert again.read_bytes() == before.read_bytes() or not same_machine


def test_an_old_coreset_is_scored(begun, same_machine):
    go_on("old coreset", begun, same_machine)


# ---- what was begun is finished


def test_a_study_runs_the_cells_that_are_missing(begun, same_machine):
    """The earlier version named sets as their cells, and so they are named where it has begun them."""
    for match in (re.match(r"study/sets/.*-seed1-[0-9a-f]{8}", name) for name in MADE["study"]):
        if match:
            (begun / match[0]).mkdir(parents=True, exist_ok=True)
    go_on("study", begun, same_machine)


@pytest.mark.parametrize("about", ["PAD", "DC", "DM"])
def test_a_run_goes_on_from_its_checkpoint(begun, same_machine, about):
    go_on(about, begun, same_machine)


def test_a_stopped_evaluation_trains_the_networks_that_are_missing(begun, same_machine):
    go_on("evaluation", begun, same_machine)


def test_a_stopped_evaluation_takes_over_what_was_found(begun, same_machine):
    """Seen by a score that no network has."""
    if not same_machine:
        pytest.skip("elsewhere training sets differ by rounding, so that networks are trained again")
    kept = next(begun.rglob("*.networks-0"))
    kept.write_text(re.sub(r'"accuracy": [\d.]+', '"accuracy": 0.123', kept.read_text()))
    run(*make.GO_ON["evaluation"][0])
    results = json.loads((begun / make.TINY_SET / "Normal" / "synthetic_last.evaluation.json").read_text())["results"]
    assert [accuracy for row in results for accuracy in row["accuracies"]].count(0.123) == 3


def test_a_stopped_ranking_takes_over_the_network_that_was_finished(begun, same_machine):
    """Its scores were turned round before they were kept: another ranking comes out where it is trained again."""
    go_on("half a ranking", begun, same_machine)
