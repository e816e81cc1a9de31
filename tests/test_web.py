"""The page in the browser: its handlers, and the page itself, driven in Chromium."""

import shutil
import threading
import time

import gradio as gr
import pytest
from PIL import Image

from dall3 import Dall3Output, Dall3Pipeline
from dall3.cli import main
from dall3.web import Limits, make_page, open_picture, serve

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]


@pytest.fixture(scope="module")
def pipe():
    pipe = Dall3Pipeline.from_pretrained()
    pipe.defaults |= {"num_inference_steps": 5}
    return pipe


def handler(page, name):
    (found,) = {function.fn for function in page.fns.values() if getattr(function.fn, "__name__", "") == name}
    return found


@pytest.fixture(scope="module")
def page(pipe):
    return make_page(pipe, Limits(images=2, candidates=4, steps=10, pixels=512 * 512))


def test_a_call_shows_the_picture_as_it_forms_and_then_before_and_after(page, tmp_path):
    updates = list(handler(page, "draw")("a red cube", 3, 1, 2, 10, 0, None, 0.5))
    said = [status for _, status, _, _ in updates]
    assert said[0] == "drawing tokens: 32 of 512" and "ranking the candidates" in said and said[-1] == "done"
    assert any(status.startswith("refining: ") for status in said)
    assert [forming["value"].size for forming, _, _, _ in updates[:-1]] == [(256, 256)] * (len(updates) - 1)
    forming, _, gallery, files = updates[-1]
    assert not forming["visible"] and gallery["visible"] and len(files["value"]) == 1
    (_, first), (_, second) = gallery["value"]
    assert first == "before" and second.startswith("after: ") and "seed 3" in second


@pytest.mark.parametrize(
    "changed, words",
    [
        ({"prompt": "  "}, "the prompt is empty"),
        ({"candidates": 5}, "5 candidates; this page allows up to 4"),
        ({"images": 2, "candidates": 1}, "num_candidates=1 is less than num_images=2"),
        ({"seed": -1}, "seed=-1; expected a whole number"),
        ({"prompt": "cube " * 200}, "tokens"),
    ],
)
def test_what_cannot_be_drawn_is_said_in_the_librarys_words(page, changed, words):
    given = dict(prompt="a cube", seed=0, images=1, candidates=1, steps=2, guidance=0, start=None, change=0.5) | changed
    with pytest.raises(gr.Error, match=words):
        next(handler(page, "draw")(*given.values()))


def test_uploads_are_checked_to_be_pictures_of_a_size(page, tmp_path):
    (tmp_path / "note.png").write_text("not a picture")
    Image.new("RGB", (600, 600)).save(tmp_path / "large.png")
    Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    for name, words in [
        ("note.png", "not a picture that can be read"),
        ("large.png", "600×600 pixels; expected at most"),
    ]:
        with pytest.raises(gr.Error, match=words):
            next(handler(page, "draw")("a cube", 0, 1, 1, 2, 0, str(tmp_path / name), 0.5))
        with pytest.raises(gr.Error, match=words):
            handler(page, "read_recipe")(str(tmp_path / name))
    with pytest.raises(gr.Error, match=r"^'?red.png: carries no recipe"):
        handler(page, "read_recipe")(str(tmp_path / "red.png"))
    assert open_picture(str(tmp_path / "red.png"), Limits()).getpixel((0, 0)) == (255, 0, 0)


def test_a_picture_made_here_fills_the_fields_and_can_be_varied(page, pipe, tmp_path):
    settings = dict(num_candidates=3, seed=5, num_inference_steps=5, clip_guidance_scale=0.0, progress=False)
    pipe("a blue cube", 1, **settings).save(tmp_path)
    fields = handler(page, "read_recipe")(str(tmp_path / "0.png"))
    assert fields == ("a blue cube", 5, 1, 3, 5, 0.0)
    *_, (_, _, gallery, _) = handler(page, "draw")(*fields, str(tmp_path / "0.png"), 0.05)
    assert len(gallery["value"]) == 2


def test_a_missing_gradio_and_a_wrong_limit_are_said(monkeypatch, capsys):
    assert main(["web", "--max_steps", "0"]) == 2
    assert "steps=0; expected a whole number from 1" in capsys.readouterr().err
    monkeypatch.setitem(__import__("sys").modules, "dall3.web", None)
    assert main(["web"]) == 2
    assert "run pip install 'dall3[web]'" in capsys.readouterr().err


class Watched:
    """A pipeline that tells which of its streams were ended before they were done."""

    def __init__(self, pipe):
        self.pipe, self.ended, self.finished = pipe, threading.Event(), 0

    def __getattr__(self, name):
        return getattr(self.pipe, name)

    def stream(self, *args, **kwargs):
        done = False
        try:
            for preview in self.pipe.stream(*args, **kwargs):
                yield preview
                time.sleep(0.05)  # slow enough to be looked at
            done, self.finished = True, self.finished + 1
        finally:
            if not done:
                self.ended.set()


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium or Chrome is installed")
def test_the_page_in_a_browser(pipe, tmp_path):
    from playwright.sync_api import expect, sync_playwright

    watched = Watched(pipe)
    address = serve(watched, port=None, limits=Limits(candidates=8), block=False)
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
            page = browser.new_page(viewport={"width": 390, "height": 844})
            page.set_default_timeout(120_000)  # a busy machine takes its time
            asked = []
            page.on("request", lambda request: asked.append(request.url))
            page.goto(address)
            page.locator("#prompt textarea").fill("a red cube")
            page.locator("#draw").click()
            expect(page.locator("#status")).to_contain_text("drawing tokens", timeout=60_000)
            expect(page.locator("#forming img")).to_be_visible(timeout=60_000)
            expect(page.locator("#status")).to_contain_text("done", timeout=120_000)
            expect(page.locator("#gallery img")).to_have_count(4, timeout=60_000)
            assert page.evaluate("document.documentElement.scrollWidth") <= 390
            with page.expect_download() as download:
                page.locator("#files a").first.click()
            download.value.save_as(tmp_path / "picture.png")
            assert Dall3Output.load(tmp_path / "picture.png").prompt == "a red cube"

            page.locator("#draw").click()
            expect(page.locator("#status")).to_contain_text("drawing tokens", timeout=60_000)
            page.locator("#cancel").click()
            expect(page.locator("#status")).to_contain_text("cancelled", timeout=60_000)
            assert watched.ended.wait(30)

            watched.ended.clear()
            page.locator("#draw").click()
            expect(page.locator("#status")).to_contain_text("drawing tokens", timeout=60_000)
            page.close()
            assert watched.ended.wait(60)  # closing the tab ends the work too
            assert watched.finished == 1
            assert [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []
            browser.close()
    finally:
        gr.close_all(verbose=False)
