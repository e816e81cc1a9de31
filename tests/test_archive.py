"""Reading checkpoints as data: files of torch.save are read back, and hostile or damaged files raise one error."""

import collections
import contextlib
import copyreg
import gc
import json
import os
import pickle
import random
import resource
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from dall3.weights.archive import DTYPES, LEGACY_MAGIC, CheckpointError, Name, Placeholder, module_tensors, read_archive

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning", "ignore:.torch.jit:DeprecationWarning")
FORMATS = ("zip", "legacy")
CONTAINERS = (*FORMATS, "torchscript")


class Unknown:
    """A class that the reader does not know."""


class Trap:
    """A class that writes a file when it is created or given a state."""

    def __new__(cls, target, *unused):
        Path(target).touch()
        return super().__new__(cls)

    def __init__(self, *unused, **more):
        pass

    def __setstate__(self, target):
        Path(target).touch()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, x):
        return self.first(x) * self.scale


def save(value, path, form, protocol=2):
    torch.save(value, path, _use_new_zipfile_serialization=form == "zip", pickle_protocol=protocol)
    return path


def script(path, module):
    torch.jit.save(torch.jit.script(module), path)
    return path


# Functions that write opcodes: a text, a name, any plain value, a storage, a tensor.


def text(value):
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def name(module, attribute):
    return f"c{module}\n{attribute}\n".encode()


def plain(value):
    return pickle.dumps(value, 2)[2:-1]


def storage(key="0", numel=4, kind="FloatStorage", *more):
    values = (plain(value) for value in (numel, *more))
    return b"(" + text("storage") + name("torch", kind) + plain(key) + text("cpu") + b"".join(values) + b"tQ"


def tensor(size=(4,), stride=(1,), offset=0, **more):
    numbers = b"".join(plain(value) for value in (offset, size, stride))
    return name("torch._utils", "_rebuild_tensor_v2") + b"(" + storage(**more) + numbers + b"\x89}tR"


