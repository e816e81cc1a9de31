"""Safe reader of PyTorch files: no code in a file is executed.

It reads three formats: zip archives (torch 1.6 and later, and TorchScript), the legacy sequence of pickles, and
safetensors. Tensors are memory-mapped, not copied.
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
# Upper bounds: dimensions of a tensor, elements of a tuple key and depth of a module tree; entries of a module tree;
# length of a tensor's name. No network reaches them.
MAX_DEPTH, MAX_ITEMS, MAX_NAME = 64, 100_000, 1000
# Upper bounds on keys that are not strings: value of an integer, integers per file, other keys per file. Inserting n
# keys with colliding hashes takes time proportional to n².
MAX_NUMBER, MAX_NUMBERS, MAX_ODD = 2**53, 20_000, 1000


class CheckpointError(ValueError):
    """A checkpoint or configuration file is damaged or of an unexpected kind.

    The message says what was wrong, what was expected and what to do.
    """


def file_error(path: object, message: object) -> CheckpointError:
    """A CheckpointError with one printable line of limited length, also if `message` quotes names from the file."""
    text = " ".join(str(message).split())[:1000]
    return CheckpointError(f"{path}: {''.join(c if c.isprintable() else '?' for c in text)}")


@dataclass(frozen=True)
class Name:
    """The name of a class or function in a pickle. It is never imported."""

    text: str


class Placeholder(dict[Any, Any]):
    """An object of an unknown class: its items and its state, without the class."""

    __hash__ = object.__hash__  # type: ignore[assignment]

    def __init__(self, name: str) -> None:
        self.name, self.state = name, None

    def __repr__(self) -> str:
        return f"<{self.name}>"  # without the contents, which may be nested without bound


@dataclass(eq=False)
class Storage:
    """A storage in the file. `data` is a memory-mapped tensor (numel,), or None while its offset is unknown."""

    dtype: torch.dtype
    numel: int
    data: Tensor | None


def build_tensor(storage: Any, offset: Any, size: Any, stride: Any, *unused: Any) -> Tensor | None:
    """A strided view of a storage. Raises CheckpointError if the view exceeds the storage."""
    if not (isinstance(storage, Storage) and isinstance(size, tuple | list) and isinstance(stride, tuple | list)):
        raise CheckpointError("a tensor has no storage, no size or no strides")
    numbers = (offset, *size, *stride)
    if len(size) != len(stride) or len(size) > MAX_DEPTH or any(type(n) is not int or n < 0 for n in numbers):
        raise CheckpointError("a tensor has an invalid size, stride or offset")
    end = offset + 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    # A view with more elements than its storage (stride 0) would need unbounded memory once it is copied.
    if 0 not in size and max(end, math.prod(size)) > storage.numel:
        raise CheckpointError(f"a tensor of shape {tuple(size)} exceeds its storage of {storage.numel} elements")
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
    """The standard library's pure-Python unpickler, with every opcode that imports or calls something replaced.

    The C unpickler would allocate as much memory as a memo index in the file claims, up to 32 GB. The Python one uses a
    dictionary for the memo.
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
            return pid[1]  # legacy files store the source code of a module with its class
        if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage" or not isinstance(pid[1], Name):
            raise CheckpointError("the pickle refers to something other than a storage")
        kind, key, numel = pid[1].text.rsplit(".", 1)[-1].removesuffix("Storage"), pid[2], pid[4]
        if type(key) is not str or type(numel) is not int:
            raise CheckpointError("a storage has no name or no size")
        if kind not in DTYPES or numel < 0 or (len(pid) > 5 and pid[5] is not None):
            raise CheckpointError(f"storage {key} has an unknown type or an invalid size: {kind}, {numel} elements")
        if key not in self.storages:
            storage = Storage(DTYPES[kind], numel, None)
            storage.data = self.load_storage(storage, key)
            self.storages[key] = storage
        return self.storages[key]

    def checked_key(self, key: Any) -> Any:
        """Check a dictionary key or set member and return it. Raises CheckpointError for a key that is unsafe to hash.

        Hashing nested tuples can take exponential time or overflow the stack, and integers can be chosen so that their
        hashes collide.
        """
        if isinstance(key, str):
            return key
        parts = key if isinstance(key, tuple) else (key,)
        kinds = bytes | int | float | str | None | Name | Placeholder
        if len(parts) > MAX_DEPTH or not all(isinstance(part, kinds) for part in parts):
            raise CheckpointError(f"a dictionary or set has a key of type {type(key).__name__}")
        if isinstance(key, int):
            self.number_keys += 1
            valid = abs(key) <= MAX_NUMBER and self.number_keys <= MAX_NUMBERS
        else:
            self.odd_keys += 1
            valid = self.odd_keys <= MAX_ODD
        if not valid:
            raise CheckpointError("it has too many or too large keys that are not strings")
        return key

    def build_set(self, items: Any) -> set[Any]:
        """Build a set and empty the list that it is made from, so that a pickle cannot copy the same list again."""
        if not isinstance(items, list):
            raise CheckpointError(f"a set is built from a {type(items).__name__}")
        made = {self.checked_key(item) for item in items}
        items.clear()
        return made

    def load_reduce(self) -> None:
        """Replace a call: by a tensor or plain container if the name is known, else by a placeholder."""
        args, name = self.stack.pop(), self.stack[-1]
        if not isinstance(name, Name) or not isinstance(args, tuple):
            raise CheckpointError("the pickle calls something that is not a name")
        known = self.build_set if name.text in SETS else KNOWN.get(name.text)
        self.stack[-1] = Placeholder(name.text) if known is None else known(*args)

    def load_build(self) -> None:
        """Replace the call of `__setstate__`: store the state of a placeholder, ignore that of any other object."""
        state = self.stack.pop()
        if isinstance(self.stack[-1], Placeholder):
            self.stack[-1].state = state

    def add(self, kind: type, items: list[Any]) -> None:
        """Add items to the container on top of the stack. kind: the container that the opcode expects."""
        target = self.stack[-1]
        if kind is dict and isinstance(target, dict):
            target.update(zip(map(self.checked_key, items[::2]), items[1::2], strict=True))
        elif kind is list and isinstance(target, list):
            target.extend(items)
        elif kind is set and isinstance(target, set):
            target.update(map(self.checked_key, items))
        elif not isinstance(target, Placeholder):  # items of a placeholder for a list or set subclass are ignored
            raise CheckpointError(f"the pickle adds items to a {type(target).__name__}")

    dispatch[pickle.REDUCE[0]] = load_reduce
    dispatch[pickle.NEWOBJ[0]] = load_reduce
    dispatch[pickle.BUILD[0]] = load_build
    dispatch[pickle.APPEND[0]] = lambda self: self.add(list, [self.stack.pop()])
    dispatch[pickle.APPENDS[0]] = lambda self: self.add(list, self.pop_mark())
    dispatch[pickle.SETITEM[0]] = lambda self: self.add(dict, [self.stack.pop(-2), self.stack.pop()])
    dispatch[pickle.SETITEMS[0]] = lambda self: self.add(dict, self.pop_mark())
    dispatch[pickle.ADDITEMS[0]] = lambda self: self.add(set, self.pop_mark())
    # Opcodes that no checkpoint uses: other kinds of calls, the extension registry, buffers of a size that the file
    # claims, integers of any length, and other ways to build containers.
    for name in REFUSED.split():
        del dispatch[getattr(pickle, name)[0]]


