"""CODE-15 %: the join of table and parts, the ways a part may be stored, and what is refused."""

import hashlib
import pickle
import tarfile
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ecg_jax.datasets import open_source
from ecg_jax.datasets.code_labels import read_rows
from ecg_jax.errors import DataError, EcgJaxError, UsageError
from ecg_jax.records.leads import DERIVED, LEADS
from ecg_jax.records.preprocess import prepare_many
from ecg_jax.records.record import Record, Refused

# As the copy at ECG-FM has it: ST before AF, which by position would swap the two.
HEAD = "exam_id,age,is_male,nn_predicted_age,1dAVb,RBBB,LBBB,SB,ST,AF,patient_id,death,timey,normal_ecg,trace_file"


def ecg(seed: int, stored: int = 4096, peak: float = 1.75) -> np.ndarray:
    """float32 [4096, 12] with limb leads that agree, zeros around the `stored` samples; R of lead II near `peak`."""
    rng = np.random.default_rng(seed)
    t = np.arange(stored) / 400
    beat = np.exp(-(((t % 0.8 - 0.4) / 0.012) ** 2))
    signal = rng.normal(0, 0.02, (stored, 12)) + beat[:, None] * rng.uniform(0.3, 1.2, 12)
    signal[:, 1] = peak * beat + rng.normal(0, 0.02, stored)
    for lead, (one, two) in DERIVED.items():
        signal[:, LEADS.index(lead)] = one * signal[:, 0] + two * signal[:, 1]
    out = np.zeros((4096, 12), np.float32)
    start = (4096 - stored) // 2
    out[start : start + stored] = signal
    return out


def part(path: Path, ids: list, signals: list, dtype: str = "<f4", userblock: int = 0, **layout) -> None:
    with h5py.File(path, "w", userblock_size=userblock) as file:
        file.create_dataset("exam_id", data=np.array(ids, np.int64))
        file.create_dataset("tracings", data=np.array(signals).astype(dtype), **layout)


def row(exam: object, n: int, patient: object = 7, flags: str = "False,False,False,False,False,False", **more) -> str:
    cells = {"age": 50, "male": True, "normal": False} | more
    return (
        f"{exam},{cells['age']},{cells['male']},49.5,{flags},{patient},,,{cells['normal']},exams_part{n}.hdf5"
    )  # fmt: skip


