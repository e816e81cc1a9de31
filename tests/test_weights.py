"""Pipeline folders: saving and loading, errors of damaged folders, and the bundled weights offline."""

from __future__ import annotations

import json
import pickle
import socket
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from dall3 import CheckpointError, Dall3Pipeline
from dall3.cli import main
from dall3.models.clip import CLIP, CLIPConfig
from dall3.models.discrete_vae import DiscreteVAE, DiscreteVAEConfig
from dall3.models.transformer import DalleTransformer, TransformerConfig
from dall3.models.unet import DiffusionConfig, UNet, UNetConfig
from dall3.models.vqgan import GumbelVQ, VQGANConfig, VQModel
from dall3.scenes import render
from dall3.scenes.captions import describe
from dall3.scenes.scene import Scene
from dall3.text import load_tokenizer
from dall3.weights.folder import BUNDLED, TOKENIZER, load_part, save_part

VQGAN = VQGANConfig(ch=32, ch_mult=(1, 2), num_res_blocks=1, attn_levels=(1,), z_channels=4, embed_dim=6, n_embed=10)
UNET = UNetConfig(
    *(32, (1, 1, 2), 1, (2,), 64), embedding_dims=(6, 32), diffusion=DiffusionConfig(noise_schedule="cosine")
)
TRANSFORMER = TransformerConfig(50, 10, 8, 32, 2, heads=2, dim_head=16, grid_size=4, attn_types=("full", "axial_row"))
DVAE = DiscreteVAEConfig(32, 10, 8, 2, 1, 8)
CLIP_CONFIG = CLIPConfig(
    embed_dim=16,
    vision_cfg=dict(image_size=32, patch_size=16, width=16, head_width=16, layers=1),
    text_cfg=dict(context_length=12, vocab_size=3074, width=16, heads=1, layers=1),
)


def make(name: str) -> Any:
    torch.manual_seed(0)
    if name == "clip":
        return CLIP.from_config(CLIP_CONFIG, load_tokenizer(BUNDLED / TOKENIZER))
    return {
        "gumbel": lambda: GumbelVQ(VQGAN),
        "vqmodel": lambda: VQModel(VQGAN),
        "unet": lambda: UNet(UNET),
        "transformer": lambda: DalleTransformer(TRANSFORMER),
        "dvae": lambda: DiscreteVAE(DVAE),
    }[name]()


@pytest.mark.parametrize("name", ["gumbel", "vqmodel", "unet", "transformer", "dvae", "clip"])
def test_a_part_is_read_back_as_it_was_written(name: str, tmp_path: Path) -> None:
    model = make(name)
    save_part(model, tmp_path / "part", dtype=None)
    again = load_part(tmp_path / "part", load_tokenizer(BUNDLED / TOKENIZER))
    assert type(again) is type(model) and again.config == model.config
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
    assert not any(parameter.requires_grad for parameter in again.parameters()) and not again.training


def test_half_precision_halves_the_file_and_keeps_three_digits(tmp_path: Path) -> None:
    model = make("unet")
    save_part(model, tmp_path / "full", dtype=None)
    save_part(model, tmp_path / "half")
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("full", "half")]
    assert sizes[1] < 0.55 * sizes[0]
    for key, value in load_part(tmp_path / "half").state_dict().items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, model.state_dict()[key], rtol=1e-3, atol=1e-4)