def map_storage(mapped: mmap.mmap, start: int, size: int, storage: Storage, key: str) -> Tensor:
    """Map the elements of a storage, which has `size` bytes from byte `start` of the file: a tensor (numel,).

    Raises CheckpointError if the storage claims more elements than the file holds.
    """
    if storage.numel * storage.dtype.itemsize > size or start + size > len(mapped):
        raise CheckpointError(f"storage {key} claims {storage.numel} elements; the file holds {size} bytes of it")
    if storage.numel == 0:
        return torch.empty(0, dtype=storage.dtype)
    numbers = torch.frombuffer(mapped, dtype=storage.dtype, count=storage.numel, offset=start)
    if storage.dtype == torch.bool and numbers.view(torch.uint8).max() > 1:  # undefined behaviour in C++
        raise CheckpointError(f"storage {key} is of dtype bool, but holds values other than 0 and 1")
    return numbers


def read_zip(path: Path, mapped: mmap.mmap) -> Any:
    with zipfile.ZipFile(path) as archive:
        entries = {info.filename: info for info in archive.infolist()}
        pickles = [name for name in archive.namelist() if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(pickles) != 1:
        raise CheckpointError("the zip archive does not hold exactly one data.pkl: it is not a PyTorch file")
    root = pickles[0][: -len("data.pkl")]

    def locate(name: str) -> tuple[int, int]:
        info = entries.get(name)
        if info is None or info.compress_type != zipfile.ZIP_STORED:
            raise CheckpointError(f"{name} is missing, or compressed, which PyTorch does not do")
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
        return map_storage(mapped, *locate(f"{root}data/{key}"), storage, key)

    return Unpickler(io.BytesIO(read(pickles[0])), load_storage).load()


def read_legacy(mapped: mmap.mmap) -> Any:
    """Read the legacy format: pickles of a magic number, the protocol, system information, the object and the keys of
    the storages, followed by the data of the storages.
    """

    def load(load_storage: Callable[[Storage, str], Tensor | None]) -> tuple[Any, dict[str, Storage]]:
        unpickler = Unpickler(mapped, load_storage)
        return unpickler.load(), unpickler.storages

    if load(lambda storage, key: None)[0] != LEGACY_MAGIC:
        raise CheckpointError("a pickle that PyTorch did not write")
    for _ in range(2):
        load(lambda storage, key: None)
    start = mapped.tell()
    _, storages = load(lambda storage, key: None)  # first pass without data, to find where the data begins
    keys = load(lambda storage, key: None)[0]
    positions, position = {}, mapped.tell()
    for key in keys if isinstance(keys, list) else []:
        if type(key) is not str or key not in storages or position + 8 > len(mapped):
            raise CheckpointError("it lists an unused storage, or ends before a storage's data")
        size = struct.unpack_from("<q", mapped, position)[0] * storages[key].dtype.itemsize
        positions[key] = (position + 8, size)
        position += 8 + max(size, 0)
    mapped.seek(start)
    return load(lambda storage, key: map_storage(mapped, *positions.get(key, (0, 0)), storage, key))[0]


def read_archive(path: str | Path) -> Any:
    """Read a file written by torch.save or torch.jit.save, or a safetensors file, without executing code in it.

    Returns the object in the file: tensors with their dtypes, memory-mapped; dictionaries, lists and numbers as Python
    objects; every other object as a `Placeholder`. Raises CheckpointError for a file that is damaged or of another
    format; FileNotFoundError; IsADirectoryError.

    >>> read_archive("vqgan.ckpt").keys()  # doctest: +SKIP
    dict_keys(['epoch', 'global_step', 'state_dict', ...])
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; expected a checkpoint file")
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; expected a checkpoint file")
    if path.stat().st_size < 16:
        raise CheckpointError(f"{path} has only {path.stat().st_size} bytes; expected a checkpoint file")
    with open(path, "rb") as file:
        # Copy-on-write: torch requires writable memory, and the file must never change.
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
        message = "nested too deeply for a checkpoint"
    except Exception as error:  # a damaged pickle or archive can raise any exception
        message = f"truncated or damaged ({type(error).__name__}: {error})"
    raise file_error(path, message)


def module_tensors(module: Any) -> dict[str, Tensor]:
    """The state dict of a pickled module or a TorchScript module: tensors by dotted name.

    Raises CheckpointError for a module tree beyond `MAX_DEPTH`, `MAX_ITEMS` or `MAX_NAME`.
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
                    raise CheckpointError("its module tree is too deep or too large, or has entries without a name")
                if isinstance(value, Tensor):
                    yield f"{prefix}{name}", value
                elif isinstance(value, Placeholder):
                    yield from walk(value, f"{prefix}{name}.", depth + 1)

    return dict(walk(module, "", 0))
