"""Optimizers, and the moving average of the weights."""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import nn

from dall3.training.config import TrainingConfig


class Average:
    """An exponential moving average of a model's parameters. Its decay rises, so that initial values fade quickly."""

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
        """The averaged model, with the current buffers."""
        for average, now in self.buffers:
            average.copy_(now)
        return self.model


class Optimizers:
    """AdamW, and optionally Muon. Weight decay applies to matrices and kernels only."""

    def __init__(self, part: nn.Module, config: TrainingConfig, device: torch.device) -> None:
        named = [(name, p) for name, p in part.named_parameters() if p.requires_grad]
        self.parameters = [p for _, p in named]
        muon = [p for name, p in named if config.muon_learning_rate and p.ndim == 2 and ".layers." in f".{name}"]
        taken = {id(p) for p in muon}
        rest = [p for p in self.parameters if id(p) not in taken]
        groups = [
            {"params": [p for p in rest if p.ndim > 1], "weight_decay": config.weight_decay},
            {"params": [p for p in rest if p.ndim <= 1], "weight_decay": 0.0},
        ]
        rate, fused = config.learning_rate, device.type == "cuda"
        self.parts: list[tuple[torch.optim.Optimizer, float]] = [
            (torch.optim.AdamW(groups, lr=rate, betas=config.betas, fused=fused), rate)
        ]
        if muon:
            rate, decay = config.muon_learning_rate, config.weight_decay
            # The update's RMS matches AdamW's, so that weight decay has the same effect in both.
            made = torch.optim.Muon(muon, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
            self.parts.append((made, rate))
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")

    def step(self, share: float, clip_grad_norm: float) -> None:
        """Update the parameters and clear the gradients. share: factor of the learning rates."""
        for optimizer, _ in self.parts:
            self.scaler.unscale_(optimizer)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        for gradient in gradients:  # a step with NaN must not spoil the weights
            torch.nan_to_num_(gradient, nan=0.0, posinf=0.0, neginf=0.0)
        torch.nn.utils.clip_grad_norm_(self.parameters, clip_grad_norm)
        for optimizer, rate in self.parts:
            for group in optimizer.param_groups:
                group["lr"] = rate * share
            self.scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=True)
        self.scaler.update()
