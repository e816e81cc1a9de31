"""`dall3 batch`: many prompts, the best few of many candidates for each, in this process or on a Ray cluster.

prompts ──draw──▶ tokens of the candidates ──rank──▶ the best, with scores ──refine──▶ files ──▶ shards and an index
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm

from dall3.batch.job import STAGE_NAMES, Job, load_pipeline, make_job
from dall3.batch.prompts import fingerprint, read_prompts
from dall3.batch.stages import STAGES, Row, first_row
from dall3.errors import require
from dall3.pipeline import Dall3Pipeline
from dall3.tokens.sampling import check_counts
from dall3.tokens.seeds import choose_seed
from dall3.weights.registry import PathLike

if TYPE_CHECKING:
    from dall3.batch.store import Store

__all__ = ["Report", "generate"]


@dataclass(frozen=True)
class Report:
    """The result of a run."""

    index: Path  # the Parquet file
    prompts: int
    failed: dict[int, str]  # the reason, by the prompt's number


def generate(
    prompts: PathLike | Sequence[str],
    out: PathLike,
    num_images: int = 8,
    num_candidates: int = 1024,
    *,
    weights: PathLike | None = None,
    seed: int = 0,
    batch_size: int = 32,
    rank_batch_size: int | None = None,
    refine_batch_size: int | None = None,
    refine: bool = True,
    truncate: bool = False,
    threads: int = 1,
    dtype: str = "float32",
    device: str = "cpu",
    prompts_per_shard: int = 128,
    ray: str | None = None,
    workers: int | dict[str, int] = 1,
    num_cpus: float | dict[str, float] | None = None,
    num_gpus: float | dict[str, float] = 0,
    prompts_per_task: int = 1,
    progress: bool = True,
    **settings: Any,
) -> Report:
    """Draw `num_candidates` candidates for every prompt, keep the `num_images` with the highest CLIP scores, refine
    them, and write webdataset shards and a Parquet index to the folder `out`.

    If the folder holds an interrupted run with the same settings, the run is resumed; shards that are missing or
    damaged are made again. A prompt that fails is recorded with the reason and does not end the run. The next run
    tries it again, unless its text is the reason.

    prompts: texts, or the path of a .txt (one prompt per line), .csv, .jsonl or .parquet (column "prompt", optionally
    "seed"). A prompt has at most 10,000 characters.
    weights: as in `Dall3Pipeline.from_pretrained`; on a cluster every machine loads them by this name.
    seed: random seed of the run. A prompt's seed follows from it and the prompt's number, a candidate's random numbers
    from that and the candidate's number: results depend neither on the order nor on the machine.
    batch_size: candidates drawn at a time. rank_batch_size: candidates decoded and scored at a time (default:
    batch_size). refine_batch_size: images refined at a time (default: 1 on a CPU, 4 to 16 on a GPU).
    refine: False to skip the diffusion and save the coarse images. truncate: cut prompts that are too long for the
    transformer. threads: threads of torch in each stage. dtype: "float32", "float16" or "bfloat16". device: device of a
    run in this process; on a cluster, stages with GPUs run on "cuda". prompts_per_shard: prompts in one tar.
    settings: fields of `Sampling` and `Denoising`. Those not given come from the weights' recommended settings.

    ray: None to run in this process, the address of a cluster ("auto", "host:6379"), or "local" to start one on this
    machine. workers: number of actors per stage. num_cpus (default: threads), num_gpus: of one worker, shared by its
    three actors. Each of the three may be a dict with the keys "draw", "rank" and "refine", for one actor each.
    prompts_per_task: prompts that an actor takes at a time. With more, the driver has less to do per prompt, and a
    failure repeats more work.

    Raises ValueError, before any work, for prompts that cannot be read, a setting out of range, a missing part, a
    missing library, or a folder with another run; RuntimeError if Ray cannot continue.

    >>> report = generate(["a cube made of cloud", ""], "book", 1, 2, refine=False, progress=False)
    >>> report.prompts, report.failed
    (2, {1: "ValueError: the prompt '' is empty; expected text"})
    """
    for module in ["pyarrow"] + ["ray"] * (ray is not None):
        option = " --ray" if module == "ray" else ""
        require(find_spec(module) is not None, f"dall3 batch{option} needs {module}; run pip install 'dall3[ray]'")
    from dall3.batch.store import Store

    check_counts(prompts_per_shard=prompts_per_shard, prompts_per_task=prompts_per_task)
    require(dtype in ("float32", "float16", "bfloat16"), f"dtype='{dtype}'; expected float32, float16 or bfloat16")
    book = read_prompts(prompts, choose_seed(seed, None))
    devices = dict.fromkeys(STAGE_NAMES, torch.device(device).type)
    sizes: dict[str, Any] = {}
    if ray is not None:
        from dall3.batch import ray_engine

        sizes = {
            "workers": ray_engine.per_stage("workers", workers, shared=False),
            "num_cpus": ray_engine.per_stage("num_cpus", threads if num_cpus is None else num_cpus, shared=True),
            "num_gpus": ray_engine.per_stage("num_gpus", num_gpus, shared=True),
        }
        one_gpu = isinstance(num_gpus, dict) or num_gpus <= 1
        require(one_gpu, f"num_gpus={num_gpus}; expected at most 1: a pipeline uses one GPU")
        check_counts(**{f"workers of {stage}": number for stage, number in sizes["workers"].items()})
        devices = {stage: "cuda" if sizes["num_gpus"][stage] else "cpu" for stage in STAGE_NAMES}
    with nullcontext() if ray is None else ray_engine.cluster(ray):
        pipe = load_pipeline(weights, dtype, refine)
        how = (num_images, num_candidates, batch_size, rank_batch_size, refine_batch_size, truncate, threads, settings)
        job = make_job(pipe, weights, dtype, devices, *how)
        about = {"format": 1, "seed": seed, "prompts": len(book), "prompts_hash": fingerprint(book)}
        with closing(Store(out, book, about | job.settings(), prompts_per_shard)) as store:
            rows = [first_row(prompt) for prompt in book if not store.is_done(prompt.number)]
            if ray is None:
                done = run_in_loop(job, rows, pipe.to(device))
            else:
                del pipe
                done = ray_engine.run_on_ray(job, rows, **sizes, prompts_per_task=prompts_per_task)
            store_finished(done, store, len(book) - len(rows), len(book), progress)
            return Report(store.finish(), len(book), store.failures())


def store_finished(done: Iterator[Row], store: Store, before: int, total: int, progress: bool) -> None:
    """Store each finished prompt and show the progress: prompts per second, time left, failures."""
    failed = 0
    with tqdm(total=total, initial=before, unit="prompt", disable=not progress) as bar:
        for row in done:
            store.add(row["number"], row["files"], row["error"], row["retry"])
            if row["error"]:
                failed += 1
                bar.set_postfix(failed=failed)
                if progress:
                    bar.write(f"prompt {row['number']} failed: {row['error']}", file=sys.stderr)
            bar.update()


def run_in_loop(job: Job, rows: Sequence[Row], pipe: Dall3Pipeline) -> Iterator[Row]:
    """Run all stages in this process, prompt after prompt, and yield the finished rows."""
    stages = [stage(job, pipe) for stage in STAGES]
    with torch_threads(job.threads):
        for row in rows:
            for stage in stages:
                row = stage(row)
            yield row


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
