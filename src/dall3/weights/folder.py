"""Pipeline folders: a safetensors file and a `config.json` for every part, and one `tokenizer.json`.

README.md                                  model card
generation_config.json                     recommended settings of the weights (optional)
tokenizer.json                             tokenizer, in the format of Hugging Face's `tokenizers`
words.txt                                  words of the training captions, one per line (optional)
transformer/ vqgan/ clip/ upsampler/ …     config.json, model.safetensors
"""

from __future__ import annotations

import json
import logging
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dall3.models.clip import CLIP, CLIPConfig, RuclipTokenizer
from dall3.models.dalle_mini import DalleMini, DalleMiniConfig
from dall3.models.discrete_vae import DiscreteVAE, DiscreteVAEConfig, OpenAIDiscreteVAE, OpenAIDiscreteVAEConfig
from dall3.models.rudalle import Rudalle, RudalleConfig
from dall3.models.transformer import DalleTransformer, TransformerConfig
from dall3.models.unet import DiffusionConfig, UNet, UNetConfig
from dall3.models.upscaler import Upscaler, UpscalerConfig
from dall3.models.vqgan import GumbelVQ, VQGANConfig, VQModel
from dall3.text import WORDS, KnownWords, Tokenizer, load_tokenizer, read_words, tokenizer_json
from dall3.weights.archive import CheckpointError, file_error
from dall3.weights.convert.clip import load_clip
from dall3.weights.convert.guided_diffusion import load_unet
from dall3.weights.convert.state import Settings, as_tuples, load_tensors, without_weights
from dall3.weights.convert.transformer import load_transformer
from dall3.weights.convert.upscaler import NotInstalled, check_can_be_saved, load_saved_upscaler, load_super_resolution
from dall3.weights.convert.vae import load_vae
from dall3.weights.limits import check_limits
from dall3.weights.progress import advance
from dall3.weights.registry import PARTS, PathLike, read_settings_text

logger = logging.getLogger("dall3")

WEIGHTS, CONFIG, TOKENIZER = "model.safetensors", "config.json", "tokenizer.json"
DEFAULTS = "generation_config.json"
BUNDLED = Path(__file__).parents[1] / "mini"
MODELS: dict[str, tuple[Any, Any]] = {
    "DalleTransformer": (DalleTransformer, TransformerConfig),
    "DalleMini": (DalleMini, DalleMiniConfig),
    "Rudalle": (Rudalle, RudalleConfig),
    "GumbelVQ": (GumbelVQ, VQGANConfig),
    "VQModel": (VQModel, VQGANConfig),
    "DiscreteVAE": (DiscreteVAE, DiscreteVAEConfig),
    "OpenAIDiscreteVAE": (OpenAIDiscreteVAE, OpenAIDiscreteVAEConfig),
    "UNet": (UNet, UNetConfig),
    "CLIP": (CLIP, CLIPConfig),
    "Upscaler": (Upscaler, UpscalerConfig),
}


@dataclass(frozen=True)
class Origin:
    """Origin of weights: their licence, and a URL or file name as the source."""

    licence: str = "not stated"
    source: str = "not stated"


def save_part(
    model: Any, folder: PathLike, dtype: torch.dtype | None = torch.float16, origin: Origin | None = None
) -> None:
    """Save the weights and the configuration of a model to a folder, which is created if it does not exist.

    dtype: dtype of the floating-point tensors; None keeps them as they are. Raises ValueError for a CLIP that
    `CLIPConfig` cannot describe, for an upscaler that spandrel cannot load again, and for values that `dtype` cannot
    represent.

    >>> save_part(vqgan, "weights/vqgan", torch.float16, Origin(licence="mit"))  # doctest: +SKIP
    """
    from safetensors.torch import save_file

    if model.config is None:
        raise ValueError("config.json cannot describe this CLIP; instead of saving it, load it by its open_clip name")
    if isinstance(model, Upscaler):
        check_can_be_saved(model)
    tokenize = getattr(model, "tokenize", None)
    ruclip_tokenizer = tokenizer_json(tokenize.tokenizer) if isinstance(tokenize, RuclipTokenizer) else None
    folder = Path(folder)
    duplicates, state = shared_names(model), {}
    for name, tensor in model.state_dict().items():
        if name not in duplicates:
            state[name] = tensor.detach().to("cpu", dtype if tensor.is_floating_point() else None).contiguous()
            if not bool(state[name].isfinite().all()) and bool(tensor.isfinite().all()):
                raise ValueError(f"{name} has values that {dtype} cannot represent; save it with dtype=None")
    config = {"model": type(model).__name__, **(asdict(origin) if origin else {}), **asdict(model.config)}
    text = json.dumps(config, indent=2) + "\n"
    check_limits(json.loads(text))  # load_part would reject the file otherwise
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(text, encoding="utf-8")
    if ruclip_tokenizer is not None:  # it differs from the transformer's
        (folder / TOKENIZER).write_text(ruclip_tokenizer, encoding="utf-8")
    save_file(state, folder / WEIGHTS)
    # safetensors creates files that only the owner can read; give the weights the permissions of the configuration.
    (folder / WEIGHTS).chmod((folder / CONFIG).stat().st_mode)


