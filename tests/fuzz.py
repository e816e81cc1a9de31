"""Feed damaged and hostile files to the readers for the given time: `python tests/fuzz.py MINUTES [SEED]`.

Checkpoints, tokenizers, folders of parts, settings, recipes of images, weights.toml and taming's YAML: every file must
be read or refused with an expected error, quickly and with little memory. Readers must not start a process, open a
socket or write a file. Any file with another outcome is kept in the folder `fuzz-found`, to become a test. So is the
last file, in case the process dies.
"""

from __future__ import annotations

import collections
import encodings.cp437
import encodings.raw_unicode_escape  # noqa: F401
import json
import os
import pickle
import random
import re
import resource
import shutil
import signal
import struct
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save_file

from dall3 import Dall3Output, Dall3Pipeline
from dall3.loading import load_defaults
from dall3.models.unet import UNetConfig
from dall3.output import RECIPE
from dall3.request import make_request, request_of_recipe
from dall3.text import load_tokenizer
from dall3.weights.archive import CheckpointError, Placeholder, module_tensors, read_archive
from dall3.weights.convert.vae import read_taming_config
from dall3.weights.folder import BUNDLED, DEFAULTS, load_part
from dall3.weights.registry import bundled_registry_path, read_registry
from test_archive import ATTACKS, CONTAINERS, Net, Unknown, contain, save, script, tensor, touch

from originals import GOLDEN

OPCODES = [code for code in vars(pickle).values() if isinstance(code, bytes) and len(code) == 1]
MEMO = (b"h", b"j", b"r", b"q", b"\x94")
EXTREMES = (0, 1, -1, 127, 128, 255, 256, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, -(2**63))
CHANGES = "exec fork link mkdir posix_spawn remove rename rmdir symlink system truncate"
WATCHED = tuple(f"os.{name}" for name in CHANGES.split())
WATCHED += ("subprocess.Popen", "socket.", "exec", "compile")
SECONDS, MEMORY = 5, 256 << 20


class Forbidden(BaseException):
    """A reader did something that is not allowed."""


watching = False


def watch(event: str, args: tuple[Any, ...]) -> None:
    if not watching:
        return
    flags = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    writes = event == "open" and (set(args[1] or "") & set("wax+") or (isinstance(args[2], int) and args[2] & flags))
    if writes or event.startswith(WATCHED) or (event == "import" and args[0] in ("antigravity", "this", "pdb")):
        raise Forbidden(f"{event} {args}")


def pickles() -> list[bytes]:
    """Pickles to mutate: contents of checkpoints in every protocol, and attacks."""
    value = {"a": [1, (2.5, None, True)], "b": {"c": 2**70, 3: {4}}, "d": collections.OrderedDict(x=b"y"), "s": "ü" * 9}
    plain = [pickle.dumps(value, protocol)[: -1 if protocol < 2 else None] for protocol in range(6)]
    plain = [body[2:-1] if body[:1] == b"\x80" else body for body in plain]
    tensors = [tensor(), tensor((2, 2), (2, 1)), tensor((4,), (1,), 0, kind="BoolStorage"), b"}" + tensor() + b"s"]
    return plain + tensors + [attack("/nonexistent/x") for attack in ATTACKS.values()]


def files(folder: Path) -> list[bytes]:
    """Files to mutate, in every container format."""
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
            changed[at:] = b""
    return bytes(changed)


def fits(number: int, form: str) -> bool:
    bits = 8 * struct.calcsize(form)
    return (0 <= number < 2**bits) if form.isupper() else (-(2 ** (bits - 1)) <= number < 2 ** (bits - 1))


def read_checkpoint(path: Path) -> None:
    found = read_archive(path)
    touch(found)
    if isinstance(found, Placeholder):
        touch(module_tensors(found))


def read_tokenizer(path: Path) -> None:
    tokenizer = load_tokenizer(path)
    ids = tokenizer.encode("a cube made of cloud, ▁ünd 日本 </w>")
    tokenizer.decode([i for i in ids if i > 0])


def read_part(path: Path) -> None:
    """Read the file as the config.json of a part, or as its model.safetensors."""
    folder = path.parent / "part"
    shutil.copytree(BUNDLED / "vqgan", folder, dirs_exist_ok=True)
    shutil.copy(path, folder / ("config.json" if path.read_bytes()[:1] in (b"{", b"[") else "model.safetensors"))
    load_part(folder)


def read_settings(path: Path) -> None:
    """Read the file as the generation_config.json of a folder."""
    folder = path.parent / "settings"
    folder.mkdir(exist_ok=True)
    shutil.copy(path, folder / DEFAULTS)
    load_defaults(folder)


@cache
def pipeline() -> Dall3Pipeline:
    return Dall3Pipeline.from_pretrained()


def read_recipe(path: Path) -> None:
    """Read the file as the recipe of an image, without drawing it."""
    about, picture = PngInfo(), path.parent / "picture.png"
    about.add_itxt(RECIPE, path.read_text(encoding="utf-8", errors="replace"))
    Image.new("RGB", (4, 4)).save(picture, pnginfo=about)
    found = Dall3Output.load(picture)
    found.to_numpy(), found.recipe(0)
    request_of_recipe(pipeline(), found.recipe(0))


