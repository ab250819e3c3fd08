import errno
import gzip
import itertools
import os
import pickle
import random
import struct
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from pad.errors import InputError
from pad.nn.networks import build
from pad.rng import derive_seed, generator, normal, seeded
from pad.store.files import atomic_file, write_text
from pad.store.foreign import load_pt, save_pt
from pad.store.tensors import load_tensors, open_tensors, save_tensors

# Random streams


def first(seed, stream, *index):
    return tuple(torch.randint(2**62, (2,), generator=generator(seed, stream, *index)).tolist())


def test_streams_do_not_depend_on_order_or_on_anything_else():
    names = [(seed, stream, k) for seed in (0, 1) for stream in ("match", "expert") for k in range(5)]
    forwards = {name: first(*name) for name in names}
    torch.manual_seed(123)
    torch.rand(10)
    assert {name: first(*name) for name in reversed(names)} == forwards


def test_streams_are_what_they_were():
    """Recorded numbers: another version of the code, or another machine, must not draw others."""
    assert derive_seed(0, "match", 0) == 8720216675280927525
    assert derive_seed(3, "expert", 12, 7) == 3709123095420391721
    assert torch.randint(1000, (4,), generator=generator(0, "match", 0)).tolist() == [485, 227, 99, 119]


def test_different_streams_differ():
    indices = [(), ("a",), ("b", 1), *itertools.product(range(12)), *itertools.product(range(12), repeat=2)]
    names = [(seed, stream, *index) for seed in range(4) for stream in ("a", "b", "aa") for index in indices]
    assert len({first(*name) for name in names}) == len(set(names)) == len(names)
    assert first(1, "a", 1, 23) != first(1, "a", 12, 3) != first(11, "a", 2, 3)


def test_streams_are_not_correlated_with_their_neighbours():
    draws = torch.stack([torch.rand(2000, generator=generator(0, "a", k)) for k in range(8)])
    assert (torch.corrcoef(draws) - torch.eye(8)).abs().max() < 0.1
    assert (draws.mean(dim=1) - 0.5).abs().max() < 0.04


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_many_normal_numbers_on_a_cpu_are_the_streams_own(dtype):
    ours, plain = generator(0, "a"), generator(0, "a")
    for shape in ((300, 7), (5,)):
        found = normal(*shape, rng=ours, like=torch.empty(0, dtype=dtype))
        assert torch.equal(found, torch.randn(shape, generator=plain, dtype=dtype))


@pytest.mark.cuda
def test_many_normal_numbers_on_cuda_are_drawn_there_and_hang_on_the_stream_alone():
    like = torch.empty(0, device="cuda")
    rng = generator(0, "a")
    first, second = (normal(400, 1000, rng=rng, like=like) for _ in range(2))
    torch.manual_seed(1)
    torch.randn(9, device="cuda")
    again = generator(0, "a")
    assert torch.equal(normal(400, 1000, rng=again, like=like), first) and first.device.type == "cuda"
    assert torch.equal(normal(400, 1000, rng=again, like=like), second) and not torch.equal(first, second)
    assert not torch.equal(normal(400, 1000, rng=generator(0, "b"), like=like), first)
    assert abs(first.mean()) < 0.01 and abs(first.std() - 1) < 0.01


def test_drawing_from_a_stream_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    first(0, "a")
    assert torch.get_rng_state().equal(state)


def test_seeded_code_draws_its_own_numbers_and_gives_the_state_back():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    with seeded(0, "weights", 1):
        inside = torch.rand(3)
    assert torch.rand(3).equal(expected)
    torch.rand(5)
    with seeded(0, "weights", 1):
        assert torch.rand(3).equal(inside)
    with seeded(0, "weights", 2):
        assert not torch.rand(3).equal(inside)
    with seeded(1, "weights", 1):
        assert not torch.rand(3).equal(inside)
    assert inside.equal(torch.rand(3, generator=generator(0, "weights", 1)))


def test_seeded_gives_the_state_back_after_an_error():
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="inside"), seeded(0, "weights"):
        torch.rand(3)
        raise RuntimeError("inside")
    assert torch.get_rng_state().equal(state)


def test_seeded_leaves_the_generators_of_devices_alone(monkeypatch):
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("CUDA was seeded"))
    with seeded(0, "weights"):
        pass


