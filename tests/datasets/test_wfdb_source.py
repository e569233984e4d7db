"""Own WFDB records with a labels table."""

import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ecg_jax.datasets import open_source
from ecg_jax.errors import DataError, EcgJaxError, UsageError
from ecg_jax.records.preprocess import prepare_many
from ecg_jax.records.record import Record, Refused


@pytest.fixture
def folder(tmp_path, wfdb_record) -> Path:
    """Four records in two folders; PTB-XL-like names for two of them."""
    for i, name in enumerate(["a", "deep/b", "00000/00519_bp", "15000/15198_bp"]):
        wfdb_record(tmp_path / "set" / name, seed=i)
    return tmp_path / "set"


def table(folder: Path, text: str) -> None:
    (folder / "labels.csv").write_text(text)


def open_(folder: Path, **options: str):
    return open_source("wfdb", folder, {key.replace("__", "."): value for key, value in options.items()})


def test_rows_become_records(folder):
    table(
        folder,
        "record,dx,afib,paced,patient_id,strat_fold,age,sex,note\n"
        "a,SR;LVH,0,1,7.0,1,50,M,x\nb,,1,,7,2,300,female,y\n519,LVH,,,9,3,,,z\n15198,SR,0,0,11,4,-1,U,z\n",
    )
    source = open_(folder, tasks="dx", binary="afib,paced", ignore="note", folds="1-2/3/5")
    assert (source.name, source.version, source.unit) == ("set", "1.0.0", "mV")
    assert source.tasks == {"dx": ("LVH", "SR"), "labels": ("afib", "paced")}
    assert [item.record_id for item in source.items] == ["a", "b", "519"]
    assert [item.split for item in source.items] == ["train", "train", "val"]
    assert [item.group for item in source.items] == ["7", "7", "9"]
    assert source.about["outside_folds"] == 1 and source.about["unlabelled"] == {"dx": 1, "labels": 1}
    source = pickle.loads(pickle.dumps(source))
    records = list(source.read(source.items))
    assert all(isinstance(record, Record) for record in records)
    assert [record.labels["dx"].tolist() for record in records] == [[1, 1], [-1, -1], [1, 0]]
    assert [record.labels["labels"].tolist() for record in records] == [[0, 1], [1, -1], [-1, -1]]
    assert [record.sex for record in records][:2] == [1.0, 0.0] and np.isnan(records[2].sex)
    assert records[0].age == 50 and np.isnan(records[1].age) and np.isnan(records[2].age)
    assert records[0].patient_id == "7" and records[0].signal.shape == (1000, 12)
    one = list(source.read(source.items[1:2]))
    np.testing.assert_array_equal(one[0].signal, records[1].signal)


def test_without_patients_and_splits(folder):
    table(folder, "record\na\nb\n")
    source = open_(folder)
    assert [(item.group, item.split) for item in source.items] == [("a", None), ("b", None)]
    assert source.tasks == {} and source.about["recordings_without_row"] == 2
    assert next(iter(source.read(source.items))).patient_id is None


def test_split_column(folder):
    table(folder, "record,split,strat_fold\na,train,1\nb,Test,2\n")
    assert [item.split for item in open_(folder, ignore="strat_fold").items] == ["train", "test"]
    assert [item.split for item in open_(folder, fold="strat_fold", ignore="split", folds="1/3/2").items] == [
        "train",
        "test",
    ]
    table(folder, "record,split\na,train\nb,dev\n")
    with pytest.raises(DataError, match=r"labels.csv:3: split='dev', must be train, val or test"):
        open_(folder)


def test_paths(folder, wfdb_record):
    rows = "record,where\n519,00000\n15198,15000\n"
    table(folder, rows)
    for path in ("{where}/{record:05d}_bp", "{thousand:05d}/{id:05d}_bp"):
        source = open_(folder, path=path, ignore="" if "where" in path else "where")
        assert not any(isinstance(record, Refused) for record in source.read(source.items))
    for path, message in (
        ("{nowhere}/x", "no column"),
        ("{record.__class__}", "no column"),
        ("{record", "path="),
        ("{where:q}", "does not fit"),
    ):
        with pytest.raises(UsageError, match=message):
            open_(folder, path=path, ignore="" if "where:" in path else "where")
    with pytest.raises(DataError, match="say path=TEMPLATE"):
        open_(folder, path="nothing/{record}", ignore="where")
    wfdb_record(folder / "00000" / "519")
    wfdb_record(folder / "00001" / "519")
    with pytest.raises(DataError, match=r"00000/519\.hea or 00001/519\.hea"):
        open_(folder, ignore="where")


def test_a_row_without_recording_is_refused_when_read(folder):
    table(folder, "record\na\nc\n")
    source = open_(folder)
    good, lost = source.read(source.items)
    assert isinstance(good, Record) and isinstance(lost, Refused) and lost.reason == "missing-file"
    assert source.about["rows_without_recording"] == 1
    assert source.about["rows_without_recording_first"] == ["c"]


def test_bad_recordings_are_refused_one_by_one(folder):
    table(folder, "record\na\nb\n519\n")
    data = (folder / "a.dat").read_bytes()
    (folder / "a.dat").write_bytes(data[:1000])
    source = open_(folder)
    reasons = [getattr(result, "reason", None) for result in source.read(source.items)]
    assert reasons == ["truncated", None, None]


