"""NumPy and MATLAB files, and what all array readers share: orientation, units, rate, lead names."""

import hashlib
import io
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from hypothesis import given, settings
from hypothesis import strategies as st

from ecg_jax.records.leads import LEADS
from ecg_jax.records.readers.arrays import Declared, facts_of, texts
from ecg_jax.records.readers.mat import read_mat
from ecg_jax.records.readers.mat_levels import load_mat
from ecg_jax.records.readers.npy import read_npy
from ecg_jax.records.record import Refused

MV = Declared(500, "mV")


@pytest.fixture(scope="session")
def quirks(shared_data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("array_quirks")
    for name in ("reencoded", "natural"):
        with tarfile.open(shared_data / "quirks" / f"{name}.tar.xz") as tar:
            tar.extractall(folder, filter="data")
    return folder


@pytest.fixture
def signal() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(50, 12)).round(3)


def saved(folder: Path, array: np.ndarray) -> Path:
    np.save(folder / "a.npy", array)
    return folder / "a.npy"


def refused(call, *arguments, **more) -> Refused:
    with pytest.raises(Refused) as refusal:
        call(*arguments, **more)
    assert "\n" not in refusal.value.detail
    return refusal.value


# ------------------------------------------------------------------------------------------------------------ npy


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f8", ">f8", "<f2", ">i2", "<i2", "i1", ">i4", "<i8", "u1", "<u2"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_types_and_orders(tmp_path, signal, dtype, order):
    stored = np.asarray(np.abs(signal) * 20, dtype, order=order)
    for array in (stored, np.asarray(stored.T, order=order)):
        reading = read_npy(saved(tmp_path, array), Declared(250, "uV"))
        np.testing.assert_allclose(reading.signal, stored.astype(float) / 1000, rtol=1e-6)
        assert reading.rate == 250 and reading.names == LEADS and reading.signal.dtype == np.float32
        assert reading.source == hashlib.sha256((tmp_path / "a.npy").read_bytes()).digest()


@pytest.mark.parametrize("shape", ["N12T", "NT12", "N1T12", "N112T", "NT121"])
def test_batches(tmp_path, signal, shape):
    batch = np.stack([signal, -signal, signal[::-1]]).astype(np.float32)
    arrays = {
        "N12T": batch.transpose(0, 2, 1),
        "NT12": batch,
        "N1T12": batch[:, None],
        "N112T": batch.transpose(0, 2, 1)[:, None],
        "NT121": batch[..., None],
    }
    path = saved(tmp_path, arrays[shape])
    for row in range(3):
        reading = read_npy(path, MV, row)
        np.testing.assert_array_equal(reading.signal, batch[row])
        assert reading.source == hashlib.sha256(arrays[shape][row].tobytes()).digest()
    assert refused(read_npy, path, MV, 3).reason == "missing-row"
    assert refused(read_npy, path, MV, -1).reason == "missing-row"
    assert "row=" in refused(read_npy, path, MV).detail
    one = read_npy(saved(tmp_path, arrays[shape][:1]), MV)
    np.testing.assert_array_equal(one.signal, batch[0])


def test_nothing_is_guessed(tmp_path, signal):
    square = np.arange(144.0).reshape(12, 12)
    path = saved(tmp_path, square)
    refusal = refused(read_npy, path, MV)
    assert refusal.reason == "ambiguous-shape" and "layout=" in refusal.detail
    first = read_npy(path, Declared(500, "mV", layout="samples-first")).signal
    np.testing.assert_array_equal(first, square)
    np.testing.assert_array_equal(read_npy(path, Declared(500, "mV", layout="leads-first")).signal, square.T)
    path = saved(tmp_path, signal)
    assert refused(read_npy, path, Declared(500, "mV", layout="leads-first")).reason == "bad-shape"
    assert refused(read_npy, path, Declared(unit="mV")).reason == "no-rate"
    assert refused(read_npy, path, Declared(500)).reason == "no-unit"
    assert refused(read_npy, saved(tmp_path, signal[:, :8]), MV).reason == "bad-shape"
    eight = Declared(500, "mV", ("v6", "II", "I", "V1", "V2", "V3", "V4", "V5"))
    reading = read_npy(tmp_path / "a.npy", eight)
    assert reading.derived == ("III", "aVF", "aVL", "aVR") and reading.missing == ()
    np.testing.assert_allclose(reading.signal[:, 0], signal[:, 2], rtol=1e-6)
    np.testing.assert_allclose(reading.signal[:, 2], signal[:, 1] - signal[:, 2], rtol=1e-4, atol=1e-6)
    lone = read_npy(saved(tmp_path, signal[:, 0]), Declared(500, "mV", ("II",)))
    np.testing.assert_allclose(lone.signal[:, 1], signal[:, 0], rtol=1e-6)
    assert np.isnan(lone.signal[:, 0]).all() and "I" in lone.missing


