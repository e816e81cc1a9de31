"""The door to all transformers: which family a checkpoint is of is read off its tensors."""

from __future__ import annotations

import torch

from dall3.models.dalle_mini import DalleMini
from dall3.models.rudalle import Rudalle
from dall3.models.transformer import DalleTransformer
from dall3.weights.archive import one_line
from dall3.weights.convert.dalle_mini import load_dalle_mini
from dall3.weights.convert.dalle_pytorch import load_transformer as load_dalle_pytorch
from dall3.weights.convert.rudalle import load_rudalle
from dall3.weights.convert.state import DALLE, MINI_DECODER, MINI_ENCODER, RUDALLE, Settings, read_state
from dall3.weights.registry import PathLike


def load_transformer(
    path: PathLike | tuple[PathLike, PathLike],
    hparams: Settings | None = None,
    release: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> DalleTransformer | DalleMini | Rudalle:
    """Load a transformer of any family, on the CPU: DALLE-pytorch's, DALL·E Mini or Mega, ruDALL-E.

    path: the checkpoint; of DALL·E Mini and Mega the pair (encoder.pt, decoder.pt). hparams: a dictionary or a JSON
    file, for what the tensors do not tell: DALLE-pytorch's and ru-dalle's own hyper-parameters, `num_image_tokens` of
    DALL·E Mini. The released files need none. release: see `dalle_pytorch.load_transformer`. dtype: of the weights;
    tensors that have it in the file are mapped from it, not copied.

    Raises CheckpointError when a file is not one, does not fit, or needs hparams.

    >>> mega = load_transformer(("encoder.pt", "decoder.pt"), dtype=torch.float16)  # doctest: +SKIP
    """
    if isinstance(path, tuple | list):
        encoder, decoder = path
        return load_dalle_mini(encoder, decoder, hparams, dtype)
    kind = read_state(path, DALLE, RUDALLE, MINI_DECODER, MINI_ENCODER).kind
    if kind in (MINI_DECODER, MINI_ENCODER):
        raise one_line(path, f"is {kind}; give both of its files, (encoder.pt, decoder.pt)")
    if kind == RUDALLE:
        return load_rudalle(path, hparams, dtype)
    return load_dalle_pytorch(path, hparams, release).to(dtype)
