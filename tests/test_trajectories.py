import contextlib
import fcntl
import json
import os
import pickle
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pad import cli
from pad.data.preprocessing import fit_preprocessing
from pad.data.sources import load_data
from pad.errors import InputError
from pad.nn import networks
from pad.store import published as published_form
from pad.store.locks import claim
from pad.store.published import export_published, import_published, importable_files
from pad.store.tensors import save_tensors
from pad.store.trajectories import (
    TrajectoryStore,
    buffer_folder,
    describe,
    expert_lock,
    expert_path,
    recorded,
    write_expert,
)

REPOSITORY = Path(__file__).resolve().parents[1]
SHAPES = [("body.weight", (3, 2)), ("body.bias", (3,)), ("classifier.weight", (1, 3))]
P = 12


def description(**changes):
    arguments = {
        "data": {"dataset": "CIFAR10", "fingerprint": "ab12", "size": (32, 32)},
        "model": "ConvNet",
        "parameters": SHAPES,
        "preprocessing": {"kind": "zca", "eps": 0.1, "digest": "0f"},
    }
    return describe(**(arguments | changes))


def numbers(rows, seed=0):
    return torch.randn(rows, P, generator=torch.Generator().manual_seed(seed))


def write(folder, expert, params, settings=None, accuracy=None, **changes):
    figures = () if accuracy is None else ("test_accuracy",)
    settings = {"lr_teacher": 0.01} if settings is None else settings
    with write_expert(
        folder, expert, description(**changes), epochs=len(params) - 1, seed=7, settings=settings, figures=figures
    ) as record:
        for epoch, theta in enumerate(params):
            if accuracy is not None and epoch in accuracy:
                record(theta, test_accuracy=accuracy[epoch])
            else:
                record(theta)
    return expert_path(folder, expert)


def names(folder):
    return sorted(path.name for path in Path(folder).iterdir())


# --- the store ------------------------------------------------------------------------------------------------------


def test_round_trip(tmp_path):
    params = {0: numbers(4), 2: numbers(6, seed=1), 10_000: numbers(2, seed=2)}
    for expert, rows in params.items():
        write(tmp_path, expert, rows, settings={"rho": 0.01, "zca": True})
    assert names(tmp_path) == ["expert_0000.safetensors", "expert_0002.safetensors", "expert_10000.safetensors"]
    store = TrajectoryStore.open(tmp_path)
    assert len(store) == 3 and store.experts == [0, 2, 10_000] == recorded(tmp_path)
    assert [store.epochs(expert) for expert in store.experts] == [3, 5, 1]
    assert store.num_parameters == P
    assert store.metadata == {
        "data": {"dataset": "CIFAR10", "fingerprint": "ab12", "size": [32, 32]},
        "model": "ConvNet",
        "preprocessing": {"kind": "zca", "eps": 0.1, "digest": "0f"},
        "parameters": [["body.weight", [3, 2]], ["body.bias", [3]], ["classifier.weight", [1, 3]]],
    }
    header = store.header(2)
    assert (header["expert"], header["seed"], header["settings"]) == (2, 7, {"rho": 0.01, "zca": True})
    for expert, rows in params.items():
        assert torch.equal(store.rows(expert, range(len(rows))), rows)


def test_rows_are_the_asked_ones_and_private_copies(tmp_path):
    params = numbers(6)
    path = write(tmp_path, 0, params)
    before = path.read_bytes()
    store = TrajectoryStore.open(tmp_path)
    rows = store.rows(0, [4, 1, 4])
    assert rows.dtype == torch.float32 and torch.equal(rows, params[[4, 1, 4]])
    rows.zero_()
    assert path.read_bytes() == before and torch.equal(store.rows(0, [1])[0], params[1])
    assert store.rows(0, []).shape == (0, P)
    for epoch in (-1, 6):
        with pytest.raises(IndexError, match=f"epochs 0 to 5, not {epoch}"):
            store.rows(0, [1, epoch])


