"""The training loop of all models, with checkpoints, resuming, logging, weight averaging and several processes.

A `Task` is a module whose `forward` returns the loss. The run's folder holds `log.jsonl`, `loss.png`, `samples/` and
`checkpoint.pt`. The model is exported when the run ends or is interrupted.

Under `accelerate launch` the processes divide the items of each step. Random numbers belong to a step or to an item,
never to a process: two processes train like one with twice the batch size.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, cast

import torch
from PIL.Image import Image
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from dall3.training.data import Mixture, StepSampler, loader

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingConfig:
    """Settings of a run that do not depend on the model: the table [train].

    steps: optimizer steps. batch_size: items per process and batch. gradient_accumulation: batches per step.
    learning_rate, betas, weight_decay: of AdamW. muon_learning_rate: learning rate of Muon for the matrices inside
    `layers`; 0 uses AdamW for all parameters.
    warmup: steps over which the learning rate rises. decay: fraction of the steps, at the end, over which it falls to
    0.
    ema_decay: decay of the averaged weights, which are exported. initial_share: fraction of the initial weights that is
    mixed into the exported ones, so that a short run on new data forgets less (WiSE-FT, arXiv 2109.01903).
    precision: "no", "bf16" or "fp16" (autocast). compile: use torch.compile.
    workers: data loader processes. every: steps between checkpoints and samples. side: width and height of the images
    in pixels. data: sources as in `Mixture`.
    """

    steps: int = 10_000
    batch_size: int = 16
    gradient_accumulation: int = 1
    learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01
    muon_learning_rate: float = 0.0
    warmup: int = 100
    decay: float = 0.2
    clip_grad_norm: float = 1.0
    ema_decay: float = 0.999
    initial_share: float = 0.0
    precision: str = "no"
    compile: bool = False
    seed: int = 0
    workers: int = 0
    every: int = 500
    side: int = 128
    data: tuple[str, ...] = ("scenes",)

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "gradient_accumulation", "every", "side"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; expected a whole number from 1")
        if not 0 <= self.initial_share < 1:
            raise ValueError(f"initial_share={self.initial_share}; expected a share from 0 to below 1")
        if self.precision not in ("no", "bf16", "fp16"):
            raise ValueError(f"precision '{self.precision}' is not known; expected no, bf16 or fp16")

    def rate(self, step: int) -> float:
        """The learning rate's factor at a step: linear warm-up, constant, linear decay to 0."""
        rest = (self.steps - step) / max(self.steps * self.decay, 1)
        return min((step + 1) / max(self.warmup, 1), rest, 1.0)


