"""The pipeline on a GPU, pretended: nothing is left on the CPU, and the pictures are those of the CPU."""

import contextlib
import copy
import threading
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from dall3.tokens.batching import fitting_batch_size
from dall3.tokens.cuda_graph import CudaGraph
from dall3.tokens.sampling import Sampling
from pretend_gpu import pretend_gpu

from conftest import load_seedset

PROMPT = "a cube made of cloud"
HOW = dict(num_inference_steps=2, seed=3, progress=False)
RED = Image.new("RGB", (128, 128), "red")


@pytest.fixture(scope="module")
def pipe(seedset):
    return load_seedset(seedset)


def assert_same(out, expected):
    assert torch.equal(out.tokens, expected.tokens)
    for picture, same in zip(out.images, expected.images, strict=True):
        assert np.abs(np.array(picture, float) - np.array(same, float)).max() <= 1


def test_the_call_gives_the_pictures_of_the_cpu(pipe, monkeypatch):
    how = HOW | dict(
        num_images=2, refine_batch_size=2, num_candidates=3, top_p=0.9, cond_scale=2.0, seamless=True, tv_scale=1.0
    )
    how |= dict(num_inference_steps=4, strength=0.5)  # x_0 seen through pure noise has 150 times what was rounded
    expected = pipe(PROMPT, **how)
    with pretend_gpu(monkeypatch):
        there = copy.deepcopy(pipe).to("cuda")
        assert there.device == torch.device("cuda:0")
        assert_same(there(PROMPT, **how), expected)


def test_offloaded_parts_come_and_go(pipe, monkeypatch):
    seen = []

    def look(pipe, step, timestep, tensors):
        tensors["x"].mul_(1)
        parts = ("transformer", "vqgan", "clip", "upsampler")
        seen.append([next(getattr(pipe, part).parameters()).device.type for part in parts])

    how = HOW | dict(init_image=RED, redraw=(0, 0, 2, 1), top_k=0.9, scheduler="ddpm", guidance_share=0.5)
    expected = pipe(PROMPT, **how)
    with pretend_gpu(monkeypatch):
        there = copy.deepcopy(pipe).enable_model_offload("cuda")
        assert_same(there(PROMPT, callback_on_step_end=look, **how), expected)
    assert seen == [["cpu", "cuda", "cuda", "cuda"]] * 2


def test_each_stage_takes_what_lies_on_the_cpu(pipe, monkeypatch):
    tokens, prompts = torch.arange(256)[None] % pipe.vqgan.num_tokens, dict(prompt="a cube:2|a cloud")
    prompts |= dict(image_prompts=[(RED, 1.0)], clip_guidance_scale=1000)
    scheduler = diffusers.EulerDiscreteScheduler()
    expected = pipe.upsample(tokens, **prompts, **HOW)
    with pretend_gpu(monkeypatch):
        there = copy.deepcopy(pipe).to("cuda")
        coarse, fine = there.decode_tokens(tokens.numpy()), there.upsample(tokens, **prompts, **HOW)
        assert coarse.device.type == fine.device.type == "cuda"
        assert (fine.cpu() - expected).abs().max() < 1e-3
        assert there.rank([RED, RED], PROMPT, progress=False).scores.shape == (2,)
        assert there.upsample(image=RED, scheduler=scheduler, strength=0.7, **HOW).shape == (1, 3, 64, 64)
        assert there.complete_text("a cube", seed=0) == pipe.complete_text("a cube", seed=0)


def test_half_precision(pipe, monkeypatch):
    with pretend_gpu(monkeypatch):
        there = copy.deepcopy(pipe).to("cuda", torch.float16)
        tokens = there.generate_tokens(PROMPT, jacobi_window=64, seed=0, progress=False)
        fine = there.upsample(tokens, prompt=PROMPT, clip_guidance_scale=1000, **HOW)
        assert fine.device.type == "cuda" and fine.isfinite().all() and fine.std() > 0


def test_the_default_batch_does_not_depend_on_what_the_allocator_reserved(pipe, monkeypatch):
    sizes = {}
    for memory in (2**28, 2**33):
        for reserved in (0, memory // 2, memory):
            with monkeypatch.context() as patch, pretend_gpu(patch, memory, reserved):
                there = copy.deepcopy(pipe.transformer).to("cuda")
                sizes[memory, reserved] = fitting_batch_size(there, Sampling(cond_scale=2.0))
    of_small, of_large = list(sizes.values())[:3], list(sizes.values())[3:]
    assert len(set(of_small)) == 1 and 1 < of_small[0] < 256 and set(of_large) == {256}


def test_one_graph_is_captured_at_a_time_and_other_threads_may_use_the_gpu(monkeypatch):
    inside, modes, second = [], [], []

    @contextlib.contextmanager
    def capture(graph, capture_error_mode="global"):
        modes.append(capture_error_mode)
        inside.append(graph)
        yield
        inside.remove(graph)

    stream = SimpleNamespace(wait_stream=lambda other: None)
    cuda = dict(Stream=lambda: stream, current_stream=lambda: stream, CUDAGraph=lambda: SimpleNamespace())
    cuda |= dict(graph=capture, device=contextlib.nullcontext, stream=contextlib.nullcontext)
    for name, fake in cuda.items():
        monkeypatch.setattr(torch.cuda, name, fake)

    def add_one(x):
        return x + 1

    def with_a_second_thread(x):
        if inside:
            thread = threading.Thread(target=lambda: second.append(CudaGraph(add_one, x)), daemon=True)
            thread.start()
            thread.join(0.3)
            assert second == [] and len(inside) == 1  # it waits
            threads.append(thread)
        return x + 1

    threads: list[threading.Thread] = []
    graph = CudaGraph(with_a_second_thread, torch.zeros(1))
    threads[0].join(10)
    assert len(second) == 1 and graph.output.item() == second[0].output.item() == 1
    assert modes == ["thread_local"] * 2
