"""PTB-XL as PhysioNet publishes it (1.0.1 and 1.0.3): six label tasks, official folds, patients, both rates.

A statement counts whatever its likelihood: 0 means "not graded" there, not "absent". A record without any
label of a task is kept, with that task's labels unknown (the published benchmark drops it). Ages above 89,
stored as 300, become 90. Invariant: the label names of each task are those of scp_statements.csv, and as many
as the benchmark has.
"""

import ast
import math
from functools import partial
from pathlib import Path
from typing import Any

from ecg_jax.datasets import check_options
from ecg_jax.datasets.reading import read_items
from ecg_jax.datasets.source import Item, Source, pack
from ecg_jax.datasets.table import (
    Table,
    age,
    identifier,
    multi_hot,
    need_columns,
    number,
    parse_folds,
    read_table,
)
from ecg_jax.errors import DataError, UsageError

TASKS = {"superclass": 5, "subclass": 23, "form": 19, "rhythm": 12, "diagnostic": 44, "statements": 71}
FOLDS = "1-8/9/10"
OPTIONS = ("folds", "rate")
_COLUMNS = ("ecg_id", "patient_id", "age", "sex", "scp_codes", "strat_fold", "filename_lr", "filename_hr")
# Some of the records that 1.0.3 no longer has, as duplicates of others.
_WITHDRAWN = {"137", "139", "141", "142", "145", "456", "458", "459", "462"}
_AGE_HIDDEN, _AGE_STORED = 300.0, 90.0


def open_ptbxl(source_dir: Path, options: dict[str, str]) -> Source:
    """Open the folder that holds `ptbxl_database.csv`, `scp_statements.csv`, `records100/` and/or
    `records500/`.

    Options: `folds` = train/val/test folds, default "1-8/9/10" (others are left out); `rate` = 100 or 500,
    default 500 where every record has its 500 Hz file, else 100. A record whose files are missing is refused
    when it is read. Raises `UsageError` for options, `DataError` for files.
    """
    check_options("ptbxl", options, OPTIONS)
    folds = parse_folds(options.get("folds", FOLDS))
    codes_table = read_table(source_dir / "scp_statements.csv")
    statements = _statements(codes_table)
    table = read_table(source_dir / "ptbxl_database.csv")
    need_columns(table, _COLUMNS)
    names = {task: tuple(sorted(set(codes.values()))) for task, codes in statements.items()}
    rate, at_500 = _rate(source_dir, table, options.get("rate"))
    column = "filename_hr" if rate == 500 else "filename_lr"

    items, outside, unlabelled, unknown_codes = [], 0, dict.fromkeys(TASKS, 0), set()
    seen: set[str] = set()
    for i, row in enumerate(table.rows):
        record_id = identifier(table, i, "ecg_id")
        if not record_id or record_id in seen:
            raise DataError(f"{table.where(i)}: ecg_id {record_id!r} is {'there twice' if record_id else 'empty'}")
        seen.add(record_id)
        fold = number(table, i, "strat_fold")
        if not fold.is_integer():  # nor is NaN, an empty cell
            raise DataError(f"{table.where(i)}: strat_fold={row['strat_fold']!r} is no fold number")
        split = folds.get(int(fold))
        if split is None:
            outside += 1
            continue
        codes = _codes(table, i)
        unknown_codes |= codes - _all_codes(statements)
        labels = {}
        for task, of_code in statements.items():
            present = {of_code[code] for code in codes if code in of_code}
            unlabelled[task] += not present
            labels[task] = multi_hot(present, names[task])
        patient = identifier(table, i, "patient_id") or None
        years = number(table, i, "age")
        where = {
            "path": row[column],
            "patient": patient,
            "labels": labels,
            "age": _AGE_STORED if years == _AGE_HIDDEN else age(years),
            "sex": _sex(table, i),
            "time": row.get("recording_date") or None,
            "device": " ".join(row.get("device", "").split()) or None,
        }
        items.append(Item(record_id, patient or record_id, split, where))
    about: dict[str, Any] = {
        "tables_sha256": {one.path.name: one.digest() for one in (table, codes_table)},
        "folds": options.get("folds", FOLDS),
        "rate": rate,
        "rate_reason": _reason(options.get("rate"), rate, at_500, len(table.rows)),
        "rows": len(table.rows),
        "unlabelled": unlabelled,
        "unlabelled_policy": "kept, labels of that task unknown (-1)",
        "unknown_codes": sorted(unknown_codes),
        "likelihood_policy": "a statement counts whatever its likelihood",
        "age": "300 (hidden, above 89) is stored as 90",
        "licence": "CC BY 4.0",
        "doi": "10.1038/s41597-020-0495-6",
    }
    version = "1.0.1" if seen & _WITHDRAWN else "1.0.3"
    return Source(
        name="ptbxl",
        version=version,
        unit="mV",
        tasks=names,
        items=pack(items),
        read=partial(read_items, source_dir, "mV", True),
        about=about,
        skipped={"outside folds": outside} if outside else {},
    )


