"""PyTorch's files read as data: nothing that stands inside one is ever run.

Three containers: zip (torch 1.6 and later, and TorchScript), the older stream of pickles, and safetensors. Tensors are
mapped from the file, not copied.
"""

from __future__ import annotations

import io
import mmap
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DTYPES = {
    f"{name}Storage": dtype
    for name, dtype in {
        "Double": torch.float64,
        "Float": torch.float32,
        "Half": torch.float16,
        "BFloat16": torch.bfloat16,
        "Long": torch.int64,
        "Int": torch.int32,
        "Short": torch.int16,
        "Char": torch.int8,
        "Byte": torch.uint8,
        "Bool": torch.bool,
    }.items()
}
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
MAX_DEPTH, MAX_NODES = 64, 1_000_000  # of a module tree: far above any network, far below a trap


class CheckpointError(ValueError):
    """A file that is not what it should be. The message says what was wrong, what was expected and what to do."""


class Name:
    """A class or function that a pickle names: inert, and without attributes that a pickle could set."""

    __slots__ = ("text",)

    def __init__(self, text: str) -> None:
        object.__setattr__(self, "text", text)

    def __setattr__(self, name: str, value: object) -> None:
        raise CheckpointError(f"the pickle tries to change {self.text}")

    def __repr__(self) -> str:
        return f"<{self.text}>"


@dataclass(eq=False)
class Placeholder:
    """An object of a class that is not known: what the pickle says of it, and nothing more."""

    name: str
    args: tuple[Any, ...] = ()
    state: Any = None
    items: dict[Any, Any] = field(default_factory=dict)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items[key] = value

    def append(self, value: Any) -> None:
        self.items[len(self.items)] = value

    def extend(self, values: Any) -> None:
        for value in values:
            self.append(value)


@dataclass(eq=False)
class Storage:
    """A run of numbers in the file. `data` is a tensor (numel,) mapped from it, or None while it is not known where."""

    dtype: torch.dtype
    numel: int
    data: Tensor | None


def build_tensor(storage: Any, offset: Any, size: Any, stride: Any, *unused: Any) -> Tensor | None:
    """A view of a storage, checked to lie inside it."""
    numbers = (offset, *size, *stride)
    if (
        not isinstance(storage, Storage)
        or len(size) != len(stride)
        or any(type(n) is not int or n < 0 for n in numbers)
    ):
        raise CheckpointError("a tensor has no storage, or a negative or odd size, stride or offset")
    end = offset + 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if 0 not in size and end > storage.numel:
        raise CheckpointError(f"a tensor of shape {tuple(size)} reaches beyond its storage of {storage.numel} numbers")
    if storage.data is None:
        return None
    return storage.data[:0].view(size) if 0 in size else storage.data.as_strided(size, stride, offset)


def build_dict(*args: Any) -> dict[Any, Any]:
    return dict(*args)


def first_argument(*args: Any) -> Any:
    return args[0]


def default_dict(*args: Any) -> dict[Any, Any]:
    return {}


KNOWN: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": build_dict,
    "collections.defaultdict": default_dict,
    "builtins.dict": build_dict,
    "builtins.set": lambda values=(): set(values),
    "__builtin__.set": lambda values=(): set(values),
    "torch.Size": lambda values=(): tuple(values),
    "torch._utils._rebuild_tensor": build_tensor,
    "torch._utils._rebuild_tensor_v2": build_tensor,
    "torch._utils._rebuild_parameter": first_argument,
    "torch.nn.parameter.Parameter": first_argument,
    "torch.jit._pickle.build_intlist": first_argument,
    "torch.jit._pickle.build_tensorlist": first_argument,
    "torch.jit._pickle.build_doublelist": first_argument,
    "torch.jit._pickle.build_boollist": first_argument,
    "torch.jit._pickle.restore_type_tag": first_argument,
}


def construct(name: Any, args: Any) -> Any:
    """What a pickle's call makes: a tensor or plain container where the name is known, else a placeholder."""
    if not isinstance(name, Name) or not isinstance(args, tuple):
        raise CheckpointError("the pickle calls something that is not a name")
    known = KNOWN.get(name.text)
    return known(*args) if known else Placeholder(name.text, args)


