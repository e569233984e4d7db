"""EchoNext 1.1 as PhysioNet publishes it: 100,000 ECGs with what an echocardiogram found, structural heart disease.

The folder holds `echonext_metadata_100k.csv` (in any case) and `EchoNext_{train,val,test}_waveforms.npy`, (N, 1, 2500,
12) at 250 Hz without a unit: baseline removed, clipped and standardised by the publisher. A row of a waveform file is
found by its place: the rows of the table with that split, in their order. That is checked (counts; the heart rate that
the table states against the one detected in some 200 rows of every split), as is the standard order of the leads, which
no file states. Tasks: `shd` (the composite) and `echo` (its eleven parts).

A flag of 0 may mean that nobody measured: it is unknown (-1) where its measurement is blank. The composite stays as
published: 0 means that the echocardiogram found none of it, even where single values are not given. The split
`no_split` holds earlier ECGs of validation and test patients: it is never converted. The SD of each lead, sampled,
tells whether the leads were scaled one by one. Invariant: every row of the table is one item or counted in `skipped`.

Options (`--option key=value`):
    splits=A,B       of train, val, test; default all three. Only their waveform files are needed
    version=1.1.0    the release, which no file states
"""

import hashlib
import io
import math
import re
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ecg_jax.datasets import check_options
from ecg_jax.datasets.reading import record_of
from ecg_jax.datasets.source import Item, Source, pack
from ecg_jax.datasets.table import Row, age, stream_table, table_columns
from ecg_jax.errors import DataError, UsageError
from ecg_jax.progress import track
from ecg_jax.records.leads import LEADS
from ecg_jax.records.preprocess import RATE as STORED_RATE
from ecg_jax.records.preprocess import prepare_many
from ecg_jax.records.readers.reading import settle
from ecg_jax.records.record import UNKNOWN, Prepared, Record, Refused

NAME = "echonext"
OPTIONS = ("splits", "version")
TABLE = "echonext_metadata_100k.csv"
SPLITS = ("train", "val", "test")
NO_SPLIT = "no_split"
RATE, SAMPLES = 250, 2500
HEADER = 1 << 16  # bytes at the start of a waveform file, the header among them
SHD = "shd_moderate_or_greater_flag"
# Flag -> the measurements it is made of; the wall is the thicker of two, so that a thin one alone proves nothing.
FLAGS: dict[str, tuple[str, ...]] = {
    "lvef_lte_45_flag": ("lvef_value",),
    "lvwt_gte_13_flag": ("ivs_measurement", "lvpw_measurement"),
    "aortic_stenosis_moderate_or_greater_flag": ("aortic_stenosis_value",),
    "aortic_regurgitation_moderate_or_greater_flag": ("aortic_regurgitation_value",),
    "mitral_regurgitation_moderate_or_greater_flag": ("mitral_regurgitation_value",),
    "tricuspid_regurgitation_moderate_or_greater_flag": ("tricuspid_regurgitation_value",),
    "pulmonary_regurgitation_moderate_or_greater_flag": ("pulmonary_regurgitation_value",),
    "rv_systolic_dysfunction_moderate_or_greater_flag": ("rv_systolic_function_value",),
    "pericardial_effusion_moderate_large_flag": ("pericardial_effusion_value",),
    "pasp_gte_45_flag": ("pasp_value",),
    "tr_max_gte_32_flag": ("tr_max_velocity_value",),
}
TASKS = {"shd": (SHD,), "echo": tuple(FLAGS)}
_NEEDED = ("ecg_key", "patient_key", "split", *FLAGS, SHD)
_RATE_COLUMN = "ventricular_rate"
_OPTIONAL = ("age_at_ecg", "sex", "acquisition_year", _RATE_COLUMN)
_BITS = {"0": 0, "1": 1, "0.0": 0, "1.0": 1, "false": 0, "true": 1, "": UNKNOWN, "nan": UNKNOWN}
_SEX = {"male": 1.0, "female": 0.0, "1": 1.0, "0": 0.0, "1.0": 1.0, "0.0": 0.0, "": math.nan, "nan": math.nan}

SAMPLED = 200  # rows of a split that are looked at on opening
ENOUGH = 20  # fewer of them prove nothing
NEAR = 0.10  # a detected rate this near the stated one agrees
AGREE = 0.60  # share that must: neighbouring rows of one patient would reach some 0.4, strangers 0.2
CORRELATED = 0.5  # rank correlation that must be reached where the stated rates vary
VARIED = 5.0  # beats per minute, SD of the stated rates
EXPLAINED = 0.5  # share of a derived limb lead that I and II must explain; wrong orders also have wrong signs
SIGNS = {"III": (-1, 1), "aVR": (-1, -1), "aVL": (1, -1), "aVF": (-1, 1)}
EVEN = 1.2  # ratio of the largest to the smallest SD of a lead below which leads were scaled one by one


