import json
import logging
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from pad import evaluation
from pad.commands.distil import distill
from pad.commands.evaluate import EvaluationSettings, evaluate
from pad.commands.record import BufferSettings, record_experts
from pad.commands.trajectory import DistillSettings
from pad.data import placement
from pad.data.augment import DSA
from pad.data.images import ImageData
from pad.data.placement import HostImages, batches, fits, place, to_device
from pad.data.preprocessing import fit_preprocessing
from pad.difficulty.methods import score_images
from pad.difficulty.training import ScoringSettings, ScoringTraining
from pad.errors import InputError
from pad.experts.gsam import GSAM
from pad.experts.trainer import ExpertTraining
from pad.initialisation import Experts, initial_set
from pad.nn.flat import FlatModel
from pad.nn.networks import build

N, SHAPE, CLASSES = 1500, (3, 8, 8), 4


@pytest.fixture(scope="module", params=["meanstd", "zca"])
def preprocessed(request, tmp_path_factory):
    """Pixels, their preprocessing, and the images it gives when it is applied to all of them at once."""
    rng = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (N, *SHAPE), dtype=torch.uint8, generator=rng)
    labels = torch.arange(N) % CLASSES
    data = ImageData(
        name="random",
        train_images=pixels,
        train_labels=labels,
        test_images=pixels[:9],
        test_labels=labels[:9],
        class_names=tuple("abcd"),
        mean=(0.4, 0.5, 0.6),
        std=(0.2, 0.3, 0.4),
    )
    preprocessing = fit_preprocessing(data, request.param == "zca", tmp_path_factory.mktemp("zca"))
    return SimpleNamespace(pixels=pixels, labels=labels, preprocessing=preprocessing, all=preprocessing.apply(pixels))


@pytest.fixture()
def both(preprocessed):
    """The same images on the device and in host memory."""
    on_device, on_host = (place(preprocessed.pixels, preprocessed.preprocessing, where) for where in ("device", "host"))
    assert isinstance(on_device, Tensor) and isinstance(on_host, HostImages)
    return on_device, on_host


# ---------------------------------------------------------------------------------------------- the same images


def test_placed_images_are_the_preprocessed_ones(preprocessed, both):
    on_device, on_host = both
    if preprocessed.preprocessing.kind == "meanstd":
        assert torch.equal(on_device, preprocessed.all)
    torch.testing.assert_close(on_device, preprocessed.all, rtol=0, atol=1e-5)  # ZCA: products of other shapes
    assert (on_host.shape, on_host.dtype, on_host.device, len(on_host)) == (
        on_device.shape,
        on_device.dtype,
        on_device.device,
        N,
    )


@pytest.mark.parametrize("n", [0, 1, 2, 7, 255, 256, 257, 1023, 1024, 1025, 4000])
def test_a_batch_of_any_size_is_bit_for_bit_the_same_from_both_places(both, n):
    on_device, on_host = both
    indices = torch.randint(N, (n,), generator=torch.Generator().manual_seed(n))
    found = on_host[indices]
    assert found.dtype == torch.float32 and torch.equal(found, on_device[indices])


@pytest.mark.parametrize("chosen", [slice(None), slice(3, 1400), slice(5, None, 7), slice(1490, 9999), slice(7, 7)])
def test_slices_are_those_of_a_tensor(both, chosen):
    on_device, on_host = both
    assert torch.equal(on_host[chosen], on_device[chosen])


def test_split_gives_the_parts_in_order(both):
    on_device, on_host = both
    parts = list(on_host.split(400))
    assert [len(part) for part in parts] == [400, 400, 400, 300]
    assert torch.equal(torch.cat(parts), on_device)


def test_an_image_does_not_depend_on_those_beside_it(preprocessed):
    """A product of one row is computed otherwise than one of many, so a batch must not be whitened as it is."""
    images = HostImages(preprocessed.pixels, preprocessed.preprocessing)
    alone = torch.cat([images[torch.tensor([i])] for i in range(40)])
    assert torch.equal(alone, images[torch.arange(39, -1, -1)].flip(0))


def test_later_batches_leave_earlier_ones_as_they_were(both):
    on_device, on_host = both
    parts = [on_host[torch.arange(start, start + 50)] for start in range(0, 500, 50)]
    assert torch.equal(torch.cat(parts), on_device[:500])


def test_the_host_keeps_the_pixels_and_no_copy_of_them(preprocessed):
    images = HostImages(preprocessed.pixels, preprocessed.preprocessing)
    assert images._pixels.data_ptr() == preprocessed.pixels.data_ptr()


# ---------------------------------------------------------------------------------------------- where they are placed


def test_on_a_cpu_auto_is_a_tensor(preprocessed):
    assert isinstance(place(preprocessed.pixels, preprocessed.preprocessing), Tensor)


def test_auto_stays_in_host_memory_when_the_device_is_too_small_and_says_so(preprocessed, monkeypatch, caplog):
    asked = []
    monkeypatch.setattr(placement, "fits", lambda size, device: asked.append((size, device)))
    with caplog.at_level(logging.INFO, logger="pad"):
        assert isinstance(place(preprocessed.pixels, preprocessed.preprocessing), HostImages)
    assert asked == [(4 * preprocessed.pixels.numel(), torch.device("cpu"))]
    assert [record.message for record in caplog.records] == [
        "1500 images, 0.0 GB as float32, stay in host memory and are copied in batches"
    ]


@pytest.mark.parametrize("size, expected", [(500, True), (501, False)])
def test_half_of_what_is_free_or_kept_for_reuse_may_be_taken(monkeypatch, size, expected):
    device = torch.device("cuda", 3)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda at: {device: (700, 10**9)}[at])
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda at: {device: 450}[at])
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda at: {device: 150}[at])
    assert fits(size, device) is expected
    assert fits(10**18, torch.device("cpu"))


