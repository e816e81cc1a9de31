"""Rendered scenes: images are determined by their scenes, rules of random scenes, and correct captions."""

import json
import random
import warnings
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from dall3.scenes import (
    BACKGROUNDS,
    COLOURS,
    MATERIALS,
    SHAPES,
    SIZES,
    TEXTURES,
    Scene,
    caption,
    describe,
    is_held_out,
    random_scene,
    render,
)
from dall3.scenes.composite import lay, placed
from dall3.scenes.emoji import draw_emoji, list_emoji, pack_emoji
from dall3.scenes.render import render_many
from dall3.scenes.scene import FRUIT, POSES
from dall3.scenes.sheet import contact_sheet
from dall3.scenes.strands import STRANDS
from dall3.scenes.world import World

GOLDEN = Path(__file__).parent / "golden/scenes/sheet.png"


def draw(seed=0, **names):
    return random_scene(np.random.default_rng(seed), held_out=None, **names)


def coverage(scene, size=96):
    """Mask of a red object on white; its shadow is grey."""
    picture = render(replace(scene, material="red", background="white"), size).astype(int)
    return picture[..., 0] - picture[..., 1] > 40


def share(mask):
    """The longer side of the mask's bounding box, relative to the image's side."""
    return max(np.ptp(np.flatnonzero(mask.any(axis))) + 1 for axis in (0, 1)) / len(mask)


@pytest.mark.parametrize("material", ["cloud", "porcupine", "water", "stripes"])
def test_a_scene_gives_the_same_bytes_and_leaves_global_random_states_alone(material):
    scene = draw(3, material=material)
    np.random.seed(5)
    random.seed(5)
    before = np.random.get_state()[1].copy(), random.getstate()
    first, second = render(scene, 64), render(scene, 64)
    assert first.tobytes() == second.tobytes()
    assert first.dtype == np.uint8 and first.shape == (64, 64, 3)
    assert (np.random.get_state()[1] == before[0]).all() and random.getstate() == before[1]


@pytest.mark.parametrize("material", TEXTURES)
def test_the_seed_changes_a_texture_and_nothing_else(material):
    one, other = (render(Scene("cube", material, seed=seed), 64).astype(int) for seed in (1, 5))
    changed = np.abs(one - other).max(2) > 12
    assert changed[20:44, 20:44].any()
    assert not changed[:8].any() and not changed[-6:].any()


def test_scenes_are_drawn_alike_from_one_seed_and_differently_from_another():
    assert draw(1) == draw(1)
    assert len({draw(seed) for seed in range(50)}) == 50


@pytest.mark.parametrize("material", MATERIALS)
def test_every_shape_renders_in_every_material(material):
    with warnings.catch_warnings(), np.errstate(invalid="raise", divide="raise"):
        warnings.simplefilter("error")
        for shape in SHAPES:
            scene = draw(2, shape=shape, material=material, size="medium")
            picture = render(scene, 64).astype(int)
            assert np.ptp(picture[16:48, 16:48], axis=(0, 1)).max() > 50, "nothing is in the middle"


@pytest.mark.parametrize("shape", SHAPES)
def test_sizes_are_clearly_different_and_stay_inside_the_picture(shape):
    shares = []
    for size in SIZES:
        masks = [coverage(draw(seed, shape=shape, size=size)) for seed in (1, 2)]
        for mask in masks:
            assert not (mask[:3].any() or mask[-3:].any() or mask[:, :3].any() or mask[:, -3:].any())
        shares.append(np.mean([share(mask) for mask in masks]))
    np.testing.assert_allclose(shares, [0.36, 0.53, 0.71], atol=0.04)


@pytest.mark.parametrize("material", ["grass", "porcupine", "wool"])
def test_what_grows_on_the_surface_stays_inside_the_picture(material):
    for shape in ("cube", "star", "torus"):
        scene = draw(4, shape=shape, material=material, background="white", size="large")
        plain = render(replace(scene, material="white"), 96).astype(int)
        grown = np.abs(render(scene, 96).astype(int) - plain).max(2) > 60
        assert grown.mean() > 0.1
        assert not (grown[:2].any() or grown[-2:].any() or grown[:, :2].any() or grown[:, -2:].any())


