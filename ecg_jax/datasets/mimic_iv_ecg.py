"""MIMIC-IV-ECG 1.0 as PhysioNet publishes it: 800,035 recordings of 161,352 patients, for pre-training.

The folder holds `record_list.csv` and the WFDB records that it lists below `files/`: 500 Hz, 10 s, 200 units per mV,
leads stored as I II III aVR aVF aVL V1-V6 and taken by their names. The set has no labels of its own, so without
options it has no task. `machine_measurements.csv` is not read: its sentinels (29999, 32767, -32768, 65535, "not
measurable") and the machine's reports reach no record. A filtered copy of the list is fine and is counted as such.
Invariant: every row of the list becomes one item or is counted in `skipped`; patients are never cut.

Options (`--option key=value`; files are looked for in the source folder, ".gz" is unpacked):
    icd=FILE       records_w_diag_icd10.csv of MIMIC-IV-ECG-Ext-ICD: age, sex, and its patient-wise folds as splits
    folds=A/B/C    folds (strat_fold) of train/val/test, default 0-17/18/19; others are left out. Needs icd
    codes=I48,I50  task "icd10": is there a discharge diagnosis that begins so? Unknown where none is linked. Needs icd
    patients=FILE  patients.csv of MIMIC-IV: age and sex where `icd` does not tell
"""

import hashlib
import re
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from ecg_jax.datasets import check_options
from ecg_jax.datasets.reading import read_items
from ecg_jax.datasets.source import Item, Source, pack
from ecg_jax.datasets.table import Row, age, parse_folds, stream_table
from ecg_jax.errors import DataError, UsageError
from ecg_jax.progress import track
from ecg_jax.records.record import UNKNOWN

NAME, VERSION, ID_SPACE = "mimic-iv-ecg", "1.0.0", "mimic"
OPTIONS = ("icd", "folds", "codes", "patients")
TASK = "icd10"
FOLDS = "0-17/18/19"
PUBLISHED_ROWS = 800_035
NO_ICD_ROW, OUTSIDE_FOLDS = "no row in the table of option icd", "fold outside the option folds"
# MIMIC-IV gives everybody above 89 the anchor age 91; the other sets store such hidden ages as 90.
HIDDEN_ABOVE, HIDDEN_AGE = 89.0, 90.0
_SEX = {"m": 1.0, "f": 0.0, "": np.nan, "missing": np.nan}
_CODE = re.compile(r"[A-Z][0-9][0-9A-Z]{1,5}")
_EPOCH = datetime(1970, 1, 1)


@dataclass(frozen=True)
class Study:
    """A row of the record list. `path` is relative, without suffix, None where the cell is empty; `time` as text."""

    row: Row
    study: int
    subject: int
    path: str | None
    time: str | None


@dataclass(frozen=True)
class Index:
    """Integer keys of a table, sorted, and the row each stands in."""

    key: np.ndarray
    row: np.ndarray

    def find(self, key: int) -> int:
        """The row of `key`, -1 where there is none."""
        i = int(np.searchsorted(self.key, key))
        return int(self.row[i]) if i < len(self.key) and self.key[i] == key else -1


@dataclass(frozen=True)
class Diagnoses:
    """What the ICD table says, a row per study: patient, fold, age, sex, diagnosed or not, labels int8 [n, K]."""

    path: Path
    index: Index
    subject: np.ndarray
    fold: np.ndarray
    age: np.ndarray
    sex: np.ndarray
    diagnosed: np.ndarray
    labels: np.ndarray
    sha256: str


@dataclass(frozen=True)
class Patients:
    """MIMIC-IV's patients: age in the anchor year, that year, sex."""

    index: Index
    age: np.ndarray
    year: np.ndarray
    sex: np.ndarray
    sha256: str

    def at(self, subject: int, time: str | None) -> tuple[float, float]:
        """(age, sex) of a patient at a time; NaN where unknown."""
        i = self.index.find(subject)
        if i < 0:
            return np.nan, np.nan
        years = np.nan
        if self.age[i] > HIDDEN_ABOVE:
            years = HIDDEN_AGE
        elif time:
            years = age(float(self.age[i]) + int(time[:4]) - float(self.year[i]))
        return years, float(self.sex[i])


