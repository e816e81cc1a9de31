"""The memory that each stage of a call needs, and the check, before any work, that it fits.

The sizes of key/value caches are exact. Activations are computed from the configurations of the networks. `Need.least`
is a lower bound: it counts only tensors that certainly exist at the same time. `StageEstimate.activations` estimates
the peak. A call is refused only if the lower bound does not fit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dall3.models.packed import PREPARED, can_pack, has_fbgemm, linear_weights
from dall3.models.upscaler import Upscaler
from dall3.parts import Parts
from dall3.tokens.batching import free_memory

if TYPE_CHECKING:
    from dall3.request import Request

GB = 1e9
# Peak of the activations, as a multiple of the lower bound. With the bundled weights 5.5, 2.7 and 18.8 were measured.
# Larger networks of the same families have the same layers, and so about the same ratios.
DECODING, DENOISING, GUIDED = 6.0, 3.0, 19.0
UPSCALING = 64  # approximate number of channels of an upscaler's last layers, which have the full size
# Number of tensors that a CLIP keeps for the backward pass: per transformer layer, in units of one vector per token; in
# total for a ResNet, in units of the output of its stem.
CLIP_TENSORS = 24


@dataclass(frozen=True)
class StageEstimate:
    """The memory that a stage of a call needs, in bytes, and its duration.

    name: "drawing", "ranking" or "refining". weights: weights of the networks that the stage runs. copied: upper bound
    for the copy of the weights in another layout that drawing on a CPU makes. caches: key/value caches. activations:
    intermediate results, estimated. batch_size: images processed at a time. seconds: duration, None if not measured.
    """

    name: str
    weights: int
    copied: int
    caches: int
    activations: int
    batch_size: int
    seconds: float | None = None


@dataclass(frozen=True)
class Need:
    """A stage with the memory that it allocates, besides memory that is allocated already."""

    stage: StageEstimate
    argument: str  # name of the argument that sets the batch size
    least: Callable[[int], int]  # from a batch size to a lower bound in bytes


def weight_bytes(part: Any) -> int:
    """Bytes of a network's parameters and buffers; 0 for None or a network that is not loaded."""
    if not isinstance(part, nn.Module):
        return 0
    held = {id(tensor): tensor.nbytes for tensor in (*part.parameters(), *part.buffers())}
    return sum(held.values())


def copied_bytes(transformer: Any, quantize: str | None) -> int:
    """Bytes of the copy of the linear weights that `packed.prepare` makes for drawing on a CPU."""
    weight = transformer.head[0]
    half = weight.device.type == "cpu" and weight.dtype == torch.float16 and has_fbgemm()
    if quantize is None and not half and not can_pack(weight):
        return 0
    numbers = sum(weight.numel() for weight in linear_weights(transformer))
    return numbers * {None: 2 if half else 4, "float16": 2, "int8": 1}[quantize]


def memory_needs(parts: Parts, request: Request) -> list[Need]:
    """The needs of all stages of a call."""
    return [drawing_need(parts, request), ranking_need(parts, request), *refining_needs(parts, request)]


def refining_needs(parts: Parts, request: Request) -> list[Need]:
    """The needs of the stages that refine images."""
    found = []
    if parts.upsampler is not None:
        found.append(refining_need(parts, request, "upsampler"))
    if request.output_size is not None and parts.super_resolution is not None:
        upscales = isinstance(parts.super_resolution, Upscaler)
        found.append(upscaling_need(parts, request) if upscales else refining_need(parts, request, "super_resolution"))
    return found


def drawing_need(parts: Parts, request: Request) -> Need:
    """The need of drawing tokens: the key/value cache, unless one is kept from an earlier call, and the logits."""
    transformer, sampling = parts.require("transformer", "drawing tokens"), request.sampling
    rows, batch = (1 if sampling.cond_scale == 1 else 2), min(request.batch_size, len(request.candidates()))
    logits = 4 * transformer.config.num_image_tokens  # float32

    def least(size: int) -> int:
        kept = transformer.keeps_cache(rows, size)
        return (0 if kept else transformer.cache_bytes(rows, size)) + rows * size * logits

    copied, caches = copied_bytes(transformer, sampling.quantize), transformer.cache_bytes(rows, batch)
    stage = StageEstimate("drawing", weight_bytes(transformer), copied, caches, 4 * rows * batch * logits, batch)
    # Quantized weights are certainly copied. Otherwise the layout, and so the size of the copy, depends on the weights.
    new = copied if sampling.quantize is not None and PREPARED.get(transformer) is None else 0
    return Need(stage, "batch_size", lambda size: new + least(size))


def ranking_need(parts: Parts, request: Request) -> Need:
    """The need of decoding the candidates and scoring them: the decoder's activations at full size."""
    transformer = parts.transformer
    vqgan: Any = parts.require("vqgan", "decoding tokens")
    batch = min(request.batch_size, len(request.candidates()))
    side = 16 if transformer is None else transformer.config.grid_size
    side = side * vqgan.downsampling * (3 if request.denoising.seamless else 2) // 2
    config, element = vqgan.config, next(vqgan.parameters()).element_size()
    width = config.ch * config.ch_mult[0] if hasattr(config, "ch") else 3

    def least(size: int) -> int:
        return size * side**2 * width * element

    clip = weight_bytes(parts.clip_or_loader)
    activations = int(DECODING * least(batch))
    stage = StageEstimate("ranking", weight_bytes(vqgan) + clip, 0, 0, activations, batch)
    return Need(stage, "batch_size", least)


