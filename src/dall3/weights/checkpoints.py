"""Files of 2021 to models. What an architecture is, is read off the names and shapes of its tensors; what they cannot
tell comes from the hyper-parameters beside them.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dall3.errors import FetchError
from dall3.models.attention import sparse_pattern
from dall3.models.clip import CLIP, TEXT, VISION, CLIPConfig
from dall3.models.discrete_vae import DiscreteVAE, DiscreteVAEConfig, OpenAIDiscreteVAE, OpenAIDiscreteVAEConfig
from dall3.models.transformer import DalleTransformer, TransformerConfig
from dall3.models.unet import DiffusionConfig, UNet, UNetConfig
from dall3.models.vqgan import GumbelVQ, VQGANConfig, VQModel
from dall3.weights.archive import CheckpointError, Placeholder, module_tensors, one_line, read_archive
from dall3.weights.fetching import home, offline
from dall3.weights.registry import PathLike, read_settings_text

State = dict[str, Tensor]
Model = TypeVar("Model", bound=nn.Module)
Load = TypeVar("Load", bound=Callable[..., Any])

DALLE, DVAE = "a DALL·E transformer of DALLE-pytorch", "a DiscreteVAE of DALLE-pytorch"
VQGAN, UNET = "a VQGAN of taming-transformers", "a UNet of guided-diffusion"
OPENAI, OPENAI_CLIP = "a part of OpenAI's dVAE", "a CLIP model"
KINDS = (  # what a file looks like, by a tensor that only its kind has
    (DALLE, "to_logits.1.weight"),
    (VQGAN, "quant_conv.weight"),
    (UNET, "time_embed.0.weight"),
    (DVAE, "codebook.weight"),
    (OPENAI_CLIP, "visual.conv1.weight"),
    (OPENAI, "blocks.input.w"),
)


def kind_of(state: Mapping[str, Any]) -> str:
    return next((kind for kind, name in KINDS if name in state), "something else")


def checked(load: Load) -> Load:
    """Whatever an odd tensor or hyper-parameter trips a loader over becomes a CheckpointError that names the file."""

    @wraps(load)
    def wrapper(path: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return load(path, *args, **kwargs)
        except (CheckpointError, OSError):
            raise
        except KeyError as error:
            problem = f"missing: {error.args[0]}"
        except Exception as error:
            problem = f"its tensors and settings make no model: {error}"
        raise one_line(path, problem)

    return cast(Load, wrapper)


def read_state(path: PathLike, kind: str) -> tuple[State, dict[str, Any]]:
    """The tensors of a checkpoint, whatever they are wrapped in, and what stands beside them.

    Raises CheckpointError when the tensors are not of the `kind` (a name in KINDS).
    """
    found = read_archive(path)
    if isinstance(found, Placeholder):
        found = module_tensors(found)
    if not isinstance(found, dict):
        raise one_line(path, f"holds {type(found).__name__}; expected {kind}")
    wrappers = [key for key in ("weights", "state_dict", "model", "ema") if isinstance(found.get(key), dict)]
    state = found[wrappers[0]] if wrappers else found
    tensors = {name: value for name, value in state.items() if isinstance(name, str) and isinstance(value, Tensor)}
    for prefix in ("module.", "model."):
        if tensors and all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
    if kind == DVAE and found.get("vae_params"):
        tensors = {name.removeprefix("vae."): value for name, value in tensors.items() if name.startswith("vae.")}
    if kind_of(tensors) != kind:
        raise one_line(path, f"looks like {kind_of(tensors)}; expected {kind}")
    return tensors, found


class WithoutInit(TorchFunctionMode):
    """Leaves parameters as they are made; drawing random numbers on the meta device would import torch's compiler."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


@contextmanager
def without_weights() -> Iterator[None]:
    """Modules made here have shapes and no memory, until `fill` gives them tensors."""
    with torch.device("meta"), WithoutInit():
        yield


