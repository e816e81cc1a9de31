"""Render scenes in batches on any device: sphere tracing with 2×2 samples per pixel and a box filter."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dall3.scenes.backdrop import draw_backdrops
from dall3.scenes.camera import Cameras, aim
from dall3.scenes.cloud import draw_clouds
from dall3.scenes.lighting import Surface, expose, shade
from dall3.scenes.materials import LOOKS, details
from dall3.scenes.scene import MATERIALS, SHAPES, Scene
from dall3.scenes.shapes import DISTANCES, delicacy, dot, normals, put
from dall3.scenes.strands import STRANDS, draw_strands
from dall3.scenes.trace import BLOCK, Blocks, find_blocks, trace

SAMPLES = 2  # per pixel and axis
CLOUD_REACH = 0.25  # maximum distance of a cloud from its solid
CHUNK = {"cpu": 2, "cuda": 1024}  # images of 256 pixels rendered at a time
PIECE = 256  # number of blocks processed at a time on a CPU


def runs_of(names: Sequence[str], counts: Sequence[int]) -> list[tuple[str, slice]]:
    """Merge consecutive equal names into slices. counts: the length of each."""
    runs, end = [], 0
    for name, group in groupby(zip(names, counts, strict=True), key=lambda pair: pair[0]):
        start, end = end, end + sum(count for _, count in group)
        if end > start:
            runs.append((name, slice(start, end)))
    return runs


def reach(scene: Scene) -> float:
    """How far the strands of a scene extend from its solid, approximately."""
    strands = STRANDS.get(scene.material)
    return 0.8 * strands.length * delicacy(scene.shape) if strands else 0.0


def pieces(runs: Sequence[tuple[str, slice]], device: torch.device) -> list[tuple[str, slice]]:
    """Slices of blocks, on a CPU split so that the intermediate results of one fit the processor's cache."""
    if device.type != "cpu":
        return list(runs)
    return [
        (name, slice(start, min(start + PIECE, run.stop)))
        for name, run in runs
        for start in range(run.start, run.stop, PIECE)
    ]


