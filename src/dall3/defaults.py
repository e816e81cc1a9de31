"""Settings that suit weights: checked where they are loaded or saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dall3.diffusion.denoising import Refinement
from dall3.errors import require
from dall3.tokens.sampling import Sampling
from dall3.weights.archive import CheckpointError, one_line
from dall3.weights.folder import DEFAULTS, read_defaults
from dall3.weights.limits import check_limits
from dall3.weights.registry import PathLike


def check_defaults(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings as they are. Raises ValueError for one that `Sampling` and `Refinement` lack or do not take."""
    kinds = (Sampling, Refinement)
    check_limits(settings)
    try:
        for kind in kinds:
            kind(**{name: value for name, value in settings.items() if name in kind.__dataclass_fields__})
    except TypeError as error:
        raise ValueError(f"settings of another type ({error})") from None
    unknown = [name for name in settings if all(name not in kind.__dataclass_fields__ for kind in kinds)]
    require(not unknown, f"unknown setting {', '.join(unknown)}; expected those of Sampling and Refinement")
    return settings


def load_defaults(folder: PathLike) -> dict[str, Any]:
    """The settings that suit the weights of a pipeline folder; none where it has none.

    Raises CheckpointError for a file that holds others than those of `Sampling` and `Refinement`.
    """
    try:
        return check_defaults(read_defaults(folder))
    except ValueError as error:
        raise error if isinstance(error, CheckpointError) else one_line(Path(folder) / DEFAULTS, error) from None