def _statements(table: Table) -> dict[str, dict[str, str]]:
    """Per task: SCP code -> label. The first column of the published file has no name."""
    need_columns(table, ("", "diagnostic", "form", "rhythm", "diagnostic_class", "diagnostic_subclass"))
    tasks: dict[str, dict[str, str]] = {task: {} for task in TASKS}
    for i, row in enumerate(table.rows):
        code = row[""]
        if not code:
            raise DataError(f"{table.where(i)}: a statement without a code")
        tasks["statements"][code] = code
        if number(table, i, "diagnostic") == 1:
            for task, column in (("superclass", "diagnostic_class"), ("subclass", "diagnostic_subclass")):
                if not row[column]:
                    raise DataError(f"{table.where(i)}: diagnostic statement {code} has no {column}")
                tasks[task][code] = row[column]
            tasks["diagnostic"][code] = code
        for task in ("form", "rhythm"):
            if number(table, i, task) == 1:
                tasks[task][code] = code
    for task, expected in TASKS.items():
        found = len(set(tasks[task].values()))
        if found != expected:
            raise DataError(
                f"{table.path}: {found} labels of task {task}, PTB-XL has {expected}; is the file complete?"
            )
    return tasks


def _all_codes(statements: dict[str, dict[str, str]]) -> set[str]:
    return set().union(*statements.values())


def _codes(table: Table, i: int) -> set[str]:
    cell = table.rows[i]["scp_codes"]
    try:
        codes = ast.literal_eval(cell)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        codes = None
    if not isinstance(codes, dict) or not all(isinstance(code, str) for code in codes):
        raise DataError(f"{table.where(i)}: scp_codes={cell[:60]!r} is not of the form {{'NORM': 100.0}}")
    return set(codes)


def _sex(table: Table, i: int) -> float:
    """PTB-XL: 0 male, 1 female; here 1 male, 0 female."""
    value = number(table, i, "sex")
    if math.isnan(value):
        return value
    if value not in (0.0, 1.0):
        raise DataError(f"{table.where(i)}: sex={table.rows[i]['sex']!r}, PTB-XL has 0 and 1")
    return 1.0 - value


def _rate(source_dir: Path, table: Table, wanted: str | None) -> tuple[int, int]:
    """(rate to read, records with a 500 Hz header)."""
    if wanted not in (None, "100", "500"):
        raise UsageError(f"ptbxl: rate={wanted!r}, known are 100 and 500")
    folders: dict[Path, set[str]] = {}  # listed once: 21,799 single look-ups are slow on network disks

    def count(column: str) -> int:
        found = 0
        for row in table.rows:
            file = source_dir / f"{row[column]}.hea"
            if file.parent not in folders:
                folders[file.parent] = {p.name for p in file.parent.iterdir()} if file.parent.is_dir() else set()
            found += file.name in folders[file.parent]
        return found

    at_500 = count("filename_hr")
    rate = int(wanted) if wanted else 500 if table.rows and at_500 == len(table.rows) else 100
    if not (at_500 if rate == 500 else count("filename_lr")):
        other = f"; {at_500} records are there at 500 Hz (rate=500)" if rate == 100 and at_500 else ""
        raise DataError(f"{source_dir}: no record of ptbxl_database.csv under records{rate}/{other}")
    return rate, at_500


def _reason(wanted: str | None, rate: int, at_500: int, total: int) -> str:
    if wanted:
        return f"asked for ({at_500} of {total} records are there at 500 Hz)"
    return "every record is there at 500 Hz" if rate == 500 else f"only {at_500} of {total} records are there at 500 Hz"
