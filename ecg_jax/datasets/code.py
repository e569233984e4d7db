"""CODE in full (SciLifeLab, doi 10.17044/scilifelab.15169716): annotations.csv, RECORDS.txt, WFDB records in archives.

SOURCE holds annotations.csv, RECORDS.txt and the archives S0000000.tar.gz, S0010000.tar.gz, ... (or the folders that
they unpack to, which are preferred), there or below `ecg-traces`. An exam has several records, TNMG<exam>_N1, _N2, ...:
as in the published work the first is used, the others are counted. Exams that nobody annotated are counted; an
annotated exam without a record is refused when it is read ("missing-file"). Fewer archives will do: their exams are
counted as left out. Millivolts come from the headers, dates from the table alone (header dates are not always right).
Without RECORDS.txt the archives themselves are looked through first, which takes as long as unpacking them.

A compressed archive cannot be sought in. The first conversion writes a plain copy of what is wanted of each (the first
records of annotated exams, about a quarter of it) to a cache, in as many processes as there are workers; an interrupted
one goes on with the archive it was at. The cache may be deleted afterwards. Options (`--option key=value`):

    cache=DIR               default SOURCE/.ecg_jax_cache
    exclude_samitrop=FILE   samitrop_patients.txt, a patient id a line (relative to SOURCE): these patients are left out
    checksums=on|off        compare the headers' checksums with the samples; default on

Task: code6 (1dAVb RBBB LBBB SB AF ST, by name). Invariant: every row of annotations.csv is an item or counted as
skipped, every record of RECORDS.txt (or of the archives) belongs to an item or is counted as skipped.
"""

import hashlib
import itertools
import os
import re
import tempfile
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ecg_jax.datasets import archive, check_options
from ecg_jax.datasets import code_labels as code
from ecg_jax.datasets.reading import record_of
from ecg_jax.datasets.source import Item, Source, pack
from ecg_jax.datasets.table import age, stream_table
from ecg_jax.errors import DataError, MachineError, UsageError
from ecg_jax.progress import track
from ecg_jax.records.readers.wfdb import read_wfdb
from ecg_jax.records.record import Record, Refused

OPTIONS = ("cache", "exclude_samitrop", "checksums")
COLUMNS = ("id_exam", "id_patient", "age", "sex", "date_exam", *code.CODE6)
CACHE = ".ecg_jax_cache"
LATER, UNANNOTATED = "record after the first of its exam", "exam without annotation"
_RECORD = re.compile(r"TNMG(0|[1-9]\d{0,17})_N([1-9]\d{0,5})", re.ASCII)
_NOWHERE, _ABSENT = -1, -2  # folder number of an exam that has no record, or whose archive is not there


@dataclass(frozen=True)
class Waves:
    """Where the recordings are: what a worker needs to find one.

    exams     int64 [n], ascending: every annotated exam; folder int16 [n] its number in `places`, or negative
    places    a folder of records, or an archive
    key       of the archives' indexes: which exams are annotated
    """

    exams: np.ndarray
    folder: np.ndarray
    places: tuple[Path, ...]
    cache: Path
    key: str

    def sort(self, name: str) -> str | None:
        """What becomes of the archive member `name`: see `archive.Sort`. A record is counted once, by its header."""
        base, _, suffix = name.rpartition(".")
        match = _RECORD.fullmatch(base)
        if match is None or suffix not in ("hea", "mat", "dat"):
            return None
        if match[2] != "1":
            return LATER if suffix == "hea" else None
        if self.at(int(match[1])) is None:
            return UNANNOTATED if suffix == "hea" else None
        return archive.KEEP

    def at(self, exam: int) -> int | None:
        """Position of `exam` in `exams`."""
        at = int(np.searchsorted(self.exams, exam))
        return at if at < len(self.exams) and self.exams[at] == exam else None


