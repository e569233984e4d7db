"""Our fitter against the procedures of others, re-typed here from their descriptions: one thread, the same data.

    OMP_NUM_THREADS=1 python tools/bench_fit.py --data ../shared/data/scaling

    fit, grid       log-Huber 1e-3, 240 runs, best of a grid of 4,500 starts by SciPy's L-BFGS-B on the log-sum-exp
                    with finite differences (Besiroglu et al. 2024, after Hoffmann et al. 2022)
    fit, 1,024      the same sum, 1,024 starts in linear A and B with bounds (as ladder analyses do)
    resample, BFGS  one log-Huber resample by SciPy's BFGS from the published parameters; the gradient is typed out,
                    which is kinder than the original's automatic one (24 to 27 ms a resample where it was timed)
    resample, LS    one least-squares resample by SciPy's least_squares with an exact Jacobian from our estimate

The two grids are timed on a random share of their starts and scaled up (they are independent). CPU time of this
process; ours and theirs alternate, medians of `--rounds` pairs. Objectives are printed: ours must not be higher.
"""

import argparse
import csv
import time
from itertools import product
from pathlib import Path

import numpy as np
from scipy.optimize import least_squares, minimize
from scipy.special import logsumexp

from ecg_jax.scaling import bootstrap, laws
from ecg_jax.scaling.solve import fit_law

JOINT = laws.get("hoffmann", ("N", "D"))
DELTA = 1e-3


