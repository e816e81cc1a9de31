"""Parts: the networks of a pipeline, with their device, offloading and fingerprints; image encoding and decoding."""

from __future__ import annotations

import math
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Literal, cast, overload

import numpy as np
import torch
from torch import Tensor, nn

from dall3.errors import require
from dall3.models.clip import CLIP
from dall3.models.discrete_vae import DiscreteVAE, OpenAIDiscreteVAE
from dall3.models.interface import ImageTokenTransformer
from dall3.models.layout import set_memory_layout
from dall3.models.unet import UNet
from dall3.models.upscaler import Upscaler
from dall3.models.vqgan import VQModel, check_codes
from dall3.text import TextEncoder
from dall3.tokens.sampling import check_counts

if TYPE_CHECKING:
    from typing_extensions import Self

    from dall3.weights.folder import Origin

NETWORKS = ("transformer", "vqgan", "clip", "upsampler", "super_resolution")
BLOCK = 64  # number of 64-bit words per block in `signature`

# Held while a CLIP is loaded and while parts are moved. os.fork acquires it first, so that a child process never starts
# with a part that is half loaded, or with a lock that no thread releases.
LOCK = threading.RLock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=LOCK.acquire, after_in_parent=LOCK.release, after_in_child=LOCK.release)


class Parts:
    """The networks of a pipeline. Each part can be replaced, or be None if it is not used.

    clip: a CLIP, or a function without arguments that loads one at first use.

    Raises ValueError for parts that are incompatible with each other.
    """

    clip_or_loader: CLIP | Callable[[], CLIP] | None  # the CLIP or its loader; `clip` calls the loader

    def __init__(
        self,
        *,
        text_encoder: TextEncoder | None = None,
        transformer: ImageTokenTransformer[Any] | None = None,
        vqgan: VQModel | DiscreteVAE | OpenAIDiscreteVAE | None = None,
        clip: CLIP | Callable[[], CLIP] | None = None,
        upsampler: UNet | None = None,
        super_resolution: UNet | Upscaler | None = None,
    ) -> None:
        if transformer is not None and vqgan is not None:
            check_codes(transformer.config, vqgan)
        if isinstance(upsampler, Upscaler):
            raise ValueError("the upsampler is an upscaler without diffusion; give it as super_resolution")
        if upsampler is not None and upsampler.config.embedding_dims and isinstance(vqgan, VQModel | DiscreteVAE):
            wanted, found = upsampler.config.embedding_dims[0], vqgan.codebook.shape[1]
            require(
                wanted == found, f"the upsampler takes code embeddings of {wanted} channels; the vqgan's have {found}"
            )
        if upsampler is not None and upsampler.config.embedding_dims and isinstance(vqgan, OpenAIDiscreteVAE):
            raise ValueError("the upsampler is conditioned on code embeddings, which OpenAI's dVAE does not have")
        family = getattr(getattr(transformer, "config", None), "text_family", None)
        if family == "dalle-mini" and isinstance(clip, CLIP) and clip.reads_russian:
            raise ValueError("the clip is ruCLIP, which reads Russian; DALL·E Mini and Mega read English: pass a CLIP")
        if super_resolution is not None and not isinstance(super_resolution, Upscaler):
            require(super_resolution.config.super_resolution, "super_resolution has no low-resolution input")
        self.text_encoder, self.transformer, self.vqgan = text_encoder, transformer, vqgan
        self.clip = clip
        self.upsampler, self.super_resolution = upsampler, super_resolution
        self.offload_device: torch.device | None = None  # with offloading, the device of the parts in use
        self.defaults: Mapping[str, Any] = {}  # default settings of `Sampling` and `Denoising` for these weights
        self.origins: dict[str, Origin] = {}  # licence and source, if known, by part
        self.left_out: dict[str, str] = {}  # the reason why a part was not loaded, by part
        self._hashes: dict[str, tuple[str, str]] = {}  # signature and fingerprint, by part
        self._users: Counter[str] = Counter()  # number of calls that use an offloaded part, by part

    @property
    def clip(self) -> CLIP | None:
        """CLIP for ranking and guidance. The first access calls the loader, if one was given."""
        with LOCK, torch.inference_mode(False):  # guidance cannot take gradients through inference tensors
            if self.clip_or_loader is not None and not isinstance(self.clip_or_loader, nn.Module):
                self.clip = self.clip_or_loader()
        return cast("CLIP | None", self.clip_or_loader)

    @clip.setter
    def clip(self, clip: CLIP | Callable[[], CLIP] | None) -> None:
        if isinstance(clip, nn.Module):
            set_memory_layout(clip)
        self.clip_or_loader = clip

    def load_clip_early(self) -> None:
        """Start loading the CLIP in a background thread."""

        def load() -> None:
            with suppress(Exception):  # raised again at first use
                self.clip  # noqa: B018

        if self.clip_or_loader is not None and not isinstance(self.clip_or_loader, nn.Module):
            threading.Thread(target=load, daemon=True).start()

    @property
    def components(self) -> dict[str, Any]:  # Any, so that they can be passed on as keyword arguments
        """The parts by name, None for missing ones. `Dall3Pipeline(**pipe.components)` shares them.

        >>> from dall3 import Dall3Pipeline
        >>> pipe = Dall3Pipeline.from_pretrained()
        >>> Dall3Pipeline(**pipe.components | {"upsampler": None}).transformer is pipe.transformer
        True
        """
        return {name: self.part_or_loader(name) for name in ("text_encoder", *NETWORKS)}

    @property
    def networks(self) -> dict[str, nn.Module]:
        """The loaded networks by name."""
        held = {name: self.part_or_loader(name) for name in NETWORKS}
        return {name: part for name, part in held.items() if isinstance(part, nn.Module)}

    @property
    def device(self) -> torch.device:
        """Device the pipeline runs on. Replacement parts must be on it too."""
        if self.offload_device is not None:
            return self.offload_device
        parameters = (parameter for part in self.networks.values() for parameter in part.parameters())
        return next((parameter.device for parameter in parameters), torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        """Floating point type of the weights. The transformer may have another one, see `from_pretrained`."""
        networks = sorted(self.networks.items(), key=lambda item: item[0] == "transformer")
        parameters = (parameter for _, part in networks for parameter in part.parameters())
        return next((p.dtype for p in parameters if p.is_floating_point()), torch.float32)

    def part_or_loader(self, name: str) -> object:
        """A part, its loader, or None. Does not load or move it."""
        return self.clip_or_loader if name == "clip" else getattr(self, name)

    @overload
    def require(self, name: Literal["text_encoder"], purpose: str) -> TextEncoder: ...

    @overload
    def require(self, name: Literal["transformer"], purpose: str) -> ImageTokenTransformer[Any]: ...

    @overload
    def require(self, name: Literal["vqgan"], purpose: str) -> VQModel | DiscreteVAE | OpenAIDiscreteVAE: ...

    @overload
    def require(self, name: Literal["upsampler", "super_resolution"], purpose: str) -> UNet: ...

    @overload
    def require(self, name: str, purpose: str) -> object: ...

    def require(self, name: str, purpose: str) -> object:
        """A part or its loader. Does not load or move it. Raises ValueError if it is None.

        purpose: for the error message, such as "drawing tokens".
        """
        held = self.part_or_loader(name)
        reason = self.left_out.get(name, "load one")
        require(held is not None, f"this pipeline has no {name}, which {purpose} needs; {reason}")
        return held

    @contextmanager
    def on_device(self, purpose: str, *names: str) -> Iterator[list[Any]]:
        """Context manager that loads parts, moves them to the pipeline's device and yields them as a list.

        With offloading, the first concurrent user moves a part to the device, and the last one moves it back to the
        CPU, also after an error. Raises ValueError for a missing part. purpose: as in `require`.
        """
        for name in names:
            self.require(name, purpose)
        found = [getattr(self, name) for name in names]
        device = self.offload_device
        if device is None:
            yield found
            return
        taken: list[tuple[str, Any]] = []
        try:
            with LOCK:
                for name, part in zip(names, found, strict=True):
                    self._users[name] += 1
                    taken.append((name, part))
                    if self._users[name] == 1 and isinstance(part, nn.Module):
                        part.to(device)
            yield found
        finally:
            with LOCK:
                for name, part in taken:
                    self._users[name] -= 1
                    if self._users[name] == 0 and isinstance(part, nn.Module) and self.offload_device is not None:
                        part.to("cpu")

    def to(self, device: str | torch.device, dtype: torch.dtype | None = None) -> Self:
        """Move all parts to a device and convert them to `dtype` (float32, float16 or bfloat16) if given. Returns self.

        A transformer that is float16 on a CPU gets the dtype of the other parts when it moves to another device.

        >>> from dall3 import Dall3Pipeline
        >>> Dall3Pipeline.from_pretrained().to("cpu", torch.bfloat16).device
        device(type='cpu')
        """
        self.offload_device = None
        on_cpu = torch.device(device).type == "cpu"
        layout = torch.contiguous_format if on_cpu else torch.channels_last
        if dtype is None and not on_cpu:
            self._match_transformer()
        for part in self.networks.values():
            part.to(device, dtype)
            if isinstance(part, UNet | CLIP):
                set_memory_layout(part)
            else:
                part.to(memory_format=layout)
        if self.clip_or_loader is not None and not isinstance(self.clip_or_loader, nn.Module):
            self.clip_or_loader = partial(load_and_move, self.clip_or_loader, device, dtype)
        return self

    def _match_transformer(self) -> None:
        """Give a transformer that is float16 on a CPU, where it computes in float32, the dtype of the other parts."""
        weight = None if self.transformer is None else self.transformer.head[0]
        if weight is not None and weight.device.type == "cpu" and weight.dtype == torch.float16:
            self.transformer.to(dtype=self.dtype)  # type: ignore[union-attr]

    def enable_model_offload(self, device: str | torch.device, dtype: torch.dtype | None = None) -> Self:
        """Keep the parts on the CPU and move each to `device` only while it is used. Returns self.

        The device needs memory for the largest stage only. dtype: as in `to`. Calling `to` disables offloading.

        >>> from dall3 import Dall3Pipeline
        >>> pipe = Dall3Pipeline.from_pretrained().enable_model_offload("cpu")  # on a GPU: "cuda"
        >>> pipe("a red cube", seed=0, num_inference_steps=2, progress=False).images[0].size
        (256, 256)
        """
        self.to("cpu", dtype)
        if torch.device(device).type != "cpu":
            self._match_transformer()
        self.offload_device = torch.device(device)
        return self

    def compile(self, **options: Any) -> Self:
        """Compile the decode step and the denoising step with torch.compile, one graph each. Returns self.

        options: those of torch.compile, such as mode="max-autotune". Compilation runs at first use and takes about a
        minute. Each new batch size or image size is compiled again.

        >>> from dall3 import Dall3Pipeline
        >>> pipe = Dall3Pipeline.from_pretrained().compile(backend="eager")
        >>> pipe.generate_tokens("a red cube", seed=0, progress=False).shape
        torch.Size([1, 256])
        """
        if self.transformer is not None:
            self.transformer.compile(**options)
        for unet in (self.upsampler, self.super_resolution):
            if isinstance(unet, UNet):
                unet.compile(**options)
        return self

    def fingerprints(self) -> dict[str, str]:
        """A short hash of the weights of each loaded network, by name. Computed again only if the weights changed."""
        for name, part in self.networks.items():
            now = signature(part)
            if name not in self._hashes or self._hashes[name][0] != now:
                self._hashes[name] = now, fingerprint(part)
        return {name: self._hashes[name][1] for name in self.networks}

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Encode images to tokens: int64 (n, side²).

        images: float (n, 3, height, width) in [0, 1]; height and width must be multiples of the vqgan's downsampling
        factor. Raises ValueError for another shape, or without a vqgan.

        >>> from dall3 import Dall3Pipeline
        >>> Dall3Pipeline.from_pretrained().encode(torch.zeros(1, 3, 128, 128)).shape
        torch.Size([1, 256])
        """
        with self.on_device("encoding images", "vqgan") as [vqgan]:
            tokens: Tensor = vqgan.encode(images.to(self.device, next(vqgan.parameters()).dtype))
        return tokens

    @torch.no_grad()
    def decode_tokens(self, tokens: Tensor | np.ndarray, batch_size: int = 32, seamless: bool = False) -> Tensor:
        """Decode tokens to coarse images: float32 (n, 3, height, width) in [0, 1].

        tokens: int64 (n, side²) or (side²,). batch_size: images decoded at a time. seamless: pad with the tokens of the
        opposite edge, so that the image can be tiled.

        Raises ValueError for tokens of another shape or outside the vocabulary, or without a vqgan.

        >>> from dall3 import Dall3Pipeline
        >>> Dall3Pipeline.from_pretrained().decode_tokens(torch.zeros(256, dtype=torch.int64)).shape
        torch.Size([1, 3, 128, 128])
        """
        check_counts(batch_size=batch_size)
        self.require("vqgan", "decoding tokens")
        tokens = self.check_tokens(tokens)
        side = math.isqrt(tokens.shape[1])
        margin = side // 4 if seamless else 0
        places = torch.arange(-margin, side + margin, device=tokens.device) % side
        padded = tokens.view(-1, side, side)[:, places][:, :, places].flatten(1)
        with self.on_device("decoding tokens", "vqgan") as [vqgan]:
            images = torch.cat([vqgan.decode(batch).float() for batch in padded.split(batch_size)])
        edge = margin * images.shape[-1] // len(places)
        return images[..., edge : images.shape[-2] - edge, edge : images.shape[-1] - edge]

    def check_tokens(self, tokens: Tensor | np.ndarray) -> Tensor:
        """Validate tokens of any integer type, (n, side²) or (side²,), and return int64 (n, side²) on the device.

        Raises ValueError for another shape or type, or values outside the vocabulary.
        """
        if isinstance(tokens, np.ndarray) and tokens.dtype.kind == "u":
            tokens = tokens.astype(np.int64)  # torch supports few operations on unsigned integers
        tokens = torch.as_tensor(tokens)
        tokens = tokens[None] if tokens.ndim == 1 else tokens
        shape, codes = tuple(tokens.shape), self.require("vqgan", "checking tokens").num_tokens
        square = len(shape) == 2 and math.isqrt(shape[1]) ** 2 == shape[1] and tokens.numel() > 0
        kind = str(tokens.dtype).removeprefix("torch.")
        require(square and "int" in kind, f"tokens are {kind} {shape}; expected int64 (n, side²), such as (n, 256)")
        low, high = (int(bound) for bound in tokens.to(torch.int64).aminmax())
        require(low >= 0 and high < codes, f"tokens run from {low} to {high}; this vqgan has codes 0 to {codes - 1}")
        return tokens.to(self.device, torch.int64)


def load_and_move(load: Callable[[], CLIP], device: str | torch.device, dtype: torch.dtype | None) -> CLIP:
    """Load a CLIP with `load`, move it to a device and convert it to `dtype`."""
    return load().to(device, dtype)


def fingerprint(part: nn.Module) -> str:
    """A hash of a network's state dict, 16 hexadecimal digits."""
    digest = blake2b(digest_size=8)
    for name, tensor in sorted(part.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def signature(part: nn.Module) -> str:
    """A fast checksum of a network's state dict, independent of the device.

    The state is read as blocks of 64-bit words. The checksum hashes the sum of each block, and the sums over all blocks
    of the words at each position. Summing is limited by memory bandwidth only, and swapping two values changes the
    sums. Version counters of tensors are not enough, because they miss changes to `.data`.
    """
    digest = blake2b(digest_size=8)
    for tensor in part.state_dict().values():
        tensor = tensor.detach()
        in_order = tensor.permute(0, 2, 3, 1) if tensor.ndim == 4 else tensor  # as channels_last stores it
        numbers = (in_order if in_order.is_contiguous() else tensor).reshape(-1).view(torch.uint8)
        numbers = numbers if numbers.storage_offset() % 8 == 0 else numbers.clone()
        whole = len(numbers) // (8 * BLOCK) * 8 * BLOCK
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        if whole:
            words = numbers[:whole].view(torch.int64).view(-1, BLOCK)
            digest.update(torch.cat((words.sum(dim=1), words.sum(dim=0))).cpu().numpy().tobytes())
        digest.update(numbers[whole:].cpu().numpy().tobytes())
    return digest.hexdigest()
