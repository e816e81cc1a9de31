"""VQGANs of taming-transformers give the ids, embeddings and images of the originals."""

import pytest
import torch
from safetensors.torch import load_file

from dall3.models.vqgan import GumbelVQ
from dall3.weights import load_vqgan
from dall3.weights.archive import CheckpointError

from originals import GOLDEN, Golden, close, save_vqgan


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vqgan")
    return {name: save_vqgan(folder / f"{name}.ckpt", Golden(name)) for name in ("vqgan", "gumbel_vq")}


@pytest.fixture(scope="module")
def models(files):
    return {name: load_vqgan(path, GOLDEN / name / "model.yaml") for name, path in files.items()}


def test_the_kind_is_inferred_from_the_tensors(models, files):
    assert [isinstance(models[name], GumbelVQ) for name in ("vqgan", "gumbel_vq")] == [False, True]
    assert load_vqgan(files["gumbel_vq"]).config == models["gumbel_vq"].config  # without the YAML
    assert (models["gumbel_vq"].num_tokens, models["gumbel_vq"].downsampling) == (256, 8)
    assert (models["vqgan"].num_tokens, models["vqgan"].downsampling) == (64, 8)


def test_vqgan_ids(models):
    expected = Golden("vqgan").expected
    assert torch.equal(models["vqgan"].encode(expected["image"]), expected["indices"])


def test_gumbel_vq_ids_of_a_larger_picture(models):
    # The original draws codes with Gumbel noise even in eval mode: gumbel_vq's `indices` are random, and only
    # gumbel_vq_32 also stores the most probable codes, those of the same network without noise.
    expected = load_file(GOLDEN / "gumbel_vq_32" / "expected.safetensors")
    assert torch.equal(models["gumbel_vq"].encode(expected["image"].float() / 255), expected["argmax_indices"])


@pytest.mark.parametrize("ids, crop", [("gumbel_indices", "decoded"), ("argmax_indices", "argmax_decoded")])
def test_gumbel_vq_picture_of_1024_codes(models, ids, crop):
    expected = load_file(GOLDEN / "gumbel_vq_32" / "expected.safetensors")
    picture = models["gumbel_vq"].decode(expected[ids])
    assert picture.shape == (1, 3, 256, 256)
    assert close(picture[:, :, 96:160, 96:160], expected[crop], 1e-4)


def test_embeddings(models):
    # gumbel_vq's `quantised` comes from another random draw than its `indices`.
    expected = Golden("vqgan").expected
    assert close(models["vqgan"].embed(expected["indices"]), expected["quantised"], 1e-5)


@pytest.mark.parametrize("name", ["vqgan", "gumbel_vq"])
@pytest.mark.parametrize("ids, picture", [("indices", "decoded"), ("random_indices", "random_decoded")])
def test_pictures(models, name, ids, picture):
    expected = Golden(name).expected
    assert close(models[name].decode(expected[ids]), expected[picture], 1e-4)


@pytest.mark.parametrize("shape", [(1, 3, 132, 128), (1, 3, 128, 132), (1, 4, 128, 128), (3, 128, 128)])
def test_pictures_of_another_shape_are_refused(models, shape):
    with pytest.raises(ValueError, match="expected .batch, 3, height, width., sides divisible by 8"):
        models["vqgan"].encode(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(1, 255), (256,)])
def test_ids_that_do_not_form_a_square_are_refused(models, shape):
    with pytest.raises(ValueError, match="a square grid row by row"):
        models["vqgan"].decode(torch.zeros(shape, dtype=torch.int64))


def test_a_yaml_of_another_model_is_refused(files, tmp_path):
    path = tmp_path / "model.yaml"
    path.write_text((GOLDEN / "gumbel_vq" / "model.yaml").read_text().replace("n_embed: 256", "n_embed: 8192"))
    with pytest.raises(CheckpointError, match="says n_embed=8192, but .*gumbel_vq.ckpt has 256"):
        load_vqgan(files["gumbel_vq"], path)


def test_a_yaml_of_something_else_is_refused(files, tmp_path):
    path = tmp_path / "model.yaml"
    path.write_text("batch_size: 3\n")
    with pytest.raises(CheckpointError, match="not a taming-transformers model.yaml"):
        load_vqgan(files["gumbel_vq"], path)
