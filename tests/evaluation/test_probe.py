"""`probe_run` with a stand-in encoder: order of selection and test, domains, rows, differences, files, cache.

The stand-in reads one number per lead, so that what can be known about a label is known; the real encoders
are probed in `test_probe_real.py`.
"""

import json
from dataclasses import dataclass, replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ecg_jax.errors import DataError, DivergedError, UsageError
from ecg_jax.evaluation import compare, evalog, features, metrics, probe, report, sources
from ecg_jax.scaling import table as scaling_table
from ecg_jax.shards import catalog
from ecg_jax.shards.tables import Table

NAMES = ("AF", "MI", "never")
SUMMARY = {
    "run": "R4-s0",
    "architecture": "resnet1d",
    "paradigm": "SL",
    "n_params": 144,
    "n_records": 512,
    "n_patients": 400,
    "examples_seen": 5000,
    "seed": 3,
    "lr": 1e-3,
    "status": "unconverged",
    "step": 70,
    "task": "code",  # what follows belongs to the ID rows and must not leak into those of a probe
    "floor": 0.01,
    "prior": 0.3,
    "labels": ["AF"],
    "lineage": [{"dataset": "code15"}],
}
FAST = {"probes": ("adam",), "baselines": False, "bootstrap": 20}


@dataclass(frozen=True)
class Stub:
    """A front whose features are the mean absolute value of each lead, weighted by
    `params["encoder"]`.
    """

    on_beats = False

    def init(self, key):
        only_two = jnp.diag(jnp.arange(12) >= 10).astype(jnp.float32)  # sees the leads that tell nothing
        return only_two * jax.random.uniform(key, (12,), minval=0.5, maxval=2)

    def features(self, params, batch):
        x = jnp.abs(batch["signal"].astype(jnp.float32)).mean(1) * 1e-3
        return jnp.concatenate([x @ params["encoder"], jnp.ones((len(x), 1))], axis=1)


