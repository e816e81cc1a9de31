"""CLIP (arXiv 2103.00020): a thin wrapper around open_clip that embeds texts and images and scores images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from dall3.text import Tokenizer


VISION = ("image_size", "patch_size", "width", "head_width", "layers", "mlp_ratio")
INTERPOLATIONS = ("bicubic", "bilinear")
TEXT = ("context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio")
TOKENIZERS = ("pipeline", "clip", "ruclip")
RUCLIP_START, RUCLIP_END = 2, 3


@dataclass(frozen=True)
class CLIPConfig:
    """Configuration of a `CLIP`, with open_clip's names.

    tokenizer: "pipeline" (the transformer's tokenizer, with a start and an end token after its vocabulary), "clip"
    (OpenAI's), or "ruclip" (ruCLIP's own, with its rules). mean, std: normalisation of the RGB channels; None for
    OpenAI's values. interpolation: "bicubic" or "bilinear", the resizing of images to the network's input size.
    """

    embed_dim: int
    vision_cfg: dict[str, Any]
    text_cfg: dict[str, Any]
    quick_gelu: bool = False
    tokenizer: str = "pipeline"
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    interpolation: str = "bicubic"


class PromptTokenizer:
    """Encode texts for open_clip's text transformer: start token, ids, end token; truncated and padded with 0.

    The start and end tokens follow the ids of the tokenizer. The end token has the highest id, because open_clip reads
    the text feature at the highest id of a row.
    """

    def __init__(self, tokenizer: Tokenizer, context_length: int) -> None:
        self.tokenizer, self.context_length = tokenizer, context_length

    def __call__(self, texts: list[str]) -> Tensor:
        """Return ids, int64 (texts, context_length)."""
        start = self.tokenizer.vocab_size
        return encode_between(self.tokenizer, texts, start, start + 1, self.context_length)


class RuclipTokenizer:
    """Encode texts as ruCLIP's `RuCLIPProcessor` does: 2, ids of the lower-cased text, 3; truncated and padded with 0.

    end: id of the end token, the highest id, because open_clip reads the text feature at the highest id of a row. The
    embedding has a copy of row 3 at this id.
    """

    def __init__(self, tokenizer: Tokenizer, context_length: int, end: int) -> None:
        self.tokenizer, self.context_length, self.end = tokenizer, context_length, end

    def __call__(self, texts: list[str]) -> Tensor:
        """Return ids, int64 (texts, context_length)."""
        return encode_between(self.tokenizer, texts, RUCLIP_START, self.end, self.context_length)


def encode_between(tokenizer: Tokenizer, texts: list[str], start: int, end: int, length: int) -> Tensor:
    """Ids of lower-cased texts between a start and an end token, truncated and padded with 0: int64 (texts, length)."""
    rows = torch.zeros(len(texts), length, dtype=torch.int64)
    for row, text in zip(rows, texts, strict=True):
        ids = [start, *tokenizer.encode(text.lower())[: length - 2], end]
        row[: len(ids)] = torch.tensor(ids)
    return rows


class CLIP(nn.Module):
    """An open_clip model with its tokenizer, input size and normalisation.

    model: the open_clip network; its gradients are switched off. tokenize: texts to ids, int64 (texts, context_length).
    image_size: side of the input in pixels. mean, std, interpolation: as in `CLIPConfig`.

    >>> from dall3.weights import load_clip
    >>> clip = load_clip("ViT-B-16.pt")  # doctest: +SKIP
    >>> clip.score(images, clip.embed_text(["a red cube"]))  # doctest: +SKIP
    """

    mean: Tensor
    std: Tensor
    config: CLIPConfig | None = None  # None for an open_clip model that `CLIPConfig` cannot describe

    def __init__(
        self,
        model: nn.Module,
        tokenize: Callable[[list[str]], Tensor],
        image_size: int,
        mean: Any = None,
        std: Any = None,
        interpolation: str | None = None,
    ) -> None:
        from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

        super().__init__()
        self.model: Any = model.requires_grad_(False)
        self.tokenize, self.image_size, self.interpolation = tokenize, image_size, interpolation or "bicubic"
        for name, values in (("mean", mean or OPENAI_DATASET_MEAN), ("std", std or OPENAI_DATASET_STD)):
            channels = torch.tensor(values, device="cpu")[:, None, None]  # on the CPU even under the meta device
            self.register_buffer(name, channels, persistent=False)
        self.eval()

    @classmethod
    def from_config(cls, config: CLIPConfig, tokenizer: Tokenizer | None = None) -> CLIP:
        """Build an untrained model.

        tokenizer: required unless `config.tokenizer` is "clip". Raises ValueError for an unknown setting, and for a
        tokenizer that is missing or larger than the vocabulary.
        """
        from open_clip.model import CLIP as Network
        from open_clip.model import CLIPTextCfg, CLIPVisionCfg
        from open_clip.tokenizer import SimpleTokenizer

        # open_clip's other settings can name external models, which it would download.
        for part, known in ((config.vision_cfg, VISION), (config.text_cfg, TEXT)):
            odd = [name for name, value in part.items() if name not in known or isinstance(value, str | dict)]
            if odd:
                raise ValueError(f"CLIP has the setting {odd[0]}; expected some of {', '.join(known)}")
        if config.interpolation not in INTERPOLATIONS:
            raise ValueError(
                f"CLIP's interpolation is '{config.interpolation}'; expected {' or '.join(INTERPOLATIONS)}"
            )
        text = CLIPTextCfg(**config.text_cfg)
        if config.tokenizer == "clip":
            tokenize: Any = SimpleTokenizer(context_length=text.context_length)
        elif config.tokenizer not in TOKENIZERS:
            raise ValueError(f"CLIP's tokenizer is '{config.tokenizer}'; expected one of {', '.join(TOKENIZERS)}")
        elif tokenizer is None:
            raise ValueError("a CLIP needs the tokenizer that it was trained with")
        else:
            is_ruclip = config.tokenizer == "ruclip"
            wanted = tokenizer.vocab_size + (1 if is_ruclip else 2)
            if text.vocab_size < wanted:
                raise ValueError(f"CLIP's vocab_size is {text.vocab_size}; the tokenizer needs {wanted}")
            if is_ruclip:
                tokenize = RuclipTokenizer(tokenizer, text.context_length, text.vocab_size - 1)
            else:
                tokenize = PromptTokenizer(tokenizer, text.context_length)
        vision = CLIPVisionCfg(**config.vision_cfg)
        model = Network(config.embed_dim, vision, text, quick_gelu=config.quick_gelu)
        shape = (text.context_length, text.context_length)
        causal = torch.full(shape, float("-inf"), device="cpu").triu(1)  # open_clip's has no data on the meta device
        model.register_buffer("attn_mask", causal, persistent=False)
        found = cls(model, tokenize, config.vision_cfg["image_size"], config.mean, config.std, config.interpolation)
        found.config = config
        return found

    @property
    def reads_russian(self) -> bool:
        """Whether this is ruCLIP."""
        return isinstance(self.tokenize, RuclipTokenizer)

    def embed_text(self, texts: list[str]) -> Tensor:
        """Embed texts: float32 (texts, embed_dim), not normalised. Long texts are truncated to the context length."""
        return self.model.encode_text(self.tokenize(texts).to(self.mean.device)).float()

    def embed_images(self, images: Tensor) -> Tensor:
        """Embed images, float (batch, 3, image_size, image_size) in [0, 1]: float32 (batch, embed_dim)."""
        return self.model.encode_image(((images - self.mean) / self.std).to(self.mean.dtype)).float()

    def preprocess(self, images: Tensor) -> Tensor:
        """Resize square images, float (batch, 3, side, side) in [0, 1], to (batch, 3, image_size, image_size).

        As in CLIP's preprocessing and upstream's generate.py, images are truncated to 8 bits, resized with
        antialiasing, and rounded to 8 bits again.
        """
        pixels, size = (images.float() * 255).floor(), (self.image_size, self.image_size)
        return F.interpolate(pixels, size, mode=self.interpolation, antialias=True).round().clamp(0, 255) / 255

    def score(self, images: Tensor, text: Tensor) -> Tensor:
        """Cosine similarity in [-1, 1], (batch,), of square images with a text.

        images: float (batch, 3, side, side) in [0, 1]. text: (1, embed_dim), from `embed_text`.
        """
        return F.cosine_similarity(self.embed_images(self.preprocess(images)), text)
