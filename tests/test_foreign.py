"""Networks of other code: those that a function of a file makes, and torchvision's."""

import logging

import pytest
import torch
import torch.nn.functional as F
from helpers import slow
from torch import nn

from pad.data.augment import NoAugmentation
from pad.difficulty.training import ScoringSettings, ScoringTraining
from pad.errors import InputError
from pad.evaluation import Case, Evaluation, Protocol
from pad.nn import derivatives
from pad.nn.flat import FlatModel
from pad.nn.foreign import Foreign, flat_problem
from pad.nn.fused import FusedConvNet
from pad.nn.networks import Network, build, evaluation_pool, refuse_without_features
from pad.store.naming import folder_of, network_name
from pad.store.run import run_folder
from pad.store.trajectories import buffer_folder

FILE = '''
"""Networks for tests."""
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import beside
from pad.nn.networks import InstanceNorm, Network


class Net(nn.Module):
    """One linear layer."""

    def __init__(self, channels, classes, size):
        super().__init__()
        self.head = nn.Linear(channels * size[0] * size[1], classes)

    def forward(self, x):
        return self.head(x.flatten(1))


class Shared(nn.Module):
    """Layers that share a kernel, and a constant."""

    def __init__(self, channels, classes, size):
        super().__init__()
        self.first = nn.Conv2d(channels, 4, 3, padding=1)
        self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.b.weight = self.a.weight
        self.register_buffer("scale", torch.tensor(0.5))
        self.head = nn.Linear(4, classes)

    def forward(self, x):
        x = self.first(x * self.scale).tanh()
        return self.head((x + self.b(self.a(x).tanh())).mean((2, 3)))


@dataclass
class Width:
    of: int = beside.WIDTH


def lazy(channels, classes, size):
    return nn.Sequential(nn.Conv2d(channels, Width().of, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(classes))


def blocks(channels, classes, size):
    block = [nn.Conv2d(channels, 8, 3, padding=1), InstanceNorm(8), nn.ReLU(), nn.AvgPool2d(2)]
    return Network([nn.Sequential(*block)], 8 * (size[0] // 2) * (size[1] // 2), classes)


def recurrent(channels, classes, size):
    class Rows(Net):
        def __init__(self):
            super().__init__(1, classes, (1, 8))
            self.rows = nn.LSTM(channels * size[1], 8, batch_first=True)

        def forward(self, x):
            return self.head(self.rows(x.transpose(1, 2).flatten(2))[0][:, -1])

    return Rows()


def convolutional(channels, classes, size):
    return nn.Sequential(nn.Conv2d(channels, classes, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())


class Norm(nn.Sequential):
    def __init__(self, channels, classes, size):
        body = [nn.Conv2d(channels, 4, 3, 2), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()]
        super().__init__(*body, nn.Linear(16, classes))


# ---- fit for evaluation alone


class Dropout(Net):
    def forward(self, x):
        return self.head(F.dropout(x.flatten(1), 0.5, self.training))


def layer_of_dropout(channels, classes, size):
    return nn.Sequential(nn.Dropout(0.2), Net(channels, classes, size))


class Mixing(Net):
    def forward(self, x):
        return super().forward(x - x.mean(0))


class Statistics(Net):
    """A norm over the batch without a layer of it, which refuses a single image in training."""

    def __init__(self, channels, classes, size):
        super().__init__(channels, classes, (1, 1))

    def forward(self, x):
        x = x.mean((2, 3))
        return super().forward(F.batch_norm(x, None, None, training=True) if self.training else x)


class Attribute(Net):
    def forward(self, x):
        self.one = torch.ones(1) if not hasattr(self, "one") else self.one
        return super().forward(x * self.one)


class Looking(Net):
    def forward(self, x):
        return super().forward(x if x.sum() > 0 else -x)


class Counting(Net):
    def __init__(self, *shape):
        super().__init__(*shape)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        self.count += self.training
        return super().forward(x)


class RandomBuffer(Net):
    def __init__(self, *shape):
        super().__init__(*shape)
        self.register_buffer("mask", torch.rand(shape[2]))


class Frozen(Net):
    def __init__(self, *shape):
        super().__init__(*shape)
        self.head.bias.requires_grad_(False)


class Attention(Net):  # torch's kernel for it has first derivatives only
    def forward(self, x):
        return super().forward(F.scaled_dot_product_attention(x, x, x))


# ---- fit for nothing


class Numpys(Net):
    def __init__(self, *shape):
        super().__init__(*shape)
        self.head.bias.data.copy_(torch.from_numpy(np.random.rand(shape[1])))


class Seeded(Net):
    def __init__(self, *shape):
        torch.manual_seed(0)
        super().__init__(*shape)


class Changing(Net):
    def forward(self, x):
        return super().forward(x.relu_())


class Squeezing(Net):
    def forward(self, x):
        return super().forward(x).squeeze()


class Pair(Net):
    def forward(self, x):
        return super().forward(x), x


def wide(channels, classes, size):
    return Net(channels, classes + 1, size)


def grey(channels, classes, size):
    return Net(1, classes, size)


def pooled(channels, classes, size):
    return nn.Sequential(nn.MaxPool2d(16), Net(channels, classes, (2, 2)))


def failing(channels, classes, size):
    raise KeyError("it is not ready")


def two(channels, classes):
    return Net(channels, classes, (8, 8))


def numbers(channels, classes, size):
    return [1, 2]


def empty(channels, classes, size):
    return nn.Flatten()


constant = 3
'''


