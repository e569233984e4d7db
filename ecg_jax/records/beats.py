"""R peaks from all leads at once.

Each lead's slope is measured in units of its own typical QRS slope, so neither an inverted, a small nor a
dead lead I matters; noisy leads weigh little. It finds ventricular beats, it does not classify them, and a
recording of noise alone may yield false ones. Invariant: peaks of a record depend on that record alone, not
on the batch or on its gain.
"""

import statistics
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from scipy import ndimage

from ecg_jax.records.audit import median

DETECTOR = "robust-1"  # stored with every data set; a change of any number below is a new version

SLOPE = 0.02  # s to each side: the difference answers best at 12.5 Hz, where QRS is and T is not
SMOOTH = 0.09  # s, about a QRS
REFRACTORY = 0.20  # s between two beats
BLOCK = 1.5  # s; the median over blocks of a block's maximum is the typical QRS, whatever a pop or a pause does
CAP = 1.4  # times the typical QRS slope: an artefact cannot outshout all other leads
ACCEPT = 0.45  # of the typical QRS
SEARCH_BACK = 0.18  # of the typical QRS, where a beat is overdue
OVERDUE = 1.6  # median RR intervals
T_WAVE = 0.42  # s after a beat within which ...
T_SHARE = 0.60  # ... a peak must reach this share of that beat, or of the typical QRS if that is less
REFINE = 0.06  # s to each side of the energy's peak in which the largest deflection is the R peak
_TINY = 1e-9


def r_peaks(
    signals: np.ndarray, rate: float = 100, valid: Sequence[tuple[int, int]] | np.ndarray | None = None
) -> list[np.ndarray]:
    """Sample positions (int64, ascending) of the R peaks of each record.

    signals: filtered float [B, T, 12], any unit; `valid` [B, 2] (start, length) leaves out padding; positions
    count from the start of the array. An empty array where nothing stands out. Deterministic.
    """
    signals = np.asarray(signals)
    total, length = signals.shape[:2]
    spans = [(0, length)] * total if valid is None else [(int(a), int(n)) for a, n in valid]
    out: list[np.ndarray] = [np.empty(0, np.int64)] * total
    for span in sorted(set(spans)):
        rows = [b for b in range(total) if spans[b] == span]
        start, n = span
        for chunk in range(0, len(rows), 64):  # as much as stays in the cache
            part = rows[chunk : chunk + 64]
            x = np.ascontiguousarray(signals[part, start : start + n].transpose(0, 2, 1), np.float32)
            for b, peaks in zip(part, detect(x, rate), strict=True):
                out[b] = peaks + start
    return out


def _typical(a: np.ndarray, rate: float) -> np.ndarray:
    """Median over blocks of the block maximum of [..., n] -> [...]."""
    blocks = max(1, round(a.shape[-1] / rate / BLOCK))
    edges = np.arange(blocks) * a.shape[-1] // blocks
    return median(np.maximum.reduceat(a, edges, axis=-1))


def _mean(a: np.ndarray, n: int) -> np.ndarray:
    """[..., m] -> [...], the sum over n; m a multiple of 16. Halves are added as a whole, which is several times as
    fast as a sum along the axis."""
    for _ in range(4):
        middle = a.shape[-1] // 2
        a = a[..., :middle] + a[..., middle:]
    return a.sum(axis=-1) / np.float32(n)


