import os
import pickle

import numpy as np
import pytest
import torch

from pad.data.preprocessing import ZCA, MeanStd
from pad.errors import InputError
from pad.labels import hard_logits
from pad.store.foreign import load_pt
from pad.store.tensors import load_tensors, save_tensors
from pad.synthetic import SyntheticSet

K, IPC, SHAPE = 3, 2, (2, 4, 5)
D = 40
MEANSTD = MeanStd.of((0.4, 0.6), (0.2, 0.3), "cpu")
GENERATOR = torch.Generator().manual_seed(5)
ZCA_MEAN, UNWHITEN = torch.rand(D, generator=GENERATOR), torch.randn(D, D, generator=GENERATOR) / 6
WHITENED = ZCA(
    {"kind": "zca", "eps": 0.1, "shape": list(SHAPE), "digest": "abc"}, {"mean": ZCA_MEAN, "unwhiten": UNWHITEN}
)


def unwhitened(images):
    return (images.flatten(1) @ UNWHITEN + ZCA_MEAN).view_as(images)


def make(preprocessing=None, **changes) -> SyntheticSet:
    g = torch.Generator().manual_seed(0)
    fields = {
        "images": torch.randn(K * IPC, *SHAPE, generator=g),
        "labels": torch.randn(K * IPC, K, generator=g),
        "lr": torch.tensor(0.013),
        "classes": torch.tensor([0, 0, 1, 1, 2, 2]),
        "metadata": {"class_names": ["cat", "dog", "ox"], "model": "ConvNet", "seed": 3, "settings": {"lr_img": 100.0}},
    }
    return SyntheticSet(**(fields | changes), preprocessing=preprocessing)


def published(folder, **changes):
    """A trio as other tools write it; ``changes`` replaces what a file holds."""
    values = {"images": torch.randn(6, *SHAPE), "labels": torch.randn(6, K), "lr": torch.tensor(0.02)} | changes
    paths = []
    for name, value in values.items():
        paths.append(folder / f"{name}_best.pt")
        torch.save(value, paths[-1])
    return paths


def test_probabilities_are_the_softmax_of_the_labels():
    synthetic = make()
    exponentials = synthetic.labels.double().exp()
    expected = exponentials / exponentials.sum(1, keepdim=True)
    torch.testing.assert_close(synthetic.probabilities().double(), expected, rtol=1e-6, atol=1e-7)


def test_pixels_undo_the_preprocessing_and_are_clamped():
    images = torch.zeros(6, *SHAPE)
    images[0, 0, 0, 0], images[1, 1, 0, 0] = 100.0, -100.0
    pixels = make(MEANSTD, images=images).pixels()
    assert pixels[0, 0, 0, 0] == 1 and pixels[1, 1, 0, 0] == 0
    torch.testing.assert_close(pixels[2], torch.tensor([0.4, 0.6]).view(2, 1, 1).expand(SHAPE))


def test_a_saved_set_comes_back_whole_and_can_be_viewed_without_its_preprocessing(tmp_path):
    synthetic = make(MEANSTD)
    synthetic.save(tmp_path / "set.safetensors")
    loaded = SyntheticSet.load(tmp_path / "set.safetensors")
    for name in ("images", "labels", "lr", "classes"):
        assert torch.equal(getattr(loaded, name), getattr(synthetic, name)), name
    assert loaded.preprocessing is None
    assert torch.equal(loaded.pixels(), synthetic.pixels())
    assert loaded.metadata["model"] == "ConvNet" and loaded.metadata["settings"] == {"lr_img": 100.0}
    assert loaded.metadata["ipc"] == loaded.ipc == 2 and loaded.num_classes == 3
    assert loaded.metadata["preprocessing"] == MEANSTD.identity == loaded.preprocessing_identity
    assert loaded.class_names == ["cat", "dog", "ox"]


def test_the_same_set_gives_the_same_bytes_also_by_way_of_a_file(tmp_path):
    make(MEANSTD).save(tmp_path / "a")
    make(MEANSTD).save(tmp_path / "b")
    SyntheticSet.load(tmp_path / "a").save(tmp_path / "c")
    bytes_a = (tmp_path / "a").read_bytes()
    assert bytes_a == (tmp_path / "b").read_bytes() == (tmp_path / "c").read_bytes()
    make(MEANSTD, lr=torch.tensor(0.014)).save(tmp_path / "d")
    assert bytes_a != (tmp_path / "d").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "c", "d"]


