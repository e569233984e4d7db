"""Chapman-Shaoxing-Ningbo: layout, code names, broken headers, MERL's tables."""

import pickle
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest

from ecg_jax.datasets import open_source
from ecg_jax.datasets.csn import ACRONYMS
from ecg_jax.errors import DataError, UsageError
from ecg_jax.records.record import Record

LEADS = ("I", "II", "III", "aVR", "aVL", "aVF", "V1", "V2", "V3", "V4", "V5", "V6")
NAMES = "Acronym Name,Full Name,Snomed_CT\n"
MERL_LABELS = (
    "AQW UW SR WPW 2AVB AT VB ARS STTC SA STE VPB TWO STTU ALS APB 2AVB1 PRIE CCR CR AF AVB QTIE LBBB VEB SVT RBBB "
    "1AVB STDD MI AFIB TWC PWC ERV RVH LVH ST JEB"
).split()


def write(root: Path, name: str, comments: str, n: int = 5000) -> tuple[Path, np.ndarray]:
    """(header, samples) below WFDBRecords/<2 digits>/<3 digits>, MATLAB 4 with the samples 24 bytes in."""
    folder = root / "WFDBRecords" / name[2:4] / name[2:5]
    folder.mkdir(parents=True, exist_ok=True)
    samples = np.random.default_rng(int(name[2:])).integers(-900, 900, (n, 12)).astype("<i2")
    (folder / f"{name}.mat").write_bytes(struct.pack("<5i", 30, 12, n, 0, 4) + b"val\0" + samples.tobytes())
    lines = [f"{name} 12 500 {n}"]
    for i, lead in enumerate(LEADS):
        total = ((int(samples[:, i].astype(int).sum()) + 32768) % 65536) - 32768
        lines.append(f"{name}.mat 16+24 1000/mV 16 0 {samples[0, i]} {total} 0 {lead}")
    header = folder / f"{name}.hea"
    header.write_text("\n".join(lines) + "\n" + comments + "#Rx: Unknown\n")
    return header, samples


def merge_first_lines(header: Path) -> None:
    """The fault of JS01052 and JS23074: "... 500 5000" + (lost: line end, "NAME.mat 16+24 10") + "00/mV 16 0 ..."."""
    first, second, *rest = header.read_text().splitlines()
    header.write_text("\n".join([first + second.partition("16+24 10")[2], *rest]) + "\n")


def merl_tables(folder: Path, rows: dict[str, list[tuple[str, dict[str, int]]]]) -> Path:
    folder.mkdir(parents=True)
    for split in ("train", "val", "test"):
        lines = ["ecg_path,age,diagnose," + ",".join(MERL_LABELS)]
        for name, on in rows.get(split, []):
            path = f"/chapman/WFDBRecords/{name[2:4]}/{name[2:5]}/{name}.mat"
            cells = ",".join(str(on.get(label, 0)) for label in MERL_LABELS)
            lines.append(f'{path},12,"SB,ST",{cells}')
        (folder / f"chapman_{split}.csv").write_text("\n".join(lines) + "\n")
    return folder


def test_labels(tmp_path):
    write(tmp_path, "JS00344", "#Age: 85\n#Sex: Male\n#Dx: 164889003,59118001,,\n")
    write(tmp_path, "JS03287", "#Age: 0\n#Sex: Female\n#Dx: 6180003,251238007,426177001,\n")
    write(tmp_path, "JS10647", "#Age: 33\n#Sex: Unknown\n#Dx: 164890007,427084000,17338001\n")
    write(tmp_path, "JS45551", "#Age: NaN\n#Sex: Male\n#Dx: \n")
    (tmp_path / "ConditionNames_SNOMED-CT.csv").write_text(
        NAMES
        + "RBBB,right bundle,59118001\nAF,Atrial Flutter,164890007\nAFIB,x,164889003\nMI,x,164865005\nST,x,427084000\n"
        "SB,Sinus Bradycardia,426177001\nXB,second name,426177001\nVPB,x,17338001\n",
        encoding="utf-8-sig",
    )
    source = pickle.loads(pickle.dumps(open_source("csn", tmp_path, {})))
    assert source.tasks["snomed"] == (
        "SNOMED:6180003", "VPB", "RBBB", "AFIB", "AF", "SNOMED:251238007", "SB", "ST",
    )  # fmt: skip
    one, two, three, four = source.read(source.items)

    def on(record: Record, task: str) -> set[str]:
        assert set(record.labels[task].tolist()) <= {0, 1}
        return {name for name, value in zip(source.tasks[task], record.labels[task], strict=True) if value == 1}

    assert on(one, "snomed") == {"AFIB", "RBBB"} and on(one, "scored") == {"AF", "CRBBB"}
    assert on(two, "snomed") == {"SNOMED:6180003", "SNOMED:251238007", "SB"} and on(two, "scored") == {"SB"}
    # AF does not fire in AFIB, nor ST in anything that begins with it; flutter is the Challenge's AFL.
    assert on(three, "snomed") == {"AF", "ST", "VPB"} and on(three, "scored") == {"AFL", "STach", "PVC"}
    assert all((four.labels[task] == -1).all() for task in source.tasks)
    assert (one.age, one.sex, two.sex) == (85, 1, 0) and np.isnan([two.age, four.age, three.sex]).all()
    assert one.group == "JS00344" and one.patient_id is None and one.rate == 500 and one.signal.shape == (5000, 12)
    about = source.about
    assert about["unknown_codes"] == {"251238007": 1, "6180003": 1} and about["codes"]["AF"] == "164890007"
    assert list(about["tables_sha256"]) == ["ConditionNames_SNOMED-CT.csv"] and about["records_without_dx"] == 1


