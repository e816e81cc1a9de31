"""The web page: its handlers, and the page itself in Chromium."""

import json
import shutil
import threading
import time

import gradio as gr
import pytest
import requests
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from dall3 import Dall3Output, Dall3Pipeline
from dall3.cli import main
from dall3.output import RECIPE
from dall3.web import Limits, make_page, open_picture, serve
from dall3.web_weights import Shelf

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
    said = [update[1] for update in updates]
    assert said[0] == "drawing tokens: 32 of 512" and "ranking the candidates" in said and said[-1] == "done"
    assert any(status.startswith("refining: ") for status in said)
    assert [update[0]["value"].size for update in updates[:-1]] == [(256, 256)] * (len(updates) - 1)
    forming, _, gallery, files, vary, last, past, history = updates[-1]
    assert vary["visible"] and last.weights == "bundled" and len(last.result) == len(past) == 1
    assert [image.size for image, _ in history["value"]] == [(128, 128)] and past[0].fields == (
        "a red cube",
        3,
        1,
        2,
        10,
        0,
    )
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
def test_the_page_shows_the_librarys_error_messages(page, changed, words):
    given = dict(prompt="a cube", seed=0, images=1, candidates=1, steps=2, guidance=0, start=None, change=0.5) | changed
    with pytest.raises(gr.Error, match=words):
        next(handler(page, "draw")(*given.values()))


def test_uploads_are_checked_for_kind_and_size(page, tmp_path):
    (tmp_path / "note.png").write_text("not a picture")
    Image.new("RGB", (600, 600)).save(tmp_path / "large.png")
    Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    for name, words in [("note.png", "not a readable image"), ("large.png", "600×600 pixels; expected at most")]:
        with pytest.raises(gr.Error, match=words):
            next(handler(page, "draw")("a cube", 0, 1, 1, 2, 0, str(tmp_path / name), 0.5))
        with pytest.raises(gr.Error, match=words):
            handler(page, "read_recipe")(str(tmp_path / name))
    with pytest.raises(gr.Error, match=r"^'?red.png: has no recipe"):
        handler(page, "read_recipe")(str(tmp_path / "red.png"))
    assert open_picture(str(tmp_path / "red.png"), Limits()).getpixel((0, 0)) == (255, 0, 0)


def test_an_image_of_the_page_restores_its_settings_and_can_be_varied(page, pipe, tmp_path):
    settings = dict(num_candidates=3, seed=5, num_inference_steps=5, clip_guidance_scale=0.0, progress=False)
    pipe("a blue cube", 1, **settings).save(tmp_path)
    fields = handler(page, "read_recipe")(str(tmp_path / "0.png"))
    assert fields == ["a blue cube", 5, 1, 3, 5, 0.0]
    *_, (_, _, gallery, *_) = handler(page, "draw")(*fields, str(tmp_path / "0.png"), 0.05)
    assert len(gallery["value"]) == 2


GOOD = {"num_images": 1, "num_candidates": 3, "seed": 5, "num_inference_steps": 5, "clip_guidance_scale": 0.0}


def recipe_with(folder, recipe):
    """The path of a PNG with an untrusted recipe."""
    about = PngInfo()
    about.add_itxt(RECIPE, recipe if isinstance(recipe, str) else json.dumps(recipe))
    Image.new("RGB", (8, 8)).save(folder / "theirs.png", pnginfo=about)
    return str(folder / "theirs.png")


def whole(settings=GOOD):
    one = [Image.new("RGB", (8, 8))]
    out = Dall3Output("a cube", one, one, torch.zeros(1, 4).long(), torch.tensor([0.5]), torch.arange(1), settings)
    return out.recipe(0)


@pytest.mark.parametrize("odd", [None, "x", "10,10,5", -1, 1.5, 1e300, 10**30, True, [1], {"a": 1}, "\ud800", "<b>"])
def test_an_untrusted_recipe_is_shown_or_refused(page, tmp_path, odd):
    recipes = [whole() | {name: odd} for name in whole()]
    recipes += [whole(GOOD | {name: odd}) for name in GOOD] + [json.dumps(odd), [whole()], "{", "[" * 10**5]
    for recipe in recipes:
        try:
            fields = handler(page, "read_recipe")(recipe_with(tmp_path, recipe))
        except gr.Error as error:
            words = error.message
            assert words.startswith(("theirs.png: its recipe is damaged", "the recipe", "steps ")) and "<" not in words
            continue
        prompt, *numbers = fields
        json.dumps(prompt, ensure_ascii=False).encode()
        for number, most in zip(numbers, (2**53 - 1, 2, 4, 10, 5000), strict=True):
            assert number == gr.update() or (type(number) in (int, float) and 0 <= number <= most)


