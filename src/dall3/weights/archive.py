"""PyTorch's files read as data: nothing that stands inside one is ever run.

Three containers: zip (torch 1.6 and later, and TorchScript), the older stream of pickles, and safetensors. Tensors are
mapped from the file, not copied.
"""

from __future__ import annotations

import io
import math
import mmap
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

STORAGES = ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
FLOATS, INTS = (torch.float64, torch.float32, torch.float16, torch.bfloat16), (torch.int64, torch.int32, torch.int16)
DTYPES = dict(zip(STORAGES, (*FLOATS, *INTS, torch.int8, torch.uint8, torch.bool), strict=True))
BaseUnpickler: Any = pickle._Unpickler  # type: ignore[attr-defined]
REFUSED = "INST OBJ NEWOBJ_EX EXT1 EXT2 EXT4 BYTEARRAY8 NEXT_BUFFER READONLY_BUFFER INT LONG LONG4 DICT FROZENSET"
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
# Of a tensor, of a dictionary's key and of a module tree: far above any network, far below a trap.
MAX_DEPTH, MAX_ITEMS, MAX_NAME = 64, 100_000, 1000
# Of keys that are no text, in a whole file: colliding ones would take time that grows with their number squared.
MAX_NUMBER, MAX_NUMBERS, MAX_ODD = 2**53, 20_000, 1000


class CheckpointError(ValueError):
    """A file that is not what it should be. The message says what was wrong, what was expected and what to do."""


def one_line(path: object, message: object) -> CheckpointError:
    """The error for a file, whatever the file has in its names: one printable line, not without end."""
    text = " ".join(str(message).split())[:1000]
    return CheckpointError(f"{path}: {''.join(c if c.isprintable() else '?' for c in text)}")


@dataclass(frozen=True)
class Name:
    """A class or function that a pickle names: inert."""

    text: str


class Placeholder(dict[Any, Any]):
    """An object of a class that is not known: what the pickle says of it, and nothing more."""

    __hash__ = object.__hash__  # type: ignore[assignment]

    def __init__(self, name: str) -> None:
        self.name, self.state = name, None

    def __repr__(self) -> str:
        return f"<{self.name}>"  # without its contents, which may be a trap


@dataclass(eq=False)
class Storage:
    """A run of numbers in the file. `data` is a tensor (numel,) mapped from it, or None while it is not known where."""

    dtype: torch.dtype
    numel: int
    data: Tensor | None


def build_tensor(storage: Any, offset: Any, size: Any, stride: Any, *unused: Any) -> Tensor | None:
    """A view of a storage, checked to lie inside it."""
    if not (isinstance(storage, Storage) and isinstance(size, tuple | list) and isinstance(stride, tuple | list)):
        raise CheckpointError("a tensor has no storage, no size or no strides")
    numbers = (offset, *size, *stride)
    if len(size) != len(stride) or len(size) > MAX_DEPTH or any(type(n) is not int or n < 0 for n in numbers):
        raise CheckpointError("a tensor has a negative or odd size, stride or offset")
    end = offset + 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    # A tensor with more numbers than its storage is no larger as a view, and a bomb once it is copied.
    if 0 not in size and max(end, math.prod(size)) > storage.numel:
        raise CheckpointError(f"a tensor of shape {tuple(size)} reaches beyond its storage of {storage.numel} numbers")
    if storage.data is None:
        return None
    return storage.data[:0].view(size) if 0 in size else storage.data.as_strided(size, stride, offset)


RETURN_FIRST = ("build_intlist", "build_tensorlist", "build_doublelist", "build_boollist", "restore_type_tag")
SETS = ("builtins.set", "__builtin__.set")
KNOWN: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": lambda: {},
    "collections.defaultdict": lambda *factory: {},
    "torch.Size": lambda size: size,
    "torch._utils._rebuild_tensor": build_tensor,
    "torch._utils._rebuild_tensor_v2": build_tensor,
    "torch._utils._rebuild_parameter": lambda tensor, *unused: tensor,
    **{f"torch.jit._pickle.{name}": lambda value, *unused: value for name in RETURN_FIRST},
}