def fill(model: Model, state: State, path: object, dtype: torch.dtype = torch.float32) -> Model:
    """Give a model built on the meta device its tensors, floats as `dtype`, without a copy where they have it already.

    Raises CheckpointError naming the tensors that are missing, unexpected or of another shape.
    """
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    odd = [name for name in wanted.keys() & found.keys() if wanted[name] != found[name]]
    kinds = {name: tensor.is_floating_point() for name, tensor in model.state_dict().items()}
    typed = [name for name in wanted.keys() & found.keys() if kinds[name] != state[name].is_floating_point()]
    problems = {
        "missing": sorted(wanted.keys() - found.keys()),
        "unexpected": sorted(found.keys() - wanted.keys()),
        "of another type": sorted(typed),
        "of another shape": sorted(f"{name} {found[name]} instead of {wanted[name]}" for name in odd),
    }
    lines = [
        f"{title}: {', '.join(names[:5])}" + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        for title, names in problems.items()
        if names
    ]
    if lines:
        raise one_line(path, f"does not fit {type(model).__name__}; {'; '.join(lines)}")
    ready = {name: value.to(dtype) if value.is_floating_point() else value for name, value in state.items()}
    model.load_state_dict(ready, assign=True)
    return model.eval().requires_grad_(False)


def count(state: Mapping[str, Any], pattern: str) -> int:
    """How many different numbers stand where `pattern` has its group."""
    return len({match[1] for name in state if (match := re.match(pattern, name))})


def as_tuple(value: Any) -> tuple[Any, ...] | None:
    return None if value is None else tuple(value) if isinstance(value, list | tuple) else (value,)


TRANSFORMER_NAMES = [  # patterns in DALLE-pytorch's names, in this order, and what they become
    (r"^to_logits\.0\.", "norm_out."),
    (r"^to_logits\.1\.", "to_logits."),
    (r"^image_pos_emb\.weights[._]0$", "row_pos_emb.weight"),
    (r"^image_pos_emb\.weights[._]1$", "column_pos_emb.weight"),
    (r"^transformer\.layers\.(?:layers|blocks)\.(\d+)\.(?:0|f\.net)\.", r"layers.\1.0."),
    (r"^transformer\.layers\.(?:layers|blocks)\.(\d+)\.(?:1|g\.net)\.", r"layers.\1.1."),
    (r"\b(?:fn\.)+(?=norm)", ""),
    (r"\b(?:fn\.)+", "function."),
    (r"\.net\.0\.", ".proj_in."),
    (r"\.net\.3\.", ".proj_out."),
    (r"\.(proj_in|to_out)\.0\.", r".\1."),
    (r"\.sgu\.", "."),
]


