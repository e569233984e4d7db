"""Resampling and filtering at speed, against SciPy's plain functions."""

import dataclasses

import numpy as np
import pytest
from scipy import signal as dsp

from ecg_jax.records import chain as filters
from ecg_jax.records.chain import CHAINS, run
from ecg_jax.records.resample import TAP_BITS, _plan, grid_of, ratio, resample

DEFAULT = CHAINS["default"]


def hard(length: int, seed: int = 0) -> np.ndarray:
    """float32 [length, 12]: noise, drift and steps of 20 mV, ramps, pulses, an offset, a dead and a constant lead."""
    rng = np.random.default_rng(seed)
    x = 0.3 * rng.standard_normal((12, length))
    x[1] = np.cumsum(x[1]) * 0.2
    x[2] += 30
    x[3, length // 2 :] += 20
    x[4, :5] -= 20
    x[5, -3:] += 20
    x[6] = np.linspace(-20, 20, length)
    x[7] = 20 * np.sin(np.arange(length) / 100)
    x[8] = 20 * (np.arange(length) // 50 % 2)
    x[9] = 0
    x[10] = 3.3
    x[11, length // 2] = 20
    return np.ascontiguousarray(x.T, dtype=np.float32)


def grid(x: np.ndarray) -> float | np.ndarray:
    return grid_of(x.min(axis=0), x.max(axis=0))


def plainly_resampled(x: np.ndarray, rate: float) -> np.ndarray:
    """[T, 12] -> [12, n]: resample_poly on an odd extension of whole periods, cut off again."""
    up, down = ratio(rate)
    x = x.T.astype(np.float64)
    if up == down:
        return x
    steps = -(-10 * max(up, down) // up // down) + 1
    n = steps * down
    left, right = 2 * x[:, :1] - x[:, n:0:-1], 2 * x[:, -1:] - x[:, -2 : -n - 2 : -1]
    wide = dsp.resample_poly(np.concatenate([left, x, right], axis=1), up, down, axis=1)
    return wide[:, steps * up : steps * up + -(-x.shape[1] * up // down)]


def plainly_filtered(y: np.ndarray) -> np.ndarray:
    sections = np.concatenate(
        [dsp.butter(1, 0.67, "highpass", fs=100, output="sos"), dsp.butter(5, 40, "lowpass", fs=100, output="sos")]
    )
    return dsp.sosfiltfilt(sections, y, axis=-1, padtype="odd", padlen=min(300, y.shape[-1] - 1))


@pytest.mark.parametrize("rate", [80.0, 90.5, 100.0, 128.0, 200.0, 250.0, 257.0, 360.0, 400.0, 500.0, 1000.0, 5000.0])
def test_resampling_is_scipys(rate):
    x = hard(round(rate * 7.337))
    expected = plainly_resampled(x, rate)
    found = resample(x, rate, grid(x))
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() < 2e-5  # mV, of 33


def test_a_rate_with_a_large_ratio_has_no_edges():
    """499.8 Hz is 500 / 2499: SciPy's own function, and the odd extension also where that is not a whole period."""
    t = np.arange(3669) / 499.8
    x = np.repeat((5 + np.sin(2 * np.pi * 3 * t))[:, None], 12, axis=1).astype(np.float32)
    y = resample(x, 499.8, grid(x))
    t = np.arange(y.shape[1]) / 100
    assert np.abs(y - 5 - np.sin(2 * np.pi * 3 * t)).max() < 0.06
    assert np.abs(y - 5 - np.sin(2 * np.pi * 3 * t))[:, 20:-20].max() < 0.005


@pytest.mark.parametrize("n", [251, 300, 301, 302, 335, 336, 337, 383, 384, 500, 734, 1000, 1024, 1500, 6000])
def test_the_filter_is_scipys(n):
    """Within 1 uV whatever the length, for steps of 20 mV; within a tenth for what an ECG is like."""
    x = hard(n, n)
    (found,) = run(DEFAULT, [x.T.astype(np.float64)], [grid(x)])
    expected = plainly_filtered(x.T.astype(np.float64))
    assert np.abs(found - expected).max() < 5e-4
    x = (hard(n, n)[:, :2] / 3 + 0.5).repeat(6, axis=1)
    (found,) = run(DEFAULT, [x.T.astype(np.float64)], [grid(x)])
    assert np.abs(found - plainly_filtered(x.T.astype(np.float64))).max() < 1e-4


@pytest.mark.parametrize("rate", [257.0, 400.0, 500.0])
def test_both_are_scipys(rate):
    x = hard(round(rate * 10))
    (found,) = run(DEFAULT, [resample(x, rate, grid(x))], [grid(x)])
    assert np.abs(found - plainly_filtered(plainly_resampled(x, rate))).max() < 5e-4


def test_the_short_cut_is_taken_where_it_may_be():
    assert filters._kernel(DEFAULT) is not None
    assert filters._kernel(CHAINS["heartlang"]) is None and filters._kernel(CHAINS["none"]) is None
    assert filters._kernel(dataclasses.replace(DEFAULT, pad=100)) is None
    assert filters._kernel(dataclasses.replace(DEFAULT, highpass=(2, 0.67))) is None
    assert filters._kernel(dataclasses.replace(DEFAULT, highpass=(1, 0.1))) is None  # it dies away too slowly
    assert filters._kernel(dataclasses.replace(DEFAULT, lowpass=(5, 3.0))) is None  # so does this


@pytest.mark.parametrize("lowpass", [None, (4, 35.0)])
def test_other_chains_of_that_form(lowpass):
    chain = dataclasses.replace(DEFAULT, lowpass=lowpass)
    assert filters._kernel(chain) is not None
    x = hard(1000).T.astype(np.float64)
    (found,) = run(chain, [x], [grid(x.T)])
    sections = [dsp.butter(1, 0.67, "highpass", fs=100, output="sos")]
    if lowpass:
        sections.append(dsp.butter(*lowpass, fs=100, output="sos"))
    expected = dsp.sosfiltfilt(np.concatenate(sections), x, axis=1, padtype="odd", padlen=300)
    assert np.abs(found - expected).max() < 2e-3


def test_no_sum_is_rounded():
    """Sums of a matrix product are exact: leads in another order, alone, or twice as many give the same bits."""
    x = hard(5000)
    order = np.random.default_rng(1).permutation(12)
    y, z = resample(x, 500.0, grid(x)), resample(x[:, order], 500.0, grid(x))
    np.testing.assert_array_equal(y[order], z)
    alone = np.concatenate([resample(x[:, [i]], 500.0, grid(x)) for i in range(12)])
    np.testing.assert_array_equal(y, alone)
    (a,) = run(DEFAULT, [y], [grid(x)])
    many = run(DEFAULT, [y, y[order], 3 * y, *[y] * 30], [grid(x)] * 33)
    np.testing.assert_array_equal(many[0], a)
    np.testing.assert_array_equal(many[1], a[order])
    np.testing.assert_array_equal(many[-1], a)


def test_the_bits_suffice():
    """The numbers that the heads of both modules promise: extension times taps, and extension times kernel."""
    for up, down in [(1, 4), (1, 5), (1, 10), (2, 5), (25, 32), (100, 257), (5, 4)]:
        plan = _plan(up, down)
        taps = np.concatenate([plan.own, plan.before])
        assert np.abs(taps).sum(axis=0).max() < 2.3
        steps = taps * 2.0**TAP_BITS
        np.testing.assert_array_equal(steps, np.rint(steps))
    kernel = filters._kernel(DEFAULT)
    every = [*kernel.near, kernel.far]
    assert sum(np.abs(part).sum(axis=0) for part in every[:3]).max() < 2.7
    assert np.abs(kernel.weights).sum(axis=0).max() < 47
    for part, bits in [*((part, filters.MATRIX_BITS) for part in every), (kernel.weights, filters.WEIGHT_BITS)]:
        np.testing.assert_array_equal(part * 2.0**bits, np.rint(part * 2.0**bits))


def test_one_wild_lead_does_not_coarsen_the_others():
    x = hard(5000)
    expected = plainly_filtered(plainly_resampled(x, 500.0))
    x[:, 11] = 1e30
    x[100, 11] = -1e30
    (found,) = run(DEFAULT, [resample(x, 500.0, grid(x))], [grid(x)])
    assert np.isfinite(found).all()
    assert np.abs(found - expected)[:11].max() < 5e-4


def test_a_constant_leaves_nothing():
    for value in (0.0, 0.1, -7.7, 300.0, 1e6):
        x = np.full((2934, 12), value, np.float32)
        (found,) = run(DEFAULT, [resample(x, 400.0, grid(x))], [grid(x)])
        assert not found.any()
