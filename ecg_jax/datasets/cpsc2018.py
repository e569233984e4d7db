"""CPSC 2018 (ICBEB), the public 6,877 recordings, in both encodings: nine classes, 500 Hz, 6 to 144 s.

One task, `cpsc9`: Normal, AF, I-AVB, LBBB, RBBB, PAC, PVC, STD, STE, in this order (the set's own numbers 1 to 9).
Encodings: `mat`, the original MATLAB files (a struct ECG of sex, age and data [12, n] in mV) with REFERENCE.csv
(Recording, First_label, Second_label, Third_label), in one folder or TrainingSet1 to TrainingSet3; `wfdb`, the copy of
the PhysioNet/CinC Challenges, with SNOMED CT codes or, in its first headers, the class names after `#Dx`. That copy
lost the order of the labels, and its later releases write every age above 89 as 92.

Options: `encoding` = mat or wfdb, default what lies in the folder; `cut` = first-5s keeps the first 2,500 samples of
each recording, as MERL and HeartLang do (by default all of it is cut into 10 s windows); `merl` = folder of the CSV
files that MERL publishes (icbeb_train.csv, icbeb_val.csv, icbeb_test.csv), whose records, labels and splits are then
taken, and recordings that they do not list left out.

Ages of -1 and absent ones are unknown. Length goes with the class: the windows of one recording share its group. There
are no patient ids. Invariant: a label is one of the nine classes by its number, its code or its name, and a recording
with none of them has unknown labels; other codes are counted, never taken for one of the nine.
"""

import hashlib
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ecg_jax.datasets import check_options
from ecg_jax.datasets.reading import record_of
from ecg_jax.datasets.snomed import (
    Facts,
    Found,
    Merl,
    find_records,
    first_seconds,
    parse_comments,
    read_facts,
    read_merl,
    read_records,
    report,
    where_of,
)
from ecg_jax.datasets.source import Item, Source, pack
from ecg_jax.datasets.table import multi_hot, need_columns, read_table
from ecg_jax.errors import DataError, UsageError
from ecg_jax.records.leads import LEADS
from ecg_jax.records.readers.reading import Reading, settle
from ecg_jax.records.record import UNKNOWN, Record, Refused

NAMES = ("Normal", "AF", "I-AVB", "LBBB", "RBBB", "PAC", "PVC", "STD", "STE")
CODES = {
    "426783006": "Normal",
    "164889003": "AF",
    "270492004": "I-AVB",
    "164909002": "LBBB",
    "59118001": "RBBB",
    "284470004": "PAC",
    "164884008": "PVC",
    "429622005": "STD",
    "164931005": "STE",
}
# MERL's names of the nine classes.
MERL_NAMES = {
    "NORM": "Normal",
    "AFIB": "AF",
    "1AVB": "I-AVB",
    "CLBBB": "LBBB",
    "CRBBB": "RBBB",
    "PAC": "PAC",
    "VPC": "PVC",
    "STD": "STD",
    "STE": "STE",
}
PATTERN = r"A\d{4}"
REPAIRS = ("record-name-suffix",)
REFERENCE = "REFERENCE.csv"
OPTIONS = ("encoding", "cut", "merl")
RATE = 500.0
FIRST_SECONDS = 5.0
_CODE_OF = {name.casefold(): code for code, name in CODES.items()}
_LABEL_COLUMNS = ("First_label", "Second_label", "Third_label")
_MERL_APART = ("patient_id", "ecg_id", "filename", "validation", "age", "sex", "scp_codes")
MAX_BYTES = 1 << 26  # of a file, packed or unpacked: nine times the longest recording


