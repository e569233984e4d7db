"""From items to `Record`s: what every data set does the same way once its own reader has opened the file.

It does not know any layout: an item's `where` holds what the module of the set has read from its tables. Invariant: one
result per item, in order, and a record that cannot be read is a `Refused`, never an exception.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ecg_jax.datasets.source import Item
from ecg_jax.records.readers.reading import Reading, Unit
from ecg_jax.records.readers.wfdb import read_wfdb
from ecg_jax.records.record import Record, Refused


def read_each(read_one: Callable[[Item], Reading], unit: Unit, items: Sequence[Item]) -> Iterator[Record | Refused]:
    """`read_one(item)` for each item; what it refuses is passed on."""
    for item in items:
        try:
            yield record_of(item, read_one(item), unit)
        except Refused as refusal:
            yield refusal


def record_of(item: Item, reading: Reading, unit: Unit) -> Record:
    """The `Record` of `item` as read.

    `item.where` is a dict with labels (task -> int8 [K]) and, where known, patient, age, sex, time (else the file's),
    device and meta (a dict, stored with the record).
    """
    where = item.where
    return Record(
        signal=reading.signal,
        rate=reading.rate,
        record_id=item.record_id,
        group=item.group,
        patient_id=where.get("patient"),
        age=where.get("age", float("nan")),
        sex=where.get("sex", float("nan")),
        labels=where["labels"],
        time=where.get("time", reading.time),
        device=where.get("device"),
        source=reading.source,
        split=item.split,
        unit=unit,
        missing=reading.missing,
        quality=reading.quality,
        meta=reading.meta() | where.get("meta", {}),
    )


def read_items(folder: Path, unit: Unit, checksums: bool, items: Sequence[Item]) -> Iterator[Record | Refused]:
    """WFDB records below `folder`; `where["path"]` is relative, without ending (None: there is no such file)."""

    def read_one(item: Item) -> Reading:
        if item.where["path"] is None:
            raise Refused("missing-file", f"no header for {item.record_id} under {folder}")
        return read_wfdb(folder / item.where["path"], unit, checksums)

    return read_each(read_one, unit, items)
