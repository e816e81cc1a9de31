"""`dall3 train family`: every part of a family of weights, from nothing, by one file of settings and one command.

Each part trains in a process of its own, side by side on one device or spread over several, in its window of the time
(`[family.windows]`), and waits for the parts that it needs. A part that fails costs the others nothing but what they
need of it. What a run needs to go on lies in `runs/<part>`; the finished weights are a pipeline folder.
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

RECIPE = Path(__file__).parents[1] / "settings/mini.toml"  # of the bundled weights
PARTS = ("vqgan", "upsampler", "transformer", "clip")
NEEDS_CODES = ("transformer", "upsampler")
LATE = 0.05  # of the time, and 10 seconds, that a part may take beyond its window to write what it has
TINY: dict[str, Any] = {  # what `--tiny` lays over the settings: networks and pictures that a CPU trains in seconds
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
    """What the process of one part is told. start, until: `time.time()` at its window's ends."""

    part: str
    config: str
    out: str
    emoji: str
    device: str
    start: float
    until: float
    tiny: bool


def read_recipe(path: str | Path, tiny: bool = False) -> dict[str, Any]:
    """The settings of a family. Raises ValueError for a file that lacks a part or has another."""
    recipe = read_toml(path)
    wanted = {"family", "defaults", "tokenizer", *PARTS}
    if recipe.keys() != wanted:
        raise ValueError(f"{path}: tables {', '.join(sorted(recipe))}; expected {', '.join(sorted(wanted))}")
    return laid_over(recipe, TINY) if tiny else recipe


def laid_over(settings: dict[str, Any], others: dict[str, Any]) -> dict[str, Any]:
    """The settings with others in place of theirs, table by table."""
    found = dict(settings)
    for name, value in others.items():
        found[name] = laid_over(found.get(name, {}), value) if isinstance(value, dict) else value
    return found


def wait_for(out: Path, part: str, until: float, meanwhile: Callable[[], None] = lambda: None) -> None:
    """Raises RuntimeError where the part failed or does not come in time."""
    while not (out / "runs" / part / "finished").exists():
        if (out / "runs" / part / "failed").exists():
            raise RuntimeError(f"there is no {part} to go on with")
        if time.time() > until:
            raise RuntimeError(f"{part} did not come in time")
        meanwhile()
        time.sleep(0.2)


def mark(out: Path, part: str, what: str) -> None:
    run = out / "runs" / part
    run.mkdir(parents=True, exist_ok=True)
    (run / what).write_text("")


def make_tokenizer(recipe: dict[str, Any], out: Path, emoji: str) -> None:
    """The tokenizer of the captions that the recipe names."""
    settings = dict(recipe["tokenizer"])
    world, count, kinds = World("cpu", emoji=emoji, side=16), settings.pop("captions"), settings.pop("kinds")
    text = train_tokenizer(world.plan(range(count), recipe["family"]["seed"] + 1, kinds).captions, **settings)
    new = out / f"{TOKENIZER}.new"
    new.write_text(text, encoding="utf-8")
    new.replace(out / TOKENIZER)


def make_part(job: Job, recipe: dict[str, Any], device: torch.device) -> Part:
    """The part with untrained weights; where it reads text, once the tokenizer is there."""
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
    """Compile the part where its settings say so, and try it on a batch: what can fail fails before its window."""
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
        except Exception as error:  # without the compiler it is slower, no more
            print(f"[{name}] not compiled: {error!r}"[:2000], flush=True)
            part.run_eagerly()
    once()


def train_part(job: Job) -> None:
    """One part, in this process."""
    recipe, out, device = read_recipe(job.config, job.tiny), Path(job.out), torch.device(job.device)
    if job.part == "tokenizer":
        make_tokenizer(recipe, out, job.emoji)
        mark(out, "tokenizer", "finished")
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
        CHUNK["cuda"] = 512  # several parts draw on one device
    seed, settings = recipe["family"]["seed"], from_json(PartTraining, recipe[job.part]["train"])
    if device.type == "cpu":  # which draws a few pictures as fast as many
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
    """Make every part of a family that is not finished yet, and return the names of those that failed.

    config: the recipe, such as settings/mini.toml. emoji: their folder or archive. minutes: all the time there is.
    resume: go on with what `out` holds. commit: of this library, for the model card.

    Raises ValueError for settings that are unknown or out of range, and FileExistsError for a folder that holds
    something, before any work.
    """
    out, begun = Path(out), time.time()
    recipe = read_recipe(config, tiny)
    check_defaults(recipe["defaults"])
    for part in PARTS:
        from_json(PartTraining, recipe[part]["train"])
    if not resume and out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out} holds something already; resume it, or give another folder")
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
                    print(f"[{part}] too late; stopped", flush=True)
                    process.kill()
                    process.wait()
                if process.poll() is not None:
                    del running[part]
                    if (out / "runs" / part / "finished").exists():
                        continue
                    failed.append(part)
                    # What its last checkpoint left is better than nothing for those that wait for it.
                    left = (out / part).exists() and time.time() < until
                    mark(out, part, "finished" if left else "failed")
                    print(f"[{part}] failed ({process.returncode}); its last checkpoint goes on: {left}", flush=True)
            time.sleep(0.2)
    except KeyboardInterrupt:  # the processes were told as well, and write what they have
        for process in running.values():
            process.wait()
        raise
    describe(recipe, Path(config), out, commit, minutes, device)
    return failed


def describe(recipe: dict[str, Any], config: Path, out: Path, commit: str, minutes: float, device: str) -> None:
    """The model card, the settings that suit the weights, and where they come from."""
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
