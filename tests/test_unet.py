"""The UNet's output equals the original's; its settings are inferred from the file, or have to be passed."""

import json

import pytest
import torch

from dall3.models.unet import DiffusionConfig, UNet, UNetConfig
from dall3.weights import load_unet
from dall3.weights.archive import CheckpointError

from originals import Golden, close

CONDITIONING = {
    "unet_embedding": {"image_embeds": "image_embeds"},
    "unet_unconditional": {},
    "unet_super_resolution": {"low_res": "low_res"},
    "unet_class_conv": {"labels": "y"},
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unet")
    for name in CONDITIONING:
        torch.save(Golden(name).weights(), folder / f"{name}.pt")
    return {name: folder / f"{name}.pt" for name in CONDITIONING}


@pytest.fixture(scope="module")
def unets(files):
    return {name: load_unet(path, Golden(name).about) for name, path in files.items()}


def conditioning(name: str) -> dict[str, torch.Tensor]:
    expected = Golden(name).expected
    return {keyword: expected[stored] for keyword, stored in CONDITIONING[name].items()}


@pytest.mark.parametrize("name", CONDITIONING)
def test_output(unets, name):
    expected = Golden(name).expected
    output = unets[name](expected["x"], expected["raw_timesteps"], **conditioning(name))
    assert close(output, expected["raw"], 1e-4)


def test_the_config_holds_the_diffusion_of_the_training(unets):
    assert unets["unet_unconditional"].config.diffusion == DiffusionConfig(noise_schedule="cosine")
    trained = DiffusionConfig(learn_sigma=False, rescale_timesteps=False)
    assert unets["unet_class_conv"].config.diffusion == trained


def test_the_config_may_be_a_file(files, unets, tmp_path):
    path = tmp_path / "model.json"
    path.write_text(json.dumps(Golden("unet_embedding").about))
    assert load_unet(files["unet_embedding"], path).config == unets["unet_embedding"].config
    path.write_text("emb_condition: true")
    with pytest.raises(CheckpointError, match="model.json: not JSON"):
        load_unet(files["unet_embedding"], path)


@pytest.mark.parametrize(
    "name, missing",
    [("unet_embedding", "image_embeds"), ("unet_super_resolution", "low_res"), ("unet_class_conv", "labels")],
)
def test_missing_conditioning_is_named(unets, name, missing):
    with pytest.raises(ValueError, match=f"this UNet needs {missing}"):
        unets[name](torch.zeros(1, 3, 32, 32), torch.zeros(1))


@pytest.mark.parametrize(
    "unwanted",
    [
        {"image_embeds": torch.zeros(1, 32, 16, 16)},
        {"low_res": torch.zeros(1, 3, 16, 16)},
        {"labels": torch.zeros(1, dtype=torch.int64)},
    ],
    ids=lambda unwanted: next(iter(unwanted)),
)
def test_conditioning_of_another_kind_is_refused(unets, unwanted):
    with pytest.raises(ValueError, match=f"this UNet does not take {next(iter(unwanted))}"):
        unets["unet_unconditional"](torch.zeros(1, 3, 32, 32), torch.zeros(1), **unwanted)


def test_a_unet_of_upstreams_shape_is_recognised_by_its_size(tmp_path):
    config = UNetConfig(
        model_channels=32,
        channel_mult=(1, 1, 2, 2, 4, 4),
        num_res_blocks=2,
        attention_levels=(3, 4, 5),
        image_size=256,
        num_head_channels=64,
        embedding_dims=(32, 64),
    )
    torch.manual_seed(0)
    unet = UNet(config).eval()
    torch.save(unet.state_dict(), tmp_path / "unet.pt")
    loaded = load_unet(tmp_path / "unet.pt")
    assert loaded.config == config
    inputs = torch.randn(1, 3, 64, 64), torch.tensor([500.0]), torch.randn(1, 32, 4, 4)
    with torch.no_grad():
        assert torch.equal(loaded(*inputs), unet(*inputs))


def test_a_unet_of_an_unusual_size_needs_a_config(files):
    with pytest.raises(CheckpointError, match="unusual size.*pass the flags of its training as config"):
        load_unet(files["unet_unconditional"])


@pytest.mark.parametrize(
    "flag, value",
    [
        ("num_channels", 64),
        ("num_res_blocks", 3),
        ("use_scale_shift_norm", False),
        ("learn_sigma", False),
        ("emb_condition", False),
        ("class_cond", True),
    ],
)
def test_a_config_that_contradicts_the_tensors_is_refused(files, flag, value):
    flags = Golden("unet_embedding").about
    assert flags[flag] != value
    with pytest.raises(CheckpointError, match=f"says {flag}={value}, but"):
        load_unet(files["unet_embedding"], flags | {flag: value})


def test_heads_that_do_not_divide_the_channels_are_refused(files):
    with pytest.raises(CheckpointError, match="cannot be split into heads with num_head_channels=48"):
        load_unet(files["unet_embedding"], Golden("unet_embedding").about | {"num_head_channels": 48})


def test_an_image_size_that_its_tensors_contradict_is_refused(tmp_path):
    channels = dict(model_channels=32, channel_mult=(1, 1, 2, 2, 4, 4), num_res_blocks=1, attention_levels=(5,))
    torch.save(UNet(UNetConfig(**channels, image_size=256)).state_dict(), tmp_path / "unet.pt")
    with pytest.raises(CheckpointError, match="says image_size=64, but its tensors are those of 256 pixels"):
        load_unet(tmp_path / "unet.pt", {"image_size": 64})


def test_gradient_checkpointing_gives_the_same_gradient_with_less_memory():
    torch.manual_seed(0)
    config = UNetConfig(32, (1, 2), 1, (1,), 32, num_heads=2)
    unet = UNet(config).eval().requires_grad_(False)
    for parameter in unet.parameters():
        parameter.data.normal_(0, 0.05)
    x, found = torch.randn(1, 3, 32, 32), []
    for enabled in (False, True):
        unet.enable_gradient_checkpointing(enabled)
        kept, leaf = [], x.clone().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t.numel()) or t, lambda t: t):
            loss = unet(leaf, torch.tensor([10.0])).square().sum()
        found.append((torch.autograd.grad(loss, leaf)[0], sum(kept)))
    (gradient, all_of_it), (again, less) = found
    assert gradient.abs().max() > 0 and torch.allclose(gradient, again, rtol=1e-4, atol=1e-6)
    assert less < 0.5 * all_of_it
