"""Files that hold many recordings: which of a file's rows or members belongs to which row of the labels table.

By ids in a data set (ids=), by the names of groups or data sets (dataset=.../{id}/...), by a column of row numbers
(row=), or in order (rows=order). It reads ids, names and counts, no samples. Invariant: every recording of the files
that were looked at is placed once or counted as having no row.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from ecg_jax.datasets.locate import Tree, fill, locate, template_columns
from ecg_jax.datasets.table import Table
from ecg_jax.errors import DataError, UsageError
from ecg_jax.records.readers.hdf5 import member_names, open_hdf5_file, row_count, row_ids
from ecg_jax.records.readers.npy import open_npy_file
from ecg_jax.records.record import Refused

T = TypeVar("T")
ID = "{id}"


@dataclass(frozen=True)
class Place:
    """Where a recording is: file relative to the source folder (None: not found), object in it, row in that."""

    path: str | None
    inside: str | None = None
    row: int | None = None


@dataclass(frozen=True)
class Batches:
    """How files of many recordings are addressed.

    dataset  object in an HDF5 file, a template; None for a format without
    ids      data set of ids, one for each row of `dataset`
    row      column of the labels table with row numbers
    order    the n-th row of the table is the n-th row of the one file
    """

    kind: str
    dataset: str | None = None
    ids: str | None = None
    row: str | None = None
    order: bool = False

    @property
    def keyed(self) -> bool:
        """Whether the file itself names its recordings."""
        return self.ids is not None or (self.dataset or "").split("/").count(ID) == 1


def batches_of(kind: str, options: dict[str, str]) -> Batches | None:
    """The options that speak of files with many recordings; None where none does. `UsageError` for a combination that
    says two things.
    """
    dataset = options.get("dataset")
    fields = template_columns(kind, "dataset", dataset) if dataset else set()
    given = [key for key in ("ids", "row", "rows") if key in options]
    if options.get("rows", "order") != "order":
        raise UsageError(f"{kind}: rows={options['rows']!r}, known is order")
    if len(given) > 1:
        raise UsageError(f"{kind}: give {given[0]}= or {given[1]}=, not both")
    if given and kind == "hdf5" and (not dataset or fields):
        raise UsageError(f"{kind}: {given[0]}= needs dataset=NAME, the data set whose rows are the recordings")
    found = Batches(kind, dataset, options.get("ids"), options.get("row"), "rows" in options)
    if fields and not found.keyed and "path" not in options:
        raise UsageError(f"{kind}: dataset={dataset!r} needs path=TEMPLATE too, or {ID} between slashes")
    return found if given or fields else None


def place_rows(
    batches: Batches, tree: Tree, table: Table, ids: Sequence[str], template: str | None
) -> tuple[list[Place], list[str]]:
    """Place of each row of the table, and the names of the recordings that no row has.

    Raises `DataError` where an id is in two places, a row number is none, a file that must be opened cannot be, or
    nothing is found at all; `UsageError` where no option says which file.
    """
    paths: list[str | None]
    if template is not None:
        paths = locate(batches.kind, tree, table, ids, template)
    elif batches.keyed:
        paths = []
    else:
        paths = [_the_file(batches, tree)] * len(ids)
    if batches.keyed:
        places, spare = _by_key(batches, tree, table, ids, paths)
    elif batches.order or batches.row is not None:
        places, spare = _by_number(batches, tree, table, ids, paths)
    else:
        places = [
            Place(path, fill(batches.kind, "dataset", batches.dataset or "", table, i, record_id))
            for i, (path, record_id) in enumerate(zip(paths, ids, strict=True))
        ]
        return places, [path for path in tree.recordings if path not in set(paths)]
    if not any(place.path for place in places):
        raise DataError(f"{tree.root}: no row of {table.path.name} has a recording (id {ids[0]!r} is in none)")
    opened = {place.path for place in places} | set(paths if template is not None else tree.recordings)
    return places, [*spare, *(path for path in tree.recordings if path not in opened)]


def place_all(batches: Batches, tree: Tree) -> list[tuple[str, Place]]:
    """(id, place) of every recording in the tree, where there is no labels table."""
    found: list[tuple[str, Place]] = []
    for path in tree.recordings:
        if batches.keyed:
            found += [(key, Place(path, *place)) for key, place in _members(batches, tree.root / path)]
        else:
            count = _reading(lambda path=path: _count(batches, tree.root / path))
            found += [(f"{tree.stem(path)}-{row}", Place(path, batches.dataset, row)) for row in range(count)]
    return found


def _the_file(batches: Batches, tree: Tree) -> str:
    if len(tree.recordings) != 1:
        raise UsageError(
            f"{batches.kind}: {tree.root} holds {len(tree.recordings)} files of that format; say which with path=FILE"
        )
    return tree.recordings[0]


def _by_key(
    batches: Batches, tree: Tree, table: Table, ids: Sequence[str], paths: Sequence[str | None]
) -> tuple[list[Place], list[str]]:
    wanted = {record_id: i for i, record_id in enumerate(ids)}
    places: list[Place] = [Place(None)] * len(ids)
    spare: list[str] = []
    for path in dict.fromkeys(path for path in paths if path) if paths else tree.recordings:
        try:
            members = _members(batches, tree.root / path)
        except DataError:
            if not paths:  # which rows would be in it, nobody knows
                raise
            places = [
                Place(path, batches.dataset, None) if paths[i] == path else place for i, place in enumerate(places)
            ]
            continue
        for key, (inside, row) in members:
            i = wanted.get(key)
            if i is None or (paths and paths[i] != path):
                spare.append(f"{path}:{key}")
                continue
            if places[i].path is not None:
                raise DataError(
                    f"{table.where(i)}: {key} is in {tree.root / str(places[i].path)} and in {tree.root / path}"
                    if places[i].path != path
                    else f"{table.where(i)}: {key} is twice in {tree.root / path}"
                )
            places[i] = Place(path, inside, row)
    return places, spare


def _members(batches: Batches, path: Path) -> list[tuple[str, tuple[str | None, int | None]]]:
    """(id, (object, row)) of all recordings in a file that names them. Raises `DataError`."""
    if batches.ids is not None:
        ids, count = _reading(lambda: _ids_and_count(batches, path))
        if len(ids) != count:
            raise DataError(f"{path}: {batches.ids} names {len(ids)} recordings, {batches.dataset} holds {count}")
        return [(key, (batches.dataset, row)) for row, key in enumerate(ids)]
    before, _, after = (f"/{batches.dataset}/").partition(f"/{ID}/")
    names = _reading(lambda: _names(path, before or "/"))
    return [(name, (f"{before}/{name}/{after}".rstrip("/"), None)) for name in names]


def _ids_and_count(batches: Batches, path: Path) -> tuple[list[str], int]:
    with open_hdf5_file(path) as file:
        return row_ids(file, batches.ids or ""), row_count(file, batches.dataset or "")


def _names(path: Path, group: str) -> list[str]:
    with open_hdf5_file(path) as file:
        return member_names(file, group)


def _by_number(
    batches: Batches, tree: Tree, table: Table, ids: Sequence[str], paths: Sequence[str | None]
) -> tuple[list[Place], list[str]]:
    counts: dict[str, int | None] = {}
    for path in dict.fromkeys(path for path in paths if path):
        try:
            counts[path] = _reading(lambda path=path: _count(batches, tree.root / path))
        except DataError:
            if batches.order:
                raise
            counts[path] = None  # its rows are refused, one by one, when they are read
    if batches.order and (len(counts) > 1 or None in paths or counts[str(paths[0])] != len(ids)):
        held = " and ".join(f"{path} holds {count}" for path, count in counts.items())
        raise DataError(f"{table.path} has {len(ids)} rows, {held} recordings; rows=order needs one file with as many")
    places, seen = [], {}
    for i, path in enumerate(paths):
        row = i if batches.order else _row_number(table, i, batches.row or "")
        if (path, row) in seen and path:
            raise DataError(
                f"{table.where(i)}: row {row} of {path} is also that of line {table.lines[seen[path, row]]}"
            )
        seen[path, row] = i
        places.append(Place(path, batches.dataset, row))
    spare = [f"{path}:{row}" for path, count in counts.items() for row in range(count or 0) if (path, row) not in seen]
    return places, spare


def _row_number(table: Table, i: int, column: str) -> int:
    value = table.row(i).identifier(column)
    if not (value.isascii() and value.isdecimal()) or len(value) > 12:
        raise DataError(f"{table.where(i)}: {column}={value!r} is no row number; they count from 0")
    return int(value)


def _count(batches: Batches, path: Path) -> int:
    if batches.kind == "npy":
        shape = open_npy_file(path).shape
        if len(shape) < 2:
            raise Refused("bad-shape", f"{path} has shape {shape}, which is no batch of recordings")
        return shape[0]
    with open_hdf5_file(path) as file:
        return row_count(file, batches.dataset or "")


def _reading(function: Callable[[], T]) -> T:
    try:
        return function()
    except Refused as refusal:
        raise DataError(f"{refusal.detail} ({refusal.reason})") from None
