"""Laws of more than N and D: repeated data, two losses of the same runs, two families.

    data-constrained   L = E + A N'^-alpha + B D'^-beta with the effective sizes N', D' of Muennighoff et al. 2023:
               D examples seen, U of them distinct, D' = U + U RD (1 - exp(-(D/U - 1)/RD)), N' likewise against
               the size that is compute-optimal for U
    loss-to-loss  L = Eo + K (x - E)^kappa of another loss x of the same runs
    ratio      Hoffmann's law for two families, one of which (T = 1) needs m times the parameters of the other
    transfer   g = A N^-alpha + B D^-beta; L = E + g where T = 0 (ID), L = Eo + K g^kappa where T = 1 (OOD)

No fitting. Invariant: `transfer` at T = 0, `ratio` at m = 1 and `data-constrained` without repeats are the
Hoffmann law.
"""

import numpy as np

from ecg_jax.scaling import jets, laws
from ecg_jax.scaling.formula import JOINT, PAIR, Formula, with_levels
from ecg_jax.scaling.jets import Jet

# --------------------------------------------------------------- repeated data, and transfer to OOD


def _data_constrained(p: list[Jet], z: list[np.ndarray]) -> Jet:
    e, a, b, alpha, beta, log_rd, log_rn = p
    n, d, u = z
    log_g = (jets.log(alpha) + a - jets.log(beta) - b) / (alpha + beta)
    best = (log_g + u) * beta / alpha + log_g  # ln of the size that is compute-optimal for U
    smaller = best.value < n
    useful = best * (1.0 * smaller) + n * (1.0 * ~smaller)
    terms = [_effective(useful, n - useful, log_rn) * -alpha + a]
    terms.append(_effective(log_rd * 0.0 + u, log_rd * 0.0 + (d - u), log_rd) * -beta + b)
    return jets.exp(e) + jets.exp(terms[0]) + jets.exp(terms[1])


def _effective(log_once: Jet, log_times: Jet, log_r: Jet) -> Jet:
    """ln of once (1 + R* (1 - exp(-(times - 1) / R*)))."""
    repeats = jets.exp(log_times) - 1.0
    star = jets.exp(log_r)
    return log_once + jets.log(star * (1.0 - jets.exp(-(repeats / star))) + 1.0)


def _transfer(p: list[Jet], z: list[np.ndarray]) -> Jet:
    e, a, b, alpha, beta, e_ood, k, kappa = p
    log_g = jets.log(jets.exp(a - alpha * z[0]) + jets.exp(b - beta * z[1]))
    centre = jets.log(jets.exp(a) + jets.exp(b))
    ood = z[2] > 0
    at_home = jets.exp(e) + jets.exp(log_g)
    abroad = jets.exp(e_ood) + jets.exp(k + kappa * (log_g - centre))
    return at_home * (1.0 - ood) + abroad * (1.0 * ood)


CONSTRAINED = Formula(
    "data-constrained", ("N", "D", "U"), ("E", "A", "B", "alpha", "beta", "RD", "RN"),
    ("floor", "free", "free", "exponent", "exponent", "repeats", "repeats"),
    "E + A N'^-alpha + B D'^-beta",
    _data_constrained, lambda e, a, b, alpha, beta, rd, rn, *_: [
        np.exp(e), np.exp(a), np.exp(b), alpha, beta, np.exp(rd), np.exp(rn)],
    JOINT, lambda some, z, y: np.concatenate([
        np.column_stack([some[:3], np.full((len(some[:3]), 2), np.log([rd, rn]))])
        for rd in (3.0, 20.0, 120.0) for rn in (2.0, 8.0, 40.0)
    ]), centred=False,
)  # fmt: skip


