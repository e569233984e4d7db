"""MIMIC-IV-ECG: the list of records, folds and diagnoses of Ext-ICD, ages, lead order, and hostile tables."""

import gzip
import json
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ecg_jax.datasets import open_source
from ecg_jax.errors import DataError, EcgJaxError, UsageError
from ecg_jax.records.leads import LEADS
from ecg_jax.records.record import Record, Refused
from ecg_jax.shards.convert import convert

MIMIC_LEADS = ("I", "II", "III", "aVR", "aVF", "aVL", "V1", "V2", "V3", "V4", "V5", "V6")
HEAD = "subject_id,study_id,file_name,ecg_time,path"
ICD_HEAD = (
    ",file_name,study_id,subject_id,ecg_time,ed_stay_id,ed_hadm_id,hosp_hadm_id,ed_diag_ed,all_diag_all,gender,age,"
    "anchor_year,anchor_age,dod,fold,strat_fold"
)


def beats(seed: int, seconds: int = 10, rate: int = 500) -> np.ndarray:
    """mV [T, 12] in the order of LEADS: narrow beats, limb leads that obey the algebra, every lead its own size."""
    time = np.arange(seconds * rate) / rate
    rng = np.random.default_rng(seed)
    at = np.arange(0.4, seconds, 60 / (55 + 7 * (seed % 8)))
    qrs = np.exp(-(((time[:, None] - at) / 0.02) ** 2)).sum(1)
    wave = np.exp(-(((time[:, None] - at - 0.25) / 0.05) ** 2)).sum(1)
    one, two = 0.7 * qrs + 0.15 * wave, 1.1 * qrs + 0.3 * wave + 0.02 * rng.standard_normal(len(time))
    limbs = [one, two, two - one, -(one + two) / 2, one - two / 2, two - one / 2]
    chest = [(0.2 + 0.2 * k) * qrs + 0.1 * k * wave + 0.01 * rng.standard_normal(len(time)) for k in range(6)]
    return np.stack(limbs + chest, axis=1)


