"""The pipeline's call on small checkpoints in upstream's formats: results, repetition and errors."""

import copy
import dataclasses
import json
import os
import pickle
import signal
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import get_type_hints

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from dall3 import CheckpointError, Dall3Output, Dall3Pipeline, StopGeneration, parts
from dall3.diffusion.denoising import Denoising
from dall3.generate import guidance_targets
from dall3.images import to_pil
from dall3.models.unet import UNet, UNetConfig
from dall3.request import Request, parse_prompts
from dall3.settings import DenoisingSettings, SamplingSettings
from dall3.tokens import batching
from dall3.tokens.sampling import Sampling

from conftest import load_upstream_files
from originals import Golden, save_upstream_files

PROMPT = "a cube made of cloud"


@pytest.fixture(scope="module")
def pipe(upstream_files):
    return load_upstream_files(upstream_files)


@pytest.fixture(scope="module")
def out(pipe) -> Dall3Output:
    return pipe(PROMPT, num_images=2, num_candidates=5, top_p=0.85, num_inference_steps=4, seed=3, progress=False)


def make_unet(**changes) -> UNet:
    torch.manual_seed(0)
    settings = dict(
        model_channels=32, channel_mult=(1, 2), num_res_blocks=1, attention_levels=(1,), image_size=32, num_heads=2
    )
    return UNet(UNetConfig(**settings | changes)).eval().requires_grad_(False)


def test_one_call_gives_ranked_images_and_their_settings(pipe, out):
    assert [image.size for image in out.images] == [(64, 64)] * 2
    assert [image.size for image in out.coarse_images] == [(128, 128)] * 2
    assert out.tokens.shape == (2, 256) and out.tokens.dtype == torch.int64
    assert out.clip_scores[0] >= out.clip_scores[1]
    assert out.settings["seed"] == 3 and out.settings["top_p"] == 0.85 and out.settings["clip_guidance_scale"] == 1000

    candidates = pipe.generate_tokens(PROMPT, 5, top_p=0.85, seed=3, progress=False)
    ranking = pipe.rank(pipe.decode_tokens(candidates), PROMPT, progress=False)
    assert torch.equal(candidates[ranking.indices[:2]], out.tokens)
    assert torch.equal(ranking.indices[:2], out.candidates)
    by_two = pipe(
        PROMPT, num_images=2, num_candidates=5, top_p=0.85, num_inference_steps=1, seed=3, batch_size=2, progress=False
    )
    assert torch.equal(by_two.candidates, out.candidates) and torch.equal(by_two.tokens, out.tokens)
    for image, same in zip(by_two.coarse_images, out.coarse_images, strict=True):  # batches round differently
        assert np.abs(np.array(image, float) - np.array(same, float)).max() <= 1
    assert torch.allclose(ranking.scores[:2], out.clip_scores)
    fine = pipe.upsample(
        out.tokens, prompt=PROMPT, clip_guidance_scale=1000, num_inference_steps=4, seed=3, progress=False
    )
    assert np.abs(np.array(out.images[1], float) / 255 - fine[1].permute(1, 2, 0).numpy()).max() < 1 / 255


@pytest.mark.parametrize("output_type", ["np", "pt"])
def test_images_come_as_arrays_and_tensors_with_the_same_values(pipe, out, output_type, tmp_path):
    settings = dict(top_p=0.85, num_inference_steps=4, seed=3, progress=False, output_type=output_type)
    other = pipe(PROMPT, 2, 5, **settings)
    for images, pil, side in ((other.images, out.images, 64), (other.coarse_images, out.coarse_images, 128)):
        shape = (2, side, side, 3) if output_type == "np" else (2, 3, side, side)
        assert isinstance(images, np.ndarray if output_type == "np" else torch.Tensor) and images.shape == shape
        assert str(images.dtype).endswith("float32") and images.min() >= 0 and images.max() <= 1
        assert to_pil(images) == pil
    assert other.to_pil() == out.images and np.array_equal(other.to_numpy(), out.to_numpy())
    assert other.grid().tobytes() == out.grid().tobytes() and repr(other) == repr(out)
    assert other == other[:] and other[0] != other[1] and other != out and len(other[1].images) == 1
    other.save(tmp_path / "other")
    out.save(tmp_path / "pil")
    for path in (tmp_path / "pil").iterdir():
        assert (tmp_path / "other" / path.name).read_bytes() == path.read_bytes()
    *previews, last = pipe.stream(PROMPT, 2, 5, every=4, **settings)
    assert last.images == out.images and last.output == other and isinstance(previews[-1].images[0], Image.Image)
    varied = pipe.variations(out.coarse_images[0], PROMPT, 1, **settings)
    assert type(varied.images) is type(other.images)
    refining = dict(num_inference_steps=4, seed=3, progress=False)
    tensor = pipe.upsample(out.tokens, **refining)
    fine = pipe.upsample(out.tokens, output_type=output_type, **refining)
    assert np.array_equal(fine, tensor if output_type == "pt" else tensor.permute(0, 2, 3, 1))
    assert pipe.upsample(out.tokens, output_type="pil", **refining) == to_pil(tensor)


def test_an_unknown_output_type_is_refused_before_any_work(pipe, monkeypatch):
    monkeypatch.setattr(pipe.transformer, "prefill", lambda *args, **kwargs: pytest.fail("worked"))
    for call in (
        lambda **how: pipe(PROMPT, **how),
        lambda **how: pipe.stream(PROMPT, **how),
        lambda **how: pipe.variations(torch.zeros(256, dtype=torch.int64), PROMPT, **how),
        lambda **how: pipe.upsample(torch.zeros(256, dtype=torch.int64), **how),
    ):
        with pytest.raises(ValueError, match="output_type='latent'; expected 'pil' or 'np' or 'pt'"):
            call(output_type="latent")


def test_scores_are_those_of_the_originals_preprocessing(pipe):
    """As in generate.py: truncate to 8 bits, resize with Pillow's bicubic filter to CLIP's size, normalise."""
    pictures = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    pictures = torch.nn.functional.interpolate(pictures, size=128, mode="bicubic").clamp(0, 1)
    small = []
    for picture in pictures:
        image = Image.fromarray((picture * 255).to(torch.uint8).permute(1, 2, 0).numpy())
        small.append(np.array(image.resize((64, 64), Image.Resampling.BICUBIC)))
    seen = torch.from_numpy(np.stack(small)).permute(0, 3, 1, 2).float() / 255
    expected = torch.cosine_similarity(pipe.clip.embed_images(seen), pipe.clip.embed_text([PROMPT]))
    assert torch.allclose(pipe.clip.score(pictures, pipe.clip.embed_text([PROMPT])), expected, atol=2e-3)
    assert torch.equal(pipe.rank(pictures, PROMPT, progress=False).indices, expected.argsort(descending=True))


def test_picture_k_does_not_depend_on_the_batch(pipe):
    whole = pipe.generate_tokens(PROMPT, 5, top_p=0.9, seed=1, progress=False)
    assert torch.equal(pipe.generate_tokens(PROMPT, 5, top_p=0.9, seed=1, batch_size=2, progress=False), whole)
    assert torch.equal(pipe.generate_tokens(PROMPT, 3, top_p=0.9, seed=1, progress=False), whole[:3])
    assert not torch.equal(pipe.generate_tokens(PROMPT, 5, top_p=0.9, seed=2, progress=False), whole)
    settings = dict(prompt=PROMPT, clip_guidance_scale=500, scheduler="ddpm", num_inference_steps=3, seed=1)
    fine = pipe.upsample(whole[:3], **settings, progress=False)
    one_by_one = pipe.upsample(whole[:3], **settings, batch_size=1, progress=False)
    assert (fine - one_by_one).abs().max() < 1e-3
    assert (fine[0] - fine[1]).abs().max() > 0.1


