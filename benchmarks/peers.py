"""Other programs that speed.py measures: min-dalle's networks and diffusers' UNet2DModel, with random weights.

Run as a program, it draws once and prints its peak memory in MB: python benchmarks/peers.py FOLDER PROGRAM DEPTH IMAGES
FILES, where FILES is a folder with encoder.pt and decoder.pt.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dall3.tokens.decoding import draw_image_tokens
from dall3.tokens.sampling import Sampling
from dall3.tokens.seeds import candidate_uniforms
from dall3.weights.convert.dalle_mini import load_dalle_mini

WORDS, CODES, TEXT, DIM, HEADS, HIDDEN, PLACES = 50264, 16384, 64, 1024, 16, 2730, 256  # DALL·E Mini
GUIDANCE, TOP_K = 10, 256
Draw = Callable[[int], Tensor]  # the number of images -> their tokens


def text_ids() -> Tensor:
    ids = torch.ones(TEXT, dtype=torch.int64)
    ids[:6] = torch.tensor([0, 10, 11, 12, 13, 2])
    return ids


def make_min_dalle(folder: Path, depth: int) -> tuple[Any, Any]:
    """min-dalle's encoder and decoder with random weights that float16 represents exactly."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    models = importlib.import_module("min_dalle.models")
    torch.manual_seed(0)
    sizes: dict[str, Any] = dict(embed_count=DIM, attention_head_count=HEADS, glu_embed_count=HIDDEN)
    sizes |= dict(layer_count=depth, device="cpu")
    encoder = models.DalleBartEncoder(text_vocab_count=WORDS, text_token_count=TEXT, **sizes)
    decoder = models.DalleBartDecoder(image_vocab_count=CODES, **sizes)
    return encoder.half().float().eval(), decoder.half().float().eval()


@torch.no_grad()
def draw_min_dalle(encoder: Any, decoder: Any, depth: int, pictures: int) -> Tensor:
    """The loop of `MinDalle.generate_raw_image_stream`."""
    texts = torch.ones(2, TEXT, dtype=torch.int64)
    texts[0, :2], texts[1] = torch.tensor([0, 2]), text_ids()
    rows = [0] * pictures + [1] * pictures
    encoded, texts = encoder(texts)[rows], texts[rows]
    state = torch.zeros(depth, 4 * pictures, PLACES, DIM)
    tokens, places = torch.full((pictures, PLACES + 1), CODES - 1), torch.arange(PLACES)
    settings = torch.tensor([1.0, TOP_K, GUIDANCE])
    for i in range(PLACES):
        how = dict(settings=settings, attention_mask=(texts != 1)[:, None, None], encoder_state=encoded)
        how |= dict(attention_state=state, prev_tokens=tokens[:, [i]], token_index=places[[i]])
        tokens[:, i + 1], state = decoder.sample_tokens(**how)
    return tokens[:, 1:]


def save_files(encoder: Any, decoder: Any, folder: Path) -> None:
    """Write min-dalle's weights as the published files, in half precision."""
    for model, name in ((encoder, "encoder.pt"), (decoder, "decoder.pt")):
        torch.save({name: tensor.half() for name, tensor in model.state_dict().items()}, folder / name)


def load_ours(folder: Path) -> Any:
    """Our transformer, loaded as `from_pretrained` does on a CPU: memory-mapped in half precision."""
    return load_dalle_mini(folder / "encoder.pt", folder / "decoder.pt", dtype=None)


def draw_ours(transformer: Any, pictures: int) -> Tensor:
    settings = Sampling(cond_scale=GUIDANCE, top_k=TOP_K)
    return draw_image_tokens(transformer, text_ids(), candidate_uniforms(0, range(pictures), PLACES), settings)


def mini_pair(folder: Path, depth: int, files: Path) -> dict[str, Draw]:
    """Functions of both programs that draw with the same weights, which are written to the folder `files`."""
    encoder, decoder = make_min_dalle(folder, depth)
    save_files(encoder, decoder, files)
    ours = load_ours(files)
    return {
        "ours": lambda pictures: draw_ours(ours, pictures),
        "min-dalle 0.4.11": lambda pictures: draw_min_dalle(encoder, decoder, depth, pictures),
    }


def make_unet2d(device: str) -> Any:
    """diffusers' UNet2DModel with the channels, blocks and attention of speed.py's UNet; None without diffusers."""
    try:
        diffusers = importlib.import_module("diffusers")
    except ImportError:
        return None
    torch.manual_seed(0)
    attention = [False, False, False, True, True, True]
    model = diffusers.UNet2DModel(
        sample_size=256,
        out_channels=6,
        block_out_channels=(32, 32, 64, 64, 128, 128),
        down_block_types=tuple("AttnDownBlock2D" if there else "DownBlock2D" for there in attention),
        up_block_types=tuple("AttnUpBlock2D" if there else "UpBlock2D" for there in reversed(attention)),
        layers_per_block=2,
        attention_head_dim=64,
        resnet_time_scale_shift="scale_shift",
        downsample_type="resnet",
        upsample_type="resnet",
    )
    return torch.no_grad()(model.to(device).eval())


def main() -> None:
    folder, program, depth, pictures = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    files = Path(sys.argv[5])
    if program == "ours":
        draw_ours(load_ours(files), pictures)
    else:
        halves = make_min_dalle(folder, depth)
        for half, name in zip(halves, ("encoder.pt", "decoder.pt"), strict=True):  # as `MinDalle` loads them
            half.load_state_dict(torch.load(files / name, map_location="cpu"))
        draw_min_dalle(*halves, depth, pictures)
    # ru_maxrss would include the memory of the process that started this one.
    status = Path("/proc/self/status").read_text()
    print(int(status.split("VmHWM:")[1].split()[0]) / 1024)


if __name__ == "__main__":
    main()
