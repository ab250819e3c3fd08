"""What holds for all tests: one thread, a cache of their own, and no CUDA tests where there is no CUDA."""

import os
import signal
import tempfile

import pytest
import torch
from helpers import make_images


def pytest_configure(config):
    # Results depend on the number of threads, and tests are too small to gain from more.
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # for subprocesses
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts what runs in its background
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if not hasattr(config, "workerinput"):  # workers of xdist share what the process has that started them
        # Fitted preprocessing and built kernels are kept here; the user's own cache is neither read nor written.
        cache, before = tempfile.TemporaryDirectory(prefix="pad-tests-"), os.environ.get("PAD_CACHE")
        os.environ["PAD_CACHE"] = cache.name
        config.add_cleanup(cache.cleanup)
        config.add_cleanup(
            lambda: os.environ.pop("PAD_CACHE") if before is None else os.environ.update(PAD_CACHE=before)
        )


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "cuda" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """A small ImageFolder, for those that only read it."""
    return make_images(tmp_path_factory.mktemp("images"))
