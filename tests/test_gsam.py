import math

import pytest
import torch
import torch.nn.functional as F

from pad.experts.gsam import GSAM
from pad.nn.flat import FlatModel
from pad.nn.networks import build

CLASSES = 4


def task(name="ConvNetD2W8", size=8, batch=6, batches=4):
    """A network in float64 and a few batches (images, labels)."""
    rng = torch.Generator().manual_seed(3)
    images = torch.randn(batches, batch, 3, size, size, dtype=torch.float64, generator=rng)
    labels = torch.randint(CLASSES, (batches, batch), generator=rng)
    return build(name, 3, CLASSES, (size, size), seed=1).double(), list(zip(images, labels))


def gradients(module, x, y):
    return torch.autograd.grad(F.cross_entropy(module(x), y), list(module.parameters()))


def length(tensors):
    return math.sqrt(sum(float((t**2).sum()) for t in tensors))


@torch.no_grad()
def gsam_on_tensors(module, batch, buffers, lr, momentum, l2, rho, alpha, adaptive):
    """One update in place, one parameter tensor at a time."""
    parameters = list(module.parameters())
    with torch.enable_grad():
        g = gradients(module, *batch)
    shares = [p.abs() if adaptive else torch.ones_like(p) for p in parameters]
    radius = length([s * d for s, d in zip(shares, g)]) + 1e-12
    ascent = [rho * s**2 * d / radius for s, d in zip(shares, g)]
    for p, e in zip(parameters, ascent):
        p.add_(e)
    with torch.enable_grad():
        up = gradients(module, *batch)
    for p, e in zip(parameters, ascent):
        p.sub_(e)
    cosine = sum(float((a * b).sum()) for a, b in zip(g, up)) / (length(g) * length(up) + 1e-12)
    for i, (p, a, b) in enumerate(zip(parameters, g, up)):
        vertical = a - cosine * length(g) * b / (length(up) + 1e-12)
        direction = b - alpha * vertical + l2 * p
        buffers[i] = direction if i not in buffers else momentum * buffers[i] + direction
        p.sub_(lr * buffers[i])


def flat_updates(model, w, batches, optimiser):
    buffer = None
    for x, y in batches:
        p = F.one_hot(y, CLASSES).to(x.dtype)
        w, buffer = optimiser.step(w, buffer, lambda at: model.grad(at, x, p))
    return w, buffer


@pytest.mark.parametrize("name", ["ConvNetD2W8", "ConvNetD2W8BN", "MLP"])
@pytest.mark.parametrize("adaptive,rho", [(True, 2.0), (True, 0.01), (False, 0.3)])
@pytest.mark.parametrize("momentum,l2", [(0.0, 0.0), (0.9, 5e-3)])
def test_updates_are_those_of_an_ordinary_implementation(name, adaptive, rho, momentum, l2):
    module, batches = task(name)
    settings = dict(lr=0.1, momentum=momentum, l2=l2, rho=rho, alpha=0.4, adaptive=adaptive)
    model = FlatModel(module)
    start = model.flatten(module)
    w, buffer = flat_updates(model, start, batches, GSAM(**settings))
    buffers = {}
    for batch in batches:
        gsam_on_tensors(module, batch, buffers, **settings)
    expected = model.flatten(module)
    assert (expected - start).norm() > 1e-2  # there was something to compare
    torch.testing.assert_close(w, expected, rtol=1e-9, atol=1e-11)
    if momentum:
        torch.testing.assert_close(buffer, torch.cat([buffers[i].flatten() for i in buffers]), rtol=1e-8, atol=1e-10)
    else:
        assert buffer is None


def test_every_setting_counts():
    module, batches = task()
    model = FlatModel(module)
    base = dict(lr=0.1, momentum=0.5, l2=1e-2, rho=0.5, alpha=0.4, adaptive=True)
    changes = [{}, {"lr": 0.2}, {"momentum": 0}, {"l2": 0}, {"rho": 0}, {"alpha": 0}, {"adaptive": False}]
    ends = [flat_updates(model, model.flatten(module), batches, GSAM(**(base | change)))[0] for change in changes]
    for i, a in enumerate(ends):
        for b in ends[:i]:
            assert (a - b).norm() > 1e-5


