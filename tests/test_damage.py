"""Files that came to harm, files that mean harm, and disks that are full."""

import contextlib
import errno
import io
import json
import multiprocessing
import os
import random
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from pad.checkpoint import State
from pad.cli import door
from pad.commands.evaluate import EvaluationSettings, _read_set
from pad.commands.table import COMMANDS, Command
from pad.config import Settings
from pad.data.images import ImageData
from pad.data.preprocessing import MeanStd, fit_preprocessing
from pad.data.sources import load_data
from pad.difficulty.ranking import Ranking, read_published
from pad.errors import InputError
from pad.store.files import atomic_file, save_picture, temporary_folder, write_text
from pad.store.foreign import load_pt, save_pt
from pad.store.published import export_published, import_published
from pad.store.run import Place, Run
from pad.store.tensors import load_tensors, save_tensors
from pad.store.trajectories import TrajectoryStore, describe, expert_path, write_expert, write_line
from pad.synthetic import SyntheticSet

PARAMETERS = [("weight", (3, 4)), ("bias", (3,))]
DESCRIPTION = describe({"dataset": "CIFAR10"}, "MLP", PARAMETERS, {"kind": "meanstd", "digest": "0f"})
LABELS = torch.arange(3).repeat_interleave(4)


def draw(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# One of each kind of file: how it is written, read, and what reading it gives, as bytes.


def trajectory(folder, seed=0):
    with write_expert(
        folder, 0, DESCRIPTION, epochs=3, seed=seed, settings={"lr_teacher": 0.01}, figures=["test_accuracy"]
    ) as record:
        for epoch, row in enumerate(draw(seed, 4, 15)):
            record(row, test_accuracy=epoch / 4)
    return expert_path(folder, 0)


def read_trajectory(path):
    store = TrajectoryStore.open(path.parent)
    return {"params": store.rows(0, range(4)), **store.figures(0)}, store.header(0)


def synthetic(seed=0):
    metadata = {"class_names": ["ant", "bee"], "settings": {"dataset": "CIFAR10", "ipc": 2}, "seed": seed}
    classes = torch.tensor([0, 0, 1, 1])
    preprocessing = MeanStd.of((0.5, 0.4), (0.2, 0.3), "cpu")
    images, labels = draw(seed, 4, 2, 3, 3), draw(seed + 1, 4, 2)
    return SyntheticSet(images, labels, torch.tensor(0.02), classes, metadata, preprocessing=preprocessing)


def artifact(folder, seed=0):
    synthetic(seed).save(folder / "set.safetensors")
    return folder / "set.safetensors"


def read_artifact(path):
    found = SyntheticSet.load(path)
    tensors = {name: getattr(found, name) for name in ("images", "labels", "lr", "classes", "stored_pixels")}
    return tensors, found.metadata


def ranking(folder, seed=0):
    scores = draw(seed, len(LABELS))
    metadata = {"method": "GraNd", "settings": {"repeats": 3}}
    Ranking.from_scores(scores, LABELS, 3, metadata).save(folder / "r.safetensors")
    return folder / "r.safetensors"


def read_ranking(path):
    found = Ranking.load(path)
    return {"scores": found.scores, **{str(c): row for c, row in enumerate(found.rows)}}, found.metadata


def state(seed=0):
    return State(draw(seed, 4, 2, 3, 3), draw(seed + 1, 4, 2), torch.tensor(0.02), iteration=seed + 7, best=0.25)


def checkpoint(folder, seed=0):
    state(seed).save(folder / "checkpoint.safetensors")
    return folder / "checkpoint.safetensors"


def read_checkpoint(path):
    found = State.load(path, state())
    counters = found.counters
    return {str(i): tensor for i, tensor in enumerate(found.variables + found.momentum)}, counters


def published_set(folder):
    synthetic().export_published(folder, "best")
    return folder / "images_best.pt"


def read_published_set(path):
    found = SyntheticSet.from_published(*(path.with_name(f"{name}_best.pt") for name in ("images", "labels", "lr")))
    return {"images": found.images, "labels": found.labels, "lr": found.lr}, {}


def published_ranking(folder):
    Ranking.load(ranking(folder)).write_published(folder / "r.pt")
    return folder / "r.pt"


def read_published_ranking(path):
    return {"rows": torch.stack(read_published(path, LABELS, 3).rows)}, {}


def replay_buffer(folder):
    trajectory(folder / "experts")
    return export_published(TrajectoryStore.open(folder / "experts"), folder)[0]


def read_replay_buffer(path):
    folder = path.parent / "imported"
    import_published(path.parent, folder, DESCRIPTION)
    tensors = {"params": TrajectoryStore.open(folder).rows(0, range(4))}
    expert_path(folder, 0).unlink()
    return tensors, {}


OURS = [
    (trajectory, read_trajectory),
    (artifact, read_artifact),
    (ranking, read_ranking),
    (checkpoint, read_checkpoint),
]
PUBLISHED = [
    (published_set, read_published_set),
    (published_ranking, read_published_ranking),
    (replay_buffer, read_replay_buffer),
]
NAMES = [make.__name__ for make, _ in OURS + PUBLISHED]


def as_bytes(found):
    tensors, metadata = found
    listed = {name: (str(t.dtype), tuple(t.shape), t.contiguous().numpy().tobytes()) for name, t in tensors.items()}
    return listed, json.dumps(metadata, sort_keys=True)


def outcome(read, path, original):
    """Whether a file was refused, in one sentence that names it; if it was not, it must be what it was."""
    try:
        found = read(path)
    except InputError as error:
        assert path.name in str(error) and "\n" not in str(error) and len(str(error)) < 1000, str(error)
        return True
    assert as_bytes(found) == original
    return False


# ---- damage


def flipped(data, position, rng):
    changed = bytearray(data)
    changed[position] ^= 1 << rng.randrange(8)
    return bytes(changed)


def rewritten(data, rng):
    """Another header, well formed, before the same numbers."""
    start = 8 + struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:start])
    name = rng.choice([name for name in header if name != "__metadata__"])
    entry = header[name]
    change = rng.randrange(8)
    if change == 0:
        entry["dtype"] = rng.choice(sorted({"F64", "F32", "F16", "I64", "I32", "U32", "BOOL"} - {entry["dtype"]}))
    elif change == 1:
        entry["shape"] = [10**12, *entry["shape"][1:]]
    elif change == 2:  # as many numbers, in another shape
        entry["shape"] = [1, *entry["shape"]]
    elif change == 3:
        entry["shape"] = [-1, *entry["shape"]]
    elif change == 4:
        entry["data_offsets"] = [0, 2**62]
    elif change == 5:
        del header[name]
    elif change == 6:
        header[name + "2"] = header.pop(name)
    else:
        text = header["__metadata__"]["pad"]
        digit = rng.choice([i for i, character in enumerate(text) if character.isdigit()])
        header["__metadata__"]["pad"] = text[:digit] + str((int(text[digit]) + 1) % 10) + text[digit + 1 :]
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[start:]


