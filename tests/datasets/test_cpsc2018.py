"""CPSC 2018: original MATLAB files and the WFDB copy, REFERENCE.csv, MERL's split."""

import csv
import pickle
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.io import loadmat, savemat

from ecg_jax.datasets import open_source
from ecg_jax.datasets.cpsc2018 import NAMES, read_struct
from ecg_jax.errors import DataError, UsageError
from ecg_jax.records.record import Record, Refused

LEADS = ("I", "II", "III", "aVR", "aVL", "aVF", "V1", "V2", "V3", "V4", "V5", "V6")
HEAD = "Recording,First_label,Second_label,Third_label"
MERL_HEAD = "patient_id,ecg_id,filename,validation,age,sex,scp_codes,AFIB,VPC,NORM,1AVB,CRBBB,STE,PAC,CLBBB,STD"


def samples_of(name: str, n: int) -> np.ndarray:
    return np.random.default_rng(int(name[1:])).integers(-900, 900, (n, 12)).astype("<i2")


def write_wfdb(folder: Path, name: str, comments: str, n: int = 3000, first: str = "") -> None:
    """The Challenges' copy: MATLAB 4 with the samples 24 bytes in."""
    samples = samples_of(name, n)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.mat").write_bytes(struct.pack("<5i", 30, 12, n, 0, 4) + b"val\0" + samples.tobytes())
    lines = [f"{first or name} 12 500 {n} 05-Feb-2020 11:39:16"]
    for i, lead in enumerate(LEADS):
        total = ((int(samples[:, i].astype(int).sum()) + 32768) % 65536) - 32768
        lines.append(f"{name}.mat 16+24 1000/mV 16 0 {samples[0, i]} {total} 0 {lead}")
    (folder / f"{name}.hea").write_text("\n".join(lines) + "\n" + comments)


def write_mat(
    folder: Path, name: str, n: int = 3000, sex: object = "Male", age: object = 74.0, packed: bool = True
) -> None:
    """The original: a struct ECG of sex, age and data [12, n] in mV."""
    folder.mkdir(parents=True, exist_ok=True)
    ecg = {"sex": sex, "age": age, "data": samples_of(name, n).T / 1000}
    savemat(folder / f"{name}.mat", {"ECG": ecg}, do_compression=packed)


def on(record: Record) -> list[str]:
    return [name for name, value in zip(NAMES, record.labels["cpsc9"], strict=True) if value == 1]


@pytest.fixture
def original(tmp_path) -> Path:
    rows = ["A0001,5,,", "A0002,1,,", "A0043,5,2,", "A0953,6,6,", "A1236,9,5,6"]
    for i, row in enumerate(rows):
        write_mat(tmp_path / f"TrainingSet{i % 3 + 1}", row[:5], n=3000 + i, packed=i % 2 == 0)
    (tmp_path / "REFERENCE.csv").write_bytes("\r\n".join([HEAD, *rows]).encode() + b"\r\n")
    return tmp_path


def test_original_files(original):
    source = pickle.loads(pickle.dumps(open_source("cpsc2018", original, {})))
    assert source.tasks == {"cpsc9": ("Normal", "AF", "I-AVB", "LBBB", "RBBB", "PAC", "PVC", "STD", "STE")}
    assert source.default_windows == "all" and source.about["encoding"] == "mat" and source.skipped == {}
    records = list(source.read(source.items))
    assert [(r.record_id, r.group, r.split) for r in records] == [
        (name, name, None) for name in ("A0001", "A0002", "A0043", "A0953", "A1236")
    ]
    assert [on(r) for r in records] == [["RBBB"], ["Normal"], ["AF", "RBBB"], ["PAC"], ["RBBB", "PAC", "STE"]]
    for record, n in zip(records, range(3000, 3005), strict=True):
        expected = (samples_of(record.record_id, n).T / 1000).T.astype(np.float32)
        np.testing.assert_array_equal(record.signal, expected)
        assert (record.rate, record.age, record.sex, record.unit) == (500.0, 74.0, 1.0, "mV") and len(
            record.source
        ) == 32
    assert list(source.about["tables_sha256"]) == ["REFERENCE.csv"]


def test_both_encodings_give_the_same(original, tmp_path_factory):
    copy = tmp_path_factory.mktemp("wfdb")
    write_wfdb(copy / "g1", "A0043", "#Age: 74\n#Sex: Male\n#Dx: 164889003,59118001\n", n=3002)
    one = open_source("cpsc2018", copy, {})
    two = open_source("cpsc2018", original, {})
    assert one.about["encoding"] == "wfdb"
    (a,) = one.read(one.items)
    (b,) = two.read([item for item in two.items if item.record_id == "A0043"])
    np.testing.assert_allclose(a.signal, b.signal, atol=1e-7)
    assert (a.labels["cpsc9"] == b.labels["cpsc9"]).all() and (a.age, a.sex, a.rate) == (b.age, b.sex, b.rate)


