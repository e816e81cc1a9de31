"""Estimates of memory and time: calls that cannot fit are refused before any work, calls that fit never are."""

import logging

import pytest
import torch

from dall3 import Dall3Pipeline
from dall3.estimate import Countdown, Pace, estimate_request
from dall3.generate import WithResult
from dall3.memory import memory_needs
from dall3.output import Preview
from dall3.request import make_request
from dall3.tokens.batching import free_memory

QUICK = dict(clip_guidance_scale=0.0, progress=False)


@pytest.fixture(scope="module")
def pipe():
    return Dall3Pipeline.from_pretrained()


def test_an_estimate_holds_the_exact_sizes_and_what_the_call_does(pipe):
    estimate = pipe.estimate(2, 6, batch_size=4, guidance_scale=2.0, **QUICK)
    drawing, ranking, refining = estimate.stages
    weights = sum(p.nbytes for p in pipe.transformer.parameters()) + sum(b.nbytes for b in pipe.transformer.buffers())
    assert drawing.weights == weights and drawing.batch_size == 4
    cache = pipe.transformer.prefill(torch.zeros(2, 32, dtype=torch.int64), 4)
    held = cache_tensors(cache)
    everything = sum(tensor.nbytes for tensor in held)  # keys and values, and little else
    assert 0.85 * everything < drawing.caches <= everything
    assert ranking.activations > 4 * 3 * 128 * 128 * 4 and refining.activations > 0
    assert estimate.summary == "draws 6 candidates of 256 tokens, ranks them, refines 2 images in 3 of 20 steps"
    assert estimate.seconds == pytest.approx(sum(stage.seconds for stage in estimate.stages)) and estimate.seconds > 0
    assert estimate.peak > sum(p.nbytes for part in pipe.networks.values() for p in part.parameters())
    assert "drawing, 4 at a time: about" in str(estimate) and " free" in str(estimate)


def cache_tensors(value, depth=0):
    """All tensors that a cache holds, each once."""
    found = {}
    todo = [value]
    while todo:
        one = todo.pop()
        if isinstance(one, torch.Tensor):
            found[one.untyped_storage().data_ptr()] = one
        elif isinstance(one, list | tuple):
            todo += one
        elif isinstance(one, dict):
            todo += one.values()
        elif hasattr(one, "__dict__"):
            todo += vars(one).values()
    return list(found.values())


def nothing(*args, **kwargs):
    raise AssertionError("work began")


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(num_candidates=64, batch_size=64), "drawing 64 images at a time .* try batch_size="),
        (dict(refine_batch_size=64, num_images=64, batch_size=1), "refining 64 images at a time .* refine_batch_size="),
    ],
)
def test_a_call_that_cannot_fit_is_refused_before_any_work(pipe, monkeypatch, settings, words):
    request = make_request(pipe, "a cube", **{"num_images": 1, **settings}, **QUICK)
    least = max(need.least(need.stage.batch_size) for need in memory_needs(pipe, request))
    for free, fits in ((least - 1, False), (least, True)):
        monkeypatch.setattr("dall3.memory.free_memory", lambda device, free=free: free)
        monkeypatch.setattr("dall3.estimate.free_memory", lambda device, free=free: free)
        if fits:
            assert make_request(pipe, "a cube", **{"num_images": 1, **settings}, **QUICK)
            continue
        for name in ("dall3.pipeline.run", "dall3.estimate.draw", "dall3.estimate.refine", "dall3.wall.draw"):
            monkeypatch.setattr(name, nothing)
        with pytest.raises(ValueError, match=words) as caught:
            pipe("a cube", **{"num_images": 1, **settings}, **QUICK)
        assert 'pipe.to("cpu", torch.bfloat16)' in str(caught.value) and "cpu has " in str(caught.value)
        with pytest.raises(ValueError, match=words):
            pipe.stream("a cube", **{"num_images": 1, **settings}, **QUICK)
        estimate = pipe.estimate(**{"num_images": 1, **settings}, **QUICK)
        assert estimate.seconds is None and estimate.free == free and "does not fit" in str(estimate)
        batch = settings.get("refine_batch_size", settings["batch_size"])
        assert f"={batch // 2}" in str(caught.value)


def test_the_required_memory_is_never_more_than_the_call_allocates(pipe):
    """The bound that refuses a call counts only tensors that exist at the same time."""
    from torch.profiler import ProfilerActivity, profile

    request = make_request(pipe, "a cube", 1, 2, batch_size=2, num_inference_steps=1, **QUICK)
    needs = {need.stage.name: need for need in memory_needs(pipe, request)}
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        pipe.decode_tokens(torch.zeros(2, 256, dtype=torch.int64), 2)
    assert needs["ranking"].least(2) <= peak_bytes(profiled)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        pipe.upsample(torch.zeros(1, 256, dtype=torch.int64), num_inference_steps=1, seed=0, progress=False)
    assert needs["refining"].least(1) <= peak_bytes(profiled)


def peak_bytes(profiled):
    """Peak of the allocated bytes."""
    now = most = 0
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


