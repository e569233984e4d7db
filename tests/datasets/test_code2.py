"""CODE-II: a manifest says what the files are, and nothing is taken for granted."""

import pickle
import re
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ecg_jax.datasets import code2, open_source
from ecg_jax.errors import DataError, EcgJaxError, UsageError
from ecg_jax.records.record import Record, Refused

MANIFEST = """
format = "hdf5"
labels = "exams.csv"
id = "exam_id"
patient = "patient_id"
binary = ["AF", "ST"]
split = "partition"
split_values = ["training=train", "validation=val"]
dataset = "tracings"
ids = "exam_id"
rate = 500
unit = "mV"
scale = 4
"""
LEADS = ["I", "II", "V1", "V2", "V3", "V4", "V5", "V6"]
ROWS = ["exam_id,patient_id,AF,ST,partition", "11,1,0,1,training", "12,2,1,,validation", "13,3,0,0,training"]


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "manifest.toml").write_text(MANIFEST + f"leads = {LEADS}\nlayout = 'samples-first'\n")
    (tmp_path / "exams.csv").write_text("\n".join(ROWS) + "\n")
    with h5py.File(tmp_path / "exams.hdf5", "w") as file:
        file["exam_id"] = np.array([13, 11, 12])
        file["tracings"] = np.random.default_rng(0).normal(0, 1, (3, 3500, 8)).astype("f4")
    return tmp_path


def test_the_manifest_says_it_all(folder):
    source = pickle.loads(pickle.dumps(open_source("code2", folder, {})))
    assert (source.name, source.version, source.tasks) == ("code2", "1.0.0", {"labels": ("AF", "ST")})
    assert [(item.record_id, item.group, item.split) for item in source.items] == [
        ("11", "1", "train"), ("12", "2", "val"), ("13", "3", "train")
    ]  # fmt: skip
    with h5py.File(folder / "exams.hdf5") as file:
        stored = file["tracings"][:]
    for record, row in zip(source.read(source.items), (1, 2, 0), strict=True):
        np.testing.assert_allclose(record.signal[:, [0, 1, *range(6, 12)]], stored[row] / 4, rtol=1e-6)
        np.testing.assert_allclose(record.signal[:, 2], (stored[row][:, 1] - stored[row][:, 0]) / 4, atol=1e-6)
        assert record.rate == 500 and record.quality
    assert next(source.read(source.items[1:2])).labels["labels"].tolist() == [1, -1]
    assert source.about["splits"] == {"train": 2, "val": 1} and "NC-SA" in source.about["licence"]


def test_another_manifest_is_another_conversion(folder):
    one = open_source("code2", folder, {})
    text = (folder / "manifest.toml").read_text()
    (folder / "other.toml").write_text(text.replace("scale = 4", "scale = 2"))
    other = open_source("code2", folder, {"manifest": "other.toml"})
    assert one.about != other.about
    a, b = next(one.read(one.items)), next(other.read(other.items))
    np.testing.assert_allclose(a.signal * 2, b.signal, rtol=1e-6)


def test_a_manifest_in_csv(folder):
    rows = [
        "key,value", "format,hdf5", "labels,exams.csv", "id,exam_id", '"binary","AF,ST"', "ignore,partition",
        "rate,500", "dataset,tracings", "ids,exam_id", "unit,mV", f'leads,"{",".join(LEADS)}"', "name,code2_small",
    ]  # fmt: skip
    (folder / "manifest.csv").write_text("\n".join(rows) + "\n")
    source = open_source("code2", folder, {"manifest": "manifest.csv"})
    assert source.name == "code2_small" and [item.split for item in source.items] == [None] * 3
    assert isinstance(next(source.read(source.items)), Record)


def test_the_example_in_the_help_is_a_manifest(folder):
    example = code2.__doc__.split("Example of a manifest:")[1].split("Invariant")[0]
    (folder / "manifest.toml").write_text("\n".join(line.strip() for line in example.splitlines()))
    rows = ["exam_id,patient_id,hospital,AF,ST,partition", "11,1,x,0,1,train", "12,2,x,1,,valid"]
    (folder / "exams.csv").write_text("\n".join(rows) + "\n")
    with pytest.raises(DataError, match="set = 'open' has 12000 train, 3000 val; found are 1 train, 1 val"):
        open_source("code2", folder, {})


