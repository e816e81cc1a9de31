"""Train the DALL·E transformer on captions and the codes of a trained VQGAN (arXiv 2102.12092)."""

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
    """Settings of the loss and the data.

    null_text: fraction of captions that are replaced by the empty text, for classifier-free guidance.
    wrong_codes: maximum fraction of an image's input codes that are replaced by those of another image of the batch.
    The fraction is random per image. When sampling, the input contains errors too, and the text should outweigh them.
    The aim is that of scheduled sampling (arXiv 1506.03099), without sampling from the model.
    own_codes: maximum fraction of the input codes that are replaced by the model's own predictions, sampled for all
    positions in parallel and `own_passes` times in succession (parallel scheduled sampling, arXiv 1906.04331).
    true_codes: number of codes at the start of an image that are never replaced. They decide what the text leaves open,
    such as the background; independently sampled ones would teach the model to ignore them.
    pool: number of images that are encoded once, before the first step, and then used in shuffled epochs; 0 encodes new
    images in every step.
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
    """An infinite sequence of shuffled epochs of images as codes, int16 or int32 (codes,), with captions."""

    def __init__(self, codes: np.ndarray, captions: list[str]) -> None:
        self.codes, self.captions = codes, captions

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        place = shuffled(index, len(self.codes))
        return torch.from_numpy(self.codes[place]), self.captions[place]


def encode_pool(data: Dataset[Any], count: int, vqgan: VQModel, path: Path, workers: int, progress: bool) -> CodePool:
    """Encode the first `count` items of `data`, or load them from `path` if it holds the codes of the same VQGAN."""
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
    """Sample every code given the text and the input codes before it, all in parallel: int64, the shape of image_ids.

    Shapes as in `DalleTransformer.forward`. uniforms: a random number in [0, 1) for each code.
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
        # Captions of a pool repeat; without a cache the GPU would wait for the tokenizer.
        self.encode_text = lru_cache(maxsize=1 << 18)(partial(text_encoder, truncate=True))
        self.frozen = [vqgan]  # in a list, so that it is not a submodule

    def compile_parts(self) -> None:
        self.loss = torch.compile(self.model.loss, dynamic=False)
        self.redraw = torch.compile(redraw, dynamic=False)

    def make_data(self, config: TrainingConfig, folder: Path, device: torch.device, progress: bool) -> Dataset[Any]:
        data, vqgan = super().make_data(config, folder, device, progress), self.frozen[0].to(device)
        if not self.settings.pool:
            return data
        return encode_pool(data, self.settings.pool, vqgan, folder / "codes.npz", config.workers, progress)

    def forward(self, images: Tensor, captions: list[str], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """images: float (batch, 3, side, side) in [0, 1], or codes, int16 or int32 (batch, codes)."""
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
            torch.clear_autocast_cache()  # it may hold weights cast without gradients
        return self.loss(text_ids, image_ids, seen), {"wrong": (seen != image_ids).float().mean()}

    def sample(self, images: Tensor, captions: list[str]) -> Image:
        """For each caption the image, its decoded codes, and two samples."""
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
