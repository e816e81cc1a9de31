"""Files of 2021 to models. What an architecture is, is read off the names and shapes of its tensors; what they cannot
tell comes from the hyper-parameters beside them.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from dall3.archive import CheckpointError, Placeholder, module_tensors, read_archive
from dall3.models.clip import CLIP
from dall3.models.discrete_vae import DiscreteVAE, DiscreteVAEConfig, OpenAIDiscreteVAE, OpenAIDiscreteVAEConfig
from dall3.models.transformer import DalleTransformer, TransformerConfig
from dall3.models.unet import DiffusionConfig, UNet, UNetConfig
from dall3.models.vqgan import GumbelVQ, VQGANConfig, VQModel

PathLike = str | Path
State = dict[str, Tensor]
Model = TypeVar("Model", bound=nn.Module)

KINDS = (  # what a file looks like, by a tensor that only its kind has
    ("a DALL·E transformer of DALLE-pytorch", "to_logits.1.weight"),
    ("a VQGAN of taming-transformers", "quant_conv.weight"),
    ("a UNet of guided-diffusion", "time_embed.0.weight"),
    ("a DiscreteVAE of DALLE-pytorch", "codebook.weight"),
    ("a CLIP model", "visual.conv1.weight"),
    ("a CLIP model", "visual.trunk.patch_embed.proj.weight"),
    ("a part of OpenAI's dVAE", "blocks.input.w"),
)


def kind_of(state: Mapping[str, Any]) -> str:
    return next((kind for kind, name in KINDS if name in state), "something else")


def read_state(path: PathLike, kind: str) -> tuple[State, dict[str, Any]]:
    """The tensors of a checkpoint, whatever they are wrapped in, and what stands beside them.

    Raises CheckpointError when the tensors are not of the `kind` (a name in KINDS).
    """
    found = read_archive(path)
    if isinstance(found, Placeholder):
        found = module_tensors(found)
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: holds {type(found).__name__}; expected {kind}")
    beside, state = found, found
    for wrapper in ("weights", "state_dict", "model", "ema"):
        if isinstance(found.get(wrapper), dict):
            state = found[wrapper]
            break
    tensors = {name: value for name, value in state.items() if isinstance(name, str) and isinstance(value, Tensor)}
    for prefix in ("module.", "model."):
        if tensors and all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
    if kind_of(tensors) != kind:
        raise CheckpointError(f"{path}: looks like {kind_of(tensors)}; expected {kind}")
    return tensors, beside


def fill(model: Model, state: State, path: PathLike) -> Model:
    """Give a model built on the meta device its tensors, in float32, without a copy where they have it already.

    Raises CheckpointError naming the tensors that are missing, unexpected or of another shape.
    """
    wanted = model.state_dict()
    problems = []
    for title, names in (
        ("missing", [name for name in wanted if name not in state]),
        ("unexpected", [name for name in state if name not in wanted]),
        (
            "of another shape",
            [
                f"{name} {tuple(state[name].shape)} instead of {tuple(tensor.shape)}"
                for name, tensor in wanted.items()
                if name in state and state[name].shape != tensor.shape
            ],
        ),
    ):
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            problems.append(f"{title}: {', '.join(names[:5])}{more}")
    if problems:
        raise CheckpointError(f"{path}: does not fit {type(model).__name__}; {'; '.join(problems)}")
    typed = {name: value.float() if value.is_floating_point() else value for name, value in state.items()}
    model.load_state_dict(typed, assign=True)
    return model.eval().requires_grad_(False)


def shape_of(state: State, name: str, path: PathLike) -> tuple[int, ...]:
    if name not in state:
        raise CheckpointError(f"{path}: missing: {name}")
    return tuple(state[name].shape)


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


def load_transformer(path: PathLike, release: str | None = None) -> DalleTransformer:
    """DALLE-pytorch's checkpoint, releases 1.0 to 1.6 and the seed's fork, to a DalleTransformer in float32 on the CPU.

    release: DALLE-pytorch's that trained it, as "1.4.2", where the file does not say. It matters for "conv_like"
    attention alone: 1.5 moved its window, and files of 1.3 to 1.6 look alike; without it, 1.5 or later is taken.
    Raises CheckpointError when the file is not one or does not fit.
    """
    tensors, beside = read_state(path, "a DALL·E transformer of DALLE-pytorch")
    hparams = beside.get("hparams")
    if not isinstance(hparams, dict):
        raise CheckpointError(f"{path}: has no 'hparams' beside its weights; heads and text length cannot be known")
    state: State = {}
    for name, tensor in tensors.items():
        for pattern, replacement in TRANSFORMER_NAMES:
            name = re.sub(pattern, replacement, name)
        if name.endswith((".scale", "function.bias")):
            tensor = tensor.flatten()
        elif name.endswith(("function.weight", "pos_emb.weight", "transformer.pos_emb")):
            tensor = tensor.reshape(
                -1, tensor.shape[-1]
            )  # gMLP's one head, the axial tables' and angles' unit dimensions
        if not name.startswith("vae.") and ".linear." not in name:  # shared embeddings are the head's rows
            state[name] = tensor
    angles = state.pop("transformer.pos_emb", None)
    layouts = [state.pop(name) for name in list(state) if name.endswith("attn_fn.master_layout")]
    share = "text_emb.weight" not in state

    # Norm and function make two wrappers of a feed-forward; token shift one more; the caches of 1.3 and later another.
    depths = {
        name.rsplit("fn.")[-1]: name.count("fn.") for name in tensors if name.endswith(("net.0.weight", "qkv.weight"))
    }
    shift = depths.get("net.0.weight", 0) > 2
    has_caches = depths.get("net.0.weight") == 4 or (not shift and depths.get("to_qkv.weight") == 3)
    release = str(release or beside.get("version") or ("1.6" if has_caches else "1.1"))
    kinds = as_tuple(hparams.get("attn_types")) or ("full",)
    if [int(number) for number in re.findall(r"\d+", release)[:2]] >= [1, 5]:
        kinds = tuple("conv_like_causal" if kind == "conv_like" else kind for kind in kinds)
    try:
        text_seq_len, words = int(hparams.get("text_seq_len", 256)), int(hparams.get("num_text_tokens", 10000))
        vocabulary, dim = shape_of(state, "to_logits.weight", path)
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
        with torch.device("meta"):
            model = DalleTransformer(config)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: its hyper-parameters make no transformer: {error}") from None
    if angles is not None:
        model.set_rotary_angles(angles)
        state |= {"rotary_cos": model.rotary_cos, "rotary_sin": model.rotary_sin}
    if "sparse" in kinds:  # DeepSpeed ran every layer with the layout of the first
        state["attention_layout"] = layouts[0].bool() if layouts else model.attention_layout
    return fill(model, state, path)


def load_vqgan(checkpoint: PathLike, config: PathLike | None = None) -> VQModel:
    """taming-transformers' checkpoint to a GumbelVQ or VQModel in float32 on the CPU.

    The architecture is read off the tensors. config: taming's YAML, which is checked against them where given.
    Raises CheckpointError when a file is not one or they do not fit each other.
    """
    tensors, _ = read_state(checkpoint, "a VQGAN of taming-transformers")
    parts = ("encoder.", "decoder.", "quantize.", "quant_conv.", "post_quant_conv.")
    state = {name: tensor for name, tensor in tensors.items() if name.startswith(parts)}
    gumbel = "quantize.proj.weight" in state
    n_embed, embed_dim = shape_of(state, f"quantize.{'embed' if gumbel else 'embedding'}.weight", checkpoint)
    ch = shape_of(state, "encoder.conv_in.weight", checkpoint)[0]
    levels = count(state, r"encoder\.down\.(\d+)\.")
    widths = [shape_of(state, f"encoder.down.{i}.block.0.conv1.weight", checkpoint)[0] for i in range(levels)]
    found = VQGANConfig(
        ch=ch,
        ch_mult=tuple(width // ch for width in widths),
        num_res_blocks=count(state, r"encoder\.down\.0\.block\.(\d+)\."),
        attn_levels=tuple(i for i in range(levels) if f"encoder.down.{i}.attn.0.q.weight" in state),
        z_channels=shape_of(state, "encoder.conv_out.weight", checkpoint)[0],
        embed_dim=embed_dim,
        n_embed=n_embed,
    )
    if config is not None:
        check_vqgan_config(found, config, checkpoint)
    with torch.device("meta"):
        model = GumbelVQ(found) if gumbel else VQModel(found)
    return fill(model, state, checkpoint)


def check_vqgan_config(found: VQGANConfig, config: PathLike, checkpoint: PathLike) -> None:
    """Raise CheckpointError where taming's YAML says something else than the checkpoint's tensors."""
    import yaml

    try:
        params = yaml.safe_load(Path(config).read_text())["model"]["params"]
        said = {
            "embed_dim": params["embed_dim"],
            "n_embed": params["n_embed"],
            "ch": params["ddconfig"]["ch"],
            "ch_mult": tuple(params["ddconfig"]["ch_mult"]),
            "z_channels": params["ddconfig"]["z_channels"],
        }
    except (KeyError, TypeError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise CheckpointError(
            f"{config}: not a taming-transformers model.yaml ({type(error).__name__}: {error})"
        ) from None
    for name, value in said.items():
        if value != getattr(found, name):
            raise CheckpointError(f"{config} says {name}={value}, but {checkpoint} has {getattr(found, name)}")


def load_discrete_vae(path: PathLike, decoder: PathLike | None = None) -> DiscreteVAE | OpenAIDiscreteVAE:
    """DALLE-pytorch's DiscreteVAE, from its own file or from a DALL·E checkpoint that holds one; or, with `decoder`,
    OpenAI's dVAE from its encoder.pkl and decoder.pkl. float32, on the CPU.

    Raises CheckpointError when a file is not one or does not fit.
    """
    if decoder is not None:
        return load_openai_dvae(path, decoder)
    found = read_archive(path)
    found = found if isinstance(found, dict) else {}
    weights, hparams = found.get("weights"), found.get("vae_params") or found.get("hparams")
    if not isinstance(weights, dict) or not isinstance(hparams, dict):
        raise CheckpointError(
            f"{path}: expected a DiscreteVAE of DALLE-pytorch, a dictionary of 'hparams' and 'weights'"
        )
    state = {name.removeprefix("vae."): tensor for name, tensor in weights.items()}
    if found.get("vae_params"):
        state = {name.removeprefix("vae."): tensor for name, tensor in weights.items() if name.startswith("vae.")}
    if kind_of(state) != "a DiscreteVAE of DALLE-pytorch":
        raise CheckpointError(f"{path}: looks like {kind_of(state)}; expected a DiscreteVAE of DALLE-pytorch")
    state["codebook_embedding.weight"] = state.pop("codebook.weight")
    num_tokens, codebook_dim = state["codebook_embedding.weight"].shape
    normalization = hparams.get("normalization", ((0.5,) * 3, (0.5,) * 3))
    config = DiscreteVAEConfig(
        image_size=int(hparams.get("image_size", 256)),
        num_tokens=num_tokens,
        codebook_dim=codebook_dim,
        num_layers=int(hparams.get("num_layers", 3)),
        num_resnet_blocks=int(hparams.get("num_resnet_blocks", 0)),
        hidden_dim=shape_of(state, "encoder.0.0.weight", path)[0],
        channels=shape_of(state, "encoder.0.0.weight", path)[1],
        normalization=None if normalization is None else (tuple(normalization[0]), tuple(normalization[1])),
    )
    with torch.device("meta"):
        model = DiscreteVAE(config)
    return fill(model, state, path)


def load_openai_dvae(encoder: PathLike, decoder: PathLike) -> OpenAIDiscreteVAE:
    """OpenAI's dVAE from its two pickled modules, read as data. Raises CheckpointError when they are not."""
    state: State = {}
    halves = {}
    for half, path in (("encoder", encoder), ("decoder", decoder)):
        halves[half], _ = read_state(path, "a part of OpenAI's dVAE")
    vocab_size, n_init = (
        halves["encoder"]["blocks.output.conv.w"].shape[0],
        halves["decoder"]["blocks.input.w"].shape[0],
    )
    config = OpenAIDiscreteVAEConfig(
        n_hid=halves["encoder"]["blocks.input.w"].shape[0],
        n_init=n_init,
        n_blk_per_group=count(halves["encoder"], r"blocks\.group_1\.block_(\d+)\."),
        vocab_size=vocab_size,
        group_count=count(halves["encoder"], r"blocks\.group_(\d+)\."),
    )
    with torch.device("meta"):
        model = OpenAIDiscreteVAE(config)
    for half, tensors in halves.items():
        # Both sides list the same convolutions from the input to the output, weight before bias.
        for name, tensor in zip((n for n in model.state_dict() if n.startswith(half)), tensors.values(), strict=False):
            state[name] = tensor
    return fill(model, state, f"{encoder}, {decoder}")