def contain(path, body, form, record=bytes(16)):
    """Write a file with the pickle `body` and one storage "0" with the bytes `record`."""
    body = b"\x80\x04" + body + b"."
    if form == "legacy":
        header = (pickle.dumps(value, 2) for value in (LEGACY_MAGIC, 1001, {"little_endian": True}))
        keys, width = ["0"] if b"Storage" in body else [], 1 if b"BoolStorage" in body else 4
        tail = pickle.dumps(keys, 2) + struct.pack("<q", len(record) // width) + record
        path.write_bytes(b"".join(header) + body + tail)
        return path
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", body)
        archive.writestr("archive/data/0", record)
        if form == "torchscript":
            archive.writestr("archive/constants.pkl", b"\x80\x02).")
            archive.writestr("archive/code/__torch__.py", "import os; os._exit(1)", zipfile.ZIP_DEFLATED)
    return path


@contextlib.contextmanager
def bounded_memory(extra=1 << 30):
    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + extra, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def refused(path, match=None):
    """Check that reading fails with a short one-line message that names the file, with little memory; return it."""
    with bounded_memory(), pytest.raises(CheckpointError, match=match) as caught:
        read_archive(path)
    line = str(caught.value)
    assert line.startswith(f"{path}: ") and line.isprintable() and len(line) < len(str(path)) + 1010
    assert "MemoryError" not in line and "allocate" not in line
    return line


def touch(found, seen=None):
    """Read every number in `found`."""
    seen = set() if seen is None else seen
    if isinstance(found, torch.Tensor):
        found.clone().sum()
    elif isinstance(found, dict | list | tuple | set) and id(found) not in seen:
        seen.add(id(found))
        for part in [*found.values(), *found] if isinstance(found, dict) else found:
            touch(part, seen)


# Files written by torch.


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("protocol", (2, 3, 4, 5))
def test_plain_values_come_back(tmp_path, form, protocol):
    value = {
        "list": [1, -5, 2**70, 2.5, True, None, "ü", [], [[1], {}]],
        "tuple": ((), (1,), (1, (2, "x"))),
        "ordered": collections.OrderedDict(b=1, a=collections.OrderedDict()),
        "default": collections.defaultdict(list, {"x": [1]}),
        "set": {1, "a", (2, 3)},
        "size": torch.Size((2, 3)),
        7: {(1, "two"): 3.0, None: 0},
    }
    assert read_archive(save(value, tmp_path / "a.pt", form, protocol)) == value


@pytest.mark.parametrize("form", FORMATS)
def test_tensors_come_back(tmp_path, form):
    base = torch.arange(24.0).reshape(4, 6)
    value = {str(dtype): torch.tensor([[0, 1], [1, 3]]).to(dtype) for dtype in DTYPES.values()}
    value |= {"base": base, "row": base[2], "turned": base.t(), "strided": base[1::2, ::3], "scalar": torch.tensor(3.5)}
    value |= {"empty": torch.empty(0), "empty3": torch.empty(2, 0, 3), "parameter": nn.Parameter(torch.ones(3))}
    found = read_archive(save(value, tmp_path / "a.pt", form))
    for key, wanted in value.items():
        assert found[key].dtype == wanted.dtype and torch.equal(found[key], wanted), key
    found["base"][2, 0] = 99
    assert found["row"][0] == found["turned"][0, 2] == 99  # still one shared storage


@pytest.mark.parametrize("form", FORMATS)
def test_tensors_are_mapped_and_private(tmp_path, form):
    path = save({"x": torch.zeros(1000)}, tmp_path / "a.pt", form)
    before = path.read_bytes()
    found = read_archive(path)
    found["x"].fill_(7)
    assert path.read_bytes() == before and torch.equal(read_archive(path)["x"], torch.zeros(1000))


def test_reading_takes_no_memory(tmp_path):
    path = save({"x": torch.zeros(1 << 28, dtype=torch.uint8)}, tmp_path / "a.pt", "zip")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = read_archive(path)
    assert found["x"].numel() == 1 << 28
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 16  # KiB


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("protocol", (2, 4))
def test_unknown_classes_are_placeholders(tmp_path, form, protocol):
    unknown = Unknown()
    unknown.tensor, unknown.inner = torch.ones(2), Unknown()
    value = {
        "object": unknown,
        "queue": collections.deque([1]),
        Unknown: {"score": 1},
        "module": torch.nn.functional.relu,
    }
    found = read_archive(save(value, tmp_path / "a.pt", form, protocol))
    made = found["object"]
    assert type(made) is Placeholder and made.name == f"{Unknown.__module__}.Unknown"
    assert torch.equal(made.state["tensor"], torch.ones(2)) and type(made.state["inner"]) is Placeholder
    assert found[Name(f"{Unknown.__module__}.Unknown")] == {"score": 1}
    assert found["module"] == Name("torch.nn.functional.relu")
    assert repr(made) == f"<{Unknown.__module__}.Unknown>"


@pytest.mark.parametrize("form", FORMATS)
def test_a_pickled_module_is_read(tmp_path, form):
    wanted = Net().state_dict()
    net = Net()
    net.load_state_dict(wanted)
    found = module_tensors(read_archive(save(net, tmp_path / "a.pt", form)))
    assert list(found) == ["scale", *(key for key in wanted if key != "scale")]
    assert all(torch.equal(found[key], tensor) for key, tensor in wanted.items())


def test_torchscript(tmp_path):
    net = Net()
    found = module_tensors(read_archive(script(tmp_path / "a.pt", net)))
    assert found.keys() == net.state_dict().keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in net.state_dict().items())


def test_safetensors(tmp_path):
    wanted = {"a": torch.arange(6).reshape(2, 3), "b": torch.ones(3, dtype=torch.bfloat16), "c": torch.tensor(True)}
    save_file(wanted, tmp_path / "a.safetensors")
    found = read_archive(tmp_path / "a.safetensors")
    assert found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)


