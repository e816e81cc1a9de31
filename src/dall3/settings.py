"""Types of the keyword arguments of the public calls, and their conversion to `Sampling` and `Denoising`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Literal, TypedDict

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dall3.diffusion.denoising import Denoising
from dall3.diffusion.samplers import SAMPLERS
from dall3.errors import require
from dall3.images import ImageInput, OutputType
from dall3.tokens.sampling import Sampling
from dall3.weights.limits import check_limits

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

    from dall3.pipeline import Dall3Pipeline

Stage = Literal["upsampler", "super_resolution"]  # the part that refines the images
Weighted = Sequence[tuple[str, float]]  # prompts and their weights
WeightedImages = Sequence[tuple[ImageInput, float]]  # images and their weights
Callback = Callable[["Dall3Pipeline", int, int, dict[str, Tensor]], object]  # pipeline, step, timestep, tensors

# Schedulers of diffusers by name: the class and its arguments.
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_karras": ("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "dpm++_2m": ("DPMSolverMultistepScheduler", {}),
    "dpm++_2m_karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "dpm++_2m_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "dpm++_2m_sde_karras": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True},
    ),
    "deis": ("DEISMultistepScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
}


class SamplingSettings(TypedDict, total=False):
    """Fields of `Sampling`; `sampling` sets them all."""

    temperature: float
    top_k: float | None
    top_p: float | None
    cond_scale: float
    guidance_scale: float  # alias of cond_scale
    quantize: Literal["float16", "int8"] | None
    jacobi_window: int | None
    sampling: Sampling


class DenoisingSettings(TypedDict, total=False):
    """Fields of `Denoising`; `denoising` sets them all."""

    num_inference_steps: int | str
    scheduler: str | SchedulerMixin
    strength: float | None
    stop_at: int | None
    clip_guidance_scale: float
    tv_scale: float
    range_scale: float
    cutn: int
    guidance_share: float
    seamless: bool
    denoising: Denoising


class StartSettings(TypedDict, total=False):
    """An initial image, and the selection of the tokens that are drawn again."""

    image: ImageInput | None  # alias of init_image
    init_image: ImageInput | None
    keep_rows: int | None
    redraw: Sequence[int] | None
    mask_image: Image.Image | np.ndarray | Tensor | Sequence[int] | None
    change: float | None


class DrawSettings(SamplingSettings, total=False):
    """Settings that control how tokens are drawn."""

    negative_prompt: str | None
    seed: int | None
    generator: torch.Generator | Sequence[torch.Generator] | None
    batch_size: int | None
    truncate: bool
    progress: bool


class TokenSettings(DrawSettings, StartSettings, total=False):
    """Keyword arguments of `Dall3Pipeline.generate_tokens`."""


class OutputSettings(DenoisingSettings, total=False):
    """Settings that control how coarse images are refined."""

    guidance_prompt: str | None
    output_size: int | None
    output_type: OutputType
    refine_batch_size: int | None
    callback_on_step_end: Callback | None


class RefineSettings(OutputSettings, total=False):
    """Keyword arguments of `Dall3Pipeline.refine`."""

    progress: bool


class VariationSettings(DrawSettings, OutputSettings, total=False):
    """Keyword arguments of `Dall3Pipeline.variations`."""


class CallSettings(VariationSettings, StartSettings, total=False):
    """Keyword arguments of the pipeline's call and of `stream`."""


class UpsampleSettings(DenoisingSettings, total=False):
    """Keyword arguments of `Dall3Pipeline.upsample`."""

    image_prompts: WeightedImages
    output_size: int | None
    stage: Stage
    seed: int | None
    generator: torch.Generator | None
    batch_size: int | None
    progress: bool
    callback_on_step_end: Callback | None


