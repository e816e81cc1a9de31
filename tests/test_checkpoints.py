"""Loaders of checkpoints: errors name the kind of a file and the tensors that do not match."""

import json
import shutil

import pytest
import torch
from torch import nn

from dall3.diffusion.guidance import range_loss, spherical_distance, total_variation
from dall3.models.discrete_vae import DiscreteVAE, OpenAIDiscreteVAE
from dall3.models.vqgan import GumbelVQ, VQModel
from dall3.weights import load_clip, load_discrete_vae, load_transformer, load_unet, load_vqgan
from dall3.weights.archive import CheckpointError
from dall3.weights.convert.clip import SIZES
from dall3.weights.convert.vae import load_openai_dvae, load_vae

from conftest import GOLDEN, Golden, close, save_dalle, save_vqgan
from originals import openai_clip

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning", "ignore:.torch.jit:DeprecationWarning")
OPENAI = GOLDEN / "openai_dvae" / "zip"
DALLE, VQGAN, UNET, DVAE, CLIP, HALF = KINDS = (
    "a DALL·E transformer of DALLE-pytorch",
    "a VQGAN of taming-transformers",
    "a UNet of guided-diffusion",
    "a DiscreteVAE of DALLE-pytorch",
    "a CLIP model",
    "a part of OpenAI's dVAE",
)


def flags_of(name):
    return json.loads((GOLDEN / name / "config.json").read_text())


LOADERS = {
    DALLE: load_transformer,
    VQGAN: load_vqgan,
    UNET: lambda path: load_unet(path, flags_of("unet_embedding")),
    DVAE: load_discrete_vae,
    CLIP: load_clip,
    HALF: lambda path: load_openai_dvae(path, OPENAI / "decoder.pkl"),
}


def make(folder):
    """Write one file of each kind, and one of another kind."""
    folder.mkdir(exist_ok=True)
    torch.save({"hello": torch.ones(1)}, folder / "something else")
    save_dalle(folder / DALLE, Golden("dalle_default"))
    save_vqgan(folder / VQGAN, Golden("vqgan"))
    torch.save(Golden("unet_embedding").weights(), folder / UNET)
    vae = Golden("discrete_vae")
    torch.save({"hparams": vae.about, "weights": vae.weights()}, folder / DVAE)
    torch.save(openai_clip(), folder / CLIP)
    shutil.copy(OPENAI / "encoder.pkl", folder / HALF)
    return folder


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    return make(tmp_path_factory.mktemp("kinds"))


@pytest.fixture
def changed(files, tmp_path):
    """A function that writes the file of a kind with its tensors changed."""

    def change(kind, edit):
        found = (
            torch.load(files / kind, weights_only=False) if kind != VQGAN else {"state_dict": Golden("vqgan").weights()}
        )
        edit(found.get("weights", found.get("state_dict", found)))
        torch.save(found, tmp_path / "changed.pt")
        return tmp_path / "changed.pt"

    return change


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_loads(files, kind):
    model = LOADERS[kind](files / kind)
    assert not any(module.training for module in model.children())
    assert not any(p.requires_grad or p.is_meta for p in model.parameters())
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("given", (*KINDS, "something else"))
@pytest.mark.parametrize("kind", KINDS)
def test_another_kind_of_file(files, kind, given):
    if given != kind:
        with pytest.raises(CheckpointError, match=f"{given}: contains {given}; expected {kind}"):
            LOADERS[kind](files / given)


@pytest.mark.parametrize("value", ([1, 2], "text", torch.ones(3), 7, {}, {"weights": {}}, {"state_dict": 3}, {1: 2}))
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_of_something_else(tmp_path, kind, value):
    torch.save(value, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=f"a.pt: .*expected {kind}"):
        LOADERS[kind](tmp_path / "a.pt")


@pytest.mark.parametrize("kind", KINDS)
def test_broken_files(files, tmp_path, kind):
    (tmp_path / "half.pt").write_bytes((files / kind).read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="half.pt: truncated or damaged"):
        LOADERS[kind](tmp_path / "half.pt")
    (tmp_path / "text.pt").write_text("not a checkpoint at all")
    with pytest.raises(CheckpointError, match="text.pt: not a PyTorch or safetensors file"):
        LOADERS[kind](tmp_path / "text.pt")
    with pytest.raises(IsADirectoryError, match="is a folder"):
        LOADERS[kind](tmp_path)
    with pytest.raises(FileNotFoundError, match="none.pt does not exist"):
        LOADERS[kind](tmp_path / "none.pt")


