"""Your own WFDB records with a labels table: one CSV row per recording, every column declared.

The options say what each column is; a column that nobody declared stops the opening, because a label left out
by a slip looks like any other column. Invariant: a table row becomes exactly one item, a recording without a
row none, and an empty label cell is unknown (-1), never "absent".

Options (`--option key=value`):
    labels=FILE       the table, relative to the source folder; default labels.csv
    id=COLUMN         recording id; default record
    path=TEMPLATE     where a recording's header lies, without .hea, relative to the source folder, with
                      {column}, {column:05d}, {id} and {thousand:05d} (the id rounded down to thousands).
                      Default: SOURCE/<id>.hea, else the one header in the tree whose name is the id, or, for
                      an id that is a number, the id with leading zeros and an optional suffix after "_" or
                      "-"
    tasks=A,B         label columns, each a task; several labels in a cell are joined by ";"
    labels.A=X,Y      the labels of task A and their order; default all that occur, sorted
    binary=C,D        columns of 0, 1 or nothing, together the task "labels"
    patient=COLUMN    default patient_id      age=COLUMN   default age      sex=COLUMN   default sex
    sex_male=VALUE    what stands for male where the sex column holds numbers
    split=COLUMN      train, val or test; default split
    fold=COLUMN       default strat_fold, with folds=1-8/9/10 (train/val/test); other folds are left out
    ignore=E,F        columns that are none of these
    unit=mV|z         z takes the numbers as they are: standardised or otherwise unit-less signals
    checksums=on|off  compare the headers' checksums with the samples; default on
    name=, version=   of the converted set; default the folder's name, 1.0.0
"""

import math
import re
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ecg_jax.datasets import check_options
from ecg_jax.datasets.locate import locate, template_columns
from ecg_jax.datasets.reading import read_items
from ecg_jax.datasets.source import Item, Source
from ecg_jax.datasets.table import Table, age, identifier, multi_hot, number, parse_folds, read_table
from ecg_jax.errors import DataError, UsageError, did_you_mean
from ecg_jax.records.record import UNKNOWN

# Columns with a role and the name each has unless told otherwise.
ROLES = {
    "id": "record",
    "patient": "patient_id",
    "age": "age",
    "sex": "sex",
    "split": "split",
    "fold": "strat_fold",
}
OPTIONS = (*ROLES, "labels", "path", "tasks", "binary", "sex_male", "folds", "ignore", "unit", "checksums")
BINARY_TASK = "labels"
FOLDS = "1-8/9/10"
SPLITS = ("train", "val", "test")
_SEX = {"m": 1.0, "male": 1.0, "f": 0.0, "female": 0.0, "": math.nan, "u": math.nan, "unknown": math.nan}
_BITS = {"0": 0, "1": 1, "0.0": 0, "1.0": 1, "false": 0, "true": 1, "": UNKNOWN, "nan": UNKNOWN}


def open_wfdb(source_dir: Path, options: dict[str, str]) -> Source:
    """Open the records under `source_dir` by their labels table; the module's docstring lists the options.

    Raises `UsageError` for an option that cannot be (an unknown one, or a column that the table does not
    have) and `DataError` for the table. A row without recording becomes a refusal ("missing-file") when it is
    read; recordings without a row are counted in `about`.
    """
    check_options("wfdb", options, (*OPTIONS, "name", "version", "labels."))
    unit = _one_of(options, "unit", ("mV", "z"))
    checksums = _one_of(options, "checksums", ("on", "off")) == "on"
    name, version = _name(source_dir, options)
    table = read_table(source_dir / options.get("labels", "labels.csv"))
    if not table.rows:
        raise DataError(f"{table.path} has a header line and no rows")
    columns = _columns(table, options)
    names = _label_names(table, options)
    split_of = _splitter(table, columns, options)
    ids = _ids(table, columns["id"])
    paths, about_files = locate(source_dir, table, ids, options.get("path"))

    items, outside, unlabelled = [], 0, Counter()
    for i, record_id in enumerate(ids):
        split = split_of(i)
        if split == "":
            outside += 1
            continue
        labels = {
            task: _binary(table, i, names[task])
            if task == BINARY_TASK and "binary" in options
            else multi_hot(_cell_labels(table, i, task, names[task]), names[task])
            for task in names
        }
        unlabelled.update(task for task, values in labels.items() if (values == UNKNOWN).all())
        patient = (identifier(table, i, columns["patient"]) if "patient" in columns else "") or None
        where = {
            "path": paths[i],
            "patient": patient,
            "labels": labels,
            "age": age(number(table, i, columns["age"])) if "age" in columns else math.nan,
            "sex": _sex(table, i, columns["sex"], options.get("sex_male")) if "sex" in columns else math.nan,
        }
        items.append(Item(record_id, patient or record_id, split, where))
    if not items:
        raise DataError(f"{table.path}: none of its {len(ids)} rows is in the folds {options.get('folds', FOLDS)}")
    about: dict[str, Any] = {
        "options": dict(sorted(options.items())),
        "table": table.path.name,
        "table_sha256": table.digest(),
        "rows": len(ids),
        "outside_folds": outside,
        "unlabelled": {task: unlabelled[task] for task in names},
        "unlabelled_policy": "kept, labels of that task unknown (-1)",
        "splits": dict(Counter(item.split or "by hash of the patient" for item in items)),
        **about_files,
    }
    return Source(name, version, unit, names, tuple(items), partial(read_items, source_dir, unit, checksums), about)