@checked
def load_transformer(path: PathLike, release: str | None = None) -> DalleTransformer:
    """DALLE-pytorch's checkpoint, releases 1.0 to 1.6 and the seed's fork, to a DalleTransformer in float32 on the CPU.

    release: DALLE-pytorch's that trained it, as "1.4.2", where the file does not say. It matters for "conv_like"
    attention alone: 1.5 moved its window, and files of 1.3 to 1.6 look alike; without it, 1.5 or later is taken.
    Raises CheckpointError when the file is not one or does not fit.
    """
    tensors, beside = read_state(path, DALLE)
    hparams, version = beside.get("hparams"), beside.get("version")
    if not isinstance(hparams, dict):
        raise one_line(path, "has no 'hparams' beside its weights; heads and text length cannot be known")
    state: State = {}
    for name, tensor in tensors.items():
        for pattern, replacement in TRANSFORMER_NAMES:
            name = re.sub(pattern, replacement, name)
        if name.endswith((".scale", "function.bias")):
            tensor = tensor.flatten()
        elif name.endswith(("function.weight", "pos_emb.weight", "transformer.pos_emb")):
            tensor = tensor.reshape(-1, tensor.shape[-1])  # leading dimensions of 1: gMLP's head, the tables' batch
        if not name.startswith("vae.") and ".linear." not in name:  # shared embeddings are the head's rows
            state[name] = tensor
    angles = state.pop("transformer.pos_emb", None)
    layouts = [state.pop(name) for name in list(state) if name.endswith("attn_fn.master_layout")]
    share = "text_emb.weight" not in state

    # Norm and function make two wrappers of a feed-forward; token shift one more; the caches of 1.3 and later another.
    functions = [name for name in tensors if name.endswith(("net.0.weight", "to_qkv.weight"))]
    depths = {name.rsplit("fn.")[-1]: name.count("fn.") for name in functions}
    shift = depths.get("net.0.weight", 0) > 2
    has_caches = depths.get("net.0.weight") == 4 or (not shift and depths.get("to_qkv.weight") == 3)
    release = release or (version if isinstance(version, str) else "1.6" if has_caches else "1.1")
    kinds = as_tuple(hparams.get("attn_types")) or ("full",)
    if [int(number) for number in re.findall(r"\d+", release)[:2]] >= [1, 5]:
        kinds = tuple("conv_like_causal" if kind == "conv_like" else kind for kind in kinds)
    text_seq_len, words = int(hparams.get("text_seq_len", 256)), int(hparams.get("num_text_tokens", 10000))
    vocabulary, dim = state["to_logits.weight"].shape
    # The table of angles ends with the image, or, in the seed's fork, one position before.
    grid = math.isqrt(len(angles) - text_seq_len) if angles is not None else len(state["row_pos_emb.weight"])
    config = TransformerConfig(
        num_text_tokens=words,
        num_image_tokens=vocabulary - words - text_seq_len,
        text_seq_len=text_seq_len,
        dim=dim,
        depth=count(state, r"layers\.(\d+)\."),
        heads=int(hparams.get("heads", 8)),
        dim_head=int(hparams.get("dim_head", 64)),
        grid_size=grid,
        attn_types=kinds,
        rotary_emb=angles is not None,
        shift_tokens=shift,
        reversible=bool(hparams.get("reversible", False)),
        stable=bool(hparams.get("stable", False)),
        sandwich_norm="layers.0.0.norm_out.weight" in state,
        shared_attn_ids=as_tuple(hparams.get("shared_attn_ids")),
        shared_ff_ids=as_tuple(hparams.get("shared_ff_ids")),
        share_input_output_emb=share,
        loss_img_weight=float(hparams.get("loss_img_weight", 7)),
    )
    with without_weights():
        model = DalleTransformer(config)
    if angles is not None:
        model.set_rotary_angles(angles)
        state |= {"rotary_cos": model.rotary_cos, "rotary_sin": model.rotary_sin}
    if "sparse" in kinds:  # DeepSpeed ran every layer with the layout of the first
        own = model.get_buffer("sparse_pattern")
        state["sparse_pattern"] = sparse_pattern(layouts[0], config.seq_len) if layouts else own
    return fill(model, state, path)


