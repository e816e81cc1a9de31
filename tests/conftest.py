import pytest

from originals import GOLDEN, Golden, close, save_dalle, save_seedset, save_vqgan  # noqa: F401


@pytest.fixture(scope="session")
def golden():
    return Golden


@pytest.fixture(scope="session")
def seedset(tmp_path_factory):
    """A folder of the seed's files, small."""
    return save_seedset(tmp_path_factory.mktemp("seedset"))
