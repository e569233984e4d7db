"""Fits one law to one set of runs, from many starts, and says how good the fit is.

Losses (the sums printed as `objective`; r = ln L_pred - ln L unless said otherwise):

    log-huber  sum of 0.5 r^2 inside delta and delta (|r| - delta/2) outside
    lad        sum of |r|
    ls-log     sum of r^2
    ls         sum of (L_pred - L)^2
    student-t  minus the log likelihood of r under Student's t with 4 degrees of freedom, scale estimated
    envelope   log-huber with a run below the law weighted 1.8 and one above it 0.2: a lower envelope

Starts come from a grid over the exponents with the amplitudes by non-negative least squares on relative
residuals (`starts`). From the best of them a damped Newton method with the exact Hessian, eigenvalues made
positive, goes down; all starts, or all bootstrap draws, form one batch. The objective is divided by delta^2
inside and every stopping test is relative, so that no absolute tolerance of a library can stop it early.

It does not choose a form, draw bootstrap samples or know families. Deterministic: nothing here is random.
Invariant: `Fit.objective` is the smallest sum found and never rises above that of any start.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from scipy.special import gammaln

from ecg_jax.scaling.newton import STUDENT, Criterion, minimise
from ecg_jax.scaling.restrict import restrict

LOSSES = ("log-huber", "lad", "ls", "ls-log", "student-t", "envelope")
ENVELOPE_TILT = 0.1  # of `envelope`: a run below the law costs nine times what one above it costs
SMALLEST_DELTA = 1e-6  # below this the residuals of a noiseless table are rounding
HUBER_TUNING = 1.345  # 95 % efficiency at the normal


@dataclass(frozen=True)
class Certificate:
    """How far one may trust that the optimum was found and is one."""

    scaled_gradient: float  # largest cosine between a column of the Jacobian and the residuals; 0 at an optimum
    smallest_curvature: float  # smallest eigenvalue of the Hessian scaled to unit diagonal; <= 0: no minimum
    starts: int
    starts_agreeing: int
    second_best_gap: float | None  # relative rise of the next distinct optimum; None: there was none
    boundary: tuple[str, ...]
    converged: bool


@dataclass(frozen=True)
class Fit:
    """A fitted law. `theta` is centred (see `laws`), `raw` in the order of `law.names`, residuals as the
    loss takes them."""

    law: object  # of `laws` or `forms`, restricted or not
    theta: np.ndarray
    raw: np.ndarray
    centre: np.ndarray
    loss: str
    delta: float | None
    objective: float
    residuals: np.ndarray
    leverage: np.ndarray
    certificate: Certificate
    starts: np.ndarray  # centred starting points that were used, [K, P]
    weights: np.ndarray  # of the runs in the sum, [n]

    @property
    def n(self) -> int:
        return len(self.residuals)

    @property
    def parameters(self) -> dict[str, float]:
        return dict(zip(self.law.names, self.raw.tolist(), strict=True))

    @property
    def logarithmic(self) -> bool:
        return self.loss != "ls"

    def predict(self, log_x_nxV: np.ndarray) -> np.ndarray:
        """Loss at ln x, [n]."""
        return self.law.predict(self.theta[None], np.asarray(log_x_nxV) - self.centre)[0]

    def criterion(self) -> Criterion:
        """What was minimised, for further solves on the same footing."""
        return Criterion(
            self.logarithmic,
            np.inf if self.delta is None else self.delta,
            student=self.loss == "student-t",
            tilt=ENVELOPE_TILT if self.loss == "envelope" else 0.5,
        )


def fit_law(
    law,
    log_x: np.ndarray,
    y: np.ndarray,
    *,
    loss: str = "log-huber",
    delta: float | None = None,
    noise: float | None = None,
    weights: np.ndarray | None = None,
    n_starts: int = 10,
    fixed: Mapping[str, float | str] | None = None,
) -> Fit:
    """Fit `law` to losses y [n] (> 0) at ln x [n, V].

    loss: one of `LOSSES`. delta: Huber's, on ln L; None takes 1.345 robust standard deviations of the
    residuals, at least 1e-6. noise: standard deviation of ln L among repeated seeds, where known; with
    fewer than five degrees of freedom left it keeps delta from collapsing. weights: [n] >= 0, default 1.
    fixed: parameters held or tied by name (`restrict`). Raises ValueError with fewer rows than parameters,
    or for an unknown loss or name.
    """
    log_x, y = np.asarray(log_x, float), np.asarray(y, float)
    if loss not in LOSSES:
        raise ValueError(f"unknown loss {loss!r}; known: {', '.join(LOSSES)}")
    centre = np.where([law.centred and v != "T" for v in law.variables], log_x.mean(axis=0), 0.0)
    law = restrict(law, fixed or {}, centre)
    if len(y) < law.size:
        raise ValueError(f"{len(y)} rows cannot determine the {law.size} parameters of {law.formula}")
    weights = np.ones(len(y)) if weights is None else np.asarray(weights, float)
    z = log_x - centre
    bounds = law.bounds(y, z)
    begin = law.starts(z, y, weights, robust=loss not in ("ls", "ls-log"), count=n_starts)
    target = y if loss == "ls" else np.log(y)
    scale = None
    if loss not in ("ls", "ls-log"):
        sigma, begin = _robust_scale(law, z, target, weights, begin, bounds, noise)
        scale = max(sigma, SMALLEST_DELTA / HUBER_TUNING)
    if loss == "lad":
        return _fit_lad(law, z, y, centre, weights, begin, bounds, sigma)
    if loss == "student-t":
        return _fit_student(law, z, target, centre, weights, begin, bounds, scale)
    if loss in ("log-huber", "envelope"):
        delta = float(HUBER_TUNING * scale if delta is None else delta)
        criterion = Criterion(True, delta, tilt=ENVELOPE_TILT if loss == "envelope" else 0.5)
    else:
        delta, criterion = None, Criterion(loss == "ls-log", np.inf)
    solved = minimise(law, z, target, weights, begin, bounds, criterion, race=True)
    return _collect(law, z, target, weights, centre, begin, solved, bounds, criterion, loss, delta)


def _fit_student(law, z, target, centre, weights, begin, bounds, scale: float) -> Fit:
    """Law and scale by turns: each is the maximum of the likelihood given the other, so the sum only falls."""
    theta, total = begin, weights.sum()
    for _ in range(40):
        criterion = Criterion(True, scale, student=True)
        solved = minimise(law, z, target, weights, theta, bounds, criterion, max_iter=60)
        theta = solved.theta
        residual = np.log(law.predict(theta[[np.argmin(solved.objective)]], z))[0] - target
        before = scale
        for _ in range(50):  # fixed point of the scale's own likelihood equation
            u2 = (residual / scale) ** 2
            scale = max(scale * np.sqrt((weights * (STUDENT + 1) * u2 / (STUDENT + u2)).sum() / total), SMALLEST_DELTA)
        if abs(scale / before - 1.0) < 1e-9:
            break
    fit = _collect(law, z, target, weights, centre, begin, solved, bounds, criterion, "student-t", float(scale))
    normal = gammaln(STUDENT / 2) - gammaln((STUDENT + 1) / 2) + 0.5 * np.log(STUDENT * np.pi)
    return replace(fit, objective=float(solved.objective.min() + total * (np.log(scale) + normal)))


def _robust_scale(law, z, target, weights, begin, bounds, noise) -> tuple[float, np.ndarray]:
    """Robust standard deviation of the residuals of a robust fit, and its optimum as one more start.

    All starts go down once; the scale is then settled on the best of them: it enters delta only, and delta
    only bends the far residuals.
    """
    theta = begin
    for turn in range(3):
        residual = np.log(law.predict(theta, z)) - target
        best = residual[np.nanargmin(np.abs(residual) @ weights)]
        # A robust fit passes close to P points, whose residuals say nothing about the noise.
        far = np.sort(np.abs(best))[min(law.size, len(best) - 1) :]
        sigma = 1.4826 * float(np.median(far))
        if noise is not None and len(best) - law.size < 5:
            sigma = max(sigma, noise)
        criterion = Criterion(True, max(HUBER_TUNING * sigma, SMALLEST_DELTA))
        solved = minimise(law, z, target, weights, theta, bounds, criterion, max_iter=60, race=True)
        theta = solved.theta[[np.argmin(solved.objective)]] if turn == 0 else solved.theta
    return sigma, np.concatenate([begin, theta])


def _fit_lad(law, z, y, centre, weights, begin, bounds, sigma) -> Fit:
    """Least absolute deviations by Huber's criterion with delta going to zero, then the exact vertex."""
    target = np.log(y)
    theta, delta = begin, max(sigma, SMALLEST_DELTA)
    for factor in (1.0, 0.3, 0.1, 0.03, 0.01, 3e-3, 1e-3, 1e-4):
        criterion = Criterion(True, factor * delta)
        solved = minimise(law, z, target, weights, theta, bounds, criterion)
        theta = solved.theta
    fit = _collect(law, z, target, weights, centre, begin, solved, bounds, criterion, "lad", None)
    vertex = _vertex(law, z, target, fit.theta, np.abs(fit.residuals))
    residual = np.log(law.predict(vertex[None], z))[0] - target
    if np.abs(residual) @ weights < np.abs(fit.residuals) @ weights:
        fit = replace(fit, theta=vertex, raw=law.raw(vertex, centre), residuals=residual)
    return replace(fit, objective=float(np.abs(fit.residuals) @ weights))


