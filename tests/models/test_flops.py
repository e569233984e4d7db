"""Analytic FLOPs against the ladder's table and against what XLA counts."""

import jax
import jax.numpy as jnp
import pytest

from ecg_jax import models
from ecg_jax.models import flops, ladder

TABLE_RESNET = {"R1": 6.9e6, "R4": 90.6e6, "R8": 1.37e9, "R12": 29.9e9}  # 12 x 1024
TABLE_TRANSFORMER = {"T1": 9.8e6, "T4": 132e6, "T8": 1.65e9, "T12": 49.7e9}  # 120 tokens and cls


def test_the_ladders_table():
    for name, value in TABLE_RESNET.items():
        assert flops.forward_flops(ladder.get(name), 1000) == pytest.approx(value, rel=0.006)
    for name, value in TABLE_TRANSFORMER.items():
        assert 2 * flops.transformer_macs(ladder.get(name), 120) == pytest.approx(value, rel=0.006)
    t4 = ladder.get("T4")
    assert flops.training_flops(t4) == 3 * flops.forward_flops(t4) == 6 * flops.macs(t4)
    assert flops.macs(t4) == flops.transformer_macs(t4, 12 * 11)


@pytest.mark.parametrize("name, slack", [("R4", 0.05), ("T4", 0.09)])
def test_xla_counts_about_as_much(name, slack):
    # XLA adds norms, activations and softmax, and leaves out taps that fall on SAME padding.
    over = {"conv": "direct"} if name[0] == "R" else {"scan": False}
    config = ladder.get(name, **over)
    x, valid = jnp.zeros((1, 1000, 12)), jnp.zeros((1, 2), jnp.int32)
    params = jax.eval_shape(lambda key: models.init(config, key), jax.random.key(0))
    lowered = jax.jit(models.build(config).apply).lower({"params": params}, x, valid)
    assert lowered.cost_analysis()["flops"] == pytest.approx(flops.forward_flops(config, 1000), rel=slack)


def test_peaks_are_dense_and_never_guessed():
    assert flops.peak_flops("NVIDIA H200", "bfloat16") == 989.4e12 == 2 * flops.peak_flops("NVIDIA H200", "float32")
    assert flops.peak_flops("NVIDIA A100-SXM4-80GB", "bfloat16") == 312e12
    assert flops.peak_flops("TPU v5 lite", "bfloat16") == 197e12, "v5e, not v5p"
    assert flops.peak_flops("TPU v5", "bfloat16") == 459e12
    unknown = ("cpu", "NVIDIA GeForce RTX 4090", "TPU v4 lite", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA H100")
    for kind in unknown:
        assert flops.peak_flops(kind, "bfloat16") is None, kind
    assert flops.peak_flops("TPU v4", "float32") is None and flops.peak_flops("NVIDIA H200", "float64") is None
    t12 = ladder.get("T12")
    rate = 0.5 * 989.4e12 / flops.training_flops(t12)
    assert flops.mfu(flops.training_flops(t12), rate, "NVIDIA H200", "bfloat16") == pytest.approx(0.5)
    assert flops.mfu(flops.training_flops(t12), rate, "cpu", "float32") is None
