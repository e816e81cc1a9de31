"""What a part is trained on: rows drawn from the world on its device, kept for a while and drawn from at random.

New rows replace the oldest. They are drawn as fast as the training uses them up, but for no more than a share of its
time: where drawing is slow, rows are seen more often, and the training does not wait.
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
    """make: turns pictures, uint8 (n, 3, side, side), and captions to rows, tensors (n, …) by name. capacity: rows
    kept. first: rows drawn before the first step. share: of the time that drawing may take.
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
        self.plans: deque[Plan] = deque()  # of what is drawn next

    def plan(self) -> Plan:
        """The plan of the chunk after those that are drawn or planned: work for the host alone."""
        start = self.drawn + len(self.plans) * self.chunk
        return self.world.plan(range(start, start + self.chunk), self.seed, self.kinds)

    def prepare(self, most: int = 64) -> None:
        """Plan one more chunk, while there is nothing else to do."""
        if len(self.plans) < most:
            self.plans.append(self.plan())

    @torch.no_grad()
    def draw(self) -> None:
        """Draw the next chunk, and wait for it: what it takes is measured."""
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
            except torch.OutOfMemoryError:  # others share the device, and need it less in a moment
                torch.cuda.empty_cache()
                time.sleep(2)
        self.seconds = 0.0

    def refresh(self, elapsed: float) -> None:
        """Draw a chunk if the rows drawn are used up and there is time. elapsed: seconds since the first step."""
        if self.drawn - self.first < self.used and self.seconds <= self.share * elapsed:
            self.draw()

    def sample(self, count: int) -> Rows:
        """Rows chosen at random by torch's generator."""
        self.used += count
        device = next(iter(self.rows.values())).device
        places = torch.randint(min(self.drawn, self.capacity), (count,), device=device)
        return {name: rows[places] for name, rows in self.rows.items()}