def test_challenge_headers(tmp_path):
    write_wfdb(tmp_path, "A0001", "#Age: 74\n#Sex: Male\n#Dx: RBBB,AF\n#Sx: Unknows\n", first="A0001.mat")
    write_wfdb(tmp_path, "A0002", "#Age: -1\n#Sex: Female\n#Dx: 164884008,I-AVB\n")
    write_wfdb(tmp_path, "A0003", "#Age: NaN\n#Dx: 427172004,429622005\n")  # a PVC code that is none of the set's nine
    write_wfdb(tmp_path, "A0004", "#Dx: Normal,something\n")
    write_wfdb(tmp_path, "A0005", "#Dx: 427172004\n")
    source = open_source("cpsc2018", tmp_path, {})
    one, two, three, four, five = source.read(source.items)
    assert on(one) == ["AF", "RBBB"] and on(two) == ["I-AVB", "PVC"] and on(three) == ["STD"]
    assert one.meta["repaired"] == "record-name-suffix" and (one.age, one.sex) == (74, 1)
    assert four.labels["cpsc9"].tolist() == [1] + [-1] * 8 and (five.labels["cpsc9"] == -1).all()
    assert np.isnan([two.age, three.age, three.sex]).all() and two.sex == 0
    about = source.about
    assert about["unknown_codes"] == {"427172004": 2} and about["dx_items_that_are_no_code"] == {"something": 1}
    assert about["records_without_label"] == 1 and about["records_without_dx"] == 0


def test_encoding(original):
    write_wfdb(original / "wfdb", "A0043", "#Dx: 59118001\n")
    with pytest.raises(DataError, match="say encoding=wfdb or"):
        open_source("cpsc2018", original, {})
    forced = open_source("cpsc2018", original, {"encoding": "wfdb"})
    results = {r.record_id if isinstance(r, Record) else r.detail.split()[3]: r for r in forced.read(forced.items)}
    assert len(results) == 5 and results["A0043"].rate == 500  # the others have no header: refused, none dropped
    assert sum(isinstance(r, Refused) and r.reason == "missing-file" for r in results.values()) == 4
    with pytest.raises(DataError, match=r"A0043 is there twice, as TrainingSet3/A0043\.mat and wfdb/A0043\.mat"):
        open_source("cpsc2018", original, {"encoding": "mat"})
    with pytest.raises(UsageError, match="encoding='v4'"):
        open_source("cpsc2018", original, {"encoding": "v4"})


def test_cut(original):
    source = open_source("cpsc2018", original, {"cut": "first-5s"})
    assert {r.signal.shape for r in source.read(source.items)} == {(2500, 12)} and source.about["cut"] == "first-5s"
    write_wfdb(original / "w", "A0001", "#Dx: RBBB\n")
    source = open_source("cpsc2018", original / "w", {"cut": "first-5s"})
    (record,) = source.read(source.items)
    np.testing.assert_array_equal(record.signal, samples_of("A0001", 3000)[:2500].astype(np.float32) / 1000)
    with pytest.raises(UsageError, match="cut='5s'"):
        open_source("cpsc2018", original, {"cut": "5s"})


def merl_tables(folder: Path, **rows: str) -> Path:
    folder.mkdir(exist_ok=True)
    for split in ("train", "val", "test"):
        (folder / f"icbeb_{split}.csv").write_text(f"{MERL_HEAD}\n{rows.get(split, '')}")
    return folder


def test_merl(original):
    folder = merl_tables(
        original / "icbeb",
        train="1,1,A0001,False,74.0,1,{},0,0,0,0,1,0,0,0,0\n2,2,A0002,False,,1,{},0,0,0,1,0,0,0,0,0\n",
        test="9,9,A0009,False,-1.0,0,{},0,0,0,0,0,1,0,0,1\n",
    )
    source = open_source("cpsc2018", original, {"merl": str(folder)})
    assert [(i.record_id, i.split) for i in source.items] == [("A0001", "train"), ("A0002", "train"), ("A0009", "test")]
    assert source.skipped == {"not in MERL's tables": 3} and source.about["merl_labels_that_differ"] == 1
    one, two, lost = source.read(source.items)
    assert on(one) == ["RBBB"] and on(two) == ["I-AVB"] and lost.reason == "missing-file" and "A0009" in lost.detail
    assert source.items[2].where["labels"]["cpsc9"].tolist() == [0, 0, 0, 0, 0, 0, 0, 1, 1]
    assert source.about["merl_records"] == {"train": 2, "val": 0, "test": 1}
    assert {"REFERENCE.csv", "icbeb_train.csv", "icbeb_val.csv", "icbeb_test.csv"} == set(source.about["tables_sha256"])
    for split in ("train", "val", "test"):
        table = folder / f"icbeb_{split}.csv"
        table.write_text(table.read_text().replace("CRBBB", "XRBBB"))
    with pytest.raises(DataError, match="label columns AFIB, VPC, NORM, 1AVB, XRBBB"):
        open_source("cpsc2018", original, {"merl": str(folder)})


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("A0001,10,,\n", r"REFERENCE\.csv:2: First_label='10' is no class"),
        ("A0001,5,x,\n", "Second_label='x'"),
        ("A0001,5,0,\n", "Second_label='0'"),
        ("B0001,5,,\n", "Recording='B0001' is not of the form A0001"),
        ("A0001,5,,\nA0001,4,,\n", "has other labels in"),
        ("A0001,5\n", "2 cells under 4"),
    ],
)
def test_bad_reference(original, rows, message):
    (original / "REFERENCE.csv").write_text(f"{HEAD}\n{rows}")
    with pytest.raises(DataError, match=message):
        open_source("cpsc2018", original, {})


