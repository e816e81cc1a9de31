"""Estimates of the memory and time of a call: `Dall3Pipeline.estimate`, the log, and `Preview.seconds_left`.

Time is extrapolated from measurements: a few steps of each stage are run and timed once for each combination of shape
and settings. After a call, its own drawing time replaces that measurement, because later tokens take longer than the
first ones.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakKeyDictionary

import torch

from dall3.diffusion.denoising import Denoising
from dall3.diffusion.schedule import space_timesteps
from dall3.formatting import counted, size_text
from dall3.generate import Previews, Record, WithResult, choose_best, draw, refine
from dall3.memory import StageEstimate, check_memory, memory_needs, weight_bytes
from dall3.models.upscaler import Upscaler
from dall3.output import Preview
from dall3.parts import Parts
from dall3.request import Request, example_prompt, make_request
from dall3.settings import Stage as StageName
from dall3.tokens.batching import free_memory

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from dall3.settings import CallSettings

LOGGER = logging.getLogger("dall3")
Result = TypeVar("Result")
UPSCALED = 64  # side in pixels of the image whose upscaling is timed
TIMED_STEPS = 2  # denoising steps that are timed, after an untimed first one
RATES: WeakKeyDictionary[Parts, dict[Any, float]] = WeakKeyDictionary()  # measured seconds, by the keys of `Pace`


@dataclass(frozen=True)
class Estimate:
    """Memory and time of a call, by stage.

    device: the pipeline's device. stages: the estimate of each stage. peak: maximum memory in bytes, including the
    weights of all networks that stay on the device. free: free memory of the device in bytes, None if unknown. Weights
    that are on the device already do not count as free. summary: the stages of the call in words.

    >>> from dall3 import Dall3Pipeline
    >>> estimate = Dall3Pipeline.from_pretrained().estimate(1, 4, clip_guidance_scale=0.0)
    >>> [stage.name for stage in estimate.stages], estimate.peak > estimate.stages[0].caches > 0
    (['drawing', 'ranking', 'refining'], True)
    """

    device: str
    stages: tuple[StageEstimate, ...]
    peak: int
    free: int | None
    summary: str = field(repr=False)

    @property
    def seconds(self) -> float | None:
        """Duration of the call in seconds; None if it does not fit the free memory, so that no step can be timed."""
        found = [stage.seconds for stage in self.stages if stage.seconds is not None]
        return sum(found) if len(found) == len(self.stages) else None

    def __str__(self) -> str:
        free = "" if self.free is None else f", {size_text(self.free)} free"
        lines = [f"{self.summary}: {time_text(self.seconds)}, {size_text(self.peak)} on {self.device}{free}"]
        for stage in self.stages:
            sizes = (("weights", stage.weights), ("caches", stage.caches), ("activations", stage.activations))
            listed = ", ".join(f"{name} {size_text(size)}" for name, size in sizes if size)
            lines.append(f"  {stage.name}, {stage.batch_size} at a time: {time_text(stage.seconds)}; {listed}")
        return "\n".join(lines)


def time_text(seconds: float | None) -> str:
    if seconds is None:
        return "does not fit"
    if seconds < 100:
        return f"about {seconds:.2g} s" if seconds < 10 else f"about {seconds:.0f} s"
    return f"about {seconds / 60:.0f} min" if seconds < 6000 else f"about {seconds / 3600:.1f} h"


class Pace:
    """The durations in seconds of the stages of a request. Rates are measured when first needed and kept in RATES.

    parts: the pipeline that runs the request.
    """

    def __init__(self, parts: Parts, request: Request) -> None:
        self.parts, self.request, self.rates = parts, request, RATES.setdefault(parts, {})
        self.setup = (str(parts.device), parts.dtype, parts.offload_device is not None, torch.get_num_threads())
        self.candidates = len(request.candidates())
        batch = min(request.batch_size, self.candidates)
        self.draw_key = ("drawing", batch, str(request.sampling), *identity(parts.transformer), *self.setup)
        self.stages: list[StageName] = [] if parts.upsampler is None else ["upsampler"]
        self.upscaler = parts.super_resolution if isinstance(parts.super_resolution, Upscaler) else None
        self.upscaler = None if request.output_size is None else self.upscaler
        self.stages += [] if request.output_size is None or self.upscaler is not None else ["super_resolution"]

    def now(self) -> float:
        """The time in seconds, after all work on the device has finished."""
        if self.parts.device.type == "cuda":
            torch.cuda.synchronize(self.parts.device)
        return time.perf_counter()

    def drawing(self) -> float:
        """Seconds of drawing all candidates."""
        if self.draw_key not in self.rates:
            self.rates[self.draw_key] = self.time_drawing(self.draw_key[1])
        size = self.draw_key[1]
        return self.rates[self.draw_key] * self.candidates / size

    def time_drawing(self, size: int) -> float:
        """Seconds of drawing a batch, from its first two rows of tokens."""
        changes: dict[str, Any] = dict(num_candidates=size, num_images=1, batch_size=size, seeds=None, repeated=None)
        start, times = self.now(), []
        for _ in islice(draw(self.parts, replace(self.request, **changes, progress=False), Record()), 2):
            times.append(self.now())
        rows = self.parts.require("transformer", "drawing tokens").config.grid_size
        return times[0] - start + (times[-1] - times[0]) * (rows - 1)

    def ranking(self) -> float:
        """Seconds of decoding and scoring all candidates."""
        size, seamless = min(self.draw_key[1], 4), self.request.denoising.seamless
        clip = self.parts.clip  # loads it, which is not part of the measured time
        key = ("ranking", size, *identity(clip), seamless, *identity(self.parts.vqgan), *self.setup)
        if key not in self.rates:
            tokens = self.any_tokens(size)
            start = self.now()
            choose_best(self.parts, tokens, self.request.prompt, 1, batch_size=size, seamless=seamless, progress=False)
            self.rates[key] = (self.now() - start) / size
        return self.rates[key] * self.candidates

    def any_tokens(self, count: int) -> torch.Tensor:
        """Tokens to measure with, int64 (count, image tokens). Their values do not affect the time."""
        length = self.parts.require("transformer", "drawing tokens").config.image_seq_len
        return torch.zeros(count, length, dtype=torch.int64, device=self.parts.device)

    def refining(self) -> float:
        """Seconds of all denoising and upscaling."""
        return sum(seconds for _, seconds in self.denoising()) + self.upscaling()

    def upscaling(self) -> float:
        """Seconds of upscaling all images; 0 without an upscaler."""
        if self.upscaler is None:
            return 0.0
        key = ("upscaling", *identity(self.upscaler), *self.setup)
        if key not in self.rates:
            with self.parts.on_device("refining", "super_resolution") as [upscaler]:
                start = self.now()
                upscaler(torch.zeros(1, 3, UPSCALED, UPSCALED, device=self.parts.device))
                self.rates[key] = (self.now() - start) / UPSCALED**2
        # The last pass dominates: passes before it have a small part of its pixels.
        pixels = ((self.request.output_size or 0) / self.upscaler.config.scale) ** 2
        return self.rates[key] * pixels * len(self.request.places(self.request.num_images))

    def denoising(self) -> Iterator[tuple[int, float]]:
        """Yield, for each denoising step of the call in order, the number of its batch and its duration in seconds."""
        number = 0
        for stage in self.stages:
            for batch, seconds in self.stage_steps(stage):
                yield number + batch, seconds
            number += batch + 1

    def stage_steps(self, stage: StageName) -> Iterator[tuple[int, float]]:
        """`denoising` of one stage."""
        size, count = self.request.refine_batch_size, len(self.request.places(self.request.num_images))
        steps, guided, _ = self.step_counts(stage)
        for number, start in enumerate(range(0, count, size)):
            batch = min(size, count - start)
            yield from ((number, self.step(stage, batch, k < guided)) for k in range(steps))

    def step_counts(self, stage: StageName) -> tuple[int, int, int]:
        """Counts of a stage's denoising steps: steps that it runs, guided ones, steps of a run from pure noise."""
        settings, unet = self.request.denoising, self.parts.require(stage, "refining")
        config: Any = unet.config
        count = len(space_timesteps(config.diffusion.diffusion_steps, settings.num_inference_steps))
        noised = stage == "upsampler" and (settings.strength or 0.5 if not config.embedding_dims else settings.strength)
        steps = max(round(count * noised), 1) if noised and not config.super_resolution else count
        guided = round(steps * settings.guidance_share) if is_guided(settings) else 0
        steps = steps if settings.stop_at is None else min(steps, settings.stop_at)
        return steps, min(guided, steps), count

    def step(self, stage: StageName, size: int, guided: bool) -> float:
        """Seconds of a denoising step for a batch of `size` images."""
        settings = self.request.denoising
        guidance = (settings.clip_guidance_scale > 0, settings.cutn) if guided else ()
        network = identity(self.parts.require(stage, "refining"))
        key = (stage, size, guidance, settings.seamless, self.request.output_size, *network, *self.setup)
        if key not in self.rates:
            self.rates[key] = self.time_step(stage, size, guided)
        return self.rates[key]

    def time_step(self, stage: StageName, size: int, guided: bool) -> float:
        """Run a few denoising steps and return the mean duration of a step in seconds."""
        settings = Denoising(num_inference_steps=TIMED_STEPS + 1, seamless=self.request.denoising.seamless)
        if guided:
            names = ("clip_guidance_scale", "tv_scale", "range_scale", "cutn")
            settings = replace(settings, **{name: getattr(self.request.denoising, name) for name in names})
        changes: dict[str, Any] = dict(denoising=settings, num_images=size, refine_batch_size=size, seeds=None)
        request = replace(self.request, **changes, repeated=None, callback=None, progress=False)
        tokens = self.any_tokens(size) if stage == "upsampler" else None
        image = torch.zeros(size, 3, 64, 64) if tokens is None else None
        times = [self.now() for _ in refine(self.parts, request, Record(), stage, tokens, image)]
        return (times[-1] - times[0]) / max(len(times) - 1, 1)


