"""Metrics against scikit-learn (extra `test`), with ties and labels of one class. Skipped without it."""

import numpy as np
import pytest

from ecg_jax.evaluation import calibration
from ecg_jax.evaluation import metrics as m

sklearn_metrics = pytest.importorskip("sklearn.metrics")


@pytest.fixture(scope="module")
def predictions():
    rng = np.random.default_rng(3)
    labels = (rng.random((700, 4)) < [0.02, 0.3, 0.9, 0.5]).astype(np.int8)
    logits = np.round(rng.normal(size=(700, 4)) + labels - 0.5, 1)  # hundreds of ties
    return logits, labels


def test_every_metric_is_scikit_learns_to_1e_12(predictions):
    logits, labels = predictions
    thresholds = m.best_f1_threshold(logits, labels)
    got = m.evaluate(logits, labels, thresholds)
    p = m.probability(logits)
    for k in range(4):
        y, z, called = labels[:, k], logits[:, k], logits[:, k] >= thresholds[k]
        want = {
            "bce": sklearn_metrics.log_loss(y, p[:, k]),
            "auroc": sklearn_metrics.roc_auc_score(y, z),
            "ap": sklearn_metrics.average_precision_score(y, z),
            "f1": sklearn_metrics.f1_score(y, called),
            "sensitivity": sklearn_metrics.recall_score(y, called),
            "specificity": sklearn_metrics.recall_score(y, called, pos_label=0),
            "brier": sklearn_metrics.brier_score_loss(y, p[:, k]),
        }
        for name in m.METRICS:
            assert got[name][k] == pytest.approx(want[name], abs=1e-12), (name, k)


def test_the_calibration_curve_is_scikit_learns(predictions):
    from sklearn.calibration import calibration_curve

    logits, labels = predictions
    mean, share, number = calibration.curve(logits, labels)
    for k in range(4):
        want_share, want_mean = calibration_curve(labels[:, k], m.probability(logits[:, k]), n_bins=10)
        filled = number[:, k] > 0
        np.testing.assert_allclose(share[filled, k], want_share, atol=1e-12)
        np.testing.assert_allclose(mean[filled, k], want_mean, atol=1e-12)


def test_the_line_of_recalibration_is_that_of_an_unpenalised_fit(predictions):
    from sklearn.linear_model import LogisticRegression

    logits, labels = predictions
    intercept, slope = calibration.recalibration(logits, labels)
    for k in range(4):
        fitted = LogisticRegression(C=np.inf, tol=1e-10, max_iter=1000).fit(logits[:, [k]], labels[:, k])
        assert (intercept[k], slope[k]) == pytest.approx((fitted.intercept_[0], fitted.coef_[0, 0]), abs=1e-5)
