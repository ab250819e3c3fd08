import math

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call, grad, jvp, replace_all_batch_norm_modules_

from pad.errors import InputError
from pad.nn.networks import FAMILIES, NAMES, Network, build, evaluation_pool
from pad.rng import seeded

RGB32, RGB64, GREY28 = (3, (32, 32)), (3, (64, 64)), (1, (28, 28))


def network(name, kind=RGB32, num_classes=10, seed=0):
    return build(name, kind[0], num_classes, kind[1], seed)


def images(kind, n=2, dtype=torch.float64):
    return torch.randn(n, kind[0], *kind[1], dtype=dtype, generator=torch.Generator().manual_seed(1))


def shapes(net):
    return [tuple(parameter.shape) for parameter in net.parameters()]


def count(net):
    return sum(parameter.numel() for parameter in net.parameters())


# --- parameter order and shapes: what published trajectories are read by --------------------------


def conv(before, width, kernel, bias=True):
    return [(width, before, kernel, kernel)] + ([(width,)] if bias else [])


def linear(before, width):
    return [(width, before), (width,)]


def norm(width):
    return [(width,), (width,)]


def convnet_shapes(channels, depth, features, classes):
    first = conv(channels, 128, 3) + norm(128)
    return first + (depth - 1) * (conv(128, 128, 3) + norm(128)) + linear(features, classes)


def vgg_shapes(channels):
    widths = [channels, 64, 128, 256, 256, 512, 512, 512, 512]
    layers = [conv(a, b, 3) + norm(b) for a, b in zip(widths, widths[1:])]
    return sum(layers, []) + linear(512, 10)


def resnet_shapes(channels, features, classes):
    expected = conv(channels, 64, 3, bias=False) + norm(64)
    for before, width in ((64, 64), (64, 128), (128, 256), (256, 512)):
        expected += conv(before, width, 3, False) + norm(width) + conv(width, width, 3, False) + norm(width)
        if before != width:
            expected += conv(before, width, 1, False) + norm(width)
        expected += 2 * (conv(width, width, 3, False) + norm(width))
    return expected + linear(features, classes)


ALEXNET = conv(3, 128, 5) + conv(128, 192, 5) + conv(192, 256, 3) + conv(256, 192, 3) + conv(192, 192, 3)
LENET = conv(3, 6, 5) + conv(6, 16, 5) + linear(400, 120) + linear(120, 84) + linear(84, 10)


@pytest.mark.parametrize(
    "name, kind, classes, expected",
    [
        ("ConvNet", RGB32, 10, convnet_shapes(3, 3, 2048, 10)),
        ("ConvNetBN", RGB32, 100, convnet_shapes(3, 3, 2048, 100)),
        ("ConvNet", GREY28, 10, convnet_shapes(1, 3, 2048, 10)),
        ("ConvNetD4", RGB64, 200, convnet_shapes(3, 4, 2048, 200)),
        ("ConvNetD7", (3, (128, 128)), 10, convnet_shapes(3, 7, 128, 10)),
        ("MLP", RGB32, 10, linear(3072, 128) + linear(128, 128) + linear(128, 10)),
        ("MLP_Tiny", RGB64, 10, linear(12288, 128) + linear(128, 128) + linear(128, 10)),
        ("LeNet", RGB32, 10, LENET),
        ("LeNet_Tiny", RGB64, 10, LENET),
        ("AlexNet", RGB32, 10, ALEXNET + linear(3072, 10)),
        ("AlexNet_Tiny", RGB64, 10, ALEXNET + linear(3072, 10)),
        ("VGG11", RGB32, 10, vgg_shapes(3)),
        ("VGG11BN", GREY28, 10, vgg_shapes(1)),
        ("VGG11_Tiny", RGB64, 10, vgg_shapes(3)),
        ("ResNet18", RGB32, 10, resnet_shapes(3, 512, 10)),
        ("ResNet18BN_Tiny", RGB64, 200, resnet_shapes(3, 512, 200)),
        ("ResNet18BN_AP", RGB32, 10, resnet_shapes(3, 512 * 16, 10)),
        ("ResNet18_AP", GREY28, 10, resnet_shapes(1, 512 * 9, 10)),
    ],
)
def test_parameters_have_published_order_and_shapes(name, kind, classes, expected):
    with torch.device("meta"):
        assert shapes(network(name, kind, classes)) == expected


