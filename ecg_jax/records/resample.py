"""Raw samples -> 100 Hz: a polyphase low-pass, as one matrix product per recording whose sums are exact.

The filter is that of `scipy.signal.resample_poly` (Kaiser window of 5.0, ten periods of the lower rate to each side) on
an odd extension of the signal. It is a product of blocks of the signal with one small matrix of taps, because a matrix
product is several times as fast as a loop over samples. It knows no record and judges nothing.

Invariant: what comes out does not depend on the machine, the number of threads, or what else is computed at the same
time. A matrix product adds in an order of its own, so this could not be promised of rounded sums; hence no sum is
rounded. The signal is put on a grid of 2^-22 of its largest value (float32 has 24 bits), the taps on one of 2^-27.
The odd extension is up to 3 times the signal and the absolute taps of one output sum to less than 2.3, so every
product and every partial sum, in any order, is a multiple of the product of the grids and less than 2^52 times it:
float64 holds it exactly.
"""

import math
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import numpy as np
from scipy import signal as dsp
from scipy.linalg.blas import dgemm

RATE = 100
REACH = 10  # periods of the lower rate to each side of a sample, and ...
KAISER = 5.0  # ... the window of the taps: what resample_poly does by default
BITS, TAP_BITS = 22, 27  # of the grids
LARGEST = 1 << 18  # taps in one matrix (2 MB); beyond it, for rates such as 499.8 Hz, SciPy is asked
COMMON = 512.0  # mV, or SD: up to here one grid does for all leads, no coarser than 0.12 uV


@dataclass(frozen=True)
class _Plan:
    """`rows` samples give `count` at 100 Hz. The first of these needs `reach` samples before the first of those."""

    rows: int
    count: int
    reach: int
    own: np.ndarray  # float64 [rows, count]: what a block of samples gives to its own outputs, and ...
    before: np.ndarray  # ... to those of the block before


@lru_cache(maxsize=64)
def ratio(rate: float) -> tuple[int, int]:
    """(up, down) of the polyphase resampler from `rate` to 100 Hz, exact to a few parts in a million."""
    fraction = (Fraction(RATE) / Fraction(rate).limit_denominator(1000)).limit_denominator(20_000)
    return fraction.numerator, fraction.denominator


def grid_of(low: np.ndarray, high: np.ndarray) -> float | np.ndarray:
    """The grid of a signal whose leads lie between `low` and `high` [L]: a power of two, one for all leads or, where a
    lead is so large that it would leave nothing of the others, [L, 1].
    """
    top = np.maximum(np.abs(low), np.abs(high))
    if (largest := float(top.max())) < COMMON:
        return math.ldexp(1.0, math.frexp(largest)[1] - BITS)
    return np.ldexp(1.0, np.frexp(top)[1] - BITS)[:, None]


def magic(grid: float | np.ndarray, digits: int = 52) -> float | np.ndarray:
    """x + magic - magic is x rounded to the grid, in floats of `digits` bits, for x less than 2^(digits - 1) of the
    grid: 1.5 * 2^digits leaves no bits for less."""
    return 1.5 * 2.0**digits * grid


def on_grid(values: np.ndarray, bits: int) -> np.ndarray:
    """`values` rounded to multiples of 2^-bits."""
    return np.rint(values * 2.0**bits) / 2.0**bits


def product(a: np.ndarray, b: np.ndarray, out: np.ndarray, add: bool) -> None:
    """`out` [n, m] = a [n, k] @ b [k, m], or that much more (`add`); all C-contiguous float64."""
    dgemm(1.0, b.T, a.T, beta=float(add), c=out.T, overwrite_c=True)


def resample(signal: np.ndarray, rate: float, grid: float | np.ndarray) -> np.ndarray:
    """float32 [T, L] at `rate`, all finite, with its `grid_of` -> float64 [L, ceil(T * 100 / rate)] at 100 Hz.

    T of at least 1.2 times REACH periods of 100 Hz. At 100 Hz only the axes change.
    """
    up, down = ratio(rate)
    if up == down:
        return np.ascontiguousarray(signal.T, dtype=np.float64)
    length, leads = signal.shape
    n = -(-length * up // down)
    plan = _plan(up, down)
    if plan is None:
        return _by_scipy(np.ascontiguousarray(signal.T, dtype=np.float64), up, down, n)
    if isinstance(grid, float):  # so |signal| < 2^22 of it, and float32 will do
        shift = np.float32(magic(grid, 23))
        even = signal + shift
    else:
        shift = magic(grid.T)
        even = signal + shift
    even -= shift
    reach, blocks = plan.reach, -(-n // plan.count) + 1
    wide = np.empty((leads, blocks * plan.rows))
    end = reach + length
    inner = wide[:, reach:end]
    inner[:] = even.T
    np.subtract(2 * inner[:, :1], inner[:, reach:0:-1], out=wide[:, :reach])
    fill = min(reach + 1, wide.shape[1] - end)  # the last sample at 100 Hz can lie beyond the last one here
    np.subtract(2 * inner[:, -1:], inner[:, -2 : -fill - 2 : -1], out=wide[:, end : end + fill])
    wide[:, end + fill :] = 0.0
    # All leads are one long row of blocks; the last output block of a lead is of two leads, and not used.
    flat = wide.reshape(leads * blocks, plan.rows)
    y = np.empty((leads * blocks, plan.count))
    product(flat[:-1], plan.own, y[:-1], add=False)
    product(flat[1:], plan.before, y[:-1], add=True)
    return y.reshape(leads, -1)[:, :n]


@lru_cache(maxsize=16)
def _plan(up: int, down: int) -> _Plan | None:
    """None where the matrix would be large."""
    half = REACH * max(up, down)
    reach = half // up
    # The samples that a block of outputs needs have to lie in two blocks of inputs.
    times = -(-(2 * reach + 1 - down // up) // down)
    rows, count = times * down, times * up
    if 2 * rows * count > LARGEST:
        return None
    taps = on_grid(dsp.firwin(2 * half + 1, 1 / max(up, down), window=("kaiser", KAISER)) * up, TAP_BITS)
    # In steps of the rates' common multiple, output i of a block is at i * down, sample j at (j - reach) * up.
    place = np.arange(count) * down - (np.arange(2 * rows)[:, None] - reach) * up + half
    matrix = np.where((place >= 0) & (place < len(taps)), taps[np.clip(place, 0, len(taps) - 1)], 0.0)
    return _Plan(rows, count, reach, matrix[:rows].copy(), matrix[rows:].copy())


def _by_scipy(x: np.ndarray, up: int, down: int, n: int) -> np.ndarray:
    # The extension covers the filter; zeros before it make it whole multiples of `down`, cut off to the sample.
    reach = REACH * max(up, down) // up + 1
    steps = -(-reach // down)
    left = 2 * x[:, :1] - x[:, reach:0:-1]
    right = 2 * x[:, -1:] - x[:, -2 : -reach - 2 : -1]
    zeros = np.zeros((len(x), steps * down - reach))
    wide = np.concatenate([zeros, left, x, right, zeros], axis=1)
    return dsp.resample_poly(wide, up, down, axis=1)[:, steps * up : steps * up + n]
