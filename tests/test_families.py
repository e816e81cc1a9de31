"""The pipeline with DALL·E Mini and ruDALL-E, loaded from their files: draws, and errors before any work."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from dall3 import CheckpointError, Dall3Pipeline
from dall3.batch.job import STAGE_NAMES, make_job
from dall3.models.packed import Int8Linear, has_fbgemm
from dall3.weights.folder import load_files
from pretend_gpu import pretend_gpu
from test_families_mini import save_halves

from originals import GOLDEN, Golden

TOKENIZER = GOLDEN / "tokenizer_mini"
QUICK = {"seed": 0, "progress": False}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("families")
    torch.save(Golden("vqgan_f16").weights(), folder / "detoker.pt")
    torch.save(Golden("rudalle_v3").weights(), folder / "pytorch_model_v3.bin")
    torch.save({"state_dict": Golden("rudalle_dwt").weights()}, folder / "dwt.ckpt")
    return SimpleNamespace(folder=folder, halves=save_halves(folder))


@pytest.fixture(scope="module")
def mini(files: SimpleNamespace) -> Dall3Pipeline:
    """Its 128 embeddings do not determine the number of codes; the VQGAN does."""
    bpe = (TOKENIZER / "vocab.json", TOKENIZER / "merges.txt")
    return Dall3Pipeline.from_checkpoints(dalle=files.halves, bpe=bpe, vqgan=files.folder / "detoker.pt")


@pytest.fixture(scope="module")
def rudalle(files: SimpleNamespace) -> Dall3Pipeline:
    return Dall3Pipeline.from_checkpoints(
        dalle=files.folder / "pytorch_model_v3.bin",
        dalle_config={"num_attention_heads": 4},
        bpe=GOLDEN / "tokenizer_ru" / "bpe.model",
        vqgan=files.folder / "dwt.ckpt",
    )


def test_mini_with_top_k_1_draws_the_originals_greedy_tokens(mini: Dall3Pipeline) -> None:
    """With any seed, because only one code is kept."""
    stored, about = Golden("dalle_mini").expected, Golden("dalle_mini").about
    tokens = mini.generate_tokens(about["texts"][1], top_k=1, cond_scale=10.0, **QUICK)
    assert torch.equal(tokens[0, :32], stored["greedy_10"][1])
    out = mini(about["texts"][1], top_k=24, cond_scale=10.0, **QUICK)
    assert out.images[0].size == (256, 256) and out.settings["top_k"] == 24
    assert torch.equal(mini.repeat(out, progress=False).tokens, out.tokens)


@pytest.mark.skipif(not has_fbgemm(), reason="torch has no FBGEMM here")
def test_a_transformer_published_in_half_precision_stays_so_on_a_cpu_only(
    files: SimpleNamespace, mini: Dall3Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is memory-mapped, draws the same tokens, and gets the dtype of the other parts on a GPU."""
    paths = {"transformer": save_halves(tmp_path, torch.float16), "vqgan": (files.folder / "detoker.pt", None)}
    drawn = []
    for dtype, expected in ((None, torch.float16), (torch.float32, torch.float32)):
        pipe = Dall3Pipeline(**load_files(paths, "cpu", dtype), text_encoder=mini.text_encoder)
        assert pipe.transformer.head[0].dtype == expected and pipe.dtype == torch.float32
        drawn.append(pipe.generate_tokens("a cat", top_k=1, cond_scale=10.0, **QUICK))
        with pretend_gpu(monkeypatch):
            assert copy.deepcopy(pipe).to("cuda").transformer.head[0].dtype == torch.float32
            assert copy.deepcopy(pipe).enable_model_offload("cuda").transformer.head[0].dtype == torch.float32
        assert pipe.to("cpu").transformer.head[0].dtype == expected
    assert torch.equal(*drawn)
    whole = {"transformer": save_halves(tmp_path, torch.float32), "vqgan": paths["vqgan"]}
    assert load_files(whole, "cpu", None)["transformer"].head[0].dtype == torch.float32


