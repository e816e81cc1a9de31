"""Tests that need a real GPU: captured graphs with other threads, offloading, half precision, compilation.

The networks are small and have random weights. Only the package is needed.
"""

import copy
import threading

import pytest
import torch

from dall3.diffusion import captured
from dall3.diffusion.denoising import Denoising, denoise, denoising_steps
from dall3.diffusion.guidance import clip_loss, guided
from dall3.models.dalle_mini import DalleMini, DalleMiniConfig
from dall3.models.rudalle import Rudalle, RudalleConfig
from dall3.models.transformer import DalleTransformer, TransformerConfig
from dall3.models.unet import UNet, UNetConfig
from dall3.parts import Parts
from dall3.tokens import decoding
from dall3.tokens.decoding import draw_image_tokens
from dall3.tokens.sampling import Sampling
from dall3.tokens.seeds import candidate_uniforms, make_generator

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
KINDS = ("dalle", "mini", "rudalle")


def random_transformer(kind):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "dalle":
            config = TransformerConfig(
                50, 64, 8, 64, 3, heads=2, dim_head=32, grid_size=8, attn_types=("full", "axial_row")
            )
            made = DalleTransformer(config)
        elif kind == "mini":
            made = DalleMini(DalleMiniConfig(50, 64, 8, 128, 128, 2, 2, grid_size=8))
        else:
            made = Rudalle(RudalleConfig(50, 64, 8, 64, 4, 2, grid_size=8))
        for parameter in made.parameters():
            parameter.data.normal_(0, 0.1) if parameter.dim() > 1 else None
    return made.eval().requires_grad_(False)


def random_unet():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet(UNetConfig(32, (1, 2), 1, (1,), 32, num_heads=2, embedding_dims=(6, 32)))
    return unet.eval().requires_grad_(False)


class FlatCLIP(torch.nn.Module):
    """A minimal CLIP for guidance."""

    image_size = 16

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.linspace(-1, 1, 8), requires_grad=False)

    def embed_images(self, images):
        return (images.flatten(1)[:, :8] * self.weight).float()


def without_graphs(monkeypatch):
    """Disable CUDA graphs."""
    monkeypatch.setattr(decoding, "GRAPHED_ROWS", 0)
    monkeypatch.setattr(captured.CapturedPredict, "__call__", lambda self, x, i: self.predict(x, i))


def draw(transformer, settings, count=5, batch_size=2, text=3):
    uniforms = candidate_uniforms(0, range(count), 64).cuda()
    return draw_image_tokens(transformer, torch.full((8,), text).cuda(), uniforms, settings, batch_size)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "settings", [Sampling(top_k=0.5), Sampling(top_p=0.9, cond_scale=3.0)], ids=["top_k", "guided"]
)
def test_captured_tokens_equal_those_without_graphs(kind, settings, monkeypatch):
    transformer = random_transformer(kind).double().cuda()
    first, other = draw(transformer, settings), draw(transformer, settings, text=4)
    again = draw(transformer, settings)
    monkeypatch.setattr(decoding, "GRAPHED_ROWS", 0)
    assert torch.equal(first, draw(transformer, settings)) and torch.equal(again, first)
    assert torch.equal(other, draw(transformer, settings, text=4)) and len(first.unique()) > 8


def test_later_draws_do_not_capture_again(monkeypatch):
    transformer, settings, count = random_transformer("dalle").cuda(), Sampling(top_k=0.5), []
    real = decoding.CudaGraph
    monkeypatch.setattr(decoding, "CudaGraph", lambda *args, **kwargs: count.append(1) or real(*args, **kwargs))
    for _ in range(3):
        draw(transformer, settings)
    assert len(count) == 2
    transformer.to("cpu")
    torch.cuda.empty_cache()
    draw(transformer.to("cuda"), settings)
    assert len(count) == 4


def test_graphs_are_captured_while_other_threads_use_the_gpu():
    transformers = [random_transformer(kind).double().cuda() for kind in KINDS]
    expected = [draw(transformer, Sampling(top_k=0.5)) for transformer in transformers]
    failed, stop = [], threading.Event()

    def load():
        """Do what a thread that loads a CLIP does: allocate memory, copy weights, run kernels."""
        try:
            while not stop.is_set():
                there = torch.randn(512, 512).cuda()
                assert (there @ there).sum().isfinite()
        except Exception as error:
            failed.append(error)

    def capture(k):
        try:
            for _ in range(3):
                transformers[k].free_caches()
                assert torch.equal(draw(transformers[k], Sampling(top_k=0.5)), expected[k])
        except Exception as error:
            failed.append(error)

    loader = threading.Thread(target=load)
    drawing = [threading.Thread(target=capture, args=(k,)) for k in range(len(KINDS))]
    for thread in (loader, *drawing):
        thread.start()
    for thread in drawing:
        thread.join()
    stop.set()
    loader.join()
    assert failed == []


