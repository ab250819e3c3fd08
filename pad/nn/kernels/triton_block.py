"""The same in Triton, for CUDA: instance normalisation, ReLU and 2 x 2 average pooling in one kernel each way.

The formulas are those of block.cpp, where they are derived; see there for the names. A program takes a few channels of
one image, and of them all pixels, four to a window of pooling: a tile [channels, windows, 4]. A plane that fits into a
tile stays in registers from its mean to what is written, since the compiler makes one load of equal ones with no store
between them; a larger one goes through tile by tile, once for each loop below, and comes from the cache again.

Memory that is read and written, in feature maps of the block's input (pooled ones are a quarter): forward 1.25,
backward 2.25, dual_forward 2.5, dual_backward 4.5. That is the least, as long as planes fit. Sums over a batch are left
to the caller: there are no atomic additions, so results repeat bit for bit.

A kernel is compiled once (a second or so) for each shape but for the number of images, each layout and type of numbers.
With TRITON_INTERPRET=1 the kernels run on a CPU, slowly, to be tested.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

_TILE = 2**16  # bytes of a tile at most: a quarter of a multiprocessor's registers, since a kernel holds two of them
_LEAST = 2**10  # numbers of a tile at least, where there are channels enough
_RUN = 32  # bytes of neighbouring channels at least, channels-last: as many as memory is read by
_PER_WARP = 2**9  # numbers
_FEW = 4  # channels at most of what is convolved as a product of patches
_PLANE = 32 * 32  # pixels at most of maps that lie channels-last


class _Plan(NamedTuple):
    """What a kernel is compiled for."""

    channels: int
    height: int
    width: int
    eps: float
    last: bool  # maps are [N, H, W, C] in memory, else [N, C, H, W]
    tile_channels: int  # powers of two
    tile_windows: int


def convolves(channels: int) -> bool:
    """No: the first convolution is a product of matrices, see :func:`convolve`."""
    return False


def convolve(x: Tensor, kernel: Tensor, bias: Tensor, padding: int) -> Tensor:
    """The convolution up to a constant of each plane, which the norm takes away: without its bias.

    Adding a bias is a pass over memory of its own on CUDA, and its gradient, which is zero, another. That of images, of
    a few channels, is a product of their patches with the kernel: cuDNN has no tensor cores for its weight gradient.
    What comes out lies channels-last, as tensor cores take it, where the block's kernels hold such a plane in a tile.
    """
    if x.shape[1] > _FEW:
        return F.conv2d(x, kernel, padding=padding)
    patches, weight = F.unfold(x, kernel.shape[2:], padding=padding), kernel.flatten(1)
    height, width = (side + 2 * padding - of + 1 for side, of in zip(x.shape[2:], kernel.shape[2:]))
    if height * width > _PLANE:
        return (weight @ patches).unflatten(2, (height, width))
    return (patches.transpose(1, 2) @ weight.t()).unflatten(1, (height, width)).permute(0, 3, 1, 2)


def layout(x: Tensor) -> torch.memory_format:
    """How maps that belong to ``x [N, C, H, W]`` lie in memory: as x does."""
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def call(name: str, shape: tuple[int, ...], eps: float, inputs: list[Tensor], outputs: list[Tensor]) -> None:
    """Run a kernel for ``shape = (N, C, H, W)`` on dense tensors of one layout and type, float32 or float64.

    Nothing waits for the device and nothing is allocated, so that calls can be captured in a CUDA graph.
    """
    dtype = inputs[0].dtype
    if dtype not in (torch.float32, torch.float64) or any(tensor.dtype != dtype for tensor in inputs):
        raise ValueError("the kernels are for tensors that are all of them float32 or all float64")
    last = not all(tensor.is_contiguous() for tensor in inputs)
    plan, warps = _planned(shape, eps, last, dtype.itemsize)
    grid = shape[0], triton.cdiv(plan.channels, plan.tile_channels)
    with torch.cuda.device_of(inputs[0]):
        _KERNELS[name][grid](*inputs, *outputs, plan, num_warps=warps)


def _planned(shape: tuple[int, ...], eps: float, last: bool, itemsize: int) -> tuple[_Plan, int]:
    """What to compile for, and the warps of a program."""
    _, channels, height, width = shape
    windows = triton.next_power_of_2(-(-height // 2) * -(-width // 2))
    wanted = max(_RUN // itemsize if last else 1, _LEAST // (4 * windows))
    tile_channels = min(triton.next_power_of_2(channels), wanted)
    most = _TILE // (4 * itemsize * tile_channels)
    tile_windows = windows if windows <= most else most // 4  # nothing is kept: small tiles need few registers
    warps = min(16, max(1, 4 * tile_channels * tile_windows // _PER_WARP))
    tile = {"tile_channels": tile_channels, "tile_windows": tile_windows}
    return _Plan(channels, height, width, eps, last, **tile), warps


# These are parts of a parameter vector and may begin anywhere: not a reason to compile anew.
_kernel = triton.jit(do_not_specialize_on_alignment=["weight", "dweight", "bias", "dbias"])


# ---- where numbers lie


@triton.jit
def _channels(P: tl.constexpr):
    """This program's channels."""
    return (tl.program_id(1) * P.tile_channels + tl.arange(0, P.tile_channels))[:, None, None]


