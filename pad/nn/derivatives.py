"""The ways to compute the gradient and the Hessian pass of a network's loss, each a class; and which to take when.

All of them give the same up to rounding. The loss is ``-sum p . log_softmax(f(theta, x))``, a sum over images. The
Hessian pass ("hvp") is the slope <g, lam> of the loss along ``lam`` and the gradient (h_theta, h_x, h_p) of that slope;
by the symmetry of second derivatives this is also the derivative of dl/d(theta, x, p) along (lam, 0, 0).

Times below are those of docs/BENCHMARKS.md: a ConvNet of width 128, two cores.
"""

import copy
import inspect
import logging
import os
import shutil
import sys
from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.overrides import TorchFunctionMode

from pad.errors import is_of_memory
from pad.nn.fused import FusedConvNet
from pad.nn.kernels.devices import kernels_of

log = logging.getLogger("pad")

COMPILE_CALLS = 4000  # derivatives after which torch.compile for the CPU (about a minute) has paid for itself

_FIRST = "body.0.0"  # the first layer of all networks of pad.nn.networks but MLP

Hvp = tuple[Tensor, Tensor, Tensor, Tensor]


class FlatFunction(Protocol):
    """What is differentiated: logits ``f(theta, x)``, theta ``[P]``, x ``[B, C, H, W]``. FlatModel is one.

    ``separable``: whether an image's logits do not depend on the other images.
    """

    module: nn.Module
    separable: bool

    def __call__(self, theta: Tensor, x: Tensor) -> Tensor: ...

    def unflatten(self, theta: Tensor) -> dict[str, Tensor]: ...


class Derivatives(Protocol):
    """A way to compute them. ``word`` is its name in settings: off, on or fused."""

    word: str

    def forward(self, theta: Tensor, x: Tensor) -> Tensor:
        """Logits ``[B, K]``."""

    def grad(self, theta: Tensor, x: Tensor, p: Tensor) -> Tensor:
        """The loss's gradient ``[P]`` in theta, for weights ``p [B, K]``."""

    def grads(self, thetas: Tensor, xs: Tensor, ps: Tensor) -> Tensor:
        """``grad`` of J networks at once: ``[J, P]``."""

    def hvp(self, theta: Tensor, x: Tensor, p: Tensor, lam: Tensor) -> Hvp:
        """The slope along ``lam [P]``, h_theta ``[P]``, h_x ``[B, C, H, W]`` and h_p ``[B, K]``."""


class Functional:
    """By torch.func, backwards twice: the formula that torch.compile takes, which is not autograd's second derivatives.

    Nine passes of each convolution for a Hessian pass. Two of them, the second derivatives of weight gradients, are
    convolutions with kernels as large as the image, three times slower than others. Memory: the activations of the
    forward pass and of the pass backwards. For any network, inside :class:`Compiled`. Not by itself: torch.func takes
    group norms apart and is slower than :class:`Eager` then.
    """

    word = "off"

    def __init__(self, f: FlatFunction):
        self.f = f

    def forward(self, theta: Tensor, x: Tensor) -> Tensor:
        return self.f(theta, x)

    def grad(self, theta: Tensor, x: Tensor, p: Tensor) -> Tensor:
        return torch.func.grad(partial(_loss, self.f))(theta, x, p)

    def grads(self, thetas: Tensor, xs: Tensor, ps: Tensor) -> Tensor:
        return torch.func.vmap(torch.func.grad(partial(_loss, self.f)))(thetas, xs, ps)

    def hvp(self, theta: Tensor, x: Tensor, p: Tensor, lam: Tensor) -> Hvp:
        def slope(theta: Tensor, x: Tensor, p: Tensor, lam: Tensor) -> tuple[Tensor, Tensor]:
            value = self.slope(theta, x, p, lam)
            return value, value

        (h_theta, h_x, h_p), value = torch.func.grad(slope, argnums=(0, 1, 2), has_aux=True)(theta, x, p, lam)
        return value, h_theta, h_x, h_p

    def slope(self, theta: Tensor, x: Tensor, p: Tensor, lam: Tensor) -> Tensor:
        """<g, lam>."""
        return self.grad(theta, x, p) @ lam


