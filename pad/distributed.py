"""Several processes, as torchrun starts them, one for each device: who does what, and how they agree.

All ranks follow one program. What may differ between them, because it depends on files, is decided by rank 0
(:meth:`Ranks.on_main`); work that falls into independent parts is dealt (:meth:`Ranks.deal`, :meth:`Ranks.gather`), and
sums over shares of a batch are taken together (:meth:`Ranks.all_reduce_`). For one process all of this is nothing, so
nobody asks whether there are several.
"""

import contextlib
import io
import logging
import os
import pickle
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from pad.errors import InputError

log = logging.getLogger("pad")

T = TypeVar("T")

_MEETING = timedelta(minutes=10)  # for all processes to have been started
_SHORT_WAIT = 15  # seconds after which it is said what is waited for
_IF_ALONE = "unset WORLD_SIZE to run alone, or start with torchrun"
# Rank 0 may rank images or whiten for hours while the others wait for it, and an expert of one rank be done long before
# another's. That a rank has died is noticed by its connections, not by this.
_PATIENCE = timedelta(days=30)
# Where NCCL is used, ranks are at most an iteration apart. Within a machine it does not notice a lost peer: this does,
# should nobody else (torchrun ends what is left of a run after half a minute).
_NCCL_PATIENCE = timedelta(minutes=30)


class PeerLost(Exception):
    """Another process of the run ended, so this one cannot go on."""

    def __init__(self, how: str = ""):
        super().__init__(f"another process of this run ended, so this one cannot go on{how and f' ({how})'}")


class Ranks:
    """This process among those of the run.

    Attributes:
        rank, size: its number, 0..size - 1, and how many there are.
        local_rank, local_size: the same among those on this machine.

    Methods without another word must be called by all ranks, in one order. They raise PeerLost when another rank ended.
    """

    def __init__(self, rank: int = 0, size: int = 1, local_rank: int = 0, local_size: int = 1):
        self.rank, self.size, self.local_rank, self.local_size = rank, size, local_rank, local_size
        self._store: dist.Store | None = None
        self._nccl: dist.ProcessGroup | None = None
        self._beside: list[int] = []  # process ids of the ranks on this machine

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which alone writes what the ranks share, and talks."""
        return self.rank == 0

    def deal(self, items: Sequence[T]) -> Sequence[T]:
        """This rank's share of ``items``. May be called by one rank alone."""
        return items[self.rank :: self.size]

    def all_reduce_(self, *tensors: Tensor) -> None:
        """Sum tensors (of one type, on one device) over the ranks, in place; the same to the last bit on all of them.

        On CUDA nothing waits for the result.
        """
        if self.size == 1:
            return
        whole = len(tensors) == 1 and tensors[0].is_contiguous()
        flat = tensors[0] if whole else torch.cat([tensor.reshape(-1) for tensor in tensors])
        with _peers():
            dist.all_reduce(flat, group=self._group(flat))
        if not whole:
            for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
                tensor.copy_(part.view_as(tensor))

    def gather(self, value: T) -> list[T]:
        """Every rank's ``value`` (plain values, tensors on the CPU), in order of rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with _peers():
            dist.all_gather_object(values, value)
        return values

    def same(self, about: Callable[[], object], what: str) -> None:
        """Raise InputError unless ``about()``, which describes ``what`` a machine has, is equal on all ranks."""
        if self.size == 1:
            return
        first, *others = self.gather(about())
        if any(other != first for other in others):
            raise InputError(f"{what} are not the same for all processes of this run; give all machines the same files")

    def on_main(self, work: Callable[[], T]) -> T:
        """``work()``, done by rank 0 alone, on all ranks; tensors in it on each rank's own device.

        Tensors travel as such, whatever their size, and not by way of pickle. ``work`` may not call the other ranks.
        """
        if self.size == 1:
            return work()
        tensors: list[Tensor] = []
        file = io.BytesIO()
        if self.is_main:
            value = work()
            _Pickler(file, tensors).dump(value)
        head = [file.getvalue()]
        with _peers():
            dist.broadcast_object_list(head)
        if not self.is_main:
            value = _Unpickler(io.BytesIO(head[0]), tensors).load()
        with _peers():
            for tensor in tensors:
                dist.broadcast(tensor, 0, group=self._group(tensor))
        return value

    def node_first(self, work: Callable[[], T]) -> T:
        """``work()`` on every rank: on one of each machine first, so that the others find the files it leaves."""
        if self.local_rank == 0:
            result = work()
            self.barrier()
            return result
        self.barrier()
        return work()

    def barrier(self) -> None:
        """Wait for all ranks, without using the device."""
        self.gather(None)

    def place(self, device: torch.device) -> torch.device:
        """The device of this rank, for the configured one: the CPU, or the CUDA device of its local rank.

        Raises InputError when machines differ, and when there are more processes on this one than CUDA devices.
        """
        if self.size == 1:
            return device
        if len(set(self.gather(device.type))) > 1:
            raise InputError("some processes of this run have a CUDA device and some have none; give --device cpu")
        if device.type != "cuda":
            return device
        there = torch.cuda.device_count()
        if self.local_size > there:
            raise InputError(
                f"{self.local_size} processes were started on a machine with {there} CUDA device(s); "
                f"give --nproc_per_node={there}"
            )
        if device.index:
            log.warning("each process takes the CUDA device of its local rank; choose devices by CUDA_VISIBLE_DEVICES")
        device = torch.device("cuda", self.local_rank)
        torch.cuda.set_device(device)
        with _peers():
            group = dist.new_group(backend="nccl", timeout=_NCCL_PATIENCE)
        assert isinstance(group, dist.ProcessGroup)  # it has this rank
        self._nccl = group
        return device

    def lost(self) -> bool:
        """Whether a rank on this machine has ended. May be called by one rank alone."""

        def ended(process: int) -> bool:
            try:
                os.kill(process, 0)
            except OSError as error:
                return isinstance(error, ProcessLookupError)
            return False

        return any(map(ended, self._beside))

    def say(self, message: str, code: int) -> int:
        """Say on stderr how the run ends, unless another rank has; returns the exit code: that of who was first.

        Called by each rank that ends before its time, by itself.
        """
        if self.size > 1:  # torchrun tells the others to end as soon as one has: this one is about to
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        first = mine = f"{self.rank} {code}"
        if self._store is not None:
            with contextlib.suppress(RuntimeError):  # the store is gone when the process that kept it is
                first = self._store.compare_set("end", "", mine).decode()
        if first == mine:
            print(message, file=sys.stderr, flush=True)
        return int(first.split()[1])

    def leave(self, code: int) -> None:
        """Part from the other ranks; with an exit code other than 0, the process ends here.

        After a failure others may be waiting for this rank: they notice that it has gone when it is gone, and not while
        it waits for them in turn, as taking down a group of processes can.
        """
        if self.size == 1:
            return
        if code:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        dist.destroy_process_group()

    def _group(self, tensor: Tensor) -> dist.ProcessGroup | None:
        return self._nccl if tensor.is_cuda else None  # None: the group of all, gloo


ALONE = Ranks()


def join() -> Ranks:
    """This process among those that torchrun started with it (it says so in the environment); otherwise one alone.

    Messages and CPU tensors go by gloo; :meth:`Ranks.place` adds NCCL for CUDA tensors. Raises InputError when the
    environment is no launcher's, and when the other processes do not come.
    """
    size = _launched("WORLD_SIZE", range(1, 2**20), 1)
    if size == 1:
        return ALONE
    rank = _launched("RANK", range(size))
    local_rank = _launched("LOCAL_RANK", range(size), rank)
    local_size = _launched("LOCAL_WORLD_SIZE", range(1, size + 1), size)
    _launched("MASTER_PORT", range(1, 2**16))
    machine = f"{socket.gethostname()} "
    try:
        store, here = _interruptible(
            lambda: _meet(f"{machine}{os.getpid()}", rank, size),
            f"waiting for all {size} processes of this run; {_IF_ALONE}",
        )
        # All are there; from here on the patience is for their work.
        group = dist.PrefixStore("group", store)
        dist.init_process_group("gloo", store=group, rank=rank, world_size=size, timeout=_PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise InputError(f"the processes of this run do not find each other ({_line(error)}); {_IF_ALONE}") from None
    ranks = Ranks(rank, size, local_rank, local_size)
    ranks._store = store
    ranks._beside = [int(other.removeprefix(machine)) for other in here if other.startswith(machine)]
    return ranks


def _launched(name: str, numbers: range, default: int | None = None) -> int:
    """A launcher's variable, one of ``numbers``; an empty one is as none."""
    value = os.environ.get(name) or default
    with contextlib.suppress(TypeError, ValueError):
        if int(value) in numbers:  # type: ignore[arg-type]
            return int(value)  # type: ignore[arg-type]
    there = f"no {name}" if value is None else f"{name}={str(value)[:20]}"
    raise InputError(
        f"the environment has {there}, which launchers set to a number from {numbers[0]} to {numbers[-1]}; {_IF_ALONE}"
    )