def test_networks_are_initialised_from_their_stream():
    torch.manual_seed(1)
    a = build("MLP", 1, 2, (4, 4), 0, "expert", 3)
    torch.manual_seed(2)
    b = build("MLP", 1, 2, (4, 4), 0, "expert", 3)
    c = build("MLP", 1, 2, (4, 4), 0, "expert", 4)
    assert all(p.equal(q) for p, q in zip(a.parameters(), b.parameters()))
    assert not any(p.equal(q) for p, q in zip(a.parameters(), c.parameters()))


# Files that are whole or absent


def listing(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("old", [None, b"old"])
def test_a_file_whose_writing_failed_is_as_it_was(tmp_path, error, old):
    path = tmp_path / "file"
    if old:
        path.write_bytes(old)
    with pytest.raises(error), atomic_file(path) as handle:
        handle.write(b"half of the n")
        raise error
    assert listing(tmp_path) == ({"file": old} if old else {})


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_file_that_cannot_be_put_in_place_is_as_it_was(tmp_path, monkeypatch, step):
    def fail(*_):
        raise OSError(errno.EIO, "broken disk")

    path = tmp_path / "file"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match="broken disk") as error:
        write_text(path, "new")
    assert error.value.filename == str(path)
    assert listing(tmp_path) == {"file": b"old"}


def test_a_file_appears_when_it_is_complete(tmp_path):
    path = tmp_path / "a" / "b" / "file"
    with atomic_file(path) as handle:
        handle.write(b"new")
        (temporary,) = path.parent.iterdir()
        assert temporary.name.startswith(f"file.{os.getpid()}-") and temporary.name.endswith(".partial")
    assert listing(tmp_path) == {"a/b/file": b"new"}
    with atomic_file(str(path)) as handle:
        handle.write(b"newer")
        assert path.read_bytes() == b"new"
    assert listing(tmp_path) == {"a/b/file": b"newer"}


def test_it_is_on_disk_before_it_has_its_name(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(
        os, "fsync", lambda handle: events.append(os.readlink(f"/proc/self/fd/{handle}")) or fsync(handle)
    )
    monkeypatch.setattr(os, "replace", lambda *paths: events.append("replace") or replace(*paths))
    write_text(tmp_path / "file", "text")
    assert events[0].startswith(f"{tmp_path}/file.") and events[1:] == ["replace", str(tmp_path)]


def test_text_is_utf8(tmp_path):
    write_text(tmp_path / "file", "naïve Ähre 学\n")
    assert (tmp_path / "file").read_bytes() == "naïve Ähre 学\n".encode()


@pytest.mark.parametrize("save", [lambda path, value: save_tensors(path, value, {}), save_pt], ids=["tensors", "pt"])
def test_saving_is_atomic(tmp_path, monkeypatch, save):
    path = tmp_path / "file"
    save(path, {"a": torch.zeros(3)})
    before = listing(tmp_path)

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        save(path, {"a": torch.ones(3)})
    assert listing(tmp_path) == before


# Bytes that are a function of the content


def test_equal_tensors_give_equal_files(tmp_path):
    a, b = torch.arange(6.0).view(2, 3), torch.tensor([1, 2])
    save_tensors(tmp_path / "one.safetensors", {"a": a, "b": b}, {"x": 1, "y": {"p": 0.1, "q": None}})
    strided = torch.stack([a, -a], dim=-1)[..., 0].requires_grad_()
    assert not strided.is_contiguous()
    save_tensors(tmp_path / "other" / "two", {"b": b.clone(), "a": strided}, {"y": {"q": None, "p": 0.1}, "x": 1})
    one, two = listing(tmp_path).values()
    assert one == two
    save_tensors(tmp_path / "three", {"a": a, "b": b}, {"x": 2, "y": {"p": 0.1, "q": None}})
    assert (tmp_path / "three").read_bytes() != one


def test_equal_values_give_equal_pt_files(tmp_path):
    def value():
        return [[torch.arange(5.0), torch.ones(2, 2)], {"lr": torch.tensor(0.01)}]

    save_pt(tmp_path / "one.pt", value())
    save_pt(tmp_path / "other" / "another_name.pt", value())
    one, two = listing(tmp_path).values()
    assert one == two
    save_pt(tmp_path / "three.pt", [[torch.arange(5.0), torch.ones(2, 2)], {"lr": torch.tensor(0.02)}])
    assert (tmp_path / "three.pt").read_bytes() != one


# Reading


def test_tensors_come_back_with_their_description(tmp_path):
    path = tmp_path / "file.safetensors"
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor([1, 2]), "c": torch.zeros(0, 4)}
    tensors["d"] = torch.tensor(0.5)
    metadata = {"text": "naïve", "nested": {"list": [1, 2.5, None, True]}}
    save_tensors(path, tensors, metadata)
    loaded, described = load_tensors(path)
    assert described == metadata and set(loaded) == set(tensors)
    assert all(loaded[name].equal(tensors[name]) and loaded[name].dtype == tensors[name].dtype for name in tensors)
    with open_tensors(str(path)) as (file, described):
        assert described == metadata and file.row("a", 1).tolist() == [3, 4, 5] and list(file.layout) == sorted(tensors)
        assert file.layout["b"] == (torch.int64, (2,))
    loaded["a"] += 1
    assert load_tensors(path)[0]["a"].equal(tensors["a"])  # what was read is a copy


