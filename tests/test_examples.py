"""The notebooks run without stored outputs and show their images; the web example draws, refuses and queues."""

import base64
import io
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from PIL import Image

from dall3.weights.registry import read_registry

EXAMPLES = Path(__file__).parent.parent / "examples"


def run_notebook(name, folder, settings=""):
    """Run a notebook without its stored outputs. Returns the sizes of its images and all its text.

    settings: replaces the cell with the tag "settings".
    """
    notebook = nbformat.read(EXAMPLES / f"{name}.ipynb", as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.update(outputs=[], execution_count=None)
        if "settings" in cell.metadata.get("tags", []):
            cell.source = settings
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(folder)}}).execute()
    return outputs_of(notebook)


def outputs_of(notebook):
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    sizes = []
    for output in outputs:
        if picture := output.get("data", {}).get("image/png"):
            with Image.open(io.BytesIO(base64.b64decode(picture))) as opened:
                sizes.append(opened.size)
    texts = [output.get("text", "") + output.get("data", {}).get("text/plain", "") for output in outputs]
    return sizes, "\n".join(texts)


def test_the_quickstart_notebook_runs_and_shows_its_images(tmp_path):
    sizes, text = run_notebook("quickstart", tmp_path)
    assert len(sizes) == 6 and all(min(size) >= 128 for size in sizes)
    assert "True" in text, "the repeated image was another"
    assert "draws 16 candidates of 256 tokens, ranks them, refines 2 images in 3 of 20 steps" in text


def test_the_models_of_2022_run_offline_on_the_bundled_weights(tmp_path, monkeypatch):
    monkeypatch.setenv("DALL3_OFFLINE", "1")
    sizes, text = run_notebook("models_of_2022", tmp_path)
    assert len(sizes) == 4
    for name in ("dalle-mega", "dalle-mini", "rudalle-malevich"):
        assert f"{name} cannot be downloaded here; the bundled weights draw in its place" in text
    mega = read_registry()["dalle-mega"]
    assert f"dalle-mega: {mega.about}. {mega.needs}" in text


def test_the_training_notebook_makes_weights_that_draw(tmp_path):
    sizes, text = run_notebook("train_on_your_own", tmp_path, "STEPS, PICTURES = 1, 4")
    assert len(sizes) == 4 and "Wall('a yellow smiling face on a blue background', 8 of 8 candidates)" in text


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.ipynb")), ids=lambda path: path.stem)
def test_a_notebook_is_kept_with_its_outputs_and_small(path):
    sizes, text = outputs_of(nbformat.read(path, as_version=4))
    assert len(sizes) >= 4 and "Error" not in text
    assert path.stat().st_size < 500_000


def test_the_web_example_draws_in_order_and_refuses_an_empty_prompt(monkeypatch):
    testclient = pytest.importorskip("fastapi.testclient")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    sys.modules.pop("embed_in_fastapi", None)
    import embed_in_fastapi

    asked = [dict(prompt=f"a {colour} cube", seed=0) for colour in ("red", "blue", "red")]
    with testclient.TestClient(embed_in_fastapi.app) as client, ThreadPoolExecutor(3) as pool:
        refused = client.get("/draw", params={"prompt": " "})
        answers = list(pool.map(lambda params: client.get("/draw", params=params), asked))
    assert refused.status_code == 400 and "empty" in refused.json()["detail"]
    assert [answer.status_code for answer in answers] == [200] * 3
    assert answers[0].content == answers[2].content != answers[1].content
    with Image.open(io.BytesIO(answers[0].content)) as picture:
        assert picture.format == "PNG"
