"""Features of raw recordings are those of stored ones; what the encoder cannot take is refused."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import ecg_jax
from ecg_jax.datasets import open_source
from ecg_jax.errors import DataError, UsageError
from ecg_jax.evaluation import embed, features
from ecg_jax.models import ladder
from ecg_jax.objectives import front
from ecg_jax.records.leads import LEADS
from ecg_jax.shards.convert import convert
from ecg_jax.training import export


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    arch = ladder.get("Rd1", norm="batch")
    params = jax.device_get(front.make(arch, scale="mv", crop=1000).init(jax.random.key(1)))
    info = {"scale": "mv", "crop": 1000, "rate": 100, "unit": "mV", "labels": [], "lineage": [{"dataset": "ptbxl"}]}
    export.save_encoder(folder, arch, params, info)
    return folder


def ecg(seconds=10, rate=500, seed=0):
    """Noise in the band of an ECG with a beat each second, [T, 12] mV, obeying the limb leads' equations."""
    rng = np.random.default_rng(seed)
    t = np.arange(int(seconds * rate)) / rate
    beat = np.exp(-(((t + 0.5) % 1 - 0.5) ** 2) / 2e-4)
    x = np.zeros((len(t), 12))
    for lead in (0, 1, *range(6, 12)):
        x[:, lead] = (0.5 + rng.random()) * beat + 0.05 * np.sin(2 * np.pi * (3 + 5 * rng.random()) * t)
    one, two = x[:, 0], x[:, 1]
    x[:, 2:6] = np.stack([two - one, -(one + two) / 2, one - two / 2, two - one / 2], axis=1)
    return x


def test_leads_unit_order_and_rate_do_not_matter_but_are_asked_for(run_dir):
    encoder = ecg_jax.load(run_dir)
    x = ecg()
    want = encoder.embed(x, 500)
    assert want.shape == (encoder.encoder.config.features + 1,) and want.dtype == np.float32
    order = np.random.default_rng(3).permutation(12)
    named = [LEADS[i].upper() for i in order]
    np.testing.assert_allclose(encoder.embed(x[:, order] * 1000, 500, named, unit="uV"), want, atol=1e-5)
    eight = [0, 1, *range(6, 12)]
    np.testing.assert_allclose(encoder.embed(x[:, eight], 500, [LEADS[i] for i in eight]), want, atol=1e-3)
    both = encoder.embed(np.stack([x, ecg(seed=1)]), 500)
    np.testing.assert_allclose(both[0], want, atol=1e-5)
    assert np.abs(both[1] - both[0]).max() > 1e-3
    slow = encoder.embed(ecg(rate=250), 250)
    assert np.corrcoef(slow, want)[0, 1] > 0.99 > np.corrcoef(encoder.embed(ecg(rate=250), 500), want)[0, 1] - 1


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"unit": "z"}, "reads millivolt"),
        ({"unit": "furlong"}, "unit 'furlong'"),
        ({"leads": LEADS[:11]}, "with 11 leads"),
        ({"leads": ["MLII", *LEADS[1:11], "V9"]}, "missing-lead"),
        ({"rate": 50}, "bad-rate"),
        ({"rate": 5000}, "too-short"),
    ],
)
def test_what_the_encoder_cannot_take_is_refused_by_name(run_dir, options, says):
    with pytest.raises(DataError, match=says):
        ecg_jax.load(run_dir).embed(ecg(), **({"rate": 500} | options))


def test_files_are_read_and_a_data_folder_gives_what_the_probe_sees(run_dir, tmp_path):
    np.save(tmp_path / "a.npy", ecg().astype(np.float32))
    got = embed.embed_source(run_dir, [tmp_path / "a.npy"], tmp_path / "f.npz", rate=500, unit="mV", leads=LEADS)
    assert got["records"] == 1
    with np.load(tmp_path / "f.npz") as file:
        np.testing.assert_allclose(file["features"][0], ecg_jax.load(run_dir).embed(ecg(), 500), atol=1e-3)
        assert file["record_id"].tolist() == ["a"] and file["lineage"].tolist() == ["ptbxl"]
    with pytest.raises(UsageError, match="neither rate nor unit"):
        embed.embed_source(run_dir, [tmp_path / "a.npy"], tmp_path / "f.npz")
    with pytest.raises(DataError, match="no such file"):
        embed.embed_source(run_dir, [tmp_path / "b.npy"], tmp_path / "f.npz")
    with pytest.raises(DataError, match="neither a data folder"):
        (tmp_path / "empty").mkdir()
        embed.embed_source(run_dir, [tmp_path / "empty"], tmp_path / "f.npz")


def test_the_example_reads_the_same_encoder_without_the_training_code(run_dir):
    path = Path(__file__).resolve().parents[2] / "tools" / "read_encoder.py"
    spec = importlib.util.spec_from_file_location("read_encoder", path)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    rng = np.random.default_rng(0)
    signal, valid = (
        rng.normal(0, 300, (3, 1000, 12)).astype(np.int16),
        np.array([[0, 1000], [100, 730], [0, 999]], np.int32),
    )
    whole = example.read(run_dir)
    got = jax.jit(lambda signal, valid: example.features(*whole, signal, valid))(signal, valid)
    encoder = features.load(run_dir)
    want = jax.jit(features.front_of(encoder).features)(encoder.params, {"signal": signal, "valid": valid})
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_loading_is_lazy():
    light = "import sys, ecg_jax; ecg_jax.load; assert not {'jax', 'numpy', 'tensorflow'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", light], check=False).returncode == 0


def test_a_stored_record_and_its_raw_signal_have_the_same_features(run_dir, tmp_path):
    (tmp_path / "raw").mkdir()
    raw = {f"r{i}": ecg(seconds=8 + i, seed=i).astype(np.float32) for i in range(3)}
    for name, signal in raw.items():
        np.save(tmp_path / "raw" / f"{name}.npy", signal)
    options = {"rate": "500", "unit": "mV", "labels": "none"}
    convert(open_source("npy", tmp_path / "raw", options), tmp_path / "data", workers=1)
    got = embed.embed_source(run_dir, [tmp_path / "data"], tmp_path / "f.npz")
    assert got["records"] == 3
    encoder = ecg_jax.load(run_dir)
    with np.load(tmp_path / "f.npz") as file:
        for name, stored in zip(file["record_id"].tolist(), file["features"], strict=True):
            np.testing.assert_allclose(encoder.embed(raw[Path(name).stem], 500), stored, atol=1e-5)
        assert set(file["split"].tolist()) <= {"train", "val", "test"}
