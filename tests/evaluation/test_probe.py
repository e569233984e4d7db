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
from ecg_jax.evaluation import compare, evalog, features, metrics, probe
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
    encoder = features.Encoder("stub", params, info, features._digest("stub", params, info))
    card = {"name": "ptbxl", "lineage": [{"dataset": "ptbxl", "contains": []}]}
    monkeypatch.setattr(features, "load", lambda run_dir: encoder)
    monkeypatch.setattr(features, "_front", lambda encoder: Stub())
    monkeypatch.setattr(catalog, "open_folder", lambda path: SimpleNamespace(card=card))
    folder = tmp_path / "R4-s0"
    folder.mkdir()
    (folder / "summary.json").write_text(json.dumps(SUMMARY))
    return SimpleNamespace(path=folder, encoder=encoder, card=card)


def test_a_probe_from_tables_to_rows(run_dir, tables):
    got = probe.probe_run(run_dir.path, "ptbxl", "main", tables=tables, bootstrap=200)
    rows = evalog.read(run_dir.path)
    trained = [r for r in rows if r["run"] == "R4-s0"]
    assert {r["run"] for r in rows} == {"R4-s0", "R4-s0:untrained"}

    # Domains by name, macros within each, single-class labels in the loss only.
    of = {(r["label"], r["domain"], r["metric"]): r for r in trained}
    metrics_of = {label: {m for name, _, m in of if name == label} for label in NAMES}
    assert metrics_of == {
        "AF": set("bce auroc ap f1".split()),
        "MI": set("bce auroc ap f1".split()),
        "never": {"bce"},
    }
    assert {d for name, d, _ in of if name == "AF"} == {"ood_seen"}
    assert of["macro", "ood_unseen", "auroc"]["n_labels"] == 1 and of["macro", "ood_unseen", "bce"]["n_labels"] == 2
    assert of["macro", "ood_unseen", "auroc"]["value"] == of["MI", "ood_unseen", "auroc"]["value"]
    mean = np.mean([of[name, "ood_unseen", "bce"]["value"] for name in ("MI", "never")])
    assert of["macro", "ood_unseen", "bce"]["value"] == pytest.approx(mean)
    assert "no positive" in got["left_out"]["never"]

    # The run's own columns, and intervals around every value.
    row = of["AF", "ood_seen", "bce"]
    assert row["n_params"] == 144 and row["status"] == "unconverged" and row["step"] == 70 and row["seed"] == 3
    assert row["n_examples"] == (tables["test"].labels[:, 0] >= 0).sum() and row["probe"] == "adam"
    assert row["lineage"] == "code15" and row["dataset"] == "ptbxl" and row["split"] == "test"
    assert all(r["ci_low"] <= r["value"] <= r["ci_high"] for r in rows)

    # Floor and prior are losses of the same records; the probe lies between them.
    assert row["floor"] < row["value"] < row["prior"]
    assert of["AF", "ood_seen", "auroc"]["floor"] is None and row["task"] == "main"
    saved = compare.load_predictions(run_dir.path / "probes" / got["results"][0]["predictions"])
    assert metrics.bce(saved["logits"], saved["labels"])[0] == pytest.approx(row["value"])

    # What training added, paired; the untrained encoder is a run of its own that saw nothing.
    gain = got["difference"][0]["metrics"]
    assert gain["bce"]["macro"]["ci_high"] < 0 and gain["auroc"]["macro"]["ci_low"] > 0
    assert gain["auroc"]["macro ood_seen"]["n_labels"] == 1
    base = next(r for r in rows if r["run"] == "R4-s0:untrained")
    assert (base["paradigm"], base["n_records"], base["lr"], base["status"]) == ("untrained", 0, None, "done")
    assert json.loads((run_dir.path / "probes" / "ptbxl-main.json").read_text())["difference"] == got["difference"]
    text = "\n".join(probe.result_lines(got))
    assert "trained minus untrained" in text and "left out: never" in text and "macro ood_seen" in text


def test_the_test_split_is_read_after_every_choice(run_dir, tables, monkeypatch):
    opened = []

    def load(folders, split, task):
        opened.append(split)
        return tables[split]

    fit = probe.linear.fit
    monkeypatch.setattr("ecg_jax.shards.tables.load", load)
    monkeypatch.setattr(probe.linear, "fit", lambda *a, **k: opened.append("fit") or fit(*a, **k))
    probe.probe_run(run_dir.path, ["ptbxl"], "main", seeds=(0, 1), bootstrap=20)
    assert opened == ["train", "val", "fit", "fit", "fit", "fit", "test"]


def test_a_set_of_the_lineage_is_contaminated(run_dir, tables):
    run_dir.card["lineage"][0]["contains"] = ["code15"]
    probe.probe_run(run_dir.path, "d", "main", tables=tables, bootstrap=20, untrained_baseline=False)
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
    for fraction in (1.0, 0.2):
        probe.probe_run(run_dir.path, "d", "main", tables=tables, bootstrap=20, label_fraction=fraction)
    rows = evalog.read(run_dir.path)
    assert {r["label_fraction"] for r in rows} == {1.0, 0.2}
    assert (run_dir.path / "probes" / "ptbxl-main-f0.2.json").exists()


def test_out_keeps_the_run_folder_untouched(run_dir, tables, tmp_path):
    probe.probe_run(run_dir.path, "d", "main", tables=tables, bootstrap=20, out=tmp_path / "elsewhere")
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
        return probe.probe_run(run_dir.path, "d", "main", **({"tables": tables, "bootstrap": 20} | options))

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
    with pytest.raises(UsageError, match="label_fraction"):
        go(label_fraction=0)
    with pytest.raises(DataError, match="take more"):
        go(label_fraction=1e-9)
    (run_dir.path / "summary.json").unlink()
    with pytest.raises(DataError, match=r"summary\.json"):
        go()


def test_an_encoder_that_diverged_is_named_as_such(run_dir, tables):
    broken = replace(run_dir.encoder, params={"encoder": jnp.eye(12) * jnp.nan})
    with pytest.raises(DivergedError, match="not finite"):
        features.extract(broken, tables["val"], "val")