def test_a_generator_replaces_the_seed(pipe):
    draws = [
        pipe.generate_tokens(PROMPT, 2, generator=torch.Generator().manual_seed(n), progress=False) for n in (7, 7, 8)
    ]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_the_first_picture_starts_from_the_noise_of_sample_py(pipe, out):
    """torch.manual_seed(seed), then one randn for the start and one per step, as in guided-diffusion."""
    from dall3.diffusion.denoising import unet_predict
    from dall3.diffusion.samplers import sample_ddpm
    from dall3.diffusion.schedule import GaussianDiffusion

    # First, so that both use the same memory layout of the weights, which affects rounding.
    fine = pipe.upsample(out.tokens[:1], scheduler="ddpm", num_inference_steps="6", seed=5, progress=False)
    generator = torch.Generator().manual_seed(5)
    diffusion = GaussianDiffusion(pipe.upsampler.config.diffusion, "6")
    predict = unet_predict(pipe.upsampler, diffusion, {"image_embeds": pipe.vqgan.embed(out.tokens[:1])})
    draw = lambda: torch.randn(1, 3, 64, 64, generator=generator)  # noqa: E731
    with torch.no_grad():
        *_, (_, expected) = sample_ddpm(predict, diffusion, draw(), list(range(5, -1, -1)), draw)
    assert torch.allclose(fine, (expected.clamp(-1, 1) + 1) / 2, atol=1e-4)


def test_guidance_runs_the_unet_once_a_step_and_clip_only_when_asked(pipe, out, monkeypatch):
    calls = {"unet": 0, "clip": 0}
    monkeypatch.setattr(pipe.upsampler, "forward", count_calls(calls, "unet", pipe.upsampler.forward))
    monkeypatch.setattr(pipe.clip, "embed_images", count_calls(calls, "clip", pipe.clip.embed_images))
    settings = dict(num_inference_steps=6, seed=0, progress=False)
    plain = pipe.upsample(out.tokens[:1], **settings)
    assert calls == {"unet": 6, "clip": 0}
    all_guided = pipe.upsample(out.tokens[:1], prompt=PROMPT, clip_guidance_scale=2000, **settings)
    assert calls == {"unet": 12, "clip": 6}
    pipe.upsample(out.tokens[:1], prompt=PROMPT, clip_guidance_scale=2000, guidance_share=0.5, **settings)
    assert calls == {"unet": 18, "clip": 9}
    assert (plain - all_guided).abs().max() > 1e-3


def count_calls(calls, name, function):
    def counted(*args, **kwargs):
        calls[name] += 1
        return function(*args, **kwargs)

    return counted


def test_guidance_pulls_a_picture_towards_the_prompt(pipe, out):
    """CLIP's spherical distance to the text falls with a larger scale, and rises with a negative weight."""
    pipe = Dall3Pipeline(upsampler=make_unet(), clip=pipe.clip)
    start = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    def similarity(prompt, scale):
        settings = dict(num_inference_steps=10, strength=1.0, seed=0, progress=False, scheduler="ddpm")
        fine = pipe.upsample(image=start, prompt=prompt, clip_guidance_scale=scale, **settings)
        return float(pipe.clip.score(fine, pipe.clip.embed_text(["a cloud"])))

    unguided, guided = similarity(None, 0), similarity("a cloud", 3000)
    assert guided > unguided
    assert similarity("a cloud:-1", 3000) < unguided


def targets_of(pipe, texts, picture, cutn):
    request = Request(texts=texts, image_prompts=[(picture, 1.0)], denoising=Denoising(cutn=cutn))
    return guidance_targets(pipe, request, 64)


def test_prompts_with_weights_and_pictures_guide_together(pipe):
    picture = Image.effect_noise((50, 70), 80)
    targets, weights = targets_of(pipe, parse_prompts("a cube:2|a cloud"), picture, 4)
    assert targets.shape == (6, 32)
    assert torch.allclose(weights, torch.tensor([2, 1, 0.25, 0.25, 0.25, 0.25]) / 4)


def test_the_prompt_itself_has_no_weights(pipe, monkeypatch):
    """Only guidance_prompt has weights: "a score of 3:0" and "left|right" are plain prompts."""
    texts = []
    embed = pipe.clip.embed_text
    monkeypatch.setattr(pipe.clip, "embed_text", lambda asked: texts.append(asked) or embed(asked))
    pipe("a score of 3:0|left", num_inference_steps=1, seed=0, progress=False)
    assert texts[-1] == ["a score of 3:0|left"]
    pipe(PROMPT, guidance_prompt="a cube:2|a cloud", num_inference_steps=1, seed=0, progress=False)
    assert texts[-1] == ["a cube", "a cloud"]


def test_the_text_is_run_once_for_all_batches(pipe, monkeypatch):
    calls = {"text": 0}
    monkeypatch.setattr(pipe.transformer, "embed_text", count_calls(calls, "text", pipe.transformer.embed_text))
    pipe.generate_tokens(PROMPT, 5, batch_size=2, seed=0, progress=False)
    assert calls == {"text": 1}


def test_the_call_works_in_inference_mode(pipe):
    with torch.inference_mode():
        inside = pipe(PROMPT, num_inference_steps=2, seed=0, progress=False)
    outside = pipe(PROMPT, num_inference_steps=2, seed=np.int64(0), progress=False)
    assert inside.images[0].tobytes() == outside.images[0].tobytes()


def test_a_large_image_prompt_is_downscaled_as_a_whole(pipe):
    """As in sample.py, it is reduced to the image's size before cut-outs are taken."""
    image = Image.effect_noise((40, 40), 90).resize((640, 640), Image.Resampling.BICUBIC)
    large, _ = targets_of(pipe, [], image, 8)
    small, _ = targets_of(pipe, [], image.resize((64, 64), Image.Resampling.BICUBIC), 8)
    assert torch.cosine_similarity(large, small).min() > 0.99


def test_parse_prompts_reads_upstreams_syntax():
    assert parse_prompts("a cube:2|a cloud") == [("a cube", 2.0), ("a cloud", 1.0)]
    assert parse_prompts("note: a cube") == [("note: a cube", 1.0)]
    assert parse_prompts("a cube:-0.5|a cloud:.5| b :1e-1") == [("a cube", -0.5), ("a cloud", 0.5), ("b", 0.1)]
    assert parse_prompts("a ratio:") == [("a ratio:", 1.0)]
    with pytest.raises(ValueError, match="empty prompt"):
        parse_prompts("a cube||a cloud")


def test_super_resolution_enlarges_the_fine_image_to_output_size(pipe):
    bigger = make_unet(super_resolution=True, image_size=64)
    pipe = Dall3Pipeline(
        **{name: getattr(pipe, name) for name in ("text_encoder", "transformer", "vqgan", "upsampler")}
    )
    pipe.super_resolution = bigger
    out = pipe(PROMPT, output_size=96, num_inference_steps=2, seed=0, progress=False)
    assert out.images[0].size == (96, 96) and out.coarse_images[0].size == (128, 128)
    for call in (
        pipe,
        lambda prompt, **settings: pipe.upsample(image=out.images, stage="super_resolution", **settings),
    ):
        with pytest.raises(ValueError, match="output_size=97; expected a multiple of 2"):
            call(PROMPT, output_size=97)


def test_super_resolution_sees_the_picture_reduced_to_a_quarter_by_area(monkeypatch):
    unet, seen = make_unet(super_resolution=True, image_size=64), []
    monkeypatch.setattr(
        unet, "forward", lambda x, t, low_res: seen.append(low_res) or torch.zeros(x.shape[0], 6, *x.shape[2:])
    )
    ramp = torch.linspace(0, 1, 128).expand(1, 3, 128, 128)
    Dall3Pipeline(upsampler=unet).upsample(image=ramp, output_size=64, num_inference_steps=1, progress=False)
    assert torch.allclose(seen[0], ramp.view(1, 3, 16, 8, 16, 8).mean(dim=(3, 5)) * 2 - 1, atol=1e-6)


