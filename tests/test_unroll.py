import copy
import json
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pad.data.augment import DSA, NoAugmentation, augment
from pad.matching.loss import matching_loss
from pad.matching.unroll import Step, adjoint, inner_steps, unroll, unrolled_gradients
from pad.nn.flat import FlatModel
from pad.nn.networks import build
from pad.rng import generator

CLASSES, SHAPE = 3, (3, 16, 16)


class SmallResNet(nn.Module):
    """A residual block with batch normalisation and a strided shortcut."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 5, 3, 2, 1, bias=False), nn.BatchNorm2d(5), nn.ReLU())
        self.main = nn.Sequential(nn.Conv2d(5, 6, 3, 2, 1, bias=False), nn.BatchNorm2d(6))
        self.shortcut = nn.Sequential(nn.Conv2d(5, 6, 1, 2, bias=False), nn.BatchNorm2d(6))
        self.classifier = nn.Linear(6, CLASSES)

    def forward(self, x):
        x = self.stem(x)
        return self.classifier(F.relu(self.main(x) + self.shortcut(x)).mean(dim=(2, 3)))


class Tiny(nn.Module):
    """Smooth, and small enough for 80 steps and finite differences."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 4, 4), nn.Linear(64, CLASSES)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)).flatten(1))


def network(name):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        own = {"SmallResNet": SmallResNet, "Tiny": Tiny}
        return (own[name]() if name in own else build(name, SHAPE[0], CLASSES, SHAPE[1:], 0)).double()


def randn(seed, shape):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def relative(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm()).item()


class Setting:
    """A network between two points of a made-up trajectory, and a synthetic set of ``n`` images."""

    def __init__(self, name, n):
        self.module = network(name)
        self.model = FlatModel(self.module)
        theta = self.model.flatten(self.module)
        self.start = theta + 0.01 * randn(0, theta.shape)
        self.target = self.start + 0.05 * randn(1, theta.shape)
        self.images, self.labels = randn(2, (n, *SHAPE)), randn(3, (n, CLASSES))
        self.lr = torch.tensor(0.05, dtype=torch.float64)

    def ours(self, steps, depth_ratio=0.0, loss_ratio=0.0, **how):
        return unrolled_gradients(
            self.model,
            self.start,
            self.images,
            self.labels,
            self.lr,
            steps,
            objective=lambda theta: matching_loss(theta, self.start, self.target, depth_ratio, loss_ratio),
            **how,
        )

    def autograd(self, steps, depth_ratio=0.0, loss_ratio=0.0):
        """Loss and gradients by differentiating the whole loop on the ordinary module."""
        images, labels, lr = (tensor.clone().requires_grad_() for tensor in (self.images, self.labels, self.lr))
        self.module.train()
        parameters, at = {}, 0
        for name, parameter in self.module.named_parameters():
            flat = self.start[at : at + parameter.numel()].clone().requires_grad_()
            parameters[name], at = flat.reshape(parameter.shape), at + parameter.numel()
        for step in steps:
            logits = torch.func.functional_call(self.module, parameters, (augment(images[step.indices], step.draw),))
            p = torch.exp(labels[step.indices]) / torch.exp(labels[step.indices]).sum(dim=1, keepdim=True)
            loss = -(p * torch.log(torch.softmax(logits, dim=1))).sum(dim=1).mean()
            gradients = torch.autograd.grad(loss, list(parameters.values()), create_graph=True)
            parameters = {name: value - lr * g for (name, value), g in zip(parameters.items(), gradients)}
        end = torch.cat([value.reshape(-1) for value in parameters.values()])
        count = len(end)
        by_error = sorted(range(count), key=lambda i: abs(end[i].item() - self.target[i].item()))
        dropped = {*range(int(depth_ratio * count)), *by_error[: int(loss_ratio * count)]}
        kept = torch.tensor([i for i in range(count) if i not in dropped])
        moved = ((self.start - self.target)[kept] ** 2).sum()
        loss = ((end - self.target)[kept] ** 2).sum() / moved
        return loss, *torch.autograd.grad(loss, (images, labels, lr))

    def assert_equal(self, steps, tolerance=1e-10, **ratios):
        ours = self.ours(steps, **ratios)
        for what, theirs in zip(("loss", "images", "labels", "lr"), self.autograd(steps, **ratios), strict=True):
            assert getattr(ours, what).shape == theirs.shape, what
            assert theirs.norm() > 0, what
            assert relative(getattr(ours, what), theirs) < tolerance, what


