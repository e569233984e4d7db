"""What a data set module hands to the converter: a list of items and a function that reads them.

No reading happens until `read` is called, which may be in another process: `read` and the items pickle.
Invariant: `read(items)` yields exactly one `Record` or `Refused` per item, in the order of the items.
"""

import marshal
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from ecg_jax.records.record import Record, Refused


@dataclass(frozen=True)
class Item:
    """One recording to read. `where` is for the data set's own reader (paths, row, label vectors); it
    pickles.
    """

    record_id: str
    group: str
    split: Literal["train", "val", "test"] | None
    where: Any


@dataclass(frozen=True)
class Source:
    """An opened data set, nothing read yet.

    name, version    version is x.y.z, of the data set as published, else 1.0.0
    unit             "mV", or "z" for signals without a unit
    tasks            task -> its label names, in the order of every record's `labels[task]`
    items            all recordings to convert, in an order that depends on the content of the source alone; `pack` them
    read             (items) -> one `Record` or `Refused` per item, in order; picklable
    skipped          why an input record is not among `items` -> how many: by an option, or by the data set's own rules
    about            facts for the card: licence, options, counts, what was set aside and why; JSON-able
    default_windows  "all" cuts a long recording into 10 s windows, "first" keeps its first one
    """

    name: str
    version: str
    unit: Literal["mV", "z"]
    tasks: dict[str, tuple[str, ...]]
    items: Sequence[Item]
    read: Callable[[Sequence[Item]], Iterator[Record | Refused]]
    about: dict[str, Any] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)
    default_windows: Literal["all", "first"] = "all"


class PackedItems(Sequence[Item]):
    """Items in one buffer, some 200 bytes each: two million of them as objects would take gigabytes.

    Behaves as a read-only sequence; slices and `take` share the buffer, and only what they hold is pickled.
    """

    def __init__(self, buffer: bytes | bytearray, start: np.ndarray, stop: np.ndarray) -> None:
        self._buffer, self._start, self._stop = buffer, start, stop

    def __len__(self) -> int:
        return len(self._start)

    def __getitem__(self, i):
        if isinstance(i, slice):
            return self.take(i)
        record_id, group, split, where = marshal.loads(memoryview(self._buffer)[self._start[i] : self._stop[i]])
        return Item(record_id, group, split, _unpack(where))

    def take(self, which: slice | np.ndarray) -> "PackedItems":
        """Those items, in that order."""
        return PackedItems(self._buffer, self._start[which], self._stop[which])

    def __reduce__(self):
        parts = [bytes(self._buffer[a:b]) for a, b in zip(self._start, self._stop, strict=True)]
        stop = np.cumsum([len(part) for part in parts], dtype=np.int64)
        return PackedItems, (b"".join(parts), stop - np.diff(stop, prepend=0), stop)


def pack(items: Iterable[Item]) -> PackedItems:
    """`items` as a `PackedItems`. `where` holds plain values, tuples, lists, dicts and int8 arrays only."""
    buffer, stop = bytearray(), array("q")
    for item in items:
        buffer += marshal.dumps((item.record_id, item.group, item.split, _pack(item.where)))
        stop.append(len(buffer))
    stops = np.array(stop, np.int64)
    return PackedItems(buffer, stops - np.diff(stops, prepend=0), stops)


def _pack(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        small = value.astype(np.int8)
        if value.ndim != 1 or not np.array_equal(small, value):
            raise TypeError(f"an item holds {value.dtype} {value.shape}, only int8 vectors can be packed")
        return frozenset([small.tobytes()])  # a type that no `where` uses otherwise
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict):
        return {key: _pack(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_pack(inner) for inner in value)
    if isinstance(value, str | bytes | int | float | None):
        return value
    raise TypeError(f"an item holds a {type(value).__name__}, which cannot be packed")


def _unpack(value: Any) -> Any:
    if isinstance(value, frozenset):
        return np.frombuffer(next(iter(value)), np.int8)
    if isinstance(value, dict):
        return {key: _unpack(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_unpack(inner) for inner in value)
    return value
