"""Training: what it looks at, that it learns, that it resumes to the same numbers, and that what it writes loads."""

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
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dall3 import Dall3Pipeline
from dall3.cli import main
from dall3.diffusion.schedule import GaussianDiffusion
from dall3.images import enlarge
from dall3.models.transformer import TransformerConfig
from dall3.models.unet import DiffusionConfig, UNetConfig
from dall3.models.vqgan import GumbelVQ, VQGANConfig
from dall3.scenes import render
from dall3.scenes.emoji import Emoji, draw_emoji, emoji_caption, list_emoji, random_emoji_picture
from dall3.scenes.scene import is_held_out, random_scene
from dall3.text import load_tokenizer
from dall3.training.clip import CLIPTraining, swap_word
from dall3.training.data import Mixture, StepSampler
from dall3.training.files import fit_picture, shuffled
from dall3.training.loop import Task, TrainingConfig, train
from dall3.training.run import SETTINGS, TRAINABLE, read_settings, train_model
from dall3.training.tokenizer import train_tokenizer
from dall3.training.transformer import TransformerTask, TransformerTraining, encode_pool, redraw
from dall3.training.upsampler import UpsamplerTask, UpsamplerTraining, variational_bound
from dall3.training.vqgan import PerceptualDistance, VQGANTask, VQGANTraining, rotate_to
from dall3.weights.folder import from_json, load_part

SMALL_VQGAN = VQGANConfig(ch=32, ch_mult=(1, 1), num_res_blocks=1, attn_levels=(), z_channels=8, embed_dim=8, n_embed=8)
COLOURS = {"red": (200, 30, 30), "green": (30, 160, 40), "blue": (40, 60, 220)}


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder of plain pictures with captions."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, colour in COLOURS.items():
        Image.new("RGB", (40, 32), colour).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"a {name} picture\nall {name}\n")
    return folder


@pytest.fixture
def emoji_folder(tmp_path: Path) -> Path:
    """What npm leaves behind, with two drawings: a disc, and one that emojibase has in two skin tones."""
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


def small_config(pictures: Path, **more: object) -> TrainingConfig:
    config = TrainingConfig(steps=6, batch_size=3, side=32, warmup=1, every=2, data=(f"folder:{pictures}",))
    return replace(config, **more)


def small_task(**more: object) -> VQGANTask:
    torch.manual_seed(1)
    return VQGANTask(SMALL_VQGAN, replace(VQGANTraining(quantize_from=1, crop=16, crop_share=0.5), **more))


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
            info = tarfile.TarInfo("alone.png")  # a picture without a caption is passed over
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


def test_processes_share_a_step_out_among_themselves() -> None:
    parts = [list(StepSampler(3, 4, process, 3, first_item=24)) for process in range(3)]
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
        (["folder:/nowhere"], "holds no picture"),
        (["webdataset:/nowhere/*.tar"], "no shard"),
    ],
)
def test_data_that_cannot_be_had_is_said(names: list[str], words: str) -> None:
    with pytest.raises(ValueError, match=words.replace("(", r"\(")):
        Mixture(names, 16)


def test_a_picture_that_cannot_be_read_is_named_and_another_takes_its_place(pictures: Path, caplog: Any) -> None:
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
    seen, lines = Mixture([f"folder:{pictures}"], 16), Mixture([f"folder:{pictures}"], 16).look()
    assert "7 pictures, 6 captions" in lines[0] and "no .txt of the same name: 1" in lines[1]
    assert lines[2].endswith("replaced by others: 4") and "latin.png: its caption is not UTF-8" in lines[4]
    assert [line.split(":")[0].rpartition("/")[2] for line in lines[3:]] == [
        *("cut.png", "latin.png", "nothing.png", "page.jpg")
    ]
    items = [seen[i] for i in range(60)]
    assert {text for _, text in items} == captions
    late = Mixture([f"folder:{pictures}"], 16)  # a run that resumes meets the pictures in another order
    for i in reversed(range(60)):
        again = late[i]
        assert torch.equal(again[0], items[i][0]) and again[1] == items[i][1]
    assert not caplog.records  # they were named already
    (pictures / "green.txt").write_bytes(b"\xff")
    assert {Mixture([f"folder:{pictures}"], 16)[i][1] for i in range(60)} == {c for c in captions if "green" not in c}
    assert [r.message for r in caplog.records if "green.png: its caption is not UTF-8; another" in r.message]


def test_training_goes_on_past_an_unreadable_picture_and_ends_where_none_is_readable(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings, out = write_small_settings(tmp_path, pictures), tmp_path / "weights"
    (pictures / "red.png").write_bytes((pictures / "red.png").read_bytes()[:60])
    command = ["train", "vqgan", "--config", str(settings["vqgan"]), "--out"]
    assert main([*command, str(out)]) == 0
    said = capsys.readouterr().err
    assert "3 pictures, 4 captions" in said and "red.png: not a picture" in said and (out / "vqgan").is_dir()
    for name in ("green", "blue"):
        (pictures / f"{name}.png").write_bytes(b"")
    assert main([*command, str(tmp_path / "none")]) == 2
    assert "none of the 3 pictures that were tried can be read" in capsys.readouterr().err
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
    assert data.look() == [f"{pictures}: 3 pictures, 6 captions"]
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
    (line,) = Mixture([f"webdataset:{tmp_path}/s{{08..10}}.tar"], 16).look()
    assert line.endswith("9 pictures, 18 captions")
    assert len(Mixture([f"webdataset:{tmp_path}/{{s08,s10}}.tar=2"], 16).look()) == 1
    with pytest.raises(ValueError, match="no shard at .*s11.tar"):
        Mixture([f"webdataset:{tmp_path}/s{{08..11}}.tar"], 16)
    with pytest.raises(ValueError, match="expected {from..to} with at most"):
        Mixture([f"webdataset:{tmp_path}/s{{0..99999999999}}.tar"], 16)
    whole = (tmp_path / "s08.tar").read_bytes()
    with tarfile.open(tmp_path / "s08.tar") as tar:
        members = tar.getmembers()
    for cut, left in ((members[-1].offset_data + 26, 3), (members[4].offset, 2), (members[3].offset_data + 5, 1)):
        (tmp_path / "s08.tar").write_bytes(whole[:cut])
        first, second = Mixture([f"webdataset:{tmp_path}/s08.tar"], 16).look()
        assert f"{left} picture{'s' * (left > 1)}, {2 * left} captions" in first and "s08.tar: is cut" in second
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
        "s.tar: is cut; pictures before the cut, which are used: 3"
        in Mixture([f"webdataset:{tmp_path}/s.tar"], 16).look()[1]
    )