@triton.jit
def _vector(vector, P: tl.constexpr):
    """What ``vector [C]`` says of this program's channels."""
    channels = _channels(P)
    return tl.load(vector + channels, mask=channels < P.channels, other=0.0)


@triton.jit
def _put(rows, value, P: tl.constexpr):
    """Writes what belongs to this program's image and channels into ``rows [N, C]``."""
    channels = _channels(P)
    tl.store(rows + tl.program_id(0) * P.channels + channels, value, mask=channels < P.channels)


@triton.jit
def _pointers(of_map, channels, row, column, SHARE: tl.constexpr, P: tl.constexpr):
    """To pixels of this program's image in a map ``[N, C, H // SHARE, W // SHARE]``."""
    height: tl.constexpr = P.height // SHARE
    width: tl.constexpr = P.width // SHARE
    image = of_map + tl.program_id(0).to(tl.int64) * (P.channels * height * width)
    pixel = row * width + column
    if P.last:
        return image + (pixel * P.channels + channels)
    else:
        return image + (channels * (height * width) + pixel)


@triton.jit
def _pixels(of_map, start, P: tl.constexpr):
    """Pointers to the pixels of a tile, ``[channels, windows, 4]``, and which of them there are."""
    across: tl.constexpr = (P.width + 1) // 2
    channels = _channels(P)
    windows = (start + tl.arange(0, P.tile_windows))[None, :, None]
    corners = tl.arange(0, 4)[None, None, :]
    row = windows // across * 2 + corners // 2
    column = windows % across * 2 + corners % 2
    there = (channels < P.channels) & (row < P.height) & (column < P.width)
    return _pointers(of_map, channels, row, column, 1, P), there


