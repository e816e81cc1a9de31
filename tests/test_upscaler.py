"""Upscalers that spandrel reads as `super_resolution`: any family, any size, tiles, saving and loading."""

from __future__ import annotations

import logging
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from dall3 import CheckpointError, Dall3Pipeline
from dall3.cli import main
from dall3.images import center_crop, enlarge, to_tensor
from dall3.models.upscaler import Upscaler, UpscalerConfig
from dall3.weights import load_upscaler
from dall3.weights.folder import load_part, save_part

from conftest import load_upstream_files
from originals import Golden, close, openai_clip

PROMPT = "a cube made of cloud"
QUICK = {"seed": 0, "progress": False}
TILES = {"tile": 32, "overlap": 32}
NEW_NAMES = (  # names of Real-ESRGAN, by those of the original ESRGAN
    *(
        (r"model\.1\.sub\.(\d+)\.RDB(\d)\.conv(\d)\.0\.", r"body.\1.rdb\2.conv\3."),
        (r"model\.1\.sub\.\d+\.", "conv_body."),
    ),
    *((r"model\.0\.", "conv_first."), (r"model\.3\.", "conv_up1."), (r"model\.6\.", "conv_up2.")),
    *((r"model\.8\.", "conv_hr."), (r"model\.10\.", "conv_last.")),
)


def esrgan(scale: int = 4, channels: int = 3) -> torch.nn.Module:
    """An ESRGAN with 8 channels and one block; its receptive field is 19 pixels on each side."""
    from spandrel.architectures.ESRGAN import ESRGAN

    torch.manual_seed(0)
    return (
        ESRGAN(in_nc=channels, out_nc=channels, num_filters=8, num_blocks=1, scale=scale).eval().requires_grad_(False)
    )


def real_esrgan_file(path: Path) -> Path:
    """A file like RealESRGAN_x4plus.pth: Real-ESRGAN's names under "params_ema"."""
    state = {}
    for name, tensor in esrgan().state_dict().items():
        for old, new in NEW_NAMES:
            name = re.sub(f"^{old}", new, name)
        state[name] = tensor
    torch.save({"params_ema": state}, path)
    return path


def swinir_file(path: Path) -> Path:
    from spandrel.architectures.SwinIR import SwinIR

    torch.manual_seed(0)
    sizes: dict[str, Any] = dict(img_size=16, embed_dim=12, depths=[2, 2], num_heads=[2, 2], window_size=8)
    net = SwinIR(**sizes, mlp_ratio=2.0, upscale=2, upsampler="pixelshuffle")
    torch.save({"params": net.state_dict()}, path)
    return path


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return real_esrgan_file(tmp_path_factory.mktemp("upscaler") / "RealESRGAN_x4plus.pth")


@pytest.fixture(scope="module")
def pipe(upstream_files: Path, file: Path) -> Dall3Pipeline:
    return load_upstream_files(upstream_files, super_resolution=file)


def test_real_esrgan_computes_what_its_network_does(file: Path) -> None:
    upscaler, image = load_upscaler(file), torch.rand(2, 3, 20, 24)
    assert upscaler.config == UpscalerConfig("ESRGAN", 4)
    assert close(upscaler(image), esrgan()(image).clamp(0, 1), 1e-6)


def test_tiles_equal_the_whole_inside_the_overlap(file: Path) -> None:
    image = torch.rand(1, 3, 70, 90)
    whole = load_upscaler(file)(image)
    assert close(load_upscaler(file, TILES)(image), whole, 1e-5)
    assert not close(load_upscaler(file, {"tile": 32, "overlap": 0})(image), whole, 1e-3)


def test_a_transformer_in_tiles_is_close(tmp_path: Path) -> None:
    """A SwinIR has a large receptive field, and its windows depend on the tile."""
    path, image = swinir_file(tmp_path / "swinir.pth"), torch.rand(1, 3, 70, 90)
    whole, tiled = load_upscaler(path)(image), load_upscaler(path, TILES)(image)
    assert whole.shape == (1, 3, 140, 180) and close(tiled, whole, 0.02)


