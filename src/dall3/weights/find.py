"""Resolving names of weights; downloading and removing the files of a set."""

from __future__ import annotations

import logging
from pathlib import Path

from dall3.errors import FetchError
from dall3.weights.cache import (
    cache_dir,
    delete_partial,
    files_of,
    offline,
    offline_message,
    short_message,
    size_of,
    with_suffix_added,
)
from dall3.weights.download import fetch_file
from dall3.weights.registry import NAME, WeightsSet, read_registry, unknown_set_message

logger = logging.getLogger("dall3")


def find_weights(name: str | Path, registry: str | Path | None = None) -> WeightsSet | Path:
    """Resolve a name: a set in weights.toml, a folder, or a repository "owner/name" on the Hugging Face Hub.

    A repository is downloaded and returned as a folder. registry: as for `read_registry`. Raises ValueError for a name
    that is none of these; FetchError if the repository cannot be downloaded.
    """
    known = read_registry(registry)
    if isinstance(name, str) and name in known:
        return known[name]
    if isinstance(name, Path) or Path(name).exists():
        return Path(name)
    if NAME.fullmatch(name):
        raise ValueError(f"no folder and {unknown_set_message(name, known)}")
    owner, _, rest = name.partition("/")
    return fetch_repository(name) if NAME.fullmatch(owner) and NAME.fullmatch(rest) else Path(name)


def fetch_repository(name: str) -> Path:
    """Download a repository "owner/name" of the Hugging Face Hub to a folder in the cache.

    Only files of the formats that `save_pretrained` writes are downloaded. Raises FetchError if that fails.
    """
    from huggingface_hub import snapshot_download

    kinds = ["*.json", "*.safetensors", "README.md", "words.txt"]
    cache = cache_dir() / "hub"
    try:
        path = snapshot_download(
            name, cache_dir=cache, allow_patterns=kinds, local_files_only=offline(), library_name="dall3"
        )
    except Exception as error:  # huggingface_hub, its HTTP library or the operating system
        hint = "DALL3_OFFLINE is set" if offline() else short_message(error)
        raise FetchError(
            f"{name} is not a folder, is not in {cache}, and cannot be downloaded from the Hugging Face Hub ({hint})"
        ) from None
    return Path(path)


def fetch_set(weights: WeightsSet, progress: bool = True) -> dict[str, tuple[Path, Path | None]]:
    """Download the missing files of a set. Returns (file, config) for each part by name; config may be None.

    In a set with a transformer the part super_resolution is optional: if it cannot be downloaded, it is left out with a
    warning. Raises FetchError for any other file, with the problem of each place and with what to do.
    """
    optional = {"super_resolution"} if any(part.name == "transformer" for part in weights.parts) else set()
    wanted = files_of(weights)
    absent = [one for one in wanted if one.find() is None and one.part.name not in optional]
    if absent and offline():  # before the files that are present are hashed, which may take long
        raise FetchError(offline_message(absent[0], "is not here"))
    paths, left_out = {}, set()
    for one in wanted:
        try:
            paths[one.part.name, one.file.name] = fetch_file(one, progress)
        except FetchError as error:
            if one.part.name not in optional:
                raise
            logger.warning("%s; the weights are loaded without their %s", error, one.part.name)
            left_out.add(one.part.name)
    return {
        part.name: (paths[part.name, part.file.name], paths[part.name, part.config.name] if part.config else None)
        for part in weights.parts
        if part.name not in left_out
    }


def remove_set(weights: WeightsSet) -> int:
    """Remove the downloaded and partially downloaded files of a set from the cache. Returns their size in bytes.

    Pins are kept, so that a file that is downloaded again must have the same content. Parts that belong to another set
    (`same_as`) are kept too. Raises FetchError for a file that is being downloaded.
    """
    from filelock import FileLock, Timeout

    removed = 0
    for one in files_of(weights):
        if not one.target.parent.is_dir() or not one.part.cache_folder.startswith(f"{weights.name}/"):
            continue
        try:
            # The lock file is not deleted, because another process may be waiting for it.
            with FileLock(with_suffix_added(one.target, ".lock"), timeout=0):
                partial = with_suffix_added(one.target, ".part")
                removed += size_of(one.target) + size_of(partial)
                one.target.unlink(missing_ok=True)
                delete_partial(partial)
        except Timeout:
            raise FetchError(f"{one.name} is being downloaded; remove it afterwards") from None
    return removed
