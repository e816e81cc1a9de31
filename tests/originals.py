"""What the originals computed (tests/golden), and checkpoint files in the originals' own formats made from it."""

from __future__ import annotations

import collections
import json
import shutil
import sys
import types
from pathlib import Path

import torch
from safetensors.torch import load_file

from fill import state_dict

GOLDEN = Path(__file__).parent / "golden"


class Golden:
    """One folder of golden numbers: `golden.expected["logits"]`, `golden.weights()`, `golden.about`."""

    def __init__(self, name: str) -> None:
        self.folder = GOLDEN / name
        self.expected = load_file(self.folder / "expected.safetensors")
        for settings in ("about.json", "config.json", "hparams.json"):
            if (self.folder / settings).exists():
                self.about = json.loads((self.folder / settings).read_text())

    def weights(self) -> dict[str, torch.Tensor]:
        """The original checkpoint's tensors, to the bit."""
        weights = state_dict(json.loads((self.folder / "keys.json").read_text()))
        buffers = self.folder / "buffers.safetensors"
        return weights | (load_file(buffers) if buffers.exists() else {})


def save_dalle(path: Path, golden: Golden, **more) -> Path:
    """A DALL·E checkpoint as DALLE-pytorch's train_dalle.py writes it."""
    hparams = golden.about["hparams"]
    found = {"hparams": hparams, "vae_params": None, "epoch": 2, "weights": golden.weights(), "opt_state": {}}
    torch.save(found | {"scheduler_state": None} | more, path)
    return path


def first_layer(golden: Golden) -> Golden:
    """A DALL·E of the first layer only, which draws in a third of the time."""
    weights = golden.weights()
    kept = {name: tensor for name, tensor in weights.items() if ".layers.layers." not in name or ".layers.layers.0." in name}
    golden.weights = lambda: kept  # type: ignore[method-assign]
    golden.about["hparams"]["depth"] = 1
    return golden


def save_vqgan(path: Path, golden: Golden) -> Path:
    """A VQGAN checkpoint as Lightning writes it: a class as a dictionary key, a loss network beside the weights."""
    names = ["pytorch_lightning", "pytorch_lightning.callbacks", "pytorch_lightning.callbacks.model_checkpoint"]
    modules = {name: types.ModuleType(name) for name in names}
    checkpoint_class = type("ModelCheckpoint", (), {"__module__": names[-1]})
    modules[names[-1]].ModelCheckpoint = checkpoint_class
    sys.modules.update(modules)
    try:
        weights = collections.OrderedDict(golden.weights())
        weights["loss.discriminator.main.0.weight"] = torch.zeros(4, 3, 4, 4)
        found = {"epoch": 3, "global_step": 7, "pytorch-lightning_version": "1.0.8", "state_dict": weights}
        found |= {"callbacks": {checkpoint_class: {"best_model_score": torch.tensor(1.0)}}, "lr_schedulers": []}
        torch.save(found, path)
    finally:
        for name in names:
            del sys.modules[name]
    return path


def openai_clip() -> dict[str, torch.Tensor]:
    """The tensors of OpenAI's CLIP, with the sizes that its file has beside them."""
    golden = Golden("clip_vit")
    about = golden.about["architecture"]
    sizes = {
        "input_resolution": about["image_resolution"],
        **{name: about[name] for name in ("context_length", "vocab_size")},
    }
    return golden.weights() | {name: torch.tensor(size) for name, size in sizes.items()}


def save_seedset(folder: Path) -> Path:
    """The files that the seed's README downloads, in the same formats and under the same names, with small networks
    and weights by rule: what comes out is noise, but every format, name and step is real.
    """
    (folder / "vqgan_gumbel_f8").mkdir(parents=True, exist_ok=True)
    shutil.copy(GOLDEN / "tokenizer" / "bpe.model", folder / "bpe.model")
    save_dalle(folder / "dalle-latest.pt", first_layer(Golden("dalle_default")))
    save_vqgan(folder / "vqgan_gumbel_f8" / "last.ckpt", Golden("gumbel_vq"))
    shutil.copy(GOLDEN / "gumbel_vq" / "model.yaml", folder / "vqgan_gumbel_f8" / "model.yaml")
    torch.save(Golden("unet_embedding").weights(), folder / "model-latest.pt")
    shutil.copy(GOLDEN / "unet_embedding" / "config.json", folder / "model-latest.json")
    torch.save(openai_clip(), folder / "ViT-B-16.pt")
    return folder


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> bool:
    """Equal in shape and within an absolute tolerance."""
    return actual.shape == expected.shape and bool((actual - expected).abs().max() <= tolerance)
