"""Sampling of tokens: the originals' filters, frequencies of samples, and the decoding loop."""

import copy
import re

import pytest
import torch
from safetensors.torch import load_file

from dall3.tokens.decoding import draw_image_tokens, draw_text_tokens, image_token_steps
from dall3.tokens.sampling import Sampling, choose, filter_top_k, filter_top_p
from dall3.tokens.seeds import candidate_uniforms
from dall3.weights.convert.dalle_pytorch import load_transformer

from originals import GOLDEN, Golden, close, save_dalle

INF = float("inf")
BELOW_ONE = 1 - 2**-24  # the largest float32 below 1


@pytest.fixture(scope="module")
def transformer(tmp_path_factory):
    path = tmp_path_factory.mktemp("dalle") / "dalle.pt"
    return load_transformer(save_dalle(path, Golden("dalle_pytorch_1_6")))


@pytest.fixture(scope="module")
def text():
    return Golden("dalle_default").expected["text"][0]


def image_logits(transformer, text, tokens):
    """Logits of every image token (256, image vocabulary), from one full forward pass."""
    c = transformer.config
    return transformer(text[None], tokens[None])[0, c.text_seq_len :, c.text_vocabulary :]


@pytest.mark.parametrize("name", ["top_k_0.5", "top_k_0.9", "top_p_0.5", "top_p_0.85"])
def test_filters_are_the_originals(name):
    stored = load_file(GOLDEN / "filters.safetensors")
    kind, threshold = name.rsplit("_", 1)
    filtered = {"top_k": filter_top_k, "top_p": filter_top_p}[kind](stored["logits"], float(threshold))
    assert torch.equal(filtered, stored[name])


FILTERS_RUDALLE = load_file(GOLDEN / "filters_rudalle.safetensors")


@pytest.mark.parametrize("name", sorted(FILTERS_RUDALLE.keys() - {"logits"}))
def test_a_count_of_codes_filters_as_rudalle_did(name):
    temperature, top_k, top_p = re.fullmatch(r"temperature_(.+)_top_k_(.+)_top_p_(.+)", name).groups()
    settings = Sampling(temperature=float(temperature), top_k=int(top_k), top_p=float(top_p))
    torch.testing.assert_close(settings.filter(FILTERS_RUDALLE["logits"], 10_000), FILTERS_RUDALLE[name])


def test_a_count_of_codes_draws_as_min_dalle_did():
    stored = load_file(GOLDEN / "dalle_mini" / "expected.safetensors")
    at = stored["positions"].tolist().index(39)
    with_text, without = stored["logits"][:, at], stored["logits_uncond"][:, at]
    for temperature, top_k, scale in ((1, 24, 16), (0.5, 8, 10)):
        settings = Sampling(temperature=temperature, top_k=top_k, cond_scale=scale)
        logits = settings.filter(settings.guide(torch.cat((with_text, without))), 96)
        assert close(logits.softmax(dim=-1), stored[f"probabilities_t{temperature}_k{top_k}_s{scale}"], 1e-4)


def test_top_k_counts_the_whole_vocabulary():
    logits = torch.randn(2, 50, generator=torch.Generator().manual_seed(0))
    kept = filter_top_k(logits, 0.75, vocabulary=80).isfinite()
    assert kept.sum(dim=1).tolist() == [20, 20]
    assert torch.equal(filter_top_k(logits, 0.75, vocabulary=8000), logits)  # more than there are: keeps all


def test_top_p_keeps_the_token_that_passes_the_threshold():
    assert filter_top_p(torch.tensor([[0.0, 0.0, -INF]]), 0.5).isfinite().tolist() == [[True, True, False]]


def test_sampled_frequencies_match_the_probabilities():
    probabilities = torch.tensor([0.3, 0.0, 0.02, 0.08, 0.25, 0.1, 0.0, 0.25])
    uniforms = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    drawn = choose(probabilities.log().expand(20_000, -1), uniforms)
    counts, possible = drawn.bincount(minlength=8), probabilities > 0
    assert (counts[~possible] == 0).all()
    wanted = 20_000 * probabilities[possible]
    assert ((counts[possible] - wanted) ** 2 / wanted).sum() < 20.5  # chi-square of 5 degrees, p = 0.001


