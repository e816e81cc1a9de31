"""Train a CLIP of open_clip (arXiv 2103.00020) on images and captions, with captions that are wrong in one word."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL.Image import Image
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from dall3.images import make_grid, to_pil
from dall3.models.clip import CLIP, CLIPConfig
from dall3.models.vqgan import VQModel
from dall3.scenes.captions import with_articles
from dall3.scenes.world import Batch
from dall3.text import Tokenizer
from dall3.training.part import Part, Rows, compact, seed_of
from dall3.training.processes import Processes
from dall3.training.vqgan import encode
from dall3.weights.folder import load_part

DECODED_AT_ONCE = 64  # images


@dataclass(frozen=True)
class CLIPLoss:
    """Settings of the loss.

    decoded: fraction of a batch that is encoded and decoded by the VQGAN, once it exists, because CLIP ranks decoded
    images. cut_out: minimum side of the random crop of a batch, relative to the image, because guidance scores
    cut-outs. noise: maximum standard deviation of the added noise.
    swaps: groups of words for hard negatives (arXiv 2210.01936). negatives: number of hard negatives per caption that
    contains such a word. Each has one word replaced by another of its group. max_scale: upper bound of the learned
    logit scale.
    """

    decoded: float = 0.3
    cut_out: float = 0.7
    noise: float = 0.1
    swaps: tuple[tuple[str, ...], ...] = ()
    negatives: int = 2
    max_scale: float = 30.0

    def __post_init__(self) -> None:
        if self.negatives < 1:
            raise ValueError(f"negatives={self.negatives}; expected a whole number from 1")
        if self.max_scale < 1:
            raise ValueError(f"max_scale={self.max_scale}; expected a number from 1")
        if odd := [group for group in self.swaps if isinstance(group, str) or len(set(group)) < 2]:
            raise ValueError(f"swaps has {odd[0]!r}; expected lists of two words or more")


def swap_word(text: str, groups: Sequence[Sequence[str]], chance: random.Random) -> str | None:
    """Replace all occurrences of a word by another one of its group. Returns None if the text has no such word."""
    letters = ((word, group) for group in groups for word in group if word in text)  # a fast filter: few words occur
    found = [(word, group) for word, group in letters if re.search(rf"\b{re.escape(word)}\b", text)]
    if not found:
        return None
    word, group = chance.choice(found)
    other = chance.choice([w for w in group if w != word])
    return with_articles(re.sub(rf"\b{re.escape(word)}\b", other, text))


class CLIPPart(Part):
    """Trains a `CLIP`. If the VQGAN exists, some of the images are replaced by its reconstructions."""

    model: CLIP

    def __init__(
        self, config: CLIPConfig, loss: CLIPLoss, tokenizer: Tokenizer, vqgan: VQModel | None, processes: Processes
    ) -> None:
        super().__init__(processes)
        self.settings, self.model = loss, CLIP.from_config(config, tokenizer)
        self.model.model.requires_grad_(True).train()  # train mode updates batch normalization's statistics
        self.frozen = [] if vqgan is None else [vqgan.to(processes.device).requires_grad_(False)]

    def load_finished_parts(self, out: Path) -> None:
        if not self.frozen and (out / "runs/vqgan/finished").exists():
            self.frozen = [load_part(out / "vqgan").to(self.processes.device).requires_grad_(False)]

    def rows(self, batch: Batch, numbers: Sequence[int]) -> Rows:
        s, wrong = self.settings, []
        for number, caption in zip(numbers, batch.captions, strict=True):
            chance = random.Random(seed_of("swap", number))
            wrong += [swap_word(caption, s.swaps, chance) or "" for _ in range(s.negatives)]
        tokens = self.model.tokenize([*batch.captions, *wrong]).to(batch.images.device)
        tokens = compact(tokens, self.model.model.vocab_size)
        text, negatives = tokens.split((len(batch.captions), len(wrong)))
        swapped = torch.tensor([bool(text) for text in wrong[:: s.negatives]], device=tokens.device)
        negatives = negatives.unflatten(0, (-1, s.negatives))
        return {"images": batch.images, "text": text, "negatives": negatives, "swapped": swapped}

    def forward(self, rows: Rows, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        processes, network, device = self.processes, self.model.model, self.processes.device
        images = self.augment(rows["images"].float() / 255)
        tokens, negatives = rows["text"].long(), rows["negatives"].long()
        # On a CPU the backward pass of fused attention takes twice as long for such short sequences.
        with sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext():
            image = F.normalize(network.encode_image((images - self.model.mean) / self.model.std).float(), dim=-1)
            texts = F.normalize(network.encode_text(torch.cat((tokens, negatives.flatten(0, 1)))).float(), dim=-1)
        with torch.autocast(device.type, enabled=False):
            text, wrong = texts.split((len(tokens), negatives.shape[0] * negatives.shape[1]))
            scale = network.logit_scale.exp()
            all_images, all_texts = (processes.gather_with_gradients(embeds) for embeds in (image, text))
            all_tokens, answers = processes.gather(tokens), torch.arange(len(all_images), device=device)
            # Images with the same caption are not negatives of each other.
            alike = (all_tokens[:, None] == all_tokens[None]).all(dim=-1) & (answers[:, None] != answers)
            logits = (scale * all_images @ all_texts.T).masked_fill(alike, -1e4)
            loss = (F.cross_entropy(logits, answers) + F.cross_entropy(logits.T, answers)) / 2
            right = (logits.argmax(dim=1) == answers).float().mean()
            choices = torch.cat((text[:, None], wrong.unflatten(0, negatives.shape[:2])), dim=1)
            scores = scale * (choices @ image[:, :, None])[..., 0]
            swapped, first = rows["swapped"].float(), torch.zeros(len(scores), dtype=torch.int64, device=device)
            loss = loss + (F.cross_entropy(scores, first, reduction="none") * swapped).mean()
            apart = ((scores.argmax(dim=1) == 0) * swapped).sum() / swapped.sum().clamp(min=1)
        return loss, {"accuracy": right, "told_apart": apart}

    @torch.no_grad()
    def augment(self, images: Tensor) -> Tensor:
        """Decode some of the images (n, 3, side, side) from their codes, crop all, resize them, and add noise."""
        s, device, side = self.settings, images.device, images.shape[-1]
        if self.frozen:
            first = self.processes.rank * len(images)
            numbers = range(first, first + len(images))
            chosen = [i for i, n in enumerate(numbers) if int((n + 1) * s.decoded) > int(n * s.decoded)]
            images = images.clone()
            for places in torch.tensor(chosen, dtype=torch.int64).split(DECODED_AT_ONCE):
                part = images[places.to(device)]
                images[places.to(device)] = self.frozen[0].decode(encode(self.frozen[0], part)).float()
        cut = min(max(round(side * (s.cut_out + (1 - s.cut_out) * float(torch.rand(()).sqrt())) / 8) * 8, 8), side)
        top, left = (int(n) for n in torch.randint(side - cut + 1, (2,)))
        images = images[..., top : top + cut, left : left + cut]
        images = F.interpolate(images, self.model.image_size, mode="bilinear", antialias=True)
        strength = s.noise * self.random(torch.rand, len(images), 1, 1, 1)
        noise = self.random(torch.randn, *images.shape)
        return (images + noise * strength).contiguous(memory_format=torch.channels_last)  # faster convolutions

    def after_step(self) -> None:
        with torch.no_grad():
            self.model.model.logit_scale.clamp_(max=math.log(self.settings.max_scale))

    def sheet(self, model: nn.Module, rows: Rows) -> Image:
        """Each image, followed by the three images with the highest similarity to its caption."""
        assert isinstance(model, CLIP)
        images = F.interpolate(rows["images"].float() / 255, model.image_size, mode="bilinear", antialias=True)
        image = F.normalize(model.embed_images(images), dim=-1)
        text = F.normalize(model.model.encode_text(rows["text"].long()).float(), dim=-1)
        best = (text @ image.T).topk(3).indices
        lines = [to_pil(torch.cat((images[i : i + 1], images[best[i]]))) for i in range(len(images))]
        return make_grid([a + b for a, b in zip(lines[0::2], lines[1::2], strict=True)], 96)