def open_code(source_dir: Path, options: dict[str, str]) -> Source:
    """Open the folder that holds annotations.csv and the archives; the module's docstring lists the options.

    Raises `UsageError` for options and for a cache that cannot be written, `DataError` for tables, for an exam that is
    there twice, and where neither archives nor folders of records are found.
    """
    check_options("code", options, OPTIONS)
    checksums = options.get("checksums", "on")
    if checksums not in ("on", "off"):
        raise UsageError(f"code: checksums={checksums!r}, known are on and off")
    cache = Path(options["cache"]) if options.get("cache") else source_dir / CACHE
    excluded, tables = _excluded(source_dir, options.get("exclude_samitrop"))
    table = source_dir / "annotations.csv"
    exams, patients, digest = array("q"), array("q"), hashlib.sha256()
    items = pack(_items(table, exams, patients, digest))
    tables["annotations.csv"] = digest.hexdigest()
    exam, patient = np.frombuffer(exams, np.int64), np.frombuffer(patients, np.int64)
    if not len(exam):
        raise DataError(f"{table} has no rows")
    known, times = np.unique(exam, return_counts=True)
    if len(known) < len(exam):
        raise DataError(f"{table}: id_exam {known[times > 1][0]} is there twice")

    found = _places(source_dir)
    waves = Waves(known, np.full(len(known), _NOWHERE, np.int16), (), cache, _key(known))
    records = source_dir / "RECORDS.txt"
    if records.exists():
        listed, folder, names, skipped = _listed(records, waves)
        tables["RECORDS.txt"] = code.hash_of(records)
        places = [found.get(name) for name in names]
        if names and not any(places):
            raise DataError(
                f"{source_dir}: RECORDS.txt speaks of {names[0]}, ... and neither {names[0]}.tar.gz nor a folder "
                f"{names[0]} is there, nor any other of them"
            )
        number = np.array([n if place else _ABSENT for n, place in enumerate(places)], np.int16)
        places = [place or source_dir / name for place, name in zip(places, names, strict=True)]
    else:
        listed, folder, places, skipped = _looked_up(source_dir, found, waves)
        number = np.arange(len(places), dtype=np.int16)
    if len(places) > np.iinfo(np.int16).max:
        raise DataError(f"{source_dir}: records in {len(places)} folders, CODE has a few hundred")
    if any(place.is_file() for place in places):
        archive.check_cache(cache)
    waves.folder[np.searchsorted(known, listed)] = number[folder]

    of_item = waves.folder[np.searchsorted(known, exam)]
    keep = np.ones(len(exam), bool)
    if excluded is not None:
        keep = ~np.isin(patient, excluded)
        if keep.all():
            raise DataError(f"{options['exclude_samitrop']}: none of its ids is an id_patient of {table}")
    skipped["SaMi-Trop patient"] = int((~keep).sum())
    skipped["archive not there"] = int((keep & (of_item == _ABSENT)).sum())
    keep &= of_item != _ABSENT
    order = np.flatnonzero(keep)
    order = order[np.lexsort((exam[order], of_item[order].astype(np.uint16)))]  # those without a record last
    about: dict[str, Any] = {
        "tables_sha256": tables,
        "files": {p.name: p.stat().st_size for p in sorted(places) if p.is_file()},
        "rows": len(exam),
        "patients": len(np.unique(patient[patient >= 0])),
        "exclude_samitrop": excluded is not None,
        "rows_without_record": int((of_item[order] == _NOWHERE).sum()),
        "record_policy": "the first record of an exam (N1)",
        "unit_policy": "millivolts by the headers' gains",
        "time_policy": "date_exam; dates in headers are not used",
        "label_policy": "an empty cell is unknown (-1); none of the six is not normal",
        "contains": ["code15"] if excluded is not None else ["code15", "samitrop"],
        "checksums": checksums,
        "licence": "on request, for research",
        "doi": "10.17044/scilifelab.15169716",
    }
    waves = Waves(known, waves.folder, tuple(places), cache, waves.key)
    read = partial(_read, waves, checksums == "on")
    skipped = {reason: n for reason, n in skipped.items() if n}
    return Source("code", "1.0.0", "mV", {"code6": code.CODE6}, items.take(order), read, about, skipped)


# ---------------------------------------------------------------------------------------------------- the tables


def _items(table: Path, exams: array, patients: array, digest: Any) -> Iterator[Item]:
    """An item per row; `where` is (exam, age, sex, flags of the six, is the patient known, date or None)."""
    rows = stream_table(table, COLUMNS, digest)
    for row in track(rows, "reading annotations.csv", unit="rows"):
        exam, patient = code.whole(row, "id_exam"), code.whole(row, "id_patient", empty=-1)
        exams.append(exam)
        patients.append(patient)
        flags, person = code.flags(row, code.CODE6), code.sex(row, "sex")
        where = (exam, age(row.number("age")), person, flags, patient >= 0, row["date_exam"] or None)
        yield Item(str(exam), str(patient if patient >= 0 else exam), None, where)


def _excluded(source_dir: Path, name: str | None) -> tuple[np.ndarray | None, dict[str, str]]:
    """(patient ids, digests of the tables read): both empty without the option."""
    if name is None:
        return None, {}
    path, ids = source_dir / name, []
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise DataError(f"exclude_samitrop: {path}: {error.strerror or error}") from None
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if not text:
            continue
        if not text.isdigit() or len(text) > 18:
            shown = text[:30].decode("ascii", "replace")
            raise DataError(f"{path}:{number}: {shown!r} is no patient id; one whole number a line is needed")
        ids.append(int(text))
    return np.array(ids, np.int64), {"samitrop_patients": code.hash_of(path)}


