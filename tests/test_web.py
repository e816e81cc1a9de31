"""The web page: its handlers, and the page itself in Chromium."""

import json
import shutil
import threading

import gradio as gr
import pytest
import requests
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from dall3 import Dall3Output, Dall3Pipeline
from dall3.cli import main
from dall3.generate import run
from dall3.output import RECIPE
from dall3.web import Limits, make_page, serve
from dall3.web_uploads import open_upload
from dall3.web_weights import Shelf
from dall3.weights.folder import BUNDLED
from dall3.weights.registry import bundled_registry_path

from hub import Hub

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium or Chrome is installed")
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
    assert said[0] == "measuring how long this takes" and said[1].startswith("starting, about ") and said[-1] == "done"
    assert said[2].startswith("drawing tokens: 32 of 512, about ")
    assert all(status.endswith((" s left", " min left")) for status in said[1:-1])
    assert {status.split(":")[0].split(",")[0] for status in said[2:-1]} == {
        "drawing tokens",
        "ranking the candidates",
        "refining",
    }
    assert [update[0]["value"].size for update in updates[2:-1]] == [(256, 256)] * (len(updates) - 3)
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
            handler(page, "restore_fields")(str(tmp_path / name))
    with pytest.raises(gr.Error, match=r"^'?red.png: has no recipe"):
        handler(page, "restore_fields")(str(tmp_path / "red.png"))
    assert open_upload(str(tmp_path / "red.png"), Limits()).getpixel((0, 0)) == (255, 0, 0)


def test_an_image_of_the_page_restores_its_settings_and_can_be_varied(page, pipe, tmp_path):
    settings = dict(num_candidates=3, seed=5, num_inference_steps=5, clip_guidance_scale=0.0, progress=False)
    pipe("a blue cube", 1, **settings).save(tmp_path)
    fields = handler(page, "restore_fields")(str(tmp_path / "0.png"))
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
            fields = handler(page, "restore_fields")(recipe_with(tmp_path, recipe))
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
        handler(page, "restore_fields")(recipe_with(tmp_path, whole({"num_images": 1})))
    fields = handler(page, "restore_fields")(recipe_with(tmp_path, whole({"seed": 9})))
    assert fields == ["a cube", 9, *[gr.update()] * 4]
    with pytest.raises(gr.Error, match=r"seed is '9007199254740992'; expected a whole number in \[0, "):
        handler(page, "restore_fields")(recipe_with(tmp_path, whole({"seed": 2**53})))


def test_the_unequal_steps_of_some_weights_are_kept_until_they_are_changed(pipe, tmp_path, monkeypatch):
    given = []

    class Asked:
        defaults = {"num_inference_steps": "10,10,5", "clip_guidance_scale": 9000}

        def __getattr__(self, name):
            return getattr(pipe, name)

    def make_request(pipe, prompt, *counts, **settings):
        given.append(settings)
        raise ValueError("enough")

    monkeypatch.setattr("dall3.web_handlers.make_request", make_request)
    page = make_page(Asked(), Limits())
    steps, guidance = (
        next(block for block in page.blocks.values() if getattr(block, "label", "") == label)
        for label in ("Denoising steps", "CLIP guidance")
    )
    assert steps.value == 25 and guidance.value == 9000 <= guidance.maximum
    for number in (25, 20):
        with pytest.raises(gr.Error, match="enough"):
            list(handler(page, "draw")("a cube", 0, 1, 1, number, 0, None, 0.5))
    assert "num_inference_steps" not in given[0] and given[1]["num_inference_steps"] == 20
    fields = handler(page, "restore_fields")(recipe_with(tmp_path, whole(GOOD | {"num_inference_steps": "10,10,5"})))
    assert fields[4] == 25
    with pytest.warns(UserWarning, match="has unevenly spaced denoising steps"):
        fields = handler(page, "restore_fields")(recipe_with(tmp_path, whole(GOOD | {"num_inference_steps": "ddim20"})))
    assert fields[4] == gr.update()


def test_a_recipe_as_json_fills_the_fields_too(page, tmp_path):
    path = tmp_path / "any.json"
    fields = ["a cube", 5, 1, 3, 5, 0.0]
    for recipe in (whole(), {"prompt": "a cube", "clip_scores": None, **GOOD}):  # and a settings.json
        path.write_text(json.dumps(recipe))
        assert handler(page, "restore_fields")(str(path)) == fields
    path.write_text(json.dumps(whole(GOOD | {"kept": [-1, 0]})))
    with pytest.warns(UserWarning, match="was made from another image"):
        assert handler(page, "restore_fields")(str(path)) == fields
    for text, words in [
        (b"{", "Expecting property name"),
        (b"[1]", "it is a list"),
        (b"{}", "it has no prompt and settings"),
        (b'{"prompt": "a cube", "settings": []}', "it has no prompt and settings"),
        (b'{"prompt": "\\ud800"}', "surrogates not allowed"),
        (b"[" * 10**5, "recursion"),
        (b"\xff", "not text"),
        (b" " * 2**21, "expected at most 1,048,576"),
    ]:
        path.write_bytes(text)
        with pytest.raises(gr.Error, match=rf"any.json is not a recipe .*{words}.*; expected an image saved by dall3"):
            handler(page, "restore_fields")(str(path))


