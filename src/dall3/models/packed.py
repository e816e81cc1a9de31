"""Linear layers with packed or quantised weights for the decode step on a CPU, which is bound by memory bandwidth.

`prepare` copies a transformer and replaces its linear layers; the copy shares all other tensors. Copies are cached for
the lifetime of the transformer.
"""

from __future__ import annotations

import copy
import platform
from collections.abc import Callable
from functools import cache
from itertools import chain
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dall3.models.interface import ImageTokenTransformer

QUANTIZATIONS = ("int8",)


class PackedLinear(nn.Module):
    """A linear layer with its weight in oneDNN's packed layout. Results are the same up to rounding."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight, self.bias = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous()), bias

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return out


class RowLinear(nn.Module):
    """A linear layer for a single row, with the longer side of its weight contiguous. Same results up to rounding.

    On a CPU with AVX2, BLAS's matrix-vector product reads this layout on one core as fast as oneDNN reads its own on
    two, with 3 µs of overhead per call instead of 26. A picture takes a quarter less time on one core, 4 to 9 % less
    on two.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        weight = weight.detach()
        self.weight, self.bias = weight.T.contiguous().T if len(weight) > weight.shape[1] else weight, bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Int8Linear(nn.Module):
    """A linear layer with int8 weights and one scale per output row (arXiv 2208.07339, section 2.1).

    The input is rounded to bfloat16. The layer is faster for few input rows, because it reads a quarter of the bytes.
    """

    weight: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        weight = weight.detach().float()
        low, high = weight.aminmax(dim=1)
        scale = torch.maximum(-low, high).clamp_min(1e-12) / 127
        self.weight, self.scale = (weight / scale[:, None]).round_().to(torch.int8), scale.bfloat16()
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).bfloat16()
        out = torch._weight_int8pack_mm(rows, self.weight, self.scale).view(*x.shape[:-1], -1)
        return (out if self.bias is None else out + self.bias).to(x.dtype)


PREPARED: WeakKeyDictionary[Any, dict[Any, tuple[Any, Any]]] = WeakKeyDictionary()
OF_A_CALL = ("_idle_caches", "compiled_step")  # attributes of calls, not of the network: left out of the signature
T = TypeVar("T", bound=ImageTokenTransformer[Any])


def signature(transformer: ImageTokenTransformer[Any]) -> tuple[Any, ...]:
    """A value that changes when a tensor of the transformer is replaced or modified.

    In-place operations change a tensor's version counter. Writes through `weight.data` do not, so the signature also
    holds the product of each weight with a fixed random vector. The product detects permutations and every change above
    rounding. It reads the weights once and is ten times as fast as packing them.
    """
    held: list[Any] = [id(value) for name, value in vars(transformer).items() if name not in OF_A_CALL]
    for tensor in chain(transformer.parameters(), transformer.buffers()):
        held += id(tensor), tensor.data_ptr(), None if tensor.is_inference() else tensor._version
    weights = [module.weight for module in transformer.decoder.modules() if isinstance(module, nn.Linear)]
    for weight in (*weights, transformer.head[0]):
        vector = random_vector(weight.shape[1]).to(weight.dtype)
        held.append((weight.detach() @ vector).float().numpy().tobytes())
    return tuple(held)


@cache
def random_vector(length: int) -> Tensor:
    with torch.inference_mode(False):
        return torch.randn(length, generator=torch.Generator().manual_seed(0))


def can_pack(weight: Tensor) -> bool:
    """Whether oneDNN's packed layout is available for this weight and faster than PyTorch's."""
    intel = platform.machine().lower() in ("x86_64", "amd64") and torch.backends.mkldnn.is_available()
    return intel and weight.device.type == "cpu" and weight.dtype == torch.float32


def prepare(transformer: T, quantize: str | None = None, rows: int | None = None) -> T:
    """Return `transformer`, or a cached copy with packed or quantised linear layers for the decode step.

    quantize: "int8" for int8 weights, which changes the logits slightly; None for the original weights. rows: input
    rows of a decode step, if known; a single row uses another layout. Raises ValueError for "int8" on a device other
    than a CPU.
    """
    weight, bias = transformer.head
    if quantize is not None and weight.device.type != "cpu":
        raise ValueError(f"quantize='{quantize}' is for a CPU, and the transformer is on {weight.device}")
    if transformer.image_head is not None or (quantize is None and not can_pack(weight)):
        return transformer
    # RowLinear runs on one core. With more than two cores, or with AVX-512, oneDNN's packed layout is faster: it takes
    # 0.75 of RowLinear's time per picture on one core with AVX-512, 0.54 on two.
    alone = rows == 1 and torch.get_num_threads() <= 2 and torch.backends.cpu.get_cpu_capability() != "AVX512"
    plain = RowLinear if alone else PackedLinear
    kind: Callable[[Tensor, Tensor | None], nn.Module] = plain if quantize is None else Int8Linear
    found, kept = signature(transformer), PREPARED.setdefault(transformer, {})
    before, ready = kept.get(kind, (None, transformer))
    if before == found:
        return ready
    kept.pop(kind, None)  # free the outdated copy before building the next one
    shared = {id(tensor): tensor for tensor in chain(transformer.parameters(), transformer.buffers())}
    ready = copy.deepcopy(transformer, shared)
    ready.image_head = kind(weight, bias)
    packed: dict[nn.Module, nn.Module] = {}
    for module in list(ready.decoder.modules()):
        for name, layer in list(module.named_children()):
            if isinstance(layer, nn.Linear):
                if layer not in packed:
                    packed[layer] = kind(layer.weight, layer.bias)
                setattr(module, name, packed[layer])
    kept[kind] = found, ready
    return ready