def test_an_equals_sign_in_a_path_is_no_weight(pictures: Path) -> None:
    for name in ("date=2021", "date=today"):
        folder = shutil.copytree(pictures, pictures.parent / name)
        for weight in ("", "=3"):
            data = Mixture([f"folder:{folder}{weight}", "scenes=1"], 16)
            assert data.shares.tolist() == ([0.75, 0.25] if weight else [0.5, 0.5])


def test_transparent_pictures_lie_on_white_and_wide_ones_lose_their_sides() -> None:
    picture = np.zeros((20, 40, 4), np.uint8)
    picture[:, 10:30, :] = (200, 0, 0, 255)
    picture[:, 19:21, :] = 0
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG")
    fitted = fit_picture(buffer.getvalue(), 20)
    assert fitted[5, 2].tolist() == [200, 0, 0] and fitted[5, 10].tolist() == [255, 255, 255]


def test_emoji_are_found_by_code_and_laid_on_the_background(emoji_folder: Path) -> None:
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
    seen = {tuple(random_emoji_picture(drawing, rng, 32)[0][0, 0]) for _ in range(200)}
    assert held_out and not seen & set(corner.values())
    only = {tuple(random_emoji_picture(drawing, rng, 32, held_out=True)[0][0, 0]) for _ in range(50)}
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


def test_a_tokenizer_reads_words_that_the_captions_have_not(tmp_path: Path) -> None:
    captions = ["a grey cube", "a cube coloured red"] * 20
    text = train_tokenizer(captions, 300, {"gray": "grey", "colored": "coloured"})
    (tmp_path / "tokenizer.json").write_text(text)
    encode = load_tokenizer(tmp_path / "tokenizer.json").encode
    assert encode("a Gray cube colored red") == encode("a grey cube coloured red")
    with pytest.raises(ValueError, match="expected some text in place of ''"):
        train_tokenizer(captions, 300, {"": "grey"})


def test_training_learns_and_what_it_writes_is_a_gumbel_vq_with_the_nearest_code(
    pictures: Path, tmp_path: Path
) -> None:
    config = small_config(pictures, steps=80, learning_rate=3e-3, ema_decay=0.9, every=10, seed=1)
    task = train(small_task(quantize_from=30), config, tmp_path / "run", tmp_path / "vqgan", progress=False)
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert lines[-1]["psnr"] > lines[0]["psnr"] + 5 and lines[-1]["step"] == 80
    assert (tmp_path / "run/loss.png").exists() and len(list((tmp_path / "run/samples").iterdir())) == 8
    model = load_part(tmp_path / "vqgan")
    images = torch.stack([Mixture(config.data, 32)[i][0] for i in range(3)]).float() / 255
    assert (model.decode(model.encode(images)) - images).abs().mean() < 0.15
    features = task.model.quant_conv(task.model.encoder(images * 2 - 1))
    entries = task.nearest.codebook
    nearest = torch.cdist(features.flatten(2).mT, entries[None]).argmin(-1)
    assert (model.encode(images) == nearest).float().mean() > 0.99  # half precision may tip a tie


@pytest.mark.parametrize("quantizer", ["nearest", "gumbel"])
def test_a_run_that_resumes_ends_at_the_same_weights(quantizer: str, pictures: Path, tmp_path: Path) -> None:
    def task() -> VQGANTask:
        return small_task(quantizer=quantizer, discriminator_from=3)

    config = small_config(pictures)
    whole = train(task(), config, tmp_path / "whole", tmp_path / "a", progress=False)
    interrupted = task()
    forward = interrupted.forward

    def press_after_three(images: torch.Tensor, captions: list[str], step: int):  # type: ignore[no-untyped-def]
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return forward(images, captions, step)

    interrupted.forward = press_after_three  # type: ignore[method-assign]
    train(interrupted, config, tmp_path / "parts", tmp_path / "b", progress=False)
    assert torch.load(tmp_path / "parts/checkpoint.pt", weights_only=True)["step"] == 3
    assert load_part(tmp_path / "b").num_tokens == 8  # a run that was stopped leaves a model too
    parts = train(task(), config, tmp_path / "parts", tmp_path / "b", progress=False)
    for (name, mine), theirs in zip(parts.state_dict().items(), whole.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6, msg=name)
    logs = [(tmp_path / run / "log.jsonl").read_text().splitlines()[-1] for run in ("whole", "parts")]
    assert json.loads(logs[0])["loss"] == pytest.approx(json.loads(logs[1])["loss"], abs=1e-5)


