"""Gradient matching beside its formulas, written out with ordinary modules, loops and double backward."""

import pytest
import torch
import torch.nn.functional as F
from test_distributed import on_ranks
from torch import nn

from pad.data.augment import DSA, NoAugmentation, augment
from pad.distributed import ALONE
from pad.labels import hard_logits
from pad.matching.gradient import GradientObjective, gradient_distance
from pad.matching.real import RealBatches
from pad.nn import kernels
from pad.nn.flat import FlatModel
from pad.nn.networks import build
from pad.rng import generator

CLASSES, IPC, PER_CLASS, SHAPE, SEED = 3, 2, 24, (3, 8, 8), 5
CONVNET = 939  # parameters of ConvNetD2W8 here; its second convolution, [8, 8, 3, 3], begins at 240
RATE = 0.5  # of the images' steps


def randn(name, shape, dtype=torch.float64):
    return torch.randn(shape, generator=generator(0, name), dtype=dtype)


REAL = randn("real", (CLASSES * PER_CLASS, *SHAPE))
ROWS = [torch.arange(c, CLASSES * PER_CLASS, CLASSES) for c in range(CLASSES)]  # easiest first
LABELS = hard_logits(torch.arange(CLASSES).repeat_interleave(IPC), CLASSES).double()
LR = torch.tensor(0.01, dtype=torch.float64)


def images():
    return randn("images", (CLASSES * IPC, *SHAPE))


def network(name, it):
    return build(name, SHAPE[0], CLASSES, SHAPE[1:], SEED, it).double()


def objective(name="ConvNetD2W8", model=None, rows=ROWS, **changes):
    settings = dict(
        augmentation=NoAugmentation(),
        training=NoAugmentation(),
        outer=1,
        inner=0,
        lr_net=0.05,
        batch_train=4,
        depth=(0.0, 1.0),
        seed=SEED,
    )
    model = model or FlatModel(network(name, 0))
    return GradientObjective(
        model=model,
        start=lambda it: model.flatten(network(name, it)),
        real=RealBatches(REAL, rows, 10),
        **(settings | changes),
    )


# ------------------------------------------------------------------------------------------------ the reference


def plain_distance(gradients, targets, match_from, match_to):
    """Tensor by tensor and row by row, counting coordinates."""
    count = sum(g.numel() for g in gradients)
    first, last, at, total = int(match_from * count), int(match_to * count), 0, 0.0
    for gradient, target in zip(gradients, targets, strict=True):
        for a, b in zip(gradient, target, strict=True):
            kept = [i for i in range(a.numel()) if first <= at + i < last]
            at += a.numel()
            if gradient.dim() > 1 and kept:
                a, b = a.flatten()[kept], b.flatten()[kept]
                total = total + 1 - torch.dot(a, b) / (a.norm() * b.norm() + 1e-6)
    return total


def some_of(row, rng, size):
    return REAL[row[torch.randperm(len(row), generator=rng)[:size]]]


def reset_statistics(module):
    """BatchNorm's running statistics before the first batch; a tenth of each batch's is to count."""
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = 0.1
            norm.reset_running_stats()


def feed_statistics(module, rows, it, step):
    """They see 16 real images of a class, and stand still then."""
    rng = generator(SEED, "statistics", it, step)
    with torch.no_grad():
        module.train()(torch.cat([some_of(row, rng, 16) for row in rows]))
    module.eval()


def plain_steps(ours, name, rows, it, x):
    """Loss and gradient of each step; the images take a step of SGD after each, the network its training."""
    module, x = network(name, it), x.clone()
    parameters, labels = list(module.parameters()), torch.arange(CLASSES).repeat_interleave(IPC)
    reset_statistics(module)
    for step in range(ours.outer):
        feed_statistics(module, rows, it, step)
        x, total = x.detach().requires_grad_(), 0.0
        for c in range(CLASSES):
            rng = generator(SEED, "gradient matching", it, step, c)
            real, draw = some_of(rows[c], rng, 10), ours.augmentation.draw(1, rng)
            gradients = []
            for batch in (x[labels == c], real):
                loss = F.cross_entropy(module(augment(batch, draw)), torch.full((len(batch),), c))
                gradients.append(torch.autograd.grad(loss, parameters, create_graph=batch is not real))
            total = total + plain_distance(*gradients, *ours.depth)
        (gradient,) = torch.autograd.grad(total, x)
        yield total.item(), gradient
        x = (x - RATE * gradient).detach()
        sgd, rng = (
            torch.optim.SGD(module.train().parameters(), ours.lr_net),
            generator(SEED, "inner training", it, step),
        )
        for _ in range(ours.inner):
            for batch in torch.randperm(len(x), generator=rng).split(ours.batch_train):
                sgd.zero_grad()
                seen = augment(x[batch], ours.training.draw(len(batch), rng))
                F.cross_entropy(module(seen), labels[batch]).backward()
                sgd.step()


