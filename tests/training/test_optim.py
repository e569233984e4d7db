"""AdamW against optax, with decay on some arrays and with clipping; rates scaled by width."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ecg_jax.config import OptimConfig
from ecg_jax.models.ladder import ResNet1dConfig, TransformerConfig
from ecg_jax.objectives import supervised
from ecg_jax.training import optim, step


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
    for number, rate in enumerate(rates):
        given = params, ours, moments, mu, nu, jnp.int32(number), jnp.float32(rate)
        params, moments, ours, mu, nu, norm = both(*given)
        clipped += bool(clip and norm > clip)
    assert clipped == (10 if clip else 0)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


NARROW, WIDE = 8, 64


def _arch(family, width):
    if family == "resnet1d":
        return ResNet1dConfig(width, kernel=5, strides=(4,), groups=4)
    return TransformerConfig(width, 1, max(width // 16, 1), patch=25, leads_per_token=12, times=8)


def _objective(family, width):
    return supervised.make(_arch(family, width), 3, crop=200, dtype="float32")


@pytest.mark.parametrize("family", ["resnet1d", "transformer"])
def test_width_factors_fall_on_hidden_matrices_and_the_head(family):
    """Fan-in of the data, norms, biases and tables: factor 1; all else base width / width."""
    objective = _objective(family, WIDE)
    tree = optim.shapes(objective)
    factors = jax.tree.unflatten(jax.tree.structure(tree), optim.width_factors(objective, NARROW))
    scaled = {name for name, factor in factors["encoder"].items() if factor != 1}
    kernels = {name for name in tree["encoder"] if name.endswith("kernel")}
    assert scaled == kernels - {"stem_kernel", "patch_kernel"} and len(scaled) >= 2
    assert all(factors["encoder"][name] == NARROW / WIDE for name in scaled)
    assert factors["head"]["bias"] == 1
    assert factors["head"]["kernel"] == pytest.approx(NARROW / WIDE, rel=0.15), "a row of the head is the log gain's"
    assert (optim.width_factors(objective, WIDE) == 1).all()
    off, on = (optim.hyper(OptimConfig(base_width=base), objective).factors for base in (0, NARROW))
    assert off == 1 and np.array_equal(on, optim.width_factors(objective, NARROW))


@pytest.mark.parametrize("family", ["resnet1d", "transformer"])
def test_coordinate_check(family, quick_compilation):
    """The coordinate check of Tensor Programs V: how far three steps move features and logits, at eight times the
    width. Flat with scaled rates; without, they grow.
    """
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, (16, 3))
    signal = rng.normal(0, 300, (16, 200, 12))
    signal[:, :, :3] += 400 * labels[:, None, :] * np.sin(np.arange(200) / 5)[:, None]
    valid = np.tile(np.array([0, 200], np.int32), (16, 1))
    batch = {"signal": signal.astype(np.int16), "labels": labels.astype(np.int8), "valid": valid}

    def moved(width):
        objective, keys = _objective(family, width), jax.random.split(jax.random.key(1), 16)

        @jax.jit
        def one(state, rate, hyper):
            slope = step.gradient(objective, state.params, batch, keys)
            state, _ = step.update(objective, state, slope, rate, hyper)
            features = objective.features(state.params, batch)
            return state, (features[:, :-1], objective.logits(state.params, batch))

        params = objective.init(jax.random.key(0), {"prior": jnp.full(3, 0.5)})
        zeros, zero = jax.tree.map(jnp.zeros_like, params), jnp.int32(0)
        config, factors = OptimConfig(weight_decay=0.0, clip=0.0), optim.width_factors(objective, NARROW)
        found = []
        for chosen in (factors, np.ones_like(factors)):
            state, hyper = step.State(params, zeros, zeros, zero, zero, zero), optim.hyper(config)
            _, before = one(state, np.float32(0), hyper._replace(factors=chosen))
            for _ in range(3):
                state, after = one(state, np.float32(1e-3), hyper._replace(factors=chosen))
            found.append([np.abs(a - b).mean() for a, b in zip(after, before, strict=True)])
        return found

    narrow, wide = np.array(moved(NARROW)), np.array(moved(WIDE))
    assert np.array_equal(narrow[0], narrow[1]), "at the base width scaling changes nothing"
    (features, logits), (features_plain, logits_plain) = wide / narrow
    assert 0.75 < features < 1.3 and 0.6 < logits < 2.3
    assert features_plain > 1.5 and logits_plain > 3