@checked
def load_vqgan(checkpoint: PathLike, config: PathLike | None = None) -> VQModel:
    """taming-transformers' checkpoint to a GumbelVQ or VQModel in float32 on the CPU.

    The architecture is read off the tensors. config: taming's YAML, which is checked against them where given.
    Raises CheckpointError when a file is not one or they do not fit each other.
    """
    tensors, _ = read_state(checkpoint, VQGAN)
    parts = ("encoder.", "decoder.", "quantize.", "quant_conv.", "post_quant_conv.")
    state = {name: tensor for name, tensor in tensors.items() if name.startswith(parts)}
    gumbel = "quantize.proj.weight" in state
    n_embed, embed_dim = state[f"quantize.{'embed' if gumbel else 'embedding'}.weight"].shape
    ch, levels = len(state["encoder.conv_in.weight"]), count(state, r"encoder\.down\.(\d+)\.")
    found = VQGANConfig(
        ch=ch,
        ch_mult=tuple(len(state[f"encoder.down.{i}.block.0.conv1.weight"]) // ch for i in range(levels)),
        num_res_blocks=count(state, r"encoder\.down\.0\.block\.(\d+)\."),
        attn_levels=tuple(i for i in range(levels) if f"encoder.down.{i}.attn.0.q.weight" in state),
        z_channels=len(state["encoder.conv_out.weight"]),
        embed_dim=embed_dim,
        n_embed=n_embed,
    )
    if config is not None:
        check_vqgan_config(found, config, checkpoint)
    with without_weights():
        model = GumbelVQ(found) if gumbel else VQModel(found)
    return fill(model, state, checkpoint)


def read_taming_config(path: PathLike) -> dict[str, Any]:
    """The parameters in taming's model.yaml. Raises CheckpointError for another file."""
    import yaml

    class Loader(yaml.SafeLoader):
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):  # of aliases a few lines make a tree without end
                raise yaml.YAMLError("it has aliases")
            return super().compose_node(parent, index)

    try:
        params = yaml.load(read_settings_text(path), Loader)["model"]["params"]
        if isinstance(params, dict):
            return params
        problem: object = "its params are no table"
    except (KeyError, TypeError, ValueError, RecursionError, yaml.YAMLError) as error:
        problem = f"{type(error).__name__}: {error}"
    raise one_line(path, f"not a taming-transformers model.yaml ({problem})")


def check_vqgan_config(found: VQGANConfig, config: PathLike, checkpoint: PathLike) -> None:
    """Raise CheckpointError where taming's YAML says something else than the checkpoint's tensors."""
    params = read_taming_config(config)
    try:
        said = {name: params[name] for name in ("embed_dim", "n_embed")}
        said |= {name: params["ddconfig"][name] for name in ("ch", "z_channels")}
        said["ch_mult"] = tuple(params["ddconfig"]["ch_mult"])
    except (KeyError, TypeError) as error:
        raise one_line(config, f"not a taming-transformers model.yaml ({type(error).__name__}: {error})") from None
    for name, value in said.items():
        if value != getattr(found, name):
            raise CheckpointError(f"{config} says {name}={value}, but {checkpoint} has {getattr(found, name)}")


@checked
def load_discrete_vae(path: PathLike) -> DiscreteVAE:
    """DALLE-pytorch's DiscreteVAE, from its own file or from a DALL·E checkpoint that holds one; float32, on the CPU.

    Raises CheckpointError when the file is not one or does not fit.
    """
    state, beside = read_state(path, DVAE)
    hparams = beside.get("vae_params") or beside.get("hparams")
    if not isinstance(hparams, dict):
        raise one_line(path, "has no 'hparams' beside its weights; the picture's size cannot be known")
    state["codebook_embedding.weight"] = state.pop("codebook.weight")
    num_tokens, codebook_dim = state["codebook_embedding.weight"].shape
    hidden_dim, channels = state["encoder.0.0.weight"].shape[:2]
    normalization = hparams.get("normalization", ((0.5,) * 3, (0.5,) * 3))
    if normalization is not None:
        mean, std = (tuple(float(number) for number in part) for part in normalization)
    config = DiscreteVAEConfig(
        image_size=int(hparams.get("image_size", 256)),
        num_tokens=num_tokens,
        codebook_dim=codebook_dim,
        num_layers=count(state, r"encoder\.(\d+)\.0\.weight"),
        num_resnet_blocks=count(state, r"encoder\.(\d+)\.net\."),
        hidden_dim=hidden_dim,
        channels=channels,
        normalization=None if normalization is None else (mean, std),
    )
    for name in ("num_layers", "num_resnet_blocks"):
        if hparams.get(name, getattr(config, name)) != getattr(config, name):
            raise one_line(path, f"its hparams say {name}={hparams[name]}, its tensors {getattr(config, name)}")
    with without_weights():
        model = DiscreteVAE(config)
    return fill(model, state, path)