def _one_of(options: dict[str, str], key: str, known: tuple[str, str]) -> str:
    value = options.get(key, known[0])
    if value not in known:
        raise UsageError(f"wfdb: {key}={value!r}, known are {' and '.join(known)}")
    return value


def _name(source_dir: Path, options: dict[str, str]) -> tuple[str, str]:
    name = options.get("name")
    if name is None:
        name = re.sub(r"[^a-z0-9]+", "_", source_dir.resolve().name.lower()).strip("_")
        name = name if re.match("[a-z]", name) else f"wfdb_{name}".rstrip("_")
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise UsageError(f"wfdb: name={name!r}: small letters, digits and _ only, a letter first")
    version = options.get("version", "1.0.0")
    if not re.fullmatch(r"\d+\.\d+\.\d+", version):
        raise UsageError(f"wfdb: version={version!r} is not of the form 1.0.0")
    return name, version


def _list(options: dict[str, str], key: str) -> list[str]:
    return [part.strip() for part in options.get(key, "").split(",") if part.strip()]


def _columns(table: Table, options: dict[str, str]) -> dict[str, str]:
    """Role -> column, for the roles that the table fills; every column of the table must be declared."""

    def there(column: str, option: str) -> None:
        if column not in table.columns:
            near = did_you_mean(column, table.columns)
            raise UsageError(
                f"wfdb: {option} names column {column!r}, which {table.path} does not have{near}; "
                f"its columns are {', '.join(table.columns)}"
            )

    columns = {role: options.get(role, usual) for role, usual in ROLES.items()}
    if "id" not in options and columns["id"] not in table.columns:
        raise UsageError(
            f"wfdb: {table.path} has no column 'record'; say which one holds the ids with id=COLUMN "
            f"(columns are {', '.join(table.columns)})"
        )
    if "split" in options and "fold" in options:
        raise UsageError("wfdb: give split=COLUMN or fold=COLUMN, not both")
    if "fold" in options and "split" not in options:
        del columns["split"]  # a column that only happens to be called so
    for role in list(columns):
        if role in options:
            there(columns[role], f"{role}=")
        elif columns[role] not in table.columns:
            del columns[role]
    for option in ("tasks", "binary", "ignore"):
        for column in _list(options, option):
            there(column, f"{option}=")
    declared = Counter(_list(options, "tasks") + _list(options, "binary") + _list(options, "ignore"))
    # A column that is declared otherwise does not also get the role its name suggests.
    columns = {role: column for role, column in columns.items() if role in options or column not in declared}
    if "id" not in columns:
        raise UsageError("wfdb: column 'record' is declared twice; say which column holds the ids with id=COLUMN")
    declared.update(columns.values())
    twice = [column for column, times in declared.items() if times > 1]
    if twice:
        raise UsageError(f"wfdb: column {twice[0]!r} is declared twice")
    free = set(table.columns) - set(declared) - template_columns(options.get("path", ""))
    for column in table.columns:
        if column in free:
            known = [*ROLES.values(), *declared]
            raise DataError(
                f"{table.path}: unknown column {column!r}{did_you_mean(column, known)}; declare it "
                "under tasks= (labels joined by ;), binary= (0/1) or ignore="
            )
    return columns


