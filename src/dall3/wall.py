"""Wall: the candidates of a prompt as numbered coarse images, from which a person chooses the ones to refine."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from dall3.errors import require
from dall3.generate import Previews, Ranked, Record, check_finite, choose_best, draw, exhaust, run
from dall3.images import make_grid, open_image, to_pil, to_rgb
from dall3.output import Dall3Output, File, Preview, png_bytes, read_tokens, write_files
from dall3.parts import Parts
from dall3.request import Request, make_refine_request, make_request
from dall3.settings import RefineSettings, TokenSettings, as_number, check_arguments
from dall3.tokens.sampling import Sampling, check_counts
from dall3.weights.registry import PARTS, read_settings_text

if TYPE_CHECKING:
    from typing_extensions import Unpack

MANIFEST, SHEET = "wall.json", "wall.png"
# Settings of a wall: those that determine its candidates, in the order of a recipe. Every wall has the first ones.
REQUIRED = ("num_candidates", "seed", "batch_size", "truncate")
DRAWN = (*REQUIRED, "kept", "negative_prompt", "seeds", *Sampling.__dataclass_fields__)
MAX_WIDTH = 1024  # pixels, of a sheet
MIN_SIDE = 192  # pixels, of an image on a sheet, if MAX_WIDTH allows it
MAX_CANDIDATES = 4096  # of a wall that is loaded from a file


class Wall:
    """The candidates of one prompt as coarse images, each with a number, as `Dall3Pipeline.draw` returns them.

    The number is the candidate's, counted from 0, the same as in `Dall3Output.candidates` and in captions ("draw 3").
    `wall[3]` is a wall of candidate 3, and `wall[3, 7]` a wall of two candidates, in this order. `Dall3Pipeline.refine`
    refines the candidates of a wall. Iterating yields a wall of each candidate. A notebook shows a wall as one image
    with the numbers on it.

    >>> from dall3 import Dall3Pipeline
    >>> wall = Dall3Pipeline.from_pretrained().draw("a red cube", 4, seed=0, progress=False)
    >>> wall[3, 1]
    Wall('a red cube', 2 of 4 candidates: 3, 1)
    >>> len(wall), [one.numbers for one in wall[3, 1]], wall[3].images[0].size
    (4, [(3,), (1,)], (128, 128))

    Raises IndexError for a number that is not on the wall, and ValueError for a number that is given twice.
    """

    def __init__(
        self,
        prompt: str,
        images: Sequence[Image.Image],
        tokens: Tensor,
        clip_scores: Tensor | None,
        settings: Mapping[str, Any],
        numbers: Iterable[int] | None = None,
    ) -> None:
        """images, tokens, clip_scores: of all candidates. settings: the settings that they were drawn with. numbers:
        the candidates that this wall shows (default: all).
        """
        self.prompt, self.settings = prompt, dict(settings)
        self.numbers = tuple(range(len(images)) if numbers is None else numbers)
        # All candidates, because `refine` decodes a candidate together with the others of its batch.
        self._images, self._tokens, self._scores = list(images), tokens, clip_scores

    @property
    def images(self) -> list[Image.Image]:
        """The coarse images, as PIL images."""
        return [self._images[number] for number in self.numbers]

    @property
    def tokens(self) -> Tensor:
        """Image tokens of the candidates on this wall, int64 (n, image tokens)."""
        return self._tokens[list(self.numbers)]

    @property
    def all_tokens(self) -> Tensor:
        """Image tokens of all candidates, including those not on this wall, int64 (candidates, image tokens)."""
        return self._tokens

    @property
    def clip_scores(self) -> Tensor | None:
        """Cosine similarities to the prompt, float32 (n,); None without a CLIP."""
        return None if self._scores is None else self._scores[list(self.numbers)]

    def __len__(self) -> int:
        return len(self.numbers)

    def __iter__(self) -> Iterator[Wall]:
        return (self[number] for number in self.numbers)

    def __getitem__(self, which: int | Sequence[int]) -> Wall:
        chosen = [as_number(number) for number in which] if isinstance(which, Sequence) else [as_number(which)]
        if not chosen or any(type(number) is not int for number in chosen):
            raise TypeError(f"{which!r:.60} on a wall; expected numbers that it shows, such as wall[3] or wall[3, 7]")
        for number in chosen:
            if number not in self.numbers:
                shown = f"{self.numbers[0]} to {self.numbers[-1]}" if len(self) > 8 else f"{self.numbers}"
                raise IndexError(f"no image {number} on this wall; it shows {shown}")
        require(len(set(chosen)) == len(chosen), f"{which!r:.60} names an image twice; give each number once")
        return Wall(self.prompt, self._images, self._tokens, self._scores, self.settings, chosen)

    def best(self, count: int = 1) -> Wall:
        """The candidates with the highest CLIP scores, best first. Raises ValueError without scores.

        >>> from dall3 import Dall3Pipeline
        >>> wall = Dall3Pipeline.from_pretrained().draw("a red cube", 4, seed=0, progress=False)
        >>> len(wall.best(2))
        2
        """
        scores = self.clip_scores
        require(scores is not None, "this wall has no CLIP scores; choose by eye, such as wall[3, 7]")
        require(1 <= count <= len(self), f"the best {count} of {len(self)} images; expected 1 to {len(self)}")
        assert scores is not None
        order = scores.sort(descending=True, stable=True).indices[:count]
        return self[[self.numbers[place] for place in order.tolist()]]

    def __repr__(self) -> str:
        which = "" if len(self) == len(self._images) else ": " + ", ".join(map(str, self.numbers))
        return f"Wall({self.prompt!r}, {len(self)} of {len(self._images)} candidates{which})"

    def grid(self) -> Image.Image:
        """All images on one sheet, with the number of each in its corner."""
        columns = math.ceil(math.sqrt(len(self)))
        images = self.images
        side = min(max(images[0].width, MIN_SIDE), max(MAX_WIDTH // columns, 1))
        sheet = make_grid([images[i : i + columns] for i in range(0, len(images), columns)], side)
        pen, size = ImageDraw.Draw(sheet), max(side // 9, 12)
        font = ImageFont.load_default(size)
        for place, number in enumerate(self.numbers):
            left, top = place % columns * (side + 4), place // columns * (side + 4)
            box = pen.textbbox((left + size // 3, top + size // 6), str(number), font=font)
            pen.rectangle((left, top, box[2] + size // 3, box[3] + size // 3), fill="black")
            pen.text((left + size // 3, top + size // 6), str(number), font=font, fill="white")
        return sheet

    def _repr_png_(self) -> bytes:
        return png_bytes(self.grid())

    def save(self, folder: str | Path, overwrite: bool = False) -> Path:
        """Save the wall to a folder, which is created if needed, and return its path. `Wall.load` reads it.

        Writes `wall.png` (the numbered sheet), `wall.json` (prompt, numbers, scores, settings) and, for each candidate,
        files such as `3.png` (the coarse image) and `3.npy` (tokens, int64, upstream's format).

        Raises FileExistsError if one of the files exists, before it writes any, unless `overwrite`.
        """
        return write_files(Path(folder), self.files(), overwrite)

    def files(self) -> dict[str, File]:
        """The files that `save` writes, by name."""
        scores = None if self._scores is None else self._scores.tolist()
        manifest = dict(prompt=self.prompt, numbers=self.numbers, clip_scores=scores, settings=self.settings)
        files: dict[str, File] = {MANIFEST: json.dumps(manifest, indent=2), SHEET: self.grid()}
        for number, (image, tokens) in enumerate(zip(self._images, self._tokens, strict=True)):
            files |= {f"{number}.png": image, f"{number}.npy": tokens.numpy()}
        return files

    @classmethod
    def load(cls, folder: str | Path) -> Wall:
        """Load a wall from a folder that `save` wrote, or from its wall.json or wall.png.

        Raises ValueError for a damaged wall, and FileNotFoundError for a folder without one.
        """
        path = Path(folder)
        path = path.parent if path.name in (MANIFEST, SHEET) else path
        try:
            found = json.loads(read_settings_text(path / MANIFEST))
            prompt, numbers, scores, settings = (found[k] for k in ("prompt", "numbers", "clip_scores", "settings"))
            count = settings["num_candidates"]
            require(isinstance(prompt, str), "the prompt is not a string")
            prompt.encode()  # raises UnicodeEncodeError, a ValueError, for a lone surrogate
            valid = type(count) is int and 0 < count <= MAX_CANDIDATES
            require(valid, f"num_candidates is {count!r:.40}; expected an integer from 1 to {MAX_CANDIDATES}")
            valid = isinstance(numbers, list) and 0 < len(numbers) == len(set(numbers))
            valid = valid and all(type(number) is int and 0 <= number < count for number in numbers)
            require(valid, f"the numbers are not a list of different candidate numbers below {count}")
            clip_scores = None if scores is None else torch.tensor(scores, dtype=torch.float32)
            valid = clip_scores is None or clip_scores.shape == (count,)
            require(valid, f"clip_scores are not a list of {count} numbers")
        except FileNotFoundError:
            raise FileNotFoundError(f"{path} holds no {MANIFEST}; expected a folder that a wall was saved to") from None
        except (ValueError, KeyError, TypeError, RecursionError, OverflowError, RuntimeError) as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise ValueError(f"{path / MANIFEST}: the wall is damaged ({reason})") from None
        images = [to_rgb(open_image(path / f"{i}.png"), str(path / f"{i}.png")) for i in range(count)]
        rows = [read_tokens(path / f"{i}.npy") for i in range(count)]
        require(len({row.shape for row in rows}) == 1, f"{path}: the .npy files hold different numbers of tokens")
        return cls(prompt, images, torch.cat(rows), clip_scores, settings, numbers)


class WallCalls(Parts):
    """The pipeline's methods that draw a wall and refine images chosen from it."""

    def draw(self, prompt: str, num_candidates: int = 16, **settings: Unpack[TokenSettings]) -> Wall:
        """Draw candidates and return them as a numbered `Wall` of coarse images, with CLIP scores if there is a CLIP.

        num_candidates: number of candidates. settings: those of `generate_tokens`. Pass the chosen images to `refine`.

        >>> from dall3 import Dall3Pipeline
        >>> pipe = Dall3Pipeline.from_pretrained()
        >>> wall = pipe.draw("a red cube", 4, seed=0, progress=False)
        >>> out = pipe.refine(wall[3, 1], num_inference_steps=2, progress=False)
        >>> out.candidates.tolist(), out.images[0].size
        ([3, 1], (256, 256))

        Raises the same errors as the pipeline's call.
        """
        return exhaust(draw_wall(self, make_draw_request(self, prompt, num_candidates, **settings)))

    def refine(self, wall: Wall, **settings: Unpack[RefineSettings]) -> Dall3Output:
        """Refine the images of a wall, such as `wall[3, 7]`, in this order.

        settings: fields of `Denoising`, guidance_prompt, output_size, refine_batch_size, callback_on_step_end and
        progress, as in the pipeline's call. The prompt, the seed and the negative prompt are those of the wall.

        The output is the same as that of a call `pipe(prompt, len(wall), num_candidates, seed=…, …)` whose CLIP ranks
        these candidates highest, in this order. `repeat` makes its images again from their PNGs.

        Warns if the wall was drawn with another transformer or VQGAN. Raises the same errors as the pipeline's call,
        and ValueError for tokens that the VQGAN does not have.
        """
        if not isinstance(wall, Wall):
            raise TypeError(f"refine() got a {type(wall).__name__}; expected a Wall, such as draw(…)[3, 7]")
        return exhaust(refine_wall(self, wall, request_of_wall(self, wall, **settings)))


def make_draw_request(parts: Parts, prompt: str, num_candidates: int = 16, **settings: Any) -> Request:
    """Validate the arguments of `Dall3Pipeline.draw` (`TokenSettings`). Raises the errors of `make_request`."""
    check_arguments("draw()", settings, TokenSettings)
    check_counts(num_candidates=as_number(num_candidates))
    return make_request(parts, prompt, num_candidates, num_candidates, call="draw()", **settings)


def draw_wall(parts: Parts, request: Request) -> Previews[Wall]:
    """Draw, decode and score all candidates of a request."""
    record = Record()
    parts.load_clip_early()  # in the background, while tokens are drawn
    tokens = yield from draw(parts, request, record)
    options: dict[str, Any] = dict(batch_size=request.batch_size, seamless=False, progress=request.progress)
    best = choose_best(parts, tokens, request.prompt, len(tokens), **options)
    check_finite(best.images, "coarse images")
    order = best.candidates.argsort()  # from the order of the scores to that of the candidate numbers
    images = to_pil(best.images[order])
    yield Preview("ranking", 1, 1, lambda: images)
    recipe = request.recipe() | record.sizes
    settings = {name: recipe[name] for name in DRAWN if name in recipe}
    scores = None if best.scores is None else best.scores[order].cpu()
    return Wall(request.prompt, images, tokens.cpu(), scores, settings | {"weights": parts.fingerprints()})


def request_of_wall(parts: Parts, wall: Wall, **settings: Any) -> Request:
    """Validate the arguments of `Dall3Pipeline.refine`. The wall may come from a file: its settings are untrusted."""
    length, known = wall.tokens.shape[1], {*DRAWN, "weights"}
    unknown = ", ".join(map(repr, sorted(wall.settings.keys() - known)))
    require(not unknown, f"the wall has unknown settings: {unknown[:200]}; it may be of a later version")
    missing = [name for name in REQUIRED if wall.settings.get(name) is None]
    require(not missing, f"the wall's settings lack {', '.join(missing)}")
    request = make_refine_request(parts, wall.prompt, len(wall), wall.settings, length, **settings)
    parts.check_tokens(wall.tokens)
    return request


def refine_wall(parts: Parts, wall: Wall, request: Request, every: int = 1) -> Previews[Dall3Output]:
    """Refine the images of a wall. every: number of denoising steps between previews."""
    current, recorded = parts.fingerprints(), wall.settings.get("weights", {})
    for part in ("transformer", "vqgan"):
        if part in current and part in recorded and recorded[part] != current[part]:
            words = f"has the hash {current[part]!r}; the wall was made with {str(recorded[part])[:16]!r}"
            warnings.warn(f"the {part} of this pipeline {words}", stacklevel=2)
    numbers = torch.tensor(wall.numbers).to(parts.device)
    images = decode_in_batches(parts, wall, request)
    best = Ranked(numbers, wall.clip_scores, wall.tokens.to(parts.device), images)
    check_finite(best.images, "coarse images")
    out = yield from run(parts, request, every, best)
    # The recipe records the transformer that drew the tokens, and the CLIP that scored them if this pipeline has none.
    original = {name: recorded[name] for name in ("transformer", "clip") if isinstance(recorded.get(name), str)}
    used = original | out.settings["weights"] | {name: original[name] for name in original if name == "transformer"}
    out.settings["weights"] = {name: used[name] for name in PARTS if name in used}
    return out


def decode_in_batches(parts: Parts, wall: Wall, request: Request) -> Tensor:
    """Decode the wall's tokens in the batches of the pipeline's call, so that results are rounded in the same way."""
    tokens, size, found = wall.all_tokens, request.batch_size, dict[int, Tensor]()
    with parts.on_device("decoding tokens", "vqgan"):
        for start in sorted({number // size * size for number in wall.numbers}):
            batch = tokens[start : start + size]
            decoded = parts.decode_tokens(batch, len(batch), request.denoising.seamless)
            found |= {number: decoded[number - start] for number in wall.numbers if start <= number < start + size}
    return torch.stack([found[number] for number in wall.numbers])
