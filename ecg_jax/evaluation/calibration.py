"""Are the probabilities right? Calibration of multi-label predictions, per label, in NumPy float64.

Bins of equal width as scikit-learn's `calibration_curve`; the expected calibration error (ECE) weights their gaps by
their records (Naeini et al. 2015). Intercept and slope are those of a logistic regression of the label on the logit
(Cox 1958): 0 and 1 where calibrated, a slope below 1 where predictions are too extreme. They exist where both classes
occur and the logits do not separate them. Also the correction for a shifted prevalence. Invariant: unknown labels (-1)
are left out; a value that does not exist is NaN.
"""

import numpy as np

from ecg_jax.evaluation import metrics as m

BINS = 10
STEPS = 50  # of Newton
FLAT = 1e6  # condition number from which the two parameters are not told apart


def curve(logits: np.ndarray, labels: np.ndarray, bins: int = BINS) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(mean probability, share of positives, records) of each bin, float64 and int [bins, K]; NaN in an empty bin."""
    logits, labels = m.checked(logits, labels)
    p, known = m.probability(logits), labels != m.UNKNOWN
    # As scikit-learn: a probability on an edge falls into the bin below it, 0 into the first.
    place = np.searchsorted(np.linspace(0, 1, bins + 1)[1:-1], p)
    total, mean, share = (np.zeros((bins, labels.shape[1])) for _ in range(3))
    columns = np.broadcast_to(np.arange(labels.shape[1]), labels.shape)
    for out, values in ((total, known), (mean, np.where(known, p, 0)), (share, labels == 1)):
        np.add.at(out, (place, columns), values)
    there = np.where(total > 0, total, np.nan)
    return mean / there, share / there, total.astype(np.int64)


def ece(logits: np.ndarray, labels: np.ndarray, bins: int = BINS) -> np.ndarray:
    """Expected calibration error, float64 [K]."""
    mean, share, number = curve(logits, labels, bins)
    total = number.sum(0)
    gap = np.nansum(np.abs(mean - share) * number, axis=0)
    return np.divide(gap, total, out=np.full(len(total), np.nan), where=total > 0)


def recalibration(logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(intercept, slope), float64 [K] each, by maximum likelihood (Newton)."""
    logits, labels = m.checked(logits, labels)
    out = np.full((2, labels.shape[1]), np.nan)
    for k in range(labels.shape[1]):
        known = labels[:, k] != m.UNKNOWN
        z, y = logits[known, k], labels[known, k].astype(np.float64)
        if not 0 < y.sum() < len(y) or np.ptp(z) == 0:
            continue
        x = np.stack([np.ones_like(z), z], axis=1)
        at = np.array([0.0, 1.0])
        for _ in range(STEPS):
            p = m.probability(x @ at)
            gradient, hessian = x.T @ (y - p), (x * (p * (1 - p))[:, None]).T @ x
            if not np.isfinite(hessian).all() or np.linalg.cond(hessian) > FLAT * (1 + np.square(z).mean()):
                break  # separated: the slope runs away
            step = np.linalg.solve(hessian, gradient)
            at = at + step * min(1.0, 5 / max(np.abs(step).max(), 1e-300))
            if np.abs(step).max() < 1e-10:
                out[:, k] = at
                break
    return out[0], out[1]


def prevalence_shift(labels: np.ndarray, train_prevalence: np.ndarray) -> np.ndarray:
    """What moves logits from the training prevalence [K] to that of `labels` [n, K], float64 [K].

    Bayes' rule for a changed prior (Saerens et al. 2002), the new prior being the labels' own share: what a predictor
    loses by it alone is the difference of the two losses. It reads the labels, so it is an explanation, no prediction.
    """
    return m.logit(m.prevalence(labels)) - m.logit(train_prevalence)
