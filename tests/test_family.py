"""The recipe of the bundled weights, its parts, its clock and its failures, on networks of a few weights."""

import json
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from dall3.models.vqgan import GumbelVQ, VQGANConfig
from dall3.training.family import RECIPE, TINY, Job, laid_over, read_recipe, train_family, train_part, wait_for
from dall3.training.family.loop import PartTraining
from dall3.training.family.vqgan import Codebook, VQGANLoss, VQGANPart


def test_a_recipe_that_lacks_a_part_is_refused(tmp_path: Path) -> None:
    (tmp_path / "short.toml").write_text("[family]\nseed = 0\n")
    with pytest.raises(ValueError, match="expected .*vqgan"):
        read_recipe(tmp_path / "short.toml")


def test_what_is_there_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("")
    with pytest.raises(FileExistsError, match="resume"):
        train_family(RECIPE, tmp_path, "emoji")
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_tiny_settings_are_laid_over_the_recipe_and_change_nothing_else() -> None:
    whole, tiny = read_recipe(RECIPE), read_recipe(RECIPE, tiny=True)
    assert tiny["vqgan"]["model"]["n_embed"] == TINY["vqgan"]["model"]["n_embed"]
    assert tiny["vqgan"]["model"]["embed_dim"] == whole["vqgan"]["model"]["embed_dim"]
    assert laid_over({"a": {"b": 1, "c": 2}}, {"a": {"b": 3}}) == {"a": {"b": 3, "c": 2}}


def test_the_rate_rises_by_steps_and_falls_to_nothing_by_the_clock() -> None:
    settings = PartTraining(batch_size=1, kinds={"scenes": 1}, warmup=10, decay=0.5)
    assert settings.rate(0, 0.0) == pytest.approx(0.1)
    assert settings.rate(100, 0.3) == 1
    assert settings.rate(100, 0.75) == pytest.approx(0.5)
    assert settings.rate(100, 1.0) == 0


def test_who_waits_for_a_part_that_failed_or_is_late_is_told(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="vqgan did not come in time"):
        wait_for(tmp_path, "vqgan", time.time() - 1)
    (tmp_path / "runs/vqgan").mkdir(parents=True)
    (tmp_path / "runs/vqgan/failed").write_text("")
    with pytest.raises(RuntimeError, match="no vqgan"):
        wait_for(tmp_path, "vqgan", time.time() + 60)


def test_codes_that_nothing_uses_move_to_what_is_there() -> None:
    torch.manual_seed(0)
    book = Codebook(8, 4, decay=0.5, dead=0.1)
    rows = F.normalize(torch.randn(4, 4), dim=1).repeat(16, 1)
    for _ in range(40):
        book.update(rows, book(rows), replace=True)
    nearest = (rows[:4] @ book.codes.T).amax(dim=1)
    assert torch.allclose(nearest, torch.ones(4), atol=1e-3)


def test_the_exported_vqgan_chooses_the_codes_that_training_chose() -> None:
    torch.manual_seed(0)
    config = VQGANConfig(32, (1, 1, 1), 1, (), 32, 16, 64)
    loss = VQGANLoss(perceptual_weight=0.0, discriminator_channels=8, codes_from=0.0)
    part = VQGANPart(config, loss, torch.device("cpu"))
    pictures = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    part(({"pictures": pictures}), 0.9)
    model = part.finished(part.model)
    assert isinstance(model, GumbelVQ)
    features = model.quant_conv(model.encoder(pictures.float() / 127.5 - 1)).permute(0, 2, 3, 1).flatten(0, 2)
    chosen = part.codebook(F.normalize(features, dim=1))
    assert torch.equal(model.encode(pictures.float() / 255).flatten(), chosen)


@pytest.fixture
def job(tmp_path: Path) -> Job:
    (tmp_path / "out").mkdir()
    return Job("vqgan", str(RECIPE), str(tmp_path / "out"), "", "cpu", time.time(), time.time() + 8, True)


def test_a_part_trains_in_its_time_and_goes_on_from_its_checkpoint(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    from dall3.training import family

    recipe = read_recipe(RECIPE, tiny=True)
    recipe["vqgan"]["train"] |= {"kinds": {"scenes": 1}, "first": 2, "chunk": 2, "batch_size": 2}
    monkeypatch.setattr(family, "read_recipe", lambda path, tiny: recipe)
    monkeypatch.setattr(family, "World", lambda device, emoji, side: Worlds(side))
    train_part(job)
    out = Path(job.out)
    assert (out / "runs/vqgan/finished").exists()
    lines = [json.loads(line) for line in (out / "runs/vqgan/log.jsonl").read_text().splitlines()]
    assert lines[0]["step"] == 1
    first = torch.load(out / "runs/vqgan/checkpoint.pt", weights_only=True)
    assert first["progress"] == 1
    train_part(job)  # all of its schedule is done: nothing is trained further
    again = torch.load(out / "runs/vqgan/checkpoint.pt", weights_only=True)
    assert again["step"] == first["step"]


class Worlds:
    """A world of noise."""

    def __init__(self, side: int) -> None:
        self.side = side

    def plan(self, numbers: range, seed: int, kinds: dict[str, float]) -> range:
        return numbers

    def render(self, numbers: range):  # type: ignore[no-untyped-def]
        from dall3.scenes.world import Batch

        shape = (len(numbers), 3, self.side, self.side)
        return Batch(torch.randint(256, shape, dtype=torch.uint8), [""] * len(numbers))
