"""What the sets in the form of the PhysioNet/CinC Challenges 2020 and 2021 share: a folder of WFDB records whose header
comments say who and what, in SNOMED CT.

It reads the comments of headers (`#Age`, `#Sex`, `#Dx`), gives codes their abbreviations, finds records by their
names, and reads the splits that MERL publishes for two of the sets. It opens no signal but through `read_wfdb`. Only
lines that start with # are comments, so a header whose first lines are broken still says its labels. A code counts
where it stands alone between commas, never as a part of a longer text. Invariant: what a header does not say clearly is
unknown (-1, NaN) and counted for the card; a label is 0 only where every item of the record's list was understood.
"""

import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ecg_jax.datasets.reading import record_of
from ecg_jax.datasets.source import Item
from ecg_jax.datasets.table import age, need_columns, read_table
from ecg_jax.errors import DataError, UsageError
from ecg_jax.progress import track
from ecg_jax.records.readers.reading import Reading
from ecg_jax.records.readers.wfdb import read_wfdb
from ecg_jax.records.record import UNKNOWN, Record, Refused

# Code and abbreviation of every diagnosis of the Challenge 2021, scored or not: facts of the tables
# dx_mapping_scored.csv and dx_mapping_unscored.csv of physionetchallenges/evaluation-2021 (BSD-2-Clause).
_TABLE = """
368009 HVD, 5609005 SARR, 6374002 BBB, 10370003 PR, 11157007 VBig, 13640000 FB, 17338001 VPB, 17366009 SAAWR,
27885002 CHB, 29320008 AVJR, 39732003 LAD, 47665007 RAD, 49260003 IR, 49578007 SPRI, 50799005 AVD, 53741008 CHD,
54016002 MoI, 54329005 AnMI, 55827005 LVHV, 55930002 STC, 57054005 AMI, 59118001 RBBB, 59931005 TInv, 60423000 SND,
61277005 AIVR, 61721007 CVCL/CCVCL, 63593006 SVPB, 65778007 SAB, 67198005 PSVT, 74390002 WPW, 74615001 BTS,
75532003 VEsB, 77867006 SQT, 81898007 VEsR, 82226007 DIB, 84114007 HF, 89792004 RVH, 106068003 ARH, 111288001 VFL,
111975006 LQT, 164861001 MIs, 164865005 MI, 164867002 OldMI, 164873001 LVH, 164884008 VEB, 164889003 AF,
164890007 AFL, 164895002 VTach, 164896001 VF, 164909002 LBBB, 164912004 PWC, 164917005 QAb, 164921003 RAb,
164930006 STIAb, 164931005 STE, 164934002 TAb, 164937009 UAb, 164942001 FQRS, 164947007 LPR, 164951009 abQRS,
195042002 IIAVB, 195060002 VPEx, 195080001 AFAFL, 195101003 WAP, 195126007 AH, 204384007 CIAHB, 233892002 AAR,
233897008 AVRT, 233917008 AVB, 251120003 ILBBB, 251139008 ALR, 251146004 LQRSV, 251164006 JPC, 251166008 AVNRT,
251168009 SVB, 251170000 BPAC, 251173003 AB, 251180001 VTrig, 251182009 VPVC, 251187003 AED, 251198002 CR,
251199005 CCR, 251200008 ICA, 251205003 PPW, 251223006 TPW, 251259000 HTV, 251266004 VPP, 251268003 AP,
253339007 RAAb, 253352002 LAA, 266249003 VH, 266257000 TIA, 270492004 IAVB, 282825002 PAF, 284470004 PAC,
314208002 RAF, 365413008 PRWP, 370365005 LVS, 413444003 AMIs, 413844008 CMI, 418818005 BRU, 425419005 IIs,
425623009 LIs, 425856008 PVT, 426177001 SB, 426183003 IIAVBII, 426434006 AnMIs, 426627000 Brady, 426648003 JTach,
426664006 AJR, 426749004 CAF, 426761007 SVT, 426783006 NSR, 426995002 JE, 427084000 STach, 427172004 PVC,
427393009 SA, 428417006 ERe, 428750005 NSSTTA, 429622005 STD, 445118002 LAnFB, 445211001 LPFB, 446358003 RAH,
446813000 LAH, 698247007 CD, 698252002 NSIVCB, 704997005 ISTD, 713422000 ATach, 713426002 IRBBB, 713427006 CRBBB,
733534002 CLBBB, 67741000119109 LAE, 67751000119106 RAHV
"""
ABBREVIATIONS: dict[str, str] = dict(pair.split() for pair in _TABLE.replace("\n", " ").split(","))