# Pickles that try to run code.

TRAP = (Trap.__module__, "Trap")
ATTACKS = {
    "os.system": lambda at: name("os", "system") + text(f"touch {at}") + b"\x85R",
    "posix.system": lambda at: name("posix", "system") + text(f"touch {at}") + b"\x85R",
    "eval": lambda at: name("builtins", "eval") + text(f"open({at!r}, 'w')") + b"\x85R",
    "exec": lambda at: name("builtins", "exec") + text(f"open({at!r}, 'w')") + b"\x85R",
    "subprocess": lambda at: name("subprocess", "call") + plain((["touch", at],)) + b"R",
    "hub": lambda at: name("torch.hub", "load") + text(at) + b"\x85R",
    "NEWOBJ": lambda at: name(*TRAP) + text(at) + b"\x85\x81",
    "NEWOBJ_EX": lambda at: name(*TRAP) + text(at) + b"\x85}\x92",
    "INST": lambda at: b"(" + text(at) + f"i{TRAP[0]}\nTrap\n".encode(),
    "OBJ": lambda at: b"(" + name(*TRAP) + text(at) + b"o",
    "BUILD": lambda at: (
        name("copyreg", "_reconstructor") + name(*TRAP) + name("builtins", "object") + b"N\x87R" + text(at) + b"b"
    ),
    "STACK_GLOBAL": lambda at: text("os") + text("system") + b"\x93" + text(f"touch {at}") + b"\x85R",
    "EXT": lambda at: b"\x82\xf0" + text(f"touch {at}") + b"\x85R",
}


@pytest.fixture
def canary(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "load", lambda target: Path(target).touch())
    copyreg.add_extension("os", "system", 0xF0)
    yield tmp_path / "canary"
    copyreg.remove_extension("os", "system", 0xF0)


@pytest.mark.parametrize("form", CONTAINERS)
@pytest.mark.parametrize("attack", ATTACKS)
def test_no_code_is_run(tmp_path, canary, form, attack):
    body = ATTACKS[attack](str(canary))
    pickle.loads(b"\x80\x04" + body + b".")
    assert canary.exists()  # the trap itself works
    canary.unlink()
    inside = b"}" + text("x") + tensor() + b"s" + text("epoch") + body + b"s"
    for number, stream in enumerate((body, inside)):
        path = contain(tmp_path / f"{number}.pt", stream, form)
        with contextlib.suppress(CheckpointError):
            found = read_archive(path)
            found = found["epoch"] if stream is inside else found
            assert type(found) is Placeholder
        assert not canary.exists()


@pytest.mark.parametrize(
    "state", ({"text": "os.system", "__class__": 1}, (None, {"text": "x", "__setattr__": None}), "x")
)
@pytest.mark.parametrize(
    "target",
    (
        name("torch._utils", "_rebuild_tensor_v2"),
        name("builtins", "set"),
        tensor(),
        name("collections", "OrderedDict") + b")R",
        b"]",
        b"N",
    ),
)
def test_setstate_data_changes_no_name(tmp_path, target, state):
    before = read_archive(contain(tmp_path / "a.pt", target, "zip"))
    after = read_archive(contain(tmp_path / "b.pt", target + plain(state) + b"b", "zip"))
    assert repr(after) == repr(before) and type(after) is type(before)


# Pickles that try to use memory or time, or to crash. Those without effect are read; the others are refused.

