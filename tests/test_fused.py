import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pad.nn import kernels
from pad.nn.flat import FlatModel
from pad.nn.fused import Block, DualBlock, FirstDualBlock, FusedConvNet, Layer, forward_of
from pad.nn.networks import InstanceNorm, Network, build

sys.path.append(str(Path(__file__).resolve().parents[1] / "scripts" / "benchmarks"))
precision = importlib.import_module("precision")
pytestmark = pytest.mark.skipif(kernels.library() is None, reason="the kernels cannot be built here")
EPS = 1e-5


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def plain_block(x, weight, bias):
    """The block by its definition."""
    mean = x.mean(dim=(2, 3), keepdim=True)
    variance = (x - mean).square().mean(dim=(2, 3), keepdim=True)
    u = (x - mean) / (variance + EPS).sqrt() * weight[:, None, None] + bias[:, None, None]
    return F.avg_pool2d(u.clamp(min=0), 2)


SHAPES = [(3, 8, 6, 4), (2, 16, 7, 5), (1, 24, 2, 9), (5, 32, 32, 32), (2, 8, 3, 3)]


@pytest.mark.parametrize("shape", SHAPES)
def test_block_is_its_definition(shape):
    arguments = [randn(*shape) * 2 + 3, randn(shape[1], seed=1), randn(shape[1], seed=2)]
    ours, theirs = ([t.clone().requires_grad_() for t in arguments] for _ in range(2))
    out, expected = Block.apply(EPS, *ours), plain_block(*theirs)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    cotangent = randn(*expected.shape, seed=3)
    for a, b in zip(torch.autograd.grad(out, ours, cotangent), torch.autograd.grad(expected, theirs, cotangent)):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_dual_block_is_the_derivative_along_a_direction(shape):
    x, dx = randn(*shape) * 2 + 3, randn(*shape, seed=1)
    weight, dweight, bias, dbias = (randn(shape[1], seed=seed) for seed in range(2, 6))
    ours, theirs = ([t.clone().requires_grad_() for t in (x, dx, weight, bias)] for _ in range(2))
    outs = DualBlock.apply(EPS, *ours, dweight, dbias)
    point, along = (theirs[0], theirs[2], theirs[3]), (theirs[1], dweight, dbias)
    expected = torch.func.jvp(plain_block, point, along)
    cotangents = [randn(*expected[0].shape, seed=seed) for seed in (6, 7)]
    for a, b in zip(outs, expected):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)
    for a, b in zip(torch.autograd.grad(outs, ours, cotangents), torch.autograd.grad(expected, theirs, cotangents)):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("strides", ["contiguous", "channels-last", "transposed", "every other"])
def test_any_strides_will_do(strides):
    x = randn(4, 16, 6, 6)
    laid_out = {
        "contiguous": x,
        "channels-last": x.contiguous(memory_format=torch.channels_last),
        "transposed": x.transpose(0, 3).contiguous().transpose(0, 3),
        "every other": x.repeat_interleave(2, dim=1)[:, ::2],
    }[strides]
    weight, bias = randn(32, seed=1)[::2], randn(16, seed=2)
    torch.testing.assert_close(Block.apply(EPS, laid_out, weight, bias), plain_block(x, weight, bias))


def test_float32_is_as_exact_as_its_format():
    x, weight, bias = randn(2, 16, 32, 32) + 30, randn(16, seed=1), randn(16, seed=2)
    out = Block.apply(EPS, x.float(), weight.float(), bias.float())
    torch.testing.assert_close(out.double(), plain_block(x, weight, bias), rtol=0, atol=2e-5)


@pytest.mark.parametrize("side", precision.SIDES)
@pytest.mark.parametrize("plane", precision.PLANES)
def test_no_plane_costs_digits_that_group_norm_keeps(plane, side):
    ours, theirs = (precision.errors_at(plane, side, form) for form in (precision.KERNELS, precision.TORCH))
    for name, found in ours.items():
        assert all(error < max(2e-5, 2 * limit) for error, limit in zip(found, theirs[name], strict=True))
    doubles = precision.errors_at(plane, side, precision.KERNELS, torch.float64)
    assert max(map(max, doubles.values())) < 1e-9


