"""Own records of every format with a labels table: the same rows give the same records, whatever the files."""

import importlib.util
import pickle
from pathlib import Path

import h5py
import numpy as np
import pytest
import scipy.io

from ecg_jax.datasets import open_source
from ecg_jax.datasets.source import PackedItems
from ecg_jax.errors import DataError, UsageError
from ecg_jax.records.leads import LEADS
from ecg_jax.records.record import Record, Refused

LABELS = "record,dx,patient_id,strat_fold,age,sex\na,SR;LVH,7.0,1,50,M\n12,,7,2,300,F\nc,LVH,9,3,,\nd,SR,11,9,1,U\n"
IDS = ("a", "12", "c", "d")


@pytest.fixture
def signals() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=(1000, 12)).round(3).astype(np.float32) for name in IDS}


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "set").mkdir()
    (tmp_path / "set/labels.csv").write_text(LABELS)
    return tmp_path / "set"


def open_(kind: str, folder: Path, **options: str):
    options = {"tasks": "dx", "folds": "1/2/3", **options}
    return open_source(kind, folder, {key.replace("__", "."): value for key, value in options.items() if value})


def write_csv(path: Path, signal: np.ndarray) -> None:
    lines = [",".join(LEADS), *(",".join(f"{value:.3f}" for value in row) for row in signal)]
    path.write_text("\n".join(lines))


def write_files(kind: str, folder: Path, signals: dict[str, np.ndarray]) -> None:
    (folder / "deep").mkdir()
    for name, signal in signals.items():
        path = folder / ("deep" if name == "c" else "") / ("0012_x" if name == "12" else name)
        if kind == "npy":
            np.save(f"{path}.npy", signal.T)
        elif kind == "csv":
            write_csv(path.with_name(f"{path.name}.csv"), signal)
        elif kind == "mat":
            scipy.io.savemat(f"{path}.mat", {"val": signal, "fs": 100.0, "unit": "mV"})
        else:
            with h5py.File(f"{path}.h5", "w") as file:
                file["ecg"] = signal
                file.attrs["fs"], file.attrs["unit"] = 100, "mV"


@pytest.mark.parametrize("kind", ["npy", "csv", "mat", "hdf5"])
def test_a_file_a_recording(kind, folder, signals):
    write_files(kind, folder, signals)
    said = {"rate": "100", "unit": "mV"} if kind in ("npy", "csv") else {}
    source = open_(kind, folder, **said)
    assert (source.name, source.version, source.unit) == ("set", "1.0.0", "mV")
    assert isinstance(source.items, PackedItems) and source.tasks == {"dx": ("LVH", "SR")}
    assert [item.record_id for item in source.items] == ["a", "12", "c"]
    assert [item.group for item in source.items] == ["7", "7", "9"]
    assert [item.split for item in source.items] == ["train", "val", "test"]
    assert source.skipped == {"outside folds": 1}
    assert source.about["tables_sha256"].keys() == {"labels.csv"} and source.about["rows"] == 4
    source = pickle.loads(pickle.dumps(source))
    records = list(source.read(source.items[1:]))
    assert [record.record_id for record in records] == ["12", "c"]
    records = list(source.read(source.items))
    for record, name in zip(records, IDS, strict=False):
        np.testing.assert_array_equal(record.signal, signals[name])
        assert record.rate == 100 and record.unit == "mV" and record.source != bytes(32)
    assert [record.labels["dx"].tolist() for record in records] == [[1, 1], [-1, -1], [1, 0]]
    assert records[0].age == 50 and np.isnan(records[1].age) and np.isnan(records[2].sex)
    assert (records[0].sex, records[1].sex) == (1, 0)
    write_files(kind, folder / "deep", {"spare": signals["a"]})
    assert open_(kind, folder, **said).skipped == {"outside folds": 1, "no row in the labels table": 1}
    without = open_(kind, folder, **said, labels="none", tasks="", folds="")
    assert without.tasks == {} and without.skipped == {}
    listed = ["0012_x", "a", "d", "deep/c", "deep/spare"]
    expected = sorted([*listed, "labels"]) if kind == "csv" else listed
    assert [item.record_id for item in without.items] == expected
    found = {item.record_id: record for item, record in zip(without.items, without.read(without.items), strict=True)}
    np.testing.assert_array_equal(found["deep/c"].signal, signals["c"])
    assert found["a"].labels == {} and found["a"].patient_id is None and found["a"].group == "a"


