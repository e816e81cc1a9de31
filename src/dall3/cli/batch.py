"""`dall3 batch`: images for a file of prompts, on this machine or on a Ray cluster."""

from __future__ import annotations

import argparse

from dall3.cli.options import (
    WHICH_WEIGHTS,
    add_diffusion,
    add_placement,
    add_sampling,
    add_seed,
    given,
    placement,
    refinement,
    sampling,
    with_dashes,
)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument = with_dashes(parser.add_argument)  # type: ignore[method-assign]
    add = parser.add_argument
    add("prompts", help="a .txt with one prompt per line, or a .csv, .jsonl or .parquet with a column 'prompt'")
    add(
        "--out",
        required=True,
        metavar="FOLDER",
        help="folder of the shards and the index; an interrupted run in it is resumed",
    )
    add("--weights", metavar="NAME", help=f"{WHICH_WEIGHTS} (default: the bundled weights)")
    # Options without a default here take the default of `dall3.batch.generate`, which their help repeats.
    add("--num_images", type=int, help="images to keep for each prompt (default: 8)")
    add("--num_candidates", type=int, help="candidates to draw for each prompt (default: 1024)")
    add("--batch_size", type=int, help="candidates drawn at a time (default: 32)")
    add("--rank_batch_size", type=int, help="candidates decoded and scored at a time (default: batch_size)")
    add("--refine_batch_size", type=int, help="images refined at a time (default: 1 on a CPU, 4 to 16 on a GPU)")
    add("--coarse", action="store_true", help="skip the diffusion")
    add("--truncate", action="store_true", help="cut prompts that are too long")
    add("--threads", type=int, help="threads of torch in each stage (default: 1)")
    add("--prompts_per_shard", type=int, help="prompts in each shard (default: 128)")
    add("--ray", metavar="ADDRESS", help="run on this Ray cluster (auto, host:6379), or start one here (local)")
    each = "one number, or draw=N rank=N refine=N"
    add("--workers", nargs="+", metavar="N", help=f"with --ray, actors per stage: {each} (default: 1)")
    share = "with --ray, of one worker, divided among its three actors; or of each actor, as draw=N rank=N refine=N"
    add("--num_cpus", nargs="+", metavar="N", help=f"CPUs {share} (default: threads)")
    add("--num_gpus", nargs="+", metavar="N", help=f"GPUs {share} (default: 0)")
    add("--prompts_per_task", type=int, help="with --ray, prompts that an actor takes at a time (default: 1)")
    add_sampling(parser)
    add_diffusion(parser, "on if the weights have a CLIP and an upsampler")
    add_seed(parser)
    add_placement(parser)


def run(args: argparse.Namespace) -> None:
    from dall3.batch import generate
    from dall3.errors import require

    require(args.ray is None or args.device is None, "--device does not apply with --ray; use --num_gpus")
    device, _ = placement(args)
    names = ("num_images", "num_candidates", "weights", "seed", "batch_size", "rank_batch_size", "refine_batch_size")
    how = given(args, *names, "truncate", "threads", "dtype", "prompts_per_shard", "ray", "prompts_per_task")
    for name, words in given(args, "workers", "num_cpus", "num_gpus").items():
        how[name] = numbers(name, words, int if name == "workers" else float)
    how |= refinement(args) | sampling(args)
    report = generate(args.prompts, args.out, refine=not args.coarse, device=device, **how)
    print(f'{report.prompts} prompts, {len(report.failed)} failed; index at "{report.index}"')


def numbers(name: str, words: list[str], kind: type[float]) -> float | dict[str, float]:
    """Parse the words of an option: one number, or numbers by stage. Raises ValueError for others."""
    try:
        if len(words) == 1 and "=" not in words[0]:
            return kind(words[0])
        return {stage: kind(value) for stage, _, value in (word.partition("=") for word in words)}
    except ValueError:
        raise ValueError(f"--{name} {' '.join(words)}; expected a number, or draw=N rank=N refine=N") from None
