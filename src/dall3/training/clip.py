"""Train a CLIP of open_clip (arXiv 2103.00020) on images and captions."""

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
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dall3.images import make_grid, to_pil
from dall3.models.clip import CLIP, CLIPConfig
from dall3.models.vqgan import VQModel
from dall3.scenes.captions import with_articles
from dall3.text import Tokenizer
from dall3.training.loop import Task, seed_of
from dall3.weights.folder import save_part


@dataclass(frozen=True)
class CLIPTraining:
    """Settings of the loss.

    decoded: fraction of the images that are encoded and decoded by the VQGAN, because CLIP ranks decoded images.
    cut_out: minimum side of the random crop of a batch, relative to the image, because guidance scores cut-outs.
    noise: maximum standard deviation of the added noise.
    swaps: groups of words for hard negatives (arXiv 2210.01936). negatives: number of hard negatives per caption that
    contains such a word. Each has one word replaced by another of its group.
    max_scale: upper bound of the learned logit scale; CLIP's is 100. A lower bound requires a larger margin between
    right and wrong captions, so that scores of images for one caption are more informative.
    """

    decoded: float = 0.15
    cut_out: float = 0.6
    noise: float = 0.1
    swaps: tuple[tuple[str, ...], ...] = ()
    negatives: int = 2
    max_scale: float = 100.0

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


class CLIPTask(Task):
    def __init__(
        self, config: CLIPConfig, training: CLIPTraining, tokenizer: Tokenizer, vqgan: VQModel | None = None
    ) -> None:
        from accelerate import PartialState
        from open_clip.loss import ClipLoss

        super().__init__()
        self.settings, self.model = training, CLIP.from_config(config, tokenizer)
        self.model.model.requires_grad_(True).train()  # train mode updates batch normalization's statistics
        self.model.to(memory_format=torch.channels_last)  # faster convolutions
        state = PartialState()
        # Each process gathers the embeddings of all, so that the loss is that of the whole batch.
        self.contrast = ClipLoss(gather_with_grad=True, rank=state.process_index, world_size=state.num_processes)
        self.frozen = [vqgan]

    def forward(self, images: Tensor, captions: list[str], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        s, side = self.settings, images.shape[-1]
        vqgan = self.frozen[0].to(images.device) if self.frozen[0] is not None else None
        with torch.no_grad():
            if vqgan is not None:
                chosen = [i for i, n in enumerate(self.items) if int((n + 1) * s.decoded) > int(n * s.decoded)]
                images = images.clone()
                for i in range(0, len(chosen), 16):
                    part = chosen[i : i + 16]
                    images[part] = vqgan.decode(vqgan.encode(images[part])).to(images.dtype)
            cut = round(side * (s.cut_out + (1 - s.cut_out) * float(torch.rand(()).sqrt())))
            top, left = (int(torch.randint(side - cut + 1, ())) for _ in range(2))
            images = images[..., top : top + cut, left : left + cut]
            images = F.interpolate(images, self.model.image_size, mode="bilinear", antialias=True)
            device, shape = images.device, images.shape[1:]
            noise = self.per_item(lambda generator: torch.randn(shape, generator=generator, device=device), device)
            images = images + noise * (s.noise * torch.rand(()).to(device))
        # On a CPU the backward pass of fused attention takes twice as long for such short sequences.
        with sdpa_kernel(SDPBackend.MATH) if images.device.type == "cpu" else nullcontext():
            places, wrong = self.hard_negatives(captions)
            picture = F.normalize(self.model.embed_images(images), dim=-1)
            texts = F.normalize(self.model.embed_text([*captions, *wrong]), dim=-1)
            text, hard = texts.split((len(captions), len(wrong)))
        scale = self.model.model.logit_scale.exp()
        with torch.autocast(device.type, enabled=False):  # half precision cannot tell close similarities apart
            loss = self.contrast(picture, text, scale)
            right = (picture @ text.T).argmax(dim=1) == torch.arange(len(images), device=device)
            figures = {"accuracy": right.float().mean()}
            if s.swaps:
                choices = torch.cat((text[places, None], hard.unflatten(0, (len(places), s.negatives))), dim=1)
                logits = scale * (choices @ picture[places, :, None])[..., 0]
                answers = torch.zeros(len(places), dtype=torch.int64, device=device)
                loss = loss + F.cross_entropy(logits, answers, reduction="sum") / len(images)
                figures["told apart"] = (logits.argmax(dim=1) == 0).sum() / max(len(places), 1)
        return loss, figures

    def hard_negatives(self, captions: list[str]) -> tuple[list[int], list[str]]:
        """The indices of captions with words to swap, and `negatives` wrong captions for each, in sequence."""
        places, wrong = [], []
        for place, (number, text) in enumerate(zip(self.items, captions, strict=True)):
            chance = random.Random(seed_of(self.seed, "swap", number))
            swapped = [swap_word(text, self.settings.swaps, chance) for _ in range(self.settings.negatives)]
            found = [other for other in swapped if other is not None]
            places += [place] if found else []
            wrong += found
        return places, wrong

    def after_step(self) -> None:
        with torch.no_grad():
            self.model.model.logit_scale.clamp_(max=math.log(self.settings.max_scale))

    def sample(self, images: Tensor, captions: list[str]) -> Image:
        """Each image of the batch, followed by the three images with the highest similarity to its caption."""
        small = F.interpolate(images, self.model.image_size, mode="bilinear", antialias=True)
        picture = F.normalize(self.model.embed_images(small), dim=-1)
        text = F.normalize(self.model.embed_text(captions), dim=-1)
        best = (text @ picture.T).topk(3).indices
        rows = [to_pil(torch.cat((images[i : i + 1], images[best[i]]))) for i in range(len(images))]
        return make_grid([left + right for left, right in zip(rows[0::2], rows[1::2], strict=True)], 96)

    def export(self, folder: Path) -> None:
        save_part(self.model, folder)
