import os

import pytest
import torch

from dall3 import Dall3Pipeline

from originals import GOLDEN, Golden, close, save_dalle, save_upstream_files, save_vqgan  # noqa: F401


def pytest_configure(config):
    """Divide the cores among the workers: with more threads than cores, tests take many times as long."""
    if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
        threads = max((os.cpu_count() or 1) // int(workers), 1)
        torch.set_num_threads(threads)
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # for processes that a test starts


@pytest.fixture(autouse=True)
def seeded():
    """Random numbers do not depend on the tests that ran before."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def golden():
    return Golden


@pytest.fixture(scope="session")
def upstream_files(tmp_path_factory):
    """A folder with upstream's files, as small networks."""
    return save_upstream_files(tmp_path_factory.mktemp("upstream_files"))


def load_upstream_files(folder, **changes) -> Dall3Pipeline:
    """Load the pipeline of such a folder. changes: other arguments of `from_checkpoints`."""
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