def test_free_memory_is_that_of_the_device(monkeypatch):
    assert free_memory(torch.device("cpu")) > 2**20
    assert free_memory(torch.device("meta")) is None
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10, 100))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 7)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 4)
    assert free_memory(torch.device("cuda")) == 13


def test_nothing_is_refused_on_a_device_of_unknown_memory(pipe, monkeypatch):
    monkeypatch.setattr("dall3.memory.free_memory", lambda device: None)
    assert make_request(pipe, "a cube", 4096, 4096, batch_size=4096, refine_batch_size=4096, **QUICK).batch_size == 4096


def test_a_call_shows_at_its_start_what_it_does_and_how_long_it_takes(pipe, caplog):
    with caplog.at_level(logging.INFO, logger="dall3"):
        pipe("a red cube", 1, 2, seed=0, num_inference_steps=2, strength=1.0, **QUICK)
    said = [record.message for record in caplog.records if record.name == "dall3"]
    assert said[0].startswith("draws 2 candidates of 256 tokens, ranks them, refines 1 image in 2 steps: about ")


class Slow(Pace):
    """A pace of known stages: 10 s of drawing, 4 s of ranking, 8 steps of 1 s for each of two images."""

    def drawing(self):
        return 10.0

    def ranking(self):
        return 4.0

    def denoising(self):
        return ((image, 1.0) for image in (0, 1) for _ in range(8))


def test_the_time_left_counts_what_is_done_and_later_stages(pipe, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("dall3.estimate.time.perf_counter", lambda: clock[0])
    countdown = Countdown(Slow(pipe, make_request(pipe, "a cube", 2, 2, **QUICK)))

    def left(stage, step, total, at):
        clock[0] = at
        return countdown.follow(Preview(stage, step, total, list)).seconds_left

    assert left("drawing", 128, 512, 5.0) == pytest.approx(15 + 4 + 16)
    assert left("drawing", 512, 512, 20.0) == pytest.approx(4 + 16)
    assert left("ranking", 1, 1, 24.0) == pytest.approx(16)
    left("refining", 4, 8, 28.0)
    assert left("refining", 8, 8, 32.0) == pytest.approx(8)  # as fast as measured
    assert left("refining", 4, 8, 48.0) == pytest.approx(8)  # half as fast
    assert left("refining", 8, 8, 56.0) == pytest.approx(0)
    countdown.pace.upscaling = lambda: 100.0  # an upscaler runs after the last step
    assert left("refining", 8, 8, 56.0) == pytest.approx(100)
    assert Preview("done", 1, 1, list).seconds_left is None


def test_the_time_left_does_not_count_the_pauses_of_the_consumer(pipe, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("dall3.estimate.time.perf_counter", lambda: clock[0])

    def steps():
        for stage, seconds, count in (
            ("drawing", 5.0, 4),
            ("ranking", 4.0, 1),
            ("refining", 1.0, 8),
            ("refining", 1.0, 8),
        ):
            for step in range(1, count + 1):
                clock[0] += seconds
                yield Preview(stage, step, count, list)
        return "the output"

    pace, left = Slow(pipe, make_request(pipe, "a cube", 2, 2, **QUICK)), []
    previews = WithResult(Countdown(pace).watch(steps()))
    for preview in previews:
        left.append(preview.seconds_left)
        clock[0] += 100.0
    assert left == pytest.approx([15 + 4 + 16, 10 + 4 + 16, 5 + 4 + 16, 4 + 16, 16, *range(15, -1, -1)])
    assert previews.result == "the output" and pace.rates[pace.draw_key] == pytest.approx(20.0)


def test_an_estimate_of_weights_without_an_upsampler(pipe):
    plain = Dall3Pipeline(**pipe.components | {"upsampler": None, "clip": None})
    estimate = plain.estimate(3)
    assert [stage.name for stage in estimate.stages] == ["drawing", "ranking"]
    assert estimate.summary == "draws 3 candidates of 256 tokens"
    request = make_request(plain, "a", 3)
    assert estimate_request(plain, request).stages[0].seconds == estimate.stages[0].seconds


def test_loading_large_weights_shows_a_bar_that_ends_full(tmp_path, monkeypatch, capsys):
    from dall3.weights import progress

    folder = Dall3Pipeline.from_pretrained().save_pretrained(tmp_path / "weights", torch.float16)
    Dall3Pipeline.from_pretrained(folder)
    assert "loading" not in capsys.readouterr().err
    monkeypatch.setattr(progress, "LARGE", 2**20)
    seen = []

    class Bar(progress.tqdm):
        def update(self, n=1):
            super().update(n)
            seen.append((self.n, self.total))

    monkeypatch.setattr(progress, "tqdm", Bar)
    Dall3Pipeline.from_pretrained(folder)
    total = sum(file.stat().st_size for file in folder.glob("*/*.safetensors"))
    assert len(seen) > 50 and seen[-1] == (total, total) and sorted(seen) == seen
    Dall3Pipeline.from_pretrained(folder, progress=False)
    assert seen[-1][0] in (0, total)
