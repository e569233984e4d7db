"""Labels tables: what is read and what is refused."""

import csv
import hashlib
import io
import math
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ecg_jax.datasets.table import (
    age,
    identifier,
    multi_hot,
    number,
    parse_folds,
    read_table,
    stream_table,
    table_columns,
)
from ecg_jax.errors import DataError, UsageError


def test_reads_what_excel_and_pandas_write(tmp_path):
    path = tmp_path / "t.csv"
    path.write_bytes('\ufeffid, age \r\n"a, b",3.5\r\n\r\nc,\r\n'.encode())
    table = read_table(path)
    assert table.columns == ("id", "age")
    assert [row["id"] for row in table.rows] == ["a, b", "c"]
    assert number(table, 0, "age") == 3.5 and np.isnan(number(table, 1, "age"))
    assert table.where(1) == f"{path}:4"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"a;b;c\n1;2;3\n", "separated by commas"),
        (b"a,a\n1,2\n", "is there twice"),
        (b"a,b\n1\n", "t.csv:2: 1 cells under 2 column names"),
        (b"a,b\n1,2,3\n", "3 cells under 2"),
        (b"a,b\n\xe9,2\n", "not UTF-8"),
        (b'a,b\n"1,2\n', "not a CSV file"),
    ],
)
def test_bad_tables(tmp_path, content, message):
    path = tmp_path / "t.csv"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_table(path)


def test_no_table(tmp_path):
    with pytest.raises(DataError, match="there is no"):
        read_table(tmp_path / "t.csv")
    with pytest.raises(DataError):
        read_table(tmp_path)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200))
def test_any_bytes_are_a_table_or_a_data_error(tmp_path, content):
    path = tmp_path / "t.csv"
    path.write_bytes(content)
    try:
        table = read_table(path)
    except DataError as error:
        assert "t.csv" in str(error)
    else:
        assert all(set(row) == set(table.columns) for row in table.rows)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")), min_size=2, max_size=2)
    )
)
def test_any_cells_survive(tmp_path, rows):
    file = io.StringIO()
    csv.writer(file, quoting=csv.QUOTE_ALL).writerows([["one", "two"], *rows])
    path = tmp_path / "t.csv"
    path.write_text(file.getvalue(), encoding="utf-8", newline="")
    expected = [[cell.strip() for cell in row] for row in rows if any(cell.strip() for cell in row)]
    assert [[row["one"], row["two"]] for row in read_table(path).rows] == expected


def test_folds():
    assert parse_folds("1-3/4/5,7") == {1: "train", 2: "train", 3: "train", 4: "val", 5: "test", 7: "test"}
    for bad in (
        "1-8",
        "1-8/9",
        "1-8//10",
        "1-8/8/9",
        "8-1/9/10",
        "a/b/c",
        "1/2/3/4",
        "1-/2/3",
        "1,1/2/3",
        "",
        "-1/2/3",
    ):
        with pytest.raises(UsageError, match="folds="):
            parse_folds(bad)


@given(st.text(st.sampled_from("0123456789-/, ")))
def test_any_folds(text):
    try:
        folds = parse_folds(text)
    except UsageError:
        return
    assert set(folds.values()) == {"train", "val", "test"}


def test_cells(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("id,age\n15709.0,x\n12.5,nan\n007,?\n")
    table = read_table(path)
    assert [identifier(table, i, "id") for i in range(3)] == ["15709", "12.5", "007"]
    with pytest.raises(DataError, match=r"t.csv:2: age='x' is no number"):
        number(table, 0, "age")
    assert np.isnan(number(table, 1, "age")) and np.isnan(number(table, 2, "age"))
    assert age(44.0) == 44 and np.isnan(age(-1.0)) and np.isnan(age(300.0)) and np.isnan(age(float("nan")))


def test_no_label_is_unknown():
    assert multi_hot(["b"], ["a", "b"]).tolist() == [0, 1]
    assert multi_hot([], ["a", "b"]).tolist() == [-1, -1]


def test_a_stream_says_what_the_table_says(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text('\ufeffid,age,note\n1.0,50,"a, b"\n\n 2 ,nan,"line\nbreak"\nx,,\n', encoding="utf-8")
    digest = hashlib.sha256()
    rows = list(stream_table(path, ("age", "id"), digest))
    table = read_table(path)
    assert [row.cells for row in rows] == [{"age": cells["age"], "id": cells["id"]} for cells in table.rows]
    assert [row.line for row in rows] == list(table.lines) == [2, 5, 6]
    assert [row.where for row in rows] == [table.where(i) for i in range(3)]
    assert [row.identifier("id") for row in rows] == ["1", "2", "x"]
    assert rows[0].number("age") == 50 and math.isnan(rows[1].number("age")) and math.isnan(rows[2].number("age"))
    assert digest.hexdigest() == table.digest() == hashlib.sha256(path.read_bytes()).hexdigest()
    assert table_columns(path) == table.columns == ("id", "age", "note")
    with pytest.raises(DataError, match=r"t\.csv:6: id='x' is no number"):
        rows[2].number("id")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"id,id\n", "'id' is there twice"),
        (b'"i\nd",id\n', r"column name 'i\\nd' holds a line break"),
        (b"idd,age\n1,2\n", r"no column 'id' \(did you mean 'idd'\?\)"),
        (b"id,age\n1,2\n3\n", "t.csv:3: 1 cells under 2"),
        (b'id,age\n1,"2\n', r"t.csv:\d: not a CSV file"),
        (b"id,age\n1,\xff\n", "not UTF-8"),
        (b"id;age\n1;2\n", "separated by commas"),
        (b"id,age\n1," + b"9" * 200_000 + b"\n", "t.csv:2: not a CSV file"),
    ],
)
def test_a_stream_is_as_strict_as_a_table(tmp_path, content, message):
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(DataError, match=message) as raised:
        list(stream_table(tmp_path / "t.csv", ("id",)))
    assert "\n" not in str(raised.value)


def test_a_stream_that_is_not_there(tmp_path):
    for path, message in ((tmp_path / "none.csv", "there is no"), (tmp_path, "directory"), (Path("a\0b"), "null")):
        for read in (read_table, table_columns, lambda path: list(stream_table(path, ("id",)))):
            with pytest.raises(DataError, match=message):
                read(path)


def test_a_stream_takes_no_memory_for_the_rows_behind(tmp_path):
    with open(tmp_path / "t.csv", "w") as file:
        file.write("id,text\n")
        for i in range(20_000):
            file.write(f"{i},{'x' * 500}\n")
    tracemalloc.start()
    total = sum(int(row["id"]) for row in stream_table(tmp_path / "t.csv", ("id",)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total == 20_000 * 19_999 // 2 and peak < 2_000_000


@settings(max_examples=100, deadline=None)
@given(content=st.binary(max_size=80) | st.text('ab,"\n\r; 1', max_size=60).map(str.encode))
def test_stream_and_table_agree(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "agree.csv"
    path.write_bytes(content)
    try:
        table = read_table(path)
    except DataError as error:
        with pytest.raises(DataError) as raised:
            list(stream_table(path, ()))
        assert str(raised.value) == str(error)
    else:
        rows = list(stream_table(path, table.columns))
        assert [row.cells for row in rows] == list(table.rows) and [row.line for row in rows] == list(table.lines)