def test_an_unconditional_unet_starts_from_the_picture_noised_by_strength():
    pipe = Dall3Pipeline(upsampler=make_unet())
    for parameter in pipe.upsampler.out.parameters():
        parameter.zero_()  # predicts no noise, so the output is the input divided by its share of x_t
    picture = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    def distance(strength):
        settings = dict(num_inference_steps=50, strength=strength, seed=0, progress=False)
        return float((pipe.upsample(image=picture, **settings) - picture).abs().mean())

    assert distance(0.02) < 0.02 < distance(0.2) < distance(0.9)


def test_a_unet_on_codes_starts_from_the_enlarged_coarse_picture_where_strength_is_given(upstream_files):
    pipe = load_upstream_files(upstream_files)
    for parameter in pipe.upsampler.out.parameters():
        parameter.zero_()
    tokens = torch.arange(256)[None] % pipe.vqgan.num_tokens
    coarse = pipe.decode_tokens(tokens)
    enlarged = torch.nn.functional.interpolate(coarse, (64, 64), mode="bicubic", antialias=True).clamp(0, 1)

    def distance(strength, **start):
        settings = dict(num_inference_steps=50, strength=strength, seed=0, progress=False)
        return float((pipe.upsample(**start, **settings) - enlarged).abs().mean())

    assert distance(0.02, tokens=tokens) < 0.02 < distance(0.2, tokens=tokens) < distance(None, tokens=tokens)
    assert distance(0.02, tokens=tokens, image=coarse) == distance(0.02, tokens=tokens)
    assert distance(1.0, tokens=tokens) == distance(None, tokens=tokens)


def test_a_call_overrides_the_default_settings_of_the_weights(upstream_files, tmp_path):
    pipe = load_upstream_files(upstream_files)
    pipe.defaults = {"top_p": 0.5, "temperature": 0.8, "num_inference_steps": 3, "clip_guidance_scale": 50.0}
    given = dict(top_p=0.5, temperature=0.8, num_inference_steps=3, clip_guidance_scale=50.0)
    plain = load_upstream_files(upstream_files)
    pipe.save_pretrained(tmp_path / "weights")
    for own in (pipe, Dall3Pipeline.from_pretrained(tmp_path / "weights")):
        out, expected = own(PROMPT, seed=1, progress=False), plain(PROMPT, seed=1, progress=False, **given)
        assert torch.equal(out.tokens, expected.tokens) and out.images == expected.images
        assert {name: out.settings[name] for name in given} == given
    other = pipe(PROMPT, seed=1, progress=False, top_k=0.9, clip_guidance_scale=0)
    expected = plain(PROMPT, seed=1, progress=False, **given | dict(top_k=0.9, top_p=None, clip_guidance_scale=0))
    assert torch.equal(other.tokens, expected.tokens) and other.images == expected.images
    assert pipe(PROMPT, seed=1, progress=False, top_p=None).settings["top_p"] is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"top_p": 2}', r"top_p=2; expected a probability"),
        ('{"strength": "half"}', "value of an invalid type"),
        ('{"colour": 1}', "unknown setting colour"),
        ('{"cutn": 100000000}', "cutn=1e.08; expected at most 1024"),
        ("[]", "holds list; expected a JSON object"),
    ],
)
def test_invalid_default_settings_of_weights_are_an_error(upstream_files, tmp_path, text, words):
    load_upstream_files(upstream_files).save_pretrained(tmp_path / "weights")
    (tmp_path / "weights/generation_config.json").write_text(text)
    with pytest.raises(CheckpointError, match=words):
        Dall3Pipeline.from_pretrained(tmp_path / "weights")


def test_an_image_can_replace_tokens(pipe, out):
    """The central square of the image is resized by area to the VQGAN's size and encoded."""
    tokens = pipe.vqgan.encode(torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0)))
    coarse = pipe.decode_tokens(tokens)
    wide = torch.cat((torch.zeros(1, 3, 128, 20), coarse, torch.ones(1, 3, 128, 20)), dim=3)
    settings = dict(num_inference_steps=2, seed=0, progress=False)
    expected = pipe.upsample(pipe.vqgan.encode(coarse), **settings)
    assert torch.equal(pipe.upsample(image=wide, **settings), expected)


@pytest.mark.parametrize("scheduler", ["ddim", "ddpm", "dpm-solver++"])
def test_every_scheduler_ends_in_a_picture_and_stops_early_when_asked(pipe, out, scheduler):
    settings = dict(scheduler=scheduler, num_inference_steps=5, seed=0, progress=False)
    fine = pipe.upsample(out.tokens[:1], **settings)
    early = pipe.upsample(out.tokens[:1], stop_at=2, **settings)
    assert fine.shape == (1, 3, 64, 64) and fine.min() >= 0 and fine.max() <= 1
    assert (fine - early).abs().max() > 1e-2


def test_missing_parts_are_skipped_or_named_if_they_are_needed(upstream_files, pipe):
    coarse_only = load_upstream_files(upstream_files, diffusion=None, clip=None)
    out = coarse_only(PROMPT, seed=0, progress=False)
    assert out.images == out.coarse_images and out.clip_scores is None
    for call, part in (
        (lambda: coarse_only(PROMPT, num_images=1, num_candidates=2), "no clip.*choosing 1 of 2 candidates"),
        (lambda: coarse_only.rank(out.images, PROMPT), "no clip"),
        (lambda: coarse_only.upsample(out.tokens), "no upsampler"),
        (lambda: coarse_only(PROMPT, clip_guidance_scale=100), "no upsampler"),
        (lambda: Dall3Pipeline(clip=pipe.clip).upsample(image=out.images), "no upsampler"),
        (lambda: coarse_only(PROMPT, output_size=256), "no super_resolution"),
        (lambda: load_upstream_files(upstream_files, clip=None)(PROMPT, clip_guidance_scale=100), "no clip"),
        (lambda: Dall3Pipeline().generate_tokens(PROMPT), "no transformer"),
        (lambda: Dall3Pipeline(upsampler=pipe.upsampler).upsample(out.tokens), "no vqgan"),
    ):
        with pytest.raises(ValueError, match=f"this pipeline has {part}"):
            call()


