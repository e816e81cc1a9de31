"""Linear layers laid out for drawing tokens on a CPU, where a step is as fast as the weights are read.

`prepare` makes a copy of a transformer that draws with them; its other tensors are the transformer's own. The copy is
kept as long as the transformer, for the next picture.
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
    """A linear layer in the order in which oneDNN reads it: the same numbers but for rounding."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight, self.bias = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous()), bias

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return out


class RowLinear(nn.Module):
    """A linear layer for one row at a time, its weights' longer side contiguous: the same numbers but for rounding.

    On a CPU with AVX2 BLAS's product of a matrix and a vector reads them so on one core as fast as oneDNN's layout on
    two, and a call costs 3 µs in place of 26: of a picture's time that was a quarter on one core and 4 to 9 % on two.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        weight = weight.detach()
        self.weight, self.bias = weight.T.contiguous().T if len(weight) > weight.shape[1] else weight, bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Int8Linear(nn.Module):
    """A linear layer with weights of eight bits, a scale a row (arXiv 2208.07339, section 2.1, rows alone).

    What goes in is rounded to bfloat16. Pays where few rows go in at a time: weights are read four times as fast.
    """

    weight: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        weight = weight.detach().float()
        low, high = weight.aminmax(dim=1)
        scale = torch.maximum(-low, high).clamp_min(1e-12) / 127
        self.pad = -weight.shape[1] % 16  # the product reads whole registers, beyond the end of a narrower row
        self.weight = F.pad((weight / scale[:, None]).round_().to(torch.int8), (0, self.pad))
        self.scale = scale.bfloat16()
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        rows = F.pad(x.reshape(-1, x.shape[-1]).bfloat16(), (0, self.pad))
        out = torch._weight_int8pack_mm(rows, self.weight, self.scale).view(*x.shape[:-1], -1)
        return (out if self.bias is None else out + self.bias).to(x.dtype)


PREPARED: WeakKeyDictionary[Any, dict[Any, tuple[Any, Any]]] = WeakKeyDictionary()
OF_A_CALL = ("_idle_caches", "compiled_step")  # what a transformer holds besides what it is
T = TypeVar("T", bound=ImageTokenTransformer[Any])


def signature(transformer: ImageTokenTransformer[Any]) -> tuple[Any, ...]:
    """A value that changes when a tensor of the transformer is replaced or written to.

    Writes that autograd counts change a tensor's version. Writes to `weight.data` change the product of the matrix and
    a fixed random vector, whose bytes are compared: the order of rows and columns counts, and every change that
    rounding does not hide. The product reads the weights once, ten times as fast as they are laid out.
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
    """Whether oneDNN's layout is to be had for a weight, and faster than torch's own."""
    intel = platform.machine().lower() in ("x86_64", "amd64") and torch.backends.mkldnn.is_available()
    return intel and weight.device.type == "cpu" and weight.dtype == torch.float32


def prepare(transformer: T, quantize: str | None = None, rows: int | None = None) -> T:
    """A transformer to draw image tokens with: `transformer`, or a copy whose linear layers are laid out for that.

    quantize: "int8" for weights of eight bits, which changes the numbers a little; None for the weights as they are.
    rows: how many are drawn at a time, if that is known; the layout for one is another.
    Raises ValueError for int8 elsewhere than on a CPU.
    """
    weight, bias = transformer.head
    if quantize is not None and weight.device.type != "cpu":
        raise ValueError(f"quantize='{quantize}' is for a CPU, and the transformer is on {weight.device}")
    if transformer.image_head is not None or (quantize is None and not can_pack(weight)):
        return transformer
    # With more cores than two, oneDNN's layout may read faster than the one core that reads a row's. With AVX-512 it
    # does on one core already: of a picture's time it took 0.75 there, 0.54 on two.
    alone = rows == 1 and torch.get_num_threads() <= 2 and torch.backends.cpu.get_cpu_capability() != "AVX512"
    plain = RowLinear if alone else PackedLinear
    kind: Callable[[Tensor, Tensor | None], nn.Module] = plain if quantize is None else Int8Linear
    found, kept = signature(transformer), PREPARED.setdefault(transformer, {})
    before, ready = kept.get(kind, (None, transformer))
    if before == found:
        return ready
    kept.pop(kind, None)  # not in memory beside the next one
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
