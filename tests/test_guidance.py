"""CLIP guidance against the original's cond_fn, on the golden UNet and CLIP."""

import pytest
import torch
import torch.nn.functional as F

import dall3.diffusion.guidance
from dall3.diffusion.denoising import Denoising, unet_predict
from dall3.diffusion.guidance import clip_loss, cut_out, draw_cutouts, guided, spherical_distance, with_penalties
from dall3.diffusion.schedule import GaussianDiffusion
from dall3.generate import guidance_targets
from dall3.parts import Parts
from dall3.request import Request, parse_prompts
from dall3.weights.convert.clip import load_clip
from dall3.weights.convert.guided_diffusion import load_unet

from originals import Golden, close, openai_clip


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("guidance")
    torch.save(Golden("unet_unconditional").weights(), folder / "unet.pt")
    torch.save(openai_clip(), folder / "clip.pt")
    return load_unet(folder / "unet.pt", Golden("unet_unconditional").about), load_clip(folder / "clip.pt")


def test_gradient_is_the_originals(parts, monkeypatch):
    """Two weighted prompts, eight cut-outs and both penalties, compared with cond_fn for the same x and cut-outs."""
    (unet, clip), golden = parts, Golden("guidance")
    expected, about = golden.expected, golden.about
    monkeypatch.setattr(dall3.diffusion.guidance, "draw_cutouts", lambda *args: expected["cutouts"])
    prompts = parse_prompts("|".join(f"{text}:{weight}" for text, weight in about["prompts"]))
    targets, weights = guidance_targets(Parts(clip=clip), Request(texts=prompts, denoising=Denoising(cutn=8)), 96)
    pull = clip_loss(clip, targets, weights, about["clip_guidance_scale"], 8, torch.Generator())
    losses = []

    def loss(blend, x_start):
        losses.append(with_penalties(pull, about["tv_scale"], about["range_scale"])(blend, x_start))
        return losses[0]

    diffusion = GaussianDiffusion(unet.config.diffusion, about["timestep_respacing"])
    prediction = guided(unet_predict(unet, diffusion, {}), diffusion, 0, loss)(expected["x"], about["step"])
    assert torch.allclose(losses[0], expected["loss"], rtol=1e-5)
    assert close(prediction.pred_xstart, expected["pred_xstart"], 1e-4)
    assert close(prediction.gradient, expected["gradient"], 1e-4 * float(expected["gradient"].abs().max()))


def test_cut_outs_are_average_pooled_as_the_original_does():
    expected = Golden("guidance").expected
    assert close(cut_out(expected["x"], expected["cutouts"], 64)[:2], expected["first_cutouts"], 1e-5)


@pytest.mark.parametrize(("side", "cut_size"), [(256, 224), (128, 64), (48, 64), (64, 64)])
def test_cut_outs_lie_inside_and_equal_adaptive_pooling(side, cut_size):
    images = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    cutouts = draw_cutouts(side, cut_size, 50, torch.Generator().manual_seed(1))
    size, left, top = cutouts.unbind(-1)
    assert size.min() >= min(side, cut_size) and (left + size).max() <= side and (top + size).max() <= side
    assert left.min() >= 0 and top.min() >= 0
    pooled = cut_out(images, cutouts[:4], cut_size)
    by_hand = [F.adaptive_avg_pool2d(images[:, :, t : t + s, a : a + s], cut_size) for s, a, t in cutouts[:4].tolist()]
    assert close(pooled, torch.cat(by_hand), 1e-5)


def test_cut_outs_take_all_sizes_and_places():
    size, left, _ = draw_cutouts(256, 64, 2000, torch.Generator().manual_seed(0)).unbind(-1)
    assert size.float().mean().sub(160).abs() < 5 and size.min() < 70 and size.max() > 250
    assert (left == 0).any() and (left + size == 256).any()


def test_spherical_distance_is_zero_for_the_same_direction_and_largest_for_the_opposite():
    x = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0]])
    distance = spherical_distance(x, torch.tensor([[5.0, 0.0]]))
    assert torch.allclose(distance, torch.tensor([0, torch.pi**2 / 8, torch.pi**2 / 2]), atol=1e-6)
