"""The `dall3` command. `generate` and `upsample` take the options of upstream's generate.py and sample.py."""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Callable
from typing import NamedTuple

from dall3.cli import batch, convert, generate, scenes, train, upsample, web, weights


class Command(NamedTuple):
    """A subcommand. extra: the package's extra, "[name]", that installs the libraries it needs, if any."""

    help: str
    add_options: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], None]
    extra: str = ""


COMMANDS = {
    "generate": Command("generate images for a prompt", generate.add_options, generate.run),
    "batch": Command("generate images for a file of prompts", batch.add_options, batch.run, "[ray]"),
    "upsample": Command("refine image tokens or an image", upsample.add_options, upsample.run),
    "weights": Command("list, download, verify or remove sets of weights", weights.add_options, weights.run),
    "convert": Command("convert weights to a folder of safetensors", convert.add_options, convert.run),
    "train": Command("train a part of a folder of weights", train.add_options, train.run, "[train]"),
    "scenes": Command("render the scenes that the bundled weights were trained on", scenes.add_options, scenes.run),
    "web": Command("serve a web page", web.add_options, web.run, "[web]"),
}
# Errors caused by input or by the machine: only the message is shown. Other errors are shown with their type.
EXPECTED = (ValueError, TypeError, OSError, MemoryError, RuntimeError, AssertionError)


def make_parser() -> argparse.ArgumentParser:
    debug = argparse.ArgumentParser(add_help=False)
    # No default: a subcommand's default would override the option given before the subcommand.
    debug.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error")
    parser = argparse.ArgumentParser(prog="dall3", description=(__doc__ or "").partition("\n")[0], parents=[debug])
    commands = parser.add_subparsers(required=True, dest="command", metavar="COMMAND")
    for name, command in COMMANDS.items():
        command.add_options(commands.add_parser(name, help=command.help, description=command.help, parents=[debug]))
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command. Returns 0, 2 after printing a one-line error, or 130 when interrupted."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # escape characters that the encoding lacks
            stream.reconfigure(errors="backslashreplace")
    args = make_parser().parse_args(argv)
    command = COMMANDS[args.command]
    try:
        command.run(args)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if getattr(args, "debug", False):
            raise
        print(f"dall3: error: {message_of(error, args.command, command.extra)}", file=sys.stderr)
        return 2
    return 0


def message_of(error: Exception, name: str, extra: str) -> str:
    """A one-line error message."""
    text = " ".join(str(error).split())
    if isinstance(error, ImportError):
        missing = f"needs {error.name}" if isinstance(error, ModuleNotFoundError) else f"cannot run: {text}"
        return f"dall3 {name} {missing}; run pip install 'dall3{extra}'"
    if isinstance(error, EXPECTED) and text:
        return text
    return f"{type(error).__name__}: {text}; --debug shows the traceback"
