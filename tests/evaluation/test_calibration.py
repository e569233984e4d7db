"""Calibration by its definition: bins, error, and the line of recalibration."""

import numpy as np
import pytest

from ecg_jax.evaluation import calibration
from ecg_jax.evaluation import metrics as m


def test_bins_are_as_counted_by_hand_and_unknowns_are_left_out():
    p = np.array([[0.05], [0.05], [0.95], [0.95], [0.5]])
    labels = np.array([[0], [1], [1], [1], [-1]], np.int8)
    mean, share, number = calibration.curve(m.logit(p), labels)
    assert number[:, 0].tolist() == [2, 0, 0, 0, 0, 0, 0, 0, 0, 2]
    assert mean[[0, -1], 0] == pytest.approx([0.05, 0.95]) and share[[0, -1], 0].tolist() == [0.5, 1.0]
    assert calibration.ece(m.logit(p), labels)[0] == pytest.approx(0.5 * 0.45 + 0.5 * 0.05)
    assert np.isnan(calibration.ece(m.logit(p), np.full_like(labels, -1))[0])


def test_calibrated_predictions_have_intercept_0_and_slope_1_and_doubled_ones_a_half():
    rng = np.random.default_rng(0)
    logits = rng.normal(-1, 1.5, (50_000, 1))
    labels = (rng.random(logits.shape) < m.probability(logits)).astype(np.int8)
    intercept, slope = calibration.recalibration(logits, labels)
    assert (intercept[0], slope[0]) == pytest.approx((0, 1), abs=0.06)
    intercept, slope = calibration.recalibration(2 * logits + 1, labels)
    assert slope[0] == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize(
    ("logits", "labels"),
    [([-1, 0, 1, 2], [0, 0, 1, 1]), ([1, 1, 1, 1], [0, 0, 1, 1]), ([0, 1, 2, 3], [0, 0, 0, 0])],
)
def test_where_there_is_no_line_there_is_no_number(logits, labels):
    got = calibration.recalibration(np.array(logits, float)[:, None], np.array(labels, np.int8)[:, None])
    assert np.isnan(got[0][0]) and np.isnan(got[1][0])