def refine(unet, clip, share=0.5, count=2, target=0.5, steps=4, scheduler="dpm-solver++", loop=denoise):
    device, dtype = next(unet.parameters()).device, next(unet.parameters()).dtype
    embeds = torch.randn(count, 6, 32, 32, generator=torch.Generator().manual_seed(0)).to(device, dtype)

    def guide(predict, diffusion, lowest):
        targets, weights = torch.full((1, 8), target, device=device), torch.ones(1, device=device)
        pull = clip_loss(clip, targets, weights, 50.0, 3, make_generator(device, 0, "cutouts"))
        return guided(predict, diffusion, lowest, pull)

    generators = [make_generator(device, 0, "noise", k) for k in range(count)]
    settings = Denoising(steps, guidance_share=share, scheduler=scheduler)
    with torch.no_grad():
        return loop(unet, (3, 32, 32), generators, {"image_embeds": embeds}, settings, None, guide)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_captured_denoising_steps_equal_those_without_graphs(checkpointing, monkeypatch):
    unet, clip = random_unet().cuda(), FlatCLIP().cuda()
    unet.enable_gradient_checkpointing(checkpointing)
    cases = [dict(), dict(target=-0.5), dict(steps=6, scheduler="ddim"), dict(count=1, scheduler="ddpm")]
    with_graphs = [refine(unet, clip, **case) for case in cases]
    assert 0 < len(unet.graphs) <= captured.KEPT_GRAPHS
    without_graphs(monkeypatch)
    for case, found in zip(cases, with_graphs, strict=True):
        expected = refine(unet, clip, **case)
        assert (found - expected).abs().max() < 1e-3 * expected.abs().max()


def test_a_change_of_the_image_between_steps_takes_effect():
    unet, clip, found = random_unet().cuda(), FlatCLIP().cuda(), []
    for factor in (1.0, 0.5):
        for step in refine(unet, clip, loop=denoising_steps):
            step.x.mul_(factor)
        found.append(step.pred_xstart)
    assert not torch.allclose(*found)


def test_offloaded_parts_are_moved_there_and_back():
    parts = Parts(transformer=random_transformer("dalle"), upsampler=random_unet()).enable_model_offload("cuda")
    torch.cuda.empty_cache()
    before, drawn = torch.cuda.memory_allocated(), []
    for _ in range(2):
        with parts.on_device("drawing", "transformer") as [transformer]:
            assert transformer.head[0].is_cuda and not next(parts.upsampler.parameters()).is_cuda
            drawn.append(draw(transformer, Sampling(top_k=0.5)).cpu())
        with parts.on_device("refining", "upsampler") as [unet]:
            refine(unet, FlatCLIP().cuda())
        assert not parts.transformer.head[0].is_cuda and not next(parts.upsampler.parameters()).is_cuda
    assert torch.equal(*drawn)
    assert torch.cuda.memory_allocated() - before < 2**20  # the graphs and their memory are freed


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.bfloat16, 0.1), (torch.float16, 0.02)], ids=["bfloat16", "float16"]
)
def test_logits_in_half_precision_are_near_those_of_float32(kind, dtype, bound):
    exact = random_transformer(kind).cuda()
    text, image = torch.full((2, 8), 3).cuda(), (torch.arange(128).view(2, 64) % 64).cuda()
    expected = exact.image_token_logits(text, image)
    found = copy.deepcopy(exact).to(dtype).image_token_logits(text, image).float()
    assert (found - expected).square().mean() < bound**2 * expected.square().mean()
    assert draw(exact.to(dtype), Sampling(top_k=0.5)).unique().numel() > 8


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.bfloat16, 0.1), (torch.float16, 0.02)], ids=["bfloat16", "float16"]
)
def test_denoising_in_half_precision_is_near_that_of_float32(dtype, bound):
    unet, clip = random_unet().cuda(), FlatCLIP().cuda()
    expected = refine(unet, clip, steps=2, scheduler="ddim", share=1.0)
    found = refine(copy.deepcopy(unet).to(dtype), clip, steps=2, scheduler="ddim", share=1.0)
    assert (found - expected).square().mean() < bound**2 * expected.square().mean()


def test_a_compiled_step_is_captured_and_draws_the_same_tokens():
    plain = random_transformer("dalle").double().cuda()
    compiled = copy.deepcopy(plain)
    compiled.compile(mode="reduce-overhead")
    for settings in (Sampling(top_k=0.5), Sampling(top_p=0.9, cond_scale=3.0)):
        for _ in range(2):
            assert (draw(compiled, settings) == draw(plain, settings)).float().mean() > 0.99


def test_a_compiled_unet_is_captured_and_gives_the_same_images():
    plain, clip = random_unet().cuda(), FlatCLIP().cuda()
    compiled = copy.deepcopy(plain)
    compiled.compile()
    expected = refine(plain, clip)
    for _ in range(2):
        assert (refine(compiled, clip) - expected).abs().max() < 1e-2 * expected.abs().max()