@pytest.mark.parametrize(
    "name, kind, total",
    [
        ("ConvNet", RGB32, 320_010),
        ("LeNet", RGB32, 62_006),
        ("LeNet", GREY28, 61_706),
        ("AlexNet", RGB32, 1_872_202),
        ("VGG11", RGB32, 9_231_114),
        ("ResNet18", RGB32, 11_173_962),
    ],
)
def test_parameter_counts_are_the_known_ones(name, kind, total):
    with torch.device("meta"):
        assert count(network(name, kind)) == total


def test_variants_change_one_thing():
    with torch.device("meta"):
        assert shapes(network("ConvNetKIP"))[0] == (1024, 3, 3, 3)
        assert len(shapes(network("ConvNetKIP"))) == len(shapes(network("ConvNetNN"))) == 3 * 2 + 2
        assert shapes(network("ConvNetLN"))[2] == shapes(network("ConvNetLN", GREY28))[2] == (128, 32, 32)
        assert shapes(network("ConvNetLN"))[6] == (128, 16, 16)
        assert shapes(network("ConvNetNP"))[-2] == (10, 128 * 32 * 32)
        for width in (32, 64, 128, 256, 512, 1024):
            assert shapes(network(f"ConvNetW{width}", RGB64))[-2] == (10, width * 8 * 8)
        for depth in range(1, 6):
            assert shapes(network(f"ConvNetD{depth}"))[-2] == (10, 128 * (32 >> depth) ** 2)
        assert shapes(network("ConvNetD4W32BN"))[-2] == (10, 32 * 2 * 2)


# --- what is computed, against a forward pass written out over the bare list of parameters --------


