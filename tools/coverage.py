"""Coverage of the multiplier's interval, measured: simulate two families, fit, bootstrap, see whether it holds 1.9.

    python tools/coverage.py --simulations 2000 --out coverage.md

Designs of 6 sizes x 5 data sizes and 4 x 3, one run each, ln-normal noise of 0.2 % and 1 %; both families follow a
Hoffmann law and need parameters in the ratio 1.9 at every loss. `misspecified`: the truth is the coupled form with
k = 1.15, still with the ratio 1.9, and a Hoffmann law is fitted to it; at 0.2 % noise that is a gross misfit, where no
interval of a wrong form can cover and what counts is that it is announced: the last column is the share of studies
in which `fit` says "lack of fit" of either family. Everything runs through the same calls as
`ecg-jax fit` (fit_law, bootstrap.draw, multipliers.compare). Randomness: NumPy's PCG64 by (seed, cell, simulation).
A figure of 2,000 simulations has a standard error of half a point.
"""

import argparse
import time
from pathlib import Path

import numpy as np

from ecg_jax.scaling import adequacy, bootstrap, families, identify, laws, multipliers
from ecg_jax.scaling.analysis import LawResult
from ecg_jax.scaling.solve import fit_law

RATIO = 1.9
E, A, ALPHA, B, BETA = 0.03, 0.008, 0.22, 0.012, 0.35  # amplitudes at N = 1e6 and D = 1e5
DESIGNS = {"6 x 5": (6, 5), "4 x 3": (4, 3)}
NOISES = (0.002, 0.01)
MISSPECIFIED = 1.15  # k of the coupled form that the Hoffmann law is fitted to
JOINT = laws.get("hoffmann", ("N", "D"))


def truth(n: np.ndarray, d: np.ndarray, k: float) -> np.ndarray:
    """Loss [n]; k = 1: Hoffmann. At the centre of the design the excess does not depend on k."""
    a, b = A * (n / 1e6) ** -ALPHA, B * (d / 1e5) ** -BETA
    return E + (A + B) ** (1 - k) * (a + b) ** k


def simulate(design: tuple[int, int], noise: float, k: float, rng: np.random.Generator, draws: int, seed: int):
    """One study: the multiplier of the second family over the first, and whether misfit is announced."""
    sizes, data = np.geomspace(2e4, 6.4e7, design[0]), np.geomspace(2.3e4, 2.3e6, design[1])
    n, d = (x.ravel() for x in np.meshgrid(sizes, data, indexing="ij"))
    results, announced = [], False
    for name, ratio in (("resnet1d", 1.0), ("transformer", RATIO)):
        loss = truth(n / ratio, d, k) * np.exp(noise * rng.normal(size=len(n)))
        x = laws.design(JOINT, n, d)
        fit = fit_law(JOINT, x, loss, n_starts=2)
        drawn = bootstrap.draw(fit, x, loss, bootstrap.cell_keys(n, d), draws=draws, seed=seed, kind="wild")
        runs = runs_of(name, n, d, loss)
        announced |= bool(adequacy.failed(adequacy.checks(runs, JOINT)))
        results.append(LawResult(runs, JOINT, fit, drawn, {}, identify.Identification(()), None, None, ()))
    return next(m for m in multipliers.compare(*results, level=0.95) if m.kind == "M_N"), announced


def runs_of(name: str, n: np.ndarray, d: np.ndarray, loss: np.ndarray) -> families.RunSet:
    key = families.SetKey(name, "SL", "signal", "simulated", "pretrain", "id", "loss", "", 1.0)
    nan, rows = np.full(len(n), np.nan), [str(i) for i in range(len(n))]
    return families.RunSet(
        key, n, d, loss, np.ones(len(n), bool), nan, nan, tuple(rows), ("done",) * len(n), (Path(),) * len(n),
        "test", "best-val", {}, (), nan,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--simulations", type=int, default=2000)
    parser.add_argument("--draws", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cells", default="", help="only these, as '0,3' (0 to 7)")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    cells = [(name, noise, 1.0) for name in DESIGNS for noise in NOISES] + [
        (name, noise, MISSPECIFIED) for noise in (0.01, 0.002) for name in DESIGNS
    ]
    chosen = [int(c) for c in args.cells.split(",")] if args.cells else range(len(cells))
    lines = [
        "| design | noise | truth | covered | too low | too high | median half width | unbounded | misfit announced |",
        "|" + "---|" * 9,
    ]
    for cell in chosen:
        design, noise, k = cells[cell]
        start, inside, below, above, widths, unbounded, told = time.monotonic(), 0, 0, 0, [], 0, 0
        for i in range(args.simulations):
            rng = np.random.default_rng([args.seed, cell, i])
            m, announced = simulate(DESIGNS[design], noise, k, rng, args.draws, seed=i)
            low, high = (
                -np.inf if m.interval[0] is None else m.interval[0],
                np.inf if m.interval[1] is None else m.interval[1],
            )
            inside, below, above = inside + (low <= RATIO <= high), below + (high < RATIO), above + (low > RATIO)
            told += announced
            unbounded += m.interval[0] is None or m.interval[1] is None
            widths.append(0.5 * np.log(high / max(low, 1e-9)))
        total = args.simulations
        what = "Hoffmann" if k == 1 else f"coupled, k = {k:g}"
        lines.append(
            f"| {design} | {100 * noise:g} % | {what} | {100 * inside / total:.1f} % | {100 * below / total:.1f} % | "
            f"{100 * above / total:.1f} % | {100 * np.median(widths):.1f} % | {100 * unbounded / total:.1f} % | "
            f"{100 * told / total:.1f} % |"
        )
        print(lines[-1], f"{time.monotonic() - start:.0f} s", flush=True)
    if args.out:
        args.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
