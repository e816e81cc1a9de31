"""Random number generators that depend only on the seed, the stream and the index of the image."""

from __future__ import annotations

import os

import numpy as np
import torch
from torch import Tensor

from dall3.errors import require

# Independent streams of a seed. A stream's number is its position, so the order must not change.
STREAMS = ("tokens", "noise", "cutouts", "speculation", "change")


def choose_seed(seed: int | None, generator: torch.Generator | None = None) -> int:
    """Return `seed` if given, else one drawn from `generator`, else one from the operating system.

    Raises ValueError for a seed that is not an integer in [0, 2**63).
    """
    if seed is not None:
        whole = isinstance(seed, int | np.integer) and not isinstance(seed, bool) and 0 <= seed < 2**63
        require(whole, f"seed={seed}; expected a whole number in [0, 2**63)")
        return int(seed)
    if generator is not None:
        return int(torch.randint(2**62, (), generator=generator, device=generator.device))
    return int.from_bytes(os.urandom(4), "little")


def make_generator(device: torch.device | str, seed: int, stream: str, k: int = 0) -> torch.Generator:
    """Create a generator for a seed, a stream (a name in STREAMS) and the index k of an image or candidate.

    The noise of image 0 uses the seed itself, so that it is the noise of upstream's sample.py on the same device
    type.
    """
    if stream == "noise" and k == 0:
        return torch.Generator(device).manual_seed(seed)
    state = np.random.SeedSequence((seed, STREAMS.index(stream) + 1, k)).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(state >> np.uint64(1)))


def candidate_uniforms(seed: int, candidates: range, count: int) -> Tensor:
    """Random numbers in [0, 1), float (candidates, count), one row for each candidate index.

    They are generated on the CPU, so that they are the same on every device.
    """
    return torch.stack([torch.rand(count, generator=make_generator("cpu", seed, "tokens", k)) for k in candidates])