@pytest.mark.parametrize("side", [9, 64])
def test_a_bright_pixel_of_a_dark_image_costs_the_first_block_no_digits(side):
    images, layer = 0.01 * randn(1, 3, side, side).float(), Layer(1, EPS)
    images[:, :, side // 2, side // 2] = 5
    kernel, dkernel = (randn(8, 3, 3, 3, seed=seed).float() for seed in (1, 2))
    weight, dweight, bias, dbias = (randn(8, seed=seed).float() for seed in range(3, 7))

    def block(images, kernel, weight, bias):
        return plain_block(F.conv2d(images, kernel, padding=1), weight, bias)

    def definition(images, kernel, weight, bias, dkernel, dweight, dbias):
        along = torch.zeros_like(images), dkernel, dweight, dbias
        return torch.func.jvp(block, (images, kernel, weight, bias), along)

    convolved = F.conv2d(images.double(), kernel.double(), padding=1)
    cotangents = precision.cotangents_where_relu_is_certain(convolved, weight, bias)
    arguments = (images, kernel, weight, bias), (dkernel, dweight, dbias), cotangents
    ours = precision.values_and_gradients(lambda *tensors: FirstDualBlock.apply(layer, *tensors), *arguments)
    exact = precision.values_and_gradients(definition, *[[t.double() for t in part] for part in arguments])
    assert max(precision.errors(ours, exact)) < 2e-5


def test_a_plane_without_variance_is_not_divided_by_zero():
    x = torch.full((1, 8, 4, 4), 2.0, dtype=torch.float64, requires_grad=True)
    weight, bias = randn(8, seed=1), randn(8, seed=2)
    out = Block.apply(EPS, x, weight, bias)
    torch.testing.assert_close(out, bias.clamp(min=0)[None, :, None, None].expand(1, 8, 2, 2))
    assert torch.autograd.grad(out.sum(), x)[0].isfinite().all()


@pytest.mark.parametrize(
    "name, channels, size",
    [("ConvNet", 3, (16, 16)), ("ConvNetD4W8", 3, (33, 21)), ("ConvNetD2W16", 1, (28, 28)), ("ConvNetD1W8", 2, (5, 6))],
)
@pytest.mark.parametrize("micro_batch", [None, 3])
def test_derivatives_equal_autograd(name, channels, size, micro_batch):
    module = build(name, channels, 4, size, 0).double()
    plain, model = FlatModel(module), FlatModel(module, "fused", micro_batch)
    assert model.compile == "fused"
    theta = plain.flatten(module)
    theta, lam = theta + 0.1 * randn(*theta.shape), randn(*theta.shape, seed=1)
    x, p = randn(5, channels, *size), randn(5, 4, seed=3)  # p need not add up to one
    results = [model.grad(theta, x, p), *model.hvp(theta, x, p, lam)]
    for ours, theirs in zip(results, [plain.grad(theta, x, p), *plain.hvp(theta, x, p, lam)], strict=True):
        assert ours.shape == theirs.shape
        assert (ours - theirs).norm() < 1e-11 * theirs.norm()


@pytest.mark.parametrize(
    "name, fits",
    [
        ("ConvNet", True),
        ("ConvNetD5W64", True),
        ("ConvNetIN", True),
        ("ConvNetBN", False),
        ("ConvNetGN", False),
        ("ConvNetNP", False),
        ("ConvNetMP", False),
        ("ConvNetAL", False),
        ("MLP", False),
        ("LeNet", False),
        ("ResNet18", False),
        ("VGG11", False),
    ],
)
def test_which_networks_are_fused(name, fits):
    module = build(name, 3, 10, (32, 32), 0)
    assert FusedConvNet.fits(module) is fits
    assert FlatModel(module, "fused").compile == ("fused" if fits else "off")
    assert FlatModel(module, "off").compile == "off"


@pytest.mark.parametrize(
    "changed",
    [
        lambda parts: type("Own", (nn.Sequential,), {})(*parts),
        lambda parts: nn.Sequential(type("Own", (nn.Conv2d,), {})(3, 8, 3, padding=1), *parts[1:]),
        lambda parts: nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect"), *parts[1:]),
        lambda parts: nn.Sequential(nn.Conv2d(3, 8, 3, padding="same"), *parts[1:]),
        lambda parts: nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), *parts[1:]),
        lambda parts: nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), InstanceNorm(12), *parts[2:]),
        lambda parts: nn.Sequential(*parts[:3], nn.AvgPool2d(2, ceil_mode=True)),
        lambda parts: nn.Sequential(*parts[:3], nn.AvgPool2d(3)),
    ],
)
def test_blocks_that_only_look_like_those_of_the_kernels_are_not_fused(changed):
    parts = nn.Conv2d(3, 8, 3, padding=1), InstanceNorm(8), nn.ReLU(), nn.AvgPool2d(2)
    assert FusedConvNet.fits(Network([nn.Sequential(*parts)], 8, 10))
    assert not FusedConvNet.fits(Network([changed(parts)], 8, 10))


