"""Training from converted data folders: both loaders, subsets, exclusion, and what is said of missing things."""

import json

import numpy as np
import pytest
import tiny_run

from ecg_jax.datasets import open_source
from ecg_jax.errors import DataError, UsageError
from ecg_jax.shards.catalog import group_hex, open_folder
from ecg_jax.shards.convert import convert
from ecg_jax.training import folder as folder_lib
from ecg_jax.training import loop


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A simulated population: some 300 training records, 60 to select on, 60 to test on."""
    options = {"records": "420", "val": "60", "test": "60", "prevalence": "balanced"}
    source = open_source("synthetic", None, options)
    return convert(source, tmp_path_factory.mktemp("data"))["path"]


@pytest.fixture
def toy(monkeypatch):
    """The toy objective in place of the supervised one, for six labels."""
    monkeypatch.setattr(tiny_run, "LABELS", ("a",) * 6)
    monkeypatch.setattr(loop.objectives, "make", lambda config, n, _: tiny_run.Toy(config.model.crop, n))


def _config(folder, *overrides):
    return tiny_run.config(f'data.folders=["{folder}"]', "data.task=code", *overrides)


def test_both_loaders_learn_and_stream_resumes(toy, folder, tmp_path, capsys):
    """`auto` says what it took; the stream goes on in its own order after a stop, to the same bytes."""
    resident = loop.train(_config(folder), tmp_path / "resident", quiet=False)
    assert resident["loader"] == "resident" and "loader resident" in capsys.readouterr().err
    assert json.loads((tmp_path / "resident" / "config.json").read_text())["train"]["loader"] == "resident"
    assert [entry["dataset"] for entry in resident["lineage"]] == ["synthetic"]
    assert resident["floor"] < resident["losses"]["test"] < 1.05 * resident["prior"]

    config = _config(folder, "train.loader=stream", "checkpoint.every_steps=10")
    whole = loop.train(config, tmp_path / "whole", quiet=True)
    assert (whole["n_records"], whole["n_patients"]) == (resident["n_records"], resident["n_patients"])
    assert whole["loader"] == "stream" and whole["losses"]["train_last"] != resident["losses"]["train_last"]
    cut = tmp_path / "cut"
    for name in ("config.json", "data.json", "metrics.jsonl"):  # as if killed after the last checkpoint, at 20
        cut.mkdir(exist_ok=True)
        (cut / name).write_bytes((tmp_path / "whole" / name).read_bytes())
    (tmp_path / "whole" / "checkpoints").rename(cut / "checkpoints")
    resumed = loop.train(config, cut, quiet=True)
    assert resumed["resumes"] == 1 and resumed["losses"] == whole["losses"]
    assert (cut / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()


def test_subset_and_exclusion_reach_the_training_records(toy, folder, tmp_path):
    index = open_folder(folder).index("train")
    half = loop.train(_config(folder, "data.subset=0.5"), tmp_path / "half", quiet=True)
    assert 0.3 < half["n_records"] / len(index) < 0.7
    excluded = np.unique(index["group"])[:5]
    (tmp_path / "exclude.txt").write_text("\n".join(group_hex(group) for group in excluded))
    less = loop.train(_config(folder, f"data.exclude={tmp_path / 'exclude.txt'}"), tmp_path / "less", quiet=True)
    assert less["n_records"] == len(index) - np.isin(index["group"], excluded).sum()


@pytest.mark.parametrize(
    ("overrides", "error", "words"),
    [
        (("data.folders=[]",), UsageError, "data.folders is empty"),
        (('data.folders=["/nowhere/x"]',), DataError, "/nowhere/x"),
        (("data.task=cod",), DataError, "did you mean 'code'"),
        (('data.labels=["AFF"]',), DataError, "'AFF'"),
        (("data.test_split=tset",), DataError, "'tset'"),
        (("data.subset_records=1",), DataError, "take a larger"),
        (("model.rung=R99",), UsageError, "R99"),
        (("train.devices=3",), UsageError, "train.devices = 3"),
    ],
)
def test_what_is_missing_is_named_and_nothing_is_left(toy, folder, tmp_path, overrides, error, words):
    with pytest.raises(error) as caught:
        loop.train(_config(folder, *overrides), tmp_path / "run", quiet=True)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_millivolt_is_refused_where_there_is_none(toy, tables, tmp_path):
    import dataclasses

    unitless = {name: dataclasses.replace(table, unit="z") for name, table in tables.items()}
    with pytest.raises(UsageError, match=r"model\.scale = 'mv'.*'z'"):
        loop.train(tiny_run.config("model.scale=mv"), tmp_path / "run", tables=unitless, quiet=True)


def test_going_on_with_another_number_of_streams_is_refused(tmp_path):
    """Each process has an order of its own."""
    facts = {"train": {"records": 299}}
    folder_lib.check_data(tmp_path, facts | {"stream processes": 2})
    (tmp_path / folder_lib.METRICS).write_text("begun")
    folder_lib.check_data(tmp_path, facts | {"stream processes": 2})
    for now, found in ((None, facts), (4, facts | {"stream processes": 4})):
        with pytest.raises(UsageError, match=f"stream processes was 2, now {now}; restore"):
            folder_lib.check_data(tmp_path, found)
