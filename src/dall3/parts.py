"""Parts: the networks of a pipeline, the device that they are on, offloading, fingerprints; encoding and decoding."""

from __future__ import annotations

import math
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from dall3.errors import require
from dall3.models.clip import CLIP
from dall3.models.discrete_vae import DiscreteVAE, OpenAIDiscreteVAE
from dall3.models.interface import ImageTokenTransformer
from dall3.models.layout import lay_out
from dall3.models.unet import UNet
from dall3.models.vqgan import VQModel, check_codes
from dall3.text import TextEncoder
from dall3.tokens.sampling import check_counts

if TYPE_CHECKING:
    from typing_extensions import Self

    from dall3.weights.folder import Origin

NETWORKS = ("transformer", "vqgan", "clip", "upsampler", "super_resolution")
BLOCK = 64  # words of 8 bytes that `signature` adds up to one

# Held while a CLIP is loaded and while parts are moved. A fork waits for it: in the child it is free, and nothing is
# half loaded.
LOCK = threading.RLock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=LOCK.acquire, after_in_parent=LOCK.release, after_in_child=LOCK.release)


class Parts:
    """The networks of a pipeline. Each can be replaced, or left out (None) where it is not used.

    clip: a CLIP, or a function that loads one when it is first needed.

    Raises ValueError for parts that do not fit each other.
    """

    held_clip: CLIP | Callable[[], CLIP] | None  # as it was given; `clip` loads it

    def __init__(
        self,
        *,
        text_encoder: TextEncoder | None = None,
        transformer: ImageTokenTransformer[Any] | None = None,
        vqgan: VQModel | DiscreteVAE | OpenAIDiscreteVAE | None = None,
        clip: CLIP | Callable[[], CLIP] | None = None,
        upsampler: UNet | None = None,
        super_resolution: UNet | None = None,
    ) -> None:
        if transformer is not None and vqgan is not None:
            check_codes(transformer.config, vqgan)
        if upsampler is not None and upsampler.config.embedding_dims and isinstance(vqgan, VQModel | DiscreteVAE):
            wanted, found = upsampler.config.embedding_dims[0], vqgan.codebook.shape[1]
            require(wanted == found, f"the upsampler takes code embeddings of {wanted}, the vqgan's have {found}")
        if upsampler is not None and upsampler.config.embedding_dims and isinstance(vqgan, OpenAIDiscreteVAE):
            raise ValueError("the upsampler is conditioned on code embeddings, and OpenAI's dVAE has none")
        if super_resolution is not None:
            require(super_resolution.config.super_resolution, "super_resolution takes no low-resolution picture")
        self.text_encoder, self.transformer, self.vqgan = text_encoder, transformer, vqgan
        self.clip = clip
        self.upsampler, self.super_resolution = upsampler, super_resolution
        self.offload_device: torch.device | None = None  # where parts work that otherwise wait on the CPU
        self.defaults: Mapping[str, Any] = {}  # settings of `Sampling` and `Denoising` that suit these weights
        self.origins: dict[str, Origin] = {}  # licence and source of the parts, where they are known
        self._hashes: dict[str, tuple[str, str]] = {}  # of the parts: signature, fingerprint
        self._users: Counter[str] = Counter()  # of the parts, while they are offloaded: who works with them now

    @property
    def clip(self) -> CLIP | None:
        """The CLIP that ranks and guides, loaded now where a function that loads it was given."""
        with LOCK, torch.inference_mode(False):  # guidance needs gradients later, whoever asks first
            if self.held_clip is not None and not isinstance(self.held_clip, nn.Module):
                self.clip = self.held_clip()
        return cast("CLIP | None", self.held_clip)

    @clip.setter
    def clip(self, clip: CLIP | Callable[[], CLIP] | None) -> None:
        if isinstance(clip, nn.Module):
            lay_out(clip)
        self.held_clip = clip

    def load_clip_early(self) -> None:
        """Load the CLIP in a thread of its own, while something else works."""

        def load() -> None:
            with suppress(Exception):  # said where it is needed
                self.clip  # noqa: B018

        if self.held_clip is not None and not isinstance(self.held_clip, nn.Module):
            threading.Thread(target=load, daemon=True).start()

    @property
    def components(self) -> dict[str, Any]:
        """The parts by name, None for those left out: `Dall3Pipeline(**pipe.components)` shares them.

        >>> from dall3 import Dall3Pipeline
        >>> pipe = Dall3Pipeline.from_pretrained()
        >>> Dall3Pipeline(**pipe.components | {"upsampler": None}).transformer is pipe.transformer
        True
        """
        return {name: self.held(name) for name in ("text_encoder", *NETWORKS)}

    @property
    def networks(self) -> dict[str, nn.Module]:
        """The networks that are there and loaded, by name."""
        held = {name: self.held(name) for name in NETWORKS}
        return {name: part for name, part in held.items() if isinstance(part, nn.Module)}

    @property
    def device(self) -> torch.device:
        """Device that the pipeline runs on; parts that replace others must be there too."""
        if self.offload_device is not None:
            return self.offload_device
        parameters = (parameter for part in self.networks.values() for parameter in part.parameters())
        return next((parameter.device for parameter in parameters), torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the weights."""
        parameters = (parameter for part in self.networks.values() for parameter in part.parameters())
        return next((p.dtype for p in parameters if p.is_floating_point()), torch.float32)

    def held(self, name: str) -> Any:
        """A part where it is, the function that loads it, or None."""
        return self.held_clip if name == "clip" else getattr(self, name)

    def require(self, name: str, purpose: str) -> Any:
        """A part where it is, or the function that loads it. Raises ValueError where there is none."""
        held = self.held(name)
        require(held is not None, f"this pipeline has no {name}, which {purpose} needs; give one when making it")
        return held

    @contextmanager
    def using(self, purpose: str, *names: str) -> Iterator[list[Any]]:
        """Parts to work with, loaded, and on the device while it lasts.

        Where parts are offloaded, the first user brings a part to the device and the last one, also after an error,
        back to the CPU. Raises ValueError for a part that there is not.
        """
        for name in names:
            self.require(name, purpose)
        found = [getattr(self, name) for name in names]
        offloaded = self.offload_device
        if offloaded is None:
            yield found
            return
        taken: list[tuple[str, Any]] = []
        try:
            with LOCK:
                for name, part in zip(names, found, strict=True):
                    self._users[name] += 1
                    taken.append((name, part))
                    if self._users[name] == 1 and isinstance(part, nn.Module):
                        part.to(offloaded)
            yield found
        finally:
            with LOCK:
                for name, part in taken:
                    self._users[name] -= 1
                    if self._users[name] == 0 and isinstance(part, nn.Module) and self.offload_device is not None:
                        part.to("cpu")

    def to(self, device: str | torch.device, dtype: torch.dtype | None = None) -> Self:
        """Move every part to a device, and to a precision if given: float32, float16, bfloat16. Returns itself.

        >>> from dall3 import Dall3Pipeline
        >>> Dall3Pipeline.from_pretrained().to("cpu", torch.bfloat16).device
        device(type='cpu')
        """
        self.offload_device = None
        layout = torch.contiguous_format if torch.device(device).type == "cpu" else torch.channels_last
        for part in self.networks.values():
            part.to(device, dtype)
            if isinstance(part, UNet | CLIP):
                lay_out(part)
            else:
                part.to(memory_format=layout)  # type: ignore[call-overload]
        if self.held_clip is not None and not isinstance(self.held_clip, nn.Module):
            self.held_clip = partial(load_and_move, self.held_clip, device, dtype)
        return self

    def enable_model_offload(self, device: str | torch.device, dtype: torch.dtype | None = None) -> Self:
        """Keep the parts on the CPU, and move each to a device only while it works: the device's memory need only hold
        the largest stage. dtype: as `to` has it. `to` ends it. Returns itself.

        >>> from dall3 import Dall3Pipeline
        >>> pipe = Dall3Pipeline.from_pretrained().enable_model_offload("cpu")  # "cuda", where there is a GPU
        >>> pipe("a red cube", seed=0, num_inference_steps=2, progress=False).images[0].size
        (256, 256)
        """
        self.to("cpu", dtype)
        self.offload_device = torch.device(device)
        return self

    def compile(self, **options: Any) -> Self:
        """Compile the decode step and the denoising step with torch.compile when they are first run, a graph each.

        options: of torch.compile, such as mode="max-autotune". Compiling takes a minute or so, and pays where many
        pictures follow; a new batch size or picture size is compiled anew. Returns itself.

        >>> from dall3 import Dall3Pipeline
        >>> pipe = Dall3Pipeline.from_pretrained().compile(backend="eager")
        >>> pipe.generate_tokens("a red cube", seed=0, progress=False).shape
        torch.Size([1, 256])
        """
        if self.transformer is not None:
            self.transformer.compile(**options)
        for unet in (self.upsampler, self.super_resolution):
            if unet is not None:
                unet.compile(**{"fullgraph": True, "dynamic": False} | options)
        return self

    def fingerprints(self) -> dict[str, str]:
        """A short hash of each part's weights, by the part's name; made anew only where the weights changed."""
        for name, part in self.networks.items():
            now = signature(part)
            if name not in self._hashes or self._hashes[name][0] != now:
                self._hashes[name] = now, fingerprint(part)
        return {name: self._hashes[name][1] for name in self.networks}

    @torch.no_grad()
    def encode(self, pictures: Tensor) -> Tensor:
        """Pictures, float (n, 3, height, width) in [0, 1], of a size that the vqgan takes, to tokens, int64 (n, side²).

        Raises ValueError without a vqgan.

        >>> from dall3 import Dall3Pipeline
        >>> Dall3Pipeline.from_pretrained().encode(torch.zeros(1, 3, 128, 128)).shape
        torch.Size([1, 256])
        """
        with self.using("encoding pictures", "vqgan") as [vqgan]:
            tokens: Tensor = vqgan.encode(pictures.to(self.device, next(vqgan.parameters()).dtype))
        return tokens

    @torch.no_grad()
    def decode_tokens(self, tokens: Tensor | np.ndarray, batch_size: int = 32, seamless: bool = False) -> Tensor:
        """Tokens, int64 (n, side²) or (side²,), to coarse pictures, float32 (n, 3, height, width) in [0, 1].

        seamless: the decoder sees beyond each edge what lies at the opposite one. Raises ValueError for tokens of
        another shape or outside the vocabulary, or without a vqgan.

        >>> from dall3 import Dall3Pipeline
        >>> Dall3Pipeline.from_pretrained().decode_tokens(torch.zeros(256, dtype=torch.int64)).shape
        torch.Size([1, 3, 128, 128])
        """
        check_counts(batch_size=batch_size)
        self.require("vqgan", "making pictures of tokens")
        tokens = self.check_tokens(tokens)
        side = math.isqrt(tokens.shape[1])
        margin = side // 4 if seamless else 0
        places = torch.arange(-margin, side + margin, device=tokens.device) % side
        wider = tokens.view(-1, side, side)[:, places][:, :, places].flatten(1)
        with self.using("making pictures of tokens", "vqgan") as [vqgan]:
            pictures = torch.cat([vqgan.decode(batch).float() for batch in wider.split(batch_size)])
        edge = margin * pictures.shape[-1] // len(places)
        return pictures[..., edge : pictures.shape[-2] - edge, edge : pictures.shape[-1] - edge]

    def check_tokens(self, tokens: Tensor | np.ndarray) -> Tensor:
        """Tokens of any integer type, (n, side²) or (side²,), as int64 (n, side²) on the device.

        Raises ValueError for another shape or type, or numbers outside the vocabulary.
        """
        if isinstance(tokens, np.ndarray) and tokens.dtype.kind == "u":
            tokens = tokens.astype(np.int64)  # torch computes little with unsigned ones
        tokens = torch.as_tensor(tokens)
        tokens = tokens[None] if tokens.ndim == 1 else tokens
        shape, codes = tuple(tokens.shape), self.require("vqgan", "reading tokens").num_tokens
        square = len(shape) == 2 and math.isqrt(shape[1]) ** 2 == shape[1] and tokens.numel() > 0
        kind = str(tokens.dtype).removeprefix("torch.")
        require(square and "int" in kind, f"tokens are {kind} {shape}; expected int64 (n, side²), such as (n, 256)")
        low, high = (int(bound) for bound in tokens.to(torch.int64).aminmax())
        require(low >= 0 and high < codes, f"tokens run from {low} to {high}; this vqgan has codes 0 to {codes - 1}")
        return tokens.to(self.device, torch.int64)


def load_and_move(load: Callable[[], CLIP], device: str | torch.device, dtype: torch.dtype | None) -> CLIP:
    return load().to(device, dtype)


def fingerprint(part: nn.Module) -> str:
    """Sixteen hexadecimal digits that follow from a network's tensors."""
    digest = blake2b(digest_size=8)
    for name, tensor in sorted(part.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def signature(part: nn.Module) -> str:
    """What tells that a network's tensors hold the same numbers as before, wherever they are.

    Computed from sums of blocks and of columns over all blocks, which are read as fast as memory allows and change
    where two numbers change places. Version counters would not do: they miss edits of `.data`.
    """
    digest = blake2b(digest_size=8)
    for tensor in part.state_dict().values():
        tensor = tensor.detach()
        in_order = tensor.permute(0, 2, 3, 1) if tensor.ndim == 4 else tensor  # channels last, as convolutions have it
        numbers = (in_order if in_order.is_contiguous() else tensor).reshape(-1).view(torch.uint8)
        numbers = numbers if numbers.storage_offset() % 8 == 0 else numbers.clone()
        whole = len(numbers) // (8 * BLOCK) * 8 * BLOCK
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        if whole:
            words = numbers[:whole].view(torch.int64).view(-1, BLOCK)
            digest.update(torch.cat((words.sum(dim=1), words.sum(dim=0))).cpu().numpy().tobytes())
        digest.update(numbers[whole:].cpu().numpy().tobytes())
    return digest.hexdigest()
