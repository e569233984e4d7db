"""The loop on the tiny data set: what a run leaves, when results are read, what is compiled, what is refused."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest
import tiny_run

from ecg_jax import objectives
from ecg_jax.errors import DivergedError, UsageError
from ecg_jax.evaluation import evalog
from ecg_jax.models import ladder
from ecg_jax.training import export, loop, metrics, runtime, step


@pytest.fixture
def toy(monkeypatch):
    """The toy objective in place of the supervised one."""
    monkeypatch.setattr(loop.objectives, "make", lambda config, n, _: tiny_run.Toy(config.model.crop, n))


def _lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_leaves_what_the_design_names(toy, tables, tmp_path):
    """All files, the counts in the summary, and a second start that trains nothing."""
    summary = loop.train(tiny_run.config(), tmp_path / "run", tables=tables, quiet=True)
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names >= {
        "config.json",
        "metrics.jsonl",
        "timing.jsonl",
        "evals.jsonl",
        "summary.json",
        "encoder.safetensors",
        "encoder.json",
    }
    assert "checkpoints" not in names, "a run of less than a minute writes none"
    assert summary == json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["status"], summary["updates"], summary["n_records"]) == ("done", 24, 160)
    assert summary["examples_seen"] == summary["step"] * 16
    assert summary["flops"] == 2 * summary["flops_one_per_multiply_add"] > 0
    assert summary["losses"]["test"] < 0.98 * summary["prior"] and summary["floor"] < summary["losses"]["test"]
    assert sum(summary["seconds"].values()) - summary["seconds"]["wall"] == pytest.approx(
        summary["seconds"]["wall"], abs=0.01
    )

    lines = _lines(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines if "val/loss" in line] == [0, 8, 16, 24]
    assert [line["step"] for line in lines if "train/loss" in line] == [4, 8, 12, 16, 20, 24]
    assert min(line["val/loss"] for line in lines if "val/loss" in line) == summary["losses"]["val"]
    assert all(0 <= line["input_wait_frac"] <= 1 for line in _lines(tmp_path / "run" / "timing.jsonl"))

    rows = evalog.read(tmp_path / "run")
    macro = [row for row in rows if row["label"] == "macro" and row["metric"] == "bce"]
    assert {row["domain"] for row in rows} == {"id"} and {row["task"] for row in rows} == {"pretrain"}
    assert macro[0]["value"] == summary["losses"]["test"] and macro[0]["ci_low"] < macro[0]["value"]
    assert {row["label"] for row in rows} == {*tiny_run.LABELS, "macro"}

    again = loop.train(tiny_run.config("train.log_every=2"), tmp_path / "run", tables=None, quiet=True)
    assert again == summary, "a finished run needs no data and is not run again"


def test_exported_encoder_is_the_selected_one(toy, tables, tmp_path):
    loop.train(tiny_run.config(), tmp_path / "run", tables=tables, quiet=True)
    arch, params, info = export.load_encoder(tmp_path / "run")
    assert arch == ladder.get("Td1") and info["labels"] == list(tiny_run.LABELS)
    assert (info["scale"], info["crop"], info["rate"], info["unit"]) == ("gain", 200, 100, "mV")
    with np.load(tmp_path / "run" / "predictions.npz") as predictions:
        head_free = tiny_run.Toy()
        power = head_free.logits(
            {"encoder": params, "head": {"kernel": np.eye(8, 3, dtype=np.float32), "bias": np.zeros(3)}},
            {"signal": tables["test"].signal},
        )
        assert predictions["logits"].shape == (96, 3)
        # The logits are a linear function of what the exported encoder gives: it is the encoder that was tested.
        full = np.column_stack([np.asarray(_power(params, tables["test"].signal)), np.ones(96)])
        assert power.shape == (96, 3)
        residual = predictions["logits"] - full @ np.linalg.lstsq(full, predictions["logits"], rcond=None)[0]
        assert np.abs(residual).max() < 1e-4


def _power(params, signal):
    x = signal.astype(np.float32) * 1e-3
    return np.square(x @ params["stem_kernel"] + params["stem_bias"]).mean(1)


def test_results_are_read_one_dispatch_late_and_nowhere_else(toy, tables, tmp_path, monkeypatch):
    """Every read of the loop comes after the next dispatch, except where a phase ends; their number is known."""
    events = []
    build, read = step.build, metrics.read

    def spied(*args):
        programs = build(*args)

        def sent(*inputs):
            events.append("step")
            return programs.step(*inputs)

        return programs._replace(step=sent)

    monkeypatch.setattr(loop.step, "build", spied)
    monkeypatch.setattr(metrics, "read", lambda values: events.append("read") or read(values))
    monkeypatch.setattr(loop.finish, "done", lambda run, state: {})
    with jax.transfer_guard_host_to_device("disallow"):
        loop.train(tiny_run.config(), tmp_path / "run", tables=tables, quiet=True)
    assert events.count("step") == 24
    assert events.count("read") == 24 + 4, "one a dispatch, one an evaluation (at 0, 8, 16, 24)"
    # Unread: the evaluation at 0 and dispatch 1; from then on at each dispatch what was sent before it.
    assert events[:6] == ["step", "read", "step", "read", "step", "read"]
    assert events[-4:] == ["step", "read", "read", "read"], "the last ones: nothing follows them"


def test_one_compilation_for_rates_seeds_and_subsets(toy, tables, tmp_path):
    """After the first run no program is compiled for another rate, decay, seed, horizon or number of records."""
    runtime.compiles.listen()
    loop.train(tiny_run.config(), tmp_path / "first", tables=tables, quiet=True)
    before = runtime.compiles.programs
    assert before > 0
    smaller = tables | {"train": tiny_run.table(96, 7, capacity=40)}
    for number, (override, given) in enumerate(
        [
            ("optim.lr=0.003", tables),
            ("optim.weight_decay=0.2", tables),
            ("train.seed=5", tables),
            ("recipe.steps=16", tables),
            ("optim.warmup_steps=1", smaller),
        ]
    ):
        loop.train(tiny_run.config(override), tmp_path / f"run{number}", tables=given, quiet=True)
    assert runtime.compiles.programs == before


def test_several_steps_per_dispatch_change_no_number(toy, tables, tmp_path):
    """On CPU a dispatch of four steps is four steps: the same bytes."""
    for k in (1, 4):
        config = tiny_run.config(f"train.steps_per_dispatch={k}", "recipe.decay_fraction=0.5")
        loop.train(config, tmp_path / f"run{k}", tables=tables, quiet=True)
    assert (tmp_path / "run1/metrics.jsonl").read_bytes() == (tmp_path / "run4/metrics.jsonl").read_bytes()


def test_plateau_goes_back_to_the_best_state(toy, tables, tmp_path):
    """After the trunk the parameters are those of its best evaluation, and the decay sees the batches from there on."""
    overrides = (
        *("recipe.kind=plateau", "recipe.steps=0", "recipe.max_epochs=60", "recipe.eval_every=5"),
        *("recipe.patience=2", "recipe.min_epochs=1", "optim.lr=0.3", "train.log_every=1"),
    )
    summary = loop.train(tiny_run.config(*overrides), tmp_path / "run", tables=tables, quiet=True)
    lines = _lines(tmp_path / "run" / "metrics.jsonl")
    trunk = {line["step"]: line for line in lines if "val/loss" in line and line["phase"] == "trunk"}
    decay = [line for line in lines if line["phase"] == "decay" and "train/loss" in line]
    best = min(trunk, key=lambda at: trunk[at]["val/loss"])
    assert summary["status"] == "done" and max(trunk) == best + 10, "stopped by patience"
    assert decay[0]["step"] == best + 1 and decay[0]["update"] == max(trunk) + 2
    assert summary["updates"] > summary["step"]
    # The first step after going back starts from the best state and takes the batch that came next there.
    first = {line["step"]: line for line in lines if "train/loss" in line and line["phase"] == "trunk"}
    assert decay[0]["train/loss"] == first[best + 1]["train/loss"]


def test_another_run_in_the_folder_is_refused(toy, tables, tmp_path):
    """Naming each key with both values; other data under the same names; a folder that is no run folder."""
    loop.train(tiny_run.config(), tmp_path / "run", tables=tables, quiet=True)
    with pytest.raises(UsageError) as caught:
        loop.train(tiny_run.config("optim.lr=0.5", "train.seed=3"), tmp_path / "run", tables=tables)
    for words in ("optim.lr is 0.05, not 0.5", "train.seed is 0, not 3"):
        assert words in str(caught.value)
    (tmp_path / "run" / "summary.json").unlink()
    with pytest.raises(UsageError, match="have changed"):
        loop.train(tiny_run.config(), tmp_path / "run", tables=tables | {"train": tiny_run.table(160, 9)}, quiet=True)
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    (fresh / "config.json").write_text((tmp_path / "run" / "config.json").read_text())
    loop.train(tiny_run.config("optim.lr=0.5"), fresh, tables=tables, quiet=True)  # nothing was trained there yet
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").touch()
    with pytest.raises(UsageError, match=r"no run folder.*notes\.txt"):
        loop.train(tiny_run.config(), tmp_path / "other", tables=tables)


def test_two_processes_do_not_share_a_run_folder(tables, tmp_path):
    code = "import fcntl,sys;f=open(sys.argv[1],'w');fcntl.flock(f,2);print(1,flush=True);input()"
    command = [sys.executable, "-c", code, str(tmp_path / ".lock")]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    holder.stdout.readline()
    try:
        with pytest.raises(UsageError, match="another process"):
            loop.train(tiny_run.config(), tmp_path, tables=tables, quiet=True)
    finally:
        holder.communicate(b"\n")


def test_divergence_ends_the_run_and_is_recorded(toy, tables, tmp_path):
    config = tiny_run.config("optim.lr=1e30", "recipe.steps=60", "optim.clip=0")
    with pytest.raises(DivergedError, match=r"20 steps in a row.*optim\.lr"):
        loop.train(config, tmp_path / "run", tables=tables, quiet=True)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "diverged" and 20 <= summary["updates"] < 30
    (row,) = evalog.read(tmp_path / "run")
    assert row["status"] == "diverged" and row["value"] is None
    skipped = [line["train/skipped"] for line in _lines(tmp_path / "run" / "metrics.jsonl") if "train/skipped" in line]
    assert skipped[-1] == 1.0
    with pytest.raises(DivergedError, match="diverged"):
        loop.train(config, tmp_path / "run", tables=tables, quiet=True)


def test_the_objective_gets_what_the_configuration_says():
    """A switch of the model that never reaches the objective would look like a setting and be none."""

    def front(*overrides):
        return objectives.make(objectives.resolve(tiny_run.config(*overrides)), 3, None).front

    assert front().random_crop and not front("model.random_crop=false").random_crop
    assert front("model.scale=zscore").scale == "zscore" and front("model.dropout=0.25").arch.dropout == 0.25
    assert front("train.precision=bfloat16").dtype == "bfloat16"
    on_beats = front("model.input=beats", "model.slots=96")
    assert (on_beats.arch.input, on_beats.number, on_beats.arch.patch) == ("beats", 96, 96)
    assert front("model.rung=R1", "model.input=auto").arch.input == "signal"
    assert front("model.rung=T1", "model.input=auto").arch.input == "beats"
    assert front("model.rung=R1", "model.norm=batch", "model.input=beats").arch.norm == "batch"