@pytest.fixture()
def file(tmp_path):
    (tmp_path / "beside.py").write_text("WIDTH = 4\n")
    (tmp_path / "net.py").write_text(FILE)
    return tmp_path / "net.py"


def made(file, function, channels=3, seed=0):
    return build(f"{file}:{function}", channels, 5, (8, 8), seed)


def images(n=3, dtype=torch.float32):
    return torch.randn(n, 3, 8, 8, dtype=dtype, generator=torch.Generator().manual_seed(1))


# ---- names


def test_a_name_says_no_folder_but_the_text(file, tmp_path, monkeypatch):
    name = network_name(f"{file}:lazy")
    assert name == network_name(name) and name.startswith("net.py:lazy@") and len(name) == len("net.py:lazy@") + 8
    monkeypatch.chdir(tmp_path)
    assert network_name("net.py:lazy") == name
    copy = tmp_path / "elsewhere" / "net.py"
    copy.parent.mkdir()
    copy.write_bytes(FILE.replace("\n", "\r\n").encode())
    assert network_name(f"{copy}:lazy") == name
    copy.write_text(FILE.replace("AdaptiveAvgPool2d(1)", "AdaptiveMaxPool2d(1)"))
    assert network_name(f"{copy}:lazy") != name
    assert network_name("ConvNetD4") == "ConvNetD4" and network_name("torchvision:resnet18") == "torchvision:resnet18"


def test_a_recorded_name_is_looked_for_and_compared(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="there is no file gone.py; name the file where it lies, as path/to/gone.py:f"):
        network_name("gone.py:f@0123abcd")
    with pytest.raises(InputError, match="net.py is not the file any more that it was in net.py:lazy@0123abcd"):
        network_name("net.py:lazy@0123abcd")


@pytest.mark.parametrize("name", ["net.py", "net.py:"])
def test_a_file_without_a_function_is_refused(name):
    with pytest.raises(InputError, match=f"{name} names no function: write net.py:function"):
        network_name(name)


