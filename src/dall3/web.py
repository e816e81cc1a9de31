"""`dall3 web`: a web page for the pipeline, built with gradio."""

from __future__ import annotations

import ipaddress
import json
from typing import Any

import gradio as gr
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from dall3.pipeline import Dall3Pipeline
from dall3.text.rules import MAX_CHARACTERS
from dall3.web_handlers import HIDDEN, Handlers, facts_of, weight_choices
from dall3.web_uploads import Limits
from dall3.web_weights import Shelf

__all__ = ["APP", "Limits", "make_page", "serve"]

UPLOAD = "8mb"
LIMITS = Limits()
EXAMPLES = ("a cube made of cloud", "an avocado", "a fox", "a rocket", "an egg made of water", "a red apple")
THEME = gr.themes.Soft(
    primary_hue="slate",
    font=["system-ui", "sans-serif"],  # no web fonts: the page works without a network
    font_mono=["ui-monospace", "monospace"],
)
CSS = """
.gradio-container { max-width: 1100px !important; margin: auto; }
#gallery .grid-wrap, #wall .grid-wrap, #history .grid-wrap { max-height: none; min-height: 0; }
#status { min-height: 1.6em; }
#wall .grid-container { grid-template-columns: repeat(auto-fill, minmax(84px, 1fr)) !important; }
#history .grid-container { grid-template-columns: repeat(auto-fill, minmax(64px, 1fr)) !important; }
#history .grid-wrap { padding-top: 32px; }
#history .caption-label { display: none; }
#hint { font-size: 0.9em; }
#lay { white-space: nowrap; padding-left: 4px; padding-right: 4px; }
@media (max-width: 480px) { #draw, #lay, #cancel { font-size: 0.85rem; } }
#recipe .icon-wrap { display: none; }
:focus-visible { outline: 2px solid #64748b !important; outline-offset: 2px; }
#gallery .caption-label { white-space: normal; }
#examples { gap: 6px; flex-wrap: wrap; }
#examples button { flex: 0 0 auto; width: auto; min-width: 0; white-space: nowrap; }
"""
# A file that is dropped anywhere on the page goes to the field for recipes. Without this, the browser would open it.
DROP = """() => {
  const hasFiles = (event) => [...event.dataTransfer.types].includes("Files");
  document.addEventListener("dragover", (event) => { if (hasFiles(event)) event.preventDefault(); });
  document.addEventListener("drop", (event) => {
    if (event.defaultPrevented || !hasFiles(event)) return;  // another field has taken it, or it is text
    event.preventDefault();
    const field = document.querySelector("#recipe input[type=file]");
    if (!field || !event.dataTransfer.files.length) return;
    const first = new DataTransfer();
    first.items.add(event.dataTransfer.files[0]);
    field.files = first.files;
    field.dispatchEvent(new Event("change", { bubbles: true }));
  });
}"""


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