def reading(path):
    """The message of the InputError that reading raises."""
    with pytest.raises(InputError) as error:
        load_tensors(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    return str(error.value)


def test_a_missing_or_foreign_tensor_file_is_refused(tmp_path):
    assert "does not exist" in reading(tmp_path / "absent")
    assert "is a folder" in reading(tmp_path)
    path = tmp_path / "foreign"
    save_file({"a": torch.zeros(2)}, path)
    assert "something else" in reading(path)
    for metadata in ({"format": "pt"}, {"pad": "no json"}):
        save_file({"a": torch.zeros(2)}, path, metadata=metadata)
        assert "something else" in reading(path)
    for content in (b"", b"text", b"\x00" * 100, random.Random(0).randbytes(300), struct.pack("<Q", 2**62) + b"{}"):
        path.write_bytes(content)
        assert "whole safetensors file" in reading(path)


def test_a_truncated_tensor_file_is_refused(tmp_path):
    path = tmp_path / "file"
    save_tensors(path, {"a": torch.arange(40.0), "b": torch.ones(3)}, {"x": 1})
    content = path.read_bytes()
    for length in {*range(0, len(content), 7), len(content) - 1}:
        path.write_bytes(content[:length])
        assert "whole safetensors file" in reading(path)
    path.write_bytes(content + b"more")
    assert "whole safetensors file" in reading(path)


def test_pt_files_come_back(tmp_path):
    value = {"experts": [[torch.arange(3.0), torch.ones(2, 2)]], "lr": torch.tensor(0.01), "n": 3, "names": ("a", None)}
    save_pt(tmp_path / "file.pt", value)
    loaded = load_pt(str(tmp_path / "file.pt"))
    assert loaded["experts"][0][0].equal(torch.arange(3.0)) and loaded["experts"][0][1].equal(torch.ones(2, 2))
    assert loaded["lr"].equal(torch.tensor(0.01)) and loaded["n"] == 3 and loaded["names"] == ("a", None)
    torch.save(torch.arange(4), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert load_pt(tmp_path / "old.pt").equal(torch.arange(4))


class Creates:
    """Unpickling this creates a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle", "inside"])
def test_code_in_a_pt_file_is_not_run(tmp_path, form):
    made, path = tmp_path / "made", tmp_path / "file.pt"
    if form == "pickle":
        path.write_bytes(pickle.dumps(Creates(made), protocol=2))
    else:
        value = {"images": torch.zeros(2), "more": [Creates(made)]} if form == "inside" else Creates(made)
        torch.save(value, path, _use_new_zipfile_serialization=form != "legacy")
    with pytest.raises(InputError, match="it would run code when loaded") as error:
        load_pt(path)
    assert str(path) in str(error.value) and not made.exists()
    if form != "pickle":
        torch.load(path, weights_only=False)  # the file is dangerous indeed
        assert made.exists()


def test_a_damaged_pt_file_is_refused(tmp_path):
    path = tmp_path / "file.pt"
    with pytest.raises(InputError, match="does not exist"):
        load_pt(path)
    with pytest.raises(InputError, match="is a folder"):
        load_pt(tmp_path)
    for zipped in (True, False):
        torch.save([torch.arange(40.0), torch.ones(3)], path, _use_new_zipfile_serialization=zipped)
        content = path.read_bytes()
        for length in {*range(0, len(content), len(content) // 25), len(content) - 1}:
            path.write_bytes(content[:length])
            with pytest.raises(InputError, match="damaged" if length else "is empty") as error:
                load_pt(path)
            assert str(path) in str(error.value) and "\n" not in str(error.value)
    noise = random.Random(0).randbytes(300)
    for content in (b"\x00" * 100, noise, b"PK\x03\x04" + noise, b"\x80\x02."):
        path.write_bytes(content)
        with pytest.raises(InputError, match="damaged"):
            load_pt(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "an archive of something else")
    with pytest.raises(InputError, match="zip archive of other files"):
        load_pt(path)


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
STARTS = {
    "is empty": b"",
    "is a Git LFS pointer": LFS,
    "is a web page": b"\n<!DOCTYPE html>\n<html><head><title>Sign in</title></head></html>",
    "is a text file": "0.01 caf\u00e9\n".encode(),
    "is a gzip archive": gzip.compress(b"tensors"),
    "is a NumPy file": b"\x93NUMPY\x01\x00v\x00{'descr': '<f4'}",
    "is a safetensors file": struct.pack("<Q", 2) + b'{"a":{}}',
    "is a picture": b"\x89PNG\r\n\x1a\n\x00\x00",
}


@pytest.mark.parametrize("said", STARTS)
def test_what_is_no_pt_file_is_called_what_it_is(tmp_path, said):
    path = tmp_path / "images_best.pt"
    path.write_bytes(STARTS[said])
    with pytest.raises(InputError, match=f"images_best.pt {said}") as error:
        load_pt(path)
    assert "\n" not in str(error.value)


def test_a_long_text_whose_letter_is_cut_in_two_is_a_text(tmp_path):
    path = tmp_path / "file.pt"
    for length in (510, 511, 512, 513):
        path.write_bytes((("a" * (length % 2) + "\u00e9" * 400).encode())[:length] + "\u00e9".encode() * 100)
        with pytest.raises(InputError, match="is a text file"):
            load_pt(path)


@pytest.mark.parametrize("dtype", ["<f4", ">f8", "<f2", "<i8", "|u1", "|b1"])
def test_numpy_arrays_and_numbers_are_read_as_what_they_are(tmp_path, dtype):
    array = np.asfortranarray(np.random.default_rng(0).integers(0, 2, (30, 40)) * 1.5, dtype)
    values = {"array": array, "number": array[0, 0], "turned": array.T, "column": array[:, 3]}
    torch.save(values, tmp_path / "file.pt")
    for ours, theirs in zip(load_pt(tmp_path / "file.pt").values(), values.values()):
        assert np.array_equal(ours, theirs) and np.shape(ours) == theirs.shape


class Rebuilt:
    """A pickle that calls ``make(*arguments)``, and then sets ``state``."""

    def __init__(self, *steps):
        self.steps = steps

    def __reduce__(self):
        return self.steps


def test_numpy_arrays_cannot_be_more_than_their_bytes(tmp_path):
    """Nor of a type whose numbers would be taken for addresses."""
    path = tmp_path / "file.pt"
    rebuild = np.zeros(2).__reduce__()[0]
    make = (rebuild, (np.ndarray, (0,), b"b"))
    floats = np.dtype("f8")
    for state in ((1, (10**12,), floats, False, b"\x00" * 16), (1, (2,), floats, False, [1, 2])):
        torch.save(Rebuilt(*make, state), path)
        with pytest.raises(InputError, match="file.pt"):
            load_pt(path)
    torch.save(Rebuilt(rebuild, (np.ndarray, (10**13,), b"b")), path)  # the shape it is made with is no one's claim
    assert load_pt(path).size == 0
    for value in (np.array([object()]), np.array(["a"]), np.zeros(2, "f4,i4"), np.datetime64("2020-01-01")):
        torch.save(value, path)
        with pytest.raises(InputError, match="file.pt"):
            load_pt(path)
    objects = Rebuilt(np.dtype, ("i8,O", False, True), (3, "<", None, None, None, -1, -1, 0))
    torch.save(Rebuilt(*make, (1, (1,), objects, False, b"\x01" * 16)), path)
    with pytest.raises(InputError, match="file.pt"):
        load_pt(path)
    pointers = Rebuilt(np.dtype, ("f8", False, True), (3, "<", None, None, None, -1, -1, 63))  # "holds objects"
    torch.save(Rebuilt(*make, (1, (2,), pointers, False, b"\x01" * 16)), path)
    found = load_pt(path)
    assert found.dtype == floats and found.dtype.flags == 0