def check_arguments(call: str, settings: Mapping[str, Any], known: Any) -> dict[str, Any]:
    """Check the names of keyword arguments against a TypedDict, resolve aliases and convert numpy values.

    call: name of the call in error messages. Raises TypeError for an unknown name, with the closest known one, and
    ValueError if an argument and its alias are both given.
    """
    for name in settings:
        if name not in known.__annotations__:
            near = get_close_matches(name, known.__annotations__, 1)
            hint = f". Did you mean '{near[0]}'?" if near else ""
            raise TypeError(f"{call} got an unexpected keyword argument '{name}'{hint}")
    given = {name: as_number(value) for name, value in settings.items()}
    for name, other in (("cond_scale", "guidance_scale"), ("init_image", "image")):
        if given.get(other) is not None:
            require(given.get(name) is None, f"{name} and {other} are aliases; pass only one of them")
            given[name] = given[other]
        given.pop(other, None)
    return given


def as_number(value: Any) -> Any:
    """Convert a numpy scalar or a zero-dimensional array or tensor to a Python number. Other values are unchanged."""
    single = isinstance(value, np.generic) or (isinstance(value, np.ndarray | Tensor) and value.ndim == 0)
    return value.item() if single else value


def with_defaults(defaults: Mapping[str, Any], kind: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """The given settings of `kind` (`Sampling` or `Denoising`), completed from `defaults`.

    A given top_k or top_p replaces both filters of the defaults.
    """
    filters = {"top_k", "top_p"}
    replaced = filters if any(given.get(name) is not None for name in filters) else set()
    used = {name: v for name, v in defaults.items() if name in kind.__dataclass_fields__ and name not in replaced}
    return used | dict(given)


def pop_fields(given: dict[str, Any], kind: Any, instance: Any, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Remove the fields of `kind` (`Sampling` or `Denoising`) from `given` and return them.

    Missing fields come from `instance`, an instance of `kind`, or from `defaults` if it is None. Raises TypeError for
    an instance of another type.
    """
    fields = {name: given.pop(name) for name in kind.__dataclass_fields__ if name in given}
    if instance is None:
        return with_defaults(defaults, kind, fields)
    if not isinstance(instance, kind):
        raise TypeError(f"{kind.__name__.lower()} is a {type(instance).__name__}; expected a {kind.__name__}")
    return {name: as_number(value) for name, value in vars(instance).items()} | fields


def find_scheduler(scheduler: str | SchedulerMixin) -> str | SchedulerMixin:
    """Return the name of a built-in sampler or a scheduler of diffusers; a name in SCHEDULERS is instantiated.

    Raises ValueError for an unknown name, or a name of diffusers if diffusers is not installed.
    """
    if not isinstance(scheduler, str) or scheduler in SAMPLERS:
        return scheduler
    names = ", ".join(f"'{name}'" for name in (*SAMPLERS, *SCHEDULERS))
    require(scheduler in SCHEDULERS, f"unknown scheduler {scheduler!r}; expected {names}, or an object of diffusers")
    try:
        import diffusers
    except ImportError:
        raise ValueError(f"scheduler '{scheduler}' needs diffusers; run pip install 'dall3[schedulers]'") from None
    kind, settings = SCHEDULERS[scheduler]
    made: SchedulerMixin = getattr(diffusers, kind)(**settings)
    return made


def check_defaults(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Validate default settings and return a copy. Raises ValueError for an unknown setting or a value out of range."""
    settings = dict(settings)
    check_limits(settings)
    known = (*Sampling.__dataclass_fields__, *Denoising.__dataclass_fields__)
    unknown = [name for name in settings if name not in known]
    require(not unknown, f"unknown setting {', '.join(unknown)}; expected fields of Sampling and Denoising")
    try:
        for kind in (Sampling, Denoising):
            fields = {name: value for name, value in settings.items() if name in kind.__dataclass_fields__}
            if "scheduler" in fields:
                fields["scheduler"] = find_scheduler(fields["scheduler"])
            kind(**fields)
    except TypeError as error:
        raise ValueError(f"a setting has a value of an invalid type ({error})") from None
    return settings