def identity(network: Any) -> tuple[Any, ...]:
    """A value that differs for another network, and after `compile`."""
    return (
        id(network),
        getattr(network, "compile_options", None) is not None,
        getattr(network, "_compiled_call_impl", None) is not None,
    )


def is_guided(settings: Denoising) -> bool:
    """Whether denoising with these settings takes gradients."""
    return any((settings.clip_guidance_scale, settings.tv_scale, settings.range_scale))


def describe(pace: Pace) -> str:
    """Summarize the stages of a call in words."""
    request, count = pace.request, pace.candidates
    length = pace.parts.require("transformer", "drawing tokens").config.image_seq_len
    words = f"draws {counted(count, 'candidate')} of {length} tokens"
    words += ", ranks them" if pace.parts.clip_or_loader is not None and count > request.num_images else ""
    for stage in pace.stages:
        steps, guided, whole = pace.step_counts(stage)
        many = counted(steps, "step") if steps == whole else f"{steps:,} of {counted(whole, 'step')}"
        words += f", refines {counted(request.num_images, 'image')} in {many}"
        words += f" ({guided} guided)" if guided else ""
    if pace.upscaler is not None:
        words += f", upscales {counted(request.num_images, 'image')}"
    return words


def estimate_request(parts: Parts, request: Request) -> Estimate:
    """The estimate of a call. Runs and times steps that have not been timed yet, if the call fits the memory."""
    pace, needs, free = Pace(parts, request), memory_needs(parts, request), free_memory(parts.device)
    stages = [need.stage for need in needs]
    with suppress(ValueError):
        check_memory(parts, needs)
        refining = [sum(seconds for _, seconds in pace.stage_steps(stage)) for stage in pace.stages]
        upscaling = [] if pace.upscaler is None else [pace.upscaling()]
        times = [pace.drawing(), pace.ranking(), *refining, *upscaling]
        stages = [replace(stage, seconds=seconds) for stage, seconds in zip(stages, times, strict=True)]
    resident = 0
    if parts.offload_device is None:
        resident = sum(map(weight_bytes, parts.networks.values()))
    peak = max(
        (stage.caches + stage.activations + (stage.weights if not resident else stage.copied)) for stage in stages
    )
    return Estimate(str(parts.device), tuple(stages), resident + peak, free, describe(pace))


