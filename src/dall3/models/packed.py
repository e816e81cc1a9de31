"""Linear layers that are fast for decoding, where reading the weights takes most time: layouts for a CPU, and int8.

`prepare` makes a copy of a transformer with such layers; all other tensors are shared with the original. The copy is
kept for as long as the original exists. There is one copy per transformer: a draw that needs another layout replaces
it, so that the weights are in memory at most twice.
"""

from __future__ import annotations

import copy
import ctypes
import importlib.util
import mmap
import platform
import sys
from functools import cache
from itertools import chain
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dall3.models.interface import ImageTokenTransformer

QUANTIZATIONS = ("float16", "int8")
# Largest batch for which float16 weights are faster than oneDNN's layout on a CPU with AVX-512. There the linear layers
# of a step (dim 512) took 0.37 of oneDNN's time for 1 row, 0.71 for 8 and 0.96 for 16; a whole draw of 32 rows took
# 1.06 of it. With AVX2 they took 0.4 for 1 row, 0.65 for 32 and 0.9 for 128, so there is no limit.
FLOAT16_ROWS = 16
MADV_PAGEOUT = 21  # Linux 5.4: reclaim pages; pages of a mapped file are dropped, others are swapped out
FLOAT16_MAX = torch.finfo(torch.float16).max


class PreparedLayer(nn.Module):
    """Base class of the layers of a prepared copy. They run without hooks, which cost as much as a small layer."""

    def __call__(self, x: Tensor) -> Tensor:
        return self.forward(x)  # type: ignore[no-any-return]


class PreparedLayerNorm(PreparedLayer):
    """`nn.LayerNorm`."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.shape, self.eps = norm.normalized_shape, norm.eps
        self.weight, self.bias = norm.weight.detach(), norm.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        return torch.layer_norm(x, self.shape, self.weight, self.bias, self.eps)


class PackedLinear(PreparedLayer):
    """A linear layer in oneDNN's blocked layout. Results equal those of `nn.Linear` up to rounding."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight, self.bias = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous()), bias

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return out


class RowLinear(PreparedLayer):
    """A linear layer for a single row, stored with the longer side of the matrix contiguous.

    Results equal those of `nn.Linear` up to rounding. With AVX2, BLAS's matrix-vector product on one core is as fast as
    oneDNN's layout on two, and a call takes 3 µs instead of 26. That saved a quarter of the time of a draw on one core,
    and 4 to 9 % on two.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        weight = weight.detach()
        self.weight, self.bias = weight.T.contiguous().T if len(weight) > weight.shape[1] else weight, bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Float16Linear(PreparedLayer):
    """A linear layer with float16 weights and float32 arithmetic, by FBGEMM. It reads half the bytes.

    If float16 represents the weights exactly, as in most published checkpoints, results equal those of `nn.Linear` up
    to rounding. Raises ValueError for a weight that is too large for float16.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        weight = weight.detach().float()
        largest = max(abs(float(end)) for end in weight.aminmax())
        if not largest <= FLOAT16_MAX:
            raise ValueError(f"a weight of {largest:g} does not fit float16, whose maximum is {FLOAT16_MAX:g}")
        bias = None if bias is None else bias.detach().float()
        self.packed = torch.ops.quantized.linear_prepack_fp16(weight, bias)

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != torch.float32:
            return self(x.float()).to(x.dtype)  # type: ignore[no-any-return]
        out: Tensor = torch.ops.quantized.linear_dynamic_fp16(x, self.packed)
        return out


class CastLinear(PreparedLayer):
    """A linear layer that converts its float16 weights to float32 at every call, and pages them out afterwards."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight, self.bias = weight.detach(), None if bias is None else bias.detach().float()

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.float()
        page_out(self.weight)
        return F.linear(x, weight, self.bias)


class CastEmbedding(PreparedLayer):
    """An embedding with float16 weights and float32 results."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight.detach()

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight).float()


class Int8Linear(PreparedLayer):
    """A linear layer with int8 weights and one scale per row (arXiv 2208.07339, section 2.1, rows only).

    Inputs are rounded to bfloat16. The layer is faster for small batches, where reading the weights dominates.
    """

    weight: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        weight = weight.detach().float()
        low, high = weight.aminmax(dim=1)
        scale = torch.maximum(-low, high).clamp_min(1e-12) / 127
        self.pad = -weight.shape[1] % 16  # the kernel reads whole registers, past the end of a narrower row
        self.weight = F.pad((weight / scale[:, None]).round_().to(torch.int8), (0, self.pad))
        self.scale = scale.bfloat16()
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        rows = F.pad(x.reshape(-1, x.shape[-1]).bfloat16(), (0, self.pad))
        out = torch._weight_int8pack_mm(rows, self.weight, self.scale).view(*x.shape[:-1], -1)
        return (out if self.bias is None else out + self.bias).to(x.dtype)