class Parameters:
    """Hands out a network's parameters in order and fails if some are left over."""

    def __init__(self, net):
        self.rest = [parameter.detach() for parameter in net.parameters()]

    def conv(self, x, bias=True, **options):
        return F.conv2d(x, self.rest.pop(0), self.rest.pop(0) if bias else None, **options)

    def linear(self, x):
        return F.linear(x, self.rest.pop(0), self.rest.pop(0))

    def norm(self, x, dims, shape=(1, -1, 1, 1)):
        x = (x - x.mean(dims, keepdim=True)) / (x.var(dims, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return x * self.rest.pop(0).view(shape) + self.rest.pop(0).view(shape)


INSTANCE, BATCH, LAYER = (2, 3), (0, 2, 3), (1, 2, 3)


def convnet(p, x, *, depth=3, dims=INSTANCE, activation=torch.relu, pool=F.avg_pool2d, groups=0):
    for layer in range(depth):
        x = p.conv(x, padding=3 if layer == 0 and x.shape[1] == 1 else 1)
        if groups:
            n, c, h, w = x.shape
            x = x.view(n, groups, -1)
            x = (x - x.mean(2, keepdim=True)) / (x.var(2, unbiased=False, keepdim=True) + 1e-5).sqrt()
            x = x.view(n, c, h, w) * p.rest.pop(0).view(1, -1, 1, 1) + p.rest.pop(0).view(1, -1, 1, 1)
        elif dims:
            x = p.norm(x, dims, (1, *x.shape[1:]) if dims == LAYER else (1, -1, 1, 1))
        x = activation(x)
        x = pool(x, 2) if pool else x
    return p.linear(x.flatten(1))


def lenet(p, x, stride):
    x = F.max_pool2d(p.conv(x, stride=stride, padding=2 if x.shape[1] == 1 else 0).relu(), 2)
    x = F.max_pool2d(p.conv(x).relu(), 2).flatten(1)
    return p.linear(p.linear(p.linear(x).relu()).relu())


def alexnet(p, x, stride):
    x = F.max_pool2d(p.conv(x, stride=stride, padding=4 if x.shape[1] == 1 else 2).relu(), 2)
    x = F.max_pool2d(p.conv(x, padding=2).relu(), 2)
    x = p.conv(p.conv(x, padding=1).relu(), padding=1).relu()
    return p.linear(F.max_pool2d(p.conv(x, padding=1).relu(), 2).flatten(1))


def vgg(p, x, dims, last_stride):
    for layer in range(8):
        x = p.norm(p.conv(x, padding=3 if x.shape[1] == 1 else 1), dims).relu()
        if layer in (0, 1, 3, 5, 7):
            x = F.max_pool2d(x, 2)
    return p.linear(x[:, :, ::last_stride, ::last_stride].flatten(1))


def resnet(p, x, dims, stem, average):
    x = p.norm(p.conv(x, bias=False, stride=stem, padding=1), dims).relu()
    for block in range(8):
        down = block in (2, 4, 6)
        stride = 2 if down and not average else 1
        y = p.norm(p.conv(x, bias=False, stride=stride, padding=1), dims).relu()
        y = F.avg_pool2d(y, 2) if down and average else y
        y = p.norm(p.conv(y, bias=False, padding=1), dims)
        if down:
            x = p.conv(x, bias=False, stride=stride)
            x = p.norm(F.avg_pool2d(x, 2) if average else x, dims)
        x = (x + y).relu()
    return p.linear((x if average else x.mean((2, 3))).flatten(1))


@pytest.mark.parametrize(
    "name, kind, reference",
    [
        ("ConvNet", RGB32, convnet),
        ("ConvNet", GREY28, convnet),
        ("ConvNetD4", RGB64, lambda p, x: convnet(p, x, depth=4)),
        ("ConvNetW32BN", (3, (24, 40)), lambda p, x: convnet(p, x, dims=BATCH)),
        ("ConvNetW32LN", GREY28, lambda p, x: convnet(p, x, dims=LAYER)),
        ("ConvNetGN", RGB32, lambda p, x: convnet(p, x, groups=4)),
        ("ConvNetD2NN", RGB32, lambda p, x: convnet(p, x, depth=2, dims=None)),
        ("ConvNetAS", RGB32, lambda p, x: convnet(p, x, activation=torch.sigmoid)),
        ("ConvNetAL", RGB32, lambda p, x: convnet(p, x, activation=lambda z: torch.where(z > 0, z, 0.01 * z))),
        ("ConvNetMP", RGB32, lambda p, x: convnet(p, x, pool=F.max_pool2d)),
        ("ConvNetW32NP", RGB32, lambda p, x: convnet(p, x, pool=None)),
        ("MLP", RGB32, lambda p, x: p.linear(p.linear(p.linear(x.flatten(1)).relu()).relu())),
        ("LeNet", GREY28, lambda p, x: lenet(p, x, 1)),
        ("LeNet", RGB64, lambda p, x: lenet(p, x, 2)),
        ("AlexNet", GREY28, lambda p, x: alexnet(p, x, 1)),
        ("AlexNet", RGB64, lambda p, x: alexnet(p, x, 2)),
        ("VGG11", RGB64, lambda p, x: vgg(p, x, INSTANCE, 2)),
        ("VGG11BN", GREY28, lambda p, x: vgg(p, x, BATCH, 1)),
        ("ResNet18", RGB64, lambda p, x: resnet(p, x, INSTANCE, 2, False)),
        ("ResNet18BN", RGB32, lambda p, x: resnet(p, x, BATCH, 1, False)),
        ("ResNet18BN_AP", RGB32, lambda p, x: resnet(p, x, BATCH, 1, True)),
    ],
)
def test_forward_is_the_written_out_one(name, kind, reference):
    net, x = network(name, kind).double(), images(kind)
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in net.parameters():  # a norm's default of ones and zeros would hide which layer it belongs to
            parameter += 0.01 * torch.randn(parameter.shape, dtype=torch.float64, generator=draw)
        p = Parameters(net)
        torch.testing.assert_close(net(x), reference(p, x), rtol=1e-9, atol=1e-10)
    assert p.rest == []


@pytest.mark.parametrize("name", [name for name in NAMES if name != "ConvNetD8"])  # D8: refused, below
def test_every_name_builds_at_128_pixels_and_its_pieces_fit_together(name):
    with torch.device("meta"):
        net, x = build(name, 3, 7, (128, 128), 0), torch.empty(2, 3, 128, 128)
        assert net.features(x).shape == (2, net.classifier.in_features)
        assert net(x).shape == (2, 7)


@pytest.mark.parametrize(
    "name, depth",
    [("ConvNetD4W32", 4), ("MLP", 2), ("LeNet", 4), ("AlexNet", 5), ("VGG11", 8), ("ResNet18", 9), ("ResNet18_AP", 9)],
)
def test_blocks_end_in_the_features_the_classifier_sees(name, depth):
    kind = (3, (40, 56))
    net, x = network(name, kind), images(kind, dtype=torch.float32)
    outputs = net.blocks(x)
    assert len(outputs) == depth
    torch.testing.assert_close(outputs[-1].flatten(1), net.features(x), rtol=0, atol=0)
    torch.testing.assert_close(net.classifier(net.features(x)), net(x), rtol=0, atol=0)
    assert isinstance(net.classifier, torch.nn.Linear)


# --- initialisation -------------------------------------------------------------------------------


def test_weights_are_a_function_of_seed_and_index_only():
    before = torch.get_rng_state()
    one = build("ConvNetD2W32", 3, 10, (32, 32), 5, "expert", 3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(7)
    keys = ((5, "expert", 3), (5, "expert", 4), (6, "expert", 3))
    again, other_index, other_seed = (build("ConvNetD2W32", 3, 10, (32, 32), *key) for key in keys)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), again.parameters()))
    assert not torch.equal(one.classifier.weight, other_index.classifier.weight)
    assert not torch.equal(one.classifier.weight, other_seed.classifier.weight)


