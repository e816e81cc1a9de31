"""`dall3 generate` and `dall3 upsample`: upstream's options and file names, and one-line errors."""

import errno
import io
import os
import re
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from dall3.cli import COMMANDS, main
from dall3.cli.generate import folder_names

PROMPT = "a girl with thick glasses. a girl wearing glasses"
FOLDER = "a_girl_with_thick_glasses._a_girl_wearing_glasses"


def generate_options(upstream_files):
    vqgan = upstream_files / "vqgan_gumbel_f8"
    return [
        *(
            "generate",
            "--dalle_path",
            str(upstream_files / "dalle-latest.pt"),
            "--bpe_path",
            str(upstream_files / "bpe.model"),
        ),
        *("--taming", "--vqgan_model_path", str(vqgan / "last.ckpt"), "--vqgan_config_path", str(vqgan / "model.yaml")),
        *("--clip_path", str(upstream_files / "ViT-B-16.pt"), "--device", "cpu"),
    ]


def upsample_options(upstream_files):
    return [
        *("upsample", "--model_path", str(upstream_files / "model-latest.pt"), "--vae_path"),
        *(
            str(upstream_files / "vqgan_gumbel_f8/last.ckpt"),
            "--model_config",
            str(upstream_files / "model-latest.json"),
        ),
        *("--clip_path", str(upstream_files / "ViT-B-16.pt"), "--timestep_respacing", "ddim4"),
    ]


@pytest.fixture(scope="module")
def outputs(upstream_files, tmp_path_factory):
    """The output folder of the command in upstream's README."""
    folder = tmp_path_factory.mktemp("outputs")
    options = ["--top_p", "0.85", "--temperature", "1.0", "--clip_sort", "--output_npy", "--num_images", "4"]
    assert main([*generate_options(upstream_files), *options, "--outputs_dir", str(folder), "--text", PROMPT]) == 0
    return folder


def test_upstreams_command_line_gives_four_ranked_images_and_their_tokens(outputs):
    names = sorted(path.name for path in (outputs / FOLDER).iterdir())
    pictures = [name for name in names if name.endswith(".png")]
    assert len(pictures) == 4 and len(names) == 8
    scores = [float(re.fullmatch(rf"{i}-(-?[\d.]+)\.png", name)[1]) for i, name in enumerate(pictures)]
    assert scores == sorted(scores, reverse=True)
    assert Image.open(outputs / FOLDER / pictures[0]).size == (128, 128)
    for i in range(4):
        tokens = np.load(outputs / FOLDER / f"{i}.npy")
        assert tokens.shape == (256,) and tokens.dtype == np.int64


def test_one_command_draws_several_prompts_and_refines_them(upstream_files, tmp_path):
    options = ["--num_images", "2", "--top_k", "0.9", "--outputs_dir", str(tmp_path), "A Cube|a cloud"]
    fine = [
        "--diffusion_path",
        str(upstream_files / "model-latest.pt"),
        "--model_config",
        str(upstream_files / "model-latest.json"),
    ]
    assert main([*generate_options(upstream_files), *options, *fine, "--timestep_respacing", "2"]) == 0
    for name, caption in (("a_cube", "a cube"), ("a_cloud", "a cloud")):
        assert (tmp_path / name / "caption.txt").read_text() == caption
        assert Image.open(tmp_path / name / "1.jpg").size == (128, 128)
        assert Image.open(tmp_path / name / "1-fine.png").size == (64, 64)