def write_mimic(stem: Path, signal: np.ndarray) -> None:
    """A record as MIMIC-IV-ECG has it: format 16, 200 units per mV, aVF before aVL. NaN becomes -32768."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    ordered = signal[:, [LEADS.index(lead) for lead in MIMIC_LEADS]]
    digital = np.where(np.isnan(ordered), -32768, np.rint(np.nan_to_num(ordered) * 200)).astype("<i2")
    stem.with_suffix(".dat").write_bytes(digital.tobytes())
    lines = [f"{stem.name} 12 500 {len(digital)} 08:44:00 23/07/2180"]
    for k, lead in enumerate(MIMIC_LEADS):
        checksum = int(digital[:, k].astype(int).sum()) % 65536
        lines.append(f"{stem.name}.dat 16 200.0(0)/mV 16 0 {digital[0, k]} {checksum} 0 {lead}")
    stem.with_suffix(".hea").write_text("\n".join(lines) + "\n#<subject_id>: 10000032\n")


def path_of(subject: int, study: int) -> str:
    return f"files/p{str(subject)[:4]}/p{subject}/s{study}/{study}"


def list_row(subject: int, study: int, time: str = "2180-07-23 08:44:00") -> str:
    return f"{subject},{study},{study},{time},{path_of(subject, study)}"


def icd_row(subject: int, study: int, codes: str, fold: object, gender="F", age="52.0", anchor="52.0") -> str:
    return f'0,x,{study},{subject},2180-07-23 08:44:00,,,,"[]","{codes}",{gender},{age},2180,{anchor},,3,{fold}'


@pytest.fixture
def folder(tmp_path) -> Path:
    """Five studies of three patients; the last has no files."""
    studies = [(10000032, 40689238), (10000032, 44458630), (10000117, 45090959), (10000117, 48446569), (10009999, 1)]
    for seed, (subject, study) in enumerate(studies[:4]):
        write_mimic(tmp_path / path_of(subject, study), beats(seed))
    (tmp_path / "record_list.csv").write_text("\n".join([HEAD, *(list_row(*one) for one in studies)]) + "\n")
    rows = [  # not in the order of the list
        icd_row(10009999, 1, "['W19XXXA']", 19, "missing", "", ""),
        icd_row(10000032, 44458630, "[]", 4.0),
        icd_row(10000032, 40689238, "['I4891', 'E785']", 4.0, age="52.5"),
        icd_row(10000117, 48446569, "['I501']", 18, "M", "97.0", "91.0"),
        icd_row(10000117, 45090959, "['I10']", 18, "M", "96.0", "91.0"),
    ]
    (tmp_path / "icd.csv").write_text("\n".join([ICD_HEAD, *rows]) + "\n")
    head = "subject_id,gender,anchor_age,anchor_year,anchor_year_group,dod\n"
    with gzip.open(tmp_path / "patients.csv.gz", "wt") as file:
        file.write(head + "10000032,F,50,2178,2014 - 2016,\n10000117,M,91,2180,x,\n")
    return tmp_path


def test_pretraining_needs_no_labels(folder):
    source = pickle.loads(pickle.dumps(open_source("mimic-iv-ecg", folder, {})))
    assert source.tasks == {} and source.skipped == {} and source.version == "1.0.0" and source.unit == "mV"
    assert [item.record_id for item in source.items][:2] == ["40689238", "44458630"]
    assert [item.group for item in source.items] == ["10000032", "10000032", "10000117", "10000117", "10009999"]
    assert {item.split for item in source.items} == {None}
    *read, lost = source.read(source.items)
    assert isinstance(lost, Refused) and lost.reason == "missing-file"
    for seed, record in enumerate(read):
        np.testing.assert_allclose(record.signal, beats(seed), atol=0.0026)  # leads by name, 200 units per mV
        assert record.rate == 500 and record.patient_id == record.group and record.labels == {}
        assert record.time == "2180-07-23 08:44:00" and np.isnan([record.age, record.sex]).all()
    about = source.about
    assert about["contains"] == ["mimic-icu"] and about["id_space"] == "mimic"
    assert (
        about["rows"] == 5 and about["patients"] == 3 and not about["complete"] and "not read" in about["measurements"]
    )


def test_folds_ages_and_diagnoses(folder):
    source = open_source("mimic-iv-ecg", folder, {"icd": "icd.csv", "codes": "i50,I48.91,I10"})
    assert source.tasks == {"icd10": ("I50", "I4891", "I10")}
    assert [item.split for item in source.items] == ["train", "train", "val", "val", "test"]
    labels = [item.where["labels"]["icd10"].tolist() for item in source.items]
    assert labels == [[0, 1, 0], [-1, -1, -1], [0, 0, 1], [1, 0, 0], [0, 0, 0]]  # no diagnosis is unknown, never 0
    assert [item.where.get("age") for item in source.items] == [52.5, 52.0, 90.0, 90.0, None]  # above 89: hidden
    assert [item.where.get("sex") for item in source.items] == [0.0, 0.0, 1.0, 1.0, None]
    assert source.about["undiagnosed"] == 1 and set(source.about["tables_sha256"]) == {"record_list.csv", "icd.csv"}
    part = open_source("mimic-iv-ecg", folder, {"icd": "icd.csv", "folds": "4/18/17"})
    assert len(part.items) == 4 and part.skipped == {"fold outside the option folds": 1} and part.tasks == {}
    text = (folder / "icd.csv").read_text().splitlines()
    (folder / "icd.csv").write_text("\n".join(text[:-1]) + "\n")
    filtered = open_source("mimic-iv-ecg", folder, {"icd": "icd.csv"})
    assert filtered.skipped == {"no row in the table of option icd": 1} and len(filtered.items) == 4
    assert filtered.about["tables_sha256"] != source.about["tables_sha256"]


def test_ages_from_patients(folder):
    source = open_source("mimic-iv-ecg", folder, {"patients": "patients.csv.gz"})
    assert [item.where.get("age") for item in source.items] == [52.0, 52.0, 90.0, 90.0, None]
    assert [item.where.get("sex") for item in source.items] == [0.0, 0.0, 1.0, 1.0, None]
    both = open_source("mimic-iv-ecg", folder, {"patients": "patients.csv.gz", "icd": "icd.csv"})
    assert both.items[0].where["age"] == 52.5


def test_converts_whole(folder, tmp_path):
    """A lead that is mostly missing sends its record to quarantine, a short gap is bridged."""
    gap, lost = beats(0), beats(1)
    gap[100:140, 3], lost[:4000, 7] = np.nan, np.nan
    write_mimic(folder / path_of(10000032, 40689238), gap)
    write_mimic(folder / path_of(10000032, 44458630), lost)
    source = open_source("mimic-iv-ecg", folder, {"icd": "icd.csv", "codes": "I50"})
    card = convert(source, tmp_path / "out")
    assert card["counts"]["items"] == 5 and card["counts"]["written"] == 3
    assert card["refused"] == {"missing-file": 1, "mostly-missing": 1}
    assert card["id_space"] == "mimic" and card["lineage"][0]["contains"] == ["mimic-icu"]
    assert card["splits"]["train"]["records"] == 1 and card["splits"]["val"]["records"] == 2
    quarantine = Path(card["path"], "quarantine.jsonl").read_text().splitlines()
    assert {json.loads(line)["id"] for line in quarantine} == {"44458630", "1"}


def test_real_recording_in_this_lead_order(shared_data, tmp_path):
    with tarfile.open(shared_data / "quirks" / "reencoded.tar.xz") as archive:
        archive.extractall(tmp_path / "q", filter="data")
    base = next((tmp_path / "q").rglob("mimic_order.hea")).parent
    truth = np.load(next((tmp_path / "q").rglob("expected_mV.npy")))
    (base / "record_list.csv").write_text(f"{HEAD}\n10000000,40000000,mimic_order,2180-07-23 09:16:00,mimic_order\n")
    source = open_source("mimic-iv-ecg", base, {})
    (record,) = source.read(source.items)
    assert isinstance(record, Record)
    np.testing.assert_allclose(record.signal, truth, atol=0.0026)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"icds": "icd.csv"}, "did you mean 'icd'"),
        ({"codes": "I48"}, "needs icd=FILE"),
        ({"folds": "0-17/18/19"}, "needs icd=FILE"),
        ({"icd": "icd.csv", "codes": "48"}, "no beginning of an ICD-10 code"),
        ({"icd": "icd.csv", "codes": "I48,i48"}, "names one twice"),
        ({"icd": "icd.csv", "folds": "1"}, "three parts"),
    ],
)
def test_bad_options(folder, options, message):
    with pytest.raises(UsageError, match=message):
        open_source("mimic-iv-ecg", folder, options)


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("record_list.csv", "study_id", "study", "no column 'study_id'"),
        ("record_list.csv", ",44458630,4", ",40689238,4", "study_id 40689238 is there twice"),
        ("record_list.csv", "10009999,1,", "10009999,x1,", r"record_list.csv:6: study_id='x1' is no whole number"),
        ("record_list.csv", "10009999,1,", ",1,", "subject_id='' is no whole number"),
        ("record_list.csv", "files/p1000/p10009999/s1/1", "../secret", "leads out of the source folder"),
        ("record_list.csv", "files/p1000/p10009999/s1/1", "/etc/passwd", "leads out of the source folder"),
        ("record_list.csv", "2180-07-23 08:44:00,files/p1000/p10009999", "soon,f", "ecg_time='soon' is no time"),
        ("icd.csv", "strat_fold", "fold2", "no column 'strat_fold'"),
        ("icd.csv", '[]",F', 'I10",F', "is no list such as"),
        ("icd.csv", "['I501']", "['I501', 5 5]", "'5 5' is no ICD-10 code"),
        ("icd.csv", ",3,19", ",3,", "strat_fold='' is no whole number"),
        ("icd.csv", "missing", "X", "gender='X', MIMIC-IV has M and F"),
        ("icd.csv", "x,1,10009999", "x,1,10000117", "the two tables are not of one release"),
        ("icd.csv", "x,1,10009999", "x,45090959,10009999", "study_id 45090959 is there twice"),
    ],
)
def test_bad_tables(folder, file, old, new, message):
    text = (folder / file).read_text()
    assert old in text
    (folder / file).write_text(text.replace(old, new, 1))
    with pytest.raises(DataError, match=message) as caught:
        open_source("mimic-iv-ecg", folder, {"icd": "icd.csv", "codes": "I10"})
    assert "\n" not in str(caught.value)


def test_missing_and_broken_files(folder):
    packed = (folder / "patients.csv.gz").read_bytes()
    for content in (packed[:-12], b"subject_id,gender", packed[:40] + b"\0\0" + packed[42:]):
        (folder / "patients.csv.gz").write_bytes(content)
        with pytest.raises(DataError, match=r"patients\.csv\.gz cannot be unpacked"):
            open_source("mimic-iv-ecg", folder, {"patients": "patients.csv.gz"})
    (folder / "patients.csv.gz").write_bytes(gzip.compress(b"subject_id,gender,anchor_age,anchor_year\n1,F,2,y\n"))
    with pytest.raises(DataError, match=r"patients\.csv\.gz:2: anchor_year='y'") as caught:
        open_source("mimic-iv-ecg", folder, {"patients": "patients.csv.gz"})
    assert "/ecg-jax-" not in str(caught.value)  # names the user's file, not the unpacked copy
    with pytest.raises(DataError, match=r"there is no .*none\.csv"):
        open_source("mimic-iv-ecg", folder, {"icd": "none.csv"})
    (folder / "record_list.csv").write_text(HEAD + "\n")
    with pytest.raises(DataError, match="no rows"):
        open_source("mimic-iv-ecg", folder, {})
    (folder / "record_list.csv").unlink()
    with pytest.raises(DataError, match=r"record_list\.csv and files/"):
        open_source("mimic-iv-ecg", folder, {})


CELLS = st.sampled_from(
    ["", "1", "-1", "40689238", "1e400", "nan", "²", "[]", "['I10']", "[,]", "2180-07-23", "9" * 30, "M", "\0", "é\n"]
)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_hostile_tables_are_errors_of_one_line(folder, data):
    """Cells of all kinds, cut-off and spoilt files: an error for the user or a source that reads."""
    name = data.draw(st.sampled_from(["record_list.csv", "icd.csv"]))
    good = (
        (folder / f"{name}.good").read_bytes() if (folder / f"{name}.good").exists() else (folder / name).read_bytes()
    )
    (folder / f"{name}.good").write_bytes(good)
    if data.draw(st.booleans()):
        rows = [line.split(b",") for line in good.split(b"\n")]
        row = rows[data.draw(st.integers(0, len(rows) - 1))]
        row[data.draw(st.integers(0, len(row) - 1))] = data.draw(CELLS).encode()
        spoilt = b"\n".join(b",".join(cells) for cells in rows)
    else:
        cut = data.draw(st.integers(0, len(good)))
        spoilt = good[:cut] + data.draw(st.binary(max_size=4)) + good[cut + data.draw(st.integers(0, 9)) :]
    (folder / name).write_bytes(spoilt)
    try:
        source = open_source("mimic-iv-ecg", folder, {"icd": "icd.csv", "codes": "I10"})
        read = list(source.read(source.items))
        assert len(read) == len(source.items) and all(isinstance(one, Record | Refused) for one in read)
    except EcgJaxError as error:
        assert "\n" not in str(error)
    finally:
        (folder / name).write_bytes(good)
