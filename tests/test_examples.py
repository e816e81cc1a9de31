"""The notebook runs from nothing and shows its pictures; the web example answers, refuses, and queues."""

import base64
import io
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from PIL import Image

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_the_notebook_runs_whole_and_its_pictures_are_there(tmp_path):
    notebook = nbformat.read(EXAMPLES / "quickstart.ipynb", as_version=4)
    for cell in notebook.cells:
        cell.pop("outputs", None) if cell.cell_type != "code" else cell.update(outputs=[], execution_count=None)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    pictures = [output["data"]["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    sizes = []
    for picture in pictures:
        with Image.open(io.BytesIO(base64.b64decode(picture))) as opened:
            sizes.append(opened.size)
    assert len(sizes) == 4 and all(min(size) >= 128 for size in sizes)
    texts = "".join(output.get("data", {}).get("text/plain", "") for output in outputs)
    assert "True" in texts, "the repeated picture was another"


def test_the_web_example_draws_in_turn_and_refuses_what_is_no_prompt(monkeypatch):
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
