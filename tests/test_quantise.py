"""Sets in few bits: what they cost, packing, the search for scales, and files of packed sets."""

import itertools
import math

import numpy as np
import pytest
import torch
from helpers import assert_refused, command_line

from pad import cli
from pad.bits import Cost, packed, unpacked
from pad.data.formation import decoded
from pad.data.images import ImageData
from pad.data.preprocessing import MeanStd, fit_preprocessing, known_preprocessing
from pad.errors import InputError
from pad.labels import hard_logits
from pad.matching.levels import OnLevels
from pad.matching.objective import Gradients, Objective
from pad.quantise import GROUPS, quantised, restored
from pad.store.tensors import load_tensors, save_tensors
from pad.synthetic import SyntheticSet

K, IPC, SHAPE = 5, 3, (2, 3, 5)  # 30 numbers an image: no whole number of bytes in 2 bits
N, VALUES = K * IPC, math.prod(SHAPE)
MEANSTD = MeanStd.of((0.4, 0.6), (0.2, 0.3), "cpu")


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make(hard: bool = False, preprocessing=MEANSTD, ipc: int = IPC, **changes) -> SyntheticSet:
    classes = torch.arange(K).repeat_interleave(ipc)
    labels = hard_logits(classes, K) if hard else 3 * draw(N, K, seed=1)
    metadata = {"class_names": list("abcde"), "model": "ConvNet", "seed": 3}
    fields = {"images": draw(N, *SHAPE), "labels": labels, "lr": torch.tensor(0.013)} | changes
    return SyntheticSet(**fields, classes=classes, metadata=metadata, preprocessing=preprocessing)


# ---- what a set costs


def test_the_cost_of_a_set_by_hand():
    soft, hard = make().cost, make(hard=True).cost
    # 15 images of 2 x 3 x 5 numbers and 15 labels of 5, all of 32 bits; a real image has 30 numbers of 8 bits
    assert soft.as_dict() == {"images": 14_400, "labels": 2_400, "all": 16_800, "per_class": 3_360.0, "real_ipc": 14.0}
    assert (hard.images, hard.labels, hard.real_ipc) == (14_400, 0, 12.0)
    assert str(Cost(14_400, 2_400, 5, 30)) == (
        "16,800 bits (images 14,400, labels 2,400), 3,360 per class, as many as 14 real images per class of 8 bits "
        "a value"
    )


@pytest.mark.parametrize(
    "bits, group, label_bits, top_k, images, labels",
    [
        (8, "set", 32, None, 450 * 8 + 64, 75 * 32),
        (4, "class", 16, None, 450 * 4 + 5 * 64, 75 * 16),
        (2, "image", 8, None, 450 * 2 + 15 * 64, 75 * 8 + 15 * 64),
        (2, "channel", 2, None, 450 * 2 + 30 * 64, 75 * 2 + 15 * 64),
        (2, "set", 32, 2, 450 * 2 + 64, 15 * 2 * (16 + 3)),  # a number below 5 has 3 bits
    ],
)
def test_the_cost_of_a_packed_set_by_hand_and_by_its_tensors(bits, group, label_bits, top_k, images, labels):
    small = make().quantised(bits, group, label_bits, top_k)
    assert (small.cost.images, small.cost.labels, small.cost.classes, small.cost.values) == (images, labels, 5, 30)
    spent = sum(8 * tensor.nbytes for tensor in small.packed.tensors.values())
    assert 0 <= spent - small.cost.all < 16  # less than a byte is lost at the end of either tensor of levels
    assert {name: (each.dtype, tuple(each.shape)) for name, each in small.packed.tensors.items()} == (
        small.packed.packing.layout
    )


# ---- bits in bytes


@pytest.mark.parametrize("width", [1, 2, 3, 4, 7, 8, 10])
@pytest.mark.parametrize("count", [1, 7, 8, 61])
def test_packing_fills_bytes_from_the_lowest_bit_on_and_comes_back(width, count, monkeypatch):
    monkeypatch.setattr("pad.bits._CHUNK", 16)
    numbers = torch.randint(0, 2**width, (count,), generator=torch.Generator().manual_seed(count))
    data = packed(numbers, width)
    whole = sum(number << (i * width) for i, number in enumerate(numbers.tolist()))
    assert data.dtype == torch.uint8 and bytes(data.tolist()) == whole.to_bytes(math.ceil(count * width / 8), "little")
    assert torch.equal(unpacked(data, width, count), numbers)


# ---- scales