def open_cpsc2018(source_dir: Path, options: dict[str, str]) -> Source:
    """Open the folder that holds A####.mat and REFERENCE.csv, or A####.hea and A####.mat, in folders of any depth.

    Raises `UsageError` for options, `DataError` for a folder with none or both of the encodings and for malformed
    tables. A recording that lacks a file, or whose files are broken, is refused when it is read.
    """
    check_options("cpsc2018", options, OPTIONS)
    if options.get("cut", "first-5s") != "first-5s":
        raise UsageError(f"cpsc2018: cut={options['cut']!r}, known is first-5s")
    seconds = FIRST_SECONDS if "cut" in options else None
    found = find_records(source_dir, PATTERN, (REFERENCE,))
    encoding = _encoding(source_dir, found, options)
    about: dict[str, Any] = {
        "licence": "CC BY 4.0",
        "doi": "10.1166/jmihi.2018.2442",
        "encoding": encoding,
        "cut": options.get("cut", "none"),
        "groups": "no patient ids are published: each recording is its own group",
        "contained_in": "the PhysioNet/CinC Challenges 2020 and 2021, under the same names",
    }
    where, facts = (_original if encoding == "mat" else _challenge)(source_dir, found)
    about |= {"records": len(where)} | facts
    skipped = {"records of another data set": len(found.others)} if found.others else {}
    splits: dict[str, str] = {}
    if "merl" in options:
        merl = _merl(options["merl"])
        about["tables_sha256"] |= merl.tables_sha256
        about["merl_records"] = merl.records
        about["merl_policy"] = "labels and splits as published; the split is random, no patient ids being known"
        about["merl_labels_that_differ"] = _take_merl(merl, where)
        skipped["not in MERL's tables"] = len(where.keys() - merl.rows.keys())
        splits = {record: split for record, (split, _) in merl.rows.items()}
        where = {record: where[record] for record in splits}
    about["records_without_label"] = sum(bool((one["labels"]["cpsc9"] < 0).all()) for one in where.values())
    read = partial(_read_original, source_dir, seconds) if encoding == "mat" else None
    return Source(
        name="cpsc2018",
        version="1.0.0",
        unit="mV",
        tasks={"cpsc9": NAMES},
        items=pack(Item(record, record, splits.get(record), where[record]) for record in sorted(where)),
        read=read or partial(read_records, source_dir, REPAIRS, seconds),
        about=about,
        skipped={reason: count for reason, count in skipped.items() if count},
    )


def _encoding(source_dir: Path, found: Found, options: dict[str, str]) -> str:
    """ "mat" or "wfdb"."""
    wanted = options.get("encoding")
    if wanted not in (None, "mat", "wfdb"):
        raise UsageError(f"cpsc2018: encoding={wanted!r}, known are mat and wfdb")
    if not found.headers and not found.signals:
        raise DataError(f"{source_dir}: no A####.mat in it or below; give the folder that holds the recordings")
    if wanted is None and found.headers and found.tables:
        raise DataError(
            f"{source_dir} holds headers of the WFDB copy and {found.tables[0]} of the original; say encoding=wfdb or "
            "encoding=mat"
        )
    encoding = wanted or ("wfdb" if found.headers else "mat")
    if encoding == "wfdb" and not found.headers:
        raise DataError(f"{source_dir}: no A####.hea in it or below, which encoding=wfdb needs")
    if encoding == "mat" and not found.tables:
        raise DataError(
            f"{source_dir}: no {REFERENCE} in it or below; give the folder that holds it and the recordings"
        )
    return encoding


Where = dict[str, dict[str, Any]]


def _challenge(source_dir: Path, found: Found) -> tuple[Where, dict[str, Any]]:
    """`Item.where` of each record of the WFDB copy, and entries of `about`."""
    ids = found.ids()
    headers = [found.headers.get(record) for record in ids]
    every, where = [], {}
    for record, header, facts in zip(ids, headers, read_facts(source_dir, headers), strict=True):
        named = {text: _CODE_OF.get(text.casefold()) for text in facts.words}
        facts = facts._replace(
            codes=tuple(dict.fromkeys((*facts.codes, *(code for code in named.values() if code)))),
            words=tuple(text for text, code in named.items() if code is None),
        )
        labels = multi_hot([CODES[code] for code in facts.codes if code in CODES], NAMES)
        if facts.words:  # they may stand for any of the nine
            labels = np.where(labels == 1, labels, UNKNOWN).astype(np.int8)
        every.append(facts)
        where[record] = where_of(header, facts, {"cpsc9": labels})
    return where, {"tables_sha256": {}} | report(every, CODES)


def _original(source_dir: Path, found: Found) -> tuple[Where, dict[str, Any]]:
    """The same for the original files. Sex and age stand in the recordings, and are read with them."""
    numbers: dict[str, tuple[set[int], str]] = {}
    tables = {}
    for name in found.tables:
        table = read_table(source_dir / name)
        need_columns(table, ("Recording", *_LABEL_COLUMNS))
        tables[name] = table.digest()
        for i, row in enumerate(table.rows):
            record = row["Recording"].removesuffix(".mat")
            if not (len(record) == 5 and record[0] == "A" and record[1:].isascii() and record[1:].isdecimal()):
                raise DataError(f"{table.where(i)}: Recording={row['Recording'][:60]!r} is not of the form A0001")
            cells = {column: row[column].removesuffix(".0") for column in _LABEL_COLUMNS if row[column]}
            for column, cell in cells.items():
                if cell not in "123456789" or len(cell) != 1:
                    raise DataError(f"{table.where(i)}: {column}={row[column][:60]!r} is no class from 1 to 9")
            labels = {int(cell) for cell in cells.values()}
            if record in numbers and numbers[record][0] != labels:
                raise DataError(f"{table.where(i)}: Recording={record!r} has other labels in {numbers[record][1]}")
            numbers[record] = labels, table.where(i)
    where: Where = {}
    for record in sorted(numbers.keys() | found.signals.keys()):
        paths = found.signals.get(record, ())
        if len(paths) > 1:
            both = f"{paths[0]}.mat and {paths[1]}.mat"
            raise DataError(f"{source_dir}: {record} is there twice, as {both}; give the folder of one copy")
        labels = multi_hot([NAMES[number - 1] for number in numbers.get(record, (set(),))[0]], NAMES)
        where[record] = {"path": paths[0] if paths else None, "labels": {"cpsc9": labels}}
    return where, {"tables_sha256": tables}


