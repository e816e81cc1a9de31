"""Reader of weights.toml: the sets of weights by name, with their parts and the locations of their files."""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass, field
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path
from typing import Any

from dall3.errors import require

PathLike = str | Path
PART_NAMES = ("tokenizer", "transformer", "vqgan", "clip", "upsampler", "super_resolution")
PARTS = PART_NAMES[1:]  # the parts that are models
RESERVED = ("hub", "open_clip")  # folders of the cache that are not sets
MAX_BYTES = 1 << 20  # largest settings file
PACKAGE = Path(__file__).parents[1]
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")  # safe as the name of a file or folder in the cache
SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Place:
    """A location of a file: a URL, or a path on disk.

    sha256, size: hash and size in bytes of the file there, None if unknown. own_content: whether the place has its own
    sha256 and size in weights.toml, because its file differs from that of the other places.
    """

    url: str
    sha256: str | None
    size: int | None
    own_content: bool = False

    @property
    def path(self) -> Path | None:
        """The path of a place on disk, None for a URL."""
        return None if self.url.startswith(("https://", "http://", "hf:")) else Path(self.url)


@dataclass(frozen=True)
class File:
    """A file of a part: its name in the cache and its places, in the order in which they are tried."""

    name: str
    places: tuple[Place, ...]


@dataclass(frozen=True)
class Part:
    """One part of a set.

    config: the second file that some formats need, or None. beside: further files that its loader expects in the same
    folder. settings: settings that the tensors do not determine, passed to the part's loader. cache_folder: the folder
    of its files, relative to the cache: "set/part", where the set is another one for a part with `same_as`.
    """

    name: str
    file: File
    config: File | None
    licence: str
    source: str
    cache_folder: str
    settings: dict[str, Any] = field(default_factory=dict)
    beside: tuple[File, ...] = ()

    @property
    def files(self) -> tuple[File, ...]:
        return (self.file, *(() if self.config is None else (self.config,)), *self.beside)


@dataclass(frozen=True)
class WeightsSet:
    """A set of weights.

    about: a description. defaults: recommended settings, fields of `Sampling` and `Denoising`; not validated here.
    needs: the disk space, memory and time that the set needs, as text.
    """

    name: str
    about: str
    parts: tuple[Part, ...]
    defaults: dict[str, Any] = field(default_factory=dict)
    needs: str = ""


def read_settings_text(path: PathLike) -> str:
    """Read a settings file as text. Raises ValueError for a file above 1 MiB or not in UTF-8; FileNotFoundError."""
    if Path(path).stat().st_size > MAX_BYTES:
        raise ValueError(f"{path} has {Path(path).stat().st_size:,} bytes; expected at most {MAX_BYTES:,}")
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not text ({error})") from None


