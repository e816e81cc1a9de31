"""Text-to-image generation with the checkpoints of DALL-3 (2021): `from dall3 import Dall3Pipeline`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dall3.output import Dall3Output
    from dall3.pipeline import Dall3Pipeline
    from dall3.request import StopGeneration
    from dall3.wall import Wall
    from dall3.weights.archive import CheckpointError

__version__ = "0.2.0"
__all__ = ["CheckpointError", "Dall3Output", "Dall3Pipeline", "StopGeneration", "Wall", "__version__"]

_MODULES = {
    "CheckpointError": "weights.archive",
    "Dall3Output": "output",
    "Dall3Pipeline": "pipeline",
    "StopGeneration": "request",
    "Wall": "wall",
}


def __getattr__(name: str) -> Any:
    # Imported at first use: `import dall3` alone must not wait for torch.
    if name in _MODULES:
        from importlib import import_module

        return getattr(import_module(f"dall3.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'dall3' has no attribute '{name}'")