def load_vae(
    path: PathLike | tuple[PathLike, PathLike] | None, config: PathLike | None = None, dalle: PathLike | None = None
) -> VQModel | DiscreteVAE | OpenAIDiscreteVAE | None:
    """Whichever VAE `path` holds: a VQGAN, a DiscreteVAE, OpenAI's (encoder.pkl, decoder.pkl). Without a path the
    DiscreteVAE inside the DALL·E checkpoint `dalle`, or None where it has none.
    """
    if path is None:
        found = {} if dalle is None else read_archive(dalle)
        return load_discrete_vae(dalle) if dalle is not None and found.get("vae_params") else None
    if isinstance(path, tuple):
        return load_openai_dvae(*path)
    found = read_archive(path)
    is_discrete = (
        isinstance(found, dict) and isinstance(found.get("weights"), dict) and "codebook.weight" in found["weights"]
    )
    return load_discrete_vae(path) if is_discrete else load_vqgan(path, config)


IMAGE_SIZES = {  # channel multipliers of guided-diffusion's create_model
    (0.5, 1, 1, 2, 2, 4, 4): 512,
    (1, 1, 2, 2, 4, 4): 256,
    (1, 1, 2, 3, 4): 128,
    (1, 2, 3, 4): 64,
}
UNET_DEFAULTS: dict[int, dict[str, Any]] = {  # what sample.py sets for each size and tensors do not tell
    512: {"num_head_channels": 64},
    256: {"num_head_channels": 64},
    128: {"num_heads": 4},
    64: {"num_head_channels": 64, "use_new_attention_order": True, "noise_schedule": "cosine"},
}


