import os

import pytest
import torch

from dall3 import Dall3Pipeline

from originals import GOLDEN, Golden, close, save_dalle, save_seedset, save_vqgan  # noqa: F401


def pytest_configure(config):
    """Workers share the cores: threads that wait for each other's cores take many times as long."""
    if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
        threads = max((os.cpu_count() or 1) // int(workers), 1)
        torch.set_num_threads(threads)
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # of programs that a test starts


@pytest.fixture(scope="session")
def golden():
    return Golden


@pytest.fixture(scope="session")
def seedset(tmp_path_factory):
    """A folder of the seed's files, small."""
    return save_seedset(tmp_path_factory.mktemp("seedset"))


def load_seedset(folder, **changes) -> Dall3Pipeline:
    """The pipeline of such a folder, with some of its files changed."""
    files = dict(
        dalle=folder / "dalle-latest.pt",
        bpe=folder / "bpe.model",
        vqgan=folder / "vqgan_gumbel_f8/last.ckpt",
        vqgan_config=folder / "vqgan_gumbel_f8/model.yaml",
        diffusion=folder / "model-latest.pt",
        diffusion_config=folder / "model-latest.json",
        clip=folder / "ViT-B-16.pt",
    )
    return Dall3Pipeline.from_checkpoints(**files | changes)
