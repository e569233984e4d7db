"""Labels tables: a CSV file read strictly, folds turned into splits, cells into numbers and label vectors.

Shared by the data sets that come with a table. It opens no signal. Invariant: a cell that does not say what
its column must say is a `DataError` that names file, line, column and value, and nothing is guessed; an empty
cell is unknown.
"""

import csv
import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ecg_jax.errors import DataError, UsageError, did_you_mean
from ecg_jax.records.record import UNKNOWN

MAX_AGE = 130.0  # years; beyond it a number is a code or a slip


@dataclass(frozen=True)
class Table:
    """A CSV file: column names, rows of texts (blanks stripped), and the line each row ends on."""

    path: Path
    columns: tuple[str, ...]
    rows: tuple[dict[str, str], ...]
    lines: tuple[int, ...]

    def digest(self) -> str:
        """sha256 of the file, for `about`: a conversion that was made with other labels is never taken for this one."""
        return hashlib.sha256(self.path.read_bytes()).hexdigest()

    def where(self, i: int) -> str:
        """ "file:line" of row i, for messages."""
        return f"{self.path}:{self.lines[i]}"


def read_table(path: Path) -> Table:
    """Read a comma-separated UTF-8 file with a header line. `DataError` for anything else."""
    try:
        # utf-8-sig: Excel puts a byte-order mark before the first column's name.
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            head = next(reader, None)
            if not head:
                raise DataError(f"{path} is empty; a header line of column names is needed")
            columns = tuple(name.strip() for name in head)
            if len(columns) == 1 and any(mark in columns[0] for mark in ";\t"):
                raise DataError(f"{path}: columns are to be separated by commas, this header reads {columns[0][:60]!r}")
            twice = sorted({name for name in columns if columns.count(name) > 1})
            if twice:
                raise DataError(f"{path}: column {twice[0]!r} is there twice")
            rows, lines = [], []
            for cells in reader:
                if not any(cell.strip() for cell in cells):
                    continue
                if len(cells) != len(columns):
                    raise DataError(
                        f"{path}:{reader.line_num}: {len(cells)} cells under {len(columns)} column names; "
                        "a cell that holds a comma must be quoted"
                    )
                rows.append({name: cell.strip() for name, cell in zip(columns, cells, strict=True)})
                lines.append(reader.line_num)
    except FileNotFoundError:
        raise DataError(f"there is no {path}") from None
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 (byte {error.start}); save it as UTF-8") from None
    except csv.Error as error:
        raise DataError(f"{path}: not a CSV file: {error}") from None
    return Table(path, columns, tuple(rows), tuple(lines))


def need_columns(table: Table, wanted: Iterable[str]) -> None:
    """`DataError` naming the columns of `wanted` that a published table lacks."""
    lost = [name for name in wanted if name not in table.columns]
    if lost:
        near = did_you_mean(lost[0], table.columns)
        raise DataError(f"{table.path}: no column {lost[0]!r}{near}; columns are {', '.join(table.columns)}")


def parse_folds(text: str) -> dict[int, str]:
    """ "1-8/9/10" -> {1: "train", ..., 9: "val", 10: "test"}: three parts, each of numbers and ranges with
    commas.
    """
    parts = text.split("/")
    if len(parts) != 3:
        raise UsageError(f"folds={text!r}: three parts for train, val and test are needed, such as 1-8/9/10")
    folds: dict[int, str] = {}
    for part, split in zip(parts, ("train", "val", "test"), strict=True):
        for piece in part.split(","):
            first, dash, last = piece.strip().partition("-")
            if not first.isdecimal() or (dash and not last.isdecimal()):
                raise UsageError(f"folds={text!r}: {piece.strip()!r} is neither a number nor a range such as 1-8")
            low, high = int(first), int(last) if dash else int(first)
            if not low <= high <= low + 10_000:
                raise UsageError(f"folds={text!r}: the range {piece.strip()!r} runs backwards or is too long")
            for fold in range(low, high + 1):
                if fold in folds:
                    raise UsageError(f"folds={text!r}: fold {fold} is in two splits or twice in one")
                folds[fold] = split
    return folds


def number(table: Table, i: int, column: str) -> float:
    """The cell as a float, NaN where empty, "nan" or "unknown"."""
    cell = table.rows[i][column]
    if cell.casefold() in ("", "nan", "na", "none", "unknown", "?"):
        return math.nan
    try:
        return float(cell)
    except ValueError:
        raise DataError(f"{table.where(i)}: {column}={cell!r} is no number") from None


def identifier(table: Table, i: int, column: str) -> str:
    """The cell as an id: what pandas made a float ("123.0") is the integer again; empty stays empty."""
    cell = table.rows[i][column]
    whole, dot, rest = cell.partition(".")
    return whole if dot and whole.isdecimal() and set(rest) == {"0"} else cell


def age(value: float) -> float:
    """Years, NaN where negative or beyond 130 (placeholders)."""
    return value if 0 <= value <= MAX_AGE else math.nan


def multi_hot(present: Iterable[str], names: Sequence[str]) -> np.ndarray:
    """int8 [K]: 1 for the labels present, 0 for the others; all -1 (unknown) where none is present."""
    present = set(present)
    if not present:
        return np.full(len(names), UNKNOWN, np.int8)
    return np.array([name in present for name in names], np.int8)
