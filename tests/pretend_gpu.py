"""A CUDA device that is not there: tensors on it compute on the CPU, and mixing the two fails as on a GPU.

What a GPU would refuse is found without one: a tensor left on the CPU, a NumPy array made of a tensor of the GPU, a
generator of the other device.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from dall3.diffusion import captured
from dall3.tokens import decoding
from dall3.tokens.cuda_graph import tensors_of

CUDA, CPU = torch.device("cuda:0"), torch.device("cpu")
aten = torch.ops.aten


class OnGPU(torch.Tensor):
    """A tensor of the pretended device. What C++ sees has no data ("meta"), so that it asks no driver for anything."""

    here: torch.Tensor

    @staticmethod
    def __new__(cls, here: torch.Tensor) -> OnGPU:
        about = dict(strides=here.stride(), storage_offset=here.storage_offset(), dtype=here.dtype, device="meta")
        with torch.inference_mode(False):  # what is made in that mode could not be indexed outside of it
            self = torch.Tensor._make_wrapper_subclass(cls, here.shape, **about)
        self.here = here
        return self

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return CUDA

    def tolist(self) -> Any:
        return self.here.tolist()

    def __getitem__(self, index: Any) -> torch.Tensor:
        # PyTorch reads no values of a list that indexes a tensor without data.
        return super().__getitem__(torch.tensor(index) if isinstance(index, list) else index)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return run(function, args, kwargs or {})


class Generator(torch.Generator):
    """A generator that says it is of the device that it was asked for."""

    def __new__(cls, device: torch.device | str = "cpu") -> Generator:
        self = super().__new__(cls)
        self.asked_for = CUDA if torch.device(device).type == "cuda" else CPU
        return self

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.asked_for


def run(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    on_gpu = [isinstance(tensor, OnGPU) for tensor in tensors]
    stays = any(on_gpu)
    if kwargs.get("device") is not None:
        stays = torch.device(kwargs["device"]).type in ("cuda", "meta")
        kwargs = kwargs | {"device": CPU}
    elif function is aten.copy_.default:
        stays = on_gpu[0]
    elif function not in (aten._to_copy.default, aten.index.Tensor):
        # As on a GPU, a number of the CPU may take part, and a tensor of it may be an index.
        left = [tuple(t.shape) for t, there in zip(tensors, on_gpu, strict=True) if not there and t.ndim]
        assert not stays or not left, f"{function} got tensors of both devices; on the CPU lay {left}"

    def bring(x: Any) -> Any:
        return x.here if isinstance(x, OnGPU) else x

    out = function(*tree_map(bring, args), **tree_map(bring, kwargs))
    if not stays:
        return out
    returned = function._schema.returns
    if len(returned) == 1 and returned[0].alias_info is not None and returned[0].alias_info.is_write:
        return kwargs.get("out", args[0])
    return tree_map(lambda x: OnGPU(x) if isinstance(x, torch.Tensor) else x, out)


class Everywhere(TorchDispatchMode):
    """Brings what is made on "cuda", or moved there, to the pretended device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return run(function, args, kwargs or {})


class PretendGraph:
    """A CUDA graph as `CudaGraph`, without a driver: a replay runs the function on the static inputs again.

    As on a GPU, every replay writes to the same output tensors. captures, replays: counts of all graphs.
    """

    captures = replays = 0
    bytes = 2**20

    def __init__(self, function: Any, *inputs: torch.Tensor, device: Any, modules: Any = (), keep: Any = None) -> None:
        assert torch.device(device).type == "cuda", device
        self.function, self.inputs = function, [tensor.clone() for tensor in inputs]
        self.weights = [*tensors_of(modules)]
        self.output = function(*self.inputs)
        PretendGraph.captures += 1

    def __call__(self, *inputs: torch.Tensor) -> Any:
        for static, tensor in zip(self.inputs, inputs, strict=True):
            assert static.shape == tensor.shape and static.dtype == tensor.dtype
            static.copy_(tensor)
        new = self.function(*self.inputs)
        for name, tensor in (new or {}).items():
            self.output[name].copy_(tensor)
        PretendGraph.replays += 1
        return self.output

    def reads(self, modules: Any) -> bool:
        now = [*tensors_of(modules)]
        return len(now) == len(self.weights) and all(a is b for a, b in zip(now, self.weights, strict=True))


@contextmanager
def pretend_gpu(monkeypatch: Any, memory: int = 8 * 2**30, reserved: int = 0) -> Any:
    """While it lasts, `device="cuda"` is to be had, with so many bytes of memory, some of which may be reserved."""
    torch._C._ensureCUDADeviceGuardSet()
    real_tensor = torch.tensor

    def tensor(*args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
        made = real_tensor(*args, **kwargs)
        return made if device is None else made.to(device)

    monkeypatch.setattr(torch, "tensor", tensor)  # this one does not come by the mode
    monkeypatch.setattr(torch, "Generator", Generator)
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
    monkeypatch.setattr(PretendGraph, "captures", 0)
    monkeypatch.setattr(PretendGraph, "replays", 0)
    for module in (decoding, captured):  # no driver would record anything
        monkeypatch.setattr(module, "CudaGraph", PretendGraph)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (memory - reserved, memory))
    with Everywhere():
        yield pretend_nothing


@contextmanager
def pretend_nothing() -> Any:
    """Without what `pretend_gpu` brings to the pretended device: for computing on the CPU meanwhile."""
    with _disable_current_modes():
        yield