@pytest.mark.parametrize(
    "name, folder",
    [
        ("a/net.py:tiny", "net.tiny"),
        ("net.py:tiny@0123abcd", "net.tiny"),
        ("torchvision:resnet18", "torchvision-resnet18"),
        ("ConvNetD4W32BN", "ConvNetD4W32BN"),
    ],
)
def test_a_name_is_one_folder(name, folder):
    assert folder_of(name) == folder
    assert run_folder("runs", "Tiny", 1, name, "a").parts == ("runs", "Tiny", "1", folder, "a")
    assert buffer_folder("experts", "Tiny", name, zca=True).parts == ("experts", "Tiny", folder)


def test_a_pool_of_a_network_of_other_code_keeps_its_name():
    for name in ("net.py:tinyBN@0123abcd", "torchvision:resnet18"):
        assert evaluation_pool("S", name) == [name]
        assert evaluation_pool("C", name) == [name, "ConvNet"]


# ---- what is built


@pytest.mark.parametrize("function", ["Net", "Shared", "lazy", "recurrent", "Norm"])
def test_a_network_is_what_the_function_makes_from_the_seed_alone(file, function):
    before = torch.get_rng_state()
    net, again, other = (made(file, function, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert isinstance(net, Foreign) and net.training
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters()))
    assert not all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters()))
    x = images()
    net.eval()
    with torch.no_grad():
        assert net(x).shape == (3, 5) and torch.equal(net(x), net.net(x))
        h, logits = net.features(x), net(x)
        (block,) = net.blocks(x)
    weight, bias = list(net.parameters())[-2:] if function != "recurrent" else list(net.parameters())[:2]
    assert torch.equal(net.classifier.weight, weight) and torch.equal(block, h)
    torch.testing.assert_close(h.double() @ weight.double().T + bias.double(), logits.double(), rtol=1e-5, atol=1e-5)


def test_statistics_of_a_built_network_are_untouched(file):
    norm = made(file, "Norm").net[1]
    assert norm.num_batches_tracked == 0 and (norm.running_mean == 0).all()


def test_a_network_of_blocks_has_the_kernels_of_one(file):
    net = made(file, "blocks")
    assert type(net) is Network and net.depth == 1 and FusedConvNet.fits(net)
    assert flat_problem(net) is None


def test_what_needs_blocks_or_features_names_the_network_without(file):
    with pytest.raises(InputError, match="depth_ratio: net.py:Net@.* does not say what its blocks are"):
        _ = made(file, "Net").depth
    net = made(file, "convolutional")
    assert net(images()).shape == (3, 5)
    with pytest.raises(InputError, match="net.py:convolutional@.* does not end in a linear layer"):
        refuse_without_features(net)


def test_a_file_is_run_once(file, tmp_path):
    ran = tmp_path / "ran"
    file.write_text(f"print('ran', file=open({str(ran)!r}, 'a'))\n" + FILE)
    for function in ("Net", "lazy", "Net"):
        made(file, function)
    assert ran.read_text() == "ran\n"


# ---- as a function of flat parameters


@pytest.mark.parametrize("function", ["Shared", "recurrent", "Norm", "blocks"])
def test_flat_derivatives_are_those_of_the_module(file, function):
    net = made(file, function).double()
    assert flat_problem(net) is None
    model, x = FlatModel(net), images(dtype=torch.float64)
    theta, p = model.flatten(net), torch.eye(5, dtype=torch.float64)[:3]
    parameters = list(net.parameters())
    loss = F.cross_entropy(net(x.requires_grad_()), p)
    gradients = torch.autograd.grad(loss, parameters, create_graph=True)
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    lam = torch.linspace(-1, 1, len(flat), dtype=torch.float64)
    h_theta = torch.cat([h.flatten() for h in torch.autograd.grad(flat @ lam, parameters, retain_graph=True)])
    (h_x,) = torch.autograd.grad(flat @ lam, x)
    assert len(theta) == len(flat) == model.num_parameters
    torch.testing.assert_close(model.grad(theta, x, p), flat.detach())
    slope, *found, _ = model.hvp(theta, x.detach(), p, lam)
    torch.testing.assert_close([slope, *found], [(flat @ lam).detach(), h_theta, h_x])


