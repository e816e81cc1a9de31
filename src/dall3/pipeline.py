"""Dall3Pipeline: prompt to picture in one call.

prompt ──text_encoder──▶ ids ──transformer──▶ tokens ──vqgan──▶ coarse picture ──upsampler──▶ fine picture
                                        clip ranks the candidates here ▲          ▲ and guides here
"""

from __future__ import annotations

import math
import os
import tempfile
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from dall3 import checkpoints
from dall3.checkpoints import PathLike
from dall3.diffusion import Guide, Refinement, denoise, space_timesteps
from dall3.errors import require
from dall3.fetching import fetch_set, find_weights
from dall3.guidance import clip_loss, cut_out, draw_cutouts, guided, with_penalties
from dall3.models.clip import CLIP, PromptTokenizer
from dall3.models.discrete_vae import DiscreteVAE, OpenAIDiscreteVAE
from dall3.models.transformer import DalleTransformer
from dall3.models.unet import UNet
from dall3.models.vqgan import VQModel
from dall3.output import Dall3Output, to_pil, to_tensor
from dall3.registry import WeightsSet
from dall3.sampling import (
    Sampling,
    candidate_uniforms,
    check_counts,
    draw_image_tokens,
    draw_text_tokens,
    make_generator,
)
from dall3.text import TextEncoder, Tokenizer, load_tokenizer, tokenizer_json
from dall3.weights import BUNDLED, PARTS, Origin, load_files, load_folder, read_origins, save_folder

Weighted = Sequence[tuple[Any, float]]  # texts or pictures, and how much each counts


LOADING = threading.RLock()  # one at a time, whoever asks first


def is_loader(clip: Any) -> bool:
    """Whether it is not a CLIP yet, but a function that loads one."""
    return callable(clip) and not hasattr(clip, "embed_text")


def load_and_move(load: Callable[[], CLIP], device: Any, dtype: Any, layout: Any) -> Any:
    moved: Any = load().to(device, dtype)
    return moved.to(memory_format=layout)


class Ranking(NamedTuple):
    """Pictures in CLIP's order, best first."""

    indices: Tensor  # int64 (n,)
    scores: Tensor  # float32 (n,), cosine similarities, descending