def test_less_memory_means_smaller_tiles(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    upscaler, image = load_upscaler(file, {"tile": 64, "overlap": 20}), torch.rand(1, 3, 70, 90)
    whole, read, sizes = upscaler(image), upscaler.descriptor, []

    def full(piece: torch.Tensor) -> torch.Tensor:
        sizes.append(max(piece.shape[-2:]))
        if sizes[-1] > 80:
            raise torch.OutOfMemoryError
        return read(piece)

    full.supports_half = full.supports_bfloat16 = True  # type: ignore[attr-defined]
    monkeypatch.setattr(upscaler, "descriptor", full)
    assert close(upscaler(image), whole, 1e-5) and sizes[0] == 84 and max(sizes[1:]) == 72


def test_a_seamless_image_stays_seamless(file: Path) -> None:
    upscaler, image = load_upscaler(file), torch.rand(1, 3, 40, 40)
    rolled = upscaler(image.roll((13, 7), (2, 3)), seamless=True)
    assert close(rolled, upscaler(image, seamless=True).roll((52, 28), (2, 3)), 1e-5)


def test_weights_stay_in_a_dtype_that_the_network_supports(file: Path, tmp_path: Path) -> None:
    assert next(load_upscaler(file).half().parameters()).dtype == torch.float16
    swinir = load_upscaler(swinir_file(tmp_path / "swinir.pth"))
    assert next(swinir.to("cpu", torch.float16).parameters()).dtype == torch.float32
    assert next(swinir.to("cpu", torch.bfloat16).parameters()).dtype == torch.float32
    assert swinir(torch.rand(1, 3, 20, 24)).shape == (1, 3, 40, 48)


def test_the_call_takes_any_family_to_any_size(pipe: Dall3Pipeline) -> None:
    fine, upscaler = pipe(PROMPT, num_inference_steps=2, **QUICK).images, pipe.super_resolution
    assert fine[0].size == (64, 64) and isinstance(upscaler, Upscaler)
    whole = upscaler(to_tensor(fine))
    for size in (100, 300):
        out = pipe(PROMPT, output_size=size, num_inference_steps=2, **QUICK)
        assert out.images[0].size == (size, size) and out.coarse_images[0].size == (128, 128)
        assert close(to_tensor(out.images), enlarge(whole, size), 0.02)  # `fine` is rounded to eight bits


def test_the_picture_is_repeated_to_the_bit(pipe: Dall3Pipeline) -> None:
    settings: dict[str, Any] = dict(num_images=2, output_size=100, num_inference_steps=2)
    out = pipe(PROMPT, **settings, **QUICK)
    assert out.settings["weights"]["super_resolution"] == pipe.fingerprints()["super_resolution"]
    assert pipe.repeat(out[1], progress=False).images == out[1].images
    small = pipe(PROMPT, num_inference_steps=2, **QUICK)
    del small.settings["weights"]["super_resolution"]  # a pipeline without it gives the same
    assert pipe.repeat(small, progress=False).images == small.images


def test_the_stages_of_the_call_are_previewed_and_offloaded(pipe: Dall3Pipeline, file: Path) -> None:
    parts = pipe.components | {"super_resolution": load_upscaler(file)}
    offloading = Dall3Pipeline(**parts).enable_model_offload("cpu")
    *_, last, done = offloading.stream(PROMPT, output_size=256, num_inference_steps=2, **QUICK)
    assert last.stage == "refining" and last.images == done.output.images
    assert done.output.images == pipe(PROMPT, output_size=256, num_inference_steps=2, **QUICK).images


def test_a_picture_or_tokens_alone_are_upscaled(pipe: Dall3Pipeline) -> None:
    image = Image.effect_noise((60, 48), 90).convert("RGB")
    upscale = dict(stage="super_resolution", progress=False)
    upscaler, square = pipe.super_resolution, center_crop(to_tensor(image))
    assert isinstance(upscaler, Upscaler)
    assert torch.equal(pipe.upsample(image=image, **upscale), upscaler(square))
    assert pipe.upsample(image=[image, image], output_size=100, **upscale).shape == (2, 3, 100, 100)
    small = to_tensor(image.resize((16, 16)))
    twice = upscaler(upscaler(small))  # 64 px is less than half of 200
    assert torch.equal(pipe.upsample(image=small, output_size=200, **upscale), enlarge(twice, 200))
    assert torch.equal(pipe.upsample(image=small, output_size=100, **upscale), enlarge(upscaler(small), 100))
    tokens = torch.arange(256) % 64
    assert torch.equal(pipe.upsample(tokens, **upscale), upscaler(pipe.decode_tokens(tokens)))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_inference_steps": 10, "strength": 0.3}, "no denoising steps; leave out num_inference_steps, strength"),
        ({"prompt": "a cube"}, "leave out prompt"),
        ({"clip_guidance_scale": 100}, "leave out clip_guidance_scale"),
        ({"output_size": 0}, "output_size"),
        ({"output_size": 64.5}, "output_size"),
    ],
)
def test_settings_that_would_change_nothing_are_refused(pipe: Dall3Pipeline, settings: Any, words: str) -> None:
    with pytest.raises((ValueError, TypeError), match=words):
        pipe.upsample(image=Image.new("RGB", (32, 32)), stage="super_resolution", **settings)


