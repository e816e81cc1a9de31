"""CLIP from OpenAI's files, from checkpoints with OpenAI's parameter names, and from open_clip's pretrained models.

The tensors do not determine the activation (QuickGELU in OpenAI's models, mostly GELU in open_clip's), the width of the
attention heads, or the tokenizer (ruCLIP has its own). Files other than OpenAI's therefore need a configuration;
ruCLIP's has a `config.json` and a `bpe.model` beside it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dall3.errors import FetchError
from dall3.models.clip import CLIP, RUCLIP_END, TEXT, VISION, CLIPConfig
from dall3.text import load_tokenizer
from dall3.weights.archive import CheckpointError, file_error
from dall3.weights.cache import cache_dir, offline, short_message
from dall3.weights.convert.state import (
    OPENAI_CLIP,
    Settings,
    State,
    as_tuples,
    checked,
    count,
    load_tensors,
    read_settings,
    read_state,
    without_weights,
)
from dall3.weights.registry import PathLike

SIZES = ("input_resolution", "context_length", "vocab_size")  # scalars in OpenAI's files that are not weights
CONFIG_HINT = (
    'pass config: the name of an open_clip model (such as "ViT-B-16-quickgelu" for OpenAI\'s weights), a JSON file in '
    'open_clip\'s format, or a dictionary such as {"quick_gelu": true}; for ruCLIP, pass a folder that also holds its '
    "config.json and bpe.model"
)
# Files that open_clip looks for in a repository of the Hub if the pretraining tag names no file.
HUB_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
RUCLIP_FILES = ("pytorch_model.bin", "config.json", "bpe.model")
RUCLIP_SETTINGS = (
    *("embed_dim", "image_resolution", "vision_layers", "vision_width", "vision_patch_size", "context_length"),
    *("vocab_size", "transformer_width", "transformer_heads", "transformer_layers"),
)


@checked
def load_clip(path_or_name: PathLike, config: Settings | None = None) -> CLIP:
    """Load CLIP in float32 on the CPU, from a file or by name.

    path_or_name: OpenAI's TorchScript file; a checkpoint with the same parameter names, such as open_clip's; the name
    of an open_clip model with its pretraining tag, such as "ViT-B-16/openai", which is downloaded to dall3's cache;
    ruCLIP's folder; or ruCLIP's pytorch_model.bin with config.json and bpe.model in the same folder.

    config: for a file, the settings that the tensors do not determine. Either a model of open_clip ("ViT-B-16" or
    "ViT-B-16/openai"), or a dictionary or JSON file in open_clip's format; its defaults are quick_gelu=False and heads
    of 64 channels. It is not needed for OpenAI's files, for open_clip checkpoints that contain the name of their model,
    and for tensor shapes that match exactly one model of open_clip.

    Raises CheckpointError for a file that is not a CLIP or needs `config`, and for a name that open_clip does not know;
    FetchError (an OSError) for weights that cannot be downloaded.

    >>> clip = load_clip("ViT-B-16.pt")  # doctest: +SKIP
    >>> clip = load_clip("open_clip_pytorch_model.bin", config="ViT-B-32")  # doctest: +SKIP
    """
    import open_clip

    is_file = Path(path_or_name).exists()
    name, _, tag = str(path_or_name).partition("/")
    if not is_file and (name, tag) in open_clip.list_pretrained():
        return load_open_clip(name, tag)
    if not is_file and Path(path_or_name).suffix == "":
        raise file_error(path_or_name, "neither a file nor a model of open_clip, such as 'ViT-B-16/openai'")

    path = Path(path_or_name)
    path = path / RUCLIP_FILES[0] if all((path / file).is_file() for file in RUCLIP_FILES) else path
    network = read_state(path, OPENAI_CLIP)
    state = {f"model.{key}": value for key, value in network.tensors.items() if key not in SIZES}
    ruclip = read_ruclip_settings(path) if config is None and not network.tensors.keys() >= {*SIZES} else None
    if ruclip is not None:
        return load_ruclip(state, ruclip, path)
    settings = None if config is None else read_clip_settings(config)
    if settings is None and network.tensors.keys() >= {*SIZES}:
        settings = {"quick_gelu": True}
    if settings is None:
        settings = find_matching_model(state, str(network.context.get("name", "")), path_or_name)
    with without_weights():
        model = CLIP.from_config(clip_config_of(state, settings, path_or_name))
    return load_tensors(model, state, path_or_name)


def read_ruclip_settings(path: Path) -> dict[str, Any] | None:
    """ruCLIP's config.json in the folder of its weights; None if that folder is not ruCLIP's."""
    config, vocabulary = (path.with_name(name) for name in RUCLIP_FILES[1:])
    if not (config.is_file() and vocabulary.is_file()):
        return None
    found = read_settings(config, "the settings of a model")
    return found if found.keys() >= {*RUCLIP_SETTINGS} else None


def load_ruclip(state: State, settings: dict[str, Any], path: Path) -> CLIP:
    """Build ruCLIP from its tensors, its config.json and the bpe.model beside them."""
    given = {
        "embed_dim": settings["embed_dim"],
        "vision_cfg": {
            "image_size": settings["image_resolution"],
            "layers": settings["vision_layers"],
            "width": settings["vision_width"],
            "patch_size": settings["vision_patch_size"],
        },
        "text_cfg": {
            "context_length": settings["context_length"],
            "vocab_size": settings["vocab_size"] + 1,
            "width": settings["transformer_width"],
            "heads": settings["transformer_heads"],
            "layers": settings["transformer_layers"],
        },
        "quick_gelu": True,
        "interpolation": "bilinear",
        **{name: settings.get(name) for name in ("mean", "std")},
    }
    words = state["model.token_embedding.weight"]
    state = state | {"model.token_embedding.weight": torch.cat((words, words[RUCLIP_END:][:1]))}
    config = clip_config_of(state, given, path, "ruclip")
    tokenizer = load_tokenizer(path.with_name(RUCLIP_FILES[2]))
    with without_weights():
        model = CLIP.from_config(config, tokenizer)
    return load_tensors(model, state, path)


def read_clip_settings(config: Settings) -> dict[str, Any]:
    """Read settings in open_clip's format from the name of an open_clip model, a dictionary or a JSON file.

    Raises CheckpointError for anything else, and for an unknown setting.
    """
    import open_clip

    if isinstance(config, str | Path) and not Path(config).is_file():
        name, _, tag = str(config).partition("/")
        settings = open_clip.get_model_config(name) if name in open_clip.list_models() else None
        if settings is None or (tag and not open_clip.get_pretrained_cfg(name, tag)):
            raise file_error(
                config, "neither a file of settings nor a model of open_clip, such as 'ViT-B-16-quickgelu'"
            )
        return settings | (tag_settings(name, tag) if tag else {})
    settings = read_settings(config, "open_clip's settings of a model")
    if isinstance(settings.get("model_cfg"), Mapping):  # the format of open_clip's repositories on the Hub
        preprocess = settings.get("preprocess_cfg") or {}
        settings = dict(settings["model_cfg"]) | {key: preprocess[key] for key in PREPROCESS if key in preprocess}
    known = {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu", *PREPROCESS}
    if odd := sorted(settings.keys() - known):
        raise CheckpointError(f"CLIP has the setting {odd[0]}; expected one of {', '.join(sorted(known))}")
    return settings


PREPROCESS = ("mean", "std", "interpolation")


def tag_settings(name: str, tag: str) -> dict[str, Any]:
    """The settings of an open_clip pretraining tag: activation, normalisation and interpolation."""
    from open_clip import get_pretrained_cfg

    known = get_pretrained_cfg(name, tag)
    return {"quick_gelu": bool(known.get("quick_gelu"))} | {key: known[key] for key in PREPROCESS if key in known}


def find_matching_model(state: State, training: str, path: PathLike) -> dict[str, Any]:
    """Find the open_clip model that matches the tensors and return its settings.

    training: the name of the training run in an open_clip checkpoint, which contains the name of the model. Raises
    CheckpointError if no model matches, or if several match that differ in activation or heads.
    """
    import open_clip

    found = settings_of_tensors(state)
    fitting = {name: settings for name in open_clip.list_models() if (settings := match_model(name, found)) is not None}
    named = [name for name in fitting if training == name or f"model_{name}-lr_" in training]
    if named:
        return fitting[named[0]]
    if not fitting:
        raise file_error(path, f"its tensors do not determine its activation and the width of its heads; {CONFIG_HINT}")
    different = {repr((settings.get("quick_gelu", False), heads_of(settings))) for settings in fitting.values()}
    if len(different) > 1:
        raise file_error(path, f"matches {' and '.join(fitting)}, which differ in activation or heads; {CONFIG_HINT}")
    return next(iter(fitting.values()))


def match_model(name: str, found: dict[str, Any]) -> dict[str, Any] | None:
    """The settings of an open_clip model if they match `found`, those of the tensors, else None."""
    import open_clip

    settings = open_clip.get_model_config(name)
    if settings is None or not is_openai_architecture(settings) or settings["embed_dim"] != found["embed_dim"]:
        return None
    for part in ("vision_cfg", "text_cfg"):
        theirs, ours = {"mlp_ratio": 4.0} | settings[part], found[part]
        if int(theirs["width"] * theirs["mlp_ratio"]) != int(ours["width"] * ours["mlp_ratio"]):
            return None
        for key, value in ours.items():
            if key not in ("mlp_ratio", "patch_size") and as_tuples(theirs.get(key)) != value:
                return None
        if ours.get("patch_size") not in (None, theirs.get("patch_size")):
            return None
    return settings


def is_openai_architecture(settings: Mapping[str, Any]) -> bool:
    """Whether a model has OpenAI's architecture: a ViT or ResNet image encoder and a text transformer."""
    known = settings.keys() <= {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu"}
    return known and settings["vision_cfg"].keys() <= {*VISION} and settings["text_cfg"].keys() <= {*TEXT}


def heads_of(settings: dict[str, Any]) -> tuple[Any, Any]:
    """Width of the heads of the image encoder, number of heads of the text transformer."""
    return settings["vision_cfg"].get("head_width", 64), settings["text_cfg"]["heads"]


def settings_of_tensors(state: State) -> dict[str, Any]:
    """The settings that the tensors determine, in open_clip's format."""
    context_length, width = state["model.positional_embedding"].shape
    text: dict[str, Any] = {"context_length": context_length, "width": width}
    text["vocab_size"] = len(state["model.token_embedding.weight"])
    text["layers"] = count(state, r"model\.transformer\.resblocks\.(\d+)\.")
    text["mlp_ratio"] = mlp_ratio(state["model.transformer.resblocks.0.mlp.c_fc.weight"])
    vision: dict[str, Any]
    if "model.visual.proj" in state:
        first, places = state["model.visual.conv1.weight"], len(state["model.visual.positional_embedding"]) - 1
        vision = {"patch_size": first.shape[-1], "image_size": first.shape[-1] * math.isqrt(places)}
        vision |= {"width": len(first), "layers": count(state, r"model\.visual\.transformer\.resblocks\.(\d+)\.")}
        vision["mlp_ratio"] = mlp_ratio(state["model.visual.transformer.resblocks.0.mlp.c_fc.weight"])
    else:
        places = len(state["model.visual.attnpool.positional_embedding"]) - 1
        layers = tuple(count(state, rf"model\.visual\.layer{i}\.(\d+)\.") for i in range(1, 5))
        vision = {"patch_size": None, "image_size": 32 * math.isqrt(places), "layers": layers, "mlp_ratio": 4.0}
        vision["width"] = len(state["model.visual.layer1.0.conv1.weight"])
    return {"embed_dim": state["model.text_projection"].shape[1], "vision_cfg": vision, "text_cfg": text}


def mlp_ratio(weight: Any) -> float:
    """Ratio of an MLP's hidden width to its input width, such that int(width · ratio) is the hidden width."""
    hidden, width = weight.shape
    return hidden / width if hidden * 8 % width == 0 else (hidden + 0.5) / width


def clip_config_of(state: State, given: Mapping[str, Any], path: PathLike, tokenizer: str = "clip") -> CLIPConfig:
    """Combine the architecture found in the tensors with the given settings in open_clip's format.

    Raises CheckpointError if they contradict each other.
    """
    found = settings_of_tensors(state)
    parts = {"vision_cfg": {"head_width": 64}, "text_cfg": {"heads": found["text_cfg"]["width"] // 64}}
    for part, known in parts.items():
        for key, value in dict(given.get(part) or {}).items():
            value = tuple(value) if isinstance(value, list) else value
            tensors = found[part].get(key, value)
            if key not in ("mlp_ratio", "patch_size") and value != tensors:
                raise CheckpointError(f"the config says {key}={value}, but {path} has {tensors}")
            known[key] = value
        found[part] = known | found[part]
    if given.get("embed_dim", found["embed_dim"]) != found["embed_dim"]:
        raise CheckpointError(f"the config says embed_dim={given['embed_dim']}, but {path} has {found['embed_dim']}")
    normalisation: dict[str, Any] = {key: tuple(given[key]) for key in ("mean", "std") if given.get(key)}
    return CLIPConfig(
        **found,
        quick_gelu=bool(given.get("quick_gelu", False)),
        tokenizer=tokenizer,
        interpolation=given.get("interpolation") or "bicubic",
        **normalisation,
    )


def load_open_clip(name: str, tag: str) -> CLIP:
    """Load a pretrained open_clip model with the settings of its training; downloaded to dall3's cache if missing.

    Raises FetchError if it cannot be downloaded.
    """
    import open_clip
    from open_clip.pretrained import download_pretrained
    from open_clip.tokenizer import SimpleTokenizer

    known, cache = open_clip.get_pretrained_cfg(name, tag), str(cache_dir() / "open_clip")
    instead = "if you have its file, pass its path: load_clip(FILE), or --clip_path FILE"
    weights = cached_weights(name, known, cache) if offline() else None
    if offline() and weights is None:
        raise FetchError(f"{name}/{tag} is not completely in {cache}, and DALL3_OFFLINE is set; {instead}")
    try:
        weights = weights or download_pretrained(known, cache_dir=cache)
        tokenize = open_clip.get_tokenizer(name, cache_dir=cache)
    except Exception as error:  # huggingface_hub, its HTTP library or the operating system
        hub = known.get("hf_hub", "")
        source = f"the Hugging Face Hub ({hub.strip('/')})" if hub else known.get("url", "open_clip's host")
        raise FetchError(
            f"CLIP {name}/{tag} cannot be downloaded from {source}: {short_message(error)}; {instead}"
        ) from None
    training = tag_settings(name, tag)
    model = open_clip.create_model(name, pretrained=weights, force_quick_gelu=training["quick_gelu"], cache_dir=cache)
    size = model.visual.image_size
    side = size[0] if isinstance(size, tuple) else size
    found = CLIP(model, tokenize, side, *(training.get(key) for key in PREPROCESS))
    settings = open_clip.get_model_config(name) or {}
    if is_openai_architecture(settings) and isinstance(tokenize, SimpleTokenizer):
        found.config = CLIPConfig(
            **settings | {key: as_tuples(value) for key, value in training.items()}, tokenizer="clip"
        )
    return found


def cached_weights(name: str, known: Mapping[str, Any], cache: str) -> str | None:
    """Path of the cached weights of an open_clip model; None if they or its text model's files have to be downloaded.

    open_clip itself contacts the hub even for cached files. known: open_clip's entry for the pretrained model.
    """
    import open_clip
    from huggingface_hub import try_to_load_from_cache

    if any(key.startswith("hf_") for key in (open_clip.get_model_config(name) or {}).get("text_cfg", {})):
        return None  # its tokenizer is on the hub
    repository, _, file = known.get("hf_hub", "").rpartition("/")
    names = (str(Path(file).with_suffix(".safetensors")), file) if file else HUB_FILES
    on_hub = [try_to_load_from_cache(repository, one, cache_dir=cache) for one in names] if repository else []
    of_url = Path(cache) / Path(known["url"]).name if known.get("url") else None
    found = [known.get("file"), *on_hub, str(of_url) if of_url is not None and of_url.is_file() else None]
    return next((path for path in found if isinstance(path, str)), None)
