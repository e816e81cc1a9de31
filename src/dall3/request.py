"""Request: the arguments of a call, validated once before any work, and their conversion to and from a recipe."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dall3.diffusion.denoising import Denoising, default_refine_batch_size
from dall3.diffusion.schedule import space_timesteps
from dall3.errors import require
from dall3.images import OutputType, check_output_type
from dall3.memory import check_memory, memory_needs, refining_needs
from dall3.models.packed import check_quantization
from dall3.models.upscaler import Upscaler
from dall3.parts import NETWORKS, Parts
from dall3.recipe import kept_of_recipe, recipe_arguments, seeds_of_recipe
from dall3.settings import (
    Callback,
    CallSettings,
    DenoisingSettings,
    RefineSettings,
    Stage,
    TokenSettings,
    Weighted,
    WeightedImages,
    as_number,
    check_arguments,
    find_scheduler,
    pop_fields,
)
from dall3.start import tokens_to_keep
from dall3.text import TextEncoder
from dall3.tokens.batching import fitting_batch_size
from dall3.tokens.sampling import Sampling, check_counts
from dall3.tokens.seeds import choose_seed

NEGATIVE_WEIGHT = -0.5  # weight of negative_prompt in CLIP guidance; the prompt has weight 1


class StopGeneration(Exception):
    """Raised by a `callback_on_step_end` to stop the denoising. The call then returns the images as they are.

    >>> from dall3 import Dall3Pipeline
    >>> def after_two(pipe, step, timestep, tensors):
    ...     if step == 1:
    ...         raise StopGeneration
    >>> out = Dall3Pipeline.from_pretrained()("a cube", seed=0, progress=False, callback_on_step_end=after_two)
    >>> len(out)
    1
    """


class Repeated(NamedTuple):
    """The image that `Dall3Pipeline.repeat` makes again."""

    candidate: int  # candidate number
    place: int  # index among the images of the call


@dataclass(frozen=True, eq=False)
class Request:
    """The validated arguments of a call."""

    prompt: str = ""
    num_images: int = 1
    num_candidates: int = 1
    sampling: Sampling = field(default_factory=Sampling)
    denoising: Denoising = field(default_factory=Denoising)
    scheduler: str = "ddim"  # its name, or the class name of a scheduler object
    negative_prompt: str | None = None
    guidance_prompt: str | None = None
    texts: Weighted = ()  # text targets of CLIP guidance
    image_prompts: WeightedImages = ()  # image targets of CLIP guidance
    kept: Tensor | None = None  # int64 (image tokens,), -1 for tokens to draw
    output_size: int | None = None
    output_type: OutputType = "pil"
    seed: int = 0
    seeds: tuple[int, ...] | None = None  # one per image, from a list of generators
    batch_size: int = 1
    refine_batch_size: int = 1
    truncate: bool = False
    progress: bool = True
    callback: Callback | None = None
    repeated: Repeated | None = None

    def candidates(self) -> range:
        """The numbers of the candidates to draw: all, or for `repeat` the batch with the repeated one."""
        if self.repeated is None:
            return range(self.num_candidates)
        batch = batch_of(self.repeated.candidate, self.batch_size, self.num_candidates)
        # If the last batch has a single candidate, the batch before it is drawn too: decoding one candidate alone uses
        # another weight layout, which rounds differently.
        return range(max(batch.start - self.batch_size, 0), batch.stop) if len(batch) == 1 else batch

    def places(self, count: int) -> range:
        """The indices of the images to refine: all `count`, or for `repeat` the batch with the repeated one."""
        if self.repeated is None:
            return range(count)
        return batch_of(self.repeated.place, self.refine_batch_size, self.num_images)

    def source(self, number: int) -> tuple[int, int]:
        """Seed and index of a candidate's random numbers, as `make_generator` takes them."""
        return (self.seed, number) if self.seeds is None else (self.seeds[number], 0)

    def noise_source(self, place: int, candidate: int) -> tuple[int, int]:
        """Seed and index of an image's noise, as `make_generator` takes them."""
        return (self.seed, place) if self.seeds is None else (self.seeds[candidate], 0)

    def recipe(self) -> dict[str, Any]:
        """The request without the prompt, as plain values for the PNG's recipe."""
        names = ("num_images", "num_candidates", "guidance_prompt", "output_size", "seed", "batch_size")
        settings = {name: getattr(self, name) for name in (*names, "refine_batch_size", "truncate")}
        settings["kept"] = None if self.kept is None else self.kept.tolist()
        settings |= {} if self.negative_prompt is None else {"negative_prompt": self.negative_prompt}
        settings |= {} if self.seeds is None else {"seeds": list(self.seeds)}
        return settings | asdict(self.sampling) | vars(self.denoising) | {"scheduler": self.scheduler}