def test_gradients_of_several_networks_are_those_of_each(file):
    nets = [made(file, "recurrent", seed=seed) for seed in (0, 1)]
    model, x, p = FlatModel(nets[0]), images(), torch.eye(5)[:3]
    thetas = torch.stack([model.flatten(net) for net in nets])
    found = model.grads(thetas, torch.stack([x, -x]), torch.stack([p, p]))
    expected = [model.grad(theta, each, p) for theta, each in zip(thetas, (x, -x))]
    torch.testing.assert_close(found, torch.stack(expected))


@pytest.mark.parametrize(
    "function, problem",
    [
        ("Dropout", "it draws random numbers in training, as dropout does"),
        ("layer_of_dropout", "it has dropout"),
        ("Mixing", "it gives an image other logits beside other images"),
        ("Statistics", "it gives an image other logits beside other images"),
        ("Attribute", "it keeps tensors that are neither parameters nor buffers"),
        ("Looking", "it keeps .*, or looks at numbers"),
        ("Counting", "it changes a buffer in training, count"),
        ("RandomBuffer", "it has random numbers in a buffer, mask"),
        ("Frozen", "it has a parameter that is not to be trained, head.bias"),
        ("Attention", "it has no second derivatives"),
    ],
)
def test_what_is_no_function_of_its_parameters_is_evaluated_alone(file, function, problem):
    with pytest.raises(InputError, match=f"net.py:{function}@.* can be evaluated, but be no expert .*: {problem}"):
        FlatModel(made(file, function))
    name = network_name(f"{file}:{function}")
    protocol = Protocol(NoAugmentation(), epochs=1, together=2)
    evaluation = Evaluation(protocol=protocol, test_images=images(), test_labels=torch.arange(3))
    training_set = images(5), torch.eye(5)
    case = Case(network=name, training_set=lambda j: training_set, lr=0.01)
    (first,) = evaluation.run([case], 2)
    torch.rand(3)  # dropout is drawn from streams of its own
    (again,) = evaluation.run([case], 2)
    assert first.accuracies == again.accuracies


def test_training_with_dropout_is_a_function_of_the_seed(file):
    protocol, training_set = Protocol(NoAugmentation(), epochs=3), (images(5), torch.eye(5))

    def trained(seed):
        net = made(file, "Dropout")
        torch.rand(seed + 1)  # whatever was drawn before
        protocol.train(None, [net], [training_set], 0.1, [torch.Generator().manual_seed(seed)])
        return net.net.head.weight.detach()

    assert torch.equal(trained(0), trained(0)) and not torch.equal(trained(0), trained(1))


def test_scoring_with_dropout_is_a_function_of_the_seed(file):
    settings = ScoringSettings(network_name(f"{file}:Dropout"), epochs=2)
    found = []
    for drawn in range(2):
        torch.rand(drawn + 1)
        training = ScoringTraining(images(6), torch.arange(6) % 5, 5, settings, 0)
        found.append(training.train(0).classifier.weight)
    assert torch.equal(*found)


def test_code_that_torch_cannot_compile_runs_as_it_is(caplog):
    def broken(x):
        torch._dynamo.graph_break()
        return 2 * x

    double = derivatives._compiled(broken, lambda x: x + x)
    with caplog.at_level(logging.WARNING, "pad"):
        assert [double(torch.ones(())).item() for _ in range(2)] == [2, 2]
    assert len(caplog.records) == 1 and "torch.compile cannot take this network" in caplog.text


# ---- what is refused


