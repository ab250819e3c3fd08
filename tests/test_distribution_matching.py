"""Distribution matching beside its formula, with the features that hooks on an ordinary module see."""

import math
from fractions import Fraction

import pytest
import torch
from test_distributed import on_ranks

from pad.data.augment import DSA, NoAugmentation, augment
from pad.distributed import ALONE
from pad.matching.distribution import DistributionObjective, matched_blocks
from pad.matching.real import RealBatches
from pad.nn import kernels
from pad.nn.fused import blocks_of
from pad.nn.networks import build
from pad.rng import generator

CLASSES, IPC, PER_CLASS, SHAPE, SEED = 3, 2, 24, (3, 16, 16), 5


def randn(name, shape):
    return torch.randn(shape, generator=generator(0, name), dtype=torch.float64)


REAL = randn("real", (CLASSES * PER_CLASS, *SHAPE))
ROWS = [torch.arange(c, CLASSES * PER_CLASS, CLASSES) for c in range(CLASSES)]
IMAGES, LABELS, LR = randn("images", (CLASSES * IPC, *SHAPE)), torch.zeros(CLASSES * IPC, CLASSES), torch.tensor(0.01)


def network(name, it):
    return build(name, SHAPE[0], CLASSES, SHAPE[1:], SEED, it).double().requires_grad_(False)


def objective(name, blocks=1, augmentation=NoAugmentation(), rows=ROWS, seed=SEED, ranks=ALONE):
    return DistributionObjective(
        network=lambda it: network(name, it),
        real=RealBatches(REAL, rows, 10),
        augmentation=augmentation,
        blocks=blocks,
        separable="BN" not in name,
        seed=seed,
        ranks=ranks,
    )


def of_means(found, real, rng):
    return ((sum(found) / len(found) - sum(real) / len(real)) ** 2).sum()