def test_quills_extend_beyond_the_outline():
    scene = Scene("sphere", "porcupine", "white", "large", seed=1)
    bare = coverage(replace(scene, size="large"), 128)
    picture = render(scene, 128).astype(int).max(2)
    row = picture[48]
    assert np.abs(np.diff(row)).max() > 60
    edges = np.abs(np.diff((picture < 120).astype(int), axis=1)).sum(1)
    assert edges.max() > np.abs(np.diff(bare.astype(int), axis=1)).sum(1).max() + 10


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_the_upper_corners_have_the_background_s_colour(background):
    for seed in range(3):
        picture = render(draw(seed, background=background, size="small"), 64).astype(int)
        for corner in (picture[:4, :4], picture[:4, -4:]):
            assert np.abs(corner.mean((0, 1)) - BACKGROUNDS[background]).max() < 16


def test_background_colours_and_plain_colours_are_mutually_distinct():
    for palette in (BACKGROUNDS, COLOURS):
        for one, other in combinations(palette.values(), 2):
            assert np.abs(np.subtract(one, other)).max() > 50


def test_silhouettes_of_different_shapes_differ():
    def middle_of(shape):
        pose = POSES[shape]
        angles = {name: sum(getattr(pose, name)) / 2 for name in ("elevation", "lean", "roll")}
        return coverage(Scene(shape, "red", size="large", azimuth=sum(pose.azimuth) / 2, **angles), 64)

    masks = {shape: middle_of(shape) for shape in SHAPES}
    for one, other in combinations(SHAPES, 2):
        either, both = (masks[one] | masks[other]).sum(), (masks[one] & masks[other]).sum()
        assert both / either < 0.93, f"{one} and {other}"


