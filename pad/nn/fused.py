"""ConvNets on a CPU with each block's normalisation, ReLU and pooling in one kernel (:mod:`pad.kernels`).

Run one after the other these three read and write every feature map a dozen times; a training step of a narrow ConvNet
spends more time on that than on its convolutions. The kernels have first derivatives only, so the derivative along a
direction is written out here, as a network of pairs (value, derivative), which autograd differentiates once: second
derivatives without a second pass backwards.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pad.nn import kernels
from pad.nn.networks import InstanceNorm, Network

_LANES = 8  # the kernels work on as many channels at a time


class _Block(torch.autograd.Function):
    """pool(relu(norm(x))) for x ``[N, C, H, W]``, weight and bias ``[C]`` of the norm."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        x, weight, bias = _dense(x), weight.contiguous(), bias.contiguous()
        out = _pooled(x, x.shape)
        kernels.call("forward", x.shape, eps, [x, weight, bias], [out])
        ctx.save_for_backward(x, weight, bias)
        ctx.eps = eps
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight, bias = ctx.saved_tensors
        grad_x, grad_weight, grad_bias = torch.empty_like(x), *x.new_empty(2, *x.shape[:2])
        kernels.call("backward", x.shape, ctx.eps, [_dense(grad), x, weight, bias], [grad_x, grad_weight, grad_bias])
        return grad_x, grad_weight.sum(0), grad_bias.sum(0), None


class _FirstBlock(torch.autograd.Function):
    """The block of the convolution of images ``[N, 1 or 3, H, W]``, which need no gradient, by a kernel ``[C, 1 or 3, 3, 3]``.

    The norm takes the convolution's bias away, so that ``shift`` is not looked at and has gradient zero.
    """

    @staticmethod
    def forward(ctx, images, kernel, shift, weight, bias, padding: int, eps: float) -> Tensor:
        images, kernel, weight, bias = _padded(images, padding), _across(kernel), weight.contiguous(), bias.contiguous()
        ctx.shape, ctx.eps = _convolved(images, kernel), eps
        out = _pooled(images, ctx.shape)
        kernels.call(f"first{images.shape[1]}_forward", ctx.shape, eps, [images, kernel, weight, bias], [out])
        ctx.save_for_backward(images, kernel, weight, bias)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        images, kernel, weight, bias = ctx.saved_tensors
        name, n = f"first{images.shape[1]}_backward", len(images)
        grad_kernel, (grad_weight, grad_bias) = kernel.new_empty(n, *kernel.shape), weight.new_empty(2, n, len(weight))
        inputs = [_dense(grad), images, kernel, weight, bias]
        kernels.call(name, ctx.shape, ctx.eps, inputs, [grad_kernel, grad_weight, grad_bias])
        grad_kernel = grad_kernel.sum(0).permute(3, 2, 0, 1)
        return None, grad_kernel, torch.zeros_like(bias), grad_weight.sum(0), grad_bias.sum(0), None, None


class _DualBlock(torch.autograd.Function):
    """A block's value and derivative along (dx, dweight, dbias), of which only dx counts as a variable."""

    @staticmethod
    def forward(ctx, x, dx, weight, dweight, bias, dbias, eps: float) -> tuple[Tensor, Tensor]:
        x, dx = _dense(x), _dense(dx)
        vectors = weight, dweight, bias, dbias = [v.contiguous() for v in (weight, dweight, bias, dbias)]
        out, dout = _pooled(x, x.shape), _pooled(x, x.shape)
        kernels.call("dual_forward", x.shape, eps, [x, dx, *vectors], [out, dout])
        ctx.save_for_backward(x, dx, weight, dweight, bias)
        ctx.eps = eps
        return out, dout

    @staticmethod
    def backward(ctx, grad: Tensor, dgrad: Tensor):
        x, *others = ctx.saved_tensors
        grad_x, grad_dx = torch.empty_like(x), torch.empty_like(x)
        grad_weight, grad_bias = x.new_empty(2, *x.shape[:2])
        inputs = [_dense(grad), _dense(dgrad), x, *others]
        kernels.call("dual_backward", x.shape, ctx.eps, inputs, [grad_x, grad_dx, grad_weight, grad_bias])
        return grad_x, grad_dx, grad_weight.sum(0), None, grad_bias.sum(0), None, None


