"""Checkpoints of a run, and the export of a part. Both are written atomically."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dall3.training.optimizers import Average, Optimizers
from dall3.training.part import Part


@dataclass
class State:
    """The state of a run.

    step: number of completed steps. progress: of the training, in [0, 1]. seen: number of items that all processes have
    trained on. drawn: as in `Data`.
    """

    step: int = 0
    progress: float = 0.0
    seen: int = 0
    drawn: int = 0


def save_checkpoint(run: Path, state: State, part: Part, average: Average, optimizers: Optimizers) -> None:
    """Write the run's checkpoint."""
    found: dict[str, Any] = {**vars(state), "part": part.state_dict(), "average": average.model.state_dict()}
    found |= {"count": average.count, "scaler": optimizers.scaler.state_dict()}
    found["optimizers"] = [optimizer.state_dict() for optimizer, _ in optimizers.parts]
    run.mkdir(parents=True, exist_ok=True)
    torch.save(found, run / "checkpoint.new")
    os.replace(run / "checkpoint.new", run / "checkpoint.pt")


def load_checkpoint(run: Path, part: Part, average: Average, optimizers: Optimizers) -> State:
    """Load the run's checkpoint, if there is one, and remove the log lines of later steps, which run again."""
    if not (run / "checkpoint.pt").exists():
        return State()
    found = torch.load(run / "checkpoint.pt", map_location="cpu", weights_only=True)
    part.load_state_dict(found["part"])
    average.model.load_state_dict(found["average"])
    average.count = int(found["count"])
    optimizers.scaler.load_state_dict(found["scaler"])
    for (optimizer, _), saved in zip(optimizers.parts, found["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    state, log = State(*(found[name] for name in vars(State()))), run / "log.jsonl"
    lines = log.read_text().splitlines() if log.exists() else []
    log.write_text("".join(f"{line}\n" for line in lines if json.loads(line)["step"] <= state.step))
    return state


def replace_folder(part: Part, average: Average, target: Path) -> None:
    """Export to a temporary folder and rename it, so that readers always find a complete one."""
    new, old = (target.with_name(f".{target.name}.{kind}") for kind in ("new", "old"))
    for left in (new, old):  # left by a run that was killed in this function
        shutil.rmtree(left, ignore_errors=True)
    with torch.no_grad():
        part.export(average.current(), new)
    if target.exists():
        target.rename(old)
    new.rename(target)
    shutil.rmtree(old, ignore_errors=True)
