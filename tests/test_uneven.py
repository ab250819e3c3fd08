"""Sets whose classes have different numbers of images: their files, forms of others, few bits, and as a start."""

import json

import pytest
import torch

from pad.data.formation import decoded
from pad.data.images import ImageData
from pad.data.preprocessing import MeanStd
from pad.difficulty.ranking import first_of_each_class
from pad.errors import InputError
from pad.exchange.converting import as_set, fitted
from pad.exchange.reading import Foreign, read_foreign
from pad.exchange.writing import FORMS, eight_bits, export_set
from pad.initialisation import class_order, from_set
from pad.labels import hard_logits
from pad.quantise import GROUPS, quantised, restored
from pad.store.tensors import load_tensors, save_tensors
from pad.synthetic import SyntheticSet

COUNTS = [1, 3, 2]  # of the stored images
K, N, SHAPE = 3, 6, (3, 4, 6)
CPU = torch.device("cpu")
MEANSTD = MeanStd.of((0.4, 0.5, 0.6), (0.2, 0.25, 0.3), "cpu")
DATA = ImageData(
    name="Odd",
    train_images=torch.zeros(6, *SHAPE, dtype=torch.uint8),
    train_labels=torch.arange(6) % K,
    test_images=torch.zeros(3, *SHAPE, dtype=torch.uint8),
    test_labels=torch.arange(3),
    class_names=("cat", "dog", "ox"),
    mean=(0.4, 0.5, 0.6),
    std=(0.2, 0.25, 0.3),
)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def make(factor: int = 1, hard: bool = False) -> SyntheticSet:
    """Images of whole levels, so that pictures hold them; labels of no order."""
    kept = MEANSTD.apply((draw(N, *SHAPE) * 255).byte())
    classes = torch.tensor([c for c in range(K) for _ in range(COUNTS[c] * factor**2)])
    images = torch.cat([decoded(part, factor) for part in kept.split(COUNTS)])
    labels = hard_logits(classes, K) if hard else draw(len(classes), K, seed=1) * 5
    made = images, labels, torch.tensor(0.013), classes, {"class_names": ["cat", "dog", "ox"]}
    return SyntheticSet(*made, preprocessing=MEANSTD, stored=kept if factor > 1 else None)


def same(one: SyntheticSet, other: SyntheticSet) -> bool:
    names = ("images", "kept", "labels", "classes")
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in names)


@pytest.mark.parametrize("factor", [1, 2])
def test_a_file_holds_them(factor, tmp_path):
    whole = make(factor)
    whole.save(tmp_path / "set")
    found = SyntheticSet.load(tmp_path / "set")
    assert same(found, whole) and found.counts == [n * factor**2 for n in COUNTS] and found.kept_counts == COUNTS
    assert found.factor == factor and found.digest == whole.digest and not found.is_even
    sizes = {1: "1 to 3 images per class", 2: "4 to 12 images per class, decoded from 1 to 3 stored"}
    assert found.size == sizes[factor]
    other = make(factor)
    other.classes = other.classes.sort(descending=True).values.neg() + K - 1  # two of class 0, one of class 2
    assert other.counts == [n * factor**2 for n in (2, 3, 1)] and other.digest != whole.digest


def test_stored_images_that_are_not_of_their_classes_are_refused(tmp_path):
    make(2).save(tmp_path / "set")
    tensors, metadata = load_tensors(tmp_path / "set", kind="synthetic set", format=1)
    tensors["classes"][4] = 0  # 5 of class 0, which are no 4 of each stored one
    save_tensors(tmp_path / "set", tensors, metadata)
    with pytest.raises(InputError, match="stored images .* do not belong together"):
        SyntheticSet.load(tmp_path / "set")


# ---- forms of others


@pytest.mark.parametrize("form", FORMS)
def test_they_go_out_and_come_back(form, tmp_path):
    whole = make()
    export_set(whole, form, tmp_path / "out")
    back = as_set(fitted(read_foreign(tmp_path / "out"), DATA), MEANSTD, None, {})
    assert torch.equal(back.labels, whole.labels) and torch.equal(back.classes, whole.classes)
    torch.testing.assert_close(back.images, whole.images, rtol=0, atol=2e-6)
    if form == "png":
        names = sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.png"))
        assert names == [f"{c}_{name}/0000{i}.png" for c, name in enumerate(DATA.class_names) for i in range(COUNTS[c])]
        assert torch.equal(read_foreign(tmp_path / "out").images, eight_bits(whole)[0])


@pytest.mark.parametrize("counts", [[1, 2, 3, 4], [1, "3", 2], "many", [0, 3, 3], [1, 3, 1]])
def test_counts_of_an_export_are_checked(counts, tmp_path):
    export_set(make(), "published", tmp_path / "out")
    about = json.loads((tmp_path / "out" / "set.json").read_text())
    assert about["images_of_each_class"] == COUNTS
    (tmp_path / "out" / "set.json").write_text(json.dumps(about | {"images_of_each_class": counts}))
    with pytest.raises(InputError, match="images_of_each_class is no list of numbers|classes are a tensor of shape"):
        read_foreign(tmp_path / "out")


def test_hard_labels_of_others_in_any_order_and_in_multi_formation():
    pixels, labels = draw(N, *SHAPE), torch.tensor([2, 1, 0, 1, 2, 1])
    foreign = Foreign(form="IDC", where="theirs", images=pixels, labels=labels, lr=0.1, values="pixels", factor=2)
    found = as_set(fitted(foreign, DATA), MEANSTD, None, {})
    assert found.kept_counts == COUNTS and found.counts == [4, 12, 8] and found.is_hard
    for c in range(K):
        expected = MEANSTD.apply(decoded(pixels[labels == c], 2))
        torch.testing.assert_close(found.images[found.classes == c], expected, rtol=0, atol=1e-6)
    found._refuse_unusable("it")


