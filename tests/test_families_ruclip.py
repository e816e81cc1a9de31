"""ruCLIP, loaded from its three files, gives the numbers of ruclip 0.0.2 and ranks Russian prompts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from dall3 import CheckpointError, Dall3Pipeline
from dall3.images import to_tensor
from dall3.models.clip import CLIP
from dall3.models.dalle_mini import DalleMini, DalleMiniConfig
from dall3.weights import load_clip
from dall3.weights.folder import load_part, save_part

from originals import GOLDEN, Golden, close, openai_clip

GOLD = Golden("ruclip")
BPE = GOLDEN / "tokenizer_ru" / "bpe.model"


def save_ruclip(folder: Path, **changes: object) -> Path:
    """Write the three files of its repository on the hub."""
    folder.mkdir(exist_ok=True)
    torch.save(GOLD.weights(), folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(GOLD.about["architecture"] | changes))
    shutil.copy(BPE, folder / "bpe.model")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_ruclip(tmp_path_factory.mktemp("ruclip"))


@pytest.fixture(scope="module")
def clip(folder: Path) -> CLIP:
    return load_clip(folder)


def ids_of(clip: CLIP) -> torch.Tensor:
    """The ids of the texts, with the end token in the original's position."""
    ids = clip.tokenize(GOLD.about["texts"])
    return torch.where(ids == ids.max(), 3, ids)


def test_ids_and_features(clip: CLIP) -> None:
    stored = GOLD.expected
    assert torch.equal(ids_of(clip), stored["tokens"])
    assert close(clip.embed_text(GOLD.about["texts"]), stored["text_features"], 1e-4)
    picture = to_tensor(Image.fromarray(stored["image"].numpy()))
    seen = (clip.preprocess(picture) - clip.mean) / clip.std
    assert close(seen, stored["pixel_values"], 1.5 / 255 / 0.224)  # Pillow rounds after each of its two passes
    assert close(clip.embed_images(stored["pixel_values"] * clip.std + clip.mean), stored["image_features"], 1e-4)
    assert close(clip.score(picture, clip.embed_text(GOLD.about["texts"])), stored["cosine"], 2e-3)


def test_the_weights_file_finds_the_files_beside_it(folder: Path, clip: CLIP) -> None:
    by_file = load_clip(folder / "pytorch_model.bin")
    assert by_file.config == clip.config and by_file.reads_russian


def test_a_weights_file_without_the_files_beside_it_names_them(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "pytorch_model.bin", tmp_path)
    shutil.copy(BPE, tmp_path)
    with pytest.raises(CheckpointError, match="for ruCLIP, pass a folder that also holds its config.json"):
        load_clip(tmp_path / "pytorch_model.bin")
    torch.save(openai_clip(), tmp_path / "ViT-B-16.pt")  # OpenAI's file is recognised even beside a bpe.model
    assert not load_clip(tmp_path / "ViT-B-16.pt").reads_russian
    with pytest.raises(CheckpointError, match="the config says width=128, but .* has 64"):
        load_clip(save_ruclip(tmp_path / "other", vision_width=128))
    broken = save_ruclip(tmp_path / "broken")
    (broken / "bpe.model").write_text("3 4\n1 2")
    with pytest.raises(CheckpointError, match="bpe.model is damaged or not a tokenizer"):
        load_clip(broken)


def test_a_saved_folder_has_its_tokenizer(clip: CLIP, tmp_path: Path) -> None:
    save_part(clip, tmp_path / "part", None)
    again = load_part(tmp_path / "part")
    assert torch.equal(ids_of(again), GOLD.expected["tokens"])
    assert torch.equal(again.embed_text(GOLD.about["texts"]), clip.embed_text(GOLD.about["texts"]))


@pytest.fixture(scope="module")
def rudalle(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Dall3Pipeline:
    files = tmp_path_factory.mktemp("rudalle")
    torch.save(Golden("rudalle_v3").weights(), files / "pytorch_model_v3.bin")
    torch.save({"state_dict": Golden("rudalle_dwt").weights()}, files / "dwt.ckpt")
    return Dall3Pipeline.from_checkpoints(
        dalle=files / "pytorch_model_v3.bin",
        dalle_config={"num_attention_heads": 4},
        bpe=BPE,
        vqgan=files / "dwt.ckpt",
        clip=folder,
    )


def test_russian_prompts_are_ranked(rudalle: Dall3Pipeline, clip: CLIP, tmp_path: Path) -> None:
    out = rudalle("рыжий кот", num_images=2, num_candidates=3, seed=0, progress=False)
    assert out.clip_scores is not None and out.clip_scores[0] >= out.clip_scores[1]
    exact = rudalle.decode_tokens(out.tokens)
    assert close(clip.score(exact, clip.embed_text(["рыжий кот"])), out.clip_scores, 1e-5)
    again = Dall3Pipeline.from_pretrained(rudalle.save_pretrained(tmp_path / "saved"))
    assert isinstance(again.clip, CLIP) and again.clip.reads_russian
    assert again("рыжий кот", seed=0, progress=False).images == rudalle("рыжий кот", seed=0, progress=False).images


def test_mega_refuses_ruclip(clip: CLIP) -> None:
    mega = DalleMini(DalleMiniConfig(100, 16, 8, dim=64, ff_dim=128, encoder_depth=1, decoder_depth=1))
    with pytest.raises(
        ValueError, match="the clip is ruCLIP, which reads Russian; DALL·E Mini and Mega read English: pass a CLIP"
    ):
        Dall3Pipeline(transformer=mega, clip=clip)
    assert Dall3Pipeline(transformer=SimpleNamespace(config=SimpleNamespace()), clip=clip).clip is clip  # type: ignore
