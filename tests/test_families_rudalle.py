"""ruDALL-E, loaded from files in ru-dalle's format, gives the numbers of ru-dalle 1.1.3."""

import json
from hashlib import sha256
from types import SimpleNamespace

import pytest
import torch

from dall3.models.rudalle import RudalleConfig, attention_mask
from dall3.models.vqgan import inverse_haar
from dall3.text import load_text_encoder
from dall3.weights import load_transformer, load_vqgan
from dall3.weights.archive import CheckpointError
from dall3.weights.folder import load_part, save_part

from originals import GOLDEN, Golden, close

HPARAMS = {"num_attention_heads": 4, "text_seq_length": 24, "num_layers": 5}
NAMES = json.loads((GOLDEN / "rudalle_v3" / "names_rudalle.json").read_text())


@pytest.fixture(scope="module", params=["v2", "v3"])
def case(request, tmp_path_factory):
    golden, path = Golden(f"rudalle_{request.param}"), tmp_path_factory.mktemp("rudalle") / "pytorch_model.bin"
    torch.save(golden.weights(), path)
    return SimpleNamespace(
        version=request.param, path=path, model=load_transformer(path, HPARAMS), golden=golden, **golden.expected
    )


def test_the_mask_determines_the_version(case, tmp_path):
    assert case.model.config.version == case.version
    weights = case.golden.weights()
    mask = weights.pop("transformer.conv_mask")
    torch.save(weights | {"conv_mask": mask.half()}, tmp_path / "oldest.bin")  # as in Malevich's first file
    assert load_transformer(tmp_path / "oldest.bin", HPARAMS).config == case.model.config
    torch.save(weights, tmp_path / "bare.bin")
    with pytest.raises(CheckpointError, match="no conv_mask, .* pass hparams={'hf_version': 'v2' or 'v3'}"):
        load_transformer(tmp_path / "bare.bin", HPARAMS)
    said = load_transformer(tmp_path / "bare.bin", HPARAMS | {"hf_version": case.version})
    assert said.config == case.model.config


def test_logits(case):
    text, image = case.model.logits(case.text, case.image)
    assert close(text[:, :24], case.text_logits, 1e-4)
    assert close(image, case.image_logits, 1e-4)
    assert close(case.model.image_token_logits(case.text, case.image[:, :37]), case.image_logits[:, :38], 1e-4)


def test_loss(case):
    assert close(case.model.loss(case.text, case.image)[None], case.loss_aligned, 1e-4)


@pytest.mark.parametrize("static", [False, True])
def test_decoding_with_the_cache(case, static):
    places = case.golden.about["cached_positions"]
    for _ in range(2):  # the second time reuses the first cache
        cache = case.model.prefill(case.text[:2], rows=2)
        logits = [cache.first_logits.repeat_interleave(2, dim=0)]
        for i in range(131):
            ids = case.image[:1, i].expand(2, 1)
            logits.append(case.model.step(ids, torch.tensor([i]), cache, None if static else i + 1)[:, 0])
        case.model.release(cache)
    found, kept = torch.stack(logits, dim=1), [i for i, place in enumerate(places) if place <= 130]
    wanted = case.cached_logits[0, kept].expand(2, -1, -1)
    assert close(found[:2, [places[i] for i in kept]], wanted, 1e-4)


def test_greedy_tokens(case):
    cache, drawn = case.model.prefill(case.text[2:], rows=1), []
    logits = cache.first_logits
    for i in range(256):
        drawn.append(logits.argmax(dim=-1))
        logits = case.model.step(drawn[-1][:, None], torch.tensor([i]), cache, i + 1)[:, 0] if i < 255 else logits
    assert torch.equal(torch.cat(drawn), case.greedy[2])


def test_texts_are_encoded_as_by_the_original(case):
    encode = load_text_encoder(GOLDEN / "tokenizer_ru" / "bpe.model", kind="rudalle", text_seq_len=24)
    ids = torch.stack([encode(text, truncate=True) for text in case.golden.about["texts"]])
    assert torch.equal(ids, case.text)
    assert torch.equal(case.model.empty_text(), encode(""))


