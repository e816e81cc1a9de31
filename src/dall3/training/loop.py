"""The training loop of all parts, with schedules, resuming, interruption and several processes.

Schedules follow the progress of the training, from 0 to 1, which is a number of steps or a time. The run's folder holds
`log.jsonl`, `loss.png`, `samples/` and `checkpoint.pt`. The model is exported with each checkpoint.

Random numbers depend on the step and the item, not on the process. Two processes therefore train like one process with
twice the batch size.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dall3.training.checkpoint import State, load_checkpoint, replace_folder, save_checkpoint
from dall3.training.config import PRECISIONS, TrainingConfig
from dall3.training.log import Log, show_samples
from dall3.training.optimizers import Average, Optimizers
from dall3.training.part import Data, Part, seed_of

CHECKPOINT_SECONDS = 120.0
MAX_FAILURES = 40  # number of steps that may run out of memory before training stops


@contextmanager
def stop_on_signal() -> Iterator[list[float]]:
    """Context manager that yields a list which is non-empty after SIGINT (Ctrl-C) or SIGTERM.

    A second SIGINT raises KeyboardInterrupt, unless it follows within a second: launchers forward the first SIGINT to
    processes that have received it already.
    """
    pressed: list[float] = []

    def press(number: int, frame: Any) -> None:
        if number == signal.SIGINT and pressed and time.monotonic() - pressed[0] > 1:
            raise KeyboardInterrupt
        pressed.append(time.monotonic())

    if threading.current_thread() is not threading.main_thread():  # signal handlers need the main thread
        yield pressed
        return
    before = {number: signal.signal(number, press) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield pressed
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """The autocast context of a precision. A CPU without bfloat16 instructions uses float32, as emulation is slow."""
    has_units = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if precision == "bf16" and device.type == "cpu" and not has_units:
        precision = "no"
    return nullcontext() if precision == "no" else torch.autocast(device.type, PRECISIONS[precision])


def fit(
    part: Part,
    config: TrainingConfig,
    data: Data,
    run: Path,
    target: Path,
    until: float | None = None,
    name: str = "",
    show: str = "",
    go_on: Callable[[], bool] = lambda: True,
) -> float:
    """Train from the run's checkpoint, if there is one, export the averaged model to `target`, and return the progress.

    until: end of the training as `time.time()`; None trains `config.steps` steps. show: "bar", "lines" or nothing.
    go_on: called before each step; False stops the training, like SIGINT and SIGTERM. The checkpoint and the model are
    written in any case; only a training with progress 1 is marked `finished`. Every step seeds torch's generator, so
    that a resumed run has the same losses. The caller's generator state is restored.
    """
    processes, device, main = part.processes, part.processes.device, part.processes.rank == 0
    optimizers, average = Optimizers(part, config, device), Average(part.model, config.ema_decay)
    state = load_checkpoint(run, part, average, optimizers)
    wrapped, halves = processes.wrap(part), autocast(config.precision, device)
    generators = torch.random.fork_rng([device] if device.type == "cuda" else [])
    # Parts that train by time share the device, so that too little memory is left for cudnn's benchmark.
    quick = torch.backends.cudnn.flags(enabled=True, benchmark=until is None)

    def keep() -> None:
        save_checkpoint(run, state, part, average, optimizers)
        replace_folder(part, average, target)

    with generators, quick, stop_on_signal() as stopped:
        torch.manual_seed(seed_of(config.seed, "start", state.step))
        data.fill(state.seen, state.drawn)
        before, begun = state.progress, time.time()
        log = Log(run, config, processes, state, name, show, config.steps if until is None else None)
        if until is None:
            state.progress = state.step / config.steps
        saved, failures = begun, 0
        while state.progress < 1 and not (stopped and processes.count == 1) and go_on():
            now = time.time()
            try:
                figures = backward(wrapped, config, data, state, optimizers, halves, now - begun)
            except torch.OutOfMemoryError:
                failures += 1
                if not data.shares_device or failures > MAX_FAILURES:
                    raise
                part.zero_grad(set_to_none=True)  # other parts use the device too; try again
                torch.cuda.empty_cache()
                data.batch_size = data.batch_size if failures % 4 else max(data.batch_size // 2, 1)
                print(f"[{name}] out of memory, {failures} times; batches of {data.batch_size}", flush=True)
                time.sleep(0.5)
                continue
            optimizers.step(config.rate(state.step, state.progress), config.clip_grad_norm)
            part.after_step()
            average.update()
            state.step += 1
            state.seen += config.gradient_accumulation * data.batch_size * processes.count
            if config.share < 1:
                synchronize(device)
                time.sleep((time.time() - now) * (1 / config.share - 1))
            if until is None:
                state.progress = state.step / config.steps
            else:
                state.progress = before + (1 - before) * min((time.time() - begun) / max(until - begun, 1e-3), 1.0)
            state.drawn = data.drawn
            log.add(figures)
            log_due = log.is_due() or state.progress >= 1
            if processes.count > 1 and (log_due or device.type == "cpu") and processes.any(bool(stopped)):
                break  # all processes stop after the same step; otherwise one would wait for the others forever
            if log_due:
                log.write()
                part.load_finished_parts(target.parent)
            due = state.step % config.every == 0 if config.every else now - saved > CHECKPOINT_SECONDS
            if main and due and state.progress < 1:
                keep()
                if config.every:
                    show_samples(run, state.step, part, average.current(), data)
                saved = time.time()
        log.close()
        if main:
            keep()
            if state.progress >= 1:
                (run / "finished").write_text("")  # before the samples, so that waiting parts can start
            show_samples(run, state.step, part, average.current(), data)
    return state.progress


def backward(
    wrapped: nn.Module,
    config: TrainingConfig,
    data: Data,
    state: State,
    optimizers: Optimizers,
    halves: AbstractContextManager[Any],
    elapsed: float,
) -> dict[str, Tensor]:
    """Compute the gradients of a step. Returns the metrics of its last batch. halves: the autocast context."""
    figures: dict[str, Tensor] = {}
    for k in range(config.gradient_accumulation):
        torch.manual_seed(seed_of(config.seed, "step", state.step, k))
        rows = data.next(elapsed)
        is_last = k + 1 == config.gradient_accumulation
        synchronized = nullcontext() if is_last or isinstance(wrapped, Part) else wrapped.no_sync()  # type: ignore[operator]
        with synchronized:
            with halves:
                loss, figures = wrapped(rows, state.progress)
            optimizers.scaler.scale(loss / config.gradient_accumulation).backward()
        figures = {"loss": loss.detach(), **figures}
    return figures


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