class ForwardFirst(Functional):
    """The same, with the slope computed forwards, beside the loss itself, and differentiated backwards once.

    The slope is a derivative along one direction (Pearlmutter, Fast exact multiplication by the Hessian, Neural
    Computation 6, 1994), so the gradient need not be formed. Eight passes of each convolution, all of them native
    kernels: compiled, 633 ms for a Hessian pass where :class:`Functional` takes 724 to 816. Memory: the pairs (value,
    derivative) of the forward pass. For networks that :meth:`fits` accepts. Not for the others, where it is wrong.
    """

    @staticmethod
    def fits(module: nn.Module) -> bool:
        """Whether the network begins with a convolution and is of known layers, BatchNorm and LayerNorm not among them.

        torch differentiates the forward derivative of these norms as if their statistics were constants (2.14), and a
        layer of somebody's own may call them.
        """
        layers = dict(module.named_modules())
        known = all(type(layer).__module__.startswith(("torch.nn.modules.", "pad.nn.")) for layer in layers.values())
        return type(layers.get(_FIRST)) is nn.Conv2d and known and not contains(module, _NormBase, nn.LayerNorm)

    def __init__(self, f: FlatFunction):
        super().__init__(f)
        self._first = f.module.get_submodule(_FIRST)
        self._rest = copy.deepcopy(f.module)
        self._rest.set_submodule(_FIRST, nn.Identity())

    def slope(self, theta: Tensor, x: Tensor, p: Tensor, lam: Tensor) -> Tensor:
        # Clones, which are compiled away: a dual number of views, such as rows of a path, fails an assertion of torch.
        at, along = theta.clone(), lam.clone()
        # The first layer is linear in theta; by torch.func.jvp its images, which do not move, would move by zeros.
        y, y_along = self.first(at, x), self.first(along, x)
        return torch.func.jvp(lambda at, y: _loss(self.after_first, at, y, p), (at, y), (along, y_along))[1]

    def first(self, theta: Tensor, x: Tensor) -> Tensor:
        """The output of the first layer, a convolution: linear in ``theta``."""
        prefix = _FIRST + "."
        named = self.f.unflatten(theta).items()
        parameters = {name.removeprefix(prefix): p for name, p in named if name.startswith(prefix)}
        return torch.func.functional_call(self._first, parameters, (x,))

    def after_first(self, theta: Tensor, y: Tensor) -> Tensor:
        """Logits ``[B, K]`` from the first layer's output: ``f(theta, x) = after_first(theta, first(theta, x))``."""
        named = self.f.unflatten(theta).items()
        parameters = {name: p for name, p in named if not name.startswith(_FIRST + ".")}
        return torch.func.functional_call(self._rest, parameters, (y,))