def assert_equal(ours, name, rows=ROWS, it=3):
    x, count = images(), 0
    for found, (loss, gradient) in zip(
        ours.steps(it, x, LABELS, LR), plain_steps(ours, name, rows, it, x), strict=True
    ):
        assert found.loss.item() == pytest.approx(loss, rel=1e-10) and loss > 0
        assert gradient.norm() > 0 and (found.images - gradient).norm() < 1e-10 * gradient.norm()
        x -= RATE * found.images
        count += 1
    assert count == ours.outer


def share(dropped, of=CONVNET):
    """A ratio that leaves out so many coordinates."""
    return (dropped + 0.5) / of


CASES = {
    "ConvNet": ("ConvNetD2W8", {}),
    "several steps": ("ConvNetD2W8", {"outer": 3, "inner": 2}),
    "DSA, also in training": (
        "ConvNetD2W8",
        {"augmentation": DSA(siamese=True), "training": DSA(), "outer": 3, "inner": 2, "depth": (0.25, 1.0)},
    ),
    "no training between steps": ("ConvNetD2W8", {"outer": 2, "inner": 0}),
    "a cut between tensors": ("ConvNetD2W8", {"depth": (share(240), 1.0)}),
    "a cut between rows": ("ConvNetD2W8", {"depth": (share(240 + 3 * 72), 1.0)}),
    "a cut in a row": ("ConvNetD2W8", {"depth": (share(240 + 3 * 72 + 10), 1.0)}),
    "shallow alone, a cut in a row": ("ConvNetD2W8", {"depth": (0.0, share(240 + 3 * 72 + 10))}),
    "shallow alone, a cut between rows": ("ConvNetD2W8", {"depth": (0.0, share(240 + 3 * 72))}),
    "a span inside a row": ("ConvNetD2W8", {"depth": (share(250), share(270))}),
    "a span over tensors": ("ConvNetD2W8", {"depth": (share(100), share(500))}),
    "a cut before the last of a row": ("ConvNetD2W8", {"depth": (share(240 + 3 * 72 - 1), 1.0)}),
    "a cut in a bias": ("ConvNetD2W8", {"depth": (share(816 + 3), 1.0)}),
    "a cut in the classifier": ("ConvNetD2W8", {"depth": (share(840 + 40), 1.0)}),
    "MLP": ("MLP", {"outer": 2, "inner": 1}),
    "MLP, a cut in a row": ("MLP", {"depth": (0.6, 1.0), "augmentation": DSA("crop", siamese=True)}),
    "BatchNorm": ("ConvNetD2W8BN", {}),
    "BatchNorm, several steps": (
        "ConvNetD2W8BN",
        {
            "outer": 3,
            "inner": 2,
            "depth": (0.5, 1.0),
            "augmentation": DSA("scale", siamese=True),
            "training": DSA("flip"),
        },
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_of_the_images_are_those_of_the_formulas(case):
    name, changes = CASES[case]
    assert_equal(objective(name, **changes), name)


@pytest.mark.parametrize("kind", ["color", "crop", "cutout", "flip", "scale", "rotate"])
def test_every_augmentation_is_shared_and_differentiated(kind):
    assert_equal(objective(augmentation=DSA(kind, siamese=True)), "ConvNetD2W8")


@pytest.mark.parametrize("name", ["ConvNetD2W8", "ConvNetD2W8BN"])
def test_batches_come_from_the_rows_alone(name):
    rows = [row[4:16] for row in ROWS]  # fewer than the statistics ask for
    assert_equal(objective(name, rows=rows, outer=2, inner=1), name, rows)


def test_images_that_moved_in_place_are_trained_and_matched_as_they_then_are():
    ours, still, moved = objective(outer=2, inner=1), images(), images()
    one, other = (list_of_two(ours, x, by) for x, by in ((still, 0.0), (moved, 1.0)))
    assert torch.equal(one[0].images, other[0].images)
    assert not torch.equal(one[1].images[:IPC], other[1].images[:IPC])
    assert torch.equal(still, images())


def list_of_two(ours, x, by):
    """Both steps' gradients; in between the last class's images are moved, from which the first's hear by training."""
    steps = ours.steps(0, x, LABELS, LR)
    first = next(steps)
    x[-IPC:] += by
    return first, next(steps)


# -------------------------------------------------------------------------------------------------- the distance


HALF_WAY = 1 - 0.5**0.5  # 45 degrees


def test_the_distance_of_rows_by_hand():
    shapes = [(3, 2), (2,), (1, 2, 1, 1)]
    rows = [[1, 0], [0, 2], [3, 4], [5, 5], [1, 1]]
    targets = [[2, 0], [3, 0], [-3, -4], [-5, 0], [1, 0]]  # alike, across, against, a vector, half way
    g, target = (torch.tensor(x, dtype=torch.float64).flatten() for x in (rows, targets))
    expected = 0 + 1 + 2 + HALF_WAY
    assert gradient_distance(g, target, shapes).item() == pytest.approx(expected, abs=2e-6)
    assert gradient_distance(g, 10 * target, shapes).item() == pytest.approx(expected, abs=2e-6)


def test_a_small_number_in_the_denominator():
    g = torch.tensor([1e-3, 0.0], dtype=torch.float64)
    assert gradient_distance(g, g, [(1, 2)]).item() == pytest.approx(0.5, rel=1e-9)  # 1 - 1e-6 / (1e-6 + 1e-6)
    assert gradient_distance(0 * g, 0 * g, [(1, 2)]).item() == 1


@pytest.mark.parametrize(
    "dropped, expected",
    [(0, 1 + HALF_WAY + 2), (1, 2 + HALF_WAY + 2), (2, HALF_WAY + 2), (3, 0 + 2), (4, 2), (5, 2), (6, 2), (7, 0)],
)
def test_what_remains_of_a_row_counts(dropped, expected):
    g = torch.tensor([1.0, 1, 0, 1, 9, 1, 1], dtype=torch.float64)
    target = torch.tensor([1.0, -1, 1, 1, 9, -1, -1], dtype=torch.float64)
    ratio = dropped / 7 + 1e-9 if dropped < 7 else 1.0
    found = gradient_distance(g, target, [(2, 2), (1,), (1, 2)], ratio)
    assert found.item() == pytest.approx(expected, abs=2e-6)


def test_where_biases_alone_remain_there_is_nothing_to_match():
    (found,) = objective(depth=(share(CONVNET - 2), 1.0)).steps(0, images(), LABELS, LR)
    assert found.loss.item() == 0 and torch.equal(found.images, torch.zeros_like(found.images))


# ------------------------------------------------------------------------------------------------- as a function


def tensors_of(found):
    return [found.loss, found.images, found.labels, found.lr]


def test_labels_and_learning_rate_have_no_gradient_and_nothing_carries_a_graph():
    x, labels, lr = images(), LABELS.clone(), LR.clone()
    for found in objective(outer=2, inner=1, augmentation=DSA(siamese=True)).steps(0, x, labels, lr):
        assert torch.equal(found.labels, torch.zeros_like(labels)) and torch.equal(found.lr, torch.zeros_like(lr))
        assert not any(tensor.requires_grad for tensor in (*tensors_of(found), x, labels, lr))
    assert torch.equal(x, images()) and torch.equal(labels, LABELS) and torch.equal(lr, LR)


def test_steps_are_a_function_of_seed_iteration_and_set():
    def losses(it, **changes):
        ours = objective(outer=2, inner=1, augmentation=DSA(siamese=True), **changes)
        return [found.loss.item() for found in ours.steps(it, images(), LABELS, LR)]

    state = torch.get_rng_state()
    found = [losses(0), losses(1), losses(0, seed=SEED + 1)]
    assert losses(0) == found[0] and torch.equal(torch.get_rng_state(), state)
    assert len({value for pair in found for value in pair}) == 6


def test_a_step_that_is_not_taken_trains_nothing():
    ours, trained = objective(outer=2, inner=1), []
    object.__setattr__(ours, "_train", lambda model, theta, *rest: (trained.append(rest[-1]), theta)[1])
    steps = ours.steps(0, images(), LABELS, LR)
    next(steps)
    assert trained == []
    assert len(list(steps)) == 1 and trained == [0], "none after the last"


def test_micro_batches_give_the_same():
    results = []
    for size in (None, 3):
        ours = objective(model=FlatModel(network("ConvNetD2W8", 0), micro_batch=size), outer=2, inner=1)
        results.append([tensors_of(found) for found in ours.steps(0, images(), LABELS, LR)])
    for one, other in zip(*results, strict=True):
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.skipif(kernels.library() is None, reason="the kernels cannot be built here")
def test_the_kernels_give_the_same_up_to_float32():
    found = []
    for compile in ("off", "fused"):
        model = FlatModel(network("ConvNetD2W8", 0), compile)
        ours = objective(model=model, outer=2, inner=1, augmentation=DSA(siamese=True), depth=(0.4, 1.0))
        object.__setattr__(ours, "start", lambda it: model.flatten(network("ConvNetD2W8", it)).float())
        assert ours.model.compile == compile
        found.append(list(ours.steps(0, images().float(), LABELS.float(), LR.float())))
    for plain, fused in zip(*found, strict=True):
        assert fused.images.dtype == torch.float32
        assert fused.loss.item() == pytest.approx(plain.loss.item(), rel=1e-5)
        assert (fused.images - plain.images).norm() < 1e-4 * plain.images.norm()


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_that_share_the_classes_give_what_one_gives(size):
    def work(ranks):
        return [
            [tensor.numpy() for tensor in tensors_of(found)]
            for name in ("ConvNetD2W8", "ConvNetD2W8BN")
            for found in objective(name, outer=2, inner=1, augmentation=DSA(siamese=True), ranks=ranks).steps(
                1, images(), LABELS, LR
            )
        ]

    alone = work(ALONE)
    for shared in on_ranks(size, work):
        for found, expected in zip(shared, alone, strict=True):
            for ours, one in zip(found, expected, strict=True):
                ours, one = torch.as_tensor(ours), torch.as_tensor(one)
                assert (ours - one).norm() <= 1e-12 * one.norm()


# ------------------------------------------------------------------------------------------- running statistics


def running(batches):
    """A network, its parameters, and what it is after batches."""
    model = FlatModel(network("ConvNetD2W8BN", 1))
    theta = model.flatten(network("ConvNetD2W8BN", 1))
    ours = model.running(theta)
    for batch in batches:
        ours(theta, batch)
    return model, theta, ours


def test_running_statistics_are_those_of_the_module():
    module, batches = network("ConvNetD2W8BN", 1), [REAL[:30], REAL[30:42], images()]
    model, theta, ours = running(batches[:2])
    before, alone = model(theta, REAL[:5]), ours.fixed()
    reset_statistics(module)
    module.train()(batches[0])
    module(batches[1])
    torch.testing.assert_close(alone(theta, images()), module.eval()(images()), rtol=1e-12, atol=1e-13)

    g = ours.grad(theta, batches[2], LABELS.softmax(dim=1))  # a pass as any other, with the statistics of the batch
    loss = F.cross_entropy(module.train()(batches[2]), LABELS.softmax(dim=1))
    expected = torch.cat([part.flatten() for part in torch.autograd.grad(loss, list(module.parameters()))])
    torch.testing.assert_close(g, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(ours.fixed()(theta, REAL), module.eval()(REAL), rtol=1e-12, atol=1e-13)
    assert not torch.allclose(alone(theta, REAL), ours.fixed()(theta, REAL)), "what was fixed moves"
    assert alone.separable and not ours.separable and not model.separable
    assert torch.equal(model(theta, REAL[:5]), before), "the network it was made of has changed"


def test_images_are_independent_under_fixed_statistics():
    _, theta, ours = running([REAL[:30]])
    fixed, p = ours.fixed(), LABELS.softmax(dim=1)
    parts = [fixed.grad(theta, images()[i : i + 1], p[i : i + 1]) / len(p) for i in range(len(p))]
    torch.testing.assert_close(sum(parts), fixed.grad(theta, images(), p), rtol=1e-10, atol=1e-13)
