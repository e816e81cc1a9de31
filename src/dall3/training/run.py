"""`dall3 train`: train one part of a pipeline folder.

The parts are tokenizer, vqgan, transformer, clip and upsampler, in this order. Settings come from a TOML file, earlier
parts from the folder. The state of a run is in `runs/<model>`.
"""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from dall3.models.clip import CLIP, CLIPConfig
from dall3.models.transformer import TransformerConfig
from dall3.models.unet import UNetConfig
from dall3.models.vqgan import VQGANConfig, VQModel
from dall3.text import TextEncoder, Tokenizer, load_tokenizer
from dall3.training.clip import CLIPTask, CLIPTraining
from dall3.training.data import Mixture
from dall3.training.loop import Task, TrainingConfig, train
from dall3.training.tokenizer import draw_captions, train_tokenizer
from dall3.training.transformer import TransformerTask, TransformerTraining
from dall3.training.upsampler import UpsamplerTask, UpsamplerTraining
from dall3.training.vqgan import VQGANTask, VQGANTraining
from dall3.weights.folder import TOKENIZER, from_json, load_part
from dall3.weights.registry import read_toml

SETTINGS = Path(__file__).parent / "settings"  # settings of the bundled weights


def make_vqgan(model: dict[str, Any], loss: dict[str, Any], folder: Path) -> Task:
    training = from_json(VQGANTraining, loss)
    clip = need_clip(folder) if training.perceptual_weight else None
    return VQGANTask(from_json(VQGANConfig, model), training, clip)


def make_transformer(model: dict[str, Any], loss: dict[str, Any], folder: Path) -> Task:
    vqgan, tokenizer = need_vqgan(folder), need_tokenizer(folder)
    words = {"num_text_tokens": tokenizer.vocab_size, "num_image_tokens": vqgan.num_tokens}
    config = from_json(TransformerConfig, words | model)
    encoder = TextEncoder(tokenizer, config.text_seq_len, config.num_text_tokens)
    return TransformerTask(config, from_json(TransformerTraining, loss), vqgan, encoder)


def make_clip(model: dict[str, Any], loss: dict[str, Any], folder: Path) -> Task:
    tokenizer = need_tokenizer(folder)
    vocabulary = {"vocab_size": tokenizer.vocab_size + 2}
    config = from_json(CLIPConfig, model | {"text_cfg": vocabulary | model["text_cfg"]})
    vqgan = need_vqgan(folder) if (folder / "vqgan").is_dir() else None
    return CLIPTask(config, from_json(CLIPTraining, loss), tokenizer, vqgan)


def make_upsampler(model: dict[str, Any], loss: dict[str, Any], folder: Path) -> Task:
    training = from_json(UpsamplerTraining, loss)
    clip = need_clip(folder) if training.perceptual_weight else None
    return UpsamplerTask(from_json(UNetConfig, model), training, need_vqgan(folder), clip)


MAKERS: dict[str, Callable[[dict[str, Any], dict[str, Any], Path], Task]] = {
    "vqgan": make_vqgan,
    "transformer": make_transformer,
    "clip": make_clip,
    "upsampler": make_upsampler,
}
TRAINABLE = ("tokenizer", *MAKERS)


def need_vqgan(folder: Path) -> VQModel:
    if not (folder / "vqgan").is_dir():
        raise ValueError(f"{folder} holds no vqgan, which this part needs; run `dall3 train vqgan` first")
    return load_part(folder / "vqgan")


def need_clip(folder: Path) -> CLIP:
    if not (folder / "clip").is_dir():
        raise ValueError(f"{folder} holds no clip, which perceptual_weight needs; run `dall3 train clip` first")
    return load_part(folder / "clip", need_tokenizer(folder))


def need_tokenizer(folder: Path) -> Tokenizer:
    if not (folder / TOKENIZER).exists():
        raise ValueError(f"{folder} holds no {TOKENIZER}; run `dall3 train tokenizer` on the same data first")
    return load_tokenizer(folder / TOKENIZER)


def check_libraries() -> None:
    """Raise ModuleNotFoundError if a library of the extra "train" is missing."""
    for name in ("accelerate", "matplotlib", "vector_quantize_pytorch"):
        if find_spec(name) is None:
            raise ModuleNotFoundError(f"training needs {name}; run pip install 'dall3[train]'", name=name)