class Unpickler(BaseUnpickler):
    """The standard library's unpickler in Python, with every way to a class or a call replaced.

    The one in C would reserve what a file's memo index claims, up to 32 GB; this one keeps a dictionary.
    """

    dispatch = dict(BaseUnpickler.dispatch)

    def __init__(self, file: io.BytesIO | mmap.mmap, load_storage: Callable[[Storage, str], Tensor | None]) -> None:
        super().__init__(file, encoding="latin1")
        self.load_storage = load_storage
        self.storages: dict[str, Storage] = {}
        self.number_keys = self.odd_keys = 0

    def find_class(self, module: str, name: str) -> Name:
        return Name(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Storage | Name:
        if isinstance(pid, tuple) and len(pid) == 4 and pid[0] == "module" and isinstance(pid[1], Name):
            return pid[1]  # older files keep a module's source text beside its class
        if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage" or not isinstance(pid[1], Name):
            raise CheckpointError("the pickle refers to something other than a storage")
        kind, key, numel = pid[1].text.rsplit(".", 1)[-1].removesuffix("Storage"), pid[2], pid[4]
        if type(key) is not str or type(numel) is not int:
            raise CheckpointError("a storage has no name or no size")
        if kind not in DTYPES or numel < 0 or (len(pid) > 5 and pid[5] is not None):
            raise CheckpointError(f"storage {key} is of a kind that is not known: {kind}, {numel} numbers")
        if key not in self.storages:
            storage = Storage(DTYPES[kind], numel, None)
            storage.data = self.load_storage(storage, key)
            self.storages[key] = storage
        return self.storages[key]

    def plain(self, key: Any) -> Any:
        """A dictionary's key or a set's member, checked: hashing a tuple of tuples may take forever or overflow the
        stack, and numbers can be chosen whose hashes collide.
        """
        if isinstance(key, str):
            return key
        parts = key if isinstance(key, tuple) else (key,)
        kinds = bytes | int | float | str | None | Name | Placeholder
        if len(parts) > MAX_DEPTH or not all(isinstance(part, kinds) for part in parts):
            raise CheckpointError(f"a dictionary or set has a {type(key).__name__} as a key")
        if isinstance(key, int):
            self.number_keys += 1
            fits = abs(key) <= MAX_NUMBER and self.number_keys <= MAX_NUMBERS
        else:
            self.odd_keys += 1
            fits = self.odd_keys <= MAX_ODD
        if not fits:
            raise CheckpointError("its keys that are no text are more, or larger, than a network's")
        return key

    def build_set(self, items: Any) -> set[Any]:
        """A set that uses its list up: a pickle could else copy the same list again with every call."""
        if not isinstance(items, list):
            raise CheckpointError(f"a set is made of a {type(items).__name__}")
        made = {self.plain(item) for item in items}
        items.clear()
        return made

    def load_reduce(self) -> None:
        """What a call makes: a tensor or plain container where the name is known, else a placeholder."""
        args, name = self.stack.pop(), self.stack[-1]
        if not isinstance(name, Name) or not isinstance(args, tuple):
            raise CheckpointError("the pickle calls something that is not a name")
        known = self.build_set if name.text in SETS else KNOWN.get(name.text)
        self.stack[-1] = Placeholder(name.text) if known is None else known(*args)

    def load_build(self) -> None:
        state = self.stack.pop()
        if isinstance(self.stack[-1], Placeholder):
            self.stack[-1].state = state

    def add(self, kind: type, items: list[Any]) -> None:
        target = self.stack[-1]
        if kind is dict and isinstance(target, dict):
            target.update(zip(map(self.plain, items[::2]), items[1::2], strict=True))
        elif kind is list and isinstance(target, list):
            target.extend(items)
        elif kind is set and isinstance(target, set):
            target.update(map(self.plain, items))
        elif not isinstance(target, Placeholder):  # whose items are left out where its class is a list or set
            raise CheckpointError(f"the pickle adds items to a {type(target).__name__}")

    dispatch[pickle.REDUCE[0]] = load_reduce
    dispatch[pickle.NEWOBJ[0]] = load_reduce
    dispatch[pickle.BUILD[0]] = load_build
    dispatch[pickle.APPEND[0]] = lambda self: self.add(list, [self.stack.pop()])
    dispatch[pickle.APPENDS[0]] = lambda self: self.add(list, self.pop_mark())
    dispatch[pickle.SETITEM[0]] = lambda self: self.add(dict, [self.stack.pop(-2), self.stack.pop()])
    dispatch[pickle.SETITEMS[0]] = lambda self: self.add(dict, self.pop_mark())
    dispatch[pickle.ADDITEMS[0]] = lambda self: self.add(set, self.pop_mark())
    # What no checkpoint has: other ways to a call, the extension registry, a buffer as large as the file claims,
    # numbers of any length, containers built another way.
    for name in REFUSED.split():
        del dispatch[getattr(pickle, name)[0]]


def map_numbers(mapped: mmap.mmap, start: int, size: int, storage: Storage, key: str) -> Tensor:
    """`storage.numel` numbers at byte `start` of the file, of which `size` bytes are theirs."""
    if storage.numel * storage.dtype.itemsize > size or start + size > len(mapped):
        raise CheckpointError(f"storage {key} claims {storage.numel} numbers; the file holds {size} bytes of it")
    if storage.numel == 0:
        return torch.empty(0, dtype=storage.dtype)
    numbers = torch.frombuffer(mapped, dtype=storage.dtype, count=storage.numel, offset=start)
    if storage.dtype == torch.bool and numbers.view(torch.uint8).max() > 1:  # undefined in C++
        raise CheckpointError(f"storage {key} is of truth values, but holds other numbers than 0 and 1")
    return numbers


def read_zip(path: Path, mapped: mmap.mmap) -> Any:
    with zipfile.ZipFile(path) as archive:
        entries = {info.filename: info for info in archive.infolist()}
        pickles = [name for name in archive.namelist() if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(pickles) != 1:
        raise CheckpointError("the zip archive holds no data.pkl, or several: it is not a PyTorch file")
    root = pickles[0][: -len("data.pkl")]

    def locate(name: str) -> tuple[int, int]:
        info = entries.get(name)
        if info is None or info.compress_type != zipfile.ZIP_STORED:
            raise CheckpointError(f"{name} is missing, or compressed, which PyTorch never does")
        if info.header_offset not in range(len(mapped) - 30):
            raise CheckpointError(f"{name} lies outside of the file")
        name_size, extra_size = struct.unpack_from("<HH", mapped, info.header_offset + 26)
        return info.header_offset + 30 + name_size + extra_size, info.file_size

    def read(name: str) -> bytes:
        start, size = locate(name)
        return mapped[start : start + size]

    if f"{root}byteorder" in entries and read(f"{root}byteorder") != b"little":
        raise CheckpointError("the file was written on a big-endian machine; save it again on a little-endian one")

    def load_storage(storage: Storage, key: str) -> Tensor:
        return map_numbers(mapped, *locate(f"{root}data/{key}"), storage, key)

    return Unpickler(io.BytesIO(read(pickles[0])), load_storage).load()


def read_legacy(mapped: mmap.mmap) -> Any:
    """Pickles of a magic number, a protocol, the machine and the object, the storages' keys, then the numbers."""

    def load(load_storage: Callable[[Storage, str], Tensor | None]) -> tuple[Any, dict[str, Storage]]:
        unpickler = Unpickler(mapped, load_storage)
        return unpickler.load(), unpickler.storages

    if load(lambda storage, key: None)[0] != LEGACY_MAGIC:
        raise CheckpointError("a pickle, but not one that PyTorch wrote")
    for _ in range(2):
        load(lambda storage, key: None)
    start = mapped.tell()
    _, storages = load(lambda storage, key: None)  # once to get past it: the numbers stand behind
    keys = load(lambda storage, key: None)[0]
    places, place = {}, mapped.tell()
    for key in keys if isinstance(keys, list) else []:
        if type(key) is not str or key not in storages or place + 8 > len(mapped):
            raise CheckpointError("a storage is listed but the file ends or does not use it")
        size = struct.unpack_from("<q", mapped, place)[0] * storages[key].dtype.itemsize
        places[key] = (place + 8, size)
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
    message = f"not a PyTorch or safetensors file (it begins with {bytes(mapped[:8])!r})"
    try:
        if mapped[:2] == b"PK":
            return read_zip(path, mapped)
        if mapped[8:9] == b"{":
            from safetensors.torch import load_file

            return load_file(path)
        if mapped[:1] == b"\x80":
            return read_legacy(mapped)
    except CheckpointError as error:
        message = str(error)
    except RecursionError:
        message = "nested deeper than any checkpoint"
    except Exception as error:  # whatever a broken pickle or archive trips over is one thing to its reader
        message = f"truncated or damaged ({type(error).__name__}: {error})"
    raise one_line(path, message)


def module_tensors(module: Any) -> dict[str, Tensor]:
    """The state dict of a module that was pickled whole, or of a TorchScript module: tensors by dotted name.

    Raises CheckpointError for a tree that no network has.
    """
    seen = 0

    def walk(node: Any, prefix: str, depth: int) -> Iterator[tuple[str, Tensor]]:
        nonlocal seen
        state: dict[Any, Any] = node.state if isinstance(node, Placeholder) and isinstance(node.state, dict) else {}
        parts = [part for key in ("_parameters", "_buffers", "_modules") if isinstance(part := state.get(key), dict)]
        for part in parts or [state]:
            for name, value in part.items():
                seen += 1
                if depth > MAX_DEPTH or seen > MAX_ITEMS or not isinstance(name, str) or len(prefix + name) > MAX_NAME:
                    raise CheckpointError("modules nested deeper or wider than any network, or without names")
                if isinstance(value, Tensor):
                    yield f"{prefix}{name}", value
                elif isinstance(value, Placeholder):
                    yield from walk(value, f"{prefix}{name}.", depth + 1)

    return dict(walk(module, "", 0))