def _label_names(table: Table, options: dict[str, str]) -> dict[str, tuple[str, ...]]:
    tasks = _list(options, "tasks")
    for key in options:
        if key.startswith("labels.") and key[len("labels.") :] not in tasks:
            raise UsageError(f"wfdb: {key}= belongs to no task{did_you_mean(key[7:], tasks)}; tasks={','.join(tasks)}")
    names: dict[str, tuple[str, ...]] = {}
    for task in tasks:
        given = _list(options, f"labels.{task}")
        if len(set(given)) != len(given):
            raise UsageError(f"wfdb: labels.{task}= names a label twice")
        found = sorted({label for row in table.rows for label in _split_cell(row[task])})
        names[task] = tuple(given or found)
        if not names[task]:
            raise DataError(f"{table.path}: column {task!r} of tasks= is empty in every row")
    if binary := _list(options, "binary"):
        if BINARY_TASK in names:
            raise UsageError(f"wfdb: the columns of binary= make up task {BINARY_TASK!r}, which tasks= has as well")
        names[BINARY_TASK] = tuple(binary)
    return names


def _split_cell(cell: str) -> list[str]:
    return [label.strip() for label in cell.split(";") if label.strip()]


def _cell_labels(table: Table, i: int, task: str, names: tuple[str, ...]) -> list[str]:
    labels = _split_cell(table.rows[i][task])
    for label in labels:
        if label not in names:
            raise DataError(f"{table.where(i)}: {task}={label!r}{did_you_mean(label, names)} is not in labels.{task}=")
    return labels


def _binary(table: Table, i: int, columns: tuple[str, ...]) -> np.ndarray:
    values = []
    for column in columns:
        cell = table.rows[i][column]
        if cell.casefold() not in _BITS:
            raise DataError(f"{table.where(i)}: {column}={cell!r}; a binary column holds 0, 1 or nothing")
        values.append(_BITS[cell.casefold()])
    return np.array(values, np.int8)


def _sex(table: Table, i: int, column: str, male: str | None) -> float:
    cell = table.rows[i][column].casefold()
    if cell in _SEX:
        return _SEX[cell]
    if math.isnan(value := number(table, i, column)):
        return value
    if male is None:
        raise UsageError(f"wfdb: {table.where(i)}: {column}={cell!r}; say which value is male with sex_male=1 or =0")
    try:
        return float(value == float(male))
    except ValueError:
        raise UsageError(f"wfdb: sex_male={male!r} is no number, as column {column!r} holds") from None


def _splitter(table: Table, columns: dict[str, str], options: dict[str, str]) -> Any:
    """Function row index -> split, None (no official split) or "" (left out)."""
    if "folds" in options and "fold" not in columns:
        wanted = options.get("fold", ROLES["fold"])
        raise UsageError(f"wfdb: folds= without a fold column: {table.path} has no {wanted!r}; say fold=COLUMN")
    if "split" in columns and "folds" not in options:
        column = columns["split"]

        def by_name(i: int) -> str:
            cell = table.rows[i][column].lower()
            if cell not in SPLITS:
                raise DataError(f"{table.where(i)}: {column}={cell!r}, must be train, val or test")
            return cell

        return by_name
    if "fold" not in columns:
        return lambda i: None
    folds, column = parse_folds(options.get("folds", FOLDS)), columns["fold"]

    def by_fold(i: int) -> str:
        fold = number(table, i, column)
        if not fold.is_integer():  # NaN is not, either
            raise DataError(f"{table.where(i)}: {column}={table.rows[i][column]!r} is no fold number")
        return folds.get(int(fold), "")

    return by_fold


def _ids(table: Table, column: str) -> list[str]:
    ids: dict[str, int] = {}
    for i, row in enumerate(table.rows):
        if not row[column]:
            raise DataError(f"{table.where(i)}: {column} is empty; every row needs the id of its recording")
        if row[column] in ids:
            first = table.lines[ids[row[column]]]
            raise DataError(f"{table.where(i)}: {column}={row[column]!r} is also in line {first}")
        ids[row[column]] = i
    return list(ids)