def variants(data, rng, ours):
    """A hundred damaged copies of a file."""
    start = 8 + struct.unpack("<Q", data[:8])[0] if ours else len(data) // 2
    for _ in range(30):
        yield flipped(data, rng.randrange(start), rng)
        yield flipped(data, rng.randrange(start, len(data)), rng)
    for length in (0, 4, 8, start - 1, start, len(data) - 1, *(rng.randrange(len(data)) for _ in range(6))):
        yield data[:length]
    for count in (1, 2, 8, 100):
        yield data + rng.randbytes(count)
        yield rng.randbytes(count) + data
    for _ in range(20):
        if ours:
            yield rewritten(data, rng)
        else:  # some bytes elsewhere
            at, to, count = (rng.randrange(len(data) - 100) for _ in range(3))
            yield data[:at] + data[to : to + count % 100 + 1] + data[at + count % 100 + 1 :]


@pytest.mark.parametrize("make, read", OURS + PUBLISHED, ids=NAMES)
def test_a_hundred_damaged_files_are_refused_or_what_they_were(tmp_path, make, read):
    path = make(tmp_path)
    data, original = path.read_bytes(), as_bytes(read(path))
    rng = random.Random(make.__name__)
    ours = (make, read) in OURS
    copies = list(variants(data, rng, ours))
    assert len(copies) == 100 and not outcome(read, path, original)
    refused = 0
    for copy in copies:
        path.write_bytes(copy)
        refused += outcome(read, path, original)
    # Of a zip archive a date or the like may differ; of ours, nothing.
    assert refused == 100 if ours else refused > 50, refused
    path.write_bytes(data)
    assert not outcome(read, path, original)


