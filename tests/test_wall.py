"""Walls of candidates: the chosen ones are refined as in one call."""

import json
import shutil

import pytest
import torch
from PIL import Image

from dall3 import Dall3Output, Dall3Pipeline, Wall
from dall3.cli import main

from conftest import load_upstream_files

CALL = dict(num_inference_steps=2, clip_guidance_scale=0.0, progress=False)
GUIDED = dict(num_inference_steps=2, cutn=2, progress=False)
DRAWN = dict(seed=4, batch_size=4)


@pytest.fixture(scope="module")
def pipe(upstream_files):
    """A pipeline with all parts, as small networks with generated weights."""
    return load_upstream_files(upstream_files)


@pytest.fixture(scope="module")
def wall(pipe):
    return pipe.draw("a red cube", 6, **DRAWN, progress=False)


def test_the_images_chosen_are_those_of_the_one_call_to_the_bit(pipe, wall, tmp_path):
    call = pipe("a red cube", 2, 6, **DRAWN, **GUIDED)
    assert wall.best(2).numbers == tuple(call.candidates.tolist())
    assert pipe.refine(wall[call.candidates.tolist()], **GUIDED) == call
    loaded = Wall.load(wall.save(tmp_path / "wall"))
    assert pipe.refine(loaded.best(2), **GUIDED) == call


def test_other_chosen_images_have_the_noise_of_their_rank_and_repeat(pipe, wall, tmp_path):
    out = pipe.refine(wall[5, 0], seamless=True, **CALL)
    folder = out.save(tmp_path)
    for place in (0, 1):
        assert pipe.repeat(folder / f"{place}.png", progress=False).images == [out.images[place]]
    alone = Dall3Pipeline(**pipe.components | {"clip": None})
    alone.defaults = pipe.defaults
    unscored = alone.draw("a red cube", 6, **DRAWN, progress=False)
    assert unscored.clip_scores is None and torch.equal(unscored.tokens, wall.tokens)
    out = alone.refine(unscored[5], **CALL)
    assert alone.repeat(out, progress=False) == out
    with pytest.raises(ValueError, match="no CLIP scores; choose by eye"):
        unscored.best(1)


def test_a_wall_keeps_generators_regions_and_negative_prompts(pipe):
    generators = [torch.Generator().manual_seed(k) for k in (7, 8)]
    start = dict(
        init_image=torch.zeros(256, dtype=torch.int64), keep_rows=8, negative_prompt="a sphere", guidance_scale=2.0
    )
    both = pipe.draw("a cube", 2, generator=generators, **start, progress=False)
    generators = [torch.Generator().manual_seed(k) for k in (7, 8)]
    call = pipe("a cube", 2, generator=generators, **start, **CALL)
    assert torch.equal(both.tokens[:, :128], torch.zeros(2, 128, dtype=torch.int64))
    order = call.candidates.tolist()
    assert pipe.refine(both[order], **CALL) == call


def test_a_wall_is_indexed_by_the_numbers_shown(wall):
    assert len(wall) == 6 and [one.numbers for one in wall[4, 1]] == [(4,), (1,)]
    assert wall[4, 1][1].images == [wall.images[1]] and torch.equal(wall[4, 1].tokens, wall.tokens[[4, 1]])
    with pytest.raises(IndexError, match="no image 6 on this wall; it shows"):
        wall[6]
    with pytest.raises(IndexError, match="no image -1"):
        wall[-1]
    with pytest.raises(ValueError, match="names an image twice"):
        wall[1, 1]
    for odd in ("3", 1.0, (), True, slice(2)):
        with pytest.raises(TypeError, match="expected numbers that it shows"):
            wall[odd]


def test_a_notebook_shows_each_image_with_its_number(wall):
    data = wall._repr_png_()
    assert data.startswith(b"\x89PNG")
    sheet, other = wall.grid(), Wall("a", wall.images, wall.tokens, None, {}, range(5, -1, -1)).grid()
    assert sheet.size == (3 * 196 - 4, 2 * 196 - 4)
    corner = (0, 0, 20, 20)
    corners = {sheet.crop((left, top, left + 20, top + 20)).tobytes() for left in (0, 196, 392) for top in (0, 196)}
    assert len(corners) == 6 and sheet.crop(corner).tobytes() != other.crop(corner).tobytes()


