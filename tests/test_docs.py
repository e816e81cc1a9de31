"""Every docstring example of the public names runs offline and prints what the docstring shows."""

import doctest
import inspect
import socket

import pytest

import dall3
from dall3 import batch, estimate, images, loading, output, parts, pipeline, request, wall
from dall3.batch import prompts
from dall3.diffusion import denoising, schedule
from dall3.models import clip, dalle_mini, rudalle, transformer, unet, vqgan
from dall3.output import Preview
from dall3.text import load, rules
from dall3.tokens import sampling
from dall3.weights import registry

PUBLIC = [getattr(dall3, name) for name in dall3.__all__ if name[0] != "_"] + [Preview]
FROM_ELSEWHERE = {"from_checkpoints", "push_to_hub"}  # these need files of 2021, or the internet


def public_functions(owner):
    """A public class and its public methods, by name."""
    found = {owner.__name__: owner}
    for name, member in vars(owner).items():
        if not name.startswith("_") and (inspect.isfunction(member) or isinstance(member, classmethod | property)):
            found[f"{owner.__name__}.{name}"] = getattr(member, "fget", getattr(member, "__func__", member))
    return found


PUBLIC_MODULES = (images, output, loading, parts, pipeline, request, wall, estimate, batch, prompts)
NETWORKS = (clip, dalle_mini, rudalle, transformer, unet, vqgan)
EXAMPLES = {
    test.name: test
    for module in (*PUBLIC_MODULES, *NETWORKS, denoising, schedule, load, rules, sampling, registry)
    for test in doctest.DocTestFinder(exclude_empty=True).find(module)
    if test.examples
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_example_prints_what_its_docstring_shows(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket.socket, "connect", lambda *args: pytest.fail("went to the network"))
    failed = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(EXAMPLES[name], out=print).failed
    assert not failed


def test_every_public_name_has_a_docstring_and_the_pipelines_methods_have_examples():
    for owner in PUBLIC:
        for name, function in public_functions(owner).items():
            if owner.__module__.startswith("dall3"):
                assert function.__doc__, f"{name} has no docstring"
    methods = public_functions(dall3.Dall3Pipeline).keys() - {f"Dall3Pipeline.{name}" for name in FROM_ELSEWHERE}
    without = {name for name in methods if f"dall3.pipeline.{name}" not in EXAMPLES}
    assert without <= {"Dall3Pipeline.clip", "Dall3Pipeline.device"}
