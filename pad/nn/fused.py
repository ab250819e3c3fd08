"""ConvNets with each block's normalisation, ReLU and pooling in one kernel (:mod:`pad.nn.kernels`).

Run one after the other these three read and write every feature map a dozen times; a training step of a narrow ConvNet
spends more time on that than on its convolutions. The kernels have first derivatives only, so the derivative along a
direction is written out here, as a network of pairs (value, derivative), which autograd differentiates once: second
derivatives without a second pass backwards.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pad.nn.kernels.devices import Kernels, kernels_of
from pad.nn.networks import AnyNetwork, InstanceNorm, Network

_LANES = 8  # the kernels work on as many channels at a time


class Layer(NamedTuple):
    """What a block is beside its parameters."""

    padding: int
    eps: float


class Block(torch.autograd.Function):
    """pool(relu(norm(x))) for x ``[N, C, H, W]``, weight and bias ``[C]`` of the norm."""

    @staticmethod
    def forward(ctx, eps: float, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        inputs = [_dense(x), weight.contiguous(), bias.contiguous()]
        out = _pooled(x, x.shape)
        _kernels(x).call("forward", x.shape, eps, inputs, [out])
        ctx.save_for_backward(*inputs)
        ctx.eps = eps
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight, bias = ctx.saved_tensors
        grad_x = torch.empty_like(x)
        grad_weight, grad_bias = x.new_empty(2, *x.shape[:2])
        inputs = [_dense(grad, x), x, weight, bias]
        _kernels(x).call("backward", x.shape, ctx.eps, inputs, [grad_x, grad_weight, grad_bias])
        return None, grad_x, grad_weight.sum(0), grad_bias.sum(0)


class FirstBlock(torch.autograd.Function):
    """The block of the convolution of images ``[N, 1 or 3, H, W]``, which need no gradient.

    ``tensors``: the kernel ``[C, 1 or 3, 3, 3]`` and bias of the convolution, weight and bias of the norm. The norm
    takes the convolution's bias away, so that bias is not looked at and has gradient zero.
    """

    @staticmethod
    def forward(ctx, layer: Layer, images: Tensor, *tensors: Tensor) -> Tensor:
        kernel, _, weight, bias = tensors
        inputs = [_padded(images, layer.padding), _across(kernel), weight.contiguous(), bias.contiguous()]
        ctx.shape = _convolved(*inputs[:2])
        ctx.eps = layer.eps
        out = _pooled(images, ctx.shape)
        _kernels(images).call(f"first{images.shape[1]}_forward", ctx.shape, ctx.eps, inputs, [out])
        ctx.save_for_backward(*inputs)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        images, kernel, weight, bias = ctx.saved_tensors
        n = len(images)
        grad_kernel = kernel.new_empty(n, *kernel.shape)
        grad_weight, grad_bias = weight.new_empty(2, n, len(weight))
        inputs = [_dense(grad), images, kernel, weight, bias]
        outputs = [grad_kernel, grad_weight, grad_bias]
        _kernels(images).call(f"first{images.shape[1]}_backward", ctx.shape, ctx.eps, inputs, outputs)
        grad_kernel = grad_kernel.sum(0).permute(3, 2, 0, 1)
        return None, None, grad_kernel, torch.zeros_like(bias), grad_weight.sum(0), grad_bias.sum(0)


class DualBlock(torch.autograd.Function):
    """A block's value and its derivative along (dx, dweight, dbias), of which only dx counts as a variable.

    ``norm``: weight, bias, dweight, dbias.
    """

    @staticmethod
    def forward(ctx, eps: float, x: Tensor, dx: Tensor, *norm: Tensor) -> tuple[Tensor, Tensor]:
        weight, bias, dweight, dbias = (v.contiguous() for v in norm)
        x, dx = _dense(x), _dense(dx, x)
        out, dout = _pooled(x, x.shape), _pooled(x, x.shape)
        _kernels(x).call("dual_forward", x.shape, eps, [x, dx, weight, dweight, bias, dbias], [out, dout])
        ctx.save_for_backward(x, dx, weight, dweight, bias)
        ctx.eps = eps
        return out, dout

    @staticmethod
    def backward(ctx, grad: Tensor, dgrad: Tensor):
        x, *others = ctx.saved_tensors
        grad_x, grad_dx = torch.empty_like(x), torch.empty_like(x)
        grad_weight, grad_bias = x.new_empty(2, *x.shape[:2])
        inputs = [_dense(grad, x), _dense(dgrad, x), x, *others]
        _kernels(x).call("dual_backward", x.shape, ctx.eps, inputs, [grad_x, grad_dx, grad_weight, grad_bias])
        return None, grad_x, grad_dx, grad_weight.sum(0), grad_bias.sum(0), None, None


class FirstDualBlock(torch.autograd.Function):
    """The same for the first block, from its images, which do not move, and its convolution's kernel.

    ``tensors``: the kernel, weight and bias of the norm, and the derivatives of the three.
    """

    @staticmethod
    def forward(ctx, layer: Layer, images: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        kernel, weight, bias, dkernel, dweight, dbias = tensors
        images, kernel, dkernel = _padded(images, layer.padding), _across(kernel), _across(dkernel)
        weight, bias, dweight, dbias = (v.contiguous() for v in (weight, bias, dweight, dbias))
        ctx.shape = _convolved(images, kernel)
        ctx.layer = layer
        outs = _pooled(images, ctx.shape), _pooled(images, ctx.shape)
        inputs = [images, kernel, dkernel, weight, dweight, bias, dbias]
        _kernels(images).call(f"first{images.shape[1]}_dual_forward", ctx.shape, layer.eps, inputs, list(outs))
        ctx.save_for_backward(*inputs[:-1])
        return outs

    @staticmethod
    def backward(ctx, grad: Tensor, dgrad: Tensor):
        images, kernel, dkernel, *vectors = ctx.saved_tensors
        n, c, height, width = ctx.shape
        padding, eps = ctx.layer
        inputs = [_dense(grad), _dense(dgrad), images, kernel, dkernel, *vectors]
        grads = images.new_empty(n * height * width, 2 * c)
        grad_kernel = kernel.new_empty(n, *kernel.shape)
        grad_weight, grad_bias = images.new_empty(2, n, c)
        outputs = [grads, grad_kernel, grad_weight, grad_bias]
        kernels = _kernels(images)
        kernels.call(f"first{images.shape[1]}_dual_backward", ctx.shape, eps, inputs, outputs)
        patches = grads @ torch.cat([kernel, dkernel], dim=3).view(-1, 2 * c).t()
        grad_images = torch.zeros_like(images)
        kernels.call("fold", (n, images.shape[1], height, width), 0.0, [patches], [grad_images])
        grad_images = grad_images[:, :, padding:-padding, padding:-padding]
        grad_kernel = grad_kernel.sum(0).permute(3, 2, 0, 1)
        return None, grad_images, grad_kernel, grad_weight.sum(0), grad_bias.sum(0), None, None, None


class FusedConvNet:
    """A network of :mod:`pad.nn.networks` made of blocks (convolution, InstanceNorm, ReLU, 2 x 2 AvgPool)."""

    def __init__(self, module: nn.Module):
        layers = _layers(module)
        if layers is None:
            raise ValueError("the network has blocks for which there are no kernels")
        self._layers = layers

    @staticmethod
    def fits(module: nn.Module) -> bool:
        """Whether the network is made of such blocks."""
        return _layers(module) is not None

    def __call__(self, parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        """Logits ``[N, K]`` of ``x [N, C, H, W]``."""
        return F.linear(self.blocks(parameters, x)[-1].flatten(1), *_pair(parameters, "classifier"))

    def blocks(self, parameters: dict[str, Tensor], x: Tensor) -> list[Tensor]:
        """The outputs of all blocks, shallow to deep."""
        outputs = []
        kernels = _kernels(x)
        for i, layer in enumerate(self._layers):
            convolution, norm = _pair(parameters, f"body.{i}.0"), _pair(parameters, f"body.{i}.1")
            if i == 0 and kernels.convolves(x.shape[1]) and not x.requires_grad:
                x = FirstBlock.apply(layer, x, *convolution, *norm)
            else:
                x = _dense(x)
                x = Block.apply(layer.eps, kernels.convolve(x, *convolution, layer.padding), *norm)
            outputs.append(x)
        return outputs

    def dual(self, parameters: dict[str, Tensor], along: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits ``[N, K]`` and their derivative along ``along``, differentiable in the parameters and in x."""
        dx: Tensor | None = None  # the images do not move
        kernels = _kernels(x)
        for i, layer in enumerate(self._layers):
            (kernel, shift), (dkernel, dshift) = _pair(parameters, f"body.{i}.0"), _pair(along, f"body.{i}.0")
            norm, dnorm = _pair(parameters, f"body.{i}.1"), _pair(along, f"body.{i}.1")
            if i == 0 and kernels.convolves(x.shape[1]):
                x, dx = FirstDualBlock.apply(layer, x, kernel, *norm, dkernel, *dnorm)
                continue
            x = _dense(x)
            y = kernels.convolve(x, kernel, shift, layer.padding)
            dy = kernels.convolve(x, dkernel, dshift, layer.padding)
            if dx is not None:
                dy = dy + F.conv2d(dx, kernel, padding=layer.padding)
            x, dx = DualBlock.apply(layer.eps, y, dy, *norm, *dnorm)
        (w, b), (dw, db) = _pair(parameters, "classifier"), _pair(along, "classifier")
        assert dx is not None, "a network without blocks"
        h = x.flatten(1)
        return F.linear(h, w, b), F.linear(dx.flatten(1), w) + F.linear(h, dw, db)


