"""`dall3 web`: a web page for the pipeline, built with gradio."""

from __future__ import annotations

import html
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from dall3.diffusion.denoising import Denoising
from dall3.diffusion.schedule import space_timesteps
from dall3.errors import require
from dall3.images import make_grid, read_picture
from dall3.output import Dall3Output, Preview
from dall3.pipeline import Dall3Pipeline
from dall3.request import default_guidance_scale

UPLOAD = "8mb"
LARGEST_SEED = 2**53 - 1  # the largest integer that JavaScript represents exactly
THEME = gr.themes.Soft(
    primary_hue="slate",
    font=["system-ui", "sans-serif"],  # no web fonts: the page works without a network
    font_mono=["ui-monospace", "monospace"],
)
CSS = """
.gradio-container { max-width: 1100px !important; margin: auto; }
#gallery .grid-wrap { max-height: none; }
#status { min-height: 1.6em; }
"""


@dataclass(frozen=True)
class Limits:
    """Upper bounds on the settings of a request. pixels: width times height of an uploaded image."""

    images: int = 8
    candidates: int = 256
    steps: int = 250
    pixels: int = 4096**2


Update = tuple[Any, str, Any, Any]  # new values of the preview, the status, the gallery and the downloads


def open_picture(path: str, limits: Limits) -> Image.Image:
    """Read an uploaded image. Raises ValueError for a file that is not an image or exceeds `limits`."""
    try:
        return read_picture(path, Path(path).name, limits.pixels)
    except OSError as error:
        raise ValueError(f"{Path(path).name}: {error.strerror}; upload it again") from None


class Page(gr.Blocks):
    """Blocks whose events accept only files that were uploaded to this page.

    gradio itself accepts any path in its cache folder, which other programs share, and fetches any http address given
    in place of a file.
    """

    async def preprocess_data(self, block_fn: Any, inputs: list[Any], *args: Any, **kwargs: Any) -> Any:
        """Raise gradio's Error, which the page shows, if an input names any other file."""
        if not paths_in(inputs) <= self.upload_file_set:
            raise gr.Error("the file was not uploaded to this page", title="Upload the file", print_exception=False)
        return await super().preprocess_data(block_fn, inputs, *args, **kwargs)


def paths_in(value: Any) -> set[str]:
    """All paths in an event's inputs, at any depth, in gradio's form {"path": …}."""
    if isinstance(value, dict):
        named = {str(value["path"])} if value.get("path") else set()
        return named.union(*map(paths_in, value.values()))
    return set().union(*map(paths_in, value)) if isinstance(value, list) else set()


