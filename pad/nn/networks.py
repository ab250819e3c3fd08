"""The published networks by their published names (DC, arXiv 2006.05929; MTT, arXiv 2203.11932; DATM, 2310.05773).

A network is a list of blocks followed by one linear layer. Published trajectories are bare lists of tensors, so the
order in which layers are created below, shallow to deep, and their shapes are part of a file format.

Others are torchvision's, ``torchvision:resnet18``, and those that a function of a file makes, ``file.py:function``
(:mod:`pad.nn.foreign`). A network whose blocks are known is one line more in ``FAMILIES``, before a command is called:

    FAMILIES["MyNet"] = lambda name, channels, size: [nn.Sequential(nn.Conv2d(channels, 32, 3), nn.ReLU())]
"""

import re
from collections.abc import Callable, KeysView, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pad.errors import InputError
from pad.nn.foreign import Foreign, Made, is_foreign, make_foreign
from pad.nn.foreign import flat_problem as flat_problem
from pad.rng import seeded
from pad.store.identity import nearest
from pad.store.naming import network_name

Size = tuple[int, int]  # (H, W)
Family = Callable[[str, int, Size], Sequence[nn.Module]]
Make = Callable[[], nn.Module]

_TINY = "_Tiny"  # published suffix of the 64-pixel forms; here the image size decides, not the name


class InstanceNorm(nn.GroupNorm):
    """Instance normalisation, published as a group norm of as many groups as channels.

    Written out where it is compiled: the native kernels are fast one by one, but one fused formula is faster. The
    variance is taken around ``centre``, which is the mean but does not count as depending on x: of the formula
    E(x - c)^2 - (E(x) - c)^2, right for every c, all derivatives are right too, and nothing cancels.
    """

    def __init__(self, channels: int):
        super().__init__(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            return super().forward(x)
        mean = x.mean((2, 3), keepdim=True)
        centre = mean.detach()
        centred, rest = x - centre, mean - centre
        variance = centred.square().mean((2, 3), keepdim=True) - rest.square()
        scale = (variance + self.eps).rsqrt() * self.weight[:, None, None]
        return centred * scale + (self.bias[:, None, None] - rest * scale)


_NORMS: dict[str, Callable[[tuple[int, ...]], nn.Module]] = {  # each takes the shape (C, H, W) of what it normalises
    "NN": lambda shape: nn.Identity(),
    "BN": lambda shape: nn.BatchNorm2d(shape[0]),
    "LN": nn.LayerNorm,
    "IN": lambda shape: InstanceNorm(shape[0]),
    "GN": lambda shape: nn.GroupNorm(4, shape[0]),
}

_ACTIVATIONS: dict[str, Make] = {"AS": nn.Sigmoid, "AR": nn.ReLU, "AL": partial(nn.LeakyReLU, 0.01)}

_POOLINGS: dict[str, Make] = {"NP": nn.Identity, "MP": partial(nn.MaxPool2d, 2), "AP": partial(nn.AvgPool2d, 2)}

_CONVNET = re.compile(  # widths 8 and 16 are ours, for trials on a laptop; so are combinations such as ConvNetD4W32BN
    r"ConvNet(?:D(?P<depth>[1-8]))?(?:W(?P<width>8|16|32|64|128|256|512|1024))?"
    r"(?P<activation>A[SRL])?(?P<norm>NN|BN|LN|IN|GN)?(?P<pooling>[NMA]P)?"
)


class Network(nn.Module):
    """Blocks one after the other, then a linear layer: ``forward(x) = classifier(features(x))``, x ``[N, C, H, W]``.

    ``made``: what it comes from, where that is a function of a file.
    """

    made: Made | None = None

    def __init__(self, body: Sequence[nn.Module], num_features: int, num_classes: int):
        super().__init__()
        self.body = nn.ModuleList(body)
        self.classifier = nn.Linear(num_features, num_classes)

    @property
    def depth(self) -> int:
        """How many blocks there are."""
        return len(self.body)

    def blocks(self, x: Tensor) -> list[Tensor]:
        """The outputs of all blocks, shallow to deep, each ``[N, ...]``."""
        outputs = []
        for block in self.body:
            x = block(x)
            outputs.append(x)
        return outputs

    def features(self, x: Tensor) -> Tensor:
        """The embedding ``[N, D]`` that the classifier sees: the last block's output, flattened."""
        for block in self.body:
            x = block(x)
        return x.flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x))


AnyNetwork = Network | Foreign


