"""Weights as a folder: for every part of a pipeline a safetensors file and a `config.json`, and one `tokenizer.json`.

README.md                                  the model card
tokenizer.json                             of Hugging Face's `tokenizers`
transformer/ vqgan/ clip/ upsampler/ …     config.json, model.safetensors
"""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

from dall3.archive import CheckpointError, one_line
from dall3.checkpoints import PathLike, fill
from dall3.models.clip import CLIP, CLIPConfig
from dall3.models.discrete_vae import DiscreteVAE, DiscreteVAEConfig, OpenAIDiscreteVAE, OpenAIDiscreteVAEConfig
from dall3.models.transformer import DalleTransformer, TransformerConfig
from dall3.models.unet import DiffusionConfig, UNet, UNetConfig
from dall3.models.vqgan import GumbelVQ, VQGANConfig, VQModel
from dall3.text import Tokenizer, load_tokenizer

WEIGHTS, CONFIG, TOKENIZER = "model.safetensors", "config.json", "tokenizer.json"
PARTS = ("transformer", "vqgan", "clip", "upsampler", "super_resolution")
BUNDLED = Path(__file__).parent / "mini"
MODELS: dict[str, tuple[Any, Any]] = {
    "DalleTransformer": (DalleTransformer, TransformerConfig),
    "GumbelVQ": (GumbelVQ, VQGANConfig),
    "VQModel": (VQModel, VQGANConfig),
    "DiscreteVAE": (DiscreteVAE, DiscreteVAEConfig),
    "OpenAIDiscreteVAE": (OpenAIDiscreteVAE, OpenAIDiscreteVAEConfig),
    "UNet": (UNet, UNetConfig),
    "CLIP": (CLIP, CLIPConfig),
}


def save_part(model: Any, folder: PathLike, dtype: torch.dtype | None = torch.float16) -> None:
    """Write a model's weights and its configuration to a folder, made if need be; floats as `dtype`, None: as is."""
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {
        name: tensor.detach().to("cpu", dtype if tensor.is_floating_point() else None).contiguous()
        for name, tensor in model.state_dict().items()
    }
    config = {"model": type(model).__name__, **asdict(model.config)}
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file(state, folder / WEIGHTS)


def load_part(folder: PathLike, tokenizer: Tokenizer | None = None) -> Any:
    """The model that `save_part` wrote to a folder, in float32 on the CPU. tokenizer: what a CLIP reads text with.

    Raises CheckpointError where the files are missing, broken, or do not fit each other.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    settings = read_config(folder / CONFIG)
    name = settings.pop("model", None)
    if name not in MODELS:
        raise one_line(folder / CONFIG, f"its model is {name!r}; expected one of {', '.join(MODELS)}")
    model_class, config_class = MODELS[name]
    try:
        config = from_json(config_class, settings)
        if model_class is CLIP:
            if tokenizer is None:
                raise ValueError("a CLIP needs the tokenizer that it was trained with")
            model = CLIP.from_config(config, tokenizer)
        else:
            with torch.device("meta"):
                model = model_class(config)
    except (TypeError, ValueError) as error:
        raise one_line(folder / CONFIG, f"makes no {name}: {error}") from None
    try:
        state = load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise one_line(folder / WEIGHTS, f"not a safetensors file, or a damaged one ({error})") from None
    return fill(model, state, folder / WEIGHTS)


def read_config(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise one_line(path, "missing; expected the folder of a part, with config.json and model.safetensors") from None
    except ValueError as error:
        raise one_line(path, f"not JSON ({error})") from None
    if not isinstance(found, dict):
        raise one_line(path, f"holds {type(found).__name__}; expected an object")
    return found


def from_json(config_class: Any, settings: dict[str, Any]) -> Any:
    """A configuration of plain values: JSON's lists are tuples in it. Raises TypeError for a name that it lacks."""
    known = {field.name for field in fields(config_class)}
    unknown = sorted(settings.keys() - known)
    if unknown:
        raise TypeError(f"unknown setting {', '.join(unknown)}; expected some of {', '.join(sorted(known))}")
    nested = {"diffusion": DiffusionConfig}
    return config_class(
        **{
            name: from_json(nested[name], value) if name in nested and isinstance(value, dict) else as_tuples(value)
            for name, value in settings.items()
        }
    )


def as_tuples(value: Any) -> Any:
    return tuple(as_tuples(item) for item in value) if isinstance(value, list) else value


def load_folder(folder: PathLike) -> dict[str, Any]:
    """The parts that a pipeline folder holds, by name, and "tokenizer" where there is one.

    Raises CheckpointError for a folder that holds none, or a broken one.
    """
    folder = Path(folder)
    present = [name for name in PARTS if (folder / name).is_dir()]
    if not present:
        where = "does not exist" if not folder.exists() else f"holds none of {', '.join(PARTS)}"
        raise one_line(folder, f"{where}; expected a folder that save_pretrained wrote")
    found: dict[str, Any] = {}
    if (folder / TOKENIZER).exists():
        try:
            found["tokenizer"] = load_tokenizer(folder / TOKENIZER)
        except ValueError as error:
            raise CheckpointError(str(error)) from None
    return found | {name: load_part(folder / name, found.get("tokenizer")) for name in present}