def test_errors_name_what_is_wrong_with_a_folder(tmp_path: Path) -> None:
    def fails(words: str) -> None:
        with pytest.raises(CheckpointError) as error:
            Dall3Pipeline.from_pretrained(tmp_path)
        assert words in str(error.value) and "\n" not in str(error.value)

    fails("holds none of the folders transformer, vqgan")
    with pytest.raises(CheckpointError, match="does not exist"):
        Dall3Pipeline.from_pretrained(tmp_path / "nowhere")
    save_part(make("gumbel"), tmp_path / "vqgan")
    config, weights = tmp_path / "vqgan/config.json", tmp_path / "vqgan/model.safetensors"
    good, bytes_of_weights = config.read_text(), weights.read_bytes()
    for text, words in (
        ("{", "not JSON"),
        ("[]", "holds list; expected a JSON object"),
        (good.replace("GumbelVQ", "os.system"), "unknown model 'os.system'; expected one of DalleTransformer"),
        (good.replace('"ch"', '"chh"'), "unknown setting chh; known settings: attn_levels, ch,"),
        (good.replace('"n_embed": 10', '"n_embed": 11'), "of another shape"),
        (good.replace('"n_embed": 10', '"n_embed": 1e99'), "n_embed=1e+99; expected at most 1048576"),
        (good.replace('"num_res_blocks": 1', '"num_res_blocks": 1000000'), "num_res_blocks=1e+06; expected at most 16"),
        (good.replace('"num_res_blocks": 1', '"num_res_blocks": -1'), "does not fit GumbelVQ"),
        (good.replace('"ch": 32', '"ch": "32"'), "cannot build a GumbelVQ"),
        (good.replace('"ch": 32', '"ch": NaN'), "cannot build a GumbelVQ"),
        (good.replace("[", "[" * 5000), "not JSON"),
    ):
        config.write_text(text)
        fails(words)
    config.write_text(good)
    weights.write_bytes(bytes_of_weights[:-100])
    fails("damaged or not a safetensors file")
    save_file({"encoder.conv_in.weight": torch.zeros(1)}, weights)
    fails("missing: decoder")
    weights.unlink()
    config.unlink()
    fails("config.json: missing")


def test_a_clip_without_its_tokenizer_is_an_error(tmp_path: Path) -> None:
    save_part(make("clip"), tmp_path / "clip")
    with pytest.raises(CheckpointError, match="needs the tokenizer that it was trained with"):
        Dall3Pipeline.from_pretrained(tmp_path)
    small = CLIPConfig(16, CLIP_CONFIG.vision_cfg, CLIP_CONFIG.text_cfg | {"vocab_size": 100})
    with pytest.raises(ValueError, match="vocab_size is 100; the tokenizer needs 3074"):
        CLIP.from_config(small, load_tokenizer(BUNDLED / TOKENIZER))


