"""WFDB files, good and bad, natural and made up."""

import hashlib
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ecg_jax.records.leads import LEADS
from ecg_jax.records.readers import read_wfdb
from ecg_jax.records.record import Refused


def write(folder: Path, name: str, digital: np.ndarray, names=LEADS, unit="mV", gain=1000, checksum=True) -> Path:
    """A format 16 record, written byte by byte so that the test does not lean on the library it tests."""
    digital = digital.astype("<i2")
    (folder / f"{name}.dat").write_bytes(digital.tobytes())
    lines = [f"{name} {len(names)} 500 {len(digital)}"]
    for i, lead in enumerate(names):
        total = int(digital[:, i].astype(int).sum()) % 65536 if checksum else 0
        first = digital[0, i] if checksum else 0
        lines.append(f"{name}.dat 16 {gain}(0)/{unit} 16 0 {first} {total} 0 {lead}")
    (folder / f"{name}.hea").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / name


def refused(path: Path, **options) -> Refused:
    with pytest.raises(Refused) as refusal:
        read_wfdb(path, **options)
    assert "\n" not in refusal.value.detail and len(refusal.value.detail) < 400
    return refusal.value


@pytest.fixture
def digital():
    return np.random.default_rng(0).integers(-3000, 3000, (1000, 12))


def test_millivolt_and_digest(tmp_path, digital):
    path = write(tmp_path, "a", digital, names=[lead.upper() for lead in LEADS])
    reading = read_wfdb(path)
    np.testing.assert_allclose(reading.signal, digital / 1000, atol=1e-6)
    assert reading.signal.dtype == np.float32 and reading.rate == 500 and reading.derived == ()
    content = (tmp_path / "a.hea").read_bytes() + (tmp_path / "a.dat").read_bytes()
    assert reading.source == hashlib.sha256(content).digest()


@pytest.mark.parametrize(("unit", "factor"), [("mV", 1), ("MV", 1), ("mv", 1), ("uV", 1e-3), ("V", 1e3), ("µV", 1e-3)])
def test_units(tmp_path, digital, unit, factor):
    reading = read_wfdb(write(tmp_path, "a", digital, unit=unit))
    np.testing.assert_allclose(reading.signal, digital / 1000 * factor, rtol=1e-5, atol=1e-9)


def test_no_unit(tmp_path, digital):
    path = write(tmp_path, "a", digital, unit="NU")
    refusal = refused(path)
    assert refusal.reason == "unknown-unit" and "NU" in refusal.detail and "unit=z" in refusal.detail
    np.testing.assert_allclose(read_wfdb(path, unit="z").signal, digital / 1000, atol=1e-6)


def test_unit_less_leads_are_not_derived(tmp_path, digital):
    eight = [lead for lead in LEADS if not lead.startswith("a") and lead != "III"]
    path = write(tmp_path, "a", digital[:, :8], names=eight)
    assert set(read_wfdb(path).derived) == {"III", "aVR", "aVL", "aVF"}
    assert refused(path, unit="z").reason == "missing-lead"


def test_invalid_samples_are_nan(tmp_path, digital):
    digital[10:20, 3] = -32768
    signal = read_wfdb(write(tmp_path, "a", digital)).signal
    assert np.isnan(signal[10:20, 3]).all() and np.isnan(signal).sum() == 10