def test_tokens_of_probability_zero_are_never_drawn():
    logits = torch.tensor([[-INF, -INF, 0.3, -INF, 2.0, -INF]])
    assert choose(logits, torch.tensor([0.0])).item() == 2
    assert choose(logits, torch.tensor([BELOW_ONE])).item() == 4
    # Sums of many probabilities round to less or more than 1; probabilities that underflow count as 0.
    logits = torch.randn(64, 8192, generator=torch.Generator().manual_seed(0))
    logits[:, :100], logits[:, -100:] = -1000, -INF
    for uniform in (0.0, BELOW_ONE):
        drawn = choose(logits, torch.full((64,), uniform))
        assert (logits.softmax(dim=-1)[torch.arange(64), drawn] > 0).all()


def test_a_candidates_random_numbers_follow_from_the_seed_and_its_number():
    uniforms = candidate_uniforms(7, range(8), 256)
    assert torch.equal(candidate_uniforms(7, range(3, 6), 256), uniforms[3:6])
    assert not torch.isclose(candidate_uniforms(8, range(8), 256), uniforms).all(dim=1).any()
    assert len(uniforms.unique(dim=0)) == 8
    assert uniforms.min() >= 0 and uniforms.max() < 1


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"temperature": 0}, "temperature=0"),
        ({"top_k": 1.0}, "top_k=1.0"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_k": 0.9, "top_p": 0.9}, "both top_k and top_p"),
    ],
)
def test_impossible_settings_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        Sampling(**settings)


def test_temperature_divides_after_filtering():
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    uniforms = torch.rand(4000, generator=torch.Generator().manual_seed(0))
    drawn = Sampling(temperature=2.0, top_p=0.5).choose(logits.expand(4000, -1), uniforms, 4)
    assert (drawn == 3).all()  # 0.64 of the probability; at temperature 2 it would be 0.46, and 2 be kept too
    drawn = Sampling(temperature=2.0, top_k=0.5).choose(logits.expand(4000, -1), uniforms, 4)
    assert (drawn == 3).float().mean() == pytest.approx(torch.tensor(0.5).sigmoid().item(), abs=0.03)


def test_cond_scale_extrapolates_beyond_the_conditional_logits(transformer, text):
    uniforms = torch.full((1, 256), 0.5)
    tokens = draw_image_tokens(transformer, text, uniforms, Sampling(top_k=0.99999, cond_scale=3.0))[0]
    with_text, without = (image_logits(transformer, ids, tokens) for ids in (text, torch.zeros_like(text)))
    assert torch.equal(tokens, (without + 3 * (with_text - without)).argmax(dim=1))
    assert not torch.equal(tokens, with_text.argmax(dim=1))


def test_sampled_tokens_equal_those_of_full_forward_passes(transformer, text):
    settings, uniforms = Sampling(temperature=0.8, top_p=0.9), candidate_uniforms(0, range(1), 256)
    tokens = draw_image_tokens(transformer, text, uniforms, settings)[0]
    logits = image_logits(transformer, text, tokens)
    assert torch.equal(tokens, settings.choose(logits, uniforms[0], transformer.to_logits.out_features))


@pytest.mark.parametrize("cond_scale", [1.0, 2.0])
def test_draws_do_not_depend_on_the_batch(transformer, text, cond_scale):
    exact = copy.deepcopy(transformer).double()  # in double precision, so that rounding changes no sample
    uniforms = candidate_uniforms(0, range(3), 256)
    settings = Sampling(top_k=0.9, cond_scale=cond_scale)
    together = draw_image_tokens(exact, text, uniforms, settings)
    alone = [draw_image_tokens(exact, text, row[None], settings) for row in uniforms]
    assert torch.equal(together, torch.cat(alone))
    assert len(together.unique(dim=0)) == 3


@pytest.mark.parametrize("cond_scale, prompts", [(1.0, 1), (2.0, 2)])
def test_the_text_is_run_once_and_every_token_once(transformer, text, monkeypatch, cond_scale, prompts):
    run, fed, heard = transformer.run, [], []

    def spy(x, *arguments):
        fed.append(tuple(x.shape[:2]))
        return run(x, *arguments)

    monkeypatch.setattr(transformer, "run", spy)
    uniforms = candidate_uniforms(0, range(4), 256)
    settings = Sampling(cond_scale=cond_scale)
    for _, batch, count in image_token_steps(transformer, text, uniforms, settings):
        heard.append((batch, count))
    assert fed == [(prompts, 25)] + [(prompts * 4, 1)] * 255
    assert heard == [(range(4), count) for count in range(1, 257)]


