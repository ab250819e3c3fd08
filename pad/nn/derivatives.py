"""The gradient and the Hessian pass of a network's loss, and the ways to compute them."""

import logging
import os
import shutil
import sys
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from pad.nn.fused import FusedConvNet

log = logging.getLogger("pad")

COMPILE_CALLS = 4000  # derivatives after which torch.compile for the CPU (about a minute) has paid for itself


def _loss(f, theta: Tensor, x: Tensor, p: Tensor) -> Tensor:
    return -(p * F.log_softmax(f(theta, x), dim=1)).sum()


def _eager_derivatives(f):
    """``grad(theta, x, p) -> g [P]`` and ``hvp(theta, x, p, lam) -> (<g, lam>, h_theta, h_x, h_p)`` of -sum p . log f(x).

    (h_theta, h_x, h_p) is the gradient of the slope <g, lam> in (theta, x, p); by the symmetry of second derivatives it
    is also the derivative of dl/d(theta, x, p) along (lam, 0, 0). By autograd, backwards twice: run operation by
    operation that is faster than torch.func, which takes group norms apart.
    """

    @torch.enable_grad()
    def grad(theta: Tensor, x: Tensor, p: Tensor) -> Tensor:
        theta = theta.detach().requires_grad_()
        return torch.autograd.grad(_loss(f, theta, x, p), theta)[0]

    @torch.enable_grad()
    def hvp(theta: Tensor, x: Tensor, p: Tensor, lam: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        variables = theta, x, p = [tensor.detach().requires_grad_() for tensor in (theta, x, p)]
        slope = torch.autograd.grad(_loss(f, theta, x, p), theta, create_graph=True)[0] @ lam
        return slope.detach(), *torch.autograd.grad(slope, variables)

    return grad, hvp


def _fused_derivatives(model):
    """Logits, ``grad`` and ``hvp`` by the CPU kernels, the slope computed forwards: they have first derivatives only."""
    network = FusedConvNet(model.module)

    def forward(theta: Tensor, x: Tensor) -> Tensor:
        return network(model.unflatten(theta), x)

    grad, _ = _eager_derivatives(forward)

    @torch.enable_grad()
    def hvp(theta: Tensor, x: Tensor, p: Tensor, lam: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        variables = theta, x, p = [tensor.detach().requires_grad_() for tensor in (theta, x, p)]
        logits, along = network.dual(model.unflatten(theta), model.unflatten(lam), x)
        slope = -(p * (along - (logits.softmax(dim=1) * along).sum(dim=1, keepdim=True))).sum()
        return slope.detach(), *torch.autograd.grad(slope, variables)

    return forward, grad, hvp


def _derivatives(f, forward_first: bool):
    """The same for torch.compile, which takes derivatives of torch.func, and not autograd's second ones.

    The slope is a derivative along one direction, so it can be had forwards (``forward_first``), with the loss itself,
    and differentiated backwards once: of each convolution that takes eight passes, all of them native kernels. Backwards
    twice takes nine, two of them slow.
    """
    grad = torch.func.grad(partial(_loss, f))

    def slope(theta: Tensor, x: Tensor, p: Tensor, lam: Tensor) -> tuple[Tensor, Tensor]:
        if forward_first:
            # Clones, which are compiled away: a dual number of views, such as rows of a path, fails an assertion of torch.
            at, along = theta.clone(), lam.clone()
            # The first layer is linear in theta; by torch.func.jvp its images, which do not move, would move by zeros.
            y, y_along = f.first(at, x), f.first(along, x)
            value = torch.func.jvp(lambda at, y: _loss(f.after_first, at, y, p), (at, y), (along, y_along))[1]
        else:
            value = grad(theta, x, p) @ lam
        return value, value

    second = torch.func.grad(slope, argnums=(0, 1, 2), has_aux=True)

    def hvp(theta: Tensor, x: Tensor, p: Tensor, lam: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        (h_theta, h_x, h_p), value = second(theta, x, p, lam)
        return value, h_theta, h_x, h_p

    return grad, hvp


def compiler_available() -> bool:
    """Whether torch.compile finds the compiler it needs (CUDA: C, CPU: C++); says so in one line when it does not."""
    if torch.cuda.is_available():
        language, names = "C", (os.environ.get("CC"), "gcc", "clang")
    else:
        language, names = "C++", (os.environ.get("CXX"), "clang++" if sys.platform == "darwin" else "g++")
    if any(shutil.which(name) for name in names if name):
        return True
    log.warning("no %s compiler found: running uncompiled, which is slower and gives the same up to rounding", language)
    return False


def how_to_compile(mode: str, device: torch.device, calls: int) -> str:
    """FlatModel's ``compile`` for the setting ``mode``: on CUDA on or off; on a CPU auto is fused where ``calls`` are few."""
    if device.type == "cuda":
        return "off" if mode == "off" else "on"
    if mode != "auto":
        return mode
    return "auto" if calls >= COMPILE_CALLS else "fused"
