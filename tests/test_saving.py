"""Saving and converting: a saved folder gives the same results as the files of 2021, bit by bit."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from dall3 import Dall3Pipeline
from dall3.cli import main
from dall3.errors import FetchError
from dall3.models.clip import CLIP, CLIPConfig
from dall3.models.transformer import DalleTransformer, TransformerConfig
from dall3.text import load_tokenizer, tokenizer_json
from dall3.weights import load_clip, load_discrete_vae, load_transformer, load_unet, load_vqgan
from dall3.weights.convert.vae import load_openai_dvae
from dall3.weights.folder import load_part, save_part

from conftest import GOLDEN, Golden, load_upstream_files, save_dalle, save_vqgan
from originals import openai_clip

TRANSFORMERS = sorted(folder.name for folder in GOLDEN.glob("dalle_*") if folder.name != "dalle_mini")
UNETS = sorted(path.parent.name for path in GOLDEN.glob("unet_*/expected.safetensors"))


def original(name: str, folder: Path) -> Any:
    """The model of a golden folder, loaded from a file in the original's format."""
    if name == "openai_dvae":
        return load_openai_dvae(GOLDEN / name / "zip/encoder.pkl", GOLDEN / name / "zip/decoder.pkl")
    golden, path = Golden(name), folder / "original.pt"
    if name in TRANSFORMERS:
        return load_transformer(save_dalle(path, golden))
    if name in ("gumbel_vq", "vqgan"):
        return load_vqgan(save_vqgan(path, golden))
    if name == "discrete_vae":
        torch.save({"hparams": golden.about, "weights": golden.weights()}, path)
        return load_discrete_vae(path)
    torch.save(openai_clip() if name == "clip_vit" else golden.weights(), path)
    return (
        load_clip(path)
        if name == "clip_vit"
        else load_unet(path, json.loads((GOLDEN / name / "config.json").read_text()))
    )


