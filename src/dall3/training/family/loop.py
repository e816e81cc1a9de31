"""The training of one part within a time: its schedule runs from 0 to 1 as the clock does, not by counting steps."""

from __future__ import annotations

import json
import os
import signal
import time
from abc import ABC, abstractmethod
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor, nn

from dall3.scenes.world import Batch
from dall3.training.family.pool import Pool, Rows

CHECKPOINT_SECONDS, LOG_SECONDS = 120.0, 15.0


@dataclass(frozen=True)
class PartTraining:
    """How a part is trained, whatever it is.

    decay: the share of the time at the end in which the learning rate falls to 0. warmup: steps in which it rises.
    muon_learning_rate: of Muon (arXiv 2502.16982) on the matrices inside the layers, beside AdamW on all else; 0 for
    AdamW alone. share: of the time that the part computes; it rests in between, so that others on the device go faster.
    kinds, capacity, first, chunk, draw_share: what is drawn and how, as `World` and `Pool` take them.
    """

    batch_size: int
    kinds: dict[str, float]
    side: int = 128
    learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01
    muon_learning_rate: float = 0.0
    warmup: int = 100
    decay: float = 0.4
    clip_grad_norm: float = 1.0
    ema_decay: float = 0.998
    share: float = 1.0
    compile: bool = False
    capacity: int = 8192
    first: int = 2048
    chunk: int = 256
    draw_share: float = 0.25

    def rate(self, step: int, progress: float) -> float:
        """The share of the learning rate: up, level, and down to 0 at the end."""
        return max(min((step + 1) / max(self.warmup, 1), (1 - progress) / max(self.decay, 1e-6), 1.0), 0.0)


