"""Makes `tiny_run` importable, and gives tests tables that are made once."""

import sys
from pathlib import Path

import jax
import pytest

sys.path.insert(0, str(Path(__file__).parent))

import tiny_run


@pytest.fixture(scope="session")
def tables():
    """Tables of the tiny data set; one set for all tests, so that they share placed arrays and programs."""
    return tiny_run.tables()


@pytest.fixture(autouse=True)
def _no_cache(monkeypatch, tmp_path_factory):
    """Compiled programs go to a folder of the test session, never to the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def quick_compilation():
    """Compile fast, not well: for networks that run a few times only."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