def test_a_prompt_stays_inside_the_outputs_folder(upstream_files, tmp_path):
    options = ["--num_images", "1", "--outputs_dir", str(tmp_path / "out"), "../a cube/of cloud"]
    assert main([*generate_options(upstream_files), *options]) == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["_._a_cube_of_cloud"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_folder_names_are_valid_on_every_system_and_duplicates_are_numbered():
    prompts = [
        "a cube",
        "a/cube",
        "A:CUBE",
        "a_cube-2",
        "what is *this*?",
        'a "red" <cube>|',
        "the end...",
        "nul",
        "com1.x",
    ]
    names = folder_names([*prompts, "..", "x" * 300, "é" * 300, "x" * 301])
    assert names[:4] == ["a_cube", "a_cube-2", "A_CUBE-3", "a_cube-2-2"]
    assert names[4:9] == ["what_is__this__", "a__red___cube__", "the_end___", "_nul", "_com1.x"]
    assert names[9] == "__" and names[10] == "x" * 100 and names[12] == "x" * 100 + "-2"
    assert all(len(name.encode()) <= 255 for name in names)
    for name in names:
        assert not re.search(r'[\\/:?*"<>|\s]|[. ]$', name) and name.split(".")[0].lower() not in ("nul", "com1")


def test_prompts_with_equal_folder_names_are_numbered(upstream_files, tmp_path):
    assert (
        main([*generate_options(upstream_files), "--num_images", "1", "--outputs_dir", str(tmp_path), "a cube|a/cube"])
        == 0
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a_cube", "a_cube-2"]
    assert (tmp_path / "a_cube-2/caption.txt").read_text() == "a/cube"


def test_a_full_disk_leaves_no_files_so_that_the_command_can_be_repeated(upstream_files, tmp_path, monkeypatch, capsys):
    command = [
        *generate_options(upstream_files),
        "--num_images",
        "2",
        "--outputs_dir",
        str(tmp_path / "a/out"),
        "a cube|a cone",
    ]
    written, save = [], Image.Image.save

    def full(image, path, *args, **how):
        written.append(path)
        if len(written) == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(image, path, *args, **how)

    monkeypatch.setattr(Image.Image, "save", full)
    assert main(command) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    assert main(command) == 0
    assert len(list(tmp_path.rglob("*.jpg"))) == 4


def test_letters_that_the_console_lacks_are_escaped(upstream_files, tmp_path, monkeypatch):
    console = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    monkeypatch.setattr(sys, "stdout", console)
    assert (
        main(
            [
                *generate_options(upstream_files),
                "--num_images",
                "1",
                "--outputs_dir",
                str(tmp_path),
                "ein würfel 立方体",
            ]
        )
        == 0
    )
    console.flush()
    assert b"ein_w\xfcrfel_\\u7acb" in console.buffer.getvalue()
    assert (tmp_path / "ein_würfel_立方体/0.jpg").exists()


def test_a_prompt_in_utf_8_works_in_the_c_locale(upstream_files, tmp_path):
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [*generate_options(upstream_files), "--num_images", "1", "--outputs_dir", str(tmp_path)]
    code = "import sys; from dall3.cli import main; sys.exit(main(sys.argv[1:]))"
    for prompt, code_expected, words in (
        ("ein würfel", 0, b""),
        (b"caf\xe9", 2, b"dall3: error: the prompt 'caf\\udce9' is not UTF-8 text\n"),
    ):
        done = subprocess.run([sys.executable, "-c", code, *command, prompt], env=environment, capture_output=True)
        assert done.returncode == code_expected and words in done.stderr, done.stderr
    assert (tmp_path / "ein_würfel/caption.txt").read_text("utf-8") == "ein würfel"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            Image.DecompressionBombError("too many\npixels"),
            "DecompressionBombError: too many pixels; --debug shows the traceback",
        ),
        (tarfile.ReadError("cut"), "ReadError: cut; --debug shows the traceback"),
        (
            ModuleNotFoundError("No module named 'gradio'", name="gradio"),
            "dall3 web needs gradio; run pip install 'dall3[web]'",
        ),
        (
            ImportError("cannot import name 'mount' from 'gradio'", name="gradio"),
            "dall3 web cannot run: cannot import name 'mount' from 'gradio'; run pip install 'dall3[web]'",
        ),
        (ValueError("no such thing"), "no such thing"),
        (AssertionError(), "AssertionError: ; --debug shows the traceback"),
    ],
)
def test_an_error_is_one_line_and_a_traceback_with_debug(error, words, monkeypatch, capsys):
    def fail(args):
        raise error

    monkeypatch.setitem(COMMANDS, "web", COMMANDS["web"]._replace(run=fail))
    assert main(["web"]) == 2
    assert capsys.readouterr().err == f"dall3: error: {words}\n"
    for command in (["web", "--debug"], ["--debug", "web"]):
        with pytest.raises(type(error)):
            main(command)


def test_gentxt_completes_the_prompt(upstream_files, tmp_path):
    options = ["--num_images", "1", "--gentxt", "--seed", "1", "--outputs_dir", str(tmp_path), "a cube"]
    assert main([*generate_options(upstream_files), *options]) == 0
    (folder,) = tmp_path.iterdir()
    assert (folder / "caption.txt").read_text().startswith("a cube")


def test_upsample_takes_tokens_or_a_picture(upstream_files, outputs, tmp_path):
    tokens = str(outputs / FOLDER / "0.npy")
    both = ["--outputs_dir", str(tmp_path / "tokens"), "--num_batches", "2", "--text", "a cube:2|a cloud"]
    assert main([*upsample_options(upstream_files), "--input", tokens, *both, "--clip_guidance"]) == 0
    pictures = [Image.open(tmp_path / "tokens" / f"progress_0000{i}.png") for i in range(2)]
    assert pictures[0].size == (64, 64) and pictures[0].tobytes() != pictures[1].tobytes()
    picture = str(next((outputs / FOLDER).glob("0-*.png")))
    assert (
        main([*upsample_options(upstream_files), "--input", picture, "--outputs_dir", str(tmp_path / "picture")]) == 0
    )
    assert Image.open(tmp_path / "picture/progress_00000.png").size == (64, 64)


def test_dvae_mode_is_checked(upstream_files, outputs, tmp_path, capsys):
    command = [*upsample_options(upstream_files), "--input", str(outputs / FOLDER / "0.npy"), "--dvae_mode"]
    assert main([*command, "--outputs_dir", str(tmp_path / "out")]) == 2
    assert "is not a DiscreteVAE" in capsys.readouterr().err


