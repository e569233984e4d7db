"""From tables to the device: placed arrays, and the inputs of each dispatch.

`ResidentFeed` sends row numbers only, since the records lie on the devices; `BatchFeed` sends batches,
prepared two ahead by a thread. A process among several places and sends the records of its own lanes. Both are pure
functions of the step they are asked for, so going on after a stop, or back to an earlier step, is arithmetic. No
model, no randomness of their own beyond the order.

Invariant: a placed field of a table is shared by all runs of the process that use the same table object on the same
devices, whichever other fields they ask for.
"""

import queue
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from ecg_jax.shards import LANES
from ecg_jax.shards.resident import Order, lane_layout
from ecg_jax.shards.tables import FIELDS, Table
from ecg_jax.training import mesh as mesh_lib

PREFETCH = 2  # batches ahead; more only hides variance and costs memory

Inputs = tuple[dict[str, jax.Array], Any, Any]


@dataclass(frozen=True, eq=False)
class Placed:
    """A table on the devices.

    rows    the fields asked for (signal int16 [8, capacity, 1000, L], labels int8 [8, capacity, K], valid int32
            [8, capacity, 2], rpeaks int16 [8, capacity, 50], codes uint16 [8, capacity, 256]) and hash uint32
            [8, capacity, 2] (high and low word of the record's hash), split over the devices by lane
    counts  int32 [8], records in each lane, on the host; `counts_there` the same on the devices
    source  int64 [8, capacity], the row of the whole selection at each place, -1 where there is none
    """

    rows: dict[str, jax.Array]
    counts: np.ndarray
    counts_there: jax.Array
    source: np.ndarray

    def in_table_order(self, by_place: np.ndarray) -> np.ndarray:
        """Values [8, capacity or more, ...] by place, as [n, ...] in the order of the table."""
        source = self.source
        out = np.empty((int(self.counts.sum()), *by_place.shape[2:]), by_place.dtype)
        out[source[source >= 0]] = by_place[:, : source.shape[1]][source >= 0]
        return out


_placed: dict[tuple[int, Mesh], dict[frozenset[str], Placed]] = {}


def place(table: Table, mesh: Mesh, fields: Sequence[str] = FIELDS) -> Placed:
    """Put `fields` of a table on the devices of `mesh`; memoised for as long as the table object lives.

    Raises UsageError for a field that the table does not hold.
    """
    key = id(table), mesh
    if key not in _placed:
        _placed[key] = {}
        weakref.finalize(table, _placed.pop, key, None)
    mine, wanted = _placed[key], frozenset(fields)
    if wanted not in mine:
        mine[wanted] = _place(table, mesh, fields, {k: v for placed in mine.values() for k, v in placed.rows.items()})
    return mine[wanted]


def _place(table: Table, mesh: Mesh, fields: Sequence[str], there: dict[str, jax.Array]) -> Placed:
    """`there`: the fields of this table that lie on these devices already."""
    new = [name for name in fields if name not in there]
    lanes = lane_layout(table, fields=new, lanes=mesh_lib.own_lanes(mesh, LANES))
    host = {name: getattr(lanes, name) for name in new}
    if "hash" not in there:
        host["hash"] = _words(lanes.record_hash)
    source = np.full((LANES, lanes.record_hash.shape[1]), -1, np.int64)
    for lane, count in enumerate(lanes.counts):
        source[lane, :count] = np.flatnonzero(table.lanes_of_all == lane)
    rows = there | mesh_lib.put_parts(host, mesh_lib.lanes_first(mesh))
    rows = {name: rows[name] for name in (*fields, "hash")}
    return Placed(rows, lanes.counts, mesh_lib.put(lanes.counts, mesh_lib.replicated(mesh)), source)


def _words(hashes: np.ndarray) -> np.ndarray:
    """uint64 [...] -> uint32 [..., 2], high word first: there are no 64-bit integers on the device."""
    return np.stack([hashes >> np.uint64(32), hashes & np.uint64(0xFFFFFFFF)], -1).astype(np.uint32)


class ResidentFeed:
    """Inputs of a dispatch as row numbers into placed arrays, in the lane order of the design."""

    def __init__(self, placed: Placed, mesh: Mesh, batch: int, seed: int, scan: bool) -> None:
        self._rows, self._mesh, self._scan = placed.rows, mesh, scan
        self._order = Order(placed.counts, batch, seed)

    def take(self, step: int, rates: np.ndarray) -> Inputs:
        """(rows, inputs, rates) on the devices for the `len(rates)` steps from `step` on; see `step.build`."""
        index, epoch = self._order.span(step, len(rates))
        entries = [{"index": i, "epoch": e} for i, e in zip(index, epoch, strict=True)]
        inputs = _send_entries(entries, self._mesh, self._scan)
        return self._rows, inputs, _send_rates(rates, self._mesh, self._scan)

    def close(self) -> None:
        """Nothing to stop: this feed has no thread."""


class BatchFeed:
    """Inputs of a dispatch as whole batches, read and sent ahead by a thread: of mapped shards, or of a stream."""

    def __init__(
        self,
        batches: Callable[[int], Iterator[dict[str, np.ndarray]]],
        mesh: Mesh,
        scan: bool,
        fields: Sequence[str] = FIELDS,
    ) -> None:
        """`batches(step)` gives this process's part of the batches from a step on: `fields`, record_hash, epoch."""
        self._fields = tuple(fields)
        self._batches, self._mesh, self._scan = batches, mesh, scan
        self._thread: threading.Thread | None = None
        self._next = -1

    def take(self, step: int, rates: np.ndarray) -> Inputs:
        """As `ResidentFeed.take`, with no rows. Another step than the one after the last restarts the stream."""
        if step != self._next:
            self.close()
            self._start(step, len(rates))
        ready = self._queue.get()
        if isinstance(ready, BaseException):
            raise ready
        self._next = step + len(rates)
        return {}, ready, _send_rates(rates, self._mesh, self._scan)

    def close(self) -> None:
        """Stop the thread."""
        if self._thread is not None:
            self._stop.set()
            while self._thread.is_alive():  # it may stand at a full queue
                try:
                    self._queue.get(timeout=0.05)
                except queue.Empty:
                    pass
            self._thread = None
            self._next = -1

    def _start(self, step: int, per_dispatch: int) -> None:
        self._queue: queue.Queue = queue.Queue(PREFETCH)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(step, per_dispatch), name="feed", daemon=True)
        self._thread.start()

    def _run(self, step: int, per_dispatch: int) -> None:
        out, stop = self._queue, self._stop
        try:
            entries = []
            for batch in self._batches(step):
                fields = {name: batch[name] for name in (*self._fields, "epoch")}
                entries.append(fields | {"hash": _words(batch["record_hash"])})
                if len(entries) == per_dispatch:
                    out.put(_send_entries(entries, self._mesh, self._scan, mesh_lib.put_parts))
                    entries = []
                del batch, fields  # what is held here is not written anew
                if stop.is_set():
                    return
            out.put(RuntimeError("the stream of batches ended, which it never should"))
        except Exception as error:  # to be raised where the batch is missed
            out.put(error)


def _send_entries(entries: list[dict], mesh: Mesh, scan: bool, put: Callable = mesh_lib.put) -> Any:
    if scan:
        stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *entries)
        return put(stacked, mesh_lib.lanes_second(mesh))
    return put(entries, mesh_lib.lanes_first(mesh))


def _send_rates(rates: np.ndarray, mesh: Mesh, scan: bool) -> Any:
    return mesh_lib.put(rates if scan else list(rates), mesh_lib.replicated(mesh))
