"""From the rows of a labels table to the files of their recordings.

It looks at names only and opens no recording. Invariant: a row gets at most one file, and where two would fit, none is
chosen: the user is asked.
"""

import os
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import Any

from ecg_jax.datasets.table import Table
from ecg_jax.errors import DataError, UsageError, did_you_mean
from ecg_jax.progress import track

SHOWN = 5  # ids named in the report where many are concerned


@dataclass(frozen=True)
class Tree:
    """What lies below a source folder, as paths relative to it.

    endings     that make a file a recording, in small letters; matched in any case
    files       every file
    recordings  those with one of the endings, sorted
    """

    root: Path
    endings: tuple[str, ...]
    files: frozenset[str]
    recordings: tuple[str, ...]

    def stem(self, path: str) -> str:
        """`path` without its ending."""
        return next((path[: -len(end)] for end in self.endings if path.lower().endswith(end)), path)


def list_tree(source_dir: Path, endings: tuple[str, ...], leave_out: Path | None = None) -> Tree:
    """Look through `source_dir`. leave_out: a file that is no recording whatever its ending (the labels table)."""
    files = set()
    for folder, _, names in track(os.walk(source_dir), f"looking through {source_dir}", unit="folders"):
        inside = os.path.relpath(folder, source_dir)
        files.update(os.path.normpath(os.path.join(inside, name)) for name in names)
    if leave_out is not None:
        files.discard(os.path.relpath(leave_out, source_dir))
    recordings = sorted(file for file in files if file.lower().endswith(endings))
    return Tree(source_dir, endings, frozenset(files), tuple(recordings))


def template_columns(kind: str, option: str, template: str) -> set[str]:
    """The fields that a template uses. `UsageError` naming the option where it is none."""
    try:
        return {field for _, field, _, _ in Formatter().parse(template) if field}
    except ValueError as error:
        raise UsageError(f"{kind}: {option}={template!r}: {error}") from None


def fill(kind: str, option: str, template: str, table: Table, i: int, record_id: str) -> str:
    """`template` with the cells of row i: {column}, {column:05d}, {id}, {thousand:05d}. `UsageError` where it does not
    fit.
    """
    values: dict[str, Any] = dict(table.rows[i]) | {"id": record_id}
    filled = []
    for text, field, spec, conversion in Formatter().parse(template):
        filled.append(text)
        if field is None:
            continue
        if conversion or field not in (*values, "thousand"):  # no attribute or item look-ups either
            near = did_you_mean(field, [*values, "thousand"])
            raise UsageError(
                f"{kind}: {option}={template!r}: {{{field}}} is no column{near}; id and thousand are known too"
            )
        value = record_id if field == "thousand" else values[field]
        try:
            if field == "thousand":
                value = int(value) // 1000 * 1000
            elif spec and spec[-1] in "dx":
                value = int(value)
            filled.append(format(value, spec or ""))
        except ValueError:
            raise UsageError(
                f"{kind}: {option}={template!r}: {{{field}:{spec}}} does not fit {value!r} ({table.where(i)})"
            ) from None
    return "".join(filled)


def locate(
    kind: str, tree: Tree, table: Table, ids: Sequence[str], template: str | None, any_file: bool = True
) -> list[str | None]:
    """File of each row, relative to the folder (None: not found).

    With a template that is where a recording must lie, with or without its ending (any_file: an ending other than the
    format's will do). Without one it is <id> plus ending, else the one recording in the tree whose name is the id or,
    for an id that is a number, the id with leading zeros and an optional suffix after "_" or "-". Raises `UsageError`
    for a template that does not fit the table, `DataError` where an id fits two files or no id fits any.
    """
    by_path, by_name, by_number = defaultdict(list), defaultdict(list), defaultdict(list)
    for path in tree.recordings:
        stem = tree.stem(path)
        name = os.path.basename(stem)
        for key in (path, stem):
            by_path[key].append(path)
        for key in (os.path.basename(path), name):
            by_name[key].append(path)
        if match := re.fullmatch(r"0*(\d+)(?:[_-].*)?", name):
            by_number[match[1]].append(path)
    found: list[str | None] = []
    first = None
    for i, record_id in enumerate(ids):
        if template is not None:
            wanted = os.path.normpath(fill(kind, "path", template, table, i, record_id))
            first = first or wanted
            matches = by_path.get(wanted) or ([wanted] if any_file and wanted in tree.files else [])
        else:
            matches = (
                by_path.get(os.path.normpath(record_id))
                or by_name.get(record_id)
                or by_number.get(record_id.lstrip("0") or record_id)
                or []
            )
        if len(matches) > 1:
            raise DataError(
                f"{table.where(i)}: {record_id} may be {matches[0]} or {matches[1]}; say path=TEMPLATE"
                + (" with the ending" if template is not None else "")
            )
        found.append(matches[0] if matches else None)
    if not any(found):
        ending = tree.endings[0]
        where = f"path={template!r} gives {first!r}" if template else f"nothing is called {ids[0]}{ending} or the like"
        raise DataError(f"{tree.root}: no row of {table.path.name} has a recording ({where}); say path=TEMPLATE")
    return found


def report(rule: str, lost: Sequence[str], spare: Sequence[str], spare_count: int | None = None) -> dict[str, Any]:
    """For `about`: the rule by which files were found, rows without one and recordings without a row."""
    return {
        "path_rule": rule,
        "rows_without_recording": len(lost),
        "rows_without_recording_first": list(lost[:SHOWN]),
        "recordings_without_row": len(spare) if spare_count is None else spare_count,
        "recordings_without_row_first": list(spare[:SHOWN]),
    }
