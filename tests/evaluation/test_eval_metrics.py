"""Metrics against their definitions, written out pair by pair and threshold by threshold."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ecg_jax.evaluation import metrics as m


def auroc_by_pairs(scores, labels):
    positive, negative = scores[labels == 1], scores[labels == 0]
    if not len(positive) or not len(negative):
        return np.nan
    wins = sum((p > q) + 0.5 * (p == q) for p in positive for q in negative)
    return wins / (len(positive) * len(negative))


def ap_by_thresholds(scores, labels):
    if not (labels == 1).any() or not (labels == 0).any():
        return np.nan
    total, recall_before = 0.0, 0.0
    for t in sorted(set(scores[labels >= 0]), reverse=True):
        called = scores >= t
        hits = ((labels == 1) & called).sum()
        precision = hits / ((labels >= 0) & called).sum()
        recall = hits / (labels == 1).sum()
        total += (recall - recall_before) * precision
        recall_before = recall
    return total


def f1_at(scores, labels, t):
    called = scores >= t
    hits = ((labels == 1) & called).sum()
    wrong = ((labels == 0) & called).sum() + ((labels == 1) & ~called).sum()
    return 2 * hits / (2 * hits + wrong)


columns = st.lists(
    st.tuples(st.sampled_from([-3.0, -1.0, -0.0, 0.0, 0.5, 2.0]), st.sampled_from([-1, 0, 0, 1])),
    min_size=1,
    max_size=40,
)


@settings(max_examples=150, deadline=None)
@given(columns)
def test_ties_unknowns_and_single_classes_are_as_defined(rows):
    scores = np.array([r[0] for r in rows])[:, None]
    labels = np.array([r[1] for r in rows], np.int8)[:, None]
    want = auroc_by_pairs(scores[:, 0], labels[:, 0])
    np.testing.assert_allclose(m.auroc(scores, labels)[0], want, rtol=0, atol=1e-12)
    want = ap_by_thresholds(scores[:, 0], labels[:, 0])
    np.testing.assert_allclose(m.average_precision(scores, labels)[0], want, rtol=0, atol=1e-12)
    threshold = m.best_f1_threshold(scores, labels)
    if np.isfinite(threshold[0]):
        best = max(f1_at(scores[:, 0], labels[:, 0], t) for t in scores[labels >= 0])
        assert m.at_thresholds(scores, labels, threshold)["f1"][0] == pytest.approx(best, abs=1e-12)
    else:
        assert np.isnan(want)


def test_continuous_scores_of_several_labels_at_once():
    rng = np.random.default_rng(0)
    labels = rng.choice(np.array([-1, 0, 1], np.int8), (60, 4), p=[0.1, 0.6, 0.3])
    scores = rng.normal(size=(60, 4)) + labels
    for k in range(4):
        assert m.auroc(scores, labels)[k] == pytest.approx(auroc_by_pairs(scores[:, k], labels[:, k]), abs=1e-12)
        want = ap_by_thresholds(scores[:, k], labels[:, k])
        assert m.average_precision(scores, labels)[k] == pytest.approx(want, abs=1e-12)


def test_a_known_case_by_hand():
    scores = np.array([[0.1], [0.4], [0.35], [0.8]])
    labels = np.array([[0], [0], [1], [1]], np.int8)
    assert m.auroc(scores, labels)[0] == 0.75
    assert m.average_precision(scores, labels)[0] == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)


def test_bce_is_exact_at_huge_logits_and_leaves_unknowns_out():
    logits = np.array([[1000.0, 0.0], [-1000.0, 0.0], [-1000.0, 5.0]])
    labels = np.array([[1, 1], [0, 0], [1, -1]], np.int8)
    np.testing.assert_allclose(m.bce(logits, labels), [1000 / 3, np.log(2)], rtol=1e-15)
    small = np.array([[-40.0]])  # -log(1 - sigmoid(-40)) underflows where it is computed from the probability
    assert m.bce(small, np.zeros((1, 1), np.int8))[0] == pytest.approx(np.exp(-40), rel=1e-12)


def test_brier_and_thresholded_rates_by_hand():
    logits = np.log(np.array([[0.9], [0.2], [0.6], [0.5]]) / np.array([[0.1], [0.8], [0.4], [0.5]]))
    labels = np.array([[1], [0], [0], [-1]], np.int8)
    assert m.brier(logits, labels)[0] == pytest.approx((0.01 + 0.04 + 0.36) / 3)
    got = m.at_thresholds(logits, labels, np.array([0.0]))
    assert (got["sensitivity"][0], got["specificity"][0]) == (1.0, 0.5)
    assert got["f1"][0] == pytest.approx(2 / 3)


def test_single_class_labels_have_losses_but_no_areas_and_leave_the_macro():
    labels = np.array([[0, 1, -1], [0, 0, -1]], np.int8)
    logits = np.array([[-2.0, 1.0, 3.0], [-2.0, -1.0, 3.0]])
    got = m.evaluate(logits, labels, np.zeros(3))
    assert np.isnan(got["auroc"]).tolist() == [True, False, True]
    assert np.isnan(got["f1"]).tolist() == [True, False, True]
    assert np.isnan(got["bce"]).tolist() == [False, False, True]
    assert m.macro(got["auroc"]) == (1.0, 1)
    assert m.macro(got["bce"])[1] == 2
    assert m.macro(np.array([np.nan]))[1] == 0


def test_a_threshold_nobody_could_choose_gives_no_f1():
    labels = np.array([[1], [0]], np.int8)
    assert np.isnan(m.at_thresholds(np.zeros((2, 1)), labels, np.array([np.nan]))["f1"][0])


@pytest.mark.parametrize(
    ("logits", "labels"),
    [
        (np.full((2, 1), np.nan), np.zeros((2, 1))),
        (np.zeros((2, 1)), np.full((2, 1), 2)),
        (np.zeros(2), np.zeros(2)),
    ],
)
def test_what_is_no_prediction_is_refused(logits, labels):
    with pytest.raises(ValueError):
        m.bce(logits, labels)
