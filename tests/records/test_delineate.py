"""PR, QRS and QT of drawn beats whose waves are moved, and of nothing but noise."""

import numpy as np
import pytest

from ecg_jax.evaluation import sources
from ecg_jax.records import delineate

PEAKS = np.arange(60, 940, 85)
LEADS = np.array([1.0, 0.6, -0.4, -0.8, 0.3, 0.5, -0.7, 0.9, 1.2, 1.1, 0.9, 0.6])


def ecg(pr=0.16, qrs=0.09, qt=0.40, p=0.12, noise=0.01, seed=0):
    """10 s, 12 leads, 100 Hz in mV; each wave is a bell of so many SDs from begin to end, and R lies in the middle."""
    t = np.arange(1000)[:, None] / 100 - PEAKS[None] / 100
    begin = -qrs / 2

    def bell(height, start, length, sds=4):
        return height * np.exp(-0.5 * ((t - start - length / 2) / (length / sds)) ** 2).sum(1)

    wave = bell(1.2, begin, qrs, 6) + bell(p, begin - pr, 0.1) + bell(0.3, begin + qt - 0.16, 0.16)
    return wave[:, None] * LEADS + noise * np.random.default_rng(seed).normal(size=(1000, 12))


@pytest.mark.parametrize("name, moved", [("pr", 0.21), ("qrs", 0.13), ("qt", 0.46)])
def test_an_interval_follows_its_wave_and_leaves_the_others(name, moved):
    usual = {"pr": 0.16, "qrs": 0.09, "qt": 0.40}
    one, two = (delineate.intervals(ecg(**(usual | more)), PEAKS) for more in ({}, {name: moved}))
    for which, value in usual.items():
        assert getattr(one, which) == pytest.approx(1000 * value, abs=40)  # a bell has no end to be sure of
        change = 1000 * (moved - value) if which == name else 0
        assert getattr(two, which) - getattr(one, which) == pytest.approx(change, abs=14)


def test_gain_sign_and_order_of_the_leads_change_nothing():
    x = ecg()
    want = delineate.intervals(x, PEAKS)
    padded = np.concatenate([PEAKS, [-1, -1]])
    assert delineate.intervals(x * 250, padded) == delineate.intervals(-x, PEAKS) == want
    assert delineate.intervals(x[:, ::-1], PEAKS) == pytest.approx(want, abs=2.1)


def test_what_is_not_there_is_not_measured():
    without = delineate.intervals(ecg(p=0), PEAKS)
    assert np.isnan(without.pr) and np.isfinite([without.qrs, without.qt]).all()
    assert np.isnan(delineate.intervals(ecg(), PEAKS[:2])).all()
    assert np.isnan(delineate.intervals(ecg(), PEAKS[:0])).all()
    assert np.isnan(delineate.intervals(np.zeros((1000, 12)), PEAKS)).all()
    assert np.isnan(delineate.intervals(ecg(), PEAKS, 300, 150)).all()


def test_beats_of_another_form_have_no_say():
    x = ecg()
    for at in PEAKS[[3, 7]]:
        x[at - 20 : at + 40] = 2.5 * np.sin(np.linspace(0, 3 * np.pi, 60))[:, None] * LEADS[::-1]
    want = delineate.intervals(ecg(), PEAKS)
    assert delineate.intervals(x, PEAKS) == pytest.approx(want, abs=6)


def test_the_baseline_fills_what_is_not_measured_and_says_so():
    class Rows:
        record_ids, age, sex = ["a", "b"], np.array([60.0, np.nan]), np.array([1.0, 0.0])
        signal = np.stack([ecg() * 1000, ecg() * 0]).astype(np.int16)
        valid = np.array([[0, 1000]] * 2)
        rpeaks = np.stack([np.pad(PEAKS, (0, 39), constant_values=-1), np.full(50, -1)])

    found = sources.BASELINES["age, sex, rate, PR, QRS, QT"](Rows())
    assert np.isfinite(found).all() and found.shape == (2, 26)
    assert found[0, 6] == pytest.approx(100 / 85) and found[0, 7] == 1
    pr, known, qrs = found[0, 18:21]
    assert known == 1 and pr == pytest.approx(0.16, abs=0.04) and qrs == pytest.approx(0.09, abs=0.03)
    assert not found[1, 6:].any()
