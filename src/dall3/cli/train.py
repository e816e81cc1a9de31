"""`dall3 train`: train one part of a pipeline folder, or all parts from one recipe."""

from __future__ import annotations

import argparse

from dall3.cli.options import given

MODELS = ("tokenizer", "vqgan", "transformer", "clip", "upsampler")
OVERRIDES = ("steps", "batch_size", "workers", "seed", "every")


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", choices=(*MODELS, "family"), help="the part to train; family trains all parts from scratch")
    add("--out", required=True, metavar="FOLDER", help="folder of weights; parts trained earlier are read from it")
    add(
        "--config",
        metavar="TOML",
        help="settings, with the tables model, loss and train (default: those of the bundled weights)",
    )
    sources = "scenes, emoji[:FOLDER], folder:PATH or webdataset:PATTERN (braces and * are expanded)"
    add("--data", nargs="+", default=[], metavar="SOURCE[=WEIGHT]", help=f"{sources} (default: the config's)")
    add("--resume", action="store_true", help="continue from the checkpoint in --out")
    add("--initial", metavar="FOLDER", help="start from the weights of this trained part")
    for name in OVERRIDES:
        add(f"--{name}", type=int, help=f"replaces {name} of the config")
    family = parser.add_argument_group("options of `dall3 train family`")
    add = family.add_argument
    add("--minutes", type=float, default=600.0, help="time for all parts together, in minutes (default: %(default)g)")
    add("--emoji", default="emoji", help="folder or archive of the emoji, downloaded if needed (default: %(default)s)")
    add("--device", help="device, such as cuda:1 or cpu (default: all GPUs, or the CPU)")
    add("--tiny", action="store_true", help="train very small networks, to test the command")
    add("--commit", default="not stated", help="commit of this library, for the model card")


def run_family(args: argparse.Namespace) -> None:
    from dall3.training import family

    how = {name: getattr(args, name) for name in ("minutes", "device", "resume", "tiny", "commit")}
    failed = family.train_family(args.config or family.RECIPE, args.out, args.emoji, **how)
    if failed:
        raise ValueError(f"{', '.join(failed)} failed; the other parts are in {args.out}, and --resume continues")
    print(f'trained the family in "{args.out}"')


def run(args: argparse.Namespace) -> None:
    if args.model == "family":
        run_family(args)
        return
    from dall3.training.run import train_model

    overrides = given(args, *OVERRIDES)
    train_model(args.model, args.out, args.config, args.data, args.resume, args.initial, **overrides)
    print(f'trained the {args.model} in "{args.out}"')
