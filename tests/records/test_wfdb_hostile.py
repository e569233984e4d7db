"""No WFDB header or signal file, however made, gives anything but a signal that is in the file, or a `Refused`."""

import os
import tracemalloc
import warnings
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from ecg_jax.records.leads import LEADS
from ecg_jax.records.readers.reading import Reading
from ecg_jax.records.readers.wfdb import read_wfdb
from ecg_jax.records.readers.wfdb_header import REPAIRS
from ecg_jax.records.record import Refused

QUIET = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


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


@contextmanager
def little_memory(limit=20 << 20):
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < limit
    finally:
        tracemalloc.stop()


@pytest.fixture(scope="module", autouse=True)
def package_loaded():
    """Before memory is measured."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import soundfile  # noqa: F401
        import wfdb  # noqa: F401


@pytest.mark.parametrize(
    ("first", "signal", "expected"),
    [
        ("a 1 500 1000000000000", None, "truncated"),
        ("a 1 500 999999999999999", None, "truncated"),
        ("a 1 500 " + "9" * 30, None, "truncated"),
        ("a 1 500 " + "9" * 999, None, "unreadable-header"),
        ("a 1 500 0", None, "truncated"),
        ("a 1000000000 500 10", None, "unreadable-header"),
        ("a 0 500 10", None, "no-signals"),
        ("a 1 50O 10", None, "unreadable-header"),
        ("a 1 5#00 10", None, "unreadable-header"),
        ("a 1 500 1#0", None, "unreadable-header"),
        ("a 1 500 10:00:00", None, "unreadable-header"),
        ("a 1 500 10", "a.dat 16x1000000000 1000/mV 16 0 0 0 0 I", "truncated"),
        ("a 1 500 10", "a.dat 16x0 1000/mV 16 0 0 0 0 I", "unreadable-header"),
        ("a 1 500 10", "a.dat 16:1000000000 1000/mV 16 0 0 0 0 I", "unreadable-header"),
        ("a 1 500 10", "a.dat 16+1000000000000 1000/mV 16 0 0 0 0 I", "truncated"),
        ("a 1 500", "a.dat 16+1000000000000 1000/mV 16 0 0 0 0 I", "truncated"),
        ("a 1 500 10", "a.dat 16+-4 1000/mV 16 0 0 0 0 I", None),
        ("a 1 500 10", "a.dat 516 1000/mV 16 0 0 0 0 I", "unreadable-signal"),
        ("a 1 500", "a.dat 516 1000/mV 16 0 0 0 0 I", "unreadable-header"),
        ("a 1 500 10", "a.dat 99 1000/mV 16 0 0 0 0 I", "unreadable-header"),
        ("a 1 500 10", "../a.dat 16 1000/mV 16 0 0 0 0 I", "unreadable-header"),
        ("a 1 500 10", "/etc/passwd 16 1000/mV 16 0 0 0 0 I", "unreadable-header"),
        ("a 1 500 10", "..\\a.dat 16 1000/mV 16 0 0 0 0 I", "unreadable-header"),
        ("a 1 500 10", ".. 16 1000/mV 16 0 0 0 0 I", "unreadable-header"),
        ("a 1 500 10", "x" * 300 + " 16 1000/mV 16 0 0 0 0 I", "missing-signal-file"),
        ("a 1 500 10", "x" * 3000 + " 16 1000/µV 16 0 0 0 0 I", "unreadable-header"),
        ("a 1 500 10", "~ 16 1000/mV 16 0 0 0 0 I", "missing-signal-file"),
        ("a 1 500 10", "folder 16 1000/mV 16 0 0 0 0 I", "missing-signal-file"),
        ("a 1 500 10", "fifo 16 1000/mV 16 0 0 0 0 I", "missing-signal-file"),
        ("a/2 1 500 10", "../a 5\n../a 5", "unreadable-header"),
        ("a/2 1 500 10", "a 5\na 5", "unreadable-header"),
        ("a/1 1 500 1000000000000", "~ 1000000000000", "no-signals"),
        ("a/2 1 500 1000000000000", "b 10\n~ 999999999990", "truncated"),
        ("a/3 1 500 10", "b 10", "unreadable-header"),
        ("a/1 1 500 20", "b 20", "unreadable-header"),
        ("a/1 1 250 10", "b 10", "unreadable-header"),
        ("a/1 1 1000 10", "b 10", "mixed-rates"),
        ("a/1 1 0 10", "b 10", "mixed-rates"),
    ],
)
def test_what_a_header_may_not_say(tmp_path, first, signal, expected):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    (tmp_path.parent / "a.dat").write_bytes(bytes(20))
    for name in "ab":
        (tmp_path / f"{name}.dat").write_bytes(bytes(20))
        (tmp_path / f"{name}.hea").write_text(f"{name} 1 500 10\n{name}.dat 16 1000/mV 16 0 0 0 0 I\n")
    assert read_wfdb(tmp_path / "b").signal.shape == (10, 12)
    (tmp_path / "a.hea").write_text(f"{first}\n{signal or 'a.dat 16 1000/mV 16 0 0 0 0 I'}\n")
    with little_memory():
        found = outcome(tmp_path / "a")
    assert expected is None or (isinstance(found, Refused) and found.reason == expected), found


def test_segments_as_they_should_be(tmp_path):
    for name, leads in (("b", ("I", "II")), ("c", ("II",)), ("layout", ("I", "II"))):
        (tmp_path / f"{name}.dat").write_bytes(np.arange(10 * len(leads), dtype="<i2").tobytes())
        lines = [f"{name}.dat 16 1/mV 16 0 0 0 0 {lead}" for lead in leads]
        (tmp_path / f"{name}.hea").write_text("\n".join([f"{name} {len(leads)} 500 10", *lines]))
    (tmp_path / "a.hea").write_text("a/4 2 500 25\nlayout 0\nb 10\n~ 5\nc 10\n")
    signal = read_wfdb(tmp_path / "a").signal
    assert signal.shape == (25, 12)
    np.testing.assert_array_equal(signal[:10, :2], np.arange(20).reshape(10, 2))
    np.testing.assert_array_equal(signal[15:, 1], np.arange(10))
    assert np.isnan(signal[10:15]).all() and np.isnan(signal[15:, 0]).all()
    (tmp_path / "c.dat").write_bytes(bytes(19))
    assert reason(tmp_path / "a") == "truncated"


@pytest.mark.parametrize(
    "content", [b"\0" * 100, b"\xff" * 100, bytes(range(256)) * 9, b"a" * 100_000, b"#" * 99, b" "]
)
def test_binary_headers(tmp_path, content):
    (tmp_path / "a.hea").write_bytes(content)
    assert reason(tmp_path / "a", repairs=REPAIRS) == "unreadable-header"


def test_what_is_no_header(tmp_path):
    (tmp_path / "a.hea").mkdir()
    os.mkfifo(tmp_path / "pipe.hea")
    assert reason(tmp_path / "pipe") == "unreadable-header"
    assert reason(tmp_path / "a") == "unreadable-header"
    assert reason(tmp_path / "a.hea" / "b" / "c") == "missing-file"
    assert reason(tmp_path / "\0") == "unreadable-header"
    assert reason(tmp_path / ("x" * 300)) in ("missing-file", "unreadable-header")
    with (tmp_path / "big.hea").open("wb") as file:
        file.truncate(1 << 33)
    with little_memory():
        assert reason(tmp_path / "big") == "unreadable-header"


PIECES = [
    b"", b" ", b"/", b"-1", b"#", b"0", b"9999", b"\xff", b"x", b"+24", b"(", b"\n", b"e", b"1000000000000", b"~",
    b"../",
    b".", b"\t", b"\r", b"\0", b"16", b"212", b"310", b"516", b"8", b"a/2", b":5", b"x3", b"a.dat", b"a.hea", b"NaN",
]  # fmt: skip


@st.composite
def mutations(draw):
    """(line, first and last place, what comes there) of one to three changes."""
    place = st.tuples(st.integers(0, 12), st.integers(0, 60), st.integers(0, 8), st.sampled_from(PIECES))
    return draw(st.lists(place, min_size=1, max_size=3))


@QUIET
@given(changes=mutations(), first_line=st.booleans(), repairs=st.sampled_from([(), REPAIRS]))
@example(changes=[(0, 0, 1, b"a/2")], first_line=True, repairs=())
@example(changes=[(0, 8, 2, b"1000000000000")], first_line=True, repairs=())
def test_mutated_headers_are_refused_or_read(tmp_path, changes, first_line, repairs):
    digital = np.ones((20, 12), "<i2")
    (tmp_path / "a.dat").write_bytes(digital.tobytes())
    lines = [b"a 12 500 20", *(f"a.dat 16 1000/mV 16 0 1 20 0 {lead}".encode() for lead in LEADS)]
    for number, start, size, piece in changes:
        number = 0 if first_line else number
        lines[number] = lines[number][:start] + piece + lines[number][start + size :]
    (tmp_path / "a.hea").write_bytes(b"\n".join(lines))
    found = outcome(tmp_path / "a", repairs=repairs)
    if isinstance(found, Reading):
        assert found.signal.shape[1] == 12 and found.signal.dtype == np.float32
        assert found.signal.shape[0] <= digital.nbytes  # no format packs more than a sample into a byte


@QUIET
@given(data=st.binary(max_size=300), first=st.booleans())
def test_garbage_headers(tmp_path, data, first):
    (tmp_path / "a.dat").write_bytes(bytes(500))
    (tmp_path / "a.hea").write_bytes((b"a 2 500 10\n" if first else b"") + data)
    found = outcome(tmp_path / "a", repairs=REPAIRS)
    assert isinstance(found, Refused) or found.signal.shape[0] <= 500


# ------------------------------------------------------------------------------------------- hostile signal files


FORMATS = {"16": 40, "61": 40, "160": 40, "80": 20, "24": 60, "32": 80, "212": 30, "8": 20, "310": 28, "311": 27}


@pytest.mark.parametrize("fmt", FORMATS)
def test_every_missing_byte_is_missed(tmp_path, fmt):
    """Ten frames of two signals, whose file loses or gains bytes."""
    data = np.random.default_rng(0).integers(0, 256, 100, np.uint8).tobytes()
    lines = [f"a.dat {fmt} 1000/mV 16 0 0 0 0 {lead}" for lead in ("I", "V1")]
    (tmp_path / "a.hea").write_text("\n".join(["a 2 500 10", *lines]))
    need = FORMATS[fmt]
    for size in range(need):
        (tmp_path / "a.dat").write_bytes(data[:size])
        assert reason(tmp_path / "a") == "truncated", size
    readings = []
    for size in (need, need + 1, 100):
        (tmp_path / "a.dat").write_bytes(data[:size])
        readings.append(read_wfdb(tmp_path / "a"))
    assert len({reading.source for reading in readings}) == 3  # what follows the samples is part of the file
    for reading in readings:
        assert reading.signal.shape == (10, 12)
        np.testing.assert_array_equal(reading.signal, readings[0].signal)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_spoiled_flac(tmp_path, data):
    """A compressed file cut off or with bytes changed: the samples as they were, or a refusal."""
    import soundfile

    path, digital = tmp_path / "a", np.arange(400, dtype=np.int16).reshape(200, 2)
    with (tmp_path / "a.dat").open("wb") as file:
        soundfile.write(file, digital, 500, format="FLAC", subtype="PCM_16")
    lines = [
        f"a.dat 516 1/mV 16 0 {column[0]} {sum(column) % 65536} 0 {lead}"
        for lead, column in zip(("I", "V1"), digital.T.tolist(), strict=True)
    ]
    (tmp_path / "a.hea").write_text("\n".join(["a 2 500 200", *lines]))
    np.testing.assert_array_equal(read_wfdb(path).signal[:, [0, 6]], digital)
    content = bytearray((tmp_path / "a.dat").read_bytes())
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    else:
        for _ in range(data.draw(st.integers(1, 4))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / "a.dat").write_bytes(content)
    found = outcome(path)
    if isinstance(found, Reading):
        np.testing.assert_array_equal(found.signal[:, [0, 6]], digital)
    (tmp_path / "a.hea").write_text("\n".join(["a 2 500 1000000000000", *lines]))
    with little_memory():
        assert reason(path) in ("truncated", "unreadable-signal")
