"""MDS-ED's labels of intensive care on MIMIC-IV-ECG: will an emergency patient go to an ICU?

The cohort are ECGs recorded between the arrival in the emergency department and 90 minutes later. Let t be the time
from arrival to the first ICU admission of the same hospital stay: t < 1.5 h leaves the ECG out (the published table
holds -999), 1.5 h <= t <= 24 h sets both labels, t > 24 h sets ICU_stay alone, no admission none. Task `icu`:
`ICU_24H`, `ICU_stay`. The labels come from the published table, or are made again from MIMIC-IV-ED and MIMIC-IV by that
rule; the publisher's code takes the admission listed first, here it is the first in time. Nothing is assumed of how
many records there are. The source folder is that of MIMIC-IV-ECG (`record_list.csv`, `files/`).
Invariant: a study becomes one item at most, with labels by that rule; every other row of the list is counted.

Options (`--option key=value`; files are looked for in the source folder, ".gz" is unpacked):
    labels=FILE    the published table, default mds_ed.csv. Splits: general_strat_fold; of a stay, validation and test
                   take the first ECG alone (general_ecg_no_within_stay = 0)
    edstays=FILE   edstays.csv of MIMIC-IV-ED, with
    icustays=FILE  icustays.csv of MIMIC-IV: the labels are made again. Splits by hash of the patient, unless
    icd=FILE       records_w_diag_icd10.csv of MIMIC-IV-ECG-Ext-ICD gives folds, splits as above, and age; studies
                   without a diagnosis are left out, as MDS-ED does
    patients=FILE  patients.csv of MIMIC-IV, for age where the labels are made again
    folds=A/B/C    folds of train/val/test, default 0-17/18/19; others are left out
"""

import hashlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from ecg_jax.datasets import check_options
from ecg_jax.datasets.mimic_iv_ecg import (
    FOLDS,
    HIDDEN_ABOVE,
    HIDDEN_AGE,
    ID_SPACE,
    OUTSIDE_FOLDS,
    Diagnoses,
    Index,
    Study,
    check_patient,
    find_study,
    index_of,
    integer,
    item_of,
    read_diagnoses,
    read_patients,
    seconds,
    sex_of,
    studies,
)
from ecg_jax.datasets.reading import read_items
from ecg_jax.datasets.source import Item, Source, pack
from ecg_jax.datasets.table import Row, age, parse_folds, stream_table, table_columns
from ecg_jax.errors import DataError, UsageError
from ecg_jax.progress import track
from ecg_jax.records.record import UNKNOWN

NAME, VERSION = "mimic-icu", "1.0.0"
OPTIONS = ("labels", "edstays", "icustays", "icd", "patients", "folds")
LABELS = "mds_ed.csv"
TASKS = {"icu": ("ICU_24H", "ICU_stay")}
COHORT, EARLY, DAY = 90 * 60, 90 * 60, 24 * 3600  # s after arrival: an ECG counts, an ICU stay is early, within a day
EXCLUDED = -999
# Why a study is left out.
NOT_IN_COHORT = "not in the cohort"
TOO_EARLY = "ICU within 1.5 h"
NO_LABEL = "no ICU label"
NOT_FIRST = "not the first ECG of its stay (validation and test)"
NO_DIAGNOSIS = "no diagnosis"
SPLITS = ("train", "val", "test")

# role -> column of the published table; its code once wrote capitals, the release has none, so case does not count.
_COLUMNS = {
    "study": "general_study_id",
    "row": "general_data",
    "subject": "general_subject_id",
    "fold": "general_strat_fold",
    "number": "general_ecg_no_within_stay",
    "day": "deterioration_icu_24h",
    "stay": "deterioration_icu_stay",
    "age": "demographics_age",
    "anchor_age": "general_anchor_age",
    "sex": "demographics_gender",
}
_OPTIONAL = ("study", "row", "age", "anchor_age", "sex")
# What is to become of a study (row n of the list): its item, or why it is left out; the same of labelled studies that
# the list lacks; facts for the card.
_Mode = tuple[Callable[[Study, int], str | Item], Callable[[], Iterator[str | Item]], dict[str, Any]]
_SEX = {"1": 1.0, "1.0": 1.0, "0": 0.0, "0.0": 0.0, "m": 1.0, "f": 0.0, "": np.nan, "nan": np.nan}