def upscaling_need(parts: Parts, request: Request) -> Need:
    """The need of upscaling: the float32 results. An upscaler processes one image at a time, in tiles."""
    upscaler: Any = parts.require("super_resolution", "output_size")
    config, element = upscaler.config, next(upscaler.parameters()).element_size()
    tile = (config.tile + 2 * config.overlap) * config.scale
    stage = StageEstimate("refining", weight_bytes(upscaler), 0, 0, UPSCALING * tile**2 * element, 1)
    result = 3 * 4 * (request.output_size or 0) ** 2 * request.num_images
    return Need(stage, "num_images", lambda size: result)


def refining_need(parts: Parts, request: Request, name: str) -> Need:
    """The need of denoising with the UNet of a stage: its skip connections."""
    settings = request.denoising
    unet: Any = parts.require(name, "refining")
    config, batch = unet.config, min(request.refine_batch_size, request.num_images)
    large = request.output_size if name == "super_resolution" else None
    side = large or config.image_size
    if config.embedding_dims and parts.transformer is not None:  # the size follows from the tokens
        side = parts.transformer.config.grid_size // 2 * config.downsampling
    side += 2 * config.downsampling if settings.seamless else 0
    element = next(unet.parameters()).element_size()
    skips = sum(
        channels * (config.num_res_blocks + 1) * (side >> level) ** 2 for level, channels in enumerate(config.channels)
    )

    def least(size: int) -> int:
        return size * skips * element

    scales = settings.clip_guidance_scale, settings.tv_scale, settings.range_scale
    guided, clip = any(scales) and settings.guidance_share > 0, parts.clip_or_loader if scales[0] else None
    activations = int((GUIDED if guided and not unet.gradient_checkpointing else DENOISING) * least(batch))
    activations += batch * settings.cutn * clip_activation_bytes(clip)
    others = weight_bytes(clip) + (weight_bytes(parts.vqgan) if config.embedding_dims else 0)
    stage = StageEstimate("refining", weight_bytes(unet) + others, 0, 0, activations, batch)
    return Need(stage, "refine_batch_size", least)


def clip_activation_bytes(clip: Any) -> int:
    """Bytes of activations that a CLIP keeps for the backward pass of one image; 0 if it has no configuration."""
    vision = getattr(getattr(clip, "config", None), "vision_cfg", None)
    if not vision:
        return 0
    side, width, layers = vision["image_size"], vision.get("width", 768), vision.get("layers", 12)
    element = int(next(clip.parameters()).element_size())
    if not isinstance(layers, int):  # a ResNet, whose stem halves the sides
        return int(CLIP_TENSORS * width * (side // 2) ** 2 * element)
    return int(CLIP_TENSORS * layers * ((side // vision.get("patch_size", 16)) ** 2 + 1) * width * element)


def check_memory(parts: Parts, needs: list[Need]) -> None:
    """Raise ValueError if a stage of a call cannot fit the free memory of the device.

    On CUDA only a batch of one has to fit, because batches are halved if memory runs out.
    """
    device = parts.device
    free = free_memory(device)
    if free is None:
        return
    for need in needs:
        size = 1 if device.type == "cuda" else need.stage.batch_size
        moved = need.stage.weights if parts.offload_device is not None and device.type == "cuda" else 0
        least = need.least(size) + moved
        if least > free:
            raise ValueError(does_not_fit_message(parts, need, size, least, free, moved))


def does_not_fit_message(parts: Parts, need: Need, size: int, least: int, free: int, moved: int) -> str:
    """An error message: the stage that does not fit, and settings that need less memory."""
    device, many = parts.device, f"{size} images at a time" if size > 1 else "one image"
    words = f"{need.stage.name} {many} needs at least {least / GB:.2f} GB, and {device} has {free / GB:.2f} GB free"
    smaller = next((half for half in halves(size) if need.least(half) + moved <= free), None)
    ways = [] if smaller is None else [f"{need.argument}={smaller}"]
    if parts.dtype == torch.float32:
        half = "float16" if device.type == "cuda" else "bfloat16"
        fits = (least + 1) // 2 <= free
        ways += [f'pipe.to("{device}", torch.{half})' + ("" if fits else " with a smaller batch")]
    if device.type == "cuda" and parts.offload_device is None:
        ways.append(f'pipe.enable_model_offload("{device}")')
    if need.stage.name == "refining" and parts.dtype != torch.float32 and smaller is None:
        ways.append("a smaller output_size")
    return f"{words}; try {', or '.join(ways) or 'a device with more memory'}"


def halves(size: int) -> list[int]:
    """A batch size halved once, twice, … down to 1."""
    return [size >> k for k in range(1, int(math.log2(max(size, 1))) + 1)]