@checked
def load_openai_dvae(encoder: PathLike, decoder: PathLike) -> OpenAIDiscreteVAE:
    """OpenAI's dVAE from its two pickled modules, read as data. Raises CheckpointError when they are not."""
    halves = {"encoder": read_state(encoder, OPENAI)[0], "decoder": read_state(decoder, OPENAI)[0]}
    config = OpenAIDiscreteVAEConfig(
        n_hid=len(halves["encoder"]["blocks.input.w"]),
        n_init=len(halves["decoder"]["blocks.input.w"]),
        n_blk_per_group=count(halves["encoder"], r"blocks\.group_1\.block_(\d+)\."),
        vocab_size=len(halves["encoder"]["blocks.output.conv.w"]),
        group_count=count(halves["encoder"], r"blocks\.group_(\d+)\."),
    )
    with without_weights():
        model = OpenAIDiscreteVAE(config)
    state: State = {}
    for half, tensors in halves.items():
        # Both sides list the same convolutions from the input to the output, weight before bias.
        names = [name for name in model.state_dict() if name.startswith(half)]
        state |= dict(zip(names, tensors.values(), strict=False))
    return fill(model, state, f"{encoder}, {decoder}")


def load_vae(
    path: PathLike | tuple[PathLike, PathLike] | None, config: PathLike | None = None, dalle: PathLike | None = None
) -> VQModel | DiscreteVAE | OpenAIDiscreteVAE | None:
    """Whichever VAE `path` holds: a VQGAN, a DiscreteVAE, OpenAI's (encoder.pkl, decoder.pkl). Without a path the
    DiscreteVAE inside the DALL·E checkpoint `dalle`, or None where it has none.
    """
    if isinstance(path, tuple | list):
        return load_openai_dvae(*path)
    if path is not None:
        found = read_archive(path)
        weights = found.get("weights") if isinstance(found, dict) else None
        is_discrete = isinstance(weights, dict) and kind_of(weights) == DVAE
        return load_discrete_vae(path) if is_discrete else load_vqgan(path, config)
    found = None if dalle is None else read_archive(dalle)
    has_vae = isinstance(found, dict) and found.get("vae_params")
    return load_discrete_vae(dalle) if dalle is not None and has_vae else None


IMAGE_SIZES = {(0.5, 1, 1, 2, 2, 4, 4): 512, (1, 1, 2, 2, 4, 4): 256, (1, 1, 2, 3, 4): 128, (1, 2, 3, 4): 64}
ATTENTION_HEADS = ("num_heads", "num_head_channels", "num_heads_upsample")
UNET_DEFAULTS: dict[int, dict[str, Any]] = {  # what sample.py sets for each size and tensors do not tell
    **{512: {"num_head_channels": 64}, 256: {"num_head_channels": 64}, 128: {"num_heads": 4}},
    64: {"num_head_channels": 64, "use_new_attention_order": True, "noise_schedule": "cosine"},
}