def test_a_set_of_unknown_preprocessing_is_saved_and_cannot_be_shown(tmp_path):
    make().save(tmp_path / "set")
    loaded = SyntheticSet.load(tmp_path / "set")
    with pytest.raises(InputError, match="preprocess"):
        loaded.pixels()
    loaded.preprocessing = MEANSTD
    assert loaded.pixels().shape == (6, *SHAPE)


def test_tensors_that_need_gradients_or_are_views_are_saved(tmp_path):
    whole = torch.randn(60, *SHAPE)
    make(images=whole[::10].requires_grad_(), labels=torch.randn(6, K, requires_grad=True)).save(tmp_path / "set")
    assert torch.equal(SyntheticSet.load(tmp_path / "set").images, whole[::10].detach())
    make(images=whole[:6]).export_published(tmp_path, "best")
    assert (tmp_path / "images_best.pt").stat().st_size < whole.numel() * 4 / 2


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"images": torch.randn(6, 2, 4)}, r"images are a tensor of shape \[6, 2, 4\]"),
        ({"images": torch.randn(6, *SHAPE).double()}, "images of type torch.float64"),
        ({"images": torch.full((6, *SHAPE), torch.nan)}, "images with a value that is not finite"),
        ({"images": torch.randn(5, *SHAPE)}, "6 labels for 5 images"),
        ({"images": torch.randn(0, *SHAPE), "labels": torch.randn(0, K)}, "images are a tensor of shape"),
        ({"images": torch.randn(7, *SHAPE), "labels": torch.randn(7, K)}, "classes are not 0 to 2 in order"),
        ({"labels": torch.tensor([0, 0, 1, 1, 2, 2])}, r"labels are a tensor of shape \[6\]"),
        ({"labels": torch.full((6, K), torch.inf)}, "labels with a value that is not finite"),
        ({"lr": torch.tensor([0.1])}, r"lr is a tensor of shape \[1\]"),
        ({"lr": torch.tensor(0.0)}, "lr is 0"),
        ({"lr": torch.tensor(-0.5)}, "lr is -0.5"),
        ({"lr": torch.tensor(torch.nan)}, "lr with a value that is not finite"),
        *[
            ({"classes": torch.tensor(classes)}, "classes are not 0 to 2 in order, each of them there")
            for classes in ([0, 1, 2, 0, 1, 2], [0, 0, 0, 1, 1, 1], [0, 0, 0, 2, 2, 2], [1, 1, 1, 1, 2, 2], [0, 1, 2])
        ],
        ({"metadata": {"class_names": ["cat"]}}, "1 class names for 3 classes"),
        ({"stored_pixels": torch.randn(6, 2, 4, 4)}, "pixels are not"),
    ],
)
def test_an_unusable_set_is_neither_saved_nor_loaded(tmp_path, changes, message):
    path = tmp_path / "set.safetensors"
    synthetic = make(**changes)
    with pytest.raises(InputError, match=message) as error:
        synthetic.save(path)
    assert str(path) in str(error.value) and not path.exists()

    tensors = {name: getattr(synthetic, name) for name in ("images", "labels", "lr", "classes")}
    if synthetic.stored_pixels is not None:
        tensors["pixels"] = synthetic.stored_pixels
    save_tensors(path, tensors, synthetic.metadata | {"kind": "synthetic set", "format": 1})
    with pytest.raises(InputError, match=message) as error:
        SyntheticSet.load(path)
    assert str(path) in str(error.value)


def test_files_that_are_no_synthetic_set_are_refused_by_name(tmp_path):
    path = tmp_path / "set.safetensors"
    with pytest.raises(InputError, match="set.safetensors does not exist"):
        SyntheticSet.load(path)
    make().save(path)
    whole = path.read_bytes()
    for damaged in (whole[:-10], whole[:20], b"", b"not a file of tensors" * 10):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match="set.safetensors is not a whole"):
            SyntheticSet.load(path)
    path.write_bytes(whole)
    tensors, metadata = load_tensors(path)
    for wrong, message in [({"kind": "trajectory"}, "is not a synthetic set"), ({"format": 2}, "has format 2")]:
        save_tensors(path, tensors, metadata | wrong)
        with pytest.raises(InputError, match=f"set.safetensors {message}"):
            SyntheticSet.load(path)
    save_tensors(path, {"images": tensors["images"], "classes": tensors["classes"]}, metadata)
    with pytest.raises(InputError, match="set.safetensors holds no labels and no lr"):
        SyntheticSet.load(path)