def batch_of(number: int, size: int, count: int) -> range:
    """The batch that contains item `number` if `count` items are processed in batches of `size`."""
    start = number // size * size
    return range(start, min(start + size, count))


def request_of_recipe(parts: Parts, recipe: Mapping[str, Any], progress: bool = True) -> Request:
    """The request that makes the image of a recipe again.

    The recipe is untrusted input. Raises ValueError for invalid entries.
    """
    found, place, candidate = recipe["settings"], recipe["place"], recipe["candidate"]
    settings = recipe_arguments(found)
    # An image without a CLIP score was picked from a wall, not chosen by a CLIP.
    picked = recipe["clip_score"] is None
    request = make_request(parts, recipe["prompt"], **settings, progress=progress, picked=picked)
    require(0 <= place < request.num_images, f"the recipe's place is {place}; expected less than {request.num_images}")
    valid = 0 <= candidate < request.num_candidates
    require(valid, f"the recipe's candidate is {candidate}; expected less than {request.num_candidates}")
    if found.get("kept") is not None:
        length = parts.require("transformer", "drawing tokens").config.image_seq_len
        request = replace(request, kept=kept_of_recipe(parts, found["kept"], length))
    effects = found.get("callback", [])
    valid = isinstance(effects, list) and all(effect in ("stopped", "changed") for effect in effects)
    require(valid, f"the recipe's callback is {str(effects)[:40]!r}; expected a list of 'stopped' and 'changed'")
    if found.get("seeds") is not None:
        request = replace(request, seeds=seeds_of_recipe(found["seeds"], request.num_candidates))
    return replace(request, repeated=Repeated(candidate, place))


def make_request(
    parts: Parts,
    prompt: str,
    num_images: int = 1,
    num_candidates: int | None = None,
    *,
    call: str = "Dall3Pipeline()",
    picked: bool = False,
    must_fit: bool = True,
    **settings: Any,
) -> Request:
    """Validate the arguments of the pipeline's call (`CallSettings`).

    call: name of the call in error messages. picked: whether the images are picked from a wall, so that choosing among
    candidates needs no CLIP. must_fit: whether to check that the call fits the free memory. Raises ValueError for a
    setting out of range, a setting that needs a missing part, and a call that does not fit the memory. Raises TypeError
    for an unknown setting or a prompt that is not a string.
    """
    given = check_arguments(call, settings, CallSettings)
    check_prompt(prompt)
    num_images = as_number(num_images)
    num_candidates = num_images if num_candidates is None else as_number(num_candidates)
    check_counts(num_images=num_images, num_candidates=num_candidates)
    require(num_candidates >= num_images, f"num_candidates={num_candidates} is less than num_images={num_images}")
    sampling = pop_sampling(parts, given)
    check_text(parts, prompt, given.get("truncate", False))
    if num_candidates > num_images and not picked:
        parts.require("clip", f"choosing {num_images} of {num_candidates} candidates")
    refining = pop_refining(parts, given, prompt, given.get("negative_prompt") or None, sampling)
    drawing = pop_drawing(parts, given, sampling, num_images, num_candidates)
    if drawing["seeds"] is not None:
        refining["refine_batch_size"] = 1  # the cut-outs differ per image too
    request = Request(prompt=prompt, num_images=num_images, num_candidates=num_candidates, **drawing, **refining)
    if must_fit:
        check_memory(parts, memory_needs(parts, request))
    return request