MANY = 100_000
TWICE = b"2\x86"  # (x, x)
REFUSED = {
    "calls a number": (b"K\x01)R", "not a name"),
    "calls what a call gave": (name("builtins", "getattr") + b")R)R", "not a name"),
    "calls with a list": (name("a", "b") + b"]R", "not a name"),
    "numbers that collide": (
        b"}(" + b"".join(plain(k * (2**61 - 1)) + b"N" for k in range(1, 9)) + b"u",
        "not strings",
    ),
    "many numbers": (b"}(" + b"".join(plain(k) + b"N" for k in range(20_001)) + b"u", "not strings"),
    "many pairs": (b"}(" + b"".join(plain((k, 0)) + b"N" for k in range(1001)) + b"u", "not strings"),
    "numbers in many sets": (b"(" + (b"\x8f(" + b"".join(map(plain, range(3000))) + b"\x90") * 7 + b"t", "not strings"),
    "bytes": (b"\x8e" + struct.pack("<Q", 2**40) + b"x", "damaged"),
    "bytearray": (b"\x96" + struct.pack("<Q", 2**40) + b"x", "damaged"),
    "text": (b"\x8d" + struct.pack("<Q", 2**40) + b"x", "damaged"),
    "frame": (b"\x95" + struct.pack("<Q", 2**62), "damaged"),
    "number": (b"\x8b" + struct.pack("<i", 2**31 - 1) + b"x", "damaged"),
    "digits": (b"L" + b"9" * 10 * MANY + b"L\n", "damaged"),
    "buffer": (b"\x97", "damaged"),
    "no opcode": (b"\xff", "damaged"),
    "empty stack": (b"0", "damaged"),
    "deep key": (b"})" + b"\x85" * 10 * MANY + b"Ns", "a key of type tuple"),
    "wide key": (b"})" + TWICE * 60 + b"Ns", "a key of type tuple"),
    "long key": (b"}(" + b"N" * 65 + b"tNs", "a key of type tuple"),
    "wide member": (b"\x8f(" + b")" + TWICE * 60 + b"\x90", "a key of type tuple"),
    "wide set": (name("builtins", "set") + b"()" + TWICE * 60 + b"l\x85R", "a key of type tuple"),
    "set of a tensor": (name("builtins", "set") + tensor((2**40, 0), (1, 1)) + b"\x85R", "a set is built from a"),
    "list as a key": (b"}]Ns", "a key of type list"),
    "odd items": (b"}(NNNu", "damaged"),
    "old dictionary": (b"(NNd", "damaged"),
    "wide reference": (b")" + TWICE * 60 + b"Q", "other than a storage"),
    "text reference": (b"Pstorage\n", "other than a storage"),
    "wide storage name": (storage().replace(plain("0"), b")" + TWICE * 60), "no name"),
    "adds to a tensor": (tensor() + b"(" + tensor() + b"\x90", "adds items to a "),
    "sets in a tensor": (tensor() + b"K\x00K\x01s", "adds items to a "),
    "appends to a tensor": (tensor() + b"Na", "adds items to a "),
    "appends to a name": (name("os", "environ") + b"Na", "adds items to a Name"),
    "control characters": (storage("\x1b[2J\n", kind="Odd"), r"storage \?\[2J has an unknown type"),
    "lone surrogate": (b"X\x03\0\0\0\xed\xa0\x80".join(storage(kind="Odd").split(plain("0"))), "unknown type"),
    "endless name": (storage("x" * MANY, kind="Odd"), "xxx"),
    "no such storage": (storage("../../etc/passwd"), "passwd"),
    "unknown kind": (storage(kind="QInt8"), "QInt8"),
    "view of a storage": (storage("0", 4, "FloatStorage", ("1", 0, 2)), "unknown type"),
    "too many numbers": (storage(numel=5), "claims 5 elements"),
    "far too many numbers": (storage(numel=2**62), "claims"),
    "negative numbers": (storage(numel=-1), "unknown type"),
    "True numbers": (storage(numel=True), "no size"),
    "beyond": (tensor((5,)), "exceeds its storage of 4"),
    "offset beyond": (tensor((4,), (1,), 1), "exceeds its storage"),
    "stride beyond": (tensor((2, 2), (3, 1)), "exceeds its storage"),
    "scalar beyond": (tensor((), (), 4), "exceeds its storage"),
    "expanded": (tensor((2**40,), (0,)), "exceeds its storage"),
    "expanded twice": (tensor((4, 2), (1, 0)), "exceeds its storage"),
    "negative size": (tensor((-1,)), "invalid size, stride or offset"),
    "negative stride": (tensor((2,), (-1,), 1), "invalid size, stride or offset"),
    "negative offset": (tensor((1,), (1,), -1), "invalid size, stride or offset"),
    "True size": (tensor((True,)), "invalid size, stride or offset"),
    "float size": (tensor((2.0,)), "invalid size, stride or offset"),
    "fewer strides": (tensor((2, 2), (1,)), "invalid size, stride or offset"),
    "size no tuple": (tensor(4, 1), "no size"),
    "endless shape": (tensor((1,) * 65, (1,) * 65), "invalid size, stride or offset"),
    "endless sizes": (tensor((1 << 2000,) * 9, (1 << 2000,) * 9), "a tensor of shape"),
    "empty and endless": (tensor((0, 1 << 2000), (1, 1)), "damaged"),
    "no storage": (name("torch._utils", "_rebuild_tensor_v2") + plain((None, 0, (), ())) + b"R", "no storage"),
    "no arguments": (name("torch._utils", "_rebuild_tensor_v2") + b")R", "damaged"),
    "odd truth": (tensor((4,), kind="BoolStorage"), "0 and 1"),
}
HARMLESS = {
    "memo": text("x") + b"r" + struct.pack("<I", 2**31),
    "deep tuples": b")" + b"\x85" * 10 * MANY,
    "deep lists": b"]" * MANY + b"a" * (MANY - 1),
    "deep dictionaries": b"}" + (text("x") + b"}") * MANY + b"s" * MANY,
    "deep objects": (name("a", "b") + b")\x81") * MANY + b"b" * (MANY - 1),
    "wide tuple": b")" + TWICE * 100,
    "itself": b"]q\x00h\x00a",
    "many marks": b"(" * MANY + b"t" * MANY,
    "many sizes": (
        b"(" + b"N" * MANY + b"tq\x00" + name("torch", "Size") + b"q\x01(" + b"h\x01h\x00\x85R" * MANY + b"t"
    ),
    "empty but long": tensor((2**40, 0), (1, 1)),
}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("case", REFUSED)
def test_hostile_pickles_are_refused(tmp_path, form, case):
    body, match = REFUSED[case]
    record = bytes([2, 0, 0, 1] * 4) if case == "odd truth" else bytes(16)
    if form == "legacy" and case == "no such storage":
        match = "lists an unused storage"
    refused(contain(tmp_path / "a.pt", body, form, record), match)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("case", HARMLESS)
