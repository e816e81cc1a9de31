"""`dall3 convert`: convert a set of weights, or upstream's checkpoints, to a folder of safetensors."""

from __future__ import annotations

import argparse
from pathlib import Path

from dall3.cli.options import WHICH_WEIGHTS


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("name", nargs="?", help=WHICH_WEIGHTS)
    add("--out", required=True, metavar="FOLDER", help="a new or empty folder")
    add("--half", action="store_true", help="write float16, which halves the size")
    add("--registry", metavar="TOML", help="an additional weights.toml")
    add("--dalle_path", help="a checkpoint of DALLE-pytorch")
    add("--bpe_path", help="the tokenizer of --dalle_path (default: CLIP's)")
    add("--vqgan_model_path", help="the VQGAN's .ckpt, or a DiscreteVAE's .pt")
    add("--vqgan_config_path", help="the VQGAN's .yaml")
    add("--openai_vae", nargs=2, metavar=("ENCODER", "DECODER"), help="OpenAI's encoder.pkl and decoder.pkl")
    add("--diffusion_path", help="a checkpoint of guided-diffusion")
    add("--model_config", metavar="JSON", help="guided-diffusion's flags, for a UNet of an unusual size")
    add("--super_resolution_path", help="an upscaler's file, or a super-resolution checkpoint of guided-diffusion")
    add("--clip_path", help="CLIP: a file, or an open_clip name")


def run(args: argparse.Namespace) -> None:
    import torch

    from dall3.errors import require
    from dall3.pipeline import Dall3Pipeline
    from dall3.weights.folder import check_empty

    check_empty(Path(args.out))  # before any download
    files = {
        "dalle": args.dalle_path,
        "bpe": args.bpe_path,
        "vqgan": args.openai_vae or args.vqgan_model_path,
        "vqgan_config": args.vqgan_config_path,
        "diffusion": args.diffusion_path,
        "diffusion_config": args.model_config,
        "super_resolution": args.super_resolution_path,
        "clip": args.clip_path,
    }
    given = {name: path for name, path in files.items() if path is not None}
    require(bool(given) != (args.name is not None), "pass either the name of a set or the paths of files to convert")
    if given:
        pipe = Dall3Pipeline.from_checkpoints(**given)
    else:
        pipe = Dall3Pipeline.from_pretrained(args.name, registry=args.registry)
    print(f'wrote "{pipe.save_pretrained(args.out, torch.float16 if args.half else None)}"')