class TorchaoLinear(PreparedLayer):
    """A linear layer with int8 weights and one scale per row, by torchao, for a GPU.

    Compiled, it reads the int8 weights. Otherwise every call converts them to the dtype of the input first.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        layer = nn.Linear(weight.shape[1], len(weight), bias=False, device="meta")
        layer.weight = nn.Parameter(weight.detach(), requires_grad=False)
        quantize_(layer, Int8WeightOnlyConfig())
        self.weight, self.bias = layer.weight.detach(), None if bias is None else bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Prepared(NamedTuple):
    """A prepared copy of a transformer, and the state of the original that it was made from."""

    signature: tuple[Any, ...]
    exact: bool  # whether float16 represents the weights exactly
    kind: type[nn.Module]
    transformer: Any


PREPARED: WeakKeyDictionary[Any, Prepared] = WeakKeyDictionary()
UNRELATED = ("_idle_caches", "compiled_step")  # attributes that do not affect the prepared copy
T = TypeVar("T", bound=ImageTokenTransformer[Any])


def signature(transformer: ImageTokenTransformer[Any]) -> tuple[Any, ...]:
    """A value that changes if a tensor of the transformer is replaced or written to.

    Writes that autograd tracks change a tensor's version counter. Writes to `weight.data` change the product of the
    matrix with a fixed random vector, unless rounding hides them. Computing the product takes a tenth of the time of
    making a copy. For float16 weights on a CPU it is not computed, and writes to their `data` are not detected.
    """
    held: list[Any] = [id(value) for name, value in vars(transformer).items() if name not in UNRELATED]
    for tensor in chain(transformer.parameters(), transformer.buffers()):
        held += id(tensor), tensor.data_ptr(), None if tensor.is_inference() else tensor._version
    weights = linear_weights(transformer)
    if weights[0].dtype != torch.float16 or weights[0].device.type != "cpu":  # the product reads all of a mapped file
        products = [
            (weight @ random_vector(weight.shape[1]).to(weight.device, weight.dtype)).float() for weight in weights
        ]
        held.append(torch.cat(products).cpu().numpy().tobytes())
    return tuple(held)


@cache
def random_vector(length: int) -> Tensor:
    """A fixed random vector for `signature`."""
    with torch.inference_mode(False):
        return torch.randn(length, generator=torch.Generator().manual_seed(0))


def can_pack(weight: Tensor) -> bool:
    """Whether oneDNN has a blocked layout for a weight: float32 on an x86-64 CPU."""
    intel = platform.machine().lower() in ("x86_64", "amd64") and torch.backends.mkldnn.is_available()
    return intel and weight.device.type == "cpu" and weight.dtype == torch.float32


def has_fbgemm() -> bool:
    """Whether torch has FBGEMM's product with float16 weights, which needs x86 with AVX2."""
    return torch.backends.quantized.engine in ("x86", "fbgemm")


def page_out(tensor: Tensor) -> None:
    """Tell Linux to reclaim the memory of a tensor. The next access reads a mapped file again."""
    if hasattr(mmap, "MADV_DONTNEED") and sys.platform == "linux":
        start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
        if end - first >= mmap.PAGESIZE:
            ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), MADV_PAGEOUT)


def float16_holds(weight: Tensor) -> bool:
    """Whether float16 represents a weight exactly."""
    return bool((weight == weight.half()).all())


def linear_weights(transformer: ImageTokenTransformer[Any]) -> list[Tensor]:
    """The weights of the linear layers that a step runs."""
    layers = [module.weight for module in transformer.decoder.modules() if isinstance(module, nn.Linear)]
    return [weight.detach() for weight in (*layers, transformer.head[0])]