def forward_of(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """What ``module``'s forward computes, with the kernels where it is made of such blocks and lies on a CPU."""
    network = _fused(module)
    return module if network is None else partial(network, dict(module.named_parameters()))


def blocks_of(module: AnyNetwork) -> Callable[[Tensor], list[Tensor]]:
    """The same of ``module.blocks``."""
    network = _fused(module)
    return module.blocks if network is None else partial(network.blocks, dict(module.named_parameters()))


def _fused(module: nn.Module) -> FusedConvNet | None:
    on_cpu = all(parameter.is_cpu for parameter in module.parameters())
    fits = on_cpu and FusedConvNet.fits(module) and kernels_of(torch.device("cpu")) is not None
    return FusedConvNet(module) if fits else None


def _layers(module: nn.Module) -> list[Layer] | None:
    """The network's blocks, where the kernels compute all of them; else None."""
    if not isinstance(module, Network):
        return None
    layers = [layer for block in module.body if (layer := _layer(block)) is not None]
    return layers if len(layers) == len(module.body) else None


def _layer(block: nn.Module) -> Layer | None:
    parts = list(block.children())
    # Types, not isinstance: a class derived from one of these may compute something else.
    if [type(part) for part in (block, *parts)] != [nn.Sequential, nn.Conv2d, InstanceNorm, nn.ReLU, nn.AvgPool2d]:
        return None
    convolution, norm, _, pool = cast(tuple[nn.Conv2d, InstanceNorm, nn.ReLU, nn.AvgPool2d], parts)
    padding = convolution.padding[0]
    fits = (
        isinstance(padding, int)
        and padding > 0
        and convolution.padding == (padding, padding)
        and convolution.padding_mode == "zeros"
        and convolution.kernel_size == (3, 3)
        and (convolution.stride, convolution.dilation, convolution.groups) == ((1, 1), (1, 1), 1)
        and convolution.out_channels % _LANES == 0
        and convolution.bias is not None
        and (pool.kernel_size, pool.stride, pool.padding, pool.ceil_mode) == (2, 2, 0, False)
    )
    return Layer(int(padding), norm.eps) if fits else None


def _pair(parameters: dict[str, Tensor], name: str) -> tuple[Tensor, Tensor]:
    """Weight and bias of a layer."""
    return parameters[f"{name}.weight"], parameters[f"{name}.bias"]


def _kernels(x: Tensor) -> Kernels:
    kernels = kernels_of(x.device)
    if kernels is None:
        raise ValueError(f"there are no kernels for {x.device.type}: only for the CPU and CUDA, with what they need")
    return kernels


def _dense(x: Tensor, like: Tensor | None = None) -> Tensor:
    """``x [N, C, H, W]`` dense, laid out as the kernels want it for a block of ``like``, or of x itself.

    Channels-last in its strides too, also where one channel leaves them ambiguous.
    """
    like = x if like is None else like
    if _kernels(like).layout(like) is torch.contiguous_format:
        return x.contiguous()
    n, c, h, w = x.shape
    return x.permute(0, 2, 3, 1).contiguous().view(-1).view(n, h, w, c).permute(0, 3, 1, 2)


def _pooled(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """An empty tensor for what is pooled of a map of ``shape (N, C, H, W)``, laid out as for a block of ``like``."""
    n, c, h, w = shape
    if _kernels(like).layout(like) is torch.contiguous_format:
        return like.new_empty(n, c, h // 2, w // 2)
    return like.new_empty(n, h // 2, w // 2, c).permute(0, 3, 1, 2)


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
