"""Every entry point for images follows the same rules and opens only the six formats."""

import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image, ImageFile

import dall3
from dall3 import Dall3Output, Dall3Pipeline
from dall3.cli import main
from dall3.images import MAX_PIXELS, UPRIGHT, open_image, read_rgb, to_pil, to_tensor
from dall3.training.data import Mixture

PROMPT = "a red cube"
EPS = b"""%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 8 8
%%EndComments
{} loop
"""


@pytest.fixture(scope="module")
def pipe():
    return Dall3Pipeline.from_pretrained()


def saved(image, kind="PNG", **how):
    """The content of an image file."""
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **how)
    return buffer.getvalue()


def entry_points(pipe, path, folder):
    """Every entry point for image files by name: functions that open the file at `path`."""
    how = dict(progress=False, seed=0, num_inference_steps=1)

    def train(kind):
        place = folder / kind
        place.mkdir(exist_ok=True)
        (place / "a.png").write_bytes(path.read_bytes())
        (place / "a.txt").write_text("a cube")
        with tarfile.open(folder / "shard.tar", "w") as tar:
            tar.add(place / "a.png", "a.png")
            tar.add(place / "a.txt", "a.txt")
        return Mixture([f"folder:{place}" if kind == "folder" else f"webdataset:{folder}/shard.tar"], 16)[0]

    def command(*options):
        if main(["upsample", "--outputs_dir", str(folder / "out"), "--weights", str(BUNDLED), *options]):
            raise ValueError("the command failed")

    return {
        "init_image": lambda: pipe.generate_tokens(PROMPT, init_image=path, progress=False),
        "variations": lambda: pipe.variations(path, PROMPT, 1, **how),
        "upsample": lambda: pipe.upsample(image=path, **how),
        "rank": lambda: pipe.rank([path], PROMPT, progress=False),
        "image_prompts": lambda: pipe.upsample(
            image=torch.zeros(3, 64, 64), image_prompts=[(path, 1)], clip_guidance_scale=1, **how
        ),
        "load": lambda: Dall3Output.load(path),
        "repeat": lambda: pipe.repeat(path, progress=False),
        "a training folder": lambda: train("folder"),
        "a training shard": lambda: train("shards"),
        "--input": lambda: command("--input", str(path), "--timestep_respacing", "1"),
        "--image_prompts": lambda: command("--input", str(folder / "white.png"), "--image_prompts", str(path)),
    }


BUNDLED = Path(dall3.__file__).parent / "mini"


@pytest.mark.parametrize("hostile", ["eps", "large"])
def test_no_entry_point_runs_ghostscript_or_decodes_too_large_images(pipe, tmp_path, monkeypatch, hostile):
    mark, tools = tmp_path / "ran", tmp_path / "bin"
    tools.mkdir()
    (tools / "gs").write_text(f"#!/bin/sh\ntouch {mark}\n")
    (tools / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tools), prepend=os.pathsep)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # Pillow looks for Ghostscript once
    path = tmp_path / "hostile.png"
    Image.new("RGB", (8, 8), "white").save(tmp_path / "white.png")
    if hostile == "eps":
        path.write_bytes(EPS)
        with pytest.raises(OSError), Image.open(path) as image:
            image.load()
        assert mark.exists()  # Pillow alone does run it
        mark.unlink()
    else:
        path.write_bytes(saved(Image.new("1", (8192, 8193))))
        load = ImageFile.ImageFile.load
        monkeypatch.setattr(
            ImageFile.ImageFile, "load", lambda image: load(image) if image.width < 99 else pytest.fail("decoded")
        )
    for name, enter in entry_points(pipe, path, tmp_path).items():
        with pytest.raises(ValueError):
            enter()
            pytest.fail(f"{name} took it")
    assert not mark.exists()


def test_only_images_py_opens_images():
    sources = [path for path in Path(dall3.__file__).parent.rglob("*.py") if path.name != "images.py"]
    assert [path.name for path in sources if "Image.open(" in path.read_text(encoding="utf-8")] == []


RAMP = np.tile(np.linspace(0, 65535, 64).astype(np.uint16), (64, 1))


