"""The front doors with a network of one's own, made by a function of a file."""

import json
import shutil

import pytest
import yaml
from helpers import EXPERTS, RUN, assert_refused, command_line

from pad.cli import buffer, coreset, distill, evaluate, match_distributions, match_gradients, score, study
from pad.difficulty.ranking import Ranking
from pad.store import naming
from pad.store.naming import network_name
from pad.store.trajectories import TrajectoryStore
from pad.synthetic import SyntheticSet

NET = """
from torch import nn


def tiny(channels, classes, size):
    layers = [nn.Conv2d(channels, 8, 5, stride=3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*layers, nn.LazyLinear(classes))


def dropping(channels, classes, size):
    return nn.Sequential(nn.Dropout(0.1), tiny(channels, classes, size))


def ending(channels, classes, size):
    return nn.Sequential(nn.Conv2d(channels, classes, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
"""
OTHER = NET.replace("nn.ReLU()", "nn.Tanh()")  # of the same shapes
ON = {"num_eval": 1, "epoch_eval_train": 1}


@pytest.fixture(scope="module")
def made(tmp_path_factory, images):
    """A folder with experts, a synthetic set and their network; and the settings that all commands share."""
    root = tmp_path_factory.mktemp("own")
    (root / "nets").mkdir()
    (root / "nets" / "net.py").write_text(NET)
    data = {"dataset": "ImageFolder", "data_path": images, "buffer_path": root / "experts"}
    experts = {**data, "model": root / "nets" / "net.py:tiny", **EXPERTS, "score_repeats": 1, "batch_train": 12}
    assert buffer(command_line(**experts, num_experts=1)) == 0
    run = {**data, "model": root / "nets" / "net.py:tiny", **RUN, **ON, "log_dir": root / "runs", "ipc": 1}
    run |= {"Iteration": 2, "syn_steps": 2, "pix_init": "real", "zca": False}
    assert distill(command_line(**run)) == 0
    return root, experts, run


@pytest.fixture()
def place(made, tmp_path):
    """A copy of these, whose network may be changed."""
    root, experts, run = made
    shutil.copytree(root, tmp_path / "own")
    there = {"model": tmp_path / "own" / "nets" / "net.py:tiny", "buffer_path": tmp_path / "own" / "experts"}
    return tmp_path / "own", experts | there, run | there | {"log_dir": tmp_path / "own" / "runs"}


def synthetic(root):
    return root / "runs" / "ImageFolder" / "1" / "net.tiny" / "run"


def test_records_name_the_network_without_its_folder(made):
    root, experts, _ = made
    name = network_name(str(experts["model"]))
    assert TrajectoryStore.open(root / "experts" / "ImageFolder_NO_ZCA" / "net.tiny").metadata["model"] == name
    (ranking,) = (root / "experts" / "data_indices").glob("*.safetensors")
    assert Ranking.load(ranking).metadata["settings"]["model"] == name
    metadata = SyntheticSet.load(synthetic(root) / "Normal" / "synthetic_last.safetensors").metadata
    assert metadata["model"] == metadata["settings"]["model"] == name
    assert yaml.safe_load((synthetic(root) / "config.yaml").read_text())["model"] == name
    assert name.startswith("net.py:tiny@")


def test_experts_of_other_code_are_refused(place, capfd):
    root, experts, run = place
    assert buffer(command_line(**experts, num_experts=2)) == 0  # from another folder, but the same text
    assert distill(command_line("--resume", **run | {"Iteration": 3})) == 0
    (root / "nets" / "net.py").write_text(OTHER)
    words = ("model: net.py:tiny@", "in the buffer", "in the config")
    assert_refused(capfd, buffer, command_line(**experts, num_experts=3), words, root)
    assert_refused(capfd, distill, command_line(**run | {"name": "b"}), words, root)
    words = ("model: net.py:tiny@", "in the run", "in the config")
    assert_refused(capfd, distill, command_line("--resume", **run | {"Iteration": 4}), words, root)


def test_a_set_is_evaluated_by_its_network_or_by_others(place, monkeypatch, capfd):
    root, _, run = place
    made, model = synthetic(root), run["model"]
    data = {"synthetic": made, "data_path": run["data_path"], "baselines": "hard", **ON}
    asked = data | {"buffer_path": run["buffer_path"], "networks": f"{model},{model.parent}/net.py:dropping,MLP"}
    monkeypatch.setattr(naming, "_sources", {})  # as in another process
    words = ("model: there is no file net.py", "as path/to/net.py:tiny")
    assert_refused(capfd, evaluate, command_line(**data), words, root)
    assert evaluate(command_line(**asked, model=model)) == 0
    out = made / "Normal" / "synthetic_last.evaluation.json"
    networks = [each["network"].split("@")[0] for each in json.loads(out.read_text())["results"]]
    assert networks == [name for name in ("net.py:tiny", "net.py:dropping", "MLP") for _ in range(3)]
    assert str(root) not in out.read_text()
    monkeypatch.chdir(model.parent)  # where the name in the set's file finds it
    monkeypatch.setattr(naming, "_sources", {})
    assert evaluate(command_line(**data, networks="MLP", out=root / "other.json")) == 0
    assert [each["network"] for each in json.loads((root / "other.json").read_text())["results"]] == ["MLP"] * 3
    (root / "nets" / "net.py").write_text(OTHER)
    monkeypatch.setattr(naming, "_sources", {})
    words = ("model: net.py is not the file any more that it was in net.py:tiny@", "as path/to/net.py:tiny")
    assert_refused(capfd, evaluate, command_line(**data), words, root)
    words = ("settings model: net.py:tiny@", "settings networks: net.py:tiny@", "--overwrite")
    assert_refused(capfd, evaluate, command_line(**asked, model=model), words, root)


