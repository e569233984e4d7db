"""NumPy `.npy` files: one recording, or a batch of them.

Memory-mapped, so one row of a batch costs one row; nothing is ever unpickled. Orientation, leads, unit and rate are
settled in `arrays`, as the format says none of them. Invariant: the file holds exactly the one array its header
promises, or it is refused.
"""

import hashlib
import warnings
from pathlib import Path

import numpy as np

from ecg_jax.records.readers.arrays import (
    Declared,
    Facts,
    file_digest,
    lead_count,
    one_recording,
    reading_of,
    refusing,
)
from ecg_jax.records.readers.reading import Reading
from ecg_jax.records.record import Refused


def read_npy(path: Path, declared: Declared, row: int | None = None) -> Reading:
    """One recording: [12, T], [T, 12], or `row` (from 0) of [N, 12, T], [N, T, 12], [N, 1, T, 12]; integers or floats.

    `source` is the sha256 of the file, or of the row's bytes as stored. Refuses with missing-file, truncated,
    unreadable-signal, wrong-type, missing-row, and what `reading_of` refuses.
    """
    data = open_npy_file(path)
    where = str(path) if row is None else f"{path} row {row}"
    raw = one_recording(where, data, row, lead_count(declared, Facts()))
    digest = file_digest(path) if row is None else hashlib.sha256(raw.tobytes()).digest()
    return reading_of(where, raw, declared, Facts(), digest)


def open_npy_file(path: Path) -> np.ndarray:
    """The array of a `.npy` file, mapped, not read. Refuses with missing-file, truncated, unreadable-signal."""
    with refusing(path), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # files of Python 2 read as well
        size = Path(path).stat().st_size
        try:
            data = np.lib.format.open_memmap(path, mode="r")
        except ValueError as error:
            if "greater than file size" in str(error):
                raise Refused("truncated", f"{path} holds {size} bytes, less than its header promises") from None
            raise
        if data.offset + data.nbytes != size:
            spare = size - data.offset - data.nbytes
            raise Refused("unreadable-signal", f"{path} holds {spare} bytes beyond its array; save one array a file")
    return data
