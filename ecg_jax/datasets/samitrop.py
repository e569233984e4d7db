"""SaMi-Trop (Zenodo 4905618, version 1.0.0): exams.csv and exams.hdf5, patients with chronic Chagas disease.

exams.hdf5 has no ids: row i of `tracings` is row i of exams.csv, so files of different length are refused. Leads lie in
the standard order, checked on the data. The values are 2 x mV, and become mV by division. One exam a patient, no
patient ids, no official split. All patients have Chagas disease, so that is no label; a normal ECG is one of a sick
cohort. `timey` and `nn_predicted_age` are not taken over. Options (`--option key=value`):

    scale=2      what the stored values are divided by to give mV

Tasks: normal, death (-1 where the cell is empty). Invariant: an item per row, in the order of the file.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ecg_jax.datasets import check_options
from ecg_jax.datasets import code_labels as code
from ecg_jax.datasets.source import Item, Source, pack
from ecg_jax.datasets.table import Table, age, need_columns, read_table
from ecg_jax.errors import DataError
from ecg_jax.records.leads import LEADS
from ecg_jax.records.record import Record, Refused

OPTIONS = ("scale",)
TASKS = {"normal": ("normal",), "death": ("death",)}
COLUMNS = ("exam_id", "age", "is_male", "normal_ecg", "death")
_SAMPLED = 64


def open_samitrop(source_dir: Path, options: dict[str, str]) -> Source:
    """Open the folder that holds exams.csv and the unzipped exams.hdf5.

    Raises `UsageError` for options, `DataError` where the two files do not have the same number of rows, an exam is
    there twice, or the lead order is not the published one.
    """
    check_options("samitrop", options, OPTIONS)
    scale = code.scale_of("samitrop", options)
    path = source_dir / "exams.hdf5"
    if not path.exists() and (source_dir / "exams.zip").exists():
        raise DataError(f"there is no {path}; unzip exams.zip there first")
    tracings = code.open_tracings(path)
    table = read_table(source_dir / "exams.csv")
    need_columns(table, COLUMNS)
    if tracings.rows != len(table.rows):
        raise DataError(
            f"{path} has {tracings.rows} rows and {table.path} {len(table.rows)}; rows are matched by number alone, so "
            "both must be as published"
        )
    if not table.rows:
        raise DataError(f"{table.path} has no rows")
    rows = code.read_rows(path, code.spread(tracings.rows, _SAMPLED))
    sample = (raw for raw in rows if not isinstance(raw, Refused))
    facts = code.examine(str(path), sample, LEADS, None, options.get("scale"))
    about: dict[str, Any] = {
        "tables_sha256": {"exams.csv": table.digest()},
        "files": {"exams.hdf5": tracings.size},
        "rows": tracings.rows,
        "scale": scale,
        "scale_policy": code.SCALE_POLICY,
        **facts,
        "cohort": "every patient has chronic Chagas disease (serology)",
        "label_policy": "an empty cell is unknown (-1)",
        "licence": "CC BY 4.0",
        "doi": "10.5281/zenodo.4905618",
    }
    return Source("samitrop", "1.0.0", "mV", TASKS, pack(_items(table)), partial(_read, path, scale), about)


def _items(table: Table) -> Iterator[Item]:
    """`where` is (row, age, sex, flags of normal and death)."""
    seen: dict[int, int] = {}
    for i in range(len(table.rows)):
        row = table.row(i)
        exam = code.whole(row, "exam_id")
        if exam in seen:
            raise DataError(f"{row.where}: exam_id {exam} is also in line {seen[exam]}")
        seen[exam] = row.line
        packed = code.flags(row, ("normal_ecg", "death"))
        where = (i, age(row.number("age")), code.male(row, "is_male"), packed)
        yield Item(str(exam), str(exam), None, where)


def _read(path: Path, scale: float, items: Sequence[Item]) -> Iterator[Record | Refused]:
    rows = code.read_rows(path, [item.where[0] for item in items])
    for item, raw in zip(items, rows, strict=True):
        if isinstance(raw, Refused):
            yield raw
            continue
        source = code.source_of(raw, item.record_id)
        _, years, sex, packed = item.where
        labels = code.labels_of(packed)
        yield Record(
            signal=code.millivolt(raw, scale),
            rate=code.RATE,
            record_id=item.record_id,
            group=item.group,
            age=years,
            sex=sex,
            labels={"normal": labels[:1], "death": labels[1:]},
            source=source,
        )
