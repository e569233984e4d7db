"""Intervals from resampling patients: one set of resamples for every label, metric and model of a test set.

A resample draws as many patients as there are, with replacement, and takes all records of each: records of
one patient are not independent. The draw depends on the set of patients and the seed alone, so two models
scored on the same records share it, and their difference is a paired one.

Rules. A resample in which a label has lost one of its classes drops that label for AUROC, AP and the
thresholded metrics; the share of dropped resamples is given. The macro of a resample is the macro of the
point plus the mean deviation over the labels that it kept, so that it does not move with *which* labels were
kept. Invariant: the point lies inside its interval.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from scipy.special import stdtrit

from ecg_jax.evaluation import influence
from ecg_jax.evaluation import metrics as m

CHUNK = 250  # resamples at a time: bounds the memory, changes no number
CORRECTED = "bce_corrected"  # BCE after the logits moved to the test prevalence; an explanation, no row of a law
SUMS = ("known", "loss", "squared", "tp", "fp", "fn", "tn")


@dataclass(frozen=True)
class Resamples:
    """counts uint16 [patients, R]: how often each resample took each patient; patient int64 [n]: the row of
    `counts`
    of each record."""

    counts: np.ndarray
    patient: np.ndarray

    @property
    def number(self) -> int:
        return self.counts.shape[1]


def draw(groups: np.ndarray, number: int = 1000, seed: int = 0) -> Resamples:
    """`number` resamples of the patients in `groups` (uint64 [n], one patient hash per record).

    Randomness: `seed` only; the order of the records does not matter.
    """
    patients, patient = np.unique(np.asarray(groups), return_inverse=True)
    rng = np.random.default_rng(np.random.SeedSequence([seed, len(patients)]))
    counts = np.empty((len(patients), number), np.uint16)
    for r in range(number):
        counts[:, r] = np.bincount(rng.integers(0, len(patients), len(patients)), minlength=len(patients))
    return Resamples(counts, patient.reshape(-1))


class Estimate(NamedTuple):
    """A metric of one label or a macro: point; draws float64 [R]; support (patients of the rarer class); labels in it.

    error and t [R] are the standard error and the studentised draws (`influence.studentised`), None where the metric
    has no influence values; free, the degrees of freedom of an AUROC's error, else None.
    """

    point: float
    draws: np.ndarray
    support: float
    labels: int
    error: float | None = None
    t: np.ndarray | None = None
    free: float | None = None


@dataclass(frozen=True)
class Spread:
    """One metric of one model: point float64 [K], draws float64 [R, K], support int [K] (patients of the rarer class).

    shares float64 [P, K], influence of each patient, and counts [P, R], how often a draw took it, where the metric
    has them (BCE, Brier, AUROC); errors and free float64 [K], of AUROC alone (`influence.Area`).
    """

    point: np.ndarray
    draws: np.ndarray
    support: np.ndarray
    shares: np.ndarray | None = None
    counts: np.ndarray | None = None
    errors: np.ndarray | None = None
    free: np.ndarray | None = None

    @cached_property
    def _studentised(self) -> tuple[np.ndarray, np.ndarray]:
        return influence.studentised(self.shares, self.counts)

    @property
    def dropped(self) -> np.ndarray:
        """Share of resamples that dropped the label, float64 [K]; NaN where the label has no value at all."""
        return np.where(np.isfinite(self.point), np.isnan(self.draws).mean(0), np.nan)

    def minus(self, other: "Spread") -> "Spread":
        """The paired difference of two models on the same records and resamples."""
        shares = None if self.shares is None else self.shares - other.shares
        return Spread(self.point - other.point, self.draws - other.draws, self.support, shares, self.counts)

    def label(self, k: int) -> Estimate:
        """Column `k` alone."""
        found = Estimate(float(self.point[k]), self.draws[:, k], self.support[k], 1)
        if self.errors is not None:
            return found._replace(error=float(self.errors[k]), free=float(self.free[k]))
        if self.shares is None:
            return found
        error, t = (x[..., k] for x in self._studentised)
        return found._replace(error=error, t=t)

    def macro(self, keep: np.ndarray | None = None) -> Estimate:
        """The mean over the labels `keep` (bool [K], default all) that have a value; NaN with none.

        The support of a mean over labels is that of its rarest. An AUROC's error is that of the patients' mean shares,
        times what the labels' own errors are to theirs; its degrees of freedom are Welch and Satterthwaite's: few where
        one rare label makes the spread.
        """
        use = np.isfinite(self.point) if keep is None else np.isfinite(self.point) & keep
        if use.sum() < 2:
            nowhere = Estimate(float("nan"), np.full(len(self.draws), np.nan), 0, 0)
            return self.label(int(np.argmax(use))) if use.any() else nowhere
        point = float(self.point[use].mean())
        deviation = self.draws[:, use] - self.point[use]
        kept = np.isfinite(deviation)
        total = np.where(kept, deviation, 0.0).sum(1)
        draws = point + np.divide(total, kept.sum(1), out=np.full(len(total), np.nan), where=kept.any(1))
        found = Estimate(point, draws, self.support[use].min(), int(use.sum()))
        if self.shares is None:
            return found
        mean = self.shares[:, use].mean(1)
        if self.errors is None:
            error, t = (x[..., 0] for x in influence.studentised(mean[:, None], self.counts))
            return found._replace(error=error, t=t)
        own, plain = self.errors[use] ** 2, (self.shares[:, use] ** 2).sum(0)
        if not plain.any():
            return found._replace(error=0.0, free=1.0)
        free = own.sum() ** 2 / (own**2 / self.free[use]).sum()
        return found._replace(error=float(np.sqrt((mean**2).sum() * own.sum() / plain.sum())), free=float(free))


def spreads(
    logits: np.ndarray,
    labels: np.ndarray,
    thresholds: np.ndarray,
    resamples: Resamples,
    shift: np.ndarray | None = None,
) -> dict[str, Spread]:
    """Every metric of `metrics.METRICS` with its resamples. logits, labels [n, K]; thresholds [K] from validation.

    With `shift` [K] (`calibration.prevalence_shift`) also `CORRECTED`, the BCE of the logits moved by it.
    """
    logits, labels = m.checked(logits, labels)
    if len(logits) != len(resamples.patient):
        raise ValueError(f"{len(logits)} records, but resamples of {len(resamples.patient)}")
    points = m.evaluate(logits, labels, thresholds)
    draws = _ratio_draws(logits, labels, thresholds, resamples) | _ranking_draws(logits, labels, resamples)
    patients, counts = len(resamples.counts), resamples.counts
    known, support = labels != m.UNKNOWN, _support(labels, resamples)
    squared = np.where(known, (m.probability(logits) - labels) ** 2, 0.0)
    shares = {
        name: influence.of_mean(values, known, resamples.patient, patients)
        for name, values in (("bce", m.losses(logits, labels)), ("brier", squared))
    }
    area = influence.of_auroc(logits, labels, resamples.patient, patients)
    found = {
        name: Spread(points[name], draws[name], support, shares.get(name), counts if name in shares else None)
        for name in m.METRICS
    }
    found["auroc"] = Spread(
        points["auroc"], draws["auroc"], support, area.shares, counts, errors=area.error, free=area.free
    )
    if shift is not None:
        moved = logits + shift
        loss = m.losses(moved, labels)
        share = influence.of_mean(loss, known, resamples.patient, patients)
        point = m.bce(moved, labels)
        linear = np.concatenate([part.T @ share for part in _chunks(counts)]) / patients
        found[CORRECTED] = Spread(point, point + linear, support, share, counts)
    return found


def _ratio_draws(logits, labels, thresholds, resamples: Resamples) -> dict[str, np.ndarray]:
    """Metrics that are ratios of sums over records: sum within patients once, then one matrix product."""
    known = labels != m.UNKNOWN
    squared = np.where(known, (m.probability(logits) - labels) ** 2, 0.0)
    cells = {"known": known, "loss": m.losses(logits, labels), "squared": squared}
    cells |= m.confusion(logits, labels, thresholds)
    n_labels = labels.shape[1]
    sums = np.zeros((len(resamples.counts), len(SUMS) * n_labels))
    np.add.at(sums, resamples.patient, np.concatenate([cells[name] for name in SUMS], axis=1, dtype=np.float64))
    product = np.concatenate([part.T.astype(np.float64) @ sums for part in _chunks(resamples.counts)])
    total = {name: product[:, i * n_labels : (i + 1) * n_labels] for i, name in enumerate(SUMS)}
    there = np.where(total["known"] > 0, total["known"], np.nan)
    out = {"bce": total["loss"] / there, "brier": total["squared"] / there}
    return out | m.rates(**{name: total[name] for name in ("tp", "fp", "fn", "tn")})


def _ranking_draws(logits, labels, resamples: Resamples) -> dict[str, np.ndarray]:
    out = {name: np.full((resamples.number, labels.shape[1]), np.nan) for name in m.RANKING}
    rankings = []
    for k in range(labels.shape[1]):
        known = np.flatnonzero(labels[:, k] != m.UNKNOWN)
        who, positive = resamples.patient[known], labels[known, k] == 1
        rankings.append(m.Ranking(logits[known, k], positive, who, len(resamples.counts)))
    start = 0
    for part in _chunks(resamples.counts):
        rows = slice(start, start + part.shape[1])
        counts = np.ascontiguousarray(part, np.float64)
        for k, ranking in enumerate(rankings):
            out["auroc"][rows, k], out["ap"][rows, k] = ranking.weighted(counts)
        start = rows.stop
    return out


def _chunks(counts: np.ndarray) -> list[np.ndarray]:
    return [counts[:, i : i + CHUNK] for i in range(0, counts.shape[1], CHUNK)]


def _support(labels: np.ndarray, resamples: Resamples) -> np.ndarray:
    """Patients with a positive or patients with a negative record, whichever are fewer, int [K]."""
    both = []
    for value in (0, 1):
        has = np.zeros((len(resamples.counts), labels.shape[1]), bool)
        np.logical_or.at(has, resamples.patient, labels == value)
        both.append(has.sum(0))
    return np.minimum(*both)


def percentile(point: float, draws: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """Percentile interval of the draws, widened to the point where a very coarse draw leaves it outside."""
    draws = draws[np.isfinite(draws)]
    if not (len(draws) and np.isfinite(point)):
        return float("nan"), float("nan")
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return float(min(low, point)), float(max(high, point))


def bootstrap_t(found: Estimate, level: float = 0.95) -> tuple[float, float]:
    """Interval by the studentised bootstrap: second-order right for means as skewed as losses are (Hall 1988).

    Covers where the percentile interval of a loss leans too low (README: coverage).
    """
    if found.error is None or not np.isfinite(found.point):
        return percentile(found.point, found.draws, level)
    t = found.t[np.isfinite(found.t)]
    if not len(t) or found.error == 0:  # all patients alike, or one patient
        return percentile(found.point, found.draws, level)
    low, high = np.quantile(t, [(1 - level) / 2, (1 + level) / 2])
    return (
        float(min(found.point - high * found.error, found.point)),
        float(max(found.point - low * found.error, found.point)),
    )


def logit_t(found: Estimate, level: float = 0.95) -> tuple[float, float]:
    """Student-t interval of an AUROC on the log odds, with error and degrees of freedom of `influence.of_auroc`.

    It stays inside (0, 1) and is as lopsided as AUROC is. With few positives the plain percentile interval covers too
    little; the scale, the variance over patients and the t quantile mend that. An AUROC of exactly 1 has no spread to
    measure. There, m patients of the rarer class (`support`) all ranked right, the exact binomial bound (alpha/2)^(1/m)
    is given instead (and its mirror image for 0).
    """
    point = found.point
    if not np.isfinite(point):
        return float("nan"), float("nan")
    if point >= 1 or point <= 0:
        bound = ((1 - level) / 2) ** (1 / max(found.support, 1))
        return (bound, 1.0) if point >= 1 else (0.0, 1 - bound)
    # Delta method for the spread on the log odds: a resample that ranks every pair right would lie at infinity.
    middle = m.logit(np.array(point))
    reach = stdtrit(max(found.free, 1.0), (1 + level) / 2) * found.error / (point * (1 - point))
    low, high = m.probability(np.array([middle - reach, middle + reach]))
    return float(min(low, point)), float(max(high, point))


LOSSES = ("bce", "brier", CORRECTED)


def interval(metric: str, found: Estimate, level: float = 0.95) -> tuple[float, float]:
    """(low, high) of `metric`: studentised bootstrap for losses, DeLong on the log odds for AUROC, percentiles for the
    rest; inside the metric's range.
    """
    if metric == "auroc" and found.free is not None:
        low, high = logit_t(found, level)
    elif metric in LOSSES:
        low, high = bootstrap_t(found, level)
    else:
        low, high = percentile(found.point, found.draws, level)
    return float(np.maximum(low, 0.0)), high if metric.startswith("bce") else float(np.minimum(high, 1.0))


def difference_interval(found: Estimate, level: float = 0.95) -> tuple[float, float]:
    """(low, high) of a paired difference (`Spread.minus`): studentised where the metric has influence values."""
    return bootstrap_t(found, level) if found.error is not None else percentile(found.point, found.draws, level)
