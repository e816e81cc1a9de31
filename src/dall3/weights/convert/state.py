"""Finding the tensors of a network in a checkpoint, and loading them into a model."""

from __future__ import annotations

import json
import logging
import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dall3.models.packed import has_fbgemm, page_out
from dall3.weights.archive import CheckpointError, Placeholder, file_error, module_tensors, read_archive
from dall3.weights.progress import advance
from dall3.weights.registry import NAME, PathLike, read_settings_text

State = dict[str, Tensor]
Model = TypeVar("Model", bound=nn.Module)
Load = TypeVar("Load", bound=Callable[..., Any])
Settings = PathLike | Mapping[str, Any]  # a dictionary, or the path of a JSON file with one

MAX_DICTIONARIES, MAX_NESTING = 10_000, 8  # upper bounds of the search in one file
AVERAGED = re.compile(r"(?<![a-z])(ema|swa|averaged?)(?![a-z])")
RAW = re.compile(r"(?<![a-z])(online|raw)(?![a-z])")  # the raw copy inside an object that averages weights
DEEPSPEED = "mp_rank_00_model_states.pt"

logger = logging.getLogger("dall3")


@dataclass(frozen=True)
class Kind:
    """A kind of checkpoint, recognised by the names of its tensors.

    marker: the name of a tensor that this kind has. absent: the name of a tensor that it does not have, to tell it from
    another kind with the same marker.
    """

    name: str
    marker: str
    absent: str = ""

    def __str__(self) -> str:
        return self.name

    def prefixes(self, names: Mapping[str, Any]) -> list[str]:
        """Prefixes before the names of this kind's tensors, one for each copy of the network."""
        ends = (name for name in names if name == self.marker or name.endswith(f".{self.marker}"))
        found = (name.removesuffix(self.marker) for name in ends)
        return [prefix for prefix in found if not self.absent or prefix + self.absent not in names]


DALLE = Kind("a DALL·E transformer of DALLE-pytorch", "to_logits.1.weight", absent="text_embeddings.weight")
RUDALLE = Kind("a ruDALL-E transformer", "text_pos_embeddings.weight")
MINI_DECODER = Kind("the decoder of DALL·E Mini or Mega", "layers.0.encoder_attn.q_proj.weight")
MINI_ENCODER = Kind(
    "the encoder of DALL·E Mini or Mega", "layers.0.glu.fc0.weight", absent="layers.0.encoder_attn.q_proj.weight"
)
VQGAN = Kind("a VQGAN of taming-transformers", "quant_conv.weight")
DETOKER = Kind("a VQGAN's decoder, as DALL·E Mini's", "post_quant_conv.weight", absent="quant_conv.weight")
UNET = Kind("a UNet of guided-diffusion", "time_embed.0.weight")
DVAE = Kind("a DiscreteVAE of DALLE-pytorch", "codebook.weight")
OPENAI_CLIP = Kind("a CLIP model", "visual.conv1.weight")
OPENAI_DVAE = Kind("a part of OpenAI's dVAE", "blocks.input.w")
KINDS = (  # the order in which `kind_of` tries them
    *(RUDALLE, MINI_DECODER, MINI_ENCODER, DALLE, VQGAN, DETOKER, UNET, DVAE, OPENAI_CLIP, OPENAI_DVAE),
)


@dataclass(frozen=True)
class FoundState:
    """A network in a checkpoint.

    place: the keys and the prefix that lead to its tensors. context: other entries of the same dictionary and of those
    that contain it, such as hyper-parameters.
    """

    kind: Kind
    place: str
    tensors: State
    context: dict[str, Any]

    @property
    def averaged(self) -> bool:
        return bool(AVERAGED.search(self.place.lower())) and not RAW.search(self.place.lower())