def open_mimic_icu(source_dir: Path, options: dict[str, str]) -> Source:
    """Open the folder of MIMIC-IV-ECG with the labels; the module's docstring lists the options.

    Raises `UsageError` for options, `DataError` for tables. A labelled study that the list of records lacks becomes a
    refusal ("missing-file") when it is read.
    """
    check_options(NAME, options, OPTIONS)
    folds = parse_folds(options.get("folds", FOLDS))
    again = "edstays" in options or "icustays" in options
    if again:
        if "labels" in options:
            raise UsageError(f"{NAME}: labels= is the published table; edstays= and icustays= make the labels again")
        if not ("edstays" in options and "icustays" in options):
            raise UsageError(f"{NAME}: edstays= and icustays= are needed together")
        if "folds" in options and "icd" not in options:
            raise UsageError(f"{NAME}: folds= needs icd=FILE, whose folds they are, where the labels are made again")
    elif "icd" in options or "patients" in options:
        raise UsageError(f"{NAME}: icd= and patients= go with edstays= and icustays=; the published table has its own")

    digest, skipped = hashlib.sha256(), Counter()
    judge, rest, about = (_rebuilt if again else _published)(source_dir, options, folds)

    def items() -> Iterator[Item]:
        listed = track(studies(source_dir, digest), "record_list.csv", unit="rows")
        for found in chain((judge(study, n) for n, study in enumerate(listed)), rest()):
            if isinstance(found, str):
                skipped[found] += 1
            else:
                yield found

    packed = pack(items())
    about["tables_sha256"]["record_list.csv"] = digest.hexdigest()
    about |= {
        "licence": "PhysioNet Credentialed Health Data Licence (physionet.org/content/multimodal-emergency-benchmark)",
        "options": {key: Path(value).name for key, value in sorted(options.items())},
        "rule": "t = first ICU intime of the hospital stay - ED intime; < 1.5 h excluded, <= 24 h both, later ICU_stay",
        "age": "above 89 hidden by the publisher (anchor age 91), stored as 90",
        "contains": ["mimic-iv-ecg"],  # its recordings, under other labels: the two must count as one in any lineage
        "id_space": ID_SPACE,
    }
    return Source(NAME, VERSION, "mV", TASKS, packed, partial(read_items, source_dir, "mV", True), about, dict(skipped))


def icu_labels(arrival: int, admission: int | None) -> tuple[int, int] | None:
    """(ICU_24H, ICU_stay) from the times, in seconds, of arrival and of the first admission to an ICU; None: excluded.

    An admission before the arrival is an early one.
    """
    if admission is None:
        return 0, 0
    if admission - arrival < EARLY:
        return None
    return int(admission - arrival <= DAY), 1


# ---------------------------------------------------------------------------------------- the published table


@dataclass(frozen=True)
class _Published:
    index: Index
    labels: np.ndarray  # int16 [n, 2], EXCLUDED and UNKNOWN among the values
    subject: np.ndarray
    fold: np.ndarray
    number: np.ndarray
    age: np.ndarray
    sex: np.ndarray

    def split(self, i: int, folds: dict[int, str]) -> str:
        """The split of row i, or why it is left out."""
        if (self.labels[i] == EXCLUDED).all():
            return TOO_EARLY
        if (self.labels[i] < 0).all():
            return NO_LABEL
        split = folds.get(int(self.fold[i]), OUTSIDE_FOLDS)
        return NOT_FIRST if split in ("val", "test") and self.number[i] != 0 else split


def _published(source_dir: Path, options: dict[str, str], folds: dict[int, str]) -> _Mode:
    path = source_dir / options.get("labels", LABELS)
    if not path.exists():
        raise DataError(
            f"there is no {path}; give the published table as labels=FILE, or edstays=FILE and icustays=FILE to make "
            "the labels again"
        )
    table, by_study, about = _read_published(path)
    used = np.zeros(len(table.subject), bool)

    def judge(study: Study, n: int) -> str | Item:
        i = table.index.find(study.study if by_study else n)
        if i < 0:
            return NOT_IN_COHORT
        used[i] = True
        check_patient(study, int(table.subject[i]), path)
        split = table.split(i, folds)
        if split not in SPLITS:
            return split
        labels = np.maximum(table.labels[i], UNKNOWN).astype(np.int8)
        return item_of(study, split, float(table.age[i]), float(table.sex[i]), {"icu": labels})

    def rest() -> Iterator[str | Item]:
        """Labelled studies that the list does not have: there is no file to read."""
        if not used.any():
            raise DataError(f"{path}: no row of it is in record_list.csv; is it the table of MIMIC-IV-ECG's ECGs?")
        lost = np.flatnonzero(~used[table.index.row])
        about["labelled_without_recording"] = len(lost)
        for key, i in zip(table.index.key[lost].tolist(), table.index.row[lost].tolist(), strict=True):
            split, group = table.split(i, folds), str(table.subject[i])
            where = {"path": None, "patient": group, "labels": {}}
            yield Item(str(key) if by_study else f"row-{key}", group, split, where) if split in SPLITS else split

    return judge, rest, about


