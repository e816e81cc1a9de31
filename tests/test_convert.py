"""Finding the network in a checkpoint, and settings that the tensors do not determine."""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from open_clip import pretrained

from dall3.errors import FetchError
from dall3.models.discrete_vae import DiscreteVAE
from dall3.models.transformer import DalleTransformer
from dall3.models.unet import UNet, UNetConfig
from dall3.models.vqgan import GumbelVQ
from dall3.weights import load_clip, load_discrete_vae, load_transformer, load_unet
from dall3.weights.archive import CheckpointError
from dall3.weights.cache import CachedFile, files_of
from dall3.weights.convert.clip import find_matching_model
from dall3.weights.convert.vae import load_vae, read_taming_config
from dall3.weights.download import fetch_file
from dall3.weights.folder import load_part, save_part
from dall3.weights.registry import find_set

from conftest import Golden, close, save_dalle

UNET = Golden("unet_embedding")
FLAGS = UNET.about
DALLE = Golden("dalle_default")
QUICK = {"quick_gelu": True}


@pytest.fixture
def save(tmp_path: Path) -> Any:
    def save(value: Any, name: str = "a.pt") -> Path:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        torch.save(value, tmp_path / name)
        return tmp_path / name

    return save


def same(model: torch.nn.Module, weights: dict[str, torch.Tensor], name: str) -> bool:
    return torch.equal(model.state_dict()[name], weights[name])


WRAPPERS = [
    *({key: 0} for key in ("ema_state_dict", "params_ema", "model_ema", "whatever", "model_state_dict")),
    {"outer": {"inner": 0}, "optimizer": {"state": {0: {"step": 1}}}},
    *(f"{prefix}." for prefix in ("_orig_mod", "module", "model", "module._orig_mod", "unet.any")),
]


def wrap(weights: dict[str, torch.Tensor], wrapper: Any) -> dict[str, Any]:
    if isinstance(wrapper, str):
        return {"state_dict": {wrapper + name: value for name, value in weights.items()} | {"loss.x": torch.ones(1)}}
    return {
        key: weights if value == 0 else wrap(weights, value) if key == "outer" else value
        for key, value in wrapper.items()
    }


@pytest.mark.parametrize("wrapper", WRAPPERS, ids=str)
def test_a_network_is_found_in_every_wrapper(save: Any, wrapper: Any) -> None:
    weights = UNET.weights()
    assert same(load_unet(save(wrap(weights, wrapper)), FLAGS), weights, "out.2.weight")


def test_averaged_weights_are_preferred_and_logged(save: Any, caplog: pytest.LogCaptureFixture) -> None:
    raw = UNET.weights()
    averaged = {name: value * 0.5 for name, value in raw.items()}
    inside = {f"online_model.{name}": value for name, value in raw.items()}
    inside |= {f"ema_model.{name}": value for name, value in averaged.items()}
    for found in ({"step": 1, "model": raw, "ema": averaged}, {"ema": inside}):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "dall3"):
            model = load_unet(save(found), FLAGS)
        assert same(model, averaged, "out.2.weight")
        assert "averaged weights" in caplog.text and "not the raw ones" in caplog.text


@pytest.mark.parametrize("prefix, named", [("model.diffusion_model.", "diffusion_model."), ("", "")])
def test_averaged_weights_of_latent_diffusion_are_preferred(
    save: Any, caplog: pytest.LogCaptureFixture, prefix: str, named: str
) -> None:
    raw = UNET.weights()
    found = {prefix + name: value for name, value in raw.items()} | {"model_ema.num_updates": torch.tensor(9)}
    found |= {f"model_ema.{(named + name).replace('.', '')}": value * 0.5 for name, value in raw.items()}
    with caplog.at_level(logging.WARNING, "dall3"):
        model = load_unet(save({"state_dict": found}), FLAGS)
    assert same(model, {name: value * 0.5 for name, value in raw.items()}, "out.2.weight")
    assert "averaged weights" in caplog.text


def test_several_networks_in_a_file_are_named(save: Any) -> None:
    weights = UNET.weights()
    with pytest.raises(CheckpointError, match="holds 2 networks of this kind .'model', 'teacher'.; save the one"):
        load_unet(save({"model": weights, "teacher": dict(weights)}), FLAGS)


def test_the_keys_are_listed_if_no_network_is_found(save: Any) -> None:
    found = {"epoch": 3, "net": {"first.weight": torch.ones(1), "b": 1}}
    with pytest.raises(
        CheckpointError, match=r"contains something else; .*; its keys are epoch, net \(first.weight, b"
    ):
        load_unet(save(found), FLAGS)


# DALLE-pytorch.