def test_units_and_what_is_no_number(tmp_path, signal):
    array = signal.copy()
    array[3, 4], array[5, 6], array[7, 8], array[9, 10] = np.nan, np.inf, -np.inf, 1e300
    for unit, factor in {"mV": 1, "uV": 1e-3, "V": 1e3, "z": 1}.items():
        reading = read_npy(saved(tmp_path, array), Declared(500, unit)).signal
        lost = np.isnan(reading)
        assert sorted(zip(*np.nonzero(lost), strict=True)) == [(3, 4), (5, 6), (7, 8), (9, 10)]
        np.testing.assert_allclose(reading[~lost], array[~lost] * factor, rtol=1e-6)


def test_files_that_are_none(tmp_path, signal):
    path = tmp_path / "a.npy"
    assert refused(read_npy, path, MV).reason == "missing-file"
    np.save(path, np.array([[None] * 12] * 50), allow_pickle=True)
    assert refused(read_npy, path, MV).reason in ("unreadable-signal", "wrong-type")
    for array in (signal.astype(complex), signal > 0, signal.astype("U5"), signal.astype("M8[s]")):
        assert refused(read_npy, saved(tmp_path, array), MV).reason == "wrong-type"
    whole = saved(tmp_path, signal).read_bytes()
    path.write_bytes(whole[:-1])
    assert refused(read_npy, path, MV).reason == "truncated"
    path.write_bytes(whole + b"\0")
    assert "beyond its array" in refused(read_npy, path, MV).detail
    for content in (b"", b"\x93NUMPY", whole[:40], b"PK\x03\x04" + whole):
        path.write_bytes(content)
        assert refused(read_npy, path, MV).reason == "unreadable-signal"
    assert refused(read_npy, saved(tmp_path, np.empty((0, 12))), MV).reason == "no-samples"


@settings(max_examples=150, deadline=None)
@given(
    shape=st.lists(st.integers(-3, 2**62), max_size=4).map(tuple) | st.sampled_from([(12, 5), (5, 12), (12, 2**40)]),
    descr=st.sampled_from(["<f4", ">i2", "|O", "<c8", "|b1", "<U3", "<f16", "x", "<f4,<i2", "<M8[s]"]),
    size=st.integers(0, 600),
    cut=st.integers(0, 200) | st.none(),
)
def test_any_header(tmp_path_factory, shape, descr, size, cut):
    path = tmp_path_factory.getbasetemp() / "any.npy"
    head = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    head += b" " * (-(10 + len(head) + 1) % 64) + b"\n"
    content = b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head + bytes(range(1, 101)) * 6
    path.write_bytes(content[: 10 + len(head) + size] if cut is None else content[:cut])
    for row in (None, 0):
        try:
            reading = read_npy(path, MV, row)
        except Refused:
            continue
        array = np.load(io.BytesIO(path.read_bytes()))
        array = array if row is None else array[row]
        assert array.size == reading.signal.size


@settings(max_examples=150, deadline=None)
@given(at=st.lists(st.tuples(st.integers(0, 127), st.integers(0, 255)), min_size=1, max_size=3))
def test_any_change_of_the_header(tmp_path_factory, at):
    path = tmp_path_factory.getbasetemp() / "changed.npy"
    np.save(path, np.arange(600, dtype="<f4").reshape(50, 12))
    content = bytearray(path.read_bytes())
    for place, byte in at:
        content[place] = byte
    path.write_bytes(content)
    try:
        reading = read_npy(path, MV)
    except Refused as refusal:
        assert "\n" not in refusal.detail
    else:
        array = np.load(io.BytesIO(bytes(content)))
        array = array if array.shape[1:] == (12,) else array.reshape(array.shape[0], -1).T
        np.testing.assert_array_equal(reading.signal, array.astype(np.float32))


