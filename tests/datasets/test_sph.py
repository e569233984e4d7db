"""SPH: tables, folder and archive, and what is refused."""

import io
import pickle
import tarfile
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ecg_jax.datasets import open_source
from ecg_jax.datasets import sph as module
from ecg_jax.datasets.source import Source
from ecg_jax.errors import DataError, UsageError
from ecg_jax.records.record import Record, Refused

CODES = """Category,Code,Description
A,1,Normal ECG
C,22,Sinus bradycardia
F,60,Ventricular premature complex(es)
D,31,"Atrial premature complexes, nonconducted"
M,147,T-wave abnormality
Modifier,310,Frequent
"""
META = """ECG_ID,AHA_Code,Patient_ID,Age,Sex,N,Date
A00001,60+310;147,S00001,44,M,600,2020-03-04
A00002,1;1,S00002,61,F,500,2019-09-03
A00003,22,S00002,61,F,700,2019-09-04
"""
SAMPLES = {"A00001": 600, "A00002": 500, "A00003": 700}


def content(seed: int, samples: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.5, (12, samples)).astype(np.float16)


def recording(ecg: np.ndarray, **more: object) -> bytes:
    """As published: `ecg`, compressed in chunks, and nothing else."""
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        file.create_dataset("ecg", data=ecg, **({"chunks": True, "compression": "gzip"} | more))
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "metadata.csv").write_text(META)
    (tmp_path / "code.csv").write_text(CODES)
    (tmp_path / "records").mkdir()
    for seed, (record, samples) in enumerate(SAMPLES.items()):
        (tmp_path / "records" / f"{record}.h5").write_bytes(recording(content(seed, samples)))
    return tmp_path


def opened(folder: Path) -> Source:
    return pickle.loads(pickle.dumps(open_source("sph", folder, {})))


def archived(folder: Path, name: str = "records.tar.gz", mode: str = "w") -> Path:
    """`records/` in one uncompressed tar, the folder gone."""
    with tarfile.open(folder / name, mode) as archive:
        archive.add(folder / "records", "records")
    for file in (folder / "records").iterdir():
        file.unlink()
    (folder / "records").rmdir()
    return folder / name


def test_records(folder):
    source = opened(folder)
    assert source.tasks == {"aha": ("1", "22", "31", "60", "147")}
    assert [(i.record_id, i.group, i.split) for i in source.items] == [
        ("A00001", "S00001", None), ("A00002", "S00002", None), ("A00003", "S00002", None)
    ]  # fmt: skip
    one, two, three = source.read(source.items)
    assert [r.labels["aha"].tolist() for r in (one, two, three)] == [
        [0, 0, 0, 1, 1], [1, 0, 0, 0, 0], [0, 1, 0, 0, 0]
    ]  # fmt: skip
    assert (one.age, one.sex, two.sex, one.patient_id, one.time) == (44.0, 1.0, 0.0, "S00001", "2020-03-04")
    assert one.meta["aha_code"] == "60+310;147" and one.rate == 500 and one.signal.dtype == np.float32
    for seed, record in enumerate((one, two, three)):
        np.testing.assert_array_equal(record.signal, content(seed, SAMPLES[record.record_id]).T.astype(np.float32))
    assert len({record.source for record in (one, two, three)}) == 3 and len(one.source) == 32
    assert source.about["aha"]["31"] == "Atrial premature complexes, nonconducted"
    assert set(source.about["tables_sha256"]) == {"metadata.csv", "code.csv"} and source.about["patients"] == 2


@pytest.mark.parametrize("name", ["records.tar.gz", "records.tar"])
def test_archive_is_the_same(folder, name):
    source = opened(folder)
    unpacked = list(source.read(source.items))
    archived(folder, name)
    again = opened(folder)
    assert again.about == source.about
    assert [record.record_id for record in again.read(again.items[::-1])] == ["A00003", "A00002", "A00001"]
    for one, other in zip(unpacked, again.read(again.items), strict=True):
        assert one.source == other.source and one.record_id == other.record_id
        np.testing.assert_array_equal(one.signal, other.signal)