# The 26 scored classes in the order of the Challenge's weights; codes that it scores as one diagnosis share a class,
# which has the name of the first.
SCORED: tuple[tuple[str, ...], ...] = tuple(
    tuple(group.split("|"))
    for group in (
        "164889003 164890007 6374002 426627000 733534002|164909002 713427006|59118001 270492004 713426002 39732003 "
        "445118002 164947007 251146004 111975006 698252002 426783006 284470004|63593006 10370003 365413008 "
        "427172004|17338001 164917005 47665007 427393009 426177001 427084000 164934002 59931005"
    ).split()
)
SCORED_NAMES = tuple(ABBREVIATIONS[codes[0]] for codes in SCORED)
SCORED_COLUMN = {code: column for column, codes in enumerate(SCORED) for code in codes}
SCORED_POLICY = "one class for " + ", ".join(
    " and ".join(ABBREVIATIONS[code] for code in codes) for codes in SCORED if len(codes) > 1
)

MAX_HEADER = 1 << 16  # bytes; twelve signal lines and the comments take a fiftieth of it
MAX_CODES = 1000  # different codes in one data set; SNOMED CT codes of all Challenge sets together are 133
MAX_SHOWN = 50  # items listed in the card
BATCH = 1024
READERS = 16  # headers read at a time: on a network disk each costs a round trip
_CODE = re.compile(r"[1-9][0-9]{5,17}")
_AGE = re.compile(r"[+-]?[0-9]{1,6}(\.[0-9]{0,6})?")
_GAIN = re.compile(
    rb"^\S+[ \t]+\S+[ \t]+([0-9]{1,9}(?:\.[0-9]{0,9})?)(?:\([^)\s]*\))?/mv", re.MULTILINE | re.IGNORECASE
)
_SEX = {"male": 1.0, "m": 1.0, "female": 0.0, "f": 0.0}
_NOTHING = ("", "nan", "na", "n/a", "none", "unknown", "unknows", "?")


class Facts(NamedTuple):
    """What the comments of one header say.

    codes    SNOMED CT codes of the diagnoses, once each, ascending
    words    items of the list of diagnoses that are no code, in their order
    age      years, NaN where not said
    sex      1 male, 0 female, NaN where not said
    unread   of "age" and "sex" those whose text says something that was not understood
    gains    gains per millivolt of the signal lines, once each
    refused  why the header could not be read: (reason, detail)
    """

    codes: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    age: float = float("nan")
    sex: float = float("nan")
    unread: tuple[str, ...] = ()
    gains: tuple[float, ...] = ()
    refused: tuple[str, str] | None = None


def parse_comments(text: bytes) -> Facts:
    """The facts in header `text`. Never raises: what is not understood is in `words` and `unread`."""
    said: dict[str, list[str]] = {"age": [], "sex": [], "dx": []}
    for line in re.split(r"[\r\n]+", text.decode("utf-8", errors="replace")):
        line = line.strip()
        if line.startswith("#"):
            key, colon, value = line.lstrip("# \t").partition(":")
            if colon and key.strip().casefold() in said:
                said[key.strip().casefold()].append(value.strip())
    unread = []
    years, clear = _one([cell for cell in said["age"] if cell.casefold() not in _NOTHING])
    if years is not None and not _AGE.fullmatch(years):
        years, clear = None, False
    if not clear:
        unread.append("age")
    sex, clear = _one([cell.casefold() for cell in said["sex"] if cell.casefold() not in _NOTHING])
    if not clear or (sex is not None and sex not in _SEX):
        unread.append("sex")
    listed = [item.strip() for cell in said["dx"] for item in cell.split(",")]
    items = dict.fromkeys(item for item in listed if item.casefold() not in _NOTHING)
    codes = [sys.intern(item) for item in items if _CODE.fullmatch(item)]  # a hundred in all of a set's headers
    return Facts(
        codes=tuple(sorted(codes, key=int)),
        words=tuple(item for item in items if not _CODE.fullmatch(item)),
        age=age(float(years)) if years is not None else float("nan"),
        sex=_SEX.get(sex or "", float("nan")),
        unread=tuple(unread),
        gains=tuple(sorted({float(gain) for gain in _GAIN.findall(text)})),
    )


def _one(cells: list[str]) -> tuple[str | None, bool]:
    """(what all cells say, True), (None, True) where none says anything, (None, False) where they disagree."""
    return (cells[0] if cells else None, True) if len(set(cells)) < 2 else (None, False)


