"""How often 95 % intervals hold the truth: simulated test sets whose AUROC and BCE are known.

    python tools/bench_coverage.py                2,000 test sets a row, some ten minutes on a core
    python tools/bench_coverage.py --draws 200    a quick look

AUROC: binormal scores; "clustered" has two records of each patient that share most of their score. BCE: logits that are
calibrated (or too extreme, "x 1.5"), 200 patients of one record each, one label or the macro of five. The resamples are
those of the product: 1,000, one seed. Beside ours stands the percentile interval of the same resamples.
"""

import argparse
from collections.abc import Callable

import numpy as np
from scipy.stats import norm

from ecg_jax import progress
from ecg_jax.evaluation import bootstrap, influence, metrics

LEVEL, RESAMPLES = 0.95, 1000
Simulated = tuple[np.ndarray, np.ndarray]


def binormal(
    area: float, positives: int, negatives: int, copies: int = 1
) -> Callable[[np.random.Generator], Simulated]:
    labels = np.tile((np.arange(positives + negatives) < positives).astype(np.int8), copies)[:, None]
    shared = 0.8 if copies > 1 else 0.0  # of the variance

    def draw(rng: np.random.Generator) -> Simulated:
        patient = np.tile(rng.normal(size=positives + negatives), copies) * np.sqrt(shared)
        own = rng.normal(size=len(labels)) * np.sqrt(1 - shared)
        return (patient + own + labels[:, 0] * norm.ppf(area) * np.sqrt(2))[:, None], labels

    return draw


def logistic(share: float, spread: float, extreme: float, labels: int) -> Callable[[np.random.Generator], Simulated]:
    def draw(rng: np.random.Generator, patients: int = 200) -> Simulated:
        logits = metrics.logit(share) + spread * rng.normal(size=(patients, labels))
        return extreme * logits, (rng.random(logits.shape) < metrics.probability(logits)).astype(np.int8)

    return draw


def expected_loss(share: float, spread: float, extreme: float) -> float:
    logits = metrics.logit(share) + spread * norm.ppf((np.arange(200_000) + 0.5) / 200_000)
    p = metrics.probability(logits)
    return float(np.mean(p * np.logaddexp(0, -extreme * logits) + (1 - p) * np.logaddexp(0, extreme * logits)))


def spread_of(metric: str, logits: np.ndarray, labels: np.ndarray, resamples: bootstrap.Resamples) -> bootstrap.Spread:
    if metric != "bce":
        return bootstrap.spreads(logits, labels, np.zeros(labels.shape[1]), resamples)[metric]
    # All labels known, one record a patient: the mean over a resample is the mean of its patients' shares.
    patients, point = len(resamples.counts), metrics.bce(logits, labels)
    share = influence.of_mean(metrics.losses(logits, labels), labels >= 0, resamples.patient, patients)
    draws = point + resamples.counts.T @ share / patients
    return bootstrap.Spread(point, draws, labels.sum(0), share, resamples.counts)


def covered(metric: str, truth: float, draw: Callable, patients: int, draws: int) -> tuple[float, float]:
    rng, hits = np.random.default_rng(0), np.zeros(2)
    resamples = None
    for _ in range(draws):
        logits, labels = draw(rng)
        if resamples is None:
            resamples = bootstrap.draw(np.arange(len(labels)) % patients, RESAMPLES)
        found = spread_of(metric, logits, labels, resamples).macro()
        for i, (low, high) in enumerate(
            (bootstrap.interval(metric, found, LEVEL), bootstrap.percentile(found.point, found.draws, LEVEL))
        ):
            hits[i] += low <= truth <= high
    return tuple(hits / draws)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=2000)
    parser.add_argument("--metric", choices=("auroc", "bce"), help="default both")
    args = parser.parse_args()
    draws = args.draws
    cases = []
    for area in (0.6, 0.75, 0.9):
        cases.append((f"AUROC {area}, 20 positives, 180 negatives", "auroc", area, binormal(area, 20, 180), 200))
    cases.append(("AUROC 0.9, 50 positives, 150 negatives", "auroc", 0.9, binormal(0.9, 50, 150), 200))
    cases.append(("AUROC 0.9, 30 and 90 patients, clustered", "auroc", 0.9, binormal(0.9, 30, 90, 2), 120))
    for share, spread, extreme, labels in (
        (0.05, 2, 1, 1),
        (0.1, 2, 1, 1),
        (0.3, 2, 1, 1),
        (0.1, 2, 1.5, 1),
        (0.1, 2, 1, 5),
    ):
        name = (
            f"BCE, prevalence {share:.0%}" + (", x 1.5" if extreme > 1 else "") + (f", {labels} labels" * (labels > 1))
        )
        truth = expected_loss(share, spread, extreme)
        cases.append((name, "bce", truth, logistic(share, spread, extreme, labels), 200))
    print(f"| {draws:,} test sets, nominal {LEVEL:.0%} | ours | percentile |\n|---|---|---|", flush=True)
    for name, metric, truth, draw, patients in progress.track(
        [case for case in cases if args.metric in (None, case[1])], "coverage", unit="cases"
    ):
        ours, plain = covered(metric, truth, draw, patients, draws)
        print(f"| {name} | {ours:.1%} | {plain:.1%} |", flush=True)


if __name__ == "__main__":
    main()
