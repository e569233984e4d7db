"""From the rows of a labels table to the headers of their recordings.

It looks at names only and opens no recording. Invariant: a row gets at most one recording, and where two
would fit, none is chosen: the user is asked.
"""

import os
import re
from collections import defaultdict
from pathlib import Path
from string import Formatter
from typing import Any

from ecg_jax.datasets.table import Table
from ecg_jax.errors import DataError, UsageError, did_you_mean
from ecg_jax.progress import track

SHOWN = 5  # ids named in the report where many are concerned


def template_columns(template: str) -> set[str]:
    """The fields that a path template uses."""
    try:
        return {field for _, field, _, _ in Formatter().parse(template) if field}
    except ValueError as error:
        raise UsageError(f"wfdb: path={template!r}: {error}") from None


def _fill(table: Table, i: int, record_id: str, template: str) -> str:
    values: dict[str, Any] = dict(table.rows[i]) | {"id": record_id}
    filled = []
    for text, field, spec, conversion in Formatter().parse(template):
        filled.append(text)
        if field is None:
            continue
        if conversion or field not in (*values, "thousand"):  # no attribute or item look-ups either
            near = did_you_mean(field, [*values, "thousand"])
            raise UsageError(f"wfdb: path={template!r}: {{{field}}} is no column{near}; id and thousand are known too")
        value = record_id if field == "thousand" else values[field]
        try:
            if field == "thousand":
                value = int(value) // 1000 * 1000
            elif spec and spec[-1] in "dx":
                value = int(value)
            filled.append(format(value, spec or ""))
        except ValueError:
            raise UsageError(
                f"wfdb: path={template!r}: {{{field}:{spec}}} does not fit {value!r} ({table.where(i)})"
            ) from None
    return "".join(filled)


def locate(
    source_dir: Path, table: Table, ids: list[str], template: str | None
) -> tuple[list[str | None], dict[str, Any]]:
    """Header of each row relative to `source_dir` without ".hea" (None: not found), and counts for `about`.

    With a template that is where a recording must lie. Without one it is SOURCE/<id>.hea, else the one header
    in the tree whose name is the id or, for an id that is a number, the id with leading zeros and an optional
    suffix after "_" or "-". Raises `UsageError` for a template that does not fit the table, `DataError` where
    an id fits two headers or no id fits any.
    """
    headers = _headers(source_dir)
    if template is not None:
        paths = [os.path.normpath(_fill(table, i, record_id, template)) for i, record_id in enumerate(ids)]
        found: list[str | None] = [path if path in headers else None for path in paths]
        rule = template
    else:
        by_stem, by_number = defaultdict(list), defaultdict(list)
        for header in sorted(headers):
            stem = os.path.basename(header)
            by_stem[stem].append(header)
            if match := re.fullmatch(r"0*(\d+)(?:[_-].*)?", stem):
                by_number[match[1]].append(header)
        found = [_search(headers, by_stem, by_number, record_id, table, i) for i, record_id in enumerate(ids)]
        rule = "by id"
    lost = [record_id for record_id, path in zip(ids, found, strict=True) if path is None]
    if len(lost) == len(ids):
        where = f"path={template!r} gives {paths[0]}.hea" if template else f"nothing is called {ids[0]}.hea or the like"
        raise DataError(f"{source_dir}: no row of {table.path.name} has a recording ({where}); say path=TEMPLATE")
    spare = sorted(headers - {path for path in found if path})
    return found, {
        "path_rule": rule,
        "rows_without_recording": len(lost),
        "rows_without_recording_first": lost[:SHOWN],
        "recordings_without_row": len(spare),
        "recordings_without_row_first": spare[:SHOWN],
    }


def _headers(source_dir: Path) -> set[str]:
    headers = set()
    for folder, _, files in track(os.walk(source_dir), f"looking through {source_dir}", unit="folders"):
        inside = os.path.relpath(folder, source_dir)
        headers.update(os.path.normpath(os.path.join(inside, file[:-4])) for file in files if file.endswith(".hea"))
    return headers


def _search(headers: set[str], by_stem: dict, by_number: dict, record_id: str, table: Table, i: int) -> str | None:
    direct = os.path.normpath(record_id)
    if direct in headers:
        return direct
    for matches in (by_stem.get(record_id), by_number.get(record_id.lstrip("0") or record_id)):
        if matches:
            if len(matches) > 1:
                raise DataError(
                    f"{table.where(i)}: {record_id} may be {matches[0]}.hea or {matches[1]}.hea; say path=TEMPLATE"
                )
            return matches[0]
    return None