def read_facts(source_dir: Path, headers: Sequence[str | None]) -> list[Facts]:
    """The facts of each header (relative to `source_dir`, without ".hea"; None: there is no header), in order."""
    paths = [None if header is None else source_dir / f"{header}.hea" for header in headers]
    with ThreadPoolExecutor(READERS) as pool:
        # In batches: a pool holds what it has been given.
        batches = (pool.map(_facts, paths[i : i + BATCH]) for i in range(0, len(paths), BATCH))
        return list(track(chain.from_iterable(batches), "reading headers", total=len(paths), unit="headers"))


def _facts(path: Path | None) -> Facts:
    if path is None:
        return Facts()
    try:
        with open(path, "rb") as file:
            text = file.read(MAX_HEADER + 1)
    except OSError as error:
        return Facts(refused=("unreadable-header", f"{path}: {error.strerror or error}"))
    if len(text) > MAX_HEADER:
        return Facts(refused=("unreadable-header", f"{path} is longer than {MAX_HEADER} bytes: no header of an ECG"))
    return parse_comments(text)


def report(every: Iterable[Facts], known: Iterable[str]) -> dict[str, Any]:
    """Counts for `Source.about`: records without a diagnosis, codes that are none of `known`, and what was not read."""
    known = frozenset(known)
    unknown, words, unread = Counter[str](), Counter[str](), Counter[str]()
    without = 0
    for facts in every:
        without += not facts.codes and not facts.words
        unknown.update(code for code in facts.codes if code not in known)
        words.update(word[:40] for word in facts.words)
        unread.update(facts.unread)
    return {
        "records_without_dx": without,
        "unknown_codes": dict(_commonest(unknown)),
        "unknown_codes_policy": "counted; they say nothing of the other labels",
        "dx_items_that_are_no_code": dict(_commonest(words)),
        "dx_items_policy": "where a record has such an item, labels that it does not name are unknown (-1), not 0",
        "comments_not_understood": {key: unread[key] for key in ("age", "sex")},
        "ages_known": sum(not np.isnan(facts.age) for facts in every),
    }


def _commonest(counter: Counter[str]) -> list[tuple[str, int]]:
    return sorted(counter.items(), key=lambda pair: (-pair[1], pair[0]))[:MAX_SHOWN]


def all_codes(source_dir: Path, every: Iterable[Facts]) -> tuple[str, ...]:
    """Every code that occurs, in the order of the numbers. `DataError` for more than a set of ECG can have."""
    codes = {code for facts in every for code in facts.codes}
    if len(codes) > MAX_CODES:
        raise DataError(
            f"{source_dir}: {len(codes)} different codes in the #Dx lines, the Challenge sets have 133 together; "
            "are these their headers?"
        )
    return tuple(sorted(codes, key=int))


def code_labels(facts: Facts, column: dict[str, int], k: int) -> np.ndarray:
    """int8 [k]: 1 where a code of the record belongs to the column, else 0; -1 where that is not known."""
    absent = 0 if facts.codes and not facts.words else UNKNOWN
    labels = np.full(k, absent, np.int8)
    labels[[column[code] for code in facts.codes if code in column]] = 1
    return labels


@dataclass(frozen=True)
class Found:
    """Files of a folder by what their names say; paths relative to it, without ending, "/" between folders.

    headers  record id -> its header; `signals` record id -> every .mat file of that name
    others   headers of other names; `tables` paths (with ending) of the tables asked for
    """

    headers: dict[str, str]
    signals: dict[str, tuple[str, ...]]
    others: frozenset[str]
    tables: tuple[str, ...]

    def ids(self) -> list[str]:
        """Every record that has a header or a signal file, ascending."""
        return sorted(self.headers.keys() | self.signals.keys())


def find_records(source_dir: Path, pattern: str, tables: Sequence[str] = ()) -> Found:
    """The records named `pattern` anywhere below `source_dir`. `DataError` for a folder that cannot be read, and for
    two headers of one name.
    """
    name, headers, signals, others, found = re.compile(pattern, re.ASCII), {}, {}, set(), []

    def fail(error: OSError) -> None:
        raise DataError(f"{error.filename}: {error.strerror or error}")

    walk = os.walk(source_dir, onerror=fail)
    for folder, _, files in track(walk, f"looking through {source_dir}", unit="folders"):
        inside = Path(folder).relative_to(source_dir)
        for file in files:
            stem, ending = os.path.splitext(file)
            path = (inside / stem).as_posix()
            if file in tables:
                found.append((inside / file).as_posix())
            elif ending == ".mat" and name.fullmatch(stem):
                signals[stem] = tuple(sorted((*signals.get(stem, ()), path)))
            elif ending == ".hea" and name.fullmatch(stem):
                if stem in headers:
                    one, two = sorted((headers[stem], path))
                    raise DataError(
                        f"{source_dir}: {stem} is there twice, as {one}.hea and {two}.hea; give the folder of one copy"
                    )
                headers[stem] = path
            elif ending == ".hea":
                others.add(path)
    return Found(headers, signals, frozenset(others), tuple(sorted(found)))


