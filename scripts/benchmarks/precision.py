#!/usr/bin/env python
"""What float32 costs a block of a ConvNet, on planes that lose digits: our CPU kernels beside torch's operations.

    .venv/bin/python scripts/benchmarks/precision.py

Relative errors against the block's definition in float64: the largest over the sides, and over all that a pass gives.
The Hessian pass gives the block's derivative along a direction, and the gradients of both. A norm below 1e-6 counts as
1e-6. "at": the side, in pixels, where the kernels are worst. Windows where rounding may decide whether a pixel passes
ReLU are left out.
"""

import argparse
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from common import describe_machine

import torch
import torch.nn.functional as F
from blocks import EPS, plain
from torch import Tensor

from pad.nn import kernels
from pad.nn.fused import Block, DualBlock
from pad.rng import generator
from pad.show.tables import result_table

SIDES = (8, 9, 16, 33, 64, 127, 128)
CHANNELS = 8


def randn(name: str, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=generator(0, "benchmark", name))


def noise(side: int) -> Tensor:
    return randn("x", 1, CHANNELS, side, side)


def bright(pixels: int | slice, side: int) -> Tensor:
    """Dark planes with some bright pixels."""
    x = 0.01 * noise(side)
    x.flatten(2)[:, :, pixels] = 5
    return x


PLANES: dict[str, Callable[[int], Tensor]] = {  # whose mean or variance is easily lost
    "noise": noise,
    "bright first pixel": lambda side: bright(0, side),
    "bright middle pixel": lambda side: bright(side * side // 2 + side // 2, side),
    "bright last pixel": lambda side: bright(-1, side),
    "every eighth pixel bright": lambda side: bright(slice(None, None, 8), side),
    "two levels": lambda side: 0.3 + 0.1 * (noise(side) > 0),
    "constant": lambda side: torch.full_like(noise(side), 0.3),
    "constant and large": lambda side: torch.full_like(noise(side), 1e8),
    "offset of 1e3": lambda side: noise(side) + 1e3,
    "offset of 1e6": lambda side: noise(side) + 1e6,
    "denormal": lambda side: 1e-40 * noise(side),
    "huge": lambda side: 1e15 * noise(side),
}


class Form(NamedTuple):
    """A way to compute the block."""

    value: Callable[..., Sequence[Tensor]]  # of (x, weight, bias): its output, alone
    along: Callable[..., Sequence[Tensor]]  # of (x, dx, weight, bias, dweight, dbias): output and derivative


def form_of(block: Callable[..., Tensor]) -> Form:
    def along(x: Tensor, dx: Tensor, weight: Tensor, bias: Tensor, *dnorm: Tensor) -> Sequence[Tensor]:
        return torch.func.jvp(block, (x, weight, bias), (dx, *dnorm))

    return Form(lambda *point: [block(*point)], along)


def definition(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    mean = x.mean(dim=(2, 3), keepdim=True)
    variance = (x - mean).square().mean(dim=(2, 3), keepdim=True)
    u = (x - mean) / (variance + EPS).sqrt() * weight[:, None, None] + bias[:, None, None]
    return F.avg_pool2d(u.clamp(min=0), 2)


KERNELS = Form(lambda *point: [Block.apply(EPS, *point)], lambda *tensors: DualBlock.apply(EPS, *tensors))
TORCH = form_of(plain)
EXACT = form_of(definition)


def cotangents_where_relu_is_certain(x: Tensor, weight: Tensor, bias: Tensor) -> list[Tensor]:
    """Two, float32; zero for windows where rounding may decide whether a pixel passes ReLU."""
    variance, mean = torch.var_mean(x.double(), dim=(2, 3), correction=0, keepdim=True)
    u = (x - mean) / (variance + EPS).sqrt() * weight[:, None, None] + bias[:, None, None]
    certain = -F.max_pool2d(-u.abs(), 2) > 1e-3
    return [randn(f"cotangent {i}", *certain.shape).float() * certain for i in range(2)]


def values_and_gradients(
    function: Callable[..., Sequence[Tensor]],
    variables: Sequence[Tensor],
    fixed: Sequence[Tensor],
    cotangents: Sequence[Tensor],
) -> list[Tensor]:
    """What ``function(*variables, *fixed)`` gives where the cotangents are not zero, and the gradients by variable."""
    variables = [tensor.clone().requires_grad_() for tensor in variables]
    outs = function(*variables, *fixed)
    gradients = torch.autograd.grad(outs, variables, cotangents)
    return [*((out * (cotangent != 0)).detach() for out, cotangent in zip(outs, cotangents)), *gradients]


def errors(ours: Sequence[Tensor], exact: Sequence[Tensor]) -> list[float]:
    ratios = [(a - b).norm() / b.norm().clamp(min=1e-6) for a, b in zip(ours, exact, strict=True)]
    return [math.inf if ratio.isnan() else ratio.item() for ratio in ratios]  # else max would pass over it


def errors_at(plane: str, side: int, form: Form, dtype: torch.dtype = torch.float32) -> dict[str, list[float]]:
    """By pass: the relative errors of what it gives. What it is given are numbers of float32, whatever the type."""
    x, dx = PLANES[plane](side).float(), randn("dx", 1, CHANNELS, side, side).float()
    weight, bias, *dnorm = (randn(f"norm {i}", CHANNELS).float() for i in range(4))
    weight = 1 + weight / 5
    cotangents = cotangents_where_relu_is_certain(x, weight, bias)

    def of(form: Form, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
        point, fixed, along = ([tensor.to(dtype) for tensor in part] for part in ((x, weight, bias), dnorm, cotangents))
        first = values_and_gradients(form.value, point, [], along[:1])
        return first, values_and_gradients(form.along, [point[0], dx.to(dtype), *point[1:]], fixed, along)

    gradient, hessian = map(errors, of(form, dtype), of(EXACT, torch.float64))
    return {"value": gradient[:1], "gradients": gradient[1:], "Hessian pass": hessian}


def main(command_line: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", type=int, nargs="+", default=SIDES, help="pixels")
    parser.add_argument("--tiny", action="store_true", help="two small sides, to see that it runs")
    args = parser.parse_args(command_line)
    if kernels.library() is None:
        parser.exit(1, "the kernels cannot be built here\n")
    print(describe_machine())
    rows = []
    for plane in PLANES:
        theirs, ours, doubles = (
            {side: errors_at(plane, side, form, dtype) for side in (SIDES[:2] if args.tiny else args.sides)}
            for form, dtype in ((TORCH, torch.float32), (KERNELS, torch.float32), (KERNELS, torch.float64))
        )
        for name in ("value", "gradients", "Hessian pass"):
            (torch_off, _), (off, at), (double_off, _) = (
                max((max(found[name]), side) for side, found in each.items()) for each in (theirs, ours, doubles)
            )
            row = {"plane": plane, "pass": name, "torch": torch_off, "kernels": off, "at": at}
            rows.append(row | {"kernels, float64": double_off})
    print(result_table(rows, list(rows[0])))


if __name__ == "__main__":
    main()
