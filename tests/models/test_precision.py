"""Half-precision arithmetic: parameters, gradients, statistics, softmax, logits and loss stay float32, and the loss
stays near that of float32."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ecg_jax.models import ladder
from ecg_jax.objectives import supervised

LABELS, BATCH, CROP = 5, 8, 512
# |loss in bfloat16 - loss in float32|, relative. bfloat16 has 8 bits (4e-3); its errors average out over a batch.
LOSS_BOUND = 2e-3
# |difference of the gradients| over the norm of the exact one. Wider for the ResNet, whose max-pools and ReLUs choose
# another branch where rounding makes two samples tie, and on noise, where the gradients of the records nearly cancel.
GRADIENT_BOUND = {"resnet1d": 0.25, "transformer": 0.08}


def _batch():
    rng = np.random.default_rng(0)
    return {
        "signal": jnp.asarray(rng.integers(-1500, 1500, (BATCH, CROP, 12)), jnp.int16),
        "valid": jnp.tile(jnp.asarray([[0, CROP - 40]], jnp.int32), (BATCH, 1)),
        "labels": jnp.asarray(rng.integers(0, 2, (BATCH, LABELS)), jnp.int8),
    }


def _objective(arch, dtype):
    return supervised.make(arch, LABELS, crop=CROP, dtype=dtype)


def _params(arch):
    params = _objective(arch, "float32").init(jax.random.key(0), {"prior": jnp.full(LABELS, 0.3)})
    # A head of ordinary size: at its start of almost nothing, no error of the encoder would reach the loss.
    head = jax.random.normal(jax.random.key(1), params["head"]["kernel"].shape) / arch.features**0.5
    return {**params, "head": {**params["head"], "kernel": head}}


ARCHS = {
    "R2": ladder.get("R2"),
    "R2 with BatchNorm": ladder.get("R2", norm="batch"),
    "T2": ladder.get("T2"),
    "T2 without chunks": ladder.get("T2", attention="xla"),
}


@pytest.mark.parametrize("name", ARCHS)
def test_loss_and_gradient_stay_near_float32(name):
    arch, batch = ARCHS[name], _batch()
    params = _params(arch)

    def run(dtype):
        loss = _objective(arch, dtype).loss
        (value, aux), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, batch)
        return value, grads, aux

    (exact, wanted, _), (value, grads, aux) = run("float32"), run("bfloat16")
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves((value, grads, aux)))
    assert 0 < abs(float(value) - float(exact)) < LOSS_BOUND * float(exact)
    difference = jax.tree.map(jnp.subtract, grads, wanted)
    norm = lambda tree: float(jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(tree))))  # noqa: E731
    assert 0 < norm(difference) < GRADIENT_BOUND[arch.family] * norm(wanted)


@pytest.mark.parametrize("name", ARCHS)
def test_what_is_computed_in_which_type(name):
    objective, batch = _objective(ARCHS[name], "bfloat16"), _batch()
    params = _params(ARCHS[name])
    jaxpr = str(jax.make_jaxpr(objective.loss)(params, batch))
    kinds = "conv_general_dilated|dot_general"
    products = re.findall(rf":(\w+)\[[\d,]*\] = (?:{kinds})", jaxpr)
    half = [kind for kind in products if kind == "bf16"]
    assert len(half) > 5  # the encoder's convolutions and matrices
    # Powers of two numbers apart, sums and roots of statistics, the softmax and the loss: never in half precision.
    for operation in ("exp", "rsqrt", "log1p", "reduce_sum", "log"):
        kinds_of = re.findall(rf":(\w+)\[[\d,]*\] = {operation}\b", jaxpr)
        assert "bf16" not in kinds_of, operation
    assert objective.logits(params, batch).dtype == jnp.float32


def test_default_precision_follows_the_backend():
    chosen = supervised.make(ladder.get("R1"), LABELS, crop=CROP).front.dtype
    assert chosen == ("float32" if jax.default_backend() == "cpu" else "bfloat16")