def make_page(pipe: Dall3Pipeline, limits: Limits = LIMITS, shelf: Shelf | None = None) -> gr.Blocks:
    """The page of a pipeline as gradio Blocks, to be launched, or mounted in another application.

    shelf: the weights that visitors may choose among (default: those of the pipeline only).

    One request runs at a time; others wait in a queue. The cancel button, or closing the tab, stops the work at its
    next step.

    >>> isinstance(make_page(Dall3Pipeline.from_pretrained()), gr.Blocks)
    True

    When it is mounted, give the application the middleware of `APP`, so that it fetches no addresses for visitors.
    """
    chooses, shelf = shelf is not None, shelf or Shelf(pipe)
    act, facts = Handlers(shelf, limits), facts_of(pipe)
    here, absent = weight_choices(shelf) if chooses else ([(shelf.own, shelf.own)], [])
    with Page(title="dall3", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.Markdown("# dall3")
        past, drawn, last, selected = gr.State([]), gr.State(None), gr.State(None), gr.State(0)
        unmeasured = gr.State(False)
        with gr.Row(equal_height=False):
            with gr.Column(min_width=320):
                prompt = gr.Textbox(
                    label="Prompt", value=EXAMPLES[0], lines=1, max_lines=4, max_length=MAX_CHARACTERS, elem_id="prompt"
                )
                hint = gr.HTML(visible=False, elem_id="hint")
                with gr.Row(elem_id="examples"):
                    examples = [gr.Button(text, size="sm") for text in EXAMPLES]
                with gr.Row():
                    go = gr.Button("Draw", variant="primary", elem_id="draw", min_width=90)
                    lay = gr.Button("Draw a wall", elem_id="lay", min_width=90)
                    cancel = gr.Button("Cancel", elem_id="cancel", min_width=90)
                images = gr.Slider(1, limits.images, 2, step=1, label="Images", info="images kept")
                candidates = gr.Slider(
                    1, limits.candidates, 8, step=1, label="Candidates", info="images drawn; CLIP or you keep the best"
                )
                with gr.Row():
                    seed = gr.Number(label="Seed", value=0, precision=0, minimum=0, min_width=140)
                    locked = gr.Checkbox(
                        True, label="Keep the seed", info="equal seeds give equal images", min_width=140
                    )
                with gr.Accordion("Weights", open=False, visible=chooses):
                    weights = gr.Dropdown(here, value=shelf.own, label="Draw with", elem_id="weights")
                    with gr.Column(visible=bool(absent) and shelf.fetching):
                        wanted = gr.Dropdown(absent, value=None, label="Not on this machine", elem_id="wanted")
                        fetch = gr.Button("Fetch", size="sm", elem_id="fetch")
                with gr.Accordion("More", open=False):
                    count = min(facts.default_count, limits.steps)
                    steps = gr.Slider(1, limits.steps, count, step=1, label="Denoising steps", visible=facts.refines)
                    guidance = gr.Slider(
                        0,
                        facts.most_guidance,
                        facts.default_guidance,
                        step=50,
                        label="CLIP guidance",
                        info="strength of the guidance towards the prompt; 0 turns it off and is faster",
                        visible=facts.guides,
                    )
                    change = gr.Slider(0.05, 1, 0.5, step=0.05, label="Fraction of an image's tokens to draw again")
                    start = gr.File(label=f"An image to vary, up to {UPLOAD}", file_types=["image"], height=110)
                with gr.Accordion("Draw a part of an image again", open=False):
                    gr.Markdown("Upload an image and paint over the part.")
                    edited = gr.ImageEditor(
                        show_label=False,
                        type="filepath",
                        sources=["upload"],
                        transforms=(),
                        layers=False,
                        brush=gr.Brush(default_size=40, colors=["#ffffff"], color_mode="fixed"),
                        format="png",
                        height=340,
                        elem_id="edited",
                    )
                recipe = gr.File(
                    label="Recipe: drop a PNG or JSON", file_types=[".png", ".json"], height=120, elem_id="recipe"
                )
            with gr.Column(min_width=320):
                status = gr.Markdown("", elem_id="status")
                plain: dict[str, Any] = dict(show_label=False, interactive=False, visible=False)
                forming = gr.Image(elem_id="forming", buttons=[], format="png", **plain)
                wall = gr.Gallery(
                    columns=4, elem_id="wall", height="auto", allow_preview=False, buttons=[], format="png", **plain
                )
                chosen = gr.CheckboxGroup([], label="Chosen", visible=False, elem_id="chosen")
                refine = gr.Button("Refine the chosen", variant="primary", visible=False, elem_id="refine")
                gallery = gr.Gallery(columns=2, elem_id="gallery", object_fit="contain", height="auto", **plain)
                vary = gr.Button("Vary the selected image", visible=False, elem_id="vary")
                files = gr.File(
                    label="Download, with the recipe", file_count="multiple", visible=False, elem_id="files"
                )
                small: dict[str, Any] = dict(
                    columns=6, fit_columns=False, height="auto", allow_preview=False, buttons=[]
                )
                history = gr.Gallery(label="This session", elem_id="history", interactive=False, visible=False, **small)
        fields = [prompt, seed, images, candidates, steps, guidance]
        results = [forming, status, gallery, files, vary, last, past, history]
        origin, quiet = [start, change, edited, weights], dict[str, Any](show_progress="hidden")
        new_seed: dict[str, Any] = dict(fn=act.next_seed, inputs=[seed, locked], outputs=seed, queue=False)
        work: dict[str, Any] = dict(show_progress="hidden", concurrency_id="work")  # one at a time
        waiting: dict[str, Any] = dict(fn=None, outputs=status, js="() => 'waiting in the queue'")
        runs: list[Any] = [
            trigger(**waiting).then(**new_seed).then(act.draw, [*fields, *origin, past], results, **work)
            for trigger in (go.click, prompt.submit)
        ]
        laid = [forming, status, wall, chosen, refine, drawn]
        walled = [prompt, seed, candidates, *origin]
        runs.append(lay.click(**waiting).then(**new_seed).then(act.lay_out, walled, laid, **work))
        refined = [drawn, chosen, steps, guidance, past]
        runs.append(refine.click(**waiting).then(act.refine, refined, results, **work))
        varied = [prompt, seed, images, steps, guidance, change, last, selected, past]
        runs.append(vary.click(**waiting).then(**new_seed).then(act.vary, varied, results, **work))
        runs.append(fetch.click(act.fetch, wanted, [status, weights, wanted], **quiet))
        # Set the status after the run has ended; otherwise its last progress update would replace it.
        stopped = cancel.click(lambda: None, cancels=runs, queue=False)
        stopped.then(lambda: (HIDDEN, "cancelled"), None, [forming, status], queue=False)
        wall.select(act.toggle, chosen, chosen, queue=False)
        gallery.select(act.select, last, selected, queue=False)
        loaded = weights.input(**waiting).then(act.use_weights, weights, [steps, guidance, status], **work)
        for run in (*runs, loaded):
            run.failure(None, None, status, js="() => ''")
        at_once: dict[str, Any] = dict(concurrency_limit=None, **quiet)  # does not wait for the work of others
        restored = recipe.upload(act.restore_fields, [recipe, weights], fields, **at_once)
        recalled = history.select(act.recall, [past, weights], fields, queue=False)
        clicked = [
            button.click(None, None, prompt, js=f"() => {json.dumps(text)}")
            for button, text in zip(examples, EXAMPLES, strict=True)
        ]
        triggers: list[Any] = [
            prompt.blur,
            prompt.submit,
            *(one.then for one in (loaded, restored, recalled, *clicked)),
        ]
        for trigger in triggers:
            trigger(act.hint, [prompt, weights], hint, queue=False, **quiet)
        for ended in (restored.success, restored.failure):
            ended(lambda: None, None, recipe, queue=False)
        page.load(None, None, None, js=DROP)
        page.load(act.hint, [prompt, weights], hint, queue=False, **quiet)
        asked, bounds = [weights, images, candidates], [images, candidates]
        page.load(act.offer, asked, [*bounds, unmeasured], **at_once)
        # Only the first visitor's page measures, in the queue; later pages get the result at once.
        unmeasured.change(act.measure, asked, bounds, **work)
        loaded.success(act.measure, asked, bounds, **work)
    page.queue(default_concurrency_limit=1, max_size=64)
    return page


def serve(
    pipe: Dall3Pipeline,
    host: str = "127.0.0.1",
    port: int | None = 7860,
    limits: Limits = LIMITS,
    block: bool = True,
    own: str = "bundled",
) -> str:
    """Serve the page of a pipeline and return its address.

    host: the address to listen on; other machines can reach the page only if it is not a loopback address, and then
    the page downloads no weights. port: None for the first free port from 7860. block: return only when the server
    stops. own: the name of the pipeline's weights. Raises OSError for a port in use.
    """
    page = make_page(pipe, limits, Shelf(pipe, own, fetching=is_loopback(host)))
    how: dict[str, Any] = dict(server_name=host, server_port=port, share=False, quiet=True, show_error=True)
    how |= dict(max_file_size=UPLOAD, footer_links=[], theme=THEME, css=CSS, ssr_mode=False, run_history=False)
    how |= dict(app_kwargs=APP)
    _, address, _ = page.launch(**how, prevent_thread_lock=True)
    if block:
        print(f"dall3 is at {address}", flush=True)
        page.block_thread()
    return address


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