def test_parts_that_do_not_fit_each_other_are_refused(pipe, upstream_files, tmp_path):
    wide = make_unet(embedding_dims=(48, 32))
    with pytest.raises(ValueError, match="code embeddings of 48 channels; the vqgan's have 32"):
        Dall3Pipeline(vqgan=pipe.vqgan, upsampler=wide)
    torch.save(
        {"hparams": Golden("discrete_vae").about, "weights": Golden("discrete_vae").weights()}, tmp_path / "vae.pt"
    )
    with pytest.raises(ValueError, match="draws 256 codes, the vqgan has 96"):
        load_upstream_files(upstream_files, vqgan=tmp_path / "vae.pt", vqgan_config=None)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(top_p=0), r"top_p=0; expected .* in \(0, 1\]"),
        (dict(top_p=1.2), r"top_p=1.2"),
        (dict(top_k=1.0), r"top_k=1.0; expected .* in \[0, 1\)"),
        (dict(top_k=0.5, top_p=0.5), "both top_k and top_p"),
        (dict(temperature=0), "temperature=0; expected a number above 0"),
        (dict(temperature=float("nan")), "temperature=nan"),
        (dict(temperature=float("inf")), "temperature=inf"),
        (dict(cond_scale=float("nan")), "cond_scale=nan"),
        (dict(num_images=-1), "num_images=-1; expected a whole number from 1"),
        (dict(num_images=2.5), "num_images=2.5"),
        (dict(num_images=4, num_candidates=2), "num_candidates=2 is less than num_images=4"),
        (dict(batch_size=0), "batch_size=0"),
        (dict(num_inference_steps=0), "cannot take 0 of 1000 steps"),
        (dict(num_inference_steps=1001), "cannot take 1001 of 1000 steps"),
        (dict(num_inference_steps="many"), "steps 'many' not understood"),
        (dict(scheduler="oiler"), "unknown scheduler 'oiler'; expected 'ddpm', 'ddim', 'dpm-solver"),
        (dict(clip_guidance_scale=-1), "clip_guidance_scale=-1; expected a number from 0"),
        (dict(guidance_share=2), "guidance_share=2"),
        (dict(strength=0), "strength=0"),
        (dict(cutn=0), "cutn=0"),
        (dict(stop_at=-3), "stop_at=-3"),
        (dict(seed=-1), "seed=-1; expected a whole number"),
        (dict(guidance_prompt="a:1|b:-1"), "weights of the prompts sum to 0"),
        (dict(guidance_scale=3, cond_scale=2), "cond_scale and guidance_scale are aliases"),
        (dict(negative_prompt="a cloud", clip_guidance_scale=0), "negative_prompt has no effect"),
        (dict(generator=[torch.Generator()], num_images=2), "1 generators for 2 candidates and 2 images"),
        (dict(prompt=""), "empty"),
        (dict(prompt="   "), "empty"),
        (dict(prompt="a cube " * 40), r"has \d+ tokens; expected at most 24.*truncate=True"),
    ],
)
def test_bad_settings_are_refused_before_any_work(pipe, monkeypatch, settings, words):
    for part in (pipe.transformer, pipe.vqgan, pipe.upsampler):
        monkeypatch.setattr(part, "forward", lambda *args, **kwargs: pytest.fail("work began"))
    monkeypatch.setattr(pipe.transformer, "run", lambda *args, **kwargs: pytest.fail("work began"))
    with pytest.raises(ValueError, match=words):
        pipe(**{"prompt": PROMPT, "progress": False} | settings)


def test_a_unet_that_needs_class_labels_is_refused():
    with pytest.raises(ValueError, match="class labels"):
        Dall3Pipeline(upsampler=make_unet(num_classes=5)).upsample(image=torch.zeros(1, 3, 32, 32))


def test_an_unknown_setting_is_a_type_error(pipe):
    with pytest.raises(TypeError, match="unexpected keyword argument 'guidance_scal'. Did you mean 'guidance_scale'?"):
        pipe(PROMPT, guidance_scal=7.5)
    for call in (pipe.generate_tokens, pipe.stream, pipe.complete_text, pipe.upsample):
        with pytest.raises(TypeError, match="unexpected keyword argument 'colour'"):
            call(prompt=PROMPT, colour=1)


@pytest.mark.parametrize("prompt", [None, 5, b"a cube", ["a cube", None]])
def test_a_prompt_that_is_not_a_string_is_an_error(pipe, prompt):
    with pytest.raises(TypeError, match="prompt=.*; expected a string, or a list of strings"):
        pipe(prompt)


def test_the_argument_names_of_diffusers_are_accepted(pipe):
    how = dict(seed=1, num_inference_steps=2, progress=False)
    whole = pipe(PROMPT, sampling=Sampling(cond_scale=2.0, top_p=0.9), denoising=Denoising(2, cutn=4), **how)
    named = pipe(PROMPT, guidance_scale=2.0, top_p=0.9, cutn=4, clip_guidance_scale=0, **how)
    assert whole.images == named.images and whole.settings == named.settings
    assert pipe.components.keys() == {"text_encoder", *pipe.networks, "super_resolution"}
    assert Dall3Pipeline(**pipe.components)(PROMPT, **how).images == pipe(PROMPT, **how).images
    assert pipe.dtype == torch.float32
    picture = Image.effect_noise((128, 128), 90)
    same = pipe.generate_tokens(PROMPT, image=picture, redraw=(8, 0, 8, 16), seed=0, progress=False)
    mask = Image.new("L", (128, 128))
    mask.paste(255, (0, 64, 128, 128))
    for white in (mask, (0, 64, 128, 128)):
        tokens = pipe.generate_tokens(PROMPT, image=picture, mask_image=white, seed=0, progress=False)
        assert torch.equal(tokens, same)
    for wrong, words in (
        (Image.new("L", (128, 128)), "black everywhere"),
        (Image.new("L", (9, 9)), r"mask_image has shape \(9, 9\)"),
    ):
        with pytest.raises(ValueError, match=words):
            pipe.generate_tokens(PROMPT, image=picture, mask_image=wrong)


def test_a_negative_prompt_pushes_tokens_and_guidance_away(pipe, monkeypatch):
    how = dict(seed=1, num_inference_steps=1, progress=False)
    free, away = (
        pipe.generate_tokens(PROMPT, guidance_scale=3, seed=1, progress=False, **more)
        for more in ({}, {"negative_prompt": "a cloud"})
    )
    assert not torch.equal(free, away)
    assert torch.equal(free, pipe.generate_tokens(PROMPT, guidance_scale=3, negative_prompt="", seed=1, progress=False))
    out = pipe(PROMPT, negative_prompt="a cloud", **how)
    assert out.images == pipe(PROMPT, guidance_prompt=f"{PROMPT}:1|a cloud:-0.5", **how).images
    assert pipe.repeat(out, progress=False).images == out.images


def test_a_list_has_one_generator_per_image(pipe):
    def generators(*seeds):
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    how = dict(num_inference_steps=2, scheduler="ddpm", progress=False)
    both = pipe(PROMPT, num_images=2, generator=generators(7, 8), **how)
    alone = {
        out.tokens[0].numpy().tobytes(): out.images for out in pipe([PROMPT] * 2, generator=generators(7, 8), **how)
    }
    for one in both:
        near = np.array(alone[one.tokens[0].numpy().tobytes()][0], int) - np.array(one.images[0], int)
        assert np.abs(near).max() <= 1
        assert pipe.repeat(one, progress=False).images == one.images


def test_schedulers_are_accepted_by_diffusers_names_and_repeat(pipe, monkeypatch):
    how = dict(num_inference_steps=3, seed=0, progress=False)
    out = pipe(PROMPT, scheduler="dpm++_2m_karras", **how)
    scheduler = diffusers.DPMSolverMultistepScheduler(use_karras_sigmas=True)
    assert out.images == pipe(PROMPT, scheduler=scheduler, **how).images
    assert out.settings["scheduler"] == "dpm++_2m_karras" and pipe.repeat(out, progress=False).images == out.images
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ValueError, match="scheduler 'euler' needs diffusers; run pip install"):
        pipe(PROMPT, scheduler="euler", **how)


def test_numbers_of_numpy_and_torch_become_plain_ones(pipe, tmp_path):
    given = dict(num_images=np.int64(1), temperature=np.float32(0.5), cond_scale=torch.tensor(2.0), cutn=np.int32(4))
    given |= dict(num_inference_steps=np.int64(2), seed=np.uint8(3), truncate=np.bool_(False), batch_size=np.int16(2))
    out = pipe(PROMPT, progress=False, sampling=Sampling(top_p=np.float64(0.5)), **given)
    out.save(tmp_path)
    assert pipe.repeat(tmp_path / "0.png", progress=False).images == out.images


def test_every_setting_has_a_name_and_a_type():
    for kind, names in ((Sampling, SamplingSettings), (Denoising, DenoisingSettings)):
        own = {field.name for field in dataclasses.fields(kind)}
        assert own == names.__annotations__.keys() - {"sampling", "denoising", "guidance_scale"}
        types = get_type_hints(kind)
        for name in own - {"scheduler", "quantize"}:
            assert types[name] == get_type_hints(names, localns={"SchedulerMixin": diffusers.SchedulerMixin})[name], (
                name
            )