def test_the_result_does_not_depend_on_the_number_of_threads():
    module = build("ConvNetW8", 3, 10, (16, 16), 0)
    model, theta = FlatModel(module, "fused"), FlatModel(module).flatten(module)
    x, dx, weight = randn(6, 8, 8, 8).float(), randn(6, 8, 8, 8, seed=1).float(), randn(8).float()
    threads, results = torch.get_num_threads(), []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            variables = [t.clone().requires_grad_() for t in (x, dx, weight, weight)]
            outs = DualBlock.apply(EPS, *variables, weight, weight)
            results.append([*outs, *torch.autograd.grad([out.sum() for out in outs], variables)])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))
    assert model.grad(theta, randn(2, 3, 16, 16).float(), torch.ones(2, 10)).isfinite().all()


BUILD = "import sys; from pad.nn import kernels; print(kernels.library() is not None)"


def build_in(folder, **environment):
    environment = {**os.environ, "PAD_CACHE": str(folder), **environment}
    return subprocess.run([sys.executable, "-c", BUILD], env=environment, capture_output=True, text=True, check=True)


@pytest.mark.slow
def test_the_library_is_built_once_and_whole(tmp_path):
    assert build_in(tmp_path).stdout == "True\n"
    (library,) = tmp_path.glob("compiled-*/*")
    built = library.stat().st_mtime_ns
    assert build_in(tmp_path).stdout == "True\n"
    assert [path.stat().st_mtime_ns for path in tmp_path.glob("compiled-*/*")] == [built]


@pytest.mark.slow
def test_a_compiler_that_fails_is_reported_in_a_line(tmp_path):
    compiler = tmp_path / "broken"
    compiler.write_text("#!/bin/sh\n[ $1 = --version ] && exit 0\necho no such flag >&2\nexit 1\n")
    compiler.chmod(0o755)
    result = build_in(tmp_path / "cache", CXX=str(compiler))
    assert result.stdout == "False\n"
    assert result.stderr.count("\n") == 1 and "no such flag" in result.stderr
    assert not list((tmp_path / "cache").glob("*/*"))


def test_logits_are_those_of_the_module():
    module = build("ConvNetD2W8", 3, 4, (13, 10), 0).double()
    model = FlatModel(module, "fused")
    images = randn(7, 3, 13, 10)
    torch.testing.assert_close(model.logits(model.flatten(module), images, batch=3), module(images).detach())


def test_tensors_elsewhere_are_refused():
    x = torch.empty(2, 8, 4, 4, device="meta")
    with pytest.raises(ValueError, match="CPU"):
        Block.apply(EPS, x, x[0, :, 0, 0], x[0, :, 0, 0])


@pytest.mark.parametrize("name, fused", [("ConvNetD2W8", True), ("ConvNetD2W8BN", False)])
def test_forward_of_a_module_follows_its_parameters(name, fused):
    module = build(name, 3, 4, (13, 10), 0).double()
    forward, images = forward_of(module), randn(7, 3, 13, 10)
    assert (forward is not module) is fused
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1)  # in place, as optimisers do
    torch.testing.assert_close(forward(images), module(images))
    ours, theirs = (torch.autograd.grad(f(images).square().sum(), list(module.parameters())) for f in (forward, module))
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
