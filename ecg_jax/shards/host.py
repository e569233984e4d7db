"""The third way to hold records: shards mapped into memory, for data that fits no device.

`MappedSignals` stands where a `Table` has its samples and reads the rows that are asked for; `batches` makes of them
batches in the lane order of `resident.Order`, so that this loader and the resident one feed the same records at the
same step, on any number of devices and hosts. Maps only the shards that it is given. No randomness but the order.

Invariants: a record has passed its CRC32C before it is first handed out; a batch is never written again while anybody
holds it.
"""

import itertools
import mmap
import struct
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import google_crc32c
import numpy as np

from ecg_jax.errors import DataError
from ecg_jax.records.leads import expand_matrix
from ecg_jax.shards import schema

AHEAD = 16  # steps whose order is worked out in one go: it costs as much as copying the records, one by one


class Mapped(NamedTuple):
    """One mapped shard: its path, its bytes uint8 [size], the chosen rows (`schema.IndexRow`), its stored leads."""

    path: Path
    data: np.ndarray
    rows: np.ndarray
    leads: schema.Leads


def map_shard(path: Path) -> np.ndarray:
    """The bytes of the file at `path`, uint8 [size], mapped and read-only. Raises DataError where it cannot be."""
    try:
        with path.open("rb") as file:
            return np.frombuffer(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ), np.uint8)
    except (OSError, ValueError) as error:  # ValueError: an empty file
        raise DataError(f"{path}: {getattr(error, 'strerror', None) or error}; {schema.REPAIR}") from None


class MappedSignals:
    """int16 [n, 1000, L] that lies in mapped shards, in the order of `parts`. Indexing reads; nothing is kept."""

    dtype = np.dtype(np.int16)
    ndim = 3

    def __init__(self, parts: Sequence[Mapped], leads: schema.Leads) -> None:
        self._parts = tuple(parts)
        self._bytes = [(part.data, 2 * schema.LENGTH * len(schema.LEAD_NAMES[part.leads])) for part in parts]
        self._edges = np.cumsum([0, *(len(part.rows) for part in parts)])
        self._start = np.concatenate([np.zeros(0, np.int64), *(part.rows["signal"].astype(np.int64) for part in parts)])
        self._checked = np.zeros(len(self._start), bool)
        self._expand = expand_matrix()
        self.shape = (len(self._start), schema.LENGTH, len(schema.LEAD_NAMES[leads]))

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> np.ndarray:
        rows = np.arange(len(self))[rows]
        return self.read(np.atleast_1d(rows)).reshape(*rows.shape, *self.shape[1:])

    def read(self, rows: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """The records `rows` [m] as int16 [m, 1000, L], in `out` if it is given.

        Raises DataError naming file and byte of a damaged record.
        """
        out = np.empty((len(rows), *self.shape[1:]), np.int16) if out is None else out
        of = np.searchsorted(self._edges, rows, side="right") - 1
        fresh = np.flatnonzero(~self._checked[rows])
        for at in fresh.tolist():
            self._verify(int(rows[at]), self._parts[of[at]], int(self._edges[of[at]]))
        # A plain loop over bytes (samples may stand at odd places): a copy costs 3 us, the lines around it little.
        wide = 2 * schema.LENGTH * out.shape[2]
        plain = out.reshape(len(rows), wide // 2).view(np.uint8)
        for i, part, start in zip(range(len(rows)), of.tolist(), self._start[rows].tolist(), strict=True):
            data, size = self._bytes[part]
            if size == wide:
                plain[i] = data[start : start + size]
            else:
                samples = data[start : start + size].view("<i2").reshape(schema.LENGTH, -1)
                out[i] = to_twelve(samples, self._expand)
        return out

    def _verify(self, row: int, part: Mapped, first: int) -> None:
        """Once for each record, when it is first asked for: a pass over everything would double the first epoch."""
        frame, length = (int(part.rows[name][row - first]) for name in ("frame", "length"))
        payload = frame + schema.HEADER
        head = part.data[frame:payload].tobytes()
        stored_length, length_crc = struct.unpack("<QI", head)
        end = payload + length
        (payload_crc,) = struct.unpack("<I", part.data[end : end + 4].tobytes())
        found = schema.mask(google_crc32c.value(part.data[payload:end]))
        if stored_length != length or schema.masked_crc(head[:8]) != length_crc or found != payload_crc:
            raise schema.damaged(part.path, frame, "a checksum is wrong")
        self._checked[row] = True


def to_twelve(samples: np.ndarray, expand: np.ndarray) -> np.ndarray:
    """int16 [..., 8] -> int16 [..., 12], rounded and held inside int16."""
    return np.clip(np.rint(samples.astype(np.float32) @ expand), -32767, 32767).astype(np.int16)


def batches(
    table: Any, order: Any, fields: Sequence[str], lanes: Sequence[int], start_step: int = 0
) -> Iterator[dict[str, np.ndarray]]:
    """Batches of `table` (a `tables.Table`; its samples mapped or not) for ever, in `order` (a `resident.Order`), from
    `start_step` on.

    Each is a dict of `fields` [b, ...], record_hash uint64 [b] and epoch int32 [b], the records of `lanes` in lane
    order: b = order.batch / 8 * len(lanes), the part of the batch that this process feeds.
    """
    rows_of = [np.flatnonzero(table.lane == lane) for lane in lanes]
    signals = Buffers((len(lanes) * order.per_lane, *table.signal.shape[1:]))
    rest = [name for name in fields if name != "signal"]
    for first in itertools.count(start_step, AHEAD):
        for index, epoch in zip(*order.span(first, AHEAD), strict=True):
            rows = np.concatenate([own[index[lane]] for own, lane in zip(rows_of, lanes, strict=True)])
            batch = {name: getattr(table, name)[rows] for name in rest}
            if "signal" in fields:
                batch["signal"] = _take(table.signal, rows, signals.take())
            yield batch | {"record_hash": table.record_hash[rows], "epoch": epoch[list(lanes)].reshape(-1)}
            del batch  # a name that stays would hold the buffer


def _take(signal: Any, rows: np.ndarray, out: np.ndarray) -> np.ndarray:
    return signal.read(rows, out) if isinstance(signal, MappedSignals) else np.take(signal, rows, 0, out, "clip")


class Buffers:
    """int16 arrays that are handed out again once nobody else holds them: fresh memory is as slow to touch as the
    records are to copy. A JAX array on CPU may be the buffer itself, and holds it as long as it lives.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._shape = shape
        self._all: list[np.ndarray] = []

    def take(self) -> np.ndarray:
        for at in range(len(self._all)):
            if sys.getrefcount(self._all[at]) == 2:  # this list, and the argument of the question
                return self._all[at]
        self._all.append(np.empty(self._shape, np.int16))
        return self._all[-1]
