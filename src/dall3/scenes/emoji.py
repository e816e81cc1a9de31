"""Fluent emoji by Microsoft (MIT licence) on plain backgrounds, with the names and tags of emojibase.

Both come from the npm registry: `npm install @lobehub/fluent-emoji-3d emojibase-data`. `pack_emoji` archives them for
machines without a network.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from dall3.images import open_image
from dall3.scenes.scene import BACKGROUNDS, SIZES, is_held_out

PACKAGES = ("@lobehub/fluent-emoji-3d@1.1.0", "emojibase-data@17.0.0")
# Widths and shifts are in sixteenths of the image's side, the grid of codes. A drawing then has nearly the same codes
# at any position (93 % with the bundled VQGAN), so that the transformer need not learn each position separately.
GRID = 16
SIZE = (256, 256)  # pixels of a drawing
WIDTHS = {"small": 8, "medium": 10, "large": 14}
SIZE_SHARES = {"small": 0.08, "medium": 0.12, "large": 0.8}  # probabilities; large emoji are learned fastest
FLAGS = 9  # emojibase's group number


@dataclass(frozen=True)
class Emoji:
    """One emoji: emojibase's code point string, its name and tags, and its RGBA file of 256×256 pixels.

    archive: the file of `pack_emoji` that contains `path`, or None if `path` is a file on disk.
    """

    hexcode: str
    name: str
    tags: tuple[str, ...]
    path: Path
    group: int | None
    toned: bool = False  # a skin tone variant
    archive: Path | None = None


def fetch_emoji(folder: str | Path) -> Path:
    """Download drawings and names with npm to `folder`, about 30 MB, unless they exist. Returns the folder.

    Raises RuntimeError if npm is missing or fails, with its message.
    """
    folder = Path(folder)
    if not (folder / "node_modules/emojibase-data/en/data.json").exists():
        if shutil.which("npm") is None:
            raise RuntimeError("npm is needed to fetch the emoji: install Node.js, or give a folder that has them")
        folder.mkdir(parents=True, exist_ok=True)
        command = ["npm", "install", "--prefix", str(folder), "--ignore-scripts", "--no-audit", "--no-fund", *PACKAGES]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"npm could not fetch {' '.join(PACKAGES)}: {done.stderr.strip()[-500:]}")
    return folder


NAMES = "names.json"  # in an archive: one object per drawing, in emojibase's order


def pack_emoji(folder: str | Path, archive: str | Path) -> Path:
    """Pack the files of `fetch_emoji` into a zip file, about 20 MB, that `list_emoji` reads. Returns its path.

    Raises FileNotFoundError if `folder` has no emoji.
    """
    emoji = list_emoji(folder, toned=True)
    keys = ("hexcode", "name", "tags", "group", "toned")
    names = [{**{key: getattr(e, key) for key in keys}, "path": e.path.name} for e in emoji]
    part = Path(f"{archive}.part")
    with zipfile.ZipFile(part, "w", zipfile.ZIP_STORED) as file:
        file.writestr(NAMES, json.dumps(names), zipfile.ZIP_DEFLATED)
        for e in emoji:
            file.write(e.path, e.path.name)
    return part.replace(archive)


def list_emoji(place: str | Path, toned: bool = False) -> list[Emoji]:
    """List all drawings that emojibase names, in its order. toned: include skin tone variants.

    place: the folder of `fetch_emoji`, or the file of `pack_emoji`. Raises FileNotFoundError if they are missing, and
    ValueError for a file that is not such an archive.
    """
    place = Path(place)
    if place.is_file():
        return [emoji for emoji in read_names(place) if toned or not emoji.toned]
    modules = place / "node_modules"
    if not modules.is_dir():
        raise FileNotFoundError(f"no emoji under {place}; fetch them first")
    drawings = modules / "@lobehub/fluent-emoji-3d/assets"
    entries = json.loads((modules / "emojibase-data/en/data.json").read_text(encoding="utf-8"))
    files = {path.stem: path for path in drawings.glob("*.webp")}
    found = []
    for entry in entries:
        for variant in [entry, *(entry.get("skins", []) if toned else [])]:
            code = variant["hexcode"].lower()
            path = next((files[c] for c in (code, f"{code}-fe0f", code.replace("-fe0f", "")) if c in files), None)
            if path is not None:
                tags, group = tuple(entry.get("tags", ())), entry.get("group")
                found.append(Emoji(variant["hexcode"], variant["label"], tags, path, group, variant is not entry))
    if not found:
        raise FileNotFoundError(f"no emoji under {place}; fetch them first")
    return found


def read_names(archive: Path) -> list[Emoji]:
    """The emoji of an archive that `pack_emoji` wrote. Raises ValueError for another file."""
    try:
        with zipfile.ZipFile(archive) as file:
            names = json.loads(file.read(NAMES))
    except (zipfile.BadZipFile, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{archive} is not an archive of emoji, as pack_emoji writes it") from error
    return [
        Emoji(e["hexcode"], e["name"], tuple(e["tags"]), Path(e["path"]), e["group"], e["toned"], archive)
        for e in names
    ]


def read_drawings(emoji: Iterable[Emoji]) -> Iterable[Image.Image]:
    """Yield the drawings as PIL images of mode RGBa (premultiplied), 256×256 pixels."""
    opened: dict[Path, zipfile.ZipFile] = {}
    try:
        for drawing in emoji:
            if drawing.archive is None:
                data = drawing.path.read_bytes()
            else:
                if drawing.archive not in opened:
                    opened[drawing.archive] = zipfile.ZipFile(drawing.archive)
                data = opened[drawing.archive].read(drawing.path.as_posix())
            image = open_image(data, str(drawing.path)).convert("RGBa")
            # Two of the drawings are 264 pixels high.
            yield image if image.size == SIZE else image.resize(SIZE, Image.Resampling.LANCZOS)
    finally:
        for file in opened.values():
            file.close()


def training_pool(emoji: Sequence[Emoji]) -> list[Emoji]:
    """The drawings, repeated to weight them in training. Flags and skin tone variants, many and similar, weigh less."""
    return [drawing for drawing in emoji for _ in range(1 if drawing.toned else 2 if drawing.group == FLAGS else 8)]


def draw_emoji(
    emoji: Emoji, background: str, size: str, side: int = 256, shift: tuple[int, int] = (0, 0)
) -> np.ndarray:
    """Draw an emoji on a background colour: uint8 (side, side, 3).

    shift: (right, down) in sixteenths of the side.
    """
    width = round(WIDTHS[size] * side / GRID)
    (premultiplied,) = read_drawings([emoji])
    drawing = premultiplied.resize((width, width), Image.Resampling.LANCZOS).convert("RGBA")
    margin = (GRID - WIDTHS[size]) / 2
    place = (round((margin + shift[0]) * side / GRID), round((margin + shift[1]) * side / GRID))
    canvas = Image.new("RGBA", (side, side), BACKGROUNDS[background])
    canvas.alpha_composite(drawing, place)
    return np.asarray(canvas.convert("RGB"))


def random_placement(rng: np.random.Generator) -> tuple[str, tuple[int, int]]:
    """A random size, and a random shift within half of the margin, as in `draw_emoji`."""
    size = str(rng.choice(SIZES, p=[SIZE_SHARES[size] for size in SIZES]))
    reach = (GRID - WIDTHS[size]) // 4
    right, down = rng.integers(-reach, reach + 1, 2).tolist()
    return size, (right, down)


def random_background(emoji: Emoji, rng: np.random.Generator, held_out: bool | None = False) -> str | None:
    """A random background for a drawing, or None if it has none. held_out: as in `random_emoji_image`."""
    backgrounds = [b for b in BACKGROUNDS if held_out is None or is_held_out(emoji.hexcode, b) == held_out]
    return backgrounds[rng.integers(len(backgrounds))] if backgrounds else None


def random_emoji_image(
    emoji: Emoji, rng: np.random.Generator, side: int = 256, held_out: bool | None = False
) -> tuple[np.ndarray, str]:
    """Draw an emoji with random background, size and position, and a caption: uint8 (side, side, 3), str.

    held_out: False excludes the (drawing, background) pairs held out from training, True uses only those, None uses
    all. Raises ValueError if the drawing has no such pair.
    """
    background = random_background(emoji, rng, held_out)
    if background is None:
        raise ValueError(f"{emoji.name} has no background with held_out={held_out}")
    size, shift = random_placement(rng)
    return draw_emoji(emoji, background, size, side, shift), emoji_caption(emoji, background, size, rng)


def with_article(words: str) -> str:
    return ("an " if words[:1] in "aeiou" else "a ") + words


def emoji_caption(emoji: Emoji, background: str, size: str, rng: np.random.Generator) -> str:
    """A random caption. It always contains the name, in half of the cases the background, in some the size or tags."""
    name = emoji.name.lower()
    if rng.random() < 0.25 and emoji.tags:
        tags = [tag.lower() for tag in rng.permutation(np.array(emoji.tags, dtype=object))[: rng.integers(1, 4)]]
        words = ", ".join([name, *(tag for tag in tags if tag != name)])
    else:
        thing = name
        if rng.random() < 0.3:
            thing = f"{size} {name}"
        words = with_article(thing) if rng.random() < 0.8 else thing
    if rng.random() < 0.3:
        words = ("a picture of ", "an emoji of ", "a drawing of ")[rng.integers(3)] + words
    if rng.random() < 0.5:
        words += (f" on a {background} background", f" before a {background} background", f", {background} background")[
            rng.choice(3, p=(0.6, 0.2, 0.2))
        ]
    return words
