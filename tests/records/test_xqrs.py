"""XQRS for many records at once against wfdb's, one record at a time: the same indexes everywhere."""

import tarfile
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ecg_jax.records import synthetic
from ecg_jax.records.readers.wfdb import read_wfdb
from ecg_jax.records.xqrs import peaks, xqrs


def by_wfdb(lead: np.ndarray) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pandas on import, and divisions by zero in flat stretches
        from wfdb.processing import xqrs_detect

        return np.asarray(xqrs_detect(lead, 100, verbose=False)).astype(np.int64)


def agree(leads: np.ndarray) -> int:
    """Assert that both find the same in [B, n]; returns how many beats."""
    found = xqrs(leads)
    for lead, own in zip(leads, found, strict=True):
        assert own.dtype == np.int64
        np.testing.assert_array_equal(own, by_wfdb(lead))
    return sum(map(len, found))


@pytest.fixture(scope="module")
def simulated() -> np.ndarray:
    """float64 [100, 730, 12]: 100 records of every kind."""
    index = np.arange(220)
    signals = synthetic.generate(synthetic.Settings(seed=3, prevalence="balanced"), index, index).signal
    return np.stack([signal for signal in signals if len(signal) == 730][:100]).astype(np.float64)


def test_simulated_records(simulated):
    assert agree(simulated[:, :, 0]) > 800
    agree(simulated[:50, :, 1])
    agree(-simulated[50:, :, 6])
    agree(simulated[:50, :, 0].astype(np.float32))


def test_where_nothing_can_be_learned(simulated):
    """Small amplitudes in noise: thresholds in mV are used, and gain matters."""
    noise = np.random.default_rng(0).standard_normal((60, 730))
    low = 0.1 * simulated[:60, :, 0] + 0.02 * noise
    once = agree(low)
    assert 0 < once < agree(1000 * low)
    agree(0.02 * noise)


def test_equal_neighbours(simulated):
    """Coarse integers and flat stretches: of local peaks that are equal, the first counts."""
    agree(np.rint(20 * simulated[:40, :, 0]))
    padded = simulated[:40, :, 0].copy()
    padded[:, :200] = 0
    padded[:, -150:] = 0
    agree(padded)
    steps = np.zeros((4, 400))
    steps[0, 100:200] = 1
    steps[1, ::40] = 5
    steps[2, ::7] = 1
    steps[3] = np.arange(400)
    agree(steps)


def test_flat_or_missing_is_nothing(simulated):
    lead = simulated[:6, :, 0].copy()
    lead[1] = 0
    lead[2] = 3.5
    lead[3, 300] = np.nan
    lead[4] = np.nan
    found = xqrs(lead)
    assert [len(own) > 0 for own in found] == [True, False, False, False, False, True]
    agree(lead[[0, 1, 2, 5]])
    agree(lead[3:4])
    assert xqrs(np.zeros((0, 700))) == [] and [len(own) for own in xqrs(np.zeros((2, 0)))] == [0, 0]


@pytest.mark.parametrize("length", [31, 32, 40, 47, 60, 79, 100])
def test_short_records(simulated, length):
    agree(simulated[:20, :length, 0])
    agree(simulated[20:40, 300 : 300 + length, 0])


def test_too_short_is_refused_unless_flat(simulated):
    for length in (1, 15, 30):
        lead = simulated[:2, :length, 0].copy() + np.arange(length)
        if length > 1:
            with pytest.raises(ValueError, match=f"^{length} samples"):
                xqrs(lead)
            with pytest.raises(ValueError, match="padlen"):
                by_wfdb(lead[0])
        assert [len(own) for own in xqrs(np.zeros((2, length)))] == [0, 0]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(31, 1100),
    st.integers(1, 3),
    st.sampled_from(["walk", "white", "spikes", "steps"]),
    st.sampled_from([1e-3, 1.0, 1e3]),
)
def test_anything(seed, length, count, kind, gain):
    draw = np.random.default_rng(seed)
    lead = draw.standard_normal((count, length))
    if kind == "walk":
        lead = lead.cumsum(axis=1)
    elif kind == "spikes":
        lead = 0.02 * lead + (draw.random((count, length)) < 0.012) * draw.uniform(0.3, 3, (count, length))
    elif kind == "steps":
        lead = np.round(np.repeat(lead, 9, axis=1)[:, :length], 1)
    agree(gain * lead)


def test_batches_make_no_difference(simulated):
    together = xqrs(simulated[:, :, 0])
    for lead, own in zip(simulated[:, :, 0], together, strict=True):
        np.testing.assert_array_equal(xqrs(lead[None])[0], own)


def test_stored_records_without_their_padding(simulated):
    stored = np.zeros((60, 1000, 12), np.int16)
    valid = np.array([(135, 730), (0, 700), (400, 600)] * 20)
    for i, (start, length) in enumerate(valid):
        stored[i, start : start + length] = np.rint(1000 * simulated[i, :length])
    for form in (stored, stored[:, :, [0, 1, 6, 7, 8, 9, 10, 11]]):
        found = peaks(form, valid)
        assert sum(map(len, found)) > 400
        for signal, (start, length), own in zip(stored, valid, found, strict=True):
            np.testing.assert_array_equal(own, by_wfdb(signal[start : start + length, 0] * 0.001) + start)


def test_real_records(shared_data, tmp_path):
    """PTB-XL at 100 Hz, leads I and V1, as recorded and as stored integers."""
    with tarfile.open(shared_data / "ptbxl" / "records100.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    names = sorted(path.with_suffix("") for path in tmp_path.rglob("*.hea"))
    signals = np.stack([read_wfdb(name).signal for name in names]).astype(np.float64)
    assert agree(signals[:, :, 0]) > 1000
    agree(np.rint(1000 * signals[:100, :, 6]) * 0.001)