def test_truncate_cuts_a_prompt_that_is_too_long(pipe):
    tokens = pipe.generate_tokens("a cube " * 40, truncate=True, seed=0, progress=False)
    assert torch.equal(tokens, pipe.generate_tokens("a cube " * 50, truncate=True, seed=0, progress=False))


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        (torch.full((1, 256), 256), "tokens run from 256 to 256; this vqgan has codes 0 to 255"),
        (torch.full((1, 256), -1), "tokens run from -1"),
        (torch.zeros(1, 250, dtype=torch.int64), r"int64 \(1, 250\); expected int64 \(n, side²\)"),
        (torch.zeros(1, 256), r"tokens are float32 \(1, 256\)"),
        (np.zeros((2, 16, 16), dtype=np.int64), r"\(2, 16, 16\)"),
        (torch.zeros(0, 256, dtype=torch.int64), r"\(0, 256\)"),
    ],
)
def test_tokens_of_another_shape_or_vocabulary_are_refused(pipe, tokens, words):
    for use in (pipe.decode_tokens, pipe.upsample):
        with pytest.raises(ValueError, match=words):
            use(tokens)


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (torch.zeros(64, 64), r"float32 \(64, 64\); expected float in \[0, 1\] or uint8, \(n, 3, height, width\)"),
        (torch.zeros(1, 4, 64, 64), r"\(1, 4, 64, 64\)"),
        (torch.zeros(1, 3, 64, 64, dtype=torch.int64), "int64"),
        (torch.full((1, 3, 64, 64), 2.0), r"run from 2 to 2; expected values in \[0, 1\]"),
        ([Image.new("RGB", (8, 8)), Image.new("RGB", (9, 9))], "several sizes"),
        (5, "int is not an image; expected a path"),
    ],
)
def test_pictures_of_another_shape_are_refused(pipe, image, words):
    for use in (lambda: pipe.rank(image, PROMPT), lambda: pipe.upsample(image=image)):
        with pytest.raises(ValueError, match=words):
            use()


def test_output_is_saved_in_upstreams_format_and_never_overwrites(out, tmp_path):
    folder = out.save(tmp_path / "cube")
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        ["0-coarse.png", "0.npy", "0.png", "1-coarse.png", "1.npy", "1.png", "caption.txt", "settings.json"]
    )
    tokens = np.load(folder / "1.npy")
    assert tokens.dtype == np.int64 and tokens.shape == (256,) and (tokens == out.tokens[1].numpy()).all()
    assert np.array_equal(np.array(Image.open(folder / "0.png")), np.array(out.images[0]))
    assert json.loads((folder / "settings.json").read_text())["seed"] == 3
    (folder / "0.png").write_bytes(b"mine")
    with pytest.raises(FileExistsError, match="already holds"):
        out.save(folder)
    assert (folder / "0.png").read_bytes() == b"mine"


def test_output_shows_itself_as_a_grid_before_and_after(out):
    assert out.grid().size == (64 * 2 + 4, 64 * 2 + 4)
    assert out._repr_png_().startswith(b"\x89PNG")
    after = np.array(out.grid().crop((0, 68, 64, 132)))
    assert np.array_equal(after, np.array(out.images[0]))


def test_complete_text_continues_the_prompt(pipe):
    texts = [pipe.complete_text("a cube.", seed=seed) for seed in (0, 1, 2, 3)]
    assert all(text.startswith("a cube.") for text in texts)
    assert len(set(texts)) > 2 and max(map(len, texts)) > len("a cube.")
    assert texts[3] == pipe.complete_text("a cube.", seed=3)
    assert any(pipe.complete_text("", seed=seed) for seed in (0, 1, 2, 3))
    for setting in ({"quantize": "int8"}, {"jacobi_window": 4}, {"cond_scale": 2}):
        with pytest.raises(ValueError, match=next(iter(setting))):
            pipe.complete_text("a cube.", **setting)


def test_complete_text_uses_the_default_settings_of_the_weights(upstream_files):
    own, plain = load_upstream_files(upstream_files), load_upstream_files(upstream_files)
    own.defaults = {"top_p": 0.3, "cond_scale": 2.0}
    texts = [own.complete_text("a cube.", seed=seed) for seed in range(3)]
    assert texts == [plain.complete_text("a cube.", top_p=0.3, seed=seed) for seed in range(3)]
    assert texts != [plain.complete_text("a cube.", seed=seed) for seed in range(3)]


def test_settings_of_the_weights_are_checked_when_they_are_set(upstream_files):
    pipe = load_upstream_files(upstream_files)
    for wrong, words in (({"topp": 0.9}, "unknown setting topp"), ({"top_p": 9}, "top_p=9")):
        with pytest.raises(ValueError, match=words):
            pipe.defaults = wrong
        with pytest.raises(ValueError, match=words):
            pipe.defaults |= wrong
    assert pipe.defaults == {} and copy.deepcopy(pipe.defaults) == {}


def test_half_precision_draws_and_refines(upstream_files):
    pipe = load_upstream_files(upstream_files).to("cpu", torch.bfloat16)
    out = pipe(PROMPT, num_candidates=2, num_inference_steps=2, seed=0, progress=False)
    assert out.tokens.shape == (1, 256) and np.array(out.images[0]).std() > 1


@pytest.mark.parametrize("part", ["vqgan", "upsampler"])
def test_non_finite_images_are_an_error(upstream_files, part):
    pipe = load_upstream_files(upstream_files)
    for name, parameter in getattr(pipe, part).named_parameters():
        if name.endswith("bias"):
            parameter.data.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="images have NaN or infinite values; use float32 or bfloat16"):
        pipe(PROMPT, num_inference_steps=1, seed=0, progress=False)


def test_progress_bars_name_the_images_being_refined(pipe, capfd):
    tokens = pipe.generate_tokens(PROMPT, 3, seed=0, progress=False)
    for batch_size, names in ((None, ("1 of 3", "2 of 3", "3 of 3")), (2, ("1 to 2 of 3", "3 of 3"))):
        pipe.upsample(tokens, batch_size=batch_size, num_inference_steps=1, seed=0)
        shown = capfd.readouterr().err
        assert [name for name in names if f"refining {name}: 100%" in shown] == list(names)


def test_library_prints_nothing_and_leaves_global_state_alone(pipe, capfd):
    torch.manual_seed(11)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    pipe(PROMPT, num_inference_steps=2, seed=0, progress=False)
    assert torch.equal(torch.get_rng_state(), before) and torch.get_num_threads() == threads
    assert torch.is_grad_enabled()
    assert capfd.readouterr() == ("", "")


def test_an_openai_vae_and_a_vae_inside_the_checkpoint(tmp_path):
    from originals import GOLDEN, save_dalle

    pipe = Dall3Pipeline.from_checkpoints(
        vqgan=(GOLDEN / "openai_dvae/zip/encoder.pkl", GOLDEN / "openai_dvae/zip/decoder.pkl")
    )
    assert pipe.decode_tokens(torch.zeros(1, 64, dtype=torch.int64)).shape == (1, 3, 64, 64)
    vae, dalle = Golden("discrete_vae"), Golden("dalle_default")
    weights = dalle.weights() | {f"vae.{name}": tensor for name, tensor in vae.weights().items()}
    vocabulary = 344 + vae.about["num_tokens"]
    weights |= {
        "to_logits.1.weight": weights["to_logits.1.weight"][:vocabulary].clone(),
        "to_logits.1.bias": weights["to_logits.1.bias"][:vocabulary].clone(),
        "image_emb.weight": weights["image_emb.weight"][: vae.about["num_tokens"]].clone(),
    }
    save_dalle(tmp_path / "dalle.pt", dalle, weights=weights, vae_params=vae.about)
    pipe = Dall3Pipeline.from_checkpoints(dalle=tmp_path / "dalle.pt", bpe=GOLDEN / "tokenizer/bpe.model")
    assert pipe(PROMPT, top_p=0.9, seed=0, progress=False).images[0].size == (128, 128)