def test_reference_in_each_training_set(original):
    (original / "REFERENCE.csv").rename(original / "TrainingSet1/REFERENCE.csv")
    (original / "TrainingSet2/REFERENCE.csv").write_text(f"{HEAD}\nA0001,5.0,,\nA0077,,,\n")
    source = open_source("cpsc2018", original, {})
    results = list(source.read(source.items))
    assert [getattr(r, "reason", None) for r in results] == [None, None, None, "missing-file", None, None]
    assert len(source.about["tables_sha256"]) == 2 and source.about["records_without_label"] == 1


def test_bad_folders(tmp_path):
    with pytest.raises(DataError, match=r"no A####\.mat"):
        open_source("cpsc2018", tmp_path, {})
    write_mat(tmp_path, "A0001")
    with pytest.raises(DataError, match=r"no REFERENCE\.csv"):
        open_source("cpsc2018", tmp_path, {})
    with pytest.raises(DataError, match=r"no A####\.hea"):
        open_source("cpsc2018", tmp_path, {"encoding": "wfdb"})
    with pytest.raises(UsageError, match="unknown option"):
        open_source("cpsc2018", tmp_path, {"window": "5"})


@pytest.mark.parametrize(
    ("sex", "age", "expected_sex", "expected_age"),
    [
        ("Female", 48.0, 0.0, 48.0),
        ("Male", -1.0, 1.0, np.nan),
        ("", np.nan, np.nan, np.nan),
        ("Unknown", np.empty((0, 0)), np.nan, np.nan),
        ("Male", np.uint8(104), 1.0, 104.0),
        ("a\n#Sex: Male", 1e300, np.nan, np.nan),
        (1.0, "61", np.nan, 61.0),
    ],
)
def test_sex_and_age_of_the_original(tmp_path, sex, age, expected_sex, expected_age):
    write_mat(tmp_path, "A0001", sex=sex, age=age)
    _, said = read_struct(tmp_path / "A0001.mat")
    np.testing.assert_array_equal([said.sex, said.age], [expected_sex, expected_age])


def test_other_forms_of_the_struct(tmp_path):
    """Whole numbers are stored in fewer bytes, fields may be more and in another order."""
    data = np.arange(36, dtype=np.int16).reshape(12, 3)
    savemat(tmp_path / "a.mat", {"x": 1.0, "ECG": {"more": np.eye(2), "data": data, "age": 3, "sex": "Male"}})
    reading, said = read_struct(tmp_path / "a.mat")
    np.testing.assert_array_equal(reading.signal, data.T)
    assert (said.age, said.sex) == (3, 1) and reading.names == LEADS


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"ECG": {"sex": "Male", "age": 1, "data": np.zeros((3000, 12))}}, "bad-shape"),
        ({"ECG": {"sex": "Male", "age": 1, "data": np.zeros((12, 0))}}, "bad-shape"),
        ({"ECG": {"sex": "Male", "age": 1, "data": "text"}}, "bad-shape"),
        ({"ECG": {"sex": "Male", "age": 1}}, "unreadable-signal"),
        ({"ECG": {"sex": "Male", "age": 1, "data": 1j * np.ones((12, 9))}}, "unreadable-signal"),
        ({"ECG": {"sex": "Male", "age": 1, "data": {"data": np.zeros((12, 9))}}}, "unreadable-signal"),
        ({"val": np.zeros((12, 9))}, "unreadable-signal"),
        ({"ECG": np.zeros((12, 9))}, "unreadable-signal"),
    ],
)
def test_other_contents_are_refused(tmp_path, content, reason):
    savemat(tmp_path / "A0001.mat", content)
    with pytest.raises(Refused, match=f"{reason}.*A0001.mat"):
        read_struct(tmp_path / "A0001.mat")


