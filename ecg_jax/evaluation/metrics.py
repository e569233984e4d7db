"""Metrics of multi-label predictions, per label, in NumPy float64.

Everything takes logits [n, K] and labels int8 [n, K] (1, 0, -1 unknown; an unknown label is left out of that
label's metric, never counted as 0) and gives [K]. Thresholds are in logits. Stated rules:

- BCE and Brier score exist for a label with at least one known record; AUROC, average precision, F1,
  sensitivity and specificity only where both classes occur. Elsewhere the value is NaN.
- The macro of a metric is the plain mean over the labels where it exists; how many those are is given beside
  it.
- A record is called positive where its logit is >= the threshold. Thresholds come from validation, never from
  here.

No intervals (see `bootstrap`), no selection. Invariant: a monotone change of the logits changes neither AUROC
nor AP.
"""

import numpy as np
from scipy.sparse import csr_array

UNKNOWN = -1
RANKING = ("auroc", "ap")  # need both classes and the whole order of the scores
THRESHOLDED = ("f1", "sensitivity", "specificity")  # need both classes and a threshold
METRICS = ("bce", "auroc", "ap", *THRESHOLDED, "brier")


def checked(logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Logits as float64 [n, K] and labels as int8 [n, K]. Raises ValueError for other shapes, values or NaN
    logits.
    """
    logits, labels = np.asarray(logits, np.float64), np.asarray(labels)
    if logits.ndim != 2 or logits.shape != labels.shape:
        raise ValueError(f"logits {logits.shape} and labels {labels.shape} must both be [records, labels]")
    if np.isnan(logits).any():
        raise ValueError(f"{int(np.isnan(logits).any(1).sum())} of {len(logits)} records have a NaN logit")
    if not np.isin(labels, (0, 1, UNKNOWN)).all():
        raise ValueError("labels must be 1, 0 or -1 (unknown)")
    return logits, labels.astype(np.int8)


def losses(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Binary cross-entropy in nats of every record and label, float64 [n, K]; 0 where the label is unknown.

    softplus(-z) for a positive and softplus(z) for a negative: exact at any size of the logit.
    """
    logits, labels = checked(logits, labels)
    signed = np.where(labels == 1, -logits, logits)
    return np.where(labels == UNKNOWN, 0.0, np.logaddexp(0.0, signed))


def probability(logits: np.ndarray) -> np.ndarray:
    """Logistic function without overflow."""
    return np.exp(-np.logaddexp(0.0, -np.asarray(logits, np.float64)))


def logit(p: np.ndarray, eps: float = 1e-12) -> np.ndarray:
    """Log odds of `p`, clipped to [eps, 1 - eps]."""
    p = np.clip(np.asarray(p, np.float64), eps, 1 - eps)
    return np.log(p) - np.log1p(-p)


def n_known(labels: np.ndarray) -> np.ndarray:
    """Records whose label is known, int [K]."""
    return (np.asarray(labels) != UNKNOWN).sum(0)


def n_positive(labels: np.ndarray) -> np.ndarray:
    """Positive records, int [K]."""
    return (np.asarray(labels) == 1).sum(0)


def prevalence(labels: np.ndarray, smooth: float = 0.5) -> np.ndarray:
    """Share of positives among the known, float64 [K]; `smooth` pseudo-records of each class keep it off 0
    and 1.
    """
    return (n_positive(labels) + smooth) / (n_known(labels) + 2 * smooth)


def bce(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Mean binary cross-entropy in nats over the known records, float64 [K]."""
    return _ratio(losses(logits, labels).sum(0), n_known(labels))


def brier(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Mean squared error of the probability over the known records, float64 [K]."""
    logits, labels = checked(logits, labels)
    squared = np.where(labels == UNKNOWN, 0.0, (probability(logits) - labels) ** 2)
    return _ratio(squared.sum(0), n_known(labels))


def auroc(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Area under the ROC curve, float64 [K]: P(positive above negative) + P(tie) / 2, exactly
    (Mann-Whitney).
    """
    return _per_label(scores, labels)[0]


def average_precision(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Step-wise average precision, float64 [K]: sum over distinct scores of (gain in recall) x (precision
    there).
    """
    return _per_label(scores, labels)[1]


def _per_label(scores: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scores, labels = checked(scores, labels)
    out = np.full((2, scores.shape[1]), np.nan)
    for k in range(scores.shape[1]):
        known = labels[:, k] != UNKNOWN
        everyone = np.zeros(known.sum(), np.int64)  # one "patient" of weight one
        ranking = Ranking(scores[known, k], labels[known, k] == 1, everyone, 1)
        out[:, k] = np.concatenate(ranking.weighted(np.ones((1, 1))))
    return out[0], out[1]


class Ranking:
    """One label's records sorted once by score, so that AUROC and AP can be had for many weightings of the
    patients.

    scores float64 [n]; positive bool [n]; all known; patient int [n] in 0..patients-1, whose weight a record
    takes.
    """

    def __init__(self, scores: np.ndarray, positive: np.ndarray, patient: np.ndarray, patients: int) -> None:
        self.both = bool(positive.any() and not positive.all())
        if not self.both:
            return
        order = np.argsort(-scores, kind="stable")
        ranked, hit, patient = scores[order], positive[order], patient[order]
        tie = np.cumsum(np.concatenate([[0], ranked[1:] != ranked[:-1]]))  # 0 for the best score
        held = np.unique(tie[hit])  # only ties with a positive have a say; what lies between two of them is one bin
        inside = np.searchsorted(held, tie)  # bin 2 g: above tie g, below the one before; bin 2 g + 1: in tie g
        in_tie = inside < len(held)
        in_tie[in_tie] = held[inside[in_tie]] == tie[in_tie]
        ones = np.ones(len(scores))
        self.bins = csr_array((ones, (2 * inside + in_tie, patient)), shape=(2 * len(held) + 1, patients))
        self.hits = csr_array((ones[hit], (inside[hit], patient[hit])), shape=(len(held), patients))

    def weighted(self, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """AUROC and AP, float64 [R] each, with the patients' weights float64 [patients, R].

        NaN in a column whose weight of either class is zero.
        """
        columns = counts.shape[1]
        if not self.both:
            return np.full(columns, np.nan), np.full(columns, np.nan)
        above = np.cumsum(self.bins @ counts, axis=0)  # weight of all records down to the end of each bin
        before, after, total = above[:-1:2], above[1::2], above[-1]
        hits = self.hits @ counts
        found = np.cumsum(hits, axis=0)
        positives, negatives = found[-1], total - found[-1]
        tied = after - before - hits
        worse = negatives - (after - found)  # negatives ranked strictly below the tie
        both = (positives > 0) & (negatives > 0)
        pairs = (hits * (worse + 0.5 * tied)).sum(0)
        precision = np.divide(found, after, out=np.zeros_like(found), where=after > 0)
        return (
            np.divide(pairs, positives * negatives, out=np.full(columns, np.nan), where=both),
            np.divide((hits * precision).sum(0), positives, out=np.full(columns, np.nan), where=both),
        )


def best_f1_threshold(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Threshold with the highest F1, float64 [K]; NaN for a label without a positive or without a negative.

    Half-way between the two neighbouring distinct scores (at the lowest score where all are called positive);
    of several thresholds with the same F1 the highest.
    """
    scores, labels = checked(scores, labels)
    out = np.full(scores.shape[1], np.nan)
    for k in range(scores.shape[1]):
        known = labels[:, k] != UNKNOWN
        values, positive = scores[known, k], labels[known, k] == 1
        if not positive.any() or positive.all():
            continue
        order = np.argsort(-values, kind="stable")
        values, found = values[order], np.cumsum(positive[order])
        last = np.append(np.flatnonzero(values[1:] != values[:-1]), len(values) - 1)
        f1 = 2 * found[last] / (last + 1 + found[-1])
        best = last[np.argmax(f1)]
        out[k] = values[best] if best == len(values) - 1 else 0.5 * (values[best] + values[best + 1])
    return out


def confusion(logits: np.ndarray, labels: np.ndarray, thresholds: np.ndarray) -> dict[str, np.ndarray]:
    """Per record and label bool [n, K]: `tp fp fn tn`. All false where the label is unknown or the threshold
    NaN.
    """
    logits, labels = checked(logits, labels)
    chosen = np.isfinite(thresholds)
    called = logits >= np.where(chosen, thresholds, np.inf)
    positive, negative = (labels == 1) & chosen, (labels == 0) & chosen
    return {
        "tp": positive & called,
        "fp": negative & called,
        "fn": positive & ~called,
        "tn": negative & ~called,
    }


def rates(tp: np.ndarray, fp: np.ndarray, fn: np.ndarray, tn: np.ndarray) -> dict[str, np.ndarray]:
    """F1, sensitivity and specificity from counts of any shape; NaN where either class is absent."""
    both = (tp + fn > 0) & (tn + fp > 0)
    return {
        "f1": _ratio(np.where(both, 2 * tp, np.nan), 2 * tp + fp + fn),
        "sensitivity": _ratio(np.where(both, tp, np.nan), tp + fn),
        "specificity": _ratio(np.where(both, tn, np.nan), tn + fp),
    }


def at_thresholds(logits: np.ndarray, labels: np.ndarray, thresholds: np.ndarray) -> dict[str, np.ndarray]:
    """F1, sensitivity and specificity at `thresholds` (logits [K]), float64 [K] each."""
    return rates(
        **{name: cell.sum(0).astype(np.float64) for name, cell in confusion(logits, labels, thresholds).items()}
    )


def macro(values: np.ndarray) -> tuple[float, int]:
    """Mean over the labels whose value exists, and how many those are; (NaN, 0) where none does."""
    there = np.asarray(values)[np.isfinite(values)]
    return (float(there.mean()), len(there)) if len(there) else (float("nan"), 0)


def evaluate(logits: np.ndarray, labels: np.ndarray, thresholds: np.ndarray) -> dict[str, np.ndarray]:
    """Every metric of `METRICS`, float64 [K] each, at thresholds [K] that were chosen on validation."""
    area, precision = _per_label(logits, labels)
    return {
        "bce": bce(logits, labels),
        "auroc": area,
        "ap": precision,
        **at_thresholds(logits, labels, thresholds),
        "brier": brier(logits, labels),
    }


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    denominator = np.asarray(denominator, np.float64)
    return np.divide(numerator, denominator, out=np.full(denominator.shape, np.nan), where=denominator > 0)
