"""The same seed and settings give the same image from Python, from the command and from the page."""

import argparse
import inspect
import re

import pytest
from PIL import Image

from dall3.batch import generate
from dall3.cli import main, make_parser
from dall3.diffusion.denoising import Denoising
from dall3.tokens.sampling import Sampling
from dall3.web import Limits, make_page

from conftest import load_upstream_files

PROMPT = "a red cube"


@pytest.mark.parametrize("with_defaults", [True, False])
def test_python_the_command_and_the_page_give_the_same_images(with_defaults, upstream_files, tmp_path):
    """with_defaults: whether the weights have default settings of sampling, steps and guidance."""
    pipe = load_upstream_files(upstream_files)
    defaults = {"num_inference_steps": 3, "cond_scale": 2.0, "top_p": 0.9, "clip_guidance_scale": 500.0}
    pipe.defaults = defaults if with_defaults else {}
    weights = pipe.save_pretrained(tmp_path / "weights")
    steps = {} if with_defaults else {"num_inference_steps": 3}  # the defaults would take too long
    expected = pipe(PROMPT, 1, 2, seed=7, progress=False, **steps)

    options = ["--num_images", "1", "--num_candidates", "2", "--seed", "7", "--device", "cpu"]
    options += [f"--{name}={value}" for name, value in steps.items()]
    assert main(["generate", PROMPT, "--weights", str(weights), "--outputs_dir", str(tmp_path), *options]) == 0
    with Image.open(tmp_path / "a_red_cube/0-fine.png") as image:
        assert image.tobytes() == expected.images[0].tobytes()

    page = make_page(pipe, Limits())
    shown = {getattr(block, "label", None): block.value for block in page.blocks.values() if hasattr(block, "value")}
    (draw,) = {f.fn for f in page.fns.values() if getattr(f.fn, "__name__", "") == "draw"}
    if not with_defaults:
        assert shown["Denoising steps"] == Denoising().num_inference_steps and shown["CLIP guidance"] == 1000
    files = {}
    for _, _, _, files, *_ in draw(PROMPT, 7, 1, 2, 3, shown["CLIP guidance"], None, 0.5):
        if files.get("value"):  # the last update; its files are deleted after it
            with Image.open(files["value"][0]) as image:
                assert image.tobytes() == expected.images[0].tobytes()
    assert files["value"]


def defaults_in_help(command):
    """The default values in the help of a command, by the option's name."""
    (commands,) = (a for a in make_parser()._actions if isinstance(a, argparse._SubParsersAction))
    actions = commands.choices[command]._actions
    found = {
        action.dest: re.search(r"default: (?:the weights' setting, or )?([\d.]+)\b", action.help or "")
        for action in actions
    }
    given = {action.dest for action in actions if action.default not in (None, False, argparse.SUPPRESS)}
    return {name: float(match[1]) for name, match in found.items() if match and name not in given}


def test_the_defaults_in_the_help_are_those_of_the_library():
    batch = {name: p.default for name, p in inspect.signature(generate).parameters.items()}
    settings = {"timestep_respacing": Denoising().num_inference_steps, "clip_guidance_scale": 1000}
    known = vars(Sampling()) | vars(Denoising()) | settings
    limits = {f"max_{name}": value for name, value in vars(Limits()).items()}
    for command, expected in (("generate", known), ("upsample", known), ("batch", batch | known), ("web", limits)):
        said = defaults_in_help(command)
        said.pop("refine_batch_size", None)  # depends on the device
        assert len(said) >= 3 and said == {name: expected[name] for name in said}, command
