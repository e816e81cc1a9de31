"""What the page does: draw, lay out a wall, refine, vary, read recipes and change weights, as gradio event handlers."""

from __future__ import annotations

import html
import secrets
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr
from PIL import Image

from dall3.diffusion.denoising import Denoising
from dall3.diffusion.schedule import space_timesteps
from dall3.errors import require
from dall3.estimate import Pace, time_text
from dall3.formatting import size_text
from dall3.generate import WithResult, run
from dall3.images import make_grid
from dall3.output import Dall3Output
from dall3.pipeline import Dall3Pipeline
from dall3.request import default_guidance_scale, example_prompt, make_request
from dall3.wall import draw_wall, make_draw_request, refine_wall, request_of_wall
from dall3.web_progress import Steps, follow, pace_of_wall
from dall3.web_uploads import LARGEST_SEED, Limits, checked_number, open_upload, read_mask, read_uploaded_recipe
from dall3.web_weights import Shelf

REMEMBERED = 24  # images in the history of a session
THUMB = 128  # pixels
MEASURED = 8  # number of candidates for which the page states the drawing time
REFUSED = (ValueError, TypeError, IndexError, OverflowError, OSError)  # errors whose message the page shows


def page_error(error: object, title: str) -> gr.Error:
    """An error to show on the page. The message is escaped, because gradio renders it as HTML."""
    return gr.Error(html.escape(str(error), quote=False), title=title, print_exception=False)


def limited(value: int | float | None, bound: int) -> int | float | None:
    return None if value is None else min(value, bound)


def show_output(out: Dall3Output, folder: str) -> tuple[list[tuple[str, str]], list[str]]:
    """The gallery, with each image before and after diffusion, and the files to download, which contain recipes."""
    saved = out.save(Path(folder) / "pictures")
    gallery, files = [], []
    for i, caption in enumerate(out.captions()):
        after, before = saved / f"{i}.png", saved / f"{i}-coarse.png"
        gallery += [(str(before), "before")] * before.exists() + [(str(after), f"after: {caption}")]
        files.append(str(after))
    return gallery, files


class Facts(NamedTuple):
    """What the controls show for a pipeline."""

    refines: bool
    guides: bool
    default_steps: int | str
    default_count: int
    default_guidance: float
    most_guidance: float


def facts_of(pipe: Dall3Pipeline) -> Facts:
    steps, count = pipe.defaults.get("num_inference_steps", Denoising.num_inference_steps), 1
    if pipe.upsampler is not None:
        count = len(space_timesteps(pipe.upsampler.config.diffusion.diffusion_steps, steps))
    guidance = default_guidance_scale(pipe)
    refines = pipe.upsampler is not None
    return Facts(refines, refines and pipe.clip_or_loader is not None, steps, count, guidance, max(5000, guidance))


class Offer(NamedTuple):
    """Bounds of the controls for some weights, from the time limit, and descriptions with measured times."""

    images: int
    candidates: int
    about_images: str
    about_candidates: str


class Past(NamedTuple):
    """An image of the session: a thumbnail, its caption, and the fields that made it."""

    image: Image.Image
    caption: str
    fields: tuple[Any, ...]


class Drawn(NamedTuple):
    """A wall, or an output, with the name of the weights that drew it."""

    weights: str
    result: Any  # a Wall or a Dall3Output


# New values of the forming image, the status, the gallery, the downloads, the button that varies, the last output, the
# history's entries and its thumbnails.
Update = tuple[Any, str, Any, Any, Any, Drawn | None, list[Past], Any]
HIDDEN, SAME = gr.update(value=None, visible=False), gr.update()
CLOSED, OPEN = gr.update(visible=False), gr.update(visible=True)


def shown(value: Any, **more: Any) -> Any:
    return gr.update(value=value, visible=True, **more)


