"""A pool of training rows on the device, rendered continuously and sampled at random.

New rows replace the oldest. They are rendered as fast as training uses rows, but for at most a given fraction of the
time. If rendering is slow, rows are reused more often, and training does not wait.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

from dall3.scenes.world import Batch, Plan, World

Rows = dict[str, Tensor]


class Pool:
    """make: converts images, uint8 (n, 3, side, side), and captions to rows, tensors (n, …) by name. kinds, seed: as in
    `World.draw`. capacity: number of rows kept. first: rows drawn before the first step. chunk: rows drawn at a time.
    share: maximum fraction of the time spent drawing.
    """

    def __init__(
        self,
        world: World,
        make: Callable[[Batch], Rows],
        kinds: dict[str, float],
        seed: int,
        capacity: int,
        first: int,
        chunk: int,
        share: float,
    ) -> None:
        self.world, self.make, self.kinds, self.seed = world, make, kinds, seed
        self.capacity, self.chunk, self.share = capacity, chunk, share
        self.first = min(first, capacity)
        self.drawn, self.used, self.seconds = 0, 0, 0.0
        self.rows: Rows = {}
        self.plans: deque[Plan] = deque()  # plans of the next chunks

    def plan(self) -> Plan:
        """Plan the next chunk. Uses the CPU only."""
        start = self.drawn + len(self.plans) * self.chunk
        return self.world.plan(range(start, start + self.chunk), self.seed, self.kinds)

    def prepare(self, most: int = 64) -> None:
        """Plan one more chunk, up to `most`, while waiting for another part."""
        if len(self.plans) < most:
            self.plans.append(self.plan())

    @torch.no_grad()
    def draw(self) -> None:
        """Draw the next chunk and synchronize, to measure the time."""
        started = time.perf_counter()
        found = self.make(self.world.render(self.plans.popleft() if self.plans else self.plan()))
        if not self.rows:
            self.rows = {name: rows.new_empty(self.capacity, *rows.shape[1:]) for name, rows in found.items()}
        places = (torch.arange(self.chunk) + self.drawn) % self.capacity
        for name, rows in found.items():
            self.rows[name][places.to(rows.device)] = rows
        if rows.is_cuda:
            torch.cuda.synchronize()
        self.drawn += self.chunk
        self.seconds += time.perf_counter() - started

    def fill(self) -> None:
        while self.drawn < self.first:
            try:
                self.draw()
            except torch.OutOfMemoryError:  # other parts share the device; try again
                torch.cuda.empty_cache()
                time.sleep(2)
        self.seconds = 0.0

    def refresh(self, elapsed: float) -> None:
        """Draw a chunk if the drawn rows are used up and `share` allows it. elapsed: seconds since the first step."""
        if self.drawn - self.first < self.used and self.seconds <= self.share * elapsed:
            self.draw()

    def sample(self, count: int) -> Rows:
        """Sample rows at random with torch's generator."""
        self.used += count
        device = next(iter(self.rows.values())).device
        places = torch.randint(min(self.drawn, self.capacity), (count,), device=device)
        return {name: rows[places] for name, rows in self.rows.items()}
