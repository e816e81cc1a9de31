"""Dall3Pipeline: prompt to picture in one call.

prompt ──text_encoder──▶ ids ──transformer──▶ tokens ──vqgan──▶ coarse picture ──upsampler──▶ fine picture
                                        clip ranks the candidates here ▲          ▲ and guides here
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from dall3 import checkpoints
from dall3.checkpoints import PathLike
from dall3.diffusion import Guide, check_scheduler, denoise
from dall3.guidance import clip_loss, cut_out, draw_cutouts, guided, with_penalties
from dall3.models.clip import CLIP
from dall3.models.discrete_vae import DiscreteVAE, OpenAIDiscreteVAE
from dall3.models.transformer import DalleTransformer
from dall3.models.unet import UNet
from dall3.models.vqgan import VQModel
from dall3.output import Dall3Output, to_pil, to_tensor
from dall3.sampling import candidate_uniforms, draw_image_tokens, draw_text_tokens
from dall3.text import TextEncoder, load_tokenizer

VAE = VQModel | DiscreteVAE | OpenAIDiscreteVAE
NOISE, CUTOUTS = 2, 3  # streams of random numbers that follow from one seed; the tokens have 1


class Ranking(NamedTuple):
    """Pictures in CLIP's order, best first."""

    indices: Tensor  # int64 (n,)
    scores: Tensor  # float32 (n,), cosine similarities, descending


def parse_prompts(text: str) -> list[tuple[str, float]]:
    """Prompts with weights, as the seed writes them: "a cube:2|a cloud" is [("a cube", 2), ("a cloud", 1)].

    A colon that no number follows belongs to the prompt. Raises ValueError for an empty prompt or weights that sum to 0.
    """
    prompts = []
    for part in text.split("|"):
        match = re.fullmatch(r"(.*):\s*(-?\d+(?:\.\d+)?)\s*", part, re.DOTALL)
        prompts.append((match[1].strip(), float(match[2])) if match else (part.strip(), 1.0))
    if not all(prompt for prompt, _ in prompts):
        raise ValueError(f"an empty prompt in {text!r}; expected text between the '|'")
    return prompts


def require(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)