@pytest.mark.parametrize(
    ("rows", "options", "error", "message"),
    [
        ("record,weight\na,1", {}, DataError, "unknown column 'weight'.*declare it under tasks="),
        (
            "record,patientid\na,1",
            {},
            DataError,
            r"unknown column 'patientid' \(did you mean 'patient_id'\?\)",
        ),
        ("ecg_id\na", {}, UsageError, "id=COLUMN"),
        ("record\na", {"id": "recrod"}, UsageError, r"'recrod'.*did you mean 'record'"),
        ("record\na", {"tasks": "dx"}, UsageError, "tasks= names column 'dx'"),
        ("record\na", {"task": "dx"}, UsageError, r"unknown option 'task' \(did you mean 'tasks'\?\)"),
        ("record,dx\na,", {"tasks": "dx"}, DataError, "is empty in every row"),
        ("record,dx\na,X", {"tasks": "dx", "labels.dx": "Y"}, DataError, "labels.csv:2: dx='X'"),
        ("record,dx\na,X", {"tasks": "dx", "labels.dy": "X"}, UsageError, "belongs to no task"),
        ("record,dx\na,X", {"binary": "dx"}, DataError, "labels.csv:2: dx='X'; a binary column holds 0, 1"),
        ("record,labels\na,X", {"tasks": "labels", "binary": "labels"}, UsageError, "declared twice"),
        ("record,age\na,x", {}, DataError, "age='x' is no number"),
        ("record,sex\na,1", {}, UsageError, "sex_male=1"),
        ("record,sex\na,q", {}, DataError, "is no number"),
        ("record,strat_fold\na,", {}, DataError, "no fold number"),
        ("record,strat_fold\na,11", {}, DataError, "none of its 1 rows"),
        ("record\na", {"folds": "1/2/3"}, UsageError, "without a fold column"),
        ("record\na\na", {}, DataError, "is also in line 2"),
        ("record,x\n,1", {"ignore": "x"}, DataError, "record is empty"),
        ("record", {}, DataError, "no rows"),
        ("record\nnowhere", {}, DataError, "no row of labels.csv has a recording"),
        ("record\na", {"unit": "uV"}, UsageError, "known are mV and z"),
        ("record\na", {"name": "My Set"}, UsageError, "small letters"),
        ("record\na", {"version": "1"}, UsageError, "version="),
        ("record\na", {"labels": "none.csv"}, DataError, "there is no"),
    ],
)
def test_mistakes_get_one_clear_line(folder, rows, options, error, message):
    table(folder, rows + "\n")
    with pytest.raises(error, match=message) as raised:
        open_source("wfdb", folder, options)
    assert type(raised.value) is error and "\n" not in str(raised.value)


def test_sex_in_numbers(folder):
    table(folder, "record,sex\na,0\nb,1\n")
    source = open_(folder, sex_male="0")
    assert [record.sex for record in source.read(source.items)] == [1.0, 0.0]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    columns=st.lists(st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=8), max_size=4),
    cell=st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=8),
    declared=st.booleans(),
)
def test_any_columns(folder, columns, cell, declared):
    """Whatever the columns are called and hold: a source or one of our errors."""
    quoted = ['"' + name.replace('"', '""') + '"' for name in ["record", *columns]]
    cells = ["a", *['"' + cell.replace('"', '""') + '"'] * len(columns)]
    (folder / "labels.csv").write_text(",".join(quoted) + "\n" + ",".join(cells) + "\n", encoding="utf-8")
    options = {"ignore": ",".join(columns)} if declared else {}
    try:
        source = open_source("wfdb", folder, options)
    except EcgJaxError as error:
        assert error.exit_code in (2, 3)
    else:
        assert len(source.items) == 1


def test_unknown_sets_and_folders(tmp_path):
    with pytest.raises(UsageError, match=r"did you mean 'wfdb'"):
        open_source("wfbd", tmp_path, {})
    with pytest.raises(UsageError, match="needs --source"):
        open_source("wfdb", None, {})
    with pytest.raises(DataError, match="no such folder"):
        open_source("wfdb", tmp_path / "none", {})
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="not a folder"):
        open_source("wfdb", tmp_path / "file", {})


def unpack(shared_data: Path, name: str, into: Path) -> Path:
    (into / name).mkdir()
    for archive in sorted((shared_data / name).glob("*.tar.xz")):
        with tarfile.open(archive) as tar:
            tar.extractall(into / name, filter="data")
    (into / name / "labels.csv").write_bytes((shared_data / name / "labels.csv").read_bytes())
    return into / name


def test_real_unit_less_records(shared_data, tmp_path):
    source = open_source(
        "wfdb",
        unpack(shared_data, "ptbxl_bp", tmp_path),
        {
            "id": "ecg_id",
            "unit": "z",
            "tasks": "superclass",
            "ignore": "rhythm,form,subclass",
            "folds": "1-6/7/8",
        },
    )
    assert len(source.items) == 1420 and source.about["rows_without_recording"] == 0
    assert source.tasks == {"superclass": ("CD", "HYP", "MI", "NORM", "STTC")}
    assert source.about["splits"] == {"train": 1078, "val": 184, "test": 158}
    records = list(source.read(source.items[::71]))
    assert {record.unit for record in records} == {"z"}
    assert all(len(windows) == 1 for windows in prepare_many(records))
    one = next(item for item in source.items if item.record_id == "15198")
    assert one.where["path"] == "records100/15000/15198_bp"


def test_real_records_of_any_length(shared_data, tmp_path):
    folder = unpack(shared_data, "cpsc2018", tmp_path)
    source = open_source("wfdb", folder, {"tasks": "dx", "ignore": "n_samples,snomed_ct"})
    assert len(source.items) == 100 and len(source.tasks["dx"]) == 9
    records = list(source.read(source.items[::4]))
    prepared = prepare_many(records)
    assert not any(isinstance(windows, Refused) for windows in prepared)
    lengths = {len(record.signal) for record in records}
    assert len(lengths) > 5 and sum(len(windows) for windows in prepared) > len(records)