SOME = {  # per kind: a tensor that does not determine the architecture, and its name in the error
    DALLE: ("to_logits.1.bias", "to_logits.bias"),
    VQGAN: ("decoder.conv_out.bias", "decoder.conv_out.bias"),
    UNET: ("out.2.bias", "out.2.bias"),
    DVAE: ("encoder.0.0.bias", "encoder.0.0.bias"),
    CLIP: ("ln_final.bias", "ln_final.bias"),
}


@pytest.mark.parametrize("kind", SOME)
@pytest.mark.parametrize("change", ("missing", "unexpected", "reshaped"))
def test_a_tensor_of_the_wrong_shape_is_named(changed, kind, change):
    original, named = SOME[kind]
    if change == "unexpected":
        original = named = "encoder.strange.weight"

    def edit(state):
        if change == "missing":
            del state[original]
        else:
            state[original] = torch.ones(5, 7)

    with pytest.raises(CheckpointError, match=f"(?s)changed.pt: does not fit .*{named}"):
        LOADERS[kind](changed(kind, edit))


@pytest.mark.parametrize("kind", SOME)
def test_any_one_tensor_missing_or_of_another_shape(changed, kind):
    """For every tensor, also those that determine the architecture."""
    names = []
    changed(kind, lambda state: names.extend(name for name in state if name not in SIZES))
    for name in names[:: max(1, len(names) // 8)]:
        for value in (None, torch.tensor(1.0), torch.ones(13), torch.ones(0, 4), torch.ones(2, 3, 5, 7)):

            def edit(state, name=name, value=value):
                if value is None:
                    del state[name]
                else:
                    state[name] = value

            with pytest.raises(CheckpointError, match="changed.pt"):
                LOADERS[kind](changed(kind, edit))
    assert len(names) > 30


@pytest.mark.parametrize(
    "name", ("time_embed.0.weight", "input_blocks.0.0.weight", "input_blocks.1.0.out_layers.3.weight", "out.2.weight")
)
@pytest.mark.parametrize("value", (torch.tensor(1.0), torch.ones(0, 0), torch.ones(3, 0, 1, 1), torch.ones(2)))
def test_wrong_tensors_that_determine_a_unets_architecture(changed, name, value):
    with pytest.raises(CheckpointError, match="changed.pt"):
        LOADERS[UNET](changed(UNET, lambda state: state.update({name: value})))


@pytest.mark.parametrize(
    "name",
    (
        "quant_conv.weight",
        "quantize.embedding.weight",
        "encoder.conv_in.weight",
        "encoder.conv_out.weight",
        "encoder.down.0.block.0.conv1.weight",
    ),
)
@pytest.mark.parametrize("value", (torch.tensor(1.0), torch.ones(0, 0), torch.ones(0, 3, 1, 1), torch.ones(2)))
def test_wrong_tensors_that_determine_a_vqgans_architecture(changed, name, value):
    with pytest.raises(CheckpointError, match="changed.pt"):
        LOADERS[VQGAN](changed(VQGAN, lambda state: state.update({name: value})))


@pytest.mark.parametrize("name", ("codebook.weight", "encoder.0.0.weight"))
@pytest.mark.parametrize("value", (torch.tensor(1.0), torch.ones(0, 0), torch.ones(0, 3, 1, 1), torch.ones(2), 7))
def test_wrong_tensors_that_determine_a_dvaes_architecture(changed, name, value):
    with pytest.raises(CheckpointError, match="changed.pt"):
        LOADERS[DVAE](changed(DVAE, lambda state: state.update({name: value})))


@pytest.mark.parametrize("name", ("positional_embedding", "visual.conv1.weight", "text_projection", "visual.proj"))
@pytest.mark.parametrize("value", (torch.tensor(1.0), torch.ones(0, 0), torch.ones(0, 3, 1, 1), torch.ones(2)))
def test_wrong_tensors_that_determine_a_clips_architecture(changed, name, value):
    with pytest.raises(CheckpointError, match="changed.pt"):
        LOADERS[CLIP](changed(CLIP, lambda state: state.update({name: value})))


@pytest.mark.parametrize("hparams", (None, [1], 7))
def test_a_transformer_without_hparams(tmp_path, hparams):
    path = save_dalle(tmp_path / "a.pt", Golden("dalle_default"), hparams=hparams)
    with pytest.raises(CheckpointError, match="a.pt: has no 'hparams'"):
        load_transformer(path)


@pytest.mark.parametrize(
    "wrong",
    (
        {"heads": 3},
        {"heads": 0},
        {"heads": -2},
        {"heads": "many"},
        {"heads": [2]},
        {"dim_head": 64},
        {"dim_head": 31},
        {"dim_head": 0},
        {"text_seq_len": 23},
        {"text_seq_len": -1},
        {"text_seq_len": 10**15},
        {"num_text_tokens": 10**15},
        {"num_text_tokens": 300},
        {"attn_types": ["mlp"]},
        {"attn_types": ["unheard of"]},
        {"attn_types": [["full"]]},
        {"attn_types": 3},
        {"shared_attn_ids": [[1]]},
        {"loss_img_weight": "x"},
        {"heads": 10**12, "dim_head": 10**12},
    ),
)
def test_hparams_that_contradict_the_tensors(tmp_path, wrong):
    golden = Golden("dalle_default")
    path = save_dalle(tmp_path / "a.pt", golden, hparams=golden.about["hparams"] | wrong)
    with pytest.raises(CheckpointError, match="a.pt"):
        load_transformer(path)


@pytest.mark.parametrize(
    "wrong",
    (
        {"num_layers": 2},
        {"num_layers": 0},
        {"num_layers": "x"},
        {"num_resnet_blocks": 3},
        {"num_resnet_blocks": None},
        {"image_size": "x"},
        {"image_size": []},
        {"normalization": 3},
        {"normalization": ((1, 2),)},
        {"normalization": "xy"},
    ),
)
def test_invalid_hparams_of_a_dvae(tmp_path, wrong):
    golden = Golden("discrete_vae")
    torch.save({"hparams": golden.about | wrong, "weights": golden.weights()}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="a.pt"):
        load_discrete_vae(tmp_path / "a.pt")


@pytest.mark.parametrize("depth", ("num_layers", "num_resnet_blocks"))
def test_a_dvae_of_excessive_depth_is_not_built(tmp_path, monkeypatch, depth):
    def build(config):
        pytest.fail(f"would build {config}")

    golden = Golden("discrete_vae")
    torch.save({"hparams": golden.about | {depth: 10**7}, "weights": golden.weights()}, tmp_path / "a.pt")
    monkeypatch.setattr("dall3.weights.convert.vae.DiscreteVAE", build)
    with pytest.raises(CheckpointError, match="a.pt"):
        load_discrete_vae(tmp_path / "a.pt")


@pytest.mark.parametrize(
    "flags",
    (
        {"num_channels": 64},
        {"num_heads": "x"},
        {"num_head_channels": 7},
        {"image_size": "x"},
        {"diffusion_steps": "x"},
        {"noise_schedule": "odd"},
        {"num_heads": 0, "num_head_channels": -1},
    ),
)
def test_invalid_flags_of_a_unet(files, flags):
    with pytest.raises(ValueError, match="config|UNet|heads|channels|schedule|not"):
        load_unet(files / UNET, flags_of("unet_embedding") | flags)


@pytest.mark.parametrize("content", ("[]", "{", "\0", "3"))
def test_configs_of_another_kind(files, tmp_path, content):
    (tmp_path / "config").write_text(content)
    with pytest.raises(CheckpointError, match="config: "):
        load_unet(files / UNET, tmp_path / "config")
    with pytest.raises(CheckpointError, match="config: not a taming"):
        load_vqgan(files / VQGAN, tmp_path / "config")


def test_a_vqgan_config_that_contradicts_the_tensors(files, tmp_path):
    text = (GOLDEN / "vqgan" / "model.yaml").read_text()
    assert isinstance(load_vqgan(files / VQGAN, GOLDEN / "vqgan" / "model.yaml"), VQModel)
    (tmp_path / "model.yaml").write_text(text.replace("n_embed:", "n_embed: 9").replace("n_embed: 9 ", "n_embed: 9"))
    with pytest.raises(CheckpointError, match="says n_embed=9"):
        load_vqgan(files / VQGAN, tmp_path / "model.yaml")


def test_load_vae_chooses_the_loader(files, tmp_path):
    assert type(load_vae(files / VQGAN)) is VQModel
    assert type(load_vae(save_vqgan(tmp_path / "gumbel.ckpt", Golden("gumbel_vq")))) is GumbelVQ
    assert type(load_vae(files / DVAE)) is DiscreteVAE
    assert type(load_vae((OPENAI / "encoder.pkl", OPENAI / "decoder.pkl"))) is OpenAIDiscreteVAE
    assert load_vae(None) is None and load_vae(None, dalle=files / DALLE) is None
    golden, vae = Golden("dalle_default"), Golden("discrete_vae")
    weights = golden.weights() | {f"vae.{name}": tensor for name, tensor in vae.weights().items()}
    path = save_dalle(tmp_path / "both.pt", golden, weights=weights, vae_params=vae.about)
    assert type(load_vae(None, dalle=path)) is DiscreteVAE
    assert load_transformer(path).config == load_transformer(files / DALLE).config


@pytest.mark.parametrize("kind", (DALLE, UNET, CLIP, HALF, "something else"))
def test_load_vae_of_another_kind(files, kind):
    with pytest.raises(CheckpointError, match=f"contains {kind}; expected"):
        load_vae(files / kind)
    with pytest.raises((CheckpointError, OSError)):
        load_vae(None, dalle=files / "missing")


@pytest.mark.parametrize("kind", (CLIP, HALF, "something else", UNET))
def test_load_vae_inside_a_file_of_another_kind(files, kind):
    """None if there is no VAE in the file, or an error that names the kind of the file."""
    try:
        assert load_vae(None, dalle=files / kind) is None
    except CheckpointError as error:
        assert str(files / kind) in str(error)


# CLIP.


def tree(weights):
    """A module with parameters of these dotted names."""
    root = nn.Module()
    for name, value in weights.items():
        *path, leaf = name.split(".")
        node = root
        for part in path:
            if part not in dict(node.named_children()):
                node.add_module(part, nn.Module())
            node = getattr(node, part)
        node.register_parameter(leaf, nn.Parameter(value, requires_grad=False))
    return root


class Scripted(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def save_torchscript(weights, path):
    root = tree(weights)
    scripted = Scripted()
    for name, child in root.named_children():
        scripted.add_module(name, child)
    for name, parameter in root.named_parameters(recurse=False):
        scripted.register_parameter(name, parameter)
    torch.jit.save(torch.jit.script(scripted), path)


@pytest.fixture(scope="module")
def clip_files(tmp_path_factory):
    folder, weights = tmp_path_factory.mktemp("clip"), openai_clip()
    torch.save(weights, folder / "state.pt")
    torch.save({"state_dict": weights}, folder / "wrapped.pt")
    torch.save({f"module.{name}": tensor for name, tensor in weights.items()}, folder / "parallel.pt")
    torch.save({name: tensor.half() for name, tensor in weights.items()}, folder / "half.pt")
    save_torchscript(weights, folder / "script.pt")
    return folder


@pytest.mark.parametrize("name", ("state", "wrapped", "parallel", "script", "half"))
def test_clip(clip_files, name):
    golden = Golden("clip_vit")
    clip = load_clip(clip_files / f"{name}.pt")
    tolerance = 2e-2 if name == "half" else 2e-3
    assert torch.equal(clip.tokenize(golden.about["texts"]), golden.expected["tokens"])
    assert close(clip.embed_text(golden.about["texts"]), golden.expected["text_features"], tolerance)
    assert close(clip.embed_images(golden.expected["image_01"]), golden.expected["image_features"], tolerance)
    assert all(p.dtype == torch.float32 for p in clip.parameters())


@pytest.mark.parametrize("name", ("ViT-Z-99/openai", "ViT-B-16/nobody", "nothing", "ViT-B-16", ""))
def test_unknown_clip_names(name):
    with pytest.raises((ValueError, OSError), match="neither a file nor a model of open_clip|is a folder"):
        load_clip(name)


def test_guidance_losses_equal_the_originals():
    expected = Golden("clip_vit").expected
    distance = spherical_distance(expected["image_features"][:, None], expected["text_features"][None])
    assert close(distance, expected["spherical_distance"], 1e-5)
    assert close(total_variation(expected["y"]), expected["total_variation"], 1e-5)
    assert close(range_loss(expected["y"]), expected["range"], 1e-5)
