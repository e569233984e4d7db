"""From shards to codebook, codes and encoders by the commands, on simulated ECG; and what is refused on the way."""

import json
import shutil

import numpy as np
import pytest

from ecg_jax import cli
from ecg_jax.codebook import load
from ecg_jax.evaluation import evalog
from ecg_jax.records.windows import NO_CODE
from ecg_jax.shards import tables
from ecg_jax.shards.codes import expected_name

BOOK = [
    "codebook.codes=16",
    "codebook.code_dim=8",
    "codebook.width=16",
    "codebook.encoder_layers=1",
    "codebook.decoder_layers=1",
    "codebook.heads=1",
    "codebook.head_size=16",
    "codebook.mlp=16",
    "codebook.sample=16",
    "recipe.kind=steps",
    "recipe.steps=12",
    "recipe.eval_every=6",
    "train.batch=16",
    "train.log_every=4",
    "optim.lr=3e-3",
]
RUN = """
[data]
folders = ["DATA"]
[model]
crop = 480
slots = 96
[objective]
name = "masked_codes"
codebook = "BOOK"
masking = "beat"
baseline_steps = 20
[optim]
lr = 1e-2
warmup_steps = 2
[recipe]
kind = "steps"
steps = 12
eval_every = 6
[train]
batch = 16
log_every = 4
"""


def run(*words):
    return cli.main([str(word) for word in words])


def refusal(capsys) -> str:
    """What a command said on stderr, but for the remark which loader was chosen."""
    return "".join(line for line in capsys.readouterr().err.splitlines(True) if not line.startswith("loader "))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A data folder with codes of a codebook trained on it, and a configuration."""
    out = tmp_path_factory.mktemp("ssl")
    options = [f"--option={pair}" for pair in ("records=440", "val=120", "test=120")]
    assert run("convert", "synthetic", "--out", out / "data", "--workers", 1, *options) == 0
    assert run("codebook", "--data", out / "data", "--out", out / "book", *BOOK) == 0
    assert run("tokenize", "--data", out / "data", "--codebook", out / "book") == 0
    text = RUN.replace("DATA", str(out / "data")).replace("BOOK", str(out / "book"))
    (out / "run.toml").write_text(text)
    return out


def _codes(out):
    (folder,) = (out / "data").glob("*/*/codes-*")
    return folder


def test_the_codebook_is_a_run_and_a_codebook(made):
    book = load(made / "book")
    summary = json.loads((made / "book" / "summary.json").read_text())
    assert summary["codebook"] == book.id and summary["paradigm"] == "codebook" and summary["status"] == "done"
    assert (book.info["scale"], book.info["beats"], book.info["source"]) == ("gain", "robust", "trained")
    assert 1 < summary["codes"]["used"] <= 16 and 1 <= summary["codes"]["perplexity"] <= 16
    np.testing.assert_allclose(np.linalg.norm(book.params["codebook"], axis=1), 1, atol=1e-5)
    lines = [json.loads(line) for line in (made / "book" / "metrics.jsonl").read_text().splitlines()]
    logged = [line for line in lines if "train/loss" in line]
    assert {"train/reconstruction", "train/commitment", "train/perplexity", "train/dead"} <= set(logged[0])
    evaluated = [line["val/loss"] for line in lines if "val/loss" in line]
    assert evaluated[-1] < evaluated[0]
    assert [entry["dataset"] for entry in book.info["lineage"]] == ["synthetic"]


def test_codes_lie_beside_the_shards_and_are_drawn(made, tmp_path, capsys):
    codes = _codes(made)
    assert codes.name == expected_name(load(made / "book").id, "robust")
    table = tables.load([made / "data"], "train", "", codes=[codes.name])
    n = (table.rpeaks >= 0).sum(1).clip(max=21)
    assert ((table.codes != NO_CODE).sum(1) == 12 * n).all() and table.codes[table.codes != NO_CODE].max() < 16
    assert run("inspect", codes, "--plot", tmp_path / "codes.png") == 0
    assert (tmp_path / "codes.png").stat().st_size > 10_000
    assert "codes used" in capsys.readouterr().out


@pytest.mark.parametrize(("rung", "world"), [("Rd1", "signal"), ("Td1", "signal"), ("Rd1", "beats"), ("Td1", "beats")])
def test_both_architectures_learn_masked_codes_in_both_worlds(made, tmp_path, rung, world):
    words = (f"model.rung={rung}", f"model.input={world}")
    assert run("train", made / "run.toml", "--run", tmp_path / "run", *words) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["paradigm"], summary["input"], summary["status"]) == ("SSL", world, "done")
    assert summary["codebook"] == load(made / "book").id and summary["choices"]["masking"] == "beat"
    assert summary["n_params"] < summary["n_params_total"]
    baselines = summary["test"]["baselines"]
    assert {"unigram", "position", "copy", "linear"} <= set(baselines)
    assert summary["losses"]["test"] < 1.05 * summary["prior"]
    rows = evalog.read(tmp_path / "run")
    assert {(row["label"], row["metric"]) for row in rows} >= {("macro", "ce"), ("limb", "ce"), ("chest", "accuracy")}
    best = [row for row in rows if (row["label"], row["metric"], row["selection"]) == ("macro", "ce", "best-val")]
    assert [row["paradigm"] for row in best] == ["SSL"] and best[0]["ci_low"] <= best[0]["value"] <= best[0]["ci_high"]
    assert run("probe", "--run", tmp_path / "run", "--data", made / "data", "--task", "code", "--bootstrap", 50) == 0
    probed = evalog.read(tmp_path / "run")
    assert any(row["probe"] == "adam" and row["domain"] == "contaminated" for row in probed)


def test_a_killed_run_goes_on_with_the_same_codes_only(made, tmp_path, capsys):
    """Another codebook has other codes: refused by the data folder, before anything is trained."""
    other = tmp_path / "other"
    assert run("codebook", "--data", made / "data", "--out", other, *BOOK, "train.seed=1") == 0
    capsys.readouterr()
    code = run("train", made / "run.toml", "--run", tmp_path / "run", f"objective.codebook={other}", "model.rung=Rd1")
    err = refusal(capsys)
    assert code == 3 and err.count("\n") == 1 and "ecg-jax tokenize" in err
    shutil.rmtree(other)
    code = run("train", made / "run.toml", "--run", tmp_path / "run", f"objective.codebook={other}", "model.rung=Rd1")
    assert code == 3 and "is no codebook" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("model.beats=heartlang",), "of 'robust' beats"),
        (("objective.padding=true", "model.input=signal"), "model.input=beats"),
        (("objective.codebook=",), "objective.codebook is empty"),
        (("model.slots=50",), "multiple of 12"),
    ],
)
def test_usage_errors_of_masked_codes(made, tmp_path, capsys, words, says):
    code = run("train", made / "run.toml", "--run", tmp_path / "run", "model.rung=Rd1", *words)
    err = refusal(capsys)
    assert (code, err.count("\n")) == (2, 1) and says in err
    assert not (tmp_path / "run").exists()