class EstimateCalls(Parts):
    """The pipeline's method that estimates a call."""

    def estimate(
        self, num_images: int = 1, num_candidates: int | None = None, **settings: Unpack[CallSettings]
    ) -> Estimate:
        """Estimate the memory and time of the pipeline's call with these arguments, on the pipeline's device.

        Memory: weights and key/value caches are exact; activations are estimated from the configurations of the
        networks. Time: a few steps of each stage are run and timed, once for each batch size, image size and device.

        >>> from dall3 import Dall3Pipeline
        >>> pipe = Dall3Pipeline.from_pretrained()
        >>> estimate = pipe.estimate(num_images=1, num_candidates=2, clip_guidance_scale=0.0)
        >>> print(estimate.summary)
        draws 2 candidates of 256 tokens, ranks them, refines 1 image in 3 of 20 steps

        Raises the same errors as the call, except for a call that does not fit the memory: its memory is estimated.
        """
        request = make_request(
            self, example_prompt(self), num_images, num_candidates, call="estimate()", must_fit=False, **settings
        )
        return estimate_request(self, request)


def log_estimate(parts: Parts, request: Request) -> None:
    """Log at level INFO what a call does and how long it takes."""
    if LOGGER.isEnabledFor(logging.INFO):
        pace = Pace(parts, request)
        seconds = pace.drawing() + pace.ranking() + pace.refining()
        LOGGER.info("%s: %s", describe(pace), time_text(seconds))


