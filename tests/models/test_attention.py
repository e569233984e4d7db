"""Attention: every formulation that runs here is one function, gradients, masks and half precision included."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ecg_jax.errors import UsageError
from ecg_jax.models import attention as attention_lib
from ecg_jax.models.attention import attention


def _packed(batch, tokens, heads, features, dtype=jnp.float32, seed=0):
    q_key, seen_key, ct_key = jax.random.split(jax.random.key(seed), 3)
    qkv = 2 * jax.random.normal(q_key, (batch, tokens, 3, heads, features), dtype)
    seen = jax.random.bernoulli(seen_key, 0.6, (batch, tokens)).at[:, 0].set(True)
    return qkv, seen, jax.random.normal(ct_key, (batch, tokens, heads, features), dtype)


@functools.partial(jax.jit, static_argnums=0)
def _value_and_gradient(impl, qkv, seen, ct):
    out, back = jax.vjp(lambda x: attention(x, seen, impl), qkv)
    return out, back(ct)[0]


def _reference(qkv, seen):
    """In float64 NumPy, a loop over everything."""
    qkv = np.asarray(qkv, np.float64)
    out = np.zeros((*qkv.shape[:2], *qkv.shape[3:]))
    for b, h in np.ndindex(qkv.shape[0], qkv.shape[3]):
        q, k, v = (qkv[b, :, i, h] for i in range(3))
        logits = np.where(np.asarray(seen)[b], q @ k.T / np.sqrt(q.shape[1]), -np.inf)
        share = np.exp(logits - logits.max(1, keepdims=True))
        out[b, :, h] = share @ v / share.sum(1, keepdims=True)
    return out


def _close(a, b, bound):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.abs(a - b).max() <= bound * np.abs(b).max()


@settings(max_examples=6, deadline=None)
@given(st.integers(1, 4), st.integers(1, 9), st.integers(1, 3), st.sampled_from([1, 4, 5]), st.integers(0, 99))
def test_all_formulations_agree_with_gradients(batch, tokens, heads, features, seed):
    qkv, seen, ct = _packed(batch, tokens, heads, features, seed=seed)
    got = {impl: _value_and_gradient(impl, qkv, seen, ct) for impl in attention_lib.available()}
    assert {"xla", "matmul", "chunked"} <= set(got)
    wanted = _reference(qkv, seen)
    for out, gradient in got.values():
        assert _close(out, wanted, 1e-5)
        assert np.abs(gradient - got["matmul"][1]).max() <= 1e-5 * max(1.0, np.abs(got["matmul"][1]).max())


def test_half_precision_keeps_softmax_in_float32():
    qkv, seen, ct = _packed(2, 40, 2, 8, jnp.bfloat16)
    wanted = _value_and_gradient("matmul", *(x.astype(jnp.float32) for x in (qkv,)), seen, ct.astype(jnp.float32))
    for impl in attention_lib.available(jnp.bfloat16):
        got = _value_and_gradient(impl, qkv, seen, ct)
        for a, b in zip(got, wanted, strict=True):
            assert a.dtype == jnp.bfloat16 and _close(a, b, 0.02)
        # Every exponential is taken in float32.
        text = str(jax.make_jaxpr(lambda x, impl=impl: _value_and_gradient(impl, x, seen, ct))(qkv))
        exponentials = [line for line in text.splitlines() if "= exp " in line or "= exp[" in line]
        assert impl == "cudnn" or exponentials
        assert all(":f32[" in line for line in exponentials)


@pytest.mark.parametrize("impl", ["xla", "matmul", "chunked"])
def test_hidden_tokens_do_not_matter(impl):
    qkv, _, ct = _packed(2, 6, 3, 4)
    seen = jnp.asarray([[True] * 6, [True, True, False, True, False, True]])
    run = functools.partial(_value_and_gradient, impl)
    out, gradient = run(qkv, seen, ct)
    assert np.all(np.asarray(gradient[1, 2, 1:]) == 0) and np.abs(gradient[1, 3, 1:]).min() > 0
    assert np.allclose(out, run(qkv.at[1, 2, 1:].set(50.0), seen, ct)[0], atol=1e-6)
    assert not np.allclose(out, run(qkv.at[1, 3, 1:].set(50.0), seen, ct)[0], atol=1e-3)


def test_large_logits_stay_finite():
    qkv, seen, ct = _packed(1, 8, 1, 4)
    for impl in attention_lib.available():
        out, gradient = _value_and_gradient(impl, 60 * qkv, seen, ct)
        assert np.isfinite(out).all() and np.isfinite(gradient).all()


def test_chunks_change_nothing(monkeypatch):
    qkv, seen, ct = _packed(6, 10, 2, 4)
    text = str(jax.make_jaxpr(lambda x: attention(x, seen, "chunked"))(qkv))
    assert "scan[" not in text
    whole = _value_and_gradient("matmul", qkv, seen, ct)
    monkeypatch.setattr(attention_lib, "chunk_records", lambda batch, _: 2)
    assert "scan[" in str(jax.make_jaxpr(lambda x: attention(x, seen, "chunked"))(qkv))
    got = jax.jit(lambda: _value_and_gradient.__wrapped__("chunked", qkv, seen, ct))()
    for a, b in zip(got, whole, strict=True):
        assert _close(a, b, 3e-6)


def test_records_of_a_chunk():
    records = attention_lib.chunk_records.__wrapped__
    core = attention_lib.CHUNK_BYTES_PER_CORE
    assert records(8, 1) == 8 and records(7, 2**40) == 1  # tiny scores together, huge ones record by record
    assert 8 % records(8, core) == 0 and records(8, core) >= 2


def test_memory_of_the_gradient_is_not_quadratic_in_tokens(monkeypatch):
    monkeypatch.setattr(attention_lib, "chunk_records", lambda batch, _: 4)

    def temporary(impl):
        shapes = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in _packed(64, 200, 4, 4))
        return _value_and_gradient.lower(impl, *shapes).compile().memory_analysis().temp_size_in_bytes

    scores = 4 * 64 * 4 * 200**2
    assert temporary("matmul") > scores > 2 * temporary("chunked")


def test_refusals_name_the_choices():
    qkv, seen, _ = _packed(1, 2, 1, 2)
    with pytest.raises(UsageError, match="did you mean 'matmul'"):
        attention(qkv, seen, "matmull")
    with pytest.raises(UsageError, match="half precision"):
        attention(qkv, seen, "cudnn")