def build(name: str, channels: int, num_classes: int, size: Size, seed: int, *index: int | str) -> AnyNetwork:
    """A freshly initialised network for images ``[N, channels, H, W]``, ``size = (H, W)``, on the CPU.

    Layers have torch's default initialisation, as published, drawn from the stream (seed, "network", index); the global
    generator is left as it was. When both sides have 64 pixels or more, LeNet, AlexNet, VGG11 and ResNet18 take their
    published 64-pixel form, whatever the name; a name ending in _Tiny is for 64 x 64 only. The classifier's input size
    follows from the image size. A :class:`Network` that a function of a file gives is given as it is, other modules as
    a :class:`Foreign`. Raises InputError for a name that is not a network's, and for images that it does not fit.
    """
    name = network_name(name)
    if is_foreign(name):
        made = Made(name, channels, num_classes, (size[0], size[1]))
        net = make_foreign(made, seed, *index)
        if type(net) is not Network:  # a class derived from it may compute something else
            return Foreign(net, made)
        net.made = made
        return net
    base = name.removesuffix(_TINY)
    family = FAMILIES.get(base) or (_convnet if _CONVNET.fullmatch(base) else None)
    if family is None:
        raise InputError(f"there is no network {name!r}; the nearest name is {nearest(name, NAMES)}")
    if base != name and tuple(size) != (64, 64):
        given = f"{size[0]} x {size[1]}"
        raise InputError(f"{name} is for images of 64 x 64 pixels and these have {given}: name {base} instead")
    with seeded(seed, "network", *index):
        body = family(base, channels, size)
        return Network(body, _flat_size(base, body, channels, size), num_classes)


def refuse_without_features(network: AnyNetwork) -> None:
    """Raise InputError for a network that has no features."""
    _ = network.classifier


def evaluation_pool(mode: str, name: str) -> list[str]:
    """The networks that evaluation mode ``mode`` trains on a synthetic set made with network ``name``.

    S: the network itself without batch normalisation (a published name cut at "BN"); C: it and ConvNet; M: four
    architectures; W, D, A, P, N: ConvNets of several widths, depths, activations, poolings, norms; BN: networks with
    and without batch normalisation; X: the eight of PAD's table across architectures (arXiv 2408.03360, Table 2); any
    other mode: the network itself.
    """
    pools = {
        "S": [name if ":" in name else name.partition("BN")[0]],
        "C": list(dict.fromkeys([name, "ConvNet"])),
        "M": ["ConvNet", "AlexNet", "VGG11", "ResNet18"],
        "W": ["ConvNetW32", "ConvNetW64", "ConvNetW128", "ConvNetW256"],
        "D": ["ConvNetD1", "ConvNetD2", "ConvNetD3", "ConvNetD4"],
        "A": ["ConvNetAS", "ConvNetAR", "ConvNetAL"],
        "P": ["ConvNetNP", "ConvNetMP", "ConvNetAP"],
        "N": ["ConvNetNN", "ConvNetBN", "ConvNetLN", "ConvNetIN", "ConvNetGN"],
        "BN": ["ConvNet", "ConvNetBN", "ResNet18", "ResNet18BN", "AlexNet", "VGG11", "ResNet18_AP"],
        "X": ["ConvNet", "ConvNetBN", "ResNet18", "ResNet18BN", "VGG11", "AlexNet", "LeNet", "MLP"],
    }
    return pools.get(mode, [name])


def _flat_size(name: str, body: Sequence[nn.Module], channels: int, size: Size) -> int:
    """Length of ``body``'s flattened output for one image, by a run on the meta device, which computes shapes only."""
    module = nn.Sequential(*body)
    state = {key: value.to("meta") for key, value in module.state_dict().items()}
    image = torch.empty(1, channels, *size, device="meta")
    try:
        with torch.no_grad():
            return torch.func.functional_call(module, state, image).numel()
    except (RuntimeError, ValueError) as error:  # an empty feature map; a norm over one value, whose output is constant
        raise InputError(
            f"{name} does not fit images of {size[0]} x {size[1]} pixels, its feature maps shrink to nothing: "
            "take a shallower network or larger images"
        ) from error


def _stride(size: Size) -> int:
    """The extra stride of the published 64-pixel forms."""
    return 2 if min(size) >= 64 else 1


def _convnet(name: str, channels: int, size: Size) -> Sequence[nn.Module]:
    match = _CONVNET.fullmatch(name)
    assert match is not None, name
    norm, activation, pooling = match["norm"] or "IN", match["activation"] or "AR", match["pooling"] or "AP"
    width = int(match["width"] or 128)
    h, w = size
    body = []
    for depth in range(int(match["depth"] or 3)):
        grow = 2 if depth == 0 and channels == 1 else 0  # 28 x 28 grey images become 32 x 32
        h, w = h + 2 * grow, w + 2 * grow
        body.append(
            nn.Sequential(
                nn.Conv2d(channels if depth == 0 else width, width, 3, padding=1 + grow),
                _NORMS[norm]((width, h, w)),
                _ACTIVATIONS[activation](),
                _POOLINGS[pooling](),
            )
        )
        if pooling != "NP":
            h, w = h // 2, w // 2
    return body


