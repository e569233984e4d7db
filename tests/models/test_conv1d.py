"""conv1d: every formulation is the same function, gradients included, over random shapes."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ecg_jax.models import conv, layers


def _normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def _case(batch, length, channels, out, taps, stride):
    x, w = _normal(0, batch, length, channels), _normal(1, taps, channels, out) / np.sqrt(taps * channels)
    return x, w, _normal(2, batch, -(-length // stride), out)


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def _run(x, w, cotangent, stride, impl, size=None):
    y, back = jax.vjp(lambda x, w: conv.conv1d(x, w, stride, impl, size), x, w)
    return y, *back(cotangent)


def _by_hand(x, w, cotangent, stride):
    """The definition in float64: forward and both gradients."""
    x, w, g = (np.asarray(a, np.float64) for a in (x, w, cotangent))
    out, before, after = conv.same_padding(x.shape[1], w.shape[0], stride)
    padded = np.pad(x, ((0, 0), (before, after + stride), (0, 0)))
    y, dx, dw = np.zeros(g.shape), np.zeros(padded.shape), np.zeros(w.shape)
    for tap, t in itertools.product(range(w.shape[0]), range(out)):
        y[:, t] += padded[:, t * stride + tap] @ w[tap]
        dx[:, t * stride + tap] += g[:, t] @ w[tap].T
        dw[tap] += padded[:, t * stride + tap].T @ g[:, t]
    return y, dx[:, before : before + x.shape[1]], dw


def _close(got, wanted):
    for a, b in zip(got, wanted, strict=True):
        assert a.shape == b.shape
        assert np.abs(np.asarray(a) - b).max() <= 1e-5 * max(np.abs(b).max(), 1e-3)


# Compilation is all the time that this takes: the machine code may be slow.
@functools.partial(jax.jit, static_argnums=(3, 4), compiler_options={"xla_backend_optimization_level": 0})
def _run_all(x, w, cotangent, stride, more):
    sizes = {"blocked": 1 + more % 5, "spectral": w.shape[0] + more}
    names = [name for name in conv.CONV_IMPLS if name != "auto"]
    return [_run(x, w, cotangent, stride, name, sizes.get(name)) for name in names]


@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 2),
    length=st.integers(1, 70),
    channels=st.integers(1, 3),
    out=st.integers(1, 3),
    half=st.integers(0, 15),
    stride=st.integers(1, 8),
    more=st.integers(0, 40),
)
@example(batch=1, length=1, channels=1, out=1, half=15, stride=8, more=0)
@example(batch=2, length=7, channels=2, out=2, half=8, stride=1, more=3)  # kernel longer than the signal
@example(batch=2, length=20, channels=2, out=3, half=0, stride=4, more=1)  # stride longer than the kernel
@example(batch=2, length=64, channels=2, out=30, half=8, stride=4, more=0)  # wide enough not to be folded
def test_formulations_are_one_function(batch, length, channels, out, half, stride, more):
    x, w, cotangent = _case(batch, length, channels, out, 2 * half + 1, stride)
    wanted = _by_hand(x, w, cotangent, stride)
    for got in _run_all(x, w, cotangent, stride, more):
        _close(got, wanted)


@pytest.mark.parametrize("size", [None, 17, 18, 31, 48, 80])
def test_spectral_at_full_width(size):
    x, w, cotangent = _case(2, 130, 64, 48, 17, 1)
    _close(_run(x, w, cotangent, 1, "spectral", size), _run(x, w, cotangent, 1, "direct"))


def test_spectral_keeps_records_and_distant_samples_apart():
    x, w, cotangent = _case(3, 200, 4, 24, 17, 1)
    loud = _run(x.at[1, 100].set(1e4), w, cotangent, 1, "spectral", 48)[0]
    calm = _run(x, w, cotangent, 1, "spectral", 48)[0]
    assert np.array_equal(loud[0], calm[0]) and np.array_equal(loud[2], calm[2])
    assert np.allclose(loud[1, :60], calm[1, :60], atol=1e-6)
    assert not np.allclose(loud[1, 95:105], calm[1, 95:105], atol=1.0)
    broken = _run(x.at[1, 100].set(jnp.nan), w, cotangent, 1, "spectral", 48)[0]
    assert np.isfinite(broken[0]).all() and np.isnan(broken[1, 100]).all()


def test_spectral_gradient_transforms_the_cotangent_once():
    """Nine products: three of each kind (transform, product per frequency, inverse), of kernels and of signals."""
    x, w, cotangent = _case(2, 96, 8, 8, 17, 1)
    jaxpr = str(jax.make_jaxpr(lambda *a: _run(*a, 1, "spectral", 48))(x, w, cotangent))
    assert jaxpr.count("dot_general[") == 9


@pytest.mark.parametrize("impl", [name for name in conv.CONV_IMPLS if name != "auto"])
def test_bfloat16(impl):
    x, w, cotangent = _case(2, 64, 8, 6, 9, 2)
    wanted = _run(x, w, cotangent, 2, "direct")
    got = _run(*(a.astype(jnp.bfloat16) for a in (x, w, cotangent)), 2, impl)
    for a, b in zip(got, wanted, strict=True):
        assert a.dtype == jnp.bfloat16
        assert np.abs(np.asarray(a, np.float32) - b).max() < 0.03 * np.abs(b).max()


def test_what_is_refused():
    x, w = jnp.zeros((1, 8, 1)), jnp.zeros((3, 1, 1))
    with pytest.raises(ValueError, match="odd"):
        layers.conv1d(x, jnp.zeros((4, 1, 1)))
    with pytest.raises(ValueError, match="unknown conv1d"):
        layers.conv1d(x, w, impl="winograd")
    with pytest.raises(ValueError, match="shorter than 3"):
        layers.conv1d(x, jnp.zeros((3, 1, 24)), impl="spectral", size=2)


def test_choice_falls_back_where_nobody_measured():
    assert conv.choose(512, 17, 12, 4, 1, "gpu") == ("direct", None)
    assert conv.choose(512, 17, 12, 4, 1, "abacus", "bfloat16") == ("direct", None)
    assert conv.choose(512, 5, 12, 4, 1, "cpu") == ("blocked", 8)
    assert conv.choose(3, 5, 12, 4, 1, "cpu") == ("blocked", 4)
    assert conv.choose(1024, 5, 200, 96, 1, "cpu") == ("direct", None)
    assert conv.choose(1024, 5, 200, 96, 4, "cpu") == ("polyphase", None)
    assert conv.choose(1024, 1, 200, 96, 4, "cpu") == ("direct", None)


def test_choice_takes_the_nearest_measurement(monkeypatch):
    shape = {"backend": "cpu", "dtype": "float32", "taps": 7, "stride": 1, "batch": 32, "length": 512}
    rows = (
        shape | {"channels": 64, "out": 64, "impl": "spectral", "size": 24},
        shape | {"channels": 90, "out": 90, "impl": "patches", "size": None},
    )
    monkeypatch.setattr(conv, "measured", lambda: rows)
    assert conv.choose(512, 7, 64, 64, 1, "cpu") == ("spectral", 24)
    assert conv.choose(600, 7, 70, 66, 1, "cpu", batch=20) == ("spectral", 24)
    assert conv.choose(512, 7, 88, 80, 1, "cpu") == ("patches", None)
    for other in (
        {"taps": 9},
        {"stride": 2},
        {"dtype": "bfloat16"},
        {"backend": "gpu"},
        {"channels": 300},
        {"length": 100},
        {"batch": 1},
    ):
        asked = dict(length=512, taps=7, channels=64, out=64, stride=1, backend="cpu") | other
        assert conv.choose(**asked)[0] in ("direct", "polyphase"), other


def test_every_row_of_the_table_is_runnable():
    assert conv.measured()
    seen = set()
    for row in conv.measured():
        assert row["impl"] in conv.CONV_IMPLS[1:]
        assert (row["size"] is not None) == (row["impl"] in ("blocked", "spectral"))
        key = tuple(row[name] for name in row if name not in ("impl", "size"))
        assert key not in seen
        seen.add(key)
        asked = {
            name: row[name] for name in ("length", "taps", "channels", "out", "stride", "backend", "dtype", "batch")
        }
        assert conv.choose(**asked) == (row["impl"], row["size"])