class Task(nn.Module, ABC):
    """A model and its loss. Each model has its own file in this package.

    items: item numbers of the batch passed to `forward`. seed: random seed of the run.
    """

    items: range = range(0)
    seed: int = 0

    @abstractmethod
    def forward(self, images: Tensor, captions: list[str], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch, and metrics for the log. images: float (batch, 3, side, side) in [0, 1]."""

    @abstractmethod
    def sample(self, images: Tensor, captions: list[str]) -> Image:
        """A sheet of samples for a fixed batch."""

    @abstractmethod
    def export(self, folder: Path) -> None:
        """Write the trained model as a part of a pipeline folder."""

    def make_data(self, config: TrainingConfig, folder: Path, device: torch.device, progress: bool) -> Dataset[Any]:
        """The data set: images and captions of `config.data`, unless a task preprocesses them. folder: the run's
        folder, for preprocessed data.
        """
        return Mixture(config.data, config.side, config.seed)

    def per_item(self, draw: Callable[[torch.Generator], Tensor], device: torch.device) -> Tensor:
        """Random numbers for each item, stacked. They depend on the item's number and not on the process.

        Use torch's default generator, which is equal on all processes, for choices that hold for a whole step.
        """
        generator = torch.Generator(device)
        return torch.stack([draw(generator.manual_seed(seed_of(self.seed, "item", number))) for number in self.items])

    def start_from(self, model: nn.Module) -> None:
        """Load the weights of a trained model."""
        self.get_submodule("model").load_state_dict(model.state_dict())

    def compile_parts(self) -> None:
        """Compile the expensive modules with torch.compile. Does nothing by default."""

    def after_step(self) -> None:
        """Called after each optimizer step, without gradients. Does nothing by default."""


def seed_of(*what: object) -> int:
    """A generator's seed, derived from its purpose."""
    return int.from_bytes(sha256(repr(what).encode()).digest()[:8], "little") >> 1


@dataclass
class Optimizers:
    """AdamW, and optionally Muon, with their learning rates."""

    parts: list[torch.optim.Optimizer]
    rates: list[float] = field(default_factory=list)

    def set_rate(self, share: float) -> None:
        for part, rate in zip(self.parts, self.rates, strict=True):
            for group in part.param_groups:
                group["lr"] = rate * share


def make_optimizers(task: nn.Module, config: TrainingConfig) -> Optimizers:
    """Create the optimizers. Weight decay applies to matrices and kernels only; Muon (arXiv 2502.16982), if enabled, to
    the matrices inside `layers`.
    """
    named = [(name, p) for name, p in task.named_parameters() if p.requires_grad]
    muon = [p for name, p in named if config.muon_learning_rate and p.ndim == 2 and ".layers." in f".{name}"]
    taken = {id(p) for p in muon}
    rest = [p for _, p in named if id(p) not in taken]
    groups = [
        {"params": [p for p in rest if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in rest if p.ndim <= 1], "weight_decay": 0.0},
    ]
    found = Optimizers([torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas)], [config.learning_rate])
    if muon:
        rate = config.muon_learning_rate
        # The update's RMS matches AdamW's, so that weight decay has the same effect in both.
        found.parts.append(
            torch.optim.Muon(muon, lr=rate, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw")
        )
        found.rates.append(rate)
    return found


def moving_average(decay: float, average: Tensor, value: Tensor, count: Tensor) -> Tensor:
    """Update an exponential moving average. The decay rises from 0.1 to `decay`, so that early values fade fast."""
    return average.lerp(value, 1 - torch.clamp((1 + count) / (10 + count), max=decay).to(average.dtype))


@contextmanager
def stop_on_interrupt() -> Iterator[list[float]]:
    """Context manager that yields a list which is non-empty after Ctrl-C. A second Ctrl-C raises KeyboardInterrupt.

    A second signal within a second is ignored: `accelerate launch` forwards the first one to processes that already
    received it.
    """
    pressed: list[float] = []

    def press(number: int, frame: Any) -> None:
        if pressed and time.monotonic() - pressed[0] > 1:
            raise KeyboardInterrupt
        pressed.append(time.monotonic())

    if threading.current_thread() is not threading.main_thread():  # signal handlers need the main thread
        yield pressed
        return
    before = signal.signal(signal.SIGINT, press)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


def train(task: Task, config: TrainingConfig, folder: Path, model_folder: Path, progress: bool = True) -> Task:
    """Train until `config.steps`, starting from the folder's checkpoint if there is one, and export the averaged model.

    Every step seeds torch's generator, so that a resumed run has the same losses on any number of processes. The
    caller's generator state is restored. Ctrl-C finishes the step, writes the checkpoint and the model, and returns.
    """
    from accelerate import Accelerator

    accelerator = Accelerator(
        mixed_precision=usable(config.precision), gradient_accumulation_steps=config.gradient_accumulation
    )
    main = accelerator.is_main_process
    initial = deepcopy(task) if config.initial_share else None  # copied before a checkpoint replaces the weights
    averaged = AveragedModel(task, avg_fn=partial(moving_average, config.ema_decay))
    optimizers = make_optimizers(task, config)
    best = cast(Task, averaged.module)
    first, seen = load_checkpoint(folder, task, averaged, optimizers)
    averaged.to(accelerator.device)
    if accelerator.device.type != "cpu":  # faster convolutions on a GPU; on a CPU some gradients are slower
        task.to(memory_format=torch.channels_last)
    wrapped = accelerator.prepare(task)
    optimizers.parts = [accelerator.prepare(part) for part in optimizers.parts]
    if config.compile:
        task.compile_parts()

    with accelerator.main_process_first():
        data = task.make_data(config, folder, accelerator.device, progress and main)
    batches = range(first * config.gradient_accumulation, config.steps * config.gradient_accumulation)
    sampler = StepSampler(
        len(batches), config.batch_size, accelerator.process_index, accelerator.num_processes, first_item=seen
    )
    task.seed = config.seed
    shown = [Mixture(config.data, config.side, config.seed + 1)[i] for i in range(16)] if main else []
    step, started, pending = first, time.time(), []
    quick = torch.backends.cudnn.flags(enabled=True, benchmark=True)
    with torch.random.fork_rng(), quick, stop_on_interrupt() as interrupted:
        bar = tqdm(total=config.steps, initial=first, desc=str(folder), disable=not (progress and main))
        for number, items, (images, captions) in zip(
            batches, sampler.ranges(), loader(data, sampler, config.workers), strict=True
        ):
            torch.manual_seed(seed_of(config.seed, "step", number))
            task.items = items
            seen += config.batch_size * accelerator.num_processes
            optimizers.set_rate(config.rate(step))
            with accelerator.accumulate(wrapped):
                with accelerator.autocast():
                    images = images.to(accelerator.device)
                    images = images.float() / 255 if images.dtype == torch.uint8 else images
                    loss, figures = wrapped(images, captions, step)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(wrapped.parameters(), config.clip_grad_norm)
                for part in optimizers.parts:
                    part.step()
                    part.zero_grad()
            if not accelerator.sync_gradients:
                continue
            step += 1
            task.after_step()
            averaged.update_parameters(task)
            pending.append({"loss": loss.detach(), **figures})
            bar.update()
            look = step % min(config.every, 50) == 0 or step == config.steps
            stop = bool(interrupted)
            if accelerator.num_processes > 1 and (look or accelerator.device.type == "cpu"):
                # All processes stop after the same step; otherwise one would wait for the others forever.
                stop = bool(accelerator.reduce(torch.tensor(float(stop), device=accelerator.device)) > 0)
            elif accelerator.num_processes > 1:
                stop = False
            done = step == config.steps or stop
            if look or done:
                # Reading metrics synchronizes with the device, so they are read once per logging interval.
                figures = {name: torch.stack([p[name].float() for p in pending]).mean() for name in pending[0]}
                means = {name: float(accelerator.reduce(value, "mean")) for name, value in figures.items()}
                bar.set_postfix({name: f"{value:.4g}" for name, value in means.items()})
                if main:
                    spent = time.time() - started
                    write_log(folder, {"step": step, "rate": config.rate(step), "seconds": round(spent, 1), **means})
                pending = []
            if main and (step % config.every == 0 or done):
                save_checkpoint(folder, step, seen, task, averaged, optimizers)
                save_samples(folder, step, best, shown, accelerator.device)
                plot_log(folder)
            if done:
                break
        bar.close()
    if main:
        if initial is not None:
            mix_in(best, initial, config.initial_share)
        best.export(model_folder)
    return best


@torch.no_grad()
def mix_in(model: nn.Module, other: nn.Module, share: float) -> None:
    """Interpolate the model's weights and buffers in place: 1 - share of its own, `share` of the other model's."""
    theirs = other.state_dict()
    for name, ours in model.state_dict().items():
        if ours.is_floating_point():
            ours.lerp_(theirs[name].to(ours), share)


def usable(precision: str) -> str:
    """The precision to use: "no" in place of "bf16" on a CPU without bfloat16 instructions, where emulation is slow."""
    has_units = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if precision == "bf16" and not has_units and not torch.accelerator.is_available():
        logger.warning("this CPU has no bfloat16 arithmetic; training in float32")
        return "no"
    return precision


def save_checkpoint(
    folder: Path, step: int, seen: int, task: nn.Module, averaged: nn.Module, optimizers: Optimizers
) -> None:
    """Write the checkpoint atomically. seen: number of items that all processes have trained on."""
    state = {"step": step, "seen": seen, "task": task.state_dict(), "averaged": averaged.state_dict()}
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state | {"optimizers": [part.state_dict() for part in optimizers.parts]}, folder / "checkpoint.new")
    os.replace(folder / "checkpoint.new", folder / "checkpoint.pt")