@dataclass(frozen=True)
class Waveforms:
    """A waveform file: where its rows begin and how its numbers are stored. Rows are read one by one."""

    path: Path
    rows: int
    offset: int
    dtype: str

    def row(self, file: BinaryIO, i: int) -> tuple[np.ndarray, bytes]:
        """Row i of the opened file as float32 [2500, 12], and its sha256. Raises `Refused`."""
        dtype = np.dtype(self.dtype)
        size = SAMPLES * len(LEADS) * dtype.itemsize
        try:
            file.seek(self.offset + i * size)
            data = file.read(size)
        except OSError as error:
            raise Refused("unreadable-signal", f"{self.path}: row {i}: {error.strerror or error}") from None
        if len(data) < size:
            raise Refused("truncated", f"{self.path}: row {i} holds {len(data)} of its {size} bytes; download it again")
        with np.errstate(over="ignore", invalid="ignore"):
            signal = np.frombuffer(data, dtype).reshape(SAMPLES, len(LEADS)).astype(np.float32)
        return signal, hashlib.sha256(data).digest()


def open_echonext(source_dir: Path, options: dict[str, str]) -> Source:
    """Open the folder that holds the table and the waveform files; the module's docstring lists the options.

    Raises `UsageError` for options; `DataError` for the table, for files that do not fit it, and where the heart rates
    say that signals and labels are not aligned.
    """
    check_options(NAME, options, OPTIONS)
    wanted = _wanted(options.get("splits"))
    version = options.get("version", "1.1.0")
    if not re.fullmatch(r"\d+\.\d+\.\d+", version):
        raise UsageError(f"{NAME}: version={version!r} is not of the form 1.1.0")
    path = _table(source_dir)
    files = {split: _waveforms(source_dir / f"EchoNext_{split}_waveforms.npy") for split in wanted}
    present = table_columns(path)
    columns = [*_NEEDED, *dict.fromkeys(one for ones in (*FLAGS.values(), _OPTIONAL) for one in ones if one in present)]
    unmeasured = [flag for flag, values in FLAGS.items() if not set(values) <= set(present)]
    known = frozenset(present)

    digest, count, skipped = hashlib.sha256(), Counter(), Counter()
    stated = {split: array("f") for split in wanted}

    def items() -> Iterator[Item]:
        seen: set[str] = set()
        for row in track(stream_table(path, columns, digest), path.name, unit="rows"):
            key, split = row.identifier("ecg_key"), row["split"]
            if not key or key in seen:
                raise DataError(f"{row.where}: ecg_key {key[:60]!r} is {'there twice' if key else 'empty'}")
            seen.add(key)
            if split not in (*SPLITS, NO_SPLIT):
                raise DataError(f"{row.where}: split={split[:60]!r}, EchoNext has {', '.join((*SPLITS, NO_SPLIT))}")
            if split not in stated:
                skipped[split if split == NO_SPLIT else f"{split}: not asked for"] += 1
                continue
            stated[split].append(row.number(_RATE_COLUMN) if _RATE_COLUMN in present else math.nan)
            yield _item(row, split, len(stated[split]) - 1, known, count)

    packed = pack(items())
    for split in wanted:
        if files[split].rows != len(stated[split]):
            raise DataError(
                f"{files[split].path} has {files[split].rows} rows, {path.name} {len(stated[split])} of split {split}; "
                "the two are not of one release, or one is incomplete"
            )
    checks = {
        split: _check(files[split], stated[split], path) for split in track(wanted, "checking rows against labels")
    }
    about = {
        "licence": "PhysioNet Restricted Health Data Licence 1.5.0: no re-sharing, not even of identifiers",
        "doi": "10.13026/3ykd-bf14",
        "options": dict(sorted(options.items())),
        "tables_sha256": {path.name: digest.hexdigest()},
        "files": {one.path.name: {"rows": one.rows, "dtype": one.dtype} for one in files.values()},
        "checks": checks,
        "negatives_unmeasured": {flag: count[flag] for flag in FLAGS},
        "flags_without_measurement_column": unmeasured,
        "unmeasured_policy": "a flag of 0 whose measurement is blank is unknown (-1); 'presumed none' is 0",
        "composite_policy": "as published: 0 where the echo was negative, even if more than a year after the ECG",
        "composite_negatives_without_any_measurement": count[SHD],
        "no_split_policy": "earlier ECGs of validation and test patients: never converted",
        "lead_order": "not stated by the publisher; standard, checked on a sample by the limb leads' algebra",
        "constant_filler": "629 published records hold 2.5 to 5 s of signal a lead, then a constant: quality bit flat",
        "clipping": "by the publisher, at the 0.1 and 99.9 percentiles: tall beats may set the quality bit rail",
        "age": "capped at 90 by the publisher",
    }
    return Source(NAME, version, "z", TASKS, packed, partial(_read, files), about, dict(skipped))


