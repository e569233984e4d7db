"""What `read_wfdb` returns for small made-up records, and what it refuses. Formats, headers and real files have their
own modules.
"""

import hashlib
from pathlib import Path

import numpy as np
import pytest

from ecg_jax.records.leads import LEADS
from ecg_jax.records.readers.wfdb import read_wfdb
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
    reading = read_wfdb(path, unit="z")
    assert reading.derived == () and set(reading.missing) == {"III", "aVR", "aVL", "aVF"}
    assert np.isnan(reading.signal[:, 2:6]).all() and np.isfinite(reading.signal[:, 6:]).all()


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
    reading = read_wfdb(path)
    assert reading.missing == ("V6",) and np.isnan(reading.signal[:, 11]).all()
    assert np.isfinite(reading.signal[:, :11]).all()
    refusal = refused(write(tmp_path, "b", digital, names=[f"x{i}" for i in range(12)]))
    assert refusal.reason == "missing-lead" and "x11" in refusal.detail
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
