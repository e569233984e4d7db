"""Chapman-Shaoxing-Ningbo (PhysioNet ecg-arrhythmia 1.0.0): WFDBRecords/<2 digits>/<3 digits>/JS#####.{mat,hea}.

Any tree of JS##### records is taken, so the folders chapman_shaoxing and ningbo of the Challenge 2021 as well.
Diagnoses are SNOMED CT codes in the header (`#Dx`), read code by code. Tasks: `snomed`, every code that occurs, in the
order of the code numbers, named by the acronym of ConditionNames_SNOMED-CT.csv (without that file by the copy of its
acronyms kept here; the first, where a code has several), or "SNOMED:<code>" for the many codes outside it; and
`scored`, the 26 classes of the Challenge 2021, codes that it takes for one diagnosis put together. A record without
codes has unknown labels. The acronyms mislead: AF is atrial FLUTTER (AFIB is fibrillation), ST is sinus TACHYCARDIA,
SA is sinus irregularity, STE is a changed ST interval (ST elevation is STTU). The Ningbo part (JS10647 and up) has no
code of fibrillation at all and 7,615 of flutter, so the two cannot be told apart there.

Option: `merl` = folder of the CSV files that MERL publishes (chapman_train.csv, chapman_val.csv, chapman_test.csv).
Their records, splits and 38 label columns are then taken as published, in the task `merl`, beside the two other tasks;
records that they do not list are left out. They list half of the release and have no column for SB, the commonest
rhythm; labels were set where an acronym is a part of another (AF in AFIB, ST in STTC, VB in AVB), as `about` repeats.

Traps: `#Dx` may end in a comma or hold empty items; age 0 is a placeholder; two headers lost a line end (JS01052 and
JS23074, the latter also misnamed S23074.hea) and are put right where file and checksums prove it, else refused by name;
NaN marks invalid samples of some hundred Ningbo records; leads may be dead; some recordings are there twice, which the
converter finds by their content. There are no patient ids ("one record per patient" is a claim): a recording is its own
group. Invariant: labels depend on the headers and tables alone; a code is compared whole, never as a part of a text.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from ecg_jax.datasets import check_options
from ecg_jax.datasets.snomed import (
    SCORED_COLUMN,
    SCORED_NAMES,
    SCORED_POLICY,
    Found,
    all_codes,
    code_labels,
    find_records,
    read_facts,
    read_merl,
    read_records,
    report,
    where_of,
)
from ecg_jax.datasets.source import Item, Source, pack
from ecg_jax.datasets.table import Table, read_table
from ecg_jax.errors import DataError

PATTERN = r"JS\d{5}"
REPAIRS = ("merged-first-line", "record-name-suffix")
CODE_TABLE = "ConditionNames_SNOMED-CT.csv"
MERL_COLUMNS = 38

# Code and (first) acronym in ConditionNames_SNOMED-CT.csv of the data set, for folders that come without it.
_TABLE = """
11157007 VB, 13640000 VFW, 17338001 VPB, 27885002 3AVB, 28189009 2AVB2, 39732003 ALS, 47665007 ARS, 54016002 2AVB1,
59118001 RBBB, 59931005 TWO, 74390002 WPW, 75532003 VEB, 89792004 RVH, 164865005 MI, 164873001 LVH, 164889003 AFIB,
164890007 AF, 164909002 LBBB, 164912004 PWC, 164917005 AQW, 164930006 STE, 164931005 STTU, 164934002 TWC,
164937009 UW, 164942001 FQRS, 164947007 PRIE, 195042002 2AVB, 195060002 VPE, 195101003 WAVN, 233896004 AVNRT,
233897008 AVRT, 233917008 AVB, 251146004 LVQRSAL, 251147008 LVQRSLL, 251148003 LVQRSCL, 251164006 JPT, 251173003 ABI,
251180001 VET, 251198002 CR, 251199005 CCR, 270492004 1AVB, 284470004 APB, 426177001 SB, 426761007 SVT, 426783006 SR,
426995002 JEB, 427084000 ST, 427393009 SA, 428417006 ERV, 428750005 STTC, 429622005 STDD, 446358003 RAH,
698252002 IDC, 713422000 AT, 111975006 QTIE
"""
ACRONYMS: dict[str, str] = dict(pair.split() for pair in _TABLE.replace("\n", " ").split(","))


def open_csn(source_dir: Path, options: dict[str, str]) -> Source:
    """Open the folder that holds `WFDBRecords/` (or any tree of JS#####.hea and .mat) and the table of code names.

    Raises `UsageError` for options, `DataError` for a folder without such records, with one of them twice, or with a
    malformed table. A record that lacks a file, or whose files are broken beyond repair, is refused when it is read.
    """
    check_options("csn", options, ("merl",))
    found = _find(source_dir)
    ids = found.ids()
    if not ids:
        raise DataError(f"{source_dir}: no JS#####.hea in it or below; give the folder that holds WFDBRecords")
    acronyms, tables = _acronyms(source_dir, found)
    about: dict[str, Any] = {}
    splits: dict[str, str] = {}
    published: dict[str, np.ndarray] = {}
    tasks: dict[str, tuple[str, ...]] = {"scored": SCORED_NAMES}
    skipped = {"records of another data set": len(found.others)} if found.others else {}
    if "merl" in options:
        merl = read_merl(options["merl"], "chapman", "ecg_path", ("ecg_path", "age", "diagnose"), PATTERN)
        if len(merl.columns) != MERL_COLUMNS:
            labels = f"{len(merl.columns)} label columns in chapman_train.csv, MERL has {MERL_COLUMNS}"
            raise DataError(f"merl={options['merl']}: {labels}")
        splits = {record: split for record, (split, _) in merl.rows.items()}
        published = {record: labels for record, (_, labels) in merl.rows.items()}
        tasks["merl"] = merl.columns
        skipped["not in MERL's tables"] = sum(record not in splits for record in ids)
        ids = sorted(splits)
        tables |= merl.tables_sha256
        about |= _merl_about(merl.records, published)
    headers = [found.headers.get(record) for record in ids]
    every = [f._replace(age=f.age if f.age > 0 else float("nan")) for f in read_facts(source_dir, headers)]
    codes = all_codes(source_dir, every)
    names = tuple(acronyms.get(code, f"SNOMED:{code}") for code in codes)
    if codes:
        tasks["snomed"] = _distinct(source_dir, names, codes)
    column = {code: i for i, code in enumerate(codes)}

    def items() -> Iterator[Item]:
        for record, header, facts in zip(ids, headers, every, strict=True):
            labels = {"scored": code_labels(facts, SCORED_COLUMN, len(SCORED_NAMES))}
            if published:
                labels["merl"] = published[record]
            if codes:
                labels["snomed"] = code_labels(facts, column, len(codes))
            yield Item(record, record, splits.get(record), where_of(header, facts, labels))

    return Source(
        name="csn",
        version="1.0.0",
        unit="mV",
        tasks=tasks,
        items=pack(items()),
        read=partial(read_records, source_dir, REPAIRS, None),
        about={
            "licence": "CC BY 4.0",
            "doi": "10.13026/wgex-er52",
            "tables_sha256": tables,
            "records": len(ids),
            "codes": dict(zip(names, codes, strict=True)),
            "acronyms": f"of {CODE_TABLE}" + ("" if CODE_TABLE in tables else ", as kept in this package"),
            "acronyms_policy": "the first where a code has several; AF is flutter, ST tachycardia, SA irregularity",
            "scored": SCORED_POLICY,
            "age": "0 is a placeholder and unknown here",
            "misnamed_headers": sorted(h for r, h in found.headers.items() if PurePosixPath(h).name != r),
            "groups": "no patient ids are published: each recording is its own group",
            "contained_in": "the PhysioNet/CinC Challenge 2021, under the same names; JS00001-JS10646 also in figshare "
            "4560497",
        }
        | about
        | report(every, acronyms),
        skipped={reason: count for reason, count in skipped.items() if count},
    )


def _find(source_dir: Path) -> Found:
    """The records; a signal file without its header takes one misnamed beside it (JS23074.mat with S23074.hea)."""
    found = find_records(source_dir, PATTERN, (CODE_TABLE,))
    headers, others = dict(found.headers), set(found.others)
    for record in found.signals.keys() - headers.keys():
        for signal in found.signals[record]:
            misnamed = PurePosixPath(signal).with_name(record[1:]).as_posix()
            if misnamed in others:
                headers[record] = misnamed
                others.remove(misnamed)
                break
    return Found(headers, found.signals, frozenset(others), found.tables)


def _acronyms(source_dir: Path, found: Found) -> tuple[dict[str, str], dict[str, str]]:
    """(code -> acronym, {file name: sha256} of the table they are from)."""
    paths = [source_dir / path for path in found.tables]
    if (
        not paths
        and source_dir.resolve().name == "WFDBRecords"
        and (source_dir.resolve().parent / CODE_TABLE).is_file()
    ):
        paths = [source_dir.resolve().parent / CODE_TABLE]
    if not paths:
        return ACRONYMS, {}
    tables = [read_table(path) for path in paths]
    if len({table.digest() for table in tables}) > 1:
        raise DataError(f"{paths[0]} and {paths[1]} differ; leave one of them")
    return _code_names(tables[0]), {CODE_TABLE: tables[0].digest()}


def _code_names(table: Table) -> dict[str, str]:
    # Copies of the file spell "Acronym Name" with and without the blank.
    plain = {name.replace(" ", "").casefold(): name for name in table.columns}
    for wanted in ("acronymname", "snomed_ct"):
        if wanted not in plain:
            raise DataError(
                f"{table.path}: no column {'Acronym Name' if wanted == 'acronymname' else 'Snomed_CT'!r}; "
                f"columns are {', '.join(table.columns)}"
            )
    acronyms: dict[str, str] = {}
    for i, row in enumerate(table.rows):
        code, acronym = row[plain["snomed_ct"]], row[plain["acronymname"]]
        if not (code.isascii() and code.isdecimal()) or not acronym:
            raise DataError(
                f"{table.where(i)}: Snomed_CT={code!r} with acronym {acronym!r}: a code and a name are needed"
            )
        acronyms.setdefault(code, acronym)
    return acronyms


def _distinct(source_dir: Path, names: tuple[str, ...], codes: tuple[str, ...]) -> tuple[str, ...]:
    first: dict[str, str] = {}
    for name, code in zip(names, codes, strict=True):
        if name in first:
            raise DataError(f"{source_dir}: {CODE_TABLE} calls both {first[name]} and {code} {name!r}; correct it")
        first[name] = code
    return names


def _merl_about(records: dict[str, int], published: dict[str, np.ndarray]) -> dict[str, Any]:
    return {
        "merl_records": records,
        "merl_records_without_positive": sum(not labels.any() for labels in published.values()),
        "merl_defects": [
            "a record is left out when any of its codes is missing from the table of code names, half of the set",
            "no column for SB, the commonest rhythm; LVQRSAL, IDC, VPE, VFW, VET, AVRT, RAH, FQRS, JPT, ABI, 3AVB",
            "labels are substring tests on joined acronyms: AF is set by AFIB, ST by STTC, STDD, STE and STTU, "
            "VB by AVB, AVB by 1AVB and 2AVB, SA by LVQRSAL, CR by CCR, 2AVB by 2AVB1",
            "the split is random, not by hospital",
        ],
        "merl_policy": "labels and splits as published; the tasks snomed and scored are read from the headers",
    }