def test_rudalle_decodes_to_twice_the_size_that_it_encodes(rudalle: Dall3Pipeline) -> None:
    stored, about = Golden("rudalle_v3").expected, Golden("rudalle_v3").about
    tokens = rudalle.generate_tokens(about["texts"][0], top_k=1, top_p=0.995, **QUICK)
    assert torch.equal(tokens[0], stored["greedy"][0])
    out = rudalle(about["texts"][0], top_k=16, top_p=0.9, init_image=Image.new("RGB", (128, 128), "blue"), **QUICK)
    assert out.images[0].size == (256, 256)
    assert rudalle.estimate().seconds > 0
    job = make_job(rudalle, None, "float32", dict.fromkeys(STAGE_NAMES, "cpu"), 1, 1, 1, None, None, False, 1, {})
    assert job.tokens == 256


def test_what_a_family_cannot_do_is_an_error_before_any_work(mini: Dall3Pipeline, rudalle: Dall3Pipeline) -> None:
    with pytest.raises(ValueError, match="DALL·E Mini cannot read the prompt 'рыжий кот': it reads English"):
        mini("рыжий кот", **QUICK)
    with pytest.raises(ValueError, match="ruDALL-E cannot read the prompt 'a red cube': it reads Russian"):
        rudalle.generate_tokens("a red cube", **QUICK)
    with pytest.raises(ValueError, match="a DalleMini has no text output"):
        mini.complete_text("a red cube")
    with pytest.raises(ValueError, match="this VQGAN has no encoder"):
        mini.variations(Image.new("RGB", (256, 256)), "a red cube", **QUICK)


def test_a_vqgan_of_another_family_is_refused(mini: Dall3Pipeline, rudalle: Dall3Pipeline) -> None:
    with pytest.raises(ValueError, match="the vqgan is DALL·E Mini's"):
        Dall3Pipeline(**rudalle.components | {"vqgan": mini.vqgan})


def test_files_that_do_not_belong_together_are_refused_before_any_work(
    files: SimpleNamespace, rudalle: Dall3Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = files.folder
    with pytest.raises(ValueError, match="DALL·E Mini's .detoker.pt., but this transformer draws other codes"):
        Dall3Pipeline.from_checkpoints(
            dalle=folder / "pytorch_model_v3.bin",
            dalle_config={"num_attention_heads": 4},
            bpe=GOLDEN / "tokenizer_ru" / "bpe.model",
            vqgan=folder / "detoker.pt",
        )
    for part, name in (("vqgan", "detoker.pt"), ("dalle", "pytorch_model_v3.bin"), ("vqgan", "dwt.ckpt")):
        (folder / f"half_{name}").write_bytes((folder / name).read_bytes()[:-50_000])
        with pytest.raises(CheckpointError, match=f"half_{name}: truncated or damaged") as error:
            Dall3Pipeline.from_checkpoints(**{part: folder / f"half_{name}"})
        assert "\n" not in str(error.value)
    names = json.loads((GOLDEN / "dalle_mini" / "names.json").read_text())["files"]
    true = {
        name: {key: torch.empty(shape, dtype=torch.float16, device="meta") for key, shape in names[name].items()}
        for name in ("encoder_mini.pt", "decoder.pt")
    }
    monkeypatch.setattr("dall3.weights.convert.state.read_archive", lambda path: true[path.name])
    with pytest.raises(
        CheckpointError, match="encoder has 1024 channels, the decoder 2048; pass both files of Mini or both of Mega"
    ):
        Dall3Pipeline.from_checkpoints(dalle=("encoder_mini.pt", "decoder.pt"))


def test_a_family_is_saved_and_loaded_again(mini: Dall3Pipeline, tmp_path: Path) -> None:
    mini.defaults = {"top_k": 24, "cond_scale": 10.0}
    again = Dall3Pipeline.from_pretrained(mini.save_pretrained(tmp_path / "mini"))
    assert torch.equal(again.generate_tokens("a cube", **QUICK), mini.generate_tokens("a cube", **QUICK))
    mini.defaults = {}


def test_int8_weights_of_any_width() -> None:
    """Mini's feed-forward width is 2,730, which is not a multiple of 8."""
    torch.manual_seed(0)
    weight, rows = torch.randn(16, 2730), torch.randn(3, 2730)
    expected = rows @ weight.T
    assert (Int8Linear(weight, None)(rows) - expected).abs().max() < 0.02 * expected.abs().max()