def _read_published(path: Path) -> tuple[_Published, bool, dict[str, Any]]:
    """The columns needed of a table with some 1,900; joined by study, or else by the row of the list of records."""
    spelled = _spelled(path)
    if "study" not in spelled and "row" not in spelled:
        raise DataError(f"{path}: neither general_study_id nor general_data tells which ECG a row is about")
    by_study, digest = "study" in spelled, hashlib.sha256()
    key, subject, fold, number = array("q"), array("q"), array("h"), array("f")
    values, years, sexes = array("h"), array("f"), array("f")
    for row in track(stream_table(path, spelled.values(), digest), path.name, unit="rows"):
        key.append(integer(row, spelled["study" if by_study else "row"]))
        subject.append(integer(row, spelled["subject"]))
        fold.append(integer(row, spelled["fold"], at_most=9999))
        number.append(row.number(spelled["number"]))  # -1 or nothing is no stay, so never its first ECG
        day, stay = (_value(row, spelled[role]) for role in ("day", "stay"))
        if day == 1 and stay == 0:
            raise DataError(f"{row.where}: {spelled['day']} is 1 and {spelled['stay']} 0, which cannot be")
        values.extend((day, stay))
        hidden = "anchor_age" in spelled and age(row.number(spelled["anchor_age"])) > HIDDEN_ABOVE
        own = age(row.number(spelled["age"])) if "age" in spelled else np.nan
        years.append(HIDDEN_AGE if hidden else own)
        sexes.append(_sex(row, spelled["sex"]) if "sex" in spelled else np.nan)
    labels = np.array(values, np.int16).reshape(-1, 2)
    # An ECG within 90 minutes of two arrivals is there twice.
    keys, first, of_row = np.unique(np.array(key, np.int64), return_index=True, return_inverse=True)
    rows, which = np.nonzero(labels != labels[first[of_row]])
    labels[first[of_row[rows]], which] = UNKNOWN
    columns = [np.array(column) for column in (subject, fold, number, years, sexes)]
    table = _Published(Index(keys, first), labels, *columns)
    about: dict[str, Any] = {
        "labels_from": "the published table",
        "splits": spelled["fold"],
        "tables_sha256": {path.name: digest.hexdigest()},
        "rows": len(key),
        "studies": len(keys),
        "joined_by": spelled["study" if by_study else "row"],
        "listed_again": len(key) - len(keys),
        "listed_again_policy": "a study's first row counts; a label on which its rows disagree is unknown (-1)",
    }
    return table, by_study, about


def _spelled(path: Path) -> dict[str, str]:
    """role -> the table's own spelling of its column. `DataError` where one is missing or two differ by case alone."""
    spellings: dict[str, list[str]] = {}
    for name in table_columns(path):
        spellings.setdefault(name.casefold(), []).append(name)
    found = {}
    for role, name in _COLUMNS.items():
        names = spellings.get(name, [])
        if len(names) > 1:
            raise DataError(f"{path}: columns {names[0]!r} and {names[1]!r} differ by case alone; remove one")
        if names:
            found[role] = names[0]
        elif role not in _OPTIONAL:
            raise DataError(f"{path}: no column {name!r}; labels= is to be the table mds_ed.csv of MDS-ED")
    return found


def _value(row: Row, column: str) -> int:
    value = row.number(column)
    if np.isnan(value):
        return UNKNOWN
    if value not in (0.0, 1.0, EXCLUDED):
        raise DataError(f"{row.where}: {column}={row[column][:60]!r}, MDS-ED has 0, 1 and -999")
    return int(value)


def _sex(row: Row, column: str) -> float:
    value = _SEX.get(row[column].casefold())
    if value is None:
        raise DataError(f"{row.where}: {column}={row[column][:60]!r}, MDS-ED has 1 (male) and 0")
    return value


# ---------------------------------------------------------------------------------------- the labels made again


@dataclass(frozen=True)
class Stays:
    """Emergency stays, sorted by patient, arrival and number: all int64 [n] but `sex`; hadm -1 where not admitted."""

    subject: np.ndarray
    arrival: np.ndarray
    hadm: np.ndarray
    sex: np.ndarray
    sha256: str

    def of(self, study: Study) -> int:
        """The stay in whose first 90 minutes a study was made, the later one of two; -1 where there is none."""
        if not study.time:
            return -1
        time = seconds(study.row, "ecg_time")
        first, last = np.searchsorted(self.subject, [study.subject, study.subject + 1])
        i = int(first + np.searchsorted(self.arrival[first:last], time, side="right")) - 1
        return i if i >= first and time - self.arrival[i] <= COHORT else -1