def test_gradient_and_distribution_matching_and_coresets(place, capfd):
    root, _, run = place
    shared = {name: run[name] for name in ("dataset", "data_path", "log_dir", "ipc", "model")} | ON
    for door, name in ((match_gradients, "dc"), (match_distributions, "dm")):
        assert door(command_line(**shared, Iteration=1, name=name, batch_real=4)) == 0
    words = ("depth_ratio: net.py:tiny@", "does not say what its blocks are")
    asked = shared | {"name": "b", "Iteration": 1, "depth_ratio": 0.5}
    assert_refused(capfd, match_distributions, command_line(**asked), words, root)
    ending = shared | {"name": "b", "model": f"{root}/nets/net.py:ending"}
    words = ("net.py:ending@", "does not end in a linear layer")
    assert_refused(capfd, match_distributions, command_line(**ending), words, root)
    data = {name: run[name] for name in ("dataset", "data_path")}
    scoring = command_line(**data, model=ending["model"], methods="GraNd", out=root / "rankings", repeats=1, epochs=1)
    assert_refused(capfd, score, scoring, words, root)
    chosen = data | {"model": run["model"], "ranking_path": root / "rankings", "out": root / "core", "method": "EL2N"}
    assert coreset(command_line(**chosen, score_repeats=1, score_epochs=1)) == 0


@pytest.mark.parametrize("door", [buffer, distill])
def test_a_network_with_dropout_is_refused_before_any_work(place, capfd, door):
    root, experts, run = place
    asked = (experts if door is buffer else run) | {"model": f"{root}/nets/net.py:dropping"}
    words = ("net.py:dropping@", "can be evaluated, but be no expert", "it has dropout")
    assert_refused(capfd, door, command_line(**asked), words, root)


@pytest.mark.parametrize("door", [buffer, distill, evaluate, score, coreset])
def test_a_file_that_is_not_there_is_refused_by_each_command(tmp_path, capfd, door):
    model = tmp_path / "none.py:net"
    assert_refused(capfd, door, ["--model", model], (f"model: there is no file {tmp_path / 'none.py'}",), tmp_path)


def test_a_yaml_file_names_a_network_as_it_names_paths(place, monkeypatch, capfd):
    root, experts, _ = place
    monkeypatch.chdir(root)  # outside any checkout: relative to the current folder
    settings = {name: str(value) for name, value in experts.items()} | {"model": "nets/net.py:tiny"}
    (root / "nets" / "buffer.yaml").write_text(yaml.safe_dump(settings))
    assert buffer(["--cfg", "nets/buffer.yaml", "--num_experts", "1"]) == 0
    assert "all 1 experts are in" in capfd.readouterr().err


@pytest.mark.slow
def test_a_study_of_an_own_network(place, monkeypatch):
    root, _, run = place
    monkeypatch.chdir(root)
    file = {
        "out": "study",
        "ipc": [1],
        "common": {"dataset": "ImageFolder", "data_path": str(run["data_path"]), "model": "nets/net.py:tiny", **ON},
        "methods": {"own": {"by": "DM", "Iteration": 1}, "published": {"by": "DM", "Iteration": 1, "model": "MLP"}},
        "evaluation": {"networks": "nets/net.py:dropping"},
    }
    (root / "study.yaml").write_text(yaml.safe_dump(file))
    assert study(["study.yaml"]) == 0
    cells = {path.name for path in (root / "study" / "cells").glob("*.json")}
    assert len(cells) == 2
    (root / "nets" / "net.py").write_text(OTHER)
    assert study(["study.yaml"]) == 0
    assert len(list((root / "study" / "cells").glob("*.json"))) == 4  # those of the other code stay
    file["evaluation"]["networks"] = "MLP,nets/net.py:tiny"
    (root / "study.yaml").write_text(yaml.safe_dump(file))
    assert study(["study.yaml"]) == 0
    lines = (root / "study" / "networks.csv").read_text().splitlines()[1:]
    assert [line.split(",")[:3] for line in lines] == [
        [method, "1", network]
        for method in ("own", "published")
        for network in ("MLP", naming.network_name("nets/net.py:tiny"))
    ]


@pytest.mark.slow
def test_evaluation_by_a_network_of_torchvision(place):
    root, _, run = place
    made, model = synthetic(root), run["model"]
    out = root / "torchvision.json"
    asked = {"synthetic": made, "model": model, "data_path": run["data_path"], "baselines": "none", "out": out, **ON}
    assert evaluate(command_line(**asked, networks="torchvision:resnet18", dsa_strategy="flip")) == 0
    (result,) = json.loads(out.read_text())["results"]
    assert result["network"] == "torchvision:resnet18" and result["n"] == 1
