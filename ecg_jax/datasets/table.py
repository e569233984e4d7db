"""Labels tables: a CSV file read strictly, folds turned into splits, cells into numbers and label vectors.

Shared by the data sets that come with a table: `read_table` for what fits memory, `stream_table` for millions of rows.
It opens no signal. Invariant: a cell that does not say what its column must say is a `DataError` that names file, line,
column and value, and nothing is guessed; an empty cell is unknown.
"""

import csv
import gzip
import hashlib
import io
import math
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ecg_jax.errors import DataError, UsageError, did_you_mean
from ecg_jax.records.record import UNKNOWN

CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")  # what breaks a line or a terminal
MAX_AGE = 130.0  # years; beyond it a number is a code or a slip


@dataclass(slots=True)
class Row:
    """One row of a table: column -> text (blanks stripped), and where it stands."""

    path: Path
    line: int
    cells: dict[str, str]

    def __getitem__(self, column: str) -> str:
        return self.cells[column]

    @property
    def where(self) -> str:
        """ "file:line", for messages."""
        return f"{self.path}:{self.line}"

    def number(self, column: str) -> float:
        """The cell as a float, NaN where empty, "nan" or "unknown". `DataError` for any other text."""
        cell = self.cells[column]
        if cell.casefold() in ("", "nan", "na", "none", "unknown", "?"):
            return math.nan
        try:
            if "_" not in cell:  # Python's own 1_000
                return float(cell)
        except ValueError:
            pass
        raise DataError(f"{self.where}: {column}={cell!r} is no number")

    def identifier(self, column: str) -> str:
        """The cell as an id: what pandas made a float ("123.0") is the integer again; empty stays empty."""
        cell = self.cells[column]
        whole, dot, rest = cell.partition(".")
        return whole if dot and whole.isdecimal() and set(rest) == {"0"} else cell


@dataclass(frozen=True)
class Table:
    """A CSV file in memory: column names, rows of texts (blanks stripped), the line each row ends on, its sha256."""

    path: Path
    columns: tuple[str, ...]
    rows: tuple[dict[str, str], ...]
    lines: tuple[int, ...]
    sha256: str

    def digest(self) -> str:
        """sha256 of the file, for `about`: a conversion that was made with other labels is never taken for this one."""
        return self.sha256

    def row(self, i: int) -> Row:
        """Row i with its place."""
        return Row(self.path, self.lines[i], self.rows[i])

    def where(self, i: int) -> str:
        """ "file:line" of row i, for messages."""
        return self.row(i).where


def read_table(path: Path) -> Table:
    """Read a comma-separated UTF-8 file with a header line into memory. `DataError` for anything else."""
    sha256 = hashlib.sha256()
    rows, lines = [], []
    with _reporting(path), _open(path, sha256) as file:
        reader, columns = _header(path, file)
        for cells in _cells(path, reader, columns):
            rows.append({name: cell.strip() for name, cell in zip(columns, cells, strict=True)})
            lines.append(reader.line_num)
    return Table(path, columns, tuple(rows), tuple(lines), sha256.hexdigest())


def stream_table(path: Path, wanted: Iterable[str], sha256: Any = None) -> Iterator[Row]:
    """The rows of a table of any length, one after another, with the columns of `wanted` alone.

    Reads as strictly as `read_table`, in constant memory. `sha256`, a `hashlib.sha256()`, is fed every byte that is
    read: once the last row has come, it is the digest of the file. Raises `DataError` on the way.
    """
    wanted = tuple(wanted)
    with _reporting(path), _open(path, sha256) as file:
        reader, columns = _header(path, file)
        _need(path, columns, wanted)
        places = [(name, columns.index(name)) for name in wanted]
        for cells in _cells(path, reader, columns):
            yield Row(path, reader.line_num, {name: cells[place].strip() for name, place in places})


def table_columns(path: Path) -> tuple[str, ...]:
    """The column names of a table, without its rows."""
    with _reporting(path), _open(path, None) as file:
        return _header(path, file)[1]