def _vertex(law, z: np.ndarray, target: np.ndarray, theta: np.ndarray, distance: np.ndarray) -> np.ndarray:
    """The law through the P points it almost passes through (an L1 optimum is such a vertex)."""
    rows = np.argsort(distance)[: law.size]
    for _ in range(20):
        pred, jac = law.evaluate(theta[None], z[rows])
        jac = (jac / pred[:, None])[0].T
        if not np.all(np.isfinite(jac)) or np.linalg.cond(jac) > 1e12:
            break
        step = np.linalg.solve(jac, np.log(pred[0]) - target[rows])
        if not np.abs(step).max() < 0.1:
            break
        theta = theta - step
    return theta


def _collect(law, z, target, weights, centre, begin, solved, bounds, criterion, loss, delta) -> Fit:
    """The best of the solved starts as a `Fit` with its certificate."""
    best = int(np.argmin(solved.objective))
    theta = solved.theta[best]
    low = theta <= bounds.low + 1e-9
    zero = np.where(low & law.zeroable(), -np.inf, theta)  # exp gives exactly 0
    pred = law.predict(zero[None], z)[0]
    residual = np.log(pred) - target if criterion.logarithmic else pred - target
    scale = 1.0 if criterion.student else criterion.delta**2 if np.isfinite(criterion.delta) else 2.0
    gap = solved.objective / max(solved.objective[best], 1e-300) - 1.0
    noiseless = np.sqrt(np.mean(residual**2)) < 1e-12 * (1.0 if criterion.logarithmic else np.abs(target).max())
    tol = np.inf if noiseless else 1e-7
    other = gap[(gap > max(tol, 1e-7)) & solved.converged]
    certificate = Certificate(
        scaled_gradient=float(solved.scaled_gradient[best]),
        smallest_curvature=float(solved.smallest_curvature[best]),
        starts=len(begin),
        starts_agreeing=int((gap <= tol).sum()),
        second_best_gap=float(other.min()) if len(other) else None,
        boundary=law.edge_words(theta, low | (theta >= bounds.high - 1e-9)),
        converged=bool(solved.converged[best] or noiseless),
    )
    return Fit(
        law=law,
        theta=zero,
        raw=law.raw(zero, centre),
        centre=centre,
        loss=loss,
        delta=delta,
        objective=float(solved.objective[best] * scale),
        residuals=residual,
        leverage=_leverage(law, z, zero, weights, criterion.logarithmic),
        certificate=certificate,
        starts=begin,
        weights=weights,
    )


def _leverage(law, z: np.ndarray, theta: np.ndarray, weights: np.ndarray, logarithmic: bool) -> np.ndarray:
    """Diagonal of the hat matrix of the linearised fit, [n], in [0, 1]."""
    pred, jac = law.evaluate(theta[None], z)
    jac = jac[0].T / (pred[0][:, None] if logarithmic else 1.0)
    jac = jac * np.sqrt(weights)[:, None]
    norm = np.linalg.norm(jac, axis=0)
    jac = jac[:, norm > 0] / norm[norm > 0]
    u, s, _ = np.linalg.svd(jac, full_matrices=False)
    return np.clip((u[:, s > 1e-10 * s[0]] ** 2).sum(axis=1), 0.0, 1.0)