# ------------------------------------------------------------------------------- the gradient equals autograd's

CASES = {
    # name: network, images, batch, steps, augmentation, ratios
    "one step": ("ConvNetW8", 6, 6, 1, DSA(), {}),
    "ConvNet, short batch first": ("ConvNetW8", 10, 4, 7, DSA(), {"depth_ratio": 0.5}),
    "ConvNet, 20 steps": ("ConvNetD2W8", 9, 5, 20, DSA(siamese=True), {"loss_ratio": 0.3}),
    "MLP, both masks": ("MLP", 7, 3, 20, NoAugmentation(), {"depth_ratio": 0.25, "loss_ratio": 0.25}),
    "LeNet, siamese": ("LeNet", 8, 3, 7, DSA(siamese=True), {"depth_ratio": 0.5}),
    "batch larger than the set": ("ConvNetD2W8", 5, 1000, 7, DSA(), {}),
    "BatchNorm": ("ConvNetD2W8BN", 10, 4, 7, DSA(), {"depth_ratio": 0.5, "loss_ratio": 0.5}),
    "residual, BatchNorm": ("SmallResNet", 11, 4, 7, DSA(), {"depth_ratio": 0.75}),
    "80 steps": ("Tiny", 10, 4, 80, DSA(), {"depth_ratio": 0.5, "loss_ratio": 0.2}),
}


@pytest.mark.parametrize("case", CASES)
def test_gradients_equal_differentiating_the_unrolled_loop(case):
    name, n, batch, count, augmentation, ratios = CASES[case]
    steps = inner_steps(n, batch, count, augmentation, torch.Generator().manual_seed(4))
    assert len(steps) == count
    Setting(name, n).assert_equal(steps, **ratios)


@pytest.mark.parametrize("siamese", [False, True])
@pytest.mark.parametrize("kind", ["color", "crop", "cutout", "flip", "scale", "rotate"])
def test_every_augmentation_is_differentiated(kind, siamese):
    steps = inner_steps(5, 3, 4, DSA(kind, siamese), torch.Generator().manual_seed(5))
    assert {step.draw.kind for step in steps} == {kind}
    assert {len(step.draw.u) for step in steps} == ({1} if siamese else {2, 3})
    Setting("Tiny", 5).assert_equal(steps)


def test_an_image_without_a_step_has_no_gradient_and_one_of_several_has_their_sum():
    setting = Setting("Tiny", 4)
    steps = [Step(torch.tensor(indices), None) for indices in ([2, 0], [0], [0, 2])]
    setting.assert_equal(steps)
    ours = setting.ours(steps)
    for i, used in enumerate([True, False, True, False]):
        assert bool(ours.images[i].any()) is used and bool(ours.labels[i].any()) is used


def test_the_gradient_of_logits_sums_to_zero_over_the_classes():
    ours = Setting("Tiny", 6).ours(inner_steps(6, 4, 5, DSA(), torch.Generator().manual_seed(0)))
    assert ours.labels.abs().max() > 0 and ours.labels.sum(dim=1).abs().max() < 1e-15 * len(ours.labels)


@pytest.mark.parametrize("augmentation", [NoAugmentation(), DSA()])
def test_gradients_equal_finite_differences_of_the_whole_map(augmentation):
    setting = Setting("Tiny", 6)
    steps = inner_steps(6, 4, 12, augmentation, torch.Generator().manual_seed(6))
    ratios = {"depth_ratio": 0.4, "loss_ratio": 0.3}
    ours = setting.ours(steps, **ratios)
    images, labels, lr = setting.images, setting.labels, setting.lr
    along = randn(7, images.shape), randn(8, labels.shape), randn(9, ())

    def loss(eps):
        setting.images, setting.labels, setting.lr = (v + eps * d for v, d in zip((images, labels, lr), along))
        return setting.ours(steps, **ratios).loss

    eps = 1e-6
    slope = (loss(eps) - loss(-eps)) / (2 * eps)
    predicted = sum((g * d).sum() for g, d in zip((ours.images, ours.labels, ours.lr), along))
    assert predicted.item() == pytest.approx(slope.item(), rel=1e-6)