def test_initialisation_is_torchs_default():
    net = build("ConvNetW256", 3, 100, (32, 32), 0)
    conv, linear = net.body[1][0], net.classifier
    for parameter, fan_in in ((conv.weight, 256 * 9), (linear.weight, 256 * 16), (linear.bias, 256 * 16)):
        bound = 1 / math.sqrt(fan_in)  # uniform on +-bound
        parameter = parameter.detach()
        assert 0.95 * bound < parameter.abs().max() <= bound
        assert parameter.std() == pytest.approx(bound / math.sqrt(3), rel=0.2)
    assert (net.body[0][1].weight == 1).all() and (net.body[0][1].bias == 0).all()


def test_building_leaves_batch_statistics_untouched():
    net = network("ResNet18BN")
    statistics = {key: value for key, value in net.state_dict().items() if "running" in key or "tracked" in key}
    assert statistics and all((value == (1 if key.endswith("var") else 0)).all() for key, value in statistics.items())


# --- derivatives and compilation ------------------------------------------------------------------


def loss_of(net, x):
    labels = torch.arange(len(x)) % 10
    return lambda theta: F.cross_entropy(functional_call(net, theta, (x,)), labels)


@pytest.mark.parametrize(
    "name, kind",
    [
        ("ConvNetD2W8", (3, (8, 8))),
        ("ConvNetD2W8ASLN", (3, (8, 8))),
        ("ConvNetD2W8ALBNMP", (3, (8, 8))),
        ("ConvNetD2W8GNNP", (3, (8, 8))),
        ("ConvNetD2W8NN", GREY28),
        ("MLP", GREY28),
        ("LeNet", GREY28),
        ("AlexNet", (3, (16, 16))),
    ],
)
def test_second_derivatives(name, kind):
    """Forward over reverse against central differences of the gradient, and the gradient against those of the loss."""
    net, x = network(name, kind).double(), images(kind, n=3)
    replace_all_batch_norm_modules_(net)
    theta = {key: value.detach() for key, value in net.named_parameters()}
    draw = torch.Generator().manual_seed(2)
    direction = {key: torch.randn(value.shape, dtype=value.dtype, generator=draw) for key, value in theta.items()}
    loss = loss_of(net, x)

    def step(size):
        return {key: theta[key] + size * direction[key] for key in theta}

    def dot(a, b):
        return sum((a[key] * b[key]).sum() for key in a)

    gradient, product = jvp(grad(loss), (theta,), (direction,))
    eps = 1e-8
    slope = (loss(step(eps)) - loss(step(-eps))) / (2 * eps)
    torch.testing.assert_close(dot(gradient, direction), slope, rtol=1e-4, atol=1e-6)
    ahead, behind = grad(loss)(step(eps)), grad(loss)(step(-eps))
    for key in theta:
        difference = (ahead[key] - behind[key]) / (2 * eps)
        scale = max(difference.abs().max().item(), 1e-3)
        torch.testing.assert_close(product[key], difference, rtol=1e-3, atol=1e-4 * scale)