def resaved(path, change):
    """The same file with other content and the right checksums."""
    tensors, metadata = load_tensors(path)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    change(tensors, metadata)
    save_tensors(path, tensors, metadata)


WRONG = {
    "shape": lambda tensors, metadata: tensors.update({name: t[None] for name, t in tensors.items()}),
    "one shape": lambda tensors, metadata: tensors.update({max(tensors): tensors[max(tensors)][None]}),
    "half": lambda tensors, metadata: tensors.update({min(tensors): tensors[min(tensors)].chunk(2)[0]}),
    "dtype": lambda tensors, metadata: tensors.update({name: t.half() for name, t in tensors.items()}),
    "missing": lambda tensors, metadata: tensors.pop(min(tensors)),
    "empty": lambda tensors, metadata: tensors.update({name: t[:0] for name, t in tensors.items() if t.ndim}),
    "kind": lambda tensors, metadata: metadata.update(kind="something else"),
    "format": lambda tensors, metadata: metadata.update(format=99),
    "no format": lambda tensors, metadata: metadata.pop("format"),
}


@pytest.mark.parametrize("make, read", OURS, ids=NAMES[:4])
@pytest.mark.parametrize("wrong", WRONG)
def test_files_with_other_tensors_are_refused(tmp_path, make, read, wrong):
    path = make(tmp_path)
    resaved(path, WRONG[wrong])
    with pytest.raises(InputError, match=path.name):
        read(path)


@pytest.mark.parametrize("make, read", OURS, ids=NAMES[:4])
def test_descriptions_of_other_types_are_refused_or_harmless(tmp_path, make, read):
    """Right checksums and wrong types: no error but InputError, whatever stands where."""
    path = make(tmp_path)
    data, (_, metadata) = path.read_bytes(), load_tensors(path)
    for key in metadata:
        for value in (None, 7, "text", ["list"], {"another": 1}, [[1, 2, 3]], True):
            path.write_bytes(data)
            resaved(path, lambda tensors, metadata: metadata.update({key: value}))
            try:
                read(path)
            except InputError as error:
                assert path.name in str(error)


def test_the_checksums_are_where_the_documentation_says(tmp_path):
    """Recomputed from the file by other means: any program can check one of our files."""
    path = tmp_path / "file"
    tensors = {"a": draw(0, 3, 4), "b": torch.tensor([1, 2]), "c": torch.zeros(0, 4), "d": torch.tensor(True)}
    save_tensors(path, tensors, {"x": "ä"})
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
    found = load_file(path)
    layout = [["a", "F32", 3, 4], ["b", "I64", 2], ["c", "F32", 0, 4], ["d", "BOOL"]]
    described = json.dumps([header["__metadata__"]["pad"], layout])
    parts = [described.encode(), *(row.numpy().tobytes() for row in found["a"]), found["b"].numpy().tobytes(), b"\1"]
    assert found["checksums"].tolist() == [zlib.crc32(part) for part in parts]


# ---- claims


