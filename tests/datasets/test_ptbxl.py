"""PTB-XL: layout, tasks, folds, and the traps of its table."""

import csv
import pickle
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest

from ecg_jax.datasets import open_source
from ecg_jax.datasets.ptbxl import TASKS
from ecg_jax.errors import DataError, UsageError
from ecg_jax.records.record import Record, Refused

HEAD = "ecg_id,patient_id,age,sex,device,recording_date,scp_codes,strat_fold,filename_lr,filename_hr"


def statements() -> str:
    """As many statements of each kind as PTB-XL has; NDT-like D0 to D3 are form statements too."""
    lines = [",description,diagnostic,form,rhythm,diagnostic_class,diagnostic_subclass"]
    lines += [f"D{i},x,1.0,{'1.0' if i < 4 else ''},,C{i % 5},S{i % 23}" for i in range(44)]
    lines += [f'F{i},"x, y",,1.0,,,' for i in range(15)] + [f"R{i},x,,,1.0,," for i in range(12)]
    return "\n".join(lines) + "\n"


def row(i: int, codes: str, fold: object = 1, patient: object = 5.0, age: object = 50.0, sex: object = 0) -> str:
    files = f"records100/00000/{i:05d}_lr,records500/00000/{i:05d}_hr"
    return f'{i},{patient},{age},{sex},CS-12   E,1984-11-09 09:17:34,"{codes}",{fold},{files}'


@pytest.fixture
def folder(tmp_path, wfdb_record) -> Path:
    for i in (1, 2, 3):
        wfdb_record(tmp_path / f"records100/00000/{i:05d}_lr", i)
    wfdb_record(tmp_path / "records500/00000/00001_hr", 1, rate=500)
    (tmp_path / "scp_statements.csv").write_text(statements())
    rows = [
        row(1, "{'D0': 100.0, 'R3': 0.0}"),
        row(2, "{'D6': 0.0, 'D1': 80.0, 'ODD': 1.0}", fold=9, patient=6.0, age=300.0, sex=1),
        row(3, "{'F2': 0.0}", fold=10, patient="", age="", sex=""),
    ]
    (tmp_path / "ptbxl_database.csv").write_text("\n".join([HEAD, *rows]) + "\n")
    return tmp_path


def test_records_and_tasks(folder):
    source = pickle.loads(pickle.dumps(open_source("ptbxl", folder, {})))
    assert {task: len(names) for task, names in source.tasks.items()} == TASKS
    assert source.tasks["superclass"] == ("C0", "C1", "C2", "C3", "C4")
    assert [(i.record_id, i.group, i.split) for i in source.items] == [
        ("1", "5", "train"), ("2", "6", "val"), ("3", "3", "test")
    ]  # fmt: skip
    one, two, three = source.read(source.items)

    def on(record: Record, task: str) -> list[str]:
        return [name for name, value in zip(source.tasks[task], record.labels[task], strict=True) if value == 1]

    assert on(one, "superclass") == ["C0"] and on(one, "form") == ["D0"] and on(one, "rhythm") == ["R3"]
    assert on(two, "superclass") == ["C1"] and on(two, "subclass") == ["S1", "S6"]  # likelihood 0 counts
    assert on(two, "diagnostic") == ["D1", "D6"] and (two.labels["rhythm"] == -1).all()
    assert (three.labels["superclass"] == -1).all() and on(three, "form") == on(three, "statements") == ["F2"]
    assert (one.age, one.sex, one.patient_id) == (50.0, 1.0, "5")
    assert (two.age, two.sex) == (90.0, 0.0) and three.patient_id is None and np.isnan([three.age, three.sex]).all()
    assert one.device == "CS-12 E" and one.time == "1984-11-09 09:17:34" and one.rate == 100 and len(one.source) == 32
    assert source.about["unknown_codes"] == ["ODD"] and source.about["unlabelled"]["rhythm"] == 2
    assert source.version == "1.0.3"