def open_mimic_iv_ecg(source_dir: Path, options: dict[str, str]) -> Source:
    """Open the folder that holds `record_list.csv`; the module's docstring lists the options.

    Raises `UsageError` for options, `DataError` for tables. A recording whose files are missing or broken is refused
    when it is read.
    """
    check_options(NAME, options, OPTIONS)
    for key in ("codes", "folds"):
        if key in options and "icd" not in options:
            raise UsageError(f"{NAME}: {key}= needs icd=FILE, the table records_w_diag_icd10.csv")
    folds = parse_folds(options.get("folds", FOLDS))
    codes = _codes(options["codes"]) if "codes" in options else ()
    tables: dict[str, str] = {}
    icd = patients = None
    if "icd" in options:
        icd = read_diagnoses(source_dir / options["icd"], codes)
        tables[Path(options["icd"]).name] = icd.sha256
    if "patients" in options:
        patients = read_patients(source_dir / options["patients"])
        tables[Path(options["patients"]).name] = patients.sha256

    skipped: Counter[str] = Counter()
    subjects, digest, count = array("q"), hashlib.sha256(), Counter()

    def items() -> Iterator[Item]:
        for study in track(studies(source_dir, digest), "record_list.csv", unit="rows"):
            subjects.append(study.subject)
            where: dict[str, Any] = {"labels": {}}
            split, years, sex = None, np.nan, np.nan
            if icd is not None:
                i = find_study(icd, study)
                if i < 0:
                    skipped[NO_ICD_ROW] += 1
                    continue
                split = folds.get(int(icd.fold[i]))
                if split is None:
                    skipped[OUTSIDE_FOLDS] += 1
                    continue
                years, sex = float(icd.age[i]), float(icd.sex[i])
                if codes:
                    where["labels"][TASK] = icd.labels[i]
                    count["undiagnosed"] += not icd.diagnosed[i]
            if patients is not None:
                own = patients.at(study.subject, study.time)
                years, sex = (own[0] if np.isnan(years) else years), (own[1] if np.isnan(sex) else sex)
            yield item_of(study, split, years, sex, where["labels"])

    packed = pack(items())
    rows = len(subjects)
    about = {
        "licence": "see https://physionet.org/content/mimic-iv-ecg/1.0/ ; the tables of MIMIC-IV are credentialed",
        "doi": "10.13026/4nqg-sb35",
        "options": {key: Path(value).name for key, value in sorted(options.items())},
        "tables_sha256": {"record_list.csv": digest.hexdigest(), **tables},
        "rows": rows,
        "published_rows": PUBLISHED_ROWS,
        "complete": rows == PUBLISHED_ROWS,
        "patients": len(np.unique(np.array(subjects, np.int64))),
        "splits": f"strat_fold {options.get('folds', FOLDS)} of the ICD table" if icd else "by hash of the patient",
        "lead_order": "I II III aVR aVF aVL V1-V6 in the files; leads are taken by the names in the header",
        "measurements": "machine_measurements.csv and its sentinels (29999, 32767, -32768, 65535) are not read",
        "time": "shifted by the publisher, patient by patient, into the years 2097 to 2211",
        "age": "above 89 hidden by the publisher (anchor age 91), stored as 90",
        "contains": ["mimic-icu"],
        "id_space": ID_SPACE,
    }
    if codes:
        about["undiagnosed"] = count["undiagnosed"]
        about["undiagnosed_policy"] = "kept, labels of task icd10 unknown (-1): no discharge diagnosis is linked"
    tasks = {TASK: codes} if codes else {}
    return Source(NAME, VERSION, "mV", tasks, packed, partial(read_items, source_dir, "mV", True), about, dict(skipped))