@triton.jit
def _pooled(of_map, start, P: tl.constexpr):
    """Pointers to the pooled values of a tile's windows, ``[channels, windows, 1]``, and which of them there are."""
    across: tl.constexpr = (P.width + 1) // 2
    channels = _channels(P)
    windows = (start + tl.arange(0, P.tile_windows))[None, :, None]
    row = windows // across
    column = windows % across
    there = (channels < P.channels) & (row < P.height // 2) & (column < P.width // 2)
    return _pointers(of_map, channels, row, column, 2, P), there


@triton.jit
def _read(of_map, start, P: tl.constexpr):
    """A tile; zeros where there is no pixel."""
    pointers, there = _pixels(of_map, start, P)
    return tl.load(pointers, mask=there, other=0.0)


@triton.jit
def _write(of_map, start, tile, P: tl.constexpr):
    pointers, there = _pixels(of_map, start, P)
    tl.store(pointers, tile, mask=there)


@triton.jit
def _pool(of_map, start, tile, P: tl.constexpr):
    """Writes a tile's pooled values."""
    pointers, there = _pooled(of_map, start, P)
    tl.store(pointers, tl.sum(tile, 2, keep_dims=True) / 4, mask=there)


@triton.jit
def _spread(of_map, start, P: tl.constexpr):
    """The gradient in a tile, before the ReLU, of that in its pooled values: zeros where nothing was pooled."""
    pointers, there = _pooled(of_map, start, P)
    return tl.load(pointers, mask=there, other=0.0) / 4


# ---- what is computed


@triton.jit
def _windows(P: tl.constexpr):
    """How many windows a plane has, with those at an odd edge that are not pooled."""
    return ((P.height + 1) // 2) * ((P.width + 1) // 2)


@triton.jit
def _nothing(of_map, P: tl.constexpr):
    """Zero for each channel, where a sum begins."""
    channels: tl.constexpr = P.tile_channels
    return tl.zeros([channels, 1, 1], of_map.dtype.element_ty)


@triton.jit
def _sum(tile):
    return tl.sum(tl.sum(tile, 2, keep_dims=True), 1, keep_dims=True)


@triton.jit
def _moments(x, P: tl.constexpr):
    """Of each channel the mean, and r = 1 / sqrt(variance + eps).

    What rounding leaves of the mean is found beside the variance, and taken away from both.
    """
    n: tl.constexpr = P.height * P.width
    total = _nothing(x, P)
    for start in range(0, _windows(P), P.tile_windows):
        total += _sum(_read(x, start, P))
    mean = total / n
    rest, squares = _nothing(x, P), _nothing(x, P)
    for start in range(0, _windows(P), P.tile_windows):
        pointers, there = _pixels(x, start, P)
        centred = tl.where(there, tl.load(pointers, mask=there, other=0.0) - mean, 0.0)
        rest += _sum(centred)
        squares += _sum(centred * centred)
    rest /= n
    return mean + rest, 1 / tl.sqrt(squares / n - rest * rest + P.eps)


@_kernel
def _forward(x, weight, bias, out, P: tl.constexpr):
    mean, r = _moments(x, P)
    w, b = _vector(weight, P), _vector(bias, P)
    for start in range(0, _windows(P), P.tile_windows):
        u = w * ((_read(x, start, P) - mean) * r) + b
        _pool(out, start, tl.where(u <= 0, 0.0, u), P)  # not a number stays so


@_kernel
def _backward(grad, x, weight, bias, grad_x, grad_weight, grad_bias, P: tl.constexpr):
    n: tl.constexpr = P.height * P.width
    mean, r = _moments(x, P)
    w, b = _vector(weight, P), _vector(bias, P)
    sum_v, sum_zv = _nothing(x, P), _nothing(x, P)
    for start in range(0, _windows(P), P.tile_windows):
        z = (_read(x, start, P) - mean) * r
        v = tl.where(w * z + b > 0, _spread(grad, start, P), 0.0)
        sum_v += _sum(v)
        sum_zv += _sum(z * v)
    for start in range(0, _windows(P), P.tile_windows):
        z = (_read(x, start, P) - mean) * r
        v = tl.where(w * z + b > 0, _spread(grad, start, P), 0.0)
        _write(grad_x, start, w * r * (v - sum_v / n - z * (sum_zv / n)), P)
    _put(grad_weight, sum_zv, P)
    _put(grad_bias, sum_v, P)


@_kernel
def _dual_forward(x, dx, weight, dweight, bias, dbias, out, dout, P: tl.constexpr):
    n: tl.constexpr = P.height * P.width
    mean, r = _moments(x, P)
    w, dw, b, db = _vector(weight, P), _vector(dweight, P), _vector(bias, P), _vector(dbias, P)
    sum_x, sum_zx = _nothing(x, P), _nothing(x, P)
    for start in range(0, _windows(P), P.tile_windows):
        z = (_read(x, start, P) - mean) * r
        along = _read(dx, start, P)
        sum_x += _sum(along)
        sum_zx += _sum(z * along)
    scale = w * r
    of_z = dw - scale * (sum_zx / n)
    shift = db - scale * (sum_x / n)
    for start in range(0, _windows(P), P.tile_windows):
        z = (_read(x, start, P) - mean) * r
        u = w * z + b
        du = scale * _read(dx, start, P) + of_z * z + shift
        _pool(out, start, tl.where(u <= 0, 0.0, u), P)
        _pool(dout, start, tl.where(u > 0, du, 0.0), P)


@_kernel
def _dual_backward(grad, dgrad, x, dx, weight, dweight, bias, grad_x, grad_dx, grad_weight, grad_bias, P: tl.constexpr):
    n: tl.constexpr = P.height * P.width
    mean, r = _moments(x, P)
    w, dw, b = _vector(weight, P), _vector(dweight, P), _vector(bias, P)
    sum_x, sum_zx = _nothing(x, P), _nothing(x, P)
    sum_v, sum_zv = _nothing(x, P), _nothing(x, P)
    sum_d, sum_zd, sum_xd = _nothing(x, P), _nothing(x, P), _nothing(x, P)
    for start in range(0, _windows(P), P.tile_windows):
        z = (_read(x, start, P) - mean) * r
        along = _read(dx, start, P)
        v = tl.where(w * z + b > 0, _spread(grad, start, P), 0.0)
        dv = tl.where(w * z + b > 0, _spread(dgrad, start, P), 0.0)
        sum_x += _sum(along)
        sum_zx += _sum(z * along)
        sum_v += _sum(v)
        sum_zv += _sum(z * v)
        sum_d += _sum(dv)
        sum_zd += _sum(z * dv)
        sum_xd += _sum(along * dv)
    with_dz = r * (sum_xd - sum_x / n * sum_d - sum_zx / n * sum_zd)  # <dv, z'>
    mean_a, mean_za = w * sum_d / n, w * sum_zd / n
    of_dv = dw - r * (sum_zx / n) * w
    of_x = -r * mean_za
    mean_k = (w * sum_v + of_dv * sum_d + of_x * sum_x) / n
    slope = (w * sum_zv + of_dv * sum_zd + of_x * sum_zx + w * with_dz) / n
    for start in range(0, _windows(P), P.tile_windows):
        z = (_read(x, start, P) - mean) * r
        v = tl.where(w * z + b > 0, _spread(grad, start, P), 0.0)
        dv = tl.where(w * z + b > 0, _spread(dgrad, start, P), 0.0)
        k = w * v + of_dv * dv + of_x * _read(dx, start, P)
        _write(grad_x, start, r * (k - mean_k - slope * z), P)
        _write(grad_dx, start, r * (w * dv - mean_a - mean_za * z), P)
    _put(grad_weight, sum_zv + with_dz, P)
    _put(grad_bias, sum_v, P)


_KERNELS = {"forward": _forward, "backward": _backward, "dual_forward": _dual_forward, "dual_backward": _dual_backward}