def test_nothing_is_overwritten_unless_asked(upstream_files, outputs, tmp_path, capsys):
    command = [
        *upsample_options(upstream_files),
        "--input",
        str(outputs / FOLDER / "0.npy"),
        "--outputs_dir",
        str(tmp_path),
    ]
    (tmp_path / "progress_00000.png").write_bytes(b"mine")
    assert main(command) == 2
    assert "already holds progress_00000.png" in capsys.readouterr().err
    assert (tmp_path / "progress_00000.png").read_bytes() == b"mine"
    assert main([*command, "--overwrite"]) == 0
    assert Image.open(tmp_path / "progress_00000.png").size == (64, 64)
    again = [
        *generate_options(upstream_files),
        "--num_images",
        "1",
        "--output_npy",
        "--outputs_dir",
        str(outputs),
        PROMPT,
    ]
    assert main(again) == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([""], "an empty prompt"),
        (["a cube||a cloud"], "an empty prompt"),
        (["a cube " * 30], "shorten it, or pass truncate=True"),
        (["a cube", "--top_p", "1.5"], "top_p=1.5; expected"),
        (["a cube", "--temperature", "-1"], "temperature=-1.0; expected"),
        (["a cube", "--num_images", "0"], "num_images=0; expected"),
        (["a cube", "--dalle_path", "{upstream_files}"], "is a folder; expected a checkpoint file"),
        (["a cube", "--dalle_path", "{upstream_files}/nothing.pt"], "does not exist"),
        (
            ["a cube", "--dalle_path", "{upstream_files}/model-latest.pt"],
            "contains a UNet of guided-diffusion; expected a DALL·E",
        ),
        (["a cube", "--vqgan_model_path", "{upstream_files}/dalle-latest.pt"], "expected a VQGAN"),
        (["a cube", "--bpe_path", "{upstream_files}/model-latest.pt"], "not a tokenizer"),
        (["a cube", "--clip_sort", "--clip_path", "{upstream_files}/bpe.model"], "bpe.model"),
        (["a cube", "--clip_sort", "--clip_path", "ViT-Z/nobody"], "ViT-Z/nobody: neither a file nor a model"),
        (["a cube", "--chinese", "--bpe_path", ""], "vocab.txt"),
        (["a cube", "--hug"], "--hug needs"),
        (["a cube|a cube"], "the same prompt twice"),
        (["a cube", "--device", "nowhere"], "nowhere"),
        (["a cube", "--seed", "-1"], "seed=-1; expected"),
        (["a cube", "--num_candidates", "0"], "num_candidates=0; expected"),
        (["a cube", "--clip_guidance"], "--clip_guidance guides the denoising"),
        (["a cube " * 30, "--gentxt"], "pass truncate=True"),
    ],
)
def test_bad_input_to_generate_is_a_one_line_error_before_any_work(upstream_files, tmp_path, capsys, options, words):
    options = [option.replace("{upstream_files}", str(upstream_files)) for option in options]
    assert main([*generate_options(upstream_files), "--outputs_dir", str(tmp_path / "out"), *options]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and error.startswith("dall3: error: ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("tokens.npy", np.arange(255), "expected int64 (n, side²)"),
        ("tokens.npy", np.full(256, 9999), "tokens run from 9999 to 9999; this vqgan has codes 0 to 255"),
        ("tokens.npy", np.zeros((4, 256), dtype=np.int64), "holds int64 (4, 256); expected int64 (256,)"),
        ("tokens.npy", np.zeros(225, dtype=np.int64), "225 tokens; expected a square with an even side"),
        ("tokens.npy", np.zeros(256), "holds float64 (256,); expected int64 (256,)"),
        ("tokens.npy", b"\x93NUMPY\x01\x00", "not a .npy of image tokens"),
        ("picture.png", b"\x89PNG\r\n\x1a\n broken", "not a readable image"),
        ("picture.png", None, "No such file"),
    ],
)
def test_bad_input_to_upsample_is_a_one_line_error(upstream_files, tmp_path, capsys, name, content, words):
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    elif content is not None:
        np.save(tmp_path / name, content)
    command = [
        *upsample_options(upstream_files),
        "--input",
        str(tmp_path / name),
        "--outputs_dir",
        str(tmp_path / "out"),
    ]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_truncated_checkpoint_is_a_one_line_error(upstream_files, tmp_path, capsys):
    whole = (upstream_files / "model-latest.pt").read_bytes()
    (tmp_path / "half.pt").write_bytes(whole[: len(whole) // 2])
    torch.save([1, 2], tmp_path / "list.pt")
    np.save(tmp_path / "0.npy", np.zeros(256, dtype=np.int64))
    for name, words in (("half.pt", "truncated or damaged"), ("list.pt", "holds list")):
        command = [
            *upsample_options(upstream_files),
            "--input",
            str(tmp_path / "0.npy"),
            "--model_path",
            str(tmp_path / name),
        ]
        assert main([*command, "--outputs_dir", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert words in error and name in error and error.count("\n") == 1


def test_the_command_is_installed_and_importing_the_package_imports_nothing_heavy():
    code = "import sys, dall3; print(sorted({'torch', 'numpy', 'PIL', 'open_clip', 'diffusers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
    code = "import sys, dall3.pipeline; print(sorted({'open_clip', 'diffusers', 'tokenizers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
