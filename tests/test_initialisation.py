import pytest
import torch
from torch import nn

from pad import initialisation
from pad.data.augment import NoAugmentation
from pad.errors import InputError
from pad.initialisation import Experts, averaged_logits, class_order, initial_set, predicted_correctly
from pad.matching.loss import matching_loss
from pad.matching.unroll import inner_steps, unrolled_gradients
from pad.nn.flat import FlatModel

K, PER_CLASS, SHAPE = 3, 40, (1, 2, 3)


class Linear(nn.Module):
    def __init__(self, norm=False):
        super().__init__()
        self.norm = nn.BatchNorm1d(6) if norm else nn.Identity()
        self.classifier = nn.Linear(6, K)

    def forward(self, x):
        return self.classifier(self.norm(x.flatten(1)))


@pytest.fixture
def task():
    """Images around three centres, in random order, and four experts that are right about different ones."""
    rng = torch.Generator().manual_seed(0)
    labels = (torch.arange(K * PER_CLASS) % K)[torch.randperm(K * PER_CLASS, generator=rng)]
    centres = torch.randn(K, *SHAPE, generator=rng, dtype=torch.float64)
    images = centres[labels] + 0.8 * torch.randn(len(labels), *SHAPE, generator=rng, dtype=torch.float64)
    thetas = [0.7 * torch.randn(6 * K + K, generator=rng, dtype=torch.float64) for _ in range(4)]
    for theta in thetas:  # somewhat right about every class
        theta[: 6 * K] += centres.flatten()
    return images, labels, thetas


def experts(thetas, asked=None):
    def parameters(k):
        if asked is not None:
            asked.append(k)
        return thetas[k]

    return Experts(FlatModel(Linear()), parameters, len(thetas))


def plain_logits(theta, image):
    weight, bias = theta[: 6 * K].view(K, 6), theta[6 * K :]
    return torch.stack([(weight[c] * image.flatten()).sum() + bias[c] for c in range(K)])


def is_right(theta, image, c):
    return int(plain_logits(theta, image).argmax()) == c


def plain_choice(thetas, images, rows, ipc):
    """Class by class, expert by expert, image by image."""
    result, used = [], 0
    for c, row in enumerate(rows):
        picked, remaining = [], row.tolist()
        for k, theta in enumerate(thetas):
            still = []
            for i in remaining:
                if len(picked) < ipc and is_right(theta, images[i], c):
                    picked.append(i)
                    used = max(used, k)
                else:
                    still.append(i)
            remaining = still
        result += picked
    return result, used


@pytest.mark.parametrize("batch", [256, 7, 1])
@pytest.mark.parametrize("ipc", [1, 10, 25, 31])
def test_images_are_those_a_plain_search_finds(task, monkeypatch, ipc, batch):
    monkeypatch.setattr(initialisation, "_BATCH", batch)
    images, labels, thetas = task
    rows = class_order(labels, K, ipc, 0)
    expected, last_used = plain_choice(thetas, images, rows, ipc)
    assert len(expected) == K * ipc, "the task itself is wrong"
    asked = []
    found = predicted_correctly(experts(thetas, asked), images, rows, ipc)
    assert found.tolist() == expected
    assert asked == list(range(last_used + 1)), "no expert is loaded that is not needed"
    if ipc == 31:
        assert last_used > 0, "no class ran short"


def test_a_class_that_runs_short_goes_on_with_the_next_expert_over_the_images_that_remain():
    # Class 1's images 10..15; expert 0 gets 11 and 14 right, expert 1 gets 10, 11 and 13, expert 2 all but 15.
    right = {0: {11, 14}, 1: {10, 11, 13}, 2: {10, 11, 12, 13, 14}}
    rows = [torch.arange(0, 4), torch.arange(10, 16)]
    images = torch.arange(16.0).view(16, 1, 1, 1)

    class Model:
        def logits(self, theta, x):
            class_one = [image >= 10 and int(image) in right[int(theta)] for image in x.flatten()]
            return torch.nn.functional.one_hot(torch.tensor(class_one).long(), 2).float()

    crowd = Experts(Model(), lambda k: torch.tensor(k), 3)
    assert predicted_correctly(crowd, images, rows, 4).tolist() == [0, 1, 2, 3, 11, 14, 10, 13]
    for ipc, expected in ((1, [11]), (2, [11, 14]), (3, [11, 14, 10])):
        assert predicted_correctly(crowd, images, rows, ipc).tolist()[ipc:] == expected
    with pytest.raises(InputError, match="the 3 experts classify only 5 images of class 1 correctly, but ipc is 6"):
        predicted_correctly(crowd, images, [torch.arange(0, 7), rows[1]], 6)