class Dall3Pipeline:
    """Text to picture on DALL-3's checkpoints. Each part can be replaced, or left out (None) where it is not used.

    clip: a CLIP, or a function that loads one when it is first needed.

    >>> pipe = Dall3Pipeline.from_checkpoints(dalle="dalle-latest.pt", bpe="bpe.model", vqgan="last.ckpt")
    >>> out = pipe("a cube made of cloud", num_images=4, seed=0)
    >>> out.save("outputs")

    Raises ValueError for parts that do not fit each other.
    """

    _clip: Any  # a CLIP, or a function that loads one

    def __init__(
        self,
        *,
        text_encoder: TextEncoder | None = None,
        transformer: DalleTransformer | None = None,
        vqgan: VQModel | DiscreteVAE | OpenAIDiscreteVAE | None = None,
        clip: CLIP | Callable[[], CLIP] | None = None,
        upsampler: UNet | None = None,
        super_resolution: UNet | None = None,
    ) -> None:
        if transformer is not None and vqgan is not None:
            codes = transformer.config.num_image_tokens
            require(codes == vqgan.num_tokens, f"the transformer draws {codes} codes, the vqgan has {vqgan.num_tokens}")
        if upsampler is not None and upsampler.config.embedding_dims and isinstance(vqgan, VQModel | DiscreteVAE):
            wanted, found = upsampler.config.embedding_dims[0], vqgan.codebook.shape[1]
            require(wanted == found, f"the upsampler takes code embeddings of {wanted}, the vqgan's have {found}")
        if upsampler is not None and upsampler.config.embedding_dims and isinstance(vqgan, OpenAIDiscreteVAE):
            raise ValueError("the upsampler is conditioned on code embeddings, and OpenAI's dVAE has none")
        if super_resolution is not None:
            require(super_resolution.config.super_resolution, "super_resolution takes no low-resolution picture")
        self.text_encoder, self.transformer, self.vqgan = text_encoder, transformer, vqgan
        self.clip = clip
        self.upsampler, self.super_resolution = upsampler, super_resolution
        self.origins: dict[str, Origin] = {}  # licence and source of the parts, where they are known

    @property
    def clip(self) -> CLIP | None:
        """The CLIP that ranks and guides, loaded now where a function that loads it was given."""
        with LOADING, torch.inference_mode(False):  # guidance needs gradients later, whoever asks first
            if is_loader(self._clip):
                self._clip = self._clip()
        return self._clip

    @clip.setter
    def clip(self, clip: CLIP | Callable[[], CLIP] | None) -> None:
        self._clip = clip

    def _load_clip_early(self) -> None:
        with suppress(Exception):  # said where it is needed
            self.clip  # noqa: B018

    @property
    def _parts(self) -> list[nn.Module]:
        parts = (self.transformer, self.vqgan, self._clip, self.upsampler, self.super_resolution)
        return [part for part in parts if isinstance(part, nn.Module)]

    @property
    def device(self) -> torch.device:
        """Where the parts are; those that replace others must be there too."""
        return next((parameter.device for part in self._parts for parameter in part.parameters()), torch.device("cpu"))

    @classmethod
    def from_pretrained(
        cls,
        name: PathLike | None = None,
        *,
        registry: PathLike | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        progress: bool = True,
    ) -> Dall3Pipeline:
        """A pipeline from weights by name, straight to a device; without a name the bundled small ones.

        name: a set in weights.toml ("mini", "dall3", …), fetched, verified and kept in the cache; a folder that
        `save_pretrained` wrote; or "owner/name" of the Hugging Face hub. A folder that has the name of a set is
        written "./dall3". registry: a weights.toml of your own, whose sets are known too.

        >>> pipe = Dall3Pipeline.from_pretrained()

        Raises CheckpointError (a ValueError) for a folder that holds no parts, or broken ones, ValueError for a name
        that is neither, FetchError (an OSError) for weights that cannot be had.
        """
        found = find_weights(BUNDLED if name is None else name, registry)
        if isinstance(found, WeightsSet):
            parts = load_files(fetch_set(found, progress), device, dtype)
            origins = {part.name: Origin(part.licence, part.source) for part in found.parts}
        else:
            parts, origins = load_folder(found, device, dtype), read_origins(found)
        tokenizer, transformer = parts.pop("tokenizer", None), parts.get("transformer")
        if tokenizer is not None and transformer is not None:
            config = transformer.config
            parts["text_encoder"] = TextEncoder(tokenizer, config.text_seq_len, config.num_text_tokens)
        pipe = cls(**parts)
        pipe.origins = origins
        return pipe.to(device)

    def save_pretrained(self, folder: PathLike, dtype: torch.dtype | None = None) -> Path:
        """Write every part to a folder that `from_pretrained` reads, and return its path.

        For each part config.json and model.safetensors; tokenizer.json; and a model card, README.md. dtype: of the
        floats in the files, torch.float16 for half the size; as they are if None.

        Raises FileExistsError for a folder that holds something; nothing is written then.
        """
        parts = {name: getattr(self, name) for name in PARTS if getattr(self, name) is not None}
        require(bool(parts), "the pipeline has no parts to save")
        return save_folder(parts, self._tokenizer, folder, dtype, self.origins)

    def push_to_hub(
        self, repository: str, dtype: torch.dtype | None = None, private: bool = False, token: str | None = None
    ) -> str:
        """Upload what `save_pretrained` writes to "owner/name" of the Hugging Face hub, made if need be.

        token: of an account that may write there; the one that `hf auth login` keeps if None. Returns its address.
        """
        from huggingface_hub import HfApi

        api = HfApi(token=token, library_name="dall3")
        with tempfile.TemporaryDirectory() as folder:
            written = self.save_pretrained(Path(folder) / "weights", dtype)
            address = api.create_repo(repository, private=private, exist_ok=True)
            api.upload_folder(repo_id=repository, folder_path=written, commit_message="Weights for dall3")
        return str(address)

    @property
    def _tokenizer(self) -> Tokenizer | None:
        """What prompts are read with: the transformer's, and a CLIP's that shares it. Raises ValueError for two."""
        tokenize = self.clip.tokenize if self.clip is not None else None
        found = [self.text_encoder.tokenizer] if self.text_encoder is not None else []
        found += [tokenize.tokenizer] if isinstance(tokenize, PromptTokenizer) else []
        texts = {tokenizer_json(tokenizer) for tokenizer in found}
        require(len(texts) < 2, "the transformer and the clip have different tokenizers, and a folder has one")
        return found[0] if found else None

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
        text_encoder = None
        if transformer is not None:
            config = transformer.config
            text_encoder = TextEncoder(load_tokenizer(bpe), config.text_seq_len, config.num_text_tokens)

        def load_unet(path: PathLike | None, flags: PathLike | dict[str, Any] | None) -> UNet | None:
            return None if path is None else checkpoints.load_unet(path, flags)

        return cls(
            text_encoder=text_encoder,
            transformer=transformer,
            vqgan=checkpoints.load_vae(vqgan, vqgan_config, dalle),
            clip=None if clip is None else checkpoints.load_clip(clip),
            upsampler=load_unet(diffusion, diffusion_config),
            super_resolution=load_unet(super_resolution, super_resolution_config),
        )

    def to(self, device: str | torch.device, dtype: torch.dtype | None = None) -> Dall3Pipeline:
        """Move every part to a device, and to a precision if given: float32, float16, bfloat16. Returns itself."""
        layout = torch.contiguous_format if torch.device(device).type == "cpu" else torch.channels_last
        for part in self._parts:
            part.to(device, dtype).to(memory_format=layout)  # type: ignore[call-overload]
        if is_loader(self._clip):
            self._clip = partial(load_and_move, self._clip, device, dtype, layout)
        return self

    def __call__(
        self,
        prompt: str,
        num_images: int = 1,
        num_candidates: int | None = None,
        *,
        guidance_prompt: str | None = None,
        output_size: int | None = None,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        batch_size: int = 32,
        refine_batch_size: int = 4,
        truncate: bool = False,
        progress: bool = True,
        **settings: Any,
    ) -> Dall3Output:
        """Draw `num_candidates` token grids for a prompt, keep the `num_images` that CLIP likes best, refine them.

        num_candidates: num_images if not given. guidance_prompt: what CLIP guides to, if not the prompt, and weighted
        if you like: "a cube:2|a cloud". output_size: with a super_resolution part, pixels a side of the final
        pictures. batch_size: candidates at a time; refine_batch_size: pictures refined at a time. The results do not
        depend on them in float32 on a CPU, and only by rounding elsewhere. truncate: cut a prompt that is too long.
        settings: those of `Sampling` and `Refinement`; clip_guidance_scale, if not given, is 1000 where there are a
        CLIP and an upsampler.

        Raises ValueError for a setting out of range, or one that asks for a part that this pipeline does not have,
        and TypeError for an unknown one, before any work.
        """
        num_candidates = num_images if num_candidates is None else num_candidates
        check_counts(num_images=num_images, num_candidates=num_candidates)
        check_counts(batch_size=batch_size, refine_batch_size=refine_batch_size)
        require(num_candidates >= num_images, f"num_candidates={num_candidates} is less than num_images={num_images}")
        sampling = Sampling(**{k: settings.pop(k) for k in Sampling.__dataclass_fields__ if k in settings})
        if self._clip is not None and self.upsampler is not None:
            settings.setdefault("clip_guidance_scale", 1000.0)
        refinement = Refinement(**settings)
        self._need("text_encoder", "reading text")(prompt, truncate)
        self._need("vqgan", "making pictures of tokens")
        if num_candidates > num_images:
            self._require("clip", f"choosing {num_images} of {num_candidates} candidates")
        texts = parse_prompts(guidance_prompt) if guidance_prompt else [(prompt, 1.0)]
        if self.upsampler is not None or (refinement.clip_guidance_scale and output_size is None):
            self._check_refinement("upsampler", refinement, texts)
        if output_size is not None:
            self._check_refinement("super_resolution", refinement, texts, output_size)
        seed = choose_seed(seed, generator)
        how: dict[str, Any] = dict(seed=seed, batch_size=batch_size, progress=progress)
        if is_loader(self._clip):  # while the tokens are drawn
            threading.Thread(target=self._load_clip_early, daemon=True).start()

        tokens = self.generate_tokens(prompt, num_candidates, truncate=truncate, **how, **asdict(sampling))
        coarse = self.decode_tokens(tokens, batch_size=batch_size)
        candidates, scores = torch.arange(num_candidates), None
        if self._clip is not None:
            candidates, scores = self.rank(coarse, prompt, batch_size=batch_size, progress=progress)
            candidates, scores = candidates[:num_images].cpu(), scores[:num_images].cpu()
        tokens, coarse = tokens[candidates.to(tokens.device)], coarse[candidates.to(coarse.device)]
        fine, how = coarse, how | vars(refinement) | {"prompt": texts, "batch_size": refine_batch_size}
        if self.upsampler is not None:
            fine = self.upsample(tokens, coarse, **how)
        if output_size is not None:
            fine = self.upsample(image=fine, stage="super_resolution", output_size=output_size, **how)
        coarse_images = to_pil(coarse)
        name = refinement.scheduler if isinstance(refinement.scheduler, str) else type(refinement.scheduler).__name__
        recipe: dict[str, Any] = dict(seed=seed, num_candidates=num_candidates, guidance_prompt=guidance_prompt)
        recipe |= dict(output_size=output_size, **asdict(sampling), **vars(refinement)) | {"scheduler": name}
        return Dall3Output(
            prompt=prompt,
            images=coarse_images if fine is coarse else to_pil(fine),
            coarse_images=coarse_images,
            tokens=tokens.cpu(),
            clip_scores=scores,
            candidates=candidates,
            settings=recipe,
        )

    @torch.no_grad()
    def generate_tokens(
        self,
        prompt: str,
        num_candidates: int = 1,
        *,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        batch_size: int = 32,
        truncate: bool = False,
        progress: bool = True,
        **settings: Any,
    ) -> Tensor:
        """Draw image tokens for a prompt: int64 (num_candidates, image tokens).

        seed: any integer from 0; drawn if neither it nor `generator` is given. truncate: cut a prompt that is too
        long. settings: those of `Sampling`. Raises ValueError for a setting out of range, a prompt that does not fit,
        or a missing transformer.
        """
        sampling = Sampling(**settings)
        check_counts(num_candidates=num_candidates, batch_size=batch_size)
        transformer: DalleTransformer = self._need("transformer", "drawing tokens")
        text_ids = self._need("text_encoder", "reading text")(prompt, truncate=truncate).to(self.device)
        seed, length = choose_seed(seed, generator), transformer.config.image_seq_len
        uniforms = candidate_uniforms(seed, range(num_candidates), length).to(self.device)
        with tqdm(total=uniforms.numel(), desc=f"drawing {num_candidates}", disable=not progress) as bar:
            return draw_image_tokens(transformer, text_ids, uniforms, sampling, batch_size, bar.update)

    @torch.no_grad()
    def decode_tokens(self, tokens: Tensor | np.ndarray, batch_size: int = 32) -> Tensor:
        """Tokens, int64 (n, side²) or (side²,), to coarse pictures, float32 (n, 3, height, width) in [0, 1].

        Raises ValueError for tokens of another shape or outside the vocabulary, or without a vqgan.
        """
        check_counts(batch_size=batch_size)
        vqgan, tokens = self._need("vqgan", "making pictures of tokens"), self._check_tokens(tokens)
        return torch.cat([vqgan.decode(batch).float() for batch in tokens.split(batch_size)])

    @torch.no_grad()
    def rank(self, images: Any, prompt: str, *, batch_size: int = 32, progress: bool = True) -> Ranking:
        """Sort pictures (PIL's, or float (n, 3, height, width) in [0, 1]) by CLIP's similarity to a prompt, best first.

        Raises ValueError for other pictures, or without a clip.
        """
        check_counts(batch_size=batch_size)
        clip: CLIP = self._need("clip", "ranking")
        pictures = center_crop(to_tensor(images)).split(batch_size)
        text, bar = clip.embed_text([prompt]), tqdm(pictures, desc="ranking", disable=not progress)
        scores = torch.cat([clip.score(batch.to(self.device), text) for batch in bar])
        # Stable, so that equal pictures keep the order in which they were drawn.
        scores, indices = scores.sort(descending=True, stable=True)
        return Ranking(indices, scores)

    @torch.inference_mode(False)  # guidance needs gradients, whatever the caller does not
    @torch.no_grad()
    def upsample(
        self,
        tokens: Tensor | np.ndarray | None = None,
        image: Any = None,
        prompt: str | Weighted | None = None,
        *,
        image_prompts: Weighted = (),
        output_size: int | None = None,
        stage: str = "upsampler",
        seed: int | None = None,
        generator: torch.Generator | None = None,
        batch_size: int = 4,
        progress: bool = True,
        **settings: Any,
    ) -> Tensor:
        """Coarse to fine by diffusion: float32 (n, 3, side, side) in [0, 1].

        What it starts from depends on the UNet. On code embeddings: `tokens` (n, side²), or `image`, encoded to them.
        Unconditional: `image`, noised to a step. Super-resolution: `image`, reduced to a quarter of `output_size`.
        image: PIL's, or float (n, 3, height, width) in [0, 1]; its middle square.

        prompt: what CLIP guides to; "a cube:2|a cloud" weighs two, as pairs [("a cube", 2), ("a cloud", 1)] do.
        image_prompts: pairs of a picture and a weight. output_size: pixels a side; if not given, what the UNet was
        trained on; tokens have their own. stage: "upsampler" or "super_resolution", the part that does it. settings:
        those of `Refinement`.
        Raises ValueError for a setting out of range or a missing part, before any work.
        """
        refinement = Refinement(**settings)
        texts = parse_prompts(prompt) if isinstance(prompt, str) else list(prompt or ())
        unet = self._check_refinement(stage, refinement, [*texts, *image_prompts], output_size)
        check_counts(batch_size=batch_size)
        picture, conditioning, side = self._starting_point(unet, tokens, image, output_size)
        count = len(next(iter(conditioning.values()), picture))  # type: ignore[arg-type]
        seed = choose_seed(seed, generator)
        if refinement.clip_guidance_scale:
            targets, weights = self._guidance_targets(texts, image_prompts, refinement.cutn, side, seed)

        def guide() -> Guide | None:
            pull = None
            if refinement.clip_guidance_scale:  # a new generator for every batch: all see the same cut-outs
                cutouts, clip = make_generator(self.device, seed, "cutouts"), self._need("clip", "guidance")
                pull = clip_loss(clip, targets, weights, refinement.clip_guidance_scale, refinement.cutn, cutouts)
            elif not refinement.tv_scale and not refinement.range_scale:
                return None
            return partial(guided, loss=with_penalties(pull, refinement.tv_scale, refinement.range_scale))

        fine = []
        for batch in batches(count, batch_size):
            generators = [make_generator(self.device, seed, "noise", k) for k in batch]
            part = {name: value[batch.start : batch.stop] for name, value in conditioning.items()}
            start = None if picture is None else picture[batch.start : batch.stop]
            fine.append(denoise(unet, (3, side, side), generators, part, refinement, start, guide(), progress))
        return (torch.cat(fine).clamp(-1, 1) + 1) / 2

    @torch.no_grad()
    def complete_text(
        self, prompt: str = "", *, seed: int | None = None, truncate: bool = False, **settings: Any
    ) -> str:
        """Let the transformer write on from a prompt, which may be empty, and return both.

        truncate: cut a prompt that is too long. settings: those of `Sampling`, but cond_scale. Raises ValueError as
        `generate_tokens` does.
        """
        sampling = Sampling(**settings)
        require(sampling.cond_scale == 1, "cond_scale guides pictures by a text; there is none to guide a text by")
        transformer: DalleTransformer = self._need("transformer", "writing text")
        encode: TextEncoder = self._need("text_encoder", "writing text")
        length = transformer.config.text_seq_len
        given = encode(prompt, truncate) if prompt.strip() else torch.zeros(length, dtype=torch.int64)
        uniforms = candidate_uniforms(choose_seed(seed, None), range(1), length).to(self.device)
        ids = draw_text_tokens(transformer, given.to(self.device), uniforms, sampling)
        # The prompt itself stays as it was written: decoding would lose the characters that the tokenizer lacks.
        return prompt + encode.decode(ids)[len(encode.decode(given)) :]

    def _require(self, part: str, purpose: str) -> None:
        """Raise ValueError where a part is missing; a CLIP that is still to be loaded is not."""
        held = self._clip if part == "clip" else getattr(self, part)
        require(held is not None, f"this pipeline has no {part}, which {purpose} needs; give one when making it")

    def _need(self, part: str, purpose: str) -> Any:
        self._require(part, purpose)
        return getattr(self, part)

    def _check_tokens(self, tokens: Tensor | np.ndarray) -> Tensor:
        tokens = torch.as_tensor(tokens)
        tokens = tokens[None] if tokens.ndim == 1 else tokens
        shape, codes = tuple(tokens.shape), self._need("vqgan", "reading tokens").num_tokens
        square = len(shape) == 2 and math.isqrt(shape[1]) ** 2 == shape[1] and tokens.numel() > 0
        kind = str(tokens.dtype).removeprefix("torch.")
        require(square and "int" in kind, f"tokens are {kind} {shape}; expected int64 (n, side²), such as (n, 256)")
        low, high = (int(bound) for bound in tokens.aminmax())
        require(low >= 0 and high < codes, f"tokens run from {low} to {high}; this vqgan has codes 0 to {codes - 1}")
        return tokens.to(self.device, torch.int64)

    def _check_refinement(
        self, stage: str, refinement: Refinement, prompts: Weighted, output_size: int | None = None
    ) -> UNet:
        """The UNet of the stage. Raises ValueError for what it cannot do. prompts: texts and pictures, with weights."""
        require(stage in ("upsampler", "super_resolution"), f"stage '{stage}'; expected upsampler or super_resolution")
        unet: UNet = self._need(stage, "refining")
        space_timesteps(unet.config.diffusion.diffusion_steps, refinement.num_inference_steps)
        require(not unet.config.num_classes, "the UNet is conditioned on class labels, which a pipeline does not give")
        side, step = unet.config.image_size if output_size is None else output_size, unet.config.downsampling
        check_counts(output_size=side)
        require(side % step == 0, f"output_size={side}; expected a multiple of {step}")
        if refinement.clip_guidance_scale:
            self._require("clip", f"clip_guidance_scale={refinement.clip_guidance_scale}")
            require(bool(prompts), "clip_guidance_scale needs a prompt or image_prompts to look for")
            total = sum(weight for _, weight in prompts)
            fits = 1e-3 < abs(total) < math.inf
            require(fits, f"the weights of the prompts sum to {total:.3g}; expected a number other than 0")
        return unet

    def _starting_point(
        self, unet: UNet, tokens: Tensor | np.ndarray | None, image: Any, output_size: int | None
    ) -> tuple[Tensor | None, dict[str, Tensor], int]:
        """The picture to noise, if any, in [-1, 1]; what the UNet is conditioned on; the side of the result."""
        config, step, dtype = unet.config, unet.config.downsampling, next(unet.parameters()).dtype
        require(tokens is not None or image is not None, "nothing to refine; give tokens or an image")
        side = output_size or config.image_size
        if tokens is not None:
            tokens = self._check_tokens(tokens)
        if image is None and not config.embedding_dims:
            image = self.decode_tokens(tokens)  # type: ignore[arg-type]
        if image is not None:
            image = center_crop(to_tensor(image)).to(self.device)
        if config.super_resolution:
            low_res = F.interpolate(image, side // 4, mode="area") * 2 - 1
            return None, {"low_res": low_res.to(dtype)}, side
        if not config.embedding_dims:
            picture = F.interpolate(image, (side, side), mode="bicubic", antialias=True).clamp(0, 1)
            return picture * 2 - 1, {}, side
        vqgan, wanted = self._need("vqgan", "conditioning on code embeddings"), config.embedding_dims[0]
        require(not isinstance(vqgan, OpenAIDiscreteVAE), "OpenAI's dVAE has no code embeddings to condition on")
        if tokens is None:  # the middle block's side is half the codes'
            small = F.interpolate(image, 2 * side // step * vqgan.downsampling, mode="area")
            tokens = vqgan.encode(small.to(next(vqgan.parameters()).dtype))
        embeddings = vqgan.embed(tokens)
        require(embeddings.shape[-1] % 2 == 0, f"{tokens.shape[1]} tokens; expected a square with an even side")
        require(embeddings.shape[1] == wanted, f"code embeddings have {embeddings.shape[1]} channels, not {wanted}")
        return None, {"image_embeds": embeddings.to(dtype)}, embeddings.shape[-1] // 2 * step

    def _guidance_targets(
        self, texts: Weighted, image_prompts: Weighted, cutn: int, side: int, seed: int
    ) -> tuple[Tensor, Tensor]:
        """What CLIP looks for, float32 (targets, width), and how much each counts, (targets,), summing to ±1."""
        clip: CLIP = self._need("clip", "guidance")
        targets = [clip.embed_text([text for text, _ in texts])] if texts else []
        weights = [weight for _, weight in texts]
        for picture, weight in image_prompts:
            square = center_crop(to_tensor(picture)).to(self.device)
            if square.shape[-1] > side:
                square = F.interpolate(square, (side, side), mode="bicubic", antialias=True).clamp(0, 1)
            generator = make_generator(self.device, seed, "cutouts")
            cutouts = draw_cutouts(square.shape[-1], clip.image_size, cutn, generator)
            targets.append(clip.embed_images(cut_out(square, cutouts, clip.image_size)))
            weights += [weight / len(targets[-1])] * len(targets[-1])
        return torch.cat(targets), torch.tensor(weights, device=self.device) / abs(sum(weights))


def parse_prompts(text: str) -> list[tuple[str, float]]:
    """Prompts with weights, as the seed writes them: "a cube:2|a cloud" is [("a cube", 2), ("a cloud", 1)].

    A colon that no number follows belongs to the prompt. Raises ValueError for an empty prompt among several.
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
        whole = isinstance(seed, int | np.integer) and 0 <= seed < 2**63
        require(whole, f"seed={seed}; expected a whole number in [0, 2**63)")
        return int(seed)
    if generator is not None:
        return int(torch.randint(2**62, (), generator=generator, device=generator.device))
    return int.from_bytes(os.urandom(4), "little")