def test_soft_labels_of_others_need_to_be_told():
    soft = {"form": "npz", "where": "theirs", "images": draw(7, *SHAPE), "labels": draw(7, K), "lr": 0.1}
    soft |= {"values": "network", "label_form": "logits"}
    with pytest.raises(InputError, match="7 images are not a multiple of 3 classes, and nothing says which"):
        fitted(Foreign(**soft), DATA)
    classes = torch.tensor([2, 0, 1, 1, 0, 2, 1])
    found = fitted(Foreign(**soft, classes=classes), DATA)
    assert found.classes.tolist() == [0, 0, 1, 1, 1, 2, 2] and torch.equal(found.labels[:2], soft["labels"][[1, 4]])


def test_a_published_trio_of_class_numbers(tmp_path):
    classes = make().classes
    for name, value in (("images", draw(N, *SHAPE) - 0.5), ("labels", classes), ("lr", torch.tensor(0.02))):
        torch.save(value, tmp_path / f"{name}.pt")
    paths = [tmp_path / f"{name}.pt" for name in ("images", "labels", "lr")]
    found = SyntheticSet.from_published(*paths)
    assert found.counts == COUNTS and found.is_hard
    torch.save(draw(N + 1, *SHAPE) - 0.5, paths[0])
    torch.save(draw(N + 1, K) * 5, paths[1])
    with pytest.raises(InputError, match="7 images are not a multiple of the labels' 3 classes"):
        SyntheticSet.from_published(*paths)


# ---- few bits


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("factor", [1, 2])
@pytest.mark.parametrize("group", GROUPS)
def test_they_are_quantised(group, factor, hard, tmp_path):
    whole = make(factor, hard)
    small = whole.quantised(4, group, 8)
    small.save(tmp_path / "small")
    found = SyntheticSet.load(tmp_path / "small")
    assert same(found, small) and found.counts == whole.counts and found.is_hard == hard
    scales = {"set": 1, "class": K, "image": N, "channel": 3 * N}[group]
    rows = N * factor**2
    assert found.cost.images == N * 72 * 4 + scales * 64 and found.cost.labels == (0 if hard else rows * (K * 8 + 64))
    # each group by itself
    split = {"set": [N], "class": COUNTS, "image": [1] * N, "channel": [1] * N}[group]
    for part, expected in zip(found.kept.split(split), whole.kept.split(split)):
        rows_of = expected.reshape(3 if group == "channel" else 1, -1)
        assert torch.equal(part.reshape(rows_of.shape), restored(*quantised(rows_of, 4)))
    packed = found.packed
    assert torch.equal(packed.nearest(found.kept), found.kept)
    assert torch.equal(packed.moved(whole.kept).tensors["levels"], packed.tensors["levels"])


@pytest.mark.parametrize("counts", [[1, 3], [1, 3, 3], [0, 3, 3], [1, 3, True], [1.0, 3, 2], "132"])
def test_a_packed_file_of_other_counts_is_refused(counts, tmp_path):
    make().quantised(4).save(tmp_path / "small")
    tensors, metadata = load_tensors(tmp_path / "small", kind="synthetic set", format=1)
    metadata["packing"]["counts"] = counts
    save_tensors(tmp_path / "small", tensors, metadata)
    with pytest.raises(InputError, match="is no packed set"):
        SyntheticSet.load(tmp_path / "small")


# ---- as a start, and to compare with


@pytest.mark.parametrize("factor", [1, 2])
@pytest.mark.parametrize("ipc", [1, 2, 3, 5])
def test_a_start_is_chosen_from_or_repeated_class_by_class(ipc, factor, caplog):
    start = make(factor)
    caplog.set_level("INFO", "pad")
    images, labels = from_set(start, ipc, seed=4, device=CPU, factor=factor)
    assert len(images) == K * ipc and len(labels) == K * ipc * factor**2
    shown = decoded(images, factor, K)  # labels go with what is decoded
    known = {image.numpy().tobytes(): i for i, image in enumerate(start.images)}
    places = [known[image.numpy().tobytes()] for image in shown]
    assert torch.equal(labels, start.labels[places])
    for c in range(K):
        chosen = images[c * ipc : (c + 1) * ipc]
        mine = [next(i for i in range(N) if torch.equal(start.kept[i], each)) for each in chosen]
        first = sum(COUNTS[:c])
        counts = [mine.count(first + i) for i in range(COUNTS[c])]
        assert sum(counts) == ipc and max(counts) - min(counts) <= 1
    said = "1 to 3 images per class, ipc is"
    assert said in caplog.text and ("taken" in caplog.text, "repeated" in caplog.text) == (ipc < 3, ipc > 1)


def test_rows_of_real_images_have_as_many_of_each_class():
    labels = torch.arange(12) % K
    rows = class_order(labels, K, [4, 1, 2], 0)
    chosen = first_of_each_class(rows, [4, 1, 2])
    assert labels[chosen].tolist() == [0, 0, 0, 0, 1, 2, 2]
    with pytest.raises(InputError, match="ipc: 5 images are asked for, but class 1 has 4"):
        class_order(labels, K, [4, 5, 2], 0)
    with pytest.raises(InputError, match="ipc: 5 images are asked for, but class 1 has 4"):
        first_of_each_class(rows, [4, 5, 2])