def test_rates(folder, wfdb_record):
    assert open_source("ptbxl", folder, {}).about["rate"] == 100
    source = open_source("ptbxl", folder, {"rate": "500"})
    read = list(source.read(source.items))
    assert read[0].rate == 500 and [getattr(r, "reason", None) for r in read[1:]] == ["missing-file"] * 2
    for i in (2, 3):
        wfdb_record(folder / f"records500/00000/{i:05d}_hr", i, rate=500)
    source = open_source("ptbxl", folder, {})
    assert source.about["rate"] == 500 and {record.rate for record in source.read(source.items)} == {500.0}
    shutil.rmtree(folder / "records100")
    with pytest.raises(DataError, match=r"records100.*rate=500"):
        open_source("ptbxl", folder, {"rate": "100"})


def test_folds(folder):
    source = open_source("ptbxl", folder, {"folds": "10/1/2"})
    assert [(item.record_id, item.split) for item in source.items] == [("1", "val"), ("3", "train")]
    assert source.skipped == {"outside folds": 1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fold": "1/2/3"}, "did you mean 'folds'"),
        ({"rate": "250"}, "rate='250'"),
        ({"folds": "1"}, "three parts"),
    ],
)
def test_bad_options(folder, options, message):
    with pytest.raises(UsageError, match=message):
        open_source("ptbxl", folder, options)


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("ptbxl_database.csv", "scp_codes", "scp", "no column 'scp_codes'"),
        ("ptbxl_database.csv", "{'D0': 100.0, 'R3': 0.0}", "D0", "ptbxl_database.csv:2: scp_codes='D0'"),
        ("ptbxl_database.csv", "{'D0': 100.0, 'R3': 0.0}", "{1: 2}", "scp_codes="),
        ("ptbxl_database.csv", '0.0}",1,', '0.0}",,', "strat_fold='' is no fold number"),
        ("ptbxl_database.csv", ",50.0,0,", ",50.0,2,", "sex='2'"),
        ("ptbxl_database.csv", ",50.0,0,", ",old,0,", "age='old'"),
        ("ptbxl_database.csv", "\n2,", "\n1,", "there twice"),
        ("scp_statements.csv", "R11,x,,,1.0,,\n", "", "11 labels of task rhythm, PTB-XL has 12"),
    ],
)
def test_bad_tables(folder, file, old, new, message):
    text = (folder / file).read_text()
    assert old in text
    (folder / file).write_text(text.replace(old, new))
    with pytest.raises(DataError, match=message):
        open_source("ptbxl", folder, {})


def test_missing_tables(folder):
    (folder / "scp_statements.csv").unlink()
    with pytest.raises(DataError, match=r"scp_statements\.csv"):
        open_source("ptbxl", folder, {})


def test_the_real_thing(shared_data, tmp_path):
    """Labels of the published sample equal those that were derived from it by others."""
    for name in ("ptbxl_database.csv", "scp_statements.csv"):
        shutil.copy(shared_data / "ptbxl" / name, tmp_path / name)
    with tarfile.open(shared_data / "ptbxl" / "records100.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    source = open_source("ptbxl", tmp_path, {"folds": "1-6/7/8"})
    assert len(source.items) == 353 and source.about["rate"] == 100 and source.version == "1.0.1"
    assert source.tasks["superclass"] == ("CD", "HYP", "MI", "NORM", "STTC")
    with open(shared_data / "ptbxl" / "labels.csv", newline="") as file:
        truth = {line["ecg_id"]: line for line in csv.DictReader(file)}
    for item in source.items:
        known = truth[item.record_id]
        assert item.group == known["patient_id"]
        assert item.split == {"7": "val", "8": "test"}.get(known["strat_fold"], "train")
        assert item.where["sex"] == 1 - int(known["sex"])
        for task in ("superclass", "rhythm", "form", "subclass"):
            names = np.array(source.tasks[task])
            assert set(names[item.where["labels"][task] == 1]) == set(filter(None, known[task].split(";")))
    results = list(source.read(source.items[::20]))
    assert not any(isinstance(result, Refused) for result in results)
