"""Checkpoints and folders of weights: loaders that stand alone.

>>> from dall3.weights import load_vqgan
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dall3.weights.checkpoints import load_clip, load_discrete_vae, load_transformer, load_unet, load_vqgan

__all__ = ["load_clip", "load_discrete_vae", "load_transformer", "load_unet", "load_vqgan"]


def __getattr__(name: str) -> Any:
    if name in __all__:  # at first use: a name in the registry is looked up without torch
        return getattr(import_module("dall3.weights.checkpoints"), name)
    raise AttributeError(f"module 'dall3.weights' has no attribute '{name}'")