def join_processes() -> bool:
    """Initialize the process group of a launcher. Returns whether this is the main process.

    Called before the model is created, because some modules depend on the number of processes. The timeout is long
    enough for encoding a pool of codes.
    """
    from accelerate import PartialState

    on_cpu = not torch.accelerator.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
    state = PartialState(cpu=on_cpu, timeout=timedelta(hours=12))
    atexit.register(state.destroy_process_group)  # its threads may abort the process at exit
    return bool(state.is_main_process)


def look_at(data: Mixture, progress: bool) -> Mixture:
    """Print what the data contains and anything unusual. Raises ValueError if it cannot be read."""
    lines = data.look()
    if progress:
        print("\n".join(lines), file=sys.stderr)
    return data


def read_settings(path: str | Path) -> dict[str, dict[str, Any]]:
    """Read the tables [model], [loss] and [train] of a TOML file. Raises ValueError for other content."""
    found = read_toml(path)
    unknown = found.keys() - {"model", "loss", "train"}
    if unknown or not all(isinstance(table, dict) for table in found.values()):
        raise ValueError(f"{path}: {', '.join(sorted(unknown)) or 'a value'}; expected tables model, loss and train")
    return {name: found.get(name, {}) for name in ("model", "loss", "train")}


def train_model(
    model: str,
    folder: str | Path,
    config: str | Path | None = None,
    data: Sequence[str] = (),
    resume: bool = False,
    initial: str | Path | None = None,
    progress: bool = True,
    **overrides: Any,
) -> None:
    """Train one part of a pipeline folder.

    model: "tokenizer", "vqgan", "transformer", "clip" or "upsampler".
    folder: the pipeline folder; earlier parts are read from it.
    config: a TOML file (default: the settings of the bundled weights).
    data: sources as in `Mixture`, in place of those of the settings.
    resume: continue from the checkpoint in the folder.
    initial: folder of a trained part of the same configuration, whose weights initialize the model.
    progress: show a progress bar, and print a summary of the data to stderr before the first step.
    overrides: fields of `TrainingConfig`.

    Raises, before any work, ValueError for settings that are unknown or out of range, missing parts, and data that is
    missing or unreadable; FileExistsError for an existing run or part; ModuleNotFoundError for a missing library.
    """
    if model not in TRAINABLE:
        raise ValueError(f"model '{model}' is not known; expected one of {', '.join(TRAINABLE)}")
    folder, path = Path(folder), Path(config or SETTINGS / f"{model}.toml")
    run, target = folder / "runs" / model, folder / (TOKENIZER if model == "tokenizer" else model)
    if not resume:
        if (run / "checkpoint.pt").exists():
            raise FileExistsError(f"{run} holds a run already; resume it, or give another folder")
        if target.exists():
            raise FileExistsError(f"{target} exists already, and later parts depend on it; give another folder")
    settings = read_settings(path)
    if model != "tokenizer":
        check_libraries()
    try:
        training = from_json(TrainingConfig, settings["train"])
        training = replace(training, **({"data": tuple(data)} if data else {}), **overrides)
        if training.initial_share and initial is None:
            raise ValueError(f"initial_share={training.initial_share} needs initial, the folder of a trained part")
        if model == "tokenizer":
            captions = draw_captions(look_at(Mixture(training.data, 16), progress), training.steps)
            text = train_tokenizer(captions, **settings["model"])
            folder.mkdir(parents=True, exist_ok=True)
            target.write_text(text, encoding="utf-8")
            return
        if join_processes():
            look_at(Mixture(training.data, training.side, training.seed), progress)
        with torch.random.fork_rng():
            torch.manual_seed(training.seed)
            task = MAKERS[model](settings["model"], settings["loss"], folder)
    except (TypeError, KeyError) as error:
        raise ValueError(f"{path}: {error}") from None
    if initial is not None:
        tokenizer = load_tokenizer(folder / TOKENIZER) if (folder / TOKENIZER).exists() else None
        task.start_from(load_part(initial, tokenizer))
    train(task, training, run, target, progress)
