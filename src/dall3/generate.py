"""From a prompt to images: `run` draws image tokens, ranks the coarse images, and refines the best.

prompt ─text encoder─▶ ids ─transformer─▶ image tokens ─VQ decoder─▶ coarse image ─UNet, CLIP─▶ fine image
                                                         CLIP ranks here ▲      ▲ and guides here

Each stage is a generator that yields previews and returns its result.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar, cast

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from dall3.diffusion.denoising import Guide, Step, denoising_steps
from dall3.diffusion.guidance import clip_loss, cut_out, draw_cutouts, guided, with_penalties
from dall3.errors import require
from dall3.formatting import counted
from dall3.images import ImageInput, center_crop, enlarge, to_output_type, to_pil, to_tensor
from dall3.models.discrete_vae import OpenAIDiscreteVAE
from dall3.models.unet import UNet
from dall3.models.upscaler import Upscaler
from dall3.output import Dall3Output, Preview
from dall3.parts import Parts
from dall3.request import Request, StopGeneration
from dall3.settings import Callback, Stage
from dall3.tokens.batching import batches_that_fit
from dall3.tokens.decoding import image_token_steps
from dall3.tokens.seeds import candidate_uniforms, make_generator
from dall3.tokens.speculative import speculative_token_steps

if TYPE_CHECKING:
    from dall3.pipeline import Dall3Pipeline

Event = TypeVar("Event")
Result = TypeVar("Result")
Previews = Generator[Preview, None, Result]


@dataclass
class Record:
    """Events of a call that its recipe records."""

    sizes: dict[str, int] = field(default_factory=dict)  # batch sizes after halving on out-of-memory errors
    stopped: bool = False  # by a callback
    changes: list[Tensor] = field(default_factory=list)  # bool scalars on the device: a callback changed a tensor

    def callback(self) -> list[str]:
        """The effects of the callback: a subset of "stopped" and "changed"."""
        changed = bool(self.changes) and bool(torch.stack(self.changes).any())
        return ["stopped"] * self.stopped + ["changed"] * changed


class Ranked(NamedTuple):
    """The best candidates, best first."""

    candidates: Tensor  # int64 (n,), candidate numbers
    scores: Tensor | None  # float32 (n,), cosine similarities to the prompt, descending; None without a CLIP
    tokens: Tensor  # int64 (n, image tokens)
    images: Tensor  # float32 (n, 3, height, width) in [0, 1], coarse


def run(parts: Parts, request: Request, every: int = 1, best: Ranked | None = None) -> Previews[Dall3Output]:
    """Draw candidates, rank them and refine the best with the stages that the pipeline and the request have.

    every: number of denoising steps between previews. best: candidates that are already drawn and chosen.
    """
    record = Record()
    if best is None:
        parts.load_clip_early()  # in the background, while tokens are drawn
        tokens = yield from draw(parts, request, record)
        best = yield from rank(parts, request, tokens)
    fine = best.images
    if parts.upsampler is not None:
        fine = yield from refine(parts, request, record, "upsampler", best.tokens, fine, best.candidates, every)
    if request.output_size is not None and not record.stopped:
        fine = yield from refine(parts, request, record, "super_resolution", None, fine, best.candidates, every)
    return make_output(parts, request, record, best, fine)


def draw(parts: Parts, request: Request, record: Record) -> Previews[Tensor]:
    """Draw the candidates' tokens with the transformer: int64 (candidates, image tokens)."""
    sampling, numbers, count = request.sampling, request.candidates(), request.num_images
    with parts.on_device("drawing tokens", "transformer", "text_encoder") as [transformer, encode]:
        prompts = [request.prompt, *([request.negative_prompt] if request.negative_prompt else [])]
        text_ids, *negative = (encode(text, truncate=request.truncate).to(parts.device) for text in prompts)
        length, side = transformer.config.image_seq_len, transformer.config.grid_size
        texts = torch.stack((text_ids, *negative)) if negative and sampling.cond_scale != 1 else text_ids
        if sampling.jacobi_window is not None:
            generators = [make_generator("cpu", seed, "speculation", k) for seed, k in map(request.source, numbers)]
            steps = speculative_token_steps(transformer, texts, generators, sampling, kept=request.kept)
        else:
            rows = [candidate_uniforms(seed, range(k, k + 1), length) for seed, k in map(request.source, numbers)]
            uniforms = torch.cat(rows).to(parts.device)
            steps = image_token_steps(transformer, texts, uniforms, sampling, request.batch_size, kept=request.kept)
        sizes: dict[int, int] = {}  # batch sizes, by the index of the batch's first candidate
        desc = f"drawing {counted(len(numbers), 'candidate')}"
        with tqdm(total=len(numbers) * length, desc=desc, disable=not request.progress) as bar:
            for tokens, batch, drawn in steps:
                sizes[batch.start] = len(batch)
                done = batch.start * length + len(batch) * drawn
                bar.update(done - bar.n)
                if drawn % side == 0:
                    shown = tokens[batch.start : min(batch.start + count, batch.stop)].clone()
                    yield Preview(
                        "drawing", done, tokens.numel(), partial(decode_drawn_rows, parts, shown, drawn // side)
                    )
    if sampling.jacobi_window is None:
        record.sizes["batch_size"] = used_batch_size(request.batch_size, len(numbers), sizes)
    return tokens


def rank(parts: Parts, request: Request, tokens: Tensor) -> Previews[Ranked]:
    """Keep the `num_images` candidates with the highest CLIP scores; for `repeat`, the candidate of the recipe."""
    settings: dict[str, Any] = dict(batch_size=request.batch_size, seamless=request.denoising.seamless)
    numbers = request.candidates()
    count = len(numbers) if request.repeated is not None else request.num_images
    best = choose_best(parts, tokens, request.prompt, count, progress=request.progress, **settings)
    best = best._replace(candidates=best.candidates + numbers.start)
    if request.repeated is not None:
        place = best.candidates.tolist().index(request.repeated.candidate)
        scores = None if best.scores is None else best.scores[place : place + 1]
        candidates, tokens, images = (
            values[place : place + 1] for values in (best.candidates, best.tokens, best.images)
        )
        best = Ranked(candidates, scores, tokens, images)
    check_finite(best.images, "coarse images")
    yield Preview("ranking", 1, 1, partial(to_pil, best.images))
    return best


@torch.no_grad()
def choose_best(
    parts: Parts, tokens: Tensor, prompt: str, count: int, *, batch_size: int, seamless: bool, progress: bool
) -> Ranked:
    """Keep the `count` candidates with the highest CLIP scores. Without a CLIP, keep the first ones, without scores.

    tokens: int64 (candidates, image tokens) on the pipeline's device. batch_size: candidates decoded and scored at a
    time. Images of candidates that are not among the best so far are discarded, to save memory.
    """
    numbers = torch.arange(len(tokens), device=tokens.device)
    best: tuple[Tensor, Tensor, Tensor] | None = None
    has_clip = parts.clip_or_loader is not None
    with parts.on_device("ranking", "vqgan", *(["clip"] if has_clip else [])) as [_, *clips]:
        text = clips[0].embed_text([prompt]) if clips else None

        def decode_and_score(batch: range) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
            images = parts.decode_tokens(tokens[batch.start : batch.stop], len(batch), seamless)
            unranked = torch.zeros(len(batch), device=tokens.device)
            yield numbers[batch.start : batch.stop], clips[0].score(images, text) if clips else unranked, images

        with tqdm(total=len(tokens), desc=f"ranking {len(tokens)}", disable=not progress or not has_clip) as bar:
            for batch, found in batches_that_fit(len(tokens), batch_size, decode_and_score):
                pairs = zip(best or (found[0][:0], found[1][:0], found[2][:0]), found, strict=True)
                chosen, scores, images = (torch.cat(pair) for pair in pairs)
                # A stable sort keeps candidates of equal score in the order in which they were drawn.
                order = scores.sort(descending=True, stable=True).indices[:count]
                best = (chosen[order], scores[order], images[order])
                bar.update(len(batch))
    assert best is not None
    return Ranked(best[0], best[1] if has_clip else None, tokens[best[0]], best[2])


@torch.inference_mode(False)  # guidance needs gradients, even under a caller's inference mode
@torch.no_grad()
def refine(
    parts: Parts,
    request: Request,
    record: Record,
    stage: Stage,
    tokens: Tensor | np.ndarray | None,
    image: ImageInput | None,
    candidates: Tensor | None = None,
    every: int = 1,
) -> Previews[Tensor]:
    """Refine tokens or images with the network of a stage: float32 (n, 3, side, side) in [0, 1].

    stage: "upsampler" or "super_resolution". tokens, image: the input, as in `Dall3Pipeline.upsample`. candidates: the
    candidate number of each image.
    """
    require(tokens is not None or image is not None, "nothing to refine; pass tokens or an image")
    settings, unet = request.denoising, parts.require(stage, "refining")
    if isinstance(unet, Upscaler):
        return (yield from upscale(parts, request, stage, tokens, image))
    also_used = ["clip"] * (settings.clip_guidance_scale > 0) + ["vqgan"] * bool(unet.config.embedding_dims)
    with parts.on_device("refining", stage, *also_used):
        start, conditioning, side = starting_point(parts, request, unet, tokens, image)
        count = len(next(iter(conditioning.values()), start))  # type: ignore[arg-type]
        places, numbers = request.places(count), range(count) if candidates is None else candidates.tolist()
        if len(places) > count:  # `repeat` fills the batch with copies, so that shapes, and so rounding, are the same
            conditioning = {name: torch.cat([value] * len(places)) for name, value in conditioning.items()}
            start = None if start is None else torch.cat([start] * len(places))
        targets = guidance_targets(parts, request, side) if settings.clip_guidance_scale else None

        def denoise(batch: range) -> Iterator[Step]:
            sources = [request.noise_source(places[k], numbers[k % count]) for k in batch]
            generators = [make_generator(parts.device, seed, "noise", k) for seed, k in sources]
            inputs = {name: value[batch.start : batch.stop] for name, value in conditioning.items()}
            initial = None if start is None else start[batch.start : batch.stop]
            label = f"{batch.start + 1}" if len(batch) == 1 else f"{batch.start + 1} to {batch.stop}"
            progress = f"refining {label} of {count}" if request.progress else None
            guide = make_guide(parts, request, targets, sources[0][0])
            return denoising_steps(unet, (3, side, side), generators, inputs, settings, initial, guide, progress)

        fine: dict[int, Tensor] = {}  # each batch's latest prediction, by the index of its first image
        for batch, step in batches_that_fit(len(places), request.refine_batch_size, denoise):
            fine[batch.start] = step.pred_xstart
            if request.callback is not None and run_callback(parts, request.callback, record, step):
                break
            if (step.number + 1) % every == 0 or step.number + 1 == step.total:
                yield Preview("refining", step.number + 1, step.total, partial(estimate_to_pil, step.pred_xstart))
    sizes = {first: len(images) for first, images in fine.items()}
    record.sizes["refine_batch_size"] = used_batch_size(request.refine_batch_size, len(places), sizes)
    images = torch.cat(list(fine.values()))
    if request.repeated is not None:
        images = images[request.repeated.place - places.start :][:1]
    check_finite(images, "refined images")
    return (images.clamp(-1, 1) + 1) / 2


def upscale(
    parts: Parts, request: Request, stage: str, tokens: Tensor | np.ndarray | None, image: ImageInput | None
) -> Previews[Tensor]:
    """Upscale tokens or images with the `Upscaler` of a stage: float32 (n, 3, side, side) in [0, 1].

    It runs again while the side of the image is at most half of `request.output_size`. Bicubic resizing does the rest.
    """
    seamless, fine = request.denoising.seamless, []
    if image is None:
        image = parts.decode_tokens(tokens, seamless=seamless)  # type: ignore[arg-type]
    images = center_crop(to_tensor(image)).to(parts.device)
    with parts.on_device("refining", stage) as [upscaler]:
        side = request.output_size or images.shape[-1] * upscaler.config.scale
        for i, result in enumerate(tqdm(images.split(1), desc="upscaling", disable=not request.progress)):
            result = upscaler(result, seamless)
            while 2 * result.shape[-1] <= side:
                result = upscaler(result, seamless)
            fine.append(result if result.shape[-1] == side else enlarge(result, side))
            yield Preview("refining", i + 1, len(images), partial(to_pil, fine[-1]))
    upscaled = torch.cat(fine)
    check_finite(upscaled, "refined images")
    return upscaled


def make_output(parts: Parts, request: Request, record: Record, best: Ranked, fine: Tensor) -> Dall3Output:
    """Make the output of the call: the images and their recipe."""
    coarse_images = to_output_type(best.images, request.output_type)
    recipe = request.recipe() | record.sizes | {"weights": parts.fingerprints()}
    recipe |= {"callback": record.callback()} if record.callback() else {}
    recipe |= {"places": [request.repeated.place]} if request.repeated is not None else {}
    out = Dall3Output(
        prompt=request.prompt,
        images=coarse_images if fine is best.images else to_output_type(fine, request.output_type),
        coarse_images=coarse_images,
        tokens=best.tokens.cpu(),
        clip_scores=None if best.scores is None else best.scores.cpu(),
        candidates=best.candidates.cpu(),
        settings=recipe,
    )
    return out if len(fine) == len(best.tokens) else out[: len(fine)]


def starting_point(
    parts: Parts, request: Request, unet: UNet, tokens: Tensor | np.ndarray | None, image: ImageInput | None
) -> tuple[Tensor | None, dict[str, Tensor], int]:
    """The input of a UNet: the initial image in [-1, 1] or None, the conditioning, and the side of the result."""
    config, step, dtype = unet.config, unet.config.downsampling, next(unet.parameters()).dtype
    settings, side = request.denoising, request.output_size or config.image_size
    if tokens is not None:
        tokens = parts.check_tokens(tokens)
    if image is None and not config.embedding_dims:
        image = parts.decode_tokens(tokens, seamless=settings.seamless)  # type: ignore[arg-type]
    if image is not None:
        image = center_crop(to_tensor(image)).to(parts.device)
    if config.super_resolution and not config.embedding_dims:
        assert image is not None
        low_res = F.interpolate(image, side // 4, mode="area") * 2 - 1
        return None, {"low_res": low_res.to(dtype)}, side
    if not config.embedding_dims:
        assert image is not None
        return enlarge(image, side) * 2 - 1, {}, side
    vqgan: Any = parts.require("vqgan", "conditioning on code embeddings")
    require(not isinstance(vqgan, OpenAIDiscreteVAE), "OpenAI's dVAE has no code embeddings to condition on")
    if tokens is None:  # the grid of tokens has twice the side of the UNet's middle block
        tokens = parts.encode(F.interpolate(image, 2 * side // step * vqgan.downsampling, mode="area"))  # type: ignore[arg-type]
    embeddings, channels = vqgan.embed(tokens), config.embedding_dims[0]
    require(embeddings.shape[-1] % 2 == 0, f"{tokens.shape[1]} tokens; expected a square with an even side")
    require(embeddings.shape[1] == channels, f"{embeddings.shape[1]} channels of code embeddings; expected {channels}")
    side = embeddings.shape[-1] // 2 * step
    if image is not None and len(image) != len(tokens):
        numbers = f"{len(tokens)} rows of tokens and {len(image)} images"
        raise ValueError(f"{numbers}; pass the same number of both, or only one of the two")
    start, conditioning = None, {"image_embeds": embeddings.to(dtype)}
    is_noised = settings.strength is not None and settings.strength < 1
    if is_noised or config.super_resolution:
        coarse = parts.decode_tokens(tokens, seamless=settings.seamless) if image is None else image
        start = enlarge(coarse, side) * 2 - 1 if is_noised else None
        if config.super_resolution:
            low_res = F.interpolate(coarse, embeddings.shape[-1] * vqgan.downsampling, mode="area")
            conditioning["low_res"] = (low_res * 2 - 1).to(dtype)
    return start, conditioning, side


def guidance_targets(parts: Parts, request: Request, side: int) -> tuple[Tensor, Tensor]:
    """Target embeddings of CLIP guidance, float32 (targets, width), and their weights, (targets,), which sum to ±1.

    side: side of the refined images in pixels. Larger image prompts are downscaled to it.
    """
    clip, cutn = parts.clip, request.denoising.cutn
    assert clip is not None
    targets = [clip.embed_text([text for text, _ in request.texts])] if request.texts else []
    weights = [weight for _, weight in request.texts]
    for image, weight in request.image_prompts:
        square = center_crop(to_tensor(image)).to(parts.device)
        if square.shape[-1] > side:
            square = enlarge(square, side)
        generator = make_generator(parts.device, request.seed, "cutouts")
        cutouts = draw_cutouts(square.shape[-1], clip.image_size, cutn, generator)
        targets.append(clip.embed_images(cut_out(square, cutouts, clip.image_size)))
        weights += [weight / len(targets[-1])] * len(targets[-1])
    return torch.cat(targets), torch.tensor(weights, device=parts.device) / abs(sum(weights))


def make_guide(parts: Parts, request: Request, targets: tuple[Tensor, Tensor] | None, seed: int) -> Guide | None:
    """The guidance of a batch, or None without guidance. seed: seed of the cut-outs, the same for all batches."""
    settings, loss = request.denoising, None
    if targets is not None:
        assert parts.clip is not None
        cutouts = make_generator(parts.device, seed, "cutouts")
        loss = clip_loss(parts.clip, *targets, settings.clip_guidance_scale, settings.cutn, cutouts)
    elif not settings.tv_scale and not settings.range_scale:
        return None
    return partial(guided, loss=with_penalties(loss, settings.tv_scale, settings.range_scale))


def run_callback(parts: Parts, callback: Callback, record: Record, step: Step) -> bool:
    """Call `callback` after a denoising step. Returns whether it stopped the generation."""
    tensors = {"x": step.x, "pred_xstart": step.pred_xstart}
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    try:
        returned = callback(cast("Dall3Pipeline", parts), step.number, step.timestep, dict(tensors))
    except StopGeneration:
        record.stopped, returned = True, None
    for name, tensor in returned.items() if isinstance(returned, dict) else ():
        known = ", ".join(tensors)
        require(name in tensors, f"callback_on_step_end returned '{name}'; expected a dictionary with some of {known}")
        if tensor is not tensors[name]:
            tensors[name].copy_(tensor)
    record.changes += [(tensor != before[name]).any() for name, tensor in tensors.items()]
    return record.stopped


def used_batch_size(requested: int, count: int, sizes: dict[int, int]) -> int:
    """The batch size after halving on out-of-memory errors; `requested` if it was not halved.

    count: number of items. sizes: sizes of the completed batches, by the index of their first item.
    """
    if len(sizes) <= math.ceil(count / requested):
        return requested
    return max(size for size in sizes.values() if size < requested)


def check_finite(images: Tensor, name: str) -> None:
    """Raise RuntimeError for images with NaN or infinite values, which would be saved as black.

    name: name of the images in the message.
    """
    if not bool(images.isfinite().all()):
        raise RuntimeError(f"the {name} have NaN or infinite values; use float32 or bfloat16, or check the weights")


def decode_drawn_rows(parts: Parts, tokens: Tensor, rows: int) -> list[Image.Image]:
    """Decode partially drawn tokens to images. The part below the first `rows` rows is grey."""
    images = parts.decode_tokens(tokens)
    images[:, :, rows * images.shape[-2] // math.isqrt(tokens.shape[1]) :] = 0.5
    return to_pil(images)


def estimate_to_pil(pred_xstart: Tensor) -> list[Image.Image]:
    """Convert predicted images in [-1, 1] to PIL images."""
    return to_pil((pred_xstart + 1) / 2)


def exhaust(steps: Generator[object, None, Result]) -> Result:
    """Exhaust a generator and return its return value."""
    remaining = WithResult(steps)
    for _ in remaining:
        pass
    return remaining.result


class WithResult(Generic[Event, Result]):
    """An iterable over the events of a generator that keeps the generator's return value.

    result: the return value, set at the end of the iteration.
    """

    result: Result

    def __init__(self, steps: Generator[Event, None, Result]) -> None:
        self.steps = steps

    def __iter__(self) -> Iterator[Event]:
        self.result = yield from self.steps
