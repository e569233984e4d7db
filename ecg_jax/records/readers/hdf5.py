"""HDF5 files: all recordings in one data set, a data set or a group of leads for each, or a file for each.

Rows are read one at a time. Nothing outside the file is followed (external and virtual data, links to other files), and
no size that the file claims is believed beyond what its bytes can hold. Invariant: a sample that was never written is
not read as the fill value; the recording is refused.
"""

import hashlib
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from ecg_jax.records.leads import canonical
from ecg_jax.records.readers.arrays import (
    Declared,
    Facts,
    facts_of,
    file_digest,
    is_fact,
    lead_axis,
    lead_count,
    numeric,
    one_recording,
    reading_of,
    refusing,
    scaled,
    settled_rate,
    unit_factors,
)
from ecg_jax.records.readers.reading import Reading, settle
from ecg_jax.records.record import Refused

INFLATION = 1100  # deflate makes at most 1032 bytes of one
SHOWN = 4  # names in a message
FEW = 64  # members of a group, and values of a data set, that are looked through for facts


def open_hdf5_file(path: Path) -> h5py.File:
    """Open for reading. Refuses with missing-file, unreadable-signal."""
    with refusing(path):
        if not h5py.is_hdf5(path):
            with open(path, "rb"):  # a missing file says so
                raise Refused("unreadable-signal", f"{path} is no HDF5 file, or its head is cut off")
        return h5py.File(path, "r")


def read_hdf5(path: Path, declared: Declared, inside: str | None = None, row: int | None = None) -> Reading:
    """`read_inside` of a file that holds one recording, or is opened for one; the sha256 is the file's where there is
    neither `inside` nor `row`.
    """
    with open_hdf5_file(path) as file:
        return read_inside(file, declared, inside, row, shared=inside is not None or row is not None)


def read_inside(
    file: h5py.File, declared: Declared, inside: str | None = None, row: int | None = None, shared: bool = True
) -> Reading:
    """One recording of an open file.

    inside  data set ([12, T], [T, 12], a batch [N, ...] of those with `row`), or group with a data set for each lead;
            None: the only one in the file that can be a recording
    row     which of a batch, from 0
    shared  whether the file holds others too: `source` is the sha256 of what was read, else of the file

    Rate, unit and lead names may be attributes of the data set or of the groups around it, or small data sets beside
    it. Refuses with missing-file (nothing of that name), missing-samples, no-signals, ambiguous-signals,
    unreadable-signal, wrong-type, missing-row, bad-shape, and what `reading_of` refuses.
    """
    path = Path(file.filename)
    with refusing(path):
        found = _only(file, declared) if inside is None else _named(file, inside)
        where = f"{path}:{found.name}" + ("" if row is None else f" row {row}")
        said = _around(where, file, found)
        if isinstance(found, h5py.Group):
            return _leads(where, found, declared, said, shared)
        facts = facts_of(where, said)
        check_stored(where, found, row)
        raw = one_recording(where, found, row, lead_count(declared, facts))
    digest = hashlib.sha256(raw.tobytes()).digest() if shared else file_digest(path)
    return reading_of(where, raw, declared, facts, digest)


def row_ids(file: h5py.File, name: str) -> list[str]:
    """The ids in data set `name`, [N] or [N, 1] of integers or texts, as texts. Refuses with missing-file,
    wrong-type.
    """
    path = Path(file.filename)
    with refusing(path):
        found = _named(file, name)
        if not isinstance(found, h5py.Dataset) or found.ndim not in (1, 2) or found.size != len(found):
            raise Refused("wrong-type", f"{path}:{name} is no list of ids")
        check_stored(f"{path}:{name}", found, None)
        ids = found[()].ravel()
        if ids.dtype.kind in "iu":
            return [str(value) for value in ids.tolist()]
        if ids.dtype.kind in "OSU":
            return [value.decode() if isinstance(value, bytes) else str(value) for value in ids.tolist()]
        raise Refused("wrong-type", f"{path}:{name} holds {ids.dtype}; ids are integers or texts")


def row_count(file: h5py.File, inside: str) -> int:
    """How many recordings the batch `inside` holds. Refuses with missing-file, wrong-type."""
    path = Path(file.filename)
    with refusing(path):
        found = _named(file, inside)
        if not isinstance(found, h5py.Dataset) or found.ndim < 2:
            raise Refused("wrong-type", f"{path}:{inside} is no batch of recordings")
        return len(found)


