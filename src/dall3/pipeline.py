"""Dall3Pipeline: prompt to picture in one call. `dall3.generate` says how a call goes, step by step."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, overload

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from dall3.diffusion.denoising import Denoising
from dall3.errors import require
from dall3.generate import Record, draw, refine, result_of, run
from dall3.images import center_crop, to_tensor
from dall3.loading import LoadedParts
from dall3.models.transformer import DalleTransformer
from dall3.output import Dall3Output, Preview
from dall3.request import (
    StopGeneration,
    check_prompt,
    make_refining,
    make_request,
    make_token_request,
    parse_prompts,
    request_of_recipe,
)
from dall3.settings import (
    Callback,
    Picture,
    SamplingSettings,
    Weighted,
    WeightedPictures,
    named,
    plain,
    take,
    with_defaults,
)
from dall3.tokens.decoding import draw_text_tokens
from dall3.tokens.sampling import Sampling, check_counts
from dall3.tokens.seeds import candidate_uniforms, choose_seed
from dall3.weights.registry import PARTS, PathLike

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from dall3.settings import CallSettings, DenoisingSettings, TokenSettings, VariationSettings

__all__ = ["Dall3Pipeline", "Ranking", "StopGeneration", "parse_prompts"]


class Ranking(NamedTuple):
    """Pictures in CLIP's order, best first."""

    indices: Tensor  # int64 (n,)
    scores: Tensor  # float32 (n,), cosine similarities, descending


