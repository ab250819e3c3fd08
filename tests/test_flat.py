import logging
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pad.errors import InputError
from pad.nn import derivatives
from pad.nn.derivatives import (
    COMPILE_CALLS,
    Compiled,
    Eager,
    ForwardFirst,
    Functional,
    Fused,
    compiler_available,
    how_to_compile,
)
from pad.nn.flat import FlatModel, cross_entropy
from pad.nn.networks import Network, build

CLASSES, SHAPE = 4, (3, 16, 16)


class SmallResNet(nn.Module):
    """Two residual blocks with batch normalisation, a strided shortcut and a global pool."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU())
        self.first = nn.Sequential(nn.Conv2d(6, 6, 3, 1, 1, bias=False), nn.BatchNorm2d(6))
        self.second = nn.Sequential(nn.Conv2d(6, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8))
        self.shortcut = nn.Sequential(nn.Conv2d(6, 8, 1, 2, bias=False), nn.BatchNorm2d(8))
        self.classifier = nn.Linear(8, CLASSES)

    def forward(self, x):
        x = self.stem(x)
        x = F.relu(self.first(x) + x)
        x = F.relu(self.second(x) + self.shortcut(x))
        return self.classifier(x.mean(dim=(2, 3)))


def network(name):
    if name == "SmallResNet":
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return SmallResNet().double()
    return build(name, SHAPE[0], CLASSES, SHAPE[1:], 0).double()


def batch(n=7, seed=0):
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(n, *SHAPE, dtype=torch.float64, generator=rng)
    return x, torch.randn(n, CLASSES, dtype=torch.float64, generator=rng).softmax(dim=1)


def direction(like, seed=1):
    return torch.randn(like.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def relative(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm()).item()


def autograd_on_the_module(module, x, p, lam):
    """Gradient of the soft cross-entropy, and of <gradient, lam> in (parameters, x, p), on the ordinary module."""
    module.train()
    x, p = x.clone().requires_grad_(), p.clone().requires_grad_()
    parameters = list(module.parameters())
    loss = 0
    logits = module(x)
    for i in range(len(x)):
        log_probabilities = logits[i] - logits[i].exp().sum().log()
        loss = loss - (p[i] * log_probabilities).sum() / len(x)
    gradients = torch.autograd.grad(loss, parameters, create_graph=True)
    g = torch.cat([gradient.flatten() for gradient in gradients])
    slope = g @ lam
    *h_theta, h_x, h_p = torch.autograd.grad(slope, [*parameters, x, p])
    return g.detach(), slope.detach(), torch.cat([h.flatten() for h in h_theta]), h_x, h_p


def check_hvp(model, theta, x, p, lam, expected):
    for what, ours, theirs in zip(
        ("slope", "h_theta", "h_x", "h_p"), model.hvp(theta, x, p, lam), expected, strict=True
    ):
        assert ours.shape == theirs.shape, what
        assert relative(ours, theirs) < 1e-11, what


NETWORKS = ["ConvNetW8", "MLP", "LeNet", "ConvNetD2W8BN", "ConvNetD2W8ASLN", "ConvNetD1W8ALGNMP", "SmallResNet"]


@pytest.mark.parametrize("name", NETWORKS)
def test_grad_and_hvp_equal_autograd_on_the_ordinary_module(name):
    module = network(name)
    model = FlatModel(module)
    theta, (x, p) = model.flatten(module), batch()
    lam = direction(theta)
    expected = autograd_on_the_module(module, x, p, lam)
    assert relative(model.grad(theta, x, p), expected[0]) < 1e-12
    check_hvp(model, theta, x, p, lam, expected[1:])


@pytest.mark.parametrize("choice", [Functional, ForwardFirst, Fused])
@pytest.mark.parametrize("name", NETWORKS)
def test_every_choice_equals_autograd_on_the_ordinary_module(name, choice):
    module = network(name)
    if choice is not Functional and not choice.fits(module):
        assert name not in {ForwardFirst: ("ConvNetW8", "LeNet", "ConvNetD1W8ALGNMP"), Fused: ()}[choice]
        return
    model = FlatModel(module, choice)
    theta, (x, p) = model.flatten(module), batch()
    lam = direction(theta)
    expected = autograd_on_the_module(module, x, p, lam)
    assert relative(model.grad(theta, x, p), expected[0]) < 1e-12
    check_hvp(model, theta, x, p, lam, expected[1:])
    together = model.grads(torch.stack([theta]), x[None], p[None])
    assert relative(together[0], expected[0]) < 1e-12
    assert relative(model.logits(theta, x), module(x).detach()) < 1e-12


def test_instance_norm_as_it_is_compiled_has_the_same_derivatives(monkeypatch):
    module = network("ConvNetD2W8")
    model = FlatModel(module)
    theta, (x, p) = model.flatten(module) + 0.1, batch()
    x[:2] += 50  # a mean far from zero, where a variance by E(x^2) - E(x)^2 would cancel
    x[2] = 1.0  # no variance but for the border
    lam = direction(theta)
    grad, hvp = model.grad(theta, x, p), model.hvp(theta, x, p, lam)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    for choice in (Functional, ForwardFirst):
        other = FlatModel(module, choice)
        assert relative(other.grad(theta, x, p), grad) < 1e-12
        check_hvp(other, theta, x, p, lam, hvp)


class OwnNorm(nn.LayerNorm):
    """A layer of somebody's own."""