def read_toml(path: PathLike) -> dict[str, Any]:
    """Read a TOML file. Raises ValueError for a file that is not TOML; FileNotFoundError."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        return tomllib.loads(read_settings_text(path))
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: not TOML ({error})") from None


def bundled_registry_path() -> Path:
    """Path of the weights.toml of dall3: in the installed package, or at the root of a checkout."""
    inside = PACKAGE / "weights.toml"
    return inside if inside.exists() else PACKAGE.parents[1] / "weights.toml"


def read_registry(path: PathLike | None = None) -> dict[str, WeightsSet]:
    """Read all sets of weights by name: those of dall3's weights.toml and of a second file.

    path: the second file; by default the one in the environment variable DALL3_WEIGHTS. Its sets replace sets of the
    same name. Raises ValueError for a file that does not follow the format described in weights.toml;
    FileNotFoundError.

    >>> "mini" in read_registry()
    True
    """
    more = path or os.environ.get("DALL3_WEIGHTS")
    found = parse_registry(bundled_registry_path(), {})
    return found | parse_registry(Path(more), found) if more else found


def find_set(name: str, path: PathLike | None = None) -> WeightsSet:
    """The set of weights with this name. Raises ValueError with the known names for an unknown one."""
    found = read_registry(path)
    require(name in found, unknown_set_message(name, found))
    return found[name]


def unknown_set_message(name: str, known: dict[str, WeightsSet]) -> str:
    near = get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"no set of weights is called '{name}'; {hint}known sets: {', '.join(known)}"


def parse_registry(path: Path, known: dict[str, WeightsSet]) -> dict[str, WeightsSet]:
    """Read the sets of a file. known: other sets that `same_as` can refer to."""
    sets: dict[str, WeightsSet] = {}
    for name, table in read_toml(path).items():
        where = f"{path}: [{name}]"
        require(bool(NAME.fullmatch(name)), f"{where}: invalid name; expected letters, digits, '.', '_' and '-'")
        require(name not in RESERVED, f"{where}: the names {' and '.join(RESERVED)} are reserved; choose another name")
        require(isinstance(table, dict), f"{where}: expected a table")
        defaults = table.pop("defaults", {})
        require(isinstance(defaults, dict), f"{where}: defaults is not a table; expected a table of settings")
        parts = {key: value for key, value in table.items() if isinstance(value, dict)}
        texts = {"about", "needs"}
        unknown = [key for key in table if key not in {*texts, *PART_NAMES} or (key not in texts and key not in parts)]
        require(not unknown, f"{where}: unknown part {', '.join(unknown)}; expected tables {', '.join(PART_NAMES)}")
        require(bool(parts), f"{where}: the set has no part; expected tables {', '.join(PART_NAMES)}")
        others = known | sets
        made = tuple(parse_part(key, parts[key], path, name, others) for key in PART_NAMES if key in parts)
        about, needs = (read_text_field(table, key, where, "") for key in ("about", "needs"))
        sets[name] = WeightsSet(name, about, made, defaults, needs)
    return sets


def parse_part(name: str, table: dict[str, Any], path: Path, set_name: str, sets: dict[str, WeightsSet]) -> Part:
    where = f"{path}: [{set_name}.{name}]"
    if "same_as" in table:
        return same_part(name, table, where, sets)
    known = {"file", "places", "size", "sha256", "licence", "source", "config", "settings", "beside"}
    require(table.keys() <= known, f"{where}: unknown key {', '.join(sorted(table.keys() - known))}")
    config = table.get("config")
    require(config is None or isinstance(config, dict), f"{where}: config is not a table with file and places")
    settings = table.get("settings", {})
    require(isinstance(settings, dict), f"{where}: settings is not a table; expected a table of the loader's settings")
    licence, source = (read_text_field(table, key, where, "not stated") for key in ("licence", "source"))
    file, second = (None if one is None else parse_file(one, path, where) for one in (table, config))
    assert file is not None
    more = table.get("beside", [])
    are_tables = isinstance(more, list) and all(isinstance(one, dict) for one in more)
    require(are_tables, f"{where}: beside is not a list of tables with file and places")
    beside = tuple(parse_file(one, path, where) for one in more)
    part = Part(name, file, second, licence, source, f"{set_name}/{name}", settings, beside)
    names = sorted(one.name for one in part.files)
    # The cache adds suffixes to a file's name for its pins, lock and partial download.
    distinct = not any(f"{after}.".startswith(f"{before}.") for before, after in pairwise(names))
    require(distinct, f"{where}: the name of one of its files begins with that of another; rename one of them")
    return part


def same_part(name: str, table: dict[str, Any], where: str, sets: dict[str, WeightsSet]) -> Part:
    """The part of another set that `same_as` refers to."""
    require(table.keys() == {"same_as"}, f"{where}: same_as is combined with other keys; remove them")
    owner, _, part = str(table["same_as"]).rpartition(".")
    found = [one for one in sets[owner].parts if one.name == part] if owner in sets else []
    valid = bool(found) and part == name
    require(
        valid, f"{where}: same_as = {table['same_as']!r}; expected 'SET.{name}', where SET is defined before this set"
    )
    return found[0]


def parse_file(table: dict[str, Any], path: Path, where: str) -> File:
    name, places = table.get("file"), table.get("places")
    valid = isinstance(name, str) and NAME.fullmatch(name)
    require(bool(valid), f"{where}: file = {name!r}; expected a name without folders")
    require(isinstance(places, list) and bool(places), f"{where}: places is not a list of URLs or paths")
    assert isinstance(name, str) and isinstance(places, list)
    shared = {"sha256": table.get("sha256"), "size": table.get("size")}
    made = (
        parse_place(place, path, where, True)
        if isinstance(place, dict)
        else parse_place({"url": place, **shared}, path, where, False)
        for place in places
    )
    return File(name, tuple(made))


def parse_place(table: dict[str, Any], path: Path, where: str, own_content: bool) -> Place:
    url, sha256, size = table.get("url"), table.get("sha256"), table.get("size")
    require(table.keys() <= {"url", "sha256", "size"}, f"{where}: a place has url, sha256 and size only")
    valid = isinstance(url, str) and url.isprintable() and url.strip() == url and url
    require(bool(valid), f"{where}: a place is {url!r}; expected a URL or a path")
    assert isinstance(url, str)
    good_hash = sha256 is None or (isinstance(sha256, str) and SHA256.fullmatch(sha256))
    require(bool(good_hash), f"{where}: sha256 = {sha256!r}; expected 64 digits of 0-9a-f")
    require(size is None or (type(size) is int and size > 0), f"{where}: size = {size!r}; expected a number of bytes")
    if url.startswith("package:"):
        path_inside = (PACKAGE / url.removeprefix("package:")).resolve()
        require(path_inside.is_relative_to(PACKAGE.resolve()), f"{where}: {url} is outside of the package")
        url = str(path_inside)
    elif url.startswith("hf:"):
        owner, _, rest = url.removeprefix("hf:").partition("/")
        name, _, inside = rest.partition("/")
        good = NAME.fullmatch(owner) and NAME.fullmatch(name) and inside and ".." not in inside
        require(bool(good), f"{where}: {url}; expected hf:owner/name/path")
    elif "://" in url:
        require(url.startswith(("https://", "http://")), f"{where}: {url}; expected https://, hf: or a path")
    else:
        url = str((path.parent / url).absolute())
    return Place(url, sha256, size, own_content)


def read_text_field(table: dict[str, Any], key: str, where: str, default: str) -> str:
    value = table.get(key, default)
    require(isinstance(value, str) and value.isprintable(), f"{where}: {key} is not one line of text")
    return value
