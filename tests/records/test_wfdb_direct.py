"""The direct reader gives what the `wfdb` package gives, to the bit, and what the bytes say."""

import hashlib
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ecg_jax.records.leads import LEADS
from ecg_jax.records.readers import wfdb_header
from ecg_jax.records.readers.reading import Reading
from ecg_jax.records.readers.wfdb import read_wfdb
from ecg_jax.records.readers.wfdb_direct import INVALID, sums
from ecg_jax.records.record import Refused

BITS = {"16": 16, "61": 16, "160": 16, "80": 8, "24": 24, "32": 32, "212": 12}


def encode(fmt: str, flat: list[int]) -> bytes:
    """Samples as the format's description has them, one by one, so as not to lean on the code under test."""
    if fmt == "212":
        out, pairs = bytearray(), [*flat, *[0] * (len(flat) % 2)]
        for one, two in zip(pairs[::2], pairs[1::2], strict=True):
            one, two = one & 0xFFF, two & 0xFFF
            out += bytes([one & 0xFF, one >> 8 | two >> 8 << 4, two & 0xFF])
        return bytes(out[: -(-len(flat) * 3 // 2)])
    size = BITS[fmt] // 8
    if fmt in ("80", "160"):
        return b"".join((value + (1 << 8 * size - 1)).to_bytes(size, "little") for value in flat)
    return b"".join(value.to_bytes(size, "big" if fmt == "61" else "little", signed=True) for value in flat)


def write(
    folder: Path, files: list[tuple[str, np.ndarray]], gains: list[str], baselines: list[int], offset=0, length=True
) -> Path:
    """Record "a": for each signal file its format and int [T, n]; leads in the order of `LEADS`."""
    lines, names = [], iter(LEADS)
    for number, (fmt, digital) in enumerate(files):
        (folder / f"a{number}.dat").write_bytes(bytes(range(offset)) + encode(fmt, digital.ravel().tolist()))
        for column in digital.T.tolist():
            i = len(lines)
            place = f"+{offset}" if offset else ""
            total = sum(column) % 65536 - (65536 if i % 2 else 0)  # both signs are in use
            lines.append(
                f"a{number}.dat {fmt}{place} {gains[i]}({baselines[i]})/mV 16 0 {column[0]} {total} 0 {next(names)}"
            )
    count = f" {len(files[0][1])}" if length else ""
    (folder / "a.hea").write_text("\n".join([f"a {len(lines)} 500{count}", *lines]) + "\n")
    return folder / "a"


def by_package(path: Path, **options) -> Reading:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wfdb_header, "parse", lambda *_: None)
        return read_wfdb(path, **options)


def assert_same(one: Reading, two: Reading) -> None:
    assert one.signal.shape == two.signal.shape and one.signal.tobytes() == two.signal.tobytes()
    for field in ("rate", "names", "derived", "missing", "source", "time", "comments"):
        assert getattr(one, field) == getattr(two, field), field


def is_direct(path: Path, repairs: tuple[str, ...] = ()) -> bool:
    lines, _ = wfdb_header.split(Path(f"{path}.hea").read_bytes())
    return wfdb_header.parse(lines, repairs, path.parent) is not None


GAIN = st.sampled_from(["1000", "200", "1000.0", "33.3", "-5", "1.052e+04", "0", "0.001", "7247"])


@st.composite
def records(draw):
    length = draw(st.integers(1, 150))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    files = []
    for _ in range(draw(st.integers(1, 2))):
        fmt = draw(st.sampled_from(sorted(BITS)))
        edge = 1 << BITS[fmt] - 1
        digital = rng.integers(-edge, edge, (length, draw(st.integers(1, 6))))
        digital[rng.random(digital.shape) < 0.1] = INVALID[fmt]
        files.append((fmt, digital))
    n = sum(digital.shape[1] for _, digital in files)
    gains = draw(st.lists(GAIN, min_size=n, max_size=n))
    baselines = draw(st.lists(st.integers(-(2**20), 2**20) | st.just(0), min_size=n, max_size=n))
    return files, gains, baselines, draw(st.sampled_from([0, 1, 24, 33]))


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(record=records())
def test_every_format_to_the_bit(tmp_path, record):
    files, gains, baselines, offset = record
    path = write(tmp_path, files, gains, baselines, offset)
    assert is_direct(path)
    reading = read_wfdb(path)
    assert_same(reading, by_package(path))
    at = 0
    for fmt, digital in files:
        for column in digital.T:
            gain = float(gains[at]) or 200.0
            truth = ((column - baselines[at]) / gain).astype(np.float32)
            truth[column == INVALID[fmt]] = np.nan
            np.testing.assert_array_equal(reading.signal[:, at], truth)
            at += 1
    content = (tmp_path / "a.hea").read_bytes() + b"".join(
        (tmp_path / f"a{i}.dat").read_bytes() for i in range(len(files))
    )
    assert reading.source == hashlib.sha256(content).digest()


@pytest.mark.parametrize("fmt", sorted(BITS))
def test_length_by_the_size_of_the_file(tmp_path, fmt):
    digital = np.arange(2 * 31).reshape(31, 2)
    path = write(tmp_path, [(fmt, digital)], ["1", "1"], [0, 0], offset=5, length=False)
    assert is_direct(path)
    assert_same(read_wfdb(path), by_package(path))
    np.testing.assert_array_equal(read_wfdb(path).signal[:, :2], digital)
    (tmp_path / "a0.dat").write_bytes(b"12345")
    with pytest.raises(Refused, match="truncated"):
        read_wfdb(path)


@pytest.mark.parametrize("change", ["apart", "offset", "format"])
def test_a_file_that_can_be_read_in_two_ways_is_not_read(tmp_path, change):
    path = write(tmp_path, [("16", np.ones((10, 2), int)), ("32", np.ones((10, 1), int))], ["1"] * 3, [0] * 3)
    first, one, two, three = (tmp_path / "a.hea").read_text().splitlines()
    if change == "apart":
        two, three = three, two
    else:
        two = two.replace(" 16 ", " 16+2 " if change == "offset" else " 61 ", 1)
    (tmp_path / "a.hea").write_text("\n".join([first, one, two, three]))
    with pytest.raises(Refused, match=r"unreadable-header: .*a0.dat"):
        read_wfdb(path)


@pytest.mark.parametrize("length", [1, 63, 64, 65, 5000])
@pytest.mark.parametrize("kind", [np.int8, np.int16, np.int32])
def test_sums(length, kind):
    info = np.iinfo(kind)
    samples = np.random.default_rng(length).integers(info.min, info.max, (length, 12), kind, endpoint=True)
    assert sums(samples) == (samples.sum(axis=0, dtype=np.int64) % 65536).tolist()


def test_one_step_is_so_many_millivolt(tmp_path):
    """Gains and baselines are ignored, the invalid value is not."""
    digital = np.random.default_rng(0).integers(-500, 500, (20, 3))
    digital[4, 1] = INVALID["16"]
    path = write(tmp_path, [("16", digital)], ["1760", "-3", "0.5"], [-20, 7, 0])
    truth = (digital * 0.001).astype(np.float32)
    truth[4, 1] = np.nan
    reading = read_wfdb(path, millivolt_per_step=0.001)
    np.testing.assert_array_equal(reading.signal[:, :3], truth)
    np.testing.assert_allclose(by_package(path, millivolt_per_step=0.001).signal[:, :3], truth, rtol=1e-6)
    text = (tmp_path / "a.hea").read_text()
    (tmp_path / "a.hea").write_text(text.replace("/mV", "/NU"))  # the unit is ignored as well
    np.testing.assert_array_equal(read_wfdb(path, millivolt_per_step=0.001).signal[:, :3], truth)


def test_absurd_gains_give_no_warning(tmp_path):
    path = write(tmp_path, [("32", np.full((5, 2), 1 << 30))], ["1e-300", "1e300"], [0, 0])
    signal = read_wfdb(path).signal
    assert np.isinf(signal[:, 0]).all() and (signal[:, 1] == 0).all()
    path = write(tmp_path, [("16", np.ones((5, 1), int))], ["1e999"], [0])
    with pytest.raises(Refused, match="unreadable-header"):
        read_wfdb(path)


def test_the_common_case_does_without_the_package(tmp_path):
    path = write(tmp_path, [("16", np.ones((5, 1), int))], ["1000"], [0])
    code = (
        "import sys; from pathlib import Path; from ecg_jax.records.readers.wfdb import read_wfdb;"
        f"read_wfdb(Path({str(path)!r})); assert 'wfdb' not in sys.modules and 'pandas' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


ARCHIVES = ["chapman_ningbo", "code15_samitrop", "cpsc2018", "cpsc2018_extra", "georgia", "ludb", "brugada_huca"]


@pytest.mark.parametrize("name", [*ARCHIVES, "ptb_diag", "ptbxl/records100", "ptbxl/records500", "ptbxl_bp"])
def test_real_records_to_the_bit(shared_data, tmp_path, name):
    """The first dozen of each archive; none needs the package."""
    folder, _, part = name.partition("/")
    (archive,) = (shared_data / folder).glob(f"{part}*.tar.xz")
    seen: dict[str, set[str]] = {}
    with tarfile.open(archive, "r|xz") as stream:  # in the order of the archive, as far as needed
        for member in stream:
            stem, suffix = member.name.rpartition(".")[::2]
            if suffix in ("hea", "dat", "mat", "xyz"):
                stream.extract(member, tmp_path, filter="data")
                seen.setdefault(stem, set()).add(suffix)
            if sum(len(suffixes) > 1 for suffixes in seen.values()) == 12:
                break
    paths = [tmp_path / stem for stem, suffixes in seen.items() if len(suffixes) > 1]
    assert len(paths) >= 2
    for path in paths:
        assert is_direct(path)
        unit = "z" if folder == "ptbxl_bp" else "mV"
        reading = read_wfdb(path, unit)
        assert_same(reading, by_package(path, unit=unit))
        assert reading.missing == () == reading.derived
