"""CLIP (arXiv 2103.00020): a thin layer over open_clip that embeds text, embeds pictures and scores them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CLIP(nn.Module):
    """One open_clip model with its tokenizer, its picture size and its normalisation."""

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        model: nn.Module,
        tokenize: Callable[[list[str]], Tensor],
        image_size: int,
        mean: Any = None,
        std: Any = None,
    ) -> None:
        from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

        super().__init__()
        self.model: Any = model.requires_grad_(False)
        self.tokenize, self.image_size = tokenize, image_size
        self.register_buffer("mean", torch.tensor(mean or OPENAI_DATASET_MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(std or OPENAI_DATASET_STD)[:, None, None], persistent=False)
        self.eval()

    def embed_text(self, texts: list[str]) -> Tensor:
        """Texts, cut at CLIP's length, to embeddings, float32 (texts, width)."""
        return self.model.encode_text(self.tokenize(texts).to(self.mean.device)).float()

    def embed_images(self, images: Tensor) -> Tensor:
        """Pictures, float (batch, 3, image_size, image_size) in [0, 1], to embeddings, float32 (batch, width)."""
        return self.model.encode_image(((images - self.mean) / self.std).to(self.mean.dtype)).float()

    def preprocess(self, images: Tensor) -> Tensor:
        """Square pictures, float (batch, 3, side, side) in [0, 1], to CLIP's size, as its own preprocessing and the
        seed's generate.py do: cut to 8 bits, then bicubic with antialiasing, in 8 bits again.
        """
        pixels, size = (images.float() * 255).floor(), (self.image_size, self.image_size)
        return F.interpolate(pixels, size, mode="bicubic", antialias=True).round().clamp(0, 255) / 255

    def score(self, images: Tensor, text: Tensor) -> Tensor:
        """Cosine similarity, (batch,), of square pictures, float (batch, 3, side, side) in [0, 1], to the embedding of
        a text, (1, width).
        """
        return F.cosine_similarity(self.embed_images(self.preprocess(images)), text)