def test_a_cache_is_used_again_but_never_by_two_draws_at_a_time(transformer, text):
    exact, uniforms, other = copy.deepcopy(transformer).double(), candidate_uniforms(0, range(2), 256), text.flip(0)
    cache = exact.prefill(text[None], 2)
    address = cache.state.layers[0].states.data_ptr()
    assert exact.prefill(text[None], 2) is not cache  # in use by the first draw
    exact.release(cache)
    settings = Sampling(top_k=0.9)
    expected = [draw_image_tokens(exact, ids, uniforms, settings) for ids in (text, other)]
    both = zip(*(image_token_steps(exact, ids, uniforms, settings) for ids in (text, other)), strict=True)
    for (first, _, _), (second, _, _) in both:  # noqa: B007
        pass
    assert torch.equal(first, expected[0]) and torch.equal(second, expected[1])
    assert not torch.equal(first, second)
    again = exact.prefill(text[None], 2)
    exact.release(again)
    assert exact.prefill(text[None], 2) is again and cache.state.layers[0].states.data_ptr() == address
    assert exact.float().prefill(text[None], 2).first_logits.dtype == torch.float32  # not a cache of other weights


def test_a_negative_prompt_replaces_the_empty_text(transformer, text):
    uniforms, negative = torch.full((1, 256), 0.5), text.flip(0)
    settings = Sampling(top_k=0.99999, cond_scale=3.0)
    tokens = draw_image_tokens(transformer, torch.stack((text, negative)), uniforms, settings)[0]
    with_text, without = (image_logits(transformer, ids, tokens) for ids in (text, negative))
    assert torch.equal(tokens, (without + 3 * (with_text - without)).argmax(dim=1))


def test_a_text_is_completed_up_to_its_first_padding(transformer):
    words, given = transformer.config.num_text_tokens, torch.zeros(24, dtype=torch.int64)
    given[:3] = torch.tensor([5, 77, 300])
    uniforms = torch.full((1, 24), 0.3)  # an id of about 0.3 of the vocabulary: a word
    uniforms[0, 10] = BELOW_ONE  # the last id of the text's vocabulary: padding
    text = draw_text_tokens(transformer, given, uniforms, Sampling())
    assert torch.equal(text[:3], given[:3])
    assert ((text[3:10] > 0) & (text[3:10] < words)).all() and (text[10:] == 0).all()
    logits = transformer(text[None])[0, :, : transformer.config.text_vocabulary]
    assert torch.equal(text[3:10], choose(logits[3:10], uniforms[0, 3:10]))


def test_a_completed_text_without_padding_has_full_length(transformer):
    given = torch.zeros(24, dtype=torch.int64)
    text = draw_text_tokens(transformer, given, torch.full((1, 24), 0.3), Sampling())
    assert (text > 0).all()
    full = draw_text_tokens(transformer, text, torch.full((1, 24), 0.9), Sampling())
    assert close(full, text, 0)  # nothing left to draw


@pytest.mark.parametrize("threshold", [0.1, 0.5, 0.9, 0.99, 1.0])
def test_top_p_equals_that_of_a_full_sort(threshold):
    generator = torch.Generator().manual_seed(0)
    for scale in (0.1, 1.0, 3.0, 10.0):
        logits = torch.randn(4, 512, generator=generator, dtype=torch.float64) * scale
        values, indices = logits.sort(descending=True)
        before = values.softmax(dim=-1).cumsum(dim=-1) - values.softmax(dim=-1)
        expected = [{*row[b <= threshold].tolist()} for row, b in zip(indices, before, strict=True)]
        kept = filter_top_p(logits, threshold).isfinite()
        if threshold < 1:
            assert [{*row.nonzero().flatten().tolist()} for row in kept] == expected
        else:
            assert kept.float().mean() > 0.9  # equal up to rounding