def test_hostile_pickles_without_effect_are_read(tmp_path, form, case):
    with bounded_memory():
        found = read_archive(contain(tmp_path / "a.pt", HARMLESS[case], form))
        assert module_tensors(found) == {} or case == "deep objects"
        del found


def test_a_list_cannot_be_copied_many_times(tmp_path):
    numbers = b"".join(plain(number) for number in range(256, 4096))
    calls = b"h\x01h\x00\x85R" * 20_000
    body = b"(" + numbers + b"lq\x00" + name("builtins", "set") + b"q\x01(" + calls + b"t"
    with bounded_memory():
        found = read_archive(contain(tmp_path / "a.pt", body, "zip"))
    assert len(found[0]) == 3840 and not any(found[1:])


def module_of(items):
    """Opcodes of a placeholder with these `_modules`."""
    inside = b"".join(text(key) + value for key, value in items.items())
    return name("a", "Module") + b")\x81}" + text("_modules") + b"}(" + inside + b"usb"


@pytest.mark.parametrize("case", ("fan-out", "deep", "itself", "long names", "many tensors"))
def test_hostile_module_trees(tmp_path, case):
    many = 2000
    if case == "fan-out":
        body = module_of({"x": tensor()})
        for _ in range(60):
            body += b"q\x00" + module_of({"a": b"h\x00", "b": b"h\x00"})
    elif case == "deep":
        body = module_of({"x": tensor()})
        for _ in range(100):
            body += b"q\x00" + module_of({"a": b"h\x00"})
    elif case == "itself":
        body = name("a", "Module") + b")\x81q\x00}" + text("_modules") + b"}" + text("a") + b"h\x00ssb"
    elif case == "long names":
        body = module_of({"x" * MANY: tensor()})
    else:
        body = module_of({f"t{i}": tensor() for i in range(many)})
        body += b"q\x00" + module_of({f"m{i}": b"h\x00" for i in range(many)})
    found = read_archive(contain(tmp_path / "a.pt", body, "zip"))
    with bounded_memory(), pytest.raises(CheckpointError, match="too deep or too large, or has entries without a name"):
        module_tensors(found)


