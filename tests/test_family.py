"""Training a family of very small networks from scratch: recipe, parts, timing, failures, results."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from dall3 import Dall3Pipeline
from dall3.cli import main
from dall3.models.vqgan import GumbelVQ, VQGANConfig
from dall3.scenes.world import Batch
from dall3.training import family, loop
from dall3.training.checkpoint import replace_folder
from dall3.training.config import TrainingConfig
from dall3.training.family import Job, commit_of_library, describe, train_family, train_part, wait_for
from dall3.training.optimizers import Average
from dall3.training.pool import Pool, PoolConfig
from dall3.training.processes import Processes
from dall3.training.recipe import PARTS, RECIPE, TINY, laid_over, read_training_recipe
from dall3.training.vqgan import Codebook, VQGANLoss, VQGANPart

CPU = Processes(torch.device("cpu"))


def test_a_recipe_that_lacks_a_part_or_has_an_unknown_setting_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "short.toml"
    path.write_text("[family]\nseed = 0\n")
    with pytest.raises(ValueError, match="expected .*vqgan"):
        read_training_recipe(path)
    for was, now, words in (
        ("batch_size = 64", "batch = 64", "unknown setting batch"),
        ("capacity = 32768", "capacities = 1", "unknown setting capacities"),
        ("top_p = 0.9", "top = 0.9", "top"),
        ("batch_size = 64", "batch_size = 0", "batch_size=0; expected a whole number from 1"),
    ):
        path.write_text(RECIPE.read_text().replace(was, now))
        with pytest.raises(ValueError, match=f"short.toml: .*{words}"):
            read_training_recipe(path)


def test_the_recipe_of_the_bundled_weights_draws_from_pure_noise_in_few_steps() -> None:
    recipe = read_training_recipe(RECIPE)
    assert recipe["defaults"]["num_inference_steps"] <= 8 and "strength" not in recipe["defaults"]
    assert recipe["upsampler"]["model"]["diffusion"] == {
        "noise_schedule": "linear",
        "learn_sigma": False,
        "predict_xstart": True,
    }


def test_existing_weights_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("")
    with pytest.raises(FileExistsError, match="resume"):
        train_family(RECIPE, tmp_path, "emoji")
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_tiny_settings_override_the_recipe_and_change_nothing_else() -> None:
    whole, tiny = read_training_recipe(RECIPE), read_training_recipe(RECIPE, tiny=True)
    assert tiny["vqgan"]["model"]["n_embed"] == TINY["vqgan"]["model"]["n_embed"]
    assert tiny["vqgan"]["model"]["embed_dim"] == whole["vqgan"]["model"]["embed_dim"]
    assert laid_over({"a": {"b": 1, "c": 2}}, {"a": {"b": 3}}) == {"a": {"b": 3, "c": 2}}


def test_the_learning_rate_warms_up_by_steps_and_decays_by_progress() -> None:
    settings = TrainingConfig(warmup=10, decay=0.5)
    assert settings.rate(0, 0.0) == pytest.approx(0.1)
    assert settings.rate(100, 0.3) == 1
    assert settings.rate(100, 0.75) == pytest.approx(0.5)
    assert settings.rate(100, 1.0) == 0


def test_a_part_that_waits_is_told_that_the_other_failed_or_is_late(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="vqgan was not finished in time"):
        wait_for(tmp_path, "vqgan", time.time() - 1)
    (tmp_path / "runs/vqgan").mkdir(parents=True)
    (tmp_path / "runs/vqgan/failed").write_text("")
    with pytest.raises(RuntimeError, match="vqgan failed"):
        wait_for(tmp_path, "vqgan", time.time() + 60)


def test_unused_codes_are_replaced_by_features() -> None:
    torch.manual_seed(0)
    book = Codebook(8, 4, decay=0.5, dead=0.1)
    rows = F.normalize(torch.randn(4, 4), dim=1).repeat(16, 1)
    for _ in range(40):
        book.update(rows, book(rows), replace=True)
    nearest = (rows[:4] @ book.codes.T).amax(dim=1)
    assert torch.allclose(nearest, torch.ones(4), atol=1e-3)


def small_part() -> VQGANPart:
    torch.manual_seed(0)
    config = VQGANConfig(32, (1, 1, 1), 1, (), 32, 16, 64)
    return VQGANPart(config, VQGANLoss(perceptual_weight=0.0, discriminator_channels=8, codes_from=0.0), CPU)


def test_the_exported_vqgan_chooses_the_codes_that_training_chose() -> None:
    part = small_part()
    pictures = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    part({"images": pictures}, 0.9)
    model = part.finished(part.model)
    assert isinstance(model, GumbelVQ)
    features = model.quant_conv(model.encoder(pictures.float() / 127.5 - 1)).permute(0, 2, 3, 1).flatten(0, 2)
    chosen = part.codebook(F.normalize(features, dim=1))
    assert torch.equal(model.encode(pictures.float() / 255).flatten(), chosen)


def test_a_killed_export_does_not_block_the_next(tmp_path: Path) -> None:
    part, target = small_part(), tmp_path / "vqgan"
    average = Average(part.model, 0.9)
    replace_folder(part, average, target)
    for left in (".vqgan.new", ".vqgan.old"):
        (tmp_path / left).mkdir()
        (tmp_path / left / "half").write_text("")
    replace_folder(part, average, target)
    assert [path.name for path in tmp_path.iterdir()] == ["vqgan"]
    assert sorted(path.name for path in target.iterdir()) == ["config.json", "model.safetensors"]


class Numbers:
    """A world in which all pixels of an image have the value of its number."""

    device = torch.device("cpu")

    def __init__(self, *args: object, side: int = 32, **more: object) -> None:
        self.side, self.emoji = side, []

    def plan(self, numbers: range, seed: int, kinds: Mapping[str, float]) -> range:
        return numbers

    def render(self, numbers: range) -> Batch:
        values = torch.tensor([number % 256 for number in numbers], dtype=torch.uint8)
        pictures = values[:, None, None, None].expand(-1, 3, self.side, self.side).contiguous()
        return Batch(pictures, [f"a picture of {number}" for number in numbers])

    def draw(self, numbers: Sequence[int], seed: int, kinds: Mapping[str, float]) -> Batch:
        return self.render(range(numbers[0], numbers[-1] + 1))


def test_a_pool_renders_what_training_uses_and_resumes_with_the_next_numbers() -> None:
    config = PoolConfig(capacity=16, first=8, chunk=4, draw_share=1.0)
    pool = Pool(Numbers(), small_part(), config, 0, batch_size=4)  # type: ignore[arg-type]
    pool.prepare()
    pool.fill(0, 0)
    assert pool.drawn == 8
    for _ in range(10):
        assert pool.next(elapsed=1e9)["images"].shape == (4, 3, 32, 32)
    assert pool.drawn == 8 + 9 * 4  # one chunk after each batch
    assert sorted(pool.rows["images"][:, 0, 0, 0].tolist()) == list(range(28, 44))
    assert set(pool.sample(200)["images"][:, 0, 0, 0].tolist()) == set(range(28, 44))
    again = Pool(Numbers(), small_part(), config, 0, batch_size=4)  # type: ignore[arg-type]
    again.fill(40, 44)
    assert set(again.sample(200)["images"][:, 0, 0, 0].tolist()) == set(range(44, 52))
    drawn = pool.drawn
    pool.seconds = 2.0
    pool.next(elapsed=1.0)
    assert pool.drawn == drawn  # drawing may not take more than its share of the time


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A very small recipe with scenes only."""
    tiny = read_training_recipe(RECIPE, tiny=True)
    for part in PARTS:
        tiny[part]["pool"]["kinds"] = {"scenes": 1}
    tiny["tokenizer"]["kinds"] = {"scenes": 1}
    monkeypatch.setattr(family, "read_training_recipe", lambda path, tiny_too: tiny)
    return tiny


