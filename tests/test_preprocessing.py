import json
import logging
import os
import pwd

import numpy as np
import pytest
import torch
from helpers import forked

from pad.allocator import compiled_folder
from pad.data import preprocessing
from pad.data.images import ImageData
from pad.data.preprocessing import fit_preprocessing
from pad.data.sources import load_data
from pad.errors import InputError
from pad.store.tensors import save_tensors


def random_data(count=300, shape=(3, 4, 5), seed=0) -> ImageData:
    """Smooth random images, so that pixels are correlated as in real ones."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(count, *shape, generator=generator)
    images = (255 * (0.6 * noise.mean((1, 2, 3), keepdim=True) + 0.4 * noise.cumsum(-1) / shape[-1])).to(torch.uint8)
    labels = torch.arange(count) % 2
    mean, std = (0.4, 0.5, 0.6)[: shape[0]], (0.2, 0.25, 0.3)[: shape[0]]
    return ImageData(
        name="random",
        train_images=images,
        train_labels=labels,
        test_images=images[:7],
        test_labels=labels[:7],
        class_names=("a", "b"),
        mean=mean,
        std=std,
    )


def formula(images: torch.Tensor, eps: float):
    """Mean, covariance, U (S + eps)^(-1/2) U^T and its inverse in float64, by another decomposition than the code's."""
    flat = images.flatten(1).numpy().astype(np.float64) / 255
    covariance = np.cov(flat, rowvar=False)
    u, s, _ = np.linalg.svd(covariance)
    return flat.mean(0), covariance, u @ np.diag((s + eps) ** -0.5) @ u.T, u @ np.diag((s + eps) ** 0.5) @ u.T


@pytest.fixture
def fits(monkeypatch):
    """Counts the fits."""
    calls = []
    original = preprocessing._fit_zca
    monkeypatch.setattr(preprocessing, "_fit_zca", lambda images: calls.append(1) or original(images))
    return calls


# ---- mean and standard deviation


def test_mean_std_formula():
    data = random_data()
    transform = fit_preprocessing(data, zca=False)
    x = transform.apply(data.train_images)
    wanted = data.train_images.double() / 255 - torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1).double()
    wanted = wanted / torch.tensor([0.2, 0.25, 0.3]).view(3, 1, 1).double()
    assert x.dtype == torch.float32 and (x - wanted).abs().max() < 1e-6
    assert (transform.invert(x) - data.train_images / 255).abs().max() < 1e-6


def test_mean_std_identity():
    transform = fit_preprocessing(random_data(), zca=False)
    assert transform.kind == transform.identity["kind"] == "meanstd"
    assert transform.identity["mean"] == [0.4, 0.5, 0.6] and transform.identity["std"] == [0.2, 0.25, 0.3]
    assert transform.identity == fit_preprocessing(random_data(seed=1), zca=False).identity  # the same transform
    other = fit_preprocessing(load_data("FashionMNISTMini", None), zca=False)
    assert other.identity["digest"] != transform.identity["digest"]


# ---- ZCA


@pytest.mark.parametrize("shape, count", [((3, 4, 5), 300), ((1, 6, 6), 2500), ((3, 4, 4), 20)])
def test_zca_is_the_formula(tmp_path, shape, count):
    """With one and several channels, several chunks of images, and fewer images than dimensions."""
    data = random_data(count, shape)
    transform = fit_preprocessing(data, True, tmp_path)
    mean, covariance, whiten, unwhiten = formula(data.train_images, 0.1)
    flat = data.train_images.flatten(1).numpy() / 255.0
    x = transform.apply(data.train_images)
    assert x.shape == data.train_images.shape and x.dtype == torch.float32
    assert np.abs(x.flatten(1).numpy() - (flat - mean) @ whiten).max() < 2e-6
    assert np.abs(transform.invert(x).flatten(1).numpy() - flat).max() < 2e-6
    noise = torch.rand(5, *shape, generator=torch.Generator().manual_seed(1)) * 4 - 2
    wanted = noise.flatten(1).double().numpy() @ unwhiten + mean
    assert np.abs(transform.invert(noise).flatten(1).numpy() - wanted).max() < 2e-6
    # whitening turns the covariance U S U^T into U S/(S + eps) U^T
    whitened = np.cov(x.flatten(1).double().numpy(), rowvar=False)
    assert np.abs(whitened - covariance @ np.linalg.inv(covariance + 0.1 * np.eye(len(mean)))).max() < 1e-6


def test_zca_equals_kornia(tmp_path):
    ZCAWhitening = pytest.importorskip("kornia.enhance").ZCAWhitening
    data = random_data(400, (3, 5, 5))
    reference = ZCAWhitening(eps=0.1, compute_inv=True).fit(data.train_images.double() / 255)
    transform = fit_preprocessing(data, True, tmp_path)
    wanted = reference(data.test_images.double() / 255)
    assert (transform.apply(data.test_images) - wanted).abs().max() < 2e-6
    assert (transform.invert(wanted) - reference.inverse_transform(wanted)).abs().max() < 2e-6