def checked(load: Load) -> Load:
    """Decorator of loaders: convert any exception to a CheckpointError that names the file. OSError passes through."""

    @wraps(load)
    def wrapper(path: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return load(path, *args, **kwargs)
        except (CheckpointError, OSError):
            raise
        except KeyError as error:
            problem = f"missing: {error.args[0]}"
        except Exception as error:
            problem = f"cannot build a model from its tensors and settings: {error}"
        raise file_error(path, problem)

    return cast(Load, wrapper)


def read_state(path: PathLike, *kinds: Kind) -> FoundState:
    """Find the network of one of these kinds in a checkpoint, in any nested dictionary and behind any prefix.

    path: a file, or the folder of a DeepSpeed checkpoint. Averaged (EMA) weights are preferred. Raises CheckpointError
    if the file has no such network, or several.
    """
    path = deepspeed_file(Path(path))
    archive = read_archive(path)
    for kind in kinds:
        if networks := find_networks(archive, kind):
            return choose_network(networks, path)
    expected = " or ".join(map(str, kinds))
    raise file_error(path, f"contains {kind_of(archive)}; expected {expected}; {keys_of(archive)}")


def find_networks(archive: Any, kind: Kind) -> list[FoundState]:
    """All networks of a kind in the object of a file, outermost first."""
    found = []
    for place, tensors, context in dictionaries(archive):
        for prefix in kind.prefixes(tensors):
            state = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
            state = {name: value for name, value in state.items() if not name.startswith("model_ema.")}
            label = "/".join(part for part in (place, prefix.rstrip(".")) if part)
            found.append(FoundState(kind, label, state, context))
            if averages := lit_ema(tensors, prefix, state):
                found.append(FoundState(kind, f"{label}/model_ema", state | averages, context))
    return found


def lit_ema(tensors: State, prefix: str, state: State) -> State:
    """The averages that latent-diffusion's LitEma stores beside a network: `model_ema.` and the name without dots.

    The names may leave out the first parts of `prefix`. Buffers have no average. Empty if there are none.
    """
    parts = prefix.split(".")
    for i in range(len(parts)):
        inner = ".".join(parts[i:])
        named = {name: f"model_ema.{(inner + name).replace('.', '')}" for name in state}
        averages = {name: tensors[key] for name, key in named.items() if key in tensors}
        if averages:
            return averages
    return {}


def choose_network(found: list[FoundState], path: PathLike) -> FoundState:
    """The averaged network if there is one, else the only one. Raises CheckpointError if there are several."""
    averaged = [one for one in found if one.averaged]
    chosen = averaged or found
    if len(chosen) > 1:
        places = ", ".join(f"'{one.place}'" for one in chosen[:4])
        raise file_error(
            path, f"holds {len(chosen)} networks of this kind ({places}); save the one to load to a file of its own"
        )
    if averaged and len(found) > 1:
        raw = ", ".join(f"'{one.place}'" for one in found if not one.averaged)
        logger.warning("%s: loading the averaged weights '%s', not the raw ones %s", path, averaged[0].place, raw)
    return chosen[0]


def dictionaries(archive: Any) -> Iterator[tuple[str, State, dict[str, Any]]]:
    """All dictionaries of tensors in the object of a file, outermost first. A pickled module counts as one.

    Yields the place, the tensors by name, and the other entries of this dictionary and of those around it.
    """
    waiting: deque[tuple[str, Any, dict[str, Any]]] = deque([("", archive, {})])
    seen: set[int] = set()
    while waiting and len(seen) < MAX_DICTIONARIES:
        place, node, outer = waiting.popleft()
        if id(node) in seen or not isinstance(node, dict):
            continue
        seen.add(id(node))
        values = {name: value for name, value in values_of(node).items() if isinstance(name, str)}
        tensors, context = pickled_module(node, place), outer | values
        if not tensors:
            tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
            if place.count("/") < MAX_NESTING:
                places = ((f"{place}/{name}" if place else name, value) for name, value in values.items())
                waiting.extend((inner, value, context) for inner, value in places if isinstance(value, dict))
        if tensors:
            yield place, tensors, context


def pickled_module(node: Any, place: str) -> State:
    """The tensors of a pickled module; empty for any other object."""
    if not isinstance(node, Placeholder):
        return {}
    try:
        return module_tensors(node)
    except CheckpointError:
        if not place:
            raise
        return {}  # a nested object that is not a network


def values_of(settings: Any) -> dict[Any, Any]:
    """The entries of a dictionary, or the attributes of a pickled object such as argparse's Namespace."""
    if isinstance(settings, Placeholder):
        return dict(settings) | (settings.state if isinstance(settings.state, dict) else {})
    return settings if isinstance(settings, dict) else {}


def kind_of(archive: Any) -> str:
    return next((kind.name for kind in KINDS if find_networks(archive, kind)), "something else")


def keys_of(archive: Any) -> str:
    """Describe the object in a file, for an error message."""
    if not isinstance(archive, dict):
        return f"it holds {type(archive).__name__}"
    values = values_of(archive)
    if isinstance(values.get("weights"), str):
        return "its 'weights' is a string: it is the settings file of a DeepSpeed folder; pass the folder instead"
    inner = {
        name: f" ({', '.join(map(str, [*value][:3]))}, …)" for name, value in values.items() if isinstance(value, dict)
    }
    keys = ", ".join(f"{str(name)[:40]}{inner.get(name, '')[:120]}" for name in [*values][:8])
    return f"its keys are {keys}{', …' if len(values) > 8 else ''}" if values else "it is empty"


def deepspeed_file(path: Path) -> Path:
    """The file with the weights in the folder of a DeepSpeed checkpoint; other paths are returned unchanged.

    Raises CheckpointError for a folder whose weights are split between processes.
    """
    if not path.is_dir():
        return path
    folder = path
    if (path / "latest").is_file():
        latest = read_settings_text(path / "latest").strip()
        folder = path / latest if NAME.fullmatch(latest) else path
    if (folder / DEEPSPEED).is_file() and not (folder / DEEPSPEED.replace("00", "01")).exists():
        return folder / DEEPSPEED
    if any(folder.glob("*_model_states.pt")):
        raise file_error(
            path,
            "its weights are split between processes; run the zero_to_fp32.py in it, and pass the file that it writes",
        )
    return path


def read_settings(settings: Settings | None, what: str) -> dict[str, Any]:
    """Read settings from a dictionary, which is copied, or from a JSON file. None gives an empty dictionary.

    what: the expected content, for error messages. Raises CheckpointError for a file that is not a JSON object.
    """
    if settings is None or isinstance(settings, Mapping):
        return dict(settings or {})
    try:
        found = json.loads(read_settings_text(settings))
    except (ValueError, RecursionError) as error:
        raise file_error(settings, f"not JSON ({error}); expected {what}") from None
    if not isinstance(found, dict):
        raise file_error(settings, f"holds {type(found).__name__}; expected a JSON object with {what}")
    return found


def as_bool(value: Any) -> bool:
    """Convert a value, or a text as in guided-diffusion's `str2bool`, to bool. Raises ValueError for another text."""
    if not isinstance(value, str):
        return bool(value)
    if value.lower() not in ("yes", "true", "t", "y", "1", "no", "false", "f", "n", "0"):
        raise ValueError(f"{value!r} is not a boolean; expected true or false")
    return value.lower() in ("yes", "true", "t", "y", "1")


class WithoutInit(TorchFunctionMode):
    """Skip parameter initialisation: random functions on the meta device would import torch's compiler."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


@contextmanager
def without_weights() -> Iterator[None]:
    """Create modules on the meta device, without memory, for `load_tensors` to load tensors into."""
    with torch.device("meta"), WithoutInit():
        yield


def load_tensors(model: Model, state: State, path: object, dtype: torch.dtype | None = torch.float32) -> Model:
    """Load tensors into a model on the meta device and return it in eval mode, without gradients.

    Floating-point tensors are converted to `dtype`; those that have it are not copied. None: float16 if all of them are
    float16 and this CPU can multiply by float16 weights, else float32. Raises CheckpointError with the names of tensors
    that are missing, unexpected, or of another type or shape.
    """
    if dtype is None:
        kinds = {tensor.dtype for tensor in state.values() if tensor.is_floating_point()}
        dtype = torch.float16 if kinds == {torch.float16} and has_fbgemm() else torch.float32
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    reshaped = [name for name in wanted.keys() & found.keys() if wanted[name] != found[name]]
    is_float = {name: tensor.is_floating_point() for name, tensor in model.state_dict().items()}
    retyped = [name for name in wanted.keys() & found.keys() if is_float[name] != state[name].is_floating_point()]
    problems = {
        "missing": sorted(wanted.keys() - found.keys()),
        "unexpected": sorted(found.keys() - wanted.keys()),
        "of another type": sorted(retyped),
        "of another shape": sorted(f"{name} {found[name]} instead of {wanted[name]}" for name in reshaped),
    }
    lines = [
        f"{title}: {', '.join(names[:5])}" + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        for title, names in problems.items()
        if names
    ]
    if lines:
        raise file_error(path, f"does not fit {type(model).__name__}; {'; '.join(lines)}")
    ready: State = {}
    for name, value in state.items():
        ready[name] = value.to(dtype) if value.is_floating_point() else value
        if ready[name] is not value:
            page_out(value)  # part of a mapped file, which is not read again
            advance(value)
    model.load_state_dict(ready, assign=True)
    return model.eval().requires_grad_(False)


def count(state: Mapping[str, Any], pattern: str) -> int:
    """Number of distinct values of the first group of `pattern` in the names of tensors."""
    return len({match[1] for name in state if (match := re.match(pattern, name))})


def as_tuples(value: Any) -> Any:
    """Convert a list and the lists in it to tuples; other values are returned unchanged."""
    return tuple(as_tuples(item) for item in value) if isinstance(value, list) else value


def as_tuple(value: Any) -> tuple[Any, ...] | None:
    """Convert a list or a single value to a tuple; None stays None."""
    return None if value is None else tuple(value) if isinstance(value, list | tuple) else (value,)