def test_what_cannot_be_refined_is_an_error_before_any_work(pipe, wall, monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("work began")

    monkeypatch.setattr("dall3.wall.draw", fail)
    monkeypatch.setattr("dall3.wall.decode_in_batches", fail)
    with pytest.raises(TypeError, match=r"draw\(\) got an unexpected keyword argument 'num_inference_step'"):
        pipe.draw("a cube", 4, num_inference_step=3)
    with pytest.raises(ValueError, match="num_candidates=0"):
        pipe.draw("a cube", 0)
    with pytest.raises(TypeError, match=r"refine\(\) got an unexpected keyword argument 'seed'"):
        pipe.refine(wall[1], seed=3)
    with pytest.raises(ValueError, match="num_inference_steps|steps"):
        pipe.refine(wall[1], num_inference_steps=0)
    with pytest.raises(TypeError, match="expected a Wall"):
        pipe.refine([wall.images[0]])
    with pytest.raises(ValueError, match="tokens run from"):
        pipe.refine(Wall("a", wall.images, wall.tokens + 2000, None, wall.settings)[1])
    with pytest.raises(ValueError, match="wall's settings lack seed"):
        pipe.refine(Wall("a", wall.images, wall.tokens, None, {**wall.settings, "seed": None})[1])


def test_a_wall_of_other_weights_gives_a_warning(pipe, wall):
    other = Wall(wall.prompt, wall.images, wall.tokens, None, wall.settings | {"weights": {"vqgan": "0123"}})
    with pytest.warns(UserWarning, match="the vqgan of this pipeline has the hash '.*'; the wall was made with '0123'"):
        pipe.refine(other[0], **CALL)


ODD = [None, "x", -1, 1.5, 10**30, True, [1], {"a": 1}, "\ud800"]


@pytest.mark.parametrize("name", ["prompt", "numbers", "clip_scores", "settings", *["seed", "kept", "batch_size", "a"]])
def test_an_untrusted_wall_is_loaded_or_refused(pipe, wall, tmp_path, name, monkeypatch):
    monkeypatch.setattr("dall3.wall.refine_wall", lambda *args: iter(()))
    folder = wall.save(tmp_path / "wall")
    good = json.loads((folder / "wall.json").read_text())
    for odd in ODD:
        wrong = good | {name: odd} if name in good else good | {"settings": good["settings"] | {name: odd}}
        (folder / "wall.json").write_text(json.dumps(wrong))
        try:
            pipe.refine(Wall.load(folder))
        except (ValueError, TypeError) as error:
            assert "wall" in str(error) or "recipe" in str(error) or name in str(error), (odd, error)
    (folder / "wall.json").write_text("[" * 10**5)
    with pytest.raises(ValueError, match="the wall is damaged"):
        Wall.load(folder)
    shutil.rmtree(folder)
    with pytest.raises(FileNotFoundError, match="holds no wall.json"):
        Wall.load(folder)


def test_the_command_draws_a_wall_and_refines_what_is_picked_later(pipe, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    weights = ["--weights", str(pipe.save_pretrained(tmp_path / "weights")), "--device", "cpu"]
    steps = ["--timestep_respacing", "2", "--clip_guidance_scale", "0"]
    draw = ["generate", "a red cube", "--num_images", "6", "--batch_size", "4", "--seed", "4", *weights]
    assert main([*draw, "--wall"]) == 0
    folder = tmp_path / "outputs/a_red_cube/wall"
    with Image.open(folder / "wall.png") as sheet:
        assert sheet.size == (3 * 196 - 4, 2 * 196 - 4)
    assert main(["upsample", "--input", str(folder), "--pick", "5,0", *weights, *steps]) == 0
    call = pipe.refine(pipe.draw("a red cube", 6, **DRAWN, progress=False)[5, 0], **CALL)
    for place, number in enumerate((5, 0)):
        made = Dall3Output.load(tmp_path / f"{number}-fine.png")
        assert made.images == [call.images[place]] and made.recipe(0) == call.recipe(place)
    capsys.readouterr()
    for options, words in [
        (["--pick", "6"], "no image 6 on this wall"),
        (["--pick", "5,x"], "expected numbers on the wall, such as 3,7"),
        (["--pick", "5"], "already holds 5-fine.png"),
        (["--pick", "5", "--seed", "9"], "the wall has seed 4"),
        (["--pick", "5", "--num_batches", "2"], "--num_batches and --pick exclude each other"),
    ]:
        assert main(["upsample", "--input", str(folder), *options]) == 2
        assert words in capsys.readouterr().err
    assert main([*draw, "--wall"]) == 2
    assert "already holds wall.json" in capsys.readouterr().err