def test_a_deepspeed_folder(save: Any, tmp_path: Path) -> None:
    about = {"hparams": DALLE.about["hparams"], "vae_params": None, "epoch": 2}
    for step, scale in ((6, 1.0), (7, 2.0)):
        weights = {name: value * scale for name, value in DALLE.weights().items()}
        save({"module": weights, "optimizer": None, **about}, f"cp/global_step{step}/mp_rank_00_model_states.pt")
    (tmp_path / "cp/latest").write_text("global_step7\n")
    auxiliary = save({**about, "weights": "To get a working standard checkpoint, consolidate"}, "cp/auxiliary.pt")
    bias = "to_logits.1.bias"
    for path, scale in ((tmp_path / "cp", 2), (tmp_path / "cp/global_step6", 1)):
        found = load_transformer(path).state_dict()["to_logits.bias"]
        assert torch.equal(found, DALLE.weights()[bias] * scale)
    with pytest.raises(CheckpointError, match="auxiliary.pt: .*of a DeepSpeed folder; pass the folder"):
        load_transformer(auxiliary)
    save({}, "cp/global_step7/mp_rank_01_model_states.pt")
    with pytest.raises(CheckpointError, match="split between processes; run the zero_to_fp32.py"):
        load_transformer(tmp_path / "cp")
    (tmp_path / "cp/latest").write_text("../elsewhere")
    with pytest.raises(IsADirectoryError):
        load_transformer(tmp_path / "cp")


def test_missing_hparams_are_named_and_can_be_passed(save: Any, tmp_path: Path) -> None:
    wanted = load_transformer(save_dalle(tmp_path / "whole.pt", DALLE))
    path, hparams = save(DALLE.weights()), DALLE.about["hparams"]
    with pytest.raises(CheckpointError, match="has no 'hparams'.*pass hparams"):
        load_transformer(path)
    (tmp_path / "hparams.json").write_text(json.dumps(hparams))
    texts = {name: str(value) if isinstance(value, int) else value for name, value in hparams.items()}
    for given in (hparams, tmp_path / "hparams.json", texts | {"reversible": "False", "stable": "false"}):
        assert load_transformer(path, given).config == wanted.config
    with pytest.raises(CheckpointError, match="'maybe' is not a boolean"):
        load_transformer(path, hparams | {"stable": "maybe"})


def test_hparams_as_an_argparse_namespace(tmp_path: Path) -> None:
    hparams = DALLE.about["hparams"]
    path = save_dalle(tmp_path / "a.pt", DALLE, hparams=argparse.Namespace(**hparams))
    assert load_transformer(path).config == load_transformer(save_dalle(tmp_path / "b.pt", DALLE)).config
    path = save_dalle(tmp_path / "a.pt", DALLE, hparams=argparse.Namespace())
    with pytest.raises(CheckpointError, match="has no 'hparams'"):
        load_transformer(path)


@pytest.mark.parametrize("stale", (None, {"image_size": 256, "num_layers": 3, "num_tokens": 256}))
def test_the_vqgan_inside_a_dalle_checkpoint(tmp_path: Path, stale: Any) -> None:
    vqgan = Golden("gumbel_vq").weights()
    weights = DALLE.weights() | {f"vae.model.{name}": value for name, value in vqgan.items()}
    path = save_dalle(tmp_path / "a.pt", DALLE, weights=weights, vae_params=stale)
    found = load_vae(None, dalle=path)
    assert type(found) is GumbelVQ and same(found, vqgan, "decoder.conv_out.weight")
    assert type(load_transformer(path)) is DalleTransformer


def test_a_discrete_vae_in_every_form(save: Any) -> None:
    golden = Golden("discrete_vae")
    weights, hparams = golden.weights(), golden.about
    wrapped = {"hparams": hparams, "weights": {f"module.{name}": value for name, value in weights.items()}}
    assert type(load_vae(save(wrapped))) is DiscreteVAE
    with pytest.raises(CheckpointError, match="without 'hparams'.*pass hparams"):
        load_vae(save(weights))
    for load in (load_vae, load_discrete_vae):
        assert load(save(weights), hparams).config == load_vae(save(wrapped)).config


# guided-diffusion.


def test_flags_as_text(save: Any) -> None:
    path = save(UNET.weights())
    texts = {name: str(value) for name, value in FLAGS.items()}
    assert load_unet(path, texts).config == load_unet(path, FLAGS).config
    changed = load_unet(path, texts | {"use_new_attention_order": "True", "predict_xstart": "yes"}).config
    assert changed.use_new_attention_order is True and changed.diffusion.predict_xstart is True
    with pytest.raises(CheckpointError, match="flag predict_xstart='perhaps'; expected true or false"):
        load_unet(path, FLAGS | {"predict_xstart": "perhaps"})
    with pytest.raises(CheckpointError, match="says use_scale_shift_norm=False"):
        load_unet(path, texts | {"use_scale_shift_norm": "False"})


