"""Text tables of samples."""

import hashlib
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ecg_jax.records.leads import LEADS
from ecg_jax.records.readers.arrays import Declared
from ecg_jax.records.readers.csv import Dialect, read_csv
from ecg_jax.records.record import Refused

MV = Declared(500, "mV")
BARE = Dialect(header=False)
COMMA = Dialect(decimal="comma")


@pytest.fixture
def signal() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(50, 12)).round(3)


def write(path: Path, signal: np.ndarray, mark=",", head=LEADS, decimal=".", time=None, end="\n") -> Path:
    lines = [mark.join(head)] if head else []
    for i, row in enumerate(signal):
        cells = ([time[i]] if time is not None else []) + [f"{value:.3f}" for value in row]
        lines.append(mark.join(cells).replace(".", decimal))
    path.write_text(end.join(lines) + end, encoding="utf-8")
    return path


def refused(*arguments) -> Refused:
    with pytest.raises(Refused) as refusal:
        read_csv(*arguments)
    assert "\n" not in refusal.value.detail
    return refusal.value


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize(("mark", "decimal"), [(",", "."), (";", "."), ("\t", "."), (";", ","), ("\t", ",")])
def test_marks(tmp_path, signal, mark, decimal, end):
    path = write(tmp_path / "a.csv", signal, mark, [lead.lower() for lead in LEADS], decimal, end=end)
    reading = read_csv(path, MV, COMMA if decimal == "," else Dialect())
    np.testing.assert_allclose(reading.signal, signal, atol=1e-6)
    assert reading.rate == 500 and reading.source == hashlib.sha256(path.read_bytes()).digest()


def test_decimal_comma_is_said(tmp_path, signal):
    refusal = refused(write(tmp_path / "a.csv", signal, ";", decimal=","), MV)
    assert refusal.reason == "decimal-comma" and "a.csv:2: column I" in refusal.detail
    assert refused(write(tmp_path / "a.csv", signal, ";"), MV, COMMA).reason == "decimal-comma"
    assert refused(write(tmp_path / "a.csv", signal), MV, COMMA).reason == "decimal-comma"


def test_time_gives_the_rate(tmp_path, signal):
    for rate, unit, factor, digits in ((500, "s", 1, 3), (400, "s", 1, 3), (250, "ms", 1e3, 0), (257, "s", 1, 6)):
        time = [f"{i / rate * factor:.{digits}f}" for i in range(50)]
        head = [f"Time ({unit})", *(f"{lead} [uV]" for lead in LEADS)]
        path = write(tmp_path / "a.csv", signal, ";", head, time=time)
        reading = read_csv(path, Declared())
        assert reading.rate == pytest.approx(rate, rel=2e-2 if rate == 400 else 1e-5)
        np.testing.assert_allclose(reading.signal, signal / 1000, atol=1e-9)
        assert reading.names == LEADS
    assert refused(path, Declared(500)).reason == "rate-mismatch"
    assert refused(path, Declared(unit="mV")).reason == "unit-mismatch"
    path = write(tmp_path / "a.csv", signal, head=["t", *LEADS], time=[str(i) for i in range(50)])
    assert refused(path, Declared(unit="mV")).reason == "no-rate"
    np.testing.assert_allclose(read_csv(path, MV).signal, signal, atol=1e-6)


@pytest.mark.parametrize("fault", ["gap", "back", "empty", "still", "text"])
def test_time_that_leaps(tmp_path, signal, fault):
    seconds = np.arange(50) / 500
    seconds[30:] += {"gap": 0.01, "back": -0.1}.get(fault, 0)
    time = [f"{value:.3f}" for value in seconds]
    time[40] = {"empty": "", "text": "x"}.get(fault, time[40])
    time = ["0.1"] * 50 if fault == "still" else time
    refusal = refused(write(tmp_path / "a.csv", signal, head=["time_s"[:4] + " (s)", *LEADS], time=time), MV)
    assert refusal.reason == ("bad-number" if fault == "text" else "uneven-time")


def test_headers(tmp_path, signal):
    path = write(tmp_path / "a.csv", signal, head=None)
    assert "header=off" in refused(path, MV).detail
    np.testing.assert_allclose(read_csv(path, MV, BARE).signal, signal, atol=1e-6)
    turned = Declared(500, "mV", tuple(reversed(LEADS)))
    np.testing.assert_allclose(read_csv(path, turned, BARE).signal, signal[:, ::-1], atol=1e-6)
    assert refused(path, Declared(500, "mV", ("I", "II")), BARE).reason == "bad-shape"
    assert refused(write(tmp_path / "b.csv", signal[:, :3], head=None), MV, BARE).reason == "bad-shape"
    counted = write(tmp_path / "c.csv", signal, head=[str(i) for i in range(12)])
    assert refused(counted, MV).reason == "no-header"
    assert refused(counted, MV, BARE).reason == "unexpected-header"
    np.testing.assert_allclose(read_csv(counted, turned).signal, signal[:, ::-1], atol=1e-6)
    named = write(tmp_path / "d.csv", signal)
    assert refused(named, MV, BARE).reason == "unexpected-header"
    assert refused(named, turned).reason == "lead-mismatch"
    assert refused(write(tmp_path / "e.csv", signal, head=["I (NU)", *LEADS[1:]]), MV).reason == "unknown-unit"
    assert refused(write(tmp_path / "f.csv", signal, head=["I", "i", *LEADS[2:]]), MV).reason == "duplicate-lead"
    assert refused(write(tmp_path / "g.csv", signal, head=list("abcdefghjklm")), MV).reason == "missing-lead"