def test_clip_reads_a_prompt_between_start_and_end_and_cuts_it_at_its_length() -> None:
    clip, tokenizer = make("clip"), load_tokenizer(BUNDLED / TOKENIZER)
    short, long = clip.tokenize(["A cube", "a cube made of cloud " * 9])
    assert short.tolist() == [3072, *tokenizer.encode("a cube"), 3073] + [0] * (10 - len(tokenizer.encode("a cube")))
    assert len(long) == 12 and long[0] == 3072 and long[-1] == 3073 and (long[1:-1] < 3072).all()


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def test_the_bundled_weights_are_small_and_credited() -> None:
    files = [path for path in BUNDLED.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 48e6
    card = (BUNDLED / "README.md").read_text()
    assert "Fluent" in card and "MIT" in card and "emojibase" in card
    assert json.loads((BUNDLED / "vqgan/config.json").read_text())["model"] == "GumbelVQ"


def test_the_bundled_settings_are_the_same_by_folder_and_by_name(offline: None) -> None:
    own = json.loads((BUNDLED / "generation_config.json").read_text())
    assert Dall3Pipeline.from_pretrained().defaults == Dall3Pipeline.from_pretrained("mini").defaults == own


def test_a_bundled_image_is_repeated_before_clip_is_loaded(tmp_path: Path) -> None:
    out = Dall3Pipeline.from_pretrained()("a red cube", seed=0, num_inference_steps=5, progress=False)
    out.save(tmp_path / "out")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = Dall3Pipeline.from_pretrained().repeat(tmp_path / "out/0.png", progress=False)
    assert again.images == out.images


def test_the_bundled_upsampler_refines_and_keeps_the_picture(offline: None) -> None:
    """From the codes of a render: a fine picture of 256 px that is no further from the true one than 1 dB."""
    pipe = Dall3Pipeline.from_pretrained()
    true = torch.from_numpy(render(Scene("cube", "wood", "green"), 256)).permute(2, 0, 1)[None] / 255
    tokens = pipe.vqgan.encode(torch.nn.functional.interpolate(true, 128, mode="area"))
    coarse = torch.nn.functional.interpolate(pipe.decode_tokens(tokens), 256, mode="bicubic").clamp(0, 1)
    fine = pipe.upsample(tokens, seed=0, progress=False)
    assert fine.shape == (1, 3, 256, 256)
    before, after = (-10 * (picture - true).square().mean().log10() for picture in (coarse, fine))
    assert after > before - 1


def test_the_bundled_pipeline_draws_the_prompt_offline(offline: None) -> None:
    pipe = Dall3Pipeline.from_pretrained()
    for colour, channel in (("red", 0), ("green", 1), ("blue", 2)):
        tokens = pipe.generate_tokens(f"a large {colour} sphere on a white background", 4, seed=0, progress=False)
        pictures = pipe.decode_tokens(tokens).mean(0)
        middle, corner = pictures[:, 56:80, 56:80].mean((1, 2)), pictures[:, :12, :12].mean((1, 2))
        assert corner.min() > 0.75, f"the background of {colour} is not white: {corner.tolist()}"
        assert middle.argmax() == channel, f"the middle of {colour} is {middle.tolist()}"


def test_the_bundled_pipeline_encodes_words_that_the_captions_do_not_have(offline: None) -> None:
    pipe = Dall3Pipeline.from_pretrained()
    for words, meant in (("a Golden torus", "a gold torus"), ("a wooden cube", "a wood cube")):
        assert torch.equal(pipe.text_encoder(words), pipe.text_encoder(meant))
    tokens = pipe.generate_tokens("a large green sphere on a Gray background", 2, seed=0, progress=False)
    assert torch.equal(tokens, pipe.generate_tokens("a large green sphere on a grey background", 2, seed=0))
    corner = pipe.decode_tokens(tokens).mean(0)[:, :12, :12].mean((1, 2))
    assert corner.min() > 0.45 and corner.max() < 0.7, f"the background is not grey: {corner.tolist()}"


LATE = """
import sys
import torch
from dall3 import Dall3Pipeline

pipe = Dall3Pipeline.from_pretrained().to("cpu")
pipe.decode_tokens(pipe.generate_tokens("a red cube", seed=0, progress=False))
assert not {"open_clip", "torch._dynamo", "diffusers"} & sys.modules.keys()
assert len(pipe.rank(torch.rand(1, 3, 64, 64), "a red cube", progress=False).scores) == 1
assert "open_clip" in sys.modules and pipe.clip is pipe.clip
"""


def test_a_pipeline_can_be_copied_and_guide_wherever_its_clip_was_loaded() -> None:
    pipe = pickle.loads(pickle.dumps(Dall3Pipeline.from_pretrained()))
    with torch.inference_mode():
        pipe.rank(torch.rand(1, 3, 64, 64), "a red cube", progress=False)
    assert not any(parameter.is_inference() for parameter in pipe.clip.parameters())


def test_the_bundled_clip_is_loaded_on_first_use() -> None:
    done = subprocess.run([sys.executable, "-c", LATE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_bundled_clip_tells_the_images_apart(offline: None) -> None:
    pipe = Dall3Pipeline.from_pretrained()
    scenes = [Scene("cube", "wood"), Scene("sphere", "grass"), Scene("torus", "blue"), Scene("star", "gold")]
    pictures = torch.stack([torch.from_numpy(render(scene, 128)).permute(2, 0, 1) / 255 for scene in scenes])
    for i, scene in enumerate(scenes):
        ranking = pipe.rank(pictures, describe(scene), progress=False)
        assert ranking.indices[0] == i and ranking.scores[0] > ranking.scores[1]


def test_the_command_draws_on_the_bundled_weights(
    offline: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generate = ["generate", "a red cube", "--num_images", "1", "--outputs_dir", str(tmp_path)]
    assert main(generate) == 0
    with Image.open(tmp_path / "a_red_cube/0.jpg") as coarse:
        assert coarse.size == (128, 128)
    for more, words in (
        (["--bpe_path", "bpe.model"], "--bpe_path needs --dalle_path; it does not apply to --weights"),
        (["--weights", "w", "--dalle_path", "d.pt"], "--weights and --dalle_path exclude each other"),
        (["--weights", str(tmp_path)], "holds none of the folders transformer, vqgan"),
    ):
        assert main([*generate, *more]) == 2
        assert words in capsys.readouterr().err
