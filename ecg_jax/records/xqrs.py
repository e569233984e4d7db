"""XQRS, the QRS detector of HeartLang's tokenizer, for many records at once.

It finds exactly the beats that `wfdb.processing.xqrs_detect` (wfdb 4.1 to 4.3, default configuration) finds at 100 Hz,
with all that is odd in them: at this rate many are some 6 samples early, an inverted or a small lead loses beats, a
flat one has none. For beats to rely on there is `beats`. Invariant: index for index what wfdb gives, whatever else is
in the batch. Filters, local peaks and the learning's correlations are computed for the batch; the adaptive thresholds
are a chain of decisions, and run through each record's peaks.
"""

import math
from functools import lru_cache
from itertools import pairwise

import numpy as np
from scipy import ndimage
from scipy import signal as dsp

DETECTOR = "xqrs-1"  # wfdb's algorithm in its default configuration, on lead I

RATE = 100  # Hz; the samples below are meant at this rate
BAND = (5, 20)  # Hz
WIDTH, RADIUS = 10, 5  # of a QRS
REFRACTORY = 20
RR_FIRST, RR_MOST, RR_LEAST = 80.0, 240.0, 30.0
OVERDUE = 1.66  # of the recent RR interval
FIRST_LEVEL = 0.13  # the threshold in mV where nothing could be learned
LEARNED, LIKE = 8, 0.6  # beats to learn from, and how much they must resemble a Ricker wavelet
SHORTEST = 31  # samples that the filters need
LSB = 0.001
TOGETHER = 64  # records whose signals stay in a core's cache


def peaks(stored: np.ndarray, valid: np.ndarray) -> list[np.ndarray]:
    """Beats (int64, ascending sample positions) on lead I of stored records.

    stored: int16 [B, T, L] with lead I first, LSB mV; valid: [B, 2], (start, length) of the observed samples, more than
    30 of them. Padding is cut off, so that its edges are no steps.
    """
    spans = [(int(a), int(n)) for a, n in valid]
    out: list[np.ndarray] = [np.empty(0, np.int64)] * len(stored)
    for start, length in sorted(set(spans)):
        rows = [b for b, span in enumerate(spans) if span == (start, length)]
        lead = stored[rows, start : start + length, 0] * LSB
        for b, found in zip(rows, xqrs(lead), strict=True):
            out[b] = found + start
    return out


def xqrs(lead: np.ndarray) -> list[np.ndarray]:
    """Beats (int64, ascending) of each of float [B, n] at 100 Hz in mV; none where a lead is flat or has a NaN.

    Raises ValueError where n <= 30 and a lead is not flat, as wfdb does.
    """
    lead = np.asarray(lead)
    out: list[np.ndarray] = [np.empty(0, np.int64)] * len(lead)
    usable = np.flatnonzero(lead.max(axis=1) > lead.min(axis=1)) if lead.size else np.empty(0, int)
    if len(usable) and lead.shape[1] < SHORTEST:
        raise ValueError(f"{lead.shape[1]} samples: xqrs needs at least {SHORTEST}")
    for first in range(0, len(usable), TOGETHER):
        rows = usable[first : first + TOGETHER]
        for row, found in zip(rows.tolist(), _detect(lead[rows]), strict=True):
            out[row] = np.array(found, np.int64)
    return out


def _ricker(points: int) -> np.ndarray:
    """A wavelet of width 4 samples, at this rate five times as wide in time as where it was designed."""
    t = np.arange(points) - (points - 1.0) / 2
    return 2 / (np.sqrt(12) * np.pi**0.25) * (1 - t**2 / 16) * np.exp(-(t**2) / 32)


@lru_cache(maxsize=1)
def _design() -> tuple[np.ndarray, np.ndarray, float]:
    """(b, a) of the band-pass, and the gain of both filters at the band's middle, as the algorithm reckons it."""
    b, a = dsp.butter(2, [edge * 2 / RATE for edge in map(float, BAND)], "pass")
    middle = sum(BAND) / 2 * 2 * np.pi / RATE
    gain = 1.0
    for numerator, denominator in ((b, a), (_ricker(WIDTH), [1])):
        frequency, response = dsp.freqz(numerator, denominator)
        gain *= abs(response[np.argmax(frequency >= middle)]) * 2
    return b, a, gain


def _detect(lead: np.ndarray) -> list[list[int]]:
    b, a, gain = _design()
    band = dsp.filtfilt(b, a, lead, axis=1)
    energy = dsp.filtfilt(_ricker(WIDTH), [1], band, axis=1) ** 2
    starts = _learn(band, energy, gain)
    return [
        _decide(at, own[at].tolist(), start)
        for own, at, start in zip(energy, _local_peaks(energy), starts, strict=True)
    ]


