"""From stored int16 to the input: units, leads, crops, scale, zeros outside `valid`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ecg_jax.errors import UsageError
from ecg_jax.models import inputs
from ecg_jax.records.leads import INDEPENDENT, LEADS, expand_matrix


@functools.partial(jax.jit, static_argnames=("scale", "crop", "length"))
def _to_input(signal, valid, **options):
    return inputs.to_input(signal, valid, **options)


def _stored(records=3, length=1000, leads=12, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(0, 300, (records, length, leads)).astype(np.int16)


def _valid(*pairs):
    return jnp.asarray(pairs, jnp.int32)


def test_millivolt_and_lead_expansion():
    stored = _stored(leads=8)
    full = _valid((0, 1000), (0, 1000), (0, 1000))
    x, valid, log_gain = _to_input(jnp.asarray(stored), full, scale="mv")
    assert x.shape == (3, 1000, 12) and x.dtype == jnp.float32
    assert np.allclose(x, stored.astype(np.float32) * 1e-3 @ expand_matrix(), atol=1e-6)
    i, ii, iii = (x[:, :, LEADS.index(lead)] for lead in ("I", "II", "III"))
    assert np.allclose(iii, ii - i, atol=1e-6)
    assert np.array_equal(valid, full) and np.all(log_gain == 0)
    twelve, _, _ = _to_input(jnp.asarray(_stored()), full, scale="mv")
    assert np.allclose(twelve, _stored() * 1e-3, atol=1e-6) and len(INDEPENDENT) == 8


@pytest.mark.parametrize("scale", inputs.SCALES)
def test_padding_is_exactly_zero(scale):
    stored = _stored() + 500  # also where it is not valid
    valid = _valid((0, 1000), (100, 620), (300, 250))
    x, new, _ = _to_input(jnp.asarray(stored), valid, scale=scale, crop=500, length=512)
    assert x.shape == (3, 512, 12)
    for record, (start, length) in zip(x, np.asarray(new), strict=True):
        assert np.all(record[:start] == 0) and np.all(record[start + length :] == 0)
        assert np.all(np.abs(record[start : start + length]).sum(1) > 0)
    assert new.tolist()[0] == [0, 500] and new.tolist()[1] == [0, 500]
    assert new.tolist()[2] == [125, 250]


def test_centre_crop_is_the_middle_of_the_valid_span():
    stored = np.tile(np.arange(1, 1001, dtype=np.int16)[None, :, None], (2, 1, 12))
    x, valid, _ = _to_input(jnp.asarray(stored), _valid((0, 1000), (700, 300)), scale="mv", crop=500)
    assert np.allclose(x[0, [0, -1], 0], [0.251, 0.750])
    assert valid.tolist() == [[0, 500], [200, 300]] and float(x[1, 200, 0]) == pytest.approx(0.701)


def test_random_crop_stays_inside_and_belongs_to_the_record():
    stored = jnp.asarray(np.tile(np.arange(1, 1001, dtype=np.int16)[None, :, None], (64, 1, 12)))
    valid = jnp.tile(_valid((100, 700)), (64, 1))
    keys = jax.random.split(jax.random.key(0), 64)
    crop = lambda s, v, k: _to_input(s, v, scale="mv", crop=500, keys=k)  # noqa: E731
    x, new, _ = crop(stored, valid, keys)
    starts = np.round(np.asarray(x[:, 0, 0]) * 1000).astype(int) - 1
    assert starts.min() >= 100 and starts.max() <= 300 and len(set(starts)) > 32
    assert starts.min() < 130 and starts.max() > 270
    assert np.all(np.asarray(new) == [0, 500])
    order = np.random.default_rng(0).permutation(64)
    assert np.array_equal(crop(stored, valid, keys[order])[0], x[order])
    short, new, _ = _to_input(stored[:1], _valid((0, 300)), scale="mv", crop=500, keys=keys[:1])
    assert new.tolist() == [[0, 300]] and short.shape == (1, 500, 12)


def test_gain_is_robust_common_and_logged():
    stored = _stored(4).astype(np.int32)
    stored[1] = stored[0] * 3
    stored[2] = stored[0]
    stored[2, 200:300] *= 20  # a burst of one second
    stored[3] = 0
    full = jnp.tile(_valid((0, 1000)), (4, 1))
    x, _, log_gain = _to_input(jnp.asarray(stored.astype(np.int16)), full)
    assert np.allclose(x[0], x[1], rtol=1e-4) and np.all(x[3] == 0)
    assert float(log_gain[1] - log_gain[0]) == pytest.approx(np.log(3), abs=1e-4)
    assert float(log_gain[2] - log_gain[0]) == pytest.approx(0, abs=0.03)
    blocks = np.abs(stored[0] * 1e-3).mean(1).reshape(10, 100).mean(1)
    assert float(log_gain[0]) == pytest.approx(np.log(np.median(blocks)), abs=1e-5)
    assert np.allclose(x[0] * np.exp(log_gain[0]), stored[0] * 1e-3, atol=1e-5)  # one gain over all leads
    assert np.isfinite(log_gain).all()


def test_gain_ignores_padding_and_crop():
    stored = _stored(1)
    short = np.zeros_like(stored)
    short[:, :400] = stored[:, :400]
    junk = short.copy()
    junk[:, 400:] = 30000
    gains = [_to_input(jnp.asarray(s), _valid((0, 400)))[2] for s in (short, junk)]
    assert np.array_equal(*gains)
    only = _to_input(jnp.asarray(stored[:, :400]), _valid((0, 400)))[2]
    assert np.allclose(only, gains[0])
    crops = [_to_input(jnp.asarray(stored), _valid((0, 1000)), crop=c)[2] for c in (500, 1000)]
    assert np.array_equal(*crops)


def test_zscore_is_per_lead_over_valid_samples():
    stored = _stored(2)
    stored[:, :, 3] = stored[:, :, 3] * 2 + 700
    x, _, log_gain = _to_input(jnp.asarray(stored), _valid((0, 1000), (200, 700)), scale="zscore")
    seen = np.asarray(x[1, 200:900])
    assert np.allclose(seen.mean(0), 0, atol=1e-4) and np.allclose(seen.std(0), 1, atol=1e-4)
    assert np.allclose(x[0].std(0), 1, atol=1e-4) and np.all(log_gain == 0)


def test_unknown_scale():
    with pytest.raises(UsageError, match="did you mean 'zscore'"):
        _to_input(jnp.zeros((1, 1000, 12), jnp.int16), _valid((0, 1000)), scale="z-score")