class Dall3Pipeline(LoadedParts):
    """Text to picture on DALL-3's checkpoints. Each part can be replaced, or left out (None) where it is not used.

    clip: a CLIP, or a function that loads one when it is first needed.

    >>> pipe = Dall3Pipeline.from_pretrained()
    >>> out = pipe("a cube made of cloud", num_images=2, seed=0, num_inference_steps=2, progress=False)
    >>> sorted(path.name for path in out.save("outputs").glob("*.npy"))
    ['0.npy', '1.npy']

    Raises ValueError for parts that do not fit each other.
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
        """Draw `num_candidates` token grids for a prompt, keep the `num_images` that CLIP likes best, refine them.

        prompt: a text, for a `Dall3Output`; or a list of texts, for a list of them, each as if it were alone.
        num_candidates: num_images if not given.

        Settings by name, all optional (`dall3.settings.CallSettings`):

        - image (or init_image), keep_rows, redraw, mask_image, change: as `generate_tokens` has them.
        - guidance_scale (or cond_scale), temperature, top_k, top_p, quantize, jacobi_window: those of `Sampling`; or
          `sampling`, such a one whole.
        - num_inference_steps, scheduler, strength, clip_guidance_scale and the others of `Denoising`; or `denoising`,
          such a one whole. clip_guidance_scale, if neither the call nor `defaults` says, is 1000 where there are a CLIP
          and an upsampler. scheduler: also by diffusers' names, such as "euler" or "dpm++_2m_karras".
        - negative_prompt: what the pictures should not show. It takes the place of the empty text in classifier-free
          guidance (guidance_scale above 1), and counts -0.5 in CLIP guidance, where the prompt counts 1.
        - guidance_prompt: what CLIP guides to, if not the prompt, and weighted if you like: "a cube:2|a cloud".
        - output_size: with a super_resolution part, pixels a side of the final pictures.
        - seed, a whole number in [0, 2**63), or generator: one, or a list of one a picture. Drawn if not given.
        - batch_size: candidates at a time, chosen from the free memory if not given; refine_batch_size: pictures
          refined at a time, 1 on a CPU and 4 elsewhere if not given; both are halved where the device's memory does not
          hold them. The results depend on them by rounding only.
        - truncate: cut a prompt that is too long. progress: show progress bars.
        - callback_on_step_end(pipe, step, timestep, tensors): called after each denoising step with "x" and
          "pred_xstart", float32 (batch, 3, height, width) about [-1, 1]. What it changes in place, or returns in a
          dictionary, takes their place. Where it raises StopGeneration the call ends and returns what is there.

        What is given neither one by one nor whole is as `defaults` has it for these weights.

        >>> pipe = Dall3Pipeline.from_pretrained()
        >>> out = pipe("a red cube", num_images=2, seed=0, num_inference_steps=2, progress=False)
        >>> len(out), out.coarse_images[0].size, out.tokens.shape
        (2, (128, 128), torch.Size([2, 256]))

        Raises ValueError for a setting out of range, or one that asks for a part that this pipeline does not have,
        and TypeError for an unknown one or a prompt that is no text, before any work. Raises RuntimeError for pictures
        whose values are not finite.
        """
        if isinstance(prompt, str):
            return result_of(run(self, make_request(self, prompt, num_images, num_candidates, **settings)))
        if not isinstance(prompt, list | tuple):
            check_prompt(prompt)  # type: ignore[arg-type]
        require(len(prompt) > 0, "an empty list of prompts")
        each: list[dict[str, Any]] = [dict(settings) for _ in prompt]
        generators = settings.get("generator")
        if isinstance(generators, list | tuple):
            fits = len(generators) == len(prompt) * num_images
            require(fits, f"{len(generators)} generators for {len(prompt)} prompts of {num_images} pictures each")
            each = [{**settings, "generator": generators[i * num_images :][:num_images]} for i in range(len(prompt))]
        pairs = zip(prompt, each, strict=True)
        requests = [make_request(self, text, num_images, num_candidates, **how) for text, how in pairs]
        return [result_of(run(self, request)) for request in requests]

    def variations(
        self,
        image: Picture,
        prompt: str,
        num_images: int = 4,
        change: float = 0.5,
        **settings: Unpack[VariationSettings],
    ) -> Dall3Output:
        """Pictures like a picture: a share `change` of its tokens, in (0, 1], is drawn anew for the prompt.

        image: PIL's, float (3, height, width) in [0, 1], or tokens, int64 (image tokens,). settings: those of the call.

        >>> pipe = Dall3Pipeline.from_pretrained()
        >>> blue = Image.new("RGB", (128, 128), "blue")
        >>> out = pipe.variations(blue, "a blue cube", 2, seed=0, num_inference_steps=2, progress=False)
        >>> len(out), len(set(map(bytes, out.tokens.numpy())))
        (2, 2)

        Raises ValueError as the call does, before any work.
        """
        how: dict[str, Any] = dict(settings) | {"init_image": image, "change": change}
        return result_of(run(self, make_request(self, prompt, num_images, call="variations()", **how)))

    def stream(
        self, prompt: str, num_images: int = 1, *, every: int = 5, **settings: Unpack[CallSettings]
    ) -> Iterator[Preview]:
        """The one call as it goes: previews after each row of tokens, after ranking, and every few denoising steps.

        every: denoising steps from one preview to the next. settings: those of the call. The last preview has the
        stage "done" and the `output` that the call would return. Leaving the loop ends the work; what is there is in
        the preview at hand. Pictures are made when a preview is asked for them.

        >>> pipe = Dall3Pipeline.from_pretrained()
        >>> for preview in pipe.stream("a red cube", seed=0, num_inference_steps=2, progress=False):
        ...     if preview.stage == "drawing" and preview.step == 128:
        ...         half = preview.images[0]
        >>> half.size, preview.stage, len(preview.output)
        ((128, 128), 'done', 1)

        Raises ValueError as the call does, before any work.
        """
        check_counts(every=every)
        how: dict[str, Any] = dict(settings)
        request = make_request(self, prompt, num_images, how.pop("num_candidates", None), call="stream()", **how)

        def steps() -> Iterator[Preview]:
            output = yield from run(self, request, every)
            yield Preview("done", 1, 1, lambda: output.images, output)

        return steps()

    def repeat(self, source: PathLike | Dall3Output, progress: bool = True) -> Dall3Output:
        """Make a picture again from the recipe that its PNG carries, or from an output of one picture.

        The same machine and weights give the same picture to the bit. Of the candidates only the batch that holds the
        picture's own is drawn. Warns where the weights differ, naming them, and where a callback changed or stopped the
        call, of which a recipe tells no more.

        >>> pipe = Dall3Pipeline.from_pretrained()
        >>> out = pipe("a red cube", seed=3, num_inference_steps=2, progress=False)
        >>> pipe.repeat(out, progress=False).images == out.images
        True

        A recipe does not tell how a scheduler of diffusers was made that was not named by a text: that is refused.
        Raises ValueError for a picture without a recipe, one that does not fit, or one that needs a part that this
        pipeline does not have.
        """
        found = source if isinstance(source, Dall3Output) else Dall3Output.load(source)
        require(len(found) == 1, f"an output of {len(found)} pictures; give one of them, such as out[0]")
        recipe = found.recipe(0)
        request, weights = request_of_recipe(self, recipe, progress), recipe["settings"].get("weights", {})
        self.clip  # noqa: B018  loaded, if it is still to be, to be compared
        here = self.fingerprints()
        for part in PARTS:
            if weights.get(part) != here.get(part):
                held, was = ("none" if one is None else str(one)[:16] for one in (here.get(part), weights.get(part)))
                warnings.warn(f"the {part} is another: {held!r} here, {was!r} made the picture", stacklevel=2)
        if did := recipe["settings"].get("callback"):
            warnings.warn(f"a callback {' and '.join(did)} the call that made the picture", stacklevel=2)
        again = result_of(run(self, request))
        if again.recipe(0)["tokens"] != recipe["tokens"]:
            warnings.warn("other tokens were drawn than those of the picture", stacklevel=2)
        return again

    @torch.no_grad()
    def generate_tokens(self, prompt: str, num_candidates: int = 1, **settings: Unpack[TokenSettings]) -> Tensor:
        """Draw image tokens for a prompt: int64 (num_candidates, image tokens).

        Settings by name, all optional (`dall3.settings.TokenSettings`):

        - image, the same as init_image: a picture, or tokens, int64 (image tokens,), of which some stay: the first
          keep_rows rows (0.4375 of them if not said, as DALLE-pytorch primes); or all but the rectangle `redraw`,
          (top, left, height, width) in tokens; or all but what `mask_image` marks, a picture of the same size that is
          white there, or a box (left, top, right, bottom) in pixels; or all but a share `change` of them, in (0, 1],
          chosen at random. What is drawn sees what stands before it, row by row, and nothing after it.
        - seed: a whole number in [0, 2**63), or generator: one, or a list of one a candidate. Drawn if not given.
        - batch_size: candidates at a time, chosen from the free memory if not given.
        - negative_prompt: in place of the empty text, with guidance_scale above 1.
        - truncate: cut a prompt that is too long. progress: show a progress bar.
        - those of `Sampling`, or `sampling`, such a one whole; where not given, what `defaults` has for these weights.

        Raises ValueError for a setting out of range, a prompt that does not fit, or a missing transformer.

        >>> pipe = Dall3Pipeline.from_pretrained()
        >>> tokens = pipe.generate_tokens("a red cube", 2, seed=0, progress=False)
        >>> tokens.shape
        torch.Size([2, 256])
        >>> other = pipe.generate_tokens("a blue cube", init_image=tokens[0], redraw=(8, 0, 8, 16), progress=False)
        >>> torch.equal(other[0, :128], tokens[0, :128])
        True
        """
        return result_of(draw(self, make_token_request(self, prompt, num_candidates, **settings), Record()))

    @torch.no_grad()
    def rank(self, images: Picture, prompt: str, *, batch_size: int = 32, progress: bool = True) -> Ranking:
        """Sort pictures (PIL's, or float (n, 3, height, width) in [0, 1]) by CLIP's similarity to a prompt, best first.

        Raises ValueError for other pictures, or without a clip.

        >>> red, blue = (Image.new("RGB", (128, 128), colour) for colour in ("red", "blue"))
        >>> Dall3Pipeline.from_pretrained().rank([blue, red], "a red cube", progress=False).indices.shape
        torch.Size([2])
        """
        check_counts(batch_size=batch_size)
        check_prompt(prompt)
        self.require("clip", "ranking")
        pictures = center_crop(to_tensor(images)).split(batch_size)
        with self.using("ranking", "clip") as [clip]:
            text, bar = clip.embed_text([prompt]), tqdm(pictures, desc="ranking", disable=not progress)
            scores = torch.cat([clip.score(batch.to(self.device), text) for batch in bar])
        # Stable, so that equal pictures keep the order in which they were drawn.
        scores, indices = scores.sort(descending=True, stable=True)
        return Ranking(indices, scores)

    def upsample(
        self,
        tokens: Tensor | np.ndarray | None = None,
        image: Picture | None = None,
        prompt: str | Weighted | None = None,
        *,
        image_prompts: WeightedPictures = (),
        output_size: int | None = None,
        stage: str = "upsampler",
        seed: int | None = None,
        generator: torch.Generator | None = None,
        batch_size: int | None = None,
        progress: bool = True,
        callback_on_step_end: Callback | None = None,
        **settings: Unpack[DenoisingSettings],
    ) -> Tensor:
        """Coarse to fine by diffusion: float32 (n, 3, side, side) in [0, 1].

        What it starts from depends on the UNet. On code embeddings: `tokens` (n, side²), or `image`, encoded to them;
        with a `strength` below 1 also the coarse picture, decoded if not given, enlarged and noised. Unconditional:
        `image`, noised to a step. Super-resolution: `image`, reduced to a quarter of `output_size`.
        image: PIL's, or float (n, 3, height, width) in [0, 1]; its middle square.

        prompt: what CLIP guides to; "a cube:2|a cloud" weighs two, as pairs [("a cube", 2), ("a cloud", 1)] do.
        image_prompts: pairs of a picture and a weight. output_size: pixels a side; if not given, what the UNet was
        trained on; tokens have their own. stage: "upsampler" or "super_resolution", the part that does it. batch_size:
        pictures refined at a time, 1 on a CPU and 4 elsewhere if not given. settings: those of `Denoising`, or
        `denoising`, such a one whole; where not given, what `defaults` has for these weights, but for
        clip_guidance_scale.
        Raises ValueError for a setting out of range or a missing part, before any work.

        >>> pipe, blue = Dall3Pipeline.from_pretrained(), Image.new("RGB", (256, 256), "blue")
        >>> pipe.upsample(image=blue, num_inference_steps=2, seed=0, progress=False).shape
        torch.Size([1, 3, 256, 256])

        A picture of 256 px goes through the same UNet again for one of 512, and that for one of 1,024:

        >>> pipe.upsample(image=blue, output_size=512, num_inference_steps=5, seed=0, progress=False).shape
        torch.Size([1, 3, 512, 512])
        """
        request = make_refining(
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
        return result_of(refine(self, request, Record(), stage, tokens, image))

    @torch.no_grad()
    def complete_text(
        self, prompt: str = "", *, seed: int | None = None, truncate: bool = False, **settings: Unpack[SamplingSettings]
    ) -> str:
        """Let the transformer write on from a prompt, which may be empty, and return both.

        truncate: cut a prompt that is too long. settings: temperature, top_k and top_p of `Sampling`; where not given,
        what `defaults` has for these weights. Raises ValueError as `generate_tokens` does, for the other settings of
        `Sampling`, which are for pictures, and for a transformer that writes no text (DALL·E Mini's, ruDALL-E's).

        >>> Dall3Pipeline.from_pretrained().complete_text("a red cube", seed=0).startswith("a red cube")
        True
        """
        check_prompt(prompt)
        given = named("complete_text()", settings, SamplingSettings)
        own = {name: self.defaults[name] for name in ("temperature", "top_k", "top_p") if name in self.defaults}
        sampling = Sampling(**take(given, Sampling, given.pop("sampling", None), own))
        require(sampling.cond_scale == 1, "cond_scale guides pictures by a text; there is none to guide a text by")
        for name in ("quantize", "jacobi_window"):
            value = getattr(sampling, name)
            require(value is None, f"{name}={value!r} is for image tokens; a text is drawn without it")
        for part in ("transformer", "text_encoder"):
            self.require(part, "writing text")
        family = type(self.transformer).__name__
        writes = isinstance(self.transformer, DalleTransformer)
        require(writes, f"a {family} draws pictures only; writing text needs a transformer of DALLE-pytorch's")
        with self.using("writing text", "transformer", "text_encoder") as [transformer, encode]:
            length = transformer.config.text_seq_len
            given_ids = encode(prompt, truncate) if prompt.strip() else torch.zeros(length, dtype=torch.int64)
            uniforms = candidate_uniforms(choose_seed(plain(seed)), range(1), length).to(self.device)
            ids = draw_text_tokens(transformer, given_ids.to(self.device), uniforms, sampling)
        # The prompt itself stays as it was written: decoding would lose the characters that the tokenizer lacks.
        return prompt + encode.decode(ids)[len(encode.decode(given_ids)) :]

    def with_defaults(self, kind: type[Sampling | Denoising], given: Mapping[str, Any]) -> dict[str, Any]:
        """The settings of `kind` (Sampling or Denoising) that are given, and the weights' own where they are not.

        >>> pipe = Dall3Pipeline.from_pretrained()
        >>> pipe.defaults = {"top_p": 0.9, "cond_scale": 2.0}
        >>> pipe.with_defaults(Sampling, {"top_k": 0.5})
        {'cond_scale': 2.0, 'top_k': 0.5}
        """
        return with_defaults(self.defaults, kind, given)