class Compiled:
    """:class:`ForwardFirst`, where it fits, else :class:`Functional`, by torch.compile in one graph each.

    On a CPU 0.6 of the time of :class:`Eager`. The first call takes some 100 s, or 16 s when its code is in the cache.
    Each further batch size takes that again, so a short batch is filled up, with images that do not count, to a size
    that has run. For CUDA, and for long runs on a CPU of networks that :class:`Fused` does not fit. Not for short runs.
    Source: TorchDynamo and TorchInductor (Ansel et al., PyTorch 2, ASPLOS 2024).
    """

    word = "on"

    def __init__(self, f: FlatFunction):
        formula = ForwardFirst(f) if ForwardFirst.fits(f.module) else Functional(f)
        # Every network and batch size is a graph of its own, all of them of the same few lines of code.
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
        self.forward = formula.forward
        self.grads = torch.compile(formula.grads, fullgraph=True, dynamic=False)
        self._grad = _compiled(formula.grad, Eager(f).grad)
        self._hvp = _compiled(formula.hvp, Eager(f).hvp)
        self._may_fill = f.separable
        self._sizes: set[int] = set()  # of the batches that have graphs

    def grad(self, theta: Tensor, x: Tensor, p: Tensor) -> Tensor:
        return self._grad(_owned(theta), *self._filled(x, p))

    def hvp(self, theta: Tensor, x: Tensor, p: Tensor, lam: Tensor) -> Hvp:
        slope, h_theta, h_x, h_p = self._hvp(_owned(theta), *self._filled(x, p), _owned(lam))
        return slope, h_theta, h_x[: len(x)], h_p[: len(x)]

    def _filled(self, x: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        """A batch with images of weight zero added, up to the next size that has a graph, if any."""
        if not self._may_fill:
            return x, p
        full = min((size for size in self._sizes if size >= len(x)), default=len(x))
        self._sizes.add(full)
        more = full - len(x)
        if not more:
            return x, p
        return torch.cat([x, x.new_zeros(more, *x.shape[1:])]), torch.cat([p, p.new_zeros(more, p.shape[1])])


class Eager(Functional):
    """By autograd, backwards twice, operation by operation: no time to start, any network, any device.

    Nine passes of each convolution for a Hessian pass (1140 ms). Memory: the activations of the forward pass and of the
    pass backwards. For tests, networks whose statistics are fixed for one step, and machines without a compiler. Not
    for long runs: it is the slowest there.
    """

    @torch.enable_grad()
    def grad(self, theta: Tensor, x: Tensor, p: Tensor) -> Tensor:
        theta = theta.detach().requires_grad_()
        return torch.autograd.grad(_loss(self.forward, theta, x, p), theta)[0]

    @torch.enable_grad()
    def hvp(self, theta: Tensor, x: Tensor, p: Tensor, lam: Tensor) -> Hvp:
        theta, x, p = (tensor.detach().requires_grad_() for tensor in (theta, x, p))
        slope = torch.autograd.grad(_loss(self.forward, theta, x, p), theta, create_graph=True)[0] @ lam
        h_theta, h_x, h_p = torch.autograd.grad(slope, (theta, x, p))
        return slope.detach(), h_theta, h_x, h_p


class Fused(Eager):
    """By the kernels of :mod:`pad.nn.fused`, with the slope computed forwards and differentiated backwards once.

    Eight passes of each convolution, as :class:`ForwardFirst`, and each block's norm, ReLU and pooling in one pass over
    memory. The fastest on a CPU: half the time of :class:`Eager`, four fifths of that of :class:`Compiled`. Memory: as
    :class:`ForwardFirst`. The kernels are built in seconds, once on a machine; with Triton they are for CUDA, too. For
    ConvNets that :meth:`fits` accepts. Not for several networks at once: ``grads`` is that of :class:`Functional`.
    """

    word = "fused"

    @staticmethod
    def fits(module: nn.Module) -> bool:
        """Whether the network is made of blocks that have kernels, and the kernels can be had here."""
        devices = map(torch.device, ("cuda", "cpu") if torch.cuda.is_available() else ("cpu",))
        return FusedConvNet.fits(module) and any(kernels_of(device) is not None for device in devices)

    def __init__(self, f: FlatFunction):
        super().__init__(f)
        self._network = FusedConvNet(f.module)

    def forward(self, theta: Tensor, x: Tensor) -> Tensor:
        return self._network(self.f.unflatten(theta), x)

    @torch.enable_grad()
    def hvp(self, theta: Tensor, x: Tensor, p: Tensor, lam: Tensor) -> Hvp:
        theta, x, p = (tensor.detach().requires_grad_() for tensor in (theta, x, p))
        logits, along = self._network.dual(self.f.unflatten(theta), self.f.unflatten(lam), x)
        slope = -(p * (along - (logits.softmax(dim=1) * along).sum(dim=1, keepdim=True))).sum()
        h_theta, h_x, h_p = torch.autograd.grad(slope, (theta, x, p))
        return slope.detach(), h_theta, h_x, h_p


class _PlainNorms(TorchFunctionMode):
    """Computes BatchNorm, of the batch's statistics, and LayerNorm by operations that have all derivatives.

    Of torch's own for them BatchNorm's has no third derivative, and LayerNorm's a wrong one (torch 2.14).
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.layer_norm, torch.native_layer_norm):
            raise RuntimeError("that of torch.layer_norm is wrong: call torch.nn.functional.layer_norm")
        if func not in (F.batch_norm, F.layer_norm):
            return func(*args, **kwargs)
        given = inspect.signature(func).bind(*args, **kwargs).arguments
        x = given["input"]
        first = x.dim() - len(given["normalized_shape"]) if func is F.layer_norm else 2
        dims = [i for i in range(x.dim()) if i >= first or (func is F.batch_norm and i == 0)]
        y = x - x.mean(dim=dims, keepdim=True)
        y = y / (y.square().mean(dim=dims, keepdim=True) + given.get("eps", 1e-5)).sqrt()
        shape = x.shape[first:] if func is F.layer_norm else (-1, *[1] * (x.dim() - 2))
        weight, bias = (given.get(name) for name in ("weight", "bias"))
        y = y if weight is None else y * weight.view(shape)
        return y if bias is None else y + bias.view(shape)


@torch.enable_grad()
def third(
    f: FlatFunction, theta: Tensor, x: Tensor, p: Tensor, directions: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Of the loss's second derivative in theta along two ``directions [P]``, the gradient in x and p.

    By autograd, backwards three times. Memory: the activations of the forward pass and of two passes backwards. Raises
    RuntimeError for a network with an operation that has no third derivative, or a wrong one.
    """
    first, second = directions
    theta, x, p = (tensor.detach().requires_grad_() for tensor in (theta, x, p))
    with _PlainNorms():
        loss = _loss(f, theta, x, p)
    slope = torch.autograd.grad(loss, theta, create_graph=True)[0] @ first
    along = torch.autograd.grad(slope, theta, create_graph=True)[0] @ second
    t_x, t_p = torch.autograd.grad(along, (x, p))
    return t_x, t_p


def choose(word: str, f: FlatFunction) -> Derivatives:
    """The derivatives of ``f`` that ``word`` asks for, as far as they can be had here.

    off: :class:`Eager`. on: :class:`Compiled`. fused: :class:`Fused` where it fits, else :class:`Eager`. auto:
    :class:`Fused` where it fits, else :class:`Compiled`. Without a compiler :class:`Eager`, after a warning.
    """
    if word == "off" or not compiler_available():
        return Eager(f)
    if word in ("fused", "auto") and Fused.fits(f.module):
        return Fused(f)
    return Compiled(f) if word in ("on", "auto") else Eager(f)


def how_to_compile(mode: str, device: torch.device, calls: int) -> str:
    """The word for :func:`choose`, of a setting; ``calls``: of the derivatives, in the run.

    On CUDA auto is on, and fused is on for networks without kernels; on a CPU auto is fused where calls are few.
    """
    if device.type == "cuda":
        if mode == "fused" and kernels_of(device) is not None:
            return "auto"
        return "off" if mode == "off" else "on"
    if mode == "auto":
        mode = "auto" if calls >= COMPILE_CALLS else "fused"
    # Beside a CUDA device, choose would take that one's kernels for the CPU's.
    without = mode in ("auto", "fused") and torch.cuda.is_available() and kernels_of(device) is None
    return "off" if without else mode


def compiler_available() -> bool:
    """Whether torch.compile finds the compiler it needs (CUDA: C, CPU: C++). Logs a warning when it does not."""
    names: tuple[str | None, ...]
    if torch.cuda.is_available():
        language = "C"
        names = (os.environ.get("CC"), "gcc", "clang")
    else:
        language = "C++"
        names = (os.environ.get("CXX"), "clang++" if sys.platform == "darwin" else "g++")
    if any(shutil.which(name) for name in names if name):
        return True
    log.warning("no %s compiler found: running uncompiled, which is slower and gives the same up to rounding", language)
    return False


def contains(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Whether a layer of ``module`` is of one of these kinds."""
    return any(isinstance(child, kinds) for child in module.modules())


def _compiled(function: Callable, otherwise: Callable) -> Callable:
    """``function`` by torch.compile; ``otherwise``, after a warning, where that cannot take the code of a network."""
    way = torch.compile(function, fullgraph=True, dynamic=False)

    def call(*tensors: Tensor):
        nonlocal way
        try:
            return way(*tensors)
        except torch._dynamo.exc.TorchDynamoException as error:
            if is_of_memory(error):
                raise
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            log.warning("torch.compile cannot take this network, which runs uncompiled: %s", reason)
            way = otherwise
        return way(*tensors)

    return call


def _owned(theta: Tensor) -> Tensor:
    """``theta`` in memory of its own: a row of a path begins anywhere, and each alignment would be another graph."""
    return theta.clone() if theta._is_view() else theta


def _loss(f, theta: Tensor, x: Tensor, p: Tensor) -> Tensor:
    return -(p * F.log_softmax(f(theta, x), dim=1)).sum()
