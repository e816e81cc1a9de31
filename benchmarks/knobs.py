"""Draw the grids of docs/guidance.md: python benchmarks/knobs.py [--out docs/knobs]

Each grid has one row per prompt and one column per value of a setting. The seed is 0, and the other settings are the
weights' defaults.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from dall3 import Dall3Pipeline
from dall3.images import make_grid, to_pil

PROMPTS = ("a cube made of cloud", "a golden torus", "a red apple on a blue background")
SIDE, GAP, TOP = 160, 4, 20
COARSE: dict[str, tuple[Any, ...]] = {
    "cond_scale": (1.0, 2.0, 3.0, 5.0),
    "top_p": (0.5, 0.8, 0.9, 1.0),
    "temperature": (0.5, 0.8, 1.0, 1.3),
}
FINE: dict[str, tuple[Any, ...]] = {
    "strength": (0.1, 0.15, 0.2, 0.3),
    "clip_guidance_scale": (0, 500, 1000, 4000),
    "num_inference_steps": (10, 20, 40, 100),
}


def sheet(values: tuple[Any, ...], draw: Callable[[str, Any], Image.Image]) -> Image.Image:
    """A grid of images with the setting's values above it."""
    grid = make_grid([[draw(prompt, value) for value in values] for prompt in PROMPTS], SIDE, GAP)
    page = Image.new("RGB", (grid.width, grid.height + TOP), "white")
    page.paste(grid, (0, TOP))
    pen = ImageDraw.Draw(page)
    for i, value in enumerate(values):
        pen.text((i * (SIDE + GAP) + SIDE // 2, TOP // 2), str(value), fill="black", anchor="mm", font_size=13)
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/knobs"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    pipe = Dall3Pipeline.from_pretrained()
    how: dict[str, Any] = dict(seed=0, progress=False)
    tokens = {prompt: pipe.generate_tokens(prompt, **how) for prompt in PROMPTS}

    def coarse(name: str) -> Callable[[str, Any], Image.Image]:
        return lambda prompt, value: to_pil(pipe.decode_tokens(pipe.generate_tokens(prompt, **how, **{name: value})))[0]

    def fine(name: str) -> Callable[[str, Any], Image.Image]:
        guided = {"clip_guidance_scale": pipe.defaults["clip_guidance_scale"]} | how  # as the pipeline's call does
        return lambda prompt, value: to_pil(pipe.upsample(tokens[prompt], prompt=prompt, **guided | {name: value}))[0]

    def redrawn(prompt: str, value: float) -> Image.Image:
        changed = pipe.generate_tokens(prompt, init_image=tokens[prompt][0], change=value, **how | {"seed": 1})
        return to_pil(pipe.decode_tokens(changed))[0]

    def best(prompt: str, value: int) -> Image.Image:
        pictures = pipe.decode_tokens(pipe.generate_tokens(prompt, value, **how))
        return to_pil(pictures[pipe.rank(pictures, prompt, progress=False).indices[:1]])[0]

    pages = {name: (values, coarse(name)) for name, values in COARSE.items()}
    pages |= {"num_candidates": ((1, 4, 16, 64), best), "change": ((0.1, 0.3, 0.6, 1.0), redrawn)}
    pages |= {name: (values, fine(name)) for name, values in FINE.items()}
    for name, (values, draw) in pages.items():
        sheet(values, draw).save(args.out / f"{name}.jpg", quality=88)
        print(args.out / f"{name}.jpg", flush=True)


if __name__ == "__main__":
    main()
