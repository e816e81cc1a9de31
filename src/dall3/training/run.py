"""`dall3 train`: settings from a TOML file, the parts trained before from the folder, one model trained into it.

A folder of weights grows part by part: tokenizer, vqgan, transformer, clip, upsampler, each by one command, and is a
pipeline folder at any time. What a run needs to go on lies beside them in `runs/<model>`.
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

SETTINGS = Path(__file__).parent / "settings"  # those of the bundled weights


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
        raise ValueError(f"{folder} holds no vqgan, on whose codes this is trained; train that first")
    return load_part(folder / "vqgan")


def need_clip(folder: Path) -> CLIP:
    if not (folder / "clip").is_dir():
        raise ValueError(f"{folder} holds no clip, in whose features perceptual_weight compares; train that first")
    return load_part(folder / "clip", need_tokenizer(folder))


def need_tokenizer(folder: Path) -> Tokenizer:
    if not (folder / TOKENIZER).exists():
        raise ValueError(f"{folder} holds no {TOKENIZER}; run `dall3 train tokenizer` on the same data first")
    return load_tokenizer(folder / TOKENIZER)


def check_libraries() -> None:
    """Raise ModuleNotFoundError where a library of the extra "train" is missing, before any work."""
    for name in ("accelerate", "matplotlib", "vector_quantize_pytorch"):
        if find_spec(name) is None:
            raise ModuleNotFoundError(f"training needs {name}; run pip install 'dall3[train]'", name=name)


def join_processes() -> bool:
    """Join the processes that a launcher started, and return whether this is the first of them.

    It comes before a model is made: some parts ask whether there are other processes. They wait for each other as long
    as making a pool of codes may take.
    """
    from accelerate import PartialState

    on_cpu = not torch.accelerator.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
    state = PartialState(cpu=on_cpu, timeout=timedelta(hours=12))
    atexit.register(state.destroy_process_group)  # whose threads, left running, now and then abort a process that ends
    return bool(state.is_main_process)


def look_at(data: Mixture, progress: bool) -> Mixture:
    """Say what the data holds and what is odd about it. Raises ValueError where it cannot be read."""
    lines = data.look()
    if progress:
        print("\n".join(lines), file=sys.stderr)
    return data


def read_settings(path: str | Path) -> dict[str, dict[str, Any]]:
    """The tables [model], [loss] and [train] of a TOML file. Raises ValueError for another file."""
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
    """Train one part of a folder of weights, and write it there.

    model: "tokenizer", "vqgan", "transformer", "clip" or "upsampler". config: a TOML file; the bundled weights'
    settings if not given. data: sources as `open_source` takes them, in place of the settings'. resume: go on from
    the folder's checkpoint of this model. initial: the folder of a trained part of the same configuration, whose
    weights are started from. overrides: of `TrainingConfig`.

    What the data holds and what is odd about it is printed to stderr before the first step, if `progress`.

    Raises ValueError for settings that are unknown or out of range, parts that are missing, and data that is not
    there or cannot be read, FileExistsError for a run or a part that is there already, and ModuleNotFoundError for a
    library that is missing, before any work.
    """
    if model not in TRAINABLE:
        raise ValueError(f"model '{model}' is not known; expected one of {', '.join(TRAINABLE)}")
    folder, path = Path(folder), Path(config or SETTINGS / f"{model}.toml")
    run, target = folder / "runs" / model, folder / (TOKENIZER if model == "tokenizer" else model)
    if not resume:
        if (run / "checkpoint.pt").exists():
            raise FileExistsError(f"{run} holds a run already; resume it, or give another folder")
        if target.exists():
            raise FileExistsError(
                f"{target} is there already, and the parts trained after it need it; give another folder"
            )
    settings = read_settings(path)
    if model != "tokenizer":
        check_libraries()
    try:
        training = from_json(TrainingConfig, settings["train"])
        training = replace(training, **({"data": tuple(data)} if data else {}), **overrides)
        if training.initial_share and initial is None:
            raise ValueError(f"initial_share={training.initial_share} needs initial, the part that it is a share of")
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