def test_a_recipe_without_a_seed_is_refused_and_other_fields_stay(page, tmp_path):
    with pytest.raises(gr.Error, match="the recipe has no seed"):
        handler(page, "read_recipe")(recipe_with(tmp_path, whole({"num_images": 1})))
    fields = handler(page, "read_recipe")(recipe_with(tmp_path, whole({"seed": 9})))
    assert fields == ["a cube", 9, *[gr.update()] * 4]
    with pytest.raises(gr.Error, match=r"seed is '9007199254740992'; expected a whole number in \[0, "):
        handler(page, "read_recipe")(recipe_with(tmp_path, whole({"seed": 2**53})))


def test_the_unequal_steps_of_some_weights_are_kept_until_they_are_changed(pipe, tmp_path):
    given = []

    class Asked:
        defaults = {"num_inference_steps": "10,10,5", "clip_guidance_scale": 9000}

        def __getattr__(self, name):
            return getattr(pipe, name)

        def stream(self, *args, **settings):
            given.append(settings)
            return iter(())

    page = make_page(Asked(), Limits())
    steps, guidance = (
        next(block for block in page.blocks.values() if getattr(block, "label", "") == label)
        for label in ("Denoising steps", "CLIP guidance")
    )
    assert steps.value == 25 and guidance.value == 9000 <= guidance.maximum
    for number in (25, 20):
        list(handler(page, "draw")("a cube", 0, 1, 1, number, 0, None, 0.5))
    assert "num_inference_steps" not in given[0] and given[1]["num_inference_steps"] == 20
    fields = handler(page, "read_recipe")(recipe_with(tmp_path, whole(GOOD | {"num_inference_steps": "10,10,5"})))
    assert fields[4] == 25
    with pytest.warns(UserWarning, match="has unevenly spaced denoising steps"):
        fields = handler(page, "read_recipe")(recipe_with(tmp_path, whole(GOOD | {"num_inference_steps": "ddim20"})))
    assert fields[4] == gr.update()


@pytest.mark.parametrize("odd", [None, "x", float("nan"), float("inf"), [1]])
def test_values_that_are_not_numbers_are_refused(page, odd):
    for place in range(1, 6):
        values = ["a cube", 0, 1, 1, 2, 0, None, 0.5]
        values[place] = odd
        if (place, odd) == (1, None):
            continue  # any seed
        with pytest.raises(gr.Error):
            next(handler(page, "draw")(*values))


def test_only_uploaded_files_are_read_and_no_address_is_requested(pipe, tmp_path, monkeypatch):
    fetched = []

    async def fetch(address, *args, **kwargs):
        fetched.append(address)
        raise ValueError("fetched")

    for name in ("async_ssrf_protected_download", "ssrf_protected_download"):
        monkeypatch.setattr(f"gradio.processing_utils.{name}", fetch)
    address = serve(pipe, port=None, block=False).rstrip("/") + "/gradio_api"

    def ask(name, *data):
        event = requests.post(f"{address}/call/{name}", json={"data": data}, timeout=60).json()["event_id"]
        return requests.get(f"{address}/call/{name}/{event}", timeout=60).text

    def file(path):
        return {"path": str(path), "meta": {"_type": "gradio.FileData"}}

    try:
        path = recipe_with(tmp_path, whole())
        with open(path, "rb") as content:
            (uploaded,) = requests.post(f"{address}/upload", files={"files": content}, timeout=60).json()
        assert '"a cube", 5, 1, 3, 5, 0.0' in ask("read_recipe", file(uploaded), "bundled")
        for other in (path, "http://127.0.0.1:1/a.png", "https://example.com/a.png", uploaded + "/../x", "/etc/passwd"):
            for said in (
                ask("read_recipe", file(other), "bundled"),
                ask("draw", file(other), 0, 1, 1, 2, 0, None, 0.5, None, "bundled"),
                ask("draw", "a cube", 0, 1, 1, 2, 0, [{"a": file(other)}], 0.5, None, "bundled"),
                ask("draw", "a cube", 0, 1, 1, 2, 0, None, 0.5, {"background": file(other)}, "bundled"),
                ask("lay_out", "a cube", 0, 2, file(other), 0.5, None, "bundled"),
            ):
                assert "event: error" in said and "not uploaded to this page" in said
        for route in ("file=", "proxy="):
            answer = requests.get(f"{address}/{route}http://example.com/a.png", timeout=60)
            assert answer.status_code == 403 and answer.text == "this page does not fetch addresses"
        assert fetched == []
    finally:
        gr.close_all(verbose=False)


