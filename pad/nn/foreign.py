"""Networks of other code: torchvision's, and those that a function of a file makes.

What they are is found by trial: whether they fit the images, where their features are, and whether their gradients are
functions of their parameters, as :class:`pad.nn.flat.FlatModel` needs.
"""

import contextlib
import copy
import functools
import importlib.util
import inspect
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import UninitializedParameter

from pad.errors import InputError, is_of_memory
from pad.rng import generator, seeded
from pad.store.identity import nearest
from pad.store.naming import source_of

TORCHVISION = "torchvision:"


class Made(NamedTuple):
    """What a network's structure hangs on: its name, and the images, ``size = (H, W)``, that it is for."""

    name: str
    channels: int
    num_classes: int
    size: tuple[int, int]

    @property
    def images(self) -> str:
        """The images in words."""
        return f"images of {self.channels} x {self.size[0]} x {self.size[1]} (channels x height x width)"


class Foreign(nn.Module):
    """A network of other code, with what :class:`pad.nn.networks.Network` has, as far as it has it."""

    def __init__(self, net: nn.Module, made: Made):
        super().__init__()
        self.net = net
        self.made = made

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    @property
    def classifier(self) -> nn.Linear:
        """The linear layer that gives the logits. Raises InputError where there is none."""
        where = _tried(self.made)
        if where is None:
            raise InputError(
                f"{self.made.name} does not end in a linear layer, so that it has no features to rank or match by"
            )
        layer = self.net.get_submodule(where)
        assert isinstance(layer, nn.Linear)
        return layer

    def features(self, x: Tensor) -> Tensor:
        """The embedding ``[N, D]`` that the classifier sees. Raises InputError where there is none."""
        seen: list[Tensor] = []
        with self.classifier.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])):
            self.net(x)
        return seen[-1]

    def blocks(self, x: Tensor) -> list[Tensor]:
        """The features, as the output of the last block: what the others are is not known."""
        return [self.features(x)]

    @property
    def depth(self) -> int:
        """How many blocks there are. Raises InputError: it is not known."""
        raise InputError(f"depth_ratio: {self.made.name} does not say what its blocks are; leave depth_ratio out")


def is_foreign(name: str) -> bool:
    """Whether a network, by its name, is one of other code."""
    return name.startswith(TORCHVISION) or source_of(name) is not None


def make_foreign(made: Made, seed: int, *index: int | str) -> nn.Module:
    """A freshly initialised network of other code, as that code gives it, on the CPU.

    Its weights are drawn from torch's generator in the stream (seed, "network", index). Raises InputError where it
    cannot be had, does not fit the images, or does not give ``[N, classes]``.
    """
    _tried(made)
    return _drawn(made, seed, *index)


def flat_problem(module: nn.Module) -> str | None:
    """Why a network's gradients are no functions of its parameters, in words that follow "it"; None where they are.

    Of torch's layers dropout says so itself. With a network of other code a trial is made, once in a process.
    """
    if any(isinstance(child, nn.modules.dropout._DropoutNd) and child.p for child in module.modules()):
        return "has dropout"
    made = getattr(module, "made", None)
    return None if made is None else _found_flat(made)


# ---------------------------------------------------------------------------------------------- having it made


def _drawn(made: Made, seed: int, *index: int | str) -> nn.Module:
    with seeded(seed, "network", *index), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision's, of initialisations to come
        net = _of_torchvision(made) if made.name.startswith(TORCHVISION) else _of_file(made)
        if any(isinstance(parameter, UninitializedParameter) for parameter in net.parameters()):  # of lazy layers
            with _fitting(made), torch.no_grad():
                net.eval()(torch.zeros(1, made.channels, *made.size))
    return net.train()


def _of_torchvision(made: Made) -> nn.Module:
    from torchvision import models  # takes seconds

    wanted, known = made.name.removeprefix(TORCHVISION), models.list_models(module=models)
    if wanted not in known:
        most_like = nearest(wanted, known)
        raise InputError(f"torchvision has no classifier {wanted!r}; the nearest name is {TORCHVISION}{most_like}")
    if made.channels != 3:
        raise InputError(f"{made.name} takes images of 3 channels, as all of torchvision, not of {made.channels}")
    with _refusing(f"{made.name} cannot be made by its name and {made.num_classes} classes alone"):
        return models.get_model(wanted, weights=None, num_classes=made.num_classes)


def _of_file(made: Made) -> nn.Module:
    source = source_of(made.name)
    assert source is not None, made.name
    function = _function(made.name)
    with _refusing(f"{made.name} cannot be made for {made.images} of {made.num_classes} classes", source.path):
        net = function(*made[1:])
    if not isinstance(net, nn.Module):
        raise InputError(f"{made.name} gives a {type(net).__name__}, not an nn.Module")
    return net


@functools.cache
def _function(name: str) -> Callable:
    """The function of a file. Raises InputError where it is not there, or does not take three arguments."""
    source = source_of(name)
    assert source is not None, name
    content = vars(_module(source.path, source.text))
    function = content.get(source.function)
    if not callable(function):
        there = [word for word, value in content.items() if callable(value) and not word.startswith("_")]
        most_like = nearest(source.function, there)
        raise InputError(f"{source.path} has no function {source.function!r}; the nearest name is {most_like}")
    try:
        inspect.signature(function).bind("channels", "classes", "size")
    except TypeError:
        takes = inspect.signature(function)
        raise InputError(f"{name} takes {takes}; it is to take (channels, classes, size)") from None
    return function


