"""The CLIP that ranks and guides (arXiv 2103.00020), with hard negatives: captions with one word exchanged."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL.Image import Image
from torch import Tensor, nn

from dall3.images import make_grid, to_pil
from dall3.models.clip import CLIP, CLIPConfig
from dall3.models.vqgan import VQModel
from dall3.scenes.world import Batch
from dall3.text import Tokenizer
from dall3.training.clip import swap_word
from dall3.training.family.loop import Part
from dall3.training.family.pool import Rows
from dall3.training.family.vqgan import encode
from dall3.weights.folder import load_part, save_part


@dataclass(frozen=True)
class CLIPLoss:
    """decoded: the share of a batch seen as the VQGAN decodes it, once there is one, since such pictures are to be
    ranked. cut_out: the smallest share of a picture's side that a batch is cut to, since guidance looks at cut-outs.
    noise: the largest standard deviation of noise added. swaps: groups of words; captions that have some get
    `negatives` wrong ones, each with one word exchanged for another of its group (arXiv 2210.01936). max_scale: the
    most that the learned scale of the similarities grows to.
    """

    decoded: float = 0.3
    cut_out: float = 0.7
    noise: float = 0.1
    swaps: tuple[tuple[str, ...], ...] = ()
    negatives: int = 2
    max_scale: float = 30.0


class CLIPPart(Part):
    model: CLIP

    def __init__(self, config: CLIPConfig, loss: CLIPLoss, tokenizer: Tokenizer, device: torch.device) -> None:
        super().__init__()
        self.settings, self.model = loss, CLIP.from_config(config, tokenizer)
        self.model.model.requires_grad_(True).train()  # a convolutional tower's normalisation gathers its statistics
        self.frozen: list[VQModel] = []
        self.chance = random.Random(0)

    def look_for(self, out: Path) -> None:
        if not self.frozen and (out / "runs/vqgan/finished").exists():
            self.frozen = [load_part(out / "vqgan").to(self.model.mean.device).requires_grad_(False)]

    def rows(self, batch: Batch) -> Rows:
        device, s, wrong = batch.pictures.device, self.settings, []
        for caption in batch.captions:
            wrong += [swap_word(caption, s.swaps, self.chance) or "" for _ in range(s.negatives)]
        tokens = self.model.tokenize([*batch.captions, *wrong]).to(device, torch.int32)
        text, negatives = tokens.split((len(batch.captions), len(wrong)))
        has_negatives = torch.tensor([bool(text) for text in wrong[:: s.negatives]], device=device)
        negatives = negatives.unflatten(0, (-1, s.negatives))
        return {"pictures": batch.pictures, "text": text, "negatives": negatives, "swapped": has_negatives}

    def forward(self, rows: Rows, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        s, images = self.settings, rows["pictures"].float() / 255
        device, side = images.device, images.shape[-1]
        with torch.no_grad():
            if self.frozen:
                count = round(s.decoded * len(images))
                parts = [self.frozen[0].decode(encode(self.frozen[0], x)) for x in images[:count].split(64)]
                images = torch.cat((*(part.float() for part in parts), images[count:]))
            cut = round(side * (s.cut_out + (1 - s.cut_out) * float(torch.rand(()).sqrt())) / 8) * 8
            top, left = (int(n) for n in torch.randint(side - cut + 1, (2,)))
            images = images[..., top : top + cut, left : left + cut]
            images = F.interpolate(images, self.model.image_size, mode="bilinear", antialias=True)
            strength = s.noise * torch.rand(len(images), 1, 1, 1, device=device)
            images = (images + torch.randn_like(images) * strength).contiguous(memory_format=torch.channels_last)
        network = self.model.model
        picture = F.normalize(network.encode_image((images - self.model.mean) / self.model.std).float(), dim=-1)
        tokens, negatives = rows["text"].long(), rows["negatives"].long()
        texts = F.normalize(network.encode_text(torch.cat((tokens, negatives.flatten(0, 1)))).float(), dim=-1)
        with torch.autocast(device.type, enabled=False):
            text, wrong = texts.split((len(tokens), negatives.shape[0] * negatives.shape[1]))
            scale = network.logit_scale.exp()
            answers = torch.arange(len(images), device=device)
            # Two pictures of one caption are no negatives of each other.
            alike = (tokens[:, None] == tokens[None]).all(dim=-1) & (answers[:, None] != answers)
            logits = (scale * picture @ text.T).masked_fill(alike, -1e4)
            loss = (F.cross_entropy(logits, answers) + F.cross_entropy(logits.T, answers)) / 2
            right = (logits.argmax(dim=1) == answers).float().mean()
            choices = torch.cat((text[:, None], wrong.unflatten(0, negatives.shape[:2])), dim=1)
            told = scale * (choices @ picture[:, :, None])[..., 0]
            swapped = rows["swapped"].float()
            loss = loss + (F.cross_entropy(told, torch.zeros_like(answers), reduction="none") * swapped).mean()
            apart = ((told.argmax(dim=1) == 0) * swapped).sum() / swapped.sum().clamp(min=1)
        return loss, {"accuracy": right, "told_apart": apart}

    def after_step(self) -> None:
        with torch.no_grad():
            self.model.model.logit_scale.clamp_(max=math.log(self.settings.max_scale))

    def export(self, model: nn.Module, folder: Path) -> None:
        save_part(model, folder)

    @torch.no_grad()
    def sheet(self, model: nn.Module, rows: Rows) -> Image:
        """Every picture, and beside it the three that its caption likes best."""
        assert isinstance(model, CLIP)
        model.eval()
        images = F.interpolate(rows["pictures"].float() / 255, model.image_size, mode="bilinear", antialias=True)
        picture = F.normalize(model.embed_images(images), dim=-1)
        text = F.normalize(model.model.encode_text(rows["text"].long()).float(), dim=-1)
        best = (text @ picture.T).topk(3).indices
        lines = [to_pil(torch.cat((images[i : i + 1], images[best[i]]))) for i in range(len(images))]
        return make_grid([a + b for a, b in zip(lines[0::2], lines[1::2], strict=True)], 96)
