"""Packed linear layers on a CPU give the logits of the transformer, int8 approximately."""

import copy
import gc
import weakref

import pytest
import torch

from dall3.models import packed
from dall3.models.dalle_mini import DalleMini, DalleMiniConfig
from dall3.models.packed import (
    FLOAT16_ROWS,
    Float16Linear,
    Int8Linear,
    PackedLinear,
    RowLinear,
    TorchaoLinear,
    can_pack,
    has_fbgemm,
    prepare,
)
from dall3.models.rudalle import Rudalle, RudalleConfig
from dall3.models.transformer import DalleTransformer, TransformerConfig
from dall3.tokens.decoding import draw_image_tokens
from dall3.tokens.sampling import Sampling
from dall3.tokens.seeds import candidate_uniforms

from originals import close

SETTINGS = dict(num_text_tokens=30, num_image_tokens=64, text_seq_len=8, dim=64, depth=3, heads=2, dim_head=32)
needs_fbgemm = pytest.mark.skipif(not has_fbgemm(), reason="torch has no FBGEMM here")
needs_packing = pytest.mark.skipif(not can_pack(torch.zeros(1)), reason="oneDNN has no layout of its own here")


def make_transformer(**changes):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = DalleTransformer(TransformerConfig(**SETTINGS | {"grid_size": 4} | changes))
        for parameter in model.parameters():
            parameter.data.normal_(0, 0.1)
    return model.eval().requires_grad_(False)


def make_mini():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = DalleMiniConfig(100, 64, 8, dim=64, ff_dim=96, encoder_depth=1, decoder_depth=2, grid_size=4)
        return DalleMini(config).eval().requires_grad_(False)


def make_rudalle():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Rudalle(RudalleConfig(100, 64, 8, dim=64, depth=2, heads=2, grid_size=4)).eval().requires_grad_(False)


TEXT = torch.tensor([[3, 4, 5, 0, 0, 0, 0, 0]])
KINDS = {
    "plain": {},
    "shared layers": {"shared_attn_ids": (0, 1, 0), "shared_ff_ids": (0, 0, 1)},
    "gmlp": {"attn_types": ("full", "mlp"), "rotary_emb": False, "share_input_output_emb": True},
}


@needs_packing
@pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize(
    "quantize, rows, capability, kind, tolerance",
    [
        (None, None, "AVX2", PackedLinear, 1e-5),
        (None, 1, "AVX2", RowLinear, 1e-5),
        (None, 1, "AVX512", PackedLinear, 1e-5),
        ("int8", 1, "AVX2", Int8Linear, 0.15),
        pytest.param("float16", 1, "AVX2", Float16Linear, 0.01, marks=needs_fbgemm),
    ],
)
def test_a_prepared_transformer_gives_the_same_logits(
    changes, quantize, rows, capability, kind, tolerance, monkeypatch
):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    model, image = make_transformer(**changes), torch.randint(64, (3, 16), generator=torch.Generator().manual_seed(1))
    ready, c = prepare(model, quantize, rows), model.config
    assert sum(isinstance(module, kind) for module in ready.modules()) > c.depth
    assert not any(isinstance(module, torch.nn.Linear) for module in ready.layers.modules())

    expected = model(TEXT.expand(3, -1), image)[:, c.text_seq_len :, c.text_vocabulary :]
    hidden = torch.cat((ready.embed_text(TEXT.expand(3, -1)), ready.embed_image(image, torch.arange(16))), dim=1)
    hidden = ready.run(hidden[:, : c.seq_len], torch.arange(c.seq_len), c.seq_len)
    logits = ready.image_logits(hidden[:, c.text_seq_len :])
    assert close(logits, expected, tolerance * expected.std().item())
    assert close(logits, expected, 1e-4 * expected.std().item()) == (quantize is None)  # so that rounding has an effect


