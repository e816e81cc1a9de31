"""A pretended CUDA device: its tensors compute on the CPU, and mixing devices fails as on a GPU.

It finds errors that only a GPU would raise: a tensor left on the CPU, a NumPy array made from a GPU tensor, a generator
of another device.
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
    """A tensor on the pretended device. C++ sees a meta tensor without data, so no driver is called."""

    here: torch.Tensor

    @staticmethod
    def __new__(cls, here: torch.Tensor) -> OnGPU:
        about = dict(strides=here.stride(), storage_offset=here.storage_offset(), dtype=here.dtype, device="meta")
        with torch.inference_mode(False):  # tensors created in inference mode could not be indexed outside of it
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
    """A generator on the CPU that reports the requested device."""

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
    requested = kwargs.get("device") or next((x for x in args if isinstance(x, torch.device)), None)
    if requested is not None:
        stays = torch.device(requested).type in ("cuda", "meta")
        kwargs = kwargs | ({"device": CPU} if "device" in kwargs else {})
    elif function is aten.copy_.default:
        stays = on_gpu[0]
    elif function not in (aten._to_copy.default, aten.index.Tensor):
        # As on a GPU, scalars on the CPU are allowed in operations, and tensors on the CPU as an index.
        left = [tuple(t.shape) for t, there in zip(tensors, on_gpu, strict=True) if not there and t.ndim]
        assert not stays or not left, f"{function} got tensors of both devices; on the CPU lay {left}"

    def bring(x: Any) -> Any:
        return x.here if isinstance(x, OnGPU) else CPU if isinstance(x, torch.device) else x

    out = function(*tree_map(bring, args), **tree_map(bring, kwargs))
    if not stays:
        return out
    returned = function._schema.returns
    if len(returned) == 1 and returned[0].alias_info is not None and returned[0].alias_info.is_write:
        return kwargs.get("out", args[0])
    return tree_map(lambda x: OnGPU(x) if isinstance(x, torch.Tensor) else x, out)


class OnPretendedDevice(TorchDispatchMode):
    """Puts tensors that are created on "cuda" or moved there on the pretended device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return run(function, args, kwargs or {})


class PretendGraph:
    """Replaces `CudaGraph`, without a driver: a replay calls the function again with the static inputs.

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
    """Context in which `device="cuda"` is the pretended device. memory, reserved: bytes of its memory."""
    torch._C._ensureCUDADeviceGuardSet()
    real_tensor = torch.tensor

    def tensor(*args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
        made = real_tensor(*args, **kwargs)
        return made if device is None else made.to(device)

    monkeypatch.setattr(torch, "tensor", tensor)  # the dispatch mode does not see this function
    monkeypatch.setattr(torch, "Generator", Generator)
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
    monkeypatch.setattr(PretendGraph, "captures", 0)
    monkeypatch.setattr(PretendGraph, "replays", 0)
    for module in (decoding, captured):  # there is no driver that could capture
        monkeypatch.setattr(module, "CudaGraph", PretendGraph)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (memory - reserved, memory))
    with OnPretendedDevice():
        yield pretend_nothing


@contextmanager
def pretend_nothing() -> Any:
    """Context inside `pretend_gpu` in which tensors stay on the CPU."""
    with _disable_current_modes():
        yield