def shrink(layer: Tensor) -> Tensor:
    """Average the samples of each pixel: (channels, b, BLOCK²) -> (channels, b, (BLOCK / SAMPLES)²)."""
    rows = layer.unflatten(-1, (BLOCK // SAMPLES, SAMPLES, BLOCK // SAMPLES, SAMPLES))
    return ((rows[..., 0, :, 0] + rows[..., 0, :, 1] + rows[..., 1, :, 0] + rows[..., 1, :, 1]) * 0.25).flatten(-2)


def lay_out(pixels: Tensor, across: int, size: int) -> Tensor:
    """Arrange blocks of pixels (channels, n · across², k²) as images (n, channels, size, size)."""
    channels, wide = len(pixels), round(pixels.shape[-1] ** 0.5)
    grid = pixels.reshape(channels, -1, across, across, wide, wide).permute(1, 0, 2, 4, 3, 5)
    return grid.reshape(-1, channels, across * wide, across * wide)[..., :size, :size]


def draw_solids(scenes: Sequence[Scene], cameras: Cameras, numbers: Tensor, backdrops: Tensor) -> Tensor:
    """Render solids: premultiplied light and coverage (n, 4, size, size) of scenes sorted by shape.

    numbers: the scenes' random numbers, (k, n). backdrops: the scenes without objects, linear light (n, 3, size, size).
    """
    size, device, n = backdrops.shape[-1], backdrops.device, len(scenes)
    samples = size * SAMPLES
    shapes = [scene.shape for scene in scenes]
    blocks = find_blocks(runs_of(shapes, [1] * n), cameras, samples)
    # Points, normals, view directions and openness of all blocks, the input of the materials.
    points = torch.empty(10, len(blocks.which), BLOCK**2, device=device)
    depth = torch.empty_like(points[0])
    for shape, run in pieces(runs_of(shapes, blocks.counts), device):
        camera = cameras.take(blocks.which[run])
        rays = camera.rays(*blocks.coordinates(run, samples))
        t, p, hit = trace(shape, camera.eye, rays, blocks.start[run])
        normal = normals(DISTANCES[shape], p)
        openness = (0.45 + DISTANCES[shape](p + normal * 0.25) * 2.2).clamp_(0, 1)
        openness *= (0.55 + 0.6 * (dot(camera.vertical, p) - camera.ground)).clamp_(0, 1)
        points[:3, run], points[3:6, run], points[6:9, run], points[9, run] = p, normal, rays, openness
        depth[run] = torch.where(hit, t * dot(camera.forward, rays), torch.inf)

    layer = torch.empty(4, len(blocks.which), BLOCK**2, device=device)
    for material, chosen, runs in by_material(scenes, blocks):
        p, normal, view, (openness,) = points[:, chosen].split((3, 3, 3, 1))
        which = blocks.which[chosen]
        surface = Surface(runs, p, normal, view, which, cameras.take(which), backdrops, numbers[:, which, None])
        hit = depth[chosen] < torch.inf
        layer[:3, chosen] = torch.where(hit, shade(surface, LOOKS[material](surface), openness), 0)
        layer[3, chosen] = hit.float()

    each = blocks.across**2
    pixels = torch.zeros(4, n * each, (BLOCK // SAMPLES) ** 2, device=device)
    with_strands = grow(scenes, cameras, blocks, depth, layer, samples)
    layer[:3] = expose(layer[:3])
    pixels[:, blocks.index] = shrink(layer)
    for which, covered in with_strands:
        pixels.unflatten(1, (n, each))[:, which] = covered.unflatten(1, (-1, each))
    return lay_out(pixels, blocks.across, size)


def by_material(scenes: Sequence[Scene], blocks: Blocks) -> list[tuple[str, Tensor, list[tuple[str, slice]]]]:
    """For each material the indices of its blocks, (b,), and the slices of each shape among them."""
    device, starts = blocks.which.device, np.cumsum([0, *blocks.counts])
    found = []
    for material in MATERIALS:
        mine = [k for k, scene in enumerate(scenes) if scene.material == material and blocks.counts[k]]
        if not mine:
            continue
        numbers = np.concatenate([np.arange(starts[k], starts[k + 1]) for k in mine])
        chosen = torch.from_numpy(numbers).to(device, non_blocking=True)
        runs = runs_of([scenes[k].shape for k in mine], [blocks.counts[k] for k in mine])
        if device.type == "cpu":
            for shape, run in pieces(runs, device):
                found.append((material, chosen[run], [(shape, slice(0, run.stop - run.start))]))
        else:
            found.append((material, chosen, runs))
    return found


def grow(
    scenes: Sequence[Scene], cameras: Cameras, blocks: Blocks, depth: Tensor, layer: Tensor, samples: int
) -> list[tuple[Tensor, Tensor]]:
    """Draw strands over the objects' light and coverage (4, b, BLOCK²). Returns image numbers (m,) and pixels
    (4, m · across², (BLOCK / SAMPLES)²) for each material and size.
    """
    groups: dict[tuple[str, str], list[int]] = {}
    for k, scene in enumerate(scenes):
        if scene.material in STRANDS:
            groups.setdefault((scene.material, scene.size), []).append(k)
    each, starts, found = blocks.across**2, np.cumsum([0, *blocks.counts]), []
    for mine in groups.values():
        numbers = np.concatenate([np.arange(starts[k], starts[k + 1]) for k in mine])
        shift = np.concatenate([np.full(blocks.counts[k], i - k) for i, k in enumerate(mine)])
        chosen, moved = torch.from_numpy(np.stack([numbers, shift * each])).to(layer.device, non_blocking=True)
        index = blocks.index[chosen] + moved
        behind = torch.full((len(mine) * each, BLOCK**2), torch.inf, device=layer.device)
        behind[index] = depth[chosen]
        which = put(mine, layer.device)
        light, shown = draw_strands([scenes[k] for k in mine], cameras, which, behind, blocks.across, samples)
        covered = torch.zeros(4, *behind.shape, device=layer.device)
        covered[:, index] = layer[:, chosen]
        covered[:3] = torch.where(shown, light, covered[:3])
        covered[3] = torch.where(shown, 1, covered[3])
        covered[:3] = expose(covered[:3])
        found.append((which, shrink(covered)))
    return found


def draw_cloudy(scenes: Sequence[Scene], cameras: Cameras, numbers: Tensor, size: int) -> Tensor:
    """Render clouds: premultiplied light and coverage (n, 4, size, size) of scenes sorted by shape."""
    shapes = [scene.shape for scene in scenes]
    blocks = find_blocks(runs_of(shapes, [1] * len(scenes)), cameras, size, CLOUD_REACH)
    runs = pieces(runs_of(shapes, blocks.counts), numbers.device)
    light, cover = draw_clouds(runs, blocks, cameras, numbers[:3], size)
    layer = torch.zeros(4, len(scenes) * blocks.across**2, BLOCK**2, device=numbers.device)
    layer[:, blocks.index] = torch.cat([expose(light), cover[None]])
    return lay_out(layer, blocks.across, size)


def draw_sorted(scenes: Sequence[Scene], size: int, device: torch.device) -> Tensor:
    """Render scenes sorted by `sorting`: uint8 (n, 3, size, size)."""
    cameras = aim(scenes, [reach(scene) for scene in scenes], device)
    numbers = put([details(scene) for scene in scenes], device, torch.float32).T
    backdrops = draw_backdrops(scenes, runs_of([scene.shape for scene in scenes], [1] * len(scenes)), cameras, size)
    cloudy = sum(scene.material == "cloud" for scene in scenes)
    layers = []
    for part in (slice(0, cloudy), slice(cloudy, len(scenes))):
        if part.start < part.stop:
            mine, own = scenes[part], cameras.part(part)
            if part.start == 0 and cloudy:
                layers.append(draw_cloudy(mine, own, numbers[:, part], size))
            else:
                layers.append(draw_solids(mine, own, numbers[:, part], backdrops[part]))
    layer = torch.cat(layers)
    images = backdrops * (1 - layer[:, 3:]) + layer[:, :3]
    return (images.clamp_(0, 1).sqrt_() * 255 + 0.5).to(torch.uint8)


def chunk_length(size: int, device: torch.device) -> int:
    """The number of images rendered at a time. Uses less than 1 GB of memory on a CPU, and about 10 GB on a GPU."""
    most = CHUNK.get(device.type, CHUNK["cuda"])
    return max(most * 256 * 256 // (size * size), 1)


@torch.no_grad()
def render_many(scenes: Sequence[Scene], size: int = 256, device: str | torch.device = "cpu") -> Tensor:
    """Render scenes: uint8 (n, 3, size, size) on the device. An image does not depend on the other scenes.

    Synchronizes with the device once per chunk. Raises ValueError for a size below 16 pixels.

    >>> render_many([Scene("cube", "wood"), Scene("egg", "cloud")], 64).shape
    torch.Size([2, 3, 64, 64])
    """
    if size < 16:
        raise ValueError(f"size={size}; expected at least 16 pixels")
    device = torch.device(device)
    images = torch.empty(len(scenes), 3, size, size, dtype=torch.uint8, device=device)
    length = chunk_length(size, device)
    for start in range(0, len(scenes), length):
        order = sorted(range(start, min(start + length, len(scenes))), key=lambda k: sorting(scenes[k]))
        images[put(order, device)] = draw_sorted([scenes[k] for k in order], size, device)
    return images


def sorting(scene: Scene) -> tuple[bool, int, int]:
    """Sort key: clouds before solids, then by shape, so that each shape is rendered in one batch."""
    return scene.material != "cloud", SHAPES.index(scene.shape), MATERIALS.index(scene.material)


def render(scene: Scene, size: int = 256) -> NDArray[np.uint8]:
    """Render a scene on the CPU: uint8 (size, size, 3). The same scene gives the same bytes.

    Raises ValueError for a size below 16 pixels.
    """
    return render_many([scene], size)[0].permute(1, 2, 0).contiguous().numpy()