def test_the_search_stops_when_it_has_enough(task, monkeypatch):
    monkeypatch.setattr(initialisation, "_BATCH", 6)
    images, labels, _ = task
    asked = []

    class Oracle:
        def logits(self, theta, x):
            asked.append(len(x))
            found = (x[:, None] == images).flatten(2).all(dim=2).int().argmax(dim=1)
            return torch.nn.functional.one_hot(labels[found], K).float()

    found = predicted_correctly(Experts(Oracle(), lambda k: None, 5), images, class_order(labels, K, 5, 0), 5)
    assert labels[found].tolist() == [0] * 5 + [1] * 5 + [2] * 5
    assert asked == [6, 6, 6]  # two of each class at a time


def test_all_experts_together_being_right_about_too_few_is_an_error(task):
    images, labels, thetas = task
    never = torch.zeros_like(thetas[0])
    never[6 * K] = 1.0  # says class 0 of everything
    rows = class_order(labels, K, 5, 0)
    asked = []
    with pytest.raises(InputError, match="the 2 experts .* only 0 images of class 1 correctly, but ipc is 5"):
        predicted_correctly(experts([never, never], asked), images, rows, 5)
    assert asked == [0, 1]


def test_a_row_that_is_shorter_than_ipc_ends_in_the_error_too(task):
    images, labels, _ = task
    always = torch.zeros(6 * K + K, dtype=torch.float64)
    always[6 * K] = 1.0
    rows = [(labels == 0).nonzero().flatten()[:2]]
    with pytest.raises(InputError, match="only 2 images of class 0 correctly, but ipc is 3"):
        predicted_correctly(experts([always, always]), images, rows, 3)


def test_batchnorm_is_asked_about_batches_of_all_classes():
    """Images left and right of zero: told apart by a BatchNorm network in mixed batches only."""
    rng = torch.Generator().manual_seed(0)
    labels = torch.arange(2).repeat_interleave(600)
    images = (2.0 * labels - 1).view(-1, 1, 1, 1) + 0.1 * torch.randn(1200, *SHAPE, generator=rng)
    model = FlatModel(Linear(norm=True))
    ones, zeros = torch.ones(6), torch.zeros(6)
    theta = torch.cat([ones, zeros, -ones, ones, zeros, torch.tensor([0.0, 0.0, -9.0])])  # scale, shift, weight, bias
    crowd = Experts(model, lambda k: theta, 1)
    rows = class_order(labels, 2, 550, 0)
    assert model.accuracy(theta, images, labels) == 1 and model.accuracy(theta, images[:600], labels[:600]) < 0.7
    assert predicted_correctly(crowd, images, rows, 550).tolist() == torch.cat([row[:550] for row in rows]).tolist()
    _, logits = initial_set("samples_predicted_correctly", images, labels, 2, 550, crowd, seed=0)
    assert logits.argmax(dim=1).tolist() == [0] * 550 + [1] * 550


def test_labels_are_averaged_over_the_experts_that_are_right(task):
    images, labels, thetas = task
    chosen = [i for i in range(len(images)) if any(is_right(theta, images[i], int(labels[i])) for theta in thetas)]
    counts = set()
    expected = []
    for i in chosen:
        of_right = [plain_logits(theta, images[i]) for theta in thetas if is_right(theta, images[i], int(labels[i]))]
        counts.add(len(of_right))
        expected.append(sum(of_right) / len(of_right))
    assert counts == {1, 2, 3, 4}, "the task itself is too easy"
    found = averaged_logits(experts(thetas), images[chosen], labels[chosen])
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-12, atol=1e-12)


def test_an_image_that_none_gets_right_is_labelled_by_all(task):
    images, labels, thetas = task
    i = next(i for i in range(len(images)) if not any(is_right(theta, images[i], int(labels[i])) for theta in thetas))
    found = averaged_logits(experts(thetas), images[[i]], labels[[i]])
    expected = sum(plain_logits(theta, images[i]) for theta in thetas) / 4
    torch.testing.assert_close(found[0], expected, rtol=1e-12, atol=1e-12)


def test_samples_predicted_correctly_come_with_their_averaged_labels(task):
    images, labels, thetas = task
    rows = class_order(labels, K, 12, 5)
    chosen, _ = plain_choice(thetas, images, rows, 12)
    found, logits = initial_set("samples_predicted_correctly", images, labels, K, 12, experts(thetas), seed=5)
    assert torch.equal(found, images[chosen])
    for image, label, logit in zip(found, labels[chosen], logits, strict=True):
        of_right = [plain_logits(theta, image) for theta in thetas if is_right(theta, image, int(label))]
        torch.testing.assert_close(logit, sum(of_right) / len(of_right), rtol=1e-12, atol=1e-12)
    assert labels[chosen].tolist() == [0] * 12 + [1] * 12 + [2] * 12


