"""CODE in full: archives, folders and lists that have to agree, and what a conversion of millions must not need."""

import io
import pickle
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ecg_jax.datasets import archive, open_source
from ecg_jax.errors import DataError, EcgJaxError, UsageError
from ecg_jax.records.preprocess import prepare_many
from ecg_jax.records.record import Record, Refused

HEAD = "sex,age,id_exam,id_patient,date_exam,1dAVb,RBBB,LBBB,SB,AF,ST"
EIGHT = ("DI", "DII", "V1", "V2", "V3", "V4", "V5", "V6")
TWELVE = ("DI", "DII", "DIII", "AVR", "AVL", "AVF", "V1", "V2", "V3", "V4", "V5", "V6")


def record(exam: int, n: int = 1, leads: tuple[str, ...] = EIGHT) -> list[tuple[str, bytes]]:
    """Header and MATLAB v4 file (format 16 behind 24 bytes) as `wfdb` writes them."""
    name = f"TNMG{exam}_N{n}"
    digital = np.random.default_rng(exam * 10 + n).integers(-900, 900, (600, len(leads))).astype("<i2")
    mat = np.array([30, len(leads), len(digital), 0, 4], "<u4").tobytes() + b"val\0" + digital.tobytes()
    lines = [f"{name} {len(leads)} 300 {len(digital)} 10:00:00 01/01/1999"]
    for i, lead in enumerate(leads):
        total = int(digital[:, i].astype(int).sum()) % 65536
        lines.append(f"{name}.mat 16+24 1000.0(0)/mV 16 0 {digital[0, i]} {total} 0 {lead}")
    return [(f"{name}.hea", ("\n".join(lines) + "\n").encode()), (f"{name}.mat", mat)]


def signal(exam: int, n: int = 1) -> np.ndarray:
    """Lead I of the record in mV."""
    return np.random.default_rng(exam * 10 + n).integers(-900, 900, (600, 8))[:, 0] / 1000