def _merl(option: str) -> Merl:
    merl = read_merl(option, "icbeb", "filename", _MERL_APART, PATTERN)
    if set(merl.columns) != set(MERL_NAMES):
        raise DataError(f"merl={option}: label columns {', '.join(merl.columns)}; MERL has {', '.join(MERL_NAMES)}")
    return merl


def _take_merl(merl: Merl, where: Where) -> int:
    """Put MERL's labels into `where`; how many records had others (as far as they had any)."""
    order = [merl.columns.index(name) for name in sorted(MERL_NAMES, key=lambda name: NAMES.index(MERL_NAMES[name]))]
    differ = 0
    for record, (_, published) in merl.rows.items():
        labels = published[order]
        own = where.setdefault(record, {"path": None, "labels": {"cpsc9": np.full(len(NAMES), UNKNOWN, np.int8)}})
        known = own["labels"]["cpsc9"] >= 0
        differ += bool((labels != own["labels"]["cpsc9"])[known].any())
        own["labels"] = {"cpsc9": labels}
    return differ


def _read_original(folder: Path, seconds: float | None, items: Sequence[Item]) -> Iterator[Record | Refused]:
    """The original files. Refuses missing-file, unreadable-signal, bad-shape."""
    for item in items:
        try:
            if item.where["path"] is None:
                raise Refused("missing-file", f"there is no {item.record_id}.mat below {folder}")
            reading, said = read_struct(folder / f"{item.where['path']}.mat")
        except Refused as refusal:
            yield refusal
        else:
            yield replace(record_of(item, first_seconds(reading, seconds), "mV"), age=said.age, sex=said.sex)


