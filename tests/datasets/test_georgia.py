"""Georgia: repeated codes, names with a suffix, the gain of the first release."""

import pickle
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest

from ecg_jax.datasets import open_source
from ecg_jax.errors import DataError, UsageError
from ecg_jax.records.record import Record, Refused

LEADS = ("I", "II", "III", "aVR", "aVL", "aVF", "V1", "V2", "V3", "V4", "V5", "V6")


def write(
    folder: Path, name: str, comments: str, gain: str = "1000/mV", first: str = "", spike: bool = False
) -> np.ndarray:
    """The set's own layout: a MATLAB 4 file of int16 [12, n] and a header whose offset of 24 bytes skips its head."""
    samples = np.random.default_rng(int(name[1:])).integers(-900, 900, (1500, 12)).astype("<i2")
    if spike:
        samples[700, 3] = -32768
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.mat").write_bytes(struct.pack("<5i", 30, 12, 1500, 0, 4) + b"val\0" + samples.tobytes())
    lines = [f"{first or name} 12 500 1500 05-May-2020 14:50:55"]
    for i, lead in enumerate(LEADS):
        total = ((int(samples[:, i].astype(int).sum()) + 32768) % 65536) - 32768
        lines.append(f"{name}.mat 16+24 {gain} 16 0 {samples[0, i]} {total} 0 {lead}")
    (folder / f"{name}.hea").write_text("\n".join(lines) + "\n" + comments)
    return samples


def test_records(tmp_path):
    samples = write(
        tmp_path / "g1", "E00001", "#Age: 61\n#Sex: Female\n#Dx: 284470004,713427006,284470004\n", spike=True
    )
    write(tmp_path / "g1", "E00002", "# Age: NaN\n# Sex: Male\n# Dx: 63593006,59118001,999000\n", first="E00002.mat")
    write(tmp_path / "g2", "E00003", "#Age: 0\n#Sex: Male\n#Dx: Unknown\n")
    write(tmp_path / "hr", "H00004", "#Dx: 284470004\n")
    source = pickle.loads(pickle.dumps(open_source("georgia", tmp_path, {})))
    assert source.skipped == {"records of another data set": 1} and source.default_windows == "all"
    assert source.tasks["snomed"] == ("SNOMED:999000", "RBBB", "SVPB", "PAC", "CRBBB")
    assert [(item.record_id, item.group, item.split) for item in source.items] == [
        (f"E0000{i}", f"E0000{i}", None) for i in (1, 2, 3)
    ]
    one, two, three = source.read(source.items)
    assert one.labels["snomed"].tolist() == [0, 0, 0, 1, 1] and two.labels["snomed"].tolist() == [1, 1, 1, 0, 0]
    on = [{n for n, v in zip(source.tasks["scored"], r.labels["scored"], strict=True) if v == 1} for r in (one, two)]
    assert (
        on == [{"PAC", "CRBBB"}] * 2 and (three.labels["scored"] == -1).all() and (three.labels["snomed"] == -1).all()
    )
    assert (one.age, one.sex, two.sex) == (61, 0, 1) and np.isnan(two.age) and three.age == 0
    assert np.isnan(one.signal[700, 3]) and np.isnan(one.signal).sum() == 1
    expected = samples.astype(np.float32) / 1000
    expected[700, 3] = np.nan
    np.testing.assert_array_equal(one.signal, expected)
    assert two.meta["repaired"] == "record-name-suffix" and "repaired" not in one.meta
    about = source.about
    assert about["unknown_codes"] == {"999000": 1} and about["records_without_dx"] == 1 and about["records"] == 3


def test_labels_depend_on_content_alone(tmp_path):
    for order, folder in ((1, "a"), (-1, "b")):
        for i in [1, 2, 3][::order]:
            write(tmp_path / folder / f"g{i * order}", f"E0000{i}", f"#Dx: 28447000{i},59118001\n")
    one, two = (open_source("georgia", tmp_path / folder, {}) for folder in "ab")
    assert one.tasks == two.tasks and one.about == two.about
    assert [i.record_id for i in one.items] == [i.record_id for i in two.items]
    assert all(
        (a.where["labels"]["snomed"] == b.where["labels"]["snomed"]).all()
        for a, b in zip(one.items, two.items, strict=True)
    )


def test_gain_of_the_first_release(tmp_path):
    samples = write(tmp_path, "E00001", "#Dx: 426783006\n", gain="4880/mV", first="E00001.mat")
    write(tmp_path, "E00002", "#Dx: 426783006\n", gain="4880/mV")
    header = tmp_path / "E00002.hea"
    header.write_text(header.read_text().replace("4880/mV", "1000/mV", 3))
    source = open_source("georgia", tmp_path, {})
    one, two = source.read(source.items)
    np.testing.assert_array_equal(one.signal, samples.astype(np.float32) / 1000)
    assert isinstance(two, Refused) and two.reason == "unreadable-header" and "E00002.hea" in two.detail
    assert source.about["headers_with_early_gain"] == 2


def test_broken_records_are_refused_by_name(tmp_path):
    for i in range(1, 6):
        write(tmp_path, f"E0000{i}", "#Dx: 426783006\n")
    (tmp_path / "E00001.mat").unlink()
    (tmp_path / "E00002.hea").unlink()
    (tmp_path / "E00003.mat").write_bytes((tmp_path / "E00003.mat").read_bytes()[:-100])
    (tmp_path / "E00004.hea").write_bytes(b"\xff\x00 12 #")
    source = open_source("georgia", tmp_path, {})
    results = list(source.read(source.items))
    assert [getattr(r, "reason", None) for r in results] == [
        "missing-signal-file", "missing-file", "truncated", "unreadable-header", None,
    ]  # fmt: skip
    assert all(f"E0000{i}" in r.detail for i, r in enumerate(results[:4], 1))


def test_bad_folder_and_options(tmp_path):
    with pytest.raises(DataError, match=r"no E#####\.hea"):
        open_source("georgia", tmp_path, {})
    with pytest.raises(UsageError, match="unknown option 'split'"):
        open_source("georgia", tmp_path, {"split": "1"})


def test_the_real_thing(shared_data, tmp_path):
    for name in ("georgia/records.tar.xz", "quirks/natural.tar.xz"):
        with tarfile.open(shared_data / name) as archive:
            wanted = [m for m in archive if "records/" in m.name or "header_name_with_suffix" in m.name]
            archive.extractall(tmp_path / Path(name).parent.name, wanted, filter="data")
    source = open_source("georgia", tmp_path / "georgia", {})
    records = {record.record_id: record for record in source.read(source.items)}
    assert len(records) == 26 and all(isinstance(record, Record) for record in records.values())
    assert source.about["unknown_codes"] == {} and source.about["records_without_dx"] == 0
    np.testing.assert_array_equal(records["E07509"].signal, records["E07510"].signal)
    with open(shared_data / "georgia/labels.csv") as file:
        truth = {line.split(",")[0]: line.strip().split(",") for line in file}
    codes = np.array([source.about["codes"][name] for name in source.tasks["snomed"]])
    for name, record in records.items():
        assert set(codes[record.labels["snomed"] == 1]) == set(truth[name][4].split(";"))
        assert record.sex == (truth[name][3] == "Male") and (str(record.age) == f"{float(truth[name][2])}")
    suffixed = open_source("georgia", tmp_path / "quirks", {})
    for record in suffixed.read(suffixed.items):
        np.testing.assert_array_equal(record.signal, records[record.record_id].signal)
        assert record.meta["repaired"] == "record-name-suffix"
    assert len(suffixed.items) == 2