SAMPLES = {
    "normal": draw(4, 200),
    "heavy": draw(4, 200) * draw(4, 200, seed=1) ** 2,
    "skew": draw(4, 200).exp(),
    "few": draw(12, 20),
}


def squared_error(values: np.ndarray, low: float, high: float, top: int) -> float:
    step = (high - low) / top
    levels = np.clip(np.round((values - low) / step), 0, top)
    return float(((low + levels * step - values) ** 2).sum())


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("name", SAMPLES)
def test_the_search_is_about_as_good_as_all_clippings_of_a_fine_grid(name, bits):
    values, steps = SAMPLES[name], 60
    levels, scales = quantised(values, bits)
    assert levels.dtype == torch.uint8 and levels.max() <= 2**bits - 1
    found = (restored(levels, scales).double() - values.double()).square().sum(1)
    brute = []
    for row in values.double().numpy():
        least, most = row.min(), row.max()
        cuts = [(most - least) * i / steps for i in range(steps)]
        pairs = [(least + a, most - b) for a, b in itertools.product(cuts, repeat=2) if a + b < 0.99 * (most - least)]
        brute.append(min(squared_error(row, low, high, 2**bits - 1) for low, high in pairs))
    assert (found / torch.tensor(brute)).mean() < 1.01
    without = [squared_error(row, row.min(), row.max(), 2**bits - 1) for row in values.double().numpy()]
    assert bool((found <= torch.tensor(without) * (1 + 1e-5)).all())
    if bits == 2 and name == "heavy":
        assert found.sum() < 0.5 * sum(without)


def test_normal_numbers_have_the_error_that_is_known_of_them():
    """Four evenly spaced levels: step 0.9957, error 0.1188 (J. Max, Quantizing for minimum distortion, 1960)."""
    levels, scales = quantised(draw(1, 400_000), 2)
    assert scales[1].item() == pytest.approx(0.9957, abs=5e-3) and scales[0].item() == pytest.approx(-1.4935, abs=1e-2)
    assert (restored(levels, scales) - draw(1, 400_000)).square().mean().item() == pytest.approx(0.1188, rel=5e-3)


@pytest.mark.parametrize("scale", [1e-20, 1e25])
def test_very_small_and_very_large_numbers_are_quantised_as_others(scale):
    levels, scales = quantised(SAMPLES["normal"], 4)
    expected = (restored(levels, scales) - SAMPLES["normal"]).double().norm()
    levels, scales = quantised(SAMPLES["normal"] * scale, 4)
    found = (restored(levels, scales).double() / scale - SAMPLES["normal"]).norm()
    assert found == pytest.approx(expected.item(), rel=1e-2)


def test_numbers_on_a_grid_and_equal_numbers_are_exact():
    grid = torch.tensor([[0.0, 1, 2, 3, 2, 1], [-7.0, -5, -3, -1, -1, -1], [0.3] * 6])
    levels, scales = quantised(grid, 2)
    torch.testing.assert_close(restored(levels, scales), grid, rtol=0, atol=1e-6)


def test_groups_are_searched_alone_however_many_at_a_time(monkeypatch):
    values = SAMPLES["few"]
    together = quantised(values, 4)
    monkeypatch.setattr("pad.quantise._AT_ONCE", 50)
    apart = quantised(values, 4)
    assert all(map(torch.equal, together, apart))
    for i, row in enumerate(values):
        levels, scales = quantised(row[None], 4)
        assert torch.equal(levels[0], together[0][i]) and torch.equal(scales[:, 0], together[1][:, i])


def test_the_error_shrinks_with_bits_and_with_smaller_groups():
    scale = torch.linspace(0.2, 3, N)[:, None, None, None] * torch.tensor([1.0, 0.3]).view(2, 1, 1)
    whole = make(images=draw(N, *SHAPE) * scale)

    def error(*how) -> float:
        return (whole.quantised(*how).images - whole.images).double().square().sum().item()

    assert error(2) > 5 * error(4) > 25 * error(8) > 0
    by_group = [error(4, group) for group in GROUPS]
    assert by_group == sorted(by_group, reverse=True) and by_group[0] > 1.5 * by_group[-1]


# ---- labels


@pytest.mark.parametrize("label_bits, most", [(32, 0), (16, 2e-3), (8, 1e-2), (4, 0.2), (2, 0.6)])
def test_labels_of_fewer_bits_move_little(label_bits, most):
    whole = make()
    p = whole.labels.double().softmax(1)
    moved = (whole.quantised(8, label_bits=label_bits).labels.double().softmax(1) - p).abs().sum(1) / 2
    assert moved.max() <= most and (label_bits == 32 or moved.max() > most / 100)


