"""The eval log: strict rows, one row per key, atomic files, and errors that name file and line."""

import csv
import json

import pytest

from ecg_jax.errors import DataError
from ecg_jax.evaluation import evalog

BASE = {
    "run": "R4-s0",
    "architecture": "resnet1d",
    "paradigm": "SL",
    "n_params": 1000,
    "n_records": 512,
    "dataset": "ptbxl",
    "task": "superclass",
    "metric": "bce",
    "value": 0.3,
}


def test_a_row_holds_every_field_in_order_with_the_stated_defaults():
    got = evalog.row(**BASE)
    assert list(got) == list(evalog.FIELDS)
    assert got["schema_version"] == 1 and got["label"] == "macro" and got["split"] == "test"
    assert got["label_fraction"] == 1.0 and got["status"] == "done" and got["ci_low"] is None
    assert got["domain"] == "id" and got["input"] == "signal" and got["selection"] == "best-val"
    assert isinstance(evalog.row(**BASE | {"n_params": 1e3})["n_params"], int)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"n_parms": 3}, "did you mean 'n_params'"),
        ({"run": None}, "missing: run"),
        ({"value": float("nan")}, "missing: value"),
        ({"value": float("inf")}, "not a finite number"),
        ({"n_params": 10.5}, "not a whole number"),
        ({"n_params": True}, "not a finite number"),
        ({"run": 7}, "not text"),
        ({"domain": "elsewhere"}, "not one of"),
        ({"ci_low": 0.31}, "outside its interval"),
        ({"schema_version": 2}, "reads up to 1"),
    ],
)
def test_a_bad_row_is_refused_in_words(change, words):
    with pytest.raises(DataError, match=words):
        evalog.row(**BASE | change)


def test_a_diverged_run_may_have_no_value():
    assert evalog.row(**BASE | {"value": float("nan"), "status": "diverged"})["value"] is None


def test_append_replaces_by_key_and_keeps_the_rest(tmp_path):
    path = tmp_path / "run" / evalog.NAME
    evalog.append(path, [evalog.row(**BASE), evalog.row(**BASE | {"label": "MI", "value": 0.2})])
    evalog.append(path, [evalog.row(**BASE | {"value": 0.25, "n_params": 5})])
    rows = evalog.read(path)
    assert [(r["label"], r["value"]) for r in rows] == [("macro", 0.25), ("MI", 0.2)]
    assert [p.name for p in path.parent.iterdir()] == [evalog.NAME]


def test_every_part_of_the_key_tells_rows_apart_and_nothing_else_does(tmp_path):
    path = tmp_path / evalog.NAME
    parts = {"run": "x", "dataset": "y", "task": "z", "label": "MI", "split": "val", "metric": "auroc"}
    parts |= {"probe": "adam", "label_fraction": 0.1, "probe_seed": 1, "step": 10, "domain": "ood_seen"}
    parts |= {"selection": "last"}
    assert set(parts) == set(evalog.STORE_KEY)
    for name, value in parts.items():
        evalog.append(path, [BASE | {name: value}])
    evalog.append(path, [BASE, BASE | {"seed": 3, "lr": 0.1, "value": 0.7}])
    assert len(evalog.read(path)) == len(parts) + 1
    assert evalog.read(path)[-1]["value"] == 0.7


def test_a_refused_row_leaves_the_log_as_it_was(tmp_path):
    path = tmp_path / evalog.NAME
    evalog.append(path, [BASE])
    before = path.read_bytes()
    with pytest.raises(DataError):
        evalog.append(path, [BASE | {"label": "MI"}, BASE | {"valeu": 1}])
    assert path.read_bytes() == before


def test_reads_csv_of_others_with_renamed_and_unknown_columns(tmp_path):
    path = tmp_path / "theirs.csv"
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*(n for n in BASE if n not in ("value", "n_params")), "N", "loss", "note", "lr"])
        writer.writerow([*(v for n, v in BASE.items() if n not in ("value", "n_params")), "1e3", "0.5", "hm", ""])
    (got,) = evalog.read([path], columns={"n_params": "N", "value": "loss"})
    assert got["n_params"] == 1000 and got["value"] == 0.5 and got["lr"] is None and got["n_records"] == 512
    with pytest.raises(DataError, match=r"theirs\.csv:2: no column 'Loss' \(did you mean 'loss'"):
        evalog.read([path], columns={"n_params": "N", "value": "Loss"})


def test_folders_are_searched_and_duplicates_count_once(tmp_path):
    for name in ("a", "b"):
        evalog.append(tmp_path / name / evalog.NAME, [BASE | {"run": name}])
    assert len(evalog.read(tmp_path)) == 2
    assert len(evalog.read([tmp_path, tmp_path / "a"])) == 2
    with pytest.raises(DataError, match="no evals"):
        (tmp_path / "empty").mkdir()
        evalog.read(tmp_path / "empty")
    with pytest.raises(DataError, match="no such file"):
        evalog.read(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "log.jsonl:2: not JSON"),
        ("[1]", "log.jsonl:2: a row is"),
        ('{"run": "x"}', "log.jsonl:2: required fields"),
    ],
)
def test_a_bad_line_is_named(tmp_path, text, words):
    path = tmp_path / "log.jsonl"
    path.write_text(json.dumps(BASE) + "\n" + text + "\n")
    with pytest.raises(DataError, match=words):
        evalog.read(path)


def test_a_ragged_csv_line_is_named(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text(",".join(BASE) + "\n" + ",".join(map(str, BASE.values())) + "\nx,y\n")
    with pytest.raises(DataError, match=r"log\.csv:3: not as many cells"):
        evalog.read(path)
