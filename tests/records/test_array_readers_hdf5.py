"""HDF5 files in every layout, and HDF5 files that are none: what was never written, and what lies elsewhere."""

import hashlib
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ecg_jax.records.leads import LEADS
from ecg_jax.records.readers.arrays import Declared
from ecg_jax.records.readers.hdf5 import member_names, read_hdf5, row_count, row_ids
from ecg_jax.records.readers.mat import read_mat
from ecg_jax.records.record import Refused

MV = Declared(500, "mV")


@pytest.fixture
def signal() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(50, 12)).astype(np.float32)


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "a.h5"


def refused(call, *arguments, **more) -> Refused:
    with pytest.raises(Refused) as refusal:
        call(*arguments, **more)
    assert "\n" not in refusal.value.detail
    return refusal.value


def write_leads(group: h5py.Group, signal: np.ndarray, names=LEADS, **attributes) -> None:
    group.attrs.update(attributes)
    for i, name in enumerate(names):
        group[name] = signal[:, i]


@pytest.mark.parametrize("options", [{}, {"chunks": (1, 12, 12), "compression": "gzip"}, {"chunks": True}])
def test_batch(path, signal, options):
    batch = np.stack([signal, signal[::-1], -signal])
    with h5py.File(path, "w") as file:
        file.create_dataset("tracings", data=batch, **options)
        file.create_dataset("leads_first", data=batch.transpose(0, 2, 1), **options)
        file["exam_id"], file["names"] = np.array([[7], [9], [0]]), np.array(["a", "bé", "c"], object)
        file["fixed"], file["real"] = np.array([b"a", b"b", b"c"]), np.ones(3)
    for row in range(3):
        for name in ("tracings", "/leads_first"):
            reading = read_hdf5(path, MV, name, row)
            np.testing.assert_array_equal(reading.signal, batch[row])
        assert reading.source == hashlib.sha256(np.ascontiguousarray(batch[row].T).tobytes()).digest()
    for row in (-1, 3, 10**12):
        assert refused(read_hdf5, path, MV, "tracings", row).reason == "missing-row"
    assert "row=" in refused(read_hdf5, path, MV, "tracings").detail
    assert refused(read_hdf5, path, MV, "exam_id", 0).reason == "bad-shape"
    assert refused(read_hdf5, path, MV, "names").reason == "wrong-type"
    refusal = refused(read_hdf5, path, MV, "tracing")
    assert refusal.reason == "missing-file" and "exam_id" in refusal.detail
    with h5py.File(path) as file:
        assert row_ids(file, "exam_id") == ["7", "9", "0"] and row_ids(file, "names") == ["a", "bé", "c"]
        assert row_ids(file, "fixed") == ["a", "b", "c"] and row_count(file, "tracings") == 3
        assert refused(row_ids, file, "real").reason == "wrong-type"
        assert refused(row_ids, file, "tracings").reason == "wrong-type"
        assert refused(row_count, file, "exam_id/x").reason == "missing-file"
        assert refused(member_names, file, "real").reason == "wrong-type"


def test_group_of_leads(path, signal):
    order = np.random.default_rng(1).permutation(12)
    with h5py.File(path, "w") as file:
        file.attrs["fs"] = 100
        names = [LEADS[i].lower() for i in order]
        write_leads(file.create_group("one"), signal[:, order] * 1000, names, fs=250, unit="uV")
        write_leads(file.create_group("two"), signal, LEADS, unit="mV", note="x")
        file["two/aVR"].attrs["unit"] = "V"
        file["two/comment"] = "no lead"
    reading = read_hdf5(path, Declared(), "one")
    assert reading.rate == 250  # the nearest word counts
    np.testing.assert_allclose(reading.signal, signal, rtol=1e-5)
    reading = read_hdf5(path, Declared(), "two")
    assert reading.rate == 100
    np.testing.assert_allclose(reading.signal[:, 3], signal[:, 3] * 1000, rtol=1e-5)
    np.testing.assert_array_equal(np.delete(reading.signal, 3, 1), np.delete(signal, 3, 1))
    assert read_hdf5(path, Declared(unit="z"), "two").signal[0, 3] == signal[0, 3]
    assert refused(read_hdf5, path, Declared()).reason == "ambiguous-signals"
    assert refused(read_hdf5, path, Declared(unit="mV"), "one").reason == "unit-mismatch"
    assert refused(read_hdf5, path, Declared(500), "one").reason == "rate-mismatch"
    assert refused(read_hdf5, path, Declared(leads=LEADS), "one").reason == "lead-mismatch"
    with h5py.File(path, "a") as file:
        file["two/V6"].attrs["fs"] = 500
        file["one/extra"] = np.zeros(3)
        del file["one/v1"]
        file["one/V1"] = np.zeros(49)
        file.create_group("none")
    assert refused(read_hdf5, path, Declared(), "two").reason == "mixed-rates"
    assert refused(read_hdf5, path, Declared(), "one").reason == "bad-shape"
    assert refused(read_hdf5, path, Declared(), "none").reason == "no-signals"