def test_unroll_is_the_ordinary_training_loop():
    setting = Setting("ConvNetD2W8BN", 10)
    steps = inner_steps(10, 4, 6, DSA(), torch.Generator().manual_seed(4))
    path = unroll(setting.model, setting.start, setting.images, setting.labels, setting.lr, steps)
    torch.nn.utils.vector_to_parameters(setting.start.clone(), setting.module.parameters())
    sgd = torch.optim.SGD(setting.module.train().parameters(), lr=0.05)
    assert path.shape == (7, len(setting.start)) and torch.equal(path[0], setting.start)
    for step, expected in zip(steps, path[1:], strict=True):
        sgd.zero_grad()
        logits = setting.module(augment(setting.images[step.indices], step.draw))
        F.cross_entropy(logits, setting.labels[step.indices].softmax(dim=1)).backward()
        sgd.step()
        assert relative(torch.nn.utils.parameters_to_vector(setting.module.parameters()), expected) < 1e-13


def test_the_arguments_are_left_as_they_are_and_carry_no_graph():
    setting = Setting("Tiny", 6)
    lam = randn(0, setting.start.shape)
    steps = inner_steps(6, 4, 5, DSA(), torch.Generator().manual_seed(0))
    arguments = setting.start, setting.images, setting.labels, setting.lr, lam
    before = [tensor.clone() for tensor in arguments]
    path = unroll(setting.model, *arguments[:4], steps)
    rows = path.clone()
    gradients = adjoint(setting.model, path, *arguments[1:4], steps, lam=lam)
    assert torch.equal(path, rows)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(arguments, before))
    assert not any(tensor.requires_grad for tensor in (*arguments, path, *gradients))


def test_tensors_that_require_gradients_may_be_given():
    setting = Setting("Tiny", 6)
    steps = inner_steps(6, 4, 3, DSA("scale"), torch.Generator().manual_seed(0))
    plain = setting.ours(steps)
    setting.images.requires_grad_(), setting.labels.requires_grad_(), setting.lr.requires_grad_()
    ours = setting.ours(steps)
    assert torch.equal(ours.images, plain.images) and not ours.images.requires_grad
    assert setting.images.grad is None and not ours.labels.requires_grad and not ours.lr.requires_grad


# ------------------------------------------------------------------------------------------- TESLA's gradient


def held_constant(setting, steps):
    """The gradients of sum_i -lr <grad l(theta_i), lam>, with every theta_i and lam taken as numbers."""
    images, labels, lr = (tensor.clone().requires_grad_() for tensor in (setting.images, setting.labels, setting.lr))
    module = setting.module.train()
    torch.nn.utils.vector_to_parameters(setting.start.clone(), module.parameters())
    parameters, along = list(module.parameters()), []
    for step in steps:
        logits = module(augment(images[step.indices], step.draw))
        loss = F.cross_entropy(logits, labels[step.indices].softmax(dim=1))
        gradients = torch.autograd.grad(loss, parameters, create_graph=True)
        along.append(torch.cat([g.flatten() for g in gradients]))
        parameters = [(value - setting.lr * g).detach().requires_grad_() for value, g in zip(parameters, gradients)]
        module = copy.deepcopy(module)
        torch.nn.utils.vector_to_parameters(torch.nn.utils.parameters_to_vector(parameters), module.parameters())
        parameters = list(module.parameters())
    end = torch.nn.utils.parameters_to_vector(parameters).detach()
    lam = 2 * (end - setting.target) / (setting.start - setting.target).square().sum()
    total = sum(-lr * (g @ lam) for g in along)
    return torch.autograd.grad(total, (images, labels, lr))


@pytest.mark.parametrize("name", ["ConvNetD2W8", "ConvNetD2W8BN", "Tiny"])
def test_of_one_step_the_truncated_gradient_is_exact(name):
    setting = Setting(name, 6)
    steps = inner_steps(6, 4, 1, DSA(), torch.Generator().manual_seed(4))
    exact, truncated = setting.ours(steps), setting.ours(steps, truncated=True)
    for what in ("loss", "images", "labels", "lr"):
        assert relative(getattr(truncated, what), getattr(exact, what)) < 1e-12, what


@pytest.mark.parametrize("name, count", [("ConvNetD2W8", 7), ("ConvNetD2W8BN", 4), ("MLP", 7), ("Tiny", 30)])
def test_the_truncated_gradient_is_that_of_steps_from_constant_points(name, count):
    setting = Setting(name, 10)
    steps = inner_steps(10, 4, count, DSA(), torch.Generator().manual_seed(4))
    exact, truncated = setting.ours(steps), setting.ours(steps, truncated=True)
    assert torch.equal(truncated.loss, exact.loss)
    for what, theirs in zip(("images", "labels", "lr"), held_constant(setting, steps), strict=True):
        assert theirs.norm() > 0 and relative(getattr(truncated, what), theirs) < 1e-10, what
        assert relative(getattr(truncated, what), getattr(exact, what)) > 1e-4, f"{what}: nothing is left out"


