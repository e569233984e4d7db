"""Bootstrap draws of a fitted law: one batch of weights or of perturbed losses, solved warm from the
estimate.

    case   configurations (N, D) are drawn with replacement; repeated seeds of a configuration stay together
    wild   residuals, divided by 1 - leverage, are multiplied per configuration by Webb's
           six-point variable and added to the fitted law; the design stays as it is, which small grids need
    residual    residuals, divided by the root of 1 - leverage and centred, are drawn with replacement for every run
    parametric  normal noise of the residuals' standard deviation for every run

The random numbers of a configuration depend only on the seed and on the configuration's key (`cell_keys`),
so fits on the same design (tasks of one family, families on the same grid) get common draws and their
differences are paired. Two in a hundred draws, half of them those that lie farthest out, are solved again from other
starts; how many improved is reported.

It does not make intervals (`intervals`). Invariant: the same seed gives the same draws, whatever else is
fitted.
"""

from dataclasses import dataclass, replace
from hashlib import blake2b

import numpy as np

from ecg_jax.scaling.newton import minimise
from ecg_jax.scaling.solve import Fit

KINDS = ("case", "wild", "residual", "parametric")
SMALL_DESIGN = 40  # configurations below which case resampling drops too much of the design
LEVERAGE_POWER = 1.0  # of 1 - leverage; 0.5 is unbiased for the variance but covers 87 to 93 % (tools/coverage.py)
RECHECKED = 0.02
NO_GAIN = 1e-6  # relative, over 20 steps: far below what a draw varies by; only flat valleys are that slow
PATIENCE = 200  # Newton steps; warm draws of an identified law take about ten, flat valleys a hundred
SIX_POINTS = np.sqrt(np.array([0.5, 1.0, 1.5])).repeat(2) * np.tile([-1.0, 1.0], 3)  # Webb 2013


@dataclass(frozen=True)
class Draws:
    """Bootstrap replicates of one fit: centred `theta` and raw parameters, [B, P]."""

    kind: str
    theta: np.ndarray
    raw: np.ndarray
    rechecked: int  # draws solved again from many starts
    improved: int  # of these, how many a second look made better by more than one part in 1e6
    unconverged: int  # draws whose solver ran out of steps: a flat valley, no law to speak of
    configurations: int

    @property
    def count(self) -> int:
        return len(self.theta)

    def first(self, count: int) -> "Draws":
        """The first `count` of them: the same as if no more had been drawn."""
        return replace(self, theta=self.theta[:count], raw=self.raw[:count])


def cell_keys(n_params: np.ndarray, n_records: np.ndarray) -> list[str]:
    """Key of each run's configuration, [n]: the rank of N within the family and D itself.

    Families differ in their sizes but share their data subsets, so that "third smallest model on 8,192
    records" is what two families have in common.
    """
    rank = np.unique(n_params, return_inverse=True)[1]
    return [f"{r}/{d:.6g}" for r, d in zip(rank.tolist(), np.asarray(n_records, float).tolist(), strict=True)]


def choose_kind(n_params: np.ndarray, n_records: np.ndarray) -> str:
    """`wild` for designs under 40 configurations and for grids (over 60 % of all N x D filled), else
    `case`."""
    cells = len(set(zip(n_params.tolist(), n_records.tolist(), strict=True)))
    grid = len(np.unique(n_params)) * len(np.unique(n_records))
    return "wild" if cells < SMALL_DESIGN or (cells > 0.6 * grid and grid > cells**0.5) else "case"


def draw(
    fit: Fit,
    log_x: np.ndarray,
    y: np.ndarray,
    keys: list[str],
    *,
    draws: int = 1000,
    seed: int = 0,
    kind: str = "wild",
    counts: np.ndarray | None = None,
) -> Draws:
    """Bootstrap `fit`, which was made from losses y [n] at ln x [n, V] with configuration keys [n].

    counts: [B, n] resampling counts made elsewhere, instead of own draws (then `kind` and `draws` are not
    looked at). Randomness: NumPy's PCG64 seeded by (seed, key) for `wild`, by (seed, all keys) for `case`.
    Raises ValueError for an unknown kind.
    """
    z = np.asarray(log_x, float) - fit.centre
    y = np.asarray(y, float)
    cells, cell_of = np.unique(np.array(keys), return_inverse=True)
    target = np.log(y) if fit.logarithmic else y
    weights = fit.weights
    if counts is not None:
        kind, weights = "case", np.asarray(counts, float) * fit.weights
    elif kind == "case":
        weights = case_counts(cells, draws, seed)[:, cell_of] * fit.weights
    elif kind == "wild":
        signs = wild_signs(cells, draws, seed)[:, cell_of]
        # One row alone in its corner of the design has leverage 1 and residual 0: nothing to divide.
        spread = fit.residuals / np.maximum(1.0 - fit.leverage, 0.02) ** LEVERAGE_POWER
        target = target + fit.residuals - signs * spread  # residual = fitted - target
    elif kind in ("residual", "parametric"):
        target = target + fit.residuals - _noise(fit, keys, kind, draws, seed)
    else:
        raise ValueError(f"unknown bootstrap {kind!r}; known: {', '.join(KINDS)}")
    bounds = fit.law.bounds(y, z)
    replicates = max(len(np.atleast_2d(target)), len(np.atleast_2d(weights)))
    begin = np.maximum(np.repeat(fit.theta[None], replicates, axis=0), bounds.low)
    zero = fit.law.zeroable()
    begin[:, zero] = np.maximum(begin[:, zero], bounds.low[zero] + 18.0)  # so that a draw may leave zero again
    criterion = fit.criterion()
    solved = minimise(
        fit.law,
        z,
        target,
        weights,
        begin,
        bounds,
        criterion,
        max_iter=PATIENCE,
        stall=NO_GAIN,
        curved=fit.law.cheap,
        polish=1,
    )
    theta = solved.theta
    again = _doubtful(theta, max(1, round(0.5 * RECHECKED * replicates)))
    improved = _look_again(fit, z, target, weights, theta, solved.objective, again, bounds)
    return Draws(
        kind,
        theta,
        fit.law.raw(theta, fit.centre),
        len(again),
        improved,
        int((~solved.converged).sum()),
        len(cells),
    )


