"""Dall3Pipeline: prompt to picture in one call.

prompt ──text_encoder──▶ ids ──transformer──▶ tokens ──vqgan──▶ coarse picture ──upsampler──▶ fine picture
                                        clip ranks the candidates here ▲          ▲ and guides here
"""

from __future__ import annotations

import math
import os
import tempfile
import threading
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from tqdm.auto import tqdm

from dall3.diffusion.denoising import Guide, Refinement, Step, denoising_steps, refined_at_once, space_timesteps
from dall3.diffusion.guidance import clip_loss, cut_out, draw_cutouts, guided, with_penalties
from dall3.errors import require
from dall3.models.clip import CLIP, PromptTokenizer
from dall3.models.discrete_vae import DiscreteVAE, OpenAIDiscreteVAE
from dall3.models.layout import lay_out
from dall3.models.transformer import DalleTransformer
from dall3.models.unet import UNet
from dall3.models.vqgan import VQModel
from dall3.output import Dall3Output, Preview, to_pil, to_tensor
from dall3.text import TextEncoder, Tokenizer, load_tokenizer, tokenizer_json
from dall3.tokens.sampling import (
    Sampling,
    batches_that_fit,
    candidate_uniforms,
    check_counts,
    draw_text_tokens,
    fitting_batch_size,
    image_token_steps,
    make_generator,
)
from dall3.tokens.speculative import speculative_token_steps
from dall3.weights import checkpoints
from dall3.weights.checkpoints import PathLike
from dall3.weights.fetching import fetch_set, find_weights
from dall3.weights.folder import (
    BUNDLED,
    PARTS,
    Origin,
    check_defaults,
    load_files,
    load_folder,
    read_defaults,
    read_origins,
    save_folder,
)
from dall3.weights.registry import WeightsSet

Weighted = Sequence[tuple[Any, float]]  # texts or pictures, and how much each counts


NETWORKS = ("transformer", "vqgan", "clip", "upsampler", "super_resolution")
# What works together, and is on the device at the same time when parts are moved there only to work.
STAGES = ({"transformer"}, {"vqgan", "clip", "upsampler"}, {"clip", "super_resolution"})
LOADING = threading.RLock()  # one at a time, whoever asks first


def is_loader(clip: Any) -> bool:
    """Whether it is not a CLIP yet, but a function that loads one."""
    return callable(clip) and not hasattr(clip, "embed_text")


def load_and_move(load: Callable[[], CLIP], device: Any, dtype: Any) -> CLIP:
    return load().to(device, dtype)


class StopGeneration(Exception):
    """Raised by a `callback_on_step_end` to end the call, which then returns what is there.

    >>> def after_two(pipe, step, timestep, tensors):
    ...     if step == 1:
    ...         raise StopGeneration
    >>> out = Dall3Pipeline.from_pretrained()("a cube", seed=0, progress=False, callback_on_step_end=after_two)
    >>> len(out)
    1
    """


# The call's arguments that a recipe holds besides settings, and the most that a stranger's recipe may ask for.
REPEATABLE: dict[str, Any] = {
    **dict(num_images=4096, num_candidates=2**20, batch_size=2**16, refine_batch_size=4096, output_size=4096),
    **dict(seed=2**63, truncate=True, guidance_prompt=str),
}

Callback = Callable[["Dall3Pipeline", int, int, dict[str, Tensor]], object]


@dataclass(frozen=True)
class Plan:
    """What a call is to do, checked. recipe: the other arguments, of plain values."""

    prompt: str
    texts: Weighted  # that CLIP guides to
    num_images: int
    sampling: Sampling
    refinement: Refinement
    kept: Tensor | None  # int64 (image tokens,), -1 where they are drawn
    recipe: dict[str, Any]
    progress: bool
    callback: Callback | None
    stopped: list[bool] = field(default_factory=list)  # non-empty once the callback ended the call


class Ranking(NamedTuple):
    """Pictures in CLIP's order, best first."""

    indices: Tensor  # int64 (n,)
    scores: Tensor  # float32 (n,), cosine similarities, descending


