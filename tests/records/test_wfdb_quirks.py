"""Odd WFDB files: each case of the quirks table is read within its tolerance, or refused for the right reason."""

import csv
import re
import tarfile
import warnings
from pathlib import Path

import numpy as np
import pytest

from ecg_jax.records.leads import LEADS, arrange, canonical
from ecg_jax.records.readers.wfdb import read_wfdb
from ecg_jax.records.record import Refused

SUFFIX = ("record-name-suffix",)
TWELVE = [*LEADS]


@pytest.fixture(scope="module")
def quirks(shared_data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("quirks")
    for name in ("natural", "reencoded"):
        with tarfile.open(shared_data / "quirks" / f"{name}.tar.xz") as archive:
            archive.extractall(folder, filter="data")
    return folder


@pytest.fixture(scope="module")
def truth(quirks) -> np.ndarray:
    return np.load(quirks / "reencoded" / "expected_mV.npy")


@pytest.fixture(scope="module")
def table(shared_data) -> dict[str, str]:
    """Path of a case -> what it expects."""
    with (shared_data / "quirks" / "quirks.csv").open() as lines:
        return {row["path"]: row["expect"] for row in csv.DictReader(lines)}


@pytest.fixture(scope="module")
def wfdb():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import wfdb
    return wfdb


def refused(path: Path, **options) -> Refused:
    with pytest.raises(Refused) as refusal:
        read_wfdb(path, **options)
    return refusal.value


# Cases of the table that are read here otherwise than by a tolerance, or that are no WFDB records.
OWN_TEST = {
    "eight_leads", "duplicate_lead", "bad_checksum", "truncated", "invalid_samples", "flat_chest", "multi_var",
    "prefixed_names",
}  # fmt: skip
OTHER_READERS = re.compile(r".*\.(mat|npy|csv|h5)")


def test_every_re_encoded_record_within_its_tolerance(quirks, table, truth):
    names = [path.partition("/")[2] for path in table if path.startswith("reencoded/")]
    names = [name for name in names if name not in OWN_TEST and not OTHER_READERS.fullmatch(name)]
    assert len(names) == 22
    for name in names:
        expect = table[f"reencoded/{name}"]
        tolerance = float(re.match(r"equals expected_mV.npy within ([\d.]+) mV", expect)[1])
        reading = read_wfdb(quirks / "reencoded" / name)
        assert reading.rate == 500 and reading.signal.shape == truth.shape and not reading.missing, name
        assert np.abs(reading.signal - truth).max() <= tolerance, name  # false for NaN


def test_prefixed_names_are_mapped(quirks, truth):
    reading = read_wfdb(quirks / "reencoded" / "prefixed_names")
    assert reading.names[0] == "ECG I" and np.abs(reading.signal - truth).max() <= 0.001


def test_limb_leads_follow_from_two(quirks, truth):
    reading = read_wfdb(quirks / "reencoded" / "eight_leads")
    assert set(reading.derived) == {"III", "aVR", "aVL", "aVF"} and not reading.missing
    assert np.abs(reading.signal - truth).max() <= 0.0021  # the stored ones are rounded each for itself


def test_invalid_samples_are_missing_and_nothing_else(quirks, truth):
    signal = read_wfdb(quirks / "reencoded" / "invalid_samples").signal
    there = np.isfinite(signal)
    assert np.abs(signal - truth)[there].max() <= 0.001
    lost = ~there
    assert lost[:, LEADS.index("V3")].sum() == 500 and lost[-1, 0] and lost.any(axis=0).sum() == 2
    first = int(lost[:, 0].argmax())
    assert lost[first:, 0].all() and not lost[:first, 0].any()


def test_gap_and_missing_leads_of_a_variable_layout(quirks, truth):
    reading = read_wfdb(quirks / "reencoded" / "multi_var")
    there = np.ones(truth.shape, bool)
    there[2000:2500] = False
    there[2500:, [i for i, lead in enumerate(LEADS) if lead not in ("I", "II", "V1")]] = False
    np.testing.assert_array_equal(np.isfinite(reading.signal), there)
    assert np.abs(reading.signal - truth)[there].max() <= 0.001
    assert reading.missing == ()  # each lead is there for a while


def test_flat_chest_leads_stay_zero(quirks, truth):
    signal = read_wfdb(quirks / "reencoded" / "flat_chest").signal
    assert (signal[:, 6:] == 0).all() and np.abs(signal - truth)[:, :6].max() <= 0.001


def test_spoiled_records_are_refused_with_the_reason(quirks):
    folder = quirks / "reencoded"
    refusal = refused(folder / "bad_checksum")
    assert refusal.reason == "checksum-mismatch" and "V2" in refusal.detail
    assert read_wfdb(folder / "bad_checksum", checksums=False).signal.shape == (5000, 12)
    refusal = refused(folder / "truncated")
    assert refusal.reason == "truncated" and "of 5000" in refusal.detail
    refusal = refused(folder / "duplicate_lead")
    assert refusal.reason == "duplicate-lead" and "'II'" in refusal.detail


def test_latin_letters_of_a_comment_are_kept(quirks):
    assert any("Gerät" in line for line in read_wfdb(quirks / "reencoded" / "crlf").comments)


@pytest.mark.parametrize("name", ["E00271", "E03823"])
def test_name_with_suffix(quirks, shared_data, tmp_path, name):
    path = quirks / "natural" / "header_name_with_suffix" / name
    refusal = refused(path)
    assert refusal.reason == "unreadable-header" and "record-name-suffix" in refusal.detail
    reading = read_wfdb(path, repairs=SUFFIX)
    assert reading.comments[-1] == "repaired: record-name-suffix"
    with tarfile.open(shared_data / "georgia" / "records.tar.xz") as archive:
        members = [m for m in archive if Path(m.name).stem == name]
        archive.extractall(tmp_path, members, filter="data")
    good = read_wfdb(tmp_path / "records" / name, repairs=SUFFIX)  # nothing to repair there
    assert "repaired: record-name-suffix" not in good.comments
    np.testing.assert_array_equal(reading.signal, good.signal)


@pytest.mark.parametrize("name", ["HR03961", "HR07911", "HR07968", "HR08040"])
def test_unit_in_small_letters_is_millivolt(quirks, wfdb, name):
    path = quirks / "natural" / "unit_mv_lowercase" / name
    expected = wfdb.rdrecord(str(path)).p_signal.astype(np.float32)
    np.testing.assert_array_equal(read_wfdb(path).signal, expected)


def test_wrong_gains_are_read_as_they_are(quirks, shared_data, tmp_path):
    """No reader may repair them; what they look like is for the quality bits to say."""
    for name in ("HR00002", "HR00004", "HR00007"):
        signal = read_wfdb(quirks / "natural" / "wrong_gain" / name).signal
        assert np.isfinite(signal).all() and np.abs(signal).max() > 2
    small = read_wfdb(quirks / "natural" / "wrong_gain" / "S0001").signal
    with tarfile.open(shared_data / "ptb_diag" / "records.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    good = read_wfdb(tmp_path / "records" / "S0001").signal
    np.testing.assert_allclose(small * 2000, good, rtol=1e-4, atol=1e-6)  # 2,000,000 per mV against 1,000


@pytest.mark.parametrize("name", ["E07501", "JS20002"])
@pytest.mark.parametrize(
    ("folder", "missing"),
    [("two_leads", LEADS[6:]), ("three_leads", {*LEADS[6:]} - {"V2"}), ("four_leads", {*LEADS[6:]} - {"V2"}),
     ("six_leads", LEADS[6:])],
)  # fmt: skip
def test_fewer_leads(quirks, name, folder, missing):
    base = quirks / "natural" / "reduced_leads"
    whole = read_wfdb(base / "twelve_leads" / name, repairs=SUFFIX)
    part = read_wfdb(base / folder / name, repairs=SUFFIX)
    assert set(part.missing) == set(missing)
    for i, lead in enumerate(LEADS):
        if lead in part.missing:
            assert np.isnan(part.signal[:, i]).all()
        elif lead in part.derived:
            assert np.abs(part.signal[:, i] - whole.signal[:, i]).max() < 0.011  # rounded in the file, not here
        else:
            np.testing.assert_array_equal(part.signal[:, i], whole.signal[:, i])


def test_three_limb_leads(quirks, wfdb):
    path = quirks / "natural" / "wfdb_python" / "100_3chan"
    reading = read_wfdb(path)
    assert reading.rate == 360 and reading.signal.shape == (999, 12)
    assert set(reading.derived) == {"aVR", "aVL", "aVF"} and set(reading.missing) == {*LEADS[6:]}
    expected = wfdb.rdrecord(str(path)).p_signal
    np.testing.assert_array_equal(reading.signal[:, :3], expected.astype(np.float32))
    np.testing.assert_allclose(reading.signal[:, 3], -(expected[:, 0] + expected[:, 1]) / 2, atol=1e-6)


def renamed(folder: Path, path: Path, names: list[str]) -> Path:
    """A copy of the record whose signals are called `names`, in order; nothing else is changed."""
    for file in path.parent.iterdir():
        if file.is_file():
            (folder / file.name).write_bytes(file.read_bytes())
    header = folder / f"{path.name}.hea"
    lines = header.read_text().splitlines()
    left = iter(names)
    for i, line in enumerate(lines[1:], 1):
        if not line.startswith("#"):
            lines[i] = re.sub(r"^((?:\S+\s+){8}).*", lambda match: match[1] + next(left), line)
    header.write_text("\n".join(lines))
    return folder / path.name


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("binformats", TWELVE[:10]), ("flacformats", TWELVE[:3]), ("310derive", TWELVE[:2]), ("310derive_2", ["V1"]),
        ("311derive", ["V1"]), ("311derive_2", ["V1"]), ("test01_00s", TWELVE[:4]), ("test01_00s_skew", TWELVE[:4]),
        ("3000003_0003", ["II", "V2"]), ("a103l", ["II", "V5", "PLETH"]), ("a103l-no-len", ["II", "V5", "PLETH"]),
    ],
)  # fmt: skip
def test_what_the_package_reads(quirks, tmp_path, wfdb, name, names):
    path = renamed(tmp_path, quirks / "natural" / "wfdb_python" / name, names)
    record = wfdb.rdrecord(str(path))
    expected, derived, missing = arrange(record.p_signal, names)
    reading = read_wfdb(path)
    assert (set(reading.derived), set(reading.missing), reading.rate) == (derived, missing, record.fs)
    np.testing.assert_array_equal(reading.signal, expected)


