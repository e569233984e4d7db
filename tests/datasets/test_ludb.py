"""LUDB: the table as published and as found elsewhere, the nine tasks, and the unit that the headers have wrong."""

import pickle
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest

from ecg_jax.datasets import open_source
from ecg_jax.datasets.source import Source
from ecg_jax.errors import DataError, UsageError
from ecg_jax.records.record import Record

NAMES = ("i", "ii", "iii", "avr", "avl", "avf", "v1", "v2", "v3", "v4", "v5", "v6")
HEAD = (
    "ID,Sex,Age,Rhythms,Electric axis of the heart,Conduction abnormalities,Extrasystolies,Hypertrophies,"
    "Cardiac pacing,Ischemia,Non-specific repolarization abnormalities,Other states\n"
)
# Every cell ends in a line end, and statements stand on lines of their own.
PUBLISHED = HEAD + (
    '1,"F\n","51\n","Sinus bradycardia\n","Electric axis of the heart: left axis deviation\n",,,'
    '"Left ventricular overload\nLeft ventricular hypertrophy\n",,,'
    '"Non-specific repolarization abnormalities: posterior wall\n",\n'
    '34,"M\n",">89\n","Atrial flutter, typical\n",,,,,"P-synchrony\n","STEMI: apical.\n",,\n'
    '5,,,"Sinus rhythm\n","Electric axis of the heart: normal\n",,,,,"STEMI: apical\n",,'
    '"Early repolarization syndrome\n"\n'
)
ELSEWHERE = HEAD + (
    "1,F,51,Sinus bradycardia,Electric axis of the heart: left axis deviation,,,"
    "Left ventricular overload; Left ventricular hypertrophy,,,"
    "Non-specific repolarization abnormalities: posterior wall,\n"
    '34,M,>89,"Atrial flutter, typical",,,,,P-synchrony,Stemi: apical,,\n'
    "5,,,Sinus rhythm,Electric axis of the heart: normal,,,,,Stemi: apical,,Early repolarization syndrome\n"
)


def digital(seed: int, slip: int = 0) -> np.ndarray:
    """Integers [500, 12] in microvolt that obey Einthoven; the augmented leads are rounded. `slip` breaks one."""
    rng = np.random.default_rng(seed)
    leads = rng.integers(-900, 900, (500, 12))
    one, two = leads[:, 0], leads[:, 1]
    leads[:, 2] = two - one
    leads[:, 3], leads[:, 4], leads[:, 5] = -(one + two) // 2, one - two // 2, two - one // 2
    leads[77, 2] += slip
    return leads


def write(path: Path, leads: np.ndarray, names=NAMES) -> None:
    """Gains as LUDB has them: one over the lead's range."""
    path.parent.mkdir(exist_ok=True)
    path.with_name(f"{path.name}.dat").write_bytes(leads.astype("<i2").tobytes())
    lines = [f"{path.name} {len(names)} 500 {len(leads)}"]
    for lead, name in zip(leads.T, names, strict=True):
        total = (int(lead.sum()) + 32768) % 65536 - 32768
        lines.append(f"{path.name}.dat 16 {np.ptp(lead)}({lead.min() + 3})/mV 0 0 {lead[0]} {total} 0 {name}")
    path.with_name(f"{path.name}.hea").write_text("\n".join([*lines, "#<age>: 51", "#<sex>: F"]) + "\n")


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "ludb.csv").write_text(PUBLISHED)
    for record in (1, 34, 5):
        write(tmp_path / "data" / str(record), digital(record))
    return tmp_path


def opened(folder: Path) -> Source:
    return pickle.loads(pickle.dumps(open_source("ludb", folder, {})))


def on(source: Source, labels: dict[str, np.ndarray], task: str) -> list[str] | None:
    """Names of the labels that are there; None where they are unknown."""
    if (labels[task] == -1).all():
        return None
    return [name for name, value in zip(source.tasks[task], labels[task], strict=True) if value]


@pytest.mark.parametrize("text", [PUBLISHED, ELSEWHERE])
def test_tasks(folder, text):
    (folder / "ludb.csv").write_text(text)
    source = opened(folder)
    assert source.tasks == {
        "rhythm": ("atrial flutter, typical", "sinus bradycardia", "sinus rhythm"),
        "axis": ("left axis deviation", "normal"),
        "hypertrophy": ("left ventricular hypertrophy", "left ventricular overload"),
        "pacing": ("p-synchrony",),
        "ischemia": ("stemi: apical",),
        "repolarisation": ("posterior wall",),
        "other": ("early repolarization syndrome",),
    }
    assert source.about["tasks_without_label"] == ["conduction", "extrasystole"]
    first, old, third = source.read(source.items)
    assert on(source, first.labels, "hypertrophy") == ["left ventricular hypertrophy", "left ventricular overload"]
    assert on(source, first.labels, "ischemia") == [] and on(source, first.labels, "other") == []
    assert on(source, old.labels, "axis") is None and on(source, old.labels, "rhythm") == ["atrial flutter, typical"]
    assert on(source, third.labels, "ischemia") == on(source, old.labels, "ischemia") == ["stemi: apical"]
    assert (first.age, first.sex, old.age, old.sex) == (51.0, 0.0, 90.0, 1.0)
    assert np.isnan([third.age, third.sex]).all()
    assert source.version == "1.0.1" and "microvolt" in source.about["gain_policy"]


