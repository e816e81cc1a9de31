"""Speculative Jacobi decoding draws from the transformer's own distribution, in fewer steps."""

import itertools

import pytest
import torch

from dall3.models.transformer import DalleTransformer, TransformerConfig
from dall3.tokens.sampling import Sampling
from dall3.tokens.seeds import make_generator
from dall3.tokens.speculative import speculative_token_steps

CODES, SIDE = 3, 2


@pytest.fixture(scope="module")
def transformer():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = DalleTransformer(TransformerConfig(20, CODES, 4, 32, 1, heads=2, dim_head=16, grid_size=SIDE))
        for parameter in model.parameters():  # so that tokens depend strongly on earlier ones
            parameter.data.normal_(0, 0.2)
    return model.eval().requires_grad_(False)


def draw(transformer, count, settings, kept=None):
    text = torch.tensor([5, 6, 0, 0])
    generators = [make_generator("cpu", 0, "speculation", k) for k in range(count)]
    for drawn, _, _ in speculative_token_steps(transformer, text, generators, settings, kept):  # noqa: B007
        pass
    return drawn


def true_probabilities(transformer, settings):
    """The probability of every possible grid, in the order of itertools.product, from one full forward pass."""
    grids = torch.tensor(list(itertools.product(range(CODES), repeat=SIDE**2)))

    def logits(text):
        found = transformer(text.expand(len(grids), -1), grids)
        return found[:, transformer.config.text_seq_len :, transformer.config.text_vocabulary :]

    both = [logits(torch.tensor([5, 6, 0, 0]))]
    if settings.cond_scale != 1:
        both.append(logits(torch.zeros(4, dtype=torch.int64)))
    guided = settings.guide(torch.cat(both)).flatten(0, 1)
    steps = settings.filter(guided, transformer.config.text_vocabulary + CODES).softmax(-1).view(len(grids), -1, CODES)
    return steps.gather(2, grids[..., None]).prod(dim=1)[:, 0]


@pytest.mark.parametrize(
    "settings",
    [
        Sampling(jacobi_window=3),
        Sampling(jacobi_window=2, temperature=0.7, cond_scale=2.0),
        Sampling(jacobi_window=4, top_p=0.8),
    ],
    ids=["plain", "guided", "top_p"],
)
def test_the_distribution_is_the_transformers(transformer, settings):
    count, expected = 1500, true_probabilities(transformer, settings)
    assert expected.sum() == pytest.approx(1, abs=1e-4) and (expected > 0.01).sum() > 5
    drawn = draw(transformer, count, settings)
    places = (drawn * CODES ** torch.arange(SIDE**2 - 1, -1, -1)).sum(dim=1)
    seen = torch.bincount(places, minlength=CODES ** (SIDE**2)).float()
    assert seen[expected == 0].sum() == 0
    often = expected * count >= 5
    chi2 = ((seen - expected * count) ** 2 / (expected * count))[often].sum()
    rest, rest_expected = seen[~often].sum(), expected[~often].sum() * count
    degrees = int(often.sum()) - 1
    # The 99.9 % quantile of chi-square, by the approximation of Wilson and Hilferty.
    assert chi2 < degrees * (1 - 2 / (9 * degrees) + 3.09 * (2 / (9 * degrees)) ** 0.5) ** 3
    assert abs(rest - rest_expected) < 4 * rest_expected.clamp_min(1) ** 0.5


def test_a_draw_follows_from_its_seed_alone(transformer):
    settings = Sampling(jacobi_window=3)
    assert torch.equal(draw(transformer, 5, settings)[:2], draw(transformer, 2, settings))
    assert len(set(map(tuple, draw(transformer, 5, settings).tolist()))) > 1


def test_kept_tokens_stay(transformer):
    kept = torch.tensor([2, -1, 1, -1])
    drawn = draw(transformer, 20, Sampling(jacobi_window=3), kept)
    assert (drawn[:, 0] == 2).all() and (drawn[:, 2] == 1).all()
    assert len(set(drawn[:, 3].tolist())) > 1