def front(resnet, num_features):
    """A ResNet's first blocks, two plain and one that halves the image: all of it takes long here."""
    with seeded(0, "test"):
        return Network(list(resnet.body[:4]), num_features, 10)


def test_second_derivatives_of_residual_blocks_agree():
    """Forward over reverse against reverse over reverse: here too many ReLUs switch for finite differences."""
    kind = (3, (16, 16))
    net, x = front(network("ResNet18BN_AP", kind), 128 * 8 * 8).double(), images(kind, n=3)
    replace_all_batch_norm_modules_(net)
    theta = dict(net.named_parameters())
    direction = {key: torch.linspace(-1, 1, v.numel(), dtype=v.dtype).view_as(v) for key, v in theta.items()}
    first = torch.autograd.grad(loss_of(net, x)(theta), theta.values(), create_graph=True)
    expected = torch.autograd.grad(first, theta.values(), direction.values())
    detached = {key: value.detach() for key, value in theta.items()}
    product = jvp(grad(loss_of(net, x)), (detached,), (direction,))[1]
    scale = max(value.abs().max().item() for value in expected)
    for got, wanted in zip(product.values(), expected):
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-10 * scale)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ConvNetD2W8BN", "LeNet", "ResNet18_AP"])
def test_compiles_as_one_graph_with_torch_func_inside(name):
    net, x = network(name), images(RGB32, dtype=torch.float32)
    if name == "ResNet18_AP":
        net = front(net, 128 * 16 * 16)
    replace_all_batch_norm_modules_(net)
    theta = {key: value.detach() for key, value in net.named_parameters()}
    # graph breaks are found while tracing, before any backend
    compiled = torch.compile(grad(loss_of(net, x)), fullgraph=True, dynamic=False, backend="eager")
    expected, got = grad(loss_of(net, x))(theta), compiled(theta)
    for key in theta:
        torch.testing.assert_close(got[key], expected[key], rtol=1e-4, atol=1e-5)


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, nearest",
    [
        ("ConvNett", "ConvNet"),
        ("convnetd4", "ConvNetD4"),
        ("ConvNetD9", "ConvNetD8"),
        ("ConvNetW3", "ConvNetW32"),
        ("ResNet18_BN", "ResNet18BN"),
        ("VGG", "VGG11"),
        ("KIP", "ConvNetKIP"),
        ("", ""),
    ],
)
def test_unknown_name_is_refused_with_the_nearest(name, nearest):
    with pytest.raises(InputError) as error:
        network(name)
    assert repr(name) in str(error.value) and f"nearest name is {nearest}" in str(error.value)