def detect(x: np.ndarray, rate: float) -> list[np.ndarray]:
    """Peaks of each of float32 [B, 12, n]: `r_peaks` for leads that lie apart, and no padding."""
    total, leads, n = x.shape
    if n < rate * 3 * REFRACTORY:
        return [np.empty(0, np.int64)] * total
    lag = max(1, round(SLOPE * rate))
    wide = np.zeros((total, leads, -(-n // 16) * 16), np.float32)
    slope = wide[:, :, :n]
    inner = slope[:, :, lag:-lag]
    np.subtract(x[:, :, 2 * lag :], x[:, :, : -2 * lag], out=inner)
    np.abs(inner, out=inner)
    typical = _typical(slope, rate)
    crest = typical / (_mean(wide, n) + _TINY)  # 3 in noise, 5 to 12 in an ECG
    weight = np.clip((crest - 3) / 4, 0.02, 1) * (typical > _TINY)
    weight = weight / (weight.sum(axis=1, keepdims=True) + _TINY)
    # The squared slope in units of the lead's typical one, at most CAP, times the lead's weight.
    unit = np.sqrt(weight) / (typical + _TINY)
    most = np.sqrt(weight) * np.float32(CAP)
    energy = np.zeros((total, n), np.float32)
    size = np.zeros_like(energy)
    for lead in range(leads):  # one by one: a fixed order of addition, whatever the batch
        part = slope[:, lead] * unit[:, lead, None]
        np.minimum(part, most[:, lead, None], out=part)
        energy += np.square(part, out=part)
        part = x[:, lead] * unit[:, lead, None]
        size += np.square(part, out=part)
    width = 2 * round(SMOOTH * rate / 2) + 1
    energy = np.sqrt(ndimage.uniform_filter1d(energy.astype(np.float64), width, axis=1, mode="constant").clip(0))
    level = _typical(energy, rate)
    around = 2 * round(REFRACTORY * rate) - 1
    top = ndimage.maximum_filter1d(energy, around, axis=1, mode="constant")
    rows, at = np.nonzero((energy == top) & (energy > SEARCH_BACK * level[:, None]) & (level[:, None] > _TINY))
    height = (energy[rows, at] / level[rows]).tolist()
    ends = np.searchsorted(rows, np.arange(total + 1)).tolist()
    at = at.tolist()
    return _refine([_choose(at[a:z], height[a:z], rate) for a, z in pairwise(ends)], size, rate)


def _choose(at: list[int], height: list[float], rate: float) -> list[int]:
    """Beats among the candidates `at` (ascending) of `height` (1 = a typical QRS)."""
    chosen: list[int] = []  # indices into `at`
    for i, tall in enumerate(height):
        if tall < ACCEPT:
            continue
        if chosen:
            gap = (at[i] - at[chosen[-1]]) / rate
            if gap < REFRACTORY or (gap < T_WAVE and tall < T_SHARE * min(1.0, height[chosen[-1]])):
                continue
        chosen.append(i)
    if len(chosen) < 3:
        return [at[i] for i in chosen]
    overdue = OVERDUE * statistics.median(at[right] - at[left] for left, right in pairwise(chosen))
    extra = []
    for left, right in pairwise(chosen):
        if right - left > 1 and at[right] - at[left] > overdue:
            free = [
                i
                for i in range(left + 1, right)
                if at[i] - at[left] > T_WAVE * rate and at[right] - at[i] > REFRACTORY * rate
            ]
            if free:
                extra.append(max(free, key=lambda i: height[i]))
    return [at[i] for i in sorted(chosen + extra)]


def _refine(peaks: list[list[int]], size: np.ndarray, rate: float) -> list[np.ndarray]:
    """Move each peak of each record to the largest deflection (all leads) near it in `size` [B, n]; drop what then
    falls together."""
    reach = round(REFINE * rate)
    wide = np.full((len(size), size.shape[1] + 2 * reach), -1.0, np.float32)
    wide[:, reach : reach + size.shape[1]] = size
    rows = np.repeat(np.arange(len(peaks)), [len(own) for own in peaks])
    at = np.array([peak for own in peaks for peak in own], np.int64)
    around = wide[rows[:, None], at[:, None] + np.arange(2 * reach + 1)]
    places = iter((at - reach + around.argmax(axis=1)).tolist())
    out = []
    for own in peaks:
        moved: list[int] = []
        for _, place in zip(own, places, strict=False):
            if not moved or place - moved[-1] >= REFRACTORY * rate / 2:
                moved.append(place)
        out.append(np.array(moved, np.int64))
    return out