def test_without_the_table_of_names(tmp_path):
    write(tmp_path / "ningbo/g1", "JS10647", "#Dx: 164890007,28189009,61721007\n")
    source = open_source("csn", tmp_path, {})
    assert source.tasks["snomed"] == ("2AVB2", "SNOMED:61721007", "AF") and source.about["tables_sha256"] == {}
    assert "as kept in this package" in source.about["acronyms"]
    # MERL's columns are acronyms of the same table.
    assert set(MERL_LABELS) <= set(ACRONYMS.values()) and len(set(ACRONYMS.values())) == len(ACRONYMS) == 55
    (tmp_path / "ConditionNames_SNOMED-CT.csv").write_text(NAMES + "FLUT,x,164890007\n")
    (tmp_path / "ningbo/g1/ConditionNames_SNOMED-CT.csv").write_text(NAMES + "FLUT,x,164890007\n")
    assert open_source("csn", tmp_path, {}).tasks["snomed"][2] == "FLUT"
    inner = tmp_path / "ningbo/g1/WFDBRecords"
    assert open_source("csn", inner, {}).tasks["snomed"][2] == "FLUT"  # the table lies beside WFDBRecords


def test_broken_headers(tmp_path):
    one, samples = write(tmp_path, "JS01052", "#Dx: 426177001\n#Age: 60\n")
    two, other = write(tmp_path, "JS23074", "#Dx: 427084000\n")
    three, _ = write(tmp_path, "JS00003", "#Dx: 426177001\n")
    write(tmp_path, "JS00004", "#Dx: 426177001\n")[0].unlink()
    for header in (one, two, three):
        merge_first_lines(header)
    assert one.read_text().startswith("JS01052 12 500 500000/mV 16 0 ")
    two.rename(two.with_name("S23074.hea"))
    signal = three.with_suffix(".mat")
    content = signal.read_bytes()
    signal.write_bytes(content[:24] + bytes([content[24] ^ 1]) + content[25:])
    source = open_source("csn", tmp_path, {})
    assert [item.record_id for item in source.items] == ["JS00003", "JS00004", "JS01052", "JS23074"]
    assert source.skipped == {} and [Path(p).name for p in source.about["misnamed_headers"]] == ["S23074"]
    broken, lost, mended, misnamed = source.read(source.items)
    assert lost.reason == "missing-file" and "JS00004" in lost.detail
    for record, expected in ((mended, samples), (misnamed, other)):
        np.testing.assert_array_equal(record.signal, expected.astype(np.float32) / 1000)
        assert record.meta["repaired"] == "merged-first-line"
    assert mended.age == 60 and mended.labels["snomed"].tolist() == [1, 0]
    assert broken.reason == "checksum-mismatch" and "JS00003" in broken.detail


def test_a_merged_header_that_cannot_be_mended_is_refused_by_name(tmp_path):
    header, _ = write(tmp_path, "JS01052", "#Dx: 426177001\n")
    merge_first_lines(header)
    signal = header.with_suffix(".mat")
    signal.write_bytes(signal.read_bytes()[:-24])
    source = open_source("csn", tmp_path, {})
    (refused,) = source.read(source.items)
    assert refused.reason in ("unreadable-header", "truncated") and "JS01052" in refused.detail


def test_invalid_samples_are_nan(tmp_path):
    header, samples = write(tmp_path, "JS12000", "#Dx: 426177001\n")
    samples[10:13, 7] = -32768
    signal = header.with_suffix(".mat")
    signal.write_bytes(signal.read_bytes()[:24] + samples.tobytes())
    text = header.read_text().splitlines()
    total = ((int(samples[:, 7].astype(int).sum()) + 32768) % 65536) - 32768
    text[8] = f"JS12000.mat 16+24 1000/mV 16 0 {samples[0, 7]} {total} 0 V2"
    header.write_text("\n".join(text) + "\n")
    source = open_source("csn", tmp_path, {})
    (record,) = source.read(source.items)
    assert np.argwhere(np.isnan(record.signal)).tolist() == [[10, 7], [11, 7], [12, 7]]


