"""The settings of a run that do not depend on the part."""

from __future__ import annotations

from dataclasses import dataclass

import torch

PRECISIONS = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class TrainingConfig:
    """Settings of a run that do not depend on the part: the table [train].

    steps: optimizer steps; a training by time ignores it. batch_size: items per process and batch.
    gradient_accumulation: batches per step. side: width and height of the images in pixels.
    learning_rate, betas, weight_decay: of AdamW. muon_learning_rate: learning rate of Muon (arXiv 2502.16982) for the
    matrices inside `layers`; 0 uses AdamW for all parameters. warmup: steps over which the learning rate rises. decay:
    fraction of the training, at the end, over which it falls to 0. clip_grad_norm: maximum norm of the gradient.
    ema_decay: decay of the averaged weights, which are exported.
    precision: "no", "bf16" or "fp16" (autocast). compile: use torch.compile on a GPU.
    data: sources as in `Mixture`. workers: processes that read images. seed: random seed of the initial weights, the
    data and the steps.
    every: steps between checkpoints and samples; 0 writes a checkpoint every two minutes, and samples at the end.
    share: fraction of the time in which the part trains; it sleeps for the rest, to leave the device to other parts.
    """

    steps: int = 10_000
    batch_size: int = 16
    gradient_accumulation: int = 1
    side: int = 128
    learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01
    muon_learning_rate: float = 0.0
    warmup: int = 100
    decay: float = 0.4
    clip_grad_norm: float = 1.0
    ema_decay: float = 0.998
    precision: str = "bf16"
    compile: bool = False
    data: tuple[str, ...] = ()
    workers: int = 0
    seed: int = 0
    every: int = 500
    share: float = 1.0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "gradient_accumulation", "side"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; expected a whole number from 1")
        if self.every < 0:
            raise ValueError(f"every={self.every}; expected a whole number from 0")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision '{self.precision}' is not known; expected {', '.join(PRECISIONS)}")
        if not 0 < self.share <= 1:
            raise ValueError(f"share={self.share}; expected a fraction of the time, in (0, 1]")

    def rate(self, step: int, progress: float) -> float:
        """The learning rate's factor: linear warm-up, constant, linear decay to 0."""
        return max(min((step + 1) / max(self.warmup, 1), (1 - progress) / max(self.decay, 1e-6), 1.0), 0.0)
