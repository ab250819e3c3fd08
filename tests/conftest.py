"""What holds for all tests: one thread, a cache of their own, and no CUDA tests where there is no CUDA."""

import os
import re
import signal
import tempfile

import pytest
import torch
from helpers import make_images

from pad import cli, config
from pad.commands.table import COMMANDS
from pad.distributed import Ranks


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


@pytest.fixture(scope="session", autouse=True)
def advice():
    """Sentences of commands in this process that name options which the command does not have."""
    wrong, running = [], [config.Settings]
    parse, say, emit = config.parse, Ranks.say, cli._Handler.emit
    every = {name for command in COMMANDS.values() for name in command.settings.fields()}

    def parsing(cls, *arguments):
        running[0] = cls
        return parse(cls, *arguments)

    def check(sentence):
        of = COMMANDS.values() if running[0] is COMMANDS["study"].settings else []  # its file holds their settings
        kinds = [running[0], *(command.settings for command in of)]
        known = {"nproc_per_node", "cfg", "help"}.union(
            *({*kind.fields(), *kind.dead, *kind.refused} for kind in kinds)
        )
        if running[0] is config.Settings or "go on with: " in sentence:
            return
        quoted = re.sub(r"'[^']*'|\S*/\S*( --\S+)?", "", sentence)  # what was given; other programs
        named = (
            set(re.findall(r"--(\w+)", quoted)) | {word for word in re.findall(r"\w+", quoted) if "_" in word} & every
        )
        if unknown := named - known:
            wrong.append((running[0].__name__, sorted(unknown), sentence))

    def saying(self, message, code):
        check(message)
        return say(self, message, code)

    def emitting(self, record):
        check(record.getMessage())
        emit(self, record)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config, "parse", parsing)
        patch.setattr(Ranks, "say", saying)
        patch.setattr(cli._Handler, "emit", emitting)
        yield wrong


@pytest.fixture(autouse=True)
def commands_name_their_own_options(advice):
    """Whatever a test makes a command say: its advice can be followed."""
    yield
    found, advice[:] = list(advice), []
    assert found == []


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """A small ImageFolder, for those that only read it."""
    return make_images(tmp_path_factory.mktemp("images"))
