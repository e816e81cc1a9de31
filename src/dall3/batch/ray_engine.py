"""The stages on a cluster: Ray Data streams the prompts through a pool of actors for each."""

from __future__ import annotations

import logging
import math
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np
import ray
from ray.data import ActorPoolStrategy, DataContext, ExecutionResources

from dall3.batch.job import STAGE_NAMES, Job
from dall3.batch.stages import STAGES, Row
from dall3.errors import require

AT_ONCE = 10_000  # prompts in one execution, each a block of its own in the driver's books
PATIENCE = 4 * 3600  # seconds without any news: a prompt may be 1,024 draws of a large network on a slow core
RESTARTS = 3  # of an execution that brought nothing
AHEAD, PICTURES = 8, 64 << 20  # for each worker: prompts drawn and not yet ranked, and bytes of finished files

# Of a worker's resources. No two actors that draw, which is nearly all of the work, share a GPU.
SHARES = {"draw": 0.8, "rank": 0.1, "refine": 0.1}

PerStage = float | Mapping[str, float]


def per_stage(name: str, value: PerStage, shared: bool) -> dict[str, float]:
    """A number for each stage: one for all of them, shared out among them or the same, or by the stage's name.

    Raises ValueError for another stage, or a number below 0.
    """
    if isinstance(value, Mapping):
        unknown = [stage for stage in value if stage not in STAGE_NAMES]
        require(not unknown, f"{name} names {', '.join(unknown)}; the stages are {', '.join(STAGE_NAMES)}")
        found = {stage: value.get(stage, 0) for stage in STAGE_NAMES}
    else:
        found = {stage: round(value * share, 4) if shared else value for stage, share in SHARES.items()}
    bad = [number for number in found.values() if not 0 <= number < math.inf]
    require(not bad, f"{name}={value}; expected numbers from 0")
    return found


@contextmanager
def cluster(address: str) -> Iterator[None]:
    """In a cluster, or in one that is started on this machine for "local". A program that is in one stays in that.

    Raises ValueError for an address where there is none.
    """
    if ray.is_initialized():
        yield
        return
    quiet: dict[str, Any] = dict(log_to_driver=False, logging_level=logging.ERROR)
    try:
        if address == "local":
            ray.init(include_dashboard=False, **quiet)
        else:
            host, _, port = address.rpartition(":")
            if port.isdigit():  # Ray itself waits for minutes
                socket.create_connection((host, int(port)), timeout=10).close()
            ray.init(address=address, **quiet)
    except OSError as error:
        raise ValueError(f"no Ray cluster at {address} ({error}); start one with `ray start --head`") from None
    try:
        yield
    finally:
        ray.shutdown()


def run_on_ray(
    job: Job, rows: Sequence[Row], workers: dict[str, float], num_cpus: dict[str, float], num_gpus: dict[str, float]
) -> Iterator[Row]:
    """The rows after all stages, in the order in which they are done.

    Ray runs again what an actor or a machine took with it. Where an execution ends all the same, another takes up
    what is left. Raises RuntimeError where that brings nothing more.
    """
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    left = {row["number"]: row for row in rows}
    fruitless = 0
    while left:
        before, reason = len(left), "it ended before its end"
        try:
            for row in execution(job, list(islice(left.values(), AT_ONCE)), workers, num_cpus, num_gpus):
                if left.pop(row["number"], None) is not None:
                    yield row
        except Exception as error:  # of Ray, of Ray Data, or of an actor that could not start
            reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
        fruitless = fruitless + 1 if len(left) == before else 0
        if fruitless > RESTARTS:
            raise RuntimeError(f"Ray gave up {fruitless} times with {len(left)} prompts left: {reason}")


def execution(
    job: Job, rows: list[Row], workers: dict[str, float], num_cpus: dict[str, float], num_gpus: dict[str, float]
) -> Iterator[Row]:
    """One run of Ray Data over some rows."""
    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_no_progress_timeout_s = PATIENCE
    # Tokens that wait for a slower stage are few: the stage before it waits instead.
    waiting = AHEAD * job.recipe["num_candidates"] * job.tokens * np.dtype(job.token_type).itemsize
    limit = (waiting + PICTURES) * max(workers.values())
    context.execution_options.resource_limits = ExecutionResources(object_store_memory=limit)
    with DataContext.current(context):
        # A block a prompt: what is done again is small.
        data: Any = ray.data.from_items(rows, override_num_blocks=len(rows))
    for stage in STAGES:
        data = data.map(
            stage,
            fn_constructor_args=(job,),
            compute=ActorPoolStrategy(min_size=1, max_size=int(workers[stage.name])),
            num_cpus=num_cpus[stage.name],
            num_gpus=num_gpus[stage.name],
        )
    for batch in data.iter_batches(batch_size=None, batch_format="pyarrow"):
        yield from batch.to_pylist()
