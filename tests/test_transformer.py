"""The transformer gives the originals' numbers from their checkpoints, in one pass and token by token."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from dall3.models.transformer import SHARING_ROWS, DalleTransformer, TransformerConfig, rotary_angles
from dall3.tokens.decoding import draw_image_tokens
from dall3.tokens.sampling import Sampling
from dall3.weights.convert.dalle_pytorch import load_transformer
from dall3.weights.folder import BUNDLED, load_part, save_part

from originals import Golden, close, save_dalle

CASES = [
    "dalle_default",
    "dalle_sparse",
    "dalle_absolute",
    "dalle_reversible",
    "dalle_stable_sandwich",
    "dalle_pytorch_1_6",
    "dalle_pytorch_1_6_shared",
    "dalle_mlp",
    "dalle_no_shift",
    "dalle_1_6_everything",
    "dalle_deepspeed_sparse",
]
# The stored positions, as listed in about.json.
TEXT_STEP = {"dalle_deepspeed_sparse": 16}
NULL_STEP = {"dalle_1_6_everything": 8}
STORED = {name: set(Golden(name).expected) for name in CASES}
GREEDY = Sampling(top_k=0.99999)


def text_of(name: str) -> torch.Tensor:
    # dalle-pytorch 1.6.6 zeroes its caller's tensor, so these two store zeros; their logits belong to this text.
    zeroed = name in ("dalle_pytorch_1_6", "dalle_pytorch_1_6_shared")
    return Golden("dalle_default" if zeroed else name).expected["text"]


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    golden = Golden(request.param)
    model = load_transformer(save_dalle(tmp_path_factory.mktemp("dalle") / "dalle.pt", golden))
    text, image = text_of(request.param), golden.expected["image"]
    x = torch.cat((model.embed_text(text), model.embed_image(image, torch.arange(image.shape[1]))), dim=1)
    return SimpleNamespace(
        name=request.param,
        weights=golden.weights(),
        expected=golden.expected,
        model=model,
        config=model.config,
        text=text,
        image=image,
        logits=model(text, image),
        embeddings=x[:, : model.config.seq_len],
    )


def storing(tensor: str) -> pytest.MarkDecorator:
    """The cases in which the original's `tensor` is stored."""
    return pytest.mark.parametrize("case", [name for name in CASES if tensor in STORED[name]], indirect=True)


def image_part(case, logits: torch.Tensor) -> torch.Tensor:
    return logits[:, case.config.text_seq_len :, case.config.text_vocabulary :]


def test_text_logits(case):
    logits = case.logits[:, : case.config.text_seq_len, : case.config.text_vocabulary]
    assert close(logits[:, :: TEXT_STEP.get(case.name, 1)], case.expected["text_logits"], 1e-4)


def test_image_logits(case):
    assert close(image_part(case, case.logits), case.expected["image_logits"], 1e-4)


def test_loss(case):
    assert close(case.model.loss(case.text, case.image)[None], case.expected["loss"], 1e-4)


@storing("partial_last_logits")
def test_image_logits_of_a_partial_image(case):
    logits = case.model(case.text, case.image[:, :37])
    assert close(image_part(case, logits)[:, -1], case.expected["partial_last_logits"], 1e-4)


@storing("partial_last_logits_150")
def test_image_logits_of_a_longer_partial_image(case):
    logits = case.model(case.text, case.image[:, :150])
    assert close(image_part(case, logits)[:, -1], case.expected["partial_last_logits_150"], 1e-4)


@storing("null_image_logits")
def test_image_logits_without_the_text(case):
    logits = image_part(case, case.model(torch.zeros_like(case.text), case.image))
    assert close(logits[:, :: NULL_STEP.get(case.name, 1)], case.expected["null_image_logits"], 1e-4)


@storing("greedy")
def test_greedy_tokens(case):
    uniforms = torch.full((1, case.config.image_seq_len), 0.5)
    drawn = torch.cat([draw_image_tokens(case.model, text, uniforms, GREEDY) for text in case.text])
    assert torch.equal(drawn, case.expected["greedy"])


def test_impossible_tokens_are_masked(case):
    lowest = torch.finfo(torch.float32).min
    assert (case.logits[:, : case.config.text_seq_len, case.config.text_vocabulary :] == lowest).all()
    assert (case.logits[:, case.config.text_seq_len :, : case.config.text_vocabulary] == lowest).all()


@pytest.mark.parametrize("first_chunk, static", [("<bos>", False), ("text", False), ("text", True)])
def test_decoding_with_caches_is_the_same(case, first_chunk, static):
    c, x = case.config, case.embeddings
    at_once = case.model.run(x, torch.arange(c.seq_len), c.seq_len)
    first = c.text_length if first_chunk == "text" else 1
    caches, hidden = case.model.new_state(), []
    for start, end in zip([0, *range(first, c.seq_len)], range(first, c.seq_len + 1), strict=True):
        hidden.append(case.model.run(x[:, start:end], torch.arange(start, end), None if static else end, caches))
    assert close(torch.cat(hidden, dim=1), at_once, 1e-4)


@pytest.mark.parametrize("static", [False, True])
def test_steps_give_the_logits_of_teacher_forcing(case, static):
    text, image = case.text[:1], case.image[:1, :20]
    cache = case.model.prefill(text, 2)
    found = [cache.first_logits[:, None]]
    for i in range(image.shape[1]):
        previous = image[:, i : i + 1].expand(2, -1)
        logits = case.model.step(previous, torch.tensor([i]), cache, None if static else i + 1)
        assert close(logits[:1], logits[1:], 1e-5)
        found.append(logits[:1])
    assert close(torch.cat(found, dim=1), case.model.image_token_logits(text, image), 1e-4)