def test_a_bad_archive(folder):
    data = archived(folder).read_bytes()
    for broken in (data[:-9000], b"", b"x" * 5000):
        (folder / "records.tar.gz").write_bytes(broken)
        with pytest.raises(DataError, match=r"records\.tar\.gz.*fetch it again"):
            opened(folder)
    (folder / "records.tar.gz").unlink()
    with pytest.raises(DataError, match=r"neither a folder records/ nor records\.tar\.gz"):
        opened(folder)


def test_a_truly_compressed_archive(folder):
    archived(folder, mode="w:gz")
    with pytest.raises(DataError, match=r"no complete uncompressed tar"):
        opened(folder)


def test_archive_that_changed_or_went(folder):
    path = archived(folder)
    source = opened(folder)
    path.write_bytes(path.read_bytes()[:2000])
    assert {result.reason for result in source.read(source.items)} == {"truncated"}
    path.unlink()
    assert [result.reason for result in source.read(source.items)] == ["missing-file"] * 3


def test_rows_and_files_that_lack_each_other(folder):
    (folder / "records" / "A00009.h5").write_bytes(recording(content(9, 500)))
    (folder / "records" / "A00002.h5").unlink()
    source = opened(folder)
    one, two, three, alone = source.read(source.items)
    assert isinstance(one, Record) and isinstance(three, Record)
    assert two.reason == "missing-file" and "A00002.h5" in two.detail
    assert alone.record_id == alone.group == "A00009" and (alone.labels["aha"] == -1).all()
    assert np.isnan(alone.age) and np.isnan(alone.sex) and source.about["recordings_without_row"] == 1


def test_without_code_table_and_cells(folder):
    (folder / "code.csv").unlink()
    (folder / "metadata.csv").write_text(META.replace(",22,", ",,").replace("61,F", ","))
    source = opened(folder)
    assert source.tasks == {"aha": ("1", "60", "147")} and source.about["rows_without_code"] == 1
    _, two, three = source.read(source.items)
    assert (three.labels["aha"] == -1).all() and np.isnan([two.age, two.sex]).all()


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("metadata.csv", "AHA_Code", "Code", "no column 'AHA_Code'"),
        ("metadata.csv", "60+310;147", "60+310;sick", r"metadata\.csv:2: AHA_Code='60\+310;sick'"),
        ("metadata.csv", "60+310;147", "60+;147", "not of the form"),
        ("metadata.csv", "60+310;147", "61", "not of the codes of code.csv"),
        ("metadata.csv", "60+310;147", "310", "not of the codes of code.csv"),
        ("metadata.csv", "60+310;147", "60+147", "not of the codes of code.csv"),
        ("metadata.csv", "A00002", "A00001", r"metadata\.csv:3: ECG_ID 'A00001' is there twice"),
        ("metadata.csv", "A00002", "", "is empty"),
        ("metadata.csv", ",M,", ",male,", "Sex='male'"),
        ("metadata.csv", ",44,", ",old,", "Age='old' is no number"),
        ("metadata.csv", ",600,", ",0,", "N='0'"),
        ("metadata.csv", ",600,", ",,", "N=''"),
        ("code.csv", "M,147", "M,22", r"code\.csv:6: Code='22' is there twice"),
        ("code.csv", "M,147", "M,T7", "is no number"),
        ("code.csv", "Category", "Kind", "no column 'Category'"),
    ],
)
def test_bad_tables(folder, file, old, new, message):
    text = (folder / file).read_text()
    assert old in text
    (folder / file).write_text(text.replace(old, new))
    with pytest.raises(DataError, match=message):
        opened(folder)


def test_no_options(folder):
    with pytest.raises(UsageError, match="unknown option 'folds'"):
        open_source("sph", folder, {"folds": "1/2/3"})