def pack(path: Path, files: list[tuple[str, bytes]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w" if path.suffix == ".tar" else "w:gz") as tar:
        for name, data in files:
            info = tarfile.TarInfo(f"{archive.stem(path)}/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def row(exam: object, patient: object = 5, flags: str = "0,0,0,0,0,0", date: str = "2015-03-02", **more) -> str:
    cells = {"sex": "F", "age": 44} | more
    return f"{cells['sex']},{cells['age']},{exam},{patient},{date},{flags}"


def tables(folder: Path, rows: list[str], records: list[str] | None) -> None:
    (folder / "annotations.csv").write_text("\n".join([HEAD, *rows]) + "\n")
    if records is not None:
        (folder / "RECORDS.txt").write_text("\n".join(records) + "\n")


ROWS = [
    row(10001, 5, "0,0,0,0,1,0"),
    row(3, 6, "1,0,0,0,0,1", sex="M", age=140),
    row(1, 5),
    row(20007, 8),  # its archive is not there
    row(777, 9),  # has no record anywhere
    row(4, "", ",,,,,", sex="", date=""),
]
FILES = {"S0000000": [1, 2, 3, 4], "S0010000": [10001], "S0020000": [20007]}
RECORDS = [f"{name}/TNMG{exam}_N{n}" for name, exams in FILES.items() for exam in exams for n in (1, 2)]


def fill(folder: Path, kind: str) -> Path:
    """SOURCE with two of three archives, packed (or not) as `kind` says."""
    for name in ("S0000000", "S0010000"):
        files = [
            file for exam in FILES[name] for n in (2, 1) for file in record(exam, n, TWELVE if exam == 3 else EIGHT)
        ]
        if kind == "folder":
            (folder / "ecg-traces" / name).mkdir(parents=True)
            for file, data in files:
                (folder / "ecg-traces" / name / file).write_bytes(data)
        else:
            pack(folder / f"{name}{kind}", files)
    tables(folder, ROWS, RECORDS)
    return folder


@pytest.mark.parametrize("kind", [".tar.gz", ".tar", "folder"])
@pytest.mark.parametrize("listed", [True, False])
def test_first_records_of_annotated_exams(tmp_path, kind, listed):
    fill(tmp_path, kind)
    if not listed:
        (tmp_path / "RECORDS.txt").unlink()
    source = pickle.loads(pickle.dumps(open_source("code", tmp_path, {"cache": str(tmp_path / "elsewhere")})))
    ids = ["1", "3", "4", "10001", *([] if listed else ["777", "20007"]), *(["777"] if listed else [])]
    assert sorted(item.record_id for item in source.items) == sorted(ids)
    assert [item.record_id for item in source.items][:4] == ids[:4]
    assert source.skipped == {
        "record after the first of its exam": 6 if listed else 5,
        "exam without annotation": 1,
        **({"archive not there": 1} if listed else {}),
    }
    results = {item.record_id: result for item, result in zip(source.items, source.read(source.items), strict=True)}
    for exam in (1, 4, 10001):
        np.testing.assert_allclose(results[str(exam)].signal[:, 0], signal(exam), atol=1e-6)
    assert all(isinstance(results[exam], Record) for exam in ("1", "3", "4", "10001"))
    assert {exam: result.reason for exam, result in results.items() if isinstance(result, Refused)} == {
        exam: "missing-file" for exam in (["777"] if listed else ["777", "20007"])
    }
    one, three, four, far = (results[exam] for exam in ("1", "3", "4", "10001"))
    assert (one.rate, one.patient_id, one.group, one.age, one.sex) == (300, "5", "5", 44, 0)
    assert three.labels["code6"].tolist() == [1, 0, 0, 0, 0, 1] and three.sex == 1 and np.isnan(three.age)
    assert far.labels["code6"].tolist() == [0, 0, 0, 0, 1, 0] and far.group == "5"
    assert four.labels["code6"].tolist() == [-1] * 6 and four.group == "4" and four.patient_id is None
    assert one.time == "2015-03-02" and four.time is None  # never the header's 1999
    assert one.quality and one.meta["leads"] == list(EIGHT) and not three.quality
    some = source.items.take(np.array([0, 3]))
    for again, first in zip(source.read(some), (one, far), strict=True):
        np.testing.assert_array_equal(again.signal, first.signal)
        assert again.source == first.source
    assert (tmp_path / "elsewhere").exists() == (kind != "folder")
    assert not (tmp_path / ".ecg_jax_cache").exists()


def test_all_ways_give_the_same_records(tmp_path):
    found = []
    for kind in (".tar.gz", ".tar", "folder"):
        (tmp_path / kind).mkdir()
        source = open_source("code", fill(tmp_path / kind, kind), {})
        results = list(source.read(source.items))
        found.append([(str(r), "") if isinstance(r, Refused) else (r.signal.tobytes(), r.source) for r in results])
    assert found[0] == found[1] == found[2]


def test_samitrop_patients_are_left_out(tmp_path):
    fill(tmp_path, ".tar")
    (tmp_path / "samitrop_patients.txt").write_text("5\n\n99\n")
    source = open_source("code", tmp_path, {"exclude_samitrop": "samitrop_patients.txt"})
    assert [item.record_id for item in source.items] == ["3", "4", "777"]
    assert source.skipped["SaMi-Trop patient"] == 2 and source.about["contains"] == ["code15"]
    whole = open_source("code", tmp_path, {})
    assert whole.about["contains"] == ["code15", "samitrop"] and whole.about != source.about
    assert len(whole.items) == len(source.items) + 2
    for text, message in (("5 6", ":1: '5 6' is no patient id"), ("x", "is no patient id"), ("99", "none of its ids")):
        (tmp_path / "samitrop_patients.txt").write_text(text)
        with pytest.raises(DataError, match=message):
            open_source("code", tmp_path, {"exclude_samitrop": "samitrop_patients.txt"})
    with pytest.raises(DataError, match="exclude_samitrop"):
        open_source("code", tmp_path, {"exclude_samitrop": "none.txt"})


def test_broken_recordings_are_refused_one_by_one(tmp_path):
    good, header, mat = record(1), record(2), record(3)
    files = [*good, header[0], (header[1][0], header[1][1][:300]), ("TNMG3_N1.hea", b"\xff" * 40), mat[1], record(4)[1]]
    pack(
        tmp_path / "S0000000.tar.gz",
        [*files, ("TNMG5_N1.hea", record(5)[0][1].replace(b"TNMG5_N1.mat", b"TNMG1_N1.mat"))],
    )
    tables(tmp_path, [row(i) for i in range(1, 6)], [f"S0000000/TNMG{i}_N1" for i in range(1, 6)])
    source = open_source("code", tmp_path, {})
    results = list(source.read(source.items))
    reasons = [getattr(result, "reason", None) for result in results]
    assert reasons[0] is None and reasons[1] == "truncated" and reasons[3] == "missing-file"
    assert isinstance(results[2], Refused) and reasons[4] == "missing-signal-file"
    again = list(source.read(source.items))
    for one, other in zip(results[1:], again[1:], strict=True):  # no name of a temporary folder
        assert str(one) == str(other) and "/tmp" not in str(one).replace(str(tmp_path), "")


def test_a_damaged_archive_refuses_its_own_exams(tmp_path):
    fill(tmp_path, ".tar.gz")
    path = tmp_path / "S0010000.tar.gz"
    path.write_bytes(path.read_bytes()[:-200])
    source = open_source("code", tmp_path, {})
    reasons = {
        item.record_id: getattr(result, "reason", None)
        for item, result in zip(source.items, source.read(source.items), strict=True)
    }
    assert reasons == {"1": None, "3": None, "4": None, "10001": "unreadable-archive", "777": "missing-file"}
    (tmp_path / "RECORDS.txt").unlink()
    with pytest.raises(DataError, match=r"S0010000\.tar\.gz cannot be read to its end.*download it again"):
        open_source("code", tmp_path, {})


def test_archive_and_cache_that_go_meanwhile(tmp_path):
    source = open_source("code", fill(tmp_path, ".tar.gz"), {})
    list(source.read(source.items))
    for path in (tmp_path / ".ecg_jax_cache").iterdir():
        path.unlink()
    assert sum(isinstance(result, Record) for result in source.read(source.items)) == 4
    for path in [*tmp_path.glob("*.tar.gz"), *(tmp_path / ".ecg_jax_cache").iterdir()]:
        path.unlink()
    assert [result.reason for result in source.read(source.items)] == ["unreadable-archive"] * 4 + ["missing-file"]


def test_an_archive_is_copied_without_what_is_not_wanted(tmp_path):
    source = open_source("code", fill(tmp_path, ".tar.gz"), {})
    list(source.read(source.items))
    with tarfile.open(tmp_path / ".ecg_jax_cache" / "S0000000.tar") as tar:
        assert sorted(tar.getnames()) == sorted(f"TNMG{i}_N1.{kind}" for i in (1, 3, 4) for kind in ("hea", "mat"))


@pytest.mark.parametrize(
    ("rows", "records", "message"),
    [
        ([row(1), row(1)], RECORDS, "annotations.csv: id_exam 1 is there twice"),
        ([row("1.5")], RECORDS, r"annotations.csv:2: id_exam='1\.5' is no id"),
        ([row(1, "x")], RECORDS, "id_patient='x' is no id"),
        ([row(1, sex="W")], RECORDS, "sex='W', must be M, F or empty"),
        ([row(1, flags="0,0,0,0,0,7")], RECORDS, "ST='7', must be"),
        ([], RECORDS, "has no rows"),
        (ROWS, [*RECORDS, RECORDS[0]], r"RECORDS.txt: record TNMG1_N1 is there twice"),
        (ROWS, ["S0000000/TNMG1"], r"RECORDS.txt:1: 'S0000000/TNMG1' is no record such as"),
        (ROWS, ["S0000000/TNMG01_N1"], "is no record such as"),
        (ROWS, ["X1/TNMG1_N1"], r"RECORDS.txt speaks of X1, \.\.\. and neither X1.tar.gz nor a folder"),
        (ROWS, [f"S{i}/TNMG{i}_N1" for i in range(40_000)], "records in 32769 folders"),
    ],
)
def test_mistakes_in_the_tables(tmp_path, rows, records, message):
    fill(tmp_path, ".tar")
    tables(tmp_path, rows, records)
    with pytest.raises(DataError, match=message) as raised:
        open_source("code", tmp_path, {})
    assert "\n" not in str(raised.value)


def test_mistakes_in_folder_and_options(tmp_path):
    tables(tmp_path, ROWS, None)
    with pytest.raises(DataError, match=r"neither archives \(S0000000\.tar\.gz\) nor records"):
        open_source("code", tmp_path, {})
    fill(tmp_path, ".tar")
    (tmp_path / "file").touch()
    for options, message in (
        ({"cache": str(tmp_path / "file" / "x")}, "cache=DIR"),
        ({"checksums": "no"}, "known are on and off"),
        ({"cash": "x"}, "did you mean 'cache'"),
    ):
        with pytest.raises(UsageError, match=message):
            open_source("code", tmp_path, options)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    table=st.one_of(st.binary(max_size=100), st.text(st.sampled_from('0123,.FM\n-"'), max_size=60)),
    records=st.one_of(st.none(), st.binary(max_size=60), st.sampled_from([b"S0000000/TNMG1_N1\n", b"TNMG1_N1"])),
    damage=st.binary(max_size=40),
)
def test_any_content(tmp_path, table, records, damage):
    rows = table if isinstance(table, bytes) else f"{HEAD}\n{row(1)}\n{table}".encode()
    (tmp_path / "annotations.csv").write_bytes(rows)
    (tmp_path / "RECORDS.txt").unlink(missing_ok=True)
    if records is not None:
        (tmp_path / "RECORDS.txt").write_bytes(records)
    header, mat = record(1)
    pack(tmp_path / "S0000000.tar", [(header[0], header[1][: len(damage) * 20] + damage), mat])
    try:
        source = open_source("code", tmp_path, {})
    except EcgJaxError as error:
        assert error.exit_code in (2, 3)
    else:
        results = list(source.read(source.items))
        assert len(results) == len(source.items) and all(isinstance(result, Record | Refused) for result in results)


def test_real_records_in_archives(shared_data, tmp_path):
    """CODE-15 % and SaMi-Trop recordings of the Challenge 2025, under the names that CODE gives them."""
    files, exams = [], []
    with tarfile.open(shared_data / "code15_samitrop" / "records.tar.xz") as tar:
        for member in tar:
            stem, _, suffix = Path(member.name).name.partition(".")
            if not member.isreg() or len(exams) > 40:
                continue
            data = tar.extractfile(member).read()
            if suffix == "hea":
                data = data.replace(stem.encode(), f"TNMG{stem}_N1".encode())
                exams.append(int(stem))
            files.append((f"TNMG{stem}_N1.{suffix}", data))
    pack(tmp_path / "S0000000.tar.gz", files)
    tables(tmp_path, [row(exam) for exam in exams], None)
    source = open_source("code", tmp_path, {})
    results = list(source.read(source.items))
    records = [result for result in results if isinstance(result, Record)]
    assert len(results) == len(exams) and len(records) >= len(exams) - 1
    assert {record.rate for record in records} == {400}
    assert all(isinstance(windows, list) for windows in prepare_many(records))


def test_opening_needs_little_memory(tmp_path):
    """2.3 million rows and the 8.2 million lines of RECORDS.txt must fit 2 GB, which is 860 bytes a row."""
    count = 200_000
    with open(tmp_path / "annotations.csv", "w") as file:
        file.write(HEAD + "\n")
        file.writelines(row(exam * 7 % count + 1, exam // 2) + "\n" for exam in range(count))
    with open(tmp_path / "RECORDS.txt", "w") as file:
        for exam in range(count):
            name = f"S{exam // 10_000 * 10_000:07d}/TNMG{exam + 1}"
            file.writelines(f"{name}_N{n}\n" for n in (1, 2, 3))
    (tmp_path / "S0000000").mkdir()
    for i in range(20):
        (tmp_path / f"S{i * 10_000:07d}").mkdir(exist_ok=True)
    script = (
        "import resource, sys, pathlib\n"
        "from ecg_jax.datasets import code, open_source  # what the imports take does not count\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = peak()\n"
        "source = open_source('code', pathlib.Path(sys.argv[1]), {})\n"
        "print(len(source.items), peak() - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    items, kilobytes = map(int, done.stdout.split())
    assert items == count
    assert kilobytes * 1024 < 500 * count  # 200 or so