def chosen(index):
    """The event that the browser sends when an image of a gallery is selected."""
    return gr.SelectData(None, {"index": index, "value": None})


def test_a_wall_is_chosen_from_by_clicks_and_refined_as_one_call_would(page, pipe):
    *_, (forming, said, wall, numbers, refine, drawn) = handler(page, "lay_out")("a red cube", 4, 4, None, 0.5)
    assert not forming["visible"] and refine["visible"] and "Select images" in said
    assert [caption for _, caption in wall["value"]] == numbers["choices"] == ["0", "1", "2", "3"]
    toggle = handler(page, "toggle")
    assert toggle(toggle(toggle([], chosen(3)), chosen(1)), chosen(3)) == ["1"]
    *_, update = handler(page, "refine")(drawn, ["3", "1"], 5, 0)
    assert update[5].result == pipe.refine(
        pipe.draw("a red cube", 4, seed=4, progress=False)[3, 1], clip_guidance_scale=0.0, progress=False
    )
    for given, words in [
        ((None, ["1"], 5, 0), "there is no wall"),
        ((drawn, [], 5, 0), "no image is chosen"),
        ((drawn, ["7"], 5, 0), "no image 7 on this wall"),
        ((drawn, ["0", "1", "2"], 5, 0), "3 images; this page allows up to 2"),
        ((drawn, ["0"], 11, 0), "11 steps; this page allows up to 10"),
    ]:
        with pytest.raises(gr.Error, match=words):
            next(handler(page, "refine")(*given))
    with pytest.raises(gr.Error, match="5 candidates; this page allows up to 4"):
        next(handler(page, "lay_out")("a red cube", 4, 5, None, 0.5))


def test_an_output_can_be_varied_and_found_again_in_the_history(page):
    *_, first = handler(page, "draw")("a red cube", 3, 1, 1, 5, 0, None, 0.5)
    last, past = first[5], first[6]
    assert handler(page, "select")(last, chosen(1)) == 0
    *_, second = handler(page, "vary")("a red cube", 4, 2, 5, 0, 0.1, last, 0, past)
    same = (second[5].result.tokens == last.result.tokens).sum(dim=1)
    assert ((same >= 0.85 * 256) & (same < 256)).all()
    assert [one.fields[1] for one in second[6]] == [4, 4, 3]
    assert handler(page, "recall")(second[6], chosen(2)) == ["a red cube", 3, 1, 1, 5, 0]
    with pytest.raises(gr.Error, match="no such image"):
        handler(page, "recall")(past, chosen(5))
    with pytest.raises(gr.Error, match="no image to vary"):
        next(handler(page, "vary")("a red cube", 4, 2, 5, 0, 0.1, None, 0))


def test_a_painted_part_is_drawn_again_and_the_rest_stays(page, pipe, tmp_path):
    image, layer = tmp_path / "image.png", tmp_path / "layer.png"
    Image.new("RGB", (128, 128), "blue").save(image)
    painted = Image.new("RGBA", (128, 128), (0, 0, 0, 0))
    painted.paste((255, 255, 255, 255), (0, 64, 128, 128))
    painted.save(layer)
    edited = {"background": str(image), "layers": [str(layer)], "composite": None}
    *_, update = handler(page, "draw")("a red cube", 3, 1, 1, 5, 0, None, 0.5, edited)
    before = pipe.encode(pipe.decode_tokens(update[5].result.tokens) * 0 + torch.tensor([0, 0, 1.0])[:, None, None])
    assert torch.equal(update[5].result.tokens[0, :128], before[0, :128])
    assert not torch.equal(update[5].result.tokens[0, 128:], before[0, 128:])
    (tmp_path / "layer.png").write_text("not an image")
    with pytest.raises(gr.Error, match="layer.png"):
        next(handler(page, "draw")("a red cube", 3, 1, 1, 5, 0, None, 0.5, edited))


