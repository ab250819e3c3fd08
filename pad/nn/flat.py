"""A network as a pure function of one flat parameter vector, and the two functions that carry the heavy work.

``theta [P]`` holds the parameters in module order, shallow to deep. ``grad`` and ``hvp`` are pure functions of
tensors: training experts, matching and evaluation call the same ones. How they are computed is one of
:mod:`pad.nn.derivatives`.
"""

import copy
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pad.data.placement import Images
from pad.errors import InputError
from pad.nn.derivatives import Derivatives, Eager, Hvp, choose, contains, third
from pad.nn.foreign import Foreign, flat_problem


def cross_entropy(logits: Tensor, p: Tensor) -> Tensor:
    """-(1/B) sum p . log_softmax(logits), for target probabilities ``p [B, K]`` and logits ``[B, K]``."""
    return -(p * F.log_softmax(logits, dim=1)).sum() / logits.shape[0]


class FlatModel:
    """``f(theta, x)`` and its derivatives, for a module of which :func:`pad.nn.foreign.flat_problem` finds none.

    BatchNorm layers use the statistics of the batch: running ones are not part of a trajectory (but :meth:`running`).
    Other buffers are constants, and stay on the device where the module has them.

    Args:
        module: gives the structure; its own numbers are not used (see :meth:`flatten`).
        compile: how the derivatives are computed: a word of :func:`pad.nn.derivatives.choose` (off, on, fused or auto),
            or one of the classes there. The attribute ``compile`` is what this came to: off, on or fused.
        micro_batch: work on at most so many images at a time and add up: the same result up to rounding, in less
            memory. A network with BatchNorm takes every batch whole, since its images depend on each other.

    Raises InputError for a module with dropout, or another such problem.
    """

    def __init__(
        self,
        module: nn.Module,
        compile: str | Callable[["FlatModel"], Derivatives] = "off",
        micro_batch: int | None = None,
    ):
        self.module = _stateless(module)
        named = list(self.module.named_parameters())
        self.names = [name for name, _ in named]
        self.shapes = [tuple(p.shape) for _, p in named]
        self._sizes = [p.numel() for _, p in named]
        self.num_parameters = sum(self._sizes)
        self.separable = not contains(self.module, _BatchNorm)
        self.micro_batch = micro_batch if self.separable else None
        self.derivatives = choose(compile, self) if isinstance(compile, str) else compile(self)
        self.compile = self.derivatives.word

    def grad(self, theta: Tensor, x: Tensor, p: Tensor) -> Tensor:
        """The gradient ``[P]`` in ``theta [P]`` of :func:`cross_entropy` on images ``x [B, C, H, W]``, ``p [B, K]``.

        ``p`` need not add up to one: a share of a batch counts as such when its p are scaled by its share.
        """
        first, *rest = self._pieces(x, p / len(x))
        g = self.derivatives.grad(theta, *first)
        return sum(self.derivatives.grad(theta, *piece) for piece in rest) + g

    def grads(self, thetas: Tensor, xs: Tensor, ps: Tensor) -> Tensor:
        """:meth:`grad` of J networks at once: ``[J, P]``, ``[J, B, C, H, W]``, ``[J, B, K]`` -> ``[J, P]``."""
        if isinstance(self.module, Foreign):  # its code may not do for several networks at once
            return torch.stack([self.grad(theta, x, p) for theta, x, p in zip(thetas, xs, ps)])
        return self.derivatives.grads(thetas, xs, ps / xs.shape[1])

    def hvp(self, theta: Tensor, x: Tensor, p: Tensor, lam: Tensor) -> Hvp:
        """The slope <grad(theta, x, p), lam>; its gradients in theta ``[P]``, x ``[B, C, H, W]`` and p ``[B, K]``."""
        n = len(x)
        parts = [self.derivatives.hvp(theta, *piece, lam) for piece in self._pieces(x, p / n)]
        if len(parts) == 1:
            slope, h_theta, h_x, h_p = parts[0]
            return slope, h_theta, h_x, h_p / n
        slopes, h_thetas, h_xs, h_ps = zip(*parts)
        return sum(slopes), sum(h_thetas), torch.cat(h_xs), torch.cat(h_ps) / n

    def third(self, theta: Tensor, x: Tensor, p: Tensor, along: Tensor, lam: Tensor) -> tuple[Tensor, Tensor]:
        """What :meth:`hvp`'s gradients in x ``[B, C, H, W]`` and p ``[B, K]`` change by as theta moves ``along [P]``.

        By autograd alone: no other way to compute derivatives can be differentiated so often.
        """
        n = len(x)
        parts = [third(self, theta, *piece, (along, lam)) for piece in self._pieces(x, p / n)]
        t_xs, t_ps = zip(*parts)
        return torch.cat(t_xs), torch.cat(t_ps) / n

    def running(self, theta: Tensor) -> "FlatModel":
        """This network with BatchNorm's running statistics, mean 0 and variance 1 at first, where ``theta [P]`` is.

        It computes with the statistics of the batch, as this one does. Each pass moves the running ones towards them,
        by BatchNorm's momentum. Its derivatives are computed operation by operation.
        """
        running = self._with(copy.deepcopy(self.module))
        for norm in _batch_norms(running.module):
            norm.track_running_stats = True
            norm.running_mean, norm.running_var = theta.new_empty(2, norm.num_features)
            norm.num_batches_tracked = torch.zeros((), dtype=torch.int64, device=theta.device)
            norm.reset_running_stats()
        return running

    def fixed(self) -> "FlatModel":
        """A :meth:`running` network under its statistics as they now are: constants, so its images are independent."""
        fixed = self._with(copy.deepcopy(self.module))
        for norm in _batch_norms(fixed.module):
            norm.eval()
        fixed.separable = True
        return fixed

    def _with(self, module: nn.Module) -> "FlatModel":
        """The same parameters in another module, whose buffers have numbers."""
        other = copy.copy(self)
        other.module = module
        other.derivatives = Eager(other)
        other.compile = other.derivatives.word
        return other

    def _pieces(self, x: Tensor, p: Tensor) -> list[tuple[Tensor, Tensor]]:
        """A batch in micro-batches."""
        size = self.micro_batch or len(x)
        return list(zip(x.split(size), p.split(size)))

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

    @torch.no_grad()
    def logits(self, theta: Tensor, images: Images, batch: int = 512) -> Tensor:
        """Logits ``[N, K]`` of many images, without gradients, in batches.

        A batch is spread over the whole set, so that one sorted by class mixes the classes, as BatchNorm needs.
        """
        strides = math.ceil(len(images) / batch)
        parts = [self.derivatives.forward(theta, images[i::strides]) for i in range(strides)]
        logits = parts[0].new_empty(len(images), parts[0].shape[1])
        for i, part in enumerate(parts):
            logits[i::strides] = part
        return logits

    def accuracy(self, theta: Tensor, images: Images, labels: Tensor) -> float:
        """Share of ``images [N, C, H, W]`` classified as ``labels [N]``, in 0..1."""
        return (self.logits(theta, images).argmax(dim=1) == labels).double().mean().item()


def _batch_norms(module: nn.Module) -> list[_BatchNorm]:
    return [child for child in module.modules() if isinstance(child, _BatchNorm)]


def _stateless(module: nn.Module) -> nn.Module:
    """The structure of ``module``, parameters on the meta device: batch statistics only, no numbers but constants."""
    if problem := flat_problem(module):
        made = getattr(module, "made", None)
        called = made.name if made else "the network"
        raise InputError(
            f"{called} can be evaluated, but be no expert and no student, whose gradients are functions of their "
            f"parameters: it {problem}"
        )
    module = copy.deepcopy(module)
    meta: dict[nn.Parameter, nn.Parameter] = {}
    for child in module.modules():
        for name, parameter in child._parameters.items():
            if parameter is not None:  # one that several layers share stays one
                child._parameters[name] = meta.setdefault(parameter, nn.Parameter(parameter.to("meta")))
    for norm in _batch_norms(module):
        norm.track_running_stats = False
        norm.running_mean = norm.running_var = norm.num_batches_tracked = None
    return module.train()
