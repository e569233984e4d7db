"""The content hash: what leaves it alone and what does not."""

import tarfile

import numpy as np
import pytest

from ecg_jax.records.preprocess import prepare_many
from ecg_jax.records.readers.wfdb import read_wfdb
from ecg_jax.records.record import Record
from ecg_jax.records.signature import same_content


def signatures(records) -> list[bytes]:
    return [windows[0].signature for windows in prepare_many(records)]


def test_scale_and_offset_change_nothing(ecg, record):
    for seed in range(8):
        signal = ecg(10, 500, seed=seed)
        gains = np.random.default_rng(seed).uniform(0.3, 3, 12).astype(np.float32)
        variants = [signal, signal * 2, signal * 0.731, signal + 0.4, signal * gains + gains]
        assert len(set(signatures([record(x) for x in variants]))) == 1


def test_rate_changes_nothing_mostly(ecg, record):
    pairs = [(ecg(10, 500, seed=s, bpm=50 + 3 * s), ecg(10, 100, seed=s, bpm=50 + 3 * s)) for s in range(20)]
    high = signatures([record(a, 500) for a, _ in pairs])
    low = signatures([record(b, 100) for _, b in pairs])
    assert sum(a == b for a, b in zip(high, low, strict=True)) >= 15
    assert all(same_content(a, b) for a, b in zip(high, low, strict=True))


def test_other_content_is_other(ecg, record):
    signal = ecg(10, 500)
    others = [ecg(10, 500, seed=s) for s in range(1, 30)] + [
        -signal,
        signal[::-1],
        np.roll(signal, 250, axis=0),
    ]
    found = signatures([record(x) for x in [signal, *others]])
    assert len(set(found)) == len(found)
    assert not any(same_content(found[0], other) for other in found[1:])


def read(folder) -> dict[int, Record]:
    records = {}
    for header in sorted(folder.rglob("*.hea")):
        reading = read_wfdb(header.with_suffix(""))
        records[int(header.stem[:5])] = Record(reading.signal, reading.rate, header.stem, header.stem)
    return records


@pytest.fixture(scope="module")
def ptbxl(shared_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ptbxl")
    for rate in ("records100", "records500"):
        with tarfile.open(shared_data / "ptbxl" / f"{rate}.tar.xz") as archive:
            archive.extractall(folder, filter="data")
    low, high = read(folder / "records100"), read(folder / "records500")
    return [dict(zip(part, signatures(part.values()), strict=True)) for part in (low, high)]


def test_only_known_duplicates_agree(ptbxl):
    low, _ = ptbxl
    twins = {(a, b) for a in low for b in low if a < b and low[a] == low[b]}
    either = {(a, b) for a in low for b in low if a < b and same_content(low[a], low[b])}
    assert len(low) == 353
    assert twins == either == {(137, 138), (145, 463), (456, 457), (459, 460)}


def test_both_rates_of_real_recordings(ptbxl):
    """PTB-XL's own 100 Hz files differ from ours of its 500 Hz files by 7 uV in the mean and a lag of a
    millisecond.
    """
    low, high = ptbxl
    assert len(high) == 71
    assert sum(low[i] == high[i] for i in high) >= 40
    assert sum(same_content(low[i], high[i]) for i in high) >= 65