def test_real_images_are_random_of_each_class_and_labelled_by_the_first_expert(task):
    images, labels, thetas = task
    asked = []
    found, logits = initial_set("real", images, labels, K, 12, experts(thetas, asked), seed=5)
    rows = class_order(labels, K, 12, 5)
    assert torch.equal(found, images[torch.cat([row[:12] for row in rows])])
    expected = torch.stack([plain_logits(thetas[0], image) for image in found])
    torch.testing.assert_close(logits, expected, rtol=1e-12, atol=1e-12)
    assert asked == [0]


def test_noise_is_standard_normal_with_one_hot_labels(task):
    images, labels, thetas = task
    asked = []
    found, logits = initial_set(
        "noise", images.float(), labels, K, 300, experts(thetas, asked), seed=5, noise_logit=4.0
    )
    assert found.shape == (900, *SHAPE) and found.dtype == torch.float32 and not asked
    assert abs(found.mean()) < 0.05 and abs(found.std() - 1) < 0.05
    assert logits.dtype == torch.float32
    assert logits.tolist() == [[4.0 * (c == k) for k in range(K)] for c in range(K) for _ in range(300)]


def test_the_order_of_a_class_is_random_and_a_function_of_seed_and_stream():
    labels = torch.arange(300) % 3
    rows = class_order(labels, 3, 10, 0, "baseline", 1)
    for c, row in enumerate(rows):
        assert sorted(row.tolist()) == list(range(c, 300, 3)) != row.tolist()
    assert (rows[0] // 3).tolist() != (rows[1] // 3).tolist(), "classes are shuffled alike"
    same = class_order(labels, 3, 10, 0, "baseline", 1)
    assert all(torch.equal(a, b) for a, b in zip(rows, same))
    for other in (class_order(labels, 3, 10, 0, "baseline", 2), class_order(labels, 3, 10, 1, "baseline", 1)):
        assert all(not torch.equal(a, b) for a, b in zip(rows, other))


@pytest.mark.parametrize("kind", ["samples_predicted_correctly", "real"])
def test_a_class_with_fewer_images_than_ipc_is_refused_before_any_work(task, kind):
    images, labels, thetas = task
    keep = torch.cat([(labels != 1).nonzero().flatten(), (labels == 1).nonzero().flatten()[:6]])
    asked = []
    with pytest.raises(InputError, match="ipc: 7 images are asked for, but class 1 has 6"):
        initial_set(kind, images[keep], labels[keep], K, 7, experts(thetas, asked), seed=0)
    assert not asked


# ---------------------------------------------------------------------------------------------------- hard labels


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("truncated", [False, True])
@pytest.mark.parametrize("kind", ["samples_predicted_correctly", "real", "noise"])
def test_hard_labels_are_one_hot_and_have_no_gradient_to_the_last_bit(task, kind, truncated, dtype):
    images, labels, thetas = task
    thetas = [theta.to(dtype) for theta in thetas]
    found, logits = initial_set(kind, images.to(dtype), labels, K, 12, experts(thetas), seed=5, hard=True)
    classes = [c for c in range(K) for _ in range(12)]
    assert logits.dtype == dtype and logits.softmax(dim=1).tolist() == [
        [float(c == k) for k in range(K)] for c in classes
    ]
    steps = inner_steps(len(found), 7, 9, NoAugmentation(), torch.Generator().manual_seed(0))
    gradients = unrolled_gradients(
        FlatModel(Linear()),
        thetas[0],
        found,
        logits,
        torch.tensor(0.1, dtype=dtype),
        steps,
        objective=lambda theta: matching_loss(theta, thetas[0], thetas[1]),
        truncated=truncated,
    )
    assert gradients.images.any() and gradients.lr != 0
    assert torch.equal(gradients.labels, torch.zeros_like(logits))


@pytest.mark.parametrize("kind", ["samples_predicted_correctly", "real", "noise"])
def test_hard_labels_go_with_the_same_images(task, kind):
    images, labels, thetas = task
    soft, hard = (
        initial_set(kind, images, labels, K, 12, experts(thetas), seed=5, hard=hard) for hard in (False, True)
    )
    assert torch.equal(soft[0], hard[0]) and not torch.equal(soft[1], hard[1])


@pytest.mark.parametrize("kind", ["real", "noise"])
def test_hard_labels_of_real_images_and_noise_need_no_experts(task, kind):
    images, labels, thetas = task
    found, logits = initial_set(kind, images, labels, K, 12, None, seed=5, hard=True)
    expected = initial_set(kind, images, labels, K, 12, experts(thetas), seed=5, hard=True)
    assert torch.equal(found, expected[0]) and torch.equal(logits, expected[1])