# ------------------------------------------------------------------------------------------------------------ mat


def mat(folder: Path, variables: dict, **options) -> Path:
    scipy.io.savemat(folder / "a.mat", variables, **options)
    return folder / "a.mat"


@pytest.mark.parametrize("version", ["4", "5"])
def test_bare_matrix(tmp_path, signal, version):
    digital = (signal * 1000).astype(np.int16)
    for array in (digital, digital.T):
        reading = read_mat(mat(tmp_path, {"val": array}, format=version), Declared(500, "uV"))
        np.testing.assert_allclose(reading.signal, digital / 1000, atol=1e-6)
    assert reading.source == hashlib.sha256((tmp_path / "a.mat").read_bytes()).digest()


def test_facts_inside(tmp_path, signal):
    leads = np.array([lead.upper() for lead in reversed(LEADS)], object)
    path = mat(tmp_path, {"feats": signal, "Fs": 257.0, "leads": leads, "units": "uV", "age": 50, "rate": 61})
    reading = read_mat(path, Declared())
    assert reading.rate == 257 and reading.names[0] == "V6"
    np.testing.assert_allclose(reading.signal, signal[:, ::-1] / 1000, rtol=1e-6)
    assert refused(read_mat, path, Declared(500)).reason == "rate-mismatch"
    assert refused(read_mat, path, Declared(unit="mV")).reason == "unit-mismatch"
    assert refused(read_mat, path, Declared(leads=LEADS)).reason == "lead-mismatch"
    np.testing.assert_allclose(read_mat(path, Declared(257, "z")).signal, signal[:, ::-1], rtol=1e-6)
    path = mat(tmp_path, {"feats": signal, "Fs": 257.0, "sampling_rate": 500})
    assert refused(read_mat, path, Declared(unit="mV")).reason == "mixed-rates"
    for rate in (0.0, -5.0, np.nan, np.inf):
        assert refused(read_mat, mat(tmp_path, {"v": signal, "fs": rate}), Declared(unit="mV")).reason == "bad-rate"


def test_which_matrix(tmp_path, signal):
    struct = {"ECG": {"sex": "Male", "data": signal.T, "fs": 500.0, "more": {"x": 1}}}
    path = mat(tmp_path, struct)
    for variable in (None, "ECG.data"):
        np.testing.assert_allclose(read_mat(path, Declared(unit="mV"), variable).signal, signal, rtol=1e-6)
    assert "ECG.FIELD" in refused(read_mat, path, MV, "ECG").detail
    assert refused(read_mat, path, MV, "ECG.sex").reason == "wrong-type"
    assert refused(read_mat, path, MV, "val").reason == "no-signals"
    path = mat(tmp_path, {"raw": signal, "clean": signal / 2})
    refusal = refused(read_mat, path, MV)
    assert refusal.reason == "ambiguous-signals" and "variable=" in refusal.detail
    np.testing.assert_allclose(read_mat(path, MV, "clean").signal, signal / 2, rtol=1e-6)
    assert refused(read_mat, mat(tmp_path, {"x": signal[:, :5]}), MV).reason == "no-signals"
    assert refused(read_mat, mat(tmp_path, {"x": signal * 1j}), MV).reason == "no-signals"


