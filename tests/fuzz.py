"""Feeds `read_archive` broken and hostile files for as long as it is told to: `python tests/fuzz.py MINUTES [SEED]`.

Every file must be read or be refused by one CheckpointError, in little time and memory, without a process, a socket or
a file written. A file that does otherwise is kept in the folder `fuzz-found`, to become a test.
"""

from __future__ import annotations

import collections
import encodings.cp437
import encodings.raw_unicode_escape  # noqa: F401
import json
import pickle
import random
import resource
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from dall3.archive import CheckpointError, Placeholder, module_tensors, read_archive
from test_archive import ATTACKS, CONTAINERS, Net, Unknown, contain, save, script, tensor, touch

OPCODES = [code for code in vars(pickle).values() if isinstance(code, bytes) and len(code) == 1]
MEMO = (b"h", b"j", b"r", b"q", b"\x94")
EXTREMES = (0, 1, -1, 127, 128, 255, 256, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, -(2**63))
WATCHED = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.", "exec", "compile")
SECONDS, MEMORY = 5, 256 << 20


class Forbidden(BaseException):
    """The reader did what it must not do."""


watching = False


def watch(event: str, args: tuple[Any, ...]) -> None:
    if not watching:
        return
    writes = event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+")
    if writes or event.startswith(WATCHED) or (event == "import" and args[0] in ("antigravity", "this", "pdb")):
        raise Forbidden(f"{event} {args}")


def pickles() -> list[bytes]:
    """Pickles to start from: what checkpoints hold, of every protocol, and attacks."""
    value = {"a": [1, (2.5, None, True)], "b": {"c": 2**70, 3: {4}}, "d": collections.OrderedDict(x=b"y"), "s": "ü" * 9}
    plain = [pickle.dumps(value, protocol)[: -1 if protocol < 2 else None] for protocol in range(6)]
    plain = [body[2:-1] if body[:1] == b"\x80" else body for body in plain]
    tensors = [tensor(), tensor((2, 2), (2, 1)), tensor((4,), (1,), 0, kind="BoolStorage"), b"}" + tensor() + b"s"]
    return plain + tensors + [attack("/nonexistent/x") for attack in ATTACKS.values()]


def files(folder: Path) -> list[bytes]:
    """Files to start from, of every container."""
    base = torch.arange(12.0).reshape(3, 4)
    value = {"a": base, "b": base.t(), "c": torch.ones(3, dtype=torch.bool), "o": Unknown(), "d": {"e": [1, (2, {3})]}}
    paths = [
        save(value, folder / f"{form}{protocol}", form, protocol) for form in CONTAINERS[:2] for protocol in (2, 4)
    ]
    paths.append(script(folder / "script", Net()))
    save_file({"a": base, "b": torch.ones(2)}, folder / "safetensors")
    return [path.read_bytes() for path in (*paths, folder / "safetensors")]


def mutate(data: bytes, others: list[bytes], draw: random.Random) -> bytes:
    """One to eight small changes."""
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 4, 8))):
        at, other = draw.randrange(len(changed) + 1), draw.choice(others)
        end = min(len(changed), at + draw.choice((1, 2, 4, 8, 32)))
        kind = draw.randrange(8)
        if kind == 0 and changed:
            changed[at % len(changed)] ^= 1 << draw.randrange(8)
        elif kind == 1:
            changed[at:at] = draw.choice(OPCODES)
        elif kind == 2:
            changed[at:end] = b""
        elif kind == 3:
            changed[at:at] = changed[at:end] * draw.choice((1, 2, 50))
        elif kind == 4:
            start = draw.randrange(len(other) + 1)
            changed[at:at] = other[start : start + draw.choice((4, 16, 64))]
        elif kind == 5:
            number = draw.choice(EXTREMES)
            form = draw.choice([form for form in "bBhHiIqQ" if fits(number, form)])
            changed[at : at + struct.calcsize(form)] = struct.pack("<" + form, number)
        elif kind == 6:
            changed[at:at] = draw.choice(MEMO) + struct.pack("<i", draw.choice((0, 1, 2**31 - 1)))
        else:
            changed[at:] = changed[at:] if draw.random() < 0.5 else b""
    return bytes(changed)


def fits(number: int, form: str) -> bool:
    bits = 8 * struct.calcsize(form)
    return (0 <= number < 2**bits) if form.isupper() else (-(2 ** (bits - 1)) <= number < 2 ** (bits - 1))


def try_file(path: Path) -> str:
    """Read a file and everything in it: "read" or "refused". Raises what must not be."""
    global watching
    watching = True
    signal.alarm(SECONDS)
    try:
        found = read_archive(path)
        touch(found)
        if isinstance(found, Placeholder):
            touch(module_tensors(found))
        return "read"
    except CheckpointError as error:
        line = str(error)
        if not line.isprintable() or len(line) > 1100 + len(str(path)) or "MemoryError" in line or "allocate" in line:
            raise Forbidden(line) from error
        return "refused"
    finally:
        signal.alarm(0)
        watching = False


def too_long(number: int, frame: Any) -> None:
    raise Forbidden(f"took more than {SECONDS} s")


def fuzz(minutes: float, seed: int, report: Callable[[str], None] = print) -> int:
    """How many files did what they must not."""
    draw, counts, bad = random.Random(seed), collections.Counter[str](), 0
    sys.addaudithook(watch)
    signal.signal(signal.SIGALRM, too_long)
    with tempfile.TemporaryDirectory() as folder:
        whole, inside, path = files(Path(folder)), pickles(), Path(folder) / "file.pt"
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
        end = time.monotonic() + 60 * minutes
        while time.monotonic() < end:
            if draw.random() < 0.3:
                path.write_bytes(mutate(draw.choice(whole), whole, draw))
            else:
                contain(
                    path,
                    mutate(draw.choice(inside), inside, draw),
                    draw.choice(CONTAINERS),
                    bytes(draw.choice((0, 16))),
                )
            try:
                counts[try_file(path)] += 1
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                bad += 1
                kept = Path("fuzz-found") / f"{seed}-{bad}"
                kept.parent.mkdir(exist_ok=True)
                kept.write_bytes(path.read_bytes())
                report(f"{kept}: {type(error).__name__}: {' '.join(traceback.format_exception_only(error))[:300]}")
    report(json.dumps(dict(counts) | {"bad": bad, "seed": seed, "minutes": minutes}))
    return bad


if __name__ == "__main__":
    sys.exit(1 if fuzz(float(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0) else 0)
