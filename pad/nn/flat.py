"""A network as a pure function of one flat parameter vector, and the two functions that carry all the heavy work.

``theta [P]`` holds the parameters in module order, shallow to deep. ``grad`` and ``hvp`` are pure functions of
tensors: the expert trainer, the matcher and the scorers call the same ones, and ``torch.compile(fullgraph=True)`` takes
them whole.
"""

import copy
import logging
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pad.errors import InputError
from pad.nn import kernels
from pad.nn.derivatives import _derivatives, _eager_derivatives, _fused_derivatives, compiler_available
from pad.nn.fused import FusedConvNet

log = logging.getLogger("pad")

_FIRST = "body.0.0."  # the first layer of all networks of pad.networks but MLP


def cross_entropy(logits: Tensor, p: Tensor) -> Tensor:
    """-(1/B) sum p . log_softmax(logits), for target probabilities ``p [B, K]`` and logits ``[B, K]``."""
    return -(p * F.log_softmax(logits, dim=1)).sum() / logits.shape[0]


def _stateless(module: nn.Module) -> nn.Module:
    """The structure of ``module`` on the meta device: batch statistics only, no numbers of its own."""
    module = copy.deepcopy(module).to("meta")
    for child in module.modules():
        if isinstance(child, nn.modules.dropout._DropoutNd):
            raise InputError("networks with dropout cannot be used: their gradient is not a function of the parameters")
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            child.track_running_stats = False
            child.running_mean = child.running_var = child.num_batches_tracked = None
    return module.train()