class _FirstDualBlock(torch.autograd.Function):
    """The same for the first block, from its images, which do not move, and its convolution."""

    @staticmethod
    def forward(ctx, images, kernel, dkernel, weight, dweight, bias, dbias, padding: int, eps: float):
        images, kernel, dkernel = _padded(images, padding), _across(kernel), _across(dkernel)
        vectors = weight, dweight, bias, dbias = [v.contiguous() for v in (weight, dweight, bias, dbias)]
        ctx.shape, ctx.padding, ctx.eps = _convolved(images, kernel), padding, eps
        outs = _pooled(images, ctx.shape), _pooled(images, ctx.shape)
        name = f"first{images.shape[1]}_dual_forward"
        kernels.call(name, ctx.shape, eps, [images, kernel, dkernel, *vectors], list(outs))
        ctx.save_for_backward(images, kernel, dkernel, weight, dweight, bias)
        return outs

    @staticmethod
    def backward(ctx, grad: Tensor, dgrad: Tensor):
        images, kernel, dkernel, *vectors = ctx.saved_tensors
        n, c, height, width = ctx.shape
        inputs = [_dense(grad), _dense(dgrad), images, kernel, dkernel, *vectors]
        grads, grad_kernel = images.new_empty(n * height * width, 2 * c), kernel.new_empty(n, *kernel.shape)
        grad_weight, grad_bias = images.new_empty(2, n, c)
        name = f"first{images.shape[1]}_dual_backward"
        kernels.call(name, ctx.shape, ctx.eps, inputs, [grads, grad_kernel, grad_weight, grad_bias])
        patches = grads @ torch.cat([kernel, dkernel], dim=3).view(-1, 2 * c).t()
        grad_images = torch.zeros_like(images)
        kernels.call("fold", (n, images.shape[1], height, width), 0.0, [patches], [grad_images])
        inside = slice(ctx.padding, -ctx.padding)
        return (
            grad_images[:, :, inside, inside],
            grad_kernel.sum(0).permute(3, 2, 0, 1),
            None,
            grad_weight.sum(0),
            None,
            grad_bias.sum(0),
            None,
            None,
            None,
        )


