"""What is wrong with a recording: quality bits, and the repairs and refusals that follow from them.

Dead, flat, railed, missing and spiky spans are sought in the raw samples of one recording [T, 12], before any filter
hides the evidence; they are *events* with a place in time, so that a bit marks only those 10 s windows that hold the
fault. Amplitude and the limb leads' equations are checked on filtered windows. It never judges a rhythm or a diagnosis.
Almost every recording is clean, so each search begins with a screen that lets no fault through and costs little: the
range of a lead rules out spikes and rails, a few probes rule out flat spans. Invariant: every value found for a record
depends on that record alone, not on the batch it came in.
"""

import enum
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ecg_jax.records.leads import LEADS
from ecg_jax.records.record import Refused

FLAT_SECONDS = 1.0
RAIL_SECONDS = 0.03  # at the extreme for so long; a T wave's top does not stand still as long as that
RAIL_SAMPLES = 4
RAIL_LEVEL = 1.0  # mV (or SD) between the rail and the lead's middle
SPIKE_SECONDS = 0.004
SPIKE_JUMP = 2.0  # mV (or SD) up and down again, and ...
SPIKE_FACTOR = 4.0  # ... so many times the lead's own amplitude
HIGH = 10.0  # mV
LOW = 0.1  # mV, peak to peak
LIMB_SHARE = 0.05  # residual of the limb leads' equations over the typical QRS of the largest of them
LIMB_FLOOR = 0.03  # mV; what rounding and filters of their own may leave
LIMB_SAMPLES = 0.01  # share of violating samples up to which they are isolated
BLOCK = 150  # samples at 100 Hz
MARGIN = 10  # samples at 100 Hz
HEARD = 1e-3  # typical QRS below which a lead has no signal: one step of the stored numbers
MISSING_SHARE = 0.5  # a lead with more of its samples missing is no lead


class Quality(enum.IntFlag):
    """Bits of `quality`. The numbers are stored in shards: add new ones, never renumber."""

    NAN_REPAIRED = 1  # invalid samples were bridged by straight lines
    SPIKE_REPAIRED = 2  # one or a few samples far outside were bridged
    DEAD_LEAD = 4  # a lead is constant over the whole observed span
    FLAT = 8  # a lead stands still for a second or more
    RAIL = 16  # a lead is held at its extreme: amplifier or converter saturated
    HIGH = 32  # beyond 10 mV after filtering (mV records only)
    LOW = 64  # less than 0.1 mV peak to peak in every lead (mV records only): wrong gain, or no patient
    CLIPPED = 128  # did not fit the stored int16
    DERIVED = 256  # limb leads were computed from I and II
    EINTHOVEN = 512  # the limb leads contradict one another (mV records only): wrong order or processed apart
    STRIPPED = 1024  # padding was cut off
    NO_BEATS = 2048  # no R peak found
    MISSING_LEAD = 4096  # a lead is not in the recording and stored as zeros (--missing-leads zero)
    LIMB_SAMPLES = 8192  # isolated samples at which the limb leads contradict one another (mV records only)


def names(bits: int) -> list[str]:
    """Lower-case names of the bits that are set, in ascending order of bit."""
    return [bit.name.lower() for bit in Quality if bits & bit]


@dataclass(frozen=True)
class Event:
    """A fault of one lead from `start` to `stop` (samples at the raw rate, stop excluded)."""

    bit: Quality
    lead: int
    start: int
    stop: int


@dataclass(frozen=True)
class Raw:
    """What `inspect_raw` found: `events`; bool [T, 12] `missing`, or None where nothing is; float32 [T, 12] `signal`
    after repair; the lowest and highest sample of each lead [12] of that.
    """

    events: list[Event]
    missing: np.ndarray | None
    signal: np.ndarray
    low: np.ndarray
    high: np.ndarray


def observed(signal: np.ndarray) -> tuple[int, int]:
    """Span (start, stop) of float [T, 12] without the padding (rows all zero or missing) at its ends.

    Only the contiguous ends: zeros within the recording stay. Refuses ("all-nan", "all-zero") where nothing
    is left.
    """
    flat, width = np.ascontiguousarray(signal).reshape(-1), signal.shape[1]
    if 0 < abs(flat[0]) < np.inf and 0 < abs(flat[-1]) < np.inf:
        return 0, len(signal)
    start = next(_heard(flat, forwards=True), None)
    if start is None:
        if not np.isfinite(flat).any():
            raise Refused("all-nan", "no valid sample in any lead")
        raise Refused("all-zero", "every sample of every lead is zero")
    return start // width, next(_heard(flat, forwards=False)) // width + 1


