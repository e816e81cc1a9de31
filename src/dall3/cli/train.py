"""`dall3 train`: train one part of a pipeline folder, or all parts from one recipe."""

from __future__ import annotations

import argparse

from dall3.cli.options import given

MODELS = ("tokenizer", "vqgan", "transformer", "clip", "upsampler")
OVERRIDES = ("steps", "batch_size", "workers", "seed", "every")


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", choices=(*MODELS, "family"), help="the part to train, in this order, or family for all from scratch")
    add("--out", required=True, metavar="FOLDER", help="folder of weights; parts trained earlier are read from it")
    add(
        "--config",
        metavar="TOML",
        help="settings (default, also for settings left out: the recipe of the bundled weights)",
    )
    add("--resume", action="store_true", help="continue from the checkpoints in --out")
    add("--minutes", type=float, help="minutes of training, instead of steps (family: for all parts; default: 600)")
    add("--device", help="cuda, cuda:1, cpu, … (default: the GPU, or the CPU; family: every GPU)")
    part = parser.add_argument_group("options for one part")
    add = part.add_argument
    sources = "scenes, emoji[:FOLDER], folder:PATH or webdataset:PATTERN (braces and * are expanded)"
    add("--data", nargs="+", default=[], metavar="SOURCE[=WEIGHT]", help=f"{sources} (default: the config's)")
    add("--initial", metavar="FOLDER", help="start from the weights of this trained part")
    for name in OVERRIDES:
        add(f"--{name}", type=int, help=f"replaces {name} of the config")
    family = parser.add_argument_group("options for family")
    add = family.add_argument
    add("--emoji", default="emoji", help="folder or archive of the emoji, downloaded if needed (default: %(default)s)")
    add("--tiny", action="store_true", help="train very small networks, to test the command")
    add("--commit", help="commit of this library, for the model card (default: that of its git repository)")


def run(args: argparse.Namespace) -> None:
    if args.model == "family":
        run_family(args)
        return
    from dall3.training.run import train_model

    how = {name: getattr(args, name) for name in ("resume", "initial", "minutes", "device")}
    train_model(args.model, args.out, args.config, args.data, **how, **given(args, *OVERRIDES))
    print(f'trained the {args.model} in "{args.out}"')


def run_family(args: argparse.Namespace) -> None:
    from dall3.training.family import train_family
    from dall3.training.recipe import RECIPE

    how = {name: getattr(args, name) for name in ("device", "resume", "tiny", "commit")}
    minutes = 600.0 if args.minutes is None else args.minutes
    failed = train_family(args.config or RECIPE, args.out, args.emoji, minutes, **how)
    if failed:
        raise ValueError(f"{', '.join(failed)} failed; the other parts are in {args.out}, and --resume continues")
    print(f'trained the family in "{args.out}"')