def load_unet(path: PathLike, config: PathLike | dict[str, Any] | None = None) -> UNet:
    """guided-diffusion's checkpoint to a UNet in float32 on the CPU; how it was trained is in its config.

    config: the flags of its training (a dictionary or a JSON file) for what the tensors cannot tell: the attention
    heads and the noise schedule. Without it those of the seed's sample.py for 512, 256, 128 and 64 pixels, and of
    super_res.py, are taken. Raises CheckpointError when the file is not one, does not fit, or needs a config.
    """
    state, _ = read_state(path, "a UNet of guided-diffusion")
    flags = read_flags(config)
    model_channels = shape_of(state, "time_embed.0.weight", path)[1]
    outputs = count(state, r"output_blocks\.(\d+)\.")
    # A level's last output block ends with a second residual block or a convolution that doubles the picture.
    doubling = [
        i for i in range(outputs) if any(re.match(rf"output_blocks\.{i}\.[12]\.(in_layers|conv)\.", n) for n in state)
    ]
    blocks = doubling[0] if doubling else outputs - 1
    levels = outputs // (blocks + 1)
    first_of_level = [1 + level * (blocks + 1) for level in range(levels)]
    widths = [shape_of(state, f"input_blocks.{i}.0.out_layers.3.weight", path)[0] for i in first_of_level]
    channel_mult = tuple(width / model_channels for width in widths)
    super_resolution = shape_of(state, "input_blocks.0.0.weight", path)[1] == 6
    image_size = int(flags.get("large_size", flags.get("image_size", IMAGE_SIZES.get(channel_mult, 0))))
    defaults = {"num_heads": 4} if super_resolution else UNET_DEFAULTS.get(image_size, {})
    if not image_size or (config is None and not defaults):
        raise CheckpointError(
            f"{path}: a UNet of an unusual size; give its flags as config to tell its attention heads"
        )
    told = defaults | {name: value for name, value in flags.items() if value not in (-1, "", None)}
    if config is not None and "num_head_channels" in flags and flags["num_head_channels"] == -1:
        told.pop("num_head_channels", None)
    block_out, emb_rows = widths[0], shape_of(state, "input_blocks.1.0.emb_layers.1.weight", path)[0]
    embedding = state.get("external_block.op.weight")
    diffusion = DiffusionConfig(
        diffusion_steps=int(told.get("diffusion_steps", 1000)),
        noise_schedule=str(told.get("noise_schedule", "linear")),
        learn_sigma=shape_of(state, "out.2.weight", path)[0] == 6,
        predict_xstart=bool(told.get("predict_xstart", False)),
        rescale_timesteps=bool(told.get("rescale_timesteps", True)),
    )
    unet_config = UNetConfig(
        model_channels=model_channels,
        channel_mult=channel_mult,
        num_res_blocks=blocks,
        attention_levels=tuple(
            level for level, i in enumerate(first_of_level) if f"input_blocks.{i}.1.qkv.weight" in state
        ),
        image_size=image_size,
        num_heads=int(told.get("num_heads", 4)),
        num_head_channels=told.get("num_head_channels"),
        num_heads_upsample=told.get("num_heads_upsample"),
        use_new_attention_order=bool(told.get("use_new_attention_order", False)),
        use_scale_shift_norm=emb_rows == 2 * block_out,
        resblock_updown=f"input_blocks.{blocks + 1}.0.op.weight" not in state,
        num_classes=shape_of(state, "label_emb.weight", path)[0] if "label_emb.weight" in state else None,
        embedding_dims=None if embedding is None else (embedding.shape[1], embedding.shape[0]),
        super_resolution=super_resolution,
        diffusion=diffusion,
    )
    check_unet_flags(unet_config, flags, path)
    try:
        with torch.device("meta"):
            model = UNet(unet_config)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
    return fill(model, state, path)


