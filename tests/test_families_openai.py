"""The diffusion networks of weights.toml at full size: every tensor of the published files is loaded."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from dall3.models.unet import UNetConfig
from dall3.weights import load_unet
from dall3.weights.registry import find_set

from originals import GOLDEN

NAMES = json.loads((GOLDEN / "unet_openai" / "names.json").read_text())
LEVELS = {256: (1, 1, 2, 2, 4, 4), 512: (0.5, 1, 1, 2, 2, 4, 4)}
OPENAI: dict[str, Any] = dict(num_res_blocks=2, num_head_channels=64, use_scale_shift_norm=True, resblock_updown=True)
PIXEL_ART: dict[str, Any] = dict(num_res_blocks=2, num_heads=1, use_scale_shift_norm=False, resblock_updown=False)


@pytest.mark.parametrize(
    ("name", "tensors", "config"),
    [
        (
            "openai-256-uncond",
            "256",
            UNetConfig(256, LEVELS[256], attention_levels=(3, 4, 5), image_size=256, **OPENAI),
        ),
        (
            "openai-512-uncond",
            "512",
            UNetConfig(256, LEVELS[512], attention_levels=(4, 5, 6), image_size=512, **OPENAI),
        ),
        ("pixel-art", "pixel_art", UNetConfig(128, LEVELS[256], attention_levels=(4,), image_size=256, **PIXEL_ART)),
        ("watercolour", "pixel_art", UNetConfig(128, LEVELS[256], attention_levels=(4,), image_size=256, **PIXEL_ART)),
    ],
)
def test_every_tensor_of_the_published_files_is_loaded(
    name: str, tensors: str, config: UNetConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = {key: torch.empty(shape, device="meta") for key, shape in NAMES[tensors].items()}
    monkeypatch.setattr("dall3.weights.convert.state.read_archive", lambda path: state)
    (part,) = find_set(name).parts
    assert (
        load_unet(part.file.name, part.settings or None).config == config
    )  # an error names missing and unexpected tensors
    lacking = next(key for key in state if key.startswith("output_blocks.3.0.out_layers"))
    del state[lacking]
    with pytest.raises(ValueError, match=f"missing: {lacking}"):
        load_unet(part.file.name, part.settings or None)