@checked
def load_unet(path: PathLike, config: PathLike | dict[str, Any] | None = None) -> UNet:
    """guided-diffusion's checkpoint to a UNet in float32 on the CPU; how it was trained is in its config.

    config: the flags of its training (a dictionary or a JSON file) for what the tensors cannot tell: the attention
    heads and the noise schedule. Without it those of the seed's sample.py for 512, 256, 128 and 64 pixels, and of
    super_res.py, are taken. Raises CheckpointError when the file is not one, does not fit, or needs a config.
    """
    state, _ = read_state(path, UNET)
    flags = read_flags(config)
    model_channels, outputs = state["time_embed.0.weight"].shape[1], count(state, r"output_blocks\.(\d+)\.")
    doubles = re.compile(r"output_blocks\.(\d+)\.[12]\.(in_layers|conv)\.")
    # A level's last output block ends with a second residual block or a convolution that doubles the picture.
    doubling = [match[1] for name in state if (match := doubles.match(name))]
    blocks = min(map(int, doubling), default=outputs - 1)
    firsts = range(1, 1 + outputs, blocks + 1)  # each level's first input block
    channel_mult = tuple(len(state[f"input_blocks.{i}.0.out_layers.3.weight"]) / model_channels for i in firsts)
    super_resolution = state["input_blocks.0.0.weight"].shape[1] == 6
    image_size = int(flags.get("large_size", flags.get("image_size", IMAGE_SIZES.get(channel_mult, 0))))
    usual = IMAGE_SIZES.get(channel_mult, image_size)
    if image_size != usual and not super_resolution and not flags.get("channel_mult"):
        raise one_line(path, f"the config says image_size={image_size}, but its tensors are those of {usual} pixels")
    defaults = {"num_heads": 4} if super_resolution else UNET_DEFAULTS.get(image_size, {})
    if not image_size or (config is None and not defaults):
        raise one_line(path, "a UNet of an unusual size; give its flags as config to tell its attention heads")
    if set(ATTENTION_HEADS) & flags.keys():
        defaults = {}
    told = defaults | {name: value for name, value in flags.items() if value not in (-1, "", None)}
    diffusion = DiffusionConfig(
        diffusion_steps=int(told.get("diffusion_steps", 1000)),
        noise_schedule=told.get("noise_schedule", "linear"),
        learn_sigma=len(state["out.2.weight"]) == 6,
        predict_xstart=bool(told.get("predict_xstart", False)),
        rescale_timesteps=bool(told.get("rescale_timesteps", True)),
    )
    embedding, labels = state.get("external_block.op.weight"), state.get("label_emb.weight")
    first = "input_blocks.1.0."
    unet_config = UNetConfig(
        model_channels=model_channels,
        channel_mult=channel_mult,
        num_res_blocks=blocks,
        attention_levels=tuple(level for level, i in enumerate(firsts) if f"input_blocks.{i}.1.qkv.weight" in state),
        image_size=image_size,
        **{name: int(told[name]) for name in ATTENTION_HEADS if name in told},
        use_new_attention_order=bool(told.get("use_new_attention_order", False)),
        use_scale_shift_norm=len(state[first + "emb_layers.1.weight"]) == 2 * len(state[first + "out_layers.3.weight"]),
        resblock_updown=f"input_blocks.{blocks + 1}.0.op.weight" not in state,
        num_classes=None if labels is None else len(labels),
        embedding_dims=None if embedding is None else (embedding.shape[1], embedding.shape[0]),
        super_resolution=super_resolution,
        diffusion=diffusion,
    )
    check_unet_flags(unet_config, flags, path)
    with without_weights():
        model = UNet(unet_config)
    return fill(model, state, path)


def read_flags(config: PathLike | dict[str, Any] | None) -> dict[str, Any]:
    if config is None or isinstance(config, dict):
        return dict(config or {})
    try:
        flags = json.loads(read_settings_text(config))
    except (ValueError, RecursionError) as error:
        raise one_line(config, f"not JSON ({error}); expected guided-diffusion's flags") from None
    if not isinstance(flags, dict):
        raise one_line(config, f"holds {type(flags).__name__}; expected an object of guided-diffusion's flags")
    return flags


def check_unet_flags(found: UNetConfig, flags: dict[str, Any], path: PathLike) -> None:
    """Raise CheckpointError where the flags say something else than the tensors."""
    for flag, value in (
        ("num_channels", found.model_channels),
        ("num_res_blocks", found.num_res_blocks),
        ("use_scale_shift_norm", found.use_scale_shift_norm),
        ("learn_sigma", found.diffusion.learn_sigma),
        ("emb_condition", found.embedding_dims is not None),
        ("class_cond", found.num_classes is not None),
    ):
        if flag in flags and flags[flag] != value:
            raise CheckpointError(f"the config says {flag}={flags[flag]}, but {path} has {value}")


