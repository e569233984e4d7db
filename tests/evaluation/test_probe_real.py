"""The probe on real encoders: what `training.export` wrote and `objectives.supervised` computes, on simulated
ECG.
"""

import json

import jax
import numpy as np
import pytest

from ecg_jax.datasets import open_source
from ecg_jax.evaluation import evalog, features, probe, report
from ecg_jax.models import ladder
from ecg_jax.objectives import supervised
from ecg_jax.shards import tables
from ecg_jax.shards.convert import convert
from ecg_jax.training import export


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    out = tmp_path_factory.mktemp("data")
    options = {"population": "2", "records": "240", "val": "60", "test": "80", "prevalence": "balanced"}
    convert(open_source("synthetic", None, options), out, workers=1)
    return out / "synthetic_ood"


@pytest.fixture(scope="module", params=["Rd1", "Rd1 batch", "Td1"])
def run_dir(request, tmp_path_factory):
    """A run folder with an encoder that nobody trained: what matters here is that it is read as it was
    written.
    """
    rung, _, norm = request.param.partition(" ")
    folder = tmp_path_factory.mktemp(rung)
    arch = ladder.get(rung, norm=norm or "group")
    objective = supervised.make(arch, 6, scale="gain", crop=500, dtype="float32")
    params = jax.device_get(objective.init(jax.random.key(1), {"prior": np.full(6, 0.1, np.float32)})["encoder"])
    params |= {name: value + np.float32(0.25) for name, value in params.items() if name.endswith("_running_mean")}
    info = {"scale": "gain", "crop": 500, "labels": ["AF"], "lineage": [{"dataset": "synthetic"}]}
    export.save_encoder(folder, arch, params, info)
    summary = {
        "run": "r",
        "architecture": arch.family,
        "paradigm": "SL",
        "n_params": ladder.count(arch),
        "seed": 1,
    }
    (folder / "summary.json").write_text(json.dumps(summary | {"n_records": 512, "status": "done"}))
    return folder


def test_features_are_those_of_the_objective_with_the_log_gain_last(run_dir, data):
    encoder = features.load(run_dir)
    table = tables.load([data], "val", "ood")
    got = features.extract(encoder, table, "val")
    assert got.shape == (len(table), encoder.config.features + 1) and got.dtype == np.float32
    objective = supervised.make(encoder.config, 6, scale="gain", crop=500, dtype="float32")
    batch = {"signal": table.signal[:5], "valid": table.valid[:5]}
    want = jax.jit(objective.features)(encoder.params, batch)
    np.testing.assert_allclose(want, got[:5], rtol=1e-4, atol=1e-5)
    louder = tables.load([data], "val", "ood")
    louder.signal[:] = np.clip(louder.signal.astype(np.int32) * 2, -32767, 32767)
    change = features.extract(encoder, louder, "val") - got
    assert np.median(np.abs(change[:, -1] - np.log(2))) < 1e-3  # the gain goes into the last feature and nowhere else
    assert np.median(np.abs(change[:, :-1])) < 1e-3


def test_running_statistics_of_batch_norm_come_with_the_encoder(run_dir):
    encoder = features.load(run_dir)
    means = [value for name, value in encoder.params["encoder"].items() if name.endswith("_running_mean")]
    assert bool(means) == (getattr(encoder.config, "norm", None) == "batch")
    assert all((value == 0.25).all() for value in means)


def test_the_untrained_encoder_differs_only_in_its_parameters(run_dir):
    encoder = features.load(run_dir)
    fresh = features.untrained(encoder, seed=5)
    assert jax.tree.structure(fresh.params) == jax.tree.structure(encoder.params)
    assert jax.tree.map(np.shape, fresh.params) == jax.tree.map(np.shape, encoder.params)
    assert fresh.digest != encoder.digest and fresh.config == encoder.config


def test_probe_of_a_run_folder_on_a_data_folder(run_dir, data):
    got = probe.probe_run(run_dir, data, "ood", bootstrap=100, epochs_max=60)
    rows = evalog.read(run_dir)
    assert got["dataset"] == "synthetic_ood" and {r["domain"] for r in rows} == {"ood_seen", "ood_unseen"}
    seen = {r["label"].casefold() for r in rows if r["domain"] == "ood_seen"}
    assert seen == {"af", "macro"}
    losses = [r for r in rows if r["metric"] == "bce"]
    assert all(0 < r["floor"] for r in losses) and all(r["prior"] is not None for r in losses)
    assert got["difference"] and (run_dir / "probes" / "synthetic_ood-ood.json").exists()
    assert report.result_lines(got)
