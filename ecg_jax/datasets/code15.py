"""CODE-15 % (Zenodo 4916206, version 1.0.0): exams.csv and exams_part0.hdf5 to exams_part17.hdf5 in one folder.

The parts are unzipped; fewer of them will do: the exams of the others are counted as left out. exams.csv is not in the
order of the files and is joined by each part's own `exam_id`; the last row of a part (exam_id 0, all zeros) is filler.
The values are 2 x mV, and become mV by division. Short exams are zero-padded at both ends, which preparation strips; an
exam of zeros alone is refused there. None of the six labels does not mean a normal ECG: that is task `normal`. `death`,
`timey` and `nn_predicted_age` are not taken over. Patients stay together; there is no official split. Whether the
patient ids are those of CODE in full is not published, so the two are not taken to share an id space.

Options (`--option key=value`):
    parts=0-17   the parts to convert, numbers and ranges with commas; default all that are there
    scale=2      what the stored values are divided by to give mV (1 for a copy that is in mV already)

Tasks: code6 (1dAVb RBBB LBBB SB AF ST, by name), normal. Invariant: every row of exams.csv and every row of the parts
is an item or counted as skipped, and a signal meets the labels of its own exam_id alone.
"""

import hashlib
import itertools
import re
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ecg_jax.datasets import check_options
from ecg_jax.datasets import code_labels as code
from ecg_jax.datasets.source import Item, Source, pack
from ecg_jax.datasets.table import age, stream_table
from ecg_jax.errors import DataError, UsageError
from ecg_jax.records.leads import LEADS
from ecg_jax.records.record import Record, Refused

OPTIONS = ("parts", "scale")
PARTS = range(18)
TASKS = {"code6": code.CODE6, "normal": ("normal",)}
COLUMNS = ("exam_id", "age", "is_male", *code.CODE6, "patient_id", "normal_ecg", "trace_file")
R_LEVEL = 1.75  # median R amplitude of lead II as stored (ECGBench)
_SAMPLED = 8  # rows of each part that are checked for lead order and unit
_NO_ROW = 1 << 40  # row number of an exam that its part does not have: after all rows
_TRACE_FILE = re.compile(r"exams_part(\d{1,4})\.hdf5")


def open_code15(source_dir: Path, options: dict[str, str]) -> Source:
    """Open the folder that holds exams.csv and the unzipped parts; the module's docstring lists the options.

    Raises `UsageError` for options, `DataError` for the table, for a part that is not of the published layout, for an
    exam that is there twice, and where lead order or amplitude are not those of CODE-15 %. An exam that its part does
    not have is refused when it is read ("missing-row").
    """
    check_options("code15", options, OPTIONS)
    scale = code.scale_of("code15", options)
    parts = _find(source_dir, options.get("parts"))
    tracings = {n: code.open_tracings(path) for n, path in parts.items()}
    place, skipped = _places(tracings)
    samples = (code.read_rows(t.path, code.spread(t.rows, _SAMPLED)) for t in tracings.values())
    sample = (raw for rows in samples for raw in rows if not isinstance(raw, Refused))
    facts = code.examine(f"{source_dir}", sample, LEADS, R_LEVEL, options.get("scale"))

    exams, places = array("q"), array("q")
    absent: Counter[int] = Counter()
    digest = hashlib.sha256()
    items = pack(_items(source_dir, parts, place, exams, places, absent, digest))
    if not len(items):
        raise DataError(f"{source_dir}: no row of exams.csv belongs to the parts that are there: {_ranges(parts)}")
    ids, times = np.unique(np.frombuffer(exams, np.int64), return_counts=True)
    if len(ids) < len(exams):
        raise DataError(f"{source_dir / 'exams.csv'}: exam_id {ids[times > 1][0]} is there twice")
    if place:
        skipped["row of a part without a row in exams.csv"] = len(place)
    if absent:
        reason = "part not asked for" if options.get("parts") else "part not there"
        skipped[reason] = absent.total()
    about: dict[str, Any] = {
        "tables_sha256": {"exams.csv": digest.hexdigest()},
        "files": {str(path.relative_to(source_dir)): tracings[n].size for n, path in parts.items()},
        "parts": _ranges(parts),
        "parts_left_out": {f"exams_part{n}.hdf5": absent[n] for n in sorted(absent)},
        "rows": len(exams),
        "scale": scale,
        "scale_policy": code.SCALE_POLICY,
        **facts,
        "limb_leads": "III, aVR, aVL and aVF were computed from I and II by the authors",
        "label_policy": "an empty cell is unknown (-1); none of the six is not normal",
        "licence": "CC BY 4.0",
        "doi": "10.5281/zenodo.4916206",
    }
    read = partial(_read, parts, scale)
    items = items.take(np.argsort(np.frombuffer(places, np.int64), kind="stable"))
    return Source("code15", "1.0.0", "mV", TASKS, items, read, about, {k: n for k, n in skipped.items() if n})