class Unpickler(pickle._Unpickler):  # type: ignore[name-defined, misc]
    """The standard library's unpickler in Python, with every way to a class or a call replaced.

    The one in C would reserve what a file's memo index claims, up to 32 GB; this one keeps a dictionary.
    """

    dispatch = dict(pickle._Unpickler.dispatch)  # type: ignore[attr-defined]

    def __init__(self, file: io.BytesIO | mmap.mmap, load_storage: Callable[[Storage, str], Tensor | None]) -> None:
        super().__init__(file, encoding="latin1")
        self.load_storage = load_storage
        self.storages: dict[str, Storage] = {}

    def find_class(self, module: str, name: str) -> Name:
        return Name(f"{module}.{name}")

    def get_extension(self, code: int) -> None:
        raise CheckpointError("the pickle uses the extension registry, which checkpoints do not")

    def persistent_load(self, pid: Any) -> Storage | Name:
        if isinstance(pid, tuple) and len(pid) == 4 and pid[0] == "module" and isinstance(pid[1], Name):
            return pid[1]  # older files keep a module's source text beside its class
        if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage" or not isinstance(pid[1], Name):
            raise CheckpointError(f"the pickle refers to something other than a storage: {str(pid)[:60]}")
        kind, key, numel = pid[1].text.rsplit(".", 1)[-1], str(pid[2]), pid[4]
        if kind not in DTYPES or type(numel) is not int or numel < 0 or (len(pid) > 5 and pid[5] is not None):
            raise CheckpointError(f"storage {key} is of a kind that is not known: {kind}, {numel} numbers")
        if key not in self.storages:
            storage = Storage(DTYPES[kind], numel, None)
            storage.data = self.load_storage(storage, key)
            self.storages[key] = storage
        return self.storages[key]

    def load_reduce(self) -> None:
        args = self.stack.pop()
        self.stack[-1] = construct(self.stack[-1], args)

    def load_newobj_ex(self) -> None:
        keywords = self.stack.pop()
        self.load_reduce()
        if keywords and isinstance(self.stack[-1], Placeholder):
            self.stack[-1].items.update(keywords)

    def load_inst(self) -> None:
        module, name = (self.readline()[:-1].decode("ascii") for _ in range(2))
        self.append(construct(Name(f"{module}.{name}"), tuple(self.pop_mark())))

    def load_obj(self) -> None:
        name, *args = self.pop_mark()
        self.append(construct(name, tuple(args)))

    def load_build(self) -> None:
        state = self.stack.pop()
        if isinstance(self.stack[-1], Placeholder):
            self.stack[-1].state = state

    dispatch[pickle.REDUCE[0]] = load_reduce
    dispatch[pickle.NEWOBJ[0]] = load_reduce
    dispatch[pickle.NEWOBJ_EX[0]] = load_newobj_ex
    dispatch[pickle.INST[0]] = load_inst
    dispatch[pickle.OBJ[0]] = load_obj
    dispatch[pickle.BUILD[0]] = load_build
    for opcode in (pickle.BYTEARRAY8, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER):  # type: ignore[attr-defined]
        del dispatch[opcode[0]]  # no checkpoint has them, and the first reserves what it claims


def map_numbers(mapped: mmap.mmap, start: int, size: int, storage: Storage, key: str) -> Tensor:
    """`storage.numel` numbers at byte `start` of the file, of which `size` bytes are theirs."""
    if storage.numel * storage.dtype.itemsize > size or start + size > len(mapped):
        raise CheckpointError(f"storage {key} claims {storage.numel} numbers; the file holds {size} bytes of it")
    if storage.numel == 0:
        return torch.empty(0, dtype=storage.dtype)
    return torch.frombuffer(mapped, dtype=storage.dtype, count=storage.numel, offset=start)


