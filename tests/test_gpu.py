"""The pipeline on the pretended GPU: no tensor is left on the CPU, and the images equal those of the CPU.

Tests that need a real GPU are in test_cuda.py.
"""

import contextlib
import copy
import threading
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from dall3.diffusion.denoising import Denoising, default_refine_batch_size, denoise
from dall3.diffusion.guidance import clip_loss, guided
from dall3.models.transformer import DalleTransformer, TransformerConfig
from dall3.models.unet import UNet, UNetConfig
from dall3.tokens.batching import fitting_batch_size
from dall3.tokens.cuda_graph import CudaGraph
from dall3.tokens.decoding import draw_image_tokens
from dall3.tokens.sampling import Sampling
from dall3.tokens.seeds import candidate_uniforms, make_generator
from pretend_gpu import PretendGraph, pretend_gpu

from conftest import load_upstream_files

PROMPT = "a cube made of cloud"
HOW = dict(num_inference_steps=2, seed=3, progress=False)
RED = Image.new("RGB", (128, 128), "red")


@pytest.fixture(scope="module")
def pipe(upstream_files):
    return load_upstream_files(upstream_files)


def assert_same(out, expected):
    assert torch.equal(out.tokens, expected.tokens)
    for picture, same in zip(out.images, expected.images, strict=True):
        assert np.abs(np.array(picture, float) - np.array(same, float)).max() <= 1


def test_the_call_gives_the_images_of_the_cpu(pipe, monkeypatch):
    how = HOW | dict(
        num_images=2, refine_batch_size=2, num_candidates=3, top_p=0.9, cond_scale=2.0, seamless=True, tv_scale=1.0
    )
    how |= dict(num_inference_steps=4, strength=0.5)  # x_0 predicted from pure noise amplifies rounding by 150
    expected = pipe(PROMPT, **how)
    with pretend_gpu(monkeypatch):
        there = copy.deepcopy(pipe).to("cuda")
        assert there.device == torch.device("cuda:0")
        assert_same(there(PROMPT, **how), expected)


def test_offloaded_parts_are_moved_there_and_back(pipe, monkeypatch):
    seen = []

    def look(pipe, step, timestep, tensors):
        tensors["x"].mul_(1)
        parts = ("transformer", "vqgan", "clip", "upsampler")
        seen.append([next(getattr(pipe, part).parameters()).device.type for part in parts])

    tokens = torch.arange(256) % pipe.vqgan.num_tokens  # the codes of an image may differ by rounding
    how = HOW | dict(init_image=tokens, redraw=(0, 0, 2, 1), top_k=0.9, scheduler="ddpm", guidance_share=0.5)
    expected = pipe(PROMPT, **how)
    with pretend_gpu(monkeypatch):
        there = copy.deepcopy(pipe).enable_model_offload("cuda")
        assert_same(there(PROMPT, callback_on_step_end=look, **how), expected)
        primed = there.generate_tokens(PROMPT, init_image=RED, keep_rows=1, seed=0, progress=False)
        assert primed.shape == (1, 256)
    assert seen == [["cpu", "cuda", "cuda", "cuda"]] * 2


def test_each_stage_accepts_tensors_on_the_cpu(pipe, monkeypatch):
    tokens, prompts = torch.arange(256)[None] % pipe.vqgan.num_tokens, dict(prompt="a cube:2|a cloud")
    prompts |= dict(image_prompts=[(RED, 1.0)], clip_guidance_scale=1000)
    scheduler = diffusers.EulerDiscreteScheduler()
    expected = pipe.upsample(tokens, **prompts, **HOW)
    with pretend_gpu(monkeypatch):
        there = copy.deepcopy(pipe).to("cuda")
        coarse, fine = there.decode_tokens(tokens.numpy()), there.upsample(tokens, **prompts, **HOW)
        assert coarse.device.type == fine.device.type == "cuda"
        assert (fine.cpu() - expected).abs().max() < 2e-3
        assert there.rank([RED, RED], PROMPT, progress=False).scores.shape == (2,)
        assert there.upsample(image=RED, scheduler=scheduler, strength=0.7, **HOW).shape == (1, 3, 64, 64)
        assert there.complete_text("a cube", seed=0) == pipe.complete_text("a cube", seed=0)


def test_int8_weights_on_a_gpu_replay_their_own_captured_step_and_follow_the_weights(transformer, monkeypatch):
    text, uniforms = torch.tensor([3, 4, 5, 0, 0, 0, 0, 0]), candidate_uniforms(0, range(24), 16)
    int8 = Sampling(temperature=2.0, quantize="int8")
    transformer = transformer.float()
    plain = draw_image_tokens(transformer, text, uniforms, Sampling(temperature=2.0))
    with pretend_gpu(monkeypatch):
        there = copy.deepcopy(transformer).to("cuda")
        drawn = draw_image_tokens(there, text.to("cuda"), uniforms.to("cuda"), int8).cpu()
        assert (drawn[:, 0] == plain[:, 0]).float().mean() > 0.8  # later tokens depend on the ones before
        assert PretendGraph.captures == 1 and PretendGraph.replays == 15
        assert torch.equal(draw_image_tokens(there, text.to("cuda"), uniforms.to("cuda"), int8).cpu(), drawn)
        assert PretendGraph.captures == 1 and PretendGraph.replays == 30
        there.to_logits.weight.data.copy_(there.to_logits.weight.roll(1, dims=0))
        other = draw_image_tokens(there, text.to("cuda"), uniforms.to("cuda"), int8).cpu()
        assert not torch.equal(other, drawn)


