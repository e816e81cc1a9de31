"""ruDALL-E's files (Malevich, Emojich, Surrealist) to a Rudalle."""

from __future__ import annotations

import torch

from dall3.models.rudalle import Rudalle, RudalleConfig
from dall3.weights.archive import CheckpointError, one_line
from dall3.weights.convert.state import (
    RUDALLE,
    Settings,
    State,
    checked,
    count,
    fill,
    read_settings,
    read_state,
    without_weights,
)
from dall3.weights.registry import PathLike

HEADS = {2048: 16}  # of the released models, by their width
MASKS = ("row_mask", "col_mask", "conv_mask")  # computed, not learned; the oldest file has them without a prefix


@checked
def load_rudalle(path: PathLike, hparams: Settings | None = None, dtype: torch.dtype = torch.float32) -> Rudalle:
    """Load ru-dalle's checkpoint, on the CPU. Tensors that are of `dtype` in it are mapped, not copied.

    hparams: ru-dalle's own names, a dictionary or a JSON file: `num_attention_heads` for another width than 2,048,
    `hf_version` ("v2" or "v3") for a file without its masks. Other sizes are read off the tensors and compared.

    Raises CheckpointError when the file is not one, does not fit, or needs hparams.
    """
    found, settings = dict(read_state(path, RUDALLE).tensors), read_settings(hparams, "ru-dalle's hyper-parameters")
    masks = {name: found.pop(key) for name in MASKS for key in (name, f"transformer.{name}") if key in found}
    text_seq_len, dim = len(found["text_pos_embeddings.weight"]) - 1, found["text_pos_embeddings.weight"].shape[1]
    grid, vocabulary = len(found["image_row_embeddings.weight"]), len(found["text_embeddings.weight"])
    heads = settings.get("num_attention_heads", HEADS.get(dim))
    if heads is None:
        raise one_line(
            path, f"it is {dim} channels wide, which does not tell its heads; give hparams={{'num_attention_heads': …}}"
        )
    version = settings.get("hf_version")
    if version is None:
        if "conv_mask" not in masks:
            raise one_line(path, "has no conv_mask to tell its rules by; give hparams={'hf_version': 'v2' or 'v3'}")
        # Whether the last place of the grid's first row sees the first: the window wraps in v2 alone.
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
    said = {
        **{"num_layers": config.depth, "hidden_size": dim, "text_seq_length": text_seq_len, "vocab_size": vocabulary},
        **{"image_tokens_per_dim": grid, "image_vocab_size": config.num_image_tokens},
    }
    for name, value in said.items():
        if settings.get(name, value) != value:
            raise CheckpointError(f"the hparams say {name}={settings[name]}, but {path} has {value}")
    with without_weights():
        model = Rudalle(config)
    return fill(model, found, path, dtype)


def without_dwt_names(tensors: State) -> State:
    """The tensors of the VQGAN whose decoder ends in a Haar transform by taming's names; others as they are.

    Its decoder has a post_quant_conv of its own, and the one outside of it is not used. The filters are not learned.
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