def bounded(value: float, most: int, info: str) -> Any:
    """A slider's new maximum and description. Its value changes only if it is above the maximum."""
    changed: dict[str, Any] = dict(value=most) if value > most else {}
    return gr.update(maximum=most, info=info, **changed)


class Handlers:
    """The event handlers of a page. Every value that they get may come from a stranger."""

    def __init__(self, shelf: Shelf, limits: Limits) -> None:
        self.shelf, self.limits = shelf, limits
        self.offers: dict[str, Offer] = {}  # of the weights that have been measured, by their name

    def most_of(self, weights: str | None) -> tuple[int, int]:
        """The upper bounds of the images and the candidates."""
        offer = self.offers.get(weights or self.shelf.own)
        return (self.limits.images, self.limits.candidates) if offer is None else (offer.images, offer.candidates)

    def check(self, facts: Facts, prompt: str, **values: float) -> None:
        """Raise ValueError for an empty prompt and for values above the limits."""
        require(bool(prompt and prompt.strip()), "the prompt is empty; enter a text")
        limits = self.limits
        bounds = dict(images=limits.images, candidates=limits.candidates, steps=limits.steps)
        names = {"guidance": "CLIP guidance"}
        for name, value in values.items():
            most = facts.most_guidance if name == "guidance" else bounds[name]
            require(value <= most, f"{value:g} {names.get(name, name)}; this page allows up to {most}")

    def denoising(self, facts: Facts, steps: float, guidance: float) -> dict[str, Any]:
        """The settings of the refinement that differ from the weights' own."""
        if not facts.refines:
            return {}
        settings: dict[str, Any] = dict(clip_guidance_scale=float(guidance))
        if int(steps) != facts.default_count:  # the default may be uneven, such as "10,10,5"
            settings["num_inference_steps"] = int(steps)
        return settings

    def starting(self, start: str | None, change: float, edited: dict[str, Any] | None) -> dict[str, Any]:
        """The settings of an image to start from: one with a painted region, or one to vary."""
        layers = (edited or {}).get("layers") or []
        if edited and edited.get("background") and layers:
            image = open_upload(edited["background"], self.limits)
            painted = read_mask(layers[0], self.limits)
            if painted.getbbox() is not None:
                return dict(init_image=image, mask_image=painted.resize(image.size))
        return dict(init_image=open_upload(start, self.limits), change=float(change)) if start else {}

    def draw(
        self,
        prompt: str,
        seed: float | None,
        images: float,
        candidates: float,
        steps: float,
        guidance: float,
        start: str | None,
        change: float,
        edited: dict[str, Any] | None = None,
        weights: str | None = None,
        past: list[Past] | None = None,
    ) -> Iterator[Update]:
        """Draw images of a prompt."""
        try:
            pipe = self.shelf.get(weights or self.shelf.own)
            facts = facts_of(pipe)
            self.check(facts, prompt, images=images, candidates=candidates, steps=steps, guidance=guidance)
            settings: dict[str, Any] = dict(seed=None if seed is None else int(seed), progress=False)
            settings |= self.denoising(facts, steps, guidance) | self.starting(start, change, edited)
            request = make_request(pipe, prompt.strip(), int(images), int(candidates), **settings)
            fields = (int(images), int(candidates), int(steps), float(guidance))
            shown_steps = follow(Pace(pipe, request), run(pipe, request), self.limits)
            yield from self.show(shown_steps, weights or self.shelf.own, fields, past or [])
        except REFUSED as error:
            raise page_error(error, "Invalid request") from None

    def vary(
        self,
        prompt: str,
        seed: float | None,
        images: float,
        steps: float,
        guidance: float,
        change: float,
        last: Drawn | None,
        selected: int | None,
        past: list[Past] | None = None,
    ) -> Iterator[Update]:
        """Draw variations of the selected image of the last output."""
        try:
            require(last is not None, "there is no image to vary; draw one first")
            assert last is not None
            pipe, out = self.shelf.get(last.weights), last.result
            facts = facts_of(pipe)
            self.check(facts, prompt, images=images, steps=steps, guidance=guidance)
            number = min(max(int(selected or 0), 0), len(out) - 1)
            settings: dict[str, Any] = dict(init_image=out.tokens[number], change=float(change), progress=False)
            settings |= dict(seed=None if seed is None else int(seed)) | self.denoising(facts, steps, guidance)
            request = make_request(pipe, prompt.strip(), int(images), **settings)
            fields = (int(images), int(images), int(steps), float(guidance))
            shown_steps = follow(Pace(pipe, request), run(pipe, request), self.limits)
            yield from self.show(shown_steps, last.weights, fields, past or [])
        except REFUSED as error:
            raise page_error(error, "Invalid request") from None

    def lay_out(
        self,
        prompt: str,
        seed: float | None,
        candidates: float,
        start: str | None,
        change: float,
        edited: dict[str, Any] | None = None,
        weights: str | None = None,
    ) -> Iterator[tuple[Any, str, Any, Any, Any, Drawn | None]]:
        """Draw a wall: yields the forming image, the status, the thumbnails, the numbers, the button and the wall."""
        try:
            pipe = self.shelf.get(weights or self.shelf.own)
            self.check(facts_of(pipe), prompt, candidates=candidates)
            settings: dict[str, Any] = dict(seed=None if seed is None else int(seed), progress=False)
            settings |= self.starting(start, change, edited)
            request = make_draw_request(pipe, prompt.strip(), int(candidates), **settings)
            request = replace(request, num_images=1)  # so that a preview decodes one image
            updates = WithResult(follow(pace_of_wall(pipe, request), draw_wall(pipe, request), self.limits))
            for status, preview in updates:
                picture = HIDDEN if preview is None else shown(make_grid([preview.images[:1]], 256))
                yield picture, status, HIDDEN, HIDDEN, CLOSED, None
            wall = updates.result
            numbers = [str(number) for number in wall.numbers]
            thumbs = [(image, number) for image, number in zip(wall.images, numbers, strict=True)]
            told = "Select images below, then refine them."
            drawn = Drawn(weights or self.shelf.own, wall)
            yield HIDDEN, told, shown(thumbs), shown([], choices=numbers), OPEN, drawn
        except REFUSED as error:
            raise page_error(error, "Invalid request") from None

    def refine(
        self,
        drawn: Drawn | None,
        numbers: list[str] | None,
        steps: float,
        guidance: float,
        past: list[Past] | None = None,
    ) -> Iterator[Update]:
        """Refine the chosen images of a wall."""
        try:
            require(drawn is not None, "there is no wall; draw one first")
            require(bool(numbers), "no image is chosen; select one on the wall")
            assert drawn is not None and numbers
            pipe = self.shelf.get(drawn.weights)
            facts = facts_of(pipe)
            self.check(facts, drawn.result.prompt, images=len(numbers), steps=steps, guidance=guidance)
            wall = drawn.result[[int(number) for number in numbers]]
            request = request_of_wall(pipe, wall, progress=False, **self.denoising(facts, steps, guidance))
            fields = (len(wall), request.num_candidates, int(steps), float(guidance))
            shown_steps = follow(Pace(pipe, request), refine_wall(pipe, wall, request), self.limits, drawn=True)
            yield from self.show(shown_steps, drawn.weights, fields, past or [])
        except REFUSED as error:
            raise page_error(error, "Invalid request") from None

    def show(
        self, steps: Steps[Dall3Output], weights: str, fields: tuple[Any, ...], past: list[Past]
    ) -> Iterator[Update]:
        """The updates of the page for the steps of a call (`follow`)."""
        updates = WithResult(steps)
        for status, preview in updates:
            picture = HIDDEN if preview is None else shown(make_grid([preview.images], 256))
            yield picture, status, HIDDEN, HIDDEN, CLOSED, None, past, SAME
        out = updates.result
        with tempfile.TemporaryDirectory() as folder:
            gallery, files = show_output(out, folder)
            past = [*remembered(out, fields), *past][:REMEMBERED]
            history = shown([(one.image, one.caption) for one in past])
            yield HIDDEN, "done", shown(gallery), shown(files), OPEN, Drawn(weights, out), past, history

    def offer(self, weights: str | None, images: float, candidates: float) -> tuple[Any, Any, Any]:
        """The bounds of the images and the candidates, and whether these weights have to be measured first."""
        offer = self.offers.get(weights or self.shelf.own)
        if offer is None:
            return SAME, SAME, True
        shown_images = bounded(images, offer.images, offer.about_images)
        return shown_images, bounded(candidates, offer.candidates, offer.about_candidates), False

    def measure(self, weights: str | None, images: float, candidates: float) -> tuple[Any, Any]:
        """Measure how fast these weights draw. Returns the bounds that keep the time limit."""
        name, limits = weights or self.shelf.own, self.limits
        count = min(MEASURED, limits.candidates)
        try:
            pipe = self.shelf.get(name)
            pace = Pace(pipe, make_request(pipe, example_prompt(pipe), count, count, picked=True, progress=False))
            drawing, one = pace.drawing() + pace.ranking(), pace.refining() / count
        except REFUSED:
            return SAME, SAME
        bounds = (limits.images, one), (limits.candidates, drawing / count)
        kept, drawn = (max(min(most, int(limits.seconds / max(each, 1e-9))), 1) for most, each in bounds)
        about_images = f"images kept; one takes {time_text(one)}" if pace.stages else "images kept"
        about_candidates = f"images drawn; CLIP or you keep the best; {count} take {time_text(drawing)}"
        self.offers[name] = Offer(kept, drawn, about_images, about_candidates)
        return self.offer(weights, images, candidates)[:2]

    def hint(self, prompt: str, weights: str | None = None) -> Any:
        """The hint below the prompt: why these weights cannot draw it, or the words that they do not know."""
        pipe = self.shelf.peek(weights or self.shelf.own)
        encode = None if pipe is None else pipe.text_encoder
        if encode is None or not prompt or not prompt.strip():
            return HIDDEN
        try:
            encode.check(prompt)
            unknown = ", ".join(map(repr, encode.unknown_words(prompt)[:10]))
        except REFUSED as error:
            return shown(html.escape(str(error), quote=False))
        words = (
            f"These weights were trained without the words {unknown} and draw something else for them. They can draw "
        )
        return shown(html.escape(f"{words}{encode.examples()}.", quote=False)) if unknown else HIDDEN

    def restore_fields(self, path: str, weights: str | None = None) -> list[Any]:
        """Field values from an image or a JSON file of dall3; fields that it lacks are unchanged."""
        pipe = self.shelf.peek(weights or self.shelf.own) or self.shelf.pipe
        try:
            facts = facts_of(pipe)
            prompt, how = read_uploaded_recipe(path, self.limits)
            if isinstance(how.get("num_inference_steps"), str):  # such as "10,10,5"
                if how["num_inference_steps"] == facts.default_steps:
                    how["num_inference_steps"] = facts.default_count
                else:
                    if pipe.upsampler is not None:
                        space_timesteps(pipe.upsampler.config.diffusion.diffusion_steps, how["num_inference_steps"])
                    gr.Warning("The recipe has unevenly spaced denoising steps, which this page does not support.")
                    del how["num_inference_steps"]
            seed = checked_number(how, "seed", 0, LARGEST_SEED)
            require(seed is not None, "the recipe has no seed")
            names = ("num_images", "num_candidates", "num_inference_steps")
            bounds = (*self.most_of(weights), self.limits.steps)
            counts = [
                limited(checked_number(how, name, 1, 2**20), most) for name, most in zip(names, bounds, strict=True)
            ]
            scale = checked_number(how, "clip_guidance_scale", 0, facts.most_guidance, float)
        except REFUSED as error:
            raise page_error(error, "No recipe") from None
        if how.get("kept") is not None:
            gr.Warning("The image was made from another image, which the page does not restore.")
        return [prompt, *(SAME if value is None else value for value in (seed, *counts, scale))]

    def recall(self, past: list[Past], weights: str | None, event: gr.SelectData) -> list[Any]:
        """Field values of an image of the history, within the bounds of the weights."""
        if not isinstance(event.index, int) or not 0 <= event.index < len(past):
            raise page_error("the history has no such image", "No image")
        facts = facts_of(self.shelf.peek(weights or self.shelf.own) or self.shelf.pipe)
        prompt, seed, *values = past[event.index].fields
        bounds = (*self.most_of(weights), self.limits.steps, facts.most_guidance)
        return [prompt, seed, *(min(value, most) for value, most in zip(values, bounds, strict=True))]

    def toggle(self, numbers: list[str] | None, event: gr.SelectData) -> list[str]:
        """The chosen numbers after a click on an image of the wall."""
        number, chosen = str(event.index), list(numbers or [])
        return [one for one in chosen if one != number] if number in chosen else [*chosen, number]

    def select(self, last: Drawn | None, event: gr.SelectData) -> int:
        """The place of the image that is selected in the gallery, which shows each before and after diffusion."""
        if last is None or not isinstance(event.index, int):
            return 0
        out: Dall3Output = last.result
        both = len(out.coarse_images) == len(out) and out.images is not out.coarse_images
        return event.index // 2 if both else event.index

    def next_seed(self, seed: float | None, locked: bool) -> float | None:
        """The seed of the next call: the same if it is locked, else a random one."""
        return seed if locked else secrets.randbelow(2**32)

    def use_weights(self, name: str) -> Iterator[tuple[Any, Any, str]]:
        """Load weights: yields new values of the steps and the guidance, and the status."""
        told = html.escape(str(name), quote=False)
        yield SAME, SAME, f"loading {told}"
        try:
            facts = facts_of(self.shelf.get(name))
        except REFUSED as error:
            raise page_error(error, "Not loaded") from None
        steps = gr.update(value=min(facts.default_count, self.limits.steps), visible=facts.refines)
        guidance = gr.update(value=facts.default_guidance, maximum=facts.most_guidance, visible=facts.guides)
        yield steps, guidance, f"loaded {told}"

    def fetch(self, name: str | None) -> Iterator[tuple[str, Any, Any]]:
        """Download weights: yields the status, and at the end the new choices of both lists."""
        try:
            require(bool(name), "choose the weights to fetch first")
            for here, whole in self.shelf.fetch(str(name)):
                of_all = f" of {size_text(whole)}" if whole > here else ""
                yield f"fetching {name}: {size_text(here)}{of_all}", SAME, SAME
        except REFUSED as error:
            raise page_error(error, "Not fetched") from None
        present, absent = weight_choices(self.shelf)
        yield f"fetched {name}", gr.update(choices=present), gr.update(choices=absent, value=None)


def weight_choices(shelf: Shelf) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Labels and names of the weights that are here, and of those that can be fetched."""
    here: list[tuple[str, str]] = []
    absent: list[tuple[str, str]] = []
    for one in shelf.choices():
        size = f", {one.size}" if one.size else ""
        (here if one.here else absent).append((f"{one.name}{size}: {one.about}", one.name))
    return here, absent


def remembered(out: Dall3Output, fields: tuple[Any, ...]) -> list[Past]:
    """The entries of the history for an output. fields: those besides the prompt and the seed."""
    seed, entries = out.settings["seed"], []
    for image, caption in zip(out.to_pil(), out.captions(), strict=True):
        thumb = image.copy()
        thumb.thumbnail((THUMB, THUMB))
        entries.append(Past(thumb, f"{out.prompt}, {caption}", (out.prompt, min(seed, LARGEST_SEED), *fields)))
    return entries
