"""Random streams that are functions of (seed, stream, index), never of what ran before.

Every random decision of the toolkit asks for its own generator by name, such as ``generator(seed, "match", it)``.
A resumed run, another order of work or another number of processes therefore draws the same numbers.
"""

import contextlib
import hashlib

import torch

_CPU = torch.device("cpu")


def derive_seed(seed: int, stream: str, *index: int | str) -> int:
    """A 63-bit seed that depends on every argument and on nothing else (torch's CPU generator uses its low 32 bits)."""
    key = "/".join(str(part) for part in (seed, stream, *index))
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 1


def generator(seed: int, stream: str, *index: int | str) -> torch.Generator:
    """A CPU generator for one stream. What is drawn is moved, so that every device sees the same numbers."""
    return torch.Generator().manual_seed(derive_seed(seed, stream, *index))


@contextlib.contextmanager
def seeded(seed: int, stream: str, *index: int | str, device: torch.device = _CPU):
    """Run code that can only draw from torch's global generators on its own stream.

    Weight initialisers draw from the CPU's; layers such as dropout from that of their ``device``, which is seeded, too.
    """
    own, cuda = derive_seed(seed, stream, *index), [device] if device.type == "cuda" else []
    with torch.random.fork_rng(cuda):
        torch.default_generator.manual_seed(own)  # torch.manual_seed would reseed every CUDA device
        for each in cuda:
            with torch.cuda.device(each):
                torch.cuda.manual_seed(own)
        yield