@pytest.mark.parametrize("kind", ["npy", "csv", "mat", "hdf5"])
def test_bad_and_missing_files_are_refused_one_by_one(kind, folder, signals):
    write_files(kind, folder, {name: signals[name] for name in ("a", "12")})
    path = next(path for path in folder.iterdir() if path.stem == "a")
    path.write_bytes(path.read_bytes()[:-30])
    source = open_(kind, folder, rate="100", unit="mV")
    first, second, third = source.read(source.items)
    assert isinstance(first, Refused) and isinstance(second, Record)
    assert isinstance(third, Refused) and third.reason == "missing-file" and "c" in third.detail
    assert source.about["rows_without_recording"] == 2 and source.about["rows_without_recording_first"] == ["c", "d"]


def batch(folder: Path, signals: dict[str, np.ndarray]) -> None:
    stacked = np.stack([signals["c"], signals["a"], signals["d"], signals["12"], signals["a"] * 0])
    np.save(folder / "batch.npy", stacked.transpose(0, 2, 1))
    with h5py.File(folder / "part.hdf5", "w") as file:
        file["tracings"], file["exam_id"] = stacked, np.array(["c", "a", "d", "12", "filler"], object)
        group = file.create_group("all")
        for name, signal in signals.items():
            group[f"{name}/ecg"] = signal
            for i, lead in enumerate(LEADS):
                group[f"{name}/leads/{lead}"] = signal[:, i]
        group["spare/ecg"] = signals["a"]


ROWS = "record,dx,row,file\na,SR,1,part.hdf5\n12,SR,3,part.hdf5\nc,SR,0,part.hdf5\nd,LVH,2,part.hdf5\n"


@pytest.mark.parametrize(
    ("kind", "options", "spare"),
    [
        ("npy", {"row": "row", "path": "batch.npy", "ignore": "file"}, 1),
        ("npy", {"row": "row", "ignore": "file"}, 1),
        ("hdf5", {"dataset": "tracings", "row": "row", "path": "{file}"}, 1),
        ("hdf5", {"dataset": "tracings", "row": "row", "ignore": "file"}, 1),
        ("hdf5", {"dataset": "tracings", "ids": "exam_id", "ignore": "row,file"}, 1),
        ("hdf5", {"dataset": "tracings", "ids": "exam_id", "path": "{file}", "ignore": "row"}, 1),
        ("hdf5", {"dataset": "all/{id}/ecg", "ignore": "row,file"}, 1),
        ("hdf5", {"dataset": "/all/{id}/leads", "path": "part", "ignore": "row,file"}, 1),
        ("hdf5", {"dataset": "all/{record}/ecg", "path": "part.hdf5", "ignore": "row,file"}, 0),
    ],
)
def test_files_of_many(kind, options, spare, folder, signals):
    (folder / "labels.csv").write_text(ROWS)
    batch(folder, signals)
    source = open_(kind, folder, folds="", rate="100", unit="mV", **options)
    assert source.skipped == ({"no row in the labels table": spare} if spare else {})
    source = pickle.loads(pickle.dumps(source))
    records = list(source.read(source.items))
    for record, name in zip(records, ("a", "12", "c", "d"), strict=True):
        np.testing.assert_array_equal(record.signal, signals[name])
    assert len({record.source for record in records}) == 4
    (again,) = source.read(source.items[2:3])
    assert again.source == records[2].source


def test_rows_in_order(folder, signals):
    (folder / "labels.csv").write_text("record\nx\ny\nz\n")
    stacked = np.stack([signals["a"], signals["c"], signals["d"]])
    np.save(folder / "all.npy", stacked[:, None])
    with h5py.File(folder / "all.h5", "w") as file:
        file["ecg"] = stacked
    for kind, more in (("npy", {}), ("hdf5", {"dataset": "ecg"})):
        source = open_(kind, folder, tasks="", folds="", rate="100", unit="V", rows="order", **more)
        for record, signal in zip(source.read(source.items), stacked, strict=True):
            np.testing.assert_allclose(record.signal, signal * 1000, rtol=1e-6)
        without = open_(kind, folder, tasks="", folds="", labels="none", rate="100", unit="z", rows="order", **more)
        assert [item.record_id for item in without.items] == ["all-0", "all-1", "all-2"] and without.unit == "z"
        np.testing.assert_array_equal(list(without.read(without.items))[1].signal, stacked[1])
        (folder / "labels.csv").write_text("record\nx\ny\n")
        with pytest.raises(DataError, match=r"has 2 rows, all.* holds 3 recordings"):
            open_(kind, folder, tasks="", folds="", rate="100", unit="V", rows="order", **more)
        (folder / "labels.csv").write_text("record\nx\ny\nz\n")


