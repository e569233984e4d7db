"""SaMi-Trop: a table and an array that belong together by row alone."""

import pickle
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ecg_jax.datasets import open_source
from ecg_jax.errors import DataError, EcgJaxError, UsageError
from ecg_jax.records.leads import DERIVED, LEADS
from ecg_jax.records.preprocess import prepare_many
from ecg_jax.records.record import Record

HEAD = "exam_id,age,is_male,normal_ecg,death,timey,nn_predicted_age"
ROWS = ["900,59,True,False,False,2.1,60.1", "17,70,False,True,True,1.0,66.0", "500,,1,0,,,"]


def ecg(seed: int) -> np.ndarray:
    """float64 [4096, 12]: 7.3 s of signal with limb leads that agree, zeros on both sides."""
    signal = np.zeros((4096, 12))
    signal[581:3515] = np.cumsum(np.random.default_rng(seed).normal(0, 0.1, (2934, 12)), axis=0)
    for lead, (one, two) in DERIVED.items():
        signal[:, LEADS.index(lead)] = one * signal[:, 0] + two * signal[:, 1]
    return signal


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "exams.csv").write_text("\n".join([HEAD, *ROWS]) + "\n")
    with h5py.File(tmp_path / "exams.hdf5", "w") as file:
        file["tracings"] = np.array([ecg(i) for i in range(3)])
    return tmp_path


def test_row_by_row(folder):
    source = pickle.loads(pickle.dumps(open_source("samitrop", folder, {})))
    assert source.tasks == {"normal": ("normal",), "death": ("death",)}
    records = list(source.read(source.items))
    assert [record.record_id for record in records] == ["900", "17", "500"]
    for i, record in enumerate(records):
        np.testing.assert_array_equal(record.signal, (ecg(i) / 2).astype(np.float32))
        assert record.group == record.record_id and record.patient_id is None and record.split is None
    assert [int(record.labels["normal"][0]) for record in records] == [0, 1, 0]
    assert [int(record.labels["death"][0]) for record in records] == [0, 1, -1]
    assert [record.sex for record in records] == [1, 0, 1] and np.isnan(records[2].age)
    assert "Chagas" in source.about["cohort"] and source.about["lead_order_checked_on"] == 3
    assert [windows[0].valid[1] for windows in prepare_many(records)] == [734] * 3
    last = list(source.read(source.items[2:]))
    np.testing.assert_array_equal(last[0].signal, records[2].signal)
    whole = open_source("samitrop", folder, {"scale": "1"})
    np.testing.assert_array_equal(next(whole.read(whole.items)).signal, ecg(0).astype(np.float32))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (ROWS[:2], "exams.hdf5 has 3 rows and .*exams.csv 2; rows are matched by number alone"),
        ([*ROWS, ROWS[0]], "has 3 rows and .* 4"),
        ([ROWS[0], ROWS[0], ROWS[1]], "exam_id 900 is also in line 2"),
        ([*ROWS[:2], "x,1,1,1,1,,"], "exam_id='x' is no id"),
        ([*ROWS[:2], "5,1,1,1,2,,"], "exams.csv:4: death='2'"),
    ],
)
def test_mistakes_in_the_table(folder, rows, message):
    (folder / "exams.csv").write_text("\n".join([HEAD, *rows]) + "\n")
    with pytest.raises(DataError, match=message):
        open_source("samitrop", folder, {})


def test_mistakes_in_the_files(folder):
    with pytest.raises(UsageError, match="unknown option"):
        open_source("samitrop", folder, {"parts": "1"})
    with h5py.File(folder / "exams.hdf5", "w") as file:
        file["tracings"] = np.array([ecg(i)[:, [0, 1, 2, 4, 5, 3, *range(6, 12)]] for i in range(3)])
    with pytest.raises(DataError, match="order I II III aVL aVF aVR fits the data"):
        open_source("samitrop", folder, {})
    with h5py.File(folder / "exams.hdf5", "w") as file:
        file["tracings"] = np.zeros((3, 12, 4096))
    with pytest.raises(DataError, match=r"tracings is \(3, 12, 4096\), must be \(N, 4096, 12\)"):
        open_source("samitrop", folder, {})
    (folder / "exams.hdf5").unlink()
    with pytest.raises(DataError, match="there is no"):
        open_source("samitrop", folder, {})
    (folder / "exams.zip").touch()
    with pytest.raises(DataError, match=r"unzip exams\.zip"):
        open_source("samitrop", folder, {})


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.text(st.sampled_from("0123456789.,-TrueFals\nx\"'"), max_size=30), min_size=3, max_size=3))
def test_any_table(folder, rows):
    (folder / "exams.csv").write_text("\n".join([HEAD, *rows]) + "\n")
    try:
        source = open_source("samitrop", folder, {})
    except EcgJaxError as error:
        assert error.exit_code == 3 and "\n" not in str(error)
    else:
        assert all(isinstance(result, Record) for result in source.read(source.items)) and len(source.items) == 3