def _heard(flat: np.ndarray, forwards: bool) -> Iterator[int]:
    """Places of some samples of [n] that are neither zero nor missing: the first (or last) of all comes first."""
    for size in (8192, 512):  # a piece of zeros is skipped after a look at its extremes
        if len(flat) > size:
            starts = range(0, len(flat), size)
            for at in starts if forwards else reversed(starts):
                piece = flat[at : at + size]
                if not piece.max() == 0 == piece.min():
                    yield from (at + place for place in _heard(piece, forwards))
            return
    places = np.flatnonzero((flat != 0) & np.isfinite(flat)).tolist()
    yield from places if forwards else reversed(places)


def extremes(signal: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(lowest, highest) [12] of each lead of contiguous [T, 12]; NaN where one is. Many rows side by side make long
    vectors: a fifth of the time of signal.max(axis=0)."""
    many = 64
    whole, width = len(signal) // many * many, signal.shape[1]
    side = signal[:whole].reshape(-1, many * width)
    ends = []
    for extreme in (np.minimum, np.maximum):
        rows = signal[whole:]
        if whole:
            rows = np.concatenate([rows, extreme.reduce(side, axis=0).reshape(many, width)])
        ends.append(extreme.reduce(rows, axis=0))
    return ends[0], ends[1]


def steepest(signal: np.ndarray) -> float:
    """Largest step in any lead of contiguous [T, 12] from one sample to the next."""
    flat, width = signal.reshape(-1), signal.shape[1]
    with np.errstate(over="ignore"):
        step = flat[width:] - flat[:-width]
    return max(float(step.max()), -float(step.min()))


def inspect_raw(signal: np.ndarray, rate: float) -> Raw:
    """Faults of contiguous float32 [T, 12] at `rate`, T of at least a second; spikes and missing samples are repaired
    in a copy.

    Missing samples (not finite) are bridged linearly, ends held; a lead without any valid sample becomes zero
    (its windows are refused later, see `missing_share`).
    """
    events: list[Event] = []
    missing = None
    low, high = extremes(signal)
    if not -np.inf < low.min() <= high.max() < np.inf:  # also where one is NaN
        missing = ~np.isfinite(signal)
        signal = np.where(missing, np.float32(np.nan), signal)
        low, high = np.fmin.reduce(signal, axis=0), np.fmax.reduce(signal, axis=0)  # NaN for a lead without a sample
    low, high = low.astype(np.float64), high.astype(np.float64)  # whose difference cannot overflow
    _find_still(signal, rate, low, high, events)
    if missing is not None:
        for lead in np.flatnonzero(missing.any(axis=0)).tolist():
            signal[:, lead] = _bridge(signal[:, lead], missing[:, lead])
            gone = np.flatnonzero(missing[:, lead])
            events += [Event(Quality.NAN_REPAIRED, lead, first, last + 1) for first, last in _runs(gone)]
        low, high = (ends.astype(np.float64) for ends in extremes(signal))
    suspects = np.flatnonzero(high - low > SPIKE_JUMP).tolist()
    if suspects and steepest(signal) > SPIKE_JUMP:
        whole = signal
        for lead in suspects:
            column = signal[:, lead].astype(np.float64)
            if np.abs(np.diff(column)).max() <= SPIKE_JUMP:
                continue
            spikes = _spikes(column, rate)
            if spikes.any():
                signal = signal.copy() if signal is whole else signal
                signal[:, lead] = _bridge(column, spikes)
                at = np.flatnonzero(spikes)
                events += [Event(Quality.SPIKE_REPAIRED, lead, first, last + 1) for first, last in _runs(at)]
        if signal is not whole:
            low, high = extremes(signal)
    events += [Event(Quality.DEAD_LEAD, lead, 0, len(signal)) for lead in np.flatnonzero(high == low).tolist()]
    return Raw(events, missing, signal, low, high)


def block_edges(n: int) -> np.ndarray:
    """Where blocks of about 1.5 s begin in `n` samples at 100 Hz."""
    blocks = max(1, round(n / BLOCK))
    return np.arange(blocks) * n // blocks


def judge(
    x: np.ndarray, in_mv: Sequence[bool], ignore: Sequence[Sequence[tuple[int, int]]]
) -> tuple[list[int], list[float]]:
    """Filtered [B, 12, n] at 100 Hz -> (quality bits, amplitude to four decimals) of each.

    `in_mv`: whether a record is in mV: only then amplitude and the limb leads are judged. `ignore`: see
    `check_limb_leads`. The amplitude is the median over the leads that have any signal of their typical QRS from peak
    to peak, in the record's own unit: the median over blocks of 1.5 s of a block's range, so that an artefact or a
    pause changes one block. It tells a gain that is wrong by much; the median of all records tells more.
    """
    edges = block_edges(x.shape[2])
    top, bottom = np.maximum.reduceat(x, edges, axis=2), np.minimum.reduceat(x, edges, axis=2)
    swing = median(top - bottom)
    top, bottom = top.max(axis=2), bottom.min(axis=2)
    bits = check_limb_leads(x, swing[:, :6].max(axis=1), ignore)
    for b in np.flatnonzero(np.maximum(top, -bottom).max(axis=1) > HIGH).tolist():
        bits[b] |= int(Quality.HIGH)
    for b in np.flatnonzero((top - bottom).max(axis=1) < LOW).tolist():
        bits[b] |= int(Quality.LOW)
    heard = swing >= HEARD
    if heard.all():
        amplitude = median(swing)
    else:
        amplitude = np.array([median(own[on]) if on.any() else 0.0 for own, on in zip(swing, heard, strict=True)])
    bits = [own if known else 0 for own, known in zip(bits, in_mv, strict=True)]
    return bits, [round(value, 4) for value in amplitude.tolist()]


def check_limb_leads(y: np.ndarray, swing: np.ndarray, ignore: Sequence[Sequence[tuple[int, int]]]) -> list[int]:
    """EINTHOVEN or LIMB_SAMPLES, or neither, for each of filtered [B, 12, n] in mV.

    The residual of III = II - I and of Goldberger's three equations against a limit: `LIMB_SHARE` of `swing` [B], the
    typical QRS of the largest limb lead, but at least `LIMB_FLOOR`. A sample violates where any of the four does. More
    than 1 % of them (so: the residual's 99th percentile is above the limit): the leads contradict one another. Fewer:
    samples do. Samples within the spans (first, stop) of `ignore` [B] do not count: one lead was repaired there.
    """
    one, two = y[:, 0], y[:, 1]
    worst = np.abs(y[:, 2] - (two - one))
    half = np.float32(0.5)
    for lead, equation in ((3, (one + two) * -half), (4, one - two * half), (5, two - one * half)):
        equation -= y[:, lead]
        np.maximum(worst, np.abs(equation, out=equation), out=worst)
    for b, spans in enumerate(ignore):
        for first, stop in spans:
            worst[b, max(0, first) : max(0, stop)] = 0.0
    limit = np.maximum(LIMB_SHARE * swing, LIMB_FLOOR)
    number = np.count_nonzero(worst > limit[:, None], axis=1)
    return [
        int(Quality.EINTHOVEN if count > LIMB_SAMPLES * y.shape[2] else Quality.LIMB_SAMPLES) if count else 0
        for count in number.tolist()
    ]


def repaired_limbs(events: Sequence[Event], scale: float) -> list[tuple[int, int]]:
    """Spans (first, stop) at 100 Hz for `check_limb_leads` of repairs in limb leads; `scale`: 100 Hz over the raw rate.

    They are widened by their own length and a tenth of a second: so far the filter spreads them.
    """
    spans = []
    for event in events:
        if event.lead < 6 and event.bit in (Quality.NAN_REPAIRED, Quality.SPIKE_REPAIRED):
            first, stop = int(event.start * scale), int(event.stop * scale) + 1
            margin = stop - first + MARGIN
            spans.append((first - margin, stop + margin))
    return spans


def median(a: np.ndarray) -> np.ndarray:
    """np.median over the last axis: for few values, in a fraction of its time."""
    a = np.sort(a, axis=-1)
    middle = a.shape[-1] // 2
    return a[..., middle] if a.shape[-1] % 2 else (a[..., middle - 1] + a[..., middle]) / 2


def missing_share(missing: np.ndarray) -> str | None:
    """Leads of bool [n, 12] that miss more than half of their samples, for a message; None if none does."""
    share = missing.mean(axis=0)
    lost = [f"{lead} ({value:.0%})" for lead, value in zip(LEADS, share, strict=True) if value > MISSING_SHARE]
    return ", ".join(lost) if lost else None


def _runs(at: np.ndarray) -> list[tuple[int, int]]:
    """Ascending positions -> (first, last) of each run of neighbours."""
    if not len(at):
        return []
    cut = np.flatnonzero(np.diff(at) > 1)
    firsts, lasts = at[np.r_[0, cut + 1]], at[np.r_[cut, len(at) - 1]]
    return [(int(a), int(b)) for a, b in zip(firsts, lasts, strict=True)]


def _bridge(lead: np.ndarray, bad: np.ndarray) -> np.ndarray:
    """`lead` [T] with its `bad` samples replaced by straight lines between good ones, ends held; a copy."""
    good = np.flatnonzero(~bad)
    lead = lead.copy()
    lead[bad] = np.interp(np.flatnonzero(bad), good, lead[good]) if len(good) else 0.0
    return lead


def _spikes(lead: np.ndarray, rate: float) -> np.ndarray:
    """bool [T]: runs of at most 4 ms (at least one sample) that stand off both neighbours, far beyond the
    lead's QRS.

    At most 1 % of the samples can be spikes, by the use of the 99th percentile: more of them are a signal.
    """
    centre = np.abs(lead - np.median(lead))
    limit = max(SPIKE_JUMP, SPIKE_FACTOR * float(np.quantile(centre, 0.99)))
    bad = np.zeros(len(lead), bool)
    for width in range(1, max(1, int(SPIKE_SECONDS * rate)) + 1):
        edge = np.concatenate([lead[:1].repeat(width), lead, lead[-1:].repeat(width)])
        for offset in range(width):  # sample t is at place `offset` of the run
            before = edge[width - 1 - offset : width - 1 - offset + len(lead)]
            after = edge[2 * width - offset : 2 * width - offset + len(lead)]
            up = np.minimum(lead - before, lead - after)
            down = np.minimum(before - lead, after - lead)
            bad |= np.maximum(up, down) > limit
    return bad


def _find_still(signal: np.ndarray, rate: float, low: np.ndarray, high: np.ndarray, events: list[Event]) -> None:
    """Flat spans, and spans held at an extreme (`low`, `high` [12]; NaN for a lead without samples)."""
    rail = max(RAIL_SAMPLES, int(np.ceil(RAIL_SECONDS * rate)))
    flat = FLAT_SECONDS * rate
    # Each rail holds two neighbouring probes, and each flat span so many that a row of `pairs` of them are equal.
    step = rail // 2
    probe = np.ascontiguousarray(signal[step - 1 :: step]).reshape(-1)
    width = len(LEADS)
    same = probe[width:] == probe[:-width]
    found = np.flatnonzero(same)
    if not len(found):
        return
    lead = found % width
    value = probe[found]
    far = high - low >= RAIL_LEVEL  # else no rail is so far from the middle
    for extreme in (high, low):
        for i in sorted(set(lead[(value == extreme[lead]) & far[lead]].tolist())):
            there = signal[:, i] == extreme[i]
            if not rail <= np.count_nonzero(there) < len(signal):
                continue
            if abs(extreme[i] - np.nanmedian(signal[:, i])) < RAIL_LEVEL:
                continue
            for first, last in _runs(np.flatnonzero(there)):
                if last + 1 - first >= rail:
                    events.append(Event(Quality.RAIL, i, first, last + 1))
    pairs, have = int(flat) // step - 2, 1
    while have < pairs:  # same[k]: `have` pairs in a row are equal, from k on
        ahead = min(have, pairs - have)
        same = same[: -ahead * width] & same[ahead * width :]
        have += ahead
    found = np.flatnonzero(same)
    for i in sorted(set((found % width).tolist())):
        column = signal[:, i]
        for first, last in _runs(np.flatnonzero(column[1:] == column[:-1])):
            if last + 2 - first >= flat:
                events.append(Event(Quality.FLAT, i, first, last + 2))
