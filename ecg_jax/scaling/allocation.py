"""Compute-optimal N and D: from the fitted surface, and from IsoFLOP parabolas without any surface.

Under L = E + A N^-alpha + B D^-beta and cost C = c N D the cheapest way to a loss has N* = G (C/c)^a and
D* = (C/c)^b / G with a = beta/(alpha+beta), b = 1 - a, G = (alpha A/(beta B))^(1/(alpha+beta)). An IsoFLOP curve
is the loss of runs of one budget over ln N; the vertex of its parabola estimates N* without that form, but is biased
where the runs sit off its centre or alpha differs from beta, so both are printed.

Costs other than c N D are not modelled. Invariant: N* D* = C/c.
"""

from dataclasses import dataclass

import numpy as np

SAME_BUDGET = 0.03  # in ln of the cost


@dataclass(frozen=True)
class Optimum:
    """Exponents of N* and D* in the budget, and N*, D*, loss at budgets [m] of N D."""

    a: float
    b: float
    n_params: np.ndarray
    n_records: np.ndarray
    loss: np.ndarray


def optimum(parameters: dict[str, float], budgets_m: np.ndarray) -> Optimum:
    """Cheapest N and D at each budget N D = C/c of a Hoffmann law given by its raw parameters."""
    e, a, b, alpha, beta = (parameters[k] for k in ("E", "A", "B", "alpha", "beta"))
    log_g = (np.log(alpha * a) - np.log(beta * b)) / (alpha + beta)
    share = beta / (alpha + beta)
    log_n = log_g + share * np.log(budgets_m)
    log_d = np.log(budgets_m) - log_n
    return Optimum(
        share, 1.0 - share, np.exp(log_n), np.exp(log_d), e + a * np.exp(-alpha * log_n) + b * np.exp(-beta * log_d)
    )


def cost_of_loss(parameters: dict[str, np.ndarray], loss: np.ndarray) -> np.ndarray:
    """ln of the smallest N D at which a Hoffmann law reaches `loss`; +inf where it never does, NaN where a term
    of the law has vanished. Broadcasts."""
    e, a, b, alpha, beta = (np.asarray(parameters[k], float) for k in ("E", "A", "B", "alpha", "beta"))
    left = loss - e
    with np.errstate(all="ignore"):
        log_g = (np.log(alpha * a) - np.log(beta * b)) / (alpha + beta)
        level = np.logaddexp(np.log(a) - alpha * log_g, np.log(b) + beta * log_g)
        log_left = np.where(left > 0, np.log(np.maximum(left, 1e-300)), -np.inf)
        return (level - log_left) * (alpha + beta) / (alpha * beta)


def budgets(cost: np.ndarray) -> np.ndarray:
    """Each run's budget [n]: the geometric mean of runs whose costs lie within `SAME_BUDGET` of their neighbour's."""
    order = np.argsort(cost)
    logs = np.log(cost[order])
    group = np.concatenate([[0], np.cumsum(np.diff(logs) > SAME_BUDGET)])
    means = np.bincount(group, logs) / np.bincount(group)
    out = np.empty(len(cost))
    out[order] = np.exp(means[group])
    return out


def envelope(cost: np.ndarray, loss: np.ndarray) -> np.ndarray:
    """Runs on the lower convex hull of ln loss over ln cost, falling, cheapest first: what the money could buy."""
    x, y = np.log(cost), np.log(loss)
    hull: list[int] = []
    for i in np.lexsort((y, x)):
        if hull and (x[i] == x[hull[-1]] or y[i] >= min(y[hull])):
            continue  # dearer and no better
        while len(hull) > 1:
            a, b = hull[-2], hull[-1]
            if (y[b] - y[a]) * (x[i] - x[a]) < (y[i] - y[a]) * (x[b] - x[a]):
                break
            hull.pop()
        hull.append(int(i))
    return np.array(hull)


@dataclass(frozen=True)
class Vertices:
    """IsoFLOP optima: budget and ln x at the vertex of each convex parabola; budgets refused, in words."""

    budget: np.ndarray
    log_x: np.ndarray
    refused: tuple[str, ...]

    @property
    def exponent(self) -> float:
        """Slope of ln x* in ln budget; NaN with fewer than two budgets."""
        return float(np.polyfit(np.log(self.budget), self.log_x, 1)[0]) if len(self.budget) > 1 else float("nan")


def isoflop(budget: np.ndarray, x: np.ndarray, loss: np.ndarray) -> Vertices:
    """Parabola of the loss in ln x at each budget. Fewer than three sizes, or no minimum, is refused and said."""
    found, refused = [], []
    for c in np.unique(budget):
        at = budget == c
        if len(np.unique(x[at])) < 3:
            refused.append(f"{c:.3g}: fewer than three sizes")
            continue
        middle = np.log(x[at]).mean()
        bend, slope, _ = np.polyfit(np.log(x[at]) - middle, loss[at], 2)
        if bend <= 0:
            refused.append(f"{c:.3g}: the parabola has no minimum")
            continue
        found.append((c, middle - slope / (2 * bend)))
    pairs = np.array(found).reshape(-1, 2)
    return Vertices(pairs[:, 0], pairs[:, 1], tuple(refused))
