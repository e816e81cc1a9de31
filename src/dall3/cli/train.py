"""`dall3 train`: train a part of a folder of weights on pictures with captions."""

from __future__ import annotations

import argparse

from dall3.cli.options import given

MODELS = ("tokenizer", "vqgan", "transformer", "clip", "upsampler")
OVERRIDES = ("steps", "batch_size", "workers", "seed", "every")


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", choices=MODELS, help="the part to train, in this order")
    add("--out", required=True, metavar="FOLDER", help="the folder of weights; earlier parts are read from it")
    add("--config", metavar="TOML", help="tables model, loss and train (default: those of the bundled weights)")
    sources = "scenes, emoji[:FOLDER], folder:PATH or webdataset:PATTERN, whose braces and * are expanded"
    add("--data", nargs="+", default=[], metavar="SOURCE[=WEIGHT]", help=f"{sources} (default: the config's)")
    add("--resume", action="store_true", help="continue from the checkpoint in --out")
    add("--initial", metavar="FOLDER", help="start from the weights of this trained part")
    for name in OVERRIDES:
        add(f"--{name}", type=int, help="in place of the config's")


def run(args: argparse.Namespace) -> None:
    from dall3.training.run import train_model

    overrides = given(args, *OVERRIDES)
    train_model(args.model, args.out, args.config, args.data, args.resume, args.initial, **overrides)
    print(f'trained the {args.model} in "{args.out}"')
