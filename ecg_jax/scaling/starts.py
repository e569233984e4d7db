"""Starting points: a grid over the exponents, the amplitudes by non-negative least squares on relative
residuals.

Given the exponents a law of `laws` is linear in E, A and B (variable projection), so the grid has one or
two dimensions, not five. With three amplitudes at most, the non-negative optimum is found exactly by trying
every subset of them. For robust losses the residuals are reweighted a few times, so that a diverged run
does not choose the start.

It does not polish anything. Deterministic.
"""

from itertools import combinations

import numpy as np

EXPONENTS = np.geomspace(0.02, 4.0, 16)
EXPONENTS_1D = np.geomspace(0.01, 8.0, 48)
SMALL_SHARE = 1e-3  # an amplitude found to be zero starts at this share of the smallest loss: Newton needs a slope


def grid_starts(
    z_nxV: np.ndarray, y_n: np.ndarray, weights_n: np.ndarray, *, floor: bool, robust: bool, count: int
) -> np.ndarray:
    """The `count` best grid points that are not neighbours, centred parameters [count, P], best first."""
    variables = z_nxV.shape[1]
    axes = [EXPONENTS if variables > 1 else EXPONENTS_1D] * variables
    exponents = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, len(axes))
    index = np.stack(np.meshgrid(*(range(len(a)) for a in axes), indexing="ij"), axis=-1).reshape(-1, len(axes))
    basis = np.exp(-exponents[:, :, None] * z_nxV.T[None])  # [G, V, n]
    if floor:
        basis = np.concatenate([np.ones((len(basis), 1, len(y_n))), basis], axis=1)
    basis = basis / y_n
    weights = np.broadcast_to(weights_n, (len(basis), len(y_n)))
    for _ in range(4 if robust else 1):
        amplitudes = _nonnegative(basis, weights)
        residual = np.abs(np.einsum("gtn,gt->gn", basis, amplitudes) - 1.0)
        middle = np.maximum(np.median(residual, axis=1, keepdims=True), 1e-12)
        score = (np.minimum(residual / middle, 3.0) ** 2 * weights_n).sum(1) * middle[:, 0] ** 2
        if not robust:
            score = (residual**2 * weights_n).sum(1)
        weights = weights_n / np.maximum(residual / middle, 0.3)
    chosen: list[int] = []
    for candidate in np.argsort(score, kind="stable"):
        if all(np.abs(index[candidate] - index[c]).max() > 1 for c in chosen):
            chosen.append(int(candidate))
            if len(chosen) == count:
                break
    log_amplitude = np.log(np.maximum(amplitudes[chosen], SMALL_SHARE * y_n.min()))
    return np.concatenate([log_amplitude, exponents[chosen]], axis=1)


def _nonnegative(basis_GxTxn: np.ndarray, weights_Gxn: np.ndarray) -> np.ndarray:
    """argmin over x >= 0 of sum_n w (basis^T x - 1)^2 for every grid point, [G, T], exact."""
    weighted = basis_GxTxn * weights_Gxn[:, None]
    gram = weighted @ basis_GxTxn.transpose(0, 2, 1)
    moment = weighted.sum(axis=2)
    count, size = moment.shape
    best = np.zeros((count, size))
    gain = np.zeros(count)
    for k in range(1, size + 1):
        for subset in combinations(range(size), k):
            cols = np.array(subset)
            sub = gram[:, cols[:, None], cols]
            ridge = 1e-13 * np.einsum("gii->gi", sub).max(axis=1)[:, None, None] * np.eye(k)
            x = np.linalg.solve(sub + ridge, moment[:, cols][..., None])[..., 0]
            reached = (x * moment[:, cols]).sum(axis=1)  # drop of the sum of squares against x = 0
            wins = (x >= 0).all(axis=1) & (reached > gain)
            best[np.ix_(wins, cols)] = x[wins]
            best[np.ix_(wins, np.setdiff1d(np.arange(size), cols))] = 0.0
            gain[wins] = reached[wins]
    return best