@pytest.mark.parametrize(
    "name, size",
    [
        ("ConvNetD6", (32, 32)),
        ("ConvNetD7", (64, 64)),
        ("ConvNetD8", (128, 128)),
        ("ConvNetD4", (8, 64)),
        ("VGG11", (16, 16)),
        ("LeNet", (8, 8)),
        ("AlexNet", (4, 4)),
        ("ResNet18_AP", (4, 4)),
        ("ResNet18", (8, 8)),
    ],
)
def test_images_too_small_are_refused(name, size):
    with pytest.raises(InputError) as error:
        build(name, 3, 10, size, 0)
    assert name in str(error.value) and f"{size[0]} x {size[1]}" in str(error.value)


def test_tiny_names_are_for_64_pixels():
    with pytest.raises(InputError, match="VGG11_Tiny .* 64 x 64 pixels and these have 32 x 32: name VGG11 instead"):
        network("VGG11_Tiny")
    by_name, by_size = network("LeNet_Tiny", RGB64), network("LeNet", RGB64)
    assert all(torch.equal(a, b) for a, b in zip(by_name.parameters(), by_size.parameters()))


# --- networks of one's own ------------------------------------------------------------------------


def test_a_network_of_ones_own_is_one_line(monkeypatch):
    block = torch.nn.Conv2d
    monkeypatch.setitem(FAMILIES, "MyNet", lambda name, channels, size: [block(channels, 5, 3), block(5, 2, 3)])
    net, x = network("MyNet", num_classes=7), images(RGB32, dtype=torch.float32)
    assert shapes(net) == conv(3, 5, 3) + conv(5, 2, 3) + linear(2 * 28 * 28, 7)
    assert [tuple(output.shape) for output in net.blocks(x)] == [(2, 5, 30, 30), (2, 2, 28, 28)]
    assert torch.equal(net.classifier.weight, network("MyNet", num_classes=7).classifier.weight)
    assert "MyNet" in NAMES and evaluation_pool("C", "MyNet") == ["MyNet", "ConvNet"]
    with pytest.raises(InputError, match="the nearest name is MyNet"):
        network("mynett")
    with pytest.raises(InputError, match="MyNet does not fit images of 4 x 4 pixels"):
        network("MyNet", (3, (4, 4)))


# --- evaluation pools -----------------------------------------------------------------------------


def test_evaluation_pools():
    assert evaluation_pool("S", "ConvNet") == ["ConvNet"]
    assert evaluation_pool("S", "ResNet18BN_AP") == ["ResNet18"]
    assert evaluation_pool("S", "ConvNetD4BN") == ["ConvNetD4"]
    assert evaluation_pool("C", "ConvNetD4") == ["ConvNetD4", "ConvNet"]
    assert evaluation_pool("C", "ConvNet") == ["ConvNet"]
    assert evaluation_pool("M", "ConvNet") == ["ConvNet", "AlexNet", "VGG11", "ResNet18"]
    assert evaluation_pool("W", "ConvNet") == ["ConvNetW32", "ConvNetW64", "ConvNetW128", "ConvNetW256"]
    assert evaluation_pool("D", "ConvNet") == ["ConvNetD1", "ConvNetD2", "ConvNetD3", "ConvNetD4"]
    assert evaluation_pool("A", "ConvNet") == ["ConvNetAS", "ConvNetAR", "ConvNetAL"]
    assert evaluation_pool("P", "ConvNet") == ["ConvNetNP", "ConvNetMP", "ConvNetAP"]
    assert evaluation_pool("N", "ConvNet") == ["ConvNetNN", "ConvNetBN", "ConvNetLN", "ConvNetIN", "ConvNetGN"]
    batch_norm = ["ConvNet", "ConvNetBN", "ResNet18", "ResNet18BN", "AlexNet", "VGG11", "ResNet18_AP"]
    assert evaluation_pool("BN", "ConvNetBN") == batch_norm
    across = ["ConvNet", "ConvNetBN", "ResNet18", "ResNet18BN", "VGG11", "AlexNet", "LeNet", "MLP"]
    assert evaluation_pool("X", "ConvNet") == across
    assert evaluation_pool("Z", "MLP") == ["MLP"]
    assert all(name in NAMES for mode in "MWDAPNX" for name in evaluation_pool(mode, "ConvNet"))
