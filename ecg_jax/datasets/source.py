"""What a data set module hands to the converter: a list of items and a function that reads them.

No reading happens until `read` is called, which may be in another process: `read` and the items pickle.
Invariant: `read(items)` yields exactly one `Record` or `Refused` per item, in the order of the items.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

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
    items            all recordings, in an order that depends on the content of the source alone
    read             (items) -> one `Record` or `Refused` per item, in order; picklable
    about            facts for the card: licence, options, counts, what was set aside and why; JSON-able
    default_windows  "all" cuts a long recording into 10 s windows, "first" keeps its first one
    """

    name: str
    version: str
    unit: Literal["mV", "z"]
    tasks: dict[str, tuple[str, ...]]
    items: tuple[Item, ...]
    read: Callable[[Sequence[Item]], Iterator[Record | Refused]]
    about: dict[str, Any] = field(default_factory=dict)
    default_windows: Literal["all", "first"] = "all"