@functools.cache
def _module(path: Path, text: str) -> ModuleType:
    """A file, run once. What it imports may lie beside it."""
    spec = importlib.util.spec_from_file_location(f"network {path.stem}", path)
    assert spec is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look there
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # last: nothing there may hide what is installed
    with _refusing(f"{path} cannot be imported", path):
        exec(compile(text, path, "exec"), vars(module))
    return module


@contextlib.contextmanager
def _refusing(sentence: str, path: Path | None = None) -> Iterator[None]:
    """What other code raises becomes an InputError: the sentence, what it was, and in which line of the file."""
    try:
        yield
    except InputError:
        raise
    except (Exception, SystemExit) as error:
        if isinstance(error, Exception) and is_of_memory(error):
            raise
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise InputError(f"{sentence}: {said}{f' (line {lines[-1]})' if lines else ''}") from error


def _fitting(made: Made):
    source = source_of(made.name)
    return _refusing(f"{made.name} does not fit {made.images}", source.path if source else None)


# ---------------------------------------------------------------------------------------------- trying it out


@functools.cache
def _tried(made: Made) -> str | None:
    """Where in the network the linear layer is whose output the logits are; None where there is none.

    Raises InputError for a network that is not one for these images and classes.
    """
    net, again, other = (_drawn(made, seed, "trial") for seed in (0, 0, 1))
    if not any(parameter.requires_grad for parameter in net.parameters()):
        raise InputError(f"{made.name} has no parameters to train")
    if not _are_equal(net, again) or _are_equal(net, other):
        raise InputError(
            f"{made.name} does not draw its weights from torch's generator as it finds it, so that no seed decides them"
        )
    last: list = [None, None]
    for where, layer in net.named_modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_hook(lambda _, inputs, out, where=where: last.__setitem__(slice(2), (where, out)))
    images = _images(made)
    for training, n in ((True, 2), (False, 1)):
        x = images[:n].clone()
        with seeded(0, "trial"), _fitting(made), torch.no_grad():
            logits = net.train(training)(x)
        found = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        if found != [n, made.num_classes]:
            when = "training" if training else "evaluation"
            wanted = [n, made.num_classes]
            raise InputError(f"{made.name} gives {found} in {when}, for {n} images, not a tensor of shape {wanted}")
        if not torch.equal(x, images[:n]):
            raise InputError(f"{made.name} changes the images that it is given, as by an operation in place")
    where, out = last
    return where if out is not None and torch.equal(out, logits) else None


@functools.cache
def _found_flat(made: Made) -> str | None:
    """:func:`flat_problem` of a network of other code."""
    net, x = _drawn(made, 0, "trial"), _images(made)
    before = {name: buffer.clone() for name, buffer in _constants(net)}
    others = dict(_constants(_drawn(made, 1, "trial")))
    with seeded(0, "trial"), torch.no_grad():
        state = torch.get_rng_state()
        first = net(x)
        for name, buffer in _constants(net):
            if not torch.equal(buffer, before[name]):
                return f"changes a buffer in training, {name}"
            if not torch.equal(buffer, others[name]):
                return f"has random numbers in a buffer, {name}, which is no parameter"
        if not torch.equal(state, torch.get_rng_state()) or not torch.equal(first, net(x)):
            return "draws random numbers in training, as dropout does"
        if not any(isinstance(child, _BatchNorm) for child in net.modules()):
            alone = torch.full_like(first[:1], torch.nan)  # where it cannot do with one image
            with contextlib.suppress(ValueError, RuntimeError):
                alone = net(x[:1])
            if not torch.allclose(alone, first[:1], rtol=1e-3, atol=1e-3 * first.abs().max().item()):
                return "gives an image other logits beside other images, and not by a layer of BatchNorm"
    for name, parameter in net.named_parameters():
        if not parameter.requires_grad:
            return f"has a parameter that is not to be trained, {name}"
    try:
        copy.deepcopy(net).to("meta")(x.to("meta"))
    except Exception as error:
        if is_of_memory(error):
            raise
        return f"keeps tensors that are neither parameters nor buffers, or looks at numbers ({_first_line(error)})"
    try:
        numbers = [x.requires_grad_(), *net.parameters()]
        loss = F.cross_entropy(net(x), torch.arange(len(x)) % made.num_classes)
        gradients = torch.autograd.grad(loss, numbers, create_graph=True, materialize_grads=True)
        slope = torch.stack([gradient.square().sum() for gradient in gradients]).sum()
        torch.autograd.grad(slope, numbers, materialize_grads=True)
    except RuntimeError as error:
        if is_of_memory(error):
            raise
        return f"has no second derivatives ({_first_line(error)})"
    return None


def _constants(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The buffers by name, but for BatchNorm's running statistics."""
    for prefix, child in module.named_modules():
        if not isinstance(child, _BatchNorm):
            yield from child.named_buffers(prefix, recurse=False)


def _are_equal(net: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), other.state_dict().values()))


def _images(made: Made) -> Tensor:
    """Two images of random numbers."""
    return torch.randn(2, made.channels, *made.size, generator=generator(0, "trial"))


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)[:200]
