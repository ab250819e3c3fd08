"""Multi-formation beside its definition: tiles of stored images one by one, and autograd through all of it."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pad.commands.rows import Rows
from pad.data.augment import DSA, augment
from pad.data.formation import coarsened, decoded, mixed, pulled_back
from pad.data.preprocessing import MeanStd
from pad.errors import InputError
from pad.initialisation import Experts, from_set, initial_set
from pad.labels import hard_logits
from pad.matching.distribution import DistributionObjective
from pad.matching.formation import MultiFormation
from pad.matching.gradient import GradientObjective
from pad.matching.objective import Gradients, Objective
from pad.matching.real import RealBatches
from pad.matching.trajectory import SegmentSampler, TrajectoryObjective
from pad.matching.unroll import inner_steps
from pad.nn.flat import FlatModel
from pad.nn.networks import build
from pad.rng import generator
from pad.store.foreign import load_pt
from pad.store.tensors import load_tensors, save_tensors
from pad.synthetic import SyntheticSet

K, IPC, SHAPE, SEED, IT = 3, 2, (2, 12, 6), 5, 4  # neither square nor in colour
FACTORS = pytest.mark.parametrize("factor", [2, 3])
LR = torch.tensor(0.05, dtype=torch.float64)


def randn(name, *shape):
    return torch.randn(shape, generator=generator(0, name), dtype=torch.float64)


def tile_by_tile(stored: torch.Tensor, factor: int) -> torch.Tensor:
    """Class by class; in each the first tile of all its images, then the second."""
    rows, columns = (side // factor for side in stored.shape[2:])
    shown = []
    for of_class in stored.chunk(K):
        for t in range(factor**2):
            top, left = t // factor * rows, t % factor * columns
            for image in of_class:
                tile = image[:, top : top + rows, left : left + columns]
                shown.append(F.interpolate(tile[None], size=stored.shape[2:], mode="bilinear", align_corners=False)[0])
    return torch.stack(shown)


# ---- the map and its transpose


@FACTORS
def test_the_transpose_is_that_of_the_matrix(factor):
    shape = 2 * K, 1, 6, 6
    units = torch.eye(2 * K * 36, dtype=torch.float64).view(-1, *shape)
    matrix = torch.stack([tile_by_tile(unit, factor).flatten() for unit in units])  # its rows: what units become
    stored, gradients = randn("stored", *shape), randn("gradients", factor**2 * 2 * K, 1, 6, 6)
    torch.testing.assert_close(decoded(stored, factor, K).flatten(), stored.flatten() @ matrix, rtol=0, atol=1e-12)
    found = pulled_back(gradients, factor, K)
    torch.testing.assert_close(found.flatten(), matrix @ gradients.flatten(), rtol=0, atol=1e-12)


@FACTORS
def test_images_are_mixed_into_the_tiles_that_show_them(factor):
    images = randn("images", factor**2 * IPC * K, *SHAPE)
    stored = mixed(images, factor, K)
    assert stored.shape == (IPC * K, *SHAPE)
    shown = decoded(stored, factor, K)
    assert torch.equal(shown, coarsened(images, factor))
    for image, other in zip(images, shown):
        cut = image.unfold(1, factor, factor).unfold(2, factor, factor).mean(dim=(3, 4))
        expected = F.interpolate(cut[None], size=SHAPE[1:], mode="bilinear", align_corners=False)[0]
        torch.testing.assert_close(other, expected, rtol=0, atol=1e-12)


def test_factor_1_changes_nothing():
    images = randn("images", IPC * K, *SHAPE)
    assert decoded(images, 1, K) is images and mixed(images, 1, K) is images and coarsened(images, 1) is images


# ---- gradients through it


def network():
    return build("ConvNetD2W8", SHAPE[0], K, SHAPE[1:], SEED, IT).double()


MODEL = FlatModel(network())
REAL = RealBatches(randn("real", 8 * K, *SHAPE), [torch.arange(c, 8 * K, K) for c in range(K)], 5)
START, TARGET = (randn(name, MODEL.num_parameters) * 0.1 + MODEL.flatten(network()) for name in ("start", "target"))
SIAMESE = DSA(siamese=True)


def real_and_draw(*stream):
    """Of each class, as the objectives draw them."""
    for c, row in enumerate(REAL.rows):
        rng = generator(SEED, *stream, c)
        yield c, REAL.images[row[torch.randperm(len(row), generator=rng)[:5]]], SIAMESE.draw(1, rng)


def plain_trajectory(shown, labels, lr):
    module, theta = network(), START.clone().requires_grad_()
    shapes = {name: parameter.shape for name, parameter in module.named_parameters()}
    for step in inner_steps(len(labels), 5, 4, DSA(), generator(SEED, "inner steps", IT)):
        parts = theta.split([shape.numel() for shape in shapes.values()])
        named = {name: part.view(shapes[name]) for name, part in zip(shapes, parts)}
        logits = torch.func.functional_call(module, named, (augment(shown[step.indices], step.draw),))
        loss = F.cross_entropy(logits, labels[step.indices].softmax(dim=1))
        theta = theta - lr * torch.autograd.grad(loss, theta, create_graph=True)[0]
    return (theta - TARGET).square().sum() / (START - TARGET).square().sum()


def plain_gradient(shown, labels, lr):
    module, total = network(), 0.0
    for c, real, draw in real_and_draw("gradient matching", IT, 0):
        gradients = []
        for batch in (shown.chunk(K)[c], real):
            loss = F.cross_entropy(module(augment(batch, draw)), torch.full((len(batch),), c))
            gradients.append(torch.autograd.grad(loss, list(module.parameters()), create_graph=True))
        for g, target in zip(*gradients):
            if g.dim() > 1:
                a, b = g.flatten(1), target.flatten(1).detach()
                total = total + (1 - (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1) + 1e-6)).sum()
    return total


def plain_distribution(shown, labels, lr):
    features, total = nn.Sequential(*network().body, nn.Flatten()), 0.0
    for c, real, draw in real_and_draw("distribution matching", IT):
        means = [features(augment(batch, draw)).mean(dim=0) for batch in (shown.chunk(K)[c], real)]
        total = total + (means[0] - means[1].detach()).square().sum()
    return total


def trajectory():
    store = SimpleNamespace(rows=lambda expert, epochs: torch.stack([START, TARGET]))
    bounds = dict(min_start_epoch=0, max_start_epoch=1, current_max_start_epoch=1, expansion_end_epoch=1)
    sampler = SegmentSampler(experts=[0], expert_epochs=1, sequential=False, seed=SEED, **bounds)
    inner = dict(augmentation=DSA(), syn_steps=4, batch_syn=5)
    filters = dict(depth=(0.0, 1.0), loss_ratio=0.0)
    return TrajectoryObjective(model=MODEL, store=store, sampler=sampler, seed=SEED, **inner, **filters)


def gradient(outer=1, **training):
    inner = dict(training=DSA(), inner=0, lr_net=0.05, batch_train=4) | training
    common = dict(model=MODEL, real=REAL, augmentation=SIAMESE, depth=(0.0, 1.0), seed=SEED)
    return GradientObjective(start=lambda it: MODEL.flatten(network()), outer=outer, **common, **inner)


def distribution():
    made = dict(network=lambda it: network().requires_grad_(False), separable=True)
    return DistributionObjective(real=REAL, augmentation=SIAMESE, blocks=1, seed=SEED, **made)


OBJECTIVES = {
    "trajectory": (trajectory, plain_trajectory),
    "gradient": (gradient, plain_gradient),
    "distribution": (distribution, plain_distribution),
}


def synthetic(kind, factor):
    """Stored images, and label logits of the decoded ones; one-hot where they are not learned."""
    hard = hard_logits(torch.arange(K).repeat_interleave(factor**2 * IPC), K).double()
    labels = randn("labels", *hard.shape) if kind == "trajectory" else hard
    return randn("stored", K * IPC, *SHAPE), labels


@FACTORS
@pytest.mark.parametrize("kind", OBJECTIVES)
def test_the_gradient_is_autograds_through_decoding_and_all_that_follows(kind, factor):
    make, plain = OBJECTIVES[kind]
    stored, labels = synthetic(kind, factor)
    variables = [tensor.clone().requires_grad_() for tensor in (stored, labels, LR)]
    loss = plain(tile_by_tile(variables[0], factor), *variables[1:])
    expected = torch.autograd.grad(loss, variables, allow_unused=True, materialize_grads=True)
    [found] = MultiFormation(objective=make(), factor=factor).steps(IT, stored, labels, LR)
    assert found.loss.item() == pytest.approx(loss.item(), rel=1e-12) and loss > 0
    for name, theirs in zip(("images", "labels", "lr"), expected, strict=True):
        ours = getattr(found, name)
        assert ours.shape == theirs.shape and (ours - theirs).norm() <= 1e-10 * theirs.norm(), name
        assert theirs.norm() > 0 or (kind, name) != ("trajectory", name)
    assert expected[0].norm() > 0


def test_later_steps_see_the_set_as_it_then_is():
    """Gradient matching in two steps with training between, beside one step on what the first has made."""
    stored, labels = synthetic("gradient", 2)
    seen = []

    class Watched(Objective):
        def steps(self, it, images, labels, lr):
            for _ in range(3):
                seen.append(images.clone())
                yield Gradients(images.sum(), images.clone(), torch.zeros_like(labels), torch.zeros_like(lr))

    expected = []
    for found in MultiFormation(objective=Watched(), factor=2).steps(IT, stored, labels, LR):
        expected.append(tile_by_tile(stored, 2))
        stored -= 0.1 * found.images
    assert len(seen) == 3
    for mine, theirs in zip(seen, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


def test_work_that_is_captured_finds_the_images_where_they_were():
    """pad.nn.replay captures a step anew where what it reads has moved."""
    places = []

    class Watched(Objective):
        def gradients(self, it, images, labels, lr):
            places.append(images.data_ptr())
            return Gradients(images.sum(), images.clone(), torch.zeros_like(labels), torch.zeros_like(lr))

    ours, (stored, labels) = MultiFormation(objective=Watched(), factor=2), synthetic("gradient", 2)
    for it in range(3):
        list(ours.steps(it, stored.clone(), labels, LR))
    assert len(places) == 3 and len(set(places)) == 1


# ---- the set


def formed(factor=2, **changes) -> SyntheticSet:
    stored, count = randn("stored", K * IPC, *SHAPE).float(), K * IPC * factor**2
    classes = torch.arange(K).repeat_interleave(count // K)
    of = MeanStd.of((0.4, 0.6), (0.2, 0.3), "cpu")
    labels = randn("labels", count, K).float()
    shown = decoded(stored, factor, K)
    return SyntheticSet(
        shown, labels, torch.tensor(0.013), classes, {"model": "ConvNet"}, preprocessing=of, stored=stored
    )


@FACTORS
def test_a_file_holds_the_stored_images_and_gives_the_decoded_ones(tmp_path, factor):
    made = formed(factor)
    made.save(tmp_path / "set")
    tensors, metadata = load_tensors(tmp_path / "set")
    assert torch.equal(tensors["images"], made.stored) and metadata["factor"] == factor
    assert len(tensors["labels"]) == factor**2 * len(tensors["images"])
    back = SyntheticSet.load(tmp_path / "set")
    assert torch.equal(back.images, made.images) and torch.equal(back.stored, made.stored)
    assert (back.factor, back.ipc, back.digest) == (factor, IPC * factor**2, made.digest)
    assert torch.equal(back.pixels(), made.pixels()) and back.pixels().shape == back.images.shape
    back.save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "set").read_bytes()


def test_everything_that_leaves_a_set_is_decoded(tmp_path):
    made = formed()
    assert len(made.to_dataset()) == len(made.probabilities()) == len(made.images) == 4 * K * IPC
    given = made.for_dd_ranking()
    assert torch.equal(given["image_tensor"], made.images) and torch.equal(given["soft_labels"], made.labels)
    made.export_published(tmp_path, "last")
    assert torch.equal(load_pt(tmp_path / "images_last.pt"), made.images)
    assert torch.equal(load_pt(tmp_path / "labels_last.pt"), made.labels)
    assert made.size == "8 images per class, decoded from 2 stored"


@pytest.mark.parametrize(
    "factor, words",
    [
        (4, "of factor 4 and"),  # does not divide a side
        (3, r"stored images \[6, 2, 12, 6\] of factor 3 and labels \[24, 3\] do not belong together"),
        *((other, f"of factor {other!r} and") for other in (-2, 0, 2.0, "2", None, 10**30)),
    ],
)
def test_a_file_whose_factor_does_not_fit_is_refused(tmp_path, factor, words):
    formed().save(tmp_path / "set")
    tensors, metadata = load_tensors(tmp_path / "set")
    save_tensors(tmp_path / "set", tensors, metadata | {"factor": factor})
    with pytest.raises(InputError, match=f"{tmp_path}.*{words}"):
        SyntheticSet.load(tmp_path / "set")


def test_the_digest_tells_sets_apart_by_what_they_store():
    assert formed().digest == formed().digest
    other = formed()
    other.stored = other.stored + 1
    assert other.digest != formed().digest


# ---- where it begins


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.classifier = nn.Linear(2 * 12 * 6, K)

    def forward(self, x):
        return self.classifier(x.flatten(1))


@pytest.fixture
def real():
    """Real images around three centres, their classes, and two experts that are right about many."""
    labels = torch.arange(60) % K
    centres = F.interpolate(randn("centres", K, 2, 4, 2), size=SHAPE[1:])
    model = FlatModel(Linear())
    thetas = [torch.cat([centres.flatten(), randn("bias", K)]) + 2 * randn(name, model.num_parameters) for name in "ab"]
    return (centres[labels] + 2 * randn("noise", 60, *SHAPE), labels, Experts(model, lambda k: thetas[k], 2), thetas)


def logits_of(theta, images):
    return images.flatten(1) @ theta[:-K].view(K, -1).T + theta[-K:]


@FACTORS
def test_real_images_are_stored_several_to_one_and_labelled_as_they_are_seen(real, factor):
    images, labels, experts, thetas = real
    found, logits = initial_set("real", images, labels, K, 2, experts, seed=1, factor=factor)
    count = 2 * factor**2
    plain, _ = initial_set("real", images, labels, K, count, experts, seed=1)
    shown = decoded(found, factor, K)
    assert len(found) == 2 * K and torch.equal(shown, coarsened(plain, factor)), "the same images, in their order"
    torch.testing.assert_close(logits, logits_of(thetas[0], shown), rtol=0, atol=1e-10)


def test_images_are_chosen_that_the_experts_get_right_as_they_are_shown(real):
    images, labels, experts, thetas = real
    found, logits = initial_set("samples_predicted_correctly", images, labels, K, 2, experts, seed=1, factor=2)
    shown, classes = decoded(found, 2, K), torch.arange(K).repeat_interleave(8)
    each = torch.stack([logits_of(theta, shown) for theta in thetas])
    right = each.argmax(dim=2) == classes
    assert right.any(dim=0).all() and not right.all()
    torch.testing.assert_close(logits, (each * right[..., None]).sum(0) / right.sum(0)[:, None], rtol=0, atol=1e-10)
    exact = {int(i) for i in (logits_of(thetas[0], images).argmax(1) == labels).nonzero()}
    assert exact != {int(i) for i in (logits_of(thetas[0], coarsened(images, 2)).argmax(1) == labels).nonzero()}


@pytest.mark.parametrize("hard", [False, True])
def test_noise_is_stored_and_has_a_label_for_each_decoded_image(real, hard):
    images, labels, *_ = real
    found, logits = initial_set("noise", images, labels, K, 2, seed=1, factor=3, hard=hard)
    assert found.shape == (2 * K, *SHAPE) and found.std() == pytest.approx(1, abs=0.1)
    assert torch.equal(logits.argmax(1), torch.arange(K).repeat_interleave(18))


@pytest.mark.parametrize("ipc", [1, 2, 5])
def test_a_start_of_the_same_factor_is_taken_as_it_is_stored(ipc):
    start = formed()
    images, labels = from_set(start, ipc, seed=4, device=torch.device("cpu"), factor=2)
    places = [next(i for i in range(len(start.stored)) if torch.equal(start.stored[i], image)) for image in images]
    assert [place // IPC for place in places] == torch.arange(K).repeat_interleave(ipc).tolist()
    shown = decoded(images, 2, K)
    for image, label in zip(shown, labels, strict=True):
        assert any(torch.equal(image, a) and torch.equal(label, b) for a, b in zip(start.images, start.labels))
    if ipc == IPC:
        assert torch.equal(images, start.stored) and torch.equal(labels, start.labels)


@pytest.mark.parametrize("have, factor, ipc", [(1, 2, 2), (2, 3, 1), (2, 1, 8), (2, 1, 3), (3, 2, 1)])
def test_a_start_of_another_factor_is_as_real_images_are(have, factor, ipc):
    start, device = formed(have), torch.device("cpu")
    if have == 1:
        start.stored = None
    images, labels = from_set(start, ipc, seed=4, device=device, factor=factor)
    shown = decoded(images, factor, K)
    assert len(images) == K * ipc and len(shown) == len(labels) == K * ipc * factor**2
    known = coarsened(start.images, factor)
    for i, (image, label) in enumerate(zip(shown, labels)):
        [place] = [p for p in range(len(known)) if torch.equal(start.labels[p], label)]
        torch.testing.assert_close(image, known[place])
        assert start.classes[place] == i * K // len(shown)


# ---- what it is compared with


def test_real_images_beside_the_set_are_as_coarse(real):
    images, labels, experts, thetas = real
    bench = SimpleNamespace(
        images=images, labels=labels, device=torch.device("cpu"), data=SimpleNamespace(num_classes=K)
    )
    rows = Rows(bench=bench, synthetic=formed(), seed=0, experts=experts, rankings=dict)
    plain = Rows(bench=bench, synthetic=formed(1), seed=0, experts=experts, rankings=dict)
    known = coarsened(images, 2)
    for name in ("random", "random_soft"):
        found, p = rows.make(name).sets(0)
        assert len(found) == len(p) == 8 * K
        for image, soft in zip(found, p):
            [place] = [i for i in range(len(known)) if torch.equal(known[i], image)]
            assert name == "random_soft" or soft.argmax() == labels[place]
            others = torch.stack([logits_of(theta, image[None])[0] for theta in thetas])
            assert name == "random" or (others.argmax(1) == labels[place]).any()
        found, _ = plain.make(name).sets(0)
        assert all(any(torch.equal(image, other) for other in images) for image in found)
    shown, p = rows.make("syn").sets(0)
    assert torch.equal(shown, formed().images) and torch.equal(p, formed().probabilities())