class Part(nn.Module, ABC):
    """What is trained, as `model`, and how its loss is made; one file a part beside this one."""

    model: nn.Module

    @abstractmethod
    def rows(self, batch: Batch) -> Rows:
        """What a pool keeps of pictures and captions: tensors (n, …) by name."""

    @abstractmethod
    def forward(self, rows: Rows, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of some rows, and figures for the log. progress: in [0, 1], of the training."""

    @abstractmethod
    def export(self, model: nn.Module, folder: Path) -> None:
        """Write the model, averaged over the last steps, as a part of a pipeline folder."""

    def sheet(self, model: nn.Module, rows: Rows) -> Image | None:
        """A picture that shows how far the training is."""
        return None

    def after_step(self) -> None:
        """What happens between steps without gradients."""

    def compile_parts(self) -> None:
        """Compile what `forward` spends its time in; nothing unless a part says so."""

    def run_eagerly(self) -> None:
        """Undo `compile_parts`."""

    def look_for(self, out: Path) -> None:
        """Take up what another part has finished meanwhile."""


class Average:
    """The moving average of a model's parameters; the first steps count more, so that the start is soon forgotten."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model, self.decay, self.count = deepcopy(model).requires_grad_(False), decay, 0
        self.pairs = list(zip(self.model.parameters(), model.parameters(), strict=True))
        self.buffers = list(zip(self.model.buffers(), model.buffers(), strict=True))

    @torch.no_grad()
    def update(self) -> None:
        self.count += 1
        decay = min(self.decay, self.count / (10 + self.count))
        average, now = zip(*self.pairs, strict=True)
        torch._foreach_lerp_(list(average), [p.detach() for p in now], 1 - decay)

    @torch.no_grad()
    def current(self) -> nn.Module:
        """The averaged model, with the buffers of the model as they are."""
        for average, now in self.buffers:
            average.copy_(now)
        return self.model


class Optimizers:
    """AdamW, and Muon beside it where asked for. Decay on matrices and kernels only."""

    def __init__(self, part: nn.Module, settings: PartTraining) -> None:
        named = [(name, p) for name, p in part.named_parameters() if p.requires_grad]
        self.parameters = [p for _, p in named]
        muon = [p for name, p in named if settings.muon_learning_rate and p.ndim == 2 and ".layers." in f".{name}"]
        taken = {id(p) for p in muon}
        rest = [p for p in self.parameters if id(p) not in taken]
        groups = [
            {"params": [p for p in rest if p.ndim > 1], "weight_decay": settings.weight_decay},
            {"params": [p for p in rest if p.ndim <= 1], "weight_decay": 0.0},
        ]
        rate, fused = settings.learning_rate, rest[0].is_cuda
        self.parts: list[tuple[torch.optim.Optimizer, float]] = [
            (torch.optim.AdamW(groups, lr=rate, betas=settings.betas, fused=fused), rate)
        ]
        if muon:
            rate, decay = settings.muon_learning_rate, settings.weight_decay
            # The updates' size is matched to AdamW's, so that weight decay means the same for both.
            made = torch.optim.Muon(muon, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
            self.parts.append((made, rate))

    def step(self, share: float, clip_grad_norm: float) -> None:
        for p in self.parameters:
            if p.grad is not None:  # one step without a number must not end the training
                torch.nan_to_num_(p.grad, nan=0.0, posinf=0.0, neginf=0.0)
        torch.nn.utils.clip_grad_norm_(self.parameters, clip_grad_norm)
        for part, rate in self.parts:
            for group in part.param_groups:
                group["lr"] = rate * share
            part.step()
            part.zero_grad(set_to_none=True)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def fit(
    part: Part,
    settings: PartTraining,
    pool: Pool,
    run: Path,
    target: Path,
    until: float,
    device: torch.device,
    name: str,
) -> None:
    """Train until the clock (`time.time()`) says `until`, from the run's checkpoint where there is one, and export to
    `target`. Told to stop (SIGINT, SIGTERM), it writes both, and the run is not finished.
    """
    optimizers = Optimizers(part, settings)
    average = Average(part.model, settings.ema_decay)
    step, before = load_checkpoint(run, part, average, optimizers)
    stopped: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: stopped.append(number))
    run.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(step)
    pool.fill()
    bf16 = device.type == "cuda"
    synchronize(device)
    begun = logged = saved = time.time()
    first, count, short = step, settings.batch_size, 0
    pending: list[dict[str, Tensor]] = []
    print(f"[{name}] {pool.drawn} rows drawn; {until - begun:.0f} s from {before:.0%} on", flush=True)
    while not stopped:
        now = time.time()
        progress = before + (1 - before) * min((now - begun) / max(until - begun, 1e-3), 1.0)
        if progress >= 1:
            break
        try:
            pool.refresh(now - begun)
            rows = pool.sample(count)
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                loss, figures = part(rows, progress)
            loss.backward()
        except torch.OutOfMemoryError:  # others share the device
            loss, rows, figures = torch.zeros(()), {}, {}
            part.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
            short += 1
            count = count if short % 4 else max(count // 2, 1)
            print(f"[{name}] out of memory, {short} times; batches of {count}", flush=True)
            time.sleep(0.5)
            continue
        optimizers.step(settings.rate(step, progress), settings.clip_grad_norm)
        part.after_step()
        average.update()
        step += 1
        pending.append({"loss": loss.detach(), **figures})
        if settings.share < 1:
            synchronize(device)
            time.sleep((time.time() - now) * (1 / settings.share - 1))
        if now - logged > LOG_SECONDS or step == first + 1 or step == first + 20:
            means = {k: torch.stack([p[k].float() for p in pending if k in p]).mean().item() for k in pending[-1]}
            now, done, pending = time.time(), len(pending), []
            line = {"step": step, "progress": round(progress, 4), "seconds": round(now - begun, 1)}
            line |= {"steps_per_second": round(done / max(now - logged, 1e-3), 2), "drawn": pool.drawn} | means
            if device.type == "cuda":
                line["memory_gib"] = round(torch.cuda.max_memory_allocated(device) / 2**30, 1)
            logged = now
            with (run / "log.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(f"[{name}] " + " ".join(f"{k}={v:.4g}" for k, v in line.items()), flush=True)
            part.look_for(target.parent)
        if now - saved > CHECKPOINT_SECONDS:
            save_checkpoint(run, step, progress, part, average, optimizers)
            replace_folder(part, average, target)
            saved = time.time()
    synchronize(device)
    progress = 1.0 if not stopped else progress
    save_checkpoint(run, step, progress, part, average, optimizers)
    replace_folder(part, average, target)
    if not stopped:
        (run / "finished").write_text("")  # those that wait need not wait for the sheet
    try:
        shown = part.eval().sheet(average.current(), pool.sample(16))
        if shown is not None:
            shown.save(run / "sheet.jpg", quality=90)
    except Exception as error:  # a sheet that cannot be drawn costs nothing but itself
        print(f"[{name}] no sheet: {error!r}", flush=True)
    print(f"[{name}] ended at step {step}, {time.time() - begun:.0f} s, progress {progress:.3f}", flush=True)


def replace_folder(part: Part, average: Average, target: Path) -> None:
    """Export beside the target and move it there: whoever reads it meanwhile finds a whole one."""
    new, old = (target.with_name(f".{target.name}.{kind}") for kind in ("new", "old"))
    with torch.no_grad():
        part.export(average.current(), new)
    if target.exists():
        target.rename(old)
    new.rename(target)
    for file in old.glob("*") if old.exists() else ():
        file.unlink()
    if old.exists():
        old.rmdir()


def save_checkpoint(
    run: Path, step: int, progress: float, part: Part, average: Average, optimizers: Optimizers
) -> None:
    state: dict[str, Any] = {"step": step, "progress": progress, "part": part.state_dict()}
    state |= {"average": average.model.state_dict(), "count": average.count}
    state["optimizers"] = [optimizer.state_dict() for optimizer, _ in optimizers.parts]
    torch.save(state, run / "checkpoint.new")
    os.replace(run / "checkpoint.new", run / "checkpoint.pt")


def load_checkpoint(run: Path, part: Part, average: Average, optimizers: Optimizers) -> tuple[int, float]:
    """The step and the progress that the run's checkpoint was written at, its state put into place; 0 without one."""
    if not (run / "checkpoint.pt").exists():
        return 0, 0.0
    state = torch.load(run / "checkpoint.pt", map_location="cpu", weights_only=True)
    part.load_state_dict(state["part"])
    average.model.load_state_dict(state["average"])
    average.count = int(state["count"])
    for (optimizer, _), saved in zip(optimizers.parts, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return int(state["step"]), float(state["progress"])