class Dall3Pipeline:
    """Text to picture on DALL-3's checkpoints. Each part can be replaced, or left out (None) where it is not used.

    >>> pipe = Dall3Pipeline.from_checkpoints(dalle="dalle-latest.pt", bpe="bpe.model", vqgan="last.ckpt")
    >>> out = pipe("a cube made of cloud", num_images=4, seed=0)
    >>> out.save("outputs")

    Raises ValueError for parts that do not fit each other.
    """

    def __init__(
        self,
        *,
        text_encoder: TextEncoder | None = None,
        transformer: DalleTransformer | None = None,
        vqgan: VAE | None = None,
        clip: CLIP | None = None,
        upsampler: UNet | None = None,
        super_resolution: UNet | None = None,
    ) -> None:
        if transformer is not None and vqgan is not None:
            codes = transformer.config.num_image_tokens
            require(codes == vqgan.num_tokens, f"the transformer draws {codes} codes, the vqgan has {vqgan.num_tokens}")
        if upsampler is not None and upsampler.config.embedding_dims and isinstance(vqgan, VQModel | DiscreteVAE):
            wanted, found = upsampler.config.embedding_dims[0], vqgan.codebook.shape[1]
            require(wanted == found, f"the upsampler takes code embeddings of {wanted}, the vqgan's have {found}")
        if super_resolution is not None:
            require(super_resolution.config.super_resolution, "super_resolution takes no low-resolution picture")
        self.text_encoder, self.transformer, self.vqgan, self.clip = text_encoder, transformer, vqgan, clip
        self.upsampler, self.super_resolution = upsampler, super_resolution
        self.device = torch.device("cpu")

    @classmethod
    def from_checkpoints(
        cls,
        dalle: PathLike | None = None,
        bpe: PathLike | None = None,
        vqgan: PathLike | tuple[PathLike, PathLike] | None = None,
        vqgan_config: PathLike | None = None,
        diffusion: PathLike | None = None,
        diffusion_config: PathLike | dict[str, Any] | None = None,
        clip: PathLike | None = None,
        super_resolution: PathLike | None = None,
        super_resolution_config: PathLike | dict[str, Any] | None = None,
    ) -> Dall3Pipeline:
        """A pipeline from the files of 2021, in float32 on the CPU. What is not given is left out.

        dalle: DALLE-pytorch's checkpoint. bpe: its tokenizer, of any kind that `load_tokenizer` knows; CLIP's if not
        given. vqgan, vqgan_config: taming's checkpoint and YAML; or a DiscreteVAE's file; or OpenAI's (encoder.pkl,
        decoder.pkl); if not given, the DiscreteVAE inside `dalle`, if there is one. diffusion, super_resolution:
        guided-diffusion's checkpoints, with their flags as JSON where they are not the seed's. clip: a file or a name
        of open_clip's, as "ViT-B-16/openai".

        Raises CheckpointError (a ValueError) for a file that is broken, of another kind or does not fit.
        """
        transformer = None if dalle is None else checkpoints.load_transformer(dalle)
        config = transformer.config if transformer else None
        return cls(
            text_encoder=TextEncoder(load_tokenizer(bpe), config.text_seq_len, config.num_text_tokens)
            if config
            else None,
            transformer=transformer,
            vqgan=checkpoints.load_vae(vqgan, vqgan_config, dalle),
            clip=None if clip is None else checkpoints.load_clip(clip),
            upsampler=None if diffusion is None else checkpoints.load_unet(diffusion, diffusion_config),
            super_resolution=(
                None if super_resolution is None else checkpoints.load_unet(super_resolution, super_resolution_config)
            ),
        )

    def to(self, device: str | torch.device, dtype: torch.dtype = torch.float32) -> Dall3Pipeline:
        """Move every part to a device and to a precision: float32, float16 or bfloat16. Returns the pipeline."""
        self.device = torch.device(device)
        for part in (self.transformer, self.vqgan, self.clip, self.upsampler, self.super_resolution):
            if isinstance(part, nn.Module):
                part.to(self.device, dtype)
        for part in (self.vqgan, self.upsampler, self.super_resolution):
            if isinstance(part, nn.Module):
                part.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return self

    def __call__(
        self,
        prompt: str,
        num_images: int = 1,
        num_candidates: int | None = None,
        *,
        temperature: float = 1.0,
        top_k: float | None = None,
        top_p: float | None = None,
        cond_scale: float = 1.0,
        num_inference_steps: int | str = 25,
        scheduler: Any = "ddim",
        clip_guidance_scale: float | None = None,
        guidance_prompt: str | None = None,
        tv_scale: float = 0.0,
        range_scale: float = 0.0,
        cutn: int = 16,
        guidance_share: float = 1.0,
        strength: float = 0.5,
        output_size: int | None = None,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        batch_size: int = 32,
        truncate: bool = False,
        progress: bool = True,
    ) -> Dall3Output:
        """Draw `num_candidates` token grids for a prompt, keep the `num_images` that CLIP likes best, refine them.

        num_candidates: num_images if not given. output_size: with a super_resolution part, pixels a side of the final
        pictures. clip_guidance_scale: 1000 where there is a CLIP, else 0, if not given. batch_size: candidates, and
        pictures refined, at a time; the results do not depend on it. The rest as in `generate_tokens` and `upsample`.

        Raises ValueError for a setting out of range, or one that asks for a part that this pipeline does not have,
        before any work.
        """
        num_candidates = num_images if num_candidates is None else num_candidates
        check_count("num_images", num_images)
        check_count("num_candidates", num_candidates)
        require(num_candidates >= num_images, f"num_candidates={num_candidates} is less than num_images={num_images}")
        self._need("vqgan", "making pictures of tokens")
        if num_candidates > num_images:
            self._need("clip", f"choosing {num_images} of {num_candidates} candidates")
        if output_size is not None:
            self._need("super_resolution", f"output_size={output_size}")
        if clip_guidance_scale is None:
            clip_guidance_scale = 1000.0 if self.clip is not None and self.upsampler is not None else 0.0
        seed = choose_seed(seed, generator)
        sampling: dict[str, Any] = dict(temperature=temperature, top_k=top_k, top_p=top_p, cond_scale=cond_scale)
        refining: dict[str, Any] = dict(
            num_inference_steps=num_inference_steps,
            scheduler=scheduler,
            clip_guidance_scale=clip_guidance_scale,
            tv_scale=tv_scale,
            range_scale=range_scale,
            cutn=cutn,
            guidance_share=guidance_share,
            strength=strength,
        )
        refine = dict(prompt=guidance_prompt or prompt, seed=seed, batch_size=batch_size, progress=progress, **refining)
        if self.upsampler is not None:
            self._check_upsample("upsampler", **refining, batch_size=batch_size)
        elif clip_guidance_scale:
            self._need("upsampler", "clip_guidance_scale")

        tokens = self.generate_tokens(
            prompt, num_candidates, seed=seed, batch_size=batch_size, truncate=truncate, progress=progress, **sampling
        )
        coarse = self.decode_tokens(tokens, batch_size=batch_size)
        candidates, scores = torch.arange(num_candidates), None
        if self.clip is not None:
            candidates, scores = self.rank(coarse, prompt, batch_size=batch_size, progress=progress)
            candidates, scores = candidates[:num_images].cpu(), scores[:num_images].cpu()
        tokens, coarse = tokens[candidates.to(tokens.device)], coarse[candidates.to(coarse.device)]
        fine = coarse
        if self.upsampler is not None:
            fine = self.upsample(tokens=tokens, image=coarse, **refine)
        if output_size is not None:
            fine = self.upsample(image=fine, stage="super_resolution", output_size=output_size, **refine)
        coarse_images = to_pil(coarse)
        return Dall3Output(
            prompt=prompt,
            images=coarse_images if fine is coarse else to_pil(fine),
            coarse_images=coarse_images,
            tokens=tokens.cpu(),
            clip_scores=scores,
            candidates=candidates,
            settings=dict(
                seed=seed,
                num_candidates=num_candidates,
                **sampling,
                **refining | {"scheduler": scheduler if isinstance(scheduler, str) else type(scheduler).__name__},
                guidance_prompt=guidance_prompt,
                output_size=output_size,
            ),
        )

    @torch.no_grad()
    def generate_tokens(
        self,
        prompt: str,
        num_candidates: int = 1,
        *,
        temperature: float = 1.0,
        top_k: float | None = None,
        top_p: float | None = None,
        cond_scale: float = 1.0,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        batch_size: int = 32,
        truncate: bool = False,
        progress: bool = True,
    ) -> Tensor:
        """Draw image tokens for a prompt: int64 (num_candidates, image tokens).

        temperature: above 0. top_k: in [0, 1), the share of the vocabulary that is dropped; top_p: in (0, 1], the
        probability that is kept; not both. cond_scale: classifier-free guidance, 1 for none. seed: any integer from 0;
        drawn if neither it nor `generator` is given. truncate: cut a prompt that is too long.
        Raises ValueError for a setting out of range, a prompt that does not fit, or a missing transformer.
        """
        transformer, text_encoder = (
            self._need("transformer", "drawing tokens"),
            self._need("text_encoder", "reading text"),
        )
        check_count("num_candidates", num_candidates)
        check_count("batch_size", batch_size)
        require(temperature > 0, f"temperature={temperature}; expected a number above 0")
        require(
            top_k is None or 0 <= top_k < 1, f"top_k={top_k}; expected a share of the vocabulary to drop, in [0, 1)"
        )
        require(top_p is None or 0 < top_p <= 1, f"top_p={top_p}; expected a probability to keep, in (0, 1]")
        require(top_k is None or top_p is None, "both top_k and top_p are given; choose one")
        text_ids = text_encoder(prompt, truncate=truncate).to(self.device)
        seed, length = choose_seed(seed, generator), transformer.config.image_seq_len
        drawn = []
        with tqdm(total=num_candidates * length, desc=f"drawing {num_candidates}", disable=not progress) as bar:
            for batch in batches(num_candidates, batch_size):
                tokens = draw_image_tokens(
                    transformer,
                    text_ids,
                    candidate_uniforms(seed, batch, length).to(self.device, non_blocking=True),
                    top_k=top_k,
                    top_p=top_p,
                    temperature=temperature,
                    cond_scale=cond_scale,
                    on_token=lambda count=len(batch): bar.update(count),  # type: ignore[misc]
                )
                drawn.append(tokens)
        return torch.cat(drawn)

    @torch.no_grad()
    def decode_tokens(self, tokens: Tensor | np.ndarray, batch_size: int = 32) -> Tensor:
        """Tokens, int64 (n, side²) or (side²,), to coarse pictures, float32 (n, 3, height, width) in [0, 1].

        Raises ValueError for tokens of another shape or outside the vocabulary, or without a vqgan.
        """
        vqgan = self._need("vqgan", "making pictures of tokens")
        tokens = self._check_tokens(tokens)
        return torch.cat([vqgan.decode(batch).float() for batch in tokens.split(batch_size)])

    @torch.no_grad()
    def rank(self, images: Any, prompt: str, *, batch_size: int = 32, progress: bool = True) -> Ranking:
        """Sort pictures (PIL's, or float (n, 3, side, side) in [0, 1]) by CLIP's similarity to the prompt, best first.

        Raises ValueError for other pictures, or without a clip.
        """
        clip: CLIP = self._need("clip", "ranking")
        pictures = center_crop(to_tensor(images)).split(batch_size)
        bar = tqdm(pictures, desc="ranking", disable=not progress or len(pictures) == 1)
        scores = torch.cat([clip.score(batch.to(self.device), prompt) for batch in bar])
        # Stable, so that equal pictures keep the order in which they were drawn.
        scores, indices = scores.sort(descending=True, stable=True)
        return Ranking(indices, scores)

    @torch.no_grad()
    def upsample(
        self,
        tokens: Tensor | np.ndarray | None = None,
        image: Any = None,
        prompt: str | None = None,
        *,
        image_prompts: Sequence[tuple[Any, float]] = (),
        num_inference_steps: int | str = 25,
        scheduler: Any = "ddim",
        clip_guidance_scale: float = 0.0,
        tv_scale: float = 0.0,
        range_scale: float = 0.0,
        cutn: int = 16,
        guidance_share: float = 1.0,
        strength: float = 0.5,
        stop_at: int | None = None,
        output_size: int | None = None,
        stage: str = "upsampler",
        seed: int | None = None,
        generator: torch.Generator | None = None,
        batch_size: int = 32,
        progress: bool = True,
    ) -> Tensor:
        """Coarse to fine by diffusion: float32 (n, 3, side, side) in [0, 1].

        What it starts from depends on the UNet. On code embeddings: `tokens` (n, side²), or `image`, encoded to them.
        Unconditional: `image`, noised to a step, `strength` in (0, 1] of the way. Super-resolution: `image`, reduced
        to a quarter of `output_size`. image: PIL's, or float (n, 3, height, width) in [0, 1]; its middle square.

        num_inference_steps: a number, or guided-diffusion's respacing ("10,10,5", "ddim25"). scheduler: "ddim",
        "ddpm" (ancestral), "dpm-solver++", or a diffusers scheduler. clip_guidance_scale: how hard CLIP pulls towards
        `prompt` ("a cube:2|a cloud" weighs two) and `image_prompts` (pairs of a picture and a weight), looking at
        `cutn` cut-outs, for the first `guidance_share` of the steps; 0 computes nothing of CLIP. tv_scale,
        range_scale: penalties for noise and for colours out of range. stop_at: stop after so many steps.
        stage: "upsampler" or "super_resolution", the part that does it.
        Raises ValueError for a setting out of range or a missing part, before any work.
        """
        unet: UNet = self._need(stage, "refining")
        self._check_upsample(
            stage,
            num_inference_steps=num_inference_steps,
            scheduler=scheduler,
            clip_guidance_scale=clip_guidance_scale,
            tv_scale=tv_scale,
            range_scale=range_scale,
            cutn=cutn,
            guidance_share=guidance_share,
            strength=strength,
            batch_size=batch_size,
            stop_at=stop_at,
        )
        if clip_guidance_scale:
            require(bool(prompt or image_prompts), "clip_guidance_scale needs a prompt or image_prompts to look for")
        picture, conditioning, side = self._starting_point(unet, tokens, image, output_size)
        count = len(next(iter(conditioning.values()), picture))
        seed = choose_seed(seed, generator)
        if clip_guidance_scale:
            targets, weights = self._guidance_targets(prompt, image_prompts, cutn, seed)

        def guide() -> Guide | None:
            """Anew for every batch, so that all see the same cut-outs."""
            if clip_guidance_scale:
                cutouts = make_generator(self.device, seed, CUTOUTS)
                pull = clip_loss(self.clip, targets, weights, clip_guidance_scale, cutn, cutouts)
                return partial(guided, loss=with_penalties(pull, tv_scale, range_scale))
            if tv_scale or range_scale:
                return partial(guided, loss=with_penalties(None, tv_scale, range_scale))
            return None

        fine = []
        for batch in batches(count, batch_size):
            part = slice(batch.start, batch.stop)
            fine.append(
                denoise(
                    unet,
                    (3, side, side),
                    [make_generator(self.device, seed, NOISE, k) for k in batch],
                    {name: value[part] for name, value in conditioning.items()},
                    num_inference_steps=num_inference_steps,
                    scheduler=scheduler,
                    picture=None if picture is None else picture[part],
                    strength=strength,
                    guide=guide(),
                    guidance_share=guidance_share,
                    stop_at=stop_at,
                    progress=progress,
                )
            )
        return (torch.cat(fine).clamp(-1, 1) + 1) / 2

    def complete_text(
        self,
        prompt: str = "",
        *,
        top_k: float = 0.5,
        temperature: float = 1.0,
        seed: int | None = None,
        generator: torch.Generator | None = None,
    ) -> str:
        """Let the transformer write on from a prompt, which may be empty, and return both.

        top_k: in [0, 1), the share of the vocabulary that is dropped. Raises ValueError as `generate_tokens` does.
        """
        transformer: DalleTransformer = self._need("transformer", "writing text")
        text_encoder: TextEncoder = self._need("text_encoder", "writing text")
        require(temperature > 0, f"temperature={temperature}; expected a number above 0")
        require(0 <= top_k < 1, f"top_k={top_k}; expected a share of the vocabulary to drop, in [0, 1)")
        given = (
            text_encoder(prompt) if prompt.strip() else torch.zeros(transformer.config.text_seq_len, dtype=torch.int64)
        )
        uniforms = candidate_uniforms(choose_seed(seed, generator), range(1), transformer.config.text_seq_len)
        ids = draw_text_tokens(transformer, given.to(self.device), uniforms.to(self.device), top_k, temperature)
        # The prompt itself stays as it was written: decoding would lose the characters that the tokenizer lacks.
        return prompt + text_encoder.decode(ids)[len(text_encoder.decode(given)) :]

    def _need(self, part: str, purpose: str) -> Any:
        if getattr(self, part) is None:
            raise ValueError(f"this pipeline has no {part}, which {purpose} needs; give one when making it")
        return getattr(self, part)

    def _check_tokens(self, tokens: Tensor | np.ndarray) -> Tensor:
        tokens = torch.as_tensor(tokens)
        tokens = tokens[None] if tokens.ndim == 1 else tokens
        shape, codes = tuple(tokens.shape), self._need("vqgan", "reading tokens").num_tokens
        square = tokens.ndim == 2 and math.isqrt(shape[1]) ** 2 == shape[1] and tokens.numel() > 0
        if not square or tokens.is_floating_point() or tokens.dtype == torch.bool:
            kind = str(tokens.dtype).removeprefix("torch.")
            raise ValueError(f"tokens are {kind} {shape}; expected int64 (n, side²), such as (n, 256)")
        low, high = tokens.aminmax()
        require(low >= 0 and high < codes, f"tokens run from {low} to {high}; this vqgan has codes 0 to {codes - 1}")
        return tokens.to(self.device, torch.int64)

    def _check_upsample(
        self,
        stage: str,
        *,
        num_inference_steps: int | str,
        scheduler: Any,
        clip_guidance_scale: float,
        tv_scale: float,
        range_scale: float,
        cutn: int,
        guidance_share: float,
        strength: float,
        batch_size: int,
        stop_at: int | None = None,
    ) -> None:
        """Raise ValueError for what `upsample` cannot do, before any work."""
        unet: UNet = self._need(stage, "refining")
        for name, scale in (("clip_guidance", clip_guidance_scale), ("tv", tv_scale), ("range", range_scale)):
            require(scale >= 0, f"{name}_scale={scale}; expected a number from 0")
        if clip_guidance_scale:
            self._need("clip", f"clip_guidance_scale={clip_guidance_scale}")
        check_count("cutn", cutn)
        check_count("batch_size", batch_size)
        if stop_at is not None:
            check_count("stop_at", stop_at)
        require(0 <= guidance_share <= 1, f"guidance_share={guidance_share}; expected a share of the steps, in [0, 1]")
        require(0 < strength <= 1, f"strength={strength}; expected a share of the noise, in (0, 1]")
        check_scheduler(scheduler, unet.config.diffusion, num_inference_steps)

    def _starting_point(
        self, unet: UNet, tokens: Tensor | np.ndarray | None, image: Any, output_size: int | None
    ) -> tuple[Tensor | None, dict[str, Tensor], int]:
        """The picture to noise, if any, in [-1, 1]; what the UNet is conditioned on; the side of the result."""
        config, step = unet.config, unet.config.downsampling
        require(tokens is not None or image is not None, "nothing to refine; give tokens or an image")
        if config.embedding_dims and tokens is not None:
            tokens = self._check_tokens(tokens)
        elif image is None:
            image = self.decode_tokens(tokens)  # type: ignore[arg-type]
        side = output_size or config.image_size
        if tokens is None or not config.embedding_dims:
            require(side > 0 and side % step == 0, f"output_size={side}; expected a multiple of {step}")
            image = center_crop(to_tensor(image)).to(self.device)
        dtype = next(unet.parameters()).dtype
        if config.super_resolution:
            low_res = F.interpolate(image, side // 4, mode="area") * 2 - 1
            return None, {"low_res": low_res.to(dtype)}, side
        if config.embedding_dims:
            vqgan = self._need("vqgan", "conditioning on code embeddings")
            require(not isinstance(vqgan, OpenAIDiscreteVAE), "OpenAI's dVAE has no code embeddings to condition on")
            if tokens is None:
                # The middle block's side is half the codes'.
                tokens = vqgan.encode(F.interpolate(image, 2 * side // step * vqgan.downsampling, mode="area"))
            embeddings = vqgan.embed(tokens)
            wanted = config.embedding_dims[0]
            require(embeddings.shape[1] == wanted, f"code embeddings have {embeddings.shape[1]} channels, not {wanted}")
            return None, {"image_embeds": embeddings.to(dtype)}, embeddings.shape[-1] // 2 * step
        picture = F.interpolate(image, (side, side), mode="bicubic", antialias=True).clamp(0, 1)
        return picture * 2 - 1, {}, side

    def _guidance_targets(
        self, prompt: str | None, image_prompts: Sequence[tuple[Any, float]], cutn: int, seed: int
    ) -> tuple[Tensor, Tensor]:
        """What CLIP looks for, float32 (targets, width), and how much each counts, (targets,), summing to 1 in size."""
        clip: CLIP = self._need("clip", "guidance")
        texts = parse_prompts(prompt) if prompt else []
        targets, weights = [], [weight for _, weight in texts]
        if texts:
            targets.append(clip.embed_text([text for text, _ in texts]))
        for picture, weight in image_prompts:
            square = center_crop(to_tensor(picture)).to(self.device)
            cutouts = draw_cutouts(square.shape[-1], clip.image_size, cutn, make_generator(self.device, seed, CUTOUTS))
            targets.append(clip.embed_images(cut_out(square, cutouts, clip.image_size)))
            weights += [weight / len(targets[-1])] * len(targets[-1])
        total = sum(weights)
        require(abs(total) > 1e-3, f"the weights of the prompts sum to {total:.3g}; expected anything but 0")
        return torch.cat(targets), torch.tensor(weights, device=self.device) / abs(total)


def check_count(name: str, value: int) -> None:
    require(type(value) is int and value > 0, f"{name}={value}; expected a whole number from 1")


def batches(count: int, size: int) -> list[range]:
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def center_crop(images: Tensor) -> Tensor:
    """The middle square of pictures (n, 3, height, width)."""
    height, width = images.shape[-2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return images[..., top : top + side, left : left + side]


def choose_seed(seed: int | None, generator: torch.Generator | None) -> int:
    """The seed as given, drawn from the generator, or from the system. Raises ValueError for a negative one."""
    if seed is not None:
        require(type(seed) is int and seed >= 0, f"seed={seed}; expected a whole number from 0")
        return seed
    if generator is not None:
        return int(torch.randint(2**62, (), generator=generator, device=generator.device))
    return int.from_bytes(os.urandom(4), "little")


def make_generator(device: torch.device, seed: int, *stream: int) -> torch.Generator:
    """A generator whose numbers follow from the seed and the stream's numbers alone."""
    state = np.random.SeedSequence((seed, *stream)).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(state >> np.uint64(1)))