class Merl(NamedTuple):
    """A split that MERL publishes: label columns, record id -> (split, labels int8 [K]), and what goes into `about`."""

    columns: tuple[str, ...]
    rows: dict[str, tuple[str, np.ndarray]]
    tables_sha256: dict[str, str]
    records: dict[str, int]


def read_merl(option: str, stem: str, key: str, apart: Sequence[str], pattern: str) -> Merl:
    """`stem`_train.csv, `stem`_val.csv and `stem`_test.csv in the folder `option` or in `option`/`stem`.

    Every column but those of `apart` is a label of 0 and 1, in the order of the files; column `key` holds the record id
    or the path of its .mat file. Source: cheliu-computation/MERL-ICML2024, finetune/data_split. Raises `UsageError`
    where `option` is no folder, `DataError` for the tables.
    """
    folder = Path(option)
    if not folder.is_dir():
        raise UsageError(f"merl={option}: no such folder; give the one that holds {stem}_train.csv")
    folder = folder / stem if (folder / stem).is_dir() else folder
    columns: tuple[str, ...] = ()
    rows: dict[str, tuple[str, np.ndarray]] = {}
    digests, counts = {}, {}
    for split in ("train", "val", "test"):
        table = read_table(folder / f"{stem}_{split}.csv")
        need_columns(table, apart)
        labels = tuple(name for name in table.columns if name not in apart)
        if columns and labels != columns:
            raise DataError(f"{table.path}: its label columns are not those of {stem}_train.csv")
        columns = labels
        for i, row in enumerate(table.rows):
            record = row[key].rsplit("/", 1)[-1].removesuffix(".mat")
            if not re.fullmatch(pattern, record, re.ASCII):
                raise DataError(f"{table.where(i)}: {key}={row[key][:60]!r} names no record of this data set")
            if record in rows:
                raise DataError(f"{table.where(i)}: {key}={row[key][:60]!r} is there twice (also in {rows[record][0]})")
            wrong = next((name for name in columns if row[name] not in ("0", "1")), None)
            if wrong is not None:
                raise DataError(f"{table.where(i)}: {wrong}={row[wrong][:60]!r} is neither 0 nor 1")
            rows[record] = split, np.array([row[name] == "1" for name in columns], np.int8)
        digests[table.path.name], counts[split] = table.digest(), len(table.rows)
    return Merl(columns, rows, digests, counts)


def where_of(header: str | None, facts: Facts, labels: dict[str, np.ndarray]) -> dict[str, Any]:
    """`Item.where` of a WFDB record for `read_records`."""
    where: dict[str, Any] = {"path": header, "labels": labels, "age": facts.age, "sex": facts.sex}
    return where if facts.refused is None else where | {"refused": facts.refused}


def read_records(
    folder: Path, repairs: tuple[str, ...], seconds: float | None, items: Sequence[Item]
) -> Iterator[Record | Refused]:
    """WFDB records below `folder`, in mV, checksums compared; the first `seconds` of each where that is not None.

    `where` is that of `where_of`, with "step" (mV) where the header's gains are known to be wrong. A header that was
    put right leaves "repaired" in `Record.meta`. Refuses what `read_wfdb` refuses, missing-file where there is no
    header, and unreadable-header where its comments could not be read.
    """
    for item in items:
        where = item.where
        try:
            if "refused" in where:
                raise Refused(*where["refused"])
            if where["path"] is None:
                raise Refused("missing-file", f"there is no {item.record_id}.hea below {folder}")
            path, step = folder / where["path"], where.get("step")
            reading = read_wfdb(path, "mV", True, repairs=repairs, millivolt_per_step=step)
        except Refused as refusal:
            yield refusal
            continue
        record = record_of(item, first_seconds(reading, seconds), "mV")
        repaired = [text.partition(": ")[2] for text in reading.comments[-1:] if text.startswith("repaired: ")]
        yield replace(record, meta=record.meta | {"repaired": repaired[0]}) if repaired else record


def first_seconds(reading: Reading, seconds: float | None) -> Reading:
    """`reading` cut after so many seconds; whole where `seconds` is None."""
    return reading if seconds is None else replace(reading, signal=reading.signal[: round(seconds * reading.rate)])