class Countdown:
    """The remaining time of a call. The current stage continues at its rate so far; later stages are measured."""

    def __init__(self, pace: Pace) -> None:
        self.pace, self.stage, self.batch, self.step = pace, "drawing", 0, 0
        self.begun = self.last = time.perf_counter()  # start of the stage, and time of the last preview

    def watch(self, steps: Previews[Result]) -> Previews[Result]:
        """Run the steps of a call and set `seconds_left` of their previews. Returns the result of the call.

        On a CPU the time between a preview and the request for the next one is the consumer's and does not count. A GPU
        works on during that time.
        """
        previews, on_cpu = WithResult(steps), self.pace.parts.device.type == "cpu"
        for preview in previews:
            yield self.follow(preview)
            pause = time.perf_counter() - self.last if on_cpu else 0.0
            self.begun, self.last = self.begun + pause, self.last + pause
        return previews.result

    def follow(self, preview: Preview) -> Preview:
        """Set `seconds_left` of a preview and return the preview."""
        now = time.perf_counter()
        if preview.stage != self.stage:
            if self.stage == "drawing" and preview.stage == "refining":
                # The candidates of a wall were drawn before. Decoding them is not part of the first step's time.
                self.last = now - next((seconds for _, seconds in self.pace.denoising()), 0.0)
            self.stage, self.begun, self.batch, self.step = preview.stage, self.last, 0, 0
        self.batch += preview.step <= self.step
        self.step, self.last = preview.step, now
        if preview.stage == "drawing" and preview.step == preview.total:
            self.pace.rates[self.pace.draw_key] = (now - self.begun) * self.pace.draw_key[1] / self.pace.candidates
        elapsed, batch, step = now - self.begun, self.batch, preview.step

        def left() -> float:
            if preview.stage == "drawing":
                rest = elapsed / preview.step * (preview.total - preview.step)
                return rest + self.pace.ranking() + self.pace.refining()
            if preview.stage == "ranking":
                return self.pace.refining()
            upscaling, rest = self.pace.upscaling(), refining_left(self.pace, batch, step)
            done = self.pace.refining() - upscaling - rest
            return rest * elapsed / max(done, 1e-9) + upscaling

        preview.measure_seconds_left = left
        return preview


def refining_left(pace: Pace, batch: int, step: int) -> float:
    """Seconds of the denoising steps that follow step `step`, counted from 1, of batch number `batch`."""
    left, place, current = 0.0, 0, -1
    for number, seconds in pace.denoising():
        place, current = (place + 1, number) if number == current else (1, number)
        left += seconds if (number, place) > (batch, step) else 0.0
    return left
