"""The Adam probe: what it learns, what it must not depend on, and what it costs."""

import numpy as np
import pytest

from ecg_jax.evaluation import linear
from ecg_jax.evaluation import metrics as m
from ecg_jax.evaluation.linear import Split


def split(n, seed, width=20, labels=3):
    rng = np.random.default_rng(seed)
    truth = np.random.default_rng(99).normal(size=(width, labels)) * 0.7
    x = rng.normal(size=(n, width)).astype(np.float32)
    logits = x @ truth - 1.5
    y = (rng.random(logits.shape) < m.probability(logits)).astype(np.int8)
    x = x * np.geomspace(1e-3, 1e3, width).astype(np.float32) + 5  # probes must not care about units
    return Split(x, y, rng.integers(0, 2**64, n, dtype=np.uint64)), logits


@pytest.fixture(scope="module")
def data():
    (train, _), (val, _), (test, truth) = split(900, 0), split(300, 1), split(1500, 2)
    return train, val, test, truth


def test_learns_nearly_what_there_is_to_learn(data):
    train, val, test, truth = data
    probe = linear.fit(train, val)
    got, floor = (
        m.macro(m.bce(probe.logits(test.features), test.labels))[0],
        m.macro(m.bce(truth, test.labels))[0],
    )
    prior = m.logit(m.prevalence(train.labels)) + 0 * truth
    assert floor < got < floor + 0.1 * (m.macro(m.bce(prior, test.labels))[0] - floor)


def test_the_epoch_is_the_lowest_point_of_the_validation_curve(data):
    train, val, _, _ = data
    probe = linear.fit(train, val, epochs_max=300)
    assert probe.epoch == np.argmin(probe.curve) and probe.val_loss == probe.curve.min()
    again = m.macro(m.bce(probe.logits(val.features), val.labels))[0]
    assert probe.val_loss == pytest.approx(again, abs=1e-5)
    small = Split(train.features[:30], train.labels[:30], train.record_hash[:30])
    early = linear.fit(small, val, lr=0.05, patience=5)
    assert early.converged and not linear.fit(train, val, epochs_max=10).converged
    assert early.epoch < len(early.curve) - 1 <= early.epoch + 5  # thirty records: validation stops it


def test_row_order_does_not_matter_but_the_seed_does(data):
    train, val, _, _ = data
    order, order_val = np.random.default_rng(3).permutation(900), np.random.default_rng(4).permutation(300)
    moved = Split(train.features[order], train.labels[order], train.record_hash[order])
    moved_val = Split(val.features[order_val], val.labels[order_val], val.record_hash[order_val])
    one, two = linear.fit(train, val, seed=1), linear.fit(moved, moved_val, seed=1)
    assert np.array_equal(one.weights, two.weights) and np.array_equal(one.bias, two.bias)
    assert not np.array_equal(one.weights, linear.fit(train, val, seed=2).weights)


def test_zero_columns_change_nothing(data):
    train, val, test, _ = data

    def widened(s, to):
        return Split(np.pad(s.features, ((0, 0), (0, to - s.features.shape[1]))), s.labels, s.record_hash)

    probe = linear.fit(train, val)
    for width in (64, 100):  # 100 crosses into the next multiple of 64
        wide = linear.fit(widened(train, width), widened(val, width))
        np.testing.assert_allclose(wide.logits(widened(test, width).features), probe.logits(test.features), atol=2e-3)
        assert not wide.weights[20:].any() and wide.epoch == probe.epoch


def test_unknown_labels_are_masked_not_negative(data):
    train, val, test, _ = data
    hidden = train.labels.copy()
    hidden[np.random.default_rng(0).random(len(hidden)) < 0.5, 0] = m.UNKNOWN
    as_negative = np.where(hidden == m.UNKNOWN, 0, hidden)
    losses = [
        m.bce(linear.fit(Split(train.features, y, train.record_hash), val).logits(test.features), test.labels)[0]
        for y in (train.labels, hidden, as_negative)
    ]
    assert losses[1] < losses[0] + 0.02 and losses[2] > losses[1] + 0.02
    # What a record shows for a label that is unknown there has no say in that label at all.
    gone = np.where(np.arange(3) == 0, m.UNKNOWN, train.labels)
    probe = linear.fit(Split(train.features, gone, train.record_hash), val)
    assert not probe.weights[:, 0].any() and probe.weights[:, 1].any()


def test_constant_and_nearly_constant_columns_do_no_harm(data):
    train, val, test, _ = data

    def with_constant(s):
        jitter = np.float32(1e-5) * (s.record_hash % np.uint64(2)).astype(np.float32)  # rounding of a constant
        return Split(np.column_stack([s.features, 100 + jitter, 0 * jitter + 7]), s.labels, s.record_hash)

    got = linear.fit(with_constant(train), with_constant(val)).logits(with_constant(test).features)
    np.testing.assert_allclose(got, linear.fit(train, val).logits(test.features), atol=2e-3)


def test_encoders_of_other_widths_share_the_compiled_probe(data):
    train, val, _, _ = data
    linear.fit(train, val)
    before = linear._train._cache_size()
    for width in (5, 11, 20):
        linear.fit(*(Split(s.features[:800, :width], s.labels[:800], s.record_hash[:800]) for s in (train, val)))
    assert linear._train._cache_size() == before


def test_nothing_to_learn_from_is_refused(data):
    train, val, _, _ = data
    with pytest.raises(ValueError, match="train split"):
        linear.fit(Split(train.features, np.full_like(train.labels, -1), train.record_hash), val)
    with pytest.raises(ValueError, match="val split are not finite"):
        linear.fit(train, Split(val.features * np.nan, val.labels, val.record_hash))
