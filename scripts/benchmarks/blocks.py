#!/usr/bin/env python
"""A block of a ConvNet without its convolution: our kernels against torch's operations, on the CPU or on CUDA.

    .venv/bin/python scripts/benchmarks/blocks.py --device cuda

A pass is the value, or the value and its gradients; of the block, or of the pair of it and its derivative along a
direction ("dual"). On CUDA the calls are replayed as one graph, so that times are the device's. GB/s: what the kernels
have to read and write at least, by the time they took; compare with the memory's bandwidth.
"""

from collections.abc import Callable, Sequence

from common import Competitor, arguments, describe_machine, difference, race

import torch
import torch.nn.functional as F
from torch import Tensor

from pad.nn.fused import Block, DualBlock
from pad.rng import generator
from pad.show.tables import result_table

Call = Callable[[], list[Tensor]]

EPS = 1e-5  # torch's
LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
MAPS = {"value": 1.25, "and gradients": 3.5, "dual value": 2.5, "dual and gradients": 7.0}  # read and written


def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.avg_pool2d(F.relu(F.group_norm(x, len(weight), weight, bias, EPS)), 2)


def passes(shape: Sequence[int], layout: torch.memory_format, device: str) -> dict[str, list[Call]]:
    """What is to be timed for a block of ``x [N, C, H, W]``: of each pass torch's operations and our kernels."""
    rng = generator(0, "benchmark")
    x, dx = (torch.randn(shape, generator=rng).to(device).contiguous(memory_format=layout) for _ in range(2))
    weight, bias, dweight, dbias = torch.randn(4, shape[1], generator=rng).to(device)
    ones = torch.ones_like(F.avg_pool2d(x, 2))
    variables = [tensor.requires_grad_() for tensor in (x, weight, bias, dx)]

    def dual(x: Tensor, weight: Tensor, bias: Tensor, dx: Tensor) -> tuple[Tensor, Tensor]:
        return torch.func.jvp(plain, (x, weight, bias), (dx, dweight, dbias))

    norm = weight, bias, dweight, dbias
    values = [
        lambda: [plain(*variables[:3])],
        lambda: [Block.apply(EPS, *variables[:3])],
        lambda: list(dual(*variables)),
        lambda: list(DualBlock.apply(EPS, x, dx, *norm)),
    ]

    def differentiated(value: Call, of: list[Tensor]) -> Call:
        def run() -> list[Tensor]:
            outs = value()
            return list(torch.autograd.grad(outs, of, [ones] * len(outs)))

        return run

    gradients = [differentiated(value, of) for value, of in zip(values, (*[variables[:3]] * 2, *[variables] * 2))]
    return dict(zip(MAPS, (values[:2], gradients[:2], values[2:], gradients[2:])))


def repeated(call: Call, times: int, device: str) -> Call:
    """``times`` calls one after the other, waited for."""
    if device == "cpu":
        return lambda: [call() for _ in range(times)][-1]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(times):
            result = call()

    def run() -> list[Tensor]:
        graph.replay()
        torch.cuda.synchronize()
        return result

    return run


def main(command_line: list[str] | None = None) -> None:
    parser = arguments(__doc__)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--sides", type=int, nargs="+", default=[32, 16, 8], help="pixels")
    parser.add_argument("--times", type=int, default=20, help="calls in a row, of which the mean is taken")
    args = parser.parse_args(command_line)
    if args.tiny:
        args.width, args.images, args.sides, args.times, args.rounds = 8, 2, [5, 4], 1, 1
    print(describe_machine())
    rows = []
    for side in args.sides:
        shape = args.images, args.width, side, side
        for name, layout in LAYOUTS.items():
            for kind, calls in passes(shape, layout, args.device).items():
                pair = [Competitor("", repeated(call, args.times, args.device)) for call in calls]
                torch_s, ours_s = (c.median / args.times for c in race(pair, args.rounds))
                size = 4 * MAPS[kind] * args.images * args.width * side**2
                row = {
                    "side": side,
                    "layout": name,
                    "pass": kind,
                    "torch us": 1e6 * torch_s,
                    "kernels us": 1e6 * ours_s,
                }
                off = max(difference(a, b) for a, b in zip(pair[1].result, pair[0].result, strict=True))
                rows.append(row | {"times faster": torch_s / ours_s, "GB/s": size / ours_s / 1e9, "difference": off})
    print(result_table(rows, list(rows[0])))


if __name__ == "__main__":
    main()