def test_upstreams_files_have_their_published_names(tmp_path):
    names = {str(path.relative_to(tmp_path)) for path in save_upstream_files(tmp_path).rglob("*") if path.is_file()}
    assert names >= {"bpe.model", "dalle-latest.pt", "vqgan_gumbel_f8/last.ckpt", "model-latest.pt", "ViT-B-16.pt"}


def test_a_stream_shows_the_rows_the_choice_and_the_refinement(pipe):
    settings = dict(num_images=2, num_candidates=3, num_inference_steps=4, seed=3, batch_size=2, progress=False)
    settings |= dict(refine_batch_size=2)
    previews, seen = [], {}
    for preview in pipe.stream(PROMPT, every=2, **settings):
        previews.append((preview.stage, preview.step, preview.total))
        seen[previews[-1]] = preview.images
    drawing = [(step, total) for stage, step, total in previews if stage == "drawing"]
    assert drawing == [(32 * row, 768) for row in range(1, 17)] + [(512 + 16 * row, 768) for row in range(1, 17)]
    assert [place for place in previews if place[0] == "refining"] == [("refining", 2, 4), ("refining", 4, 4)]
    assert previews[-1][0] == "done"
    expected = pipe(PROMPT, **settings)
    assert preview.output.images == expected.images and torch.equal(preview.output.tokens, expected.tokens)
    assert seen[("ranking", 1, 1)] == expected.coarse_images
    half = np.array(seen[("drawing", 256, 768)][0])
    assert (half[64:] == 128).all() and (half[:48] != 128).any()  # below the eight drawn rows


def test_leaving_a_stream_ends_the_work_and_the_pipeline_goes_on(pipe, monkeypatch):
    run, calls = pipe.transformer.run, []
    monkeypatch.setattr(pipe.transformer, "run", lambda *args: calls.append(1) or run(*args))
    previews = pipe.stream(PROMPT, seed=0, progress=False)
    assert not calls  # no work is done before the first preview is requested
    for preview in previews:
        if preview.step == 32:
            break
    previews.close()
    assert len(calls) == 32 and torch.is_grad_enabled()
    assert list(previews) == [] and len(calls) == 32
    assert len(pipe.generate_tokens(PROMPT, seed=0, progress=False)) == 1


def test_a_callback_that_ends_the_call_ends_both_stages(pipe):
    low_res = make_unet(super_resolution=True, image_size=64)
    both = Dall3Pipeline(
        text_encoder=pipe.text_encoder,
        transformer=pipe.transformer,
        vqgan=pipe.vqgan,
        upsampler=pipe.upsampler,
        super_resolution=low_res,
    )
    seen = []

    def once(pipe, step, timestep, tensors):
        seen.append(step)
        raise StopGeneration

    out = both(PROMPT, output_size=128, num_inference_steps=3, seed=0, progress=False, callback_on_step_end=once)
    assert seen == [0] and out.images[0].size == (64, 64)


def test_a_callback_sees_every_step_and_can_end_the_call(pipe):
    seen = []

    def look(pipe, step, timestep, tensors):
        seen.append((step, timestep))
        assert tensors["x"].shape == tensors["pred_xstart"].shape == (1, 3, 64, 64)
        if step == 1:
            raise StopGeneration

    settings = dict(seed=0, num_inference_steps=4, progress=False)
    out = pipe(PROMPT, callback_on_step_end=look, **settings)
    assert seen == [(0, 999), (1, 666)]
    assert out.images == pipe(PROMPT, stop_at=2, **settings).images
    two = pipe(PROMPT, num_images=2, callback_on_step_end=look, **settings)  # one after the other on a CPU
    assert len(two) == len(two.coarse_images) == len(two.tokens) == 1

    def interrupt(pipe, step, timestep, tensors):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipe(PROMPT, callback_on_step_end=interrupt, **settings)
    assert pipe(PROMPT, stop_at=2, **settings).images == out.images

    def blacken(pipe, step, timestep, tensors):
        tensors["x"].zero_()

    plain, black = pipe(PROMPT, **settings), pipe(PROMPT, callback_on_step_end=blacken, **settings)
    assert black.images != plain.images and black.settings["callback"] == ["changed"]
    assert out.settings["callback"] == ["stopped"] and "callback" not in plain.settings

    def look_only(pipe, step, timestep, tensors):
        return tensors

    seen_only = pipe(PROMPT, callback_on_step_end=look_only, **settings)
    assert seen_only.images == plain.images and "callback" not in seen_only.settings

    def replaced(pipe, step, timestep, tensors):
        return {"x": torch.zeros_like(tensors["x"])}

    assert pipe(PROMPT, callback_on_step_end=replaced, **settings).images == black.images
    with pytest.raises(
        ValueError, match="callback_on_step_end returned 'latents'; expected a dictionary with some of x, pred_xstart"
    ):
        pipe(PROMPT, callback_on_step_end=lambda *args: {"latents": 0}, **settings)
    with pytest.warns(UserWarning, match="a callback changed the original call"):
        pipe.repeat(black, progress=False)


def test_several_prompts_give_what_each_gives_alone(pipe, monkeypatch):
    settings = dict(seed=1, num_inference_steps=2, progress=False)
    outs = pipe([PROMPT, "a cloud"], **settings)
    assert [out.prompt for out in outs] == [PROMPT, "a cloud"]
    assert outs[1].images == pipe("a cloud", **settings).images
    monkeypatch.setattr(pipe.transformer, "run", lambda *args, **kwargs: pytest.fail("work began"))
    with pytest.raises(ValueError, match="empty"):
        pipe([PROMPT, " "], **settings)
    with pytest.raises(ValueError, match="prompt is an empty list"):
        pipe([], **settings)


def test_a_picture_carries_its_recipe_and_is_made_again_to_the_byte(pipe, out, tmp_path):
    out.save(tmp_path / "first")
    loaded = Dall3Output.load(tmp_path / "first/1.png")
    assert loaded.prompt == PROMPT and loaded.images == [out.images[1]] and torch.equal(loaded.tokens, out.tokens[1:])
    assert loaded.settings["seed"] == 3 and torch.allclose(loaded.clip_scores, out.clip_scores[1:])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = pipe.repeat(tmp_path / "first/1.png", progress=False)
    again.save(tmp_path / "second")
    assert (tmp_path / "second/0.png").read_bytes() == (tmp_path / "first/1.png").read_bytes()


def test_edits_that_autograd_does_not_track_change_the_fingerprints(upstream_files):
    """Edits of `.data`, and swapped rows, which keep all sums, change the hash of their part."""
    pipe = load_upstream_files(upstream_files)
    found = [pipe.fingerprints()]
    weight = pipe.transformer.to_logits.weight
    weight.data[-1] += 1
    found.append(pipe.fingerprints())
    weight.data[:2] = weight.data[:2].flip(0)
    found.append(pipe.fingerprints())
    pipe.upsampler.out[-1].bias.data += 1
    found.append(pipe.fingerprints())
    assert len({one["transformer"] for one in found}) == 3 and len({one["upsampler"] for one in found}) == 2
    assert len({one["vqgan"] for one in found}) == 1


def test_an_image_of_a_batch_is_repeated_alone(pipe, monkeypatch):
    how = dict(num_images=3, num_candidates=7, batch_size=3, refine_batch_size=2, scheduler="ddpm", seed=5)
    out = pipe(PROMPT, top_p=0.9, num_inference_steps=3, progress=False, **how)
    rows, run = set(), pipe.transformer.run
    monkeypatch.setattr(pipe.transformer, "run", lambda x, *args: rows.add(len(x)) or run(x, *args))
    for one in out:
        again = pipe.repeat(one, progress=False)
        assert again.images == one.images and torch.equal(again.candidates, one.candidates)
        assert again.recipe(0) == one.recipe(0)
    assert max(rows) <= 3


