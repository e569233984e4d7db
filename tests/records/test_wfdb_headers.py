"""WFDB headers: what is parsed here, what is left to the package, and what is repaired when asked for."""

from pathlib import Path

import numpy as np
import pytest

from ecg_jax.records.leads import LEADS
from ecg_jax.records.readers.reading import Reading
from ecg_jax.records.readers.wfdb import read_wfdb
from ecg_jax.records.readers.wfdb_header import REPAIRS, parse, split
from ecg_jax.records.record import Refused

MERGED = ("merged-first-line",)
SUFFIX = ("record-name-suffix",)


def challenge(folder: Path, digital: np.ndarray, name="JS01052", gain="1000/mV") -> Path:
    """A record as the Challenge files are: int16 samples behind the 24 bytes that make the file a MATLAB matrix."""
    (folder / f"{name}.mat").write_bytes(bytes(24) + digital.astype("<i2").tobytes())
    lines = [f"{name} 12 500 {len(digital)}"]
    for lead, column in zip(LEADS, digital.T.tolist(), strict=True):
        lines.append(f"{name}.mat 16+24 {gain} 16 0 {column[0]} {sum(column) % 65536} 0 {lead}")
    (folder / f"{name}.hea").write_text("\n".join([*lines, "#Age: 59", "#Dx: 426783006"]) + "\n")
    return folder / name


def change(path: Path, number: int, new: str | None = None, old: str | None = None) -> None:
    """Replace line `number` of the header, or `old` by `new` in it; without `new` the line goes."""
    header = Path(f"{path}.hea")
    lines = header.read_text().splitlines()
    lines[number : number + 1] = [] if new is None else [lines[number].replace(old, new) if old else new]
    header.write_text("\n".join(lines) + "\n")


def outcome(path: Path, **options) -> Reading | Refused:
    try:
        return read_wfdb(path, **options)
    except Refused as refusal:
        assert refusal.reason and "\n" not in refusal.detail and len(refusal.detail) < 700
        return refusal


def reason(path: Path, **options) -> str:
    found = outcome(path, **options)
    assert isinstance(found, Refused), found
    return found.reason


@pytest.fixture
def digital() -> np.ndarray:
    return np.random.default_rng(0).integers(-3000, 3000, (100, 12))


# -------------------------------------------------------------------------------------------------- what is parsed


@pytest.mark.parametrize(
    ("line", "rate", "length", "time"),
    [
        ("a 1 500 5000", 500.0, 5000, None),
        ("a 1 360.0", 360.0, None, None),
        ("a\t1  62.4725/999.56 14400", 62.4725, 14400, None),
        ("a 1 250/125(0) 10", 250.0, 10, None),
        ("a 1 125 2000 8:26:04 26/10/1994", 125.0, 2000, "1994-10-26 08:26:04"),
        ("a 1 125 2000 10:44:18.529 04/05/2704", 125.0, 2000, "2704-05-04 10:44:18.529000"),
        ("a 1 125 2000 10:44:18", 125.0, 2000, None),
        ("a 1 500 7500 05-Feb-2020 11:39:16", 500.0, 7500, None),
    ],
)
def test_record_lines(line, rate, length, time):
    header, repair = parse([line, "a.dat 16 1000(-5)/uV 16 0 -7 -30000 0 some lead"], (), Path())
    assert (header.rate, header.length, header.time, repair) == (rate, length, time, None)
    (signal,) = header.signals
    assert signal == ("a.dat", "16", 1, 0, 0, 1000.0, -5, "uV", -7, -30000, "some lead")


@pytest.mark.parametrize(
    "line",
    [
        "a 2 500 5000", "a/2 1 500 5000", "a.mat 1 500 5000", "a 1", "a 1 -500 5000", "a 1 500 0", "a 1 500 -5", "a",
        "a 1 500 5000 25:00:00 01/01/2000", "a 1 500 5000 10:00:00 31/02/2000", "a 1 500 5000 more", "a 1 5e2 5000",
        "ä 1 500 5000", "a 1 500 500000/mV 16 0 15 31255 0 I", "", "a 1 500 " + "9" * 16,
    ],
)  # fmt: skip
def test_record_lines_left_to_others(line):
    assert parse([line, "a.dat 16 1000/mV 16 0 0 0 0 I"], (), Path()) is None


@pytest.mark.parametrize(
    "line",
    [
        "a.dat 516 1000/mV 16 0 0 0 0 I", "a.dat 16x2 1000/mV 16 0 0 0 0 I", "a.dat 16:3 1000/mV 16 0 0 0 0 I",
        "a.dat 16 1000/mV 16 0 0 0 I", "a.dat 16 1000/µV 16 0 0 0 0 I", "../a.dat 16 1000/mV 16 0 0 0 0 I",
        "a.dat 16 1e999/mV 16 0 0 0 0 I", "~ 16 1000/mV 16 0 0 0 0 I", "a.dat 16+-4 1000/mV 16 0 0 0 0 I",
        "a.dat 16 1000/mV 16 0 0 0 0", "a.dat 16 nan/mV 16 0 0 0 0 I", "a.dat 17 1000/mV 16 0 0 0 0 I",
    ],
)  # fmt: skip
def test_signal_lines_left_to_others(line):
    assert parse(["a 1 500 5000", line], (), Path()) is None


