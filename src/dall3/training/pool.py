"""A pool of training rows on the device, rendered continuously and sampled at random.

New rows replace the oldest. They are rendered as fast as training uses rows, but for at most a given fraction of the
time. If rendering is slow, rows are reused more often, and training does not wait.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from dall3.scenes.world import Plan, World
from dall3.training.part import SHOWN, Part, Rows


@dataclass(frozen=True)
class PoolConfig:
    """Settings of a pool: the table [pool].

    kinds: weights of "scenes", "emoji" and "wearing", as in `World.draw`. capacity: number of rows kept. first: rows
    drawn before the first step. chunk: rows drawn at a time. draw_share: maximum fraction of the time for drawing.
    """

    kinds: Mapping[str, float] = field(default_factory=lambda: {"scenes": 1.0})
    capacity: int = 8192
    first: int = 2048
    chunk: int = 256
    draw_share: float = 0.25


class Pool:
    """Batches of rendered images for a part. seed: as in `World.draw`."""

    shares_device = True

    def __init__(self, world: World, part: Part, config: PoolConfig, seed: int, batch_size: int) -> None:
        self.world, self.part, self.config, self.seed, self.batch_size = world, part, config, seed, batch_size
        self.start, self.drawn, self.seconds = 0, 0, 0.0
        self.used = 0  # rows used since the first step, minus rows drawn since
        self.rows: Rows = {}
        self.plans: deque[tuple[range, Plan]] = deque()  # plans of the next chunks

    def plan(self) -> tuple[range, Plan]:
        """Plan the next chunk. Uses the CPU only."""
        start = self.drawn + len(self.plans) * self.config.chunk
        numbers = range(start, start + self.config.chunk)
        return numbers, self.world.plan(numbers, self.seed, self.config.kinds)

    def prepare(self, most: int = 64) -> None:
        """Plan one more chunk, up to `most`, while waiting for another part."""
        if len(self.plans) < most:
            self.plans.append(self.plan())

    @torch.no_grad()
    def draw(self) -> None:
        """Draw the next chunk and synchronize, to measure the time."""
        started, (chunk, capacity) = time.perf_counter(), (self.config.chunk, self.config.capacity)
        numbers, plan = self.plans.popleft() if self.plans else self.plan()
        found = self.part.rows(self.world.render(plan), numbers)
        if not self.rows:
            self.rows = {name: rows.new_empty(capacity, *rows.shape[1:]) for name, rows in found.items()}
        places = (torch.arange(chunk) + self.drawn - self.start) % capacity
        for name, rows in found.items():
            self.rows[name][places.to(rows.device)] = rows
        if rows.is_cuda:
            torch.cuda.synchronize()
        self.drawn += chunk
        self.seconds += time.perf_counter() - started

    def fill(self, seen: int, drawn: int) -> None:
        """Draw the rows that the first step needs. drawn: number of rows that an interrupted run had drawn."""
        if drawn > self.drawn:
            self.start = self.drawn = drawn
            self.plans.clear()
        while self.drawn - self.start < min(self.config.first, self.config.capacity):
            try:
                self.draw()
            except torch.OutOfMemoryError:  # other parts use the device too; try again
                torch.cuda.empty_cache()
                time.sleep(2)
        self.seconds, self.used = 0.0, 0

    def next(self, elapsed: float) -> Rows:
        """A random batch, drawn with torch's generator. elapsed: seconds since the first step.

        Draws a chunk first if training has used more rows than were drawn, and if `draw_share` allows it.
        """
        if self.used > 0 and self.seconds <= self.config.draw_share * elapsed:
            self.draw()
            self.used -= self.config.chunk
        self.used += self.batch_size
        return self.sample(self.batch_size)

    def sample(self, count: int = SHOWN) -> Rows:
        """Random rows, drawn with torch's generator."""
        device, filled = next(iter(self.rows.values())).device, min(self.drawn - self.start, self.config.capacity)
        places = torch.randint(filled, (count,), device=device)
        return {name: rows[places] for name, rows in self.rows.items()}