def make_unet(levels: tuple[int, ...], mult: tuple[float, ...], **more: Any) -> UNet:
    settings = dict(num_head_channels=32, use_scale_shift_norm=True, resblock_updown=True) | more
    return UNet(UNetConfig(32, mult, more.pop("num_res_blocks", 2), levels, 64, **settings))


def test_an_unpublished_unet_needs_its_flags(save: Any) -> None:
    sizes = (1, 2, 3, 4)  # like the published network of 64 pixels, which has 3 blocks and attention at 3 levels
    for levels, blocks in (((2, 3), 3), ((1, 2, 3), 2)):
        config = UNetConfig(32, sizes, blocks, levels, 64, num_heads=4, use_scale_shift_norm=True, resblock_updown=True)
        path = save(UNet(config).state_dict())
        with pytest.raises(CheckpointError, match="do not determine its attention heads; pass the flags"):
            load_unet(path)
        assert load_unet(path, {"image_size": 64, "num_heads": 4}).config.num_heads == 4


def test_the_published_super_resolution_networks_have_their_own_heads(
    save: Any, caplog: pytest.LogCaptureFixture
) -> None:
    for levels, size, heads in (((3, 4, 5), 256, (4, None)), ((4, 5), 512, (None, 64))):
        more = dict(super_resolution=True, use_scale_shift_norm=True, resblock_updown=True, num_head_channels=64)
        path = save(UNet(UNetConfig(64, (1, 1, 2, 2, 4, 4), 2, levels, size, **more)).state_dict())
        config = load_unet(path).config
        assert config.image_size == size
        assert config.num_head_channels == (heads[1] or UNetConfig.num_head_channels)
        assert heads[0] is None or config.num_heads == heads[0]
        assert "has 64 channels where the published network" in caplog.text


# CLIP.


def features_are_golden(clip: Any) -> bool:
    golden = Golden("clip_vit")
    pictures = close(clip.embed_images(golden.expected["image_01"]), golden.expected["image_features"], 2e-3)
    return pictures and close(clip.embed_text(golden.about["texts"]), golden.expected["text_features"], 2e-3)


def test_a_clip_other_than_openais_file_needs_a_config(save: Any, tmp_path: Path) -> None:
    path = save({"epoch": 1, "model_state_dict": Golden("clip_vit").weights()})
    with pytest.raises(CheckpointError, match="do not determine its activation.*pass config.*ruCLIP"):
        load_clip(path)
    form = {"embed_dim": 32, "vision_cfg": {"image_size": 64, "layers": 2, "width": 64, "patch_size": 16}}
    form |= {"text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 2}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": form | QUICK, "preprocess_cfg": {}}))
    for config in (QUICK, form | QUICK, tmp_path / "open_clip_config.json"):
        assert features_are_golden(load_clip(path, config))
    assert not features_are_golden(load_clip(path, form))  # GELU, the default of open_clip's format
    for config, words in (
        ("ViT-B-16-quickgelu", "says image_size=224, but .* has 64|says patch_size|says width|says layers"),
        ("ViT-Z", "neither a file of settings nor a model of open_clip"),
        (form | {"embed_dim": 64}, "says embed_dim=64, but .* has 32"),
        ({"image_resolution": 64, "transformer_width": 64}, "the setting image_resolution"),
        (QUICK | {"text_cfg": {"hf_model_name": "evil/model"}}, "the setting hf_model_name"),
    ):
        with pytest.raises(CheckpointError, match=words):
            load_clip(path, config)


def test_a_config_determines_the_activation_and_the_heads(save: Any) -> None:
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    pictures = torch.rand(2, 3, 32, 32)
    for head, quick in ((64, False), (32, False), (32, True)):
        torch.manual_seed(0)
        vision = CLIPVisionCfg(image_size=32, patch_size=8, width=64, layers=2, head_width=head, mlp_ratio=2.5)
        model = CLIP(16, vision, CLIPTextCfg(width=64, heads=1, layers=1), quick_gelu=quick).eval()
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.2)
        weights = {f"module.{name}": value for name, value in model.state_dict().items()}
        path = save({"epoch": 1, "name": "mine", "state_dict": weights})
        clip = load_clip(path, {"quick_gelu": quick, "vision_cfg": {"head_width": head}})
        assert close(clip.embed_images(pictures), model.encode_image((pictures - clip.mean) / clip.std), 1e-5)


def shapes(name: str) -> dict[str, torch.Tensor]:
    """The tensors of an open_clip model, on the meta device."""
    with torch.device("meta"):
        model = open_clip.model.CLIP(**open_clip.get_model_config(name))
    return {f"model.{key}": value for key, value in model.state_dict().items()}