def test_images_on_is_a_setting_with_three_values():
    assert BufferSettings().images_on == DistillSettings().images_on == "auto"
    assert BufferSettings().adopting({"images_on": "host"}).images_on == "host"
    with pytest.raises(InputError, match="images_on: 'disk' is not one of auto, device, host"):
        BufferSettings().adopting({"images_on": "disk"})


# ---------------------------------------------------------------------------------------------- copies


def test_to_device_on_a_cpu_is_the_tensor_itself():
    x = torch.rand(3)
    assert to_device(x, "cpu") is x and to_device(x, torch.device("cpu")) is x


@pytest.mark.parametrize("tensor_device, pinned", [("cpu", True), ("cuda", False)])
def test_to_device_pins_what_goes_from_the_host_to_cuda(tensor_device, pinned):
    calls = []

    class Stub:
        device = torch.device(tensor_device)

        def pin_memory(self):
            calls.append("pinned")
            return self

        def to(self, device, non_blocking=False):
            calls.append((str(device), non_blocking))

    to_device(Stub(), "cuda:1")
    assert calls == (["pinned", ("cuda:1", True)] if pinned else [("cuda:1", False)])
    calls.clear()
    to_device(Stub(), "cpu")
    assert calls == [("cpu", False)]  # to the host a copy that is not waited for may not have arrived


def test_batches_are_the_images_of_each_part_of_the_order(both):
    order = torch.randperm(N, generator=torch.Generator().manual_seed(1))[:130]
    for images in both:
        parts = list(batches(images, order, 50))
        assert [len(part) for part in parts] == [50, 50, 30]
        assert torch.equal(torch.cat(parts), both[0][order])


# ---------------------------------------------------------------------------------------------- their users


def _flat():
    model = FlatModel(build("ConvNetD1W8", 3, CLASSES, SHAPE[1:], 0))
    return model, model.flatten(build("ConvNetD1W8", 3, CLASSES, SHAPE[1:], 1))


def test_experts_scores_and_initial_sets_are_the_same_from_both_places(preprocessed, both):
    model, start = _flat()
    results = []
    for images in both:
        task = ExpertTraining(
            model=model,
            images=images,
            labels=preprocessed.labels,
            num_classes=CLASSES,
            epoch_indices=lambda epoch: torch.arange(0, N, 3),
            optimiser=GSAM(lr=0.05, rho=0.5, alpha=0.4),
            augmentation=DSA(),
            batch_size=64,
            epochs=2,
            seed=0,
        )
        trajectory = torch.stack(list(task.train(0, start)))
        scoring = ScoringSettings("ConvNetD1W8", repeats=1, epochs=1)
        names = ["GraNd", "CAL", "DeepFool", "Forgetting"]
        scores = score_images(names, ScoringTraining(images, preprocessed.labels, CLASSES, scoring, 0)).scores
        experts = Experts(model=model, parameters=lambda k: trajectory[-1], count=1)
        sets = [
            initial_set(kind, images, preprocessed.labels, CLASSES, 3, experts, seed=0)
            for kind in ("real", "noise", "samples_predicted_correctly")
        ]
        logits = model.logits(trajectory[-1], images)
        accuracies = torch.tensor(
            [
                model.accuracy(trajectory[-1], images, preprocessed.labels),
                evaluation.accuracy(build("ConvNetD1W8", 3, CLASSES, SHAPE[1:], 2), images, preprocessed.labels),
            ]
        )
        results.append([trajectory, *scores.values(), *(t for pair in sets for t in pair), logits, accuracies])
    assert not torch.equal(results[0][0][0], results[0][0][-1])
    for of_tensor, of_host in zip(*results, strict=True):
        assert torch.equal(of_tensor, of_host)


@pytest.mark.slow
def test_the_three_stages_give_the_same_files_from_both_places(tmp_path):
    files = []
    for images_on in ("device", "host"):
        out = tmp_path / images_on
        common = dict(
            dataset="FashionMNISTMini",
            train_per_class=20,
            zca=True,
            model="ConvNetD1W8",
            images_on=images_on,
            device="cpu",
            compile="off",
        )
        folder = record_experts(
            BufferSettings(
                **common,
                buffer_path=str(out / "buffers"),
                num_experts=1,
                train_epochs=2,
                batch_train=64,
                rho_max=0.1,
                rho_min=0.1,
                lr_teacher=0.05,
            )
        )
        run = distill(
            DistillSettings(
                **common,
                buffer_path=str(out / "buffers"),
                log_dir=str(out / "runs"),
                name="run",
                Iteration=1,
                syn_steps=2,
                expert_epochs=1,
                max_start_epoch=1,
                current_max_start_epoch=1,
                pix_init="real",
                eval_it=5,
                skip_first_eva=True,
                num_eval=1,
                epoch_eval_train=2,
                lr_img=1.0,
                threshold=10.0,
            )
        )
        result = evaluate(
            EvaluationSettings(
                **common,
                synthetic=str(run),
                baselines="hard",
                num_eval=1,
                epoch_eval_train=2,
                out=str(out / "scores.json"),
                given=frozenset(common),
            )
        )
        synthetic = run / "Normal" / "synthetic_last.safetensors"
        files.append(
            (
                (folder / "expert_0000.safetensors").read_bytes(),
                [synthetic.with_name(f"{name}_last.pt").read_bytes() for name in ("images", "labels", "lr")],
                json.dumps(result["results"]),
            )
        )
    assert files[0] == files[1]
