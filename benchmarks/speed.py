"""Measure speed against the original programs and the hardware limit: python benchmarks/speed.py

Both alternate in one run on the same weights. Figures are medians of the rounds. The originals are measured if they are
installed: dalle-pytorch 1.6.6 (`pip install --no-deps dalle-pytorch==1.6.6`; missing imports are stubbed here, and its
lost cache argument is fixed), and clones of upstream's two repositories, given by --upstream-dalle and
--upstream-diffusion. Programs without a cache run every 16th token only, and the time of the others is interpolated.

Other programs, each skipped if it is not installed: for the section mini, min-dalle (`pip install --no-deps
--target FOLDER min-dalle==0.4.11`, named by --min-dalle FOLDER); for the section diffusion, diffusers' UNet2DModel.

Sections: tokens, mini, diffusion, prompt, growth, steps, start, memory. Each writes its rows to results/speed.json;
tokens also writes the plot docs/speed.png. With --device cuda the sections tokens, diffusion and gpu run there, and the
rows are written to results/speed_cuda.json.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import importlib.util
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from peers import make_unet2d, mini_pair
from quality import to_markdown
from torch import Tensor

from dall3 import Dall3Pipeline
from dall3.diffusion.denoising import Denoising, denoising_steps
from dall3.diffusion.guidance import clip_loss, guided, spherical_distance
from dall3.diffusion.schedule import GaussianDiffusion
from dall3.models.clip import CLIP
from dall3.models.packed import Float16Linear, Int8Linear, prepare
from dall3.models.transformer import DalleTransformer, TransformerConfig
from dall3.models.unet import UNet, UNetConfig
from dall3.tokens.batching import memory_for_caches
from dall3.tokens.decoding import draw_image_tokens, image_token_steps
from dall3.tokens.sampling import Sampling
from dall3.tokens.seeds import candidate_uniforms, make_generator
from dall3.weights.convert.dalle_pytorch import load_transformer
from dall3.weights.convert.guided_diffusion import load_unet

Row = dict[str, Any]
WORDS, CODES, TEXT, GRID = 8192, 8192, 80, 16
TOP_K = 0.9
# guided-diffusion's flags, as upstream's `--model_size 256`, with 32 channels and code embeddings of 32.
FLAGS: dict[str, Any] = dict(
    image_size=256,
    class_cond=False,
    learn_sigma=True,
    num_channels=32,
    num_res_blocks=2,
    channel_mult="",
    num_heads=4,
    num_head_channels=64,
    num_heads_upsample=-1,
    attention_resolutions="32,16,8",
    dropout=0.0,
    diffusion_steps=1000,
    noise_schedule="linear",
    timestep_respacing="1000",
    use_kl=False,
    predict_xstart=False,
    rescale_timesteps=True,
    rescale_learned_sigmas=False,
    use_checkpoint=False,
    use_scale_shift_norm=True,
    resblock_updown=True,
    use_fp16=False,
    use_new_attention_order=False,
    emb_condition=True,
    emb_input_dims=32,
    emb_output_dims=64,
)
PROMPT = "a cube made of cloud"
LONGEST = 30.0  # seconds of a run in the section growth
NAMES = ("num_text_tokens", "num_image_tokens", "text_seq_len", "dim", "depth")


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter() - start


def in_turn(works: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """The median seconds of each function. Every round runs all of them once; a warm-up round is not counted."""
    runs: dict[str, list[float]] = {name: [] for name in works}
    for counted in [False] + [True] * rounds:
        for name, work in works.items():
            taken = seconds(work)
            runs[name] += [taken] * counted
    return {name: statistics.median(found) for name, found in runs.items()}


def fill_in(name: str, **names: Any) -> None:
    """Register a stub module with the names that an original imports from a package that is not installed."""
    try:
        importlib.import_module(name)
    except ImportError:
        module = ModuleType(name)
        module.__dict__.update(names)
        sys.modules[name] = module


def load_dalle_pytorch(folder: Path | None = None) -> Any:
    """Import DALLE-pytorch from a clone or as installed; None if it is not installed."""
    for name in [name for name in sys.modules if name.split(".")[0] == "dalle_pytorch"]:
        del sys.modules[name]
    if folder is not None:
        sys.path.insert(0, str(folder))
    release = type("Release", (), {"version": "1.6.6"})
    fill_in("pkg_resources", get_distribution=lambda name: release, parse_version=lambda version: version)
    for name in ("youtokentome", "ftfy", "regex", "webdataset", "taming", "taming.models"):
        fill_in(name)
    fill_in("transformers", BertTokenizer=None)
    fill_in("omegaconf", OmegaConf=None)
    fill_in("axial_positional_embedding", AxialPositionalEmbedding=None)
    fill_in("taming.models.vqgan", VQModel=None, GumbelVQ=None)
    fill_in("g_mlp_pytorch", gMLPBlock=None)
    try:
        return importlib.import_module("dalle_pytorch.dalle_pytorch")
    except ImportError:
        if folder is not None:
            raise
        return None
    finally:
        if folder is not None:
            sys.path.remove(str(folder))


def make_dalle(module: Any, depth: int) -> Any:
    """An original transformer with random weights that float16 represents exactly."""
    torch.manual_seed(0)
    vae = module.DiscreteVAE(image_size=8 * GRID, num_tokens=CODES, codebook_dim=64, num_layers=3, hidden_dim=16)
    sizes = dict(dim=512, depth=depth, heads=8, dim_head=64, num_text_tokens=WORDS, text_seq_len=TEXT)
    return module.DALLE(vae=vae, **sizes).half().float().eval()  # published weights are float16


def load_ours(original: Any, depth: int, device: str = "cpu") -> DalleTransformer:
    """Our transformer with the original's weights, loaded from a checkpoint, or with random weights."""
    if original is None:
        torch.manual_seed(0)
        made = DalleTransformer(TransformerConfig(WORDS, CODES, TEXT, 512, depth)).half().float().to(device)
        return made.eval().requires_grad_(False)
    hparams = dict(dim=512, depth=depth, heads=8, dim_head=64, num_text_tokens=WORDS, text_seq_len=TEXT)
    hparams |= dict(reversible=False, loss_img_weight=7, attn_types=("full",))
    hparams |= dict(shift_tokens=True, rotary_emb=True)
    vae = dict(image_size=8 * GRID, num_tokens=CODES, codebook_dim=64, num_layers=3, hidden_dim=16)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "dalle.pt"
        torch.save({"hparams": hparams, "vae_params": vae, "weights": original.state_dict()}, path)
        return load_transformer(path).to(device)