def test_a_recipe_of_other_weights_names_what_differs(upstream_files, out, tmp_path):
    out.save(tmp_path / "first")
    other = load_upstream_files(upstream_files)
    with torch.no_grad():
        other.transformer.to_logits.bias[-1] += 1.0
    with pytest.warns(
        UserWarning,
        match="the transformer of this pipeline has the hash '[0-9a-f]{16}'; the image was made with '[0-9a-f]{16}'",
    ) as told:
        other.repeat(tmp_path / "first/0.png", progress=False)
    assert {str(warning.message).split()[1] for warning in told} <= {"transformer", "tokens"}
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    with pytest.raises(ValueError, match="has no recipe"):
        other.repeat(tmp_path / "plain.png")
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(ValueError, match="not a readable image"):
        other.repeat(tmp_path / "text.png")
    with pytest.raises(ValueError, match="2 images"):
        other.repeat(out)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_candidates": 10**9}, "num_candidates is '1000000000'; expected an integer up to 1048576"),
        ({"cutn": 10**9}, "cutn=1e.09; expected at most 1024"),
        ({"callback_on_step_end": 1, "generator": 2}, "unknown settings: 'callback_on_step_end', 'generator'"),
        ({"scheduler": "EulerDiscreteScheduler"}, "unknown scheduler 'EulerDiscreteScheduler'"),
        ({"guidance_prompt": 5}, "guidance_prompt is '5'"),
        ({"weights": 5}, "weights are not a dictionary"),
        ({"kept": [[0] * 256]}, "not a list of 256 integers"),
        ({"kept": [10**6] * 256}, "tokens run from"),
        ({"seeds": [1, "two"]}, "seeds are not a list of 5 integers"),
    ],
)
def test_a_recipe_that_does_not_fit_is_refused_before_any_work(pipe, out, monkeypatch, change, words):
    monkeypatch.setattr(pipe.transformer, "run", lambda *args, **kwargs: pytest.fail("work began"))
    one = out[0]
    with pytest.raises(ValueError, match=words):
        pipe.repeat(dataclasses.replace(one, settings=one.settings | change), progress=False)


@pytest.mark.parametrize(
    "change",
    [{"candidate": float("inf")}, {"tokens": [2**70]}, {"settings": 5}, {"clip_score": "high"}, {"place": None}],
)
def test_a_damaged_recipe_is_an_error(out, tmp_path, change):
    picture, text = out.images[0].copy(), PngInfo()
    text.add_itxt("dall3", json.dumps(out.recipe(0) | change))
    picture.save(tmp_path / "a.png", pnginfo=text)
    with pytest.raises(ValueError, match="its recipe is damaged"):
        Dall3Output.load(tmp_path / "a.png")


def test_rows_of_tokens_and_pictures_that_do_not_match_are_refused(pipe, out):
    with pytest.raises(ValueError, match="2 rows of tokens and 1 images"):
        pipe.upsample(out.tokens, out.coarse_images[0], strength=0.5, progress=False)


def test_an_output_can_be_indexed_and_pickled(out):
    assert out[1].images == [out.images[1]] and torch.equal(out[1].clip_scores, out.clip_scores[1:])
    assert out[-1].coarse_images == [out.coarse_images[1]] and len(out[:5]) == 2
    assert [one.images[0] for one in out] == out.images
    with pytest.raises(IndexError):
        out[2]
    assert out.to_numpy().shape == (2, 64, 64, 3) and (out.to_numpy()[1] == np.array(out.images[1])).all()
    for twin in (copy.deepcopy(out), pickle.loads(pickle.dumps(out))):
        assert twin.images == out.images and torch.equal(twin.tokens, out.tokens) and twin.settings == out.settings
    assert f"{out.clip_scores[0]:.3f}, seed 3, draw {out.candidates[0]}" == out.captions()[0]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_fork_while_the_clip_loads_leaves_the_child_able_to_load_it():
    begun = threading.Event()

    def load():
        begun.set()
        time.sleep(0.5)
        return torch.nn.Identity()

    held = parts.Parts(clip=load)
    held.load_clip_early()
    begun.wait()
    child = os.fork()
    if child == 0:
        signal.alarm(20)  # ends a child that hangs
        os._exit(0 if held.clip is not None else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_eight_threads_get_what_one_gets(pipe):
    def draw(call):
        return pipe(call[0], seed=call[1], num_inference_steps=2, top_p=0.9, progress=False).images

    prompts = [PROMPT, "a cloud", "a cube"]
    calls = [(prompts[k % 3], k % 2) for k in range(16)]
    expected = {call: draw(call) for call in set(calls)}
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(draw, calls)) == [expected[call] for call in calls]


def test_an_image_gives_the_first_rows_and_a_rectangle_is_drawn_again(pipe):
    first = pipe.generate_tokens(PROMPT, seed=0, progress=False)[0]
    primed = pipe.generate_tokens(PROMPT, 2, init_image=first, seed=1, progress=False)
    assert torch.equal(primed[:, :112], first[:112].expand(2, -1))
    assert not torch.equal(primed[0, 112:], first[112:]) and not torch.equal(primed[0], primed[1])
    again = pipe.generate_tokens(PROMPT, init_image=first, keep_rows=15, seed=0, progress=False)
    assert torch.equal(again[0], first)  # the same seed draws the last row as before

    picture = to_pil(pipe.decode_tokens(first))[0]
    tokens = pipe.vqgan.encode(torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 255)[0]
    out = pipe(PROMPT, init_image=picture, redraw=(4, 2, 8, 10), seed=2, num_inference_steps=2, progress=False)
    inside = torch.zeros(16, 16, dtype=torch.bool)
    inside[4:12, 2:12] = True
    assert torch.equal(out.tokens[0][~inside.flatten()], tokens[~inside.flatten()])
    assert not torch.equal(out.tokens[0], tokens)
    assert pipe.repeat(out, progress=False).images == out.images


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(keep_rows=3), "keep_rows selects tokens of an initial image; pass image too"),
        (dict(keep_rows=3, redraw=(0, 0, 1, 1), init_image=[]), "exclude each other; pass one of them"),
        (dict(keep_rows=16, init_image=torch.zeros(256, dtype=torch.int64)), r"keep_rows=16; .* \[1, 15\]"),
        (dict(redraw=(8, 8, 9, 1), init_image=torch.zeros(256, dtype=torch.int64)), "exceeds the grid of 16×16"),
        (dict(redraw=(8, 8), init_image=torch.zeros(256, dtype=torch.int64)), "expected .top, left, height, width."),
        (
            dict(init_image=torch.zeros(64, dtype=torch.int64)),
            r"image has tokens of shape \(1, 64\); expected \(256,\)",
        ),
        (dict(init_image=5), "int is not an image; expected a path"),
    ],
)
def test_invalid_regions_to_keep_are_an_error(pipe, monkeypatch, settings, words):
    monkeypatch.setattr(pipe.transformer, "run", lambda *args, **kwargs: pytest.fail("work began"))
    with pytest.raises(ValueError, match=words):
        pipe(PROMPT, progress=False, **settings)


def test_a_batch_that_exceeds_the_memory_is_halved(pipe, out, monkeypatch):
    run, forward, sizes = pipe.transformer.run, pipe.upsampler.forward, []

    def small(function, most):
        def checked(x, *arguments, **more):
            if len(x) > most:
                raise torch.cuda.OutOfMemoryError("too large")
            sizes.append(len(x))
            return function(x, *arguments, **more)

        return checked

    monkeypatch.setattr(pipe.transformer, "run", small(run, 2))
    monkeypatch.setattr(pipe.vqgan, "decode", small(pipe.vqgan.decode, 3))
    monkeypatch.setattr(pipe.upsampler, "forward", small(forward, 1))
    settings = dict(num_images=2, num_candidates=5, top_p=0.85, num_inference_steps=4, seed=3, progress=False)
    halved = pipe(PROMPT, refine_batch_size=2, **settings)
    assert torch.equal(halved.tokens, out.tokens) and set(sizes) == {1, 2}
    assert halved.settings["batch_size"] == 2 and halved.settings["refine_batch_size"] == 1
    apart = [np.abs(np.array(a, int) - np.array(b, int)).max() for a, b in zip(halved.images, out.images, strict=True)]
    assert max(apart) <= 1
    monkeypatch.setattr(pipe.transformer, "run", small(run, 0))
    with pytest.raises(torch.cuda.OutOfMemoryError):
        pipe(PROMPT, **settings)