def pop_refining(
    parts: Parts, given: dict[str, Any], prompt: str, negative: str | None, sampling: Sampling
) -> dict[str, Any]:
    """Remove the `OutputSettings` from `given` and return the fields of a `Request` that they determine."""
    refine_batch_size = default_refine_batch_size(given.pop("refine_batch_size", None), parts.device)
    check_counts(refine_batch_size=refine_batch_size)
    output_type = given.pop("output_type", "pil")
    check_output_type(output_type)
    denoising, scheduler = pop_denoising(parts, given, default_guidance_scale(parts))
    parts.require("vqgan", "decoding tokens")
    guidance_prompt = given.pop("guidance_prompt", None)
    texts = parse_prompts(guidance_prompt) if guidance_prompt else [(prompt, 1.0)]
    if negative is not None:
        has_effect = sampling.cond_scale != 1 or denoising.clip_guidance_scale > 0
        require(has_effect, "negative_prompt has no effect; set guidance_scale above 1, or clip_guidance_scale above 0")
        texts = [*texts, (negative, NEGATIVE_WEIGHT)]
    output_size = given.pop("output_size", None)
    # Without an upsampler, guidance applies to a super_resolution UNet. An upscaler takes no guidance.
    unguided = output_size is None or isinstance(parts.super_resolution, Upscaler)
    if parts.upsampler is not None or (denoising.clip_guidance_scale and unguided):
        check_stage(parts, "upsampler", denoising, texts)
    if output_size is not None:
        check_stage(parts, "super_resolution", denoising, texts, output_size=output_size)
    return dict(
        denoising=denoising,
        scheduler=scheduler,
        guidance_prompt=guidance_prompt,
        texts=texts,
        output_size=output_size,
        output_type=output_type,
        refine_batch_size=refine_batch_size,
        callback=given.pop("callback_on_step_end", None),
    )


def make_token_request(
    parts: Parts, prompt: str, num_candidates: int = 1, *, call: str = "generate_tokens()", **settings: Any
) -> Request:
    """Validate the arguments of `generate_tokens` (`TokenSettings`). Raises the errors of `make_request`."""
    given = check_arguments(call, settings, TokenSettings)
    check_prompt(prompt)
    num_candidates = as_number(num_candidates)
    check_counts(num_candidates=num_candidates)
    sampling = pop_sampling(parts, given)
    parts.require("transformer", "drawing tokens")
    check_text(parts, prompt, given.get("truncate", False))
    if given.get("negative_prompt"):
        require(sampling.cond_scale != 1, "negative_prompt has no effect; set guidance_scale above 1")
    drawing = pop_drawing(parts, given, sampling, num_candidates, num_candidates)
    return Request(prompt=prompt, num_images=num_candidates, num_candidates=num_candidates, **drawing)


def make_refine_request(
    parts: Parts, prompt: str, num_images: int, drawn: Mapping[str, Any], length: int, **settings: Any
) -> Request:
    """Validate the arguments of `Dall3Pipeline.refine` (`RefineSettings`).

    prompt, drawn: the prompt and the settings that the candidates were drawn with, as in a recipe. They are untrusted
    input. length: number of image tokens of a candidate. Raises the errors of `make_request`.
    """
    given = check_arguments("refine()", settings, RefineSettings)
    found = recipe_arguments(drawn)
    sampling = Sampling(**{name: found[name] for name in Sampling.__dataclass_fields__ if name in found})
    fields = {name: found[name] for name in ("num_candidates", "seed", "batch_size", "truncate")}
    choose_seed(fields["seed"], None)
    check_counts(num_candidates=fields["num_candidates"], batch_size=fields["batch_size"])
    if drawn.get("kept") is not None:
        fields["kept"] = kept_of_recipe(parts, drawn["kept"], length)
    if drawn.get("seeds") is not None:
        fields["seeds"] = seeds_of_recipe(drawn["seeds"], fields["num_candidates"])
    negative, progress = found.get("negative_prompt"), given.pop("progress", True)
    fields |= dict(sampling=sampling, negative_prompt=negative, progress=progress)
    refining = pop_refining(parts, given, prompt, negative, sampling)
    if fields.get("seeds") is not None:
        refining["refine_batch_size"] = 1
    request = Request(prompt=prompt, num_images=num_images, **fields, **refining)
    check_memory(parts, refining_needs(parts, request))
    return request