def member_names(file: h5py.File, group: str) -> list[str]:
    """What lies in `group`, by name. Refuses with missing-file, wrong-type."""
    path = Path(file.filename)
    with refusing(path):
        found = _named(file, group)
        if not isinstance(found, h5py.Group):
            raise Refused("wrong-type", f"{path}:{group} is no group")
        return sorted(found)


def _named(file: h5py.File, name: str) -> h5py.Dataset | h5py.Group:
    try:
        found = file[name]
    except (KeyError, ValueError):
        raise Refused("missing-file", f"{file.filename} has no {name!r}, but {_holds(file)}") from None
    if found.file.filename != file.filename:
        raise Refused("unreadable-signal", f"{file.filename}:{name} is a link to another file, which is not followed")
    return found


def _holds(group: h5py.Group) -> str:
    names = list(islice(group, SHOWN + 1))
    return ", ".join(names[:SHOWN] + ["..."] * (len(names) > SHOWN)) or "nothing"


def _only(file: h5py.File, declared: Declared) -> h5py.Dataset | h5py.Group:
    """The one object that can be a recording."""
    arrays: list[Any] = []
    groups: list[Any] = [file] if _lead_sets(file) else []

    def look(name: str, found: Any) -> None:
        if isinstance(found, h5py.Group):
            groups.extend([found] if _lead_sets(found) else [])
            return
        shape = tuple(n for n in found.shape or () if n != 1)
        count = lead_count(declared, facts_of(name, _attributes(found)))
        if numeric(found.dtype) and (lead_axis(shape, count) or (count == 1 and len(shape) == 1 and shape[0] > 1)):
            arrays.append(found)

    file.visititems(look)
    candidates = arrays + groups if not (groups and lead_count(declared, Facts()) == 1) else groups
    names = ", ".join(found.name for found in candidates[:SHOWN])
    if not candidates:
        held = _holds(file)
        raise Refused(
            "no-signals", f"{file.filename} has no data set of leads and samples, but {held}; say dataset=NAME"
        )
    if len(candidates) > 1:
        raise Refused("ambiguous-signals", f"{file.filename} may mean any of {names}; say dataset=NAME")
    return candidates[0]


def _lead_sets(group: h5py.Group) -> list[str]:
    """Names of the data sets in `group` that are one lead each."""
    names = []
    for name in group:
        if canonical(name) and group.get(name, getlink=True).__class__ is h5py.HardLink:
            found = group[name]
            if isinstance(found, h5py.Dataset) and _outer_ndim(found) == 1:
                names.append(name)
    return names


def _outer_ndim(found: h5py.Dataset) -> int:
    return max(1, sum(n != 1 for n in found.shape)) if found.shape is not None and found.shape else 0


def _leads(where: str, group: h5py.Group, declared: Declared, said: Mapping[str, Any], shared: bool) -> Reading:
    """A recording whose leads are data sets of `group`."""
    names = _lead_sets(group)
    if not names:
        raise Refused("no-signals", f"{where} has no data set named after a lead, but {_holds(group)}")
    if declared.leads:
        raise Refused("lead-mismatch", f"{where} names its leads {' '.join(names)}; leave leads= out")
    digest, channels, rates, factors = hashlib.sha256(), [], {}, []
    for name in names:
        found = group[name]
        here = f"{where}/{name}"
        if not numeric(found.dtype):
            raise Refused("wrong-type", f"{here} holds {found.dtype}, not numbers that could be samples")
        check_stored(here, found, None)
        facts = facts_of(here, {**said, **_attributes(found)})
        raw = np.array(found[()]).ravel()
        if channels and len(raw) != len(channels[0]):
            raise Refused("bad-shape", f"{here} has {len(raw)} samples, {names[0]} has {len(channels[0])}")
        digest.update(name.encode() + b"\0" + raw.tobytes())
        rates[settled_rate(here, declared.rate, facts.rate)] = name
        factors.append(unit_factors(here, declared.unit, facts.units, [name])[0])
        channels.append(scaled(raw, np.float64(1)))
    if len(rates) > 1:
        raise Refused("mixed-rates", f"{where}: its leads have {', '.join(f'{rate:g}' for rate in rates)} Hz")
    signal = scaled(np.stack(channels, 1), np.array(factors))
    source = digest.digest() if shared else file_digest(Path(group.file.filename))
    return settle(signal, names, next(iter(rates)), source, "z" if declared.unit == "z" else "mV")