class FusedConvNet:
    """A network of :mod:`pad.networks` made of blocks (convolution, InstanceNorm, ReLU, 2 x 2 AvgPool) and a classifier."""

    def __init__(self, module: nn.Module):
        self._blocks = [(block[0].padding[0], block[1].eps) for block in module.body]

    @staticmethod
    def fits(module: nn.Module) -> bool:
        """Whether the network is made of such blocks."""

        def block(child: nn.Module) -> bool:
            kinds = [type(part) for part in child.children()]
            return (
                kinds == [nn.Conv2d, InstanceNorm, nn.ReLU, nn.AvgPool2d]
                and child[0].out_channels % _LANES == 0
                and (child[0].kernel_size, child[0].stride, child[0].dilation, child[0].groups)
                == ((3, 3), (1, 1), (1, 1), 1)
                and child[0].padding[0] == child[0].padding[1] > 0
                and child[0].bias is not None
                and (child[3].kernel_size, child[3].stride, child[3].padding) == (2, 2, 0)
            )

        body = getattr(module, "body", None)
        return body is not None and all(isinstance(child, nn.Sequential) and block(child) for child in body)

    def __call__(self, parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        """Logits ``[N, K]`` of ``x [N, C, H, W]``."""
        return F.linear(self.blocks(parameters, x)[-1].flatten(1), *_layer(parameters, "classifier"))

    def blocks(self, parameters: dict[str, Tensor], x: Tensor) -> list[Tensor]:
        """The outputs of all blocks, shallow to deep."""
        outputs = []
        for i, (padding, eps) in enumerate(self._blocks):
            (w, b), norm = _layer(parameters, f"body.{i}.0"), _layer(parameters, f"body.{i}.1")
            if i == 0 and _few_channels(x) and not x.requires_grad:
                x = _FirstBlock.apply(x, w, b, *norm, padding, eps)
            else:
                x = _Block.apply(F.conv2d(_dense(x), w, b, padding=padding), *norm, eps)
            outputs.append(x)
        return outputs

    def dual(self, parameters: dict[str, Tensor], along: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits ``[N, K]`` and their derivative along ``along``, differentiable in the parameters and in x."""
        dx = None  # the images do not move
        for i, (padding, eps) in enumerate(self._blocks):
            (k, c), (dk, dc) = _layer(parameters, f"body.{i}.0"), _layer(along, f"body.{i}.0")
            (w, b), (dw, db) = _layer(parameters, f"body.{i}.1"), _layer(along, f"body.{i}.1")
            if i == 0 and _few_channels(x):
                x, dx = _FirstDualBlock.apply(x, k, dk, w, dw, b, db, padding, eps)
                continue
            x = _dense(x)
            y, dy = F.conv2d(x, k, c, padding=padding), F.conv2d(x, dk, dc, padding=padding)
            if dx is not None:
                dy = dy + F.conv2d(dx, k, padding=padding)
            x, dx = _DualBlock.apply(y, dy, w, dw, b, db, eps)
        (w, b), (dw, db) = _layer(parameters, "classifier"), _layer(along, "classifier")
        h, dh = x.flatten(1), dx.flatten(1)
        return F.linear(h, w, b), F.linear(dh, w) + F.linear(h, dw, db)


def forward_of(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """What ``module``'s forward computes, with the kernels where it is made of such blocks and lies on a CPU."""
    network = _fused(module)
    return module if network is None else partial(network, dict(module.named_parameters()))


def blocks_of(module: Network) -> Callable[[Tensor], list[Tensor]]:
    """The same of ``module.blocks``."""
    network = _fused(module)
    return module.blocks if network is None else partial(network.blocks, dict(module.named_parameters()))


def _fused(module: nn.Module) -> FusedConvNet | None:
    on_cpu = all(parameter.is_cpu for parameter in module.parameters())
    return FusedConvNet(module) if on_cpu and FusedConvNet.fits(module) and kernels.library() is not None else None


def _layer(parameters: dict[str, Tensor], name: str) -> tuple[Tensor, Tensor]:
    return parameters[f"{name}.weight"], parameters[f"{name}.bias"]


def _dense(x: Tensor) -> Tensor:
    """``x [N, C, H, W]`` dense and channels-last in its strides too, also where one channel leaves them ambiguous."""
    n, c, h, w = x.shape
    return x.permute(0, 2, 3, 1).contiguous().view(-1).view(n, h, w, c).permute(0, 3, 1, 2)


def _pooled(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    n, c, h, w = shape
    return like.new_empty(n, h // 2, w // 2, c).permute(0, 3, 1, 2)


def _few_channels(images: Tensor) -> bool:
    """Whether there are kernels for a first convolution of these."""
    return images.shape[1] in (1, 3)


def _padded(images: Tensor, padding: int) -> Tensor:
    return _dense(F.pad(images, (padding,) * 4))


def _across(kernel: Tensor) -> Tensor:
    """``[C, B, 3, 3]`` as ``[3, 3, B, C]``."""
    return kernel.permute(2, 3, 1, 0).contiguous()


def _convolved(padded: Tensor, kernel: Tensor) -> tuple[int, ...]:
    """The shape ``(N, C, H, W)`` of the convolution of padded images with such a kernel."""
    if padded.shape[1] != kernel.shape[2]:
        raise ValueError(f"images of {padded.shape[1]} channels for a network of {kernel.shape[2]}")
    return len(padded), kernel.shape[3], padded.shape[2] - 2, padded.shape[3] - 2
