"""Converter for DALL·E Mini and Mega: `encoder.pt` and `decoder.pt` of kuprel/min-dalle to a DalleMini."""

from __future__ import annotations

import math
import re

import torch

from dall3.models.dalle_mini import HEAD_WIDTH, DalleMini, DalleMiniConfig
from dall3.weights.archive import file_error
from dall3.weights.convert.state import (
    MINI_DECODER,
    MINI_ENCODER,
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

CODES = {16385: 16384, 16416: 16384}  # size of the codebook, by the rows of the image embedding (Mini, Mega)
# Layer norms whose weight some files leave out; it is 1 then.
WITHOUT_WEIGHT = re.compile(
    r"(final_ln|layers\.\d+\.(pre_self_attn_layer_norm|pre_encoder_attn_layer_norm|glu\.ln[01]))\.bias"
)


@checked
def load_dalle_mini(
    encoder_path: PathLike,
    decoder_path: PathLike,
    hparams: Settings | None = None,
    dtype: torch.dtype | None = torch.float32,
) -> DalleMini:
    """Load DALL·E Mini or Mega from its two files, on the CPU.

    hparams: a dictionary or a JSON file with `num_image_tokens`, the size of the VQGAN's codebook; needed if the
    decoder's image embedding has another number of rows than Mini's or Mega's. dtype: dtype of the weights; tensors
    that have it in the file are memory-mapped, not copied; None as for `load_tensors`.

    Raises CheckpointError for a file of another kind, for files that do not match each other, and if
    `num_image_tokens` is needed.

    >>> mini = load_dalle_mini("encoder.pt", "decoder.pt", dtype=torch.float16)  # doctest: +SKIP
    """
    files, settings = f"{encoder_path}, {decoder_path}", read_settings(hparams, "num_image_tokens")
    encoder, decoder = read_state(encoder_path, MINI_ENCODER).tensors, read_state(decoder_path, MINI_DECODER).tensors
    dim, rows = encoder["embed_tokens.weight"].shape[1], len(decoder["embed_tokens.weight"])
    if decoder["embed_tokens.weight"].shape[1] != dim:
        width = decoder["embed_tokens.weight"].shape[1]
        raise file_error(
            files, f"the encoder has {dim} channels, the decoder {width}; pass both files of Mini or both of Mega"
        )
    codes = CODES.get(rows, settings.get("num_image_tokens"))
    if codes is None:
        raise file_error(
            decoder_path,
            f"its {rows} image embeddings do not determine the number of image tokens; pass "
            "hparams={'num_image_tokens': …}, the size of the VQGAN's codebook",
        )
    if not 0 < int(codes) < rows:
        raise file_error(decoder_path, f"num_image_tokens={codes}; expected less than its {rows} image embeddings")
    config = DalleMiniConfig(
        num_text_tokens=len(encoder["embed_tokens.weight"]),
        num_image_tokens=int(codes),
        text_seq_len=len(encoder["embed_positions.weight"]),
        dim=dim,
        ff_dim=len(encoder["layers.0.glu.fc0.weight"]),
        encoder_depth=count(encoder, r"layers\.(\d+)\."),
        decoder_depth=count(decoder, r"layers\.(\d+)\."),
        grid_size=math.isqrt(len(decoder["embed_positions.weight"])),
    )
    if dim % HEAD_WIDTH:
        raise file_error(files, f"it has {dim} channels; expected a multiple of {HEAD_WIDTH}, the width of a head")
    with without_weights():
        model = DalleMini(config)
    state: State = {}
    for half, tensors in (("text_encoder", encoder), ("image_decoder", decoder)):
        for name, tensor in tensors.items():
            state[f"{half}.{name}"] = tensor
            weight = name.removesuffix("bias") + "weight"
            if WITHOUT_WEIGHT.fullmatch(name) and weight not in tensors:
                state[f"{half}.{weight}"] = torch.ones_like(tensor)
    # The first row after the codes is the start token, which is never sampled. The remaining rows are unused.
    state["lm_head.weight"] = state.pop("image_decoder.lm_head.weight")[: config.num_image_tokens]
    first = "image_decoder.embed_tokens.weight"
    state[first] = state[first][: config.num_image_tokens + 1]
    return load_tensors(model, state, files, dtype)