def reason_of(folder: Path, data: bytes) -> str:
    (folder / "records" / "A00002.h5").write_bytes(data)
    source = opened(folder)
    (result,) = source.read(source.items[1:2])
    assert "A00002.h5" in result.detail and "\n" not in result.detail
    return result.reason


def test_bad_recordings(folder, tmp_path, monkeypatch):
    good = content(1, 500)
    assert reason_of(folder, recording(content(1, 501))) == "wrong-length"
    assert reason_of(folder, recording(good.T)) == reason_of(folder, recording(good[:11])) == "wrong-type"
    assert reason_of(folder, recording(good.astype(complex))) == "wrong-type"
    assert reason_of(folder, recording(np.full((12, 500), b"x"))) == "wrong-type"
    assert reason_of(folder, b"") == reason_of(folder, b"no hdf5") == "unreadable-signal"
    assert reason_of(folder, recording(good)[:-700]) in ("unreadable-signal", "wrong-type")
    for fill in ({"chunks": (12, 100)}, {}):  # claimed, never written
        buffer = io.BytesIO()
        with h5py.File(buffer, "w") as file:
            file.create_dataset("ecg", (12, 500), np.float16, **fill)
        assert reason_of(folder, buffer.getvalue()) == "missing-samples"
    with h5py.File(tmp_path / "link.h5", "w") as file:
        file["ecg"] = h5py.ExternalLink("other.h5", "/ecg")
    assert reason_of(folder, (tmp_path / "link.h5").read_bytes()) == "wrong-type"
    with h5py.File(tmp_path / "group.h5", "w") as file:
        file.create_group("ecg")
    assert reason_of(folder, (tmp_path / "group.h5").read_bytes()) == "wrong-type"
    monkeypatch.setattr(module, "MAX_BYTES", 1000)
    assert reason_of(folder, recording(good)) == "too-large"


def test_what_float16_cannot_hold(folder):
    wild = content(1, 500)
    wild[3, 7], wild[4, 8] = np.inf, np.nan
    (folder / "records" / "A00002.h5").write_bytes(recording(wild))
    source = opened(folder)
    signal = next(iter(source.read(source.items[1:2]))).signal
    assert np.isnan(signal[7, 3]) and np.isnan(signal[8, 4]) and np.isnan(signal).sum() == 2


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_recordings(folder, data):
    """Metadata of HDF5 lies at the file's start: most of the damage goes there."""
    document = bytearray(recording(content(1, 500)))
    for _ in range(data.draw(st.integers(1, 3))):
        document[data.draw(st.integers(0, 2500))] = data.draw(st.integers(0, 255))
    (folder / "records" / "A00002.h5").write_bytes(bytes(document))
    source = open_source("sph", folder, {})
    (result,) = source.read(source.items[1:2])
    if isinstance(result, Refused):
        assert "A00002.h5" in result.detail and "\n" not in result.detail
    else:
        assert result.signal.shape == (500, 12) and not np.isinf(result.signal).any()


def test_the_real_thing(shared_data):
    source = opened(shared_data / "sph")
    assert source.tasks == {"aha": ("1", "22", "23", "106")} and len(source.items) == 7
    results = {record.record_id: record for record in source.read(source.items)}
    assert all(isinstance(record, Record) for record in results.values())
    assert results["SPH00001"].labels["aha"].tolist() == [0, 1, 1, 0]
    assert (results["SPH00005"].labels["aha"] == -1).all()  # the one without a row
    assert [len(results[f"SPH{i:05d}"].signal) for i in (1, 2, 5, 7, 10)] == [5000, 6000, 5500, 6500, 7500]
    for record in results.values():
        one, two, three, avr = record.signal[:, :4].T
        assert np.std(two - one - three) < 0.02 * np.std(two) and np.std(avr + (one + two) / 2) < 0.02 * np.std(two)
        assert 0.5 < np.abs(record.signal).max() < 5
