"""How much each patient moves a metric: the first-order share of every patient in BCE, Brier score and AUROC.

`values[i]` is what the metric gains, times the number of patients P, when patient i weighs a little more: the mean over
patients is 0, the metric's standard error is their standard deviation over sqrt(P), and a resample moves the metric by
the mean of its values (to first order). Records of one patient are added first, so that they count as one. For AUROC
these are the placement values of DeLong, DeLong and Clarke-Pearson (1988), summed within patients as Obuchowski (1997)
does. Draws nothing. Invariant: values of several labels may be averaged, of two models subtracted.
"""

from typing import NamedTuple

import numpy as np


def of_mean(per_record: np.ndarray, known: np.ndarray, patient: np.ndarray, patients: int) -> np.ndarray:
    """float64 [P, K] for the mean over known records of `per_record` [n, K] (0 where unknown); known bool [n, K];
    patient int [n] in 0..P-1. NaN for a label without a known record.
    """
    total, number = _sums(np.concatenate([per_record, known], axis=1, dtype=np.float64), patient, patients)
    count = np.where(number.sum(0) > 0, number.sum(0), np.nan)
    return patients * (total - total.sum(0) / count * number) / count


class Area(NamedTuple):
    """Of AUROC: shares float64 [P, K]; of each label its standard error and that error's degrees of freedom [K]."""

    shares: np.ndarray
    error: np.ndarray
    free: np.ndarray


def of_auroc(scores: np.ndarray, labels: np.ndarray, patient: np.ndarray, patients: int) -> Area:
    """Influence and precision of AUROC of `scores` [n, K] with labels [n, K] (-1 unknown); NaN where a class is absent.

    The variance is that of the patients' shares, patients with and without a positive record apart, each times
    m / (m - 1), less the interaction of the two samples, which DeLong's estimate counts twice (Bamber 1975 has the
    unbiased form). Placements of a good classifier are skewed, and the variance of m of them is less sure than that of
    m normal values: the degrees of freedom are Satterthwaite's (1946), with each sample's own kurtosis.
    """
    out = Area(np.full((patients, scores.shape[1]), np.nan), *np.full((2, scores.shape[1]), np.nan))
    for k in range(scores.shape[1]):
        at = [np.flatnonzero(labels[:, k] == value) for value in (0, 1)]
        if not (len(at[0]) and len(at[1])):
            continue
        low, high = (scores[rows, k] for rows in at)
        (_, under), (ties, over) = _below(high, low), _below(low, high)
        # Share of the other class that each record is ranked rightly against, ties as half.
        share = [1 - under / len(high), over / len(low)]
        area = share[1].mean()
        out.shares[:, k] = 0.0
        for rows, placed in zip(at, share, strict=True):
            out.shares[:, k] += patients / len(rows) * np.bincount(patient[rows], placed - area, patients)
        of_pair = area * (1 - area) - ties.mean() / len(low) / 4  # variance of one pair's 0, 1/2 or 1
        twice = max(of_pair - share[0].var() - share[1].var(), 0.0) / (len(low) * len(high))
        has = [np.bincount(patient[rows], minlength=patients) > 0 for rows in at]
        parts, doubt = zip(
            *(_spread(out.shares[who, k]) for who in (has[1], has[0] & ~has[1]) if who.any()), strict=True
        )
        variance, doubt = sum(parts) / patients**2, sum(doubt) / patients**4
        out.error[k] = np.sqrt(max(variance - twice, variance / 2))
        out.free[k] = max(2 * variance**2 / doubt, 1.0) if doubt > 0 else 1.0
    return out


def _spread(values: np.ndarray) -> tuple[float, float]:
    """(m times the variance of m `values` around 0, and the variance of that)."""
    m, squares = len(values), values**2
    if m < 4 or not squares.any():
        return squares.sum() * m / max(m - 1, 1), 2 * squares.sum() ** 2 / max(m - 1, 1)
    excess = (values**4).mean() / squares.mean() ** 2 - 3
    excess = max(((m + 1) * excess + 6) * (m - 1) / ((m - 2) * (m - 3)), -1.2)  # unbiased under normality; a uniform's
    total = squares.sum() * m / (m - 1)
    return total, total**2 * (2 / (m - 1) + excess / m)


def studentised(values: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(standard error [K], draws of (estimate - truth) / its standard error [R, K]) by the bootstrap of `values` [P, K]
    with patient counts [P, R]. Source: Efron and Tibshirani (1993), section 12.5.

    A draw whose own spread is zero says nothing and is NaN. Columns of NaN stay NaN.
    """
    patients, number = counts.shape
    free = patients / max(patients - 1, 1)
    error = np.sqrt((values**2).mean(0) * free / patients)
    pair = np.concatenate([values, values**2], axis=1)
    moments = np.concatenate([(counts[:, i : i + 250].T @ pair) / patients for i in range(0, number, 250)])
    mean, square = np.split(moments, 2, axis=1)
    spread = np.sqrt(np.maximum(square - mean**2, 0) * free / patients)
    there = spread > 1e-9 * error
    return error, np.divide(mean, spread, out=np.full(mean.shape, np.nan), where=there)


def _below(others: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How many of `others` are equal to each of `scores`, and how many lie below, equal ones counted half."""
    ranked = np.sort(others)
    left, right = np.searchsorted(ranked, scores, "left"), np.searchsorted(ranked, scores, "right")
    return right - left, 0.5 * (left + right)


def _sums(columns: np.ndarray, patient: np.ndarray, patients: int) -> tuple[np.ndarray, np.ndarray]:
    total = np.zeros((patients, columns.shape[1]))
    np.add.at(total, patient, columns)
    first, second = np.split(total, 2, axis=1)
    return first, second