def test_words_that_the_weights_do_not_know_are_named_with_examples(page):
    hint = handler(page, "hint")
    for prompt in ("a red cube", "", "  ", None):
        assert not hint(prompt, "bundled")["visible"]
    assert not hint("plutonium", "dalle-mega")["visible"]  # not in memory
    said = hint("a cube made of plutonium", "bundled")
    assert said["visible"] and "the words 'plutonium' " in said["value"] and "'a cube made of cloud'" in said["value"]
    assert "no word of the prompt '&lt;xyzzy&gt;' " in hint("<xyzzy>", "bundled")["value"]
    with pytest.raises(gr.Error, match="no word of the prompt 'xyzzy' .* 'a cube made of cloud' or "):
        next(handler(page, "draw")("xyzzy", 0, 1, 1, 2, 0, None, 0.5))


def test_a_call_that_takes_too_long_is_refused_and_not_offered(pipe, monkeypatch):
    steps = lambda pace: ((k, 3000.0) for k in range(8) for _ in pace.stages)  # noqa: E731
    monkeypatch.setattr("dall3.estimate.Pace.denoising", steps)
    for stage, seconds in (("drawing", 600.0), ("ranking", 200.0)):
        monkeypatch.setattr(f"dall3.estimate.Pace.{stage}", lambda pace, seconds=seconds: seconds)
    page = make_page(pipe, Limits(seconds=1800))
    assert handler(page, "offer")(None, 2, 100)[2] is True  # asks for a measurement
    images, candidates = handler(page, "measure")(None, 2, 100)
    assert (candidates["maximum"], candidates["value"]) == (18, 18) and images["maximum"] == 1
    assert candidates["info"].endswith("; 8 take about 13 min") and images["info"].endswith("one takes about 50 min")
    assert "value" not in handler(page, "offer")(None, 1, 8)[1]
    assert handler(page, "offer")(None, 2, 100) == (images, candidates, False)
    words = "this takes about 6.9 h, and the page allows up to 30 min; choose fewer candidates"
    with pytest.raises(gr.Error, match=words):
        list(handler(page, "draw")("a cube", 0, 1, 1, 2, 0, None, 0.5))
    wall = handler(page, "lay_out")("a cube", 0, 1, None, 0.5)  # is not refined
    assert [next(wall)[1] for _ in range(2)][1] == "starting, about 13 min left"


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
        assert '"a cube", 5, 1, 3, 5, 0.0' in ask("restore_fields", file(uploaded), "bundled")
        for other in (path, "http://127.0.0.1:1/a.png", "https://example.com/a.png", uploaded + "/../x", "/etc/passwd"):
            for said in (
                ask("restore_fields", file(other), "bundled"),
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
    updates = list(handler(page, "lay_out")("a red cube", 4, 4, None, 0.5))
    assert updates[2][1].startswith("drawing tokens: 64 of 1024, about ")
    pictures = [update[0]["value"] for update in updates if update[0]["value"] is not None]
    assert pictures and all(picture.width < 300 for picture in pictures)  # one candidate of the four
    forming, said, wall, numbers, refine, drawn = updates[-1]
    assert not forming["visible"] and refine["visible"] and "Select images" in said
    assert [caption for _, caption in wall["value"]] == numbers["choices"] == ["0", "1", "2", "3"]
    toggle = handler(page, "toggle")
    assert toggle(toggle(toggle([], chosen(3)), chosen(1)), chosen(3)) == ["1"]
    updates = list(handler(page, "refine")(drawn, ["3", "1"], 5, 0))
    update = updates[-1]
    assert updates[2][1].startswith("refining, about ") or updates[2][1].startswith("refining: 1 of ")
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
    assert handler(page, "recall")(second[6], None, chosen(2)) == ["a red cube", 3, 1, 1, 5, 0]
    with pytest.raises(gr.Error, match="no such image"):
        handler(page, "recall")(past, None, chosen(5))
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
    assert known["bundled"].here and not known["dalle-mega"].here and known["dalle-mega"].size == "about 8.2 GB"
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
        list(handler(page, "use_weights")("dalle-mega"))


def copy_of_the_bundled_weights(folder, places):
    """Add the set "copy" to those that dall3 knows. places: where the files of the bundled weights are."""
    table = bundled_registry_path().read_text(encoding="utf-8").partition("\n[dall3]\n")[0]
    table = table.replace("[mini", "[copy").replace("package:mini/", places)
    (folder / "weights.toml").write_text(table, encoding="utf-8")
    return str(folder / "weights.toml")


def test_weights_that_do_not_fit_the_memory_are_not_loaded(pipe, tmp_path, monkeypatch):
    monkeypatch.setenv("DALL3_WEIGHTS", copy_of_the_bundled_weights(tmp_path, f"{BUNDLED}/"))
    shelf = Shelf(pipe)
    page = make_page(pipe, shelf=shelf)
    monkeypatch.setattr("dall3.web_weights.free_memory", lambda device: 20_000_000)
    with pytest.raises(
        gr.Error, match="copy need at least 28.6 MB of memory .* and cpu has 20 MB free; choose smaller"
    ):
        list(handler(page, "use_weights")("copy"))
    assert shelf.peek("copy") is None and shelf.peek("bundled") is pipe
    monkeypatch.setattr("dall3.web_weights.free_memory", lambda device: 40_000_000)
    assert [update[2] for update in handler(page, "use_weights")("copy")] == ["loading copy", "loaded copy"]
    assert shelf.peek("copy") is shelf.get("copy") is not pipe


def test_a_missing_gradio_and_an_invalid_limit_are_errors(monkeypatch, capsys):
    assert main(["web", "--max_steps", "0"]) == 2
    assert "steps=0; expected a whole number from 1" in capsys.readouterr().err
    monkeypatch.setitem(__import__("sys").modules, "dall3.web", None)
    assert main(["web"]) == 2
    assert "run pip install 'dall3[web]'" in capsys.readouterr().err


class Watched:
    """The calls of a page: their requests, and how they ended."""

    def __init__(self, monkeypatch):
        self.requests, self.ended, self.finished = [], threading.Event(), 0
        self.may_start = threading.Event()
        self.may_start.set()
        monkeypatch.setattr("dall3.web_handlers.run", self.run)

    def run(self, parts, request):
        self.requests.append(request)
        done = False
        try:
            self.may_start.wait(300)
            output = yield from run(parts, request)
            done, self.finished = True, self.finished + 1
            return output
        finally:
            if not done:
                self.ended.set()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A server that has the set "copy" to download."""
    files = {f"/host/{path.relative_to(BUNDLED)}": path.read_bytes() for path in BUNDLED.rglob("*.*")}
    hub = Hub(files)
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    monkeypatch.setenv("DALL3_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("DALL3_WEIGHTS", copy_of_the_bundled_weights(tmp_path, f"{hub.url}/host/"))
    yield hub
    hub.shutdown()


@pytest.fixture
def tab(pipe):
    """A page in Chromium, as wide as a phone."""
    from playwright.sync_api import sync_playwright

    address = serve(pipe, port=None, limits=Limits(candidates=8), block=False)
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
            page = browser.new_page(viewport={"width": 390, "height": 844})
            page.set_default_timeout(120_000)  # for a busy machine
            asked = []
            page.on("request", lambda request: asked.append(request.url))
            page.goto(address)
            yield page
            assert [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []
            browser.close()
    finally:
        gr.close_all(verbose=False)


@needs_browser
def test_the_page_in_a_browser(tab, tmp_path, monkeypatch):
    from playwright.sync_api import expect

    expect.set_options(timeout=60_000)
    watched, prompt, status = Watched(monkeypatch), tab.locator("#prompt textarea"), tab.locator("#status")
    tab.get_by_role("button", name="an avocado").click()
    expect(prompt).to_have_value("an avocado")
    prompt.fill("a red cube")
    prompt.press("Enter")
    expect(status).to_contain_text("drawing tokens")
    expect(status).to_contain_text(" left")
    expect(tab.locator("#forming img")).to_be_visible()
    expect(status).to_contain_text("done", timeout=600_000)
    expect(tab.locator("#gallery img")).to_have_count(4)
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390
    with tab.expect_download() as download:
        tab.locator("#files a").first.click()
    download.value.save_as(tmp_path / "picture.png")
    assert Dall3Output.load(tmp_path / "picture.png").prompt == "a red cube"

    prompt.fill("xyzzy")
    tab.locator("#draw").click()
    expect(status).to_contain_text("Error")
    expect(status).not_to_contain_text("waiting")
    prompt.fill("a red cube")
    watched.may_start.clear()
    tab.locator("#draw").click()
    expect(status).to_contain_text("starting")
    other = tab.context.browser.new_page()  # a second visitor, while the first one's image is being drawn
    other.goto(tab.url)
    expect(other.get_by_text("; one takes about ")).to_be_visible()
    other.locator("#draw").click()
    expect(other.locator("#status")).to_contain_text("waiting in the queue")
    other.close()
    watched.may_start.set()
    expect(status).to_contain_text("drawing tokens")
    tab.locator("#cancel").click()
    expect(status).to_contain_text("cancelled")
    assert watched.ended.wait(30)

    tab.locator("#lay").click()
    expect(tab.locator("#wall img")).to_have_count(8, timeout=600_000)
    tab.locator("#wall button").nth(5).press("Space")
    expect(tab.locator("#chosen input:checked")).to_have_count(1)
    tab.locator("#refine").press("Enter")
    expect(status).to_contain_text("done", timeout=600_000)
    expect(tab.locator("#gallery img")).to_have_count(2)
    expect(tab.locator("#history img")).to_have_count(3)
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390

    watched.ended.clear()
    tab.locator("#draw").click()
    expect(status).to_contain_text("drawing tokens")
    tab.close()
    assert watched.ended.wait(60)  # closing the tab ends the work too
    assert watched.finished == 1


DROP = """text => {
  const files = new DataTransfer();
  files.items.add(new File([text], "recipe.json", { type: "application/json" }));
  const event = new DragEvent("drop", { dataTransfer: files, bubbles: true, cancelable: true });
  document.querySelector("h1").dispatchEvent(event);
}"""


@needs_browser
def test_hints_recipes_and_the_brush_in_a_browser(pipe, tab, tmp_path, monkeypatch):
    from playwright.sync_api import expect

    expect.set_options(timeout=60_000)
    watched, prompt, status = Watched(monkeypatch), tab.locator("#prompt textarea"), tab.locator("#status")
    prompt.fill("a cube made of plutonium")
    prompt.press("Tab")
    expect(tab.locator("#hint")).to_contain_text("'plutonium'")

    tab.evaluate(DROP, "{}")
    expect(tab.get_by_text("recipe.json is not a recipe")).to_be_visible()
    expect(tab.locator("#recipe input[type=file]")).to_have_count(1)
    small = {"seed": 7, "num_images": 1, "num_candidates": 1, "clip_guidance_scale": 0.0}
    tab.evaluate(DROP, json.dumps({"prompt": "a red cube", **small}))
    expect(prompt).to_have_value("a red cube")
    expect(tab.locator("#hint")).to_be_hidden()
    expect(tab.get_by_label("number input for Candidates")).to_have_value("1")

    Image.new("RGB", (128, 128), "blue").save(tmp_path / "blue.png")
    tab.get_by_role("button", name="Draw a part of an image again").click()
    canvas = tab.locator("#edited canvas").first
    expect(canvas).to_be_visible()
    tab.locator("#edited input[type=file]").first.set_input_files(tmp_path / "blue.png")
    tab.wait_for_timeout(3000)  # until the editor shows it
    tab.get_by_label("Brush").first.click()
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    tab.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    tab.mouse.down()
    tab.mouse.move(box["x"] + box["width"] / 2 + 5, box["y"] + box["height"] / 2, steps=3)
    tab.mouse.up()
    tab.wait_for_timeout(1000)
    tab.locator("#draw").click()
    expect(status).to_contain_text("done", timeout=600_000)
    (request,) = watched.requests
    assert request.seed == 7 and 0 < (request.kept < 0).sum() < 200
    blue = pipe.encode(torch.tensor([0, 0, 1.0])[None, :, None, None].expand(1, 3, 128, 128))[0]
    assert torch.equal(request.kept[request.kept >= 0], blue[request.kept >= 0])

    tab.locator("#gallery button").nth(1).click()
    tab.locator("#vary").click()
    expect(tab.locator("#history img")).to_have_count(2, timeout=600_000)
    assert 90 < (watched.requests[1].kept < 0).sum() < 166  # about a half


@needs_browser
def test_weights_are_fetched_and_loaded_in_a_browser(hub, tab):
    from playwright.sync_api import expect

    expect.set_options(timeout=60_000)

    def choose(field):
        tab.wait_for_timeout(500)  # the end of an animation
        tab.locator(f"{field} input").click()
        tab.locator("[role=option]", has_text="copy,").click()

    tab.get_by_role("button", name="Weights").click()
    choose("#wanted")
    tab.locator("#fetch").click()
    expect(tab.locator("#status")).to_contain_text("fetched copy")
    assert any(path.endswith("upsampler/model.safetensors") for _, path, _ in hub.log)
    choose("#weights")
    expect(tab.locator("#status")).to_contain_text("loaded copy")