def runs(folder: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """ln N, ln D and losses of the 240 runs that the published analysis keeps."""
    with open(folder / "epoch_chinchilla_svg.csv") as file:
        rows = list(csv.DictReader(file))
    n, c, y = (np.array([float(r[k]) for r in rows]) for k in ("Model Size", "Training FLOP", "loss"))
    keep = y < np.sort(y)[-5]
    return np.log(n[keep]), np.log(c[keep] / (6 * n[keep])), y[keep]


def huber(r: np.ndarray) -> np.ndarray:
    size = np.abs(r)
    return np.where(size <= DELTA, 0.5 * r * r, DELTA * (size - 0.5 * DELTA))


def log_loss(p, log_n, log_d):
    """ln of the law at (ln A, ln B, ln E, alpha, beta)."""
    return logsumexp([p[0] - p[3] * log_n, p[1] - p[4] * log_d, np.full(len(log_n), p[2])], axis=0)


def grid_peer(log_n, log_d, y, share: float, rng) -> tuple[float, float]:
    """CPU seconds of the whole grid of 4,500 starts, and the best sum among the share that was run."""
    grid = list(
        product(
            range(0, 30, 5), range(0, 30, 5), np.arange(-1, 1.5, 0.5), np.arange(0, 2.5, 0.5), np.arange(0, 2.5, 0.5)
        )
    )
    some = [grid[i] for i in rng.choice(len(grid), max(1, round(share * len(grid))), replace=False)]
    start, best = time.process_time(), np.inf
    for p in some:
        got = minimize(lambda q: huber(log_loss(q, log_n, log_d) - np.log(y)).sum(), p, method="L-BFGS-B")
        best = min(best, got.fun)
    return (time.process_time() - start) * len(grid) / len(some), best


def ladder_peer(log_n, log_d, y, share: float, rng) -> tuple[float, float]:
    """The same of 1,024 starts in linear A, B, E with bounds."""
    n, d = np.exp(log_n), np.exp(log_d)

    def total(q):
        pred = q[2] + q[0] / n ** q[3] + q[1] / d ** q[4]
        return huber(np.log(np.maximum(pred, 1e-12)) - np.log(y)).sum()

    count = max(1, round(share * 1024))
    start, best = time.process_time(), np.inf
    for _ in range(count):
        p = [*rng.uniform(1, 20, 2), rng.uniform(0.5, 3), *rng.uniform(0.1, 0.7, 2)]
        box = [(0, 1e10), (0, 1e10), (0, 1e10), (0, 2), (0, 2)]
        best = min(best, minimize(total, p, method="L-BFGS-B", bounds=box).fun)
    return (time.process_time() - start) * 1024 / count, best


def bfgs_peer(log_n, log_d, y, counts) -> tuple[float, np.ndarray]:
    """CPU seconds a resample, and the sums reached, by BFGS with the exact gradient."""
    sums, start = [], time.process_time()
    for w in counts:

        def value(q, w=w):
            terms = np.stack([q[0] - q[3] * log_n, q[1] - q[4] * log_d, np.full(len(log_n), q[2])])
            ln_pred = logsumexp(terms, axis=0)
            r = ln_pred - np.log(y)
            share = np.exp(terms - ln_pred) * (w * np.clip(r, -DELTA, DELTA))
            g = share.sum(axis=1)
            return (w * huber(r)).sum(), np.array([g[0], g[1], g[2], -share[0] @ log_n, -share[1] @ log_d])

        sums.append(
            minimize(value, [np.log(406.4), np.log(410.7), np.log(1.69), 0.34, 0.28], jac=True, method="BFGS").fun
        )
    return (time.process_time() - start) / len(counts), np.array(sums)


def squares_peer(log_n, log_d, y, counts, theta) -> tuple[float, np.ndarray]:
    """CPU seconds a resample, and the sums reached, by least_squares on L with the exact Jacobian."""
    sums, start = [], time.process_time()
    for w in counts:
        root = np.sqrt(w)

        def residual(q, root=root):
            return root * (np.exp(q[0]) + np.exp(q[1] - q[3] * log_n) + np.exp(q[2] - q[4] * log_d) - y)

        def slope(q, root=root):
            a, b = np.exp(q[1] - q[3] * log_n), np.exp(q[2] - q[4] * log_d)
            return root[:, None] * np.stack([np.full(len(y), np.exp(q[0])), a, b, -log_n * a, -log_d * b], axis=1)

        sums.append(2 * least_squares(residual, theta, jac=slope, x_scale="jac").cost)
    return (time.process_time() - start) / len(counts), np.array(sums)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--share", type=float, default=0.004, help="of the two grids' starts run in a round")
    parser.add_argument("--resamples", type=int, default=16, help="of the peers' run in a round")
    args = parser.parse_args()
    log_n, log_d, y = runs(args.data)
    x = np.stack([log_n, log_d], axis=1)
    keys = bootstrap.cell_keys(np.exp(log_n), np.exp(log_d))
    counts = np.load(args.data / "epoch_bootstrap_counts.npz")["counts"].astype(float)
    rng = np.random.default_rng(0)
    seconds: dict[str, list[float]] = {}
    worst: dict[str, float] = {}

    def note(name: str, value: float) -> None:
        seconds.setdefault(name, []).append(value)

    for turn in range(args.rounds):
        start = time.process_time()
        fit = fit_law(JOINT, x, y, delta=DELTA)
        note("ours, fit", time.process_time() - start)
        for name, peer in (("grid of 4,500", grid_peer), ("1,024 starts", ladder_peer)):
            spent, best = peer(log_n, log_d, y, args.share, rng)
            note(name, spent)
            worst[name] = max(worst.get(name, -np.inf), fit.objective / best - 1)
        part = counts[turn * 400 : turn * 400 + 400]
        squares = fit_law(JOINT, x, y, loss="ls")
        for name, made, peer in (("robust", fit, bfgs_peer), ("squares", squares, squares_peer)):
            start = time.process_time()
            drawn = bootstrap.draw(made, x, y, keys, counts=part)
            note(f"ours, {name} resample", (time.process_time() - start) / len(part))
            few = part[: args.resamples]
            raw = [np.log(made.raw[0]), np.log(made.raw[1]), np.log(made.raw[2]), *made.raw[3:]]
            spent, sums = peer(log_n, log_d, y, few, *([raw] if name == "squares" else []))
            note(f"peer, {name} resample", spent)
            pred = JOINT.predict(drawn.theta[: len(few)], x - fit.centre)
            ours = (few * (huber(np.log(pred / y)) if name == "robust" else (pred - y) ** 2)).sum(axis=1)
            worst[f"peer, {name} resample"] = max(worst.get(f"peer, {name} resample", -np.inf), (ours / sums - 1).max())
    middle = {k: float(np.median(v)) for k, v in seconds.items()}
    print("| job | ours | theirs | ratio | our objective against theirs, worst |\n|---|---|---|---|---|")
    table = [(f"one robust fit, against the {p}", "ours, fit", p) for p in ("grid of 4,500", "1,024 starts")]
    table += [(f"{k} resample", f"ours, {k} resample", f"peer, {k} resample") for k in ("robust", "squares")]
    for what, ours, theirs in table:
        print(
            f"| {what} | {1e3 * middle[ours]:.3g} ms | {1e3 * middle[theirs]:.4g} ms | "
            f"{middle[theirs] / middle[ours]:.0f} | {worst[theirs]:+.1e} |"
        )


if __name__ == "__main__":
    main()