class Dall3Pipeline:
    """Text to picture on DALL-3's checkpoints. Each part can be replaced, or left out (None) where it is not used.

    clip: a CLIP, or a function that loads one when it is first needed.

    >>> pipe = Dall3Pipeline.from_pretrained()
    >>> out = pipe("a cube made of cloud", num_images=2, seed=0, num_inference_steps=2, progress=False)
    >>> sorted(path.name for path in out.save("outputs").glob("*.npy"))
    ['0.npy', '1.npy']

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
        self._hashes: dict[str, tuple[Any, str]] = {}  # of the parts, with what tells that they are still the same
        self.defaults: dict[str, Any] = {}  # settings of `Sampling` and `Refinement` that suit these weights
        self._offload_device: torch.device | None = None  # where parts work that otherwise wait on the CPU

    @property
    def clip(self) -> CLIP | None:
        """The CLIP that ranks and guides, loaded now where a function that loads it was given."""
        with LOADING, torch.inference_mode(False):  # guidance needs gradients later, whoever asks first
            if is_loader(self._clip):
                self.clip = self._clip()
        return self._clip

    @clip.setter
    def clip(self, clip: CLIP | Callable[[], CLIP] | None) -> None:
        if isinstance(clip, nn.Module):
            lay_out(clip)
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
        """Where the parts are, or work; those that replace others must be there too."""
        if self._offload_device is not None:
            return self._offload_device
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
            defaults = check_defaults(found.defaults)
            parts = load_files(fetch_set(found, progress), device, dtype)
            origins = {part.name: Origin(part.licence, part.source) for part in found.parts}
        else:
            parts, origins = load_folder(found, device, dtype), read_origins(found)
            defaults = read_defaults(found)
        tokenizer, transformer = parts.pop("tokenizer", None), parts.get("transformer")
        if tokenizer is not None and transformer is not None:
            config = transformer.config
            parts["text_encoder"] = TextEncoder(tokenizer, config.text_seq_len, config.num_text_tokens)
        pipe = cls(**parts)
        pipe.origins, pipe.defaults = origins, defaults
        return pipe.to(device)

    def save_pretrained(self, folder: PathLike, dtype: torch.dtype | None = None) -> Path:
        """Write every part to a folder that `from_pretrained` reads, and return its path.

        For each part config.json and model.safetensors; tokenizer.json; generation_config.json, the settings that suit
        the weights (`defaults`); and a model card, README.md. dtype: of the
        floats in the files, torch.float16 for half the size; as they are if None.

        Raises FileExistsError for a folder that holds something; nothing is written then.

        >>> folder = Dall3Pipeline.from_pretrained().save_pretrained("my-weights", torch.float16)
        >>> Dall3Pipeline.from_pretrained(folder).vqgan.num_tokens
        2048
        """
        parts = {name: getattr(self, name) for name in PARTS if getattr(self, name) is not None}
        require(bool(parts), "the pipeline has no parts to save")
        return save_folder(parts, self._tokenizer, folder, dtype, self.origins, self.defaults)

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
        """Move every part to a device, and to a precision if given: float32, float16, bfloat16. Returns itself.

        >>> Dall3Pipeline.from_pretrained().to("cpu", torch.bfloat16).device
        device(type='cpu')
        """
        self._offload_device = None
        layout = torch.contiguous_format if torch.device(device).type == "cpu" else torch.channels_last
        for part in self._parts:
            part.to(device, dtype)
            if isinstance(part, UNet | CLIP):
                lay_out(part)
            else:
                part.to(memory_format=layout)  # type: ignore[call-overload]
        if is_loader(self._clip):
            self._clip = partial(load_and_move, self._clip, device, dtype)
        return self

    def enable_model_offload(self, device: str | torch.device, dtype: torch.dtype | None = None) -> Dall3Pipeline:
        """Keep the parts on the CPU, and move each to a device only while it works: the device's memory need only hold
        the largest stage. dtype: as `to` has it. `to` ends it. Returns itself.

        >>> pipe = Dall3Pipeline.from_pretrained().enable_model_offload("cpu")  # "cuda", where there is a GPU
        >>> pipe("a red cube", seed=0, num_inference_steps=2, progress=False).images[0].size
        (256, 256)
        """
        self.to("cpu", dtype)
        self._offload_device = torch.device(device)
        return self

    def compile(self, **options: Any) -> Dall3Pipeline:
        """Compile the token step and the denoising step with torch.compile when they are first run, a graph each.

        options: of torch.compile, such as mode="max-autotune". Compiling takes a minute or so, and pays where many
        pictures follow; a new batch size or picture size is compiled anew. Returns itself.

        >>> pipe = Dall3Pipeline.from_pretrained().compile(backend="eager")
        >>> pipe.generate_tokens("a red cube", seed=0, progress=False).shape
        torch.Size([1, 256])
        """
        if self.transformer is not None:
            self.transformer.compile(**options)
        for unet in (self.upsampler, self.super_resolution):
            if unet is not None:
                unet.compile(**{"fullgraph": True, "dynamic": False} | options)
        return self

    def __call__(
        self,
        prompt: str | Sequence[str],
        num_images: int = 1,
        num_candidates: int | None = None,
        *,
        init_image: Any = None,
        keep_rows: int | None = None,
        redraw: Sequence[int] | None = None,
        change: float | None = None,
        guidance_prompt: str | None = None,
        output_size: int | None = None,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        batch_size: int | None = None,
        refine_batch_size: int | None = None,
        truncate: bool = False,
        progress: bool = True,
        callback_on_step_end: Callback | None = None,
        **settings: Any,
    ) -> Any:
        """Draw `num_candidates` token grids for a prompt, keep the `num_images` that CLIP likes best, refine them.

        prompt: a text, for a `Dall3Output`; or a list of texts, for a list of them, each as if it were alone.
        num_candidates: num_images if not given. init_image, keep_rows, redraw, change: as `generate_tokens` has them.
        guidance_prompt: what CLIP guides to, if not the prompt, and weighted if you like: "a cube:2|a cloud".
        output_size: with a super_resolution part, pixels a side of the final pictures. batch_size: candidates at a
        time, chosen from the free memory if not given; refine_batch_size: pictures refined at a time, 1 on a CPU and 4
        elsewhere if not given; both are halved where the device's memory does not hold them. The results depend on them
        by rounding only. truncate: cut a prompt that is too long. settings: those of `Sampling` and `Refinement`; where
        not given, what `defaults` has for these weights.
        clip_guidance_scale, if neither says, is 1000 where there are a CLIP and an upsampler.
        callback_on_step_end(pipe, step, timestep, tensors): called after each denoising step with "x" and
        "pred_xstart", float32 (batch, 3, height, width) about [-1, 1]; x changed in place goes on so. Where it raises
        StopGeneration the call ends and returns what is there.

        >>> pipe = Dall3Pipeline.from_pretrained()
        >>> out = pipe("a red cube", num_images=2, seed=0, num_inference_steps=2, progress=False)
        >>> len(out), out.coarse_images[0].size, out.tokens.shape
        (2, (128, 128), torch.Size([2, 256]))

        Raises ValueError for a setting out of range, or one that asks for a part that this pipeline does not have,
        and TypeError for an unknown one, before any work.
        """
        settings = dict(
            num_images=num_images,
            num_candidates=num_candidates,
            init_image=init_image,
            keep_rows=keep_rows,
            redraw=redraw,
            change=change,
            guidance_prompt=guidance_prompt,
            output_size=output_size,
            generator=generator,
            batch_size=batch_size,
            refine_batch_size=refine_batch_size,
            truncate=truncate,
            progress=progress,
            callback_on_step_end=callback_on_step_end,
            **settings,
        )
        plans = [self._plan(one, seed=seed, **settings) for one in ([prompt] if isinstance(prompt, str) else prompt)]
        require(bool(plans), "an empty list of prompts")
        outputs = [drain(self._run(plan)) for plan in plans]
        return outputs[0] if isinstance(prompt, str) else outputs

    def variations(self, image: Any, prompt: str, num_images: int = 4, change: float = 0.5, **settings: Any) -> Any:
        """Pictures like a picture: a share `change` of its tokens, in (0, 1], is drawn anew for the prompt.

        image: PIL's, float (3, height, width) in [0, 1], or tokens, int64 (image tokens,). settings: those of the call.

        >>> pipe = Dall3Pipeline.from_pretrained()
        >>> blue = Image.new("RGB", (128, 128), "blue")
        >>> out = pipe.variations(blue, "a blue cube", 2, seed=0, num_inference_steps=2, progress=False)
        >>> len(out), len(set(map(bytes, out.tokens.numpy())))
        (2, 2)

        Raises ValueError as the call does, before any work.
        """
        return self(prompt, num_images, init_image=image, change=change, **settings)

    def stream(self, prompt: str, num_images: int = 1, *, every: int = 5, **settings: Any) -> Iterator[Preview]:
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
        plan = self._plan(prompt, num_images, **settings)

        def steps() -> Iterator[Preview]:
            output = yield from self._run(plan, every)
            yield Preview("done", 1, 1, lambda: output.images, output)

        return steps()

    def repeat(self, source: PathLike | Dall3Output, progress: bool = True) -> Dall3Output:
        """Make a picture again from the recipe that its PNG carries, or from an output of one picture.

        The same machine and weights give the same picture to the bit. Warns where the weights differ, naming them.

        >>> pipe = Dall3Pipeline.from_pretrained()
        >>> out = pipe("a red cube", seed=3, num_inference_steps=2, progress=False)
        >>> pipe.repeat(out, progress=False).images == out.images
        True

        A recipe tells nothing of a `callback_on_step_end`, nor of how a scheduler of diffusers was made, which is
        refused. Raises ValueError for a picture without a recipe, one that does not fit, or one that needs a part that
        this pipeline does not have.
        """
        found = source if isinstance(source, Dall3Output) else Dall3Output.load(source)
        require(len(found) == 1, f"an output of {len(found)} pictures; give one of them, such as out[0]")
        recipe = found.recipe(0)
        plan, weights = self._plan_again(recipe), recipe["settings"].get("weights", {})
        self.clip  # noqa: B018  loaded, if it is still to be, to be compared
        here = self._fingerprints()
        for part in PARTS:
            if weights.get(part) != here.get(part):
                held, was = ("none" if one is None else str(one)[:16] for one in (here.get(part), weights.get(part)))
                warnings.warn(f"the {part} is another: {held!r} here, {was!r} made the picture", stacklevel=2)
        again: Dall3Output = drain(self._run(replace(plan, progress=progress)))[recipe["place"]]
        if again.recipe(0)["tokens"] != recipe["tokens"]:
            warnings.warn("other tokens were drawn than those of the picture", stacklevel=2)
        return again

    def _plan_again(self, recipe: dict[str, Any]) -> Plan:
        """The plan of a recipe, which may come from a stranger: what does not fit is a ValueError."""
        settings = {name: value for name, value in recipe["settings"].items() if name not in ("kept", "weights")}
        kept, place = recipe["settings"].get("kept"), recipe["place"]
        known = {*REPEATABLE, *Sampling.__dataclass_fields__, *Refinement.__dataclass_fields__}
        unknown = ", ".join(map(repr, sorted(settings.keys() - known)))
        require(not unknown, f"the recipe has settings that this version does not know: {unknown[:200]}")
        require(isinstance(recipe["settings"].get("weights", {}), dict), "the recipe's weights are not named by part")
        check_defaults({name: value for name, value in settings.items() if name not in REPEATABLE})
        for name, most in REPEATABLE.items():
            value = settings.get(name)
            fits = value is None or (isinstance(value, str if most is str else int) and (most is str or value <= most))
            require(fits, f"the recipe's {name} is {str(value)[:40]!r}, which cannot be")
        plan = self._plan(recipe["prompt"], **settings)
        require(0 <= place < plan.num_images, f"the recipe's place is {place}, of {plan.num_images} pictures")
        if kept is None:
            return plan
        length = self._require("transformer", "drawing tokens").config.image_seq_len
        fits = isinstance(kept, list) and len(kept) == length and all(type(token) is int for token in kept)
        require(fits, f"the recipe keeps tokens that are not {length} whole numbers")
        self._check_tokens(torch.tensor(kept).clamp(min=0))
        return replace(plan, kept=torch.tensor(kept, device=self.device), recipe=plan.recipe | {"kept": kept})

    def _plan(
        self,
        prompt: str,
        num_images: int = 1,
        num_candidates: int | None = None,
        init_image: Any = None,
        keep_rows: int | None = None,
        redraw: Sequence[int] | None = None,
        change: float | None = None,
        guidance_prompt: str | None = None,
        output_size: int | None = None,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        batch_size: int | None = None,
        refine_batch_size: int | None = None,
        truncate: bool = False,
        progress: bool = True,
        callback_on_step_end: Callback | None = None,
        **settings: Any,
    ) -> Plan:
        """The call's arguments, checked."""
        num_candidates = num_images if num_candidates is None else num_candidates
        refine_batch_size = refined_at_once(refine_batch_size, self.device)
        check_counts(num_images=num_images, num_candidates=num_candidates, refine_batch_size=refine_batch_size)
        require(num_candidates >= num_images, f"num_candidates={num_candidates} is less than num_images={num_images}")
        sampling = self._sampling({k: settings.pop(k) for k in Sampling.__dataclass_fields__ if k in settings})
        guide = self._clip is not None and self.upsampler is not None
        scale = self.defaults.get("clip_guidance_scale", 1000.0) if guide else 0.0
        refinement = Refinement(**self.with_defaults(Refinement, {"clip_guidance_scale": scale} | settings))
        self._require("text_encoder", "reading text")(prompt, truncate)
        self._require("vqgan", "making pictures of tokens")
        if num_candidates > num_images:
            self._require("clip", f"choosing {num_images} of {num_candidates} candidates")
        texts = parse_prompts(guidance_prompt) if guidance_prompt else [(prompt, 1.0)]
        if self.upsampler is not None or (refinement.clip_guidance_scale and output_size is None):
            self._check_refinement("upsampler", refinement, texts)
        if output_size is not None:
            self._check_refinement("super_resolution", refinement, texts, output_size)
        seed = choose_seed(seed, generator)
        kept = self._kept_tokens(init_image, keep_rows, redraw, change, seed)
        return Plan(
            prompt=prompt,
            texts=texts,
            num_images=num_images,
            sampling=sampling,
            refinement=refinement,
            kept=kept,
            recipe=dict(
                num_images=num_images,
                num_candidates=num_candidates,
                kept=None if kept is None else kept.tolist(),
                guidance_prompt=guidance_prompt,
                output_size=output_size,
                seed=seed,
                batch_size=self._batch_size(batch_size, sampling),
                refine_batch_size=refine_batch_size,
                truncate=truncate,
            ),
            progress=progress,
            callback=callback_on_step_end,
        )

    def _run(self, plan: Plan, every: int = 1) -> Generator[Preview, None, Dall3Output]:
        """The four stages in order, with a preview where there is something new to see; returns the output."""
        if is_loader(self._clip):  # while the tokens are drawn
            threading.Thread(target=self._load_clip_early, daemon=True).start()
        how, batch_size, count = plan.recipe, plan.recipe["batch_size"], plan.num_images
        refinement = plan.refinement
        draw: dict[str, Any] = dict(seed=how["seed"], batch_size=batch_size, truncate=how["truncate"])
        draw |= dict(progress=plan.progress, kept=plan.kept)
        side = self._require("transformer", "drawing tokens").config.grid_size
        for tokens, batch, drawn in self._token_steps(plan.prompt, how["num_candidates"], plan.sampling, **draw):
            if drawn % side == 0:
                rows = tokens[batch.start : min(batch.start + count, batch.stop)].clone()
                done = batch.start * side**2 + len(batch) * drawn
                yield Preview("drawing", done, tokens.numel(), partial(self._show_rows, rows, drawn // side))

        seamless = refinement.seamless
        candidates, scores, coarse = self._choose(tokens, plan.prompt, count, batch_size, seamless, plan.progress)
        tokens = tokens[candidates]
        yield Preview("ranking", 1, 1, partial(to_pil, coarse))

        fine, refine = coarse, {"prompt": plan.texts, "seed": how["seed"], "batch_size": how["refine_batch_size"]}
        refine |= {"settings": refinement, "progress": plan.progress, "callback": plan.callback}
        refine |= {"stopped": plan.stopped}
        if self.upsampler is not None:
            fine = yield from previews_of(self._refine("upsampler", tokens, coarse, **refine), every)
        if how["output_size"] is not None and not plan.stopped:
            steps = self._refine("super_resolution", None, fine, output_size=how["output_size"], **refine)
            fine = yield from previews_of(steps, every)
        coarse_images = to_pil(coarse)
        name = refinement.scheduler if isinstance(refinement.scheduler, str) else type(refinement.scheduler).__name__
        recipe = how | asdict(plan.sampling) | vars(refinement) | {"scheduler": name, "weights": self._fingerprints()}
        if self._offload_device is not None:
            self._put_back(*NETWORKS)
        out = Dall3Output(
            prompt=plan.prompt,
            images=coarse_images if fine is coarse else to_pil(fine),
            coarse_images=coarse_images,
            tokens=tokens.cpu(),
            clip_scores=None if scores is None else scores.cpu(),
            candidates=candidates.cpu(),
            settings=recipe,
        )
        return out if len(fine) == count else out[: len(fine)]

    @torch.no_grad()
    def _choose(
        self, tokens: Tensor, prompt: str, count: int, batch_size: int, seamless: bool, progress: bool
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """The numbers of the `count` candidates that CLIP likes best, best first, their scores and their pictures.

        Batch after batch: of the others' pictures none is kept. Without a clip it is the first ones, and no scores.
        """
        numbers = torch.arange(len(tokens), device=tokens.device)
        clip = None if self._clip is None else self._need("clip", "ranking")
        text = None if clip is None else clip.embed_text([prompt])
        best: tuple[Tensor, Tensor, Tensor] | None = None

        def look(batch: range) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
            pictures = self.decode_tokens(tokens[batch.start : batch.stop], len(batch), seamless)
            equal = torch.zeros(len(batch), device=tokens.device)
            scores = equal if clip is None or text is None else clip.score(center_crop(pictures), text)
            yield numbers[batch.start : batch.stop], scores, pictures

        with tqdm(total=len(tokens), desc=f"ranking {len(tokens)}", disable=not progress or clip is None) as bar:
            for batch, found in batches_that_fit(len(tokens), batch_size, look):
                pairs = zip(best or (found[0][:0], found[1][:0], found[2][:0]), found, strict=True)
                chosen, scores, pictures = (torch.cat(pair) for pair in pairs)
                # Stable, so that equal pictures keep the order in which they were drawn.
                order = scores.sort(descending=True, stable=True).indices[:count]
                best = (chosen[order], scores[order], pictures[order])
                bar.update(len(batch))
        assert best is not None
        return best[0], None if clip is None else best[1], best[2]

    def _kept_tokens(
        self, init_image: Any, keep_rows: int | None, redraw: Sequence[int] | None, change: float | None, seed: int
    ) -> Tensor | None:
        """The tokens that are not drawn, int64 (image tokens,), -1 for those that are; None where all are drawn."""
        ways = [
            name for name, way in (("keep_rows", keep_rows), ("redraw", redraw), ("change", change)) if way is not None
        ]
        if init_image is None:
            require(not ways, f"{' and '.join(ways)} says what stays of an init_image; give one")
            return None
        require(len(ways) < 2, f"{' and '.join(ways)} are both given; choose one")
        side = self._require("transformer", "drawing tokens").config.grid_size
        drawn = torch.zeros(side, side, dtype=torch.bool)
        if redraw is not None:
            fits = len(redraw) == 4 and all(isinstance(value, int | np.integer) and value >= 0 for value in redraw)
            require(fits, f"redraw={redraw}; expected (top, left, height, width) in tokens")
            top, left, height, width = redraw
            fits = height > 0 and width > 0 and top + height <= side and left + width <= side
            require(fits, f"redraw={redraw}; the rectangle does not lie on the {side}×{side} tokens")
            drawn[top : top + height, left : left + width] = True
        elif change is not None:
            require(0 < change <= 1, f"change={change}; expected a share of the tokens to draw anew, in (0, 1]")
            drawn = torch.rand(side, side, generator=make_generator("cpu", seed, "change")) < change
        else:
            keep_rows = int(0.4375 * side) if keep_rows is None else keep_rows
            fits = isinstance(keep_rows, int | np.integer) and 0 < keep_rows < side
            require(fits, f"keep_rows={keep_rows}; expected a whole number of rows in [1, {side - 1}]")
            drawn[keep_rows:] = True
        if isinstance(init_image, np.ndarray | Tensor) and init_image.ndim < 3:
            tokens = self._check_tokens(init_image)
        else:
            picture = enlarge(center_crop(to_tensor(init_image)), side * self._require("vqgan", "priming").downsampling)
            tokens = self._encode(picture.to(self.device))
        require(tokens.shape == (1, side**2), f"init_image has tokens {tuple(tokens.shape)}; expected ({side**2},)")
        return torch.where(drawn.flatten().to(self.device), -1, tokens[0])

    def _show_rows(self, tokens: Tensor, rows: int) -> list[Image.Image]:
        """Tokens of which so many rows are drawn, as pictures; the rest is grey."""
        pictures = self.decode_tokens(tokens)
        pictures[:, :, rows * pictures.shape[-2] // math.isqrt(tokens.shape[1]) :] = 0.5
        return to_pil(pictures)

    def _fingerprints(self) -> dict[str, str]:
        """A short hash of each part's weights, by the part's name; made anew only where the weights changed."""
        found = {}
        for name in PARTS:
            part = self._clip if name == "clip" else getattr(self, name)
            if isinstance(part, nn.Module):
                tensors = part.state_dict().values()
                version = [(t.data_ptr(), t.dtype, None if t.is_inference() else t._version) for t in tensors]
                if name not in self._hashes or self._hashes[name][0] != version:
                    self._hashes[name] = (version, fingerprint(part))
                found[name] = self._hashes[name][1]
        return found

    @torch.no_grad()
    def generate_tokens(
        self,
        prompt: str,
        num_candidates: int = 1,
        *,
        init_image: Any = None,
        keep_rows: int | None = None,
        redraw: Sequence[int] | None = None,
        change: float | None = None,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        batch_size: int | None = None,
        truncate: bool = False,
        progress: bool = True,
        **settings: Any,
    ) -> Tensor:
        """Draw image tokens for a prompt: int64 (num_candidates, image tokens).

        init_image: a picture, or tokens, int64 (image tokens,), of which some stay: the first keep_rows rows (0.4375 of
        them if not said, as DALLE-pytorch primes); or all but the rectangle `redraw`, (top, left, height, width) in
        tokens; or all but a share `change` of them, in (0, 1], chosen at random. What is drawn sees what stands before
        it, row by row, and nothing after it.
        seed: any integer from 0; drawn if neither it nor `generator` is given. batch_size: candidates at a time,
        chosen from the free memory if not given. truncate: cut a prompt that is too long. settings: those of
        `Sampling`; where not given, what `defaults` has for these weights. Raises ValueError
        for a setting out of range, a prompt that does not fit, or a missing transformer.

        >>> pipe = Dall3Pipeline.from_pretrained()
        >>> tokens = pipe.generate_tokens("a red cube", 2, seed=0, progress=False)
        >>> tokens.shape
        torch.Size([2, 256])
        >>> other = pipe.generate_tokens("a blue cube", init_image=tokens[0], redraw=(8, 0, 8, 16), progress=False)
        >>> torch.equal(other[0, :128], tokens[0, :128])
        True
        """
        sampling = self._sampling(settings)
        check_counts(num_candidates=num_candidates)
        batch_size = self._batch_size(batch_size, sampling)
        seed = choose_seed(seed, generator)
        kept = self._kept_tokens(init_image, keep_rows, redraw, change, seed)
        how: dict[str, Any] = dict(batch_size=batch_size, truncate=truncate, progress=progress, kept=kept)
        for drawn, _, _ in self._token_steps(  # noqa: B007
            prompt, num_candidates, sampling, seed, **how
        ):
            pass
        return drawn

    def _token_steps(
        self,
        prompt: str,
        num_candidates: int,
        sampling: Sampling,
        seed: int,
        batch_size: int,
        kept: Tensor | None,
        truncate: bool,
        progress: bool,
    ) -> Iterator[tuple[Tensor, range, int]]:
        """`image_token_steps` for a prompt, with a progress bar."""
        transformer: DalleTransformer = self._need("transformer", "drawing tokens")
        text_ids = self._need("text_encoder", "reading text")(prompt, truncate=truncate).to(self.device)
        length, numbers = transformer.config.image_seq_len, range(num_candidates)
        if sampling.jacobi_window is not None:
            generators = [make_generator("cpu", seed, "speculation", k) for k in numbers]
            steps = speculative_token_steps(transformer, text_ids, generators, sampling, kept)
        else:
            uniforms = candidate_uniforms(seed, numbers, length).to(self.device)
            steps = image_token_steps(transformer, text_ids, uniforms, sampling, batch_size, kept)
        desc = f"drawing {num_candidates} candidate{'s' * (num_candidates > 1)}"
        with tqdm(total=num_candidates * length, desc=desc, disable=not progress) as bar:
            for step in steps:
                bar.update(step[1].start * length + len(step[1]) * step[2] - bar.n)
                yield step

    @torch.no_grad()
    def decode_tokens(self, tokens: Tensor | np.ndarray, batch_size: int = 32, seamless: bool = False) -> Tensor:
        """Tokens, int64 (n, side²) or (side²,), to coarse pictures, float32 (n, 3, height, width) in [0, 1].

        seamless: the decoder sees beyond each edge what lies at the opposite one. Raises ValueError for tokens of
        another shape or outside the vocabulary, or without a vqgan.

        >>> Dall3Pipeline.from_pretrained().decode_tokens(torch.zeros(256, dtype=torch.int64)).shape
        torch.Size([1, 3, 128, 128])
        """
        check_counts(batch_size=batch_size)
        vqgan, tokens = self._need("vqgan", "making pictures of tokens"), self._check_tokens(tokens)
        side = math.isqrt(tokens.shape[1])
        margin = side // 4 if seamless else 0
        places = torch.arange(-margin, side + margin, device=tokens.device) % side
        wider = tokens.view(-1, side, side)[:, places][:, :, places].flatten(1)
        pictures = torch.cat([vqgan.decode(batch).float() for batch in wider.split(batch_size)])
        edge = margin * pictures.shape[-1] // len(places)
        return pictures[..., edge : pictures.shape[-2] - edge, edge : pictures.shape[-1] - edge]

    @torch.no_grad()
    def rank(self, images: Any, prompt: str, *, batch_size: int = 32, progress: bool = True) -> Ranking:
        """Sort pictures (PIL's, or float (n, 3, height, width) in [0, 1]) by CLIP's similarity to a prompt, best first.

        Raises ValueError for other pictures, or without a clip.

        >>> red, blue = (Image.new("RGB", (128, 128), colour) for colour in ("red", "blue"))
        >>> Dall3Pipeline.from_pretrained().rank([blue, red], "a red cube", progress=False).indices.shape
        torch.Size([2])
        """
        check_counts(batch_size=batch_size)
        clip: CLIP = self._need("clip", "ranking")
        pictures = center_crop(to_tensor(images)).split(batch_size)
        text, bar = clip.embed_text([prompt]), tqdm(pictures, desc="ranking", disable=not progress)
        scores = torch.cat([clip.score(batch.to(self.device), text) for batch in bar])
        # Stable, so that equal pictures keep the order in which they were drawn.
        scores, indices = scores.sort(descending=True, stable=True)
        return Ranking(indices, scores)

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
        batch_size: int | None = None,
        progress: bool = True,
        callback_on_step_end: Callback | None = None,
        **settings: Any,
    ) -> Tensor:
        """Coarse to fine by diffusion: float32 (n, 3, side, side) in [0, 1].

        What it starts from depends on the UNet. On code embeddings: `tokens` (n, side²), or `image`, encoded to them;
        with a `strength` below 1 also the coarse picture, decoded if not given, enlarged and noised. Unconditional:
        `image`, noised to a step. Super-resolution: `image`, reduced to a quarter of `output_size`.
        image: PIL's, or float (n, 3, height, width) in [0, 1]; its middle square.

        prompt: what CLIP guides to; "a cube:2|a cloud" weighs two, as pairs [("a cube", 2), ("a cloud", 1)] do.
        image_prompts: pairs of a picture and a weight. output_size: pixels a side; if not given, what the UNet was
        trained on; tokens have their own. stage: "upsampler" or "super_resolution", the part that does it. batch_size:
        pictures refined at a time, 1 on a CPU and 4 elsewhere if not given. settings: those of `Refinement`; where not
        given, what `defaults` has for these weights, but for clip_guidance_scale.
        Raises ValueError for a setting out of range or a missing part, before any work.

        >>> pipe, blue = Dall3Pipeline.from_pretrained(), Image.new("RGB", (256, 256), "blue")
        >>> pipe.upsample(image=blue, num_inference_steps=2, seed=0, progress=False).shape
        torch.Size([1, 3, 256, 256])

        A picture of 256 px goes through the same UNet again for one of 512, and that for one of 1,024:

        >>> pipe.upsample(image=blue, output_size=512, num_inference_steps=5, seed=0, progress=False).shape
        torch.Size([1, 3, 512, 512])
        """
        refinement = Refinement(**self.with_defaults(Refinement, {"clip_guidance_scale": 0.0} | settings))
        texts = parse_prompts(prompt) if isinstance(prompt, str) else list(prompt or ())
        self._check_refinement(stage, refinement, [*texts, *image_prompts], output_size)
        batch_size = refined_at_once(batch_size, self.device)
        check_counts(batch_size=batch_size)
        seed = choose_seed(seed, generator)
        how: dict[str, Any] = dict(image_prompts=image_prompts, output_size=output_size, callback=callback_on_step_end)
        how |= dict(settings=refinement, seed=seed, batch_size=batch_size, progress=progress)
        fine: Tensor = drain(self._refine(stage, tokens, image, texts, **how))
        return fine

    @torch.inference_mode(False)  # guidance needs gradients, whatever the caller does not
    @torch.no_grad()
    def _refine(
        self,
        stage: str,
        tokens: Tensor | np.ndarray | None,
        image: Any,
        prompt: Weighted,
        *,
        settings: Refinement,
        seed: int,
        batch_size: int,
        progress: bool,
        callback: Callback | None,
        stopped: list[bool] | None = None,
        image_prompts: Weighted = (),
        output_size: int | None = None,
    ) -> Generator[Step, None, Tensor]:
        """The denoising steps of `upsample`, batch after batch; returns the fine pictures."""
        unet: UNet = self._need(stage, "refining")
        picture, conditioning, side = self._starting_point(unet, tokens, image, output_size, settings)
        count = len(next(iter(conditioning.values()), picture))  # type: ignore[arg-type]
        if settings.clip_guidance_scale:
            targets, weights = self._guidance_targets(prompt, image_prompts, settings.cutn, side, seed)

        def guide() -> Guide | None:
            pull = None
            if settings.clip_guidance_scale:  # a new generator for every batch: all see the same cut-outs
                cutouts, clip = make_generator(self.device, seed, "cutouts"), self._need("clip", "guidance")
                pull = clip_loss(clip, targets, weights, settings.clip_guidance_scale, settings.cutn, cutouts)
            elif not settings.tv_scale and not settings.range_scale:
                return None
            return partial(guided, loss=with_penalties(pull, settings.tv_scale, settings.range_scale))

        def work(batch: range) -> Iterator[Step]:
            generators = [make_generator(self.device, seed, "noise", k) for k in batch]
            part = {name: value[batch.start : batch.stop] for name, value in conditioning.items()}
            start = None if picture is None else picture[batch.start : batch.stop]
            which = f"{batch.start + 1}" if len(batch) == 1 else f"{batch.start + 1} to {batch.stop}"
            bar = f"refining {which} of {count}" if progress else None
            return denoising_steps(unet, (3, side, side), generators, part, settings, start, guide(), bar)

        fine = {}  # by the number of a batch's first picture, of each the last step's
        for batch, step in batches_that_fit(count, batch_size, work):
            fine[batch.start] = step.pred_xstart
            if callback is not None:
                try:
                    callback(self, step.number, step.timestep, {"x": step.x, "pred_xstart": step.pred_xstart})
                except StopGeneration:
                    if stopped is not None:
                        stopped.append(True)
                    break
            yield step
        return (torch.cat(list(fine.values())).clamp(-1, 1) + 1) / 2

    @torch.no_grad()
    def complete_text(
        self, prompt: str = "", *, seed: int | None = None, truncate: bool = False, **settings: Any
    ) -> str:
        """Let the transformer write on from a prompt, which may be empty, and return both.

        truncate: cut a prompt that is too long. settings: those of `Sampling`, but cond_scale. Raises ValueError as
        `generate_tokens` does.

        >>> Dall3Pipeline.from_pretrained().complete_text("a red cube", seed=0).startswith("a red cube")
        True
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

    def with_defaults(self, kind: Any, given: dict[str, Any]) -> dict[str, Any]:
        """The settings of `kind` (Sampling or Refinement) that are given, and the weights' own where they are not.

        >>> pipe = Dall3Pipeline.from_pretrained()
        >>> pipe.defaults = {"top_p": 0.9, "cond_scale": 2.0}
        >>> pipe.with_defaults(Sampling, {"top_k": 0.5})
        {'cond_scale': 2.0, 'top_k': 0.5}
        """
        filters = {"top_k", "top_p"}
        unwanted = filters if any(given.get(name) is not None for name in filters) else set()
        own = {k: v for k, v in self.defaults.items() if k in kind.__dataclass_fields__ and k not in unwanted}
        return own | given

    @torch.no_grad()
    def _encode(self, pictures: Tensor) -> Tensor:
        vqgan: Any = self._need("vqgan", "encoding pictures")
        tokens: Tensor = vqgan.encode(pictures.to(next(vqgan.parameters()).dtype))
        return tokens

    def _sampling(self, given: dict[str, Any]) -> Sampling:
        """The settings of a draw, those of the weights where none are given, checked."""
        sampling = Sampling(**self.with_defaults(Sampling, given))
        on_cpu = sampling.quantize is None or self.device.type == "cpu"
        require(on_cpu, f"quantize='{sampling.quantize}' is for a CPU, and this pipeline is on {self.device}")
        return sampling

    def _batch_size(self, given: int | None, sampling: Sampling) -> int:
        """Candidates at a time: as many as are asked for, or as fit."""
        if given is None:
            return fitting_batch_size(self._require("transformer", "drawing tokens"), sampling)
        check_counts(batch_size=given)
        return given

    def _require(self, part: str, purpose: str) -> Any:
        """A part where it is, or the function that loads it. Raises ValueError where there is none."""
        held = self._clip if part == "clip" else getattr(self, part)
        require(held is not None, f"this pipeline has no {part}, which {purpose} needs; give one when making it")
        return held

    def _need(self, part: str, purpose: str) -> Any:
        """A part, to work with: loaded, and on the device where it works. Raises ValueError where there is none."""
        self._require(part, purpose)
        found = getattr(self, part)
        if self._offload_device is not None and isinstance(found, nn.Module):
            self._put_back(*(other for other in NETWORKS if not any({part, other} <= stage for stage in STAGES)))
            found.to(self._offload_device)
        return found

    def _put_back(self, *parts: str) -> None:
        """Move parts back to the CPU, where they wait."""
        for name in parts:
            held = self._clip if name == "clip" else getattr(self, name)
            if isinstance(held, nn.Module):
                held.to("cpu")

    def _check_tokens(self, tokens: Tensor | np.ndarray) -> Tensor:
        tokens = torch.as_tensor(tokens)
        tokens = tokens[None] if tokens.ndim == 1 else tokens
        shape, codes = tuple(tokens.shape), self._require("vqgan", "reading tokens").num_tokens
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
        unet: UNet = self._require(stage, "refining")
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
        self, unet: UNet, tokens: Tensor | np.ndarray | None, image: Any, output_size: int | None, settings: Refinement
    ) -> tuple[Tensor | None, dict[str, Tensor], int]:
        """The picture to noise, if any, in [-1, 1]; what the UNet is conditioned on; the side of the result."""
        config, step, dtype = unet.config, unet.config.downsampling, next(unet.parameters()).dtype
        require(tokens is not None or image is not None, "nothing to refine; give tokens or an image")
        side = output_size or config.image_size
        if tokens is not None:
            tokens = self._check_tokens(tokens)
        if image is None and not config.embedding_dims:
            image = self.decode_tokens(tokens, seamless=settings.seamless)  # type: ignore[arg-type]
        if image is not None:
            image = center_crop(to_tensor(image)).to(self.device)
        if config.super_resolution and not config.embedding_dims:
            low_res = F.interpolate(image, side // 4, mode="area") * 2 - 1
            return None, {"low_res": low_res.to(dtype)}, side
        if not config.embedding_dims:
            return enlarge(image, side) * 2 - 1, {}, side
        vqgan, wanted = self._need("vqgan", "conditioning on code embeddings"), config.embedding_dims[0]
        require(not isinstance(vqgan, OpenAIDiscreteVAE), "OpenAI's dVAE has no code embeddings to condition on")
        if tokens is None:  # the middle block's side is half the codes'
            small = F.interpolate(image, 2 * side // step * vqgan.downsampling, mode="area")
            tokens = self._encode(small)
        embeddings = vqgan.embed(tokens)
        require(embeddings.shape[-1] % 2 == 0, f"{tokens.shape[1]} tokens; expected a square with an even side")
        require(embeddings.shape[1] == wanted, f"code embeddings have {embeddings.shape[1]} channels, not {wanted}")
        side = embeddings.shape[-1] // 2 * step
        picture, told = None, {"image_embeds": embeddings.to(dtype)}
        if image is not None and len(image) != len(tokens):
            raise ValueError(
                f"{len(tokens)} rows of tokens and {len(image)} pictures; give as many of both, or one of them"
            )
        is_noised = settings.strength is not None and settings.strength < 1
        if is_noised or config.super_resolution:
            coarse = self.decode_tokens(tokens, seamless=settings.seamless) if image is None else image
            picture = enlarge(coarse, side) * 2 - 1 if is_noised else None
        if config.super_resolution:
            low_res = F.interpolate(coarse, embeddings.shape[-1] * vqgan.downsampling, mode="area")
            told["low_res"] = (low_res * 2 - 1).to(dtype)
        return picture, told, side

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
                square = enlarge(square, side)
            generator = make_generator(self.device, seed, "cutouts")
            cutouts = draw_cutouts(square.shape[-1], clip.image_size, cutn, generator)
            targets.append(clip.embed_images(cut_out(square, cutouts, clip.image_size)))
            weights += [weight / len(targets[-1])] * len(targets[-1])
        return torch.cat(targets), torch.tensor(weights, device=self.device) / abs(sum(weights))


def drain(steps: Generator[Any, None, Any]) -> Any:
    """What a generator returns, after all that it yields."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


def previews_of(steps: Generator[Step, None, Tensor], every: int) -> Generator[Preview, None, Tensor]:
    """A preview of every so many denoising steps, and of the last; returns what they return."""
    while True:
        try:
            step = next(steps)
        except StopIteration as end:
            fine: Tensor = end.value
            return fine
        if (step.number + 1) % every == 0 or step.number + 1 == step.total:
            yield Preview("refining", step.number + 1, step.total, partial(show_estimate, step.pred_xstart))


def show_estimate(pred_xstart: Tensor) -> list[Image.Image]:
    return to_pil((pred_xstart + 1) / 2)


def fingerprint(part: nn.Module) -> str:
    """Sixteen hexadecimal digits that follow from a network's tensors."""
    digest = blake2b(digest_size=8)
    for name, tensor in sorted(part.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


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


def enlarge(images: Tensor, side: int) -> Tensor:
    """Square pictures (n, 3, …) in [0, 1], bicubic to `side` pixels."""
    return F.interpolate(images, (side, side), mode="bicubic", antialias=True).clamp(0, 1)


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
