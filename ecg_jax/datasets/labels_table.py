"""A labels table of one's own: every column declared, each row the labels, patient, age, sex and split of a recording.

A column that nobody declared stops the opening, because a label left out by a slip looks like any other column. It
opens no recording. Invariant: an empty label cell is unknown (-1), never "absent", and a row says exactly one thing.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ecg_jax.datasets.table import CONTROL, Row, Table, age, multi_hot, parse_folds, read_table
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
OPTIONS = (*ROLES, "labels", "tasks", "binary", "sex_male", "folds", "ignore", "labels.")
BINARY_TASK = "labels"
FOLDS = "1-8/9/10"
SPLITS = ("train", "val", "test")
_SEX = {"m": 1.0, "male": 1.0, "f": 0.0, "female": 0.0, "": math.nan, "u": math.nan, "unknown": math.nan}
_BITS = {"0": 0, "1": 1, "0.0": 0, "1.0": 1, "false": 0, "true": 1, "": UNKNOWN, "nan": UNKNOWN}


@dataclass(frozen=True)
class LabelsTable:
    """A labels table read by its options.

    kind      data set whose options these are, for messages
    ids       of the rows, all different
    columns   role -> column, for the roles that the table fills
    tasks     task -> its labels
    binary    whether task "labels" is made of columns of 0 and 1
    sex_male  which code is male, where the sexes are codes
    split_of  row -> split, None (the table says none) or "" (outside the folds)
    """

    kind: str
    table: Table
    ids: tuple[str, ...]
    columns: dict[str, str]
    tasks: dict[str, tuple[str, ...]]
    binary: bool
    sex_male: str | None
    split_of: Callable[[Row], str | None]

    def about(self, i: int) -> dict[str, Any]:
        """patient (or None), labels, age and sex of row i. Raises `DataError` or `UsageError` for a cell."""
        row = self.table.row(i)
        patient = row.identifier(self.columns["patient"]) if "patient" in self.columns else ""
        return {
            "patient": patient or None,
            "labels": {
                task: _bits(row, names)
                if self.binary and task == BINARY_TASK
                else multi_hot(_cell_labels(row, task, names), names)
                for task, names in self.tasks.items()
            },
            "age": age(row.number(self.columns["age"])) if "age" in self.columns else math.nan,
            "sex": _sex(row, self.columns["sex"], self.sex_male) if "sex" in self.columns else math.nan,
        }


def open_labels(kind: str, path: Path, options: dict[str, str], used: Iterable[str]) -> LabelsTable:
    """Read the table at `path`. used: columns that other options name (templates, row=).

    Raises `UsageError` for an option that cannot be, `DataError` for the table.
    """
    table = read_table(path)
    if not table.rows:
        raise DataError(f"{table.path} has a header line and no rows")
    columns = _columns(kind, table, options, set(used))
    tasks = _label_names(kind, table, options)
    split_of = _splitter(kind, table, columns, options)
    ids = tuple(_ids(table, columns["id"]))
    if "sex" in columns:
        _check_sex(kind, table, columns["sex"], options.get("sex_male"))
    return LabelsTable(
        kind, table, ids, columns, tasks, bool(_list(options, "binary")), options.get("sex_male"), split_of
    )


def _list(options: dict[str, str], key: str) -> list[str]:
    return [part.strip() for part in options.get(key, "").split(",") if part.strip()]


def _columns(kind: str, table: Table, options: dict[str, str], used: set[str]) -> dict[str, str]:
    """Role -> column, for the roles that the table fills; every column of the table must be declared."""

    def there(column: str, option: str) -> None:
        if column not in table.columns:
            near = did_you_mean(column, table.columns)
            raise UsageError(
                f"{kind}: {option} names column {column!r}, which {table.path} does not have{near}; "
                f"its columns are {', '.join(table.columns)}"
            )

    columns = {role: options.get(role, usual) for role, usual in ROLES.items()}
    if "id" not in options and columns["id"] not in table.columns:
        raise UsageError(
            f"{kind}: {table.path} has no column 'record'; say which one holds the ids with id=COLUMN "
            f"(columns are {', '.join(table.columns)})"
        )
    if "split" in options and "fold" in options:
        raise UsageError(f"{kind}: give split=COLUMN or fold=COLUMN, not both")
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
    if columns.get("patient") == columns["id"] and "patient" not in options:
        del columns["patient"]  # one recording a patient: the id is the group as well
    # A column that is declared otherwise does not also get the role its name suggests.
    columns = {role: column for role, column in columns.items() if role in options or column not in declared}
    if "id" not in columns:
        raise UsageError(f"{kind}: column 'record' is declared twice; say which column holds the ids with id=COLUMN")
    declared.update(columns.values())
    twice = [column for column, times in declared.items() if times > 1]
    if twice:
        raise UsageError(f"{kind}: column {twice[0]!r} is declared twice")
    free = set(table.columns) - set(declared) - used
    for column in table.columns:
        if column in free and not column:
            raise DataError(f"{table.path}: a column has no name; name it, or leave it out (pandas: index=False)")
        if column in free:
            known = [*ROLES.values(), *declared]
            raise DataError(
                f"{table.path}: unknown column {column!r}{did_you_mean(column, known)}; declare it "
                "under tasks= (labels joined by ;), binary= (0/1) or ignore="
            )
    return columns


def _label_names(kind: str, table: Table, options: dict[str, str]) -> dict[str, tuple[str, ...]]:
    tasks = _list(options, "tasks")
    for key in options:
        if key.startswith("labels.") and key[len("labels.") :] not in tasks:
            raise UsageError(
                f"{kind}: {key}= belongs to no task{did_you_mean(key[7:], tasks)}; tasks={','.join(tasks)}"
            )
    names: dict[str, tuple[str, ...]] = {}
    for task in tasks:
        given = _list(options, f"labels.{task}")
        if len(set(given)) != len(given):
            raise UsageError(f"{kind}: labels.{task}= names a label twice")
        found = sorted({label for row in table.rows for label in _split_cell(row[task])})
        names[task] = tuple(given or found)
        if not names[task]:
            raise DataError(f"{table.path}: column {task!r} of tasks= is empty in every row")
    if binary := _list(options, "binary"):
        if BINARY_TASK in names:
            raise UsageError(f"{kind}: the columns of binary= make up task {BINARY_TASK!r}, which tasks= has as well")
        names[BINARY_TASK] = tuple(binary)
    return names


def _split_cell(cell: str) -> list[str]:
    return [label.strip() for label in cell.split(";") if label.strip()]


def _cell_labels(row: Row, task: str, names: tuple[str, ...]) -> list[str]:
    labels = _split_cell(row[task])
    for label in labels:
        if label not in names:
            raise DataError(f"{row.where}: {task}={label!r}{did_you_mean(label, names)} is not in labels.{task}=")
    return labels


def _bits(row: Row, columns: tuple[str, ...]) -> np.ndarray:
    values = []
    for column in columns:
        cell = row[column]
        if cell.casefold() not in _BITS:
            raise DataError(f"{row.where}: {column}={cell!r}; a binary column holds 0, 1 or nothing")
        values.append(_BITS[cell.casefold()])
    return np.array(values, np.int8)


def _check_sex(kind: str, table: Table, column: str, male: str | None) -> None:
    """Besides the texts that say it themselves, a column of sexes holds two values, and it is known which is male."""
    found: dict[str, int] = {}
    for i in range(len(table.rows)):
        cell = _coded_sex(table.row(i), column)
        if cell is not None:
            found.setdefault(cell, i)
    if not found:
        return
    cell, i = next(iter(found.items()))
    if male is None:
        raise UsageError(f"{kind}: {table.where(i)}: {column}={cell!r}; say which value is male with sex_male=1 or =0")
    if len(found) > 2:
        cell, i = list(found.items())[2]
        raise DataError(
            f"{table.where(i)}: {column}={cell!r} is a third value beside {' and '.join(list(found)[:2])}; leave the "
            "cell empty where the sex is unknown"
        )
    if male.casefold() not in found and _plain_number(male) not in found and len(found) > 1:
        raise UsageError(f"{kind}: sex_male={male!r} is none of the values of {column}: {', '.join(found)}")


def _coded_sex(row: Row, column: str) -> str | None:
    """The cell where it is a code (a number, true or false), None where it says male, female or nothing."""
    cell = row[column].casefold()
    if cell in _SEX or cell in ("true", "false"):
        return None if cell in _SEX else cell
    value = row.number(column)
    return None if math.isnan(value) else f"{value:g}"


def _plain_number(text: str) -> str:
    try:
        return f"{float(text):g}"
    except ValueError:
        return text.casefold()


def _sex(row: Row, column: str, male: str | None) -> float:
    coded = _coded_sex(row, column)
    if coded is None:
        return _SEX.get(row[column].casefold(), math.nan)
    return float(coded == _plain_number(male or ""))


def _splitter(kind: str, table: Table, columns: dict[str, str], options: dict[str, str]) -> Callable[[Row], str | None]:
    if "folds" in options and "fold" not in columns:
        wanted = options.get("fold", ROLES["fold"])
        raise UsageError(f"{kind}: folds= without a fold column: {table.path} has no {wanted!r}; say fold=COLUMN")
    if "split" in columns and "folds" not in options:
        column = columns["split"]

        def by_name(row: Row) -> str:
            cell = row[column].lower()
            if cell not in SPLITS:
                raise DataError(f"{row.where}: {column}={cell!r}, must be train, val or test")
            return cell

        return by_name
    if "fold" not in columns:
        return lambda row: None
    folds, column = parse_folds(options.get("folds", FOLDS)), columns["fold"]

    def by_fold(row: Row) -> str:
        fold = row.number(column)
        if not fold.is_integer():  # NaN is not, either
            raise DataError(f"{row.where}: {column}={row[column]!r} is no fold number")
        return folds.get(int(fold), "")

    return by_fold


def _ids(table: Table, column: str) -> list[str]:
    ids: dict[str, int] = {}
    for i in range(len(table.rows)):
        row = table.row(i)
        record_id = row.identifier(column)
        if not record_id:
            raise DataError(f"{row.where}: {column} is empty; every row needs the id of its recording")
        if CONTROL.search(record_id):
            raise DataError(f"{row.where}: {column}={record_id!r} holds a line break or another control character")
        if record_id in ids:
            raise DataError(f"{row.where}: {column}={record_id!r} is also in line {table.lines[ids[record_id]]}")
        ids[record_id] = i
    return list(ids)