class _Fed(io.RawIOBase):
    """A file whose bytes feed a hash as they are read, so that a table of gigabytes is read once."""

    def __init__(self, file: io.FileIO, sha256: Any) -> None:
        self._file, self._sha256 = file, sha256

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        size = self._file.readinto(buffer) or 0
        self._sha256.update(memoryview(buffer)[:size])
        return size

    def close(self) -> None:
        self._file.close()
        super().close()


def _open(path: Path, sha256: Any) -> io.TextIOWrapper:
    raw: Any = gzip.open(path) if path.suffix == ".gz" else open(path, "rb", buffering=0)
    if sha256 is not None:
        raw = _Fed(raw, sha256)
    # utf-8-sig: Excel puts a byte-order mark before the first column's name.
    return io.TextIOWrapper(io.BufferedReader(raw, 1 << 17), encoding="utf-8-sig", newline="")


@contextmanager
def _reporting(path: Path) -> Iterator[None]:
    """Whatever reading a table runs into, as a `DataError`."""
    try:
        yield
    except FileNotFoundError:
        raise DataError(f"there is no {path}") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be unpacked: {error}; download it again") from None
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 (byte {error.object[error.start]:#04x}); save it as UTF-8") from None
    except csv.Error as error:
        raise DataError(f"{path}: not a CSV file: {error}") from None
    except ValueError as error:  # a zero byte in the name
        raise DataError(f"{path}: {error}") from None


def _header(path: Path, file: Any) -> tuple[Any, tuple[str, ...]]:
    reader = csv.reader(file, strict=True)
    head = next(reader, None)
    if not head:
        raise DataError(f"{path} is empty; a header line of column names is needed")
    columns = tuple(name.strip() for name in head)
    if len(columns) == 1 and any(mark in columns[0] for mark in ";\t"):
        raise DataError(f"{path}: columns are to be separated by commas, this header reads {columns[0][:60]!r}")
    for name in columns:
        if CONTROL.search(name):
            raise DataError(f"{path}: column name {name!r} holds a line break or another control character")
    twice = sorted({name for name in columns if columns.count(name) > 1})
    if twice:
        raise DataError(f"{path}: column {twice[0]!r} is there twice")
    return reader, columns


def _cells(path: Path, reader: Any, columns: tuple[str, ...]) -> Iterator[list[str]]:
    """The cells of each line that is not blank, as many as there are columns."""
    while True:
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise DataError(f"{path}:{reader.line_num}: not a CSV file: {error}") from None
        if cells is None:
            return
        if not any(cell.strip() for cell in cells):
            continue
        if len(cells) != len(columns):
            raise DataError(
                f"{path}:{reader.line_num}: {len(cells)} cells under {len(columns)} column names; "
                "a cell that holds a comma must be quoted"
            )
        yield cells


def need_columns(table: Table, wanted: Iterable[str]) -> None:
    """`DataError` naming the columns of `wanted` that a published table lacks."""
    _need(table.path, table.columns, wanted)


def _need(path: Path, columns: tuple[str, ...], wanted: Iterable[str]) -> None:
    lost = [name for name in wanted if name not in columns]
    if lost:
        near = did_you_mean(lost[0], columns)
        raise DataError(f"{path}: no column {lost[0]!r}{near}; columns are {', '.join(columns)}")


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
    """`Row.number` of row i."""
    return table.row(i).number(column)


def identifier(table: Table, i: int, column: str) -> str:
    """`Row.identifier` of row i."""
    return table.row(i).identifier(column)


def age(value: float) -> float:
    """Years, NaN where negative or beyond 130 (placeholders)."""
    return value if 0 <= value <= MAX_AGE else math.nan


def multi_hot(present: Iterable[str], names: Sequence[str]) -> np.ndarray:
    """int8 [K]: 1 for the labels present, 0 for the others; all -1 (unknown) where none is present."""
    present = set(present)
    if not present:
        return np.full(len(names), UNKNOWN, np.int8)
    return np.array([name in present for name in names], np.int8)