def table(folder: Path, *rows: str, head: str = HEAD) -> None:
    (folder / "exams.csv").write_text("\n".join([head, *rows]) + "\n")


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two parts, each with its filler row; the table in another order, and with a part that is not there."""
    part(tmp_path / "exams_part0.hdf5", [30, 10, 20, 0], [ecg(30), ecg(10), ecg(20, 2934), np.zeros((4096, 12))])
    part(tmp_path / "exams_part3.hdf5", [50, 40, 60, 0], [ecg(50), np.zeros((4096, 12)), ecg(60), np.zeros((4096, 12))])
    table(
        tmp_path,
        row(40, 3, 9),
        row(10, 0, 7, "True,False,False,False,True,False", age=61, male=False),
        row(99, 5, 1),
        row(20, 0, 7, "False,False,False,False,False,True", normal=True),
        row(30, 0, "", ",,,,,", male="", normal="", age=200),
        row(70, 3, 8),
        row(50, 3, 8, "0,0,1,0,0,0", male=1),
    )
    return tmp_path


def test_rows_meet_their_labels(folder):
    source = pickle.loads(pickle.dumps(open_source("code15", folder, {})))
    assert source.tasks == {"code6": ("1dAVb", "RBBB", "LBBB", "SB", "AF", "ST"), "normal": ("normal",)}
    assert [item.record_id for item in source.items] == ["30", "10", "20", "50", "40", "70"]
    assert [item.group for item in source.items] == ["30", "7", "7", "8", "9", "8"]
    assert {item.split for item in source.items} == {None} and "id_space" not in source.about
    assert source.skipped == {
        "filler row": 2, "part not there": 1, "row of a part without a row in exams.csv": 1
    }  # fmt: skip
    assert source.about["parts_left_out"] == {"exams_part5.hdf5": 1} and source.about["parts"] == "0,3"
    assert source.about["tables_sha256"]["exams.csv"] == hashlib.sha256((folder / "exams.csv").read_bytes()).hexdigest()
    results = list(source.read(source.items))
    assert [getattr(result, "reason", None) for result in results] == [None] * 5 + ["missing-row"]
    for result in results[:5]:
        expected = ecg(int(result.record_id)) if result.record_id != "20" else ecg(20, 2934)
        expected = np.zeros_like(expected) if result.record_id == "40" else expected
        np.testing.assert_array_equal(result.signal, expected / 2)
        assert result.signal.dtype == np.float32 and result.rate == 400 and result.unit == "mV"
        assert result.source == hashlib.sha256(expected.tobytes() + result.record_id.encode()).digest()
    ten = results[1]
    assert ten.labels["code6"].tolist() == [1, 0, 0, 0, 0, 1] and ten.labels["normal"].tolist() == [0]
    assert (ten.age, ten.sex, ten.patient_id) == (61, 0, "7")
    assert results[2].labels["code6"].tolist() == [0, 0, 0, 0, 1, 0] and results[2].labels["normal"].tolist() == [1]
    assert results[3].labels["code6"].tolist() == [0, 0, 1, 0, 0, 0] and results[3].sex == 1
    blank = results[0]
    assert blank.labels["code6"].tolist() == [-1] * 6 and blank.labels["normal"].tolist() == [-1]
    assert np.isnan(blank.age) and np.isnan(blank.sex) and blank.patient_id is None
    some = list(source.read(source.items[1::2]))
    np.testing.assert_array_equal(some[0].signal, results[1].signal)
    assert [getattr(one, "record_id", "") for one in some] == ["10", "50", ""]


def test_padding_goes_and_zeros_are_refused(folder):
    source = open_source("code15", folder, {})
    records = [record for record in source.read(source.items) if isinstance(record, Record)]
    prepared = {r.record_id: p for r, p in zip(records, prepare_many(records), strict=True)}
    assert isinstance(prepared["40"], Refused) and prepared["40"].reason == "all-zero"
    assert prepared["20"][0].valid[1] == 734 and prepared["10"][0].valid[1] == 1000


def test_scale_and_parts(folder):
    source = open_source("code15", folder, {"scale": "1", "parts": "3"})
    assert [item.record_id for item in source.items] == ["50", "40", "70"]
    assert source.skipped["part not asked for"] == 4 and "part not there" not in source.skipped
    np.testing.assert_array_equal(next(source.read(source.items)).signal, ecg(50))
    other = open_source("code15", folder, {"parts": "0,3"})
    assert len(other.items) == 6 and other.about["scale"] == 2
    for options, error, message in (
        ({"parts": "0-5"}, DataError, "exams_part1.hdf5, which is not there"),
        ({"parts": "18"}, UsageError, "must lie within 0-17"),
        ({"parts": "3-0"}, UsageError, "must lie within"),
        ({"parts": "a"}, UsageError, "neither a number"),
        ({"parts": ""}, UsageError, "neither a number"),
        ({"scale": "0"}, UsageError, "positive"),
        ({"scale": "nan"}, UsageError, "positive"),
        ({"scael": "2"}, UsageError, "did you mean 'scale'"),
    ):
        with pytest.raises(error, match=message):
            open_source("code15", folder, options)


LAYOUTS = {
    "row chunks": {"chunks": (1, 4096, 12), "compression": "gzip", "compression_opts": 1},
    "odd chunks": {"chunks": (3, 512, 5), "compression": "gzip", "shuffle": True, "fletcher32": True},
    "one chunk": {"chunks": (9, 4096, 12)},
    "behind a user block": {"userblock": 512},
    "other byte order": {"dtype": ">f4"},
    "double": {"dtype": "<f8"},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_reads_the_same(tmp_path, layout):
    signals = [ecg(i) for i in range(9)]
    part(tmp_path / "plain.hdf5", list(range(9)), signals)
    part(tmp_path / "other.hdf5", list(range(9)), signals, **LAYOUTS[layout])
    for rows in ([0, 1, 2, 5, 8], [3], [8, 2, 2, 0], list(range(9))):
        plain, other = list(read_rows(tmp_path / "plain.hdf5", rows)), list(read_rows(tmp_path / "other.hdf5", rows))
        for at, a, b in zip(rows, plain, other, strict=True):
            np.testing.assert_array_equal(a, signals[at])
            np.testing.assert_array_equal(a, b)
            if "dtype" not in LAYOUTS[layout]:
                assert a.tobytes() == b.tobytes()
    for path in ("plain.hdf5", "other.hdf5"):
        lost = list(read_rows(tmp_path / path, [8, 9, -1]))
        assert isinstance(lost[0], np.ndarray)
        assert [getattr(one, "reason", None) for one in lost[1:]] == ["missing-row"] * 2


def test_one_broken_chunk_refuses_its_rows_alone(tmp_path):
    path = tmp_path / "exams_part0.hdf5"
    part(path, [1, 2, 3], [ecg(1), ecg(2), ecg(3)], chunks=(1, 4096, 12), fletcher32=True)
    with h5py.File(path) as file:
        at = file["tracings"].id.get_chunk_info(1).byte_offset
    content = bytearray(path.read_bytes())
    content[at + 1000] ^= 255
    path.write_bytes(content)
    table(tmp_path, row(1, 0), row(2, 0), row(3, 0))
    source = open_source("code15", tmp_path, {})
    results = list(source.read(source.items))
    assert [getattr(result, "reason", None) for result in results] == [None, "unreadable-signal", None]
    np.testing.assert_array_equal(results[2].signal, ecg(3) / 2)


def test_a_file_that_goes_or_shrinks_meanwhile(folder):
    source = open_source("code15", folder, {})
    content = (folder / "exams_part0.hdf5").read_bytes()
    (folder / "exams_part0.hdf5").write_bytes(content[:-300_000])
    (folder / "exams_part3.hdf5").unlink()
    reasons = [result.reason for result in source.read(source.items)]
    assert reasons == ["unreadable-signal"] * 3 + ["missing-file"] * 2 + ["missing-row"]
    with pytest.raises(DataError, match="cannot be read as HDF5"):
        open_source("code15", folder, {})


def test_filler_is_told_by_its_zeros(tmp_path):
    part(tmp_path / "exams_part0.hdf5", [1, 0, 0], [ecg(1), ecg(2), np.zeros((4096, 12))])
    table(tmp_path, row(1, 0))
    skipped = open_source("code15", tmp_path, {}).skipped
    assert skipped == {"filler row": 1, "row of a part without a row in exams.csv": 1}


def test_an_exam_in_another_part_than_the_table_says(folder):
    table(folder, row(10, 3), row(50, 3), row(30, 5))
    source = open_source("code15", folder, {})
    results = {item.record_id: result for item, result in zip(source.items, source.read(source.items), strict=True)}
    assert results["10"].reason == "missing-row" and "it is in exams_part0.hdf5" in results["10"].detail
    assert results["30"].reason == "missing-row" and isinstance(results["50"], Record)


def test_leads_and_unit_are_checked(tmp_path):
    table(tmp_path, *(row(i, 0) for i in range(1, 41)))
    right = [ecg(i) for i in range(1, 41)]
    for leads, message in (
        ([0, 1, 2, 4, 5, 3, *range(6, 12)], "order I II III aVL aVF aVR fits the data of 8 rows, and not I II III aVR"),
        ([6, 7, 8, 9, 10, 11, *range(6)], "no order of the limb leads"),
    ):
        part(tmp_path / "exams_part0.hdf5", list(range(1, 41)), [signal[:, leads] for signal in right])
        with pytest.raises(DataError, match=message):
            open_source("code15", tmp_path, {})
    for n in range(5):  # 8 rows of each part are looked at: enough of them only together
        ids = list(range(1 + 8 * n, 9 + 8 * n))
        part(tmp_path / f"exams_part{n}.hdf5", ids, [right[i - 1] / 2 for i in ids])
    table(tmp_path, *(row(i, (i - 1) // 8) for i in range(1, 41)))
    with pytest.raises(DataError, match=r"lead II peaks at 0\.8.*1\.75 as published.*scale=1"):
        open_source("code15", tmp_path, {})
    source = open_source("code15", tmp_path, {"scale": "1"})
    assert source.about["lead_order_checked_on"] == 40 and source.about["lead_order_residual"] < 0.01
    np.testing.assert_array_equal(next(source.read(source.items)).signal, ecg(1) / 2)


@pytest.mark.parametrize("dtype", ["<f4", "<f8"])
def test_numbers_that_cannot_be(tmp_path, dtype):
    """They come out as they are (what float32 cannot hold as inf), and preparation sees to them."""
    signals = [ecg(i).astype(dtype) for i in range(3)]
    signals[0][100:110, 3] = np.nan
    signals[1][:, 4] = -np.inf
    signals[2][5, 5] = np.finfo(dtype).max
    part(tmp_path / "exams_part0.hdf5", [1, 2, 3], signals, dtype)
    table(tmp_path, row(1, 0), row(2, 0), row(3, 0))
    source = open_source("code15", tmp_path, {"scale": "0.5"})
    assert source.about["lead_order_checked_on"] == 0
    records = list(source.read(source.items))
    assert np.isnan(records[0].signal[100:110, 3]).all() and np.isposinf(records[2].signal[5, 5])
    prepared = prepare_many(records)
    assert isinstance(prepared[0], list) and isinstance(prepared[1], Refused) and isinstance(prepared[2], list)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([row(10, 0), row(10, 0)], "exam_id 10 is there twice"),
        ([row(99, 5), row(99, 5), row(10, 0)], "exam_id 99 is there twice"),
        ([row("x", 0)], r"exams.csv:2: exam_id='x' is no id"),
        ([row("", 0)], "exam_id='' is no id"),
        ([row(-1, 0)], "exam_id='-1' is no id"),
        ([row("1e5", 0)], "exam_id='1e5' is no id"),
        ([row("9" * 30, 0)], "is no id"),
        ([row(10, 0, patient="Smith")], "patient_id='Smith' is no id"),
        ([row(10, 18)], "trace_file='exams_part18.hdf5'"),
        ([row(10, "../0")], "trace_file="),
        ([row(10, 0, flags="2,0,0,0,0,0")], "1dAVb='2', must be True, False"),
        ([row(10, 0, male="F")], "is_male='F'"),
        ([row(10, 0, age="old")], "age='old' is no number"),
        ([row(99, 7)], "no row of exams.csv belongs to the parts that are there: 0,3"),
        ([], "no row of exams.csv"),
        (["10,5"], "2 cells under 15"),
    ],
)
def test_mistakes_in_the_table(folder, rows, message):
    table(folder, *rows)
    with pytest.raises(DataError, match=message) as raised:
        open_source("code15", folder, {})
    assert "\n" not in str(raised.value)


def test_missing_columns_and_files(folder, tmp_path_factory):
    table(folder, "1,2", head="exam_id,age")
    with pytest.raises(DataError, match="no column 'is_male'"):
        open_source("code15", folder, {})
    (folder / "exams.csv").unlink()
    with pytest.raises(DataError, match="there is no"):
        open_source("code15", folder, {})
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(DataError, match=r"no exams_part0\.hdf5"):
        open_source("code15", empty, {})
    (empty / "exams_part0.zip").touch()
    with pytest.raises(DataError, match="unzip exams_part"):
        open_source("code15", empty, {})


def test_an_exam_in_two_parts(folder):
    part(folder / "exams_part4.hdf5", [10], [ecg(1)])
    with pytest.raises(DataError, match=r"exams_part4.hdf5: exam_id 10 of row 0 is also in row 1 of exams_part0.hdf5"):
        open_source("code15", folder, {})


def test_a_length_that_the_file_does_not_hold(tmp_path):
    with h5py.File(tmp_path / "exams_part0.hdf5", "w") as file:
        file.create_dataset("exam_id", (10**12,), "i8", chunks=(1000,))
        file.create_dataset("tracings", (10**12, 4096, 12), "f4", chunks=(1, 4096, 12))
    table(tmp_path, row(1, 0))
    with pytest.raises(DataError, match="claims 1000000000000 numbers"):
        open_source("code15", tmp_path, {})


NAMES = st.sampled_from(["tracings", "exam_id", "other"])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=NAMES,
    dtype=st.sampled_from(["f2", "f4", "f8", "i2", "i8", "u8", "c8", "S3", "bool", "group", "text", "empty"]),
    shape=st.lists(st.sampled_from([0, 1, 2, 12, 4096]), max_size=4),
    ids=st.lists(st.one_of(st.integers(-3, 3), st.floats(width=32)), max_size=3),
    rows=st.integers(0, 3),
)
def test_any_hdf5(tmp_path, name, dtype, shape, ids, rows):
    """Whatever the parts hold: a source whose reading answers every item, or one of our errors."""
    with h5py.File(tmp_path / "exams_part0.hdf5", "w") as file:
        if name != "exam_id":
            file.create_dataset("exam_id", data=np.array(ids, np.float64))
        if name != "tracings":
            file.create_dataset("tracings", (rows, 4096, 12), "f4")
        size = int(np.prod(shape))
        if dtype == "group":
            file.create_group(name)
        elif dtype == "text":
            file.create_dataset(name, data="some text")
        elif dtype == "empty":
            file.create_dataset(name, data=h5py.Empty("f4"))
        elif size <= 10**6:
            file.create_dataset(name, shape, dtype)
    table(tmp_path, row(1, 0), row(2, 0))
    try:
        source = open_source("code15", tmp_path, {})
    except EcgJaxError as error:
        assert error.exit_code in (2, 3) and "\n" not in str(error)
    else:
        results = list(source.read(source.items))
        assert len(results) == len(source.items) == 2
        assert all(isinstance(result, Record | Refused) for result in results)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.one_of(st.binary(max_size=300), st.just(b"\x89HDF\r\n\x1a\n" + bytes(40))), where=st.booleans())
def test_any_bytes(tmp_path, content, where):
    if not (tmp_path / "whole.hdf5").exists():
        part(tmp_path / "whole.hdf5", [1, 0], [ecg(1), np.zeros((4096, 12))])
    whole = (tmp_path / "whole.hdf5").read_bytes()
    (tmp_path / "exams_part0.hdf5").write_bytes(content if where else whole[: len(content) * 700])
    table(tmp_path, row(1, 0))
    with pytest.raises(DataError) as raised:
        open_source("code15", tmp_path, {})
    assert "\n" not in str(raised.value)


CELLS = st.sampled_from(
    ["", "0", "1", "True", "7", "-1", "1e99", "nan", "inf", "x", "exams_part0.hdf5", "\x00", '"', ","]
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cells=st.lists(st.lists(CELLS, min_size=15, max_size=15), min_size=1, max_size=3))
def test_any_table(tmp_path, cells):
    if not (tmp_path / "exams_part0.hdf5").exists():
        part(tmp_path / "exams_part0.hdf5", [1, 7, 0], [ecg(1), ecg(7), np.zeros((4096, 12))])
    table(tmp_path, *(",".join([*line[:14], "exams_part0.hdf5"]) for line in cells))
    try:
        source = open_source("code15", tmp_path, {})
    except DataError as error:
        assert "\n" not in str(error)
    else:
        assert len(list(source.read(source.items))) == len(source.items) == len(cells)


def test_real_exams(shared_data, tmp_path):
    with tarfile.open(shared_data / "quirks" / "natural.tar.xz") as tar:
        wanted = [m for m in tar if m.name.split("/")[1:2] in (["code15_hdf5"], ["code15_mat"])]
        tar.extractall(tmp_path, wanted, filter="data")
    source = open_source("code15", tmp_path / "natural" / "code15_hdf5", {"scale": "1"})
    assert source.skipped == {"filler row": 1} and len(source.items) == 7
    assert source.about["lead_order_residual"] < 0.02
    records = {record.record_id: record for record in source.read(source.items)}
    assert records["795649"].labels["code6"].tolist() == [0, 0, 0, 0, 0, 1]  # ST, in a table that has ST before AF
    prepared = prepare_many(list(records.values()))
    assert [windows[0].valid[1] for windows in prepared] == [734, 1000, 1000, 734, 1000, 734, 1000]
    from scipy.io import loadmat

    for exam in ("438277", "1594286", "975093"):  # the same recordings, padding taken off
        mat = loadmat(tmp_path / "natural" / "code15_mat" / f"code_15_{exam}.mat")["feats"].T
        signal = records[exam].signal
        signal = signal[np.flatnonzero(signal.any(axis=1))]
        np.testing.assert_allclose(signal[: len(mat)], mat[: len(signal)], atol=1e-6)
