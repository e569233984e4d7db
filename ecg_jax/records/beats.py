"""R peaks from all leads at once.

Each lead's slope is measured in units of its own typical QRS slope, so neither an inverted, a small nor a
dead lead I matters; noisy leads weigh little. It finds ventricular beats, it does not classify them, and a
recording of noise alone may yield false ones. Invariant: peaks of a record depend on that record alone, not
on the batch or on its gain.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from scipy import ndimage

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
        if n < rate * 3 * REFRACTORY:
            continue
        for chunk in range(0, len(rows), 64):  # as much as stays in the cache
            part = rows[chunk : chunk + 64]
            x = np.ascontiguousarray(signals[part, start : start + n].transpose(0, 2, 1), np.float32)
            for b, peaks in zip(part, _detect(x, rate), strict=True):
                out[b] = peaks + start
    return out


def _typical(a: np.ndarray, rate: float) -> np.ndarray:
    """Median over blocks of the block maximum of [..., n] -> [...]."""
    blocks = max(1, round(a.shape[-1] / rate / BLOCK))
    edges = np.arange(blocks) * a.shape[-1] // blocks
    return np.median(np.maximum.reduceat(a, edges, axis=-1), axis=-1)


def _detect(x: np.ndarray, rate: float) -> list[np.ndarray]:
    """float32 [B, 12, n] -> peaks per record."""
    lag = max(1, round(SLOPE * rate))
    slope = np.zeros_like(x)
    np.abs(x[:, :, 2 * lag :] - x[:, :, : -2 * lag], out=slope[:, :, lag:-lag])
    typical = _typical(slope, rate)
    crest = typical / (slope.mean(axis=2) + _TINY)  # 3 in noise, 5 to 12 in an ECG
    weight = np.clip((crest - 3) / 4, 0.02, 1) * (typical > _TINY)
    weight = weight / (weight.sum(axis=1, keepdims=True) + _TINY)
    slope /= typical[:, :, None] + _TINY
    np.minimum(slope, CAP, out=slope)
    np.square(slope, out=slope)
    energy = np.zeros((len(x), x.shape[2]), np.float32)
    size = np.zeros_like(energy)
    gain = weight / (typical + _TINY) ** 2
    for lead in range(x.shape[1]):  # one by one: a fixed order of addition, whatever the batch
        energy += weight[:, lead, None] * slope[:, lead]
        size += gain[:, lead, None] * np.square(x[:, lead])
    width = 2 * round(SMOOTH * rate / 2) + 1
    energy = np.sqrt(ndimage.uniform_filter1d(energy.astype(np.float64), width, axis=1, mode="constant").clip(0))
    level = _typical(energy, rate)
    around = 2 * round(REFRACTORY * rate) - 1
    top = ndimage.maximum_filter1d(energy, around, axis=1, mode="constant")
    rows, at = np.nonzero((energy == top) & (energy > SEARCH_BACK * level[:, None]) & (level[:, None] > _TINY))
    ends = np.searchsorted(rows, np.arange(len(x) + 1))
    return [
        _refine(_choose(at[a:z], energy[b, at[a:z]] / level[b], rate), size[b], rate)
        for b, (a, z) in enumerate(pairwise(ends))
    ]


def _choose(at: np.ndarray, height: np.ndarray, rate: float) -> list[int]:
    """Beats among the candidates `at` (ascending) of `height` (1 = a typical QRS)."""
    chosen: list[int] = []  # indices into `at`
    for i in range(len(at)):
        if height[i] < ACCEPT:
            continue
        if chosen:
            gap = (at[i] - at[chosen[-1]]) / rate
            if gap < REFRACTORY or (gap < T_WAVE and height[i] < T_SHARE * min(1.0, height[chosen[-1]])):
                continue
        chosen.append(i)
    if len(chosen) < 3:
        return [int(at[i]) for i in chosen]
    rr = float(np.median(np.diff(at[chosen])))
    extra = []
    for left, right in pairwise(chosen):
        if at[right] - at[left] > OVERDUE * rr:
            free = [
                i
                for i in range(left + 1, right)
                if at[i] - at[left] > T_WAVE * rate and at[right] - at[i] > REFRACTORY * rate
            ]
            if free:
                extra.append(max(free, key=lambda i: height[i]))
    return [int(at[i]) for i in sorted(chosen + extra)]


def _refine(peaks: list[int], size: np.ndarray, rate: float) -> np.ndarray:
    """Move each peak to the largest deflection (all leads) near it; drop what then falls together."""
    reach = round(REFINE * rate)
    moved = []
    for peak in peaks:
        start = max(0, peak - reach)
        place = start + int(np.argmax(size[start : peak + reach + 1]))
        if not moved or place - moved[-1] >= REFRACTORY * rate / 2:
            moved.append(place)
    return np.asarray(moved, np.int64)