def check_quantization(quantize: str | None, device: torch.device) -> None:
    """Raise ValueError for a quantization that the device does not have, ImportError without the package it needs."""
    if quantize is not None and device.type not in ("cpu", "cuda"):
        raise ValueError(f"quantize='{quantize}' needs a CPU or a CUDA device, and the transformer is on {device}")
    if quantize == "float16" and device.type != "cpu":
        raise ValueError(
            f"quantize='float16' is for a CPU, and the transformer is on {device}; use dtype=torch.float16"
        )
    if quantize == "float16" and not has_fbgemm():
        raise ValueError("quantize='float16' needs FBGEMM, which torch has on x86 with AVX2; use 'int8' or None")
    if quantize == "int8" and device.type != "cpu" and importlib.util.find_spec("torchao") is None:
        raise ImportError("quantize='int8' on a GPU needs torchao; install it: pip install 'dall3[int8]'")


def linear_class(quantize: str | None, on_cpu: bool, exact: bool, rows: int | None) -> type[nn.Module]:
    """The class of linear layer for a draw: the fastest one with the requested precision."""
    if quantize == "int8":
        return Int8Linear if on_cpu else TorchaoLinear
    if quantize == "float16":
        return Float16Linear
    avx512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
    if exact and has_fbgemm() and not (avx512 and rows is not None and rows > FLOAT16_ROWS):
        return Float16Linear
    # RowLinear uses one core, so oneDNN's layout may be faster with more than two. With AVX-512, oneDNN's layout is
    # faster even on one core: a draw took 0.75 of the time, and 0.54 on two cores.
    use_rows = rows == 1 and torch.get_num_threads() <= 2 and not avx512
    return RowLinear if use_rows else PackedLinear


def convert_to_float32(transformer: ImageTokenTransformer[Any]) -> None:
    """Replace the float16 tensors of a copy by float32 ones, except for the weights of linear layers and embeddings."""
    for module in transformer.modules():
        if not isinstance(module, nn.Linear | nn.Embedding):
            for name, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(parameter.detach().float(), requires_grad=False))
                page_out(parameter)
            for name, buffer in list(module.named_buffers(recurse=False)):
                setattr(module, name, buffer.float() if buffer.dtype == torch.float16 else buffer)


def prepare(transformer: T, quantize: str | None = None, rows: int | None = None) -> T:
    """Return the transformer to decode with: `transformer` itself, or a copy whose linear layers have a faster layout.

    quantize: "int8" for int8 weights, "float16" for weights rounded to float16; both change the results a little. None
    for the exact weights, which are stored in float16 too if float16 represents them exactly and is faster. rows: the
    batch size, if known; the layout depends on it. A transformer in float16 on a CPU computes in float32: only
    the weights of the copy's linear layers and embeddings are float16.

    On a GPU only "int8" makes a copy, which is compiled if the original is.

    Raises as `check_quantization`.
    """
    weight, bias = transformer.head
    on_cpu = weight.device.type == "cpu"
    check_quantization(quantize, weight.device)
    half = on_cpu and weight.dtype == torch.float16 and has_fbgemm() and quantize != "int8"
    if transformer.image_head is not None or (quantize is None and not half and not can_pack(weight)):
        return transformer
    found, kept = signature(transformer), PREPARED.get(transformer)
    if kept is not None and kept.signature != found:
        kept = None
    exact = half or (on_cpu and all(map(float16_holds, linear_weights(transformer)))) if kept is None else kept.exact
    kind = Float16Linear if half else linear_class(quantize, on_cpu, exact, rows)
    if kept is not None and kept.kind is kind:
        ready: T = kept.transformer
        return ready
    del kept
    PREPARED.pop(transformer, None)  # free it before the next copy is made
    shared = {id(tensor): tensor for tensor in chain(transformer.parameters(), transformer.buffers())}
    ready = copy.deepcopy(transformer, shared)
    if half:
        convert_to_float32(ready)
    if not on_cpu:
        ready.compile_options = transformer.compile_options
    ready.image_head = kind(weight, bias)
    prepared: dict[nn.Module, nn.Module] = {}
    decoder = set(ready.decoder.modules())
    for module in list(ready.modules() if half else ready.decoder.modules()):
        for name, layer in list(module.named_children()):
            if isinstance(layer, nn.Linear):
                if layer not in prepared:
                    prepared[layer] = (kind if module in decoder else CastLinear)(layer.weight, layer.bias)
                    if half:
                        page_out(layer.weight)
                setattr(module, name, prepared[layer])
            elif half and isinstance(layer, nn.Embedding):
                setattr(module, name, CastEmbedding(layer.weight))
            elif isinstance(layer, nn.LayerNorm):
                setattr(module, name, PreparedLayerNorm(layer))
    PREPARED[transformer] = Prepared(found, exact, kind, ready)
    return ready