def _doubtful(theta: np.ndarray, count: int) -> np.ndarray:
    """`count` draws evenly spaced and the `count` draws farthest from the middle one."""
    spread = np.maximum(np.subtract(*np.quantile(theta, [0.75, 0.25], axis=0)), 1e-12)
    far = np.abs((theta - np.median(theta, axis=0)) / spread).max(axis=1)
    even = np.linspace(0, len(theta) - 1, min(count, len(theta))).round().astype(int)
    return np.union1d(even, np.argsort(-far, kind="stable")[:count])


def _look_again(fit: Fit, z, target, weights, theta, objective, again: np.ndarray, bounds) -> int:
    """Re-solve the draws `again` from the grid's best start and from the two draws of extreme last parameter;
    better optima replace `theta` in place. Returns how many."""
    order = np.argsort(theta[:, -1], kind="stable")
    begin = np.concatenate([fit.starts[:1], theta[order[[0, -1]]]])
    starts = len(begin)
    rows = np.repeat(again, starts)
    t = target[rows] if target.ndim == 2 else target
    w = weights[rows] if weights.ndim == 2 else weights
    begin = np.tile(begin, (len(again), 1))
    solved = minimise(
        fit.law,
        z,
        t,
        w,
        begin,
        bounds,
        fit.criterion(),
        max_iter=PATIENCE,
        stall=NO_GAIN,
        curved=fit.law.cheap,
        polish=1,
    )
    reached = solved.objective.reshape(len(again), starts)
    best = reached.argmin(axis=1)
    lowest = reached[np.arange(len(again)), best]
    better = lowest < objective[again] * (1 - 1e-6)
    theta[again[better]] = solved.theta.reshape(len(again), starts, -1)[better, best[better]]
    return int(better.sum())


def _noise(fit: Fit, keys: list[str], kind: str, draws: int, seed: int) -> np.ndarray:
    """Noise of every run [draws, n]; column i depends on (seed, key of its configuration, its number in it) only.

    Heavier runs have less of it: residuals are made comparable by the root of their weight, and back.
    """
    seen: dict[str, int] = {}
    streams = []
    for key in keys:
        seen[key] = seen.get(key, -1) + 1
        streams.append(_stream(seed, f"{kind} {key} {seen[key]}"))
    root = np.sqrt(np.maximum(fit.weights, 1e-12))
    if kind == "parametric":
        df = max(fit.n - fit.law.size, 1)
        sd = np.sqrt((fit.weights * fit.residuals**2).sum() / df)
        return np.stack([s.normal(size=draws) for s in streams], axis=1) * sd / root
    pool = root * fit.residuals / np.sqrt(np.maximum(1.0 - fit.leverage, 0.02))
    pool = pool - pool.mean()
    return np.stack([pool[s.integers(0, fit.n, draws)] for s in streams], axis=1) / root


def wild_signs(cells: np.ndarray, draws: int, seed: int) -> np.ndarray:
    """Webb's six-point variable, [draws, cells]; column j depends on (seed, cells[j]) only."""
    columns = [SIX_POINTS[_stream(seed, str(c)).integers(0, 6, draws)] for c in cells]
    return np.stack(columns, axis=1)


def case_counts(cells: np.ndarray, draws: int, seed: int) -> np.ndarray:
    """How often each configuration is drawn, [draws, cells]; rows sum to the number of cells."""
    chosen = _stream(seed, "|".join(map(str, cells))).integers(0, len(cells), (draws, len(cells)))
    offset = np.arange(draws)[:, None] * len(cells)
    return np.bincount((chosen + offset).ravel(), minlength=draws * len(cells)).reshape(draws, len(cells))


def _stream(seed: int, key: str) -> np.random.Generator:
    digest = int.from_bytes(blake2b(key.encode(), digest_size=8).digest(), "little")
    return np.random.default_rng([seed, digest])