class FlatModel:
    """``f(theta, x)`` and its derivatives, for a module without dropout.

    BatchNorm layers use the statistics of the batch: running ones are not part of a trajectory.

    Args:
        module: gives the structure; its own numbers are not used (see :meth:`flatten`).
        compile: how the derivatives are computed: "off", by autograd, operation by operation; "on", by torch.compile (one
            graph each, some 40 s on a CPU; pays for itself on long runs); "fused", by the CPU kernels of
            :mod:`pad.fused` where the network is made of such blocks, else as "off"; "auto", as "fused", else as "on".
        micro_batch: work on at most so many images at a time and add up: the same result up to rounding, in less
            memory. A network with BatchNorm takes every batch whole, since its images depend on each other.
    """

    def __init__(self, module: nn.Module, compile: str = "off", micro_batch: int | None = None):
        self.module = _stateless(module)
        named = list(self.module.named_parameters())
        self.names = [name for name, _ in named]
        self.shapes = [tuple(p.shape) for _, p in named]
        self._sizes = [p.numel() for _, p in named]
        self.num_parameters = sum(self._sizes)
        self.separable = not self._contains(nn.modules.batchnorm._BatchNorm)
        wanted = compile if compile == "off" or compiler_available() else "off"
        self.fused = wanted in ("fused", "auto") and FusedConvNet.fits(self.module) and kernels.library() is not None
        self.compiled = wanted in ("on", "auto") and not self.fused
        self.micro_batch = micro_batch if self.separable else None
        # torch differentiates the forward derivative of these norms as if their statistics were constants (2.14).
        wrong = self._contains(nn.modules.batchnorm._BatchNorm, nn.LayerNorm)
        begins_with_convolution = isinstance(dict(self.module.named_modules()).get(_FIRST[:-1]), nn.Conv2d)
        if begins_with_convolution:
            self._after_first = copy.deepcopy(self.module)
            self._after_first.set_submodule(_FIRST[:-1], nn.Identity())
        forward_first = self.compiled and begins_with_convolution and not wrong
        self._grad, self._hvp = _derivatives(self, forward_first)
        self._grads = torch.func.vmap(self._grad)
        self._forward = self
        if self.compiled:
            # Every network and batch size is a graph of its own, all of them of the same few lines of code.
            torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
            self._grad, self._hvp, self._grads = (
                torch.compile(f, fullgraph=True, dynamic=False) for f in (self._grad, self._hvp, self._grads)
            )
        elif self.fused:
            self._forward, self._grad, self._hvp = _fused_derivatives(self)
        else:
            self._grad, self._hvp = _eager_derivatives(self)
        self._compiled_sizes: set[int] = set()

    @property
    def compile(self) -> str:
        """How the derivatives are computed: off, on or fused."""
        return "fused" if self.fused else "on" if self.compiled else "off"

    def grad(self, theta: Tensor, x: Tensor, p: Tensor) -> Tensor:
        """The gradient ``[P]`` in ``theta [P]`` of :func:`cross_entropy` on images ``x [B, C, H, W]``, ``p [B, K]``.

        ``p`` need not add up to one: a share of a batch counts as such when its p are scaled by its share.
        """
        pieces = self._pieces(x, p / len(x))
        return sum(self._grad(theta, *piece) for piece in pieces[1:]) + self._grad(theta, *pieces[0])

    def grads(self, thetas: Tensor, xs: Tensor, ps: Tensor) -> Tensor:
        """:meth:`grad` of J networks at once: ``[J, P]``, ``[J, B, C, H, W]``, ``[J, B, K]`` -> ``[J, P]``."""
        return self._grads(thetas, xs, ps / xs.shape[1])

    def hvp(self, theta: Tensor, x: Tensor, p: Tensor, lam: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The slope <grad(theta, x, p), lam> and its gradients in theta ``[P]``, x ``[B, C, H, W]`` and p ``[B, K]``."""
        n = len(x)
        slopes, h_thetas, h_xs, h_ps = zip(*(self._hvp(theta, *piece, lam) for piece in self._pieces(x, p / n)))
        if len(slopes) == 1:
            return slopes[0], h_thetas[0], h_xs[0][:n], h_ps[0][:n] / n
        return sum(slopes), sum(h_thetas), torch.cat(h_xs)[:n], torch.cat(h_ps)[:n] / n

    @torch.no_grad()
    def with_statistics(self, theta: Tensor, images: Tensor) -> "FlatModel":
        """This network with BatchNorm's statistics fixed to those of ``images [N, C, H, W]`` under ``theta [P]``.

        Its images do not depend on each other any more. The statistics are constants of its derivatives, which are
        computed operation by operation.
        """
        fixed = copy.copy(self)
        fixed.module = copy.deepcopy(self.module)
        norms = [child for child in fixed.module.modules() if isinstance(child, nn.modules.batchnorm._BatchNorm)]
        for norm in norms:
            norm.track_running_stats, norm.momentum = True, 1.0
            norm.running_mean, norm.running_var = theta.new_zeros(2, norm.num_features)
        fixed(theta, images)
        for norm in norms:
            norm.eval()
        fixed.separable, fixed.compiled, fixed.fused, fixed._forward = True, False, False, fixed
        fixed._grad, fixed._hvp = _eager_derivatives(fixed)
        return fixed

    def _pieces(self, x: Tensor, p: Tensor) -> list[tuple[Tensor, Tensor]]:
        """A batch in micro-batches; where code is compiled, a short one is filled up, with images that do not count.

        So a ragged last batch runs in the graph that is there already.
        """
        size = self.micro_batch or len(x)
        pieces = list(zip(x.split(size), p.split(size)))
        if not (self.compiled and self.separable):
            return pieces
        # Sizes are added in rising order only, so to which one a batch is filled up does not depend on what ran before.
        if len(pieces) > 1:
            self._compiled_sizes.add(size)
        last, weights = pieces[-1]
        full = min((size for size in self._compiled_sizes if size >= len(last)), default=len(last))
        self._compiled_sizes.add(full)
        if more := full - len(last):
            padded = torch.cat([last, last.new_zeros(more, *last.shape[1:])])
            pieces[-1] = padded, torch.cat([weights, weights.new_zeros(more, weights.shape[1])])
        return pieces

    def _contains(self, *kinds: type[nn.Module]) -> bool:
        return any(isinstance(module, kinds) for module in self.module.modules())

    def flatten(self, module: nn.Module) -> Tensor:
        """The parameters of a module of this structure as one vector ``[P]`` (a copy)."""
        return torch.cat([p.detach().reshape(-1) for p in module.parameters()])

    def unflatten(self, theta: Tensor) -> dict[str, Tensor]:
        """``theta [P]`` as named parameters (views)."""
        parts = theta.split(self._sizes)
        return {name: part.view(shape) for name, part, shape in zip(self.names, parts, self.shapes)}

    def __call__(self, theta: Tensor, x: Tensor) -> Tensor:
        """Logits ``[B, K]`` of images ``x [B, C, H, W]`` under parameters ``theta [P]``."""
        return torch.func.functional_call(self.module, self.unflatten(theta), (x,))

    def first(self, theta: Tensor, x: Tensor) -> Tensor:
        """The output of the first layer, a convolution: linear in ``theta``."""
        parameters = {
            name.removeprefix(_FIRST): p for name, p in self.unflatten(theta).items() if name.startswith(_FIRST)
        }
        return torch.func.functional_call(self.module.get_submodule(_FIRST[:-1]), parameters, (x,))

    def after_first(self, theta: Tensor, y: Tensor) -> Tensor:
        """Logits ``[B, K]`` from the first layer's output: ``f(theta, x) = after_first(theta, first(theta, x))``."""
        parameters = {name: p for name, p in self.unflatten(theta).items() if not name.startswith(_FIRST)}
        return torch.func.functional_call(self._after_first, parameters, (y,))

    @torch.no_grad()
    def logits(self, theta: Tensor, images: Tensor, batch: int = 512) -> Tensor:
        """Logits ``[N, K]`` of many images, without gradients, in batches.

        A batch is spread over the whole set, so that one sorted by class mixes the classes, as BatchNorm needs.
        """
        strides = math.ceil(len(images) / batch)
        parts = [self._forward(theta, images[i::strides]) for i in range(strides)]
        logits = parts[0].new_empty(len(images), parts[0].shape[1])
        for i, part in enumerate(parts):
            logits[i::strides] = part
        return logits

    def accuracy(self, theta: Tensor, images: Tensor, labels: Tensor) -> float:
        """Share of ``images [N, C, H, W]`` classified as ``labels [N]``, in 0..1."""
        return (self.logits(theta, images).argmax(dim=1) == labels).double().mean().item()
