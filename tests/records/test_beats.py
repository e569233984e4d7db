"""The beat detector, on waves made here and on annotated recordings."""

import tarfile
import warnings

import numpy as np
import pytest

from ecg_jax.records.beats import DETECTOR, r_peaks
from ecg_jax.records.preprocess import prepare_many
from ecg_jax.records.readers.wfdb import read_wfdb
from ecg_jax.records.record import Record

TOLERANCE = 7.5  # samples at 100 Hz


def beat_times(seconds: float, bpm: float, seed: int) -> np.ndarray:
    """Where tests/records/conftest.py puts its R peaks."""
    rng = np.random.default_rng(seed)
    times, at = [], 0.4
    while at < seconds:
        times.append(at)
        at += 60 / bpm * (1 + 0.03 * rng.standard_normal())
    return np.array(times)


@pytest.mark.parametrize("bpm", [30, 45, 72, 110, 150, 190])
@pytest.mark.parametrize("seed", [0, 1])
def test_rates(ecg, bpm, seed):
    (peaks,) = r_peaks(ecg(10, 100, bpm, seed)[None])
    expected = beat_times(10, bpm, seed) * 100
    expected = expected[expected < 995]
    found = peaks[peaks < 995]
    assert len(found) == len(expected)
    assert np.abs(found - expected).max() < 3


def test_lead_one_does_not_matter(ecg):
    signal = ecg(10, 100)
    dead, inverted, noisy = signal.copy(), signal.copy(), signal.copy()
    dead[:, [0, 3]] = 0
    inverted[:, 0] *= -1
    noisy[:, 0] = np.random.default_rng(0).standard_normal(1000)
    expected = r_peaks(signal[None])[0]
    for found in r_peaks(np.stack([dead, inverted, noisy])):
        assert len(found) == len(expected) and np.abs(found - expected).max() <= 2


def test_gain_and_batch_do_not_matter(ecg):
    signals = np.stack([ecg(10, 100, 50 + 10 * s, s) for s in range(8)])
    together = r_peaks(signals)
    for signal, peaks in zip(signals, together, strict=True):
        np.testing.assert_array_equal(r_peaks(signal[None])[0], peaks)
        np.testing.assert_array_equal(r_peaks(signal[None] * 1024)[0], peaks)


def test_a_wide_early_beat_is_found(ecg):
    """A ventricular beat: wide, large, of other polarity, early, followed by a pause."""
    t = np.arange(1000) / 100
    signal = ecg(10, 100, 60, 4)
    times = beat_times(10, 60, 4)
    early = times[4] + 0.5
    gone = np.abs(t - times[5]) < 0.45
    signal[gone] *= 0.02
    signal += (-1.8 * np.exp(-(((t - early) / 0.05) ** 2)))[:, None].astype(np.float32)
    (peaks,) = r_peaks(signal[None])
    assert np.abs(peaks - early * 100).min() <= 4 and np.abs(peaks - times[6] * 100).min() <= 3


def test_padding_has_no_beats(ecg):
    signal = np.zeros((1000, 12), np.float32)
    signal[200:800] = ecg(6, 100) + 0.3
    (peaks,) = r_peaks(signal[None], valid=[(200, 600)])
    assert len(peaks) == len(beat_times(6, 72, 0)) and peaks.min() >= 200 and peaks.max() < 800


def test_nothing_gives_nothing():
    assert [len(p) for p in r_peaks(np.zeros((2, 1000, 12)))] == [0, 0]
    assert r_peaks(np.zeros((0, 1000, 12))) == []
    assert len(r_peaks(np.ones((1, 1000, 12)), valid=[(0, 20)])[0]) == 0
    assert DETECTOR == "robust-1"


def annotated(folder, name: str) -> np.ndarray:
    """QRS positions (samples at 100 Hz) of an LUDB record: the median of marks that lie together."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pandas deprecations inside wfdb
        import wfdb

        marks = []
        for lead in ("i", "ii", "avf", "v1", "v3", "v5"):
            notes = wfdb.rdann(str(folder / name), lead)
            marks += [at / 5 for at, symbol in zip(notes.sample, notes.symbol, strict=True) if symbol == "N"]
    marks = np.sort(marks)
    groups = np.split(marks, np.flatnonzero(np.diff(marks) > 15) + 1)
    return np.array([np.median(group) for group in groups if len(group) >= 2])


def test_against_cardiologists(shared_data, tmp_path):
    """Sensitivity and predictive value on part of LUDB, within the annotated stretch of each record."""
    with tarfile.open(shared_data / "ludb" / "data.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    folder = tmp_path / "data"
    # 111 is paced: its marks are on the spike, 90 ms before the deflection that is found here.
    chosen = sorted((p.stem for p in folder.glob("*.hea") if p.stem != "111"), key=int)[::4]
    readings = [read_wfdb(folder / name) for name in chosen]
    prepared = prepare_many([Record(r.signal, r.rate, n, n) for r, n in zip(readings, chosen, strict=True)])
    missed = extra = total = 0
    for name, (window,) in zip(chosen, prepared, strict=True):
        truth, found = annotated(folder, name), window.rpeaks.astype(float)
        within = found[(found >= truth[0] - TOLERANCE) & (found <= truth[-1] + TOLERANCE)]
        missed += sum(np.abs(found - at).min() > TOLERANCE for at in truth)
        extra += sum(np.abs(truth - at).min() > TOLERANCE for at in within)
        total += len(truth)
    assert total > 200
    assert missed <= 0.005 * total and extra <= 0.01 * total, (missed, extra, total)