def test_guidance_needs_a_stage_that_it_guides(pipe: Dall3Pipeline) -> None:
    coarse = Dall3Pipeline(**pipe.components | {"upsampler": None})
    assert coarse(PROMPT, output_size=256, **QUICK).images[0].size == (256, 256)
    with pytest.raises(ValueError, match="no upsampler"):
        coarse(PROMPT, output_size=256, clip_guidance_scale=100, **QUICK)
    with pytest.raises(ValueError, match="give it as super_resolution"):
        Dall3Pipeline(upsampler=pipe.super_resolution)  # type: ignore[arg-type]


def test_a_saved_folder_loads_again(file: Path, tmp_path: Path) -> None:
    image, upscaler = torch.rand(1, 3, 40, 40), load_upscaler(file, TILES)
    folder = Dall3Pipeline(super_resolution=upscaler).save_pretrained(tmp_path / "saved")
    again = Dall3Pipeline.from_pretrained(folder).super_resolution
    assert isinstance(again, Upscaler) and again.config == UpscalerConfig("ESRGAN", 4, **TILES)
    assert torch.equal(again(image), upscaler(image))
    save_part(load_upscaler(swinir_file(tmp_path / "swinir.pth")), tmp_path / "swinir", torch.float16)
    assert load_part(tmp_path / "swinir", dtype=torch.bfloat16)(image).shape == (1, 3, 80, 80)
    config = folder / "super_resolution" / "config.json"
    config.write_text(config.read_text().replace('"scale": 4', '"scale": 2'))
    with pytest.raises(CheckpointError, match="its config.json says .*scale=2"):
        Dall3Pipeline.from_pretrained(folder)
    config.write_text(config.read_text().replace('"tile": 32', '"tile": 1'))
    with pytest.raises(CheckpointError, match="tile=1; expected a number of pixels from 32"):
        Dall3Pipeline.from_pretrained(folder)


def test_a_network_that_its_tensors_do_not_determine_is_not_saved(tmp_path: Path) -> None:
    from spandrel.architectures.SwinIR import SwinIR

    sizes: dict[str, Any] = dict(img_size=16, embed_dim=12, depths=[2, 2], num_heads=[2, 2], window_size=8)
    net = SwinIR(**sizes, upscale=4, upsampler="pixelshuffle", start_unshuffle=2)
    state = {name.replace("conv_first.", "conv_first.1."): tensor for name, tensor in net.state_dict().items()}
    torch.save(state, tmp_path / "unshuffled.pth")
    with pytest.raises(ValueError, match="this SwinIR cannot be saved: .* keep its file"):
        save_part(load_upscaler(tmp_path / "unshuffled.pth"), tmp_path / "saved", None)
    assert not (tmp_path / "saved").exists()


def test_files_of_other_kinds_are_refused_in_one_line(tmp_path: Path) -> None:
    damaged = (real_esrgan_file(tmp_path / "whole.pth").read_bytes())[:-9000]
    (tmp_path / "half.pth").write_bytes(damaged)
    state = esrgan().state_dict()
    torch.save({name: tensor for name, tensor in state.items() if name != "model.3.bias"}, tmp_path / "lacking.pth")
    torch.save(esrgan(channels=1).state_dict(), tmp_path / "grey.pth")
    torch.save(esrgan(scale=1).state_dict(), tmp_path / "denoiser.pth")
    torch.save(state | {"model.1.sub.99999999.weight": state["model.0.bias"]}, tmp_path / "deep.pth")
    shared = torch.zeros(max(tensor.numel() for tensor in state.values()))
    torch.save(
        {name: shared[: tensor.numel()].view_as(tensor) for name, tensor in state.items()}, tmp_path / "wide.pth"
    )
    torch.save(openai_clip(), tmp_path / "clip.pt")
    torch.save({"weights": [1, 2]}, tmp_path / "list.pth")
    for name, words in {
        "half.pth": "truncated or damaged|not a PyTorch",
        "lacking.pth": "Missing key.*model.3.bias",
        "grey.pth": "1 to 1 channels, factor 4; expected a network that makes RGB images larger",
        "denoiser.pth": "factor 1; expected a network that makes RGB images larger",
        "deep.pth": "numbered beyond their count",
        "wide.pth": "share too little data",
        "clip.pt": "looks like a CLIP model; expected a UNet of guided-diffusion or an upscaler",
        "list.pth": "looks like something else; expected a UNet of guided-diffusion or an upscaler",
    }.items():
        with pytest.raises(CheckpointError, match=words) as error:
            Dall3Pipeline.from_checkpoints(super_resolution=tmp_path / name)
        assert "\n" not in str(error.value) and name in str(error.value)
    with pytest.raises(CheckpointError, match="no setting image_size; expected tile and overlap"):
        Dall3Pipeline.from_checkpoints(
            super_resolution=tmp_path / "whole.pth", super_resolution_config={"image_size": 64}
        )