def read_struct(path: Path) -> tuple[Reading, Facts]:
    """One original recording (MATLAB 5, struct ECG of sex, age and data [12, n] in mV at 500 Hz), and its age and sex.

    Own reader, because no size that the file states is believed before it is compared with the bytes that are there.
    Refuses with missing-file, unreadable-signal, bad-shape. Source of the layout: MAT-File Format, MathWorks.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise Refused("missing-file", f"there is no {path}") from None
    except OSError as error:
        raise Refused("unreadable-signal", f"{path}: {error.strerror or error}") from None
    try:
        fields = _struct(content)
        sex, years, data = fields["sex"], fields["age"], fields["data"]
    except _MalformedError as error:
        raise Refused("unreadable-signal", f"{path}: {error}; take the file from another copy of the set") from None
    except KeyError as error:
        raise Refused("unreadable-signal", f"{path}: its struct ECG has no field {error}") from None
    if isinstance(data, str) or data.ndim != 2 or data.shape[0] != len(LEADS) or not data.shape[1]:
        shape = "a text" if isinstance(data, str) else f"of shape {data.shape}"
        raise Refused("bad-shape", f"{path}: data is {shape}, not [12, n]")
    # The same rules as for the header comments of the WFDB copy.
    stated = years.strip() if isinstance(years, str) else f"{years.flat[0]:.6f}" if years.size else ""
    gender = sex if isinstance(sex, str) else ""
    said = parse_comments(f"#Age: {' '.join(stated.split())}\n#Sex: {' '.join(gender.split())}".encode())
    with np.errstate(over="ignore"):  # what no float32 holds becomes infinite, which is no sample
        return settle(data.T, LEADS, RATE, hashlib.sha256(content).digest(), "mV"), said


class _MalformedError(Exception):
    """What is wrong with a MATLAB file."""


_NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
_TEXTS = {1: "latin-1", 2: "latin-1", 4: "utf-16", 16: "utf-8", 17: "utf-16"}
_MATRIX, _PACKED, _STRUCT, _TEXT, _COMPLEX = 14, 15, 2, 4, 0x0800


def _struct(content: bytes) -> dict[str, str | np.ndarray]:
    """Fields of the struct ECG: texts and float64 arrays."""
    if len(content) > MAX_BYTES:
        raise _MalformedError(f"longer than {MAX_BYTES} bytes")
    order = {b"IM": "<", b"MI": ">"}.get(content[126:128])
    if order is None or not content.startswith(b"MATLAB 5.0"):
        raise _MalformedError("no MATLAB 5 file")
    for kind, body in _elements(memoryview(content)[128:], order, padded=False):
        if kind == _PACKED:
            unpack = zlib.decompressobj()
            try:
                whole = unpack.decompress(body, MAX_BYTES)
            except zlib.error as error:
                raise _MalformedError(f"its packed part is broken ({error})") from None
            if not unpack.eof:
                raise _MalformedError("its packed part is cut off or far too long")
            kind, body = next(_elements(memoryview(whole), order), (0, memoryview(b"")))
        if kind != _MATRIX:
            continue
        parts = _elements(body, order)
        flags, dims, name = _array_head(parts, order)
        if name == "ECG" and flags & 0xFF == _STRUCT:
            if dims != (1, 1):
                raise _MalformedError(f"ECG is a struct array of shape {dims}")
            width = int(_numbers(*_next(parts), order)[0])
            names = bytes(_next(parts)[1])
            if not 1 <= width <= 64:
                raise _MalformedError("its field names are broken")
            keys = [names[i : i + width].split(b"\0")[0].decode("latin-1") for i in range(0, len(names), width)]
            fields = {}
            for key in keys:
                part = _next(parts)
                if key in ("sex", "age", "data"):
                    fields[key] = _leaf(*part, order)
            return fields
    raise _MalformedError("no struct ECG in it")


def _elements(data: memoryview, order: str, padded: bool = True) -> Iterator[tuple[int, memoryview]]:
    """(type, content) of each element. Up to four bytes may stand in the tag itself."""
    at = 0
    while len(data) - at >= 8:
        kind, size = struct.unpack_from(f"{order}II", data, at)
        if kind >> 16:
            kind, size = kind & 0xFFFF, kind >> 16
            body, step = data[at + 4 : at + 4 + size], 8
            if size > 4:
                raise _MalformedError("a short element of more than four bytes")
        else:
            body = data[at + 8 : at + 8 + size]
            step = 8 + size + (-size % 8 if padded or kind != _PACKED else 0)
            if len(body) < size:
                raise _MalformedError(f"cut off: {size} bytes are announced, {len(body)} are there")
        yield kind, body
        at += step


def _next(parts: Iterator[tuple[int, memoryview]]) -> tuple[int, memoryview]:
    part = next(parts, None)
    if part is None:
        raise _MalformedError("an array is cut off")
    return part


def _numbers(kind: int, body: memoryview, order: str) -> np.ndarray:
    code = _NUMBERS.get(kind)
    if code is None or len(body) % int(code[1]) or not len(body):
        raise _MalformedError("numbers of an unknown type")
    return np.frombuffer(body, f"{order}{code}")


def _array_head(parts: Iterator[tuple[int, memoryview]], order: str) -> tuple[int, tuple[int, ...], str]:
    flags = int(_numbers(*_next(parts), order)[0])
    dims = tuple(int(n) for n in _numbers(*_next(parts), order))
    return flags, dims, bytes(_next(parts)[1]).decode("latin-1")


def _leaf(kind: int, body: memoryview, order: str) -> str | np.ndarray:
    """A text, or a float64 array in the shape that it states."""
    if kind != _MATRIX:
        raise _MalformedError("a field is no array")
    if not len(body):
        return np.empty((0, 0))
    parts = _elements(body, order)
    flags, dims, _ = _array_head(parts, order)
    held, values = next(parts, (2, memoryview(b"")))
    if flags & 0xFF == _TEXT:
        code = _TEXTS.get(held, "")
        if code == "utf-16":
            code = "utf-16-le" if order == "<" else "utf-16-be"
        if not code:
            raise _MalformedError("a text of an unknown type")
        return bytes(values).decode(code, errors="replace")
    if flags & 0xFF not in range(6, 16) or flags & _COMPLEX:
        raise _MalformedError("a field is neither a text nor an array of real numbers")
    numbers = _numbers(held, values, order) if len(values) else np.empty(0)
    if len(dims) > 8 or min(dims) < 0 or int(np.prod(dims, dtype=object)) != len(numbers):
        raise _MalformedError(f"an array of shape {dims} with {len(numbers)} values")
    return numbers.astype(np.float64).reshape(dims, order="F")