@pytest.mark.parametrize("preprocessing", [MEANSTD, WHITENED], ids=["meanstd", "zca"])
def test_the_published_trio_goes_out_and_comes_back(tmp_path, preprocessing):
    synthetic = make(preprocessing, images=torch.randn(6, *SHAPE) * 5)
    synthetic.export_published(tmp_path, 1000)
    expected = ["images_1000.pt", "labels_1000.pt", "lr_1000.pt"] + ["images_zca_1000.pt"] * (preprocessing is WHITENED)
    assert sorted(os.listdir(tmp_path)) == sorted(expected)
    back = SyntheticSet.from_published(*(tmp_path / f"{name}_1000.pt" for name in ("images", "labels", "lr")))
    for name in ("images", "labels", "lr", "classes"):
        assert torch.equal(getattr(back, name), getattr(synthetic, name)), name
    assert load_pt(tmp_path / "lr_1000.pt").shape == ()
    if preprocessing is WHITENED:
        torch.testing.assert_close(load_pt(tmp_path / "images_zca_1000.pt"), unwhitened(synthetic.images))
    back.save(tmp_path / "imported")
    assert SyntheticSet.load(tmp_path / "imported").metadata["provenance"]["published"][0] == "images_1000.pt"


def test_a_loaded_zca_set_still_exports_its_unclamped_pixels(tmp_path):
    synthetic = make(WHITENED, images=torch.randn(6, *SHAPE) * 5)
    synthetic.save(tmp_path / "set")
    SyntheticSet.load(tmp_path / "set").export_published(tmp_path, "best")
    torch.testing.assert_close(load_pt(tmp_path / "images_zca_best.pt"), unwhitened(synthetic.images))


def test_published_files_of_other_precision_or_with_gradients_are_read(tmp_path):
    images, labels = torch.randn(6, *SHAPE).double(), torch.nn.Parameter(torch.randn(6, K))
    back = SyntheticSet.from_published(*published(tmp_path, images=images, labels=labels, lr=torch.tensor([0.02])))
    assert torch.equal(back.images, images.float()) and back.lr.shape == ()
    assert torch.equal(back.labels, labels.detach()) and not back.labels.requires_grad
    assert back.classes.tolist() == [0, 0, 1, 1, 2, 2] and back.class_names == ["0", "1", "2"]


CLASSES = torch.tensor([0, 0, 1, 1, 2, 2])
ONE_HOT = torch.eye(K, dtype=torch.float64).repeat_interleave(2, dim=0)
SOFT = torch.rand(6, K, dtype=torch.float64, generator=GENERATOR) + 1e-9
SOFT = SOFT / SOFT.sum(1, keepdim=True)


@pytest.mark.parametrize(
    "labels, expected, atol",
    [
        *((CLASSES.to(dtype), ONE_HOT, 0) for dtype in (torch.int64, torch.int32, torch.uint8, torch.uint16)),
        (CLASSES[:, None], ONE_HOT, 0),
        (CLASSES.float(), ONE_HOT, 0),
        (CLASSES.to(torch.float8_e4m3fn), ONE_HOT, 0),
        (CLASSES.tolist(), ONE_HOT, 0),
        (CLASSES.numpy(), ONE_HOT, 0),
        ({"labels": CLASSES}, ONE_HOT, 0),
        *((ONE_HOT.to(dtype), ONE_HOT, 0) for dtype in (torch.int64, torch.bool, torch.float32, torch.bfloat16)),
        (SOFT, SOFT, 1e-7),
        (SOFT.float().numpy(), SOFT, 1e-7),
        (SOFT.half(), SOFT.half().double() / SOFT.half().double().sum(1, keepdim=True), 1e-7),
        (torch.tensor([[0.5, 0.5, 0.0]] * 6), torch.tensor([[0.5, 0.5, 0.0]] * 6).double(), 1e-7),
        (SOFT.log() + 3, SOFT, 1e-6),
        ((SOFT - 0.5).log1p(), (SOFT + 0.5) / (SOFT + 0.5).sum(1, keepdim=True), 1e-6),
    ],
    ids=lambda value: f"{type(value).__name__} {getattr(value, 'dtype', '')}",
)
def test_labels_of_others_are_what_they_mean(tmp_path, caplog, labels, expected, atol):
    """The targets: one-hot of class numbers, probabilities as they are, the softmax of everything else."""
    loaded = SyntheticSet.from_published(*published(tmp_path, labels=labels))
    torch.testing.assert_close(loaded.labels.double().softmax(1), expected, rtol=0, atol=atol)
    torch.testing.assert_close(loaded.probabilities().double(), expected, rtol=0, atol=atol)
    loaded.save(tmp_path / "set")
    assert torch.equal(SyntheticSet.load(tmp_path / "set").labels, loaded.labels)


