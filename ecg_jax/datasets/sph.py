"""SPH, Shandong Provincial Hospital: 25,770 recordings of 24,666 patients, 500 Hz, 10 to 56 s, AHA statements.

No options. Layout as published (figshare collection 5779802): metadata.csv (ECG_ID, AHA_Code, Patient_ID, Age, Sex, N,
Date), code.csv (Category, Code, Description), and the recordings as a folder records/ of <ECG_ID>.h5 or as the archive
records.tar.gz, which is an uncompressed tar in spite of its name and is read where it lies. A file holds `ecg`, float16
[12, T] in mV, in the standard order of leads.

One task, `aha`: the primary codes, as numbers, of code.csv and of the table. "60+310;147" is two statements, 60 with
the modifier 310, and 147; modifiers are no labels and stay in the record's `aha_code`. Every recording was read by a
cardiologist, so a code that is not there is 0; a recording without a row, or with an empty cell, has unknown labels.
Normal is a code of its own (1). A patient's recordings stay together. Of the set's 168 recordings that were uploaded
twice, 25 disagree in their codes; the converter finds them by their content. Amplitudes up to 1,590 mV occur and are
left to the audit.

Invariant: a recording has as many samples as the table says, and a code is never one that code.csv calls a modifier.
"""

import hashlib
import io
import re
import tarfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from ecg_jax.datasets import check_options
from ecg_jax.datasets.reading import read_each
from ecg_jax.datasets.source import Item, Source, pack
from ecg_jax.datasets.table import Row, age, multi_hot, need_columns, read_table
from ecg_jax.errors import DataError
from ecg_jax.progress import track
from ecg_jax.records.leads import LEADS
from ecg_jax.records.readers.arrays import numeric, refusing, scaled
from ecg_jax.records.readers.hdf5 import check_stored
from ecg_jax.records.readers.reading import Reading, settle
from ecg_jax.records.record import Record, Refused

RATE = 500.0
FOLDER = "records"
ARCHIVES = ("records.tar.gz", "records.tar")
MODIFIER = "Modifier"  # the category of code.csv that is no diagnosis
MAX_BYTES = 1 << 26  # of a file, packed or unpacked: 90 times the longest recording
_COLUMNS = ("ECG_ID", "AHA_Code", "Patient_ID", "Age", "Sex", "N", "Date")
_SEX = {"M": 1.0, "F": 0.0, "": float("nan")}


def open_sph(source_dir: Path, options: dict[str, str]) -> Source:
    """Open the folder that holds `metadata.csv`, `code.csv` and `records/` or `records.tar.gz`.

    Raises `UsageError` for options, `DataError` for tables and archive. A row whose file is missing is refused when it
    is read.
    """
    check_options("sph", options, ())
    table = read_table(source_dir / "metadata.csv")
    need_columns(table, _COLUMNS)
    primary, modifiers, digests = _codes(source_dir / "code.csv")
    archive, found = _files(source_dir)
    rows = [table.row(i) for i in range(len(table.rows))]
    codes = [_statements(row, primary, modifiers) for row in rows]
    names = tuple(sorted(set(primary).union(*codes), key=int))
    if not names:
        raise DataError(f"{table.path}: no AHA_Code in any row, and no code.csv beside it")
    items, seen, patients = [], set(), set()
    for row, present in zip(rows, codes, strict=True):
        record = row["ECG_ID"]
        if not record or record in seen:
            raise DataError(f"{row.where}: ECG_ID {record!r} is {'there twice' if record else 'empty'}")
        seen.add(record)
        patient = row.identifier("Patient_ID") or None
        patients.add(patient or record)
        where = _facts(row) | {
            "at": found.get(record),
            "labels": {"aha": multi_hot(present, names)},
            "patient": patient,
        }
        items.append(Item(record, patient or record, None, where))
    alone = sorted(found.keys() - seen)
    unknown = {"aha": multi_hot((), names)}
    items += [Item(record, record, None, {"at": found[record], "labels": unknown}) for record in alone]
    about: dict[str, Any] = {
        "licence": "CC BY 4.0",
        "doi": "10.1038/s41597-022-01403-5",
        "tables_sha256": {"metadata.csv": table.digest()} | digests,
        "rows": len(rows),
        "patients": len(patients),
        "recordings_without_row": len(alone),
        "rows_without_code": sum(not present for present in codes),
        "label_policy": "primary statements, absent is 0; modifiers stay in the record's aha_code",
        "aha": {code: primary[code] for code in names if code in primary},
    }
    read = partial(_read, source_dir, archive)
    return Source("sph", "1.0.0", "mV", {"aha": names}, pack(items), read, about)


def _codes(path: Path) -> tuple[dict[str, str], set[str], dict[str, str]]:
    """Primary codes with their descriptions, modifiers, digest; nothing of each where there is no code.csv."""
    if not path.exists():
        return {}, set(), {}
    table = read_table(path)
    need_columns(table, ("Category", "Code", "Description"))
    primary: dict[str, str] = {}
    modifiers: set[str] = set()
    for i in range(len(table.rows)):
        row = table.row(i)
        code = row.identifier("Code")
        if not _is_code(code) or code in primary or code in modifiers:
            raise DataError(f"{row.where}: Code={code!r} is {'there twice' if _is_code(code) else 'no number'}")
        if row["Category"] == MODIFIER:
            modifiers.add(code)
        else:
            primary[code] = row["Description"]
    return primary, modifiers, {"code.csv": table.digest()}


