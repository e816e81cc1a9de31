"""`dall3 train family`: train all parts from scratch, from one settings file and within a given time.

Each part trains in its own process, on one device or several, within its window of the time (`[family.windows]`), and
waits for the parts that it needs. If a part fails, the others continue. The state of a run is in `runs/<part>`; the
result is a pipeline folder.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from dall3.models.clip import CLIPConfig
from dall3.models.transformer import TransformerConfig
from dall3.models.unet import UNetConfig
from dall3.models.vqgan import GumbelVQ, VQGANConfig
from dall3.scenes.emoji import fetch_emoji
from dall3.scenes.render import CHUNK
from dall3.scenes.world import World
from dall3.settings import check_defaults
from dall3.text import TextEncoder, Tokenizer, load_tokenizer
from dall3.training.family.clip import CLIPLoss, CLIPPart
from dall3.training.family.loop import Part, PartTraining, fit
from dall3.training.family.pool import Pool
from dall3.training.family.transformer import TransformerLoss, TransformerPart
from dall3.training.family.upsampler import UpsamplerLoss, UpsamplerPart
from dall3.training.family.vqgan import VQGANLoss, VQGANPart
from dall3.training.tokenizer import train_tokenizer
from dall3.weights.folder import DEFAULTS, TOKENIZER, Origin, from_json, load_part, model_card
from dall3.weights.registry import read_toml

RECIPE = Path(__file__).parents[1] / "settings/mini.toml"  # recipe of the bundled weights
PARTS = ("vqgan", "upsampler", "transformer", "clip")
NEEDS_CODES = ("transformer", "upsampler")
LATE = 0.05  # fraction of the time, plus 10 seconds, that a part may take after its window to write its files
TINY: dict[str, Any] = {  # overrides of `--tiny`: networks and images that a CPU trains in seconds
    "tokenizer": {"vocab_size": 400, "captions": 200},
    "vqgan": {
        "model": {"ch_mult": [1, 1, 1], "n_embed": 64, "z_channels": 32},
        "loss": {"perceptual_weight": 0.0, "discriminator_channels": 8},
        "train": {"batch_size": 4, "side": 64, "capacity": 64, "first": 8, "chunk": 8},
    },
    "clip": {
        "model": {"embed_dim": 32, "vision_cfg": {"image_size": 64}, "text_cfg": {"width": 32, "heads": 1}},
        "train": {"batch_size": 8, "side": 64, "capacity": 64, "first": 8, "chunk": 8, "share": 1.0},
    },
    "transformer": {
        "model": {"dim": 32, "depth": 1, "heads": 1, "dim_head": 32},
        "train": {"batch_size": 4, "side": 64, "capacity": 64, "first": 8, "chunk": 8, "compile": False},
    },
    "upsampler": {
        "model": {"channel_mult": [1, 1, 1, 1, 1], "attention_levels": [4], "image_size": 128},
        "loss": {"perceptual_weight": 0.0, "discriminator_channels": 8, "crop": 64},
        "train": {"batch_size": 2, "side": 128, "capacity": 32, "first": 8, "chunk": 8, "compile": False},
    },
}


@dataclass(frozen=True)
class Job:
    """The arguments of the process of one part. start, until: its window, in seconds as `time.time()`."""

    part: str
    config: str
    out: str
    emoji: str
    device: str
    start: float
    until: float
    tiny: bool


def read_recipe(path: str | Path, tiny: bool = False) -> dict[str, Any]:
    """Read the settings of a family. Raises ValueError for missing or unknown tables."""
    recipe = read_toml(path)
    wanted = {"family", "defaults", "tokenizer", *PARTS}
    if recipe.keys() != wanted:
        raise ValueError(f"{path}: tables {', '.join(sorted(recipe))}; expected {', '.join(sorted(wanted))}")
    return laid_over(recipe, TINY) if tiny else recipe


def laid_over(settings: dict[str, Any], others: dict[str, Any]) -> dict[str, Any]:
    """Override nested settings by others."""
    found = dict(settings)
    for name, value in others.items():
        found[name] = laid_over(found.get(name, {}), value) if isinstance(value, dict) else value
    return found


def wait_for(out: Path, part: str, until: float, meanwhile: Callable[[], None] = lambda: None) -> None:
    """Wait until a part is finished, calling `meanwhile` repeatedly. Raises RuntimeError if it failed or is late."""
    while not (out / "runs" / part / "finished").exists():
        if (out / "runs" / part / "failed").exists():
            raise RuntimeError(f"{part} failed, and this part needs it")
        if time.time() > until:
            raise RuntimeError(f"{part} was not finished in time")
        meanwhile()
        time.sleep(0.2)


def mark(out: Path, part: str, what: str) -> None:
    run = out / "runs" / part
    run.mkdir(parents=True, exist_ok=True)
    (run / what).write_text("")


def make_tokenizer(recipe: dict[str, Any], out: Path, emoji: str) -> None:
    """Train the tokenizer on the recipe's captions and write it."""
    settings = dict(recipe["tokenizer"])
    world, count, kinds = World("cpu", emoji=emoji, side=16), settings.pop("captions"), settings.pop("kinds")
    text = train_tokenizer(world.plan(range(count), recipe["family"]["seed"] + 1, kinds).captions, **settings)
    new = out / f"{TOKENIZER}.new"
    new.write_text(text, encoding="utf-8")
    new.replace(out / TOKENIZER)