@needs_packing
@needs_fbgemm
@pytest.mark.parametrize("capability, most", [("AVX2", 1024), ("AVX512", FLOAT16_ROWS)])
def test_weights_that_float16_represents_are_stored_in_it_and_give_the_same_tokens(capability, most, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    model, uniforms = make_transformer().half().float(), candidate_uniforms(0, range(20), 16)
    ready = prepare(model, rows=most)
    assert isinstance(ready.image_head, Float16Linear) and ready.image_emb.weight.dtype == torch.float32
    assert isinstance(prepare(model, rows=most + 1).image_head, Float16Linear if most == 1024 else PackedLinear)
    drawn = [draw_image_tokens(model, TEXT[0], uniforms, Sampling(temperature=2.0), batch) for batch in (4, 20)]
    monkeypatch.setattr(packed, "has_fbgemm", lambda: False)
    with pytest.raises(ValueError, match="quantize='float16' needs FBGEMM"):
        prepare(model, "float16")
    packed.PREPARED.clear()
    assert not isinstance(prepare(model, rows=4).image_head, Float16Linear)
    expected = draw_image_tokens(model, TEXT[0], uniforms, Sampling(temperature=2.0))
    assert all(torch.equal(tokens, expected) for tokens in drawn)


@needs_packing
@needs_fbgemm
@pytest.mark.parametrize("make", [make_transformer, make_mini, make_rudalle], ids=["dalle", "mini", "rudalle"])
def test_float16_weights_are_multiplied_in_float32_and_stay_as_they_are(make):
    full = make().half().float()
    half, uniforms, text = copy.deepcopy(full).half(), candidate_uniforms(0, range(3), 16), TEXT[0]
    settings = Sampling(temperature=2.0, cond_scale=2.0)
    assert torch.equal(
        draw_image_tokens(half, text, uniforms, settings), draw_image_tokens(full, text, uniforms, settings)
    )
    assert {tensor.dtype for tensor in half.parameters()} == {torch.float16}
    ready = prepare(half, rows=6)
    assert isinstance(ready.image_head, Float16Linear)
    expected = full.image_token_logits(TEXT, torch.zeros(1, 1, dtype=torch.int64))
    assert close(ready.prefill(TEXT, 1).first_logits, expected[:, 0], 1e-4)


@needs_packing
def test_weights_that_float16_would_round_stay_in_float32_by_default():
    model = make_transformer().half().float()
    model.layers[1][0].function.to_qkv.weight[0, 0] = 1 / 3
    assert not isinstance(prepare(model, rows=4).image_head, Float16Linear)


@needs_fbgemm
def test_a_weight_outside_of_float16s_range_is_refused():
    with pytest.raises(ValueError, match=r"a weight of 70000 does not fit float16"):
        Float16Linear(torch.tensor([[1.0, 70000.0]]), None)


@needs_packing
def test_one_layout_is_kept_at_a_time():
    model = make_transformer()
    first = weakref.ref(prepare(model))
    prepare(model, "int8")
    gc.collect()
    assert first() is None


@needs_packing
def test_a_prepared_transformer_leaves_the_other_as_it_is_and_shares_its_tensors():
    model = make_transformer()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ready = prepare(model)
    assert ready.image_emb.weight.data_ptr() == model.image_emb.weight.data_ptr()
    assert prepare(ready) is ready
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@needs_packing
@pytest.mark.parametrize("quantize", [None, "int8"])
def test_a_prepared_transformer_is_kept_until_a_weight_changes_or_the_transformer_goes(quantize):
    model, text = make_transformer(), TEXT[:1]

    def head(ready):
        return ready.run(ready.embed_text(text), torch.arange(9), 9)

    ready = prepare(model, quantize)
    assert prepare(model, quantize) is ready and prepare(model, "int8" if quantize is None else None) is not ready
    before = head(ready)
    weight = model.layers[0][1].function.proj_in.weight
    weight.data *= 2  # does not increase the version counter
    changed = prepare(model, quantize)
    assert changed is not ready and not torch.allclose(head(changed), before)
    weight.data /= 2
    assert torch.equal(head(prepare(model, quantize)), before)
    model.layers[0][1].function.proj_out.bias = torch.nn.Parameter(torch.ones(model.config.dim))
    assert not torch.allclose(head(prepare(model, quantize)), before)
    gone = weakref.ref(prepare(model, quantize))
    del model, ready, changed, weight
    gc.collect()
    assert gone() is None


@needs_packing
@pytest.mark.parametrize("dim", [0, 1], ids=["rows", "columns"])
@pytest.mark.parametrize("by_data", [True, False], ids=["data", "counted"])
@pytest.mark.parametrize("part", ["layer", "head"])
def test_a_prepared_transformer_notices_reordered_weights(part, by_data, dim):
    """Swapping rows or columns does not change any sum over a weight."""
    model = make_transformer()
    uniforms = candidate_uniforms(0, range(4), 16)
    draw_image_tokens(model, TEXT[0], uniforms, Sampling(temperature=2.0))
    weight = model.layers[0][0].function.to_qkv.weight if part == "layer" else model.to_logits.weight
    swapped = weight.roll(1, dims=dim)
    if by_data:
        weight.data[:] = swapped
    else:
        weight.copy_(swapped)
    fresh = make_transformer()
    fresh.load_state_dict(model.state_dict())
    drawn = [draw_image_tokens(one, TEXT[0], uniforms, Sampling(temperature=2.0)) for one in (model, fresh)]
    assert torch.equal(*drawn)


def test_int8_weights_are_within_half_a_quantization_step():
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 6)[:, None]
    layer = Int8Linear(weight, None)
    step = weight.abs().amax(dim=1, keepdim=True) / 127
    # The scales are stored in bfloat16, with a relative error of up to 1/256.
    restored = layer.weight.float() * layer.scale.float()[:, None]
    assert ((restored - weight).abs() <= step * 0.5 + weight.abs() / 256).all()
    x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(1))
    expected = x @ restored.T
    assert layer(x).shape == (2, 3, 6)
    assert ((layer(x) - expected).abs() <= 0.02 * expected.abs().amax(dim=(0, 1))).all()


