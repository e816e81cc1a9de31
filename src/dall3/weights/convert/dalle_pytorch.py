"""Converter for checkpoints of DALLE-pytorch, releases 1.0 to 1.6 and Jack000's fork, to a DalleTransformer."""

from __future__ import annotations

import math
import re

from dall3.models.attention import sparse_pattern
from dall3.models.transformer import DalleTransformer, TransformerConfig, rotary_table
from dall3.weights.archive import file_error
from dall3.weights.convert.state import (
    DALLE,
    Settings,
    State,
    as_bool,
    as_tuple,
    checked,
    count,
    load_tensors,
    read_settings,
    read_state,
    values_of,
    without_weights,
)
from dall3.weights.registry import PathLike

TRANSFORMER_NAMES = [  # substitutions in DALLE-pytorch's parameter names, applied in this order
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
def load_transformer(path: PathLike, hparams: Settings | None = None, release: str | None = None) -> DalleTransformer:
    """Load a checkpoint of DALLE-pytorch, releases 1.0 to 1.6 or Jack000's fork, in float32 on the CPU.

    path: the file, or the folder of a DeepSpeed checkpoint. hparams: the hyper-parameters of the training, a dictionary
    or a JSON file, if the file has none or to override them; DALLE-pytorch's defaults apply to those left out. release:
    the version of DALLE-pytorch, such as "1.4.2", if the file does not contain it. It only affects "conv_like"
    attention, whose window changed in 1.5: files of 1.3 to 1.6 look the same, and 1.5 or later is assumed.

    Raises CheckpointError for a file of another kind, for tensors that do not match the hyper-parameters, and if
    `hparams` are needed.

    >>> transformer = load_transformer("dalle.pt")  # doctest: +SKIP
    """
    found = read_state(path, DALLE)
    tensors, version = found.tensors, found.context.get("version")
    given = read_settings(hparams, "DALLE-pytorch's hyper-parameters")
    settings = values_of(found.context.get("hparams")) | given
    if not settings:
        raise file_error(
            path,
            "has no 'hparams', which the tensors do not determine; pass hparams, a dictionary or a JSON file with "
            "num_text_tokens, text_seq_len, heads, dim_head, attn_types, …",
        )
    state: State = {}
    for name, tensor in tensors.items():
        for pattern, replacement in TRANSFORMER_NAMES:
            name = re.sub(pattern, replacement, name)
        if name.endswith((".scale", "function.bias")):
            tensor = tensor.flatten()
        elif name.endswith(("function.weight", "pos_emb.weight", "transformer.pos_emb")):
            tensor = tensor.reshape(-1, tensor.shape[-1])  # drops leading dimensions of 1
        if not name.startswith("vae.") and ".linear." not in name:  # ".linear.": embeddings shared with the head
            state[name] = tensor
    angles = state.pop("transformer.pos_emb", None)
    layouts = [state.pop(name) for name in list(state) if name.endswith("attn_fn.master_layout")]
    share = "text_emb.weight" not in state

    # Count the wrappers ("fn.") around a layer: norm and scale are two, token shift is one, the caches of 1.3 and later
    # are one.
    functions = [name for name in tensors if name.endswith(("net.0.weight", "to_qkv.weight"))]
    depths = {name.rsplit("fn.")[-1]: name.count("fn.") for name in functions}
    shift = depths.get("net.0.weight", 0) > 2
    has_caches = depths.get("net.0.weight") == 4 or (not shift and depths.get("to_qkv.weight") == 3)
    release = release or (version if isinstance(version, str) else "1.6" if has_caches else "1.1")
    kinds = as_tuple(settings.get("attn_types")) or ("full",)
    if [int(number) for number in re.findall(r"\d+", release)[:2]] >= [1, 5]:
        kinds = tuple("conv_like_causal" if kind == "conv_like" else kind for kind in kinds)
    text_seq_len, text_tokens = int(settings.get("text_seq_len", 256)), int(settings.get("num_text_tokens", 10000))
    vocabulary, dim = state["to_logits.weight"].shape
    # The table of angles covers the whole sequence, or in Jack000's fork all but the last position.
    grid = math.isqrt(len(angles) - text_seq_len) if angles is not None else len(state["row_pos_emb.weight"])
    config = TransformerConfig(
        num_text_tokens=text_tokens,
        num_image_tokens=vocabulary - text_tokens - text_seq_len,
        text_seq_len=text_seq_len,
        dim=dim,
        depth=count(state, r"layers\.(\d+)\."),
        heads=int(settings.get("heads", 8)),
        dim_head=int(settings.get("dim_head", 64)),
        grid_size=grid,
        attn_types=kinds,
        rotary_emb=angles is not None,
        shift_tokens=shift,
        reversible=as_bool(settings.get("reversible", False)),
        stable=as_bool(settings.get("stable", False)),
        sandwich_norm="layers.0.0.norm_out.weight" in state,
        shared_attn_ids=as_tuple(settings.get("shared_attn_ids")),
        shared_ff_ids=as_tuple(settings.get("shared_ff_ids")),
        share_input_output_emb=share,
        loss_img_weight=float(settings.get("loss_img_weight", 7)),
    )
    with without_weights():
        model = DalleTransformer(config)
    if angles is not None:
        state["rotary_table"] = rotary_table(angles, config)
        model.take_rotary_table(state)
    if "sparse" in kinds:  # DeepSpeed runs every layer with the layout of the first
        default = model.get_buffer("sparse_pattern")
        state["sparse_pattern"] = sparse_pattern(layouts[0], config.seq_len) if layouts else default
    return load_tensors(model, state, path)
