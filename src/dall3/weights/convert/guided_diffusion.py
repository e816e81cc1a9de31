"""Converter for checkpoints of guided-diffusion (OpenAI's and Jack000's) to a UNet."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass, field
from typing import Any

from dall3.models.unet import DiffusionConfig, UNet, UNetConfig
from dall3.weights.archive import CheckpointError, file_error
from dall3.weights.convert.state import (
    UNET,
    Settings,
    as_bool,
    checked,
    count,
    load_tensors,
    read_settings,
    read_state,
    without_weights,
)
from dall3.weights.registry import PathLike

logger = logging.getLogger("dall3")

ATTENTION_HEADS = ("num_heads", "num_head_channels", "num_heads_upsample")
BOOLEAN_FLAGS = (
    *("learn_sigma", "predict_xstart", "rescale_timesteps", "use_new_attention_order", "use_scale_shift_norm"),
    *("resblock_updown", "class_cond", "emb_condition"),
)
INTEGER_FLAGS = (*("image_size", "large_size", "num_channels", "num_res_blocks", "diffusion_steps"), *ATTENTION_HEADS)


@dataclass(frozen=True)
class Published:
    """A network published in guided-diffusion's README or upstream's sample.py.

    flags: the settings that the tensors do not determine. The other fields identify the network by its tensors.
    """

    image_size: int
    channel_mult: tuple[float, ...]
    model_channels: int
    flags: dict[str, Any] = field(default_factory=dict)
    attention_levels: tuple[int, ...] = (1, 2, 3)
    num_res_blocks: int = 2
    super_resolution: bool = False


HEADS_OF_64 = {"num_head_channels": 64}
PUBLISHED = (
    Published(512, (0.5, 1, 1, 2, 2, 4, 4), 256, HEADS_OF_64, (4, 5, 6)),
    Published(256, (1, 1, 2, 2, 4, 4), 256, HEADS_OF_64, (3, 4, 5)),
    Published(128, (1, 1, 2, 3, 4), 256, {"num_heads": 4}, (2, 3, 4)),
    Published(
        *(64, (1, 2, 3, 4), 192, HEADS_OF_64 | {"use_new_attention_order": True, "noise_schedule": "cosine"}),
        num_res_blocks=3,
    ),
    Published(256, (1, 1, 2, 2, 4, 4), 192, {"num_heads": 4}, (3, 4, 5), super_resolution=True),
    Published(512, (1, 1, 2, 2, 4, 4), 192, HEADS_OF_64, (4, 5), super_resolution=True),
)


@checked
def load_unet(path: PathLike, config: PathLike | dict[str, Any] | None = None) -> UNet:
    """Load a checkpoint of guided-diffusion as a UNet in float32 on the CPU.

    config: the flags of its training, a dictionary or a JSON file, for settings that the tensors do not determine: the
    attention heads and the noise schedule. It is not needed if the tensors have the shapes of a published network: of
    512, 256, 128 or 64 pixels, or super-resolution to 256 or 512 pixels. `UNet.config.diffusion` holds the diffusion
    process of the training.

    Raises CheckpointError for a file of another kind, for flags that contradict the tensors, and if `config` is needed.

    >>> unet = load_unet("512x512_diffusion_uncond_finetune_008100.pt")  # doctest: +SKIP
    >>> unet = load_unet("upsampler.pt", {"num_heads": 4, "image_size": 256})  # doctest: +SKIP
    """
    state, flags = read_state(path, UNET).tensors, read_flags(config)
    model_channels, outputs = state["time_embed.0.weight"].shape[1], count(state, r"output_blocks\.(\d+)\.")
    doubles = re.compile(r"output_blocks\.(\d+)\.[12]\.(in_layers|conv)\.")
    # The last output block of a level ends with an upsampling residual block or convolution.
    doubling = [match[1] for name in state if (match := doubles.match(name))]
    blocks = min(map(int, doubling), default=outputs - 1)
    firsts = range(1, 1 + outputs, blocks + 1)  # each level's first input block
    channel_mult = tuple(len(state[f"input_blocks.{i}.0.out_layers.3.weight"]) / model_channels for i in firsts)
    attention_levels = tuple(level for level, i in enumerate(firsts) if f"input_blocks.{i}.1.qkv.weight" in state)
    super_resolution = state["input_blocks.0.0.weight"].shape[1] == 6
    first = "input_blocks.1.0."
    scale_shift = len(state[first + "emb_layers.1.weight"]) == 2 * len(state[first + "out_layers.3.weight"])
    updown = f"input_blocks.{blocks + 1}.0.op.weight" not in state

    sizes = [one for one in PUBLISHED if (one.channel_mult, one.super_resolution) == (channel_mult, super_resolution)]
    alike = [one for one in sizes if (one.attention_levels, one.num_res_blocks) == (attention_levels, blocks)]
    published = alike[0] if alike and scale_shift and updown else None
    published_size = next((one.image_size for one in alike or sizes), 0)
    image_size = flags.get("large_size", flags.get("image_size", published_size))
    if sizes and image_size != published_size and not super_resolution and not flags.get("channel_mult"):
        raise file_error(
            path, f"the config says image_size={image_size}, but its tensors are those of {published_size} pixels"
        )
    given = {name: value for name, value in flags.items() if value not in (-1, "", None)}
    heads = given.keys() & set(ATTENTION_HEADS)  # flags with heads count as complete: missing ones have their default
    if not image_size or (published is None and not heads):
        raise file_error(
            path,
            "a UNet of an unusual size: its tensors do not determine its attention heads; pass the flags of its "
            "training as config, a dictionary or a JSON file with image_size, num_heads or num_head_channels, "
            "noise_schedule, …",
        )
    if published is not None and not heads:
        if model_channels != published.model_channels:
            logger.warning(
                "%s: has %d channels where the published network of %d pixels has %d; its flags are used (%s); pass "
                "config if it was trained with other flags",
                *(path, model_channels, published.image_size, published.model_channels, published.flags),
            )
        given = published.flags | given
    diffusion = DiffusionConfig(
        diffusion_steps=given.get("diffusion_steps", 1000),
        noise_schedule=given.get("noise_schedule", "linear"),
        learn_sigma=len(state["out.2.weight"]) == 6,
        predict_xstart=given.get("predict_xstart", False),
        rescale_timesteps=given.get("rescale_timesteps", True),
    )
    embedding, labels = state.get("external_block.op.weight"), state.get("label_emb.weight")
    unet_config = UNetConfig(
        model_channels=model_channels,
        channel_mult=channel_mult,
        num_res_blocks=blocks,
        attention_levels=attention_levels,
        image_size=image_size,
        **{name: given[name] for name in ATTENTION_HEADS if name in given},
        use_new_attention_order=given.get("use_new_attention_order", False),
        use_scale_shift_norm=scale_shift,
        resblock_updown=updown,
        num_classes=None if labels is None else len(labels),
        embedding_dims=None if embedding is None else (embedding.shape[1], embedding.shape[0]),
        super_resolution=super_resolution,
        diffusion=diffusion,
    )
    check_unet_flags(unet_config, flags, path)
    with without_weights():
        model = UNet(unet_config)
    return load_tensors(model, state, path)


def read_flags(config: Settings | None) -> dict[str, Any]:
    """Read guided-diffusion's flags. Text values, as copied from a command line, become numbers and booleans.

    Raises CheckpointError for a file that is not a JSON object; ValueError for a value of the wrong type.
    """
    flags = read_settings(config, "guided-diffusion's flags")
    for name, value in flags.items():
        read: Any = as_bool if name in BOOLEAN_FLAGS else int if name in INTEGER_FLAGS else None
        if read is not None and value not in ("", None):
            try:
                flags[name] = read(value)
            except (TypeError, ValueError):
                raise ValueError(
                    f"the flag {name}={value!r}; expected {'true or false' if read is as_bool else 'a number'}"
                ) from None
    return flags


def check_unet_flags(found: UNetConfig, flags: dict[str, Any], path: PathLike) -> None:
    """Raise CheckpointError if the flags contradict the tensors."""
    for flag, value in (
        ("num_channels", found.model_channels),
        ("num_res_blocks", found.num_res_blocks),
        ("use_scale_shift_norm", found.use_scale_shift_norm),
        ("learn_sigma", found.diffusion.learn_sigma),
        ("emb_condition", found.embedding_dims is not None),
        ("class_cond", found.num_classes is not None),
    ):
        if flag in flags and flags[flag] != value:
            raise CheckpointError(f"the config says {flag}={flags[flag]}, but {path} has {value}")