def test_sizes_of_open_clips_table() -> None:
    for name in ("ViT-B-32-256", "ViT-L-16", "ViT-g-14"):
        assert find_matching_model(shapes(name), "", "x.pt") == open_clip.get_model_config(name)
    for name in ("ViT-B-16", "RN50"):
        with pytest.raises(CheckpointError, match=f"matches {name} and {name}-quickgelu, which differ.*ruCLIP"):
            find_matching_model(shapes(name), "", "x.pt")
        training = f"2023_01_01-12_00_00-model_{name}-lr_0.0005-b_64"
        assert find_matching_model(shapes(name), training, "x.pt") == open_clip.get_model_config(name)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """The name of a small model in open_clip's table with a local file, QuickGELU and its own normalisation."""
    about = Golden("clip_vit").about["architecture"]
    vision = {"image_size": 64, "layers": 2, "width": 64, "patch_size": 16}
    text = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 2}
    form = {"embed_dim": about["embed_dim"], "vision_cfg": vision, "text_cfg": text}
    torch.save(Golden("clip_vit").weights(), tmp_path / "tiny.pt")
    file = str(tmp_path / "tiny.pt")
    tags = {
        "openai": {"file": file, "quick_gelu": True, "interpolation": "bicubic"},
        "other": {
            "file": str(tmp_path / "tiny.pt"),
            "mean": (0.1, 0.2, 0.3),
            "std": [0.5] * 3,
            "interpolation": "bilinear",
        },
        "gone": {"hf_hub": "nobody/nothing/", "quick_gelu": True},
    }
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny", form)
    monkeypatch.setitem(pretrained._PRETRAINED, "tiny", tags)
    monkeypatch.setenv("DALL3_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("DALL3_OFFLINE", raising=False)
    return "tiny"


@pytest.mark.filterwarnings("error:QuickGELU")
def test_an_open_clip_name_loads_the_settings_of_its_training(tiny: str, tmp_path: Path) -> None:
    clip = load_clip("tiny/openai")
    assert features_are_golden(clip) and clip.config.quick_gelu
    save_part(clip, tmp_path / "part", None)
    assert features_are_golden(load_part(tmp_path / "part"))
    other = load_clip("tiny/other")
    assert not features_are_golden(other)
    save_part(other, tmp_path / "other", None)
    for one in (other, load_part(tmp_path / "other")):
        assert one.config.mean == (0.1, 0.2, 0.3) and one.interpolation == "bilinear" and not one.config.quick_gelu
        assert close(one.mean.flatten(), torch.tensor([0.1, 0.2, 0.3]), 1e-6)
    assert features_are_golden(load_clip(tmp_path / "tiny.pt", "tiny/openai"))


def test_an_open_clip_name_that_cannot_be_downloaded(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(**settings: Any) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(pretrained, "hf_hub_download", unreachable)
    words = "tiny/gone cannot be downloaded from .* Hub .nobody/nothing.: .*no route to host.*--clip_path FILE"
    with pytest.raises(FetchError, match=words):
        load_clip("tiny/gone")
    monkeypatch.setenv("DALL3_OFFLINE", "1")
    with pytest.raises(FetchError, match="DALL3_OFFLINE is set.*--clip_path FILE"):
        load_clip("tiny/gone")
    assert features_are_golden(load_clip("tiny/openai"))  # its file is in the cache


# Settings and folders.


@pytest.mark.parametrize(
    ("params", "words"),
    (
        (f"{{embed_dim: {':'.join(['1', *['59'] * 9000])}.5}}", None),  # a base-60 number in YAML 1.1
        ("\n" + "".join(f"    ? {k * (2**61 - 1)}\n    : 0\n" for k in range(1, 3001)), "expected at most"),
        ("[1, 2]", "not a mapping"),
        ("*a", "aliases|undefined"),
    ),
)
def test_taming_configs_that_would_take_long_to_parse(tmp_path: Path, params: str, words: str | None) -> None:
    (tmp_path / "model.yaml").write_text(f"model:\n  params: {params}\n")
    if words is None:
        assert isinstance(read_taming_config(tmp_path / "model.yaml")["embed_dim"], str)
        return
    with pytest.raises(CheckpointError, match=f"not a taming-transformers model.yaml.*({words})"):
        read_taming_config(tmp_path / "model.yaml")


def test_a_cache_that_cannot_be_created(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("DALL3_HOME", str(tmp_path / "file/home"))
    monkeypatch.delenv("DALL3_OFFLINE", raising=False)
    lines = '[own.upsampler]\nfile = "model.pt"\nplaces = ["http://127.0.0.1:1/model.pt"]\n'
    (tmp_path / "weights.toml").write_text(lines)
    wanted: CachedFile = files_of(find_set("own", tmp_path / "weights.toml"))[0]
    with pytest.raises(FetchError, match="file/home.* cannot be created .*set DALL3_HOME to a writable folder"):
        fetch_file(wanted)
