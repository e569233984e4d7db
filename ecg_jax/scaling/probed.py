"""Tables of `ecg-jax table` (encoders x tasks) as a section of the report.

Reads the CSV that was written there and lays it out again; which encoder is best, and which is not told from it, was
settled there on the same test records and resamples, and is not settled again. Invariant: a number stands with its
interval, or is a mean over several tasks, which has none.
"""

import csv
import io
import math
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

from ecg_jax.errors import DataError
from ecg_jax.scaling import page

COLUMNS = ("metric", "encoder", "column", "value", "ci_low", "ci_high", "best", "tied")


def read(paths: Sequence[Path]) -> list[dict[str, str]]:
    """The rows of table CSVs. Raises DataError naming the file for anything else."""
    rows = []
    for path in map(Path, paths):
        try:
            reader = csv.DictReader(io.StringIO(path.read_text(encoding="utf-8")))
            found = list(reader)
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: cannot be read ({error}); give a CSV of `ecg-jax table`") from None
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise DataError(f"{path}: no table of encoders and tasks; give a CSV of `ecg-jax table`")
        for line, row in enumerate(found, 2):
            try:
                numbers = [float(row[name]) for name in COLUMNS[3:6] if row[name] or name == "value"]
            except (TypeError, ValueError):
                raise DataError(f"{path}: line {line}: not a number") from None
            if not all(map(math.isfinite, numbers)):
                raise DataError(f"{path}: line {line}: not a finite number")
        rows += found
    return rows


def render(rows: Sequence[dict[str, str]]) -> Iterator[str]:
    """The section's HTML: one table a metric."""
    yield (
        "<p>Bold: the best of its column. = : not told from it, the interval of the paired difference on the same test "
        "patients holds 0. Brackets: 95 % intervals.</p>"
    )
    for metric in dict.fromkeys(row["metric"] for row in rows):
        here = {(row["encoder"], row["column"]): row for row in rows if row["metric"] == metric}
        columns, encoders = (list(dict.fromkeys(key[i] for key in here)) for i in (1, 0))
        lines = [[escape(name), *(_cell(here.get((name, column))) for column in columns)] for name in encoders]
        yield page.table([escape(metric), *map(escape, columns)], lines)


def _cell(row: dict[str, str] | None) -> str:
    if row is None:
        return "-"
    value = f"{float(row['value']):.3f}"
    value = f"<b>{value}</b>" if row["best"] == "True" else value + " =" * (row["tied"] == "True")
    ends = f" [{float(row['ci_low']):.3f}, {float(row['ci_high']):.3f}]" if row["ci_low"] and row["ci_high"] else ""
    return value + ends
