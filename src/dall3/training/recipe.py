"""Recipes: the settings of all parts in one TOML file, and the parts that they describe.

The tables are [family], [defaults], [tokenizer], and for every other part [PART.model], [PART.loss], [PART.train] and
[PART.pool].
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dall3.models.clip import CLIPConfig
from dall3.models.transformer import TransformerConfig
from dall3.models.unet import UNetConfig
from dall3.models.vqgan import VQGANConfig, VQModel
from dall3.settings import check_defaults
from dall3.text import TextEncoder, Tokenizer
from dall3.training.clip import CLIPLoss, CLIPPart
from dall3.training.config import TrainingConfig
from dall3.training.part import Part
from dall3.training.pool import PoolConfig
from dall3.training.processes import Processes
from dall3.training.tokenizer import TokenizerConfig
from dall3.training.transformer import TransformerLoss, TransformerPart
from dall3.training.upsampler import UpsamplerLoss, UpsamplerPart
from dall3.training.vqgan import VQGANLoss, VQGANPart
from dall3.weights.folder import from_json
from dall3.weights.registry import read_toml

RECIPE = Path(__file__).parent / "settings/mini.toml"  # recipe of the bundled weights
PARTS = ("vqgan", "transformer", "clip", "upsampler")
TABLES: dict[str, Any] = {"train": TrainingConfig, "pool": PoolConfig}
LOSSES: dict[str, Any] = {
    "vqgan": VQGANLoss,
    "transformer": TransformerLoss,
    "clip": CLIPLoss,
    "upsampler": UpsamplerLoss,
}
TINY_POOL = {"capacity": 64, "first": 4, "chunk": 4}
TINY: dict[str, Any] = {  # overrides of `--tiny`: networks and images that a CPU trains in seconds
    "tokenizer": {"vocab_size": 400, "captions": 200},
    "vqgan": {
        "model": {"ch_mult": [1, 1, 1], "n_embed": 64, "z_channels": 32},
        "loss": {"perceptual_weight": 0.0, "discriminator_channels": 8},
        "train": {"batch_size": 4, "side": 32},
        "pool": TINY_POOL,
    },
    "transformer": {
        "model": {"dim": 32, "depth": 1, "heads": 1, "dim_head": 32, "grid_size": 8},
        "train": {"batch_size": 4, "side": 32, "compile": False},
        "pool": TINY_POOL,
    },
    "clip": {
        "model": {
            "embed_dim": 32,
            "vision_cfg": {"image_size": 32, "width": 8, "head_width": 8, "layers": [1, 1, 1, 1]},
            "text_cfg": {"width": 32, "heads": 1, "layers": 1},
        },
        "train": {"batch_size": 4, "side": 32, "share": 1.0},
        "pool": TINY_POOL,
    },
    "upsampler": {
        "model": {"channel_mult": [1, 1, 1, 1, 1], "attention_levels": [], "image_size": 64},
        "loss": {"perceptual_weight": 0.0, "discriminator_channels": 8},
        "train": {"batch_size": 2, "side": 64, "compile": False},
        "pool": TINY_POOL,
    },
}


def read_training_recipe(path: str | Path, tiny: bool = False) -> dict[str, Any]:
    """Read a whole recipe. Raises ValueError for missing or unknown tables and settings."""
    recipe = read_toml(path)
    wanted = {"family", "defaults", "tokenizer", *PARTS}
    if recipe.keys() != wanted:
        raise ValueError(f"{path}: tables {', '.join(sorted(recipe))}; expected {', '.join(sorted(wanted))}")
    recipe = laid_over(recipe, TINY) if tiny else recipe
    check_training_recipe(recipe, path)
    return recipe


def read_settings(path: str | Path | None) -> dict[str, Any]:
    """Read settings for training on your own data. Missing settings come from the recipe of the bundled weights.

    Raises ValueError for unknown tables and settings.
    """
    recipe = read_toml(RECIPE)
    if path is None:
        return recipe
    own = read_toml(path)
    if unknown := own.keys() - recipe.keys():
        raise ValueError(f"{path}: {', '.join(sorted(unknown))}; expected some of {', '.join(sorted(recipe))}")
    check_training_recipe(own, path)
    return laid_over(recipe, own)


def check_training_recipe(recipe: dict[str, Any], path: str | Path) -> None:
    """Raise ValueError for settings that are unknown or out of range. Networks are checked when they are made."""
    try:
        from_json(TokenizerConfig, recipe.get("tokenizer", {}))
        check_defaults(recipe.get("defaults", {}))
        for part in PARTS:
            tables = recipe.get(part, {})
            unknown = set(tables) - {"model", "loss", "train", "pool"}
            if unknown or not all(isinstance(table, dict) for table in tables.values()):
                odd = ", ".join(sorted(unknown)) or "a value"
                raise ValueError(f"[{part}] has {odd}; expected tables {part}.model, .loss, .train and .pool")
            for name, config in (TABLES | {"loss": LOSSES[part]}).items():
                from_json(config, tables.get(name, {}))
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path}: {error}") from None


def laid_over(settings: dict[str, Any], others: dict[str, Any]) -> dict[str, Any]:
    """Override nested settings by others."""
    found = dict(settings)
    for name, value in others.items():
        found[name] = laid_over(found.get(name, {}), value) if isinstance(value, dict) else value
    return found


def make_part(
    name: str,
    recipe: dict[str, Any],
    tokenizer: Callable[[], Tokenizer],
    vqgan: Callable[[], VQModel | None],
    processes: Processes,
) -> Part:
    """Create a part with untrained weights on the device. tokenizer, vqgan: called by the parts that need them.

    Raises ValueError for settings from which no network can be built.
    """
    model, loss = recipe[name]["model"], from_json(LOSSES[name], recipe[name].get("loss", {}))
    try:
        part = build(name, model, loss, tokenizer, vqgan, processes)
    except (TypeError, KeyError) as error:
        raise ValueError(f"[{name}.model]: {error}") from None
    # The convolutions of CLIP are faster in channels_last on a CPU too: it has no group normalization.
    layout = torch.channels_last if name == "clip" else processes.layout
    return part.to(processes.device).to(memory_format=layout)


def build(
    name: str,
    model: dict[str, Any],
    loss: Any,
    tokenizer: Callable[[], Tokenizer],
    vqgan: Callable[[], Any],
    processes: Processes,
) -> Part:
    if name == "vqgan":
        return VQGANPart(from_json(VQGANConfig, model), loss, processes)
    if name == "upsampler":
        return UpsamplerPart(from_json(UNetConfig, model), loss, vqgan(), processes)
    words = tokenizer()
    if name == "clip":
        vocabulary = {"vocab_size": words.vocab_size + 2}
        config = from_json(CLIPConfig, model | {"text_cfg": vocabulary | model["text_cfg"]})
        return CLIPPart(config, loss, words, vqgan(), processes)
    codes = vqgan()
    numbers = {"num_text_tokens": words.vocab_size, "num_image_tokens": codes.num_tokens}
    config = from_json(TransformerConfig, numbers | model)
    encoder = TextEncoder(words, config.text_seq_len, config.num_text_tokens)
    return TransformerPart(config, loss, codes, encoder, processes)
