"""Own records of every format, on real files: what the quirks hold comes out, and device exports open."""

import tarfile
from pathlib import Path

import h5py
import numpy as np
import pytest
import scipy.io

from ecg_jax.datasets import open_source


@pytest.fixture(scope="session")
def real(shared_data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("own_quirks")
    for name in ("reencoded", "natural"):
        with tarfile.open(shared_data / "quirks" / f"{name}.tar.xz") as tar:
            tar.extractall(folder, filter="data")
    return folder


@pytest.mark.parametrize(
    ("kind", "table", "options"),
    [
        ("npy", "record\nleads_first_f32\nsamples_first_f64_fortran\n", {"rate": "500", "unit": "mV"}),
        (
            "npy",
            "record,n\nx,0\ny,1\n",
            {"rate": "500", "unit": "uV", "row": "n", "path": "batch_i16_uV.npy"},
        ),
        ("mat", "record\nval_v4\n", {"rate": "500", "unit": "uV"}),
        ("mat", "record\nval_v5\nval_v73\n", {"rate": "500", "unit": "mV"}),
        ("csv", "record\ncomma\n", {"rate": "500", "unit": "mV"}),
        ("csv", "record\nsemicolon_time_uV\n", {"decimal": "comma"}),
        ("hdf5", "record\nrecord_1\n", {"dataset": "{id}"}),
        ("hdf5", "record\ngroups\n", {}),
        ("wfdb", "record\nfmt16\nmimic_order\nno_length\n", {}),
    ],
)
def test_real_quirks(real, kind, table, options):
    folder = real / "reencoded"
    (folder / "table.csv").write_text(table)
    source = open_source(kind, folder, {"labels": "table.csv", **options})
    expected = np.load(folder / "expected_mV.npy")
    records = list(source.read(source.items))
    assert len(records) == table.count("\n") - 1
    for record in records:
        turned = expected[::-1] if record.record_id == "y" else expected
        assert record.rate == 500 and np.abs(record.signal - turned).max() < 0.0026


def test_real_batch_of_exams(real):
    options = {
        "labels": "exams.csv",
        "id": "exam_id",
        "binary": "1dAVb,RBBB,LBBB,SB,ST,AF",
        "sex": "is_male",
        "sex_male": "true",
        "ignore": "nn_predicted_age,death,timey,normal_ecg",
        "dataset": "tracings",
        "ids": "exam_id",
        "path": "{trace_file}",
        "rate": "400",
        "unit": "mV",
    }
    source = open_source("hdf5", real / "natural/code15_hdf5", options)
    assert len(source.items) == 7 and source.skipped == {"no row in the labels table": 1}
    records = list(source.read(source.items))
    with h5py.File(real / "natural/code15_hdf5/exams_part0.hdf5") as file:
        for i, record in enumerate(records):
            np.testing.assert_array_equal(record.signal, file["tracings"][i])
            assert record.record_id == str(file["exam_id"][i])
    assert records[0].sex == 1 and records[1].sex == 0 and records[0].labels["labels"].tolist() == [1, 0, 0, 0, 0, 0]


def test_real_matlab_records(shared_data):
    ignore = "Beat,VentricularRate,AtrialRate,QRSDuration,QTInterval,QTCorrected,RAxis,TAxis,QRSCount,QOnset,QOffset"
    options = {
        "labels": "Diagnostics.csv",
        "id": "FileName",
        "tasks": "Rhythm",
        "age": "PatientAge",
        "sex": "Gender",
        "ignore": f"{ignore},TOffset",
        "rate": "500",
        "unit": "uV",
    }
    source = open_source("mat", shared_data / "chapman_denoised", options)
    records = list(source.read(source.items))
    assert [record.age for record in records] == [83, 86, 90] and {record.sex for record in records} == {1.0}
    for record, item in zip(records, source.items, strict=True):
        val = scipy.io.loadmat(shared_data / "chapman_denoised" / item.where["path"])["val"]
        np.testing.assert_allclose(record.signal, val / 1000, rtol=1e-6, atol=1e-9)


def test_real_exports_of_devices(real):
    for kind, folder, rates in (("xml", "xml", [500, 500]), ("dicom", "dicom", [1000])):
        if kind == "dicom":
            pytest.importorskip("pydicom")
        source = open_source(kind, real / "natural" / folder, {"labels": "none"})
        assert [record.rate for record in source.read(source.items)] == rates