def read_flags(config: PathLike | dict[str, Any] | None) -> dict[str, Any]:
    if config is None or isinstance(config, dict):
        return dict(config or {})
    try:
        flags = json.loads(Path(config).read_text())
    except (ValueError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{config}: not JSON ({error}); expected guided-diffusion's flags") from None
    if not isinstance(flags, dict):
        raise CheckpointError(f"{config}: holds {type(flags).__name__}; expected an object of guided-diffusion's flags")
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


def load_clip(path_or_name: PathLike) -> CLIP:
    """CLIP in float32 on the CPU: from OpenAI's TorchScript archive or a state dict (a file), or one of open_clip's
    own by name, as "ViT-B-32/openai", fetched by open_clip.

    Raises CheckpointError for a file that is not one, ValueError for a name that open_clip does not know.
    """
    import open_clip
    from open_clip.model import build_model_from_openai_state_dict
    from open_clip.tokenizer import SimpleTokenizer

    name, _, pretrained = str(path_or_name).partition("/")
    if not Path(path_or_name).exists() and (name, pretrained) in open_clip.list_pretrained():
        model = open_clip.create_model(name, pretrained=pretrained)
        visual: Any = model.visual
        size = visual.image_size[0] if isinstance(visual.image_size, tuple) else visual.image_size
        return CLIP(model, open_clip.get_tokenizer(name), size, visual.image_mean, visual.image_std)
    if not Path(path_or_name).exists() and Path(path_or_name).suffix == "":
        raise ValueError(f"'{path_or_name}' is neither a file nor a model of open_clip, such as 'ViT-B-16/openai'")

    state, _ = read_state(path_or_name, "a CLIP model")
    sizes = ("input_resolution", "context_length", "vocab_size")
    state = {key: value.float() for key, value in state.items() if key not in sizes}
    try:
        model = build_model_from_openai_state_dict(dict(state), cast_dtype=torch.float32).float()
        model.load_state_dict(state)  # once more: open_clip rounds to half precision on the way
    except (KeyError, RuntimeError) as error:
        raise CheckpointError(f"{path_or_name}: does not fit open_clip's CLIP ({error})") from None
    context_length = state["positional_embedding"].shape[0]
    return CLIP(model, SimpleTokenizer(context_length=context_length), model.visual.image_size[0])