def make_upsample_request(
    parts: Parts,
    prompt: str | Weighted | None,
    image_prompts: WeightedImages,
    stage: Stage,
    *,
    output_size: int | None,
    seed: int | None,
    generator: torch.Generator | None,
    batch_size: int | None,
    progress: bool,
    callback: Callback | None,
    **settings: Any,
) -> Request:
    """Validate the arguments of `Dall3Pipeline.upsample`. Raises the errors of `make_request`."""
    given = check_arguments("upsample()", settings, DenoisingSettings)
    if isinstance(parts.part_or_loader(stage) if stage in NETWORKS else None, Upscaler):
        check_upscaling(stage, given, prompt, image_prompts, callback)
    denoising, scheduler = pop_denoising(parts, given, 0.0)
    texts = (
        parse_prompts(prompt)
        if isinstance(prompt, str)
        else [(text, as_number(weight)) for text, weight in prompt or ()]
    )
    image_prompts = [(image, as_number(weight)) for image, weight in image_prompts]
    output_size, batch_size = as_number(output_size), default_refine_batch_size(as_number(batch_size), parts.device)
    check_stage(parts, stage, denoising, texts, image_prompts, output_size)
    check_counts(batch_size=batch_size)
    return Request(
        denoising=denoising,
        scheduler=scheduler,
        texts=texts,
        image_prompts=image_prompts,
        output_size=output_size,
        seed=choose_seed(as_number(seed), generator),
        refine_batch_size=batch_size,
        progress=progress,
        callback=callback,
    )


def default_guidance_scale(parts: Parts) -> float:
    """The default clip_guidance_scale of a call: that of the weights, or 1000; 0 without a CLIP or an upsampler."""
    can_guide = parts.clip_or_loader is not None and parts.upsampler is not None
    return float(parts.defaults.get("clip_guidance_scale", 1000.0)) if can_guide else 0.0


def check_upscaling(stage: str, given: Mapping[str, Any], prompt: Any, image_prompts: Any, callback: Any) -> None:
    """Raise ValueError for arguments of `upsample` that an upscaler, which has no denoising steps, does not use."""
    others = {"prompt": prompt, "image_prompts": image_prompts, "callback_on_step_end": callback}
    unused = [*sorted(given.keys() - {"seamless"}), *(name for name, value in others.items() if value)]
    words = f"the {stage} is an upscaler, which has no denoising steps; leave out {', '.join(unused)}"
    require(not unused, words)


def check_prompt(prompt: str) -> None:
    """Raise TypeError for a prompt that is not a string."""
    if not isinstance(prompt, str):
        raise TypeError(f"prompt={prompt!r:.60}; expected a string, or a list of strings")


def example_prompt(parts: Parts) -> str:
    """A prompt that the transformer can read, for measuring and checking without a prompt."""
    return TextEncoder.default_example if parts.text_encoder is None else parts.text_encoder.example


def check_text(parts: Parts, prompt: str, truncate: bool) -> None:
    """Raise ValueError for a prompt that the text encoder cannot represent, or that is too long.

    Warns of words that did not occur in the training captions of the transformer.
    """
    encode = parts.require("text_encoder", "encoding the prompt")
    encode.check(prompt)
    encode(prompt, truncate)
    if unknown := encode.unknown_words(prompt):
        words = ", ".join(map(repr, unknown[:10])) + ", …" * (len(unknown) > 10)
        warnings.warn(
            f"these weights were trained without the words {words}, and draw something else for them; they "
            f"can draw {encode.examples()}",
            stacklevel=2,
        )


def pop_sampling(parts: Parts, given: dict[str, Any]) -> Sampling:
    """Remove the fields of `Sampling` from `given` and return them validated."""
    sampling = Sampling(**pop_fields(given, Sampling, given.pop("sampling", None), parts.defaults))
    check_quantization(sampling.quantize, parts.device)
    return sampling


