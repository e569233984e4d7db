"""Layers: formulations agree, padding stays out, random masks belong to records."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ecg_jax.models import layers


def _normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize(
    "length, channels, out, taps, stride, block",
    [
        (64, 3, 5, 17, 1, 8),
        (64, 4, 4, 17, 4, 4),
        (50, 2, 3, 7, 4, 2),  # ceil lengths: 13 positions
        (33, 3, 2, 5, 2, 16),  # a block longer than the output
        (7, 2, 2, 17, 1, 4),  # kernel longer than the signal
        (20, 2, 3, 1, 4, 2),  # stride longer than the kernel
    ],
)
def test_convolutions_agree_with_gradients(length, channels, out, taps, stride, block):
    x, w = _normal(0, 2, length, channels), _normal(1, taps, channels, out) / np.sqrt(taps * channels)
    cotangent = _normal(2, 2, -(-length // stride), out)

    def run(impl, block=None):
        y, back = jax.vjp(lambda x, w: layers.conv1d(x, w, stride, impl, block), x, w)
        return y, *back(cotangent)

    wanted = jax.jit(lambda: run("direct"))()
    assert wanted[0].shape == (2, -(-length // stride), out)
    for got in jax.jit(lambda: (run("polyphase"), run("blocked", block), run("auto")))():
        for a, b in zip(got, wanted, strict=True):
            assert np.allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())


def test_convolution_against_numpy():
    x, w = np.asarray(_normal(0, 1, 9, 2)), np.asarray(_normal(1, 3, 2, 1))
    padded = np.pad(x[0], ((1, 1), (0, 0)))
    wanted = [(padded[t : t + 3] * w[:, :, 0]).sum() for t in range(9)]
    assert np.allclose(layers.conv1d(jnp.asarray(x), jnp.asarray(w))[0, :, 0], wanted, atol=1e-6)


def test_choice_by_backend_and_shape():
    assert layers.choose(512, 17, 12, 4, 1, "cpu") == ("blocked", 8)
    assert layers.choose(1024, 17, 16, 32, 1, "cpu") == ("direct", 1)
    assert layers.choose(1024, 17, 64, 64, 4, "cpu") == ("polyphase", 1)
    assert layers.choose(512, 17, 12, 4, 1, "gpu") == ("direct", 1)
    with pytest.raises(ValueError, match="odd"):
        layers.conv1d(jnp.zeros((1, 8, 1)), jnp.zeros((4, 1, 1)))
    with pytest.raises(ValueError, match="unknown conv1d"):
        layers.conv1d(jnp.zeros((1, 8, 1)), jnp.zeros((3, 1, 1)), impl="winograd")


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


def test_max_pool_and_weights():
    x = jnp.asarray([[-3.0, -1.0, -2.0, -9.0, 5.0, 6.0]])[:, :, None]
    occupied = jnp.asarray([[True, True, True, False, False, False]])
    assert np.array_equal(layers.max_pool(x, occupied, 2)[0, :, 0], [-1.0, -2.0, 0.0])
    weight = layers.position_weight(jnp.asarray([[3, 6], [0, 0]]), 4, 4)
    assert np.array_equal(weight, [[0.25, 1.0, 0.25, 0.0], [0, 0, 0, 0]])
    pooled = layers.pool(jnp.arange(8.0).reshape(2, 4, 1), weight)
    assert np.allclose(pooled[:, 0], [1.0, 0.0])


def test_attention_formulations_agree_and_hide():
    q, k, v = (_normal(i, 2, 6, 3, 4) for i in range(3))
    seen = jnp.asarray([[True] * 6, [True, True, False, True, False, True]])

    @functools.partial(jax.jit, static_argnums=0)
    def run(impl, k):
        out, back = jax.vjp(lambda *x: layers.attention(*x, seen, impl), q, k, v)
        return out, *back(_normal(9, 2, 6, 3, 4))

    matmul = run("matmul", k)
    for a, b in zip(matmul, run("xla", k), strict=True):
        assert np.allclose(a, b, atol=3e-6)
    assert np.allclose(matmul[0], run("matmul", k.at[1, 2].set(50.0))[0])
    assert not np.allclose(matmul[0], run("matmul", k.at[1, 3].set(50.0))[0])


def test_dropout_belongs_to_the_record():
    keys = jax.random.split(jax.random.key(0), 4)
    x = jnp.ones((4, 50, 8))
    y = layers.dropout(x, 0.25, keys, 3)
    order = jnp.asarray([2, 0, 3, 1])
    assert np.array_equal(y[order], layers.dropout(x, 0.25, keys[order], 3))
    assert not np.array_equal(y, layers.dropout(x, 0.25, keys, 4))
    assert float(y.mean()) == pytest.approx(1, abs=0.1) and set(np.unique(y)) == {0, np.float32(1 / 0.75)}
    assert layers.dropout(x, 0.25, None, 3) is x
