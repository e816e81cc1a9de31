"""Training the DALL·E transformer on captions and the codes of a trained VQGAN (arXiv 2102.12092)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from PIL.Image import Image
from torch import Tensor

from dall3.models.transformer import DalleTransformer, TransformerConfig
from dall3.models.vqgan import VQModel
from dall3.output import make_grid, to_pil
from dall3.sampling import Sampling, candidate_uniforms, draw_image_tokens
from dall3.text import TextEncoder
from dall3.training.loop import Task
from dall3.weights import save_part


@dataclass(frozen=True)
class TransformerTraining:
    """null_text: the share of captions that are left out, so that classifier-free guidance has its other half."""

    null_text: float = 0.1


class TransformerTask(Task):
    def __init__(
        self, config: TransformerConfig, training: TransformerTraining, vqgan: VQModel, text_encoder: TextEncoder
    ) -> None:
        super().__init__()
        self.settings, self.model = training, DalleTransformer(config)
        self.loss = self.model.loss
        self.encode_text = text_encoder
        self.frozen = [vqgan]  # in a list: not a part of what is trained and saved

    def compile_parts(self) -> None:
        self.loss = torch.compile(self.model.loss, dynamic=False)

    def forward(self, images: Tensor, captions: list[str], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            image_ids = self.frozen[0].to(images.device).encode(images)
        text_ids = torch.stack([self.encode_text(caption, truncate=True) for caption in captions]).to(images.device)
        dropped = torch.rand(len(text_ids), 1, device=images.device) < self.settings.null_text
        loss = self.loss(text_ids.masked_fill(dropped, 0), image_ids)
        return loss, {}

    def sample(self, images: Tensor, captions: list[str]) -> Image:
        """For every caption the picture, its codes decoded, and two draws."""
        vqgan, model = self.frozen[0].to(images.device), self.model
        text_ids = [self.encode_text(caption, truncate=True).to(images.device) for caption in captions[:8]]
        uniforms = candidate_uniforms(0, range(2), model.config.image_seq_len).to(images.device)
        settings = Sampling(top_p=0.9)
        drawn = [draw_image_tokens(model, ids, uniforms, settings, 2, lambda n: None) for ids in text_ids]
        rows = [images[:8], vqgan.decode(vqgan.encode(images[:8]))]
        rows += [vqgan.decode(torch.stack(tokens)) for tokens in zip(*drawn, strict=True)]
        return make_grid([to_pil(row) for row in rows], images.shape[-1])

    def export(self, folder: Path) -> None:
        save_part(self.model, folder)
