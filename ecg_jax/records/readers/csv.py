"""Text tables of samples: a line for each sample, a column for each lead.

Comma, semicolon or tab, decimal point or comma, a header line or none, comment lines (# or %), a time column.
Invariant: a cell of a lead that is no number refuses the recording, naming line and column; an empty cell is NaN; no
cell is moved to another column, and no line of samples is taken for a header or the other way round.
"""

import csv
import hashlib
import math
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ecg_jax.records.leads import canonical
from ecg_jax.records.readers.arrays import (
    Declared,
    Facts,
    lead_names,
    refusing,
    scaled,
    settled_rate,
    unit_factors,
)
from ecg_jax.records.readers.reading import Reading, settle
from ecg_jax.records.record import Refused

COMMENT = ("#", "%")
_TIME = {"time", "t", "zeit", "seconds", "sec", "temps", "tiempo", "tempo", "timestamp", "elapsed"}
_SECONDS = {"s": 1.0, "sec": 1.0, "seconds": 1.0, "ms": 1e-3, "msec": 1e-3, "us": 1e-6, "µs": 1e-6, "μs": 1e-6}
_LINE_END = re.compile("\r\n|\n|\r")
_WITH_UNIT = re.compile(r"^(.*?)\s*(?:[(\[]\s*([^()\[\]]+?)\s*[)\]]|_(ms|us|sec|mv|uv))$", re.IGNORECASE)
_NUMBER = {
    "point": re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?|[+-]?(nan|inf(inity)?)|", re.IGNORECASE | re.ASCII),
    "comma": re.compile(r"[+-]?(\d+,?\d*|,\d+)(e[+-]?\d+)?|[+-]?(nan|inf(inity)?)|", re.IGNORECASE | re.ASCII),
}


@dataclass(frozen=True)
class Dialect:
    """header: whether the first line names the columns; decimal: "point" or "comma"."""

    header: bool = True
    decimal: str = "point"


def read_csv(path: Path, declared: Declared, dialect: Dialect = Dialect()) -> Reading:
    """One recording of a text table.

    Columns that are no lead are left out, but for a time column with a unit ("time (s)", "t_ms"), which gives the rate
    or must agree with it. A column may name its unit: "V1 (uV)". `source` is the sha256 of the file. Refuses with
    missing-file, no-samples, no-header, unexpected-header, bad-row, bad-number, decimal-comma, uneven-time, bad-shape,
    lead-mismatch, no-rate, rate-mismatch, no-unit, unit-mismatch, unknown-unit, missing-lead, duplicate-lead,
    unreadable-signal.
    """
    with refusing(path):
        content = Path(path).read_bytes()
        names, units, lines, rows = _table(path, content, dialect, declared.leads is not None)
    time = next((i for i, name in enumerate(names) if name.casefold() in _TIME), None)
    data = [i for i in range(len(names)) if i != time]
    if declared.leads or not dialect.header:
        given = lead_names(str(path), declared, Facts())
        if len(given) != len(data):
            hint = f"leads= names {len(given)}" if declared.leads else "say leads="
            raise Refused("bad-shape", f"{path} has {len(data)} columns of samples; {hint}")
        said = [names[i] for i in data]
        if any(canonical(name) for name in said):
            lead_names(str(path), declared, Facts(leads=tuple(said)))
        for i, name in zip(data, given, strict=True):
            names[i] = name
    known = [i for i in data if canonical(names[i])]
    seconds = _SECONDS.get((units[time] or "").casefold()) if time is not None else None
    found = None
    if time is not None and seconds is not None:
        found = _rate(path, _column(path, names, lines, rows, time, dialect) * seconds, rows, time, seconds, dialect)
    rate = settled_rate(str(path), declared.rate, found)
    factors, channels = [], []
    for i in known:
        said = (units[i],) if units[i] else ()
        factors.append(unit_factors(str(path), declared.unit, said, [names[i]])[0])
        channels.append(_column(path, names, lines, rows, i, dialect))
    leads = [names[i] for i in known]
    physical = np.stack(channels, 1) if channels else np.empty((len(rows), 0))
    physical = scaled(physical, np.array(factors))
    return settle(physical, leads, rate, hashlib.sha256(content).digest(), "z" if declared.unit == "z" else "mV")


