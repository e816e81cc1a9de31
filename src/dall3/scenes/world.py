"""An infinite sequence of images with captions, rendered on the training device from scenes and emoji."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dall3.scenes.captions import caption
from dall3.scenes.composite import Drawings, Layer, lay, placed
from dall3.scenes.emoji import emoji_caption, list_emoji, random_background, random_placement, training_pool
from dall3.scenes.render import chunk_length, render_many
from dall3.scenes.scene import Scene, random_scene
from dall3.scenes.shapes import put
from dall3.scenes.wearing import Wardrobe

KINDS = ("scenes", "emoji", "wearing")


@dataclass
class Plan:
    """The content of a batch: scenes and emoji layers, each with its index in the batch, and all captions."""

    captions: list[str] = field(default_factory=list)
    scenes: list[Scene] = field(default_factory=list)
    scene_places: list[int] = field(default_factory=list)
    layers: list[list[Layer]] = field(default_factory=list)
    backgrounds: list[str] = field(default_factory=list)
    layer_places: list[int] = field(default_factory=list)


@dataclass
class Batch:
    """Images, uint8 (n, 3, side, side) on the world's device, with one caption each."""

    images: Tensor
    captions: list[str]


class World:
    """The training images of the bundled weights, rendered in batches on a device.

    emoji: the folder of `fetch_emoji` or the file of `pack_emoji`; None for scenes only. side: width and height in
    pixels, a multiple of 16. held_out: False excludes the pairs held out from training, True uses only those, None uses
    all. Raises ValueError for an invalid side, and FileNotFoundError if the emoji are missing.

    >>> batch = World("cpu", side=64).draw(range(4), seed=0, kinds={"scenes": 1})
    >>> batch.images.shape, len(batch.captions)
    (torch.Size([4, 3, 64, 64]), 4)
    """

    def __init__(
        self,
        device: str | torch.device = "cpu",
        emoji: str | Path | None = None,
        side: int = 256,
        held_out: bool | None = False,
    ) -> None:
        if side < 16 or side % 16:
            raise ValueError(f"side={side}; expected a multiple of 16")
        self.device, self.side, self.held_out = torch.device(device), side, held_out
        self.emoji = list_emoji(emoji, toned=True) if emoji is not None else []
        self.drawings = Drawings(self.emoji, self.device) if self.emoji else None
        numbers = {drawing.hexcode: k for k, drawing in enumerate(self.emoji)}
        self.pool = [numbers[drawing.hexcode] for drawing in training_pool(self.emoji)]
        self.wardrobe = Wardrobe(self.emoji)

    def draw(self, numbers: Sequence[int], seed: int = 0, kinds: Mapping[str, float] | None = None) -> Batch:
        """Render images by number. A number and a seed determine the image and its caption, in any batch.

        kinds: weights of "scenes", "emoji" and "wearing" (default: scenes only). Raises ValueError for an unknown kind,
        negative weights or a sum of 0, or kinds that need emoji if there are none.
        """
        return self.render(self.plan(numbers, seed, kinds or {"scenes": 1}))

    def plan(self, numbers: Sequence[int], seed: int, kinds: Mapping[str, float]) -> Plan:
        """Choose the content of the images of `draw`. Uses the CPU only."""
        unknown = [kind for kind in kinds if kind not in KINDS]
        if unknown:
            raise ValueError(f"unknown kind {unknown[0]!r}; expected {', '.join(KINDS)}")
        weights = np.array([kinds.get(kind, 0) for kind in KINDS], float)
        if not (weights >= 0).all() or not 0 < weights.sum() < np.inf:
            raise ValueError(f"kinds={dict(kinds)}: expected weights of 0 and more, not all of them 0")
        if weights[1:].any() and self.drawings is None:
            raise ValueError("the kinds emoji and wearing need a World with emoji=, a folder or an archive of emoji")
        ends = np.cumsum(weights / weights.sum()).tolist()
        plan = Plan()
        for place, number in enumerate(numbers):
            rng = np.random.default_rng((seed, number))
            draw = rng.random()
            if draw < ends[0]:
                scene = random_scene(rng, held_out=self.held_out)
                plan.scenes.append(scene)
                plan.scene_places.append(place)
                plan.captions.append(caption(scene, rng))
                continue
            if draw < ends[1]:
                layers, background, words = self.choose_emoji(rng)
            else:
                layers, background, words = self.wardrobe.dress(rng, self.held_out)
            plan.layers.append(layers)
            plan.backgrounds.append(background)
            plan.layer_places.append(place)
            plan.captions.append(words)
        return plan

    def choose_emoji(self, rng: np.random.Generator) -> tuple[list[Layer], str, str]:
        """A random emoji: its layer, its background and a caption."""
        number, background = -1, None
        while background is None:
            number = self.pool[rng.integers(len(self.pool))]
            background = random_background(self.emoji[number], rng, self.held_out)
        size, shift = random_placement(rng)
        words = emoji_caption(self.emoji[number], background, size, rng)
        return [placed(number, size, shift)], background, words

    @torch.no_grad()
    def render(self, plan: Plan) -> Batch:
        """Render a plan. Synchronizes with the device once per chunk of scenes."""
        with torch.autocast(self.device.type, enabled=False):
            return self._render(plan)

    def _render(self, plan: Plan) -> Batch:
        n = len(plan.captions)
        images = torch.empty(n, 3, self.side, self.side, dtype=torch.uint8, device=self.device)
        if plan.scenes:
            which = put(plan.scene_places, self.device)
            images[which] = render_many(plan.scenes, self.side, self.device)
        length = chunk_length(self.side, self.device)
        for start in range(0, len(plan.layers), length):
            part = slice(start, start + length)
            assert self.drawings is not None
            which = put(plan.layer_places[part], self.device)
            images[which] = lay(self.drawings, plan.layers[part], plan.backgrounds[part], self.side)
        return Batch(images, plan.captions)