def test_a_class_that_is_out_of_the_question_costs_the_others_nothing():
    whole = make()
    whole.labels[:, 1] = -1000
    moved = whole.quantised(8, label_bits=8).probabilities() - whole.probabilities()
    assert moved.abs().max() < 0.02


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_only_the_largest_probabilities_are_kept_the_rest_is_spread_evenly(top_k):
    whole = make()
    found = whole.quantised(8, top_k=top_k).labels.double().softmax(1).numpy()
    for row, expected in zip(found, whole.labels.double().softmax(1).numpy()):
        kept = np.argsort(-expected)[:top_k]
        rest = np.full(K, (1 - expected[kept].sum()) / (K - top_k))
        rest[kept] = expected[kept]
        np.testing.assert_allclose(row, rest, rtol=0, atol=1e-3)


def test_hard_labels_cost_nothing_and_stay(tmp_path):
    small = make(hard=True).quantised(2, label_bits=8)
    small.save(tmp_path / "set")
    loaded = SyntheticSet.load(tmp_path / "set")
    assert loaded.cost.labels == 0 and loaded.is_hard and torch.equal(loaded.labels, make(hard=True).labels)


# ---- files


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("how", [(32,), (16,), (8,), (2,), (32, 3)])
def test_a_packed_set_is_read_like_any_set_and_written_the_same_again(bits, group, how, tmp_path):
    small = make().quantised(bits, group, *how)
    small.save(tmp_path / "a")
    loaded = SyntheticSet.load(tmp_path / "a")
    for name in ("images", "labels", "lr", "classes"):
        assert torch.equal(getattr(loaded, name), getattr(small, name)), name
    assert loaded.digest == small.digest != make().digest
    assert loaded.cost == small.cost and torch.equal(loaded.pixels(), small.pixels())
    loaded.save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    tensors, metadata = load_tensors(tmp_path / "a")
    assert metadata["provenance"]["quantised"]["from"] == make().digest
    size, blocks = (tmp_path / "a").stat().st_size, len(tensors) + 2
    head = int.from_bytes((tmp_path / "a").read_bytes()[:8], "little") + 8
    assert size * 8 - small.cost.all <= 8 * (head + 8 * (blocks + 1) + 4) + 16  # checksums, the rate, part of a byte


@pytest.mark.parametrize("group", GROUPS)
def test_of_multi_formation_the_stored_images_are_quantised(group, tmp_path):
    stored, labels = draw(2 * K, 2, 4, 6), 3 * draw(8 * K, K, seed=1)
    whole = make(images=decoded(stored, 2, K), stored=stored, labels=labels, ipc=8)
    small = whole.quantised(2, group, 8)
    groups = {"set": 1, "class": 5, "image": 10, "channel": 20}[group]
    assert (small.cost.images, small.cost.labels) == (480 * 2 + 64 * groups, 40 * (5 * 8 + 64))
    assert small.cost.real_ipc == pytest.approx(small.cost.all / (5 * 48 * 8)) and whole.cost.images == 480 * 32
    levels, scales = quantised(stored.reshape(groups, -1), 2)
    small.save(tmp_path / "a")
    loaded = SyntheticSet.load(tmp_path / "a")
    assert torch.equal(loaded.stored, restored(levels, scales).view_as(stored)) and loaded.factor == 2
    assert torch.equal(loaded.images, decoded(loaded.stored, 2, K)) and loaded.digest == small.digest
    loaded.save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_set_that_was_changed_since_is_not_written(tmp_path):
    small = make().quantised(4)
    small.images = small.images + 1
    with pytest.raises(InputError, match="images or labels are not those that it has packed"):
        small.save(tmp_path / "set")
    assert not list(tmp_path.iterdir())


def test_a_whitened_set_has_pixels_where_its_whitening_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("PAD_CACHE", str(tmp_path / "cache"))
    pixels = torch.randint(0, 256, (20, *SHAPE), generator=torch.Generator().manual_seed(0)).byte()
    numbers = torch.arange(20) % 2
    data = ImageData(
        name="Odd",
        train_images=pixels,
        train_labels=numbers,
        test_images=pixels,
        test_labels=numbers,
        class_names=("a", "b"),
        mean=(0.5, 0.5),
        std=(0.5, 0.5),
    )
    zca = fit_preprocessing(data, True)
    make(preprocessing=zca).quantised(8).save(tmp_path / "set")
    loaded = SyntheticSet.load(tmp_path / "set")
    assert torch.equal(loaded.unclamped_pixels(), zca.invert(loaded.images))
    monkeypatch.setenv("PAD_CACHE", str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="whitening that they come back by is not kept here"):
        SyntheticSet.load(tmp_path / "set").pixels()