@pytest.mark.parametrize("momentum,l2", [(0.0, 0.0), (0.9, 0.0), (0.0, 5e-3), (0.9, 5e-3)])
def test_without_a_radius_it_is_sgd(momentum, l2):
    module, batches = task(batches=6)
    model = FlatModel(module)
    optimiser = GSAM(0.05, momentum, l2, rho=0.0, alpha=0.4, adaptive=True)
    w, _ = flat_updates(model, model.flatten(module), batches, optimiser)
    sgd = torch.optim.SGD(module.parameters(), lr=0.05, momentum=momentum, weight_decay=l2)
    for x, y in batches:
        sgd.zero_grad()
        F.cross_entropy(module(x), y).backward()
        sgd.step()
    torch.testing.assert_close(w, model.flatten(module), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("rho", [0.01, 2.0])
def test_the_perturbation_has_the_radius_and_climbs(rho):
    rng = torch.Generator().manual_seed(0)
    w, g = torch.randn(2, 50, dtype=torch.float64, generator=rng)
    plain = GSAM(0.1, rho=rho, adaptive=False).perturbation(w, g)
    assert plain.norm().item() == pytest.approx(rho)
    torch.testing.assert_close(plain / plain.norm(), g / g.norm())
    scaled = GSAM(0.1, rho=rho, adaptive=True).perturbation(w, g)
    assert (scaled / w).norm().item() == pytest.approx(rho)
    assert (scaled * g >= 0).all() and scaled @ g > 0


def test_the_gap_term_leaves_the_perturbed_gradient_alone():
    """What alpha adds is orthogonal to the perturbed gradient, so the perturbed loss falls as fast as without it."""
    rng = torch.Generator().manual_seed(0)
    g, up = torch.randn(2, 50, dtype=torch.float64, generator=rng)
    change = GSAM(0.1, alpha=0.4).combine(g, up) - up
    assert abs(change @ up) < 1e-10 * change.norm() * up.norm()
    expected = 0.4 * (g.norm() ** 2 - (g @ up) ** 2 / up.norm() ** 2).sqrt()
    assert change.norm().item() == pytest.approx(expected.item())
    assert change @ g < 0


def test_where_the_gradient_is_asked_for():
    w = torch.linspace(-1, 1, 7, dtype=torch.float64)
    asked = []

    def grad(at):
        asked.append(at.clone())
        return at**2 + 1

    optimiser = GSAM(0.1, rho=0.5, alpha=0.4)
    optimiser.step(w, None, grad)
    assert len(asked) == 2 and asked[0].equal(w)
    torch.testing.assert_close(asked[1], w + optimiser.perturbation(w, w**2 + 1))
    asked.clear()
    GSAM(0.1, rho=0.0, alpha=0.4).step(w, None, grad)
    assert len(asked) == 1 and asked[0].equal(w)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_step_changes_nothing_in_place_and_keeps_no_graph(momentum):
    w = torch.ones(5, requires_grad=True)
    buffer = torch.ones(5) if momentum else None
    new, new_buffer = GSAM(0.1, momentum, 0.1, rho=0.5, alpha=0.4).step(w, buffer, lambda at: at * 2)
    assert w.equal(torch.ones(5)) and not new.requires_grad and new.data_ptr() != w.data_ptr()
    if momentum:
        assert buffer.equal(torch.ones(5)) and new_buffer.data_ptr() != buffer.data_ptr()


@pytest.mark.parametrize("adaptive", [True, False])
def test_a_vanishing_gradient_moves_nothing(adaptive):
    w = torch.tensor([0.0, 1.0, -2.0])
    new, _ = GSAM(0.1, rho=2.0, alpha=0.4, adaptive=adaptive).step(w, None, torch.zeros_like)
    assert new.equal(w)