def read_stays(path: Path) -> Stays:
    """`edstays.csv` of MIMIC-IV-ED 2.2."""
    subject, arrival, hadm, stay, sexes = array("q"), array("q"), array("q"), array("q"), array("f")
    digest = hashlib.sha256()
    for row in stream_table(path, ("subject_id", "hadm_id", "stay_id", "intime", "gender"), digest):
        subject.append(integer(row, "subject_id"))
        hadm.append(integer(row, "hadm_id") if row["hadm_id"] else -1)
        stay.append(integer(row, "stay_id"))
        arrival.append(seconds(row, "intime"))
        sexes.append(sex_of(row, "gender"))
    columns = [np.array(column) for column in (subject, arrival, hadm, sexes)]
    index_of(np.array(stay, np.int64), path, "stay_id")
    order = np.lexsort((np.array(stay, np.int64), columns[1], columns[0]))
    return Stays(*(column[order] for column in columns), digest.hexdigest())


def read_admissions(path: Path) -> tuple[dict[int, int], str]:
    """`icustays.csv` of MIMIC-IV: hospital stay -> its first ICU admission (s), whatever the order of the rows."""
    first: dict[int, int] = {}
    digest = hashlib.sha256()
    for row in stream_table(path, ("hadm_id", "intime"), digest):
        hadm, time = integer(row, "hadm_id"), seconds(row, "intime")
        first[hadm] = min(time, first.get(hadm, time))
    return first, digest.hexdigest()


def _rebuilt(source_dir: Path, options: dict[str, str], folds: dict[int, str]) -> _Mode:
    stays = read_stays(source_dir / options["edstays"])
    admissions, sha256 = read_admissions(source_dir / options["icustays"])
    tables = {Path(options["edstays"]).name: stays.sha256, Path(options["icustays"]).name: sha256}
    icd = patients = None
    if "icd" in options:
        icd = read_diagnoses(source_dir / options["icd"])
        tables[Path(options["icd"]).name] = icd.sha256
    if "patients" in options:
        patients = read_patients(source_dir / options["patients"])
        tables[Path(options["patients"]).name] = patients.sha256
    first = _first_of_stays(source_dir, stays) if icd is not None else None

    def judge(study: Study, n: int) -> str | Item:
        i = stays.of(study)
        if i < 0:
            return NOT_IN_COHORT
        hadm = int(stays.hadm[i])
        labels = icu_labels(int(stays.arrival[i]), admissions.get(hadm) if hadm >= 0 else None)
        if labels is None:
            return TOO_EARLY
        split, years = None, np.nan
        if icd is not None:
            found = _from_icd(icd, study, folds)
            if isinstance(found, str):
                return found
            split, years = found
            if split != "train" and study.study not in first:
                return NOT_FIRST
        if patients is not None and np.isnan(years):
            years = patients.at(study.subject, study.time)[0]
        return item_of(study, split, years, float(stays.sex[i]), {"icu": np.array(labels, np.int8)})

    about = {
        "labels_from": "edstays and icustays, by the rule",
        "tables_sha256": tables,
        "diagnoses": "studies without a diagnosis left out" if icd else "not known: studies without one are kept",
        "splits": "strat_fold" if icd else "by hash of the patient; every ECG of a stay in every split",
    }
    return judge, lambda: iter(()), about


def _first_of_stays(source_dir: Path, stays: Stays) -> set[int]:
    """The studies that are the first in the 90 minutes of their stay; the smaller number where two were at one time."""
    first: dict[int, tuple[int, int]] = {}
    for study in studies(source_dir):
        i = stays.of(study)
        if i >= 0:
            now = (seconds(study.row, "ecg_time"), study.study)
            first[i] = min(now, first.get(i, now))
    return {study for _, study in first.values()}


def _from_icd(icd: Diagnoses, study: Study, folds: dict[int, str]) -> str | tuple[str, float]:
    """Why a study is left out, or its split and age."""
    i = find_study(icd, study)
    if i < 0 or not icd.diagnosed[i]:
        return NO_DIAGNOSIS
    split = folds.get(int(icd.fold[i]))
    return OUTSIDE_FOLDS if split is None else (split, float(icd.age[i]))
