"""docs/EXTENDING.md: each of its files, written into an empty folder, runs its command and does what the page says."""

import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
import yaml

from pad.cli import buffer
from pad.commands.table import COMMANDS
from pad.data.sources import DATA_SETS, load_data
from pad.difficulty.methods import METHODS
from pad.difficulty.ranking import Ranking
from pad.nn.networks import FAMILIES
from pad.store.trajectories import TrajectoryStore
from pad.synthetic import SyntheticSet

CHECKOUT = Path(__file__).resolve().parent.parent
PAGE = (CHECKOUT / "docs" / "EXTENDING.md").read_text(encoding="utf-8")


@pytest.fixture()
def walk(tmp_path, monkeypatch):
    """A function that does what a section says in an empty folder, and returns it: write the file, give the command."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)  # as for a script that Python is given
    before = [(registry, dict(registry)) for registry in (METHODS, COMMANDS, DATA_SETS, FAMILIES)]

    def walk(title: str, *more: str, code: int = 0) -> Path:
        section = PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]
        (program,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
        (command,) = re.findall(r"```bash\n(.*?)```", section, re.DOTALL)
        file = program.removeprefix('"""').split(": ")[0]
        Path(file).write_text(program, encoding="utf-8")
        runner, *arguments = command.replace("\\\n", " ").split()
        if runner == "pad-buffer":  # of a network, whose file the command is given
            assert buffer([*arguments, *more]) == code
            return tmp_path
        assert [runner, arguments.pop(0)] == ["python", file]
        monkeypatch.setattr("sys.argv", [file, *arguments, *more])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(file, run_name="__main__")
        assert ended.value.code == code
        return tmp_path

    yield walk
    for registry, content in before:
        registry.clear()
        registry.update(content)


def test_a_difficulty_scorer(walk):
    ranking = Ranking.load(walk("A difficulty scorer") / "rankings" / "FashionMNISTMini_Norm.safetensors")
    assert ranking.metadata["method"] == "Norm" and ranking.metadata["ranked_by"] == "score"
    for row in ranking.rows:
        assert len(row) == 20 and (ranking.scores[row].diff() >= 0).all()  # short features first


def test_a_scorer_in_another_command(walk, monkeypatch):
    folder = walk("A difficulty scorer")
    made = walk("In the other commands") / "buffers" / "data_indices" / "FashionMNISTMini_Norm.safetensors"
    monkeypatch.delitem(sys.modules, "norm")
    assert Ranking.load(made).metadata["method"] == "Norm"
    store = TrajectoryStore.open(folder / "buffers" / "FashionMNISTMini_NO_ZCA" / "ConvNetW8")
    assert store.header(0)["settings"]["sort_method"] == "FashionMNISTMini_Norm"


def test_a_matching_objective(walk):
    run = walk("A matching objective") / "runs" / "FashionMNISTMini" / "2" / "ConvNetW8" / "mean"
    made = SyntheticSet.load(run / "Normal" / "synthetic_last.safetensors")
    assert made.metadata["settings"]["drop_hard"] == 0.2
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [event["loss"] for event in events if event["event"] == "match"]
    assert len(losses) == 21 and losses[-1] < 0.1 * losses[0]
    walk("A matching objective", "--Iteration", "25", "--resume")  # goes on where it ended
    assert json.loads((run / "finished.json").read_text())["iterations"] == 26


def test_a_data_set(walk):
    rankings = walk("A data set") / "rankings"
    ranking = Ranking.load(rankings / "Stripes_GraNd.safetensors")
    assert ranking.metadata["data"]["dataset"] == "Stripes" and ranking.metadata["data"]["size"] == [28, 28]
    assert [[i % 2 for i in row.tolist()] for row in ranking.rows] == [[0] * 30, [1] * 30]
    walk("A data set", "--res", "32", "--out", "larger")
    assert Ranking.load(rankings.parent / "larger" / "Stripes_GraNd.safetensors").metadata["data"]["size"] == [32, 32]
    data = load_data("Stripes", None)  # it needs no folder
    assert data.train_images.dtype == torch.uint8 and data.test_images.shape == (20, 1, 28, 28)
    assert data.identity == ranking.metadata["data"]


def test_a_network(walk):
    store = TrajectoryStore.open(walk("A network") / "buffers" / "FashionMNISTMini_NO_ZCA" / "tiny.tiny")
    assert store.metadata["model"].startswith("tiny.py:tiny@") and store.epochs(0) == 2


def test_a_network_of_blocks(walk):
    store = TrajectoryStore.open(walk("A network of blocks") / "buffers" / "FashionMNISTMini_NO_ZCA" / "Tiny2")
    assert store.metadata["model"] == "Tiny2" and store.epochs(0) == 2
    assert [name for name, _ in store.metadata["parameters"]][0] == "body.0.0.weight"


def test_a_setting(walk, capfd):
    run = walk("A setting") / "runs" / "FashionMNISTMini" / "2" / "ConvNetW8" / "noisy"
    assert yaml.safe_load((run / "config.yaml").read_text())["start_noise"] == 0.5
    made = SyntheticSet.load(run / "Normal" / "synthetic_last.safetensors")
    assert made.metadata["settings"]["start_noise"] == 0.5
    walk("A setting", "--start_noise=-1", "--overwrite", code=2)
    assert "start_noise: -1.0 is out of range" in capfd.readouterr().err
