"""Profile likelihood: how far a parameter may be moved, all others re-fitted, before the fit suffers.

The check of the bootstrap's intervals, and the words for what is only bounded on one side. The deviance is
n ln(objective / smallest objective), which for squares of ln L is the likelihood ratio; for the robust losses it
is the same statement about their own criterion. A side that never reaches the threshold inside the parameter's
box is unbounded.

Deterministic. Invariant: the ends enclose the estimate.
"""

from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

from ecg_jax.scaling.newton import minimise
from ecg_jax.scaling.restrict import Restricted, whole
from ecg_jax.scaling.solve import Fit

REACH = 1e4  # raw values are followed down to 1/REACH and up to REACH times the estimate
LADDER = 0.05 * np.cumsum(1.8 ** np.arange(9))  # in ln of the value; the last is beyond ln REACH
FINER = 8  # places between the two that bracket an end


@dataclass(frozen=True)
class Profile:
    """Ends by the profile (None: unbounded) of one parameter."""

    name: str
    low: float | None
    high: float | None

    @property
    def words(self) -> str:
        """`RD is bounded below only`, and so on; empty where both ends exist."""
        if self.low is not None and self.high is not None:
            return ""
        if self.low is None and self.high is None:
            return f"{self.name} is not determined by these runs"
        return f"{self.name} is bounded {'below' if self.high is None else 'above'} only"


def profile(fit: Fit, log_x: np.ndarray, y: np.ndarray, name: str, *, level: float = 0.95) -> Profile | None:
    """Interval of one raw parameter; None where it is fixed, zero, or leans on others (a raw amplitude)."""
    law, theta = fit.law, fit.theta
    full, _ = whole(law, theta)
    fixed = dict(law.fixed) if isinstance(law, Restricted) else {}
    estimate = fit.parameters[name]
    if name in fixed or name in fixed.values() or not (np.isfinite(estimate) and estimate > 0):
        return None
    try:
        j, at_estimate, leaning = full.pin(name, estimate, fit.centre)
    except ValueError:
        return None
    if leaning:
        return None
    logarithmic = not np.isclose(at_estimate, estimate)  # inside stands ln of the parameter
    j = law.keep.tolist().index(j) if isinstance(law, Restricted) else j
    z = log_x - fit.centre
    target = np.log(y) if fit.logarithmic else y
    criterion, weights, bounds = fit.criterion(), fit.weights, law.bounds(y, z)
    smallest = _sum(fit, criterion)
    threshold = stdtrit(max(fit.n - law.size, 1), 0.5 + level / 2) ** 2 / max(fit.n - law.size, 1)

    def excess(logs: np.ndarray, begin: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Relative rise of the sum at each ln of value over estimate, and where the others went."""
        if law.size == 1:
            return np.where(logs == 0, 0.0, np.inf), begin
        begin = np.array(begin)
        begin[:, j] = inner(logs)
        solved = minimise(law, z, target, weights, begin, bounds, criterion, max_iter=60, hold=j)
        return solved.objective / smallest - 1.0, solved.theta

    def inner(logs: np.ndarray) -> np.ndarray:
        return at_estimate + logs if logarithmic else estimate * np.exp(logs)

    start = np.maximum(theta, bounds.low)
    ends: list[float | None] = []
    for side in (-1.0, 1.0):
        logs = side * LADDER
        logs = logs[(inner(logs) > bounds.low[j]) & (inner(logs) < bounds.high[j]) & (LADDER < np.log(REACH))]
        if not len(logs):
            ends.append(None)
            continue
        worse, thetas = excess(logs, np.tile(start, (len(logs), 1)))
        # Once more, each from where its neighbour nearer to the estimate went.
        worse = np.minimum(worse, excess(logs, np.concatenate([start[None], thetas[:-1]]))[0])
        beyond = np.flatnonzero(~(worse < threshold))
        if not len(beyond):
            ends.append(None)
            continue
        k = int(beyond[0])
        inside, low, at = (0.0, 0.0, start) if k == 0 else (logs[k - 1], worse[k - 1], thetas[k - 1])
        marks = np.linspace(inside, logs[k], FINER + 2)
        rise = np.array([low, *excess(marks[1:-1], np.tile(at, (FINER, 1)))[0], worse[k]])
        m = int(np.flatnonzero(~(rise[1:] < threshold))[0])
        a, b = np.sqrt(np.maximum(rise[m : m + 2], 0.0))  # the root of the rise is nearly straight
        part = (np.sqrt(threshold) - a) / (b - a) if np.isfinite(b) else 0.5
        ends.append(float(estimate * np.exp(marks[m] + part * (marks[m + 1] - marks[m]))))
    return Profile(name, *ends)


def _sum(fit: Fit, criterion) -> float:
    unit = criterion.delta if np.isfinite(criterion.delta) else 1.0
    return max(float((fit.weights * criterion.shape(fit.residuals / unit)[0]).sum()), 1e-300)