def test_float_images_and_many_chunks(tmp_path, monkeypatch):
    data = random_data(50)
    for zca in (True, False):
        transform = fit_preprocessing(data, zca, tmp_path)
        whole = transform.apply(data.train_images)
        assert (transform.apply(data.train_images.double() / 255) - whole).abs().max() < 2e-6
        monkeypatch.setattr(preprocessing, "_CHUNK", 7)
        assert (transform.apply(data.train_images) - whole).abs().max() < 2e-6
        monkeypatch.undo()
        assert transform.apply(data.train_images[:0]).shape == (0, 3, 4, 5)
        assert not transform.apply((data.train_images / 255).requires_grad_()).requires_grad


@pytest.mark.parametrize("precision", ["highest", "medium"])
def test_moments_are_exact(precision):
    """Against integer arithmetic: extreme values, and so many images that one float32 sum of all would round."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (5000, 6), generator=generator, dtype=torch.uint8)
    pixels[:, 0], pixels[:, 1], pixels[::2, 2] = 0, 255, 0
    torch.set_float32_matmul_precision(precision)
    try:
        mean, covariance = preprocessing._moments(pixels)
    finally:
        torch.set_float32_matmul_precision("highest")
    values = pixels.numpy().astype(np.int64)
    n, sums, products = len(values), values.sum(0), values.T @ values
    wanted = (n * products - np.outer(sums, sums)) / (n * (n - 1) * 255**2)
    assert np.allclose(mean.numpy(), sums / n / 255, rtol=1e-15, atol=0)
    assert np.allclose(covariance.numpy(), wanted, rtol=1e-14, atol=0) and wanted[0, 0] == covariance[0, 0] == 0


def test_images_without_variance(tmp_path):
    """Whitening then divides by the root of eps."""
    images = torch.full((10, 1, 3, 3), 51, dtype=torch.uint8)
    labels = torch.zeros(10).long()
    data = ImageData(
        name="flat",
        train_images=images,
        train_labels=labels,
        test_images=images,
        test_labels=labels,
        class_names=("a",),
        mean=(0.2,),
        std=(1.0,),
    )
    transform = fit_preprocessing(data, True, tmp_path)
    assert transform.apply(images).abs().max() < 1e-6
    white = torch.eye(9).view(9, 1, 3, 3)
    assert (transform.apply(white) - (white - 0.2) / 0.1**0.5).abs().max() < 1e-5


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("precision", ["highest", "high"])
def test_cuda_equals_cpu(tmp_path, precision):
    data = load_data("FashionMNISTMini", None)
    torch.set_float32_matmul_precision(precision)
    try:
        moments = preprocessing._moments(data.train_images.flatten(1).cuda())
    finally:
        torch.set_float32_matmul_precision("highest")
    for ours, theirs in zip(moments, preprocessing._moments(data.train_images.flatten(1))):
        assert torch.allclose(ours.cpu(), theirs, rtol=1e-14, atol=0)
    transform = fit_preprocessing(data.to("cuda"), True, tmp_path / "cuda")
    reference = fit_preprocessing(data, True, tmp_path / "cpu")
    assert transform.device.type == "cuda" and transform.identity == reference.identity
    x = transform.apply(data.train_images)
    assert x.device.type == "cuda" and (x.cpu() - reference.apply(data.train_images)).abs().max() < 1e-4
    assert fit_preprocessing(data.to("cuda"), True, tmp_path / "cpu").device.type == "cuda"


# ---- the cache


def test_cache_gives_the_same_bytes(tmp_path, fits, caplog):
    data = random_data()
    fitted = fit_preprocessing(data, True, tmp_path / "new" / "folder")
    cached = fit_preprocessing(random_data(), True, str(tmp_path / "new" / "folder"))
    assert len(fits) == 1 and fitted.identity == cached.identity and not caplog.records
    assert torch.equal(fitted.apply(data.train_images), cached.apply(data.train_images))
    assert torch.equal(fitted.invert(data.train_images), cached.invert(data.train_images))
    other = fit_preprocessing(random_data(seed=1), True, tmp_path / "new" / "folder")
    assert len(fits) == 2 and other.identity["digest"] != fitted.identity["digest"]


@pytest.mark.parametrize("damage", ["cut", "empty", "folder of another fit", "other shapes"])
def test_damaged_cache_is_fitted_again(tmp_path, fits, caplog, damage):
    data = random_data()
    fitted = fit_preprocessing(data, True, tmp_path)
    [file] = tmp_path.iterdir()
    whole = file.read_bytes()
    if damage == "cut":
        file.write_bytes(whole[:-100])
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "folder of another fit":
        fit_preprocessing(random_data(seed=1), True, tmp_path / "other")
        next((tmp_path / "other").iterdir()).replace(file)
    else:
        tensors = {"mean": torch.zeros(4), "whiten": torch.eye(4), "unwhiten": torch.eye(4)}
        save_tensors(file, tensors, fitted.identity)
    fits.clear()
    again = fit_preprocessing(data, True, tmp_path)
    assert len(fits) == 1 and torch.equal(again.apply(data.train_images), fitted.apply(data.train_images))
    assert file.read_bytes() == whole
    [record] = caplog.records
    assert record.name == "pad" and record.levelno == logging.WARNING and file.name in record.getMessage()


def test_cache_that_cannot_be_written(tmp_path, fits, caplog):
    (tmp_path / "file").write_text("in the way")
    transform = fit_preprocessing(random_data(), True, tmp_path / "file")
    assert len(fits) == 1 and transform.kind == "zca"
    assert "cannot be written" in caplog.text and (tmp_path / "file").read_text() == "in the way"


def test_a_user_without_a_home_has_no_cache(monkeypatch, fits, caplog):
    """A number that the system does not know, as containers are started with."""
    for name in ("HOME", "PAD_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)
    assert fit_preprocessing(random_data(), True).kind == "zca" and len(fits) == 1
    assert compiled_folder() is None
    [record] = caplog.records
    assert "not kept" in record.getMessage() and "PAD_CACHE" in record.getMessage()


def test_a_home_that_may_not_be_searched_is_no_cache(tmp_path, monkeypatch):
    """As of another user: ``sudo -u``, or a container that was given a user and not a home."""
    (closed := tmp_path / "closed").mkdir(mode=0)
    monkeypatch.setenv("PAD_CACHE", str(closed / "cache" / "pad"))

    def look() -> int:
        if os.geteuid() == 0:  # who may search any folder
            os.setuid(65534)
        return 0 if fit_preprocessing(random_data(), True).kind == "zca" and compiled_folder() is None else 1

    process = forked(look, tmp_path / "out", tmp_path / "err")
    process.join(60)
    assert process.exitcode == 0, (tmp_path / "err").read_text()
    closed.chmod(0o700)
    assert not any(closed.iterdir())


def test_cache_default_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("PAD_CACHE", raising=False)
    fit_preprocessing(random_data(), True)
    assert len(list((tmp_path / "home" / ".cache" / "pad").glob("zca-*.safetensors"))) == 1
    monkeypatch.setenv("PAD_CACHE", str(tmp_path / "elsewhere"))
    fit_preprocessing(random_data(), True)
    assert len(list((tmp_path / "elsewhere").iterdir())) == 1


def test_identity_depends_on_what_it_should(tmp_path, monkeypatch):
    data = random_data()
    identity = fit_preprocessing(data, True, tmp_path).identity
    assert identity == json.loads(json.dumps(identity)) and identity["kind"] == "zca"
    assert identity["eps"] == 0.1 and identity["shape"] == [3, 4, 5]
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert fit_preprocessing(data, True, tmp_path / "threads").identity == identity
    finally:
        torch.set_num_threads(threads)
    for constant, value in (("ZCA_EPS", 0.2), ("ZCA_VERSION", 2)):
        with monkeypatch.context() as patch:
            patch.setattr(preprocessing, constant, value)
            assert fit_preprocessing(data, True, tmp_path).identity["digest"] != identity["digest"]


# ---- what cannot be used


def test_images_of_another_shape_are_refused(tmp_path):
    data = random_data()
    for shape in [(2, 1, 4, 5), (3, 4, 5)]:
        with pytest.raises(InputError, match=r"do not fit a mean and std of 3 channel"):
            fit_preprocessing(data, False).apply(torch.zeros(shape))
        with pytest.raises(InputError, match=r"do not fit a ZCA of images of \[3, 4, 5\]"):
            fit_preprocessing(data, True, tmp_path).invert(torch.zeros(shape))


def test_images_too_large_for_zca(tmp_path, fits):
    images = torch.zeros(2, 3, 128, 128, dtype=torch.uint8)
    labels = torch.arange(2)
    data = ImageData(
        name="ImageNet/x",
        train_images=images,
        train_labels=labels,
        test_images=images,
        test_labels=labels,
        class_names=("a", "b"),
        mean=(0.5,) * 3,
        std=(0.2,) * 3,
    )
    with pytest.raises(InputError, match="ZCA of ImageNet/x at 128x128 pixels .*49152"):
        fit_preprocessing(data, True, tmp_path)
    assert not fits and not list(tmp_path.iterdir())
    assert fit_preprocessing(data, False, tmp_path).apply(images).shape == images.shape
