"""`dall3 batch`: pictures of a file of prompts, on this machine or on a Ray cluster."""

from __future__ import annotations

import argparse
from typing import Any

from dall3.cli.options import (
    WHICH_WEIGHTS,
    add_diffusion,
    add_placement,
    add_sampling,
    add_seed,
    placement,
    refinement,
    sampling,
    with_dashes,
)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument = with_dashes(parser.add_argument)  # type: ignore[method-assign]
    add = parser.add_argument
    add("prompts", help="a .txt with a prompt a line, or a .csv, .jsonl or .parquet with a column 'prompt'")
    add(
        "--out",
        required=True,
        metavar="FOLDER",
        help="the folder of the shards and the index; if it holds an interrupted run, the run is resumed",
    )
    add("--weights", metavar="NAME", help=f"{WHICH_WEIGHTS} (default: the bundled weights)")
    add("--num_images", type=int, default=8, help="pictures to keep of each prompt (default: %(default)s)")
    add("--num_candidates", type=int, default=1024, help="pictures to draw of each prompt (default: %(default)s)")
    add("--batch_size", type=int, default=32, help="candidates drawn at a time (default: %(default)s)")
    add("--rank_batch_size", type=int, help="candidates decoded and scored at a time (default: batch_size)")
    add("--refine_batch_size", type=int, help="pictures refined at a time (default: 1 on a CPU, 4 to 16 on a GPU)")
    add("--coarse", action="store_true", help="skip the diffusion")
    add("--truncate", action="store_true", help="cut prompts that are too long")
    add("--threads", type=int, default=1, help="threads of torch in each stage (default: %(default)s)")
    add("--prompts_per_shard", type=int, default=128, help="default: %(default)s")
    add("--ray", metavar="ADDRESS", help="run on this Ray cluster (auto, host:6379), or start one here (local)")
    each = "one number, or draw=N rank=N refine=N"
    add("--workers", nargs="+", default=["1"], metavar="N", help=f"with --ray, actors per stage: {each} (default: 1)")
    share = "with --ray, for a worker, shared by its three actors; or for each actor, as draw=N rank=N refine=N"
    add("--num_cpus", nargs="+", metavar="N", help=f"{share} (default: threads)")
    add("--num_gpus", nargs="+", default=["0"], metavar="N", help=f"{share} (default: 0)")
    add_sampling(parser)
    add_diffusion(parser)
    add_seed(parser)
    add_placement(parser)


def run(args: argparse.Namespace) -> None:
    from dall3.batch import generate
    from dall3.errors import require

    require(args.ray is None or args.device is None, "--device is without --ray; with it, --num_gpus places the stages")
    device, _ = placement(args)
    names = ("num_images", "num_candidates", "weights", "seed", "batch_size", "rank_batch_size", "refine_batch_size")
    how = {name: getattr(args, name) for name in (*names, "truncate", "threads", "dtype", "prompts_per_shard", "ray")}
    how["workers"] = numbers("workers", args.workers, int)
    how |= {name: numbers(name, getattr(args, name), float) for name in ("num_cpus", "num_gpus")}
    how |= refinement(args) | sampling(args)
    report = generate(args.prompts, args.out, refine=not args.coarse, device=device, **how)
    print(f'{report.prompts} prompts, {len(report.failed)} failed; index at "{report.index}"')


def numbers(name: str, words: list[str] | None, kind: Any) -> Any:
    """Parse the words of an option: one number, or numbers by stage. Raises ValueError for others."""
    if words is None:
        return None
    try:
        if len(words) == 1 and "=" not in words[0]:
            return kind(words[0])
        return {stage: kind(value) for stage, _, value in (word.partition("=") for word in words)}
    except ValueError:
        raise ValueError(f"--{name} {' '.join(words)}; expected a number, or draw=N rank=N refine=N") from None
