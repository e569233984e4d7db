"""LUDB, Lobachevsky University Database 1.0.1: 200 recordings of 200 subjects, 500 Hz, 10 s.

No options. Layout as published: ludb.csv (ID, Sex, Age and nine columns of diagnoses) and WFDB records data/<ID>. A
cell holds several statements, on lines of their own (as published) or after semicolons; case, a final full stop and the
repetition of the column's name are dropped. The manual wave borders are not read.

Nine tasks, one for each column: rhythm, axis, conduction, extrasystole, hypertrophy, pacing, ischemia, repolarisation,
other. Their labels are the statements that occur in the table. Rhythm and axis are stated for every subject, so an
empty cell there (the axis of paced hearts) is unknown; in the other columns it says that there is nothing of the kind.

The headers' gains are bogus: each makes its lead's range exactly 1 "mV". The stored integers are microvolt: in them,
and only in them, II is exactly I + III. They are read as such, and every recording is held to that equation.

Invariant: a record whose integers do not obey I + III = II is refused with gain-policy-fails.
"""

import math
import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ecg_jax.datasets import check_options
from ecg_jax.datasets.reading import read_each
from ecg_jax.datasets.source import Item, Source, pack
from ecg_jax.datasets.table import Row, age, multi_hot, need_columns, read_table
from ecg_jax.errors import DataError
from ecg_jax.records.leads import LEADS
from ecg_jax.records.readers.reading import Reading
from ecg_jax.records.readers.wfdb import read_wfdb
from ecg_jax.records.record import Record, Refused

STEP = 0.001  # mV
# Task -> column of ludb.csv.
TASKS = {
    "rhythm": "Rhythms",
    "axis": "Electric axis of the heart",
    "conduction": "Conduction abnormalities",
    "extrasystole": "Extrasystolies",
    "hypertrophy": "Hypertrophies",
    "pacing": "Cardiac pacing",
    "ischemia": "Ischemia",
    "repolarisation": "Non-specific repolarization abnormalities",
    "other": "Other states",
}
STATED = ("rhythm", "axis")  # empty is unknown here, and nothing of the kind elsewhere
_REPEATED = ("axis", "repolarisation")  # "Electric axis of the heart: normal"
_SEX = {"M": 1.0, "F": 0.0, "": math.nan}
_OLD, _OLD_STORED = ">89", 90.0


def open_ludb(source_dir: Path, options: dict[str, str]) -> Source:
    """Open the folder that holds `ludb.csv` and `data/`.

    Raises `UsageError` for options, `DataError` for the table. A row whose recording is missing is refused when it is
    read; a recording without a row is counted in `skipped`.
    """
    check_options("ludb", options, ())
    table = read_table(source_dir / "ludb.csv")
    need_columns(table, ("ID", "Sex", "Age", *TASKS.values()))
    rows = [table.row(i) for i in range(len(table.rows))]
    stated = [{task: _statements(row, task) for task in TASKS} for row in rows]
    names = {task: tuple(sorted(set().union(*(one[task] for one in stated)))) for task in TASKS}
    seen: set[str] = set()
    items = []
    for row, present in zip(rows, stated, strict=True):
        record = row.identifier("ID")
        if not re.fullmatch(r"\d{1,6}", record) or record in seen:
            raise DataError(f"{row.where}: ID={row['ID'][:40]!r} is {'there twice' if record in seen else 'no number'}")
        seen.add(record)
        where = {
            "path": f"data/{record}",
            "patient": record,
            "labels": {task: _vector(present[task], names[task], task) for task in TASKS if names[task]},
            "age": _age(row),
            "sex": _sex(row),
        }
        items.append(Item(record, record, None, where))
    spare = {path.stem for path in (source_dir / "data").glob("*.hea")} - seen
    about: dict[str, Any] = {
        "licence": "ODC-By 1.0",
        "doi": "10.13026/eegm-h675",
        "tables_sha256": {table.path.name: table.digest()},
        "rows": len(rows),
        "gain_policy": "the headers' gains are bogus; stored integers are read as microvolt, I + III = II is checked",
        "label_policy": f"an empty cell is unknown in {' and '.join(STATED)}, and absent in the other columns",
        "tasks_without_label": sorted(task for task in TASKS if not names[task]),
        "age": f"{_OLD} is stored as {_OLD_STORED:g}",
    }
    skipped = {"recording without a row in ludb.csv": len(spare)} if spare else {}
    tasks = {task: labels for task, labels in names.items() if labels}
    return Source("ludb", "1.0.1", "mV", tasks, pack(items), partial(_read, source_dir), about, skipped)


def _statements(row: Row, task: str) -> set[str]:
    """Labels of a cell: statements in small letters, without final full stop."""
    column = TASKS[task]
    found = set()
    for part in re.split(r"[\n\r;]", row[column]):
        label = " ".join(part.split()).rstrip(".").casefold()
        if task in _REPEATED:
            label = label.removeprefix(f"{column.casefold()}:").strip()
        found.add(label)
    return found - {""}


def _vector(present: set[str], names: Sequence[str], task: str) -> np.ndarray:
    return multi_hot(present, names) if present or task in STATED else np.zeros(len(names), np.int8)


def _age(row: Row) -> float:
    return _OLD_STORED if row["Age"].replace(" ", "") == _OLD else age(row.number("Age"))


def _sex(row: Row) -> float:
    if row["Sex"] not in _SEX:
        raise DataError(f"{row.where}: Sex={row['Sex'][:20]!r}, LUDB has M and F")
    return _SEX[row["Sex"]]


def _read(source_dir: Path, items: Sequence[Item]) -> Iterator[Record | Refused]:
    return read_each(partial(_read_one, source_dir), "mV", items)


def _read_one(source_dir: Path, item: Item) -> Reading:
    """Refuses with what `read_wfdb` does, and with gain-policy-fails."""
    path = source_dir / item.where["path"]
    reading = read_wfdb(path, millivolt_per_step=STEP)
    limb = LEADS[:3]
    if set(limb) & {*reading.derived, *reading.missing}:
        raise Refused("gain-policy-fails", f"{path}.hea has not the leads I, II and III, so its unit cannot be checked")
    one, two, three = (np.rint(reading.signal[:, i].astype(np.float64) / STEP) for i in range(3))
    off = one + three - two
    if np.nanmax(np.abs(off), initial=0.0) > 0 or np.isnan(off).all():
        raise Refused(
            "gain-policy-fails",
            f"{path}.dat: I + III = II does not hold in the stored integers, so they are no microvolt",
        )
    return reading