@pytest.mark.slow
def test_opening_and_reading_two_rows_does_not_read_the_file(tmp_path):
    """A file of 400 MB, nearly all hole, takes no disk; reading it would take 400 MB of memory."""
    epochs, width = 1000, 100_000
    path = write(tmp_path, 0, torch.zeros(2, width), parameters=[("w", (width,))])
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
    ones, zeros = (fill(width).numpy().tobytes() for fill in (torch.ones, torch.zeros))
    description = json.dumps([header["__metadata__"]["pad"], [["params", "F32", epochs + 1, width]]])
    checksums = torch.full((epochs + 2,), zlib.crc32(zeros))
    checksums[0], checksums[1 + 700] = zlib.crc32(description.encode()), zlib.crc32(ones)
    start = checksums.nbytes
    end = start + 4 * (epochs + 1) * width
    header["checksums"] = {"dtype": "I64", "shape": [epochs + 2], "data_offsets": [0, start]}
    header["params"] = {"dtype": "F32", "shape": [epochs + 1, width], "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with open(path, "wb") as handle:
        handle.write(struct.pack("<Q", len(text)) + text + checksums.numpy().tobytes())
        handle.truncate(8 + len(text) + end)
        handle.seek(8 + len(text) + start + 4 * 700 * width)
        handle.write(ones)
    probe = f"""
import resource, torch
from pad.store.trajectories import TrajectoryStore
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
rows = TrajectoryStore.open({str(tmp_path)!r}).rows(0, [700, 701])
assert rows.sum(1).tolist() == [{width}, 0]
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    out = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert int(out.stdout) < 64_000  # kB


def test_any_safetensors_reader_reads_the_file(tmp_path):
    params = numbers(3)
    path = write(tmp_path, 0, params, accuracy={0: 0.1, 2: 0.5})
    tensors = load_file(path)
    assert set(tensors) == {"checksums", "params", "test_accuracy"} and torch.equal(tensors["params"], params)
    with safe_open(path, framework="pt") as handle:
        assert json.loads(handle.metadata()["pad"])["kind"] == "trajectory"


def test_figures_not_measured_are_nan(tmp_path):
    write(tmp_path, 0, numbers(4), accuracy={0: 0.125, 3: 0.75})
    write(tmp_path, 1, numbers(4))
    store = TrajectoryStore.open(tmp_path)
    accuracy = store.figures(0)["test_accuracy"]
    assert accuracy[[0, 3]].tolist() == [0.125, 0.75] and accuracy[[1, 2]].isnan().all()
    assert store.figures(1) == {}


def test_a_snapshot_is_a_copy_without_a_graph_in_float32(tmp_path):
    theta = torch.zeros(P, dtype=torch.float64, requires_grad=True)
    with write_expert(tmp_path, 0, description(), epochs=1, seed=0, settings={}) as record:
        record(theta * 2 + 1)
        record(theta)
        with torch.no_grad():
            theta.fill_(5)
    assert TrajectoryStore.open(tmp_path).rows(0, [0, 1]).tolist() == [[1.0] * P, [0.0] * P]


def test_bytes_are_a_function_of_the_content(tmp_path):
    first, second = (
        write(tmp_path / name, 3, numbers(3), settings=settings, accuracy={1: 0.5}).read_bytes()
        for name, settings in (("a", {"x": 1, "y": 2}), ("b", {"y": 2, "x": 1}))
    )
    assert first == second
    assert write(tmp_path / "c", 3, numbers(3), settings={"x": 1, "y": 3}, accuracy={1: 0.5}).read_bytes() != first


# --- whole or absent ------------------------------------------------------------------------------------------------


def test_an_interrupted_expert_leaves_nothing_and_keeps_the_old_one(tmp_path):
    class Killed(Exception):
        pass

    for folder, survivors in ((tmp_path / "new", []), (tmp_path / "old", ["expert_0000.safetensors"])):
        if survivors:
            write(folder, 0, numbers(3))
        with pytest.raises(Killed):
            with write_expert(folder, 0, description(), epochs=2, seed=0, settings={}) as record:
                record(numbers(1)[0])
                assert recorded(folder) == [0] * len(survivors)
                raise Killed
        assert names(folder) == survivors
    assert torch.equal(TrajectoryStore.open(tmp_path / "old").rows(0, [0, 1, 2]), numbers(3))


def test_a_snapshot_too_few_too_many_or_of_another_size_is_an_error(tmp_path):
    with pytest.raises(RuntimeError, match="recorded 2 of 3"):
        with write_expert(tmp_path, 0, description(), epochs=2, seed=0, settings={}) as record:
            record(numbers(1)[0])
            record(numbers(1)[0])
    with pytest.raises(ValueError, match="snapshot 2 of expert 0"):
        with write_expert(tmp_path, 0, description(), epochs=1, seed=0, settings={}) as record:
            for _ in range(3):
                record(numbers(1)[0])
    with pytest.raises(ValueError, match=r"shape \[11\]"):
        with write_expert(tmp_path, 0, description(), epochs=1, seed=0, settings={}) as record:
            record(torch.zeros(11))
    assert names(tmp_path) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])
def test_a_diverged_expert_is_refused(tmp_path, value):
    theta = numbers(1)[0].double()
    theta[5] = value  # 1e300 is infinite in float32
    with pytest.raises(InputError, match="expert 4 .*after epoch 1"):
        with write_expert(tmp_path, 4, description(), epochs=2, seed=0, settings={}) as record:
            record(numbers(1)[0])
            record(theta)
    assert names(tmp_path) == []


def test_leftovers_of_dead_runs_are_ignored_then_removed_by_the_next_writer(tmp_path):
    for name in ("expert_0000.safetensors.4242-0123abcd.partial", "expert_0001.safetensors.4242-0123abcd.partial"):
        (tmp_path / name).write_bytes(b"half a file")
    for name in ("expert_001.safetensors", "expert_00003.safetensors"):
        (tmp_path / name).write_bytes(b"another name")
    with pytest.raises(InputError, match="no expert trajectories"):
        TrajectoryStore.open(tmp_path)
    living = tmp_path / "expert_0000.safetensors.4343-0123abcd.partial"
    with open(living, "wb") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        write(tmp_path, 0, numbers(2))
    assert names(tmp_path) == [
        "expert_0000.safetensors",
        "expert_0000.safetensors.4343-0123abcd.partial",
        "expert_00003.safetensors",
        "expert_001.safetensors",
    ]
    assert TrajectoryStore.open(tmp_path).experts == [0]


def test_a_writer_holds_the_lock_that_protects_its_file(tmp_path):
    with write_expert(tmp_path, 0, description(), epochs=1, seed=0, settings={}) as record:
        (partial,) = tmp_path.glob("*.partial")
        probe = f"import fcntl; fcntl.flock(open({str(partial)!r}), fcntl.LOCK_EX | fcntl.LOCK_NB)"
        assert "BlockingIOError" in subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True).stderr
        record(numbers(1)[0])
        record(numbers(1)[0])


# --- what is refused ------------------------------------------------------------------------------------------------


def test_no_store(tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(InputError) as caught:
            TrajectoryStore.open(folder)
        assert str(folder) in str(caught.value) and "buffer/buffer_CL.py" in str(caught.value)
        assert "import_buffer" not in str(caught.value)
    (tmp_path / "replay_buffer_0.pt").write_bytes(b"")
    with pytest.raises(InputError, match="scripts/import_buffer.py"):
        TrajectoryStore.open(tmp_path)


@pytest.mark.parametrize("length", [0, 4, 100, -1, -4 * P])
def test_a_truncated_file_is_refused(tmp_path, length):
    write(tmp_path, 0, numbers(3))
    path = write(tmp_path, 1, numbers(3))
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(InputError, match="expert_0001"):
        TrajectoryStore.open(tmp_path)


def test_a_flipped_bit_in_the_header_or_the_checksums_is_refused(tmp_path):
    params = numbers(2)
    path = write(tmp_path, 0, params)
    data = path.read_bytes()
    for position in range(len(data) - 2 * 4 * P):  # and in the checksums
        flipped = bytearray(data)
        flipped[position] ^= 1 << position % 7
        path.write_bytes(flipped)
        with pytest.raises(InputError, match=path.name):
            TrajectoryStore.open(tmp_path).rows(0, [0, 1])


def test_a_flipped_bit_in_a_row_is_found_when_that_row_is_read_and_the_others_are_used(tmp_path):
    params = numbers(4)
    path = write(tmp_path, 0, params, accuracy={0: 0.5})
    data = bytearray(path.read_bytes())
    data[data.index(params[2].numpy().tobytes()) + 5] ^= 16
    path.write_bytes(data)
    store = TrajectoryStore.open(tmp_path)
    assert torch.equal(store.rows(0, [3, 0, 1]), params[[3, 0, 1]]) and store.figures(0)["test_accuracy"][0] == 0.5
    with pytest.raises(InputError) as caught:
        store.rows(0, [1, 2])
    assert str(caught.value).startswith(
        f"{path} is damaged (params[2] does not match its checksum); remove it and record"
    )
    with pytest.raises(InputError, match=r"params\[2\]"):
        export_published(store, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_replaced_while_it_is_in_use_is_refused(tmp_path):
    write(tmp_path, 0, numbers(3))
    store = TrajectoryStore.open(tmp_path)
    write(tmp_path, 0, numbers(3, seed=1), settings={"rho": 2.0})
    with pytest.raises(InputError, match="not the file any more"):
        store.rows(0, [1])


def trajectory_metadata(**changes):
    return description() | {"kind": "trajectory", "format": 1, "expert": 0, "seed": 0, "settings": {}} | changes


@pytest.mark.parametrize(
    "params, metadata, message",
    [
        (torch.zeros(3, P), trajectory_metadata(kind="ranking"), "not a trajectory"),
        (torch.zeros(3, P), ["trajectory"], "carries no description"),
        (torch.zeros(3, P), trajectory_metadata(format=2), "format 2"),
        (torch.zeros(1, P), trajectory_metadata(), "damaged"),
        (torch.zeros(3, P + 1), trajectory_metadata(), "damaged"),
        (torch.zeros(3 * P), trajectory_metadata(), "damaged"),
        (torch.zeros(3, P, 1), trajectory_metadata(), "damaged"),
        (torch.zeros(3, P, dtype=torch.int32), trajectory_metadata(), "damaged"),
        (torch.zeros(3, P, dtype=torch.float64), trajectory_metadata(), "damaged"),
        (torch.zeros(3, 0), trajectory_metadata(parameters=[]), "damaged"),
        (torch.zeros(3, P), trajectory_metadata(parameters="abc"), "damaged"),
        (torch.zeros(3, P), trajectory_metadata(parameters=[["w", P]]), "damaged"),
        (torch.zeros(3, P), {k: v for k, v in trajectory_metadata().items() if k != "model"}, "damaged"),
        (torch.zeros(3, P), {k: v for k, v in trajectory_metadata().items() if k != "settings"}, "damaged"),
    ],
)
def test_headers_that_describe_something_else_are_refused(tmp_path, params, metadata, message):
    save_tensors(expert_path(tmp_path, 0), {"params": params}, metadata)
    with pytest.raises(InputError, match=f"expert_0000.*{message}"):
        TrajectoryStore.open(tmp_path)


def test_other_tensors_must_be_figures(tmp_path):
    save_tensors(expert_path(tmp_path, 0), {"loss": torch.zeros(3), "params": torch.zeros(3, P)}, trajectory_metadata())
    assert TrajectoryStore.open(tmp_path).figures(0)["loss"].tolist() == [0, 0, 0]
    save_tensors(expert_path(tmp_path, 0), {"loss": torch.zeros(2), "params": torch.zeros(3, P)}, trajectory_metadata())
    with pytest.raises(InputError, match="damaged"):
        TrajectoryStore.open(tmp_path)


def test_foreign_files_are_refused(tmp_path):
    path = expert_path(tmp_path, 0)
    save_file({"params": torch.zeros(3, P)}, path)
    with pytest.raises(InputError, match=path.name):
        TrajectoryStore.open(tmp_path)
    torch.save({"params": torch.zeros(3, P)}, path)
    with pytest.raises(InputError, match=path.name):
        TrajectoryStore.open(tmp_path)
    path.unlink()
    path.mkdir()
    with pytest.raises(InputError, match=path.name):
        TrajectoryStore.open(tmp_path)


def test_a_file_gone_or_damaged_after_opening_is_an_input_error(tmp_path):
    path = write(tmp_path, 0, numbers(3))
    store = TrajectoryStore.open(tmp_path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match=path.name):
        store.rows(0, [1])
    path.unlink()
    with pytest.raises(InputError, match=path.name):
        store.rows(0, [1])


MISMATCHES = [
    ({"model": "ConvNetD4"}, "model: ConvNet {in_the} buffer, ConvNetD4 {in_the} config"),
    (
        {"data": {"dataset": "CIFAR100", "fingerprint": "ffff", "size": (32, 32)}},
        "data dataset: CIFAR10 {in_the} buffer, CIFAR100 {in_the} config",
    ),
    (
        {"data": {"dataset": "CIFAR10", "fingerprint": "ffff", "size": (32, 32)}, "model": "MLP"},
        "data fingerprint: ab12 {in_the} buffer, ffff {in_the} config",
    ),
    (
        {"preprocessing": {"kind": "meanstd", "mean": (0.5,)}},
        "preprocessing kind: zca {in_the} buffer, meanstd {in_the} config",
    ),
    (
        {"preprocessing": {"kind": "zca", "eps": 0.1}},
        "preprocessing digest: 0f {in_the} buffer, nothing {in_the} config",
    ),
    ({"parameters": SHAPES[:2]}, "parameters: 3 tensors {in_the} buffer, 2 tensors {in_the} config"),
    (
        {"parameters": [SHAPES[0], ("body.bias", (4,)), ("classifier.weight", (2, 1))]},
        "shape of parameter body.bias: [3] {in_the} buffer, [4] {in_the} config",
    ),
]


@pytest.mark.parametrize("changes, sentence", MISMATCHES)
def test_a_store_made_for_something_else_is_refused(tmp_path, changes, sentence):
    write(tmp_path, 0, numbers(2))
    store = TrajectoryStore.open(tmp_path)
    store.refuse_other(description())
    with pytest.raises(InputError) as caught:
        store.refuse_other(description(**changes))
    remedy = "give another --buffer_path, or the settings it was made with"
    assert str(caught.value) == f"{tmp_path}: {sentence.format(in_the='in the')}; {remedy}"


def test_layer_names_may_differ(tmp_path):
    write(tmp_path, 0, numbers(2))
    renamed = description(parameters=[(name.upper(), shape) for name, shape in SHAPES])
    TrajectoryStore.open(tmp_path).refuse_other(renamed)


def test_experts_that_do_not_belong_together_are_refused(tmp_path):
    write(tmp_path, 0, numbers(2))
    write(tmp_path, 1, numbers(3), settings={"rho": 2.0})
    assert len(TrajectoryStore.open(tmp_path)) == 2
    write(tmp_path, 2, numbers(2), preprocessing={"kind": "zca", "eps": 0.2, "digest": "0f"})
    sentence = "expert_0002.safetensors: preprocessing eps: 0.2 in this expert, 0.1 in expert_0000.safetensors; "
    with pytest.raises(InputError, match=sentence):
        TrajectoryStore.open(tmp_path)


# --- folders --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, path",
    [
        (("CIFAR10", "ConvNet", True), "b/CIFAR10/ConvNet"),
        (("CIFAR100", "ConvNet", False), "b/CIFAR100_NO_ZCA/ConvNet"),
        (("CIFAR10", "ConvNet", False, "imagenette", 128), "b/CIFAR10_NO_ZCA/ConvNet"),
        (("FashionMNISTMini", "ConvNetW32", False), "b/FashionMNISTMini_NO_ZCA/ConvNetW32"),
        (("Tiny", "ConvNetD4", False), "b/Tiny/ConvNetD4"),
        (("ImageNet1K", "ConvNetD4", False), "b/ImageNet1K/ConvNetD4"),
        (("ImageNet", "ConvNetD5", False, "imagewoof", 128), "b/ImageNet/imagewoof/128/ConvNetD5"),
    ],
)
def test_folders_are_the_published_ones(arguments, path):
    assert buffer_folder("b", *arguments) == Path(path)


@pytest.mark.parametrize("subset, res", [(None, 128), ("imagenette", None)])
def test_imagenet_needs_a_subset_and_a_size(subset, res):
    with pytest.raises(InputError, match="needs a subset and a res"):
        buffer_folder("b", "ImageNet", "ConvNetD5", False, subset, res)


# --- the published form ---------------------------------------------------------------------------------------------


def published(count, epochs=3, shapes=SHAPES, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        [[torch.randn(shape, generator=generator) for _, shape in shapes] for _ in range(epochs + 1)]
        for _ in range(count)
    ]


def flat(expert):
    return torch.stack([torch.cat([tensor.reshape(-1) for tensor in tensors]) for tensors in expert])


def test_import_reads_every_expert_in_the_order_of_file_numbers(tmp_path):
    buffers = {number: published(2, epochs=3 + number, seed=number) for number in (0, 2, 10)}
    for number, experts in buffers.items():
        torch.save(experts, tmp_path / f"replay_buffer_{number}.pt")
    torch.save(published(1), tmp_path / "replay_buffer_best.pt")
    assert import_published(tmp_path, tmp_path / "store", description()) == 6
    store = TrajectoryStore.open(tmp_path / "store")
    store.refuse_other(description())
    expected = [flat(expert) for number in (0, 2, 10) for expert in buffers[number]]
    assert store.experts == list(range(6))
    for expert, rows in enumerate(expected):
        assert store.epochs(expert) == len(rows) - 1
        assert torch.equal(store.rows(expert, range(len(rows))), rows)
    assert store.header(3)["settings"] == {"imported": "replay_buffer_2.pt", "position": 1}


def test_import_takes_parameters_and_the_file_format_of_old_torch(tmp_path):
    experts = [[[torch.nn.Parameter(tensor) for tensor in tensors] for tensors in expert] for expert in published(1)]
    torch.save(experts, tmp_path / "replay_buffer_0.pt", _use_new_zipfile_serialization=False)
    assert import_published(tmp_path, tmp_path, description()) == 1
    assert torch.equal(TrajectoryStore.open(tmp_path).rows(0, range(4)), flat(published(1)[0]))


def test_export_is_the_published_form_and_a_round_trip_is_bit_for_bit(tmp_path):
    experts = published(5)
    experts[0][0][0][0, 0] = -0.0
    torch.save(experts, tmp_path / "replay_buffer_0.pt")
    import_published(tmp_path, tmp_path / "store", description())
    paths = export_published(TrajectoryStore.open(tmp_path / "store"), tmp_path / "out", save_interval=2)
    assert [path.name for path in paths] == names(tmp_path / "out") == [f"replay_buffer_{k}.pt" for k in range(3)]
    files = [torch.load(path, weights_only=True) for path in paths]
    assert [len(file) for file in files] == [2, 2, 1]
    exported = [expert for file in files for expert in file]
    for expert, original in zip(exported, experts, strict=True):
        assert type(expert) is list and type(expert[0]) is list
        for tensors, originals in zip(expert, original, strict=True):
            for tensor, wanted in zip(tensors, originals, strict=True):
                assert tensor.dtype == torch.float32 and tensor.shape == wanted.shape
                assert tensor.numpy().tobytes() == wanted.numpy().tobytes()
                assert tensor.untyped_storage().nbytes() == 4 * tensor.numel()
    assert import_published(tmp_path / "out", tmp_path / "again", description()) == 5
    for expert in range(5):  # but for the note of where an expert came from, the same file
        first, second = (load_file(expert_path(tmp_path / folder, expert)) for folder in ("store", "again"))
        assert first.keys() == second.keys()
        assert first["params"].numpy().tobytes() == second["params"].numpy().tobytes()


def test_export_refuses(tmp_path):
    write(tmp_path, 0, numbers(2))
    store = TrajectoryStore.open(tmp_path)
    with pytest.raises(InputError, match="save_interval must be 1 or more, got 0"):
        export_published(store, tmp_path, save_interval=0)
    (tmp_path / "replay_buffer_3.pt").write_bytes(b"mine")
    with pytest.raises(InputError, match="already holds replay_buffer_3.pt"):
        export_published(store, tmp_path)
    assert (tmp_path / "replay_buffer_3.pt").read_bytes() == b"mine"


def test_import_refuses_a_folder_without_buffers_or_with_experts(tmp_path):
    with pytest.raises(InputError, match="no replay_buffer_<number>.pt"):
        importable_files(tmp_path, tmp_path)
    torch.save(published(1), tmp_path / "replay_buffer_0.pt")
    path = write(tmp_path, 7, numbers(2))
    before = path.read_bytes()
    with pytest.raises(InputError, match="already holds expert_0007.safetensors"):
        import_published(tmp_path, tmp_path, description())
    assert names(tmp_path) == ["expert_0007.safetensors", "replay_buffer_0.pt"] and path.read_bytes() == before


def test_import_refuses_a_folder_that_others_write_to(tmp_path, monkeypatch):
    """Before it begins, and at the first expert that another process writes or has written since."""
    torch.save(published(3), tmp_path / "replay_buffer_0.pt")
    store = tmp_path / "store"
    with claim(expert_lock(store, 5)), pytest.raises(InputError, match=f"being written by process {os.getpid()} on"):
        importable_files(tmp_path, store)
    assert not store.exists()

    flat_snapshots = published_form._flat_snapshots

    def meanwhile(*args):
        act(store)
        return flat_snapshots(*args)

    monkeypatch.setattr(published_form, "_flat_snapshots", meanwhile)
    with contextlib.ExitStack() as stack:
        act = lambda folder: stack.enter_context(claim(expert_lock(folder, 1)))  # noqa: E731
        with pytest.raises(InputError, match="expert 1 in .* is being written"):
            import_published(tmp_path, store, description())
    assert not list(store.glob("*"))
    act = lambda folder: expert_path(folder, 7).exists() or write(folder, 7, numbers(2))  # noqa: E731
    with pytest.raises(InputError, match="another process has written experts into"):
        import_published(tmp_path, store, description())
    assert names(store) == ["expert_0007.safetensors"], "which is not ours to remove"


def aliased():
    state = [torch.randn(shape) for _, shape in SHAPES]
    return [state] * 4


def changed(change):
    def build():
        expert = published(1)[0]
        change(expert)
        return expert

    return build


def set_at(epoch, index, value):
    return changed(lambda expert: expert[epoch].__setitem__(index, value))


BAD_EXPERTS = [
    (aliased, "all 4 epochs are identical"),
    (lambda: [[tensor.clone() for tensor in tensors] for tensors in aliased()], "all 4 epochs are identical"),
    (set_at(2, 1, torch.zeros(4)), r"epoch 2: parameter body.bias has shape \[4\], in ConvNet it is \[3\]"),
    (set_at(0, 0, torch.zeros(2, 3)), r"epoch 0: parameter body.weight has shape \[2, 3\]"),
    (set_at(3, 1, torch.full((3,), float("nan"))), "epoch 3: the parameters are not finite"),
    (set_at(3, 1, torch.tensor([0, 1, float("inf")])), "epoch 3: the parameters are not finite"),
    (set_at(1, 1, torch.zeros(3, dtype=torch.float64)), "epoch 1: parameter body.bias is not a dense float32"),
    (set_at(1, 1, torch.zeros(3).to_sparse()), "epoch 1: parameter body.bias is not a dense float32"),
    (set_at(1, 1, [0.0, 0.0, 0.0]), "epoch 1: parameter body.bias is not a dense float32"),
    (changed(lambda expert: expert[1].pop()), "epoch 1 has 2 parameter tensors, ConvNet has 3"),
    (changed(lambda expert: expert.__setitem__(1, torch.zeros(P))), "epoch 1 is not a list of parameter tensors"),
    (lambda: published(1, epochs=0)[0], "not a list of two or more epochs"),
    (lambda: torch.zeros(4, P), "not a list of two or more epochs"),
]


@pytest.mark.parametrize("make, message", BAD_EXPERTS)
def test_import_refuses_what_is_no_trajectory_and_leaves_nothing(tmp_path, make, message):
    torch.save(published(1), tmp_path / "replay_buffer_0.pt")
    torch.save([published(1)[0], make()], tmp_path / "replay_buffer_1.pt")
    with pytest.raises(InputError, match=f"replay_buffer_1.pt, expert 1.*{message}"):
        import_published(tmp_path, tmp_path / "store", description())
    assert not (tmp_path / "store").exists() or names(tmp_path / "store") == []


@pytest.mark.parametrize("value", [[], {}, torch.zeros(3)])
def test_import_refuses_files_that_are_no_list_of_experts(tmp_path, value):
    torch.save(value, tmp_path / "replay_buffer_0.pt")
    with pytest.raises(InputError, match="replay_buffer_0.pt is not a list of experts"):
        import_published(tmp_path, tmp_path, description())


def test_import_refuses_damaged_files(tmp_path):
    path = tmp_path / "replay_buffer_0.pt"
    torch.save(published(1), path)
    data = path.read_bytes()
    for content in (b"", b"text", data[:100], data[: len(data) // 2], data[:-1]):
        path.write_bytes(content)
        with pytest.raises(InputError, match="replay_buffer_0.pt"):
            import_published(tmp_path, tmp_path, description())
    assert names(tmp_path) == ["replay_buffer_0.pt"]


class Malicious:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("zipped", [True, False])
def test_import_never_runs_code(tmp_path, zipped):
    target = tmp_path / "code ran"
    experts = published(1) + [Malicious(target)]
    torch.save(experts, tmp_path / "replay_buffer_0.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(InputError, match="replay_buffer_0.pt.*not loaded"):
        import_published(tmp_path, tmp_path, description())
    (tmp_path / "replay_buffer_0.pt").write_bytes(pickle.dumps(experts))
    with pytest.raises(InputError, match="replay_buffer_0.pt"):
        import_published(tmp_path, tmp_path, description())
    assert names(tmp_path) == ["replay_buffer_0.pt"]


# --- the scripts ----------------------------------------------------------------------------------------------------


FLAGS = ["--dataset", "FashionMNISTMini", "--model", "ConvNetD1W8", "--source", "theirs", "--buffer_path", "ours"]


@pytest.fixture
def theirs(tmp_path, monkeypatch):
    """Published experts of a small network in theirs/, below the current folder; yields (experts, data set)."""
    monkeypatch.chdir(tmp_path)
    data = load_data("FashionMNISTMini", None)
    model = networks.build("ConvNetD1W8", data.channels, data.num_classes, data.size, 0)
    experts = published(3, shapes=[(name, parameter.shape) for name, parameter in model.named_parameters()])
    Path("theirs").mkdir()
    torch.save(experts, "theirs/replay_buffer_0.pt")
    return experts, data


def test_scripts_import_and_export(theirs, capsys):
    experts, data = theirs
    assert cli.import_buffer(FLAGS) == 0
    folder = Path("ours/FashionMNISTMini_NO_ZCA/ConvNetD1W8")
    assert capsys.readouterr().out == f"imported 3 experts into {folder}\n"
    store = TrajectoryStore.open(folder)
    assert store.metadata["data"] == data.identity and store.metadata["model"] == "ConvNetD1W8"
    assert store.metadata["preprocessing"] == fit_preprocessing(data, zca=False).identity
    assert torch.equal(store.rows(2, range(4)), flat(experts[2]))
    assert cli.export_buffer([str(folder), "back", "--save_interval", "2"]) == 0
    assert capsys.readouterr().out == "exported 3 experts to 2 files in back\n"
    back = torch.load("back/replay_buffer_1.pt", weights_only=True)
    assert torch.equal(flat(back[0]), flat(experts[2]))


def test_import_script_by_default_imports_in_place(theirs):
    folder = Path("ours/FashionMNISTMini_NO_ZCA/ConvNetD1W8")
    folder.parent.mkdir(parents=True)
    Path("theirs").rename(folder)
    assert cli.import_buffer([flag for flag in FLAGS if flag not in ("--source", "theirs")]) == 0
    assert TrajectoryStore.open(folder).experts == [0, 1, 2] and (folder / "replay_buffer_0.pt").exists()


def test_import_script_refuses_another_network(theirs, capsys):
    assert cli.import_buffer([flag.replace("W8", "W16") for flag in FLAGS]) == 2
    assert "shape" in capsys.readouterr().err and not list(Path("ours").rglob("expert_*"))


def test_import_and_export_parse_as_all_commands_do(theirs, capsys):
    """Flags that are true or false with or without a word, a YAML file, one sentence for what is wrong."""
    Path("import.yaml").write_text("dataset: FashionMNISTMini\nmodel: ConvNetD1W8\nsource: theirs\nzca: False")
    assert cli.import_buffer(["--cfg", "import.yaml", "--buffer_path", "ours", "--zca", "True"]) == 0
    assert TrajectoryStore.open("ours/FashionMNISTMini/ConvNetD1W8").metadata["preprocessing"]["kind"] == "zca"
    for door, argv, words in (
        (cli.import_buffer, ["--zca", "perhaps"], "zca: 'perhaps' is not True or False"),
        (cli.import_buffer, ["--bufer_path", "x"], "the nearest is --buffer_path"),
        (cli.export_buffer, ["ours"], "give two folders"),
        (cli.export_buffer, ["a", "b", "c"], "no option takes 'c'"),
        (cli.export_buffer, ["a", "b", "--save_interval", "0"], "save_interval: 0 is out of range"),
    ):
        capsys.readouterr()
        assert door(argv) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ") and words in said and said.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "script, arguments, message",
    [
        ("import_buffer", ["--source", "nowhere"], "error: no replay_buffer_<number>.pt in nowhere"),
        ("export_buffer", ["nowhere", "out"], "error: no expert trajectories in nowhere"),
    ],
)
def test_scripts_run_from_any_folder_and_report_in_one_line(tmp_path, script, arguments, message):
    command = [sys.executable, REPOSITORY / "scripts" / f"{script}.py", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == "" and names(tmp_path) == []
    assert done.stderr.startswith(message) and len(done.stderr.splitlines()) == 1


def test_the_importer_names_the_data_set_that_was_meant(capsys):
    assert cli.import_buffer(["--dataset", "tiny-imagenet-200"]) == 2
    assert "no data set 'tiny-imagenet-200'; did you mean Tiny?" in capsys.readouterr().err


def test_the_importer_takes_an_imagenet_subset_at_the_size_that_others_take(capsys):
    assert cli.import_buffer(["--dataset", "ImageNet", "--buffer_path", "nowhere"]) == 2
    assert "no replay_buffer_<number>.pt in nowhere/ImageNet/imagenette/128/ConvNet" in capsys.readouterr().err