def test_lines(tmp_path, signal):
    path = write(tmp_path / "a.csv", signal)
    lines = path.read_text().splitlines()
    extra = ["# device", "% x,y", "", *lines[:1], "", *lines[1:], "", "#"]
    path.write_text("\ufeff" + "\n".join(extra), encoding="utf-8")
    np.testing.assert_allclose(read_csv(path, MV).signal, signal, atol=1e-6)
    path.write_text("\n".join(extra).replace("V1", "V1 (µV)"), encoding="latin-1")
    assert read_csv(path, Declared(500, "uV")).signal[0, 6] == pytest.approx(signal[0, 6] / 1000)
    path.write_text("\n".join(extra), encoding="utf-16")
    np.testing.assert_allclose(read_csv(path, MV).signal, signal, atol=1e-6)
    lines[7] = ",".join(["", "NaN", " 1 ", '"2"', "-inf", *lines[7].split(",")[5:]])
    path.write_text("\n".join(lines))
    row = read_csv(path, MV).signal[6]
    assert np.isnan(row[[0, 1, 4]]).all() and row[2:4].tolist() == [1, 2] and not np.isnan(row[5:]).any()
    path.write_text("note," + "\n1 000 x,".join(lines))  # a column that is no lead may hold anything
    assert read_csv(path, MV).names == LEADS


@pytest.mark.parametrize(
    ("cell", "reason"),
    [("x", "bad-number"), ("1_0", "bad-number"), ("1e", "bad-number"), ("0x1", "bad-number"), ("--1", "bad-number"),
     ('"1,5"', "decimal-comma"), ("1,5", "bad-row"), ('"1', "unreadable-signal"), ("1.2.3", "bad-number")],
)  # fmt: skip
def test_cells(tmp_path, signal, cell, reason):
    path = write(tmp_path / "a.csv", signal)
    lines = path.read_text().splitlines()
    lines[5] = ",".join([*lines[5].split(",")[:3], cell, *lines[5].split(",")[4:]])
    path.write_text("\n".join(lines))
    refusal = refused(path, MV)
    assert refusal.reason == reason
    assert "a.csv:6" in refusal.detail or reason == "unreadable-signal"
    assert "aVR" in refusal.detail or reason in ("bad-row", "unreadable-signal")


def test_files_that_are_none(tmp_path, signal):
    path = tmp_path / "a.csv"
    assert refused(path, MV).reason == "missing-file"
    assert refused(tmp_path, MV).reason == "unreadable-signal"
    for text in ("", "\n\n# x\n", ",".join(LEADS)):
        path.write_text(text)
        assert refused(path, MV).reason == "no-samples"
    assert refused(write(path, signal), Declared(500)).reason == "no-unit"
    assert refused(path, Declared(unit="mV")).reason == "no-rate"


@settings(max_examples=200, deadline=None)
@given(content=st.binary(max_size=200) | st.text('I,;\t"\n\r#.0123456789-eV()', max_size=200).map(str.encode))
def test_any_bytes(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "bytes.csv"
    path.write_bytes(content)
    for dialect in (Dialect(), BARE, COMMA):
        try:
            assert read_csv(path, Declared(500, "mV", ("I", "II")), dialect).signal.shape[1] == 12
        except Refused as refusal:
            assert "\n" not in refusal.detail


@settings(max_examples=150, deadline=None)
@given(
    values=st.lists(st.tuples(st.floats(width=32), st.floats(width=32)), min_size=1, max_size=8),
    mark=st.sampled_from(",;\t"),
    change=st.tuples(st.integers(0, 300), st.sampled_from([*'0159-+.,;e \t"\nxV'])) | st.none(),
)
def test_a_changed_file_is_read_as_it_is_or_not_at_all(tmp_path_factory, values, mark, change):
    path = tmp_path_factory.getbasetemp() / "changed.csv"
    text = f"I{mark}V1\n" + "".join(f"{a!r}{mark}{b!r}\n" for a, b in values)
    if change is not None:
        place = change[0] % len(text)
        text = text[:place] + change[1] + text[place + 1 :]
    path.write_text(text)
    try:
        reading = read_csv(path, MV)
    except Refused as refusal:
        assert "\n" not in refusal.detail and (change is not None)
        return
    lines = [line for line in text.split("\n") if line.strip()]
    mark = next(found for found in "\t;," if found in lines[0] or found == ",")
    names = [cell.strip() for cell in lines[0].replace('"', "").split(mark)]
    with np.errstate(over="ignore"):
        rows = [[cell.strip().strip('"') for cell in line.split(mark)] for line in lines[1:]]
        for name, lead in (("I", 0), ("V1", 6)):
            if name in names:
                cells = [row[names.index(name)] for row in rows]
                expected = np.array([float(cell or "nan") for cell in cells]).astype(np.float32)
                np.testing.assert_array_equal(reading.signal[:, lead], np.where(np.isinf(expected), np.nan, expected))


def test_real_files(shared_data, tmp_path):
    with tarfile.open(shared_data / "quirks/reencoded.tar.xz") as tar:
        tar.extractall(tmp_path, filter="data")
    expected = np.load(tmp_path / "reencoded/expected_mV.npy")
    for name, declared, dialect in (
        ("comma.csv", MV, Dialect()),
        ("semicolon_time_uV.csv", Declared(), COMMA),
        ("semicolon_time_uV.csv", Declared(500, "uV"), COMMA),
    ):
        reading = read_csv(tmp_path / "reencoded" / name, declared, dialect)
        assert reading.rate == 500 and np.abs(reading.signal - expected).max() < 0.001