def test_a_trained_model_can_be_trained_on(pictures: Path, tmp_path: Path) -> None:
    config = small_config(pictures, steps=40, learning_rate=3e-3, ema_decay=0.5, every=10)
    train(small_task(quantize_from=20), config, tmp_path / "run", tmp_path / "vqgan", progress=False)
    log = [json.loads(line)["psnr"] for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    task = small_task(quantize_from=0)
    task.start_from(load_part(tmp_path / "vqgan"))
    train(task, replace(config, steps=2, learning_rate=1e-5, every=1), tmp_path / "on", tmp_path / "b", progress=False)
    on = [json.loads(line)["psnr"] for line in (tmp_path / "on/log.jsonl").read_text().splitlines()]
    assert on[0] > log[-1] - 1 > log[0]


def test_a_share_of_the_weights_that_a_run_starts_from_stays_through_a_resumed_run(
    pictures: Path, tmp_path: Path
) -> None:
    config = small_config(pictures, learning_rate=3e-3, ema_decay=0.5)
    train(small_task(), config, tmp_path / "first", tmp_path / "vqgan", progress=False)
    before = load_part(tmp_path / "vqgan")

    def train_on(name: str, **more: Any) -> dict[str, torch.Tensor]:
        task = small_task()
        task.start_from(before)
        train(task, replace(config, **more), tmp_path / name, tmp_path / f"{name}-part", progress=False)
        return load_part(tmp_path / f"{name}-part").state_dict()

    whole = train_on("none")
    train_on("kept", initial_share=0.25, steps=3)
    mixed = train_on("kept", initial_share=0.25)
    moved = 0.0
    for name, first in before.decoder.state_dict(prefix="decoder.").items():
        torch.testing.assert_close(mixed[name], first * 0.25 + whole[name] * 0.75, rtol=0, atol=1e-3, msg=name)
        moved = max(moved, float((whole[name] - first).abs().max()))
    assert moved > 0.01


def test_the_decoder_alone_learns_while_the_codes_stay(pictures: Path, tmp_path: Path) -> None:
    config = small_config(pictures, steps=4)
    train(small_task(), config, tmp_path / "first", tmp_path / "vqgan", progress=False)
    before = load_part(tmp_path / "vqgan")
    task = small_task(decoder_only=True, discriminator_from=0)
    with pytest.raises(ValueError, match="decoder_only paints the codes of a trained VQGAN"):
        train(task, config, tmp_path / "none", tmp_path / "none", progress=False)
    task.start_from(before)
    train(task, replace(config, steps=20), tmp_path / "second", tmp_path / "sharper", progress=False)
    after, images = load_part(tmp_path / "sharper"), torch.rand(2, 3, 32, 32)
    assert torch.equal(after.encode(images), before.encode(images)) and torch.equal(after.codebook, before.codebook)
    plain = torch.stack([Mixture(config.data, 32)[i][0] for i in range(3)]).float() / 255
    errors = [(vqgan.decode(vqgan.encode(plain)) - plain).abs().mean() for vqgan in (before, after)]
    assert errors[1] < errors[0]


def test_the_corner_of_a_picture_can_count_more(pictures: Path, tmp_path: Path) -> None:
    config = small_config(pictures, steps=20, learning_rate=3e-3)
    train(small_task(), config, tmp_path / "first", tmp_path / "vqgan", progress=False)
    before, errors = load_part(tmp_path / "vqgan"), []
    plain = torch.stack([Mixture(config.data, 32)[i][0] for i in range(3)]).float() / 255
    for weight in (0.0, 50.0):
        task = small_task(decoder_only=True, crop_share=0.0, corner_weight=weight)
        task.start_from(before)
        train(task, config, tmp_path / f"on{weight}", tmp_path / f"vqgan{weight}", progress=False)
        vqgan = load_part(tmp_path / f"vqgan{weight}")
        error = (vqgan.decode(vqgan.encode(plain)) - plain).abs()
        errors.append(error[..., :4, :4].mean() / error.mean())  # two codes by two of two pixels each
    assert errors[1] < 0.9 * errors[0]


def test_a_decoder_is_shown_first_codes_of_other_pictures() -> None:
    task, ids = small_task(decoder_only=True, wrong_first=0.3), torch.arange(400 * 4).view(400, 4)
    task.items = range(400)
    shown = task.exchange_first(ids)
    changed = shown[:, 0] != ids[:, 0]
    assert torch.equal(shown[:, 1:], ids[:, 1:]) and torch.equal(shown[changed, 0], ids[:, 0].roll(1)[changed])
    assert 0.2 < changed.float().mean() < 0.4
    images = torch.rand(400, 3, 16, 16)
    losses = []
    for share in (0.0, 0.3):
        other = small_task(decoder_only=True, crop_share=0.0, wrong_first=share)
        other.items = range(400)
        losses.append(float(other(images, [""] * 400, 0)[0].detach()))
    assert losses[0] != losses[1]  # it is what is decoded
    with pytest.raises(ValueError, match="wrong_first=0.5 needs decoder_only"):
        VQGANTraining(wrong_first=0.5)


def test_training_leaves_the_callers_random_state_alone(pictures: Path, tmp_path: Path) -> None:
    task = small_task()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    train(task, small_config(pictures, steps=2), tmp_path / "run", tmp_path / "model", progress=False)
    assert torch.equal(torch.get_rng_state(), before)


def test_gradient_accumulation_equals_the_larger_batch(pictures: Path, tmp_path: Path) -> None:
    class Mean(Task):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(3))

        def forward(self, images, captions, step):  # type: ignore[no-untyped-def]
            loss = (images.mean(dim=(2, 3)) - self.weight).square().mean()
            return loss, {}

        def sample(self, images, captions):  # type: ignore[no-untyped-def]
            return Image.new("RGB", (1, 1))

        def export(self, folder: Path) -> None:
            folder.mkdir(parents=True, exist_ok=True)

    found = []
    for batch_size, accumulation in ((6, 1), (3, 2)):
        config = small_config(pictures, batch_size=batch_size, gradient_accumulation=accumulation, ema_decay=0.0)
        folder = tmp_path / f"{accumulation}"
        found.append(train(Mean(), config, folder, folder / "model", progress=False).weight)
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


def test_the_variational_bound_is_0_for_the_posterior_and_a_distribution_at_the_end() -> None:
    diffusion = GaussianDiffusion(DiffusionConfig(diffusion_steps=100))
    x_start, noise = torch.linspace(-0.9, 0.9, 12).view(1, 3, 2, 2), torch.ones(1, 3, 2, 2)
    t = torch.tensor([40])
    x = diffusion.add_noise(x_start, t, noise)
    mean, log_variance = diffusion.posterior_mean(x_start, x, t), diffusion.at("log_posterior", t, x).expand_as(x)
    assert variational_bound(diffusion, mean, log_variance, x_start, x, t).abs().max() < 1e-6
    worse = variational_bound(diffusion, mean + 0.1, log_variance, x_start, x, t)
    assert torch.allclose(worse, (0.005 * torch.exp(-log_variance).mean() / np.log(2)).float(), rtol=1e-4)
    levels = (torch.arange(256) / 127.5 - 1).view(256, 1, 1, 1)
    t = torch.zeros(256, dtype=torch.int64)
    middle, spread = torch.full_like(levels, 0.2), torch.full_like(levels, -4.0)
    bits = variational_bound(diffusion, middle, spread, levels, levels, t)
    assert float((2**-bits).sum()) == pytest.approx(1, abs=1e-4)  # over all levels of a pixel