@pytest.mark.parametrize(
    "function, reason",
    [
        ("Numpys", "does not draw its weights from torch's generator as it finds it"),
        ("Seeded", "does not draw its weights from torch's generator as it finds it"),
        ("Changing", "changes the images that it is given"),
        ("Squeezing", r"gives \[5\] in evaluation, for 1 images, not a tensor of shape \[1, 5\]"),
        ("Pair", "gives tuple in training"),
        ("wide", r"gives \[2, 6\] in training, for 2 images, not a tensor of shape \[2, 5\]"),
        ("grey", r"does not fit images of 3 x 8 x 8 \(channels x height x width\): RuntimeError: mat1 .*\(line \d+\)"),
        ("pooled", "does not fit images of 3 x 8 x 8"),
        ("failing", r"cannot be made for images of 3 x 8 x 8 .*: KeyError: 'it is not ready' \(line \d+\)"),
        ("two", r"takes \(channels, classes\); it is to take \(channels, classes, size\)"),
        ("numbers", "gives a list, not an nn.Module"),
        ("empty", "has no parameters to train"),
        ("Nett", "has no function 'Nett'; the nearest name is Net"),
        ("constant", "has no function 'constant'"),
    ],
)
def test_a_function_that_makes_no_such_network_is_refused(file, function, reason):
    before = torch.get_rng_state()
    with pytest.raises(InputError, match=reason) as error:
        made(file, function)
    assert f"net.py:{function}" in str(error.value) or str(file) in str(error.value)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "text, reason",
    [
        ("import nowhere", r"ModuleNotFoundError: No module named 'nowhere' \(line 1\)"),
        ("\ndef f(:", r"SyntaxError: .*line 2\)"),
        ("import sys\nsys.exit(3)", r"SystemExit: 3 \(line 2\)"),
    ],
)
def test_a_file_that_cannot_be_run_is_refused(tmp_path, text, reason):
    (tmp_path / "bad.py").write_text(text)
    with pytest.raises(InputError, match=rf"bad\.py cannot be imported: {reason}"):
        made(tmp_path / "bad.py", "f")


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(InputError, match="there is no file .*none.py"):
        made(tmp_path / "none.py", "f")
    (tmp_path / "folder.py").mkdir()
    with pytest.raises(InputError, match="cannot read .*folder.py: Is a directory"):
        made(tmp_path / "folder.py", "f")
    (tmp_path / "coded.py").write_bytes(b"x = '\xff'")
    with pytest.raises(InputError, match="cannot read .*coded.py"):
        made(tmp_path / "coded.py", "f")


# ---- torchvision


@pytest.mark.slow
def test_torchvisions_networks():
    from torchvision.models import resnet18

    net, x = build("torchvision:resnet18", 3, 7, (32, 32), 0).eval(), torch.randn(2, 3, 32, 32)
    plain = resnet18(num_classes=7).eval()
    plain.load_state_dict(net.net.state_dict())
    with torch.no_grad():
        assert torch.equal(net(x), plain(x)) and net.features(x).shape == (2, 512)
    assert flat_problem(net) is None and flat_problem(build("torchvision:squeezenet1_1", 3, 7, (32, 32), 0))
    assert "as dropout does" in flat_problem(build("torchvision:convnext_tiny", 3, 7, (32, 32), 0))


@pytest.mark.parametrize(
    "name, channels, reason",
    [
        ("resnet19", 3, "torchvision has no classifier 'resnet19'; the nearest name is torchvision:resnet18"),
        ("raft_large", 3, "torchvision has no classifier 'raft_large'"),
        ("resnet18", 1, "torchvision:resnet18 takes images of 3 channels, as all of torchvision, not of 1"),
        slow("googlenet", 3, r"torchvision:googlenet gives GoogLeNetOutputs in training, .* not a tensor"),
        slow("vit_b_16", 3, "torchvision:vit_b_16 does not fit images of 3 x 32 x 32 .*Wrong image height"),
    ],
)
def test_what_torchvision_does_not_have_is_refused(name, channels, reason):
    with pytest.raises(InputError, match=reason):
        build(f"torchvision:{name}", channels, 10, (32, 32), 0)


def test_a_layer_of_dropout_that_drops_nothing_is_none():
    assert flat_problem(nn.Sequential(nn.Dropout(0.0))) is None