def test_signals_are_microvolt(folder):
    source = opened(folder)
    for record in source.read(source.items):
        truth = digital(int(record.record_id))
        np.testing.assert_allclose(record.signal, truth / 1000, atol=1e-6)
        assert record.group == record.record_id and record.rate == 500 and not record.missing and not record.quality


def test_integers_that_are_no_microvolt(folder):
    write(folder / "data" / "1", digital(1, slip=1))
    write(folder / "data" / "34", digital(34)[:, [0, 1, 6]], ("i", "ii", "v1"))
    source = opened(folder)
    results = list(source.read(source.items))
    assert [getattr(result, "reason", None) for result in results] == ["gain-policy-fails", "gain-policy-fails", None]
    assert "1.dat: I + III = II" in results[0].detail and "34.hea" in results[1].detail


def test_rows_and_records_that_lack_each_other(folder):
    (folder / "data" / "5.hea").rename(folder / "data" / "6.hea")
    source = opened(folder)
    assert source.skipped == {"recording without a row in ludb.csv": 1}
    results = list(source.read(source.items))
    assert [getattr(result, "reason", None) for result in results] == [None, None, "missing-file"]
    (folder / "data" / "34.dat").write_bytes(b"short")
    assert [getattr(r, "reason", None) for r in source.read(source.items)][1] == "truncated"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("Rhythms", "Rhythm", "no column 'Rhythms'"),
        ('34,"M', '1,"M', r"ludb\.csv:\d+: ID='1' is there twice"),
        ('34,"M', '../34,"M', "is no number"),
        ('"M\n"', "male", "Sex='male'"),
        (">89", ">90", "Age='>90' is no number"),
    ],
)
def test_bad_table(folder, old, new, message):
    assert old in PUBLISHED
    (folder / "ludb.csv").write_text(PUBLISHED.replace(old, new))
    with pytest.raises(DataError, match=message):
        opened(folder)


def test_no_options(folder):
    with pytest.raises(UsageError, match="unknown option 'rate'"):
        open_source("ludb", folder, {"rate": "500"})


def test_the_real_thing(shared_data, tmp_path):
    """All 120 recordings at hand; labels in the table agree with the comments of the headers."""
    shutil.copy(shared_data / "ludb" / "ludb.csv", tmp_path)
    with tarfile.open(shared_data / "ludb" / "data.tar.xz") as archive:
        wanted = [member for member in archive if member.name.endswith((".hea", ".dat"))]
        archive.extractall(tmp_path, wanted, filter="data")
    source = opened(tmp_path)
    assert len(source.items) == 120 and not source.skipped
    assert {task: len(names) for task, names in source.tasks.items()} == {
        "rhythm": 9, "axis": 5, "conduction": 8, "extrasystole": 8, "hypertrophy": 6, "pacing": 4, "ischemia": 23,
        "repolarisation": 6, "other": 1,
    }  # fmt: skip
    results = list(source.read(source.items))
    assert all(isinstance(record, Record) for record in results)
    extra = 0
    for record in results:
        comments = (tmp_path / "data" / f"{record.record_id}.hea").read_text().partition("#<diagnoses>:")[2]
        said = {" ".join(line.strip("# \n").split()).rstrip(".").casefold() for line in comments.splitlines()} - {""}
        prefix = {"axis": "electric axis of the heart: ", "rhythm": "rhythm: "}
        prefix["repolarisation"] = "non-specific repolarization abnormalities: "
        table = {prefix.get(task, "") + name for task in source.tasks for name in on(source, record.labels, task) or ()}
        # Beyond the first, rhythms stand alone in the header.
        said = {f"rhythm: {text}" if text in source.tasks["rhythm"] else text for text in said}
        extra += table - said == {"pacemaker presence, undefined"}
        assert not said - table and table - said <= {"pacemaker presence, undefined"}
    assert extra == 4
    peaks = [float(np.abs(record.signal).max()) for record in results]
    assert 0.5 < np.median(peaks) < 5 and max(peaks) < 10
    rhythms = sum(record.labels["rhythm"].astype(int) for record in results)
    assert dict(zip(source.tasks["rhythm"], rhythms.tolist(), strict=True))["sinus rhythm"] == 86
    assert sum((record.labels["axis"] == -1).all() for record in results) == 5
    for record in results:
        one, two, three, avr, avl, avf = record.signal[:, :6].astype(float).T
        rests = (two - one - three, avr + (one + two) / 2, avl - (one - three) / 2, avf - (two + three) / 2)
        assert max(np.abs(rest).max() for rest in rests) < 0.00051