def _is_code(text: str) -> bool:
    return re.fullmatch(r"[1-9][0-9]{0,3}", text) is not None


def _statements(row: Row, primary: dict[str, str], modifiers: set[str]) -> set[str]:
    """Primary codes of "60+310;147". Checked against code.csv where that is there."""
    codes = set()
    for statement in filter(None, (part.strip() for part in row["AHA_Code"].split(";"))):
        first, *rest = (code.strip() for code in statement.split("+"))
        for code in (first, *rest):
            if not _is_code(code):
                raise DataError(f"{row.where}: AHA_Code={row['AHA_Code'][:60]!r} is not of the form 60+310;147")
        if primary and (first not in primary or not modifiers.issuperset(rest)):
            raise DataError(f"{row.where}: AHA_Code={row['AHA_Code'][:60]!r} is not of the codes of code.csv")
        codes.add(first)
    return codes


def _facts(row: Row) -> dict[str, Any]:
    samples = row.number("N")
    if not (samples > 0 and samples.is_integer()):
        raise DataError(f"{row.where}: N={row['N']!r} is no number of samples")
    if row["Sex"] not in _SEX:
        raise DataError(f"{row.where}: Sex={row['Sex'][:20]!r}, SPH has M and F")
    return {
        "samples": int(samples),
        "age": age(row.number("Age")),
        "sex": _SEX[row["Sex"]],
        "time": row["Date"] or None,
        "meta": {"aha_code": row["AHA_Code"]},
    }


def _files(source_dir: Path) -> tuple[str | None, dict[str, tuple[str, int, int]]]:
    """The archive's name, None for a folder, and of each recording (name, offset in the archive, bytes)."""
    if (source_dir / FOLDER).is_dir():
        files = (source_dir / FOLDER).glob("*.h5")
        return None, {file.stem: (f"{FOLDER}/{file.name}", 0, 0) for file in files}
    archive = next((name for name in ARCHIVES if (source_dir / name).is_file()), None)
    if archive is None:
        raise DataError(f"{source_dir}: neither a folder {FOLDER}/ nor {' or '.join(ARCHIVES)} in it")
    path, found = source_dir / archive, {}
    try:
        with tarfile.open(path, "r:") as members:
            for member in track(members, f"looking through {archive}", unit="files"):
                stem = Path(member.name).stem
                if not member.isreg() or not member.name.endswith(".h5"):
                    continue
                if member.issparse() or stem in found:
                    raise DataError(f"{path}: {member.name} is stored twice or sparse; unpack it to {FOLDER}/")
                found[stem] = (member.name, member.offset_data, member.size)
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        raise DataError(
            f"{path}: no complete uncompressed tar ({error}); fetch it again, or unpack it to {FOLDER}/"
        ) from None
    return archive, found


def _read(source_dir: Path, archive: str | None, items: Sequence[Item]) -> Iterator[Record | Refused]:
    """A `Record` or `Refused` for each item; the archive is opened once."""
    if archive is None:
        yield from read_each(partial(_read_file, source_dir, None), "mV", items)
        return
    try:
        tar = open(source_dir / archive, "rb")
    except OSError as error:
        yield from (Refused("missing-file", f"{source_dir / archive}: {error.strerror}") for _ in items)
        return
    with tar:
        yield from read_each(partial(_read_file, source_dir, tar), "mV", items)


def _read_file(source_dir: Path, tar: Any, item: Item) -> Reading:
    """Refuses with missing-file, unreadable-signal, truncated, too-large, wrong-type, missing-samples, wrong-length."""
    if item.where["at"] is None:
        raise Refused("missing-file", f"{source_dir} has no recording {item.record_id}.h5")
    name, offset, size = item.where["at"]
    where = source_dir / name
    with refusing(where):
        if tar is None:
            with open(where, "rb") as file:
                data = file.read(MAX_BYTES + 1)
        else:
            tar.seek(offset)
            data = tar.read(min(size, MAX_BYTES + 1))
            if len(data) < min(size, MAX_BYTES + 1):
                raise Refused("truncated", f"{where} ends after {len(data)} of {size} bytes")
        if len(data) > MAX_BYTES:
            raise Refused("too-large", f"{where} is larger than {MAX_BYTES >> 20} MB")
        with h5py.File(io.BytesIO(data), "r") as file:
            raw = _ecg(where, file, item.where.get("samples"))
    return settle(scaled(raw.T, np.ones(len(LEADS))), LEADS, RATE, hashlib.sha256(data).digest())


def _ecg(where: Path, file: h5py.File, samples: int | None) -> np.ndarray:
    """[12, T] as stored; `samples` is what the table says, None where it does not."""
    if not isinstance(file.get("ecg", getlink=True), h5py.HardLink) or not isinstance(file["ecg"], h5py.Dataset):
        raise Refused("wrong-type", f"{where} has no data set ecg of its own")
    found = file["ecg"]
    if not numeric(found.dtype) or found.ndim != 2 or found.shape[0] != len(LEADS):
        raise Refused(
            "wrong-type", f"{where}: ecg is {found.dtype} {found.shape}, [12, samples] of floats was expected"
        )
    if samples is not None and found.shape[1] != samples:
        raise Refused("wrong-length", f"{where} has {found.shape[1]} samples, metadata.csv says {samples}")
    if found.size * found.dtype.itemsize > MAX_BYTES:
        raise Refused("too-large", f"{where}: ecg unpacks to more than {MAX_BYTES >> 20} MB")
    check_stored(str(where), found, None)
    return found[()]
