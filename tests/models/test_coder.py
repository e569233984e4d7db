"""Codes of records on the device: each record's own, whatever goes through with it."""

import dataclasses

import jax
import numpy as np
import pytest

from ecg_jax.models import coder, vqhbr
from ecg_jax.records.windows import NO_CODE

CONFIG = vqhbr.Config(width=16, encoder_layers=1, decoder_layers=1, heads=1, head_size=8, mlp=16, codes=40, code_dim=8)
INFO = {"scale": "gain", "indices": True}


@pytest.fixture(scope="module")
def params():
    return jax.jit(lambda key: vqhbr.init(CONFIG, key))(jax.random.key(0))


def test_the_batch_and_the_order_of_records_change_no_clear_code(params, monkeypatch):
    """Nothing of the other records reaches a record's codes: only rounding may differ between programs."""
    monkeypatch.setattr(coder, "SIZES", (144, 256))  # fewer programs to compile
    rng = np.random.default_rng(0)
    signal = rng.normal(0, 300, (40, 1000, 8)).astype(np.int16)
    valid = np.stack([rng.integers(0, 100, 40), rng.integers(500, 900, 40)], 1).astype(np.int32)
    peaks = np.full((40, 50), -1, np.int16)
    for i, n in enumerate(rng.integers(0, 26, 40)):
        low, high = valid[i][0], valid[i].sum()
        peaks[i, :n] = np.sort(rng.choice(np.arange(low, high), n, replace=False))

    def codes(batch, rows):
        own = coder.Coder(CONFIG, params, INFO, "robust", batch)
        out = np.empty((40, 256), np.uint16)
        out[rows] = own.encode(signal[rows], valid[rows], peaks[rows])
        return out

    one = codes(7, np.arange(40))
    np.testing.assert_array_equal(codes(7, np.arange(40)), one)
    n = np.minimum((peaks >= 0).sum(1), 21)
    assert ((one != NO_CODE).sum(1) == 12 * n).all() and len(set(n.tolist())) > 8
    for batch, rows in ((7, rng.permutation(40)), (40, np.arange(40))):
        other = codes(batch, rows)
        np.testing.assert_array_equal(other == NO_CODE, one == NO_CODE)
        assert (other == one).mean() > 0.999


def test_as_published_padding_takes_its_part(params):
    plain, published = (
        coder.Coder(dataclasses.replace(CONFIG, faithful=way), params, INFO, "robust", 4) for way in (False, True)
    )
    peaks = np.full((4, 50), -1, np.int16)
    peaks[:, :3] = 200, 300, 420
    records = np.random.default_rng(0).normal(0, 300, (4, 1000, 12)).astype(np.int16), np.array([[0, 1000]] * 4), peaks
    assert plain.encode(*records).shape == published.encode(*records).shape == (4, 256)
    assert published.macs / plain.macs > 256 / 96 - 0.01 and plain.records == published.records == 4


def test_a_dead_lead_has_no_codes_as_padding_has_none(params):
    """To the codebook zeros are padding, and all of it has one code, which says nothing of a beat."""
    head = params["encode_head"]
    params = params | {"encode_head": head | {"out_bias": head["out_bias"] + np.linspace(-1, 1, CONFIG.code_dim)}}
    signal = np.random.default_rng(0).normal(0, 300, (2, 1000, 12)).astype(np.int16)
    signal[1, :, [2, 7]] = 0
    peaks = np.full((2, 50), -1, np.int16)
    peaks[:, :4] = 200, 300, 420, 800
    codes = coder.Coder(CONFIG, params, INFO, "robust", 2).encode(signal, np.array([[0, 1000]] * 2, np.int32), peaks)
    there = codes[:, :48].reshape(2, 12, 4) != NO_CODE
    assert there[0].all() and (codes[:, 48:] == NO_CODE).all()
    assert np.flatnonzero(~there[1].all(1)).tolist() == [2, 7] and not there[1][[2, 7]].any()
    code = coder.padding_code(CONFIG, params)
    tokens, there = jax.numpy.zeros((1, 12, 96)), jax.numpy.zeros((1, 12), bool).at[:, :2].set(True)
    lead = time = jax.numpy.ones((1, 12), int)
    tokens = tokens.at[0, 0, 3].set(1.0)
    z = jax.jit(lambda params: vqhbr.encode(CONFIG, params, tokens, lead, time, there))(params)
    assert (z[0] @ params["codebook"].T).argmax(1)[1:].tolist() == [code] * 11  # zeros in a dead lead, and padding