# ------------------------------------------------------------------------------------------------ mini-batches


def test_chunks_of_a_permutation_are_taken_from_the_end_and_the_permutation_is_made_afresh():
    steps = inner_steps(10, 4, 8, NoAugmentation(), generator(3, "x"))
    rng = generator(3, "x")
    expected = []
    for _ in range(3):
        order = torch.randperm(10, generator=rng).tolist()
        expected += [order[8:10], order[4:8], order[0:4]]
    assert [step.indices.tolist() for step in steps] == expected[:8]
    assert all(step.draw is None for step in steps)


@pytest.mark.parametrize("n, batch", [(12, 4), (13, 4), (5, 5), (5, 9), (3, 1)])
def test_every_pass_takes_each_image_once(n, batch):
    per_pass = -(-n // batch)
    steps = inner_steps(n, batch, 3 * per_pass, DSA(), generator(0, "x"))
    passes = [steps[i : i + per_pass] for i in range(0, len(steps), per_pass)]
    for taken in passes:
        sizes = [len(step.indices) for step in taken]
        assert sizes == [n % batch or min(n, batch)] + [batch] * (per_pass - 1)
        assert sorted(torch.cat([step.indices for step in taken]).tolist()) == list(range(n))
        assert [len(step.draw.u) for step in taken] == sizes
    assert len({tuple(torch.cat([step.indices for step in taken]).tolist()) for taken in passes}) > 1


def test_steps_are_a_function_of_the_generator():
    def plan(seed):
        steps = inner_steps(10, 4, 12, DSA(), generator(seed, "x"))
        return [(step.indices.tolist(), step.draw.kind, step.draw.u.tolist()) for step in steps]

    assert plan(1) == plan(1) != plan(2)
    assert len({str(u) for _, _, u in plan(1)}) == 12, "every step draws its own augmentation"
    assert plan(1)[:5] == [
        (step.indices.tolist(), step.draw.kind, step.draw.u.tolist())
        for step in inner_steps(10, 4, 5, DSA(), generator(1, "x"))
    ]


# ------------------------------------------------------------------------------------------------------ memory

MEASURE = """
import json, sys, torch
from pad.data.augment import DSA
from pad.nn.flat import FlatModel, cross_entropy
from pad.matching.loss import matching_loss
from pad.matching.unroll import inner_steps, unrolled_gradients
from pad.nn.networks import build

def peak(f, steps):  # bytes, of this program alone and of this call (ru_maxrss begins at the parent's, and never falls)
    open("/proc/self/clear_refs", "w").write("5")
    f(steps)
    return 1024 * int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])

torch.set_num_threads(1)
rng = torch.Generator().manual_seed(0)
module = build("ConvNetW8", 3, 10, (32, 32), 0)
model = FlatModel(module)
theta = model.flatten(module)
target = theta + 0.01 * torch.randn(len(theta), generator=rng)
images, labels = torch.randn(64, 3, 32, 32, generator=rng), torch.randn(64, 10, generator=rng)
lr = torch.tensor(0.01)

def exact(count):
    steps = inner_steps(64, 64, count, DSA(), rng)
    unrolled_gradients(model, theta, images, labels, lr, steps, objective=lambda end: matching_loss(end, theta, target))

def graph(count):  # the published way
    at, p = theta.clone().requires_grad_(), labels.softmax(dim=1)
    for _ in range(count):
        g, = torch.autograd.grad(cross_entropy(model(at, images), p), at, create_graph=True)
        at = at - lr * g

exact(2), graph(2)  # to warm up
peaks = {f"{f.__name__} {steps}": peak(f, steps) for f, steps in ((exact, 10), (exact, 80), (graph, 2), (graph, 10))}
print(json.dumps({"P": len(theta), **peaks}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_does_not_grow_with_the_steps_beyond_the_stored_parameters():
    # A fixed threshold: what is freed goes back to the system at once, and no longer counts.
    allocator = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "1000000"}
    environment = os.environ | allocator | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, env=environment, check=True)
    peaks = json.loads(run.stdout)
    stored = 70 * peaks["P"] * 4  # 70 more rows of float32 parameters
    slack = 20e6
    assert peaks["exact 80"] - peaks["exact 10"] < stored + slack
    # That the measurement would tell: already eight more steps of an unrolled graph take more than that.
    assert peaks["graph 10"] - peaks["graph 2"] > 2 * (stored + slack)