def _transfer_starts(some: np.ndarray, z: np.ndarray, y: np.ndarray) -> np.ndarray:
    """ID part from the ID rows; OOD part by non-negative least squares for a few exponents kappa."""
    out = []
    ood = z[:, 2] > 0
    for theta in some[:4]:
        e, a, b, alpha, beta = theta
        log_g = np.logaddexp(a - alpha * z[ood, 0], b - beta * z[ood, 1]) - np.logaddexp(a, b)
        for kappa in (0.15, 0.4, 0.8, 1.3):
            basis = np.stack([np.ones(ood.sum()), np.exp(kappa * log_g)], axis=1) / y[ood, None]
            level = np.linalg.lstsq(basis, np.ones(ood.sum()), rcond=None)[0]
            level = np.log(np.maximum(level, 1e-3 * y[ood].min()))
            out.append([e, a, b, alpha, beta, level[0], level[1], kappa])
    return np.array(out)


TRANSFER = Formula(
    "transfer", ("N", "D", "T"), ("E", "A", "B", "alpha", "beta", "Eo", "K", "kappa"),
    (*PAIR, "floor", "amplitude", "exponent"), "E + g; Eo + K g^kappa, g = A N^-alpha + B D^-beta",
    _transfer, lambda e, a, b, alpha, beta, eo, k, kappa, n, d, *_: [
        np.exp(e), np.exp(a + alpha * n), np.exp(b + beta * d), alpha, beta, np.exp(eo),
        np.exp(k - kappa * np.logaddexp(a, b)), kappa],
    JOINT, _transfer_starts,
)  # fmt: skip


def _ratio(p: list[Jet], z: list[np.ndarray]) -> Jet:
    e, a, b, alpha, beta, log_m = p
    return jets.exp(e) + jets.exp(a - alpha * (z[0] - log_m * z[2])) + jets.exp(b - beta * z[1])


RATIO = Formula(
    "ratio", ("N", "D", "T"), ("E", "A", "B", "alpha", "beta", "m"), (*PAIR, "ratio"),
    "E + A (N/m)^-alpha + B D^-beta, m = 1 in the first family", _ratio, lambda e, a, b, alpha, beta, m, n, d, *_: [
        np.exp(e), np.exp(a + alpha * n), np.exp(b + beta * d), alpha, beta, np.exp(m)],
    JOINT, with_levels((-0.7, 0.0, 0.7)),
)  # fmt: skip


def _loss_to_loss(p: list[Jet], z: list[np.ndarray]) -> Jet:
    e_ood, k, kappa, e = p
    centre = jets.log(1.0 - jets.exp(e))  # K is the excess where ln x is at its mean
    return jets.exp(e_ood) + jets.exp(k + kappa * (jets.log(1.0 - jets.exp(e - z[0])) + z[0] - centre))


def _loss_to_loss_raw(e_ood, k, kappa, e, c):
    return [np.exp(e_ood), np.exp(k - kappa * (c + np.log1p(-np.exp(e)))), kappa, np.exp(e + c)]


def _loss_to_loss_starts(some: np.ndarray, z: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Eo and K by least squares for a few floors of x and a few kappa."""
    out = []
    for part in (1e-3, 0.5, 0.9, 0.99):
        e = z.min() + np.log(part)
        excess = (np.exp(z[:, 0]) - np.exp(e)) / (1.0 - np.exp(e))
        for kappa in (0.3, 0.7, 1.0, 1.6):
            basis = np.stack([np.ones(len(y)), excess**kappa], axis=1) / y[:, None]
            level = np.linalg.lstsq(basis, np.ones(len(y)), rcond=None)[0]
            out.append([*np.log(np.maximum(level, 1e-3 * y.min())), kappa, e])
    return np.array(out)


LOSS_TO_LOSS = Formula(
    "loss-to-loss", ("L",), ("Eo", "K", "kappa", "E"), ("floor", "amplitude", "exponent", "below"),
    "Eo + K (L_ID - E)^kappa", _loss_to_loss, _loss_to_loss_raw, laws.Law("power", ("L",), floor=True),
    _loss_to_loss_starts,
)  # fmt: skip

OTHERS = {(f.name, f.variables): f for f in (CONSTRAINED, TRANSFER, RATIO, LOSS_TO_LOSS)}