@pytest.mark.parametrize("name", ["test01_00s_frame", "test01_00s_skewframe"])
def test_leads_of_two_rates(quirks, tmp_path, wfdb, name):
    source = quirks / "natural" / "wfdb_python" / name
    refusal = refused(renamed(tmp_path, source, ["I", "II", "V1"]))
    assert refusal.reason == "mixed-rates" and "[1, 2]" in refusal.detail
    path = renamed(tmp_path, source, ["I", "PLETH", "V1"])  # another signal may have its own rate
    one, _, six = wfdb.rdrecord(str(path), smooth_frames=False).e_p_signal
    reading = read_wfdb(path)
    np.testing.assert_array_equal(reading.signal[:, 0], one.astype(np.float32))
    np.testing.assert_array_equal(reading.signal[:, 6], six.astype(np.float32))
    path = renamed(tmp_path, source, ["x", "II", "y"])
    reading = read_wfdb(path)
    expected = wfdb.rdrecord(str(path), smooth_frames=False).e_p_signal[1]
    assert reading.rate == 1000 and reading.signal.shape == (8000, 12)
    np.testing.assert_array_equal(reading.signal[:, 1], expected.astype(np.float32))


def test_flac_of_several_rates_and_units(quirks, wfdb):
    path = quirks / "natural" / "wfdb_python" / "mixedsignals"
    reading = read_wfdb(path)
    record = wfdb.rdrecord(str(path), smooth_frames=False)
    assert reading.rate == pytest.approx(4 * 62.4725) and set(reading.missing) == {*LEADS[6:]}
    np.testing.assert_array_equal(reading.signal[:, 1], record.e_p_signal[0].astype(np.float32))
    np.testing.assert_array_equal(reading.signal[:, 2], record.e_p_signal[1].astype(np.float32))
    assert np.isnan(reading.signal[:, 1]).any()