def test_a_seed_is_kept_or_chosen_again(page):
    next_seed = handler(page, "next_seed")
    assert next_seed(7, True) == 7 and next_seed(None, True) is None
    assert len({next_seed(7, False) for _ in range(4)} | {7}) == 5


def test_weights_on_this_machine_can_be_chosen_and_others_downloaded_if_allowed(pipe, tmp_path, monkeypatch):
    monkeypatch.setenv("DALL3_HOME", str(tmp_path))
    monkeypatch.setenv("DALL3_OFFLINE", "1")
    shelf = Shelf(pipe, fetching=True)
    known = {choice.name: choice for choice in shelf.choices()}
    assert known["bundled"].here and not known["dalle-mega"].here and known["dalle-mega"].size > 7e9
    for name, words in (("dalle-mega", "not on this machine"), ("../etc", "are not known"), ("mini/..", "not known")):
        with pytest.raises(ValueError, match=words):
            shelf.get(name)
    page = make_page(pipe, shelf=shelf)
    with pytest.raises(gr.Error, match="DALL3_OFFLINE is set"):
        list(handler(page, "fetch")("dalle-mega"))
    with pytest.raises(gr.Error, match="are not known"):
        list(handler(page, "fetch")("nothing"))
    with pytest.raises(gr.Error, match="fetches no weights"):
        list(handler(make_page(pipe, shelf=Shelf(pipe)), "fetch")("dalle-mega"))
    with pytest.raises(gr.Error, match="not on this machine"):
        handler(page, "use_weights")("dalle-mega")


def test_a_missing_gradio_and_an_invalid_limit_are_errors(monkeypatch, capsys):
    assert main(["web", "--max_steps", "0"]) == 2
    assert "steps=0; expected a whole number from 1" in capsys.readouterr().err
    monkeypatch.setitem(__import__("sys").modules, "dall3.web", None)
    assert main(["web"]) == 2
    assert "run pip install 'dall3[web]'" in capsys.readouterr().err


class Watched:
    """A pipeline that records which of its streams were ended early."""

    def __init__(self, pipe):
        self.pipe, self.ended, self.finished = pipe, threading.Event(), 0

    def __getattr__(self, name):
        return getattr(self.pipe, name)

    def stream(self, *args, **kwargs):
        done = False
        try:
            for preview in self.pipe.stream(*args, **kwargs):
                yield preview
                time.sleep(0.05)  # slow enough to observe
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
            page.set_default_timeout(120_000)  # for a busy machine
            asked = []
            page.on("request", lambda request: asked.append(request.url))
            page.goto(address)
            page.get_by_role("button", name="an avocado").click()
            expect(page.locator("#prompt textarea")).to_have_value("an avocado", timeout=60_000)
            page.locator("#prompt textarea").fill("a red cube")
            page.locator("#draw").click()
            expect(page.locator("#status")).to_contain_text("drawing tokens", timeout=60_000)
            expect(page.locator("#forming img")).to_be_visible(timeout=60_000)
            expect(page.locator("#status")).to_contain_text("done", timeout=600_000)
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

            page.locator("#lay").click()
            expect(page.locator("#wall img")).to_have_count(8, timeout=600_000)
            page.locator("#wall button").nth(5).click()
            expect(page.locator("#chosen input:checked")).to_have_count(1, timeout=60_000)
            page.locator("#refine").press("Enter")
            expect(page.locator("#status")).to_contain_text("done", timeout=600_000)
            expect(page.locator("#gallery img")).to_have_count(2, timeout=60_000)
            expect(page.locator("#history img")).to_have_count(3, timeout=60_000)
            assert page.evaluate("document.documentElement.scrollWidth") <= 390

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