class WithoutFetching:
    """ASGI middleware that blocks the gradio routes that fetch an address for a visitor."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        fetches = any(route in scope.get("path", "").lower() for route in ("/file=http", "/proxy="))
        app = PlainTextResponse("this page does not fetch addresses", status_code=403) if fetches else self.app
        await app(scope, receive, send)


# Keyword arguments of the FastAPI application: `app_kwargs` of gradio's `launch` and `mount_gradio_app`.
APP: dict[str, Any] = {"middleware": [Middleware(WithoutFetching)]}


def refusal(error: object, title: str) -> gr.Error:
    """An error to show on the page. The message is escaped, because gradio renders it as HTML."""
    return gr.Error(html.escape(str(error), quote=False), title=title, print_exception=False)


def checked_number(recipe: dict[str, Any], name: str, low: int, high: float, kind: type = int) -> int | float | None:
    """A number from a recipe, or None if it has none. Raises ValueError for another type or a value out of range."""
    value = recipe.get(name)
    if value is None:
        return None
    valid = type(value) in (int, kind) and low <= value <= high
    number = "a whole number" if kind is int else "a number"
    require(valid, f"the recipe's {name} is {str(value)[:40]!r}; expected {number} in [{low}, {high:,}]")
    return value


def limited(value: int | float | None, bound: int) -> int | float | None:
    return None if value is None else min(value, bound)


def status_text(preview: Preview) -> str:
    texts = {"drawing": "drawing tokens", "ranking": "ranking the candidates", "refining": "refining", "done": "done"}
    return f"{texts[preview.stage]}: {preview.step} of {preview.total}" if preview.total > 1 else texts[preview.stage]


def show_output(out: Dall3Output, folder: str) -> tuple[list[tuple[str, str]], list[str]]:
    """The gallery, with each image before and after diffusion, and the files to download, which contain recipes."""
    saved = out.save(Path(folder) / "pictures")
    gallery, files = [], []
    for i, caption in enumerate(out.captions()):
        after, before = saved / f"{i}.png", saved / f"{i}-coarse.png"
        gallery += [(str(before), "before")] * before.exists() + [(str(after), f"after: {caption}")]
        files.append(str(after))
    return gallery, files


def make_page(pipe: Dall3Pipeline, limits: Limits = Limits()) -> gr.Blocks:
    """The page of a pipeline as gradio Blocks, to be launched, or mounted in another application.

    One request runs at a time; others wait in a queue. The cancel button, or closing the tab, stops the work at its
    next step.

    >>> isinstance(make_page(Dall3Pipeline.from_pretrained()), gr.Blocks)
    True

    When it is mounted, give the application the middleware of `APP`, so that it fetches no addresses for visitors.
    """

    def shown(value: Any) -> Any:
        return gr.update(value=value, visible=True)

    hidden = gr.update(value=None, visible=False)

    def draw(
        prompt: str,
        seed: float | None,
        images: float,
        candidates: float,
        steps: float,
        guidance: float,
        start: str | None,
        change: float,
    ) -> Iterator[Update]:
        try:
            require(bool(prompt and prompt.strip()), "the prompt is empty; enter a text")
            for name, value, most in (
                ("images", images, limits.images),
                ("candidates", candidates, limits.candidates),
                ("steps", steps, limits.steps),
                ("CLIP guidance", guidance, most_guidance),
            ):
                require(value <= most, f"{value:g} {name}; this page allows up to {most}")
            settings: dict[str, Any] = dict(num_candidates=int(candidates), seed=None if seed is None else int(seed))
            settings |= dict(progress=False)
            if refines:
                settings |= dict(clip_guidance_scale=float(guidance))
                if int(steps) != default_count:  # the default may be uneven, such as "10,10,5"
                    settings |= dict(num_inference_steps=int(steps))
            if start:
                settings |= dict(init_image=open_picture(start, limits), change=float(change))
            previews = pipe.stream(prompt.strip(), int(images), **settings)
            with tempfile.TemporaryDirectory() as folder:
                for preview in previews:
                    if preview.output is not None:
                        gallery, files = show_output(preview.output, folder)
                        yield hidden, status_text(preview), shown(gallery), shown(files)
                    else:
                        yield shown(make_grid([preview.images], 256)), status_text(preview), hidden, hidden
        except (ValueError, TypeError, OverflowError) as error:
            raise refusal(error, "Invalid request") from None

    def read_recipe(path: str) -> list[Any]:
        """Field values from the recipe in a PNG; fields that the recipe lacks are unchanged."""
        try:
            open_picture(path, limits)
            out = Dall3Output.load(path)
            how = dict(out.settings)
            if isinstance(how.get("num_inference_steps"), str):  # such as "10,10,5"
                if how["num_inference_steps"] == default_steps:
                    how["num_inference_steps"] = default_count
                else:
                    if pipe.upsampler is not None:
                        space_timesteps(pipe.upsampler.config.diffusion.diffusion_steps, how["num_inference_steps"])
                    gr.Warning("The recipe has unevenly spaced denoising steps, which this page does not support.")
                    del how["num_inference_steps"]
            seed = checked_number(how, "seed", 0, LARGEST_SEED)
            require(seed is not None, "the recipe has no seed")
            counts = [
                limited(checked_number(how, name, 1, 2**20), most)
                for name, most in (
                    ("num_images", limits.images),
                    ("num_candidates", limits.candidates),
                    ("num_inference_steps", limits.steps),
                )
            ]
            scale = checked_number(how, "clip_guidance_scale", 0, most_guidance, float)
        except (ValueError, OSError) as error:
            raise refusal(str(error).replace(str(path), Path(path).name), "No recipe") from None
        return [out.prompt, *(gr.update() if value is None else value for value in (seed, *counts, scale))]

    refines = pipe.upsampler is not None
    guides = refines and pipe.clip_or_loader is not None
    default_steps = pipe.defaults.get("num_inference_steps", Denoising.num_inference_steps)
    default_count = 1
    if pipe.upsampler is not None:
        default_count = len(space_timesteps(pipe.upsampler.config.diffusion.diffusion_steps, default_steps))
    default_guidance = default_guidance_scale(pipe)
    most_guidance = max(5000, default_guidance)
    with Page(title="dall3", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.Markdown("# dall3")
        with gr.Row(equal_height=False):
            with gr.Column(min_width=320):
                prompt = gr.Textbox(label="Prompt", value="a cube made of cloud", lines=2, elem_id="prompt")
                with gr.Row():
                    go = gr.Button("Draw", variant="primary", elem_id="draw", min_width=120)
                    cancel = gr.Button("Cancel", elem_id="cancel", min_width=120)
                images = gr.Slider(1, limits.images, 2, step=1, label="Images")
                candidates = gr.Slider(
                    1, limits.candidates, 8, step=1, label="Candidates", info="images drawn; CLIP keeps the best"
                )
                seed = gr.Number(label="Seed", value=0, precision=0, minimum=0, info="equal seeds give equal images")
                with gr.Accordion("More", open=False):
                    count = min(default_count, limits.steps)
                    steps = gr.Slider(1, limits.steps, count, step=1, label="Denoising steps", visible=refines)
                    guidance = gr.Slider(
                        0,
                        most_guidance,
                        default_guidance,
                        step=50,
                        label="CLIP guidance",
                        info="strength of the guidance towards the prompt; 0 turns it off and is faster",
                        visible=guides,
                    )
                    start = gr.File(label=f"An image to vary, up to {UPLOAD}", file_types=["image"], height=110)
                    change = gr.Slider(0.05, 1, 0.5, step=0.05, label="Fraction of its tokens to draw again")
                    recipe = gr.File(
                        label="An image of this page, to restore its settings", file_types=[".png"], height=110
                    )
            with gr.Column(min_width=320):
                status = gr.Markdown("", elem_id="status")
                plain: dict[str, Any] = dict(show_label=False, interactive=False, visible=False)
                forming = gr.Image(elem_id="forming", buttons=[], format="png", **plain)
                gallery = gr.Gallery(columns=2, elem_id="gallery", object_fit="contain", height="auto", **plain)
                files = gr.File(
                    label="Download, with the recipe", file_count="multiple", visible=False, elem_id="files"
                )
        fields = [prompt, seed, images, candidates, steps, guidance]
        event: dict[str, Any] = dict(inputs=[*fields, start, change], outputs=[forming, status, gallery, files])
        runs: list[Any] = [trigger(draw, **event, show_progress="hidden") for trigger in (go.click, prompt.submit)]
        # Set the status after the run has ended; otherwise its last progress update would replace it.
        ended = cancel.click(lambda: None, cancels=runs, queue=False)
        ended.then(lambda: (hidden, "cancelled"), None, [forming, status], queue=False)
        recipe.upload(read_recipe, recipe, fields)
    page.queue(default_concurrency_limit=1, max_size=64)
    return page


def serve(
    pipe: Dall3Pipeline, host: str = "127.0.0.1", port: int | None = 7860, limits: Limits = Limits(), block: bool = True
) -> str:
    """Serve the page of a pipeline and return its address.

    host: the address to listen on; other machines can reach the page only if it is not a loopback address. port: None
    for the first free port from 7860. block: return only when the server stops. Raises OSError for a port in use.
    """
    page = make_page(pipe, limits)
    how: dict[str, Any] = dict(server_name=host, server_port=port, share=False, quiet=True, show_error=True)
    how |= dict(max_file_size=UPLOAD, footer_links=[], theme=THEME, css=CSS, ssr_mode=False, run_history=False)
    how |= dict(app_kwargs=APP)
    _, address, _ = page.launch(**how, prevent_thread_lock=True)
    if block:
        print(f"dall3 is at {address}", flush=True)
        page.block_thread()
    return address