def load_checkpoint(folder: Path, task: nn.Module, averaged: nn.Module, optimizers: Optimizers) -> tuple[int, int]:
    """Load the folder's checkpoint. Returns its step and the number of items seen, 0 and 0 without a checkpoint."""
    if not (folder / "checkpoint.pt").exists():
        return 0, 0
    state = torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True)
    task.load_state_dict(state["task"])
    averaged.load_state_dict(state["averaged"])
    for part, saved in zip(optimizers.parts, state["optimizers"], strict=True):
        part.load_state_dict(saved)
    step, log = int(state["step"]), folder / "log.jsonl"
    # A killed run may have logged steps after its last checkpoint. They will be repeated.
    lines = [line for line in log.read_text().splitlines() if json.loads(line)["step"] <= step] if log.exists() else []
    log.write_text("".join(f"{line}\n" for line in lines))
    return step, int(state["seen"])


def write_log(folder: Path, line: dict[str, float]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "log.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


def save_samples(folder: Path, step: int, task: Any, shown: list[tuple[Tensor, str]], device: torch.device) -> None:
    images = torch.stack([image for image, _ in shown]).to(device).float() / 255
    training = task.training
    task.eval()
    with torch.no_grad():
        picture = task.sample(images, [caption for _, caption in shown])
    task.train(training)
    (folder / "samples").mkdir(parents=True, exist_ok=True)
    picture.save(folder / "samples" / f"{step:07}.png")


def plot_log(folder: Path) -> None:
    """Plot the log's metrics over the steps to `loss.png`, one panel each."""
    from matplotlib.figure import Figure

    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    names = [name for name in lines[-1] if name not in ("step", "rate", "seconds")]
    figure = Figure(figsize=(6, 2.2 * len(names)), layout="constrained")
    for axis, name in zip(figure.subplots(len(names), squeeze=False)[:, 0], names, strict=True):
        points = [(line["step"], line[name]) for line in lines if name in line]
        axis.plot(*zip(*points, strict=True), linewidth=1)
        axis.set(ylabel=name, xlabel="step")
    figure.savefig(folder / "loss.png", dpi=100)