def _key(exams: np.ndarray) -> str:
    return hashlib.sha256(exams.tobytes()).hexdigest()[:16]


def _listed(path: Path, waves: Waves) -> tuple[np.ndarray, np.ndarray, list[str], dict[str, int]]:
    """RECORDS.txt -> (annotated exams that have a first record, number of its folder, folder names, left out)."""
    exams, folder, folders, later = array("q"), array("h"), {}, 0
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            for number, line in enumerate(track(file, "reading RECORDS.txt", unit="lines"), 1):
                text = line.strip()
                if not text:
                    continue
                head, _, name = text.rpartition("/")
                match = _RECORD.fullmatch(name)
                if match is None:
                    raise DataError(f"{path}:{number}: {text[:60]!r} is no record such as S0000000/TNMG1_N1")
                if match[2] != "1":
                    later += 1
                    continue
                exams.append(int(match[1]))
                folder.append(folders.setdefault(head.rpartition("/")[2], len(folders)))
    except OverflowError:
        raise DataError(f"{path}: records in {len(folders)} folders, CODE has a few hundred") from None
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from None
    exam, where = np.frombuffer(exams, np.int64), np.frombuffer(folder, np.int16)
    skipped = {LATER: later, UNANNOTATED: int((~np.isin(exam, waves.exams)).sum())}
    return *_annotated(str(path), exam, where, waves), list(folders), skipped


def _annotated(what: str, exam: np.ndarray, folder: np.ndarray, waves: Waves) -> tuple[np.ndarray, np.ndarray]:
    """The exams that are annotated, each with its folder. `DataError` where one has two first records."""
    known = np.isin(exam, waves.exams)
    exam, folder = exam[known], folder[known]
    values, times = np.unique(exam, return_counts=True)
    if len(values) < len(exam):
        raise DataError(f"{what}: record TNMG{values[times > 1][0]}_N1 is there twice")
    return exam, folder


# ------------------------------------------------------------------------------------------------- the recordings


def _places(source_dir: Path) -> dict[str, Path]:
    """Name of a folder of records -> that folder, or the archive it is packed in."""
    found: dict[str, Path] = {}
    for base in (source_dir, source_dir / "ecg-traces"):
        for path in sorted(base.iterdir()) if base.is_dir() else ():
            if path.is_file() and path.name.endswith(archive.SUFFIXES):
                found.setdefault(archive.stem(path), path)
    for base in (source_dir, source_dir / "ecg-traces"):
        for path in sorted(base.iterdir()) if base.is_dir() else ():
            if path.is_dir() and path.name not in (CACHE, "ecg-traces"):
                found[path.name] = path
    found[""] = source_dir  # RECORDS.txt may name records that lie beside it
    return found


def _looked_up(
    source_dir: Path, found: dict[str, Path], waves: Waves
) -> tuple[np.ndarray, np.ndarray, list[Path], dict[str, int]]:
    """As `_listed`, from the folders and archives themselves; with their paths instead of names."""
    exams, folder, places = array("q"), array("l"), []
    skipped = {LATER: 0, UNANNOTATED: 0}
    archives = [path for path in found.values() if path.is_file()]
    if archives:
        archive.check_cache(waves.cache)
        archive.prepare(archives, waves.cache, waves.sort, waves.key)
    for path in archives:
        index = archive.load(path, waves.cache, waves.key)
        if index is None:
            raise DataError(f"{path} changed while it was looked through; try again when it is complete")
        if index.error:
            raise DataError(f"{path} {index.error}; download it again, or take it away (RECORDS.txt is not there)")
        names = [name.decode().rpartition(".") for name in index.names.tolist()]
        first = [int(base[4:-3]) for base, _, suffix in names if suffix == "hea"]
        skipped = {reason: n + index.left_out.get(reason, 0) for reason, n in skipped.items()}
        exams.extend(first)
        folder.extend([len(places)] * len(first))
        places.append(path)
    for inside, folders, files in track(os.walk(source_dir), f"looking through {source_dir}", unit="folders"):
        folders[:] = sorted(name for name in folders if name != CACHE)
        before = len(exams)
        for name in sorted(files):
            base, _, suffix = name.rpartition(".")
            match = _RECORD.fullmatch(base) if suffix == "hea" else None
            if match and match[2] == "1":
                exams.append(int(match[1]))
                folder.append(len(places))
            elif match:
                skipped[LATER] += 1
        if len(exams) > before:
            places.append(Path(inside))
    if not places:
        raise DataError(
            f"{source_dir}: neither archives (S0000000.tar.gz) nor records (TNMG1_N1.hea) are there or in ecg-traces"
        )
    exam, where = np.frombuffer(exams, np.int64), np.frombuffer(folder, "l")
    skipped[UNANNOTATED] += int((~np.isin(exam, waves.exams)).sum())  # of folders: in archives they are not listed
    return *_annotated(str(source_dir), exam, where, waves), places, skipped


