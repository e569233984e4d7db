"""Layers: formulations agree, padding stays out, random masks belong to records."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ecg_jax.models import layers, norms


def _normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def test_group_count():
    assert [layers.group_count(width) for width in (1, 4, 5, 12, 20, 64, 96, 11)] == [1, 4, 5, 6, 5, 8, 8, 1]


def test_group_norm_sees_valid_positions_only():
    x, weight = 3 + 2 * _normal(0, 2, 40, 16), jnp.ones((2, 40)).at[0, 25:].set(0)
    scale, bias = jnp.ones(16), jnp.zeros(16)
    y = layers.group_norm(x, weight, scale, bias)
    first = y[0, :25].reshape(25, 8, 2)
    assert np.allclose(first.mean((0, 2)), 0, atol=1e-5) and np.allclose(first.var((0, 2)), 1, atol=1e-3)
    changed = layers.group_norm(x.at[0, 25:].set(1e3), weight, scale, bias)
    assert np.allclose(y[0, :25], changed[0, :25], atol=1e-6)
    assert not np.allclose(y[0, :25], layers.group_norm(x, jnp.ones((2, 40)), scale, bias)[0, :25], atol=1e-3)
    assert np.isfinite(layers.group_norm(x, jnp.zeros((2, 40)), scale, bias)).all()


@pytest.mark.parametrize("relu", [False, True])
def test_written_gradient_of_group_norm(relu):
    """Against automatic differentiation: padding, a share of a position, an empty record, a scale of zero."""
    x, cotangent = 2 + 3 * _normal(0, 4, 40, 12), _normal(1, 4, 40, 12)
    weight = jnp.ones((4, 40)).at[0, 25:].set(0).at[1, 30].set(0.3).at[2].set(0)
    scale, bias = _normal(2, 12).at[3].set(0), _normal(3, 12)

    def plain(x, scale, bias):
        y = layers.group_norm(x, weight, scale, bias)
        return jnp.where(weight[:, :, None] > 0, jax.nn.relu(y) if relu else y, 0)

    wanted, back = jax.vjp(plain, x, scale, bias)
    got, written = jax.vjp(lambda x, scale, bias: norms.group_norm(x, weight, scale, bias, 8, relu), x, scale, bias)
    assert float(jnp.abs(wanted).max()) > 1
    for a, b in zip((got, *written(cotangent)), (wanted, *back(cotangent)), strict=True):
        assert np.abs(a - b).max() <= 1e-5 * np.abs(b).max()


def test_max_pool_and_weights():
    x = jnp.asarray([[-3.0, -1.0, -2.0, -9.0, 5.0, 6.0]])[:, :, None]
    occupied = jnp.asarray([[True, True, True, False, False, False]])
    assert np.array_equal(layers.max_pool(x, occupied, 2)[0, :, 0], [-1.0, -2.0, 0.0])
    slope = jax.grad(lambda x: (layers.max_pool(x, occupied, 2)[0, :, 0] * jnp.asarray([2.0, 3.0, 4.0])).sum())
    assert np.array_equal(slope(x)[0, :, 0], [0, 2, 3, 0, 0, 0])
    assert np.array_equal(slope(jnp.ones_like(x))[0, :, 0], [2, 0, 3, 0, 0, 0])  # the first of equal ones
    weight = layers.position_weight(jnp.asarray([[3, 6], [0, 0]]), 4, 4)
    assert np.array_equal(weight, [[0.25, 1.0, 0.25, 0.0], [0, 0, 0, 0]])
    pooled = layers.pool(jnp.arange(8.0).reshape(2, 4, 1), weight)
    assert np.allclose(pooled[:, 0], [1.0, 0.0])


def test_dropout_belongs_to_the_record():
    keys = jax.random.split(jax.random.key(0), 4)
    x = jnp.ones((4, 50, 8))
    y = layers.dropout(x, 0.25, keys, 3)
    order = jnp.asarray([2, 0, 3, 1])
    assert np.array_equal(y[order], layers.dropout(x, 0.25, keys[order], 3))
    assert not np.array_equal(y, layers.dropout(x, 0.25, keys, 4))
    assert float(y.mean()) == pytest.approx(1, abs=0.1) and set(np.unique(y)) == {0, np.float32(1 / 0.75)}
    assert layers.dropout(x, 0.25, None, 3) is x
