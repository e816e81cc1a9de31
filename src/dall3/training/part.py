"""The interface between the training loop, the parts and the data.

A `Part` is a network with its loss. It converts images and captions to rows of tensors. `Data` yields batches of rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Protocol

import torch
from PIL.Image import Image
from torch import Tensor, nn

from dall3.scenes.world import Batch
from dall3.training.processes import Processes
from dall3.weights.folder import save_part

SHOWN = 16  # rows of a sheet of samples

Rows = dict[str, Tensor]


class Part(nn.Module, ABC):
    """A network, `model`, and its loss. Each part has its own file in this package."""

    model: nn.Module

    def __init__(self, processes: Processes) -> None:
        super().__init__()
        self.processes = processes

    @abstractmethod
    def rows(self, batch: Batch, numbers: Sequence[int]) -> Rows:
        """Convert images and captions to training rows: tensors (n, …) by name. numbers: the item numbers."""

    @abstractmethod
    def forward(self, rows: Rows, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch of rows, and metrics for the log. progress: of the training, in [0, 1], which
        schedules parts of the loss.
        """

    @abstractmethod
    def sheet(self, model: nn.Module, rows: Rows) -> Image:
        """A sheet of samples of a model with averaged weights."""

    def random(self, draw: Callable[..., Tensor], *shape: int) -> Tensor:
        """Random numbers for the items of this process, the same however many processes share the batch.

        draw: torch.rand or torch.randn. shape: of the result; the first dimension is the items.
        """
        whole = draw(self.processes.count * shape[0], *shape[1:], device=self.processes.device)
        return self.processes.own(whole)

    def finished(self, model: nn.Module) -> nn.Module:
        """The model, completed with weights that training keeps outside of it."""
        return model

    def export(self, model: nn.Module, folder: Path) -> None:
        """Write a model with averaged weights as a part of a pipeline folder."""
        save_part(self.finished(model), folder)

    def start_from(self, model: nn.Module) -> None:
        """Load the weights of a trained model of the same configuration."""
        self.model.load_state_dict(model.state_dict())

    def after_step(self) -> None:
        """Called after each optimizer step."""

    def compile_parts(self) -> None:
        """Compile the expensive modules with torch.compile. Does nothing by default."""

    def run_eagerly(self) -> None:
        """Undo `compile_parts`."""

    def load_finished_parts(self, out: Path) -> None:
        """Load parts that have finished training to the pipeline folder `out`. Does nothing by default."""


class Data(Protocol):
    """Batches of rows for a part."""

    batch_size: int
    drawn: int  # items that all processes have read, in this run and before
    shares_device: bool  # whether other parts train on the device, so that memory can run out temporarily

    def fill(self, seen: int, drawn: int) -> None:
        """Prepare the batches of a run that has trained on `seen` items, when `drawn` was as given."""

    def next(self, elapsed: float) -> Rows:
        """The next batch. elapsed: seconds since the first step."""

    def sample(self) -> Rows:
        """The rows for a sheet of samples."""


def seed_of(*what: object) -> int:
    """The seed of a random generator: a hash of values that name its purpose."""
    return int.from_bytes(sha256(repr(what).encode()).digest()[:8], "little") >> 1


def compact(ids: Tensor, count: int) -> Tensor:
    """Convert ids in [0, count) to int16 if it can represent them, else to int32."""
    return ids.to(torch.int16 if count <= 2**15 else torch.int32)
