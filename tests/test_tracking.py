import io
import json
import math
import sys
import types

import numpy as np
import pytest
import torch
import yaml
from helpers import events_in
from PIL import Image

from pad.errors import InputError
from pad.show.pictures import before_after, image_grid, save_grid
from pad.show.tables import result_table
from pad.store import run as tracking
from pad.store.files import save_picture
from pad.store.run import Place, Run, append_line, costs, finished_iterations, run_folder, run_state

SETTINGS = {"dataset": "CIFAR10", "ipc": 10, "lr_lr": 1e-5, "threshold": math.inf, "epochs": 50, "rho": [0.1, 0.2]}


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def start(folder, settings, **how):
    return Run.start(Place(folder=folder, **how), settings)


# The run folder


def test_the_folder_of_a_run():
    assert str(run_folder("logs", "CIFAR10", 10, "ConvNet", "first")) == "logs/CIFAR10/10/ConvNet/first"
    assert str(run_folder("logs", "ImageNet/imagenette", 1, "ConvNet", "a")) == "logs/ImageNet-imagenette/1/ConvNet/a"
    for name in ("", ".", "..", "a/b", "../a", "a\\b"):
        with pytest.raises(InputError, match="the run name"):
            run_folder("logs", "CIFAR10", 10, "ConvNet", name)


def test_the_states_of_a_run(tmp_path):
    folder = tmp_path / "run"
    assert run_state(folder) == "absent"
    with start(folder, SETTINGS) as run:
        assert run_state(folder) == "unfinished"
        run.finish(accuracy=torch.tensor(0.5), best=math.nan)
    assert run_state(folder) == "finished"
    assert json.loads((folder / "finished.json").read_text()) == {"accuracy": 0.5, "best": None}


def test_the_configuration_is_written_as_it_was_given(tmp_path):
    start(tmp_path / "run", SETTINGS | {"path": tmp_path, "size": (32, 32)}).close()
    text = (tmp_path / "run" / "config.yaml").read_text()
    assert yaml.safe_load(text) == SETTINGS | {"path": str(tmp_path), "size": [32, 32]}
    assert text.startswith("dataset: CIFAR10\nipc: 10\n")
    assert list(files(tmp_path)) == ["run/config.yaml"]


