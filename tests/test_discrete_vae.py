"""DALLE-pytorch's DiscreteVAE and OpenAI's dVAE give the ids and images of the originals."""

import pytest
import torch

from dall3.weights import load_discrete_vae, load_transformer
from dall3.weights.archive import CheckpointError
from dall3.weights.convert.vae import load_openai_dvae, load_vae

from originals import GOLDEN, Golden, close, save_dalle


@pytest.fixture(scope="module")
def own_file(tmp_path_factory):
    golden, path = Golden("discrete_vae"), tmp_path_factory.mktemp("vae") / "vae.pt"
    torch.save({"hparams": golden.about, "weights": golden.weights()}, path)
    return path


@pytest.fixture(scope="module")
def dalle_file(tmp_path_factory):
    golden, vae = Golden("dalle_default"), Golden("discrete_vae")
    weights = golden.weights() | {f"vae.{name}": tensor for name, tensor in vae.weights().items()}
    path = tmp_path_factory.mktemp("dalle") / "dalle.pt"
    return save_dalle(path, golden, vae_params=vae.about, weights=weights)


@pytest.fixture(scope="module", params=["own_file", "dalle_file"])
def discrete_vae(request):
    return load_discrete_vae(request.getfixturevalue(request.param))


@pytest.fixture(scope="module", params=["zip", "legacy"])
def openai(request):
    folder = GOLDEN / "openai_dvae" / request.param
    return load_openai_dvae(folder / "encoder.pkl", folder / "decoder.pkl")


def test_discrete_vae_ids(discrete_vae):
    expected = Golden("discrete_vae").expected
    assert torch.equal(discrete_vae.encode(expected["image"]), expected["indices"])


def test_discrete_vae_pictures(discrete_vae):
    expected = Golden("discrete_vae").expected
    # The original's decoder gives normalised pixels; here every picture is in [0, 1].
    pictures = (expected["decoded"] * 0.5 + 0.5).clamp(0, 1)
    assert close(discrete_vae.decode(expected["indices"]), pictures, 1e-5)
    assert (discrete_vae.num_tokens, discrete_vae.downsampling) == (96, 8)


def test_discrete_vae_without_normalization(own_file, tmp_path):
    found = torch.load(own_file, weights_only=True)
    torch.save(found | {"hparams": found["hparams"] | {"normalization": None}}, tmp_path / "vae.pt")
    expected = Golden("discrete_vae").expected
    pictures = load_discrete_vae(tmp_path / "vae.pt").decode(expected["indices"])
    assert close(pictures, expected["decoded"].clamp(0, 1), 1e-5)


def test_the_transformer_beside_the_vae_loads_too(dalle_file):
    expected = Golden("dalle_default").expected
    loss = load_transformer(dalle_file).loss(expected["text"], expected["image"])
    assert close(loss[None], expected["loss"], 1e-4)


def test_load_vae_finds_the_one_inside_a_dalle_checkpoint(dalle_file, own_file, tmp_path):
    ids = Golden("discrete_vae").expected["indices"]
    inside, alone = load_vae(None, dalle=dalle_file), load_vae(own_file)
    assert torch.equal(inside.decode(ids), alone.decode(ids))
    assert load_vae(None, dalle=save_dalle(tmp_path / "dalle.pt", Golden("dalle_default"))) is None


@pytest.mark.parametrize("shape", [(1, 3, 64, 64), (1, 1, 128, 128), (3, 128, 128)])
def test_discrete_vae_refuses_pictures_of_another_shape(own_file, shape):
    with pytest.raises(ValueError, match=r"expected \(batch, 3, 128, 128\)"):
        load_discrete_vae(own_file).encode(torch.zeros(shape))


def test_a_file_without_a_vae_is_refused(tmp_path):
    path = save_dalle(tmp_path / "dalle.pt", Golden("dalle_default"))
    with pytest.raises(CheckpointError, match="contains a DALL·E transformer.*expected a DiscreteVAE"):
        load_discrete_vae(path)


def test_openai_ids(openai):
    expected = Golden("openai_dvae").expected
    assert torch.equal(openai.encode(expected["image"]), expected["indices"])


@pytest.mark.parametrize("ids, picture", [("indices", "decoded"), ("random_indices", "random_decoded")])
def test_openai_pictures(openai, ids, picture):
    expected = Golden("openai_dvae").expected
    assert close(openai.decode(expected[ids]), expected[picture], 1e-4)


@pytest.mark.parametrize("shape", [(1, 3, 60, 64), (1, 1, 64, 64), (3, 64, 64)])
def test_openai_refuses_pictures_of_another_shape(openai, shape):
    with pytest.raises(ValueError, match="sides divisible by 8"):
        openai.encode(torch.zeros(shape))


def test_openai_encoder_and_decoder_in_the_wrong_order_are_refused():
    folder = GOLDEN / "openai_dvae" / "zip"
    with pytest.raises(CheckpointError, match="encoder.pkl"):
        load_openai_dvae(folder / "decoder.pkl", folder / "encoder.pkl")