@pytest.mark.parametrize("static", [False, True])
def test_rows_that_share_their_text_give_the_logits_of_teacher_forcing(case, static):
    text, rows = torch.cat((case.text[:1], case.text[:1].flip(1))), SHARING_ROWS
    images = torch.stack([case.image[0, :12].roll(k) for k in range(rows)])
    for _ in range(2):  # the second time reuses the tensors of the first
        cache, found = case.model.prefill(text, rows), []
        for i in range(images.shape[1]):
            place, end = torch.tensor([i]), None if static else i + 1
            found.append(case.model.step(images[:, i : i + 1], place, cache, end))
        case.model.release(cache)
    expected = case.model.image_token_logits(text.repeat_interleave(rows, 0), images.repeat(2, 1))[:, 1:]
    assert close(torch.cat(found, dim=1), expected, 1e-4)


def test_rotary_table_is_that_of_the_checkpoint(case):
    stored = case.weights.get("transformer.pos_emb")
    assert case.config.rotary_emb == (stored is not None)
    if stored is not None:
        stored = stored.reshape(stored.shape[-2:])
        assert close(rotary_angles(case.config)[: len(stored)], stored, 1e-5)  # the fork's table has one row less


def test_release_decides_the_window_of_conv_like(tmp_path):
    golden = Golden("dalle_pytorch_1_6")
    path = save_dalle(tmp_path / "dalle.pt", golden)
    late, early = load_transformer(path), load_transformer(path, release="1.4.2")
    assert late.config.attn_types == ("full", "axial_row", "axial_col", "conv_like_causal")
    assert early.config.attn_types == ("full", "axial_row", "axial_col", "conv_like")
    text, image = text_of("dalle_pytorch_1_6"), golden.expected["image"]
    assert not close(early(text, image), late(text, image), 1e-2)

    said = save_dalle(tmp_path / "version.pt", golden, version="1.4.2")
    assert load_transformer(said).config == early.config


def test_both_names_of_the_axial_tables_load(tmp_path):
    golden = Golden("dalle_absolute")
    for separator in ("_", "."):
        weights = {
            name.replace("image_pos_emb.weights_", "image_pos_emb.weights.").replace("weights.", f"weights{separator}")
            if name.startswith("image_pos_emb")
            else name: tensor
            for name, tensor in golden.weights().items()
        }
        assert {f"image_pos_emb.weights{separator}0", f"image_pos_emb.weights{separator}1"} <= set(weights)
        model = load_transformer(save_dalle(tmp_path / "dalle.pt", golden, weights=weights))
        logits = model(golden.expected["text"], golden.expected["image"])
        c = model.config
        assert close(logits[:, c.text_seq_len :, c.text_vocabulary :], golden.expected["image_logits"], 1e-4)


SMALL = {"num_text_tokens": 8, "num_image_tokens": 8, "text_seq_len": 4, "dim": 16, "depth": 2, "grid_size": 2}


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"attn_types": ("full", "axial_diagonal")}, "axial_diagonal.*expected some of full, axial_row"),
        ({"attn_types": ("full", "mlp")}, "'mlp'.*rotary_emb=False"),
        ({"dim": 18}, "dim=18 is not divisible by 4"),
        ({"dim_head": 15}, "dim_head=15 is odd"),
        ({"attn_types": ("full", "axial_row"), "shared_attn_ids": (0, 0)}, "shared_attn_ids: layer 1 is 'axial_row'"),
    ],
)
def test_a_configuration_that_contradicts_itself_is_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        DalleTransformer(TransformerConfig(**SMALL | changes))


def test_text_of_another_length_is_refused():
    model = DalleTransformer(TransformerConfig(**SMALL))
    with pytest.raises(ValueError, match="text has 5 tokens; this transformer takes 4"):
        model(torch.ones(1, 5, dtype=torch.int64))


@pytest.mark.parametrize("rounded", [False, True], ids=["computed", "rounded"])
@pytest.mark.parametrize("old_names", [False, True], ids=["new names", "old names"])
def test_only_a_rotary_table_that_differs_from_the_computed_one_is_saved(rounded, old_names, tmp_path):
    model = DalleTransformer(TransformerConfig(**SMALL | {"grid_size": 4}))
    table = model.rotary_table.half().float() if rounded else model.rotary_table
    state = model.state_dict() | {"rotary_table": table}
    if old_names:
        del state["rotary_table"]
        state |= {"rotary_cos": table[..., 0], "rotary_sin": table[..., 1]}
    assert "rotary_table" not in model.state_dict()
    model.load_state_dict(state)
    assert ("rotary_table" in model.state_dict()) == rounded
    save_part(model, tmp_path, None)
    loaded = load_part(tmp_path)
    assert torch.equal(loaded.rotary_table, table)
    assert loaded.state_dict().keys() == model.state_dict().keys()


def test_the_bundled_rotary_table_is_read_by_its_old_names():
    stored = load_file(BUNDLED / "transformer" / "model.safetensors")
    table = load_part(BUNDLED / "transformer").rotary_table
    assert torch.equal(table, torch.stack((stored["rotary_cos"], stored["rotary_sin"]), dim=-1).float())
