"""Training the DALL·E transformer on captions and the codes of a trained VQGAN (arXiv 2102.12092)."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import lru_cache, partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from dall3.images import make_grid, to_pil
from dall3.models.transformer import DalleTransformer, TransformerConfig
from dall3.models.vqgan import VQModel
from dall3.text import TextEncoder
from dall3.tokens.decoding import draw_image_tokens
from dall3.tokens.sampling import Sampling, choose
from dall3.tokens.seeds import candidate_uniforms
from dall3.training.data import StepSampler, loader
from dall3.training.files import shuffled
from dall3.training.loop import Task, TrainingConfig
from dall3.weights.folder import save_part

POOL_BATCH = 64


@dataclass(frozen=True)
class TransformerTraining:
    """null_text: the share of captions that are left out, so that classifier-free guidance has its other half.
    wrong_codes: up to this share of a picture's codes, as much as chance has it, is shown to the transformer as the
    codes that another picture of the batch has there: when it draws, its own are not all right either, and the text has
    to outweigh them (scheduled sampling's aim, arXiv 1506.03099, without its draws). own_codes: up to this share, after
    that, is shown as the transformer itself would draw them, all at once, each after the codes that were shown before
    it, `own_passes` times over: what goes wrong there is what goes wrong when it draws (parallel scheduled sampling,
    arXiv 1906.04331). true_codes: so many of a picture's first codes are always shown as they are. Where the text
    leaves a choice open, such as the background, the first codes make it; a transformer to which they were shown drawn,
    each for itself, would learn to make nothing of them. pool: so many pictures are drawn and encoded once, before the
    first step, and trained on in shuffled epochs, which costs no drawing and no encoding after that; 0 for new pictures
    in every step.
    """

    null_text: float = 0.1
    wrong_codes: float = 0.0
    own_codes: float = 0.0
    own_passes: int = 1
    true_codes: int = 0
    pool: int = 0

    def __post_init__(self) -> None:
        if self.own_passes < 1:
            raise ValueError(f"own_passes={self.own_passes}; expected a whole number from 1")
        if self.true_codes < 0:
            raise ValueError(f"true_codes={self.true_codes}; expected a whole number from 0")


class CodePool(Dataset[tuple[Tensor, str]]):
    """Pictures as their codes, int16 or int32 (codes,), with captions: an endless row of shuffled epochs."""

    def __init__(self, codes: np.ndarray, captions: list[str]) -> None:
        self.codes, self.captions = codes, captions

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        place = shuffled(index, len(self.codes))
        return torch.from_numpy(self.codes[place]), self.captions[place]


def encode_pool(data: Dataset[Any], count: int, vqgan: VQModel, path: Path, workers: int, progress: bool) -> CodePool:
    """The first `count` items of `data` as codes: from the file at `path`, which is made where it is not there yet or
    comes from another VQGAN.
    """
    device = next(vqgan.parameters()).device
    dtype = np.dtype(np.int16 if vqgan.num_tokens <= 2**15 else np.int32)
    made_by = sha256(vqgan.codebook.detach().cpu().numpy().tobytes()).hexdigest()
    if path.exists():
        with np.load(path) as found:
            stored = found["codes"]
            if str(found["made_by"]) == made_by and len(stored) == count and stored.dtype == dtype:
                return CodePool(stored, json.loads(str(found["captions"])))
    batches = loader(data, StepSampler(-(-count // POOL_BATCH), POOL_BATCH), workers)
    codes, captions = [], []
    for images, texts in tqdm(batches, desc="encoding the pool", disable=not progress):
        with torch.no_grad():
            codes.append(vqgan.encode(images.to(device).float() / 255).cpu().numpy().astype(dtype))
        captions += texts
    pool = CodePool(np.concatenate(codes)[:count], list(captions)[:count])
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(f".{os.getpid()}")
    with new.open("wb") as file:
        np.savez(file, codes=pool.codes, captions=json.dumps(pool.captions), made_by=made_by)
    new.replace(path)
    return pool


@torch.no_grad()
def redraw(model: DalleTransformer, text_ids: Tensor, image_ids: Tensor, uniforms: Tensor) -> Tensor:
    """Every code drawn anew after the text and the codes given before it: int64 like image_ids.

    Shapes as `DalleTransformer.forward` has them; uniforms: a random number in [0, 1) for each code.
    """
    _, logits = model.logits(text_ids, image_ids)
    return choose(logits.flatten(0, 1), uniforms.flatten()).view_as(image_ids)


class TransformerTask(Task):
    def __init__(
        self, config: TransformerConfig, training: TransformerTraining, vqgan: VQModel, text_encoder: TextEncoder
    ) -> None:
        super().__init__()
        self.settings, self.model = training, DalleTransformer(config)
        self.loss, self.redraw = self.model.loss, redraw
        # Training on a pool meets the same captions again and again, and a GPU is not to wait for their words.
        self.encode_text = lru_cache(maxsize=1 << 18)(partial(text_encoder, truncate=True))
        self.frozen = [vqgan]  # in a list: not a part of what is trained and saved

    def compile_parts(self) -> None:
        self.loss = torch.compile(self.model.loss, dynamic=False)
        self.redraw = torch.compile(redraw, dynamic=False)

    def make_data(self, config: TrainingConfig, folder: Path, device: torch.device, progress: bool) -> Dataset[Any]:
        data, vqgan = super().make_data(config, folder, device, progress), self.frozen[0].to(device)
        if not self.settings.pool:
            return data
        return encode_pool(data, self.settings.pool, vqgan, folder / "codes.npz", config.workers, progress)

    def forward(self, images: Tensor, captions: list[str], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """images: pictures as the other tasks take them, or codes, int16 or int32 (batch, codes)."""
        with torch.no_grad():
            is_codes = not images.is_floating_point()
            image_ids = images.long() if is_codes else self.frozen[0].to(images.device).encode(images)
        text_ids = torch.stack([self.encode_text(caption) for caption in captions]).to(images.device)
        s, count, device = self.settings, image_ids.shape[1], images.device

        def draw(generator: torch.Generator) -> Tensor:
            return torch.rand(3 + (2 + s.own_passes) * count, generator=generator, device=device)

        chances, *shares = self.per_item(draw, device).split((3, *[count] * (2 + s.own_passes)), dim=1)
        text_ids = text_ids.masked_fill(chances[:, :1] < s.null_text, 0)
        if not s.wrong_codes and not s.own_codes:
            return self.loss(text_ids, image_ids), {}
        later = torch.arange(count, device=device) >= s.true_codes
        wrong, own = (
            (shares[i] < chances[:, i + 1, None] * most) & later for i, most in enumerate((s.wrong_codes, s.own_codes))
        )
        shown = seen = torch.where(wrong, image_ids.roll(1, 0), image_ids)
        for uniforms in shares[2:] if s.own_codes else ():
            seen = torch.where(own, self.redraw(self.model, text_ids, seen, uniforms), shown)
            torch.clear_autocast_cache()  # weights that were cast without gradients are not to be trained with
        return self.loss(text_ids, image_ids, seen), {"wrong": (seen != image_ids).float().mean()}

    def sample(self, images: Tensor, captions: list[str]) -> Image:
        """For every caption the picture, its codes decoded, and two draws."""
        vqgan, model = self.frozen[0].to(images.device), self.model
        text_ids = [self.encode_text(caption).to(images.device) for caption in captions[:8]]
        uniforms = candidate_uniforms(0, range(2), model.config.image_seq_len).to(images.device)
        settings = Sampling(top_p=0.9)
        drawn = [draw_image_tokens(model, ids, uniforms, settings) for ids in text_ids]
        rows = [images[:8], vqgan.decode(vqgan.encode(images[:8]))]
        rows += [vqgan.decode(torch.stack(tokens)) for tokens in zip(*drawn, strict=True)]
        return make_grid([to_pil(row) for row in rows], images.shape[-1])

    def export(self, folder: Path) -> None:
        save_part(self.model, folder)