def table(n, seed, unit="mV"):
    rng = np.random.default_rng(seed)
    level = rng.uniform(0.5, 1.5, (n, 12))
    logits = np.stack([6 * (level[:, 0] - 1.2), 6 * (level[:, 1] - 1), np.full(n, -50.0)], axis=1)
    bayes = metrics.probability(logits)
    labels = (rng.random((n, 3)) < bayes).astype(np.int8)
    labels[rng.random((n, 3)) < 0.05] = -1
    signal = (level[:, None, :] * 1000 * np.where(np.arange(1000) % 2, 1, -1)[None, :, None]).astype(np.int16)
    patients = rng.integers(0, n * 2 // 3, n).astype(np.uint64) * np.uint64(0xD1342543DE82EF95)
    return Table(
        signal=signal,
        labels=labels,
        label_names=NAMES,
        valid=np.tile(np.array([[0, 1000]], np.int32), (n, 1)),
        lane=np.zeros(n, np.int32),
        record_hash=rng.integers(0, 2**64, n, dtype=np.uint64),
        group_hash=patients,
        record_ids=[f"{seed}-{i}" for i in range(n)],
        age=np.full(n, 50, np.float32),
        sex=np.zeros(n, np.float32),
        bayes=bayes.astype(np.float32),
        unit=unit,
        leads=tuple(f"L{i}" for i in range(12)),
        capacity=n,
    )


@pytest.fixture(scope="module")
def tables():
    return {"train": table(500, 0), "val": table(200, 1), "test": table(400, 2)}


@pytest.fixture
def run_dir(tmp_path, monkeypatch):
    info = {"scale": "gain", "crop": 1000, "labels": ["af", "LBBB"], "lineage": [{"dataset": "code15"}]}
    params = {"encoder": jnp.eye(12)}
    encoder = features.Encoder("stub", params, info, features.digest_of("stub", params, info))
    card = {"name": "ptbxl", "lineage": [{"dataset": "ptbxl", "contains": []}]}
    monkeypatch.setattr(features, "load", lambda run_dir: encoder)
    monkeypatch.setattr(features, "front_of", lambda encoder: Stub())
    monkeypatch.setattr(catalog, "open_folder", lambda path: SimpleNamespace(card=card))
    folder = tmp_path / "R4-s0"
    folder.mkdir()
    (folder / "summary.json").write_text(json.dumps(SUMMARY))
    return SimpleNamespace(path=folder, encoder=encoder, card=card)


def test_a_probe_from_tables_to_rows(run_dir, tables):
    got = probe.probe_run(run_dir.path, "ptbxl", "main", tables=tables, bootstrap=200)
    rows = evalog.read(run_dir.path)
    trained = [r for r in rows if r["run"] == "R4-s0" and r["probe"] == "logistic"]
    alone = {f"R4-s0:{name}" for name in sources.BASELINES}
    assert {r["run"] for r in rows} == {"R4-s0", "R4-s0:untrained"} | alone
    read = scaling_table.read([run_dir.path])
    assert not any(r["run"] in alone for r in read.rows) and any("baseline" in reason for reason in read.left_out)
    assert {r["probe"] for r in rows} == {"logistic", "logistic@64", "logistic@7.3s", "adam"}

    # Domains by name, macros within each, single-class labels in the loss only.
    of = {(r["label"], r["domain"], r["metric"]): r for r in trained}
    metrics_of = {label: {m for name, _, m in of if name == label} for label in NAMES}
    assert metrics_of == {
        "AF": set("bce auroc ap f1".split()),
        "MI": set("bce auroc ap f1".split()),
        "never": {"bce"},
    }
    assert {d for name, d, _ in of if name == "AF"} == {"ood_seen"}
    assert of["macro", "ood_unseen", "auroc"]["n_labels"] == 1 and of["macro", "ood_unseen", "bce"]["n_labels"] == 1
    for metric in ("auroc", "bce"):  # "never" is too rare for a macro
        assert of["macro", "ood_unseen", metric]["value"] == of["MI", "ood_unseen", metric]["value"]
    assert "no positive" in got["left_out"]["never"]

    # The run's own columns, and intervals around every value.
    row = of["AF", "ood_seen", "bce"]
    assert row["n_params"] == 144 and row["status"] == "unconverged" and row["step"] == 70 and row["seed"] == 3
    assert row["n_examples"] == (tables["test"].labels[:, 0] >= 0).sum() and row["probe"] == "logistic"
    assert row["lineage"] == "code15" and row["dataset"] == "ptbxl" and row["split"] == "test"
    assert all(r["ci_low"] <= r["value"] <= r["ci_high"] for r in rows)

    # Floor and prior are losses of the same records; the probe lies between them.
    assert row["floor"] < row["value"] < row["prior"]
    assert of["AF", "ood_seen", "auroc"]["floor"] is None and row["task"] == "main"
    saved = compare.load_predictions(run_dir.path / "probes" / got["results"][0]["predictions"])
    assert metrics.bce(saved["logits"], saved["labels"])[0] == pytest.approx(row["value"])

    # What training added, paired; the untrained encoder is a run of its own that saw nothing.
    assert [entry["against"] for entry in got["difference"][:2]] == ["untrained", "untrained"]
    assert {entry["against"] for entry in got["difference"]} == {
        "untrained",
        "trained in 64-d",
        "trained on 7.3 s",
        *sources.BASELINES,
    }
    gain = got["difference"][0]["metrics"]
    assert gain["bce"]["macro"]["ci_high"] < 0 and gain["auroc"]["macro"]["ci_low"] > 0
    assert gain["auroc"]["macro ood_seen"]["n_labels"] == 1
    base = next(r for r in rows if r["run"] == "R4-s0:untrained")
    assert (base["paradigm"], base["n_records"], base["lr"], base["status"]) == ("untrained", 0, None, "done")
    assert json.loads((run_dir.path / "probes" / "ptbxl-main.json").read_text())["difference"] == got["difference"]
    text = "\n".join(report.result_lines(got))
    assert "trained minus untrained" in text and "note: never" in text and "macro ood_seen" in text

    # The baselines: nothing but prevalence is the prior, and no baseline beats the trained encoder.
    macro = {(e["model"], e["probe"]): e["macro"]["ood_seen"] for e in got["results"]}
    alone = macro["prevalence", "logistic"]
    assert alone["metrics"]["bce"]["value"] == pytest.approx(alone["prior"], rel=1e-3)
    assert alone["metrics"]["auroc"]["value"] == 0.5
    for name in sources.BASELINES:
        assert (
            macro[name, "logistic"]["metrics"]["auroc"]["value"]
            < macro["trained", "logistic"]["metrics"]["auroc"]["value"]
        )
    both = [macro["trained", kind]["metrics"]["bce"]["value"] for kind in ("logistic", "adam")]
    assert both[0] == pytest.approx(both[1], rel=0.1)
    calibrated = got["results"][0]["labels"]["AF"]["calibration"]
    assert calibrated["slope"] == pytest.approx(1, abs=0.4) and 0 < calibrated["ece"] < 0.15


def test_the_test_split_is_read_after_every_choice(run_dir, tables, monkeypatch):
    opened = []

    def load(folders, split, task):
        opened.append(split)
        return tables[split]

    fit = probe.linear.fit
    monkeypatch.setattr("ecg_jax.shards.tables.load", load)
    monkeypatch.setattr(probe.linear, "fit", lambda *a, **k: opened.append("fit") or fit(*a, **k))
    probe.probe_run(run_dir.path, ["ptbxl"], "main", **(FAST | {"seeds": (0, 1), "baselines": True}))
    assert opened == ["train", "val", "fit", "fit", "fit", "fit", "test"]


def test_another_choice_after_the_test_was_opened_is_refused_and_a_reopening_recorded(run_dir, tables):
    def go(**options):
        return probe.probe_run(run_dir.path, "d", "main", **(FAST | {"tables": tables} | options))

    go()
    log = run_dir.path / "probes" / "openings.jsonl"
    first = log.read_text().splitlines()
    assert len(first) == 1 and "trained on ptbxl main by adam, seed 0" in first[0]
    go(bootstrap=30)  # the same choice
    assert log.read_text().splitlines() == first
    with pytest.raises(UsageError, match=r"opened before with other epochs_max; .*--reopen"):
        go(epochs_max=7)
    assert log.read_text().splitlines() == first
    go(epochs_max=7, reopen=True)
    last = [json.loads(line) for line in log.read_text().splitlines()]
    assert [entry["reopened"] for entry in last] == [False, True]
    go(seeds=(5,))  # another seed is another row, no second look
    log.write_text("{")
    with pytest.raises(DataError, match="not a record of openings"):
        go()


def test_features_of_another_tool_go_through_the_same_probe(run_dir, tables, tmp_path):
    ids = [name for table in tables.values() for name in table.record_ids]
    level = np.concatenate([np.abs(table.signal.astype(np.float32)).mean(1) / 1000 for table in tables.values()])
    order = np.random.default_rng(0).permutation(len(ids))
    kept = {"record_id": np.array(ids)[order], "features": level[order]}
    np.savez(tmp_path / "ecgfm.npz", **kept)
    options = {"features_file": tmp_path / "ecgfm.npz", "out": tmp_path / "out", "tables": tables, "bootstrap": 20}
    got = probe.probe_run(None, "d", "main", **options)
    own = probe.probe_run(run_dir.path, "d", "main", tables=tables, bootstrap=20)
    theirs, ours = (e["results"][0]["labels"]["AF"]["metrics"]["auroc"]["value"] for e in (got, own))
    assert theirs == pytest.approx(ours, abs=0.01) and got["run"] == "ecgfm" and got["lineage"] is None
    assert got["evals"] is None and "no rows in the eval log" in report.result_lines(got)[-1]
    about = {
        "architecture": "vit",
        "paradigm": "SSL",
        "n_params": 90_900_000,
        "n_records": 1_500_000,
        "lineage": ["ptbxl"],
    }
    np.savez(tmp_path / "ecgfm.npz", **kept, **about)
    probe.probe_run(None, "d", "main", reopen=True, **options)
    rows = evalog.read(tmp_path / "out")
    made = {(r["run"], r["domain"], r["n_params"]) for r in rows if r["paradigm"] != "baseline"}
    assert made == {("ecgfm", "contaminated", 90_900_000)} and len({r["run"] for r in rows}) == 1 + len(
        sources.BASELINES
    )
    np.savez(tmp_path / "ecgfm.npz", record_id=kept["record_id"][1:], features=kept["features"][1:])
    with pytest.raises(DataError, match=r"ecgfm.npz: no features of 1 of"):
        probe.probe_run(None, "d", "main", **(options | {"out": tmp_path / "more"}))
    for bad in ({"record_id": kept["record_id"]}, kept | {"features": kept["features"] * np.nan}):
        np.savez(tmp_path / "ecgfm.npz", **bad)
        with pytest.raises(DataError, match=r"ecgfm\.npz"):
            probe.probe_run(None, "d", "main", **options)


def test_a_crop_leaves_the_middle_and_its_peaks(tables):
    one = replace(tables["val"], valid=np.tile(np.array([[100, 800]], np.int32), (200, 1)))
    peaks = np.full((200, 50), -1, np.int16)
    peaks[:, :4] = 120, 400, 600, 880
    cut = features.cropped(replace(one, rpeaks=peaks), 500)
    assert cut.valid[0].tolist() == [250, 500] and cut.rpeaks[0, :3].tolist() == [400, 600, -1]
    assert not cut.signal[:, :250].any() and not cut.signal[:, 750:].any()
    np.testing.assert_array_equal(cut.signal[:, 250:750], one.signal[:, 250:750])


def test_a_table_of_encoders_marks_the_best_and_those_not_told_from_it(run_dir, tables, tmp_path):
    probe.probe_run(run_dir.path, "d", "main", tables=tables, bootstrap=50)
    got = report.table([run_dir.path], tmp_path / "t", metric="auroc", resamples=100)
    text = (tmp_path / "t" / "table-auroc.md").read_text()
    best = [line for line in text.splitlines() if "**" in line]
    assert len(best) == 1 and best[0].startswith("| R4-s0") and "| age and sex | 0.500 [" in text
    tied = [line for line in text.splitlines() if " = " in line]
    assert all(line.startswith("| R4-s0") for line in tied)  # projection and crop may be as good, the baselines not
    assert "R4-s0: untrained" in got["rows"] and (tmp_path / "t" / "table-auroc.csv").read_text().count("\n") == 9
    preset = report.table([run_dir.path], tmp_path / "p", metric="bce", preset="ptbxl", resamples=20)
    assert preset["missing"] == ["superclass", "subclass", "form", "rhythm", "diagnostic"]
    with pytest.raises(DataError, match="no logistic probe"):
        report.table([tmp_path], tmp_path / "n")


def test_a_set_of_the_lineage_is_contaminated(run_dir, tables):
    run_dir.card["lineage"][0]["contains"] = ["code15"]
    probe.probe_run(run_dir.path, "d", "main", tables=tables, **FAST)
    rows = evalog.read(run_dir.path)
    assert {r["domain"] for r in rows} == {"contaminated"} and {r["run"] for r in rows} == {"R4-s0"}


def test_repeating_a_probe_gives_the_same_log_and_uses_the_cache(run_dir, tables, monkeypatch):
    one = probe.probe_run(run_dir.path, "d", "main", tables=tables, bootstrap=20)
    log = (run_dir.path / evalog.NAME).read_bytes()
    monkeypatch.setattr(features, "_compute", lambda *a: pytest.fail("computed again"))
    assert probe.probe_run(run_dir.path, "d", "main", tables=tables, bootstrap=20) == one
    assert (run_dir.path / evalog.NAME).read_bytes() == log


def test_fractions_are_nested_patients_and_rows_of_their_own(run_dir, tables):
    groups = tables["train"].group_hash
    small, large = probe.thin(groups, 0.1, 0), probe.thin(groups, 0.5, 0)
    assert small.sum() < large.sum() and not (small & ~large).any()
    assert not np.isin(groups[~large], groups[large]).any()
    assert abs(large.mean() - 0.5) < 0.1 and (probe.thin(groups, 0.5, 1) != large).any()
    options = FAST | {"fractions": (1.0, 0.2), "seeds": (0, 1), "probes": ("logistic", "adam")}
    probe.probe_run(run_dir.path, "d", "main", tables=tables, **options)
    rows = evalog.read(run_dir.path)
    cells = {(r["probe"], r["label_fraction"], r["probe_seed"]) for r in rows}
    convex = {("logistic", 1.0, 0), ("logistic", 0.2, 0), ("logistic", 0.2, 1)}  # one solution with all labels
    assert cells == convex | {("adam", share, seed) for share in (1.0, 0.2) for seed in (0, 1)}
    loss = {
        c: next(
            r["value"]
            for r in rows
            if (r["probe"], r["label_fraction"], r["probe_seed"], r["label"], r["metric"]) == (*c, "AF", "bce")
        )
        for c in convex
    }
    assert loss["logistic", 1.0, 0] < min(loss["logistic", 0.2, 0], loss["logistic", 0.2, 1])
    assert (run_dir.path / "probes" / "ptbxl-main-f0.2.json").exists()


def test_out_keeps_the_run_folder_untouched(run_dir, tables, tmp_path):
    probe.probe_run(run_dir.path, "d", "main", tables=tables, out=tmp_path / "elsewhere", **FAST)
    assert [p.name for p in run_dir.path.iterdir()] == ["summary.json"]
    assert len(evalog.read(tmp_path / "elsewhere")) > 0


def test_features_do_not_depend_on_the_batch_and_a_torn_cache_is_replaced(run_dir, tables, tmp_path):
    val = tables["val"]
    whole = features.extract(run_dir.encoder, val, "val", batch=256)
    parts = features.extract(run_dir.encoder, val, "val", batch=7, cache=tmp_path / "cache")
    np.testing.assert_allclose(whole, parts, rtol=1e-6)
    (path,) = (tmp_path / "cache").iterdir()
    encoder, data, split = path.stem.split("-")
    assert run_dir.encoder.digest.startswith(encoder) and features.data_hash(val).startswith(data) and split == "val"
    path.write_bytes(path.read_bytes()[:100])
    np.testing.assert_allclose(features.extract(run_dir.encoder, val, "val", cache=path.parent), whole, rtol=1e-6)
    assert features.data_hash(val) != features.data_hash(replace(val, unit="z"))
    one = features.untrained(run_dir.encoder, 0)
    assert one.digest == features.untrained(run_dir.encoder, 0).digest
    assert len({one.digest, features.untrained(run_dir.encoder, 1).digest, run_dir.encoder.digest}) == 3


def test_what_cannot_be_probed_is_refused_in_words(run_dir, tables):
    def go(**options):
        return probe.probe_run(run_dir.path, "d", "main", **(FAST | {"tables": tables, "reopen": True} | options))

    z = {name: replace(t, unit="z") for name, t in tables.items()}
    assert go(tables=z)["run"] == "R4-s0"  # a relative scale does not mind
    run_dir.encoder.info["scale"] = "mv"
    for unit in ("z", "mixed"):
        with pytest.raises(DataError, match=f"unit '{unit}'"):
            go(tables=tables | {"train": replace(tables["train"], unit=unit)})
    run_dir.encoder.info["scale"] = "gain"
    blank = replace(tables["val"], labels=np.full_like(tables["val"].labels, -1))
    with pytest.raises(DataError, match="val split of task 'main': no record with a known label"):
        go(tables=tables | {"val": blank})
    with pytest.raises(DataError, match="other labels"):
        go(tables=tables | {"test": replace(tables["test"], label_names=("a", "b", "c"))})
    for bad, says in (
        ({"fractions": (0.0,)}, "label fractions"),
        ({"probes": ("svm",)}, "known are"),
        ({"crop_seconds": 1}, "crop"),
    ):
        with pytest.raises(UsageError, match=says):
            go(**bad)
    with pytest.raises(DataError, match="take more"):
        go(fractions=(1e-9,))
    (run_dir.path / "summary.json").unlink()
    with pytest.raises(DataError, match=r"summary\.json"):
        go()


def test_an_encoder_that_diverged_is_named_as_such(run_dir, tables):
    broken = replace(run_dir.encoder, params={"encoder": jnp.eye(12) * jnp.nan})
    with pytest.raises(DivergedError, match="not finite"):
        features.extract(broken, tables["val"], "val")