def test_file_a_recording(path, signal):
    with h5py.File(path, "w") as file:
        file["deep/ecg"] = signal.T.astype(np.float16)
        file["deep/fs"], file["deep/ecg"].attrs["leads"] = 400, ",".join(reversed(LEADS))
        file["other"] = np.zeros((7, 5))
    reading = read_hdf5(path, Declared(unit="mV"))
    assert reading.rate == 400 and reading.source == hashlib.sha256(path.read_bytes()).digest()
    np.testing.assert_array_equal(reading.signal, signal.astype(np.float16).astype(np.float32)[:, ::-1])
    with h5py.File(path, "a") as file:
        file["again"] = signal
    assert refused(read_hdf5, path, Declared(500, "mV")).reason == "ambiguous-signals"
    with h5py.File(path, "w") as file:
        write_leads(file, signal, LEADS, fs=500, unit="mV")
    np.testing.assert_array_equal(read_hdf5(path, Declared()).signal, signal)


def test_what_was_never_written(path, signal):
    with h5py.File(path, "w") as file:
        part = file.create_dataset("part", (3, 50, 12), "f4", chunks=(1, 25, 12), compression="gzip")
        part[0], part[1, :25] = signal, signal[:25]
        file.create_dataset("nothing", (10**7, 10**6), "f4")
        file.create_dataset("huge", (10**8, 12), "f4", chunks=(10**7, 12), compression="gzip")
        file.create_dataset("empty", (0, 12), "f4")
        file["null"] = h5py.Empty("f4")
    np.testing.assert_array_equal(read_hdf5(path, MV, "part", 0).signal, signal)
    for name, row in (("part", 1), ("part", 2), ("part", None), ("nothing", None), ("huge", None), ("empty", None)):
        assert refused(read_hdf5, path, MV, name, row).reason == "missing-samples"
    assert refused(read_hdf5, path, MV, "null").reason == "missing-samples"


def test_nothing_outside_the_file(tmp_path, path, signal):
    (tmp_path / "secret").write_bytes(signal.tobytes())
    with h5py.File(tmp_path / "other.h5", "w") as other:
        other["ecg"] = signal
    layout = h5py.VirtualLayout((50, 12), "f4")
    layout[:] = h5py.VirtualSource(str(tmp_path / "other.h5"), "ecg", (50, 12))
    with h5py.File(path, "w") as file:
        file.create_dataset("raw", (50, 12), "f4", external=[(str(tmp_path / "secret"), 0, h5py.h5f.UNLIMITED)])
        file.create_virtual_dataset("virtual", layout)
        file["link"] = h5py.ExternalLink(str(tmp_path / "other.h5"), "ecg")
        file["dangling"] = h5py.SoftLink("/nowhere")
    for name in ("raw", "virtual", "link"):
        assert refused(read_hdf5, path, MV, name).reason == "unreadable-signal"
    assert refused(read_hdf5, path, MV, "dangling").reason == "missing-file"
    assert refused(read_mat, path, MV, "virtual").reason == "unreadable-signal"


