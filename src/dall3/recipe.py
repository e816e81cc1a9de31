"""Validation of the settings in a recipe, which is untrusted input, and their conversion to arguments of a call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dall3.diffusion.denoising import Denoising
from dall3.errors import require
from dall3.parts import Parts
from dall3.settings import check_defaults
from dall3.tokens.sampling import Sampling

# Arguments in a recipe besides the fields of Sampling and Denoising. Values: the upper bound of a number, or str.
REPEATABLE: dict[str, Any] = {
    **dict(num_images=4096, num_candidates=2**20, batch_size=2**16, refine_batch_size=4096, output_size=4096),
    **dict(seed=2**63, truncate=True, guidance_prompt=str, negative_prompt=str),
}
NOT_ARGUMENTS = ("kept", "weights", "seeds", "callback")  # entries of a recipe that are not arguments of the call


def recipe_arguments(found: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of the call among a recipe's settings. Raises ValueError for unknown or invalid ones."""
    settings = {name: value for name, value in found.items() if name not in NOT_ARGUMENTS}
    known = {*REPEATABLE, *Sampling.__dataclass_fields__, *Denoising.__dataclass_fields__}
    unknown = ", ".join(map(repr, sorted(settings.keys() - known)))
    require(not unknown, f"the recipe has unknown settings: {unknown[:200]}; it may be of a later version")
    require(isinstance(found.get("weights", {}), dict), "the recipe's weights are not a dictionary of hashes by part")
    check_defaults({name: value for name, value in settings.items() if name not in REPEATABLE})
    for name, bound in REPEATABLE.items():
        value = settings.get(name)
        valid = value is None or (isinstance(value, str if bound is str else int) and (bound is str or value <= bound))
        expected = "a string" if bound is str else "true or false" if bound is True else f"an integer up to {bound}"
        require(valid, f"the recipe's {name} is {str(value)[:40]!r}; expected {expected}")
    return settings


def kept_of_recipe(parts: Parts, kept: Any, length: int) -> Tensor:
    """The kept tokens of a recipe, int64 (length,), -1 for drawn tokens. Raises ValueError for an invalid list."""
    valid = isinstance(kept, list) and len(kept) == length and all(type(token) is int for token in kept)
    require(valid, f"the recipe's kept tokens are not a list of {length} integers")
    parts.check_tokens(torch.tensor(kept).clamp(min=0))
    return torch.tensor(kept, device=parts.device)


def seeds_of_recipe(seeds: Any, count: int) -> tuple[int, ...]:
    """The seeds of a recipe, one per image. Raises ValueError for an invalid seed or another number than `count`."""
    valid = isinstance(seeds, list) and len(seeds) == count
    valid = valid and all(type(seed) is int and 0 <= seed < 2**63 for seed in seeds)
    require(valid, f"the recipe's seeds are not a list of {count} integers in [0, 2**63)")
    return tuple(seeds)
