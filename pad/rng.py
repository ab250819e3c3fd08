"""Random streams that are functions of (seed, stream, index), never of what ran before.

Every random decision of the toolkit asks for its own generator by name, such as ``generator(seed, "match", it)``.
A resumed run, another order of work or another number of processes therefore draws the same numbers.
"""

import contextlib
import hashlib

import torch


def derive_seed(seed: int, stream: str, *index: int | str) -> int:
    """A 63-bit seed that depends on every argument and on nothing else (torch's CPU generator uses its low 32 bits)."""
    key = "/".join(str(part) for part in (seed, stream, *index))
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 1


def generator(seed: int, stream: str, *index: int | str) -> torch.Generator:
    """A CPU generator for one stream. What is drawn is moved, so that every device sees the same numbers."""
    return torch.Generator().manual_seed(derive_seed(seed, stream, *index))


def normal(*shape: int, rng: torch.Generator, like: torch.Tensor) -> torch.Tensor:
    """Standard normal numbers ``shape``, of the type and on the device of ``like``; for millions of them.

    ``rng``, a CPU generator, draws them. For CUDA a generator of that device does, which ``rng`` seeds: other numbers
    than on a CPU, but there, too, a function of ``rng`` alone, and no copy.
    """
    if like.device.type == "cuda":
        rng = torch.Generator(like.device).manual_seed(int(torch.randint(2**63 - 1, (), generator=rng)))
    return torch.randn(shape, generator=rng, dtype=like.dtype, device=rng.device).to(like.device)


@contextlib.contextmanager
def seeded(seed: int, stream: str, *index: int | str, device: torch.device | None = None):
    """Run code that can only draw from torch's global generators (weight initialisers, dropout) on its own stream.

    Of the CPU's, and with a CUDA ``device`` of that one's, too. Afterwards they are as they were.
    """
    generators = [torch.default_generator]  # torch.manual_seed would reseed those of all devices
    if device is not None and device.type == "cuda":
        torch.cuda.init()
        generators.append(torch.cuda.default_generators[device.index or 0])
    states = [each.get_state() for each in generators]
    for each in generators:
        each.manual_seed(derive_seed(seed, stream, *index))
    try:
        yield
    finally:
        for each, state in zip(generators, states):
            each.set_state(state)
