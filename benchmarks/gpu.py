"""Measure dall3 on a GPU with random weights of the published networks' sizes: python benchmarks/gpu.py

Every row is written to results/gpu.json as soon as it is measured, so the program can be stopped at any time. A row
that fails is written with its error. On a GPU each group of rows runs in a process of its own. Figures are medians of
three runs after a warm-up run, in which steps are captured or compiled; a row whose warm-up takes more than 25 seconds
is run once more only. Nothing is downloaded. With --device cpu --tiny, networks of a few thousand weights show that
every row works.

Columns: seconds, for the whole draw or call, or of one denoising step; goal in seconds; bound, the seconds in which the
hardware reads the weights once a token, or multiplies; kernels a step, by torch.profiler (on a CPU, PyTorch operators).
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from dall3 import Dall3Pipeline
from dall3.diffusion import captured
from dall3.diffusion.captured import unet_predict
from dall3.diffusion.denoising import Denoising, denoising_steps
from dall3.diffusion.guidance import add_gradient, clip_loss, guided
from dall3.diffusion.schedule import GaussianDiffusion
from dall3.loading import encoder_for
from dall3.models.clip import CLIP, CLIPConfig
from dall3.models.dalle_mini import DalleMini, DalleMiniConfig
from dall3.models.interface import ImageTokenTransformer
from dall3.models.layout import set_memory_layout
from dall3.models.rudalle import Rudalle, RudalleConfig
from dall3.models.transformer import DalleTransformer, TransformerConfig
from dall3.models.unet import UNet, UNetConfig
from dall3.models.vqgan import GumbelVQ, VQGANConfig, VQModel
from dall3.tokens import decoding
from dall3.tokens.batching import batches_that_fit
from dall3.tokens.decoding import draw_image_tokens, image_token_steps
from dall3.tokens.sampling import Sampling
from dall3.tokens.seeds import candidate_uniforms, make_generator

RUNS, LONG = 3, 25.0  # runs of a row; seconds of a warm-up run after which there is only one
STEPS, TINY_STEPS = 8, 2  # denoising steps of a run
PROFILED = 8  # token steps that the profiler sees
GOALS = {
    "67 M, 1 image": 0.10,
    "67 M, 8 images": 0.12,
    "67 M, 64 images": 0.35,
    "Mega, 1 image, guided": 0.45,
    "Mega, 8 images, guided": 0.6,
    "ruDALL-E, 1 image": 1.6,
    "UNet, 1 image, unguided step": 0.009,
    "UNet, 1 image, guided step": 0.025,
    "one call: best 4 of 32, 25 guided steps": 4.0,
    "Mega, best 8 of 1,024": 60.0,
}
Row = dict[str, Any]


class Bench:
    """Options, the networks by name, and the rows so far."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.device, self.tiny, self.out = torch.device(args.device), args.tiny, Path(args.out)
        self.dtype = getattr(torch, args.dtype)
        self.on_gpu = self.device.type == "cuda"

    def make(self, kind: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A network with random weights, made on the device."""
        torch.manual_seed(0)
        with self.device:
            network = kind(*args, **kwargs)
        return network.to(self.device, self.dtype).eval().requires_grad_(False)

    def dalle(self) -> DalleTransformer:
        sizes = (90, 64, 8, 32, 2, 2, 16, 4) if self.tiny else (8192, 8192, 80, 512, 12, 8, 64, 16)
        return self.make(DalleTransformer, TransformerConfig(*sizes))

    def mega(self) -> DalleMini:
        sizes = (90, 64, 8, 64, 64, 1, 2, 4) if self.tiny else (50272, 16384, 64, 2048, 4096, 24, 24, 16)
        return self.make(DalleMini, DalleMiniConfig(*sizes))

    def rudalle(self) -> Rudalle:
        sizes = (90, 64, 8, 32, 2, 2, 4) if self.tiny else (16384, 8192, 128, 2048, 24, 16, 32)
        return self.make(Rudalle, RudalleConfig(*sizes))

    def unet(self) -> UNet:
        if self.tiny:
            config = UNetConfig(32, (1, 2), 1, (1,), 16, num_heads=2, embedding_dims=(8, 32))
        else:
            heads: dict[str, Any] = dict(num_head_channels=64, embedding_dims=(256, 256))
            config = UNetConfig(256, (1, 1, 2, 2, 4, 4), 2, (3, 4, 5), 256, **heads)
        unet = self.make(UNet, config)
        set_memory_layout(unet)
        return unet

    def clip(self) -> CLIP:
        """ViT-B/16."""
        vision: dict[str, Any] = dict(image_size=224, patch_size=16, width=768, head_width=64, layers=12)
        text: dict[str, Any] = dict(context_length=77, vocab_size=49408, width=512, heads=8, layers=12)
        if self.tiny:
            vision |= dict(image_size=16, patch_size=8, width=32, head_width=16, layers=1)
            text |= dict(width=32, heads=2, layers=1)
        config = CLIPConfig(32 if self.tiny else 512, vision, text, quick_gelu=True, tokenizer="clip")
        clip = self.make(CLIP.from_config, config)
        set_memory_layout(clip)
        return clip

    def vqgan(self, mega: bool = False) -> VQModel:
        """Upstream's of 8 pixels a code, or Mega's of 16."""
        if self.tiny:
            config = VQGANConfig(32, (1, 1), 1, (), 32, 8, 64, has_encoder=not mega, unit_range=mega)
        elif mega:
            config = VQGANConfig(128, (1, 1, 2, 2, 4), 2, (4,), 256, 256, 16384, has_encoder=False, unit_range=True)
        else:
            config = VQGANConfig(128, (1, 1, 2, 4), 2, (3,), 256, 256, 8192)
        return self.make(VQModel if mega else GumbelVQ, config)

    def pipeline(
        self, transformer: ImageTokenTransformer[Any], mega: bool = False, refine: bool = True
    ) -> Dall3Pipeline:
        parts: dict[str, Any] = dict(
            vqgan=self.vqgan(mega), clip=self.clip(), upsampler=self.unet() if refine else None
        )
        return Dall3Pipeline(text_encoder=encoder_for(transformer, Letters()), transformer=transformer, **parts).to(
            self.device
        )  # type: ignore[arg-type]

    def synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def seconds(self, work: Callable[[], object]) -> float:
        self.synchronize()
        start = time.perf_counter()
        work()
        self.synchronize()
        return time.perf_counter() - start

    def measure(self, name: str, work: Callable[[], object], each: int = 1, **more: Any) -> None:
        """Measure `work`, which repeats its task `each` times, and write a row. more: further columns."""
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        first = self.seconds(work)
        runs = [self.seconds(work) / each for _ in range(1 if first > LONG else RUNS)]
        row = {"row": name, "seconds": statistics.median(runs), "goal": None if self.tiny else GOALS.get(name)}
        row |= more | ({"share of the bound": more["bound"] / row["seconds"]} if "bound" in more else {})
        row |= {"first": first, "runs": runs}
        if self.on_gpu:
            row["peak GB"] = torch.cuda.max_memory_allocated() / 1e9
        self.write(row)

    def read(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.out.read_text(encoding="utf-8")) if self.out.exists() else {}
        return found

    def find(self, name: str) -> Row:
        rows: list[Row] = self.read().get("rows", [])
        return next((row for row in rows if row["row"] == name), {})

    def write(self, row: Row) -> None:
        """Add a row to the file; it replaces an earlier one of the same name."""
        print(format_row(row), flush=True)
        results = self.read()
        about = {"torch": torch.__version__, "dtype": str(self.dtype).removeprefix("torch."), "runs": RUNS}
        about["device"] = torch.cuda.get_device_name() if self.on_gpu else f"CPU, {torch.get_num_threads()} threads"
        about |= {"networks": "tiny"} if self.tiny else {}
        rows = [old for old in results.get("rows", []) if old["row"] != row["row"]]
        self.out.parent.mkdir(parents=True, exist_ok=True)
        new = self.out.with_suffix(".new")
        new.write_text(json.dumps({"settings": about, "rows": [*rows, row]}, indent=2) + "\n", encoding="utf-8")
        new.replace(self.out)  # the file is always complete

    @contextmanager
    def row(self, name: str) -> Iterator[None]:
        """Write an exception in the `with` block as the result of the row, and continue."""
        try:
            yield
        except Exception as error:
            self.write({"row": name, "error": f"{type(error).__name__}: {error}".splitlines()[0][:300]})
            if self.on_gpu:
                torch.cuda.empty_cache()


class Letters:
    """A tokenizer for random weights: an id for each English and Russian letter."""

    alphabet = " abcdefghijklmnopqrstuvwxyzабвгдеёжзийклмнопрстуфхцчшщъыьэюя"
    vocab_size = 4 + len(alphabet)

    def encode(self, text: str) -> list[int]:
        return [4 + self.alphabet.index(letter) for letter in text.lower() if letter in self.alphabet]

    def decode(self, ids: Any) -> str:
        return "".join(self.alphabet[int(i) - 4] for i in ids if i > 3)


def bounds(bench: Bench) -> None:
    """Throughput of the hardware: a product of two matrices of 8192 rows, and a copy of a large tensor."""
    side, dtype = (256 if bench.tiny else 8192), bench.dtype
    with bench.row("arithmetic"):
        a, b = torch.randn(2, side, side, device=bench.device).to(dtype)
        taken = [bench.seconds(lambda: a @ b) for _ in range(10)][2:]
        bench.write({"row": "arithmetic", "seconds": min(taken), "TFLOP/s": 2 * side**3 / min(taken) / 1e12})
    with bench.row("memory"):
        block = torch.ones((2**20 if bench.tiny else 2**31), device=bench.device, dtype=torch.bfloat16)
        other = torch.empty_like(block)
        taken = [bench.seconds(lambda: other.copy_(block)) for _ in range(10)][2:]
        bench.write({"row": "memory", "seconds": min(taken), "GB/s": 4 * block.numel() / min(taken) / 1e9})


def read_a_step(transformer: ImageTokenTransformer[Any]) -> int:
    """Bytes of the weights that a token step reads."""
    layers = {id(m): m for m in transformer.decoder.modules() if isinstance(m, nn.Linear)}
    if isinstance(transformer, DalleMini):  # the text's keys and values are computed once
        for layer in transformer.image_decoder.layers:
            for once in (layer.encoder_attn.k_proj, layer.encoder_attn.v_proj):
                del layers[id(once)]
    weights = sum(layer.weight.numel() for layer in layers.values()) + transformer.head[0].numel()
    return weights * transformer.head[0].element_size()


def kernels(bench: Bench, steps: Iterator[Any], skip: int) -> float:
    """Kernels that the device runs for each of PROFILED steps, after `skip` others; on a CPU, operators."""
    count = min(PROFILED, skip)
    for _ in range(skip):
        next(steps)
    bench.synchronize()
    if not bench.on_gpu:
        with CountOperators() as counter:
            for _ in range(count):
                next(steps)
        return counter.count / count
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(count):
            next(steps)
        bench.synchronize()
    on_device = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return len([event for event in on_device if not event.name.startswith(("Memcpy", "Memset"))]) / count


class CountOperators(TorchDispatchMode):
    """Counts PyTorch operators, and the floating point operations of products, convolutions and attention."""

    count = operations = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        self.count += 1
        if function._overloadpacket in flop_registry:
            self.operations += flop_registry[function._overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


def draw_rows(
    bench: Bench, label: str, transformer: ImageTokenTransformer[Any], sampling: Sampling, counts: dict[str, int]
) -> None:
    """Rows of whole draws, by the number of images."""
    config, read = transformer.config, read_a_step(transformer)
    if sampling.quantize == "int8":
        read //= transformer.head[0].element_size()
    text = torch.full((config.text_seq_len,), 5, device=bench.device)
    bandwidth = bench.find("memory").get("GB/s")
    for name, count in counts.items():
        uniforms = candidate_uniforms(0, range(count), config.image_seq_len).to(bench.device)
        with bench.row(f"{label}, {name}"):
            more: Row = {"bound": read * config.image_seq_len / bandwidth / 1e9} if bandwidth else {}
            work = lambda uniforms=uniforms: draw_image_tokens(transformer, text, uniforms, sampling)  # noqa: E731
            work()
            if (
                bench.on_gpu or transformer.compile_options is None
            ):  # on a CPU, counting and compiling exclude each other
                steps = image_token_steps(transformer, text, uniforms, sampling)
                more["kernels a step"] = kernels(bench, steps, config.image_seq_len // 2)
                del steps
            bench.measure(f"{label}, {name}", work, **more)


TOP_K = Sampling(top_k=0.9)


def dalle(bench: Bench) -> None:
    """256 tokens of the 67 M transformer (dim 512, 12 layers)."""
    draw_rows(bench, "67 M", bench.dalle(), TOP_K, {"1 image": 1, "8 images": 8, "64 images": 64})


def dalle_without_graphs(bench: Bench) -> None:
    """The same, kernels launched one by one."""
    decoding.GRAPHED_ROWS = 0
    draw_rows(bench, "67 M, launched one by one", bench.dalle(), TOP_K, {"1 image": 1})


def dalle_compiled(bench: Bench) -> None:
    """The same, compiled and then captured."""
    transformer = bench.dalle()
    transformer.compile(**({} if bench.on_gpu else {"backend": "eager"}))
    draw_rows(bench, "67 M, compiled", transformer, TOP_K, {"1 image": 1, "8 images": 8})


def dalle_combined(bench: Bench) -> None:
    """The same, compiled with independent kernels combined (an experiment of inductor's)."""
    transformer = bench.dalle()
    transformer.compile(**({"options": {"combo_kernels": True}} if bench.on_gpu else {"backend": "eager"}))
    draw_rows(bench, "67 M, compiled with combo_kernels", transformer, TOP_K, {"1 image": 1})


MEGA = Sampling(top_k=16, cond_scale=10.0)


def mega(bench: Bench) -> None:
    """256 tokens of DALL·E Mega's shape with a guidance scale of 10."""
    draw_rows(bench, "Mega", bench.mega(), MEGA, {"1 image, guided": 1, "8 images, guided": 8})


def mega_compiled(bench: Bench) -> None:
    """The same, compiled and then captured."""
    transformer = bench.mega()
    transformer.compile(**({} if bench.on_gpu else {"backend": "eager"}))
    draw_rows(bench, "Mega, compiled", transformer, MEGA, {"1 image, guided": 1})


def int8_compiled(bench: Bench) -> None:
    """Both with 8-bit weights by torchao, compiled and then captured; on a CPU not compiled."""
    networks = {"67 M": (bench.dalle, TOP_K, "1 image"), "Mega": (bench.mega, MEGA, "1 image, guided")}
    for label, (make, sampling, name) in networks.items():
        with bench.row(f"{label}, int8, compiled"):
            transformer = make()
            if bench.on_gpu:
                transformer.compile(mode="max-autotune-no-cudagraphs")
            draw_rows(bench, f"{label}, int8, compiled", transformer, replace(sampling, quantize="int8"), {name: 1})


def rudalle(bench: Bench) -> None:
    """1,024 tokens of ruDALL-E's shape."""
    draw_rows(bench, "ruDALL-E", bench.rudalle(), Sampling(top_k=32, top_p=0.9), {"1 image": 1})


class Refinement:
    """Denoising of `count` images with random code embeddings, guided if there is a CLIP."""

    def __init__(self, bench: Bench, unet: UNet, clip: CLIP | None, count: int) -> None:
        self.bench, self.unet, self.clip = bench, unet, clip
        self.side, self.count, self.batch = unet.config.image_size, count, count
        self.steps = TINY_STEPS if bench.tiny else STEPS
        dims, side = unet.config.embedding_dims, 2 * self.side // unet.config.downsampling
        assert dims is not None
        self.embeds = torch.randn(count, dims[0], side, side, device=bench.device).to(bench.dtype)
        self.loss = None
        if clip is not None:
            target = torch.randn(1, clip.embed_text(["a cube"]).shape[1], device=bench.device)
            weights = torch.ones(1, device=bench.device)
            cutouts = make_generator(bench.device, 0, "cutouts")
            self.loss = clip_loss(clip, target, weights, 1000.0, 16, cutouts)

    @torch.no_grad()
    def run(self) -> None:
        """`steps` steps of every image, in batches that fit; `batch` is then the size of a batch."""

        def guide(predict: Any, diffusion: GaussianDiffusion, lowest: float) -> Any:
            assert self.loss is not None
            return guided(predict, diffusion, lowest, self.loss)

        def work(batch: range) -> Iterator[Any]:
            generators = [make_generator(self.bench.device, 0, "noise", k) for k in batch]
            part = {"image_embeds": self.embeds[batch.start : batch.stop]}
            shape, how = (3, self.side, self.side), Denoising(self.steps)
            return denoising_steps(self.unet, shape, generators, part, how, None, guide if self.loss else None)

        for batch, _ in batches_that_fit(self.count, self.batch, work):
            self.batch = min(self.batch, len(batch)) if batch.start == 0 else self.batch

    @torch.no_grad()
    def operations(self) -> int:
        """Floating point operations of a step of one image."""
        diffusion, x = GaussianDiffusion(self.unet.config.diffusion), torch.randn(1, 3, self.side, self.side)
        x = x.to(self.bench.device)
        predict = unet_predict(self.unet, diffusion, {"image_embeds": self.embeds[:1]})
        # Counting and compiling exclude each other.
        with torch.compiler.set_stance("force_eager"), CountOperators() as counter:
            if self.loss is None:
                predict(x, 500)
            else:
                add_gradient(predict, diffusion, self.loss, x, 500)
        return counter.operations


def unet_rows(bench: Bench, label: str, unet: UNet, clip: CLIP | None, count: int) -> None:
    kind = "guided" if clip is not None else "unguided"
    name = f"{label}, {count} image{'s' * (count > 1)}, {kind} step"
    with bench.row(name):
        refinement = Refinement(bench, unet, clip, count)
        operations, reached = refinement.operations() * count, bench.find("arithmetic").get("TFLOP/s")
        refinement.run()
        more: Row = {"batch": refinement.batch, "TFLOP a step": operations / 1e12}
        more |= {"bound": operations / reached / 1e12} if reached else {}
        bench.measure(name, refinement.run, refinement.steps, **more)


def unet(bench: Bench) -> None:
    """A denoising step of upstream's UNet of 256 px. bound: its operations at the speed of the row "arithmetic"."""
    network = bench.unet()
    millions = sum(parameter.numel() for parameter in network.parameters()) / 1e6
    print(f"UNet of {millions:.0f} M parameters", flush=True)
    for count in (1, 16):
        unet_rows(bench, "UNet", network, None, count)
    clip = bench.clip()
    for count in (1, 16):
        unet_rows(bench, "UNet", network, clip, count)


def unet_without_graphs(bench: Bench) -> None:
    """The same, kernels launched one by one."""
    captured.CapturedPredict.__call__ = lambda self, x, i: self.predict(x, i)  # type: ignore[method-assign]
    network = bench.unet()
    unet_rows(bench, "UNet, launched one by one", network, None, 1)
    unet_rows(bench, "UNet, launched one by one", network, bench.clip(), 1)


def unet_compiled(bench: Bench) -> None:
    """The same, compiled and then captured."""
    network = bench.unet()
    network.compile(**({} if bench.on_gpu else {"backend": "eager"}))
    unet_rows(bench, "UNet, compiled", network, None, 1)
    unet_rows(bench, "UNet, compiled", network, None, 16)


def one_call(bench: Bench) -> None:
    """The whole call at upstream's sizes: 32 candidates, ranked by CLIP; the best four refined in 25 guided steps."""
    name = "one call: best 4 of 32, 25 guided steps"
    with bench.row(name):
        pipe = bench.pipeline(bench.dalle())
        how: dict[str, Any] = dict(seed=0, progress=False, truncate=True, top_k=0.9)
        how["num_inference_steps"] = 2 if bench.tiny else 25
        bench.measure(name, lambda: pipe("a cube made of cloud", 4, 32, **how))


def bundled(bench: Bench) -> None:
    """The bundled weights: best of 8, with their default settings."""
    name = "bundled weights: best of 8"
    with bench.row(name):
        import dall3

        if not (Path(dall3.__file__).parent / "mini").exists():
            bench.write(
                {"row": name, "error": "skipped: src/dall3/mini, the folder of the bundled weights, does not exist"}
            )
            return
        pipe = Dall3Pipeline.from_pretrained(device=bench.device, dtype=bench.dtype)
        how: dict[str, Any] = dict(num_inference_steps=1, clip_guidance_scale=0) if bench.tiny else {}
        count = 1 if bench.tiny else 8
        bench.measure(name, lambda: pipe("a cube made of cloud", 1, count, seed=0, progress=False, **how))


def mega_best(bench: Bench) -> None:
    """1,024 candidates of Mega's shape with a guidance scale of 10, decoded and ranked by CLIP; not refined."""
    name = "Mega, best 8 of 1,024"
    with bench.row(name):
        pipe = bench.pipeline(bench.mega(), mega=True, refine=False)
        how: dict[str, Any] = dict(seed=0, progress=False, truncate=True, top_k=16, cond_scale=10.0)
        candidates = 16 if bench.tiny else 1024
        taken = bench.seconds(
            lambda: pipe("a cube made of cloud", 8, candidates, **how)
        )  # a single run, because it takes long
        bench.write({"row": name, "seconds": taken, "goal": None if bench.tiny else GOALS[name], "runs": [taken]})


# In order of importance, with the most seconds that each may take.
GROUPS: dict[Callable[[Bench], None], int] = {
    bounds: 40,
    dalle: 60,
    mega: 70,
    rudalle: 60,
    unet: 120,
    one_call: 70,
    dalle_compiled: 150,
    mega_best: 150,
    dalle_without_graphs: 40,
    unet_without_graphs: 50,
    bundled: 50,
    unet_compiled: 200,
    mega_compiled: 150,
    dalle_combined: 120,
    int8_compiled: 200,
}
COLUMNS = ("row", "seconds", "goal", "bound", "share of the bound", "kernels a step", "batch", "peak GB")


def format_row(row: Row) -> str:
    cells = [f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in row.items()]
    return "; ".join(cell for cell in cells if not cell.endswith(" None"))


def table(rows: list[Row]) -> str:
    """Rows as a Markdown table of COLUMNS, with errors in place of seconds."""
    lines = [COLUMNS, ("---",) * len(COLUMNS)]
    for row in rows:
        row = row | ({"seconds": row["error"]} if "error" in row else {})
        cells = [row.get(name) for name in COLUMNS]
        lines.append(tuple("" if c is None else f"{c:.4g}" if isinstance(c, float) else str(c) for c in cells))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    by_name = {group.__name__: group for group in GROUPS}
    parser.add_argument("--groups", help=f"default: {','.join(by_name)}")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", help="default: bfloat16, on a CPU float32")
    parser.add_argument("--tiny", action="store_true", help="tiny networks")
    parser.add_argument("--seconds", type=float, default=math.inf, help="stop after this many seconds")
    parser.add_argument("--out", default=str(Path(__file__).with_name("results") / "gpu.json"))
    parser.add_argument("--here", action="store_true", help="run in this process, instead of one process per group")
    args = parser.parse_args()
    args.dtype = args.dtype or ("float32" if args.device == "cpu" else "bfloat16")
    names = args.groups.split(",") if args.groups else [*by_name]
    if unknown := sorted({*names} - {*by_name}):
        parser.error(f"no group {', '.join(unknown)}; expected {', '.join(by_name)}")
    bench, begun = Bench(args), time.monotonic()
    options = ["--device", args.device, "--dtype", args.dtype, "--out", args.out, "--here", *["--tiny"] * args.tiny]
    for name in names:
        print(f"\n## {name}: {by_name[name].__doc__}", flush=True)
        if args.here or args.device == "cpu":
            by_name[name](bench)
            continue
        left = args.seconds - (time.monotonic() - begun)
        limit = min(left, GROUPS[by_name[name]])
        if limit < 10:
            bench.write({"row": name, "error": "skipped: no time left"})
            continue
        try:
            code = subprocess.run([sys.executable, __file__, "--groups", name, *options], timeout=limit).returncode
        except subprocess.TimeoutExpired:
            bench.write({"row": name, "error": f"stopped after {limit:.0f} s"})
            continue
        if code:
            bench.write({"row": name, "error": f"the process ended with code {code}"})
    if not args.here:
        print(f"\n{table(bench.read().get('rows', []))}", flush=True)


if __name__ == "__main__":
    main()