def item_of(study: Study, split: Any, years: float, sex: float, labels: dict[str, np.ndarray]) -> Item:
    """The item of a study: its own number as id, the patient as group."""
    where = {"path": study.path, "patient": str(study.subject), "labels": labels}
    if study.time:
        where["time"] = study.time
    if not np.isnan(years):
        where["age"] = float(years)
    if not np.isnan(sex):
        where["sex"] = float(sex)
    return Item(str(study.study), str(study.subject), split, where)


# --------------------------------------------------------------------------------------------------- the tables


def studies(source_dir: Path, sha256: Any = None) -> Iterator[Study]:
    """The rows of `record_list.csv`. Raises `DataError`; for a study that is listed twice, after the last row."""
    path = source_dir / "record_list.csv"
    if not path.exists():
        raise DataError(f"there is no {path}; give the folder that holds record_list.csv and files/ as --source")
    seen = array("q")
    for row in stream_table(path, ("subject_id", "study_id", "ecg_time", "path"), sha256):
        time = row["ecg_time"] or None
        if time:
            seconds(row, "ecg_time")
        study = integer(row, "study_id")
        seen.append(study)
        yield Study(row, study, integer(row, "subject_id"), _inside(row), time)
    if not seen:
        raise DataError(f"{path} has a header line and no rows")
    index_of(np.array(seen, np.int64), path, "study_id")


def read_diagnoses(path: Path, codes: tuple[str, ...] = ()) -> Diagnoses:
    """`records_w_diag_icd10.csv` of MIMIC-IV-ECG-Ext-ICD 1.0.1, of which only the columns needed are kept.

    `codes` are prefixes of ICD-10-CM codes, the labels in that order; a study without any linked diagnosis ("[]" in
    all_diag_all, 41.5 % of the published rows) has them unknown. The words "missing" and nothing stand for unknown sex.
    """
    study, subject, fold = array("q"), array("q"), array("h")
    years, sexes, diagnosed, labels = array("f"), array("f"), array("b"), array("b")
    digest = hashlib.sha256()
    wanted = ("study_id", "subject_id", "strat_fold", "gender", "age", "anchor_age", "all_diag_all")
    for row in track(stream_table(path, wanted, digest), path.name, unit="rows"):
        study.append(integer(row, "study_id"))
        subject.append(integer(row, "subject_id"))
        fold.append(integer(row, "strat_fold", at_most=9999))
        hidden = age(row.number("anchor_age")) > HIDDEN_ABOVE
        years.append(HIDDEN_AGE if hidden else age(row.number("age")))
        sexes.append(sex_of(row, "gender"))
        found = _diagnoses(row)
        diagnosed.append(bool(found))
        labels.extend(any(one.startswith(code) for one in found) if found else UNKNOWN for code in codes)
    index = index_of(np.array(study, np.int64), path, "study_id")
    of_code = np.array(labels, np.int8).reshape(len(study), len(codes))
    return Diagnoses(
        path,
        index,
        np.array(subject),
        np.array(fold),
        np.array(years),
        np.array(sexes),
        np.array(diagnosed, bool),
        of_code,
        digest.hexdigest(),
    )


def find_study(icd: Diagnoses, study: Study) -> int:
    """Row of a study in the ICD table, -1 where it has none."""
    i = icd.index.find(study.study)
    if i >= 0:
        check_patient(study, int(icd.subject[i]), icd.path)
    return i


def check_patient(study: Study, subject: int, path: Path) -> None:
    """`DataError` where the table at `path` gives a study of the list to another patient."""
    if subject != study.subject:
        raise DataError(
            f"{study.row.where}: study {study.study} is of subject {study.subject}, in {path} of {subject}; the two "
            "tables are not of one release"
        )


