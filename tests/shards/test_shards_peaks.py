"""R peaks found by a walk over many records' bytes are those that a full decode gives."""

from pathlib import Path

import numpy as np
import pytest

from ecg_jax.errors import DataError
from ecg_jax.records.record import Prepared
from ecg_jax.records.windows import MAX_PEAKS
from ecg_jax.shards import peaks, schema


def shard(records: list[tuple[str, str, list[int]]], leads: str = "12") -> tuple[np.ndarray, np.ndarray]:
    """(bytes, index rows) of frames of records (id, patient id, R peaks)."""
    rows, parts, at = np.zeros(len(records), schema.IndexRow), [], 0
    for i, (name, patient, found) in enumerate(records):
        prepared = Prepared(
            signal=np.full((1000, 12), 0x0A0A, np.int16),  # bytes that look like tags
            valid=(i % 300, 700 - i % 300),
            record_id=name,
            group="g",
            patient_id=patient,
            split=None,
            age=50.0,
            sex=1.0,
            quality=i << i % 60,
            labels={"a": np.full(10, 10, np.int8)},
            rpeaks=np.array(found, np.int16),
            source=b"\x0a" * 32,
            signature=b"\x12" * 16,
            meta={"rpeaks": "no"},
        )
        encoded = schema.encode_indexed(prepared, leads)
        frame = schema.frame(encoded.payload)
        id_at = schema.HEADER + encoded.id
        rows[i]["frame"], rows[i]["length"], rows[i]["id"] = at, len(encoded.payload), id_at
        rows[i]["signal"], rows[i]["id_length"] = at + schema.HEADER + encoded.signal, encoded.id_length
        parts.append(frame)
        at += len(frame)
    return np.frombuffer(b"".join(parts), np.uint8).copy(), rows


@pytest.mark.parametrize("leads", ["8", "12"])
def test_peaks_behind_ids_of_any_length(leads):
    rng = np.random.default_rng(0)
    lengths = [0, 1, 5, 100, 121, 122, 127, 128, 129, 300, 16384, 17000]
    counts = [0, 1, 13, 49, 50, 51, 62, 63, 64, 65, 90, 200]  # around where a length takes another byte
    records = []
    for i in range(60):
        name, patient = "n" * int(rng.choice(lengths)), "\u00e9" * int(rng.choice(lengths))
        records.append((name, patient, sorted(rng.integers(0, 1000, counts[i % len(counts)]).tolist())))
    data, rows = shard(records, leads)
    found = peaks.read(data, rows, Path("x"))
    assert found.shape == (60, MAX_PEAKS) and found.dtype == np.int16
    for row, got, (_, _, own) in zip(rows, found, records, strict=True):
        start = int(row["frame"]) + schema.HEADER
        decoded = schema.decode(data[start : start + int(row["length"])].tobytes())["rpeaks"]
        assert decoded.tolist() == own  # the test's own frames are right
        first = max(0, len(own) - MAX_PEAKS) // 2
        kept = own[first : first + MAX_PEAKS]
        assert got.tolist() == kept + [-1] * (MAX_PEAKS - len(kept))
    np.testing.assert_array_equal(peaks.fitted([np.array(own) for _, _, own in records]), found)
    picked = rng.permutation(60)[:17]
    np.testing.assert_array_equal(peaks.read(data, rows[picked], Path("x")), found[picked])


def test_other_bytes_are_refused_not_guessed():
    data, rows = shard([("one", "p", [1, 2]), ("two", "q", [3, 4, 5])])
    payload = int(rows[1]["frame"] + rows[1]["id"] + rows[1]["id_length"])
    end = int(rows[1]["frame"]) + schema.HEADER + int(rows[1]["length"])
    name = data[payload:end].tobytes().index(b"rpeaks") + payload
    # A tag of a field that is skipped, the name, a length inside, and the tag behind it.
    for at in (payload, name + 2, name + 7, name + 8, name + 9, name + 11):
        hurt = data.copy()
        hurt[at] += 1
        with pytest.raises(DataError, match="some-shard: record 1 of those read has no R peaks where"):
            peaks.read(hurt, rows, Path("some-shard"))
    with pytest.raises(DataError, match="record 1"):
        peaks.read(data[: name + 3], rows, Path("x"))
