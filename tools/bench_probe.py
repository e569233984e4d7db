"""The logistic probe beside scikit-learn, and the resamples of a large test set: agreement and seconds.

    python tools/bench_probe.py                     71 labels x 16 settings of C on 8,000 x 256 features
    python tools/bench_probe.py --resamples-only    1,000 patient resamples of 20,000 x 71, all metrics

scikit-learn (extra `test`) solves a sample of the regressions, spread over labels and C, one after another on the same
cores, to the same gradient; its time is that of the sample times (regressions / sample). Features are simulated with
the spectrum of an encoder's (half of the variance in a tenth of the dimensions). Time beside wall is process CPU.
"""

import argparse
import time

import numpy as np

from ecg_jax.evaluation import bootstrap, linear, logistic, metrics


def simulated(records: int, width: int, labels: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    x = rng.normal(size=(records, width)) @ (np.geomspace(1, 0.03, width)[:, None] * rng.normal(size=(width, width)))
    x = ((x - x.mean(0)) / x.std(0)).astype(np.float32)
    logits = x @ rng.normal(size=(width, labels)) / np.sqrt(width) + metrics.logit(np.geomspace(0.005, 0.4, labels))
    return x, (rng.random(logits.shape) < metrics.probability(logits)).astype(np.int8)


def timed(call) -> tuple[object, float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    found = call()
    return found, time.perf_counter() - wall, time.process_time() - cpu


def against_scikit_learn(args: argparse.Namespace) -> None:
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(0)
    x, y = simulated(args.records, args.width, args.labels, rng)
    mean, scale = linear.moments(x)
    x = (x.astype(np.float64) - mean) / scale
    label, c = np.repeat(np.arange(args.labels), len(logistic.C_GRID)), np.tile(logistic.C_GRID, args.labels)
    none = np.zeros(len(c), int)
    first = timed(lambda: logistic.solve(x, y[None], none, label, c))
    found, wall, cpu = timed(lambda: logistic.solve(x, y[None], none, label, c))
    print(f"ours: {len(c)} regressions in {wall:.1f} s ({cpu:.1f} s CPU), {first[1] - wall:.1f} s more the first time")
    print(
        f"  steps: median {np.median(found.steps):.0f}, most {found.steps.max()}; "
        f"gradient at most {found.gradient.max():.1e}"
    )
    sample = rng.permutation(len(c))[: args.sample]
    for tolerance in (1e-6, 1e-4):
        gaps, total, total_cpu, used = [], 0.0, 0.0, []
        for p in sample:
            model = LogisticRegression(C=c[p], tol=tolerance, max_iter=10_000)
            fitted, wall_p, cpu_p = timed(lambda model=model, p=p: model.fit(x, y[:, label[p]]))
            total, total_cpu = total + wall_p, total_cpu + cpu_p
            used.append(int(fitted.n_iter_[0]))
            w, b = fitted.coef_[0], fitted.intercept_
            loss = metrics.losses((x @ w + b)[:, None], y[:, [label[p]]]).mean() + w @ w / (2 * c[p] * len(x))
            gaps.append(loss - found.loss[p])
        whole = total / len(sample) * len(c)
        print(
            f"scikit-learn, tol {tolerance:.0e}: {total / len(sample):.3f} s a regression "
            f"({total_cpu / len(sample):.3f} CPU), "
            f"median {np.median(used):.0f} steps, {whole:.0f} s for all: {whole / wall:.1f} times ours; "
            f"loss minus ours {min(gaps):+.1e} to {max(gaps):+.1e}",
            flush=True,
        )


def resamples() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(20_000, 71))
    labels = (rng.random(logits.shape) < metrics.probability(logits - 2)).astype(np.int8)
    groups = rng.integers(0, 15_000, 20_000).astype(np.uint64)
    drawn, wall, cpu = timed(lambda: bootstrap.draw(groups))
    print(f"1,000 resamples of {len(drawn.counts):,} patients drawn in {wall:.1f} s ({cpu:.1f} CPU)")
    found, wall, cpu = timed(lambda: bootstrap.spreads(logits, labels, np.zeros(71), drawn))
    print(f"all metrics of 20,000 x 71: {wall:.1f} s ({cpu:.1f} CPU)")
    _, wall, cpu = timed(lambda: [bootstrap.interval(n, s.label(k)) for n, s in found.items() for k in range(71)])
    print(f"their {len(found) * 71} intervals: {wall:.1f} s ({cpu:.1f} CPU)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=8000)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--labels", type=int, default=71)
    parser.add_argument("--sample", type=int, default=24)
    parser.add_argument("--resamples-only", action="store_true")
    args = parser.parse_args()
    if not args.resamples_only:
        against_scikit_learn(args)
    resamples()


if __name__ == "__main__":
    main()