def plain(
    name, it, blocks, augmentation, rows=ROWS, module=None, distance=of_means, classifier=None, weight=0, learned=()
):
    """Loss and its gradients, in the images and what else is learned; BatchNorm sees all classes at once."""
    module, x, seen = (module or network(name, it)).train(), IMAGES.clone().requires_grad_(), []
    hooks = [
        block.register_forward_hook(lambda block, inputs, output: seen.append(output))
        for block in list(module.body)[len(module.body) - blocks :]
    ]
    sets, rngs = {"synthetic": [], "real": []}, []
    for c, row in enumerate(rows):
        rng = generator(SEED, "distribution matching", it, c)
        batch = REAL[row[torch.randperm(len(row), generator=rng)[:10]]]
        draw = augmentation.draw(1, rng)
        sets["real"].append(augment(batch, draw))
        sets["synthetic"].append(augment(x[c * IPC : (c + 1) * IPC], draw))
        rngs.append(rng)
    features, logits = {}, []
    for kind, batches in sets.items():
        size = len(batches[0])
        together = [torch.cat(batches)] if "BN" in name else batches
        for number, batch in enumerate(together):
            seen.clear()
            module(batch)
            assert len(seen) == blocks
            for depth, output in enumerate(seen):
                for i in range(len(batch) // size):
                    features[kind, number + i, depth] = output[i * size : (i + 1) * size].flatten(1)
            if kind == "synthetic" and classifier is not None:
                logits.append(classifier(batch))
    for hook in hooks:
        hook.remove()
    loss = sum(
        distance(features["synthetic", c, depth], features["real", c, depth].detach(), rngs[c])
        for depth in range(blocks)
        for c in range(CLASSES)
    )
    if classifier is not None:
        of_images = torch.nn.functional.cross_entropy(
            torch.cat(logits), torch.arange(CLASSES).repeat_interleave(IPC), reduction="none"
        )
        loss = loss + weight * of_images.sum() / IPC
    return loss.item(), *torch.autograd.grad(loss, [x, *learned])


def assert_is(found, loss, gradient):
    assert found.loss.item() == pytest.approx(loss, rel=1e-10) and loss > 0
    assert gradient.norm() > 0 and (found.images - gradient).norm() < 1e-10 * gradient.norm()
    assert not found.labels.any() and not found.lr.any() and not found.images.requires_grad


def assert_equal(name, blocks, augmentation=NoAugmentation(), it=4, rows=ROWS):
    found = objective(name, blocks, augmentation, rows).gradients(it, IMAGES, LABELS, LR)
    assert_is(found, *plain(name, it, blocks, augmentation, rows))


# ------------------------------------------------------------------------------------------------- the gradients


@pytest.mark.parametrize("depth_ratio", [None, 0.0, 0.5, 0.75])
@pytest.mark.parametrize("name", ["ConvNetD4W8", "ConvNetD4W8BN", "MLP", "ConvNetD2W8LN"])
def test_loss_and_gradient_are_those_of_the_formula(name, depth_ratio):
    blocks = matched_blocks(depth_ratio, len(network(name, 0).body))
    assert_equal(name, blocks, DSA(siamese=True))


@pytest.mark.parametrize("name", ["ConvNetD2W8", "ConvNetD2W8BN"])
@pytest.mark.parametrize("kind", ["color", "crop", "cutout", "flip", "scale", "rotate"])
def test_every_augmentation_is_shared_and_differentiated(kind, name):
    assert_equal(name, 2, DSA(kind, siamese=True))


def test_without_augmentation_and_with_images_left_out():
    assert_equal("ConvNetD2W8", 1)
    assert_equal("ConvNetD2W8", 1, rows=[row[4:12] for row in ROWS])  # of which there are fewer than a batch has


def test_a_class_has_one_draw_of_its_own():
    drawn = []

    class Noting(DSA):
        def draw(self, n, rng):
            drawn.append((n, super().draw(n, rng)))
            return drawn[-1][1]

    objective("MLP", augmentation=Noting(siamese=True)).gradients(0, IMAGES, LABELS, LR)
    assert len(drawn) == CLASSES and all(draw.u.shape == (1, 3) for _, draw in drawn)
    assert len({draw.u.sum().item() for _, draw in drawn}) == CLASSES


def test_networks_with_batchnorm_see_all_classes_at_once_and_others_one():
    for name, expected in (("MLP", [10, IPC] * CLASSES), ("ConvNetD2W8BN", [10 * CLASSES, IPC * CLASSES])):
        module, sizes = network(name, 0), []
        module.body[0].register_forward_hook(lambda block, inputs, output: sizes.append(len(output)))
        ours = objective(name)
        object.__setattr__(ours, "network", lambda it: module)
        ours.gradients(0, IMAGES, LABELS, LR)
        assert sizes == expected


def test_gradients_are_a_function_of_seed_iteration_and_set():
    def loss(it, **changes):
        ours = objective("ConvNetD2W8", augmentation=DSA(siamese=True), **changes)
        return ours.gradients(it, IMAGES, LABELS, LR).loss.item()

    state = torch.get_rng_state()
    found = [loss(0), loss(1), loss(0, seed=SEED + 1)]
    assert loss(0) == found[0] and len(set(found)) == 3
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_give_what_one_gives(size):
    def work(ranks):
        found = [
            objective(name, 2, DSA(siamese=True), ranks=ranks).gradients(1, IMAGES, LABELS, LR)
            for name in ("ConvNetD2W8", "ConvNetD2W8BN")
        ]
        return [[tensor.numpy() for tensor in (g.loss, g.images, g.labels, g.lr)] for g in found]

    alone = work(ALONE)
    for shared in on_ranks(size, work):
        for found, expected in zip(shared, alone, strict=True):
            for ours, one in zip(found, expected, strict=True):
                ours, one = torch.as_tensor(ours), torch.as_tensor(one)
                assert (ours - one).norm() <= 1e-12 * one.norm()


# ---------------------------------------------------------------------------------------------------- the blocks


@pytest.mark.parametrize("count", range(1, 9))
def test_the_share_of_the_blocks_that_is_matched(count):
    assert matched_blocks(None, count) == 1
    for hundredths in range(100):
        expected = math.ceil((1 - Fraction(hundredths, 100)) * count)
        assert matched_blocks(hundredths / 100, count) == expected, hundredths
        assert 1 <= expected <= count


def test_the_blocks_of_the_published_depths():
    assert [matched_blocks(ratio, 3) for ratio in (0, 0.25, 0.5, 0.75)] == [3, 3, 2, 1]
    assert [matched_blocks(ratio, 4) for ratio in (0, 0.25, 0.5, 0.75)] == [4, 3, 2, 1]


@pytest.mark.parametrize(
    "name, fused", [("ConvNetD3W8", True), ("ConvNetD2W16", True), ("ConvNetD2W8BN", False), ("MLP", False)]
)
@pytest.mark.parametrize("differentiated", [False, True])
def test_blocks_by_the_kernels_are_those_of_the_module(name, fused, differentiated):
    module = network(name, 0)
    ours, x = blocks_of(module), IMAGES.clone().requires_grad_(differentiated)
    assert (ours != module.blocks) is (fused and kernels.library() is not None)
    found, expected = ours(x), module.blocks(x)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)
    if differentiated:
        sums = [sum(block.square().sum() for block in blocks) for blocks in (found, expected)]
        ours, theirs = (torch.autograd.grad(total, x)[0] for total in sums)
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)