def test_a_configuration_that_cannot_be_written_leaves_none(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        start(tmp_path / "run", SETTINGS)
    assert files(tmp_path) == {} and run_state(tmp_path / "run") == "absent"


def test_a_finished_run_is_only_replaced_when_told_to(tmp_path):
    folder = tmp_path / "run"
    run = start(folder, SETTINGS)
    run.record("evaluate", 0, accuracy=0.1)
    run.finish()
    (folder / "checkpoint").write_text("old")
    before = files(folder)
    with pytest.raises(InputError, match="a finished run.*--overwrite") as error:
        start(folder, SETTINGS)
    assert str(folder) in str(error.value)
    assert files(folder) == before
    start(folder, SETTINGS, overwrite=True).close()
    assert list(files(tmp_path)) == ["run/config.yaml"] and run_state(folder) == "unfinished"


def test_a_finished_run_goes_on_when_resumed(tmp_path):
    folder = tmp_path / "run"
    run = start(folder, SETTINGS)
    run.record("evaluate", 0, accuracy=0.1)
    assert finished_iterations(folder) == 0
    run.finish(iterations=5)
    assert finished_iterations(folder) == 5
    run = start(folder, SETTINGS, resume=True)
    assert run_state(folder) == "unfinished" and finished_iterations(folder) == 0
    assert [event["accuracy"] for event in events_in(folder)] == [0.1]
    run.close()


def test_an_unfinished_run_is_resumed_or_replaced_when_told_to(tmp_path):
    folder = tmp_path / "run"
    run = start(folder, SETTINGS, resume=True)  # nothing there to resume: a fresh run
    run.record("step", 0, loss=1.0)
    run.close()
    before = files(folder)
    with pytest.raises(InputError, match="unfinished run.*--resume.*--overwrite"):
        start(folder, SETTINGS)
    with pytest.raises(InputError, match="resume and overwrite"):
        start(folder, SETTINGS, resume=True, overwrite=True)
    start(folder, SETTINGS, resume=True).close()
    assert files(folder) == before
    start(folder, SETTINGS, overwrite=True).close()
    assert list(files(folder)) == ["config.yaml"]


def test_a_run_is_resumed_only_with_its_own_settings(tmp_path):
    folder = tmp_path / "run"
    start(folder, SETTINGS).close()
    changed = SETTINGS | {"ipc": 50, "epochs": 60, "rho": (0.1, 0.2)}
    with pytest.raises(InputError) as error:
        start(folder, changed, resume=True)
    assert "epochs: 50 in the run, 60 in the config; ipc: 10 in the run, 50 in the config" in str(
        error.value
    ) and "rho" not in str(error.value)
    assert yaml.safe_load((folder / "config.yaml").read_text())["ipc"] == 10
    start(folder, changed, resume=True, may_differ={"ipc", "epochs"}).close()
    assert yaml.safe_load((folder / "config.yaml").read_text())["ipc"] == 50
    for damaged in ("a: [", "just words", ""):
        (folder / "config.yaml").write_text(damaged)
        with pytest.raises(InputError, match="config.yaml is damaged"):
            start(folder, SETTINGS, resume=True)


def test_a_setting_that_is_younger_than_a_run_had_its_default(tmp_path):
    folder = tmp_path / "run"
    start(folder, SETTINGS).close()
    newer = SETTINGS | {"tf32": False}
    defaults = {"tf32": False, "ipc": 1, "of another stage": 3}
    start(folder, newer, resume=True, defaults=defaults).close()
    start(folder, SETTINGS, overwrite=True).close()
    with pytest.raises(InputError, match="tf32: False in the run, True in the config"):
        start(folder, SETTINGS | {"tf32": True}, resume=True, defaults=defaults)


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "logs").write_text("")
    with pytest.raises(InputError, match="run folder .*logs.* there is a file"):
        start(tmp_path / "logs" / "run", SETTINGS)


# Metrics


def test_metrics_are_one_sorted_json_object_per_event(tmp_path):
    with start(tmp_path, SETTINGS) as run:
        run.record("step", 3, loss=torch.tensor(0.25), grad=math.nan, rows=[1.0, -math.inf], skipped=False)
        run.record("evaluate", 3, accuracy=np.float32(0.5), network="ConvNet")
        run.record_time("step", 3, 1.23456789)
        assert events_in(tmp_path)[1] == {"event": "evaluate", "iteration": 3, "accuracy": 0.5, "network": "ConvNet"}
    assert (tmp_path / "metrics.jsonl").read_text() == (
        '{"event": "step", "grad": null, "iteration": 3, "loss": 0.25, "rows": [1.0, null], "skipped": false}\n'
        '{"accuracy": 0.5, "event": "evaluate", "iteration": 3, "network": "ConvNet"}\n'
    )
    assert json.loads((tmp_path / "timing.jsonl").read_text()) == {"event": "step", "iteration": 3, "seconds": 1.234568}


def test_costs_are_over_all_sessions_of_what_is_in_the_end(tmp_path):
    """Of an iteration that was done twice the second time; a line that a kill has torn says nothing."""
    with start(tmp_path, SETTINGS) as run:
        for it, seconds in enumerate((1.0, 2.0, 4.0)):
            run.record_time("match", it, seconds)
        run.record_time("evaluation", 3, 100)
        run.record_peak(3, 5000)
        run.record_time("match", 3, 50)
    with open(tmp_path / "timing.jsonl", "a") as handle:
        handle.write('{"event": "ma')
    with start(tmp_path, SETTINGS, resume=True) as run:
        run.record_time("match", 2, 1000)  # joined to the torn line
        run.record_time("match", 3, 8)
        run.record_peak(4, 4000)
        run.record_peak(4, None)
        run.record_time("match", 4, 50)  # undone, and not done again
    assert costs(tmp_path, 4) == {"seconds": 15, "iterations": 4, "peak_memory": 5000}