def test_a_saved_folder_loads_again(case, tmp_path):
    save_part(case.model, tmp_path, None)
    assert close(load_part(tmp_path).image_token_logits(case.text, case.image), case.image_logits, 1e-4)


def test_hparams_that_contradict_the_tensors_are_refused(case):
    with pytest.raises(CheckpointError, match="64 channels do not determine .* pass hparams={'num_attention_heads'"):
        load_transformer(case.path)
    with pytest.raises(CheckpointError, match="the hparams say num_layers=24, but .*pytorch_model.bin has 5"):
        load_transformer(case.path, HPARAMS | {"num_layers": 24})


@pytest.mark.parametrize("name", ["row", "column", "conv_v2", "conv_v3"])
def test_masks_at_full_size(name):
    """Of the positions that v3 uses: the last one of 1152 is never an input."""
    kind, _, version = name.partition("_")
    config = RudalleConfig(16384, 8192, 128, 2048, 24, 16, version="v2")  # with complete masks
    if version == "v3":
        last = attention_mask(kind, config)[-1:]
        mask = attention_mask(kind, RudalleConfig(16384, 8192, 128, 2048, 24, 16))
        assert mask.shape == (1151, 1151)
        # The last position attends to the end of the last six rows and to itself.
        places = torch.arange(1152) - 128
        row = (places < 0) | ((places // 32 >= 26) & (places % 32 >= 26))
        mask = torch.cat((torch.cat((mask, torch.zeros(1151, 1, dtype=torch.bool)), dim=1), row[None]))
        assert not torch.equal(last[0], row)
    else:
        mask = attention_mask(kind, config)
    known = NAMES["full_size_masks"][name]
    assert list(mask.shape) == known["shape"] and int(mask.sum()) == known["ones"]
    assert sha256(mask.to(torch.uint8).numpy().tobytes()).hexdigest() == known["sha256_of_uint8"]


@pytest.mark.parametrize("version", ["v2", "v3"])
def test_every_tensor_of_the_published_files_is_loaded(version, monkeypatch):
    tensors = {name: torch.empty(shape, dtype=torch.float16, device="meta") for name, shape in NAMES["dalle"].items()}
    wraps = torch.zeros(1152, 1152, dtype=torch.bool)
    wraps[159, 128] = version == "v2"
    monkeypatch.setattr(
        "dall3.weights.convert.state.read_archive", lambda path: tensors | {"transformer.conv_mask": wraps}
    )
    found = load_transformer("pytorch_model.bin", dtype=torch.float16).config
    assert found == RudalleConfig(16384, 8192, 128, 2048, 24, 16, grid_size=32, version=version)


@pytest.fixture(scope="module")
def dwt(tmp_path_factory):
    golden, path = Golden("rudalle_dwt"), tmp_path_factory.mktemp("dwt") / "vqgan.gumbelf8-sber-dwt.model.ckpt"
    torch.save({"state_dict": golden.weights()}, path)
    return SimpleNamespace(vqgan=load_vqgan(path, GOLDEN / "rudalle_dwt" / "model.yaml"), **golden.expected)


def test_pictures_of_the_haar_decoder(dwt):
    assert close(inverse_haar(dwt.haar_bands), dwt.haar_picture, 1e-5)
    assert close(dwt.vqgan.decode(dwt.ids), dwt.decoded, 1e-4)
    assert torch.equal(dwt.vqgan.encode(dwt.image), dwt.image_ids)


@pytest.mark.parametrize("name", ["vqgan", "vqgan_dwt"])
def test_vqgans_at_full_size(name, monkeypatch):
    tensors = {key: torch.empty(shape, device="meta") for key, shape in NAMES[name].items()}
    if name == "vqgan":  # the file also has the loss networks of the training
        tensors["loss.discriminator.main.0.weight"] = torch.empty(64, 3, 4, 4, device="meta")
    monkeypatch.setattr("dall3.weights.convert.state.read_archive", lambda path: {"state_dict": tensors})
    found = load_vqgan("vqgan.ckpt").config
    assert (found.n_embed, found.embed_dim, found.ch, found.dwt) == (8192, 256, 128, name == "vqgan_dwt")
