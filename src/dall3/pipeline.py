"""Dall3Pipeline: text-to-image generation in one call. `dall3.generate` implements the stages of a call."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from dall3.errors import require
from dall3.estimate import Countdown, EstimateCalls, Pace, log_estimate
from dall3.generate import Record, draw, exhaust, refine, run
from dall3.images import ImageInput, Images, OutputType, center_crop, check_output_type, to_output_type, to_tensor
from dall3.loading import LoadedParts
from dall3.models.transformer import DalleTransformer
from dall3.output import Dall3Output, Preview
from dall3.request import check_prompt, make_request, make_token_request, make_upsample_request, request_of_recipe
from dall3.settings import (
    Callback,
    SamplingSettings,
    Stage,
    Weighted,
    WeightedImages,
    as_number,
    check_arguments,
    pop_fields,
)
from dall3.tokens.decoding import draw_text_tokens
from dall3.tokens.sampling import Sampling, check_counts
from dall3.tokens.seeds import candidate_uniforms, choose_seed
from dall3.wall import WallCalls
from dall3.weights.registry import PARTS, PathLike

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from dall3.settings import CallSettings, DenoisingSettings, TokenSettings, UpsampleSettings, VariationSettings


class Ranking(NamedTuple):
    """The order of images by CLIP similarity, best first."""

    indices: Tensor  # int64 (n,)
    scores: Tensor  # float32 (n,), cosine similarities, descending


class Dall3Pipeline(WallCalls, EstimateCalls, LoadedParts):
    """Text-to-image pipeline for the checkpoints of DALL-3.

    The parts are text_encoder, transformer, vqgan, clip, upsampler and super_resolution. Each can be replaced, or be
    None if it is not used. clip: a CLIP, or a function without arguments that loads one at first use.

    >>> pipe = Dall3Pipeline.from_pretrained()
    >>> out = pipe("a cube made of cloud", num_images=2, seed=0, num_inference_steps=2, progress=False)
    >>> sorted(path.name for path in out.save("outputs").glob("*.npy"))
    ['0.npy', '1.npy']

    Raises ValueError for parts that are incompatible with each other.
    """

    @overload
    def __call__(
        self, prompt: str, num_images: int = 1, num_candidates: int | None = None, **settings: Unpack[CallSettings]
    ) -> Dall3Output: ...

    @overload
    def __call__(
        self,
        prompt: list[str] | tuple[str, ...],
        num_images: int = 1,
        num_candidates: int | None = None,
        **settings: Unpack[CallSettings],
    ) -> list[Dall3Output]: ...

    def __call__(
        self,
        prompt: str | Sequence[str],
        num_images: int = 1,
        num_candidates: int | None = None,
        **settings: Unpack[CallSettings],
    ) -> Dall3Output | list[Dall3Output]:
        """Draw `num_candidates` token grids for a prompt, keep the `num_images` with the highest CLIP scores, and
        refine them by diffusion.

        prompt: a text, or a list of texts. A text returns a `Dall3Output`. A list returns a list of them, each equal to
        the result of its own call.
        num_candidates: at least num_images (default: num_images).

        Keyword arguments, all optional (`dall3.settings.CallSettings`):

        - image (or init_image), keep_rows, redraw, mask_image, change: see `generate_tokens`.
        - guidance_scale (or cond_scale), temperature, top_k, top_p, quantize, jacobi_window: fields of `Sampling`.
          sampling: a `Sampling` that sets them all.
        - num_inference_steps, scheduler, strength, clip_guidance_scale, …: fields of `Denoising`. denoising: a
          `Denoising` that sets them all. The default of clip_guidance_scale is 1000 if the pipeline has a CLIP and an
          upsampler, else 0. scheduler accepts names of diffusers, such as "euler" or "dpm++_2m_karras".
        - negative_prompt: a text that the images should not show. It replaces the empty text of classifier-free
          guidance (guidance_scale above 1) and has weight -0.5 in CLIP guidance, where the prompt has weight 1.
        - guidance_prompt: target of CLIP guidance, optionally weighted: "a cube:2|a cloud" (default: the prompt).
        - output_size: width and height of the final images in pixels; needs a super_resolution part. If that is an
          upscaler, such as Real-ESRGAN, the fields of `Denoising` except seamless apply to the upsampler only.
        - output_type: type of the output's `images` and `coarse_images`. "pil" (default): PIL images. "np": an array,
          float32 (n, height, width, 3) in [0, 1]. "pt": a tensor, float32 (n, 3, height, width) in [0, 1].
        - seed: integer in [0, 2**63). generator: a torch.Generator, or a list of one per image. Random by default.
        - batch_size: candidates drawn at a time (default: chosen from the memory). refine_batch_size: images refined at
          a time (default: 1 on a CPU, 4 to 16 on a GPU). Both are halved if the device runs out of memory. They change
          the results by rounding only.
        - truncate: cut prompts that are too long. progress: show progress bars.
        - callback_on_step_end(pipe, step, timestep, tensors): called after each denoising step with "x" and
          "pred_xstart", float32 (batch, 3, height, width), approximately in [-1, 1]. It may change them in place or
          return a dictionary of replacements. If it raises StopGeneration, the call returns the images as they are.

        Settings that are not given come from `defaults`, the settings of the loaded weights.

        >>> pipe = Dall3Pipeline.from_pretrained()
        >>> out = pipe("a red cube", num_images=2, seed=0, num_inference_steps=2, progress=False)
        >>> len(out), out.coarse_images[0].size, out.tokens.shape
        (2, (128, 128), torch.Size([2, 256]))

        Raises, before any work, ValueError for a setting out of range or one that needs a missing part, and TypeError
        for an unknown setting or a prompt that is not a string. Raises RuntimeError if an image has values that are not
        finite.
        """
        if isinstance(prompt, str):
            request = make_request(self, prompt, num_images, num_candidates, **settings)
            log_estimate(self, request)
            return exhaust(run(self, request))
        if not isinstance(prompt, list | tuple):
            check_prompt(prompt)  # type: ignore[arg-type]
        require(len(prompt) > 0, "prompt is an empty list; expected at least one string")
        by_prompt: list[dict[str, Any]] = [dict(settings) for _ in prompt]
        generators = settings.get("generator")
        if isinstance(generators, list | tuple):
            numbers = f"{len(generators)} generators for {len(prompt)} prompts of {num_images} images each"
            require(len(generators) == len(prompt) * num_images, f"{numbers}; expected one generator per image")
            groups = [generators[i * num_images :][:num_images] for i in range(len(prompt))]
            by_prompt = [{**settings, "generator": group} for group in groups]
        pairs = zip(prompt, by_prompt, strict=True)
        requests = [make_request(self, text, num_images, num_candidates, **given) for text, given in pairs]
        outputs = []
        for request in requests:
            log_estimate(self, request)
            outputs.append(exhaust(run(self, request)))
        return outputs

    def variations(
        self,
        image: ImageInput,
        prompt: str,
        num_images: int = 4,
        change: float = 0.5,
        **settings: Unpack[VariationSettings],
    ) -> Dall3Output:
        """Make variations of an image: draw a fraction `change`, in (0, 1], of its tokens again for the prompt.

        image: a PIL image; float (3, height, width) in [0, 1]; or tokens, int64 (image tokens,). settings: those of the
        pipeline's call. Returns a `Dall3Output` of `num_images` images.

        >>> from PIL import Image
        >>> pipe = Dall3Pipeline.from_pretrained()
        >>> blue = Image.new("RGB", (128, 128), "blue")
        >>> out = pipe.variations(blue, "a blue cube", 2, seed=0, num_inference_steps=2, progress=False)
        >>> len(out), len(set(map(bytes, out.tokens.numpy())))
        (2, 2)

        Raises the same errors as the call.
        """
        given: dict[str, Any] = dict(settings) | {"init_image": image, "change": change}
        request = make_request(self, prompt, num_images, call="variations()", **given)
        log_estimate(self, request)
        return exhaust(run(self, request))

    def stream(
        self,
        prompt: str,
        num_images: int = 1,
        num_candidates: int | None = None,
        *,
        every: int = 5,
        **settings: Unpack[CallSettings],
    ) -> Iterator[Preview]:
        """The pipeline's call as an iterator of previews: after each row of tokens, after ranking, and during
        denoising.

        every: number of denoising steps between previews. settings: those of the call. The last preview has the stage
        "done" and holds the `output` that the call would return. Leaving the loop stops the generation. A preview
        decodes its images when `images` is read. They are PIL images for every output_type.

        >>> pipe = Dall3Pipeline.from_pretrained()
        >>> for preview in pipe.stream("a red cube", seed=0, num_inference_steps=2, progress=False):
        ...     if preview.stage == "drawing" and preview.step == 128:
        ...         half = preview.images[0]
        >>> half.size, preview.stage, len(preview.output)
        ((128, 128), 'done', 1)

        Raises the same errors as the call, and raises them before the first preview is requested.
        """
        check_counts(every=every)
        request = make_request(self, prompt, num_images, num_candidates, call="stream()", **settings)

        def steps() -> Iterator[Preview]:
            log_estimate(self, request)
            output = yield from Countdown(Pace(self, request)).watch(run(self, request, every))
            yield Preview("done", 1, 1, output.to_pil, output)

        return steps()

    def repeat(self, source: PathLike | Dall3Output, progress: bool = True) -> Dall3Output:
        """Make an image again from the recipe in its PNG.

        source: path of the PNG, or a `Dall3Output` of one image. Returns a `Dall3Output` of one image. On the same
        machine with the same weights the image is bit-identical. Only the batch that contains the image's candidate is
        drawn.

        Warns for each network whose weights differ from the recipe's, if the drawn tokens differ from the recipe's, and
        if a callback changed or stopped the original call.

        >>> pipe = Dall3Pipeline.from_pretrained()
        >>> out = pipe("a red cube", seed=3, num_inference_steps=2, progress=False)
        >>> pipe.repeat(out, progress=False).images == out.images
        True

        Raises ValueError for an image without a recipe, for a recipe that does not match this pipeline or needs a part
        that it does not have, and for one made with a scheduler object of diffusers, whose configuration is not in the
        recipe.
        """
        output = source if isinstance(source, Dall3Output) else Dall3Output.load(source)
        require(len(output) == 1, f"the output has {len(output)} images; pass one of them, such as out[0]")
        recipe = output.recipe(0)
        request, recorded = request_of_recipe(self, recipe, progress), recipe["settings"].get("weights", {})
        self.clip  # noqa: B018  load it, so that `fingerprints` includes it
        current = self.fingerprints()
        unused = {"super_resolution"} if request.output_size is None else set()
        for part in PARTS:
            if part not in unused and recorded.get(part) != current.get(part):
                hashes = [str(weights.get(part) or "none")[:16] for weights in (current, recorded)]
                words = f"has the hash {hashes[0]!r}; the image was made with {hashes[1]!r}"
                warnings.warn(f"the {part} of this pipeline {words}", stacklevel=2)
        if effects := recipe["settings"].get("callback"):
            warnings.warn(f"a callback {' and '.join(effects)} the original call; it is not repeated", stacklevel=2)
        log_estimate(self, request)
        again = exhaust(run(self, request))
        if again.recipe(0)["tokens"] != recipe["tokens"]:
            warnings.warn("the tokens differ from the recipe's, so the image differs too", stacklevel=2)
        return again

    @torch.no_grad()
    def generate_tokens(self, prompt: str, num_candidates: int = 1, **settings: Unpack[TokenSettings]) -> Tensor:
        """Draw image tokens for a prompt: int64 (num_candidates, image tokens).

        Keyword arguments, all optional (`dall3.settings.TokenSettings`):

        - image (or init_image): an initial image, or its tokens, int64 (image tokens,). Some of the tokens are kept,
          and the others are drawn again, selected by one of the next four arguments. Tokens are drawn row by row and
          depend on earlier positions only.
        - keep_rows: number of rows of tokens to keep, from the top (default: 0.4375 of the rows, as in DALLE-pytorch).
        - redraw: rectangle of tokens to draw, (top, left, height, width).
        - mask_image: an image of the same size that is white where tokens are drawn, or a box of pixels to draw,
          (left, top, right, bottom).
        - change: fraction of the tokens to draw, chosen at random, in (0, 1].
        - seed: integer in [0, 2**63). generator: a torch.Generator, or a list of one per candidate. Random by default.
        - batch_size: candidates drawn at a time (default: chosen from the free memory).
        - negative_prompt: replaces the empty text in classifier-free guidance; needs guidance_scale above 1.
        - truncate: cut a prompt that is too long. progress: show a progress bar.
        - fields of `Sampling`, or sampling: a `Sampling` that sets them all.

        Settings that are not given come from `defaults`, the settings of the loaded weights.

        Raises ValueError for a setting out of range, a prompt that is too long, or a missing transformer, and TypeError
        for an unknown setting.

        >>> pipe = Dall3Pipeline.from_pretrained()
        >>> tokens = pipe.generate_tokens("a red cube", 2, seed=0, progress=False)
        >>> tokens.shape
        torch.Size([2, 256])
        >>> other = pipe.generate_tokens("a blue cube", init_image=tokens[0], redraw=(8, 0, 8, 16), progress=False)
        >>> torch.equal(other[0, :128], tokens[0, :128])
        True
        """
        return exhaust(draw(self, make_token_request(self, prompt, num_candidates, **settings), Record()))

    @torch.no_grad()
    def rank(self, images: ImageInput, prompt: str, *, batch_size: int = 32, progress: bool = True) -> Ranking:
        """Sort images by CLIP similarity to a prompt, best first.

        images: PIL images, or float (n, 3, height, width) in [0, 1]; their central squares are scored. batch_size:
        images scored at a time. Returns a `Ranking`: indices, int64 (n,), and scores, float32 (n,), cosine similarities
        in [-1, 1]. Raises ValueError for invalid images, or without a clip.

        >>> from PIL import Image
        >>> red, blue = (Image.new("RGB", (128, 128), colour) for colour in ("red", "blue"))
        >>> Dall3Pipeline.from_pretrained().rank([blue, red], "a red cube", progress=False).indices.shape
        torch.Size([2])
        """
        check_counts(batch_size=batch_size)
        check_prompt(prompt)
        self.require("clip", "ranking")
        batches = center_crop(to_tensor(images)).split(batch_size)
        with self.on_device("ranking", "clip") as [clip]:
            text, bar = clip.embed_text([prompt]), tqdm(batches, desc="ranking", disable=not progress)
            scores = torch.cat([clip.score(batch.to(self.device), text) for batch in bar])
        # A stable sort keeps images of equal score in their order.
        scores, indices = scores.sort(descending=True, stable=True)
        return Ranking(indices, scores)

    @overload
    def upsample(
        self,
        tokens: Tensor | np.ndarray | None = None,
        image: ImageInput | None = None,
        prompt: str | Weighted | None = None,
        *,
        output_type: Literal["pt"] = "pt",
        **settings: Unpack[UpsampleSettings],
    ) -> Tensor: ...

    @overload
    def upsample(
        self,
        tokens: Tensor | np.ndarray | None = None,
        image: ImageInput | None = None,
        prompt: str | Weighted | None = None,
        *,
        output_type: Literal["np"],
        **settings: Unpack[UpsampleSettings],
    ) -> np.ndarray: ...

    @overload
    def upsample(
        self,
        tokens: Tensor | np.ndarray | None = None,
        image: ImageInput | None = None,
        prompt: str | Weighted | None = None,
        *,
        output_type: Literal["pil"],
        **settings: Unpack[UpsampleSettings],
    ) -> list[Image.Image]: ...

    def upsample(
        self,
        tokens: Tensor | np.ndarray | None = None,
        image: ImageInput | None = None,
        prompt: str | Weighted | None = None,
        *,
        image_prompts: WeightedImages = (),
        output_size: int | None = None,
        stage: Stage = "upsampler",
        seed: int | None = None,
        generator: torch.Generator | None = None,
        batch_size: int | None = None,
        progress: bool = True,
        output_type: OutputType = "pt",
        callback_on_step_end: Callback | None = None,
        **settings: Unpack[DenoisingSettings],
    ) -> Images:
        """Refine image tokens or images by diffusion: a tensor, float32 (n, 3, side, side) in [0, 1].

        The input depends on the UNet. Conditioned on code embeddings: `tokens`, or `image`, which is encoded; with a
        `strength` below 1 denoising starts from the enlarged coarse image, decoded if not given. Unconditional:
        `image`, with noise added. Super-resolution: `image`, downscaled to a quarter of `output_size`. An `Upscaler`
        makes `image`, or the decoded `tokens`, larger. It has no denoising steps.

        tokens: int64 (n, side²) or (side²,). image: a PIL image or a list, or float (n, 3, height, width) in [0, 1];
        the central square is used.
        prompt: target of CLIP guidance: "a cube:2|a cloud" or the pairs [("a cube", 2), ("a cloud", 1)].
        image_prompts: further targets of CLIP guidance: pairs of an image and a weight.
        output_size: width and height of the result in pixels (default: the size of the UNet's training images; for
        tokens, the size that their grid determines; for an upscaler, its factor times the size of the image).
        stage: the part to use, "upsampler" or "super_resolution".
        seed, generator, callback_on_step_end, progress: as in the call.
        batch_size: images refined at a time (default: 1 on a CPU, 4 to 16 on a GPU).
        output_type: "pt" (default) for the tensor, "np" for an array, float32 (n, side, side, 3) in [0, 1], "pil" for
        PIL images.
        settings: fields of `Denoising`, or denoising: a `Denoising` that sets them all. Settings that are not given
        come from `defaults`; clip_guidance_scale is 0 by default. For an `Upscaler` only seamless can be given.

        Raises, before any work, ValueError for a setting out of range or a missing part, and TypeError for an unknown
        setting.

        >>> from PIL import Image
        >>> pipe, blue = Dall3Pipeline.from_pretrained(), Image.new("RGB", (256, 256), "blue")
        >>> pipe.upsample(image=blue, num_inference_steps=2, seed=0, progress=False).shape
        torch.Size([1, 3, 256, 256])

        The same UNet refines an image of 256 px to 512, and one of 512 px to 1,024:

        >>> pipe.upsample(image=blue, output_size=512, num_inference_steps=5, seed=0, progress=False).shape
        torch.Size([1, 3, 512, 512])
        """
        check_output_type(output_type)
        request = make_upsample_request(
            self,
            prompt,
            image_prompts,
            stage,
            output_size=output_size,
            seed=seed,
            generator=generator,
            batch_size=batch_size,
            progress=progress,
            callback=callback_on_step_end,
            **settings,
        )
        return to_output_type(exhaust(refine(self, request, Record(), stage, tokens, image)), output_type)

    @torch.no_grad()
    def complete_text(
        self, prompt: str = "", *, seed: int | None = None, truncate: bool = False, **settings: Unpack[SamplingSettings]
    ) -> str:
        """Complete a prompt with the transformer's text tokens. Returns the prompt followed by the completion.

        seed: integer in [0, 2**63), random by default. truncate: cut a prompt that is too long. settings: temperature,
        top_k and top_p of `Sampling`. Settings that are not given come from `defaults`.

        Raises the same errors as `generate_tokens`. Raises ValueError too for the other fields of `Sampling`, which
        apply to image tokens only, and for a transformer without text output (DALL·E Mini, ruDALL-E).

        >>> Dall3Pipeline.from_pretrained().complete_text("a red cube", seed=0).startswith("a red cube")
        True
        """
        check_prompt(prompt)
        given = check_arguments("complete_text()", settings, SamplingSettings)
        defaults = {name: self.defaults[name] for name in ("temperature", "top_k", "top_p") if name in self.defaults}
        sampling = Sampling(**pop_fields(given, Sampling, given.pop("sampling", None), defaults))
        for name, unused in (("cond_scale", 1), ("quantize", None), ("jacobi_window", None)):
            value = getattr(sampling, name)
            require(value == unused, f"{name}={value!r} applies to image tokens only, not to text")
        for part in ("transformer", "text_encoder"):
            self.require(part, "completing text")
        kind = type(self.transformer).__name__
        has_text_output = isinstance(self.transformer, DalleTransformer)
        require(has_text_output, f"a {kind} has no text output; complete_text needs a transformer of DALLE-pytorch")
        with self.on_device("completing text", "transformer", "text_encoder") as [transformer, encode]:
            length = transformer.config.text_seq_len
            given_ids = encode(prompt, truncate) if prompt.strip() else torch.zeros(length, dtype=torch.int64)
            uniforms = candidate_uniforms(choose_seed(as_number(seed)), range(1), length).to(self.device)
            ids = draw_text_tokens(transformer, given_ids.to(self.device), uniforms, sampling)
            completion: str = encode.decode(ids)[len(encode.decode(given_ids)) :]
        # Return the prompt as given: decoding its tokens would lose characters that the tokenizer lacks.
        return prompt + completion
