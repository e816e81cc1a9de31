"""Loaders for checkpoints and folders of weights.

>>> from dall3.weights import load_vqgan
>>> vqgan = load_vqgan("vqgan.ckpt")  # doctest: +SKIP
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dall3.weights.convert.clip import load_clip
    from dall3.weights.convert.guided_diffusion import load_unet
    from dall3.weights.convert.transformer import load_transformer
    from dall3.weights.convert.upscaler import load_upscaler
    from dall3.weights.convert.vae import load_discrete_vae, load_vqgan

__all__ = ["load_clip", "load_discrete_vae", "load_transformer", "load_unet", "load_upscaler", "load_vqgan"]
MODULES = {
    "load_clip": "clip",
    "load_discrete_vae": "vae",
    "load_transformer": "transformer",
    "load_unet": "guided_diffusion",
    "load_upscaler": "upscaler",
    "load_vqgan": "vae",
}


def __getattr__(name: str) -> Any:
    if name in MODULES:  # imported on first use, so that the registry can be read without importing torch
        return getattr(import_module(f"dall3.weights.convert.{MODULES[name]}"), name)
    raise AttributeError(f"module 'dall3.weights' has no attribute '{name}'")