class Averages(torch.nn.Module):
    """A stand-in for a VQGAN whose codes are a place's mean brightness."""

    downsampling = 8

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        return (torch.nn.functional.avg_pool2d(images.mean(1), 8) * 1000).long().flatten(1)

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        side = round(ids.shape[1] ** 0.5)
        return ids.view(-1, 1, side, side).expand(-1, 4, -1, -1).float() / 1000


def test_max_strength_is_the_share_of_the_noise_schedule_that_is_trained_on() -> None:
    config = UNetConfig(32, (1, 1, 1, 1, 1, 1), 1, (), 256, embedding_dims=(4, 32))
    training = UpsamplerTraining(crop=64, crops=50, max_strength=0.3)
    task, seen = UpsamplerTask(config, training, Averages()), []  # type: ignore[arg-type]

    def look(x: torch.Tensor, t: torch.Tensor, image_embeds: torch.Tensor) -> torch.Tensor:
        seen.append(t)
        return torch.zeros(len(x), 6, *x.shape[2:])

    task.run, task.items = look, range(2)  # type: ignore[assignment]
    torch.manual_seed(0)
    task(torch.rand(2, 3, 256, 256), ["", ""], 0)
    assert len(seen[0]) == 100 and seen[0].min() < 20 and 280 < seen[0].max() < 300
    for share in (0, 1.5):
        with pytest.raises(ValueError, match=f"max_strength={share}; expected a share"):
            UpsamplerTraining(max_strength=share)


def test_crops_of_a_picture_keep_their_own_codes(pictures: Path) -> None:
    config = UNetConfig(
        32, (1, 1, 1, 1, 1, 1), 1, (), 256, embedding_dims=(4, 32), diffusion=DiffusionConfig(predict_xstart=True)
    )
    task = UpsamplerTask(config, UpsamplerTraining(crop=64, crop_share=1.0), Averages())  # type: ignore[arg-type]
    seen = {}

    def look(x: torch.Tensor, t: torch.Tensor, image_embeds: torch.Tensor) -> torch.Tensor:
        seen.update(x=x, embeddings=image_embeds)
        return torch.zeros(len(x), 6, *x.shape[2:])

    task.run, task.items = look, range(2)  # type: ignore[assignment]
    task.diffusion.add_noise = lambda x_start, t, noise: x_start  # type: ignore[method-assign]
    for seed in range(4):
        torch.manual_seed(seed)
        images = torch.nn.functional.interpolate(torch.rand(2, 3, 16, 16), 256, mode="bilinear")
        task(images, ["", ""], 0)
        means = torch.nn.functional.avg_pool2d((seen["x"].mean(1) + 1) / 2, 16)
        assert seen["x"].shape[-1] == 64 and seen["embeddings"].shape[-1] == 4
        torch.testing.assert_close(seen["embeddings"][:, 0], means, rtol=0, atol=2e-3)


def write_small_settings(folder: Path, pictures: Path, more: str = "", **losses: str) -> dict[str, Path]:
    """Settings with which every part trains within seconds; more lines of [train], and of a model's [loss]."""
    train_table = f'[train]\nsteps = 2\nbatch_size = 2\nside = 32\nevery = 2\ndata = ["folder:{pictures}"]\n{more}'
    models = {
        "tokenizer": "[model]\nvocab_size = 270\n",
        "vqgan": "[model]\nch = 32\nch_mult = [1, 1]\nnum_res_blocks = 1\nattn_levels = []\nz_channels = 4\n"
        "embed_dim = 4\nn_embed = 8\n",
        "transformer": "[model]\ntext_seq_len = 16\ndim = 16\ndepth = 1\nheads = 1\ndim_head = 16\ngrid_size = 16\n",
        "clip": "[model]\nembed_dim = 16\n[model.vision_cfg]\nimage_size = 32\npatch_size = 16\nwidth = 16\n"
        "head_width = 16\nlayers = 1\n[model.text_cfg]\ncontext_length = 16\nwidth = 16\nheads = 1\nlayers = 1\n",
        "upsampler": "[model]\nmodel_channels = 32\nchannel_mult = [1, 1, 1, 1]\nnum_res_blocks = 1\n"
        "attention_levels = [3]\nimage_size = 64\nnum_head_channels = 32\nembedding_dims = [4, 32]\n"
        "[loss]\ncrop = 32\nmax_strength = 0.6\n",
    }
    for name, lines in losses.items():
        models[name] += lines if "[loss]" in models[name] else f"[loss]\n{lines}"
    paths = {}
    for name, table in models.items():
        paths[name] = folder / f"{name}.toml"
        text = table + train_table
        paths[name].write_text(text.replace("side = 32", "side = 64") if name == "upsampler" else text)
    return paths


def test_five_commands_make_a_pipeline_of_ones_own(pictures: Path, tmp_path: Path) -> None:
    settings, out = write_small_settings(tmp_path, pictures), tmp_path / "weights"
    for model in TRAINABLE:
        assert main(["train", model, "--config", str(settings[model]), "--out", str(out)]) == 0
    pipe = Dall3Pipeline.from_pretrained(out)
    assert pipe.defaults == {"strength": 0.6}  # all that the upsampler was trained on
    result = pipe("a red picture", num_candidates=2, num_inference_steps=2, cutn=2, seed=0, progress=False)
    assert result.images[0].size == (64, 64) and result.clip_scores is not None
    assert result.coarse_images[0].size == (32, 32)


