"""Record -> what is stored: 10 s windows of int16 at 100 Hz, with quality bits, R peaks and a content
signature.

The order of the steps: padding stripped, spikes and missing samples bridged, the whole observed span resampled
to 100 Hz (polyphase), filtered there (zero phase), both in float64, and only then cut, so that no window has a
filter's edge inside the recording. It knows no data set and no file. Invariant: the result for a
record is the same to the bit whether it is prepared alone or among others, and whatever the number of threads.
Every operation works along the time axis of one lead, in an order that the shape of the batch does not change,
but for matrix products, and those are of numbers on grids, whose sums are exact in any order (see `resample`,
`chain`).
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from threadpoolctl import ThreadpoolController

from ecg_jax.records import audit, beats
from ecg_jax.records import chain as filters
from ecg_jax.records.audit import Event, Quality
from ecg_jax.records.chain import CHAINS, LENGTH, LSB, Chain
from ecg_jax.records.leads import LEADS
from ecg_jax.records.record import Prepared, Record, Refused
from ecg_jax.records.resample import RATE, grid_of, resample
from ecg_jax.records.signature import signatures

MIN_SECONDS = 2.5
MIN_RATE, MAX_RATE = 80.0, 20_000.0  # below 80 Hz the 40 Hz band is not there
INT16 = 32767
_NO_BEATS = int(Quality.NO_BEATS)
BATCH = 192_000  # samples at 100 Hz (all leads) handled at once: 1.5 MB of float64, what a core's cache holds


@dataclass
class _Span:
    """The observed part of a record, and what becomes of it."""

    index: int
    record: Record
    start: int  # raw samples stripped in front
    raw: np.ndarray  # float32 [T, 12]
    quality: int


@dataclass
class _Window:
    """A cut of a filtered span: float64 [12, n], n <= LENGTH, beginning `offset` samples (100 Hz) into the
    span; `repaired` are the stretches of it that the limb leads' equations need not fit.
    """

    span: _Span
    number: int | None
    offset: int
    y: np.ndarray
    quality: int
    repaired: list[tuple[int, int]]


# The matrices of the filters are small: threads that share one spend more in waiting than they save.
@ThreadpoolController().wrap(limits=1, user_api="blas")
def prepare_many(
    records: Sequence[Record],
    chain: Chain = CHAINS["default"],
    windows: Literal["all", "first"] = "all",
    missing_leads: Literal["refuse", "zero"] = "refuse",
    leads: Literal["12", "8"] = "12",
) -> list[list[Prepared | Refused] | Refused]:
    """Prepare `records`; entry i is the list of windows of record i, or why it is refused. Never raises for a
    record. A bad window of a long record is a Refused within the list, whose detail begins with "<id>#<k>: "; if
    every window is bad, so is the record. `leads`: how many will be stored; the R peaks are found in what a reader
    of the shards will have.

    Up to 10 s is centre-padded, 10 to 15 s centre-cropped; from 15 s on it is cut into windows of 10 s with
    ids "<id>#0", "<id>#1", ... (a rest of 5 s or more becomes a padded one), of which `windows="first"` keeps
    the first. A record that lacks leads is refused, or has zeros there and a quality bit (`missing_leads`). Reasons:
    missing-lead, bad-shape, bad-rate, all-nan, all-zero, too-short, mostly-missing, no-signal.
    Deterministic, and the same whatever else is in `records`.
    """
    results: list[list[Prepared | Refused] | Refused] = [[] for _ in records]
    groups: dict[tuple[int, float], list[_Span]] = defaultdict(list)
    for index, record in enumerate(records):
        try:
            span = _observe(index, record, missing_leads)
        except Refused as refusal:
            results[index] = refusal
        else:
            groups[len(span.raw), float(record.rate)].append(span)
    for (length, rate), spans in groups.items():
        size = max(1, int(BATCH * rate / (RATE * length * len(LEADS))))
        for first in range(0, len(spans), size):
            batch = spans[first : first + size]
            found = _windows(batch, rate, chain, windows)
            done = iter(_finish([w for cuts in found for w in cuts if isinstance(w, _Window)], leads))
            for span, cuts in zip(batch, found, strict=True):
                results[span.index] = _outcome(span.record, cuts, done)
    return results


def _outcome(
    record: Record, cuts: list[_Window | Refused], done: Iterator[Prepared]
) -> list[Prepared | Refused] | Refused:
    """What becomes of a record: its windows, prepared by `done` in their order, and the refused ones among them."""
    if all(isinstance(cut, Refused) for cut in cuts):
        return cuts[0]
    return [
        Refused(cut.reason, f"{record.record_id}#{number}: {cut.detail}") if isinstance(cut, Refused) else next(done)
        for number, cut in enumerate(cuts)
    ]


def _observe(index: int, record: Record, missing_leads: str) -> _Span:
    raw = np.ascontiguousarray(record.signal, np.float32)
    if raw.ndim != 2 or raw.shape[1] != len(LEADS):
        raise Refused("bad-shape", f"signal of shape {raw.shape}, expected [samples, {len(LEADS)}]")
    if not MIN_RATE <= record.rate <= MAX_RATE:  # also false for NaN
        raise Refused("bad-rate", f"{record.rate} Hz is outside {MIN_RATE:g} to {MAX_RATE:g} Hz")
    if not len(raw):
        raise Refused("too-short", "no samples")
    quality = int(record.quality)
    if record.missing:
        if missing_leads == "refuse":
            why = (
                "unit-less leads are not derived" if record.unit == "z" else "--missing-leads zero stores zeros for it"
            )
            raise Refused("missing-lead", f"the recording has no {', '.join(record.missing)} ({why})")
        quality |= int(Quality.MISSING_LEAD)
        raw = raw.copy()
        raw[:, [LEADS.index(lead) for lead in record.missing]] = 0.0
    start, stop = audit.observed(raw)
    if (stop - start) / record.rate < MIN_SECONDS:
        stripped = " without its padding" if stop - start < len(raw) else ""
        seconds = (stop - start) / record.rate
        raise Refused("too-short", f"{seconds:.2f} s observed{stripped}, at least {MIN_SECONDS} s are needed")
    if stop - start < len(raw):
        quality |= int(Quality.STRIPPED)
    return _Span(index, record, start, raw[start:stop], quality)


def _windows(spans: list[_Span], rate: float, chain: Chain, windows: str) -> list[list[_Window | Refused]]:
    """Cuts of spans of equal length and rate, in the order of time; Refused where one cannot be used."""
    found, parts, grids = [], [], []
    for span in spans:  # one by one: a recording at its own rate just fits a core's cache
        raw = audit.inspect_raw(span.raw, rate)
        grid = grid_of(raw.low, raw.high)
        found.append(raw)
        grids.append(grid)
        parts.append(resample(raw.signal, rate, grid))
    y = filters.run(chain, parts, grids)
    cuts = _cuts(y.shape[2], windows)
    return [_cut(span, raw, y[b], rate, cuts) for b, (span, raw) in enumerate(zip(spans, found, strict=True))]


def _cut(
    span: _Span, raw: audit.Raw, y: np.ndarray, rate: float, cuts: list[tuple[int | None, int, int]]
) -> list[_Window | Refused]:
    # A lead that is not in the recording is neither dead nor flat.
    absent = {LEADS.index(lead) for lead in span.record.missing}
    events = [event for event in raw.events if event.lead not in absent]
    dead = sum(event.bit == Quality.DEAD_LEAD for event in events)
    out: list[_Window | Refused] = []
    for number, offset, n in cuts:
        begin, end = round(offset * rate / RATE), round((offset + n) * rate / RATE)
        piece = y[:, offset : offset + n]
        if raw.missing is not None and (lost := audit.missing_share(raw.missing[begin:end])):
            out.append(Refused("mostly-missing", f"more than half of the samples are missing in lead {lost}"))
        elif dead == len(LEADS) - len(absent) or _silent(piece):
            out.append(Refused("no-signal", "every lead is constant"))
        else:
            repaired = [(first - offset, stop - offset) for first, stop in audit.repaired_limbs(events, RATE / rate)]
            out.append(_Window(span, number, offset, piece, span.quality | _bits(events, begin, end), repaired))
    return out


def _silent(piece: np.ndarray) -> bool:
    """Whether nothing of [12, n] will be stored but zeros. The second lead alone mostly tells."""
    return all(np.abs(part).max() < LSB / 2 for part in (piece[1], piece))


def _bits(events: list[Event], begin: int, end: int) -> int:
    bits = 0
    for event in events:
        if event.start < end and event.stop > begin:
            bits |= int(event.bit)
    return bits


def _cuts(length: int, windows: str) -> list[tuple[int | None, int, int]]:
    """(window number or None, offset, samples) for a span of `length` samples at 100 Hz."""
    if length < LENGTH * 3 // 2:
        n = min(length, LENGTH)
        return [(None, (length - n) // 2, n)]
    starts = list(range(0, length - LENGTH // 2 + 1, LENGTH))
    cuts = [(i, at, min(LENGTH, length - at)) for i, at in enumerate(starts)]
    return cuts[:1] if windows == "first" else cuts


def _finish(windows: list[_Window], leads: str) -> Iterator[Prepared]:
    """`windows` as they are stored, in their order."""
    lengths: dict[int, list[_Window]] = defaultdict(list)
    for window in windows:
        lengths[window.y.shape[1]].append(window)
    size = BATCH // (LENGTH * len(LEADS))
    done = {
        n: iter([p for first in range(0, len(same), size) for p in _stored(same[first : first + size], leads)])
        for n, same in lengths.items()
    }
    return (next(done[window.y.shape[1]]) for window in windows)


def _stored(windows: list[_Window], leads: str) -> list[Prepared]:
    """`windows` of equal length."""
    y = np.stack([window.y for window in windows])
    n = y.shape[2]
    start = (LENGTH - n) // 2
    marks = signatures(y)
    y *= 1 / LSB
    np.rint(y, out=y)
    clipped = []
    if y.max() > INT16 or y.min() < -INT16:
        clipped = [b for b, own in enumerate(y) if own.max() > INT16 or own.min() < -INT16]
        np.clip(y, -INT16, INT16, out=y)
    # Beats and amplitude are found in the stored values, so that whoever reads the shards finds the same.
    x = y.astype(np.float32)
    stored = np.zeros((len(windows), LENGTH, len(LEADS)), np.int16)
    stored[:, start : start + n] = x.transpose(0, 2, 1)
    eight = beats.eight_leads(x) * np.float32(LSB) if leads == "8" else None
    x *= np.float32(LSB)
    peaks = beats.detect(x if eight is None else eight)
    in_mv = [window.span.record.unit == "mV" for window in windows]
    bits, amplitude = audit.judge(x, in_mv, [window.repaired for window in windows])
    for b in clipped:
        bits[b] |= int(Quality.CLIPPED)
    out = []
    for b, window in enumerate(windows):
        quality = window.quality | bits[b] | (0 if len(peaks[b]) else _NO_BEATS)
        place = (peaks[b] + start).astype(np.int16)
        out.append(_prepared(window, stored[b], (start, n), quality, amplitude[b], place, marks[b]))
    return out


def _prepared(
    window: _Window,
    stored: np.ndarray,
    valid: tuple[int, int],
    quality: int,
    amplitude: float,
    peaks: np.ndarray,
    signature: bytes,
) -> Prepared:
    record, span = window.span.record, window.span
    meta = {
        "time": record.time,
        "device": record.device,
        "rate": float(record.rate),
        "length": len(record.signal),
        "start": round(span.start / record.rate + window.offset / RATE, 3),  # s into the recording
        "leads": list(LEADS),
        "derived": [],
        "amplitude": amplitude,
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
        quality=quality,
        labels={task: np.asarray(values, np.int8) for task, values in record.labels.items()},
        rpeaks=peaks,
        source=record.source,
        signature=signature,
        meta=meta | dict(record.meta),
    )
