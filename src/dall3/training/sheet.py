"""Draw a sheet of samples of a family: python -m dall3.training.sheet FOLDER FILE"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.nn.functional as F

from dall3 import Dall3Pipeline
from dall3.images import make_grid, to_pil

PROMPTS = (
    *("a cube made of cloud", "a cube made of porcupine", "a sphere made of water", "a torus made of brick"),
    *("an armchair shaped like an avocado", "a teapot with polka dots", "a pyramid with polka dots", "a red star"),
    *("a girl with thick glasses", "a fox wearing a crown", "an avocado", "a violin", "a bicycle", "a lion"),
)


def draw_sheet(folder: str | Path, path: str | Path, device: str, prompts: tuple[str, ...] = PROMPTS) -> None:
    """Draw two images for each prompt, one prompt per row: the coarse image, enlarged, beside the refined one.

    The file is written after each prompt, so an interrupted run leaves a sheet with fewer rows.
    """
    pipe = Dall3Pipeline.from_pretrained(folder, device=device)
    rows = []
    for prompt in prompts:
        tokens = pipe.generate_tokens(prompt, 2, seed=0, progress=False)
        coarse = F.interpolate(pipe.decode_tokens(tokens), scale_factor=2.0, mode="bicubic").clamp(0, 1)
        fine = pipe.upsample(tokens, prompt=prompt, seed=0, progress=False)
        rows.append([image for pair in zip(to_pil(coarse), to_pil(fine), strict=True) for image in pair])
        make_grid(rows, 192).save(path, quality=90)


if __name__ == "__main__":
    draw_sheet(sys.argv[1], sys.argv[2], "cuda" if torch.cuda.is_available() else "cpu")
