"""Train the DALL·E transformer on captions and the codes of a trained VQGAN (arXiv 2102.12092)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

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
from dall3.training.part import Part, Rows, compact
from dall3.training.processes import Processes
from dall3.training.vqgan import encode

ENCODED_AT_ONCE = 256  # images


@dataclass(frozen=True)
class TransformerLoss:
    """Settings of the loss.

    null_text: fraction of captions that are replaced by the empty text, for classifier-free guidance. wrong_codes:
    maximum fraction of an image's input codes that are replaced by those of another image. In sampling, the input
    contains errors too, and the text should outweigh them.
    """

    null_text: float = 0.1
    wrong_codes: float = 0.1


class TransformerPart(Part):
    """Trains a `DalleTransformer` on the codes of a trained VQGAN."""

    model: DalleTransformer

    def __init__(
        self,
        config: TransformerConfig,
        loss: TransformerLoss,
        vqgan: VQModel,
        encoder: TextEncoder,
        processes: Processes,
    ) -> None:
        super().__init__(processes)
        self.settings, self.model, self.encoder = loss, DalleTransformer(config), encoder
        self.frozen = [vqgan.to(processes.device).eval().requires_grad_(False)]  # in a list: not a submodule
        self.loss: Callable[..., Tensor] = self.model.loss

    def compile_parts(self) -> None:
        self.loss = torch.compile(self.model.loss, dynamic=False)

    def run_eagerly(self) -> None:
        self.loss = self.model.loss

    def rows(self, batch: Batch, numbers: Sequence[int]) -> Rows:
        config, device = self.model.config, batch.images.device
        empty = torch.zeros(config.text_seq_len, dtype=torch.int64)
        text = [self.encoder(caption, truncate=True) if caption.strip() else empty for caption in batch.captions]
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            parts = [encode(self.frozen[0], part.float() / 255) for part in batch.images.split(ENCODED_AT_ONCE)]
        return {
            "codes": compact(torch.cat(parts), config.num_image_tokens),
            "text": compact(torch.stack(text).to(device), config.num_text_tokens),
        }

    def forward(self, rows: Rows, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        s, codes, text = self.settings, rows["codes"].long(), rows["text"].long()
        text = text.masked_fill(self.random(torch.rand, len(text), 1) < s.null_text, 0)
        most = self.random(torch.rand, len(text), 1) * s.wrong_codes
        others = self.processes.own(self.processes.gather(codes).roll(1, 0))
        seen = torch.where(self.random(torch.rand, *codes.shape) < most, others, codes)
        return self.loss(text, codes, seen), {}

    def sheet(self, model: nn.Module, rows: Rows) -> Image:
        """The decoded codes of each image, and two samples for its caption."""
        assert isinstance(model, DalleTransformer)
        codes, text = rows["codes"][:3].long(), rows["text"][:3].long()
        uniforms = candidate_uniforms(0, range(2), model.config.image_seq_len).to(codes.device)
        drawn = torch.stack([draw_image_tokens(model, ids, uniforms, Sampling(top_p=0.9)) for ids in text])
        lines = [self.frozen[0].decode(ids) for ids in (codes, drawn[:, 0], drawn[:, 1])]
        return make_grid([to_pil(line) for line in lines], lines[0].shape[-1])
