"""`dall3 web`: serve the pipeline as a web page."""

from __future__ import annotations

import argparse

from dall3.cli.options import WHICH_WEIGHTS, add_placement, given, placement

MAXIMA = ("max_images", "max_candidates", "max_steps", "max_seconds")


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--weights", metavar="NAME", help=f"{WHICH_WEIGHTS} (default: the bundled weights)")
    add("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for all interfaces (default: %(default)s)")
    add("--port", type=int, default=7860, help="port to listen on (default: %(default)s)")
    add_placement(parser)
    # The defaults of `dall3.web.Limits`.
    for name, most in (("images", 8), ("candidates", 256), ("steps", 250), ("seconds", 3600)):
        add(f"--max_{name}", type=int, help=f"upper bound on the {name} of a visitor's request (default: {most})")


def run(args: argparse.Namespace) -> None:
    from dall3.pipeline import Dall3Pipeline
    from dall3.tokens.sampling import check_counts
    from dall3.web import Limits, serve

    limits = {name.removeprefix("max_"): most for name, most in given(args, *MAXIMA).items()}
    check_counts(port=args.port, **limits)
    device, dtype = placement(args)
    pipe = Dall3Pipeline.from_pretrained(args.weights, device=device, dtype=dtype)
    serve(pipe, args.host, args.port, Limits(**limits), own=args.weights or "bundled")
