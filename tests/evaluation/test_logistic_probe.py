"""The logistic probe: its optimum, choice of C, masks, labels that cannot be fitted; beside scikit-learn if there."""

import numpy as np
import pytest

from ecg_jax.evaluation import linear, logistic, metrics

GRID = (1e-3, 0.1, 10.0, 1e3)


def simulated(n=400, width=9, labels=3, seed=0):
    rng = np.random.default_rng(seed)
    x = (rng.normal(size=(n, width)) @ rng.normal(size=(width, width))).astype(np.float32)
    logits = (x - x.mean(0)) / x.std(0) @ np.random.default_rng(9).normal(size=(width, labels)) - 1
    y = (rng.random((n, labels)) < metrics.probability(logits)).astype(np.int8)
    return linear.Split(x, y, rng.integers(0, 2**63, n).astype(np.uint64))


def objective(x, y, w, b, c):
    known = y >= 0
    loss = metrics.losses((x @ w + b)[:, None], y[:, None]).sum() / known.sum()
    return loss + (w**2).sum() / (2 * c * known.sum())


@pytest.fixture(scope="module")
def splits():
    train = simulated()
    train.labels[np.random.default_rng(1).random(train.labels.shape) < 0.2] = metrics.UNKNOWN
    return train, simulated(200, seed=5)


def test_the_gradient_is_below_its_tolerance_at_every_c_and_nothing_near_is_better(splits):
    train, _ = splits
    mean, scale = linear.moments(train.features)
    x = (train.features.astype(np.float64) - mean) / scale
    label, c = np.repeat(np.arange(3), len(GRID)), np.tile(GRID, 3)
    found = logistic.solve(x, train.labels[None], np.zeros(len(c), int), label, c)
    assert found.gradient.max() <= logistic.TOLERANCE
    rng = np.random.default_rng(0)
    for p in range(len(c)):
        w, b, y = found.weights[:, p], found.bias[p], train.labels[:, label[p]]
        at = objective(x, y, w, b, c[p])
        assert at == pytest.approx(found.loss[p], abs=1e-12)
        for _ in range(5):
            assert objective(x, y, w + 1e-2 * rng.normal(size=w.shape), b + 1e-2 * rng.normal(), c[p]) > at


def test_c_is_each_labels_best_on_validation_and_unknown_labels_have_no_say(splits):
    train, val = splits
    (got,) = logistic.fit(train, val, grid=GRID)
    flipped = linear.Split(train.features, np.where(train.labels == -1, -1, train.labels), train.record_hash)
    losses = []
    for c in GRID:
        (one,) = logistic.fit(flipped, val, grid=(c,))
        losses.append(metrics.bce(one.logits(val.features), val.labels))
    np.testing.assert_array_equal(got.c, np.array(GRID)[np.argmin(losses, axis=0)])
    assert got.val_loss == pytest.approx(np.min(losses, axis=0).mean(), rel=1e-5)
    masked = train.labels.copy()
    masked[:, 1:] = metrics.UNKNOWN  # the other labels do not matter to the first
    masked[0, 1:], masked[1, 1:] = 1, 0
    (alone,) = logistic.fit(linear.Split(train.features, masked, train.record_hash), val, grid=GRID)
    np.testing.assert_allclose(alone.weights[:, 0], got.weights[:, 0], atol=1e-4)


def test_subsets_are_as_if_fitted_alone_and_a_label_of_one_class_is_its_prevalence(splits):
    train, val = splits
    some = np.arange(400) % 4 == 0
    whole, part = logistic.fit(train, val, subsets=[np.ones(400, bool), some], grid=GRID)
    hidden = np.where(some[:, None], train.labels, metrics.UNKNOWN)
    (alone,) = logistic.fit(linear.Split(train.features, hidden, train.record_hash), val, grid=GRID)
    np.testing.assert_allclose(part.weights, alone.weights, atol=1e-4)
    assert not np.allclose(part.weights, whole.weights, atol=1e-2)
    none = train.labels.copy()
    none[:, 1] = np.where(none[:, 1] == 1, 0, none[:, 1])
    (got,) = logistic.fit(linear.Split(train.features, none, train.record_hash), val, grid=GRID)
    assert not got.weights[:, 1].any() and np.isnan(got.c[1]) and np.isfinite(got.c[[0, 2]]).all()
    assert got.bias[1] == pytest.approx(metrics.logit(metrics.prevalence(none)[1]))


def test_separable_labels_and_constant_features_are_solved_too(splits):
    train, _ = splits
    x = np.concatenate([train.features, np.full((400, 2), 3.0, np.float32)], axis=1)
    y = (train.features[:, :1] > 0).astype(np.int8)
    held = linear.Split(x[::2], y[::2], train.record_hash[::2])
    (got,) = logistic.fit(linear.Split(x, y, train.record_hash), held)
    assert got.gradient.max() <= logistic.TOLERANCE and got.val_loss < 0.1
    with pytest.raises(ValueError, match="not finite"):
        logistic.fit(linear.Split(x * np.nan, y, train.record_hash), held)
    with pytest.raises(ValueError, match="no labelled record in the val"):
        logistic.fit(linear.Split(x, y, train.record_hash), linear.Split(x, np.full_like(y, -1), train.record_hash))


def test_the_loss_is_scikit_learns_to_1e_5(splits):
    lm = pytest.importorskip("sklearn.linear_model")
    train, _ = splits
    mean, scale = linear.moments(train.features)
    x = (train.features.astype(np.float64) - mean) / scale
    label, c = np.repeat(np.arange(3), len(GRID)), np.tile(GRID, 3)
    found = logistic.solve(x, train.labels[None], np.zeros(len(c), int), label, c)
    for p in range(len(c)):
        known = train.labels[:, label[p]] >= 0
        theirs = lm.LogisticRegression(C=c[p], tol=1e-9, max_iter=5000).fit(x[known], train.labels[known, label[p]])
        want = objective(x, train.labels[:, label[p]], theirs.coef_[0], theirs.intercept_[0], c[p])
        assert found.loss[p] == pytest.approx(want, abs=1e-9)
