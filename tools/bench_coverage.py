"""How often 95 % intervals hold the truth: simulated test sets whose AUROC and BCE are known.

    python tools/bench_coverage.py --save cov.json   2,000 test sets a row, some eight minutes on a core
    python tools/bench_coverage.py --draws 200       a quick look
    python tools/bench_coverage.py --only "BCE"      rows whose name holds that

With --save what is done is kept, and the same command goes on. AUROC: 20/180 is 20 positives and 180 negatives, a
patient each. The interval was chosen on "binormal" (equal variances); all other scores are what it was not chosen on:
"wide" and "narrow" positives (twice, half the spread), "exponential", "tied" (binormal in steps of one SD), "clustered"
(two records of each patient that share most of their score), and the macro of five labels. BCE: logits that are
calibrated (or too extreme, "x 1.5"), 200 patients of one record each, one label or the macro of five. The resamples are
those of the product: 1,000, one seed. Beside ours stands the percentile interval of the same resamples; "low" and
"high" are the shares of our intervals that end below the truth or begin above it.
"""

import argparse
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from scipy.stats import norm

from ecg_jax import files, progress
from ecg_jax.evaluation import bootstrap, influence, metrics

LEVEL, RESAMPLES = 0.95, 1000
Simulated = tuple[np.ndarray, np.ndarray]
Case = tuple[str, str, float, Callable[[np.random.Generator], Simulated], int]
SIZES = ((20, 20), (20, 180), (20, 1000), (50, 150), (180, 20))
AREAS = (0.6, 0.75, 0.9)
SPREADS = {"binormal": 1.0, "wide": 2.0, "narrow": 0.5, "tied": 1.0}  # of the positives; negatives have 1


def ranked(
    kind: str, areas: tuple[float, ...], positives: int, negatives: int, copies: int = 1
) -> Callable[[np.random.Generator], Simulated]:
    """Test sets whose labels (one for each of `areas`) have that AUROC; `copies` records of each patient."""
    n = positives + negatives
    labels = np.tile(np.arange(n) < positives, copies).astype(np.int8)[:, None].repeat(len(areas), 1)
    shared = 0.8 if copies > 1 else 0.0  # of the variance
    gap = norm.ppf(areas) * np.hypot(1, SPREADS.get(kind, 1.0))

    def draw(rng: np.random.Generator) -> Simulated:
        if kind == "exponential":
            odds = np.array(areas) / (1 - np.array(areas))
            return rng.exponential(size=labels.shape) * np.where(labels, odds, 1.0), labels
        patient = np.tile(rng.normal(size=(n, len(areas))), (copies, 1)) * np.sqrt(shared)
        x = patient + rng.normal(size=labels.shape) * np.sqrt(1 - shared)
        x = np.where(labels, x * SPREADS.get(kind, 1.0) + gap, x)
        return np.round(x) if kind == "tied" else x, labels

    return draw


def tied_area(area: float) -> float:
    """AUROC of binormal scores of AUROC `area` that are rounded to whole SDs."""
    edges = np.arange(-20, 21) - 0.5
    low, high = np.diff(norm.cdf(edges)), np.diff(norm.cdf(edges - norm.ppf(area) * np.sqrt(2)))
    return float(high @ (np.cumsum(low) - low / 2))


def logistic(share: float, spread: float, extreme: float, labels: int) -> Callable[[np.random.Generator], Simulated]:
    def draw(rng: np.random.Generator, patients: int = 200) -> Simulated:
        logits = metrics.logit(share) + spread * rng.normal(size=(patients, labels))
        return extreme * logits, (rng.random(logits.shape) < metrics.probability(logits)).astype(np.int8)

    return draw


def expected_loss(share: float, spread: float, extreme: float) -> float:
    logits = metrics.logit(share) + spread * norm.ppf((np.arange(200_000) + 0.5) / 200_000)
    p = metrics.probability(logits)
    return float(np.mean(p * np.logaddexp(0, -extreme * logits) + (1 - p) * np.logaddexp(0, extreme * logits)))


