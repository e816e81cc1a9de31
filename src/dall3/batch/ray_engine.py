"""The stages on a Ray cluster: Ray Data streams the prompts through a pool of actors per stage."""

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

TASKS_PER_EXECUTION = 10_000  # bounds the tasks of a stage that the driver keeps track of
# Seconds without progress after which an execution ends. Drawing 1,024 candidates of one prompt with a large network on
# a slow core may take hours.
PATIENCE = 4 * 3600
RESTARTS = 3  # consecutive restarts without a finished prompt
AHEAD, FILES = 8, 64 << 20  # per worker: maximum number of drawn prompts that wait to be ranked, and of bytes of files

# Fractions of a worker's resources. Drawing is nearly all of the work: no two drawing actors fit on one GPU.
SHARES = {"draw": 0.8, "rank": 0.1, "refine": 0.1}

PerStage = float | Mapping[str, float]


def per_stage(name: str, value: PerStage, shared: bool) -> dict[str, float]:
    """A number for each stage, from one number for all stages or a dict by the stage's name.

    shared: divide the one number among the stages. Raises ValueError for an unknown stage or a negative number.
    """
    if isinstance(value, Mapping):
        unknown = [stage for stage in value if stage not in STAGE_NAMES]
        require(not unknown, f"{name} has the unknown stage {', '.join(unknown)}; expected {', '.join(STAGE_NAMES)}")
        found = {stage: value.get(stage, 0) for stage in STAGE_NAMES}
    else:
        found = {stage: round(value * share, 4) if shared else value for stage, share in SHARES.items()}
    bad = [number for number in found.values() if not 0 <= number < math.inf]
    require(not bad, f"{name}={value}; expected numbers of at least 0")
    return found


@contextmanager
def cluster(address: str) -> Iterator[None]:
    """Connect to the cluster at `address`, or start one on this machine for "local", and leave it at the end.

    A program that is connected already stays connected. Raises ValueError if there is no cluster at the address.
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
    job: Job,
    rows: Sequence[Row],
    workers: dict[str, float],
    num_cpus: dict[str, float],
    num_gpus: dict[str, float],
    prompts_per_task: int = 1,
) -> Iterator[Row]:
    """Run all stages on the cluster and yield the finished rows, in the order in which they finish.

    workers, num_cpus, num_gpus: by stage. prompts_per_task: rows that an actor takes at a time.

    Ray repeats the work of an actor or a machine that fails. If an execution fails nevertheless, another one starts
    with the remaining rows. Raises RuntimeError if executions fail repeatedly without finishing a row.
    """
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    left = {row["number"]: row for row in rows}
    fruitless = 0
    while left:
        before, reason = len(left), "it ended early"
        now = list(islice(left.values(), TASKS_PER_EXECUTION * prompts_per_task))
        try:
            for row in execution(job, now, workers, num_cpus, num_gpus, prompts_per_task):
                if left.pop(row["number"], None) is not None:
                    yield row
        except Exception as error:  # raised by Ray, Ray Data, or an actor that could not start
            reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
        fruitless = fruitless + 1 if len(left) == before else 0
        if fruitless > RESTARTS:
            raise RuntimeError(f"Ray failed {fruitless} times in a row with {len(left)} prompts left: {reason}")


def execution(
    job: Job,
    rows: list[Row],
    workers: dict[str, float],
    num_cpus: dict[str, float],
    num_gpus: dict[str, float],
    prompts_per_task: int,
) -> Iterator[Row]:
    """One execution of Ray Data over the rows."""
    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_no_progress_timeout_s = PATIENCE
    # A bound on the tokens that wait for a slower stage: at the bound, the stage before it waits.
    ahead = max(AHEAD, 2 * prompts_per_task)
    waiting = ahead * job.recipe["num_candidates"] * job.tokens * np.dtype(job.token_type).itemsize
    limit = (waiting + FILES) * max(workers.values())
    context.execution_options.resource_limits = ExecutionResources(object_store_memory=limit)
    with DataContext.current(context):
        # A task works on one block. Without a number of blocks, Ray would choose few large ones.
        data: Any = ray.data.from_items(rows, override_num_blocks=math.ceil(len(rows) / prompts_per_task))
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
