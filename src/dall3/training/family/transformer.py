"""The transformer: captions and the codes of a trained VQGAN (arXiv 2102.12092)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL.Image import Image
from torch import Tensor, nn

from dall3.images import make_grid, to_pil
from dall3.models.transformer import DalleTransformer, TransformerConfig
from dall3.models.vqgan import VQModel
from dall3.scenes.world import Batch
from dall3.text import TextEncoder
from dall3.tokens.decoding import draw_image_tokens
from dall3.tokens.sampling import Sampling
from dall3.tokens.seeds import candidate_uniforms
from dall3.training.family.loop import Part
from dall3.training.family.pool import Rows
from dall3.training.family.vqgan import encode
from dall3.weights.folder import save_part


@dataclass(frozen=True)
class TransformerLoss:
    """null_text: the share of captions that are left out, so that classifier-free guidance has its other half.
    wrong_codes: up to this share of a picture's codes is shown as another picture's: when the transformer draws, its
    own are not all right either, and the text has to outweigh them.
    """

    null_text: float = 0.1
    wrong_codes: float = 0.1


class TransformerPart(Part):
    model: DalleTransformer

    def __init__(
        self,
        config: TransformerConfig,
        loss: TransformerLoss,
        vqgan: VQModel,
        encoder: TextEncoder,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.settings, self.model = loss, DalleTransformer(config)
        self.frozen, self.encoder = [vqgan.to(device).eval().requires_grad_(False)], encoder
        self.loss: Callable[..., Tensor] = self.model.loss

    def compile_parts(self) -> None:
        self.loss = torch.compile(self.model.loss, dynamic=False)

    def run_eagerly(self) -> None:
        self.loss = self.model.loss

    def rows(self, batch: Batch) -> Rows:
        text = torch.stack([self.encoder(caption, truncate=True) for caption in batch.captions])
        device = batch.pictures.device
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            parts = [encode(self.frozen[0], part.float() / 255) for part in batch.pictures.split(256)]
        return {"codes": torch.cat(parts).to(torch.int16), "text": text.to(device, torch.int16)}

    def forward(self, rows: Rows, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        s, codes, text = self.settings, rows["codes"].long(), rows["text"].long()
        count, device = codes.shape, codes.device
        text = text.masked_fill(torch.rand(len(text), 1, device=device) < s.null_text, 0)
        most = torch.rand(len(text), 1, device=device) * s.wrong_codes
        seen = torch.where(torch.rand(count, device=device) < most, codes.roll(1, 0), codes)
        return self.loss(text, codes, seen), {}

    def export(self, model: nn.Module, folder: Path) -> None:
        save_part(model, folder)

    @torch.no_grad()
    def sheet(self, model: nn.Module, rows: Rows) -> Image:
        """Pictures by their codes, and two draws by the caption of each."""
        assert isinstance(model, DalleTransformer)
        codes, text = rows["codes"][:3].long(), rows["text"][:3].long()
        uniforms = candidate_uniforms(0, range(2), model.config.image_seq_len).to(codes.device)
        drawn = torch.stack([draw_image_tokens(model, ids, uniforms, Sampling(top_p=0.9)) for ids in text])
        lines = [self.frozen[0].decode(ids) for ids in (codes, drawn[:, 0], drawn[:, 1])]  # type: ignore[operator]
        return make_grid([to_pil(line) for line in lines], lines[0].shape[-1])
