"""M2 and M4 fitted to transformed losses: as published, and with the Jacobian that the transformation calls for.

    m2   squares of ln(L - E) - ln A + alpha ln x
    m4   squares of ln(L - E) - q ln(E0 - L) - ln A + alpha ln x                    Alabdulmohsin et al. 2022

As published the sum of squares itself is minimised. But E (and E0, q) change what is being squared: the sum is small
where the transformation is flat, so it favours E = 0. The likelihood of L adds the log of the transformation's slope,
sum of ln(1/(L - E) + q/(E0 - L)), to -n/2 ln(sum of squares / n). Both stand beside the fit of ln L itself (`solve`),
for comparison only. Given E, E0 and q the rest is a straight line, so a grid and a simplex find the optimum.

Deterministic. Invariant: 0 <= E < smallest loss, largest loss < E0.
"""

import numpy as np

STEPS = 24  # of each grid axis
FLOORS = np.concatenate([[0.0], 1.0 - np.geomspace(1.0, 1e-3, STEPS)])  # E over the smallest loss
TOPS = 1.0 + np.geomspace(1e-2, 3.0, STEPS // 2)  # E0 over the largest loss
POWERS = np.geomspace(0.1, 5.0, STEPS // 2)


def fit_shift(log_x: np.ndarray, y: np.ndarray, *, form: str, jacobian: bool) -> dict[str, float]:
    """E, A, alpha (and E0, q for `m4`) at ln x [n] and losses y [n] > 0. Raises ValueError for another form."""
    from scipy.optimize import minimize

    if form not in ("m2", "m4"):
        raise ValueError(f"{form} has no shift; m2 and m4 have")

    def line(e, top, q):
        """Objective [G], ln A and alpha of the straight line at parameters [G]."""
        low = np.log(y - e[:, None] * y.min())
        high = np.log(top[:, None] * y.max() - y)
        t = low - q[:, None] * high
        slope = np.exp(-low) + q[:, None] * np.exp(-high)
        z = log_x - log_x.mean()
        alpha = -(t @ z) / (z @ z)
        level = t.mean(axis=1)
        total = ((t - level[:, None] + alpha[:, None] * z) ** 2).sum(axis=1)
        if jacobian:
            total = 0.5 * len(y) * np.log(np.maximum(total, 1e-300) / len(y)) - np.log(slope).sum(axis=1)
        return total, level + alpha * log_x.mean(), alpha

    axes = (FLOORS, TOPS, POWERS) if form == "m4" else (FLOORS, np.array([2.0]), np.array([0.0]))
    grid = np.stack([g.ravel() for g in np.meshgrid(*axes, indexing="ij")])
    best = grid[:, line(*grid)[0].argmin()]

    def inner(p):  # E below the smallest loss and E0 above the largest, whatever the simplex tries
        e = -np.expm1(-abs(p[0]))
        return (np.array([e]), np.array([1.0 + np.exp(p[1])]), np.exp(p[2:])) if form == "m4" else (
            np.array([e]), np.array([2.0]), np.zeros(1))  # fmt: skip

    start = [-np.log1p(-best[0])] + ([np.log(best[1] - 1.0), np.log(best[2])] if form == "m4" else [])
    options = {"xatol": 1e-9, "fatol": 1e-13, "maxiter": 2000, "maxfev": 4000}
    with np.errstate(all="ignore"):
        p = minimize(lambda p: np.nan_to_num(line(*inner(p))[0][0], nan=np.inf), start, method="Nelder-Mead",
                     options=options).x  # fmt: skip
    e, top, q = inner(p)
    _, level, alpha = line(e, top, q)
    out = {"E": float(e[0] * y.min()), "A": float(np.exp(level[0])), "alpha": float(alpha[0])}
    return out | ({"E0": float(top[0] * y.max()), "q": float(q[0])} if form == "m4" else {})
