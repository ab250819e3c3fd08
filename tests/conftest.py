"""What holds for all tests: one thread, a cache of their own, and no CUDA tests where there is no CUDA."""

import os

import pytest
import torch
from helpers import make_images


def pytest_configure(config):
    # Results depend on the number of threads, and tests are too small to gain from more.
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # for subprocesses


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "cuda" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Fitted preprocessing and built kernels are kept here; the user's own cache is neither read nor written."""
    before, folder = os.environ.get("PAD_CACHE"), tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # all workers share it
    os.environ["PAD_CACHE"] = str(folder / "cache")
    yield
    if before is None:
        del os.environ["PAD_CACHE"]
    else:
        os.environ["PAD_CACHE"] = before


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """A small ImageFolder, for those that only read it."""
    return make_images(tmp_path_factory.mktemp("images"))