def test_half_precision(pipe, monkeypatch):
    with pretend_gpu(monkeypatch):
        there = copy.deepcopy(pipe).to("cuda", torch.float16)
        tokens = there.generate_tokens(PROMPT, jacobi_window=64, seed=0, progress=False)
        fine = there.upsample(tokens, prompt=PROMPT, clip_guidance_scale=1000, **HOW)
        assert fine.device.type == "cuda" and fine.isfinite().all() and fine.std() > 0


def test_the_default_batch_does_not_depend_on_what_the_allocator_reserved(pipe, monkeypatch):
    sizes, cuda = {}, torch.device("cuda")
    for memory in (2**26, 2**33):
        for reserved in (0, memory // 2, memory):
            with monkeypatch.context() as patch, pretend_gpu(patch, memory, reserved):
                there = copy.deepcopy(pipe.transformer).to("cuda")
                sizes[memory, reserved] = fitting_batch_size(there, Sampling(cond_scale=2.0), cuda)
                parked = fitting_batch_size(pipe.transformer, Sampling(cond_scale=2.0), cuda)
                assert parked == sizes[memory, reserved]  # an offloaded transformer's batch is that of the GPU
    of_small, of_large = list(sizes.values())[:3], list(sizes.values())[3:]
    assert len(set(of_small)) == 1 and 1 < of_small[0] < 256 and set(of_large) == {256}


@pytest.mark.parametrize(("gibibytes", "expected"), [(6, 4), (24, 4), (40, 8), (79, 16), (180, 16)])
def test_the_default_number_of_refined_images_follows_from_the_memory(monkeypatch, gibibytes, expected):
    with pretend_gpu(monkeypatch, gibibytes * 2**30):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        assert default_refine_batch_size(None, "cuda") == expected
        assert default_refine_batch_size(None, "cpu") == 1 and default_refine_batch_size(3, "cuda") == 3


@pytest.fixture
def transformer():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = TransformerConfig(
            50, 40, 8, 32, 2, heads=2, dim_head=16, grid_size=4, attn_types=("full", "axial_row")
        )
        return DalleTransformer(config).double().eval().requires_grad_(False)


def test_later_batches_and_later_draws_only_replay_the_captured_step(transformer, monkeypatch):
    uniforms, texts = candidate_uniforms(0, range(5), 16), torch.arange(16).view(2, 8)
    plain, guided_by_text = Sampling(top_k=0.5), Sampling(top_p=0.9, cond_scale=3.0)

    def draw(model, text, settings, device):
        return draw_image_tokens(model, text.to(device), uniforms.to(device), settings, batch_size=2).cpu()

    def captures(model, text, settings):
        """Draw, check the tokens against those of the CPU, and return the number of captures."""
        before = PretendGraph.captures
        with pretend_outside():
            expected = draw(transformer, text, settings, "cpu")
        assert torch.equal(draw(model, text, settings, "cuda"), expected)
        return PretendGraph.captures - before

    with pretend_gpu(monkeypatch) as pretend_outside:
        there = copy.deepcopy(transformer).to("cuda")
        assert captures(there, texts[0], plain) == 2  # of two candidates, and of the last one
        assert PretendGraph.replays == 3 * 15
        assert captures(there, texts[1], plain) == 0
        assert captures(there, texts[0], guided_by_text) == 2
        assert captures(there, texts[1], guided_by_text) == 0
        for model in (transformer, there):
            model.to_logits.weight.mul_(1.5)  # in place: the graph reads the new values
        assert captures(there, texts[0], guided_by_text) == 0
        there.to_logits.weight = torch.nn.Parameter(there.to_logits.weight.clone(), requires_grad=False)
        assert captures(there, texts[0], guided_by_text) == 2  # at another address
        there.to("cuda")
        assert captures(there, texts[0], guided_by_text) == 2
        there.free_caches()
        assert captures(there, texts[0], plain) == 2


def test_a_batch_above_the_limit_is_not_captured(transformer, monkeypatch):
    monkeypatch.setattr("dall3.tokens.decoding.GRAPHED_ROWS", 3)
    uniforms, text = candidate_uniforms(0, range(4), 16), torch.arange(8)
    with pretend_gpu(monkeypatch):
        there = copy.deepcopy(transformer).to("cuda")
        for count, settings in ((4, Sampling()), (2, Sampling(cond_scale=2.0))):
            draw_image_tokens(there, text.to("cuda"), uniforms[:count].to("cuda"), settings)
        assert PretendGraph.captures == 0
        draw_image_tokens(there, text.to("cuda"), uniforms[:3].to("cuda"), Sampling())
        assert PretendGraph.captures == 1


class FlatCLIP(torch.nn.Module):
    """A minimal CLIP for guidance."""

    image_size = 16

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.linspace(-1, 1, 8), requires_grad=False)

    def embed_images(self, images):
        return images.flatten(1)[:, :8] * self.weight