# --------------------------------------------------------------------------------------------- table and files


def _wanted(text: str | None) -> tuple[str, ...]:
    asked = SPLITS if text is None else tuple(part.strip() for part in text.split(","))
    for split in asked:
        if split == NO_SPLIT:
            raise UsageError(f"{NAME}: splits={text!r}: no_split shares its patients with val and test; leave it out")
        if split not in SPLITS or asked.count(split) > 1:
            raise UsageError(f"{NAME}: splits={text!r}: some of {', '.join(SPLITS)}, each once")
    return tuple(split for split in SPLITS if split in asked)


def _table(source_dir: Path) -> Path:
    found = sorted(path for path in source_dir.iterdir() if path.name.casefold() == TABLE)
    if len(found) != 1:
        what = "there is no" if not found else "there is more than one"
        raise DataError(f"{source_dir}: {what} {TABLE} (in any case); give the folder of the release as --source")
    return found[0]


def _waveforms(path: Path) -> Waveforms:
    """The header of a `.npy` file, checked against the file's size; no row is read."""
    try:
        with path.open("rb") as file:
            head = io.BytesIO(file.read(HEADER))  # a header may announce gigabytes of itself
        version = np.lib.format.read_magic(head)
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = header(head)
        offset = head.tell()
        size = path.stat().st_size
    except FileNotFoundError:
        raise DataError(f"there is no {path}; download it, or leave its split out with splits=") from None
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from None
    except Exception as error:  # NumPy raises whatever its parsing of the header ran into
        raise DataError(f"{path}: no .npy file ({' '.join(str(error).split())[:120]}); download it again") from None
    if len(shape) != 4 or shape[1:] != (1, SAMPLES, len(LEADS)) or fortran or dtype.kind != "f" or dtype.itemsize > 8:
        order = " in Fortran order" if fortran else ""
        raise DataError(
            f"{path}: {dtype} {shape}{order}, expected float (N, 1, {SAMPLES}, {len(LEADS)}) as EchoNext has it"
        )
    need = offset + shape[0] * SAMPLES * len(LEADS) * dtype.itemsize
    if size != need:
        raise DataError(f"{path}: {size} bytes, its {shape[0]} rows need {need}; download it again")
    return Waveforms(path, int(shape[0]), offset, dtype.str)


def _item(row: Row, split: str, i: int, present: frozenset[str], count: Counter[str]) -> Item:
    """The item of row i of a split; `present` are the table's columns. `count` goes up for every 0 that is unknown."""
    echo = np.full(len(FLAGS), UNKNOWN, np.int8)
    blank = 0
    for k, (flag, values) in enumerate(FLAGS.items()):
        bit = _bit(row, flag)
        if not present.issuperset(values):
            blank += 1
            continue
        missing = [value for value in values if row[value].casefold() in ("", "nan", "na")]  # "none" is a finding
        blank += len(missing) == len(values)
        if bit == 0 and missing:
            count[flag] += 1
            bit = UNKNOWN
        echo[k] = bit
    composite = _bit(row, SHD)
    count[SHD] += composite == 0 and blank == len(FLAGS)
    patient = row.identifier("patient_key")
    if not patient:
        raise DataError(f"{row.where}: patient_key is empty; EchoNext names a patient everywhere")
    where: dict[str, Any] = {
        "row": i,
        "patient": patient,
        "labels": {"shd": np.array([composite], np.int8), "echo": echo},
    }
    if "age_at_ecg" in present:
        where["age"] = age(row.number("age_at_ecg"))
    if "sex" in present:
        sex = _SEX.get(row["sex"].casefold())
        if sex is None:
            raise DataError(f"{row.where}: sex={row['sex'][:60]!r}, EchoNext has male and female")
        where["sex"] = sex
    if "acquisition_year" in present and row["acquisition_year"]:
        where["time"] = row.identifier("acquisition_year")
    return Item(row.identifier("ecg_key"), patient, split, where)


def _bit(row: Row, flag: str) -> int:
    bit = _BITS.get(row[flag].casefold())
    if bit is None:
        raise DataError(f"{row.where}: {flag}={row[flag][:60]!r} is neither 0 nor 1")
    return bit


# ----------------------------------------------------------------------------------------- signals and checks


def _read(files: dict[str, Waveforms], items: Sequence[Item]) -> Iterator[Record | Refused]:
    """Rows of the waveform files; each file is opened once, each row read alone."""
    opened: dict[str, BinaryIO] = {}
    try:
        for item in items:
            waveforms = files[item.split]
            try:
                if item.split not in opened:
                    opened[item.split] = waveforms.path.open("rb")
                signal, source = waveforms.row(opened[item.split], item.where["row"])
                yield record_of(item, settle(signal, LEADS, RATE, source, unit="z"), "z")
            except Refused as refusal:
                yield refusal
            except OSError as error:
                yield Refused("unreadable-signal", f"{waveforms.path}: {error.strerror or error}")
    finally:
        for file in opened.values():
            file.close()


