"""The Transformer's gradients: written-out ones equal automatic ones, remat changes memory only, cost is linear in
depth."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ecg_jax import models
from ecg_jax.errors import UsageError
from ecg_jax.models import gradients, ladder, layers

CONFIG = ladder.TransformerConfig(16, 2, 2, dropout=0.2)


@pytest.fixture
def optimised():
    """Programs as they run, not as they compile fastest."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


def _relative(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.abs(a - b).max() / np.abs(b).max()


def _loss(config, dtype):
    """Loss of the parameters, with dropout, a record that ends early, and masked tokens."""
    x = jax.random.normal(jax.random.key(1), (3, 288, 12))
    valid = jnp.asarray([[0, 288], [0, 150], [96, 100]], jnp.int32)
    inside = (jnp.arange(288) >= valid[:, :1]) & (jnp.arange(288) < valid.sum(1, keepdims=True))
    masked = jax.random.bernoulli(jax.random.key(2), 0.3, (3, 36))
    keys = jax.random.split(jax.random.key(3), 3)
    target = jax.random.normal(jax.random.key(4), (3, 36, config.width))

    def loss(params):
        x_seen = jnp.where(inside[:, :, None], x, 0)
        module = models.build(config, dtype)
        frames, weight = module.apply({"params": params}, x_seen, valid, train=True, keys=keys, masked=masked)
        return (weight[:, :, None] * (frames - target) ** 2).mean()

    return loss


def _gradient(config, dtype=jnp.float32):
    return jax.jit(jax.value_and_grad(_loss(config, dtype)))(models.init(CONFIG, jax.random.key(0)))


def _plain(monkeypatch):
    monkeypatch.setattr(gradients, "layer_norm", layers.layer_norm)
    monkeypatch.setattr(gradients, "gelu", functools.partial(jax.nn.gelu, approximate=True))


@pytest.mark.parametrize("dtype, bound", [(jnp.float32, 1e-5), (jnp.bfloat16, 0.02)])
@pytest.mark.parametrize("which", ["layer_norm", "gelu"])
def test_written_out_gradients_equal_automatic_ones(which, dtype, bound):
    x = (1 + 2 * jax.random.normal(jax.random.key(0), (4, 7, 24))).astype(dtype)
    ct = jax.random.normal(jax.random.key(1), x.shape).astype(dtype)
    scale, bias = 1 + jnp.arange(24) / 24, jnp.arange(24) / 10
    pair = {
        "layer_norm": (layers.layer_norm, gradients.layer_norm, (x, scale, bias)),
        "gelu": (functools.partial(jax.nn.gelu, approximate=True), gradients.gelu, (3 * x,)),
    }[which]
    automatic, written, arguments = pair
    assert "custom_vjp" in str(jax.make_jaxpr(written)(*arguments))
    out, back = jax.vjp(written, *arguments)
    wanted, wanted_back = jax.vjp(automatic, *arguments)
    assert np.array_equal(out, wanted) and out.dtype == dtype
    for a, b in zip(back(ct), wanted_back(ct), strict=True):
        assert a.dtype == b.dtype and _relative(a, b) < bound


@pytest.mark.parametrize("scan", [False, True])
def test_network_gradient_equals_automatic_differentiation(scan, monkeypatch):
    config = dataclasses.replace(CONFIG, scan=scan)
    loss, written = _gradient(config)
    _plain(monkeypatch)
    jaxpr = str(jax.make_jaxpr(_loss(plain := dataclasses.replace(config, attention="xla"), jnp.float32))(_params()))
    assert "custom_vjp" not in jaxpr
    wanted_loss, wanted = _gradient(plain)
    assert float(loss) == pytest.approx(float(wanted_loss), rel=1e-6)
    for name in wanted:
        assert np.abs(wanted[name]).max() > 0 or name in ("cls",), name
        assert _relative(written[name], wanted[name]) < 1e-5, name


def _params():
    return models.init(CONFIG, jax.random.key(0))


def _remat_in(config):
    return re.search(r"= (remat|checkpoint)\w*\[", str(jax.make_jaxpr(_loss(config, jnp.float32))(_params())))


def test_network_gradient_in_half_precision(monkeypatch):
    _, written = _gradient(CONFIG, jnp.bfloat16)
    _, exact = _gradient(CONFIG)
    _plain(monkeypatch)
    _, automatic = _gradient(dataclasses.replace(CONFIG, attention="xla"), jnp.bfloat16)
    for name in exact:
        assert written[name].dtype == jnp.float32
        # Both round; the written-out one is no further from the truth than half as much again.
        size = float(jnp.linalg.norm(exact[name]))
        ours, theirs = (float(jnp.linalg.norm(g[name] - exact[name])) / size for g in (written, automatic))
        assert ours < max(1.5 * theirs, 0.02), name


@pytest.mark.parametrize("scan", [False, True])
def test_remat_changes_no_value(scan):
    config = dataclasses.replace(CONFIG, scan=scan)
    loss, wanted = _gradient(config)
    assert not _remat_in(config)
    for remat in ladder.REMATS[1:]:
        saving = dataclasses.replace(config, remat=remat)
        assert _remat_in(saving), remat
        got_loss, got = _gradient(saving)
        assert float(got_loss) == pytest.approx(float(loss), rel=1e-6)
        for name in wanted:
            assert _relative(got[name], wanted[name]) < 1e-5, (remat, name)


def test_remat_saves_memory(optimised):
    base = ladder.TransformerConfig(32, 6, 2, scan=True)
    x, valid = jnp.zeros((8, 960, 12)), jnp.tile(jnp.asarray([[0, 960]]), (8, 1))

    def temporary(remat):
        module = models.build(dataclasses.replace(base, remat=remat))
        loss = lambda p: module.apply({"params": p}, x, valid)[0].sum()  # noqa: E731
        shapes = jax.eval_shape(lambda: models.init(base, jax.random.key(0)))
        return jax.jit(jax.grad(loss)).lower(shapes).compile().memory_analysis().temp_size_in_bytes

    none, dots, block = (temporary(remat) for remat in ladder.REMATS)
    assert block < dots < none and block < 0.5 * none


def test_cost_of_unrolled_layers_is_linear_in_depth(optimised):
    """XLA-CPU once recomputed what reaches a layer's output from all layers above it, again in every layer."""

    def operations(n):
        config = ladder.TransformerConfig(16, n, 2, scan=False)
        module = models.build(config)
        x, valid = jnp.zeros((2, 192, 12)), jnp.tile(jnp.asarray([[0, 192]]), (2, 1))
        loss = lambda p: (module.apply({"params": p}, x, valid)[0] ** 2).sum()  # noqa: E731
        shapes = jax.eval_shape(lambda: models.init(config, jax.random.key(0)))
        return jax.jit(jax.grad(loss)).lower(shapes).compile().cost_analysis()["flops"]

    two, four, six = (operations(n) for n in (2, 4, 6))
    assert (six - four) < 1.02 * (four - two)


def test_unknown_choices_are_refused():
    with pytest.raises(UsageError, match="unknown remat 'full'; known: none, dots, block"):
        ladder.get("T1", remat="full")
    with pytest.raises(UsageError, match="did you mean 'chunked'"):
        ladder.get("T1", attention="chunk")