def read_zip(path: Path, mapped: mmap.mmap) -> Any:
    archive = zipfile.ZipFile(path)
    entries = {info.filename: info for info in archive.infolist()}
    pickles = [name for name in entries if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(pickles) != 1:
        raise CheckpointError("the zip archive holds no data.pkl: it is not a PyTorch file")
    root = pickles[0][: -len("data.pkl")]
    if f"{root}byteorder" in entries and archive.read(f"{root}byteorder") != b"little":
        raise CheckpointError("the file was written on a big-endian machine; save it again on a little-endian one")

    def locate(name: str) -> tuple[int, int]:
        info = entries.get(name)
        if info is None or info.compress_type != zipfile.ZIP_STORED or info.header_offset + 30 > len(mapped):
            raise CheckpointError(f"{name} is missing, or compressed, which PyTorch never does")
        name_size, extra_size = struct.unpack_from("<HH", mapped, info.header_offset + 26)
        return info.header_offset + 30 + name_size + extra_size, info.file_size

    start, size = locate(pickles[0])
    unpickler = Unpickler(
        io.BytesIO(mapped[start : start + size]),
        lambda storage, key: map_numbers(mapped, *locate(f"{root}data/{key}"), storage, key),
    )
    return unpickler.load()


def read_legacy(mapped: mmap.mmap) -> Any:
    """Pickles of a magic number, a protocol, the machine and the object, the storages' keys, then the numbers."""

    def load(load_storage: Callable[[Storage, str], Tensor | None]) -> tuple[Any, dict[str, Storage]]:
        unpickler = Unpickler(mapped, load_storage)
        return unpickler.load(), unpickler.storages

    header = [load(lambda storage, key: None)[0] for _ in range(3)]
    if header[0] != LEGACY_MAGIC:
        raise CheckpointError("a pickle, but not one that PyTorch wrote")
    start = mapped.tell()
    _, storages = load(lambda storage, key: None)  # once to get past it: the numbers stand behind
    keys = load(lambda storage, key: None)[0]
    places, place = {}, mapped.tell()
    for key in keys if isinstance(keys, list) else []:
        if str(key) not in storages or place + 8 > len(mapped):
            raise CheckpointError(f"storage {key} is listed but the file ends or does not use it")
        size = struct.unpack_from("<q", mapped, place)[0] * storages[str(key)].dtype.itemsize
        places[str(key)] = (place + 8, size)
        place += 8 + max(size, 0)
    mapped.seek(start)
    return load(lambda storage, key: map_numbers(mapped, *places.get(key, (0, 0)), storage, key))[0]


def read_archive(path: str | Path) -> Any:
    """The object that torch.save wrote, or TorchScript, or the tensors of a safetensors file.

    Tensors come as they are, mapped from the file; dictionaries, lists and numbers as Python's; every other object as
    a `Placeholder`. Raises CheckpointError for a file that is not one of these or is broken, FileNotFoundError,
    IsADirectoryError.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; expected a checkpoint file")
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; expected a checkpoint file")
    if path.stat().st_size < 16:
        raise CheckpointError(f"{path} is empty or nearly so ({path.stat().st_size} bytes); expected a checkpoint file")
    with open(path, "rb") as file:
        # Private and writable: torch wants memory that it could write; the file never changes.
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    try:
        if mapped[:2] == b"PK":
            return read_zip(path, mapped)
        if mapped[8:9] == b"{":
            from safetensors.torch import load_file

            return load_file(path)
        if mapped[:1] == b"\x80":
            return read_legacy(mapped)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except RecursionError:
        raise CheckpointError(f"{path}: nested deeper than any checkpoint") from None
    except Exception as error:  # whatever a broken pickle or archive trips over is one thing to its reader
        raise CheckpointError(f"{path}: truncated or damaged ({type(error).__name__}: {error})") from None
    raise CheckpointError(f"{path}: not a PyTorch or safetensors file (it begins with {bytes(mapped[:8])!r})")


def module_tensors(module: Any) -> dict[str, Tensor]:
    """The state dict of a module that was pickled whole, or of a TorchScript module: tensors by dotted name.

    Raises CheckpointError for a tree that no network has.
    """
    nodes = 0

    def walk(node: Any, prefix: str, depth: int) -> Iterator[tuple[str, Tensor]]:
        nonlocal nodes
        nodes += 1
        if depth > MAX_DEPTH or nodes > MAX_NODES:
            raise CheckpointError("modules nested deeper or wider than any network")
        state = node.state if isinstance(node, Placeholder) and isinstance(node.state, dict) else {}
        parts = [part for key in ("_parameters", "_buffers", "_modules") if isinstance(part := state.get(key), dict)]
        for part in parts or [state]:
            for name, value in part.items():
                if isinstance(value, Tensor):
                    yield f"{prefix}{name}", value
                elif isinstance(value, Placeholder):
                    yield from walk(value, f"{prefix}{name}.", depth + 1)

    return dict(walk(module, "", 0))
