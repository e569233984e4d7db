"""Labels tables: what is read and what is refused."""

import csv
import io

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ecg_jax.datasets.table import age, identifier, multi_hot, number, parse_folds, read_table
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
