"""Verification of files of weights on this machine."""

from __future__ import annotations

import zipfile
from contextlib import suppress
from pathlib import Path

from dall3.weights.cache import SAME, CachedFile, pin_key, sha256_of, short_message


def verify_file(wanted: CachedFile, path: Path, thorough: bool = False) -> str | None:
    """Verify a file on this machine. Returns the problem, or None if the file is good.

    A file without an expected hash is checked by content and then pinned. thorough: hash the file even if its size and
    modification time have not changed since the last verification.
    """
    pins, found = wanted.pins, path.stat()
    known = {sha256 for place in wanted.file.places if (sha256 := wanted.sha256_at(place))}
    unchanged = (pins.size, pins.mtime_ns) == (found.st_size, found.st_mtime_ns)
    if unchanged and not thorough and pins.sha256 in known:
        return None
    in_cache = path == wanted.target
    if not in_cache and not known and not thorough:  # a user's own file without an expected hash
        return None
    sha256 = sha256_of(path)
    # A file that has no pins yet may come from a place without an expected hash.
    unpinned = next((place for place in wanted.file.places if wanted.sha256_at(place) is None), None)
    may_pin = not pins.sha256 and unpinned is not None
    if known and sha256 not in known and not may_pin:
        pinned = "" if any(place.sha256 for place in wanted.file.places) else f" (according to {wanted.pins_path})"
        return f"has SHA-256 {sha256}; expected {' or '.join(sorted(known))}{pinned}"
    if sha256 not in known:
        try:
            check_content(path, wanted)
        except Exception as error:
            return f"is not the file ({short_message(error)})"
    now = path.stat()
    if (now.st_size, now.st_mtime_ns) != (found.st_size, found.st_mtime_ns):
        return "changed while it was read"
    if known or in_cache:
        matching = (place for place in wanted.file.places if wanted.sha256_at(place) == sha256)
        place = next(matching, unpinned)
        key = SAME if place is None else pin_key(place)
        with suppress(OSError):  # the cache may be read-only
            wanted.set_pin(sha256, key, found)
    return None


def check_content(path: Path, wanted: CachedFile) -> None:
    """Check by content that a file without an expected hash is complete and of the right kind.

    Raises ValueError if it is not.
    """
    from dall3.text import check_tokenizer_file
    from dall3.weights.archive import read_archive
    from dall3.weights.convert import state
    from dall3.weights.convert.guided_diffusion import read_flags
    from dall3.weights.convert.upscaler import check_super_resolution_file
    from dall3.weights.convert.vae import read_taming_config

    kinds: dict[str, tuple[state.Kind, ...]] = {
        "transformer": (state.DALLE, state.RUDALLE, state.MINI_DECODER, state.MINI_ENCODER),
        "vqgan": (state.VQGAN, state.DVAE, state.DETOKER),
        "clip": (state.OPENAI_CLIP,),
    }
    suffix, part = Path(wanted.file.name).suffix, wanted.part
    if part.name == "tokenizer" or suffix == ".model":
        check_tokenizer_file(path)
    elif suffix in (".yaml", ".yml"):
        read_taming_config(path)
    elif suffix == ".json":
        settings = read_flags(path)
        names = {"model", "embed_dim", "image_size", "large_size", "num_channels", "num_heads", "noise_schedule"}
        if not settings.keys() & names:
            raise ValueError("it has none of the settings of a model")
    elif suffix == ".safetensors" and part.config is not None:  # a part that save_pretrained wrote
        read_archive(path)
    else:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                broken = archive.testzip()
            if broken is not None:
                raise ValueError(f"its entry {broken} is damaged")
        if part.name == "super_resolution":
            check_super_resolution_file(path)
        else:
            state.read_state(path, *kinds.get(part.name, (state.UNET,)))
