"""What is wrong with a recording: quality bits, and the repairs and refusals that follow from them.

Works on raw samples [B, 12, T], before any filter hides the evidence. Faults are *events* with a place in
time, so that a bit marks only those 10 s windows that hold the fault. It never judges a rhythm or a
diagnosis. Invariant: every value found for a record depends on that record alone, not on the batch it came
in.
"""

import enum
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
EINTHOVEN = 0.15  # residual over amplitude of the limb leads; wrong lead orders miss by more than 1
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


def names(bits: int) -> list[str]:
    """Lower-case names of the bits that are set, in ascending order of bit."""
    return [bit.name.lower() for bit in Quality if bits & bit]


@dataclass(frozen=True)
class Event:
    """A fault from `start` to `stop` (samples at the raw rate, stop excluded)."""

    bit: Quality
    start: int
    stop: int


def observed(signal: np.ndarray) -> tuple[int, int]:
    """Span (start, stop) of float [T, 12] without the padding (rows all zero or missing) at its ends.

    Only the contiguous ends: zeros within the recording stay. Refuses ("all-nan", "all-zero") where nothing
    is left.
    """
    finite = np.isfinite(signal)
    if finite.all():
        heard = (signal != 0).any(axis=1)
    else:
        if not finite.any():
            raise Refused("all-nan", "no valid sample in any lead")
        heard = ((signal != 0) & finite).any(axis=1)
    start = int(heard.argmax())
    if not heard[start]:
        raise Refused("all-zero", "every sample of every lead is zero")
    return start, len(heard) - int(heard[::-1].argmax())


def inspect_raw(x: np.ndarray, rate: float) -> list[list[Event]]:
    """Events of raw signals float64 [B, 12, T] at `rate`; repairs spikes and missing samples of `x` in place.

    Missing samples (not finite) are bridged linearly, ends held; a lead without any valid sample becomes zero
    (its windows are refused later, see `missing_share`, which must be asked before).
    """
    events: list[list[Event]] = [[] for _ in range(len(x))]
    total = x.shape[2]
    missing = ~np.isfinite(x)
    x[missing] = np.nan
    _find_flat(x, rate, events)
    _find_rail(x, rate, events)
    for b, lead in zip(*np.nonzero(missing.any(axis=2)), strict=True):
        gone = np.flatnonzero(missing[b, lead])
        _bridge(x[b, lead], missing[b, lead])
        for first, last in _runs(gone):
            events[b].append(Event(Quality.NAN_REPAIRED, first, last + 1))
    # The screen is cheap and almost always empty: a spike needs a jump between two neighbouring samples.
    for b, lead in zip(*np.nonzero(np.abs(np.diff(x, axis=2)).max(axis=2) > SPIKE_JUMP), strict=True):
        spikes = _spikes(x[b, lead], rate)
        if spikes.any():
            _bridge(x[b, lead], spikes)
            at = np.flatnonzero(spikes)
            events[b] += [Event(Quality.SPIKE_REPAIRED, first, last + 1) for first, last in _runs(at)]
    dead = (x.max(axis=2) == x.min(axis=2)).sum(axis=1)
    for b in np.flatnonzero(dead):
        events[b] += [Event(Quality.DEAD_LEAD, 0, total)] * int(dead[b])
    return events


def check_limb_leads(y: np.ndarray) -> np.ndarray:
    """bool [B]: limb leads of filtered [B, 12, n] contradict III = II - I or Goldberger's equations."""
    one, two = y[:, 0], y[:, 1]
    residual = np.stack(
        [
            y[:, 2] - (two - one),
            y[:, 3] + (one + two) / 2,
            y[:, 4] - (one - two / 2),
            y[:, 5] - (two - one / 2),
        ],
        axis=1,
    )
    amplitude = np.abs(y[:, :6]).mean(axis=2).max(axis=1)
    return np.abs(residual).mean(axis=2).max(axis=1) > EINTHOVEN * amplitude


def missing_share(missing: np.ndarray) -> str | None:
    """Leads of bool [12, n] that miss more than half of their samples, for a message; None if none does."""
    share = missing.mean(axis=1)
    lost = [f"{lead} ({value:.0%})" for lead, value in zip(LEADS, share, strict=True) if value > MISSING_SHARE]
    return ", ".join(lost) if lost else None


def _runs(at: np.ndarray) -> list[tuple[int, int]]:
    """Ascending positions -> (first, last) of each run of neighbours."""
    if not len(at):
        return []
    cut = np.flatnonzero(np.diff(at) > 1)
    firsts, lasts = at[np.r_[0, cut + 1]], at[np.r_[cut, len(at) - 1]]
    return [(int(a), int(b)) for a, b in zip(firsts, lasts, strict=True)]


def _bridge(lead: np.ndarray, bad: np.ndarray) -> None:
    """Replace `bad` samples of `lead` [T] in place by straight lines between good ones, ends held."""
    good = np.flatnonzero(~bad)
    lead[bad] = np.interp(np.flatnonzero(bad), good, lead[good]) if len(good) else 0.0


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


def _find_flat(x: np.ndarray, rate: float, events: list[list[Event]]) -> None:
    # A flat second holds at least six equal neighbours among probes an eighth of a second apart: cheap to
    # rule out.
    step = max(1, int(rate * FLAT_SECONDS / 8))
    probe = x[:, :, ::step]
    same = probe[:, :, 1:] == probe[:, :, :-1]
    need = max(1, int(rate * FLAT_SECONDS) // step - 2)
    run = np.zeros(same.shape[:2], int)
    longest = run.copy()
    for i in range(same.shape[2]):
        run = (run + 1) * same[:, :, i]
        longest = np.maximum(longest, run)
    for b, lead in zip(*np.nonzero(longest >= need), strict=True):
        still = np.flatnonzero(np.diff(x[b, lead]) == 0)
        for first, last in _runs(still):
            if last + 2 - first >= FLAT_SECONDS * rate:
                events[b].append(Event(Quality.FLAT, first, last + 2))


def _find_rail(x: np.ndarray, rate: float, events: list[list[Event]]) -> None:
    need = max(RAIL_SAMPLES, int(np.ceil(RAIL_SECONDS * rate)))
    with np.errstate(invalid="ignore"):
        for extreme in (np.fmax.reduce(x, axis=2), np.fmin.reduce(x, axis=2)):
            count = (x == extreme[:, :, None]).sum(axis=2)
            for b, lead in zip(*np.nonzero((count >= need) & (count < x.shape[2])), strict=True):
                if abs(extreme[b, lead] - np.nanmedian(x[b, lead])) < RAIL_LEVEL:
                    continue
                for first, last in _runs(np.flatnonzero(x[b, lead] == extreme[b, lead])):
                    if last + 1 - first >= need:
                        events[b].append(Event(Quality.RAIL, first, last + 1))