def _meet(address: str, rank: int, size: int) -> tuple[dist.Store, list[str]]:
    """The store that the processes share, and the ``address`` that each of them left there, once all have."""
    store, _, _ = next(rendezvous("env://", timeout=_MEETING))
    store.set(f"here {rank}", address)
    names = [f"here {other}" for other in range(size)]
    store.wait(names, _MEETING)
    return store, [store.get(name).decode() for name in names]


def _interruptible(work: Callable[[], T], message: str) -> T:
    """``work()`` in a thread of its own, as torch hears no signal while it waits. After a while it logs ``message``."""
    future = Future[T]()

    def run() -> None:
        try:
            future.set_result(work())
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    if not wait([future], _SHORT_WAIT).done:
        log.info(message)
    return future.result()


@contextlib.contextmanager
def _peers() -> Iterator[None]:
    """A collective operation fails when another rank has gone."""
    try:
        yield
    except RuntimeError as error:  # gloo's errors; torch's own for NCCL are among them
        raise PeerLost(_line(error)) from error


def _line(error: Exception) -> str:
    """The first sentence of an error, without where in the sources it arose."""
    text = " ".join(str(error).split())
    return text.partition("] ")[2].partition(". ")[0] if text.startswith("[/") else text.partition(". ")[0]


class _Pickler(pickle.Pickler):
    """Pickles all but tensors, which it collects."""

    def __init__(self, file: io.BytesIO, tensors: list[Tensor]):
        super().__init__(file)
        self._tensors = tensors

    def persistent_id(self, value):
        if not isinstance(value, Tensor):
            return None
        self._tensors.append(value.detach().contiguous())
        return value.shape, value.dtype, value.device.type


class _Unpickler(pickle.Unpickler):
    """Puts an empty tensor in the place of each, to be filled."""

    def __init__(self, file: io.BytesIO, tensors: list[Tensor]):
        super().__init__(file)
        self._tensors = tensors

    def persistent_load(self, about):
        shape, dtype, device = about
        self._tensors.append(torch.empty(shape, dtype=dtype, device=device))
        return self._tensors[-1]
