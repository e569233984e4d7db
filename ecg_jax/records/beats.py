"""R peaks from all leads at once, at 100 Hz.

Each lead's slope is measured in units of its own typical QRS, capped, and averaged over the leads, so neither an
inverted, a small nor a dead lead I matters, and an artefact counts for no more than the leads it is in; noisy leads
weigh little. A beat is where the average stands out from the record's own floor; what is neither clearly a beat nor
clearly none must be one wave and no burst of noise, and stand out from the record's own T waves if it comes where
those come. Its place is the centre of the QRS's slopes. It finds ventricular beats, it does not classify them, and a
recording of noise alone may yield false ones. Invariant: peaks of a record depend on that record alone, not on the
batch, on its gain or on the sign of a lead.
"""

import math
import statistics
from bisect import bisect, insort
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from ecg_jax.records.audit import median
from ecg_jax.records.leads import INDEPENDENT, LEADS, expand_matrix

DETECTOR = "robust-2"  # stored with every data set; a change of any number below is a new version

# Lengths in samples at 100 Hz. Heights: 0 is the record's floor, 1 its typical QRS.
LSB = np.float32(0.001)
SHORTEST = 60
BIN = 2  # the slope is summed over so many samples
SMOOTH = 4  # bins, about a QRS
BLOCK = 150  # the median over blocks of a block's maximum is the typical QRS, whatever a pop or a pause does
CAP = 1.4  # times the typical QRS of a lead
FLOOR = 0.3  # quantile of the energy
MERGE = 12  # to each side of a candidate there is none higher
REFRACTORY = 20  # between two beats
SURE = 0.75  # a beat
PLAIN = 0.6  # below, a beat must be a wave: ...
WAVE = 7  # samples to each side in which ...
RISE = 0.42  # ... its range is this share of its path up and down (noise goes up and down more often), and ...
SIZE, MORE = 0.23, 0.42  # ... of the typical deflection, more so if it only rises or only falls
LATE = 0.27  # a beat, if behind the T wave
OVERDUE, BACK = 1.6, 0.15  # where so many RR intervals pass without a beat, this is one, ...
FREE = 0.7  # ... so many RR intervals after the last
BEFORE = 24  # no such small beat so shortly before another: it would be its P wave
T_END = 50  # the T wave is over so long after the R peak at an RR interval of 1 s; it goes with RR's cube root
T_TIMES, T_MORE = 1.3, 0.1  # before that, a beat is so much higher than the record's T waves, ...
SOON, EARLY = 32, 0.36  # ... and before this so high: the T wave of a premature beat is higher than others
CENTRE = 10  # samples to each side of which the centre of the QRS is taken
AFTER = 0.4  # by which that is behind the R peak: more of the slopes belong to S than to Q
TOGETHER, FEW = 64, 4  # records in hand, and their leads as one row
_TINY = 1e-9
_MATRIX, _EIGHT = expand_matrix(), [LEADS.index(lead) for lead in INDEPENDENT]


def r_peaks(signals: np.ndarray, valid: Sequence[tuple[int, int]] | np.ndarray | None = None) -> list[np.ndarray]:
    """Sample positions (int64, ascending) of the R peaks of each record.

    signals: filtered float [B, T, 12] at 100 Hz, any unit; `valid` [B, 2] (start, length) leaves out padding; positions
    count from the start of the array. An empty array where nothing stands out. Deterministic.
    """
    signals = np.asarray(signals)
    total, length = signals.shape[:2]
    spans = [(0, length)] * total if valid is None else [(int(a), int(n)) for a, n in valid]
    out: list[np.ndarray] = [np.empty(0, np.int64)] * total
    for span in sorted(set(spans)):
        rows = [b for b in range(total) if spans[b] == span]
        start, n = span
        for chunk in range(0, len(rows), TOGETHER):
            part = rows[chunk : chunk + TOGETHER]
            x = np.ascontiguousarray(signals[part, start : start + n].transpose(0, 2, 1), np.float32)
            for b, peaks in zip(part, detect(x), strict=True):
                out[b] = peaks + start
    return out


