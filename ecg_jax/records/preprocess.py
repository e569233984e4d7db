"""Record -> what is stored: 10 s windows of int16 at 100 Hz, with quality bits, R peaks and a content
signature.

The order of the steps, all in float64: padding stripped, spikes and missing samples bridged, the whole
observed span resampled to 100 Hz (polyphase), filtered there (zero phase), and only then cut, so that no
window has a filter's edge inside the recording. It knows no data set and no file. Invariant: the result for a
record is the same to the bit whether it is prepared alone or among others, because every operation works
along the time axis of one lead.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Literal

import numpy as np
from scipy import signal as dsp

from ecg_jax.records import audit, beats
from ecg_jax.records.audit import Event, Quality
from ecg_jax.records.leads import LEADS
from ecg_jax.records.record import Prepared, Record, Refused
from ecg_jax.records.signature import signature

RATE = 100
LENGTH = 1000
MIN_SECONDS = 2.5
MIN_RATE, MAX_RATE = 80.0, 20_000.0  # below 80 Hz the 40 Hz band is not there
LSB = 1e-3  # mV, or SD of a unit-less signal
INT16 = 32767
BATCH_SAMPLES = 240_000  # raw samples (all leads) handled at once: 2 MB of float64, what a core's cache holds


@dataclass(frozen=True)
class Chain:
    """A filter chain. Orders and Hz of Butterworth designs, each run forwards and backwards at 100 Hz.

    `pad` is the length of the odd extension in samples at 100 Hz (less where the record is shorter).
    """

    name: str
    highpass: tuple[int, float] | None = None
    lowpass: tuple[int, float] | None = None
    bandpass: tuple[int, float, float] | None = None
    pad: int = 0
    version: int = 1  # of everything else in this module that changes stored values

    def describe(self) -> dict:
        """All that decides the stored samples, JSON-able."""
        return asdict(self) | {
            "rate": RATE,
            "length": LENGTH,
            "lsb": LSB,
            "steps": ["strip", "repair", "resample", "filter", "cut", "round"],
            "resample": "polyphase, kaiser 5.0, odd extension",
            "filter": "butterworth, zero phase, odd extension",
        }

    def digest(self) -> str:
        """32 hex digits of `describe`."""
        text = json.dumps(self.describe(), sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


CHAINS: dict[str, Chain] = {
    # 300 samples are 12 time constants of the high-pass: its start-up has died away before the first sample.
    "default": Chain("default", highpass=(1, 0.67), lowpass=(5, 40.0), pad=300),
    # What HeartLang's codebook was trained on: one band-pass, SciPy's default extension for its 11
    # coefficients.
    "heartlang": Chain("heartlang", bandpass=(5, 0.67, 40.0), pad=33),
    "none": Chain("none"),
}


@dataclass
class _Span:
    """The observed part of a record, and what becomes of it."""

    index: int
    record: Record
    start: int  # raw samples stripped in front
    raw: np.ndarray  # float32 [T, 12]
    quality: Quality


@dataclass
class _Window:
    """A cut of a filtered span: float64 [12, n], n <= LENGTH, beginning `offset` samples (100 Hz) into the
    span.
    """

    span: _Span
    number: int | None
    offset: int
    y: np.ndarray
    quality: Quality


def prepare_many(
    records: Sequence[Record], chain: Chain = CHAINS["default"], windows: Literal["all", "first"] = "all"
) -> list[list[Prepared] | Refused]:
    """Prepare `records`; entry i is the list of windows of record i, or why it is refused. Never raises for a
    record.

    Up to 10 s is centre-padded, 10 to 15 s centre-cropped; from 15 s on it is cut into windows of 10 s with
    ids "<id>#0", "<id>#1", ... (a rest of 5 s or more becomes a padded one), of which `windows="first"` keeps
    the first. Reasons: bad-shape, bad-rate, all-nan, all-zero, too-short, mostly-missing, no-signal.
    Deterministic, and the same whatever else is in `records`.
    """
    results: list[list[Prepared] | Refused] = [[] for _ in records]
    groups: dict[tuple[int, float], list[_Span]] = defaultdict(list)
    for index, record in enumerate(records):
        try:
            span = _observe(index, record)
        except Refused as refusal:
            results[index] = refusal
        else:
            groups[len(span.raw), float(record.rate)].append(span)
    for (length, rate), spans in groups.items():
        size = max(1, BATCH_SAMPLES // (length * len(LEADS)))
        for first in range(0, len(spans), size):
            batch = spans[first : first + size]
            kept: list[_Window] = []
            for span, cuts in zip(batch, _windows(batch, rate, chain, windows), strict=True):
                if isinstance(cuts, Refused):
                    results[span.index] = cuts
                else:
                    kept += cuts
            for window, prepared in zip(kept, _finish(kept), strict=True):
                results[window.span.index].append(prepared)
    return results


def _observe(index: int, record: Record) -> _Span:
    raw = np.asarray(record.signal, np.float32)
    if raw.ndim != 2 or raw.shape[1] != len(LEADS):
        raise Refused("bad-shape", f"signal of shape {raw.shape}, expected [samples, {len(LEADS)}]")
    if not MIN_RATE <= record.rate <= MAX_RATE:  # also false for NaN
        raise Refused("bad-rate", f"{record.rate} Hz is outside {MIN_RATE:g} to {MAX_RATE:g} Hz")
    if not len(raw):
        raise Refused("too-short", "no samples")
    start, stop = audit.observed(raw)
    if (stop - start) / record.rate < MIN_SECONDS:
        stripped = " without its padding" if stop - start < len(raw) else ""
        seconds = (stop - start) / record.rate
        raise Refused("too-short", f"{seconds:.2f} s observed{stripped}, at least {MIN_SECONDS} s are needed")
    quality = Quality(record.quality)
    if stop - start < len(raw):
        quality |= Quality.STRIPPED
    return _Span(index, record, start, raw[start:stop], quality)


def _windows(spans: list[_Span], rate: float, chain: Chain, windows: str) -> list[list[_Window] | Refused]:
    """Cuts of spans of equal length and rate."""
    x = np.empty((len(spans), len(LEADS), len(spans[0].raw)))
    for b, span in enumerate(spans):
        x[b] = span.raw.T
    missing = ~np.isfinite(x)
    gaps = missing.any(axis=(1, 2))
    events = audit.inspect_raw(x, rate)
    y = _filter(_resample(x, rate), chain)
    cuts = _cuts(y.shape[2], windows)
    out: list[list[_Window] | Refused] = []
    for b, span in enumerate(spans):
        kept, refusal = [], None
        for number, offset, n in cuts:
            begin, end = round(offset * rate / RATE), round((offset + n) * rate / RATE)
            if gaps[b] and (lost := audit.missing_share(missing[b, :, begin:end])):
                refusal = Refused("mostly-missing", f"more than half of the samples are missing in lead {lost}")
                continue
            dead = [e for e in events[b] if e.bit == Quality.DEAD_LEAD]
            piece = y[b, :, offset : offset + n]
            if len(dead) == len(LEADS) or not np.rint(piece / LSB).any():
                refusal = Refused("no-signal", "every lead is constant")
                continue
            quality = span.quality | _bits(events[b], begin, end)
            kept.append(_Window(span, number, offset, piece, quality))
        out.append(kept if kept else refusal)
    return out


def _bits(events: list[Event], begin: int, end: int) -> Quality:
    bits = Quality(0)
    for event in events:
        if event.start < end and event.stop > begin:
            bits |= event.bit
    return bits


def _cuts(length: int, windows: str) -> list[tuple[int | None, int, int]]:
    """(window number or None, offset, samples) for a span of `length` samples at 100 Hz."""
    if length < LENGTH * 3 // 2:
        n = min(length, LENGTH)
        return [(None, (length - n) // 2, n)]
    starts = list(range(0, length - LENGTH // 2 + 1, LENGTH))
    cuts = [(i, at, min(LENGTH, length - at)) for i, at in enumerate(starts)]
    return cuts[:1] if windows == "first" else cuts


def ratio(rate: float) -> tuple[int, int]:
    """(up, down) of the polyphase resampler from `rate` to 100 Hz, exact to a few parts in a million."""
    fraction = (Fraction(RATE) / Fraction(rate).limit_denominator(1000)).limit_denominator(20_000)
    return fraction.numerator, fraction.denominator


def _odd(x: np.ndarray, n: int) -> np.ndarray:
    """Odd extension of [..., T] by n <= T - 1 samples at both ends."""
    left = 2 * x[..., :1] - x[..., n:0:-1]
    right = 2 * x[..., -1:] - x[..., -2 : -n - 2 : -1]
    return np.concatenate([left, x, right], axis=-1)


def _resample(x: np.ndarray, rate: float) -> np.ndarray:
    """[..., T] at `rate` -> [..., ceil(T * 100 / rate)] at 100 Hz."""
    up, down = ratio(rate)
    if up == down:
        return x
    # The extension covers the filter's half length, in whole multiples of `down`, so that it is cut off to
    # the sample.
    steps = -(-10 * max(up, down) // up // down) + 1
    steps = min(steps, (x.shape[-1] - 1) // down)
    wide = dsp.resample_poly(_odd(x, steps * down), up, down, axis=-1)
    n = -(-x.shape[-1] * up // down)
    return wide[..., steps * up : steps * up + n]


@lru_cache(maxsize=8)
def _sections(chain: Chain) -> np.ndarray | None:
    parts = []
    if chain.highpass:
        parts.append(dsp.butter(chain.highpass[0], chain.highpass[1], "highpass", fs=RATE, output="sos"))
    if chain.lowpass:
        parts.append(dsp.butter(chain.lowpass[0], chain.lowpass[1], "lowpass", fs=RATE, output="sos"))
    if chain.bandpass:
        order, low, high = chain.bandpass
        parts.append(dsp.butter(order, [low, high], "bandpass", fs=RATE, output="sos"))
    return np.concatenate(parts) if parts else None


def _filter(y: np.ndarray, chain: Chain) -> np.ndarray:
    sections = _sections(chain)
    if sections is None:
        return y
    return dsp.sosfiltfilt(sections, y, axis=-1, padtype="odd", padlen=min(chain.pad, y.shape[-1] - 1))


def _finish(windows: list[_Window]) -> list[Prepared]:
    if not windows:
        return []
    stored = np.zeros((len(windows), LENGTH, len(LEADS)), np.int16)
    valid = []
    for i, window in enumerate(windows):
        n = window.y.shape[1]
        start = (LENGTH - n) // 2
        valid.append((start, n))
        steps = np.rint(window.y / LSB)
        if np.abs(steps).max() > INT16:
            window.quality |= Quality.CLIPPED
            steps = np.clip(steps, -INT16, INT16)
        stored[i, start : start + n] = steps.T
        if window.span.record.unit == "mV":
            window.quality |= _amplitude_bits(window.y)
    # Beats are found in the stored values, so that whoever reads the shards finds the same.
    peaks = beats.r_peaks(stored * np.float32(LSB), RATE, valid)
    return [_prepared(window, stored[i], valid[i], peaks[i]) for i, window in enumerate(windows)]


def _amplitude_bits(y: np.ndarray) -> Quality:
    bits = Quality(0)
    if np.abs(y).max() > audit.HIGH:
        bits |= Quality.HIGH
    if (y.max(axis=1) - y.min(axis=1)).max() < audit.LOW:
        bits |= Quality.LOW
    if audit.check_limb_leads(y[None])[0]:
        bits |= Quality.EINTHOVEN
    return bits


def _prepared(window: _Window, stored: np.ndarray, valid: tuple[int, int], peaks: np.ndarray) -> Prepared:
    record, span = window.span.record, window.span
    quality = window.quality if len(peaks) else window.quality | Quality.NO_BEATS
    meta = {
        "time": record.time,
        "device": record.device,
        "rate": float(record.rate),
        "length": len(record.signal),
        "start": round(span.start / record.rate + window.offset / RATE, 3),  # s into the recording
        "leads": list(LEADS),
        "derived": [],
    }
    return Prepared(
        signal=stored,
        valid=valid,
        record_id=record.record_id if window.number is None else f"{record.record_id}#{window.number}",
        group=record.group,
        patient_id=record.patient_id or "",
        split=record.split,
        age=float(record.age),
        sex=float(record.sex),
        quality=int(quality),
        labels={task: np.asarray(values, np.int8) for task, values in record.labels.items()},
        rpeaks=peaks.astype(np.int16),
        source=record.source,
        signature=signature(window.y),
        meta=meta | dict(record.meta),
    )
