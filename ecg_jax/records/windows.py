"""Beat windows and the sentence of tokens that HeartLang makes of a record (arXiv 2502.10707, its QRS tokenizer).

It cuts at R peaks that it is given; which peaks, that is `beats` (mode "robust") or `xqrs` (mode "heartlang"). NumPy,
one record at a time: what the device gathers from a batch is tested against this. Invariant: a token holds samples
of the span only, in their order, without interpolation or scaling, and its R peak at place HALF unless more than HALF
samples of its window lie before the peak.
"""

import hashlib
import json

import numpy as np

WINDOW = 96  # samples of a token
HALF = 48  # place of the R peak in it
MOST = 21  # beats of a record that mode "robust" makes tokens of: 12 leads of them fit into SLOTS
SLOTS = 256  # tokens of a record
EDGE = 50  # samples at either end of the span: a window that touches them is neither a codebook sample nor a target
NO_CODE = 65535  # in a codes array: no token here
MODES = ("robust", "heartlang")
MAX_PEAKS = 50  # of a record of 10 s: both detectors keep beats 0.2 s apart
SECOND = 100  # samples to a step of the time index


def detector(mode: str) -> str:
    """Id of the detector whose peaks `mode` cuts at."""
    from ecg_jax.records import beats, xqrs  # SciPy's filters, which the device's half of this does without

    return {"robust": beats.DETECTOR, "heartlang": xqrs.DETECTOR}[mode]


def most_slots(mode: str) -> int:
    """Slots that the beats of a record may fill in all twelve leads."""
    return SLOTS if mode == "heartlang" else 12 * MOST


def beats_id(mode: str) -> str:
    """8 hex digits that tell whether two sets of beat windows were cut alike."""
    what = json.dumps([mode, detector(mode), WINDOW, MOST, EDGE])
    return hashlib.sha256(what.encode()).hexdigest()[:8]


def windows(peaks: np.ndarray, span: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(start, end, offset), int64 [n] each: token i is zero but for `token[offset:][:k] = x[start:][:k]` with
    k = min(end - start, WINDOW - offset).

    peaks: int [n], ascending sample positions within `span` (start, stop). The limits are the midpoints to the
    neighbours, at the ends of the record HALF samples from the peak; a window longer than WINDOW is cut anew around
    its peak. Windows of neighbours may then overlap, and samples between slow beats belong to none.
    """
    q = np.asarray(peaks, np.int64)
    low, high = (int(limit) for limit in span)
    middle = (q[1:] + q[:-1]) // 2
    before = np.maximum(q - HALF, low)
    start = np.concatenate([before[:1], middle])
    end = np.concatenate([middle, np.minimum(q[-1:] + HALF, high)])
    if len(q) == 1:
        end = np.minimum(start + WINDOW, high)
    long = end - start > WINDOW
    start = np.where(long, before, start)
    end = np.where(long, np.minimum(before + WINDOW, high), end)
    return start, end, np.maximum(HALF - (q - start), 0)


def kept(n: int, mode: str) -> slice:
    """Which of `n` beats in the order of time become tokens: in mode "robust" the middle MOST, the same in every lead;
    in mode "heartlang" all, whose sentence is then cut at SLOTS."""
    if mode == "heartlang" or n <= MOST:
        return slice(0, n)
    first = (n - MOST) // 2
    return slice(first, first + MOST)


def tokens(
    x: np.ndarray, peaks: np.ndarray, span: tuple[int, int], mode: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """(tokens float32 [SLOTS, WINDOW], lead int32 [SLOTS], time int32 [SLOTS], n) of a record: its sentence, lead by
    lead and in each in the order of time, padded with zeros.

    x: [T, 12]; peaks: int [n], ascending positions in it, within `span` (start, stop). lead is 1 to 12 and time
    peak // SECOND + 1, both 0 for padding, as HeartLang's tables number them; n is the number of beats of a lead. The
    neighbours of a beat that is not kept still bound the windows of those that are.
    """
    which = kept(len(peaks), mode)
    start, end, offset = (part[which] for part in windows(peaks, span))
    times = np.asarray(peaks, np.int64)[which] // SECOND + 1
    n = len(times)
    out = np.zeros((SLOTS, WINDOW), np.float32)
    lead, time = np.zeros(SLOTS, np.int32), np.zeros(SLOTS, np.int32)
    for slot in range(min(SLOTS, x.shape[1] * n)):
        own, beat = divmod(slot, n)
        k = min(end[beat] - start[beat], WINDOW - offset[beat])
        out[slot, offset[beat] : offset[beat] + k] = x[start[beat] : start[beat] + k, own]
        lead[slot], time[slot] = own + 1, times[beat]
    return out, lead, time, n