def stored_peaks(stored: np.ndarray, valid: Sequence[tuple[int, int]] | np.ndarray) -> list[np.ndarray]:
    """`r_peaks` of stored records, int16 [B, T, 12 or 8]: those that the conversion found in them, bit for bit."""
    signals = stored.astype(np.float32)
    if signals.shape[2] == len(INDEPENDENT):
        signals = signals @ _MATRIX
    return r_peaks(signals * LSB, valid)


def eight_leads(x: np.ndarray) -> np.ndarray:
    """Stored values [B, 12, n] as they come back from a data set that keeps 8 leads: the other four follow from I and
    II. Halves of whole numbers: nothing is rounded, in whatever order it is summed."""
    return np.ascontiguousarray((x[:, _EIGHT].transpose(0, 2, 1) @ _MATRIX).transpose(0, 2, 1))


def detect(x: np.ndarray) -> list[np.ndarray]:
    """Peaks of each of float32 [B, 12, n]: `r_peaks` for leads that lie apart, and no padding."""
    n = x.shape[2]
    found = []
    for places in positions(x):
        whole = np.clip(np.rint(places).astype(np.int64), 0, n - 1)
        found.append(whole[np.diff(whole, prepend=-n) >= REFRACTORY // 2])
    return found


def positions(x: np.ndarray) -> list[np.ndarray]:
    """As `detect`, in fractions of a sample (float64)."""
    total, leads, n = x.shape
    if n < SHORTEST:
        return [np.empty(0)] * total
    slope, envelope = _slopes(x)
    bins = slope.shape[2]
    steepest, typical = _typical(slope), _typical(envelope)
    crest = typical / (_mean(slope) * SMOOTH + _TINY)  # 2 in noise, 4 to 10 in an ECG
    weight = np.clip((crest - 2) / 3, 0.02, 1) * (typical > _TINY)
    weight = weight / (weight.sum(axis=1, keepdims=True) + _TINY)
    np.minimum(envelope, CAP * typical[..., None], out=envelope)
    envelope *= (weight / (typical + _TINY))[..., None]
    np.minimum(slope, CAP * steepest[..., None], out=slope)
    slope *= (np.sqrt(weight) / (steepest + _TINY))[..., None]
    np.square(slope, out=slope)
    energy, sharp = envelope[:, 0].copy(), slope[:, 0].copy()
    for lead in range(1, leads):  # one by one: a fixed order of addition, whatever the batch
        energy += envelope[:, lead]
        sharp += slope[:, lead]
    level = _typical(energy)
    floor = np.minimum(np.partition(energy, int(FLOOR * bins), axis=1)[:, int(FLOOR * bins)], 0.8 * level)
    energy -= floor[:, None]
    energy /= (level - floor + _TINY)[:, None]
    top = ndimage.maximum_filter1d(energy, MERGE // BIN * 2 + 1, axis=1, mode="constant")
    rows, at = np.nonzero((energy == top) & (energy > BACK) & (level > _TINY)[:, None])
    ends = np.searchsorted(rows, np.arange(total + 1)).tolist()
    height, at = energy[rows, at].tolist(), (at * BIN).tolist()
    drafts = [_draft(at[a:z], height[a:z]) for a, z in pairwise(ends)]
    small = [(b, tall, place) for b, draft in enumerate(drafts) for tall, place in draft.small]
    waves = iter(_are_waves(x, weight, small))
    chosen = [_choose(draft, [next(waves) for _ in draft.small]) for draft in drafts]
    return _centres(chosen, sharp)


def _slopes(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """|slope| of contiguous [B, 12, n], summed over BIN samples, and its sums over SMOOTH bins: [B, 12, n // BIN] each.

    The slope is the difference of two sums of two samples, 30 ms apart: it answers best at 13 Hz, where QRS is and T is
    not, and less than a plain difference to the noise of muscles. Leads are treated as one long row, in memory that is
    at hand: a third of the time. What goes from one lead into the next is zeroed, or not used.
    """
    total, leads, n = x.shape
    bins, few = n // BIN, min(total, FEW)
    slope = np.zeros((total, leads, bins + SMOOTH), np.float32)
    envelope = np.empty_like(slope)
    pair = np.empty(few * leads * n, np.float32)
    fine = np.zeros((few, leads, n), np.float32)
    two = np.empty(few * leads * (bins + SMOOTH), np.float32)
    for first in range(0, total, few):
        some = slice(first, first + few)
        row = x[some].reshape(-1)
        size = len(row)
        np.add(row[1:], row[:-1], out=pair[: size - 1])
        inner = fine.reshape(-1)[2 : size - 2]
        np.subtract(pair[3 : size - 1], pair[: size - 4], out=inner)
        np.abs(inner, out=inner)
        fine[:, :, :2] = fine[:, :, -2:] = 0
        own = fine[: size // (leads * n)]
        np.add(own[:, :, : n - 1 : 2], own[:, :, 1::2], out=slope[some, :, 2:-2])
        row, summed = slope[some].reshape(-1), envelope[some].reshape(-1)
        size = len(row)
        np.add(row[1:], row[:-1], out=two[: size - 1])
        np.add(two[2 : size - 1], two[: size - 3], out=summed[:-3])
    return slope[:, :, 2:-2], envelope[:, :, :bins]


def _typical(a: np.ndarray) -> np.ndarray:
    """Median over blocks of the block maximum of [..., bins] -> [...]."""
    bins = a.shape[-1]
    blocks = max(1, round(bins * BIN / BLOCK))
    return median(np.maximum.reduceat(a, np.arange(blocks) * bins // blocks, axis=-1))


def _mean(a: np.ndarray) -> np.ndarray:
    """[..., m] -> [...]. Parts are added as a whole, which is several times as fast as a sum along the axis."""
    part = -(-a.shape[-1] // 8)
    summed = a[..., :part].copy()
    for first in range(part, a.shape[-1], part):
        more = a[..., first : first + part]
        summed[..., : more.shape[-1]] += more
    return summed.sum(axis=-1) / np.float32(a.shape[-1])


class _Draft(NamedTuple):
    """A record's beats as far as heights tell, and the small candidates that the signal must decide."""

    beats: list[int]
    small: list[tuple[float, int]]  # (height, place), the highest first
    t_end: float


def _draft(at: list[int], height: list[float]) -> _Draft:
    """`at` (ascending) are the candidates' places."""
    beats = _apart([(-tall, place) for tall, place in zip(height, at, strict=True) if tall >= SURE])
    rr = _rr(beats)
    t_end = T_END * (min(max(rr, 30.0), 150.0) / 100) ** (1 / 3)
    highest = [0.0] * len(beats)  # while the T wave of each beat lasts
    others = []
    for tall, place in zip(height, at, strict=True):
        before, after, beat = _gaps(beats, place)
        if before >= REFRACTORY and after >= REFRACTORY:
            others.append((tall, place, before, after))
            if beat >= 0 and before <= t_end and tall > highest[beat]:
                highest[beat] = tall
    t_wave = statistics.median(highest) if highest else 0.0
    early = min(SURE, max(LATE, T_TIMES * t_wave + T_MORE))
    behind = min(t_end, FREE * rr)
    small = []
    for tall, place, before, after in others:
        least = early if before >= SOON else max(early, EARLY)
        # The first T wave may be that of a beat before the record.
        late = min(before, place) >= (t_end if tall >= LATE else behind)
        if after >= BEFORE and (late or tall >= least):
            small.append((tall, place))
    return _Draft(beats, sorted(small, reverse=True), t_end)


def _apart(sure: list[tuple[float, int]]) -> list[int]:
    """Places of (-height, place), ascending, without those that come too close to a higher one."""
    places = [place for _, place in sure]
    if all(right - left >= REFRACTORY for left, right in pairwise(places)):
        return places
    kept: list[int] = []
    for _, place in sorted(sure):
        before, after, _ = _gaps(kept, place)
        if before >= REFRACTORY and after >= REFRACTORY:
            insort(kept, place)
    return kept


def _rr(beats: list[int]) -> float:
    return statistics.median(right - left for left, right in pairwise(beats)) if len(beats) > 2 else 100.0


def _gaps(beats: list[int], place: int) -> tuple[float, float, int]:
    """From the beat before `place`, to the one after, and the number of the one before."""
    k = bisect(beats, place)
    return place - beats[k - 1] if k else math.inf, beats[k] - place if k < len(beats) else math.inf, k - 1


def _are_waves(x: np.ndarray, weight: np.ndarray, small: list[tuple[int, float, int]]) -> list[bool]:
    """Whether the leads about each candidate (record, height, place) rise and fall as a large wave does, once or
    twice."""
    if not small:
        return []
    leads, n = x.shape[1:]
    rows, _, at = (np.array(column) for column in zip(*small, strict=True))
    used, own = np.unique(rows, return_inverse=True)
    typical = _typical(np.abs(x[used, :, ::BIN]))[own].T  # [12, m]
    scale = weight[rows].T / (typical + _TINY)
    place = np.clip(at + np.arange(-WAVE, WAVE + 1)[:, None], 0, n - 1)
    first = (rows * leads + np.arange(leads)[:, None]) * n
    around = x.reshape(-1)[first + place[:, None]]  # [15, 12, m]
    extent = around.max(axis=0) - around.min(axis=0)
    path = sum(np.abs(around[1:] - around[:-1]))
    ratio = sum(extent * scale) / (sum(path * scale) + _TINY)
    size = sum(np.minimum(extent * scale, weight[rows].T))  # a lead's share is its weight at most
    height = np.array([tall for _, tall, _ in small])
    return ((height >= PLAIN) | (ratio >= RISE) & (size >= SIZE + MORE * ratio)).tolist()


def _choose(draft: _Draft, waves: list[bool]) -> list[int]:
    """The beats of a record."""
    beats = draft.beats.copy()
    small = [one for one, wave in zip(draft.small, waves, strict=True) if wave]
    rest = []
    for tall, place in small:
        before, after, _ = _gaps(beats, place)
        if tall >= LATE and before >= REFRACTORY and after >= BEFORE:
            insort(beats, place)
        else:
            rest.append((tall, place))
    if len(beats) > 2 and rest:
        rr = _rr(beats)
        free = min(draft.t_end, FREE * rr)
        for left, right in pairwise(beats.copy()):
            if right - left > OVERDUE * rr:
                inside = [place for _, place in rest if left + free < place <= right - BEFORE]
                if inside:
                    insort(beats, inside[0])
    return beats


def _centres(peaks: list[list[int]], sharp: np.ndarray) -> list[np.ndarray]:
    """Where the R peaks of each record are, in fractions of a sample: the centres of `sharp` [B, bins] around the
    samples `peaks`."""
    reach = np.arange(-CENTRE // BIN, CENTRE // BIN + 1)[:, None]
    bins, room = sharp.shape[1], CENTRE // BIN
    wide = np.zeros((len(sharp), bins + 2 * room), np.float64)
    wide[:, room : room + bins] = sharp
    rows = np.repeat(np.arange(len(peaks)), [len(own) for own in peaks])
    centre = np.array([peak for own in peaks for peak in own], np.float64) / BIN
    for _ in range(2):
        at = np.rint(centre).astype(np.int64)
        around = wide[rows, at + room + reach]  # [11, m]
        centre = at + sum(around * reach) / (sum(around) + _TINY)
    places = iter((BIN * centre + (BIN - 1) / 2 - AFTER).tolist())
    return [np.array([next(places) for _ in own]) for own in peaks]