def pop_denoising(parts: Parts, given: dict[str, Any], guidance: float) -> tuple[Denoising, str]:
    """Remove the fields of `Denoising` from `given` and return them validated, with the scheduler's name.

    guidance: default of clip_guidance_scale.
    """
    instance = given.pop("denoising", None)
    if instance is None:
        given = given if "clip_guidance_scale" in given else given | {"clip_guidance_scale": guidance}
    settings = pop_fields(given, Denoising, instance, parts.defaults)
    scheduler = settings.get("scheduler", "ddim")
    name = scheduler if isinstance(scheduler, str) else type(scheduler).__name__
    return Denoising(**settings | {"scheduler": find_scheduler(scheduler)}), name


def pop_drawing(
    parts: Parts, given: dict[str, Any], sampling: Sampling, num_images: int, num_candidates: int
) -> dict[str, Any]:
    """Remove the `DrawSettings` from `given` and return the fields of a `Request` that they determine."""
    batch_size, generator, seeds = given.pop("batch_size", None), given.pop("generator", None), None
    if isinstance(generator, list | tuple):
        require(given.get("seed") is None, "seed and a list of generators exclude each other; pass one of them")
        valid = len(generator) == num_images == num_candidates
        words = f"{len(generator)} generators for {num_candidates} candidates and {num_images} images"
        require(valid, f"{words}; expected one generator per image, and num_candidates equal to num_images")
        seeds = tuple(choose_seed(None, one) for one in generator)
    seed = choose_seed(given.pop("seed", None), generator) if seeds is None else seeds[0]
    transformer = parts.require("transformer", "drawing tokens")
    batch_size = fitting_batch_size(transformer, sampling, parts.device) if batch_size is None else batch_size
    check_counts(batch_size=batch_size)
    negative, truncate = given.pop("negative_prompt", None) or None, given.pop("truncate", False)
    if negative is not None:
        parts.require("text_encoder", "encoding the prompt")(negative, truncate)
    fields = dict(sampling=sampling, seed=seed, seeds=seeds, batch_size=batch_size, truncate=truncate)
    fields |= dict(negative_prompt=negative, progress=given.pop("progress", True))
    return fields | {"kept": tokens_to_keep(parts, given, seed)}


def check_stage(
    parts: Parts,
    stage: Stage,
    denoising: Denoising,
    texts: Weighted,
    image_prompts: WeightedImages = (),
    output_size: int | None = None,
) -> None:
    """Raise ValueError if the network of a stage ("upsampler" or "super_resolution") cannot do the denoising."""
    require(stage in ("upsampler", "super_resolution"), f"stage '{stage}'; expected upsampler or super_resolution")
    unet = parts.require(stage, "output_size" if output_size and stage == "super_resolution" else "refining")
    if isinstance(unet, Upscaler):
        return check_counts(output_size=1 if output_size is None else output_size)
    space_timesteps(unet.config.diffusion.diffusion_steps, denoising.num_inference_steps)
    require(not unet.config.num_classes, "the UNet is conditioned on class labels, which the pipeline does not support")
    side, step = unet.config.image_size if output_size is None else output_size, unet.config.downsampling
    check_counts(output_size=side)
    require(side % step == 0, f"output_size={side}; expected a multiple of {step}")
    if denoising.clip_guidance_scale:
        parts.require("clip", f"clip_guidance_scale={denoising.clip_guidance_scale}")
        require(bool(texts or image_prompts), "clip_guidance_scale needs a target; pass a prompt or image_prompts")
        total = sum(weight for _, weight in (*texts, *image_prompts))
        valid = 1e-3 < abs(total) < math.inf
        require(valid, f"the weights of the prompts sum to {total:.3g}; expected a finite sum other than 0")


def parse_prompts(text: str) -> list[tuple[str, float]]:
    """Parse weighted prompts in upstream's syntax: "a cube:2|a cloud" is [("a cube", 2), ("a cloud", 1)].

    A colon that is not followed by a number is part of the prompt. Raises ValueError for an empty prompt between bars.
    """
    prompts = []
    for part in text.split("|") if text else []:
        words, _, weight = part.rpartition(":")
        try:
            prompts.append((words.strip(), float(weight)) if words else (part.strip(), 1.0))
        except ValueError:
            prompts.append((part.strip(), 1.0))
    require(all(prompt for prompt, _ in prompts), f"an empty prompt in {text!r}; expected text around every '|'")
    return prompts
