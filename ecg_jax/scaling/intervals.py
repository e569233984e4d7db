"""Intervals from bootstrap draws, with ends that may be unbounded.

    t           estimate -+ t(df) times the robust standard deviation of the draws (half the width between
                the 15.9 % and the 84.1 % quantile); for wild draws and small designs, where
                percentiles cover too little
    percentile  quantiles of the draws; for case draws of 40 configurations or more

A draw at an exponent's upper bound counts as +infinity, a draw without information as both infinities.
Where too many draws are infinite an end is None: unbounded, and the share is known.

It knows nothing of laws but their parameter names. Invariant: low <= estimate <= high wherever both ends
exist.
"""

from dataclasses import dataclass

import numpy as np
from scipy.special import ndtr, stdtr, stdtrit

from ecg_jax.scaling.bootstrap import Draws
from ecg_jax.scaling.solve import Fit

ONE_SIGMA = (float(ndtr(-1.0)), float(ndtr(1.0)))


@dataclass(frozen=True)
class Interval:
    """Ends (None: unbounded), the draws' robust standard deviation (None: infinite) and the share of
    infinite draws."""

    low: float | None
    high: float | None
    sd: float | None
    infinite: float = 0.0

    def pair(self) -> list[float | None]:
        return [self.low, self.high]

    def covers(self, value: float) -> bool:
        return (self.low is None or self.low <= value) and (self.high is None or value <= self.high)


def t_quantile(q: float, df: int) -> float:
    """Student's t quantile; fewer than one degree of freedom count as one. (scipy.stats takes seconds to
    import.)"""
    return float(stdtrit(max(df, 1), q))


def method_of(draws: Draws) -> str:
    """`percentile` for case draws, `t` for wild ones."""
    return "percentile" if draws.kind == "case" else "t"


def interval(estimate: float, values: np.ndarray, *, level: float, method: str, df: int) -> Interval:
    """Interval for `estimate` from draws [B] that may hold infinities and NaN (no information: both tails).

    df: degrees of freedom of the t quantile (method `t`). Raises ValueError for an unknown method.
    """
    if method not in ("t", "percentile"):
        raise ValueError(f"unknown interval {method!r}; known: t, percentile")
    tail = (1.0 - level) / 2.0
    blind = np.isnan(values)
    lower = np.sort(np.where(blind, -np.inf, values))
    upper = np.sort(np.where(blind, np.inf, values))
    infinite = float(np.mean(~np.isfinite(values)))
    low_one, high_one = _quantile(lower, ONE_SIGMA[0]), _quantile(upper, ONE_SIGMA[1])
    sd = 0.5 * (high_one - low_one)
    if method == "percentile":
        low, high = _quantile(lower, tail), _quantile(upper, 1.0 - tail)
    else:
        factor = t_quantile(1.0 - tail, df)
        middle = float(np.median(upper if np.isinf(low_one) else lower))
        down = sd if np.isfinite(sd) else middle - low_one
        up = sd if np.isfinite(sd) else high_one - middle
        low, high = estimate - factor * down, estimate + factor * up
        # Even where one sigma is finite, an end beyond which draws are infinite is not known.
        low = -np.inf if np.isneginf(_quantile(lower, tail)) else low
        high = np.inf if np.isposinf(_quantile(upper, 1.0 - tail)) else high
    low, high = min(low, estimate), max(high, estimate)
    return Interval(_finite(low), _finite(high), _finite(sd), infinite)


def p_value(estimate: float, values: np.ndarray, *, null: float, df: int) -> float | None:
    """Two-sided p of `estimate` = `null` by the bootstrap t; None where the draws have no finite spread."""
    sd = interval(estimate, values, level=0.95, method="t", df=df).sd
    if sd is None or not np.isfinite(estimate):
        return None
    if sd == 0.0:
        return 1.0 if estimate == null else 0.0
    return float(2.0 * stdtr(max(df, 1), -abs(estimate - null) / sd))


def parameter_intervals(fit: Fit, draws: Draws, *, level: float) -> dict[str, Interval]:
    """An interval per raw parameter. Amplitudes go through their logs; nothing falls below zero."""
    df = draws.configurations - fit.law.size
    out = {}
    for j, name in enumerate(fit.law.names):
        values, estimate = parameter_draws(fit, draws, j), float(fit.raw[j])
        if name in ("A", "B") and estimate > 0:
            with np.errstate(divide="ignore"):
                found = interval(np.log(estimate), np.log(values), level=level, method=method_of(draws), df=df)
            low = 0.0 if found.low is None else float(np.exp(found.low))
            with np.errstate(over="ignore"):
                high = None if found.high is None else _finite(float(np.exp(found.high)))
            sd = interval(estimate, values, level=level, method=method_of(draws), df=df).sd
            out[name] = Interval(low, high, sd, found.infinite)
        else:
            found = interval(estimate, values, level=level, method=method_of(draws), df=df)
            low = 0.0 if found.low is None else max(found.low, 0.0)
            out[name] = Interval(low, found.high, found.sd, found.infinite)
    return out


def parameter_draws(fit: Fit, draws: Draws, j: int) -> np.ndarray:
    """Draws of raw parameter j [B], +inf at an exponent's upper bound, NaN where its term has vanished."""
    return fit.law.draw_values(draws.theta, draws.raw, j)


def band(fit: Fit, draws: Draws, log_x: np.ndarray, *, level: float) -> tuple[np.ndarray, np.ndarray]:
    """Interval of the law itself (not of a new run) at ln x [m, V]: low and high, [m] each, made on ln L."""
    z = np.asarray(log_x, float) - fit.centre
    with np.errstate(over="ignore"):
        curves = np.log(fit.law.predict(draws.theta, z))
    centre = np.log(fit.law.predict(fit.theta[None], z))[0]
    tail = (1.0 - level) / 2.0
    if method_of(draws) == "percentile":
        low, high = np.quantile(curves, [tail, 1.0 - tail], axis=0)
        return np.exp(np.minimum(low, centre)), np.exp(np.maximum(high, centre))
    low, high = np.quantile(curves, ONE_SIGMA, axis=0)
    half = t_quantile(1.0 - tail, draws.configurations - fit.law.size) * 0.5 * (high - low)
    return np.exp(centre - half), np.exp(centre + half)


def _quantile(ordered: np.ndarray, q: float) -> float:
    """Linear quantile of sorted values that may begin or end with infinities."""
    place = q * (len(ordered) - 1)
    left, right = ordered[int(np.floor(place))], ordered[int(np.ceil(place))]
    if left == right:
        return float(left)
    part = place - np.floor(place)
    if np.isinf(left) or np.isinf(right):
        return float(left if part < 0.5 else right)
    return float(left + part * (right - left))


def _finite(x: float) -> float | None:
    return float(x) if np.isfinite(x) else None