def events_of(run, iterations):
    for it in iterations:
        if it % 2 == 0:
            run.record("evaluate", it, accuracy=it / 10)
        run.record("step", it, loss=1 / (it + 1))


@pytest.mark.parametrize("torn", ["", '{"event": "st', '{"event": "step", "iteration": 6, "loss": 0.1}'])
def test_a_resumed_run_records_what_an_uninterrupted_one_does(tmp_path, torn):
    with start(tmp_path / "whole", SETTINGS) as run:
        events_of(run, range(9))
    with start(tmp_path / "cut", SETTINGS) as run:
        events_of(run, range(6))
    with open(tmp_path / "cut" / "metrics.jsonl", "a") as handle:
        handle.write(torn)
    with start(tmp_path / "cut", SETTINGS, resume=True) as run:
        run.truncate_metrics(3)
        assert [e["iteration"] for e in events_in(tmp_path / "cut")] == [0, 0, 1, 2, 2, 3]
        events_of(run, range(4, 9))
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


def test_a_run_killed_before_its_first_checkpoint_begins_again(tmp_path):
    with start(tmp_path, SETTINGS) as run:
        events_of(run, range(2))
    with start(tmp_path, SETTINGS, resume=True) as run:
        run.truncate_metrics(-1)
        assert events_in(tmp_path) == []


def test_a_torn_line_never_runs_into_the_next_event(tmp_path):
    with start(tmp_path, SETTINGS) as run:
        run.record("step", 0)
    with open(tmp_path / "metrics.jsonl", "a") as handle:
        handle.write('{"event": ')
    with start(tmp_path, SETTINGS, resume=True) as run:
        run.record("step", 1)
        assert [e["iteration"] for e in events_in(tmp_path)] == [0, 1]


def test_a_disk_that_takes_half_a_line_leaves_the_lines_before(tmp_path, monkeypatch):
    path = tmp_path / "lines"
    append_line(path, "first\n")

    class Full(io.FileIO):
        def write(self, data):
            return super().write(data[:3])

    with monkeypatch.context() as patch:
        patch.setattr(tracking, "open", lambda path, mode, buffering: Full(path, "a"), raising=False)
        with pytest.raises(OSError, match="No space left on device") as error:
            append_line(path, "second\n")
    assert error.value.filename == str(path) and path.read_text() == "first\n"


def test_a_damaged_line_within_the_metrics_is_named(tmp_path):
    with start(tmp_path, SETTINGS) as run:
        for bad in ("nonsense", "[1]", '{"event": "step"}'):
            (tmp_path / "metrics.jsonl").write_text('{"event": "step", "iteration": 0}\n' + bad + "\n")
            with pytest.raises(InputError, match="metrics.jsonl: line 2 is not an event"):
                run.truncate_metrics(5)


# Trackers


def test_an_unknown_or_missing_tracker_stops_before_anything_is_written(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="'mlflow' is not one of none, tensorboard, wandb"):
        start(tmp_path / "run", SETTINGS, tracker="mlflow")
    for tracker, module in (("wandb", "wandb"), ("tensorboard", "torch.utils.tensorboard")):
        monkeypatch.setitem(sys.modules, module, None)  # what an import of a missing package meets
        with pytest.raises(InputError, match=rf"tracker {tracker} .*pip install -e"):
            start(tmp_path / "run", SETTINGS, tracker=tracker)
    assert not (tmp_path / "run").exists()