@pytest.mark.parametrize(
    ("image", "kind", "mean"),
    [
        (Image.fromarray(RAMP), "PNG", 0.5),
        (Image.fromarray(RAMP), "TIFF", 0.5),
        (Image.fromarray(RAMP.astype(">u2")), "TIFF", 0.5),
        (Image.fromarray((RAMP / 65535).astype(np.float32)), "TIFF", 0.5),
        (Image.new("RGBA", (64, 64), (0, 0, 0, 0)), "PNG", 1.0),
        (Image.new("RGBA", (64, 64), (0, 0, 0, 0)), "WEBP", 1.0),
        (Image.new("RGBA", (64, 64), (0, 0, 0, 51)), "PNG", 0.8),
        (Image.new("LA", (64, 64), (0, 0)), "PNG", 1.0),
        (Image.new("L", (64, 64), 128), "JPEG", 128 / 255),
        (Image.new("CMYK", (64, 64), (0, 0, 0, 255)), "JPEG", 0.0),
        (Image.new("1", (64, 64), 1), "BMP", 1.0),
        (Image.new("P", (64, 64), 0), "GIF", 0.0),
    ],
)
def test_bit_depth_and_transparency_are_read_alike_at_every_entry_point(pipe, tmp_path, image, kind, mean):
    path = tmp_path / "picture.png"
    path.write_bytes(saved(image, kind, **({"lossless": True} if kind == "WEBP" else {})))
    with Image.open(path) as opened:
        ways = {"path": to_tensor(path), "PIL": to_tensor(opened), "bytes": to_tensor(path.read_bytes())}
    for tensor in ways.values():
        assert tensor.shape == (1, 3, 64, 64) and tensor.dtype == torch.float32
        assert abs(tensor.mean() - mean) < 0.01 and torch.equal(tensor, ways["path"])
    (tmp_path / "picture.txt").write_text("a picture")
    trained, _ = Mixture([f"folder:{tmp_path}"], 64)[0]
    assert torch.equal(trained, (ways["path"][0] * 255).round().to(torch.uint8))
    assert torch.equal(pipe.encode(ways["path"]), pipe.encode(to_tensor([path])))


def test_the_transparent_value_of_a_palette_or_a_grey_picture_is_white(tmp_path):
    for image in (Image.new("P", (4, 4), 0), Image.new("L", (4, 4), 0), Image.fromarray(np.zeros((4, 4), np.uint16))):
        assert to_tensor(saved(image, "PNG", transparency=0)).min() == 1
        assert to_tensor(saved(image, "PNG", transparency=1)).max() == 0


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_images_are_rotated_upright(kind, orientation):
    upright = Image.new("L", (16, 32), 0)
    upright.paste(255, (0, 0, 16, 8))  # white above
    upright.paste(128, (0, 24, 8, 32))  # grey below, on the left
    undo = {2: 2, 3: 3, 4: 4, 5: 5, 6: 8, 7: 7, 8: 6}[orientation]
    stored, exif = upright.transpose(UPRIGHT[undo]), Image.Exif()
    exif[0x0112] = orientation
    data = saved(stored.convert("RGB"), kind, exif=exif, **({} if kind == "TIFF" else {"quality": 95}))
    seen = to_tensor(data)[0, 0]
    assert seen.shape == (32, 16)
    assert seen[:7].min() > 0.9 and 0.4 < seen[26:, :6].mean() < 0.6 and seen[26:, 10:].max() < 0.1


def test_damaged_exif_data_does_not_hide_the_picture():
    data = saved(Image.new("RGB", (8, 8), "white"), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xffbroken")
    assert to_tensor(data).min() > 0.99


def twelve_bits():
    """A TIFF of 2×1 pixels with 12 bits each: black and white."""
    entries = [(256, 2), (257, 1), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1), (278, 1), (279, 3)]
    directory = b"".join(
        tag.to_bytes(2, "little") + b"\x03\0\x01\0\0\0" + value.to_bytes(4, "little") for tag, value in entries
    )
    head = b"II*\0" + (12).to_bytes(4, "little") + b"\x00\x0f\xff\0"
    return head + len(entries).to_bytes(2, "little") + directory + bytes(4)


def test_twelve_bits_are_scaled_from_their_own_range():
    assert to_tensor(twelve_bits())[0, :, 0].tolist() == [[0, 1]] * 3


@pytest.mark.parametrize(
    "images",
    [
        torch.rand(3, 6, 8),
        torch.rand(2, 3, 6, 8),
        torch.rand(2, 3, 6, 8, dtype=torch.float64),
        torch.rand(6, 8, 3),
        (torch.rand(3, 6, 8) * 255).to(torch.uint8),
        np.random.default_rng(0).random((6, 8, 3)),
        np.random.default_rng(0).random((2, 3, 6, 8)).astype(">f4"),
        np.random.default_rng(0).integers(0, 256, (6, 8, 3)).astype(np.uint8),
        np.random.default_rng(0).integers(0, 256, (2, 6, 8, 3)).astype(np.uint8),
        np.random.default_rng(0).integers(0, 256, (6, 8, 3)).astype(np.uint8)[::-1, :, ::-1],
    ],
)
def test_arrays_and_tensors_of_every_order_are_the_same_picture(images):
    values = images.numpy() if isinstance(images, torch.Tensor) else images
    expected = torch.from_numpy(np.array(values, np.float64, order="C"))
    expected = expected / 255 if images.dtype in (torch.uint8, np.uint8) else expected
    expected = expected if expected.ndim == 4 else expected[None]
    expected = expected if expected.shape[1] == 3 else expected.permute(0, 3, 1, 2)
    assert torch.allclose(to_tensor(images).double(), expected, atol=1e-6)
    again = to_tensor(to_pil(to_tensor(images)))
    assert again.shape == expected.shape and (again - expected).abs().max() <= 0.5 / 255 + 1e-6


