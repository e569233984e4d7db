"""How well `--form auto` extrapolates, beside each form by itself, on simulated learning curves.

    python tools/bench_choice.py --repeats 3

Eight truths of one variable (power laws with floor 0 and free, shifted, broken, M3, saturating from above, a bump as of
double descent, stretched exponential) with random exponents, floors and spans, 6, 12 and 30 points, ln-normal noise of
0.2, 1 and 3 %. Each form is fitted to the points and predicts the truth at 1.5, 2.5, 4 and 8 times the largest. The
table has the root mean square error of ln loss (an error counts at most 3), its mean over curves and its median; the
last column is the best form in hindsight, which nobody can choose. Randomness: NumPy's PCG64 by (seed, repeat).
"""

import argparse

import numpy as np
from coverage import runs_of

from ecg_jax.scaling import choice, forms
from ecg_jax.scaling.solve import fit_law

POINTS = (6, 12, 30)
NOISES = (0.002, 0.01, 0.03)
BEYOND = np.array([1.5, 2.5, 4.0, 8.0])
WORST = 3.0


def truths(rng: np.random.Generator, x: np.ndarray, low: float, high: float) -> dict[str, np.ndarray]:
    """Loss at the sizes x [n] of curves that were seen from `low` to `high`, by name."""
    a, floor, z, middle = rng.uniform(0.15, 0.7), rng.uniform(0.02, 0.4), x / low, (low * high) ** 0.5
    hill = (x / (0.3 * middle)) ** -a
    return {
        "power0": z**-a,
        "power": floor + z**-a,
        "shifted": 0.5 * floor + (1 + 10 * x / middle) ** -a,
        "broken": 0.3 * floor + z ** (-0.3 * a) * (1 + (x / middle) ** 2) ** (-0.35 * a),
        "m3": (1 / x + 3 / high) ** a,
        "saturating": 0.1 * floor + 0.9 * hill / (1 + hill),
        "bump": 0.1 * floor + z**-a * (1 + 0.25 * np.exp(-((np.log(x / middle) / 0.8) ** 2))),
        "stretched": floor + 0.8 * np.exp(-((x / middle) ** 0.3)),
    }


def errors(x: np.ndarray, seen: np.ndarray, further: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Error of each form, of `auto`, and of the best in hindsight; a form with too few points counts as `power`."""
    found: dict[str, float] = {}
    for form in choice.ONE:
        law = forms.get(form, ("D",))
        if len(x) > law.size:
            predicted = fit_law(law, np.log(x)[:, None], seen).predict(np.log(further)[:, None])
            miss = np.abs(np.log(np.maximum(predicted, 1e-300) / truth))
            found[form] = float(np.sqrt(np.mean(np.minimum(miss, WORST) ** 2)))
    chosen = choice.choose([runs_of("curve", np.full(len(x), 1e6), x, seen)], ("D",), loss="log-huber")
    auto = found[chosen.form if chosen else "power"]
    return {f: found.get(f, found["power"]) for f in choice.ONE} | {"auto": auto, "best": min(found.values())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=1, help="curves of each truth, number of points and noise")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rows: dict[str, list[dict[str, float]]] = {}
    for repeat in range(args.repeats):
        rng = np.random.default_rng([args.seed, repeat])
        for noise in NOISES:
            for points in POINTS:
                low, high = 10 ** rng.uniform(1, 4), 10 ** rng.uniform(6, 8)
                sizes = np.geomspace(low, high, points).round()
                further = sizes[-1] * BEYOND
                for name, loss in truths(rng, np.append(sizes, further), sizes[0], sizes[-1]).items():
                    seen = loss[:points] * np.exp(noise * rng.normal(size=points))
                    found = errors(sizes, seen, further, loss[points:])
                    for row in (name, f"{points} points", "all"):
                        rows.setdefault(row, []).append(found)
    names = list(rows["all"][0])
    print("| mean | " + " | ".join(names) + " |\n|" + "---|" * (len(names) + 1))
    for row, found in rows.items():
        print(f"| {row} | " + " | ".join(f"{np.mean([f[n] for f in found]):.4f}" for n in names) + " |")
    print("| median | " + " | ".join(f"{np.median([f[n] for f in rows['all']]):.4f}" for n in names) + " |")


if __name__ == "__main__":
    main()
