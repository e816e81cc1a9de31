"""Train the judge of benchmarks/quality.py, a small classifier of what an image shows.

python benchmarks/judge.py --emoji FOLDER --out judge.safetensors

It is trained on renders of all pairs of shape and material and on all emoji on all backgrounds. The images are slightly
blurred, shifted and tinted, because the judge classifies decoded and refined images too. Its accuracy on clean test
images is printed and stored with the weights.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from functools import partial
from multiprocessing import Pool
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from dall3.scenes import BACKGROUNDS, MATERIALS, SHAPES, random_scene, render
from dall3.scenes.emoji import Emoji, draw_emoji, fetch_emoji, list_emoji, random_placement

SIDE, WIDTH, UNKNOWN = 128, 192, -1
ABOUT = ("classes", "accuracy")  # attributes stored with the weights
HEADS = ("shape", "material", "background", "emoji")


class Block(nn.Module):
    """A residual block of two convolutions with stride 2 (arXiv 1512.03385)."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, out_channels, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(),
            nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
        )
        self.shortcut = nn.Sequential(
            nn.AvgPool2d(2), nn.Conv2d(channels, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.layers(x) + self.shortcut(x))


class Judge(nn.Module):
    """Classifies the shape, the material, the background and the emoji of an image.

    classes: class names of each head, in order; hexcodes for emoji. accuracy: the result of `evaluate`.
    """

    def __init__(self, classes: dict[str, list[str]], accuracy: dict[str, float] | None = None) -> None:
        super().__init__()
        self.classes, self.accuracy = classes, accuracy or {}
        self.body = nn.Sequential(
            nn.Conv2d(3, 24, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(24),
            nn.ReLU(),
            Block(24, 48),
            Block(48, 96),
            Block(96, WIDTH),
        )
        self.heads = nn.ModuleDict({head: nn.Linear(WIDTH, len(classes[head])) for head in HEADS})

    def features(self, images: Tensor) -> Tensor:
        """The shared features, (n, WIDTH), of images, float (n, 3, side, side) in [0, 1]."""
        if images.shape[-1] != SIDE:
            images = F.interpolate(images, (SIDE, SIDE), mode="area")
        return self.body((images - 0.5) * 4).mean((2, 3))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """The logits of each head, (n, classes), for images, float (n, 3, side, side) in [0, 1]."""
        features = self.features(images)
        return {head: layer(features) for head, layer in self.heads.items()}


def all_classes(emoji: Sequence[Emoji]) -> dict[str, list[str]]:
    """The class names of scenes and emoji, by head."""
    hexcodes = [drawing.hexcode for drawing in emoji]
    names = (list(SHAPES), list(MATERIALS), list(BACKGROUNDS), hexcodes)
    return dict(zip(HEADS, names, strict=True))


def save_judge(judge: Judge, path: str | Path) -> None:
    """Write a judge's weights in half precision, its classes and its accuracy to a safetensors file."""
    about = {name: json.dumps(getattr(judge, name)) for name in ABOUT}
    weights = {k: t.half() if t.is_floating_point() else t for k, t in judge.state_dict().items()}
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, path, about)


def load_judge(path: str | Path) -> Judge:
    """Load the judge that `save_judge` wrote, in eval mode. Raises ValueError for another safetensors file."""
    with safe_open(path, "pt") as file:
        about = {name: json.loads(text) for name, text in (file.metadata() or {}).items() if name in ABOUT}
    if len(about) < len(ABOUT):
        raise ValueError(f"{path} holds no judge; expected a file that benchmarks/judge.py wrote")
    judge = Judge(**about)
    judge.load_state_dict(load_file(path))
    return judge.eval().requires_grad_(False)


def draw_example(
    index: int, emoji: Sequence[Emoji], renders: int, side: int, seed: int
) -> tuple[np.ndarray, list[int]]:
    """Image number `index`, uint8 (side, side, 3), and its class in each of HEADS, UNKNOWN if it has none.

    The first `renders` images are scenes; after them the emoji are repeated in order.
    """
    rng = np.random.default_rng((seed, index))
    backgrounds = list(BACKGROUNDS)
    if index < renders:
        scene = random_scene(rng, held_out=None)
        shape, material = SHAPES.index(scene.shape), MATERIALS.index(scene.material)
        return render(scene, side), [shape, material, backgrounds.index(scene.background), UNKNOWN]
    which = (index - renders) % len(emoji)
    background, (size, shift) = rng.integers(len(backgrounds)), random_placement(rng)
    picture = draw_emoji(emoji[which], backgrounds[background], size, side, shift)
    return picture, [UNKNOWN, UNKNOWN, int(background), which]


def draw_examples(
    emoji: Sequence[Emoji], renders: int, rounds: int, side: int, seed: int, workers: int
) -> tuple[Tensor, Tensor]:
    """Scenes and `rounds` images of every emoji, downscaled: uint8 (n, 3, SIDE, SIDE), and classes (n, 4)."""
    count = renders + rounds * len(emoji)
    pictures, classes = np.empty((count, SIDE, SIDE, 3), np.uint8), np.empty((count, len(HEADS)), np.int64)
    draw = partial(draw_example, emoji=emoji, renders=renders, side=side, seed=seed)
    with Pool(workers) as pool:
        drawn = tqdm(pool.imap(draw, range(count), chunksize=32), total=count, desc=f"drawing at {side} px")
        for i, (picture, labels) in enumerate(drawn):
            box = picture.reshape(SIDE, side // SIDE, SIDE, side // SIDE, 3)
            pictures[i], classes[i] = box.mean((1, 3)).round(), labels
    return torch.from_numpy(pictures).permute(0, 3, 1, 2), torch.from_numpy(classes)


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Augment images, float (n, 3, SIDE, SIDE) in [0, 1]: shift, resize, tint, add noise, and blur half of them."""

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(len(images), *shape, generator=generator) * (high - low) + low

    transform = torch.zeros(len(images), 2, 3)
    transform[:, 0, 0] = transform[:, 1, 1] = uniform(0.9, 1.1)
    transform[:, :, 2] = uniform(-0.06, 0.06, 2)
    grid = F.affine_grid(transform, list(images.shape), align_corners=False)
    images = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    parts = []
    for part in images.chunk(8):  # blur each by resizing to another size and back
        side = min(int(torch.randint(48, 2 * SIDE - 48, (), generator=generator)), SIDE)
        small = F.interpolate(part, (side, side), mode="area")
        parts.append(F.interpolate(small, (SIDE, SIDE), mode="bilinear", align_corners=False))
    images = torch.cat(parts) * uniform(0.94, 1.06, 3, 1, 1) + uniform(-0.03, 0.03, 3, 1, 1)
    noise = torch.randn(images.shape, generator=generator) * uniform(0, 0.04, 1, 1, 1)
    return (images + noise).clamp(0, 1)


def train(
    judge: Judge, pictures: Tensor, classes: Tensor, epochs: int, seed: int, bf16: bool, batch_size: int = 128
) -> Judge:
    """Train on images, uint8 (n, 3, SIDE, SIDE), and their classes in each head, (n, 4)."""
    generator = torch.Generator().manual_seed(seed)
    steps = epochs * (len(pictures) // batch_size)
    optimizer = torch.optim.AdamW(judge.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps)
    judge.train().to(memory_format=torch.channels_last)
    with tqdm(total=steps, desc="training") as bar:
        for _ in range(epochs):
            for batch in torch.randperm(len(pictures), generator=generator).split(batch_size)[: steps // epochs]:
                images = augment(pictures[batch].float() / 255, generator)
                with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                    logits = judge(images.contiguous(memory_format=torch.channels_last))
                losses = [
                    F.cross_entropy(logits[head].float(), target, ignore_index=UNKNOWN, reduction="sum")
                    for head, target in zip(HEADS, classes[batch].T, strict=True)
                ]
                loss = torch.stack(losses).sum() / len(batch)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
                bar.set_postfix(loss=f"{loss.detach():.3f}", refresh=False)
    return judge.eval().requires_grad_(False)


def evaluate(judge: Judge, pictures: Tensor, classes: Tensor) -> dict[str, float]:
    """The accuracy of each head on images, uint8 (n, 3, SIDE, SIDE), and of shape and material together."""
    logits = [judge(batch.float() / 255) for batch in tqdm(pictures.split(128), desc="judging")]
    right = {
        head: (torch.cat([part[head] for part in logits]).argmax(-1) == target)[target != UNKNOWN]
        for head, target in zip(HEADS, classes.T, strict=True)
    }
    right["shape and material"] = right["shape"] & right["material"]
    return {name: marks.float().mean().item() for name, marks in right.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--emoji", default="emoji", help="folder of the Fluent emoji, downloaded if needed")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("judge.safetensors"))
    parser.add_argument("--renders", type=int, default=20000, help="scenes to train on")
    parser.add_argument("--rounds", type=int, default=10, help="training images of every emoji")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--fresh", type=int, default=2000, help="scenes to test on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that render")
    parser.add_argument("--pictures", type=Path, help="a file that caches the training images")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast, for CPUs with hardware support")
    args = parser.parse_args()
    start = time.perf_counter()
    torch.manual_seed(args.seed)
    emoji = list_emoji(fetch_emoji(args.emoji))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    judge = Judge(all_classes(emoji))
    if args.pictures and args.pictures.exists():
        examples = torch.load(args.pictures, mmap=True)
    else:
        examples = draw_examples(emoji, args.renders, args.rounds, SIDE, args.seed, args.workers)
        if args.pictures:
            torch.save(examples, args.pictures)
    train(judge, *examples, args.epochs, args.seed, args.bf16).half().float()  # rounded to the precision of the file
    judge.accuracy = evaluate(judge, *draw_examples(emoji, args.fresh, 1, 2 * SIDE, args.seed + 1, args.workers))
    save_judge(judge, args.out)
    print("accuracy on test images: " + ", ".join(f"{name} {share:.2%}" for name, share in judge.accuracy.items()))
    print(f"{args.out}: {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
