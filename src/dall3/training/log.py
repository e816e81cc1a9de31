"""The log of a run: metrics as JSON lines and as a plot, and sheets of samples."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from dall3.training.checkpoint import State
from dall3.training.config import TrainingConfig
from dall3.training.part import Data, Part
from dall3.training.processes import Processes

logger = logging.getLogger(__name__)

LOG_SECONDS, LOG_STEPS = 15.0, 50


class Log:
    """The log of a run, written by its first process.

    state: the state of the run, which the loop updates. name: name of the part. show: "bar", "lines" or "". steps:
    number of steps of the training, if known.

    A line is due every 50 steps, or with each sheet of samples if these are more frequent. If `config.every` is 0, a
    line is due every 15 seconds.
    """

    def __init__(
        self,
        run: Path,
        config: TrainingConfig,
        processes: Processes,
        state: State,
        name: str,
        show: str,
        steps: int | None,
    ) -> None:
        self.run, self.config, self.processes, self.state, self.name = run, config, processes, state, name
        self.is_main = processes.rank == 0
        self.show = show if self.is_main else ""
        self.first, self.begun, self.last = state.step, time.time(), time.time()
        self.pending: list[dict[str, Tensor]] = []  # metrics of the steps since the last line
        self.bar = tqdm(total=steps, initial=state.step, desc=str(run), disable=self.show != "bar")
        if self.show == "lines":
            print(f"[{name}] starts at step {state.step}, progress {state.progress:.3f}", flush=True)

    def add(self, figures: dict[str, Tensor]) -> None:
        """Add the metrics of a step."""
        self.pending.append(figures)
        self.bar.update()

    def is_due(self) -> bool:
        """Whether `write` should be called after this step."""
        if self.config.every:
            return self.state.step % min(self.config.every, LOG_STEPS) == 0
        return time.time() - self.last > LOG_SECONDS or self.state.step in (self.first + 1, self.first + 20)

    def write(self, processes: Processes | None = None) -> None:
        """Write the means since the last line. Synchronizes with the device. Called by all processes."""
        state, now, processes = self.state, time.time(), processes or self.processes
        line: dict[str, float] = {"step": state.step, "progress": round(state.progress, 4)}
        line["rate"] = self.config.rate(state.step, state.progress)
        line |= {"seconds": round(now - self.begun, 1), "drawn": state.drawn}
        line["steps_per_second"] = round(len(self.pending) / max(now - self.last, 1e-3), 2)
        if processes.device.type == "cuda":
            line["memory_gib"] = round(torch.cuda.max_memory_allocated(processes.device) / 2**30, 1)
        for name in self.pending[-1]:
            mean = torch.stack([figures[name].float() for figures in self.pending if name in figures]).mean()
            line[name] = float(processes.mean(mean))
        self.bar.set_postfix({name: f"{line[name]:.4g}" for name in self.pending[-1]})
        self.last, self.pending = now, []
        if self.is_main:
            self.run.mkdir(parents=True, exist_ok=True)
            with (self.run / "log.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")
        if self.show == "lines":
            print(f"[{self.name}] " + " ".join(f"{key}={value:.4g}" for key, value in line.items()), flush=True)

    def close(self) -> None:
        """Write the remaining metrics after an interruption, averaged over this process only."""
        if self.pending:
            self.write(Processes(self.processes.device, self.processes.rank))
        self.bar.close()
        if self.show == "lines":
            spent = time.time() - self.begun
            print(f"[{self.name}] ended at step {self.state.step}, {spent:.0f} s", flush=True)


def show_samples(run: Path, step: int, part: Part, model: nn.Module, data: Data) -> None:
    """Write a sheet of samples of a model with averaged weights, and the plot of the log.

    An error in them does not end the training.
    """
    training = part.training
    try:
        with torch.no_grad():
            sheet = part.eval().sheet(model.eval(), data.sample())
        (run / "samples").mkdir(exist_ok=True)
        sheet.save(run / "samples" / f"{step:07}.jpg", quality=90)
        plot_log(run)
    except Exception as error:
        logger.warning("no samples in %s: %r", run, error)
    part.train(training)


def plot_log(run: Path) -> None:
    """Plot the log's metrics over the steps to `loss.png`, one panel each."""
    from matplotlib.figure import Figure

    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    left_out = ("step", "progress", "rate", "seconds", "drawn", "steps_per_second", "memory_gib")
    names = [name for name in lines[-1] if name not in left_out]
    figure = Figure(figsize=(6, 2.2 * len(names)), layout="constrained")
    for axis, name in zip(figure.subplots(len(names), squeeze=False)[:, 0], names, strict=True):
        points = [(line["step"], line[name]) for line in lines if name in line]
        axis.plot(*zip(*points, strict=True), linewidth=1)
        axis.set(ylabel=name, xlabel="step")
    figure.savefig(run / "loss.png", dpi=100)
