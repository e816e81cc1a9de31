"""Results of a call: comparison, and files that are written completely or not at all."""

import dataclasses
import io
import resource
import signal

import numpy as np
import pytest
import torch
from PIL import Image

from dall3 import Dall3Output
from dall3.output import read_tokens, write_files


@pytest.fixture
def out():
    images = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    tokens = torch.arange(8).reshape(2, 4)
    return Dall3Output("a cube", images, images, tokens, torch.tensor([0.5, 0.25]), torch.arange(2), {"seed": 3})


def test_outputs_are_equal_if_all_their_fields_are(out):
    assert out == out[:] and out[0] != out[1] and out != "a cube"
    changes = dict(prompt="a cone", images=out.images[::-1], tokens=out.tokens + 1, clip_scores=None)
    changes |= dict(candidates=out.candidates + 1, settings={"seed": 4}, coarse_images=[])
    for name, value in changes.items():
        assert dataclasses.replace(out, **{name: value}) != out
    with pytest.raises(TypeError, match="unhashable"):
        hash(out)


def test_a_saved_result_is_loaded_as_it_was(out, tmp_path):
    out.save(tmp_path)
    assert Dall3Output.load(tmp_path / "1.png") == dataclasses.replace(out[1], coarse_images=[])


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_full_disk_leaves_everything_as_it_was(out, tmp_path, overwrite):
    folder = tmp_path / "new/pictures"
    if overwrite:
        out.save(folder)
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    large = dataclasses.replace(out, prompt="b", tokens=torch.zeros(2, 10**6, dtype=torch.int64))
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4 * 10**6, limits[1]))
    try:
        with pytest.raises(OSError):
            large.save(folder, overwrite)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")} == before
    assert sorted(path.name for path in large.save(folder, overwrite).iterdir())[0] == "0.npy"


def npy(header, data=b""):
    text = header.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + data


def saved(value, write=np.save):
    buffer = io.BytesIO()
    write(buffer, value)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (saved(np.zeros(256, np.int64), np.savez), "not a .npy of image tokens"),
        (saved(np.array(5)), r"holds int64 \(\); expected int64 \(256,\)"),
        (saved(np.zeros(0, np.int64)), r"holds int64 \(0,\)"),
        (saved(np.zeros((0, 0), np.int64)), r"holds int64 \(0, 0\)"),
        (saved(np.array([{}], object)), "not a .npy of image tokens"),
        (saved(np.zeros(4, bool)), "holds bool"),
        (saved(np.zeros((8, 8, 3), np.uint8)), r"holds uint8 \(8, 8, 3\)"),
        (npy("{'descr': '<i8', 'fortran_order': False, 'shape': (256,"), "not a .npy of image tokens"),
        (npy("{'descr': '<i8', 'fortran_order': False, 'shape': (10**12,), }"), "not a .npy of image tokens"),
        (npy("{'descr': '<i8', 'fortran_order': False, 'shape': (1000000000000,), }"), "not a .npy of image tokens"),
        (npy("{'descr': '<i8', 'fortran_order': False, 'shape': (256,), }", bytes(8)), "not a .npy of image tokens"),
        (b"", "not a .npy of image tokens"),
    ],
)
def test_a_file_without_tokens_is_a_one_line_error(tmp_path, content, words):
    (tmp_path / "a.npy").write_bytes(content)
    with pytest.raises(ValueError, match=rf"a\.npy: {words}") as error:
        read_tokens(tmp_path / "a.npy")
    assert "\n" not in str(error.value)


def test_tokens_of_any_integer_dtype_are_read(out, tmp_path):
    for kind in (np.int64, np.uint16, np.uint8, ">i4"):
        write_files(tmp_path, {"a.npy": np.arange(4).astype(kind)}, overwrite=True)
        assert read_tokens(tmp_path / "a.npy").tolist() == [[0, 1, 2, 3]]
    with pytest.raises(FileNotFoundError):
        read_tokens(tmp_path / "none.npy")