def test_segments_with_several_samples_per_frame(quirks, wfdb):
    """The package averages the samples of a frame; here they are kept: four times the header's rate."""
    folder = quirks / "natural" / "wfdb_python" / "multi-segment" / "041s"
    reading = read_wfdb(folder / "041s")
    assert reading.rate == 500 and reading.signal.shape == (8000, 12) and reading.time == "1994-10-26 08:26:04"
    record = wfdb.rdrecord(str(folder / "041s"))
    mean = reading.signal.reshape(2000, 4, 12).mean(axis=1)
    for lead in ("I", "III"):
        expected = record.p_signal[:, [name.strip() for name in record.sig_name].index(lead)]
        both = np.isfinite(mean[:, LEADS.index(lead)]) & np.isfinite(expected)
        assert both.mean() > 0.95 and np.abs(mean[:, LEADS.index(lead)] - expected)[both].max() < 0.001
    first = read_wfdb(folder / "041s01").signal
    np.testing.assert_array_equal(reading.signal[:4000], first)


def test_segments_that_come_late_and_gaps(quirks, wfdb):
    path = quirks / "natural" / "wfdb_python" / "multi-segment" / "s25047" / "s25047-2704-05-04-10-44"
    reading = read_wfdb(path)
    record = wfdb.rdrecord(str(path))
    expected = record.p_signal[:, record.sig_name.index("II")].astype(np.float32)
    np.testing.assert_array_equal(reading.signal[:, 1], expected)
    assert np.isnan(expected).any() and np.isfinite(expected).any() and reading.rate == 125
    assert reading.names == tuple(name for name in record.sig_name if name in reading.names)
    assert [name for name in reading.names if canonical(name)] == ["II"]


def test_segments_that_are_not_there(quirks):
    path = quirks / "natural" / "wfdb_python" / "multi-segment" / "p000878" / "p000878-2137-10-26-16-57"
    refusal = refused(path)
    assert refusal.reason == "missing-signal-file" and "3269321_0003" in refusal.detail