def test_torchaos_int8_weights_are_within_half_a_quantization_step_and_compile():
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 6)[:, None]
    bias = torch.arange(6.0)
    layer = TorchaoLinear(weight, bias)
    step = weight.abs().amax(dim=1, keepdim=True) / 127
    restored = (layer(torch.eye(64)) - bias).T
    assert ((restored - weight).abs() <= step * 0.51).all()
    torch._dynamo.reset()
    assert close(torch.compile(layer, fullgraph=True, backend="aot_eager")(torch.eye(64)), layer(torch.eye(64)), 1e-4)


def test_drawing_with_int8_is_close_and_only_on_a_cpu_or_a_gpu():
    model, uniforms = make_transformer(), candidate_uniforms(0, range(40), 16)
    plain = draw_image_tokens(model, TEXT[0], uniforms, Sampling(temperature=2.0))
    small = draw_image_tokens(model, TEXT[0], uniforms, Sampling(temperature=2.0, quantize="int8"))
    assert (plain[:, 0] == small[:, 0]).float().mean() > 0.8  # later tokens depend on the ones before
    with pytest.raises(
        ValueError, match="quantize='int8' needs a CPU or a CUDA device, and the transformer is on meta"
    ):
        prepare(make_transformer().to("meta"), "int8")
    with pytest.raises(ValueError, match="quantize='int4' is not known; expected float16, int8 or None"):
        Sampling(quantize="int4")


def test_a_compiled_transformer_draws_the_same_tokens_by_the_same_graphs_for_all_steps():
    torch._dynamo.reset()
    model, graphs = make_transformer(attn_types=("full", "axial_row")), []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    uniforms = candidate_uniforms(0, range(3), 16)
    plain = draw_image_tokens(model, TEXT[0], uniforms, Sampling(top_p=0.9, cond_scale=2.0))
    model.compile(backend=count)
    assert torch.equal(draw_image_tokens(model, TEXT[0], uniforms, Sampling(top_p=0.9, cond_scale=2.0)), plain)
    assert len(graphs) == 2  # the network and the sampling