def test_a_header_that_claims_terabytes_takes_no_memory(tmp_path):
    path = tmp_path / "file"
    for shape, end in (([2**40], 2**42), ([2**62, 4], 64), ([10**13, 0], 0), ([-1], 4), ([2**64], 4), ([1.5], 6)):
        entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}
        text = json.dumps({"__metadata__": {"pad": "{}"}, "a": entry}).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text)
        with pytest.raises(InputError, match="file"):
            load_tensors(path)
    for length in (2**63, 2**40, 10**8):
        path.write_bytes(struct.pack("<Q", length) + b"{}")
        with pytest.raises(InputError, match="not a whole safetensors file"):
            load_tensors(path)


def test_descriptions_that_are_none_are_refused(tmp_path):
    for text in ("[" * 100_000 + "]" * 100_000, '{"a":' * 100_000 + "1" + "}" * 100_000, "1", "null", ""):
        save_file({"a": torch.zeros(2)}, tmp_path / "file", metadata={"pad": text})
        with pytest.raises(InputError, match="no description"):
            load_tensors(tmp_path / "file")
    save_file({"a": torch.zeros(2)}, tmp_path / "file", metadata={"pad": "{}"})
    with pytest.raises(InputError, match="carries no checksums"):
        load_tensors(tmp_path / "file")


def test_headers_with_a_name_twice_or_nested_deeply_are_refused_or_what_they_seem(tmp_path):
    save_tensors(tmp_path / "file", {"a": torch.arange(2.0)}, {"x": 1})
    data = (tmp_path / "file").read_bytes()
    header = data[8 : 8 + struct.unpack("<Q", data[:8])[0]].decode().strip()
    numbers = data[8 + struct.unpack("<Q", data[:8])[0] :]
    second = '"a":{"dtype":"F32","shape":[1],"data_offsets":[16,20]},"a":'
    deep = header.replace("[2]", "[" * 9999 + "]" * 9999)
    for text in (header.replace('"a":', second), deep, header[:-1] + ',"b":{}}'):
        assert text != header
        (tmp_path / "file").write_bytes(struct.pack("<Q", len(text)) + text.encode() + numbers)
        with contextlib.suppress(InputError):
            tensors, metadata = load_tensors(tmp_path / "file")
            assert tensors["a"].tolist() == [0, 1] and metadata == {"x": 1}