@checked
def load_clip(path_or_name: PathLike) -> CLIP:
    """CLIP in float32 on the CPU: from OpenAI's TorchScript archive or a state dict (a file), or one of open_clip's
    own by name, as "ViT-B-32/openai", fetched by open_clip into dall3's cache.

    Raises CheckpointError for a file that is not one and for a name that open_clip does not know, FetchError for one
    that is not here when DALL3_OFFLINE is set.
    """
    import open_clip

    name, _, pretrained = str(path_or_name).partition("/")
    if not Path(path_or_name).exists() and (name, pretrained) in open_clip.list_pretrained():
        return load_open_clip(name, pretrained)
    if not Path(path_or_name).exists() and Path(path_or_name).suffix == "":
        raise one_line(path_or_name, "neither a file nor a model of open_clip, such as 'ViT-B-16/openai'")

    state, _ = read_state(path_or_name, OPENAI_CLIP)
    sizes = ("input_resolution", "context_length", "vocab_size")
    state = {f"model.{key}": value for key, value in state.items() if key not in sizes}
    with without_weights():
        model = CLIP.from_config(clip_config_of(state))
    return fill(model, state, path_or_name)


def clip_config_of(state: State) -> CLIPConfig:
    """The architecture that the tensors of OpenAI's CLIP tell: a vision transformer or a ResNet, and the text's."""
    context_length, width = state["model.positional_embedding"].shape
    text = {"context_length": context_length, "vocab_size": len(state["model.token_embedding.weight"])}
    text |= {"width": width, "heads": width // 64, "layers": count(state, r"model\.transformer\.resblocks\.(\d+)\.")}
    if "model.visual.proj" in state:
        first, places = state["model.visual.conv1.weight"], len(state["model.visual.positional_embedding"]) - 1
        layers: Any = count(state, r"model\.visual\.transformer\.resblocks\.(\d+)\.")
        vision: dict[str, Any] = {"patch_size": first.shape[-1], "image_size": first.shape[-1] * math.isqrt(places)}
        vision |= {"width": len(first), "layers": layers}
    else:
        places = len(state["model.visual.attnpool.positional_embedding"]) - 1
        layers = tuple(count(state, rf"model\.visual\.layer{i}\.(\d+)\.") for i in range(1, 5))
        vision = {"patch_size": None, "image_size": 32 * math.isqrt(places)}
        vision |= {"width": len(state["model.visual.layer1.0.conv1.weight"]), "layers": layers}
    embed_dim = state["model.text_projection"].shape[1]
    return CLIPConfig(embed_dim, vision, text, quick_gelu=True, tokenizer="clip")


def load_open_clip(name: str, pretrained: str) -> CLIP:
    """One of open_clip's own models, fetched into dall3's cache where it is not there yet."""
    import open_clip
    from open_clip.tokenizer import SimpleTokenizer

    cache = home() / "open_clip"
    if offline():  # open_clip may ask its host even for what it has
        raise FetchError(f"{name}/{pretrained} is open_clip's to fetch, and DALL3_OFFLINE is set; give a file instead")
    model = open_clip.create_model(name, pretrained=pretrained, cache_dir=str(cache))
    visual: Any = model.visual
    size = visual.image_size[0] if isinstance(visual.image_size, tuple) else visual.image_size
    found = CLIP(model, open_clip.get_tokenizer(name, cache_dir=str(cache)), size, visual.image_mean, visual.image_std)
    settings: dict[str, Any] = open_clip.get_model_config(name) or {}
    plain = settings.keys() <= {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu"}
    plain = plain and settings["vision_cfg"].keys() <= {*VISION} and settings["text_cfg"].keys() <= {*TEXT}
    if plain and isinstance(found.tokenize, SimpleTokenizer):
        quick = any(type(module).__name__ == "QuickGELU" for module in model.modules())
        colours = {"mean": tuple(visual.image_mean), "std": tuple(visual.image_std)}
        found.config = CLIPConfig(
            settings["embed_dim"], settings["vision_cfg"], settings["text_cfg"], quick, "clip", **colours
        )
    return found
