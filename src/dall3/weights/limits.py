"""Upper bounds accepted in config.json: larger settings could exhaust memory or time while a network is built."""

from __future__ import annotations

from typing import Any

LIMITS = {  # by name; 2**20 for all other numbers
    **dict.fromkeys(("num_res_blocks", "num_resnet_blocks", "num_layers", "n_blk_per_group", "group_count"), 16),
    **dict.fromkeys(("depth", "encoder_depth", "decoder_depth"), 256),
    **{"layers": 128, "heads": 256, "grid_size": 128, "cutn": 1024},
    **dict.fromkeys(("text_seq_len", "context_length", "image_size"), 8192),
}
MAX_POSITIONS = 5000  # sequence length of a transformer; building its masks takes 9 bytes per pair of positions


def check_limits(settings: Any, name: str = "") -> None:
    """Raise ValueError for settings above the upper bounds accepted in config.json.

    settings: the content of the file, or a value in it. name: the name of that value.
    """
    if isinstance(settings, dict):
        for key, value in settings.items():
            check_limits(value, key)
        text, grid = (settings.get(key, 16) for key in ("text_seq_len", "grid_size"))
        if "text_seq_len" in settings and text + grid**2 > MAX_POSITIONS:
            raise ValueError(f"a sequence of {text + grid**2} positions; expected at most {MAX_POSITIONS}")
    elif isinstance(settings, list):
        bound = LIMITS["depth"] if name in ("attn_types", "shared_attn_ids", "shared_ff_ids") else 16
        if len(settings) > bound:
            raise ValueError(f"{name} has {len(settings)} entries; expected at most {bound}")
        for value in settings:
            check_limits(value, name)
    elif isinstance(settings, int | float):
        bound = LIMITS.get(name, 2**20)
        if not -bound <= settings <= bound:
            raise ValueError(f"{name}={settings:.6g}; expected at most {bound}")