def rebuilt(path, change, compression=zipfile.ZIP_STORED):
    """A .pt archive with each part as ``change(name, content)`` gives it."""
    with zipfile.ZipFile(path) as archive:
        parts = {part.filename: archive.read(part) for part in archive.infolist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in parts.items():
            archive.writestr(name, change(name, content))


def test_a_pt_file_that_claims_more_than_it_holds_is_refused(tmp_path):
    path = tmp_path / "file.pt"
    huge = torch.zeros(1).expand(10**13)
    for value in (huge, [1, {"a": (huge,)}], torch.zeros(3).as_strided((3, 3), (0, 1))):
        torch.save(value, path)
        with pytest.raises(InputError, match="claims a tensor of shape .* which it does not hold"):
            load_pt(path)
    torch.save(torch.zeros(10), path)
    assert load_pt(path).shape == (10,)
    for numel in (11, 10**9):  # the size of the storage as the pickle has it
        torch.save(torch.zeros(10), path)
        rebuilt(path, lambda _, content: content.replace(b"K\x0at", b"J" + struct.pack("<i", numel) + b"t"))
        try:
            found = load_pt(path)
        except InputError:
            continue
        assert found.untyped_storage().nbytes() <= path.stat().st_size
    for value in (torch.zeros(2**40, device="meta"), torch.zeros(2**40, layout=torch.sparse_coo)):
        torch.save(value, path)
        with pytest.raises(InputError, match="images_best.pt|file.pt"):
            SyntheticSet.from_published(path, path, path)
        with pytest.raises(InputError, match="file.pt"):
            read_published(path, LABELS, 3)


def test_a_pt_file_that_unpacks_to_more_than_its_size_is_refused(tmp_path):
    path = tmp_path / "file.pt"
    torch.save(torch.zeros(5_000_000), path)
    rebuilt(path, lambda name, content: content, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 100_000
    with pytest.raises(InputError, match="compressed"):
        load_pt(path)
    torch.save(torch.zeros(1000), path)
    data = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        part = next(part for part in archive.infolist() if part.filename.endswith("data/0"))
    assert data.count(struct.pack("<II", part.compress_size, part.file_size)) >= 1
    path.write_bytes(data.replace(struct.pack("<II", 4000, 4000), struct.pack("<II", 2**31, 2**31)))
    with pytest.raises(InputError, match="claims to hold|damaged"):
        load_pt(path)


class Creates:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("make, read", PUBLISHED, ids=NAMES[4:])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_would_create_a_file_is_refused_at_every_door(tmp_path, make, read, zipped):
    path, made = make(tmp_path), tmp_path / "made"
    torch.save([Creates(made)], path, _use_new_zipfile_serialization=zipped)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=f"{path.name} holds more than tensors"):
        read(path)
    assert sorted(p for p in tmp_path.rglob("*") if p.name != "imported") == before and not made.exists()
    torch.load(path, weights_only=False)
    assert made.exists()  # it would have


# ---- images


def png(width, height, content=b""):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", content) + chunk(b"IEND", b"")


@pytest.fixture
def tree(tmp_path):
    """An ImageFolder of 2 classes, 2 + 1 images each."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 2), ("test", 1)):
        for name in ("ant", "bee"):
            folder = tmp_path / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return tmp_path


@pytest.mark.parametrize("where", ["train/ant/0.png", "train/bee/1.png"])
@pytest.mark.parametrize("res", [None, 6])
@pytest.mark.parametrize(
    "content, message",
    [
        (png(60_000, 60_000, zlib.compress(bytes(10_000_000))), "has more pixels than the"),
        (png(10_000, 10_000, zlib.compress(b"")), "has more pixels than the"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 6 6\n%%EndComments\n", "cannot be read as an image"),
        (png(6, 6, b""), "cannot be read as an image"),
        (b"", "cannot be read as an image"),
    ],
    ids=["bomb", "large", "eps", "truncated", "empty"],
)
def test_harmful_images_are_refused(tree, monkeypatch, where, res, content, message):
    run = []
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_, **__: run.append(1) or Image.new("RGB", (6, 6)).im)
    assert load_data("ImageFolder", tree).size == (6, 6)
    (tree / where).write_bytes(content)
    with pytest.raises(InputError, match=f"{where} {message}"):
        load_data("ImageFolder", tree, res=res)
    assert not run


def test_an_image_of_another_size_is_refused_before_it_is_decoded(tree, monkeypatch):
    (tree / "train/bee/1.png").write_bytes(png(5000, 5000, zlib.compress(bytes(5000 * 15001))))
    convert = Image.Image.convert

    def small_only(image, mode):
        assert image.width == 6, "decoded"
        return convert(image, mode)

    monkeypatch.setattr(Image.Image, "convert", small_only)
    with pytest.raises(InputError, match="bee/1.png is 5000x5000 pixels"):
        load_data("ImageFolder", tree)


def test_a_list_of_files_leads_nowhere_else(tmp_path):
    for name in ("n01", "n02"):
        (tmp_path / "train" / name).mkdir(parents=True)
        Image.new("RGB", (64, 64)).save(tmp_path / "train" / name / "0.png")
    images = tmp_path / "val" / "images"
    images.mkdir(parents=True)
    Image.new("RGB", (64, 64)).save(images / "0.png")
    annotations = tmp_path / "val" / "val_annotations.txt"
    annotations.write_text("0.png\tn01\n")
    assert len(load_data("Tiny", tmp_path).test_images) == 1
    for elsewhere in ("../../train/n01/0.png", str(images / "0.png"), ".."):
        annotations.write_text(f"0.png\tn01\n{elsewhere}\tn02\n")
        with pytest.raises(InputError, match="val_annotations.txt names '.*', which is not the name of a file"):
            load_data("Tiny", tmp_path)
    annotations.write_bytes(b"\xff\xfe\x00\tn01\n")
    with pytest.raises(InputError):
        load_data("Tiny", tmp_path)


@pytest.mark.parametrize(
    "settings",
    [{"dataset": "../elsewhere"}, {"dataset": ["CIFAR10"]}, {"res": "64; rm"}, {"zca": "perhaps"}, {"dsa_strategy": 3}],
)
def test_settings_in_a_synthetic_set_are_checked_like_options(tmp_path, settings):
    path = artifact(tmp_path)
    resaved(path, lambda tensors, metadata: metadata.update(settings=settings))
    ours = EvaluationSettings(synthetic=str(path))
    with pytest.raises(InputError, match=f"{next(iter(settings))}|no data set '../elsewhere'"):
        theirs, _ = _read_set(ours)
        load_data(theirs.dataset, tmp_path)


# ---- killed writers


def hold(path, pipe):
    """Write half a file, and go on when told to; then end as on Ctrl-C."""
    with contextlib.suppress(KeyboardInterrupt), atomic_file(path) as handle, temporary_folder(path.parent) as folder:
        handle.write(b"half")
        handle.flush()
        (folder / "inside").write_text("half")
        pipe.send("writing")
        pipe.recv()
        raise KeyboardInterrupt


def test_what_a_killed_process_left_goes_with_the_next_writer_and_what_a_living_one_writes_stays(tmp_path):
    processes = multiprocessing.get_context("fork")
    (tmp_path / "mine.partial").write_text("not a temporary of ours")
    (tmp_path / "file").write_text("old")
    pipes, writers = [], []
    try:
        for _ in range(2):
            ours, theirs = processes.Pipe()
            writers.append(processes.Process(target=hold, args=(tmp_path / "file", theirs)))
            writers[-1].start()
            pipes.append(ours)
            assert ours.poll(30) and ours.recv() == "writing"
        killed, living = writers
        killed.kill()
        killed.join()
        assert len(list(tmp_path.iterdir())) == 6  # of each a file and a folder
        write_text(tmp_path / "other", "new")
        left = {path.name for path in tmp_path.iterdir()} - {"file", "mine.partial", "other"}
        assert len(left) == 2 and all(f".{living.pid}-" in name for name in left)
        assert (tmp_path / "file").read_text() == "old"
        pipes[1].send("end")
        living.join()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "mine.partial", "other"]
    finally:
        for writer in writers:
            writer.kill()
            writer.join()


def test_a_temporary_folder_is_gone_after_its_block(tmp_path):
    with pytest.raises(ValueError), temporary_folder(tmp_path) as folder:
        (folder / "a").mkdir()
        (folder / "a" / "file").write_text("text")
        raise ValueError
    assert not list(tmp_path.iterdir())


# ---- full disks


class Disk:
    """Takes ``room`` bytes of the file number ``number`` that is written, and every other file whole."""

    def __init__(self, monkeypatch, number, room):
        self.files, self.failed = 0, False
        disk, file_io = self, io.FileIO

        class Limited(file_io):
            def __init__(self, *arguments):
                super().__init__(*arguments)
                self.room = room if disk.files == number else None
                disk.files += 1

            def write(self, data):
                if self.room is None:
                    return super().write(data)
                data = memoryview(data).cast("B")
                if not self.room:
                    disk.failed = True
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                taken = super().write(data[: self.room])
                self.room -= taken
                return taken

        monkeypatch.setattr(io, "FileIO", Limited)


def go_on(folder, seed):
    return Run.start(Place(folder=folder / "run", resume=True, may_differ=["seed"]), {"seed": seed})


def write_metrics(folder, seed):
    run = go_on(folder, 0)
    if not seed:
        for iteration in range(5):
            run.record("match", iteration, loss=0.5)
    run.truncate_metrics(4 - seed)


def export_experts(folder, seed):
    out = folder / f"exported {seed}"
    for path in out.glob("*"):
        path.unlink()
    export_published(TrajectoryStore.open(folder / "experts"), out, save_interval=1)


WRITERS = {
    "trajectory": trajectory,
    "synthetic set": artifact,
    "published set": lambda folder, seed: synthetic(seed).export_published(folder, "best"),
    "ranking": ranking,
    "published ranking": lambda folder, seed: save_pt(folder / "r.pt", draw(seed, 12).argsort().view(3, 4)),
    "checkpoint": checkpoint,
    "run": lambda folder, seed: go_on(folder, seed).close(),
    "metrics": write_metrics,
    "summary": lambda folder, seed: go_on(folder, 0).finish(iterations=seed),
    "picture": lambda folder, seed: save_picture(folder / "p.png", draw(seed, 9, 9, 3).mul(99).byte().numpy()),
    "results": lambda folder, seed: write_text(folder / "set.evaluation.json", f"accuracy {seed}\n"),
    "exported buffer": export_experts,
    "line": lambda folder, seed: write_line(
        store := TrajectoryStore.open(folder / "experts"), store.experts[0], folder
    ),
}


def listing(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("kind", WRITERS)
def test_a_full_disk_harms_no_file_and_is_named(tmp_path, monkeypatch, kind):
    write, (ours, other) = WRITERS[kind], (tmp_path / "ours", tmp_path / "other")
    for folder in (ours, other):
        folder.mkdir()
        trajectory(folder / "experts")
        write(folder, 0)
    before = listing(ours)
    write(other, 1)
    after = listing(other)
    failures = 0
    for number in range(8):
        for room in (0, 1, 40):
            with monkeypatch.context() as patch:
                disk = Disk(patch, number, room)
                try:
                    write(ours, 1)
                    assert not disk.failed
                except OSError as error:
                    assert error.errno == errno.ENOSPC and Path(error.filename).is_relative_to(ours), error
                    assert ".partial" not in error.filename
                    failures += 1
            for name, content in listing(ours).items():  # no temporary among them, no file that is neither
                assert content in (before.get(name), after.get(name)), (name, number, room)
            assert listing(ours).keys() >= before.keys() - {"run/finished.json"}
    assert failures
    write(ours, 1)  # there is room again
    assert listing(ours) == after


def test_the_command_says_which_file_a_full_disk_did_not_take(tmp_path, monkeypatch, capsys):

    recipe = Command("writer.py", Settings, lambda settings, ranks: write_text(tmp_path / "results.json", "text"))
    monkeypatch.setitem(COMMANDS, "writer", recipe)
    Disk(monkeypatch, 0, 2)
    assert door("writer", []) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"error: No space left on device: {tmp_path / 'results.json'}") and said.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_full_disk_keeps_no_fitted_preprocessing_and_stops_nothing(tmp_path, monkeypatch, caplog):
    images = torch.randint(0, 256, (6, 1, 2, 2), generator=torch.Generator().manual_seed(0)).byte()
    labels = torch.arange(6) % 2
    data = ImageData(
        name="ImageFolder",
        train_images=images,
        train_labels=labels,
        test_images=images,
        test_labels=labels,
        class_names=("a", "b"),
        mean=(0.5,),
        std=(0.5,),
    )
    Disk(monkeypatch, 0, 2)
    fitted = fit_preprocessing(data, True, tmp_path)
    assert "is not kept" in caplog.text and not list(tmp_path.iterdir())
    assert torch.equal(fit_preprocessing(data, True, tmp_path).apply(images), fitted.apply(images))
    (path,) = tmp_path.iterdir()
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    assert torch.equal(fit_preprocessing(data, True, tmp_path).apply(images), fitted.apply(images))
    assert "is not usable and is fitted again" in caplog.text