def make_part(job: Job, recipe: dict[str, Any], device: torch.device) -> Part:
    """Create the part with untrained weights. Parts that read text wait for the tokenizer."""
    settings, out = recipe[job.part], Path(job.out)
    model, loss = settings["model"], settings.get("loss", {})

    def tokenizer() -> Tokenizer:
        wait_for(out, "tokenizer", job.until)
        return load_tokenizer(out / TOKENIZER)

    def vqgan() -> GumbelVQ:
        return GumbelVQ(from_json(VQGANConfig, recipe["vqgan"]["model"]))

    if job.part == "vqgan":
        return VQGANPart(from_json(VQGANConfig, model), from_json(VQGANLoss, loss), device)
    if job.part == "upsampler":
        return UpsamplerPart(from_json(UNetConfig, model), from_json(UpsamplerLoss, loss), vqgan(), device)
    words = tokenizer()
    if job.part == "clip":
        vocabulary = {"vocab_size": words.vocab_size + 2}
        config = from_json(CLIPConfig, model | {"text_cfg": vocabulary | model["text_cfg"]})
        return CLIPPart(config, from_json(CLIPLoss, loss), words, device)
    numbers = {"num_text_tokens": words.vocab_size, "num_image_tokens": recipe["vqgan"]["model"]["n_embed"]}
    config = from_json(TransformerConfig, numbers | model)
    encoder = TextEncoder(words, config.text_seq_len, config.num_text_tokens)
    return TransformerPart(config, from_json(TransformerLoss, loss), vqgan(), encoder, device)


def warm_up(part: Part, settings: PartTraining, pool: Pool, device: torch.device, name: str) -> None:
    """Compile the part, if enabled, and run it on a batch, so that errors occur before its window starts."""
    count = min(settings.batch_size, 256)
    rows = part.rows(pool.world.draw(range(count), pool.seed, pool.kinds))
    places = torch.arange(settings.batch_size, device=device) % count
    rows = {name: value[places] for name, value in rows.items()}

    def once() -> None:
        for progress in (0.5, 1.0):
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                loss, _ = part(rows, progress)
            loss.backward()
            part.zero_grad(set_to_none=True)

    if settings.compile and device.type == "cuda":
        try:
            started = time.time()
            part.compile_parts()
            once()
            print(f"[{name}] compiled in {time.time() - started:.0f} s", flush=True)
            return
        except Exception as error:  # training continues without the compiler
            print(f"[{name}] not compiled: {error!r}"[:2000], flush=True)
            part.run_eagerly()
    once()


def train_part(job: Job) -> None:
    """Train one part in this process."""
    recipe, out, device = read_recipe(job.config, job.tiny), Path(job.out), torch.device(job.device)
    if job.part == "tokenizer":
        make_tokenizer(recipe, out, job.emoji)
        mark(out, "tokenizer", "finished")
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
        CHUNK["cuda"] = 512  # several parts draw on the same device
    seed, settings = recipe["family"]["seed"], from_json(PartTraining, recipe[job.part]["train"])
    if device.type == "cpu":  # small chunks are as efficient there
        settings = replace(settings, first=min(settings.first, 256), chunk=min(settings.chunk, 64))
    torch.manual_seed(seed)
    world = World(device, emoji=job.emoji, side=settings.side)
    part = make_part(job, recipe, device).to(device).to(memory_format=torch.channels_last)
    how = (settings.capacity, settings.first, settings.chunk, settings.draw_share)
    pool = Pool(world, part.rows, settings.kinds, seed, *how)
    if job.part in NEEDS_CODES:
        warm_up(part, settings, pool, device, job.part)
        print(f"[{job.part}] ready", flush=True)
        wait_for(out, "vqgan", job.until, pool.prepare)
        part.frozen[0].load_state_dict(load_part(out / "vqgan").state_dict())  # type: ignore[union-attr,index]
    torch.manual_seed(seed)
    fit(part, settings, pool, out / "runs" / job.part, out / job.part, job.until, device, job.part)