@pytest.mark.parametrize(
    "layers, fits",
    [
        ([nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Tanh()], True),
        ([nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)], False),
        ([nn.Conv2d(3, 4, 3), nn.LayerNorm((4, 14, 14))], False),
        ([nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4, affine=True)], False),
        ([nn.Conv2d(3, 4, 3), OwnNorm((4, 14, 14))], False),
        ([type("OwnConvolution", (nn.Conv2d,), {})(3, 4, 3)], False),
        ([nn.Flatten(), nn.Linear(768, 4)], False),
    ],
)
def test_the_slope_is_computed_forwards_only_where_torch_can(layers, fits):
    assert ForwardFirst.fits(Network([nn.Sequential(*layers)], 1, CLASSES)) is fits


@pytest.mark.parametrize("name", ["ConvNetW8", "ConvNetD2W8BN"])
@pytest.mark.parametrize("micro_batch", [1, 3, 7, 100])
def test_micro_batches_add_up(name, micro_batch):
    module = network(name)
    whole, model = FlatModel(module), FlatModel(module, micro_batch=micro_batch)
    theta, (x, p) = whole.flatten(module), batch()
    lam, largest = direction(theta), []
    call = torch.func.functional_call
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            torch.func, "functional_call", lambda m, params, x: largest.append(len(x[0])) or call(m, params, x)
        )
        assert relative(model.grad(theta, x, p), whole.grad(theta, x, p)) < 1e-12
        largest, most = [], max(largest[: math.ceil(7 / micro_batch)])
    assert most == (min(micro_batch, 7) if name == "ConvNetW8" else 7)  # statistics of a batch cannot be had in parts
    check_hvp(model, theta, x, p, lam, whole.hvp(theta, x, p, lam))


def test_short_batches_are_filled_up_to_a_size_that_is_compiled(monkeypatch):
    module, sizes = network("ConvNetD1W8"), []
    monkeypatch.setattr(
        torch, "compile", lambda f, **_: lambda theta, x, *rest: sizes.append(len(x)) or f(theta, x, *rest)
    )
    eager, model = FlatModel(module), FlatModel(module, Compiled, micro_batch=4)
    theta = eager.flatten(module)
    for n, expected in ((2, [2]), (1, [2]), (3, [3]), (7, [3, 4]), (1, [2]), (3, [3]), (4, [4])):
        x, p = batch(n)
        sizes.clear()
        assert relative(model.grad(theta, x, p), eager.grad(theta, x, p)) < 1e-12
        assert sorted(sizes) == expected
    x, p = batch(7)
    check_hvp(model, theta, x, p, direction(theta), eager.hvp(theta, x, p, direction(theta)))