@pytest.mark.parametrize(
    ("kind", "options", "error", "message"),
    [
        ("npy", {}, UsageError, "neither rate nor unit"),
        ("npy", {"rate": "100"}, UsageError, "unit=mV|uV|V|z"),
        ("npy", {"rate": "fast", "unit": "mV"}, UsageError, "rate='fast' is no number"),
        ("npy", {"rate": "nan", "unit": "mV"}, UsageError, "rate='nan'"),
        ("npy", {"rate": "100", "unit": "mv"}, UsageError, "known are mV, uV, V and z"),
        ("npy", {"rate": "100", "unit": "mV", "layout": "first"}, UsageError, "leads-first and samples-first"),
        ("npy", {"rate": "100", "unit": "mV", "leads": "I,DI"}, UsageError, "names lead I twice"),
        ("npy", {"rate": "100", "unit": "mV", "leads": "x"}, UsageError, "none of the twelve"),
        ("npy", {"rate": "100", "unit": "mV", "row": "r"}, UsageError, "row= names column 'r'"),
        ("npy", {"rate": "100", "unit": "mV", "row": "age", "rows": "order"}, UsageError, "not both"),
        ("npy", {"rate": "100", "unit": "mV", "rows": "sorted"}, UsageError, "known is order"),
        ("npy", {"rate": "100", "unit": "mV", "dataset": "x"}, UsageError, "unknown option 'dataset'"),
        ("npy", {"rate": "100", "unit": "mV", "path": "{x"}, UsageError, "path="),
        ("hdf5", {"ids": "x"}, UsageError, "needs dataset=NAME"),
        ("hdf5", {"ids": "x", "dataset": "{id}"}, UsageError, "needs dataset=NAME"),
        ("hdf5", {"dataset": "{record}_x"}, UsageError, "needs path=TEMPLATE too"),
        ("hdf5", {"dataset": "{rec", "path": "x"}, UsageError, "dataset="),
        ("hdf5", {"dataset": "nothing", "ids": "exam_id"}, DataError, "has no 'nothing'"),
        ("hdf5", {"dataset": "tracings", "ids": "all"}, DataError, "no list of ids"),
        ("hdf5", {"dataset": "nothing/{id}"}, DataError, "has no"),
        ("csv", {"decimal": ","}, UsageError, "known are point and comma"),
        ("csv", {"layout": "leads-first"}, UsageError, "unknown option 'layout'"),
        ("mat", {}, DataError, "no row of labels.csv has a recording"),
        ("xml", {"unit": "mV"}, UsageError, "unknown option 'unit'"),
        ("xml", {"labels": "none"}, UsageError, "labels=none has no table, so tasks= means nothing"),
        ("wfdb", {"repairs": "all"}, UsageError, "known are on and off"),
    ],
)
def test_mistakes_get_one_clear_line(kind, options, error, message, folder, signals):
    (folder / "labels.csv").write_text(LABELS)
    batch(folder, signals)
    with pytest.raises(error, match=message.replace("|", r"\|")) as raised:
        open_(kind, folder, **options)
    assert type(raised.value) is error and "\n" not in str(raised.value)


def test_an_id_in_two_places(folder, signals):
    batch(folder, signals)
    with h5py.File(folder / "part2.h5", "w") as file:
        file["tracings"], file["exam_id"] = np.stack([signals["a"]] * 2), np.array([b"x", b"a"])
    options = {"dataset": "tracings", "ids": "exam_id", "rate": "100", "unit": "mV"}
    with pytest.raises(DataError, match=r"labels.csv:2: a is in .*part.hdf5 and in .*part2.h5"):
        open_("hdf5", folder, **options)
    with h5py.File(folder / "part2.h5", "a") as file:
        del file["exam_id"]
        file["exam_id"] = np.array([b"a", b"a"])
    with pytest.raises(DataError, match=r"labels.csv:2: a is twice in"):
        open_("hdf5", folder, **options, path="part2.h5")
    with h5py.File(folder / "part2.h5", "a") as file:
        del file["exam_id"]
        file["exam_id"] = np.array([b"a", b"b", b"c"])
    with pytest.raises(DataError, match="names 3 recordings, tracings holds 2"):
        open_("hdf5", folder, **options)
    (folder / "part2.h5").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"part2.h5 is no HDF5 file.*unreadable-signal"):
        open_("hdf5", folder, **options)
    # Where the table says which file, a broken one costs its own rows only.
    source = open_("hdf5", folder, **options, path="part2.h5")
    assert [refusal.reason for refusal in source.read(source.items)] == ["unreadable-signal"] * 3


