"""Job: the validated settings of a run, the same on every machine."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from dall3.diffusion.denoising import Denoising, default_refine_batch_size
from dall3.errors import require
from dall3.models.packed import check_quantization
from dall3.pipeline import Dall3Pipeline
from dall3.request import example_prompt, make_request
from dall3.tokens.sampling import Sampling, check_counts
from dall3.weights.registry import PathLike

STAGE_NAMES = ("draw", "rank", "refine")


@dataclass(frozen=True)
class Job:
    """The settings of a run as plain values. weights: the name that every machine loads them by."""

    weights: str | None
    dtype: str
    threads: int  # torch threads per stage; their number affects rounding, which can change a sampled token
    devices: dict[str, str]  # device of each stage
    refine: bool
    rank_batch_size: int
    tokens: int  # per image
    token_type: str  # dtype of tokens between stages
    sampling: dict[str, Any]
    denoising: dict[str, Any]
    recipe: dict[str, Any]  # the recipe of an image, without the prompt's seed

    def settings(self) -> dict[str, Any]:
        """The settings that determine the images. They include the content of the weights, but not their location."""
        redundant = ("weights", "sampling", "denoising")  # the recipe contains the last two
        return {name: value for name, value in asdict(self).items() if name not in redundant}


def load_pipeline(weights: PathLike | None, dtype: str, refine: bool) -> Dall3Pipeline:
    """Load the pipeline of a run, on the CPU. Without `refine` it has no upsampler and no super_resolution."""
    pipe = Dall3Pipeline.from_pretrained(weights, dtype=getattr(torch, dtype), progress=False)
    pipe.super_resolution = None
    if not refine:
        pipe.upsampler = None
    return pipe


def make_job(
    pipe: Dall3Pipeline,
    weights: PathLike | None,
    dtype: str,
    devices: dict[str, str],
    num_images: int,
    num_candidates: int,
    batch_size: int,
    rank_batch_size: int | None,
    refine_batch_size: int | None,
    truncate: bool,
    threads: int,
    settings: dict[str, Any],
) -> Job:
    """Validate the settings of a run. Raises ValueError for a setting out of range or a missing part, and TypeError for
    an unknown setting.
    """
    rank_batch_size = batch_size if rank_batch_size is None else rank_batch_size
    check_counts(rank_batch_size=rank_batch_size, threads=threads)
    known = {*Sampling.__dataclass_fields__, *Denoising.__dataclass_fields__}
    unknown = sorted(settings.keys() - known)
    if unknown:
        raise TypeError(f"unknown setting {', '.join(unknown)}; expected fields of Sampling and Denoising")
    scheduler = settings.get("scheduler", "")
    require(isinstance(scheduler, str), "a scheduler object cannot be stored in a run's settings; pass a name")
    how: dict[str, Any] = dict(num_images=num_images, num_candidates=num_candidates, batch_size=batch_size)
    how |= dict(refine_batch_size=default_refine_batch_size(refine_batch_size, devices["refine"]))
    how |= dict(truncate=truncate, progress=False)
    request = make_request(pipe, example_prompt(pipe), seed=0, **(how | {"truncate": True}), **settings)
    pipe.clip  # noqa: B018  load it, so that it is among the fingerprints
    assert pipe.transformer is not None
    config = pipe.transformer.config
    sampling, denoising = asdict(request.sampling), vars(request.denoising) | {"scheduler": request.scheduler}
    check_quantization(sampling["quantize"], torch.device(devices["draw"]))
    recipe = request.recipe() | {"truncate": truncate, "weights": pipe.fingerprints()}
    del recipe["seed"]
    return Job(
        weights=None if weights is None else str(weights),
        dtype=dtype,
        threads=threads,
        devices=devices,
        refine=pipe.upsampler is not None,
        rank_batch_size=rank_batch_size,
        tokens=config.image_seq_len,
        token_type="int16" if config.num_image_tokens <= 2**15 else "int32",
        sampling=sampling,
        denoising=denoising,
        recipe=recipe,
    )