@pytest.mark.parametrize("labels, said", [(CLASSES, "class numbers"), (SOFT, "probabilities"), (SOFT.log(), None)])
def test_it_is_said_what_labels_are_taken_for(tmp_path, caplog, labels, said):
    caplog.set_level("INFO", "pad")
    SyntheticSet.from_published(*published(tmp_path, labels=labels))
    assert [said in record.getMessage() for record in caplog.records] == [True] * (said is not None)


@pytest.mark.parametrize(
    "lr",
    [0.25, [0.25], np.float32(0.25), np.array(0.25), np.array([[0.25]], ">f8"), torch.tensor([[0.25]]).double()]
    + [torch.nn.Parameter(torch.tensor(0.25)), {"lr": torch.tensor(0.25)}, (torch.tensor([0.25]).half(),)],
    ids=lambda value: f"{type(value).__name__} {getattr(value, 'dtype', '')}",
)
def test_a_learning_rate_in_any_form_is_the_number(tmp_path, lr):
    loaded = SyntheticSet.from_published(*published(tmp_path, lr=lr))
    assert torch.equal(loaded.lr, torch.tensor(0.25)) and not loaded.lr.requires_grad


def test_a_learning_rate_needs_no_file(tmp_path):
    images, labels, _ = published(tmp_path)
    loaded = SyntheticSet.from_published(images, labels, 0.25)
    assert torch.equal(loaded.lr, torch.tensor(0.25))
    assert loaded.metadata["provenance"]["published"] == ["images_best.pt", "labels_best.pt", "0.25"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_images_of_other_precision_are_read(tmp_path, dtype):
    images = torch.randn(6, *SHAPE).to(dtype)
    loaded = SyntheticSet.from_published(*published(tmp_path, images=images))
    assert torch.equal(loaded.images, images.float())
    whole = SyntheticSet.from_published(*published(tmp_path, images=[images.double().numpy()]))
    assert torch.equal(whole.images, images.float())


def test_images_that_look_like_pixels_are_scored_with_a_warning(tmp_path, caplog):
    SyntheticSet.from_published(*published(tmp_path))
    assert not caplog.records
    SyntheticSet.from_published(*published(tmp_path, images=torch.rand(6, *SHAPE)))
    assert "images_best.pt: all values are in 0..1" in caplog.text


class Malicious:
    """A pickle that creates a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.filterwarnings("ignore:Validating sparse")
@pytest.mark.parametrize(
    "changes, file, message",
    [
        ({"images": torch.randn(6, 4, 5)}, "images", r"images are a tensor of shape \[6, 4, 5\]"),
        ({"images": [torch.randn(2)]}, "images", r"images are a tensor of shape \[2\]"),
        ({"images": list(torch.randn(6, *SHAPE))}, "images", "holds a list of 6, not one tensor"),
        (
            {"images": {"data": torch.zeros(2), "accs_all_exps": {}}},
            "images",
            r"holds a dict of 2 \(data, accs_all_exps\), not one tensor",
        ),
        ({"images": "images"}, "images", "holds a str, not one tensor"),
        ({"images": torch.zeros(6, *SHAPE, dtype=torch.complex64)}, "images", "torch.complex64"),
        ({"images": torch.zeros(6, *SHAPE, dtype=torch.uint8)}, "images", "torch.uint8"),
        ({"images": torch.full((6, *SHAPE), 1e300, dtype=torch.float64)}, "images", "not finite"),
        ({"images": torch.randn(7, *SHAPE), "labels": torch.randn(7, K)}, "images", "7 images are not a multiple"),
        ({"images": torch.randn(6, *SHAPE).to_sparse()}, "images", "torch.sparse_coo"),
        ({"labels": torch.tensor([0, 0, 1, 1, 2, -1])}, "labels", "6 labels are not numbers of classes"),
        ({"labels": torch.tensor([0, 0, 1, 1, 2, 6])}, "labels", "6 labels are not numbers of classes"),
        ({"labels": torch.tensor([0, 0, 0, 0, 2, 2])}, "labels", "6 labels are not numbers of classes"),
        ({"labels": torch.tensor([0, 0, 1, 1, 2])}, "labels", "5 labels for 6 images"),
        ({"labels": torch.full((6, K), 2)}, "labels", "whole numbers, neither class numbers nor one-hot"),
        ({"labels": torch.randn(6)}, "labels", r"labels are a tensor of shape \[6\]"),
        ({"labels": torch.tensor(1.0)}, "labels", r"labels are a tensor of shape \[\]"),
        ({"labels": torch.randn(5, K)}, "labels", "5 labels for 6 images"),
        ({"labels": torch.randn(6, 0)}, "labels", r"shape \[6, 0\]"),
        ({"labels": torch.randn(0, K)}, "labels", r"shape \[0, 3\]"),
        ({"labels": torch.zeros(0, dtype=torch.int64)}, "labels", r"shape \[0\]"),
        ({"lr": torch.tensor([0.1, 0.2])}, "lr", r"lr is a tensor of shape \[2\]"),
        ({"lr": torch.tensor(-0.1)}, "lr", "lr is -0.1"),
        ({"lr": 0}, "lr", "lr is 0"),
        ({"lr": []}, "lr", r"lr is a tensor of shape \[0\]"),
        ({"lr": "0.01"}, "lr", "holds a str, not one tensor"),
        ({"lr": 2**2000}, "lr", "holds a int, not one tensor"),
    ],
)
def test_an_unusable_published_file_is_named(tmp_path, changes, file, message):
    paths = published(tmp_path, **changes)
    with pytest.raises(InputError, match=message) as error:
        SyntheticSet.from_published(*paths)
    assert str(tmp_path / f"{file}_best.pt") in str(error.value)


def test_missing_truncated_and_malicious_published_files(tmp_path):
    paths = published(tmp_path)
    whole = paths[0].read_bytes()
    for position in range(3):
        given = list(paths)
        given[position] = tmp_path / "absent.pt"
        with pytest.raises(InputError, match="absent.pt does not exist"):
            SyntheticSet.from_published(*given)
    for damaged in (whole[:100], whole[: len(whole) // 2], b"\x00" * 50):
        paths[0].write_bytes(damaged)
        with pytest.raises(InputError, match="images_best.pt"):
            SyntheticSet.from_published(*paths)
    victim = tmp_path / "victim"
    for write in (
        lambda: torch.save(Malicious(str(victim)), paths[0]),
        lambda: paths[0].write_bytes(pickle.dumps(Malicious(str(victim)), protocol=2)),
    ):
        write()
        with pytest.raises(InputError, match="images_best.pt"):
            SyntheticSet.from_published(*paths)
        assert not victim.exists()
    pickle.loads(pickle.dumps(Malicious(str(victim)))).close()
    assert victim.exists()  # the pickle does what it says where pickles are run


def test_the_dataset_pairs_images_with_logits():
    synthetic = make()
    dataset = synthetic.to_dataset()
    image, label = dataset[4]
    assert len(dataset) == 6 and torch.equal(image, synthetic.images[4]) and torch.equal(label, synthetic.labels[4])


def test_tensors_for_dd_ranking():
    """As its metrics take them: soft labels as logits, hard ones as class numbers."""
    soft = make()
    assert not soft.is_hard
    assert soft.for_dd_ranking().keys() == {"image_tensor", "soft_labels", "syn_lr"}
    assert soft.for_dd_ranking()["soft_labels"] is soft.labels and soft.for_dd_ranking()["image_tensor"] is soft.images
    hard = make(labels=hard_logits(soft.classes, K))
    assert hard.is_hard and hard.for_dd_ranking()["hard_labels"].tolist() == [0, 0, 1, 1, 2, 2]
    assert hard.for_dd_ranking()["syn_lr"] == pytest.approx(0.013) and type(hard.for_dd_ranking()["syn_lr"]) is float
    assert not make(labels=hard_logits(soft.classes.flip(0), K)).is_hard, "of other classes than the images stand for"