def test_row_numbers(folder, signals):
    batch(folder, signals)
    options = {"tasks": "", "folds": "", "rate": "100", "unit": "mV", "row": "row"}
    for cell in ("", "-1", "1.5", "x", "9" * 20):
        (folder / "labels.csv").write_text(f"record,row\nx,0\ny,{cell}\n")
        with pytest.raises(DataError, match=r"labels.csv:3: row=.* is no row number"):
            open_("npy", folder, **options)
    (folder / "labels.csv").write_text("record,row\nx,0\ny,0.0\n")
    with pytest.raises(DataError, match=r"labels.csv:3: row 0 of batch.npy is also that of line 2"):
        open_("npy", folder, **options)
    (folder / "labels.csv").write_text("record,row\nx,0\ny,5\n")
    source = open_("npy", folder, **options)
    good, bad = source.read(source.items)
    assert (
        isinstance(good, Record) and bad.reason == "missing-row" and source.skipped == {"no row in the labels table": 4}
    )


def test_sexes(folder, signals):
    write_files("npy", folder, {"a": signals["a"]})
    said = {"tasks": "", "folds": "", "rate": "100", "unit": "mV"}
    for rows, male, sexes in (
        ("a,True\nb,False\n", "true", [1, 0]),
        ("a,1\nb,2\nc,\n", "2", [0, 1]),
        ("a,1.0\nb,M\n", "1", [1, 1]),
    ):
        (folder / "labels.csv").write_text("record,sex\n" + rows)
        source = open_("npy", folder, **said, sex_male=male)
        assert [item.where["sex"] for item in source.items][:2] == sexes
    for rows, male, error, message in (
        ("a,1\nb,2\nc,9\n", "1", DataError, "labels.csv:4: sex='9' is a third value beside 1 and 2"),
        ("a,1\nb,2\n", "0", UsageError, "none of the values of sex: 1, 2"),
        ("a,true\n", "", UsageError, "say which value is male"),
    ):
        (folder / "labels.csv").write_text("record,sex\n" + rows)
        with pytest.raises(error, match=message):
            open_("npy", folder, **said, sex_male=male)


def test_templates_and_endings(folder, signals):
    (folder / "sub").mkdir()
    np.save(folder / "sub/x1.npy", signals["a"])
    (folder / "sub/x2.NPY").write_bytes((folder / "sub/x1.npy").read_bytes())
    (folder / "sub/x3").write_bytes((folder / "sub/x1.npy").read_bytes())
    (folder / "labels.csv").write_text("record\n1\n2\n3\n4\n")
    said = {"tasks": "", "folds": "", "rate": "100", "unit": "mV"}
    source = open_("npy", folder, **said, path="sub/x{id}")
    assert [item.where["path"] for item in source.items] == ["sub/x1.npy", "sub/x2.NPY", "sub/x3", None]
    assert [isinstance(record, Record) for record in source.read(source.items)] == [True, True, True, False]
    with pytest.raises(DataError, match="path="):
        open_("npy", folder, **said, path="../set/sub/x{id}")
    (folder / "labels.csv").write_text("record\nx1.npy\nx2\n")
    assert [item.where["path"] for item in open_("npy", folder, **said).items] == ["sub/x1.npy", "sub/x2.NPY"]


def test_segments_are_no_records_of_their_own(folder, wfdb_record):
    for name in ("a", "b_0001", "b_0002"):
        wfdb_record(folder / name)
    (folder / "b.hea").write_text("b/2 12 100 2000\nb_0001 1000\nb_0002 1000\n")
    (folder / "bad.hea").write_bytes(b"\xff\0/3\n~ 5\n")
    source = open_source("wfdb", folder, {"labels": "none"})
    assert [item.record_id for item in source.items] == ["a", "b", "bad"]
    assert source.skipped == {"segment of another record": 2}
    a, b, bad = source.read(source.items)
    assert len(a.signal) == 1000 and len(b.signal) == 2000 and isinstance(bad, Refused)


def test_header_name_with_a_suffix(folder, wfdb_record):
    wfdb_record(folder / "a")
    text = (folder / "a.hea").read_text()
    (folder / "a.hea").write_text(text.replace("a 12", "a.dat 12", 1))
    (folder / "labels.csv").write_text("record\na\n")
    (good,) = (source := open_source("wfdb", folder, {})).read(source.items)
    assert isinstance(good, Record)
    (bad,) = (source := open_source("wfdb", folder, {"repairs": "off"})).read(source.items)
    assert bad.reason == "unreadable-header"


def test_nothing_there(folder):
    dicom = [("dicom", {})] if importlib.util.find_spec("pydicom") else []
    for kind, more in (("xml", {}), *dicom, ("csv", {}), ("hdf5", {"dataset": "{id}"})):
        (folder / "labels.csv").unlink(missing_ok=True)
        with pytest.raises(DataError, match="no recording"):
            open_source(kind, folder, {"labels": "none", **more})
        with pytest.raises(DataError, match=r"there is no .*labels.csv"):
            open_source(kind, folder, more)