def test_what_is_no_matlab_5_file_is_refused(tmp_path):
    for content in (b"", b"MATLAB 5.0", b"\x89HDF\r\n", struct.pack("<5i", 30, 12, 2, 0, 4) + b"val\0" + bytes(48)):
        (tmp_path / "A0001.mat").write_bytes(content)
        with pytest.raises(Refused, match="unreadable-signal"):
            read_struct(tmp_path / "A0001.mat")
    with pytest.raises(Refused, match="missing-file"):
        read_struct(tmp_path / "A0002.mat")


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> tuple[Path, list[bytes]]:
    folder = tmp_path_factory.mktemp("mat")
    contents = []
    for i, packed in enumerate((False, True)):
        write_mat(folder, f"A000{i}", n=20, packed=packed)
        contents.append((folder / f"A000{i}.mat").read_bytes())
    return folder, contents


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_damaged_files_are_refused_or_read(originals, data):
    """Bytes changed and the end cut off, packed or not: a recording of the right form or a refusal, nothing else."""
    folder, contents = originals
    content = bytearray(data.draw(st.sampled_from(contents)))
    for _ in range(data.draw(st.integers(0, 4))):
        # Mostly in the tags at the front and of the fields, where the sizes stand.
        at = data.draw(st.one_of(st.integers(126, 500), st.integers(0, len(content) - 1))) % len(content)
        content[at] = data.draw(st.sampled_from([0, 1, 0x7F, 0x80, 0xFF, 14, 15, data.draw(st.integers(0, 255))]))
    content = content[: data.draw(st.one_of(st.just(len(content)), st.integers(0, len(content))))]
    path = folder / "damaged.mat"
    path.write_bytes(content)
    try:
        reading, said = read_struct(path)
    except Refused as refusal:
        assert refusal.reason in ("unreadable-signal", "bad-shape") and "damaged.mat" in refusal.detail
    else:
        assert reading.signal.shape[1] == 12 and reading.rate == 500
        assert np.isnan(said.age) or 0 <= said.age <= 130


def test_a_packed_part_that_grows_without_end_is_refused(tmp_path):
    import zlib

    packed = zlib.compress(bytes(1 << 27), 9)
    head = b"MATLAB 5.0 MAT-file".ljust(124) + b"\0\1IM"
    (tmp_path / "A0001.mat").write_bytes(head + struct.pack("<II", 15, len(packed)) + packed)
    with pytest.raises(Refused, match="far too long"):
        read_struct(tmp_path / "A0001.mat")


@settings(max_examples=60, deadline=None)
@given(st.one_of(st.binary(max_size=200), st.text(alphabet='A0123456789,\n\r"-.', max_size=200).map(str.encode)))
def test_any_reference_is_read_or_named(originals, content):
    folder, _ = originals
    (folder / "REFERENCE.csv").write_bytes(HEAD.encode() + b"\n" + content)
    try:
        source = open_source("cpsc2018", folder, {})
    except DataError as error:
        assert "\n" not in str(error) and str(folder) in str(error)
    else:
        assert all(set(item.where["labels"]["cpsc9"].tolist()) <= {-1, 0, 1} for item in source.items)
    finally:
        (folder / "REFERENCE.csv").unlink()


def test_the_real_thing(shared_data, tmp_path):
    with tarfile.open(shared_data / "cpsc2018/records.tar.xz") as archive:
        archive.extractall(tmp_path / "wfdb", filter="data")
    source = open_source("cpsc2018", tmp_path / "wfdb", {"cut": "first-5s"})
    records = {record.record_id: record for record in source.read(source.items)}
    with open(shared_data / "cpsc2018/labels.csv", newline="") as file:
        truth = {row["record"]: row for row in csv.DictReader(file)}
    assert records.keys() == truth.keys() and len(records) == 100
    for name, record in records.items():
        assert set(on(record)) == set(truth[name]["dx"].replace(";", ",").split(","))
        assert (record.age, record.sex) == (float(truth[name]["age"]), truth[name]["sex"] == "Male")
        assert record.signal.shape == (2500, 12)


def test_the_real_original(shared_data, tmp_path):
    with tarfile.open(shared_data / "quirks/natural.tar.xz") as archive:
        archive.extractall(tmp_path, [m for m in archive if "cpsc2018_original_mat" in m.name], filter="data")
    (tmp_path / "REFERENCE.csv").write_text(f"{HEAD}\nA1981,8,,\n")
    source = open_source("cpsc2018", tmp_path, {})
    (record,) = source.read(source.items)
    expected = loadmat(next(tmp_path.rglob("A1981.mat")))["ECG"][0, 0]["data"]
    np.testing.assert_array_equal(record.signal, expected.T.astype(np.float32))
    assert (record.age, record.sex) == (48, 0) and on(record) == ["STD"] and record.signal.shape == (7950, 12)