def test_faster_draws_are_in_the_recipe_and_repeat(pipe, tmp_path):
    for name, settings in {"eight": {"quantize": "int8"}, "jacobi": {"jacobi_window": 8}}.items():
        how = dict(seed=3, num_inference_steps=2, progress=False) | settings
        out = pipe(PROMPT, num_images=2, **how)
        assert out.settings.items() >= settings.items()
        out.save(tmp_path / name)
        assert pipe.repeat(tmp_path / name / "1.png", progress=False).images == [out.images[1]]
        assert len(out.tokens.unique(dim=0)) == 2
    with pytest.raises(ValueError, match="jacobi_window=0; expected a whole number from 1"):
        pipe.generate_tokens(PROMPT, jacobi_window=0)


def test_int8_elsewhere_than_on_a_cpu_or_a_gpu_is_refused_before_any_work(upstream_files):
    other = load_upstream_files(upstream_files).to("meta")
    with pytest.raises(
        ValueError, match="quantize='int8' needs a CPU or a CUDA device, and the transformer is on meta"
    ):
        other(PROMPT, quantize="int8")


def test_the_default_batch_size_fits_the_free_memory(pipe, monkeypatch):
    c = pipe.transformer.config
    each = c.depth * (2 * c.heads * c.dim_head + c.dim) * (c.seq_len + 1) * 4
    sizes = {}
    for room in (0.5, 11, 1000):
        monkeypatch.setattr(batching, "memory_for_caches", lambda transformer, device, room=room: int(each * room))
        sizes[room] = pipe(PROMPT, num_inference_steps=1, seed=0, progress=False, stop_at=1).settings["batch_size"]
    assert sizes == {0.5: 1, 11: 8, 1000: 32}


def test_offloaded_parts_are_on_the_device_only_while_they_work(upstream_files, monkeypatch):
    other, moves, there = load_upstream_files(upstream_files), [], set()
    expected = other(PROMPT, num_candidates=2, num_inference_steps=2, seed=3, progress=False)
    other.enable_model_offload("cuda")
    assert other.device == torch.device("cuda")
    other.offload_device = torch.device("cpu", 0)  # stands for a GPU: moves to it are recorded below
    for name in ("transformer", "vqgan", "clip", "upsampler"):

        def move(device=None, memory_format=None, name=name):
            if device is not None:
                (there.discard if device == "cpu" else there.add)(name)
                moves.append(frozenset(there))

        monkeypatch.setattr(getattr(other, name), "to", move)
    out = other(PROMPT, num_candidates=2, num_inference_steps=2, seed=3, progress=False)
    assert out.images == expected.images and there == set()
    assert frozenset({"transformer"}) in moves and frozenset({"vqgan", "clip", "upsampler"}) in moves
    assert not any("transformer" in at_once and len(at_once) > 1 for at_once in moves)

    moves.clear()
    for preview in other.stream(PROMPT, num_inference_steps=2, seed=3, progress=False):
        preview.images  # noqa: B018  is decoded while the transformer is at work, which stays where it is
        assert preview.stage != "drawing" or "transformer" in there
        if preview.step == 32:
            break
    del preview
    assert there == set()
    other.rank([Image.new("RGB", (8, 8))], PROMPT, progress=False)
    other.decode_tokens(out.tokens)
    other.upsample(out.tokens, num_inference_steps=1, progress=False)
    assert there == set() and moves

    def interrupt(pipe, step, timestep, tensors):
        assert there
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        other(PROMPT, callback_on_step_end=interrupt, num_inference_steps=2, progress=False)
    assert there == set()


def test_offloaded_parts_stay_while_another_thread_uses_them(upstream_files, monkeypatch):
    other, moved = load_upstream_files(upstream_files).enable_model_offload("cpu"), []
    other.offload_device = torch.device("cpu", 0)
    for name in ("vqgan", "clip"):
        note = lambda device, name=name: moved.append(f"{name} back" if device == "cpu" else name)  # noqa: E731
        monkeypatch.setattr(getattr(other, name), "to", note)
    with other.on_device("a test", "vqgan", "clip"):
        with other.on_device("a test", "vqgan"):
            pass
        assert moved == ["vqgan", "clip"]
    assert moved == ["vqgan", "clip", "vqgan back", "clip back"]


def test_moving_parts_does_not_recompute_fingerprints(upstream_files, monkeypatch):
    other = load_upstream_files(upstream_files)
    before = other.fingerprints()
    monkeypatch.setattr(parts, "fingerprint", lambda part: pytest.fail("hashed anew"))
    for module in other.networks.values():
        for parameter in module.parameters():
            parameter.data = parameter.data.clone()  # as after a move to a device and back
    assert other.fingerprints() == before


def seams(pictures):
    """Difference of opposite edges, relative to the mean difference of neighbouring columns and rows."""
    pictures = torch.cat((pictures, pictures.mT))
    edges = (pictures[..., 0] - pictures[..., -1]).abs().mean()
    return (edges / pictures.diff(dim=-1).abs().mean()).item()


def test_seamless_images_continue_at_the_opposite_edge():
    small = Dall3Pipeline.from_pretrained()  # a decoder with random weights has no seams
    tokens = torch.randint(small.vqgan.num_tokens, (2, 256), generator=torch.Generator().manual_seed(0))
    coarse = [small.decode_tokens(tokens, seamless=seamless) for seamless in (False, True)]
    assert coarse[1].shape == coarse[0].shape
    assert seams(coarse[0]) > 3 and seams(coarse[1]) < 1.5
    how = dict(num_inference_steps=10, strength=0.2, seed=0, progress=False)
    fine = [small.upsample(tokens, image=coarse[1], seamless=seamless, **how) for seamless in (False, True)]
    assert seams(fine[0]) > 3 and seams(fine[1]) < 1.5
    out = small(PROMPT, seamless=True, num_inference_steps=2, clip_guidance_scale=0, seed=0, progress=False)
    assert out.settings["seamless"] and small.repeat(out, progress=False).images == out.images


def test_variations_redraw_a_fraction_of_the_tokens(pipe, out):
    how = dict(num_inference_steps=1, seed=1, progress=False)
    some, all_of_them = (pipe.variations(out.tokens[0], PROMPT, 3, change=change, **how) for change in (0.3, 1.0))
    share = (some.tokens == out.tokens[0]).float().mean()
    assert 0.65 < share < 0.85 and len(some.tokens.unique(dim=0)) == 3
    assert torch.equal(all_of_them.tokens, pipe(PROMPT, 3, **how).tokens)
    assert pipe.repeat(some[0], progress=False).images == some[0].images
    picture = pipe.decode_tokens(out.tokens[0])
    assert pipe.variations(picture[0], PROMPT, 1, **how).images == pipe.variations(picture, PROMPT, 1, **how).images
    assert pipe.decode_tokens(np.zeros(256, np.uint16)).shape == (1, 3, 128, 128)
    for settings, words in [
        ({"change": 0}, "change=0; expected the fraction"),
        ({"change": 0.5, "keep_rows": 3}, "exclude each other; pass one of them"),
    ]:
        with pytest.raises(ValueError, match=words):
            pipe.generate_tokens(PROMPT, init_image=out.tokens[0], **settings)