def test_vqgan_and_upsampler_look_through_the_clip_of_their_folder(pictures: Path, tmp_path: Path) -> None:
    weight, out = "perceptual_weight = 1.0\n", tmp_path / "weights"
    settings = write_small_settings(tmp_path, pictures, vqgan=f"{weight}crop = 16\n", upsampler=weight)
    train_model("tokenizer", out, settings["tokenizer"], progress=False)
    with pytest.raises(ValueError, match="holds no clip, in whose features perceptual_weight compares"):
        train_model("vqgan", out, settings["vqgan"], progress=False)
    train_model("clip", out, settings["clip"], progress=False)
    for model in ("vqgan", "upsampler"):  # on crops, of which this CLIP, a ViT, takes none as they are
        train_model(model, out, settings[model], progress=False)
        lines = [json.loads(line) for line in (out / f"runs/{model}/log.jsonl").read_text().splitlines()]
        assert lines[-1]["perceptual"] > 0
    assert load_part(out / "vqgan").num_tokens == 8

    clip = Dall3Pipeline.from_pretrained().clip
    assert clip is not None
    distance, rng = PerceptualDistance(clip), np.random.default_rng(0)
    marble = (
        torch.from_numpy(render(random_scene(rng, "sphere", "marble", held_out=None), 128).copy()).permute(2, 0, 1)[
            None
        ]
        / 255
    )
    blurred = torch.nn.functional.avg_pool2d(marble, 5, 1, 2, count_include_pad=False).requires_grad_()
    noise = torch.randn(marble.shape) * (blurred.detach() - marble).square().mean().sqrt() / 4
    assert distance(marble, marble) == 0 and distance(blurred, marble) > 2 * distance(marble + noise, marble)
    distance(blurred, marble).backward()
    assert blurred.grad is not None and blurred.grad.abs().sum() > 0


def test_an_upsampler_may_be_shown_the_coarse_picture_in_the_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    vqgan = small_task().model.eval().requires_grad_(False)
    config = UNetConfig(32, (1, 1, 1, 1), 1, (), 64, embedding_dims=(8, 32))
    images, seen = torch.rand(2, 3, 64, 64), []
    for share in (0.0, 1.0):
        # Of a schedule of which the first step alone is trained on, refining can only begin there.
        training = UpsamplerTraining(crop_share=0, max_strength=1e-3, coarse_share=share)
        task = UpsamplerTask(config, training, vqgan)
        task.items = range(2)

        def run(x: torch.Tensor, t: torch.Tensor, **_: torch.Tensor) -> torch.Tensor:
            seen.append(x)
            return x.new_zeros(2, 6, 64, 64)

        task.run = run
        loss, _ = task(images, ["", ""], 0)
        seen.append(loss)
    fine, loss, coarse, larger_loss = seen
    assert larger_loss > loss  # what the coarse picture lacks is to be found too
    decoded = vqgan.decode(vqgan.encode(torch.nn.functional.interpolate(images, 32, mode="area")))
    enlarged = torch.nn.functional.interpolate(decoded, 64, mode="bicubic", antialias=True).clamp(0, 1)
    torch.testing.assert_close(coarse - fine, (enlarged - images) * 2, rtol=0, atol=2e-3)
    with torch.autocast("cpu", torch.bfloat16):  # as `precision` "bf16" has it
        half_loss, _ = task(images, ["", ""], 0)
    torch.testing.assert_close(half_loss, larger_loss, rtol=0.05, atol=0)


def test_an_upsampler_may_be_told_what_clip_misses_in_its_pictures() -> None:
    vqgan, clip = small_task().model.eval().requires_grad_(False), Dall3Pipeline.from_pretrained().clip
    config = UNetConfig(32, (1, 1, 1, 1), 1, (), 64, embedding_dims=(8, 32))
    images = torch.rand(2, 3, 64, 64)

    def look(weight: float, is_right: bool, reductions: tuple[int, ...] = (2,)) -> tuple[torch.Tensor, float]:
        settings = UpsamplerTraining(
            crop_share=0, max_strength=0.3, vlb_weight=0, perceptual_weight=weight, perceptual_reductions=reductions
        )
        task = UpsamplerTask(config, settings, vqgan, clip)
        task.items = range(2)

        def run(x: torch.Tensor, t: torch.Tensor, **_: torch.Tensor) -> torch.Tensor:
            noise = task.diffusion.noise_from_x_start(x, t.long(), images * 2 - 1) if is_right else x
            return torch.cat((noise, x), dim=1)

        task.run = run
        loss, figures = task(images, ["", ""], 0)
        return loss, float(figures["perceptual"])

    assert look(1.0, is_right=True)[1] < 1e-3 < look(1.0, is_right=False)[1]
    (without, _), (loss, distance) = look(0.0, is_right=False), look(2.0, is_right=False)
    torch.testing.assert_close(loss - without, torch.tensor(2 * distance))
    whole, both = (look(1.0, False, reductions)[1] for reductions in ((1,), (1, 2)))
    assert whole != distance and both == pytest.approx((whole + distance) / 2)
    for wrong in ((), (2, 0)):
        with pytest.raises(ValueError, match="perceptual_reductions=.* expected whole numbers from 1"):
            UpsamplerTraining(perceptual_reductions=wrong)


def test_an_upsampler_may_learn_to_be_taken_for_true_pictures() -> None:
    vqgan = small_task().model.eval().requires_grad_(False)
    config = UNetConfig(32, (1, 1, 1, 1), 1, (), 64, embedding_dims=(8, 32))
    images = torch.rand(2, 3, 64, 64)

    def gradients(weight: float, step: int = 5) -> tuple[torch.Tensor, list[torch.Tensor]]:
        torch.manual_seed(0)
        settings = UpsamplerTraining(
            crop_share=0, max_strength=0.3, vlb_weight=0, discriminator_weight=weight, discriminator_from=5
        )
        task = UpsamplerTask(config, settings, vqgan)
        task.items = range(2)
        loss, figures = task(images, ["", ""], step)
        loss.backward()
        assert (task.discriminator is None) == (weight == 0) == ("hinge" not in figures)
        judges = [] if task.discriminator is None else [p.grad for p in task.discriminator.parameters()]
        return task.model.out[-1].weight.grad, judges

    plain, _ = gradients(0.0)
    waiting, waiting_judge = gradients(0.5, step=4)
    half, half_judge = gradients(0.5)
    whole, whole_judge = gradients(1.0)
    assert torch.equal(waiting, plain)  # until then the discriminator learns alone
    assert (whole - plain).abs().max() > 1e-4
    torch.testing.assert_close(whole - plain, 2 * (half - plain), rtol=1e-3, atol=1e-6)
    for first, second, third in zip(waiting_judge, half_judge, whole_judge, strict=True):  # whatever its verdict weighs
        assert torch.equal(first, second) and torch.equal(second, third) and first.abs().max() > 0


