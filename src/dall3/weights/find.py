"""Resolve names of weights; download and remove the files of a set."""

from __future__ import annotations

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
from dall3.weights.registry import NAME, WeightsSet, read_registry, unknown_set_error


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
        raise ValueError(f"no folder and {unknown_set_error(name, known)}")
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

    Raises FetchError with the missing file, what was tried and what to do.
    """
    wanted = files_of(weights)
    absent = [one for one in wanted if one.find() is None]
    if absent and offline():  # before the files that are present are hashed, which may take long
        raise FetchError(offline_message(absent[0], "is not here"))
    paths = {(one.part.name, one.file.name): fetch_file(one, progress) for one in wanted}
    return {
        part.name: (paths[part.name, part.file.name], paths[part.name, part.config.name] if part.config else None)
        for part in weights.parts
    }


def remove_set(weights: WeightsSet) -> int:
    """Remove a set's fetched files, whole or begun, from the cache; how many bytes that were. Pins stay: a file that
    is fetched again must be the one that it was. So do parts that are another set's. Raises FetchError for one that is
    being fetched.
    """
    from filelock import FileLock, Timeout

    removed = 0
    for one in files_of(weights):
        if not one.target.parent.is_dir() or not one.part.kept.startswith(f"{weights.name}/"):
            continue
        try:
            # The lock file is not deleted, because another process may be waiting for it.
            with FileLock(with_suffix_added(one.target, ".lock"), timeout=0):
                partial = with_suffix_added(one.target, ".part")
                removed += size_of(one.target) + size_of(partial)
                one.target.unlink(missing_ok=True)
                delete_partial(partial)
        except Timeout:
            raise FetchError(f"{one.name} is being fetched; remove it when that has ended") from None
    return removed