@pytest.mark.parametrize("which", ["open", "test"])
def test_the_published_counts(tmp_path, which):
    count = 15_000 if which == "open" else 8_475
    np.save(tmp_path / "x.npy", np.zeros((count, 12, 20), np.float32))
    parts = ["train" if i % 5 else "val" for i in range(count)]
    split = "split" if which == "open" else "part"
    (tmp_path / "labels.csv").write_text(
        f"record,{split},row\n" + "".join(f"{i},{parts[i]},{i}\n" for i in range(count))
    )
    lines = ['format = "npy"', "rate = 400", 'unit = "mV"', 'path = "x.npy"', 'row = "row"', f'set = "{which}"']
    (tmp_path / "manifest.toml").write_text("\n".join([*lines, "" if which == "open" else 'ignore = "part"']))
    source = open_source("code2", tmp_path, {})
    assert source.about["splits"] == ({"train": 12_000, "val": 3_000} if which == "open" else {"test": 8_475})
    (tmp_path / "labels.csv").write_text(f"record,{split},row\n0,train,0\n")
    with pytest.raises(DataError, match=f"set = '{which}' has"):
        open_source("code2", tmp_path, {})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (("format = ", "formt = "), DataError, "format is not said; known are hdf5, wfdb"),
        (('"hdf5"', '"hdf"'), DataError, "did you mean 'hdf5'"),
        (("rate = 500", "rte = 500"), UsageError, "unknown option 'rte'"),
        (("rate = 500", "rate = 'fast'"), UsageError, "rate='fast'"),
        (("rate = 500", "rate = 1979-05-27"), DataError, "'rate' must be a text, a number"),
        (("rate = 500", "rate = {a = 1}"), DataError, "'rate' must be a text"),
        (("rate = 500", "rate ="), DataError, "manifest.toml is not TOML"),
        (("scale = 4", "scale = 0"), DataError, "scale = '0' must be a positive number"),
        (("validation=val", "validation=dev"), DataError, "split_values: 'validation=dev'"),
        (("validation=val", "valid=val"), DataError, "exams.csv:3: partition='validation' is not in split_values"),
        (('split = "partition"', ""), DataError, "split_values without split"),
        (('split = "partition"', 'split = "prt"'), UsageError, "ignore= names column 'prt'"),
        (('"ST"]', '"SB"]'), UsageError, "'SB'"),
        (("scale = 4", 'set = "all"'), DataError, "set = 'all'; known are open, test"),
    ],
)
def test_mistakes_in_the_manifest(folder, change, error, message):
    text = (folder / "manifest.toml").read_text()
    assert change[0] in text
    (folder / "manifest.toml").write_text(text.replace(*change, 1))
    with pytest.raises(error, match=re.escape(message)) as raised:
        open_source("code2", folder, {})
    assert "\n" not in str(raised.value)


def test_no_manifest(tmp_path):
    with pytest.raises(DataError, match=r"there is no .*manifest\.toml; CODE-II needs a manifest"):
        open_source("code2", tmp_path, {})
    with pytest.raises(UsageError, match="unknown option 'format'"):
        open_source("code2", tmp_path, {"format": "hdf5"})


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lines=st.permutations(MANIFEST.strip().splitlines()),
    keep=st.integers(0, 12),
    more=st.one_of(st.binary(max_size=30), st.text(st.sampled_from("abc=\"'[]{}1.\n"), max_size=30)),
    name=st.sampled_from(["manifest.toml", "manifest.csv"]),
)
def test_any_manifest(folder, lines, keep, more, name):
    more = more if isinstance(more, bytes) else more.encode()
    (folder / name).write_bytes("\n".join(lines[:keep]).encode() + b"\n" + more)
    try:
        source = open_source("code2", folder, {"manifest": name})
    except EcgJaxError as error:
        assert error.exit_code in (2, 3)
    else:
        assert all(isinstance(result, Record | Refused) for result in source.read(source.items))
