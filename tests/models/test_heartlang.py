"""HeartLang's masked model and classifier: what a mask hides, what is projected, dropout, losses, the exact GELU."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ecg_jax.models import heartlang, sentence
from ecg_jax.models.heartlang import ClassifierConfig, MaskedConfig

CONFIG = MaskedConfig(width=12, layers=2, heads=2, head_size=5, mlp=14, codes=9, slots=10, window=6, dropout=0.3)
STILL = dataclasses.replace(CONFIG, dropout=0.0)

init = jax.jit(heartlang.init, static_argnums=0)
hidden = jax.jit(lambda config, *args, **more: heartlang.hidden(config, *args, **more), static_argnums=0)
logits = jax.jit(heartlang.masked_logits, static_argnums=0)
classify = jax.jit(heartlang.classify, static_argnums=0)


def sentences(records=3, slots=10):
    rng = np.random.default_rng(0)
    there = np.arange(slots) < np.asarray([[10], [7], [8]])
    tokens = np.where(there[:, :, None], rng.normal(0, 1, (records, slots, 6)), 0).astype(np.float32)
    return tokens, rng.integers(0, 12, there.shape) * there, rng.integers(0, 10, there.shape) * there, there


@pytest.fixture(scope="module")
def params():
    found = init(CONFIG, jax.random.key(0))
    found["backbone"]["mask_vector"] = jnp.ones((1, 12))
    return found


def test_published_sizes():
    def count(config):
        shapes = jax.eval_shape(lambda key: heartlang.init(config, key), jax.random.key(0))
        return sum(leaf.size for leaf in jax.tree.leaves(shapes))

    assert count(MaskedConfig()) == 44_562_176
    assert count(ClassifierConfig(5)) == 39_053_829
    assert count(ClassifierConfig(9)) - count(ClassifierConfig(5)) == 4 * 769


def test_a_masked_token_is_seen_by_its_neighbours_only(params):
    tokens, *rest = sentences()
    masked = np.zeros((3, 10), bool)
    masked[:, 2:5] = True
    found = hidden(STILL, params, tokens, *rest, masked_BxS=masked)
    inside, edge = tokens.copy(), tokens.copy()
    inside[:, 3] += 5
    edge[:, 4] += 5
    assert np.array_equal(hidden(STILL, params, inside, *rest, masked_BxS=masked), found)
    assert np.abs(hidden(STILL, params, edge, *rest, masked_BxS=masked) - found).max() > 1e-3  # conv before the mask
    assert np.abs(hidden(STILL, params, inside, *rest) - found).max() > 1e-3


def test_only_masked_slots_are_projected(params):
    data = sentences()
    places = np.asarray([[0, 3, 9], [1, 2, 3], [4, 5, 8]])
    found = logits(STILL, params, *data, places)
    masked = np.zeros((3, 10), bool)
    np.put_along_axis(masked, places, True, 1)
    features = np.asarray(hidden(STILL, params, *data, masked_BxS=masked))[:, 1:]
    wanted = features[masked].reshape(3, 3, 12) @ params["head"]["kernel"] + params["head"]["bias"]
    assert found.shape == (3, 3, 9) and np.allclose(found, wanted, atol=1e-5)
    codes = np.asarray([[0, 8, 1], [2, 2, 5], [7, 3, 4]])
    loss, accuracy = heartlang.masked_loss(found, codes)
    p = np.exp(np.asarray(found, np.float64))
    p /= p.sum(2, keepdims=True)
    assert float(loss) == pytest.approx(-np.log(np.take_along_axis(p, codes[..., None], 2)).mean(), abs=1e-6)
    assert float(accuracy) == pytest.approx((p.argmax(2) == codes).mean(), abs=1e-6)


def test_the_classifier_reads_cls_and_not_the_unused_head():
    config, data = ClassifierConfig(4, STILL), sentences()
    params = init(config, jax.random.key(1))
    found = classify(config, params, *data)
    cls = hidden(STILL, params, *data)[:, 0]
    assert np.allclose(found, cls @ params["classifier"]["kernel"] + params["classifier"]["bias"], atol=1e-5)
    params["head"] = jax.tree.map(lambda leaf: leaf * np.nan, params["head"])
    assert np.array_equal(classify(config, params, *data), found)


def test_dropout_needs_keys_and_belongs_to_records(params):
    data = sentences()
    keys = jax.random.split(jax.random.key(5), 3)
    still = hidden(CONFIG, params, *data)
    assert np.allclose(hidden(STILL, params, *data, keys_B=keys), still, atol=1e-6)
    dropped = hidden(CONFIG, params, *data, keys_B=keys)
    assert np.abs(dropped - still).max() > 0.1 and np.isfinite(dropped).all()
    order = np.asarray([2, 0, 1])
    assert np.allclose(hidden(CONFIG, params, *(x[order] for x in data), keys_B=keys[order]), dropped[order], atol=1e-5)
    other = hidden(CONFIG, params, *data, keys_B=jax.random.split(jax.random.key(6), 3))
    assert np.abs(other - dropped).max() > 0.1


def test_depth_in_a_loop_or_not_is_the_same(params, monkeypatch):
    data = sentences()
    unrolled = hidden(STILL, params, *data)
    monkeypatch.setattr(sentence, "UNROLLED_LAYERS", 1)
    looped = jax.jit(lambda p: heartlang.hidden(STILL, p, *data))
    assert "scan" in str(looped.trace(params).jaxpr)
    assert np.allclose(looped(params), unrolled, atol=1e-6)


def test_gelu_is_exact_with_its_gradient():
    x = np.linspace(-6, 6, 97).astype(np.float32)
    cdf = np.asarray([0.5 * math.erfc(-v / math.sqrt(2)) for v in x.tolist()])
    assert np.allclose(sentence.gelu(x), x * cdf, atol=1e-6)
    assert np.abs(sentence.gelu(x) - jax.nn.gelu(x)).max() > 1e-4  # the form with tanh
    slope = jax.jit(jax.vmap(jax.grad(sentence.gelu)))(x)
    assert np.allclose(slope, cdf + x * np.exp(-0.5 * x * x) / math.sqrt(2 * math.pi), atol=2e-6)
    assert sentence.gelu(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16