def test_parser_against_scipy(tmp_path, signal):
    variables = {
        "a": signal,
        "b": signal.T.astype(np.int16),
        "small": np.array([[1, 2]], np.uint8),
        "text": "aVR",
        "lines": np.array(["I", "aVR"]),
        "truth": signal > 0,
        "cell": np.array(["I", "II"], object),
        "s": {"x": 3.5, "inner": {"fs": 500, "name": "é"}, "empty": np.empty((0, 0))},
        "complex": signal * 1j,
        "cube": np.arange(24.0).reshape(2, 3, 4),
    }
    for compressed in (False, True):
        content = mat(tmp_path, variables, do_compression=compressed).read_bytes()
        found = load_mat(content)
        assert set(found) == set(variables) - {"complex"}
        for name in ("a", "b", "small", "cube", "truth"):
            np.testing.assert_array_equal(found[name], variables[name])
        assert found["text"] == "aVR" and list(found["lines"]) == ["I", "aVR"] and found["truth"].dtype == bool
        assert found["cell"].ravel().tolist() == ["I", "II"]
        assert found["s"]["x"] == 3.5 and found["s"]["inner"] == {"fs": 500, "name": "é"}
        assert found["s"]["empty"].shape == (0, 0)
    simple = {name: variables[name] for name in ("a", "text", "lines")} | {"n": 7.0}
    found = load_mat(mat(tmp_path, simple, format="4").read_bytes())
    np.testing.assert_array_equal(found["a"], signal)
    assert found["text"] == "aVR" and list(found["lines"]) == ["I", "aVR"] and found["n"] == 7
    with pytest.raises(Refused, match="twice"):
        load_mat((tmp_path / "a.mat").read_bytes() * 2)


def test_big_endian_level_4(tmp_path, signal):
    digital = (signal * 1000).astype(">i2")
    head = np.array([1030, 50, 12, 0, 4], ">i4").tobytes() + b"val\0"
    (tmp_path / "a.mat").write_bytes(head + digital.tobytes(order="F"))
    np.testing.assert_allclose(read_mat(tmp_path / "a.mat", Declared(500, "uV")).signal, signal, atol=1.1e-3)
    (tmp_path / "a.mat").write_bytes(head + digital.tobytes(order="F")[:-2])
    assert refused(read_mat, tmp_path / "a.mat", MV).reason == "truncated"


def test_a_matrix_has_the_elements_it_promises(tmp_path, signal):
    path = mat(tmp_path, {"val": signal})
    content, shape = path.read_bytes(), np.array([50, 12], "<i4").tobytes()
    assert content.count(shape) == 1
    for rows in (49, 51, -50, 2**31 - 1):
        path.write_bytes(content.replace(shape, np.array([rows, 12], "<i4").tobytes()))
        assert refused(read_mat, path, MV).reason == "unreadable-signal"


