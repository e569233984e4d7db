"""How much each patient moves a metric: the first-order share of every patient in BCE, Brier score and AUROC.

`values[i]` is what the metric gains, times the number of patients P, when patient i weighs a little more: the mean over
patients is 0, the metric's standard error is their standard deviation over sqrt(P), and a resample moves the metric by
the mean of its values (to first order). Records of one patient are added first, so that they count as one. For AUROC
these are the placement values of DeLong, DeLong and Clarke-Pearson (1988), summed within patients as Obuchowski (1997)
does. Draws nothing. Invariant: values of several labels may be averaged, of two models subtracted.
"""

import numpy as np

from ecg_jax.evaluation import metrics as m


def of_mean(per_record: np.ndarray, known: np.ndarray, patient: np.ndarray, patients: int) -> np.ndarray:
    """float64 [P, K] for the mean over known records of `per_record` [n, K] (0 where unknown); known bool [n, K];
    patient int [n] in 0..P-1. NaN for a label without a known record.
    """
    total, number = _sums(np.concatenate([per_record, known], axis=1, dtype=np.float64), patient, patients)
    count = np.where(number.sum(0) > 0, number.sum(0), np.nan)
    return patients * (total - total.sum(0) / count * number) / count


def of_auroc(scores: np.ndarray, labels: np.ndarray, patient: np.ndarray, patients: int) -> np.ndarray:
    """float64 [P, K] for AUROC of `scores` [n, K] with labels [n, K] (-1 unknown); NaN where a class is absent."""
    out = np.full((patients, scores.shape[1]), np.nan)
    for k in range(scores.shape[1]):
        at = [np.flatnonzero(labels[:, k] == value) for value in (0, 1)]
        if not (len(at[0]) and len(at[1])):
            continue
        low, high = (scores[rows, k] for rows in at)
        # Share of the other class that each record is ranked rightly against, ties as half.
        share = [1 - _below(high, low) / len(high), _below(low, high) / len(low)]
        area = share[1].mean()
        out[:, k] = 0.0
        for rows, placed in zip(at, share, strict=True):
            out[:, k] += patients / len(rows) * np.bincount(patient[rows], placed - area, patients)
    return out


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


def _below(others: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """How many of `others` lie below each of `scores`, ties counted half."""
    ranked = np.sort(others)
    return 0.5 * (np.searchsorted(ranked, scores, "left") + np.searchsorted(ranked, scores, "right"))


def _sums(columns: np.ndarray, patient: np.ndarray, patients: int) -> tuple[np.ndarray, np.ndarray]:
    total = np.zeros((patients, columns.shape[1]))
    np.add.at(total, patient, columns)
    first, second = np.split(total, 2, axis=1)
    return first, second


def all_of(logits: np.ndarray, labels: np.ndarray, patient: np.ndarray, patients: int) -> dict[str, np.ndarray]:
    """The values of every metric that has them, by its name in `metrics.METRICS`."""
    known = labels != m.UNKNOWN
    squared = np.where(known, (m.probability(logits) - labels) ** 2, 0.0)
    return {
        "bce": of_mean(m.losses(logits, labels), known, patient, patients),
        "brier": of_mean(squared, known, patient, patients),
        "auroc": of_auroc(logits, labels, patient, patients),
    }
