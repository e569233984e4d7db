"""Encoders: padding never reaches a feature, switches switch, layouts do not depend on how layers run."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ecg_jax import models
from ecg_jax.errors import UsageError
from ecg_jax.models import ladder, layers

RESNET = ladder.ResNet1dConfig(8, kernel=5, strides=(8, 8))
TRANSFORMER = ladder.TransformerConfig(8, 2, 2)
BOTH = pytest.mark.parametrize("config", [RESNET, TRANSFORMER], ids=["resnet1d", "transformer"])


@functools.cache
def _apply(config):
    return jax.jit(models.build(config).apply)


@functools.cache
def _params(config):
    return models.init(config, jax.random.key(0))


def _record(length, observed, start=0, seed=0):
    x = jax.random.normal(jax.random.key(seed), (2, observed, 12))
    x = jnp.pad(x, ((0, 0), (start, length - start - observed), (0, 0)))
    return x, jnp.tile(jnp.asarray([[start, observed]], jnp.int32), (2, 1))


def _pooled(config, x, valid, **more):
    return layers.pool(*_apply(config)({"params": _params(config)}, x, valid, **more))


@BOTH
def test_more_padding_changes_no_feature(config):
    short = _pooled(config, *_record(400, 330))
    assert np.allclose(short, _pooled(config, *_record(1000, 330)), atol=1e-5)
    assert np.abs(short).max() > 0.1
    # and the mask is what does it
    x, valid = _record(1000, 330)
    assert not np.allclose(short, _pooled(config, x, valid.at[:, 1].set(1000)), atol=1e-2)


def test_padding_in_front_by_whole_frames_moves_the_frames():
    a = _apply(RESNET)({"params": _params(RESNET)}, *_record(512, 300))[0]
    b, weight = _apply(RESNET)({"params": _params(RESNET)}, *_record(512, 300, start=128))
    assert np.allclose(a[:, :5], b[:, 2:7], atol=1e-5)
    assert np.array_equal(weight[0], np.asarray([0, 0, 1, 1, 1, 1, 300 / 64 - 4, 0], np.float32))


@BOTH
def test_shapes_weights_and_order(config):
    x, valid = _record(1000, 1000)
    frames, weight = _apply(config)({"params": _params(config)}, x, valid)
    count = 16 if config is RESNET else 132
    assert frames.shape == (2, count, config.features) and weight.shape == (2, count)
    assert frames.dtype == weight.dtype == jnp.float32
    last = (1000 - 15 * 64) / 64 if config is RESNET else (1000 - 10 * 96) / 96
    assert weight[0, 0] == 1 and weight[0, -1] == pytest.approx(last)


def test_transformer_tokens_are_lead_major_and_hidden_ones_do_not_matter():
    params = {"params": _params(TRANSFORMER)}
    x, valid = _record(576, 192)
    frames, weight = _apply(TRANSFORMER)(params, x, valid)
    assert np.array_equal(weight.reshape(2, 12, 6)[0].sum(0), [12, 12, 0, 0, 0, 0])
    # A sample that `valid` denies reaches its own token only.
    changed = _apply(TRANSFORMER)(params, x.at[:, 300, 4].set(9.0), valid)[0]
    differs = np.abs(changed - frames).max((0, 2)) > 1e-6
    assert np.flatnonzero(differs).tolist() == [4 * 6 + 3]
    with pytest.raises(UsageError, match="time table"):
        models.build(TRANSFORMER).apply(params, jnp.zeros((1, 1600, 12)), valid[:1])


def test_transformer_mask_vector_and_cls():
    params = {"params": _params(TRANSFORMER)}
    x, valid = _record(288, 288)
    masked = jnp.zeros((2, 36), bool).at[:, 7].set(True)
    apply = jax.jit(models.build(TRANSFORMER).apply, static_argnames="with_cls")
    plain, hidden = (apply(params, x, valid, masked=m)[0] for m in (None, masked))
    assert not np.allclose(plain, hidden)
    elsewhere = apply(params, x.at[:, 96:192, 2].set(5.0), valid, masked=masked)[0]
    assert np.allclose(hidden, elsewhere)  # token 7 is lead 2 (of 0..11), patch 1
    with_cls, weight = apply(params, x, valid, with_cls=True)
    assert np.allclose(with_cls[:, 1:], plain) and np.all(weight[:, 0] == 0)


def test_scan_and_unrolled_are_one_network():
    x, valid = _record(288, 250)
    params = _params(TRANSFORMER)

    def module(scan):
        return models.build(ladder.TransformerConfig(8, 2, 2, scan=scan))

    def gradient(scan):
        loss = lambda p: (layers.pool(*module(scan).apply({"params": p}, x, valid)) ** 2).sum()  # noqa: E731
        return jax.jit(jax.value_and_grad(loss))(params)

    with_scan, without = (
        str(jax.make_jaxpr(module(scan).apply)({"params": params}, x, valid)) for scan in (True, False)
    )
    assert "scan[" in with_scan and "scan[" not in without
    for a, b in zip(jax.tree.leaves(gradient(True)), jax.tree.leaves(gradient(False)), strict=True):
        assert np.allclose(a, b, rtol=1e-4, atol=1e-6)


@BOTH
def test_dropout_is_for_training(config):
    dropping = dataclasses.replace(config, dropout=0.3)
    x, valid = _record(320, 320)
    keys = jax.random.split(jax.random.key(5), 2)
    apply = jax.jit(models.build(dropping).apply, static_argnames="train")
    variables = {"params": _params(config)}
    still = apply(variables, x, valid)[0]
    assert np.allclose(still, _apply(config)(variables, x, valid)[0], atol=1e-6)
    moved = apply(variables, x, valid, train=True, keys=keys)[0]
    assert not np.allclose(still, moved)
    swapped = apply(variables, x[::-1], valid, train=True, keys=keys[::-1])[0]
    assert np.allclose(moved, swapped[::-1], atol=1e-5)


def test_bfloat16_stays_near_float32():
    x, valid = _record(512, 512)
    for config in (RESNET, TRANSFORMER):
        half = models.build(config, jnp.bfloat16)
        frames, _ = jax.jit(half.apply)({"params": _params(config)}, x, valid)
        assert frames.dtype == jnp.float32
        wanted = _apply(config)({"params": _params(config)}, x, valid)[0]
        assert 1e-4 < np.abs(frames - wanted).mean() < 0.05


def test_batch_norm_statistics():
    config = ladder.ResNet1dConfig(2, kernel=5, strides=(1, 4), norm="batch")
    x, valid = _record(256, 200)
    running = {name: one.init(None, one.shape) for name, one in models.statistics(config).items()}
    variables = {"params": models.init(config, jax.random.key(0)), "batch_stats": running}

    @functools.partial(jax.jit, static_argnames="train")
    def run(x, valid, train):
        (frames, _), new = models.build(config).apply(variables, x, valid, train=train, mutable=["batch_stats"])
        return frames, new["batch_stats"]

    after = run(x, valid, True)[1]
    stem = layers.conv1d(x, variables["params"]["stem_kernel"])[:, :200]
    assert np.allclose(after["stem_norm_running_mean"], 0.1 * stem.mean((0, 1)), atol=1e-6)
    assert np.allclose(after["stem_norm_running_var"], 0.9 + 0.1 * stem.var((0, 1)), atol=1e-5)
    # Padding stays out of batch statistics, and records are coupled in training only.
    again = run(jnp.pad(x, ((0, 0), (0, 256), (0, 0))), valid, True)[1]
    assert all(np.allclose(again[name], after[name], atol=1e-5) for name in after)
    other = x.at[1].multiply(3.0)
    assert np.array_equal(run(x, valid, False)[0][0], run(other, valid, False)[0][0])
    assert not np.allclose(run(x, valid, True)[0][0], run(other, valid, True)[0][0])
    shapes = jax.eval_shape(models.build(config).init, jax.random.key(0), x, valid)["batch_stats"]
    assert {name: leaf.shape for name, leaf in shapes.items()} == {name: v.shape for name, v in running.items()}