def test_truncated(tmp_path, digital):
    path = write(tmp_path, "a", digital)
    data = (tmp_path / "a.dat").read_bytes()
    (tmp_path / "a.dat").write_bytes(data[: len(data) // 2 + 1])
    refusal = refused(path)
    assert refusal.reason == "truncated" and "a.dat" in refusal.detail and "500 of 1000" in refusal.detail


def test_missing_files_and_leads(tmp_path, digital):
    assert refused(tmp_path / "none").reason == "missing-file"
    path = write(tmp_path, "a", digital[:, :11], names=LEADS[:11])
    refusal = refused(path)
    assert refusal.reason == "missing-lead" and "V6" in refusal.detail
    (tmp_path / "a.dat").unlink()
    refusal = refused(path)
    assert refusal.reason == "missing-signal-file" and "a.dat" in refusal.detail


def test_header_describes_fewer_leads_than_it_announces(tmp_path, digital):
    path = write(tmp_path, "a", digital)
    header = tmp_path / "a.hea"
    header.write_text("".join(header.read_text().splitlines(keepends=True)[:-1]))
    refusal = refused(path)
    assert refusal.reason == "unreadable-header" and "12 signals and describes 11" in refusal.detail


def test_checksums(tmp_path, digital):
    path = write(tmp_path, "a", digital)
    data = bytearray((tmp_path / "a.dat").read_bytes())
    data[2 * (12 * 500 + 7)] ^= 1
    (tmp_path / "a.dat").write_bytes(data)
    refusal = refused(path)
    assert refusal.reason == "checksum-mismatch" and "V2" in refusal.detail
    assert read_wfdb(path, checksums=False).signal.shape == (1000, 12)
    assert read_wfdb(write(tmp_path, "b", digital, checksum=False)).signal.shape == (1000, 12)


@pytest.mark.parametrize(
    "header",
    [
        "",
        "\n",
        "# only a comment\n",
        "a.mat 12 500 1000\n",
        "a 0 500 1000\n",
        "a/2 12 500 1000\nx 10\ny 20\n",
    ],
)
def test_broken_headers(tmp_path, header):
    (tmp_path / "a.hea").write_text(header)
    assert refused(tmp_path / "a").reason in ("unreadable-header", "no-signals", "missing-signal-file")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_garbage_headers_are_refused_or_read(tmp_path, data):
    """Any header gives a signal of twelve leads or a `Refused`, never another exception."""
    digital = np.ones((20, 12))
    path = write(tmp_path, "a", digital)
    lines = (tmp_path / "a.hea").read_bytes().split(b"\n")
    for _ in range(data.draw(st.integers(1, 3))):
        i = data.draw(st.integers(0, len(lines) - 1))
        cut = data.draw(st.integers(0, len(lines[i])))
        piece = data.draw(
            st.sampled_from([b"", b" ", b"/", b"-1", b"#", b"0", b"9999", b"\xff", b"x", b"+24", b"(", b"\n"])
        )
        keep = data.draw(st.integers(cut, len(lines[i])))
        lines[i] = lines[i][:cut] + piece + lines[i][keep:]
    (tmp_path / "a.hea").write_bytes(b"\n".join(lines))
    try:
        assert read_wfdb(path).signal.shape[1] == 12
    except Refused as refusal:
        assert refusal.reason and refusal.detail


@pytest.fixture(scope="module")
def quirks(shared_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("quirks")
    with tarfile.open(shared_data / "quirks" / "reencoded.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder / "reencoded"


@pytest.mark.parametrize(
    ("name", "tolerance"),
    [
        ("fmt80", 0.010001), ("fmt212", 0.000626), ("fmt16", 0.0005), ("fmt61", 0.0005), ("fmt160", 0.0005),
        ("fmt24", 6e-6), ("fmt32", 2e-6), ("fmt310", 0.0025), ("fmt311", 0.0025), ("fmt508", 0.010001),
        ("fmt516", 0.0005), ("fmt524", 6e-6), ("gains", 0.0026), ("mimic_order", 0.0026),
        ("shuffled_case", 0.001), ("eight_leads", 0.0021), ("extra_signals", 0.001), ("two_files", 0.001),
        ("no_length", 0.001),
        ("invalid_samples", 0.001), ("multi_fixed", 0.001), ("multi_var", 0.001), ("spf5", 0.001),
        ("crlf", 0.001), ("val_hea", 0.001),
    ],
)  # fmt: skip
def test_one_real_ecg_in_many_forms(quirks, name, tolerance):
    truth = np.load(quirks / "expected_mV.npy")
    reading = read_wfdb(quirks / name)
    assert reading.rate == 500 and reading.signal.shape == truth.shape
    there = np.isfinite(reading.signal)
    assert there.all() or name in ("invalid_samples", "multi_var")
    assert np.abs(reading.signal - truth)[there].max() <= tolerance


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("bad_checksum", "checksum-mismatch"),
        ("truncated", "truncated"),
        ("duplicate_lead", "duplicate-lead"),
        ("prefixed_names", "missing-lead"),
    ],
)
def test_one_real_ecg_spoiled(quirks, name, reason):
    assert refused(quirks / name).reason == reason
