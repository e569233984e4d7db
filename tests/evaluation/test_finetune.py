"""Fine-tuning: it starts at the probe, moves deep layers most, and never ends worse on validation."""

import jax
import numpy as np
import pytest

from ecg_jax.datasets import open_source
from ecg_jax.evaluation import features, finetune, linear, logistic, metrics
from ecg_jax.models import ladder
from ecg_jax.objectives import front
from ecg_jax.shards import tables
from ecg_jax.shards.convert import convert


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    out = tmp_path_factory.mktemp("data")
    options = {"population": "2", "records": "120", "val": "60", "test": "8", "prevalence": "balanced"}
    convert(open_source("synthetic", None, options), out, workers=1)
    return {split: tables.load([out / "synthetic_ood"], split, "ood") for split in ("train", "val")}


def test_it_starts_at_the_probe_and_never_ends_worse_on_validation(data):
    arch = ladder.get("Td1")
    params = {"encoder": jax.device_get(front.make(arch, scale="gain", crop=500).init(jax.random.key(1)))}
    info = {"scale": "gain", "crop": 500, "labels": [], "lineage": []}
    encoder = features.Encoder(arch, params, info, features.digest_of(arch, params, info))
    split = {
        name: linear.Split(features.extract(encoder, t, name), t.labels, t.record_hash) for name, t in data.items()
    }
    (start,) = logistic.fit(split["train"], split["val"])
    tuned, head = finetune.fit(encoder, data["train"], data["val"], start, lr=3e-3, epochs_max=3)
    assert head.curve[0] == pytest.approx(start.val_loss, abs=1e-4) and len(head.curve) == 4
    assert head.val_loss == head.curve.min() and head.epoch == head.curve.argmin()
    assert (head.epoch > 0) == (tuned.digest != encoder.digest)
    loss = metrics.macro(metrics.bce(head.logits(features.extract(tuned, data["val"], "val")), data["val"].labels))[0]
    assert loss == pytest.approx(head.val_loss, abs=1e-4)


@pytest.mark.parametrize("rung", ["R4", "T4"])
def test_rates_rise_towards_the_head(rung):
    encoder = jax.device_get(front.make(ladder.get(rung), scale="gain", crop=1000).init(jax.random.key(0)))
    rates = finetune.layer_rates(encoder, 1.0, 0.5)
    assert set(rates) == set(encoder)
    if rung == "R4":
        order = ["stem_kernel", *(f"stage{i}_unit1_conv1_kernel" for i in range(1, 6))]
        assert [float(rates[name]) for name in order] == [0.5**5, 0.5**4, 0.5**3, 0.25, 0.5, 1.0]
    else:
        assert rates["layers_mlp1_kernel"][:, 0, 0].tolist() == [0.125, 0.25, 0.5, 1.0]
        assert (float(rates["norm_scale"]), float(rates["patch_kernel"])) == (1.0, 0.0625)
    for name, rate in rates.items():
        assert np.broadcast_shapes(rate.shape, np.shape(encoder[name])) == np.shape(encoder[name])