def test_without_spandrel(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "spandrel", None)
    with pytest.raises(CheckpointError, match=r"spandrel, which is not installed; run pip install 'dall3\[upscale\]'"):
        load_upscaler(file)
    torch.save(Golden("vqgan").weights(), tmp_path / "vqgan.pt")
    with pytest.raises(CheckpointError, match="looks like a VQGAN"):  # with or without spandrel
        load_upscaler(tmp_path / "vqgan.pt")


def test_weights_without_spandrel_are_loaded_without_their_upscaler(
    pipe: Dall3Pipeline, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = pipe.save_pretrained(tmp_path / "all")
    alone = Dall3Pipeline(super_resolution=pipe.super_resolution).save_pretrained(tmp_path / "alone")
    (tmp_path / "weights.toml").write_text(
        f'[own.vqgan]\nfile = "model.safetensors"\nplaces = ["{folder}/vqgan/model.safetensors"]\n'
        f'config = {{ file = "config.json", places = ["{folder}/vqgan/config.json"] }}\n'
        f'[own.super_resolution]\nfile = "{file.name}"\nplaces = ["{file}"]\nsettings = {{ tile = 64 }}\n'
    )
    own = Dall3Pipeline.from_pretrained("own", registry=tmp_path / "weights.toml").super_resolution
    assert isinstance(own, Upscaler) and own.config.tile == 64
    monkeypatch.setitem(sys.modules, "spandrel", None)
    for name in (folder, "own"):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "dall3"):
            loaded = Dall3Pipeline.from_pretrained(name, registry=tmp_path / "weights.toml")
        assert loaded.super_resolution is None and loaded.vqgan is not None
        assert "run pip install 'dall3[upscale]'; the weights are loaded without their super_resolution" in caplog.text
        with pytest.raises(ValueError, match=r"no super_resolution, .* needs; run pip install 'dall3\[upscale\]'"):
            loaded.upsample(image=Image.new("RGB", (32, 32)), stage="super_resolution")
    with pytest.raises(CheckpointError, match="run pip install"):
        Dall3Pipeline.from_pretrained(alone)


def test_the_commands(upstream_files: Path, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.effect_noise((48, 48), 90).save(tmp_path / "in.png")
    command = [
        "upsample",
        "--input",
        str(tmp_path / "in.png"),
        "--model_path",
        str(file),
        "--cpu",
        "--output_size",
        "100",
    ]
    assert main([*command, "--outputs_dir", str(tmp_path / "up")]) == 0
    assert Image.open(tmp_path / "up" / "progress_00000.png").size == (100, 100)
    assert main([*command, "--strength", "0.3", "--outputs_dir", str(tmp_path / "no")]) == 2
    assert "leave out strength" in capsys.readouterr().err and not (tmp_path / "no").exists()
    words = ["generate", "--device", "cpu", "--num_images", "1", "a red cube"]
    files = ["--dalle_path", str(upstream_files / "dalle-latest.pt"), "--bpe_path", str(upstream_files / "bpe.model")]
    files += [
        "--vqgan_model_path",
        str(upstream_files / "vqgan_gumbel_f8/last.ckpt"),
        "--super_resolution_path",
        str(file),
    ]
    assert main([*words, *files, "--output_size", "300", "--outputs_dir", str(tmp_path / "out")]) == 0
    assert Image.open(tmp_path / "out" / "a_red_cube" / "0-fine.png").size == (300, 300)
    assert main([*words, "--output_size", "512", "--outputs_dir", str(tmp_path / "refused")]) == 2
    assert "no super_resolution, which output_size needs" in capsys.readouterr().err


def test_an_estimate_counts_the_upscaler(pipe: Dall3Pipeline) -> None:
    estimate = pipe.estimate(output_size=128, num_inference_steps=2, clip_guidance_scale=0.0)
    assert estimate.summary.endswith("upscales 1 image")
    assert estimate.stages[-1].weights == sum(tensor.nbytes for tensor in pipe.super_resolution.state_dict().values())
    assert estimate.seconds is not None and estimate.stages[-1].seconds > 0