def test_a_compressed_variable_cannot_grow_without_end(tmp_path):
    head = b"MATLAB 5.0 MAT-file".ljust(124) + b"\0\1IM"
    bomb = zlib.compress(bytes(10**7), 9) + bytes(20)
    (tmp_path / "a.mat").write_bytes(head + np.array([15, len(bomb)], "<u4").tobytes() + bomb)
    assert refused(read_mat, tmp_path / "a.mat", MV).reason == "unreadable-signal"
    for size in (2**31 - 1, 2**32 - 1):
        for kind in (14, 15):
            (tmp_path / "a.mat").write_bytes(head + np.array([kind, size], "<u4").tobytes() + bytes(64))
            assert refused(read_mat, tmp_path / "a.mat", MV).reason == "truncated"


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(["4", "5", "compressed"]),
    at=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=3),
    cut=st.floats(0, 1) | st.none(),
    early=st.booleans(),
)
def test_any_change_of_a_mat(tmp_path_factory, kind, at, cut, early):
    path = tmp_path_factory.getbasetemp() / "any.mat"
    array = np.arange(600.0).reshape(50, 12) + 0.25
    scipy.io.savemat(path, {"val": array}, format="4" if kind == "4" else "5", do_compression=kind == "compressed")
    content = bytearray(path.read_bytes())
    reach = min(len(content), 220) if early else len(content)
    for place, byte in at:
        content[min(int(place * reach), len(content) - 1)] = byte
    content = content if cut is None else content[: int(cut * len(content))]
    path.write_bytes(content)
    try:
        reading = read_mat(path, MV)
    except Refused as refusal:
        assert "\n" not in refusal.detail
        return
    if kind == "compressed":  # a checksum over the content: nothing else can have come out
        np.testing.assert_array_equal(reading.signal, array.astype(np.float32))
        return
    # Every sample stands in the file, all in one type.
    samples = np.nan_to_num(reading.signal, nan=-9e9)
    kinds = [order + kind for order in "<>" for kind in ("f8", "f4", "i8", "u8", "i4", "u4", "i2", "u2", "i1", "u1")]
    held = []
    for start in range(8):
        for size in (np.dtype(kind) for kind in kinds):
            held.append(np.frombuffer(content, size, (len(content) - start) // size.itemsize, start))
    with np.errstate(over="ignore", invalid="ignore"):
        plain = [np.where(np.abs(values) <= 3.4e38, values, -9e9).astype(np.float32) for values in held]
    plain = [np.append(values, np.float32(-9e9)) for values in plain]
    assert any(np.isin(samples, values).all() for values in plain)


# ------------------------------------------------------------------------------------------------------ the facts


def test_texts_and_facts():
    assert texts(b"I,II V1") == ("I", "II", "V1") and texts(np.array(["I", "aVR "])) == ("I", "aVR")
    assert texts(3) == () and texts(np.array([1, 2])) == () and texts(["I", 2]) == ()
    assert facts_of("x", {"Sampling Rate": "500 Hz", "Unit": "mV", "rate": 60}).rate == 500
    assert facts_of("x", {"fs": np.array([400] * 12), "freq": 400.0}).rate == 400
    for value in ("fast", "", np.array([[]]), None, object(), np.array(["a", 3], object)):
        try:
            assert facts_of("x", {"fs": value}).rate is None
        except Refused as refusal:
            assert refusal.reason == "bad-rate"


# ------------------------------------------------------------------------------------------------- the real thing


@pytest.mark.parametrize(
    ("name", "declared", "row"),
    [
        ("leads_first_f32.npy", MV, None),
        ("samples_first_f64_fortran.npy", MV, None),
        ("batch_i16_uV.npy", Declared(500, "uV"), 0),
        ("batch_i16_uV.npy", Declared(500, "uV"), 1),
        ("nan_inf_f32.npy", MV, None),
    ],
)
def test_real_npy(quirks, name, declared, row):
    expected = np.load(quirks / "reencoded/expected_mV.npy")
    found = read_npy(quirks / "reencoded" / name, declared, row).signal
    lost = np.isnan(found)
    assert lost.sum() == (101 if name.startswith("nan") else 0)
    assert np.abs(found - (expected[::-1] if row == 1 else expected))[~lost].max() < 0.001


def test_real_standardised_npy(quirks):
    for name in ("533", "1005", "1924"):
        reading = read_npy(quirks / "natural/npy" / f"{name}.npy", Declared(500, "z"))
        np.testing.assert_array_equal(reading.signal, np.load(quirks / "natural/npy" / f"{name}.npy"))


@pytest.mark.parametrize(
    ("name", "declared"),
    [("val_v4.mat", Declared(500, "uV")), ("val_v5.mat", Declared(unit="mV")), ("val_v73.mat", MV)],
)
def test_real_mat(quirks, name, declared):
    expected = np.load(quirks / "reencoded/expected_mV.npy")
    reading = read_mat(quirks / "reencoded" / name, declared)
    assert reading.rate == 500 and np.abs(reading.signal - expected).max() < 0.001


def test_real_structs_and_named_matrices(quirks, shared_data):
    path = quirks / "natural/cpsc2018_original_mat/A1981.mat"
    data = scipy.io.loadmat(path)["ECG"][0, 0]["data"]
    np.testing.assert_array_equal(read_mat(path, MV).signal, data.T.astype(np.float32))
    for path in sorted((quirks / "natural/code15_mat").glob("*.mat")):
        reading = read_mat(path, Declared(unit="mV"))
        assert reading.rate == 400
        np.testing.assert_array_equal(reading.signal, scipy.io.loadmat(path)["feats"].T)
    path = shared_data / "chapman_denoised/records/MUSE_20180111_155154_74000.mat"
    reading = read_mat(path, Declared(500, "uV"))
    assert reading.signal.shape == (5000, 12) and 0.1 < reading.signal.std() < 1