def _around(where: str, file: h5py.File, found: h5py.Dataset | h5py.Group) -> dict[str, Any]:
    """Attributes and small data sets of the groups from the root down to `found`; the nearest counts."""
    said: dict[str, Any] = {}
    parts = [part for part in found.name.split("/") if part]
    groups = [file] + [file["/" + "/".join(parts[:n])] for n in range(1, len(parts))]
    if isinstance(found, h5py.Group) and parts:
        groups.append(found)
    levels = [_attributes(group) | _beside(group) for group in groups]
    if isinstance(found, h5py.Dataset):
        levels.append(_attributes(found))
    for near in levels:
        said = _override(said, facts_of(where, near))
    return said


def _override(said: dict[str, Any], facts: Facts) -> dict[str, Any]:
    """`said`, and over it what is said nearer."""
    if facts.rate is not None:
        said = said | {"fs": facts.rate}
    if facts.units:
        said = said | {"unit": np.array(facts.units, object)}
    if facts.leads:
        said = said | {"leads": np.array(facts.leads, object)}
    return said


def _attributes(found: Any) -> dict[str, Any]:
    return {name: found.attrs[name] for name in found.attrs}


def _beside(group: h5py.Group) -> dict[str, Any]:
    """The small data sets of `group` that are facts by their name: some writers keep the rate so."""
    values: dict[str, Any] = {}
    if len(group) > FEW:
        return values
    for name in group:
        if not is_fact(name) or group.get(name, getlink=True).__class__ is not h5py.HardLink:
            continue
        found = group[name]
        if isinstance(found, h5py.Dataset) and found.shape is not None and 0 < found.size <= FEW:
            check_stored(f"{group.name}/{name}", found, None)
            values[name] = found[()]
    return values


def check_stored(where: str, found: h5py.Dataset, row: int | None) -> None:
    """The data set lies in this file, was written, and is no larger than its bytes can be."""
    if found.shape is None or (found.size == 0):
        raise Refused("missing-samples", f"{where} is empty")
    if found.is_virtual or found.external:
        raise Refused("unreadable-signal", f"{where} keeps its samples in another file, which is not followed")
    stored = found.id.get_storage_size()
    claimed = found.size * found.dtype.itemsize
    if found.chunks is None:
        if stored < claimed:
            raise Refused("missing-samples", f"{where}: {stored} of {claimed} bytes were ever written")
        return
    chunk = int(np.prod(found.chunks, dtype=object)) * found.dtype.itemsize
    grid = [-(-n // size) for n, size in zip(found.shape, found.chunks, strict=True)]
    chunks, written = int(np.prod(grid, dtype=object)), found.id.get_num_chunks()
    # What lies in memory at once: all of it, or the chunks of one row.
    read = claimed if row is None else chunk * (chunks // grid[0])
    if stored == 0 or max(read if written == chunks else 0, chunk) > INFLATION * stored + 4096:
        raise Refused("missing-samples", f"{where} claims {read} bytes, and {stored} are stored")
    if written < chunks:
        _check_chunks(where, found, grid, row)


def _check_chunks(where: str, found: h5py.Dataset, grid: list[int], row: int | None) -> None:
    """Every chunk of the row (or of all) is there."""
    if row is not None and 0 <= row < len(found):
        first = row // found.chunks[0]
        rows: range = range(first, first + 1)
    else:
        rows = range(grid[0])
    needed = len(rows) * int(np.prod(grid[1:], dtype=object))
    if needed <= found.id.get_num_chunks():
        places = np.ndindex(*(len(rows), *grid[1:]))
        offsets = (
            tuple((i + (rows.start if axis == 0 else 0)) * found.chunks[axis] for axis, i in enumerate(place))
            for place in places
        )
        if all(found.id.get_chunk_info_by_coord(offset).byte_offset is not None for offset in offsets):
            return
    raise Refused("missing-samples", f"{where}: some of its samples were never written")