def job_of(part: str, out: Path, seconds: float, parent: int = 0) -> Job:
    return Job(part, str(RECIPE), str(out), "", "cpu", time.time() + seconds, True, 0.0, parent)


def test_a_part_trains_for_its_time_and_resumes_from_its_checkpoint(
    tmp_path: Path, recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(family, "World", Numbers)
    monkeypatch.setattr(loop, "show_samples", lambda *args: None)
    run = tmp_path / "runs/vqgan"
    train_part(job_of("vqgan", tmp_path, 60, parent=1))  # the process that started it has ended
    assert not (run / "finished").exists()
    stopped = torch.load(run / "checkpoint.pt", weights_only=True)
    assert stopped["progress"] < 1 and (tmp_path / "vqgan/model.safetensors").exists()
    train_part(job_of("vqgan", tmp_path, 1))
    assert (run / "finished").exists()
    first = torch.load(run / "checkpoint.pt", weights_only=True)
    assert first["progress"] == 1 and first["step"] > 0 and first["drawn"] > stopped["drawn"]
    train_part(job_of("vqgan", tmp_path, 60))  # its schedule is finished, so nothing is trained further
    assert torch.load(run / "checkpoint.pt", weights_only=True)["step"] == first["step"]


def test_all_parts_trained_from_scratch_make_a_folder_that_draws(tmp_path: Path, recipe: dict[str, Any]) -> None:
    for part in ("tokenizer", *PARTS):
        train_part(job_of(part, tmp_path, 0.3))
        assert (tmp_path / "runs" / part / "finished").exists()
        assert part == "tokenizer" or len(list((tmp_path / "runs" / part / "samples").iterdir())) == 1
    describe(recipe, RECIPE, tmp_path, commit_of_library(), 0.1, "cpu", tiny=True)
    told = json.loads((tmp_path / "family.json").read_text())
    assert told["recipe_sha256"] == sha256(RECIPE.read_bytes()).hexdigest()
    assert told["seed"] == recipe["family"]["seed"] and told["tiny"] and len(told["commit"]) > 6
    assert f"recipe {told['recipe_sha256'][:12]}" in (tmp_path / "README.md").read_text()
    pipe = Dall3Pipeline.from_pretrained(tmp_path)
    assert pipe.defaults == recipe["defaults"]
    assert pipe.text_encoder.unknown_words("a small red cube made of plutonium") == ["plutonium"]
    result = pipe("a small red cube", num_candidates=2, seed=0, progress=False)
    assert result.images[0].size == (64, 64) and result.coarse_images[0].size == (32, 32)


class Started:
    """A process that ends at once; that of the CLIP fails after its first export."""

    jobs: list[Job] = []

    def __init__(self, command: list[str]) -> None:
        job = Job(**json.loads(command[-1]))
        self.jobs.append(job)
        self.returncode = 1 if job.part in ("clip", "upsampler") else 0
        if job.part != "upsampler":
            (Path(job.out) / job.part).mkdir()
        if not self.returncode:
            family.mark(Path(job.out), job.part, "finished")

    def poll(self) -> int:
        return self.returncode


def test_the_parts_that_failed_are_named_and_the_others_described(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, emoji = tmp_path / "out", tmp_path / "emoji.zip"
    emoji.write_bytes(b"")
    monkeypatch.setattr(family.subprocess, "Popen", Started)
    monkeypatch.setattr(family, "model_card", lambda folder, origins: ", ".join(origins))
    monkeypatch.setattr(family, "commit_of_library", lambda: "abc")
    begun = time.time()
    command = ["train", "family", "--out", str(out), "--emoji", str(emoji), "--minutes", "10", "--device", "cpu"]
    assert main(command) == 2
    assert "clip, upsampler failed" in capsys.readouterr().err.replace("upsampler, clip", "clip, upsampler")
    windows = read_training_recipe(RECIPE)["family"]["windows"]
    for job in Started.jobs:
        end = windows.get(job.part, [0.0, 1.0])[1]
        assert job.until - begun == pytest.approx(600 * end, abs=30) and job.device == "cpu"
    assert (out / "README.md").read_text() == "vqgan, transformer, clip"
    assert json.loads((out / "family.json").read_text())["commit"] == "abc"
    Started.jobs.clear()
    assert main([*command, "--resume"]) == 2  # of the unfinished parts, the upsampler is left
    assert [job.part for job in Started.jobs] == ["upsampler"]
