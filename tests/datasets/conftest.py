"""WFDB records written byte by byte."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

LEADS = ("I", "II", "III", "AVR", "AVL", "AVF", "V1", "V2", "V3", "V4", "V5", "V6")


def write_record(path: Path, seed: int = 0, rate: int = 100, unit: str = "mV", leads: Sequence[str] = LEADS) -> None:
    """A format 16 record of 10 s; `path` without suffix, parents are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    digital = np.random.default_rng(seed).integers(-500, 500, (10 * rate, len(leads))).astype("<i2")
    path.with_name(path.name + ".dat").write_bytes(digital.tobytes())
    lines = [f"{path.name} {len(leads)} {rate} {len(digital)}"]
    for i, lead in enumerate(leads):
        total = int(digital[:, i].astype(int).sum()) % 65536
        lines.append(f"{path.name}.dat 16 1000(0)/{unit} 16 0 {digital[0, i]} {total} 0 {lead}")
    path.with_name(path.name + ".hea").write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="session")
def wfdb_record() -> Callable[..., None]:
    return write_record