# Containers with wrong metadata.


@pytest.mark.parametrize("name", ("archive/data.pkl", "archive/data/0", "archive/byteorder"))
def test_zip_bombs(tmp_path, name):
    entries = {"archive/data.pkl": b"\x80\x02" + tensor() + b".", "archive/data/0": bytes(16)}
    entries |= {"archive/byteorder": b"little", name: bytes(1 << 28)}
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        for entry, data in entries.items():
            archive.writestr(entry, data, zipfile.ZIP_DEFLATED if entry == name else zipfile.ZIP_STORED)
    refused(tmp_path / "a.pt", f"{name} is missing, or compressed")


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    ("names", "match"),
    (
        (["archive/data.pkl", "archive/data.pkl"], "exactly one data.pkl"),
        (["a/data.pkl", "b/data.pkl"], "exactly one data.pkl"),
        (["data.pkl"], "exactly one data.pkl"),
        (["a/b/data.pkl"], "exactly one data.pkl"),
        (["archive/data.pkl"], "archive/data/0 is missing"),
        (["../data.pkl", "../0", "data/0"], "../data/0 is missing"),
        (["other"], "exactly one data.pkl"),
    ),
)
def test_zip_names(tmp_path, names, match):
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        for entry in names:
            archive.writestr(entry, b"\x80\x02" + tensor() + b".")
    refused(tmp_path / "a.pt", match)


@pytest.mark.parametrize("offset", (0, 40, 2**31, 2**32 - 2))
@pytest.mark.parametrize("size", (0, 15, 2**31))
def test_zip_entries_that_point_elsewhere(tmp_path, offset, size):
    """The central directory has a wrong offset or size of the storage."""
    path = contain(tmp_path / "a.pt", tensor(), "zip")
    data = bytearray(path.read_bytes())
    at = data.rindex(b"PK\x01\x02")
    struct.pack_into("<II", data, at + 20, size, size)
    struct.pack_into("<I", data, at + 42, offset)
    path.write_bytes(data)
    refused(path)


def test_a_big_endian_file(tmp_path):
    path = contain(tmp_path / "a.pt", tensor(), "zip")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/byteorder", "big")
    refused(path, "big-endian")


@pytest.mark.parametrize("numel", (-1, 3, -(2**63), 2**63 - 1))
def test_a_legacy_storage_of_another_size(tmp_path, numel):
    path = contain(tmp_path / "a.pt", tensor(), "legacy")
    data = path.read_bytes()
    path.write_bytes(data[:-24] + struct.pack("<q", numel) + data[-16:])
    refused(path, "claims 4 elements; the file holds")


@pytest.mark.parametrize(
    "keys", (b"]q\x00h\x00a", b")" + TWICE * 60 + b"\x85", b"])" + TWICE * 60 + b"a", plain(["1"]))
)
def test_legacy_lists_of_storages(tmp_path, keys):
    path = contain(tmp_path / "a.pt", tensor(), "legacy")
    path.write_bytes(path.read_bytes().replace(pickle.dumps(["0"], 2), b"\x80\x02" + keys + b"."))
    refused(path)