def _find(source_dir: Path, asked: str | None) -> dict[int, Path]:
    """Part number -> file, of the parts asked for, or of all that are there."""
    found = {}
    for n in PARTS:
        name = f"exams_part{n}"
        for path in (source_dir / f"{name}.hdf5", source_dir / name / f"{name}.hdf5"):
            if path.is_file():
                found[n] = path
                break
    wanted = _parse(asked) if asked is not None else sorted(found)
    for n in wanted:
        if n not in found:
            zipped = f"; unzip exams_part{n}.zip there" if (source_dir / f"exams_part{n}.zip").exists() else ""
            raise DataError(f"{source_dir}: parts={asked} asks for exams_part{n}.hdf5, which is not there{zipped}")
    if not wanted:
        zipped = any(source_dir.glob("exams_part*.zip"))
        remedy = "unzip exams_part*.zip there first" if zipped else "give the folder of the unzipped parts as --source"
        raise DataError(f"{source_dir}: no exams_part0.hdf5 to exams_part17.hdf5; {remedy}")
    return {n: found[n] for n in wanted}


def _parse(text: str) -> list[int]:
    numbers: set[int] = set()
    for piece in text.split(","):
        ends = piece.strip().split("-")
        if len(ends) > 2 or not all(end.isascii() and end.isdecimal() and len(end) < 5 for end in ends):
            raise UsageError(f"code15: parts={text!r}: {piece.strip()!r} is neither a number nor a range such as 0-3")
        low, high = int(ends[0]), int(ends[-1])
        if low > high or high not in PARTS:
            raise UsageError(f"code15: parts={text!r}: {piece.strip()!r} must lie within 0-{PARTS[-1]}")
        numbers.update(range(low, high + 1))
    return sorted(numbers)


def _ranges(numbers: Sequence[int] | dict[int, Any]) -> str:
    """[0, 1, 2, 5] -> "0-2,5"."""
    runs: list[list[int]] = []
    for n in sorted(numbers):
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ",".join(f"{a}-{b}" if b > a else str(a) for a, b in runs)


def _places(tracings: dict[int, code.Tracings]) -> tuple[dict[int, tuple[int, int]], dict[str, int]]:
    """exam_id -> (part, row), and how many rows are filler."""
    place: dict[int, tuple[int, int]] = {}
    filler = 0
    for n, part in tracings.items():
        ids = code.read_ids(part.path, part.rows)
        nameless = [int(row) for row in np.flatnonzero(ids == 0)]
        zero = {
            row
            for row, raw in zip(nameless, code.read_rows(part.path, nameless), strict=True)
            if not isinstance(raw, Refused) and not raw.any()
        }
        filler += len(zero)
        for row, exam in enumerate(ids.tolist()):
            if row in zero:
                continue
            if exam in place:
                other, at = place[exam]
                raise DataError(
                    f"{part.path}: exam_id {exam} of row {row} is also in row {at} of {tracings[other].path.name}"
                )
            place[exam] = n, row
    return place, {"filler row": filler}


def _items(
    source_dir: Path,
    parts: dict[int, Path],
    place: dict[int, tuple[int, int]],
    exams: array,
    places: array,
    absent: Counter[int],
    digest: Any,
) -> Iterator[Item]:
    """An item per row of exams.csv whose part is there; exams found are taken out of `place`.

    Every exam goes to `exams`, every item's place to `places`; rows whose part is not there are counted in `absent`.
    `where` is (part, row or None, age, sex, flags of the six and of normal, is the patient known, part that has it).
    """
    table = source_dir / "exams.csv"
    for row in stream_table(table, COLUMNS, digest):
        exam = code.whole(row, "exam_id")
        trace = _TRACE_FILE.fullmatch(row["trace_file"])
        if trace is None or int(trace[1]) not in PARTS:
            raise DataError(
                f"{row.where}: trace_file={row['trace_file']!r}, must be exams_part0.hdf5 to exams_part17.hdf5"
            )
        exams.append(exam)
        n = int(trace[1])
        part, at = place.pop(exam, (None, None))
        if part is None and n not in parts:
            absent[n] += 1
            continue
        found = at if part == n else None
        patient = code.whole(row, "patient_id", empty=-1)
        where = (
            n,
            found,
            age(row.number("age")),
            code.male(row, "is_male"),
            code.flags(row, (*code.CODE6, "normal_ecg")),
            patient >= 0,
            part,
        )
        places.append((n << 41) + (_NO_ROW if found is None else found))
        yield Item(str(exam), str(patient if patient >= 0 else exam), None, where)


def _read(parts: dict[int, Path], scale: float, items: Sequence[Item]) -> Iterator[Record | Refused]:
    """Records of `items`, each part opened once."""
    for n, group in itertools.groupby(items, key=lambda item: item.where[0]):
        chosen = list(group)
        there = [item.where[1] for item in chosen if item.where[1] is not None]
        rows = code.read_rows(parts[n], there) if there else iter(())
        for item in chosen:
            _, row, years, sex, packed, known, elsewhere = item.where
            if row is None:
                hint = "" if elsewhere is None else f" (it is in exams_part{elsewhere}.hdf5)"
                detail = f"exam_id {item.record_id} is not in exams_part{n}.hdf5, where exams.csv has it{hint}"
                yield Refused("missing-row", f"{detail}; download both again")
                continue
            raw = next(rows)
            if isinstance(raw, Refused):
                yield raw
                continue
            source = code.source_of(raw, item.record_id)
            labels = code.labels_of(packed)
            yield Record(
                signal=code.millivolt(raw, scale),
                rate=code.RATE,
                record_id=item.record_id,
                group=item.group,
                patient_id=item.group if known else None,
                age=years,
                sex=sex,
                labels={"code6": labels[:6], "normal": labels[6:]},
                source=source,
            )
