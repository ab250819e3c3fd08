"""Convexified trajectories: points beside their formula, files of lines, and the command that writes them."""

import shutil

import pytest
import torch
from test_trajectories import SHAPES, P, names, numbers, write

from pad import cli
from pad.errors import InputError
from pad.store.published import export_published
from pad.store.trajectories import TrajectoryStore, expert_path, write_line

SIZES = [torch.Size(shape).numel() for _, shape in SHAPES]


def plain(rows, t) -> list[float]:
    """The point at t, number by number."""
    rows = rows.double().tolist()
    last, found, at = len(rows) - 1, [], 0
    for size in SIZES:
        steps = [sum((b[i] - a[i]) ** 2 for i in range(at, at + size)) ** 0.5 for a, b in zip(rows, rows[1:])]
        gone = [sum(steps[:epoch]) / sum(steps) for epoch in range(last + 1)]
        epoch = min(int(t), last - 1)
        beta = gone[epoch] + (t - epoch) * (gone[epoch + 1] - gone[epoch])
        found += [rows[0][i] + beta * (rows[last][i] - rows[0][i]) for i in range(at, at + size)]
        at += size
    return found


@pytest.fixture
def whole(tmp_path) -> TrajectoryStore:
    for expert, epochs in ((0, 5), (3, 8)):
        rows = numbers(epochs + 1, seed=expert)
        write(tmp_path / "whole", expert, rows, accuracy={epochs: 0.5})
    return TrajectoryStore.open(tmp_path / "whole")


@pytest.fixture
def lines(whole, tmp_path) -> TrajectoryStore:
    for expert in whole.experts:
        write_line(whole, expert, tmp_path / "lines")
    return TrajectoryStore.open(tmp_path / "lines")


TIMES = [0, 0.25, 1, 2.75, 4, 4.999, 5]


def test_points_are_those_of_the_formula(whole, lines):
    for store in (whole, lines):
        for expert in (0, 3):
            found = store.between(expert, TIMES)
            expected = torch.tensor([plain(whole.params(expert), t) for t in TIMES], dtype=torch.float64)
            assert found.dtype == torch.float64 and found.shape == (len(TIMES), P)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)
            assert torch.equal(found[0], whole.rows(expert, [0])[0].double())
        assert torch.equal(store.between(0, [5])[0], whole.rows(0, [5])[0].double())


def test_the_share_of_the_way_grows_from_0_to_1(whole):
    way = whole.way(3)
    assert way.shape == (9, len(SHAPES)) and (way.diff(dim=0) > 0).all()
    assert (way[0] == 0).all() and (way[-1] == 1).all()


def test_a_straight_trajectory_is_its_own_line(tmp_path):
    """In steps of any length, each tensor in another direction, one of them never moving."""
    first, way = numbers(2).mul(64).round()
    way[6:9] = 0
    write(tmp_path, 0, torch.stack([first + share / 16 * way for share in (0, 1, 5, 6, 14, 16)]))
    store = TrajectoryStore.open(tmp_path)
    torch.testing.assert_close(store.between(0, range(6)), store.params(0).double(), rtol=1e-14, atol=1e-14)
    assert torch.equal(store.way(0)[:, 1], torch.linspace(0, 1, 6, dtype=torch.float64))


def test_a_line_has_two_epochs_and_all_else_of_its_expert(whole, lines):
    assert lines.experts == whole.experts and lines.metadata == whole.metadata
    for expert in whole.experts:
        last = whole.epochs(expert)
        assert lines.is_line(expert) and not whole.is_line(expert) and lines.epochs(expert) == last
        assert lines.header(expert) == whole.header(expert) | {"kind": "line"}
        assert torch.equal(lines.rows(expert, [last, 0]), whole.rows(expert, [last, 0]))
        (found,), (expected,) = (list(store.figures(expert).items()) for store in (lines, whole))
        assert found[0] == expected[0] and torch.equal(found[1].nan_to_num(-1), expected[1].nan_to_num(-1))
        with pytest.raises(InputError, match="is a line: of epochs 0 to .* not 2"):
            lines.rows(expert, [0, 2])
        for store in (whole, lines):
            with pytest.raises(IndexError):
                store.between(expert, [last + 0.5])
    with pytest.raises(InputError, match="is a line"):
        export_published(lines, lines.folder / "published", 10)


def test_a_line_of_a_line_is_that_line(lines, tmp_path):
    write_line(lines, 3, tmp_path / "again")
    assert expert_path(tmp_path / "again", 3).read_bytes() == expert_path(lines.folder, 3).read_bytes()


@pytest.mark.parametrize("at", [0.3, 0.6, 0.99])
def test_a_damaged_line_is_refused(lines, at):
    path = expert_path(lines.folder, 0)
    data = bytearray(path.read_bytes())
    data[int(at * len(data))] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match="damaged"):
        store = TrajectoryStore.open(lines.folder)
        store.between(0, [1.5])
        store.figures(0)


# ---- the command


def test_the_command_writes_what_is_not_there(whole, lines, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    shutil.copy(expert_path(lines.folder, 3), out)
    kept = expert_path(out, 3).stat().st_ino
    assert cli.convexify_buffer([str(whole.folder), str(out)]) == 0
    assert f"wrote 2 experts as lines into {out}" in capsys.readouterr().out
    assert names(out) == names(lines.folder)
    assert all((out / name).read_bytes() == (lines.folder / name).read_bytes() for name in names(out))
    assert expert_path(out, 3).stat().st_ino == kept


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "give two folders"),
        (["whole"], "give two folders"),
        (["nowhere", "out"], "no expert trajectories in nowhere"),
        (["whole", "whole"], "is not the line of an expert in whole"),  # it would be gone
        (["whole", "file"], "file is not a folder"),
    ],
)
def test_the_command_refuses(whole, tmp_path, monkeypatch, capfd, argv, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    before = [path.read_bytes() for path in sorted(whole.folder.iterdir())]
    assert cli.convexify_buffer(argv) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert words in line
    assert [path.read_bytes() for path in sorted(whole.folder.iterdir())] == before and not (tmp_path / "out").exists()
