"""Reading one's own recordings, file after file, in worker processes.

It knows where an item lies (`where`: path, and inside, row within a file of many) and nothing of tables. Invariant: one
result per item, in order.
"""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import h5py

from ecg_jax.datasets.locate import Tree
from ecg_jax.datasets.reading import read_each
from ecg_jax.datasets.source import Item
from ecg_jax.errors import DataError
from ecg_jax.progress import track
from ecg_jax.records.readers.arrays import Declared
from ecg_jax.records.readers.hdf5 import open_hdf5_file, read_inside
from ecg_jax.records.readers.reading import Reading, Unit
from ecg_jax.records.record import Record, Refused

_MULTI = re.compile(rb"\s*\S+/\d+(\s|$)")
_HEADER = 1 << 20  # bytes; a longer header is none


def read_files(
    folder: Path, unit: Unit, read_one: Callable[..., Reading], items: Sequence[Item]
) -> Iterator[Record | Refused]:
    """`read_one(file)`, or `read_one(file, row=n)` for a row of a batch, for each item."""

    def read(item: Item) -> Reading:
        path = _path(folder, item)
        return read_one(path, row=item.where["row"]) if "row" in item.where else read_one(path)

    return read_each(read, unit, items)


def read_hdf5_files(
    folder: Path, unit: Unit, declared: Declared, dataset: str | None, items: Sequence[Item]
) -> Iterator[Record | Refused]:
    """HDF5 files, each kept open while the items stay in it. dataset: of a file that is one recording, or None."""
    opened: dict[Path, h5py.File] = {}

    def read(item: Item) -> Reading:
        path = _path(folder, item)
        if path not in opened:
            _close(opened)
            opened[path] = open_hdf5_file(path)
        where = item.where
        shared = "inside" in where or "row" in where
        return read_inside(opened[path], declared, where.get("inside", dataset), where.get("row"), shared)

    try:
        yield from read_each(read, unit, items)
    finally:
        _close(opened)


def _path(folder: Path, item: Item) -> Path:
    if item.where["path"] is None:
        raise Refused("missing-file", f"no recording for {item.record_id} under {folder}")
    return folder / item.where["path"]


def _close(opened: dict[Path, h5py.File]) -> None:
    for file in opened.values():
        file.close()
    opened.clear()


def segments(tree: Tree) -> set[str]:
    """Of the WFDB records in `tree`, without ending, those that are parts of a multi-segment record."""
    parts = set()
    for path in track(tree.recordings, "looking for segments", unit="headers"):
        try:
            with open(tree.root / path, "rb") as file:
                lines = [line.split(b"#", 1)[0].split() for line in file.read(_HEADER).splitlines()]
        except OSError as error:
            raise DataError(f"{tree.root / path}: {error.strerror or error}") from None
        lines = [line for line in lines if line]
        if lines and _MULTI.match(lines[0][0]):
            names = [line[0].decode("utf-8", "surrogateescape") for line in lines[1:]]
            parts.update(os.path.normpath(os.path.join(os.path.dirname(path), name)) for name in names)
    return parts & {tree.stem(path) for path in tree.recordings}
