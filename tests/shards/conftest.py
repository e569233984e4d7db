import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for tiny_source, here and in the pools that the tests start

import tiny_source

from ecg_jax.shards.convert import convert


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """`tiny_source.standard`, converted."""
    return Path(convert(tiny_source.standard(), tmp_path_factory.mktemp("data"))["path"])