def train_family(
    config: str | Path,
    out: str | Path,
    emoji: str | Path,
    minutes: float = 600.0,
    device: str | None = None,
    resume: bool = False,
    tiny: bool = False,
    commit: str = "not stated",
) -> list[str]:
    """Train all parts of a family that are not finished, and return the names of those that failed.

    config: the recipe, such as settings/mini.toml. out: the pipeline folder to write. emoji: folder of the
    emoji, fetched with npm if it lacks them, or an archive. minutes: total time. device: such as "cuda", "cuda:1" or
    "cpu" (default: all GPUs, or the CPU).
    resume: continue the run in `out`. tiny: train very small networks. commit: of this library, for the model card.

    Raises, before any work, ValueError for settings that are unknown or out of range, and FileExistsError if `out` is
    not empty.
    """
    out, begun = Path(out), time.time()
    recipe = read_recipe(config, tiny)
    check_defaults(recipe["defaults"])
    for part in PARTS:
        from_json(PartTraining, recipe[part]["train"])
    if not resume and out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out} is not empty; resume its run, or give another folder")
    emoji = emoji if Path(emoji).is_file() else fetch_emoji(emoji)
    out.mkdir(parents=True, exist_ok=True)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    count = torch.cuda.device_count() if device == "cuda" else 1
    until = begun + 60 * minutes
    running: dict[str, subprocess.Popen[bytes]] = {}
    for number, part in enumerate(("tokenizer", *PARTS)):
        if (out / "runs" / part / "finished").exists():
            continue
        (out / "runs" / part / "failed").unlink(missing_ok=True)
        window = recipe["family"]["windows"].get(part, [0.0, 1.0])
        where = f"cuda:{(number - 1) % count}" if device == "cuda" else device
        start, end = (begun + 60 * minutes * share for share in window)
        job = Job(part, str(config), str(out), str(emoji), where, start, end, tiny)
        command = [sys.executable, "-m", "dall3.training.family", json.dumps(job.__dict__)]
        running[part] = subprocess.Popen(command)
    ends = {part: begun + 60 * minutes * recipe["family"]["windows"].get(part, [0.0, 1.0])[1] for part in running}
    failed = []
    try:
        while running:
            for part, process in list(running.items()):
                if process.poll() is None and time.time() > ends[part] + 10 + 60 * minutes * LATE:
                    print(f"[{part}] exceeded its time; stopped", flush=True)
                    process.kill()
                    process.wait()
                if process.poll() is not None:
                    del running[part]
                    if (out / "runs" / part / "finished").exists():
                        continue
                    failed.append(part)
                    # Parts that wait for it can use its last exported weights.
                    left = (out / part).exists() and time.time() < until
                    mark(out, part, "finished" if left else "failed")
                    print(
                        f"[{part}] failed ({process.returncode}); last exported weights available: {left}", flush=True
                    )
            time.sleep(0.2)
    except KeyboardInterrupt:  # the processes received the signal too, and write their files
        for process in running.values():
            process.wait()
        raise
    describe(recipe, Path(config), out, commit, minutes, device)
    return failed


def describe(recipe: dict[str, Any], config: Path, out: Path, commit: str, minutes: float, device: str) -> None:
    """Write the model card, the default settings and the provenance of the weights."""
    (out / DEFAULTS).write_text(json.dumps(recipe["defaults"], indent=2) + "\n", encoding="utf-8")
    family = {
        "recipe": config.name,
        "recipe_sha256": sha256(config.read_bytes()).hexdigest(),
        "commit": commit,
        "seed": recipe["family"]["seed"],
        "minutes": minutes,
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
    }
    (out / "family.json").write_text(json.dumps(family, indent=2) + "\n", encoding="utf-8")
    source = f"dall3 train family, recipe {family['recipe_sha256'][:12]}, commit {commit}, seed {family['seed']}"
    found = [part for part in PARTS if (out / part).is_dir()]
    origins = {part: Origin(recipe["family"]["licence"], source) for part in found}
    (out / "README.md").write_text(model_card(out, origins), encoding="utf-8")