@pytest.mark.parametrize(
    "identity",
    [
        None,
        3,
        {},
        {"kind": "zca"},
        {"kind": "zca", "digest": "a\0", "shape": [1]},
        {"kind": "meanstd", "mean": 1},
        {**MEANSTD.identity, "std": ["a", "b"]},
        {**MEANSTD.identity, "digest": "0"},
    ],
)
def test_no_preprocessing_is_made_of_an_identity_that_is_none(identity):
    assert known_preprocessing(identity) is None
    assert known_preprocessing(MEANSTD.identity).identity == MEANSTD.identity


def described(**changes) -> dict:
    how = {"bits": 4, "group": "image", "label_bits": 8, "top_k": None, "shape": [N, *SHAPE], "labels": [N, K]}
    return how | changes


@pytest.mark.parametrize(
    "changes",
    [
        {"bits": 3},
        {"bits": 8.0},
        {"bits": "4"},
        {"group": "patch"},
        {"group": []},
        {"label_bits": 5},
        {"top_k": 0},
        {"top_k": K},
        {"top_k": True},
        {"shape": [N]},
        {"shape": 5},
        {"shape": [N, 2, 3, -5]},
        {"shape": [10**30, 2, 3, 5]},
        {"labels": [N, K, 1]},
        {"labels": [N + 1, K]},
        {"labels": None},
        {"more": 1},
        {"bits": 2},
        {"label_bits": 2},
    ],
)
def test_a_file_with_another_description_than_tensors_is_refused(changes, tmp_path):
    tensors = {**make().quantised(4, label_bits=8).packed.tensors, "lr": torch.tensor(0.1)}
    about = {"kind": "synthetic set", "format": 1}
    save_tensors(tmp_path / "set", tensors, {**about, "packing": described()})
    SyntheticSet.load(tmp_path / "set")
    for packing in (described(**changes), None, [1], "words"):
        save_tensors(tmp_path / "set", tensors, {**about, "packing": packing})
        with pytest.raises(InputError, match="set is no packed set: "):
            SyntheticSet.load(tmp_path / "set")


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("levels", None, "other tensors than its description says"),
        ("lr", None, "holds no lr"),
        ("label_classes", torch.full_like(torch.empty(12), 255).byte(), "labels of other than 5 classes"),
        ("label_values", torch.full((30,), torch.nan).half(), "labels with a value that is not finite"),
        ("scales", torch.full((2, N), torch.inf), "images with a value that is not finite"),
        ("more", torch.zeros(1), "other tensors"),
    ],
)
def test_a_damaged_packed_set_is_refused_by_name(name, value, message, tmp_path):
    small = make().quantised(4, top_k=2)
    tensors = {**small.packed.tensors, "lr": torch.tensor(0.1), name: value}
    about = {"kind": "synthetic set", "format": 1, "packing": small.packed.packing.as_dict()}
    save_tensors(tmp_path / "set", {key: each for key, each in tensors.items() if each is not None}, about)
    with pytest.raises(InputError, match=message) as error:
        SyntheticSet.load(tmp_path / "set")
    assert str(tmp_path / "set") in str(error.value)


# ---- the command


def quantise(source, out, *more: str, **settings) -> SyntheticSet:
    assert cli.quantise(command_line(*more, source=source, out=out, **settings)) == 0
    return SyntheticSet.load(out)


def test_the_command_says_what_a_set_cost_and_costs(tmp_path, capsys):
    whole = make()
    whole.save(tmp_path / "set.safetensors")
    small = quantise(tmp_path / "set.safetensors", tmp_path / "small", bits=2, top_k=2, group="channel", budget=760)
    cost = small.cost
    assert cost.all == 450 * 2 + 30 * 64 + 30 * 19 == small.packed.packing.cost.all
    said = capsys.readouterr().out
    assert f"before: {whole.cost}\nnow: {cost}\n" in said
    off = (small.images - whole.images).double().square().mean().sqrt()
    assert f"differ by {off:.4g} (root mean square)" in said


