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
from ecg_jax.scaling.restrict import Restricted, restrict
from ecg_jax.scaling.solve import Fit

STEPS = 24  # halvings of the log distance that brackets an end
REACH = 1e4  # raw values are followed down to 1/REACH and up to REACH times the estimate


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
    """Interval of one raw parameter; None where it is fixed, zero, or cannot be held."""
    if isinstance(fit.law, Restricted):
        base, fixed = fit.law.law, dict(fit.law.fixed)
    else:
        base, fixed = fit.law, {}
    estimate = fit.parameters[name]
    if name in fixed or name in fixed.values() or not (np.isfinite(estimate) and estimate > 0):
        return None
    z = log_x - fit.centre
    target = np.log(y) if fit.logarithmic else y
    criterion, weights = fit.criterion(), np.ones(len(y))
    start = restrict(base, {}, fit.centre)
    full = fit.law.whole(fit.theta) if isinstance(fit.law, Restricted) else fit.theta
    full = np.where(np.isfinite(full), full, start.bounds(y, z).low)
    smallest = _sum(fit, criterion)
    threshold = stdtrit(max(fit.n - fit.law.size, 1), 0.5 + level / 2) ** 2 / max(fit.n - fit.law.size, 1)
    try:
        restrict(base, fixed | {name: estimate}, fit.centre)
    except ValueError:
        return None

    def deviance(values: np.ndarray, begin: np.ndarray) -> tuple[float, np.ndarray]:
        law = restrict(base, fixed | {name: float(values)}, fit.centre)
        if law.size == 0:
            return np.inf, begin
        solved = minimise(law, z, target, weights, begin[None, law.keep], law.bounds(y, z), criterion, max_iter=60)
        return float(solved.objective[0] / smallest - 1.0), law.whole(solved.theta[0])

    ends: list[float | None] = []
    for side in (-1.0, 1.0):
        inside, outside, at = 0.0, None, full
        step = 0.05
        while step < np.log(REACH):  # outward in ever larger steps, each warm from the last
            worse, theta = deviance(estimate * np.exp(side * step), at)
            if not worse < threshold:
                outside = step
                break
            inside, at, step = step, np.where(np.isfinite(theta), theta, full), 1.8 * step
        if outside is None:
            ends.append(None)
            continue
        for _ in range(STEPS // 2):
            middle = 0.5 * (inside + outside)
            worse, _ = deviance(estimate * np.exp(side * middle), at)
            inside, outside = (middle, outside) if worse < threshold else (inside, middle)
        ends.append(float(estimate * np.exp(side * 0.5 * (inside + outside))))
    return Profile(name, *ends)


def _sum(fit: Fit, criterion) -> float:
    unit = criterion.delta if np.isfinite(criterion.delta) else 1.0
    return max(float(criterion.shape(fit.residuals / unit)[0].sum()), 1e-300)