def with_repaired_cache(self: Any, text: Tensor, image: Tensor, cond_scale: float = 1, cache: Any = None) -> Tensor:
    """`forward_with_cond_scale` of 1.6.6 for a cond_scale of 1, fixed to pass on the cache."""
    logits: Tensor = self.forward(text, image, cache=cache)
    return logits


@torch.no_grad()
def without_cache(dalle: Any, text: Tensor, every: int = 16) -> float:
    """Seconds for an image's tokens without a cache, estimated as 16 times those of every 16th token."""
    taken, image = [], torch.zeros(len(text), GRID**2, dtype=torch.int64, device=text.device)
    dalle(text, image[:, :8])
    for length in range(every // 2, GRID**2, every):
        taken.append(seconds(lambda length=length: dalle(text, image[:, :length])))  # type: ignore[misc]
    return sum(taken) * every


def bandwidth(device: str) -> tuple[float, float]:
    """Memory bandwidth in bytes per second, of a sum and of a transformer's linear layers at batch size 1."""
    block = torch.ones(64 * 2**20, device=device)
    read = block.numel() * 4 / min(seconds(block.sum) for _ in range(5))
    transformer = load_ours(None, 12, device)
    # The packed copy, which draws, has its linear layers under the same names.
    drawing = dict(prepare(transformer, rows=1).named_modules())
    layers = [(drawing[n], m.weight) for n, m in transformer.named_modules() if n[:6] == "layers" and is_linear(m)]
    inputs = {n: torch.randn(1, 1, n, device=device) for n in {weight.shape[1] for _, weight in layers}}
    size = sum(weight.numel() for _, weight in layers) * weight_bytes(transformer)
    with torch.inference_mode():
        taken = min(seconds(lambda: [layer(inputs[weight.shape[1]]) for layer, weight in layers]) for _ in range(20))
    return read, size / taken


def is_linear(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.Linear)


def weight_bytes(transformer: DalleTransformer, quantize: str | None = None, rows: int = 1) -> int:
    """Bytes per weight of the linear layers while drawing."""
    head = prepare(transformer, quantize, rows).image_head
    return {Float16Linear: 2, Int8Linear: 1}.get(type(head), 4)


def arithmetic(device: str) -> float:
    """Float32 operations per second of a matrix product."""
    a, b = torch.randn(2, 2048, 2048, device=device)
    return float(2 * 2048**3 / min(seconds(lambda: a @ b) for _ in range(5)))


def tokens(args: argparse.Namespace) -> list[Row]:
    """Draw 256 image tokens of one text: dim 512, top_k 0.9, float32. limit: reading the weights once per token."""
    read, through_linear = bandwidth(args.device)
    flops, rows = arithmetic(args.device), []
    print(
        f"memory {read / 1e9:.0f} GB/s, linear layers {through_linear / 1e9:.0f} GB/s, float32 {flops / 1e9:.0f} GF/s"
    )
    module, text = load_dalle_pytorch(), torch.zeros(TEXT, dtype=torch.int64, device=args.device)
    text[:5] = torch.arange(5, 10)
    for depth in args.depths:
        original = make_dalle(module, depth).to(args.device) if module is not None else None
        if module is not None:
            module.DALLE.forward_with_cond_scale = with_repaired_cache
        ours = load_ours(original, depth, args.device)
        weights = sum(m.weight.numel() for m in ours.layers.modules() if isinstance(m, torch.nn.Linear))
        weights += CODES * 512
        for batch in args.batches if depth == 12 else args.batches[:1]:
            uniforms = candidate_uniforms(0, range(batch), GRID**2).to(args.device)

            def draw(quantize: str | None, uniforms: Tensor = uniforms, ours: DalleTransformer = ours) -> Tensor:
                return draw_image_tokens(ours, text, uniforms, Sampling(top_k=TOP_K, quantize=quantize))

            works: dict[str, Callable[[], object]] = {"ours": lambda draw=draw: draw(None)}  # type: ignore[misc]
            if batch <= 8 and args.device == "cpu":
                works["ours, int8"] = lambda draw=draw: draw("int8")  # type: ignore[misc]
            if args.device != "cpu":
                compiled = copy.deepcopy(ours)
                compiled.compile(mode="reduce-overhead")
                works["ours, compiled"] = lambda draw=draw, ours=compiled: draw(None, ours=ours)  # type: ignore[misc]
            if original is not None and batch <= 8:
                prompts = text.expand(batch, -1)
                works["dalle-pytorch 1.6.6, cache repaired"] = lambda prompts=prompts, original=original: (  # type: ignore[misc]
                    original.generate_images(prompts, filter_thres=TOP_K, use_cache=True)
                )
            found = in_turn(works, args.rounds)
            for name, taken in found.items():
                # A lower bound of a step: the time to read the weights, or to multiply with them.
                size = weights * weight_bytes(ours, "int8" if "int8" in name else None, batch)
                limit = GRID**2 * max(size / through_linear, 2 * weights * batch / flops)
                row = {"depth": depth, "batch": batch, "program": name, "seconds": taken}
                row |= {"tokens/s": batch * GRID**2 / taken, "times as long": taken / found["ours"]}
                rows.append(row | ({"share of the limit": limit / taken} if "ours" in name else {}))
                print(rows[-1], flush=True)
    if args.upstream_dalle:
        upstream = make_dalle(load_dalle_pytorch(args.upstream_dalle), 12).to(args.device)
        ours = {r["batch"]: r for r in rows if r["depth"] == 12 and r["program"] == "ours"}
        for batch in sorted({1, 8} & ours.keys()):
            taken = without_cache(upstream, text.expand(batch, -1))
            rows.append({"depth": 12, "batch": batch, "program": "upstream", "seconds": taken})
            rows[-1] |= {"tokens/s": batch * GRID**2 / taken, "times as long": taken / ours[batch]["seconds"]}
            print(rows[-1], flush=True)
    return rows


def make_unets(folder: Path | None) -> tuple[Any, Any, UNet]:
    """The original's UNet and diffusion with random weights, or None and None without the clone; our UNet with the same
    weights.
    """
    if folder is None:
        torch.manual_seed(0)
        sizes = dict(num_head_channels=64, embedding_dims=(32, 64))
        unet = UNet(UNetConfig(32, (1, 1, 2, 2, 4, 4), 2, (3, 4, 5), 256, **sizes))  # type: ignore[arg-type]
        return None, None, unet.eval().requires_grad_(False)
    sys.path.insert(0, str(folder))
    script_util = importlib.import_module("guided_diffusion.script_util")
    torch.manual_seed(0)
    model, diffusion = script_util.create_model_and_diffusion(**FLAGS)
    for parameter in model.parameters():  # zero-initialized layers would make guidance trivial
        parameter.data.normal_(0, 0.02)
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "model.pt"
        torch.save(model.state_dict(), path)
        # As sample.py does: its attention always uses gradient checkpointing.
        for name, parameter in model.eval().named_parameters():
            parameter.requires_grad_(any(part in name for part in ("qkv", "norm", "proj")))
        return model, diffusion, load_unet(path, FLAGS)


def original_step(model: Any, diffusion: Any, clip: CLIP | None, target: Tensor, x: Tensor, embeds: Tensor) -> Tensor:
    """A step of upstream's sample.py. With guidance the UNet runs once for the gradient and once for the step."""
    i, cutn = 500, 16
    t, more = torch.full((len(x),), i, device=x.device), {"image_embeds": embeds}

    def gradient(x: Tensor, scaled: Tensor, image_embeds: Tensor | None = None) -> Tensor:
        assert clip is not None
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            out = diffusion.p_mean_variance(model, x, t, clip_denoised=False, model_kwargs=more)
            share = float(diffusion.sqrt_one_minus_alphas_cumprod[i])
            blend = (out["pred_xstart"] * share + x * (1 - share) + 1) / 2
            parts = []
            for _ in range(cutn):
                size = int(torch.rand([]) * (x.shape[-1] - clip.image_size) + clip.image_size)
                left, top = (int(torch.randint(0, x.shape[-1] - size + 1, ())) for _ in range(2))
                square = blend[:, :, top : top + size, left : left + size]
                parts.append(F.adaptive_avg_pool2d(square, clip.image_size))
            distance = spherical_distance(clip.embed_images(torch.cat(parts)), target)
            return -torch.autograd.grad(distance.sum() / cutn * 1000, x)[0]

    with torch.no_grad():
        guide = gradient if clip is not None else None
        out: dict[str, Tensor] = diffusion.p_sample(model, x, t, clip_denoised=False, cond_fn=guide, model_kwargs=more)
        return out["sample"]


ONE_STEP = Denoising(1000, scheduler="ddpm", stop_at=1)  # ancestral, like upstream's


def our_steps(
    unet: UNet, clip: CLIP | None, target: Tensor, x: Tensor, embeds: Tensor, settings: Denoising = ONE_STEP
) -> None:
    """Our denoising steps on the same UNet with the same cut-outs."""

    def guide(predict: Any, diffusion: GaussianDiffusion, lowest: int) -> Any:
        assert clip is not None
        weights, cutouts = torch.ones(1, device=x.device), make_generator(x.device, 0, "cutouts")
        pull = clip_loss(clip, target, weights, 1000.0, 16, cutouts)
        return guided(predict, diffusion, lowest, pull)

    generators, how = [make_generator(x.device, 0, "noise", 1)], guide if clip is not None else None
    with torch.no_grad():
        for _ in denoising_steps(unet, tuple(x.shape[1:]), generators, {"image_embeds": embeds}, settings, None, how):
            pass


def diffusion(args: argparse.Namespace) -> list[Row]:
    """One ancestral step of one image of 256 px with a UNet of upstream's shape with 32 channels; 16 cut-outs."""
    model, schedule, unet = make_unets(args.upstream_diffusion)
    pipe = Dall3Pipeline.from_pretrained(device=args.device)
    assert pipe.clip is not None
    model, unet = model.to(args.device) if model is not None else None, unet.to(args.device)
    x, embeds = torch.randn(1, 3, 256, 256, device=args.device), torch.randn(1, 32, 16, 16, device=args.device)
    target, rows = pipe.clip.embed_text([PROMPT]), []
    peer = make_unet2d(args.device)
    if peer is None:
        print("diffusers is not installed: its UNet2DModel is skipped")
    for kind, clip in (("unguided", None), ("guided", pipe.clip)):
        works: dict[str, Callable[[], object]] = {
            "ours": lambda clip=clip: our_steps(unet, clip, target, x, embeds)  # type: ignore[misc]
        }
        if model is not None:
            works["upstream"] = lambda clip=clip: (  # type: ignore[misc]
                original_step(model, schedule, clip, target, x, embeds)
            )
        if peer is not None and clip is None:  # UNet2DModel has no guidance
            works["diffusers' UNet2DModel"] = lambda: peer(x, 500)
        found = in_turn(works, 2 * args.rounds + 1)
        for name, taken in found.items():
            row = {"step": kind, "program": name, "seconds": taken}
            rows.append(row | ({"ours / theirs": found["ours"] / taken} if name != "ours" else {}))
            print(rows[-1], flush=True)
    return rows


def prompt(args: argparse.Namespace) -> list[Row]:
    """A prompt to one guided image of 256 px, at depth 12: ours with 25 and 50 DDIM steps, upstream's two programs with
    1,000, estimated from one guided step and every 16th token. quality.py's section steps measures the effect of the
    number of steps.
    """
    if args.upstream_dalle is None or args.upstream_diffusion is None:
        print("skipped: pass the paths of both clones, --upstream-dalle and --upstream-diffusion")
        return []
    upstream = make_dalle(load_dalle_pytorch(args.upstream_dalle), 12)
    transformer, text = load_ours(upstream, 12), torch.arange(TEXT)
    model, schedule, unet = make_unets(args.upstream_diffusion)
    clip = Dall3Pipeline.from_pretrained().clip
    assert clip is not None
    x, embeds, uniforms = torch.randn(1, 3, 256, 256), torch.randn(1, 32, 16, 16), candidate_uniforms(0, range(1), 256)
    target = clip.embed_text([PROMPT])

    def ours(count: int) -> None:
        draw_image_tokens(transformer, text, uniforms, Sampling(top_k=TOP_K))
        our_steps(unet, clip, target, x, embeds, Denoising(count))

    works: dict[str, Callable[[], object]] = {
        "step": lambda: original_step(model, schedule, clip, target, x, embeds),
        "25": lambda: ours(25),
        "50": lambda: ours(50),
    }
    found = in_turn(works, args.rounds)
    theirs = without_cache(upstream, text[None]) + 1000 * found["step"]
    rows: list[Row] = [{"program": "upstream", "steps": 1000, "seconds": theirs}]
    for count in (25, 50):
        taken = found[f"{count}"]
        rows.append({"program": "ours", "steps": count, "seconds": taken, "theirs / ours": theirs / taken})
    print(rows, flush=True)
    return rows


def mini(args: argparse.Namespace) -> list[Row]:
    """256 image tokens of a transformer with DALL·E Mini's sizes and random weights that float16 represents exactly;
    cond_scale 10, top_k 256. Compares ours and min-dalle with the same weights: seconds, and peak memory of a process
    that draws once.
    """
    if args.min_dalle is None:
        print("skipped: pass the folder of min-dalle, --min-dalle")
        return []
    with tempfile.TemporaryDirectory() as files:
        return compare_mini(args, Path(files))


def compare_mini(args: argparse.Namespace, files: Path) -> list[Row]:
    rows: list[Row] = []
    programs = mini_pair(args.min_dalle, args.mini_depth, files)
    for pictures in (1, 4, 8):
        works: dict[str, Callable[[], object]] = {
            name: lambda draw=draw, n=pictures: draw(n)  # type: ignore[misc]
            for name, draw in programs.items()
        }
        found = in_turn(works, args.rounds)
        for name, taken in found.items():
            command = [sys.executable, Path(__file__).with_name("peers.py"), args.min_dalle, name]
            command += [str(args.mini_depth), str(pictures), str(files)]
            peak = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])
            rows.append({"depth": args.mini_depth, "pictures": pictures, "program": name, "seconds": taken})
            rows[-1] |= {"times as long": taken / found["ours"], "peak MB": peak}
            print(rows[-1], flush=True)
    return rows