def test_gradients_of_several_networks_at_once():
    modules = [network("ConvNetW8"), network("ConvNetW8")]
    with torch.no_grad():
        modules[1].classifier.weight.mul_(3)
    model = FlatModel(modules[0])
    thetas = torch.stack([model.flatten(module) for module in modules])
    (x0, p0), (x1, p1) = batch(), batch(seed=5)
    together = model.grads(thetas, torch.stack([x0, x1]), torch.stack([p0, p1]))
    assert relative(together[0], model.grad(thetas[0], x0, p0)) < 1e-12
    assert relative(together[1], model.grad(thetas[1], x1, p1)) < 1e-12


@pytest.mark.parametrize(
    "norm, choice",
    [
        *((norm, choice) for norm in ("BN", "LN", "IN", "GN", "NN") for choice in (Eager, Functional)),
        *((norm, ForwardFirst) for norm in ("IN", "GN", "NN")),
    ],
)
def test_hvp_equals_finite_differences_of_grad(norm, choice):
    module = network(f"ConvNetD2W8AS{norm}")  # sigmoid: smooth everywhere
    model = FlatModel(module, choice)
    theta, (x, p) = model.flatten(module), batch()
    lam, along_x, along_p = direction(theta, 1), direction(x, 2), direction(p, 3)
    _, h_theta, h_x, h_p = model.hvp(theta, x, p, lam)
    eps = 1e-5

    def slope(f):
        return (f(eps) - f(-eps)) / (2 * eps)

    assert relative(h_theta, slope(lambda e: model.grad(theta + e * lam, x, p))) < 1e-7
    in_x = slope(lambda e: model.grad(theta, x + e * along_x, p) @ lam)
    assert (h_x * along_x).sum().item() == pytest.approx(in_x.item(), rel=1e-7)
    in_p = slope(lambda e: model.grad(theta, x, p + e * along_p) @ lam)
    assert (h_p * along_p).sum().item() == pytest.approx(in_p.item(), rel=1e-7)


def test_cross_entropy_of_hard_labels_is_torchs():
    logits, labels = direction(torch.empty(5, CLASSES)), torch.tensor([0, 3, 1, 2, 0])
    ours = cross_entropy(logits, F.one_hot(labels, CLASSES).double())
    assert ours.item() == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-14)


@pytest.mark.parametrize("name", ["ConvNetW8BN", "MLP", "SmallResNet"])
def test_flat_parameters_are_in_module_order_and_come_back(name):
    module = network(name)
    model = FlatModel(module)
    parameters = list(module.named_parameters())
    assert model.names == [name for name, _ in parameters]
    assert model.shapes == [tuple(p.shape) for _, p in parameters]
    assert model.num_parameters == sum(p.numel() for _, p in parameters)

    theta = model.flatten(module)
    assert theta.tolist() == [number for _, p in parameters for number in p.flatten().tolist()]
    assert [(name, tensor.tolist()) for name, tensor in model.unflatten(theta).items()] == [
        (name, p.tolist()) for name, p in parameters
    ]
    with torch.no_grad():
        parameters[0][1].zero_()
    assert theta[: parameters[0][1].numel()].any(), "flatten gave a view of living parameters"


def test_the_model_takes_its_numbers_from_theta_alone_and_leaves_the_module_alone():
    module = network("ConvNetW8BN").eval()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    model, (x, p) = FlatModel(module), batch()
    theta = model.flatten(module)
    logits = model(theta, x)
    model.hvp(theta, x, p, theta)
    assert not module.training
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    with torch.no_grad():
        for tensor in [*module.parameters(), *module.buffers()]:
            tensor.fill_(7)
    assert torch.equal(model(theta, x), logits)