def test_tensorboard_gets_numbers_and_pictures_and_forgets_what_is_truncated(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    picture = np.zeros((4, 5, 3), np.uint8)
    with start(tmp_path, SETTINGS, tracker="tensorboard") as run:
        for it in range(4):
            run.record("step", it, loss=float(it), skipped=True, note="x", grad=math.nan)
        run.save_picture("images", picture, 0)
    with start(tmp_path, SETTINGS, resume=True, tracker="tensorboard") as run:
        run.truncate_metrics(1)
        run.record("step", 2, loss=20.0)
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert board.Tags()["scalars"] == ["step/loss"] and board.Tags()["images"] == ["images"]
    assert [(e.step, e.value) for e in board.Scalars("step/loss")] == [(0, 0.0), (1, 1.0), (2, 20.0)]
    assert (tmp_path / "pictures" / "images_000000.png").exists()


def test_wandb_gets_numbers_and_pictures(tmp_path, monkeypatch):
    calls = []

    class FakeRun:
        def log(self, values, step):
            calls.append((values, step))

        def finish(self):
            calls.append("finish")

    def init(**options):
        calls.append((options["name"], options["config"]["ipc"], options["dir"]))
        return FakeRun()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init, Image=lambda a: a.shape))
    with start(tmp_path / "run", SETTINGS, tracker="wandb") as run:
        run.record("step", 4, loss=0.5)
        run.save_picture("images", np.zeros((4, 5, 3), np.uint8), 4)
    assert calls == [("run", 10, str(tmp_path / "run")), ({"step/loss": 0.5}, 4), ({"images": (4, 5, 3)}, 4), "finish"]


# Pictures


def colours(count, channels=3, size=8):
    """Images of one colour each, all different and none white or the ink of the text."""
    values = torch.linspace(40, 200, count).round() / 255
    images = values.view(-1, 1, 1, 1).expand(-1, channels, size, size).clone()
    if channels == 3:
        images[:, 2] = 0
    return images


def where(picture, image):
    """Rows and columns covered by the colour of ``image``: (top, bottom, left, right), inclusive."""
    colour = (image[:, 0, 0] * 255).round().expand(3).numpy()
    ys, xs = np.nonzero((picture == colour).all(axis=2))
    assert len(ys), "the image is not in the picture"
    assert len(ys) == (ys.max() - ys.min() + 1) * (xs.max() - xs.min() + 1), "the image is not a whole rectangle"
    return ys.min(), ys.max(), xs.min(), xs.max()


@pytest.mark.parametrize("order", [[0, 0, 0, 1, 1, 1, 2, 2, 2], [2, 0, 1, 1, 2, 0, 0, 2, 1]])
def test_image_j_of_class_c_stands_in_row_c_column_j(order):
    classes = torch.tensor(order)
    images = colours(9)
    picture = image_grid(images, classes, ["ant", "bee", "cow"])
    places = {c: [where(picture, images[i]) for i in torch.nonzero(classes == c).flatten()] for c in range(3)}
    for c in range(3):
        assert len({place[:2] for place in places[c]}) == 1
        lefts = [place[2] for place in places[c]]
        assert lefts == sorted(lefts) == [place[2] for place in places[0]]
    tops = [places[c][0][0] for c in range(3)]
    assert tops == sorted(tops) and len(set(tops)) == 3
    top, bottom, left, right = places[0][0]
    assert bottom - top + 1 == right - left + 1 == 64  # 8 pixels, enlarged 8 times
    # a name in ink at the left of every row, nothing but white in the margins
    for c in range(3):
        label = picture[places[c][0][0] : places[c][0][1], : places[c][0][2]]
        assert (label < 100).all(axis=2).any()
    for edge in (picture[:16], picture[-16:], picture[:, :15], picture[:, -16:]):
        assert (edge == 255).all()


def test_enlargement_repeats_pixels():
    image = torch.arange(28 * 28).view(1, 1, 28, 28).remainder(251) / 255
    picture = image_grid(image, torch.tensor([0]), ["x"])
    tile = picture[16:100, -100:-16]  # 28 * 3 = 84 pixels inside the margins
    expected = (image[0, 0] * 255).round().byte().numpy().repeat(3, 0).repeat(3, 1)
    assert (tile == expected[..., None]).all()
    assert image_grid(image, torch.tensor([0]), ["x"], scale=1).shape[0] == 28 + 32


