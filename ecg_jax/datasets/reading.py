"""From items that point at WFDB records to `Record`s: what every data set of WFDB files does the same way.

It does not know any layout: an item's `where` holds what the module of the set has read from its tables. Invariant: one
result per item, in order, and a record that cannot be read is a `Refused`, never an exception.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from ecg_jax.datasets.source import Item
from ecg_jax.records.readers import read_wfdb
from ecg_jax.records.record import Record, Refused


def read_items(folder: Path, unit: str, checksums: bool, items: Sequence[Item]) -> Iterator[Record | Refused]:
    """Read each item's record below `folder`.

    `item.where`: path (relative, without ending; None: there is no such file), patient, age, sex, labels, and time and
    device where a table knows them (else the header's time). unit, checksums: as in `read_wfdb`.
    """
    for item in items:
        where = item.where
        try:
            if where["path"] is None:
                raise Refused("missing-file", f"no header for {item.record_id} under {folder}")
            reading = read_wfdb(folder / where["path"], unit, checksums)
        except Refused as refusal:
            yield refusal
            continue
        yield Record(
            signal=reading.signal,
            rate=reading.rate,
            record_id=item.record_id,
            group=item.group,
            patient_id=where["patient"],
            age=where["age"],
            sex=where["sex"],
            labels=where["labels"],
            time=where.get("time", reading.time),
            device=where.get("device"),
            source=reading.source,
            split=item.split,
            unit=unit,
            quality=reading.quality,
            meta=reading.meta(),
        )
