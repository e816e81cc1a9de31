"""Whether a file of weights on this machine is the one that it should be."""

from __future__ import annotations

import zipfile
from contextlib import suppress
from pathlib import Path

from dall3.weights.cache import SAME, Wanted, key_of, reason, sha256_of


def check_here(wanted: Wanted, path: Path, thorough: bool = False) -> str | None:
    """What is wrong with a file on this machine, or None. What nobody knows a hash of is looked at and pinned.

    thorough: read it in any case, not only where its size or time are not those that it was verified with.
    """
    pins, found = wanted.pins, path.stat()
    known = {sha256 for place in wanted.file.places if (sha256 := wanted.sha256_at(place))}
    same = (pins.size, pins.mtime_ns) == (found.st_size, found.st_mtime_ns)
    if same and not thorough and pins.sha256 in known:
        return None
    in_cache = path == wanted.target
    if not in_cache and not known and not thorough:  # the user's own, of which nothing is known
        return None
    sha256 = sha256_of(path)
    # A copy that nothing was known of may come from the place whose hash nobody knows.
    unknown = next((place for place in wanted.file.places if wanted.sha256_at(place) is None), None)
    first = not pins.sha256 and unknown is not None
    if known and sha256 not in known and not first:
        pinned = "" if any(place.sha256 for place in wanted.file.places) else f" ({wanted.pins_at} says)"
        return f"has SHA-256 {sha256}; expected {' or '.join(sorted(known))}{pinned}"
    if sha256 not in known:
        try:
            look_at(path, wanted)
        except Exception as error:
            return f"is not the file ({reason(error)})"
    now = path.stat()
    if (now.st_size, now.st_mtime_ns) != (found.st_size, found.st_mtime_ns):
        return "changes while it is read"
    if known or in_cache:
        known_at = (place for place in wanted.file.places if wanted.sha256_at(place) == sha256)
        place = next(known_at, unknown)
        key = SAME if place is None else key_of(place)
        with suppress(OSError):  # a cache that cannot be written to is good for reading
            wanted.set_pin(sha256, key, found)
    return None


def look_at(path: Path, wanted: Wanted) -> None:
    """Read a file whose hash nobody knows as far as tells that it is whole, and what it should be.

    Raises ValueError where it is not.
    """
    from dall3.text import check_tokenizer_file
    from dall3.weights.archive import read_archive
    from dall3.weights.convert import state
    from dall3.weights.convert.guided_diffusion import read_flags
    from dall3.weights.convert.vae import read_taming_config

    kinds: dict[str, tuple[state.Kind, ...]] = {
        "transformer": (state.DALLE, state.RUDALLE, state.MINI_DECODER, state.MINI_ENCODER),
        "vqgan": (state.VQGAN, state.DVAE, state.DETOKER),
        "clip": (state.OPENAI_CLIP,),
    }
    suffix, part = Path(wanted.file.name).suffix, wanted.part
    if part.name == "tokenizer":
        check_tokenizer_file(path)
    elif suffix in (".yaml", ".yml"):
        read_taming_config(path)
    elif suffix == ".json":
        settings = read_flags(path)
        if not settings.keys() & {"model", "image_size", "large_size", "num_channels", "num_heads", "noise_schedule"}:
            raise ValueError("no settings of a model")
    elif suffix == ".safetensors" and part.config is not None:  # a part that save_pretrained wrote
        read_archive(path)
    else:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                broken = archive.testzip()
            if broken is not None:
                raise ValueError(f"its entry {broken} is damaged")
        state.read_state(path, *kinds.get(part.name, (state.UNET,)))