def recipes() -> list[bytes]:
    """Recipes to mutate, of images that were made with different settings."""
    pipe, found = pipeline(), []
    for settings in ({"top_k": 0.5}, {"seamless": True, "guidance_prompt": "a cube:2|a cone:-1", "scheduler": "ddpm"}):
        about = make_request(pipe, "a cube", num_images=1, seed=3, **settings).recipe() | {
            "weights": {"vqgan": "0" * 64}
        }
        recipe = dict(prompt="a cube", tokens=[1] * 256, clip_score=0.5, candidate=0, place=0, settings=about)
        found.append(json.dumps(recipe).encode())
        recipe["settings"] = about | {"kept": [-1, 3] * 128}
        found.append(json.dumps(recipe).encode())
    return found


def text_readers() -> list[tuple[Callable[[Path], Any], list[bytes]]]:
    """Readers of text files, and files to mutate."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2, "ü": 3, "üa": 4}, "merges": [["a", "b"], ["ü", "a"]]}
    plain = {"version": "1.0", "added_tokens": [], "pre_tokenizer": byte_level, "decoder": byte_level, "model": model}
    lower = {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]}
    yttm = (GOLDEN / "tokenizer/bpe.model").read_bytes()
    tokenizers = [yttm, json.dumps(plain | {"normalizer": lower}, ensure_ascii=False).encode()]
    tokenizers.append("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "cube", "##s", "猫"]).encode())
    configs = [(BUNDLED / name / "config.json").read_bytes() for name in ("vqgan", "transformer", "clip")]
    configs.append(json.dumps({"model": "UNet", **asdict(UNetConfig(32, (1, 2), 1, (1,), 64))}).encode())
    return [
        (read_tokenizer, tokenizers),
        (read_part, configs),
        (read_registry, [bundled_registry_path().read_bytes()]),
        (read_taming_config, [(GOLDEN / "gumbel_vq/model.yaml").read_bytes()]),
        (read_settings, [(BUNDLED / DEFAULTS).read_bytes(), b'{"temperature": 0.9, "top_k": 0.5, "cutn": 4}']),
        (read_recipe, recipes()),
    ]


def change_number(data: bytes, draw: random.Random) -> bytes:
    """Replace a number in a text, if it has one."""
    numbers = list(re.finditer(rb"\d+", data))
    if not numbers:
        return data
    place, number = draw.choice(numbers), draw.choice((*EXTREMES, 3.5, 1e300, "null", '"x"', "[1]", "{}"))
    return data[: place.start()] + str(number).encode() + data[place.end() :]


def try_file(path: Path, read: Callable[[Path], Any] = read_checkpoint) -> str:
    """Read a file and everything in it. Returns "read" or "refused"; raises any exception that is not allowed."""
    global watching
    watching = read is read_checkpoint  # the others import libraries and write files
    signal.alarm(SECONDS)
    try:
        read(path)
        return "read"
    except ValueError as error:
        line = str(error)
        odd = not line.isprintable() or len(line) > 1500 + len(str(path)) or "MemoryError" in line or "allocate" in line
        if odd or (read is read_checkpoint and not isinstance(error, CheckpointError)):
            raise Forbidden(f"{type(error).__name__}: {line}") from error
        return "refused"
    finally:
        signal.alarm(0)
        watching = False


def too_long(number: int, frame: Any) -> None:
    raise Forbidden(f"took more than {SECONDS} s")


def fuzz(minutes: float, seed: int, report: Callable[[str], None] = print) -> int:
    """Returns the number of files for which a reader did something that is not allowed."""
    draw, counts, bad = random.Random(seed), collections.Counter[str](), 0
    sys.addaudithook(watch)
    signal.signal(signal.SIGALRM, too_long)
    found = Path("fuzz-found")
    found.mkdir(exist_ok=True)
    path, readers = found / f"last-{seed}", text_readers()
    whole, inside = files(found), pickles()
    for read, starts in readers:
        for start in starts:
            path.write_bytes(start)
            with suppress(CheckpointError):  # settings without weights
                read(path)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    end = time.monotonic() + 60 * minutes
    while time.monotonic() < end:
        read: Callable[[Path], Any] = read_checkpoint
        kind = draw.random()
        if kind < 0.2:
            path.write_bytes(mutate(draw.choice(whole), whole, draw))
        elif kind < 0.7:
            contain(path, mutate(draw.choice(inside), inside, draw), draw.choice(CONTAINERS))
        else:
            read, starts = draw.choice(readers)
            start = draw.choice(starts)
            path.write_bytes(change_number(start, draw) if draw.random() < 0.5 else mutate(start, starts, draw))
        try:
            counts[f"{read.__name__}: {try_file(path, read)}"] += 1
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            bad += 1
            kept = found / f"{seed}-{bad}-{read.__name__}"
            kept.write_bytes(path.read_bytes())
            report(f"{kept}: {' '.join(traceback.format_exception_only(error))[:300]}")
    report(json.dumps(dict(counts) | {"bad": bad, "seed": seed, "minutes": minutes}))
    return bad


if __name__ == "__main__":
    sys.exit(1 if fuzz(float(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0) else 0)