def test_label_bits_of_hard_labels_do_nothing_and_say_so(tmp_path, capsys):
    make(hard=True).save(tmp_path / "set")
    assert quantise(tmp_path / "set", tmp_path / "small", bits=4, label_bits=8).cost.labels == 0
    assert "label_bits and top_k do nothing: the labels are hard" in capsys.readouterr().err


@pytest.mark.parametrize(
    "more, words",
    [
        ("", ("give --bits", "the set")),
        ("--bits 3", ("bits: 3 is not one of 8, 4, 2",)),
        ("--bits 2 --label_bits 5", ("label_bits: 5 is not one of 32, 16, 8, 4, 2",)),
        ("--bits 2 --group patch", ("group: 'patch' is not one of set, class, image, channel",)),
        ("--bits 2 --top_k 5", ("top_k: 5 of 5 classes leaves nothing out",)),
        ("--bits 2 --top_k 2 --label_bits 8", ("label_bits and top_k exclude each other",)),
        ("--bits 2 --budget 851", ("budget: 851 bits per class are exceeded: 4,260 bits", "852 per class")),
        ("--bits 2 --budget 0", ("budget: 0 is out of range",)),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(more, words, tmp_path, capfd):
    make().save(tmp_path / "set")
    argv = command_line(more, source=tmp_path / "set", out=tmp_path / "small")
    assert_refused(capfd, cli.quantise, argv, words, tmp_path)


@pytest.mark.parametrize("door", ["quantise", "import_set"])
def test_a_file_is_not_named_as_those_of_others_are(tmp_path, capfd, door):
    make().save(tmp_path / "set")
    argv = command_line(source=tmp_path / "set", out=tmp_path / "set.pt", **{"bits": 2} if door == "quantise" else {})
    assert_refused(capfd, getattr(cli, door), argv, ("set.pt is named as files of others are",), tmp_path)


def test_a_file_is_replaced_only_when_told(tmp_path, capfd):
    make().save(tmp_path / "set")
    argv = command_line(source=tmp_path / "set", out=tmp_path / "set", bits=2)
    assert_refused(capfd, cli.quantise, argv, ("set is there", "--overwrite"), tmp_path)
    assert quantise(tmp_path / "set", tmp_path / "set", "--overwrite", bits=2).packed is not None


# ---- tuning levels


class Pulled(Objective):
    """Pulls images to ``target``: two steps of a quadratic. Keeps what it was shown."""

    def __init__(self, target: torch.Tensor):
        self.target, self.shown = target, []

    def steps(self, it, images, labels, lr):
        for _ in range(2):
            self.shown.append(images.clone())
            off = images - self.target
            yield Gradients(off.square().sum(), 2 * off, torch.ones_like(labels), torch.ones_like(lr))


@pytest.mark.parametrize("group", GROUPS)
def test_steps_add_up_until_images_reach_another_level(group):
    small = make().quantised(2, group)
    packed_set, target = small.packed, draw(N, *SHAPE, seed=7)
    inner = Pulled(target)
    objective = OnLevels(objective=inner, packed=packed_set)
    images, labels, lr = small.images.clone(), small.labels.clone(), torch.tensor(0.1)
    groups = packed_set.packing.groups
    low, step = (scale.double().numpy()[:, None] for scale in packed_set.tensors["scales"])
    for it in range(30):
        for found in objective.steps(it, images, labels, lr):
            values = images.double().numpy().reshape(groups, -1)
            grid = low[..., None] + np.arange(4) * step[..., None]  # [groups, 1, 4]
            choice = np.abs(values[..., None] - grid).argmin(-1)
            expected = np.take_along_axis(np.broadcast_to(grid, (*values.shape, 4)), choice[..., None], -1)[..., 0]
            np.testing.assert_allclose(inner.shown[-1].numpy().reshape(groups, -1), expected, rtol=0, atol=1e-5)
            np.testing.assert_allclose(
                found.images.numpy().reshape(groups, -1), 2 * (expected - target.numpy().reshape(groups, -1)), atol=1e-4
            )
            assert not found.labels.any() and found.lr == 1
            images.sub_(found.images, alpha=0.05)
    end = packed_set.moved(images)
    assert torch.equal(end.unpacked()[0], packed_set.nearest(images)) and torch.equal(end.unpacked()[1], labels)
    assert torch.equal(end.tensors["scales"], packed_set.tensors["scales"])

    def off(images: torch.Tensor) -> float:
        return (images - target).square().sum().item()

    assert off(end.unpacked()[0]) < 0.5 * off(small.images)
    assert torch.equal(packed_set.moved(small.images).tensors["levels"], packed_set.tensors["levels"])
