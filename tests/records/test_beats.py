"""The beat detector, on waves made here."""

import numpy as np
import pytest

from ecg_jax.records import beats
from ecg_jax.records.beats import DETECTOR, detect, positions, r_peaks, stored_peaks
from ecg_jax.records.leads import INDEPENDENT, LEADS
from ecg_jax.records.preprocess import prepare_many
from ecg_jax.records.windows import MAX_PEAKS


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
    apart = np.abs(beat_times(10, bpm, seed)[:, None] * 100 - peaks)
    whole = beat_times(10, bpm, seed) < 9.85  # the end cuts later ones
    assert apart[whole].min(axis=1).max() < 3
    assert apart.min(axis=0)[peaks < 980].max() < 3 and len(peaks) <= len(apart)


def test_lead_one_does_not_matter(ecg):
    signal = ecg(10, 100)
    dead, inverted, noisy = signal.copy(), signal.copy(), signal.copy()
    dead[:, [0, 3]] = 0
    inverted[:, 0] *= -1
    noisy[:, 0] = np.random.default_rng(0).standard_normal(1000)
    expected = r_peaks(signal[None])[0]
    for found in r_peaks(np.stack([dead, inverted, noisy])):
        assert len(found) == len(expected) and np.abs(found - expected).max() <= 2


@pytest.mark.parametrize("length", [60, 61, 250, 733, 1000])
def test_gain_signs_and_batch_do_not_matter(ecg, length):
    signals = np.stack([ecg(10, 100, 50 + s, s)[:length] for s in range(70)])
    noise = np.random.default_rng(0).standard_normal(signals.shape)
    signals[::3] += 0.1 * noise[::3].astype(np.float32)
    together = r_peaks(signals)
    assert sum(map(len, together)) > length // 2
    signs = np.random.default_rng(1).choice([-1.0, 1.0], 12)
    for signal, peaks in zip(signals, together, strict=True):
        np.testing.assert_array_equal(r_peaks(signal[None])[0], peaks)
        np.testing.assert_array_equal(r_peaks(signal[None] * 1024)[0], peaks)
        np.testing.assert_array_equal(r_peaks(signal[None] * signs)[0], peaks)
    x = np.ascontiguousarray(signals.transpose(0, 2, 1))
    for size in (3, 5, 64):
        for a, b in zip(positions(x[:size]), positions(x), strict=False):
            np.testing.assert_array_equal(a, b)


def test_places_between_the_samples():
    """Beats of 25 ms at known times: found within a millisecond or two, and all in the same way."""
    rng = np.random.default_rng(3)
    times = np.cumsum(rng.uniform(60, 100, 9)) + 20
    wave = np.exp(-0.5 * ((np.arange(1000)[:, None] - times) / 2.5) ** 2).sum(axis=1)
    x = (wave[None, :] * rng.uniform(0.2, 2, (12, 1)) * rng.choice([-1, 1], (12, 1)))[None].astype(np.float32)
    (found,) = positions(x)
    error = found - times
    assert np.abs(error + beats.AFTER).max() < 0.15 and error.std() < 0.1
    np.testing.assert_array_equal(detect(x)[0], np.rint(found))


def test_an_artefact_in_one_lead_is_no_beat(ecg):
    signal = ecg(10, 100, 60, 1)
    expected = r_peaks(signal[None])[0]
    at = int(expected[3]) + 48
    signal[at : at + 25, 9] += 5.0
    (found,) = r_peaks(signal[None])
    assert len(found) == len(expected) and np.abs(found - expected).max() <= 2


def test_noise_between_beats_is_no_beat(ecg):
    """A burst from muscles, in all leads, as high as half a QRS."""
    signal = ecg(10, 100, 40, 1)
    expected = r_peaks(signal[None])[0]
    at = int(expected[2]) + 60
    burst = np.random.default_rng(4).standard_normal((40, 12)) * np.hanning(40)[:, None]
    signal[at : at + 40] += (0.25 * burst * np.abs(signal).max(axis=0)).astype(np.float32)
    (found,) = r_peaks(signal[None])
    assert len(found) == len(expected) and np.abs(found - expected).max() <= 2


@pytest.mark.parametrize("leads", ["12", "8"])
def test_the_shards_hold_all_that_is_needed(ecg, record, leads):
    """What the conversion found is found again in the stored integers."""
    seconds = [10, 10, 7.3, 4.2, 10, 26]
    records = [record(ecg(s, 400, 60 + 15 * i, i), 400, str(i)) for i, s in enumerate(seconds)]
    records.append(record(np.cumsum(np.random.default_rng(2).standard_normal((4000, 12)), axis=0) * 0.02, 400, "walk"))
    windows = [window for own in prepare_many(records, leads=leads) for window in own]
    stored = np.stack([window.signal for window in windows])
    if leads == "8":
        stored = stored[:, :, [LEADS.index(lead) for lead in INDEPENDENT]]
    found = stored_peaks(stored, [window.valid for window in windows])
    assert sum(map(len, found)) > 80
    for window, peaks in zip(windows, found, strict=True):
        assert window.rpeaks.dtype == np.int16
        np.testing.assert_array_equal(window.rpeaks, peaks)


def test_never_more_than_there_is_room_for():
    x = np.random.default_rng(5).standard_normal((200, 12, 1000)).astype(np.float32)
    x[100:] = np.repeat(np.sign(x[100:, :, ::10]), 10, axis=2)
    x[150:] *= np.tile(np.arange(1000) % 20 < 2, (50, 12, 1))
    found = detect(x)
    assert 10 < max(map(len, found)) <= MAX_PEAKS
    assert all(np.diff(peaks).min() >= 10 and peaks.min() >= 0 and peaks.max() < 1000 for peaks in found if len(peaks))


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
    assert DETECTOR == "robust-2"