def test_defaults_of_a_signal_line():
    header, _ = parse(["a 1 500 5000", "a.dat 16x1:0 0 12 1024 0 0 0 I"], (), Path())
    assert (header.signals[0].gain, header.signals[0].baseline, header.signals[0].unit) == (200.0, 1024, "mV")


def test_lines_and_comments():
    text = "\ufeff# one\r\na 1 500\r\n\r\n  #two ä\n \ta.dat 16 # 3\n"
    assert split(text.encode()) == (["a 1 500", "a.dat 16 # 3"], ("one", "two ä"))
    assert split(text[1:].encode("latin-1")) == split(text.encode())
    # 0x85 is an ellipsis in many a Windows comment, and no end of a line.
    assert split(b"# and so on\x85 further\na 1 500")[0] == ["a 1 500"]


# ------------------------------------------------------------------------------------------------------- repairs


def test_unknown_repairs_are_a_mistake_of_the_caller(tmp_path):
    with pytest.raises(ValueError, match="record-name-suffix"):
        read_wfdb(tmp_path / "a", repairs=("everything",))


def test_name_with_suffix(tmp_path, digital):
    path = challenge(tmp_path, digital)
    good = read_wfdb(path, repairs=REPAIRS)
    change(path, 0, f"JS01052.mat 12 500 {len(digital)}")
    refusal = outcome(path)
    assert refusal.reason == "unreadable-header" and "record-name-suffix" in refusal.detail
    assert reason(path, repairs=MERGED) == "unreadable-header"
    reading = read_wfdb(path, repairs=SUFFIX)
    np.testing.assert_array_equal(reading.signal, good.signal)
    assert reading.comments == (*good.comments, "repaired: record-name-suffix")


def merge(path: Path, length: int, gain="1000") -> None:
    """As it happened to two headers of the published set: the second line lost its head up to within the gain."""
    header = Path(f"{path}.hea")
    lines = header.read_text().splitlines()
    rest = lines[1].split(f" {gain}/", 1)[1]
    header.write_text("\n".join([f"{path.name} 12 500 {length}{gain[2:]}/{rest}", *lines[2:]]) + "\n")


def test_merged_first_line(tmp_path):
    digital = np.random.default_rng(0).integers(-3000, 3000, (5000, 12))
    digital[0, 0], digital[1, 0] = 15, 0
    path = challenge(tmp_path, digital)
    good = read_wfdb(path)
    merge(path, 5000)
    assert Path(f"{path}.hea").read_text().startswith("JS01052 12 500 500000/mV 16 0 15 ")
    refusal = outcome(path)
    assert refusal.reason == "unreadable-header" and "merged-first-line" in refusal.detail
    assert reason(path, repairs=SUFFIX) == "unreadable-header"
    reading = read_wfdb(path, repairs=MERGED)
    np.testing.assert_array_equal(reading.signal, good.signal)
    assert reading.names == LEADS and reading.comments[-1] == "repaired: merged-first-line"


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        ("shorter", "unreadable-header"), ("longer", "unreadable-header"), ("digits", "unreadable-header"),
        ("gain", "unreadable-header"), ("unit", "unreadable-header"), ("line", "unreadable-header"),
        ("no-tail", "unreadable-header"), ("file", "unreadable-header"), ("sample", "checksum-mismatch"),
        ("checksum", "checksum-mismatch"), ("name", "duplicate-lead"),
    ],
)  # fmt: skip
def test_merged_first_line_with_any_doubt(tmp_path, digital, spoil, expected):
    path = challenge(tmp_path, digital)
    merge(path, 100)
    first = Path(f"{path}.hea").read_text().splitlines()[0]
    mat = tmp_path / "JS01052.mat"
    if spoil == "shorter":
        mat.write_bytes(mat.read_bytes()[:-2])
    elif spoil == "longer":
        mat.write_bytes(mat.read_bytes() + bytes(24))
    elif spoil == "sample":
        mat.write_bytes(mat.read_bytes()[:-2] + b"\x11\x22")
    elif spoil == "file":
        mat.unlink()
    elif spoil == "line":
        change(path, 3)
    elif spoil in ("gain", "unit"):
        change(path, 3, *{"gain": ("200/mV", "1000/mV"), "unit": ("1000/uV", "1000/mV")}[spoil])
    else:
        new = {
            "digits": ("10100/mV", "10000/mV"), "no-tail": ("100/mV", "10000/mV"), "name": (" II", " I"),
            "checksum": (" 7 0 I", f" {first.split()[-3]} 0 I"),
        }[spoil]  # fmt: skip
        assert new[1] in first
        change(path, 0, *new)
    assert reason(path, repairs=MERGED, checksums=False) == expected