def _local_peaks(series: np.ndarray) -> list[np.ndarray]:
    """Local maxima of each of [B, n] within RADIUS samples; of equal ones that lie closer, the first."""
    top = series == ndimage.maximum_filter1d(series, 2 * RADIUS, axis=1, mode="nearest")
    top &= (series.max(axis=1) > series.min(axis=1))[:, None]
    rows, at = np.nonzero(top)
    found = np.split(at, np.searchsorted(rows, np.arange(1, len(series))))
    return [own if len(own) < 2 or np.diff(own).min() >= RADIUS else _thinned(own) for own in found]


def _thinned(at: np.ndarray) -> np.ndarray:
    kept, last = [], -RADIUS
    for i in at.tolist():
        if i >= last + RADIUS:
            kept.append(i)
            last = i
    return np.array(kept, np.int64)


def _learn(band: np.ndarray, energy: np.ndarray, gain: float) -> list[tuple[float, float, float, float]]:
    """(beat amplitude, noise amplitude, RR, last beat) that each record's detection begins with."""
    n = band.shape[1]
    inner = []
    for at in _local_peaks(band):
        last = np.searchsorted(at, n - WIDTH, side="right") - 1  # this one is not looked at either
        inner.append(at[np.searchsorted(at, WIDTH, side="right") : max(last, 0)])
    rows = np.repeat(np.arange(len(band)), [len(at) for at in inner])
    at = np.concatenate(inner)
    segment = band[rows[:, None], at[:, None] + np.arange(-RADIUS, RADIUS)]
    wavelet = _ricker(2 * RADIUS)
    with np.errstate(invalid="ignore"):  # a segment of zeros resembles nothing
        like = segment @ wavelet / np.sqrt(np.square(segment).sum(axis=1))
        for i in np.flatnonzero(np.abs(like - LIKE) < 1e-9):  # too close for another order of the same sums
            like[i] = np.correlate(segment[i] / np.linalg.norm(segment[i]), wavelet)[0]
    alike = iter((like > LIKE).tolist())
    height = iter(energy[rows, at].tolist())
    return [_start(own.tolist(), [next(alike) for _ in own], [next(height) for _ in own], gain) for own in inner]


def _start(at: list[int], alike: list[bool], height: list[float], gain: float) -> tuple[float, float, float, float]:
    beats: list[int] = []
    tall: list[float] = []
    noise: list[float] = []
    last = -RR_MOST
    for i, similar, value in zip(at, alike, height, strict=True):
        if similar and i - last > RR_LEAST:
            last = i
            beats.append(i)
            tall.append(value)
        else:
            noise.append(value)
        if len(beats) == LEARNED:
            break
    else:
        amplitude = 27 / 40 * (FIRST_LEVEL * gain)
        return amplitude, amplitude / 10, RR_FIRST, 0
    amplitude = float(np.mean(tall))
    rr = [float(right - left) for left, right in pairwise(beats) if right - left < RR_MOST]
    return (
        amplitude,
        float(np.mean(noise)) if noise else amplitude / 10,
        float(np.mean(rr)) if rr else RR_FIRST,
        min(0, beats[0] - RR_LEAST - 1),
    )


def _decide(at: np.ndarray, height: list[float], start: tuple[float, float, float, float]) -> list[int]:
    """The beats among the local peaks `at` of the energy."""
    amplitude, noise, rr, last = start
    threshold = 0.25 * amplitude + 0.75 * noise
    places = at.tolist()
    beats: list[int] = []
    before = None  # number of the peak at which the last beat was accepted
    for number, (i, tall) in enumerate(zip(places, height, strict=True)):
        if i - last > REFRACTORY and tall > threshold:
            if i - last < RR_MOST:
                rr = 0.875 * rr + 0.125 * (i - last)
            beats.append(i)
            last, before = i, number
            amplitude = 0.875 * amplitude + 0.125 * tall
            threshold = 0.25 * amplitude + 0.75 * noise
        else:
            noise = 0.875 * noise + 0.125 * tall
        following = places[number + 1] if number + 1 < len(places) else -math.inf
        if before is not None and following - last > rr * OVERDUE:
            for earlier in range(before + 1, number + 1):
                i, tall = places[earlier], height[earlier]
                if i - last > REFRACTORY and tall > threshold / 2:
                    if i - last < RR_MOST:
                        rr = 0.875 * rr + 0.125 * (i - last)
                    beats.append(i)
                    last, before = i, number
                    amplitude = 0.75 * amplitude + 0.25 * tall
                    threshold = 0.25 * amplitude + 0.75 * noise
    return beats