def test_merl(tmp_path):
    write(tmp_path, "JS00001", "#Dx: 164889003\n")
    write(tmp_path, "JS00002", "#Dx: 426177001\n")
    write(tmp_path, "JS00003", "#Dx: 427084000\n")
    folder = merl_tables(
        tmp_path / "split/chapman",
        {"train": [("JS00001", {"AF": 1, "AFIB": 1})], "val": [("JS00002", {})], "test": [("JS00009", {"ST": 1})]},
    )
    for option in (folder, folder.parent):
        source = open_source("csn", tmp_path, {"merl": str(option)})
        assert source.tasks["merl"] == tuple(MERL_LABELS) and source.skipped == {"not in MERL's tables": 1}
        assert [(i.record_id, i.split) for i in source.items] == [
            ("JS00001", "train"), ("JS00002", "val"), ("JS00009", "test"),
        ]  # fmt: skip
        one, two, lost = source.read(source.items)
        on = [name for name, value in zip(MERL_LABELS, one.labels["merl"], strict=True) if value]
        assert on == ["AF", "AFIB"] and not two.labels["merl"].any() and lost.reason == "missing-file"
        assert [source.tasks["snomed"][i] for i in np.flatnonzero(one.labels["snomed"] == 1)] == ["AFIB"]
        assert source.about["merl_records_without_positive"] == 1 and len(source.about["merl_defects"]) == 4
        assert source.about["merl_records"] == {"train": 1, "val": 1, "test": 1}
        assert set(source.about["tables_sha256"]) == {f"chapman_{split}.csv" for split in ("train", "val", "test")}


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("Acronym,Snomed_CT\nA,1\n", "no column 'Acronym Name'"),
        (NAMES + "A,x,1e9\n", r"csv:2: Snomed_CT='1e9'"),
        (NAMES + ",x,59118001\n", "a code and a name are needed"),
        (NAMES + "A,x,59118001\nA,y,426177001\n", "calls both 59118001 and 426177001 'A'"),
        ("", "is empty"),
    ],
)
def test_bad_tables(tmp_path, table, message):
    write(tmp_path, "JS00001", "#Dx: 59118001,426177001\n")
    (tmp_path / "ConditionNames_SNOMED-CT.csv").write_text(table)
    with pytest.raises(DataError, match=message):
        open_source("csn", tmp_path, {})


def test_bad_folder_and_options(tmp_path):
    with pytest.raises(DataError, match=r"no JS#####\.hea"):
        open_source("csn", tmp_path, {})
    header, _ = write(tmp_path, "JS00001", "#Dx: 59118001\n")
    with pytest.raises(UsageError, match="did you mean 'merl'"):
        open_source("csn", tmp_path, {"merll": "."})
    with pytest.raises(UsageError, match="no such folder"):
        open_source("csn", tmp_path, {"merl": str(tmp_path / "none")})
    folder = merl_tables(tmp_path / "chapman", {})
    for split in ("train", "val", "test"):
        (folder / f"chapman_{split}.csv").write_text("ecg_path,age,diagnose,AF\n")
    with pytest.raises(DataError, match="1 label columns in chapman_train"):
        open_source("csn", tmp_path, {"merl": str(folder)})
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / header.name).write_text(header.read_text())
    with pytest.raises(DataError, match="JS00001 is there twice"):
        open_source("csn", tmp_path, {})


def test_the_real_thing(shared_data, tmp_path):
    with tarfile.open(shared_data / "chapman_ningbo/records.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    source = open_source("csn", tmp_path, {})
    records = {record.record_id: record for record in source.read(source.items)}
    assert len(records) == 58 and all(isinstance(record, Record) for record in records.values())
    assert source.about["comments_not_understood"] == {"age": 0, "sex": 0} and source.skipped == {}
    with open(shared_data / "chapman_ningbo/labels.csv") as file:
        truth = {line.split(",")[0]: line.strip().split(",") for line in file}
    codes = np.array([source.about["codes"][name] for name in source.tasks["snomed"]])
    for name, record in records.items():
        assert set(codes[record.labels["snomed"] == 1]) == set(truth[name][4].split(";"))
        assert (record.age, record.sex) == (float(truth[name][2]), truth[name][3] == "Male")
    for name in ("JS11438", "JS20008", "JS45542", "JS45544", "JS45551"):  # their dead chest leads are kept as they are
        assert (np.ptp(records[name].signal[:, 6:], axis=0) == 0).any()
