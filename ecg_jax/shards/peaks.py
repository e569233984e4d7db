"""R peaks out of the stored bytes of many records at once.

They stand behind two ids of any length, so no constant distance leads there: all records of a shard walk their
fields together, a few NumPy gathers for any number of records. Reads what `schema.encode_indexed` writes and nothing
else. Invariant: every record's way is checked field by field, and what does not fit is refused, never guessed.
"""

from pathlib import Path

import numpy as np

from ecg_jax.errors import DataError
from ecg_jax.records.windows import MAX_PEAKS
from ecg_jax.shards import schema

SKIPPED = 3  # fields between the record id and the peaks: patient_id, valid, quality
_NAME = b"\x0a\x06rpeaks\x12"  # key of the map entry, then the tag of its value
_FIELD, _BYTES_LIST, _VALUE = 0x0A, 0x0A, 0x0A


def fitted(peaks: list[np.ndarray]) -> np.ndarray:
    """int16 [n, 50] of `peaks` (one ascending array a record), -1 beyond the last; of more the middle 50."""
    out = np.full((len(peaks), MAX_PEAKS), -1, np.int16)
    for row, own in zip(out, peaks, strict=True):
        first = max(0, len(own) - MAX_PEAKS) // 2
        own = own[first : first + MAX_PEAKS]
        row[: len(own)] = own
    return out


def read(data: np.ndarray, rows: np.ndarray, path: Path) -> np.ndarray:
    """int16 [n, 50], as `fitted` gives them, of the records whose verified frames lie in uint8 `data` at `rows`
    (`schema.IndexRow`, places counted in `data`). `path` names the shard in errors.

    Raises DataError where the fields do not stand as this release writes them.
    """
    at = rows["frame"].astype(np.int64) + rows["id"] + rows["id_length"]
    end = rows["frame"].astype(np.int64) + schema.HEADER + rows["length"]
    sound = np.ones(len(rows), bool)
    for _ in range(SKIPPED):
        sound &= data.take(at, mode="clip") == _FIELD
        size, at = _varint(data, at + 1)
        at += size
    sound &= data.take(at, mode="clip") == _FIELD
    size, at = _varint(data, at + 1)
    after = at + size
    sound &= (data.take(at[:, None] + np.arange(len(_NAME)), mode="clip") == np.frombuffer(_NAME, np.uint8)).all(1)
    size, at = _varint(data, at + len(_NAME))
    for tag in (_BYTES_LIST, _VALUE):
        sound &= (at + size == after) & (data.take(at, mode="clip") == tag)
        size, at = _varint(data, at + 1)
    sound &= (at + size == after) & (after <= end) & (size % 2 == 0)
    if not sound.all():
        raise DataError(
            f"{path}: record {int(np.flatnonzero(~sound)[0])} of those read has no R peaks where this release puts "
            "them; convert the data set again with this release"
        )
    count = size // 2
    start = at + 2 * (np.maximum(count - MAX_PEAKS, 0) // 2)
    count = np.minimum(count, MAX_PEAKS)
    most = int(count.max(initial=0))
    out = np.full((len(rows), MAX_PEAKS), -1, np.int16)
    found = data.take(start[:, None] + np.arange(2 * most), mode="clip").view("<i2").reshape(len(rows), most)
    out[:, :most] = np.where(np.arange(most) < count[:, None], found, -1)
    return out


def _varint(data: np.ndarray, at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(int64 values, places after them) of the protobuf numbers at `at` [n]."""
    value, at = np.zeros(len(at), np.int64), at.copy()
    going = np.ones(len(at), bool)
    for shift in range(0, 35, 7):  # five bytes: more than any length has
        byte = data.take(at, mode="clip")
        value |= np.where(going, byte & 127, 0).astype(np.int64) << shift
        at += going
        going &= byte > 127
        if not going.any():
            break
    return value, at