def _table(
    path: Path, content: bytes, dialect: Dialect, named: bool
) -> tuple[list[str], list[str | None], list[int], list[list[str]]]:
    """Column names without their units, the units, and the data rows with their line numbers. named: the user has
    named the columns."""
    text = _decode(content)
    lines, numbers = [], []
    for number, line in enumerate(_LINE_END.split(text), 1):
        if line.strip() and not line.lstrip().startswith(COMMENT):
            lines.append(line)
            numbers.append(number)
    if not lines:
        raise Refused("no-samples", f"{path} has no line of samples")
    mark = next((mark for mark in "\t;," if mark in lines[0]), ",")
    if mark == "," and dialect.decimal == "comma":
        raise Refused("decimal-comma", f"{path} separates its columns by commas, so decimal=comma cannot be")
    try:
        rows = list(csv.reader(lines, delimiter=mark, strict=True))
    except csv.Error as error:
        raise Refused("unreadable-signal", f"{path}: {error}") from None
    if len(rows) != len(lines):
        raise Refused("unreadable-signal", f"{path} has a quoted cell that runs over several lines")
    head = [cell.strip() for cell in rows[0]]
    numbers_only = all(_NUMBER["point"].fullmatch(cell) or _NUMBER["comma"].fullmatch(cell) for cell in head)
    # What pandas writes over columns that have no names.
    counted = len(head) > 1 and any(head == [str(i + first) for i in range(len(head))] for first in (0, 1))
    if dialect.header and numbers_only and not (counted and named):
        raise Refused(
            "no-header", f"{path}:{numbers[0]} names no columns; say leads=, and header=off if it holds samples"
        )
    if not dialect.header:
        if counted or not numbers_only:
            raise Refused("unexpected-header", f"{path}:{numbers[0]} is a header; leave header=off out")
        names: list[str] = [str(i + 1) for i in range(len(head))]
        units: list[str | None] = [None] * len(head)
    else:
        parts = [_WITH_UNIT.match(cell) for cell in head]
        names = [part[1] if part else cell for part, cell in zip(parts, head, strict=True)]
        units = [(part[2] or part[3]) if part else None for part in parts]
        rows, numbers = rows[1:], numbers[1:]
    for row, number in zip(rows, numbers, strict=True):
        if len(row) != len(head):
            raise Refused("bad-row", f"{path}:{number} has {len(row)} cells, the first line has {len(head)}")
    if not rows:
        raise Refused("no-samples", f"{path} has no line of samples")
    return names, units, numbers, rows


def _decode(content: bytes) -> str:
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return content.decode("utf-16")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return content.decode("latin-1")  # only column names can have such letters; a sample that has is refused


def _column(
    path: Path, names: list[str], lines: list[int], rows: list[list[str]], i: int, dialect: Dialect
) -> np.ndarray:
    """float64 [T] of column i, NaN where empty."""
    number = _NUMBER[dialect.decimal]
    values = np.empty(len(rows))
    for k, row in enumerate(rows):
        cell = row[i].strip()
        if not number.fullmatch(cell):
            reason, hint = "bad-number", ""
            if _NUMBER["comma" if dialect.decimal == "point" else "point"].fullmatch(cell):
                reason, hint = "decimal-comma", f"; decimal={dialect.decimal} does not fit"
            shown = cell if len(cell) <= 40 else f"{cell[:40]}..."
            raise Refused(reason, f"{path}:{lines[k]}: column {names[i] or i + 1}: {shown!r} is no number{hint}")
        values[k] = float(cell.replace(",", ".")) if cell else math.nan
    return values


def _rate(
    path: Path, times: np.ndarray, rows: list[list[str]], column: int, seconds: float, dialect: Dialect
) -> float | None:
    """Samples per second of evenly spaced `times` [T] in seconds; None for a single sample."""
    if len(times) < 2:
        return None
    if not np.isfinite(times).all():
        raise Refused("uneven-time", f"{path}: the time column has empty cells")
    span = times[-1] - times[0]
    if not 0 < span < math.inf:
        raise Refused("uneven-time", f"{path}: the time column does not run forwards")
    rate = (len(times) - 1) / span
    off = np.abs(times - times[0] - np.arange(len(times)) / rate)
    worst = int(off.argmax())
    if off[worst] * rate > 0.5:
        raise Refused("uneven-time", f"{path}: time leaps near sample {worst}; samples are missing or unevenly spaced")
    # The last digit printed leaves room for a round number of samples per second.
    mark = "," if dialect.decimal == "comma" else "."
    digits = max(len(row[column].strip().partition(mark)[2]) for row in (rows[0], rows[-1]))
    room = rate * 10.0**-digits * seconds / span + 1e-9 * rate
    return float(round(rate)) if abs(rate - round(rate)) <= min(room, 0.25) else float(rate)