def read_patients(path: Path) -> Patients:
    """`patients.csv` of MIMIC-IV (hosp): age at an ECG is anchor_age + year of the ECG - anchor_year."""
    subject, years, year, sexes = array("q"), array("f"), array("f"), array("f")
    digest = hashlib.sha256()
    for row in stream_table(path, ("subject_id", "gender", "anchor_age", "anchor_year"), digest):
        subject.append(integer(row, "subject_id"))
        years.append(age(row.number("anchor_age")))
        year.append(float(integer(row, "anchor_year", at_most=9999)))
        sexes.append(sex_of(row, "gender"))
    index = index_of(np.array(subject, np.int64), path, "subject_id")
    return Patients(index, np.array(years), np.array(year), np.array(sexes), digest.hexdigest())


def index_of(keys: np.ndarray, path: Path, column: str) -> Index:
    """`keys` int64 [n] of a table as an index. `DataError` naming a key that is there twice."""
    order = np.argsort(keys, kind="stable")
    key = keys[order]
    twice = np.flatnonzero(key[1:] == key[:-1])
    if len(twice):
        raise DataError(f"{path}: {column} {key[twice[0]]} is there twice; it must name one row")
    return Index(key, order)


# ----------------------------------------------------------------------------------------------------- the cells


def integer(row: Row, column: str, at_most: int = 10**15) -> int:
    """A whole number from 0 to `at_most`; "123.0" is one. `DataError` for anything else."""
    text = row.identifier(column)
    if text.isascii() and text.isdigit() and len(text) <= 16 and int(text) <= at_most:
        return int(text)
    raise DataError(f"{row.where}: {column}={row[column][:60]!r} is no whole number of at most {at_most}")


def sex_of(row: Row, column: str) -> float:
    """1 male, 0 female, NaN unknown."""
    value = _SEX.get(row[column].casefold())
    if value is None:
        raise DataError(f"{row.where}: {column}={row[column][:60]!r}, MIMIC-IV has M and F")
    return value


def seconds(row: Row, column: str) -> int:
    """A point in time such as 2180-07-23 08:44:00, in seconds (parts of a second are dropped)."""
    try:
        time = datetime.fromisoformat(row[column])
        return int((time - _EPOCH).total_seconds())  # with a time zone: TypeError
    except (ValueError, TypeError, OverflowError):
        raise DataError(f"{row.where}: {column}={row[column][:60]!r} is no time such as 2180-07-23 08:44:00") from None


def _inside(row: Row) -> str | None:
    """The path of a record, which must stay below the source folder."""
    path = row["path"]
    if not path:
        return None
    if path.startswith("/") or "\0" in path or ".." in PurePosixPath(path).parts:
        raise DataError(f"{row.where}: path={path[:60]!r} leads out of the source folder; it must be relative to it")
    return path


def _codes(text: str) -> tuple[str, ...]:
    codes = tuple(code.strip().upper().replace(".", "") for code in text.split(","))
    for code in codes:
        if not _CODE.fullmatch(code):
            raise UsageError(f"{NAME}: codes={text!r}: {code!r} is no beginning of an ICD-10 code such as I48 or I251")
    if len(set(codes)) < len(codes):
        raise UsageError(f"{NAME}: codes={text!r} names one twice")
    return codes


def _diagnoses(row: Row) -> list[str]:
    """ "['I10', 'E785']" -> its codes."""
    cell = row["all_diag_all"]
    if not cell:
        return []
    if cell[0] != "[" or cell[-1] != "]":
        raise DataError(f"{row.where}: all_diag_all={cell[:60]!r} is no list such as ['I10', 'E785']")
    found = [piece.strip().strip("'\"").strip().upper().replace(".", "") for piece in cell[1:-1].split(",")]
    if found == [""]:
        return []
    for code in found:
        if not (code.isascii() and code.isalnum()):
            raise DataError(f"{row.where}: all_diag_all={cell[:60]!r}: {code[:20]!r} is no ICD-10 code")
    return found