@pytest.mark.parametrize(
    "header",
    (
        {"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 16]}},
        {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 2**40]}},
        {"a": {"dtype": "F32", "shape": [4], "data_offsets": [16, 0]}},
        {"a": {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]}},
        {"a": {"dtype": "X", "shape": [4], "data_offsets": [0, 16]}},
        {"a": {"dtype": "F32", "shape": [2**63, 2**63], "data_offsets": [0, 16]}},
        {"a": 1},
        {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}, "b": {"dtype": "F32", "shape": [4]}},
    ),
)
def test_safetensors_headers_that_contradict_the_data(tmp_path, header):
    text = json.dumps(header).encode()
    (tmp_path / "a.pt").write_bytes(struct.pack("<Q", len(text)) + text + bytes(16))
    refused(tmp_path / "a.pt", "damaged")


def test_safetensors_with_an_endless_header(tmp_path):
    (tmp_path / "a.pt").write_bytes(struct.pack("<Q", 2**62) + b"{" + bytes(16))
    refused(tmp_path / "a.pt", "damaged")


@pytest.mark.parametrize(
    ("data", "match"),
    (
        (b"", "has only . bytes; expected a checkpoint"),
        (b"PK", "has only . bytes; expected a checkpoint"),
        (b"a text, which is no checkpoint\n", "not a PyTorch or safetensors file"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + bytes(9), "not a PyTorch or safetensors file"),
        (b"PK\x03\x04" + bytes(99), "damaged"),
        (pickle.dumps({"x": list(range(9))}, 2), "that PyTorch did not write"),
        (pickle.dumps(LEGACY_MAGIC, 2) + b"\x80\x02", "damaged"),
        (b"\x80\x02(lp0\n." + bytes(9), "that PyTorch did not write"),
    ),
)
def test_files_of_other_kinds(tmp_path, data, match):
    path = tmp_path / "a.pt"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=match) as caught:
        read_archive(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing.pt does not exist"):
        read_archive(tmp_path / "missing.pt")
    with pytest.raises(IsADirectoryError, match="is a folder"):
        read_archive(tmp_path)


# Random damage.


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    folder = tmp_path_factory.mktemp("samples")
    base = torch.arange(12.0).reshape(3, 4)
    value = {"a": base, "b": base.t(), "c": torch.ones(3, dtype=torch.bool), "o": Unknown(), "d": {"e": [1, (2, {3})]}}
    paths = {form: save(value, folder / form, form) for form in FORMATS}
    paths["torchscript"] = script(folder / "torchscript", Net())
    save_file({"a": base, "b": torch.ones(2)}, folder / "safetensors")
    return {form: path.read_bytes() for form, path in (paths | {"safetensors": folder / "safetensors"}).items()}


SAMPLES = (*CONTAINERS, "safetensors")


@pytest.mark.parametrize("form", SAMPLES)
def test_truncated(tmp_path, samples, form):
    data, path = samples[form], tmp_path / "a.pt"
    for end in random.Random(0).sample(range(16, len(data)), 40):
        path.write_bytes(data[:end])
        refused(path)


@pytest.mark.parametrize("form", SAMPLES)
def test_flipped_bits(tmp_path, samples, form):
    draw, path, read = random.Random(1), tmp_path / "a.pt", 0
    for _ in range(300):
        data = bytearray(samples[form])
        for _ in range(draw.choice((1, 1, 8))):
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        path.write_bytes(data)
        try:
            with bounded_memory():
                touch(read_archive(path))
            read += 1
        except CheckpointError as error:
            assert "\n" not in str(error) and "MemoryError" not in str(error)
    assert 0 < read < 300


@pytest.mark.parametrize("form", SAMPLES)
@pytest.mark.filterwarnings("error::ResourceWarning", "error::pytest.PytestUnraisableExceptionWarning")
def test_errors_leave_no_file_open(tmp_path, samples, form):
    path = tmp_path / "a.pt"
    path.write_bytes(samples[form][:-20])
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with pytest.raises(CheckpointError):
            read_archive(path)
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before
