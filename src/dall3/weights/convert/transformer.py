"""Loader for transformers of all families. The family is recognised from the names of the tensors."""

from __future__ import annotations

import torch

from dall3.models.dalle_mini import DalleMini
from dall3.models.rudalle import Rudalle
from dall3.models.transformer import DalleTransformer
from dall3.weights.archive import file_error
from dall3.weights.convert.dalle_mini import load_dalle_mini
from dall3.weights.convert.dalle_pytorch import load_transformer as load_dalle_pytorch
from dall3.weights.convert.rudalle import load_rudalle
from dall3.weights.convert.state import DALLE, MINI_DECODER, MINI_ENCODER, RUDALLE, Settings, read_state
from dall3.weights.registry import PathLike


def load_transformer(
    path: PathLike | tuple[PathLike, PathLike],
    hparams: Settings | None = None,
    release: str | None = None,
    dtype: torch.dtype | None = torch.float32,
) -> DalleTransformer | DalleMini | Rudalle:
    """Load a transformer of any family, on the CPU: DALLE-pytorch, DALL·E Mini or Mega, ruDALL-E.

    path: the checkpoint; for DALL·E Mini and Mega the pair (encoder.pt, decoder.pt). hparams: a dictionary or a JSON
    file with the settings that the tensors do not determine: the hyper-parameters of DALLE-pytorch or ru-dalle, or
    `num_image_tokens` of DALL·E Mini. The released files need none. release: the version of DALLE-pytorch, such as
    "1.4.2"; see `dall3.weights.convert.dalle_pytorch.load_transformer`. dtype: dtype of the weights; tensors that have
    it in the file are memory-mapped, not copied. None: float32, but float16 for a float16 file of DALL·E Mini, Mega or
    ruDALL-E, if this CPU can multiply by float16 weights; drawing on it computes in float32.

    Raises CheckpointError for a file of another kind, for tensors that do not match the settings, and if `hparams` are
    needed.

    >>> mega = load_transformer(("encoder.pt", "decoder.pt"), dtype=torch.float16)  # doctest: +SKIP
    """
    if isinstance(path, tuple | list):
        encoder, decoder = path
        return load_dalle_mini(encoder, decoder, hparams, dtype)
    kind = read_state(path, DALLE, RUDALLE, MINI_DECODER, MINI_ENCODER).kind
    if kind in (MINI_DECODER, MINI_ENCODER):
        raise file_error(path, f"is {kind}; pass both files, (encoder.pt, decoder.pt)")
    if kind == RUDALLE:
        return load_rudalle(path, hparams, dtype)
    return load_dalle_pytorch(path, hparams, release).to(dtype)
