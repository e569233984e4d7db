"""A fingerprint of the content of an ECG that scale, offset and sampling rate do not change.

For finding the same recording again under another id or in another data set, and for nothing else: it is no
proof of origin and no key. Limits: a quantised number can always fall on the other side of a border, so the
same recording at another rate has an equal fingerprint only mostly. Hence two halves on grids half a step
apart: where one just failed, the other mostly agrees (`same_content`). On the 71 recordings that we have of
PTB-XL at both its rates, which differ by 7 uV and a millisecond, 54 fingerprints are equal and 67 in a half.
Another crop, filter or direction of time changes it. Invariant: equal input gives equal bytes; recordings
without any signal share one fingerprint.
"""

import hashlib

import numpy as np

# The independent leads: the others follow from these, or were rounded on their own.
LEAD_ROWS = (0, 1, 6, 7, 8, 9, 10, 11)
EDGE = 150  # samples at 100 Hz left out at each end: there a filter answers to what it cannot see
WIDTH = 80  # samples to each side of an average, a triangle: long and smooth, so a lag of 1 ms is nothing
POINTS = 24  # averages per lead
FEATURES = 24  # of about 2 bits each and half
STEP = 1.0  # of a feature's standard deviation
_SIZE = FEATURES, len(LEAD_ROWS) * POINTS
# Signs out of a hash, not out of NumPy's generator, whose numbers may change with its version.
_NOISE = hashlib.shake_256(b"ecg_jax signature 1").digest(_SIZE[0] * _SIZE[1] // 8)
_MIX = np.unpackbits(np.frombuffer(_NOISE, np.uint8)).reshape(_SIZE) * 2.0 - 1.0


def signatures(y: np.ndarray) -> list[bytes]:
    """16 bytes for each of filtered ECGs [B, 12, n] at 100 Hz, n >= 100, any unit; each lead's own gain is free.

    Triangular averages around 24 moments of each independent lead, less their mean and over their spread, are
    mixed by fixed signs and rounded to whole standard deviations.
    """
    n = y.shape[2]
    edge = min(EDGE, n // 6)
    width = min(WIDTH, (n - 2 * edge) / 6)
    # The second sum of a signal, differenced twice over `width`, is its triangular average.
    centre = np.linspace(edge + width, n - edge - width, POINTS)
    sums = _second_sum(y[:, LEAD_ROWS], np.concatenate([centre - width, centre, centre + width]) - 1)
    left, middle, right = np.split(sums, 3, axis=2)
    means = right - 2 * middle + left
    means -= means.mean(axis=2, keepdims=True)
    spread = np.sqrt(np.square(means).mean(axis=2, keepdims=True))
    silent = spread <= 1e-9 * width**2  # far below one microvolt: rounding, not a signal
    shape = np.where(silent, 0.0, means / np.where(silent, 1.0, spread)).reshape(len(y), 1, -1)
    # Elementwise and summed row by row: a matrix product may add in another order on another machine.
    features = (_MIX * shape).sum(axis=2) / np.sqrt(shape.shape[2])
    halves = [np.floor(features / STEP + shift).astype(np.int8) for shift in (0.0, 0.5)]
    return [
        b"".join(hashlib.blake2b(half[b].tobytes(), digest_size=8).digest() for half in halves) for b in range(len(y))
    ]


def same_content(one: bytes, two: bytes) -> bool:
    """Whether two signatures mean the same recording: either half agrees; by chance 1 pair in 10^13."""
    return one[:8] == two[:8] or one[8:] == two[8:]


def _second_sum(leads: np.ndarray, place: np.ndarray) -> np.ndarray:
    """The sum of sums, S[j] = sum over k < j of (j - k) * x[k], of [..., n] at `place` in 1 to n, but for what is
    linear in j: [..., len(place)].

    In between it is linear, so that a span a sample longer moves no average by a whole sample. Only sums of x[k] and
    of k * x[k] from one place to the next are made: a third of the time of a sum over all.
    """
    low = np.minimum(place.astype(int), leads.shape[-1] - 1)
    first = low.min()  # what comes before it adds to all S what is linear in j
    leads, low, place = leads[..., first : low.max() + 1], low - first, place - first
    starts, which = np.unique(low, return_inverse=True)  # the first is 0
    moment = leads * np.arange(leads.shape[-1], dtype=np.float64)
    total, moment = (
        np.concatenate([np.zeros((*a.shape[:-1], 1)), np.cumsum(a[..., :-1], axis=-1)], axis=-1)[..., which]
        for a in (np.add.reduceat(leads, starts, axis=-1), np.add.reduceat(moment, starts, axis=-1))
    )
    # S[j + 1] is the sum over k <= j of x[k] more than S[j].
    return low * total - moment + (place - low) * (total + leads[..., low])