def test_a_list_may_mix_kinds_but_not_sizes(tmp_path):
    white = Image.new("RGB", (8, 6), "white")
    white.save(tmp_path / "white.png")
    mixed = [white, np.full((6, 8, 3), 255, np.uint8), torch.ones(3, 6, 8), str(tmp_path / "white.png")]
    assert torch.equal(to_tensor(mixed), torch.ones(4, 3, 6, 8))
    with pytest.raises(ValueError, match="several sizes"):
        to_tensor([white, torch.ones(3, 8, 6)])


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (torch.zeros(1, 4, 8, 8), r"float32 \(1, 4, 8, 8\); expected float in \[0, 1\] or uint8"),
        (np.zeros((8, 8), np.uint8), r"uint8 \(8, 8\)"),
        (np.zeros((8, 8, 3), np.uint16), r"uint16 \(8, 8, 3\)"),
        (np.zeros((8, 8, 3), object), r"object \(8, 8, 3\)"),
        (torch.zeros(0, 3, 8, 8), r"\(0, 3, 8, 8\)"),
        (torch.zeros(3, 8, 3), "either 3 may be the channels"),
        (torch.full((3, 8, 8), 255.0), r"run from 255 to 255; expected values in \[0, 1\]"),
        (torch.full((3, 8, 8), float("nan")), "run from nan"),
        ([], "an empty list"),
        ([[torch.zeros(3, 8, 8)]], "a list of lists"),
        (5, "int is not an image"),
        (Image.fromarray(np.full((4, 4), 7, np.int32)), "32-bit integer pixels"),
        (Image.fromarray(np.full((4, 4), 7, np.float32)), r"floating point pixels from 7 to 7; expected values in"),
        (b"", "the image: not a readable image"),
        (saved(Image.new("RGB", (64, 64), "red"), "JPEG")[:300], r"not a readable image.*OSError"),
        (saved(Image.new("RGB", (8, 8)), "PPM"), "expected a PNG, JPEG, WebP, GIF, BMP or TIFF"),
    ],
)
def test_other_inputs_are_refused_by_their_type(images, words):
    with pytest.raises(ValueError, match=words):
        to_tensor(images)


def test_errors_name_the_file(tmp_path):
    (tmp_path / "page.jpg").write_text("<html>404</html>")
    with pytest.raises(ValueError, match=r"page\.jpg: not a readable image"):
        read_rgb(tmp_path / "page.jpg")
    with pytest.raises(ValueError, match=r"row 7 has 8×8 pixels; expected at most 63"):
        read_rgb(saved(Image.new("RGB", (8, 8))), "row 7", 63)
    with pytest.raises(FileNotFoundError, match=r"none\.png"):
        read_rgb(tmp_path / "none.png")
    for data in (saved(Image.new("RGB", (8, 8)), "PNG")[:-30], b"\x89PNG\r\n\x1a\n" + bytes(40)):
        with pytest.raises(ValueError, match=r"^a\.png: not a readable image"):
            open_image(data, "a.png")


def test_a_file_is_read_from_its_path_its_content_or_open(tmp_path):
    path = tmp_path / "red.png"
    Image.new("RGB", (4, 4), "red").save(path)
    with path.open("rb") as file:
        for source in (path, str(path), path.read_bytes(), file):
            assert read_rgb(source).getpixel((0, 0)) == (255, 0, 0)


def test_the_memory_that_a_large_picture_takes_is_bounded(tmp_path):
    sides = [12_000, 15_000, int(MAX_PIXELS**0.5)]
    for side in sides:
        Image.new("1", (side, side)).save(tmp_path / f"{side}.png")
    code = (
        "import resource, sys, warnings; warnings.simplefilter('ignore')\n"
        "from dall3.images import to_tensor\n"
        "used = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10\n"
        "before = used()\n"
        "for path in sys.argv[1:]:\n"
        "    try:\n        print(tuple(to_tensor(path).shape), end=' ')\n"
        "    except ValueError as error:\n        print(error, end=' ')\n"
        "    print(used() - before)\n"
    )
    command = [sys.executable, "-c", code, *(str(tmp_path / f"{side}.png") for side in sides)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    said, grown = zip(*(line.rsplit(" ", 1) for line in lines), strict=True)
    assert "12000×12000 pixels; expected at most" in said[0] and "too many pixels" in said[1]
    assert said[2] == f"(1, 3, {sides[2]}, {sides[2]})"
    assert int(grown[1]) < 30 and int(grown[2]) < 1700  # MiB


def test_tokens_of_any_integer_dtype_are_decoded(pipe):
    expected = pipe.decode_tokens(torch.arange(256))
    for kind in (np.uint8, np.uint16, np.int32, np.uint64):
        assert torch.equal(pipe.decode_tokens(np.arange(256).astype(kind)), expected)
