"""Random numbers that follow from the seed and the picture's number alone."""

from __future__ import annotations

import os

import numpy as np
import torch
from torch import Tensor

from dall3.errors import require

STREAMS = ("tokens", "noise", "cutouts", "speculation", "change")  # of random numbers that follow from one seed


def choose_seed(seed: int | None, generator: torch.Generator | None = None) -> int:
    """The seed as given, drawn from the generator, or from the system.

    Raises ValueError for a seed that is not a whole number in [0, 2**63).
    """
    if seed is not None:
        whole = isinstance(seed, int | np.integer) and not isinstance(seed, bool) and 0 <= seed < 2**63
        require(whole, f"seed={seed}; expected a whole number in [0, 2**63)")
        return int(seed)
    if generator is not None:
        return int(torch.randint(2**62, (), generator=generator, device=generator.device))
    return int.from_bytes(os.urandom(4), "little")


def make_generator(device: torch.device | str, seed: int, stream: str, k: int = 0) -> torch.Generator:
    """A generator whose numbers follow from the seed, the stream (a name in STREAMS) and a picture's number alone.

    The first picture's noise is that of the bare seed: what upstream's sample.py draws on the same kind of device.
    """
    if stream == "noise" and k == 0:
        return torch.Generator(device).manual_seed(seed)
    state = np.random.SeedSequence((seed, STREAMS.index(stream) + 1, k)).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(state >> np.uint64(1)))


def candidate_uniforms(seed: int, candidates: range, count: int) -> Tensor:
    """Random numbers in [0, 1), float (candidates, count), that follow from the seed and a candidate's number alone.

    Made on the CPU, so that they are the same wherever the tokens are drawn.
    """
    return torch.stack([torch.rand(count, generator=make_generator("cpu", seed, "tokens", k)) for k in candidates])
