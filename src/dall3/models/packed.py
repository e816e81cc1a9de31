"""Linear layers laid out for drawing tokens on a CPU, where a step is as fast as the weights are read.

`prepare` makes a copy of a transformer that draws with them; its other tensors are the transformer's own. The copy is
kept as long as the transformer, for the next picture. There is one copy at a time: a draw that needs another layout
replaces it, so that the weights are never in memory three times.
"""

from __future__ import annotations

import copy
import platform
from functools import cache
from itertools import chain
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dall3.models.interface import ImageTokenTransformer

QUANTIZATIONS = ("float16", "int8")
# Rows up to which float16 weights are faster than oneDNN's layout with AVX-512: a step's linear layers (dim 512) took
# 0.37 of the time at one row, 0.71 at eight, 0.96 at sixteen, and a whole draw 1.06 of it at 32. With AVX2 they took
# 0.4 of it at one row, 0.65 at 32 and 0.9 at 128: there is no limit.
FLOAT16_ROWS = 16
MOST_FLOAT16 = 65504.0  # the largest number that float16 holds


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


class Float16Linear(nn.Module):
    """A linear layer with weights kept in float16 and arithmetic in float32, by FBGEMM.

    Half the bytes are read. Where float16 holds the weights, as in most published checkpoints, the numbers are those of
    float32 but for rounding. Raises ValueError for a weight that is too large for float16.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        weight = weight.detach().float()
        largest = float(weight.abs().amax())
        if not largest <= MOST_FLOAT16:
            raise ValueError(f"a weight of {largest:g} does not fit float16, which ends at {MOST_FLOAT16:g}")
        bias = None if bias is None else bias.detach().float()
        self.packed = torch.ops.quantized.linear_prepack_fp16(weight, bias)

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != torch.float32:
            return self(x.float()).to(x.dtype)  # type: ignore[no-any-return]
        out: Tensor = torch.ops.quantized.linear_dynamic_fp16(x, self.packed)
        return out


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


class Prepared(NamedTuple):
    """A copy that draws, and what it was made from."""

    signature: tuple[Any, ...]
    exact: bool  # whether float16 holds the weights
    kind: type[nn.Module]
    transformer: Any


PREPARED: WeakKeyDictionary[Any, Prepared] = WeakKeyDictionary()
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
    for weight in linear_weights(transformer):
        vector = random_vector(weight.shape[1]).to(weight.dtype)
        held.append((weight @ vector).float().numpy().tobytes())
    return tuple(held)


@cache
def random_vector(length: int) -> Tensor:
    with torch.inference_mode(False):
        return torch.randn(length, generator=torch.Generator().manual_seed(0))


def can_pack(weight: Tensor) -> bool:
    """Whether oneDNN's layout is to be had for a weight, and faster than torch's own."""
    intel = platform.machine().lower() in ("x86_64", "amd64") and torch.backends.mkldnn.is_available()
    return intel and weight.device.type == "cpu" and weight.dtype == torch.float32


def has_fbgemm() -> bool:
    """Whether torch multiplies with weights kept in float16: FBGEMM's, which is for x86 with AVX2."""
    return torch.backends.quantized.engine in ("x86", "fbgemm")


def float16_holds(weight: Tensor) -> bool:
    """Whether rounding to float16 leaves a weight as it is."""
    return bool((weight == weight.half()).all())


def linear_weights(transformer: ImageTokenTransformer[Any]) -> list[Tensor]:
    """The weights of the linear layers that a step runs."""
    layers = [module.weight for module in transformer.decoder.modules() if isinstance(module, nn.Linear)]
    return [weight.detach() for weight in (*layers, transformer.head[0])]


def layout(quantize: str | None, exact: bool, rows: int | None) -> type[nn.Module]:
    """The kind of linear layer to draw with: the fastest of those that give the numbers asked for."""
    if quantize is not None:
        return Float16Linear if quantize == "float16" else Int8Linear
    avx512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
    if exact and has_fbgemm() and not (avx512 and rows is not None and rows > FLOAT16_ROWS):
        return Float16Linear
    # With more cores than two, oneDNN's layout may read faster than the one core that reads a row's. With AVX-512 it
    # does on one core already: of a picture's time it took 0.75 there, 0.54 on two.
    alone = rows == 1 and torch.get_num_threads() <= 2 and not avx512
    return RowLinear if alone else PackedLinear


def prepare(transformer: T, quantize: str | None = None, rows: int | None = None) -> T:
    """A transformer to draw image tokens with: `transformer`, or a copy whose linear layers are laid out for that.

    quantize: "int8" for weights of eight bits, "float16" for weights rounded to float16, which change the numbers a
    little; None for the weights as they are. Those are kept in float16 too where it holds them and that is faster.
    rows: how many are drawn at a time, if that is known; the layout depends on it.
    Raises ValueError for a quantization elsewhere than on a CPU, and for float16 without FBGEMM.
    """
    weight, bias = transformer.head
    if quantize is not None and weight.device.type != "cpu":
        raise ValueError(f"quantize='{quantize}' is for a CPU, and the transformer is on {weight.device}")
    if quantize == "float16" and not has_fbgemm():
        raise ValueError("quantize='float16' needs FBGEMM, which torch has on x86 with AVX2; use 'int8' or None")
    if transformer.image_head is not None or (quantize is None and not can_pack(weight)):
        return transformer
    found, kept = signature(transformer), PREPARED.get(transformer)
    if kept is not None and kept.signature != found:
        kept = None
    exact = all(map(float16_holds, linear_weights(transformer))) if kept is None else kept.exact
    kind = layout(quantize, exact, rows)
    if kept is not None and kept.kind is kind:
        ready: T = kept.transformer
        return ready
    del kept
    PREPARED.pop(transformer, None)  # not in memory beside the next one
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
    PREPARED[transformer] = Prepared(found, exact, kind, ready)
    return ready