# ------------------------------------------------------------------------------------------------------- reading

_READY: set[tuple[Path, str]] = set()  # archives whose index this process has seen


def _read(waves: Waves, checksums: bool, items: Sequence[Item]) -> Iterator[Record | Refused]:
    """Records of `items`. What the cache lacks of their archives is made first."""
    exams = np.array([item.where[0] for item in items], np.int64)
    number = waves.folder[np.searchsorted(waves.exams, exams)]
    needed = {waves.places[n] for n in np.unique(number[number >= 0])}
    needed = {path for path in needed if path.is_file() and (path, waves.key) not in _READY}
    archive.prepare(sorted(needed), waves.cache, waves.sort, waves.key)
    _READY.update((path, waves.key) for path in needed)
    at = 0
    for n, group in itertools.groupby(number.tolist()):
        count = sum(1 for _ in group)
        chosen = items[at : at + count]
        at += count
        if n < 0:
            for item in chosen:
                yield Refused(
                    "missing-file", f"exam {item.record_id} is annotated and TNMG{item.record_id}_N1 is nowhere"
                )
        elif waves.places[n].is_dir():
            for item in chosen:
                yield _record(item, waves.places[n], None, checksums)
        else:
            yield from _of_archive(waves, waves.places[n], checksums, chosen)


def _of_archive(waves: Waves, path: Path, checksums: bool, items: Sequence[Item]) -> Iterator[Record | Refused]:
    index = archive.load(path, waves.cache, waves.key)
    if index is None:  # the cache was deleted meanwhile, or the archive changed
        archive.prepare([path] if path.is_file() else [], waves.cache, waves.sort, waves.key)
        index = archive.load(path, waves.cache, waves.key)
    descriptor, why = None, "is not there any more" if index is None else index.error
    if index is not None and index.error is None:
        try:
            descriptor = os.open(index.tar, os.O_RDONLY)
        except OSError as error:
            why = f"cannot be read ({error.strerror})"
    if index is None or descriptor is None:
        refusal = Refused("unreadable-archive", f"{path.name} {why}; download it again")
        yield from itertools.repeat(refusal, len(items))
        return
    try:
        with tempfile.TemporaryDirectory(prefix="ecg-jax-") as folder:
            for item in items:
                try:
                    names = _unpack(index, descriptor, path.name, item.where[0], Path(folder))
                except Refused as refusal:
                    yield refusal
                    continue
                yield _record(item, Path(folder), path.name, checksums)
                for name in names:
                    (Path(folder) / name).unlink()
    finally:
        os.close(descriptor)


def _unpack(index: archive.Index, descriptor: int, name: str, exam: int, folder: Path) -> list[str]:
    """Write header and signals of the exam's first record to `folder`; their names."""
    places = {f"TNMG{exam}_N1.{suffix}": None for suffix in ("hea", "mat", "dat")}
    there = {file: place for file in places if (place := index.find(file)) is not None}
    if f"TNMG{exam}_N1.hea" not in there:
        raise Refused("missing-file", f"there is no TNMG{exam}_N1.hea in {name}")
    for file, place in there.items():
        data = archive.read_member(descriptor, place)
        if len(data) < place[1]:
            raise Refused("truncated", f"{name} ends in {file}; download it again")
        try:
            (folder / file).write_bytes(data)
        except OSError as error:
            raise MachineError(f"cannot write {folder / file}: {error.strerror or error}; free some space") from None
    return list(there)


def _record(item: Item, folder: Path, packed_in: str | None, checksums: bool) -> Record | Refused:
    """Read the first record of the exam of `item` in `folder`; a refusal names the archive, if there is one."""
    exam, years, sex, flags, known, date = item.where
    try:
        reading = read_wfdb(folder / f"TNMG{exam}_N1", "mV", checksums)
    except Refused as refusal:
        if packed_in is None:
            return refusal
        return Refused(refusal.reason, refusal.detail.replace(str(folder), packed_in))
    where = {
        "patient": item.group if known else None,
        "age": years,
        "sex": sex,
        "labels": {"code6": code.labels_of(flags)},
        "time": date,
    }
    return record_of(Item(item.record_id, item.group, item.split, where), reading, "mV")