def test_later_refinements_only_replay_the_captured_steps(monkeypatch):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet(UNetConfig(32, (1, 2), 1, (1,), 32, num_heads=2, embedding_dims=(6, 32))).eval()
        embeds = torch.randn(2, 6, 32, 32)
    unet.requires_grad_(False)

    def refine(unet, clip, device, target, **settings):
        def guide(predict, diffusion, lowest):
            targets, weights = torch.full((1, 8), target, device=device), torch.ones(1, device=device)
            pull = clip_loss(clip, targets, weights, 50.0, 3, make_generator(device, 0, "cutouts"))
            return guided(predict, diffusion, lowest, pull)

        generators = [make_generator(device, 0, "noise", k) for k in range(2)]
        conditioning, how = {"image_embeds": embeds.to(device)}, Denoising(strength=None, **settings)
        return denoise(unet, (3, 32, 32), generators, conditioning, how, None, guide).cpu()

    with pretend_gpu(monkeypatch) as pretend_outside:
        there, clip = copy.deepcopy(unet).to("cuda"), FlatCLIP()
        clip_there = copy.deepcopy(clip).to("cuda")

        def captures(target, **settings):
            """Refine, check the images against those of the CPU, and return the number of captures."""
            before = PretendGraph.captures
            with pretend_outside(), torch.no_grad():
                expected = refine(unet, clip, "cpu", target, **settings)
            apart = (refine(there, clip_there, "cuda", target, **settings) - expected).abs().max()
            assert apart < 1e-4 * expected.abs().max()
            return PretendGraph.captures - before

        how = dict(num_inference_steps=4, guidance_share=0.5, scheduler="dpm-solver++")
        assert captures(0.5, **how) == 2 and PretendGraph.replays == 4  # a guided step, and an unguided one
        assert captures(-0.5, **how) == 0  # another prompt
        assert captures(0.5, **how | dict(num_inference_steps=6, scheduler="ddim")) == 0
        clip_there.weight = torch.nn.Parameter(clip_there.weight.clone(), requires_grad=False)
        assert captures(0.5, **how) == 1
        assert len(copy.deepcopy(there).graphs) == 0 and len(there.graphs) == 2
        there.to("cuda")
        assert captures(0.5, **how) == 2
        monkeypatch.setattr(PretendGraph, "bytes", 2**30)  # an eighth of the memory
        there.free_graphs()
        assert captures(0.5, **how) == 2 and there.graphs == {}


def test_one_graph_is_captured_at_a_time_and_other_threads_may_use_the_gpu(monkeypatch):
    inside, modes, second, device = [], [], [], torch.device("cuda")

    @contextlib.contextmanager
    def capture(graph, stream=None, capture_error_mode="global"):
        modes.append(capture_error_mode)
        inside.append(graph)
        yield
        inside.remove(graph)

    stream = SimpleNamespace(wait_stream=lambda other: None)
    cuda = dict(Stream=lambda: stream, current_stream=lambda: stream, CUDAGraph=lambda: SimpleNamespace())
    cuda |= dict(graph=capture, device=contextlib.nullcontext, stream=contextlib.nullcontext)
    cuda |= dict(memory_reserved=lambda: 0, empty_cache=lambda: None)
    for name, fake in cuda.items():
        monkeypatch.setattr(torch.cuda, name, fake)

    def add_one(x):
        return x + 1

    def capture_another():
        second.append(CudaGraph(add_one, x, device=device))

    def with_a_second_thread(x):
        if inside:
            thread = threading.Thread(target=capture_another, daemon=True)
            thread.start()
            thread.join(0.3)
            assert second == [] and len(inside) == 1  # it waits for the other capture
            threads.append(thread)
        return x + 1

    threads: list[threading.Thread] = []
    x, linear = torch.zeros(1), torch.nn.Linear(2, 2).requires_grad_(False)
    graph = CudaGraph(with_a_second_thread, x, device=device, modules=[linear])
    threads[0].join(10)
    assert len(second) == 1 and graph.output.item() == second[0].output.item() == 1
    assert modes == ["thread_local"] * 2
    linear.weight.mul_(2)
    assert graph.reads([linear])  # in place: the graph reads the new values
    linear.weight.data = linear.weight.data.clone()
    assert not graph.reads([linear])