def cases() -> Iterator[Case]:
    for kind in ("binormal", "wide", "narrow", "exponential", "tied"):
        for area in AREAS:
            truth = tied_area(area) if kind == "tied" else area
            for m, n in SIZES:
                yield f"AUROC {truth:.3g}, {m}/{n}, {kind}", "auroc", truth, ranked(kind, (area,), m, n), m + n
    for area in AREAS:
        yield f"AUROC {area}, 30/90 patients, clustered", "auroc", area, ranked("binormal", (area,), 30, 90, 2), 120
    areas = (0.6, 0.7, 0.8, 0.85, 0.9)
    for m, n in ((20, 180), (20, 1000)):
        yield f"AUROC, macro of 5, {m}/{n}", "auroc", float(np.mean(areas)), ranked("binormal", areas, m, n), m + n
    for share, extreme, labels in ((0.05, 1, 1), (0.1, 1, 1), (0.3, 1, 1), (0.1, 1.5, 1), (0.1, 1, 5)):
        name = f"BCE, prevalence {share:.0%}" + ", x 1.5" * (extreme > 1) + f", macro of {labels}" * (labels > 1)
        yield name, "bce", expected_loss(share, 2, extreme), logistic(share, 2, extreme, labels), 200


def spread_of(metric: str, logits: np.ndarray, labels: np.ndarray, resamples: bootstrap.Resamples, counts) -> object:
    """What `bootstrap.spreads` has for one metric where all labels are known, without the others."""
    patients = len(counts)
    if metric == "auroc":
        area = influence.of_auroc(logits, labels, resamples.patient, patients)
        of = [metrics.Ranking(z, y == 1, resamples.patient, patients) for z, y in zip(logits.T, labels.T, strict=True)]
        draws = np.stack([ranking.weighted(counts)[0] for ranking in of], axis=1)
        support = np.minimum(labels.sum(0), (1 - labels).sum(0)) * patients // len(labels)
        point = metrics.auroc(logits, labels)
        return bootstrap.Spread(point, draws, support, area.shares, counts, errors=area.error, free=area.free)
    point = metrics.bce(logits, labels)
    share = influence.of_mean(metrics.losses(logits, labels), labels >= 0, resamples.patient, patients)
    return bootstrap.Spread(point, point + counts.T @ share / patients, labels.sum(0), share, counts)


def covered(case: Case, draws: int) -> dict[str, float]:
    name, metric, truth, draw, patients = case
    rng, resamples = np.random.default_rng(zlib.crc32(name.encode())), None
    sides = np.zeros((2, 2))  # ours and percentile: ends below the truth, begins above it
    for _ in range(draws):
        logits, labels = draw(rng)
        if resamples is None:
            resamples = bootstrap.draw(np.arange(len(labels)) % patients, RESAMPLES)
            counts = np.ascontiguousarray(resamples.counts, np.float64)
        found = spread_of(metric, logits, labels, resamples, counts).macro()
        both = bootstrap.interval(metric, found, LEVEL), bootstrap.percentile(found.point, found.draws, LEVEL)
        sides += [(high < truth, low > truth) for low, high in both]
    ours, plain = 1 - sides.sum(1) / draws
    return {"ours": ours, "percentile": plain, "low": sides[0, 0] / draws, "high": sides[0, 1] / draws}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=2000)
    parser.add_argument("--only", default="", metavar="TEXT")
    parser.add_argument("--save", type=Path, metavar="FILE")
    args = parser.parse_args()
    done = json.loads(args.save.read_text()) if args.save and args.save.exists() else {}
    print(f"| {args.draws:,} test sets, nominal {LEVEL:.0%} | ours | low | high | percentile |\n|---|---|---|---|---|")
    for case in progress.track([case for case in cases() if args.only in case[0]], "coverage", unit="cases"):
        key = f"{case[0]}, {args.draws} draws"
        if key not in done:
            done[key] = covered(case, args.draws)
            if args.save:
                files.write(args.save, json.dumps(done, indent=1) + "\n")
        share = " | ".join(f"{done[key][name]:.1%}" for name in ("ours", "low", "high", "percentile"))
        print(f"| {case[0]} | {share} |", flush=True)


if __name__ == "__main__":
    main()