def growth(args: argparse.Namespace) -> list[Row]:
    """How the cost of a draw and of a denoising step grows with one size while the others stay the same, with a
    transformer of 67 M parameters (dim 512, depth 12, grid 16) and the UNet of the section diffusion. exponent: that of
    the size in the time, from one row to the next. The sizes of the caches, and the number of candidates whose caches
    fit in half of the available memory, are computed. Rows that would take more than `LONGEST` seconds are not run.
    """
    text, rows = torch.zeros(TEXT, dtype=torch.int64), list[Row]()

    def add(what: str, size: int, power: int, work: Callable[[], object], about: Row) -> None:
        """power: the expected exponent, which tells whether a row is too slow to run."""
        before = rows[-1] if rows and rows[-1]["what"] == what else None
        expected = 0.0 if before is None else before.get("seconds", LONGEST) * (size / before["size"]) ** power
        row: Row = {"what": what, "size": size} | about
        if expected < LONGEST:
            row["seconds"] = min(seconds(work) for _ in range(2))
            if before is not None:
                row["exponent"] = math.log(row["seconds"] / before["seconds"], size / before["size"])
        rows.append(row)
        print(row, flush=True)

    def caches(transformer: DalleTransformer, count: int = 1) -> Row:
        most = memory_for_caches(transformer, torch.device("cpu")) // transformer.cache_bytes(1, 1)
        return {"cache MB": transformer.cache_bytes(1, min(count, 32)) / 2**20, "candidates that fit": most}

    def draw(transformer: DalleTransformer, count: int, places: int = 32) -> None:
        """The first tokens of each batch of 32 images."""
        for first in range(0, count, 32):
            batch = range(first, min(first + 32, count))
            uniforms = candidate_uniforms(0, batch, transformer.config.image_seq_len)
            for _, _, done in image_token_steps(transformer, text, uniforms, Sampling(top_k=TOP_K)):
                if done == places:
                    break

    def random(**changes: Any) -> DalleTransformer:
        torch.manual_seed(0)
        config = TransformerConfig(**(dict(zip(NAMES, (WORDS, CODES, TEXT, 512, 12), strict=True)) | changes))
        return DalleTransformer(config).half().float().eval().requires_grad_(False)

    transformer = random()
    for count in (1, 4, 16, 64, 256, 1024):
        work = lambda n=count: draw(transformer, n)  # type: ignore[misc]  # noqa: E731
        add("candidates, 32 at a time, 32 tokens", count, 1, work, caches(transformer, count))
    for depth in (6, 12, 24, 48):
        deep = random(depth=depth)
        work = lambda t=deep: draw(t, 1)  # type: ignore[misc]  # noqa: E731
        add("depth, 32 tokens", depth, 1, work, caches(deep))
    for grid in (16, 32):
        fine = random(grid_size=grid)
        work = lambda t=fine, places=grid**2: draw(t, 1, places)  # type: ignore[misc]  # noqa: E731
        add("grid, all tokens", grid, 2, work, caches(fine))
    unet = make_unets(None)[2]
    for side in (256, 512, 1024):
        x, embeds = torch.randn(1, 3, side, side), torch.randn(1, 32, side // 16, side // 16)
        work = lambda x=x, e=embeds: our_steps(unet, None, e, x, e)  # type: ignore[misc]  # noqa: E731
        add("side of the image, one step", side, 2, work, {})
    return rows


def steps(args: argparse.Namespace) -> list[Row]:
    """Seconds of a call with the bundled weights, one image of one candidate, by steps and guidance."""
    pipe, rows = Dall3Pipeline.from_pretrained(), []
    for count in (10, 25, 50):
        for scale in (0.0, 1000.0):
            how = dict(num_inference_steps=count, clip_guidance_scale=scale, seed=0, progress=False, strength=1.0)
            work = {"call": lambda how=how: pipe(PROMPT, **how)}  # type: ignore[misc]
            rows.append({"steps": count, "guided": bool(scale), "seconds": in_turn(work, args.rounds)["call"]})
            print(rows[-1], flush=True)
    return rows


def start(args: argparse.Namespace) -> list[Row]:
    """Seconds of new processes, without the interpreter's start."""
    codes = {
        "import dall3": "import dall3",
        "import torch": "import torch",
        "from dall3 import Dall3Pipeline": "from dall3 import Dall3Pipeline",
        "the bundled pipeline, after that": "pipe = Dall3Pipeline.from_pretrained()",
    }
    rows = []
    for name, code in codes.items():
        before = "from dall3 import Dall3Pipeline; " if "pipe =" in code else ""
        script = f"{before}import time; start = time.perf_counter(); {code}; print(time.perf_counter() - start)"
        runs = [
            float(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout)
            for _ in range(args.rounds + 2)
        ]
        rows.append({"what": name, "seconds": statistics.median(runs[1:])})
        print(rows[-1], flush=True)
    return rows


def memory(args: argparse.Namespace) -> list[Row]:
    """Peak memory of a process that draws and ranks candidates and keeps 8, without refinement."""
    code = (  # ru_maxrss would include the memory of this process
        "import sys; from dall3 import Dall3Pipeline; pipe = Dall3Pipeline.from_pretrained(); "
        "pipe.upsampler = None; pipe('a cube made of cloud', 8, int(sys.argv[1]), seed=0, progress=False); "
        "print(int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]) / 1024)"
    )
    rows: list[Row] = []
    for candidates in (32, 1024):
        command = [sys.executable, "-c", code, str(candidates)]
        peak = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        rows.append(
            {
                "candidates": candidates,
                "peak MB": peak,
                "of that for 32": peak / (rows or [{"peak MB": peak}])[0]["peak MB"],
            }
        )
        print(rows[-1], flush=True)
    return rows


def gpu(args: argparse.Namespace) -> list[Row]:
    """The bundled weights on the GPU: a call for one image, best of 8, with 50 guided steps, and the peak GPU memory
    for 8 of 32 and 8 of 1,024 candidates. equal tokens: the fraction equal to those of the CPU. largest difference: of
    a pixel value from that of the CPU, out of 255.
    """
    if args.device == "cpu":
        print("skipped: pass --device cuda")
        return []
    quiet: dict[str, Any] = dict(seed=0, progress=False)
    how, rows = dict(num_candidates=8) | quiet, []
    expected = Dall3Pipeline.from_pretrained()(PROMPT, **how)
    for dtype in (torch.float32, torch.float16):
        pipe = Dall3Pipeline.from_pretrained(device=args.device, dtype=dtype)
        out = pipe(PROMPT, **how)
        same = (out.tokens.cpu() == expected.tokens).float().mean().item()
        pairs = zip(out.coarse_images + out.images, expected.coarse_images + expected.images, strict=True)
        apart = max(np.abs(np.array(a, float) - np.array(b, float)).max() for a, b in pairs)
        row = {"dtype": str(dtype), "equal tokens": same, "largest difference": apart}
        row["seconds a call"] = in_turn({"call": lambda pipe=pipe: pipe(PROMPT, **how)}, args.rounds)["call"]  # type: ignore[misc]
        pipe.upsampler = None
        for candidates in (32, 1024):
            torch.cuda.reset_peak_memory_stats()
            row[f"seconds for {candidates}"] = seconds(lambda pipe=pipe, n=candidates: pipe(PROMPT, 8, n, **quiet))  # type: ignore[misc]
            row[f"peak MB for {candidates}"] = torch.cuda.max_memory_allocated() / 2**20
        rows.append(row)
        print(row, flush=True)
    return rows


def plot(rows: list[Row], path: Path) -> None:
    """Plot tokens per second of each program by batch size, at depth 12."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3), layout="constrained")
    axis = figure.subplots()
    for name in dict.fromkeys(row["program"] for row in rows):
        points = [(row["batch"], row["tokens/s"]) for row in rows if row["program"] == name and row["depth"] == 12]
        axis.plot(*zip(*points, strict=True), marker="o", label=name)
    batches = sorted({row["batch"] for row in rows})
    axis.set(xscale="log", yscale="log", xlabel="candidates at a time", ylabel="image tokens a second", xticks=batches)
    axis.set_xticklabels(map(str, batches))
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)


SECTIONS: dict[str, Callable[[argparse.Namespace], list[Row]]] = {
    section.__name__: section for section in (tokens, mini, diffusion, prompt, growth, steps, start, memory, gpu)
}
ON_A_DEVICE = ("tokens", "diffusion", "gpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--sections", help=f"default: {','.join(SECTIONS)}; with a GPU as --device: {','.join(ON_A_DEVICE)}"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 8, 32])
    parser.add_argument("--depths", type=int, nargs="+", default=[6, 12, 24])
    parser.add_argument("--upstream-dalle", type=Path, help="a clone of Jack000/DALLE-pytorch")
    parser.add_argument("--upstream-diffusion", type=Path, help="a clone of Jack000/guided-diffusion")
    parser.add_argument("--min-dalle", type=Path, help="the folder that min-dalle is installed in")
    parser.add_argument("--mini-depth", type=int, default=12, help="layers in the section mini, 12 as in DALL·E Mini")
    parser.add_argument("--out", type=Path, help="default: results/speed.json, or speed_DEVICE.json")
    parser.add_argument("--plot", type=Path, help="default: docs/speed.png")
    args = parser.parse_args()
    on_cpu = args.device == "cpu"
    sections = args.sections.split(",") if args.sections else SECTIONS if on_cpu else ON_A_DEVICE
    if unknown := set(sections) - set(SECTIONS if on_cpu else ON_A_DEVICE):
        known = ", ".join(SECTIONS if on_cpu else ON_A_DEVICE)
        parser.error(f"no section {', '.join(unknown)} for {args.device}; expected {known}")
    args.out = args.out or Path(__file__).with_name("results") / (
        "speed.json" if on_cpu else f"speed_{args.device}.json"
    )
    for name in sections:
        print(f"\n## {name}: {SECTIONS[name].__doc__}", flush=True)
        rows = SECTIONS[name](args)
        if not rows:
            continue
        results = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else {}
        about = {"threads": torch.get_num_threads(), "torch": torch.__version__, "rounds": args.rounds}
        about |= {} if on_cpu else {"device": torch.cuda.get_device_name(args.device)}
        results[name] = {"settings": about, "rows": rows}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        print(f"\n{to_markdown(rows)}", flush=True)
        if name == "tokens" and (on_cpu or args.plot):
            plot(rows, args.plot or Path(__file__).parents[1] / "docs" / "speed.png")


if __name__ == "__main__":
    main()
