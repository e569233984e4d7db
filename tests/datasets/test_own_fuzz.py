"""Whatever the labels table, the options and the files hold: a source or one of our errors, a record or a refusal."""

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ecg_jax.datasets import open_source
from ecg_jax.errors import EcgJaxError
from ecg_jax.records.record import Record, Refused

KINDS = ("wfdb", "hdf5", "npy", "csv", "mat", "xml", "dicom")
CELLS = st.sampled_from(
    ["a", "b", "1", "0", "2", "train", "SR;LVH", "", "M", "nan", "-3", "1e400", "é", "x{y}", "../a"]
)
NAMES = st.sampled_from(["record", "dx", "age", "sex", "split", "strat_fold", "patient_id", "row", "labels", "x", ""])
VALUES = st.one_of(
    NAMES,
    st.sampled_from(
        ["none", "{id}", "{row:05d}", "{id", "batch", "order", "100", "-1", "mV", "z", "on", "1/2/3", "t/{id}"]
    ),
    st.text("{}:.,;/\\\0 aé01", max_size=8),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    signal = np.random.default_rng(0).normal(size=(120, 12)).astype("f4")
    np.save(folder / "a.npy", signal)
    np.save(folder / "batch.npy", np.stack([signal, signal]))
    with h5py.File(folder / "a.h5", "w") as file:
        file["ecg"], file["row"], file["record"] = np.stack([signal] * 2), np.array([1, 2]), np.array([b"a", b"b"])
        file["t/a"] = signal
    (folder / "b.csv").write_text("I,II\n1,2\n3,4\n")
    for name in ("a.mat", "a.xml", "a.dcm", "a.hea"):
        (folder / name).write_bytes(b"a 12 100 120\n")
    return folder


def read_all(kind: str, folder, options: dict[str, str]) -> None:
    try:
        source = open_source(kind, folder, options)
    except EcgJaxError as error:
        assert error.exit_code in (2, 3) and "\n" not in str(error)
        return
    results = list(source.read(source.items))
    assert len(results) == len(source.items)
    for item, result in zip(source.items, results, strict=True):
        assert isinstance(result, Refused) or (isinstance(result, Record) and result.record_id == item.record_id)
        if isinstance(result, Record):
            assert all(set(np.unique(values)) <= {-1, 0, 1} for values in result.labels.values())


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    columns=st.lists(NAMES, min_size=1, max_size=4, unique=True),
    rows=st.lists(st.lists(CELLS, min_size=4, max_size=4), max_size=4),
    options=st.dictionaries(
        st.sampled_from(
            "id tasks binary patient age sex sex_male split fold folds ignore path labels.dx unit rate row rows "
            "dataset ids layout leads variable decimal header checksums name version".split()
        ),
        VALUES,
        max_size=5,
    ),
)
def test_any_table_and_options(folder, kind, columns, rows, options):
    lines = [columns, *(row[: len(columns)] for row in rows)]
    (folder / "labels.csv").write_text("\n".join(",".join(line) for line in lines), encoding="utf-8")
    read_all(kind, folder, options)


@settings(max_examples=100, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    content=st.binary(max_size=120) | st.text('record,a"\n\r;1', max_size=60).map(str.encode),
)
def test_any_bytes_for_a_table(folder, kind, content):
    (folder / "labels.csv").write_bytes(content)
    read_all(kind, folder, {"rate": "100", "unit": "mV"} if kind in ("npy", "hdf5", "csv", "mat") else {})


@settings(max_examples=80, deadline=None)
@given(kind=st.sampled_from(KINDS), content=st.binary(max_size=300), rate=st.booleans())
def test_any_bytes_for_a_recording(tmp_path_factory, kind, content, rate):
    folder = tmp_path_factory.getbasetemp() / "any_recording"
    folder.mkdir(exist_ok=True)
    for ending in (".hea", ".h5", ".npy", ".csv", ".mat", ".xml", ".dcm"):
        (folder / f"r{ending}").write_bytes(content)
    said = {"rate": "100", "unit": "mV"} if kind in ("npy", "hdf5", "csv", "mat") and (rate or kind == "npy") else {}
    read_all(kind, folder, {"labels": "none", **said})
