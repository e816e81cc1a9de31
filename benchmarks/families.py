"""Estimate the memory and time of an image by the published weights: python benchmarks/families.py

The networks have the published sizes, random weights and each set's own settings. `Dall3Pipeline.estimate` times
a few steps of each stage, for one image of one candidate and for the best of 16. On a CPU the transformer's weights are
float16, as in the published files, and everything else is float32. On a GPU all is bfloat16. Rows are written to
results/families.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from gpu import Bench, Letters

from dall3 import Dall3Pipeline
from dall3.loading import encoder_for
from dall3.models.layout import set_memory_layout
from dall3.models.unet import UNet, UNetConfig
from dall3.weights.registry import read_registry


def unet_of_openai(bench: Bench, side: int) -> UNet:
    """OpenAI's unconditional UNet of 256 or 512 px."""
    mults, attention = ((1, 1, 2, 2, 4, 4), (3, 4, 5)) if side == 256 else ((0.5, 1, 1, 2, 2, 4, 4), (4, 5, 6))
    unet: UNet = bench.make(UNet, UNetConfig(256, mults, 2, attention, side, num_head_channels=64))  # type: ignore[arg-type]
    set_memory_layout(unet)
    return unet


def pipeline(bench: Bench, name: str) -> Dall3Pipeline:
    """A pipeline of the set's shape, with its default settings."""
    mega = name == "dalle-mega"
    transformer = bench.mega() if mega else bench.rudalle()
    if not bench.on_gpu:
        transformer.half()
    parts: dict[str, Any] = dict(vqgan=bench.vqgan(mega), upsampler=unet_of_openai(bench, 256 if mega else 512))
    encoder = encoder_for(transformer, Letters())  # type: ignore[arg-type]
    pipe = Dall3Pipeline(text_encoder=encoder, transformer=transformer, clip=bench.clip(), **parts)
    pipe.defaults = read_registry()[name].defaults
    return pipe.to(bench.device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", nargs="+", default=["dalle-mega", "rudalle-malevich"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results") / "families.json")
    args = parser.parse_args()
    dtype = "float32" if args.device == "cpu" else "bfloat16"
    bench = Bench(SimpleNamespace(**vars(args), dtype=dtype, tiny=False))  # type: ignore[arg-type]
    results = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else {}
    for name in args.names:
        pipe = pipeline(bench, name)
        for candidates in (1, 16):
            estimate = pipe.estimate(1, candidates, truncate=True)
            print(f"{name}, best of {candidates}: {estimate}", flush=True)
            row: dict[str, Any] = {stage.name: stage.seconds for stage in estimate.stages}
            row |= {"seconds": estimate.seconds, "peak": estimate.peak, "dtype": dtype}
            row |= {"device": args.device, "threads": torch.get_num_threads(), "torch": torch.__version__}
            results[f"{name}, best of {candidates}, {args.device}"] = row
            args.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        del pipe


if __name__ == "__main__":
    main()
