"""Fixtures shared by all tests: real data where it is at hand, and a quiet, CPU-only JAX."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real recordings and public measurements; the test is skipped where there is none."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("ECG_JAX_SHARED_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"no real data: set ECG_JAX_SHARED_DATA (looked in {folder})")
    return folder