def test_batchnorm_uses_the_statistics_of_the_batch():
    module = network("SmallResNet")
    for child in module.modules():
        if isinstance(child, nn.BatchNorm2d):
            child.running_mean.fill_(3.0)
    model, (x, _) = FlatModel(module), batch()
    theta = model.flatten(module)
    logits = model(theta, x)
    torch.testing.assert_close(logits, module.train()(x), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(logits, module.eval()(x), atol=1e-2)


@pytest.mark.parametrize("layer", [nn.Dropout(0.5), nn.Dropout2d(0.1), nn.AlphaDropout(0.2)])
def test_dropout_is_refused(layer):
    with pytest.raises(InputError, match="dropout"):
        FlatModel(nn.Sequential(nn.Flatten(), nn.Sequential(nn.Linear(768, 4), layer)))


def test_logits_and_accuracy_of_many_images():
    module = network("MLP")
    model, (x, _) = FlatModel(module), batch(23)
    theta = model.flatten(module).requires_grad_()
    expected = module(x)
    logits = model.logits(theta, x, batch=5)
    assert not logits.requires_grad
    torch.testing.assert_close(logits, expected.detach(), rtol=1e-12, atol=1e-12)
    labels = expected.argmax(dim=1)
    labels[:6] = (labels[:6] + 1) % CLASSES
    assert model.accuracy(theta, x, labels) == pytest.approx(17 / 23, rel=1e-15)


@pytest.fixture
def compiled(monkeypatch):
    """The arguments of every call of torch.compile."""
    calls, compile = [], torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: calls.append(options) or compile(f, **options))
    return calls


@pytest.mark.slow
@pytest.mark.skipif(not compiler_available(), reason="no compiler")
def test_compiled_equals_eager(compiled):
    """One graph each, for the whole batch and for a ragged one, which is filled up."""
    module = network("ConvNetD1W8")
    eager, model = FlatModel(module), FlatModel(module, "on")
    assert compiled == [{"fullgraph": True, "dynamic": False}] * 3  # grad, hvp and grads of the second
    theta, lam = torch.stack([eager.flatten(module)] * 2)[1], direction(eager.flatten(module))  # a view, as in a path
    torch._dynamo.utils.counters.clear()
    for n in (7, 3):
        x, p = batch(n)
        assert relative(model.grad(theta, x, p), eager.grad(theta, x, p)) < 1e-10
        check_hvp(model, theta, x, p, lam, eager.hvp(theta, x, p, lam))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


@pytest.mark.parametrize("cuda, variable", [(False, "CXX"), (True, "CC")])
def test_without_a_compiler_one_line_is_said_and_nothing_is_compiled(monkeypatch, caplog, compiled, cuda, variable):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv(variable, raising=False)
    with caplog.at_level(logging.WARNING, logger="pad"):
        assert FlatModel(network("ConvNetD1W8"), "auto").compile == "off"
    assert not compiled
    assert len(caplog.records) == 1 and "compiler" in caplog.text
    monkeypatch.setenv(variable, "/bin/sh")  # any program will do
    assert compiler_available()


@pytest.mark.parametrize(
    "mode, device, calls, expected",
    [
        ("on", "cpu", 1, "on"),
        ("off", "cpu", 10**9, "off"),
        ("fused", "cpu", 10**9, "fused"),
        ("off", "cuda", 10**9, "off"),
        ("auto", "cuda", 1, "on"),
        ("fused", "cuda", 1, "auto"),  # on where there are no kernels for the network
        ("auto", "cpu", COMPILE_CALLS - 1, "fused"),
        ("auto", "cpu", COMPILE_CALLS, "auto"),
    ],
)
def test_when_to_compile(monkeypatch, mode, device, calls, expected):
    monkeypatch.setattr(derivatives, "kernels_of", lambda device: device)
    assert how_to_compile(mode, torch.device(device), calls) == expected


@pytest.mark.parametrize(
    "mode, device, there, expected",
    [
        ("fused", "cuda", False, "on"),
        ("fused", "cpu", False, "fused"),  # of which choose makes off, and auto on
        ("auto", "cpu", False, "fused"),
        ("fused", "cpu", True, "off"),  # beside a CUDA device, which has kernels
        ("auto", "cpu", True, "off"),
        ("on", "cpu", True, "on"),
    ],
)
def test_when_to_compile_without_kernels(monkeypatch, mode, device, there, expected):
    monkeypatch.setattr(derivatives, "kernels_of", lambda device: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    assert how_to_compile(mode, torch.device(device), 1) == expected
