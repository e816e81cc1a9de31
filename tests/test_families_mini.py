"""DALL·E Mini and Mega, loaded from files in min-dalle's format, give the numbers of min-dalle 0.4.11."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from dall3.models.dalle_mini import DalleMini, DalleMiniConfig
from dall3.models.rudalle import RudalleConfig
from dall3.models.vqgan import VQModel, check_codes
from dall3.text import load_text_encoder
from dall3.weights import load_transformer, load_vqgan
from dall3.weights.archive import CheckpointError
from dall3.weights.convert import dalle_mini as convert
from dall3.weights.folder import load_part, save_part

from fill import state_dict
from originals import GOLDEN, Golden, close

FOLDER = GOLDEN / "dalle_mini"
CODES = {"num_image_tokens": 96}
NAMES = json.loads((FOLDER / "names.json").read_text())


def state(half: str) -> dict[str, torch.Tensor]:
    return state_dict(json.loads((FOLDER / f"{half}_keys.json").read_text()))


def save_halves(folder, dtype=torch.float32, **changes):
    """Save as in the published files: one tensor holds a matrix of all layers, and a layer has a transposed slice."""
    for half in ("encoder", "decoder"):
        tensors = {name: tensor.to(dtype) for name, tensor in changes.get(half, state(half)).items()}
        for name in [name for name in tensors if name.startswith("layers.0.") and tensors[name].dim() == 2]:
            names = [name, name.replace("layers.0.", "layers.1.")]
            stored = torch.stack([tensors[one].T for one in names])
            tensors |= {one: matrix.T for one, matrix in zip(names, stored, strict=True)}
        torch.save(tensors, folder / f"{half}.pt")
    return folder / "encoder.pt", folder / "decoder.pt"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return save_halves(tmp_path_factory.mktemp("mini"))


@pytest.fixture(scope="module")
def model(files):
    return load_transformer(files, CODES)


@pytest.fixture(scope="module")
def expected():
    return load_file(FOLDER / "expected.safetensors")


def test_encoded_text(model, expected):
    assert close(model.encode_text(expected["text"])[0], expected["encoded"], 1e-4)
    assert close(model.encode_text(expected["text_uncond"])[0], expected["encoded_uncond"], 1e-4)


def test_logits_and_guided_logits(model, expected):
    image, positions = expected["image"], expected["positions"]
    logits = model.image_token_logits(expected["text"], image)[:, positions]
    without = model.image_token_logits(expected["text_uncond"].expand(3, -1), image)[:, positions]
    assert close(logits, expected["logits"], 1e-4)
    assert close(without, expected["logits_uncond"], 1e-4)
    for scale in (10, 16):
        assert close(without + scale * (logits - without), expected[f"guided_{scale}"], 1e-4)


def test_logits_of_a_partial_image(model, expected):
    logits = model.image_token_logits(expected["text"], expected["image"][:, :37])
    assert logits.shape == (3, 38, 96)
    at = expected["positions"] <= 37
    assert close(logits[:, expected["positions"][at]], expected["logits"][:, at], 1e-4)


def test_gradients_reach_every_weight(files, expected):
    model = load_transformer(files, CODES).double().requires_grad_(True)
    text, image = expected["text"][:1], expected["image"][:1, :5]
    model.image_token_logits(text, image).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    for weight in (model.image_decoder.layers[0].self_attn.k_proj.weight, model.text_encoder.layers[0].glu.fc0.weight):
        sums = []
        with torch.no_grad():
            for step in (1e-5, -2e-5):
                weight[0, 0] += step
                sums.append(model.image_token_logits(text, image).square().sum())
        assert torch.isclose((sums[0] - sums[1]) / 2e-5, weight.grad[0, 0], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("static", [False, True])
def test_decoding_with_the_cache(model, expected, static):
    texts = torch.cat((expected["text"], expected["text_uncond"]))
    for row in range(2):  # the second call reuses the cache of the first
        image = expected["image"][row]
        cache = model.prefill(torch.stack((texts[row], texts[3])), rows=2)
        logits = [cache.first_logits.repeat_interleave(2, dim=0)]
        for i in range(255):
            ids = image[i].expand(2, 1)
            logits.append(model.step(ids, torch.tensor([i]), cache, None if static else i + 1)[:, 0])
        found = torch.stack(logits, dim=1)[:, expected["cached_positions"]]
        assert close(found[:2], expected["cached_logits"][row].expand(2, -1, -1), 1e-4)
        assert close(found[2:], expected["cached_logits_uncond"][row].expand(2, -1, -1), 1e-4)
        model.release(cache)


def test_several_tokens_per_step_give_the_same_logits(model, expected):
    cache = model.prefill(expected["text"][:1], rows=1)
    image, at_once = expected["image"][:1], model.image_token_logits(expected["text"][:1], expected["image"][:1])
    parts = [model.step(image[:, i : i + 5], torch.arange(i, i + 5), cache, i + 5) for i in range(0, 20, 5)]
    assert close(torch.cat(parts, dim=1), at_once[:, 1:21], 1e-4)


def test_greedy_tokens_under_guidance(model, expected):
    """Drawing begins with the start token, the first row after the codes."""
    for row in range(3):
        cache, drawn = model.prefill(torch.stack((expected["text"][row], model.empty_text())), rows=1), []
        logits = cache.first_logits
        for i in range(32):
            drawn.append((logits[1] + 10 * (logits[0] - logits[1])).argmax())
            logits = model.step(drawn[-1].view(1, 1), torch.tensor([i]), cache, i + 1)[:, 0]
        model.release(cache)
        assert torch.equal(torch.stack(drawn), expected["greedy_10"][row])


def test_the_empty_text_equals_the_encoded_empty_prompt(model, expected):
    encode = load_text_encoder(GOLDEN / "tokenizer_mini", kind="dalle-mini", text_seq_len=64)
    assert torch.equal(model.empty_text(), expected["text_uncond"][0])
    assert torch.equal(encode(""), expected["text_uncond"][0])
    about = json.loads((FOLDER / "about.json").read_text())
    ids = torch.stack([encode(text, truncate=True) for text in about["texts"]])
    assert torch.equal(ids, expected["text"])


def test_half_precision_is_mapped_and_not_copied(tmp_path, expected):
    made = load_transformer(save_halves(tmp_path, torch.float16), CODES, dtype=torch.float16)
    layers = made.image_decoder.layers
    first, second = layers[0].self_attn.q_proj.weight, layers[1].self_attn.q_proj.weight
    assert first.dtype == torch.float16 and first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
    assert made.lm_head.weight.shape == (96, 128)
    logits = made.float().image_token_logits(expected["text"], expected["image"])
    assert close(logits[:, expected["positions"]], expected["logits"], 0.05)


@pytest.mark.parametrize("size", ["mega", "mini"])
def test_every_tensor_of_the_published_files_is_loaded(size, monkeypatch):
    suffix = "_mini" if size == "mini" else ""
    files = {
        half: {
            name: torch.empty(shape, dtype=torch.float16, device="meta")
            for name, shape in NAMES["files"][f"{half}{suffix}.pt"].items()
        }
        for half in ("encoder", "decoder")
    }
    monkeypatch.setattr("dall3.weights.convert.state.read_archive", lambda path: files[path.stem])
    model = convert.load_dalle_mini(
        "encoder", "decoder", dtype=torch.float16
    )  # an error names missing and unexpected tensors
    sizes = NAMES["sizes"][size]
    assert model.config == DalleMiniConfig(
        num_text_tokens=sizes["text_vocabulary"],
        num_image_tokens=16384,
        text_seq_len=64,
        dim=sizes["width"],
        ff_dim=sizes["glu_width"],
        encoder_depth=sizes["layers"],
        decoder_depth=sizes["layers"],
    )


def test_a_saved_folder_loads_again(model, expected, tmp_path):
    save_part(model, tmp_path, None)
    again = load_part(tmp_path)
    assert isinstance(again, DalleMini)
    logits = again.image_token_logits(expected["text"], expected["image"])
    assert close(logits[:, expected["positions"]], expected["logits"], 1e-4)


def test_files_that_do_not_fit_are_refused(files, tmp_path):
    with pytest.raises(CheckpointError, match="128 image embeddings do not determine .* hparams={'num_image_tokens'"):
        load_transformer(files)
    with pytest.raises(CheckpointError, match="the decoder of DALL·E Mini or Mega; pass both files"):
        load_transformer(files[1])
    with pytest.raises(CheckpointError, match="contains the decoder of DALL·E Mini .* expected the encoder"):
        load_transformer((files[1], files[0]), CODES)
    wide = {
        name: torch.cat([tensor] * 2, dim=-1) if "embed" in name else tensor
        for name, tensor in state("decoder").items()
    }
    with pytest.raises(CheckpointError, match="the encoder has 128 channels, the decoder 256; .* of Mini or both"):
        load_transformer(save_halves(tmp_path, decoder=wide), CODES)
    lacking = {name: tensor for name, tensor in state("decoder").items() if name != "layers.1.glu.fc2.weight"}
    torch.save(lacking, tmp_path / "decoder.pt")
    with pytest.raises(CheckpointError, match=r"missing: image_decoder\.layers\.1\.glu\.fc2\.weight$"):
        load_transformer((files[0], tmp_path / "decoder.pt"), CODES)
    (tmp_path / "decoder.pt").write_bytes(files[1].read_bytes()[:-40_000])
    with pytest.raises(CheckpointError, match="decoder.pt: truncated or damaged") as error:
        load_transformer((files[0], tmp_path / "decoder.pt"), CODES)
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def detoker(tmp_path_factory):
    path = tmp_path_factory.mktemp("detoker") / "detoker.pt"
    torch.save(Golden("vqgan_f16").weights(), path)
    return path


def test_pictures(detoker):
    expected, vqgan = Golden("vqgan_f16").expected, load_vqgan(detoker)
    assert (vqgan.num_tokens, vqgan.downsampling) == (96, 16)
    pictures = vqgan.decode(expected["indices"][:2])
    for name in ("decoded", "decoded_eps_1e-6"):
        assert close(pictures[:, :, ::4, ::4], expected[name].clamp(0, 1), 1e-4)
    assert close(pictures[:, :, 112:144, 112:144], expected["decoded_crop"].clamp(0, 1), 1e-4)


def test_detoker_without_an_encoder_refuses_to_encode(detoker):
    with pytest.raises(ValueError, match="no encoder.* detoker.pt; give taming's checkpoint"):
        load_vqgan(detoker).encode(torch.zeros(1, 3, 256, 256))


def test_detoker_at_full_size(monkeypatch):
    tensors = {name: torch.empty(shape, device="meta") for name, shape in NAMES["files"]["detoker.pt"].items()}
    monkeypatch.setattr("dall3.weights.convert.state.read_archive", lambda path: tensors)
    found = load_vqgan("detoker.pt").config
    assert (found.ch, found.ch_mult, found.num_res_blocks, found.attn_levels) == (128, (1, 1, 2, 2, 4), 2, (4,))
    assert (found.n_embed, found.embed_dim, found.has_encoder, found.unit_range) == (16384, 256, False, True)


def test_a_vqgan_of_other_codes_is_refused(model, detoker):
    vqgan = load_vqgan(detoker)
    check_codes(model.config, vqgan)
    config = RudalleConfig(256, 96, 24, 64, 5, 4, 16)
    with pytest.raises(ValueError, match="DALL·E Mini's .detoker.pt., but this transformer draws other codes"):
        check_codes(config, vqgan)
    with pytest.raises(ValueError, match=r"pixels are in \[-1, 1\], but .* detoker.pt, or .* unit_range=True"):
        check_codes(model.config, VQModel(replace(vqgan.config, unit_range=False)))
    with pytest.raises(ValueError, match="the transformer draws 8192 codes, the vqgan has 96"):
        check_codes(replace(config, num_image_tokens=8192), vqgan)