def shared_names(model: torch.nn.Module) -> dict[str, str]:
    """The additional names of parameters that several layers share, each mapped to the parameter's first name."""
    first: dict[int, str] = {}
    names = [(name, first.setdefault(id(p), name)) for name, p in model.named_parameters(remove_duplicate=False)]
    return {name: original for name, original in names if name != original}


def load_part(
    folder: PathLike,
    tokenizer: Tokenizer | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Any:
    """Load a model that `save_part` wrote to a folder.

    tokenizer: the transformer's tokenizer, for a CLIP that uses it. dtype: dtype of the floating-point tensors. Raises
    CheckpointError for files that are missing or damaged, or do not match each other.

    >>> vqgan = load_part("weights/vqgan")  # doctest: +SKIP
    """
    folder = Path(folder)
    settings = read_config(folder / CONFIG)
    name = settings.pop("model", None)
    for key in asdict(Origin()):
        settings.pop(key, None)
    if name not in MODELS:
        raise file_error(folder / CONFIG, f"unknown model {name!r}; expected one of {', '.join(MODELS)}")
    model_class, config_class = MODELS[name]
    if model_class is CLIP and (folder / TOKENIZER).exists():
        tokenizer = checked_read(load_tokenizer, folder / TOKENIZER)
    try:
        check_limits(settings)
        config = from_json(config_class, settings)
        with without_weights():
            if model_class is not Upscaler:  # spandrel builds an Upscaler from its tensors, below
                model = CLIP.from_config(config, tokenizer) if model_class is CLIP else model_class(config)
    except Exception as error:  # invalid settings can raise any exception
        raise file_error(folder / CONFIG, f"cannot build a {name}: {type(error).__name__}: {error}") from None
    if model_class is Upscaler:
        state = read_tensors(folder / WEIGHTS, "cpu", torch.float32)
        return load_saved_upscaler(folder / WEIGHTS, state, config).to(device, dtype)
    state = read_tensors(folder / WEIGHTS, device, dtype)
    state |= {name: state[first] for name, first in shared_names(model).items() if first in state}
    if isinstance(model, DalleTransformer):
        model.take_rotary_table(state)
    return load_tensors(model, state, folder / WEIGHTS, dtype).to(device, dtype)


def read_tensors(path: Path, device: str | torch.device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Read a safetensors file; floating-point tensors are converted to `dtype`, or memory-mapped if they have it.

    Raises CheckpointError for a file that is missing or damaged.
    """
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file

    if not path.is_file():
        raise file_error(path, "missing; expected the folder of a part, with config.json and model.safetensors")
    try:
        with safe_open(path, framework="pt") as file:
            kinds = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
        wanted = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}.get(dtype)
        if {kind for kind in kinds.values() if "F" in kind} <= {wanted}:
            return load_file(path, device=str(device))
        state = {}
        for name in kinds:
            # Opened again for each tensor: a mapping lives as long as its tensors and would keep a second copy of all.
            with safe_open(path, framework="pt", device=str(device)) as file:
                tensor = file.get_tensor(name)
            state[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
            advance(tensor)
        return state
    except SafetensorError as error:
        raise file_error(path, f"damaged or not a safetensors file ({error})") from None


def read_config(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(read_settings_text(path))
    except FileNotFoundError:
        raise file_error(
            path, "missing; expected the folder of a part, with config.json and model.safetensors"
        ) from None
    except (ValueError, RecursionError) as error:
        raise file_error(path, f"not JSON ({error})") from None
    if not isinstance(found, dict):
        raise file_error(path, f"holds {type(found).__name__}; expected a JSON object")
    return found


def from_json(config_class: Any, settings: dict[str, Any]) -> Any:
    """Build a configuration from JSON values; lists become tuples. Raises TypeError for an unknown setting."""
    known = {field.name for field in fields(config_class)}
    unknown = sorted(settings.keys() - known)
    if unknown:
        raise TypeError(f"unknown setting {', '.join(unknown)}; known settings: {', '.join(sorted(known))}")
    nested = {"diffusion": DiffusionConfig}
    return config_class(
        **{
            name: from_json(nested[name], value) if name in nested and isinstance(value, dict) else as_tuples(value)
            for name, value in settings.items()
        }
    )


def load_folder(
    folder: PathLike, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """Load the parts of a pipeline folder: models by name, and "tokenizer" and "words" if there are any.

    The bundled CLIP is returned as a function that loads it. An upscaler is left out if spandrel is not installed.
    Raises CheckpointError for a folder without parts, and for a damaged part.
    """
    folder = Path(folder)
    present = [name for name in PARTS if (folder / name).is_dir()]
    if not present:
        where = "does not exist" if not folder.exists() else f"holds none of the folders {', '.join(PARTS)}"
        raise file_error(folder, f"{where}; expected a folder that save_pretrained wrote")
    found: dict[str, Any] = {}
    if (folder / TOKENIZER).exists():
        found["tokenizer"] = checked_read(load_tokenizer, folder / TOKENIZER)
        found["words"] = checked_read(read_words, folder / WORDS)
    for name in present:
        load = partial(load_part, folder / name, found.get("tokenizer"), device, dtype)
        # The bundled CLIP is loaded on first use: importing open_clip takes longer than loading everything else.
        try:
            found[name] = load if folder == BUNDLED and name == "clip" else load()
        except NotInstalled as error:
            leave_out(name, present, error)
    return found


def leave_out(name: str, present: Iterable[str], error: NotInstalled) -> None:
    """Log that a part is left out because its package is not installed. Raises the error if it is the only part.

    present: the names of all parts.
    """
    if {*present} == {name}:
        raise error
    logger.warning("%s; the weights are loaded without their %s", error, name)


def load_files(
    files: dict[str, tuple[Path, Path | None]],
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = torch.float32,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """Load parts from files in any supported format, including those of `save_part`. Returns the parts by name.

    files: (file, config) by the part's name. dtype: None for float32, with the exception that `load_transformer` makes
    on a CPU. settings: by the part's name, the settings that its file does not determine. An upscaler is left out if
    spandrel is not installed.
    """
    common = dtype or torch.float32
    of_transformer = dtype if torch.device(device).type == "cpu" else common
    found: dict[str, Any] = {}
    if "tokenizer" in files:
        vocabulary, merges = files["tokenizer"]
        found["tokenizer"] = checked_read(load_tokenizer, vocabulary if merges is None else (vocabulary, merges))
        found["words"] = checked_read(read_words, vocabulary.with_name(WORDS))
    loaders: dict[str, Any] = {"vqgan": load_vae, "clip": load_clip, "super_resolution": load_super_resolution}
    # The transformer comes last, because the VQGAN may determine its number of image tokens.
    for name in sorted(files.keys() - {"tokenizer"}, key=lambda name: (name == "transformer", PARTS.index(name))):
        file, config = files[name]
        part_settings = dict((settings or {}).get(name, {})) or None
        if (file.name, config) == (WEIGHTS, file.with_name(CONFIG)):
            found[name] = load_part(file.parent, found.get("tokenizer"), device, common)
        elif name == "transformer":
            pair = config is not None and config.suffix != ".json"  # DALL·E Mini's encoder.pt and decoder.pt
            path: Any = (file, config) if pair else file
            hparams = part_settings if pair else part_settings or config
            found[name] = load_transformer_for(found.get("vqgan"), path, hparams, of_transformer)
        else:
            try:
                found[name] = loaders.get(name, load_unet)(file, part_settings or config)
            except NotInstalled as error:
                leave_out(name, files, error)
                continue
        found[name] = found[name].to(device, of_transformer if name == "transformer" else common)
    return found


def checked_read(read: Callable[[Any], Any], path: Any) -> Any:
    """Call `read` with a path. Raises CheckpointError in place of ValueError for a damaged file."""
    try:
        return read(path)
    except ValueError as error:
        raise CheckpointError(str(error)) from None


def load_transformer_for(
    vqgan: Any,
    path: PathLike | tuple[PathLike, PathLike],
    hparams: Settings | None = None,
    dtype: torch.dtype | None = torch.float32,
) -> Any:
    """Call `load_transformer`. The number of image tokens of DALL·E Mini without `hparams` is that of the VQGAN."""
    if hparams is None and vqgan is not None and isinstance(path, tuple | list):
        hparams = {"num_image_tokens": vqgan.num_tokens}
    return load_transformer(path, hparams, dtype=dtype)


def read_origins(folder: PathLike) -> dict[str, Origin]:
    """The origins of the parts of a pipeline folder by name, from their config.json."""
    found = {}
    for name in PARTS:
        if (Path(folder) / name / CONFIG).exists():
            config = read_config(Path(folder) / name / CONFIG)
            texts = {key: config[key] for key in asdict(Origin()) if isinstance(config.get(key), str)}
            known = {key: text[:200] for key, text in texts.items() if text.isprintable()}
            found[name] = Origin(**known)
    return found


def read_defaults(folder: PathLike) -> dict[str, Any]:
    """The recommended settings in the generation_config.json of a pipeline folder; empty without such a file.

    Raises CheckpointError for a file that is not a JSON object.
    """
    path = Path(folder) / DEFAULTS
    return read_config(path) if path.exists() else {}


def save_folder(
    parts: dict[str, Any],
    tokenizer: Tokenizer | None,
    folder: PathLike,
    dtype: torch.dtype | None = None,
    origins: dict[str, Origin] | None = None,
    defaults: dict[str, Any] | None = None,
    words: KnownWords | None = None,
) -> Path:
    """Save parts by name, a tokenizer and a model card to a new or empty folder; returns its absolute path.

    dtype: as for `save_part`. origins: by the part's name. defaults: recommended settings. words: the content of
    words.txt. The folder is written under a temporary name in the same directory and then renamed, so it is never
    incomplete. Raises FileExistsError for a folder that is not empty; ValueError for a part or a tokenizer
    that cannot be saved.
    """
    folder, origins = Path(folder).absolute(), origins or {}
    check_empty(folder)
    text = None if tokenizer is None else tokenizer_json(tokenizer)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
        new = Path(temporary) / folder.name
        new.mkdir()
        for name, part in parts.items():
            save_part(part, new / name, dtype, origins.get(name, Origin()))
        if text is not None:
            (new / TOKENIZER).write_text(text, encoding="utf-8")
        if words is not None:
            (new / WORDS).write_text(words.to_text(), encoding="utf-8")
        if defaults:
            (new / DEFAULTS).write_text(json.dumps(defaults, indent=2) + "\n", encoding="utf-8")
        (new / "README.md").write_text(model_card(new, origins), encoding="utf-8")
        new.replace(folder)  # also replaces an empty folder
    return folder


def check_empty(folder: Path) -> None:
    """Raise FileExistsError for a folder that is not empty, and for an existing file."""
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise FileExistsError(f"{folder} already exists and is not empty; choose another folder")


def model_card(folder: Path, origins: dict[str, Origin]) -> str:
    """The README.md of a pipeline folder, with the front matter for the Hugging Face Hub."""
    licences = {origins.get(name, Origin()).licence for name in PARTS if (folder / name).is_dir()}
    licence = licences.pop().lower() if len(licences) == 1 else "other"
    licence = licence if re.fullmatch(r"[a-z0-9.-]+", licence) else "other"
    rows = []
    for name in PARTS:
        if (folder / name).is_dir():
            origin, model = origins.get(name, Origin()), read_config(folder / name / CONFIG)["model"]
            size = (folder / name / WEIGHTS).stat().st_size
            rows.append(f"| {name} | {model} | {size / 1e6:,.1f} MB | {origin.licence} | {origin.source} |")
    return CARD.format(licence=licence, rows="\n".join(rows))


CARD = """---
license: {licence}
library_name: dall3
pipeline_tag: text-to-image
---

# Weights for dall3

| part | model | size | licence | source |
|---|---|---|---|---|
{rows}

```python
from dall3 import Dall3Pipeline

pipe = Dall3Pipeline.from_pretrained("path/to/this/folder")  # or "owner/name" on the hub
pipe("a cube made of cloud").save("outputs")
```
"""