@pytest.mark.parametrize("seed", range(5))
def test_the_torus_always_shows_its_hole(seed):
    mask = coverage(draw(seed, shape="torus", size="large"))
    rows, columns = np.nonzero(mask)
    hole = ~mask[rows.min() : rows.max(), columns.min() : columns.max()]
    height, width = hole.shape
    assert hole[height // 3 : -height // 3, width // 3 : -width // 3].mean() > 0.2


def test_an_image_equals_the_downscaled_larger_one():
    for k, material in enumerate(MATERIALS):
        scene = draw(k, material=material)
        large = render(scene, 256).reshape(128, 2, 128, 2, 3).mean((1, 3))
        difference = np.abs(large - render(scene, 128)).mean()
        assert difference < (4 if material in ("porcupine", "grass", "wool") else 1), material


def reference(column, row):
    """A scene of the sheet golden/scenes/sheet.png: its first 10 shapes across, its first materials down."""
    shape, material = SHAPES[column], [m for m in MATERIALS if m not in FRUIT][row]
    return random_scene(np.random.default_rng((9, row, column)), shape, material, held_out=None)


def test_pictures_look_as_they_did_from_the_first_renderer():
    """Every shape and material, three shapes per material, compared with an earlier renderer in numpy."""
    sheet = np.asarray(Image.open(GOLDEN)).astype(float).reshape(22, 64, 3, 64, 3).swapaxes(1, 2)
    places = [[(3 * row + k * 4) % 10 for k in range(3)] for row in range(22)]
    scenes = [reference(column, row) for row in range(22) for column in places[row]]
    drawn = render_many(scenes, 64).permute(0, 2, 3, 1).numpy().reshape(22, 3, 64, 64, 3)
    for row, pictures in enumerate(drawn):
        for old, new in zip(sheet[row], pictures, strict=True):
            # Strands are sampled at random; means of 4×4 pixels agree.
            wide = 4 if reference(0, row).material in STRANDS else 1
            both = np.stack([old, new]).reshape(2, 64 // wide, wide, 64 // wide, wide, 3).mean((2, 4))
            assert np.abs(both[0] - both[1]).mean() < 2, reference(0, row).material


def test_a_scene_renders_the_same_in_any_batch():
    scenes = [draw(k, material=material) for k, material in enumerate(("cloud", "grass", "water", "avocado", "red"))]
    together = render_many(scenes * 2, 32)
    assert (together[:5] == together[5:]).all()
    for k, scene in enumerate(scenes):
        assert (together[k].permute(1, 2, 0).numpy() == render(scene, 32)).all()


@pytest.fixture
def emoji_archive(tmp_path):
    """An archive of a girl, glasses and a top hat, drawn as discs of different colours."""
    drawings = tmp_path / "node_modules/@lobehub/fluent-emoji-3d/assets"
    names = tmp_path / "node_modules/emojibase-data/en/data.json"
    drawings.mkdir(parents=True)
    names.parent.mkdir(parents=True)
    entries = []
    for code, name, colour in (("1F467", "girl", "gold"), ("1F453", "glasses", "navy"), ("1F3A9", "top hat", "lime")):
        picture = Image.new("RGBA", (256, 256))
        ImageDraw.Draw(picture).ellipse((8, 8, 248, 248), fill=colour)
        picture.save(drawings / f"{code.lower()}.webp", lossless=True)
        entries.append({"hexcode": code, "label": name, "tags": [], "group": 1})
    names.write_text(json.dumps(entries))
    return pack_emoji(tmp_path, tmp_path / "emoji.zip")


def test_a_number_and_a_seed_give_the_same_picture_in_any_batch(emoji_archive):
    world = World("cpu", emoji_archive, side=32)
    kinds = {"scenes": 1, "emoji": 1, "wearing": 1}
    batch = world.draw(range(12), seed=4, kinds=kinds)
    assert batch.images.dtype == torch.uint8 and batch.images.shape == (12, 3, 32, 32)
    for number in (0, 5, 11):
        alone = world.draw([number], seed=4, kinds=kinds)
        assert alone.captions == [batch.captions[number]] and (alone.images[0] == batch.images[number]).all()
    assert world.draw(range(12), seed=5, kinds=kinds).captions != batch.captions


def test_emoji_on_the_device_look_as_pillow_draws_them(emoji_archive):
    world, emoji = World("cpu", emoji_archive, side=128), list_emoji(emoji_archive)
    for size, shift in (("small", (2, -1)), ("medium", (0, 1)), ("large", (0, 0))):
        (new,) = lay(world.drawings, [[placed(0, size, shift)]], ["pink"], 128)
        old = draw_emoji(emoji[0], "pink", size, 128, shift)
        assert np.abs(new.permute(1, 2, 0).numpy().astype(int) - old).max() <= 2


def test_what_is_worn_lies_on_the_face_and_is_named(emoji_archive):
    world = World("cpu", emoji_archive, side=64, held_out=None)
    seen = set()
    for batch in (world.draw([number], kinds={"wearing": 1}) for number in range(24)):
        (caption_,) = batch.captions
        hat = "top hat" in caption_
        assert "girl" in caption_ and (hat or "glasses" in caption_)
        red, green, blue = batch.images[0].int()
        worn = (green - red > 120) & (green - blue > 120) if hat else (blue - red > 60) & (green < 40)
        face = (red > 220) & (blue < 40)
        assert worn.any() and face.any()
        if hat:
            assert worn.nonzero()[:, 0].float().mean() < face.nonzero()[:, 0].float().mean()
        seen.add(hat)
    assert seen == {True, False}


def test_a_world_refuses_what_it_cannot_draw(tmp_path):
    with pytest.raises(ValueError, match="unknown kind 'songs'; expected scenes, emoji, wearing"):
        World().draw([0], kinds={"songs": 1})
    with pytest.raises(ValueError, match="need a World with emoji="):
        World().draw([0], kinds={"emoji": 1})
    with pytest.raises(ValueError, match="side=100"):
        World(side=100)
    (tmp_path / "emoji.zip").write_bytes(b"no archive")
    with pytest.raises(ValueError, match="is not an archive of emoji"):
        World(emoji=tmp_path / "emoji.zip")


def test_the_held_out_pairs_are_those_of_the_rule():
    held_out = {"wool", "strawberry"}
    assert {material for material in MATERIALS if is_held_out("cube", material)} == held_out
    assert {shape for shape in SHAPES if is_held_out(shape, "lava")} == {"pyramid", "torus", "egg", "star"}
    assert not is_held_out("wool", "cube")
    assert is_held_out("armchair", "avocado")


def test_held_out_pairs_are_drawn_only_where_asked_for():
    rng = np.random.default_rng(0)
    trained = {(scene.shape, scene.material) for scene in (random_scene(rng) for _ in range(2500))}
    kept = {(scene.shape, scene.material) for scene in (random_scene(rng, held_out=True) for _ in range(500))}
    assert not any(is_held_out(*pair) for pair in trained) and all(is_held_out(*pair) for pair in kept)
    assert len(trained) + len(kept) == len(SHAPES) * len(MATERIALS)


def test_a_plain_object_is_never_on_its_own_colour():
    for material in COLOURS:
        backgrounds = {draw(seed, material=material).background for seed in range(60)}
        assert material not in backgrounds and len(backgrounds) >= 5
    with pytest.raises(ValueError, match="background=red"):
        draw(material="red", background="red")


def test_asking_for_a_pair_that_is_held_out_fails_in_words():
    with pytest.raises(ValueError, match="shape=cube, material=wool.*held out"):
        random_scene(np.random.default_rng(0), "cube", "wool")


@pytest.mark.parametrize("kind", ["shape", "material", "background", "size"])
def test_unknown_names_are_refused(kind):
    names = {"shape": "cube", "material": "wood", "background": "blue", "size": "small"}
    with pytest.raises(ValueError, match=f"unknown {kind} 'violin'; expected one of .*{names[kind]}"):
        random_scene(np.random.default_rng(0), **{kind: "violin"})
    with pytest.raises(ValueError, match=f"unknown {kind} 'violin'"):
        Scene(**{**names, kind: "violin"})
    with pytest.raises(ValueError, match="size=3"):
        render(Scene("cube", "wood"), 3)


ADJECTIVES = {"stripes": "striped", "polka dots": "polka dot"}


def names_in(text, names):
    words = f" {text.replace(',', '')} "
    return {name for name in names if f" {name} " in words or f" {ADJECTIVES.get(name, name)} " in words}


def test_captions_name_what_is_in_the_picture_and_nothing_else():
    rng = np.random.default_rng(1)
    both = backgrounds = sizes = 0
    for _ in range(4000):
        scene = random_scene(rng, held_out=None)
        text = caption(scene, rng)
        assert text.isascii() and text == text.lower() and "  " not in text and "{" not in text
        assert names_in(text, SIZES) <= {scene.size}
        behind = f"{scene.background} background"
        assert text.count("background") == text.count(behind) == text.endswith(behind)
        backgrounds += behind in text
        sizes += scene.size in text
        shape, material = names_in(text, SHAPES), names_in(text.removesuffix(behind), MATERIALS)
        assert shape <= {scene.shape} and material <= {scene.material} and (shape or material)
        both += bool(shape and material)
    assert both / 4000 == pytest.approx(0.95, abs=0.015)
    assert backgrounds / 4000 == pytest.approx(0.5, abs=0.04)
    assert sizes / 4000 == pytest.approx(0.33, abs=0.04)


def test_articles_fit_the_word_behind_them():
    rng = np.random.default_rng(2)
    for _ in range(1500):
        words = caption(random_scene(rng, held_out=None), rng).split()
        for article, word in zip(words, words[1:], strict=False):
            if article in ("a", "an"):
                assert article == ("an" if word[0] in "aeiou" else "a")


@pytest.mark.parametrize("material", ["cloud", "red", "stripes"])
def test_one_scene_has_hundreds_of_wordings(material):
    rng = np.random.default_rng(3)
    assert len({caption(Scene("egg", material), rng) for _ in range(3000)}) > 300


def test_upstreams_wording_is_among_them():
    rng = np.random.default_rng(4)
    wordings = {caption(Scene("cube", "cloud"), rng) for _ in range(500)}
    assert {"a cube made of cloud", "a cube made of cloud, a cube with the texture of cloud"} <= wordings


def test_describe_gives_one_plain_caption():
    assert describe(Scene("cube", "cloud")) == "a cube made of cloud"
    assert describe(Scene("egg", "orange", "blue", "small")) == "an orange egg"
    assert describe(Scene("star", "polka dots"), size=True) == "a medium star with polka dots"
    assert describe(Scene("egg", "ice", "blue", "small"), background=True) == "an egg made of ice on a blue background"
    scene = Scene("cone", "red", "grey", "large")
    assert describe(scene, background=True, size=True) == "a large red cone on a grey background"


def test_the_contact_sheet_shows_every_pair():
    sheet = contact_sheet(size=16)
    assert sheet.width > len(SHAPES) * 16 and sheet.height > len(MATERIALS) * 16
    assert np.asarray(sheet).std() > 20
