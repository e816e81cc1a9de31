"""Converter for checkpoints of ruDALL-E (Malevich, Emojich, Surrealist) to a Rudalle."""

from __future__ import annotations

import torch

from dall3.models.rudalle import Rudalle, RudalleConfig
from dall3.weights.archive import CheckpointError, file_error
from dall3.weights.convert.state import (
    RUDALLE,
    Settings,
    State,
    checked,
    count,
    load_tensors,
    read_settings,
    read_state,
    without_weights,
)
from dall3.weights.registry import PathLike

HEADS = {2048: 16}  # heads of the released models, by their width
MASKS = ("row_mask", "col_mask", "conv_mask")  # buffers, with or without the prefix "transformer."


@checked
def load_rudalle(path: PathLike, hparams: Settings | None = None, dtype: torch.dtype | None = torch.float32) -> Rudalle:
    """Load a checkpoint of ru-dalle, on the CPU.

    hparams: a dictionary or a JSON file with ru-dalle's names. `num_attention_heads` is needed for a width other than
    2,048; `hf_version` ("v2" or "v3") for a file without masks. Other settings are compared with the tensors. dtype:
    dtype of the weights; tensors that have it in the file are memory-mapped, not copied; None as for `load_tensors`.

    Raises CheckpointError for a file of another kind, for hparams that contradict the tensors, and if `hparams` are
    needed.

    >>> malevich = load_rudalle("pytorch_model.bin", dtype=torch.float16)  # doctest: +SKIP
    """
    found, settings = dict(read_state(path, RUDALLE).tensors), read_settings(hparams, "ru-dalle's hyper-parameters")
    masks = {name: found.pop(key) for name in MASKS for key in (name, f"transformer.{name}") if key in found}
    text_seq_len, dim = len(found["text_pos_embeddings.weight"]) - 1, found["text_pos_embeddings.weight"].shape[1]
    grid, vocabulary = len(found["image_row_embeddings.weight"]), len(found["text_embeddings.weight"])
    heads = settings.get("num_attention_heads", HEADS.get(dim))
    if heads is None:
        raise file_error(
            path, f"its {dim} channels do not determine the number of heads; pass hparams={{'num_attention_heads': …}}"
        )
    version = settings.get("hf_version")
    if version is None:
        if "conv_mask" not in masks:
            raise file_error(
                path, "has no conv_mask, which determines its version; pass hparams={'hf_version': 'v2' or 'v3'}"
            )
        # The convolutional window wraps around only in v2: there, the end of the first row attends to its start.
        version = "v2" if bool(masks["conv_mask"][text_seq_len + grid - 1, text_seq_len]) else "v3"
    config = RudalleConfig(
        num_text_tokens=vocabulary - text_seq_len,
        num_image_tokens=len(found["image_embeddings.weight"]),
        text_seq_len=text_seq_len,
        dim=dim,
        depth=count(found, r"transformer\.layers\.(\d+)\."),
        heads=int(heads),
        grid_size=grid,
        version=version,
        loss_img_weight=float(settings.get("loss_img_weight", 7)),
    )
    from_tensors = {
        **{"num_layers": config.depth, "hidden_size": dim, "text_seq_length": text_seq_len, "vocab_size": vocabulary},
        **{"image_tokens_per_dim": grid, "image_vocab_size": config.num_image_tokens},
    }
    for name, value in from_tensors.items():
        if settings.get(name, value) != value:
            raise CheckpointError(f"the hparams say {name}={settings[name]}, but {path} has {value}")
    with without_weights():
        model = Rudalle(config)
    return load_tensors(model, found, path, dtype)


def without_dwt_names(tensors: State) -> State:
    """Rename the tensors of ruDALL-E's VQGAN with a Haar transform to taming's names; return other tensors unchanged.

    Its decoder has a post_quant_conv of its own, which replaces the one outside. The filters of the transform are
    constants and left out.
    """
    prefix = "decoder."
    if f"{prefix}post_quant_conv.weight" not in tensors:
        return tensors
    state: State = {}
    for name, tensor in tensors.items():
        if name.startswith(prefix) and not name.startswith(f"{prefix}idwt."):
            state[name.removeprefix(prefix)] = tensor
        elif not name.startswith((prefix, "post_quant_conv.")):
            state[name] = tensor
    return state
