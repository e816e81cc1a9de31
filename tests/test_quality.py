"""The measures and the judge of benchmarks/quality.py, on cases with a known answer."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))

from judge import SIDE, Judge, augment, load_judge, save_judge
from quality import FINE, crops, frechet_distance, psnr, scene_tasks, to_markdown

from dall3.scenes import MATERIALS, SHAPES, is_held_out

CLASSES = {"shape": ["cube", "egg"], "material": ["ice"], "background": ["red"], "emoji": ["1f427", "1f680"]}


def test_frechet_distance_of_gaussians_that_are_stretched_and_moved():
    points = torch.randn(5000, 4, generator=torch.Generator().manual_seed(0)).double()
    points = torch.linalg.qr(points - points.mean(0)).Q * 4999**0.5  # mean 0, covariance 1
    stretch, move = torch.tensor([1.0, 2.0, 3.0, 0.5]), torch.tensor([0.0, 1.0, 0.0, 2.0])
    expected = ((stretch - 1) ** 2).sum() + (move**2).sum()
    assert frechet_distance(points, points * stretch + move) == pytest.approx(expected.item(), rel=1e-6)


def test_frechet_distance_of_fewer_points_than_dimensions():
    points = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    assert frechet_distance(points, points) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(points, points + 1) == pytest.approx(32, rel=1e-6)


def test_crops_are_squares_of_the_picture_at_its_full_size():
    pictures = torch.rand(2, 3, FINE, FINE, generator=torch.Generator().manual_seed(0))
    found = crops(pictures).unflatten(0, (2, 9))
    for i, (top, left) in {0: (0, 0), 1: (0, 64), 3: (64, 0), 8: (128, 128)}.items():
        assert torch.equal(found[:, i], pictures[:, :, top : top + SIDE, left : left + SIDE])


def test_psnr_is_the_mean_over_pictures():
    true = torch.zeros(2, 3, 4, 4)
    pictures = torch.stack((torch.full((3, 4, 4), 0.1), torch.full((3, 4, 4), 0.01)))
    assert psnr(pictures, true) == pytest.approx(30, abs=1e-4)


@pytest.mark.parametrize("held_out", [True, False])
def test_scene_tasks_ask_for_pairs_of_one_kind_and_show_them(held_out):
    for task in scene_tasks(3, held_out, seed=0):
        shape, material = SHAPES[task.answers["shape"]], MATERIALS[task.answers["material"]]
        assert is_held_out(shape, material) == held_out
        assert shape in task.text and task.picture.shape == (3, 2 * SIDE, 2 * SIDE)
        assert torch.equal(task.picture, scene_tasks(task.seed + 1, held_out, seed=0)[-1].picture)


def test_judge_survives_saving(tmp_path):
    judge = Judge(CLASSES, {"shape": 0.5}).half().float().eval()  # representable in half precision
    save_judge(judge, tmp_path / "judge.safetensors")
    loaded, pictures = load_judge(tmp_path / "judge.safetensors"), torch.rand(2, 3, 2 * SIDE, 2 * SIDE)
    assert loaded.classes == judge.classes and loaded.accuracy == judge.accuracy
    assert torch.equal(loaded(pictures)["emoji"], judge(pictures)["emoji"])


def test_augmented_pictures_follow_from_the_generator():
    pictures = torch.rand(4, 3, SIDE, SIDE)
    first, again = (augment(pictures, torch.Generator().manual_seed(seed)) for seed in (1, 1))
    assert torch.equal(first, again) and first.shape == pictures.shape
    assert first.min() >= 0 and first.max() <= 1 and not torch.equal(first, pictures)


def test_table_has_every_column_and_leaves_gaps():
    table = to_markdown([{"a": 1, "b": 0.5}, {"a": "x", "c": None}])
    assert table.split("\n") == ["| a | b | c |", "| --- | --- | --- |", "| 1 | 0.500 |  |", "| x |  |  |"]
