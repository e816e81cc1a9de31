"""`dall3 scenes`: render the scenes that the bundled weights were trained on."""

from __future__ import annotations

import argparse
import os
from functools import partial
from pathlib import Path

from dall3.cli.options import add_seed


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("what", choices=("sheet", "render"), help="a contact sheet, or images with captions for training")
    add("--out", help="file of the sheet (default: sheet.png), or folder of the images (default: scenes)")
    add("--count", type=int, default=1000, help="number of images (default: %(default)s)")
    add("--size", type=int, help="width and height in pixels (default: 128 for the sheet, 256 for images)")
    add_seed(parser)
    add("--workers", type=int, default=os.cpu_count() or 1, help="number of processes (default: one per core)")
    add("--overwrite", action="store_true", help="replace files of an earlier run")


def run(args: argparse.Namespace) -> None:
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor

    from tqdm.auto import tqdm

    from dall3.output import check_free
    from dall3.scenes.sheet import write_contact_sheet
    from dall3.tokens.sampling import check_counts

    out, size = Path(args.out or {"sheet": "sheet.png", "render": "scenes"}[args.what]), args.size
    check_counts(count=args.count, size=128 if size is None else size)
    if args.what == "sheet":
        check_free(out.parent, [] if args.overwrite else [out.name])
        write_contact_sheet(out, args.seed, size or 128)
        print(f'drew "{out}"')
        return
    check_counts(workers=args.workers)
    check_free(out, [] if args.overwrite else [f"{i:06}.png" for i in range(args.count)])
    out.mkdir(parents=True, exist_ok=True)
    job = partial(render_scene, out=out, size=size or 256, seed=args.seed)
    with ProcessPoolExecutor(args.workers, multiprocessing.get_context("spawn")) as pool:
        for _ in tqdm(pool.map(job, range(args.count), chunksize=8), total=args.count, desc="rendering"):
            pass
    print(f'rendered {args.count} images with captions in "{out}"')


def render_scene(index: int, out: Path, size: int, seed: int) -> None:
    """Write scene number `index` of a seed, with four captions. The result does not depend on the process."""
    import numpy as np
    from PIL import Image

    from dall3.scenes import caption, random_scene, render

    rng = np.random.default_rng((seed, index))
    scene = random_scene(rng)
    captions = "\n".join(caption(scene, rng) for _ in range(4))
    Image.fromarray(render(scene, size)).save(out / f"{index:06}.png")
    (out / f"{index:06}.txt").write_text(captions + "\n", encoding="utf-8")