def test_one_channel_is_grey_and_values_outside_are_clamped():
    images = torch.stack([torch.full((1, 8, 8), -3.0), torch.full((1, 8, 8), 0.5), torch.full((1, 8, 8), torch.nan)])
    picture = image_grid(images, torch.tensor([0, 0, 0]), ["x"])
    row = picture[40, -16 - 3 * 66 + 2 : -16]
    assert (row[:64] == 0).all() and (row[66:130] == 128).all() and (row[132:196] == 0).all()
    with pytest.raises(InputError, match="1 or 3 channels; these have 4"):
        image_grid(torch.zeros(1, 4, 8, 8), torch.tensor([0]), ["x"])


def test_many_images_and_classes_are_capped_and_the_caption_says_so(monkeypatch):
    captions = []
    import PIL.ImageDraw

    text = PIL.ImageDraw.ImageDraw.text
    monkeypatch.setattr(
        PIL.ImageDraw.ImageDraw,
        "text",
        lambda self, xy, string, **rest: (captions.append(string), text(self, xy, string, **rest)),
    )
    names = [f"class {c}" for c in range(200)]
    classes = torch.arange(200).repeat_interleave(12)
    picture = image_grid(torch.rand(2400, 3, 64, 64), classes, names, caption="iteration 5")
    assert captions == ["iteration 5, first 10 of 12 images per class, first 50 of 200 classes", *names[:50]]
    assert max(picture.shape) < 2000
    captions.clear()
    image_grid(torch.rand(200, 3, 64, 64), torch.arange(200), names, caption="iteration 5")
    assert captions == ["iteration 5", *names]


def test_more_than_25_classes_stand_in_columns_of_equal_height():
    images = colours(30)
    picture = image_grid(images, torch.arange(30), [str(c) for c in range(30)])
    places = [where(picture, image) for image in images]
    assert [p[0] for p in places[:15]] == [p[0] for p in places[15:]] == sorted({p[0] for p in places})
    assert len({p[2] for p in places[:15]}) == 1 and places[15][2] > places[0][3] + 28


def test_a_long_class_name_is_cut_off():
    short = image_grid(colours(1), torch.tensor([0]), ["x"])
    assert image_grid(colours(1), torch.tensor([0]), ["English springer, " * 20]).shape[1] < short.shape[1] + 160


def test_a_class_name_is_that_of_the_class_number():
    image = colours(1)
    by_number = image_grid(image, torch.tensor([2]), ["ant", "bee", "cow"])
    assert np.array_equal(by_number, image_grid(image, torch.tensor([0]), ["cow"]))
    assert not np.array_equal(by_number, image_grid(image, torch.tensor([0]), ["ant"]))


def test_equal_pictures_give_equal_bytes(tmp_path):
    images = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    classes, names = torch.tensor([0, 0, 1, 1]), ["ant", "bee"]
    for name in ("a.png", "b.png"):
        save_grid(tmp_path / "deep" / name, images, classes, names, caption="iteration 3")
    data = files(tmp_path / "deep")
    assert list(data) == ["a.png", "b.png"] and data["a.png"] == data["b.png"]
    assert np.array_equal(
        np.asarray(Image.open(io.BytesIO(data["a.png"]))), image_grid(images, classes, names, caption="iteration 3")
    )


def test_before_stands_left_of_after(tmp_path):
    before, after = colours(4)[:2], colours(4)[2:]
    classes, names = torch.tensor([0, 1]), ["ant", "bee"]
    picture = before_after(before, after, classes, names, 500)
    half = picture.shape[1] // 2
    for c in range(2):
        old, new = where(picture, before[c]), where(picture, after[c])
        assert old[:2] == new[:2] and old[3] < half < new[2]
    save_picture(tmp_path / "p.png", picture)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "p.png")), picture)
    caption = picture[:40]
    assert not np.array_equal(caption[:, :half], caption[:, half:])  # iteration 0 / iteration 500


# Tables


def test_a_table_is_aligned():
    rows = [{"model": "ConvNet", "accuracy": 64.2345, "n": 5, "other": 1}, {"model": "VGG", "accuracy": None}]
    assert result_table(rows, ["model", "accuracy", "n"]) == (
        "model    accuracy  n\n-------  --------  -\nConvNet     64.23  5\nVGG             -  -"
    )
    assert result_table([], ["a", "bc"]) == "a  bc\n-  --"