def _mlp(name: str, channels: int, size: Size) -> Sequence[nn.Module]:
    return [
        nn.Sequential(nn.Flatten(), nn.Linear(channels * size[0] * size[1], 128), nn.ReLU()),
        nn.Sequential(nn.Linear(128, 128), nn.ReLU()),
    ]


def _lenet(name: str, channels: int, size: Size) -> Sequence[nn.Module]:
    padding = 2 if channels == 1 else 0
    body = [
        nn.Sequential(nn.Conv2d(channels, 6, 5, _stride(size), padding), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Sequential(nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2)),
    ]
    num_features = _flat_size(name, body, channels, size)
    body.append(nn.Sequential(nn.Flatten(), nn.Linear(num_features, 120), nn.ReLU()))
    body.append(nn.Sequential(nn.Linear(120, 84), nn.ReLU()))
    return body


def _alexnet(name: str, channels: int, size: Size) -> Sequence[nn.Module]:
    padding = 4 if channels == 1 else 2
    return [
        nn.Sequential(nn.Conv2d(channels, 128, 5, _stride(size), padding), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Sequential(nn.Conv2d(128, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Sequential(nn.Conv2d(192, 256, 3, padding=1), nn.ReLU()),
        nn.Sequential(nn.Conv2d(256, 192, 3, padding=1), nn.ReLU()),
        nn.Sequential(nn.Conv2d(192, 192, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
    ]


def _vgg11(name: str, channels: int, size: Size) -> Sequence[nn.Module]:
    norm = _NORMS["BN" if name.endswith("BN") else "IN"]
    body: list[nn.Sequential] = []
    before = channels
    for width, pooled in ((64, 1), (128, 1), (256, 0), (256, 1), (512, 0), (512, 1), (512, 0), (512, 1)):
        padding = 3 if before == 1 else 1
        pools = [nn.MaxPool2d(2)] if pooled else []
        body.append(nn.Sequential(nn.Conv2d(before, width, 3, padding=padding), norm((width,)), nn.ReLU(), *pools))
        before = width
    body[-1].append(nn.AvgPool2d(1, _stride(size)))
    return body


class _Residual(nn.Module):
    """A residual block of two convolutions; ``average`` (the _AP networks): 2 x 2 average pools in place of strides."""

    def __init__(self, before: int, width: int, norm, average: bool):
        super().__init__()
        down = before != width
        stride = 2 if down and not average else 1
        pool = nn.AvgPool2d(2) if down and average else nn.Identity()
        self.main = nn.Sequential(
            nn.Conv2d(before, width, 3, stride, padding=1, bias=False),
            norm((width,)),
            nn.ReLU(),
            pool,
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            norm((width,)),
        )
        shortcut: nn.Module = nn.Identity()
        if down:
            shortcut = nn.Sequential(nn.Conv2d(before, width, 1, stride, bias=False), pool, norm((width,)))
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.main(x) + self.shortcut(x))


def _resnet18(name: str, channels: int, size: Size) -> Sequence[nn.Module]:
    norm = _NORMS["BN" if "BN" in name else "IN"]
    average = name.endswith("_AP")
    stride = 1 if average else _stride(size)  # the _AP networks have no 64-pixel form: their feature maps just grow
    body: list[nn.Module] = [
        nn.Sequential(nn.Conv2d(channels, 64, 3, stride, padding=1, bias=False), norm((64,)), nn.ReLU())
    ]
    before = 64
    for width in (64, 64, 128, 128, 256, 256, 512, 512):
        body.append(_Residual(before, width, norm, average))
        before = width
    if not average:
        body[-1] = nn.Sequential(body[-1], nn.AdaptiveAvgPool2d(1))
    return body


_SUFFIXES = "D1 D2 D3 D4 D5 D6 D7 D8 W32 W64 W128 W256 W512 W1024 AS AR AL NN BN LN IN GN NP MP AP D4BN"

# Name -> function(name, channels, size) -> blocks, shallow to deep. The first takes images [N, channels, H, W] with
# size = (H, W). Each is an nn.Module without dropout and gives a tensor [N, ...]; `build` flattens the last one's and
# adds the linear layer. The layers' constructors draw the weights, from build's seed. A name does not end in "_Tiny".
# In mode S evaluation takes what stands before "BN" in it. ConvNets that are not here are built from their names.
FAMILIES: dict[str, Family] = {
    "ConvNet": _convnet,
    **{f"ConvNet{suffix}": _convnet for suffix in _SUFFIXES.split()},
    "ConvNetKIP": lambda name, channels, size: _convnet("ConvNetW1024NN", channels, size),
    "MLP": _mlp,
    "LeNet": _lenet,
    "AlexNet": _alexnet,
    "VGG11": _vgg11,
    "VGG11BN": _vgg11,
    "ResNet18": _resnet18,
    "ResNet18BN": _resnet18,
    "ResNet18_AP": _resnet18,
    "ResNet18BN_AP": _resnet18,
}

NAMES: KeysView[str] = FAMILIES.keys()  # what is added to FAMILIES is among them
