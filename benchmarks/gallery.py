"""Draw the images of the README: python benchmarks/gallery.py [--weights FOLDER] [--out docs]

The prompts of each kind follow from a fixed seed. Each is drawn with seed 0, and no image is selected by hand.
"""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from dall3 import Dall3Pipeline
from dall3.images import make_grid, to_pil
from dall3.scenes import describe, random_scene

HEADLINE = ("a cube made of cloud", "a cube made of water", "a cube made of porcupine", "an avocado")
STRIP = ("a cube made of cloud", "an avocado", "a fox", "a rocket", "an egg made of water", "a red apple")
EMOJI = ("a penguin on a blue background", "a red apple", "a fox", "a rocket on a yellow background")
SIDE, IMAGES, BEST, DRAWN = 160, 2, 8, 64


def label(picture: Image.Image, texts: list[str], height: int) -> Image.Image:
    """Add a column of texts to the left of an image, one every `height` pixels."""
    width = 230
    sheet = Image.new("RGB", (picture.width + width, picture.height), "white")
    sheet.paste(picture, (width, 0))
    draw = ImageDraw.Draw(sheet)
    for i, text in enumerate(texts):
        lines = "\n".join(textwrap.wrap(text, 32))
        draw.text((8, i * height + height // 2), lines, fill="black", anchor="lm", font_size=13)
    return sheet


def strip(pipe: Dall3Pipeline) -> Image.Image:
    """A row of images, each the best of 32 candidates, with its prompt below."""
    images = [pipe(prompt, num_candidates=32, seed=0).images[0] for prompt in STRIP]
    row = make_grid([images], SIDE)
    sheet = Image.new("RGB", (row.width, row.height + 24), "white")
    sheet.paste(row)
    draw = ImageDraw.Draw(sheet)
    for i, prompt in enumerate(STRIP):
        draw.text((i * (SIDE + 4) + SIDE // 2, SIDE + 12), prompt, fill="black", anchor="mm", font_size=13)
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", help="a pipeline folder (default: the bundled weights)")
    parser.add_argument("--out", type=Path, default=Path("docs"), help="output folder")
    args = parser.parse_args()
    pipe = Dall3Pipeline.from_pretrained(args.weights)
    args.out.mkdir(parents=True, exist_ok=True)

    strip(pipe).save(args.out / "strip.jpg", quality=90)

    rng = np.random.default_rng(0)
    unseen = [describe(random_scene(rng, held_out=True), background=True) for _ in range(4)]
    prompts = [*HEADLINE, *unseen, *EMOJI]
    rows = []
    for prompt in prompts:
        out = pipe(prompt, num_images=IMAGES, seed=0)
        pairs = zip(out.coarse_images, out.images, strict=True)
        rows.append([picture for pair in pairs for picture in pair] if pipe.upsampler else out.images)
    names = [f"{prompt} (unseen pair)" if prompt in unseen else prompt for prompt in prompts]
    label(make_grid(rows, SIDE), names, SIDE + 4).save(args.out / "gallery.jpg", quality=90)

    rows = []
    for prompt in (HEADLINE[0], unseen[0], EMOJI[0]):
        coarse = pipe.decode_tokens(pipe.generate_tokens(prompt, DRAWN, seed=0))
        rows.append(to_pil(coarse[pipe.rank(coarse, prompt).indices[:BEST]]))
    names = [HEADLINE[0], unseen[0], EMOJI[0]]
    label(make_grid(rows, SIDE), names, SIDE + 4).save(args.out / "best_8_of_64.jpg", quality=90)


if __name__ == "__main__":
    main()
