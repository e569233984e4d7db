"""Fixtures shared by all tests: real data where it is at hand, and a quiet, CPU-only JAX."""

import gc
import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """Compiled programs are given up with the module that made them: thousands of them in one process use up the memory
    maps that Linux allows (65,530), and the next compilation then ends in a segmentation fault.
    """
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real recordings and public measurements; the test is skipped where there is none."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("ECG_JAX_SHARED_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"no real data: set ECG_JAX_SHARED_DATA (looked in {folder})")
    return folder
