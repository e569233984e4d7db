"""AdamW against optax, with decay on some arrays and with clipping."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ecg_jax.config import OptimConfig
from ecg_jax.training import optim


def _params():
    keys = jax.random.split(jax.random.key(0), 2)
    return {
        "conv": {"kernel": jax.random.normal(keys[0], (5, 3, 4)), "bias": jax.random.normal(keys[1], (4,))},
        "layers_norm_scale": jnp.ones((2, 4)),
        "layers_qkv_kernel": jnp.ones((2, 4, 12)),
    }


def test_decay_acts_on_kernels_alone():
    assert optim.decayed(_params()) == {
        "conv": {"kernel": True, "bias": False},
        "layers_norm_scale": False,  # two axes, but one of them is the layer
        "layers_qkv_kernel": True,
    }


@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_equals_optax(clip):
    """Ten steps at a changing rate, to 1e-6; with clipping that does bite."""
    config = OptimConfig(weight_decay=0.1, b1=0.8, b2=0.95, eps=1e-7, clip=clip)
    params = ours = _params()
    mu = nu = jax.tree.map(jnp.zeros_like, ours)
    rates = np.linspace(1e-2, 1e-3, 10)
    theirs = optax.chain(
        optax.clip_by_global_norm(clip) if clip else optax.identity(),
        optax.adamw(
            lambda count: jnp.asarray(rates, jnp.float32)[count],
            config.b1,
            config.b2,
            config.eps,
            weight_decay=config.weight_decay,
            mask=optim.decayed,
        ),
    )
    moments, hyper = theirs.init(params), optim.hyper(config)

    @jax.jit
    def both(params, ours, moments, mu, nu, step, rate):
        grads = jax.tree.map(lambda p: jnp.sin(3 * p + step) * 0.1, params)
        norm = optim.global_norm(grads)
        updates, moments = theirs.update(grads, moments, params)
        ours = optim.adamw(ours, grads, mu, nu, step, norm, rate, hyper)
        return optax.apply_updates(params, updates), moments, *ours, norm

    clipped = 0
    for step, rate in enumerate(rates):
        given = params, ours, moments, mu, nu, jnp.int32(step), jnp.float32(rate)
        params, moments, ours, mu, nu, norm = both(*given)
        clipped += bool(clip and norm > clip)
    assert clipped == (10 if clip else 0)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
