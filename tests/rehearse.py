"""Load, draw with and refine with sets of weights, in a separate process: python rehearse.py FOLDER SET …

Prints one line of JSON per set: what was loaded, drawn and refined. The environment variables name the registry and the
cache.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import open_clip
import torch
from PIL import Image

from dall3 import Dall3Pipeline
from dall3.cli import main
from dall3.models.upscaler import Upscaler
from dall3.weights import load_clip
from dall3.weights.cache import CachedFile, files_of
from dall3.weights.download import fetch_file
from dall3.weights.registry import find_set

PROMPTS = {
    "dalle-mini": "a cube made of cloud",
    "dalle-pytorch": "a cube made of cloud",
    "rudalle": "рыжий кот на луне",
}
QUICK = {"seed": 0, "num_inference_steps": 2, "progress": False}


def rehearse(name: str, folder: Path) -> dict[str, object]:
    pipe = Dall3Pipeline.from_pretrained(name, progress=False)
    found: dict[str, object] = {"set": name, "loaded": [part for part, held in pipe.components.items() if held]}
    if pipe.transformer is not None:
        family = getattr(pipe.transformer.config, "text_family", "dalle-pytorch")
        guided = {"cutn": 2} if pipe.clip is not None and pipe.upsampler is not None else {}
        out = pipe(PROMPTS[family], **QUICK, **guided)
        out.save(folder / name)
        found |= {
            "ranked": out.clip_scores is not None,
            "drew": out.coarse_images[0].size,
            "settings": {key: out.settings[key] for key in pipe.defaults},
        }
        found |= {"refined": out.images[0].size} if pipe.upsampler is not None else {}
        if isinstance(pipe.super_resolution, Upscaler):
            small = out.images[0].resize((64, 64))
            fine = pipe.upsample(image=small, stage="super_resolution", output_size=200, progress=False)
            found |= {"enlarged": tuple(fine.shape[:1:-1])}
    for stage in ("upsampler", "super_resolution") if pipe.transformer is None else ():
        if isinstance(getattr(pipe, stage), Upscaler):
            fine = pipe.upsample(image=Image.new("RGB", (64, 64), "blue"), stage=stage, progress=False)
            found |= {"refined": tuple(fine.shape[:1:-1])}
        elif getattr(pipe, stage) is not None:
            blue = Image.new("RGB", (256, 256), "blue")
            smaller = (
                {} if pipe.vqgan is not None else {"output_size": 128}
            )  # a UNet on code embeddings has a fixed size
            fine = pipe.upsample(image=blue, stage=stage, strength=0.4, **smaller, **QUICK)
            found |= {"refined": tuple(fine.shape[:1:-1])}
    files = files_of(find_set(name))
    found |= {"files": [one.file.name for one in files], "bytes": sum(one.find().stat().st_size for one in files)}
    own = [one for one in files if one.part.cache_folder.startswith(f"{name}/")]
    return found | {"places": sum(map(try_places, own))}


def try_places(one: CachedFile) -> int:
    """Download a file from each of its places separately, and read it. Returns the number of places."""
    places = [place for place in one.file.places if place.path is None]
    for i, place in enumerate(places):
        # In an empty folder of the cache, so that a file without a SHA-256 is checked by content.
        part = replace(one.part, cache_folder=f"{one.part.cache_folder}/place{i}")
        path = fetch_file(replace(one, part=part, file=replace(one.file, places=(place,))), progress=False)
        if part.name == "clip" and not part.beside:
            assert load_clip(path, part.settings).image_size == 64
    return len(places)


def rehearse_open_clip(name: str) -> dict[str, object]:
    """Load a CLIP by its open_clip name, with the sizes of the small files; then load it again offline."""
    size: dict[str, dict[str, int]] = {
        "vision_cfg": {"image_size": 64, "layers": 2, "width": 64, "patch_size": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 2},
    }
    open_clip.factory._MODEL_CONFIGS[name.partition("/")[0]] = {"embed_dim": 32, **size}
    features = load_clip(name).embed_text(["a red cube"])
    os.environ["DALL3_OFFLINE"] = "1"
    clip = load_clip(name)
    del os.environ["DALL3_OFFLINE"]
    assert torch.equal(clip.embed_text(["a red cube"]), features) and clip.config is not None
    return {"open_clip": name, "quick_gelu": clip.config.quick_gelu, "features": features[0].tolist()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    outputs = Path(sys.argv[1])
    for name in sys.argv[2:]:
        print(json.dumps(rehearse(name, outputs)), flush=True)
    for name in ("ViT-B-16/openai", "ViT-B-32/laion2b_s34b_b79k"):
        print(json.dumps(rehearse_open_clip(name)), flush=True)
    words = [
        "generate",
        "--weights",
        "dalle-mega",
        "--num_images",
        "1",
        "--num_inference_steps",
        "2",
        "--device",
        "cpu",
    ]
    assert main([*words, "a cube made of cloud", "--outputs_dir", str(outputs / "cli")]) == 0
    assert main([*words, "рыжий кот", "--outputs_dir", str(outputs / "refused")]) != 0
