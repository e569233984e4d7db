"""PR, QRS and QT of a 10-second recording, from its median beat at 100 Hz.

Beats are aligned at their R peaks and the usual one is their median, beats of another form left out; noise and f waves
shrink with the number of beats. The median beat is drawn at 500 Hz and read on the size of its slope over all leads
(QRS) and on its size (P, T): QRS begins and ends where the slope falls to a share of its peak; P begins where the
tangent at its steepest rise meets what lies before it, T ends where that at its steepest fall meets what lies behind
it. Thresholds were set on LUDB's recordings of odd number. A measurement for tables of baselines, no diagnosis: one
number for all leads and beats. Invariant: gain, and the sign or the order of the leads, change nothing.
"""

from typing import NamedTuple

import numpy as np
from scipy import signal as dsp

RATE, FINE = 100, 5  # Hz of the recording; samples of the median beat for one of its
BEFORE, AFTER = 40, 65  # samples of 10 ms around the R peak
LEAST = 3  # beats
ALIKE = 0.8  # correlation of a beat with the median below which it is another form
QRS_EDGE = 0.07  # of the steepest slope
P_LEAST = 0.02, 2.5  # of the QRS's size, and times the noise: below, there is no P wave
T_LATE = 10  # samples at 500 Hz that cardiologists put the end of T behind the foot of its tangent


class Intervals(NamedTuple):
    """pr, qrs, qt in milliseconds; NaN where not to be measured."""

    pr: float
    qrs: float
    qt: float


NOTHING = Intervals(float("nan"), float("nan"), float("nan"))


def intervals(signal: np.ndarray, peaks: np.ndarray, start: int = 0, length: int | None = None) -> Intervals:
    """Of one recording: signal float or int [T, L] at 100 Hz in any unit; peaks int, R peaks in samples (negative ones
    are ignored); start, length: the observed span. No randomness.
    """
    peaks = np.asarray(peaks, np.int64)
    stop = len(signal) if length is None else start + length
    peaks = peaks[(peaks >= start) & (peaks < stop)]
    gap = int(np.median(np.diff(peaks))) if len(peaks) > 1 else 0
    before, after = min(BEFORE, gap * 45 // 100), min(AFTER, gap * 70 // 100)
    whole = peaks[(peaks - before - 2 >= start) & (peaks + after + 2 < stop)]
    if len(whole) < LEAST or before < 12:
        return NOTHING
    beat = median_beat(np.asarray(signal, np.float64), whole, before, after)
    return NOTHING if beat is None else _read(beat, before * FINE)


def median_beat(x_TxL: np.ndarray, peaks: np.ndarray, before: int, after: int) -> np.ndarray | None:
    """The usual beat, float64 [FINE (before + after), L] at 500 Hz; None where fewer than LEAST beats are alike."""
    place = np.arange(-before, after)
    span = np.arange(-2, 3)
    beats = x_TxL[peaks[:, None] + place]
    for _ in range(2):  # align to the median, then again to a better one
        usual = np.median(beats, axis=0)
        core = slice(before - 12, before + 12)
        moved = x_TxL[peaks[:, None, None] + span[:, None] + place[core]]  # [n, 5, 24, L]
        shift = span[np.einsum("nswl,wl->ns", moved, usual[core]).argmax(1)]
        beats = x_TxL[(peaks + shift)[:, None] + place]
    flat = beats - beats.mean(1, keepdims=True)
    norm = np.sqrt((flat**2).sum((1, 2))) * np.sqrt(((usual - usual.mean(0)) ** 2).sum())
    alike = (flat * (usual - usual.mean(0))).sum((1, 2)) > ALIKE * norm
    if alike.sum() < LEAST:
        return None
    return dsp.resample_poly(np.median(beats[alike], axis=0), FINE, 1, axis=0, padtype="line")


def _read(beat_TxL: np.ndarray, centre: int) -> Intervals:
    slope = np.sqrt((np.gradient(beat_TxL, axis=0) ** 2).sum(1))
    slope = dsp.convolve(slope, np.ones(5) / 5, mode="same")
    around = slice(max(centre - 60, 0), centre + 60)  # 120 ms to each side
    top = around.start + int(slope[around].argmax())
    if not slope[top] > 0:
        return NOTHING
    first, last = _down(slope, top, -1), _down(slope, top, 1)
    if first is None or last is None or not 20 <= last - first <= 125:
        return NOTHING
    t_end = _t_end(beat_TxL, last)
    p_on = _p_onset(beat_TxL, first, last)
    ms = 1000 / (RATE * FINE)
    nan = float("nan")
    return Intervals(
        nan if p_on is None else (first - p_on) * ms,
        (last - first) * ms,
        nan if t_end is None else (t_end - first) * ms,
    )


def _down(slope: np.ndarray, top: int, step: int) -> int | None:
    """Where the slope, from its peak on, first stays below QRS_EDGE of the peak for 16 ms, and does not rise to 0.4 of
    it again within 56 ms."""
    low = slope < QRS_EDGE * slope[top]
    at = top
    while 0 <= at < len(slope):
        ahead = low[at : at + 8] if step > 0 else low[max(at - 7, 0) : at + 1]
        further = slope[at : at + 28] if step > 0 else slope[max(at - 27, 0) : at + 1]
        if ahead.all() and not (further > 0.4 * slope[top]).any():
            return at
        at += step
    return None


def _t_end(beat_TxL: np.ndarray, last: int) -> int | None:
    tail = beat_TxL[last + 40 :]  # 80 ms behind the QRS
    if len(tail) < 60:
        return None
    size = _smooth(np.sqrt(((tail - np.median(tail[-25:], axis=0)) ** 2).sum(1)), 11)
    peak = int(size[: len(size) - 20].argmax())
    fall = np.gradient(size)
    steep = peak + int(fall[peak:].argmin())
    floor = size[steep:].min()
    if peak < 5 or not fall[steep] < 0 or size[peak] < 2 * floor:
        return None
    end = steep + (size[steep] - floor) / -fall[steep]
    return None if end >= len(size) else last + 45 + round(end) + T_LATE


def _p_onset(beat_TxL: np.ndarray, first: int, last: int) -> int | None:
    head = beat_TxL[:first]
    if len(head) < 60:
        return None
    # From what lies before P to what lies before QRS: a slope of the baseline is no P wave.
    ends = np.median(head[:20], axis=0), np.median(head[-6:], axis=0)
    part = np.linspace(0, 1, len(head))[:, None]
    size = _smooth(np.sqrt(((head - ends[0] * (1 - part) - ends[1] * part) ** 2).sum(1)), 7)
    qrs = np.sqrt(((beat_TxL[first:last] - ends[0]) ** 2).sum(1)).max()
    begin = max(len(size) - 140, 0)
    peak = begin + int(size[begin : len(size) - 15].argmax())
    noise = np.median(size[: max(peak - 45, 10)])
    if size[peak] < max(P_LEAST[0] * qrs, P_LEAST[1] * noise):
        return None
    rise = np.gradient(size)
    steep = max(peak - 40, 0) + int(rise[max(peak - 40, 0) : peak + 1].argmax())
    if not rise[steep] > 0:
        return None
    floor = size[max(steep - 30, 0) : steep + 1].min()
    return max(round(steep - (size[steep] - floor) / rise[steep]) + 3, 0)


def _smooth(x: np.ndarray, width: int) -> np.ndarray:
    return dsp.convolve(x, np.ones(width) / width, mode="valid")