def test_files_that_are_none(tmp_path, path, signal):
    assert refused(read_hdf5, path, MV).reason == "missing-file"
    assert refused(read_hdf5, tmp_path, MV).reason == "unreadable-signal"
    with h5py.File(path, "w") as file:
        file["ecg"] = signal
    whole = path.read_bytes()
    for size in (0, 7, 50, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert refused(read_hdf5, path, MV).reason == "unreadable-signal"
        assert refused(read_mat, path, MV).reason in ("unreadable-signal", "truncated")


def test_matlab_7_3(path, signal):
    """As MATLAB writes it: 512 bytes before, transposed, texts as numbers, cells as references, structs as groups."""
    with h5py.File(path, "w", userblock_size=512) as file:
        struct = file.create_group("ECG")
        struct["data"] = signal  # MATLAB shows (12, 50)
        struct["fs"] = np.array([[400.0]])
        refs = file.create_group("#refs#")
        cells = np.empty((12, 1), h5py.ref_dtype)
        for i, lead in enumerate(reversed(LEADS)):
            refs[lead] = np.array([[ord(letter)] for letter in lead], np.uint16)
            refs[lead].attrs["MATLAB_class"] = np.bytes_("char")
            cells[i, 0] = refs[lead].ref
        struct["leads"] = cells
        struct["unit"] = np.array([[ord(letter)] for letter in "uV"], np.uint16)
        struct["unit"].attrs["MATLAB_class"] = np.bytes_("char")
    with path.open("r+b") as file:
        file.write(b"MATLAB 7.3 MAT-file".ljust(128))
    for variable, layout in ((None, None), ("ECG.data", "leads-first")):
        reading = read_mat(path, Declared(layout=layout), variable)
        assert reading.rate == 400
        np.testing.assert_allclose(reading.signal, signal[:, ::-1] / 1000, rtol=1e-6)
    assert refused(read_mat, path, Declared(layout="samples-first")).reason == "bad-shape"


NAMES = st.sampled_from(["I", "v1", "ecg", "fs", "unit", "leads", "x", "DII"])
VALUES = st.one_of(
    st.integers(-5, 1000),
    st.floats(width=32),
    st.sampled_from(["mV", "uV", "NU", "I,II,V1", "", "\0"]),
    st.tuples(st.lists(st.integers(0, 13), max_size=3), st.sampled_from(["f4", ">i2", "f8", "S3", "c8", "?"])).map(
        lambda of: (np.arange(np.prod(of[0], dtype=int)) % 97 + 1).reshape(of[0]).astype(of[1])
    ),
    st.sampled_from([np.arange(1, 61).reshape(12, 5) * 1.5, np.arange(1, 121).reshape(2, 5, 12), np.arange(1, 6)]),
)
TREES = st.recursive(
    st.tuples(VALUES, st.dictionaries(NAMES, VALUES, max_size=2)),
    lambda inner: st.tuples(st.dictionaries(NAMES, inner, max_size=4), st.dictionaries(NAMES, VALUES, max_size=2)),
    max_leaves=6,
)


def plant(group: h5py.Group, name: str, tree, held: set[float]) -> None:
    content, attributes = tree
    if isinstance(content, dict):
        made = group.require_group(name)
        for inner, value in content.items():
            plant(made, inner, value, held)
    else:
        made = group.create_dataset(name, data=content)
        if isinstance(content, int | float) or (isinstance(content, np.ndarray) and content.dtype.kind in "if"):
            held.update(np.ravel(content).astype(float).tolist())
    for key, value in attributes.items():
        made.attrs[key] = value


@settings(max_examples=150, deadline=None)
@given(
    tree=st.tuples(st.dictionaries(NAMES, TREES, max_size=4), st.dictionaries(NAMES, VALUES, max_size=2)),
    inside=st.sampled_from([None, "ecg", "x", "x/ecg", "/", "x/I", ""]),
    row=st.sampled_from([None, 0, 1]),
    declared=st.sampled_from([MV, Declared(), Declared(unit="z"), Declared(500, "mV", ("I", "II", "V1"))]),
)
def test_any_tree(tmp_path_factory, tree, inside, row, declared):
    path = tmp_path_factory.getbasetemp() / "any.h5"
    held: set[float] = set()
    try:
        with h5py.File(path, "w") as file:
            plant(file, "/", tree, held)
    except (ValueError, TypeError):
        return  # HDF5 holds no such thing
    known = np.array([value * factor for value in held for factor in (1, 1e-3)] or [np.inf], np.float32)
    for read in (read_hdf5, read_mat):
        try:
            reading = read(path, declared, inside, row) if read is read_hdf5 else read(path, declared)
        except Refused as refusal:
            assert "\n" not in refusal.detail
            continue
        columns = [i for i, lead in enumerate(LEADS) if lead not in reading.derived]
        found = reading.signal[:, columns]
        assert reading.signal.shape[1] == 12 and 0 < reading.rate < np.inf
        assert np.isin(found[~np.isnan(found)], known).all()


def test_real_groups(shared_data, tmp_path):
    import tarfile

    with tarfile.open(shared_data / "quirks/reencoded.tar.xz") as tar:
        tar.extractall(tmp_path, filter="data")
    with tarfile.open(shared_data / "quirks/natural.tar.xz") as tar:
        tar.extractall(tmp_path, filter="data")
    expected = np.load(tmp_path / "reencoded/expected_mV.npy")
    for inside in (None, "record_1"):
        reading = read_hdf5(tmp_path / "reencoded/groups.h5", Declared(), inside)
        assert reading.rate == 500 and np.abs(reading.signal - expected).max() < 0.001
    part = tmp_path / "natural/code15_hdf5/exams_part0.hdf5"
    with h5py.File(part) as file:
        assert row_ids(file, "exam_id")[:2] == ["438277", "1594286"]
        for row in range(7):
            reading = read_hdf5(part, Declared(400, "mV"), "tracings", row)
            np.testing.assert_array_equal(reading.signal, file["tracings"][row])