def numbers(model: Any) -> torch.Tensor:
    """The outputs of a model for fixed inputs."""
    config, kind = model.config, type(model).__name__
    draw = torch.Generator().manual_seed(0)
    if kind == "DalleTransformer":
        text = torch.randint(1, config.num_text_tokens, (2, config.text_seq_len), generator=draw)
        return model(text, torch.randint(config.num_image_tokens, (2, config.image_seq_len), generator=draw))
    if kind == "CLIP":
        images = torch.rand(2, 3, model.image_size, model.image_size, generator=draw)
        return torch.cat((model.embed_images(images), model.embed_text(["a cube", "a cloud"])))
    if kind == "UNet":
        side = config.image_size if config.image_size <= 64 else 64
        inputs: dict[str, Any] = {}
        if config.embedding_dims:
            places = 2 * side // config.downsampling
            inputs["image_embeds"] = torch.rand(1, config.embedding_dims[0], places, places, generator=draw)
        if config.super_resolution:
            inputs["low_res"] = torch.rand(1, 3, side // 4, side // 4, generator=draw)
        if config.num_classes:
            inputs["labels"] = torch.tensor([1])
        return model(torch.rand(1, 3, side, side, generator=draw), torch.tensor([7.0]), **inputs)
    side = getattr(config, "image_size", 64)
    images = torch.rand(1, 3, side, side, generator=draw)
    return model.decode(model.encode(images))


ALL = [*TRANSFORMERS, *UNETS, "gumbel_vq", "vqgan", "discrete_vae", "openai_dvae", "clip_vit"]


@pytest.mark.parametrize("name", ALL)
def test_a_golden_model_is_the_same_from_a_folder(name: str, tmp_path: Path) -> None:
    model = original(name, tmp_path)
    save_part(model, tmp_path / "part", dtype=None)
    again = load_part(tmp_path / "part")
    assert again.config == model.config and type(again) is type(model)
    state = again.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    # Copied, because the alignment of a mapped tensor can determine the kernel, and so the rounding.
    with torch.no_grad():
        assert torch.equal(numbers(copy.deepcopy(again)), numbers(copy.deepcopy(model)))


PROMPT = "a cube made of cloud"


@pytest.fixture(scope="module")
def from_2021(upstream_files: Path) -> Dall3Pipeline:
    return load_upstream_files(upstream_files)


@pytest.fixture(scope="module")
def folder(from_2021: Dall3Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return from_2021.save_pretrained(tmp_path_factory.mktemp("saved") / "weights")


def draw(pipe: Dall3Pipeline) -> Any:
    for part in (pipe.transformer, pipe.vqgan, pipe.clip, pipe.upsampler):
        assert part is not None
        for tensor in (*part.parameters(), *part.buffers()):
            tensor.data = tensor.data.clone()  # copied for the same alignment, as above
    return pipe(
        PROMPT,
        num_images=1,
        num_candidates=3,
        num_inference_steps=2,
        clip_guidance_scale=100,
        cutn=2,
        seed=0,
        progress=False,
    )


def test_a_pipeline_draws_the_same_from_a_folder(from_2021: Dall3Pipeline, folder: Path) -> None:
    first, again = draw(from_2021), draw(Dall3Pipeline.from_pretrained(folder))
    assert torch.equal(first.tokens, again.tokens) and torch.equal(first.clip_scores, again.clip_scores)
    assert [image.tobytes() for image in first.images] == [image.tobytes() for image in again.images]
    assert {path.name for path in folder.iterdir()} == {
        *("README.md", "tokenizer.json", "transformer", "vqgan", "clip", "upsampler")
    }
    modes = {path.stat().st_mode for path in folder.rglob("*") if path.is_file()}
    assert len(modes) == 1  # the weights have the permissions of the card


def test_a_folder_is_written_completely_or_not_at_all(
    from_2021: Dall3Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="full already exists and is not empty"):
        from_2021.save_pretrained(tmp_path / "full")
    assert (tmp_path / "full/mine.txt").read_text() == "mine"

    def fail(*args: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("dall3.weights.folder.model_card", fail)
    with pytest.raises(OSError, match="disk full"):
        from_2021.save_pretrained(tmp_path / "new")
    assert {path.name for path in tmp_path.iterdir()} == {"full"}


def test_half_precision_is_half_as_large_and_draws_on_any_dtype(
    from_2021: Dall3Pipeline, folder: Path, tmp_path: Path
) -> None:
    half = from_2021.save_pretrained(tmp_path / "half", torch.float16)
    sizes = [sum(file.stat().st_size for file in one.rglob("*.safetensors")) for one in (folder, half)]
    assert sizes[1] < 0.55 * sizes[0]
    pipe = Dall3Pipeline.from_pretrained(half, dtype=torch.bfloat16)
    assert {p.dtype for part in pipe.networks.values() for p in part.parameters()} == {torch.bfloat16}
    out = pipe(PROMPT, num_candidates=2, num_inference_steps=1, cutn=2, clip_guidance_scale=10, progress=False)
    assert len(out) == 1 and out.clip_scores is not None


def test_a_model_card_says_licence_and_source(from_2021: Dall3Pipeline, upstream_files: Path, tmp_path: Path) -> None:
    lines = ["[own.vqgan]", 'licence = "Apache-2.0"', 'source = "https://example.org/vqgan"', 'file = "last.ckpt"']
    lines += [f"places = [{json.dumps(str(upstream_files / 'vqgan_gumbel_f8/last.ckpt'))}]"]
    (tmp_path / "weights.toml").write_text("\n".join(lines))
    pipe = Dall3Pipeline.from_pretrained("own", registry=tmp_path / "weights.toml")
    card = (pipe.save_pretrained(tmp_path / "first") / "README.md").read_text()
    assert card.startswith("---\nlicense: apache-2.0\n") and "| Apache-2.0 | https://example.org/vqgan |" in card
    again = Dall3Pipeline.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    assert (again / "README.md").read_text() == card


def test_the_command_converts_and_lists_and_verifies(
    upstream_files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    files = ["--vqgan_model_path", str(upstream_files / "vqgan_gumbel_f8/last.ckpt"), "--out", str(out)]
    assert main(["convert", *files, "--half"]) == 0 and (out / "vqgan/model.safetensors").exists()
    for words, error in (
        (["convert", *files], "already exists and is not empty"),
        (["convert", "--out", str(tmp_path / "b")], "pass either the name of a set or the paths"),
        (["convert", "mini", *files[:2], "--out", str(tmp_path / "b")], "pass either the name of a set or the paths"),
        (["convert", "minii", "--out", str(tmp_path / "b")], "no set of weights is called 'minii'; did you mean mini?"),
        (["weights", "fetch"], "needs the name of a set"),
        (["weights", "where", "rudalle"], "no file of rudalle is on this machine; run `dall3 weights fetch rudalle`"),
    ):
        monkeypatch.setenv("DALL3_HOME", str(tmp_path / "home"))
        capsys.readouterr()
        assert main(words) == 2 and error in capsys.readouterr().err
    assert not (tmp_path / "b").exists()
    assert main(["weights", "list"]) == 0
    listed = capsys.readouterr().out
    (row,) = (line for line in listed.splitlines() if line.startswith("openai-256-uncond "))
    assert row.split()[1:6] == ["upsampler", "2.21", "GB", "MIT", "no"]
    assert main(["weights", "verify", "mini"]) == 0
    assert "mini/transformer/model.safetensors: good" in capsys.readouterr().out


def test_tokenizers_of_every_kind_are_saved(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "ab", "##c", "d"]))
    texts = ["", "  ", "a cube made of cloud", "▁a▁ b\tc\n日本 é <UNK>", "zz\u00a0zz \x0bq", "abc d abx", "CUBE!"]
    for name in (GOLDEN / "tokenizer/bpe.model", tmp_path / "vocab.txt", None):
        tokenizer = load_tokenizer(name)
        (tmp_path / "tokenizer.json").write_text(tokenizer_json(tokenizer))
        again = load_tokenizer(tmp_path / "tokenizer.json")
        assert again.vocab_size == tokenizer.vocab_size
        for text in texts:
            ids = tokenizer.encode(text)
            assert again.encode(text) == ids and again.decode(ids) == tokenizer.decode(ids)
    with pytest.raises(ValueError, match="a object cannot be saved"):
        tokenizer_json(object())  # type: ignore[arg-type]


class Hub(BaseHTTPRequestHandler):
    """The requests of the Hugging Face Hub that a download of a repository needs."""

    folder: Path

    def reply(self, body: bytes, **headers: str) -> None:
        self.send_response(200)
        for name, value in ({"Content-Length": str(len(body)), "X-Repo-Commit": "c" * 40} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        if path.startswith("/api/models/owner/name"):
            files = [file.relative_to(self.folder).as_posix() for file in self.folder.rglob("*") if file.is_file()]
            listed = {"id": "owner/name", "sha": "c" * 40, "siblings": [{"rfilename": file} for file in files]}
            entries = [{"type": "file", "path": file, "size": 1, "oid": "a"} for file in files]
            return self.reply(json.dumps(entries if "/tree/" in path else listed).encode())
        file = self.folder / path.split("c" * 40 + "/")[-1]
        if not path.startswith("/owner/name/resolve/") or not file.is_file():
            return self.send_error(404)
        return self.reply(file.read_bytes(), ETag=f'"{file.name}{file.stat().st_size}"')

    do_HEAD = do_GET

    def log_message(self, *args: Any) -> None:
        pass


def test_a_repository_of_the_hub(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(folder / "vqgan", tmp_path / "hub/vqgan")
    (tmp_path / "hub/run_me.py").write_text("raise SystemExit")
    Hub.folder = tmp_path / "hub"
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("DALL3_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    addresses = f"{constants.ENDPOINT}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    for module in (constants, huggingface_hub.file_download):  # before 1.0 the second imports the name
        monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", addresses, raising=False)
    try:
        pipe = Dall3Pipeline.from_pretrained("owner/name")
    finally:
        server.shutdown()
        server.server_close()
    assert pipe.vqgan is not None and pipe.transformer is None
    assert not list((tmp_path / "home").rglob("*.py"))
    monkeypatch.setenv("DALL3_OFFLINE", "1")
    assert Dall3Pipeline.from_pretrained("owner/name").vqgan is not None
    with pytest.raises(
        FetchError, match="owner/other is not a folder, .* cannot be downloaded from the Hugging Face Hub"
    ):
        Dall3Pipeline.from_pretrained("owner/other")


def test_a_pipeline_is_pushed_as_it_is_saved(from_2021: Dall3Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def upload(api: Any, **settings: Any) -> None:
        found = Dall3Pipeline.from_pretrained(settings["folder_path"])
        calls.append((settings["repo_id"], api.token, found.upsampler.config))

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda api, name, **more: f"https://hub/{name}/{more}")
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload)
    address = from_2021.push_to_hub("owner/name", torch.float16, private=True, token="secret")
    assert calls == [("owner/name", "secret", from_2021.upsampler.config)]
    assert address == "https://hub/owner/name/{'private': True, 'exist_ok': True}"


def test_a_saved_clip_keeps_its_normalisation_and_tokenizer(tmp_path: Path) -> None:
    config = CLIPConfig(
        16,
        dict(image_size=32, patch_size=16, width=64, layers=1),
        dict(context_length=12, vocab_size=49408, width=64, heads=1, layers=1),
        tokenizer="clip",
        mean=(0.1, 0.2, 0.3),
        std=(0.5, 0.5, 0.5),
    )
    clip = CLIP.from_config(config)
    save_part(clip, tmp_path, dtype=None)
    assert torch.equal(numbers(load_part(tmp_path)), numbers(clip))
    clip.config = None
    with pytest.raises(ValueError, match="load it by its open_clip name"):
        save_part(clip, tmp_path)


PEAK = """
import sys
from dall3.weights.folder import BUNDLED, load_part

def most():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024

def load(folder):
    parameters = list(load_part(folder).parameters())
    sum(float(p.sum()) for p in parameters)  # reads memory-mapped weights
    return sum(p.numel() * p.itemsize for p in parameters)

load(BUNDLED / "transformer")  # imports the libraries
open("/proc/self/clear_refs", "w").write("5")  # reset the peak
before = most()
size = load(sys.argv[1])
print((most() - before) / size)
"""


@pytest.mark.parametrize("dtype", (None, torch.float16))
def test_loading_takes_little_more_memory_than_the_weights(tmp_path: Path, dtype: torch.dtype | None) -> None:
    save_part(DalleTransformer(TransformerConfig(8192, 8192, 64, 512, 6)), tmp_path / "part", dtype)
    done = subprocess.run([sys.executable, "-c", PEAK, str(tmp_path / "part")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1.2


@pytest.mark.parametrize("name", ("../vqgan", "vqgan/../../x"))
def test_names_with_dots_in_a_safetensors_file_are_only_names(tmp_path: Path, name: str) -> None:
    save_part(original("gumbel_vq", tmp_path), tmp_path / "part")
    save_file({name: torch.zeros(1)}, tmp_path / "part/model.safetensors")
    with pytest.raises(ValueError, match=f"unexpected: {name}"):
        load_part(tmp_path / "part")


def test_values_that_half_precision_cannot_hold_are_an_error(tmp_path: Path) -> None:
    model = DalleTransformer(TransformerConfig(50, 10, 8, 32, 1, heads=2, dim_head=16, grid_size=4))
    model.norm_out.weight.data[0] = 1e5
    with pytest.raises(ValueError, match="norm_out.weight has values that torch.float16 cannot represent"):
        save_part(model, tmp_path / "half")
    save_part(model, tmp_path / "full", None)
    assert load_part(tmp_path / "full").norm_out.weight[0] == 1e5


@pytest.mark.parametrize(
    ("settings", "words"),
    (
        ({"vision_cfg": {"timm_model_name": "hf-hub:evil/model", "image_size": 32}}, "the setting timm_model_name"),
        ({"text_cfg": {"hf_model_name": "evil/model"}}, "the setting hf_model_name"),
        ({"vision_cfg": {"image_size": 32, "width": "64"}}, "the setting width"),
        ({"text_cfg": {"context_length": 10**7}}, "context_length=1e"),
    ),
)
def test_a_clip_config_cannot_load_other_models(tmp_path: Path, settings: dict[str, Any], words: str) -> None:
    plain = {"model": "CLIP", "embed_dim": 16, "tokenizer": "clip", "vision_cfg": {}, "text_cfg": {}}
    (tmp_path / "config.json").write_text(json.dumps(plain | settings))
    with pytest.raises(ValueError, match=words):
        load_part(tmp_path)
