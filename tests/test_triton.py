"""The kernels for CUDA: on a CUDA device, and on a CPU by Triton's interpreter, in a process of its own.

Triton reads TRITON_INTERPRET when it is imported. With it, what is here runs on the CPU; without, on CUDA.
"""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from pad.nn import derivatives, fused
from pad.nn.flat import FlatModel
from pad.nn.fused import Block, DualBlock
from pad.nn.networks import build

triton = pytest.importorskip("triton")
from pad.nn.kernels import triton_block  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
EPS = 1e-5
SHAPES = [
    (2, 3, 1, 1),  # of which nothing is pooled
    (3, 8, 4, 4),
    (1, 1, 2, 9),
    (2, 5, 7, 9),
    (1, 3, 32, 32),
    (1, 2, 64, 64),
    (1, 1, 128, 128),
    (1, 2, 130, 131),  # larger than a tile
]
LAYOUTS = [torch.contiguous_format, torch.channels_last]


@pytest.fixture(params=["cpu"] if INTERPRETED else [pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request, monkeypatch):
    for module in (fused, derivatives):
        monkeypatch.setattr(module, "kernels_of", lambda device: triton_block)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield request.param


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def plain_block(x, weight, bias):
    """The block by its definition."""
    n, c, h, w = x.shape
    mean = x.mean(dim=(2, 3), keepdim=True)
    variance = (x - mean).square().mean(dim=(2, 3), keepdim=True)
    u = (x - mean) / (variance + EPS).sqrt() * weight[:, None, None] + bias[:, None, None]
    return u.clamp(min=0)[:, :, : h // 2 * 2, : w // 2 * 2].reshape(n, c, h // 2, 2, w // 2, 2).mean(dim=(3, 5))


def planes(kind, shape):
    x = randn(*shape)
    if kind == "constant":
        return x[:, :, :1, :1].expand(shape).float().double()
    if kind == "outlier":
        x = 0.01 + 0.001 * x
        x[:, :, shape[2] // 2, shape[3] // 2] = 5
    return 2 * x + 3 if kind == "usual" else x


def variables(tensors, device, dtype, layout):
    """Copies of float64 tensors that are to be differentiated."""
    copies = [t.to(device, dtype) for t in tensors]
    return [(t.contiguous(memory_format=layout) if t.dim() == 4 else t).requires_grad_() for t in copies]


def assert_near(ours, theirs, tolerance):
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        assert (a.cpu().double() - b).norm() <= tolerance * b.norm() + 1e-30


def check_block(tensors, device, dtype, layout, tolerance):
    ours, theirs = variables(tensors, device, dtype, layout), variables(tensors, "cpu", torch.float64, LAYOUTS[0])
    out, expected = Block.apply(EPS, *ours), plain_block(*theirs)
    cotangent = randn(*expected.shape, seed=3)
    gradients = torch.autograd.grad(out, ours, cotangent.to(out))
    assert all(t.is_contiguous(memory_format=layout) for t in (out, gradients[0]) if t.numel())
    assert_near([out, *gradients], [expected, *torch.autograd.grad(expected, theirs, cotangent)], tolerance)


def check_dual_block(tensors, along, device, dtype, layout, tolerance):
    dx, dweight, dbias = along
    x, weight, bias = tensors
    ours = variables([x, dx, weight, bias], device, dtype, layout)
    theirs = variables([x, dx, weight, bias], "cpu", torch.float64, LAYOUTS[0])
    outs = DualBlock.apply(EPS, *ours, dweight.to(ours[0]), dbias.to(ours[0]))
    expected = torch.func.jvp(plain_block, (theirs[0], theirs[2], theirs[3]), (theirs[1], dweight, dbias))
    cotangents = [randn(*expected[0].shape, seed=seed) for seed in (6, 7)]
    gradients = torch.autograd.grad(outs, ours, [c.to(ours[0]) for c in cotangents])
    assert all(t.is_contiguous(memory_format=layout) for t in (*outs, *gradients[:2]) if t.numel())
    assert_near([*outs, *gradients], [*expected, *torch.autograd.grad(expected, theirs, cotangents)], tolerance)


def arguments(shape, kind):
    """x, weight and bias, and a direction."""
    point = [planes(kind, shape), randn(shape[1], seed=1), randn(shape[1], seed=2)]
    return point, [randn(*shape, seed=8), randn(shape[1], seed=4), randn(shape[1], seed=5)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "kind, shape",
    [("usual", shape) for shape in SHAPES]
    + [(kind, shape) for kind in ("constant", "outlier") for shape in SHAPES[3:5]],
)
def test_values_and_both_derivatives(device, kind, shape, layout):
    point, along = arguments(shape, kind)
    check_block(point, device, torch.float32, layout, 1e-5)
    check_dual_block(point, along, device, torch.float32, layout, 1e-5)


@pytest.mark.parametrize("shape", SHAPES[:4])
def test_in_float64(device, shape):
    point, along = arguments(shape, "usual")
    check_block(point, device, torch.float64, LAYOUTS[0], 1e-12)
    check_dual_block(point, along, device, torch.float64, LAYOUTS[1], 1e-12)


def test_any_strides_will_do(device):
    x, weight, bias = randn(2, 6, 5, 7), randn(12, seed=1), randn(6, seed=2)
    memory = torch.zeros(1 + x.numel(), dtype=torch.float64)
    memory[1:] = x.flatten()
    expected = plain_block(x, weight[::2], bias)
    for laid_out in (
        memory.to(device)[1:].view(x.shape),
        x.to(device).transpose(0, 3).contiguous().transpose(0, 3),
        x.to(device).repeat_interleave(2, dim=1)[:, ::2],
    ):
        out = Block.apply(EPS, laid_out, weight.to(device)[::2], bias.to(device))
        torch.testing.assert_close(out.cpu(), expected)


@pytest.mark.parametrize("channels, size, last", [(1, (9, 7), True), (3, (32, 32), True), (3, (40, 36), False)])
def test_images_are_convolved_as_patches(device, channels, size, last):
    """The first convolution, its gradients, and how what comes out lies in memory."""
    x, kernel = randn(2, channels, *size).to(device), randn(8, channels, 3, 3).to(device)
    variables, g = [x.requires_grad_(), kernel.requires_grad_()], randn(2, 8, *size, seed=2).to(device)
    ours, theirs = triton_block.convolve(*variables, g[0, :, 0, 0], 1), F.conv2d(*variables, padding=1)
    assert ours.is_contiguous(memory_format=LAYOUTS[last])
    for out in (ours, theirs):
        assert out.shape == g.shape
    for a, b in zip(*([out, *torch.autograd.grad(out, variables, g)] for out in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_maps_are_convolved_without_their_bias(device):
    x, kernel = randn(2, 8, 9, 7).to(device), randn(4, 8, 3, 3).to(device)
    assert torch.equal(triton_block.convolve(x, kernel, kernel[:, 0, 0, 0], 1), F.conv2d(x, kernel, padding=1))


def test_not_a_number_stays_so(device):
    x = torch.ones(1, 2, 4, 4, device=device)
    x[0, 0, 1, 1] = torch.nan
    ones = torch.ones(2, device=device)
    out = Block.apply(EPS, x, ones, ones)
    assert out[0, 0].isnan().all() and (out[0, 1] == 1).all()


@pytest.mark.parametrize(
    "layout, dtype, tolerance",
    [(LAYOUTS[0], torch.float32, 1e-4), (LAYOUTS[1], torch.float32, 1e-4), (LAYOUTS[0], torch.float64, 1e-10)],
)
@pytest.mark.parametrize("name, channels, size", [("ConvNetD3W8", 3, (16, 16)), ("ConvNetD2W8", 1, (14, 11))])
def test_derivatives_of_a_network_equal_autograd(device, name, channels, size, layout, dtype, tolerance):
    module = build(name, channels, 4, size, 0).double()
    plain, model = FlatModel(module), FlatModel(module, "fused")
    assert model.compile == "fused"
    theta = plain.flatten(module)
    theta, lam = theta + 0.1 * randn(*theta.shape), randn(*theta.shape, seed=1)
    x, p = randn(2, channels, *size), randn(2, 4, seed=3)
    there = [t.to(device, dtype) for t in (theta, x, p, lam)]
    there[1] = there[1].contiguous(memory_format=layout)
    ours = [model.logits(*there[:2]), model.grad(*there[:3]), *model.hvp(*there)]
    theirs = [plain.logits(theta, x), plain.grad(theta, x, p), *plain.hvp(theta, x, p, lam)]
    assert_near(ours, theirs, tolerance)


@pytest.fixture
def on_cuda():
    """A model by the kernels, and what it is called with: rows of a path, as matching has them."""
    module = build("ConvNetD3W8", 3, 4, (32, 32), 0)
    model = FlatModel(module, "fused")
    path = torch.stack([model.flatten(module)] * 4).cuda()
    x, p, lam = randn(5, 3, 32, 32).float().cuda(), randn(5, 4).float().cuda(), randn(path.shape[1]).float().cuda()
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield model, path, x, p, lam


@pytest.mark.cuda
def test_a_captured_graph_gives_the_same(on_cuda):
    model, path, x, p, lam = on_cuda
    theta = path[1]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # warm-up
        model.grad(theta, x, p), model.hvp(theta, x, p, lam)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = model.grad(theta, x, p), *model.hvp(theta, x, p, lam)
    theta.add_(0.01)
    x.mul_(0.5)
    expected = model.grad(theta, x, p), *model.hvp(theta, x, p, lam)
    graph.replay()
    assert_near(captured, [tensor.cpu().double() for tensor in expected], 1e-5)


@pytest.mark.cuda
def test_nothing_waits_and_no_row_of_a_path_is_compiled_anew(on_cuda):
    model, path, x, p, lam = on_cuda
    model.hvp(path[0], x, p, lam)
    compiled = triton_block._KERNELS["dual_backward"].device_caches[torch.cuda.current_device()][0]
    before = len(compiled)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for theta in path[1:]:
            model.hvp(theta, x, p, lam)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(compiled) == before > 0


@pytest.fixture
def compiled_for_a_card(monkeypatch, tmp_path):
    """What calls would have compiled on a card, which there need not be: they run nothing."""
    from triton.backends.compiler import GPUTarget

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    card = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=lambda: "a card",
        get_current_stream=lambda device: 0,
    )
    programs = []

    class Warm:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            return lambda *args, **kwargs: programs.append(self.kernel.warmup(*args, grid=grid, **kwargs))

    monkeypatch.setattr(triton.runtime.driver, "_active", card)
    monkeypatch.setattr(triton_block, "_KERNELS", {name: Warm(k) for name, k in triton_block._KERNELS.items()})
    return programs


MAPS, VECTORS = {"backward": 2, "dual_forward": 2, "dual_backward": 4}, {"dual_forward": 4, "dual_backward": 3}


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="nothing is compiled then")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", triton_block._KERNELS)
def test_every_tensor_is_read_once_and_parameters_may_begin_anywhere(compiled_for_a_card, name, layout):
    x = torch.empty(2, 32, 32, 32).contiguous(memory_format=layout)
    rows, theta = torch.empty(2, 32), torch.empty(99)
    maps, vectors = MAPS.get(name, 1), VECTORS.get(name, 2)
    outputs = {"forward": [x], "backward": [x, rows, rows], "dual_forward": [x, x]}.get(name, [x, x, rows, rows])
    for start in (0, 1, 2):
        inputs = [x] * maps + [theta[start : start + 32]] * vectors
        triton_block.call(name, x.shape, EPS, inputs, outputs)
    first, *others = compiled_for_a_card
    assert all(other is first for other in others)
    code = first.asm["ttir"]
    assert (code.count("tt.load "), code.count("tt.store ")) == (maps + vectors, len(outputs))


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="this runs there")
def test_all_this_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-p", "no:xdist", "-p", "no:cacheprovider", __file__]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    root = Path(__file__).parents[1]
    result = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-5000:]
    assert "passed" in result.stdout