def _check(waveforms: Waveforms, stated: Sequence[float], aligned_with: Path) -> dict[str, Any]:
    """What a sample of a split's rows says of alignment, lead order and scale, for `about`.

    stated: the table's ventricular rates (per minute, NaN unknown) of all rows. `DataError` where rows and table do not
    belong together or the leads are in another order.
    """
    at = sorted({round(i) for i in np.linspace(0, waveforms.rows - 1, min(SAMPLED, waveforms.rows)).tolist()})
    signals, rates = [], []
    with waveforms.path.open("rb") as file:
        for i in at:
            try:
                signal, _ = waveforms.row(file, i)
            except Refused:
                continue
            signals.append(signal)
            rates.append(stated[i])
    found: dict[str, Any] = {"rows": len(signals)}
    if len(signals) < ENOUGH:
        return found | {"not_checked": f"fewer than {ENOUGH} rows prove nothing"}
    samples = np.concatenate([signal[::5] for signal in signals]).astype(np.float64)
    samples = samples[np.isfinite(samples).all(axis=1)]
    found |= _scale(samples) | _limb_leads(samples, waveforms.path)
    return found | _heart_rates(signals, np.array(rates), waveforms.path, aligned_with)


def _scale(samples: np.ndarray) -> dict[str, Any]:
    """SD of each lead over samples [n, 12]: near one another if the publisher standardised lead by lead."""
    sd = samples.std(axis=0) if len(samples) else np.zeros(len(LEADS))
    if not sd.all():
        return {"scaling": "not known: a lead is constant"}
    scaling = "per lead" if sd.max() < EVEN * sd.min() else "global"
    return {"scaling": scaling, "lead_sd": {lead: round(float(one), 3) for lead, one in zip(LEADS, sd, strict=True)}}


def _limb_leads(samples: np.ndarray, path: Path) -> dict[str, Any]:
    """How far I and II give the four other limb leads: by regression, because each lead may have a scale of its own."""
    explained = {}
    for lead, signs in SIGNS.items():
        target = samples[:, LEADS.index(lead)]
        basis = samples[:, :2] - samples[:, :2].mean(axis=0) if len(samples) else samples[:, :2]
        centred = target - target.mean() if len(target) else target
        total = float((centred**2).sum())
        if not total or np.linalg.matrix_rank(basis) < 2:
            return {"limb_leads": "not checked: a lead is constant"}
        weights = np.linalg.lstsq(basis, centred, rcond=None)[0]
        share = 1 - float(((centred - basis @ weights) ** 2).sum()) / total
        explained[lead] = round(share, 3)
        if share < EXPLAINED or (np.sign(weights) != signs).any():
            raise DataError(
                f"{path}: its leads are not in the order {' '.join(LEADS)}: lead {lead} is {weights[0]:.2f} I "
                f"{weights[1]:+.2f} II, which explain {share:.0%} of it"
            )
    return {"limb_leads_explained": explained}


def _heart_rates(signals: list[np.ndarray], stated: np.ndarray, path: Path, table: Path) -> dict[str, Any]:
    """Does the table state the heart rates that the rows have?"""
    records = [Record(signal, RATE, str(i), str(i), unit="z") for i, signal in enumerate(signals)]
    detected = np.full(len(signals), np.nan)
    for i, prepared in enumerate(prepare_many(records)):
        peaks = prepared[0].rpeaks if isinstance(prepared, list) and isinstance(prepared[0], Prepared) else ()
        if len(peaks) >= 3:
            detected[i] = 60.0 * STORED_RATE * (len(peaks) - 1) / (int(peaks[-1]) - int(peaks[0]))
    known = np.isfinite(detected) & np.isfinite(stated) & (stated > 0)
    if known.sum() < ENOUGH:
        return {"heart_rates": f"not checked: {int(known.sum())} rows with a stated and a detected rate"}
    x, y = stated[known], detected[known]
    near = float((np.abs(x - y) <= NEAR * x).mean())
    ranks = [np.argsort(np.argsort(values, kind="stable"), kind="stable") for values in (x, y)]
    correlation = float(np.corrcoef(*ranks)[0, 1])
    if near < AGREE or (x.std() >= VARIED and correlation < CORRELATED):
        raise DataError(
            f"{path}: its rows are not those of {table}: of {len(x)} heart rates {near:.0%} agree with "
            f"{_RATE_COLUMN}, rank correlation {correlation:.2f}; take table and waveforms of one release, unsorted"
        )
    return {"heart_rates": {"rows": len(x), "agree": round(near, 3), "rank_correlation": round(correlation, 3)}}
