"""The order of examples for data that is held whole: which record of which lane at which step.

A pure function of (seed, lane, lane step): eight lanes, each through its own records in a new order per
epoch, each with its own epoch counter. So any number of devices that divides the lanes sees the same batches,
and going on at step s needs nothing but s. Holds no arrays of records (the trainer does) and NumPy only.
Invariant: in every epoch of a lane each of its records comes exactly once.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ecg_jax.errors import DataError, UsageError
from ecg_jax.records.windows import NO_CODE
from ecg_jax.shards import LANES
from ecg_jax.shards.tables import FIELDS, Table

ROUNDS = 8  # of the Feistel network; four are enough for an order that passes for random, and these cost little
_U = np.uint64


def _mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser: uint64 -> uint64, every input bit reaches every output bit."""
    x = (x ^ (x >> _U(30))) * _U(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> _U(27))) * _U(0x94D049BB133111EB)
    return x ^ (x >> _U(31))


def permute(position: np.ndarray, n: np.ndarray | int, key: np.ndarray) -> np.ndarray:
    """Element `position` of the permutation of [0, n) that `key` names; uint64 arrays that broadcast,
    position < n.

    A Feistel network on the next power of two, walked along its cycle until it is inside [0, n): at most two
    rounds of walking on average. No table, so any position costs the same.
    """
    position, size, key = np.broadcast_arrays(np.asarray(position, _U), np.asarray(n, _U), np.asarray(key, _U))
    bits = np.frexp((size - _U(1)).astype(np.float64))[1].astype(_U)  # bit length of size - 1
    out = np.empty(position.shape, _U)
    todo = np.ones(position.shape, bool)
    walking = position.copy()
    while todo.any():
        walking[todo] = _feistel(walking[todo], bits[todo], key[todo])
        done = todo & (walking < size)
        out[done] = walking[done]
        todo &= ~done
    return out


def _feistel(x: np.ndarray, bits: np.ndarray, key: np.ndarray) -> np.ndarray:
    """A permutation of [0, 2^bits): the halves take turns in being changed by a hash of the other one."""
    low_bits = bits >> _U(1)
    low_mask, high_mask = (_U(1) << low_bits) - _U(1), (_U(1) << (bits - low_bits)) - _U(1)
    low, high = x & low_mask, x >> low_bits
    for number in range(ROUNDS):
        round_key = _mix(key + _U((number + 1) * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF))
        # The high bits of a product are the well mixed ones, so it is they that are kept.
        if number % 2:
            low ^= _mix(high + round_key) >> _U(20) & low_mask
        else:
            high ^= _mix(low + round_key) >> _U(20) & high_mask
    return high << low_bits | low


class Order:
    """Which records make batch `step`: `batch`/8 from each lane, the lanes' sizes in `lane_counts` [8].

    Raises UsageError for a batch that eight does not divide, DataError for a lane without records.
    """

    def __init__(self, lane_counts: Sequence[int], batch: int, seed: int) -> None:
        counts = [int(count) for count in lane_counts]
        if len(counts) != LANES:
            raise UsageError(f"{len(counts)} lanes: there are always {LANES}")
        if batch < LANES or batch % LANES:
            raise UsageError(f"batch {batch}: must be a multiple of {LANES}, one equal part a lane")
        if min(counts) < 1:
            raise DataError(
                f"the lanes hold {counts} records and none may be empty: take a larger subset (a patient "
                "falls into one lane by its hash: about 80 patients fill them all) or another subset offset"
            )
        self.counts = np.array(counts, _U)
        self.batch = batch
        self.per_lane = batch // LANES
        self.seed = seed

    def indices(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """(index inside the lane, epoch of the lane), both int32 [8, batch/8], of batch `step`."""
        index, epoch = self.span(step, 1)
        return index[0], epoch[0]

    def span(self, start: int, steps: int) -> tuple[np.ndarray, np.ndarray]:
        """The same for the batches `start` to `start + steps - 1`: int32 [steps, 8, batch/8] each."""
        first = np.arange(start, start + steps, dtype=_U)[:, None, None] * _U(self.per_lane)
        position = first + np.arange(self.per_lane, dtype=_U)
        counts = self.counts[:, None]
        epoch = position // counts
        lane = np.arange(LANES, dtype=_U)[:, None]
        # Three mixes in a row: seed, lane and epoch are small numbers, and neighbours must not give related
        # orders.
        key = _mix(_mix(_mix(np.array([self.seed & 0xFFFFFFFFFFFFFFFF], _U)) + lane) + epoch)
        index = permute(position % counts, counts, key)
        return index.astype(np.int32), epoch.astype(np.int32)


FILL = {"signal": 0, "labels": -1, "valid": 0, "rpeaks": -1, "codes": NO_CODE}  # of the places beyond `counts`


class Lanes(NamedTuple):
    """A table laid out by lane: counts int32 [8] of all lanes, and of the P lanes laid out record_hash uint64
    [P, capacity] and what else was asked for: signal int16 [P, capacity, 1000, L], labels int8 [P, capacity, K], valid
    int32 [P, capacity, 2], rpeaks int16 [P, capacity, 50], codes uint16 [P, capacity, 256]. Beyond `counts` stands
    FILL, a hash of 0."""

    counts: np.ndarray
    record_hash: np.ndarray
    signal: np.ndarray | None = None
    labels: np.ndarray | None = None
    valid: np.ndarray | None = None
    rpeaks: np.ndarray | None = None
    codes: np.ndarray | None = None


def lane_layout(
    table: Table, capacity: int | None = None, fields: Sequence[str] = FIELDS, lanes: Sequence[int] = range(LANES)
) -> Lanes:
    """The `fields` of `table` for `lanes`, in table order inside a lane. `capacity` (default: the whole split's, so
    that every subset has the same shapes and needs no new compilation) must hold the fullest lane.

    Raises UsageError for a field that the table does not hold.
    """
    missing = [name for name in fields if getattr(table, name, None) is None]
    if missing:
        remedy = "; load the table with the folder of codes that `ecg-jax tokenize` wrote" if "codes" in missing else ""
        raise UsageError(f"the table holds no {' and no '.join(missing)}{remedy}")
    counts = np.bincount(table.lanes_of_all, minlength=LANES).astype(np.int32)
    capacity = table.capacity if capacity is None else capacity
    if counts.max(initial=0) > capacity:
        raise ValueError(f"capacity {capacity} is below the fullest lane's {counts.max()} records")
    rows = [np.flatnonzero(table.lane == lane) for lane in lanes]

    def lay(values: np.ndarray, fill: int) -> np.ndarray:
        out = np.full((len(rows), capacity, *values.shape[1:]), fill, values.dtype)
        for place, chosen in zip(out, rows, strict=True):
            place[: len(chosen)] = values[chosen]
        return out

    laid = {name: lay(getattr(table, name), FILL[name]) for name in fields}
    return Lanes(counts, lay(table.record_hash, 0), **laid)
