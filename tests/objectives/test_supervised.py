"""Supervised objective: the loss by definition, masks, starting point, shared compilations, learning."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ecg_jax.errors import UsageError
from ecg_jax.models import ladder
from ecg_jax.objectives import supervised

RESNET = ladder.ResNet1dConfig(4, kernel=5, strides=(4, 8), groups=1)
BATCH_NORM = dataclasses.replace(RESNET, norm="batch")
TRANSFORMER = ladder.TransformerConfig(8, 1, 1, patch=50)


def _batch(records=16, labels=3, seed=0):
    rng = np.random.default_rng(seed)
    y = (rng.random((records, labels)) < 0.4).astype(np.int8)
    signal = rng.normal(0, 200, (records, 1000, 8))
    signal[:, :, 2] += 400.0 * y[:, :1] * np.sin(np.arange(1000) / 3)
    return {
        "signal": jnp.asarray(signal.astype(np.int16)),
        "labels": jnp.asarray(y),
        "valid": jnp.tile(jnp.asarray([[0, 1000]], jnp.int32), (records, 1)),
    }


def _make(arch=TRANSFORMER, labels=3, **more):
    return supervised.make(arch, labels, crop=300, **more)


# As in training: everything compiled, the objective a static argument.
_init = jax.jit(lambda objective, *args: objective.init(*args), static_argnums=0)
_loss = jax.jit(lambda objective, *args: objective.loss(*args), static_argnums=0)
_features = jax.jit(lambda objective, *args: objective.features(*args), static_argnums=0)
_logits = jax.jit(lambda objective, *args: objective.logits(*args), static_argnums=0)
_grads = jax.jit(lambda objective, *args: jax.value_and_grad(objective.loss, has_aux=True)(*args), static_argnums=0)


def _params(objective, prior=(0.4, 0.4, 0.4)):
    return _init(objective, jax.random.key(0), {"prior": jnp.asarray(prior)})


def test_make_is_memoised_and_refuses():
    assert _make() is _make() is _make(dtype="float32") is _make(dtype=jnp.float32)  # auto on CPU
    assert _make() is not _make(scale="mv") and hash(_make()) != hash(_make(scale="mv"))
    for wrong in ({"scale": "gains"}, {"dtype": "float16"}):
        with pytest.raises(UsageError, match="unknown"):
            _make(**wrong)
    with pytest.raises(UsageError, match="shorter than one frame"):
        supervised.make(RESNET, 3, crop=31)


def test_compilation_is_shared_between_runs():
    traced = []

    def loss(objective, params, batch):
        traced.append(1)
        return objective.loss(params, batch)[0]

    run = jax.jit(loss, static_argnums=0)
    for seed, prior in ((0, 0.1), (1, 0.5)):
        objective = _make()
        params = objective.init(jax.random.key(seed), {"prior": jnp.full(3, prior)})
        run(objective, params, _batch(seed=seed))
    assert len(traced) == 1


def test_bce_is_the_definition_and_masks_unknown():
    logits = np.asarray([[0.3, -2.0], [40.0, 1.0], [-90.0, 0.0]], np.float32)
    labels = np.asarray([[1, 0], [1, -1], [0, 1]], np.int8)
    p = 1 / (1 + np.exp(-logits.astype(np.float64)))
    wanted = -np.where(labels == 1, np.log(np.maximum(p, 1e-300)), np.log(np.maximum(1 - p, 1e-300)))
    known = labels != -1
    got = np.asarray(supervised.bce(jnp.asarray(logits), jnp.asarray(labels)))
    assert np.allclose(got[known], wanted[known], atol=1e-6)
    sums, counts = supervised.bce_sums(jnp.asarray(logits), jnp.asarray(labels), jnp.asarray([1.0, 1.0, 0.0]))
    assert counts.tolist() == [2, 1]
    assert np.allclose(sums, [wanted[0, 0] + wanted[1, 0], wanted[0, 1]], atol=1e-6)
    nan = jnp.asarray(logits).at[2].set(jnp.nan)
    assert np.array_equal(supervised.bce_sums(nan, jnp.asarray(labels), jnp.asarray([1, 1, 0]))[0], sums)


@pytest.mark.parametrize("arch", [RESNET, TRANSFORMER], ids=["resnet1d", "transformer"])
def test_loss_masks_and_starts_at_the_prior(arch):
    objective = _make(arch)
    batch = _batch()
    prior = np.asarray(batch["labels"]).mean(0)
    params = _params(objective, prior)
    value = lambda p, y: _grads(objective, p, batch | {"labels": y})  # noqa: E731
    (loss, aux), grads = value(params, batch["labels"])
    entropy = -(prior * np.log(prior) + (1 - prior) * np.log(1 - prior)).mean()
    assert float(loss) == pytest.approx(entropy, rel=0.03) and float(aux["known"]) == 1
    assert all(np.abs(g).max() > 0 for k, g in grads["encoder"].items() if k.endswith("kernel"))

    labels = batch["labels"].at[:, 1].set(-1)
    (masked, aux), grads = value(params, labels)
    known = np.asarray(supervised.bce(_logits(objective, params, batch), labels))[:, [0, 2]]
    assert float(masked) == pytest.approx(known.mean(), abs=1e-6)
    assert float(aux["known"]) == pytest.approx(2 / 3)
    assert np.all(grads["head"]["kernel"][:, 1] == 0) and grads["head"]["bias"][1] == 0
    (nothing, _), grads = value(params, jnp.full_like(labels, -1))
    assert float(nothing) == 0 and all(np.all(g == 0) for g in jax.tree.leaves(grads))


def test_extreme_priors_stay_finite():
    bias = np.asarray(_params(_make(), (0.0, 1.0, 0.5))["head"]["bias"])
    assert np.isfinite(bias).all() and np.isclose(bias[0], -bias[1], rtol=1e-3) and bias[2] == 0


def test_features_logits_and_sums():
    objective = _make()
    batch, params = _batch(), _params(objective)
    features, head = _features(objective, params, batch), params["head"]
    assert features.shape == (16, TRANSFORMER.features + 1) and features.dtype == jnp.float32
    logits = _logits(objective, params, batch)
    assert np.allclose(features @ head["kernel"] + head["bias"], logits, atol=1e-5)
    assert np.all(features[:, -1] < 0)  # log of a gain below 1 mV
    assert np.all(_features(_make(scale="mv"), params, batch)[:, -1] == 0)
    assert np.array_equal(_features(objective, {"encoder": params["encoder"]}, batch), features)
    total, known = objective.sums(params, batch, jnp.ones(16))
    loss = _loss(objective, params, batch)[0]
    assert float((total / known).mean()) == pytest.approx(float(loss), abs=1e-6)


def test_keys_move_the_crop_and_belong_to_records():
    objective, batch = _make(), _batch()
    params = _params(objective)
    loss = lambda b, keys: _loss(objective, params, b, keys)[0]  # noqa: E731
    keys = jax.random.split(jax.random.key(0), 16)
    still, moved = loss(batch, None), loss(batch, keys)
    assert abs(float(still - moved)) > 1e-6
    order = jnp.asarray(np.random.default_rng(0).permutation(16))
    shuffled = {name: value[order] for name, value in batch.items()}
    assert float(loss(shuffled, keys[order])) == pytest.approx(float(moved), abs=1e-6)
    assert float(loss(batch | {"key": keys}, None)) == float(moved)
    centred = _make(random_crop=False)
    assert float(_loss(centred, params, batch, keys)[0]) == pytest.approx(float(still), abs=1e-7)


def test_bfloat16_computes_in_half_but_loss_is_float32():
    half, full, batch = _make(dtype="bfloat16"), _make(), _batch()
    params = _params(full)
    a, b = (_loss(objective, params, batch)[0] for objective in (half, full))
    assert a.dtype == _logits(half, params, batch).dtype == jnp.float32
    assert a != b and float(a) == pytest.approx(float(b), rel=1e-2)


def test_batch_norm_statistics_are_carried():
    objective, batch = _make(BATCH_NORM), _batch()
    params = _params(objective)
    running = [name for name in params["encoder"] if "_running_" in name]
    assert len(running) == 2 * sum(name.endswith("_scale") for name in params["encoder"])
    (_, aux), grads = _grads(objective, params, batch)
    assert all(np.all(grads["encoder"][name] == 0) for name in running)
    assert np.abs(grads["encoder"]["stem_kernel"]).max() > 0
    before = _features(objective, params, batch)
    new, scalars = objective.absorb(params, aux)
    assert set(scalars) == {"known"} and jax.tree.structure(new) == jax.tree.structure(params)
    assert not np.allclose(before, _features(objective, new, batch))
    assert not np.array_equal(new["encoder"][running[0]], params["encoder"][running[0]])
    plain = _make(RESNET)
    same, aux = plain.absorb(_params(plain), {"known": 1.0})
    assert aux == {"known": 1.0} and "_running_" not in "".join(same["encoder"])


@pytest.mark.parametrize("arch", [RESNET, TRANSFORMER, BATCH_NORM], ids=["group", "transformer", "batch"])
def test_it_learns(arch):
    objective, batch = _make(arch, labels=1), _batch(32, labels=1)
    adam = optax.adam(0.02)

    @jax.jit
    def step(params, state):
        (loss, aux), grads = jax.value_and_grad(objective.loss, has_aux=True)(params, batch)
        updates, state = adam.update(grads, state)
        params, _ = objective.absorb(optax.apply_updates(params, updates), aux)
        return params, state, loss

    params = jax.jit(objective.init)(jax.random.key(0), {"prior": jnp.full(1, 0.4)})
    assert not any(leaf.weak_type for leaf in jax.tree.leaves(params))  # each would cost a second compilation
    state, losses = jax.jit(adam.init)(params), []
    for _ in range(60):
        params, state, loss = step(params, state)
        losses.append(float(loss))
    assert losses[-1] < 0.6 * losses[0], losses[::8]