@pytest.mark.parametrize("coarse_share", (0.0, 1.0))
def test_an_upsamplers_discriminator_is_shown_what_is_beyond_the_coarse_picture(coarse_share: float) -> None:
    class Judge(torch.nn.Conv2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(x.detach())
            return super().forward(x)

    vqgan = small_task().model.eval().requires_grad_(False)
    config = UNetConfig(32, (1, 1, 1, 1), 1, (), 64, embedding_dims=(8, 32))
    settings = UpsamplerTraining(32, 2, vlb_weight=0, coarse_share=coarse_share, discriminator_weight=1.0)
    task, seen = UpsamplerTask(config, settings, vqgan), []
    images, task.items, task.discriminator = torch.rand(2, 3, 64, 64), range(2), Judge(6, 1, 1)
    task(images, ["", ""], 0)
    judged, real, again = seen
    assert real.shape == (4, 6, 32, 32) and torch.equal(judged, again) and torch.equal(judged[:, 3:], real[:, 3:])
    coarse = enlarge(vqgan.decode(task.encode(images)), 64)
    found = torch.cat((real[:, :3] / 8 + real[:, 3:], real[:, 3:]), dim=1) / 2 + 0.5
    crops = torch.cat((images, coarse), dim=1).unfold(2, 32, 8).unfold(3, 32, 8)
    crops = crops.permute(0, 2, 3, 1, 4, 5).flatten(0, 2)
    for crop in found:
        assert (crops - crop).abs().amax((1, 2, 3)).min() < 1e-5


def test_wrong_codes_are_another_pictures_and_the_right_ones_are_asked_for() -> None:
    def encode(text: str, truncate: bool) -> torch.Tensor:
        return torch.ones(4, dtype=torch.int64)

    config = TransformerConfig(8, 8, 4, 16, 1, heads=1, dim_head=16, grid_size=16)
    task = TransformerTask(config, TransformerTraining(0.0, wrong_codes=0.8), small_task().model, encode)
    task.items, asked = range(6), []

    def look(text_ids: torch.Tensor, image_ids: torch.Tensor, seen_ids: torch.Tensor) -> torch.Tensor:
        asked.append(image_ids)
        return seen_ids.float()

    task.loss = look
    codes = torch.arange(6, dtype=torch.int16)[:, None].expand(6, 256)  # of picture k all are k
    seen, _ = task(codes, [""] * 6, 0)
    assert torch.equal(asked[0], codes.long())
    wrong = seen != codes
    assert torch.equal(seen[wrong], codes.roll(1, 0)[wrong].float())
    shares = wrong.float().mean(1)
    assert 0.2 < shares.mean() < 0.6 and shares.max() < 0.9 and shares.std() > 0.05
    task.settings, task.loss = TransformerTraining(0.0), task.model.loss
    task.model.requires_grad_(False)
    plain = task.model.loss(torch.ones(6, 4, dtype=torch.int64), codes.long())
    assert torch.equal(task(codes, [""] * 6, 0)[0], plain)


def test_own_codes_are_drawn_after_the_ones_shown_and_the_right_ones_are_asked_for() -> None:
    def encode(text: str, truncate: bool) -> torch.Tensor:
        return torch.ones(4, dtype=torch.int64)

    config = TransformerConfig(8, 8, 4, 16, 1, heads=1, dim_head=16, grid_size=16)
    settings = TransformerTraining(0.0, own_codes=1.0, own_passes=2)
    task = TransformerTask(config, settings, small_task().model, encode)
    task.items, asked, shown = range(6), [], []
    codes = torch.randint(0, 7, (6, 256), dtype=torch.int16)
    with torch.autocast("cpu", torch.bfloat16):  # whose weights, cast for drawing, are not to be trained with
        loss, _ = task(codes, [""] * 6, 0)
    loss.backward()
    assert all(parameter.grad.abs().sum() > 0 for name, parameter in task.named_parameters() if "layers" in name)

    def look(text_ids: torch.Tensor, image_ids: torch.Tensor, seen_ids: torch.Tensor) -> torch.Tensor:
        asked.append(image_ids)
        return seen_ids.float()

    def redraw_last(model: torch.nn.Module, text_ids: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        shown.append(others[0])
        return redraw(model, text_ids, *others)

    task.loss, task.redraw = look, redraw_last
    task.model.to_logits.bias.data[-1] = 100.0  # whatever comes before, it draws the last of the 8 codes
    seen, figures = task(codes, [""] * 6, 0)
    own = seen == 7
    assert torch.equal(asked[0], codes.long()) and torch.equal(seen[~own], codes[~own].float())
    assert figures["wrong"] == own.float().mean() and 0.2 < own.float().mean() < 0.8
    assert torch.equal(shown[0], codes.long())
    assert torch.equal(shown[1], seen.long())  # the second pass sees what the first one drew
    task.settings = TransformerTraining(0.0, wrong_codes=0.5, own_codes=0.5, true_codes=20)
    seen, _ = task(codes, [""] * 6, 0)
    wrong = seen != codes
    assert not wrong[:, :20].any() and wrong[:, 20:].any(1).all()
    assert (seen[wrong] != 7).any() and (seen[wrong] == 7).any()
    with pytest.raises(ValueError, match="true_codes=-1; expected a whole number from 0"):
        TransformerTraining(true_codes=-1)


def test_a_convolutional_clip_keeps_the_statistics_of_what_it_saw(pictures: Path, tmp_path: Path) -> None:
    settings, out = write_small_settings(tmp_path, pictures), tmp_path / "weights"
    text = settings["clip"].read_text().replace("layers = 1\n", "layers = [1, 1, 1, 1]\n", 1)
    text = text.replace("batch_size = 2", "batch_size = 3\nlearning_rate = 3e-3\nwarmup = 5\nema_decay = 0.8")
    settings["clip"].write_text(text)
    train_model("tokenizer", out, settings["tokenizer"], progress=False)
    train_model("clip", out, settings["clip"], steps=60, every=60, progress=False)
    clip = load_part(out / "clip", load_tokenizer(out / "tokenizer.json"))
    plain = torch.tensor(list(COLOURS.values())).float()[:, :, None, None].expand(3, 3, 32, 32) / 255
    with torch.no_grad():
        images = torch.nn.functional.normalize(clip.embed_images(plain), dim=-1)
        texts = torch.nn.functional.normalize(clip.embed_text([f"a {name} picture" for name in COLOURS]), dim=-1)
    assert (images @ texts.T).argmax(0).tolist() == [0, 1, 2]
    alone = torch.cat([clip.embed_images(picture[None]) for picture in plain])
    torch.testing.assert_close(alone, clip.embed_images(plain), rtol=0, atol=1e-4)


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
            CLIPTraining(**wrong)


def test_a_clip_tells_captions_from_wrong_ones_that_no_other_picture_has(pictures: Path, tmp_path: Path) -> None:
    for name in ("green", "blue"):  # one picture: other pictures' captions have nothing to teach
        (pictures / f"{name}.png").unlink()
    (pictures / "red.txt").write_text("a red cube")
    settings, out = write_small_settings(tmp_path, pictures), tmp_path / "weights"
    rates = "batch_size = 3\nlearning_rate = 5e-3\nwarmup = 5\nema_decay = 0.8"
    swaps = '[loss]\nswaps = [["cube", "cone", "egg"]]\nmax_scale = 10.0\n[train]'  # CLIP begins with 14.3
    text = settings["clip"].read_text().replace("batch_size = 2", rates).replace("[train]", swaps)
    settings["clip"].write_text(text)
    train_model("tokenizer", out, settings["tokenizer"], progress=False)
    train_model("clip", out, settings["clip"], steps=60, every=20, progress=False)
    log = [json.loads(line) for line in (out / "runs/clip/log.jsonl").read_text().splitlines()]
    assert log[-1]["told apart"] > 0.9
    clip = load_part(out / "clip", load_tokenizer(out / "tokenizer.json"))
    red = torch.tensor(COLOURS["red"])[None, :, None, None].expand(1, 3, 32, 32) / 255
    with torch.no_grad():
        scores = torch.cat([clip.score(red, clip.embed_text([f"a red {w}"])) for w in ("cube", "cone", "egg")])
    assert scores[0] > scores[1:].max() + 0.2
    assert 5 < float(clip.model.logit_scale.exp()) < 10.01


def test_a_pool_of_codes_is_what_the_vqgan_makes_of_the_pictures_and_is_made_once(
    pictures: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    vqgan, data = GumbelVQ(SMALL_VQGAN).eval(), Mixture([f"folder:{pictures}"], 32)
    pool = encode_pool(data, 70, vqgan, tmp_path / "codes.npz", workers=0, progress=False)
    seen = {}
    for i in range(70):
        place, (codes, text) = shuffled(i, 70), pool[i]
        images, wanted = data[place]
        assert text == wanted and torch.equal(codes.long(), vqgan.encode(images[None].float() / 255)[0])
        seen[place] = codes
    assert len(seen) == 70 and len({tuple(codes.tolist()) for codes in seen.values()}) > 1
    made = (tmp_path / "codes.npz").stat().st_mtime_ns
    again = encode_pool(data, 70, vqgan, tmp_path / "codes.npz", workers=0, progress=False)
    assert torch.equal(again[5][0], pool[5][0]) and (tmp_path / "codes.npz").stat().st_mtime_ns == made
    other = GumbelVQ(SMALL_VQGAN).eval()
    encode_pool(data, 70, other, tmp_path / "codes.npz", workers=0, progress=False)
    assert (tmp_path / "codes.npz").stat().st_mtime_ns > made  # another codebook means other codes


def test_a_pool_holds_codes_that_need_more_than_16_bits(pictures: Path, tmp_path: Path) -> None:
    class Bright(GumbelVQ):
        def encode(self, images: torch.Tensor) -> torch.Tensor:
            return (super().encode(images) * 0 + 39_999).long()

    vqgan, path = Bright(SMALL_VQGAN).eval(), tmp_path / "codes.npz"
    vqgan.num_tokens = 40_000
    data = Mixture([f"folder:{pictures}"], 32)
    for _ in range(2):  # made, and read back
        codes, _ = encode_pool(data, 3, vqgan, path, workers=0, progress=False)[0]
        assert codes.tolist() == [39_999] * 256
    config = TransformerConfig(8, 40_000, 4, 16, 1, heads=1, dim_head=16, grid_size=16)
    task = TransformerTask(config, TransformerTraining(0.0), vqgan, lambda *_, **__: torch.ones(4, dtype=torch.int64))
    task.items = range(1)
    torch.testing.assert_close(task(codes[None], [""], 0)[0], task(codes[None].long(), [""], 0)[0])
    shown = []
    task.loss = lambda text_ids, image_ids: shown.append(image_ids) or torch.zeros(())  # type: ignore[func-returns-value]
    task(codes[None], [""], 0)
    assert shown[0].tolist() == [[39_999] * 256]


def test_a_library_that_training_needs_is_named_before_any_work(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings, out = write_small_settings(tmp_path, pictures), tmp_path / "weights"
    for library in ("accelerate", "matplotlib", "vector_quantize_pytorch"):
        monkeypatch.setitem(sys.modules, library, None)
        assert main(["train", "vqgan", "--config", str(settings["vqgan"]), "--out", str(out)]) == 2
        words = f"dall3: error: dall3 train needs {library}; run pip install 'dall3[train]'\n"
        assert capsys.readouterr().err == words and not out.exists()
        monkeypatch.undo()


def test_a_transformer_learns_from_a_pool(pictures: Path, tmp_path: Path) -> None:
    settings, out = write_small_settings(tmp_path, pictures), tmp_path / "weights"
    for model in ("tokenizer", "vqgan"):
        train_model(model, out, settings[model], progress=False)
    with settings["transformer"].open("a") as file:
        file.write("[loss]\npool = 5\n")
    train_model("transformer", out, settings["transformer"], progress=False, steps=30, every=30)
    with np.load(out / "runs/transformer/codes.npz") as found:
        assert found["codes"].shape == (5, 256)
    lines = [json.loads(line) for line in (out / "runs/transformer/log.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 30 and (out / "transformer/config.json").exists()


def test_what_cannot_be_trained_is_said_before_any_work(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings, out = write_small_settings(tmp_path, pictures), tmp_path / "weights"

    def fails(model: str, *more: str, words: str) -> None:
        assert main(["train", model, "--config", str(settings[model]), "--out", str(out), *more]) == 2
        assert words in capsys.readouterr().err

    fails("transformer", words="holds no vqgan, on whose codes this is trained; train that first")
    fails("vqgan", "--data", "folder:/nowhere", words="holds no picture")
    fails("vqgan", "--steps", "0", words="steps=0; expected a whole number from 1")
    with pytest.raises(ValueError, match="initial_share=0.5 needs initial, the part that it is a share of"):
        train_model("vqgan", out, settings["vqgan"], progress=False, initial_share=0.5)
    good = settings["vqgan"].read_text()
    for line, words in (
        ("chh = 3\n", "unknown setting chh"),
        ("[other]\n", "expected tables model, loss and train"),
        ("ch = \n", "not TOML"),
    ):
        settings["vqgan"].write_text(line + good if line == "[other]\n" else good.replace("ch = 32\n", line))
        fails("vqgan", words=words)
    settings["vqgan"].write_text(good)
    settings["tokenizer"].write_text('[model]\nvocab_size = 300\nreplacements = { "" = "grey" }\n')
    fails("tokenizer", "--steps", "1000000000", words="expected some text in place of ''")  # before any work
    assert not out.exists()
    train_model("vqgan", out, settings["vqgan"], progress=False)
    fails("vqgan", words="holds a run already; resume it, or give another folder")
    fails("transformer", words="run `dall3 train tokenizer` on the same data first")
    (out / "tokenizer.json").write_text("mine")
    fails("tokenizer", words="tokenizer.json is there already, and the parts trained after it need it")
    assert (out / "tokenizer.json").read_text() == "mine"


def test_the_settings_of_the_bundled_weights_are_there_and_make_their_models() -> None:
    names = {path.stem for path in SETTINGS.glob("*.toml")}
    assert names == {*TRAINABLE}
    for name in names:
        settings = read_settings(SETTINGS / f"{name}.toml")
        assert settings["model"] and settings["train"]["data"] and from_json(TrainingConfig, settings["train"])


def test_scenes_render_writes_what_the_folder_source_reads(tmp_path: Path) -> None:
    out = tmp_path / "scenes"
    assert main(["scenes", "render", "--count", "3", "--size", "32", "--out", str(out)]) == 0
    picture, text = Mixture([f"folder:{out}"], 32)[0]
    assert picture.shape == (3, 32, 32) and len(text) > 5
    assert main(["scenes", "render", "--count", "3", "--size", "32", "--out", str(out)]) == 2
    assert main(["scenes", "sheet", "--size", "16", "--out", str(tmp_path / "sheet.png")]) == 0
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 10 * 16 and sheet.height > 22 * 16


TOGETHER = """
import sys
from dall3.training import loop
from dall3.training.run import train_model
loop.save_samples = lambda *args: None
out, settings, steps, batch_size, *models = sys.argv[1:]
for model in models:
    sizes = dict(steps=int(steps), batch_size=int(batch_size), every=10)
    place = f"{out}/apart" if model == "vqgan" else out  # the others read the one in `out`
    train_model(model, place, f"{settings}/{model}.toml", resume=True, progress=False, **sizes)
"""


def launch(processes: int, *arguments: object) -> None:
    """Train models in a folder, up to a step, on so many processes."""
    script = Path(str(arguments[0])) / "together.py"
    script.write_text(TOGETHER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command += [str(script), *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}  # one GPU is not enough for two
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[:6000]


def test_two_processes_train_as_one_does_with_twice_the_batch_and_one_goes_on_from_two(
    pictures: Path, tmp_path: Path
) -> None:
    losses = {
        "transformer": "null_text = 0.5\n",
        "clip": "decoded = 0.4\n",
        "upsampler": "crops = 2\ncrop_share = 0.5\ncoarse_share = 0.5\n",
        "vqgan": 'quantizer = "gumbel"\ndiscriminator_from = 5\ncrop = 16\ncrop_share = 0.5\n',
    }
    settings = write_small_settings(tmp_path, pictures, "warmup = 0\ndecay = 0.0\n", **losses)
    start = tmp_path / "start"
    for model in ("tokenizer", "vqgan"):
        train_model(model, start, settings[model], progress=False)
    shutil.rmtree(start / "runs")
    one, two = (shutil.copytree(start, tmp_path / name) for name in ("one", "two"))
    launch(1, one, tmp_path, 30, 4, *losses)
    launch(2, two, tmp_path, 20, 2, *losses)
    launch(1, two, tmp_path, 30, 4, *losses)
    for model in losses:
        runs = [folder / ("apart" if model == "vqgan" else "") / "runs" / model for folder in (one, two)]
        logs = [(run / "log.jsonl").read_text().splitlines() for run in runs]
        mine, theirs = ([json.loads(line)["loss"] for line in log] for log in logs)
        assert len(mine) == len({*mine}) == 3  # means of ten steps each
        # Rounding tips a code of the VQGAN here and there.
        assert mine == pytest.approx(theirs, rel=0, abs=2e-3 if model == "vqgan" else 1e-5)
        ends = [torch.load(run / "checkpoint.pt", weights_only=True) for run in runs]
        assert [(end["step"], end["seen"]) for end in ends] == [(30, 120)] * 2
        if model == "transformer":  # the others have biases that do nothing, which rounding alone moves
            for part in ("task", "averaged"):
                for name, value in ends[0][part].items():
                    torch.testing.assert_close(value, ends[1][part][name], rtol=0, atol=1e-5, msg=name)
