"""Every set of weights.toml, from its name to a refined and saved image.

A server on this machine provides each file with its published name, format and place, but with a small random network.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save as save_safetensors

from dall3.models.unet import UNet, UNetConfig
from dall3.weights.registry import PART_NAMES, bundled_registry_path, read_toml
from test_checkpoints import save_torchscript
from test_families_mini import save_halves
from test_upscaler import real_esrgan_file

from fill import state_dict
from hub import Hub
from originals import GOLDEN, Golden, openai_clip, save_dalle, save_vqgan

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning", "ignore:.torch.jit:DeprecationWarning")

USUAL = (1, 1, 2, 2, 4, 4)
UNETS = {  # the published architectures with fewer channels
    "dall3": UNetConfig(32, USUAL, 2, (3, 4, 5), 256, num_head_channels=64, embedding_dims=(32, 64)),
    "dall3-super-resolution": UNetConfig(32, USUAL, 2, (3, 4, 5), 256, super_resolution=True),
    "openai-256-uncond": UNetConfig(32, USUAL, 2, (3, 4, 5), 256, num_head_channels=64),
    "openai-512-uncond": UNetConfig(64, (0.5, 1, 1, 2, 2, 4, 4), 2, (4, 5, 6), 512, num_head_channels=64),
    "pixel-art": UNetConfig(*(32, USUAL, 2, (4,), 256), num_heads=1, use_scale_shift_norm=False, resblock_updown=False),
}
UNETS |= {"watercolour": UNETS["pixel-art"], "rudalle": UNETS["dall3"]}
SMALLER: dict[str, dict[str, Any]] = {  # settings that the published sizes determine, but small ones do not
    "pixel-art/upsampler": {"num_channels": 32},
    "watercolour/upsampler": {"num_channels": 32},
    **{
        f"rudalle-{name}/transformer": {"num_attention_heads": 4}
        for name in ("malevich", "malevich-v2", "emojich", "surrealist")
    },
}
PICTURES = {"dalle-mega": (256, 256), "rudalle-malevich": (256, 256), "dalle-pytorch-cc": (128, 128)}


def saved(value: Any, save: Callable[[Any, Any], Any] = torch.save) -> bytes:
    buffer = io.BytesIO()
    save(value, buffer)
    return buffer.getvalue()


def halves(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}


def unet_file(config: UNetConfig) -> bytes:
    torch.manual_seed(0)
    return saved(halves(UNet(config).state_dict()))


def community_dalle(folder: Path) -> bytes:
    """DALLE-pytorch's checkpoint with CLIP's 49,408 tokens and a VQGAN of 64 codes."""
    golden = Golden("dalle_default")
    keys = json.loads((golden.folder / "keys.json").read_text())
    words = 49408 + 24
    for name, rows in (("text_emb.weight", words), ("image_emb.weight", 64), ("to_logits.1.weight", words + 64)):
        keys[name]["shape"][0] = rows
    keys["to_logits.1.bias"]["shape"] = [words + 64]
    golden.weights = lambda: Golden("dalle_default").weights() | state_dict(keys)  # type: ignore[method-assign]
    golden.about["hparams"]["num_text_tokens"] = 49408
    return save_dalle(folder / "community.pt", golden).read_bytes()


def true_files(folder: Path) -> dict[str, bytes]:
    """The files by "set/part", those of a part's config by "set/part/config", and by the place if the place has
    other bytes.
    """
    golden = {name: (GOLDEN / name) for name in ("tokenizer", "tokenizer_mini", "tokenizer_ru", "vqgan")}
    encoder, decoder = (path.read_bytes() for path in save_halves(folder, torch.float16))
    vocabulary, merges = ((golden["tokenizer_mini"] / name).read_bytes() for name in ("vocab.json", "merges.txt"))
    save_torchscript(openai_clip(), folder / "ViT-B-16.pt")
    lightning = save_vqgan(folder / "last.ckpt", Golden("gumbel_vq")).read_bytes()
    found = {
        "dall3/tokenizer": (golden["tokenizer"] / "bpe.model").read_bytes(),
        "dall3/transformer": save_dalle(folder / "dalle-latest.pt", Golden("dalle_default")).read_bytes(),
        "dall3/vqgan": lightning,
        "hf:neggles/vaedump/taming/vq-gumbel-f8-8192/model.ckpt": saved({"state_dict": Golden("gumbel_vq").weights()}),
        "dall3/clip": (folder / "ViT-B-16.pt").read_bytes(),
        "hf:timm/vit_base_patch16_clip_224.openai/open_clip_model.safetensors": save_safetensors(
            Golden("clip_vit").weights()
        ),
        "real-esrgan-x4/super_resolution": real_esrgan_file(folder / "RealESRGAN_x4plus.pth").read_bytes(),
        "rudalle/vqgan": lightning,
        "dalle-mega/vqgan": saved(Golden("vqgan_f16").weights()),
        "rudalle-malevich/tokenizer": (golden["tokenizer_ru"] / "bpe.model").read_bytes(),
        "rudalle-malevich/transformer": saved(halves(Golden("rudalle_v3").weights())),
        "rudalle-malevich/clip": saved(Golden("ruclip").weights()),
        "rudalle-malevich/clip/config.json": json.dumps(Golden("ruclip").about["architecture"]).encode(),
        "rudalle-malevich/clip/bpe.model": (golden["tokenizer_ru"] / "bpe.model").read_bytes(),
        "rudalle-malevich/vqgan": saved({"state_dict": Golden("rudalle_dwt").weights()}),
        "rudalle-malevich-v2/transformer": saved(halves(Golden("rudalle_v2").weights())),
        "rudalle-emojich/transformer": saved(halves(Golden("rudalle_v2").weights())),
        "rudalle-surrealist/transformer": saved(halves(Golden("rudalle_v3").weights())),
        "dalle-pytorch-cc/transformer": community_dalle(folder),
        "dalle-pytorch-cc/vqgan": save_vqgan(folder / "f16.ckpt", Golden("vqgan")).read_bytes(),
        "dalle-pytorch-cc/vqgan/config": (golden["vqgan"] / "model.yaml").read_bytes(),
    }
    for name in ("dalle-mega", "dalle-mini"):
        found |= {f"{name}/transformer": encoder, f"{name}/transformer/config": decoder}
        found |= {f"{name}/tokenizer": vocabulary, f"{name}/tokenizer/config": merges}
    for name, config in UNETS.items():
        stage = "super_resolution" if config.super_resolution else "upsampler"
        found[f"{name}/{stage}"] = unet_file(config)
    return found


def toml_of(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{json.dumps(key)} = {toml_of(inner)}" for key, inner in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml_of, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


class Rehearsal:
    """weights.toml with the sizes and hashes of the small files, and plain hosts mapped to loopback; and the server."""

    def __init__(self, folder: Path) -> None:
        self.files = true_files(folder)
        self.hub = Hub({})
        self.sets = {name: table for name, table in read_toml(bundled_registry_path()).items() if name != "mini"}
        for name, table in self.sets.items():
            for part in PART_NAMES:
                if part in table and "same_as" not in table[part]:
                    self.place(table[part], f"{name}/{part}")
                    told = table[part].get("settings", {}) | SMALLER.get(f"{name}/{part}", {})
                    table[part] |= {"settings": told} if told else {}
        path = "/laion/CLIP-ViT-B-32-laion2B-s34B-b79K/resolve/main/open_clip_pytorch_model.bin"
        self.hub.files[path] = saved(Golden("clip_vit").weights())
        self.hub.hashes = {hashlib.sha256(data).hexdigest(): data for data in self.hub.files.values()}
        lines = []
        for name, table in self.sets.items():
            lines += [f"[{name}]", *(f"{key} = {toml_of(value)}" for key, value in table.items())]
        (folder / "weights.toml").write_text("\n".join(lines) + "\n", encoding="utf-8")

    def place(self, table: dict[str, Any], key: str) -> None:
        """Put a file at each of its places on the server, and update its table."""
        if table["places"][0].startswith("package:") if isinstance(table["places"][0], str) else False:
            return
        data = self.files[key]
        describe(table, data)
        for i, place in enumerate(table["places"]):
            url = place["url"] if isinstance(place, dict) else place
            bytes_there = self.files[url] if isinstance(place, dict) else data
            if url.startswith("hf:"):
                owner, name, path = url.removeprefix("hf:").split("/", 2)
                self.hub.files[f"/{owner}/{name}/resolve/main/{path}"] = bytes_there
            else:
                self.hub.files[f"/{url.removeprefix('https://')}"] = bytes_there
                url = f"{self.hub.url}/{url.removeprefix('https://')}"
            table["places"][i] = url
            if isinstance(place, dict):
                describe(place, bytes_there)
                table["places"][i] = place | {"url": url}
        if "config" in table:
            self.place(table["config"], f"{key}/config")
        for one in table.get("beside", []):
            self.place(one, f"{key}/{one['file']}")


def describe(table: dict[str, Any], data: bytes) -> None:
    """Give a file in weights.toml the size and hash of the small file, where those of the published one are known."""
    known = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    table.update({name: value for name, value in known.items() if name in table})


def test_every_set_from_its_name_to_a_saved_picture(tmp_path: Path) -> None:
    rehearsal = Rehearsal(tmp_path)
    rehearsal.hub.break_off = {"/lfs/" + hashlib.sha256(rehearsal.files["dalle-mega/vqgan"]).hexdigest()}
    threading.Thread(target=rehearsal.hub.serve_forever, daemon=True).start()
    there = {"HF_ENDPOINT": rehearsal.hub.url, "DALL3_WEIGHTS": str(tmp_path / "weights.toml")}
    there |= {"DALL3_HOME": str(tmp_path / "home"), "HF_HOME": str(tmp_path / "hf")}
    command = [sys.executable, str(Path(__file__).with_name("rehearse.py")), str(tmp_path / "out"), *rehearsal.sets]
    ran = subprocess.run(command, env=os.environ | there, capture_output=True, text=True, encoding="utf-8")
    rehearsal.hub.shutdown()
    assert ran.returncode == 0, ran.stderr[-3000:]
    lines = [json.loads(line) for line in ran.stdout.splitlines() if line.startswith("{")]
    rows = {row["set"]: row for row in lines if "set" in row}
    openai, laion = (row for row in lines if "open_clip" in row)
    assert openai["quick_gelu"] and not laion["quick_gelu"] and openai["features"] != laion["features"]
    for row in rows.values():
        shown = (row.get("drew"), row.get("refined"), row.get("enlarged"), row["places"])
        print(f"{row['set']:24} {len(row['files']):2} files {row['bytes']:>11,} bytes", *row["loaded"], *shown)
    assert rows.keys() == rehearsal.sets.keys()
    for name, table in rehearsal.sets.items():
        parts = [part for part in PART_NAMES if part in table]
        loaded = {"text_encoder" if part == "tokenizer" else part for part in parts}
        assert set(rows[name]["loaded"]) == loaded
        refines = "upsampler" in loaded or ("super_resolution" in loaded and "transformer" not in loaded)
        assert ("refined" in rows[name]) == refines
        assert ("drew" in rows[name]) == ("transformer" in loaded)
        assert rows[name].get("ranked", False) == ({"transformer", "clip"} <= loaded)
        wanted = {key: value for key, value in table.get("defaults", {}).items() if key != "num_inference_steps"}
        assert {key: rows[name]["settings"][key] for key in wanted} == wanted
        enlarged = "drew" in rows[name] and "super_resolution" in loaded
        assert rows[name].get("enlarged") == ([200, 200] if enlarged else None)
        if "drew" in rows[name]:
            assert (tmp_path / "out" / name / "0.png").is_file()
    for name, size in PICTURES.items():
        assert tuple(rows[name]["drew"]) == size
    assert rows["rudalle-malevich"]["refined"] == [512, 512] and rows["dalle-mega"]["refined"] == [256, 256]
    resumed = [wanted for _, path, wanted in rehearsal.hub.log if wanted and path.startswith("/lfs/")]
    assert resumed == [f"bytes={len(rehearsal.files['dalle-mega/vqgan']) // 3}-"]
    assert (tmp_path / "out/cli/a_cube_made_of_cloud/0-fine.png").is_file()
    assert "DALL·E Mini cannot read the prompt" in ran.stderr and not (tmp_path / "out/refused").exists()
